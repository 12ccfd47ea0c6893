"""The train state and the train step, as pure functions that jit, pmap, scan and vmap all take.

    batch -> micro-batches -> sum of losses, sum of weights, gradient of the sum
          -> (sum over devices) -> divide once by the total weight -> clip -> AdamW or Muon -> new state

Sums are divided once, at the very end, so how a batch was cut up (accumulation, devices, uneven weights) changes nothing
but rounding.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from posjax.core.encoding import is_traced

Params = Any
Batch = Any
LossFn = Callable[[Params, Batch, jax.Array], tuple[jax.Array, jax.Array]]
Schedule = Callable[[jax.Array], jax.Array]

DECAYS = ("cosine", "linear", "constant")
OPTIMIZERS = ("adamw", "muon")


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a run needs to go on, and nothing else. A pytree; `dataclasses.replace` makes a changed copy.

    Attributes:
      step: int32 []: steps taken, skipped ones included.
      params: learned leaves, any pytree.
      opt_state: the optimizer's state; it counts applied steps only.
      key: typed PRNG key []; constant over a run: the key of a step is `fold_in(key, step)`.
      skipped: int32 []: steps whose loss or gradient was not finite, in all.
      skipped_in_a_row: int32 []: such steps since the last good one.
      ema: exponential moving average of the parameters, shaped like them; None where none is kept.
    """

    step: jax.Array
    params: Params
    opt_state: Any
    key: jax.Array
    skipped: jax.Array
    skipped_in_a_row: jax.Array
    ema: Params | None = None

    @property
    def eval_params(self) -> Params:
        """What to evaluate and to generate with: the average where there is one, else the parameters."""
        return self.params if self.ema is None else self.ema

    # Not as jax.tree_util.register_dataclass does it: a checkpoint has a place for None too, and those of states without an
    # average have none for it.
    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, Any], ...], tuple[str, ...]]:
        fields = {name: value for name, value in vars(self).items() if name != "ema" or value is not None}
        return tuple((jax.tree_util.GetAttrKey(name), value) for name, value in fields.items()), tuple(fields)

    @classmethod
    def tree_unflatten(cls, names: tuple[str, ...], values: Any) -> "TrainState":
        return cls(**dict(zip(names, values, strict=True)))


def learning_rate_schedule(
    peak: float, steps: int, warmup_steps: int = 0, decay: str = "cosine", end_fraction: float = 0.0
) -> Schedule:
    """Linear warmup to `peak`, then decay to `end_fraction * peak` at step `steps`.

    With w = warmup_steps and f = end_fraction, for the step with index t (from 0):
      t < w:  peak * (t + 1) / w            (never 0: the first step already learns)
      else:   p = (t - w) / (steps - w), clipped to [0, 1];
              cosine:   peak * (f + (1 - f) * (1 + cos(pi p)) / 2)
              linear:   peak * (1 - (1 - f) * p)
              constant: peak

    Args:
      peak: highest learning rate.
      steps: length of the run in steps.
      warmup_steps: steps of linear warmup, from 0 to `steps`.
      decay: "cosine", "linear" or "constant".
      end_fraction: what remains of the peak at the end, from 0 to 1; "constant" ignores it.
      (peak, warmup_steps and end_fraction may be traced: settings of a sweep.)

    Returns:
      A function from the step index (int, any shape) to the learning rate (float32).

    Raises:
      ValueError: an argument is out of its range; the message says which.
    """
    if decay not in DECAYS:
        raise ValueError(f"decay must be one of {', '.join(DECAYS)}, got {decay!r}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not is_traced(warmup_steps) and not 0 <= warmup_steps <= steps:
        raise ValueError(f"warmup_steps must be between 0 and steps ({steps}), got {warmup_steps}")
    if not is_traced(end_fraction) and not 0.0 <= end_fraction <= 1.0:
        raise ValueError(f"end_fraction must be between 0 and 1, got {end_fraction}")

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        progress = jnp.clip((step - warmup_steps) / jnp.maximum(steps - warmup_steps, 1), 0.0, 1.0)
        remaining = {
            "cosine": end_fraction + (1.0 - end_fraction) * 0.5 * (1.0 + jnp.cos(jnp.pi * progress)),
            "linear": 1.0 - (1.0 - end_fraction) * progress,
            "constant": jnp.ones_like(progress),
        }[decay]
        warmup = (step + 1.0) / jnp.maximum(warmup_steps, 1)
        return peak * jnp.where(step < warmup_steps, warmup, remaining)

    return schedule


def decay_mask(params: Params) -> Any:
    """Which leaves weight decay pulls towards zero: a pytree of bools shaped like `params`.

    A leaf decays when it has two or more dimensions, is not called `bias` or `scale`, and nothing on its path has "norm",
    "encoding" or "position" in its name. Dimensions alone do not do: with scanned layers a bias is [layers, D].
    """

    def decays(path, leaf):
        names = [name.lower() for name in jax.tree_util.keystr(path, simple=True, separator="/").split("/")]
        exempt = any(word in name for name in names for word in ("norm", "encoding", "position"))
        return leaf.ndim >= 2 and not exempt and not {"bias", "scale"} & set(names)

    return jax.tree_util.tree_map_with_path(decays, params)


def matrix_mask(params: Params) -> Any:
    """Which leaves hold the matrices that Muon is for: a pytree of bools shaped like `params`.

    Of the leaves that `decay_mask` names, those of two dimensions, and those called query, key, value or out of three: heads
    are sides of one matrix, [D, N * H] or, for out, [N * H, D]. A leading axis of layers, which leaves below "layers" have
    (but not below "layers/0"), does not count as a dimension. Embeddings and what makes logits (head, lm_head, classifier) are
    not named: Muon's authors leave them to AdamW.
    """

    def is_matrix(path, leaf, decays):
        return decays and _matrix_shape(path, leaf) is not None

    return jax.tree_util.tree_map_with_path(is_matrix, params, decay_mask(params))


def _matrix_shape(path: Any, leaf: Any) -> tuple[int, ...] | None:
    """[..., A, B]: a leaf as one matrix, or as one a layer; None for a leaf that is none."""
    names = jax.tree_util.keystr(path, simple=True, separator="/").lower().split("/")
    if any("embed" in name for name in names) or {"head", "lm_head", "classifier"} & set(names):
        return None
    stacked = any(name == "layers" and not below.isdecimal() for name, below in itertools.pairwise(names))
    layers, own = leaf.shape[:stacked], leaf.shape[stacked:]
    if len(own) == 3 and {"query", "key", "value", "out"} & set(names):
        own = (own[0] * own[1], own[2]) if "out" in names else (own[0], own[1] * own[2])
    return (*layers, *own) if len(own) == 2 else None


def orthogonalized(matrices: jax.Array) -> jax.Array:
    """U S V^T -> nearly U V^T for every matrix [..., A, B], by five Newton-Schulz iterations (Keller Jordan, 2024).

    X <- a X + b (X X^T) X + c (X X^T)^2 X with the published coefficients: singular values end between 0.7 and 1.2.
    """
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = matrices if wide else matrices.mT  # the smaller product
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if wide else x.mT


def _scale_by_orthogonalizing() -> optax.GradientTransformation:
    """Updates made orthogonal, at the size of Adam's (their root mean square is about 0.2: Moonlight, section 2.2)."""

    def direction(path, update):
        shape = _matrix_shape(path, update)
        found = orthogonalized(update.reshape(shape)) * (0.2 * math.sqrt(max(shape[-2:])))
        return found.reshape(update.shape).astype(update.dtype)

    return optax.stateless(lambda updates, params: jax.tree_util.tree_map_with_path(direction, updates))


def make_optimizer(
    learning_rate: float | Schedule,
    *,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip_norm: float | None = 1.0,
    optimizer: str = "adamw",
    momentum: float = 0.95,
) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter, 1711.05101), or Muon with it, after clipping by global norm.

        g <- g * min(1, clip_norm / |g|);  m, v <- moments of g
        x <- x - learning_rate * (m^ / (sqrt(v^) + eps) + weight_decay * x)

    Muon (Keller Jordan, 2024) as Moonlight scales it (Liu et al., 2502.16982) takes this step instead for every matrix [A, B]
    that `matrix_mask` names, each layer's by itself and whole, not head by head:

        m <- momentum * m + g
        x <- x - learning_rate * (0.2 sqrt(max(A, B)) orthogonalized(g + momentum * m) + weight_decay * x)

    All other leaves take AdamW's, at the same learning rate and weight decay: the factor gives a step of Muon the size that
    Moonlight's authors measured of AdamW's. The iteration runs in the type of the gradient; it was published in bfloat16, so low
    precision of products does no harm.

    Args:
      learning_rate: a number, or a function of the count of applied steps (see `learning_rate_schedule`).
      beta1, beta2: decay of the first and second moment, in [0, 1).
      eps: added to sqrt(v^).
      weight_decay: on the leaves that `decay_mask` names.
      clip_norm: largest global norm of the gradient; None does not clip.
      optimizer: "adamw" or "muon".
      momentum: of Muon, in [0, 1).
      (All numbers may be traced: settings of a sweep.)

    Returns:
      An optax transformation. Its state holds the learning rate of the last step under the name `learning_rate`.

    Raises:
      ValueError: clip_norm is not positive, or there is no such optimizer.
    """
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {optimizer!r}")
    if clip_norm is not None and not is_traced(clip_norm) and not clip_norm > 0:
        raise ValueError(f"clip_norm must be positive, or None not to clip, got {clip_norm}")
    direction = optax.scale_by_adam(beta1, beta2, eps)
    if optimizer == "muon":
        # Not optax.contrib.muon: it corrects the bias of its momentum, which is not the published step, and takes Nesterov's
        # form of Adam for the other leaves.
        muon = optax.chain(optax.trace(momentum, nesterov=True), _scale_by_orthogonalizing())
        direction = optax.partition({True: muon, False: direction}, matrix_mask)
    return optax.chain(
        optax.identity() if clip_norm is None else optax.clip_by_global_norm(clip_norm),
        direction,
        optax.add_decayed_weights(weight_decay, mask=decay_mask),
        optax.inject_hyperparams(optax.scale_by_learning_rate)(learning_rate),
    )


def init_state(params: Params, optimizer: optax.GradientTransformation, seed: int, *, ema: bool = False) -> TrainState:
    """The state before the first step. Copies `params`: a step that donates its state leaves the caller's arrays alone.

    Args:
      params, optimizer, seed: what the state begins with.
      ema: keeps an average of the parameters too, which begins as they do; `make_train_step(ema_decay=)` moves it.
    """

    # jnp.array with a dtype also drops weak types, with which the step would compile twice and scan refuse its carry.
    def own(leaf):
        return jnp.array(leaf, dtype=leaf.dtype)

    params = jax.tree.map(own, params)
    return TrainState(
        step=jnp.array(0, jnp.int32),
        params=params,
        opt_state=jax.tree.map(own, optimizer.init(params)),
        key=jax.random.key(seed),
        skipped=jnp.array(0, jnp.int32),
        skipped_in_a_row=jnp.array(0, jnp.int32),
        ema=jax.tree.map(own, params) if ema else None,  # a copy of its own, as both are donated
    )


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    accumulate_steps: int = 1,
    axis_name: str | None = None,
    ema_decay: float | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """Makes `step(state, batch) -> (state, metrics)`, a pure function.

    The loss is sum(loss_sum) / sum(weight_sum) over all micro-batches and devices. A step whose loss or gradient norm is not
    finite leaves `params`, `opt_state` and `ema` as they were, is counted, and still advances `step` (and with it the key). A
    batch of total weight 0 has loss 0 and gradient 0.

    Args:
      loss_fn: (params, batch, key) -> (loss_sum, weight_sum), float32 scalars: the sum of weighted losses (nats) and the sum
        of weights.
      optimizer: an optax transformation.
      accumulate_steps: micro-batches that a batch is cut into along its leading axis; they run one after the other, in the
        memory of one.
      axis_name: mapped axis to sum over, for `jax.pmap` (`jit` over sharded arrays needs none). Each device then draws its
        own noise.
      ema_decay: ema <- ema_decay * ema + (1 - ema_decay) * params after every step, in [0, 1); None for a state that has none.

    Returns:
      The step. Its metrics are scalars: loss (nats per unit of weight), grad_norm (before clipping), weight (total weight of
      the batch, the tokens counted), skipped, skipped_in_a_row, and learning_rate where the optimizer's state holds one.

    Raises:
      ValueError: accumulate_steps is below 1, or (when tracing) does not divide the batch; ema_decay is not in [0, 1), or (when
        tracing) is given where the state has no average, or not where it has one.
    """
    if accumulate_steps < 1:
        raise ValueError(f"accumulate_steps must be at least 1, got {accumulate_steps}")
    if ema_decay is not None and not is_traced(ema_decay) and not 0 <= ema_decay < 1:
        raise ValueError(f"ema_decay must lie in [0, 1), or be None for no average, got {ema_decay}")
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
            kept = "no" if state.ema is None else "an"
            raise ValueError(f"ema_decay must go with init_state(ema=True), got {ema_decay} for a state with {kept} average")
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
        # The schedule's own counter bears the same name; only the number is an array.
        rate = optax.tree.get(opt_state, "learning_rate", filtering=lambda _, leaf: isinstance(leaf, jax.Array))
        if rate is not None:
            metrics["learning_rate"] = rate
        return new_state, metrics

    return step


def _micro_batches(batch: Batch, accumulate_steps: int) -> Batch:
    """[B, ...] -> [accumulate_steps, B / accumulate_steps, ...]; micro-batch i has rows i, i + accumulate_steps, ...

    Strided, not contiguous: when B is sharded over devices, every micro-batch then lies on all of them and no row moves.
    """

    def split(leaf):
        rows = leaf.shape[0]
        if rows % accumulate_steps:
            raise ValueError(
                f"accumulate_steps must divide the batch size (on each device): {accumulate_steps} does not divide {rows}"
            )
        return jnp.swapaxes(leaf.reshape(rows // accumulate_steps, accumulate_steps, *leaf.shape[1:]), 0, 1)

    return jax.tree.map(split, batch)
