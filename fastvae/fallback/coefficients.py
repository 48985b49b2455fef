"""Coefficients of gradients: floats where the host may read a value, whose arithmetic costs nothing; else tensors."""

import math

import torch
from torch import Tensor

from .gaussian import rows
from .images import Coefficient


def host_value(number: Coefficient) -> Coefficient:
    """A float, where reading one waits for nothing: only a CPU tensor's value may steer the host."""
    if isinstance(number, Tensor) and number.device.type == "cpu" and number.ndim == 0:
        return number.item()
    return number


def scaled(term: Coefficient, weight: Coefficient) -> Coefficient:
    return term if isinstance(weight, float | int) and weight == 1 else term * weight


def term_gradient(dloss: Tensor | None, weight: Coefficient, dterm: Tensor | None) -> Coefficient:
    """d(outputs)/d(term) = weight * dloss + dterm."""
    total: Coefficient = 0.0 if dterm is None else host_value(dterm)
    return total if dloss is None else host_value(dloss) * host_value(weight) + total


def per_row(coefficient: Coefficient, like: Tensor) -> Coefficient:
    return rows(coefficient, like) if isinstance(coefficient, Tensor) and coefficient.ndim else coefficient


def scales_exactly(held: list[Tensor], factor: Coefficient) -> bool:
    """Whether scaling the forward pass's gradients rounds no second time: a power of two moves the exponent alone."""
    if all(t.element_size() > 2 for t in held):
        return True
    if isinstance(factor, Tensor):
        return factor.device.type == "cpu" and bool((torch.frexp(factor)[0].abs_() == 0.5).all())
    return math.frexp(factor)[0] in (0.0, 0.5, -0.5)


def rescale(drecon: Tensor, factor: Coefficient) -> None:
    if isinstance(factor, Tensor) and factor.device.type == "cpu" and bool((factor == 1).all()):
        return
    if isinstance(factor, Tensor) or factor != 1:
        drecon.mul_(per_row(factor, drecon))
