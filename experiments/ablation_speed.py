"""Compares posjax ablate with posjax train: their numbers agree, and the grid takes less time.

    python experiments/ablation_speed.py            # a quarter of an hour on two cores

Trains flip-flop at the small scale with four encodings and eight seeds: once as a grid, and once as thirty-two runs one after
another, each command in a separate process and including compilation. Compares losses and gradient norms at every log point, and
the errors at the end. Writes results/ablation_speed.json.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import markdown, write

ENCODINGS = ("learned", "rope", "alibi", "cope(64)")
SEEDS = 8
RECIPE = {"embed_dim": 32, "steps": 400, "learning_rate": 3e-3, "log_every": 50}
COMPARED_UNTIL = 200  # steps; later, differences in the order of sums may accumulate


def posjax(*arguments: object) -> float:
    """Runs a posjax command and returns the seconds that it takes."""
    began = time.perf_counter()
    flags = [str(part) for name, value in RECIPE.items() for part in (f"--{name}", value)]
    command = [sys.executable, "-m", "posjax", *map(str, arguments), *flags]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    return time.perf_counter() - began


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        grid = Path(folder) / "grid"
        together = posjax("ablate", "flip_flop", "--encodings", *ENCODINGS, "--seeds", SEEDS, "--workdir", grid)
        groups = {json.loads(p.read_text())["spec"]: p.parent for p in grid.glob("*/rows.json")}
        results = json.loads((grid / "results.json").read_text())["rows"]
        grid_errors = {(row["encoding"], row["seed"]): row["metrics"]["error"] for row in results}
        rows = []
        for spec in ENCODINGS:
            logged, seconds, difference, error_difference = lines(groups[spec] / "metrics.jsonl"), 0.0, 0.0, 0.0
            for seed in range(SEEDS):
                alone = Path(folder) / f"{spec}-{seed}"
                seconds += posjax("train", "flip_flop", "--encoding", spec, "--seeds", seed, "--workdir", alone)
                for ours, theirs in zip(logged, lines(alone / "metrics.jsonl"), strict=True):
                    if ours["step"] <= COMPARED_UNTIL:
                        differences = (abs(ours[name][seed] - theirs[name]) for name in ("loss", "grad_norm"))
                        difference = max(difference, *differences)
                (row,) = json.loads((alone / "results.json").read_text())["rows"]
                errors = row["metrics"]["error"]
                error_difference = max(
                    error_difference, *(abs(errors[column] - grid_errors[spec, seed][column]) for column in errors)
                )
            counted = json.loads((groups[spec] / "rows.json").read_text())["compilations"]
            rows.append(
                {
                    "encoding": spec,
                    "seconds_one_by_one": round(seconds, 1),
                    "largest_difference_to_step_200": difference,
                    "largest_difference_of_errors": error_difference,
                    "training_programs_compiled": counted["train"],
                }
            )
            print(rows[-1], flush=True)
    alone = sum(row["seconds_one_by_one"] for row in rows)
    heads = ["encoding", "8 runs one by one (s)", "largest difference to step 200", "of errors at the end (%)", "programs compiled"]
    table = markdown(heads, [[row["encoding"], *(f"{value:.3g}" for value in list(row.values())[1:])] for row in rows])
    runs = len(ENCODINGS) * SEEDS
    table += f"\n\nThe grid of {runs} runs: {together:.0f} s; one by one: {alone:.0f} s, {alone / together:.1f} times as long."
    more = {"seconds_together": round(together, 1), "ratio": round(alone / together, 2), "recipe": RECIPE, "seeds": SEEDS}
    write("ablation_speed", rows, **more, table=table)
    print(table)


if __name__ == "__main__":
    main()
