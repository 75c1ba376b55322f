#!/usr/bin/env bash
# Put Triton 3.6.0, which PyTorch 2.11 comes with, beside the locked one, in .venv/triton-3.6, for
# tests/test_triton_36.py. Does nothing when it is there.
set -euo pipefail
cd "$(dirname "$0")/.."

folder=.venv/triton-3.6
if [ -d "$folder" ]; then
    exit 0
fi
echo "setup: triton 3.6.0 -> $folder"
rm -rf "$folder.part"
.venv/bin/python -m pip --disable-pip-version-check install --quiet --no-deps \
    --target "$folder.part" triton==3.6.0
mv "$folder.part" "$folder"
