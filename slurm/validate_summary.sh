#!/usr/bin/env bash
# The verdict on a dataset that a job array has checked; fails if a sample is bad or a part is
# missing, so that what depends on it with afterok starts on good data only. Submit it with
#   array=$(sbatch --parsable slurm/validate.sh DATASET)
#   sbatch --dependency=afterany:"$array" slurm/validate_summary.sh DATASET "$array"
# (options of sbatch stand before the script's name and win over the lines below)
# Rendered by:
#   kinodit slurm render --template validate_summary --cluster cpu --out slurm/validate_summary.sh
# Not to be edited: change the recipe, the cluster's file or the template, and render again.
#SBATCH --job-name=validate_summary
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=1
#SBATCH --time=01:00:00
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

set -euo pipefail
umask 027
cd -- "${SLURM_SUBMIT_DIR:?submit this script with sbatch}"

export OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1

# How a process of this job is started: further options of srun, then a command.
outside=()
within=(.venv/bin/python)

dataset=${1:?which dataset}
array=${2:?the id of the job array that checked it}
exec srun --ntasks=1 "${outside[@]}" "${within[@]}" -m kinodit data validate "$dataset" \
    --reports "$dataset.validation-$array"
