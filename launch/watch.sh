# Sourced by tpu.sh. Follows a run's log and its hosts' states, and judges how the run has ended.
# shellcheck shell=bash
# shellcheck disable=SC2154,SC2034 # variables shared with tpu.sh

follow_log() { # in the background, in a process group of its own so that gcloud and ssh end with it
  set -m
  {
    until stderr_file=$scratch/follower on_workers 0 logs 20 follow; do sleep "$poll"; done
  } </dev/null &
  follower=$!
  set +m
}

stop_following() {
  [ -z "$follower" ] || kill -TERM -- "-$follower" 2>/dev/null || true
  [ -z "$follower" ] || wait "$follower" 2>/dev/null || true
  follower=
}

# Watches until main.py has ended on all hosts or the machines are lost. Sets
#   outcome  finished, failed (code, culprit), interrupted, stopped (by tpu.sh stop), lost (the machines),
#            unheard (hosts do not answer), deleted (by somebody), silent (gcloud gives no answer)
#   why, seconds_run
watch_run() {
  local begun=$SECONDS state original unheard=0 silent=0 divided=''
  outcome='' code=0 culprit='' why=''
  assumed_state="ready -"
  if [ "$dry_run" = yes ]; then
    on_workers 0 logs 20 follow
    machines_state >/dev/null
    ask_workers
    outcome=finished
    return
  fi
  follow_log
  while [ -z "$outcome" ]; do
    sleep "$poll"
    state=unknown original=''
    read -r state original < <(machines_state) || state=unknown
    case "$state" in
      ready)
        silent=0
        ask_workers
        if [ "$(answers)" -lt "$expected" ]; then
          unheard=$((unheard + 1))
        else
          unheard=0
          judge
        fi
        ;;
      gone | failed) outcome=lost why=$original ;;
      deleted | absent) outcome=deleted why="deleted or stopped by somebody ($original)" ;;
      waiting) silent=0 ;; # a repair, say
      *) silent=$((silent + 1)) ;;
    esac
    if [ "$outcome" = divided ]; then # other hosts should end by themselves, but not for ever
      outcome=''
      divided=${divided:-$SECONDS}
      if [ $((SECONDS - divided)) -ge "${grace:-600}" ]; then
        tell "$why; stopping the others"
        on_workers all stop 60 >/dev/null || true
      fi
    fi
    [ "$unheard" -lt 20 ] || outcome=unheard why="$(answers) of $expected hosts answer"
    [ "$silent" -lt 60 ] || outcome=silent why="gcloud gives no answer; main.py goes on, 'up' again watches it"
  done
  seconds_run=$((SECONDS - begun))
  if [ "$outcome" = failed ] || [ "$outcome" = interrupted ]; then
    # Hosts of a slice that is being taken away fail before the API knows.
    sleep "$poll"
    read -r state original < <(machines_state) || state=unknown
    case "$state" in
      gone | failed | waiting) outcome=lost why=$original ;;
      deleted | absent) outcome=deleted why="deleted or stopped by somebody ($original)" ;;
    esac
  fi
  sleep "$(sooner 1 "$poll")" # the log's last lines
  stop_following
}

sooner() { awk -v a="$1" -v b="$2" 'BEGIN { print (a < b ? a : b) }'; }

# From all hosts' lines "@worker HOST STATE CODE TIME": is it over, and how? The first host that ended
# badly has the reason, the others ended for want of it.
judge() {
  local first
  first=$(first_bad)
  if [ "$(answers running)" -gt 0 ]; then
    [ -z "$first" ] || outcome=divided why="main.py has ended on ${first% *} with status ${first#* }"
    return 0
  fi
  culprit=${first% *} code=${first#* }
  if [ "$(answers stopped)" -gt 0 ]; then
    outcome=stopped why="tpu.sh stop"
  elif [ "$(answers 'exit 75 ')" -gt 0 ]; then
    outcome=interrupted why="told to leave, status 75"
  elif [ "$(answers lost)" -gt 0 ] || [ "$(answers idle)" -gt 0 ]; then
    outcome=interrupted why="a host went down"
  elif [ -z "$first" ]; then
    outcome=finished
  elif [ "$code" -eq 69 ]; then # EX_UNAVAILABLE: main.py lost another host, or never met it
    outcome=interrupted why="status 69 on $culprit: it lost another host"
  elif [ "$code" -ge 128 ]; then
    outcome=interrupted why="killed by signal $((code - 128)) on $culprit"
  else
    outcome=failed why="status $code on $culprit"
  fi
}

first_bad() { # "HOST CODE" of the earliest status that is not 0
  awk '$1 == "@worker" && $3 == "exit" && $4 != 0 { print $5, $2, $4 }' "$scratch/status" |
    sort -n | sed -n '1s/^[^ ]* //p'
}
