#!/usr/bin/env bash
# Everything that needs a GPU, in one call: the tests, the benchmarks of the kernels with their
# record, other launch settings, then short runs with their img/s.
#
#   tools/gpu_check.sh OUT [FOLDER OF IMAGES]       ONLY="tests kernels" for some of the sections
#
# Runs from the tree, installed or not, goes on after a section that fails and exits 1 then. OUT
# gets a log a section, the records, the run folders and summary.txt; all but checkpoints is in
# OUT/gpu_check.tar. FASTGAN_COMMIT names the commit of a copy without git.
set -uo pipefail
sections="info tests others large kernels sweep quickstart plain amp_torch amp amp_compile"
die() {
  echo "gpu_check: $*" >&2
  exit 2
}
[ $# -ge 1 ] && [ $# -le 2 ] && [ -n "$1" ] || die "usage: tools/gpu_check.sh OUT [FOLDER OF IMAGES]"
for name in ${ONLY:-}; do
  [[ " $sections " == *" $name "* ]] || die "ONLY names $name, the sections are: $sections"
done
out=$(mkdir -p "$1" && cd "$1" && pwd) || die "OUT cannot be made: $1"
data=${2:-faces:20000}
[ $# -lt 2 ] || data=$(cd "$2" && pwd) || die "no folder of images: $2"
cd "$(dirname "$0")/.."
export PYTHONPATH=.:kernels:benchmarks${PYTHONPATH:+:$PYTHONPATH}
export FASTGAN_CACHE=${FASTGAN_CACHE:-$out/cache}
python=${PYTHON:-python3}

section() { # name, seconds, command ...
  local name=$1 seconds=$2 began=$SECONDS
  shift 2
  [[ -z ${ONLY:-} || " $ONLY " == *" $name "* ]] || return 0
  if timeout "$seconds" "$@" >"$out/$name.log" 2>&1; then echo "ok      $name, $((SECONDS - began)) s"
  else echo "FAILED  $name ($?), $((SECONDS - began)) s"; fi
}
run() { # name, flags of fastgan train
  section "$1" 240 "$python" -m fastgan train --out "$out/$1" "${@:2}"
}

{
  section info 60 "$python" -m fastgan info
  # the tests of the kernels run on the GPU where there is one
  section tests 400 "$python" -m pytest tests/kernels tests/test_step.py -p no:cacheprovider
  section others 200 "$python" -m pytest -m gpu tests -p no:cacheprovider \
    --ignore tests/kernels --ignore tests/test_step.py
  section large 100 "$python" -m pytest -m "gpu and slow" tests/kernels -p no:cacheprovider
  section kernels 580 "$python" -m pytest benchmarks --benchmark-only -k kernels \
    -p no:cacheprovider --records "$out/results"
  section sweep 400 "$python" tools/sweep_launches.py --out "$out/sweep.json"
  run quickstart
  run plain --data "$data" --kimg 1000
  run amp_torch --data "$data" --kimg 3000 --amp --kernels torch
  run amp --data "$data" --kimg 3000 --amp
  run amp_compile --data "$data" --kimg 3000 --amp --compile
  for run in "$out"/{quickstart,plain,amp_torch,amp,amp_compile}/0*; do
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
