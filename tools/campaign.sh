#!/usr/bin/env bash
# Everything a GPU is needed for, in one call of at most nine minutes: the tests, the benchmarks
# with their records, a profile of the step, and a minute of training with its grids.
#
#   tools/campaign.sh OUT [FOLDER OF IMAGES]
#
#   ONLY="convs step"   these sections alone, each with all of the time that is left; "native" (the
#                       kernels' tests on the GPU), "slow" and "sweep" run only when they are named
#   SECONDS_IN_ALL=540  what all together may take: a section gets its share, and what is left over
#
# Runs from the tree, installed or not, on a machine without a GPU in small, goes on after a section
# that fails, and exits 1 then. OUT gets a log a section, the records, the run folder and
# summary.txt; OUT/campaign.tar has all but checkpoints, and at most 16 MB. FASTGAN_COMMIT names the
# commit of a copy without git. The records go to benchmarks/results by hand.
set -uo pipefail
sections="info convs step graph tests train kernels profile run growth data"
named="native slow sweep"
die() {
  echo "campaign: $*" >&2
  exit 2
}
[ $# -ge 1 ] && [ $# -le 2 ] && [ -n "$1" ] || die "usage: tools/campaign.sh OUT [FOLDER OF IMAGES]"
for name in ${ONLY:-}; do
  [[ " $sections $named " == *" $name "* ]] || die "ONLY names $name, the sections are: $sections $named"
done
in_all=${SECONDS_IN_ALL:-540}
[[ $in_all =~ ^[1-9][0-9]*$ ]] || die "SECONDS_IN_ALL must be a whole number of seconds, got $in_all"
out=$(mkdir -p -- "$1" && cd -- "$1" && pwd) || die "OUT cannot be made: $1"
data=faces:20000
[ $# -lt 2 ] || data=$(cd -- "$2" && pwd) || die "no folder of images: $2"
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH=.:kernels:benchmarks${PYTHONPATH:+:$PYTHONPATH}
export FASTGAN_CACHE=${FASTGAN_CACHE:-$out/cache}
"$python" -c 'import torch, fastgan' 2>"$out/import.log" || die "fastgan cannot be imported by $python: $(tail -1 "$out/import.log")"
gpu=$("$python" -c 'import torch; print(int(torch.cuda.is_available()))')
pytest=("$python" -m pytest -p no:cacheprovider -q)
bench=("$python" -m pytest benchmarks --benchmark-only -p no:cacheprovider --timeout 0
  --records "$out/results" -k)

section() { # name, its share of the seconds in hundredths, command ...
  local name=$1 share=$2 began=$SECONDS limit
  shift 2
  if [ -n "${ONLY:-}" ]; then
    [[ " $ONLY " == *" $name "* ]] || return 0
  elif [[ " $named " == *" $name "* ]]; then
    return 0
  fi
  # what sections before have not used is there for this one; 15 s are kept for the end
  spent_shares=$((spent_shares + share))
  limit=$(((in_all - 15) * spent_shares / 100 - SECONDS))
  [ -z "${ONLY:-}" ] || limit=$((in_all - 15 - SECONDS))
  if [ $limit -lt 5 ]; then
    echo "FAILED  $name: no time was left for it"
    return 0
  fi
  timeout --kill-after 5 "$limit" "$@" >"$out/$name.log" 2>&1
  case $? in
    0) echo "ok      $name, $((SECONDS - began)) s" ;;
    124 | 137) echo "FAILED  $name: cut off after $((SECONDS - began)) s" ;;
    *) echo "FAILED  $name, $((SECONDS - began)) s: $(grep -v '^ *$' "$out/$name.log" | tail -1 | cut -c 1-160)" ;;
  esac
}

train_a_minute() { # SIGTERM ends it with a checkpoint and a grid
  timeout -s TERM 60 "$python" -m fastgan train --data "$data" --amp --compile --out "$out/runs" "$@"
  grep -qE '"status": "(done|preempted)"' "$out"/runs/0*/run.json
}
export -f train_a_minute
export python out data

spent_shares=0
small=() train="train and 128 and compile" kernels="kernels and (bf16 or adam)"
length=(--kimg 8000 --batch 128) # a minute at the speed that is aimed at, and longer below it
if [ "$gpu" != 1 ]; then
  small=(--size 32 --width 8 --batch 8) train=train kernels=kernels
  data=faces:64 length=(--kimg 0.5 "${small[@]}")
fi
{
  section info 4 "$python" -m fastgan info
  section convs 17 "${bench[@]}" convs
  section step 28 "${bench[@]}" step
  section graph 3 "${pytest[@]}" tests/test_graph.py
  section tests 12 "${pytest[@]}" -m "gpu and not slow" tests
  section train 9 "${bench[@]}" "$train"
  section kernels 8 "${bench[@]}" "$kernels"
  section profile 4 "$python" tools/profile_step.py "$out/profile.json" "${small[@]}"
  section run 13 bash -c 'train_a_minute "$@"' - "${length[@]}"
  section growth 1 "${bench[@]}" growth
  section data 1 "${bench[@]}" data
  section native 0 "${pytest[@]}" tests/kernels tests/test_step.py tests/test_conv4x4.py
  section slow 0 "${pytest[@]}" -m slow tests
  section sweep 0 "$python" tools/sweep_launches.py --out "$out/sweep.json"
} | tee "$out/summary.txt"
"$python" - "$out" <<'PY' | tee -a "$out/summary.txt"
import json, statistics, sys
from pathlib import Path

out = Path(sys.argv[1])
for path in sorted(out.glob("results/*/step.json")):
    for row in json.loads(path.read_text())["rows"]:
        figure = f"{row['img_per_s']:12,.0f} img/s" if row["ms"] else f"{'none':>12}      "
        print(f"{figure}  {row['case']:<18} {row['variant']}  {row.get('reason', '')}".rstrip())
for path in sorted(out.glob("runs/0*/stats.jsonl")):
    rates = [json.loads(line)["img_per_s"] for line in path.read_text().splitlines()]
    if rates:
        rate = statistics.median(rates[len(rates) // 4 :])
        print(f"{rate:12,.0f} img/s  the run {path.parent.name}")
PY
cd "$out" || exit 1
find . -type f -size -4M ! -path './cache/*' ! -path '*/checkpoints/*' ! -name campaign.tar \
  ! -name 'fake-*[1-9].*kimg.png' -print0 | sort -z | tar --null -T - -cf campaign.tar
[ "$(stat -c %s campaign.tar)" -le $((16 << 20)) ] || echo "campaign.tar is larger than 16 MB" | tee -a summary.txt
! grep -q '^FAILED' summary.txt
