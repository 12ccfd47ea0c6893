"""experiments/tpu_block_sizes.py: from compiled schedules to the table that the package reads. The compiler is planted."""

import importlib.util
import json
from pathlib import Path

import pytest

from posjax import aot
from posjax.aot import Kernel, Report, Section
from posjax.kernels.blocks import CHIPS, Blocks

SCRIPT = Path(__file__).parents[1] / "experiments" / "tpu_block_sizes.py"
# Bundles of a plain tile; forward and backward differ by a hundred.
PLAIN = {(512, 512): 1000, (1024, 512): 1800, (2048, 512): 100}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("tpu_block_sizes", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def kernel(name, plain):
    """A walk over tiles with and without a mask; 20 bundles of a turn are neither."""
    with_mask = plain + 50
    sections = (
        Section("loop", 1, 100 + plain + with_mask + 20, 1, 8),
        Section("loop", 50, plain + with_mask + 20, 2, 8),
        Section("branch", 55, plain, 2, 4),
        Section("branch", 55 + plain, with_mask, 2, 4),
    )
    return Kernel(name, "", 10_000, sections, 3 * 2**20)


def compiler(jobs, topology):
    """Takes 4,096 keys at once and no tile of 2,048 queries, in any encoding but the first."""
    assert topology == aot.GENERATIONS["v6e"].topology
    reports = []
    for number, (target, job) in enumerate(jobs):
        queries, keys, _, resident = job["block_sizes"]
        if number and (queries > 1024 or resident > 4096):
            reports.append(Report(target, topology, failed="JaxRuntimeError: no room. Used 70.0M of 64.0M vmem. More"))
            continue
        plain = PLAIN[queries, keys]
        both = kernel("posjax_attention_forward.1", plain), kernel("posjax_attention_backward.1", plain + 100)
        reports.append(Report(target, topology, seconds=1.0, kernels=both))
    return reports


def test_the_best_tile_that_compiles_with_the_most_keys_held(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(aot, "compile_all", compiler)
    tiles = ((512, 512, 256), (1024, 512, 256), (2048, 512, 256))
    script.search(script.Search(("v6e",), tiles, tmp_path / "blocks.json", tmp_path / "numbers.json"))
    table = {name: Blocks(**sizes) for name, sizes in json.loads((tmp_path / "blocks.json").read_text()).items()}
    assert table == {name: chip.sizes for name, chip in CHIPS.items()} | {"v6e": Blocks(1024, 512, 256, 4096)}

    rows = json.loads((tmp_path / "numbers.json").read_text())["rows"]
    assert [(row["queries"], row["resident"]) for row in rows] == [
        (512, 1024), (1024, 1024), (2048, 1024), (1024, 16384), (1024, 8192), (1024, 4096),
    ]  # fmt: skip
    refused = "rope + cope(64): Used 70.0M of 64.0M vmem"
    assert [row["rejected"] for row in rows] == [None, None, refused, refused, refused, None]
    assert rows[0]["identity, forward"] == {"plain": 1020 / 512**2, "strip": None}
    # 16,384 queries in tiles of 1,024 visit 2, 4, ... 32 tiles of 512 keys; two encodings, forward and backward.
    expected = 2 * (1820 + 1920) * sum(range(2, 33, 2)) / (16384 * 16385 / 2)
    assert rows[1]["cost"] == pytest.approx(expected)

    said = " ".join(capsys.readouterr().out.split())
    assert "1024x512*" in said and "(2048, 512, 256, 1024) was rejected: " + refused in said


def test_tiles_that_are_none_are_told_before_anything_is_compiled(script, tmp_path, monkeypatch):
    monkeypatch.setattr(aot, "compile_all", None)
    with pytest.raises(ValueError, match="block_sizes must have as keys a positive multiple of strip, 256"):
        script.search(script.Search(("v6e",), ((512, 384, 256),), tmp_path / "a", tmp_path / "b"))
