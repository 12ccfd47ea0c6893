"""Layers that differ: which rotate, and which parameters of a configuration are theirs."""

from collections.abc import Mapping, Sequence
from typing import Any

from posjax.checks import check, near, short
from posjax.encodings.rope_config.defaults import ATTENTION, LOCAL_THETA, NOPE, NOPE_INTERVAL, NOT_ATTENTION, PATTERN, SCALED_FULL
from posjax.encodings.rope_config.reading import FLAGS, Config, integer


def _layers(config: Config) -> Sequence[str] | None:
    """Returns the type of every layer; None if the configuration does not say."""
    types, count = check("layer_types", config.get("layer_types"), tuple[str, ...] | None), integer(config, "num_hidden_layers")
    if types is not None:
        return types
    model = config.get("model_type")
    if count is None:
        return None
    if model in ("modernbert", "modernbert-decoder"):
        every = integer(config, "global_attn_every_n_layers") or 3
        return ["sliding_attention" if n % every else "full_attention" for n in range(count)]
    if model not in PATTERN:
        return None
    every = check("sliding_window_pattern", config.get("sliding_window_pattern", PATTERN[model]), int | str | None, least=0)
    if isinstance(every, str) and every:  # "LLLG": local, local, local, global
        return ["sliding_attention" if every[n % len(every)] == "L" else "full_attention" for n in range(count)]
    return ["sliding_attention" if every and (n + 1) % every else "full_attention" for n in range(count)]


def layer_type_of(config: Config, layer_type: str | None, layer: int | None) -> str | None:
    """Returns the type of the layer after checks; None if it is not known."""
    types, nested = _layers(config), _nested(config)
    if layer is not None:
        count = integer(config, "num_hidden_layers") or (len(types) if types else None)
        if count is not None and layer >= count:
            raise ValueError(f"layer must be below the number of layers, {count}, got {layer}")
        own = types[layer] if types and layer < len(types) else None
        if layer_type is not None and own is not None and layer_type != own:
            raise ValueError(f"layer_type must be the type of layer {layer}, {own!r}, or None, got {layer_type!r}")
        layer_type = layer_type or own
    if layer_type is None:
        return None
    known = {*(types or ATTENTION), *(nested or {}), *NOT_ATTENTION, *(ATTENTION if types is None or not nested else ())}
    if layer_type not in known:
        words = ", ".join(sorted({*(types or ATTENTION), *(nested or {})}))
        raise ValueError(f"layer_type must be one of {words}, or None, got {short(layer_type)}{near(str(layer_type), known)}")
    return layer_type


def _given(config: Config) -> dict[str, Any]:
    """Returns ``rope_parameters`` and ``rope_scaling`` as one dict."""
    merged: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        given = config.get(name)
        if given is None:
            continue
        if not isinstance(given, Mapping):
            raise ValueError(f"{name} must be an object or null, got {short(given)}")
        for key, value in given.items():
            if key in merged and merged[key] != value:
                raise ValueError(
                    f"rope_parameters and rope_scaling must agree, got {key}={short(value)} and {key}={short(merged[key])}"
                )
            merged[key] = value
    return merged


def _nested(config: Config) -> dict[str, Any] | None:
    """Returns the parameters by type of layer; None if all layers have the same."""
    given = _given(config)
    by_type = {key: value for key, value in given.items() if isinstance(value, Mapping) or (value is None and "attention" in key)}
    if not by_type:
        return None
    if rest := [key for key in given if key not in by_type]:
        raise ValueError(
            f"rope_parameters must be flat or by type of layer, got {', '.join(map(repr, by_type))} beside {rest[0]}="
            f"{short(given[rest[0]])}"
        )
    return by_type


def rotates(config: Config, layer_type: str | None, layer: int | None) -> bool:
    """Returns whether a layer rotates, as far as that does not follow from its parameters."""
    model = config.get("model_type") or ""
    if config.get("position_embedding_type") == "nope" or config.get("qk_rope_head_dim") == 0 or model == "kimi_linear":
        return False
    if layer_type in NOT_ATTENTION or (model == "zamba2" and not config.get("use_mem_rope")):
        return False
    if any(config.get(flag) is False for flag in FLAGS):
        return False
    if (rotary := _no_rope_layers(config)) is not None:
        if layer is not None:
            return bool(rotary[layer])
        if len(set(map(bool, rotary))) == 1:
            return bool(rotary[0])
        raise ValueError(
            f"layer must be the index of a layer, because layers of this {model} differ in no_rope_layers, got None; 1 stands for "
            "layers that rotate"
        )
    nope = NOPE.get(model, ())
    if model.startswith("exaone") and config.get("sliding_window") is None:
        nope = ()
    if nope and layer_type is None:
        raise ValueError(f"layer_type or layer must be given for {model}, in which layers of the type {nope[0]} do not rotate")
    return layer_type not in nope


def _no_rope_layers(config: Config) -> Sequence[Any] | None:
    """Returns a number for every layer, 0 where it does not rotate; None if that does not depend on the index."""
    given, count = (
        check("no_rope_layers", config.get("no_rope_layers"), tuple[int, ...] | None),
        integer(config, "num_hidden_layers"),
    )
    if given:
        if any(value not in (0, 1) for value in given):
            raise ValueError(f"no_rope_layers must be a list of 0 and 1, one for each layer, got {short(given)}")
        if count is not None and len(given) != count:
            raise ValueError(f"no_rope_layers must have a number for each of {count} layers, got {len(given)}")
        return given
    every = integer(config, "no_rope_layer_interval") or NOPE_INTERVAL.get(config.get("model_type") or "")
    if every is None:
        return None
    return [int((n + 1) % every != 0) for n in range(every if count is None else count)]


def parameters_of(config: Config, layer_type: str | None) -> tuple[dict[str, Any] | None, bool]:
    """Returns the parameters of a type of layer, None if it does not rotate, and whether its theta is that of local layers."""
    has_local = config.get("model_type") in LOCAL_THETA or any(
        config.get(key) for key in ("rope_local_base_freq", "local_rope_theta")
    )
    by_type = _nested(config)
    if by_type is not None:
        if layer_type is None:
            first, *others = by_type.values()
            if any(other != first for other in others):
                raise ValueError(f"layer_type must be one of {', '.join(by_type)}, whose parameters differ, got None")
            layer_type = next(iter(by_type))
        if layer_type not in by_type:
            raise ValueError(f"layer_type must be one of {', '.join(by_type)}, which rope_parameters has, got {layer_type!r}")
        parameters = by_type[layer_type]
        return None if parameters is None else dict(parameters), has_local and layer_type == "sliding_attention"
    given, is_local = _given(config), has_local and layer_type == "sliding_attention"
    scaled_full = bool(given) and (config.get("model_type") in SCALED_FULL or config.get("rope_local_base_freq") is not None)
    if (has_local or scaled_full) and layer_type is None:
        raise ValueError(
            "layer_type must be 'full_attention' or 'sliding_attention', in which frequencies differ for this model, got None"
        )
    return {} if scaled_full and layer_type == "sliding_attention" else given, is_local
