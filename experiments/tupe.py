"""TUPE (arXiv:2006.15595): masked language models with positions apart from words, [CLS] tied and untied, and how fast they learn.

    python experiments/tupe.py                  # under ten minutes on two cores
    python experiments/tupe.py --scale paper    # BERT-Base on text of your own (--data); GPUs, days

The paper's table is of GLUE after pre-training, which we do not have: what is compared here is the loss of the masked tokens, and
the step at which a model has the loss that learned absolute positions (BERT) have at the end.
"""

import argparse
import dataclasses
from collections.abc import Mapping

from common import RESULTS, markdown
from trained import Part, Rows, cell, claims, main, of, values, verdict

from posjax import plots, report
from posjax.config import Config
from posjax.statistics import summary
from posjax.sweeps import grid

ABSOLUTE = "learned"
PUBLISHED = {  # GLUE dev average
    ABSOLUTE: ("BERT-A", "82.96"),
    "t5(bidirectional=True)": ("BERT-R", "83.66"),
    "tupe": ("TUPE-A", "84.47"),
    "tupe(untie_cls=False)": ("TUPE-A, tied [CLS]", "83.81"),
    "tupe(relative=True)": ("TUPE-R", "85.04"),
    "tupe(relative=True, untie_cls=False)": ("TUPE-R, tied [CLS]", "-"),
}


def recipe(options: argparse.Namespace) -> Config:
    config = Config(
        task="mlm",
        data=options.data or "stdlib",
        encodings=tuple(PUBLISHED),
        seq_length=64,
        batch_size=16,
        embed_dim=64,
        num_layers=2,
        num_heads=4,
        norm="layernorm",
        norm_position="post",
        steps=1200,
        learning_rate=2e-3,
        warmup_steps=100,
        decay="linear",
        weight_decay=0.01,
        log_every=25,
        checkpoint_every=1200,
        eval_lengths=(1,),
        eval_tokens=131_072,
    )
    if options.scale == "cpu":
        return config
    shape = dict(tokenizer="bpe", vocab_size=30_522, seq_length=512, batch_size=256, embed_dim=768, num_layers=12, num_heads=12)
    training = dict(steps=1_000_000, learning_rate=1e-4, warmup_steps=10_000, dropout_rate=0.1, compute_dtype="bfloat16")
    return dataclasses.replace(config, **shape, **training, log_every=500, checkpoint_every=5000)


def parts(options: argparse.Namespace) -> dict[str, Part]:
    return {"main": Part(grid(recipe(options), []), seeds=3)}


def steps_to(rows: Rows, losses: Mapping[int, float]) -> list[float]:
    """The share of all steps after which the training loss, a mean over four log points, is that of another run of the seed."""
    shares = []
    for row in rows:
        steps, found = row["curve"]["step"], row["curve"]["loss"]
        smooth = [sum(found[i - 3 : i + 1]) / 4 for i in range(3, len(found))]
        shares.append(next((steps[i + 3] / steps[-1] for i, loss in enumerate(smooth) if loss <= losses[row["seed"]]), 1.0))
    return shares


def table(found: Mapping[str, Rows]) -> str:
    rows = found["main"]
    (column,) = rows[0]["metrics"]["masked_loss"]
    final = {row["seed"]: sum(row["curve"]["loss"][-4:]) / 4 for row in of(rows, encoding=ABSOLUTE)}
    shares = {spec: steps_to(of(rows, encoding=spec), final) for spec in PUBLISHED}
    lines = []
    for spec, (name, glue) in PUBLISHED.items():
        mean, deviation = summary(shares[spec])[1:3]
        reached = f"{100 * mean:.0f} %" + ("" if deviation is None else f" ({100 * deviation:.0f})")
        lines.append([name, spec, cell(of(rows, encoding=spec), column, 3), reached, glue])

    def loss(spec: str) -> list[float]:
        return values(of(rows, encoding=spec), column)

    told = [
        verdict("TUPE-A below absolute", loss("tupe"), loss(ABSOLUTE), " nats", 3),
        verdict("TUPE-R below TUPE-A", loss("tupe(relative=True)"), loss("tupe"), " nats", 3),
        verdict("TUPE-R below BERT-R", loss("tupe(relative=True)"), loss("t5(bidirectional=True)"), " nats", 3),
        verdict("untied [CLS] below tied, TUPE-A", loss("tupe"), loss("tupe(untie_cls=False)"), " nats", 3),
        verdict("TUPE-A has absolute's last loss sooner (share of steps)", shares["tupe"], shares[ABSOLUTE], "", 2),
    ]
    trained = {PUBLISHED[label][0]: curve for label, curve in report.training_curves(rows).items()}
    looks = {name: spec for spec, (name, _) in PUBLISHED.items()}
    plots.save(plots.curves(trained, "step", "loss of masked tokens (nats)", looks), RESULTS / "tupe_curves.png")
    heads = ["model", "encoding", "masked loss (nats)", "steps to absolute's last loss", "theirs: GLUE"]
    return markdown(heads, lines) + "\n\n" + claims(told)


if __name__ == "__main__":
    main("tupe", __doc__, parts, table, {"--data": "stdlib, tfds:NAME, or a file or folder of text"})
