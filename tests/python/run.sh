#!/usr/bin/env bash
# usage: run.sh VENV COMMAND...
# Runs a command with the Python of VENV, in which `./dev test` has installed the package; 77 (skipped) without it.
set -euo pipefail
venv=$1
shift
if [[ ! -x $venv/bin/python ]]; then
  echo "there is no Python environment at $venv; ./dev test makes it"
  exit 77
fi
exec "$venv/bin/python" -W ignore "$@"
