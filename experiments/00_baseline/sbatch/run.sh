#!/usr/bin/env bash
# Runs this study's grid of reuse on its checkpoint, as in results.md: all of GSM8K, at most 512 new tokens, batch 256.
# With Slurm it submits an array job to the cluster that CLUSTER names, without it measures on this machine, one by one.
#
#   CLUSTER=pace experiments/00_baseline/sbatch/run.sh [--status | --dry-run] [--force [CELL,...]] [--limit N] [-- ...]
#
# Options are those of sbatch/run_reuse_experiments.sh, and may change the study's own, such as --checkpoint; after --,
# those of evaluate.py, such as --offline DIR.
set -euo pipefail

runner=$(dirname "${BASH_SOURCE[0]}")/../../../sbatch/run_reuse_experiments.sh
options=(--checkpoint runs/own/export --task gsm8k)
[ -n "$(command -v sbatch)" ] || options+=(--local)
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    if [ "$1" = -h ] || [ "$1" = --help ]; then
        sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
        exit
    fi
    options+=("$1")
    shift
done
exec "$runner" "${options[@]}" -- --max_new_tokens 512 --batch_size 256 "${@:2}"
