"""Microbenchmarks: every op against its eager reference, torch.compile of it, and the BLAS.

``python -m kbfgs_ext.bench`` runs them; they want the extra ``bench`` (rich, matplotlib).
"""
