"""What all doors share: flags in, one clear line and an exit status out."""

import json
import pathlib
import re
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from absl import flags

from imagen_jax.errors import PeerLost, Stopped, UserError


def run(main: Callable[[], None], argv: Sequence[str] | None = None) -> NoReturn:
    """Parses the flags of `argv` (default: the command line) and runs `main`.

    A door defines its flags just before it calls this, not when it is imported: so
    doors can import each other.

    Exits with 0 when done, 1 after a `UserError` (printed as one line), 2 for flags
    that are wrong, 3 when stopped by a signal, 4 after a `PeerLost`.
    """
    argv = list(sys.argv if argv is None else argv)
    flags.DEFINE_bool(
        "compilation_cache",
        True,
        "keep compiled programs in JAX_COMPILATION_CACHE_DIR, or else in "
        "~/.cache/imagen-jax/jax",
        module_name=argv[0],
    )
    if {"--help", "-help", "-h", "--helpfull", "-?"} & set(argv[1:]):
        _print_help()
        sys.exit(0)
    try:
        rest = flags.FLAGS(argv)[1:]
    except flags.Error as error:
        _exit(2, f"{_brief(error)} (see --help)")
    except (AttributeError, KeyError) as error:
        # ml_collections lets these through for a key that a config does not have.
        _exit(2, _unknown_key(str(error), argv))
    if rest:
        _exit(2, f"{rest[0]!r} is no flag: write --name=value (see --help)")
    if flags.FLAGS.compilation_cache:
        from imagen_jax.compilation import use_compilation_cache

        use_compilation_cache()
    try:
        main()
    except UserError as error:
        _exit(1, str(error))
    except Stopped as stopped:
        _exit(3, str(stopped))
    except PeerLost as lost:
        _exit(4, str(lost))
    except KeyboardInterrupt:
        _exit(3, "interrupted")
    sys.exit(0)


def config_values() -> dict[str, Any]:
    """The values of --config, overrides included.

    Raises:
      UserError: when its file is not there.
    """
    try:
        return flags.FLAGS.config.to_dict()
    except OSError as error:
        raise UserError(f"--config: {' '.join(str(error).split())}") from None


def check_json(path: str | None) -> None:
    """Raises `UserError` unless a file can be written to the `path` of --json."""
    if path and pathlib.Path(path).is_dir():
        raise UserError(f"--json={path} is a folder; name a file in it")
    if path and not pathlib.Path(path).absolute().parent.is_dir():
        raise UserError(f"--json={path}: there is no such folder; make it first")


def write_json(path: str | None, report: Mapping[str, Any]) -> None:
    """Writes what --json is to get, if it was given."""
    if path:
        pathlib.Path(path).write_text(json.dumps(report, indent=2) + "\n")


def table(report: Mapping[str, Any], indent: str = "") -> str:
    """The report's names and values for people, one a line."""
    lines = []
    for name, value in report.items():
        if isinstance(value, Mapping):
            lines += [f"{indent}{name}", table(value, indent + "  ")]
        else:
            form = {float: ",.4g", int: ","}.get(type(value), "")
            shown = format(value, form)
            lines.append(f"{indent}{name:32} {shown}")
    return "\n".join(lines)


def peak_memory_gib() -> float:
    """The most memory that this process has held, in GiB."""
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        # getrusage would count what the process held that started this one.
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts in bytes.
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20


def _print_help() -> None:
    print((sys.modules["__main__"].__doc__ or "").strip(), end="\n\n")
    print(flags.FLAGS.main_module_help())


def _brief(error: flags.Error) -> str:
    """The error without the traceback that ml_collections puts into its text."""
    first, _, rest = str(error).partition("\n")
    if "Traceback" not in rest:
        return str(error)
    last = rest.strip().splitlines()[-1]
    return f"{first.split(': ')[0]}: {last.partition(': ')[2] or last}"


def _unknown_key(message: str, argv: Sequence[str]) -> str:
    """Names the override that a config has no key for, and the nearest right key."""
    quoted = re.findall(r"'(\w+)", message)
    key = quoted[0] if quoted else ""
    overrides = [a.split("=")[0] for a in argv if "." in a.split("=")[0]]
    given = [a for a in overrides if key in a.split(".")] or overrides
    hint = re.search(r'Did you mean "(.+?)"', message)
    near = f" (did you mean {hint[1]!r}?)" if hint else ""
    return f"{given[0] if given else 'an override'}: there is no {key!r}{near}"


def _exit(status: int, message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)
