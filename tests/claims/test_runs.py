"""A claim from its data to its page: by a recording fake, and once in earnest."""

import dataclasses
import json
import re

import numpy as np
import pytest

from benchmarks.claims import __main__ as claims
from benchmarks.claims import page, worlds
from benchmarks.claims.claims import CLAIMS, Arm, Claim, Plot, Training
from benchmarks.claims.intervals import Criterion
from benchmarks.claims.runs import Lab, slug
from benchmarks.claims.worlds import Asked, World
from imagen_jax import images
from imagen_jax.api.run import run_config
from imagen_jax.config import from_dict, to_json
from imagen_jax.errors import UserError
from imagen_jax.shapes import scenes
from tests.test_doors import TINY, call

SCENES = list(scenes.heldout(6, seed=4))
ASKED = [
    Asked(kind, scenes.caption(scene), scenes.caption(scene))
    for kind, scene in zip(["old", "new"] * 3, SCENES)
]
WORLD = World("little", "shapes:16", 16, 16, lambda folder: ASKED, worlds.judge_scenes)


def claim(*configs):
    """Two trainings; "good" is expected to be right more often than "bad"."""
    trainings = [
        Training(name, WORLD, "tiny", "configs/tiny.py:base", 2, 0.1, configs)
        for name in ("little-good", "little-bad")
    ]
    arms = [Arm(one.name[7:], (one,), ("--guidance=2",)) for one in trainings]
    points = tuple((kind, "good", kind) for kind in ("old", "new"))
    curve = tuple((x, "bad", "") for x in (1.0, 2.0))
    return Claim(
        "little",
        "The good one is better than the bad one.",
        tuple(arms),
        (("right", ""), ("right", "new"), ("loss", "")),
        (
            Criterion("it is", "right", "", (("good", 1.0), ("bad", -1.0)), above=0.5),
            Criterion("same loss", "loss", "", (("good", 1), ("bad", -1)), within=5.0),
        ),
        (
            Plot("right", "kind", (("good", points),)),
            Plot("right", "x", (("b", curve),)),
        ),
        curves=True,
    )


CLAIM = claim()


class Fake:
    """Does what commands would leave behind, and records them.

    Pictures of trainings that are called good are drawn as asked; others are blank.
    """

    def __init__(self, fails_at=None):
        self.calls, self.fails_at = [], fails_at

    def __call__(self, command):
        flags = {}
        for word in command[3:]:
            name, _, value = word.removeprefix("--").partition("=")
            flags.setdefault(name, []).append(value)
        self.calls.append((command[2].removeprefix("imagen_jax."), flags))
        if len(self.calls) == self.fails_at:
            raise UserError("stopped")
        getattr(self, self.calls[-1][0])(flags)

    def prepare(self, flags):
        write(flags["output"][0], "records")

    def train(self, flags):
        (workdir,) = flags["workdir"]
        rows = [{"step": s, "loss": 1 / s, "steps_per_second": 8.0} for s in (1, 2)]
        write(f"{workdir}/metrics.jsonl", "\n".join(map(json.dumps, rows)))
        values = run_config(flags["config"][0]).to_dict()
        write(f"{workdir}/config.json", to_json(from_dict(values)))

    def sample(self, flags):
        is_good = "good" in flags["stage"][-1]
        for i, scene in enumerate(SCENES):
            blank = np.full((16, 16, 3), 255, np.uint8)
            picture = scenes.draw(scene, 16) if is_good else blank
            write(f"{flags['output'][0]}/{i:04d}.png", "")
            images.save(f"{flags['output'][0]}/{i:04d}.png", picture)


def write(path, text):
    from pathlib import Path

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text)


def test_a_claim_from_commands_to_a_page(tmp_path):
    fake = Fake()
    lab = Lab(tmp_path, run=fake)
    assert "2 x 0.2 minutes" in claims.plan(lab, [CLAIM], 2)
    written = claims.run(lab, [CLAIM], seeds=2)
    doors = [door for door, _ in fake.calls]
    # Records once, then each training and its samples, seed by seed.
    assert doors == ["prepare", *["train", "sample"] * 4]
    trained = [flags for door, flags in fake.calls if door == "train"]
    assert [f["config.training.seed"] for f in trained] == [["0"], ["0"], ["1"], ["1"]]
    assert all(f["config.data.seed"] == f["config.training.seed"] for f in trained)
    assert len({f["workdir"][0] for f in trained}) == 4
    prompts = (tmp_path / "prompts/little.txt").read_text().splitlines()
    assert prompts == [one.text for one in ASKED]
    text = written.read_text()
    assert '<h2 class="confirmed">little: confirmed' in text
    assert "1 [1, 1]" in text and text.count("<svg ") == 4
    kept = json.loads((tmp_path / "claims.json").read_text())
    assert kept["little"]["verdict"] == "confirmed"
    assert kept["little"]["criteria"][1][1:] == ["1 [1, 1]", "above 0.5", "confirmed"]
    marked = (tmp_path / "claims.md").read_text()
    for plot in re.findall(r"!\[.*?\]\((.*?\.svg)\)", marked):
        assert (tmp_path / plot).read_text().startswith("<svg ")
    # Nothing is made twice.
    again = Fake()
    claims.run(Lab(tmp_path, run=again), [CLAIM], seeds=2)
    assert again.calls == []
    assert "0 x 0.2 minutes" in claims.plan(lab, [CLAIM], 2)


@pytest.mark.parametrize("fails_at", [1, 2, 3, 5])
def test_it_goes_on_where_it_was_stopped(tmp_path, fails_at):
    first = Fake(fails_at)
    with pytest.raises(UserError, match="stopped"):
        claims.run(Lab(tmp_path, run=first), [CLAIM], seeds=1)
    second = Fake()
    claims.run(Lab(tmp_path, run=second), [CLAIM], seeds=1)
    # What was stopped is called again, with the same words.
    assert second.calls[0] == first.calls[-1]
    assert len(first.calls) + len(second.calls) == 6
    kept = json.loads((tmp_path / "claims.json").read_text())
    assert kept["little"]["verdict"] == "confirmed"


def test_a_claim_that_is_wrong_is_refuted(tmp_path):
    wrong = Criterion("it is not", "right", "", (("bad", 1.0), ("good", -1.0)))
    refuted = dataclasses.replace(CLAIM, criteria=(*CLAIM.criteria, wrong))
    claims.run(Lab(tmp_path, run=Fake()), [refuted], seeds=1)
    kept = json.loads((tmp_path / "claims.json").read_text())
    assert kept["little"]["verdict"] == "refuted"


def test_what_was_not_measured_is_undecided(tmp_path):
    """As the time of a step, in a run too short to tell."""
    longer = Criterion("it is", "nothing", "", (("bad", 1.0), ("good", -1.0)))
    claim = dataclasses.replace(CLAIM, criteria=(*CLAIM.criteria, longer))
    claims.run(Lab(tmp_path, run=Fake()), [claim], seeds=1)
    kept = json.loads((tmp_path / "claims.json").read_text())["little"]
    assert kept["verdict"] == "undecided"
    assert kept["criteria"][-1][1:] == ["not measured", "above 0", "undecided"]


def test_arms_that_claims_share_are_sampled_once(tmp_path):
    other = dataclasses.replace(CLAIM, name="other", arms=CLAIM.arms[::-1])
    fake = Fake()
    claims.run(Lab(tmp_path, run=fake), [CLAIM, other], seeds=1)
    assert len(fake.calls) == 5


def test_the_sheet_shows_what_each_encoder_paints(tmp_path):
    """Of names with a word that is never trained on, and the named colour beneath."""
    text_encoder = CLAIMS["text_encoder"]
    lab = Lab(tmp_path)
    for number, arm in enumerate(text_encoder.arms):
        if arm.stages[-1].world.name == "colours":
            folder = tmp_path / "samples" / f"{slug(arm)}-s0"
            folder.mkdir(parents=True)
            for i, one in enumerate(worlds.COLOURS.ask(tmp_path)):
                if one.kind == "words":
                    flat = np.full((16, 16, 3), 20 * number, np.uint8)
                    images.save(folder / f"{i:04d}.png", flat)
    drawn = page.sheet(lab, text_encoder, 0)
    # Seven rows of twelve pictures of 64 pixels.
    assert drawn.shape[0] > 7 * 64 and drawn.shape[1] > 12 * 64
    assert page.sheet(lab, CLAIMS["epsilon"], 0) is None


def test_axes_have_round_numbers():
    points = [(x, 100.0 * x, 90.0 * x, 110.0 * x) for x in range(1, 40)]
    labels = re.findall(r">([^<>]+)</text>", page.svg("x", "y", [("a", points)]))
    ys, xs = range(0, 4501, 500), range(0, 41, 5)
    assert labels == [*map(str, ys), *map(str, xs), "a", "y by x"]


def test_the_sheet_has_a_row_for_each_arm(tmp_path):
    lab = Lab(tmp_path, run=Fake())
    claims.run(lab, [CLAIM], seeds=1)
    # One of each caption.
    asked = {scenes.caption(scene): scenes.draw(scene, 16) for scene in SCENES}
    drawn = np.stack(list(asked.values()))
    pictures = images.enlarge(np.concatenate([drawn, np.full_like(drawn, 255)]), 64)
    captions = [*[""] * len(asked), *asked]
    expected = images.grid(pictures, len(asked), captions, ["good", "bad"])
    np.testing.assert_array_equal(images.read(tmp_path / "little.png"), expected)
    assert 'src="little.png"' in (tmp_path / "index.html").read_text()


def test_the_command_says_what_is_missing(monkeypatch, capsys, tmp_path):
    words = ["claims", f"--output={tmp_path}", "--claim=thresholding"]
    monkeypatch.setattr("sys.argv", [*words, "--plan"])
    claims.main()
    assert "emoji-base" in capsys.readouterr().out
    for bad, why in ((words, "needs --emoji"), ([*words, "--seeds=0"], "seeds is 0")):
        monkeypatch.setattr("sys.argv", bad)
        with pytest.raises(UserError, match=why):
            claims.main()
    monkeypatch.setattr(claims, "run", lambda lab, some, seeds: [c.name for c in some])
    monkeypatch.setattr("sys.argv", words[:2])
    claims.main()
    first, *_, made = capsys.readouterr().out.splitlines()
    assert first == "thresholding is left out: it needs --emoji=FOLDER"
    assert "encoder_size" in made and "thresholding" not in made
    # Tracing networks of billions of parameters takes a minute.
    monkeypatch.setattr(claims.pod, "forward_flops", lambda cfg: 10**12)
    monkeypatch.setattr("sys.argv", ["claims", "--output=x", "--scale=pod"])
    claims.main()
    told = capsys.readouterr().out
    # As many FLOPs as the stage that was planned: 400,000 steps of 0.293 s.
    assert "| 1.00 | 1.36 |" in told and "69 trainings" in told


@pytest.mark.slow
def test_a_claim_in_earnest(tmp_path):
    """Prepared, trained for two steps and sampled by the commands themselves."""
    left_out = "training.", "sampler.batch_size"
    changes = [f.removeprefix("--config.").split("=") for f in TINY]
    changes = [(k, v) for k, v in changes if not k.startswith(left_out)]
    little = claim(("training.batch_size", 8), *map(tuple, changes))

    def run(command):
        done = call(command[2].removeprefix("imagen_jax."), *command[3:])
        assert done.returncode == 0, done.stderr[-3000:]

    claims.run(Lab(tmp_path, run=run), [little], seeds=1)
    kept = json.loads((tmp_path / "claims.json").read_text())
    # Neither network has learnt anything.
    assert kept["little"]["criteria"][1][1:] == ["0 [0, 0]", "above 0.5", "refuted"]
    figures = json.loads((tmp_path / "trainings/little-good-s0.json").read_text())
    assert figures["loss"] > 0 and figures["gflop"] > 0
