"""Records t5.npz: a small random T5 v1.1 encoder run by Hugging Face transformers.

Run with `pip install torch transformers` (recorded with torch 2.13, transformers
5.23): python tests/references/make_t5.py
"""

import pathlib

import numpy as np
import torch
import transformers
from transformers.models.t5.modeling_t5 import T5Attention

torch.manual_seed(0)
config = transformers.T5Config(
    vocab_size=50,
    d_model=32,
    d_kv=8,
    d_ff=48,
    num_layers=2,
    num_heads=3,
    feed_forward_proj="gated-gelu",
    dropout_rate=0.0,
)
model = transformers.T5EncoderModel(config).eval()
with torch.no_grad():
    for name, parameter in model.named_parameters():
        # Norms start at one and biases near zero: drawn, so that they are tested.
        if "layer_norm" in name:
            parameter.copy_(0.5 + torch.rand_like(parameter))
        if "relative_attention_bias" in name:
            parameter.copy_(torch.randn_like(parameter))
    lengths = torch.tensor([140, 37, 1])
    mask = torch.arange(140)[None] < lengths[:, None]
    ids = torch.randint(0, 50, mask.shape) * mask
    out = model(input_ids=ids, attention_mask=mask).last_hidden_state

distance = torch.arange(300)[None] - torch.arange(300)[:, None]
buckets = T5Attention._relative_position_bucket(distance, num_buckets=32)
weights = {
    name: value.numpy()
    for name, value in model.state_dict().items()
    if name != "encoder.embed_tokens.weight"  # the same array as shared.weight
}
np.savez_compressed(
    pathlib.Path(__file__).with_name("t5.npz"),
    ids=ids.numpy().astype(np.int32),
    mask=mask.numpy(),
    # Padded positions mean nothing, so they are not kept.
    out=out[mask].numpy(),
    buckets=buckets.numpy().astype(np.int8),
    **weights,
)
