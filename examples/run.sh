#!/bin/sh
# The main job on a fresh machine: sets up a virtual environment, then upgrades and fine-tunes a network.
# VENV names another environment; arguments go to the example.
set -eu
cd "$(dirname "$0")/.."
VENV=${VENV:-.venv}
[ -x "$VENV/bin/pip" ] || python3 -m venv "$VENV"
"$VENV/bin/pip" install --quiet --editable '.[examples]'
exec "$VENV/bin/python" examples/upgrade_backbone.py "$@"
