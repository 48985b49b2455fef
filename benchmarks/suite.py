"""Which cases a run has, and who takes part in each."""

from dataclasses import replace

import torch

from .cases import (
    AUTOCAST,
    AUTOENCODER,
    BF16,
    BYTES,
    CONV,
    CONV_CHANNELS_LAST,
    FP32,
    MEDIUM,
    MLP,
    PHASES,
    TINY,
    Case,
    Precision,
    Shape,
)
from .peers import NAMES, OURS_IN_PLACE

SCALES = ("tiny", "default", "large")  # tiny: only to see that everything runs
FORWARD, BACKWARD = PHASES
Row = tuple[Shape, list[Precision], list[str]]


def cases(op: str, scale: str, device: torch.device) -> list[Case]:
    """Every combination of each row."""
    if scale == "tiny":
        larger = replace(TINY, name="8x1x8x8", image=(8, 1, 8, 8), latent=(8, 6))
        rows: list[Row] = [(TINY, [FP32], [FORWARD, BACKWARD]), (larger, [AUTOCAST], [BACKWARD])]
    elif op in ("sample", "moments"):
        rows = _LATENTS[op]
    else:
        rows = [*_IMAGES, *_MORE_IMAGES[op]]
        if device.type == "cuda" or scale == "large":
            rows.append((AUTOENCODER, [FP32, AUTOCAST], [BACKWARD]))
        if device.type == "cuda":
            rows.append((CONV, [BYTES], [FORWARD, BACKWARD]))
    return [
        Case(op, shape, precision, phase) for shape, all_of, phases in rows for precision in all_of for phase in phases
    ]


_LATENTS: dict[str, list[Row]] = {
    "sample": [(MLP, [FP32], [FORWARD, BACKWARD]), (CONV, [FP32, BF16], [FORWARD, BACKWARD])],
    "moments": [(AUTOENCODER, [FP32], [FORWARD, BACKWARD]), (AUTOENCODER, [BF16], [BACKWARD])],
}
_IMAGES: list[Row] = [
    (MLP, [FP32], [FORWARD, BACKWARD]),
    (MEDIUM, [FP32], [BACKWARD]),
    (CONV, [FP32, AUTOCAST, BF16], [FORWARD, BACKWARD]),
]
_MORE_IMAGES: dict[str, list[Row]] = {"recon": [(CONV_CHANNELS_LAST, [FP32], [BACKWARD])], "whole": []}


def competitors(case: Case) -> list[str]:
    """Without a gradient there is nothing to write in place."""
    in_place = case.phase == BACKWARD and case.op in ("recon", "whole")
    return [name for name in NAMES if name != OURS_IN_PLACE or in_place]
