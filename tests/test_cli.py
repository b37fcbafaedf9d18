"""What all doors share: exit statuses, messages, help, the caches."""

import subprocess
import sys

import jax
import numpy as np
import pytest
from absl import flags

from imagen_jax import cli
from imagen_jax.errors import Stopped, UserError


@pytest.fixture(autouse=True)
def _flags(monkeypatch):
    monkeypatch.setattr(flags, "FLAGS", flags.FlagValues())
    flags.DEFINE_integer("number", None, "x", flag_values=flags.FLAGS)
    flags.mark_flag_as_required("number", flag_values=flags.FLAGS)


def _status(main, *argv):
    with pytest.raises(SystemExit) as error:
        cli.run(main, ["door", *argv])
    return error.value.code


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--numbr=3"], "Unknown command line flag 'numbr'. Did you mean: number"),
        (["--number=x"], "flag --number=x"),
        ([], "--number must have a value"),
        (["--number=3", "rest"], "'rest' is no flag"),
    ],
)
def test_usage(argv, message, capsys):
    assert _status(lambda: None, *argv) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("raised", "status", "message"),
    [
        (UserError("it is wrong"), 1, "it is wrong"),
        (Stopped("saved"), 3, "saved"),
        (KeyboardInterrupt(), 3, "interrupted"),
    ],
)
def test_statuses(raised, status, message, capsys):
    def main():
        raise raised

    assert _status(lambda: None, "--number=3") == 0
    assert _status(main, "--help") == 0
    assert "usage" not in capsys.readouterr().err
    assert _status(main, "--number=3") == status
    assert capsys.readouterr().err == f"error: {message}\n"


def test_programs_are_cached_where_the_environment_says(monkeypatch, tmp_path):
    was = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        # JAX has read JAX_COMPILATION_CACHE_DIR, which wins.
        jax.config.update("jax_compilation_cache_dir", "elsewhere")
        _status(lambda: None, "--number=3")
        assert jax.config.jax_compilation_cache_dir == "elsewhere"
        jax.config.update("jax_compilation_cache_dir", None)
        _status(lambda: None, "--number=3", "--compilation_cache=False")
        assert jax.config.jax_compilation_cache_dir is None
        assert not jax.config.jax_enable_compilation_cache
        _status(lambda: None, "--number=3", "--compilation_cache=True")
        wanted = str(tmp_path / "imagen-jax" / "jax")
        assert jax.config.jax_compilation_cache_dir == wanted
        assert jax.config.jax_enable_compilation_cache
    finally:
        jax.config.update("jax_compilation_cache_dir", was)


def test_memory_is_what_was_held():
    """By this process: what its parent holds does not count."""
    parents = np.ones(2**29, np.uint8)
    code = (
        "import numpy as np\n"
        "from imagen_jax import cli\n"
        "print(cli.peak_memory_gib())\n"
        "held = np.ones(2**28, np.uint8)\n"
        "print(cli.peak_memory_gib())\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    before, after = map(float, done.stdout.split())
    # An interpreter with numpy.
    assert parents.all() and 0.01 < before < 0.3
    assert after - before == pytest.approx(0.25, abs=0.05)


def test_the_console_script_runs_doors(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["imagen-jax"])
    cli.main()
    assert "prepare|train|sample" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["imagen-jax", "trian", "--config=x.py"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2
    assert "did you mean 'train'" in capsys.readouterr().err
    code = "from imagen_jax.cli import main; main()"
    command = [sys.executable, "-c", code, "sample", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True)
    assert shown.returncode == 0 and "--guidance" in shown.stdout
    assert shown.stdout.startswith("Samples a trained cascade.")
    assert "--[no]compilation_cache" in shown.stdout
