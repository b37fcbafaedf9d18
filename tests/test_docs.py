"""What the documents say of the repository is so."""

import functools
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import imagen_jax

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "imagen_jax"
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")] + [*ROOT.glob("launch/*.md")]
)
SHELL_BREAKS = {"|", "||", "&", "&&", ";", ">", ">>", "<", "2>&1", "2>"}


def blocks(text: str) -> list[str]:
    """Contents of the fenced code blocks of a Markdown text."""
    return re.findall(r"^ *```[^\n]*\n(.*?)^ *```", text, re.M | re.S)


def commands(text: str) -> list[tuple[str, list[str]]]:
    """`(door, arguments)` of each `python -m imagen_jax.DOOR ...` in code blocks."""
    found = []
    for block in blocks(text):
        for line in block.replace("\\\n", " ").splitlines():
            match = re.search(r"python[\d.]* -m imagen_jax\.(\w+)(.*)", line)
            if match:
                arguments = shlex.split(match[2], comments=True)
                ends = [i for i, word in enumerate(arguments) if word in SHELL_BREAKS]
                found.append((match[1], arguments[: ends[0] if ends else None]))
    return found


def make_targets(text: str) -> set[str]:
    """Targets of every `make TARGET` in code blocks and in code spans."""
    code = "\n".join(blocks(text)) + "\n" + "\n".join(re.findall(r"`([^`\n]+)`", text))
    return set(re.findall(r"(?:^|[\s;&])make ([a-z][\w-]*)", code))


def tree(text: str) -> list[tuple[str, str]]:
    """`(room, file)` of each .py file in the code block that draws the package.

    The room is the folder that a line last began with, "" at the top.
    """
    drawn = [b for b in blocks(text) if re.search(r"^\W*imagen_jax/", b, re.M)]
    assert len(drawn) == 1, "README.md draws the tree of imagen_jax/ in one code block"
    room, files = "", []
    for line in drawn[0].splitlines():
        if folder := re.match(r"\W*(\w+)/", line):
            room = folder[1]
        files += [(room, name) for name in re.findall(r"\b(\w+\.py)\b", line)]
    return files


@functools.cache
def read(document: Path) -> str:
    """The text of a document."""
    return document.read_text()


def test_commands_are_found_in_a_text():
    text = (
        "`python -m imagen_jax.plan` in prose\n```\n$ JAX_PLATFORMS=cpu python3 -m "
        "imagen_jax.train --config=a.py \\\n    --workdir='b c' | tee log # d\n```\n"
    )
    assert commands(text) == [("train", ["--config=a.py", "--workdir=b c"])]
    assert make_targets("make sure, `make test`\n```\ncd x && make demo\n```") == {
        "test",
        "demo",
    }


def test_the_readme_draws_the_tree_as_it_is():
    drawn = tree(read(ROOT / "README.md"))
    for room, name in drawn:
        # A line of the top may follow a room's.
        places = [PACKAGE / room / name, ROOT / room / name, PACKAGE / name]
        assert any(p.is_file() for p in [*places, ROOT / name]), f"no {room}/{name}"
    for path in PACKAGE.rglob("*.py"):
        if path.name != "__init__.py":
            room = path.parent.name
            listed = {r for r, name in drawn if name == path.name}
            known = room in listed or (path.parent == PACKAGE and listed)
            assert known, f"README.md does not list {path.relative_to(ROOT)}"


PARSE = """
import json, os, runpy, sys, traceback
from absl import flags
from imagen_jax import cli

def parse(main, argv=None):
    # Each in a child: a config's overrides become flags that stay defined.
    for arguments in json.load(sys.stdin):
        child = os.fork()
        if not child:
            sys.argv = ["door", *arguments]
            try:
                rest = flags.FLAGS(sys.argv)[1:]
                assert not rest, f"{rest} are no flags"
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            sys.exit(1)

cli.run = parse
runpy.run_module(sys.argv[1], run_name="__main__", alter_sys=True)
"""


def parse_flags(door: str, argument_lists: list[list[str]]) -> str:
    """ "" when the door's flags take every list of arguments, else its error."""
    done = subprocess.run(
        [sys.executable, "-c", PARSE, f"imagen_jax.{door}"],
        input=json.dumps(argument_lists),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    return "" if done.returncode == 0 else done.stderr[-2000:]


def test_a_wrong_command_is_found():
    right = ["--source=shapes:10", "--output=x"]
    assert not parse_flags("prepare", [right, [*right, "--seed=1"]])
    assert "sede" in parse_flags("prepare", [right, [*right, "--sede=1"]])
    assert "output" in parse_flags("prepare", [right, right[:1]])
    assert "seed" in parse_flags("prepare", [[*right, "--seed=x"]])


def test_every_command_in_the_documents_parses():
    by_door = {}
    for document in DOCUMENTS:
        for door, arguments in commands(read(document)):
            by_door.setdefault(door, []).append(arguments)
    assert by_door, "the documents show no command"
    for door, argument_lists in by_door.items():
        error = parse_flags(door, argument_lists)
        assert not error, f"{door}: {error}"


def test_every_door_named_in_the_documents_exists():
    for document in DOCUMENTS:
        for door in re.findall(r"-m imagen_jax\.(\w+)", read(document)):
            assert (PACKAGE / f"{door}.py").is_file(), f"{document.name}: {door}"


def test_every_make_target_in_the_documents_exists():
    makefile = read(ROOT / "Makefile")
    targets = set(re.findall(r"^([a-z][\w-]*):", makefile, re.M))
    assert {"demo", "test", "lint"} <= targets
    assert set(re.search(r"^\.PHONY:(.*)", makefile, re.M)[1].split()) == targets
    for document in DOCUMENTS:
        missing = make_targets(read(document)) - targets
        assert not missing, f"{document.name}: make {missing}"
    assert {"demo", "test"} <= make_targets(read(ROOT / "README.md"))


def test_links_between_documents_lead_somewhere():
    for document in DOCUMENTS:
        links = re.findall(r"\]\(([^)#\s]+)", read(document))
        links += re.findall(r"<img[^>]* src=\"([^\"]+)\"", read(document))
        for link in links:
            if not re.match(r"[a-z]+:", link):
                assert (document.parent / link).exists(), f"{document.name}: {link}"


def test_the_changelog_knows_this_version():
    assert f"## [{imagen_jax.__version__}]" in read(ROOT / "CHANGELOG.md")


@pytest.mark.parametrize("folder", ["imagen_jax", "configs", "tests", "docs", "launch"])
def test_no_file_names_a_home_folder(folder):
    for path in (ROOT / folder).rglob("*"):
        if path.suffix in {".py", ".md", ".sh", ".yml", ".toml"}:
            found = re.search(r"/(home|root|Users)/\w+", path.read_text())
            assert not found, f"{path.relative_to(ROOT)}: {found[0]}"
