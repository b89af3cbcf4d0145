#!/usr/bin/env bash
# Trains a recipe for as long as it takes: through time limits, preemption and dead nodes.
# Submit from the checkout:
#   sbatch [--nodes=N] [--partition=P] slurm/train_av.sh [CONFIG] [key=value ...]
# CONFIG is configs/av_14b.yaml unless given.
# (options of sbatch stand before the script's name and win over the lines below)
# Rendered by:
#   kinodit slurm render configs/av_14b.yaml --cluster generic --out slurm/train_av.sh
# Not to be edited: change the recipe, the cluster's file or the template, and render again.
#SBATCH --job-name=av_14b
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-gpu=8
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

# Traps call functions:
# shellcheck disable=SC2317,SC2329
set -euo pipefail
umask 027
cd -- "${SLURM_SUBMIT_DIR:?submit this script with sbatch}"

export OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1
export NCCL_DEBUG=WARN

# How a process of this job is started: further options of srun, then a command.
outside=()
within=(.venv/bin/python)

recipe=(configs/av_14b.yaml)
if (($#)) && [[ $1 != *=* ]]; then
    recipe=("$1")
    shift
fi
recipe+=("$@")

say() { echo "== $(date +%FT%T) job $SLURM_JOB_ID: $*" >&2; }

# The batch shell alone gets USR1 ahead of the time limit: save, and come back. With TERM (scancel,
# preemption) the run saves if there is time, and stays away. Training alone knows what to do with a
# signal; other steps are short, and the script looks at `wanted` after each.
wanted="" in_training=0 interrupted=0
pass_on() { # SIGNAL
    interrupted=1
    # A step that has just ended makes scancel fail, which changes nothing.
    ((in_training == 0)) || scancel --signal="$1" "$SLURM_JOB_ID" || true
}
trap 'wanted=${wanted:-requeue}; pass_on USR1' USR1
trap 'wanted=stop; pass_on TERM' TERM

step() { # srun's arguments; sets status
    srun "$@" &
    local child=$!
    # A signal interrupts `wait`: wait again until the step itself has ended.
    while :; do
        interrupted=0 status=0
        wait "$child" || status=$?
        ((interrupted)) || break
    done
}

# What Slurm granted, whatever this script or sbatch asked for.
nodes=$SLURM_JOB_NUM_NODES
per_node=${SLURM_GPUS_ON_NODE:-${SLURM_NTASKS_PER_NODE:-1}}
cpus=${SLURM_CPUS_PER_GPU:-${SLURM_CPUS_PER_TASK:-1}}
# srun takes these as options, and they contradict those that it is given.
unset SLURM_CPUS_PER_GPU SLURM_CPUS_PER_TASK SLURM_NTASKS_PER_NODE
restarts=${SLURM_RESTART_COUNT:-0} starts=0

give_up() { # WHY...
    say "not restarted: $*"
    exit $((status ? status : 1))
}

status=0
run_folder=$(srun --nodes=1 --ntasks=1 "${outside[@]}" "${within[@]}" -m kinodit slurm folder "${recipe[@]}") || status=$?
if ((status == 3)); then
    say "$run_folder is finished"
    exit 0
elif ((status)); then
    give_up "the recipe cannot be read"
fi
notes=$run_folder/slurm
mkdir -p "$notes"
log=$notes/starts.$SLURM_JOB_ID
marker=$run_folder/requeue.$SLURM_JOB_ID
export KINODIT_REFUSAL=$notes/refused.$SLURM_JOB_ID

newest_step() { # of a whole checkpoint; -1 without one
    local found
    found=$(find "$run_folder/checkpoints" -maxdepth 1 -regex '.*/step-[0-9]+' 2>/dev/null | sort | tail -n 1) || true
    found=${found##*step-}
    # In base 10, whatever zeros it begins with.
    if [[ -n $found ]]; then echo $((10#$found)); else echo -1; fi
}

stalled_starts() { # how many starts, to the last, brought no new checkpoint
    awk -v now="$(newest_step)" 'BEGIN { best = -2 } $2 > best { best = $2; count = 0 } { count++ }
        END { print (now > best ? 0 : count + 0) }' "$log"
}

job() { scontrol --oneliner show job "$SLURM_JOB_ID" | grep -o "\b$1=[^ ]*" | cut -d= -f2; } # FIELD

back_to_queue() { # nodes to stay away from, or ""
    # A cancelled job is no longer running, and requeueing would revive it.
    [[ $wanted != stop && $(job JobState) == RUNNING ]] || give_up "it was cancelled"
    ((restarts < 1000)) || give_up "restarted $restarts times already"
    rm -f "$marker"
    # Slurm ends this shell at once; what remains to be said to it must still be said.
    trap '' TERM
    if [[ -n $1 ]]; then
        local already
        already=$(job ExcNodeList)
        say "requeued: goes on from step $(newest_step), without $1"
        scontrol requeuehold "$SLURM_JOB_ID"
        scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="$1${already:+$([[ $already == "(null)" ]] || echo ",$already")}"
        scontrol release "$SLURM_JOB_ID"
    else
        say "requeued: goes on from step $(newest_step)"
        scontrol requeue "$SLURM_JOB_ID"
    fi
    exit 0
}

job StdOut >"$notes/output.$SLURM_JOB_ID" || true

# Every process meets at the first node, by the address that Slurm itself uses, on a port and under
# a name of this start alone: what is left of an earlier one must not answer.
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=$(scontrol --oneliner show node "${hosts[0]}" | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2) || true
export MASTER_ADDR=${MASTER_ADDR:-${hosts[0]}}

ranks() { # Whether one that fails ends the others (0 or 1), and kinodit's arguments on every rank.
    starts=$((starts + 1))
    export MASTER_PORT=$((10000 + (SLURM_JOB_ID * 31 + restarts * 7919 + starts * 104729) % 20000))
    step --nodes="$nodes" --ntasks-per-node="$per_node" --cpus-per-task="$cpus" \
        --kill-on-bad-exit="$1" "${outside[@]}" "${within[@]}" -m kinodit "${@:2}"
}

check_nodes() { # Leaves a file for each node that passed; goes back to the queue without the others.
    local passed=$notes/passed.$SLURM_JOB_ID bad=()
    rm -rf "$passed"
    mkdir -p "$passed"
    ranks 0 doctor --folder "$run_folder" --passed "$passed"
    ((status)) || return 0
    for host in "${hosts[@]}"; do
        [[ -e $passed/$host ]] || bad+=("$host")
    done
    [[ -z $wanted ]] || back_to_queue ""
    ((${#bad[@]})) || give_up "the nodes are healthy, but the ranks do not reach each other"
    # What no node passes is not a matter of nodes.
    ((${#bad[@]} < ${#hosts[@]})) || give_up "no node is fit"
    back_to_queue "$(IFS=, && echo "${bad[*]}")"
}

while :; do
    rm -f "$KINODIT_REFUSAL" "$marker"
    echo "$(date +%s) $(newest_step)" >>"$log"
    check_nodes
    # Too late to start: a signal came before there was anything to save.
    [[ -z $wanted ]] || back_to_queue ""
    say "starts on $nodes x $per_node from step $(newest_step)"
    in_training=1
    ranks 1 train "${recipe[@]}"
    in_training=0

    # Exit codes do not survive srun, which ends the ranks that are not done yet: files say it.
    if [[ $wanted == stop ]]; then
        status=143
        give_up "it was told to stop"
    elif [[ -e $KINODIT_REFUSAL ]]; then
        give_up "$(<"$KINODIT_REFUSAL")"
    elif ((status == 0)) && [[ ! -e $marker ]]; then
        say "done at step $(newest_step)"
        exit 0
    fi
    stalled=$(stalled_starts)
    if ((stalled > 3)); then
        give_up "$stalled starts in a row brought no new checkpoint"
    elif [[ -e $marker || -n $wanted ]]; then
        back_to_queue ""
    fi
    # The nodes are still ours: no need to queue.
    say "failed with exit code $status; starts again in place"
done
