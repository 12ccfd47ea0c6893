"""Bad calls of the Python API from a seeded generator: right calls of every public function in which one argument is changed.

``bad_calls(seed)`` yields calls and ``verdict`` runs one. A call passes if it raises one clear line that names the argument, or if
it is right after all: the changed value is in the domain of its argument, which is stated here by hand, and the call means what
the same call with a plain Python value means.

    PYTHONPATH=. python tests/bad_calls.py 5000 7        prints the faults among 5,000 calls of seed 7
"""

import collections
import dataclasses
import fractions
import functools
import math
import random
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import posjax as pj
from posjax.inference.generation import stream
from posjax.inference.sampling import Sampling
from posjax.lab.config import Config
from posjax.models.transformer import Transformer, TransformerConfig, functional
from posjax.parallel.mesh import make_mesh
from posjax.training.optimizer import make_optimizer
from posjax.training.schedule import learning_rate_schedule
from posjax.training.step import make_train_step

B, T, N, K, H, D = 2, 4, 4, 2, 8, 32
MOST_BYTES, MOST_SECONDS, MOST_LETTERS = 10**9, 10.0, 400
TINIEST, LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


class Refused(Exception):
    """Raised by a domain for a value that is not in it."""


# Domains: a function of a value that returns it as the call means it, or raises Refused ----------------------------------------


def integer(least: int, most: int = 2**31 - 1, none: bool = False) -> Callable[[Any], Any]:
    def canonical(x: Any) -> Any:
        if x is None and none:
            return None
        if isinstance(x, bool) or not isinstance(x, int | np.integer) or not least <= x <= most:
            raise Refused
        return int(x)

    return canonical


def number(holds: Callable[[float], bool] = lambda x: True, none: bool = False, array: bool = False) -> Callable[[Any], Any]:
    """A number that float32 holds; with ``array`` a scalar array too."""

    def canonical(x: Any) -> Any:
        if x is None and none:
            return None
        if array and isinstance(x, np.ndarray | jax.Array) and x.shape == () and jnp.dtype(x.dtype).kind in "iuf":
            canonical(x.item())
            return x
        if isinstance(x, bool | np.bool_) or not isinstance(x, int | float | np.integer | np.floating):
            raise Refused
        x = x.item() if isinstance(x, np.generic) else x
        if not (abs(x) <= LARGEST and (x == 0 or abs(x) >= TINIEST) and holds(float(x))):  # NaN is not less than anything
            raise Refused
        return x

    return canonical


def flag(x: Any) -> Any:
    if not isinstance(x, bool | np.bool_):
        raise Refused
    return bool(x)


def choice(*choices: Any) -> Callable[[Any], Any]:
    def canonical(x: Any) -> Any:
        if not any(type(x) is type(one) and x == one for one in choices):
            raise Refused
        return x

    return canonical


def text(x: Any) -> Any:
    if not isinstance(x, str):
        raise Refused
    return x


def only(holds: Callable[[Any], bool]) -> Callable[[Any], Any]:
    def canonical(x: Any) -> Any:
        if not holds(x):
            raise Refused
        return x

    return canonical


def array(
    shapes: Any, kinds: str, none: bool = False, values: Callable[[np.ndarray], bool] = lambda x: True, lists: bool = False
) -> Callable[[Any], Any]:
    """An array of JAX or NumPy with one of some shapes, in which None stands for any length, and one of NumPy's kinds of dtypes."""

    def canonical(x: Any) -> Any:
        if x is None and none:
            return None
        if lists and isinstance(x, list) and x:  # or nested lists
            x = np.asarray(x)
        if not isinstance(x, np.ndarray | jax.Array) or jnp.issubdtype(x.dtype, jax.dtypes.extended):
            raise Refused
        if jnp.dtype(x.dtype).kind not in kinds and not ("f" in kinds and x.dtype == jnp.bfloat16):
            raise Refused
        if not any(len(s) == x.ndim and all(n in (None, m) for n, m in zip(s, x.shape, strict=True)) for s in shapes):
            raise Refused
        if not values(np.asarray(x)):
            raise Refused
        return x

    return canonical


positive, any_number = number(lambda x: x > 0, array=True), number(array=True)
is_encoding = only(lambda x: isinstance(x, pj.PositionalEncoding))
encoding_or_none = only(lambda x: x is None or isinstance(x, pj.PositionalEncoding))
operand = {name: array([(B, T, n, H)], "f") for name, n in (("query", N), ("key", K), ("value", K))}
operand["value"] = array([(B, T, K, None)], "f")
is_dims = only(lambda x: isinstance(x, pj.Dims))
function = only(lambda x: x is None or callable(x))


# What a message may name instead: arguments that no longer go with the one that is changed.
GO_WITH = {"encoding": ("is_causal", "params", "bias"), "tokens": ("positions", "segment_ids")}


# Right calls -------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Call:
    """A right call: what is called, and the value and the domain of every argument.

    ``traced`` calls return arrays: they are traced and never compiled. ``equal`` says whether two results are the same; None: the
    result means nothing before it is used.
    """

    function: Callable[..., Any]
    arguments: dict[str, tuple[Any, Callable[[Any], Any]]]
    traced: bool = False
    equal: bool = True
    weight: float = 1.0
    required: tuple[str, ...] = ()


def ones(*shape: int, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.ones(shape, dtype)


def positions_of(length: int) -> Callable[[Any], Any]:
    shapes = [(length,), (1, length), (B, length)]
    return array(shapes, "iu", none=True, values=lambda x: x.size > 0 and x.min() >= 0 and x.max() < 2**31 - 1, lists=True)


def segment_ids(x: Any) -> Any:
    one = array([(B, T)], "iu", none=True)
    return tuple(map(array([(B, T)], "iu"), x)) if isinstance(x, tuple) and len(x) == 2 else one(x)


def window(x: Any) -> Any:
    side = integer(0, none=True)
    return tuple(map(side, x)) if isinstance(x, tuple | list) and len(x) == 2 else side(x)


def implementation(x: Any) -> Any:
    return choice(None, "xla", "xla_chunked", "pallas")(x)


soft_cap = number(lambda x: x > 0, none=True)  # known while tracing; a scalar array that is known counts too


def cap(x: Any) -> Any:
    return number(lambda x: x > 0, none=True, array=True)(x)


def attention_calls() -> dict[str, Call]:
    q, k, v = ones(B, T, N, H), ones(B, T, K, H), ones(B, T, K, H)
    operands = {name: (x, operand[name]) for name, x in (("query", q), ("key", k), ("value", v))}
    encoded = {"encoding": (pj.rope(), encoding_or_none), "params": ({}, only(lambda x: x is None or isinstance(x, Mapping)))}
    options = {
        "is_causal": (True, flag),
        "mask": (
            ones(B, 1, T, T, dtype=bool),
            array(
                [(b, n, t, s) for b in (1, B) for n in (1, N) for t in (1, T) for s in (1, T)]
                + [(n, t, s) for n in (1, N) for t in (1, T) for s in (1, T)]
                + [(t, s) for t in (1, T) for s in (1, T)]
                + [(1,), (T,), ()],
                "b",
                none=True,
            ),
        ),
        "segment_ids": (ones(B, T, dtype=int), segment_ids),
        "local_window_size": (3, window),
        "query_positions": (jnp.arange(T), positions_of(T)),
        "key_positions": (jnp.arange(T), positions_of(T)),
        "scale": (0.5, number(lambda x: x > 0, none=True, array=True)),
        "logits_soft_cap": (5.0, cap),
    }
    own = {
        "implementation": ("xla", implementation),
        "hidden": (ones(B, T, 3), array([(B, T, None)], "fiub", none=True)),
    }
    coordinates = {
        f"{side}_coordinates": (
            jnp.zeros((T, 1)),
            array([(T, None), (1, T, None), (B, T, None)], "fiu", none=True, values=lambda x: x.size > 0, lists=True),
        )
        for side in ("query", "key")
    }
    table = {"embedding": jnp.zeros((8, H))}
    is_table = only(lambda x: isinstance(x, dict) and getattr(x.get("embedding"), "shape", None) == (8, H))
    with_table = {"encoding": (pj.cope(8), is_encoding), "params": (table, is_table), "is_causal": (True, flag)}
    dims = pj.Dims(N, H, D, 16, K)
    cache = pj.init_cache(pj.rope(), dims, B, max_length=8)
    linear = {name: options[name] for name in ("is_causal", "query_positions", "key_positions")}
    linear |= {
        "segment_ids": (ones(B, T, dtype=int), array([(B, T)], "iu", none=True)),
        "feature_map": ("elu", choice("elu", "exp")),
    }
    attended = {name: options[name] for name in ("scale", "logits_soft_cap")} | {"implementation": own["implementation"]}
    attended |= {
        "positions": (jnp.arange(T), positions_of(T)),
        "segment_ids": (ones(B, T, dtype=int), array([(B, T)], "iu", none=True)),
    }
    made = {
        "dims": (dims, is_dims),
        "dtype": (jnp.float32, only(lambda x: x is jnp.float32 or (isinstance(x, str) and x == "half"))),
    }
    required = tuple(operands)
    pairs = [(b, n, t, s) for b in (1, B) for n in (1, N) for t in (1, T) for s in (1, T)]
    bias = array(sorted({shape[at:] for shape in pairs for at in range(4)}), "fiu")

    def or_bias(domain: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """An array in place of the encoding is a bias, as in a positional call of jax's function."""
        return lambda x: bias(x) if isinstance(x, np.ndarray | jax.Array) else domain(x)

    at_call = encoded | {"encoding": (pj.rope(), or_bias(encoding_or_none))}
    with_table["encoding"] = pj.cope(8), or_bias(is_encoding)

    def multiple(unit: int, most: int) -> Callable[[Any], Any]:
        return only(lambda x: isinstance(x, int) and not isinstance(x, bool) and 0 < x <= most and x % unit == 0)

    gpu = {"block_q": 64, "block_kv": 64, "block_kv_count": 32, "block_q_rows": 32, "num_warps": 4, "num_stages": 2}

    def by_blocks(**sizes: Any) -> Any:
        return pj.attention(q, k, v, block_sizes=pj.Blocks(**sizes), implementation="pallas")

    def by_gpu_blocks(**sizes: Any) -> Any:
        return pj.attention(q, k, v, block_sizes=pj.GpuBlocks(**sizes))

    def fn(encoding: Any, params: Any, is_causal: Any) -> Any:
        return pj.attention_fn(encoding, params, is_causal=is_causal)(q, q, q)

    power = only(lambda x: isinstance(x, int) and not isinstance(x, bool) and x in (16, 32, 64, 128, 256))
    return {
        "attention": Call(pj.attention, operands | at_call | options | own, True, weight=6, required=required),
        "attention at coordinates": Call(pj.attention, operands | at_call | coordinates, True, required=required),
        "attention with params": Call(pj.attention, operands | with_table, True, weight=2, required=required),
        "attention_weights": Call(
            pj.attention_weights,
            {name: x for name, x in (operands | encoded | options).items() if name != "value"},
            True,
            required=("query", "key"),
        ),
        "attention_fn": Call(fn, encoded | {"is_causal": (True, flag)}, True),
        "linear_attention": Call(pj.linear_attention, operands | encoded | linear, True, weight=2, required=required),
        "attend": Call(
            pj.attend,
            operands | encoded | {"cache": (cache, only(lambda x: isinstance(x, pj.Cache)))} | attended,
            True,
            weight=2,
            required=(*required, "encoding", "params", "cache"),
        ),
        "init_cache": Call(
            pj.init_cache,
            {"encoding": (pj.rope(), encoding_or_none), **made, "batch_size": (B, integer(1)), "max_length": (8, integer(1))},
            True,
            weight=2,
            required=("encoding", "dims", "batch_size"),
        ),
        "init_cache of a window": Call(functools.partial(pj.init_cache, pj.rope(), dims, B), {"window": (8, integer(1))}, True),
        "cache_layout": Call(
            pj.cache_layout, {"encoding": (pj.rope(), encoding_or_none), **made}, weight=0.3, required=("encoding", "dims")
        ),
        "Blocks": Call(
            by_blocks,
            {
                "block_q": (128, multiple(128, 2048)),
                "block_kv": (256, multiple(128, 256)),
                "block_kv_count": (128, multiple(128, 256)),
                "block_kv_resident": (256, multiple(256, 2**31 - 1)),
            },
            True,
        ),
        "GpuBlocks": Call(
            by_gpu_blocks,
            {
                name: (size, power if name.startswith("block") else only(lambda x: type(x) is int and x in range(1, 9)))
                for name, size in gpu.items()
            },
            True,
        ),
    }


def constructor_calls() -> dict[str, Call]:
    gates = choice("logits", "content", "keys", "values")
    counted = {"gates": ("logits", gates), "shared": (True, flag), "gate_bias": (0.0, any_number)}
    clamp = number(lambda x: x == int(x) and 1 <= x <= 63, none=True, array=True)
    slope = number(lambda x: x > 0, none=True, array=True)
    each = array([(None,)], "fiu", values=lambda x: x.size > 0 and (x > 0).all())

    def slopes(x: Any) -> Any:
        return each(x) if np.ndim(x) == 1 else slope(x)

    buckets = {"num_buckets": (32, integer(2, 4096)), "max_distance": (128, integer(17))}
    encodings = {
        pj.identity: {},
        pj.sinusoidal: {"theta": (10_000.0, positive)},
        pj.learned: {"init_scale": (0.02, number(lambda x: x >= 0))},
        pj.rope: {
            "theta": (10_000.0, positive),
            "fraction": (1.0, number(lambda x: 0 < x <= 1)),
            "pairing": ("half", choice("half", "interleaved")),
        },
        pj.alibi: {"slope": (None, slopes)},
        pj.t5: buckets | {"bidirectional": (False, flag)},
        pj.tupe: buckets | dict.fromkeys(("relative", "untie_cls", "released"), (True, flag)),
        pj.cope: counted
        | {"max_position": (64, integer(2, 2**24)), "scaled": (False, flag), "per_head": (False, flag), "clamp": (None, clamp)},
        pj.cope_alibi: counted | {"slope": (None, slopes), "learned": (False, flag)},
        pj.cope_mlp: counted | {"hidden_dim": (64, integer(1, 2**16)), "scaled": (False, flag)},
    }
    calls = {cls.registered_name: Call(cls, arguments) for cls, arguments in encodings.items() if arguments}
    calls["cope"] = dataclasses.replace(calls["cope"], required=("max_position",))
    sizes = {"num_heads": (N, integer(1, 2**15)), "head_dim": (H, integer(1, 2**15))}
    sizes |= {
        "embed_dim": (D, integer(1, none=True)),
        "max_length": (16, integer(1, none=True)),
        "num_kv_heads": (K, integer(1, none=True)),
    }
    calls["Dims"] = Call(pj.Dims, sizes, weight=2, required=("num_heads", "head_dim"))
    points = dict.fromkeys(("init", "place", "embed", "attend", "max_length"), (None, function))
    calls["encoding"] = Call(
        pj.encoding,
        {"name": ("mine", text), **points, "axes": (1, integer(1, 2**15)), "cache": ("transformed", choice("transformed", "raw"))}
        | dict.fromkeys(("per_layer", "needs_hidden", "needs_causal"), (False, flag)),
        required=("name",),
    )
    calls["chain"] = Call(lambda encodings: pj.chain(pj.rope(), encodings), {"encodings": (pj.alibi(), is_encoding)})
    calls["register"] = Call(
        lambda name: pj.register(name), {"name": ("mine", only(lambda x: isinstance(x, str) and x.isidentifier()))}, equal=False
    )
    calls["convert_pairing"] = Call(
        pj.convert_pairing,
        {
            "kernel": (ones(3, H), array([(None,) * r + (H,) for r in range(4)], "fiubc")),
            "source": ("half", choice("half", "interleaved")),
            "target": ("interleaved", choice("half", "interleaved")),
            "fraction": (
                1.0,
                only(
                    lambda x: (
                        isinstance(x, int | float | np.floating | np.integer)
                        and not isinstance(x, bool)
                        and x in (0.25, 0.5, 0.75, 1)
                    )
                ),
            ),
        },
        True,
        required=("kernel", "source", "target"),
    )
    init = {
        "key": (
            jax.random.key(0),
            only(lambda x: isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key) and x.shape == ()),
        )
    }
    for make in (pj.learned(), pj.tupe(), pj.cope(8), pj.chain(pj.t5(), pj.cope_mlp())):
        calls[f"init of {make}"] = Call(
            make.init, init | {"dims": (pj.Dims(N, H, D, 16, K), is_dims)}, True, required=("key", "dims"), weight=0.5
        )

        def sized(make: Any = make, **sizes: Any) -> Any:
            return make.init(jax.random.key(0), pj.Dims(**sizes))

        calls[f"sizes of {make}"] = Call(sized, sizes, weight=0.5, equal=False, required=("num_heads", "head_dim"))
    return calls


def _has_no_arrays(x: Any) -> bool:
    return jax.tree.leaves(x) == []


def _penalty(differences: Any, slope: Any) -> Any:
    return (-slope if isinstance(slope, jax.Array) else 1.0) * jnp.abs(differences[0])


def structure_calls() -> dict[str, Call]:
    phase = ones(1, T, 1, H // 2)
    table = {
        "side": ("none", choice("none", "query", "key", "value")),
        "interpolate": (False, flag),
    }
    q = ones(B, T, N, H)
    per_head = array([(n, *(None,) * rank) for n in (1, N) for rank in range(3)], "iuf")

    def modified(at: Any, read: Any, transforms: Any, weights: Any, query_phase: Any, args: Any, query: Any) -> Any:
        made = pj.Pair(_penalty, (query,), (ones(1, 1, T),), args=args) if at is None else at
        rotation = (pj.Rotate(query_phase, phase),) if transforms is None else transforms

        def attend(params: Any, inputs: Any) -> Any:
            return pj.ScoreModifications(rotation, (pj.Bias(made, read),), weights)

        return pj.attention(q, q, q, pj.encoding("mine", attend=attend))

    parts = {
        "at": (None, only(lambda x: x is None)),
        "read": (None, only(lambda x: x is None)),
        "transforms": (None, only(lambda x: x is None or x == ())),
        "weights": (pj.Softmax(), only(lambda x: isinstance(x, pj.Softmax))),
        "query_phase": (phase, array([(b, T, n, H // 2) for b in (1, B) for n in (1, N)], "iuf", none=True)),
        "args": (ones(N), lambda x: x if _has_no_arrays(x) else per_head(x)),
        "query": (ones(1, 1, T), array([(b, n, T) for b in (1, B) for n in (1, N)], "iufb")),
    }
    hinges = {name: ones(1, 3) for name in ("weight_in", "bias_in", "table")}
    return {
        "Rotate": Call(
            functools.partial(pj.Rotate, phase, phase),
            {"pairing": ("half", choice("half", "interleaved")), "offset": (0, integer(0)), "learned": (True, flag)},
            equal=False,
            weight=0.5,
        ),
        "Table": Call(functools.partial(pj.Table, ones(N, 4)), table, equal=False, weight=0.5),
        "Hinges": Call(
            functools.partial(pj.Hinges, **hinges), {"side": ("none", choice("none", "query"))}, equal=False, weight=0.3
        ),
        "Pair": Call(
            pj.Pair,
            {"function": (max, only(callable)), "relative": (True, flag), "learned": (True, flag)},
            equal=False,
            weight=0.5,
            required=("function",),
        ),
        "Scan": Call(
            pj.Scan,
            {
                "gate": (max, only(callable)),
                "include_key": (True, flag),
                "include_query": (True, flag),
                "bound": (None, number(none=True)),
            },
            equal=False,
            weight=0.5,
            required=("gate",),
        ),
        "StickBreaking": Call(pj.StickBreaking, {"attend_current": (True, flag)}, equal=False, weight=0.3),
        "structures": Call(modified, parts, True, equal=False),
        "Mask": Call(pj.Mask, {"is_causal": (True, flag)}, equal=False, weight=0.3),
        "Tokens.at": Call(
            pj.Tokens.at,
            {"positions": (jnp.arange(T), array([(None,), (None, None)], "iu"))},
            equal=False,
            weight=0.3,
            required=("positions",),
        ),
    }


def model_calls() -> dict[str, Call]:
    count = dict(vocab_size=11, num_layers=2, embed_dim=D, num_heads=N, max_length=16)
    sizes = {name: (size, integer(1)) for name, size in count.items()}
    sizes |= {
        name: (None, integer(1, none=True)) for name in ("num_kv_heads", "head_dim", "mlp_dim", "local_window_size", "num_classes")
    }
    flags = {name: (True, flag) for name in ("is_causal", "tie_embeddings", "scan_layers")}
    choices = {
        "norm": choice("rmsnorm", "layernorm"),
        "norm_position": choice("pre", "post"),
        "activation": choice("gelu", "swiglu"),
        "remat": choice("none", "attention", "full"),
        "compute_dtype": choice("float32", "bfloat16"),
        "attention": choice("softmax", "linear"),
        "implementation": implementation,
    }
    defaults = {field.name: field.default for field in dataclasses.fields(TransformerConfig)}
    choices = {name: (defaults[name], domain) for name, domain in choices.items()}
    numbers = {"dropout_rate": (0.1, number(lambda x: 0 <= x < 1)), "logits_soft_cap": (None, number(lambda x: x > 0, none=True))}
    config = TransformerConfig(**count)
    with_params, params = functional(Transformer(config, pj.rope(), rngs=nnx.Rngs(0)))

    def model(rngs: Any, **arguments: Any) -> Any:
        own = isinstance(rngs, nnx.Rngs)  # generators are used in the trace that made them
        return nnx.eval_shape(lambda: Transformer(**arguments, rngs=nnx.Rngs(0) if own else rngs))

    def sized(**sizes: Any) -> Any:
        return Transformer(TransformerConfig(**count | sizes), pj.rope(), rngs=nnx.Rngs(0))

    def decode_cache(**sizes: Any) -> Any:
        return with_params(params).init_cache(**sizes)

    def forward(tokens: Any, **others: Any) -> Any:
        return with_params(params)(tokens, **others)

    huge = only(lambda x: isinstance(x, int | np.integer) and not isinstance(x, bool) and 1 <= x <= 10_000)
    prompts = [[1, 2], [3]]
    generated = {
        "max_new_tokens": (3, integer(1)),
        "seed": (0, integer(-(2**63), 2**63)),
        "chunk": (16, integer(1)),
        "window": (None, integer(1, none=True)),
        "sampling": (Sampling(), only(lambda x: isinstance(x, Sampling))),
        "prompts": (prompts, only(lambda x: x is prompts)),
        "stop_tokens": (
            (),
            only(
                lambda x: (
                    isinstance(x, tuple | list | set | range)
                    and all(isinstance(n, int | np.integer) and not isinstance(n, bool) for n in x)
                )
            ),
        ),
    }
    sampling = {
        "temperature": (1.0, number(lambda x: x >= 0)),
        "top_k": (None, integer(1, none=True)),
        "top_p": (None, number(lambda x: 0 < x <= 1, none=True)),
    }
    return {
        "TransformerConfig": Call(TransformerConfig, sizes | flags | choices | numbers, weight=3, required=("vocab_size",)),
        "Transformer": Call(
            model,
            {
                "config": (config, only(lambda x: isinstance(x, TransformerConfig))),
                "encoding": (pj.rope(), is_encoding),
                "rngs": (nnx.Rngs(0), only(lambda x: isinstance(x, nnx.Rngs))),
            },
            weight=0.5,
            equal=False,
        ),
        "sizes of Transformer": Call(
            sized,
            {
                name: (count.get(name), huge)
                for name in ("vocab_size", "num_layers", "embed_dim", "max_length", "mlp_dim", "num_classes")
            },
            weight=0.2,
            equal=False,
        ),
        "tokens of Transformer": Call(
            forward,
            {
                "tokens": (jnp.zeros((B, T), int), array([(None, None)], "iu", values=lambda x: x.size > 0)),
                "positions": (jnp.arange(T)[None], positions_of(T)),
                "segment_ids": (ones(B, T, dtype=int), array([(B, T)], "iu", none=True)),
            },
            True,
            weight=0.5,
            required=("tokens",),
        ),
        "init_cache of Transformer": Call(
            decode_cache,
            {"batch_size": (B, integer(1)), "max_length": (8, integer(1, none=True)), "window": (None, integer(1, none=True))},
            True,
            weight=0.5,
            required=("batch_size",),
        ),
        "stream": Call(
            functools.partial(stream, with_params, params, prompts=prompts),
            generated,
            weight=1.5,
            equal=False,
            required=("max_new_tokens",),
        ),
        "Sampling": Call(Sampling, sampling),
    }


def training_calls() -> dict[str, Call]:
    unit = number(lambda x: 0 <= x < 1)
    at_least_0, above_0 = number(lambda x: x >= 0), number(lambda x: x > 0)
    count = {name: (value, integer(1)) for name, value in dict(batch_size=16, steps=1000, accumulate_steps=1, log_every=20).items()}
    settings = {
        "seq_length": (256, integer(2)),
        "num_variables": (1, integer(1, 26)),
        "num_examples": (None, integer(1, none=True)),
        "warmup_steps": (100, integer(0, 1000)),
        "learning_rate": (1e-3, above_0),
        "end_fraction": (0.1, number(lambda x: 0 <= x <= 1)),
        "weight_decay": (0.1, at_least_0),
        "beta1": (0.9, unit),
        "beta2": (0.99, unit),
        "clip_norm": (1.0, number(lambda x: x > 0, none=True)),
        "z_loss": (0.0, at_least_0),
        "ema_decay": (None, number(lambda x: 0 <= x < 1, none=True)),
        "task": ("lm", choice("lm", "mlm", "flip_flop", "selective_copy", "counting")),
        "optimizer": ("adamw", choice("adamw", "muon")),
        "parallel": ("jit", choice("jit", "pmap")),
        "workdir": ("", text),
        "scan_layers": (True, flag),
        "evaluate_every": (None, integer(1, none=True)),
        "eval_lengths": (
            (1, 2),
            only(lambda x: isinstance(x, tuple | list) and len(x) > 0 and all(type(n) is int and 1 <= n < 2**31 for n in x)),
        ),
        "seeds": (
            (0,),
            only(lambda x: isinstance(x, tuple | list) and len(x) > 0 and all(type(n) is int and 0 <= n < 2**31 for n in x)),
        ),
    }
    traced = dict(array=True)
    schedule = {
        "peak": (1e-3, number(lambda x: x >= 0, **traced)),
        "steps": (10, integer(1)),
        "warmup_steps": (2, number(lambda x: 0 <= x <= 10, **traced)),
        "decay": ("cosine", choice("cosine", "linear", "constant")),
        "end_fraction": (0.1, number(lambda x: 0 <= x <= 1, **traced)),
    }
    moments = {name: (0.9, number(lambda x: 0 <= x < 1, **traced)) for name in ("beta1", "beta2", "momentum")}
    optimizer = moments | {
        "learning_rate": (1e-3, lambda x: x if callable(x) else number(lambda x: x >= 0, **traced)(x)),
        "eps": (1e-8, number(lambda x: x >= 0, **traced)),
        "weight_decay": (0.0, number(lambda x: x >= 0, **traced)),
        "clip_norm": (1.0, number(lambda x: x > 0, none=True, **traced)),
        "optimizer": ("adamw", choice("adamw", "muon")),
    }
    step = {
        "loss_fn": (lambda params, batch, key: (0.0, 1.0), only(callable)),
        "optimizer": (optax.sgd(0.1), only(lambda x: isinstance(x, optax.GradientTransformation))),
        "accumulate_steps": (1, integer(1)),
        "axis_name": (None, only(lambda x: x is None or isinstance(x, str))),
        "ema_decay": (None, number(lambda x: 0 <= x < 1, none=True, **traced)),
    }
    devices = jax.device_count()
    mesh = {
        "num_devices": (1, integer(1, devices, none=True)),
        "data": (None, only(lambda x: x is None or (isinstance(x, int | np.integer) and not isinstance(x, bool) and x in (-1, 1)))),
    }
    mesh |= {
        name: (1, only(lambda x: isinstance(x, int | np.integer) and not isinstance(x, bool) and x in (-1, 1)))
        for name in ("fsdp", "context", "tensor")
    }
    return {
        "Config": Call(Config, count | settings, weight=2),
        "learning_rate_schedule": Call(learning_rate_schedule, schedule, equal=False, required=("peak", "steps")),
        "make_optimizer": Call(make_optimizer, optimizer, equal=False, weight=1.5, required=("learning_rate",)),
        "make_train_step": Call(make_train_step, step, equal=False, required=("loss_fn", "optimizer")),
        "make_mesh": Call(make_mesh, mesh),
    }


@functools.cache
def calls() -> dict[str, Call]:
    """All right calls by name."""
    return constructor_calls() | attention_calls() | structure_calls() | model_calls() | training_calls()


# What is changed -----------------------------------------------------------------------------------------------------------------


class Odd:
    """An object whose repr has several lines."""

    def __repr__(self) -> str:
        return "an odd\nobject"


SCALARS = [
    None,
    True,
    False,
    np.bool_(True),
    0,
    1,
    2,
    3,
    -1,
    -7,
    2.0,
    2.5,
    0.5,
    -0.5,
    1.0,
    1e-9,
    1e300,
    1e-300,
    math.nan,
    math.inf,
    -math.inf,
    10**9,
    10**12,
    10**18,
    -(10**12),
    10**400,
    np.int64(4),
    np.int32(3),
    np.int64(10**12),
    np.float32(0.5),
    np.float64(math.nan),
    1j,
    "64",
    "2.5",
    "no",
    "True",
    "rope",
    "",
    "half",
    "softmax",
    b"64",
    [],
    [2],
    (2,),
    (1, 2),
    (1, "2"),
    ("a",),
    {},
    {"a": 1},
    set(),
    Odd(),
    object(),
    len,
    int,
    np.zeros(3),
    np.array(3),
    np.array("a"),
    np.array([None, 2], dtype=object),
    np.zeros((0, 2)),
    range(3),
    Ellipsis,
    fractions.Fraction(1, 2),
    np.datetime64("2020"),
    NotImplemented,
]
# Arrays and values of posjax, made when they are drawn.
MADE = [
    lambda: jnp.ones(2),
    lambda: jnp.asarray(2.0),
    lambda: jnp.asarray(True),
    lambda: jnp.asarray(5),
    lambda: jax.random.key(0),
    lambda: jnp.asarray(math.nan),
    lambda: jnp.asarray(math.inf),
    lambda: jnp.asarray(0.25),
    lambda: jnp.ones((3, 3)),
    lambda: pj.rope(),
    lambda: pj.rope,
    lambda: pj.cope(8),
    lambda: pj.Dims(2, 8),
    lambda: jax.ShapeDtypeStruct((B, T, N, H), jnp.float32),
    lambda: [jnp.ones(2)],
]
OF_ARRAYS: dict[str, Callable[[Any], Any]] = {
    "without its first axis": lambda x: x[0],
    "with one more axis": lambda x: x[None],
    "as integers": lambda x: x.astype(jnp.int32),
    "as booleans": lambda x: x.astype(bool),
    "as bfloat16": lambda x: x.astype(jnp.bfloat16),
    "as float32": lambda x: x.astype(jnp.float32),
    "as complex numbers": lambda x: x.astype(jnp.complex64),
    "without its last entries": lambda x: x[..., :-1],
    "empty": lambda x: x[:0],
    "twice": lambda x: jnp.concatenate([x, x]),
    "as NumPy's": np.asarray,
    "as a list": lambda x: np.asarray(x).tolist(),
    "negative": lambda x: -x.astype(jnp.int32) - 1,
    "as the name of its dtype": lambda x: str(x.dtype),
}


@dataclasses.dataclass(frozen=True)
class BadCall:
    """A right call with one argument changed: name, argument, what was done, and the keyword arguments."""

    name: str
    argument: str
    change: str
    arguments: dict[str, Any]
    names: tuple[str, ...] = ()  # what a message may name instead of the argument

    def __str__(self) -> str:
        return f"{self.name}: {self.argument} {self.change}"


def bad_calls(seed: int) -> Iterator[BadCall]:
    """Yields calls without end; the same for the same seed."""
    draw = random.Random(seed)
    table = calls()
    names, weights = list(table), [call.weight for call in table.values()]
    while True:
        name = draw.choices(names, weights)[0]
        call = table[name]
        arguments = {argument: value for argument, (value, _) in call.arguments.items()}
        argument = draw.choice(list(arguments))
        given = arguments[argument]
        is_array = isinstance(given, jax.Array) and not jnp.issubdtype(given.dtype, jax.dtypes.extended)
        kind = draw.random()
        if kind < 0.04 and len(argument) > 2:
            at = draw.randrange(len(argument))
            misspelt = argument[:at] + argument[at + 1 :]
            arguments[misspelt] = arguments.pop(argument)
            yield BadCall(name, misspelt, f"for {argument}", arguments, (argument,))
        elif kind < 0.08 and argument in call.required:
            del arguments[argument]
            yield BadCall(name, argument, "left out", arguments)
        elif is_array and kind < 0.6:
            change = draw.choice(list(OF_ARRAYS))
            yield BadCall(name, argument, change, arguments | {argument: OF_ARRAYS[change](given)})
        else:
            value = draw.choice([*SCALARS, *MADE])
            value = value() if any(value is make for make in MADE) else value
            yield BadCall(name, argument, f"= {' '.join(repr(value).split())[:60]}", arguments | {argument: value})


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run(call: Call, arguments: dict[str, Any]) -> Any:
    """Returns the result of a call; of one that is traced, the program and its constants."""
    if not call.traced:
        return call.function(**arguments)
    program = jax.make_jaxpr(lambda: call.function(**arguments))()
    consts = [np.asarray(x).tobytes() for x in program.consts if not jnp.issubdtype(x.dtype, jax.dtypes.extended)]
    return re.sub(r"0x[0-9a-f]+", "", str(program)), consts


def verdict(bad: BadCall) -> str | None:
    """Runs a call; returns what is wrong with how posjax takes it, or None."""
    call = calls()[bad.name]
    try:
        domain = call.arguments[bad.argument][1]
        means = domain(bad.arguments[bad.argument])
        is_right = True
    except (Refused, KeyError):
        is_right = False
    except Exception:  # the value cannot even be compared
        is_right = False
    before, start, error, result = _peak(), time.process_time(), None, None
    try:
        result = run(call, bad.arguments)
    except Exception as raised:
        error = raised
    seconds, grown = time.process_time() - start, _peak() - before  # of the processor: machines are shared
    if seconds > MOST_SECONDS:
        return f"takes {seconds:.0f} s"
    if grown > MOST_BYTES:
        return f"allocates {grown / 1e9:.1f} GB"
    if error is None:
        if not is_right:
            return "is accepted in silence"
        canonical = bad.arguments | {bad.argument: means}
        if call.equal and means is not bad.arguments[bad.argument] and run(call, canonical) != result:
            return f"does not mean the same as {means!r}"
        return None
    said = str(error)
    if not isinstance(error, TypeError | ValueError | NotImplementedError):
        return f"raises {type(error).__name__}: {said[:200]}"
    if "\n" in said.strip() or len(said) > MOST_LETTERS:
        return f"says too much, {len(said)} letters in {len(said.splitlines())} lines: {said[:200]!r}"
    names = "|".join(map(re.escape, (bad.argument, *bad.names, *GO_WITH.get(bad.argument, ()))))
    if not re.search(rf"(?<![a-zA-Z])({names})(?![a-zA-Z])", said, re.IGNORECASE):
        return f"does not name the argument: {type(error).__name__}: {said[:200]}"
    if is_right and isinstance(bad.arguments[bad.argument], np.generic):
        try:
            run(call, bad.arguments | {bad.argument: means})
        except Exception:
            return None
        return f"is refused although {means!r} is not: {said[:200]}"
    return None


def main(count: int, seed: int) -> None:
    faults = collections.defaultdict(list)
    generator, wrong, slowest = bad_calls(seed), 0, (0.0, "")
    for number in range(count):
        bad = next(generator)
        start = time.perf_counter()
        if (fault := verdict(bad)) is not None:
            wrong += 1
            faults[f"{bad.name}: {bad.argument}"].append(f"{bad.change} {fault}")
        slowest = max(slowest, (time.perf_counter() - start, str(bad)))
        if number % 500 == 499:
            print(f"  {number + 1} calls, {wrong} wrong", file=sys.stderr, flush=True)
    for name, found in sorted(faults.items()):
        print(name)
        for one in sorted(set(found)):
            print("   ", one)
    print(f"{wrong} of {count} calls of seed {seed} are wrong; the slowest took {slowest[0]:.1f} s: {slowest[1]}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 300, int(sys.argv[2]) if len(sys.argv) > 2 else 0)
