#!/usr/bin/env bash
# Trains stages on Cloud TPU VMs: launch/README.md is the runbook.
set -euo pipefail
here=$(CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

OPTIONS='
name||of the slice
project||Google Cloud project; empty is the one that gcloud is set to
zone||where the slice is, such as us-central2-b
accelerator-type|v4-8|the slice; v4-512 has 256 chips on 64 workers
runtime-version|tpu-ubuntu2204-base|of the VMs; v5e: v2-alpha-tpuv5-lite, v5p: v2-alpha-tpuv5, v6e: v2-alpha-tpuv6e
spot|false|cheaper, and may be taken away
queued|false|ask by a queued resource, which waits in line for chips
create-args||more words for gcloud'\''s create, such as --service-account=... --network=...
ssh-args||more words for gcloud'\''s ssh and scp, such as --internal-ip
repo||git URL to clone on the workers; empty copies this checkout'\''s commit
commit|HEAD|what to install
config||of the stage, such as configs/base64.py
workdir||of the run, such as gs://BUCKET/base
env||VARIABLE=value for the training; once for each
start-timeout-seconds|120|how long a worker waits for the others
worker|all|for logs: one worker'\''s number
stages|base configs/base64.py v4-512 --config.mesh.fsdp=32; sr256 configs/sr256.py v4-256 --config.mesh.fsdp=8; sr1024 configs/sr1024.py v4-256 --config.mesh.fsdp=8|for cascade: NAME CONFIG ACCELERATOR_TYPE [TRAIN FLAG...] of each stage
keep|false|run leaves the slice when it is done
parallel|16|workers that are talked to at once
retries|20|times that a refused slice is asked for again, and 3 at most for a worker
retry-seconds|60|before the first of these; doubles each time
retry-max-seconds|960|at most
poll-seconds|30|between looks at a slice and its training
wait-seconds|86400|how long a slice may take to come
hang-seconds|3600|how long worker 0 may log nothing; a first step may compile for long
short-run-seconds|900|a training that crashed sooner than this three times in a row is given up
stop-seconds|300|how long a stopped training may take to save
'
# shellcheck source=launch/lib.sh
source "$here/lib.sh"

usage() {
  cat <<END
Trains stages on Cloud TPU VMs. See launch/README.md.

  launch/tpu.sh COMMAND [--flag=value ...] [-- FLAGS OF imagen_jax.train ...]

  create    ask for a slice and wait until it is ready
  install   put this checkout's commit and its packages on every worker
  train     start a stage on every worker and come back
  logs      follow the log of every worker, each line with the worker's number
  status    how the slice and the training on each worker stand
  stop      the training saves and ends; the slice stays
  delete    give the slice back
  run       create, install, train, follow; when the slice is taken away or the training
            was stopped, again, until the training is done; then delete
  cascade   one run for each stage, side by side, each on its own slice

Each flag can be given in the environment too (--name as LAUNCH_NAME). Defaults:

END
  print_options
  cat <<'END'

Exit status: 0 done, 1 error, 2 wrong flags, 3 stopped.
END
}

# --- gcloud ---------------------------------------------------------------------------

# Words that every call has, behind its own.
place() {
  place_words=("--zone=${opt[zone]}" --quiet)
  [[ -z ${opt[project]} ]] || place_words+=("--project=${opt[project]}")
}

tpu_vm() { gcloud compute tpus tpu-vm "$@" "${place_words[@]}"; }

queued_resource() { gcloud compute tpus queued-resources "$@" "${place_words[@]}"; }

# What a refused request says when asking again may help; the rest is the user's to mend.
RETRY='quota|no more capacity|insufficient.*capacity|RESOURCE_EXHAUSTED|RESOURCE_POOL'
RETRY+='|UNAVAILABLE|INTERNAL|DEADLINE_EXCEEDED|try again|timed out|connection'
ABSENT='not found|NOT_FOUND'

# Prints the state of the slice: READY, CREATING, PREEMPTED, ..., ABSENT when there is
# none, UNKNOWN when nobody answers.
slice_state() {
  state_of tpu_vm 'value(state)'
}

request_state() {
  state_of queued_resource 'value(state.state)'
}

state_of() {
  local state
  if state=$("$1" describe "${opt[name]}" --format="$2" 2>"$scratch/describe"); then
    echo "${state:-UNKNOWN}"
  elif grep -qiE "$ABSENT" "$scratch/describe"; then
    echo ABSENT
  else
    echo UNKNOWN
  fi
}

is_gone() {
  [[ $1 =~ ^(ABSENT|PREEMPTED|TERMINATED|STOPPING|STOPPED|DELETING|HIDING|HIDDEN)$ ]]
}

ask_for_slice() {
  local words
  split create-args "${opt[create-args]}"
  [[ ${opt[spot]} == false ]] || words=(--spot "${words[@]}")
  words=("--accelerator-type=${opt[accelerator-type]}" "${words[@]}")
  if [[ ${opt[queued]} == true ]]; then
    queued_resource create "${opt[name]}" "--node-id=${opt[name]}" \
      "--runtime-version=${opt[runtime-version]}" "${words[@]}"
  else
    tpu_vm create "${opt[name]}" "--version=${opt[runtime-version]}" "${words[@]}"
  fi
}

# There is a slice afterwards: the one that is there, or is on its way, or a new one.
create() {
  local state request=ABSENT type
  state=$(slice_state)
  [[ ${opt[queued]} == false ]] || request=$(request_state)
  if [[ $state == UNKNOWN || $request == UNKNOWN ]]; then
    die "gcloud does not tell whether there is a ${opt[name]}:" \
      "$(tail -n 5 "$scratch/describe")"
  fi
  if [[ $state != ABSENT ]] && ! is_gone "$state"; then
    type=$(tpu_vm describe "${opt[name]}" --format='value(acceleratorType)')
    [[ ${type##*/} == "${opt[accelerator-type]}" ]] ||
      die "there is a ${opt[name]} already, a $type and no ${opt[accelerator-type]}:" \
        "give another --name, or delete it"
    wait_for_slice && say "${opt[name]} is ready" && return
  elif [[ $request =~ ^(WAITING_FOR_RESOURCES|ACCEPTED|CREATING|PROVISIONING)$ ]]; then
    # It keeps its place in the line.
    wait_for_slice && say "${opt[name]} is ready" && return
  fi
  # A suspended request, or a preempted slice, is in the way of a new one.
  [[ $state == ABSENT && $request == ABSENT ]] || release || true
  obtain
}

# Waits for what was asked for. Status 1: it was refused or taken away meanwhile.
wait_for_slice() {
  local start=$SECONDS state before=""
  while :; do
    state=$(slice_state)
    [[ $state != READY ]] || return 0
    if [[ ${opt[queued]} == true ]]; then
      state=$(request_state)
      if [[ $state =~ ^(FAILED|SUSPENDING|SUSPENDED|DELETING|ABSENT)$ ]]; then
        echo "the queued resource ended as $state" >"$scratch/create"
        return 1
      fi
    elif is_gone "$state"; then
      echo "the slice ended as $state" >"$scratch/create"
      return 1
    fi
    [[ $state == "$before" ]] || say "${opt[name]} is $state"
    before=$state
    ((SECONDS - start < ${opt[wait-seconds]})) ||
      die "${opt[name]} is still $state after ${opt[wait-seconds]} s" \
        "(--wait-seconds); delete it or go on waiting with the same command"
    sleep "${opt[poll-seconds]}"
  done
}

# Asks until there is a slice, at most --retries times more.
obtain() {
  local attempt last
  for ((attempt = 1; ; attempt++)); do
    say "asking for ${opt[name]}: ${opt[accelerator-type]} in ${opt[zone]}"
    if ask_for_slice >"$scratch/create" 2>&1; then
      wait_for_slice && say "${opt[name]} is ready" && return
      release
    elif ! grep -qiE "$RETRY" "$scratch/create"; then
      die "${opt[name]} cannot be created: $(tail -n 5 "$scratch/create")"
    fi
    last=$(grep -iE "$RETRY|ERROR|ended as" "$scratch/create" | tail -n 1)
    say "refused: $last"
    ((attempt <= opt[retries])) ||
      die "${opt[name]} (${opt[accelerator-type]} in ${opt[zone]}) was refused" \
        "$attempt times, last: $last. See 'Quota' and 'No capacity' in launch/README.md"
    backoff "$attempt"
  done
}

# Deletes the slice and its queued resource, which counts against the quota even when
# it is suspended. Status 1: there was none.
release() {
  local calls=(tpu_vm delete "${opt[name]}")
  [[ ${opt[queued]} == false ]] ||
    calls=(queued_resource delete "${opt[name]}" --force)
  if "${calls[@]}" >"$scratch/delete" 2>&1; then
    say "${opt[name]} is deleted"
  elif grep -qiE "$ABSENT" "$scratch/delete"; then
    return 1
  else
    die "${opt[name]} could not be deleted and may still cost money:" \
      "$(tail -n 5 "$scratch/delete")"
  fi
}

# --- workers --------------------------------------------------------------------------

# Sets `workers`.
count_workers() {
  local found
  if ! found=$(
    tpu_vm describe "${opt[name]}" --format='value(networkEndpoints[].ipAddress)'
  ); then
    complain "${opt[name]} does not answer: is it created, is --zone right?"
    return 1
  fi
  workers=$(tr ';,' '  ' <<<"$found" | wc -w)
  ((workers > 0)) || complain "${opt[name]} has no workers yet; look at 'status'"
}

# on_worker NUMBER COMMAND: the command is one line of shell.
on_worker() {
  local words
  split ssh-args "${opt[ssh-args]}"
  tpu_vm ssh "${opt[name]}" "--worker=$1" "${words[@]}" --command="$2" </dev/null
}

copy_to_worker() {
  local words
  split ssh-args "${opt[ssh-args]}"
  tpu_vm scp "$2" "${opt[name]}:$3" "--worker=$1" "${words[@]}" </dev/null
}

# each_worker TRIES CALL ARGUMENT...: `CALL NUMBER ARGUMENT...` for every worker, some at
# once; what they print goes out with their numbers and into $scratch/NUMBER.log. The
# numbers of those that failed are then in `failed`.
contacted=0
each_worker() {
  local number
  rm -f "$scratch"/*.{log,status}
  for ((number = 0; number < workers; number++)); do
    # gcloud makes and spreads its key on the first contact: not many times at once.
    ((number == 0 || contacted)) || wait
    ((number == 0)) || contacted=1
    while (($(jobs -pr | wc -l) >= opt[parallel])); do wait -n || true; done
    try_worker "$number" "$@" &
  done
  wait
  failed=()
  for ((number = 0; number < workers; number++)); do
    [[ $(<"$scratch/$number.status") == 0 ]] || failed+=("$number")
  done
}

try_worker() {
  local number=$1 tries=$2 attempt status
  set +e
  for ((attempt = 1; attempt <= tries; attempt++)); do
    ((attempt == 1)) || backoff "$((attempt - 1))" >/dev/null
    "$3" "$number" "${@:4}" 2>&1 | tee "$scratch/$number.log" | prefix "[$number] "
    status=${PIPESTATUS[0]}
    echo "$status" >"$scratch/$number.status"
    ((status != 0)) || break
  done
}

# all_workers WHAT TRIES CALL ARGUMENT...: status 1, and why, when one of them failed.
all_workers() {
  local number
  each_worker "${@:2}"
  ((${#failed[@]})) || return 0
  for number in "${failed[@]}"; do
    printf 'worker %s: status %s, last lines:\n' "$number" \
      "$(<"$scratch/$number.status")" >&2
    tail -n 10 "$scratch/$number.log" | prefix "    " >&2
  done
  complain "$1 failed on worker ${failed[*]} of ${opt[name]} ($workers workers)"
}

# --- install and train ----------------------------------------------------------------

# These return 1 after saying why: `run` may know a way out.

install() {
  local unpack commit
  count_workers || return
  if [[ -n ${opt[repo]} ]]; then
    commit=${opt[commit]}
    [[ $commit != HEAD ]] || commit=origin/HEAD
    unpack="[ -d imagen-jax/.git ] || git clone --quiet -- $(quoted "${opt[repo]}") imagen-jax"
    unpack+=" && cd imagen-jax && git fetch --quiet origin"
    unpack+=" && git checkout --quiet $(quoted "$commit") --" # never a file of this name
  else
    commit=$(git -C "$here" rev-parse --verify --quiet --short "${opt[commit]}^{commit}") ||
      die 2 "--commit is ${opt[commit]@Q}: no such commit in $here"
    [[ -z $(git -C "$here" status --porcelain --untracked-files=no) ]] ||
      say "warning: changes that are not committed are not installed"
    git -C "$here/.." archive --format=tar.gz --output="$scratch/imagen-jax.tar.gz" \
      "$commit" || return
    all_workers "copying the code" "$worker_tries" copy_to_worker \
      "$scratch/imagen-jax.tar.gz" imagen-jax.tar.gz || return
    unpack='mkdir -p imagen-jax && tar -xzf imagen-jax.tar.gz -C imagen-jax'
    unpack+=' && cd imagen-jax'
  fi
  all_workers "installing" "$worker_tries" on_worker \
    "$unpack && bash launch/worker.sh install" || return
  say "$commit is installed on $workers workers of ${opt[name]}"
}

worker_sh() { echo "bash imagen-jax/launch/worker.sh $(quoted "$@")"; }

train() {
  local command
  command=(
    env PYTHONUNBUFFERED=1 "${variables[@]}" .venv/bin/python -m imagen_jax.train
    "--config=${opt[config]}" "--workdir=${opt[workdir]}" --distributed
    "--start_timeout_seconds=${opt[start-timeout-seconds]}" "${rest[@]}"
  )
  count_workers || return
  all_workers "starting the training" "$worker_tries" on_worker \
    "cd imagen-jax && bash launch/worker.sh start $(quoted "${opt[name]}" "${command[@]}")"
}

follow_logs() {
  local command
  command=$(worker_sh follow "${opt[name]}")
  count_workers
  if [[ ${opt[worker]} != all ]]; then
    on_worker "${opt[worker]}" "$command" 2>&1 | prefix "[${opt[worker]}] "
    return
  fi
  on_worker 0 true >/dev/null
  # Each call lasts as long as the training.
  contacted=1 opt[parallel]=$workers
  all_workers "following the log" 1 on_worker "$command"
}

show_status() {
  local state
  state=$(slice_state)
  say "${opt[name]} is $state"
  [[ ${opt[queued]} == false ]] || say "its queued resource is $(request_state)"
  [[ $state == READY ]] || return 0
  count_workers
  all_workers "asking" 1 on_worker "$(worker_sh status "${opt[name]}")"
}

stop() {
  count_workers
  all_workers "stopping" "$worker_tries" on_worker \
    "$(worker_sh stop "${opt[name]}" "${opt[stop-seconds]}")"
}

# shellcheck source=launch/tpu_run.sh
source "$here/tpu_run.sh"

main() {
  local command=${1---help}
  case $command in
    --help | -h | help) usage && return ;;
    create | install | train | logs | status | stop | delete | run | cascade) shift ;;
    *) die 2 "${command@Q} is no command (see --help)" ;;
  esac
  load_options
  parse_options "$@"
  require name zone
  case $command in
    train | run) require config workdir ;;
    cascade) require workdir ;;
  esac
  need gcloud "install the Google Cloud CLI, then 'gcloud auth login'"
  worker_tries=$((opt[retries] < 3 ? opt[retries] + 1 : 3))
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
  place
  case $command in
    logs) follow_logs ;;
    status) show_status ;;
    delete) release || say "there is no ${opt[name]}" ;;
    *) "$command" ;;
  esac
}

main "$@"
