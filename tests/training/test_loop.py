"""The run loop through kills, signals, bad batches and resumes. What counts is what a user has afterwards: state and files."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posjax.parallel.mesh import make_mesh
from posjax.parallel.steps import jit_train_step, pmap_train_step
from posjax.training import loop
from posjax.training.checkpoints import CheckpointError, Checkpoints, SaveError
from posjax.training.loop import NonFiniteLoss, fit
from posjax.training.optimizer import make_optimizer
from posjax.training.schedule import learning_rate_schedule
from posjax.training.signals import Interrupted
from posjax.training.state import init_state
from posjax.training.step import make_train_step
from posjax.training.writers import forget_after

STEPS = 40


class Batches:
    """Random batches with a place that can be stored, as Grain's iterators have it.

    The batches of the steps in `poison` hold a NaN; `hook` is called with the number of each step before its batch is given.
    """

    def __init__(self, poison=(), hook=None, end=10**9):
        self.at, self.poison, self.hook, self.end = 0, frozenset(poison), hook, end

    def __iter__(self):
        return self

    def __next__(self):
        self.at += 1
        if self.at > self.end:
            raise StopIteration
        if self.hook:
            self.hook(self.at)
        rng = np.random.default_rng(self.at)
        tokens = rng.normal(size=(8, 5)).astype(np.float32)
        if self.at in self.poison:
            tokens[0, 0] = np.nan
        return {"tokens": tokens, "weights": rng.uniform(size=8).astype(np.float32)}

    def get_state(self):
        return {"at": self.at}

    def set_state(self, state):
        self.at = state["at"]


class Replayed(Batches):
    """The same without a place."""

    get_state = set_state = property()


def loss_fn(params, batch, key):
    noise = 0.1 * jax.random.normal(key, batch["tokens"].shape)
    target = jnp.tanh(jnp.sum(batch["tokens"], -1, keepdims=True))
    error = jnp.tanh((batch["tokens"] + noise) @ params["kernel"]) - target
    return jnp.sum(batch["weights"] * jnp.sum(error**2, -1)), jnp.sum(batch["weights"])


def loss_fn_quiet(params, batch, key):
    """Without noise: that differs between the twins, as each device of a pmap draws its own."""
    error = jnp.tanh(batch["tokens"] @ params["kernel"]) - 0.5
    return jnp.sum(batch["weights"] * jnp.sum(error**2, -1)), jnp.sum(batch["weights"])


OPTIMIZER = make_optimizer(learning_rate_schedule(0.05, STEPS, 5), weight_decay=0.1)
STEP = jax.jit(make_train_step(loss_fn, OPTIMIZER))


def new_state(dim=3):
    return init_state({"kernel": np.linspace(-1, 1, 5 * dim, dtype=np.float32).reshape(5, dim)}, OPTIMIZER, seed=0)


def run(workdir, batches=None, state=None, **options):
    defaults = {"steps": STEPS, "log_every": 5, "checkpoint_every": 10, "resume_command": "posjax train again"}
    return fit(STEP, state or new_state(), batches or Batches(), workdir=workdir, **{**defaults, **options})


def lines(workdir):
    return [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]


def without_rate(entries):
    """What a run must repeat: all but measurements of the machine."""
    measured = {"tokens_per_second", "time", "elapsed", "memory_bytes"}
    return [{name: value for name, value in entry.items() if name not in measured} for entry in entries]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run that nothing happened to."""
    workdir = tmp_path_factory.mktemp("straight")
    return run(workdir, quiet=True), workdir


def assert_same_run(state, workdir, straight):
    np.testing.assert_array_equal(state.params["kernel"], straight[0].params["kernel"])  # bit for bit
    assert int(state.step) == STEPS
    assert without_rate(lines(workdir)) == without_rate(lines(straight[1]))


def test_what_a_run_leaves(straight):
    state, workdir = straight
    entries = lines(workdir)
    assert [entry["step"] for entry in entries] == list(range(5, STEPS + 1, 5))
    measured = {"tokens_per_second", "time", "elapsed", "memory_bytes"}
    assert set(entries[0]) == {"step", "loss", "learning_rate", "grad_norm", "skipped", "tokens"} | measured
    assert [entry["tokens"] for entry in entries] == [8 * 5 * entry["step"] for entry in entries]
    assert all(abs(entry["time"] - time.time()) < 600 and entry["memory_bytes"] > 2**20 for entry in entries)
    assert sorted(entry["elapsed"] for entry in entries) == [entry["elapsed"] for entry in entries]
    assert all(entry["tokens_per_second"] > 0 and entry["skipped"] == 0 for entry in entries)
    assert entries[-1]["loss"] < entries[0]["loss"]
    schedule = learning_rate_schedule(0.05, STEPS, 5)
    rates = [schedule(entry["step"] - 1) for entry in entries]
    np.testing.assert_allclose([entry["learning_rate"] for entry in entries], rates, rtol=1e-5)
    assert list(workdir.glob("events.out.tfevents*"))
    checkpoints = Checkpoints(workdir / "checkpoints")
    assert checkpoints.steps() == [20, 30, 40]
    assert checkpoints.restore_latest(new_state()).data_state == {"at": STEPS}
    # The same steps by hand, without a loop: the loop adds nothing to the arithmetic.
    by_hand, batches = new_state(), Batches()
    for _ in range(STEPS):
        by_hand, _ = STEP(by_hand, next(batches))
    np.testing.assert_array_equal(by_hand.params["kernel"], state.params["kernel"])


def test_a_run_that_is_done_says_so(straight, capsys):
    before = {path: path.stat().st_mtime_ns for path in straight[1].rglob("*")}
    state = run(straight[1], Batches(end=0))
    assert "already at step 40 of 40; nothing to train" in capsys.readouterr().out
    assert_same_run(state, straight[1], straight)
    assert {path: path.stat().st_mtime_ns for path in straight[1].rglob("*")} == before


def test_plain_lines_and_quiet(tmp_path, capsys):
    run(tmp_path / "a", steps=5)
    out = capsys.readouterr().out
    assert re.search(r"step 5/5  loss \d", out) and "tokens/s" in out and "0:00:00 left" in out and "\x1b" not in out
    run(tmp_path / "b", steps=5, quiet=True)
    assert capsys.readouterr().out == ""


def test_the_share_of_the_devices_peak(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(loop, "peak_flops", lambda device: 2e6)
    run(tmp_path, steps=5, flops_per_token=3.0)
    (line,) = lines(tmp_path)
    assert line["mfu"] == pytest.approx(3.0 * line["tokens_per_second"] / (2e6 * jax.device_count()))
    assert f"tokens/s  MFU {line['mfu']:.1%}" in capsys.readouterr().out


def test_a_terminal_gets_a_bar(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys, "stdout", Terminal())
    run(tmp_path, steps=5)
    seen = sys.stdout.getvalue()
    assert "\x1b[" in seen and re.search(r"5/5 .*loss .*tokens/s.*left", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", seen))


def test_evaluation_shares_the_line_of_its_step(tmp_path):
    seen = []

    def evaluate(state):
        seen.append(int(state.step))
        return {"loss": float(jnp.sum(state.params["kernel"])), "error": float("nan")}

    run(tmp_path, evaluate=evaluate, evaluate_every=7, steps=20)
    assert seen == [7, 14, 20]
    assert [e["step"] for e in lines(tmp_path)] == [5, 7, 10, 14, 15, 20]
    assert [e["step"] for e in lines(tmp_path) if "evaluation/loss" in e] == seen
    assert lines(tmp_path)[-1]["evaluation/error"] is None  # strict JSON has no NaN


@pytest.mark.parametrize(
    ("number", "batches"),
    [(signal.SIGINT, Batches), (signal.SIGTERM, Replayed), (signal.SIGHUP, Batches), (signal.SIGUSR1, Batches)],
)
def test_a_signal_saves_and_the_next_run_goes_on(tmp_path, capsys, straight, number, batches):
    if signal.getsignal(number) is signal.SIG_IGN:  # under nohup
        signal.signal(number, signal.SIG_DFL)
    before = signal.getsignal(number)

    def hook(at):
        if at == 17:
            os.kill(os.getpid(), number)

    words = rf"{signal.Signals(number).name} at step 17; .* saved at step 17(.|\n)*posjax train again"
    with pytest.raises(Interrupted, match=words) as stopped:
        run(tmp_path, batches(hook=hook))
    assert stopped.value.exit_code == (130 if number == signal.SIGINT else 75)
    assert "posjax train again" in capsys.readouterr().out
    assert signal.getsignal(number) is before
    assert Checkpoints(tmp_path / "checkpoints").steps() == [10, 17]
    state = run(tmp_path, batches())
    assert "resuming" in capsys.readouterr().out
    assert_same_run(state, tmp_path, straight)


def test_a_second_interrupt_ends_at_once(tmp_path):
    def hook(at):
        if at == 12:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Batches(hook=hook))
    assert Checkpoints(tmp_path / "checkpoints").steps() == [10]


def test_nohup_keeps_its_meaning(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        run(tmp_path, Batches(hook=lambda at: os.kill(os.getpid(), signal.SIGHUP)), steps=3, quiet=True)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_interrupt_while_saving_leaves_what_is_being_written(tmp_path, monkeypatch):
    """The second Ctrl-C comes while the loop waits for the disk: it ends at once, and what the threads finish is a checkpoint."""
    commit = Checkpoints._commit

    def slow(*args):
        if args[1].name != "10":
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.3)
        commit(*args)

    monkeypatch.setattr(Checkpoints, "_commit", slow)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Batches(hook=lambda at: at == 12 and os.kill(os.getpid(), signal.SIGINT)), quiet=True)
    assert time.monotonic() - began < 10
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.steps() == [10, 12] and checkpoints.newest_good() == 12


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(tmp_path, monkeypatch, straight):
    commit = Checkpoints._commit

    def full(self, written, *args):
        if written.name in failing:
            raise OSError(28, "No space left on device")
        commit(self, written, *args)

    monkeypatch.setattr(Checkpoints, "_commit", full)
    failing = {"20", "30"}
    with pytest.warns(UserWarning, match=r"could not be saved at step [23]0: No space left on device; training goes on"):
        assert_same_run(run(tmp_path / "a"), tmp_path / "a", straight)
    assert Checkpoints(tmp_path / "a" / "checkpoints").steps() == [10, 40]
    failing = {"40"}
    words = r"b could not be saved at step 40: No space left on device\. .*b is saved at step 30\. To resume, run:\n  posjax train"
    with pytest.raises(SaveError, match=words):
        run(tmp_path / "b")
    failing = set()
    assert_same_run(run(tmp_path / "b"), tmp_path / "b", straight)


def test_when_checkpoints_are_saved_and_kept(tmp_path, monkeypatch):
    def evaluate(state):
        return {"loss": abs(int(state.step) - 12.0)}  # lowest at steps 8, 12 and 16

    options = dict(steps=25, checkpoint_every=5, keep_last=1, quiet=True)
    run(tmp_path / "a", evaluate=evaluate, evaluate_every=4, keep_best=2, keep_every=10, keep_steps={3}, **options)
    assert Checkpoints(tmp_path / "a" / "checkpoints").steps() == [3, 10, 12, 16, 20, 25]
    monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])
    now = [0.0]

    def hook(at):
        now[0] = 10.0 * at  # ten seconds a step: a minute is over at step 6, and again at 16, but logs are at 10 and 20

    run(
        tmp_path / "b",
        Batches(hook=hook),
        **options | {"checkpoint_every": None, "checkpoint_minutes": 1, "keep_last": 9, "log_every": 10},
    )
    assert Checkpoints(tmp_path / "b" / "checkpoints").steps() == [10, 20, 25]


def test_what_a_run_prints_first(tmp_path, capsys):
    run(tmp_path, steps=5)
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "compiling the training step"
    assert re.fullmatch(r"compiled in \d+\.\d s; peak memory \d+\.\d\d GiB", out[1])


def test_fit_works_in_another_thread(tmp_path):
    thread = threading.Thread(target=run, args=(tmp_path,), kwargs={"steps": 5})
    thread.start()
    thread.join()
    assert lines(tmp_path)[-1]["step"] == 5


TOY = """
    import os, signal, sys, threading, time
    sys.path[:0] = [{root!r}, {tests!r}]
    import test_loop

    def hook(at):
        if at == int(sys.argv[2]):  # at any moment of what comes next: the step, the log line, the save
            threading.Thread(target=lambda: (time.sleep(float(sys.argv[3])), os.kill(os.getpid(), signal.SIGKILL))).start()
        time.sleep(0.002)

    test_loop.run(sys.argv[1], test_loop.Batches(hook=hook), quiet=True)
"""


@pytest.mark.parametrize("kills", [2, pytest.param(8, marks=pytest.mark.thorough)])
def test_killed_at_any_moment_and_restarted(tmp_path, straight, kills):
    code = textwrap.dedent(TOY).format(root=str(Path(__file__).parents[2]), tests=str(Path(__file__).parent))
    rng, checkpoints, ends = np.random.default_rng(), Checkpoints(tmp_path / "checkpoints"), []
    for _ in range(kills):
        if checkpoints.newest_good() == STEPS:
            break
        at, delay = (checkpoints.newest_good() or 0) + int(rng.integers(1, 11)), float(rng.uniform(0, 0.06))
        process = subprocess.run([sys.executable, "-c", code, str(tmp_path), str(at), str(delay)], capture_output=True)
        assert process.returncode in (0, -signal.SIGKILL), process.stderr.decode()
        ends.append(process.returncode)
        print(f"{delay:.3f} s into step {at}: {process.returncode}, checkpoints {checkpoints.steps()}")
    assert -signal.SIGKILL in ends
    if checkpoints.newest_good() != STEPS:  # what a kill in the middle of a write and of a save leaves
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 35, "lo')
        (checkpoints.directory / "saving" / "40.orbax-checkpoint-tmp").mkdir(parents=True, exist_ok=True)
    assert_same_run(run(tmp_path), tmp_path, straight)


def test_a_run_goes_on_with_other_devices_and_the_other_twin(tmp_path):
    twins = {
        10: pmap_train_step(make_train_step(loss_fn_quiet, OPTIMIZER, axis_name="data")),
        20: jit_train_step(make_train_step(loss_fn_quiet, OPTIMIZER), make_mesh(4)),
        30: pmap_train_step(make_train_step(loss_fn_quiet, OPTIMIZER, axis_name="data"), num_devices=2),
    }
    for steps, step in twins.items():
        state = fit(step, new_state(), Batches(), steps=steps, log_every=1, workdir=tmp_path / "many", quiet=True)
    one = jax.jit(make_train_step(loss_fn_quiet, OPTIMIZER))
    alone = fit(one, new_state(), Batches(), steps=30, log_every=1, workdir=tmp_path / "one", quiet=True)
    losses = [[entry["loss"] for entry in lines(tmp_path / name)] for name in ("many", "one")]
    assert len(losses[0]) == 30
    np.testing.assert_allclose(losses[0], losses[1], atol=1e-5)
    np.testing.assert_allclose(state.params["kernel"], alone.params["kernel"], atol=1e-5)


def test_the_newest_checkpoint_is_damaged(tmp_path, straight):
    run(tmp_path, steps=30)
    path = max((tmp_path / "checkpoints" / "30" / "state").rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="checkpoint 30 .* is damaged"):
        state = run(tmp_path)
    assert_same_run(state, tmp_path, straight)
    assert Checkpoints(tmp_path / "checkpoints").damage(30) is None  # written again on the way


def test_another_model_is_refused_and_nothing_lost(tmp_path):
    run(tmp_path, steps=20)
    log = lines(tmp_path)
    with pytest.raises(CheckpointError, match=r"params/kernel has shape \(5, 3\).* there, but has shape \(5, 4\)"):
        run(tmp_path, state=new_state(dim=4))
    assert lines(tmp_path) == log and Checkpoints(tmp_path / "checkpoints").steps() == [10, 20]


def test_a_few_bad_steps_are_skipped_and_no_checkpoint_is_written_among_them(tmp_path):
    state = run(tmp_path, Batches(poison=range(18, 24)), keep_last=9)
    assert int(state.skipped) == 6 and int(state.skipped_in_a_row) == 0
    assert Checkpoints(tmp_path / "checkpoints").steps() == [10, 24, 30, 40]  # 20 waited until 24 was good
    entries = {entry["step"]: entry for entry in lines(tmp_path)}
    assert entries[20]["loss"] is None and entries[20]["skipped"] == 3 and entries[25]["loss"] > 0


@pytest.mark.parametrize("log_every", [1, 5, 7, 100])
@pytest.mark.parametrize("bad", [range(18, 10**6), range(18, 28)])
def test_ten_bad_steps_in_a_row_stop_the_run(tmp_path, bad, log_every):
    words = r"10 steps in a row, from step 18 to 27; the newest intact checkpoint is .*checkpoints/10\."
    for _ in range(2):  # running it again changes nothing
        with pytest.raises(NonFiniteLoss, match=words):
            run(tmp_path, Batches(poison=bad), keep_last=1, log_every=log_every)
        restored = Checkpoints(tmp_path / "checkpoints").restore_latest(new_state())
        assert restored.step == 10 and int(restored.state.skipped) == 0


def test_bad_steps_at_the_very_end_lose_nothing(tmp_path, capsys):
    state = run(tmp_path, Batches(poison=range(38, 41)), keep_last=1)
    assert int(state.skipped_in_a_row) == 3
    assert Checkpoints(tmp_path / "checkpoints").steps() == [30, 40]
    run(tmp_path, Batches(end=0))
    assert "already" in capsys.readouterr().out


def test_nothing_is_fetched_between_log_points(tmp_path):
    reads = []

    def step(state, batch):
        reads.append(len(fetched))
        return STEP(state, batch)

    fetched, device_get = [], jax.device_get
    try:
        jax.device_get = lambda tree: fetched.append(tree) or device_get(tree)
        fit(step, new_state(), Batches(), steps=20, workdir=tmp_path, log_every=10, checkpoint_every=20, quiet=True)
    finally:
        jax.device_get = device_get
    assert reads == [0] * 10 + [2] * 10


def test_forget_after(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n[]\n{"step": 3}\n{"step": 2')
    forget_after(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    forget_after(tmp_path / "nothing", 2)


def test_arguments(tmp_path):
    for options, words in [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"log_every": 0}, "log_every must be at least 1, got 0"),
        ({"checkpoint_every": -1}, "checkpoint_every must be at least 1, or None .*, got -1"),
        ({"evaluate_every": 0}, "evaluate_every must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=words):
            run(tmp_path, **options)
    with pytest.raises(ValueError, match="batches ended after step 3 of 40"):
        run(tmp_path, Batches(end=3))
