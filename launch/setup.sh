# shellcheck shell=bash
# Sourced by launch/local.sh and tests/run.sh: makes .venv and installs requirements into it, once.
# Sets `python`. Usage: setup_environment FILE... (requirements files, or "--no-deps FILE").

# What a requirements file asks for, files that it includes with -r among it: once one of them changes,
# the file is installed again.
requirements_of() { # file
  local included
  cat "$1"
  sed -n 's/^-r *//p' "$1" | while read -r included; do
    cat "$(dirname "$1")/$included"
  done
}

setup_environment() {
  local wanted
  if [ -z "${PYTHON:-}" ]; then
    for PYTHON in python3.13 python3.12 python3.11 python3; do
      if command -v "$PYTHON" >/dev/null && "$PYTHON" -c \
        'import ensurepip, sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
        break
      fi
      PYTHON=
    done
  fi
  if [ -z "$PYTHON" ]; then
    echo "error: needs Python 3.11, 3.12 or 3.13 with venv (Debian: apt install python3-venv)" >&2
    exit 1
  fi
  python=.venv/bin/python
  if [ ! -x "$python" ]; then
    "$PYTHON" -m venv .venv
  fi
  for wanted in "$@"; do
    local stamp
    stamp=".venv/installed-$(tr / - <<<"${wanted#--no-deps }")"
    if ! requirements_of "${wanted#--no-deps }" | cmp -s - "$stamp"; then
      echo "installing ${wanted#--no-deps } into .venv (once)"
      # shellcheck disable=SC2086  # "--no-deps FILE" is two words on purpose
      case "$wanted" in
        --no-deps*) "$python" -m pip install --quiet --no-deps -r "${wanted#--no-deps }" ;;
        *) "$python" -m pip install --quiet -r "$wanted" ;;
      esac
      requirements_of "${wanted#--no-deps }" >"$stamp"
    fi
  done
}
