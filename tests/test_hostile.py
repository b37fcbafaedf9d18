"""No code of the package executes what it reads: no pickle, no `eval`, no shell."""

import ast
import pathlib

import pytest

import imagen_jax

PACKAGE = pathlib.Path(imagen_jax.__file__).parent
# Names of calls that run what they read, or import what it names.
EXECUTING = {
    *("eval", "exec", "compile", "__import__", "import_module", "system", "popen"),
    *("unpickle", "literal_eval", "run_path", "run_module"),
}
PICKLING = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
REFUSED_WORDS = ("allow_pickle", "trust_remote_code", "shell")


def executing(text: str) -> list[str]:
    """What in a file's source might execute what it reads."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            found += [n for n in names if n.split(".")[0] in PICKLING]
        elif isinstance(node, ast.ImportFrom):
            found += [m for m in [node.module or ""] if m.split(".")[0] in PICKLING]
        elif isinstance(node, ast.Call):
            found += _executing_call(node)
    return found


def _executing_call(call: ast.Call) -> list[str]:
    name = ast.unparse(call.func)
    last = name.split(".")[-1]
    given = {word.arg: ast.unparse(word.value) for word in call.keywords}
    # Methods of others with these names: jax's `lowered.compile`, `re.compile`.
    builtin = name == last or last not in ("compile", "eval")
    bad = [
        last in EXECUTING and builtin,
        name in ("np.load", "numpy.load") and given.get("allow_pickle") != "False",
        name == "torch.load" and given.get("weights_only") != "True",
        "yaml" in name and "load" in last and last != "safe_load",
        any(given.get(word, "False") != "False" for word in REFUSED_WORDS),
    ]
    return [ast.unparse(call)] if any(bad) else []


def test_the_package_executes_nothing_that_it_reads():
    faults = [
        f"{path}: {found}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for found in executing(path.read_text())
    ]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from pickle import loads",
        "eval(text)",
        "importlib.import_module(name)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "torch.load(path)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "os.system(text)",
        "subprocess.run(text, shell=True)",
        "yaml.load(text)",
    ],
)
def test_what_would_execute_is_found(text):
    assert executing(text)
