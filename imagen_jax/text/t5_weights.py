"""The T5 encoder's parameters from a checkpoint, tensor by tensor onto devices."""

import dataclasses
import functools
import hashlib
import json
import math
import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import tqdm
from flax import traverse_util
from jax.sharding import Mesh

from imagen_jax.errors import UserError
from imagen_jax.models.t5 import SIZES, T5Config, T5Encoder
from imagen_jax.sharding import state_shardings
from imagen_jax.text import t5_checkpoints

# Each parameter's names: ours, transformers' and T5X's.
_MODEL = (
    ("token_embedding", "shared.weight", "target.token_embedder.embedding"),
    (
        "relative_bias",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        "target.encoder.relpos_bias.rel_embedding",
    ),
    (
        "final_norm.scale",
        "encoder.final_layer_norm.weight",
        "target.encoder.encoder_norm.scale",
    ),
)
_LAYER = (
    ("attention_norm_{}.scale", "0.layer_norm", "pre_attention_layer_norm.scale"),
    ("attention_{}.query", "0.SelfAttention.q", "attention.query.kernel"),
    ("attention_{}.key", "0.SelfAttention.k", "attention.key.kernel"),
    ("attention_{}.value", "0.SelfAttention.v", "attention.value.kernel"),
    ("attention_{}.out", "0.SelfAttention.o", "attention.out.kernel"),
    ("feed_forward_norm_{}.scale", "1.layer_norm", "pre_mlp_layer_norm.scale"),
)
_GATED = (
    ("feed_forward_{}.gate", "1.DenseReluDense.wi_0", "mlp.wi_0.kernel"),
    ("feed_forward_{}.linear", "1.DenseReluDense.wi_1", "mlp.wi_1.kernel"),
    ("feed_forward_{}.out", "1.DenseReluDense.wo", "mlp.wo.kernel"),
)
_RELU = (
    ("feed_forward_{}.linear", "1.DenseReluDense.wi", "mlp.wi.kernel"),
    ("feed_forward_{}.out", "1.DenseReluDense.wo", "mlp.wo.kernel"),
)
# transformers stores the embedding under one of two names, or under both.
_ALIASES = {"shared.weight": "encoder.embed_tokens.weight"}
_IN_LAYER = re.compile(r"encoder\.block\.|target\.encoder\.layers_")
_IN_ENCODER = re.compile(r"(target\.)?encoder\.|shared\.|target\.token_embedder\.")


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A parameter: its path in ours, and its name and shape in a checkpoint."""

    path: str
    name: str
    shape: tuple[int, ...]
    stored_shape: tuple[int, ...]
    transposed: bool

    @property
    def exact(self) -> bool:
        """Whether it stays float32 where the computation is bfloat16."""
        return self.path.endswith(("scale", "relative_bias", "token_embedding"))


def tensors(config: T5Config, kind: str) -> Iterator[_Tensor]:
    """Every parameter of an encoder as a checkpoint of `kind` stores it."""
    names = list(_MODEL)
    for i in range(config.num_layers):
        for ours, theirs, t5x in (*_LAYER, *(_GATED if config.gated else _RELU)):
            theirs = f"encoder.block.{i}.layer.{theirs}.weight"
            names.append((ours.format(i), theirs, f"target.encoder.layers_{i}.{t5x}"))
    shapes = abstract_first_layer(config)
    for path, theirs, t5x in names:
        shape, leaf = shapes[in_first_layer(path)].value.shape, path.split(".")[-1]
        flat = shape
        if leaf in ("query", "key", "value"):
            flat = (shape[0], shape[1] * shape[2])
        elif leaf == "out":
            flat = (math.prod(shape[:-1]), shape[-1])
        # torch keeps kernels as [out, in]; T5X keeps the bias as [heads, buckets].
        if kind == "t5x":
            transposed = leaf == "relative_bias"
        else:
            transposed = leaf not in ("relative_bias", "token_embedding", "scale")
        stored = flat[::-1] if transposed else flat
        yield _Tensor(path, t5x if kind == "t5x" else theirs, shape, stored, transposed)


def in_first_layer(path: str) -> str:
    """The path of the same parameter in the first layer; its own outside of layers."""
    return re.sub(r"_\d+\.", "_0.", path)


@functools.cache
def abstract_first_layer(config: T5Config) -> dict:
    """Abstract, boxed parameters by path, with the first layer only.

    The others are like it, and tracing 24 of them takes a second.
    """
    model = T5Encoder(dataclasses.replace(config, num_layers=1))
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    mask = jax.ShapeDtypeStruct((1, 1), jnp.bool_)
    init = jax.eval_shape(model.init, jax.random.key(0), ids, mask)
    return traverse_util.flatten_dict(init["params"], sep=".")


def load_params(path: str, config: T5Config, mesh: Mesh) -> tuple[dict, str]:
    """Reads an encoder onto the devices of `mesh`.

    Kernels are kept in `config.dtype`, which they are cast to anyway where they are
    used; embedding, norms and position bias in float32. The host never holds more than
    one tensor, as it is stored and as it is kept.

    Args:
      path: a file or folder that `t5_checkpoints.open_checkpoint` takes.
      config: the sizes that the checkpoint must have.
      mesh: devices of this process.

    Returns:
      The parameters of `T5Encoder(config)`, and the SHA-256 of their numbers. Equal
      numbers have equal sums, whatever the kind of checkpoint and the mesh.

    Raises:
      UserError: when a tensor is missing, unknown, of another shape, or (found only
        while reading) not finite.
    """
    checkpoint = t5_checkpoints.open_checkpoint(path)
    wanted = _check_shapes(checkpoint, path, config)
    shardings = state_shardings(abstract_first_layer(config), mesh)
    params, digest = {}, hashlib.sha256()
    for tensor in tqdm.tqdm(wanted, desc="weights", leave=False, disable=None):
        array = _read(checkpoint, tensor, config.dtype)
        digest.update(json.dumps([tensor.path, *tensor.shape]).encode())
        digest.update(array.view(np.uint8).reshape(-1))
        placed = jax.device_put(array, shardings[in_first_layer(tensor.path)])
        # Waits too, or the next tensor would be read while this one is still sent.
        if not jnp.isfinite(placed).all():
            raise UserError(
                f"{tensor.name!r} in {path!r} holds values that are inf or NaN: the "
                "file is damaged, or was converted to float16 on its way"
            )
        params[tensor.path] = placed
    return traverse_util.unflatten_dict(params, sep="."), digest.hexdigest()


def _read(checkpoint, tensor: _Tensor, dtype: str) -> np.ndarray:
    array = checkpoint.read(tensor.name)
    dtype = np.float32 if tensor.exact or dtype == "float32" else ml_dtypes.bfloat16
    if not tensor.transposed:
        array = np.ascontiguousarray(array.astype(dtype, copy=False))
        return array.reshape(tensor.shape)
    out = np.empty(array.shape[::-1], dtype)
    # Some rows at a time stay in the cache, which is four times as fast as all at once.
    for start in range(0, len(array), 64):
        out[:, start : start + 64] = array[start : start + 64].T
    return out.reshape(tensor.shape)


def _check_shapes(checkpoint, path: str, config: T5Config) -> list[_Tensor]:
    """The tensors to read, under the names that the checkpoint has."""
    have, found, faults = checkpoint.shapes, [], []
    for tensor in tensors(config, checkpoint.kind):
        alias = _ALIASES.get(tensor.name)
        if tensor.name not in have and alias in have:
            tensor = dataclasses.replace(tensor, name=alias)
        if tensor.name not in have:
            faults.append(f"lacks {tensor.name!r} of shape {tensor.stored_shape}")
        elif have[tensor.name] != tensor.stored_shape:
            faults.append(
                f"has {tensor.name!r} of shape {have[tensor.name]}, not "
                f"{tensor.stored_shape}"
            )
        found.append(tensor)
    known = {tensor.name for tensor in found} | {*_ALIASES, *_ALIASES.values()}
    faults += [
        f"has {name!r} of shape {have[name]}, which this size does not have"
        for name in have
        if _IN_ENCODER.match(name) and name not in known
    ]
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise UserError(
            f"the checkpoint {path!r} {faults[0]}{more}{_size_hint(checkpoint, config)}"
        )
    return found


def _size_hint(checkpoint, asked: T5Config) -> str:
    """Names the other size that the checkpoint's layers have, if there is one."""
    layers = {k: v for k, v in checkpoint.shapes.items() if _IN_LAYER.match(k)}
    for name, config in SIZES.items():
        wanted = {t.name: t.stored_shape for t in tensors(config, checkpoint.kind)}
        other = dataclasses.replace(config, dtype=asked.dtype) != asked
        if other and layers and layers.items() <= wanted.items():
            return f": its shapes are those of {name}; give --encoder={name}"
    return ""
