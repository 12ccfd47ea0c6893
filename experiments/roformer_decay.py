"""Reproduces RoFormer's figure 2, the decay of a bound on rotated products with distance, and compares it with the products.

    python experiments/roformer_decay.py                  # half a minute; nothing is trained

The paper (arXiv:2104.09864, section 3.4.3) groups a head's channels in pairs, h_m = q_m conj(k_m), and sums by parts:

    |sum_m h_m e^(i d theta_m)|  <=  max_m |h_(m+1) - h_m|  *  sum_m |S_m|,      S_m = sum_(l<m) e^(i d theta_l)

Figure 2 plots the mean of |S_m| against the distance d, up to 256. This program plots it for heads of 64 and 128 channels, up to
4,096 tokens, next to the products of equal and of random queries and keys, all relative to distance 0.

Expected result: up to 256 tokens the bound falls to a fifth, in waves, with 45 % of the steps upwards; further out it stops
falling, and for 64 channels rises to a third. The product of equal queries and keys also falls in waves, to a third at 250, and
becomes negative at some distances from 725 tokens on (1,707 with 128 channels). The product of random ones does not decay at all:
its root mean square is the same at every distance. The inequality always holds; the median product is below a hundredth of the
bound.

Writes results/roformer_decay.json and .png.
"""

import common
import jax
import jax.numpy as jnp
import numpy as np

import posjax as pj
from posjax.core.encoding import AttentionInputs, Tokens
from posjax.encodings.rotary import decay_bound
from posjax.plots.style import BLACK, BLUE, GREY, RED, new_figure, save

THETA, HEAD_DIMS, FARTHEST, DRAWS = 10_000.0, (64, 128), 4096, 500
SHOWN = (50, 250, 1000, 4096)


def bound_in_numpy(distances: np.ndarray, head_dim: int, theta: float = THETA) -> np.ndarray:
    """Computes mean_m |S_m| [S] as the paper's formula states it, in float64."""
    frequencies = [theta ** (-2.0 * m / head_dim) for m in range(head_dim // 2)]
    partial, total = np.zeros(len(distances), complex), np.zeros(len(distances))
    for frequency in frequencies:
        partial += np.exp(1j * np.asarray(distances, float) * frequency)
        total += np.abs(partial)
    return total / len(frequencies)


def products(query: np.ndarray, key: np.ndarray, distances: np.ndarray, theta: float = THETA) -> np.ndarray:
    """Computes q.k after posjax's rotation, [pairs, S], for queries [pairs, H] at every distance from keys [pairs, H] at 0."""

    def spread(x: np.ndarray, length: int) -> jax.Array:
        return jnp.broadcast_to(jnp.asarray(x, jnp.float32)[None, None], (1, length, *x.shape))

    q, k = spread(query, len(distances)), spread(key, 1)
    inputs = AttentionInputs(q, k, k, Tokens.at(distances), Tokens.at(jnp.zeros(1, jnp.int32)), 1.0)
    (rotation,) = pj.rope(theta).attend({}, inputs).transforms
    q, k = rotation.applied(q, k)
    return np.asarray((q * k).sum(-1)[0].T, float)


def bounds_of(query: np.ndarray, key: np.ndarray, shape: np.ndarray) -> np.ndarray:
    """Computes the right side of the inequality, [pairs, S], from bound_in_numpy's [S]; h is zero past the last channel pair."""
    half = query.shape[-1] // 2
    h = (query[:, :half] + 1j * query[:, half:]) * (key[:, :half] - 1j * key[:, half:])
    steps = np.abs(np.diff(h, axis=1, append=0.0)).max(1)
    return steps[:, None] * shape * half


def sign_changes(values: np.ndarray) -> float:
    """Computes the fraction of steps from one distance to the next at which a product changes its sign."""
    signs = np.sign(values)
    return float((signs[..., 1:] * signs[..., :-1] < 0).mean())


def measure(head_dim: int) -> tuple[dict, dict[str, np.ndarray]]:
    """Returns the row of one head dimension, and its curves over distance."""
    distances = np.arange(FARTHEST + 1)
    exact, ours = bound_in_numpy(distances, head_dim), np.asarray(decay_bound(jnp.asarray(distances), head_dim, THETA), float)
    normal = np.random.default_rng(0).standard_normal
    query, key = normal((DRAWS, head_dim)), normal((DRAWS, head_dim))
    random = np.concatenate([products(query, key, part) for part in np.array_split(distances, 16)], axis=1)
    ones = np.ones((1, head_dim))
    equal = products(ones, ones, distances)[0] / head_dim
    used = np.abs(random) / bounds_of(query, key, exact)
    used_by_equal = np.abs(equal) * head_dim / bounds_of(ones, ones, exact)[0]
    near, below = distances <= 256, np.flatnonzero(equal < 0)
    rms = np.sqrt((random**2).mean(0) / (random[:, 0] ** 2).mean())
    row = {
        "head_dim": head_dim,
        "bound": {str(d): exact[d] / exact[0] for d in SHOWN},
        "steps_at_which_the_bound_rises_to_256": float((np.diff(exact[near]) > 0).mean()),
        "steps_at_which_the_bound_rises": float((np.diff(exact) > 0).mean()),
        "equal": {str(d): equal[d] for d in SHOWN},
        "equal_first_negative_at": int(below[0]) if below.size else None,
        "equal_sign_changes": sign_changes(equal),
        "random_rms": {str(d): rms[d] for d in SHOWN},
        "random_rms_least_and_greatest": [rms.min(), rms.max()],
        "random_sign_changes": sign_changes(random),
        "share_of_bound_used_median": float(np.median(used)),
        "share_of_bound_used_greatest": float(used.max()),
        "share_of_bound_used_by_equal_greatest": float(used_by_equal.max()),
        "decay_bound_error": float(np.abs(ours / exact - 1).max()),
    }
    return row, {"distance": distances, "bound": exact / exact[0], "equal": equal, "random": random / head_dim**0.5, "rms": rms}


def draw(curves: dict[int, dict[str, np.ndarray]]):
    """Plots a row of panels per head dimension, with near distances on the left and all distances on the right."""
    names = {
        "random": "random q, k: single products / sqrt(H)",
        "rms": f"random q, k: root mean square of {DRAWS}",
        "equal": "equal q, k: the product",
        "bound": "RoFormer's bound, mean of |S_m|",
    }
    figure, grid = new_figure(10.0, 3.0 * len(curves), len(curves), 2, squeeze=False)
    for panels, (head_dim, curve) in zip(grid, curves.items(), strict=True):
        for axes, reach in zip(panels, (256, FARTHEST), strict=True):
            x = curve["distance"][: reach + 1]
            for number, line in enumerate(curve["random"][: 4 if reach == 256 else 1]):
                axes.plot(x, line[: reach + 1], color=GREY, linewidth=0.6, alpha=0.5, label=None if number else names["random"])
            axes.plot(x, curve["rms"][: reach + 1], color=BLUE, linewidth=1.4, label=names["rms"])
            axes.plot(x, curve["equal"][: reach + 1], color=RED, linewidth=1.2, label=names["equal"])
            axes.plot(x, curve["bound"][: reach + 1], color=BLACK, linestyle="--", linewidth=1.4, label=names["bound"])
            axes.axhline(0, color="0.6", linewidth=0.6, zorder=0)
            axes.set_title(f"heads of {head_dim} channels", fontsize=10)
            axes.set_xlabel("distance (tokens)")
            axes.xaxis.set_major_formatter("{x:,g}")
            axes.set_ylim(-2.2, 2.2)
        panels[0].set_ylabel("relative to distance 0")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    return figure


def main() -> None:
    found = {head_dim: measure(head_dim) for head_dim in HEAD_DIMS}
    rows = [row for row, _ in found.values()]
    save(draw({head_dim: curves for head_dim, (_, curves) in found.items()}), common.RESULTS / "roformer_decay.png")
    heads = ["relative to distance 0", *(f"H = {row['head_dim']}" for row in rows)]
    lines = [[f"{name} at {d:,}", *(f"{row[key][str(d)]:.3f}" for row in rows)] for key, name in NAMES.items() for d in SHOWN]
    percents = {
        "steps at which the bound rises, to 256": "steps_at_which_the_bound_rises_to_256",
        f"the same to {FARTHEST:,}": "steps_at_which_the_bound_rises",
        "equal q, k: steps that change the sign": "equal_sign_changes",
        "random q, k: steps that change the sign": "random_sign_changes",
        "random q, k: share of the bound used, median": "share_of_bound_used_median",
        "random q, k: share of the bound used, greatest": "share_of_bound_used_greatest",
        "equal q, k: share of the bound used, greatest": "share_of_bound_used_by_equal_greatest",
    }
    lines += [[name, *(f"{100 * row[key]:.3g} %" for row in rows)] for name, key in percents.items()]
    lines += [
        ["equal q, k: first negative at", *(row["equal_first_negative_at"] for row in rows)],
        ["posjax.encodings.rotary.decay_bound, greatest relative error", *(f"{row['decay_bound_error']:.0e}" for row in rows)],
    ]
    table = common.markdown(heads, lines)
    common.write("roformer_decay", rows, theta=THETA, distances=[0, FARTHEST], random_pairs=DRAWS, table=table)
    print(table)


NAMES = {"bound": "bound", "equal": "equal q, k: product", "random_rms": "random q, k: root mean square"}

if __name__ == "__main__":
    main()
