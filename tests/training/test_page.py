"""The page of a workdir: what it shows of the logs, and on a telephone; curves."""

import html.parser
import json
import math
import re
import shutil
import subprocess

import numpy as np
import pytest

from imagen_jax import images
from imagen_jax.training.metrics import MetricWriter, Stopwatch
from imagen_jax.training.page import curve, page
from tests import tiny
from tests.clock import Clock


def events(*kinds):
    """A run of ten seconds before each event, in a bucket of the event's name."""
    names = {"start": "start", "steps": "step", "checkpoint": "checkpoint"}
    return [
        json.dumps(
            {
                "event": kind,
                "step": 10 * i,
                "seconds": 10.0 * i,
                "spent": {names[kind]: 10},
            }
        )
        for i, kind in enumerate(kinds)
    ]


class Parser(html.parser.HTMLParser):
    """Collects what a page holds."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data + " "

    def all(self, tag, name):
        return [
            attrs[name] for found, attrs in self.tags if found == tag and name in attrs
        ]


def test_it_shows_the_curves_the_previews_the_time_and_the_config():
    cfg = tiny.stage(name="a <b>", training={"steps": 100})
    rows = [
        {"step": n, "loss": 1 / n, "gradient_norm": 2.0, "learning_rate": 0.1}
        | {"steps_per_second": 0.5, "images_per_second": 4.0}
        for n in range(1, 2001)
    ]
    del rows[3]["loss"]  # of steps that were all skipped
    metrics = [json.dumps(row) for row in rows]
    done = events("start", "steps", "checkpoint", "steps")
    text = page(cfg, metrics, done, ["samples/00000020.png", "samples/00000010.png"])
    found = Parser(text)
    loss, *_ = lines = found.all("polyline", "points")
    assert len(lines) == 3
    # Of 2,000 points some 500; the last one is among them.
    assert 400 <= len(loss.split()) <= 501 and loss.split()[-1].startswith(
        "400.0,200.0"
    )
    assert found.all("img", "src") == ["samples/00000020.png", "samples/00000010.png"]
    assert ("http-equiv", "refresh") in {
        (k, v) for _, a in found.tags for k, v in a.items()
    }
    told = " ".join(found.text.split())
    assert "a <b>, 8 pixels" in told and "a &lt;b&gt;" in text
    assert "step 30 of 100; 4 images per second; 0 h 2 min of steps to go" in told
    assert "Goodput 50.0% of 40 s" in told and "checkpoint 10 s 25.0%" in told
    assert '"prediction": "eps"' in told
    # Nothing is fetched from elsewhere.
    assert "http" not in text.replace("http-equiv", "") and "<script" not in text


def test_a_run_that_has_just_begun_has_a_page():
    told = Parser(page(tiny.stage(), [], [], [])).text
    assert "step 0 of 4" in told and "none yet" in told


def test_a_workdir_has_its_page(tmp_path):
    """Written with the log, once a minute; previews of another run are not shown."""
    cfg, clock = tiny.stage(), Clock()
    for step in (2, 9):
        (tmp_path / "samples").mkdir(exist_ok=True)
        images.save(tmp_path / "samples" / f"{step:08d}.png", np.zeros((4, 4, 3), "u1"))
    writer = MetricWriter(str(tmp_path), Stopwatch(clock.monotonic, clock.wall), cfg)
    writer.event("start", 0)
    first = (tmp_path / "index.html").read_text()
    writer.scalars(2, {"loss": 0.5})
    writer.event("steps", 2)
    assert (tmp_path / "index.html").read_text() == first
    writer.event("checkpoint", 2)
    found = Parser((tmp_path / "index.html").read_text())
    assert found.all("img", "src") == ["samples/00000002.png"]
    assert found.all("polyline", "points")
    writer.close()
    assert not list(tmp_path.glob("*.partial"))


BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)


@pytest.mark.slow
@pytest.mark.skipif(not BROWSER, reason="there is no Chromium")
@pytest.mark.parametrize("width", [420, 1200])
def test_it_fits_its_window(tmp_path, width):
    rows = [json.dumps({"step": n, "loss": 1 / n}) for n in range(1, 99)]
    made = page(tiny.stage(), rows, events("start", "steps"), ["00000010.png"])
    images.save(tmp_path / "00000010.png", np.zeros((500, 1100, 3), "u1"))
    (tmp_path / "page.html").write_text(made)
    # A window has 500 pixels or more; a frame in it may be narrower.
    (tmp_path / "outer.html").write_text(
        f'<iframe src="page.html" width="{width}" height="900" frameborder="0" '
        'onload="d = this.contentDocument; document.title = [d.images[0].naturalWidth, '
        'this.contentWindow.innerWidth, d.documentElement.scrollWidth]"></iframe>'
    )
    command = [BROWSER, "--headless", "--no-sandbox", "--hide-scrollbars"]
    command += ["--allow-file-access-from-files", "--window-size=1400,1000"]
    shown = subprocess.run(
        [*command, "--dump-dom", str(tmp_path / "outer.html")],
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout
    assert f"<title>1100,{width},{width}</title>" in shown, shown[:500]


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
