#!/usr/bin/env bash
# Makes a venv with fastdllm's dependencies in a folder on the node's own disk: `setup_tmpdir_venv.sh FOLDER`, once on
# each node, from the repository's root. Imports from a shared file system are what many nodes wait for at the start.
# BASE_PYTHON names the Python (3.11 or 3.12; python3 by default). A finished folder is left as it is.
set -euo pipefail

folder=$1
[ -f "$folder/installed" ] && exit
rm -rf "$folder"
"${BASE_PYTHON:-python3}" -m venv "$folder"
# The dependencies alone: train.py finds the package beside it, and nodes must not all build it in the shared repository.
"$folder/bin/python" -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' \
    >"$folder/requirements.txt"
"$folder/bin/python" -m pip install --quiet --requirement "$folder/requirements.txt"
touch "$folder/installed"
