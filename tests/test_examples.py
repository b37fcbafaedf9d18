"""What lies in examples/: a cascade that can be loaded, notebooks that ran."""

import ast
import json
import tempfile
from pathlib import Path

import pytest

from imagen_jax import images
from imagen_jax.api.cascade import open_stages
from imagen_jax.shapes.judge import judge

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


def test_the_cascade_opens_and_is_small():
    stages = open_stages([str(EXAMPLES / "shapes")])
    assert [stage.cfg.image_size for stage in stages] == [16, 32]
    files = [path for path in (EXAMPLES / "shapes").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 6.1e6


def test_its_samples_show_what_they_are_to_show():
    """By a judge that looks only at the picture and the caption."""
    lines = (EXAMPLES / "shapes/samples.jsonl").read_text().splitlines()
    right = []
    for line in map(json.loads, lines):
        picture = images.read(EXAMPLES / "shapes" / line["file"])
        verdict = judge(picture, line["prompt"])
        right.append(False not in vars(verdict).values())
    # The other two: one below another, and two crosses that touch.
    assert (len(right), sum(right)) == (8, 6)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_ran_and_are_small(path):
    assert path.stat().st_size < 300_000
    cells = json.loads(path.read_text())["cells"]
    codes = [cell for cell in cells if cell["cell_type"] == "code"]
    for cell in codes:
        ast.parse("".join(cell["source"]))
        assert cell["execution_count"] and "error" not in str(cell["outputs"])[:200]
    assert any("image/png" in str(cell["outputs"]) for cell in codes)
    assert tempfile.gettempdir() not in path.read_text()


def test_there_are_two_notebooks():
    assert [path.name for path in NOTEBOOKS] == ["quickstart.ipynb", "sample.ipynb"]
