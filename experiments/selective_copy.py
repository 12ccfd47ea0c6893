"""Selective copying: the table of CoPE's paper (arXiv:2405.18719).

    python experiments/selective_copy.py                  # 16 letters among 16 blanks; under fifteen minutes on two cores
    python experiments/selective_copy.py --scale paper    # 256 among 256, 100,000 steps; one GPU

The model reads letters with blanks among them and copies the letters. Reports the error in percent of letters and of strings, on
the training distribution, with half as many blanks (dense) and with twice as many (sparse). The paper's numbers reach 100 %, above
the error of random letters, so they must count strings. Strings of the sparse set are longer than training strings, so learned
positions use rows of their table there that were never trained.
"""

import argparse
import dataclasses
from collections.abc import Mapping

from common import markdown
from contrasts import Claim, cell
from scoring import strings
from trained import Found, Part, lasting, main, tuned

from posjax.lab.config import Config
from posjax.lab.evaluation import EvalSet
from posjax.lab.source import Source

PUBLISHED = {
    "learned": ("16.9 (3.7)", "25.6 (3.8)", "85.2 (8.4)"),
    "rope": ("40.1 (3.5)", "100", "100"),
    "cope": ("0", "0", "0.004 (0.006)"),
}
SETS = ("in distribution", "dense", "sparse")
WHOLE = tuple(f"{name}, strings" for name in SETS)
SHORT, MARGIN = 500, 1.0
# The best of three in distribution (3e-3 if several have no errors), chosen with the tuning seeds of learning_rates.py.
RATES = {"learned": 1e-2, "rope": 3e-3, "cope(64)": 3e-3}


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
    )
    if scale == "paper":
        return config
    small = dict(seq_length=32, batch_size=32, embed_dim=32, steps=1500, learning_rate=5e-3, warmup_steps=100)
    return lasting(config, **small | dict(log_every=20, checkpoint_every=500))


def encodings(config: Config) -> tuple[str, str, str]:
    return "learned", "rope", "cope(64)" if config.seq_length == 32 else "cope(256)"


def tests(config: Config, source: Source) -> dict[str, EvalSet]:
    drawn = zip(SETS, (source.task, *source.task.variants.values()), strict=True)
    drawn = {name: strings(config, source, task, 1024) for name, task in drawn}
    return drawn | {f"{name}, strings": dataclasses.replace(one, by_row=True) for name, one in drawn.items()}


def parts(options: argparse.Namespace) -> dict[str, Part]:
    config = recipe(options.scale)
    if options.scale == "paper":
        return {"main": Part(tuned(config, encodings(config)), tests, seeds=3)}
    absolute, rope, cope = encodings(config)
    claims = [Claim(cope, other, column, MARGIN) for other in (rope, absolute) for column in SETS]
    claims += [Claim(absolute, rope, column, MARGIN, steps=steps) for steps in (SHORT, None) for column in SETS]
    return {"main": Part(tuned(config, encodings(config), RATES), tests, seeds=8, claims=claims)}


def table(found: Mapping[str, Found]) -> str:
    one, lines = found["main"], []
    for spec in dict.fromkeys(row["encoding"] for row in one.rows):
        rows = one.of(encoding=spec)
        theirs = PUBLISHED[spec.partition("(")[0]]
        for columns, published in ((SETS, ("", "", "")), (WHOLE, theirs)):
            cells = [cell(rows, one.steps(rows), c, one.scale, 2, solved=True) for c in columns]
            lines.append([spec, "strings" if columns == WHOLE else "letters", *cells, *published])
    lines.append(["guessing", "letters", *[f"{100 * 13 / 14:.1f}"] * 3, "", "", ""])
    heads = ["encoding", "error of", *SETS, *(f"theirs: {SETS[0]}", *SETS[1:])]
    return markdown(heads, lines)


if __name__ == "__main__":
    main("selective_copy", __doc__, parts, table)
