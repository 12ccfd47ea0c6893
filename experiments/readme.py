"""Fills the tables of experiments/README.md from the results: python experiments/readme.py

The text between <!-- results NAME --> and <!-- end --> is generated from results/NAME.json: the tables, the command that produced
them, seeds, text, hardware and versions, or a note that it was not run. The p values of all claims in the file are adjusted
together. The text around the tables is written by hand.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from contrasts import adjusted, claims_table

HERE = Path(__file__).parent
BLOCK = re.compile(r"(<!-- results (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
DIGITS = {"error": 2}  # decimals of a claim's numbers, by measure; 3 for losses


def described(found: Mapping[str, Any], claims: Sequence[Mapping[str, Any]]) -> str:
    """Formats the tables of a result and how it was produced."""
    machine = found["hardware"]
    cores, devices = f"{machine['cpu_cores']} CPU cores", f"{machine['devices']} x {machine['device_kind']}"
    hardware = cores if machine["platform"] == "cpu" else devices
    lines = [f"`{found['command']}`: {hardware}, Python {found['python']}, jax {found['jax']}"]
    for name, part in found.get("parts", {}).items():
        rate = f"{part['runs_times_steps_a_second']:,} steps per second in total"
        seeds = part["seeds"]
        seeds = seeds if isinstance(seeds, int) else f"{len(seeds)} ({seeds[0]} to {seeds[-1]})"
        runs = f"{part['runs']} runs of {part['steps']:,} steps, {seeds} seeds, {part['programs']} programs"
        text = f"; text {part['text']['sha256']}, {part['text']['excerpts']:,} excerpts" if "text" in part else ""
        lines.append(f"{name}: {runs}, {part['seconds']:,.0f} s ({rate}, including compilation){text}")
    tables = [found["table"]]
    if claims:
        digits = {DIGITS.get(part["measure"], 3) for part in found["parts"].values()}
        tables.append(claims_table(claims, max(digits)))
    return "\n\n".join(tables) + "\n\n" + ".  \n".join(lines) + ".\n"


def filled(text: str) -> str:
    """Returns the README with all tables replaced by those of the results."""
    paths = {name: HERE / "results" / f"{name}.json" for _, name, _ in BLOCK.findall(text)}
    results = {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}
    claims = adjusted({name: found["claims"] for name, found in results.items() if "claims" in found})

    def block(match: re.Match) -> str:
        name = match[2]
        content = described(results[name], claims.get(name, ())) if name in results else "**Not run.**\n"
        return f"{match[1]}\n{content}\n{match[3]}"

    return BLOCK.sub(block, text)


if __name__ == "__main__":
    path = HERE / "README.md"
    path.write_text(filled(path.read_text()))
