#!/usr/bin/env bash
# Resolve requirements/*.in into lock files for Python 3.11-3.13. Needs uv.
#
# uv does not see wheels that only pip is set up to find. Where the CPU build of PyTorch is such a wheel:
#   scripts/lock.sh --find-links "$(pip config get :env:.find-links)"
set -euo pipefail
cd "$(dirname "$0")/../requirements"

lock() {
    local name=$1
    shift
    uv pip compile --quiet --universal --python-version 3.11 --no-emit-find-links --no-emit-index-url --no-annotate \
        --custom-compile-command scripts/lock.sh --output-file "$name.txt" "$@" "$name.in"
    # Overridden packages stay in the output under a marker that is never true.
    sed -i "/sys_platform == 'never'/d" "$name.txt"
}

lock cpu --override overrides.txt "$@"
lock cuda
