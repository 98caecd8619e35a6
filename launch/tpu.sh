#!/usr/bin/env bash
# Trains on a Cloud TPU slice: makes the machines, sets them up, runs main.py on every host, watches.
# launch/README.md is the runbook.
#
#   launch/tpu.sh COMMAND --name=NAME --project=P --zone=Z --type=v4-128 [flags] -- ARGS FOR main.py
#
#   create   asks for the machines (a queued resource) and waits until they are there
#   setup    copies the code to every host and makes its environment; again after a change of code
#   run      starts main.py on every host, detached from ssh, and shows host 0's log until it ends
#   status   the machines' state, and what main.py does on each host
#   logs     the log's end: --worker=N or all (default 0), --lines=N (100), --follow
#   stop     SIGTERM to main.py on every host, so that it saves; then waits (--grace=SECONDS, 300)
#   delete   deletes machines and request
#   up       create, setup, run; makes a preempted slice again and resumes; deletes it at the end
#
# Where: --project and --zone (default: gcloud's configuration).
# create, up: --type=TYPE --on-demand (at once or not at all; give it to the other commands too) --spot
#   --reserved --slices=N (multislice; to all commands) --valid-until=6h (leave the queue then)
#   --autocheckpoint (SIGTERM before maintenance) --flex-start=10h --runtime-version=V --internal-ips
#   --service-account=SA --network=N --subnetwork=S
# setup, up: --working-tree (code as it is, not as committed)
# run, up: --env=NAME (hands on this variable's value, unseen; repeatable) --detach (run)
#   --allow-local-workdir
# up: --keep (does not delete the slice at the end) --max-retries=10 (in a row; 0: no limit)
#   --retry-seconds=30 --retry-max-seconds=900 (the wait between them doubles) --healthy-seconds=600 (a
#   run this long ends the row) --grace=600 (for hosts still running when another has ended)
# Reaching hosts: --iap (through Identity-Aware Proxy) --internal-ip (from within the network)
# All: --dry-run (prints the gcloud commands, runs none) --poll=SECONDS (30)
#
# Ends with main.py's status; 75: main.py was told to leave and saved, run it again; 2: wrong use;
# 69: the cloud said no, or gave no answer.
set -euo pipefail

fail() { # message; exits 2
  echo "error: $*" >&2
  exit 2
}

if ((BASH_VERSINFO[0] * 10 + BASH_VERSINFO[1] < 44)); then
  fail "needs bash 4.4 or later, this is $BASH_VERSION (macOS: brew install bash)"
fi

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/machines.sh
source "$here/launch/machines.sh"
# shellcheck source=launch/flags.sh
source "$here/launch/flags.sh"
# shellcheck source=launch/hosts.sh
source "$here/launch/hosts.sh"
# shellcheck source=launch/watch.sh
source "$here/launch/watch.sh"
# shellcheck source=launch/up.sh
source "$here/launch/up.sh"

scratch=$(mktemp -d)
follower=
agent=
clean_up() {
  stop_following
  [ -z "$agent" ] || kill "$agent" 2>/dev/null || true
  rm -rf "$scratch"
}
trap clean_up EXIT
goes_on() { tell "main.py, if it was started, goes on: 'up' again watches it, 'stop' ends it"; }
trap 'goes_on; exit 130' INT
trap 'goes_on; exit 143' TERM HUP
exec 3>&1 # dry runs print here, also from within $(...)

usage() { sed -n '2,/^set -euo/{/^set -euo/!s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; }

# ---- Calls -----------------------------------------------------------------------------------------

gcloud_call() {
  if [ "$dry_run" = yes ]; then
    quoted gcloud "$@" >&3
    return 0
  fi
  gcloud "$@" 2>"${stderr_file:-$scratch/stderr}" </dev/null
}

quoted() { # the words as one line for a shell
  local word separator=
  for word; do
    if [[ "$word" =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then
      printf '%s%s' "$separator" "$word"
    else
      printf '%s%s' "$separator" "${word@Q}"
    fi
    separator=' '
  done
  printf '\n'
}

cloud_failure() { # what was tried; exits 69
  echo "error: $1: $(machines_explain "$scratch/stderr")" >&2
  exit 69
}

tell() { echo "tpu.sh: $*" >&2; }

# ---- Commands --------------------------------------------------------------------------------------

do_create() {
  machines_create || cloud_failure "create $name"
  await_machines || exit
}

do_run() {
  start_workers || cloud_failure "run on $name"
  if [ "$detach" = yes ]; then return 0; fi
  watch_run
  case "$outcome" in
    finished) tell "main.py has finished" ;;
    failed)
      tell "main.py failed on $culprit with status $code; 'logs --worker=all' has more"
      exit "$code"
      ;;
    interrupted | stopped)
      tell "main.py was interrupted ($why); run it again to resume"
      exit 75
      ;;
    *)
      echo "error: $name: $why" >&2
      exit 69
      ;;
  esac
}

do_status() {
  local state original
  assumed_state="ready -"
  read -r state original < <(machines_state) || cloud_failure "state of $name"
  [ "$dry_run" = yes ] || echo "$name: $original"
  case "$state" in
    ready)
      expected=$(machines_workers) || cloud_failure "hosts of $name"
      ask_workers
      [ "$dry_run" = no ] || return 0
      sed -n 's/^@worker /  /p' "$scratch/status"
      echo "  $(answers) of $expected hosts answered"
      ;;
    failed) machines_reason ;;
    absent) cloud_failure "state of $name" ;;
  esac
}

do_logs() {
  local options=("$lines")
  [ "$follow" = no ] || options+=(follow)
  [ "$worker" != all ] || options=("$lines" all)
  on_workers "$worker" logs "${options[@]}" || cloud_failure "logs of $name"
}

do_stop() {
  on_workers all stop "${grace:-300}" mark >"$scratch/status" || cloud_failure "stop $name"
  sed -n 's/^@worker /  /p' "$scratch/status"
}

do_delete() {
  machines_delete || cloud_failure "delete $name"
  [ "$dry_run" = yes ] || tell "$name is deleted"
}

# ---- Main ----------------------------------------------------------------------------------------

parse_flags "$@"
check_flags
cd "$here"
if [ "$command" = setup ]; then
  do_setup || cloud_failure "setup of $name"
else
  "do_$command"
fi
