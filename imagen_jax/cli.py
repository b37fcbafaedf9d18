"""What all doors share: flags in, one clear line and an exit status out."""

import ast
import dataclasses
import functools
import gc
import inspect
import json
import logging
import os
import pathlib
import re
import resource
import sys
import textwrap
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NoReturn, get_args, get_origin

from absl import flags

from imagen_jax import __version__
from imagen_jax.config import StageConfig
from imagen_jax.errors import (
    READ_ONLY,
    Stopped,
    UserError,
    did_you_mean,
    is_full,
    printable,
)

DOORS = (
    *("prepare", "train", "sample", "app", "evaluate", "rate", "export"),
    *("goodput", "plan", "benchmark", "demo"),
)


def main() -> None:
    """Runs `imagen-jax DOOR ...`, the same as `python -m imagen_jax.DOOR ...`."""
    door = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if door in ("--help", "-h"):
        print(f"usage: imagen-jax {'|'.join(DOORS)} --help")
    elif door == "--version":
        print(f"imagen-jax {__version__}")
    elif door in DOORS:
        command = [sys.executable, "-m", f"imagen_jax.{door}", *sys.argv[2:]]
        os.execv(sys.executable, command)
    else:
        near = did_you_mean(door, DOORS)
        _exit(2, f"there is no {door!r}{near}; there is: {', '.join(DOORS)}")


def run(main: Callable[..., None], argv: Sequence[str] | None = None) -> NoReturn:
    """Parses the flags of `argv` (default: the command line) and runs `main`.

    A `main` that has a parameter gets the words that are no flags.

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
    # Importing and tracing make many objects and few reference cycles: looking for them
    # every 700 objects would be an eighth of the time to the first step.
    gc.set_threshold(100_000)
    if "config" in flags.FLAGS:
        flags.FLAGS["config"].parser.parse = _load_config
    try:
        flags.FLAGS.unparse_flags()  # of an earlier call
        rest = flags.FLAGS(argv)[1:]
    except Exception as error:  # ml_collections raises almost anything.
        _exit(2, f"{_brief(error)} (see --help)")
    takes_words = bool(inspect.signature(main).parameters)
    if rest and not takes_words:
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
        main(*[rest] * takes_words)
    except UserError as error:
        _exit(1, str(error))
    except flags.Error as error:
        _exit(2, f"{_brief(error)} (see --help)")
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


def define_distributed() -> None:
    """Defines the flags that `join` reads."""
    flags.DEFINE_bool("distributed", False, "one process of a TPU slice or Slurm job")
    flags.DEFINE_integer(
        "start_timeout_seconds", 120, "wait for the other processes", lower_bound=1
    )
    flags.DEFINE_integer(
        "heartbeat_timeout_seconds", 100, "without a sign of life: lost", lower_bound=1
    )


def join() -> None:
    """With --distributed, joins the processes that a TPU slice, GKE or Slurm started.

    When one does not come in time, or gives no sign of life for so long, JAX ends all
    others with status 134, and names it where it can.
    """
    args = flags.FLAGS
    if not args.distributed:
        return
    import jax

    seconds = args.start_timeout_seconds
    print(f"waiting for the other processes, at most {seconds} s", flush=True)
    try:
        jax.distributed.initialize(
            initialization_timeout=seconds,
            heartbeat_timeout_seconds=args.heartbeat_timeout_seconds,
        )
    except ValueError:
        raise UserError(
            "--distributed: JAX finds no other processes, as TPU VMs, GKE and Slurm "
            "start them (launch/README.md); on one host leave --distributed out"
        ) from None
    # Orbax's own flag: its barriers then end after 300 s instead of never.
    args.experimental_orbax_use_distributed_barrier = True


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


def _load_config(text: str) -> Any:
    """What the word of --config makes, or a `ValueError` of one line."""
    from ml_collections import ConfigDict

    from imagen_jax.api.run import run_config

    config = run_config(text)
    if not isinstance(config, ConfigDict):
        raise ValueError(
            f"get_config() returns a {type(config).__name__}, not an "
            "ml_collections.ConfigDict; begin with imagen_jax.configs.common's"
        )
    return config.lock()


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


def describe(kind: type = StageConfig, path: str = "--config.") -> str:
    """Flag, default, what else it takes, and meaning of every field.

    A field's comment is above it or at the end of its line; what has none shares that
    of the field before it.
    """
    lines, meaning, text = inspect.getsource(kind).splitlines(), "", []
    nodes = ast.parse("\n".join(lines)).body[0].body
    places = {node.target.id: node for node in nodes if isinstance(node, ast.AnnAssign)}
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(field.type):
            text.append(describe(field.type, f"{path}{field.name}."))
            continue
        start, end = places[field.name].lineno - 1, places[field.name].end_lineno - 1
        comments = [lines[end].partition("  # ")[2]]
        while lines[start - 1].lstrip().startswith("#"):
            start -= 1
            comments.insert(0, lines[start].lstrip(" #"))
        meaning = " ".join(filter(None, comments)) or meaning
        head = f"  {path}{field.name}={field.default!r} {_takes(field.type)}"
        text += [head.rstrip(), textwrap.indent(textwrap.fill(meaning, 80), " " * 6)]
    return "\n".join(text)


def _takes(kind: Any) -> str:
    """The words or the interval of a field's type."""
    if get_origin(kind) is Literal:
        return "({})".format(" | ".join(get_args(kind)))
    inner = get_args(kind)[0] if get_origin(kind) is tuple else kind
    return "".join(getattr(inner, "__metadata__", ()))


def _quiet_libraries() -> None:
    """Silences what libraries say that is no news to a user.

    That is `READ_ONLY` and, as our own line tells of a full disk, what each thread of
    Orbax and TensorStore says of it.
    """

    def is_known(error: BaseException | None) -> bool:
        # The second one follows: writes that end when Orbax has given up.
        return bool(error) and (is_full(error) or str(error) == "Event loop is closed")

    def is_news(record: logging.LogRecord) -> bool:
        error = record.exc_info and record.exc_info[1]
        return not (is_known(error) or READ_ONLY in str(record.msg))

    # Writes that had not begun when Orbax gave up.
    warnings.filterwarnings("ignore", "coroutine .* was never awaited")
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
