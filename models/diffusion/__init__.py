"""Paths, timestep laws, objectives, guidance and samplers: the mathematics of diffusion."""
