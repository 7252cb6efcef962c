"""What learning rates are at each step."""

import math

from sellarec.config import Dense


def warmup_steps(settings: Dense, steps: int) -> int:
    """Over how many steps the learning rates rise to their peak, that of the peak included: at least 1."""
    return max(1, round(settings.warmup * steps))


def learning_rate_factor(settings: Dense, step: int, steps: int) -> float:
    """What the learning rates are multiplied by at a step: a linear warm-up, then constant, a cosine to 0, or constant and in the
    last steps a line to 0 (Hu et al., "MiniCPM", arXiv 2404.06395; the line: Hägele et al., arXiv 2405.18392)."""
    warmup = warmup_steps(settings, steps)
    if step < warmup:
        return (step + 1) / warmup
    if settings.schedule == "constant":
        return 1.0
    if settings.schedule == "wsd":
        return min(1.0, (steps - step) / max(1, round(settings.decay * steps)))
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
