"""Flip-flop language modelling: the table of CoPE's paper (arXiv:2405.18719), eight shapes of model and CoPE's variants.

    python experiments/flip_flop.py                  # small models, strings of 64 tokens, five seeds; ten minutes, two cores
    python experiments/flip_flop.py --scale paper    # the published sizes; --only main is dim 256, 4 layers, 4 heads alone, one GPU

The model reads writes, reads and ignores, each followed by a bit, and must tell the last bit written after each read. Error in
percent of these bits on the training distribution (80 % ignored) and on two others: dense (10 %) and sparse (98 %). Recipe of the
paper: 10,000 steps of 16 strings of 512 tokens, AdamW at 3e-4, linear decay.
"""

import argparse
import dataclasses
from collections.abc import Mapping

from common import markdown
from trained import Part, Rows, cell, claims, main, of, values, verdict

from posjax.config import Config
from posjax.sweeps import grid

# (dim, layers, heads): (in distribution, out of distribution) of Abs, RoPE, CoPE; in the order of the paper.
PUBLISHED = {
    (256, 4, 4): ((6.8, 21.7), (1.8, 20.3), (0.03, 4.9)),
    (256, 2, 4): ((11.1, 10.6), (5.1, 14.7), (0.0, 13.2)),
    (256, 4, 2): ((0.1, 18.0), (0.02, 19.0), (0.0, 3.0)),
    (256, 2, 2): ((13.9, 31.5), (5.4, 19.8), (0.0, 14.6)),
    (128, 4, 4): ((5.4, 24.8), (0.1, 8.9), (0.2, 33.2)),
    (128, 2, 4): ((0.08, 19.9), (0.1, 18.2), (0.03, 22.3)),
    (128, 4, 2): ((0.07, 16.5), (0.02, 17.3), (0.03, 14.5)),
    (128, 2, 2): ((19.1, 28.6), (14.4, 25.2), (0.02, 24.5)),
}
PUBLISHED_VARIANTS = {  # at 256, 4, 4
    "cope_mlp": (0.03, 5.9),
    "cope in the first layer": (0.9, 24.3),
    "cope_alibi, slope 1": (0.0, 11.4),
    "cope_alibi, slope 1/4": (0.0, 8.7),
    "cope_alibi, slope 1/16": (0.0, 17.1),
    "cope_alibi, learned": (0.0, 11.4),
}
COLUMNS = ("in distribution", "dense", "sparse")
SMALL = {256: 32, 128: 16}  # dimensions of the small scale; layers are halved


def recipe(scale: str) -> Config:
    config = Config(
        task="flip_flop",
        seq_length=512,
        batch_size=16,
        embed_dim=256,
        num_layers=4,
        num_heads=4,
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
    if scale == "paper":
        return config
    small = dict(seq_length=64, batch_size=8, embed_dim=32, num_layers=2, steps=500, learning_rate=3e-3)
    return dataclasses.replace(config, **small, log_every=50, eval_tokens=32_768)


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


def shape(scale: str, dim: int, layers: int, heads: int) -> dict[str, int]:
    """A published shape at a scale, as fields of a configuration."""
    if scale == "cpu":
        dim, layers = SMALL[dim], layers // 2
    return {"embed_dim": dim, "num_layers": layers, "num_heads": heads}


def parts(options: argparse.Namespace) -> dict[str, Part]:
    config = recipe(options.scale)
    sizes = [shape(options.scale, *published) for published in PUBLISHED]
    main_shape, *others = ({name: (value,) for name, value in size.items()} for size in sizes)

    def points(size: dict, specs: tuple[str, ...]) -> list:
        return grid(config, [("encoding", specs), *size.items()])

    shapes = [point for size in others for point in points(size, encodings(config))]
    return {
        "main": Part(points(main_shape, encodings(config)), seeds=5),
        "variants": Part(points(main_shape, tuple(variants(config).values())), seeds=5),
        "shapes": Part(shapes, seeds=5 if options.scale == "cpu" else 3),
    }


def table(found: Mapping[str, Rows]) -> str:
    scale = "paper" if any(row["settings"].get("embed_dim") == 256 for rows in found.values() for row in rows) else "cpu"
    config = recipe(scale)
    ours = [row for part in ("main", "shapes") for row in found.get(part, [])]
    lines = []
    for published, numbers in PUBLISHED.items():
        size = shape(scale, *published)
        for spec, (inside, outside) in zip(encodings(config), numbers, strict=True):
            if rows := of(ours, encoding=spec, **size):
                name = "{} {}/{}".format(*size.values())
                lines.append([name, spec, *(cell(rows, c, 2) for c in COLUMNS), "{} {}/{}".format(*published), inside, outside])
    for name, spec in variants(config).items():
        if rows := of(found.get("variants", []), encoding=spec):
            size = "{} {}/{}".format(*shape(scale, 256, 4, 4).values())
            lines.append([size, name, *(cell(rows, c, 2) for c in COLUMNS), "256 4/4", *PUBLISHED_VARIANTS[name]])
    heads = ["shape", "encoding", "in distribution", "dense", "sparse", "theirs: shape", "in distribution", "out of it"]
    absolute, rope, cope = (of(found.get("main", []), encoding=spec) for spec in encodings(config))
    told = [
        verdict(f"CoPE below {name}, {column}", values(cope, column), values(rows, column), " %", 2)
        for name, rows in (("absolute", absolute), ("RoPE", rope))
        for column in COLUMNS
    ]
    return markdown(heads, lines) + "\n\n" + claims(told)


if __name__ == "__main__":
    main("flip_flop", __doc__, parts, table)
