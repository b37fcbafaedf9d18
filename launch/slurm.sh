#!/usr/bin/env bash
#SBATCH --job-name=imagen
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#SBATCH --signal=TERM@300
#
# Trains a stage on GPUs under Slurm, one process for each GPU:
#
#   sbatch --nodes=4 launch/slurm.sh --config=configs/base64.py --workdir=/shared/base
#
# Every #SBATCH line gives way to a flag of sbatch's own; all that follows the script
# are flags of imagen_jax.train. In the environment: PYTHON (default .venv/bin/python,
# in the folder that sbatch is called from) and START_TIMEOUT_SECONDS (default 120).
#
# 300 seconds before its time is over the training gets SIGTERM, saves and ends with
# status 3; the job then goes back to the queue and resumes. A preempted job does the
# same if the cluster sends SIGTERM (GraceTime) and requeues. Status 0, 1 and 2 end it.
set -euo pipefail

complain() { echo "error: $*" >&2; }

case ${1---help} in
  --help | -h) sed -n '/^# Trains/,/^set/s/^# \{0,1\}//p' "$0" && exit ;;
esac
if [[ -z ${SLURM_JOB_ID:-} ]]; then
  complain "this is for Slurm: sbatch [--nodes=N] launch/slurm.sh$(printf ' %q' "$@")"
  exit 2
fi
python=${PYTHON:-.venv/bin/python}
if ! command -v -- "$python" >/dev/null; then
  complain "there is no ${python@Q} in $PWD: set PYTHON, or call sbatch where the" \
    "virtual environment is"
  exit 2
fi
# Since Slurm 22.05 a step does not take this from its job.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
# jax.distributed gives process i of a node its GPU i: each has to see all of them, so
# no --gpus-per-task. One that ends must not end the others while they save.
status=0
srun --kill-on-bad-exit=0 --wait=300 --label \
  "$python" -m imagen_jax.train --distributed \
  --start_timeout_seconds="${START_TIMEOUT_SECONDS:-120}" "$@" || status=$?
echo "training ended with status $status"
if ((status == 3)); then
  scontrol requeue "$SLURM_JOB_ID"
  # Slurm ends this script when it takes the job back.
  sleep "${REQUEUE_SECONDS:-60}"
fi
exit "$status"
