#!/usr/bin/env bash
# All that needs a GPU, in one command and under eight minutes on one recent NVIDIA GPU:
#
#   benchmarks/gpu/run.sh [--out out/gpu] [--data cifar10:DIR --weights resnet56.th] [--seconds 460]
#   python benchmarks/gpu/render.py out/gpu/results.json        # a section of docs/results.md
#
# It installs nothing: PYTHON (default python3) needs torch 2.9 or newer and what graphcomp asks for. Each part is a
# process of its own with a limit of its own, fails alone, and what it had measured by then is kept.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" "$root/benchmarks/gpu/measure.py" "$@"
