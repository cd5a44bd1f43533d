#!/bin/sh
# The tests on a fresh machine: sets up a virtual environment, then runs everything but the whole zoo.
# VENV names another environment; arguments go to pytest (`-m "zoo or not zoo"`: all).
set -eu
cd "$(dirname "$0")/.."
VENV=${VENV:-.venv}
[ -x "$VENV/bin/python" ] || python3 -m venv "$VENV"
"$VENV/bin/pip" install --quiet --editable '.[dev]'
[ $# -gt 0 ] || set -- -m "not zoo"
exec "$VENV/bin/python" -m pytest -n 2 "$@"
