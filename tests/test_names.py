"""``posjax.attention`` is the function, and the package of the same name can be imported in every form and order."""

import pkgutil
import subprocess
import sys

import pytest

import posjax as pj

ORDERS = {
    "dotted": "import posjax\nmodule = posjax.attention.backends.reference",
    "from the package": "from posjax.attention import api as module",
    "the module under a name": "import posjax.attention.kv_cache as module",
    "a module two levels down under a name": "import posjax.attention.backends.xla_chunked as module",
    "the dotted module": "import posjax.attention.linear\nmodule = posjax.attention.linear",
    "a function of a module": "from posjax.attention.kv_cache import init_cache\nmodule = sys.modules[init_cache.__module__]",
    "by its name": "import importlib\nmodule = importlib.import_module('posjax.attention.backends.tpu.blocks')",
    "another package first": "import posjax.models.transformer\nimport posjax.attention.api as module",
}
PROGRAM = """
import sys
import types

{order}

import jax.numpy as jnp
import posjax as pj

assert isinstance(module, types.ModuleType) and module is sys.modules[module.__name__], module
assert isinstance(sys.modules["posjax.attention"], types.ModuleType)
assert isinstance(pj.attention, types.FunctionType) and pj.attention is sys.modules["posjax.attention.api"].attention
ones = jnp.ones((1, 4, 2, 8))
assert bool(jnp.allclose(pj.attention(ones, ones, ones, is_causal=True), 1.0))
"""


QUICK = ("dotted", "the module under a name")  # each order is a process of its own, which imports jax anew
SLOW = [pytest.param(order, marks=pytest.mark.thorough) for order in ORDERS if order not in QUICK]


@pytest.mark.parametrize("order", [*QUICK, *SLOW])
def test_attention_is_the_function_after_every_import(order):
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(order=ORDERS[order])], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_function_has_all_modules_of_its_package():
    package = sys.modules["posjax.attention"]
    names = [module.name for module in pkgutil.iter_modules(package.__path__)]
    assert {"api", "backends", "kv_cache", "linear"} <= set(names)
    for name in names:
        assert getattr(pj.attention, name) is sys.modules[f"posjax.attention.{name}"] is getattr(package, name)


def test_no_other_public_name_is_a_package_too():
    modules = {module.name for module in pkgutil.iter_modules(pj.__path__)}
    assert set(pj.__all__) & modules == {"attention"}


def test_importing_the_package_loads_jax_and_nothing_heavier():
    heavy = "jax.experimental.pallas", "flax", "optax", "orbax", "grain", "tyro", "matplotlib", "posjax.models", "posjax.lab"
    done = subprocess.run([sys.executable, "-c", "import sys, posjax; print(*sys.modules)"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = done.stdout.split()
    assert "posjax.attention.api" in loaded
    assert not [name for name in loaded if any(name == h or name.startswith(f"{h}.") for h in heavy)]
