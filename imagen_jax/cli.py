"""What all doors share: flags in, one clear line and an exit status out."""

import functools
import json
import logging
import os
import pathlib
import re
import resource
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from absl import flags

from imagen_jax.errors import Stopped, UserError, did_you_mean, is_full, printable
from imagen_jax.fields import describe

# What libraries tell of what is as it should be, or is told by us.
_NO_NEWS = ("Given directory is read only", "did you forget a return statement?")
DOORS = ("prepare", "train", "sample", "evaluate", "export", "goodput", "plan")
DOORS += ("benchmark", "demo")


def main() -> None:
    """Runs `imagen-jax DOOR ...`, the same as `python -m imagen_jax.DOOR ...`."""
    door = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if door in ("--help", "-h"):
        print(f"usage: imagen-jax {'|'.join(DOORS)} --help")
    elif door in DOORS:
        command = [sys.executable, "-m", f"imagen_jax.{door}", *sys.argv[2:]]
        os.execv(sys.executable, command)
    else:
        near = did_you_mean(door, DOORS)
        _exit(2, f"there is no {door!r}{near}; there is: {', '.join(DOORS)}")


def run(main: Callable[[], None], argv: Sequence[str] | None = None) -> NoReturn:
    """Parses the flags of `argv` (default: the command line) and runs `main`.

    Exits with 0 when done, 1 after a `UserError`, 2 for wrong flags, 3 when stopped by
    a signal. A door defines its flags just before, so that others can import it.
    """
    argv = list(sys.argv if argv is None else argv)
    if "compilation_cache" not in flags.FLAGS:
        flags.DEFINE_bool(
            "compilation_cache",
            True,
            "keep compiled programs on disk (JAX_COMPILATION_CACHE_DIR, ~/.cache)",
            flag_values=flags.FLAGS,
            module_name=argv[0],  # for --help
        )
    if {"--help", "-help", "-h", "--helpfull", "-?"} & set(argv[1:]):
        print((sys.modules["__main__"].__doc__ or "").strip(), end="\n\n")
        print(flags.FLAGS.main_module_help())
        if "config" in flags.FLAGS:
            print(f"\nValues of a config, with their defaults:\n\n{describe()}")
        sys.exit(0)
    _quiet_libraries()
    if "config" in flags.FLAGS:
        parser = flags.FLAGS["config"].parser
        parser.parse = functools.partial(_load_config, parser.parse)
    try:
        flags.FLAGS.unparse_flags()  # of an earlier call
        rest = flags.FLAGS(argv)[1:]
    except Exception as error:  # ml_collections raises almost anything.
        _exit(2, f"{_brief(error)} (see --help)")
    if rest:
        more = f" (and {len(rest) - 1} more)" if len(rest) > 1 else ""
        hint = "write --name=value, and quote wildcards and braces (see --help)"
        _exit(2, f"{rest[0]!r} is no flag{more}: {hint}")
    for name, times in _repeated(argv):
        hint = "give it once; quote braces for your shell"
        _exit(2, f"--{name} is given {times} times: {hint}")
    try:
        # These import JAX.
        from imagen_jax.compilation import pass_over_libtpu, use_compilation_cache

        pass_over_libtpu()
        use_compilation_cache(flags.FLAGS.compilation_cache)
        main()
    except UserError as error:
        _exit(1, str(error))
    except Stopped as stopped:
        print(printable(stopped), file=sys.stderr)
        sys.exit(3)
    except KeyboardInterrupt:
        _exit(3, "interrupted")
    except Exception as error:
        if is_full(error):
            _exit(1, f"a disk is full, make room and start again: {error}")
        from imagen_jax.stores import told

        if not (reason := told(error)):
            raise
        _exit(
            1,
            f"a bucket does not do what is asked of it ({reason}): look at the network "
            "and at the rights of this machine there, and start again",
        )
    sys.exit(0)


def config_values() -> dict[str, Any]:
    """The values of --config, overrides included."""
    return flags.FLAGS.config.to_dict()


def check_json(path: str | None, flag: str = "json") -> None:
    """Raises `UserError` unless a file can be written to the `path` of a flag."""
    file = pathlib.Path(path or "")
    if path and (file.is_dir() or not file.absolute().parent.is_dir()):
        raise UserError(f"--{flag}={path}: name a file in a folder that exists")


def write_json(path: str | None, report: Mapping[str, Any]) -> None:
    """Writes `report` to the `path` of --json, if it was given."""
    if path:
        pathlib.Path(path).write_text(json.dumps(report, indent=2) + "\n")


def table(report: Mapping[str, Any], indent: str = "") -> str:
    """The names and values of a report, one a line."""
    lines = []
    for name, value in report.items():
        if isinstance(value, Mapping) and value:
            lines += [indent + printable(name), table(value, indent + "  ")]
        else:
            form = {float: ",.4g", int: ","}.get(type(value), "")
            shown = "-" if value is None or value == {} else format(value, form)
            lines.append(printable(f"{indent + name:36} {shown}"))
    return "\n".join(lines)


def peak_memory_gib() -> float:
    """The most memory that this process has held, in GiB."""
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        # getrusage would count what the process held that started this one.
        return int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1]) / 2**20
    # macOS, which counts bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30


def _repeated(argv: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Flags of one value that are given again, and how often: the last would win."""
    for name in flags.FLAGS:
        flag = flags.FLAGS[name]
        times = flag.present
        if isinstance(flag, flags.MultiFlag):
            # Of a tuple in a config `present` counts numbers; others may be repeated.
            given = [word for word in argv if word.lstrip("-").split("=")[0] == name]
            times = len(given) if "." in name else 0
        if times > 1:
            yield name, times


def _load_config(parse: Callable[[str], Any], path: str) -> Any:
    """What the file of --config makes, or a `ValueError` of one line."""
    from ml_collections import ConfigDict

    name = path.partition(":")[0]
    if not os.path.isfile(name):
        raise ValueError(f"there is no file {name!r}; give FILE.py or FILE.py:VARIANT")
    try:
        config = parse(path)
        # An OSError is kept for whoever asks for a value.
        error = vars(config).get("_error") if hasattr(config, "__dict__") else None
    except Exception as raised:
        # Some are raised anew, with a traceback for text.
        again = str(raised).startswith("Error whilst parsing")
        error = raised.__context__ if again else raised
    if error is None and isinstance(config, ConfigDict):
        return config
    if error is None:
        raise ValueError(
            f"get_config() returns a {type(config).__name__}, not an "
            "ml_collections.ConfigDict; begin with configs/common.py's"
        )
    text = " ".join(f"{type(error).__name__}: {error}".split())
    own = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == name]
    if isinstance(error, ValueError):  # names no line: it is for the user
        raise ValueError(" ".join(str(error).split())) from None
    raise ValueError(f"{text} (line {own[-1].lineno})" if own else text) from None


def _brief(error: Exception) -> str:
    """What ml_collections and absl say of a wrong flag, without a traceback."""
    if isinstance(error, AttributeError | KeyError):  # a key that a config has not
        inner = error.args[0]
        text = inner.args[0] if isinstance(inner, KeyError) else inner
        return f"--config has no such key: {text}".replace("\n", ". ")
    text = " ".join(str(error).split())
    if isinstance(error, flags.Error):
        return text
    return f"--config: {text}: write --config.GROUP.FIELD=VALUE, of tuples the whole"


def _quiet_libraries() -> None:
    """Silences what libraries say that is no news to a user.

    These are `_NO_NEWS` and, as our own line tells of a full disk, what each thread of
    Orbax and TensorStore says of it.
    """

    def is_known(error: BaseException | None) -> bool:
        # The second one follows: writes that end when Orbax has given up.
        return bool(error) and (is_full(error) or str(error) == "Event loop is closed")

    def is_news(record: logging.LogRecord) -> bool:
        if any(text in str(record.msg) for text in _NO_NEWS):
            return False
        return not (record.exc_info and is_known(record.exc_info[1]))

    for module, name in ((threading, "excepthook"), (sys, "unraisablehook")):
        tell = getattr(module, f"__{name}__")
        hook = functools.partial(lambda tell, e: is_known(e.exc_value) or tell(e), tell)
        setattr(module, name, hook)
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(is_news)


def _exit(status: int, message: str) -> NoReturn:
    print(f"error: {printable(message)}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
