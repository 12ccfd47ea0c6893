"""Configurations, encodings as text, and results as files: every wrong word is answered with what would work."""

import dataclasses
import inspect
import json
import re
import sys

import jax.numpy as jnp
import pytest

import posjax as pj
from posjax.core.encoding import PositionalEncoding, registered
from posjax.encodings.spec import one_line, parametrize_spec, parse_encoding, slug, spec_of
from posjax.lab import named_configs, report
from posjax.lab.config import Config, load_config
from posjax.lab.workdir import RUN_ONLY, init_or_check_workdir, run_fingerprint

WRONG_FIELDS = [
    ({"task": "lmm"}, "task must be one of lm, mlm, .*, got 'lmm'"),
    ({"tokenizer": "words"}, "tokenizer must be 'bytes', 'bpe', or the path of a tokenizer.json or a .gguf file, got 'words'"),
    ({"decay": "step"}, "decay must be one of cosine, linear, constant, wsd, got 'step'"),
    ({"parallel": "xmap"}, "parallel must be one of jit, pmap, got 'xmap'"),
    ({"norm": "batchnorm"}, "norm must be .*rmsnorm.*, got 'batchnorm'"),
    ({"attention": "sparse"}, "attention must be .*softmax.*linear.*, got 'sparse'"),
    ({"steps": 0}, "steps must be an integer of at least 1, got 0"),
    ({"steps": 1.5}, "steps must be an integer of at least 1, got 1.5"),
    ({"seq_length": 1}, "seq_length must be an integer of at least 2, got 1"),
    ({"batch_size": -8}, "batch_size must be an integer of at least 1, got -8"),
    ({"accumulate_steps": 0}, "accumulate_steps must be an integer of at least 1, got 0"),
    ({"log_every": 0}, "log_every must be an integer of at least 1, got 0"),
    ({"checkpoint_every": 0}, "checkpoint_every must be an integer of at least 1, got 0"),
    ({"keep_last": 0}, "keep_last must be an integer of at least 1, got 0"),
    ({"evaluate_every": 0}, "evaluate_every must be an integer of at least 1, got 0"),
    ({"eval_tokens": 0}, "eval_tokens must be an integer of at least 1, got 0"),
    ({"eval_lengths": (1, 0)}, r"eval_lengths must be multiples of seq_length, integers of at least 1, got \(1, 0\)"),
    ({"eval_lengths": ()}, r"eval_lengths must not be empty, got \(\)"),
    ({"encodings": ()}, r"encodings must not be empty, got \(\)"),
    ({"seeds": ()}, r"seeds must not be empty, got \(\)"),
    ({"seeds": (1, 2, 2)}, r"seeds must all differ, got 2 2 times in \(1, 2, 2\)"),
    ({"encodings": ("rope", "rope")}, "encodings must all differ, got 'rope' 2 times"),
    ({"eval_lengths": (1, 1)}, r"eval_lengths must all differ, got 1 2 times in \(1, 1\)"),
    ({"learning_rate": float("inf")}, "learning_rate must be positive and finite, got inf"),
    ({"logits_soft_cap": float("inf")}, "logits_soft_cap must be a finite number or None, got inf"),
    ({"vocab_size": 10**9}, "vocab_size must be an integer from 1 to 1048576, got 1000000000"),
    ({"num_examples": 10**11}, "num_examples must be an integer from 1 .*synthetic task are held in memory"),
    ({"seeds": (-1,)}, r"seeds must lie in \[0, 2\*\*31\), got \(-1,\)"),
    ({"warmup_steps": 11, "steps": 10}, r"warmup_steps must lie in \[0, steps=10\], got 11"),
    ({"learning_rate": -1e-3}, "learning_rate must be positive, got -0.001"),
    ({"learning_rate": float("nan")}, "learning_rate must be positive, got nan"),
    ({"clip_norm": 0.0}, "clip_norm must be positive, or None to disable clipping, got 0.0"),
    ({"weight_decay": -0.1}, "weight_decay must be at least 0, got -0.1"),
    ({"z_loss": -1e-4}, "z_loss must be at least 0, got -0.0001"),
    ({"ema_decay": 1.0}, r"ema_decay must lie in \[0, 1\), or be None to keep no average, got 1.0"),
    ({"ema_decay": -0.1}, r"ema_decay must lie in \[0, 1\), or be None to keep no average, got -0.1"),
    ({"beta2": 1.0}, r"beta2 must lie in \[0, 1\), got 1.0"),
    ({"end_fraction": 2.0}, r"end_fraction must lie in \[0, 1\], got 2.0"),
    ({"dropout_rate": 1.5}, r"dropout_rate must lie in \[0, 1\), got 1.5"),
    ({"embed_dim": 30, "num_heads": 4}, "num_heads must divide embed_dim=30 if head_dim is None, got 4"),
    ({"num_heads": 4, "num_kv_heads": 3}, "num_kv_heads must divide num_heads=4, got 3"),
    ({"num_layers": 0}, "num_layers must be an integer of at least 1, got 0"),
    ({"tokenizer": "bpe", "vocab_size": 100}, "vocab_size must be an integer of at least 259, got 100"),
    ({"attention": "linear", "local_window_size": 4}, "local_window_size and .* must be None with attention='linear'"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG_FIELDS, ids=lambda value: " ".join(value) if isinstance(value, dict) else "")
def test_wrong_field(fields, message):
    with pytest.raises(ValueError, match=message):
        Config(**fields)


def test_every_field_is_explained():
    words = dict(re.findall(r"^  (\w+): (.+)$", inspect.getdoc(Config), re.MULTILINE))
    assert list(words) == [field.name for field in dataclasses.fields(Config)]
    assert all(len(text) > 5 for text in words.values())


@pytest.mark.parametrize("name", named_configs())
def test_configs_of_the_project(name, tmp_path, monkeypatch):
    """They are found by name from any folder, and by path; the docstring gives the command."""
    monkeypatch.chdir(tmp_path)
    config, path = load_config(name), named_configs()[name]
    assert config == load_config(str(path)) and config.workdir == f"runs/{name}"
    assert all(parse_encoding(spec) for spec in (config.encoding, *config.encodings))
    assert f"posjax compare {name}\n" in path.read_text() or f"posjax train {name}" in path.read_text()


WRONG_FILES = {
    "raises.py": ("1 / 0", "raises.py failed to load at line 1: ZeroDivisionError: division by zero"),
    "syntax.py": ("def get_config(:", "syntax.py failed to load at line 1: SyntaxError"),
    "nothing.py": ("x = 1", "nothing.py failed to load: AttributeError: .*get_config"),
    "dict.py": ("def get_config():\n    return {}", "dict.py must return a posjax.lab.config.Config, got dict"),
    "field.py": (
        "from posjax.lab.config import Config\ndef get_config():\n    return Config(stepz=1)",
        "field.py failed to load at line 3: TypeError: .*'stepz'",
    ),
    "value.py": (
        "from posjax.lab.config import Config\ndef get_config():\n    return Config(steps=0)",
        "value.py failed to load at line 3: ValueError: steps must be an integer of at least 1, got 0",
    ),
    "config.txt": ("x", "config must be a Python file, or a name .*, such as quickstart, got '.*config.txt'"),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_wrong_config_file(tmp_path, name):
    code, message = WRONG_FILES[name]
    (tmp_path / name).write_text(code)
    with pytest.raises(ValueError, match=message):
        load_config(str(tmp_path / name))


def test_config_file_with_postponed_annotations_and_a_sibling(tmp_path, monkeypatch):
    """As Python runs a script: dataclasses find the module of a class, and a file beside it can be imported."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "posjax_shared_fields.py").write_text("STEPS = 40\n")
    (tmp_path / "mine.py").write_text(
        "from __future__ import annotations\nimport dataclasses\nfrom posjax.lab.config import Config\n"
        "from posjax_shared_fields import STEPS\n@dataclasses.dataclass\nclass Mine:\n    width: int = 32\n"
        "def get_config():\n    return Config(embed_dim=Mine().width, steps=STEPS, warmup_steps=4)\n"
    )
    config = load_config(str(tmp_path / "mine.py"))
    assert (config.embed_dim, config.steps) == (32, 40)
    assert sys.path[0] != str(tmp_path) and sys.path[-1] == str(tmp_path)


def test_missing_config_file(tmp_path):
    (tmp_path / "quickstart.py").write_text("")
    with pytest.raises(ValueError, match=r"config must be a Python file.*, got '.*quikstart.py'; did you mean .*/quickstart.py\?"):
        load_config(str(tmp_path / "quikstart.py"))
    with pytest.raises(ValueError, match=r"config must be a Python file.*, got '/no/such/place.py'$"):
        load_config("/no/such/place.py")
    with pytest.raises(ValueError, match=r"config must be a Python file.*, got 'quikstart'; did you mean quickstart\?"):
        load_config("quikstart")
    with pytest.raises(ValueError, match=r"config must be a Python file.*, got 'configs/counting.py'; did you mean counting\?"):
        load_config("configs/counting.py")


def test_workdir_belongs_to_one_config(tmp_path):
    config = Config(workdir=str(tmp_path / "a" / "b"), steps=200)
    assert init_or_check_workdir(config) == tmp_path / "a" / "b"
    stored = tmp_path / "a" / "b" / "config.json"
    assert json.loads(stored.read_text())["steps"] == 200
    init_or_check_workdir(dataclasses.replace(config, checkpoint_every=7, log_every=3, parallel="pmap"))  # how it runs, not what
    before = stored.read_bytes()
    assert json.loads(before)["parallel"] == "pmap"
    assert json.loads(before)["checkpoint_every"] == 7
    wrong = r"steps is 200 there and 300 here, beta1 is 0.9 there and 0.8 here; use another --workdir, or remove it"
    with pytest.raises(ValueError, match=wrong):
        init_or_check_workdir(dataclasses.replace(config, steps=300, beta1=0.8))
    assert stored.read_bytes() == before


def test_a_workdir_that_is_older_than_a_field_has_its_default(tmp_path):
    config = Config(workdir=str(tmp_path), steps=200)
    init_or_check_workdir(config)
    fields = json.loads((tmp_path / "config.json").read_text())
    later = {"optimizer", "z_loss", "ema_decay", "validation_data", "include", "exclude", "text_key", "init_from", "decay_steps"}
    later |= {"from_pretrained", "trainable"}
    old = {name: value for name, value in fields.items() if name not in later}
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert init_or_check_workdir(config) == tmp_path
    wrong = "optimizer is 'adamw' there and 'muon' here, z_loss is 0.0 there and 0.1 here, ema_decay is None there and 0.5 here"
    with pytest.raises(ValueError, match=wrong):
        init_or_check_workdir(dataclasses.replace(config, optimizer="muon", z_loss=0.1, ema_decay=0.5))
    assert set(run_fingerprint(config)) == set(old) - RUN_ONLY  # of which a grid makes the names of its folders
    assert run_fingerprint(dataclasses.replace(config, z_loss=0.1)) == run_fingerprint(config) | {"z_loss": 0.1}


def test_workdir_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"workdir must be a writable folder, got '.*/file'"):
        init_or_check_workdir(Config(workdir=str(tmp_path / "file")))
    assert (tmp_path / "file").read_text() == "mine"


# Encodings as text ---------------------------------------------------------------------------------------------------


def test_encodings_as_text():
    assert parse_encoding("rope").name == "rope"
    assert parse_encoding(" rope + cope( 64 ) + alibi ").name == "rope+cope+alibi"
    assert parse_encoding("cope(max_position=8, gates='keys', scaled=True)").name == "cope"
    assert parse_encoding("rope(scaling=llama3_scaling)") == parse_encoding("rope(1e4, 1.0, 'half', llama3_scaling(8.0))")
    layers = parse_encoding("cope(8) / identity / cope(8)")
    assert [layer.name for layer in layers] == ["cope", "identity", "cope"] and layers[0] is layers[2]
    for name in registered():
        text = f"{name}(8)" if name.startswith("cope") else "mrope((2, 1, 1))" if name == "mrope" else name
        assert isinstance(parse_encoding(text), PositionalEncoding)
        assert one_line(name).endswith(".") or one_line(name).endswith(":") or len(one_line(name)) > 20


def test_text_of_encodings():
    """And back; in a configuration, the value itself becomes text."""
    long = "longrope_scaling(short_factor=(1.0, 2.0), long_factor=(1.0, 4.0), original_max_length=64, factor=2.0)"
    for text in (
        "rope",
        "rope(theta=500.0) + cope(max_position=64, gates='keys')",
        "cope(max_position=8) / identity",
        "rope(scaling=yarn_scaling(factor=4.0, original_max_length=2048)) + cope(max_position=64)",
        f"rope(fraction=0.5, scaling={long}, channels='last')",
    ):
        assert spec_of(parse_encoding(text)) == text
    values = Config(encoding=pj.chain(pj.rope(), pj.cope(64)), encodings=(pj.rope(), "alibi", [pj.t5(), pj.identity()]))
    assert values.encoding == "rope + cope(max_position=64)"
    assert values.encodings == ("rope", "alibi", "t5 / identity")
    for encoding in (pj.encoding("mine", attend=pj.alibi().attend), pj.rope(jnp.float32(3.0))):
        with pytest.raises(ValueError, match=r"encoding must have a text form, got .*package.module:name"):
            Config(encoding=encoding)


def test_encodings_of_a_module(tmp_path, monkeypatch):
    lines = (
        "import posjax as pj",
        "value = pj.chain(pj.rope(), pj.alibi())",
        "def made(theta=3.0): return pj.rope(theta)",
        "number = 7",
        "def wrong(): return 7",
    )
    (tmp_path / "my_encodings.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert parse_encoding("my_encodings:value + cope(4)") == pj.chain(pj.chain(pj.rope(), pj.alibi()), pj.cope(4))
    assert parse_encoding("my_encodings:made(5.0) / my_encodings:made") == (pj.rope(5.0), pj.rope(3.0))
    assert parse_encoding("posjax.encodings.rotary:Rope(theta=5.0)") == pj.rope(5.0)
    assert parametrize_spec("my_encodings:made(5.0) + rope") == ("my_encodings:made(5.0) + rope(theta=_0)", (10_000.0,))
    for spec, message in {
        "my_encodings:absent": "encoding my_encodings:absent cannot be imported: .*absent",
        "no_such_module:x": "encoding no_such_module:x cannot be imported: No module named",
        "my_encodings:number": "my_encodings:number must be an encoding, or a class or function that returns one, got 7",
        "my_encodings:wrong": "my_encodings:wrong must return a PositionalEncoding, got 7",
        "my_encodings:made(1, 2)": r"my_encodings:made must be called as my_encodings:made\(theta=3.0\)",
    }.items():
        with pytest.raises(ValueError, match=message):
            parse_encoding(spec)


WRONG_SPECS = [
    ("ropee", "encoding must be made of identity, .*, got 'ropee' in 'ropee'; did you mean 'rope'?"),
    ("rope + copee(64)", "got 'copee' in 'rope .*; did you mean 'cope'?"),
    ("zzz", "got 'zzz' in 'zzz'; posjax list shows all"),
    ("rope(", r"encoding must look like 'rope' or 'rope \+ cope\(64\)', got 'rope\('"),
    ("", "encoding must look like .*, got ''"),
    ("rope +", r"encoding must look like .*, got 'rope \+'"),
    ("rope - alibi", "encoding must look like .*, got 'rope - alibi'"),
    ("rope / / alibi", "encoding must look like .*, got 'rope / / alibi'"),
    ("rope.x", "encoding must look like .*, got 'rope.x'"),
    ("64", "encoding must look like .*, got '64'"),
    ("rope(**{})", "encoding must look like .*, got 'rope"),
    (
        "cope(max_positions=8)",
        r"cope must be called as cope\(max_position.*got 'cope\(max_positions=8\)': missing .*'max_position'",
    ),
    ("cope(len('a'))", r"arguments of cope must be plain values such as 64 or 'keys'"),
    ("cope(1)", "max_position must be .*at least 2, got 1"),
    ("cope(8, gates='sums')", "gates must be .*'keys'.*, got 'sums'"),
    ("cope('a')", "max_position must be .*, got 'a'"),
    ("rope(theta='a')", "theta.*'a'"),
    ("rope(theta=-1)", "theta must be .*, got -1"),
    ("rope(fraction=2)", "fraction must .*, got 2"),
    ("rope(pairing='third')", "pairing must be .*, got 'third'"),
    ("t5(num_buckets=1)", "num_buckets must .*, got 1"),
    ("rope(scaling=yarn_scalin(4.0))", r"arguments of rope must be .* got 'yarn_scalin\(4.0\)'; did you mean 'yarn_scaling'\?"),
    ("rope(scaling=rope())", r"arguments of rope must be plain values .* or one of linear_scaling, .* got 'rope\(\)'"),
    ("rope(scaling=linear_scaling(cope(3)))", r"arguments of linear_scaling must be plain values .*got 'cope\(3\)'"),
    ("rope(scaling=linear_scaling(**{}))", r"arguments of rope must be .*got 'linear_scaling\(\*\*\{\}\)'"),
    ("rope(scaling=linear_scaling(factor=2.0, factor=3.0))", "linear_scaling must have each argument once, got 'factor' 2 times"),
    ("rope(scaling=linear_scaling(0.5))", "encoding .*: factor must be at least 1, got 0.5"),
    (
        "rope(scaling=yarn_scaling(4.0, original_max_len=8))",
        r"yarn_scaling must be called as .*; did you mean 'original_max_length'\?",
    ),
    ("rope(scaling=4.0)", r"scaling must be a scaling such as linear_scaling\(4.0\), or None, got 4.0"),
    ("rope(theta=linear_scaling(2.0))", r"theta must be .*got linear_scaling\(factor=2.0\)"),
    ("linear_scaling(4.0)", r"encoding must be made of .*got 'linear_scaling'"),
]


@pytest.mark.parametrize(("spec", "message"), WRONG_SPECS, ids=[spec for spec, _ in WRONG_SPECS])
def test_wrong_encoding(spec, message):
    with pytest.raises(ValueError, match=message):
        parse_encoding(spec)


def test_names_for_folders():
    assert slug("cope(64)") == "cope-64"
    assert slug("rope + cope(64)") == "rope-cope-64"
    assert slug("rope / cope(64)") == "rope-then-cope-64"
    long = [f"rope(scaling=longrope_scaling({(1.5,) * 48}, {(last,) * 48}, 4096))" for last in (2.5, 3.5)]
    assert all(len(slug(spec)) < 160 for spec in long) and slug(long[0]) != slug(long[1])


# Results as files ----------------------------------------------------------------------------------------------------


def row(encoding, seed, values, limit=None, parameters=1234):
    metrics = {"bits_per_byte": dict(zip(("16", "32"), values, strict=True)), "limit": limit, "parameters": parameters}
    return {"encoding": encoding, "seed": seed, "metrics": metrics, "decay": {"distance": [0, 1, 2], "score": [[0, -1, -2]]}}


def test_results(tmp_path):
    rows = [row("rope", 0, (2.0, 3.0)), row("rope", 1, (4.0, 3.5)), row("learned", 0, (1.5, None), limit=16)]
    report.write_results(rows, "bits_per_byte", tmp_path, "bits per byte")
    stored = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert stored == [{name: r[name] for name in ("encoding", "seed", "metrics")} for r in rows]
    table = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in (tmp_path / "results.md").read_text().splitlines()[2:]
    ]
    assert table[0] == ["encoding", "16", "32", "parameters"]
    assert table[2] == ["rope", "3.000 ± 1.414", "3.250 ± 0.354", "1,234"]  # sqrt(2) and sqrt(2) / 4: n - 1 in the divisor
    assert table[3] == ["learned", "1.500", "max 16", "1,234"]


def test_figures_of_any_encoding(tmp_path):
    line = {"layer": 1, "text": "x = 1", "gates": [[0.5] * 5] * 2, "positions": [[2.5, 2, 1.5, 1, 0.5]] * 2}
    rows = [row("cope(8) / identity", 0, (2.0, 3.0)) | {"line": line}]
    names = {path.name for path in report.write_figures(rows, "bits_per_byte", "bits per byte", 16, tmp_path)}
    assert names == {"loss_by_length.png", "decay_curves.png", "cope_cope-8-then-identity.png"}
    for name in names:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG") and (tmp_path / name).stat().st_size > 5000
