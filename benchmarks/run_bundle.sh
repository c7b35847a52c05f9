#!/usr/bin/env bash
# Unpack a bundle that `make bundle` made, on a machine with torch and without a network, and run a plan.
#   bash bundle/run.sh MINUTES OUT [PLAN.yaml] [key=value ...]
set -euo pipefail
if [ $# -lt 2 ]; then
  echo "usage: bash run.sh MINUTES OUT [PLAN.yaml] [key=value ...]" >&2
  exit 2
fi
here="$(cd "$(dirname "$0")" && pwd)"
minutes="$1" out="$(mkdir -p "$2" && cd "$2" && pwd)" plan="$here/code/benchmarks/plans/cifar10.yaml"
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
python3 -c 'import pydantic' || {
  echo "error: the bundle is for another Python than $(python3 --version): make bundle BUNDLE_PYTHON=..." >&2
  exit 2
}
exec python3 -m benchmarks.ablate "$plan" --minutes "$minutes" --out "$out" --data "$(cat "$here/name.txt")" \
  data.name=folder "data.root=$here/data" "data.cache_dir=$here/cache" "$@"
