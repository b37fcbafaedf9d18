"""Pictures written as they are made: killed, continued, refused, made again alone."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from imagen_jax import images
from imagen_jax.api import loaded, samples
from imagen_jax.api.cascade import all_cells, load, settings, with_sampler
from imagen_jax.api.library import Cascade
from imagen_jax.api.samples import Job, make
from imagen_jax.data import memory
from imagen_jax.diffusion.cascade import sample_cascade
from imagen_jax.errors import UserError
from imagen_jax.prepare import prepare
from tests import tiny

PROMPTS = ["a red circle", "two blue squares", "красный круг"]
STAGES = tiny.untrained()
BASE, SR = (one.cfg for one in STAGES)


def job(folder, **changes):
    asked = {"trained": STAGES, "prompts": PROMPTS, "seed": 5, "num_images": 2}
    return Job(str(folder), **(asked | changes))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def lines(folder):
    text = (folder / "samples.jsonl").read_text()
    assert not text or text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cascade):
    """Six pictures in batches of two."""
    folder = tmp_path_factory.mktemp("samples") / "whole"
    make(job(folder), cascade)
    return folder


def test_every_picture_has_its_file_and_its_line(whole):
    found = lines(whole)
    assert [line["prompt"] for line in found] == [p for p in PROMPTS for _ in "ab"]
    assert [line["seed"] for line in found] == list(range(5, 11))
    names = {line["file"] for line in found}
    names |= {name for line in found for name in line["earlier_stages"]}
    assert names == {f"{i:04d}{size}.png" for i in range(6) for size in ("", "_8px")}
    assert set(contents(whole)) == names | {"job.json", "samples.jsonl", "grid.png"}


def test_they_are_those_that_python_gets(whole, cascade):
    rows = [prompt for prompt in PROMPTS for _ in "ab"]
    made = cascade.sample(rows, seed=5, return_stages=True)
    for stage, of_stage in enumerate(made.stages):
        for number, picture in enumerate(of_stage):
            path = job(whole).path(number, stage)
            np.testing.assert_array_equal(images.read(path), picture)


@pytest.mark.parametrize("number", [0, 3])
def test_a_picture_can_be_made_again_alone(whole, tmp_path, cascade, number):
    """By the program of one row: to a level."""
    line = lines(whole)[number]
    alone = {"prompts": [line["prompt"]], "seed": line["seed"], "num_images": 1}
    # Fewer pictures than an eighth of a batch are made one by one.
    one_by_one = with_batches(9)
    make(job(tmp_path / "one", **alone, trained=one_by_one), cascade)
    again = images.read(tmp_path / "one" / "0000.png")
    first = images.read(whole / line["file"])
    assert np.abs(again.astype(int) - first).max() <= 1


def with_batches(size):
    return with_sampler(STAGES, batch_size=[size])


# Of the six of each stage: before the first, in the first stage, between the stages,
# within and after a batch of the second, and after the last.
@pytest.mark.parametrize("kills", [[0], [3], [6], [9, 1], [10], [2, 2, 2, 2], [12]])
def test_a_killed_job_goes_on(whole, tmp_path, cascade, monkeypatch, kills):
    """Byte for byte, and no picture is made twice; whole lines after every kill."""
    folder, save, saved = tmp_path / "killed", images.save, []

    def saves(path, picture, about=None, *, left):
        if not left[0]:
            path.write_bytes(b"half of a picture")
            raise KeyboardInterrupt
        left[0] -= 1
        saved.append(path.name.partition(".png")[0])
        save(path, picture, about)

    for kill in kills:
        left = [kill]
        monkeypatch.setattr(images, "save", lambda *a, left=left: saves(*a, left=left))
        with pytest.raises(KeyboardInterrupt):
            make(job(folder), cascade)
        assert all((folder / line["file"]).exists() for line in lines(folder))
        # What a process leaves that cannot even clean up.
        (folder / "0005.png.0.tmp").touch()
    left = [-1]
    monkeypatch.setattr(images, "save", lambda *a: saves(*a, left=left))
    make(job(folder), cascade)
    assert contents(folder) == contents(whole)
    pictures = [name for name in saved if name != "grid"]
    assert len(pictures) == len(set(pictures)) == 12


def test_another_batch_size_goes_on(whole, tmp_path, cascade):
    make(job(tmp_path / "x"), cascade)
    for number in (1, 4, 5):
        (tmp_path / "x" / f"{number:04d}.png").unlink()
    (tmp_path / "x" / "samples.jsonl").write_text('{"half')
    make(job(tmp_path / "x", trained=with_batches(3)), cascade)
    assert lines(tmp_path / "x") == lines(whole)
    for number in range(6):
        name = f"{number:04d}.png"
        made, first = images.read(tmp_path / "x" / name), images.read(whole / name)
        assert np.abs(made.astype(int) - first).max() <= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 6}, "(seed is 5 there, 6 here)"),
        ({"num_images": 1}, "(num_images is 2 there, 1 here)"),
        ({"prompts": PROMPTS[:2]}, "(prompts[2] is 'красный круг' there, none here)"),
        ({"prompts": [*PROMPTS, "d"]}, "(prompts[3] is none there, 'd' here)"),
        (
            {"trained": with_sampler(STAGES, steps=[2, 4])},
            "(stages[1].config.sampler.steps is 2 there, 4 here)",
        ),
        (
            {"trained": [STAGES[0], dataclasses.replace(STAGES[1], step=4)]},
            "(stages[1].checkpoint_step is 3 there, 4 here)",
        ),
        (
            {"cells": all_cells([BASE, SR], [(2.0,)])},
            "(values[0].guidance[0] is 1.0 there, 2.0 here; values[0].guidance[1] is",
        ),
        ({"recorded_steps": (0,)}, "(estimates[0] is none there, 0 here)"),
        ({"seed": 1, "prompts": ["a"] * 3}, "'a' here; prompts[1] is "),
    ],
)
def test_a_folder_of_another_job_is_refused(whole, cascade, changes, message):
    before = contents(whole)
    with pytest.raises(UserError) as error:
        make(job(whole, **changes), cascade)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert "give another folder, or remove it" in str(error.value)
    assert contents(whole) == before


def test_a_finished_job_loads_nothing(whole, mesh, monkeypatch):
    before = contents(whole)
    monkeypatch.setattr(loaded, "load", None)
    monkeypatch.setattr(loaded, "load_encoder", None)
    make(job(whole), Cascade(STAGES, mesh=mesh))
    assert contents(whole) == before


def test_files_of_something_else_and_another_process(whole, tmp_path, cascade):
    (tmp_path / "0000.png").write_text("a picture of mine")
    with pytest.raises(UserError, match="holds files, and no job.json of `sample`"):
        make(job(tmp_path), cascade)
    assert (tmp_path / "0000.png").read_text() == "a picture of mine"
    with samples._entered(job(whole)), pytest.raises(UserError, match="another proce"):
        make(job(whole), cascade)
    make(job(whole), cascade)


def test_a_damaged_picture_of_an_earlier_stage_is_named(tmp_path, cascade):
    make(job(tmp_path / "x"), cascade)
    (tmp_path / "x" / "0001.png").unlink()
    (tmp_path / "x" / "0001_8px.png").write_bytes(b"damage")
    with pytest.raises(UserError, match="0001_8px.png' cannot be read.*remove it"):
        make(job(tmp_path / "x"), cascade)


def test_sweeps_have_sheets_and_start_from_given_pictures(tmp_path, mesh, monkeypatch):
    """Each prompt from its own picture, in every cell; titles name prompt and seed."""
    titles, captions, grid = [], [], images.grid

    def tell(pictures, columns, texts=(), title=""):
        titles.append(title)
        captions.append(list(texts))
        return grid(pictures, columns, texts, title=title)

    monkeypatch.setattr(images, "grid", tell)
    grey = {name: np.full((8, 8, 3), 100 * i, np.uint8) for i, name in enumerate("ab")}
    cells = all_cells([SR], [(1.0, 3.0)], [(0.1, 0.9)])
    asked = {"prompts": PROMPTS[:2], "cells": cells, "num_images": 1}
    asked |= {"lowres": list(grey.items()), "trained": STAGES[1:]}
    enlarging = Cascade(STAGES[1:], mesh=mesh)
    make(job(tmp_path / "x", **asked, recorded_steps=(0, 1)), enlarging)
    found = lines(tmp_path / "x")
    assert [line["lowres"] for line in found] == ["a"] * 4 + ["b"] * 4
    assert [line["seed"] for line in found] == [5] * 4 + [6] * 4
    want = [([w], [level]) for level in (0.1, 0.9) for w in (1.0, 3.0)] * 2
    assert [(line["guidance"], line["aug_level"]) for line in found] == want
    lowres = np.stack([grey[name] for name in "aaaabbbb"])
    prompts = [PROMPTS[0]] * 4 + [PROMPTS[1]] * 4
    own = settings([cell.configs[0] for cell in cells] * 2)
    (made,), (estimates,) = sample_cascade(
        [load(STAGES[1], mesh)],
        *enlarging.encode(prompts),
        np.repeat([5, 6], 4),
        mesh,
        lowres,
        [own],
        (0, 1),
    )
    for number, picture in enumerate(made):
        np.testing.assert_array_equal(
            images.read(tmp_path / "x" / f"{number:04d}.png"), picture
        )
    named = {name for name in contents(tmp_path / "x") if "_" in name}
    want = {f"sheet_{i:04d}.png" for i in range(2)}
    assert named == want | {f"{i:04d}_estimates_16px.png" for i in range(8)}
    shown = images.read(tmp_path / "x" / "0003_estimates_16px.png")
    big = images.enlarge(estimates[3], 96)
    np.testing.assert_array_equal(shown[-96 - 19 : -19, 4:100], big[0])
    assert titles[-3:] == ["a red circle, seed 5", "two blue squares, seed 6", ""]
    assert captions[-3] == [
        "w 1, aug 0.1",
        "w 3, aug 0.1",
        "w 1, aug 0.9",
        "w 3, aug 0.9",
    ]
    assert captions[-1][5] == "two blue squares, seed 6, w 3, aug 0.1"
    assert titles[3] == "a red circle, seed 5, w 3, aug 0.9"


def test_tar_files_are_those_that_prepare_reads(whole, tmp_path, cascade):
    """All pictures, once and in order, with their captions; packed again the same."""
    folder, records = tmp_path / "x", tmp_path / "records.npz"
    shutil.copytree(whole, folder)
    make(job(folder, tar_images=2), cascade)
    make(job(folder, tar_images=4), cascade)
    packed = contents(folder)
    tars = sorted(name for name in packed if name.endswith(".tar"))
    assert tars == ["samples-00000.tar", "samples-00001.tar"]
    make(job(folder, tar_images=4), cascade)
    assert contents(folder) == packed
    source = f"webdataset:{folder}/samples-*.tar"
    manifest = prepare(source, str(records), text_length=4, image_size=16)
    found = memory.read(str(records), manifest)
    np.testing.assert_array_equal(found["image"], job(whole).read())
    captions = memory.read_captions(str(records), manifest.examples)
    assert [c.decode() for c in captions] == [p for p in PROMPTS for _ in "ab"]


def test_many_pictures_have_several_grids(tmp_path, cascade, monkeypatch):
    monkeypatch.setattr(samples, "_GRID", 4)
    make(job(tmp_path / "x"), cascade)
    grids = sorted(path.name for path in (tmp_path / "x").glob("grid*"))
    assert grids == ["grid.png", "grid_0004.png"]
