"""Several processes on this machine, through the command line: the numbers of one, stops on the same step, and the loss of one."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from posjax.lab.config import Config
from posjax.lab.source import open_source, train_batches
from posjax.parallel import distributed
from posjax.parallel.mesh import AXES, make_mesh, row_share
from posjax.training.checkpoints import CheckpointError, Checkpoints

ROOT = Path(__file__).parents[2]
STEPS = 20
CONFIG = """
    from posjax.lab.config import Config

    def get_config():
        return Config(
            task="flip_flop", seq_length=16, batch_size=8, num_layers=1, embed_dim=16, mlp_dim=16, num_heads=2,
            encoding="rope", implementation="xla_chunked", steps={steps}, warmup_steps=2, learning_rate=1e-2, log_every=1,
            checkpoint_every=1000, eval_lengths=(1,), eval_tokens=128,
        )
"""
WORDS = [*"abcdefgh=():", "return", "range", "print", "None", "True", "while"]


class Run:
    """Runs of one configuration in workdirs of their own."""

    def __init__(self, folder):
        self.folder = folder
        (folder / "tiny.py").write_text(textwrap.dedent(CONFIG).format(steps=STEPS))

    def start(self, workdir, *flags, processes=1, devices=4):
        """The processes of a run, started."""
        flag = f"--xla_force_host_platform_device_count={devices}"
        xla = re.sub(r"--xla_force_host_platform_device_count=\d+", flag, os.environ["XLA_FLAGS"])
        common = os.environ | {"XLA_FLAGS": xla, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "posjax", "train", "tiny.py", "--workdir", workdir, *flags]
        started = []
        for own in by_hand(processes) if processes > 1 else [{}]:
            pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            started.append(subprocess.Popen(command, cwd=self.folder, env=common | own, **pipes))
        return started

    def finish(self, started, codes=None, timeout=150):
        """(stdout, stderr) of each process; they must end with `codes`, or 0."""
        try:
            texts = [process.communicate(timeout=timeout) for process in started]
        finally:
            for process in started:
                process.kill()
        ends = [process.returncode for process in started]
        assert ends == (codes or [0] * len(ends)), "\n".join(out + err for out, err in texts)
        return texts

    def whole(self, *arguments, **options):
        return self.finish(self.start(*arguments, **options))

    def lines(self, workdir):
        path = self.folder / workdir / "metrics.jsonl"
        contents = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in contents.splitlines(keepends=True) if line.endswith("\n")]

    def losses(self, workdir):
        lines = self.lines(workdir)
        assert [line["step"] for line in lines] == list(range(1, STEPS + 1))  # every step, once
        return [line["loss"] for line in lines]

    def results(self, workdir):
        return json.loads((self.folder / workdir / "results.json").read_text())["rows"][0]["metrics"]

    def wait_for_step(self, workdir, step, started, seconds=200):
        end = time.monotonic() + seconds
        while not any(line["step"] >= step for line in self.lines(workdir)):
            assert time.monotonic() < end and all(process.poll() is None for process in started)
            time.sleep(0.02)


def by_hand(count):
    """The environment of each process of a run that is started by hand."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{found.getsockname()[1]}"
    names = (distributed.ADDRESS, distributed.COUNT, distributed.INDEX)
    return [dict(zip(names, (address, str(count), str(index)), strict=True)) for index in range(count)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return Run(tmp_path_factory.mktemp("hosts"))


@pytest.fixture(scope="module")
def one_device(run):
    run.whole("one", devices=1)
    losses = run.losses("one")
    assert losses[-1] < losses[0] / 2  # or there would be little to compare
    return losses


# Numbers -------------------------------------------------------------------------------------------------------------


@pytest.mark.thorough
@pytest.mark.parametrize(
    "mesh",
    [
        "data=2,fsdp=2,tensor=2",
        "context=2,tensor=4",  # both processes have all rows, each half of every row
    ],
)
def test_two_processes_compute_what_one_device_does(run, one_device, mesh):
    texts = run.whole(mesh, "--mesh", mesh, processes=2)
    np.testing.assert_allclose(run.losses(mesh), one_device, rtol=0, atol=1e-5)
    assert run.results(mesh) == run.results("one")
    assert f"step {STEPS}/{STEPS}" in texts[0][0] and "results.md" in texts[0][0]
    assert not re.search("step|loss|results|posjax", texts[1][0])  # process 0 alone tells


@pytest.mark.thorough
def test_pmap_on_eight_devices_computes_what_one_device_does(run, one_device):
    run.whole("pmap", "--parallel", "pmap", devices=8)
    np.testing.assert_allclose(run.losses("pmap"), one_device, rtol=0, atol=1e-5)


@pytest.mark.thorough
def test_two_processes_read_a_text_as_one_does(run):
    """The pipeline's shares, evaluation of states in parts while training and after it, and what the figures are made of."""
    rng = np.random.default_rng(0)
    (run.folder / "text").mkdir()
    for number in range(4):
        words = rng.choice(WORDS, size=(150, 6))
        (run.folder / "text" / f"{number}.txt").write_text("\n".join(" ".join(line) for line in words))
    flags = ["--task", "lm", "--data", "text", "--data_dir", "data", "--encoding", "rope + cope(8)", "--evaluate_every", "10"]
    run.whole("text-1", *flags, devices=1)
    run.whole("text-2", *flags, "--mesh", "data=2,fsdp=2,tensor=2", processes=2)
    one, two = ([line.get("evaluation/loss") for line in run.lines(name)] for name in ("text-1", "text-2"))
    assert [step for step, loss in enumerate(one, 1) if loss is not None] == [10, 20]
    for found, expected in (
        (run.losses("text-2"), run.losses("text-1")),
        (two[9::10], one[9::10]),
        (run.results("text-2")["bits_per_byte"]["16"], run.results("text-1")["bits_per_byte"]["16"]),
    ):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    files = [sorted(path.name.partition(".17")[0] for path in (run.folder / name).iterdir()) for name in ("text-1", "text-2")]
    assert files[0] == files[1] and "events.out.tfevents" in files[0]  # one file of events, as of one process


# Stops and losses ----------------------------------------------------------------------------------------------------


@pytest.mark.thorough
def test_a_signal_to_one_stops_all_after_the_same_step_and_any_number_goes_on(run, one_device):
    saved = Checkpoints(run.folder / "stopped" / "checkpoints")
    for processes, target in ((2, 1), (1, 0), (2, None)):
        before = saved.newest_good() or 0
        mesh = ["--mesh", "data=2,fsdp=2,tensor=2"] if processes > 1 else []
        started = run.start("stopped", *mesh, processes=processes)
        if target is None:
            run.finish(started)
            break
        run.wait_for_step("stopped", before + 3, started)
        started[target].send_signal(signal.SIGTERM)
        texts = run.finish(started, [distributed.RESTART] * processes)
        step = saved.newest_good()
        assert before + 3 <= step < STEPS
        assert f"interrupted by SIGTERM at step {step}; stopped is saved at step {step}. To resume, run:" in texts[0][0]
        assert [line["step"] for line in run.lines("stopped")] == list(range(1, step + 1))
        assert all("Traceback" not in err for _, err in texts)
    np.testing.assert_allclose(run.losses("stopped"), one_device, rtol=0, atol=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("lost", [0, 1])
def test_the_loss_of_one_is_told_and_one_process_goes_on(run, one_device, lost, monkeypatch):
    monkeypatch.setenv(distributed.HEARTBEAT, "10")  # what ends a wait for a process that was lost while all saved
    name = f"lost-{lost}"
    started = run.start(name, "--mesh", "fsdp=2,tensor=4", "--checkpoint_every", "5", processes=2)
    run.wait_for_step(name, 8, started)
    started[lost].kill()
    killed = time.monotonic()
    codes = [distributed.RESTART, distributed.RESTART]
    codes[lost] = -signal.SIGKILL
    _, err = run.finish(started, codes)[1 - lost]
    assert time.monotonic() - killed < 40
    saved = Checkpoints(run.folder / name / "checkpoints").newest_good()
    words = (
        f"posjax: another process of this run was lost; {name} is saved at step {saved}. To resume, run:\n  posjax train tiny.py"
    )
    assert words in err and "Traceback" not in err
    run.whole(name, devices=8)
    np.testing.assert_allclose(run.losses(name), one_device, rtol=0, atol=1e-5)


@pytest.mark.thorough
def test_a_process_that_is_silent_is_lost(run, monkeypatch):
    """As when a machine stands still: no connection breaks, and the other would wait for ever."""
    monkeypatch.setenv(distributed.HEARTBEAT, "5")
    started = run.start("silent", processes=2, devices=1)
    try:
        run.wait_for_step("silent", 2, started)
        os.kill(started[1].pid, signal.SIGSTOP)
        stopped = time.monotonic()
        started[0].wait(60)
    finally:
        os.kill(started[1].pid, signal.SIGKILL)
    _, err = run.finish(started, [distributed.RESTART, -signal.SIGKILL])[0]
    assert time.monotonic() - stopped < 40
    assert "another process of this run was lost; silent is not saved yet. To resume, run:" in err


# Without training -------------------------------------------------------------------------------------------------------

PAIR = """
    import contextlib, sys, time
    import jax, numpy as np
    from jax.sharding import Mesh
    from posjax.parallel import distributed as hosts
    from posjax.parallel.mesh import AXES, make_mesh, row_share, shard_batch
    from posjax.parallel.steps import jit_for_all

    hosts.join()
    index = jax.process_index()
    whole = np.arange(32.0).reshape(4, 8)
    turned = Mesh(np.array(jax.devices())[[0, 2, 3, 1]].reshape(4, 1, 1, 1), AXES)  # as of a torus: parts 0 and 3, 1 and 2
    for mesh, share, order in (
        (make_mesh(), (index, 2), [0, 1, 2, 3]),
        (make_mesh(context=2, tensor=2), (0, 1), [0, 1, 2, 3]),
        (make_mesh(context=4), (0, 1), [0, 1, 2, 3]),
        (turned, (index, 2), [0, 2, 3, 1]),
    ):
        assert row_share(mesh) == share
        rows = 4 // share[1]
        batch = shard_batch({"x": whole[share[0] * rows :][:rows], "w": np.ones(rows)}, mesh)
        assert batch["x"].shape == (4, 8) and batch["w"].shape == (4,) and not batch["x"].is_fully_addressable
        for shard in batch["x"].addressable_shards:
            np.testing.assert_array_equal(shard.data, whole[order][shard.index])
        product = jit_for_all(lambda x, y: (x * y).sum(1))(batch["x"], whole)
        np.testing.assert_array_equal(product, (whole[order] * whole).sum(1))
    with hosts.first_process_first():
        print("ready", flush=True)
    caught, step = [2] if index else [], 0
    with hosts.PreemptionSync(0) as sync:
        while True:
            step += 1
            time.sleep(0.02 + 0.05 * index)  # one is ahead of the other
            number = sync.signal_after(step, caught if step > 3 else [])
            if number:
                break
    print("stopped", number, step)
"""


def test_two_processes_share_a_batch_and_stop_at_one_step():
    xla = re.sub(r"_count=\d+", "_count=2", os.environ["XLA_FLAGS"])
    common = os.environ | {"XLA_FLAGS": xla, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", textwrap.dedent(PAIR)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    started = [subprocess.Popen(command, env=common | own, **pipes) for own in by_hand(2)]
    try:
        texts = [process.communicate(timeout=60) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], "\n".join(out + err for out, err in texts)
    said = [re.findall(r"ready|stopped \d+ \d+", out) for out, _ in texts]  # Gloo writes there too, in the middle of lines
    assert said[0] == said[1] and said[0][0] == "ready"
    assert said[0][1].startswith("stopped 2 ") and int(said[0][1].split()[-1]) > 4


class Device:
    def __init__(self, process_index, id):
        self.process_index, self.id, self.platform = process_index, id, "cpu"

    def __repr__(self):
        return f"{self.process_index}.{self.id}"


def mesh_over(processes, each, **axes):
    return make_mesh(devices=[Device(process, process * each + n) for process in range(processes) for n in range(each)], **axes)


@pytest.mark.parametrize(
    ("processes", "each", "axes", "shares"),
    [
        (1, 8, dict(fsdp=4, tensor=2), [(0, 1)]),
        (2, 4, dict(), [(0, 2), (1, 2)]),
        (2, 4, dict(data=2, fsdp=2, tensor=2), [(0, 2), (1, 2)]),
        (2, 4, dict(data=2, context=4), [(0, 2), (1, 2)]),
        (2, 4, dict(context=8), [(0, 1), (0, 1)]),
        (4, 2, dict(fsdp=2, context=4), [(0, 2), (0, 2), (1, 2), (1, 2)]),
        (4, 4, dict(data=2, fsdp=2, context=2, tensor=2), [(index, 4) for index in range(4)]),
    ],
)
def test_row_share(monkeypatch, processes, each, axes, shares):
    mesh = mesh_over(processes, each, **axes)
    found = []
    for index in range(processes):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        found.append(row_share(mesh))
    assert found == shares


def test_row_share_of_a_torus(monkeypatch):
    """Processes with two by two devices each, of four by four that are numbered row by row."""
    devices = np.array([Device(2 * (row // 2) + column // 2, 4 * row + column) for row in range(4) for column in range(4)])
    for shape, expected in (((16, 1, 1, 1), [0, 1, 2, 3]), ((4, 1, 4, 1), [0, 0, 1, 1]), ((1, 2, 2, 4), [0, 0, 1, 1])):
        for index in range(4):
            monkeypatch.setattr(jax, "process_index", lambda index=index: index)
            assert row_share(Mesh(devices.reshape(shape), AXES)) == (expected[index], len(set(expected)))


def test_row_share_errors(monkeypatch):
    words = r"either all rows of a batch or none, .* process 0 has parts \[0\] of 2, process 1 has parts \[0, 1\] of 2"
    with pytest.raises(ValueError, match=words):
        row_share(mesh_over(3, 2, context=3))
    monkeypatch.setattr(jax, "process_index", lambda: 2)
    with pytest.raises(ValueError, match="mesh must have devices of every process, got none of process 2"):
        row_share(mesh_over(2, 2))


@pytest.mark.parametrize("options", [{}, {"num_examples": 5}, {"task": "lm"}])
def test_shares_are_the_rows_of_the_batch_and_stand_at_the_same_place(options, tmp_path):
    (tmp_path / "a.txt").write_text("abcdefgh " * 200)
    (tmp_path / "b.txt").write_text("hgfedcba " * 200)
    data = {"data": str(tmp_path), "data_dir": str(tmp_path / "data")}
    config = Config(**{"task": "flip_flop", "seq_length": 16, "batch_size": 6, "eval_lengths": (1,), **data, **options})
    source = open_source(config)
    whole, *shares = (train_batches(config, source, 3, share) for share in ((0, 1), (0, 2), (1, 2)))
    for _ in range(3):
        batch, *parts = (next(each) for each in (whole, *shares))
        assert len(parts[0]["tokens"]) == 3
        jax.tree.map(lambda all_, *some: np.testing.assert_array_equal(all_, np.concatenate(some)), batch, *parts)
    states = [json.dumps(each.get_state()) for each in (whole, *shares)]
    other = train_batches(config, source, 3, (1, 2))
    other.set_state(json.loads(states[0]))  # of one process, on one of two
    batch, part = next(whole), next(other)
    np.testing.assert_array_equal(batch["tokens"][3:], part["tokens"])
    assert states[0] == states[1] == states[2]
    with pytest.raises(ValueError, match="batch_size must be a multiple of 4, the number of shares of processes, got 6"):
        train_batches(config, source, 0, (0, 4))


@pytest.mark.parametrize("stored", ["once", "for each process, as it was before"])
def test_a_checkpoint_of_several_processes_at_one_place_is_for_any_number(tmp_path, monkeypatch, stored):
    checkpoints, state = Checkpoints(tmp_path), {"x": jax.numpy.zeros(3)}
    with monkeypatch.context() as two:
        two.setattr("posjax.training.checkpoints._gather", lambda own: [own, own])
        if stored != "once":
            two.setattr("posjax.training.checkpoints._distinct", lambda states: states)
        checkpoints.save(1, state, {"at": 7})
    assert checkpoints.restore_latest(state).data_state == {"at": 7}


def test_a_checkpoint_of_processes_at_different_places_is_for_as_many(tmp_path, monkeypatch):
    checkpoints, state = Checkpoints(tmp_path), {"x": jax.numpy.zeros(3)}
    with monkeypatch.context() as two:
        two.setattr("posjax.training.checkpoints._gather", lambda own: [own, {"json": {"at": 8}}])
        checkpoints.save(1, state, {"at": 7})
    words = "saved by 2 processes at different positions in their data, so that 1 cannot resume from it; start 2 processes"
    with pytest.raises(CheckpointError, match=words):
        checkpoints.restore_latest(state)


# Joining -------------------------------------------------------------------------------------------------------------

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
HAND = {distributed.ADDRESS: "10.0.0.1:1234", distributed.COUNT: "2", distributed.INDEX: "1"}


@pytest.fixture
def joined(monkeypatch):
    """Calls ``distributed.join`` in an environment; what JAX was asked for."""
    for name in (distributed.ADDRESS, distributed.COUNT, distributed.INDEX, distributed.HEARTBEAT, "JOB_COMPLETION_INDEX", *SLURM):
        monkeypatch.delenv(name, raising=False)
    asked = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **options: asked.append((args, options)))
    monkeypatch.setattr(jax.config, "update", lambda *args: None)

    def join(environment):
        asked.clear()
        with monkeypatch.context() as patched:
            for name, value in environment.items():
                patched.setenv(name, value)
            distributed.join()
        return asked

    return join


def test_one_process_joins_nothing(joined):
    assert joined({}) == []
    assert joined(SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}) == []
    assert joined(SLURM | {distributed.COUNT: "1"}) == []
    assert joined(HAND | {distributed.COUNT: "1", distributed.INDEX: "0"}) == []
    assert joined({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}) == []  # a pod that is no indexed job


def test_clusters_are_found_and_variables_go_before(joined):
    options = dict(cluster_detection_method=None, initialization_timeout=300, heartbeat_timeout_seconds=60)
    assert joined(SLURM) == [((None, None, None), options)]
    assert joined(SLURM | {distributed.ADDRESS: "node1:99"}) == [(("node1:99", None, None), options)]
    options |= dict(cluster_detection_method="deactivate", heartbeat_timeout_seconds=9)
    assert joined(SLURM | HAND | {distributed.HEARTBEAT: "9"}) == [(("10.0.0.1:1234", 2, 1), options)]


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({distributed.ADDRESS: "a:1"}, "JAX_NUM_PROCESSES and JAX_PROCESS_ID must be set along with JAX_COORDINATOR_ADDRESS"),
        (
            {distributed.COUNT: "2", distributed.INDEX: "0"},
            "JAX_COORDINATOR_ADDRESS must be set along with JAX_NUM_PROCESSES, JAX_PROCESS_ID",
        ),
        (HAND | {distributed.INDEX: "2"}, "JAX_PROCESS_ID must lie in [0, JAX_NUM_PROCESSES=2), got 2"),
        (HAND | {distributed.COUNT: "two"}, "JAX_NUM_PROCESSES must be an integer, got 'two'"),
        (HAND | {distributed.COUNT: "0"}, "JAX_NUM_PROCESSES must be at least 1, got 0"),
        (HAND | {distributed.ADDRESS: "node1"}, "JAX_COORDINATOR_ADDRESS must be host:port, got 'node1'"),
        (HAND | {distributed.HEARTBEAT: "0"}, "POSJAX_HEARTBEAT_SECONDS must be at least 1, got 0"),
    ],
)
def test_wrong_variables_are_named(joined, environment, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        joined(environment)


@pytest.mark.thorough
def test_processes_that_do_not_meet_say_so(run):
    (environment, _) = by_hand(2)
    code = "from posjax.parallel import distributed as hosts; hosts._MEETING_SECONDS = 2; hosts.join()"
    common = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    process = subprocess.run([sys.executable, "-c", code], env=common, capture_output=True, text=True, timeout=60)
    assert process.returncode == 1
    assert f"posjax: the processes of this run did not connect within 2 s at {distributed.ADDRESS}=127.0.0.1:" in process.stderr
