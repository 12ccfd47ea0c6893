"""Right calls of the public functions, each with the values and the domains of its arguments, for ``bad_calls``.

A domain is stated by hand: a function of a value that returns it as the call means it, or raises Refused.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import posjax as pj
from posjax.encodings.frequencies import Scaling
from posjax.inference.generation import stream
from posjax.inference.sampling import Sampling
from posjax.lab.config import Config
from posjax.models.transformer import Transformer, TransformerConfig, functional
from posjax.parallel.mesh import make_mesh
from posjax.training.optimizer import make_optimizer
from posjax.training.schedule import learning_rate_schedule
from posjax.training.step import make_train_step

B, T, N, K, H, D = 2, 4, 4, 2, 8, 32
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
            "scaling": (pj.linear_scaling(2.0), only(lambda x: x is None or isinstance(x, Scaling))),
            "channels": ("first", choice("first", "last")),
        },
        pj.query_scale: {"factor": (1.0, positive)},
        pj.log_scale: {
            "length": (8192, integer(1)),
            "beta": (0.1, number(lambda x: x >= 0, array=True)),
            "rule": ("llama4", choice("llama4", "ministral3", "inkling")),
        },
        pj.mrope: {
            "sections": (
                (4, 2, 2),
                only(
                    lambda x: (
                        isinstance(x, tuple | list)
                        and len(x) == 3
                        and all(isinstance(n, int | np.integer) and not isinstance(n, bool) and n >= 0 for n in x)
                        and 0 < sum(x) < 2**15
                    )
                ),
            ),
            "layout": ("blocks", choice("blocks", "interleaved", "alternating")),
            "theta": (10_000.0, positive),
            "fraction": (1.0, number(lambda x: 0 < x <= 1)),
            "pairing": ("half", choice("half", "interleaved")),
        },
        pj.axial_rope: {
            "axes": (2, integer(2, 4)),
            "layout": ("shared", choice("shared", "split", "blocks")),
            "theta": (10_000.0, positive),
            "fraction": (1.0, number(lambda x: 0 < x <= 1)),
            "pairing": ("half", choice("half", "interleaved")),
            "widths": (None, only(lambda x: x is None)),
            "order": (None, only(lambda x: x is None)),
            "num_prefix_tokens": (5, integer(0)),
            "scale": (1.0, number(lambda x: x > 0)),
            "shift": (0.1, number(lambda x: x >= 0, none=True)),
            "jitter": (1.1, number(lambda x: x >= 1, none=True)),
            "rescale": (2.0, number(lambda x: x >= 1, none=True)),
        },
        pj.rope_mixed: {
            "theta": (10.0, number(lambda x: x > 0)),
            "pairing": ("interleaved", choice("half", "interleaved")),
            "num_prefix_tokens": (1, integer(0)),
        },
        pj.xpos: {
            "scale_base": (512.0, number(lambda x: x > 0)),
            "gamma": (0.4, number(lambda x: x > 0)),
            "theta": (10_000.0, positive),
            "pairing": ("interleaved", choice("half", "interleaved")),
            "centre": (0, integer(0)),
        },
        pj.pope: {"theta": (10_000.0, positive)},
        pj.alibi: {"slope": (None, slopes)},
        pj.t5: buckets | {"bidirectional": (False, flag)},
        pj.tupe: buckets | dict.fromkeys(("relative", "untie_cls", "released"), (True, flag)),
        pj.cope: counted
        | {"max_position": (64, integer(2, 2**24)), "scaled": (False, flag), "per_head": (False, flag), "clamp": (None, clamp)},
        pj.cope_alibi: counted | {"slope": (None, slopes), "learned": (False, flag)},
        pj.cope_mlp: counted | {"hidden_dim": (64, integer(1, 2**16)), "scaled": (False, flag)},
    }
    calls = {cls.registered_name: Call(cls, arguments) for cls, arguments in encodings.items() if arguments}
    calls |= scaling_calls()
    calls["cope"] = dataclasses.replace(calls["cope"], required=("max_position",))
    calls["mrope"] = dataclasses.replace(calls["mrope"], required=("sections",))
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
    whole = only(lambda x: isinstance(x, int | np.integer) and not isinstance(x, bool) and x in (1, 2, 4))
    parts = [3, (1, 4, 4), 2]
    calls["mrope_positions"] = Call(
        pj.mrope_positions,
        {
            "parts": (
                parts,
                only(lambda x: x is parts or (isinstance(x, Sequence) and all(type(n) is int and 0 <= n <= 2**24 for n in x))),
            ),
            "merge_size": (2, whole),
            "tokens_per_second": (1.0, number(lambda x: x > 0)),
        },
        equal=False,
        required=("parts",),
        weight=0.5,
    )
    calls["axial_coordinates"] = Call(
        pj.axial_coordinates,
        {
            "sizes": ((2, 3), only(lambda x: isinstance(x, tuple | list) and len(x) == 2 and tuple(x) == (2, 3))),
            "normalize": (None, choice(None, "separate", "min", "max")),
            "pretrained": (None, only(lambda x: x is None)),
            "num_prefix_tokens": (1, integer(0, 2**24 - 6)),
        },
        equal=False,
        required=("sizes",),
        weight=0.5,
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


def scaling_calls() -> dict[str, Call]:
    factor, length = number(lambda x: x >= 1), integer(1)
    optional = number(lambda x: x > 0, none=True)
    numbers = only(lambda x: isinstance(x, tuple | list) and len(x) == 2 and all(type(n) in (int, float) and n > 0 for n in x))

    def lists(x: Any) -> Any:
        return tuple(numbers(x))

    def gains(x: Any) -> Any:
        return lists(x) if isinstance(x, tuple | list) else optional(x)

    arguments: dict[Any, dict[str, Any]] = {
        pj.linear_scaling: {"factor": (2.0, factor)},
        pj.ntk_scaling: {"factor": (2.0, factor)},
        pj.ntk_theta_scaling: {"factor": (2.0, factor)},
        pj.ntk_fixed_scaling: {"factor": (2.0, factor), "mixed_b": (None, optional)},
        pj.dynamic_ntk_scaling: {"factor": (2.0, factor), "original_max_length": (64, length)},
        pj.yarn_scaling: {
            "factor": (2.0, factor),
            "original_max_length": (64, length),
            "attention_factor": (None, optional),
            **dict.fromkeys(("mscale", "mscale_all_dim"), (1.0, number(lambda x: x >= 0, none=True))),
            "beta_fast": (32.0, number(lambda x: x >= 1)),
            "beta_slow": (1.0, number(lambda x: 0 < x <= 32)),
            "truncate": (True, flag),
        },
        pj.llama3_scaling: {
            "factor": (8.0, factor),
            "low_freq_factor": (1.0, number(lambda x: 0 < x <= 4)),
            "high_freq_factor": (4.0, number(lambda x: x >= 1)),
            "original_max_length": (64, length),
        },
        pj.longrope_scaling: {
            **dict.fromkeys(("short_factor", "long_factor"), ((1.0, 2.0), lists)),
            "original_max_length": (64, integer(2)),
            "factor": (2.0, factor),
            "attention_factor": (None, gains),
            "use": (None, choice(None, "short", "long")),
        },
        pj.proportional_scaling: {"fraction": (0.5, number(lambda x: 0 < x <= 1)), "factor": (2.0, factor)},
    }
    made = {cls.registered_name: Call(cls, own, weight=0.3) for cls, own in arguments.items()}
    made |= {
        name: dataclasses.replace(call, required=("factor",)) for name, call in made.items() if name[:3] in ("lin", "ntk", "yar")
    }
    config = {"model_type": "olmo3", "num_hidden_layers": 4, "rope_theta": 5e5}
    made["rope_from_config"] = Call(
        pj.rope_from_config,
        {
            "config": (config, only(lambda x: isinstance(x, dict) and "model_type" in x)),
            "layer_type": (None, choice(None, "full_attention", "sliding_attention")),
            "layer": (None, integer(0, 3, none=True)),
        },
        weight=0.5,
        required=("config",),
    )
    return made


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
        name: (None, integer(1, none=True)) for name in ("num_kv_heads", "head_dim", "mlp_dim", "num_token_types", "num_classes")
    }
    window = integer(1, none=True)

    def windows(x: Any) -> Any:
        return tuple(map(window, x)) if isinstance(x, tuple | list) and len(x) in (1, 2) else window(x)

    def biases(x: Any) -> Any:
        if not isinstance(x, tuple | list) or not set(x) <= {"qkv", "out", "mlp", "head"}:
            raise Refused
        return tuple(x)

    sizes |= {"local_window_size": ((None, 3), windows), "biases": (("qkv", "head"), biases)}
    flags = {name: (True, flag) for name in ("is_causal", "tie_embeddings", "scan_layers", "embedding_norm", "head_transform")}
    flags |= {name: (False, flag) for name in ("parallel_residual", "shared_norm")}
    choices = {
        "norm": choice("rmsnorm", "layernorm"),
        "norm_position": choice("pre", "post", "output", "sandwich"),
        "qk_norm": choice(None, "head", "full"),
        "activation": choice("gelu", "gelu_exact", "swiglu", "geglu"),
        "remat": choice("none", "attention", "full"),
        "compute_dtype": choice("float32", "bfloat16"),
        "attention": choice("softmax", "linear"),
        "implementation": implementation,
    }
    defaults = {field.name: field.default for field in dataclasses.fields(TransformerConfig)}
    choices = {name: (defaults[name], domain) for name, domain in choices.items()}
    factor = number(lambda x: x > 0, none=True)
    numbers = {"dropout_rate": (0.1, number(lambda x: 0 <= x < 1)), "norm_epsilon": (1e-6, number(lambda x: x > 0))}
    numbers |= dict.fromkeys(("logits_soft_cap", "final_logits_soft_cap", "attention_scale", "embedding_scale"), (None, factor))
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

    def losses(**arguments: Any) -> Any:
        return with_params(params).losses(jnp.zeros((B, T), int), **arguments)

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
        "losses of Transformer": Call(
            losses,
            {
                "targets": (jnp.zeros((B, T), int), array([(B, T)], "iu")),
                "weights": (ones(B, T), array([(B, T)], "f")),
            },
            True,
            weight=0.3,
            required=("targets", "weights"),
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
