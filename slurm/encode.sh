#!/usr/bin/env bash
# Encodes a recipe's dataset once, latents and text features, in as many parts as the array has tasks.
# Submit from the checkout; the same command again goes on where parts were interrupted:
#   sbatch [--array=0-N] slurm/encode.sh RECIPE DST [KEY=VALUE ...]
# (options of sbatch stand before the script's name and win over the lines below)
# Rendered by:
#   kinodit slurm render --template encode --cluster generic --out slurm/encode.sh
# Not to be edited: change the recipe, the cluster's file or the template, and render again.
#SBATCH --job-name=encode
#SBATCH --array=0-7
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=2
#SBATCH --gpus=1
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.out

set -euo pipefail
umask 027
cd -- "${SLURM_SUBMIT_DIR:?submit this script with sbatch}"

export OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1
export NCCL_DEBUG=WARN

# How a process of this job is started: further options of srun, then a command.
outside=()
within=(.venv/bin/python)

recipe=${1:?which recipe}
destination=${2:?which folder is the cache to be in}
shift 2
if ((SLURM_ARRAY_TASK_MAX - SLURM_ARRAY_TASK_MIN + 1 != SLURM_ARRAY_TASK_COUNT)); then
    echo "--array must be a range without gaps: it says how many parts there are" >&2
    exit 2
fi
part=$((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN))
exec srun --ntasks=1 "${outside[@]}" "${within[@]}" -m kinodit data encode "$recipe" "$destination" \
    "$@" --part "$part/$SLURM_ARRAY_TASK_COUNT"
