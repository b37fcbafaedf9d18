"""Compiled programs as text, by hand."""

import pytest

from imagen_jax.planning import hlo


@pytest.mark.parametrize(
    ("text", "logical", "padded", "space"),
    [
        ("f32[3,5]{1,0}", 60, 60, 0),
        # 3 x 5 in tiles of 8 x 128.
        ("f32[3,5]{1,0:T(8,128)}", 60, 4 * 8 * 128, 0),
        # 48 is fastest, then 2: tiles of 2 x 128, for each of 8 x 8.
        ("bf16[2,8,8,48]{3,0,2,1:T(2,128)(2,1)S(3)}", 12288, 2 * 2 * 128 * 64, 3),
        # Of a tile of one row of bfloat16 there are two.
        ("bf16[1,128]{1,0:T(1,128)(2,1)}", 256, 512, 0),
        ("s32[]{:T(128)}", 4, 512, 0),
        ("pred[16,5]{0,1:T(8,128)(4,1)}", 80, 8 * 128, 0),
        ("s4[6]{0}", 3, 3, 0),
    ],
)
def test_what_an_array_takes(text, logical, padded, space):
    (array,) = hlo.arrays(text)
    assert array.logical_bytes == logical
    assert array.padded_bytes == padded
    assert array.space == space


def test_the_arrays_of_a_tuple():
    found = hlo.arrays("((f32[2]{0}, /*index=1*/u32[]{:S(2)}), bf16[4,4]{1,0})")
    assert [a.dtype for a in found] == ["f32", "u32", "bf16"]
    assert found[1].space == 2 and found[2].shape == (4, 4)


PROGRAM = """HloModule m, is_scheduled=true

%inner (p: f32[8]) -> f32[8] {
  %p = f32[8]{0:T(128)} parameter(0), metadata={op_name="a) b=c"}
  ROOT %neg.1 = f32[8]{0:T(128)} negate(%p)
}

ENTRY %main (x: f32[8], y: f32[8]) -> (f32[8], f32[8]) {
  %y = f32[8]{0:T(128)} parameter(1)
  %x = f32[8]{0:T(128)} parameter(0), sharding={replicated}
  %c = f32[2]{0} constant({1, 2}), metadata={op_name="k"}
  %f.2 = f32[8]{0:T(128)} fusion(%x, /*index=1*/%y), kind=kLoop, calls=%inner
  ROOT %t = (f32[8]{0:T(128)}, f32[8]{0:T(128)}) tuple(%f.2, %y)
}
"""


def test_a_program_is_read():
    computations, entry = hlo.parse(PROGRAM)
    assert set(computations) == {"inner", "main"} and entry.name == "main"
    assert [op.kind for op in entry] == [
        "parameter",
        "parameter",
        "constant",
        "fusion",
        "tuple",
    ]
    fusion = entry.ops["f.2"]
    assert fusion.operands == ["x", "y"] and fusion.attribute("calls") == "inner"
    assert entry.root.operands == ["f.2", "y"]
    assert [op.name for op in entry.parameters()] == ["x", "y"]
    assert [op.name for op in entry.users("y")] == ["f.2", "t"]
    assert entry.ops["c"].literal == "{1, 2}"


def test_other_text_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("HloModule m\n")


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", 4),
        ("replica_groups=[2,4]<=[8]", 4),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", 2),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", 4),
        ("replica_groups=mesh['a'=2,'b'=4] {'a', 'b'}", 8),
        ("replica_groups=mesh['a'=16,'b'=2] {'a':(1)4}", 4),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", 4),
        ("source_target_pairs={{0,1},{1,0}}", 2),
        ("replica_groups={}", 8),
        ("channel_id=1", 8),
    ],
)
def test_groups_of_an_exchange(groups, size):
    op = hlo.Op("a", "f32[8]{0}", "all-reduce", ["x"], f", {groups}, to_apply=%s", "")
    assert hlo.group_size(op, 8) == size


def test_groups_that_cannot_be_read_are_no_guess():
    op = hlo.Op("a", "f32[8]{0}", "all-reduce", ["x"], ", replica_groups=<8>", "")
    with pytest.raises(ValueError, match="cannot read the groups of a"):
        hlo.group_size(op, 8)
