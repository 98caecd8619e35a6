#!/usr/bin/env bash
# One example of a run on GKE, with xpk (pip install xpk==1.16.0; Google calls it a tool for proofs of
# concept). Needs a cluster, made once, and an image from the Dockerfile; see launch/README.md.
#
#   CLUSTER=c PROJECT=p ZONE=us-west4-a TYPE=v5litepod-16 IMAGE=us-docker.pkg.dev/p/r/beit_jax \
#     launch/gke.sh NAME --config=configs/beit_large.py --workdir=gs://bucket/run
#
# SLICES=2 for multislice. Secrets: xpk writes the values of --env and --env-file into the workload;
# hand them over as Kubernetes secrets instead.
set -euo pipefail

for variable in CLUSTER PROJECT ZONE TYPE IMAGE; do
  if [ -z "${!variable:-}" ]; then
    echo "error: the variable $variable is missing; see the top of launch/gke.sh" >&2
    exit 2
  fi
done
if [ $# -lt 2 ]; then
  echo "error: usage: launch/gke.sh NAME ARGS FOR main.py" >&2
  exit 2
fi
name=$1
shift
wrong() { # what; exits 2
  echo "error: $1; see the top of launch/gke.sh" >&2
  exit 2
}
[[ "$name" =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] ||
  wrong "NAME is up to 40 lower-case letters, digits and hyphens, beginning with a letter"
[[ "${SLICES:-1}" =~ ^[1-9][0-9]{0,2}$ ]] || wrong "SLICES is a whole number from 1 to 999, without leading zeros"

# Status 75: main.py was told to leave and has saved. xpk restarts on 42 and 127 to 255 by itself.
# "exec", so that the pod's SIGTERM reaches main.py and not a shell around it.
exec xpk workload create \
  --cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE" --workload="$name" \
  --tpu-type="$TYPE" --num-slices="${SLICES:-1}" --docker-image="$IMAGE" \
  --max-restarts=100 --restart-on-exit-codes=75 --termination-grace-period-seconds=120 \
  --command="cd /opt/beit_jax && exec python main.py $(printf '%q ' "$@")"
