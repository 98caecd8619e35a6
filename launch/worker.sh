#!/usr/bin/env bash
# Runs on each worker of a TPU slice, called by tpu.sh through ssh.
#
#   worker.sh setup TREE               puts the code unpacked in code.new in place, and its environment
#   worker.sh start NAMES -- ARGS      starts main.py ARGS detached; NAMES: variables sent, or "-"
#   worker.sh status                   one line: @worker HOST STATE CODE TIME
#   worker.sh logs LINES [follow|all]  the log's end; "follow" until main.py ends; "all" names the host
#   worker.sh stop SECONDS [mark]      SIGTERM, and SIGKILL for what is left after SECONDS; "mark": by
#                                      the user's wish, so that no watcher starts it again
#
# main.py has to outlive the ssh session. `setsid` and a supervising bash do that: Ubuntu's logind does
# not kill what users leave running. A user unit of systemd would need lingering, a system unit root,
# and tmux a terminal nobody looks at. When the machine is taken away, systemd stops sessions before the
# network and so sends main.py its SIGTERM. A lock held by supervisor and main.py tells "running" from
# "died with the machine" without trusting process ids.
set -euo pipefail

root=${BEIT_JAX_ROOT:-$HOME/beit_jax} # code, .venv, and the files of the run
run=$root/run
lockfile=${LIBTPU_LOCKFILE:-/tmp/libtpu_lockfile}

say() { printf '@worker %s %s\n' "$(hostname)" "$*"; }

fail() {
  say "error $*"
  exit 1
}

running() { # is the lock held?
  mkdir -p "$run"
  ! flock --shared --nonblock "$run/lock" true # shared, so that two who ask do not see each other
}

setup() { # tree
  ! running || fail "main.py is running; 'stop' it before its code is replaced"
  cd "$root"
  rm -rf code
  mv code.new code
  find_python
  # shellcheck source=launch/setup.sh
  source code/launch/setup.sh
  setup_environment code/requirements.txt code/launch/requirements-tpu.txt
  # Written last: `start` takes code without it for not set up.
  printf '%s\n' "$1" >code/.tree
  say "ready $("$python" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])')"
}

# The images' Python is 3.10 (tpu-ubuntu2204-base); where there is none of 3.11 to 3.13, uv brings one.
find_python() {
  local candidate
  if [ -x .venv/bin/python ]; then
    export PYTHON=.venv/bin/python
    return 0
  fi
  for candidate in ${PYTHON:-python3.13 python3.12 python3.11 python3}; do
    if command -v "$candidate" >/dev/null && "$candidate" -c \
      'import ensurepip, sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
      export PYTHON=$candidate
      return 0
    fi
  done
  echo "no Python 3.11 to 3.13 here: installing 3.12 with uv"
  python3 -m pip install --quiet --user uv
  python3 -m uv python install --quiet --managed-python 3.12
  PYTHON=$(python3 -m uv python find --managed-python 3.12)
  export PYTHON
}

start() { # names -- args
  local names=$1 attempt
  shift 2
  [ -f "$root/code/.tree" ] || fail "not set up; run 'setup' first"
  ! running || fail "main.py is running already; 'stop' it first"
  free_tpu
  receive_environment "$names"
  export JAX_COORDINATOR_PORT=${JAX_COORDINATOR_PORT:-8476} # Google's firewall opens it; not jax's 8482
  export JAX_PLATFORMS=${JAX_PLATFORMS:-tpu,cpu}            # no TPU is an error, not a run on the CPU
  export TF_CPP_MIN_LOG_LEVEL=${TF_CPP_MIN_LOG_LEVEL:-2} PYTHONUNBUFFERED=1
  BEIT_JAX_REVISION=$(cat "$root/code/.tree")
  export BEIT_JAX_REVISION
  rm -f "$run/exit" "$run/stopped" "$run/pid"
  # Without the redirections ssh would wait for the end of the run.
  setsid --fork bash "$root/code/launch/worker.sh" supervise "$@" </dev/null >>"$run/log" 2>&1
  for ((attempt = 0; attempt < 200; attempt++)); do
    if [ -f "$run/pid" ]; then
      say "started"
      return 0
    fi
    sleep 0.05
  done
  fail "main.py did not start; see 'logs'"
}

# Variables come in LC_BEIT_JAX_ENV (base64 of NAME=VALUE lines ended by NUL), which ssh passes on in
# its environment: not a command line, not a file. Ubuntu's sshd accepts names that begin with LC_.
receive_environment() { # names, comma-separated, or "-"
  local pair
  [ "$1" != - ] || return 0
  [ -n "${LC_BEIT_JAX_ENV:-}" ] ||
    fail "--env: this image's sshd does not accept LC_* (AcceptEnv in /etc/ssh/sshd_config); $1 is missing"
  while IFS= read -r -d '' pair; do
    export "${pair?}"
  done < <(base64 -d <<<"$LC_BEIT_JAX_ENV")
  unset LC_BEIT_JAX_ENV
}

# A process that was killed leaves libtpu's lock file, and the next one says the TPU is in use.
free_tpu() {
  local holder
  holder=$(tpu_holder)
  [ -z "$holder" ] || fail "the TPU is in use by $holder"
  [ ! -e "$lockfile" ] || rm -f "$lockfile" 2>/dev/null || sudo -n rm -f "$lockfile" ||
    fail "cannot remove the stale $lockfile"
}

tpu_holder() { # "process PID (COMMAND)" that has a TPU open; those of other users only root sees
  local pid open=(find /proc -maxdepth 3 -path '/proc/[0-9]*/fd/*'
    '(' -lname '/dev/accel*' -o -lname '/dev/vfio/[0-9]*' ')')
  pid=$({ sudo -n "${open[@]}" || "${open[@]}" || true; } 2>/dev/null | head -n 1)
  pid=${pid#/proc/}
  pid=${pid%%/*}
  [ -z "$pid" ] || echo "process $pid ($(tr '\0' ' ' <"/proc/$pid/cmdline" | cut -c 1-80))"
}

supervise() { # args; detached by start
  local child code again interrupted
  exec 9>"$run/lock"
  printf '%s\n' "$$" >"$run/supervisor"
  printf '%64s\n' '' >"$run/exit.new" # room for the status: main.py may leave the disk full
  flock 9 # main.py inherits the lock: held as long as either lives
  cd "$root/code"
  # A handler, not "ignore": main.py would inherit the latter. It gets the machine's signals itself.
  trap 'interrupted=yes' TERM HUP INT
  printf -- '--- %s %s: main.py' "$(date '+%F %T')" "$(hostname)"
  printf ' %q' "$@"
  printf '\n'
  "$root/.venv/bin/python" main.py "$@" &
  child=$!
  printf '%s\n' "$child" >"$run/pid.new"
  mv "$run/pid.new" "$run/pid"
  code=
  while true; do
    interrupted=no
    again=0
    wait "$child" || again=$?
    if [ "$interrupted" = no ]; then
      [ "$again" = 127 ] && [ -n "$code" ] || code=$again # 127: reaped by the wait that was interrupted
      break
    fi
    code=$again
  done
  printf '%s %s\n' "$code" "$(date +%s.%N)" 1<>"$run/exit.new" # over what is there
  mv "$run/exit.new" "$run/exit"
  echo "--- $(date '+%F %T') $(hostname): main.py ended with status $code"
}

# Always status 0: gcloud goes no further than a batch in which a command failed.
status() {
  local code time
  if [ ! -f "$run/exit" ] && running; then
    say "running - -"
  elif [ -f "$run/exit" ]; then # asked again: it is written before the lock is let go
    read -r code time <"$run/exit"
    if [ -f "$run/stopped" ]; then say "stopped $code $time"; else say "exit $code $time"; fi
  elif [ -f "$run/pid" ]; then
    say "lost - -" # killed, or the machine went down, before a status could be written
  else
    say "idle - -"
  fi
}

logs() { # lines [follow|all]
  [ -f "$run/log" ] || fail "no log yet"
  case "${2:-}" in
    follow)
      if running; then
        tail -n "$1" -F --pid="$(cat "$run/supervisor")" -s 0.5 "$run/log" 2>/dev/null
      else
        tail -n "$1" "$run/log"
      fi
      ;;
    all) tail -n "$1" "$run/log" | sed "s/^/[$(hostname)] /" ;;
    *) tail -n "$1" "$run/log" ;;
  esac
}

stop() { # seconds [mark]
  local pid deadline
  [[ "$1" =~ ^(0|[1-9][0-9]{0,8})$ ]] || fail "stop: not a number of seconds"
  if running; then
    [ -z "${2:-}" ] || touch "$run/stopped"
    deadline=$((SECONDS + $1))
    # The lock is taken before main.py starts, and its process id is written down after.
    while running && [ ! -f "$run/pid" ] && [ "$SECONDS" -lt "$deadline" ]; do sleep 0.05; done
    pid=$(cat "$run/pid" 2>/dev/null || true)
    kill -TERM "$pid" 2>/dev/null || true
    while running && [ "$SECONDS" -lt "$deadline" ]; do sleep 0.1; done
    if running; then
      echo "$(hostname): main.py did not end within $1 s of SIGTERM; killing it" >&2
      kill -KILL "$pid" 2>/dev/null || true
      sleep 0.5
      ! running || kill -KILL "-$(cat "$run/supervisor")" 2>/dev/null || true # what it left behind
    fi
  fi
  status
}

command=${1:?worker.sh is called by tpu.sh}
shift
case "$command" in
  setup | start | status | logs | stop | supervise) "$command" "$@" ;;
  *) fail "unknown command $command" ;;
esac
