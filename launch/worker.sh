#!/usr/bin/env bash
# Runs on a worker: installs, and keeps a training alive that outlives the ssh.
#
#   worker.sh install                  Python and packages into .venv of this checkout
#   worker.sh start RUN COMMAND...     starts it, unless it is running
#   worker.sh status RUN               one of the lines below, then the log's last line
#   worker.sh log RUN [LINES]          the end of its log
#   worker.sh follow RUN               its log until it ends, then its status
#   worker.sh stop RUN [SECONDS]       SIGTERM: it saves and ends; SIGKILL afterwards
#
# Statuses: none | running SECONDS_SINCE_ITS_LAST_LINE | exited STATUS WHEN |
# stopped STATUS WHEN (by `stop`) | lost (the machine went down under it)
set -euo pipefail
here=$(CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

usage() {
  sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
}

install_packages() {
  cd "$here"
  local python=""
  for python in python3.13 python3.12 python3.11 ""; do
    command -v "${python:-none}" >/dev/null && break
  done
  if [[ -x .venv/bin/python ]]; then
    :
  elif [[ -n $python ]] && "$python" -m venv .venv; then
    :
  else
    # The images of TPU VMs have an older Python, and nobody may be there to sudo.
    rm -rf .venv
    python3 -m pip install --quiet --user --upgrade uv
    python3 -m uv venv --quiet --seed --python 3.11 .venv
  fi
  .venv/bin/python -m pip install --quiet --upgrade pip
  .venv/bin/python -m pip install --quiet --editable ".[${EXTRA:-tpu}]"
  echo "installed in $here"
}

# A run holds the lock as long as it lives: no process id can be mistaken for it.
is_running() {
  [[ -e $folder/lock ]] && ! flock --nonblock "$folder/lock" true
}

start() {
  mkdir -p "$folder"
  if is_running; then
    echo "$run is already running"
    return
  fi
  rm -f "$folder"/{status,stopped,group}
  setsid "${BASH_SOURCE[0]}" supervise "$run" "$@" </dev/null >/dev/null 2>&1 &
  for _ in {1..100}; do
    [[ -e $folder/group ]] && echo "$run started" && return
    sleep 0.1
  done
  echo "error: $run did not start" >&2
  exit 1
}

supervise() {
  local child status=0
  exec 9>"$folder/lock"
  flock --nonblock 9 || exit 0
  trap '' HUP
  echo "=== $(date -u +%FT%TZ)$(printf ' %q' "$@")" >>"$folder/log"
  "$@" >>"$folder/log" 2>&1 &
  child=$!
  trap 'kill -TERM "$child" 2>/dev/null || true' TERM
  heed_notices "$child" 9>&- &
  echo "$$" >"$folder/group.new"
  mv "$folder/group.new" "$folder/group"
  while :; do
    wait "$child" && status=0 || status=$?
    kill -0 "$child" 2>/dev/null || break
  done
  echo "=== $(date -u +%FT%TZ) exit status $status" >>"$folder/log"
  echo "$status $(date +%s.%N)" >"$folder/status.new"
  mv "$folder/status.new" "$folder/status"
}

# heed_notices PID: SIGTERM to it when Google is about to take the machine away: half a
# minute ahead at a preemption, up to an hour before maintenance that ends the machine.
heed_notices() {
  local product=/sys/class/dmi/id/product_name
  [[ -n ${GCE_METADATA_HOST:-} || $(cat "$product" 2>/dev/null) == Google* ]] || return 0
  heed "$1" preempted TRUE &
  heed "$1" maintenance-event TERMINATE_ON_HOST_MAINTENANCE &
}

# heed PID KEY VALUE: waits for the metadata server's KEY to become VALUE. If it was so
# from the start it has stopped a training already, and this one may go on.
heed() {
  local url=http://${GCE_METADATA_HOST:-metadata.google.internal}
  local before="" now
  url+=/computeMetadata/v1/instance/$2
  while kill -0 "$1" 2>/dev/null; do
    if ! now=$(curl --silent --fail --noproxy '*' --header 'Metadata-Flavor: Google' \
      "$url${before:+?wait_for_change=true&timeout_sec=60}"); then
      sleep "${NOTICE_RETRY_SECONDS:-10}"
    elif [[ -n $before && $before != "$3" && $now == "$3" ]]; then
      echo "=== $(date -u +%FT%TZ) notice: $2 is $3" >>"$folder/log"
      kill -TERM "$1" 2>/dev/null || true
      return
    else
      before=$now
    fi
  done
}

status() {
  local changed
  if is_running; then
    changed=$(stat --format=%Y "$folder/log")
    echo "running $(($(date +%s) - changed))"
  elif [[ -e $folder/status && -e $folder/stopped ]]; then
    echo "stopped $(<"$folder/status")"
  elif [[ -e $folder/status ]]; then
    echo "exited $(<"$folder/status")"
  elif [[ -e $folder/group ]]; then
    echo "lost"
  else
    echo "none"
    return
  fi
  show_log 1
}

# Progress bars return the carriage; a reader of lines would wait for ever.
show_log() {
  [[ -e $folder/log ]] || return 0
  tail -c 200000 "$folder/log" | tr '\r' '\n' | grep -v '^$' | tail -n "$1" || true
}

follow() {
  show_log 20
  if is_running; then
    tail -n 0 -F --pid="$(<"$folder/group")" "$folder/log" 2>/dev/null |
      stdbuf -o0 tr '\r' '\n'
  fi
  status | head -n 1
}

stop() {
  local waits
  is_running || return 0
  touch "$folder/stopped"
  kill -TERM "$(<"$folder/group")"
  for ((waits = 0; waits < 5 * ${1:-300}; waits++)); do
    is_running || break
    sleep 0.2
  done
  if is_running; then
    echo "$run did not end: killed"
    kill -KILL -- "-$(<"$folder/group")"
    echo "137 $(date +%s.%N)" >"$folder/status"
  fi
}

fail() {
  echo "error: $*" >&2
  exit 2
}

command=${1---help}
run=${2:-}
folder=$HOME/imagen-runs/$run
case $command in
  start | supervise | status | log | follow | stop)
    [[ $run =~ ^[a-zA-Z0-9][-._a-zA-Z0-9]*$ ]] ||
      fail "RUN is ${run@Q}: use letters, digits, dashes, dots and _"
    ;;&
  start | supervise) (($# > 2)) || fail "there is no COMMAND to $command" ;;&
  log | stop)
    [[ ${3-0} =~ ^(0|[1-9][0-9]{0,8})$ ]] || fail "${3@Q} is no whole number"
    ;;&
  --help | -h) usage ;;
  install) install_packages ;;
  start | supervise | stop) "$command" "${@:3}" ;;
  status) status ;;
  log) show_log "${3:-40}" ;;
  follow) follow ;;
  *) fail "${command@Q} is no command (see --help)" ;;
esac
