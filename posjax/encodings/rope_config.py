"""Rotary encodings from other people's configurations: Hugging Face's config.json, as transformers 4 and 5 write it.

    4.x   "rope_theta": 500000.0, "rope_scaling": null or {"rope_type" or "type": "yarn", "factor": 4.0, ...}
    5.x   "rope_parameters": {"rope_type": "yarn", "rope_theta": 500000.0, "factor": 4.0, ...}
          "rope_parameters": {"full_attention": {...}, "sliding_attention": {...} or null}

Values that a configuration leaves out are defaults of its model type, and so are the pairing of channels and the layers that do not
rotate. The tables below hold those that differ from theta = 10,000, whole heads, the half pairing, and rotation in every layer.
"""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from posjax.checks import INT32, check, checked, near, short
from posjax.core.chain import chain
from posjax.core.encoding import PositionalEncoding, identity
from posjax.core.structures import Pairing
from posjax.encodings import frequencies as scalings
from posjax.encodings.multi_axis import MRopeLayout, mrope
from posjax.encodings.query_scale import log_scale, query_scale
from posjax.encodings.rotary import rope, rotated_width

Config = Mapping[str, Any]

# Defaults of model types ---------------------------------------------------------------------------------------------

_THETA = {
    **dict.fromkeys(("pe_audio_encoder", "pe_audio_video_encoder", "pe_video_encoder", "jina_embeddings_v3"), 20_000.0),
    **dict.fromkeys(("gpt_oss", "openai_privacy_filter"), 150_000.0),
    **dict.fromkeys(("gte", "modernbert", "modernbert-decoder"), 160_000.0),
    **dict.fromkeys(("bitnet", "blt", "cohere", "csm", "ernie4_5", "ernie4_5_moe", "ernie4_5_vl_moe_text", "evolla"), 500_000.0),
    **dict.fromkeys(("exaone", "flex_olmo", "llama4_text", "mllama_text_model", "muse_spark_text", "olmo3"), 500_000.0),
    **dict.fromkeys(("paddleocr_vl_text", "qwen3_vl_moe_text", "qwen3_vl_text"), 500_000.0),
    **dict.fromkeys(("cwm", "emu3_text_model", "gemma3_text", "gemma3n_text", "lfm2", "lfm2_moe", "minimax", "mixtral"), 1e6),
    **dict.fromkeys(("ministral3", "phimoe", "qwen2_5_omni_text", "qwen2_5_vl_text", "qwen2_vl_text", "solar_open"), 1e6),
    **dict.fromkeys(("qwen3_omni_moe_text", "t5gemma2_decoder", "t5gemma2_text"), 1e6),
    **{"nomic_bert": 1000.0, "helium": 100_000.0, "smollm3": 2e6, "minimax_m2": 5e6, "minimax_m3_vl_text": 5e6},
    **{"sarvam_moe": 8e6, "longcat_flash": 1e7, "hy_v3": 11_158_840.0, "apertus": 12e6, "bailing_hybrid": 6e6},
}
_LOCAL_THETA: dict[str, float] = dict.fromkeys(  # of layers with a sliding window
    ("gemma3_text", "gemma3n_text", "modernbert", "modernbert-decoder", "t5gemma2_decoder", "t5gemma2_text"), 10_000.0
)
_FRACTION = {
    **dict.fromkeys(("gpt_neox", "stablelm", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), 0.25),
    **dict.fromkeys(("bamba", "glm", "glm4", "glm4_moe", "glm4v_moe_text", "glmasr_encoder", "nemotron", "persimmon"), 0.5),
    **dict.fromkeys(("phi", "recurrent_gemma"), 0.5),
    **{"moonshine": 0.9, "moonshine_streaming": 0.8},
}
_ROTARY_DIM = {"gptj": 64, "codegen": 64, "minimax_m3_vl_text": 64}
_HEAD_DIM = {
    **dict.fromkeys(("bailing_hybrid", "csm", "gpt_oss", "openai_privacy_filter", "sarvam_moe"), 64),
    **dict.fromkeys(("cohere2", "cwm", "ernie4_5", "exaone", "glm", "glm4", "helium", "hy_v3", "laguna", "llama4_text"), 128),
    **dict.fromkeys(("mellum", "ministral3", "minimax_m2", "nemotron", "paddleocr_vl_text", "qwen3_vl_text", "solar_open"), 128),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "gemma3n_text", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), 256),
    **{"recurrent_gemma": 256, "mimo_v2_flash": 192},
}
_INTERLEAVED = {"bailing_hybrid", "blt", "codegen", "cohere", "cohere2", "deepseek_v2", "deepseek_v32", "deepseek_v4", "ernie4_5"}
_INTERLEAVED |= {"ernie4_5_moe", "ernie4_5_vl_moe_text", "glm", "glm4", "glm4v_text", "glm_moe_dsa", "glm_ocr_text", "gptj"}
_INTERLEAVED |= {"helium", "llama4_text", "longcat_flash", "moonshine", "moonshine_streaming", "openai_privacy_filter"}
_INTERLEAVE_OPTION = {"axk1", "deepseek_v3", "glm4_moe_lite", "kimi_k2", "mistral4", "sarvam_mla", "youtu"}  # rope_interleave, True
_NOPE = {  # types of layers that do not rotate
    **dict.fromkeys(("afmoe", "cohere2", "exaone4", "exaone_moe"), ("full_attention",)),
    "kimi_linear": ("full_attention",),
}
_SCALED_FULL = {"gemma3_text", "gemma3n_text", "olmo3", "t5gemma2_decoder", "t5gemma2_text"}  # 4.x scales only full attention
_NOPE_INTERVAL = {"llama4_text": 4, "smollm3": 4}  # every fourth layer does not rotate, unless no_rope_layers says which
_PATTERN = {"cohere2": 4, "exaone4": 4, "gemma3_text": 6, "olmo3": 4}  # every n-th layer has full attention
_OTHERS = """afmoe arcee aria_text axk1 chameleon cohere2 deepseek_v2 deepseek_v3 deepseek_v32 diffllama doge dots1 esm eurobert
exaone4 exaone_moe falcon_h1 gemma gemma2 glm4_moe_lite glm4v_text glm_moe_dsa glm_ocr_text granite granitemoe granitemoehybrid
granitemoeshared gpt_neox_japanese hunyuan_v1_dense hunyuan_v1_moe internlm2 internlm3 jais2 jetmoe kimi_k2 kimi_linear llama
minicpm minicpm3 ministral mistral mistral4 moshi nanochat olmo olmo2 olmoe phi3 phi4_multimodal qwen2 qwen2_moe qwen3 qwen3_moe
sarvam_mla seed_oss starcoder2 vaultgemma youtu gptj codegen"""  # model types with all other defaults
_ROTARY = {*_THETA, *_LOCAL_THETA, *_FRACTION, *_ROTARY_DIM, *_HEAD_DIM, *_OTHERS.split()}
_UNSUPPORTED = {
    "cohere2_moe": "its first layers rotate although their type does not",
    "hunyuan_vl": "XD-RoPE cuts the doubled ladder of frequencies and is not a rotation",
    "hunyuan_vl_text": "XD-RoPE cuts the doubled ladder of frequencies and is not a rotation",
}
_NOT_ATTENTION = {"linear_attention", "conv", "mamba", "mamba2", "recurrent", "mlp", "kda", "moe"}
_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}

# Keys ----------------------------------------------------------------------------------------------------------------

_ALIASES = {None: "default", "none": "default", "mrope": "default", "su": "longrope", "deepseek_yarn": "yarn"}
_YARN = {"factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"}
_LONGROPE = {"short_factor", "long_factor", "factor", "original_max_position_embeddings", "attention_factor"}
_KEYS: dict[str, set[str]] = {  # of each type
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor", "alpha"},
    "yarn": _YARN | {"truncate", "llama_4_scaling_beta", "max_position_embeddings"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "longrope": _LONGROPE | {"short_mscale", "long_mscale"},
    "proportional": {"factor"},
}
_COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "mrope_section", "mrope_interleaved"}
_OUTSIDE = {"rope_parameters", "rope_scaling", "rope_theta", "rope_local_base_freq", "global_rope_theta", "local_rope_theta"}
_OUTSIDE |= {"layer_rope_theta", "compress_rope_theta", "partial_rotary_factor", "rotary_dim", "rotary_pct", "rotary_emb_base"}
_OUTSIDE |= {"rotary_emb_fraction", "rotary_emb_interleaved", "rotary", "rope_interleave", "no_rope_layers"}
_OUTSIDE |= {"no_rope_layer_interval", "qk_rope_head_dim"}
_ROPE_LIKE = re.compile(r"rope|rotary|mscale")
# Names of arguments of scalings, and the keys that they come from.
_KEY_OF = {"original_max_length": "original_max_position_embeddings"}


@checked(layer=dict(least=0))
def rope_from_config(
    config: Config | str | os.PathLike, layer_type: str | None = None, *, layer: int | None = None
) -> PositionalEncoding:
    """Returns the rotary encoding of a model from its Hugging Face config.json, written by transformers 4 or 5.

        encoding = rope_from_config("checkpoints/Llama-3.2-1B/config.json")    # rope(theta=500000.0, scaling=llama3_scaling(...))
        encoding = rope_from_config(config, "sliding_attention")               # where layers differ, as in Gemma 3

    It is a ``rope`` with its scaling, an ``mrope`` where the configuration has sections, in a chain after a ``log_scale`` (Llama 4,
    Ministral 3) or a ``query_scale`` (multi-head latent attention with YaRN) where the model has one, and ``identity`` in layers
    that do not rotate. Multi-head latent attention rotates the last ``qk_rope_head_dim`` channels of queries and keys.

    Missing values are defaults of the model type. A model type that posjax has no defaults for is read as if they were theta =
    10,000, whole heads and the half pairing, if the configuration has any key of rotary encodings.

    Args:
      config: the configuration as a mapping, or the path of a config.json or of its folder. The part "text_config" is read if there
        is one.
      layer_type: type of layer, as in ``layer_types``: "full_attention", "sliding_attention". Only needed if layers differ by type.
      layer: index of a layer, from which its type follows. Needed if layers differ by index (``no_rope_layers`` of Llama 4 and
        SmolLM3, ``layer_rope_theta``).

    Raises:
      ValueError: the configuration cannot be read, has no rotary encoding, has a type or a key that is not supported, or a value
        that is out of range; or layers differ and neither layer_type nor layer says which one is meant. The message names the key
        and its value.
    """
    config = _read(config)
    model = check("model_type", config.get("model_type"), str | None) or ""
    _check_outside(config, model)
    layer_type = _layer_type(config, layer_type, layer)
    if not _rotates(config, layer_type, layer):
        return _position_scale(config, {}, rotates=False) or identity()
    parameters, is_local = _parameters(config, layer_type)
    if parameters is None:
        return identity()
    kind = _kind(parameters, model)
    _check_inside(parameters, kind, model)
    theta = _theta(config, parameters, is_local, layer)
    if theta == 0:
        return identity()
    pairing = _pairing(config)
    rotated, head_dim = _rotated_channels(config, parameters, kind)
    scaling = _scaling(kind, config, parameters, rotated)
    if "mrope_section" in parameters:
        encoding = _mrope(config, parameters, scaling, theta, rotated, pairing)
    else:
        latent = bool(config.get("qk_rope_head_dim"))
        fraction = rotated if head_dim is None else rotated / head_dim
        encoding = _built(
            rope, theta=theta, fraction=fraction, pairing=pairing, scaling=scaling, channels="last" if latent else "first"
        )
    before = [_position_scale(config, parameters, rotates=True), _latent_scale(config, scaling)]
    members = [member for member in before if member is not None]
    return chain(*members, encoding) if members else encoding


# Reading -------------------------------------------------------------------------------------------------------------


def _read(config: Config | str | os.PathLike) -> dict[str, Any]:
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


def _check_outside(config: Config, model: str) -> None:
    """Raises ValueError if the configuration has no rotary encoding, or a key of one that is unknown."""
    if model in _UNSUPPORTED:
        raise ValueError(f"model_type {model!r} is not supported: {_UNSUPPORTED[model]}")
    found = [key for key in config if _ROPE_LIKE.search(key) and config[key] not in (None, False)]
    if unknown := [key for key in found if key not in _OUTSIDE and not isinstance(config[key], bool)]:
        raise _unsupported(unknown[0], config[unknown[0]], _OUTSIDE)
    way = config.get("position_embedding_type")
    is_rotary = way in (None, "rope", "rotary", "nope") or (way == "absolute" and bool(found))
    if config.get("alibi") is True or not is_rotary:
        key, value = ("alibi", True) if config.get("alibi") is True else ("position_embedding_type", way)
        raise ValueError(f"config must be that of a model with a rotary encoding, got {key}={value!r}")
    if not found and model not in _ROTARY:
        raise ValueError(
            f"config must have a rotary encoding, got model_type {model!r} and none of "
            f"rope_parameters, rope_scaling, rope_theta, rotary_pct, rotary_dim{near(model, _ROTARY) if model else ''}"
        )


def _integer(config: Config, key: str, least: int = 1, most: int = 2**20) -> int | None:
    """Returns an integer of a configuration, None if it is null or not given."""
    return check(key, config.get(key), int | None, least=least, most=most)


def _number(config: Config, key: str) -> float | None:
    """Returns a number of a configuration, None if it is null or not given."""
    return check(key, config.get(key), float | None)


def _unsupported(key: str, value: Any, supported: Any, where: str = "") -> ValueError:
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


def _layers(config: Config) -> Sequence[str] | None:
    """Returns the type of every layer; None if the configuration does not say."""
    types, count = check("layer_types", config.get("layer_types"), tuple[str, ...] | None), _integer(config, "num_hidden_layers")
    if types is not None:
        return types
    model = config.get("model_type")
    if count is None:
        return None
    if model in ("modernbert", "modernbert-decoder"):
        every = _integer(config, "global_attn_every_n_layers") or 3
        return ["sliding_attention" if n % every else "full_attention" for n in range(count)]
    if model not in _PATTERN:
        return None
    every = check("sliding_window_pattern", config.get("sliding_window_pattern", _PATTERN[model]), int | str | None, least=0)
    if isinstance(every, str) and every:  # "LLLG": local, local, local, global
        return ["sliding_attention" if every[n % len(every)] == "L" else "full_attention" for n in range(count)]
    return ["sliding_attention" if every and (n + 1) % every else "full_attention" for n in range(count)]


def _layer_type(config: Config, layer_type: str | None, layer: int | None) -> str | None:
    """Returns the type of the layer after checks; None if it is not known."""
    types, nested = _layers(config), _nested(config)
    if layer is not None:
        count = _integer(config, "num_hidden_layers") or (len(types) if types else None)
        if count is not None and layer >= count:
            raise ValueError(f"layer must be below the number of layers, {count}, got {layer}")
        own = types[layer] if types and layer < len(types) else None
        if layer_type is not None and own is not None and layer_type != own:
            raise ValueError(f"layer_type must be the type of layer {layer}, {own!r}, or None, got {layer_type!r}")
        layer_type = layer_type or own
    if layer_type is None:
        return None
    known = {*(types or _ATTENTION), *(nested or {}), *_NOT_ATTENTION, *(_ATTENTION if types is None or not nested else ())}
    if layer_type not in known:
        words = ", ".join(sorted({*(types or _ATTENTION), *(nested or {})}))
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


def _rotates(config: Config, layer_type: str | None, layer: int | None) -> bool:
    """Returns whether a layer rotates, as far as that does not follow from its parameters."""
    model = config.get("model_type") or ""
    if config.get("position_embedding_type") == "nope" or config.get("qk_rope_head_dim") == 0 or model == "kimi_linear":
        return False
    if layer_type in _NOT_ATTENTION:
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
    nope = _NOPE.get(model, ())
    if model.startswith("exaone") and config.get("sliding_window") is None:
        nope = ()
    if nope and layer_type is None:
        raise ValueError(f"layer_type or layer must be given for {model}, in which layers of the type {nope[0]} do not rotate")
    return layer_type not in nope


def _no_rope_layers(config: Config) -> Sequence[Any] | None:
    """Returns a number for every layer, 0 where it does not rotate; None if that does not depend on the index."""
    given, count = (
        check("no_rope_layers", config.get("no_rope_layers"), tuple[int, ...] | None),
        _integer(config, "num_hidden_layers"),
    )
    if given:
        if any(value not in (0, 1) for value in given):
            raise ValueError(f"no_rope_layers must be a list of 0 and 1, one for each layer, got {short(given)}")
        if count is not None and len(given) != count:
            raise ValueError(f"no_rope_layers must have a number for each of {count} layers, got {len(given)}")
        return given
    every = _integer(config, "no_rope_layer_interval") or _NOPE_INTERVAL.get(config.get("model_type") or "")
    if every is None:
        return None
    return [int((n + 1) % every != 0) for n in range(every if count is None else count)]


def _parameters(config: Config, layer_type: str | None) -> tuple[dict[str, Any] | None, bool]:
    """Returns the parameters of a type of layer, None if it does not rotate, and whether its theta is that of local layers."""
    has_local = config.get("model_type") in _LOCAL_THETA or any(
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
    scaled_full = bool(given) and (config.get("model_type") in _SCALED_FULL or config.get("rope_local_base_freq") is not None)
    if (has_local or scaled_full) and layer_type is None:
        raise ValueError(
            "layer_type must be 'full_attention' or 'sliding_attention', in which frequencies differ for this model, got None"
        )
    return {} if scaled_full and layer_type == "sliding_attention" else given, is_local


# Values --------------------------------------------------------------------------------------------------------------


def _kind(parameters: Config, model: str) -> str:
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


def _check_inside(parameters: Config, kind: str, model: str) -> None:
    known = _COMMON | _KEYS[kind]
    if kind == "dynamic" and "alpha" in parameters:  # HunYuan lists those of YaRN, which it does not use
        known = known | _YARN
    for key, value in parameters.items():
        if key not in known and value is not None:
            raise _unsupported(key, value, known, f" with rope_type {kind!r}")
    if kind == "dynamic" and "alpha" in parameters and not model.startswith(("hunyuan", "hy_")):
        raise _unsupported("alpha", parameters["alpha"], known - {"alpha"}, f" with rope_type 'dynamic' and model_type {model!r}")


def _theta(config: Config, parameters: Config, is_local: bool, layer: int | None) -> float:
    """Returns the base of frequencies: of the layer, of its parameters, of the configuration around them, or of the model type."""
    model = config.get("model_type") or ""
    if (by_layer := config.get("layer_rope_theta")) is not None:
        by_layer = check("layer_rope_theta", by_layer, tuple[float, ...], least=0) or (0.0,)
        if layer is None and len(set(by_layer)) > 1:
            raise ValueError("layer must be the index of a layer, because layers differ in layer_rope_theta, got None")
        if layer is not None and layer >= len(by_layer):
            raise ValueError(f"layer_rope_theta must have a number for each layer, got {len(by_layer)} numbers for layer {layer}")
        return float(by_layer[layer or 0])
    outside = ("rope_local_base_freq", "local_rope_theta") if is_local else ("global_rope_theta", "rope_theta")
    given = [_number(parameters, "rope_theta"), *(_number(config, key) for key in outside)]
    given += [_number(config, key) for key in ("rotary_emb_base",)]
    default = _LOCAL_THETA.get(model, 10_000.0) if is_local else _THETA.get(model, 10_000.0)
    return float(next((value for value in given if value is not None), default))


def _pairing(config: Config) -> Pairing:
    model = config.get("model_type") or ""
    if (given := config.get("rotary_emb_interleaved")) is not None:
        return "interleaved" if given else "half"
    if model in _INTERLEAVE_OPTION or "rope_interleave" in config:
        return "interleaved" if config.get("rope_interleave", True) else "half"
    return "interleaved" if model in _INTERLEAVED else "half"


def _head_dim(config: Config) -> int | None:
    if latent := _integer(config, "qk_rope_head_dim", least=0):
        return latent + (_integer(config, "qk_nope_head_dim", least=0) or 0)
    if (given := _integer(config, "head_dim")) is not None:
        return given
    if (default := _HEAD_DIM.get(config.get("model_type") or "")) is not None:
        return default
    sizes = [next(filter(None, (_integer(config, key) for key in keys)), None) for keys in (_WIDTHS, _HEADS)]
    return sizes[0] // sizes[1] if sizes[0] and sizes[1] else None


_WIDTHS, _HEADS = ("hidden_size", "n_embd", "d_model"), ("num_attention_heads", "n_head", "num_heads")


def _rotated_channels(config: Config, parameters: Config, kind: str) -> tuple[float, int | None]:
    """Returns the number of rotated channels and the head dimension; or the fraction of channels and None."""
    head_dim, model = _head_dim(config), config.get("model_type") or ""
    if latent := config.get("qk_rope_head_dim"):  # head_dim and partial_rotary_factor only repeat it, in several ways
        return latent, head_dim
    rotary_dim = _integer(config, "rotary_dim") or _ROTARY_DIM.get(model)
    if rotary_dim is not None:
        if head_dim is None or not 0 < rotary_dim <= head_dim:
            raise ValueError(f"rotary_dim must be an integer from 1 to the head dimension, {head_dim}, got {short(rotary_dim)}")
        rotated_width(head_dim, rotary_dim / head_dim)
        return rotary_dim, head_dim
    keys = ("partial_rotary_factor", "rotary_pct", "rotary_emb_fraction")
    given = [_number(parameters, "partial_rotary_factor"), *(_number(config, key) for key in keys)]
    fraction = next((value for value in given if value is not None), _FRACTION.get(model, 1.0))
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


def _built(make: Any, **arguments: Any) -> Any:
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
        if (value := _integer(place, key, most=INT32)) is not None:
            return value
    raise ValueError("original_max_position_embeddings or max_position_embeddings must be given, got neither")


def _scaling(kind: str, config: Config, parameters: Config, rotated: float) -> scalings.Scaling | None:
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
        if (longest := _number(config, "max_position_embeddings")) is None:
            raise ValueError(f"factor or max_position_embeddings must be given for rope_type {kind!r}, got neither")
        return max(longest, length) / length

    if kind == "linear":
        return _built(scalings.linear_scaling, factor=need("factor"))
    if kind == "proportional":
        fraction = given.get("partial_rotary_factor", _number(config, "partial_rotary_factor"))
        return _built(scalings.proportional_scaling, fraction=1.0 if fraction is None else fraction, **some("factor"))
    if kind == "dynamic":
        if given.get("alpha"):  # HunYuan: a fixed base, although the type says otherwise
            return _built(scalings.ntk_scaling, factor=given["alpha"])
        if (longest := _integer(config, "max_position_embeddings", most=INT32)) is None:
            raise ValueError("max_position_embeddings must be given for rope_type 'dynamic', got none")
        return _built(scalings.dynamic_ntk_scaling, factor=need("factor"), original_max_length=longest)
    if kind == "llama3":
        keys = {key: need(key) for key in ("factor", "low_freq_factor", "high_freq_factor")}
        return _built(scalings.llama3_scaling, **keys, original_max_length=_original_length(config, parameters))
    if kind == "yarn":
        length = _original_length(config, parameters)
        keys = some("attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow", "truncate")
        return _built(scalings.yarn_scaling, factor=factor(length), original_max_length=length, **keys)
    if kind == "longrope":
        length = _original_length(config, parameters)
        attention_factor = given.get("attention_factor")
        if "short_mscale" in given or "long_mscale" in given:
            attention_factor = need("short_mscale"), need("long_mscale")
        scaling = _built(
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


def _mrope(config: Config, parameters: Config, scaling: Any, theta: float, rotated: float, pairing: Pairing) -> PositionalEncoding:
    """Returns M-RoPE with the sections of a configuration."""
    sections = parameters["mrope_section"]
    if not isinstance(sections, list | tuple) or len(sections) != 3 or not all(isinstance(n, int) for n in sections):
        raise ValueError(f"mrope_section must be three numbers of pairs, got {short(sections)}")
    layout: MRopeLayout = "interleaved" if parameters.get("mrope_interleaved") else "blocks"
    if str(config.get("model_type")).startswith("ernie4_5_vl"):  # height, width, time
        layout, sections = "alternating", (sections[2], *sections[:2])
    fraction = rotated if rotated <= 1 else rotated / (_head_dim(config) or rotated)
    if (head_dim := _head_dim(config)) is not None and 2 * sum(sections) != round(fraction * head_dim):
        raise ValueError(
            f"mrope_section must sum to half of the {round(fraction * head_dim)} rotated channels, got {short(sections)} with "
            f"the sum {sum(sections)}"
        )
    arguments = dict(sections=tuple(sections), layout=layout, theta=theta, fraction=fraction, pairing=pairing, scaling=scaling)
    return _built(mrope, **arguments)


# Scales of queries ---------------------------------------------------------------------------------------------------


def _position_scale(config: Config, parameters: Config, rotates: bool) -> PositionalEncoding | None:
    """Returns the factor of queries that grows with their position: Llama 4's in layers without rotation, Ministral 3's in all."""
    if config.get("model_type") == "llama4_text":
        if rotates or not config.get("attn_temperature_tuning", True):
            return None
        beta = config.get("attn_scale", 0.1)
        return _built(log_scale, length=int(config.get("floor_scale", 8192)), beta=beta, rule="llama4")
    if (beta := _number(parameters, "llama_4_scaling_beta")) is None:
        return None
    return _built(log_scale, length=_original_length(config, parameters), beta=beta, rule="ministral3")


def _latent_scale(config: Config, scaling: scalings.Scaling | None) -> PositionalEncoding | None:
    """Returns the factor of all scores in multi-head latent attention under YaRN, f(s, mscale_all_dim)^2.

    Ministral 3 has the same keys and no such factor, because its attention is not latent.
    """
    is_yarn = isinstance(scaling, scalings.YarnScaling)
    if not config.get("qk_rope_head_dim") or not is_yarn or not scaling.mscale_all_dim:
        return None
    return query_scale(math.pow(scalings.yarn_mscale(scaling.factor, scaling.mscale_all_dim), 2))
