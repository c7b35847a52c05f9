#!/usr/bin/env bash
# Unpack a bundle that `make bundle` made, on a machine with torch and without a network, and run a plan.
#   bash bundle/run.sh MINUTES OUT [PLAN] [key=value ...]
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
minutes="$1" out="$(mkdir -p "$2" && cd "$2" && pwd)" plan="${3:-benchmarks/plans/cifar10.yaml}"
shift $(($# < 3 ? $# : 3))
if [ ! -e "$here/unpacked" ]; then
  mkdir -p "$here/code" "$here/data"
  tar -xzf "$here/code.tar.gz" -C "$here/code"
  tar -xzf "$here/data.tar.gz" -C "$here/data"
  for wheel in "$here"/wheels/*.whl; do python3 -m zipfile -e "$wheel" "$here/packages"; done
  touch "$here/unpacked"
fi
cd "$here/code"
export PYTHONPATH="$here/packages"
exec python3 -m benchmarks.ablate "$plan" --minutes "$minutes" --out "$out" \
  data.name=folder "data.root=$here/data" "data.cache_dir=$here/cache" "$@"
