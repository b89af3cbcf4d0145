"""Batch scripts for Slurm: rendered without surprises, submitted, looked after."""
