"""``rope_from_config``: encodings of configurations in the wild, the mistakes that are common in reading them, and bad ones.

tests/parity compares the frequencies of many more with transformers.
"""

import json

import pytest

import posjax as pj
from posjax.encodings.frequencies import yarn_mscale

FULL, SLIDING = "full_attention", "sliding_attention"
LLAMA = {"model_type": "llama", "hidden_size": 4096, "num_attention_heads": 32, "max_position_embeddings": 4096}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768}
GEMMA3 = {"model_type": "gemma3_text", "num_hidden_layers": 12, "rope_theta": 1e6, "rope_local_base_freq": 10_000}
GEMMA3 |= {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
DEEPSEEK = {"model_type": "deepseek_v3", "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "max_position_embeddings": 163_840}
DEEPSEEK |= {"rope_theta": 10_000, "head_dim": 64, "hidden_size": 7168, "num_attention_heads": 128}
DEEPSEEK_YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}
MSCALES = {"mscale": 1.0, "mscale_all_dim": 1.0}
PHI3 = {"model_type": "phi3", "hidden_size": 8, "num_attention_heads": 2, "max_position_embeddings": 131_072}
LISTS = {"type": "longrope", "short_factor": [1.0, 1.1], "long_factor": [1.0, 4.0]}


def test_old_and_new_forms_are_read_alike():
    """transformers 4 ("type" or "rope_type", theta outside) and 5 (theta inside), from a mapping, a file and a folder."""
    old = LLAMA | {"rope_theta": 500_000.0, "rope_scaling": {"type": "llama3"} | LLAMA3}
    want = pj.rope(theta=500_000.0, scaling=pj.llama3_scaling())
    assert pj.rope_from_config(old) == want
    assert pj.rope_from_config(LLAMA | {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500_000.0} | LLAMA3}) == want
    assert pj.rope_from_config({"text_config": old, "model_type": "llava"}) == want


def test_a_path_is_that_of_a_file_or_of_its_folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert pj.rope_from_config(tmp_path) == pj.rope_from_config(str(tmp_path / "config.json")) == pj.rope()


@pytest.mark.parametrize(
    ("config", "want"),
    [
        (LLAMA | {"rope_scaling": None}, pj.rope()),
        (LLAMA | {"rope_scaling": {"type": "linear", "factor": 4.0}}, pj.rope(scaling=pj.linear_scaling(4.0))),
        (LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, pj.rope(scaling=pj.dynamic_ntk_scaling(2.0, 4096))),
        (
            LLAMA | {"rope_scaling": YARN | {"type": "deepseek_yarn", "rope_type": None}},
            pj.rope(scaling=pj.yarn_scaling(4.0, 32_768)),
        ),
        (LLAMA | {"rope_scaling": YARN | {"truncate": False}}, pj.rope(scaling=pj.yarn_scaling(4.0, 32_768, truncate=False))),
        ({"model_type": "gptj", "n_embd": 4096, "n_head": 16, "rotary": True}, pj.rope(fraction=0.25, pairing="interleaved")),
        (
            {"model_type": "gpt_neox", "hidden_size": 512, "num_attention_heads": 8, "rotary_pct": 0.25, "rotary_emb_base": 5000},
            pj.rope(theta=5000.0, fraction=0.25),
        ),
        (
            {
                "model_type": "hunyuan_v1_dense",
                "rope_scaling": {"type": "dynamic", "alpha": 1000.0, "beta_fast": 32, "factor": 1.0},
            },
            pj.rope(scaling=pj.ntk_scaling(1000.0)),
        ),
        (
            {"model_type": "qwen3_vl_text", "rope_parameters": {"mrope_section": [24, 20, 20], "mrope_interleaved": True}},
            pj.mrope((24, 20, 20), layout="interleaved", theta=500_000.0),
        ),
        (
            {"model_type": "qwen2_5_vl_text", "hidden_size": 2048, "num_attention_heads": 16}
            | {"rope_scaling": YARN | {"mrope_section": [16, 24, 24]}},
            pj.mrope((16, 24, 24), theta=1e6, scaling=pj.yarn_scaling(4.0, 32_768)),
        ),
        (
            {"model_type": "ernie4_5_vl_moe_text", "rope_parameters": {"mrope_section": [22, 22, 20]}},
            pj.mrope((20, 22, 22), layout="alternating", theta=500_000.0, pairing="interleaved"),
        ),
        # The class decides on layout and sections where a configuration is silent.
        (
            {"model_type": "qwen3_vl_text", "rope_parameters": {"mrope_section": [24, 20, 20]}},
            pj.mrope((24, 20, 20), layout="interleaved", theta=500_000.0),
        ),
        ({"model_type": "qwen2_vl_text", "head_dim": 128}, pj.mrope((16, 24, 24), theta=1e6)),
        (
            {"model_type": "ernie4_5_vl_moe_text", "head_dim": 128},
            pj.mrope((20, 22, 22), layout="alternating", theta=500_000.0, pairing="interleaved"),
        ),
        ({"model_type": "cohere", "rope_theta": 8e6}, pj.rope(theta=8e6, pairing="interleaved")),
        ({"model_type": "roformer", "hidden_size": 768, "rotary_value": False}, pj.rope(pairing="interleaved")),
        ({"model_type": "granitemoehybrid", "position_embedding_type": "nope"}, pj.identity()),
        (LLAMA | {"use_rope": False}, pj.identity()),
    ],
    ids=lambda x: x.get("model_type") if isinstance(x, dict) else None,
)
def test_configurations_in_the_wild(config, want):
    assert pj.rope_from_config(config) == want


# Common mistakes -----------------------------------------------------------------------------------------------------


def test_a_theta_outside_is_used_where_it_is_missing_inside():
    """vLLM #56066; also for types of layers."""
    inside = LLAMA | {"rope_theta": 500_000.0, "rope_parameters": {"rope_type": "default"}}
    assert pj.rope_from_config(inside) == pj.rope(theta=500_000.0)
    nested = GEMMA3 | {"rope_scaling": None, "rope_theta": 2e6, "rope_parameters": {FULL: {}, SLIDING: {"rope_type": "default"}}}
    assert pj.rope_from_config(nested, FULL).theta == 2e6 and pj.rope_from_config(nested, SLIDING).theta == 10_000.0
    both = LLAMA | {"rope_theta": 10_000.0, "rope_parameters": {"rope_theta": 500_000.0}}
    assert pj.rope_from_config(both).theta == 500_000.0


def test_gemma_3_is_scaled_in_its_global_layers_only():
    """Linear; the old form has one scaling, the new one a dict for each type. ModernBERT's old form scales both types."""
    want = pj.rope(theta=1e6, scaling=pj.linear_scaling(8.0))
    assert pj.rope_from_config(GEMMA3, FULL) == want and pj.rope_from_config(GEMMA3, SLIDING) == pj.rope()
    assert pj.rope_from_config(GEMMA3, layer=5) == want and pj.rope_from_config(GEMMA3, layer=6) == pj.rope()
    new = {"model_type": "gemma3_text", "rope_parameters": {FULL: {"rope_type": "linear", "factor": 8.0}, SLIDING: {}}}
    assert pj.rope_from_config(new, FULL) == want and pj.rope_from_config(new, SLIDING) == pj.rope()
    bert = {"model_type": "modernbert", "global_rope_theta": 160_000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    scaled = dict(scaling=pj.linear_scaling(2.0))
    assert pj.rope_from_config(bert, FULL) == pj.rope(theta=160_000.0, **scaled)
    assert pj.rope_from_config(bert, SLIDING) == pj.rope(**scaled)


def test_truncate_is_read_in_parameters_by_type_of_layer():
    """transformers 5.24 reads it from the flat dict, and so ignores it in OLMo 3's."""
    config = {"model_type": "olmo3", "rope_parameters": {FULL: YARN | {"truncate": False}, SLIDING: None}}
    assert pj.rope_from_config(config, FULL).scaling.truncate is False
    assert pj.rope_from_config(config, SLIDING) == pj.identity()  # null: no rotation


def test_the_original_length_outside_the_parameters_has_priority():
    """Phi-3; and the factor of LongRoPE is the ratio of lengths if it is not given."""
    outside = PHI3 | {"original_max_position_embeddings": 4096, "rope_scaling": LISTS}
    want = pj.longrope_scaling((1.0, 1.1), (1.0, 4.0), 4096, factor=32.0)
    assert pj.rope_from_config(outside) == pj.rope(scaling=want)
    both = outside | {"rope_scaling": LISTS | {"original_max_position_embeddings": 8192, "type": "su"}}
    assert pj.rope_from_config(both) == pj.rope(scaling=want)
    inside = PHI3 | {"rope_scaling": LISTS | {"original_max_position_embeddings": 8192}}
    assert pj.rope_from_config(inside).scaling.original_max_length == 8192
    assert pj.rope_from_config(PHI3 | {"rope_scaling": LISTS}).scaling.original_max_length == 131_072  # max_position_embeddings


def test_partial_rotation_is_applied_once():
    """vLLM #30384; also where the head dimension already is that of the rotated part (DeepSeek)."""
    glm = {"model_type": "glm4", "head_dim": 128, "partial_rotary_factor": 0.5, "rope_parameters": {"partial_rotary_factor": 0.5}}
    assert pj.rope_from_config(glm) == pj.rope(fraction=0.5, pairing="interleaved")
    mistral = {"model_type": "mistral4", "qk_rope_head_dim": 64, "qk_nope_head_dim": 64, "rope_interleave": False}
    mistral |= {"rope_parameters": {"partial_rotary_factor": 0.5}}
    assert pj.rope_from_config(mistral) == pj.rope(fraction=0.5, channels="last")
    rounded = {"model_type": "mimo_v2_flash", "head_dim": 192, "partial_rotary_factor": 0.334, "rope_theta": 5e6}
    assert pj.rope_from_config(rounded) == pj.rope(theta=5e6, fraction=64 / 192)


def test_proportional_is_not_partial():
    config = {"model_type": "gemma4_text", "head_dim": 512}
    config |= {"rope_parameters": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6}}
    assert pj.rope_from_config(config) == pj.rope(theta=1e6, scaling=pj.proportional_scaling(0.25))


def test_latent_attention_multiplies_all_scores_under_yarn():
    """DeepSeek V3: the softmax scale times f(s, mscale_all_dim)^2. Ministral 3 has the same keys and no such factor."""
    rotated = dict(fraction=1 / 3, pairing="interleaved", channels="last")
    scaling = pj.yarn_scaling(40.0, 4096, **MSCALES)
    got = pj.rope_from_config(DEEPSEEK | {"rope_scaling": DEEPSEEK_YARN | MSCALES})
    assert got == pj.chain(pj.query_scale(yarn_mscale(40.0) ** 2), pj.rope(scaling=scaling, **rotated))
    assert scaling.gain() == 1.0 and 1.87 < got.encodings[0].factor < 1.88
    without = pj.rope_from_config(DEEPSEEK | {"rope_scaling": DEEPSEEK_YARN | {"mscale_all_dim": 0}})
    assert without == pj.rope(scaling=pj.yarn_scaling(40.0, 4096, mscale_all_dim=0), **rotated)
    ministral = LLAMA | {"model_type": "ministral3", "rope_parameters": DEEPSEEK_YARN | MSCALES | {"llama_4_scaling_beta": 0.1}}
    got = pj.rope_from_config(ministral)
    assert got == pj.chain(pj.log_scale(4096, 0.1, "ministral3"), pj.rope(theta=1e6, scaling=scaling))


def test_pairs_of_latent_attention_follow_rope_interleave():
    """Checkpoints are interleaved unless they say otherwise."""
    assert pj.rope_from_config(DEEPSEEK).pairing == "interleaved"
    assert pj.rope_from_config(DEEPSEEK | {"rope_interleave": False}).pairing == "half"


def test_one_in_no_rope_layers_stands_for_rotation():
    """Llama 4 and SmolLM3; Llama 4 scales its queries in the layers that do not rotate."""
    smol = {"model_type": "smollm3", "rope_theta": 5e6, "num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]}
    assert [pj.rope_from_config(smol, layer=n) == pj.rope(theta=5e6) for n in range(4)] == [True, True, True, False]
    assert pj.rope_from_config(smol | {"no_rope_layers": None}, layer=3) == pj.identity()
    llama = {"model_type": "llama4_text", "num_hidden_layers": 8, "rope_theta": 500_000.0}
    assert pj.rope_from_config(llama, layer=3) == pj.log_scale(8192, 0.1, "llama4")
    assert pj.rope_from_config(llama | {"attn_temperature_tuning": False}, layer=3) == pj.identity()
    assert pj.rope_from_config(llama, layer=4) == pj.rope(theta=500_000.0, pairing="interleaved")


def test_layers_without_rotation():
    """By type (Cohere 2, EXAONE 4 with a window), by a theta of 0 (Muse Spark), or all of them (Kimi Linear)."""
    assert pj.rope_from_config({"model_type": "cohere2"}, FULL) == pj.identity()
    cohere = {"model_type": "cohere2", "position_embedding_type": "rope_gptj", "rotary_pct": 1.0, "num_hidden_layers": 4}
    assert pj.rope_from_config(cohere, SLIDING) == pj.rope(pairing="interleaved") == pj.rope_from_config(cohere, layer=2)
    exaone = {"model_type": "exaone4", "num_hidden_layers": 4, "sliding_window": 4096, "rope_theta": 1e6}
    assert [pj.rope_from_config(exaone, layer=n).name for n in range(4)] == ["rope"] * 3 + ["identity"]
    assert pj.rope_from_config(exaone | {"sliding_window": None}, FULL) == pj.rope(theta=1e6)
    muse = {"model_type": "muse_spark_text", "rope_theta": 500_000.0, "layer_rope_theta": [0, 10_000.0]}
    assert [pj.rope_from_config(muse, layer=n) for n in range(2)] == [pj.identity(), pj.rope()]
    assert pj.rope_from_config({"model_type": "kimi_linear", "qk_rope_head_dim": 64}) == pj.identity()
    assert pj.rope_from_config({"model_type": "qwen3_next", "layer_types": [FULL, "linear_attention"]}, layer=1) == pj.identity()


# Bad configurations --------------------------------------------------------------------------------------------------


def scaled(**own):
    return LLAMA | {"rope_scaling": own}


BAD = {
    "unknown type": (scaled(rope_type="yarnn", factor=4.0), r"rope_type must be one of .*yarn, got 'yarnn'; did you mean 'yarn'\?"),
    "axial": (scaled(rope_type="axial"), r"rope_type must be one of .*got 'axial'; axial_rope\(\) has the rotations of grids"),
    "type that is no text": (scaled(rope_type=3), r"rope_type must be one of .*got 3"),
    "unknown key": (
        scaled(**YARN, beta_fst=32),
        r"the key 'beta_fst' of a configuration with rope_type 'yarn' is not supported, got 32; .*did you mean 'beta_fast'\?",
    ),
    "key of another type": (scaled(rope_type="linear", factor=4.0, beta_fast=32), r"'beta_fast' .*with rope_type 'linear' is not"),
    "rotated values": ({"model_type": "roformer", "rotary_value": True}, r"the key 'rotary_value' .* is not supported, got True"),
    "unknown key outside": (LLAMA | {"rope_thta": 5.0}, r"the key 'rope_thta' .*got 5.0; .*did you mean 'rope_theta'\?"),
    "factor below 1": (scaled(rope_type="linear", factor=0.5), r"factor must be at least 1, got 0.5"),
    "factor that is no number": (scaled(rope_type="linear", factor="4"), r"factor must be a number .*, got '4'"),
    "no factor": (scaled(rope_type="linear"), r"factor must be given for rope_type 'linear', got none"),
    "no low factor": (scaled(rope_type="llama3", factor=8.0), r"low_freq_factor must be given for rope_type 'llama3'"),
    "exchanged factors": (
        scaled(rope_type="llama3", **LLAMA3 | {"low_freq_factor": 4.0, "high_freq_factor": 1.0}),
        r"high_freq_factor must be at least low_freq_factor=4.0, got 1.0",
    ),
    "exchanged betas": (scaled(**YARN, beta_fast=1, beta_slow=32), r"beta_fast must be at least beta_slow=32, got 1"),
    "length that is no integer": (
        scaled(**YARN | {"original_max_position_embeddings": 4096.5}),
        r"original_max_position_embeddings must be .*got 4096.5",
    ),
    "short list": (
        PHI3 | {"rope_scaling": LISTS | {"short_factor": [1.0], "long_factor": [1.0]}},
        r"short_factor must have a number for each of 2 pairs of channels, got 1",
    ),
    "lists of two lengths": (
        PHI3 | {"rope_scaling": LISTS | {"long_factor": [1.0]}},
        r"short_factor and long_factor .*got 2 and 1",
    ),
    "negative in a list": (
        PHI3 | {"rope_scaling": LISTS | {"long_factor": [1.0, -1.0]}},
        r"long_factor must be .*got \(1.0, -1.0\)",
    ),
    "no list": (
        PHI3 | {"rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.0]}},
        r"long_factor must be given .*'longrope'",
    ),
    "negative theta": (LLAMA | {"rope_theta": -1.0}, r"theta must be positive, got -1.0"),
    "theta that is no number": (LLAMA | {"rope_theta": "10000"}, r"rope_theta must be .*got '10000'"),
    "fraction above 1": (LLAMA | {"partial_rotary_factor": 2.0}, r"partial_rotary_factor must be above 0 and at most 1, got 2.0"),
    "odd width": (LLAMA | {"partial_rotary_factor": 0.2}, r"partial_rotary_factor must leave an even number .*0.2 \* 128 = 25"),
    "large rotary_dim": (
        {"model_type": "gptj", "n_embd": 64, "n_head": 2},
        r"rotary_dim must be .* to the head dimension, 32, got 64",
    ),
    "scaling that is no object": (LLAMA | {"rope_scaling": "yarn"}, r"rope_scaling must be an object or null, got 'yarn'"),
    "two that differ": (
        LLAMA | {"rope_scaling": {"factor": 2.0}, "rope_parameters": {"factor": 4.0}},
        r"rope_parameters and rope_scaling must agree, got factor=4.0 and factor=2.0",
    ),
    "half nested": (
        LLAMA | {"rope_parameters": {FULL: {}, "rope_theta": 1e6}},
        r"must be flat or by type .*'full_attention' beside",
    ),
    "sections": (
        {"model_type": "qwen2_vl", "head_dim": 128, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 23]}},
        r"mrope_section must sum to half of the 128 rotated channels, got \[16, 24, 23\] with the sum 63",
    ),
    "sections of dynamic": (
        scaled(rope_type="dynamic", factor=2.0, mrope_section=[16, 24, 24]),
        r"scaling of mrope must be None, or a scaling that does not depend on the length, .*got dynamic_ntk_scaling",
    ),
    "no rotary encoding": ({"model_type": "bloom"}, r"config must have a rotary encoding, got model_type 'bloom' and none of"),
    "alibi": ({"model_type": "falcon", "alibi": True}, r"config must be that of a model with a rotary encoding, got alibi=True"),
    "relative keys": (LLAMA | {"position_embedding_type": "relative_key"}, r"got position_embedding_type='relative_key'"),
    "xd-rope": ({"model_type": "hunyuan_vl"}, r"model_type 'hunyuan_vl' is not supported: XD-RoPE"),
    "alpha elsewhere": (scaled(type="dynamic", alpha=2.0, factor=1.0), r"'alpha' .*model_type 'llama' is not supported, got 2.0"),
    "layers without a number": ({"model_type": "smollm3", "num_hidden_layers": 4}, r"layer must be the index of a layer.*got None"),
    "layers without a type": (GEMMA3, r"layer_type must be 'full_attention' or 'sliding_attention'.*got None"),
    "no_rope_layers": (
        {"model_type": "smollm3", "num_hidden_layers": 4, "no_rope_layers": [1, 2]},
        r"no_rope_layers must be a list of 0 and 1, .*got \(1, 2\)",
    ),
}


@pytest.mark.parametrize(("config", "message"), BAD.values(), ids=BAD)
def test_bad_configurations_are_named(config, message):
    with pytest.raises(ValueError, match=message) as error:
        pj.rope_from_config(config)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_bad_types_and_numbers_of_layers(tmp_path):
    nested = {"model_type": "gemma3_text", "rope_parameters": {FULL: {"rope_theta": 1e6}, SLIDING: {}}}
    for arguments, message in (
        ((nested, "local"), r"layer_type must be one of .*full_attention, sliding_attention, or None, got 'local'"),
        ((nested, "full_atention"), r"layer_type must be .*; did you mean 'full_attention'\?"),
        ((nested,), r"layer_type must be one of full_attention, sliding_attention, whose parameters differ, got None"),
        ((nested | {"layer_types": [FULL]}, SLIDING, 0), r"layer_type must be the type of layer 0, 'full_attention', or None"),
        ((GEMMA3, None, 12), r"layer must be below the number of layers, 12, got 12"),
        ((tmp_path / "absent.json",), r"config must be the path of a config.json, got .*absent.json"),
        (([1],), r"config must be .*got \[1\]"),
    ):
        config, layer_type, layer = (*arguments, None, None)[:3]
        with pytest.raises(ValueError, match=message):
            pj.rope_from_config(config, layer_type, layer=layer)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config must be the path of a config.json, got .*Expecting property name"):
        pj.rope_from_config(tmp_path)
