#!/usr/bin/env bash
# What a user does with a run, one command after the other, and how long each takes: a short run
# that is evaluated as it goes, and then every command that takes one.
#
#   tools/use_run.sh OUT [FLAGS OF TRAIN ...]
#
# Goes on after a command that fails, names it, and exits 1 then.
set -uo pipefail
[ $# -ge 1 ] && [[ $1 != -* ]] || {
  echo "usage: tools/use_run.sh OUT [FLAGS OF TRAIN ...]" >&2
  exit 2
}
out=$1
shift
python=${PYTHON:-python3} here=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH=$here:$here/kernels${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$out" || exit 2
kimg=200 count=2000
"$python" -c 'import torch; exit(not torch.cuda.is_available())' || kimg=0.2 count=64
failed=0
fastgan() {
  local began=$SECONDS
  if "$python" -m fastgan "$@"; then
    echo "ok      $1, $((SECONDS - began)) s"
  else
    echo "FAILED  fastgan $*"
    failed=1
  fi
}
fastgan train "$@" --amp --kimg "$kimg" --out "$out/runs" --eval-kimg "$kimg" --eval-count "$count" \
  --spectral-norm --r1 1 --diffaug color translation cutout --instance-noise 0.1
run=$(find "$out/runs" -maxdepth 1 -name '0*' | sort | tail -1)
fastgan evaluate "$run" --count "$count" --against "$run"
fastgan sample "$run" --count 64 --out "$out/grid.png"
fastgan sample "$run" --count 256 --each "$out/each"
fastgan interpolate "$run" --out "$out/walk.webp"
fastgan animate "$run" --out "$out/training.webp"
fastgan report "$run" --out "$out/report.html"
fastgan export "$run" --format safetensors --out "$out/exported"
fastgan sample "$out/exported" --count 16 --out "$out/of-exported.png"
fastgan train "$@" --kimg "$kimg" --init-g "$out/exported/generator.safetensors" --out "$out/again"
exit $failed
