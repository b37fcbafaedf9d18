"""Records t5_sizes.npz: T5 encoders of published sizes, by Hugging Face transformers.

Only outputs are kept: weights are drawn by tests/drawn.py. Run from the repository's
root with `pip install torch transformers` (recorded with torch 2.13, transformers
5.23): PYTHONPATH=. python tests/references/make_t5_sizes.py
"""

import pathlib

import numpy as np
import torch
import transformers

from tests import drawn

# Source: config.json of google/t5-v1_1-small, t5-v1_1-base, t5-v1_1-xxl and t5-small.
# Of XXL one layer of 24 and 512 rows of the embedding.
SIZES = {
    "t5_1_1_small": (32_128, 8, 512, 1024, 6, "gated-gelu"),
    "t5_1_1_base": (32_128, 12, 768, 2048, 12, "gated-gelu"),
    "t5_1_1_xxl": (512, 1, 4096, 10_240, 64, "gated-gelu"),
    "t5_1_0_small": (32_128, 6, 512, 2048, 8, "relu"),
}
KEPT_CHANNELS = 64

values = {}
for name, (vocab_size, layers, d_model, d_ff, heads, act) in SIZES.items():
    config = transformers.T5Config(
        vocab_size=vocab_size,
        num_layers=layers,
        d_model=d_model,
        d_ff=d_ff,
        d_kv=64,
        num_heads=heads,
        feed_forward_proj=act,
        dropout_rate=0.0,
    )
    model = transformers.T5EncoderModel(config).eval()
    with torch.inference_mode():
        for key, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(drawn.t5(key, tuple(parameter.shape))))
        mask = np.arange(40)[None] < np.array([[40], [13]])
        ids = np.random.RandomState(0).randint(1, vocab_size, mask.shape) * mask
        out = model(
            input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)
        ).last_hidden_state.numpy()
    values[f"{name}.ids"] = ids.astype(np.int32)
    values[name] = out[mask][:, :: d_model // KEPT_CHANNELS]
np.savez_compressed(pathlib.Path(__file__).with_name("t5_sizes.npz"), **values)
