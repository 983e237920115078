#!/usr/bin/env bash
# Measures the baseline on several tasks on this machine, without Slurm: diffusion without reuse, and the model it was
# made from token by token; only what has no valid row yet.
#
#   sbatch/eval_script.sh --checkpoint runs/NAME/export --source Qwen/Qwen2.5-1.5B-Instruct [OPTION]... [-- ...]
#
#   --checkpoint C    adapted checkpoint, decoded by diffusion
#   --source S        autoregressive model, decoded token by token
#   --task T,...      tasks of lm-eval, each on its own; gsm8k,minerva_math,ifeval,mmlu without it
#   --status          only print which rows are there
#   --dry-run         print what would be measured, measure nothing
#   --limit N         first N problems of each task; other rows than those of all problems
#   --force           measure again what has a row
#
# After --: options of evaluate.py, such as --offline DIR.

# shellcheck source=sbatch/evaluation.bash
source "$(dirname "${BASH_SOURCE[0]}")/evaluation.bash"

is_local=yes
baseline "$@"
