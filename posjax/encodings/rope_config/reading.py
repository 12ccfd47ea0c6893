"""Reads and checks the keys of a configuration."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from posjax.checks import check, near, short
from posjax.encodings.rope_config.defaults import ROTARY, UNSUPPORTED

Config = Mapping[str, Any]

_ALIASES = {None: "default", "none": "default", "mrope": "default", "su": "longrope", "deepseek_yarn": "yarn"}
_YARN = {"factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"}
_LONGROPE = {"short_factor", "long_factor", "factor", "original_max_position_embeddings", "attention_factor"}
_KEYS: dict[str, set[str]] = {  # of each type
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor", "alpha"},
    "yarn": _YARN | {"truncate", "llama_4_scaling_beta", "max_position_embeddings", "finetuned"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "longrope": _LONGROPE | {"short_mscale", "long_mscale"},
    "proportional": {"factor"},
}
_COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "mrope_section", "mrope_interleaved"}
_OUTSIDE = {"rope_parameters", "rope_scaling", "rope_theta", "rope_local_base_freq", "global_rope_theta", "local_rope_theta"}
_OUTSIDE |= {"layer_rope_theta", "compress_rope_theta", "partial_rotary_factor", "rotary_dim", "rotary_pct", "rotary_emb_base"}
_OUTSIDE |= {"rotary_emb_fraction", "rotary_emb_interleaved", "rope_interleave", "no_rope_layers"}
_OUTSIDE |= {"no_rope_layer_interval", "qk_rope_head_dim"}
FLAGS = {"rotary", "use_rope", "use_rotary", "use_rotary_embedding", "use_rotary_position_embeddings", "use_mem_rope"}
_ROPE_LIKE = re.compile(r"rope|rotary|mscale")


def read(config: Config | str | os.PathLike) -> dict[str, Any]:
    """Returns a configuration as a dict, with the keys of "text_config" before those around it."""
    if isinstance(config, str | os.PathLike):
        path = Path(config)
        path = path / "config.json" if path.is_dir() else path
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"config must be the path of a config.json, got {short(os.fspath(path))}: {error}") from None
    if not isinstance(config, Mapping):
        raise ValueError(f"config must be a mapping such as the content of a config.json, or its path, got {short(config)}")
    text = config.get("text_config")
    return dict(config) | (dict(text) if isinstance(text, Mapping) else {})


def check_outside(config: Config, model: str) -> None:
    """Raises ValueError if the configuration has no rotary encoding, or a key of one that is unknown."""
    if model in UNSUPPORTED:
        raise ValueError(f"model_type {model!r} is not supported: {UNSUPPORTED[model]}")
    found = [key for key in config if _ROPE_LIKE.search(key) and config[key] not in (None, False)]
    if unknown := [key for key in found if key not in _OUTSIDE | FLAGS]:
        raise unsupported(unknown[0], config[unknown[0]], _OUTSIDE)
    way = config.get("position_embedding_type")
    is_rotary = way is None or any(word in str(way) for word in ("rope", "rotary", "nope"))  # "rope_gptj" of Cohere 2
    is_rotary = is_rotary or (way == "absolute" and bool(found or model in ROTARY))  # a default of BERT's configurations
    if config.get("alibi") is True or not is_rotary:
        key, value = ("alibi", True) if config.get("alibi") is True else ("position_embedding_type", way)
        raise ValueError(f"config must be that of a model with a rotary encoding, got {key}={value!r}")
    if not found and model not in ROTARY:
        raise ValueError(
            f"config must have a rotary encoding, got model_type {model!r} and none of "
            f"rope_parameters, rope_scaling, rope_theta, rotary_pct, rotary_dim{near(model, ROTARY) if model else ''}"
        )


def integer(config: Config, key: str, least: int = 1, most: int = 2**20) -> int | None:
    """Returns an integer of a configuration, None if it is null or not given."""
    return check(key, config.get(key), int | None, least=least, most=most)


def number(config: Config, key: str) -> float | None:
    """Returns a number of a configuration, None if it is null or not given."""
    return check(key, config.get(key), float | None)


def unsupported(key: str, value: Any, supported: Any, where: str = "") -> ValueError:
    words = (
        ", ".join(sorted(supported))
        if len(supported) < 16
        else "rope_parameters, rope_scaling, rope_theta and partial_rotary_factor"
    )
    got = short(value)
    got = got if len(got) <= 60 else f"{got[:57]}..."
    return ValueError(
        f"the key {key!r} of a configuration{where} is not supported, got {got}; supported are {words}{near(key, supported)}"
    )


def kind_of(parameters: Config, model: str) -> str:
    """Returns the type of the parameters: a key of _KEYS."""
    given = parameters.get("rope_type") or parameters.get("type")
    if given == "yarn" and model.startswith("phi") and "short_factor" in parameters:
        return "longrope"  # the first files of Phi-3
    kind = _ALIASES.get(given, given) if isinstance(given, str | None) else given
    if not isinstance(kind, str) or kind not in _KEYS:
        names = sorted({*_KEYS, *(alias for alias in _ALIASES if alias not in (None, "none"))})
        hint = "; axial_rope() has the rotations of grids" if kind == "axial" else near(str(kind), names)
        raise ValueError(f"rope_type must be one of {', '.join(names)}, got {short(given)}{hint}")
    return kind


def check_inside(parameters: Config, kind: str, model: str) -> None:
    """Raises ValueError if the parameters have a key that their type does not have."""
    known = _COMMON | _KEYS[kind]
    if kind == "dynamic" and "alpha" in parameters:  # HunYuan lists those of YaRN, which it does not use
        known = known | _YARN
    for key, value in parameters.items():
        if key not in known and value is not None:
            raise unsupported(key, value, known, f" with rope_type {kind!r}")
    if kind == "dynamic" and "alpha" in parameters and not model.startswith(("hunyuan", "hy_")):
        raise unsupported("alpha", parameters["alpha"], known - {"alpha"}, f" with rope_type 'dynamic' and model_type {model!r}")
