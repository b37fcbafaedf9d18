"""docs/extending.md as one program: what it says works, and in few lines."""

import itertools

import jax
import numpy as np
import pytest

from imagen_jax.api.run import train
from imagen_jax.config import MeshConfig
from imagen_jax.data.pipeline import open_batches
from imagen_jax.diffusion import sampler
from imagen_jax.errors import UserError
from imagen_jax.models import network
from imagen_jax.sharding import make_mesh
from tests.test_docs import TEXTS, blocks

PROGRAM = blocks(TEXTS["docs/extending.md"])


def test_each_part_takes_less_than_thirty_lines():
    assert len(PROGRAM) == 4
    assert all(len(block.splitlines()) < 30 for block in PROGRAM)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The names that the program leaves."""
    folder, names = tmp_path_factory.mktemp("extending"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for block in PROGRAM:
            # The config's package is a link of the wheel; here it lies beside.
            exec(block.replace("imagen_jax.configs", "configs"), names)
    yield names
    del network.ARCHITECTURES["own:small"], sampler.STEPS["own:renewing"]


@pytest.mark.slow
def test_own_batches_network_and_step(ran):
    names = ran
    assert [p.size for p in names["pictures"]] == [(8, 8), (8, 8)]
    (cfg,) = names["cascade"].config
    assert cfg.model.architecture == "own:small"
    plain, renewed = (
        names["cascade"].sample("a", sampler=name).images
        for name in ("ddim", "own:renewing")
    )
    assert (plain != renewed).any()
    shapes = names["cascade"].trained[0].shapes
    assert shapes["Conv_1.kernel"] == (3, 3, 16, 3)


@pytest.mark.slow
def test_an_iterator_is_as_good_and_a_resumed_run_goes_on_in_it(ran, tmp_path):
    """Two steps and two more make the parameters of four at a time, to the bit."""
    names = ran
    own = {"optimizer.decay_steps": -1}
    for steps in (2, 4):
        stepped = train(
            names["cfg"],
            names["batches"](0),
            tmp_path / "two",
            own | {"training.steps": steps, "training.preview_images": 2},
        )
    whole = train(names["cfg"], names["batches"], tmp_path / "whole", own)
    jax.tree.map(np.testing.assert_array_equal, stepped.params, whole.params)


def test_batches_that_end(ran):
    """Not before the last one is trained on."""
    names = ran
    batches = itertools.islice(names["batches"](0), 3)
    stream = open_batches(batches, make_mesh(MeshConfig(), jax.devices()[:1]))
    assert stream.first(2).caption.tolist() == [b"", b""]  # takes nothing
    start = stream.get_state()
    assert [int(next(stream).id[0]) for _ in range(2)] == [0, 8]
    position = stream.get_state()
    stream.set_state(start)
    with pytest.raises(UserError, match="go back only if a function has them"):
        next(stream)
    stream.set_state(position)
    assert int(next(stream).id[0]) == 16
    with pytest.raises(UserError, match="there are only 3 batches"):
        next(stream)


@pytest.mark.parametrize("at_once", [True, False])
def test_a_file_that_own_batches_lack_is_told(ran, tmp_path, at_once):
    """It is not the workdir's fault."""

    def lacking(start):
        open(tmp_path / "cat.png", "rb")
        yield from ()

    source = (lambda start: [*lacking(start)]) if at_once else lacking
    with pytest.raises(UserError, match=r"a batch cannot be read: .*cat\.png"):
        train(ran["cfg"], source, tmp_path / "run", {"training.preview_images": 2})


def test_names_that_nobody_has_given(ran, tmp_path):
    names = ran
    with pytest.raises(UserError, match="'own:x' is not in models.network.ARCHIT"):
        train(names["cfg"], iter(()), tmp_path, {"model.architecture": "own:x"})
    assert not any(tmp_path.iterdir())
    with pytest.raises(UserError, match="'own:x' is not in diffusion.sampler.STEPS"):
        names["cascade"].sample("a", sampler="own:x")
    with pytest.raises(UserError, match=r"config.trainng does not exist .did you mean"):
        train(names["cfg"], iter(()), tmp_path, {"trainng.steps": 3})
    with pytest.raises(UserError, match="the config cannot be used: there is no file"):
        train("nowhere.py:base", "records", tmp_path)
