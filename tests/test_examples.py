"""Each example, one file and one registration, equals its formula and runs in every backend, in decoding and in the trainer."""

import functools
import importlib.util
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backends import BACKENDS
from suite import normal

import posjax as pj
from posjax.attention import kv_cache
from posjax.attention.backends import reference
from posjax.attention.call import prepare
from posjax.attention.prefix_sums import with_prefix_sums
from posjax.core import encoding as registry
from posjax.lab import run as runs
from posjax.lab.config import Config
from posjax.lab.source import open_source

FOLDER = pathlib.Path(__file__).parents[1] / "examples"
B, T, N, K, H, D = 2, 136, 4, 2, 8, 12


@pytest.fixture(scope="module", autouse=True)
def examples():
    """The classes of the examples by name, in the registry while this module runs."""
    before = dict(registry._REGISTRY)
    for path in sorted(FOLDER.glob("*.py")):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    yield dict(registry._REGISTRY)
    registry._REGISTRY.clear()
    registry._REGISTRY.update(before)


def softmax_of(scores, value):
    weights = np.where(np.tril(np.ones(scores.shape[2:], bool)), np.exp(scores - scores.max(-1, keepdims=True)), 0.0)
    return np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), np.repeat(value, N // K, axis=2))


def products(query, key):
    return np.einsum("btnh,bsnh->bnts", query, np.repeat(key, N // K, axis=2)) / math.sqrt(H)


def root_distance(query, key, hidden, params):
    distance = np.abs(np.subtract.outer(np.arange(T), np.arange(T)))
    return products(query, key) - params["slope"][:, None, None] * np.sqrt(distance)


def forgetting_gate(query, key, hidden, params):
    log_f = -np.logaddexp(0.0, -(hidden @ params["kernel"] + params["bias"]))
    sums = np.cumsum(np.moveaxis(log_f, 1, 2), -1)
    return products(query, key) + sums[..., :, None] - sums[..., None, :]


def amplified_rope(query, key, hidden, params):
    phase = np.arange(T)[:, None] * 10_000.0 ** (-np.arange(0, H, 2) / H)

    def turned(x):
        pair = (x[..., : H // 2] + 1j * x[..., H // 2 :]) * 1.1 * np.exp(1j * phase)[:, None]
        return np.concatenate([pair.real, pair.imag], -1)

    return products(turned(query), turned(key))


FORMULAS = {f.__name__: f for f in (root_distance, forgetting_gate, amplified_rope)}


@functools.cache
def case(name):
    encoding = registry._REGISTRY[name]()
    params = encoding.init(jax.random.key(0), pj.Dims(N, H, D, num_kv_heads=K))
    params = jax.tree.map(lambda leaf: leaf + 0.3 * normal(9, *leaf.shape), params)
    query, key, value, hidden = normal(1, B, T, N, H), normal(2, B, T, K, H), normal(3, B, T, K, H), normal(4, B, T, D)
    return encoding, (query, key, value, hidden, params)


@functools.cache
def answers(name, backend):
    """The output, and the gradients of all operands."""
    encoding, operands = case(name)

    def loss(query, key, value, hidden, params):
        out = backend(prepare(query, key, value, encoding, params, is_causal=True, hidden=hidden))
        return (out * normal(5, B, T, N, H)).sum(), out

    gradients, out = jax.jit(jax.grad(loss, range(5), has_aux=True))(*operands)
    return out, gradients


every_example = pytest.mark.parametrize("name", FORMULAS)


@every_example
def test_its_formula(name):
    _, operands = case(name)
    query, key, value, hidden, params = jax.tree.map(lambda x: np.asarray(x, np.float64), operands)
    want = softmax_of(FORMULAS[name](query, key, hidden, params), value)
    np.testing.assert_allclose(answers(name, reference.attention)[0], want, atol=1e-5)


@every_example
@pytest.mark.parametrize("backend", ["xla_chunked", "tpu", "gpu", "ring", pytest.param("ring, tpu", marks=pytest.mark.thorough)])
def test_every_backend(name, backend):
    def run(call):  # kernels take sums of gates as dispatch gives them
        return BACKENDS[backend](call if backend == "xla_chunked" else with_prefix_sums(call))

    got, want = answers(name, run), answers(name, reference.attention)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * max(1.0, float(jnp.abs(b).max())))


@every_example
def test_decoding(name):
    encoding, (query, key, value, hidden, params) = case(name)
    cache = kv_cache.init_cache(encoding, pj.Dims(N, H, D, num_kv_heads=K), B, max_length=T)
    outs, start = [], 0
    for size in (100, 1, 35):
        now = slice(start, start := start + size)
        own = dict(hidden=hidden[:, now])
        out, cache = kv_cache.attend(query[:, now], key[:, now], value[:, now], encoding, params, cache, **own)
        outs.append(out)
    np.testing.assert_allclose(jnp.concatenate(outs, 1), answers(name, reference.attention)[0], atol=2e-5)


@every_example
def test_the_trainer_knows_its_name(name, tmp_path):
    """In three steps nothing is learned; every gradient is a number, and the learned leaves have moved."""
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.txt").write_text("a line of text, and another\n" * 40)
    sizes = dict(seq_length=16, batch_size=8, num_layers=1, embed_dim=16, num_heads=2, steps=3, warmup_steps=1, log_every=1)
    config = Config(encoding=name, data=str(folder), data_dir=str(tmp_path / "data"), **sizes)
    source = open_source(config)
    _, before = runs.build_model(config, name, source, 0)
    params = runs.train(config, name, 0, tmp_path / "run", source, quiet=True)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert np.isfinite([json.loads(line)["loss"] for line in lines]).all() and len(lines) == 3
    for old, new in zip(*(jax.tree.leaves(model.get("encoding", {})) for model in (before, params)), strict=True):
        assert np.isfinite(new).all() and (new != old).any()
