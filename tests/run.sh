#!/bin/sh
# The tests on a fresh machine: sets up a virtual environment, then runs the first two tiers of docs/contributing.md.
# VENV names another environment; arguments go to pytest (`-m "not zoo"`: all but the whole zoo).
set -eu
cd "$(dirname "$0")/.."
VENV=${VENV:-.venv}
[ -x "$VENV/bin/pip" ] || python3 -m venv "$VENV"
"$VENV/bin/pip" install --quiet --editable '.[dev]'
[ $# -gt 0 ] || set -- -m "not gate and not zoo"
exec "$VENV/bin/python" -m pytest -n 2 "$@"
