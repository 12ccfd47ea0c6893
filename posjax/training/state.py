"""The train state: everything needed to resume a run."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from posjax.checks import check, is_traced
from posjax.typing import Params


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Holds everything needed to resume a run, as a pytree. Use `dataclasses.replace` for a modified copy.

    Attributes:
      step: number of steps taken, skipped ones included; int32 [].
      params: learned parameters, any pytree.
      opt_state: state of the optimizer; it counts applied steps only.
      key: typed PRNG key [], constant over a run. The key of a step is `fold_in(key, step)`.
      skipped: total number of steps whose loss or gradient was not finite; int32 [].
      skipped_in_a_row: number of such steps since the last finite one; int32 [].
      ema: exponential moving average of the parameters, with their structure and shapes. None if no average is kept.
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
        """Returns the parameters for evaluation and generation: the moving average if there is one, else `params`."""
        return self.params if self.ema is None else self.ema

    # jax.tree_util.register_dataclass would add an entry for ema=None, which checkpoints of states without an average lack.
    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, Any], ...], tuple[str, ...]]:
        fields = {name: value for name, value in vars(self).items() if name != "ema" or value is not None}
        return tuple((jax.tree_util.GetAttrKey(name), value) for name, value in fields.items()), tuple(fields)

    @classmethod
    def tree_unflatten(cls, names: tuple[str, ...], values: Any) -> "TrainState":
        return cls(**dict(zip(names, values, strict=True)))


def init_state(params: Params, optimizer: optax.GradientTransformation, seed: int, *, ema: bool = False) -> TrainState:
    """Initializes the train state at step 0.

    `params` are copied, so that a step that donates its state does not invalidate the caller's arrays.

    Args:
      params: initial parameters.
      optimizer: an optax transformation, which initializes `opt_state`.
      seed: seed of the PRNG key.
      ema: whether to keep a moving average of the parameters, which starts equal to them. `make_train_step(ema_decay=)` updates it.
    """
    if not is_traced(seed):
        check("seed", seed, int, least=-(2**63), most=2**63 - 1)
    check("ema", ema, bool)

    # jnp.array with a dtype also drops weak types, with which the step would compile twice and scan would reject its carry.
    def copy(leaf):
        return jnp.array(leaf, dtype=leaf.dtype)

    params = jax.tree.map(copy, params)
    return TrainState(
        step=jnp.array(0, jnp.int32),
        params=params,
        opt_state=jax.tree.map(copy, optimizer.init(params)),
        key=jax.random.key(seed),
        skipped=jnp.array(0, jnp.int32),
        skipped_in_a_row=jnp.array(0, jnp.int32),
        ema=jax.tree.map(copy, params) if ema else None,  # a separate copy, because both are donated
    )
