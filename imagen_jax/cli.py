"""What all doors share: flags in, one clear line and an exit status out."""

import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from absl import flags

from imagen_jax.errors import Stopped, UserError


def run(main: Callable[[], None], argv: Sequence[str] | None = None) -> NoReturn:
    """Parses the flags of `argv` (default: the command line) and runs `main`.

    A door defines its flags just before it calls this, not when it is imported: so
    doors can import each other.

    Exits with 0 when done, 1 after a `UserError` (printed as one line), 2 for flags
    that are wrong, 3 when stopped by a signal.
    """
    argv = list(sys.argv if argv is None else argv)
    if {"--help", "-help", "-h", "--helpfull", "-?"} & set(argv[1:]):
        _print_help()
        sys.exit(0)
    try:
        rest = flags.FLAGS(argv)[1:]
    except flags.Error as error:
        _exit(2, f"{error} (see --help)")
    if rest:
        _exit(2, f"{rest[0]!r} is no flag: write --name=value (see --help)")
    try:
        main()
    except UserError as error:
        _exit(1, str(error))
    except Stopped as stopped:
        _exit(3, str(stopped))
    except KeyboardInterrupt:
        _exit(3, "interrupted")
    sys.exit(0)


def _print_help() -> None:
    print((sys.modules["__main__"].__doc__ or "").strip(), end="\n\n")
    print(flags.FLAGS.main_module_help())


def _exit(status: int, message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)
