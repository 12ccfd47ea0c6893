"""RoFormer's linear attention (arXiv:2104.09864, section 4.4): rotation helps it, as it helps softmax attention.

    python experiments/roformer_linear.py                  # under ten minutes on two cores
    python experiments/roformer_linear.py --scale paper    # 12 layers, dimension 768, enwik8 of your own (--data), one GPU, hours

The paper trains a Performer of 12 layers with and without RoPE on enwik8 and shows that the loss falls faster and ends lower with
it; it gives a figure and no numbers. Here: bits per byte of a decoder with RoFormer's linear attention (elu + 1) and with softmax.
"""

import argparse
import dataclasses
from collections.abc import Mapping

from common import RESULTS, markdown
from trained import Part, Rows, cell, claims, main, of, values, verdict

from posjax import plots, report
from posjax.config import Config
from posjax.sweeps import grid


def recipe(options: argparse.Namespace) -> Config:
    config = Config(
        data=options.data or "stdlib",
        encodings=("identity", "rope"),
        seq_length=64,
        batch_size=8,
        embed_dim=64,
        num_layers=2,
        num_heads=4,
        steps=1500,
        learning_rate=4e-3,
        warmup_steps=50,
        beta2=0.95,
        log_every=50,
        checkpoint_every=1500,
        eval_lengths=(1, 2, 4),
        eval_tokens=131_072,
    )
    if options.scale == "cpu":
        return config
    shape = dict(seq_length=1024, batch_size=128, embed_dim=768, num_layers=12, num_heads=12)
    return dataclasses.replace(config, **shape, steps=20_000, learning_rate=1e-4, warmup_steps=1000, compute_dtype="bfloat16")


def parts(options: argparse.Namespace) -> dict[str, Part]:
    return {"main": Part(grid(recipe(options), [("attention", ("linear", "softmax"))]), seeds=3)}


def table(found: Mapping[str, Rows]) -> str:
    rows = found["main"]
    columns = list(rows[0]["metrics"]["bits_per_byte"])
    settings = {row["label"]: (row["encoding"], row["settings"]["attention"]) for row in rows}
    own = {both: of(rows, encoding=both[0], attention=both[1]) for both in settings.values()}
    lines = [[attention, spec, *(cell(own[spec, attention], c, 3) for c in columns)] for spec, attention in own]
    told = [
        verdict(f"{kind}, {column} tokens: RoPE below none", *(values(own[s, kind], column) for s in ("rope", "identity")), "", 3)
        for kind in ("linear", "softmax")
        for column in columns
    ]
    looks = {label: spec for label, (spec, _) in settings.items()}
    figure = plots.curves(report.training_curves(rows), "step", "training loss (nats)", looks)
    plots.save(figure, RESULTS / "roformer_linear_curves.png")
    return markdown(["attention", "encoding", *(f"{c} tokens" for c in columns)], lines) + "\n\n" + claims(told)


if __name__ == "__main__":
    main("roformer_linear", __doc__, parts, table, {"--data": "stdlib, tfds:NAME, or a file or folder of text"})
