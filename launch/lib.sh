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
variables=() # VARIABLE=value, one for each --env

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
  local word name value
  local -A given=()
  while (($#)); do
    word=$1
    shift
    case $word in
      --) rest=("$@") && break ;;
      --help | -h) usage && exit ;;
      --*) ;;
      *) die 2 "${word@Q} is no flag: write --name=value (see --help)" ;;
    esac
    name=${word#--}
    name=${name%%=*}
    # A subscript is expanded once more: $(...) in it would run.
    [[ $name =~ ^[a-z-]+$ && -v "opt[$name]" ]] ||
      die 2 "there is no flag $(quoted "${word%%=*}") (see --help)"
    if [[ $word == *=* ]]; then
      value=${word#*=}
    elif [[ ${default[$name]} == true || ${default[$name]} == false ]]; then
      value=true
    elif (($#)); then
      value=$1
      shift
    else
      die 2 "--$name needs a value"
    fi
    case $name in
      # Given again, these grow.
      env) [[ -z $value ]] || variables+=("$value") ;;
      create-args | ssh-args) value=${given[$name]:+${given[$name]} }$value ;;
    esac
    given[$name]=$value opt[$name]=$value
  done
  [[ -v "given[env]" || -z ${opt[env]-} ]] || variables=("${opt[env]}")
  for name in "${!opt[@]}"; do check "$name" "${opt[$name]}"; done
  for value in "${variables[@]}"; do check env "$value"; done
}

# check NAME VALUE: ends the script where the value of an option could not arrive, or not
# as it was written. In the C locale letters and digits are ASCII's.
check() {
  local name=$1 value=$2 word words mark marks allowed="" LC_ALL=C
  [[ $value != *[[:cntrl:]]* ]] ||
    die 2 "--$name is ${value@Q}: line breaks, tabs and the like are not allowed"
  [[ -n $value || -n ${default[$name]} ]] || return 0 # not given
  case $name in
    name)
      [[ $value =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
        allowed="use at most 40 small letters, digits and dashes, a letter first"
      ;;
    zone | project | accelerator-type | runtime-version | namespace | service-account | \
      accelerator)
      [[ $value =~ ^[a-zA-Z0-9]([-._:a-zA-Z0-9]*[a-zA-Z0-9])?$ ]] ||
        allowed="use letters, digits and, between them, dashes, dots, colons and _"
      ;;
    topology)
      [[ $value =~ ^[1-9][0-9]{0,3}(x[1-9][0-9]{0,3}){1,2}$ ]] ||
        allowed="write it as 4x8x8"
      ;;
    repo | commit | stages)
      [[ $value == [!-]* ]] || allowed="it cannot be empty or begin with a dash"
      ;;
    worker)
      [[ $value =~ ^(all|0|[1-9][0-9]{0,8})$ ]] || allowed="write a number, or all"
      ;;
    retry-seconds | retry-max-seconds | poll-seconds)
      [[ $value =~ ^[0-9]{1,9}(\.[0-9]{1,9})?$ ]] || allowed="write a number"
      ;;
    parallel | slices | chips-per-host)
      [[ $value =~ ^[1-9][0-9]{0,8}$ ]] || allowed="write a whole number, at least 1"
      ;;
    retries | max-restarts | *-seconds)
      # Bash takes 010 for 8.
      [[ $value =~ ^(0|[1-9][0-9]{0,8})$ ]] ||
        allowed="write a whole number of at most 9 digits, the first no 0"
      ;;
    create-args | ssh-args)
      split "$name" "$value"
      # Quotes do not hold together what is parted here.
      for word in "${words[@]}"; do
        for mark in \' \"; do
          marks=${word//[!$mark]/}
          ((${#marks} % 2 == 0)) ||
            allowed="no word can have a space, quoted or not"
        done
      done
      ;;
    env)
      [[ $value =~ ^[a-zA-Z_][a-zA-Z0-9_]*= ]] || allowed="write VARIABLE=value"
      [[ ! $value =~ [[:space:]][a-zA-Z_][a-zA-Z0-9_]*= ]] ||
        allowed="it looks like two variables: give --env once for each"
      ;;
    *)
      [[ ${default[$name]} != true && ${default[$name]} != false ||
        $value == true || $value == false ]] || allowed="write true or false"
      ;;
  esac
  [[ -z $allowed ]] || die 2 "--$name is ${value@Q}: $allowed"
}

# split NAME VALUE: sets `words`. They have one space between them and are taken as they
# are, quotes and all; what else there is between words would be lost.
split() {
  IFS=' ' read -ra words <<<"$2"
  [[ ${words[*]} == "$2" ]] ||
    die 2 "--$1 has ${2@Q}: write its words with one space between them and no other"
}

# require NAME...: these have to be given.
require() {
  local name
  for name in "$@"; do
    [[ -n ${opt[$name]} ]] ||
      die 2 "--$name is missing (or set $(option_variable "$name") in the environment)"
  done
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
