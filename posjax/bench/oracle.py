"""Float64 reference of causal attention under every encoding, written from the papers, against which contestants are measured.

It shares only the names of parameters with posjax's kernels and encodings. ``xp`` is numpy for outputs, and jax.numpy (in a process
with 64-bit jax) for gradients of the same code. Query rows are computed in blocks, each with all of its keys at once, which bounds
the memory.
"""

import dataclasses
import functools
import math
from typing import Any

import numpy as np

from posjax.core.chain import Chain
from posjax.encodings.spec import parse_encoding

_CELLS = 2**21  # scores in memory at once; gradients need about twenty arrays of that size


@dataclasses.dataclass(frozen=True)
class Options:
    """Holds options of a call of causal attention.

    Attributes:
      window: number of keys before a query that it attends to; None: all.
      soft_cap: soft cap of the scores; None: none.
      starts: start indices of all documents of a row except the first; attention stays within a document.
    """

    window: int | None = None
    soft_cap: float | None = None
    starts: tuple[int, ...] = ()

    def documents(self, length: int) -> np.ndarray:
        """Returns the index of each token's document, [length]."""
        return np.searchsorted(self.starts, np.arange(length), side="right")


PLAIN = Options()


def attend(spec: str, arrays: dict[str, np.ndarray], first: int, options: Options = PLAIN) -> tuple[np.ndarray, float | None]:
    """Computes the output of the queries from ``first`` on, [B, T - first, N, H] float64, and the mean gate, if there are gates."""
    parts, gates = [], []
    for start, stop in _blocks(arrays["query"].shape, first):
        out, gate = _rows(np, spec, {name: np.asarray(x, np.float64) for name, x in arrays.items()}, start, stop, options)
        parts.append(out)
        gates += [] if gate is None else [(float(gate), (stop - start) * (start + stop + 1) / 2)]
    mean = sum(g * cells for g, cells in gates) / sum(cells for _, cells in gates) if gates else None
    return np.concatenate(parts, axis=1), mean


def gradients(spec: str, arrays: dict[str, np.ndarray], first: int, options: Options = PLAIN) -> dict[str, np.ndarray]:
    """Computes the gradients of sum(output * cotangent) over the queries from ``first`` on, for every array but the cotangent.

    Raises:
      RuntimeError: jax is not in 64-bit mode.
      FloatingPointError: a gradient is not finite.
    """
    import jax
    import jax.numpy as jnp

    if not jax.config.jax_enable_x64:
        raise RuntimeError("gradients of the oracle need 64-bit jax; set JAX_ENABLE_X64=1")
    inputs = {name: jnp.asarray(x, jnp.float64) for name, x in arrays.items() if name != "cotangent"}
    total = {name: np.zeros(x.shape) for name, x in inputs.items()}

    @functools.partial(jax.jit, static_argnums=(2, 3))
    def pull(inputs: dict[str, Any], cotangent: Any, start: int, stop: int) -> dict[str, Any]:
        _, backward = jax.vjp(lambda arrays: _rows(jnp, spec, arrays, start, stop, options)[0], inputs)
        return backward(cotangent)[0]

    for start, stop in _blocks(arrays["query"].shape, first):
        for name, x in pull(inputs, jnp.asarray(arrays["cotangent"][:, start:stop], jnp.float64), start, stop).items():
            total[name] += np.asarray(x)
    if bad := [name for name, x in total.items() if not np.isfinite(x).all()]:
        raise FloatingPointError(f"gradients of {', '.join(bad)} are not finite")
    return total


def _blocks(shape: tuple[int, ...], first: int) -> list[tuple[int, int]]:
    batch, length, heads, _ = shape
    size = max(1, _CELLS // (batch * heads * length))
    return [(start, min(start + size, length)) for start in range(first, length, size)]


def members(spec: str) -> list[tuple[str, dict[str, Any]]]:
    """Parses the text of an encoding into its members, each as ("cope", {"max_position": 64, ...})."""
    encoding = parse_encoding(spec)
    encodings = encoding.encodings if isinstance(encoding, Chain) else (encoding,)
    return [(e.registered_name, {f.name: getattr(e, f.name) for f in dataclasses.fields(e)}) for e in encodings]


def _rows(xp: Any, spec: str, arrays: dict[str, Any], start: int, stop: int, options: Options) -> tuple[Any, Any]:
    """Computes the output [B, stop - start, N, H] of a block of queries, and their mean gate."""
    query, key, value = (xp.swapaxes(arrays[name], 1, 2) for name in ("query", "key", "value"))
    key, value = (xp.repeat(x, query.shape[1] // x.shape[1], axis=1) for x in (key, value))
    query, key, value = query[:, :, start:stop], key[:, :, :stop], value[:, :, :stop]
    i, j = np.arange(start, stop)[:, None], np.arange(stop)[None]
    document = options.documents(stop)
    visible = (j <= i) & (document[i] == document[j])
    if options.window is not None:
        visible &= i - j <= options.window
    scale = query.shape[-1] ** -0.5
    parts = _parameters(spec, arrays)

    rotated_query, rotated_key = query, key
    for name, args, _ in parts:
        if name == "rope":
            rotated_query, rotated_key = _rotate(xp, rotated_query, i[:, 0], args), _rotate(xp, rotated_key, j[0], args)
    logits = scale * rotated_query @ xp.swapaxes(rotated_key, 2, 3)
    for name, args, params in parts:
        if name == "tupe":
            logits = logits / math.sqrt(2) + _tupe(xp, params, args, i, j, scale)
    scores, mean_gate = logits, None
    for name, args, params in parts:
        if name == "alibi":
            scores = scores - _slopes(query.shape[1])[:, None, None] * (i - j)
        elif name == "t5" or (name == "tupe" and args["relative"]):
            bucket = _tupe_bucket(i, j, args) if name == "tupe" else _bucket(j - i, **args)
            bias = xp.moveaxis(params["bias"][bucket], -1, 0)
            no_bias = (name == "tupe") and args["untie_cls"] and not args["released"]
            scores = scores + (xp.where((i == 0) | (j == 0), 0.0, bias) if no_bias else bias)
        elif name.startswith("cope"):
            gate_keys = {"content": key, "values": value}.get(args["gates"])
            if args["gates"] == "keys":
                gate_keys = xp.einsum("bsd,dkh->bksh", arrays["hidden"][:, :stop], params["gate_kernel"])
                gate_keys = xp.repeat(gate_keys, query.shape[1] // gate_keys.shape[1], axis=1)
            gate_logits = logits if gate_keys is None else scale * query @ xp.swapaxes(gate_keys, 2, 3)
            gate = xp.where(visible, 1 / (1 + xp.exp(-gate_logits)), 0.0)
            count = xp.flip(xp.cumsum(xp.flip(gate, -1), -1), -1)
            mean_gate = gate.sum() / (visible.sum() * math.prod(gate.shape[:2]))
            scores = scores + _counted(xp, name, args, params, query, count, scale)
    if options.soft_cap is not None:
        scores = options.soft_cap * xp.tanh(scores / options.soft_cap)
    scores = xp.where(visible, scores, -np.inf)
    weights = xp.exp(scores - scores.max(-1, keepdims=True))
    out = (weights / weights.sum(-1, keepdims=True)) @ value
    return xp.swapaxes(out, 1, 2), mean_gate


def _parameters(spec: str, arrays: dict[str, Any]) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Returns (name, arguments, parameters) of each member; in a chain, parameters are stored under the member's name."""
    parts, taken = [], {}
    everything = members(spec)
    names = [name for name, _ in everything]
    if "tupe" in names and "rope" in names[names.index("tupe") :]:
        raise NotImplementedError(f"the oracle does not support rope after tupe in a chain, got {spec!r}")
    for name, args in everything:
        base = "tupe-r" if name == "tupe" and args["relative"] else name
        taken[base] = taken.get(base, -1) + 1
        label = f"{base}_{taken[base]}" if taken[base] else base
        prefix = "params/" if len(everything) == 1 else f"params/{label}/"
        parts.append((name, args, {k.removeprefix(prefix): x for k, x in arrays.items() if k.startswith(prefix)}))
    return parts


def _rotate(xp: Any, x: Any, positions: np.ndarray, args: dict[str, Any]) -> Any:
    width = round(x.shape[-1] * args["fraction"])
    phase = positions[:, None] * args["theta"] ** (-np.arange(0, width, 2) / width)
    cos, sin = np.cos(phase), np.sin(phase)
    if args["pairing"] == "half":
        a, b = x[..., : width // 2], x[..., width // 2 : width]
        rotated = xp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)
    else:
        a, b = x[..., 0:width:2], x[..., 1:width:2]
        rotated = xp.stack([a * cos - b * sin, a * sin + b * cos], -1).reshape(*x.shape[:-1], width)
    return xp.concatenate([rotated, x[..., width:]], -1)


def _slopes(heads: int) -> np.ndarray:
    """Returns ALiBi's slopes: 2^(-8/P) and its powers, with P the largest power of two up to N heads.

    The remaining heads get every other slope of 2 P heads.
    """
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * (n + 1) / power) for n in range(power)]
    return np.array(slopes + [2 ** (-4 * (2 * n + 1) / power) for n in range(heads - power)])


def _bucket(relative: np.ndarray, num_buckets: int, max_distance: int, bidirectional: bool) -> np.ndarray:
    """Computes T5's bucket of the relative position, key minus query."""
    offset = np.zeros(relative.shape, int)
    if bidirectional:
        num_buckets //= 2
        offset = num_buckets * (relative > 0)
    distance = np.abs(relative) if bidirectional else np.maximum(-relative, 0)
    exact = num_buckets // 2
    ratio = np.log(np.maximum(distance, 1) / exact) / math.log(max_distance / exact)
    far = exact + np.floor(ratio * (num_buckets - exact) + 1e-9).astype(int)  # an exact integer belongs to its own bucket
    return offset + np.where(distance < exact, distance, np.minimum(far, num_buckets - 1))


def _tupe_bucket(i: np.ndarray, j: np.ndarray, args: dict[str, Any]) -> np.ndarray:
    bucket = _bucket(j - i, args["num_buckets"], args["max_distance"], True)
    if args["released"] and args["untie_cls"]:
        bucket = np.where(j == 0, args["num_buckets"], bucket)
        bucket = np.where(i == 0, args["num_buckets"] // 2, bucket)
    return bucket


def _tupe(xp: Any, params: dict[str, Any], args: dict[str, Any], i: np.ndarray, j: np.ndarray, scale: float) -> Any:
    """Computes TUPE's products of positions, [N, rows, keys], with the row and the column of [CLS] reset."""
    table, own_row = params["position"], int(args["released"] and args["untie_cls"])
    if args["released"]:
        table = table - table.mean(-1, keepdims=True)
        table = table / xp.sqrt((table**2).mean(-1, keepdims=True) + 1e-5) * params["norm_scale"] + params["norm_bias"]
    query = xp.einsum("td,dnh->nth", table, params["query_kernel"])
    key = xp.einsum("td,dnh->nth", table, params["key_kernel"])
    if args["released"]:
        query, key = query + params["query_bias"][:, None], key + params["key_bias"][:, None]
    key = xp.repeat(key, query.shape[0] // key.shape[0], axis=0)
    products = query[:, i[:, 0] + own_row] @ xp.swapaxes(key[:, j[0] + own_row], 1, 2) * (scale / math.sqrt(2))
    if not args["untie_cls"]:
        return products
    if args["released"]:
        row, column = ((query[:, n] * key[:, n]).sum(-1) * (scale / math.sqrt(2)) for n in (0, 1))
    else:
        row, column = params["reset"]
    products = xp.where(j == 0, column[:, None, None], products)
    return xp.where(i == 0, row[:, None, None], products)


def _counted(xp: Any, name: str, args: dict[str, Any], params: dict[str, Any], query: Any, count: Any, scale: float) -> Any:
    """Computes CoPE's bias from the counts, [B, N, rows, keys]."""
    if name == "cope_alibi":
        heads = query.shape[1]
        slopes = params["slope"] if args["learned"] else _slopes(heads) if args["slope"] is None else np.full(heads, args["slope"])
        return -slopes[:, None, None] * count
    size = scale if args["scaled"] else 1.0
    if name == "cope_mlp":
        out = size * query @ params["weight_out"].T
        units = zip(params["weight_in"], params["bias_in"], range(args["hidden_dim"]), strict=True)
        return sum(out[..., f, None] * xp.maximum(weight * count + bias, 0.0) for weight, bias, f in units)
    z = size * query @ xp.swapaxes(params["embedding"], -1, -2)
    last = args["max_position"] - 1
    position = xp.minimum(count, last)
    low = xp.floor(position).astype(int)
    high = xp.minimum(low + 1, last)
    share = position - low
    return (1 - share) * xp.take_along_axis(z, low, -1) + share * xp.take_along_axis(z, high, -1)
