"""Records t5x.zip: a checkpoint that T5X wrote and what T5X's network makes of it.

A small random T5 v1.1, saved by t5x.checkpoints.Checkpointer; outputs.npz beside it
holds token ids and the encoder's float32 embeddings. Run with T5X installed:
python tests/references/make_t5x.py (recorded at commit cc342d4 of T5X with jax 0.10.2,
without the packages airio and jestimator, which neither file needs).
"""

import io
import pathlib
import tempfile
import zipfile

import flax
import jax
import numpy as np
from t5x import checkpoints, partitioning, train_state
from t5x.examples.t5 import network

config = network.T5Config(
    vocab_size=96,
    dtype="float32",
    emb_dim=32,
    num_heads=4,
    num_encoder_layers=2,
    num_decoder_layers=1,
    head_dim=12,
    mlp_dim=48,
    mlp_activations=("gelu", "linear"),
    dropout_rate=0.0,
)
model = network.Transformer(config)
random = np.random.RandomState(0)
lengths = np.array([[140], [37], [1]])
mask = np.arange(140)[None] < lengths
ids = (random.randint(1, 96, mask.shape) * mask).astype(np.int32)
variables = flax.core.unfreeze(
    model.init(jax.random.key(0), ids, ids, ids, enable_dropout=False)
)


def drawn(path, leaf):
    # Norms start at one and biases near zero: drawn, so that they are tested.
    name = jax.tree_util.keystr(path)
    if "scale" in name:
        return (0.5 + random.rand(*leaf.shape)).astype(np.float32)
    if "rel_embedding" in name:
        return random.randn(*leaf.shape).astype(np.float32)
    return np.asarray(leaf)


variables["params"] = jax.tree_util.tree_map_with_path(drawn, variables["params"])
out = model.apply(
    {"params": variables["params"]}, ids, enable_dropout=False, method=model.encode
)
outputs = io.BytesIO()
np.savez(outputs, ids=ids, out=np.asarray(out)[mask])
with tempfile.TemporaryDirectory() as folder:
    state = train_state.InferenceState.create(flax.core.freeze(variables))
    partitioner = partitioning.PjitPartitioner(num_partitions=1)
    checkpoints.Checkpointer(state, partitioner, folder).save(state)
    target = pathlib.Path(__file__).with_name("t5x.zip")
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(pathlib.Path(folder).rglob("*")):
            # The decoder is in the msgpack file, but its arrays are not kept.
            if path.is_file() and ".decoder." not in str(path):
                archive.write(path, path.relative_to(folder))
        archive.writestr("outputs.npz", outputs.getvalue())
