"""Text generation: chunked prefill of a key-value cache, then decoding one token at a time, each compiled once.

prompts -> [ chunk, chunk, ... ] -> logits -> token -> logits -> token -> ...    batched; each row has its own position
"""

import functools
from collections.abc import Callable, Iterator, Sequence, Set
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from posjax.checks import check, check_at_least, is_array, short
from posjax.inference.sampling import PLAIN, Sampling, sample
from posjax.models.transformer import Transformer
from posjax.typing import Array, Params

_GRAIN = 16  # chunk and cache sizes are multiples of it, so that prompts of similar length share a compiled program


def generate(
    with_params: Callable[[Params], Transformer], params: Params, prompts: Sequence[Sequence[int]], **options: Any
) -> list[np.ndarray]:
    """Generates a continuation of each prompt. The arguments are those of ``stream``.

    Args:
      with_params, params: a decoder in the form that ``functional`` returns.
      prompts: B non-empty sequences of token ids.
      **options: max_new_tokens and the other keyword arguments of ``stream``.

    Returns:
      The new tokens of each prompt, an int32 array of at most ``max_new_tokens``.

    Raises:
      ValueError: as ``stream``.
    """
    steps = [*stream(with_params, params, prompts, **options)]
    rows = np.stack(steps, axis=1) if steps else np.zeros((len(prompts), 0), np.int32)
    return [row[row >= 0] for row in rows]


def stream(
    with_params: Callable[[Params], Transformer],
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = PLAIN,
    seed: int = 0,
    stop_tokens: Sequence[int] = (),
    chunk: int = 256,
    window: int | None = None,
    coordinates: Sequence[Any] | None = None,
) -> Iterator[np.ndarray]:
    """Yields the next token of every row, int32 [B], until all rows have stopped or ``max_new_tokens`` tokens are generated.

    Prompts may differ in length: each row continues from its last token and never attends to padding. A greedily decoded row does
    not depend on the other rows. Prefill chunks and decoding steps are each compiled once per model, sampling configuration,
    batch size and cache size. The cache is updated in place.

    Args:
      with_params, params: a decoder in the form that ``functional`` returns.
      prompts: B non-empty sequences of token ids.
      max_new_tokens: maximum number of new tokens per row.
      sampling: how tokens are drawn.
      seed: seed of the random draws. The draws of row b do not depend on the other rows.
      stop_tokens: ids that end a row. They are not yielded; a row that has stopped yields -1.
      chunk: number of prompt tokens that are processed at a time.
      window: number of earlier tokens that are kept and attended to, in constant memory. None means all, or the model's local
        window.
      coordinates: B arrays [tokens of the prompt, A] for encodings that read coordinates, such as those of ``mrope_positions``. New
        tokens continue from a row's own largest coordinate plus one, on all axes. None: coordinates are the positions.

    Raises:
      ValueError: (when called, before anything is compiled) there are no prompts, one is empty, ids lie outside the vocabulary, a
        size is below 1, there are more tokens than the encoding supports, coordinates do not fit the prompts, or the model cannot
        decode.
    """
    for name, size in (("max_new_tokens", max_new_tokens), ("chunk", chunk), ("window", window)):
        if size is not None or name != "window":
            check_at_least(name, size, 1)
    if not isinstance(sampling, Sampling):
        raise TypeError(f"sampling must be a Sampling such as Sampling(temperature=0.8), got {short(sampling)}")
    seed = check("seed", seed, int, least=-(2**63), most=2**63 - 1)
    if not isinstance(stop_tokens, Sequence | Set) or isinstance(stop_tokens, str | bytes) or not all(map(_is_id, stop_tokens)):
        raise ValueError(f"stop_tokens must be token ids such as (0, 1), got {short(stop_tokens)}")
    if isinstance(prompts, str | bytes) or not (isinstance(prompts, Sequence) or (is_array(prompts) and prompts.ndim)):
        raise ValueError(f"prompts must be sequences of token ids, one for each row, got {short(prompts)}")
    model = with_params(params)
    rows = [np.asarray(prompt) for prompt in prompts]
    if not rows:
        raise ValueError("prompts must contain at least one prompt, got none")
    for number, row in enumerate(rows):
        if row.ndim != 1 or not row.size or not np.issubdtype(row.dtype, np.integer):
            raise ValueError(f"prompts must be sequences of at least one token id, got {short(prompts[number])}")
        if row.min() < 0 or row.max() >= model.config.vocab_size:
            raise ValueError(f"prompts must have ids from 0 to {model.config.vocab_size - 1}, got {row.min()} to {row.max()}")
    longest = max(map(len, rows))
    for encoding in model.encodings:
        limit = encoding.max_length(model.config.dims)
        if limit is not None and longest + max_new_tokens > limit:
            raise ValueError(
                f"a prompt of {longest} tokens and max_new_tokens={max_new_tokens} exceed max_length={limit} of {encoding.title}; "
                f"set max_new_tokens to at most {max(0, limit - longest)}, or use an encoding without a table, such as rope()"
            )
    width = min(chunk, _rounded(longest))
    chunks = -(-longest // width)
    at = None if coordinates is None else _padded_coordinates(coordinates, rows, chunks * width)
    length, dtype = _rounded(chunks * width + max_new_tokens), None if at is None else at.dtype
    cache = model.init_cache(len(rows), length, window=window, coordinate_dtype=dtype)
    tokens = np.zeros((len(rows), chunks * width), np.int32)
    segments = np.zeros_like(tokens)
    for number, row in enumerate(rows):
        tokens[number, : len(row)] = row
        segments[number, : len(row)] = 1
    split = [[None] * chunks if x is None else np.split(x, chunks, axis=1) for x in (tokens, segments, at)]
    pieces = [*zip(*split, strict=True)]
    key = jax.random.key(seed)
    return _tokens(with_params, params, cache, pieces, key, max_new_tokens, sampling, frozenset(stop_tokens))


def _padded_coordinates(coordinates: Any, rows: Sequence[np.ndarray], length: int) -> np.ndarray:
    """Returns the coordinates of all prompts as one array [B, length, A], int32 or float32, with zeros behind each prompt."""
    each = [np.asarray(x) for x in coordinates] if isinstance(coordinates, Sequence) or is_array(coordinates) else []
    axes = each[0].shape[-1] if each and each[0].ndim else 0
    if [x.shape for x in each] != [(len(row), axes) for row in rows] or any(x.dtype.kind not in "iuf" for x in each):
        got = [x.shape for x in each] or short(coordinates)
        raise ValueError(f"coordinates must be one array [tokens, axes] for each of the {len(rows)} prompts, got {got}")
    dtype = np.float32 if any(x.dtype.kind == "f" for x in each) else np.int32
    padded = np.zeros((len(rows), length, axes), dtype)
    for row, x in zip(padded, each, strict=True):
        row[: len(x)] = x
    return padded


def _is_id(token: Any) -> bool:
    return isinstance(token, int | np.integer) and not isinstance(token, bool)


def _rounded(size: int) -> int:
    return -(-size // _GRAIN) * _GRAIN


def _tokens(
    with_params: Callable,
    params: Params,
    cache: Any,
    pieces: Sequence[tuple[Any, ...]],
    key: Array,
    count: int,
    sampling: Sampling,
    stops: frozenset[int],
) -> Iterator[np.ndarray]:
    logits = jnp.zeros((len(pieces[0][0]), with_params(params).config.vocab_size))
    for tokens, segments, coordinates in pieces:
        logits, cache = _read(with_params, params, tokens, segments, coordinates, logits, cache)
    active = np.ones(len(logits), bool)
    for number in range(count):
        token, logits, cache = _step(with_params, sampling, params, key, number, logits, cache)
        drawn = np.asarray(token)
        active &= ~np.isin(drawn, list(stops))
        if not active.any():
            return
        yield np.where(active, drawn, -1)


@functools.partial(jax.jit, static_argnames="with_params", donate_argnames=("logits", "cache"))
def _read(
    with_params, params: Params, tokens: Array, segments: Array, coordinates: Array | None, logits: Array, cache: Any
) -> tuple[Array, Any]:
    """Writes one chunk of the prompts to the cache. Returns the logits after each row's last token so far, and the cache."""
    count = (segments != 0).sum(1)
    last = jnp.maximum(count - 1, 0)
    new, cache = with_params(params).decode(tokens, cache, segment_ids=segments, coordinates=coordinates, logits_at=last)
    return jnp.where((count > 0)[:, None], new[:, 0], logits), cache


@functools.partial(jax.jit, static_argnames=("with_params", "sampling"), donate_argnames=("logits", "cache"))
def _step(with_params, sampling: Sampling, params: Params, key: Array, number: Array, logits: Array, cache: Any) -> tuple:
    """Draws one token per row and feeds it to the model. Returns the token, the next logits and the cache."""
    token = sample(jax.random.fold_in(key, number), logits, sampling)
    new, cache = with_params(params).decode(token[:, None], cache)
    return token, new[:, 0], cache
