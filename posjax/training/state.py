"""The state of a run: everything that it needs to go on."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from posjax.typing import Params


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
