"""Counting: the tables of CoPE's paper (arXiv:2405.18719) for 1, 3 and 5 variables, and with more and fewer passes.

    python experiments/counting.py                               # programs of up to 64 operations; under ten minutes on two cores
    python experiments/counting.py --scale paper --only "1 variable" "3 variables"    # one GPU

The model reads a program that sets, increments and passes, and must tell the value of a variable. Error in percent of the answers
on the training distribution and with other weights of "pass". Recipe of the paper: 4 layers, dimension 256, post-norm, dropout 0.1,
Adam at 7e-5, batch 64, 100 epochs of 10,000 programs, 3 seeds. Always answering 10 is right in a fifth of the published task.
"""

import argparse
import dataclasses
from collections.abc import Mapping

from common import markdown
from trained import Part, Rows, cell, claims, main, values, verdict

from posjax.config import Config
from posjax.sweeps import grid

# The relative encoding of the paper learns vectors that are added to keys; the nearest here is RoPE.
PUBLISHED = {
    1: {"learned": "5.3 (0.8)", "rope": "1.1 (0.4)", "cope": "0.0"},
    3: {"learned": "67.6 (1.5)", "rope": "17.8 (7.8)", "cope": "1.2 (2.1)"},
    5: {"learned": "71.5 (1.5)", "rope": "22.4 (5.1)", "cope": "7.4 (8.5)"},
}
PUBLISHED_PASSES = {"pass_100": {"rope": "8.8 (1.1)", "cope": "0.0"}, "pass_10": {"rope": "34.1 (2.5)", "cope": "4.0 (4.1)"}}


def recipe(scale: str) -> Config:
    config = Config(
        task="counting",
        seq_length=512,
        batch_size=64,
        embed_dim=256,
        num_layers=4,
        num_heads=4,
        norm="layernorm",
        norm_position="post",
        dropout_rate=0.1,
        steps=15_625,
        num_examples=10_000,
        learning_rate=7e-5,
        warmup_steps=0,
        decay="constant",
        weight_decay=0.0,
        beta2=0.999,
        log_every=100,
        checkpoint_every=1000,
        eval_tokens=1_048_576,
    )
    if scale == "paper":
        return config
    small = dict(seq_length=64, batch_size=16, embed_dim=32, num_layers=2, steps=800, learning_rate=3e-3, dropout_rate=0.0)
    return dataclasses.replace(config, **small, log_every=50, eval_tokens=65_536)


def encodings(config: Config) -> dict[str, str]:
    return {"learned": "learned", "rope": "rope", "cope": f"cope({min(64, config.seq_length)})"}


def named(variables: int) -> str:
    return f"{variables} variable{'s' if variables > 1 else ''}"


def parts(options: argparse.Namespace) -> dict[str, Part]:
    config, made = recipe(options.scale), {}
    for variables in PUBLISHED:
        own = dataclasses.replace(config, num_variables=variables)
        points = grid(own, [("encoding", tuple(encodings(config).values()))])
        made[named(variables)] = Part(points, seeds=5 if options.scale == "cpu" else 3)
    return made


def table(found: Mapping[str, Rows]) -> str:
    lines, told = [], []
    for variables, numbers in PUBLISHED.items():
        rows = found.get(named(variables), [])
        own = {name: [row for row in rows if row["encoding"].partition("(")[0] == name] for name in numbers}
        for name, theirs in numbers.items():
            if own[name]:
                passes = [PUBLISHED_PASSES[c].get(name, "-") if variables == 1 else "-" for c in ("pass_100", "pass_10")]
                ours = [cell(own[name], c) for c in ("in distribution", "pass_100", "pass_10")]
                lines.append([named(variables), own[name][0]["encoding"], *ours, theirs, *passes])
        told += [
            verdict(f"{named(variables)}: {a} below {b}", *(values(own[n], "in distribution") for n in (low, high)), " %")
            for a, low, b, high in (
                ("CoPE", "cope", "RoPE", "rope"),
                ("CoPE", "cope", "absolute", "learned"),
                ("RoPE", "rope", "absolute", "learned"),
            )
        ]
    heads = ["task", "encoding", "error", "pass 100", "pass 10", "theirs: error", "pass 100", "pass 10"]
    return markdown(heads, lines) + "\n\n" + claims(told)


if __name__ == "__main__":
    main("counting", __doc__, parts, table)
