# Sourced by tpu.sh. The hosts of a slice: commands on them, the code they run, starting main.py.
# shellcheck shell=bash
# shellcheck disable=SC2154,SC2034 # variables shared with tpu.sh

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

do_setup() {
  local tree archive=runs/launch/$name/code.tar.gz attempt
  cd "$here" || return 1
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
  local names=- started variable sent=
  if [ ${#env_names[@]} -gt 0 ]; then
    names=$(IFS=, && echo "${env_names[*]}")
    # Built in the shell and handed on by ssh in its environment: in no command line and in no file.
    sent=$(for variable in "${env_names[@]}"; do printf '%s=%s\0' "$variable" "${!variable}"; done | base64 | tr -d '\n')
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
