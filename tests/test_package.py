"""What is installed, and works outside of a clone."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags
from ml_collections import config_flags

import imagen_jax
from imagen_jax import cli

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("tiny:sr", 32),
        ("tiny.py:sr", 5),
        ("./tiny.py:sr", 5),
        ("configs/tiny.py:sr", 5),
    ],
)
def test_a_config_is_found_by_its_name_anywhere(name, side, tmp_path, monkeypatch):
    """A file is one that is given by a path; `tiny` alone is the package's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    for path in ("tiny", "tiny.py", "configs/tiny.py"):
        (tmp_path / path).write_text(
            "import ml_collections\ndef get_config(variant):\n"
            "    return ml_collections.ConfigDict({'image_size': 5})"
        )
    argv = ["door", f"--config={name}"]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(flags, "FLAGS", flags.FlagValues())
    config_flags.DEFINE_config_file("config", None, "x", flag_values=flags.FLAGS)
    found = []
    with pytest.raises(SystemExit) as left:
        cli.run(lambda: found.append(cli.config_values()), argv)
    assert left.value.code == 0
    assert found[0]["image_size"] == side


def test_the_version_is_told(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["imagen-jax", "--version"])
    cli.main()
    assert capsys.readouterr().out == f"imagen-jax {imagen_jax.__version__}\n"


def test_the_package_holds_all_its_files(tmp_path):
    """What a wheel is made of, beside what git tracks."""
    pytest.importorskip("setuptools")
    arguments = [
        "egg_info",
        "--egg-base",
        tmp_path,
        "build_py",
        "--build-lib",
        tmp_path,
    ]
    command = [sys.executable, "setup.py", "--quiet", *map(str, arguments)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    listed = ["git", "ls-files", "imagen_jax", "configs"]
    tracked = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True).stdout
    want = {re.sub("^configs/", "imagen_jax/configs/", f) for f in tracked.split()}
    built = (tmp_path / "imagen_jax").rglob("*.*")
    found = {path.relative_to(tmp_path).as_posix() for path in built}
    assert found == want - {"imagen_jax/configs"}
