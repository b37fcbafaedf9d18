"""`launch/tpu.sh run` and `cascade`: what the loop does when something goes wrong."""

import json
import re

import pytest

from tests.fake_cloud import TRAIN, Cloud, needs_tools

QUOTA = "ERROR: Quota 'TPUV4PreemptiblePods' exhausted. Limit 32 in region us-central2"
STOCKOUT = 'ERROR: There is no more capacity in the zone "us-central2-b"'

pytestmark = needs_tools


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path)


@pytest.mark.slow
def test_run_trains_to_the_end_and_gives_the_slice_back(cloud):
    done = cloud.run("tpu.sh", "run", *TRAIN)
    assert done.returncode == 0, done.stdout
    assert len(cloud.trainings()) == 2
    assert not cloud.slices()
    cloud.run("tpu.sh", "run", *TRAIN, "--keep")
    assert cloud.slices() == ["a"]


@pytest.mark.slow
def test_a_loop_that_was_away_takes_the_training_up_again(cloud):
    cloud.train("sleep 3")
    for command in ("create", "install"):
        assert cloud.run("tpu.sh", command, "--name=a").returncode == 0
    assert cloud.run("tpu.sh", "train", *TRAIN).returncode == 0
    done = cloud.run("tpu.sh", "run", *TRAIN)
    assert done.returncode == 0, done.stdout
    assert "a is training already" in done.stdout
    assert len(cloud.trainings()) == 2 and len(cloud.calls("create")) == 1


PREEMPTED_ONCE = """
if [ "$NUMBER" = 1 ]; then
  sleep 0.5
  printf PREEMPTED >"$FAKE_SLICE/state"
  exit 1  # as JAX does when another worker is gone
fi
"""


@pytest.mark.slow
@pytest.mark.parametrize("queued", [(), ("--queued",)])
def test_a_preempted_slice_is_recreated_and_the_training_resumed(cloud, queued):
    cloud.train(PREEMPTED_ONCE)
    done = cloud.run("tpu.sh", "run", *TRAIN, "--spot", *queued)
    assert done.returncode == 0, done.stdout
    assert "a was taken away (PREEMPTED): again" in done.stdout
    creates = cloud.calls("create")
    assert len(creates) == 2 and creates[0] == creates[1]
    # What is left of the first is deleted before the second is asked for.
    verbs = [call[3] for call in cloud.calls() if call[3] in ("create", "delete")]
    assert verbs == ["create", "delete", "create", "delete"]
    # All workers of both, with the same flags: the second resumes from the workdir.
    commands = cloud.trainings()
    assert len(commands) == 4 and len(set(commands)) == 1


@pytest.mark.slow
def test_a_slice_lost_while_installing_is_recreated(cloud):
    python = cloud.bin / "python3.13"
    lose = 'printf PREEMPTED >"$FAKE_SLICE/state"; exit 1'
    python.write_text(
        f'#!/usr/bin/env bash\n[ "$NUMBER" != 1 ] || {{ {lose}; }}\n'
        + python.read_text()
    )
    (cloud.bin / "python3").write_text("exit 1")
    (cloud.bin / "python3").chmod(0o755)
    done = cloud.run("tpu.sh", "run", *TRAIN)
    assert done.returncode == 0, done.stdout
    assert len(cloud.calls("create")) == 2


@pytest.mark.slow
def test_no_answer_is_no_preemption(cloud):
    cloud.train("sleep 1")
    lost = [1, "ERROR: connection reset"]
    # There is none, it is ready, twice the workers' addresses; then the loop looks.
    found = [[1, "NOT_FOUND"], [0, "READY"], [0, "a;b"], [0, "a;b"]]
    cloud.answers({"describe tpu-vm": [*found, lost, lost]})
    done = cloud.run("tpu.sh", "run", *TRAIN)
    assert done.returncode == 0, done.stdout
    assert not json.loads((cloud.folder / "answers.json").read_text())[
        "describe tpu-vm"
    ]
    assert len(cloud.calls("create")) == 1


def test_a_refused_quota_is_asked_for_again_and_then_explained(cloud):
    cloud.answers({"create": [[1, QUOTA]] * 10})
    done = cloud.run("tpu.sh", "run", *TRAIN)
    assert done.returncode == 1
    assert len(cloud.calls("create")) == 4
    waits = re.findall("waiting (.*) s", done.stdout)
    assert waits == ["0.01", "0.02", "0.03"]
    errors = [line for line in done.stdout.splitlines() if "error:" in line]
    assert len(errors) == 1
    assert "refused 4 times" in errors[0] and QUOTA in errors[0]


def test_capacity_that_comes_back_is_taken(cloud):
    cloud.answers({"create": [[1, STOCKOUT]] * 2})
    done = cloud.run("tpu.sh", "run", *TRAIN)
    assert done.returncode == 0, done.stdout
    assert len(cloud.calls("create")) == 3


def test_a_failed_queued_resource_is_deleted_and_asked_for_again(cloud):
    cloud.answers(
        {
            "describe queued-resources": [[1, "NOT_FOUND"], [0, "FAILED"]],
            "describe tpu-vm": [[1, "NOT_FOUND"]] * 2,
        }
    )
    done = cloud.run("tpu.sh", "create", "--name=a", "--queued")
    assert done.returncode == 0, done.stdout
    (delete,) = cloud.calls("queued-resources", "delete")
    assert "--force" in delete
    assert len(cloud.calls("create")) == 2


def test_what_cannot_work_is_not_asked_for_again(cloud):
    cloud.answers({"create": [[1, "ERROR: PERMISSION_DENIED: tpu.nodes.create"]]})
    done = cloud.run("tpu.sh", "run", *TRAIN)
    assert done.returncode == 1
    assert len(cloud.calls("create")) == 1
    assert "PERMISSION_DENIED" in done.stdout


def test_an_ssh_that_fails_once_is_tried_again(cloud):
    cloud.answers({"ssh 1": [[255, "ssh: connect to host: Connection refused"]]})
    done = cloud.run("tpu.sh", "run", *TRAIN)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("status", [1, 2])
def test_a_failed_training_ends_the_run_and_shows_the_worker_to_blame(cloud, status):
    cloud.train(
        f"if [ $WORKER = 1 ]; then echo error: no records; exit {status}; fi\n"
        "sleep 0.6; echo error: lost worker 1; exit 1"
    )
    done = cloud.run("tpu.sh", "run", *TRAIN)
    assert done.returncode == 1
    assert "[1] error: no records" in done.stdout
    assert "the training failed (worker 1 ended first)" in done.stdout
    assert "costs money: launch/tpu.sh logs|delete --name=a" in done.stdout
    assert len(cloud.trainings()) == 2
    assert cloud.slices() == ["a"]


@pytest.mark.slow
def test_a_training_that_saved_is_resumed_on_the_same_slice(cloud):
    cloud.train("[ -e seen ] || { touch seen; exit 3; }")
    done = cloud.run("tpu.sh", "run", *TRAIN)
    assert done.returncode == 0, done.stdout
    assert len(cloud.calls("create")) == 1
    assert len(cloud.trainings()) == 4


@pytest.mark.slow
def test_a_training_that_crashes_again_and_again_is_given_up(cloud):
    cloud.train("echo out of memory; exit 137")
    done = cloud.run("tpu.sh", "run", *TRAIN)
    assert done.returncode == 1
    assert "crashed three times in a row" in done.stdout
    assert "out of memory" in done.stdout
    assert len(cloud.trainings()) == 6


@pytest.mark.slow
def test_a_training_that_hangs_is_started_again(cloud):
    cloud.train("[ -e seen ] || { touch seen; sleep 100; }")
    done = cloud.run("tpu.sh", "run", *TRAIN, "--hang-seconds=1")
    assert done.returncode == 0, done.stdout
    assert "no line in worker 0's log" in done.stdout
    assert len(cloud.trainings()) == 4


@pytest.mark.slow
def test_a_run_that_is_stopped_by_hand_ends(cloud):
    # `stop` on another terminal: here the workers do it themselves.
    cloud.train(
        'trap "exit 3" TERM\n'
        '(sleep 0.3; bash launch/worker.sh stop "$FAKE_NAME" 5) & sleep 10 & wait $!'
    )
    done = cloud.run("tpu.sh", "run", *TRAIN)
    assert done.returncode == 3, done.stdout
    assert "stopped by hand; the slice stays" in done.stdout
    assert len(cloud.trainings()) == 2


@pytest.mark.slow
def test_three_stages_side_by_side(cloud):
    # None ends before all have begun.
    cloud.train(
        'touch "$FAKE_CLOUD/began-$FAKE_NAME"\n'
        'until [ "$(ls "$FAKE_CLOUD" | grep -c began-)" = 3 ]; do sleep 0.1; done\n'
        '[ "$FAKE_NAME" != a-sr256 ] || exit 1'
    )
    words = ("--name=a", "--workdir=gs://b/run", "--", "--config.data.records=gs://b/r")
    done = cloud.run("tpu.sh", "cascade", *words)
    assert done.returncode == 1
    for stage, status in (("base", 0), ("sr256", 1), ("sr1024", 0)):
        assert f"{stage} ended with status {status}" in done.stdout
    assert cloud.slices() == ["a-sr256"]
    types = {c[4]: c[6] for c in cloud.calls("create")}
    assert types == {
        "a-base": "--accelerator-type=v4-512",
        "a-sr256": "--accelerator-type=v4-256",
        "a-sr1024": "--accelerator-type=v4-256",
    }
    base = "--config=configs/base64.py --workdir=gs://b/run/base --distributed"
    (command,) = {c for c in cloud.trainings() if base in c}
    assert command.endswith("--config.data.records=gs://b/r --config.mesh.fsdp=32")
