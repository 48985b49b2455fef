"""Triton kernels and their launchers. Tensors in, tensors out; no autograd, no checks, no import of `fastvae`."""
