"""Training runs and microbenchmarks of kbfgs_ext."""
