#!/usr/bin/env bash
# Measures the baseline on several tasks on the PACE cluster: diffusion without reuse, and the model it was made from
# token by token. Submits an array job, one task of lm-eval a task of the array; only what has no valid row yet.
#
#   sbatch/eval_pace_script.sh --checkpoint runs/NAME/export --source Qwen/Qwen2.5-1.5B-Instruct [OPTION]... [-- ...]
#
#   --checkpoint C    adapted checkpoint, decoded by diffusion
#   --source S        autoregressive model, decoded token by token
#   --task T,...      tasks of lm-eval, each on its own; gsm8k,minerva_math,ifeval,mmlu without it
#   --status          only print which rows are there
#   --dry-run         print what would be submitted, submit nothing
#   --limit N         first N problems of each task; other rows than those of all problems
#   --force           measure again what has a row
#   --local           measure on this machine without Slurm (that is eval_script.sh)
#
# After --: options of evaluate.py, such as --offline DIR. `CLUSTER` names another cluster than pace. Options of sbatch
# come from its environment, such as SBATCH_TIMELIMIT=8:00:00. Logs: logs/fastdllm-baseline-JOB_TASK.out.

#SBATCH --job-name=fastdllm-baseline
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=2
#SBATCH --signal=B:USR1@60
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=logs/%x-%j.out
here=$(dirname "${BASH_SOURCE[0]}")
[ -f "$here/evaluation.bash" ] || here=sbatch # a job runs a copy of this file, and starts in the repository's root
# shellcheck source=sbatch/evaluation.bash
source "$here/evaluation.bash"

export CLUSTER=${CLUSTER:-pace}
baseline "$@"
