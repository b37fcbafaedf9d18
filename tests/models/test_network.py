"""What moves the networks' answers, and what must not.

The networks start as constants, so their parameters are drawn first.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax import config
from imagen_jax.batch import Cond
from imagen_jax.configs import base64, common
from imagen_jax.models import network

EPS = np.finfo(np.float32).eps
ROWS, LENGTH, DIM = 3, 4, 16
# Most of the time goes to compiling.
QUICK = {"xla_backend_optimization_level": 0}

# Levels that attend to the text alone, to pixels alone, and to both at once.
UNET = {
    "image_size": 8,
    "model": {
        "architecture": "unet",
        "channels": (48, 96),
        "num_res_blocks": (1, 2),
        "self_attention": (False, True),
        "text_attention": (True, True),
        "text_features": 8,
    },
}
EFFICIENT = {
    "image_size": 16,
    "lowres_size": 4,
    "model": {
        "architecture": "efficient_unet",
        "channels": (48, 96),
        "num_res_blocks": (1, 2),
        "self_attention": (True, True),
        "text_attention": (False, True),
        "patch_size": 2,
    },
}
# The other value of each choice that the paper's networks and ablations make.
LAST_SKIPS = {
    **EFFICIENT,
    "model": {
        **EFFICIENT["model"],
        "self_attention": (False, True),
        "text_attention": (True, True),
        "text_conditioning": "cross",
        "text_norm": False,
        "text_features": 8,
        "skips": "last_block",
        "skip_scale": 0.5**0.5,
    },
}
NETWORKS = {"unet": UNET, "efficient": EFFICIENT, "last_skips": LAST_SKIPS}
ONE_LEVEL = {
    "channels": (24,),
    "num_res_blocks": (1,),
    "self_attention": (True,),
    "text_attention": (True,),
}


class Network:
    """A network with drawn parameters, and inputs for it.

    Attributes:
      cfg: its stage.
      params: float32.
      inputs: `z`, `logsnr`, `cond`; captions of 4, 2 and no tokens.
    """

    def __init__(self, values):
        model = {"head_channels": 24, "dtype": "float32", **values["model"]}
        text = {"length": LENGTH, "dim": DIM}
        self.cfg = config.from_dict({**values, "model": model, "text": text})
        rng = np.random.default_rng(0)

        def draw(shape):
            # Of the scale that keeps activations near one.
            return rng.normal(size=shape).astype("f4") / np.prod(shape) ** 0.25

        shapes = jax.eval_shape(lambda: network.init(self.cfg, jax.random.key(0)))
        self.params = jax.tree.map(lambda leaf: draw(leaf.shape), nn.unbox(shapes))
        size, low = self.cfg.train_size, self.cfg.train_lowres_size
        augmented = self.cfg.diffusion.lowres_augmentation
        mask = np.arange(LENGTH) < np.array([4, 2, 0])[:, None]

        def normal(*shape):
            return jnp.asarray(rng.normal(size=(ROWS, *shape)), jnp.float32)

        self.inputs = {
            "z": normal(size, size, 3),
            "logsnr": normal(),
            "cond": Cond(
                text=normal(LENGTH, DIM) * mask[..., None],
                mask=jnp.asarray(mask),
                lowres=normal(low, low, 3) if low else None,
                aug_logsnr=normal() if low and augmented else None,
            ),
        }
        self._run = jax.jit(network.apply, static_argnums=0, compiler_options=QUICK)

    def __call__(self, params=None, dtype="float32", **changes):
        """The answer, with other parameters or some fields of the inputs changed."""
        params = self.params if params is None else params
        inputs = {
            name: changes.pop(name, self.inputs[name]) for name in ("z", "logsnr")
        }
        cond = self.inputs["cond"].replace(**changes)
        cfg = dataclasses.replace(self.cfg.model, dtype=dtype)
        return np.asarray(self._run(cfg, params, **inputs, cond=cond))


@functools.cache
def _network(name):
    return Network(NETWORKS[name])


@pytest.fixture(params=NETWORKS)
def net(request):
    return _network(request.param)


def _field(net, name):
    inputs = net.inputs
    return inputs[name] if name in inputs else getattr(inputs["cond"], name)


def _moved(a, b):
    """How far each row moved, relative to the answer's size."""
    return np.abs(a - b).max((1, 2, 3)) / np.abs(a).max()


@pytest.mark.slow
def test_every_input_moves_its_row_alone(net):
    names = ["z", "logsnr", "text"]
    if net.cfg.lowres_size:
        names += ["lowres", "aug_logsnr"]
    for name in names:
        value = _field(net, name)
        moved = _moved(net(), net(**{name: value.at[1].multiply(-0.5)}))
        assert moved[1] > 1e-3, name
        # Rows of one program do not meet: not a bit changes.
        assert moved[0] == moved[2] == 0, name


def test_a_longer_mask_shows_the_token(net):
    cond = net.inputs["cond"]
    text = cond.text.at[1, 2].set(1.0)
    shown = net(text=text, mask=cond.mask.at[1, 2].set(True))
    assert _moved(net(text=text), shown)[1] > 1e-3


def test_what_is_under_the_padding_is_not_seen(net):
    cond = net.inputs["cond"]
    text = jnp.where(cond.mask[..., None], cond.text, 1e4)
    np.testing.assert_array_equal(net(text=text), net())


@pytest.mark.slow
def test_the_length_of_the_padding_changes_only_roundings():
    net = _network("unet")
    cond = net.inputs["cond"]
    more = ((0, 0), (0, 7))
    longer = net(text=np.pad(cond.text, (*more, (0, 0))), mask=np.pad(cond.mask, more))
    # Some 40 layers after one another, each of sums of up to 9 * 192 terms that keep
    # their order: the root of their number.
    assert _moved(net(), longer).max() < 40 * (9 * 192) ** 0.5 * EPS


def _attentions(params):
    """Paths of the attention blocks over text, and their parameters."""
    for path, block in _subtrees(params):
        if "text_key" in block:
            yield path, block


def _subtrees(params, path=()):
    for name, value in params.items():
        if isinstance(value, dict):
            yield (*path, name), value
            yield from _subtrees(value, (*path, name))


@pytest.mark.slow
def test_the_text_reaches_the_answer_by_every_path(net):
    """By pooling, and by each attention over it: cutting all others leaves one."""
    text = net.inputs["cond"].text.at[0].multiply(-0.5)
    paths = [path for path, _ in _attentions(net.params)]
    model = net.cfg.model
    if model.architecture == "efficient_unet":
        assert len(paths) == 2 * sum(model.text_attention)
    else:
        blocks = zip(model.text_attention, model.num_res_blocks, strict=True)
        in_middle = model.text_attention[-1]
        assert len(paths) == sum(t * (2 * n + 1) for t, n in blocks) + in_middle
    for path in [*paths, ("embedding", "pool")]:
        params = _cut_text(net.params, keep=path)
        assert _moved(net(params), net(params, text=text))[0] > 1e-4, path
    params = _cut_text(net.params, keep=None)
    np.testing.assert_array_equal(net(params), net(params, text=text))


def _cut_text(params, keep):
    """Text becomes zero where it enters, but for one path."""

    def cut(path, leaf):
        *block, layer, kind = (entry.key for entry in path)
        enters = layer in ("text_key", "text_value")
        enters |= block[-1:] == ["pool"] and layer in ("query", "key", "value")
        return leaf * (not enters or tuple(block) == keep or kind == "bias")

    return jax.tree_util.tree_map_with_path(cut, params)


def _unseen(params):
    """Biases that are added to all logits of a query, which a softmax ignores."""
    yield "embedding/pool/key/bias"
    for path, block in _subtrees(params):
        keys = {"key", "text_key"} & block.keys()
        if len(keys) == 1 and path[-1] != "pool":
            yield "/".join((*path, keys.pop(), "bias"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["attention_pool", "mean_pool"])
def test_text_can_enter_by_pooling_alone(kind):
    """No block attends to the text, and yet it moves the answer."""
    model = {**ONE_LEVEL, "text_conditioning": kind}
    net = Network({**UNET, "model": model})
    assert not list(_attentions(net.params))
    assert ("query" in net.params["embedding"]["pool"]) == (kind == "attention_pool")
    cond = net.inputs["cond"]
    moved = _moved(net(), net(text=cond.text.at[1].multiply(-0.5)))
    assert moved[1] > 1e-3 and moved[0] == moved[2] == 0
    text = jnp.where(cond.mask[..., None], cond.text, 1e4)
    np.testing.assert_array_equal(net(text=text), net())


def test_a_unet_may_enlarge_without_augmentation():
    """The paper's other network for super-resolution; no level is told to it."""
    values = {"image_size": 16, "lowres_size": 4, "model": ONE_LEVEL}
    # A stage whose pictures are never spoilt is not sampled with spoilt ones.
    off = {"diffusion": {"lowres_augmentation": False}, "sampler": {"aug_level": 0.0}}
    net = Network({**values, **off})
    assert "aug_1" not in net.params["embedding"]
    for name in ("z", "logsnr", "text", "lowres"):
        moved = _moved(net(), net(**{name: _field(net, name).at[1].multiply(-0.5)}))
        assert moved[1] > 1e-3 and moved[0] == moved[2] == 0, name


@pytest.mark.parametrize("name", ["1b", "500m", "300m"])
def test_smaller_bases_are_alike_in_their_tiny_form(name):
    """They differ in width alone, so what holds for one tiny form holds for all."""
    values = base64.get_config(name)
    multiples = {w / values.model.channels[0] for w in values.model.channels}
    assert multiples == {1, 2, 3, 4}
    shrunk = common.shrink(values, 16)
    assert shrunk.to_dict() == base64.get_config("tiny").to_dict()


@pytest.mark.slow
def test_every_parameter_is_learned(net):
    model = net.cfg.model

    def loss(params, cond):
        out = network.apply(model, params, net.inputs["z"], net.inputs["logsnr"], cond)
        return jnp.sum(out * jnp.cos(jnp.arange(out.size)).reshape(out.shape))

    gradient = jax.jit(jax.grad(loss, (0, 1), allow_int=True), compiler_options=QUICK)
    of_params, of_cond = jax.device_get(gradient(net.params, net.inputs["cond"]))
    # The last row has the null text: its gradients are finite, and zero for the text.
    assert np.isfinite(of_cond.text).all()
    assert (of_cond.text[2] == 0).all() and (of_cond.text[1, 2:] == 0).all()
    assert (of_cond.text[0] != 0).any(-1).all()
    # Of a matrix, the output channel that learns the least.
    sizes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): float(
            np.abs(g).max(tuple(range(g.ndim - 1)) or None).min()
        )
        for path, g in jax.tree_util.tree_leaves_with_path(of_params)
    }
    largest = max(sizes.values())
    assert np.isfinite(largest)
    # Roundings are some EPS of the largest; what is learned is far above them.
    unlearned = {name for name, size in sizes.items() if not size > 1e-6 * largest}
    assert unlearned == set(_unseen(net.params))


def test_the_null_text_gives_a_finite_answer(net):
    cond = net.inputs["cond"]
    text, mask = jnp.zeros_like(cond.text), jnp.zeros_like(cond.mask)
    out = net(text=text, mask=mask)
    assert np.isfinite(out).all()
    # The last row's caption was null already.
    np.testing.assert_array_equal(out[2], net()[2])
    assert _moved(net(), out)[:2].min() > 1e-3


@pytest.mark.slow
def test_bfloat16_computes_near_float32_and_keeps_float32_parameters():
    net = _network("last_skips")
    half = dataclasses.replace(net.cfg.model, dtype="bfloat16")
    stage = dataclasses.replace(net.cfg, model=half)
    shapes = network.abstract_params(stage)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    # The text of the data is bfloat16.
    text = net.inputs["cond"].text.astype(jnp.bfloat16)
    out = net(dtype="bfloat16", text=text)
    want = net(text=text.astype(jnp.float32))
    assert out.dtype == np.float32 and np.isfinite(out).all()
    # Some 40 layers after one another round by 2**-9 each, as a random walk.
    error = np.sqrt(np.square(out - want).mean() / np.square(want).mean())
    assert 1e-5 < error < 3 * 40**0.5 * 2**-9


def test_dropout_needs_its_key():
    net = _network("unet")
    cfg = dataclasses.replace(net.cfg.model, dropout=0.5)

    def draws(key):
        """Whether the traced network draws random numbers."""
        trace = jax.make_jaxpr(
            lambda: network.apply(cfg, net.params, **net.inputs, dropout_key=key)
        )
        return "random_bits" in str(trace())

    assert draws(jax.random.key(0)) and not draws(None)


def test_the_shapes_without_arrays_are_those_that_are_drawn():
    net = _network("unet")
    model = dataclasses.replace(net.cfg.model, remat="blocks")
    stage = dataclasses.replace(net.cfg, model=model)
    drawn = jax.eval_shape(lambda: network.init(stage, jax.random.key(0)))
    have = network.abstract_params(stage)
    assert jax.tree.structure(have) == jax.tree.structure(drawn)
    assert jax.tree.leaves(have) == jax.tree.leaves(drawn)
    # A search looks at some 60 settings of one network, which takes seconds to trace.
    assert have is network.abstract_params(net.cfg)
