"""Every test runs on the CPU, with eight devices that are really one, so that sharded code is tested on any machine."""

import atexit
import gc
import importlib.metadata
import itertools
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

FLAGS = "--xla_force_host_platform_device_count=8"

# Thousands of tiny programs take a third longer to compile with the fusion emitters of this version; later ones have no such flag.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    FLAGS += " --xla_cpu_use_fusion_emitters=false"

# Before anything imports jax, which reads these once. Subprocesses of tests inherit them.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # most programs of tests take longer to optimise than to run
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()

# Most of the time goes into compiling, much of it into the same programs: the test processes and their children share them.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="posjax-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

MAPS = Path("/proc/self/maps")  # on Linux; no such limit elsewhere
MOST_MAPS = 20_000
finished = itertools.count(1)


@pytest.hookimpl(tryfirst=True)  # before tests are selected by their marks
def pytest_collection_modifyitems(items):
    """Marks the tests that thorough.txt names."""
    lines = (Path(__file__).parent / "thorough.txt").read_text().splitlines()
    names = tuple(line for line in lines if line and not line.startswith("#"))
    found = set()
    for item in items:
        if begun := [name for name in names if item.nodeid.startswith(name)]:
            item.add_marker(pytest.mark.thorough)
            found.update(begun)
    if len(items) > 2000 and (unknown := sorted(set(names) - found)):  # all tests were collected
        raise pytest.UsageError(f"tests/thorough.txt must name tests, got {unknown[0]}")


def pytest_runtest_teardown():
    """Every program that is kept maps memory, and with more than 65,530 maps Linux gives a process no memory and it aborts."""
    if next(finished) % 8 == 0 and MAPS.exists() and len(MAPS.read_bytes().splitlines()) > MOST_MAPS:
        import jax

        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="module", autouse=True)
def full_optimization(request):
    """Compiles as users do in modules with ``OPTIMIZED = True``, whose tests look at compiled programs."""
    if not getattr(request.module, "OPTIMIZED", False):
        yield
        return
    import jax

    quick = os.environ.pop("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")  # children of the tests inherit it
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = quick
    jax.config.update("jax_disable_most_optimizations", quick == "1")


@pytest.fixture(autouse=True)
def calls_are_traced_anew(request):
    """A call of attention that was traced before a patch must not stand in for the patched one, nor outlive the patch."""
    if "monkeypatch" not in request.fixturenames:
        yield
        return
    from posjax.attention import dispatch

    dispatch._run.clear_cache()
    yield
    dispatch._run.clear_cache()


@pytest.fixture
def run(capsys):
    """Runs a command of the command line; returns (exit code, stdout, stderr)."""
    from posjax import cli

    def run(*argv):
        capsys.readouterr()
        code = 0
        try:
            cli.main([str(arg) for arg in argv])
        except SystemExit as end:
            code = end.code or 0
        return code, *capsys.readouterr()

    return run
