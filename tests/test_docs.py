"""What the documents say of the repository is true."""

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
TEXTS = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for folder in (".", "docs", "launch", "benchmarks")
    for path in sorted((ROOT / folder).glob("*.md"))
}
COMMAND = re.compile(r"(?:python[\d.]* -m imagen_jax\.|imagen-jax )(\w+)\b(?! \.)(.*)")
SHELL_BREAKS = {"|", "||", "&", "&&", ";", ">", ">>", "<", "2>&1", "2>"}


def blocks(text: str) -> list[str]:
    """Contents of the fenced code blocks of a Markdown text."""
    return re.findall(r"^ *```[^\n]*\n(.*?)^ *```", text, re.M | re.S)


def commands(text: str) -> list[tuple[str, list[str]]]:
    """`(door, arguments)` of each call of a door in code blocks."""
    found = []
    for block in blocks(text):
        for line in block.replace("\\\n", " ").splitlines():
            if match := COMMAND.search(line):
                arguments = shlex.split(match[2], comments=True)
                ends = [i for i, word in enumerate(arguments) if word in SHELL_BREAKS]
                found.append((match[1], arguments[: ends[0] if ends else None]))
    return found


def make_targets(text: str) -> set[str]:
    """Targets of every `make TARGET` in code blocks and in code spans."""
    code = "\n".join(blocks(text)) + "\n" + "\n".join(re.findall(r"`([^`\n]+)`", text))
    return set(re.findall(r"(?:^|[\s;&])make ([a-z][\w-]*)", code))


def folders_of_the_tree(text: str) -> set[str]:
    """Folders in the code block that draws the package; rooms are indented."""
    (drawn,) = [b for b in blocks(text) if re.search(r"^imagen_jax/", b, re.M)]
    found, parent = set(), ""
    for indent, name in re.findall(r"^( *)(\w+)/", drawn, re.M):
        parent = parent if indent else name
        found.add(f"{parent}/{name}" if indent else name)
    return found


def test_commands_are_found_in_a_text():
    text = (
        "`python -m imagen_jax.plan` in prose\n```\n$ JAX_PLATFORMS=cpu python3 -m "
        "imagen_jax.train --config=a.py \\\n    --workdir='b c' | tee log # d\n"
        "imagen-jax plan --json=x\n```\n"
    )
    train = ("train", ["--config=a.py", "--workdir=b c"])
    assert commands(text) == [train, ("plan", ["--json=x"])]
    text = "make sure, `make test`\n```\ncd x && make demo\n```"
    assert make_targets(text) == {"test", "demo"}
    text = "```\ndocs/  a\nimagen_jax/  b/c\n  data/  d\n```"
    assert folders_of_the_tree(text) == {"docs", "imagen_jax", "imagen_jax/data"}


def test_the_readme_draws_the_tree_as_it_is():
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    # Only what exists: a file may be removed and not yet committed.
    parts = [Path(name).parts for name in tracked if (ROOT / name).exists()]
    disk = {p[0] for p in parts if len(p) > 1 and not p[0].startswith(".")}
    disk |= {f"{p[0]}/{p[1]}" for p in parts if len(p) > 2 and p[0] == PACKAGE.name}
    assert folders_of_the_tree(TEXTS["README.md"]) == disk


# Imports once what the doors share, then forks for each command: a config's overrides
# become flags that stay defined.
PARSE = """
import json, os, runpy, sys
import flax, jax, optax, orbax.checkpoint
from absl import flags
from imagen_jax import cli

def forked(function):
    child = os.fork()
    if not child:
        try:
            function()
        finally:
            sys.stdout.flush()
            os._exit(0)
    os.waitpid(child, 0)

def parse(door, arguments, commands):
    error, sys.argv = "", [door, *arguments]
    try:
        rest = flags.FLAGS(sys.argv)[1:]
        if commands:
            own = {word.split("=")[0] for word in arguments} - set(rest)
            mine = {f"--{name}" for name in commands[rest[0]]}
            assert own <= mine, f"{own - mine} are not for {rest[0]}"
        else:
            assert not rest, f"{rest} are no flags"
    except BaseException as raised:
        error = f"{type(raised).__name__}: {raised}"
    print(json.dumps([door, arguments, error]))

def parse_all(door, argument_lists):
    def run(main, argv=None):
        commands = main.__globals__.get("COMMANDS")
        for arguments in argument_lists:
            forked(lambda: parse(door, arguments, commands))
    cli.run = run
    runpy.run_module(f"imagen_jax.{door}", run_name="__main__", alter_sys=True)

for door, argument_lists in json.load(sys.stdin).items():
    forked(lambda: parse_all(door, argument_lists))
"""


def parse(called: list[tuple[str, list[str]]]) -> list[str]:
    """The error of each command, "" for one whose flags its door takes."""
    by_door = {}
    for door, arguments in called:
        by_door.setdefault(door, []).append(arguments)
    done = subprocess.run(
        [sys.executable, "-c", PARSE],
        input=json.dumps(by_door),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    errors = {(door, *arguments): error for door, arguments, error in answers}
    return [
        errors.get((door, *arguments), f"no answer: {done.stderr[-2000:]}")
        for door, arguments in called
    ]


@pytest.mark.slow
def test_every_command_in_the_documents_parses():
    right = ["--source=shapes:10", "--output=x"]
    wrong = {
        "sede": [*right, "--sede=1"],
        "--output": right[:1],
        "seed": [*right, "--seed=x"],
    }
    called = [command for text in TEXTS.values() for command in commands(text)]
    assert called
    errors = parse([*called, *(("prepare", words) for words in wrong.values())])
    for word, error in zip(wrong, errors[len(called) :], strict=True):
        assert word in error
    faults = [f"{c}: {e}" for c, e in zip(called, errors, strict=False) if e]
    assert not faults, "\n".join(faults)
    other = [("rate", ["scor"]), ("rate", ["score", "--seed=1"])]
    for word, error in zip(("scor", "are not for score"), parse(other), strict=True):
        assert word in error


def test_every_door_named_in_the_documents_exists():
    for name, text in TEXTS.items():
        for door in re.findall(r"-m imagen_jax\.(\w+)", text):
            # migrating.md also names the old ones.
            old = name == "docs/migrating.md" and door in ("metrics", "DOOR")
            old |= door in ("COMMAND", "DOOR")
            assert old or (PACKAGE / f"{door}.py").is_file(), f"{name}: {door}"


def test_every_make_target_in_the_documents_exists():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][\w-]*):", makefile, re.M))
    assert {"demo", "test", "check", "lint", "dist"} == targets
    assert set(re.search(r"^\.PHONY:(.*)", makefile, re.M)[1].split()) == targets
    for name, text in TEXTS.items():
        missing = make_targets(text) - targets
        assert not missing, f"{name}: make {missing}"
    assert {"demo", "test"} <= make_targets(TEXTS["README.md"])


def test_links_between_documents_lead_somewhere():
    for name, text in TEXTS.items():
        links = re.findall(r"\]\(([^)#\s]+)", text)
        links += re.findall(r"<img[^>]* src=\"([^\"]+)\"", text)
        for link in links:
            if not re.match(r"[a-z]+:", link):
                assert (ROOT / name).parent.joinpath(link).exists(), f"{name}: {link}"


@pytest.mark.parametrize("name", ["docs/architecture.md", "docs/decisions.md"])
def test_files_named_in_a_document_exist(name):
    found = re.findall(r"`([\w/]+\.(?:py|md))`", TEXTS[name])
    assert found
    for path in found:
        assert (PACKAGE / path).exists() or (ROOT / path).exists(), path


@pytest.mark.parametrize("folder", ["docs", "benchmarks"])
def test_an_index_lists_its_folder(folder):
    own = "*.md" if folder == "docs" else "*.py"
    names = {path.name for path in (ROOT / folder).glob(own)} - {"README.md"}
    linked = re.findall(r"\]\(([\w.]+)\)", TEXTS[f"{folder}/README.md"])
    assert names <= set(linked)


def test_documents_stay_short():
    assert len(TEXTS["README.md"].splitlines()) <= 200
    assert len(TEXTS["benchmarks/README.md"].splitlines()) <= 250
    assert len(re.findall(r"^\*\*", TEXTS["docs/decisions.md"], re.M)) <= 40


def test_the_version_is_everywhere_the_same():
    version = imagen_jax.__version__
    assert f"## [{version}]" in TEXTS["CHANGELOG.md"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()


def test_no_file_names_a_home_folder():
    for folder in ("imagen_jax", "configs", "tests", "docs", "launch", "benchmarks"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in {".py", ".md", ".sh", ".yml", ".toml"}:
                found = re.search(r"/(home|root|Users)/\w+", path.read_text())
                assert not found, f"{path.relative_to(ROOT)}: {found[0]}"
