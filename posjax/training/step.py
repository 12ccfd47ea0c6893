"""The train step, a pure function that works under jit, pmap, scan and vmap.

    batch -> micro-batches -> sum of losses, sum of weights, gradient of the sum
          -> (sum over devices) -> divide once by the total weight -> clip -> AdamW or Muon -> new state

Sums are divided only once, at the end, so the way a batch is split (accumulation, devices, uneven weights) affects nothing but
rounding.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from posjax.checks import check, short
from posjax.training.state import TrainState
from posjax.typing import Array, Params

Batch = Any
LossFn = Callable[[Params, Batch, jax.Array], tuple[jax.Array, jax.Array]]


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    accumulate_steps: int = 1,
    axis_name: str | None = None,
    ema_decay: float | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """Builds a pure train step, `step(state, batch) -> (state, metrics)`.

    The loss is sum(loss_sum) / sum(weight_sum) over all micro-batches and devices. A step whose loss or gradient norm is not
    finite is skipped: it leaves `params`, `opt_state` and `ema` unchanged, is counted, and still advances `step` (and with it the
    key). A batch of total weight 0 has loss 0 and gradient 0.

    Args:
      loss_fn: (params, batch, key) -> (loss_sum, weight_sum), float32 scalars: the sum of weighted losses (nats) and the sum
        of weights.
      optimizer: an optax transformation.
      accumulate_steps: number of micro-batches that a batch is split into along its leading axis. They run sequentially, so that
        memory use is that of one micro-batch.
      axis_name: mapped axis to sum over under `jax.pmap`; not needed for `jit` over sharded arrays. Each device then draws
        different noise.
      ema_decay: decay, in [0, 1), of the update ema <- ema_decay * ema + (1 - ema_decay) * params after every step. None for a
        state without an average.

    Returns:
      The step. Its metrics are scalars: loss (nats per unit of weight), grad_norm (before clipping), weight (total weight of
      the batch, i.e. the number of tokens that count), skipped, skipped_in_a_row, and learning_rate if the optimizer's state
      has one.

    Raises:
      ValueError: accumulate_steps is below 1, or (when tracing) does not divide the batch; ema_decay is not in [0, 1), or (when
        tracing) is given for a state without an average, or is missing for a state with one.
    """
    check("loss_fn", loss_fn, Callable)
    if not isinstance(optimizer, optax.GradientTransformation):
        raise TypeError(f"optimizer must be an optax transformation such as make_optimizer(1e-3), got {short(optimizer)}")
    check("accumulate_steps", accumulate_steps, int, least=1, what="be at least 1")
    check("axis_name", axis_name, str | None)
    what = "lie in [0, 1), or be None to keep no average"
    check("ema_decay", ema_decay, Array | float | None, least=0, below=1, rank=0, what=what)
    value_and_gradient = jax.value_and_grad(loss_fn, has_aux=True)

    def summed(params, batch, key):
        (loss_sum, weight), gradient = value_and_gradient(params, batch, key)
        return jnp.asarray(loss_sum, jnp.float32), jnp.asarray(weight, jnp.float32), gradient

    def accumulated(params, batch, key):
        def add(carry, inputs):
            index, micro_batch = inputs
            part = summed(params, micro_batch, jax.random.fold_in(key, index))
            return jax.tree.map(jnp.add, carry, part), None

        zeros = (jnp.float32(0), jnp.float32(0), jax.tree.map(jnp.zeros_like, params))
        total, _ = jax.lax.scan(add, zeros, (jnp.arange(accumulate_steps), _micro_batches(batch, accumulate_steps)))
        return total

    def step(state, batch):
        if (ema_decay is None) != (state.ema is None):
            if state.ema is not None:
                raise ValueError("ema_decay must be a number for a state with an average, got None")
            hint = "create it with init_state(ema=True)"
            raise ValueError(f"ema_decay must be None for a state without an average, got {ema_decay}; {hint}")
        key = jax.random.fold_in(state.key, state.step)
        if axis_name is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        total = (summed if accumulate_steps == 1 else accumulated)(state.params, batch, key)
        if axis_name is not None:
            total = jax.lax.psum(total, axis_name)
        loss_sum, weight, gradient = total

        divisor = jnp.where(weight > 0, weight, 1.0)
        loss = loss_sum / divisor
        gradient = jax.tree.map(lambda leaf: leaf / divisor.astype(leaf.dtype), gradient)
        grad_norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)

        def unless_skipped(new, old):
            return jnp.where(finite, new, old).astype(old.dtype)

        params = jax.tree.map(unless_skipped, params, state.params)
        ema = state.ema
        if ema is not None:
            moved = jax.tree.map(lambda old, new: ema_decay * old + (1 - ema_decay) * new, ema, params)
            ema = jax.tree.map(unless_skipped, moved, ema)

        bad = 1 - finite.astype(jnp.int32)
        new_state = TrainState(
            step=state.step + 1,
            params=params,
            opt_state=jax.tree.map(unless_skipped, opt_state, state.opt_state),
            key=state.key,
            skipped=state.skipped + bad,
            skipped_in_a_row=(state.skipped_in_a_row + 1) * bad,
            ema=ema,
        )
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "weight": weight,
            "skipped": new_state.skipped,
            "skipped_in_a_row": new_state.skipped_in_a_row,
        }
        # The schedule's counter has the same name; only the learning rate itself is an array.
        rate = optax.tree.get(opt_state, "learning_rate", filtering=lambda _, leaf: isinstance(leaf, jax.Array))
        if rate is not None:
            metrics["learning_rate"] = rate
        return new_state, metrics

    step.axis_name = axis_name  # ``parallel.steps`` raises an error for a step with the wrong axis name
    return step


def _micro_batches(batch: Batch, accumulate_steps: int) -> Batch:
    """Splits a batch [B, ...] into micro-batches [accumulate_steps, B / accumulate_steps, ...].

    Micro-batch i has rows i, i + accumulate_steps, ... The split is strided, not contiguous, so that if B is sharded over devices,
    every micro-batch is spread over all of them and no row moves.
    """

    def split(leaf):
        rows = leaf.shape[0]
        if rows % accumulate_steps:
            raise ValueError(f"accumulate_steps must divide the batch size per device, {rows}, got {accumulate_steps}")
        return jnp.swapaxes(leaf.reshape(rows // accumulate_steps, accumulate_steps, *leaf.shape[1:]), 0, 1)

    return jax.tree.map(split, batch)
