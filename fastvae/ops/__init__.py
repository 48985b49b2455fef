"""Plans and autograd functions, one file per op."""
