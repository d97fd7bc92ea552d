#!/usr/bin/env bash
# The long forms of the tests, which the README's test command leaves out. Minutes, not seconds.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" -m pytest -m slow "$@"
