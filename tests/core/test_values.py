"""Encodings are values: equal, hashable, picklable, readable, and pytrees whose leaves are the arrays among their arguments."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from suite import (
    CASES,
    DIMS,
    normal,
)

import posjax as pj
from posjax.core import encoding as registry
from posjax.encodings.spec import parse_encoding
from posjax.models.transformer import Transformer, TransformerConfig

EVERY = list(dict.fromkeys(case.encoding for case in CASES))


def call(encoding, x):
    return pj.attention(x, x, x, encoding, is_causal=True)


@pytest.mark.parametrize("encoding", EVERY, ids=str)
def test_an_encoding_is_what_its_repr_makes(encoding):
    made = eval(repr(encoding), {name: getattr(pj, name) for name in pj.__all__})
    assert made == encoding and hash(made) == hash(encoding) and made is not encoding
    assert repr(made) == repr(encoding)
    for other in (pickle.loads(pickle.dumps(encoding)), copy.deepcopy(encoding)):
        assert other == encoding and hash(other) == hash(encoding)
    assert jax.tree.structure(made) == jax.tree.structure(encoding)


def test_every_encoding_differs_from_every_other():
    assert len(EVERY) == len({repr(encoding) for encoding in EVERY})
    assert all((a == b) == (a is b) for a in EVERY for b in EVERY)
    assert pj.rope(100.0) != pj.rope(200.0) and pj.rope() != pj.sinusoidal() and pj.rope() != "rope()"
    assert pj.chain(pj.rope(), pj.alibi()) != pj.chain(pj.alibi(), pj.rope())


@pytest.mark.parametrize(
    "make",
    [pj.rope, lambda: pj.chain(pj.rope(), pj.alibi()), lambda: pj.chain(pj.cope_alibi(), pj.rope(500.0))],
    ids=lambda make: make().name,
)
def test_equal_encodings_share_a_program(make):
    x, function = normal(0, 1, 6, 2, 4), jax.jit(lambda encoding, x: call(encoding, x))  # with a cache of its own
    results = [function(make(), x) for _ in range(3)]
    assert function._cache_size() == 1
    static = jax.jit(lambda encoding, x: call(encoding, x), static_argnums=0)
    results += [static(make(), x) for _ in range(3)]
    assert static._cache_size() == 1
    assert all((result == results[0]).all() for result in results)


def test_numbers_are_part_of_the_program_and_arrays_are_not():
    x, function = normal(0, 1, 6, 2, 4), jax.jit(lambda encoding, x: call(encoding, x))
    for theta in (100.0, 200.0):
        function(pj.rope(theta), x)
    assert function._cache_size() == 2
    arrays = [function(pj.rope(jnp.float32(theta)), x) for theta in (100.0, 200.0, 300.0)]
    assert function._cache_size() == 3
    for theta, result in zip((100.0, 200.0), arrays, strict=False):
        np.testing.assert_allclose(result, call(pj.rope(theta), x), atol=1e-5)
    assert pj.rope(jnp.float32(3.0)) == pj.rope(jnp.float32(3.0)) != pj.rope(jnp.float32(4.0))
    assert hash(pj.rope(np.float32(3.0))) == hash(pj.rope(np.float32(3.0)))
    assert repr(pj.rope(jnp.float32(3.0))) == "rope(theta=Array(3., dtype=float32))"


def test_vmap_over_and_scan_through_stacked_encodings_equal_the_loop():
    x, thetas = normal(0, 1, 6, 2, 4), [10.0, 100.0, 1000.0]
    encodings = [pj.chain(pj.rope(jnp.float32(theta)), pj.alibi(jnp.float32(1 / theta))) for theta in thetas]
    want = jnp.stack([call(encoding, x) for encoding in encodings])
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *encodings)
    mapped = jax.vmap(call, (0, None))(stacked, x)
    scanned = jax.lax.scan(lambda carry, encoding: (carry, call(encoding, x)), 0, stacked)[1]
    np.testing.assert_allclose(mapped, want, atol=1e-6)
    np.testing.assert_allclose(scanned, want, atol=1e-6)


def test_a_model_takes_encodings_that_are_equal_as_one():
    config = TransformerConfig(vocab_size=7, embed_dim=8, num_heads=2, num_layers=2, max_length=8)
    model = Transformer(config, [pj.cope(4), pj.cope(4)], rngs=nnx.Rngs(0))
    assert model.encodings == (pj.cope(4),) and model.layout == (0, 0)


def test_fields_cannot_be_set():
    with pytest.raises(AttributeError):
        pj.rope().theta = 3.0


# The registry --------------------------------------------------------------------------------------------------------


@pytest.fixture
def names(monkeypatch):
    """The registry, as it was again after the test."""
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))


def test_a_registered_encoding_is_known_by_name(names):
    @pj.register("shift")
    class Shift(pj.PositionalEncoding):
        """Adds a number to the embeddings."""

        by: float = 1.0

        def embed(self, params, x, tokens):
            return x + self.by

    encoding = parse_encoding("shift(by=2.5) + rope")
    assert encoding == pj.chain(Shift(2.5), pj.rope())
    assert repr(encoding) == "chain(shift(by=2.5), rope())"
    assert (encoding.embed({}, jnp.zeros((1, 2, 4)), pj.Tokens.at(jnp.arange(2))) == 2.5).all()
    with pytest.raises(ValueError, match=r"did you mean 'shift'"):
        parse_encoding("shft")


def test_names_are_taken_once(names):
    with pytest.raises(ValueError, match=r"'rope' is that of posjax.encodings.rotary.Rope; take another one"):

        @pj.register("rope")
        class Mine(pj.PositionalEncoding):
            pass

    with pytest.raises(ValueError, match=r"must be a Python identifier, got 'my rope'"):
        pj.register("my rope")(type("Mine", (pj.PositionalEncoding,), {}))
    with pytest.raises(TypeError, match=r"must decorate a subclass of PositionalEncoding, got <class 'int'>"):
        pj.register("mine")(int)


def test_an_entry_point_offers_an_encoding(names, monkeypatch, tmp_path):
    (tmp_path / "their_package.py").write_text(
        "import posjax as pj\n\n@pj.register('theirs')\nclass Theirs(pj.PositionalEncoding):\n    size: int = 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))

    def entry(name, value):
        return registry.importlib.metadata.EntryPoint(name, value, registry.ENTRY_POINTS)

    monkeypatch.setattr(registry, "_entry_points", lambda: (entry("theirs", "their_package:Theirs"),))
    assert repr(parse_encoding("theirs(size=4)")) == "theirs(size=4)"
    monkeypatch.setattr(registry, "_entry_points", lambda: (entry("other", "their_package:Theirs"),))
    with pytest.raises(ValueError, match=r"entry point 'other' = 'their_package:Theirs'.* must name a class that"):
        registry.registered()


def test_an_encoding_of_functions():
    def attend(params, inputs):
        return pj.alibi().attend(params, inputs)

    x = normal(0, 1, 6, 2, 4)
    mine = pj.encoding("mine", attend=attend)
    assert mine == pj.encoding("mine", attend=attend) != pj.encoding("other", attend=attend)
    assert repr(mine) == "encoding('mine', attend=attend)"
    assert mine.init(jax.random.key(0), DIMS) == {} and mine.max_length(DIMS) is None
    np.testing.assert_array_equal(call(mine, x), call(pj.alibi(), x))
