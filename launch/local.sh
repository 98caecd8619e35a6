#!/usr/bin/env bash
# The whole story on this machine: makes .venv, installs requirements.txt, runs the quickstart.
# Further arguments go to main.py, e.g. launch/local.sh --workdir=/tmp/run
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/setup.sh
source launch/setup.sh
setup_environment requirements.txt
exec "$python" main.py --config=configs/quickstart.py "$@"
