#!/usr/bin/env bash
# Trains stages on GKE: launch/README.md is the runbook.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

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
env||VARIABLE=value words for the training
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

# Words as the inside of a JSON (and YAML) list.
json_list() {
  local word list=""
  for word in "$@"; do
    word=${word//\\/\\\\}
    list+="${list:+, }\"${word//\"/\\\"}\""
  done
  printf '[%s]' "$list"
}

json_environment() {
  local word list=""
  for word in "$@"; do
    [[ $word == *=* ]] || die 2 "--env has '$word': write VARIABLE=value"
    list+="${list:+, }{\"name\": $(json_word "${word%%=*}"),"
    list+=" \"value\": $(json_word "${word#*=}")}"
  done
  printf '[%s]' "$list"
}

json_word() {
  local list
  list=$(json_list "$1")
  list=${list#[}
  printf '%s' "${list%]}"
}

render() {
  require image config workdir
  local chips=1 side words text key
  [[ ${opt[topology]} =~ ^[0-9]+(x[0-9]+){1,2}$ ]] ||
    die 2 "--topology is '${opt[topology]}': write it as 4x8x8"
  for side in ${opt[topology]//x/ }; do chips=$((chips * side)); done
  # A slice smaller than a host has a machine type of its own.
  local per_host=${opt[chips-per-host]}
  ((chips >= per_host)) || per_host=$chips
  ((chips % per_host == 0)) ||
    die 2 "--topology ${opt[topology]} has $chips chips, no multiple of" \
      "--chips-per-host $per_host"
  read -ra words <<<"${opt[env]}"
  local -A value=(
    [NAME]=${opt[name]} [NAMESPACE]=${opt[namespace]} [IMAGE]=${opt[image]}
    [ACCELERATOR]=${opt[accelerator]} [TOPOLOGY]=${opt[topology]}
    [SLICES]=${opt[slices]} [HOSTS]=$((chips / per_host)) [CHIPS]=$per_host
    [MAX_RESTARTS]=${opt[max-restarts]} [SERVICE_ACCOUNT]=${opt[service-account]}
    [SPOT_NODES]=$([[ ${opt[spot]} == false ]] ||
      echo 'cloud.google.com/gke-spot: "true"')
    [SPOT_TOLERATIONS]=$([[ ${opt[spot]} == false ]] && echo '[]' ||
      echo '[{key: cloud.google.com/gke-spot, operator: Exists}]')
    [ENVIRONMENT]=$(json_environment "${words[@]}")
    [ARGUMENTS]=$(json_list "--config=${opt[config]}" "--workdir=${opt[workdir]}" \
      --distributed "--start_timeout_seconds=${opt[start-timeout-seconds]}" "${rest[@]}")
  )
  text=$(<"$here/gke/jobset.yaml")
  for key in "${!value[@]}"; do
    text=${text//"\${$key}"/"${value[$key]}"}
  done
  printf '%s\n' "$text"
}

kube() {
  local words=("--namespace=${opt[namespace]}")
  [[ -z ${opt[context]} ]] || words+=("--context=${opt[context]}")
  kubectl "${words[@]}" "$@"
}

main() {
  local command=${1:---help} word
  case $command in
    --help | -h | help) usage && return ;;
    render | apply | logs | status | delete) shift ;;
    *) die 2 "'$command' is no command (see --help)" ;;
  esac
  for word in "$@"; do
    [[ $word != -- ]] || break
    [[ $word != --help && $word != -h ]] || { usage && return; }
  done
  load_options
  parse_options "$@"
  require name
  check_name "${opt[name]}"
  [[ $command == render ]] ||
    need kubectl "install it ('gcloud components install kubectl') and get the cluster's credentials"
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
