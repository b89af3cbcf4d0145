#!/usr/bin/env bash
# Checks every byte of a dataset, in as many parts as the array has tasks. Submit from the checkout:
#   sbatch [--array=0-N] slurm/validate.sh DATASET [--decode]
# and after it, for one verdict, slurm/validate_summary.sh.
# (options of sbatch stand before the script's name and win over the lines below)
# Rendered by:
#   kinodit slurm render --template validate --cluster cpu --out slurm/validate.sh
# Not to be edited: change the recipe, the cluster's file or the template, and render again.
#SBATCH --job-name=validate
#SBATCH --array=0-7
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=1
#SBATCH --time=01:00:00
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.out

set -euo pipefail
umask 027
cd -- "${SLURM_SUBMIT_DIR:?submit this script with sbatch}"

export OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1

# How a process of this job is started: further options of srun, then a command.
outside=()
within=(.venv/bin/python)

dataset=${1:?which dataset}
shift
if ((SLURM_ARRAY_TASK_MAX - SLURM_ARRAY_TASK_MIN + 1 != SLURM_ARRAY_TASK_COUNT)); then
    echo "--array must be a range without gaps: it says how many parts there are" >&2
    exit 2
fi
reports=$dataset.validation-$SLURM_ARRAY_JOB_ID
mkdir -p "$reports"
part=$((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN))
exec srun --ntasks=1 "${outside[@]}" "${within[@]}" -m kinodit data validate "$dataset" "$@" \
    --part "$part/$SLURM_ARRAY_TASK_COUNT" --report "$reports/part-$part.json"
