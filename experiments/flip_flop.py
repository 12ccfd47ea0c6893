"""Flip-flop language modelling: CoPE's paper (arXiv:2405.18719), its largest model and CoPE's variants.

    python experiments/flip_flop.py                  # a small model, strings of 64 tokens; under ten minutes on two cores
    python experiments/flip_flop.py --scale paper --only main    # dimension 256, 4 layers, 4 heads, strings of 512; one GPU

The model reads writes, reads and ignores, each followed by a bit, and must tell the last bit written after each read. Error in
percent of these bits on the training distribution (80 % ignored) and on two others: dense (10 %) and sparse (98 %). Recipe of the
paper: 10,000 steps of 16 strings of 512 tokens, AdamW at 3e-4, linear decay. flip_flop_shapes.py has the seven other shapes.
"""

import argparse
import dataclasses
from collections.abc import Mapping

from common import markdown
from trained import Part, Rows, cell, claims, main, of, values, verdict

from posjax.config import Config
from posjax.sweeps import Point, grid

PUBLISHED = ((6.8, 21.7), (1.8, 20.3), (0.03, 4.9))  # in and out of the distribution: Abs, RoPE, CoPE
PUBLISHED_VARIANTS = {
    "cope_mlp": (0.03, 5.9),
    "cope in the first layer": (0.9, 24.3),
    "cope_alibi, slope 1": (0.0, 11.4),
    "cope_alibi, slope 1/4": (0.0, 8.7),
    "cope_alibi, slope 1/16": (0.0, 17.1),
    "cope_alibi, learned": (0.0, 11.4),
}
SHAPE = (256, 4, 4)  # dimension, layers, heads
COLUMNS = ("in distribution", "dense", "sparse")
# The small scale: an eighth of the width. One layer cannot do the task, so that two layers stay two, and four become three.
SMALL = {"embed_dim": {256: 32, 128: 16}, "num_layers": {4: 3, 2: 2}}


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
        eval_tokens=1_048_576,
    )
    if scale == "cpu":
        config = dataclasses.replace(config, seq_length=64, steps=500, learning_rate=3e-3, log_every=50, eval_tokens=32_768)
    return dataclasses.replace(config, **size(scale, *SHAPE))


def size(scale: str, dim: int, layers: int, heads: int) -> dict[str, int]:
    """A published shape at a scale, as fields of a configuration."""
    published = {"embed_dim": dim, "num_layers": layers, "num_heads": heads}
    return published if scale == "paper" else {name: SMALL.get(name, {}).get(value, value) for name, value in published.items()}


def sized(config: Config, specs: tuple[str, ...], shape: Mapping[str, int]) -> list[Point]:
    """Points of a shape, which stands in their settings."""
    return grid(config, [("encoding", specs), *((name, (value,)) for name, value in shape.items())])


def encodings(config: Config) -> tuple[str, str, str]:
    return "learned", "rope", f"cope({min(64, config.seq_length)})"


def variants(config: Config) -> dict[str, str]:
    """The published rows at the first shape, by their names there."""
    rest = " / identity" * (config.num_layers - 1)
    slopes = {"1": "1.0", "1/4": "0.25", "1/16": "0.0625"}
    return {
        "cope_mlp": "cope_mlp(64)" if config.seq_length == 512 else "cope_mlp(16)",
        "cope in the first layer": encodings(config)[2] + rest,
        **{f"cope_alibi, slope {name}": f"cope_alibi(slope={value})" for name, value in slopes.items()},
        "cope_alibi, learned": "cope_alibi(learned=True)",
    }


def parts(options: argparse.Namespace) -> dict[str, Part]:
    config, seeds = recipe(options.scale), 5 if options.scale == "cpu" else 3
    shape = size(options.scale, *SHAPE)
    return {
        "main": Part(sized(config, encodings(config), shape), seeds=seeds),
        "variants": Part(sized(config, tuple(variants(config).values()), shape), seeds=seeds),
    }


def name_of(shape: Mapping[str, int]) -> str:
    """As the paper writes it: dimension, layers / heads."""
    return "{embed_dim} {num_layers}/{num_heads}".format(**shape)


def table(found: Mapping[str, Rows]) -> str:
    scale = "paper" if found["main"][0]["settings"]["embed_dim"] == SHAPE[0] else "cpu"
    config, shape = recipe(scale), name_of(size(scale, *SHAPE))
    own = {spec: of(found["main"], encoding=spec) for spec in encodings(config)}
    rows_of = own | {
        name: of(found.get("variants", []), encoding=spec) for name, spec in variants(config).items()
    }
    theirs = dict(zip(own, PUBLISHED, strict=True)) | PUBLISHED_VARIANTS
    lines = [[name, *(cell(rows, c, 2) for c in COLUMNS), *theirs[name]] for name, rows in rows_of.items() if rows]
    absolute, rope, cope = own.values()
    told = [
        verdict(f"{lower} below {higher}, {column}", values(low, column), values(high, column), " %", 2)
        for lower, higher, low, high in (
            ("CoPE", "absolute", cope, absolute),
            ("CoPE", "RoPE", cope, rope),
            ("RoPE", "absolute", rope, absolute),
        )
        for column in COLUMNS
    ]
    heads = [f"{shape}, T = {config.seq_length}", *COLUMNS, "theirs, 256 4/4, T = 512: in distribution", "out of it"]
    return markdown(heads, lines) + "\n\n" + claims(told)


if __name__ == "__main__":
    main("flip_flop", __doc__, parts, table)
