"""Texts of compiled programs, by hand and from the compiler, against closed forms."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from imagen_jax.planning.program import Traffic, arrays, group


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("f32[3,5]{1,0:T(8,128)}", [(60, True)]),
        ("bf16[2,8,8,48]{3,0,2,1:T(2,128)(2,1)S(3)}", [(12288, False)]),
        ("s32[]{:T(128)S(0)}", [(4, True)]),
        ("pred[<=16,5]", [(80, True)]),
        ("s4[6]{0}", [(3, True)]),
        (
            "((f32[2]{0}, /*index=1*/u32[]{:S(2)}), bf16[4,4]{1,0}, token[])",
            [(8, True), (4, False), (32, True), (0, True)],
        ),
    ],
)
def test_the_arrays_of_a_type(text, found):
    assert arrays(text) == found


@pytest.mark.parametrize(
    ("groups", "members"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", [0, 1, 2, 3]),
        ("replica_groups=[2,4]<=[8]", [0, 1, 2, 3]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [0, 4]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", [0, 1, 2, 3]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", [0, 4]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a', 'b'}", list(range(8))),
        ("replica_groups=mesh['a'=16,'b'=2] {'a':(1)4}", [0, 8, 16, 24]),
        ("replica_groups=mesh['a'=16,'b'=2] {'a':(4)4}", [0, 2, 4, 6]),
        (
            "replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}",
            [0, 1, 2, 3],
        ),
        (
            "replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}, x={0}",
            [0, 4],
        ),
        ("replica_groups={}", list(range(8))),
        ("channel_id=1", list(range(8))),
    ],
)
def test_groups_of_an_exchange(groups, members):
    assert group(f", {groups}, to_apply=%s", 8) == members


def test_groups_that_cannot_be_read_are_no_guess():
    with pytest.raises(ValueError, match="unknown form of a collective's groups"):
        group(", replica_groups=<8>", 8)


PROGRAM = """HloModule m, is_scheduled=true

%inner (p: f32[8]) -> f32[8] {
  %p = f32[8]{0:T(128)} parameter(0), metadata={op_name="a) b=c"}
  ROOT %neg.1 = f32[8]{0:T(128)} negate(%p)
}

%sliced (p: f32[8], i: s32[]) -> f32[2] {
  %p = f32[8]{0} parameter(0)
  %i = s32[] parameter(1)
  %b = f32[8,1]{1,0} bitcast(%p)
  %s.1 = f32[2,1]{1,0} dynamic-slice(%b, %i)
  %s.2 = f32[2]{0} fusion(%p, %i), kind=kLoop, calls=%deeper
  ROOT %sum = f32[2]{0} add(%s.1, %s.2)
}

%deeper (p: f32[8], i: s32[]) -> f32[2] {
  %p = f32[8]{0} parameter(0)
  ROOT %s = f32[1]{0} slice(%p), slice={[0:1]}
}

ENTRY %main (x: f32[8], y: f32[8], i: s32[]) -> (f32[8], f32[8]) {
  %y = f32[8]{0:T(128)} parameter(1)
  %x = f32[8]{0:T(128)} parameter(0), sharding={replicated}
  %i = s32[] parameter(2)
  %c = f32[2]{0} constant({1, 2}), metadata={op_name="k"}
  WHAT
  ROOT %t = (f32[8]{0:T(128)}, f32[8]{0:T(128)}) tuple(%x, %y)
}
"""


@pytest.mark.parametrize(
    ("what", "moved"),
    [
        # Names and constants move nothing, nor does what is inside of a fusion.
        ("%f = f32[8]{0} fusion(%x), kind=kLoop, calls=%inner", 32 + 32),
        ("%f = f32[8]{0} add(%x, /*index=1*/%y)", 3 * 32),
        ("%f = f32[8]{0} negate(%x), control-predecessors={%y}, kind=k", 2 * 32),
        # Slices of two elements and of one, the index (all of it), and the result.
        ("%f = f32[2]{0} fusion(%x, %i), kind=kLoop, calls=%sliced", 8 + 4 + 4 + 8),
        ("%f = f32[2]{0} dynamic-slice(%x, %i)", 2 * 8),
        # Read here, and written to the chip.
        ("%f = (f32[8]{0:S(1)}, f32[8]{0}, u32[]{:S(2)}) copy-start(%x)", 32),
        ("%f = ((f32[8]{0}), f32[2]{0:S(1)}, s32[]{:S(2)}) slice-start(%x)", 8),
        ('%f = f32[8]{0} custom-call(), custom_call_target="AllocateBuffer"', 0),
        # The second result is what a library works with.
        ("%f = (f32[8]{0}, s8[4096]{0}) custom-call(%x, %y)", 3 * 32),
        ("%f = f32[8]{0} conditional(%i, %x), branch_computations={%inner}", 2 * 32),
    ],
)
def test_what_an_operation_moves(what, moved):
    assert Traffic(PROGRAM.replace("WHAT", what), 1).bytes == moved


def read(run, *shapes, devices=1):
    """What `run` does with arrays of these shapes, compiled here."""
    arrays = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    compiled = jax.jit(run).lower(*arrays).compile()
    return Traffic(compiled.as_text(), devices), compiled.cost_analysis()


def test_a_product_moves_its_arrays():
    program, theirs = read(lambda a, b: a @ b, (8, 32), (32, 16))
    arrays = 4 * (8 * 32 + 32 * 16 + 8 * 16)
    assert program.bytes == arrays == theirs["bytes accessed"]


LOOP = """
%body (p: (f32[8], s32[])) -> (f32[8], s32[]) {
  %p = (f32[8]{0}, s32[]) parameter(0)
  %x = f32[8]{0} get-tuple-element(%p), index=0
  %y = f32[8]{0} negate(%x)
  %i = s32[] get-tuple-element(%p), index=1
  %step = s32[] constant(STEP)
  %more = s32[] add(%i, %step)
  ROOT %t = (f32[8]{0}, s32[]) tuple(%y, %more)
}

%condition (p: (f32[8], s32[])) -> pred[] {
  %p = (f32[8]{0}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=1
  %n = s32[] constant(7)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (x: f32[8]) -> (f32[8], s32[]) {
  %x = f32[8]{0} parameter(0)
  %first = s32[] constant(0)
  %t = (f32[8]{0}, s32[]) tuple(%x, %first)
  ROOT %w = (f32[8]{0}, s32[]) while(%t), condition=%condition, body=%body
}
"""


@pytest.mark.parametrize(("step", "turns"), [(1, 7), (2, 4), (7, 1)])
def test_a_loop_is_counted_by_its_step_and_its_limit(step, turns):
    """A TPU's compiler notes no counts, and may make loops in steps of two."""
    program = Traffic(LOOP.replace("STEP", str(step)), 1)
    # The sum of the counter, and y of x.
    assert program.bytes == turns * (2 * 4 * 8 + 3 * 4)
    assert not program.unknown_loops
    unknown = Traffic(LOOP.replace("direction=LT", "direction=NE"), 1)
    assert unknown.unknown_loops == 1 and unknown.bytes == 2 * 4 * 8 + 3 * 4


def test_loops_of_the_compiler():
    """Nested ones by their lengths; one of unknown length once, and it is told."""

    def layers(x, weights):
        def inner(x, weight):
            return jnp.tanh(x @ weight), None

        def outer(x, weights):
            return jax.lax.scan(inner, x, weights)

        return jax.lax.scan(outer, x, weights)[0]

    program, _ = read(layers, (64, 32), (5, 3, 32, 32))
    assert not program.unknown_loops
    assert program.bytes > 5 * 3 * 4 * (64 * 32 + 32 * 32 + 64 * 32)

    def until(x):
        def go(c):
            return c[1].sum() < 1e3

        return jax.lax.while_loop(go, lambda c: (c[0] + 1, c[1] @ c[1]), (0, x))

    assert read(until, (16, 16))[0].unknown_loops == 1


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

    specs = {"in_specs": P(("a", "b")), "out_specs": P(("a", "b"))}
    run = jax.shard_map(run, mesh=MESH, check_vma=False, **specs)
    program, _ = read(run, (8 * 64, 8), devices=8)
    assert program.collectives == {kind: {"count": 3, "bytes": 3 * sent}}


TPU = """HloModule m

%all-reduce-scatter.1 (input: bf16[512]) -> bf16[128] {
  %input = bf16[512]{0} parameter(0)
  %all-reduce.1 = bf16[512]{0} all-reduce(%input), replica_groups=[1,4]<=[4]
  %i = s32[] constant(0)
  ROOT %slice.1 = bf16[128]{0} dynamic-slice(%all-reduce.1, %i)
}

%permute (p: f32[8,16]) -> f32[8,16] {
  %p = f32[8,16]{1,0} parameter(0)
  ROOT %moved = f32[8,16]{1,0} collective-permute(%p), source_target_pairs={{0,1}}
}

ENTRY %main (x: bf16[512], y: f32[8,16]) -> bf16[128] {
  %x = bf16[512]{0} parameter(0)
  %y = f32[8,16]{1,0:T(8,128)} parameter(1)
  %near = (f32[8,16]{1,0:T(8,128)S(1)}, f32[8,16]{1,0:T(8,128)}, u32[]{:S(2)}) \
copy-start(%y)
  %kept = f32[8,16]{1,0:T(8,128)S(1)} copy-done(%near)
  %b = (f32[8,16]{1,0:S(1)}, f32[32,16]{1,0:S(1)}) all-gather-start(%kept), id=1
  %c = f32[32,16]{1,0:S(1)} all-gather-done(%b)
  %d = ((f32[8,16]{1,0}), f32[8,16]{1,0}) async-start(%kept), calls=%permute
  %e = f32[8,16]{1,0:S(1)} negate(%kept), backend_config={"estimated_cycles":"700"}
  ROOT %a = bf16[128]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_a_tpus_program():
    """Scattered sums inside fusions, early starts, memory on the chip, cycles."""
    program = Traffic(TPU, 4)
    assert program.collectives == {
        "all-gather": {"count": 1, "bytes": 3 * 4 * 8 * 16},
        "collective-permute": {"count": 1, "bytes": 4 * 8 * 16},
        "reduce-scatter": {"count": 1, "bytes": 3 / 4 * 2 * 512},
    }
    # y is read from the main memory once, and kept on the chip.
    permuted, scattered = 2 * 4 * 8 * 16, 2 * (512 + 128)
    assert program.bytes == 4 * 8 * 16 + permuted + scattered
    assert program.cycles == {"negate": 700}


BOXES = """HloModule m

ENTRY %main (x: f32[16]) -> f32[16] {
  %x = f32[16]{0} parameter(0)
  %a = f32[16]{0} all-reduce(%x), replica_groups=[2,4]<=[8]
  %b = f32[16]{0} all-reduce(%a), replica_groups=[4,2]<=[2,4]T(1,0)
  ROOT %c = f32[16]{0} all-reduce(%b), replica_groups={}
}
"""


def test_between_boxes_as_many_rings_as_there_are_cards():
    """Within boxes of 4; by a card each; all 8, whose 4 rings share what is sent."""
    program, size = Traffic(BOXES, 8, linked=4), 4 * 16
    assert program.linked == 2 * 3 / 4 * size
    assert program.network == 2 * 1 / 2 * size + 2 * 7 / 8 * size / 4
    one_box = Traffic(BOXES, 8)
    sent = one_box.collectives["all-reduce"]["bytes"]
    assert one_box.linked == sent and one_box.network == 0


@pytest.mark.parametrize(
    ("kind", "groups", "axes"),
    [
        ("all-reduce", "[16,4]<=[64]", 1),
        ("all-reduce", "[4,16]<=[4,16]T(1,0)", 2),
        ("all-reduce", "[8,8]<=[64]", 1),  # one axis and half of another
        ("all-reduce", "[1,64]<=[64]", 3),
        ("collective-permute", "", 1),
    ],
)
def test_the_axes_of_a_torus_share_what_is_sent(kind, groups, axes):
    text = (
        "HloModule m\n\nENTRY %main (x: f32[16]) -> f32[16] {\n"
        "  %x = f32[16]{0} parameter(0)\n"
        f"  ROOT %a = f32[16]{{0}} {kind}(%x), replica_groups={groups or '{}'}\n}}\n"
    )
    torus, slab = (
        Traffic(text, 64, places=list(itertools.product(*map(range, sides))))
        for sides in ((4, 4, 4), (2, 4, 8))
    )
    (sent,) = (each["bytes"] for each in torus.collectives.values())
    assert torus.linked == sent / axes
    assert slab.linked == sent


EARLY = """HloModule m

%start (x: bf16[4]) -> (bf16[4], bf16[16]) {
  %x = bf16[4]{0} parameter(0)
  %a = bf16[16]{0} all-gather(%x), channel_id=1, replica_groups={}
  ROOT %r = (bf16[4]{0}, bf16[16]{0}) custom-call(%x, %a)
}

%async_collective_fusion (x: bf16[4], y: bf16[16]) -> bf16[16] {
  %x = bf16[4]{0} parameter(0)
  %y = bf16[16]{0} parameter(1)
  ROOT %a = bf16[16]{0} all-gather(%x), channel_id=1, replica_groups={}
}

%done (x: bf16[4]) -> bf16[16] {
  %x = bf16[4]{0} parameter(0)
  ROOT %a = bf16[16]{0} all-gather(%x), channel_id=1, replica_groups={}
}

ENTRY %main (p: bf16[4], y: bf16[16]) -> bf16[16] {
  %p = bf16[4]{0} parameter(0)
  %y = bf16[16]{0} parameter(1)
  %async-collective-start.1 = (bf16[4]{0}, bf16[16]{0}) fusion(%p), calls=%start
  %w = bf16[16]{0} fusion(%p, %y), calls=%async_collective_fusion
  %async-collective-done.1 = bf16[16]{0} fusion(%p), calls=%done
  %b = (bf16[4]{0}, bf16[16]{0}) all-gather-start(%p), replica_groups={}
  %c = bf16[16]{0} all-gather-done(%b)
  ROOT %d = bf16[16]{0} all-gather(%p), replica_groups={}
}
"""


def test_exchanges_that_other_work_runs_beside_are_known():
    """One that three fusions do, one by itself, and one that all else waits for."""
    program, sent = Traffic(EARLY, 4), 3 * 2 * 4
    assert program.collectives == {"all-gather": {"count": 3, "bytes": 3 * sent}}
    assert (program.early, program.linked) == (2 * sent, 3 * sent)
