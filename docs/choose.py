"""Fills the tables of docs/choose.md from the results of the experiments: python docs/choose.py

The text between <!-- results NAME --> and <!-- end --> is generated: contrasts from the claims of experiments/results, with the
verdicts of experiments/README.md, and times. The text around the tables is written by hand; a test compares both with the results.
"""

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE.parent / "experiments" / "results"
sys.path.append(str(HERE.parent / "experiments"))

from common import markdown  # noqa: E402
from contrasts import adjusted, word  # noqa: E402
from readme import BLOCK, DIGITS  # noqa: E402

WINDOW = "any length, window 1x"
CONTRASTS = {  # by table: (words, experiment, claim, test set); of several numbers of steps, the largest
    "short": [
        ("learned less RoPE, code", "language_code_cpu", "learned less rope", "64 tokens"),
        ("CoPE less RoPE, code", "language_code_cpu", "cope(64) less rope", "64 tokens"),
        ("RoPE + CoPE less RoPE, code", "language_code_cpu", "rope + cope(64) less rope", "64 tokens"),
        ("learned less RoPE, text", "language_text_cpu", "learned less rope", "128 tokens"),
        ("CoPE less RoPE, text", "language_text_cpu", "cope(64) less rope", "128 tokens"),
        ("RoPE + CoPE less RoPE, text", "language_text_cpu", "rope + cope(64) less rope", "128 tokens"),
        ("ALiBi less RoPE, code, more steps", "more_steps_cpu", "alibi less rope", "1x"),
        ("RoPE + CoPE less RoPE, code, more steps", "more_steps_cpu", "rope + cope(64) less rope", "1x"),
    ],
    "long": [
        ("RoPE: 8 times the length, without a window less with", "extrapolation_cpu", "rope: 8x less window of 1x", "8x"),
        ("ALiBi: the same", "extrapolation_cpu", "alibi: 8x less window of 1x", "8x"),
        ("RoPE with a window less ALiBi without", "extrapolation_cpu", "rope, window, less alibi at 8x without", WINDOW),
        ("ALiBi less RoPE, both with a window", "extrapolation_cpu", "alibi less rope", WINDOW),
        ("the same, more steps", "more_steps_cpu", "alibi less rope", WINDOW),
        ("RoPE + CoPE: twice the length less the length", "extrapolation_cpu", "rope + cope(64): 2x less 1x", "2x"),
        ("RoPE + CoPE: 4 times the length, without less with", "extrapolation_cpu", "rope + cope(64): 4x less window of 1x", "4x"),
    ],
    "encoder": [
        ("TUPE-R less TUPE-A", "tupe_cpu", "TUPE-R less TUPE-A", "masked words"),
        ("TUPE-R less T5", "tupe_cpu", "TUPE-R less BERT-R", "masked words"),
        ("TUPE-A less sinusoidal", "tupe_cpu", "TUPE-A less sinusoidal", "masked words"),
        ("TUPE-A less learned", "tupe_cpu", "TUPE-A less BERT-A", "masked words"),
        ("learned less no positions", "tupe_cpu", "BERT-A less no positions", "masked words"),
        ("TUPE-A less the same with [CLS] tied", "tupe_cpu", "TUPE-A less TUPE-A, tied [CLS]", "masked words"),
    ],
    "tasks": [
        ("flip-flop: CoPE less RoPE", "flip_flop_cpu", "cope(64) less rope", "in distribution"),
        ("4 times the length", "flip_flop_cpu", "cope(64) less rope", "4x, in distribution"),
        ("4 times the length, dense", "flip_flop_cpu", "cope(64) less rope", "4x, dense"),
        ("4 times the length, sparse", "flip_flop_cpu", "cope(64) less rope", "4x, sparse"),
        (
            "4 times the length: CoPE_ALiBi less RoPE",
            "flip_flop_variants_cpu",
            "cope_alibi(slope=1.0) less rope",
            "4x, in distribution",
        ),
        ("copying: CoPE less RoPE", "selective_copy_cpu", "cope(64) less rope", "in distribution"),
        ("half the blanks", "selective_copy_cpu", "cope(64) less rope", "dense"),
        ("twice the blanks", "selective_copy_cpu", "cope(64) less rope", "sparse"),
        ("counting, 1 variable: CoPE less RoPE", "counting_cpu", "cope(64) less rope", "in distribution"),
    ],
    "linear": [
        ("RoPE less no positions", "roformer_linear_cpu", "rope, attention=linear less identity, attention=linear", "64 tokens"),
        (
            "the same, 4 times the length",
            "roformer_linear_cpu",
            "rope, attention=linear less identity, attention=linear",
            "256 tokens",
        ),
    ],
}
STEPS = ("language_code_cpu", "language_text_cpu", "flip_flop_cpu", "flip_flop_variants_cpu", "counting_cpu")
LABELS = ("learned", "alibi", "cope_alibi(slope=1.0)", "cope(64)", "rope + cope(64)")


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def contrasts() -> dict[str, str]:
    """Returns the tables of contrasts, with p values adjusted over all claims of experiments/README.md, as there."""
    names = [name for _, name, _ in BLOCK.findall((HERE.parent / "experiments" / "README.md").read_text())]
    found = {name: load(name) for name in names if (RESULTS / f"{name}.json").exists()}
    claims = adjusted({name: result["claims"] for name, result in found.items() if "claims" in result})

    def row(words: str, experiment: str, title: str, column: str) -> list[str]:
        matching = [claim for claim in claims[experiment] if (claim["claim"], claim["column"]) == (title, column)]
        part = matching[0]["part"]  # of several parts, such as numbers of variables, the first
        claim = max((c for c in matching if c["part"] == part), key=lambda claim: claim["equal_steps"]["steps"])
        digits = DIGITS.get(found[experiment]["parts"][part]["measure"], 3)
        differences = [difference(claim[kind], digits) for kind in ("equal_steps", "equal_time")]
        return [words, *differences, word(claim).replace("*", "")]

    head = ["difference", "equal steps", "equal time", "verdict"]
    return {name: markdown(head, [row(*each) for each in rows]).replace("---:", "---") for name, rows in CONTRASTS.items()}


def difference(one: dict[str, Any] | None, digits: int) -> str:
    """Formats a difference and its interval in a way that keeps each of them on one line."""
    if one is None:
        return "-"
    mean, low, high = (f"{number:+.{digits}f}".replace("-", "\u2212") for number in (one["mean"], *one["interval"]))
    return f"{mean} [{low},\u00a0{high}]"


def step_times() -> str:
    """Returns the time of a training step relative to RoPE's."""
    columns = []
    for name in STEPS:
        rows = [row for row in load(f"{name}_steps")["rows"] if row["part"] in ("main", "1 variable")]
        times = {row["label"]: row["seconds_a_step"] for row in rows}
        relative = (f"{times[label] / times['rope']:.2f}" if label in times else "-" for label in LABELS)
        columns.append([f"{1e3 * times['rope']:.1f} ms", *relative])
    lines = zip(("`rope`", *(f"`{label}`" for label in LABELS)), *columns, strict=True)
    return markdown(["encoding", *(name.removesuffix("_cpu").replace("_", " ") for name in STEPS)], list(lines))


def attention_times() -> str:
    """Returns the time of attention over tiles relative to attention without positions, at two lengths."""
    tables = [
        {
            (row["encoding"], row["gates"]): row["ratio_to_identity"]
            for row in load(name)["rows"]
            if row["implementation"] == "xla_chunked"
        }
        for name in ("attention_2048_cpu", "attention_8192_cpu")
    ]
    gates = {None: "-", "half": "near 1/2", "sparse": "near 0.02"}

    def cell(table: dict[Any, float], case: Any) -> str:
        return f"{table[case]:.2f}" if case in table else "-"

    lines = [
        [f"`{case[0]}`", gates[case[1]], *(cell(table, case) for table in tables)] for case in tables[0] if case[0] != "identity"
    ]
    return markdown(["encoding", "gates", "2,048 tokens", "8,192 tokens"], lines)


def schedule() -> str:
    """Returns CoPE's forward and backward kernels relative to those without positions, in bundles of the TPU's schedule."""
    rows = {(row["length"], row["gates"]): row for row in load("tpu_cost_of_counting_v6e")["rows"]}
    lines = [
        [
            f"{length:,}",
            *(f"{rows[length, gates][way]['ratio']:.2f}" for gates in ("trained", "sparse") for way in ("forward", "backward")),
        ]
        for length in (2048, 8192, 32768, 65536)
    ]
    head = ["tokens", "gates of a trained model: forward", "backward", "gates near 0.02: forward", "backward"]
    return markdown(head, lines)


def filled(text: str) -> str:
    """Returns the page with all tables replaced by those of the results."""
    tables = contrasts() | dict(steps=step_times(), attention=attention_times(), schedule=schedule())
    return BLOCK.sub(lambda match: f"{match[1]}\n{tables[match[2]]}\n\n{match[3]}", text)


if __name__ == "__main__":
    page = HERE / "choose.md"
    page.write_text(filled(page.read_text()))
