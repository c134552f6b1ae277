#!/usr/bin/env bash
# Sets up a virtual environment with llm-compressor and AutoRound, in .venv-calibrated, unless it is there already; prints its Python.
# The project's own environment cannot hold them: llm-compressor pins an older transformers.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=.venv-calibrated
constraints=scripts/calibrated_constraints.txt
stamp=$(cat "$0" "$constraints" | sha256sum)
if [ "$(cat "$venv/.ready" 2>/dev/null)" = "$stamp" ]; then
    echo "$venv/bin/python"
    exit
fi
python=$(command -v python3.11 || command -v python3)
rm -rf "$venv"
"$python" -m venv "$venv" >&2
"$venv/bin/python" -m pip --disable-pip-version-check install --quiet -c "$constraints" llmcompressor auto-round >&2
echo "$stamp" >"$venv/.ready"
echo "$venv/bin/python"
