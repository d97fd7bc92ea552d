#!/usr/bin/env bash
# Everything a GPU is needed for: the tests, the benchmarks with their records, a profile of the
# step, and a run of sixty seconds, its start among them, with its grids.
#
#   tools/campaign.sh OUT [FOLDER OF IMAGES]
#
#   SECONDS_IN_ALL=540  what all together may take: a section gets its share, and what is left over
#   ONLY="data more"    these sections alone, each with all of the time that is left. Only when they
#                       are named: "data" (decoding, caches, feeds; FASTGAN_FACES is passed on),
#                       "tiles" (other tiles for the convolutions), "more" (steps of other sizes
#                       and batches), "compiled" (tests that compile), "native" (the kernels' tests
#                       on the GPU), "reference" (the eager reference, 3,000 kimg: four minutes on an
#                       H200), "recipes" (each for 300 kimg), "use" (every command on the run, and
#                       a run that is evaluated as it goes), "options" (tests of what a step can be
#                       asked, of states and health), "slow", "autotuned" and "sweep"
#
# In one call it takes at most nine minutes. It runs from the tree, installed or not, on a machine
# without a GPU in small, goes on after a section that fails, and exits 1 then. OUT gets a log a
# section, the records, the run folder and summary.txt. OUT/campaign.tar has all of it but cache and
# checkpoints, and at most 16 MB: where there is more, the first grids stay out, and the summary
# says so. FASTGAN_COMMIT names the commit of a copy without git. The records go to
# benchmarks/results by hand.
set -ufo pipefail
sections="info step run train profile convs graph tests growth kernels"
named="data tiles more compiled native reference recipes use options slow autotuned sweep"
die() {
  echo "campaign: $*" >&2
  exit 2
}
usage="usage: tools/campaign.sh OUT [FOLDER OF IMAGES], with ONLY= and SECONDS_IN_ALL= before it"
[ $# -ge 1 ] && [ $# -le 2 ] && [ -n "$1" ] && [[ $1 != -* ]] || die "$usage"
for name in ${ONLY:-}; do
  [[ " $sections $named " == *" $name "* ]] || die "ONLY names $name, the sections are: $sections $named"
done
in_all=${SECONDS_IN_ALL:-540}
[[ $in_all =~ ^[1-9][0-9]*$ ]] || die "SECONDS_IN_ALL must be a whole number of seconds, got $in_all"
data=
[ $# -lt 2 ] || data=$(cd -- "$2" 2>/dev/null && pwd) || die "no folder of images: $2"
[ ! -d "$1" ] || [ -e "$1/.campaign" ] || [ -z "$(ls -A -- "$1")" ] ||
  die "OUT must be new, empty, or of an earlier campaign, whose run is replaced: $1"
out=$(mkdir -p -- "$1" 2>/dev/null && cd -- "$1" && pwd) && touch "$out/.campaign" 2>/dev/null ||
  die "OUT cannot be written: $1"
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH=.:kernels:benchmarks${PYTHONPATH:+:$PYTHONPATH}
export FASTGAN_CACHE=${FASTGAN_CACHE:-$out/cache}
"$python" -c 'import fastgan.cli, fastgan.trainer, pytest_benchmark, pytest_timeout' 2>"$out/import.log" ||
  die "fastgan cannot be imported by $python: $(tail -1 "$out/import.log")"
gpu=$("$python" -c 'import torch; print(int(torch.cuda.is_available()))')
[ "$gpu" = 0 ] || "$python" -c 'from fastgan.env import commit; exit(commit()[0] is None)' ||
  die "the records need a commit: FASTGAN_COMMIT must name it, where there is no git"
# what one section compiles the next one finds; PyTorch cannot compile in a path with a space
[[ $FASTGAN_CACHE == *" "* ]] || export TORCHINDUCTOR_CACHE_DIR=$FASTGAN_CACHE/compiled
pytest=("$python" -m pytest -p no:cacheprovider -q)
# compiling is what its tests wait for: several processes, where pytest-xdist is there
[ "$gpu" = 0 ] || ! "$python" -c 'import xdist' 2>/dev/null || pytest+=(-n 6)
bench=("$python" -m pytest benchmarks --benchmark-only -p no:cacheprovider --timeout 0
  --records "$out/results" -k)

say() { echo "$*" | tee -a "$out/summary.txt"; }
stop() { # what runs is the leader of a group of its own
  kill -TERM -- "-$running" 2>/dev/null
  say "FAILED  interrupted; not done: ${now:-} and what comes after it"
  exit 130
}
running=0 now=
trap stop INT TERM

section() { # name, its share of the seconds in hundredths, command ...
  local name=$1 share=$2 began=$SECONDS limit left code
  shift 2
  if [ -n "${ONLY:-}" ]; then
    [[ " $ONLY " == *" $name "* ]] || return 0
  elif [[ " $named " == *" $name "* ]]; then
    return 0
  fi
  # what sections before have not used is there for this one; 15 s are kept for the end
  spent_shares=$((spent_shares + share))
  left=$((in_all - 15 - SECONDS))
  limit=$(((in_all - 15) * spent_shares / 100 - SECONDS))
  [ $limit -ge 20 ] || limit=20
  [ $limit -le $left ] && [ -z "${ONLY:-}" ] || limit=$left
  [ "$name" != run ] || [ $limit -le 60 ] || limit=60 # which is what it is meant to take
  if [ $limit -lt 5 ]; then
    say "FAILED  $name: no time was left for it"
    return 0
  fi
  now=$name
  timeout --kill-after 20 "$limit" "$@" >"$out/$name.log" 2>&1 &
  running=$!
  wait "$running"
  code=$?
  if [ "$name" = run ] && ended_well; then code=0; fi
  if [ "$gpu" != 1 ] && [ $code = 5 ]; then # pytest's, where no test is left
    say "skipped $name: nothing in it is for this machine"
    return 0
  fi
  case $code in
    0)
      if [[ $name =~ ^(tests|native|graph|slow|compiled|options)$ ]] && ! grep -q '[0-9] passed' "$out/$name.log"; then
        say "skipped $name: nothing in it is for this machine"
      else
        say "ok      $name, $((SECONDS - began)) s"
      fi
      ;;
    124 | 137) say "FAILED  $name: cut off after $((SECONDS - began)) s" ;;
    *) say "FAILED  $name, $((SECONDS - began)) s: $(grep -v '^ *$' "$out/$name.log" | tail -1 | cut -c 1-160)" ;;
  esac
}

ended_well() { # SIGTERM ends the run with a checkpoint and a grid
  find "$out/runs" -name run.json -exec grep -lE '"status": "(done|preempted)"' {} + 2>/dev/null |
    grep -q .
}

rm -rf "$out/runs" "$out/recipes" "$out/used" "$out/summary.txt"
spent_shares=0
small=() reference_kimg=3000 recipes_kimg=300 recipes= first=b128 compiled="and compile" kernels="kernels and (bf16 or adam)"
# sixty seconds at the speed that is aimed at, and longer below it
length=(--data "${data:-faces:20000}" --kimg 8000 --batch 128)
if [ "$gpu" != 1 ]; then
  small=(--size 32 --width 8 --batch 8) reference_kimg=0.5 recipes_kimg=0.3 recipes=tutorial64 first=b8 compiled= kernels=kernels
  length=(--data "${data:-faces:64}" --kimg 0.5 "${small[@]}")
fi
section info 2 "$python" -m fastgan info
section step 38 "${bench[@]}" "test_step and $first"
section run 12 "$python" -m fastgan train --amp --compile --out "$out/runs" "${length[@]}"
section train 9 "${bench[@]}" "test_train and $first $compiled"
section profile 5 "$python" tools/profile_step.py "$out/profile.json" "${small[@]}"
section convs 8 "${bench[@]}" "convs and not 1024"
section graph 3 "${pytest[@]}" -k "not compile" tests/test_graph.py
section tests 8 "${pytest[@]}" -k "not compile" -m "gpu and not slow" tests
section growth 6 "${bench[@]}" growth
section kernels 6 "${bench[@]}" "$kernels"
section data 0 "${bench[@]}" "data or feeds or saving"
section tiles 0 "${bench[@]}" tiles
section more 0 "${bench[@]}" "test_step and not $first"
section compiled 0 "${pytest[@]}" -k compile -m "not slow" tests/test_graph.py tests/test_step.py
section native 0 "${pytest[@]}" tests/kernels tests/test_step.py
section reference 0 "$python" benchmarks/train_reference.py "${data:-faces:2000}" "$out/reference" \
  --kimg "$reference_kimg" "${small[@]}"
section recipes 0 env PYTHON="$python" tools/train_recipes.sh "$out/recipes" "${data:-faces:2000}" \
  "$recipes_kimg" $recipes
section use 0 env PYTHON="$python" tools/use_run.sh "$out/used" \
  --data "${data:-faces:2000}" "${small[@]}"
section options 0 "${pytest[@]}" -m "not slow" tests/test_state.py tests/test_step_options.py \
  tests/test_health.py tests/test_stats.py tests/test_penalty.py
section slow 0 "${pytest[@]}" -m slow tests
section autotuned 0 "${bench[@]}" autotuned
section sweep 0 "$python" tools/sweep_launches.py --out "$out/sweep.json"
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
"$python" - "$out" <<'PY' | tee -a "$out/summary.txt"
import sys, tarfile
from pathlib import Path

out, most = Path(sys.argv[1]), 16_000_000
files = [p.relative_to(out) for p in out.rglob("*") if p.is_file()]
files = [p for p in files if not {"cache", "checkpoints"} & set(p.parts) and p.name != "campaign.tar"]
size = {p: (out / p).stat().st_size + 1536 for p in files}  # with its headers
grids = sorted(p for p in files if p.name.startswith("fake-"))
left_out = []
for p in [*grids[:-1], *sorted(set(files) - set(grids), key=size.get, reverse=True)]:
    if sum(size.values()) <= most:
        break
    left_out.append(p)
    del size[p]
with tarfile.open(out / "campaign.tar", "w") as tar:
    for p in sorted(size):
        tar.add(out / p, p)
for p in left_out:
    print(f"left out of campaign.tar: {p}")
PY
! grep -q '^FAILED' "$out/summary.txt"
