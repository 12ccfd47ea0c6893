"""Language modelling on code: a table of CoPE's paper (arXiv:2405.18719), with what its gates and its last position are worth.

    python experiments/language_code.py                  # source code of Python's standard library; under ten minutes on two cores
    python experiments/language_code.py --scale paper    # 4 layers, 8 heads, dimension 256, 4,096 tokens; one GPU

Bits per byte on held-out files at the training length; the paper has perplexity of tokens of another corpus. The part "gates" has
the kinds of gates and where CoPE acts, "clamp" the last position and the gates' bias, all in one program.
"""

import argparse
import dataclasses
from collections.abc import Mapping

from common import markdown
from trained import Part, Rows, cell, claims, main, of, values, verdict

from posjax.config import Config
from posjax.sweeps import grid

PUBLISHED = {"learned": "4.7", "rope": "4.1", "cope(64)": "3.9", "rope + cope(64)": "4.0"}
GATES = {  # WikiText-103, perplexity on its validation split; CoPE is 22.55
    "cope(64, gates='content')": "-",
    "cope(64, gates='keys')": "22.39",
    "cope(64, gates='values')": "22.40",
    "cope(64, shared=False)": "22.56",
    "cope(64, scaled=True)": "-",
    "cope(64) / identity": "-",
}
# One at a time. Published P are 16 (22.45), 64 and 1,024 (22.46): clamp is P - 1.
CLAMPS = {"clamp": (3, 7, 15, 31), "gate_bias": (-4.0, -2.0, 2.0)}


def recipe(options: argparse.Namespace) -> Config:
    config = Config(
        data=options.data or "stdlib",
        encodings=tuple(PUBLISHED),
        seq_length=64,
        batch_size=8,
        embed_dim=64,
        num_layers=2,
        num_heads=4,
        steps=440,
        learning_rate=4e-3,
        warmup_steps=50,
        beta2=0.95,
        log_every=100,
        checkpoint_every=440,
        eval_lengths=(1,),
        eval_tokens=131_072,
    )
    if options.scale == "cpu":
        return config
    shape = dict(tokenizer="bpe", vocab_size=16_384, seq_length=4096, batch_size=16, embed_dim=256, num_layers=4, num_heads=8)
    return dataclasses.replace(config, **shape, steps=20_000, learning_rate=5e-4, warmup_steps=500, compute_dtype="bfloat16")


def parts(options: argparse.Namespace) -> dict[str, Part]:
    config = recipe(options)
    clamps = [f"cope(64, {name}={value})" for name, choices in CLAMPS.items() for value in choices]
    return {
        "main": Part(grid(config, []), seeds=3),
        "gates": Part(grid(config, [("encoding", tuple(GATES))]), seeds=3),
        "clamp": Part(grid(config, [("encoding", tuple(clamps))]), seeds=3),
    }


def table(found: Mapping[str, Rows]) -> str:
    rows = [row for part in found.values() for row in part]
    (column,) = rows[0]["metrics"]["bits_per_byte"]
    specs = list(dict.fromkeys(row["encoding"] for row in rows))
    lines = [[s, cell(of(rows, encoding=s), column, 4), PUBLISHED.get(s, "-"), GATES.get(s, "-")] for s in specs]

    def of_spec(spec: str) -> list[float]:
        return values(of(rows, encoding=spec), column)

    pairs = [
        ("RoPE below absolute", "rope", "learned"),
        ("CoPE below RoPE", "cope(64)", "rope"),
        ("CoPE below CoPE + RoPE", "cope(64)", "rope + cope(64)"),
        *((f"CoPE below {spec}", "cope(64)", spec) for spec in specs if spec.startswith("cope(64") and spec != "cope(64)"),
    ]
    told = [verdict(claim, of_spec(low), of_spec(high), "", 4) for claim, low, high in pairs]
    heads = ["encoding", "bits per byte", "theirs: perplexity, code", "theirs: perplexity, WikiText"]
    return markdown(heads, lines) + "\n\n" + claims(told)


if __name__ == "__main__":
    main("language_code", __doc__, parts, table, {"--data": "stdlib, tfds:NAME, or a file or folder of text"})
