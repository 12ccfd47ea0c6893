"""Adds CoPE to a trained model: SmolLM2-135M with RoPE alone, and with RoPE + CoPE, fine-tuned on the same tokens.

    python experiments/retrofit_cope.py --english test.txt --train_english valid.txt     # WikiText-2's; hours on two cores

CoPE's position embeddings start at zero, so that adding it leaves the model as it is (arXiv:2405.18719 trains from scratch and
names larger models as future work). Three kinds of runs, with the same rows of 512 tokens in the same order for each seed:

    RoPE, all             all weights are trained, with the model's own encoding
    RoPE + CoPE, all      all weights are trained, CoPE's embeddings among them
    RoPE + CoPE, CoPE     CoPE's embeddings are trained alone, 4,096 numbers in each of 30 layers, at a rate of their own

The loss is that of the windows of English and of Python that context_extension.py reads, in the trained 8,192 tokens and past them;
it is compared with the model's before fine-tuning. Rerun the command to resume: every pass is stored in
results/retrofit_cope_passes.npz, which has the loss of every token, and runs in runs/experiments/retrofit_cope. Writes
results/retrofit_cope.json and results/retrofit_cope.png.
"""

import argparse
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import smollm2
from common import RESULTS, markdown, write
from long_context import THETA, TRAINED, Store, digest, fine_tune, losses_of, windows

import posjax as pj
from posjax.lab.statistics import summary
from posjax.models.pretrained.tokenizer import tokenizer_of
from posjax.models.transformer import Transformer, functional
from posjax.plots.style import BLACK, BLUE, GREY, ORANGE, RED, new_figure, save

FOLDER = Path("runs/experiments/retrofit_cope")
ROPE = f"rope(theta={THETA})"
COPE = f"{ROPE} + cope(max_position=64, shared=False)"
RUNS = {  # label -> encoding, what is trained, peak learning rate
    "RoPE, all": (ROPE, "all", 5e-5),
    "RoPE + CoPE, all": (COPE, "all", 5e-5),
    "RoPE + CoPE, CoPE": (COPE, "encoding", 2e-3),
}
SEEDS, STEPS, ROW, LENGTH = (0, 1, 2), 200, 512, 12_288
PARTS = {"in": slice(0, TRAINED), "past": slice(TRAINED, None)}
BIN = 1024


def row_of(label: str, seed: int | None, text: str, losses: np.ndarray) -> dict[str, Any]:
    means = {part: round(float(losses[own].mean(dtype=np.float64)), 4) for part, own in PARTS.items() if len(losses[own])}
    bins = losses[: len(losses) // BIN * BIN].reshape(-1, BIN).mean(1, dtype=np.float64)
    return {"run": label, "seed": seed, "text": text, "loss": means, "loss_by_position": [round(float(x), 4) for x in bins]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--english", type=Path, required=True, help="a file of English text that the model is evaluated on")
    parser.add_argument("--train_english", type=Path, required=True, help="another file of English text, to fine-tune on")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens of the texts that are read after fine-tuning")
    parser.add_argument("--windows", type=int, default=1, help="texts of each kind")
    options = parser.parse_args()
    path = smollm2.fetch()
    texts = windows(tokenizer_of(path), options.english, options.windows, options.length)
    store, rows = Store(RESULTS / "retrofit_cope_passes.npz"), []
    before = functools.cache(lambda: functional(Transformer.from_pretrained(path, max_length=options.length)))
    for text, tokens in texts.items():
        rows.append(row_of("before", None, text, losses_of(store, f"before {text}", before, tokens)))
    for seed in options.seeds:
        for label in RUNS:

            @functools.cache
            def tuned(label: str = label, seed: int = seed) -> tuple[Any, Any]:
                spec, trainable, rate = RUNS[label]
                workdir = FOLDER / f"{label} {options.steps} {seed}".replace(" ", "_").replace(",", "").replace("+", "and")
                flags = dict(
                    encoding=spec, trainable=trainable, seeds=seed, seq_length=ROW, steps=options.steps, learning_rate=rate
                )
                fine_tune(workdir, path, options.train_english, **flags)
                run = pj.load(workdir)
                return run.with_params, run.params

            for text, tokens in texts.items():
                losses = losses_of(store, f"{label} {options.steps} {seed} {text}", tuned, tokens)
                rows.append(row_of(label, seed, text, losses))
    table = "\n\n".join([loss_table(rows), difference_table(rows)])
    plot(rows)
    settings = {label: dict(zip(("encoding", "trainable", "learning_rate"), own, strict=True)) for label, own in RUNS.items()}
    about = dict(
        settings=settings,
        steps=options.steps,
        row=ROW,
        seeds=list(options.seeds),
        texts={name: digest(text) for name, text in texts.items()},
    )
    print(table, write("retrofit_cope", rows, **about, table=table), sep="\n\n")


def by_seed(rows: Sequence[Mapping[str, Any]], label: str, text: str, part: str) -> np.ndarray:
    """Returns the loss of each seed, the mean over the texts of a kind."""
    found: dict[Any, list[float]] = {}
    for row in rows:
        if row["run"] == label and row["text"].startswith(text) and part in row["loss"]:
            found.setdefault(row["seed"], []).append(row["loss"][part])
    return np.asarray([np.mean(own) for own in found.values()])


def loss_table(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = [(text, part) for text in ("English", "Python") for part in PARTS]
    lines = []
    for label in ("before", *RUNS):
        cells = []
        for text, part in columns:
            own = by_seed(rows, label, text, part)
            spread = f" ± {own.std(ddof=1):.4f}" if len(own) > 1 else ""
            cells.append(f"{own.mean():.4f}{spread}" if len(own) else "")
        lines.append([label, *cells])
    return markdown(["loss (nats per token)", *(f"{text}, {part} {TRAINED:,}" for text, part in columns)], lines)


def difference_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Formats the difference to RoPE fine-tuned on the same rows, with Student's 95 % interval over seeds."""
    columns = [(text, part) for text in ("English", "Python") for part in PARTS]
    lines = []
    for label in RUNS:
        if label == "RoPE, all":
            continue
        cells = []
        for text, part in columns:
            difference = by_seed(rows, label, text, part) - by_seed(rows, "RoPE, all", text, part)
            low, high = summary(difference).interval if len(difference) > 1 else (np.nan, np.nan)
            cells.append(f"{difference.mean():+.4f} [{low:+.4f}, {high:+.4f}]" if len(difference) else "")
        lines.append([label, *cells])
    return markdown(["minus RoPE, all", *(f"{text}, {part} {TRAINED:,}" for text, part in columns)], lines)


def plot(rows: Sequence[Mapping[str, Any]]) -> None:
    """Plots the loss of every run against the position, relative to the model before fine-tuning."""
    figure = new_figure(9.0, 4.4)[0]
    figure.clear()
    grid = figure.subplots(1, 2, sharex=True)
    colors = dict(zip(RUNS, (BLUE, RED, ORANGE), strict=True))
    for axes, text in zip(grid, ("English", "Python"), strict=True):
        before = {row["text"]: np.asarray(row["loss_by_position"]) for row in rows if row["run"] == "before"}
        for label, color in colors.items():
            curves: dict[int, list[np.ndarray]] = {}
            for row in rows:
                if row["run"] == label and row["text"].startswith(text):
                    curves.setdefault(row["seed"], []).append(np.asarray(row["loss_by_position"]) - before[row["text"]])
            means = np.asarray([np.mean(own, axis=0) for own in curves.values()])
            x = (np.arange(means.shape[1]) + 0.5) * BIN
            axes.plot(x, means.T, color=color, alpha=0.35, linewidth=0.8)
            axes.plot(x, means.mean(0), color=color, linewidth=1.8, label=label)
        axes.axhline(0, color=BLACK, linewidth=0.8)
        axes.axvline(TRAINED, color=GREY, linewidth=1)
        axes.set_title(text)
        axes.set_xlabel("position (tokens)")
    grid[0].set_ylabel("change of the loss (nats per token)")
    grid[0].legend(frameon=False)
    save(figure, RESULTS / "retrofit_cope.png")


if __name__ == "__main__":
    main()
