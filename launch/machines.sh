# Sourced by tpu.sh. Makes, watches and deletes the machines, and reaches the workers on them, through
# the Cloud TPU API (gcloud compute tpus ...: v4, v5e, v5p, v6e). Everything tpu.sh knows of that API is
# in this file; another backend (Compute Engine, GKE) is another file with these functions:
#
#   machines_create         asks for the machines; returns when the request is accepted or they exist
#   machines_state          prints "STATE ORIGINAL": absent waiting ready gone failed deleted | unknown
#   machines_reason         prints why machines failed, if the API says so
#   machines_workers        prints the number of workers (hosts) of all slices
#   machines_delete         deletes machines and request
#   workers_run W COMMAND   runs COMMAND on worker W, or on all workers of all slices (W=all)
#   workers_copy FILE PATH  copies FILE to PATH (relative to home) on all workers
#
# Read here: name project zone type runtime slices on_demand and the options of `create`, set by tpu.sh.
# shellcheck shell=bash
# shellcheck disable=SC2154

readonly machines_families="v2-N, v3-N, v4-N, v5litepod-N (v5e), v5p-N, v6e-N"

# Runtime versions: https://cloud.google.com/tpu/docs/runtimes
machines_check_type() {
  case "$type" in
    v5e-*) fail "$(shown "--type=$type"): Google's name for v5e slices is v5litepod-$(shown "${type#v5e-}")" ;;
    tpu7* | TPU7* | v7* | *ronwood*)
      fail "$(shown "--type=$type"): the Cloud TPU API ends at v6e; later chips are made through Compute Engine" \
        "(https://docs.cloud.google.com/tpu/docs/tpus-in-compute-engine) or GKE (see launch/gke.sh)"
      ;;
  esac
  matches "$type" '(v[234]|v5litepod|v5p|v6e)-[1-9][0-9]{0,5}' ||
    fail "$(shown "--type=$type"): unknown; the families are $machines_families"
  case "$type" in
    v[234]-*) runtime="${runtime:-tpu-ubuntu2204-base}" ;;
    v5litepod-*) runtime="${runtime:-v2-alpha-tpuv5-lite}" ;;
    v5p-*) runtime="${runtime:-v2-alpha-tpuv5}" ;;
    v6e-*) runtime="${runtime:-v2-alpha-tpuv6e}" ;;
  esac
}

machines_where() {
  where=("--project=$project" "--zone=$zone")
}

machines_create() {
  local how=() what=(compute tpus) options=()
  machines_where
  [ "$autocheckpoint" = no ] || options+=(--autocheckpoint-enabled)
  [ -z "$flex_start" ] || options+=(--provisioning-model=flex-start "--max-run-duration=$flex_start")
  [ ${#options[@]} -eq 0 ] || what=(alpha compute tpus) # these two are not in the GA commands
  [ "$spot" = no ] || options+=(--spot)
  [ "$reserved" = no ] || options+=(--reserved)
  [ "$internal_ips" = no ] || options+=(--internal-ips)
  [ -z "$service_account" ] || options+=("--service-account=$service_account")
  [ -z "$network" ] || options+=("--network=$network")
  [ -z "$subnetwork" ] || options+=("--subnetwork=$subnetwork")
  if [ "$on_demand" = yes ]; then
    # tpu-vm create says --version where queued-resources create says --runtime-version.
    gcloud_call "${what[@]}" tpu-vm create "$name" "${where[@]}" "--accelerator-type=$type" \
      "--version=$runtime" "${options[@]}"
    return
  fi
  [ -z "$valid_until" ] || options+=("--valid-until-duration=$valid_until")
  if [ "$slices" -gt 1 ]; then
    how=("--node-count=$slices" "--node-prefix=$name") # makes nodes NAME-0, NAME-1, ...
  else
    how=("--node-id=$name")
  fi
  gcloud_call "${what[@]}" queued-resources create "$name" "${how[@]}" "${where[@]}" \
    "--accelerator-type=$type" "--runtime-version=$runtime" "${options[@]}"
}

# States: https://cloud.google.com/tpu/docs/reference/rest/v2/projects.locations.queuedResources and .nodes
machines_state() {
  local call answer state initiator
  machines_where
  if [ "$on_demand" = yes ]; then
    call=(tpu-vm describe "$name" "${where[@]}" "--format=value(state)")
  else
    call=(queued-resources describe "$name" "${where[@]}"
      "--format=value(state.state,state.stateInitiator)")
  fi
  if ! answer=$(gcloud_call compute tpus "${call[@]}"); then
    if grep -qi 'NOT_FOUND\|not found' "$scratch/stderr"; then
      echo "absent NOT_FOUND"
      return 0
    fi
    return 1
  fi
  read -r state initiator <<<"$answer" || true
  case "$state" in
    READY | ACTIVE) echo "ready $state" ;;
    FAILED) echo "failed $state" ;;
    # Only stopped by hand; a slice can't be stopped and started, it is deleted and made again.
    STOPPING | STOPPED) echo "deleted $state" ;;
    SUSPENDING | SUSPENDED)
      if [ "$initiator" = USER ]; then echo "deleted $state"; else echo "gone $state"; fi
      ;;
    DELETING | PREEMPTED | TERMINATED | HIDING | HIDDEN | UNKNOWN) echo "gone $state" ;;
    '') echo "${assumed_state:-unknown}" ;; # a dry run
    *) echo "waiting $state" ;; # CREATING ACCEPTED WAITING_FOR_RESOURCES PROVISIONING REPAIRING ...
  esac
}

machines_reason() {
  [ "$on_demand" = no ] || return 0
  machines_where
  gcloud_call compute tpus queued-resources describe "$name" "${where[@]}" \
    "--format=value(state.failedData.error.message)"
}

machines_workers() {
  local node total=0 count
  machines_where
  for node in $(machines_nodes); do
    count=$(gcloud_call compute tpus tpu-vm describe "$node" "${where[@]}" \
      "--format=value(networkEndpoints.len())") || return 1
    matches "${count:=1}" '[0-9]{1,6}' || return 1
    total=$((total + 10#$count))
  done
  echo "$total"
}

machines_nodes() {
  local i
  if [ "$slices" -eq 1 ]; then
    echo "$name"
  else
    for ((i = 0; i < slices; i++)); do echo "$name-$i"; done
  fi
}

machines_delete() {
  machines_where
  if [ "$on_demand" = yes ]; then
    gcloud_call compute tpus tpu-vm delete "$name" "${where[@]}" --quiet
  else
    # --force: deletes the nodes first; without it only a failed or suspended request can be deleted.
    gcloud_call compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
  fi
}

# Sets `reach` to the words before "ssh" or "scp" and `reach_options` to what follows the host.
# Queued resources have batches and IAP in the GA commands; tpu-vm has IAP in alpha only.
machines_reach() { # worker
  machines_where
  reach=(compute tpus)
  reach_options=("${where[@]}")
  if [ "$on_demand" = yes ]; then
    [ "$iap" = no ] || reach=(alpha compute tpus)
    reach+=(tpu-vm)
  else
    reach+=(queued-resources)
    if [ "$1" = all ]; then reach_options+=(--node=all); else reach_options+=(--node=0); fi
  fi
  reach_options+=("--worker=$1")
  # More connections at once than this are "prone to error", says gcloud; a batch in which a command
  # fails ends the call before the next batch, so what must reach every worker ends with status 0.
  if [ "$on_demand" = no ] && [ "$1" = all ]; then reach_options+=(--batch-size=64); fi
  [ "$iap" = no ] || reach_options+=(--tunnel-through-iap)
  [ "$internal_ip" = no ] || reach_options+=(--internal-ip)
  reach_options+=(--quiet) # makes the ssh key, the first time, without asking
}

workers_run() { # worker command
  machines_reach "$1"
  [ -z "${LC_BEIT_JAX_ENV:-}" ] || reach_options+=(--ssh-flag=-oSendEnv=LC_BEIT_JAX_ENV)
  gcloud_call "${reach[@]}" ssh "$name" "${reach_options[@]}" "--command=$2"
}

workers_copy() { # file path
  machines_reach all
  gcloud_call "${reach[@]}" scp "$1" "$name:$2" "${reach_options[@]}"
}

# What gcloud said when it failed, in one line with what to do about it.
machines_explain() { # file with gcloud's stderr
  local said advice
  said=$(sed -n '/ERROR/,$p' "$1" | tr -s '[:space:]' ' ' | cut -c 1-300)
  said=${said:-$(tail -n 1 "$1" | cut -c 1-300)}
  said=${said#ERROR: }
  if grep -qi 'gcloud auth login\|Reauthentication\|invalid_grant\|active account' "$1"; then
    advice="not logged in; run: gcloud auth login"
  elif grep -qi 'billing' "$1"; then
    advice="billing; the project $project needs a billing account"
  elif grep -qi 'SERVICE_DISABLED\|has not been used in project\|API.*not enabled' "$1"; then
    advice="the API is off; run: gcloud services enable tpu.googleapis.com --project=$project"
  elif grep -qi 'quota' "$1"; then
    advice="quota; ask for more of ${type:-this type} in $zone (https://cloud.google.com/tpu/docs/quota)"
    [ "$spot" = yes ] || advice+="; --spot has a quota of its own"
  elif grep -qi 'no more capacity\|stockout\|RESOURCE_EXHAUSTED\|insufficient capacity\|ZONE_RESOURCE_POOL' "$1"; then
    advice="no capacity in $zone now; queue for it (without --on-demand), or try another zone or --spot"
  elif grep -qi 'PERMISSION_DENIED\|does not have permission\|forbidden\|required .* permission' "$1"; then
    advice="permission; the account needs roles/tpu.admin and roles/iam.serviceAccountUser on $project"
  elif grep -qi 'ALREADY_EXISTS\|already exists' "$1"; then
    advice="$name exists already; see 'status', or 'delete' it first"
  elif grep -qi 'NOT_FOUND\|not found' "$1"; then
    advice="no $name in $zone of $project; made with --on-demand or not? say the same here"
  elif grep -qi 'ssh-agent\|ssh-add' "$1"; then
    advice="the ssh key is in no agent; run: eval \"\$(ssh-agent -s)\"; ssh-add ~/.ssh/google_compute_engine"
  elif grep -qi 'accelerator' "$1"; then
    advice="$type is not offered in $zone; see: gcloud compute tpus accelerator-types list --zone=$zone"
  elif grep -q 'ERROR' "$1"; then
    advice="gcloud failed"
  else
    advice="a host refused, see above"
  fi
  echo "$advice (gcloud: $said)"
}
