"""Language modelling on text: the WikiText-103 table of CoPE's paper (arXiv:2405.18719).

    python experiments/language_text.py --data path/to/wikitext        # a file or a folder; under fifteen minutes on two cores
    python experiments/language_text.py --data path --scale paper      # GPT-2's shape, 1,024 tokens; GPUs, days

A decoder reads bytes (BPE tokens at the published scale). Reports bits per byte on held-out text at the training length; the paper
reports the perplexity of words: 22 and 24 are 4.46 and 4.58 bits per word, which differ by about 0.02 bits per byte.
"""

import argparse
import dataclasses
from collections.abc import Mapping

import language_code
from common import markdown
from contrasts import Claim, cell
from scoring import ITEMS, excerpts_in_rows
from trained import Found, Part, lasting, main, tuned

from posjax.lab.config import Config
from posjax.lab.evaluation import EvalSet
from posjax.lab.source import Source

PUBLISHED = {  # perplexity, validation and test
    "learned": "23.96 / 24.87",
    "rope": "22.90 / 23.81 (relative)",
    "cope(64)": "22.55 / 23.46",
    "rope + cope(64)": "22.31 / 23.23 (with relative)",
    "cope(64, gates='values')": "22.40 / 23.33",
    "cope(64, gates='keys')": "22.39 / 23.18",
    "cope_alibi": "24.16 / 25.09",
}
MAIN = ("learned", "rope", "cope(64)", "rope + cope(64)")
COLUMN, SHORT, MARGIN = "128 tokens", 300, 0.02  # bits per byte
# The rates of language_code.py, whose models have the same size.
RATES = language_code.RATES


def recipe(options: argparse.Namespace) -> Config:
    config = Config(
        data=options.data or "",
        encodings=tuple(PUBLISHED),
        seq_length=128,
        batch_size=8,
        embed_dim=64,
        num_layers=2,
        num_heads=4,
        steps=900,
        learning_rate=4e-3,
        warmup_steps=50,
        beta2=0.95,
        log_every=20,
        checkpoint_every=300,
        eval_lengths=(1, 2),  # excerpts are two rows long
        eval_tokens=ITEMS * (2 * 128 - 1),
    )
    if options.scale == "cpu":
        return lasting(config)
    shape = dict(tokenizer="bpe", vocab_size=50_257, seq_length=1024, batch_size=64, embed_dim=768, num_layers=12, num_heads=12)
    training = dict(steps=160_000, learning_rate=6e-4, warmup_steps=2000, compute_dtype="bfloat16", dropout_rate=0.1)
    return dataclasses.replace(config, **shape, **training, eval_tokens=ITEMS * (2 * 1024 - 1))


def tests(config: Config, source: Source) -> dict[str, EvalSet]:
    return {COLUMN: excerpts_in_rows(config, source)}


def parts(options: argparse.Namespace) -> dict[str, Part]:
    if not options.data:
        raise SystemExit("--data must be a file or a folder of text, such as WikiText's, got nothing")
    config = recipe(options)
    others = tuple(spec for spec in PUBLISHED if spec not in MAIN)
    if options.scale == "paper":
        return {"main": Part(tuned(config, MAIN), tests, seeds=3), "variants": Part(tuned(config, others), tests, seeds=3)}
    claims = [Claim(spec, "rope", COLUMN, MARGIN, steps=steps) for steps in (None, SHORT) for spec in MAIN if spec != "rope"]
    claims.append(Claim("rope + cope(64)", "cope(64)", COLUMN, MARGIN))
    shorter = dataclasses.replace(config, steps=SHORT, checkpoint_every=SHORT)
    rates = RATES | dict.fromkeys(others, RATES.get("cope(64)", config.learning_rate))
    own = [Claim(spec, "cope(64)", COLUMN, MARGIN, steps=SHORT, primary=False) for spec in others]
    return {
        "main": Part(tuned(config, MAIN, RATES), tests, claims=claims),
        "variants": Part(tuned(shorter, ("cope(64)", *others), rates), tests, seeds=4, claims=own),
    }


def table(found: Mapping[str, Found]) -> str:
    lines = []
    for one in found.values():
        for spec in dict.fromkeys(row["encoding"] for row in one.rows):
            rows = one.of(encoding=spec)
            for step in sorted(step for step in rows[0]["items"] if step in (SHORT, one.steps(rows))):
                lines.append([spec, f"{step:,}", cell(rows, step, COLUMN, one.scale, 3), PUBLISHED[spec]])
    return markdown(["encoding", "steps", "bits per byte", "theirs: perplexity"], lines)


if __name__ == "__main__":
    main("language_text", __doc__, parts, table, {"--data": "a file or folder of text, such as WikiText"})
