"""Values of a configuration: theta, pairing, rotated channels, scalings, sections, and scales of queries."""

import math
from typing import Any

from posjax.checks import INT32, check, short
from posjax.core.encoding import PositionalEncoding
from posjax.core.structures import Pairing
from posjax.encodings import frequencies as scalings
from posjax.encodings.multi_axis import mrope
from posjax.encodings.query_scale import log_scale, query_scale
from posjax.encodings.rope_config.defaults import (
    FRACTION,
    HEAD_DIM,
    INTERLEAVE_OPTION,
    INTERLEAVED,
    LOCAL_THETA,
    MROPE,
    ROTARY_DIM,
    THETA,
)
from posjax.encodings.rope_config.reading import Config, integer, number
from posjax.encodings.rotary import rotated_width

# Names of arguments of scalings, and the keys that they come from.
_KEY_OF = {"original_max_length": "original_max_position_embeddings"}


def theta_of(config: Config, parameters: Config, is_local: bool, layer: int | None) -> float:
    """Returns the base of frequencies: of the layer, of its parameters, of the configuration around them, or of the model type."""
    model = config.get("model_type") or ""
    if (by_layer := config.get("layer_rope_theta")) is not None:
        by_layer = check("layer_rope_theta", by_layer, tuple[float, ...], least=0) or (0.0,)
        if layer is None and len(set(by_layer)) > 1:
            raise ValueError("layer must be the index of a layer, because layers differ in layer_rope_theta, got None")
        if layer is not None and layer >= len(by_layer):
            raise ValueError(f"layer_rope_theta must have a number for each layer, got {len(by_layer)} numbers for layer {layer}")
        return float(by_layer[layer or 0])
    outside = ("rope_local_base_freq", "local_rope_theta") if is_local else ("global_rope_theta", "rope_theta", "rotary_emb_base")
    given = [number(parameters, "rope_theta"), *(number(config, key) for key in outside)]
    default = LOCAL_THETA.get(model, 10_000.0) if is_local else THETA.get(model, 10_000.0)
    return float(next((value for value in given if value is not None), default))


def pairing_of(config: Config) -> Pairing:
    """Returns the pairing of channels, which only few configurations state."""
    model = config.get("model_type") or ""
    if (given := config.get("rotary_emb_interleaved")) is not None:
        return "interleaved" if given else "half"
    if model in INTERLEAVE_OPTION or "rope_interleave" in config:
        return "interleaved" if config.get("rope_interleave", True) else "half"
    return "interleaved" if model in INTERLEAVED else "half"


def _head_dim(config: Config) -> int | None:
    """Returns the channels of a head, with both parts in latent attention; None if the configuration does not say."""
    latent, rest, given = (integer(config, key, least=0) for key in ("qk_rope_head_dim", "qk_nope_head_dim", "head_dim"))
    if latent:
        return latent + rest if rest is not None else given or latent
    if given := given or integer(config, "kv_channels"):
        return given
    if (default := HEAD_DIM.get(config.get("model_type") or "")) is not None:
        return default
    sizes = [next(filter(None, (integer(config, key) for key in keys)), None) for keys in (_WIDTHS, _HEADS)]
    return sizes[0] // sizes[1] if sizes[0] and sizes[1] else None


_WIDTHS, _HEADS = ("hidden_size", "n_embd", "d_model"), ("num_attention_heads", "n_head", "n_heads", "num_heads")


def rotated_channels(config: Config, parameters: Config, kind: str) -> tuple[float, int | None]:
    """Returns the number of rotated channels and the head dimension; or the fraction of channels and None."""
    head_dim, model = _head_dim(config), config.get("model_type") or ""
    if latent := config.get("qk_rope_head_dim"):  # head_dim and partial_rotary_factor only repeat it, in several ways
        return latent, head_dim
    rotary_dim = integer(config, "rotary_dim") or ROTARY_DIM.get(model)
    if rotary_dim is not None:
        if head_dim is None or not 0 < rotary_dim <= head_dim:
            raise ValueError(f"rotary_dim must be an integer from 1 to the head dimension, {head_dim}, got {short(rotary_dim)}")
        rotated_width(head_dim, rotary_dim / head_dim)
        return rotary_dim, head_dim
    keys = ("partial_rotary_factor", "rotary_pct", "rotary_emb_fraction")
    given = [number(parameters, "partial_rotary_factor"), *(number(config, key) for key in keys)]
    fraction = next((value for value in given if value is not None), FRACTION.get(model, 1.0))
    if not 0 < fraction <= 1:
        raise ValueError(f"partial_rotary_factor must be above 0 and at most 1, got {fraction!r}")
    if kind == "proportional":  # an argument of the scaling, which spans whole heads
        return 1.0, None
    if head_dim is None or fraction == 1:
        return fraction, None
    width = int(head_dim * fraction)
    if width < 2 or width % 2:
        raise ValueError(f"partial_rotary_factor must leave an even number of channels, got {fraction!r} * {head_dim} = {width}")
    return width, head_dim


def built(make: Any, **arguments: Any) -> Any:
    """Returns make(**arguments) with errors that name the keys of the configuration."""
    try:
        return make(**arguments)
    except ValueError as error:
        words = str(error)
        for name, key in _KEY_OF.items():
            words = words.replace(name, key)
        raise ValueError(f"invalid configuration: {words}") from None


def _original_length(config: Config, parameters: Config) -> int:
    """Returns the length of sequences in training: outside the parameters, inside them, or ``max_position_embeddings``."""
    original = "original_max_position_embeddings"
    for place, key in ((config, original), (parameters, original), (config, "max_position_embeddings")):
        if (value := integer(place, key, most=INT32)) is not None:
            return value
    raise ValueError("original_max_position_embeddings or max_position_embeddings must be given, got neither")


def scaling_of(kind: str, config: Config, parameters: Config, rotated: float) -> scalings.Scaling | None:
    """Returns the scaling of a type, None for "default"."""
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in parameters.items() if value is not None}

    def need(key: str) -> Any:
        if key not in given:
            raise ValueError(f"{key} must be given for rope_type {kind!r}, got none")
        return given[key]

    def some(*keys: str) -> dict[str, Any]:
        return {key: given[key] for key in keys if key in given}

    def factor(length: int) -> Any:
        if "factor" in given:
            return given["factor"]
        if (longest := number(config, "max_position_embeddings")) is None:
            raise ValueError(f"factor or max_position_embeddings must be given for rope_type {kind!r}, got neither")
        return max(longest, length) / length

    if kind == "linear":
        return built(scalings.linear_scaling, factor=need("factor"))
    if kind == "proportional":
        fraction = given.get("partial_rotary_factor", number(config, "partial_rotary_factor"))
        return built(scalings.proportional_scaling, fraction=1.0 if fraction is None else fraction, **some("factor"))
    if kind == "dynamic":
        if given.get("alpha"):  # HunYuan: a fixed base, although the type says otherwise
            return built(scalings.ntk_scaling, factor=given["alpha"])
        if (longest := integer(config, "max_position_embeddings", most=INT32)) is None:
            raise ValueError("max_position_embeddings must be given for rope_type 'dynamic', got none")
        return built(scalings.dynamic_ntk_scaling, factor=need("factor"), original_max_length=longest)
    if kind == "llama3":
        keys = {key: need(key) for key in ("factor", "low_freq_factor", "high_freq_factor")}
        return built(scalings.llama3_scaling, **keys, original_max_length=_original_length(config, parameters))
    if kind == "yarn":
        length = _original_length(config, parameters)
        keys = some("attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow", "truncate")
        return built(scalings.yarn_scaling, factor=factor(length), original_max_length=length, **keys)
    if kind == "longrope":
        length = _original_length(config, parameters)
        attention_factor = given.get("attention_factor")
        if "short_mscale" in given or "long_mscale" in given:
            attention_factor = need("short_mscale"), need("long_mscale")
        scaling = built(
            scalings.longrope_scaling,
            short_factor=need("short_factor"),
            long_factor=need("long_factor"),
            original_max_length=length,
            factor=factor(length),
            attention_factor=attention_factor,
        )
        width = rotated if rotated > 1 else round(rotated * (_head_dim(config) or 0))
        for name in ("short_factor", "long_factor"):
            if width and len(given[name]) != width // 2:
                raise ValueError(
                    f"{name} must have a number for each of {int(width) // 2} pairs of channels, got {len(given[name])}"
                )
        return scaling
    return None


def mrope_of(
    config: Config, parameters: Config, theta: float, rotated: float, pairing: Pairing, scaling: scalings.Scaling | None
) -> PositionalEncoding:
    """Returns M-RoPE with the sections of a configuration, or those of its model type."""
    layout, sections = MROPE.get(str(config.get("model_type")), ("blocks", None))
    if parameters.get("mrope_interleaved"):
        layout = "interleaved"
    sections = parameters.get("mrope_section", sections)
    if not isinstance(sections, list | tuple) or len(sections) != 3 or not all(isinstance(n, int) for n in sections):
        raise ValueError(f"mrope_section must be three numbers of pairs, got {short(sections)}")
    if layout == "alternating":  # height, width, time
        sections = (sections[2], *sections[:2])
    fraction = rotated if rotated <= 1 else rotated / (_head_dim(config) or rotated)
    if (head_dim := _head_dim(config)) is not None and 2 * sum(sections) != round(fraction * head_dim):
        raise ValueError(
            f"mrope_section must sum to half of the {round(fraction * head_dim)} rotated channels, got {short(sections)} with "
            f"the sum {sum(sections)}"
        )
    return built(mrope, sections=tuple(sections), layout=layout, theta=theta, fraction=fraction, pairing=pairing, scaling=scaling)


def position_scale(config: Config, parameters: Config, rotates: bool) -> PositionalEncoding | None:
    """Returns the factor of queries that grows with their position: Llama 4's in layers without rotation, Ministral 3's in all."""
    if config.get("model_type") == "llama4_text":
        if rotates or not config.get("attn_temperature_tuning", True):
            return None
        beta = config.get("attn_scale", 0.1)
        return built(log_scale, length=int(config.get("floor_scale", 8192)), beta=beta, rule="llama4")
    if (beta := number(parameters, "llama_4_scaling_beta")) is None:
        return None
    return built(log_scale, length=_original_length(config, parameters), beta=beta, rule="ministral3")


def latent_scale(config: Config, scaling: scalings.Scaling | None) -> PositionalEncoding | None:
    """Returns the factor of all scores in multi-head latent attention under YaRN, f(s, mscale_all_dim)^2.

    Ministral 3 has the same keys and no such factor, because its attention is not latent.
    """
    is_yarn = isinstance(scaling, scalings.YarnScaling)
    if not config.get("qk_rope_head_dim") or not is_yarn or not scaling.mscale_all_dim:
        return None
    return query_scale(math.pow(scalings.yarn_mscale(scaling.factor, scaling.mscale_all_dim), 2))
