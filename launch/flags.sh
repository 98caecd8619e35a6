# Sourced by tpu.sh. The command line: one variable per flag, and the checks that need no cloud.
# shellcheck shell=bash
# shellcheck disable=SC2154,SC2034 # variables shared with tpu.sh

parse_flags() { # sets one variable per flag
  local flag
  case "${1:-}" in
    create | setup | run | status | logs | stop | delete | up) command=$1 ;;
    '' | -h | --help | help)
      usage
      exit 0
      ;;
    *) fail "$(shown "$1"): unknown command; create, setup, run, status, logs, stop, delete or up" ;;
  esac
  shift
  name='' project='' zone='' type='' runtime='' slices=1 env_names=() arguments=()
  on_demand=no spot=no reserved=no autocheckpoint=no flex_start='' valid_until='' internal_ips=no
  service_account='' network='' subnetwork='' iap=no internal_ip=no dry_run=no
  working_tree=no local_workdir=no detach=no keep=no
  worker=0 lines=100 follow=no grace='' poll=30
  max_retries=10 retry_seconds=30 retry_max_seconds=900 healthy_seconds=600
  while [ $# -gt 0 ]; do
    flag=$1
    shift
    case "$flag" in --*=) fail "$flag is empty" ;; esac # an unset variable, not a wish for the default
    case "$flag" in
      --name=*) name=${flag#*=} ;;
      --project=*) project=${flag#*=} ;;
      --zone=*) zone=${flag#*=} ;;
      --type=*) type=${flag#*=} ;;
      --runtime-version=* | --version=*) runtime=${flag#*=} ;;
      --slices=*) slices=$(whole_number "$flag" 1 1000) ;;
      --env=*=*)
        flag=${flag#--env=}
        fail "$(shown "--env=${flag%%=*}")=...: a name only, values on a command line are seen by all; export it first"
        ;;
      --env=*) env_names+=("${flag#*=}") ;;
      --on-demand) on_demand=yes ;;
      --spot) spot=yes ;;
      --reserved) reserved=yes ;;
      --autocheckpoint) autocheckpoint=yes ;;
      --flex-start=*) flex_start=${flag#*=} ;;
      --valid-until=*) valid_until=${flag#*=} ;;
      --internal-ips) internal_ips=yes ;;
      --service-account=*) service_account=${flag#*=} ;;
      --network=*) network=${flag#*=} ;;
      --subnetwork=*) subnetwork=${flag#*=} ;;
      --iap) iap=yes ;;
      --internal-ip) internal_ip=yes ;;
      --dry-run) dry_run=yes ;;
      --working-tree) working_tree=yes ;;
      --allow-local-workdir) local_workdir=yes ;;
      --detach) detach=yes ;;
      --keep) keep=yes ;;
      --worker=*) worker=${flag#*=} ;;
      --lines=*) lines=$(whole_number "$flag") ;;
      --follow) follow=yes ;;
      --grace=*) grace=$(whole_number "$flag") ;;
      --poll=*) poll=$(seconds "$flag") ;;
      --max-retries=*) max_retries=$(whole_number "$flag") ;;
      --retry-seconds=*) retry_seconds=$(seconds "$flag") ;;
      --retry-max-seconds=*) retry_max_seconds=$(seconds "$flag") ;;
      --healthy-seconds=*) healthy_seconds=$(whole_number "$flag") ;;
      --)
        arguments=("$@")
        break
        ;;
      *) fail "$(shown "$flag"): unknown flag; main.py's arguments come after --" ;;
    esac
  done
}

# Bash takes 08 for a number in octal and wraps around at 2^63, so that numbers have a grammar.
whole_number() { # --flag=N [least most]
  local number=${1#*=} least=${2:-0} most=${3:-999999999}
  if ! matches "$number" '0|[1-9][0-9]{0,8}' || ((number < least || number > most)); then
    fail "$(shown "$1"): not a whole number from $least to $most, without leading zeros"
  fi
  echo "$number"
}

seconds() { # --flag=S
  matches "${1#*=}" '(0|[1-9][0-9]{0,8})([.][0-9]{1,6})?' ||
    fail "$(shown "$1"): not a number of seconds from 0 to 999999999, without leading zeros"
  echo "${1#*=}"
}

matches() { # text pattern; of the whole text, and [a-z] has 26 letters
  local LC_ALL=C
  [[ "$1" =~ ^($2)$ ]]
}

shown() { # a word as a message shows it: one line of at most 80 characters
  local text=$1
  [ ${#text} -le 80 ] || text="${text:0:77}..."
  [[ "$text" != *[[:cntrl:]]* ]] || text=${text@Q}
  printf '%s' "$text"
}

check_text() { # flag value pattern what
  [ -n "$2" ] || return 0
  if [ ${#2} -gt 200 ] || ! matches "$2" "$3"; then fail "$(shown "$1=$2"): $4"; fi
}

check_texts() { # what gcloud would refuse later, or take for something else
  local duration='[0-9]+[smhd]([0-9]+[smhd])*|PT?[0-9A-Z]+'
  check_text --project "$project" '[a-z][a-z0-9.:-]*' "not a project's name"
  check_text --zone "$zone" '[a-z][a-z0-9-]*' "not a zone, such as us-central2-b"
  check_text --runtime-version "$runtime" '[a-z0-9][a-z0-9._-]*' "not a runtime's name"
  check_text --flex-start "$flex_start" "$duration" "not a duration, such as 10h"
  check_text --valid-until "$valid_until" "$duration" "not a duration, such as 6h"
  check_text --service-account "$service_account" '[A-Za-z0-9][A-Za-z0-9._@:-]*' "not a service account"
  check_text --network "$network" '[A-Za-z0-9][A-Za-z0-9._:/-]*' "not a network's name"
  check_text --subnetwork "$subnetwork" '[A-Za-z0-9][A-Za-z0-9._:/-]*' "not a subnetwork's name"
}

check_flags() {
  local variable
  if [ "$dry_run" = no ] && ! command -v gcloud >/dev/null; then
    fail "gcloud is not installed (https://cloud.google.com/sdk/docs/install); --dry-run works without"
  fi
  [ -n "$name" ] || fail "--name=NAME is missing: what the slice is called"
  matches "$name" '[a-z]([a-z0-9-]{0,61}[a-z0-9])?' ||
    fail "$(shown "--name=$name"): lower-case letters, digits and hyphens, 63 at most, beginning with a letter"
  project=${project:-${CLOUDSDK_CORE_PROJECT:-$(configured project)}}
  zone=${zone:-${CLOUDSDK_COMPUTE_ZONE:-$(configured compute/zone)}}
  [ -n "$project" ] || fail "--project=P is missing, and gcloud's configuration names none"
  [ -n "$zone" ] || fail "--zone=Z is missing, and gcloud's configuration names none" \
    "(where TPUs are: https://cloud.google.com/tpu/docs/regions-zones)"
  check_texts
  if [ "$on_demand" = yes ]; then
    [ "$slices" = 1 ] || fail "--on-demand makes one slice; several (--slices=$slices) need the queue"
    [ -z "$valid_until" ] || fail "--valid-until is about the queue, which --on-demand does without"
  fi
  [ "$spot$reserved" != yesyes ] || fail "--spot and --reserved exclude each other"
  matches "$worker" 'all|0|[1-9][0-9]{0,5}' || fail "$(shown "--worker=$worker"): a number, or all"
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
      for variable in "${env_names[@]}"; do
        matches "$variable" '[A-Za-z_][A-Za-z0-9_]*' || fail "$(shown "--env=$variable"): not a variable's name"
        [ -n "${!variable+set}" ] || fail "$(shown "--env=$variable"): there is no such variable; export it first"
      done
      ;;
    *) [ ${#arguments[@]} -eq 0 ] || fail "$command takes no arguments for main.py" ;;
  esac
}

check_workdir() { # checkpoints on a host's own disk are lost with it, and other hosts do not see them
  local word
  [ "$local_workdir" = no ] || return 0
  for word in "${arguments[@]}"; do
    case "$word" in --workdir=gs://?*) return 0 ;; esac
  done
  fail "--workdir=gs://BUCKET/RUN is missing after --: hosts share no disk, and theirs are lost with the" \
    "slice (--allow-local-workdir if that is meant)"
}

configured() { # property
  [ "$dry_run" = no ] || return 0
  gcloud config get-value "$1" 2>/dev/null || true
}
