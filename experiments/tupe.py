"""TUPE (arXiv:2006.15595): masked language models with untied positions, with and without untied [CLS], and their learning speed.

    python experiments/tupe.py                  # under fifteen minutes on two cores
    python experiments/tupe.py --scale paper    # BERT-Base on your own text (--data); GPUs, days

The paper's table reports GLUE after pre-training, which we do not have. This experiment compares the loss of the masked tokens, and
the step at which a model reaches the final loss of learned absolute positions (BERT).
"""

import argparse
import dataclasses
from collections.abc import Mapping

from common import RESULTS, markdown
from contrasts import Claim, Rows, cell
from trained import Found, Part, lasting, main, tuned

from posjax import plots
from posjax.lab import report
from posjax.lab.config import Config
from posjax.lab.evaluation import EvalSet, test_sets
from posjax.lab.source import Source
from posjax.lab.statistics import summary

ABSOLUTE = "learned"
PUBLISHED = {  # GLUE dev average
    ABSOLUTE: ("BERT-A", "82.96"),
    "t5(bidirectional=True)": ("BERT-R", "83.66"),
    "tupe": ("TUPE-A", "84.47"),
    "tupe(untie_cls=False)": ("TUPE-A, tied [CLS]", "83.81"),
    "tupe(relative=True)": ("TUPE-R", "85.04"),
    "sinusoidal": ("sinusoidal", "-"),
    "identity": ("no positions", "-"),
}
MARGIN = 0.02  # nats
# The best of three rates, and for some encodings a fourth, higher one, chosen with the tuning seeds of learning_rates.py.
_LOWER = ("learned", "sinusoidal", "identity", "tupe", "tupe(untie_cls=False)", "tupe(relative=True)")
RATES = dict.fromkeys(_LOWER, 3e-3) | {"t5(bidirectional=True)": 1e-2}


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
        steps=800,
        learning_rate=2e-3,
        warmup_steps=100,
        decay="linear",
        weight_decay=0.01,
        log_every=20,
        checkpoint_every=800,
        eval_lengths=(1,),
        eval_tokens=131_072,
    )
    if options.scale == "cpu":
        return lasting(config)
    shape = dict(tokenizer="bpe", vocab_size=30_522, seq_length=512, batch_size=256, embed_dim=768, num_layers=12, num_heads=12)
    training = dict(steps=1_000_000, learning_rate=1e-4, warmup_steps=10_000, dropout_rate=0.1, compute_dtype="bfloat16")
    return dataclasses.replace(config, **shape, **training, log_every=500, checkpoint_every=5000)


def tests(config: Config, source: Source) -> dict[str, EvalSet]:
    """Returns rows of the validation text with masked tokens; a row is an item."""
    return {"masked words": EvalSet(list(test_sets(config, source, None)[str(config.seq_length)]))}


def parts(options: argparse.Namespace) -> dict[str, Part]:
    config = recipe(options)
    if options.scale == "paper":
        return {"main": Part(tuned(config, tuple(PUBLISHED)), tests, seeds=3)}
    column = "masked words"
    pairs = [
        ("tupe", ABSOLUTE),
        ("tupe", "sinusoidal"),
        ("tupe(relative=True)", "tupe"),
        ("tupe(relative=True)", "t5(bidirectional=True)"),
        ("sinusoidal", ABSOLUTE),
        (ABSOLUTE, "identity"),
        ("tupe", "tupe(untie_cls=False)"),
    ]
    names = {spec: name for spec, (name, _) in PUBLISHED.items()}
    claims = [Claim(a, b, column, MARGIN, name=f"{names[a]} less {names[b]}") for a, b in pairs]
    return {"main": Part(tuned(config, tuple(PUBLISHED), RATES), tests, claims=claims)}


def steps_to(rows: Rows, losses: Mapping[int, float]) -> list[float]:
    """Returns the fraction of steps after which the training loss, a mean over four log points, reaches ``losses`` of the seed."""
    shares = []
    for row in rows:
        steps, loss_curve = row["curve"]["step"], row["curve"]["loss"]
        smooth = [sum(loss_curve[i - 3 : i + 1]) / 4 for i in range(3, len(loss_curve))]
        shares.append(next((steps[i + 3] / steps[-1] for i, loss in enumerate(smooth) if loss <= losses[row["seed"]]), 1.0))
    return shares


def table(found: Mapping[str, Found]) -> str:
    one = found["main"]
    final = {row["seed"]: sum(row["curve"]["loss"][-4:]) / 4 for row in one.of(encoding=ABSOLUTE)}
    lines = []
    for spec, (name, glue) in PUBLISHED.items():
        rows = one.of(encoding=spec)
        mean, deviation = summary(steps_to(rows, final))[1:3]
        reached = f"{100 * mean:.0f} %" + ("" if deviation is None else f" ({100 * deviation:.0f})")
        lines.append([name, spec, cell(rows, one.steps(rows), "masked words", one.scale, 3), reached, glue])
    trained = {PUBLISHED[label][0]: curve for label, curve in report.training_curves(one.rows).items()}
    looks = {name: spec for spec, (name, _) in PUBLISHED.items()}
    plots.save(plots.curves(trained, "step", "loss of masked tokens (nats)", looks), RESULTS / "tupe_curves.png")
    return markdown(["model", "encoding", "masked loss (nats)", "steps to absolute's last loss", "theirs: GLUE"], lines)


if __name__ == "__main__":
    main("tupe", __doc__, parts, table, {"--data": "stdlib, tfds:NAME, or a file or folder of text"})
