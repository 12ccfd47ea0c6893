"""``import posjax``, and attention, need jax and what it needs; everything else is the extra [lab], and loads on use."""

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

packaging = pytest.importorskip("packaging.requirements")

REFUSE = """
import sys

at_start = set(sys.modules)  # what .pth files of the environment load
refused = set(sys.argv[1].split())

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in refused:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())
"""  # the beginning of a program that cannot import some modules

PROGRAM = f"""{REFUSE}
try:
    import hypothesis
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("nothing is refused")

import jax.numpy as jnp
import posjax as pj

ones = jnp.ones((1, 4, 2, 8))
out = pj.attention(ones, ones, ones, pj.chain(pj.rope(), pj.alibi()), is_causal=True)
assert out.shape == ones.shape and bool(jnp.allclose(out, 1.0)), out
print("loaded", *sorted(set(name.partition(".")[0] for name in set(sys.modules) - at_start) & refused))
"""


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def required_by(*roots: str) -> set[str]:
    """The installed distributions that those need, themselves included."""
    found, waiting = set(), list(roots)
    while waiting:
        name = canonical(waiting.pop())
        if name in found:
            continue
        try:
            requirements = importlib.metadata.requires(name) or ()
        except importlib.metadata.PackageNotFoundError:
            continue
        found.add(name)
        for requirement in map(packaging.Requirement, requirements):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return found


def unneeded_by(*roots: str) -> set[str]:
    """The modules of all other installed distributions."""
    allowed = required_by(*roots)
    return {
        module
        for module, owners in importlib.metadata.packages_distributions().items()
        if not allowed & set(map(canonical, owners)) and module.isidentifier() and module not in sys.stdlib_module_names
    } - {"posjax"}


def run_refusing(program: str) -> subprocess.CompletedProcess:
    """Runs a program that can import only jax and what it needs."""
    refused = unneeded_by("jax")
    assert {"hypothesis", "pytest", "flax", "jaxtyping"} <= refused
    assert not {"jax", "jaxlib", "numpy"} & refused
    command, folder = [sys.executable, "-c", program, " ".join(refused)], Path(__file__).resolve().parents[1]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


def test_import_and_attention_with_jax_alone():
    done = run_refusing(PROGRAM)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["loaded"], done.stdout


COMMANDS = f"""{REFUSE}
from posjax.cli import main

main(["list"])
for module in ("models.transformer", "training.step"):
    try:
        __import__(f"posjax.{{module}}")
    except ModuleNotFoundError as error:
        print(error)
main(["compare", "quickstart"])
"""


def test_without_the_lab_posjax_says_how_to_install_it():
    done = run_refusing(COMMANDS)
    assert done.returncode == 1
    *listed, model, step = done.stdout.splitlines()
    assert any(line.split()[:1] == ["rope"] for line in listed) and any(line.split()[:1] == ["quickstart"] for line in listed)
    assert model == "posjax.models needs flax: pip install 'posjax[lab]'"
    assert step == "posjax.training needs optax: pip install 'posjax[lab]'"
    assert done.stderr == "posjax: posjax compare needs flax, optax, orbax, rich, tyro: pip install 'posjax[lab]'\n"


GRID = f"""{REFUSE}
import tempfile
from pathlib import Path

from posjax.lab.config import Config
from posjax.lab.ablation.grids import run_grid
from posjax.lab.source import open_source
from posjax.lab.ablation.sweeps import grid

sizes = dict(seq_length=8, batch_size=2, num_layers=1, embed_dim=8, num_heads=2, steps=2, warmup_steps=0, eval_tokens=8)
config = Config(task="flip_flop", encodings=("cope(4)",), **sizes)
with tempfile.TemporaryDirectory() as folder:
    (row,) = run_grid(grid(config, []), (0,), Path(folder), open_source(config))
print("loaded", *sorted(set(name.partition(".")[0] for name in set(sys.modules) - at_start) & refused), row["metrics"]["error"])
"""


@pytest.mark.thorough
def test_a_grid_of_a_synthetic_task_needs_optax_orbax_and_little_else():
    refused = "tyro tensorflow_datasets grain array_record tokenizers tensorboardX matplotlib"
    done = subprocess.run([sys.executable, "-c", GRID, refused], capture_output=True, text=True)
    assert done.returncode == 0 and "loaded {'in distribution'" in done.stdout, done.stdout + done.stderr
