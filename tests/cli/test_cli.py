"""The command line as a user meets it: kills, signals, repeats, damage and wrong words.

What needs a process of its own (signals, exit codes) has one; all else calls ``posjax.cli.main`` here.
Both share compiled programs.
"""

import dataclasses
import inspect
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

import posjax as pj
from posjax import cli
from posjax.attention.backends.compile_errors import translate_compile_errors
from posjax.cli.common import parse, print_table
from posjax.core.encoding import registered
from posjax.lab import config, named_configs, prompting, report, source
from posjax.lab import run as runs
from posjax.lab.pages import over_text
from posjax.lab.pages.over_text import NO_KEY, explorer_data
from posjax.lab.trained import attention_maps, gates_and_positions, token_losses
from posjax.plots import explorer
from posjax.plots.explorer.page import _unpacked
from posjax.training.checkpoints import Checkpoints

OPTIMIZED = True  # see conftest.py

ROOT = Path(__file__).resolve().parents[2]
STEPS = 30
CONFIG = f"""
from posjax.lab.config import Config

def get_config():
    return Config(
        data="text", encoding="rope + cope(8)", encodings=("learned", "rope"), seeds=(0, 1), num_layers=1,
        embed_dim=16, num_heads=2, seq_length=16, batch_size=8, steps={STEPS}, warmup_steps=3, log_every=1,
        checkpoint_every=7, eval_lengths=(1, 2),
        eval_tokens=512, dropout_rate=0.1,
    )
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a config and a text, where commands are run."""
    home = tmp_path_factory.mktemp("home")
    (home / "tiny.py").write_text(CONFIG)
    (home / "text").mkdir()
    rng = np.random.default_rng(0)
    words = [*"abcdefgh=()", "return", "range", "print"]
    for number in range(6):
        lines = rng.choice(words, size=(100, 12))
        (home / "text" / f"{number}.txt").write_text("\n".join(" ".join(line) for line in lines) + "\n")
    settings = {
        "jax_disable_most_optimizations": True,  # they cost more here than they save
        "jax_compilation_cache_dir": str(home / "compiled"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: jax.config.values[name] for name in settings}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setenv("POSJAX_DATA_DIR", str(home / "data"))
        patch.setenv("PYTHONPATH", str(ROOT))
        for name, value in settings.items():
            jax.config.update(name, value)
            patch.setenv(name.upper(), str(value))
        compilation_cache.reset_cache()
        yield home
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


@pytest.fixture
def run(home, run):
    """The command line, in that folder."""
    return run


def start(*argv):
    """The same command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "posjax", *map(str, argv)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(os.environ),
    )


def when(process, happened, limit=120):
    """Waits until something is seen to have happened."""
    end = time.monotonic() + limit
    while not happened():
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            raise AssertionError("\n".join(process.communicate()))
        time.sleep(0.002)


def steps(workdir):
    path = Path(workdir) / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def files(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def final(workdir):
    """The arrays of a workdir's checkpoint of the last step, read by Orbax alone."""
    from orbax.checkpoint import v1 as ocp

    state = ocp.load_checkpointables(Path(workdir).absolute() / "checkpoints" / str(STEPS))["state"]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state["params"])}


def results(workdir):
    rows = json.loads((Path(workdir) / "results.json").read_text())["rows"]
    return [{name: value for name, value in row.items() if name != "curve"} for row in rows]


@pytest.fixture(scope="module")
def straight(home):
    """A run that nothing happened to."""
    cli.main(["train", "tiny.py", "--workdir", "straight"])
    return home / "straight"


def assert_same_run(workdir, straight):
    ours, theirs = final(workdir), final(straight)
    assert ours.keys() == theirs.keys() and len(ours) > 8
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)  # bit for bit
    assert steps(workdir) == list(range(1, STEPS + 1))
    assert results(workdir) == results(straight)


# Kills, signals, repeats ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.thorough)])
def test_killed_at_any_step_and_started_again(run, straight, seed):
    at = random.Random(seed).randrange(15, 24)  # the checkpoint of step 7 is complete once that of step 14 has begun
    command = ("train", "tiny.py", "--workdir", f"killed-{at}")
    process = start(*command)
    when(process, lambda: len(steps(command[-1])) >= at)
    process.kill()
    process.communicate()
    assert at <= steps(command[-1])[-1] < STEPS, "the kill came too late to show anything"
    code, out, err = run(*command)
    assert code == 0, err
    assert "resuming" in out
    assert_same_run(command[-1], straight)


def test_interrupted(run, straight):
    process = start("train", "tiny.py", "--workdir", "it stops")
    when(process, lambda: len(steps("it stops")) >= 4)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    step = int(re.search(r"interrupted by SIGINT at step (\d+); it stops is saved at step \1. To resume, run:\n", out)[1])
    assert Checkpoints("it stops/checkpoints").steps()[-1] == step < STEPS
    name, *argv = shlex.split(out.splitlines()[-1])
    assert (name, argv) == ("posjax", ["train", "tiny.py", "--workdir", "it stops"])
    code, out, err = run(*argv)
    assert code == 0 and f"from step {step} of {STEPS}" in out
    assert_same_run("it stops", straight)


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_interrupted_outside_of_training(run, straight, monkeypatch, number, expected):
    def interrupt(*args, **options):
        os.kill(os.getpid(), number)
        time.sleep(1)

    monkeypatch.setattr(source, "open_source", interrupt)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job in the background ignores it
    code, _, err = run("train", "tiny.py", "--workdir", "straight")
    signal.signal(signal.SIGINT, before)
    assert code == expected and err.splitlines()[-1].strip() == "posjax train tiny.py --workdir straight"


def test_what_a_run_leaves_and_a_run_that_is_done(run, straight):
    left = {path.name for path in straight.iterdir()} - {path.name for path in straight.glob("events.out.tfevents*")}
    figures = {"loss_by_length.png", "loss_by_index.png", "attention_distance.png", "decay_curves.png", "cope_rope-cope-8.png"}
    results_of_all = {"evaluation.json", "results.json", "results.md"}
    assert left - figures == {"config.json", "run.json", "metrics.jsonl", "checkpoints", *results_of_all}
    assert left >= figures - {"cope_rope-cope-8.png"}  # which needs a line that is long enough
    (row,) = results(straight)
    assert row["encoding"] == "rope + cope(8)" and row["seed"] == 0
    assert set(row["metrics"]["bits_per_byte"]) == {"16", "32"} and row["metrics"]["limit"] is None
    before = files(straight / "checkpoints") | {path: path.read_bytes() for path in straight.glob("*.json*")}
    code, out, _ = run("train", "tiny.py", "--workdir", "straight")
    assert code == 0 and "already trained and evaluated" in out
    assert {path: path.read_bytes() for path in before} == before


def test_evaluate_gives_the_numbers_of_train(run, straight):
    trained, before = results(straight), files(straight)
    code, out, _ = run("evaluate", "tiny.py", "--workdir", "straight", "--out", "evaluated")
    assert code == 0 and results("evaluated") == trained
    assert f"{trained[0]['metrics']['bits_per_byte']['16']:.3f}" in out and files(straight) == before
    code, _, err = run("evaluate", "tiny.py", "--workdir", "never")
    assert code == 2 and "workdir must hold checkpoints, which posjax train and posjax compare write, got 'never'" in err
    assert not Path("never").exists()


def test_another_config_is_refused(run, straight):
    before = files(straight)
    code, _, err = run("train", "tiny.py", "--workdir", "straight", "--num_heads", "4", "--learning_rate", "0.5")
    assert code == 2 and "Traceback" not in err
    assert "num_heads is 2 there and 4 here, learning_rate is 0.001 there and 0.5 here; use another --workdir" in err
    assert files(straight) == before


def truncate(workdir, step):
    largest = max((Path(workdir) / "checkpoints" / str(step)).rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)


def test_damaged_checkpoints(run, straight):
    """The newest truncated: the one before it serves, and the end is the same. All truncated: refused, and nothing is touched."""
    shutil.copytree(straight, "damaged")
    for name in ("evaluation.json", "results.json"):
        Path("damaged", name).unlink()
    kept = Checkpoints("damaged/checkpoints").steps()
    assert kept == [21, 28, STEPS]
    truncate("damaged", STEPS)
    with pytest.warns(
        UserWarning, match=rf"checkpoint {STEPS} in .*damaged.* is damaged: .* bytes instead of .*; trying an older one"
    ):
        code, out, err = run("train", "tiny.py", "--workdir", "damaged")
    assert code == 0 and f"from step 28 of {STEPS}" in out
    assert_same_run("damaged", straight)

    Path("damaged", "evaluation.json").unlink()
    kept = Checkpoints("damaged/checkpoints").steps()
    for step in kept:
        truncate("damaged", step)
    before = files("damaged")
    with pytest.warns(UserWarning, match="is damaged"):
        code, _, err = run("train", "tiny.py", "--workdir", "damaged")
    assert code == 1 and f"none of the {len(kept)} checkpoints" in err and "Move them away to start over" in err
    assert all(f"checkpoint {step} in" in err for step in kept)
    assert files("damaged") == before


NO_ROOM = "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 16.37M of 16.00M vmem.\n\n  Program ..."


@pytest.mark.parametrize("verb", ["train", "compare", "evaluate", "generate"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_kernel_that_the_compiler_refuses(run, straight, home, monkeypatch, verb, wrapped):
    """jax raises what the compiler said, or an error of Mosaic's from it."""

    def refuse(*args, **options):
        try:
            raise jax.errors.JaxRuntimeError(NO_ROOM)
        except jax.errors.JaxRuntimeError as error:
            if wrapped:
                raise RuntimeError("Internal TPU kernel compiler error") from error
            raise

    module, name = (prompting, "stream") if verb == "generate" else (runs, "evaluate" if verb == "evaluate" else "fit")
    monkeypatch.setattr(module, name, refuse)
    workdir = "straight" if verb in ("evaluate", "generate") else "refused"
    code, _, err = run(verb, "tiny.py", "--workdir", workdir)
    assert code == 1
    what = "the attention kernel failed to compile on this device with implementation=None"
    how = r"rerun with implementation='xla_chunked'\."
    assert re.fullmatch(rf"posjax: {what}; {how} Compiler error: RESOURCE_EXHAUSTED: .* 16.00M vmem.\n", err)
    shutil.rmtree(home / "refused", ignore_errors=True)


@pytest.mark.parametrize(
    ("said", "implementation"),
    [("RESOURCE_EXHAUSTED: Out of memory allocating 17179869184 bytes.", "pallas"), (NO_ROOM, "xla_chunked")],
)
def test_errors_that_are_not_about_the_kernel_stay_what_they_are(said, implementation):
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"), translate_compile_errors(implementation):
        raise jax.errors.JaxRuntimeError(said)


@pytest.mark.thorough
def test_compare_goes_on_with_what_is_missing(run, home):
    command = ("compare", "tiny.py", "--workdir", "table")
    process = start(*command)
    when(process, lambda: len(steps("table/learned/seed-1")) >= 3)
    process.kill()
    process.communicate()
    done = Path("table/learned/seed-0/evaluation.json")
    before = done.stat().st_mtime_ns, done.read_bytes()
    assert not Path("table/results.json").exists() and not Path("table/learned/seed-1/evaluation.json").exists()
    code, out, err = run(*command)
    assert code == 0, err
    assert (done.stat().st_mtime_ns, done.read_bytes()) == before
    first, others = out.split("2 of 4: learned, seed 1")
    assert "table/learned/seed-0 is already trained and evaluated" in first and "tokens/s" not in first
    assert "4 of 4: rope, seed 1" in others and "already" not in others

    rows = results("table")
    assert [(row["encoding"], row["seed"]) for row in rows] == [("learned", 0), ("learned", 1), ("rope", 0), ("rope", 1)]
    assert all(set(row) == {"encoding", "seed", "metrics"} for row in rows)
    for row in rows:
        assert (row["metrics"]["bits_per_byte"]["32"] is None) == (row["encoding"] == "learned")
        assert steps(f"table/{row['encoding']}/seed-{row['seed']}") == list(range(1, STEPS + 1))
        assert Path(f"table/{row['encoding']}/seed-{row['seed']}/checkpoints/{STEPS}").is_dir()
    assert rows[2]["metrics"]["bits_per_byte"] != rows[3]["metrics"]["bits_per_byte"]
    assert "max 16" in Path("table/results.md").read_text() and "max 16" in out
    assert {path.name for path in Path("table").glob("*.png")} >= {
        "loss_by_length.png",
        "loss_by_index.png",
        "attention_distance.png",
        "decay_curves.png",
    }
    again = files("table")
    code, out, _ = run(*command)
    assert code == 0 and out.count("already trained and evaluated") == 4
    assert {path: data for path, data in files("table").items() if path.suffix != ".png"} == {
        path: data for path, data in again.items() if path.suffix != ".png"
    }


@pytest.mark.thorough
def test_flip_flop(run, home):
    """From five words to a coin, whose loss is ln 2 = 0.69."""
    flags = {"task": "flip_flop", "encoding": "cope(8)", "learning_rate": "0.02", "batch_size": 32}
    code, out, err = run("train", "tiny.py", "--workdir", "flip", *(f"--{name}={value}" for name, value in flags.items()))
    assert code == 0, err
    losses = [json.loads(line)["loss"] for line in Path("flip/metrics.jsonl").read_text().splitlines()]
    assert np.mean(losses[-5:]) < 0.8 and losses[0] > 1.2
    (row,) = results("flip")
    errors = row["metrics"]["error"]
    assert set(errors) == {"in distribution", "dense", "sparse"} and "error (%)" in out
    assert all(0 <= error < 70 for error in errors.values())


# Words ---------------------------------------------------------------------------------------------------------------


def test_list_and_help(run, monkeypatch):
    monkeypatch.chdir(ROOT)
    code, out, _ = run("list")
    assert code == 0
    assert all(re.search(rf"^  {name} +\S.{{10}}", out, re.MULTILINE) for name in registered())
    assert all(re.search(rf"^  {name} +\S.{{10}}", out, re.MULTILINE) for name in named_configs())
    code, out, _ = run("--help")
    assert code == 0 and all(f"  {verb} " in out for verb in cli.VERBS)
    assert run()[0] == 2
    code, out, _ = run("train", "quickstart", "--help")
    assert code == 0
    plain = " ".join(re.sub(r"[│╭╮╰╯─]|\x1b\[[0-9;]*m", " ", out).split())
    words = dict(re.findall(r"^  (\w+): (.+)$", inspect.getdoc(config.Config), re.MULTILINE))
    assert len(words) > 40
    for name, text in words.items():
        assert re.search(rf"--{name.replace('_', '[-_]')} .{{0,90}}{re.escape(text)}", plain), name


def test_few_steps_shorten_the_warmup_unless_it_is_given():
    flags = {"--steps 20": 0, "--steps=40": 1, "--steps 50": 50, "--batch_size 4": 50, "--steps 20 --warmup_steps 5": 5}
    assert {text: parse(["quickstart", *text.split()], "train").warmup_steps for text in flags} == flags


def wrong_files(home):
    (home / "empty").mkdir(exist_ok=True)
    (home / "binary.txt").write_bytes(b"text\0\xff\xfe" * 50)
    (home / "short.txt").write_text("a short text\n" * 3)
    (home / "dangling").mkdir(exist_ok=True)
    if not (home / "dangling" / "gone.txt").is_symlink():
        (home / "dangling" / "gone.txt").symlink_to("nowhere")
        (home / "dangling" / "there.txt").write_text("text " * 100)
    (home / "raises.py").write_text("def get_config():\n    raise KeyError('workdirr')")
    (home / "none.py").write_text("def get_config():\n    pass")
    (home / "file").write_text("mine")


TINY = ("train", "tiny.py")
# arguments, exit code, what the message holds: the argument, its value, what would work
WRONG = [
    (("trian", "tiny.py"), 2, r"verb must be train, compare, .*, got 'trian'; did you mean train\?"),
    (("train",), 2, "a config must come first, such as quickstart or .*, got nothing"),
    (("train", "--steps", "3"), 2, "a config must come first, .*, got '--steps'"),
    (("train", "tinny.py"), 2, r"config must be a Python file.*, got 'tinny.py'; did you mean tiny.py\?"),
    (("train", "text"), 2, "config must be a Python file.*, got 'text'"),
    (("train", "raises.py"), 2, "config raises.py failed to load at line 2: KeyError: 'workdirr'"),
    (("train", "none.py"), 2, "none.py must return a posjax.lab.config.Config, got NoneType"),
    ((*TINY, "--stepz", "3"), 2, r"Unrecognized options: --stepz.*; did you mean --steps\?"),
    ((*TINY, "--steps", "many"), 2, "--steps: .*'many'"),
    ((*TINY, "--tie_embeddings", "perhaps"), 2, "'perhaps' for argument '--tie-embeddings'.*'True', 'False'"),
    ((*TINY, "--task", "lmm"), 2, "'lmm' for argument '--task'.*'lm', 'mlm', 'flip_flop'"),
    ((*TINY, "--steps", "0"), 2, "steps must be an integer of at least 1, got 0"),
    ((*TINY, "--seeds"), 2, r"seeds must not be empty, got \(\)"),
    ((*TINY, "--warmup_steps", "99"), 2, r"warmup_steps must lie in \[0, steps=30\], got 99"),
    ((*TINY, "--learning_rate", "-1"), 2, "learning_rate must be positive, got -1.0"),
    ((*TINY, "--dropout_rate", "1.5"), 2, r"dropout_rate must lie in \[0, 1\), got 1.5"),
    ((*TINY, "--num_heads", "3"), 2, "num_heads must divide embed_dim=16 .*, got 3"),
    ((*TINY, "--num_kv_heads", "4"), 2, "num_kv_heads must divide num_heads=2, got 4"),
    ((*TINY, "--eval_lengths", "0"), 2, r"eval_lengths must be multiples of seq_length, integers of at least 1, got \(0,\)"),
    ((*TINY, "--tokenizer", "bpe", "--vocab_size", "9"), 2, "vocab_size must be an integer of at least 259, got 9"),
    ((*TINY, "--encoding", "roppe"), 2, "encoding must be made of .*, got 'roppe' in 'roppe'; did you mean 'rope'"),
    ((*TINY, "--encoding", "rope +"), 2, r"encoding must look like 'rope' or .*, got 'rope \+'"),
    ((*TINY, "--encoding", "cope(1)"), 2, "max_position must be .*at least 2, got 1"),
    ((*TINY, "--encoding", "rope / alibi"), 2, "encoding 'rope / alibi' does not fit .* num_layers=1, got 2"),
    ((*TINY, "--encoding", "rope(fraction=0.1)"), 2, r"fraction=0.1"),
    (
        (*TINY, "--encoding", "alibi", "--attention", "linear"),
        2,
        "encoding 'alibi' does not fit .* must act only by rotation.*alibi",
    ),
    ((*TINY, "--encoding", "cope(8)", "--task", "mlm"), 2, r"encoding 'cope\(8\)' does not fit .*is_causal.*"),
    ((*TINY, "--batch_size", "12"), 2, "batch_size must be a multiple of 8 on 8 devices with accumulate_steps=1, got 12"),
    ((*TINY, "--accumulate_steps", "3"), 2, "batch_size must be a multiple of 24 on 8 devices with accumulate_steps=3, got 8"),
    ((*TINY, "--accumulate_steps", "2", "--parallel", "pmap"), 2, "batch_size must be a multiple of 16 on 8 devices .*, got 8"),
    ((*TINY, "--data", "texxt"), 2, "data 'texxt' cannot be used: .*an existing file or folder.*; did you mean 'text'"),
    ((*TINY, "--data", "empty"), 2, "data 'empty' cannot be used: source must contain text"),
    (
        (*TINY, "--data", "binary.txt"),
        2,
        "data 'binary.txt' cannot be used: source must contain only UTF-8 text.*convert or move the file",
    ),
    ((*TINY, "--data", "dangling"), 1, "cannot read .*gone.txt .No such file.*make it readable or remove it"),
    (
        (*TINY, "--data", "short.txt", "--seq_length", "64"),
        2,
        "seq_length=64 does not fit .*'short.txt': length must be at most .*, got 64",
    ),
    ((*TINY, "--eval_lengths", "1", "900"), 2, r"eval_lengths=\(1, 900\) .* must fit the validation split.*at most \d+.*got 14400"),
    ((*TINY, "--data", "tfds:imdb_review"), 2, "data 'tfds:imdb_review' cannot be used: .*; did you mean 'imdb_reviews'"),
    ((*TINY, "--data_dir", "file/below"), 1, "file/below"),
    ((*TINY, "--task", "flip_flop", "--seq_length", "5"), 2, "length must be .*even.*got 5"),
    ((*TINY, "--workdir", "file"), 2, "workdir must be a writable folder, got 'file'"),
    (("compare", "tiny.py", "--encodings", "rope", "ropee"), 2, "got 'ropee' in 'ropee'; did you mean 'rope'"),
    (
        ("compare", "tiny.py", "--encodings", "rope", "rope / alibi"),
        2,
        "encoding 'rope / alibi' does not fit .*num_layers=1, got 2",
    ),
    (("compare", "tiny.py", "--encodings", "rope", "rope"), 2, "encodings must all differ, got 'rope' 2 times"),
    (
        ("evaluate", "tiny.py", "--workdir", "text"),
        2,
        "workdir must hold checkpoints, .* got 'text'",
    ),
]


@pytest.mark.parametrize(("argv", "code", "message"), WRONG, ids=[shlex.join(argv) for argv, _, _ in WRONG])
def test_wrong_words(run, home, monkeypatch, argv, code, message):
    wrong_files(home)
    monkeypatch.setattr(runs, "train", None)  # nothing is trained
    got, out, err = run(*argv)
    assert got == code
    assert re.search(message, err), err
    assert len(err.splitlines()) == 1 and err.startswith("posjax: ") and not out.strip()
    assert not (home / "runs").exists()  # and no workdir is left behind


# Runs that are not finite, and text of others ------------------------------------------------------------------------


def strict(text):
    """JSON as its standard has it, without NaN and Infinity."""
    return json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


@pytest.mark.parametrize("task", ["lm", pytest.param("flip_flop", marks=pytest.mark.thorough)])
def test_a_run_that_is_not_finite_does_not_succeed(run, home, task):
    (home / "posjax_not_finite.py").write_text(
        "import posjax as pj\n"
        "not_finite = pj.encoding('not_finite', init=lambda key, dims: {}, embed=lambda params, x, tokens: x / 0)\n"
    )
    flags = ("--encoding", "posjax_not_finite:not_finite", "--steps", 3, "--warmup_steps", 1)
    for _ in range(2):  # also when it is run again
        code, out, err = run("train", "tiny.py", "--workdir", f"lost-{task}", "--task", task, *flags)
        assert code == 1 and "ended with a loss that is not finite" in err.splitlines()[-1], err
        assert "not finite" in out and "nan" not in out
    folder = home / f"lost-{task}"
    metrics = strict((folder / "results.json").read_text())["rows"][0]["metrics"]
    assert None in metrics["bits_per_byte" if task == "lm" else "error"].values()
    strict((folder / "evaluation.json").read_text())
    assert strict((folder / "metrics.jsonl").read_text().splitlines()[-1])["loss"] is None


def test_text_of_others_is_escaped(run, home, capsys):
    (home / "hostile").mkdir(exist_ok=True)
    (home / "hostile" / "a.txt").write_text("hello\n" * 400)
    if not (link := home / "hostile" / "\x1b]0;pwned\x07.txt").is_symlink():
        link.symlink_to("/nonexistent")
    code, out, err = run("train", "tiny.py", "--data", "hostile", "--workdir", "hostile-run")
    assert code and "\x1b" not in out + err and r"\x1b]0;pwned\x07.txt" in err
    spec = "<img src=x> | \x1b[31m"
    metrics = {"error": {"a": 1.0}, "parameters": 1, "limit": None}
    table = report.markdown_table([{"encoding": spec, "seed": 0, "metrics": metrics}], "error")
    assert table.splitlines()[2:] == [r"| &lt;img src=x&gt; \| \\x1b[31m | 1.000 | 1 |"]
    print_table([spec], [["[red]not markup[/red]\x1b[2J"]])
    out = capsys.readouterr().out
    assert "\x1b" not in out and "<img src=x>" in out and "[red]not markup[/red]" in out


def within_half(page, expected):
    """Whether numbers of a page are others, rounded to float16."""
    return np.allclose(page, expected, rtol=2**-11, atol=2**-24)


def test_explore_shows_what_the_loaded_run_computes(run, straight, home):
    text = "return a b ( range )"
    code, out, err = run("explore", "straight", "--text", text, "--out", home / "pages" / "one.html")
    assert code == 0 and str(home / "pages" / "one.html") in out, err
    page, arrays = explorer.read_page(home / "pages" / "one.html")
    trained = pj.load(straight)
    maps, (layers, gates, positions) = attention_maps(trained, text), gates_and_positions(trained, text)
    losses = token_losses(trained, text)
    assert page["tokens"] == ["<bos>", *text] and page["kept"] is None and layers == [0]
    (entry,) = page["runs"]
    numbers = {name: arrays[number] for name, number in entry["layers"][0]["arrays"].items()}
    assert set(numbers) == {*("weight", "gate", "position", "bias", "rotation", "query_cos", "query_sin", "key_cos", "key_sin")}
    assert within_half(numbers["weight"], maps[0]) and maps[0].max() > 0.1
    assert within_half(numbers["gate"], gates[0]) and within_half(numbers["position"], positions[0])
    assert entry["loss"][0] is None and np.allclose(entry["loss"][1:], losses, rtol=1e-5)
    angles = np.arange(21)[:, None] * 10_000.0 ** (-np.arange(0, 8, 2) / 8)  # of RoPE with eight channels of a head
    assert np.allclose(numbers["query_cos"][:, 0], np.cos(angles), atol=1e-3)
    assert np.allclose(numbers["key_sin"][:, 0], np.sin(angles), atol=1e-3)
    assert len(arrays) == 7  # the phases of queries are those of keys
    assert dict(page["provenance"])["command"].startswith("posjax explore straight --text")


@pytest.mark.thorough
def test_a_small_page_keeps_the_largest_weights(straight):
    text, trained = "range ( a b c ) = " * 8, pj.load(straight)
    most = explorer.fixed_size("explorer") + 100_000 + 60 * 145 + 30_000
    data, arrays = explorer_data([trained], text, [[]], most_bytes=most)
    (layer,), maps = data["runs"][0]["layers"], attention_maps(trained, text)[0]
    assert arrays.size <= 30_000 and 1 <= data["kept"] < 145
    key, weight = (_unpacked(arrays.texts[n], **arrays.entries[n]) for n in (layer["arrays"]["key"], layer["arrays"]["weight"]))
    kept = key != NO_KEY
    assert within_half(weight[kept], np.take_along_axis(maps, np.where(kept, key, 0).astype(int), axis=-1)[kept])
    best = np.sort(maps, axis=-1)[..., -data["kept"] :].sum(-1)
    assert np.allclose(weight.astype(np.float32).sum(-1), best, atol=2e-3) and kept[:, -1].all()
    assert np.allclose(layer["share"], best.sum(1) / maps.sum((1, 2)), atol=2e-3) and min(layer["share"]) < 0.999


def test_report_shows_every_seed(run, straight, home):
    code, out, err = run("report", "straight", "--out", home / "report.html")
    assert code == 0 and "report.html" in out, err
    page, _ = explorer.read_page(home / "report.html")
    (row,) = strict((straight / "results.json").read_text())["rows"]
    summary, seeds = page["tables"]
    assert seeds["columns"] == ["setting", "seed", *row["metrics"]["bits_per_byte"]]
    assert [cell["value"] for cell in seeds["rows"][0][1:]] == [0, *row["metrics"]["bits_per_byte"].values()]
    assert summary["rows"][0][0] == "rope + cope(8)" and summary["rows"][0][-1]["value"] == row["metrics"]["parameters"]
    facts = dict(page["provenance"][0]["facts"])
    assert facts["digest of the train data"] == strict((straight / "run.json").read_text())["data"]["train"]
    assert {"versions", "hardware", "configuration", "to train again"} <= set(facts)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("explore", "posjax explore must be followed by the workdir of a run, got nothing"),
        ("explore nowhere", "runs to explore must be workdirs, which hold a config.json, got 'nowhere'"),
        ("report straight nowhere", "runs to report must be workdirs, which hold a config.json, got 'nowhere'"),
        ("explore straight straight straight", "posjax explore shows one run or two, got 3: "),
        ("explore straight --from_pretrained text", "--from_pretrained must stand alone, without a run, got straight"),
        ("explore straight --out text", "out must be a file to write, got 'text', which is a folder"),
        ("explore straight --out", "--out"),
        ("explore straight --layer 3", "--layer"),
    ],
)
def test_pages_are_refused_in_one_line(run, straight, command, message):
    code, out, err = run(*command.split())
    assert code == 2 and message in err and len(err.splitlines()) == 1 and not out.strip(), err


def test_a_text_that_a_page_cannot_show_is_refused(straight, monkeypatch):
    trained = pj.load(straight)
    with pytest.raises(ValueError, match="text must have at least one token, got an empty text"):
        explorer_data([trained], "", [[]])
    monkeypatch.setattr(over_text, "MOST_PAIRS", 2 * 8**2)
    with pytest.raises(ValueError, match="text must have at most 8 tokens with 2 heads, got 11"):
        explorer_data([trained], "0123456789", [[]])
    linear = dataclasses.replace(trained, config=dataclasses.replace(trained.config, encoding="rope", attention="linear"))
    with pytest.raises(ValueError, match="run must have softmax attention, because linear attention has no probabilities"):
        explorer_data([linear], "a", [[]])
    other = dataclasses.replace(trained, tokenizer=dataclasses.replace(trained.tokenizer, vocab_size=300))
    with pytest.raises(ValueError, match="runs to explore must have the same tokenizer"):
        explorer_data([trained, other], "a", [[], []])
