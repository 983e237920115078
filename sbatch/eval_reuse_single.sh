#!/usr/bin/env bash
# Measures one cell: a checkpoint with one reuse_k and subset.
#
#   CLUSTER=pace sbatch sbatch/eval_reuse_single.sh REUSE_K SUBSET [TASK] [OPTION]... [-- OPTION OF evaluate.py...]
#
# from the repository's root, after `source sbatch/clusters/pace.env`. From anywhere else call it without the first word
# sbatch: it looks whether the row is there and submits itself. REUSE_K 1 is no reuse, whatever SUBSET (first, middle,
# last, or layers such as 3,4,5).
#
#   --status          only print whether the row is there
#   --dry-run         print what would be submitted, submit nothing
#   --limit N         first N problems of the task; another cell than that of all problems
#   --force           measure it again
#   --checkpoint C    without it the newest export under runs/
#   --local           measure on this machine, without Slurm

#SBATCH --job-name=fastdllm-reuse-single
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

force_has_names=''
parse_options "$@"
[[ ${#positional[@]} = [23] ]] || fail "give REUSE_K SUBSET [TASK], such as 2 middle gsm8k; got: ${positional[*]}"
[[ ${positional[1]} =~ ^(first|middle|last|[0-9]+(,[0-9]+)*)$ ]] ||
    fail "SUBSET must be first, middle, last or layers such as 3,4,5; got ${positional[1]}."
[ -z "$task" ] || [ ${#positional[@]} = 2 ] || fail "the task is given twice: ${positional[2]} and --task $task."
task=${positional[2]:-$task}
use_model
cell=(--reuse_k "${positional[0]}") name=k${positional[0]}
[ "$name" = k1 ] || cell+=(--subset "${positional[1]}") name+=_${positional[1]}
prepare
if ! is_submitter; then
    measure "${cell[@]}" ${force:+--force}
    exit
fi
look "${cell[@]}"
[ -n "$force" ] || ! grep -q '^\([0-9]*\) of \1 measurements done' <<<"$found" || name=''
submit "$name" "${positional[@]:0:2}" ${force:+--force}
