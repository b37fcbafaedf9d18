"""The T5 encoder's parameters from a checkpoint, tensor by tensor onto devices."""

import dataclasses
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
from imagen_jax.models.t5 import T5Config, abstract_params
from imagen_jax.sharding import state_shardings
from imagen_jax.text.t5_checkpoints import Checkpoint, open_checkpoint

# Each parameter's names: ours, transformers' (before ".weight"), T5X's (in "target.").
_MODEL = (
    ("token_embedding", "shared", "token_embedder.embedding"),
    (
        "relative_bias",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
        "encoder.relpos_bias.rel_embedding",
    ),
    ("final_norm.scale", "encoder.final_layer_norm", "encoder.encoder_norm.scale"),
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
_SHARED, _ALIAS = "shared.weight", "encoder.embed_tokens.weight"
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
            theirs = f"encoder.block.{i}.layer.{theirs}"
            names.append((ours.format(i), theirs, f"encoder.layers_{i}.{t5x}"))
    params = traverse_util.flatten_dict(abstract_params(config), sep=".")
    for path, theirs, t5x in names:
        shape, leaf = params[path].value.shape, path.split(".")[-1]
        flat = shape
        if leaf in ("query", "key", "value"):
            flat = (shape[0], shape[1] * shape[2])
        elif leaf == "out":
            flat = (math.prod(shape[:-1]), shape[-1])
        # torch keeps kernels as [out, in]; T5X keeps the bias as [heads, buckets].
        if kind == "t5x":
            name, transposed = f"target.{t5x}", leaf == "relative_bias"
        else:
            name = f"{theirs}.weight"
            transposed = leaf not in ("relative_bias", "token_embedding", "scale")
        stored = flat[::-1] if transposed else flat
        yield _Tensor(path, name, shape, stored, transposed)


def load_params(path: str, config: T5Config, mesh: Mesh) -> tuple[dict, str]:
    """Reads an encoder from `open_checkpoint(path)` onto the devices of `mesh`.

    Kernels are kept in `config.dtype`, which they are cast to anyway where they are
    used; embedding, norms and position bias in float32. The host never holds more than
    one tensor, as it is stored and as it is kept.

    Returns:
      The parameters of `T5Encoder(config)`, and the SHA-256 of their numbers. Equal
      numbers have equal sums, whatever the kind of checkpoint and the mesh.
    """
    checkpoint = open_checkpoint(path)
    wanted = _check_shapes(checkpoint, path, config)
    shardings = state_shardings(abstract_params(config), mesh)
    shardings = traverse_util.flatten_dict(shardings, sep=".")
    params, digest = {}, hashlib.sha256()
    for tensor in tqdm.tqdm(wanted, desc="weights", leave=False, disable=None):
        array = _read(checkpoint, tensor, config.dtype)
        digest.update(json.dumps([tensor.path, *tensor.shape]).encode())
        digest.update(array.view(np.uint8).reshape(-1))
        placed = jax.device_put(array, shardings[tensor.path])
        # Waits too, or the next tensor would be read while this one is still sent.
        if not jnp.isfinite(placed).all():
            raise UserError(
                f"{tensor.name!r} in {path!r} holds values that are inf or NaN: the "
                "file is damaged, or was converted to float16 on its way"
            )
        params[tensor.path] = placed
    return traverse_util.unflatten_dict(params, sep="."), digest.hexdigest()


def _read(checkpoint: Checkpoint, tensor: _Tensor, dtype: str) -> np.ndarray:
    array = checkpoint.read(tensor.name)
    if np.issubdtype(array.dtype, np.integer):
        raise UserError(
            f"{tensor.name!r} is quantised to {array.dtype}: take weights of floats"
        )
    dtype = np.float32 if tensor.exact or dtype == "float32" else ml_dtypes.bfloat16
    if not tensor.transposed:
        array = np.ascontiguousarray(array.astype(dtype, copy=False))
        return array.reshape(tensor.shape)
    out = np.empty(array.shape[::-1], dtype)
    # Some rows at a time stay in the cache, which is four times as fast as all at once.
    for start in range(0, len(array), 64):
        out[:, start : start + 64] = array[start : start + 64].T
    return out.reshape(tensor.shape)


def _check_shapes(checkpoint: Checkpoint, path: str, config: T5Config) -> list[_Tensor]:
    """The tensors to read, under the names that the checkpoint has."""
    have, faults = checkpoint.shapes, []
    wanted = {tensor.name: tensor for tensor in tensors(config, checkpoint.kind)}
    if _SHARED in wanted and _SHARED not in have and _ALIAS in have:
        wanted[_SHARED] = dataclasses.replace(wanted[_SHARED], name=_ALIAS)
    for tensor in wanted.values():
        shape, found = tensor.stored_shape, have.get(tensor.name)
        if found is None:
            faults.append(f"lacks {tensor.name!r} of shape {shape}")
        elif found != shape:
            faults.append(f"has {tensor.name!r} of shape {found}, not {shape}")
    faults += [
        f"has {name!r} of shape {have[name]}, which this size does not have"
        for name in have
        if _IN_ENCODER.match(name) and name not in (*wanted, _ALIAS)
    ]
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise UserError(f"the checkpoint {path!r} {faults[0]}{more}")
    return list(wanted.values())
