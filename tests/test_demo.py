"""The demo: its numbers, its page, and the whole of it in little."""

import base64
import html.parser
import io
import json
import re
import shutil
import subprocess

import numpy as np
import psutil
import pytest
from PIL import Image

from imagen_jax import cli, demo
from imagen_jax.configs import tiny
from imagen_jax.errors import UserError
from imagen_jax.shapes import scenes as shapes
from imagen_jax.shapes import wordings
from imagen_jax.shapes.judge import Verdict, judge
from tests import tiny as tiny_tests
from tests.test_doors import call, error

SCENES = list(shapes.generate(2, seed=0))


def test_drawn_scenes_are_all_right_and_empty_ones_are_not():
    scenes = list(shapes.heldout(20, seed=1))
    captions = [shapes.caption(scene) for scene in scenes]
    drawn = [shapes.draw(scene, 32) for scene in scenes]
    right = demo.summarise([judge(*x) for x in zip(drawn, captions, strict=True)])
    assert right.pop("judged_pictures") == 20
    assert set(right.values()) == {1.0}
    blank = np.full((32, 32, 3), 255, np.uint8)
    wrong = demo.summarise([judge(blank, caption) for caption in captions])
    assert wrong.pop("judged_pictures") == 20
    assert set(wrong.values()) == {0.0}
    unasked = demo.summarise([judge(blank, "a red circle")])
    assert unasked["size_accuracy"] is unasked["relation_accuracy"] is None
    assert unasked["count_accuracy"] == 0


def made_page(tmp_path) -> str:
    """A page of two captions, the second picture of which has a wrong colour."""
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 1, "loss": 2.0}\n{"step": 3, "loss": 1.0}\n')
    points = demo.read_curve(metrics)
    assert points == [(1, 2.0), (3, 1.0)]
    right = Verdict(True, True, True, True, None)
    wrong = Verdict(False, True, True, None, None)
    row = demo.summarise([right, wrong])
    report = {
        "seconds": 1.0,
        "peak_memory_gib": 1.0,
        "accuracy": {"guidance on": row},
        "guidance": {"base": 3.0},
        "training_steps": {"base": 3},
        "encoder": "tiny@v2",
        "never_trained_on": "combinations of colour and shape",
    }
    pictures = {
        label: np.stack([shapes.draw(scene, side) for scene in SCENES])
        for label, side in (("drawn", 32), ("base", 16), ("guidance off", 32))
    }
    pictures["guidance on"] = pictures["drawn"]
    verdicts = {"guidance off": [right, right], "guidance on": [right, wrong]}
    captions = ["a <b>", "c"]
    return demo.page(report, captions, pictures, verdicts, {"base": points})


def test_the_page_escapes_and_holds_its_pictures(tmp_path):
    text = made_page(tmp_path)
    assert "a &lt;b&gt;" in text
    cells = re.findall(r"<td>(.*?)</td>", text)
    assert cells[:7] == ["guidance on", "2", "50%", "100%", "100%", "100%", "-"]
    assert text.count('class="wrong">colour<') == 1
    assert re.search(r'<meta name="viewport" content="width=device-width', text)
    seen = []

    class Parser(html.parser.HTMLParser):
        def handle_starttag(self, tag, attrs):
            seen.append((tag, dict(attrs)))

    Parser().feed(text)
    sources = [attrs["src"] for tag, attrs in seen if tag == "img"]
    start = "data:image/png;base64,"
    assert len(sources) == 8 and all(source.startswith(start) for source in sources)
    second = base64.b64decode(sources[1].removeprefix(start))
    with Image.open(io.BytesIO(second)) as picture:
        np.testing.assert_array_equal(np.asarray(picture), shapes.draw(SCENES[0], 16))
    labels = re.findall(r"([\w ]+)<div class=\"wrong\">", text)
    assert labels == 2 * ["drawn", "base", "guidance off", "guidance on"]
    # One file: it names no other.
    named = {key for _, attrs in seen for key in attrs} & {"href", "srcset", "data"}
    assert not named and "url(" not in text and "<script" not in text
    (line,) = [attrs["points"] for tag, attrs in seen if tag == "polyline"]
    heights = [float(point.split(",")[1]) for point in line.split()]
    # A loss half as high is drawn half as high above the axis at 200.
    assert (200 - heights[1]) * 2 == pytest.approx(200 - heights[0])


@pytest.mark.parametrize("width", [1200, 420])
def test_the_page_fits_the_screen(tmp_path, width):
    """As Chromium lays it out: nothing is wider than the screen, pictures are large."""
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    (tmp_path / "page.html").write_text(made_page(tmp_path) + MEASURE)
    # A window of Chromium has at least 500 pixels; a frame may have any.
    frame = f'<iframe src="page.html" width="{width}" height="900"></iframe>'
    (tmp_path / "frame.html").write_text(TELL + frame)
    done = subprocess.run(
        [
            *(program, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"),
            *("--allow-file-access-from-files", "--virtual-time-budget=5000"),
            *("--window-size=1400,1000", f"--user-data-dir={tmp_path / 'profile'}"),
            (tmp_path / "frame.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    found = re.search(r"<title>(.*?)</title>", done.stdout)
    assert found, done.stderr[-2000:]
    measured = json.loads(found[1])
    assert measured["page"] <= width, measured
    assert len(measured["pictures"]) == 8 and min(measured["pictures"]) >= 70


# The page tells the frame around it what it measures.
MEASURE = """<script>onload = () => parent.postMessage(JSON.stringify({
  page: document.documentElement.scrollWidth,
  pictures: [...document.images].map(image => image.getBoundingClientRect().width),
}), "*")</script>"""
TELL = "<script>onmessage = told => document.title = told.data</script>"


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="not empty and not of a demo"):
        demo.demo(str(tmp_path), 1.0)
    assert (tmp_path / "thesis.tex").exists()


def test_other_words_are_asked_of_trained_pairs():
    """Half of them new wordings, half new words; the first is the one to show."""
    asked = demo.asked(in_other_words=True)
    assert asked[0][:2] == ("new words", "a crimson disc")
    assert asked[0].plain == "a red circle"
    kinds = [one.kind for one in asked]
    assert kinds.count("new wordings") == kinds.count("new words") == 32
    trained = {text for _, text in wordings.generate(1000, seed=0)}
    for one in asked[1:]:
        assert one.prompt not in trained
        pairs = {(item.colour, item.shape) for item in one.scene.items}
        assert not pairs & shapes.HELD_OUT
        verdict = judge(shapes.draw(one.scene, 32), one.plain)
        assert verdict.colour and verdict.shape
    plain = demo.asked(in_other_words=False)
    assert len(plain) == 64 and all(one.prompt == one.plain for one in plain)


@pytest.fixture
def small_demo(monkeypatch):
    """Networks that compile fast, few records and few steps of sampling."""

    def smaller(variant, get_config=tiny.get_config):
        config = get_config(variant)
        config.model.update(tiny_tests.ONE_LEVEL)
        config.sampler.update(steps=2, batch_size=16)
        return config

    monkeypatch.setattr(tiny, "get_config", smaller)
    monkeypatch.setattr(demo, "_LEAST_EXAMPLES", 64)
    monkeypatch.setattr(demo, "_JUDGED", 16)
    # So that two demos share their programs.
    monkeypatch.setitem(demo._SOURCES, "shapes", demo._SOURCES["wordings"])


@pytest.mark.slow
def test_the_demo_in_many_words(tmp_path, small_demo):
    """Any encoder will do; the tiny one needs no torch."""
    output = tmp_path / "demo"
    done = call("demo", f"--output={output}", "--seconds=1", "--encoder=tiny")
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((output / "report.json").read_text())
    assert report["encoder"].startswith("tiny@")
    shown = {"of these, new words", "of these, new wordings"}
    assert shown < set(report["accuracy"])
    text = (output / "index.html").read_text()
    assert "wordings or words were never trained on" in " ".join(text.split())
    assert "<figure>a crimson disc" in text


@pytest.mark.slow
def test_the_whole_demo(tmp_path, small_demo):
    output = tmp_path / "demo"
    peak, held = cli.peak_memory_gib(), psutil.Process().memory_info().rss / 2**30
    done = call("demo", f"--output={output}", "--seconds=1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert str(output / "index.html") in done.stdout
    assert "guidance on" in done.stdout and "two in a relation" in done.stdout
    report = json.loads((output / "report.json").read_text())
    assert report["judged_pictures"] == 16
    for name in ("colour_accuracy", "shape_accuracy"):
        assert 0 <= report[name] <= 1
        assert report[name] == report["accuracy"]["guidance on"][name]
    # Tests before this one have left the process a peak, and what it still holds.
    assert report["seconds"] > 0
    assert peak <= report["peak_memory_gib"] <= max(peak, held + 1)
    text = (output / "index.html").read_text()
    assert text.count("<img ") == 4 * 16 and text.count("<polyline ") == 2
    assert len(list((output / "samples").glob("[0-9][0-9][0-9][0-9].png"))) == 16
    assert (output / "samples.png").is_file()
    assert "above zero" in error(call("demo", f"--output={output}", "--seconds=0"))
