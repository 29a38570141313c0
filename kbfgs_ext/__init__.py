"""K-BFGS and K-BFGS(L) for PyTorch: an optimizer, its kernels, their proof."""
from kbfgs_ext import ops as ops
