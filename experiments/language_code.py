"""Language modelling on code: a table of CoPE's paper (arXiv:2405.18719), with ablations of CoPE's gates and last position.

    python experiments/language_code.py                  # source code of Python's standard library; under 15 minutes on two cores
    python experiments/language_code.py --scale paper    # 4 layers, 8 heads, dimension 256, 4,096 tokens; one GPU

Reports bits per byte on held-out files at the training length; the paper reports the perplexity of tokens of another corpus. The
part "gates" varies the kind of gates and the layers with CoPE; "clamp" varies the last position and the bias of the gates, all in
one compiled program.
"""

import argparse
import dataclasses
from collections.abc import Mapping

from common import markdown
from contrasts import Claim, cell
from scoring import ITEMS, excerpts_in_rows
from trained import Found, Part, lasting, main, tuned

from posjax.lab.config import Config
from posjax.lab.evaluation import EvalSet
from posjax.lab.source import Source

PUBLISHED = {"learned": "4.7", "rope": "4.1", "cope(64)": "3.9", "rope + cope(64)": "4.0"}
GATES = {  # WikiText-103, perplexity on its validation split; CoPE is 22.55
    "cope(64, gates='content')": "-",
    "cope(64, gates='keys')": "22.39",
    "cope(64, gates='values')": "22.40",
    "cope(64, shared=False)": "22.56",
    "cope(64, scaled=True)": "-",
    "cope(64) / identity": "-",
}
# Varied one at a time. The published values of P = clamp + 1 are 16 (22.45), 64 and 1,024 (22.46).
CLAMPS = {"clamp": (3, 7, 15, 31), "gate_bias": (-4.0, -2.0, 2.0)}
COLUMN, SHORT, MARGIN = "64 tokens", 260, 0.02  # bits per byte
# The best of five, chosen with the tuning seeds of learning_rates.py.
RATES = {"learned": 8e-3, "rope": 8e-3, "cope(64)": 4e-3, "rope + cope(64)": 4e-3, "alibi": 4e-3}


def recipe(options: argparse.Namespace) -> Config:
    config = Config(
        data=options.data or "stdlib",
        encodings=tuple(PUBLISHED),
        seq_length=64,
        batch_size=8,
        embed_dim=64,
        num_layers=2,
        num_heads=4,
        steps=1000,
        learning_rate=4e-3,
        warmup_steps=50,
        beta2=0.95,
        log_every=20,
        checkpoint_every=400,
        eval_lengths=(1, 4),  # excerpts are four rows long
        eval_tokens=ITEMS * (4 * 64 - 1),
    )
    if options.scale == "cpu":
        return lasting(config)
    shape = dict(tokenizer="bpe", vocab_size=16_384, seq_length=4096, batch_size=16, embed_dim=256, num_layers=4, num_heads=8)
    return dataclasses.replace(config, **shape, steps=20_000, learning_rate=5e-4, warmup_steps=500, compute_dtype="bfloat16")


def tests(config: Config, source: Source) -> dict[str, EvalSet]:
    return {COLUMN: excerpts_in_rows(config, source)}


def parts(options: argparse.Namespace) -> dict[str, Part]:
    config = recipe(options)
    clamps = tuple(f"cope(64, {name}={value})" for name, choices in CLAMPS.items() for value in choices)
    if options.scale == "paper":
        return {
            "main": Part(tuned(config, tuple(PUBLISHED)), tests, seeds=3),
            "gates": Part(tuned(config, tuple(GATES)), tests, seeds=3),
            "clamp": Part(tuned(config, clamps), tests, seeds=3),
        }
    claims = [Claim(spec, "rope", COLUMN, MARGIN) for spec in PUBLISHED if spec != "rope"]
    claims += [Claim(spec, "rope", COLUMN, MARGIN, steps=SHORT) for spec in PUBLISHED if spec != "rope"]
    claims.append(Claim("rope + cope(64)", "cope(64)", COLUMN, MARGIN))

    def compared_with_cope(specs: tuple[str, ...]) -> Part:
        shorter = dataclasses.replace(config, steps=240, checkpoint_every=240)
        own = [Claim(spec, "cope(64)", COLUMN, MARGIN, steps=240, primary=False) for spec in specs]
        rates = dict.fromkeys(specs, RATES.get("cope(64)", config.learning_rate))
        return Part(tuned(shorter, ("cope(64)", *specs), RATES | rates), tests, seeds=4, claims=own)

    return {
        "main": Part(tuned(config, tuple(PUBLISHED), RATES), tests, claims=claims),
        "gates": compared_with_cope(tuple(GATES)),
        "clamp": compared_with_cope(clamps),
    }


def table(found: Mapping[str, Found]) -> str:
    lines = []
    for part, one in found.items():
        for spec in dict.fromkeys(row["encoding"] for row in one.rows):
            rows = one.of(encoding=spec)
            for step in sorted(step for step in rows[0]["items"] if step in (SHORT, one.steps(rows))):
                theirs = (PUBLISHED.get(spec, "-"), "-") if part == "main" else ("-", GATES.get(spec, "-"))
                lines.append([spec, f"{step:,}", cell(rows, step, COLUMN, one.scale, 3), *theirs])
    return markdown(["encoding", "steps", "bits per byte", "theirs: perplexity, code", "theirs: perplexity, WikiText"], lines)


if __name__ == "__main__":
    main("language_code", __doc__, parts, table, {"--data": "stdlib, tfds:NAME, or a file or folder of text"})
