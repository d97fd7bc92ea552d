#!/usr/bin/env bash
# The tests with the oldest versions that pyproject.toml allows, the long ones of torch.compile among
# them: an older torch compiles to other code, and has lost a gradient in silence.
#
#   tools/test_oldest.sh FOLDER [OPTIONS OF PYTEST ...]
#
# FOLDER gets the virtual environment (6 GB), or has it from last time. A quarter of an hour on two
# cores, and the downloads.
set -euo pipefail
[ $# -ge 1 ] || { echo "usage: tools/test_oldest.sh FOLDER [OPTIONS OF PYTEST ...]" >&2; exit 2; }
folder=$1
shift
cd "$(dirname "$0")/.."
"${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/python" - >"$folder/oldest.txt" <<'PY'
import re
import tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
extras = project["optional-dependencies"]
for line in [*project["dependencies"], *extras["export"], *extras["tensorboard"], *extras["test"]]:
    if found := re.match(r"([\w-]+)>=([\d.]+)[^;]*(;.*)?", line):  # 2.11 is 2.11.x, the newest of it
        print(f"{found[1]}=={found[2]}.*{found[3] or ''}")
PY
"$folder/bin/pip" install --quiet -r "$folder/oldest.txt" -e '.[test]'
"$folder/bin/python" -m pytest -p no:cacheprovider "$@"
"$folder/bin/python" -m pytest -p no:cacheprovider -m slow "$@" \
  tests/test_step.py tests/test_step_options.py tests/test_compiling.py tests/test_spectral.py
