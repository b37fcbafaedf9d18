# shellcheck shell=bash
# The loop of `tpu.sh run`, and `cascade`. Sourced by tpu.sh.

# Trains until the stage is done, on as many slices, one after the other, as it takes.
run() {
  local crashes=0 start outcome=gone detail=""
  trap 'say "stopped looking; ${opt[name]} goes on and costs money: $(later)"; exit 130' \
    INT TERM
  while :; do
    if [[ $outcome == gone ]]; then
      create
      if is_training; then
        say "${opt[name]} is training already"
      elif ! install; then
        slice_is_lost && continue
        die "the slice stays and costs money: $(later)"
      fi
    fi
    start=$SECONDS
    if ! train; then
      outcome=gone
      slice_is_lost && continue
      die "the slice stays and costs money: $(later)"
    fi
    watch_training
    case $outcome in
      done)
        say "${opt[name]}: training is done, in ${opt[workdir]}"
        [[ ${opt[keep]} == true ]] || release || true
        return
        ;;
      gone)
        say "${opt[name]} was taken away ($detail): again"
        crashes=0
        ;;
      saved) say "${opt[name]}: the training was stopped and had saved: again" ;;
      stopped)
        say "${opt[name]}: stopped by hand; the slice stays: $(later)"
        exit 3
        ;;
      failed) give_up "the training failed" ;;
      crashed)
        say "${opt[name]}: $detail"
        ((SECONDS - start - silence < ${opt[short-run-seconds]})) || crashes=0
        ((++crashes < 3)) || give_up "the training crashed three times in a row"
        # Whatever is left would hold the chips.
        each_worker 1 on_worker "$(worker_sh stop "${opt[name]}" "${opt[stop-seconds]}")"
        slice_is_lost && outcome=gone
        ;;
    esac
  done
}

# The loop may have been away.
is_training() {
  [[ $(ask_worker_0) == running* ]]
}

later() {
  local words=("--name=${opt[name]}" "--zone=${opt[zone]}")
  [[ -z ${opt[project]} ]] || words+=("--project=${opt[project]}")
  [[ ${opt[queued]} == false ]] || words+=(--queued)
  printf 'launch/tpu.sh logs|delete %s' "${words[*]}"
}

# Whether the slice is gone; what does not answer is asked again.
slice_is_lost() {
  local state attempt
  for ((attempt = 0; attempt < 10; attempt++)); do
    sleep "${opt[poll-seconds]}"
    state=$(slice_state)
    if is_gone "$state"; then
      detail=$state
      return 0
    fi
    [[ $state != READY ]] || return 1
  done
  return 1
}

# Returns when the training has ended. Sets `outcome`: done, gone (the slice),
# saved (status 3), stopped (by `tpu.sh stop`), failed (1 or 2), crashed; `detail`; and
# for how many seconds worker 0 has logged nothing, `silence`.
watch_training() {
  local state answer last="" unanswered=0
  silence=0
  while :; do
    sleep "${opt[poll-seconds]}"
    state=$(slice_state)
    if is_gone "$state"; then
      outcome=gone detail=$state
      return
    fi
    [[ $state == READY ]] || continue
    # Only process 0 shows progress, and none ends without the others.
    if answer=$(ask_worker_0); then
      unanswered=0
    else
      if ((++unanswered == 10)); then
        outcome=crashed detail="worker 0 does not answer"
        return
      fi
      continue
    fi
    case $answer in
      running*)
        if [[ ${answer#*$'\n'} != "$last" ]]; then
          last=${answer#*$'\n'}
          say "${opt[name]}: $last"
        fi
        answer=${answer%%$'\n'*}
        silence=${answer#running }
        if ((silence > ${opt[hang-seconds]})); then
          outcome=crashed detail="no line in worker 0's log for $silence s"
          return
        fi
        ;;
      *) silence=0 && break ;;
    esac
  done
  # Before the verdict: a slice that is taken away ends its trainings first.
  if slice_is_lost; then
    outcome=gone
  else
    judge
  fi
}

ask_worker_0() {
  on_worker 0 "$(worker_sh status "${opt[name]}")" 2>/dev/null |
    grep -E -A1 '^(none|lost|(running|exited|stopped) .*)$'
}

# The verdict over all workers' statuses. The one that failed first is to blame: the
# others end because it is missing.
judge() {
  local number line word status when attempt
  local -A kinds=()
  blamed=0
  for ((attempt = 0; attempt < 10; attempt++)); do
    each_worker 1 on_worker "$(worker_sh status "${opt[name]}")" >/dev/null
    kinds=() first=""
    for ((number = 0; number < workers; number++)); do
      line=$(grep -E '^(none|lost|(running|exited|stopped) .*)$' \
        "$scratch/$number.log" | head -n 1) || line=silent
      read -r word status when <<<"$line"
      [[ $word != exited ]] || word="exited $status"
      kinds[$word]=1
      [[ $word == "exited 0" || -z ${when:-} ]] && continue
      if [[ -z $first ]] || awk "BEGIN { exit !($when < $first) }"; then
        first=$when blamed=$number
      fi
    done
    [[ -v kinds[running] ]] || break
    sleep "${opt[poll-seconds]}"
  done
  detail="the trainings ended as: $(printf '%s, ' "${!kinds[@]}")see the workers' logs"
  if [[ -v kinds[stopped] ]]; then
    outcome=stopped
  elif [[ -v 'kinds[exited 3]' ]]; then
    outcome=saved
  elif [[ -v 'kinds[exited 1]' || -v 'kinds[exited 2]' ]]; then
    outcome=failed
  elif [[ ${#kinds[@]} == 1 && -v 'kinds[exited 0]' ]]; then
    outcome="done"
  else
    outcome=crashed
  fi
}

give_up() {
  printf 'the last lines of worker %s, which ended first:\n' "${blamed:-0}" >&2
  on_worker "${blamed:-0}" "$(worker_sh log "${opt[name]}" 40)" 2>&1 |
    prefix "[${blamed:-0}] " >&2 || true
  die "${opt[name]}: $1 (worker ${blamed:-0} ended first); the slice stays and costs" \
    "money: $(later)"
}

# A `run` for each stage. Super-resolution stages train on pictures, not on samples of
# the stage before: they need not wait for it.
cascade() {
  local stage line name=${opt[name]} workdir=${opt[workdir]} stages=() words processes=()
  local option status=0 worst=0
  IFS=';' read -ra stages <<<"${opt[stages]}"
  for line in "${stages[@]}"; do
    line=${line# }
    split stages "${line% }"
    ((${#words[@]} >= 3)) ||
      die 2 "--stages has ${line@Q}: write NAME CONFIG ACCELERATOR_TYPE [TRAIN FLAG...]"
    check name "$name-${words[0]}"
    check accelerator-type "${words[2]}"
  done
  # A run takes everything else from here.
  for option in "${!opt[@]}"; do
    export "$(option_variable "$option")=${opt[$option]}"
  done
  trap 'wait; exit 130' INT TERM
  for line in "${stages[@]}"; do
    read -ra words <<<"$line"
    stage=${words[0]}
    (
      trap - INT TERM EXIT
      set +e
      "$here/tpu.sh" run "--name=$name-$stage" "--workdir=${workdir%/}/$stage" \
        "--config=${words[1]}" "--accelerator-type=${words[2]}" \
        "${variables[@]/#/--env=}" -- "${rest[@]}" "${words[@]:3}" 2>&1 | prefix "$stage: "
      exit "${PIPESTATUS[0]}"
    ) &
    processes+=("$!")
  done
  for line in "${!stages[@]}"; do
    read -ra words <<<"${stages[$line]}"
    wait "${processes[$line]}" && status=0 || status=$?
    say "${words[0]} ended with status $status"
    ((status <= worst)) || worst=$status
  done
  return "$worst"
}
