"""The interface of a positional encoding, a value made of pure functions, and the registry of encodings by name.

An encoding may act at three points of a model; most act at only one:

    tokens -> place -> embed -> [ per layer: q, k, v -> attend ] -> logits

``place`` returns the coordinates of the tokens, ``embed`` adds to their embeddings, and ``attend`` describes the modifications of
attention scores by the structures in ``posjax.core.structures``. ``identity`` acts at none (NoPE); ``chain`` acts wherever its
members do, in order.
"""

import dataclasses
import functools
import importlib.metadata
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Literal, TypeVar, cast, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np

from posjax.checks import bounded, check, check_fields, check_fits, is_array, is_traced, short
from posjax.core.structures import ScoreModifications, Transform
from posjax.typing import Array, Float, Int, Params

MOST_CHANNELS = 2**15  # of heads and of channels in a head


@dataclasses.dataclass(frozen=True)
class Dims:
    """Holds the sizes of a model that determine the shapes of an encoding's parameters.

    Attributes:
      num_heads: N, number of query heads, at most 32,768.
      head_dim: H, channels per head, at most 32,768.
      embed_dim: D, channels of the model; needed by learned and tupe. None is N * H.
      max_length: longest sequence in tokens, for encodings with a table of positions (learned, tupe).
      num_kv_heads: K, number of key heads, which divides N. None is N.

    Raises:
      ValueError: a size is not a positive integer, or num_kv_heads does not divide num_heads.
    """

    num_heads: int = bounded(least=1, most=MOST_CHANNELS)
    head_dim: int = bounded(least=1, most=MOST_CHANNELS)
    embed_dim: int = bounded(cast(int, None), least=1)  # __post_init__ replaces None
    max_length: int | None = bounded(None, least=1)
    num_kv_heads: int = bounded(cast(int, None), least=1)

    def __post_init__(self) -> None:
        for name in ("num_heads", "head_dim"):  # from which the defaults follow
            check(name, getattr(self, name), int, least=1, most=MOST_CHANNELS)
        if self.embed_dim is None:
            object.__setattr__(self, "embed_dim", self.num_heads * self.head_dim)
        if self.num_kv_heads is None:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        check_fields(self)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads={self.num_heads}, got {self.num_kv_heads}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
    """Describes the tokens on one side of an attention call.

    Attributes:
      order: integers [B or 1, T], increasing along a segment; determines causality, windows, scans and caches.
      coordinates: integers or floats [B or 1, T, A], which encodings read. An encoding with one axis reads axis 0. None: the order,
        on every axis.
      segments: integers [B, T]; 0 is padding in a cache. None: all tokens are in one segment.
      hidden: [B, T, D], the activations that query, key and value were projected from (after the norm); None if not given.
    """

    order: Int[Array, "_ T"]
    coordinates: Array | None = None
    segments: Int[Array, "B T"] | None = None
    hidden: Float[Array, "B T D"] | None = None

    @classmethod
    def at(
        cls, positions: Array, *, coordinates: Array | None = None, segments: Array | None = None, hidden: Array | None = None
    ) -> "Tokens":
        """Creates tokens at positions, integers [T], [1, T] or [B, T].

        Args:
          positions: integers [T], [1, T] or [B, T].
          coordinates, segments, hidden: as in ``Tokens``.

        Returns:
          Tokens whose order is the positions.

        Raises:
          ValueError: positions are not integers of these shapes.
        """
        if not is_array(positions, jnp.integer) or positions.ndim not in (1, 2):
            raise ValueError(f"positions must be integers [T] or [B, T], got {short(positions)}")
        return cls(positions if jnp.ndim(positions) == 2 else positions[None], coordinates, segments, hidden)

    @property
    def positions(self) -> Array:
        """Returns the coordinates along the first axis, [B or 1, T]."""
        return self.order if self.coordinates is None else self.coordinates[..., 0]

    def on_axes(self, axes: int) -> Array:
        """Returns the coordinates, [B or 1, T, A], or, if there are none, the order on each of ``axes`` axes.

        Args:
          axes: A, the number of axes.
        """
        if self.coordinates is not None:
            return self.coordinates
        return jnp.broadcast_to(self.order[..., None], (*self.order.shape, axes))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionInputs:
    """Holds the inputs of an attention call for ``PositionalEncoding.attend``.

    Attributes:
      query: [B, T, N, H], before any transform.
      key: [B, S, K, H], before any transform.
      value: [B, S, K, V]; None if only the weights are computed.
      q, k: the tokens of queries and of keys.
      scale: factor of q.k.
      transforms: transforms of query and key by earlier members of a chain.
      state: ``ScoreModifications.state`` of the previous call on the same sequences, while decoding. Before the first token it is
        None or, in an empty cache, zeros; ``attend`` must treat both alike.
    """

    query: Array
    key: Array
    value: Array | None
    q: Tokens
    k: Tokens
    scale: Any
    transforms: tuple[Transform, ...] = ()
    state: Any = None

    @property
    def turned_query(self) -> Array:
        """Returns the query after the transforms of earlier members of a chain."""
        return self._turned()[0]

    @property
    def turned_key(self) -> Array:
        """Returns the key after the transforms of earlier members of a chain."""
        return self._turned()[1]

    def _turned(self) -> tuple[Array, Array]:
        return functools.reduce(lambda qk, transform: transform.applied(*qk), self.transforms, (self.query, self.key))


def _with_checked_arguments(own: Callable[..., Params]) -> Callable[..., Params]:
    @functools.wraps(own)
    def init(self: "PositionalEncoding", key: Array, dims: Dims) -> Params:
        if not is_array(key, jax.dtypes.prng_key) and getattr(key, "dtype", None) != jnp.uint32:
            raise ValueError(f"key must be a PRNG key such as jax.random.key(0), got {short(key)}")
        if not isinstance(dims, Dims):
            raise ValueError(f"dims must be sizes such as Dims(num_heads=8, head_dim=64), got {short(dims)}")
        if not is_traced(key):  # without jit, arrays are allocated immediately
            shapes = jax.eval_shape(lambda key: own(self, key, dims), key)
            check_fits(f"params of {short(self)} for {dims}", shapes)  # the arguments are in both
        return own(self, key, dims)

    return init


class PositionalEncoding:
    """Base class of positional encodings: immutable values made of pure functions.

    An encoding is a frozen dataclass, decorated with ``register``, that overrides the methods of the points at which it acts. Its
    fields are its arguments. Fields that hold arrays, such as a swept theta, are leaves of the encoding as a pytree, and all others
    are static. An encoding can therefore be an argument of ``jax.jit``, mapped over by ``jax.vmap`` and scanned over. Encodings
    with equal arguments are equal, have equal hashes, can be pickled, and share one compiled program.

        @pj.register("constant")
        class Constant(pj.PositionalEncoding):
            value: float = 1.0

            def embed(self, params, x, tokens):
                return x + self.value

    Attributes:
      name: name in tables and messages, and key in the params of ``chain``; by default the name given to ``register``.
      registered_name: the name in the registry.
      per_layer: True if every layer learns its own params, False if all layers share one set; or a dict with the structure of
        params, which may end at any level with a value for everything below.
      axes: A, the number of axes of the coordinates that it reads.
      needs_hidden: True if ``attend`` reads ``Tokens.hidden``.
      needs_causal: True if a bias sums over the keys between key and query, so that attention must be causal or masked.
      cache: the form in which a decoder caches keys. "transformed" is the key after ``attend``, which may then depend only on its
        own token and on the state. "raw" is the key as given: every call applies ``attend`` to all keys again, for encodings in
        which earlier keys change as the sequence grows (dynamic NTK). Such an encoding may have neither a state nor
        ``needs_hidden``.
    """

    name: str = "encoding"
    registered_name: ClassVar[str] = "encoding"
    per_layer: bool | Mapping[str, Any] = False
    axes: int = 1
    needs_hidden: bool = False
    needs_causal: bool = False
    cache: Literal["transformed", "raw"] = "transformed"

    @property
    def title(self) -> str:
        """Returns the name for messages: ``name``, or the call that constructs the encoding if the name is not one."""
        return self.name

    @_with_checked_arguments
    def init(self, key: Array, dims: Dims) -> Params:
        """Returns the learned arrays, float32; {} if nothing is learned.

        Args:
          key: PRNG key.
          dims: sizes of the model.
        """
        return {}

    def place(self, tokens: Tokens, key: Array | None = None) -> Array | None:
        """Returns the coordinates of the tokens, [B or 1, T, A], or None for their order; models call it once, before ``embed``.

        Args:
          tokens: the tokens, with the coordinates given by the caller.
          key: PRNG key, different in every training step, for encodings that draw random coordinates; None in evaluation.
        """
        return tokens.coordinates

    def embed(self, params: Params, x: Float[Array, "B T D"], tokens: Tokens) -> Float[Array, "B T D"]:
        """Returns x with the encoding of its tokens' coordinates added.

        Args:
          params: parameters from ``init``.
          x: embeddings [B, T, D].
          tokens: the tokens, with the coordinates that ``place`` returned.
        """
        return x

    def attend(self, params: Params, inputs: AttentionInputs) -> ScoreModifications:
        """Returns the modifications of the scores of an attention call.

        Args:
          params: parameters from ``init``.
          inputs: query, key, value and tokens of the call.
        """
        return ScoreModifications()

    def max_length(self, dims: Dims) -> int | None:
        """Returns the longest sequence that the parameters support, in tokens; None for no limit.

        Args:
          dims: sizes of the model.
        """
        return None

    def _key(self) -> tuple[Any, ...]:
        """Returns the key of equality and hash: arrays are compared by their bytes, traced arrays by identity."""
        return type(self), *(_comparable(getattr(self, field.name)) for field in _fields(self))

    def __eq__(self, other: object) -> bool:
        return self is other or (type(other) is type(self) and other._key() == self._key())

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        """Returns the call that constructs the encoding, without default arguments."""
        given = ((f, getattr(self, f.name)) for f in _fields(self))
        return f"{self.registered_name}({', '.join(f'{f.name}={x!r}' for f, x in given if is_array(x) or x != f.default)})"


def _fields(encoding: Any) -> tuple[dataclasses.Field, ...]:
    """Returns the arguments of an encoding, whose class ``register`` has made a dataclass."""
    return dataclasses.fields(encoding)


def _comparable(x: Any) -> Any:
    if is_traced(x):
        return "traced", id(x)
    if is_array(x):
        x = np.asarray(x)
        return x.dtype, x.shape, x.tobytes()
    return tuple(map(_comparable, x)) if isinstance(x, tuple) else x


def hyperparameter(default: Any, **bounds: Any) -> Any:
    """Declares a field with a number that does not affect shapes and may be traced, so that many values share one program.

    ``bounds`` are those of ``posjax.checks.Bounds``. The annotation must allow an array, as ``Array | float`` does; the array must
    be a scalar unless ``rank`` is given.
    """
    return bounded(default, traced=True, **{"rank": 0} | bounds)


EncodingClass = TypeVar("EncodingClass", bound=type[PositionalEncoding])
_REGISTRY: dict[str, type[PositionalEncoding]] = {}
ENTRY_POINTS = "posjax.encodings"  # entry-point group through which packages provide encodings


@dataclass_transform(eq_default=False, frozen_default=True, field_specifiers=(dataclasses.field, hyperparameter))
def register(name: str) -> Callable[[EncodingClass], EncodingClass]:
    """Returns a class decorator that makes a subclass of PositionalEncoding a frozen dataclass, a pytree and a registry entry.

    Its fields are checked by their annotations whenever an encoding is constructed (``posjax.checks``): an ``int`` may not be a
    string, and a ``float`` must be finite. ``posjax.checks.bounded`` declares bounds. Annotations of other types are not checked.
    ``init`` raises ValueError if the params do not fit the memory of the machine.

    The encoding can then be used by name in configurations and on the command line, as in ``rope + mine(3)``. A package provides
    encodings to its users by an entry point in the group ``posjax.encodings`` with the name of the encoding.

    Args:
      name: a Python identifier, lower case by convention.

    Raises:
      ValueError: the name is not an identifier, or another class has it.
      TypeError: the class is not a subclass of PositionalEncoding.
    """

    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"the name of an encoding must be a Python identifier, got {short(name)}")

    def decorate(cls: EncodingClass) -> EncodingClass:
        if not (isinstance(cls, type) and issubclass(cls, PositionalEncoding)):
            raise TypeError(f"register must decorate a subclass of PositionalEncoding, got {short(cls)}")
        existing = _REGISTRY.get(name)
        if existing is not None and (existing.__module__, existing.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"the name {name!r} is taken by {existing.__module__}.{existing.__qualname__}; use another one")
        cls = as_value(cls)
        cls.registered_name = name
        if "name" not in vars(cls):
            cls.name = name
        _REGISTRY[name] = cls
        return cls

    return decorate


@dataclass_transform(eq_default=False, frozen_default=True, field_specifiers=(dataclasses.field, hyperparameter))
def as_value(cls: EncodingClass) -> EncodingClass:
    """Makes a class a frozen dataclass and a pytree with the fields that hold arrays or encodings as children.

    The fields are checked by their annotations before the class's own ``__post_init__``, and the arguments of ``init`` before it
    runs.
    """
    arounds: dict[str, Any] = {"__post_init__": _with_checked_fields, "init": _with_checked_arguments}
    for name, around in arounds.items():
        if name in vars(cls) or not hasattr(cls, name):
            setattr(cls, name, around(vars(cls).get(name)))
    cls = dataclasses.dataclass(frozen=True, eq=False, repr=False)(cls)
    names = [field.name for field in _fields(cls)]

    def is_child(x: Any) -> bool:
        return is_array(x) or isinstance(x, PositionalEncoding) or (isinstance(x, tuple) and any(map(is_child, x)))

    def flatten(encoding: PositionalEncoding) -> tuple[list[tuple[Any, Any]], tuple[Any, ...]]:
        values = {name: getattr(encoding, name) for name in names}
        children = [(jax.tree_util.GetAttrKey(name), x) for name, x in values.items() if is_child(x)]
        return children, tuple((name, None if is_child(x) else (x,)) for name, x in values.items())

    def unflatten(static: tuple[Any, ...], children: Iterable[Any]) -> PositionalEncoding:
        encoding, remaining = object.__new__(cls), iter(children)
        for name, x in static:  # no checks: leaves may be anything while jax builds trees
            object.__setattr__(encoding, name, next(remaining) if x is None else x[0])
        return encoding

    jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)
    return cls


def _with_checked_fields(own: Callable[[Any], None] | None) -> Callable[[Any], None]:
    def __post_init__(self: PositionalEncoding) -> None:
        check_fields(self)
        if own is not None:
            own(self)

    return __post_init__


def registered() -> Mapping[str, type[PositionalEncoding]]:
    """Returns the registry, {name: class}: first posjax's encodings, then the user's and those of installed packages."""
    for entry in _entry_points():
        if entry.name not in _REGISTRY:
            cls = entry.load()
            if _REGISTRY.get(entry.name) is not cls:
                raise ValueError(
                    f"the entry point {entry.name!r} = {entry.value!r} of the group {ENTRY_POINTS!r} must name a class that "
                    f"register({entry.name!r}) decorates, got {cls!r}"
                )
    return types.MappingProxyType(_REGISTRY)


@functools.cache
def _entry_points() -> tuple[importlib.metadata.EntryPoint, ...]:
    return tuple(importlib.metadata.entry_points(group=ENTRY_POINTS))


@register("identity")
class Identity(PositionalEncoding):
    """Adds no positional encoding (NoPE): scores are scale * q.k.

    A causal decoder can still distinguish positions through its mask; a bidirectional model is symmetric under permutation.

    Example:
      >>> encoding = pj.identity()

    Kazemnejad et al., arXiv:2305.19466.
    """


identity = Identity


def encoding(
    name: str,
    *,
    init: Callable[[Array, Dims], Params] | None = None,
    place: Callable[[Tokens, Array | None], Array] | None = None,
    embed: Callable[[Params, Array, Tokens], Array] | None = None,
    attend: Callable[[Params, AttentionInputs], ScoreModifications] | None = None,
    max_length: Callable[[Dims], int | None] | None = None,
    per_layer: bool = False,
    axes: int = 1,
    needs_hidden: bool = False,
    needs_causal: bool = False,
    cache: Literal["transformed", "raw"] = "transformed",
) -> PositionalEncoding:
    """Creates an encoding from functions, as an alternative to a class.

    Two encodings are equal only if their functions are the same objects; define functions at module level.

    Args:
      name: name in tables and messages.
      init, place, embed, attend, max_length: methods of PositionalEncoding without ``self``; None: the base class's method.
      per_layer, axes, needs_hidden, needs_causal, cache: as in PositionalEncoding.

    Returns:
      An encoding that calls the functions.

    Raises:
      TypeError: an argument that must be a function is not one.

    Example:
      >>> def halved(params, inputs):
      ...     query, key = inputs.turned_query, inputs.turned_key
      ...     return pj.ScoreModifications(transforms=(pj.Replace(query / 2, key),))
      >>> encoding = pj.encoding("halved", attend=halved)
    """
    given = dict(init=init, place=place, embed=embed, attend=attend, max_length=max_length)
    for point, function in given.items():
        if function is not None and not callable(function):
            raise TypeError(f"{point} must be a function, or None for the method of PositionalEncoding, got {short(function)}")
    functions = tuple((point, function) for point, function in given.items() if function is not None)
    return _OfFunctions(name, functions, per_layer, axes, needs_hidden, needs_causal, cache)


def _delegate(point: str) -> Callable[..., Any]:
    base = getattr(PositionalEncoding, point)

    @functools.wraps(base)
    def method(self: "_OfFunctions", *args: Any) -> Any:
        function = dict(self.functions).get(point)
        return base(self, *args) if function is None else function(*args)

    return method


@as_value
class _OfFunctions(PositionalEncoding):
    name: str = ""
    functions: tuple[tuple[str, Callable[..., Any]], ...] = ()
    per_layer: bool = False
    axes: int = bounded(1, least=1, most=MOST_CHANNELS)
    needs_hidden: bool = False
    needs_causal: bool = False
    cache: Literal["transformed", "raw"] = "transformed"

    init, place, embed, attend, max_length = map(_delegate, ("init", "place", "embed", "attend", "max_length"))

    def __repr__(self) -> str:
        points = [f"{point}={getattr(function, '__name__', function)}" for point, function in self.functions]
        return f"encoding({', '.join([repr(self.name), *points])})"


def what_is(value: Any) -> str:
    """Describes a value that should be an encoding, for error messages."""
    if isinstance(value, type) and issubclass(value, PositionalEncoding):
        return f"the class {value.__name__}; call it: {value.registered_name}(...)"
    return short(value)


def get_param(params: Params, name: str, encoding: str, shape: tuple[int | None, ...] | None = None) -> Array:
    """Returns params[name] after checking that it exists and has the right shape.

    Args:
      params: parameters of the encoding.
      name: key of the parameter.
      encoding: name of the encoding, for messages.
      shape: required shape, with None for an axis of any length; None accepts every shape.

    Raises:
      ValueError: the parameter is missing or has another shape.
    """
    if not isinstance(params, Mapping) or name not in params:
        have = sorted(params) if isinstance(params, Mapping) and params else short(params)
        raise ValueError(
            f"params of {encoding} must have the key {name!r}, got {have}; pass the result of encoding.init(key, dims)"
        )
    param = params[name]
    if not is_array(param):
        raise ValueError(f"params[{name!r}] of {encoding} must be an array, got {short(param)}")
    if shape is not None and (param.ndim != len(shape) or any(n not in (None, m) for n, m in zip(shape, param.shape, strict=True))):
        wanted = str(shape).replace("None", "any")
        raise ValueError(f"params[{name!r}] of {encoding} must have shape {wanted}, got {param.shape}")
    return param


# Traced hyperparameters: numbers that do not affect shapes, so that many values share one compiled program --------------


def traced_hparam(value: Array | float | int) -> Float[Array, ""]:
    """Converts a hyperparameter to a float32 scalar with gradient zero.

    Some kernels cannot compute its gradient, so for consistency no implementation does.
    """
    return jax.lax.stop_gradient(jnp.asarray(value, jnp.float32))
