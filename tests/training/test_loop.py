"""The loop: resuming, stopping, and what lies in a workdir."""

import dataclasses
import json
import os
import re
import signal
import time

import jax
import numpy as np
import pytest
from PIL import Image

from imagen_jax import config
from imagen_jax.config import MeshConfig
from imagen_jax.errors import Stopped, UserError
from imagen_jax.sharding import make_mesh
from imagen_jax.training import loop
from imagen_jax.training.checkpoint import Checkpointer
from imagen_jax.training.preview import Preview
from imagen_jax.training.weights import open_weights
from tests import tiny


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(), jax.devices()[:1])


def train(cfg, workdir, mesh, hook=None):
    batches = tiny.Batches(cfg, mesh)
    if hook:
        batches.hook = hook
    return jax.device_get(loop.train(cfg, str(workdir), batches, mesh))


def assert_equal_states(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_a_signal_saves_and_stops(tmp_path, mesh, monkeypatch):
    """The resumed run is the uninterrupted one: state to the bit, and its lines."""
    cfg = tiny.stage(model=tiny.ONE_LEVEL)
    compiled = loop.compile_train_step(cfg, mesh)
    monkeypatch.setattr(loop, "compile_train_step", lambda *args: compiled)

    def interrupt(taken):
        if taken == 3:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Stopped, match="step 3"):
        train(cfg, tmp_path / "run", mesh, interrupt)
    assert signal.getsignal(signal.SIGINT) is before
    assert Checkpointer(str(tmp_path / "run")).newest() == 3
    resumed = train(cfg, tmp_path / "run", mesh)
    assert_equal_states(resumed, train(cfg, tmp_path / "whole", mesh))
    events = lines(tmp_path / "run" / "events.jsonl")
    kinds = [line["event"] for line in events]
    assert kinds[0] == "start" and "stop" in kinds and kinds[-1] == "done"
    sources = [line["source"] for line in events if line["event"] == "start"]
    assert sources == ["scratch", "checkpoint"]
    logged, want = (
        [
            {name: x for name, x in row.items() if not name.endswith("_per_second")}
            for row in lines(tmp_path / run / "metrics.jsonl")
        ]
        for run in ("run", "whole")
    )
    assert logged == want and [row["step"] for row in logged] == [2, 4]


@pytest.mark.slow
def test_the_workdir_holds_what_it_should(tmp_path, mesh, no_arithmetic):
    cfg = tiny.sr_stage(
        model=tiny.ONE_LEVEL, training={"sample_every_steps": 4, "steps": 5}
    )
    batches = tiny.Batches(cfg, mesh)
    own = jax.tree.map(lambda x: x[:3], tiny.batch(cfg))
    preview = Preview(own.image, own.text, own.mask, ("a", "b", "c"))
    loop.train(cfg, str(tmp_path), batches, mesh, lambda: preview)
    metrics = lines(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [2, 4, 5]
    assert all(np.isfinite(row["loss"]) for row in metrics)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "config.json",
        "lock",
        "checkpoints",
        "metrics.jsonl",
        "tensorboard",
        "samples",
        "index.html",
        "events.jsonl",
    }
    # Inputs, samples, and the pictures that they should become.
    sheet = np.asarray(Image.open(tmp_path / "samples" / "00000004.png"))
    real = sheet[4 + 2 * 132 :, -3 * 132 :][:128:8, :128:8]
    np.testing.assert_array_equal(real, preview.image[0])
    page = (tmp_path / "index.html").read_text()
    assert re.findall(r'<img src="([^"]+)"', page) == [
        "samples/00000005.png",
        "samples/00000004.png",
    ]
    assert "step 5 of 5; done" in page
    assert Checkpointer(str(tmp_path)).stage(5) == cfg


def test_the_time_left_leaves_out_compiling(tmp_path, mesh, no_arithmetic, monkeypatch):
    """The first step takes 3 s here, each of the others next to nothing."""
    bars, step_fn = [], loop.compile_train_step(None, None)

    class Bar(loop.tqdm):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            bars.append(self)

    def slow_at_first(state, batch):
        time.sleep(3 if int(state.step) == 0 else 0)
        return step_fn(state, batch)

    monkeypatch.setattr(loop, "tqdm", Bar)
    monkeypatch.setattr(loop, "compile_train_step", lambda *_: slow_at_first)
    started = time.monotonic()
    training = {"checkpoint_every_steps": 100, "steps": 4}
    train(tiny.stage(model=tiny.ONE_LEVEL, training=training), tmp_path, mesh)
    (bar,) = bars
    assert bar.n == 4
    assert bar.format_dict["elapsed"] < time.monotonic() - started - 2.9


def test_data_is_opened_while_the_step_is_compiled(
    tmp_path, mesh, no_arithmetic, monkeypatch
):
    """A run that has nothing left to do does neither."""
    done, compile_step = [], loop.compile_train_step

    class Reading(tiny.Batches):
        def __iter__(self):
            done.append("read")
            return self

        def __next__(self):
            done.append("next")
            return super().__next__()

    def compiled(cfg, mesh, meanwhile):
        done.append("compile")
        meanwhile()
        return compile_step(cfg, mesh)

    def told(what):
        return lambda: done.append(what)

    monkeypatch.setattr(loop, "compile_train_step", compiled)
    cfg = tiny.stage(model=tiny.ONE_LEVEL, training={"steps": 2})
    for _ in range(2):
        batches = Reading(cfg, mesh)
        loop.train(cfg, str(tmp_path), batches, mesh, told("preview"))
        assert done == ["compile", "preview", "read", "next", "next"]


@pytest.mark.slow
def test_only_the_newest_checkpoints_stay(tmp_path, mesh, no_arithmetic):
    cfg = tiny.stage(
        model=tiny.ONE_LEVEL,
        training={"checkpoint_every_steps": 1, "keep_checkpoints": 2, "steps": 4},
    )
    train(cfg, tmp_path, mesh)
    steps = {int(p.name) for p in (tmp_path / "checkpoints").iterdir()}
    assert steps == {3, 4}


def test_a_workdir_of_another_config_is_refused(tmp_path):
    cfg = tiny.stage(model=tiny.ONE_LEVEL)
    loop.claim_workdir(cfg, str(tmp_path / "run"))
    (tmp_path / "run" / "checkpoints" / "2").mkdir(parents=True)
    free = dataclasses.replace(
        cfg, mesh=MeshConfig(data=2), data=dataclasses.replace(cfg.data, records="x")
    )
    loop.claim_workdir(tiny.with_steps(free, 9), str(tmp_path / "run"))
    other = tiny.stage(model=tiny.ONE_LEVEL, optimizer={"learning_rate": 0.5})
    with pytest.raises(UserError, match=r"optimizer\.learning_rate: 0\.01 -> 0\.5"):
        loop.claim_workdir(other, str(tmp_path / "run"))
    encoder = tiny.stage(model=tiny.ONE_LEVEL, text={"encoder": "other@1"})
    with pytest.raises(UserError, match=r"text\.encoder: 'fake@1' -> 'other@1'"):
        loop.claim_workdir(encoder, str(tmp_path / "run"))


def of_run(steps, decay_steps, learning_rate=0.01, **training):
    optimizer = {"decay_steps": decay_steps, "learning_rate": learning_rate}
    # Saved at its end only.
    training = {"steps": steps, "checkpoint_every_steps": 100, **training}
    return tiny.stage(model=tiny.ONE_LEVEL, optimizer=optimizer, training=training)


@pytest.mark.slow
def test_a_run_that_saved_nothing_leaves_its_workdir_free(
    tmp_path, mesh, no_arithmetic
):
    """One whose first weights are not there, one that was killed before it saved."""
    with pytest.raises(UserError, match="/nowhere has no config.json"):
        train(of_run(4, 0, init_from="/nowhere"), tmp_path, mesh)

    def die(taken):
        if taken == 4:
            raise KeyboardInterrupt

    for rate in (0.1, 0.2):
        with pytest.raises(KeyboardInterrupt):
            train(of_run(9, 0, rate, checkpoint_every_steps=9), tmp_path, mesh, die)
        # What those logged goes: the next one starts from step 0.
        steps = [row["step"] for row in lines(tmp_path / "metrics.jsonl")]
        assert steps == [2]
    train(of_run(4, 0, 0.3), tmp_path, mesh)
    assert [row["step"] for row in lines(tmp_path / "metrics.jsonl")] == [2, 4]
    assert json.loads((tmp_path / "config.json").read_text())["optimizer"] == (
        dataclasses.asdict(of_run(4, 0, 0.3).optimizer)
    )
    with pytest.raises(UserError, match=r"holds a run of another .*rate: 0\.3 -> 0\.4"):
        train(of_run(4, 0, 0.4), tmp_path, mesh)


def test_a_config_of_another_program_is_not_replaced(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["T5"]}')
    with pytest.raises(UserError, match="config.architectures does not exist"):
        loop.claim_workdir(tiny.stage(), str(tmp_path))
    assert "T5" in (tmp_path / "config.json").read_text()


def saved_run(cfg, workdir):
    """A workdir as a run of `cfg` leaves it that has saved its last step."""
    loop.claim_workdir(cfg, str(workdir)).close()
    (workdir / "checkpoints" / str(cfg.training.steps)).mkdir(parents=True)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((4, 0), (8, 0)),
        ((4, 4), (8, 0)),  # trained by a release that had no 0
        ((4, 0), (8, 8)),
        ((4, 4), (8, 8)),
        ((4, 3), (8, 3)),  # on purpose
        ((4, -1), (8, -1)),
        ((4, 20), (8, 20)),
    ],
)
def test_more_steps_stretch_the_decay(tmp_path, before, after):
    saved_run(of_run(*before), tmp_path)
    loop.claim_workdir(of_run(*after), str(tmp_path)).close()
    text = (tmp_path / "config.json").read_text()
    assert config.from_json(json.loads(text), "config.json") == of_run(*after)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (
            (4, 4),
            (8, 4),
            "4, and its learning rate is 0 from step 4 on: for",
        ),
        (
            (5, 5),
            (8, 5),
            "5, and its learning rate is 0 from step 5 on: for",
        ),
        ((4, 0), (8, 4), "optimizer.decay_steps: 0 -> 4"),
        ((4, -1), (8, 0), "optimizer.decay_steps: -1 -> 0"),
        ((4, 3), (8, 0), "optimizer.decay_steps: 3 -> 0"),
    ],
)
def test_steps_that_cannot_learn_are_refused(tmp_path, before, after, message):
    saved_run(of_run(*before), tmp_path)
    for _ in range(2):  # The refusal changes nothing.
        with pytest.raises(UserError, match=message):
            loop.claim_workdir(of_run(*after), str(tmp_path))
    if before[0] == before[1]:
        loop.claim_workdir(of_run(8, 0), str(tmp_path)).close()


def test_a_config_that_is_damaged_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json is not the config of a run"):
        loop.claim_workdir(tiny.stage(), str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0, 1])
def test_a_step_that_hangs_shows_where(tmp_path, mesh, no_arithmetic, capfd, seconds):
    """The second one; the first may compile for long."""
    cfg = tiny.stage(model=tiny.ONE_LEVEL, training={"hang_seconds": seconds})

    def hang(taken):
        if taken <= 2:
            time.sleep(1.3)

    train(cfg, tmp_path, mesh, hang)
    shown = capfd.readouterr().err.count("in hang\n")
    assert shown == seconds


def test_an_unknown_metric_is_refused(tmp_path, mesh):
    cfg = tiny.stage(training={"best_metric": "los"})
    with pytest.raises(UserError, match=r"best_metric is 'los'.*did you mean 'loss'"):
        loop.train(cfg, str(tmp_path / "run"), tiny.Batches(cfg, mesh), mesh)
    assert not (tmp_path / "run").exists()


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="not empty and holds no config.json"):
        loop.claim_workdir(tiny.stage(), str(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_sampling_an_untrained_workdir_is_refused(tmp_path):
    loop.claim_workdir(tiny.stage(), str(tmp_path))
    with pytest.raises(UserError, match="train this stage first"):
        open_weights(str(tmp_path))


def test_a_batch_that_does_not_divide_is_refused(tmp_path):
    cfg = tiny.stage(training={"batch_size": 12})
    mesh = make_mesh(MeshConfig())
    with pytest.raises(UserError, match="does not divide over 8 shards.*example 8"):
        loop.train(cfg, str(tmp_path / "run"), tiny.Batches(cfg, mesh), mesh)
    assert not (tmp_path / "run").exists()
