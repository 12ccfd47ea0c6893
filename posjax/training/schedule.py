"""Learning rate schedules."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from posjax.checks import check, check_one_of, short
from posjax.typing import Array

Schedule = Callable[[jax.Array], jax.Array]

DECAYS = ("cosine", "linear", "constant", "wsd")


def learning_rate_schedule(
    peak: float,
    steps: int,
    warmup_steps: int = 0,
    decay: str = "cosine",
    end_fraction: float = 0.0,
    decay_steps: int | None = None,
) -> Schedule:
    """Returns a schedule with linear warmup to `peak`, then decay to `end_fraction * peak` at step `steps`.

    With w = warmup_steps and f = end_fraction, the learning rate at step index t (from 0) is:
      t < w:  peak * (t + 1) / w            (never 0, so the first step already updates the parameters)
      else:   p = (t - w) / (steps - w), clipped to [0, 1];
              cosine:   peak * (f + (1 - f) * (1 + cos(pi p)) / 2)
              linear:   peak * (1 - (1 - f) * p)
              constant: peak
              wsd:      peak * (1 - (1 - f) * q), q = (t - (steps - d)) / d, clipped to [0, 1]

    wsd (warmup, stable, decay; Hu et al. 2024, MiniCPM, arXiv 2404.06395; Hägele et al. 2024, arXiv 2405.18392) stays at the peak
    until the last d = decay_steps steps. Like "constant", it does not depend on `steps` before that, so that a run can be extended.

    Args:
      peak: highest learning rate.
      steps: length of the run in steps.
      warmup_steps: number of warmup steps, from 0 to `steps`.
      decay: "cosine", "linear", "constant" or "wsd".
      end_fraction: final learning rate as a fraction of the peak, from 0 to 1. Ignored by "constant".
      decay_steps: length of the final decay of "wsd"; None means a tenth of the steps. None for the others.
      (peak, warmup_steps and end_fraction may be traced, for example in a hyperparameter sweep.)

    Returns:
      A function from the step index (int, any shape) to the learning rate (float32).

    Raises:
      ValueError: an argument is out of range. The message names the argument.
    """
    check_one_of("decay", decay, DECAYS)
    check("peak", peak, Array | float, least=0, rank=0)
    check("steps", steps, int, least=1, what="be at least 1")
    check("warmup_steps", warmup_steps, Array | float, least=0, most=steps, rank=0, what=f"be between 0 and steps ({steps})")
    check("end_fraction", end_fraction, Array | float, least=0, most=1, rank=0, what="be between 0 and 1")
    check_decay_steps(decay, steps, decay_steps)
    length = num_decay_steps(steps, decay_steps)

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        progress = jnp.clip((step - warmup_steps) / jnp.maximum(steps - warmup_steps, 1), 0.0, 1.0)
        remaining = {
            "cosine": end_fraction + (1.0 - end_fraction) * 0.5 * (1.0 + jnp.cos(jnp.pi * progress)),
            "linear": 1.0 - (1.0 - end_fraction) * progress,
            "constant": jnp.ones_like(progress),
            "wsd": 1.0 - (1.0 - end_fraction) * jnp.clip((step - (steps - length)) / length, 0.0, 1.0),
        }[decay]
        warmup = (step + 1.0) / jnp.maximum(warmup_steps, 1)
        return peak * jnp.where(step < warmup_steps, warmup, remaining)

    return schedule


def num_decay_steps(steps: int, decay_steps: int | None) -> int:
    """Returns the length of the final decay of "wsd": by default a tenth of the steps, and at least one."""
    return max(1, steps // 10) if decay_steps is None else decay_steps


def check_decay_steps(decay: str, steps: int, decay_steps: int | None) -> None:
    """Raises ValueError unless `decay_steps` is None or, for "wsd", at least 1 and at most `steps`, those after the warmup."""
    if decay_steps is None:
        return
    if decay != "wsd":
        raise ValueError(f"decay_steps must be None unless decay is 'wsd', got {short(decay_steps)} with decay={decay!r}")
    check(
        "decay_steps", decay_steps, int, least=1, most=steps, what=f"be between 1 and {steps}, the number of steps after the warmup"
    )
