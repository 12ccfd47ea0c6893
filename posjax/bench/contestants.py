"""Contestants of ``posjax bench attention``: posjax's encodings and kernels, and the other packages that are installed.

A contestant names a function of (query, key, value, params) that computes causal attention; ``prepare`` compiles it.
"""

import dataclasses
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from posjax.attention.api import attention
from posjax.attention.backends.gpu.attention import default_blocks
from posjax.attention.call import prepare as prepare_call
from posjax.bench.inputs import flatten, unflatten
from posjax.core.chain import Chain
from posjax.core.encoding import PositionalEncoding
from posjax.encodings.cope import Cope
from posjax.encodings.spec import parse_encoding


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of a call of causal attention.

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


def attention_options(options: Options, query: Any) -> dict[str, Any]:
    """Returns the arguments of ``posjax.attention`` for a call with these options; ``query`` is [B, T, N, H]."""
    segments = jnp.broadcast_to(options.documents(query.shape[1]), query.shape[:2]) if options.starts else None
    window = None if options.window is None else (options.window, 0)
    return dict(is_causal=True, logits_soft_cap=options.soft_cap, local_window_size=window, segment_ids=segments)


@dataclasses.dataclass(frozen=True)
class Contestant:
    """Names an implementation of attention to measure.

    Attributes:
      kind: posjax, jax.nn, tokamax, torch, x-transformers, or function (a user-defined JAX function of query, key, value).
      encoding: the encoding as text.
      implementation: implementation of posjax.attention, or of the dot_product_attention of jax.nn or tokamax (empty: tokamax's
        default); "package.module:name" for kind function; else empty.
      lowering: lowering of posjax's kernels on a GPU; empty: the preferred one.
    """

    kind: str
    encoding: str = "identity"
    implementation: str = ""
    lowering: str = ""

    @property
    def name(self) -> str:
        if self.kind == "posjax":
            return ", ".join(filter(None, (self.encoding, self.implementation, self.lowering)))
        name = self.kind if self.encoding == "identity" else f"{self.kind} {self.encoding}"
        return f"{name}, {self.implementation}" if self.implementation else name

    @property
    def is_peer(self) -> bool:
        """Returns whether the contestant is from another package; jax.nn with XLA is a baseline that is always available."""
        return self.kind in ("tokamax", "torch", "x-transformers") or self.implementation == "cudnn"


def list_contestants(encodings: tuple[str, ...], implementations: tuple[str, ...], peers: bool, on_gpu: bool) -> list[Contestant]:
    """Lists the baseline, then posjax, then the installed peers."""
    contestants = [Contestant("jax.nn", implementation="xla")]
    encodings = tuple(dict.fromkeys(("identity", *encodings)))
    contestants += [Contestant("posjax", encoding, implementation) for implementation in implementations for encoding in encodings]
    if peers and on_gpu:
        contestants += gpu_peers()
    if peers and importlib.util.find_spec("torch"):
        contestants.append(Contestant("torch"))
        if importlib.util.find_spec("x_transformers"):
            contestants += [Contestant("x-transformers", encoding) for encoding in encodings if _x_transformers_has(encoding)]
    return contestants


def gpu_peers() -> list[Contestant]:
    """Lists the peers on a GPU, which have no positional encoding: cuDNN and, if it is installed, tokamax."""
    peers = [Contestant("jax.nn", implementation="cudnn")]
    if importlib.util.find_spec("tokamax"):
        peers += [Contestant("tokamax"), Contestant("tokamax", implementation="triton")]
    return peers


def _x_transformers_has(encoding: str) -> bool:
    """Returns whether x-transformers supports an encoding: CoPE with gates from logits, unscaled z, one table for all heads."""
    (member, *others) = members(encoding)
    return isinstance(member, Cope) and not others and member.gates == "logits" and not member.scaled and not member.per_head


def members(encoding: str) -> tuple[PositionalEncoding, ...]:
    """Returns the members of a chain; one encoding is its only member."""
    value = parse_encoding(encoding)
    return value.encodings if isinstance(value, Chain) else (value,)


def counts(encoding: str) -> bool:
    """Returns whether an encoding is contextual, i.e. depends on gates."""
    return parse_encoding(encoding).needs_causal


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Holds a compiled contestant with its inputs bound.

    Attributes:
      call: computes once and waits for the result, which is the argument of ``fetch``.
      launch: computes once and may return before the result is ready.
      fetch: converts a result to float32 NumPy arrays, {"out": [B, T, N, H], "grads/query": ..., "grads/params/...": ...}.
      temp_bytes: memory of the program beyond inputs and outputs, as the compiler reports it; None if there is no report.
    """

    call: Callable[[], Any]
    launch: Callable[[], Any]
    fetch: Callable[[Any], dict[str, np.ndarray]]
    temp_bytes: int | None = None


def prepare(
    contestant: Contestant,
    with_gradients: bool,
    arrays: dict[str, np.ndarray],
    dtype: str,
    compiled: dict,
    options: Options = PLAIN,
) -> Prepared:
    """Compiles a contestant and binds its inputs.

    Args:
      contestant: the contestant.
      with_gradients: whether to compute gradients of query, key, value and all parameters, too.
      arrays: result of ``posjax.bench.inputs.make_inputs``.
      dtype: dtype of query, key, value and cotangent.
      compiled: cache of compiled programs, which is updated: inputs of the same shapes reuse a program.
      options: options of the call, for posjax only.

    Raises:
      Exception: any error of the contestant, such as NotImplementedError for an unsupported call.
    """
    if contestant.kind in ("torch", "x-transformers"):
        return _prepare_torch(contestant, with_gradients, arrays, dtype)
    inputs = {name: jnp.asarray(arrays[name], dtype) for name in ("query", "key", "value", "hidden") if name in arrays}
    inputs["params"] = jax.tree.map(jnp.asarray, unflatten(arrays))
    cotangent = jnp.asarray(arrays["cotangent"], dtype)
    forward = _jax_function(contestant, options)

    def both(inputs: dict[str, Any], cotangent: Any) -> tuple[Any, Any]:
        out, pull = jax.vjp(forward, inputs)
        return out, pull(cotangent)[0]

    args = (inputs, cotangent) if with_gradients else (inputs,)
    key = (contestant, options, with_gradients, dtype, tuple((name, x.shape) for name, x in arrays.items()))
    if key not in compiled:
        compiled[key] = jax.jit(both if with_gradients else forward).lower(*args).compile()
    program = compiled[key]

    def fetch(result: Any) -> dict[str, np.ndarray]:
        out, gradients = result if with_gradients else (result, {})
        return {"out": np.asarray(out, np.float32)} | (flatten(jax.device_get(gradients), "grads") if gradients else {})

    analysis = program.memory_analysis()
    temp = None if analysis is None else int(analysis.temp_size_in_bytes)
    return Prepared(lambda: jax.block_until_ready(program(*args)), lambda: program(*args), fetch, temp)


def _jax_function(contestant: Contestant, options: Options) -> Callable[[dict[str, Any]], Any]:
    if contestant.kind == "function":
        module, _, name = contestant.implementation.partition(":")
        function = getattr(importlib.import_module(module), name)
        return lambda inputs: function(inputs["query"], inputs["key"], inputs["value"])
    if contestant.kind == "jax.nn":
        return lambda inputs: jax.nn.dot_product_attention(
            inputs["query"], inputs["key"], inputs["value"], is_causal=True, implementation=contestant.implementation
        )
    if contestant.kind == "tokamax":
        return _tokamax_function(contestant.implementation or None)
    encoding = parse_encoding(contestant.encoding)

    def ours(inputs: dict[str, Any]) -> Any:
        args = inputs["query"], inputs["key"], inputs["value"], encoding, inputs["params"]
        own: dict[str, Any] = dict(hidden=inputs.get("hidden"))
        blocks = None
        if contestant.lowering:
            blocks = default_blocks(prepare_call(*args, is_causal=True, **own), (contestant.lowering,))
        own |= dict(implementation=contestant.implementation, block_sizes=blocks)
        return attention(*args, **attention_options(options, inputs["query"]), **own)

    return ours


def _tokamax_function(implementation: str | None) -> Callable[[dict[str, Any]], Any]:
    import tokamax
    from absl import flags

    if not flags.FLAGS.is_parsed():  # tokamax's settings are absl flags, which must be parsed before use
        flags.FLAGS.mark_as_parsed()
    return lambda inputs: tokamax.dot_product_attention(
        inputs["query"], inputs["key"], inputs["value"], is_causal=True, implementation=implementation
    )


def _prepare_torch(contestant: Contestant, with_gradients: bool, arrays: dict[str, np.ndarray], dtype: str) -> Prepared:
    """Prepares a torch contestant; torch's layout is [B, N, T, H], so arrays are transposed before timing starts."""
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    on_gpu = torch.cuda.is_available() and jax.default_backend() == "gpu"
    options = dict(device="cuda" if on_gpu else "cpu", dtype=getattr(torch, dtype))
    heads_first = {name: np.ascontiguousarray(np.swapaxes(arrays[name], 1, 2)) for name in ("query", "key", "value", "cotangent")}
    query, key, value, cotangent = (torch.from_numpy(x).to(**options) for x in heads_first.values())
    leaves = {"query": query, "key": key, "value": value}
    if contestant.kind == "torch":

        def forward() -> Any:
            return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    else:
        from x_transformers.attend import Attend
        from x_transformers.x_transformers import CoPE

        embedding = torch.from_numpy(arrays["params/embedding"])
        cope = CoPE(dim=query.shape[-1], heads=query.shape[1], max_pos=embedding.shape[0]).to(**options)
        cope.pos_emb.data.copy_(embedding)
        attend = Attend(heads=query.shape[1], causal=True, cope=cope).to(**options)
        leaves["params/embedding"] = cope.pos_emb

        def forward() -> Any:
            return attend(query, key, value)[0]

    for leaf in leaves.values():
        leaf.requires_grad_(with_gradients)
    # Warm up, so that memory and time exclude the libraries that torch loads on its first call.
    warm = torch.ones(1, 1, 2, query.shape[-1], requires_grad=True, **options)
    torch.nn.functional.scaled_dot_product_attention(warm, warm, warm, is_causal=True).sum().backward()

    def call() -> dict[str, Any]:
        for leaf in leaves.values():
            leaf.grad = None
        with torch.set_grad_enabled(with_gradients):
            out = forward()
        if with_gradients:
            out.backward(cotangent)
        if on_gpu:
            torch.cuda.synchronize()
        return {"out": out.detach()} | ({f"grads/{name}": leaf.grad for name, leaf in leaves.items()} if with_gradients else {})

    def fetch(result: dict[str, Any]) -> dict[str, np.ndarray]:
        arrays = {name: x.float().cpu().numpy() for name, x in result.items()}
        return {name: np.swapaxes(x, 1, 2) if x.ndim == 4 else x for name, x in arrays.items()}

    return Prepared(call, call, fetch)
