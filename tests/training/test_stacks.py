"""An update in stacks is the update of each array."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from imagen_jax.config import MeshConfig, OptimizerConfig
from imagen_jax.sharding import AXES, make_mesh
from imagen_jax.training import step
from imagen_jax.training.optimizer import make_optimizer
from imagen_jax.training.stacks import in_stacks, norm
from imagen_jax.training.state import abstract_state
from tests import tiny
from tests.training.test_step import run

# Of two shapes several, of one a single one; one is too large to be stacked.
SHAPES = {
    "a": {"bias": (40,), "kernel": (160, 140)},
    "b": {"bias": (40,), "heads": (4, 10), "scale": (40,)},
    "c": {"heads": (4, 10), "last": (3,)},
}
RULES = [
    OptimizerConfig(warmup_steps=0),
    OptimizerConfig(name="adafactor", warmup_steps=0, parameter_scale=False),
    OptimizerConfig(name="adafactor", warmup_steps=0, parameter_scale=True),
]


def drawn(seed, scale):
    """Arrays of very different size, so that what is shared would be seen."""
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda s: (scale * 10 ** random.uniform(-3, 3) * random.normal(size=s)).astype(
            "f4"
        ),
        SHAPES,
        is_leaf=lambda s: isinstance(s, tuple),
    )


def updating(cfg, skip=False):
    """A function of trees, of gradients whose norm is told to be 2."""

    def update(gradients, state, params):
        updates, state = make_optimizer(cfg).update(
            gradients, state, params, gradient_norm=jnp.float32(2), skip=skip
        )
        return {"new": optax.apply_updates(params, updates)}, state

    return update


def test_the_norm_is_that_of_all_arrays():
    """float64 is the reference: 23,000 squares, added in any order."""
    tree = drawn(0, 1.0)
    squares = [np.square(leaf, dtype="f8").sum() for leaf in jax.tree.leaves(tree)]
    np.testing.assert_allclose(norm(tree), np.sqrt(sum(squares)), rtol=1e-6)


@pytest.mark.parametrize("cfg", RULES, ids=["adam", "adafactor", "of its size"])
def test_a_stack_gives_what_each_array_alone_gives(cfg):
    """Each array's own update is the reference: sums over 40 are what may differ."""
    update = updating(cfg)
    params = drawn(0, 1.0)
    stacked, state = (
        jax.jit(in_stacks(update, params)),
        make_optimizer(cfg).init(params),
    )
    leaves, structure = jax.tree.flatten(params)
    alone = [(leaf, make_optimizer(cfg).init(leaf)) for leaf in leaves]
    tree = params
    for turn in range(3):
        gradients = drawn(turn + 1, 1e-2)
        found, state = stacked(gradients, state, tree)
        tree = found["new"]
        for i, gradient in enumerate(jax.tree.leaves(gradients)):
            new, own = jax.jit(update)(gradient, alone[i][1], alone[i][0])
            alone[i] = new["new"], own
    assert jax.tree.structure(tree) == structure
    want = jax.tree.unflatten(structure, [leaf for leaf, _ in alone])
    near = functools.partial(np.testing.assert_allclose, rtol=3e-6)
    jax.tree.map(near, tree, want)
    # Of the state too, whose every array is of its own leaf and whose counts are one.
    flat = [jax.tree.leaves(own) for _, own in alone]
    have = make_optimizer(cfg).init(params)
    assert jax.tree.structure(state) == jax.tree.structure(have)
    arrays = [x for x in jax.tree.leaves(state) if x.shape]
    assert sorted(float(np.abs(x).sum()) for x in arrays) == pytest.approx(
        sorted(float(np.abs(x).sum()) for own in flat for x in own if x.shape), rel=3e-6
    )
    counts = [int(x) for x in jax.tree.leaves(state) if not x.shape]
    assert counts and set(counts) == {3}


@pytest.mark.parametrize("cfg", RULES[:2], ids=["adam", "adafactor"])
def test_what_is_skipped_stays_to_the_bit(cfg):
    params = drawn(0, 1.0)
    state = make_optimizer(cfg).init(params)
    nan = jax.tree.map(lambda x: x * np.float32(np.nan), params)
    _, after = in_stacks(updating(cfg, skip=True), params)(nan, state, params)
    jax.tree.map(np.testing.assert_array_equal, after, state)


def test_a_shape_is_one_operation():
    """Three shapes and a large array, of each optax's square root and ours."""
    params = drawn(0, 1.0)
    update = updating(RULES[0])
    state = make_optimizer(RULES[0]).init(params)

    def roots(function):
        return str(jax.make_jaxpr(function)(params, state, params)).count(" sqrt ")

    assert roots(update) == 2 * 7 and roots(in_stacks(update, params)) == 2 * 4


def test_only_trees_of_small_arrays_and_none_of_them():
    for shapes in ([(3,), (3,)], [(100, 100)]):
        params = [np.ones(shape, "f4") for shape in shapes]
        (found,) = in_stacks(lambda tree: (jax.tree.map(jnp.cumsum, tree),), params)(
            params
        )
        jax.tree.map(
            lambda x, p: np.testing.assert_array_equal(x, np.cumsum(p)), found, params
        )


def test_a_tpus_step_takes_stacks():
    """Adam has two square roots for each array, optax's and ours."""
    cfg = tiny.stage(model=tiny.ONE_LEVEL)
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype),
        (
            abstract_state(cfg, make_mesh(MeshConfig(), jax.devices()[:1])),
            tiny.batch(cfg),
        ),
    )
    roots = {}
    for platform in ("cpu", "tpu"):
        device = AbstractDevice(platform, 1, platform)
        mesh = AbstractMesh((1, 1, 1, 1), AXES, abstract_device=device)
        with jax.sharding.use_abstract_mesh(mesh):
            made = jax.make_jaxpr(functools.partial(step.train_step, cfg=cfg))(*like)
        roots[platform] = str(made).count(" sqrt ")
    shapes = {leaf.shape for leaf in jax.tree.leaves(like[0].params)}
    arrays = len(jax.tree.leaves(like[0].params))
    assert arrays > 2 * len(shapes)
    assert roots["cpu"] - roots["tpu"] == 2 * (arrays - len(shapes))


@pytest.mark.slow
def test_eight_devices_with_stacks_give_the_loss_of_one(monkeypatch):
    """Arrays of one shape may be split in different ways, and so have to meet."""
    cfg = tiny.stage(model=tiny.ONE_LEVEL, optimizer={"b2": 0.9})
    one, _ = run(cfg, MeshConfig(), 1)
    monkeypatch.setattr(step, "_on_tpu", lambda: True)
    eight, state = run(cfg, MeshConfig(data=2, fsdp=2, tensor=2), 8)
    np.testing.assert_allclose(eight, one, rtol=1e-5)
