"""T5X's own network, run on a checkpoint of T5X."""

import jax
import jax.numpy as jnp

from imagen_jax.errors import UserError
from imagen_jax.models.t5 import T5Config
from imagen_jax.text import t5_checkpoints
from imagen_jax.text.t5 import PretrainedT5


def load_t5x(checkpoint: str, dtype: str) -> PretrainedT5:
    """The encoder of a checkpoint, as `t5x.examples.t5.network` computes it.

    Its sizes are those of the checkpoint's tensors, so any T5 fits that the network
    of T5X's examples can be: T5 1.0, 1.1, mT5, Flan-T5.

    Args:
      checkpoint: T5X's folder, with a SentencePiece model beside it.
      dtype: "bfloat16" or "float32", of the computation.

    Raises:
      UserError: when T5X is not installed, or the checkpoint is not one of its own.
    """
    try:
        from t5x.examples.t5 import network
    except ImportError as error:
        raise UserError(
            f"--encoder=t5x:... runs T5X's own network, which cannot be imported "
            f"({error}): pip install 'imagen-jax[t5x]', or read the same checkpoint "
            "with --encoder=t5_1_1_SIZE --encoder_weights=CHECKPOINT"
        ) from None

    def run(config, params, ids, mask):
        del mask  # T5X takes every id but 0 as a token.
        theirs = network.T5Config(
            vocab_size=config.vocab_size,
            dtype=config.dtype,
            emb_dim=config.d_model,
            num_heads=config.num_heads,
            num_encoder_layers=config.num_layers,
            num_decoder_layers=0,
            head_dim=config.d_kv,
            mlp_dim=config.d_ff,
            mlp_activations=("gelu", "linear") if config.gated else ("relu",),
            dropout_rate=0.0,
        )
        model = network.Transformer(theirs)
        precision = "highest" if config.dtype == "float32" else "default"
        with jax.default_matmul_precision(precision):
            return model.apply(
                {"params": to_t5x(params, config)},
                ids,
                enable_dropout=False,
                method=model.encode,
            )

    config = config_of(checkpoint, dtype)
    return PretrainedT5("t5x", checkpoint, dtype, config=config, network=run)


def config_of(path: str, dtype: str) -> T5Config:
    """The sizes of a checkpoint of T5X.

    Raises:
      UserError: when it is no checkpoint of a T5 encoder by T5X.
    """
    checkpoint = t5_checkpoints.open_checkpoint(path)
    have, layer = checkpoint.shapes, "target.encoder.layers_0."
    gated = f"{layer}mlp.wi_0.kernel" in have
    try:
        vocab_size, d_model = have["target.token_embedder.embedding"]
        heads, _ = have["target.encoder.relpos_bias.rel_embedding"]
        _, width = have[f"{layer}attention.query.kernel"]
        _, d_ff = have[f"{layer}mlp.wi{'_0' * gated}.kernel"]
    except (KeyError, ValueError) as error:
        raise UserError(
            f"{path!r} is no checkpoint of a T5 encoder by T5X: {error}"
        ) from None
    layers = {name.split(".")[2] for name in have if ".encoder.layers_" in name}
    return T5Config(
        vocab_size=vocab_size,
        num_layers=len(layers),
        d_model=d_model,
        d_ff=d_ff,
        d_kv=width // heads,
        num_heads=heads,
        gated=gated,
        dtype=dtype,
    )


def to_t5x(params: dict, config: T5Config) -> dict:
    """Parameters of `T5Encoder` as T5X names and shapes them."""
    encoder = {
        "relpos_bias": {"rel_embedding": params["relative_bias"].T},
        "encoder_norm": params["final_norm"],
    }
    for i in range(config.num_layers):
        attention = {
            name: {"kernel": jnp.reshape(kernel, (config.d_model, -1))}
            for name, kernel in params[f"attention_{i}"].items()
            if name != "out"
        }
        out = params[f"attention_{i}"]["out"]
        attention["out"] = {"kernel": jnp.reshape(out, (-1, config.d_model))}
        inside = params[f"feed_forward_{i}"]
        names = {"linear": "wi_1", "gate": "wi_0", "out": "wo"}
        if not config.gated:
            names = {"linear": "wi", "out": "wo"}
        encoder[f"layers_{i}"] = {
            "pre_attention_layer_norm": params[f"attention_norm_{i}"],
            "attention": attention,
            "pre_mlp_layer_norm": params[f"feed_forward_norm_{i}"],
            "mlp": {t5x: {"kernel": inside[ours]} for ours, t5x in names.items()},
        }
    embedding = {"embedding": params["token_embedding"]}
    return {"token_embedder": embedding, "encoder": encoder}
