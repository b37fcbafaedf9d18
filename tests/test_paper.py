"""The configs of the paper's experiments: their sizes."""

import math

import flax.linen as nn
import jax
import pytest

from imagen_jax import config
from imagen_jax.config import MeshConfig
from imagen_jax.configs import base64, photographs, sr256, sr1024
from imagen_jax.models import network
from imagen_jax.sharding import make_mesh
from imagen_jax.training.state import abstract_state

CONFIGS = {"base64": base64, "sr256": sr256, "sr1024": sr1024}


def _config(name, variant=None):
    module = CONFIGS[name]
    values = module.get_config(variant) if variant else module.get_config()
    return config.from_dict(values.to_dict())


def _parameters(name, variant=None):
    return nn.unbox(network.abstract_params(_config(name, variant)))


def _millions(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree)) / 1e6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "variant", "low", "high"),
    [
        # The paper's: 2B, 600M, and for the ablations 300M, 500M, 1B (Sec. 4.1, D.3).
        ("base64", None, 2000, 2200),
        ("base64", "1b", 850, 1150),
        ("base64", "500m", 450, 600),
        ("base64", "300m", 270, 330),
        ("sr256", None, 0.97 * 600, 1.03 * 600),
    ],
)
def test_networks_have_the_papers_sizes(name, variant, low, high):
    assert low <= _millions(_parameters(name, variant)) <= high


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_all_that_is_large_is_sharded(name):
    """Parameters, their average, the optimizer's: over eight shards none is whole."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    large = [
        leaf
        for leaf in jax.tree.leaves(abstract_state(_config(name), mesh))
        if math.prod(leaf.shape) * leaf.dtype.itemsize > 2**20
    ]
    assert len(large) > 100
    for leaf in large:
        share = math.prod(leaf.sharding.shard_shape(leaf.shape))
        assert 8 * share == math.prod(leaf.shape)


def _residual(features, entering, emb=512):
    """A residual block's parameters, counted by hand."""
    norms = 2 * entering + 2 * features
    convs = 9 * entering * features + features + 9 * features**2 + features
    shortcut = (entering * features + features) * (entering != features)
    return norms + convs + shortcut + 2 * features * (emb + 1)


def test_the_printed_blocks_of_the_1024_stage_cannot_be_400m():
    """Sec. 4.1 says 400M; F.3 prints the blocks of the 600M stage."""
    channels, counts = (128, 256, 512, 1024), (2, 4, 8, 8)
    # As few as can be: down and up the same blocks, one skip per level on the way up.
    least = 0
    for width, count in zip(channels, counts, strict=True):
        least += (2 * count - 1) * _residual(width, width)
        least += _residual(width, 2 * width)
    assert 430e6 < least < 440e6
    # Convolutions between the levels, embeddings, text and its two attentions.
    assert 455 < _millions(_parameters("sr1024")) < 465


def test_self_attention_is_all_that_f3_leaves_out():
    """With the values of sr256 otherwise, the network loses its pixels' projections."""
    values = sr1024.get_config().to_dict()
    model = sr256.get_config().to_dict()["model"]
    values["model"] = {**model, "self_attention": (False,) * 4}
    cfg = config.from_dict(values)
    params = nn.unbox(network.abstract_params(cfg))
    lost = _millions(_parameters("sr256")) - _millions(params)
    # Keys and values, 1024 to 2048 with biases, on the way down and up.
    assert lost == pytest.approx(2 * 2 * (1024 * 2048 + 2048) / 1e6)


@pytest.mark.slow
def test_the_cascade_for_photographs_is_the_papers_but_smaller():
    base, sr = (
        config.from_dict(photographs.get_config(name).to_dict())
        for name in ("base", "sr")
    )
    assert base.image_size == sr.lowres_size and base.text == sr.text
    assert base.model.channels == _config("base64", "300m").model.channels
    whole = _config("sr256").model
    assert [4 * width for width in sr.model.channels] == list(whole.channels)
    heads = [m.channels[-1] / m.head_channels for m in (sr.model, whole)]
    assert heads[0] == heads[1]
    for cfg, millions in ((base, 324.5), (sr, 37.9)):
        params = nn.unbox(network.abstract_params(cfg))
        assert _millions(params) == pytest.approx(millions, abs=0.1)
