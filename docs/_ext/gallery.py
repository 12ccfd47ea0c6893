"""The gallery: one page for each encoding of the registry, and the cards of its index.

An encoding gets its page by registration. The text is its docstring's, the code its example's; the picture follows from the
structures that ``attend`` returns; support, cost, losses and checkpoints are looked up by its name.
"""

import functools
import hashlib
import inspect
import json
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import api
import jax
import jax.numpy as jnp
import numpy as np
import tables

import examples
import posjax as pj
from posjax.attention.backends.reference import scores_of
from posjax.attention.call import AttentionCall, prepare
from posjax.core.encoding import PositionalEncoding, Tokens, registered
from posjax.core.structures import Rotate
from posjax.encodings.rope_config import defaults
from posjax.encodings.spec import one_line, parse_encoding, spec_of
from posjax.lab.evaluation import MEASURES
from posjax.lab.probes import cope_positions, counts_by_gates
from posjax.plots import cope_over_line
from posjax.plots.style import BLACK, GREY, new_figure, save, styles

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TOKENS, GRID = 64, 15  # tokens of a map; rows and columns of a grid of patches
LINE = "def area(width, height): return width * height"
HEADS = 4


def write(folder: Path) -> None:
    """Writes all pages and figures, and removes those of encodings that are no longer registered.

    Nothing is done if neither the code nor a result has changed since the last time.
    """
    (folder / "figures").mkdir(exist_ok=True)
    digest, made_from = _digest(), folder / "figures" / "made_from.txt"
    if made_from.exists() and made_from.read_text() == digest:
        return
    written = {folder / "index.md", made_from}
    for name in examples.names():
        encoding = examples.of(name).encodings[0]
        figures = [folder / "figures" / f"{name}.png"]
        _save(picture(name), figures[0])
        if is_counting(encoding):
            figures.append(folder / "figures" / f"{name}_gates.png")
            _save(gates(encoding), figures[1])
        written |= {*figures, folder / f"{name}.md"}
        _write(folder / f"{name}.md", page(name, figures).encode())
    for path in (*folder.glob("*.md"), *folder.glob("figures/*")):
        if path not in written:
            path.unlink()
    made_from.write_text(digest)


def _digest() -> str:
    """Returns the SHA-256 of everything that the gallery is made from."""
    root = Path(__file__).parents[2]
    found = hashlib.sha256()
    for pattern in ("posjax/**/*.py", "docs/_ext/*.py", "experiments/results/*.json"):
        for path in sorted(root.glob(pattern)):
            found.update(path.read_bytes())
    return found.hexdigest()


def _write(path: Path, content: bytes) -> None:
    if not path.exists() or path.read_bytes() != content:  # Sphinx reads files again whose time has changed
        path.write_bytes(content)


def _save(figure: "Figure", path: Path) -> None:
    temporary = path.with_suffix(".new.png")
    save(figure, temporary)
    _write(path, temporary.read_bytes())
    temporary.unlink()


def cards() -> str:
    """Returns the cards of the index and the table of contents."""
    lines = ["````{grid} 1 1 2 2", ":gutter: 2", ""]
    for name in examples.names():
        lines += [f"```{{grid-item-card}} {name}", f":link: {name}", ":link-type: doc", f":img-top: figures/{name}.png"]
        lines += [f":img-alt: the effect of {name} on attention", "", _plain(one_line(name)), "```", ""]
    return "\n".join([*lines, "````", "", "```{toctree}", ":hidden:", *examples.names(), "```", ""])


def page(name: str, figures: Sequence[Path]) -> str:
    """Returns the page of an encoding as Markdown."""
    cls, example = registered()[name], examples.of(name)
    doc = api.sections(inspect.getdoc(cls) or "")
    about = "\n\n".join(filter(None, (doc[""], doc.get("after"))))
    code = used(example)
    spec = spec_of(example.encodings[0])
    parts = [
        f"# {name}\n",
        f"````{{eval-rst}}\n{api.rst(about)}\n````\n",
        f"Arguments and errors: {{py:class}}`posjax.{name}`.\n" if hasattr(pj, name) else "",
        "## Use\n",
        f"```python\n{imports(code)}\n\n{code}```\n",
        f'On the command line: `posjax train quickstart --encoding "{spec}"`.\n',
        "## Picture\n",
        f"```{{image}} figures/{figures[0].name}\n:alt: the effect of {name} on attention\n```\n",
        caption(example.encodings[0]),
    ]
    if len(figures) > 1:
        parts.append(f"```{{image}} figures/{figures[1].name}\n:alt: gates and contextual positions over a line of text\n```\n")
        parts.append(
            "Gates (bars) and contextual positions (line) over a line of text; the last character is the query. The keys were "
            "chosen so that gates open at spaces: positions count words.\n"
        )
    parts += ["## Where it runs\n", where(example.encodings), "## Cost\n", cost(name), "## Loss and extrapolation\n", losses(name)]
    parts += ["## Checkpoints\n", checkpoints(name)]
    return "\n".join(parts)


def used(example: examples.Example) -> str:
    """Returns the code of an example, followed by its use on 128 tokens, after running it."""
    encoding = example.encodings[0]
    dims, name = _dims(encoding), encoding.registered_name
    constructed = f"encoding = pj.{name}()\n" if hasattr(pj, name) else f'encoding = parse_encoding("{name}")\n'
    code = example.code or constructed
    code += f"params = encoding.init(jax.random.key(0), pj.Dims(num_heads=4, head_dim={dims.head_dim}, max_length=128))\n"
    if encoding.axes == 1 and _embedded(encoding, dims).any():
        code += (
            f"x = jnp.zeros((1, 128, {dims.embed_dim}))  # the embeddings of 128 tokens\n"
            "x = encoding.embed(params, x, pj.Tokens.at(jnp.arange(128)))\n"
        )
    else:
        tokens, options = "128", "is_causal=True"
        if "coordinates" in example.code:
            tokens, options = "len(coordinates)", "query_coordinates=coordinates, key_coordinates=coordinates"
        if encoding.needs_hidden:
            code += f"x = jax.random.normal(jax.random.key(4), (1, {tokens}, {dims.embed_dim}))\n"
            options += ", hidden=x"
        code += (
            f"shape = (1, {tokens}, 4, {dims.head_dim})\n"
            "query, key, value = (jax.random.normal(jax.random.key(i), shape) for i in (1, 2, 3))\n"
            f"out = pj.attention(query, key, value, encoding, params, {options})\n"
        )
    exec(code, examples.GLOBALS | {"parse_encoding": parse_encoding})
    return code


def imports(code: str) -> str:
    """Returns the imports that a piece of code needs."""
    known = {"jax": "import jax", "jnp": "import jax.numpy as jnp", "np": "import numpy as np", "pj": "import posjax as pj"}
    lines = [line for name, line in known.items() if re.search(rf"\b{name}\.", code)]
    return "\n".join(lines + ["from posjax.encodings.spec import parse_encoding"] * ("parse_encoding(" in code))


def _plain(text: str) -> str:
    return re.sub(r"([*_\[\]<>])", r"\\\1", text)


# Pictures ------------------------------------------------------------------------------------------------------------------------


@functools.cache
def is_counting(encoding: PositionalEncoding) -> bool:
    return encoding.needs_causal and counts_by_gates(encoding, _dims(encoding))


@functools.cache
def _dims(encoding: PositionalEncoding) -> pj.Dims:
    """Returns sizes of heads that fit the encoding: 64 channels, or 128."""

    def fitting(width: int) -> pj.Dims:
        dims = pj.Dims(num_heads=HEADS, head_dim=width, max_length=TOKENS)
        _call(encoding, dims, jnp.arange(4)[None])
        return dims

    try:
        return fitting(64)
    except ValueError:
        return fitting(128)


@functools.cache
def _params(encoding: PositionalEncoding, dims: pj.Dims) -> Any:
    """Returns parameters in which tables that start at zero hold random numbers, as training would leave them."""
    params = encoding.init(jax.random.key(0), dims)
    draw = np.random.default_rng(0).normal
    return jax.tree.map(lambda leaf: leaf if np.any(leaf) else jnp.asarray(0.5 * draw(size=leaf.shape), leaf.dtype), params)


def _call(encoding: PositionalEncoding, dims: pj.Dims, positions: Any, coordinates: Any = None, key: Any = None) -> AttentionCall:
    """Returns the call of equal queries, and equal keys unless they are given, so that scores differ by position alone."""
    length = positions.shape[1]
    ones = jnp.ones((1, length, dims.num_heads, dims.head_dim)) * dims.head_dim**-0.25
    options = dict(query_positions=positions, key_positions=positions, hidden=jnp.zeros((1, length, dims.embed_dim)))
    if coordinates is not None:
        options |= dict(query_coordinates=coordinates, key_coordinates=coordinates)
    key = ones if key is None else key
    return prepare(ones, key, ones, encoding, _params(encoding, dims), is_causal=encoding.needs_causal, **options)


def _text_keys(dims: pj.Dims) -> Any:
    """Returns one key per character of LINE, whose gate is open at spaces only."""
    sign = np.asarray([1.0 if character == " " else -1.0 for character in LINE])
    logit = 5.0 * sign[None, :, None, None] * np.ones((1, 1, dims.num_heads, dims.head_dim))
    return jnp.asarray(logit / dims.head_dim * dims.head_dim**0.75, jnp.float32)


def effect(encoding: PositionalEncoding) -> np.ndarray:
    """Returns what an encoding adds to the scores of equal queries and keys, [N, T, S]; NaN where attention is not allowed."""
    dims = _dims(encoding)
    if encoding.axes > 1:
        rows, columns = np.divmod(np.arange(GRID**2), GRID)
        at = np.stack([np.zeros_like(rows)] * (encoding.axes - 2) + [rows, columns], -1)[None]
        call = _call(encoding, dims, jnp.arange(GRID**2)[None], jnp.asarray(at, jnp.int32))
        key = None
    else:
        key = _text_keys(dims) if is_counting(encoding) else None
        length = TOKENS if key is None else len(LINE)
        call = _call(encoding, dims, jnp.arange(length)[None], key=key)
    plain = _call(pj.identity(), dims, call.query_positions, key=key)
    allowed = np.asarray(call.mask.allowed(call.query_positions, call.key_positions))
    scores, without = (np.asarray(scores_of(one)[1][0], np.float64) for one in (call, plain))
    if encoding.axes == 1:
        embedded = _embedded(encoding, dims)
        scores = scores + dims.head_dim / dims.embed_dim * dims.head_dim**-0.5 * embedded @ embedded.T if embedded.any() else scores
    added = scores - without
    return np.where(np.broadcast_to(allowed.reshape(-1, *added.shape[1:])[:1], added.shape), added, np.nan)


@functools.cache
def _embedded(encoding: PositionalEncoding, dims: pj.Dims) -> np.ndarray:
    """Returns what an encoding adds to the embeddings, [T, D]."""
    zeros = jnp.zeros((1, TOKENS, dims.embed_dim))
    tokens = Tokens.at(jnp.arange(TOKENS))
    return np.asarray(encoding.embed(_params(encoding, dims), zeros, tokens)[0])


def _frequencies(encoding: PositionalEncoding) -> np.ndarray | None:
    """Returns the radians per position of every pair of channels of head 0, None without a rotation."""
    dims = _dims(encoding)
    call = _call(encoding, dims, jnp.arange(2)[None])
    phases = [t.query_phase for t in call.transforms if isinstance(t, Rotate) and t.query_phase is not None]
    if not phases or encoding.axes > 1:
        return None
    return np.sort(np.abs(np.asarray(phases[0][0, 1, 0] - phases[0][0, 0, 0], np.float64)))[::-1]


def picture(name: str) -> "Figure":
    """Returns the picture of an encoding: a map of what it adds to scores, beside its spectrum, its embeddings or its decay."""
    variants = examples.of(name).encodings
    encoding = variants[0]
    figure, (left, right) = new_figure(8.0, 3.1, 1, 2, width_ratios=(1.0, 1.25))
    added = effect(encoding)
    if encoding.axes > 1:
        centre = GRID * (GRID // 2) + GRID // 2
        shown, labels = added[0, centre].reshape(GRID, GRID), ("column of the key", "row of the key")
    else:
        shown, labels = added[0], ("key", "query")
    most = max(1e-6, float(np.nanmax(np.abs(shown))))
    image = left.imshow(shown, cmap="RdBu_r", vmin=-most, vmax=most, interpolation="nearest")
    left.set(xlabel=labels[0], ylabel=labels[1])
    left.set_title("added to the score (head 1)", fontsize=10)
    left.grid(False)
    figure.colorbar(image, ax=left, shrink=0.85)
    spectra = {spec_of(one): found for one in variants if (found := _frequencies(one)) is not None}
    embedded = _embedded(encoding, _dims(encoding)) if encoding.axes == 1 else np.zeros(1)
    if embedded.any():
        most = np.abs(embedded).max()
        right.imshow(embedded[:, :128], cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto", interpolation="nearest")
        right.set(xlabel="channel", ylabel="position")
        right.set_title("added to the embeddings", fontsize=10)
        right.grid(False)
    elif spectra:
        for (spec, found), style in zip(spectra.items(), styles(spectra).values(), strict=True):
            turning = found > 0
            pairs = np.arange(1, len(found) + 1)[turning]
            right.plot(pairs, 2 * np.pi / found[turning], color=style.color, linestyle=style.line, label=_short(spec))
        right.set_yscale("log")
        right.set(xlabel="pair of channels, fastest first", ylabel="wavelength (positions)")
        right.set_title("spectrum", fontsize=10)
        right.legend(frameon=False, fontsize=8)
    else:
        _lines(right, encoding, added, styles([name])[name].color)
    return figure


def _lines(axes: Any, encoding: PositionalEncoding, added: np.ndarray, color: str) -> None:
    """Draws what is added, by distance for each head, or by position if it depends on where the query is."""
    own = np.diagonal(added, axis1=1, axis2=2)
    if encoding.axes > 1:
        middle = GRID // 2
        centre = added[:, GRID * middle + middle].reshape(-1, GRID, GRID)
        axes.plot(np.arange(GRID) - middle, centre[0, middle], color=color, label="along the row")
        axes.plot(np.arange(GRID) - middle, centre[0, :, middle], color=BLACK, linestyle="--", label="along the column")
        axes.legend(frameon=False, fontsize=8)
        axes.set(xlabel="offset of the key (patches)", ylabel="added to the score")
    elif is_counting(encoding):
        axes.plot(np.arange(added.shape[1])[::-1], added[0, -1], color=color)
        axes.set(xlabel="distance from the last character (tokens)", ylabel="added to the score")
    elif np.ptp(own[0]) > 1e-3:
        axes.plot(np.arange(own.shape[1]), own[0], color=color)
        axes.set(xlabel="position", ylabel="added to the score at distance 0")
    else:
        for head, row in enumerate(added[:, -1]):
            axes.plot(np.arange(added.shape[1])[::-1], row, color=color, alpha=1.0 - 0.2 * head)
        axes.axhline(0, color=GREY, linewidth=0.6)
        axes.set(xlabel="distance from key to query (tokens)", ylabel="added to the score")
    axes.set_title("a line per head" if encoding.axes == 1 and not is_counting(encoding) else "head 1", fontsize=10)


def _short(spec: str) -> str:
    return spec if len(spec) < 44 else f"{spec[:41]}..."


def caption(encoding: PositionalEncoding) -> str:
    """Returns what the picture shows."""
    if encoding.axes > 1:
        text = f"The query is the middle patch of a grid of {GRID} x {GRID}; all queries and keys are equal"
    elif is_counting(encoding):
        text = f"The text is the line below, {len(LINE)} characters, whose gates open at spaces"
    else:
        text = f"All queries and keys are equal, over {TOKENS} tokens, so that scores differ by position alone"
    learned = bool(jax.tree.leaves(encoding.init(jax.random.key(0), _dims(encoding))))
    return f"`{spec_of(encoding)}`. {text}." + (" Learned tables hold random numbers.\n" if learned else "\n")


def gates(encoding: PositionalEncoding) -> "Figure":
    """Returns gates and contextual positions over a line of text, for keys whose gates open at spaces."""
    dims = _dims(encoding)
    query = jnp.ones((1, len(LINE), dims.num_heads, dims.head_dim)) * dims.head_dim**-0.25
    key = _text_keys(dims)
    found, positions = cope_positions(query, key, key, encoding, _params(encoding, dims))
    return cope_over_line(LINE, found[0, :1, -1], positions[0, :1, -1], ["a head that counts words"])


# Tables --------------------------------------------------------------------------------------------------------------------------


def where(encodings: Sequence[PositionalEncoding]) -> str:
    rows = list(tables.support_rows(encodings))
    lines = [tables.table(["encoding", *tables.BACKENDS.values()], rows, "lcccccc")]
    lines += [f"- {reason}: {', '.join(whom)}" for reason, whom in tables.reasons_of(encodings).items()]
    return (
        "\n".join(lines) + "\n\nChecked for causal calls in bfloat16: alone, with packed rows, and with a window. "
        "The kernels have never run on a TPU or a GPU: see [the log of hardware](../reference/hardware_log.md).\n"
    )


def _results(file: str) -> Mapping[str, Any]:
    return json.loads((tables.RESULTS / file).read_text())


def names_encoding(spec: str, name: str) -> bool:
    """Returns whether the text form of an encoding contains an encoding by name."""
    return re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", spec) is not None


def cost(name: str) -> str:
    """Returns the tables of time and memory on a CPU, and of the schedule of the compiler for TPUs."""
    rows, parts = [], []
    for file in ("attention_2048_cpu.json", "attention_8192_cpu.json"):
        for row in _results(file)["rows"]:
            if row["kind"] == "posjax" and row["implementation"] == "xla_chunked" and names_encoding(row["encoding"], name):
                gates = "" if row["mean_gate"] is None else f"{row['mean_gate']:.2f}"
                memory = f"{row['peak_bytes_growth'] / 1e6:,.0f}"
                ratios = [f"{row[key]:.2f}" for key in ("ratio_to_identity", "ratio_to_jax_nn")]
                rows.append([f"`{row['encoding']}`", f"{row['length']:,}", row["pass"], gates, *ratios, memory])
    if rows:
        heads = ["encoding", "tokens", "passes", "mean gate", "time / no position", "time / jax.nn", "MB"]
        parts.append(
            "On two CPU cores, `xla_chunked` in float32, 4 heads of 64 channels: time relative to attention without position in "
            "posjax and in `jax.nn.dot_product_attention`, and the memory that a call adds (`attention_2048_cpu.json`, "
            "`attention_8192_cpu.json` in `experiments/results`).\n"
        )
        parts.append(tables.table(heads, rows, "lrlrrrr"))
    parts += [*_rotation(name), *_counting(name)]
    return "\n".join(parts) if parts else "Not measured.\n"


def _rotation(name: str) -> Iterator[str]:
    found = _results("tpu_cost_of_rotation.json")
    rows = [row for row in found["rows"] if names_encoding(row["encoding"], name) and row["failed"] is None]
    if rows:
        yield (
            f"In the TPU kernel, by the compiler's schedule (libtpu {found['libtpu']}, never run on a TPU): the largest ratio of "
            "bundles to RoPE's, over all parts of the kernels, forward and backward (`tpu_cost_of_rotation.json`).\n"
        )
        chips = list(dict.fromkeys(row["chip"] for row in rows))
        by = {(row["encoding"], row["chip"]): f"{row['largest_ratio']:.2f}" for row in rows}
        specs = list(dict.fromkeys(row["encoding"] for row in rows))
        yield tables.table(["encoding", *chips], [[f"`{s}`", *(by.get((s, c), "") for c in chips)] for s in specs], "lrrr")


def _counting(name: str) -> Iterator[str]:
    found = _results("tpu_cost_of_counting_v6e.json")
    if not registered()[name].needs_causal or not names_encoding(found["spec"], name):
        return
    yield (
        f"In the TPU kernel for {found['chip']}, by the compiler's schedule (libtpu {found['versions']['libtpu']}, never run on a "
        f"TPU): bundles of `{found['spec']}` relative to attention without position in the same kernel "
        "(`tpu_cost_of_counting_v6e.json`).\n"
    )
    rows = [
        [
            f"{row['length']:,}",
            row["gates"],
            *(f"{row[part]['ratio']:.2f}" for part in ("forward", "backward")),
            f"{row['ratio']:.2f}",
        ]
        for row in found["rows"]
    ]
    yield tables.table(["tokens", "gates", "forward", "backward", "both"], rows, "rlrrr")


def losses(name: str) -> str:
    """Returns the scores of all experiments that trained the encoding, with those of RoPE beside them."""
    parts = []
    for path in (tables.RESULTS / "quickstart.json", *sorted(tables.RESULTS.glob("*_cpu.json"))):
        found = json.loads(path.read_text())
        rows = [row for row in found.get("rows", ()) if "metrics" in row] if path.stem != "learning_rates_cpu" else []  # of tuning
        for part in dict.fromkeys(row.get("part", "") for row in rows):
            own = [row for row in rows if row.get("part", "") == part]
            if any(names_encoding(row["encoding"], name) for row in own):
                parts.append(_scores(name, part, own, found, path.stem))
    if not parts:
        return "No experiment has trained it.\n"
    head = (
        "Means over seeds, with standard deviations in parentheses, beside those of `rope`; lower is better. The models are small. "
        "[The experiments](../experiments.md) have the contrasts with intervals and the published numbers.\n"
    )
    return "\n".join([head, *parts])


def _scores(name: str, part: str, rows: Sequence[Mapping[str, Any]], found: Mapping[str, Any], stem: str) -> str:
    measure = next(key for key, value in rows[0]["metrics"].items() if isinstance(value, dict))
    columns = list(dict.fromkeys(column for row in rows for column in row["metrics"][measure]))
    lines = []
    runs: dict[str, list[Any]] = {}  # of all seeds, by encoding and settings
    for row in rows:
        if names_encoding(row["encoding"], name) or row["encoding"] == "rope":
            settings = "".join(f", {key}={value}" for key, value in row.get("settings", {}).items())
            runs.setdefault(f"`{row['encoding']}`{settings}", []).append(row["metrics"][measure])
    for label, seeds in runs.items():
        cells = []
        for column in columns:
            values = [seed[column] for seed in seeds if seed.get(column) is not None]
            spread = f" ({statistics.stdev(values):.3f})" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.3f}{spread}" if values else "-")
        lines.append([label, str(len(seeds)), *cells])
    steps = found.get("parts", {}).get(part, {}).get("steps")
    after = f", after {steps:,} steps" if steps else ""
    heads = ["encoding", "seeds", *columns]
    text = f"`{found['command']}` (`{stem}.json`{', ' + part if part else ''}): {MEASURES[measure]}{after}\n"
    return text + "\n" + tables.table(heads, lines, "l" + "r" * (len(heads) - 1))


# Checkpoints ---------------------------------------------------------------------------------------------------------------------

_CONFIG = dict(  # of any model type: what its keys are called, and sizes that fit
    hidden_size=2048, num_hidden_layers=4, num_attention_heads=16, num_key_value_heads=2, intermediate_size=512, vocab_size=64,
    max_position_embeddings=4096, n_embd=2048, n_layer=4, n_head=16, n_positions=4096, n_ctx=4096, type_vocab_size=2,
    rms_norm_eps=1e-5, layer_norm_epsilon=1e-5, layer_norm_eps=1e-5,
)  # fmt: skip


def checkpoints(name: str) -> str:
    """Returns the model types whose checkpoints use an encoding."""
    from posjax.models.pretrained.families import FAMILIES, architecture_of

    whole = [
        model
        for model in FAMILIES
        if any(names_encoding(repr(encoding), name) for encoding in architecture_of(_CONFIG | {"model_type": model}).encodings)
    ]
    alone: dict[str, list[str]] = {}
    for model in sorted(defaults.ROTARY):
        if model not in whole and (spec := _of_model(model)) is not None and names_encoding(spec, name):
            alone.setdefault(spec, []).append(model)
    lines = []
    if whole:
        lines.append(f"`Transformer.from_pretrained` loads the model types {_listed(whole)}, which use it by default.\n")
    if alone:
        lines.append(
            "`pj.rope_from_config` reads the encoding of these model types; the arguments are those of a default config:\n"
        )
        lines += [f"- `{spec}`: {', '.join(models)}" for spec, models in alone.items()]
    return "\n".join(lines) + "\n" if lines else "No model type that posjax reads uses it by default.\n"


def _of_model(model: str) -> str | None:
    """Returns the encoding of a model type, None if its configuration must say more than sizes."""
    for given in ({}, {"layer_type": "full_attention"}):
        try:
            return repr(pj.rope_from_config(_CONFIG | {"model_type": model}, **given))
        except ValueError:
            continue
    return None


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
