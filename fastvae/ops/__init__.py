"""Autograd functions, one file per op: what is saved, which gradient is asked for, who computes."""
