"""The ops in pure PyTorch, for CPUs and every device that Triton does not serve: one file per op.

Each module has the functions of the module of this name in `fastvae_kernels`, with the same arguments, so an op calls
both backends alike.
"""
