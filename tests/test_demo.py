"""The demo: its numbers, its page, and the whole of it in little."""

import html.parser
import json

import numpy as np
import pytest

from configs import tiny
from imagen_jax import demo
from imagen_jax.errors import UserError
from imagen_jax.shapes import scenes as shapes
from imagen_jax.shapes.judge import Verdict, judge
from tests import tiny as tiny_tests
from tests.test_doors import call, error


def test_drawn_scenes_are_all_right_and_empty_ones_are_not():
    scenes = list(shapes.heldout(20, seed=1))
    captions = [shapes.caption(scene) for scene in scenes]
    drawn = [shapes.draw(scene, 32) for scene in scenes]
    right = demo.summarise([judge(*x) for x in zip(drawn, captions, strict=True)])
    assert right.pop("judged_pictures") == 20
    assert set(right.values()) == {1.0}
    blank = np.full((32, 32, 3), 255, np.uint8)
    wrong = demo.summarise([judge(blank, caption) for caption in captions])
    assert wrong["colour_accuracy"] == wrong["shape_accuracy"] == 0


def test_the_page_escapes_and_points_at_its_pictures(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 1, "loss": 2.0}\n{"step": 3, "loss": 1.0}\n')
    points = demo.read_curve(metrics)
    assert points == [(1, 2.0), (3, 1.0)]
    right = Verdict(True, True, True, True, True)
    wrong = Verdict(False, True, True, True, True)
    row = demo.summarise([right, wrong])
    report = {
        "seconds": 1.0,
        "peak_memory_gib": 1.0,
        "accuracy": {"guidance on": row},
        "guidance": {"base": 3.0},
        "training_steps": {"base": 3},
    }
    text = demo.page(report, ["a <b>", "c"], [right, wrong], {"base": points})
    assert "a &lt;b&gt;" in text and "50%" in text
    assert text.count('class="wrong">colour<') == 1

    seen = []

    class Parser(html.parser.HTMLParser):
        def handle_starttag(self, tag, attrs):
            seen.append((tag, dict(attrs)))

    Parser().feed(text)
    sources = [attrs["src"] for tag, attrs in seen if tag == "img"]
    assert sources == ["samples/0000.png", "samples/0001.png"]
    (line,) = [attrs["points"] for tag, attrs in seen if tag == "polyline"]
    heights = [float(point.split(",")[1]) for point in line.split()]
    # A loss half as high is drawn half as high above the axis at 200.
    assert (200 - heights[1]) * 2 == pytest.approx(200 - heights[0])


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="not empty and not of a demo"):
        demo.demo(str(tmp_path), 1.0)
    assert (tmp_path / "thesis.tex").exists()


@pytest.mark.slow
def test_the_whole_demo(tmp_path, monkeypatch):
    """With networks that compile fast, few records and few steps of sampling."""
    output = tmp_path / "demo"

    def smaller(variant, get_config=tiny.get_config):
        config = get_config(variant)
        config.model.update(tiny_tests.ONE_LEVEL)
        config.sampler.update(steps=2, batch_size=16)
        return config

    monkeypatch.setattr(tiny, "get_config", smaller)
    monkeypatch.setattr(demo, "_LEAST_EXAMPLES", 64)
    monkeypatch.setattr(demo, "_JUDGED", 16)
    done = call("demo", f"--output={output}", "--seconds=1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert str(output / "index.html") in done.stdout
    assert "guidance on" in done.stdout and "two in a relation" in done.stdout
    report = json.loads((output / "report.json").read_text())
    assert report["judged_pictures"] == 16
    for name in ("colour_accuracy", "shape_accuracy"):
        assert 0 <= report[name] <= 1
        assert report[name] == report["accuracy"]["guidance on"][name]
    assert report["seconds"] > 0 and report["peak_memory_gib"] < 4
    text = (output / "index.html").read_text()
    assert text.count("<img ") == 16 and text.count("<polyline ") == 2
    assert len(list((output / "samples").glob("[0-9][0-9][0-9][0-9].png"))) == 16
    assert (output / "samples.png").is_file()
    assert "above zero" in error(call("demo", f"--output={output}", "--seconds=0"))
