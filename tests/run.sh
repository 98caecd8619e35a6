#!/usr/bin/env bash
# Sets up what the tests need in .venv and runs them. Arguments go to pytest, e.g. -m "not slow".
# BEIT_JAX_IMAGES=/path/to/a/folder tests/run.sh also tries real photographs.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/setup.sh
source launch/setup.sh
setup_environment requirements.txt requirements/hub.txt requirements/parquet.txt \
  requirements/report.txt tests/requirements.txt \
  "--no-deps tests/requirements-peers.txt"
export JAX_PLATFORMS=cpu TF_CPP_MIN_LOG_LEVEL=3
exec "$python" -m pytest "$@"
