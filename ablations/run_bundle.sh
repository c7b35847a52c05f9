#!/usr/bin/env bash
# Unpacks the bundle that `make bundle` made, on a machine that has torch and scipy but no network, and runs an ablation plan.
#   bash bundle/run.sh MINUTES OUT [PLAN.yaml] [key=value ...]
set -euo pipefail
if [ $# -lt 2 ]; then
  echo "usage: bash run.sh MINUTES OUT [PLAN.yaml] [key=value ...]" >&2
  exit 2
fi
here="$(cd "$(dirname "$0")" && pwd)"
minutes="$1" out="$(mkdir -p "$2" && cd "$2" && pwd)" plan="$here/code/ablations/plans/cifar10.yaml"
shift 2
case "${1:-}" in
  *.yaml | *.yml)
    if [ -e "$1" ]; then plan="$(realpath "$1")"; else plan="$here/code/$1"; fi
    shift ;;
esac
if [ ! -e "$here/unpacked" ]; then
  mkdir -p "$here/code" "$here/data"
  tar -xzf "$here/code.tar.gz" -C "$here/code"
  tar -xzf "$here/data.tar.gz" -C "$here/data"
  for wheel in "$here"/wheels/*.whl; do python3 -m zipfile -e "$wheel" "$here/packages"; done
  touch "$here/unpacked"
fi
cd "$here/code"
export PYTHONPATH="$here/packages${PYTHONPATH:+:$PYTHONPATH}"
python3 -c 'import torch, torchvision, numpy, yaml, scipy' || {
  echo "error: torch, torchvision, numpy, PyYAML or scipy is missing on this machine: install it" >&2
  exit 2
}
python3 -c 'import pydantic, ema_pytorch, tqdm, filelock' || {
  echo "error: the packages of this bundle do not work with $(python3 --version): make the bundle again with BUNDLE_PYTHON set to this version" >&2
  exit 2
}
exec python3 -m ablations.ablate "$plan" --minutes "$minutes" --out "$out" --data "$(cat "$here/name.txt")" \
  data.name=folder "data.root=$here/data" "data.cache_dir=$here/cache" "$@"
