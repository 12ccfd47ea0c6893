"""Fills the tables of experiments/README.md from the results: python experiments/readme.py

Between <!-- results NAME --> and <!-- end --> stands what results/NAME.json says of itself: the table, the command that made it,
seeds, hardware and versions, or that it was not run. The text around them is written by hand.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
BLOCK = re.compile(r"(<!-- results (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def described(found: Mapping[str, Any]) -> str:
    """The table of a result, and where it is from."""
    machine = found["hardware"]
    cores, devices = f"{machine['cpu_cores']} CPU cores", f"{machine['devices']} x {machine['device_kind']}"
    what = cores if machine["platform"] == "cpu" else devices
    lines = [f"`{found['command']}`: {what}, Python {found['python']}, jax {found['jax']}"]
    for name, part in found.get("parts", {}).items():
        rate = f"{part['runs_times_steps_a_second']:,} steps a second in all"
        runs = f"{part['runs']} runs of {part['steps']:,} steps, {part['seeds']} seeds, {part['programs']} programs"
        lines.append(f"{name}: {runs}, {part['seconds']:,.0f} s ({rate}, compilation included)")
    return found["table"] + "\n\n" + ".  \n".join(lines) + ".\n"


def filled(text: str) -> str:
    """The README with every table as its results have it."""

    def block(match: re.Match) -> str:
        path = HERE / "results" / f"{match[2]}.json"
        inside = described(json.loads(path.read_text())) if path.exists() else "**Not run.**\n"
        return f"{match[1]}\n{inside}\n{match[3]}"

    return BLOCK.sub(block, text)


if __name__ == "__main__":
    path = HERE / "README.md"
    path.write_text(filled(path.read_text()))
