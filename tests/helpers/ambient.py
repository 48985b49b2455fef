"""States of torch in which a program may import or call the library; imports nothing of it."""

from contextlib import contextmanager

import torch


@contextmanager
def default_device(device="meta"):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device("cpu")


@contextmanager
def default_dtype(dtype=torch.float64):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


STATES = {
    "device_context": lambda: torch.device("meta"),
    "default_device": default_device,
    "default_dtype": default_dtype,
    "inference_mode": torch.inference_mode,
}
