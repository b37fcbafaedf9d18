# shellcheck shell=bash
# What the launch scripts share: messages, options, waiting. Sourced, not run.

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "error: bash 4.4 or newer is needed, this is $BASH_VERSION" >&2
  exit 2
fi

say() { printf '%s %s\n' "$(date +%H:%M:%S)" "$*"; }

complain() {
  printf 'error: %s\n' "$*" >&2
  return 1
}

# die [STATUS] MESSAGE: 1 is an error, 2 a wrong flag, as in the Python programs.
die() {
  local status=1
  [[ $1 =~ ^[0-9]+$ ]] && status=$1 && shift
  complain "$@" || exit "$status"
}

need() {
  command -v "$1" >/dev/null || die "there is no '$1' on the PATH: $2"
}

# Options are lines "name|default|meaning" in OPTIONS. A flag comes before the
# environment's LAUNCH_NAME (dashes as underscores), which comes before the default. A
# default of true or false makes a switch.
declare -A opt=()
declare -A default=()
rest=()

option_variable() {
  local name=${1//-/_}
  printf 'LAUNCH_%s' "${name^^}"
}

load_options() {
  local name value meaning variable
  while IFS='|' read -r name value meaning; do
    [[ -n $name ]] || continue
    variable=$(option_variable "$name")
    default[$name]=$value
    opt[$name]=${!variable-$value}
  done <<<"$OPTIONS"
}

print_options() {
  local name value meaning
  while IFS='|' read -r name value meaning; do
    [[ -n $name ]] || continue
    printf '  --%s%s\n      %s\n' "$name" "${value:+=$value}" "$meaning"
  done <<<"$OPTIONS"
}

# parse_options ARGUMENT...: fills `opt`, and `rest` with what follows "--".
parse_options() {
  local word name
  while (($#)); do
    word=$1
    shift
    case $word in
      --) rest=("$@") && break ;;
      --*) ;;
      *) die 2 "'$word' is no flag: write --name=value (see --help)" ;;
    esac
    name=${word#--}
    name=${name%%=*}
    [[ -v "opt[$name]" ]] || die 2 "there is no flag --$name (see --help)"
    if [[ $word == *=* ]]; then
      opt[$name]=${word#*=}
    elif [[ ${default[$name]} == true || ${default[$name]} == false ]]; then
      opt[$name]=true
    elif (($#)); then
      opt[$name]=$1
      shift
    else
      die 2 "--$name needs a value"
    fi
  done
  check_options
}

check_options() {
  local name
  for name in "${!opt[@]}"; do
    case ${default[$name]} in
      true | false)
        [[ ${opt[$name]} == true || ${opt[$name]} == false ]] ||
          die 2 "--$name is '${opt[$name]}': write true or false"
        ;;
    esac
    case $name in
      retry-seconds | retry-max-seconds | poll-seconds)
        [[ ${opt[$name]} =~ ^[0-9]+(\.[0-9]+)?$ ]] ||
          die 2 "--$name is '${opt[$name]}': write a number"
        ;;
      retries | parallel | slices | chips-per-host | max-restarts | *-seconds)
        [[ ${opt[$name]} =~ ^[0-9]+$ ]] ||
          die 2 "--$name is '${opt[$name]}': write a whole number"
        ;;
    esac
  done
}

# require NAME...: these have to be given.
require() {
  local name
  for name in "$@"; do
    [[ -n ${opt[$name]} ]] ||
      die 2 "--$name is missing (or set $(option_variable "$name") in the environment)"
  done
}

# Names of slices and of Kubernetes objects.
check_name() {
  [[ $1 =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
    die 2 "--name is '$1': use at most 40 small letters, digits and dashes," \
      "a letter first"
}

# Prints lines of stdin with $1 before each.
prefix() {
  local line
  while IFS= read -r line || [[ -n $line ]]; do
    printf '%s%s\n' "$1" "$line"
  done
}

# Words as a shell reads them back.
quoted() {
  local words
  printf -v words '%q ' "$@"
  printf '%s' "${words% }"
}

# backoff ATTEMPT: sleeps --retry-seconds, twice as long after each further attempt, at
# most --retry-max-seconds.
backoff() {
  local seconds
  seconds=$(awk -v a="$1" -v s="${opt[retry-seconds]}" -v m="${opt[retry-max-seconds]}" \
    'BEGIN { s *= 2 ^ (a - 1); print (s < m ? s : m) }')
  say "waiting $seconds s"
  sleep "$seconds"
}
