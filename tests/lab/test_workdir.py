"""The folder of a run: what is stored in it, what may change, who may write, and how a trained run is opened."""

import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import posjax as pj
from posjax import cli
from posjax.encodings.spec import parse_encoding
from posjax.files import DamagedFile, read_json, write_atomically, write_json
from posjax.lab import run as runs
from posjax.lab import trained
from posjax.lab.config import Config, load_config
from posjax.lab.source import Source
from posjax.lab.workdir import StoredRun, facts_of, init_or_check_workdir, milestones, read_config, stored_runs
from posjax.training import lock
from posjax.training.checkpoints import Checkpoints
from posjax.training.lock import WorkdirInUse, locked

ROOT = Path(__file__).resolve().parents[2]
TEXT = "".join(f"the {word} encoding counts tokens\n" for word in ("rotary", "learned", "contextual", "tiny") * 60)
FIELDS = dict(
    data="text.txt", encoding="cope(4)", encodings=("cope(4)", "rope"), num_layers=1, embed_dim=16, num_heads=2, seq_length=8,
    batch_size=8, steps=4, warmup_steps=1, log_every=1, checkpoint_every=2, decay="constant", eval_lengths=(1,), eval_tokens=64,
)  # fmt: skip
FINAL = 8


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a text, a config, and a run of four steps in ``run``."""
    home = tmp_path_factory.mktemp("home")
    (home / "text.txt").write_text(TEXT)
    (home / "other.txt").write_text(TEXT[::-1])
    (home / "tiny.py").write_text(f"from posjax.lab.config import Config\n\ndef get_config():\n    return Config(**{FIELDS})\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setenv("POSJAX_DATA_DIR", str(home / "data"))
        patch.setenv("PYTHONPATH", str(ROOT))
        cli.main(["train", "tiny.py", "--workdir", "run"])
        yield home


@pytest.fixture
def run(home, run):
    """The command line, in that folder."""
    return run


def files(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def arrays(workdir, step):
    """The arrays of a checkpoint, optimizer included, read by Orbax alone."""
    from orbax.checkpoint import v1 as ocp

    state = ocp.load_checkpointables(Path(workdir).absolute() / "checkpoints" / str(step))["state"]
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
    return {name: np.asarray(leaf) for name, leaf in leaves.items() if name != "['key']"}  # of random numbers, constant in a run


def assert_equal_arrays(ours, theirs):
    assert ours.keys() == theirs.keys() and len(ours) > 8
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


# More steps ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def unevaluated(monkeypatch):
    """Leaves out the evaluation at the end of a run."""
    monkeypatch.setattr(runs, "evaluate", lambda *args: {"metrics": {"bits_per_byte": {}, "limit": None, "parameters": 0}})


def test_a_run_with_a_constant_rate_is_extended_bit_by_bit(run, unevaluated):
    shutil.copytree("run", "longer")
    code, out, err = run("train", "longer", "--steps", FINAL)
    assert code == 0 and "resuming longer from step 4 of 8" in out, err
    assert run("train", "tiny.py", "--steps", FINAL, "--workdir", "at once")[0] == 0
    assert_equal_arrays(arrays("longer", FINAL), arrays("at once", FINAL))
    assert read_config(Path("longer")).steps == FINAL
    before, after = (read_json(Path(name, "evaluation.json"))["evaluated"] for name in ("run", "longer"))
    assert after == before | {"step": FINAL}
    code, _, err = run("train", "longer", "--steps", 2)
    assert code == 2 and "steps is 8 there and 2 here" in err and "--init_from longer" in err


@pytest.mark.thorough
def test_a_run_with_wsd_goes_on_from_before_its_decay(run):
    """Checkpoints of the decay are kept as a run of their own; the extended run equals one of that length."""
    flags = ("--decay", "wsd", "--decay_steps", 2)
    short = ("train", "tiny.py", "--workdir", "wsd", *flags, "--checkpoint_every", 3)
    assert run(*short)[0] == 0
    assert Checkpoints("wsd/checkpoints").steps() == [2, 3, 4]
    config = load_config("wsd")
    assert milestones(config) == (2,)
    code, out, err = run("train", "wsd", "--steps", FINAL, "--decay_steps", 3)
    assert code == 0 and "resuming wsd from step 2 of 8" in out, err
    assert run("train", "tiny.py", "--workdir", "wsd at once", "--decay", "wsd", "--steps", FINAL, "--decay_steps", 3)[0] == 0
    assert_equal_arrays(arrays("wsd", FINAL), arrays("wsd at once", FINAL))
    rates = [json.loads(line)["learning_rate"] for line in Path("wsd/metrics.jsonl").read_text().splitlines()]
    np.testing.assert_allclose(rates, 1e-3 * np.array([1, 1, 1, 1, 1, 1, 0.7, 0.4]), rtol=1e-5)

    (aside,) = stored_runs("wsd/steps-4")
    assert aside.config.steps == 4 and Checkpoints("wsd/steps-4/checkpoints").steps() == [3, 4]
    assert len(Path("wsd/steps-4/metrics.jsonl").read_text().splitlines()) == 4
    assert run("evaluate", "wsd/steps-4")[0] == 0

    shutil.rmtree("wsd/checkpoints/5", ignore_errors=True)
    for step in Checkpoints("wsd/checkpoints").steps():
        if step < 6:
            shutil.rmtree(f"wsd/checkpoints/{step}")
    code, _, err = run("train", "wsd", "--steps", 20)
    assert code == 2 and "steps is 8 there and 20 here" in err and "are all from step 5 on" in err


@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_other_schedules_refuse_more_steps(tmp_path, decay):
    config = Config(workdir=str(tmp_path), steps=200, decay=decay)
    init_or_check_workdir(config)
    what = rf"steps is 200 there and 300 here; with decay='{decay}' every step depends on .*'constant' or 'wsd'.*--init_from"
    with pytest.raises(ValueError, match=what):
        init_or_check_workdir(dataclasses.replace(config, steps=300))


# Starting from another run -----------------------------------------------------------------------------------------------


def test_a_run_starts_from_the_parameters_of_another(run, unevaluated, monkeypatch):
    states = []

    def fit(step, state, batches, **options):
        states.append(state)
        return state

    monkeypatch.setattr(runs, "fit", fit)
    code, _, err = run("train", "tiny.py", "--init_from", "run", "--workdir", "from", "--ema_decay", 0.9)
    assert code == 0, err
    (state,) = states
    theirs = arrays("run", 4)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        name = f"['params']{jax.tree_util.keystr(path)}"
        np.testing.assert_array_equal(leaf, theirs[name], err_msg=name)
    assert all(bool((a == b).all()) for a, b in zip(*map(jax.tree.leaves, (state.params, state.ema)), strict=True))
    assert int(state.step) == 0 and not any(np.any(x) for x in jax.tree.leaves(state.opt_state) if x.ndim)
    assert read_config(Path("from")).init_from == "run"
    facts = read_json(Path("from/run.json"))["init_from"]
    assert facts["workdir"] == "run" and facts["step"] == 4 and re.fullmatch("[0-9a-f]{64}", facts["digest"])
    code, _, err = run("train", "tiny.py", "--init_from", "run", "--workdir", "wide", "--mlp_dim", 24)
    assert code == 2 and re.search(r"init_from must be a run with the same architecture, got 'run': \S+ is \[.*\] there and", err)
    code, _, err = run("train", "tiny.py", "--init_from", "nowhere", "--workdir", "wide")
    assert code == 2 and "init_from must be the workdir of a run, got 'nowhere'" in err
    assert not Path("wide").exists()


# Reading -------------------------------------------------------------------------------------------------------------------


def test_evaluating_a_run_needs_nothing_else_and_writes_nothing(run, home):
    before = files("run")
    code, out, err = run("evaluate", "run", "--eval_lengths", 1, 2, "--eval_tokens", 32, "--data", "other.txt")
    assert code == 0 and re.search(r"encoding +┃ +8 ┃ +16 ┃", out) and "Nothing was written" in out, err
    code, _, err = run("evaluate", "run", "--num_layers", 2)
    assert code == 2 and "num_layers is 1 there and 2 here" in err
    code, _, err = run("evaluate", "nowhere")
    assert code == 2 and "'nowhere'" in err
    assert files("run") == before


def test_results_are_compared_and_drawn_again(run, home):
    shutil.copytree("run", "drawn")
    for path in [*Path("drawn").glob("*.png"), Path("drawn/results.json"), Path("drawn/checkpoints/4/manifest.json")]:
        path.unlink()
    shutil.move("text.txt", "moved.txt")
    code, out, err = run("plot", "drawn")  # needs neither data nor a checkpoint
    shutil.move("moved.txt", "text.txt")
    assert code == 0 and Path("drawn/decay_curves.png").exists() and Path("drawn/results.json").exists(), err
    code, out, err = run("compare", "run", "drawn", "--out", "both")
    assert code == 0 and "cope(4) (run)" in out and "cope(4) (drawn)" in out and "evaluating" not in out, err
    rows = read_json(Path("both/results.json"))["rows"]
    assert [row["encoding"] for row in rows] == ["cope(4) (run)", "cope(4) (drawn)"] and rows[0]["metrics"] == rows[1]["metrics"]


def test_a_loaded_run_says_what_its_model_does(home):
    found = pj.load("run")
    text = "the tiny encoding"
    tokens = trained.tokens_of(found, text)
    assert tokens.tolist() == [found.tokenizer.bos, *text.encode()] and found.tokenizer.decode(tokens[1:]) == text
    assert found.step == 4 and found.config.encoding == "cope(4)" and found.config.workdir == "run"
    for ours, theirs in zip(jax.tree.leaves(found.params), jax.tree.leaves(found.params), strict=True):
        np.testing.assert_array_equal(ours, theirs)

    logits = np.asarray(found.model(tokens[None])[0], np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = [-log_p[index, token] for index, token in enumerate(tokens[1:])]
    np.testing.assert_allclose(trained.token_losses(found, text), expected, rtol=1e-4)

    maps = trained.attention_maps(found, text)
    assert maps.shape == (1, 2, len(tokens), len(tokens)) and maps.dtype == np.float32
    np.testing.assert_allclose(maps.sum(-1), 1.0, rtol=1e-5)
    assert not np.triu(maps, 1).any() and np.tril(maps).min() >= 0
    layers, gates, positions = trained.gates_and_positions(found, text)
    assert layers == [0] and gates.shape == positions.shape == maps.shape and 0 < gates.max() < 1
    np.testing.assert_allclose(positions, np.cumsum(gates[..., ::-1], -1)[..., ::-1] * np.tril(np.ones(maps.shape[2:])), rtol=1e-4)

    with pytest.raises(ValueError, match=r"encoding and seed must select one run of run, which holds 'cope\(4\)' with seed 0"):
        pj.load("run", seed=3)
    with pytest.raises(ValueError, match="path must be the workdir of a run, got 'nowhere'"):
        pj.load("nowhere")


def test_a_run_is_loaded_without_its_data(home):
    shutil.move("text.txt", "moved.txt")
    shutil.move("data", "moved data")
    try:
        assert len(trained.token_losses(pj.load("run"), "ab")) == 2
    finally:
        shutil.move("moved.txt", "text.txt")
        shutil.move("moved data", "data")


def test_the_config_of_a_run_is_a_config(run):
    config = load_config("run/config.json")
    assert dataclasses.asdict(config) == {**dataclasses.asdict(load_config("tiny.py")), "workdir": "run"}
    assert load_config("run") == config
    code, _, err = run("train", "run/config.json", "--workdir", "again", "--eval_lengths", 1000)
    assert code == 2 and "eval_lengths=(1000,)" in err and not Path("again").exists()


# The data are part of a run --------------------------------------------------------------------------------------------------


def test_changed_text_is_refused_and_the_same_text_elsewhere_is_not(run):
    shutil.copytree("run", "same")
    shutil.copy("text.txt", "copy.txt")
    before = files("same/checkpoints")
    code, out, err = run("train", "same", "--data", "copy.txt")
    assert code == 0 and "already trained" in out and read_config(Path("same")).data == "copy.txt", err
    Path("copy.txt").write_text(TEXT.replace("rotary", "rotory"))
    for data in ("copy.txt", "other.txt"):
        code, _, err = run("train", "same", "--data", data)
        assert code == 2 and "data: the training text differs from the one that the run in workdir same started with" in err
    code, _, err = run("evaluate", "same")
    assert code == 2 and "data: the validation text at 'copy.txt' differs" in err and "--data copy.txt" in err
    assert files("same/checkpoints") == before


# The user's own encodings --------------------------------------------------------------------------------------------------


@pytest.fixture
def mine(home, monkeypatch):
    """A package with encodings, in the folder of the text."""
    (home / "mine").mkdir(exist_ok=True)
    (home / "mine" / "slopes.py").write_text(
        "import posjax as pj\n\nvalue = pj.alibi()\n\n\ndef make(size=4):\n    return pj.chain(pj.rope(), pj.cope(size))\n"
    )
    (home / "mine" / "__init__.py").touch()
    monkeypatch.setattr(sys, "path", [*sys.path, str(home)])


@pytest.mark.thorough
def test_own_encodings_in_a_sweep_and_in_comparisons(run, mine):
    sweep = ("--sweep", "encoding=mine.slopes:make(3),mine.slopes:value", "--sweep", "learning_rate=1e-3,1e-4")
    flags = ("--steps", 1, "--workdir", "swept", "--task", "flip_flop", "--eval_tokens", 8)
    code, out, err = run("ablate", "tiny.py", *sweep, *flags)
    assert code == 0 and "mine.slopes:value, learning_rate=0.0001" in out, err
    compared = (
        "compare",
        "tiny.py",
        "--encodings",
        "mine.slopes:make(3)",
        "mine.slopes:value",
        "--steps",
        1,
        "--workdir",
        "compared",
    )
    code, out, err = run(*compared)
    assert code == 0, err
    for verb in (("evaluate",), ("generate", "--encoding", "mine.slopes:value", "--max_new_tokens", 1), ("plot",)):
        code, out, err = run(verb[0], "compared", *verb[1:])
        assert code == 0 and (verb[0] == "generate" or "mine.slopes:make(3)" in out), err
    assert pj.load("compared", encoding="mine.slopes:value").config.encoding == "mine.slopes:value"


def test_a_run_says_where_its_encoding_was_imported_from(home, mine, monkeypatch):
    config = load_config("tiny.py")
    config = dataclasses.replace(config, encoding="mine.slopes:make(3)", encodings=("mine.slopes:value",), workdir="own")
    parse_encoding(config.encoding)
    facts = facts_of(config, Source(258, 8))
    assert facts["imported_from"] == {"mine.slopes": str(home)}
    assert trained.fitting(config, StoredRun(Path("own"), config, facts)) == config

    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(home))])
    for name in [name for name in sys.modules if name.partition(".")[0] == "mine"]:
        monkeypatch.delitem(sys.modules, name)
    (home / "elsewhere").mkdir()
    monkeypatch.chdir(home / "elsewhere")
    where = f"the run imported it from {home}: start the command there, or add that folder to PYTHONPATH"
    with pytest.raises(ValueError, match=rf"encoding mine.slopes:make cannot be imported: .*{re.escape(where)}"):
        trained.fitting(config, StoredRun(Path("own"), config, facts))


# Damage ----------------------------------------------------------------------------------------------------------------------

DAMAGE = {"half": '{"task": "lm", "enc', "nan": '{"metrics": NaN}'}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_files_are_set_aside_and_made_again(run, damage):
    shutil.rmtree("damaged", ignore_errors=True)
    shutil.copytree("run", "damaged")
    names = ("config.json", "evaluation.json", "run.json")
    before = {name: read_json(Path("damaged", name)) for name in names}
    for name in names:
        Path("damaged", name).write_bytes(damage.encode("utf-8", "surrogateescape"))
    code, _, err = run("evaluate", "damaged")
    assert code == 2 and "damaged/config.json is damaged" in err
    with pytest.warns(UserWarning, match=r"evaluation.json is damaged: .*; it is kept as evaluation.json.damaged-1"):
        code, _, err = run("train", "tiny.py", "--workdir", "damaged")
    assert code == 0, err
    for name in names:
        kept = Path("damaged", f"{name}.damaged-1").read_bytes()
        assert kept == damage.encode("utf-8", "surrogateescape")
        after = read_json(Path("damaged", name))
        assert after == before[name]


def test_files_are_written_completely_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json(path, {"loss": float("nan"), "all": [float("inf"), 1.5]})
    assert json.loads(path.read_text()) == {"loss": None, "all": [None, 1.5]}
    before = path.read_bytes()

    def fail(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "other")
    assert path.read_bytes() == before and [one.name for one in tmp_path.iterdir()] == ["a.json"]
    with pytest.raises(DamagedFile, match="damaged: it lacks metrics"):
        read_json(path, "metrics")
    for damage in ("[1]", "", "\udcff", "null", '"text"', "Infinity"):
        path.write_bytes(damage.encode("utf-8", "surrogateescape"))
        with pytest.raises(DamagedFile, match=f"{path} is damaged: "):
            read_json(path)


# The lock ----------------------------------------------------------------------------------------------------------------------

HOLDER = """
import sys, time
from posjax.training import lock
if "none" in sys.argv: lock.fcntl = None
with lock.locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("kind", ["flock", "none"])
def test_a_second_process_is_refused_and_a_dead_one_leaves_no_lock(tmp_path, monkeypatch, kind):
    if kind == "none":  # a file system without locks
        monkeypatch.setattr(lock, "fcntl", None)
    workdir = tmp_path / "a" / "b"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(workdir), kind],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert holder.stdout.readline() == "held\n"
    who = rf"workdir {workdir} is in use by process {holder.pid} on \S+ since 20..-..-.. ..:..:..; stop it or use another --workdir"
    with pytest.raises(WorkdirInUse, match=who), locked(workdir):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (workdir / ".lock").exists()
    with locked(workdir), locked(workdir):  # one process may take it twice
        assert json.loads((workdir / ".lock").read_text())["pid"] == os.getpid()
    assert workdir.exists() and not list(workdir.iterdir())


def test_a_lock_without_a_heartbeat_is_stale(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "fcntl", None)
    owner = {"pid": 1, "host": "another", "since": 0.0, "beat": time.time() - 30, "token": "x"}
    (tmp_path / ".lock").write_text(json.dumps(owner))
    with pytest.raises(WorkdirInUse, match="process 1 on another"), locked(tmp_path):
        pass
    (tmp_path / ".lock").write_text(json.dumps(owner | {"beat": time.time() - 120}))
    with locked(tmp_path):
        pass


def test_a_workdir_that_stays_empty_is_removed(tmp_path):
    with locked(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    assert not (tmp_path / "a").exists()


@pytest.mark.thorough
@pytest.mark.parametrize("seed", range(int(os.environ.get("POSJAX_LOCK_ROUNDS", "1"))))
def test_of_three_processes_in_one_workdir_one_trains(home, seed):
    rng, workdir = random.Random(seed), f"raced-{seed}"
    command = [sys.executable, "-m", "posjax", "train", "tiny.py", "--workdir", workdir, "--steps", "60", "--log_every", "1"]
    processes = []
    for _ in range(3):
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        time.sleep(rng.uniform(0, 1.0))
    ends = [process.communicate(timeout=300) for process in processes]
    codes = [process.returncode for process in processes]
    assert sorted(codes) == [0, 1, 1], ends
    winner = processes[codes.index(0)]
    for code, (_, err) in zip(codes, ends, strict=True):
        if code:
            assert re.fullmatch(
                rf"posjax: workdir {workdir} is in use by process {winner.pid} on \S+ since .*; stop it or use another --workdir\n",
                err,
            )
    steps = [json.loads(line)["step"] for line in Path(workdir, "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 61)) and Checkpoints(f"{workdir}/checkpoints").newest_good() == 60
