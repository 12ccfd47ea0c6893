"""Longer than trained: the tables of ALiBi (arXiv:2108.12409), CABLE (Table 1) and DAPE (Table 6), where CoPE collapses.

    python experiments/extrapolation.py                  # trained on 64 bytes, evaluated to 2,048; under ten minutes on two cores
    python experiments/extrapolation.py --scale paper    # trained on 1,024 BPE tokens; one GPU

A decoder reads the source code of Python's standard library, or --data, and is evaluated on longer text than it was trained on.
Bits per byte where the papers give perplexity of words: what compares is which curves fall, stay and rise. KERPLE, FIRE, CABLE and
DAPE themselves are not among our encodings; their rows are left out.
"""

import argparse
import dataclasses
from collections.abc import Mapping

from common import markdown
from trained import Part, Rows, cell, claims, main, of, values, verdict

from posjax.config import Config
from posjax.sweeps import grid

ENCODINGS = ("identity", "sinusoidal", "rope", "t5", "alibi", "cope(64)", "rope + cope(64)")
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
        encodings=ENCODINGS,
        seq_length=64,
        batch_size=8,
        embed_dim=64,
        num_layers=2,
        num_heads=4,
        steps=1200,
        learning_rate=4e-3,
        warmup_steps=50,
        beta2=0.95,
        log_every=100,
        checkpoint_every=1200,
        eval_lengths=(1, 2, 4, 8, 16, 32),
        eval_tokens=16_384,
    )
    if options.scale == "cpu":
        return config
    published = dict(tokenizer="bpe", vocab_size=16_384, seq_length=1024, batch_size=32, embed_dim=512, num_layers=8, num_heads=8)
    training = dict(steps=9000, learning_rate=6e-4, warmup_steps=500, compute_dtype="bfloat16", checkpoint_every=1000)
    return dataclasses.replace(config, **published, **training, eval_lengths=(1, 2, 3, 15), eval_tokens=262_144)


def parts(options: argparse.Namespace) -> dict[str, Part]:
    return {"main": Part(grid(recipe(options), []), seeds=3)}


def table(found: Mapping[str, Rows]) -> str:
    rows = found["main"]
    (scores,) = (part for part in rows[0]["metrics"].values() if isinstance(part, dict))
    columns = list(scores)
    trained = int(columns[0])
    times = [f"{int(column) // trained}x" for column in columns]
    lines = []
    for spec in ENCODINGS:
        own = of(rows, encoding=spec)
        theirs = [" / ".join(numbers[spec]) if spec in numbers else "-" for numbers in (ALIBI, CABLE)]
        theirs.append(" / ".join(DAPE) if spec == "cope(64)" else "-")
        lines.append([spec, *(cell(own, column, 3) for column in columns), *theirs])
    heads = ["encoding", *times, "ALiBi: 1, 2, 3, 16x", "CABLE: 1, 2, 15x", "DAPE: 1, 2, 4 ... 64x"]

    def at(spec: str, column: str) -> list[float]:
        return values(of(rows, encoding=spec), column)

    first, last = columns[0], columns[-1]
    told = [
        verdict(f"ALiBi at {times[-1]} not above 1x", at("alibi", last), at("alibi", first), "", 3),
        verdict(f"RoPE rises: 1x below {times[-1]}", at("rope", first), at("rope", last), "", 3),
        verdict(f"sinusoidal rises: 1x below {times[-1]}", at("sinusoidal", first), at("sinusoidal", last), "", 3),
        *(
            verdict(f"CoPE: {name} below 1x", at("cope(64)", column), at("cope(64)", first), "", 3)
            for name, column in zip(times[1:], columns[1:], strict=True)
        ),
        verdict(f"ALiBi below RoPE at {times[-1]}", at("alibi", last), at("rope", last), "", 3),
        verdict(f"ALiBi below CoPE at {times[-1]}", at("alibi", last), at("cope(64)", last), "", 3),
        verdict("CoPE below ALiBi at 1x", at("cope(64)", first), at("alibi", first), "", 3),
    ]
    return markdown(heads, lines) + "\n\n" + claims(told)


if __name__ == "__main__":
    main("extrapolation", __doc__, parts, table, {"--data": "stdlib, tfds:NAME, or a file or folder of text"})
