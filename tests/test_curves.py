"""Curves: where the points of an SVG lie."""

import math
import re

import pytest

from imagen_jax.curves import curve


def heights(svg):
    """Above the axis at 200, in the order of the points."""
    (line,) = re.findall(r'points="([^"]+)"', svg)
    return [200 - float(point.split(",")[1]) for point in line.split()]


def labels(svg):
    """The marks of the axis by their heights."""
    found = re.findall(r"M0 ([\d.]+)H.*?<text[^>]*>([^<]+)", svg)
    return {200 - float(y): float(text) for y, text in found}


def test_heights_are_those_of_the_values():
    svg = curve("loss", [(1, 2.0), (2, 1.0), (4, 0.0)])
    assert heights(svg) == [190, 95, 0]
    assert labels(svg) == {190: 2, 95: 1, 0: 0}


def test_on_a_log_axis_each_decade_is_as_high():
    svg = curve("loss", [(n, 10.0**-n) for n in range(5)], log=True)
    up = heights(svg)
    assert [a - b for a, b in zip(up, up[1:])] == pytest.approx([190 / 4] * 4)
    assert labels(svg) == {190: 1, 95: 0.01, 0: 0.0001}


def test_what_an_axis_cannot_show_is_left_out():
    points = [(1, math.nan), (2, 3.0), (3, math.inf), (4, 0.0), (5, -1.0), (6, 3.0)]
    assert heights(curve("x", points, log=True)) == [0, 0]
    assert curve("x", points[:1]) == curve("x", []) == ""
    assert heights(curve("x", [(0, 0.0)])) == [0]
    assert "a &lt;b&gt;: 3 at step 2" in curve("a <b>", points[:2])
