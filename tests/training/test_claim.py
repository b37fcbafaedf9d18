"""Who holds a workdir: one run at a time."""

import os
import subprocess
import sys

import pytest

from imagen_jax.errors import UserError
from imagen_jax.training.claim import FILE_NAME, Claim
from tests.test_bucket import bucket  # noqa: F401


def test_a_workdir_on_a_disk_has_one_run(tmp_path):
    first = Claim(str(tmp_path / "run"))
    with pytest.raises(UserError, match=rf"work in .*/run \(process {os.getpid()} on"):
        Claim(str(tmp_path / "run"))
    first.check()
    Claim(str(tmp_path / "other"))
    first.close()
    Claim(str(tmp_path / "run")).close()


def test_a_lock_dies_with_its_process(tmp_path):
    code = f"""
from imagen_jax.training.claim import Claim
claim = Claim({str(tmp_path)!r})
print("held", flush=True)
input()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"process {process.pid} on"):
            Claim(str(tmp_path))
        process.kill()
        process.wait()
    Claim(str(tmp_path)).close()


def test_the_newer_run_has_a_workdir_in_a_bucket(bucket):  # noqa: F811
    older = Claim("gs://b/run")
    older.check()
    newer = Claim("gs://b/run")
    newer.check()
    with pytest.raises(UserError, match=r"a newer run has taken gs://b/run \(process"):
        older.check()
    older.close()
    newer.check()
    assert (bucket / "run" / FILE_NAME).exists()
