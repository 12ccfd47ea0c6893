"""Flip-flop language modelling from CoPE's paper (arXiv:2405.18719), after few and many steps, at the training length and beyond.

    python experiments/flip_flop.py                  # a small model, strings of 64 tokens; under fifteen minutes on two cores
    python experiments/flip_flop.py --scale paper    # dimension 256, 4 layers, 2 heads, strings of 512; one GPU

The model reads writes, reads and ignores, each followed by a bit, and predicts the last written bit after each read. Reports the
error in percent of these bits on the training distribution (80 % ignored) and on two others: dense (10 %) and sparse (98 %). Recipe
of the paper: 10,000 steps of 16 strings of 512 tokens, AdamW at 3e-4, linear decay. Strings of the training length contain no new
distances; the "4x" tests have strings four times as long. flip_flop_variants.py tests CoPE's variants, flip_flop_shapes.py other
shapes.
"""

import argparse
import dataclasses
from collections.abc import Mapping

from common import markdown
from contrasts import Claim, cell
from scoring import strings
from trained import Found, Part, lasting, main, tuned

from posjax.data.synthetic import flip_flop
from posjax.lab.ablation.sweeps import Point, grid
from posjax.lab.config import Config
from posjax.lab.evaluation import EvalSet
from posjax.lab.source import Source

PUBLISHED = ((0.1, 18.0), (0.02, 19.0), (0.0, 3.0))  # in and out of the distribution: Abs, RoPE, CoPE
SHAPE = (256, 4, 2)  # dimension, layers, heads
SETS = ("in distribution", "dense", "sparse")
LONGER = tuple(f"4x, {name}" for name in SETS)
SHORT, MARGIN = 500, 1.0
# The small scale has an eighth of the width. One layer cannot solve the task, so two layers stay two, and four become three.
SMALL = {"embed_dim": {256: 32, 128: 16}, "num_layers": {4: 3, 2: 2}}
# The best of three in distribution (3e-3 if several have no errors), chosen with the tuning seeds of learning_rates.py. CoPE has
# fewer steps, which take about as long as RoPE's.
RATES = {"learned": 1e-3, "rope": 3e-3, "cope(64)": 3e-3, "cope_alibi(slope=1.0)": 3e-3, "alibi": 1e-3}
STEPS = {"learned": 2000, "rope": 1600, "cope(64)": 1000}


def recipe(scale: str) -> Config:
    config = Config(
        task="flip_flop",
        seq_length=512,
        batch_size=16,
        steps=10_000,
        learning_rate=3e-4,
        warmup_steps=0,
        decay="linear",
        end_fraction=0.0,
        weight_decay=0.01,
        beta2=0.999,
        log_every=100,
        checkpoint_every=1000,
    )
    if scale == "cpu":
        config = lasting(config, seq_length=64, steps=1000, learning_rate=3e-3, log_every=20, checkpoint_every=500)
    return dataclasses.replace(config, **size(scale, *SHAPE))


def size(scale: str, dim: int, layers: int, heads: int) -> dict[str, int]:
    """Returns a published shape at a scale, as fields of a configuration."""
    published = {"embed_dim": dim, "num_layers": layers, "num_heads": heads}
    return published if scale == "paper" else {name: SMALL.get(name, {}).get(value, value) for name, value in published.items()}


def sized(config: Config, specs: tuple[str, ...], shape: Mapping[str, int]) -> list[Point]:
    """Returns the points of a shape, with the shape in their settings."""
    return grid(config, [("encoding", specs), *((name, (value,)) for name, value in shape.items())])


def encodings(config: Config) -> tuple[str, str, str]:
    return "learned", "rope", f"cope({min(64, config.seq_length)})"


def tests(config: Config, source: Source) -> dict[str, EvalSet]:
    """Returns test sets of the training length and of four times that; more than 100,000 reads at the small scale."""
    longer = flip_flop(length=4 * config.seq_length)
    counts = (2048, 6144, 2048, 512, 256, 1024)
    drawn = [source.task, *source.task.variants.values(), longer, *longer.variants.values()]
    return {c: strings(config, source, task, n) for c, task, n in zip((*SETS, *LONGER), drawn, counts, strict=True)}


def parts(options: argparse.Namespace) -> dict[str, Part]:
    config = recipe(options.scale)
    if options.scale == "paper":
        return {"main": Part(tuned(config, encodings(config)), tests, seeds=3)}
    absolute, rope, cope = encodings(config)
    claims = [Claim(cope, rope, column, MARGIN) for column in (*SETS, *LONGER)]
    claims += [Claim(absolute, rope, column, MARGIN, steps=SHORT) for column in SETS]
    claims += [Claim(absolute, rope, column, MARGIN) for column in SETS]
    return {"main": Part(tuned(config, encodings(config), RATES, STEPS), tests, seeds=8, claims=claims)}


def name_of(shape: Mapping[str, int]) -> str:
    """Formats a shape as the paper does: dimension, layers / heads."""
    return "{embed_dim} {num_layers}/{num_heads}".format(**shape)


def table(found: Mapping[str, Found]) -> str:
    main_part = found["main"]
    scale = "paper" if main_part.about["config"]["embed_dim"] == SHAPE[0] else "cpu"
    config, lines = recipe(scale), []
    for spec, theirs in zip(encodings(config), PUBLISHED, strict=True):
        rows = main_part.of(encoding=spec)
        last = main_part.steps(rows)
        for step in sorted(step for step in rows[0]["items"] if step in (SHORT, last)):
            cells = [cell(rows, step, c, main_part.scale, 2, solved=True) for c in (*SETS, *LONGER)]
            lines.append([spec, f"{step:,}", *cells, *(theirs if step == last else ("", ""))])
    lines.append(["the commoner bit", "", *(f"{main_part.about['majority'][c]:.1f}" for c in (*SETS, *LONGER)), "", ""])
    shape = name_of(size(scale, *SHAPE))
    heads = [f"{shape}, T = {config.seq_length}", "steps", *SETS, *LONGER, "theirs, 256 4/2, T = 512: in distribution", "out of it"]
    return markdown(heads, lines)


if __name__ == "__main__":
    main("flip_flop", __doc__, parts, table)
