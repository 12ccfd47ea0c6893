"""Demonstrates why a Transformer needs positions, and which term of its expansion depends on two positions at once.

    python experiments/symmetry.py                        # a minute or two; nothing is trained

Checks two arguments by Su Jianlin (RoFormer, arXiv:2104.09864, section 2, and earlier articles) numerically.

1. Symmetry. Without positions, an encoder sees a set: permuting the other tokens does not change the last token's output. Each
   encoding breaks this symmetry, and so does a causal mask with two layers or more: in one layer, the last token still sees a set.

2. Expansion. Add small vectors p_m and p_n to the embeddings of two tokens of a model f without positions:

     f(.., x_m + p_m, .., x_n + p_n, ..) = f + p_m.g_m + p_n.g_n + p_m.H_mm.p_m / 2 + p_n.H_nn.p_n / 2 + p_m.H_mn.p_n + O(|p|^3)

   with f's gradient g and Hessian H at p = 0. Each of the first five terms depends on at most one position; only the sixth depends
   on two. With sinusoids for p and the identity for H_mn, it is sum_k cos((m - n) theta_k), a function of the distance; with the
   H_mn of a model, it is not.

Expected result: differences at the level of rounding, 5e-7, for identity() without a mask and for one causal layer, and of 0.1 to
2.2 for all others, in logits of standard deviation 1; a remainder that falls with the third power of p (fitted: 3.0); one position
each in the terms before the sixth; and m - n explains all of the sixth term's variance over pairs (m, n) if H_mn is the identity,
and 10 % (3 to 31) if it is that of a random model.

The expansion is in float64. posjax's models compute softmax in float32, so the model is implemented here again, with the weights of
a posjax.models.transformer.Transformer, and compared with it. Writes results/symmetry.json and .png.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.tree_util import Partial

import posjax as pj
from posjax.encodings.phases import geometric_frequencies
from posjax.encodings.spec import parse_encoding
from posjax.models.transformer import Transformer, TransformerConfig, functional
from posjax.plots.style import BLACK, RED, new_figure, save, styles

ENCODINGS = ("identity", "sinusoidal", "learned", "rope", "alibi", "t5", "tupe", "tupe(relative=True)", "cope(16)", "rope+cope(16)")
LENGTH, VOCABULARY, WIDTH, HEADS = 24, 32, 64, 4
POSITIONS, MODELS = 128, 10  # positions of the sixth term's pairs, and number of random models
TERMS = ("p_m.g_m", "p_n.g_n", "p_m.H_mm.p_m / 2", "p_n.H_nn.p_n / 2", "p_m.H_mn.p_n")


# Symmetry -------------------------------------------------------------------------------------------------------------


def change_under_permutation(spec: str, is_causal: bool, num_layers: int, permutations: int = 8) -> float:
    """Computes the largest change of the last token's logits over permutations of the tokens before it.

    Noise of standard deviation 0.3 is added to every leaf of the encoding, because tables that are initially zero have no effect.
    """
    config = TransformerConfig(
        VOCABULARY, num_layers, WIDTH, HEADS, max_length=LENGTH, is_causal=is_causal, tie_embeddings=False, implementation="xla"
    )
    with_params, params = functional(Transformer(config, parse_encoding(spec), rngs=nnx.Rngs(0)))
    random = np.random.default_rng(0)
    noise = jax.tree.map(lambda leaf: 0.3 * random.standard_normal(leaf.shape).astype(np.float32), params.get("encoding", {}))
    params = params | {"encoding": jax.tree.map(jnp.add, params["encoding"], noise)} if noise else params
    text = random.integers(0, VOCABULARY, LENGTH)
    texts = np.stack([text, *(np.append(random.permutation(text[:-1]), text[-1]) for _ in range(permutations))])
    logits = np.asarray(with_params(params)(jnp.asarray(texts, jnp.int32))[:, -1])
    return float(np.abs(logits[1:] - logits[0]).max())


def symmetry_rows() -> list[dict]:
    rows = []
    for spec in ENCODINGS:
        row = {"encoding": spec}
        for mask, is_causal in (("none", False), ("causal", True)):
            for num_layers in (1, 2):
                counts = parse_encoding(spec).needs_causal and not is_causal  # CoPE counts over earlier keys: decoders only
                key = f"mask {mask}, {num_layers} layer{'s' if num_layers > 1 else ''}"
                row[key] = None if counts else change_under_permutation(spec, is_causal, num_layers)
        rows.append(row)
    return rows


# Expansion ------------------------------------------------------------------------------------------------------------


def random_model(seed: int, num_layers: int = 2) -> tuple[Transformer, dict, jax.Array]:
    """Returns an encoder without positions, its weights, and the tokens [T] of a random text."""
    config = TransformerConfig(
        VOCABULARY, num_layers, WIDTH, HEADS, max_length=LENGTH, is_causal=False, tie_embeddings=False, implementation="xla"
    )
    model = Transformer(config, pj.identity(), rngs=nnx.Rngs(seed))
    tokens = jax.random.randint(jax.random.key(seed), (LENGTH,), 0, VOCABULARY)
    return model, functional(model)[1], tokens


def forward(params: dict, x: jax.Array) -> jax.Array:
    """Applies the same encoder to embeddings [T, D] and returns logits [T, V], in the dtype of its arguments."""

    def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
        return x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale

    layers = params["layers"]
    for i in range(layers["attention_norm"]["scale"].shape[0]):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], layers)
        hidden = norm(x, layer["attention_norm"]["scale"])
        q, k, v = (jnp.einsum("td,dnh->tnh", hidden, layer[name]["kernel"]) for name in ("query", "key", "value"))
        weights = jax.nn.softmax(jnp.einsum("tnh,snh->nts", q, k) / np.sqrt(q.shape[-1]), axis=-1)
        x = x + jnp.einsum("nts,snh,nhd->td", weights, v, layer["out"]["kernel"])
        hidden = norm(x, layer["mlp_norm"]["scale"])
        x = x + jax.nn.gelu(hidden @ layer["up"]["kernel"]) @ layer["down"]["kernel"]
    return norm(x, params["outer_norm"]["scale"]) @ params["head"]["kernel"]


def scalar_of(seed: int) -> tuple[Partial, jax.Array, float]:
    """Returns f, a logit of the first token of a random encoder, the embeddings of its text, and the error of float32 posjax."""
    model, params, tokens = random_model(seed)
    theirs = np.asarray(model(tokens[None])[0], float)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params)
    x = params["token_embedding"]["embedding"][tokens] * np.sqrt(WIDTH)
    error = float(np.abs(np.asarray(forward(params, x)) - theirs).max())
    return Partial(first_logit, params), x, error  # a Partial can be an argument of jit, so that all models share one program


def first_logit(params: dict, x: jax.Array) -> jax.Array:
    return forward(params, x)[0, 0]


def expansion(f: Callable, x: jax.Array, m: int, n: int, p_m: jax.Array, p_n: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the five terms after f in the order of TERMS, and the remainder of f(x + p), by forward-over-reverse."""
    at_m, at_n = jnp.zeros_like(x).at[m].set(p_m), jnp.zeros_like(x).at[n].set(p_n)
    gradient, along_m = jax.jvp(jax.grad(f), (x,), (at_m,))
    _, along_n = jax.jvp(jax.grad(f), (x,), (at_n,))
    terms = gradient[m] @ p_m, gradient[n] @ p_n, along_m[m] @ p_m / 2, along_n[n] @ p_n / 2, along_n[m] @ p_m
    terms = jnp.stack(terms)
    return terms, f(x + at_m + at_n) - f(x) - terms.sum()


def sinusoids(positions: int, width: int = WIDTH) -> np.ndarray:
    """Returns the vectors [P, D] of the sinusoidal encoding, in float64."""
    phase = np.arange(positions)[:, None] * geometric_frequencies(10_000.0, width)
    return np.stack([np.sin(phase), np.cos(phase)], -1).reshape(positions, width)


@partial(jax.jit, static_argnums=(2, 3))
def remainders(f: Callable, x: jax.Array, m: int, n: int, sizes: jax.Array) -> jax.Array:
    """Computes the remainder for vectors p_m and p_n of each of these norms, [sizes]."""
    table = sinusoids(POSITIONS)
    unit = table / np.linalg.norm(table, axis=1, keepdims=True)
    return jax.lax.map(lambda size: expansion(f, x, m, n, size * unit[5], size * unit[40])[1], sizes)


def fitted_power(sizes: np.ndarray, values: np.ndarray) -> float:
    """Fits values = c sizes^k by least squares of the logarithms, and returns k."""
    return float(np.polyfit(np.log(sizes), np.log(np.abs(values)), 1)[0])


@partial(jax.jit, static_argnums=(2, 3))
def cross_hessian(f: Callable, x: jax.Array, m: int, n: int) -> jax.Array:
    """Computes H_mn, [D, D]."""
    row = jax.grad(lambda at_m, at_n: f(x.at[m].set(at_m).at[n].set(at_n)), argnums=0)
    return jax.jacfwd(row, argnums=1)(x[m], x[n])


def explained(values: np.ndarray) -> dict[str, float]:
    """Computes the fractions of the variance of values [P, P] that m - n explains, and that a function of m plus one of n does."""
    place = np.arange(len(values))
    distance = (place[:, None] - place[None, :] + len(values) - 1).ravel()
    flat = values.ravel()
    by_distance = (np.bincount(distance, flat) / np.bincount(distance))[distance].reshape(values.shape)
    by_each = values.mean(1, keepdims=True) + values.mean(0, keepdims=True) - values.mean()
    total = ((values - values.mean()) ** 2).sum()
    return {
        "by_distance": float(1 - ((values - by_distance) ** 2).sum() / total),
        "by_one_position_each": float(1 - ((values - by_each) ** 2).sum() / total),
    }


@partial(jax.jit, static_argnums=(2, 3))
def terms_over_pairs(f: Callable, x: jax.Array, m: int, n: int, table: jax.Array) -> jax.Array:
    """Computes the five terms for p_m and p_n of every pair of rows of table [P, D]: [P, P, 5]."""
    return jax.vmap(lambda p: jax.vmap(lambda q: expansion(f, x, m, n, p, q)[0])(table))(table)


def measure_expansion(models: int = MODELS, m: int = 3, n: int = 11) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns the results for the file, and the arrays of the figure. Must be called under ``jax.enable_x64``."""
    table, sizes = sinusoids(POSITIONS), np.geomspace(1e-2, 0.3, 9)  # embeddings have a norm of 8
    rows, lines, maps = [], [], []
    for seed in range(models):
        f, x, error = scalar_of(seed)
        lines.append(np.abs(remainders(f, x, m, n, jnp.asarray(sizes))))
        maps.append(table @ np.asarray(cross_hessian(f, x, m, n)) @ table.T)
        found = {"seed": seed, "error_of_float32_model": error, "power_of_remainder": fitted_power(sizes, lines[-1])}
        rows.append(found | explained(maps[-1]))
    f, x, _ = scalar_of(0)
    few = np.asarray(terms_over_pairs(f, x, m, n, jnp.asarray(table[:16])))
    term_shares = {name: explained(few[..., k])["by_one_position_each"] for k, name in enumerate(TERMS)}
    place = np.arange(POSITIONS)
    closed = np.cos((place[:, None] - place)[..., None] * geometric_frequencies(10_000.0, WIDTH)).sum(-1)
    identity = table @ table.T
    identity_shares = {"error_of_closed_form": float(np.abs(identity - closed).max())} | explained(identity)
    independent = (2 * POSITIONS - 2) / (POSITIONS**2 - 1)  # the share that 2 P - 1 means explain of P^2 independent random numbers
    found = {"models": rows, "identity": identity_shares, "one_position_each": term_shares, "by_distance_of_noise": independent}
    return found, {"sizes": sizes, "left": np.stack(lines), "mixed": maps[0], "identity": identity}


# Results --------------------------------------------------------------------------------------------------------------


def draw(symmetry: list[dict], found: dict[str, np.ndarray]):
    figure, ((changes, remainder), (flat, generic)) = new_figure(10.0, 7.5, 2, 2)
    looks = styles([row["encoding"] for row in symmetry])
    for line, row in enumerate(symmetry):
        color = looks[row["encoding"]].color
        for mask, marker, face, aside in (("none", "o", color, -0.15), ("causal", "s", "white", 0.15)):
            column = f"mask {mask}, 2 layers"
            if row[column] is not None:
                changes.plot(max(row[column], 1e-8), line + aside, marker, color=color, mfc=face, markersize=6)
    changes.plot([], [], "o", color=BLACK, label="no mask")
    changes.plot([], [], "s", color=BLACK, mfc="white", label="causal mask")
    changes.legend(frameon=False, fontsize=9, loc="lower left")
    changes.set_xscale("log")
    changes.set_yticks(range(len(symmetry)), [row["encoding"] for row in symmetry], fontsize=9)
    changes.invert_yaxis()
    changes.set_xlabel("change of the last token's logits (max |difference|)")
    changes.set_title("the tokens before the last one permuted, two layers", fontsize=10)
    for line in found["left"]:
        remainder.plot(found["sizes"], line, color=RED, linewidth=0.8, alpha=0.6, marker=".", markersize=4)
    third = found["left"].mean(0)[0] * (found["sizes"] / found["sizes"][0]) ** 3
    remainder.plot(found["sizes"], third, color=BLACK, linestyle="--", linewidth=1.2, label="third power")
    remainder.plot([], [], color=RED, marker=".", label=f"{len(found['left'])} random models")
    remainder.legend(frameon=False, fontsize=9)
    remainder.set_xscale("log")
    remainder.set_yscale("log")
    remainder.set_xlabel("size of p (norm of each vector)")
    remainder.set_ylabel("|f(x + p) - six terms| (logits)")
    remainder.set_title("remainder of the expansion", fontsize=10)
    panels = ((flat, "identity", "p_m.p_n: depends on m - n alone"), (generic, "mixed", "p_m.H_mn.p_n, H of a random model"))
    for axes, key, title in panels:
        values = found[key] - found[key].mean()
        reach = np.abs(values).max()
        image = axes.imshow(values, cmap="RdBu_r", vmin=-reach, vmax=reach, origin="lower")
        figure.colorbar(image, ax=axes, shrink=0.85, label="minus its mean (logits)" if key == "mixed" else "minus its mean")
        axes.grid(False)
        axes.set_xlabel("position n (tokens)")
        axes.set_ylabel("position m (tokens)")
        axes.set_title(title, fontsize=10)
    return figure


def main() -> None:
    symmetry = symmetry_rows()
    with jax.enable_x64(True):
        found, arrays = measure_expansion()
    save(draw(symmetry, arrays), common.RESULTS / "symmetry.png")

    columns = list(symmetry[0])[1:]
    lines = [[row["encoding"], *("-" if row[c] is None else f"{row[c]:.1e}" for c in columns)] for row in symmetry]
    table = common.markdown(["greatest difference of logits", *columns], lines)
    models, identity = found["models"], found["identity"]
    lines = [
        ["power of the size of p that the remainder falls with", *of_models(models, "power_of_remainder", "{:.3f}")],
        ["variance of p_m.H_mn.p_n explained by m - n", *of_models(models, "by_distance", "{:.1%}")],
        ["the same for H_mn = identity", f"{identity['by_distance']:.1%}", ""],
        ["the same for independent numbers", f"{found['by_distance_of_noise']:.1%}", ""],
        ["p_m.p_n less sum_k cos((m - n) theta_k)", f"{identity['error_of_closed_form']:.0e}", ""],
        ["variance explained by a function of m plus one of n", *of_models(models, "by_one_position_each", "{:.1%}")],
        *([f"the same of {name}, 16 positions", f"{share:.1%}", ""] for name, share in found["one_position_each"].items()),
        ["float32 posjax less the float64 model (logits)", *of_models(models, "error_of_float32_model", "{:.0e}")],
    ]
    table += "\n\n" + common.markdown([f"{len(models)} random models", "mean", "least to greatest"], lines)
    common.write("symmetry", symmetry, expansion=found, table=table)
    print(table)


def of_models(rows: list[dict], key: str, form: str) -> tuple[str, str]:
    values = [row[key] for row in rows]
    return form.format(np.mean(values)), f"{form.format(min(values))} to {form.format(max(values))}"


if __name__ == "__main__":
    main()
