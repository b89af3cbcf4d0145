#!/usr/bin/env bash
# Trains one recipe on 2 node(s) x 8 process(es). Submit from the checkout:
#   sbatch slurm/train_t2v.sh
# (options of sbatch stand before the script's name and win over the lines below)
# Rendered by:
#   kinodit slurm render configs/t2v_2b.yaml --cluster generic --nodes 2 --out slurm/train_t2v.sh
# Not to be edited: change the recipe, the cluster's file or the template, and render again.
#SBATCH --job-name=t2v_2b
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=8
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

set -euo pipefail
umask 027
cd -- "${SLURM_SUBMIT_DIR:?submit this script with sbatch}"

run_folder=runs/t2v_2b
restarts=${SLURM_RESTART_COUNT:-0}

export OMP_NUM_THREADS=1
export NCCL_DEBUG=WARN

# All processes meet at the first node, on a port of this job and this attempt alone.
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${hosts[0]}
export MASTER_PORT=$((10000 + (SLURM_JOB_ID + 7919 * restarts) % 20000))

newest_checkpoint() {
    find "$run_folder/checkpoints" -maxdepth 1 -regex '.*/step-[0-9]+' 2>/dev/null | sort | tail -n 1 || true
}

# The batch shell alone gets USR1 ahead of the time limit, and TERM from scancel; it passes both on
# to the step. A step that has just ended makes scancel fail, which changes nothing.
out_of_time=0
trap 'out_of_time=1; scancel --signal=USR1 "$SLURM_JOB_ID.0" || true' USR1
trap 'out_of_time=0; trap "" USR1; scancel --signal=TERM "$SLURM_JOB_ID.0" || true' TERM

checkpoint_before=$(newest_checkpoint)
srun --kill-on-bad-exit=1 --cpus-per-task=8 \
    .venv/bin/python -m kinodit train configs/t2v_2b.yaml &
step=$!

# A signal interrupts `wait`: wait again until the step itself has ended.
status=0
wait "$step" || status=$?
while kill -0 "$step" 2>/dev/null; do
    status=0
    wait "$step" || status=$?
done

# The same command resumes from the newest checkpoint, so going on after the time limit is to run
# again; without a newer checkpoint than last time it would not get further.
if ((status != 0 && out_of_time)); then
    if [[ $(newest_checkpoint) == "$checkpoint_before" ]]; then
        echo "not requeued: no checkpoint was written within the time limit" >&2
    elif ((restarts >= 100)); then
        echo "not requeued: restarted $restarts times already" >&2
    else
        echo "requeued: the run goes on from $(newest_checkpoint)" >&2
        scontrol requeue "$SLURM_JOB_ID"
    fi
fi
exit "$status"
