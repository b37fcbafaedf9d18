"""T5X's own network, run on a checkpoint of T5X."""

from flax import traverse_util

from imagen_jax.errors import UserError
from imagen_jax.models.t5 import T5Config
from imagen_jax.text.t5 import PretrainedT5
from imagen_jax.text.t5_checkpoints import open_checkpoint
from imagen_jax.text.t5_weights import tensors


def load_t5x(checkpoint: str, dtype: str) -> PretrainedT5:
    """The encoder in a checkpoint, as `t5x.examples.t5.network` computes it.

    The tensors' shapes say its sizes, so it can be any T5 that this network runs: T5
    1.0, 1.1, mT5, Flan-T5.
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
        model = network.Transformer(
            network.T5Config(
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
        )
        variables = {"params": to_t5x(params, config)}
        return model.apply(variables, ids, enable_dropout=False, method=model.encode)

    config = config_of(checkpoint, dtype)
    return PretrainedT5("t5x", checkpoint, dtype, config=config, network=run)


def config_of(path: str, dtype: str) -> T5Config:
    """The sizes of the encoder in a checkpoint of T5X."""
    shapes, layer = open_checkpoint(path).shapes, "target.encoder.layers_0."
    gated = f"{layer}mlp.wi_0.kernel" in shapes
    try:
        vocab_size, d_model = shapes["target.token_embedder.embedding"]
        heads, _ = shapes["target.encoder.relpos_bias.rel_embedding"]
        _, width = shapes[f"{layer}attention.query.kernel"]
        _, d_ff = shapes[f"{layer}mlp.wi{'_0' * gated}.kernel"]
    except (KeyError, ValueError) as error:
        raise UserError(f"{path!r} is no T5 encoder of T5X: {error}") from None
    layers = {name.split(".")[2] for name in shapes if ".encoder.layers_" in name}
    return T5Config(
        vocab_size, len(layers), d_model, d_ff, width // heads, heads, gated, dtype
    )


def to_t5x(params: dict, config: T5Config) -> dict:
    """Parameters of `T5Encoder` as T5X names and shapes them."""
    flat, renamed = traverse_util.flatten_dict(params, sep="."), {}
    for tensor in tensors(config, "t5x"):
        x = flat[tensor.path]
        x = x.T if tensor.transposed else x.reshape(tensor.stored_shape)
        renamed[tensor.name.removeprefix("target.")] = x
    return traverse_util.unflatten_dict(renamed, sep=".")
