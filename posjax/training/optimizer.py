"""AdamW and Muon, and which leaves each of them is for."""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from posjax.checks import is_traced
from posjax.training.schedule import Schedule
from posjax.typing import Params

OPTIMIZERS = ("adamw", "muon")


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
