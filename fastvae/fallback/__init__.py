"""The ops in pure PyTorch, for CPUs and every device that Triton does not serve: one file per op.

Each module has the functions of its twin in `fastvae_kernels`, with the same arguments, so that an op never asks which
of the two it holds.
"""
