#!/usr/bin/env bash
# Measures a checkpoint with layer reuse: reuse_k 1, 2, 3 x first, middle, last; seven cells, as k1 has no subset.
# Submits an array job, one cell a task; only cells that have no valid row yet.
#
#   CLUSTER=pace sbatch/run_reuse_experiments.sh [OPTION]... [-- OPTION OF evaluate.py...]
#
#   --status             only print which rows are there
#   --dry-run            print what would be submitted, submit nothing
#   --limit N            first N problems of the task; other cells than those of all problems
#   --force [CELL,...]   measure again what has a row: everything, or cells such as k2_middle
#   --task T             lm-eval task; without it the one that the checkpoint remembers
#   --checkpoint C       without it the newest export under runs/
#   --cells CELL,...     these cells alone, such as k1,k2_first
#   --local              measure on this machine without Slurm, one cell after the other
#
# Options of sbatch come from its environment, such as SBATCH_TIMELIMIT=2:00:00. Logs: logs/fastdllm-reuse-JOB_TASK.out.

#SBATCH --job-name=fastdllm-reuse
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

# cell_options CELL: the options of evaluate.py for k1 or k2_middle.
cell_options() {
    local k=${1%%_*}
    echo "--reuse_k ${k#k}"
    [ "$k" = k1 ] || echo "--subset ${1#*_}"
}

# measure_cells: a task of an array takes the cell of its number.
measure_cells() {
    if [ -z "$cells" ]; then
        [ -z "${SLURM_ARRAY_TASK_ID:-}" ] || fail "an array needs --cells; call this script without sbatch."
        measure --grid ${force:+--force "$force"}
        return
    fi
    local cell forced
    pick "$cells"
    for cell in "${picked[@]}"; do
        forced=()
        [[ $force != all && ,$force, != *",$cell,"* ]] || forced=(--force all)
        # shellcheck disable=SC2046 # words
        measure $(cell_options "$cell") "${forced[@]}"
    done
}

# choose_cells: sets `cells` to those that have no valid row or are forced, out of evaluate.py's status in `found`.
choose_cells() {
    local known name
    known=$(awk '$1 ~ /^k[0-9]+_/ { sub(/^k1_.*/, "k1", $1); print $1, $2 }' <<<"$found")
    for name in ${cells//,/ } $([ "$force" = all ] || echo "${force//,/ }"); do
        [[ $'\n'$known == *$'\n'"$name "* ]] ||
            fail "there is no cell $name; there are $(cut -d ' ' -f 1 <<<"$known" | uniq | paste -s -d ' ')."
    done
    cells=$(awk -v cells=",$cells," -v force=",$force," '
        function has(list) { return index(list, "," $1 ",") }
        (cells == ",," || has(cells)) && ($2 != "done" || force == ",all," || has(force)) && !seen[$1]++ { print $1 }
    ' <<<"$known" | paste -s -d ' ')
}

cells='' extra=(--cells)
parse_options "$@"
[ ${#positional[@]} = 0 ] || fail "${positional[0]}: not an option; cells are given as --cells k2_first,k3_last."
shopt -s extglob
cells=${cells//k1_+([a-z])/k1} force=${force//k1_+([a-z])/k1} # one cell, whatever the subset
use_model
prepare
if ! is_submitter; then
    measure_cells
    exit
fi
look --grid
choose_cells
submit "$cells" --cells "${cells// /,}" ${force:+--force "$force"}
