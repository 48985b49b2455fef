"""Learning rate as a pure function of the step, so that a resumed run needs no state for it."""

import math


def learning_rate(step: int, *, peak: float, warmup_steps: int, total_steps: int, floor: float = 0.01) -> float:
    """Linear warm-up to `peak`, then cosine decay to `floor * peak`, reached at the last step.

        warm-up: peak * (step + 1) / warmup
        after:   peak * (floor + (1 - floor) * (1 + cos(pi * progress)) / 2),  progress from 0 to 1

    Args:
        step: Updates done so far; 0 for the first.
        peak: Largest learning rate.
        warmup_steps: Steps of warm-up; cut to a tenth of the run, so that a short run reaches the peak as well.
        total_steps: Steps of the whole run.
        floor: Share of the peak that the last step uses.

    Returns:
        The learning rate of the next update.

    Source: Loshchilov & Hutter, SGDR, arXiv:1608.03983, eq. 5 (without restarts).
    """
    warmup = min(warmup_steps, total_steps // 10)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - 1 - warmup)
    return peak * (floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2)
