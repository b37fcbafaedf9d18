"""Work of compiled programs, against closed forms and the compiler's own counts."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from imagen_jax.planning import products
from imagen_jax.planning.work import read_program


def read(run, *shapes, devices=1):
    """What `run` does with arrays of these shapes, compiled here."""
    arrays = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    compiled = jax.jit(run).lower(*arrays).compile()
    return read_program(compiled.as_text(), devices), compiled.cost_analysis()


def test_a_product():
    program, theirs = read(lambda a, b: a @ b, (8, 32), (32, 16))
    assert program.total("flops") == 2 * 8 * 32 * 16 == theirs["flops"]
    arrays = 4 * (8 * 32 + 32 * 16 + 8 * 16)
    assert program.total("moved_bytes") == arrays == theirs["bytes accessed"]
    assert program.total("logical_bytes") == arrays


CONVOLUTIONS = [
    {},
    {"window_strides": (2, 2), "padding": "SAME"},
    {"padding": ((3, 0), (0, 3))},
    {"lhs_dilation": (2, 2), "padding": ((1, 2), (1, 2))},
    {"rhs_dilation": (2, 1)},
    {"feature_group_count": 2},
]


@pytest.mark.parametrize("options", CONVOLUTIONS)
def test_a_convolution_without_its_padding(options):
    """As the compiler counts, and, of the plain ones, place by place."""
    options = {"window_strides": (1, 1), "padding": "SAME", **options}
    groups = options.get("feature_group_count", 1)

    def run(x, kernel):
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, kernel, dimension_numbers=layout, **options
        )

    program, theirs = read(run, (2, 7, 6, 4), (3, 3, 4 // groups, 8))
    assert program.total("flops") == theirs["flops"] > 0
    if options == {"window_strides": (1, 1), "padding": "SAME"}:
        places = itertools.product(range(7), range(6), (-1, 0, 1), (-1, 0, 1))
        inside = sum(0 <= y + i < 7 and 0 <= x + j < 6 for y, x, i, j in places)
        assert program.total("flops") == 2 * 2 * inside * 4 * 8


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("spread", [1, 2, 3])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize(("size", "kernel", "low"), [(7, 3, 1), (4, 6, 5), (9, 2, -1)])
def test_places_are_counted_one_by_one(stride, spread, dilation, size, kernel, low):
    out = 8
    places = (
        o * stride + k * dilation - low for o in range(out) for k in range(kernel)
    )
    inside = [p % spread == 0 and 0 <= p <= (size - 1) * spread for p in places]
    counted = products._pairs(size, kernel, out, stride, low, spread, dilation)
    assert counted == sum(inside)


def test_a_gradient_of_convolutions():
    """The compiler also counts the sum over the result: one for each element."""

    def run(x, kernel):
        layout = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(
            x, kernel, (2, 2), "SAME", dimension_numbers=layout
        )
        return (y * y).sum()

    program, theirs = read(jax.grad(run, (0, 1)), (2, 8, 8, 4), (3, 3, 4, 8))
    single = 10 * 2 * 8 * 8 * 8
    assert 0 <= theirs["flops"] - program.total("flops") < single


def loops(x, weights, *, unrolled):
    """Layers in a loop of 5, of each 3 of them twice; or one after another."""

    def layer(x, weight):
        return jnp.tanh(x @ weight)

    def inner(x, weight):
        return layer(layer(x, weight), weight), None

    def outer(x, weights):
        return jax.lax.scan(inner, x, weights)[0], None

    if not unrolled:
        return jax.lax.scan(outer, x, weights)[0]
    for weight in weights.reshape(-1, *weights.shape[-2:]):
        x = layer(layer(x, weight), weight)
    return x


def test_loops_count_as_often_as_they_run():
    shapes = (64, 32), (5, 3, 32, 32)
    looped, theirs = read(functools.partial(loops, unrolled=False), *shapes)
    plain, whole = read(functools.partial(loops, unrolled=True), *shapes)
    products = 5 * 3 * 2 * 2 * 64 * 32 * 32
    assert looped.total("flops") == plain.total("flops") == products
    # The compiler takes a body once, of both loops.
    assert theirs["flops"] < products / 10 < whole["flops"]
    assert not looped.unknown_loops
    # A loop copies what it carries; were its 15 turns to read all weights, and not
    # their own, it would be this much more.
    all_weights = 15 * 4 * 15 * 32 * 32
    more = looped.total("moved_bytes") - plain.total("moved_bytes")
    assert 0 < more < all_weights / 2


LOOP = """
%body (p: (f32[8], s32[], s32[])) -> (f32[8], s32[], s32[]) {
  %p = (f32[8]{0}, s32[], s32[]) parameter(0)
  %x = f32[8]{0} get-tuple-element(%p), index=0
  %y = f32[8]{0} negate(%x)
  %i = s32[] get-tuple-element(%p), index=1
  %two = s32[] constant(STEP)
  %more = s32[] add(%i, %two)
  %n = s32[] get-tuple-element(%p), index=2
  ROOT %t = (f32[8]{0}, s32[], s32[]) tuple(%y, %more, %n)
}

%condition (p: (f32[8], s32[], s32[])) -> pred[] {
  %p = (f32[8]{0}, s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=1
  %n = s32[] get-tuple-element(%p), index=2
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (x: f32[8]) -> (f32[8], s32[], s32[]) {
  %x = f32[8]{0} parameter(0)
  %first = s32[] constant(FIRST)
  %limit = s32[] constant(7)
  %limit.2 = s32[] copy(%limit)
  %t = (f32[8]{0}, s32[], s32[]) tuple(%x, %first, %limit.2)
  ROOT %w = (f32[8]{0}, s32[], s32[]) while(%t), condition=%condition, body=%body
}
"""


@pytest.mark.parametrize(
    ("first", "step", "turns"), [(0, 1, 7), (0, 2, 4), (1, 2, 3), (3, 5, 1)]
)
def test_a_loop_is_counted_by_its_first_its_step_and_its_limit(first, step, turns):
    """A TPU's compiler makes loops in steps of two, and keeps limits outside."""
    text = LOOP.replace("STEP", str(step)).replace("FIRST", str(first))
    program = read_program(text, 1)
    assert {w.name: w.times for w in program.work}["y"] == turns
    assert not program.unknown_loops


def test_a_loop_of_unknown_length_is_told():
    def run(x):
        def go(c):
            return c[1].sum() < 1e3

        return jax.lax.while_loop(go, lambda c: (c[0] + 1, c[1] @ c[1]), (0, x))

    program, _ = read(run, (16, 16))
    assert program.unknown_loops == 1
    assert program.total("flops") == 2 * 16**3


def test_of_two_ways_the_costlier_counts():
    def run(x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

    program, _ = read(run, (16, 16))
    assert program.total("flops") == 2 * 2 * 16**3


MESH = Mesh(np.reshape(jax.devices(), (2, 4)), ("a", "b"))
PART = 4 * 64 * 8  # bytes that a device has


@pytest.mark.parametrize(
    ("kind", "exchange", "sent"),
    [
        # To each of 3 neighbours goes what one has, passed on in a ring.
        (
            "all-gather",
            lambda x: jax.lax.all_gather(x, "b", axis=0, tiled=True),
            3 * PART,
        ),
        # All but one of 4 parts are summed around the ring, then gathered.
        ("all-reduce", lambda x: jax.lax.psum(x, "b"), 2 * 3 / 4 * PART),
        ("all-reduce", lambda x: jax.lax.psum(x, ("a", "b")), 2 * 7 / 8 * PART),
        (
            "reduce-scatter",
            lambda x: jax.lax.psum_scatter(x, "b", scatter_dimension=0, tiled=True),
            3 / 4 * PART,
        ),
        (
            "all-to-all",
            lambda x: jax.lax.all_to_all(x, "b", 0, 0, tiled=True),
            3 / 4 * PART,
        ),
        (
            "collective-permute",
            lambda x: jax.lax.ppermute(x, "b", [(i, (i + 1) % 4) for i in range(4)]),
            PART,
        ),
    ],
)
def test_exchanges_send_what_a_ring_sends(kind, exchange, sent):
    """Three times in a loop, so that counts are tested too."""

    def run(x):
        def body(total, _):
            # Of the sum, or the loop would be left out.
            return total + exchange(x * total.sum()).sum(), None

        one = jnp.ones((1,)) + 0 * x.sum()
        return jax.lax.scan(body, one, length=3)[0]

    run = jax.shard_map(
        run, mesh=MESH, in_specs=P(("a", "b")), out_specs=P(("a", "b")), check_vma=False
    )
    program, _ = read(run, (8 * 64, 8), devices=8)
    found = program.collectives()
    assert found == {kind: {"count": 3, "bytes": 3 * sent}}
    assert program.total("sent_bytes") == 3 * sent


TPU = """HloModule m

%all-reduce-scatter.1 (input: bf16[512]) -> bf16[128] {
  %input = bf16[512]{0} parameter(0)
  %all-reduce.1 = bf16[512]{0} all-reduce(%input), replica_groups=[1,4]<=[4]
  %i = s32[] constant(0)
  ROOT %slice.1 = bf16[128]{0} dynamic-slice(%all-reduce.1, %i)
}

ENTRY %main (x: bf16[512], y: f32[8,16]) -> bf16[128] {
  %x = bf16[512]{0} parameter(0)
  %y = f32[8,16]{1,0:T(8,128)} parameter(1)
  %near = (f32[8,16]{1,0:T(8,128)S(1)}, f32[8,16]{1,0:T(8,128)}, u32[]) copy-start(%y)
  %kept = f32[8,16]{1,0:T(8,128)S(1)} copy-done(%near)
  %b = (f32[8,16]{1,0}, f32[32,16]{1,0}) all-gather-start(%kept), replica_groups={}
  %c = f32[32,16]{1,0} all-gather-done(%b)
  %e = f32[8,16]{1,0} negate(%kept), backend_config={"estimated_cycles":"700"}
  ROOT %a = bf16[128]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_a_tpus_program():
    """Scattered sums inside fusions, early starts, memory on the chip, cycles."""
    program = read_program(TPU, 4)
    assert program.collectives() == {
        "all-gather": {"count": 1, "bytes": 3 * 4 * 8 * 16},
        "reduce-scatter": {"count": 1, "bytes": 3 / 4 * 2 * 512},
    }
    work = {w.name: w for w in program.work}
    assert set(work) == {"near", "b", "e", "a"}
    assert work["b"].overlaps and work["near"].overlaps and not work["a"].overlaps
    # Read from the main memory in whole tiles, written to that on the chip.
    assert work["near"].moved_bytes == 4 * 8 * 128
    assert work["near"].logical_bytes == 4 * 8 * 16
    assert work["near"].near_bytes == 4 * 8 * 128
    assert work["e"].cycles == program.total("cycles") == 700


@pytest.mark.parametrize(
    ("name", "products"),
    [("flash_attention.4", 2), ("flash_mha_bwd_dkv_x", 4), ("flash_mha_bwd_dq_x", 3)],
)
def test_the_attention_kernel(name, products):
    """4 * B * N * T * S * D forward, and so on: T queries, S keys."""
    call = f"%{name} = bf16[2,3,16,8]{{3,2,1,0}} custom-call(%q, %k, %k), "
    call += 'custom_call_target="tpu_custom_call"'
    text = (
        "ENTRY %main (q: bf16[2,3,16,8], k: bf16[2,3,32,8]) -> bf16[2,3,16,8] {\n"
        "  %q = bf16[2,3,16,8]{3,2,1,0} parameter(0)\n"
        "  %k = bf16[2,3,32,8]{3,2,1,0} parameter(1)\n"
        f"  ROOT {call}\n}}\n"
    )
    program = read_program(text, 1)
    assert program.total("flops") == 2 * products * 2 * 3 * 16 * 32 * 8
    assert not program.unknown_kernels
    other = read_program(text.replace(name, "other"), 1)
    assert other.unknown_kernels == ["other"] and not other.total("flops")
