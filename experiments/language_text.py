"""Language modelling on text: the WikiText-103 table of CoPE's paper (arXiv:2405.18719).

    python experiments/language_text.py --data path/to/wikitext        # a file or a folder; under ten minutes on two cores
    python experiments/language_text.py --data path --scale paper      # GPT-2's shape, 1,024 tokens; GPUs, days

A decoder reads bytes (BPE tokens at the published scale). Bits per byte on held-out text at the training length, where the paper
has perplexity of words: 22 and 24 there are 4.46 and 4.58 bits a word, some 0.02 bits a byte apart.
"""

import argparse
import dataclasses
from collections.abc import Mapping

from common import markdown
from trained import Part, Rows, cell, claims, main, of, values, verdict

from posjax.config import Config
from posjax.sweeps import grid

PUBLISHED = {  # perplexity, validation and test
    "learned": "23.96 / 24.87",
    "rope": "22.90 / 23.81 (relative)",
    "cope(64)": "22.55 / 23.46",
    "rope + cope(64)": "22.31 / 23.23 (with relative)",
    "cope(64, gates='values')": "22.40 / 23.33",
    "cope(64, gates='keys')": "22.39 / 23.18",
    "cope_alibi": "24.16 / 25.09",
}


def recipe(options: argparse.Namespace) -> Config:
    config = Config(
        data=options.data or "",
        encodings=tuple(PUBLISHED),
        seq_length=128,
        batch_size=8,
        embed_dim=64,
        num_layers=2,
        num_heads=4,
        steps=700,
        learning_rate=4e-3,
        warmup_steps=50,
        beta2=0.95,
        log_every=100,
        checkpoint_every=700,
        eval_lengths=(1,),
        eval_tokens=65_536,
    )
    if options.scale == "cpu":
        return config
    shape = dict(tokenizer="bpe", vocab_size=50_257, seq_length=1024, batch_size=64, embed_dim=768, num_layers=12, num_heads=12)
    training = dict(steps=160_000, learning_rate=6e-4, warmup_steps=2000, compute_dtype="bfloat16", dropout_rate=0.1)
    return dataclasses.replace(config, **shape, **training, eval_tokens=262_144)


def parts(options: argparse.Namespace) -> dict[str, Part]:
    if not options.data:
        raise SystemExit("--data must be a file or a folder of text, such as WikiText's, got nothing")
    return {"main": Part(grid(recipe(options), []), seeds=3)}


def table(found: Mapping[str, Rows]) -> str:
    rows = found["main"]
    (column,) = rows[0]["metrics"]["bits_per_byte"]
    lines = [[spec, cell(of(rows, encoding=spec), column, 4), theirs] for spec, theirs in PUBLISHED.items()]
    pairs = [
        ("RoPE below absolute", "rope", "learned"),
        ("CoPE below absolute", "cope(64)", "learned"),
        ("CoPE below RoPE", "cope(64)", "rope"),
        ("CoPE + RoPE below CoPE", "rope + cope(64)", "cope(64)"),
        ("value gates below CoPE", "cope(64, gates='values')", "cope(64)"),
        ("separate keys below CoPE", "cope(64, gates='keys')", "cope(64)"),
        ("CoPE below CoPE_ALiBi", "cope(64)", "cope_alibi"),
    ]
    told = [
        verdict(claim, values(of(rows, encoding=low), column), values(of(rows, encoding=high), column), "", 4)
        for claim, low, high in pairs
    ]
    return markdown(["encoding", "bits per byte", "theirs: perplexity"], lines) + "\n\n" + claims(told)


if __name__ == "__main__":
    main("language_text", __doc__, parts, table, {"--data": "a file or folder of text, such as WikiText"})
