"""Selective copying: the table of CoPE's paper (arXiv:2405.18719).

    python experiments/selective_copy.py                  # 16 letters among 16 blanks; under ten minutes on two cores
    python experiments/selective_copy.py --scale paper    # 256 among 256, 100,000 steps; one GPU

The model reads letters with blanks among them and must write the letters down. Error in percent of the letters, on the training
distribution, with half as many blanks (dense) and with twice as many (sparse). The paper's numbers reach 100 %, above guessing, so
they must count strings: ours of letters are not theirs to compare digit by digit, the order of the encodings is.
"""

import argparse
import dataclasses
from collections.abc import Mapping

from common import markdown
from trained import Part, Rows, cell, claims, main, values, verdict

from posjax.config import Config
from posjax.sweeps import grid

PUBLISHED = {
    "learned": ("16.9 (3.7)", "25.6 (3.8)", "85.2 (8.4)"),
    "rope": ("40.1 (3.5)", "100", "100"),
    "cope": ("0", "0", "0.004 (0.006)"),
}
COLUMNS = ("in distribution", "dense", "sparse")


def recipe(scale: str) -> Config:
    config = Config(
        task="selective_copy",
        seq_length=512,
        batch_size=64,
        embed_dim=64,
        num_layers=2,
        num_heads=2,
        steps=100_000,
        learning_rate=1e-3,
        warmup_steps=1000,
        decay="linear",
        end_fraction=0.0,
        weight_decay=0.01,
        log_every=200,
        checkpoint_every=5000,
        eval_tokens=1_048_576,
    )
    if scale == "paper":
        return config
    small = dict(seq_length=32, batch_size=32, embed_dim=32, steps=2000, learning_rate=5e-3, warmup_steps=100)
    return dataclasses.replace(config, **small, log_every=100, eval_tokens=131_072)


def encodings(config: Config) -> dict[str, str]:
    return {"learned": "learned", "rope": "rope", "cope": "cope(64)" if config.seq_length == 32 else "cope(256)"}


def parts(options: argparse.Namespace) -> dict[str, Part]:
    config = recipe(options.scale)
    seeds = 5 if options.scale == "cpu" else 3
    return {"main": Part(grid(config, [("encoding", tuple(encodings(config).values()))]), seeds=seeds)}


def table(found: Mapping[str, Rows]) -> str:
    own = {name: [row for row in found["main"] if row["encoding"].partition("(")[0] == name] for name in PUBLISHED}
    lines = [[rows[0]["encoding"], *(cell(rows, c, 2) for c in COLUMNS), *PUBLISHED[name]] for name, rows in own.items() if rows]
    names = {"cope": "CoPE", "rope": "RoPE", "learned": "absolute"}
    told = [
        verdict(f"{names[low]} below {names[high]}, {column}", values(own[low], column), values(own[high], column), " %")
        for low, high in (("cope", "rope"), ("cope", "learned"), ("rope", "learned"))
        for column in COLUMNS
    ]
    heads = ["encoding", *COLUMNS, *(f"theirs: {COLUMNS[0]}", *COLUMNS[1:])]
    return markdown(heads, lines) + "\n\n" + claims(told)


if __name__ == "__main__":
    main("selective_copy", __doc__, parts, table)
