# ruff: noqa: E402 (what needs the packages is imported after they are known to be there)
"""``rope_from_config`` against the classes of transformers: frequencies, attention factors and widths of known configurations.

Configurations are as they stand in files of models, in the forms of transformers 4 and 5. Skipped where transformers is missing.
"""

import importlib
import inspect

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
rope_utils = pytest.importorskip("transformers.modeling_rope_utils")

import posjax as pj
from posjax.core.chain import Chain
from posjax.core.structures import apply_rotation
from posjax.encodings.frequencies import Scaling
from posjax.encodings.phases import geometric_frequencies
from posjax.encodings.rope_config import defaults, values
from posjax.encodings.rotary import rotated_width

transformers.logging.set_verbosity_error()
TOLERANCE = 1e-6  # relative; the reference computes in float32
FULL, SLIDING = "full_attention", "sliding_attention"


def llama(width=64, **own):
    """A small model of 2 heads."""
    return {"model_type": "llama", "hidden_size": 2 * width, "num_attention_heads": 2} | own


def scaled(kind, **own):
    return {"rope_type": kind} | own


LLAMA3 = scaled("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
DEEPSEEK = dict(beta_fast=32, beta_slow=1, factor=40, mscale=1.0, mscale_all_dim=1.0, original_max_position_embeddings=4096)
MLA = dict(qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128, num_attention_heads=2, hidden_size=256, num_hidden_layers=2)
MLA |= dict(max_position_embeddings=163_840, rope_theta=10_000.0)
LISTS = {n: ([1.0 + 0.01 * m for m in range(n)], [1.0 + 0.9 * m for m in range(n)]) for n in (16, 32, 48)}
MINISTRAL = scaled("yarn", factor=16.0, original_max_position_embeddings=16_384, max_position_embeddings=262_144, beta_fast=32.0)
MINISTRAL |= dict(beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0, llama_4_scaling_beta=0.1, rope_theta=1e6)


def lists(pairs):
    short, long = LISTS[pairs]
    return {"short_factor": short, "long_factor": long}


# name: configuration, original length, types of layers
CONFIGS = {
    "llama 2": (llama(128, max_position_embeddings=4096, rope_scaling=None), 4096),
    "code llama": (llama(128, rope_theta=1_000_000, max_position_embeddings=16_384, rope_scaling=None), 16_384),
    "llama 3": (llama(128, rope_theta=500_000.0, max_position_embeddings=8192), 8192),
    "llama 3.1": (llama(128, rope_theta=500_000.0, max_position_embeddings=131_072, rope_scaling=LLAMA3), 8192),
    "llama 3.2": (llama(64, rope_theta=500_000.0, max_position_embeddings=131_072, rope_scaling=LLAMA3 | {"factor": 32.0}), 8192),
    "llama 3.1 of transformers 5": (
        llama(128, max_position_embeddings=131_072, rope_parameters=LLAMA3 | {"rope_theta": 500_000.0}),
        8192,
    ),
    "theta missing inside": (
        llama(128, max_position_embeddings=131_072, rope_theta=500_000.0, rope_parameters=LLAMA3),
        8192,
    ),
    "vicuna 16k": (llama(128, max_position_embeddings=4096, rope_scaling={"factor": 4.0, "type": "linear"}), 4096),
    "deepseek coder": (
        llama(128, max_position_embeddings=16_384, rope_theta=100_000, rope_scaling={"factor": 4.0, "type": "linear"}),
        4096,
    ),
    "dynamic": (llama(128, max_position_embeddings=4096, rope_scaling={"factor": 2.0, "type": "dynamic"}), 4096),
    "dynamic, theta 1e6": (
        llama(128, max_position_embeddings=32_768, rope_theta=1e6, rope_scaling={"factor": 4.0, "rope_type": "dynamic"}),
        32_768,
    ),
    "qwen 2.5": (
        llama(128, rope_theta=1e6, max_position_embeddings=32_768)
        | {"model_type": "qwen2", "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768}},
        32_768,
    ),
    "qwen 3": (
        llama(64, rope_theta=1e6, max_position_embeddings=131_072, head_dim=128)
        | {"model_type": "qwen3", "rope_parameters": scaled("yarn", factor=4.0, original_max_position_embeddings=32_768)},
        32_768,
    ),
    "yarn without a factor": (
        llama(128, max_position_embeddings=65_536, rope_scaling=scaled("yarn", factor=None, original_max_position_embeddings=4096)),
        4096,
    ),
    "yarn with an attention factor": (
        llama(
            128,
            max_position_embeddings=65_536,
            rope_scaling=scaled("yarn", factor=16.0, attention_factor=0.8, original_max_position_embeddings=4096),
        ),
        4096,
    ),
    "gpt-oss": (
        {"model_type": "gpt_oss", "hidden_size": 128, "num_attention_heads": 2, "head_dim": 64, "max_position_embeddings": 131_072}
        | {"rope_theta": 150_000, "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "truncate": False}}
        | {},
        4096,
    ),
    "deepseek v2 lite": (
        MLA | {"model_type": "deepseek_v2", "rope_scaling": DEEPSEEK | {"type": "yarn", "mscale": 0.707, "mscale_all_dim": 0.707}},
        4096,
    ),
    "deepseek v3": (MLA | {"model_type": "deepseek_v3", "rope_scaling": DEEPSEEK | {"type": "yarn"}}, 4096),
    "kimi k2": (
        MLA
        | {"model_type": "deepseek_v3", "rope_theta": 50_000.0}
        | {"rope_scaling": DEEPSEEK | {"type": "yarn", "beta_fast": 1.0, "factor": 32.0}},
        4096,
    ),
    "minicpm 3": (
        MLA
        | {"model_type": "minicpm3", "qk_rope_head_dim": 32, "qk_nope_head_dim": 64, "max_position_embeddings": 32_768}
        | {"rope_scaling": {"type": "longrope", "original_max_position_embeddings": 32_768} | lists(16)},
        32_768,
    ),
    "phi 3 mini 128k": (
        llama(96, max_position_embeddings=131_072, original_max_position_embeddings=4096)
        | {"model_type": "phi3", "rope_scaling": {"type": "su"} | lists(48)},
        4096,
    ),
    "phi 3 mini 128k, longrope": (
        llama(96, max_position_embeddings=131_072, original_max_position_embeddings=4096)
        | {"model_type": "phi3", "rope_scaling": {"type": "longrope"} | lists(48)},
        4096,
    ),
    "phi 4 mini": (
        llama(128, max_position_embeddings=131_072, original_max_position_embeddings=4096, partial_rotary_factor=0.75)
        | {"model_type": "phi3", "rope_scaling": {"type": "longrope"} | lists(48)},
        4096,
    ),
    "gemma 3 1b": (
        {"model_type": "gemma3_text", "head_dim": 256, "num_hidden_layers": 6, "rope_theta": 1_000_000, "rope_scaling": None}
        | {"rope_local_base_freq": 10_000},
        32_768,
        (FULL, SLIDING),
    ),
    "gemma 3 4b": (
        {"model_type": "gemma3_text", "num_hidden_layers": 6, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}},
        32_768,
        (FULL, SLIDING),
    ),
    "gemma 3 of transformers 5": (
        {"model_type": "gemma3_text", "num_hidden_layers": 6}
        | {
            "rope_parameters": {
                FULL: scaled("linear", factor=8.0, rope_theta=1e6),
                SLIDING: scaled("default", rope_theta=10_000.0),
            }
        },
        32_768,
        (FULL, SLIDING),
    ),
    "gemma 4": (
        {"model_type": "gemma4_text", "num_hidden_layers": 6, "head_dim": 256, "global_head_dim": 256}
        | {
            "rope_parameters": {
                FULL: scaled("proportional", partial_rotary_factor=0.25, rope_theta=1e6),
                SLIDING: scaled("default", rope_theta=10_000.0),
            }
        },
        32_768,
        (FULL, SLIDING),
    ),
    "modernbert": (
        {"model_type": "modernbert", "hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 6}
        | {"global_rope_theta": 160_000.0, "local_rope_theta": 10_000.0},
        8192,
        (FULL, SLIDING),
    ),
    "modernbert, scaled": (
        {"model_type": "modernbert", "hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 6}
        | {"global_rope_theta": 160_000.0, "local_rope_theta": 10_000.0, "rope_scaling": scaled("linear", factor=2.0)},
        8192,
        (FULL, SLIDING),
    ),
    "olmo 3": (
        llama(128, rope_theta=500_000.0, max_position_embeddings=65_536, num_hidden_layers=4)
        | {"model_type": "olmo3"}
        | {
            "rope_scaling": scaled("yarn", attention_factor=1.2079441541679836, beta_fast=32.0, beta_slow=1.0, factor=8.0)
            | {"original_max_position_embeddings": 8192}
        },
        8192,
        (FULL, SLIDING),
    ),
    "pythia": (llama(64, rotary_pct=0.25, rotary_emb_base=10_000) | {"model_type": "gpt_neox"}, 2048),
    "glm 4": (llama(128, rope_theta=10_000.0, partial_rotary_factor=0.5, head_dim=128) | {"model_type": "glm4"}, 8192),
    "stablelm": (llama(80, rope_theta=10_000, partial_rotary_factor=0.25) | {"model_type": "stablelm"}, 4096),
    "phi 2": (llama(80, partial_rotary_factor=0.4) | {"model_type": "phi"}, 2048),
    "qwen 3 next": (
        llama(64, head_dim=256, rope_theta=10_000_000, partial_rotary_factor=0.25) | {"model_type": "qwen3_next"},
        262_144,
    ),
    "minimax m2": (llama(64, head_dim=128, rope_theta=5_000_000, rotary_dim=64) | {"model_type": "minimax_m2"}, 196_608),
    "mimo v2": (
        llama(64, head_dim=192, num_hidden_layers=2)
        | {"model_type": "mimo_v2_flash"}
        | {
            "rope_parameters": {
                FULL: scaled("default", rope_theta=5e6, partial_rotary_factor=0.334),
                SLIDING: scaled("default", rope_theta=1e4, partial_rotary_factor=0.334),
            }
        },
        262_144,
        (FULL, SLIDING),
    ),
    "ministral 3": (
        llama(64, head_dim=128, max_position_embeddings=262_144, rope_parameters=MINISTRAL) | {"model_type": "ministral3"},
        16_384,
    ),
    "mistral 4": (
        MLA
        | {"model_type": "mistral4", "qk_nope_head_dim": 64, "max_position_embeddings": 1_048_576}
        | {"rope_parameters": MINISTRAL | {"factor": 128.0, "original_max_position_embeddings": 8192, "rope_theta": 10_000.0}},
        8192,
    ),
    "command r": (llama(128, rope_theta=8_000_000.0) | {"model_type": "cohere"}, 131_072),
    "smollm 3": (
        llama(128, rope_theta=5_000_000.0, no_rope_layers=[1, 1, 1, 0], num_hidden_layers=4) | {"model_type": "smollm3"},
        65_536,
    ),
    "llama 4 scout": (
        llama(64, head_dim=128, rope_theta=500_000.0, num_hidden_layers=4, max_position_embeddings=10_485_760)
        | {"model_type": "llama4_text", "rope_scaling": LLAMA3 | {"factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0}},
        8192,
    ),
    "hunyuan": (
        llama(128, rope_theta=10_000.0, max_position_embeddings=32_768)
        | {"model_type": "hunyuan_v1_dense", "head_dim": 128}
        | {"rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0}},
        32_768,
    ),
    "qwen 2 vl": (
        llama(128, rope_theta=1e6, rope_scaling={"type": "mrope", "mrope_section": [16, 24, 24]}) | {"model_type": "qwen2_vl_text"},
        32_768,
    ),
    "qwen 3 vl": (
        llama(128, head_dim=128)
        | {"model_type": "qwen3_vl_text", "rope_parameters": scaled("default", rope_theta=5e6, mrope_section=[24, 20, 20])},
        262_144,
    ),
    "higgs audio": (
        llama(128, rope_theta=500_000.0)
        | {"rope_scaling": scaled("llama3", factor=32.0, low_freq_factor=0.125, high_freq_factor=0.5)}
        | {"max_position_embeddings": 2048, "original_max_position_embeddings": 1024},
        1024,
    ),
}
CONFIGS["gpt-oss"][0]["rope_scaling"] |= scaled("yarn", original_max_position_embeddings=4096)
CASES = [
    pytest.param(config, original, layer_type, id=name if layer_type is None else f"{name}, {layer_type}")
    for name, (config, original, *types) in CONFIGS.items()
    for layer_type in (types[0] if types else (None,))
]


def config_of(config):
    """The configuration object of transformers."""
    own = {key: value for key, value in config.items() if key != "model_type"}
    own = {key: dict(value) if isinstance(value, dict) else value for key, value in own.items()}
    if (own.get("rope_scaling") or {}).get("type") == "su":  # which transformers 5.24 reads without the original length
        own["rope_scaling"]["type"] = "longrope"
    return transformers.CONFIG_MAPPING[config["model_type"]](**own)


def rotary_class(model_type):
    """The class of transformers that computes a model's angles."""
    folder = model_type.removesuffix("_text")
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    found = [
        cls
        for name, cls in inspect.getmembers(module, inspect.isclass)
        if name.endswith("RotaryEmbedding") and "Vision" not in name and cls.__module__ == module.__name__
    ]
    return found[0]


def theirs(config, layer_type, length):
    """Frequencies [R / 2] and attention factor of transformers' class at the end of a sequence of that length."""
    made = config_of(config)
    rotary = rotary_class(config["model_type"])(made)
    kinds = rotary.rope_type if isinstance(getattr(rotary, "rope_type", "default"), dict) else None
    kind = kinds[layer_type] if kinds else getattr(rotary, "rope_type", "default")
    if kind in ("dynamic", "longrope"):  # the classes change their state with the longest position so far
        frequencies, gain = rope_utils.ROPE_INIT_FUNCTIONS[kind](made, seq_len=length, layer_type=layer_type if kinds else None)
    elif kinds:
        frequencies, gain = getattr(rotary, f"{layer_type}_inv_freq"), getattr(rotary, f"{layer_type}_attention_scaling")
    else:
        frequencies, gain = rotary.inv_freq, getattr(rotary, "attention_scaling", 1.0)
    return frequencies.double().numpy(), float(gain)


def ours(config, layer_type, length):
    """Frequencies and gain of the encoding that posjax reads, and its last member."""
    layer = 0 if "no_rope_layers" in config or config["model_type"] == "llama4_text" else None
    encoding = pj.rope_from_config(config, layer_type, layer=layer)
    last = encoding.encodings[-1] if isinstance(encoding, Chain) else encoding
    head_dim = config_of(config).head_dim if hasattr(config_of(config), "head_dim") else None
    head_dim = head_dim or config["hidden_size"] // config["num_attention_heads"]
    if "qk_rope_head_dim" in config:
        head_dim = config["qk_rope_head_dim"] + config["qk_nope_head_dim"]
    width = rotated_width(head_dim, last.fraction)
    scaling = getattr(last, "scaling", None) or Scaling()
    assert np.array_equal(Scaling().frequencies(last.theta, width), geometric_frequencies(last.theta, width))
    return scaling.frequencies(last.theta, width, length), scaling.gain(length)


@pytest.mark.parametrize(("config", "original", "layer_type"), CASES)
def test_frequencies_and_gains_equal_transformers(config, original, layer_type):
    """At a length of 1,000, the original length, one more, and four times it."""
    for length in (1000, original, original + 1, 4 * original):
        want, want_gain = theirs(config, layer_type, length)
        got, gain = ours(config, layer_type, length)
        assert got.dtype == np.float64 and got.shape == want.shape
        np.testing.assert_allclose(got, want, rtol=TOLERANCE, atol=0)
        assert abs(gain / want_gain - 1) < TOLERANCE


def test_there_are_enough_configurations():
    assert len(CONFIGS) >= 40


# Defaults of model types, from the classes and functions of transformers ----------------------------------------------------------


def modules():
    """Every known model type with its configuration class and its module."""
    for model_type in sorted(defaults.ROTARY & set(transformers.CONFIG_MAPPING.keys())):
        cls = transformers.CONFIG_MAPPING[model_type]
        folder = cls.__module__.split(".")[-2]
        try:
            yield model_type, cls, importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
        except ModuleNotFoundError:
            continue  # a configuration of another model's module


@pytest.mark.thorough
def test_theta_and_partial_rotation_of_model_types():
    """A configuration that says nothing has the frequencies of transformers' default configuration."""
    compared = 0
    for model_type, cls, _ in modules():
        try:
            rope_parameters = cls().rope_parameters
        except (AttributeError, TypeError, ValueError):
            continue
        if not rope_parameters or rope_parameters.get("rope_type") != "default":
            continue
        config = {"model_type": model_type, "layer_types": [FULL, SLIDING]}
        for layer_type in (FULL, SLIDING):
            encoding = pj.rope_from_config(config | {"no_rope_layers": [1, 1]}, layer_type)
            if encoding == pj.identity():
                continue
            assert encoding.theta == rope_parameters["rope_theta"], model_type
            fraction = rope_parameters.get("partial_rotary_factor", 1.0)
            assert encoding.fraction == fraction or model_type in ("gptj", "codegen"), model_type
            compared += 1
            break
    assert compared > 90


@pytest.mark.thorough
def test_pairings_of_model_types():
    """Scores after transformers' own rotation are those of the pairing."""
    width, length = 16, 5
    query, key = torch.randn(1, 1, length, width), torch.randn(1, 1, length, width)
    phase = torch.arange(length)[:, None] * 100.0 ** (-torch.arange(0, width, 2) / width)
    layouts = torch.cat([phase, phase], -1)[None], phase[None], phase.repeat_interleave(2, -1)[None]

    def scores_of(pairing):
        turned = (apply_rotation(np.moveaxis(x.numpy(), 1, 2), phase.numpy()[None, :, None], pairing) for x in (query, key))
        return np.einsum("btnh,bsnh->bnts", *turned)

    want = {pairing: scores_of(pairing) for pairing in ("half", "interleaved")}
    compared = 0
    for model_type, _, module in modules():
        found = set()
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if not name.startswith("apply_rotary_pos_emb") or "vision" in name:
                continue
            for angle in layouts:
                try:
                    turned = function(query.clone(), key.clone(), angle.cos(), angle.sin())
                    got = (turned[0] @ turned[1].transpose(-1, -2)).numpy()
                except (TypeError, RuntimeError, IndexError):
                    continue
                found |= {
                    pairing for pairing, scores in want.items() if got.shape == scores.shape and np.allclose(got, scores, atol=1e-4)
                }
        if found:
            ours = values.pairing_of({"model_type": model_type})
            assert ours in found, (model_type, ours, found)
            assert len(found) == 1 or model_type in (*defaults.INTERLEAVE_OPTION, "axk2", "deepseek_v32", "dots3_note_text"), (
                model_type
            )
            compared += 1
    assert compared > 90


@pytest.mark.parametrize("name", ["deepseek v2 lite", "deepseek v3", "kimi k2", "mistral 4", "minicpm 3"])
def test_latent_attention_has_the_softmax_scale_of_transformers(name):
    """The factor of all scores, beside the one of rotated channels."""
    config = CONFIGS[name][0]
    model = config["model_type"]
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    (attention,) = [
        c for n, c in inspect.getmembers(module, inspect.isclass) if n.endswith("Attention") and c.__module__ == module.__name__
    ]
    want = attention(config_of(config), 0).scaling * (config["qk_rope_head_dim"] + config["qk_nope_head_dim"]) ** 0.5
    encoding = pj.rope_from_config(config)
    members = encoding.encodings if isinstance(encoding, Chain) else (encoding,)
    assert abs(np.prod([member.factor for member in members if member.name == "query_scale"]) / want - 1) < 1e-12
