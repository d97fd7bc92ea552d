#!/usr/bin/env bash
# Every recipe that ships with fastgan, each for a while on the same images: what it makes of them.
#
#   tools/train_recipes.sh OUT FOLDER|faces:N [KIMG [RECIPE ...]]
#
# Drawn faces are not cropped, whatever the recipe says.
# Each run is OUT/RECIPE/00000-*, its last grid in samples/. KIMG is 30 by default.
# On two CPU cores 30 kimg are 4 minutes of a DCGAN at 64 px and 10 at 112, and 2 hours of
# two-rate64-autoencoder, which is left out there unless it is named.
set -uo pipefail
if [ $# -lt 2 ] || [[ ! -d $2 && $2 != faces:* ]]; then
  echo "usage: tools/train_recipes.sh OUT FOLDER|faces:N [KIMG [RECIPE ...]]" >&2
  exit 2
fi
out=$1 data=$2 kimg=${3:-30}
shift 2
[ $# -eq 0 ] || shift
python=${PYTHON:-python3} here=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH=$here:$here/kernels${PYTHONPATH:+:$PYTHONPATH}
names=("$@")
if [ $# -eq 0 ]; then
  names=(tutorial64 ffhq64 celeba64-subset two-rate64 celeba112 stable64 speed)
  ! "$python" -c 'import torch; exit(not torch.cuda.is_available())' || names+=(two-rate64-autoencoder)
fi
crop=()
[[ $data != faces:* ]] || crop=(--crop center)
failed=0
for name in "${names[@]}"; do
  "$python" -m fastgan train --recipe "$name" --data "$data" --kimg "$kimg" \
    --out "$out/$name" "${crop[@]}" || failed=1
done
exit $failed
