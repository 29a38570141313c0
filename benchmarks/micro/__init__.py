"""Microbenchmarks: every op against its eager reference, torch.compile of it, and the BLAS."""
