"""Instruments for tests without a GPU: a traffic meter for interpreted kernels, a report on compiled ones."""
