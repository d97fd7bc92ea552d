#!/usr/bin/env bash
# Everything that needs a GPU, in one call: the `gpu` tests, then three short runs with their img/s.
#
#   tools/gpu_check.sh OUT [FOLDER OF IMAGES]
#
# Runs from the tree, installed or not, goes on after a section that fails and exits 1 then. OUT
# gets a log a section, the run folders and summary.txt; all but checkpoints is in OUT/gpu_check.tar.
set -uo pipefail
out=$(mkdir -p "$1" && cd "$1" && pwd)
data=${2:-faces:20000}
[ -d "$data" ] && data=$(cd "$data" && pwd)
cd "$(dirname "$0")/.."
export PYTHONPATH=.:kernels FASTGAN_CACHE=${FASTGAN_CACHE:-$out/cache}
python=${PYTHON:-python3}

section() { # name, command ...
  local name=$1
  shift
  if timeout 240 "$@" >"$out/$name.log" 2>&1; then echo "ok      $name"; else echo "FAILED  $name ($?)"; fi
}

{
  section info "$python" -m fastgan info
  section tests "$python" -m pytest -m gpu -p no:cacheprovider
  section quickstart "$python" -m fastgan train --out "$out/quickstart"
  section plain "$python" -m fastgan train --data "$data" --kimg 1000 --out "$out/plain"
  section amp "$python" -m fastgan train --data "$data" --kimg 3000 --amp --out "$out/amp"
  section amp_compile "$python" -m fastgan train --data "$data" --kimg 3000 --amp --compile --out "$out/amp_compile"
  for run in "$out"/{quickstart,plain,amp,amp_compile}/0*; do
    [ -f "$run/stats.jsonl" ] || continue
    "$python" - "$run" <<'PY'
import json, statistics, sys
rows = [json.loads(line) for line in open(sys.argv[1] + "/stats.jsonl")]
rates = [row["img_per_s"] for row in rows[len(rows) // 4 :]]
print(f"{statistics.median(rates):12,.0f} img/s (median of the last three quarters)  {sys.argv[1]}")
PY
  done
} | tee "$out/summary.txt"
cd "$out" && tar -cf gpu_check.tar --exclude=checkpoints --exclude=cache --exclude='fake-0000*' --exclude=gpu_check.tar -- *
! grep -q '^FAILED' summary.txt
