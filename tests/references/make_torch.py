"""Records torch.npz: the blocks of the U-Nets, run by diffusers and torch.

Run with `pip install torch diffusers` (recorded with torch 2.13, diffusers 0.42):
python tests/references/make_torch.py

The weights are drawn in float32 and the answers computed in float64.
"""

import pathlib

import numpy as np
import torch
from diffusers.models.attention_processor import Attention, AttnAddedKVProcessor
from diffusers.models.resnet import ResnetBlock2D

torch.manual_seed(0)
record = {}


def drawn(module):
    """Every parameter drawn, norms and biases too."""
    with torch.no_grad():
        for parameter in module.parameters():
            fan = parameter[0].numel() if parameter.ndim > 1 else 1
            parameter.copy_(torch.randn(parameter.shape) / fan**0.5)
    return module.double().eval()


def inputs(*shape):
    return torch.randn(shape).double()


def keep(name, module, arrays):
    for key, value in [*module.state_dict().items(), *arrays.items()]:
        record[f"{name}/{key}"] = value.detach().numpy().astype(np.float32)


@torch.no_grad()
def residual(name, width, features, **resample):
    """ADM's residual block: scale and shift, BigGAN's up and down."""
    block = ResnetBlock2D(
        in_channels=width,
        out_channels=features,
        temb_channels=24,
        groups=width // 4,
        groups_out=features // 4,
        eps=1e-5,
        time_embedding_norm="scale_shift",
        **resample,
    )
    drawn(block)
    x, emb = 2 + inputs(2, width, 8, 6), inputs(2, 24)
    keep(name, block, {"x": x, "emb": emb, "out": block(x, emb)})


@torch.no_grad()
def concatenated(name, width, heads, head_channels):
    """DeepFloyd IF's attention over pixels and text at once."""
    block = Attention(
        query_dim=width,
        heads=heads,
        dim_head=head_channels,
        added_kv_proj_dim=20,
        norm_num_groups=width // 4,
        eps=1e-5,
        bias=True,
        residual_connection=True,
        processor=AttnAddedKVProcessor(),
    )
    drawn(block)
    norm = drawn(torch.nn.LayerNorm(20))
    x, text = 1 + inputs(2, width, 4, 3), 1 + inputs(2, 5, 20)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    # The text comes first in diffusers' keys, and zeros for the pixels are appended.
    bias = torch.where(mask, 0.0, -torch.inf).double()[:, None]
    out = block(x, encoder_hidden_states=norm(text), attention_mask=bias)
    arrays = {"x": x, "text": text, "mask": mask, "out": out}
    arrays |= {f"text_norm.{k}": v for k, v in norm.state_dict().items()}
    keep(name, block, arrays)


@torch.no_grad()
def pooled(name, width, heads, head_channels):
    """torch's multi-head attention with the mean as its one query."""
    inner = heads * head_channels
    norm = drawn(torch.nn.LayerNorm(width))
    query = drawn(torch.nn.Linear(width, inner))
    text = 1 + inputs(2, 5, width)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    pool = torch.nn.MultiheadAttention(
        inner, heads, kdim=width, vdim=width, batch_first=True
    )
    drawn(pool)
    normed = norm(text)
    mean = torch.stack([t[m].mean(0) for t, m in zip(normed, mask, strict=True)])
    # Its query projection takes the width of the heads: the identity after ours.
    pool.q_proj_weight.copy_(torch.eye(inner))
    pool.in_proj_bias[:inner] = 0
    out, _ = pool(query(mean)[:, None], normed, normed, key_padding_mask=~mask)
    arrays = {"text": text, "mask": mask, "out": out[:, 0]}
    arrays |= {f"norm.{k}": v for k, v in norm.state_dict().items()}
    arrays |= {f"query.{k}": v for k, v in query.state_dict().items()}
    keep(name, pool, arrays)


residual("same", 16, 16)
residual("wider", 16, 24)
residual("down", 16, 16, down=True)
residual("up", 16, 16, up=True)
concatenated("concatenated", 32, 2, 16)
concatenated("expanded", 32, 2, 32)
pooled("pooled", 20, 3, 8)

path = pathlib.Path(__file__).with_name("torch.npz")
np.savez_compressed(path, **record)
print(f"{path}: {path.stat().st_size / 1e3:.0f} kB")
