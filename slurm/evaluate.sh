#!/usr/bin/env bash
# Evaluates a checkpoint of a run on all processes that Slurm granted; the figures are the same on
# any number of them. Submit from the checkout, after the job that trains the run:
#   train=$(sbatch --parsable slurm/train_t2v.sh CONFIG)
#   sbatch --dependency=afterok:"$train" slurm/evaluate.sh RUN [--samples N] [--step N]
# or for a run that is there already, without --dependency. RUN is the run's folder.
# (options of sbatch stand before the script's name and win over the lines below)
# Rendered by:
#   kinodit slurm render --template evaluate --cluster generic --out slurm/evaluate.sh
# Not to be edited: change the recipe, the cluster's file or the template, and render again.
#SBATCH --job-name=evaluate
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-gpu=8
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

set -euo pipefail
umask 027
cd -- "${SLURM_SUBMIT_DIR:?submit this script with sbatch}"

export OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1
export NCCL_DEBUG=WARN

# How a process of this job is started: further options of srun, then a command.
outside=()
within=(.venv/bin/python)

run=${1:?which run: the folder that training wrote}
shift
processes=${SLURM_GPUS_ON_NODE:-${SLURM_NTASKS_PER_NODE:-1}}
# One agent starts the processes: they meet on this node alone.
exec srun --nodes=1 --ntasks=1 --cpus-per-task="${SLURM_CPUS_ON_NODE:-1}" "${outside[@]}" "${within[@]}" \
    -m torch.distributed.run --standalone --nproc-per-node="$processes" -m kinodit evaluate "$run" "$@"
