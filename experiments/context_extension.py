"""Extends the context of SmolLM2-135M, trained to 8,192 tokens, by every scaling of RoPE: perplexity and passkeys to 32,768 tokens.

    python experiments/context_extension.py --english test.txt --train_english valid.txt     # WikiText-2's; hours on two cores
    python experiments/context_extension.py --english test.txt --only perplexity passkey

perplexity   Nothing is trained. Two windows of 32,768 tokens of English and two of Python (long modules of Python's library) are
             read under each method. The perplexity of their first 2,048 to 32,768 tokens is that of the same text for all methods.
passkey      Nothing is trained. A number of five digits is hidden at five depths of a repetitive text; greedy decoding must repeat
             it (Mohtashami and Jaggi, arXiv:2305.16300).
finetune     All weights are trained for a few hundred steps on rows of 1,024 tokens with linear scaling and with YaRN, three seeds
             each, and the windows are read again.

Rerun the command to resume: every pass is stored in results/context_extension_passes.npz, which has the loss of every token, and
runs in runs/experiments/context_extension. Writes results/context_extension.json and figures results/context_extension_*.png.
"""

import argparse
import functools
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import smollm2
from common import RESULTS, markdown, write
from flax import nnx
from long_context import HEAD_DIM, LONGEST, THETA, TRAINED, Store, digest, fine_tune, losses_of, perplexities, windows

import posjax as pj
from posjax.encodings.spec import spec_of
from posjax.files import read_json
from posjax.inference.generation import generate
from posjax.inference.sampling import Sampling
from posjax.models.pretrained.tokenizer import PretrainedTokenizer, tokenizer_of
from posjax.models.transformer import Transformer, functional
from posjax.plots.style import BLACK, GREY, new_figure, save
from posjax.typing import Params

FOLDER = Path("runs/experiments/context_extension")
PARTS = ("perplexity", "passkey", "finetune")
LENGTHS = (2048, 4096, 8192, 12_288, 16_384, 24_576, 32_768)
PASSKEY_LENGTHS = (2048, 8192, 16_384)
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
BIN = 256  # tokens of a point in the figure
TUNED = ("linear x4", "YaRN x4")
SEEDS, STEPS, ROW = (0, 1, 2), 200, 1024

# What the papers report, in words, for the methods that have a paper.
PUBLISHED = {
    "none": "perplexity explodes past the trained length (Chen et al., arXiv:2306.15595, section 2.2)",
    "linear": "extends after fine-tuning for about a thousand steps (arXiv:2306.15595)",
    "NTK": "extends without fine-tuning, to less than the factor says (bloc97, 2023; arXiv:2309.00071, section 3.1)",
    "dynamic NTK": "degrades gradually without fine-tuning (emozilla, 2023; arXiv:2309.00071, section 3.3)",
    "YaRN": "extends further than linear and NTK, with fine-tuning for 400 steps and without (Peng et al., arXiv:2309.00071)",
    "LongRoPE-like": "searched factors extend eightfold without fine-tuning (Ding et al., arXiv:2402.13753)",
    "log-scaled queries": "entropy of attention stays the same as the length grows (Su, 2021; Chiang and Cholak, arXiv:2202.12172)",
}


def longrope_factors(factor: float) -> tuple[float, ...]:
    """Returns long factors in the shape that LongRoPE's search finds, without a search.

    They grow geometrically from 1 to ``factor`` at the pair whose wavelength is the trained length, and stay there
    (arXiv:2402.13753, figure 3; the critical pair is LongRoPE2's, arXiv:2502.20082).
    """
    critical = HEAD_DIM / 2 * math.log(TRAINED / (2 * math.pi)) / math.log(THETA)
    return tuple(factor ** min(1.0, m / critical) for m in range(HEAD_DIM // 2))


def methods() -> dict[str, pj.PositionalEncoding]:
    """Returns the encoding of each method by label."""

    def rope(scaling: Any = None) -> pj.PositionalEncoding:
        return pj.rope(theta=THETA, scaling=scaling)

    def longrope(factor: float) -> Any:
        short, long = (1.0,) * (HEAD_DIM // 2), longrope_factors(factor)
        return pj.longrope_scaling(short_factor=short, long_factor=long, original_max_length=TRAINED, factor=factor)

    made = {"none": rope()}
    for s in (2.0, 4.0):
        made[f"linear x{s:g}"] = rope(pj.linear_scaling(s))
        made[f"NTK x{s:g}"] = rope(pj.ntk_scaling(s))
        made[f"dynamic NTK x{s:g}"] = rope(pj.dynamic_ntk_scaling(s, original_max_length=TRAINED))
        made[f"YaRN x{s:g}"] = rope(pj.yarn_scaling(s, original_max_length=TRAINED))
        made[f"LongRoPE-like x{s:g}"] = rope(longrope(s))
    # The factor of the query is ln p / ln 8192 past the trained length.
    made["log-scaled queries"] = pj.chain(pj.log_scale(TRAINED, beta=1 / math.log(TRAINED), rule="inkling"), rope())
    return made


def kind(label: str) -> str:
    return label.rsplit(" x", 1)[0]


class Model:
    """Holds the weights of SmolLM2, read once, and applies them with any encoding."""

    def __init__(self, path: Path):
        self.path, self.tokenizer = path, tokenizer_of(path)
        model = Transformer.from_pretrained(path, max_length=LONGEST)
        self.config, self.params = model.config, functional(model)[1]

    def with_encoding(self, encoding: pj.PositionalEncoding) -> Callable[[Params], Transformer]:
        return functional(nnx.eval_shape(lambda: Transformer(self.config, encoding, rngs=nnx.Rngs(0))))[0]


# Perplexity ---------------------------------------------------------------------------------------------------------------------


def read_windows(store: Store, model: Model, texts: Mapping[str, np.ndarray], lengths: Sequence[int]) -> list[dict[str, Any]]:
    """Returns a row for every method and text: the perplexity of the first tokens, and the loss in bins of positions."""
    rows = []
    for label, encoding in methods().items():
        own_model = functools.cache(lambda encoding=encoding: (model.with_encoding(encoding), model.params))
        for text, tokens in texts.items():
            ends = {n: read_to(encoding, label, n, lengths) for n in lengths}
            passes = {n: losses_of(store, f"{label} {text}", own_model, tokens[: ends[n] + 1]) for n in lengths}
            found = [perplexities(passes[n], [n])[0] for n in lengths]
            losses = passes[max(lengths)]
            bins = losses[: len(losses) // BIN * BIN].reshape(-1, BIN).mean(1, dtype=np.float64)
            own = {str(n): round(p, 3) for n, p in zip(lengths, found, strict=True)}
            curve = [round(float(x), 4) for x in bins]
            rows.append({"part": "perplexity", "method": label, "text": text, "perplexity": own, "loss_by_position": curve})
    return rows


def read_to(encoding: pj.PositionalEncoding, label: str, length: int, lengths: Sequence[int]) -> int:
    """Returns how many tokens to read for the losses of the first ``length``.

    A causal model reads a prefix as it reads it alone, unless its frequencies depend on the length: to the trained length they are
    the model's own, past it LongRoPE has one set, and dynamic NTK one for each length.
    """
    longest = max(lengths)
    if encoding.cache != "raw":
        return longest
    if length <= TRAINED:
        return min(TRAINED, longest)
    return length if kind(label) == "dynamic NTK" else longest


def perplexity_table(rows: Sequence[Mapping[str, Any]], lengths: Sequence[int], text: str) -> str:
    """Formats the geometric mean over windows of the perplexity at each length."""
    lines = []
    for label in dict.fromkeys(row["method"] for row in rows):
        own = [row["perplexity"] for row in rows if row["method"] == label and row["text"].startswith(text)]
        means = [math.exp(np.mean([math.log(one[str(n)]) for one in own])) for n in lengths]
        lines.append([label, *(f"{x:.1f}" if x < 1000 else f"{x:,.0f}" for x in means)])
    return markdown([f"{text}, perplexity of the first", *(f"{n:,}" for n in lengths)], lines)


def plot_losses(rows: Sequence[Mapping[str, Any]], text: str, name: str) -> None:
    """Plots the loss against the position in the text, the mean over windows."""
    figure, axes = new_figure(8.5, 4.8)
    marks = {"": "-", " x2": "--", " x4": "-"}
    labels = list(dict.fromkeys(row["method"] for row in rows))
    kinds = list(dict.fromkeys(map(kind, labels)))
    for label in labels:
        own = [row["loss_by_position"] for row in rows if row["method"] == label and row["text"].startswith(text)]
        mean = np.mean(own, axis=0)
        color = BLACK if label == "none" else COLORS[kinds.index(kind(label)) - 1]
        line = marks[label.removeprefix(kind(label))]
        axes.plot((np.arange(len(mean)) + 0.5) * BIN, mean, line, color=color, linewidth=1.6, label=label)
    axes.axvline(TRAINED, color=GREY, linewidth=1)
    axes.text(TRAINED, 0.99, " trained length", transform=axes.get_xaxis_transform(), va="top", color=GREY)
    low = min(min(row["loss_by_position"]) for row in rows if row["text"].startswith(text))
    axes.set_ylim(low - 0.1, low + 3.5)  # losses beyond are those of a model that has broken down
    axes.set_xlabel("position (tokens)")
    axes.set_ylabel(f"loss, means of {BIN:,} tokens (nats per token)")
    axes.set_title(text)
    figure.legend(loc="outside right upper", frameon=False)
    save(figure, RESULTS / f"context_extension_{name}.png")


COLORS = ("#e69f00", "#56b4e9", "#009e73", "#0072b2", "#d55e00", "#cc79a7")

# Passkeys -----------------------------------------------------------------------------------------------------------------------

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I will quiz you about the "
    "important information there.\n"
)


def passkey_prompt(tokenizer: PretrainedTokenizer, length: int, depth: float, key: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns a prompt and its answer, ``length`` tokens together."""
    head, filler = tokenizer.encode(TASK), tokenizer.encode(FILLER)
    needle = tokenizer.encode(f"The pass key is {key}. Remember it. {key} is the pass key.\n")
    tail, answer = tokenizer.encode("\nWhat is the pass key? The pass key is"), tokenizer.encode(f" {key}")
    left = length - sum(map(len, (head, needle, tail, answer)))
    body, before = np.resize(filler, left), int(left * depth)
    return np.concatenate([head, body[:before], needle, body[before:], tail]), answer


def retrieve(store: Store, model: Model, lengths: Sequence[int], trials: int) -> list[dict[str, Any]]:
    """Returns a row for every method, length and depth: how many of the keys greedy decoding repeats."""
    rows = []
    for label, encoding in methods().items():
        for length in lengths:
            keys = {f"passkey {label}|{length}|{trial}": trial for trial in range(trials)}
            found = [store.get(key, functools.partial(once, model, encoding, length, trial, key)) for key, trial in keys.items()]
            for depth, right in zip(DEPTHS, np.sum(found, axis=0).tolist(), strict=True):
                own = {"method": label, "length": length, "depth": depth, "right": right, "trials": trials}
                rows.append({"part": "passkey"} | own)
    return rows


def once(model: Model, encoding: pj.PositionalEncoding, length: int, trial: int, name: str) -> np.ndarray:
    """Returns whether greedy decoding repeats a key at each depth, [D] bool."""
    began, with_params = time.perf_counter(), model.with_encoding(encoding)
    keys = [random.Random(f"{length} {depth} {trial}").randint(10_000, 99_999) for depth in DEPTHS]
    found = np.asarray([repeats(with_params, model, length, depth, key) for depth, key in zip(DEPTHS, keys, strict=True)])
    print(f"{name}: {found.sum()} of {len(found)} in {time.perf_counter() - began:,.0f} s", flush=True)
    return found


def repeats(with_params: Callable[[Params], Transformer], model: Model, length: int, depth: float, key: int) -> bool:
    """Returns whether greedy decoding repeats the key. The prompt is read in one piece, so that all of it has one length."""
    prompt, answer = passkey_prompt(model.tokenizer, length, depth, key)
    options = dict(max_new_tokens=len(answer), sampling=Sampling(temperature=0.0), chunk=len(prompt))
    (tokens,) = generate(with_params, model.params, [prompt], **options)
    return np.array_equal(tokens, answer)


def passkey_table(rows: Sequence[Mapping[str, Any]], lengths: Sequence[int]) -> str:
    lines = []
    for label in dict.fromkeys(row["method"] for row in rows):
        own = [[row for row in rows if row["method"] == label and row["length"] == n] for n in lengths]
        lines.append([label, *(f"{sum(r['right'] for r in one)} / {sum(r['trials'] for r in one)}" for one in own)])
    return markdown(["passkeys repeated", *(f"{n:,}" for n in lengths)], lines)


def plot_passkeys(rows: Sequence[Mapping[str, Any]], lengths: Sequence[int]) -> None:
    """Plots a map of depth and length for every method."""
    labels = list(dict.fromkeys(row["method"] for row in rows))
    figure = new_figure(10.5, 6.0)[0]
    figure.clear()
    grid = figure.subplots(3, -(-len(labels) // 3), sharex=True, sharey=True, squeeze=False)
    for axes, label in zip(grid.flat, labels, strict=False):
        share = {(row["length"], row["depth"]): row["right"] / row["trials"] for row in rows if row["method"] == label}
        image = np.asarray([[share[n, d] for n in lengths] for d in DEPTHS])
        axes.imshow(image, vmin=0, vmax=1, cmap="cividis", aspect="auto")
        axes.set_title(label, fontsize=9)
        axes.set_xticks(range(len(lengths)), [f"{n // 1024}k" for n in lengths], fontsize=8)
        axes.set_yticks(range(len(DEPTHS)), [f"{d:g}" for d in DEPTHS], fontsize=8)
        axes.axvline(sum(n <= TRAINED for n in lengths) - 0.5, color="#ffffff", linewidth=1)
    for axes in grid.flat[len(labels) :]:
        axes.set_axis_off()
    figure.supxlabel("length (tokens); right of the line, longer than trained", fontsize=9)
    figure.supylabel("depth of the passkey", fontsize=9)
    save(figure, RESULTS / "context_extension_passkey.png")


# Fine-tuning --------------------------------------------------------------------------------------------------------------------


def finetune(
    store: Store, model: Model, texts: Mapping[str, np.ndarray], lengths: Sequence[int], english: Path, steps: int
) -> list[dict[str, Any]]:
    """Returns a row for every method, seed and English text after fine-tuning."""
    rows = []
    for seed in SEEDS:
        for label in TUNED:

            @functools.cache
            def tuned(label: str = label, seed: int = seed) -> tuple[Callable[[Params], Transformer], Params]:
                workdir = FOLDER / f"finetune {label} {steps} {seed}".replace(" ", "_")
                flags = dict(encoding=spec_of(methods()[label]), seeds=seed, seq_length=ROW, steps=steps, learning_rate=5e-5)
                fine_tune(workdir, model.path, english, **flags)
                run = pj.load(workdir)
                return run.with_params, run.params

            for text, tokens in texts.items():
                name = f"finetuned {label} {steps} {seed} {text}"
                losses = losses_of(store, name, tuned, tokens[: max(lengths) + 1])
                own = {str(n): round(p, 3) for n, p in zip(lengths, perplexities(losses, lengths), strict=True)}
                rows.append({"part": "finetune", "method": label, "seed": seed, "text": text, "perplexity": own})
    return rows


def finetune_table(rows: Sequence[Mapping[str, Any]], before: Sequence[Mapping[str, Any]], lengths: Sequence[int]) -> str:
    """Formats mean and standard deviation over seeds of the perplexity, next to that before fine-tuning."""
    lines = []
    for label in dict.fromkeys(row["method"] for row in rows):
        for text in ("English", "Python"):

            def means(rows: Sequence[Mapping[str, Any]], n: int, label: str = label, text: str = text) -> list[float]:
                by_seed: dict[Any, list[float]] = {}
                for row in rows:
                    if row["method"] == label and row["text"].startswith(text):
                        by_seed.setdefault(row.get("seed"), []).append(math.log(row["perplexity"][str(n)]))
                return [math.exp(np.mean(logs)) for logs in by_seed.values()]

            lines.append([f"{label}, {text}, before", *(f"{means(before, n)[0]:.1f}" for n in lengths)])
            cells = []
            for n in lengths:
                found = means(rows, n)
                cells.append(f"{np.mean(found):.2f} ± {np.std(found, ddof=1) if len(found) > 1 else 0:.2f}")
            lines.append([f"{label}, {text}, after", *cells])
    return markdown(["perplexity of the first", *(f"{n:,}" for n in lengths)], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--english", type=Path, required=True, help="a file of English text that the model is evaluated on")
    parser.add_argument("--train_english", type=Path, help="another file of English text, to fine-tune on")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to run; the others keep their results")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--windows", type=int, default=2, help="texts of each kind")
    parser.add_argument("--trials", type=int, default=1, help="passkeys at each depth and length")
    parser.add_argument("--passkey_lengths", type=int, nargs="+", default=PASSKEY_LENGTHS)
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    if "finetune" in options.only and options.train_english is None:
        parser.error("finetune needs --train_english, a text other than --english")
    lengths = sorted(options.lengths)
    path = RESULTS / "context_extension.json"
    rows = {part: [row for row in (read_json(path)["rows"] if path.exists() else []) if row["part"] == part] for part in PARTS}
    model = Model(smollm2.fetch())
    texts = windows(model.tokenizer, options.english, options.windows, max(lengths))
    store = Store(RESULTS / "context_extension_passes.npz")
    if "perplexity" in options.only:
        rows["perplexity"] = read_windows(store, model, texts, lengths)
    if "passkey" in options.only:
        rows["passkey"] = retrieve(store, model, sorted(options.passkey_lengths), options.trials)
    if "finetune" in options.only:
        rows["finetune"] = finetune(store, model, texts, lengths, options.train_english, options.steps)
    tables = []
    if rows["perplexity"]:
        tables.append(markdown(["method", "published"], [[name, text] for name, text in PUBLISHED.items()]))
        for text in ("English", "Python"):
            tables.append(perplexity_table(rows["perplexity"], lengths, text))
            plot_losses(rows["perplexity"], text, text.lower())
    if rows["passkey"]:
        found = sorted({row["length"] for row in rows["passkey"]})
        tables.append(passkey_table(rows["passkey"], found))
        plot_passkeys(rows["passkey"], found)
    if rows["finetune"]:
        tables.append(finetune_table(rows["finetune"], rows["perplexity"], lengths))
    table = "\n\n".join(tables)
    write(
        "context_extension",
        [row for part in rows.values() for row in part],
        texts={name: digest(text) for name, text in texts.items()},
        table=table,
    )
    print(table)


if __name__ == "__main__":
    main()
