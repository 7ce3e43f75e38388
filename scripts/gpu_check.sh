#!/usr/bin/env bash
# All that wants a GPU, in eight minutes at most; with the python that is found, or $PYTHON.
# Newer packages may lie beside the machine's own: PYTHONPATH=/their/folder scripts/gpu_check.sh
exec "${PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/gpu_check.py" "$@"
