"""What all doors share: exit statuses, messages, help, the caches."""

import dataclasses
import errno
import itertools
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags

from imagen_jax import cli
from imagen_jax.config import StageConfig
from imagen_jax.errors import Stopped, UserError, printable


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


CONFIG = """
import ml_collections

def get_config():
    config = ml_collections.ConfigDict()
    config.a = ml_collections.ConfigDict({"number": 1, "word": "x", "on": False})
    config.a.pair = (1, 2)
    return config
"""


@pytest.mark.parametrize(
    ("argv", "times"),
    [
        (["--number=3", "--number=3"], "--number is given 2 times"),
        (["--number", "3", "-number=4", "--number=5"], "--number is given 3 times"),
        (["--compilation_cache", "--nocompilation_cache"], "--compilation_cache is"),
        (
            ["--config.a.number=1", "--config.a.number=2"],
            "--config.a.number is given 2",
        ),
        (["--config.a.word", "x", "--config.a.word=y"], "--config.a.word is given 2"),
        (["--config.a.on", "--noconfig.a.on"], "--config.a.on is given 2"),
        (["--config.a.pair=(1, 2)", "--config.a.pair=3"], "--config.a.pair is given 2"),
        (["--words=a", "--words=--number=4", "--config.a.pair=(1, 2, 3)"], ""),
        (["--words=--config.a.pair=3", "--config.a.pair=(1, 2)"], ""),
    ],
)
def test_flags_of_one_value_are_given_once(argv, times, tmp_path, monkeypatch, capsys):
    (tmp_path / "c.py").write_text(CONFIG)
    argv = [f"--config={tmp_path}/c.py", *argv]
    argv += [] if argv[1].startswith("--number") else ["--number=3"]
    monkeypatch.setattr(sys, "argv", ["door", *argv])
    config_flags.DEFINE_config_file("config", None, "x", flag_values=flags.FLAGS)
    flags.DEFINE_multi_string("words", [], "x", flag_values=flags.FLAGS)
    done = []
    status = _status(lambda: done.append(flags.FLAGS.words), *argv)
    error = capsys.readouterr().err
    assert times in error and error.count("\n") == bool(times), error
    assert (status, bool(done)) == ((2, False) if times else (0, True))


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
    head = "" if isinstance(raised, Stopped) else "error: "
    assert capsys.readouterr().err == f"{head}{message}\n"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain 'name'.png", None),
        ('zwölf 狐 🦊 \\ "', None),
        ("\x1b]0;title\x07\x1b[31m", r"\x1b]0;title\x07\x1b[31m"),
        ("a\nerror: b\r\t\0\b\x7f", r"a\nerror: b\r\t\x00\x08\x7f"),
        ("\x85\x9b31m", r"\x85\x9b31m"),
        ("\u2028\u202e\u200b\ufeff", r"\u2028\u202e\u200b\ufeff"),
        ("\udcff\udc80", r"\udcff\udc80"),
        (7, "7"),
    ],
)
def test_what_a_terminal_is_shown(text, shown, capsys):
    def main():
        raise UserError(str(text))

    shown = shown or text
    assert printable(text) == shown
    assert _status(main, "--number=3") == 1
    assert capsys.readouterr().err == f"error: {shown}\n"
    assert cli.table({str(text): {str(text): str(text)}}).count(shown) == 3
    assert not set(cli.table({str(text): str(text)})) & set("\x1b\x07\n")


FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EFBIG, "File too large", "a\x07"),
    ValueError("RESOURCE_EXHAUSTED: Failed writing: No space left on device [os_err"),
]


@pytest.mark.parametrize("error", FULL)
def test_a_full_disk_is_one_line(error, capsys):
    def main():
        raise error

    assert _status(main, "--number=3") == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: a disk is full, make room")
    assert "\x07" not in lines[0]


THREADS = """
import asyncio, gc, logging, sys, threading
from absl import flags, logging as absl_logging
from imagen_jax import cli
from imagen_jax.errors import UserError

full, other = OSError(28, "No space left on device"), OSError(5, "broken")

def dies(error):
    raise error

class Dies:
    def __del__(self):
        raise RuntimeError("Event loop is closed")

async def forgets(error):
    asyncio.ensure_future(asyncio.to_thread(dies, error))
    await asyncio.sleep(0.2)

def main():
    for error in (full, other):
        thread = threading.Thread(target=dies, args=(error,))
        thread.start()
        thread.join()
        try:
            dies(error)
        except OSError:
            absl_logging.exception("by absl")
        asyncio.run(forgets(error))
        gc.collect()
    Dies()
    raise UserError("make room")

cli.run(main, ["door"])
"""


@pytest.mark.slow
def test_no_thread_tells_of_a_full_disk():
    """But of all other errors."""
    done = subprocess.run(
        [sys.executable, "-c", THREADS], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.endswith("error: make room\n")
    assert "No space left" not in done.stderr and "loop is closed" not in done.stderr
    assert done.stderr.count("OSError: [Errno 5] broken") == 3, done.stderr


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


@pytest.mark.slow
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


@pytest.mark.slow
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


FILES = {
    "stage": "from imagen_jax.config import StageConfig as get_config",
    "dict": "def get_config(): return {'a': 1}",
    "none": "def get_config(): pass",
    "raises": "def get_config():\n    raise RuntimeError('out\\nof luck')",
    "value": "def get_config():\n    raise ValueError('write :base\\nor :sr')",
    "top": "x = 1 / 0",
    "key": "import ml_collections\ndef get_config():\n"
    "    return ml_collections.ConfigDict({'a': 1}).b",
    "opens": "def get_config(): open('nowhere')",
    "syntax": "\ndef get_config(:\n    pass",
    "imports": "import nosuchmodule",
    "empty": "",
    "argument": "def get_config(variant): pass",
    "good": "import ml_collections\ndef get_config():\n"
    "    return ml_collections.ConfigDict({'a': {'pair': (1, 2), 'name': 'x'}})",
}


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("stage", "", "returns a StageConfig, not an ml_collections.ConfigDict"),
        ("stage", "--config.image_size=32", "returns a StageConfig, not an"),
        ("dict", "--config.a=2", "returns a dict"),
        ("none", "", "returns a NoneType"),
        ("raises", "", "RuntimeError: out of luck (line 2)"),
        ("value", "", "write :base or :sr"),
        ("top", "", "ZeroDivisionError: division by zero (line 1)"),
        ("key", "", "(line 3)"),
        ("opens", "", "FileNotFoundError: [Errno 2] No such file or directory: 'nowh"),
        ("syntax", "", "SyntaxError: invalid syntax (syntax.py, line 2)"),
        ("imports", "", "ModuleNotFoundError: No module named 'nosuchmodule' (line 1)"),
        ("empty", "", "defines no get_config()"),
        ("argument", "", "missing 1 required positional argument: 'variant'"),
        ("nope", "", "there is no file"),
        ("good", "--config.a.pair[0]=32", "a.pair[0]): write --config.GROUP.FIELD="),
        ("good", "--config.a.pair.0=3", "--config.GROUP.FIELD=VALUE, of tuples"),
        ("good", "--config.a.name.x=3", "--config.GROUP.FIELD=VALUE"),
        ("good", "--config.a.nam=3", "name"),
        ("good", "--config.a=3", "not a dict"),
        ("good", "--config.a.pair=(5, 6)", ""),
    ],
)
def test_a_config_that_is_none_is_one_line(
    name, override, message, tmp_path, monkeypatch, capfd
):
    for stem, text in FILES.items():
        (tmp_path / f"{stem}.py").write_text(text)
    argv = ["--number=3", f"--config={tmp_path / name}.py", *filter(None, [override])]
    monkeypatch.setattr(sys, "argv", ["door", *argv])
    config_flags.DEFINE_config_file("config", None, "x", flag_values=flags.FLAGS)
    found = []
    status = _status(lambda: found.append(cli.config_values()), *argv)
    told = capfd.readouterr().err
    assert message in told and told.count("\n") == bool(message), told
    assert status == 2 * bool(message)
    assert found == ([] if message else [{"a": {"pair": (5, 6), "name": "x"}}])


def test_a_folder_is_no_config(tmp_path, monkeypatch, capfd):
    argv = ["--number=3", f"--config={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["door", *argv])
    config_flags.DEFINE_config_file("config", None, "x", flag_values=flags.FLAGS)
    assert _status(lambda: None, *argv) == 2
    assert "there is no file" in capfd.readouterr().err


NOISE = """
import warnings
from imagen_jax import cli
from absl import logging

def main():
    for module in ("jax._src.cloud_tpu_init", "jax._src.other"):
        warnings.warn_explicit(f"by {module}", UserWarning, "x.py", 1, module=module)
    logging.warning("Given directory is read only=%s", "runs/base/checkpoints")
    logging.warning("a disk is slow")

cli.run(main, ["door"])
"""


@pytest.mark.slow
@pytest.mark.parametrize(("platforms", "count"), [("cpu", 1), ("tpu,cpu", 2)])
def test_what_a_user_can_do_nothing_about_is_not_told(platforms, count):
    """What is not known to be of no use stays."""
    done = subprocess.run(
        [sys.executable, "-c", NOISE],
        env=os.environ | {"JAX_PLATFORMS": platforms},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "read only" not in done.stderr and "a disk is slow" in done.stderr
    assert done.stderr.count("UserWarning: by jax._src") == count
    assert ("cloud_tpu_init" in done.stderr) == (count == 2)


def test_a_table_is_of_one_width():
    report = {"a": 1, "b": {"c": 1234567, "d" * 33: 0.5}, "none": None, "empty": {}}
    lines = cli.table(report).splitlines()
    assert [line.split() for line in lines] == [
        ["a", "1"],
        ["b"],
        ["c", "1,234,567"],
        ["d" * 33, "0.5"],
        ["none", "-"],
        ["empty", "-"],
    ]
    starts = {line.rindex(" ") for line in lines if line != "b"}
    assert starts == {36}


def test_help_lists_every_field_with_its_meaning():
    text = cli.describe()
    paths = [line.split()[0] for line in text.splitlines() if "--config." in line]
    fields = [
        f"--config.{group.name}.{field.name}={field.default!r}"
        for group in dataclasses.fields(StageConfig)
        if dataclasses.is_dataclass(group.type)
        for field in dataclasses.fields(group.type)
    ]
    shown = "\n".join(paths)
    assert all(field.split()[0] in shown for field in fields)
    assert "--config.image_size=64 [1, 65536]\n      side of the images" in text
    assert "architecture='unet' (unet | efficient_unet)\n      The U-Net of" in text
    # All have one.
    heads = [line.startswith("  --config.") for line in text.splitlines()]
    assert not any(one and other for one, other in itertools.pairwise(heads))
