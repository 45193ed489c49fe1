"""Float vision models with Mamba blocks, under the parameter names of their public checkpoints."""
