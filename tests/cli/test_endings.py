"""How a command ends. Processes are expensive: one shows several endings in a row, and the thorough tests show the rest."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from posjax.cli import endings
from posjax.lab.config import Config
from posjax.training.checkpoints import Checkpoints
from posjax.training.writers import read_metrics

ROOT = Path(__file__).parents[2]
FLAGS = {
    "embed_dim": 16, "num_layers": 1, "num_heads": 2, "seq_length": 16, "eval_lengths": 1, "eval_tokens": 64, "warmup_steps": 2,
    "steps": 1_000_000, "log_every": 5, "checkpoint_every": 20, "workdir": "run",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("endings")
    rng = random.Random(0)
    words = ["".join(rng.choice("abcdefgh") for _ in range(rng.randint(2, 7))) for _ in range(200)]
    (folder / "t.txt").write_text("\n".join(" ".join(rng.choice(words) for _ in range(9)) for _ in range(1500)))
    return folder


def start(folder, **options):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "POSJAX_DATA_DIR": str(folder / "cache")}
    command = [
        sys.executable,
        "-m",
        "posjax",
        "train",
        "quickstart",
        "--data",
        "t.txt",
        *(f"--{name}={value}" for name, value in FLAGS.items()),
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    return subprocess.Popen(command, cwd=folder, env=environment, **pipes)


def until(condition, limit=120.0):
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def ended(process, limit):
    """The exit code of a process that must end within `limit` seconds."""
    try:
        return process.wait(limit)
    finally:
        process.kill()


def test_a_reader_that_goes_away_and_two_interrupts(folder):
    process = start(folder)
    assert process.stdout.readline()
    process.stdout.close()  # as `| head -1` does
    seen = len(read_metrics(folder / "run"))
    until(lambda: len(read_metrics(folder / "run")) > seen + 10)
    checkpoints = Checkpoints(folder / "run" / "checkpoints")
    until(lambda: checkpoints.steps())
    process.send_signal(signal.SIGINT)
    time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert ended(process, 10) == 130
    assert checkpoints.newest_good() is not None
    assert "Traceback" not in process.stderr.read()


@pytest.mark.thorough
@pytest.mark.parametrize("second_after", [0.0, 0.05, 0.5])
def test_two_interrupts_at_any_moment(folder, second_after):
    process = start(folder)
    time.sleep(random.uniform(3, 9))
    process.send_signal(signal.SIGINT)
    time.sleep(second_after)
    process.send_signal(signal.SIGINT)
    assert ended(process, 10) == 130
    checkpoints = Checkpoints(folder / "run" / "checkpoints")
    assert not checkpoints.steps() or checkpoints.newest_good() is not None


@pytest.mark.thorough
@pytest.mark.parametrize(("number", "code"), [(signal.SIGHUP, 75), (signal.SIGUSR1, 75)])
def test_other_signals_save(folder, number, code):
    process = start(folder)
    assert any(line.startswith("step ") for line in process.stdout)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == code
    step = int(re.search(rf"interrupted by {signal.Signals(number).name} at step (\d+); run is saved at step \1\.", out)[1])
    assert Checkpoints(folder / "run" / "checkpoints").newest_good() == step


BLOCKED = """
import ctypes

from posjax.cli import endings

endings.GRACE_S = 0.3
endings.own_process()
print("ready", flush=True)
mutex = ctypes.create_string_buffer(64)
for _ in range(2):  # the second waits forever, and no signal ends it, as in a compilation
    ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""


def test_a_second_interrupt_ends_a_process_that_does_not_return_to_python():
    process = subprocess.Popen([sys.executable, "-c", BLOCKED], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.5)  # until it waits
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.send_signal(signal.SIGINT)
    assert ended(process, 5) == 130
    assert "interrupted again and ended; rerun the command to resume" in process.stderr.read()


def test_output_goes_nowhere_once_its_reader_is_gone():
    reader, writer = os.pipe()
    with open(writer, "w") as file:
        stream = endings._unbreakable(file)
        print("read", file=stream, flush=True)
        assert os.read(reader, 99) == b"read\n"
        os.close(reader)
        for _ in range(3):
            print("not read", file=stream, flush=True)


@pytest.mark.parametrize(
    "error",
    [MemoryError(), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 137438953472 bytes.\nmore")],
)
def test_memory_that_runs_out_is_one_line_of_advice(error):
    line = endings.explain(error, Config(batch_size=24, accumulate_steps=2, remat="attention"))
    assert "\n" not in line and line.startswith("out of memory")
    for words in ("batch_size=24", "accumulate_steps=2", "remat is 'attention'", "--remat full", "embed_dim=128"):
        assert words in line
    assert "batch_size" in endings.explain(error, None)


def test_a_full_disk_names_the_workdir():
    line = endings.with_space(OSError(28, "No space left on device"), Config(workdir="runs/x"))
    assert line == "[Errno 28] No space left on device; workdir runs/x; free space and rerun the command: checkpoints are intact"
    assert endings.with_space(ValueError("wrong"), None) == "wrong"


def test_devices_that_do_not_exist(monkeypatch):
    assert endings.explain(RuntimeError("something else"), None) is None
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")

    def devices():
        raise AssertionError

    monkeypatch.setattr(jax, "devices", devices)
    line = endings.explain(AssertionError(), None)
    assert line.startswith("JAX cannot use JAX_PLATFORMS=cuda on this machine: no such device or plugin; unset JAX_PLATFORMS")
