#!/usr/bin/env bash
# Trains stages on GKE: launch/README.md is the runbook.
set -euo pipefail
here=$(CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# Read by lib.sh.
# shellcheck disable=SC2034
OPTIONS='
name||of the JobSet
namespace|default|in which it runs
context||of kubectl; empty is the current one
image||built from launch/gke/Dockerfile and pushed
config||of the stage, such as configs/base64.py
workdir||of the run, such as gs://BUCKET/base
accelerator|tpu-v4-podslice|the node pool'\''s gke-tpu-accelerator; v5e: tpu-v5-lite-podslice, v5p: tpu-v5p-slice, v6e: tpu-v6e-slice
topology|2x2x1|of one slice; v4-512 is 4x8x8
slices|1|joined into one training
chips-per-host|4|of the node pool'\''s machines
service-account|default|Kubernetes service account that may write to the bucket
spot|false|run on Spot nodes
max-restarts|50|of the whole JobSet; preemptions count too
env||VARIABLE=value for the training; once for each
start-timeout-seconds|600|how long a worker waits for the others
'
# shellcheck source=launch/lib.sh
source "$here/lib.sh"

usage() {
  cat <<END
Trains stages on TPUs of a GKE cluster as a JobSet. See launch/README.md.

  launch/gke.sh COMMAND [--flag=value ...] [-- FLAGS OF imagen_jax.train ...]

  render    print the manifest
  apply     hand it to the cluster
  logs      follow the log of every worker, each line with its pod
  status    the JobSet and its pods
  delete    end the training and remove the JobSet

Each flag can be given in the environment too (--name as LAUNCH_NAME). Defaults:

END
  print_options
}

render() {
  require image config workdir
  local chips=1 side
  for side in ${opt[topology]//x/ }; do chips=$((chips * side)); done
  # A slice smaller than a host has a machine type of its own.
  local per_host=${opt[chips-per-host]}
  ((chips >= per_host)) || per_host=$chips
  ((chips % per_host == 0)) ||
    die 2 "--topology ${opt[topology]} has $chips chips, no multiple of" \
      "--chips-per-host $per_host"
  # Isolated: a json.py in the current folder is none of its modules.
  python3 -IX utf8 "$here/gke/fill.py" "$here/gke/jobset.yaml" \
    "NAME=${opt[name]}" "NAMESPACE=${opt[namespace]}" "IMAGE=${opt[image]}" \
    "ACCELERATOR=${opt[accelerator]}" "TOPOLOGY=${opt[topology]}" "SPOT=${opt[spot]}" \
    "SLICES=${opt[slices]}" "HOSTS=$((chips / per_host))" "CHIPS=$per_host" \
    "MAX_RESTARTS=${opt[max-restarts]}" "SERVICE_ACCOUNT=${opt[service-account]}" \
    -- "${variables[@]}" -- "--config=${opt[config]}" "--workdir=${opt[workdir]}" \
    --distributed "--start_timeout_seconds=${opt[start-timeout-seconds]}" "${rest[@]}"
}

kube() {
  local words=("--namespace=${opt[namespace]}")
  [[ -z ${opt[context]} ]] || words+=("--context=${opt[context]}")
  kubectl "${words[@]}" "$@"
}

main() {
  local command=${1---help}
  case $command in
    --help | -h | help) usage && return ;;
    render | apply | logs | status | delete) shift ;;
    *) die 2 "${command@Q} is no command (see --help)" ;;
  esac
  load_options
  parse_options "$@"
  require name
  [[ $command == render ]] ||
    need kubectl "install it ('gcloud components install kubectl') and get the cluster's credentials"
  need python3 "it writes the manifest"
  local manifest pods="jobset.sigs.k8s.io/jobset-name=${opt[name]}"
  case $command in
    render) render ;;
    apply)
      manifest=$(render)
      kube apply --filename=- <<<"$manifest"
      say "follow it with: launch/gke.sh logs --name=${opt[name]}"
      ;;
    logs)
      kube logs --follow --prefix --tail=20 --max-log-requests=1000 \
        "--selector=$pods" --container=train
      ;;
    status)
      kube get jobset "${opt[name]}"
      kube get pods "--selector=$pods" --output=wide
      ;;
    delete) kube delete jobset "${opt[name]}" ;;
  esac
}

main "$@"
