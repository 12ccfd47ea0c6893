"""experiments/tpu_block_sizes.py: from compiled schedules to the table that the package reads. The compiler is planted."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from posjax.attention.backends.tpu.blocks import CHIPS, Blocks

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
# Bundles of a plain tile, with a mask or without; the backward pass takes a hundred more.
PLAIN = {(512, 512): 1000, (1024, 512): 1800, (2048, 512): 4000}


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    yield importlib.import_module("tpu_block_sizes")
    for name in ("tpu_block_sizes", "tpu_cost_of_counting"):
        sys.modules.pop(name)


def compiler(chip, blocks, specs):
    """Takes 4,096 keys at once, and where it counts tiles of less than 2,048 queries, of no other chip."""
    assert chip == "v6e"
    (spec,) = specs
    if blocks.block_kv_resident > 4096 or (spec != "identity" and blocks.block_q > 1024):
        raise RuntimeError(f"{spec} did not compile: no room. Used 70.0M of 64.0M vmem. More")
    plain = PLAIN[blocks.block_q, blocks.block_kv]
    if spec == "identity":
        return {(spec, way): {"plain": n, "plain, masked": n} for way, n in (("forward", plain), ("backward", plain + 100))}
    return {(spec, "forward"): {"step": 7}, (spec, "backward"): {"step": 11}}


def half(rows, keys):
    return np.full((rows.stop - rows.start, keys.stop - keys.start), 0.5)


def test_the_tile_that_costs_least_with_the_most_keys_that_compile(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(script.costs, "compiled", compiler)
    monkeypatch.setattr(script, "gates_of", lambda kind: half)
    tiles = ((512, 512, 256), (1024, 512, 256), (2048, 512, 256))
    script.search(script.Search(("v6e",), tiles, tmp_path / "blocks.json", tmp_path / "numbers.json"))
    table = {name: Blocks(**sizes) for name, sizes in json.loads((tmp_path / "blocks.json").read_text()).items()}
    assert table == {name: chip.sizes for name, chip in CHIPS.items()} | {"v6e": Blocks(1024, 512, 256, 4096)}

    rows = json.loads((tmp_path / "numbers.json").read_text())["rows"]
    spec = "rope + cope(64)"
    assert [row["blocks"]["identity"] for row in rows] == [[n, 512, 256, 4096] for n in (512, 1024, 2048)]
    assert [row["blocks"][spec] for row in rows] == [[n, 512, 256, 4096] for n in (512, 1024, 1024)]
    assert rows[1]["rejected"] == [f"{s}, (1024, 512, 256, 8192): Used 70.0M of 64.0M vmem" for s in ("identity", spec)]
    # 8,192 queries in tiles of 1,024 visit 2, 4, ... 16 tiles of 512 keys.
    assert rows[1]["bundles"]["identity"] == [n * sum(range(2, 17, 2)) for n in (1800, 1900)]
    # Gates of one half have passed 63 after 127 keys: two strips of 256 for each pair but the first, which has one. The border
    # between the keys that are held cuts one query tile's band into three steps.
    assert rows[1]["bundles"]["half"] == rows[1]["bundles"]["small"] == [7 * 17, 11 * 17]
    assert rows[1]["cost"] == pytest.approx(sum(map(sum, rows[1]["bundles"].values())) / 3)
    assert "1024 x 512 x 256*" in " ".join(capsys.readouterr().out.split())


def test_tiles_that_are_none_are_told_before_anything_is_compiled(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script.costs, "compiled", None)
    with pytest.raises(ValueError, match="block_kv of block_sizes must be a positive multiple of block_kv_count, 256"):
        script.search(script.Search(("v6e",), ((512, 384, 256),), tmp_path / "a", tmp_path / "b"))
