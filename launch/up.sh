# Sourced by tpu.sh. `up`: makes machines, runs on them, and starts again what was interrupted.
# shellcheck shell=bash
# shellcheck disable=SC2154,SC2034 # variables shared with tpu.sh

await_machines() { # 0: ready; 69: the request failed or went away, with a message
  local state original last='' errors=0
  assumed_state="ready -"
  while true; do
    if read -r state original < <(machines_state); then
      errors=0
    elif ((++errors >= 10)); then
      cloud_failure "state of $name"
    else
      state=unknown
    fi
    [ "$original" = "$last" ] || [ "$dry_run" = yes ] || tell "$name: $original"
    last=$original
    case "$state" in
      ready) return 0 ;;
      failed)
        machines_reason >"$scratch/stderr" || true
        echo "error: $name failed: $(machines_explain "$scratch/stderr")" >&2
        return 69
        ;;
      gone | deleted | absent)
        echo "error: $name is gone ($original) before it was ready" >&2
        return 69
        ;;
    esac
    sleep "$poll"
  done
}

do_up() {
  local attempts=0 wait_seconds=$retry_seconds why_again
  while true; do
    why_again=''
    if ! ensure_machines; then
      why_again="no machines"
    elif ! ensure_run; then
      why_again="could not start: $(machines_explain "$scratch/stderr")"
    else
      watch_run
      case "$outcome" in
        finished)
          finish
          tell "main.py has finished"
          return 0
          ;;
        failed)
          finish
          echo "error: main.py failed on $culprit with status $code" >&2
          grep -F "[$culprit]" "runs/launch/$name/logs.txt" | tail -n 20 >&2 || true
          exit "$code"
          ;;
        stopped)
          tell "stopped by tpu.sh stop; $name is still there and costs money: 'delete' it"
          exit 75
          ;;
        deleted | silent)
          echo "error: $name: $why" >&2
          exit 69
          ;;
      esac
      why_again=$why
      if [ "$outcome" = unheard ]; then
        machines_delete || true # or it would be found "ready" again
      fi
      if [ "$seconds_run" -ge "$healthy_seconds" ]; then
        attempts=0
        wait_seconds=$retry_seconds
      fi
    fi
    attempts=$((attempts + 1))
    if [ "$max_retries" -gt 0 ] && [ "$attempts" -gt "$max_retries" ]; then
      finish
      echo "error: gave up after $max_retries retries in a row; the last: $why_again" >&2
      exit 69
    fi
    tell "interrupted ($why_again); again in $wait_seconds s, retry $attempts"
    sleep "$wait_seconds"
    wait_seconds=$(awk -v s="$wait_seconds" -v most="$retry_max_seconds" 'BEGIN { s *= 2; print (s < most ? s : most) }')
  done
}

ensure_machines() { # 0: ready. 1: try again. Exits where trying again is no use.
  local state original status=0
  assumed_state="absent -"
  while true; do
    read -r state original < <(machines_state) || cloud_failure "state of $name"
    case "$state" in
      ready) return 0 ;;
      waiting) break ;;
      deleted) fail "$name was stopped or suspended by hand ($original); 'delete' it first" ;;
      gone | failed)
        tell "$name: $original; deleting it to make it again"
        machines_delete || grep -qi 'not.found' "$scratch/stderr" || return 1
        sleep "$poll"
        ;;
      absent)
        if ! machines_create; then
          worth_another_try || cloud_failure "create $name"
          tell "create $name: $(machines_explain "$scratch/stderr")"
          return 1
        fi
        break
        ;;
    esac
  done
  (await_machines) || status=$?
  [ "$status" = 0 ] && return 0
  worth_another_try || exit "$status"
  return 1
}

# Capacity comes and goes, and servers have bad minutes; quota, permission and types do not change.
worth_another_try() {
  grep -qi 'quota\|permission\|denied\|billing\|SERVICE_DISABLED\|not enabled\|gcloud auth login\|INVALID' \
    "$scratch/stderr" && return 1
  return 0
}

ensure_run() { # runs main.py everywhere, or leaves it alone where it runs already
  expected=$(machines_workers) || return 1
  ask_workers
  if [ "$dry_run" = no ] && [ "$(answers running)" -gt 0 ]; then
    if [ "$(answers running)" = "$expected" ]; then
      tell "main.py runs already on all $expected hosts; watching it"
      return 0
    fi
    # Not because a host was slow to answer: that run may be in good health.
    [ "$(answers)" = "$expected" ] || return 1
    on_workers all stop 60 >/dev/null || true
  fi
  do_setup && start_workers
}

finish() { # keeps the logs, gives back the machines
  local logs=runs/launch/$name/logs.txt
  mkdir -p "$(dirname "$logs")"
  if [ "$dry_run" = yes ]; then
    on_workers all logs 1000 all
  else
    on_workers all logs 1000 all >"$logs" || true
    tell "all hosts' logs: $logs"
  fi
  if [ "$keep" = yes ]; then
    tell "$name is still there and costs money: 'delete' it"
  else
    machines_delete || cloud_failure "delete $name (it still costs money)"
    [ "$dry_run" = yes ] || tell "$name is deleted"
  fi
}
