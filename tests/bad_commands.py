"""Bad command lines and config files from a seeded generator: right ones in which one thing is changed.

``bad_commands(seed)`` yields command lines and ``verdict`` runs one, up to the point at which it would train or compile. A command
passes if it ends with exit code 1 or 2 and one line that names what is wrong, or if it is right after all: the changed value is in
the domain of its flag, which is stated here by hand.

    PYTHONPATH=. python tests/bad_commands.py 1000 7        prints the faults among 1,000 command lines of seed 7
"""

import collections
import contextlib
import dataclasses
import io
import itertools
import math
import os
import random
import re
import shlex
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

MOST_SECONDS, MOST_WAITING, MOST_LETTERS = 10.0, 15, 600  # seconds of the processor, and of the clock on a busy machine
FLOAT32 = 3.4028234663852886e38


class Trained(Exception):
    """Raised in place of training, compiling or generating: the command was accepted."""


class Hangs(BaseException):
    """Raised in a command that has taken a minute."""


# Domains: whether the words after a flag are values that can work, on any machine ----------------------------------------------


def integer(least: int, most: int = 2**31 - 1, none: bool = False) -> Callable[[list[str]], bool]:
    def holds(words: list[str]) -> bool:
        if none and words == ["None"]:
            return True
        with contextlib.suppress(ValueError):
            return len(words) == 1 and least <= int(words[0]) <= most
        return False

    return holds


def number(holds_for: Callable[[float], bool], none: bool = False) -> Callable[[list[str]], bool]:
    def holds(words: list[str]) -> bool:
        if none and words == ["None"]:
            return True
        with contextlib.suppress(ValueError):
            (word,) = words
            value = float(word)
            return math.isfinite(value) and abs(value) <= FLOAT32 and holds_for(value)
        return False

    return holds


def choice(*choices: str) -> Callable[[list[str]], bool]:
    return lambda words: len(words) == 1 and words[0] in choices


def many(each: Callable[[list[str]], bool], differ: bool = True) -> Callable[[list[str]], bool]:
    return lambda words: bool(words) and all(each([word]) for word in words) and (not differ or len(set(words)) == len(words))


def never(words: list[str]) -> bool:
    return False


def writable(words: list[str]) -> bool:
    """A file in a folder that exists; "" is none."""
    return len(words) == 1 and "\0" not in words[0] and len(words[0]) < 255 and not words[0].startswith("/") and words[0] != "text"


positive, count = number(lambda x: x > 0), integer(1)
boolean = choice("True", "False")
FLAGS: dict[str, Callable[[list[str]], bool]] = {
    "task": choice("lm", "mlm", "flip_flop", "selective_copy", "counting"),
    "data": choice("text", "./text", "text/0.txt", "stdlib"),
    "tokenizer": choice("bytes", "bpe"),
    "vocab_size": integer(1, 2**20),
    "seq_length": integer(2, 10_000),
    "num_variables": integer(1, 26),
    "num_examples": integer(1, none=True),
    "batch_size": integer(1, 10**6),
    "encoding": choice("rope", "alibi", "cope(8)"),
    "seeds": many(integer(0)),
    "num_layers": integer(1, 10**6),
    "embed_dim": integer(1, 10**5),
    "num_heads": integer(1, 10**5),
    "num_kv_heads": integer(1, 10**5, none=True),
    "head_dim": integer(1, 10**5, none=True),
    "mlp_dim": integer(1, 10**7, none=True),
    "norm": choice("rmsnorm", "layernorm"),
    "norm_position": choice("pre", "post"),
    "activation": choice("gelu", "swiglu"),
    "tie_embeddings": boolean,
    "dropout_rate": number(lambda x: 0 <= x < 1),
    "remat": choice("none", "attention", "full"),
    "scan_layers": boolean,
    "compute_dtype": choice("float32", "bfloat16"),
    "attention": choice("softmax", "linear"),
    "local_window_size": integer(1, none=True),
    "logits_soft_cap": number(lambda x: x > 0, none=True),
    "implementation": choice("xla", "xla_chunked", "pallas", "None"),
    "steps": count,
    "optimizer": choice("adamw", "muon"),
    "learning_rate": positive,
    "warmup_steps": integer(0),
    "end_fraction": number(lambda x: 0 <= x <= 1),
    "weight_decay": number(lambda x: x >= 0),
    "beta1": number(lambda x: 0 <= x < 1),
    "beta2": number(lambda x: 0 <= x < 1),
    "clip_norm": number(lambda x: x > 0, none=True),
    "z_loss": number(lambda x: x >= 0),
    "ema_decay": number(lambda x: 0 <= x < 1, none=True),
    "accumulate_steps": count,
    "parallel": choice("jit", "pmap"),
    "mesh": choice("data=8", "data=4,fsdp=2", "data=2,tensor=4", "", "context=8"),
    "log_every": count,
    "checkpoint_every": count,
    "evaluate_every": integer(1, none=True),
    "eval_lengths": many(integer(1)),
    "eval_tokens": count,
}
PROMPTING = {
    "max_new_tokens": count,
    "temperature": number(lambda x: x >= 0),
    "top_k": integer(1, none=True),
    "top_p": number(lambda x: 0 < x <= 1, none=True),
    "seed": integer(0, 2**32 - 1),
    "prompt_file": choice("text/0.txt"),
}
VERBS = {
    "train": FLAGS,
    "compare": FLAGS | {"encodings": many(choice("rope", "alibi", "cope(8)"))},
    "ablate": FLAGS | {"runs_at_once": integer(1, none=True), "sweep": choice("learning_rate=1e-3,3e-4", "rope.theta=10,100")},
    "evaluate": FLAGS,
    "generate": PROMPTING,
    "plot": FLAGS,
    "plan": {
        name: FLAGS[name] for name in FLAGS if name not in ("data", "batch_size", "mesh", "num_layers", "seq_length")
    }  # of other machines
    | {"topology": choice("v5e:2x2", "h200:1x1x8"), "candidates": count, "out": writable},
}

# Changes -----------------------------------------------------------------------------------------------------------------------

VALUES = [
    ["0"], ["-1"], ["1.5"], ["nan"], ["inf"], ["-inf"], ["1e999"], ["1e3"], ["1e-60"], ["1e39"], [""], [" "], ["None"],
    ["none"],
    ["True"], ["yes"], ["2147483648"], ["-2147483649"], ["4294967296"], ["99999999999999999999"], ["1000000000"],
    ["10000000"],
    ["1", "2"], ["1", "1"], ["1", "x"], [], ["x"], ["rope"], ["0x10"], ["1,2"], ["[1]"], ["\x1b[31m"], ["\N{SNOWMAN}"],
    ["a" * 5000],
    ["--"], ["'3'"], ["3 "], ["+3"], ["-0"],
]  # fmt: skip
BY_FLAG = {
    "encoding": [
        "roppe", "rope +", "+ rope", "rope + + rope", "rope(", "rope)", "rope()()", "rope[0]", "rope.x", "cope", "cope(1)",
        "cope(-1)",
        "cope('a')", "cope(8, 8, 8, 8, 8, 8, 8, 8, 8)", "cope(8, clamp=1, clamp=2)", "cope(max_position=8, max_position=9)",
        "cope(10**9)",
        "cope(1000000000)", "cope(8.5)", "cope(True)", "cope(None)", "cope(size=8)", "rope(theta=0)", "rope(theta=-1)",
        "rope(theta=1e999)",
        "rope(theta='a')", "rope(fraction=2)", "rope(theta=[1])", "rope # a comment", "rope\n", "rope; import os",
        "__import__('os')",
        "rope / alibi", "/", "rope /", "posjax_missing:encoding", "posjax:nothing", "os:getcwd", "os:sep", "json:dumps", ":",
        "a:", ":a",
        "rope + " * 3000 + "rope", "(" * 300 + "rope" + ")" * 300, "cope(" * 200, "lambda: rope", "rope if 1 else alibi",
        "*rope", "1", "'rope'",
        "t5(num_buckets=100000000)", "t5(max_distance=0)", "alibi(slope=1e999)", "\x00", "rope\x00",
    ],
    "data": [
        "texxt", "/nonexistent", "/dev/null", "/dev/zero", "empty", "binary.txt", "dangling", "pipe", "socket", "loop",
        "tfds:", "tfds:nothing_here",
        "tfds:imdb_reviews:nothing", ":", "text\x00", "\x1b[31m", "~nobody_here/x", "text/0.txt/below", "stdlibb", "a" * 300,
    ],
    "mesh": [
        "data=3", "data=0", "data=-8", "data", "=8", "data=8,data=8", "dta=8", "data=8.0", "data=8 fsdp=1", "data=4",
    "fsdp=16", ",", "data=999999999999",
    ],
    "seeds": ["-1", "2147483648", "0.5", "1e3"],
    "sweep": [
        "foo", "foo=1", "=", "learning_rate", "learning_rate=", "learning_rate=,", "learning_rate=1e-3,1e-3",
        "learning_rate=a", "learning_rate=nan,1",
        "learning_rate=inf,1", "rope.thta=1,2", "ropp.theta=1,2", "seeds=1,2", "workdir=a,b", "steps=0,1",
        "encoding=rope,roppe", "encoding=rope,rope",
        "rope.theta=0,1", "num_heads=3,5", "cope.max_position=1,2", "learning_rate=(1", "rope.=1", ".theta=1",
    ],
    "topology": [
        "v5e", "v5e:", "v9x:2x2", "v5e:0x2", "v5e:-1x2", "v5e:axb", "h200", "h200:1x1", "h200:0x1x8", "gpu:1x1x8", ":", "2x2",
        "v5e:2x2x2x2x2",
    ],
    "out": ["text", "", "/dev/null/plans.json"],
    "temperature": ["-0.1", "1e-45"],
    "top_p": ["0", "1.1", "-1"],
    "prompt_file": ["/nonexistent", "text", "/dev/zero", "binary.txt", "pipe"],
}  # fmt: skip
CONFIGS = {
    "syntax": "def get_config(:\n    pass\n",
    "indentation": "def get_config():\nreturn 1\n",
    "null": "x = '\0'\n",
    "nothing": "x = 1\n",
    "not a function": "get_config = 3\n",
    "arguments": "def get_config(a):\n    return a\n",
    "none": "def get_config():\n    pass\n",
    "dictionary": "def get_config():\n    return {'steps': 3}\n",
    "class": "from posjax.lab.config import Config\ndef get_config():\n    return Config\n",
    "raises": "def get_config():\n    raise KeyError('steps')\n",
    "several lines": "def get_config():\n    raise RuntimeError('first\\nsecond\\x1b[31m')\n",
    "exit": "import sys\nsys.exit(0)\n",
    "exit later": "import sys\ndef get_config():\n    sys.exit()\n",
    "endless": "def get_config():\n    return get_config()\n",
    "import": "import posjax_missing\n",
    "old import": "from posjax.config import Config\n",
    "field": "from posjax.lab.config import Config\ndef get_config():\n    return Config(stepz=3)\n",
    "value": "from posjax.lab.config import Config\ndef get_config():\n    return Config(steps=0)\n",
    "type": "from posjax.lab.config import Config\ndef get_config():\n    return Config(steps='3')\n",
    "position": "from posjax.lab.config import Config\ndef get_config():\n    return Config('a', 'b', 'c', 'd', 'e', 'f')\n",
    "not finite": "from posjax.lab.config import Config\ndef get_config():\n    return Config(learning_rate=float('nan'))\n",
    "huge": "from posjax.lab.config import Config\ndef get_config():\n    return Config(data='text', batch_size=10**9)\n",
    "encoding": "from posjax.lab.config import Config\ndef get_config():\n    return Config(encoding=object())\n",
    "latin": b"# caf\xe9\ndef get_config(): pass\n",
    "binary": bytes(range(256)),
    "empty": "",
}
NAMES = [
    "", " ", "tinny.py", "tiny", "tiny.pyc", "text", "text/0.txt", "/dev/null", "/dev/zero", "quikstart", "quickstart.py",
    "\x1b[31m", "tiny.py\x00", "pipe",
]  # fmt: skip
TINY = """
from posjax.lab.config import Config

def get_config():
    return Config(
        data="text", data_dir="cache", encoding="rope", encodings=("rope", "alibi"), num_layers=1, embed_dim=16, num_heads=2,
        seq_length=16,
        batch_size=8, steps=3, warmup_steps=1, eval_lengths=(1,), eval_tokens=64,
    )
"""  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Command:
    """A command line with one change: the names of what is changed, and whether the command can still work."""

    argv: tuple[str, ...]
    names: tuple[str, ...]
    is_right: bool

    def __str__(self) -> str:
        return ascii(shlex.join(word if len(word) < 100 else f"{word[:90]}..." for word in self.argv))


def make_home(folder: Path) -> None:
    """Writes the files that the command lines name."""
    (folder / "tiny.py").write_text(TINY)
    (folder / "text").mkdir()
    for n in range(4):
        (folder / "text" / f"{n}.txt").write_text(f"file {n} counts tokens, and positions too\n" * 100)
    (folder / "empty").mkdir()
    (folder / "binary.txt").write_bytes(bytes(range(256)) * 40)
    (folder / "dangling").symlink_to("gone.txt")
    (folder / "loop").mkdir()
    (folder / "loop" / "again").symlink_to(folder / "loop")
    os.mkfifo(folder / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "socket"))
    for n, text in enumerate(CONFIGS.values()):
        (folder / f"config_{n}.py").write_bytes(text if isinstance(text, bytes) else text.encode())


def bad_commands(seed: int) -> Iterator[Command]:
    rng = random.Random(seed)
    for number in itertools.count():
        verb = rng.choice(["train", "train", "train", "compare", "ablate", "evaluate", "generate", "plot", "plan"])
        end = ("--workdir", f"never/{number}")
        kind = rng.random()
        if kind < 0.08:
            number_of = rng.randrange(len(CONFIGS))
            is_right = verb == "plan" and list(CONFIGS)[number_of] == "huge"  # for this machine alone
            yield Command((verb, f"config_{number_of}.py", *end), ("config", "batch_size", "workdir"), is_right)
        elif kind < 0.13:
            yield Command((verb, rng.choice(NAMES), *end), ("config",), False)
        elif kind < 0.18:
            flag = rng.choice(list(VERBS[verb]))
            place = rng.randrange(len(flag))
            word = flag[:place] + rng.choice(["", "zz", "\x1b", " "]) + flag[place + 1 :]
            yield Command((verb, "tiny.py", f"--{word}", "1", *end), ("options",), word.replace("-", "_") in VERBS[verb])
        elif kind < 0.2:
            yield Command(
                (rng.choice(["trian", "", "Train", "--train", "train.py", "\x1b[31m", "eval"]), "tiny.py", *end), ("verb",), False
            )
        else:
            flag = rng.choice(list(VERBS[verb]))
            special = BY_FLAG.get(flag, [])
            words = [rng.choice(special)] if special and rng.random() < 0.85 else rng.choice(VALUES)
            flag_form = rng.choice([f"--{flag}", f"--{flag.replace('_', '-')}"])
            names = (
                flag,
                flag.removesuffix("s"),
                *(word.partition("=")[0].rpartition(".")[2] for word in words if flag == "sweep"),
            )
            if verb in ("evaluate", "generate", "plot"):
                names += ("workdir",)  # which holds no run
            yield Command((verb, "tiny.py", flag_form, *words, *end), tuple(filter(None, names)), VERBS[verb][flag](words))


def verdict(command: Command) -> str | None:
    """Runs a command in the current folder, as ``make_home`` fills it; returns what is wrong with how posjax takes it, or None."""
    from posjax import cli
    from posjax.cli import plan
    from posjax.lab import prompting
    from posjax.lab import run as runs
    from posjax.lab.ablation import grids

    def trained(*args: object, **options: object) -> None:
        raise Trained

    out, error, code, accepted = io.StringIO(), None, 0, False

    def hangs(number: int, frame: object) -> None:
        raise Hangs(f"after {MOST_WAITING} s")

    start = time.process_time()
    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(MOST_WAITING)
    with contextlib.ExitStack() as stack:
        for module, name in ((runs, "train"), (grids, "_train_group"), (prompting, "stream"), (plan, "make_plans")):
            stack.enter_context(mock.patch.object(module, name, trained))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(out))
        try:
            cli.main(list(command.argv))
        except Trained:
            accepted = True
        except SystemExit as end:
            code = end.code
        except BaseException as raised:
            error = raised
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
    seconds, lines = time.process_time() - start, out.getvalue().strip().splitlines()
    if error is not None:
        return f"raises {type(error).__name__}: {str(error)[:200]!r}"
    if seconds > MOST_SECONDS:
        return f"takes {seconds:.0f} s of the processor"
    if accepted or code == 0:
        return None if command.is_right else f"is accepted in silence: {lines[-1:]}"
    if code not in (1, 2):
        return f"ends with exit code {code!r}"
    if "\x1b" in out.getvalue():
        return "prints control characters"
    if len(lines) != 1 or not lines[0].startswith("posjax: ") or len(lines[0]) > MOST_LETTERS:
        return f"says too much, {len(lines)} lines, {len(out.getvalue())} letters: {lines[:3]}"
    if command.is_right:  # it does not go with the other values
        return None
    names = {*command.names, *(name.replace("_", "-") for name in command.names), "unrecognized options"}
    if not any(name in lines[0].lower() for name in names):
        return f"does not name what is wrong: {lines[0][:200]}"
    return None


def main(count: int, seed: int) -> None:
    faults = collections.defaultdict(list)
    slowest = (0.0, "")
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        make_home(Path(folder))
        for _, command in zip(range(count), bad_commands(seed), strict=False):
            start = time.perf_counter()
            if (fault := verdict(command)) is not None:
                faults[command.names[0]].append(f"{command}\n        {fault}")
            slowest = max(slowest, (time.perf_counter() - start, str(command)))
    for flag, found in sorted(faults.items(), key=str):
        print(flag)
        for one in sorted(set(found)):
            print("   ", re.sub(r"\x1b", "", one))
    print(
        f"{sum(map(len, faults.values()))} of {count} of seed {seed} are wrong; the slowest took {slowest[0]:.1f} s: {slowest[1]}"
    )


if __name__ == "__main__":
    os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200, int(sys.argv[2]) if len(sys.argv) > 2 else 0)
