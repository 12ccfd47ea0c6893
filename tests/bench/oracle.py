"""Causal attention under every encoding in float64 NumPy, written from the papers; only the names of parameters are posjax's.

A block of query rows is computed with all of its keys at once, so memory is that of a block.
"""

import dataclasses
import math
from typing import Any

import numpy as np

from posjax.bench.contestants import PLAIN, Options
from posjax.core.chain import Chain
from posjax.encodings.spec import parse_encoding

_CELLS = 2**21  # scores in memory at once


def attend(spec: str, arrays: dict[str, np.ndarray], first: int, options: Options = PLAIN) -> tuple[np.ndarray, float | None]:
    """Computes the output of the queries from ``first`` on, [B, T - first, N, H] float64, and the mean gate, if there are gates."""
    parts, gates = [], []
    for start, stop in _blocks(arrays["query"].shape, first):
        out, gate = _rows(spec, {name: np.asarray(x, np.float64) for name, x in arrays.items()}, start, stop, options)
        parts.append(out)
        gates += [] if gate is None else [(float(gate), (stop - start) * (start + stop + 1) / 2)]
    mean = sum(g * cells for g, cells in gates) / sum(cells for _, cells in gates) if gates else None
    return np.concatenate(parts, axis=1), mean


def _blocks(shape: tuple[int, ...], first: int) -> list[tuple[int, int]]:
    batch, length, heads, _ = shape
    size = max(1, _CELLS // (batch * heads * length))
    return [(start, min(start + size, length)) for start in range(first, length, size)]


def members(spec: str) -> list[tuple[str, dict[str, Any]]]:
    """Parses the text of an encoding into its members, each as ("cope", {"max_position": 64, ...})."""
    encoding = parse_encoding(spec)
    encodings = encoding.encodings if isinstance(encoding, Chain) else (encoding,)
    return [(e.registered_name, {f.name: getattr(e, f.name) for f in dataclasses.fields(e)}) for e in encodings]


def _rows(spec: str, arrays: dict[str, Any], start: int, stop: int, options: Options) -> tuple[Any, Any]:
    """Computes the output [B, stop - start, N, H] of a block of queries, and their mean gate."""
    query, key, value = (np.swapaxes(arrays[name], 1, 2) for name in ("query", "key", "value"))
    key, value = (np.repeat(x, query.shape[1] // x.shape[1], axis=1) for x in (key, value))
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
            rotated_query, rotated_key = _rotate(rotated_query, i[:, 0], args), _rotate(rotated_key, j[0], args)
    logits = scale * rotated_query @ np.swapaxes(rotated_key, 2, 3)
    for name, args, params in parts:
        if name == "tupe":
            logits = logits / math.sqrt(2) + _tupe(params, args, i, j, scale)
    scores, mean_gate = logits, None
    for name, args, params in parts:
        if name == "alibi":
            scores = scores - _slopes(query.shape[1])[:, None, None] * (i - j)
        elif name == "t5" or (name == "tupe" and args["relative"]):
            bucket = _tupe_bucket(i, j, args) if name == "tupe" else _bucket(j - i, **args)
            bias = np.moveaxis(params["bias"][bucket], -1, 0)
            no_bias = (name == "tupe") and args["untie_cls"] and not args["released"]
            scores = scores + (np.where((i == 0) | (j == 0), 0.0, bias) if no_bias else bias)
        elif name.startswith("cope"):
            met = {"content": key, "values": value}.get(args["gates"])
            if args["gates"] == "keys":
                met = np.einsum("bsd,dkh->bksh", arrays["hidden"][:, :stop], params["gate_kernel"])
                met = np.repeat(met, query.shape[1] // met.shape[1], axis=1)
            gate_logits = logits if met is None else scale * query @ np.swapaxes(met, 2, 3)
            gate = np.where(visible, 1 / (1 + np.exp(-gate_logits)), 0.0)
            count = np.flip(np.cumsum(np.flip(gate, -1), -1), -1)
            mean_gate = gate.sum() / (visible.sum() * math.prod(gate.shape[:2]))
            scores = scores + _counted(name, args, params, query, count, scale)
    if options.soft_cap is not None:
        scores = options.soft_cap * np.tanh(scores / options.soft_cap)
    scores = np.where(visible, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    out = (weights / weights.sum(-1, keepdims=True)) @ value
    return np.swapaxes(out, 1, 2), mean_gate


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


def _rotate(x: Any, positions: np.ndarray, args: dict[str, Any]) -> Any:
    width = round(x.shape[-1] * args["fraction"])
    phase = positions[:, None] * args["theta"] ** (-np.arange(0, width, 2) / width)
    cos, sin = np.cos(phase), np.sin(phase)
    if args["pairing"] == "half":
        a, b = x[..., : width // 2], x[..., width // 2 : width]
        turned = np.concatenate([a * cos - b * sin, a * sin + b * cos], -1)
    else:
        a, b = x[..., 0:width:2], x[..., 1:width:2]
        turned = np.stack([a * cos - b * sin, a * sin + b * cos], -1).reshape(*x.shape[:-1], width)
    return np.concatenate([turned, x[..., width:]], -1)


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


def _tupe(params: dict[str, Any], args: dict[str, Any], i: np.ndarray, j: np.ndarray, scale: float) -> Any:
    """Computes TUPE's products of positions, [N, rows, keys], with the row and the column of [CLS] reset."""
    table, own_row = params["position"], int(args["released"] and args["untie_cls"])
    if args["released"]:
        table = table - table.mean(-1, keepdims=True)
        table = table / np.sqrt((table**2).mean(-1, keepdims=True) + 1e-5) * params["norm_scale"] + params["norm_bias"]
    query = np.einsum("td,dnh->nth", table, params["query_kernel"])
    key = np.einsum("td,dnh->nth", table, params["key_kernel"])
    if args["released"]:
        query, key = query + params["query_bias"][:, None], key + params["key_bias"][:, None]
    key = np.repeat(key, query.shape[0] // key.shape[0], axis=0)
    products = query[:, i[:, 0] + own_row] @ np.swapaxes(key[:, j[0] + own_row], 1, 2) * (scale / math.sqrt(2))
    if not args["untie_cls"]:
        return products
    if args["released"]:
        row, column = ((query[:, n] * key[:, n]).sum(-1) * (scale / math.sqrt(2)) for n in (0, 1))
    else:
        row, column = params["reset"]
    products = np.where(j == 0, column[:, None, None], products)
    return np.where(i == 0, row[:, None, None], products)


def _counted(name: str, args: dict[str, Any], params: dict[str, Any], query: Any, count: Any, scale: float) -> Any:
    """Computes CoPE's bias from the counts, [B, N, rows, keys]."""
    if name == "cope_alibi":
        heads = query.shape[1]
        slopes = params["slope"] if args["learned"] else _slopes(heads) if args["slope"] is None else np.full(heads, args["slope"])
        return -slopes[:, None, None] * count
    size = scale if args["scaled"] else 1.0
    if name == "cope_mlp":
        out = size * query @ params["weight_out"].T
        units = zip(params["weight_in"], params["bias_in"], range(args["hidden_dim"]), strict=True)
        return sum(out[..., f, None] * np.maximum(weight * count + bias, 0.0) for weight, bias, f in units)
    z = size * query @ np.swapaxes(params["embedding"], -1, -2)
    last = args["max_position"] - 1
    position = np.minimum(count, last)
    low = np.floor(position).astype(int)
    high = np.minimum(low + 1, last)
    share = position - low
    return (1 - share) * np.take_along_axis(z, low, -1) + share * np.take_along_axis(z, high, -1)
