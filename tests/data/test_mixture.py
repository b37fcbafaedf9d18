import json
import shutil

import pytest

from imagen_jax.data.pipeline import open_sources, read_sources
from imagen_jax.errors import UserError


@pytest.fixture
def change(even, tmp_path):
    """A copy of a folder with other values in its manifest."""

    def make(**values):
        other = tmp_path / "other"
        shutil.copytree(even, other)
        old = json.loads((other / "manifest.json").read_text())
        (other / "manifest.json").write_text(json.dumps(old | values))
        return str(other)

    return make


def test_sources_have_weights(records, even):
    sources = read_sources(f"{records}:3, {even}:0.5")
    found = [(s.path, s.weight, s.manifest.examples) for s in sources]
    assert found == [(records, 3.0, 21), (even, 0.5, 24)]


@pytest.mark.parametrize("weights", [("", ":1"), (":3", ":0"), (":3", ":much")])
def test_weights_that_are_none(records, even, weights):
    given = f"{records}{weights[0]},{even}{weights[1]}"
    if "much" in given:
        match = "there is no '.*:much'"
    else:
        match = f"a weight above zero.*{records}:21,{even}:24'"
    with pytest.raises(UserError, match=match):
        read_sources(given)


def test_a_npz_file_is_not_mixed(records, npz):
    with pytest.raises(UserError, match="out.npz' is a file: only folders"):
        read_sources(f"{records}:1,{npz}:1")


@pytest.mark.parametrize(
    "values", [{"encoder": "t5@1"}, {"text_dim": 32}, {"settings": {"text_length": 9}}]
)
def test_text_of_two_kinds(records, change, values):
    other = change(**values)
    with pytest.raises(UserError, match=f"'{records}:1,{other}:1' cannot be mixed"):
        read_sources(f"{records}:1,{other}:1")


def test_a_length_that_is_not_known_is_the_configs(records, change, unresolved):
    """As that of a data set of others; one that is mixed with it may know."""
    other = change(settings={})
    with pytest.raises(UserError, match="does not say how many tokens .*text.length"):
        open_sources(unresolved(other))
    cfg, _ = open_sources(unresolved(other, text={"length": 5, "dim": 0}))
    assert cfg.text.length == 5
    cfg, _ = open_sources(unresolved(f"{other}:1,{records}:1"))
    assert cfg.text.length == 8


def test_a_folder_that_is_not_there(records, tmp_path):
    with pytest.raises(UserError, match="there is no '.*/none'"):
        read_sources(f"{records}:1,{tmp_path}/none:1")


def test_a_comma_in_the_name_of_a_folder(even, tmp_path):
    path = str(tmp_path / "a:1,b:2")
    shutil.copytree(even, path)
    assert [source.path for source in read_sources(path)] == [path]
