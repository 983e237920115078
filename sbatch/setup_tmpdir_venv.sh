#!/usr/bin/env bash
# Makes a venv with fastdllm's dependencies on the node's own disk: `setup_tmpdir_venv.sh FOLDER [EXTRA...]`,
# once on each node, from the repository's root; eval is the extra that evaluations need. Imports from a shared file
# system are what many nodes wait for at the start.
# BASE_PYTHON names the Python (3.11 or 3.12; python3 by default). A finished folder is left as it is.
set -euo pipefail

folder=$1
[ -f "$folder/installed" ] && exit
rm -rf "$folder"
"${BASE_PYTHON:-python3}" -m venv "$folder"
# The dependencies alone: train.py and evaluate.py find the package beside them, and nodes must not all build it in the
# shared repository.
"$folder/bin/python" - "${@:2}" >"$folder/requirements.txt" <<'PYTHON'
import sys, tomllib

project = tomllib.load(open("pyproject.toml", "rb"))["project"]
extras = [line for name in sys.argv[1:] for line in project["optional-dependencies"][name]]
print(*project["dependencies"], *extras, sep="\n")
PYTHON
"$folder/bin/python" -m pip install --quiet --requirement "$folder/requirements.txt"
touch "$folder/installed"
