"""Length extrapolation: the tables of ALiBi (arXiv:2108.12409), CABLE (Table 1) and DAPE (Table 6), and windows as a control.

    python experiments/extrapolation.py                  # trained on 64 bytes, evaluated to 512; under 15 minutes on two cores
    python experiments/extrapolation.py --scale paper    # trained on 1,024 BPE tokens; one GPU

A decoder reads the source code of Python's standard library, or --data. The same 63 bytes of every excerpt are scored with more and
more text before them, at 1 to 8 times the training length; and with attention limited to a window of 1, 2 and 4 times that length,
for which the numbers hold for text of any length. The window is a control: an encoding whose loss is flat because it attends no
further than it was trained has no advantage over one that is limited to that distance.

Our unit is bits per byte, whereas the papers report the perplexity of words over full rows: only the direction of the curves is
comparable. KERPLE, FIRE, CABLE and DAPE themselves are not among our encodings; their rows are left out.
"""

import argparse
import dataclasses
from collections.abc import Mapping

import language_code
from common import markdown
from contrasts import Claim, cell
from scoring import ITEMS, ends_of_excerpts
from trained import Found, Part, lasting, main, tuned

from posjax.lab.config import Config
from posjax.lab.evaluation import EvalSet
from posjax.lab.source import Source

MAIN = ("rope", "alibi", "cope(64)", "rope + cope(64)")
OTHERS = ("identity", "sinusoidal", "t5")
TIMES, WINDOWS, MARGIN = (1, 2, 4, 8), (1, 2, 4), 0.02  # bits per byte
ALIBI = {  # WikiText-103, trained at 1,024; perplexity at 1,024, 2,024, 3,024 and 16,024
    "sinusoidal": ("19.34", "51.09", "96.46", "453"),
    "rope": ("19.33", "31.17", "35.67", "107"),
    "t5": ("18.80", "18.34", "18.62", "-"),
    "alibi": ("18.66", "18.05", "17.92", "17.98"),
}
CABLE = {  # WikiText-103, 44 M parameters, trained at 1,024; perplexity at 1,024, 2,048 and 15,360
    "sinusoidal": ("23.73", "172", "2017"),
    "rope": ("22.26", "41.40", "375.6"),
    "t5": ("23.60", "27.64", "411"),
    "alibi": ("22.74", "22.05", "21.30"),
}
DAPE = ("31.61", "28.41", "25.79", "27.96", "33.80", "54.08", "90.66")  # CoPE, Books3, trained at 128; at 1, 2, 4 ... 64 times


def recipe(options: argparse.Namespace) -> Config:
    config = Config(
        data=options.data or "stdlib",
        encodings=(*MAIN, *OTHERS),
        seq_length=64,
        batch_size=8,
        embed_dim=64,
        num_layers=2,
        num_heads=4,
        steps=800,
        learning_rate=4e-3,
        warmup_steps=50,
        beta2=0.95,
        log_every=20,
        checkpoint_every=400,
        eval_lengths=TIMES,
        eval_tokens=ITEMS * (max(TIMES) * 64 - 1),
    )
    if options.scale == "cpu":
        return lasting(config)
    published = dict(tokenizer="bpe", vocab_size=16_384, seq_length=1024, batch_size=32, embed_dim=512, num_layers=8, num_heads=8)
    training = dict(steps=9000, learning_rate=6e-4, warmup_steps=500, compute_dtype="bfloat16", checkpoint_every=1000)
    return dataclasses.replace(config, **published, **training, eval_tokens=ITEMS * (max(TIMES) * 1024 - 1))


def at(times: int) -> str:
    """Returns the column name of rows that are ``times`` as long as training rows."""
    return f"{times}x"


def windowed(times: int) -> str:
    """Returns the column name of text of any length under a window of ``times`` the training length."""
    return f"any length, window {times}x"


def tests(config: Config, source: Source) -> dict[str, EvalSet]:
    length = config.seq_length
    longest = max(TIMES) * length
    plain = {at(times): ends_of_excerpts(config, source, times * length) for times in TIMES}
    return plain | {windowed(times): ends_of_excerpts(config, source, longest, times * length) for times in WINDOWS}


def parts(options: argparse.Namespace) -> dict[str, Part]:
    config = recipe(options)
    if options.scale == "paper":
        return {"main": Part(tuned(config, (*MAIN, *OTHERS)), tests, seeds=3)}
    both, far, flat = "rope + cope(64)", at(max(TIMES)), windowed(1)
    claims = [
        *(Claim(spec, "rope", at(1), MARGIN) for spec in MAIN if spec != "rope"),
        *(Claim(spec, "rope", flat, MARGIN) for spec in MAIN if spec != "rope"),
        Claim(both, "alibi", flat, MARGIN),
        *(
            Claim(spec, "alibi", flat, MARGIN, other_column=far, name=f"{spec}, window, less alibi at {far} without")
            for spec in ("rope", both)
        ),
        *(
            Claim(spec, spec, far, MARGIN, steps=config.steps, other_column=flat, name=f"{spec}: {far} less window of 1x")
            for spec in MAIN
        ),
        Claim(both, both, at(4), MARGIN, steps=config.steps, other_column=flat, name=f"{both}: 4x less window of 1x"),
        Claim(both, both, at(2), MARGIN, steps=config.steps, other_column=at(1), name=f"{both}: 2x less 1x"),
    ]
    rates = language_code.RATES | dict.fromkeys(OTHERS, language_code.RATES.get("rope", config.learning_rate))
    return {
        "main": Part(tuned(config, MAIN, rates), tests, claims=claims),
        "others": Part(tuned(config, OTHERS, rates), tests, seeds=2),
    }


def table(found: Mapping[str, Found]) -> str:
    columns = (*map(at, TIMES), *map(windowed, WINDOWS))
    lines = []
    for one in found.values():
        for spec in dict.fromkeys(row["encoding"] for row in one.rows):
            rows = one.of(encoding=spec)
            theirs = [" / ".join(numbers[spec]) if spec in numbers else "-" for numbers in (ALIBI, CABLE)]
            theirs.append(" / ".join(DAPE) if spec == "cope(64)" else "-")
            lines.append([spec, *(cell(rows, one.steps(rows), c, one.scale, 3) for c in columns), *theirs])
    heads = ["encoding", *columns, "ALiBi: 1, 2, 3, 16x", "CABLE: 1, 2, 15x", "DAPE: 1, 2, 4 ... 64x"]
    return markdown(heads, lines)


if __name__ == "__main__":
    main("extrapolation", __doc__, parts, table, {"--data": "stdlib, tfds:NAME, or a file or folder of text"})
