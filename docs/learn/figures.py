"""Draws the figures of these pages into docs/_static/learn, in half a minute on two CPU cores.

    python docs/learn/figures.py                          # all
    python docs/learn/figures.py --only scalings tiles
    python docs/learn/figures.py --run runs/cope          # first reads CoPE's gates from a run, and stores them beside this file

The run is ``posjax train quickstart --encoding "cope(64)" --workdir runs/cope``, which takes two minutes on two CPU cores.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import posjax as pj
from posjax.attention.backends.reference import scores_of
from posjax.attention.call import prepare
from posjax.encodings.phases import geometric_frequencies
from posjax.encodings.relative import alibi_slopes, t5_bucket
from posjax.lab.probes import cope_positions, decay_curve
from posjax.plots.positions import cope_over_line
from posjax.plots.style import BLUE, GREEN, GREY, ORANGE, RED, SKY, new_figure, save

HERE = Path(__file__).parent
FOLDER = HERE.parent / "_static" / "learn"
GATES = HERE / "cope_line.json"
LINE = "return sorted(self.values, key=len)"  # of the kind of code that the run was trained on
HEADS = {"layer 1, head 1": (0, 0), "layer 3, head 2": (2, 1)}


def weights_by_word() -> Any:
    """Attention weights over a sentence in which words repeat, when equal words have equal queries and keys."""
    words = ["to", "be", "or", "not", "to", "be"]
    vectors = {word: jax.random.normal(jax.random.key(n), (32,)) for n, word in enumerate(dict.fromkeys(words))}
    x = jnp.stack([vectors[word] for word in words])[None, :, None]
    cases = {
        "no positions": dict(encoding=pj.identity()),
        "no positions, causal mask": dict(encoding=pj.identity(), is_causal=True),
        "RoPE": dict(encoding=pj.rope()),
    }
    figure, panels = new_figure(7.4, 2.9, 1, 3)
    for axes, (title, options) in zip(panels, cases.items(), strict=True):
        weights = np.asarray(pj.attention_weights(x, x, scale=0.06, **options)[0, 0])
        _grid_of_numbers(axes, weights, "{:.2f}", title)
        axes.set_xticks(range(len(words)), words)
        axes.set_yticks(range(len(words)), words)
    figure.supxlabel("key", fontsize=9)
    figure.supylabel("query", fontsize=9)
    return figure


def absolute_table() -> Any:
    """Sinusoids, and their products by position."""
    figure, panels = new_figure(7.4, 2.6, 1, 3)
    width, length = 64, 128
    tokens = pj.Tokens(jnp.arange(length)[None])
    table = np.asarray(pj.sinusoidal().embed({}, jnp.zeros((1, length, width)), tokens)[0])
    image = panels[0].imshow(table.T, aspect="auto", cmap="RdBu", vmin=-1, vmax=1)
    panels[0].set(title="sinusoidal: added vectors", xlabel="position", ylabel="channel")
    panels[0].grid(False)
    figure.colorbar(image, ax=panels[0], shrink=0.8)
    learned = pj.learned(init_scale=1.0)
    params = learned.init(jax.random.key(0), pj.Dims(num_heads=1, head_dim=width, max_length=length))
    drawn = np.asarray(learned.embed(params, jnp.zeros((1, length, width)), tokens)[0])
    for axes, vectors, title in (
        (panels[1], table, "sinusoidal: products"),
        (panels[2], drawn, "learned, untrained"),
    ):
        for position, color in ((32, BLUE), (80, ORANGE)):
            axes.plot(vectors @ vectors[position] / np.sum(vectors[position] ** 2), color=color, label=f"with position {position}")
        axes.set(title=title, xlabel="position", ylim=(-0.6, 1.1))
    panels[1].set_ylabel("product, relative to its own")
    panels[1].legend(fontsize=8, loc="lower right")
    return _small_titles(figure)


def rotation() -> Any:
    """RoPE's wavelengths by theta, and two pairs of channels turning."""
    figure, panels = new_figure(7.4, 2.8, 1, 3, width_ratios=[1.5, 1, 1])
    width = 128
    for theta, color in ((1e4, BLUE), (5e5, ORANGE), (1e6, GREEN)):
        frequencies = np.asarray(geometric_frequencies(theta, width))
        panels[0].plot(2 * np.pi / frequencies, color=color, label=f"theta {theta:,.0f}")
    panels[0].axhline(8192, color=GREY, linestyle="--", linewidth=1)
    panels[0].text(1, 8192 * 1.2, "8,192 tokens", fontsize=8, color=GREY)
    panels[0].set(title="wavelengths, R = 128", xlabel="pair m", ylabel="positions per turn", yscale="log")
    panels[0].legend(fontsize=8, loc="lower right")
    head = 8
    positions = jnp.arange(7)
    one = jnp.zeros((1, 7, 1, head)).at[..., :4].set(1.0)  # the first of each pair
    call = prepare(one, one, one, pj.rope(theta=100.0), {}, query_positions=positions, key_positions=positions)
    turned = np.asarray(call.transformed().query)[0, :, 0]
    for axes, pair in zip(panels[1:], (0, 2), strict=True):
        for position in range(7):
            x, y = turned[position, pair], turned[position, pair + 4]
            axes.annotate("", (x, y), (0, 0), arrowprops=dict(arrowstyle="->", color=BLUE, alpha=1 - position / 9))
            if pair == 0 or position % 3 == 0:
                axes.text(1.18 * x, 1.18 * y, str(position), fontsize=8, ha="center", va="center")
        turn = 100.0 ** (-pair / 4)
        axes.set(title=f"pair {pair}: {turn:g} rad each", xlim=(-1.4, 1.4), ylim=(-1.4, 1.4), aspect="equal")
        axes.set_xlabel(f"channel {pair}")
        axes.set_ylabel(f"channel {pair + 4}")
    return _small_titles(figure)


def rotation_scores() -> Any:
    """Scores by distance of equal queries and keys, under RoPE, xPos and PoPE."""
    dims, distances = pj.Dims(num_heads=1, head_dim=64), np.arange(0, 513)
    figure, panels = new_figure(7.4, 2.6, 1, 3, sharex=True)
    cases = {
        "RoPE": {"theta 10,000": pj.rope(), "theta 500,000": pj.rope(theta=500_000.0)},
        "xPos": {"theta 10,000": pj.xpos()},
        "PoPE": {"theta 10,000": pj.pope()},
    }
    for axes, (title, encodings) in zip(panels, cases.items(), strict=True):
        for (label, encoding), color in zip(encodings.items(), (BLUE, ORANGE), strict=False):
            curve = np.asarray(decay_curve(encoding, encoding.init(jax.random.key(0), dims), distances, dims))[0]
            axes.plot(distances, curve, color=color, label=label)
        axes.set(title=title)
        axes.legend(fontsize=8)
    panels[0].set_ylabel("score less that of distance 0 (nats)", fontsize=9)
    figure.supxlabel("distance i - j (tokens)", fontsize=9)
    return _small_titles(figure)


def scalings() -> Any:
    """What each scaling by 8 does to each frequency."""
    theta, width, length = 500_000.0, 128, 8192
    unscaled = np.asarray(geometric_frequencies(theta, width))
    cases = {
        "linear": [("", pj.linear_scaling(8.0), None)],
        "NTK": [("", pj.ntk_scaling(8.0), None)],
        "NTK, base times s": [("", pj.ntk_theta_scaling(8.0), None)],
        "NTK, fixed": [("b = 1", pj.ntk_fixed_scaling(8.0), None), ("b = 0.625", pj.ntk_fixed_scaling(8.0, mixed_b=0.625), None)],
        "dynamic NTK": [(f"{n} L", pj.dynamic_ntk_scaling(2.0, length), n * length) for n in (1, 2, 4)],
        "YaRN": [("", pj.yarn_scaling(8.0, length), None)],
        "Llama 3": [("", pj.llama3_scaling(8.0), None)],
        "proportional, 1/4": [("", pj.proportional_scaling(0.25), None)],
    }
    figure, panels = new_figure(7.4, 4.2, 2, 4, sharex=True, sharey=True)
    for axes, (title, lines) in zip(panels.flat, cases.items(), strict=True):
        for (label, scaling, n), color in zip(lines, (BLUE, ORANGE, GREEN), strict=False):
            scaled = np.asarray(scaling.frequencies(theta, width, n))
            axes.plot(2 * np.pi / unscaled, scaled / unscaled, color=color, label=label)
        axes.axhline(1 / 8, color=GREY, linewidth=0.8, linestyle=":")
        axes.axvline(length, color=GREY, linewidth=1, linestyle="--")
        axes.set(title=title, xscale="log", ylim=(-0.04, 1.06))
        if len(lines) > 1:
            axes.legend(fontsize=8, loc="upper right" if n is None else "lower left")
    panels[0, 0].text(length * 1.3, 0.9, "L", fontsize=9, color=GREY)
    panels[0, 0].text(7, 0.15, "1/8", fontsize=9, color=GREY)
    figure.supxlabel("wavelength before scaling (positions)", fontsize=9)
    figure.supylabel("frequency after / before", fontsize=9)
    return _small_titles(figure)


def biases() -> Any:
    """ALiBi's penalties, T5's buckets, and a table read by bucket."""
    figure, panels = new_figure(7.4, 2.8, 1, 3)
    distances = np.arange(0, 161)
    for head, slope in enumerate(alibi_slopes(8)):
        panels[0].plot(distances, -slope * distances, color=GREEN, alpha=1 - 0.1 * head)
        panels[0].text(
            162, max(-slope * 160, -30), f"1/{round(1 / slope)}", fontsize=7, va="center"
        ) if 0.005 < slope < 0.2 else None
    panels[0].set(title="ALiBi: slopes 1/2 to 1/256", xlabel="distance i - j (tokens)", ylabel="bias (nats)", ylim=(-30, 1))
    panels[0].set_xlim(0, 182)
    signed = np.arange(-160, 161)
    panels[1].step(signed, np.asarray(t5_bucket(jnp.asarray(-signed), 32, 128, False)), color=BLUE, where="mid", label="decoder")
    panels[1].step(signed, np.asarray(t5_bucket(jnp.asarray(-signed), 32, 128, True)), color=ORANGE, where="mid", label="encoder")
    panels[1].set(title="T5: bucket of each distance", xlabel="distance i - j (tokens)", ylabel="bucket")
    panels[1].legend(fontsize=8)
    table = jnp.asarray(np.random.default_rng(3).normal(size=(32, 1)), jnp.float32)
    zeros = jnp.zeros((1, 161, 1, 8))
    scores = np.asarray(scores_of(prepare(zeros, zeros, zeros, pj.t5(), {"bias": table}, is_causal=True))[1])[0, 0]
    panels[2].step(distances, scores[160, ::-1], color=BLUE, where="mid")
    panels[2].set(title="T5: a random table", xlabel="distance i - j (tokens)", ylabel="bias (nats)")
    return _small_titles(figure)


def untied() -> Any:
    """TUPE's position scores, with [CLS] tied and untied, and with TUPE-R's relative bias."""
    dims, length = pj.Dims(num_heads=1, head_dim=32, max_length=16), 16
    zeros = jnp.zeros((1, length, 1, 32))
    figure, panels = new_figure(7.4, 2.8, 1, 3)
    near = -0.25 * jnp.abs(jnp.arange(32) % 16).astype(jnp.float32)[:, None]
    for axes, (title, encoding) in zip(
        panels,
        {
            "[CLS] tied": pj.tupe(untie_cls=False),
            "TUPE-A: [CLS] untied": pj.tupe(),
            "TUPE-R": pj.tupe(relative=True),
        }.items(),
        strict=True,
    ):
        params = encoding.init(jax.random.key(0), dims)
        if "reset" in params:
            params["reset"] = jnp.asarray([[2.0], [-2.0]])
        if "bias" in params:
            params["bias"] = near
        scores = np.asarray(scores_of(prepare(zeros, zeros, zeros, encoding, params))[1])[0, 0]
        image = axes.imshow(scores, cmap="RdBu", vmin=-4, vmax=4)
        axes.set(title=title, xlabel="key", ylabel="query")
        axes.set_xticks([0, 5, 10, 15], ["[CLS]", 5, 10, 15])
        axes.set_yticks([0, 5, 10, 15], ["[CLS]", 5, 10, 15])
        axes.grid(False)
    figure.colorbar(image, ax=panels, shrink=0.8, label="score of positions alone")
    return _small_titles(figure)


def grids() -> Any:
    """M-RoPE's coordinates of a text with an image, and scores of patches around a query under three rotations."""
    figure, panels = new_figure(7.4, 2.6, 1, 4, width_ratios=[1.7, 1, 1, 1])
    coordinates, _ = pj.mrope_positions([6, (1, 8, 12), 6])
    for axis, (name, color, line) in enumerate((("time", BLUE, "-"), ("height", ORANGE, "--"), ("width", GREEN, ":"))):
        panels[0].step(np.arange(len(coordinates)), coordinates[:, axis], color=color, linestyle=line, where="mid", label=name)
    panels[0].axvspan(5.5, 29.5, color=SKY, alpha=0.15)
    panels[0].text(8, 15.6, "image, 4 x 6", fontsize=8)
    panels[0].set(title="M-RoPE: coordinates", xlabel="token", ylabel="coordinate", ylim=(-0.5, 17.5))
    panels[0].legend(fontsize=8, loc="lower right")
    size, head = 15, 64
    ones = jnp.ones((1, size * size, 1, head))
    at = jnp.asarray(pj.axial_coordinates((size, size)))[None]
    cases = {"RoPE over rows": pj.rope(theta=100.0), "axial": pj.axial_rope(theta=100.0), "mixed, one head": pj.rope_mixed()}
    centre = size * size // 2
    for axes, (title, encoding) in zip(panels[1:], cases.items(), strict=True):
        params = encoding.init(jax.random.key(3), pj.Dims(num_heads=1, head_dim=head))
        given = {} if title == "RoPE over rows" else dict(query_coordinates=at, key_coordinates=at)
        scores = np.asarray(scores_of(prepare(ones, ones, ones, encoding, params, **given))[1])[0, 0, centre]
        axes.imshow(scores.reshape(size, size), cmap="viridis")
        axes.plot(size // 2, size // 2, "o", color=RED, markersize=4)
        axes.set(title=title, xlabel="column")
        axes.set_xticks([0, 7, 14])
        axes.set_yticks([0, 7, 14])
        axes.grid(False)
    panels[1].set_ylabel("row")
    return _small_titles(figure)


def cope_line() -> Any:
    """Gates and contextual positions of two heads over a line of code."""
    stored = json.loads(GATES.read_text())
    gates, positions = (np.asarray([head[name] for head in stored["heads"].values()]) for name in ("gates", "positions"))
    return cope_over_line(stored["text"], gates, positions, list(stored["heads"]))


def cope_bias() -> Any:
    """The bias of one query by contextual position, and by key, of the head that counts words."""
    head = json.loads(GATES.read_text())["heads"]["layer 3, head 2"]
    max_position, positions = 8, np.asarray(head["positions"])
    embedding = np.random.default_rng(1).normal(size=max_position)  # z_n = q.e_n of one query
    x = np.linspace(0, 20, 401)
    figure, panels = new_figure(7.4, 2.8, 1, 2)
    panels[0].plot(x, np.interp(x, np.arange(max_position), embedding), color=RED)
    panels[0].plot(np.arange(max_position), embedding, "o", color=BLUE, label="q · e[n], n = 0 .. 7")
    panels[0].axvline(max_position - 1, color=GREY, linestyle="--", linewidth=1)
    panels[0].text(max_position - 0.7, embedding.max() * 0.9, "clamped", fontsize=8, color=GREY)
    panels[0].set(title="interpolated between integers", xlabel="contextual position p", ylabel="bias (nats)")
    panels[0].legend(fontsize=8, loc="lower right")
    distance = np.arange(len(positions))[::-1]
    panels[1].plot(distance, np.interp(positions, np.arange(max_position), embedding), color=RED, marker=".")
    panels[1].set(title="the same, by key", xlabel="distance from the query (tokens)", ylabel="bias (nats)")
    return _small_titles(figure)


def tiles() -> Any:
    """Which tiles of a causal walk count, are plain, or are skipped."""
    length, tile, last = 1024, 64, 63
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (1, length, 1, 16)) for key in keys)
    figure, panels = new_figure(7.4, 3.7, 1, 2)
    params = pj.cope(last + 1).init(keys[0], pj.Dims(num_heads=1, head_dim=16))
    colors = np.asarray([[0.96, 0.96, 0.96], [0.34, 0.71, 0.91], [0.84, 0.37, 0.0]])
    for axes, bias in zip(panels, (0.0, -2.0), strict=True):
        gates, positions = cope_positions(q, k, v, pj.cope(last + 1, gate_bias=bias), params)
        sums = np.asarray(positions)[0, 0]
        kind = np.zeros((length // tile, length // tile), int)
        for row in range(length // tile):
            for column in range(row + 1):
                after = sums[row * tile : (row + 1) * tile, (column + 1) * tile] if column < row else np.zeros(1)
                kind[row, column] = 2 if (after < last).any() else 1
        axes.imshow(colors[kind])
        mean = float(np.asarray(gates)[0, 0][np.tril_indices(length)].mean())
        counted = int((kind == 2).sum())
        axes.set(title=f"mean gate {mean:.2f}: {counted} of {int((kind > 0).sum())} tiles count")
        axes.set(xlabel="key tile", ylabel="query tile")
        axes.set_xticks(np.arange(-0.5, 16), minor=True)
        axes.set_yticks(np.arange(-0.5, 16), minor=True)
        axes.grid(False)
        axes.grid(True, which="minor", color="white", linewidth=1)
        axes.tick_params(which="minor", length=0)
    from matplotlib.patches import Patch

    names = ("skipped", "plain (saturated)", "counts")
    handles = [Patch(facecolor=color, edgecolor="0.6", label=name) for color, name in zip(colors, names, strict=True)]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return _small_titles(figure)


def memory() -> Any:
    """Bytes that attention's backward pass needs, dense and tiled, from the compiler's own count."""
    lengths = [256, 512, 1024, 2048, 4096]
    figure, axes = new_figure(7.4, 2.8)
    for label, implementation, color, marker in (("dense", "xla", ORANGE, "s"), ("over tiles", "xla_chunked", BLUE, "o")):
        used = [_temporary_bytes(length, implementation) / 2**20 for length in lengths]
        axes.plot(lengths, used, color=color, marker=marker, label=label)
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="memory of one call (MiB)")
    axes.set_xticks(lengths, [f"{n:,}" for n in lengths])
    axes.minorticks_off()
    axes.legend(fontsize=9)
    return figure


def _temporary_bytes(length: int, implementation: Any) -> int:
    """Returns the temporary memory of attention with CoPE and its gradient: 4 heads of 64 channels, float32."""
    shape = jax.ShapeDtypeStruct((1, length, 4, 64), jnp.float32)
    encoding = pj.cope(64)
    params = encoding.init(jax.random.key(0), pj.Dims(num_heads=4, head_dim=64))

    def total(q: Any, k: Any, v: Any) -> Any:
        return pj.attention(q, k, v, encoding, params, is_causal=True, implementation=implementation).sum()

    compiled = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(shape, shape, shape).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None
    return int(analysis.temp_size_in_bytes)


def store_gates(run: str) -> None:
    """Stores the gates of two heads over ``LINE``, with the last character as query, and how they were made."""
    from posjax.lab import trained

    opened = pj.load(run)
    layers, gates, positions = trained.gates_and_positions(opened, LINE)
    assert layers == list(range(4))
    heads = {
        title: {"gates": gates[where][-1, 1:].round(4).tolist(), "positions": positions[where][-1, 1:].round(3).tolist()}
        for title, where in HEADS.items()
    }  # without BOS
    stored = {"command": 'posjax train quickstart --encoding "cope(64)" --workdir runs/cope', "jax": jax.__version__, "text": LINE}
    GATES.write_text(json.dumps(stored | {"heads": heads}) + "\n")


def _grid_of_numbers(axes: Any, values: np.ndarray, form: str, title: str) -> None:
    axes.imshow(values, cmap="Blues", vmin=0, vmax=1.3 * np.nanmax(values))
    for (row, column), value in np.ndenumerate(values):
        if value > 0:
            color = "white" if value > 0.7 * np.nanmax(values) else "black"
            axes.text(column, row, form.format(value), ha="center", va="center", fontsize=7, color=color)
    axes.set_title(title, fontsize=10)
    axes.grid(False)


def _small_titles(figure: Any) -> Any:
    for axes in figure.axes:
        axes.set_title(axes.get_title(), fontsize=10)
        axes.xaxis.label.set_size(9)
        axes.yaxis.label.set_size(9)
        axes.tick_params(labelsize=8)
    return figure


FIGURES: dict[str, Callable[[], Any]] = {
    function.__name__: function
    for function in (
        weights_by_word,
        absolute_table,
        rotation,
        rotation_scores,
        scalings,
        biases,
        untied,
        grids,
        cope_line,
        cope_bias,
        tiles,
        memory,
    )
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draws the figures of docs/learn.")
    parser.add_argument("--only", nargs="*", default=list(FIGURES), choices=list(FIGURES))
    parser.add_argument("--run", help="a workdir to read CoPE's gates from")
    arguments = parser.parse_args()
    if arguments.run:
        store_gates(arguments.run)
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in arguments.only:
        save(FIGURES[name](), FOLDER / f"{name}.png")
