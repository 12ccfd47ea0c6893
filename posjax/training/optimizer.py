"""The AdamW and Muon optimizers, and the masks that select the leaves that each of them updates."""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from posjax.checks import check, check_one_of
from posjax.training.schedule import Schedule
from posjax.typing import Array, Params

OPTIMIZERS = ("adamw", "muon")
TRAINABLE = ("all", "encoding")


def encoding_mask(params: Params) -> Any:
    """Returns a mask of a Transformer's leaves that belong to its encodings: a pytree of bools with the structure of `params`."""
    return {name: jax.tree.map(lambda _, own=name == "encoding": own, leaves) for name, leaves in params.items()}


def freeze(params: Params, trainable: str) -> Params:
    """Stops the gradients of the leaves that are not trained, so that they are not computed.

    Args:
      params: the parameters of a Transformer.
      trainable: "all", or "encoding" for the leaves of `encoding_mask`.
    """
    if trainable == "all":
        return params
    return jax.tree.map(lambda own, leaf: leaf if own else jax.lax.stop_gradient(leaf), encoding_mask(params), params)


def decay_mask(params: Params) -> Any:
    """Returns a mask of the leaves that weight decay applies to: a pytree of bools with the structure of `params`.

    A leaf decays if it has two or more dimensions, no name on its path is `bias` or `scale`, and no name on its path contains
    "norm", "encoding" or "position". The number of dimensions alone does not suffice: with scanned layers a bias is [layers, D].
    """

    def decays(path, leaf):
        names = [name.lower() for name in jax.tree_util.keystr(path, simple=True, separator="/").split("/")]
        exempt = any(word in name for name in names for word in ("norm", "encoding", "position"))
        return leaf.ndim >= 2 and not exempt and not {"bias", "scale"} & set(names)

    return jax.tree_util.tree_map_with_path(decays, params)


def matrix_mask(params: Params) -> Any:
    """Returns a mask of the matrices that Muon updates: a pytree of bools with the structure of `params`.

    Selects, among the leaves of `decay_mask`, those with two dimensions, and leaves called query, key, value or out with three
    dimensions. The latter are treated as one matrix with the heads merged: [D, N * H] or, for out, [N * H, D]. The leading axis of
    layers, which leaves below "layers" have (but not below "layers/0"), does not count as a dimension. Embeddings and output
    layers (head, lm_head, classifier) are excluded: Muon's authors leave them to AdamW.
    """

    def is_matrix(path, leaf, decays):
        return decays and _matrix_shape(path, leaf) is not None

    return jax.tree_util.tree_map_with_path(is_matrix, params, decay_mask(params))


def _matrix_shape(path: Any, leaf: Any) -> tuple[int, ...] | None:
    """Returns the shape [A, B] or [layers, A, B] of a leaf viewed as matrices, or None if it is not a matrix."""
    names = jax.tree_util.keystr(path, simple=True, separator="/").lower().split("/")
    if any("embed" in name for name in names) or {"head", "lm_head", "classifier"} & set(names):
        return None
    stacked = any(name == "layers" and not below.isdecimal() for name, below in itertools.pairwise(names))
    layers, shape = leaf.shape[:stacked], leaf.shape[stacked:]
    if len(shape) == 3 and {"query", "key", "value", "out"} & set(names):
        shape = (shape[0] * shape[1], shape[2]) if "out" in names else (shape[0], shape[1] * shape[2])
    return (*layers, *shape) if len(shape) == 2 else None


def orthogonalized(matrices: jax.Array) -> jax.Array:
    """Orthogonalizes matrices [..., A, B] approximately, by five Newton-Schulz iterations (Keller Jordan, 2024).

    Maps U S V^T to nearly U V^T. Each iteration is X <- a X + b (X X^T) X + c (X X^T)^2 X with the published coefficients. The
    singular values of the result lie between 0.7 and 1.2.
    """
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = matrices if wide else matrices.mT  # so that X X^T is the smaller of the two products
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if wide else x.mT


def _scale_by_orthogonalizing() -> optax.GradientTransformation:
    """Orthogonalizes updates and scales them to the size of Adam's, whose root mean square is about 0.2 (Moonlight, sec. 2.2)."""

    def direction(path, update):
        shape = _matrix_shape(path, update)
        scaled = orthogonalized(update.reshape(shape)) * (0.2 * math.sqrt(max(shape[-2:])))
        return scaled.reshape(update.shape).astype(update.dtype)

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
    trainable: str = "all",
) -> optax.GradientTransformation:
    """Returns AdamW (Loshchilov and Hutter, arXiv:1711.05101), or Muon combined with AdamW, after clipping by global norm.

    AdamW takes the step:

        g <- g * min(1, clip_norm / |g|);  m, v <- moments of g
        x <- x - learning_rate * (m^ / (sqrt(v^) + eps) + weight_decay * x)

    Muon (Keller Jordan, 2024), scaled as in Moonlight (Liu et al., arXiv:2502.16982), takes this step instead for every matrix
    [A, B] that `matrix_mask` selects. The matrices of different layers are separate; the heads of a layer form one matrix:

        m <- momentum * m + g
        x <- x - learning_rate * (0.2 sqrt(max(A, B)) orthogonalized(g + momentum * m) + weight_decay * x)

    All other leaves take the AdamW step with the same learning rate and weight decay: the factor 0.2 sqrt(max(A, B)) gives Muon's
    step the size that Moonlight's authors measured for AdamW's. The iteration runs in the dtype of the gradient; it was published
    in bfloat16, so that low-precision matrix products are sufficient.

    Args:
      learning_rate: a number, or a function of the count of applied steps (see `learning_rate_schedule`).
      beta1, beta2: decay rates of the first and second moment, in [0, 1).
      eps: constant added to sqrt(v^).
      weight_decay: weight decay of the leaves that `decay_mask` selects.
      clip_norm: maximum global norm of the gradient. None disables clipping.
      optimizer: "adamw" or "muon".
      momentum: momentum of Muon, in [0, 1).
      trainable: "all", or "encoding" to update only the leaves of `encoding_mask`. The others have no moments and do not decay.
      (All numbers may be traced, for example in a hyperparameter sweep.)

    Returns:
      An optax transformation. Its state holds the learning rate of the last step under the name `learning_rate`.

    Raises:
      ValueError: an argument is not a number or is out of range, or the optimizer is unknown.
    """
    check_one_of("optimizer", optimizer, OPTIMIZERS)
    check_one_of("trainable", trainable, TRAINABLE)
    if not callable(learning_rate):
        check("learning_rate", learning_rate, Array | float, least=0, rank=0)
    for name, value in dict(beta1=beta1, beta2=beta2, momentum=momentum).items():
        check(name, value, Array | float, least=0, below=1, rank=0)
    for name, value in dict(eps=eps, weight_decay=weight_decay).items():
        check(name, value, Array | float, least=0, rank=0)
    check("clip_norm", clip_norm, Array | float | None, above=0, rank=0, what="be positive, or None to disable clipping")
    direction = optax.scale_by_adam(beta1, beta2, eps)
    if optimizer == "muon":
        # Not optax.contrib.muon: it applies bias correction to the momentum, which differs from the published step, and uses
        # Nesterov Adam for the other leaves.
        muon = optax.chain(optax.trace(momentum, nesterov=True), _scale_by_orthogonalizing())
        direction = optax.partition({True: muon, False: direction}, matrix_mask)
    update = optax.chain(
        optax.identity() if clip_norm is None else optax.clip_by_global_norm(clip_norm),
        direction,
        optax.add_decayed_weights(weight_decay, mask=decay_mask),
        optax.inject_hyperparams(optax.scale_by_learning_rate)(learning_rate),
    )
    if trainable == "all":
        return update
    return optax.partition({True: update, False: optax.set_to_zero()}, encoding_mask)
