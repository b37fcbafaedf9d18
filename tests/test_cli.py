import pytest
from absl import flags

from imagen_jax import cli
from imagen_jax.errors import UserError


@pytest.fixture(autouse=True)
def _flags(monkeypatch):
    monkeypatch.setattr(flags, "FLAGS", flags.FlagValues())
    flags.DEFINE_integer("number", None, "x", flag_values=flags.FLAGS)
    flags.mark_flag_as_required("number", flag_values=flags.FLAGS)


def _exit(main, *argv):
    with pytest.raises(SystemExit) as error:
        cli.run(main, ["door", *argv])
    return error.value.code


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--numbr=3"], "Unknown command line flag 'numbr'. Did you mean: number"),
        (["--number=x"], "flag --number=x"),
        ([], "--number must have a value"),
        (["--number=3", "rest"], "'rest' is no flag"),
    ],
)
def test_usage(argv, message, capsys):
    assert _exit(lambda: None, *argv) == 2
    assert message in capsys.readouterr().err


def test_statuses(capsys):
    def user_error():
        raise UserError("it is wrong")

    def interrupt():
        raise KeyboardInterrupt

    assert _exit(lambda: None, "--number=3") == 0
    assert _exit(user_error, "--number=3") == 1
    assert capsys.readouterr().err == "error: it is wrong\n"
    assert _exit(interrupt, "--number=3") == 3
    assert _exit(user_error, "--help") == 0
    assert "usage" not in capsys.readouterr().err
