"""Experiments: configurations, training runs, comparisons of encodings, and their metrics and tables."""

from pathlib import Path


def named_configs() -> dict[str, Path]:
    """Returns the files of posjax's configurations, by name."""
    folder = Path(__file__).parents[1] / "configs"
    return {path.stem: path for path in sorted(folder.glob("[!_]*.py"))}
