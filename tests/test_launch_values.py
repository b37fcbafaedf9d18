"""The launch scripts pass values on byte for byte, or refuse them in one line."""

import copy
import json
import shutil
import sys

import pytest

from tests.fake_cloud import TRAIN, Cloud, needs_tools

pytestmark = needs_tools

# Special to bash, YAML, JSON, Kubernetes, printf, or a reader of lines.
TEXTS = (
    *("", " ", " a  b ", "'", '"', "\\", "\\n", "a\\", "'\"'$'", "a=b==c", "=", "%s"),
    *("$", "$HOME", "${NAME} ${CHIPS}", "$(touch pwned; id)", "`touch pwned`", "${A"),
    *("*", "?", "[a-z]*", "~", "a=~/b:~/c", "{a,b}", "!!", "!y", "^a^b", "a;b&c|d>e"),
    *("--", "-n", "-", "--help", "--env=X", "# x", "a #x", "x: y", "- x", "&x", "@x"),
    *("yes", "null", "010", "1e3", "|", ">-", "[a]", "{a: b}", "<<", "%YAML", "---"),
    *("a\nb", "a\n", "\n", "a\tb", "\ta", "\r", "a\r\nb", "\x01", "\x1b[31m", "\x7f"),
    *("é", "e\u0301", "日本", "😀", "\u0085", "\u2028", "\u2029", "\ufeffa", "\ufffe"),
    *("\u200b", "\xa0", "\U0010ffff", "s\n hostNetwork: true", 's", "x": "y'),
)
# Flags have no control characters; Unicode's are none to bash.
FLAGS = "'\"\\ ${NAME}${CHIPS} $(a b) : #x - *&!%@`{}[],é😀\u0085\u2028\ufeff -- ="
VARIABLES = (
    *("A=*", "B=", "C==x=", 'D="q"\'', "E=$HOME${NAME}`id`\\n\\", "F=~/é😀:~/b"),
    *("G=--x", "H=a;b&c|#d", "I={a,b}", "PYTHONUNBUFFERED=0"),
    *("LIBTPU_INIT_ARGS=--a=true --b=true", "J= a  b ", "K='x y' # ; *", "L= "),
    *("M=é 日本 😀 \u2028", "N=a\\ b\\", 'O="q r" -- --env', "P=a -b=c 1=2 é=3"),
)


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path)


def refuse(cloud, script, *words, env=None):
    """The script says why in one line, and has done nothing."""
    done = cloud.run(script, *words, env=env)
    assert done.returncode == 2, (words, done.stdout)
    assert done.stdout.startswith("error: "), (words, done.stdout)
    assert done.stdout.count("\n") == 1, (words, done.stdout)
    assert not cloud.calls()
    assert not [*cloud.repository.rglob("*pwned*")]
    return done.stdout


def test_what_workers_run_is_what_was_written(cloud, tmp_path):
    """Down to the training: through cascade, run, gcloud's ssh and worker.sh."""
    cloud.git("branch", "topic")
    repository = tmp_path / "re po's $HOME *"
    shutil.copytree(cloud.repository, repository)
    # What a pattern would find in the current folder.
    for name in (
        "A=secret",
        "--description=secret",
        "--ssh-flag=secret",
        "--config.y=secret",
    ):
        (cloud.repository / name).touch()
    cloud.train(
        'printf "%s\\0" "$@" >"$FAKE_CLOUD/arguments$WORKER"\n'
        'env -0 >"$FAKE_CLOUD/environment$WORKER"'
    )
    done = cloud.run(
        "tpu.sh",
        "cascade",
        "--name=a",
        "--stages=b c* v4-8 --config.y=* --config.z=\"'\\",
        f"--workdir=gs://{FLAGS}",
        *(f"--env={word}" for word in VARIABLES[1:]),
        "--env",
        VARIABLES[0],
        '--create-args=--network="n" --description=*',
        "--ssh-args=--ssh-flag=* --ssh-flag=$HOME",
        f"--repo={repository}",
        "--commit=topic",
        "--",
        *TEXTS,
        "\udcff\udc80",  # no UTF-8
    )
    assert done.returncode == 0, done.stdout
    for worker in (0, 1):
        arguments = (cloud.folder / f"arguments{worker}").read_bytes()
        assert arguments.split(b"\0")[:-1] == [
            b"--config=c*",
            f"--workdir=gs://{FLAGS}/b".encode(),
            b"--distributed",
            b"--start_timeout_seconds=120",
            *(text.encode() for text in TEXTS),
            b"\xff\x80",
            b"--config.y=*",
            b"--config.z=\"'\\",
        ]
        environment = (cloud.folder / f"environment{worker}").read_bytes()
        found = environment.split(b"\0")
        assert {word.encode() for word in VARIABLES} <= {*found}
    (create,) = cloud.calls("gcloud", "create")
    assert create[6:9] == [
        "--accelerator-type=v4-8",
        '--network="n"',
        "--description=*",
    ]
    for call in cloud.calls("gcloud", "ssh"):
        assert {"--ssh-flag=*", "--ssh-flag=$HOME"} <= {*call}
    assert not [*tmp_path.rglob("pwned")]


def test_what_slurm_runs_is_what_was_written(cloud):
    env = {"SLURM_JOB_ID": "7", "PYTHON": sys.executable, "START_TIMEOUT_SECONDS": "*"}
    words = (*TEXTS[1:], "\udcff")
    assert cloud.run("slurm.sh", *words, env=env).returncode == 0
    # An empty word does not ask for help.
    assert cloud.run("slurm.sh", "", *words, env=env).returncode == 0
    first, second = cloud.calls("srun")
    at = first.index(sys.executable)
    assert first[at + 1 :] == [
        *("-m", "imagen_jax.train", "--distributed", "--start_timeout_seconds=*"),
        *words,
    ]
    assert second == [*first[: -len(words)], "", *words]


def test_slurm_says_what_is_wrong_in_one_line(cloud):
    refuse(cloud, "slurm.sh", "a\nb")
    refuse(cloud, "slurm.sh", "a", env={"SLURM_JOB_ID": "7", "PYTHON": "no\nsuch"})


def rendered(cloud, *words):
    yaml = pytest.importorskip("yaml")
    done = cloud.run("gke.sh", "render", "--name=a", *words)
    assert done.returncode == 0, done.stdout
    return yaml.safe_load(done.stdout)


def test_the_manifest_holds_what_was_written_and_nothing_else(cloud):
    (cloud.repository / "A=secret").touch()
    # Modules that the manifest's writer would take from the current folder.
    for name in ("json", "re"):
        (cloud.repository / f"{name}.py").write_text("exit('pwned')")
    plain = ("--image=i", "--config=c", "--workdir=w")
    expected = copy.deepcopy(rendered(cloud, *plain))
    (job,) = expected["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    expected["metadata"]["namespace"] = pod["serviceAccountName"] = "010"
    pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] = "null"
    container["image"] = FLAGS
    container["args"] = [f"--config={FLAGS}", f"--workdir={FLAGS}"]
    container["args"] += ["--distributed", "--start_timeout_seconds=600", *TEXTS]
    container["env"] = [
        dict(zip(("name", "value"), word.split("=", 1), strict=True))
        for word in VARIABLES
    ]
    found = rendered(
        cloud,
        *(f"--{name}={FLAGS}" for name in ("image", "config", "workdir")),
        *("--namespace=010", "--service-account=010", "--accelerator=null"),
        *(f"--env={word}" for word in VARIABLES),
        "--",
        *TEXTS,
    )
    assert found == expected


def test_what_kubernetes_would_replace_is_refused(cloud):
    words = ("apply", *TRAIN, "--image=i")
    for text in ("$$", "a$(A)b", "$(A.b-c)", "$é", "\udcff"):
        assert "cannot be passed on" in refuse(cloud, "gke.sh", *words, "--", text)
        refuse(cloud, "gke.sh", *words, f"--env=A={text}")
        refuse(cloud, "gke.sh", *words, f"--workdir={text}")


REFUSED = (
    *("--name=a\n", "--name=é", "--name=$(touch pwned)", "--env=X", "--env=X=1 Y=2"),
    *(
        "--env=X=1\nY=2",
        "--env=X=a\tb",
        "--env=-i",
        "--env=é=1",
        "--env= X=",
    ),
    *(
        "--env=X=1  Y=2",
        "--env=1X=",
        "--env=X-Y=1",
        "--workdir=a\nb",
        "--$(touch pwned)",
    ),
    *("--config=\x1b[31m", "--name[$(touch pwned)]=1", "--=1", "--\n", "a\nb", ""),
    *("--spot=\n", "--start-timeout-seconds=010", "--start-timeout-seconds=a[`id`]"),
)
REFUSED_TPU = (
    *("--zone=a b", "--zone=-x", "--zone=*", "--project='p'", "--accelerator-type="),
    *("--runtime-version=a\n", "--create-args=--a  --b", "--create-args= --a"),
    *(
        "--create-args=--a\n--b",
        '--create-args=--a="b c"',
        "--ssh-args='a b'",
        "--ssh-args=--a\t--b",
        "--ssh-args=--a ",
        "--commit=",
    ),
    *("--commit=--git-dir", "--repo=-x", "--worker=$(touch pwned)", "--worker="),
    *("--retries=a[$(touch pwned)]", "--retries=99999999999", "--parallel=0"),
    *("--poll-seconds=1\n", "--poll-seconds=.", "--stages=", "--stages=a b v4-8\n"),
)
REFUSED_GKE = (
    *("--service-account=s\n hostNetwork: true", "--service-account=a b", "--image=\t"),
    *("--service-account=", "--namespace={}", "--namespace=", "--accelerator=a: b"),
    *(
        "--accelerator=${NAME}",
        "--topology=0x1",
        "--topology=2x2\n",
        "--topology=010x1",
    ),
    *("--chips-per-host=0", "--slices=0", "--max-restarts=1e3", "--context=a\nb"),
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "words", "flags"),
    [
        ("tpu.sh", ("train", *TRAIN), REFUSED + REFUSED_TPU),
        ("gke.sh", ("apply", *TRAIN, "--image=i"), REFUSED + REFUSED_GKE),
    ],
)
def test_what_cannot_arrive_is_refused_in_one_line(cloud, script, words, flags):
    for flag in flags:
        refuse(cloud, script, *words, flag)
    refuse(cloud, script, *words, env={"LAUNCH_ENV": "A=1\nB=2"})
    for command in ("", "a\nb"):
        refuse(cloud, script, command)


def test_wrong_stages_are_refused_before_any_is_trained(cloud):
    words = ("cascade", "--name=a", "--workdir=w")
    for stage in ("a  b v4-8", "A b v4-8", "a b *", "a b v4-8\t--c", ";"):
        refuse(cloud, "tpu.sh", *words, f"--stages=a b v4-8; {stage}")


def test_a_value_is_not_taken_for_a_cry_for_help(cloud):
    done = cloud.run("gke.sh", "render", "--name=a", "--image", "--help")
    assert done.returncode == 2 and "--config is missing" in done.stdout


def test_a_commit_is_not_taken_for_a_file(cloud):
    cloud.run("tpu.sh", "create", "--name=a")
    words = ("install", "--name=a")
    for commit in ("launch", "HEAD..HEAD", "HEAD:launch", "*"):
        done = cloud.run("tpu.sh", *words, f"--commit={commit}")
        assert done.returncode == 2, done.stdout
        assert done.stdout.count("\n") == 1 and "no such commit" in done.stdout
    repository = f"--repo={cloud.repository}"
    assert cloud.run("tpu.sh", *words, repository).returncode == 0
    assert cloud.run("tpu.sh", *words, repository, "--commit=launch").returncode == 1


def test_what_a_worker_cannot_use_is_refused(cloud, tmp_path):
    for words in (
        *(["start", run, "true"] for run in ("", "../a", "a/b", "a\nb", "-a", ".")),
        *(["log", "a", lines] for lines in ("-1", "+1", "010", "x\n", "")),
        *(["stop", "a", seconds] for seconds in ("a[$(touch pwned)]", "1.5")),
        *(["start", "a"], [""], ["a\nb"], ["status"]),
    ):
        refuse(cloud, "worker.sh", *words, env={"HOME": str(tmp_path)})
    assert not (tmp_path / "imagen-runs").exists()


def test_a_variable_of_the_environment_is_one_and_gives_way_to_a_flag(cloud):
    env = {"LAUNCH_ENV": "A=--a=true --b=true"}
    plain = ("--image=i", "--config=c", "--workdir=w")
    for flags, value in (((), "--a=true --b=true"), (("--env=A=$ '\"",), "$ '\"")):
        done = cloud.run("gke.sh", "render", "--name=a", *plain, *flags, env=env)
        assert done.returncode == 0, done.stdout
        assert json.dumps({"name": "A", "value": value}) in done.stdout
    done = cloud.run("gke.sh", "render", "--name=a", *plain, "--env=", env=env)
    assert "env: []" in done.stdout
