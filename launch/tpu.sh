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

# ---- Flags -----------------------------------------------------------------------------------------

usage() { sed -n '2,/^set -euo/{/^set -euo/!s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; }

parse_flags() { # sets one variable per flag
  local each
  case "${1:-}" in
    create | setup | run | status | logs | stop | delete | up) command=$1 ;;
    '' | -h | --help | help)
      usage
      exit 0
      ;;
    *) fail "$1: unknown command; create, setup, run, status, logs, stop, delete or up" ;;
  esac
  shift
  name='' project='' zone='' type='' runtime='' slices=1 env_names=() arguments=()
  on_demand=no spot=no reserved=no autocheckpoint=no flex_start='' valid_until='' internal_ips=no
  service_account='' network='' subnetwork='' iap=no internal_ip=no dry_run=no
  working_tree=no local_workdir=no detach=no keep=no
  worker=0 lines=100 follow=no grace='' poll=30
  max_retries=10 retry_seconds=30 retry_max_seconds=900 healthy_seconds=600
  while [ $# -gt 0 ]; do
    each=$1
    shift
    case "$each" in
      --name=*) name=${each#*=} ;;
      --project=*) project=${each#*=} ;;
      --zone=*) zone=${each#*=} ;;
      --type=*) type=${each#*=} ;;
      --runtime-version=* | --version=*) runtime=${each#*=} ;;
      --slices=*) slices=$(whole_number "$each") ;;
      --env=*=*)
        each=${each#--env=}
        fail "--env=${each%%=*}=...: a name only, values on a command line are seen by all; export it first"
        ;;
      --env=*) env_names+=("${each#*=}") ;;
      --on-demand) on_demand=yes ;;
      --spot) spot=yes ;;
      --reserved) reserved=yes ;;
      --autocheckpoint) autocheckpoint=yes ;;
      --flex-start=*) flex_start=${each#*=} ;;
      --valid-until=*) valid_until=${each#*=} ;;
      --internal-ips) internal_ips=yes ;;
      --service-account=*) service_account=${each#*=} ;;
      --network=*) network=${each#*=} ;;
      --subnetwork=*) subnetwork=${each#*=} ;;
      --iap) iap=yes ;;
      --internal-ip) internal_ip=yes ;;
      --dry-run) dry_run=yes ;;
      --working-tree) working_tree=yes ;;
      --allow-local-workdir) local_workdir=yes ;;
      --detach) detach=yes ;;
      --keep) keep=yes ;;
      --worker=*) worker=${each#*=} ;;
      --lines=*) lines=$(whole_number "$each") ;;
      --follow) follow=yes ;;
      --grace=*) grace=$(whole_number "$each") ;;
      --poll=*) poll=$(seconds "$each") ;;
      --max-retries=*) max_retries=$(whole_number "$each") ;;
      --retry-seconds=*) retry_seconds=$(seconds "$each") ;;
      --retry-max-seconds=*) retry_max_seconds=$(seconds "$each") ;;
      --healthy-seconds=*) healthy_seconds=$(whole_number "$each") ;;
      --)
        arguments=("$@")
        break
        ;;
      *) fail "$each: unknown flag; main.py's arguments come after --" ;;
    esac
  done
}

whole_number() { # --flag=N
  case "${1#*=}" in
    '' | *[!0-9]*) fail "$1: not a whole number" ;;
    *) echo "${1#*=}" ;;
  esac
}

seconds() { # --flag=S
  [[ "${1#*=}" =~ ^[0-9]+([.][0-9]+)?$ ]] || fail "$1: not a number of seconds"
  echo "${1#*=}"
}

check_flags() {
  local each
  if [ "$dry_run" = no ] && ! command -v gcloud >/dev/null; then
    fail "gcloud is not installed (https://cloud.google.com/sdk/docs/install); --dry-run works without"
  fi
  [ -n "$name" ] || fail "--name=NAME is missing: what the slice is called"
  [[ "$name" =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] ||
    fail "--name=$name: lower-case letters, digits and hyphens, beginning with a letter"
  project=${project:-${CLOUDSDK_CORE_PROJECT:-$(configured project)}}
  zone=${zone:-${CLOUDSDK_COMPUTE_ZONE:-$(configured compute/zone)}}
  [ -n "$project" ] || fail "--project=P is missing, and gcloud's configuration names none"
  [ -n "$zone" ] || fail "--zone=Z is missing, and gcloud's configuration names none" \
    "(where TPUs are: https://cloud.google.com/tpu/docs/regions-zones)"
  [ "$slices" -ge 1 ] || fail "--slices=$slices: at least 1"
  if [ "$on_demand" = yes ]; then
    [ "$slices" = 1 ] || fail "--on-demand makes one slice; several (--slices=$slices) need the queue"
    [ -z "$valid_until" ] || fail "--valid-until is about the queue, which --on-demand does without"
  fi
  [ "$spot$reserved" != yesyes ] || fail "--spot and --reserved exclude each other"
  [[ "$worker" =~ ^(all|[0-9]+)$ ]] || fail "--worker=$worker: a number, or all"
  case "$command" in
    create | up)
      [ -n "$type" ] || fail "--type=TYPE is missing, e.g. --type=v4-128; the families: $machines_families"
      machines_check_type
      ;;
  esac
  case "$command" in
    run | up)
      [ ${#arguments[@]} -gt 0 ] || fail "main.py's arguments are missing; they come after --, e.g." \
        "-- --config=configs/beit_large.py --workdir=gs://BUCKET/RUN"
      check_workdir
      for each in "${env_names[@]}"; do
        [[ "$each" =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]] || fail "--env=$each: not a variable's name"
        [ -n "${!each+set}" ] || fail "--env=$each: there is no such variable; export it first"
      done
      ;;
    *) [ ${#arguments[@]} -eq 0 ] || fail "$command takes no arguments for main.py" ;;
  esac
}

check_workdir() { # checkpoints on a host's own disk are lost with it, and other hosts do not see them
  local each
  [ "$local_workdir" = no ] || return 0
  for each in "${arguments[@]}"; do
    case "$each" in --workdir=gs://?*) return 0 ;; esac
  done
  fail "--workdir=gs://BUCKET/RUN is missing after --: hosts share no disk, and theirs are lost with the" \
    "slice (--allow-local-workdir if that is meant)"
}

configured() { # property
  [ "$dry_run" = no ] || return 0
  gcloud config get-value "$1" 2>/dev/null || true
}

# ---- Calls -----------------------------------------------------------------------------------------

gcloud_call() {
  if [ "$dry_run" = yes ]; then
    quoted gcloud "$@" >&3
    return 0
  fi
  gcloud "$@" 2>"${stderr_file:-$scratch/stderr}" </dev/null
}

quoted() { # the words as one line for a shell
  local each separator=
  for each; do
    if [[ "$each" =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then
      printf '%s%s' "$separator" "$each"
    else
      printf '%s%s' "$separator" "${each@Q}"
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

on_workers() { # worker, words of the command for worker.sh
  local which=$1
  shift
  workers_run "$which" "bash beit_jax/code/launch/worker.sh $(quoted "$@")"
}

ask_workers() { # fills $scratch/status with a line per host; a host without worker.sh is idle
  workers_run all "bash beit_jax/code/launch/worker.sh status || echo @worker \$(hostname) idle - -" \
    >"$scratch/status" || true
}

answers() { # how many lines of $scratch/status are of this state, or at all
  grep -c "^@worker [^ ]* ${1:-}" "$scratch/status" || true
}

# ---- Commands --------------------------------------------------------------------------------------

do_create() {
  machines_create || cloud_failure "create $name"
  await_machines || exit
}

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

do_setup() {
  local tree archive=runs/launch/$name/code.tar.gz attempt
  cd "$here"
  git rev-parse --verify --quiet HEAD >/dev/null || fail "setup copies what git knows, and $here is no git checkout"
  if [ "$working_tree" = yes ]; then
    # The tree that committing everything would make, by an index of its own.
    cp "$(git rev-parse --git-path index)" "$scratch/index" 2>/dev/null || true
    tree=$(GIT_INDEX_FILE=$scratch/index git add -A . && GIT_INDEX_FILE=$scratch/index git write-tree)
  else
    tree=$(git rev-parse "HEAD^{tree}")
    [ -z "$(git status --porcelain)" ] || tell "uncommitted changes are not copied (--working-tree does)"
  fi
  if [ "$dry_run" = no ]; then
    mkdir -p "$(dirname "$archive")"
    git archive --format=tar.gz --output="$archive" "$tree" || return 1
  fi
  # The first connection makes the ssh key; hosts take a minute after they are "ready" to answer.
  for ((attempt = 1; ; attempt++)); do
    workers_run all "mkdir -p beit_jax && rm -rf beit_jax/code.new" && break
    [ "$attempt" -lt 5 ] || return 1
    sleep "$poll"
  done
  [ "$dry_run" = yes ] || ensure_agent
  workers_copy "$archive" beit_jax/code.tar.gz || return 1
  workers_run all "mkdir beit_jax/code.new && tar -xzf beit_jax/code.tar.gz -C beit_jax/code.new && bash beit_jax/code.new/launch/worker.sh setup $tree" \
    >"$scratch/setup" || {
    grep ' error ' "$scratch/setup" >&2 || tail -n 5 "$scratch/setup" >&2
    return 1
  }
  [ "$dry_run" = yes ] || tell "$(grep -c '^@worker .* ready' "$scratch/setup" || true) hosts are set up," \
    "code $tree"
}

# gcloud copies to many hosts only with its key in an agent. One that it lacks gets it; where there is
# none, one lives as long as this script.
ensure_agent() {
  local key=$HOME/.ssh/google_compute_engine held=0
  [ -f "$key" ] || return 0
  ssh-add -l >"$scratch/keys" 2>/dev/null || held=$?
  if [ "$held" = 2 ]; then
    eval "$(ssh-agent -s)" >/dev/null
    agent=$SSH_AGENT_PID
  elif grep -qF "$(ssh-keygen -lf "$key" | cut -d ' ' -f 2)" "$scratch/keys"; then
    return 0
  fi
  ssh-add -q "$key" || tell "ssh-add $key failed; copying to several hosts needs it"
}

# Starts main.py on all hosts or on none.
start_workers() {
  local names=- started each sent=
  if [ ${#env_names[@]} -gt 0 ]; then
    names=$(IFS=, && echo "${env_names[*]}")
    # Built in the shell and handed on by ssh in its environment: in no command line and in no file.
    sent=$(for each in "${env_names[@]}"; do printf '%s=%s\0' "$each" "${!each}"; done | base64 | tr -d '\n')
  fi
  expected=$(machines_workers) || return 1
  LC_BEIT_JAX_ENV=$sent on_workers all start "$names" -- "${arguments[@]}" >"$scratch/started" || true
  [ "$dry_run" = no ] || return 0
  started=$(grep -c '^@worker .* started$' "$scratch/started" || true)
  if [ "$started" -lt "$expected" ]; then
    echo "error: main.py started on $started of $expected hosts" >&2
    grep '^@worker .* error' "$scratch/started" | sed 's/^@worker /  /' >&2 || true
    cp "$scratch/stderr" "$scratch/start-stderr"
    on_workers all stop 30 >/dev/null || true
    cp "$scratch/start-stderr" "$scratch/stderr"
    return 1
  fi
  tell "main.py started on $started hosts"
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

# ---- Watching --------------------------------------------------------------------------------------

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

parse_flags "$@"
check_flags
cd "$here"
if [ "$command" = setup ]; then
  do_setup || cloud_failure "setup of $name"
else
  "do_$command"
fi
