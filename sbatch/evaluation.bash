# shellcheck shell=bash
# What the evaluation scripts share: options, cluster, Python, submitting, measuring. They source it.
# A script that is called looks at the rows with evaluate.py first, so that wrong options and checkpoints are refused
# before anything waits in a queue, and submits itself; in a job (or with --local) it measures. Paths are those of
# evaluate.py: from the repository's root.
set -euo pipefail

script=$(realpath "$0")
cd "$(dirname "${BASH_SOURCE[0]}")/.."

KNOWN=(--status --dry-run --limit --force --task --checkpoint --local --help)
MOST_RESTARTS=20 # of one job at its time limit: one that gets no further must end some day

action=run force='' is_local='' task='' checkpoint='' limit='' positional=() options=() passed=() cluster_options=()
extra=() force_has_names=yes # a script may change these two before it parses

fail() {
    echo "error: $*" >&2
    exit 2
}

# show_usage: prints the comment at the top of the script.
show_usage() {
    sed -n '2,/^$/s/^# \{0,1\}//p' "$script"
}

# parse_options ARGUMENT...: sets the variables above. `extra` are options of one script, each with a value.
parse_options() {
    while [ $# -gt 0 ]; do
        [[ $1 != --*=* ]] || set -- "${1%%=*}" "${1#*=}" "${@:2}"
        case $1 in
            -h | --help) show_usage && exit ;;
            --status | --dry-run) action=${1#--} ;;
            --local) is_local=yes ;;
            --force)
                force=all
                [[ -z $force_has_names || ${2:--} == -* ]] || { force=$2 && shift; }
                ;;
            --checkpoint | --task | --limit) take_value "$@" && shift ;;
            --) passed=("${@:2}") && break ;;
            -*)
                [[ " ${extra[*]} " == *" $1 "* ]] || refuse_option "$1"
                take_value "$@" && shift
                ;;
            *) positional+=("$1") ;;
        esac
        shift
    done
}

# take_value OPTION VALUE...: into the variable of its name.
take_value() {
    [[ -n ${2:-} && $2 != --* ]] || fail "$1 needs a value; see --help."
    printf -v "${1#--}" %s "$2"
}

refuse_option() {
    local nearest
    nearest=$(printf '%s\n' "${KNOWN[@]}" "${extra[@]}" | sed '/^$/d' | by_likeness "$1" | head -n 2 | paste -s -d ' ')
    fail "unknown option $1; nearest: ${nearest/ / or }. Options of evaluate.py go after --, and --help shows all."
}

# by_likeness WORD: the lines of the input, those with the fewest letters to change into WORD first.
by_likeness() {
    awk -v word="$1" '{
        for (j = 0; j <= length(word); j++) last[j] = j
        for (i = 1; i <= length($0); i++) {
            now[0] = i
            for (j = 1; j <= length(word); j++) {
                least = last[j - 1] + (substr($0, i, 1) != substr(word, j, 1))
                if (last[j] + 1 < least) least = last[j] + 1
                if (now[j - 1] + 1 < least) least = now[j - 1] + 1
                now[j] = least
            }
            for (j = 0; j <= length(word); j++) last[j] = now[j]
        }
        print last[length(word)], $0
    }' | sort -n -s -k 1,1 | cut -d ' ' -f 2-
}

is_job() { [ -n "${SLURM_JOB_ID:-}" ] && [ -z "$is_local" ]; }
is_submitter() { [ "$action" != status ] && [ -z "$is_local" ] && ! is_job; }

# prepare: reads the cluster's file and finds the Python; a job whose cluster names none makes a venv on its node.
prepare() {
    local file=sbatch/clusters/${CLUSTER:-}.env
    if [ -n "${CLUSTER:-}" ]; then
        [ -f "$file" ] || fail "CLUSTER=$CLUSTER: there is no $file; there are $(echo sbatch/clusters/*.env)."
        # shellcheck source=sbatch/clusters/pace.env
        source "$file"
    elif is_submitter || is_job; then
        fail "name a file of sbatch/clusters, such as CLUSTER=pace; --local measures on this machine without Slurm."
    fi
    if is_submitter && [ -z "$(command -v sbatch)" ]; then
        fail "there is no sbatch on this machine; --local measures here, one after the other."
    fi
    read -ra cluster_options <<<"${EVALUATE_OPTIONS:-}"
    [ -z "$limit" ] || options+=(--limit "$limit")
    python=${FASTDLLM_PYTHON:-.venv/bin/python}
    if is_job && [ -z "${FASTDLLM_PYTHON:-}" ]; then
        python=${TMPDIR:-/tmp}/fastdllm-$SLURM_JOB_ID/bin/python
        bash sbatch/setup_tmpdir_venv.sh "${python%/bin/python}" eval
    fi
    [ -n "$(command -v "$python")" ] ||
        fail "$python: no such Python; \`make .venv/installed\` makes one, FASTDLLM_PYTHON=... names one."
}

# evaluate OPTION...: evaluate.py with the cluster's options, ours, these, and what came after --.
evaluate() {
    set -- evaluate.py "${cluster_options[@]}" "${options[@]}" "$@" "${passed[@]}"
    ! is_job || echo "job $(job_number), restart ${SLURM_RESTART_COUNT:-0}, on ${SLURMD_NODENAME:-$(hostname)}: $*"
    "$python" "$@"
}

# use_model: --checkpoint and --task, where they are given, into `options`.
use_model() {
    [ -z "$checkpoint" ] || options+=(--checkpoint "$checkpoint")
    [ -z "$task" ] || options+=(--task "$task")
}

# look OPTION...: prints evaluate.py's status and leaves it in `found`. The newest export is named from here on: by the
# time a job starts there may be another.
look() {
    local newest
    found=$(evaluate "$@" --status)
    echo "$found"
    newest=$(sed -n 's/^checkpoint: \(.*\) (the newest export under .*/\1/p' <<<"$found")
    [ -z "$newest" ] || options+=(--checkpoint "$newest")
}

# submit "NAME..." ARGUMENT...: this script as an array of one task for each name, or only says so. The log of a task
# ends with its place among the names, from 0.
submit() {
    local names=$1 array command job line
    read -ra array <<<"$names"
    if [ -z "$names" ]; then
        echo "nothing to submit: the rows are there (--force measures them again)"
        return
    fi
    command=(sbatch --parsable "--array=0-$((${#array[@]} - 1))" "--output=$PWD/logs/%x-%A_%a.out")
    command+=("$script" "${@:2}" "${options[@]}")
    [ ${#passed[@]} = 0 ] || command+=(-- "${passed[@]}")
    if [ "$action" = dry-run ]; then
        echo "would submit an array of ${#array[@]}: $names"
        printf -v line '%q ' "${command[@]}"
        echo "${line//\\,/,}" # which need no quotes here
        return
    fi
    mkdir -p logs
    job=$("${command[@]}")
    job=${job%%;*} # where there are several clusters, theirs follows
    echo "submitted job $job, an array of ${#array[@]}: $names; logs: logs/*-${job}_*.out"
}

# pick NAME,...: sets `picked` to the names, in a task of an array to the one of its number.
pick() {
    read -ra picked <<<"${1//,/ }"
    [ -n "${SLURM_ARRAY_TASK_ID:-}" ] || return 0
    [ -n "${picked[SLURM_ARRAY_TASK_ID]:-}" ] ||
        fail "task $SLURM_ARRAY_TASK_ID of this array has no name in $1; call the script without sbatch."
    picked=("${picked[SLURM_ARRAY_TASK_ID]}")
}

# measure OPTION...: evaluate.py here, in the way of `action`. A job that Slurm warns of its time limit requeues itself;
# samples that are finished by then are not answered again.
measure() {
    [ "$action" = run ] || set -- "$@" "--${action/-/_}"
    if ! is_job; then
        evaluate "$@"
        return
    fi
    trap requeue USR1
    evaluate "$@" &
    wait $! || wait $! # the first ends at the signal, the second with the program
}

# job_number: that of this job alone; the last task of an array has the array's own as SLURM_JOB_ID.
job_number() {
    echo "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
}

# requeue: what a job does when its time is nearly over. No `return` here: in a trap it would end `measure` too.
requeue() {
    if [ "${SLURM_RESTART_COUNT:-0}" -lt "$MOST_RESTARTS" ]; then
        echo "the time is nearly over: requeueing job $(job_number), which goes on from its finished samples"
        scontrol requeue "$(job_number)"
    else
        echo "the time is nearly over, after $MOST_RESTARTS restarts: submit again to go on from the finished samples"
    fi
}

# join NAME...: the names with commas between them.
join() {
    local IFS=,
    echo "$*"
}

# baseline ARGUMENT...: what eval_script.sh and eval_pace_script.sh do: tasks without reuse, by diffusion with
# --checkpoint and token by token with --source. A job of an array takes the task of its number.
baseline() {
    local source='' models tasks one wanted=()
    extra=(--source) force_has_names=''
    parse_options "$@"
    [ ${#positional[@]} = 0 ] || fail "${positional[0]}: not an option; tasks are given as --task gsm8k,ifeval."
    [ -n "$checkpoint$source" ] ||
        fail "name the adapted checkpoint with --checkpoint, the model it was made from with --source, or both."
    prepare
    models=[$checkpoint${checkpoint:+${source:+,}}$source]
    tasks=${task:-gsm8k,minerva_math,ifeval,mmlu}
    if ! is_submitter; then
        pick "$tasks"
        measure --axes.checkpoint "$models" --axes.task "[$(join "${picked[@]}")]" ${force:+--force all}
        return
    fi
    look --axes.checkpoint "$models" --axes.task "[$tasks]"
    [[ -z $checkpoint || $found == *k1_first* ]] ||
        fail "--checkpoint $checkpoint is not measured by diffusion without reuse; is it the --source?"
    [[ -z $source || $found =~ (^|$'\n')ar\  ]] || fail "--source $source is adapted: give it as --checkpoint."
    for one in ${tasks//,/ }; do
        if [ -n "$force" ] || grep -E -e "-$one-(k1|ar)[-.]" <<<"$found" | grep -qv '^[^ ]* *done '; then
            wanted+=("$one")
        fi
    done
    submit "${wanted[*]}" ${checkpoint:+--checkpoint "$checkpoint"} ${source:+--source "$source"} \
        --task "$(join "${wanted[@]}")" ${force:+--force}
}
