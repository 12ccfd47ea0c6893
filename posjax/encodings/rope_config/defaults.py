"""Defaults of model types: those that differ from theta = 10,000, whole heads, the half pairing, and rotation in every layer."""

THETA = {
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
LOCAL_THETA: dict[str, float] = dict.fromkeys(  # of layers with a sliding window
    ("gemma3_text", "gemma3n_text", "modernbert", "modernbert-decoder", "t5gemma2_decoder", "t5gemma2_text"), 10_000.0
)
FRACTION = {
    **dict.fromkeys(("gpt_neox", "stablelm", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), 0.25),
    **dict.fromkeys(("bamba", "glm", "glm4", "glm4_moe", "glm4v_moe_text", "glmasr_encoder", "nemotron", "persimmon"), 0.5),
    **dict.fromkeys(("phi", "recurrent_gemma"), 0.5),
    **{"moonshine": 0.9, "moonshine_streaming": 0.8},
}
ROTARY_DIM = {"gptj": 64, "codegen": 64}
HEAD_DIM = {
    **dict.fromkeys(("bailing_hybrid", "csm", "gpt_oss", "openai_privacy_filter", "sarvam_moe"), 64),
    **dict.fromkeys(("cohere2", "cwm", "ernie4_5", "exaone", "glm", "glm4", "helium", "hy_v3", "laguna", "llama4_text"), 128),
    **dict.fromkeys(("mellum", "ministral3", "minimax_m2", "nemotron", "paddleocr_vl_text", "qwen3_vl_text", "solar_open"), 128),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "gemma3n_text", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), 256),
    **{"recurrent_gemma": 256, "mimo_v2_flash": 192},
}
INTERLEAVED = {"bailing_hybrid", "blt", "codegen", "cohere", "cohere2", "deepseek_v2", "deepseek_v32", "deepseek_v4", "ernie4_5"}
INTERLEAVED |= {"ernie4_5_moe", "ernie4_5_vl_moe_text", "glm", "glm4", "glm4v_text", "glm_moe_dsa", "glm_ocr_text", "gptj"}
INTERLEAVED |= {"axk2", "dots3_note_text", "hy_v4_vl_text", "pe_audio_encoder", "pe_audio_video_encoder", "pe_video_encoder"}
INTERLEAVED |= {"helium", "llama4_text", "longcat_flash", "moonshine", "moonshine_streaming", "moonshine_streaming_encoder"}
INTERLEAVED |= {"openai_privacy_filter", "roformer"}
INTERLEAVE_OPTION = {"axk1", "deepseek_v3", "glm4_moe_lite", "kimi_k2", "mistral4", "sarvam_mla", "youtu"}  # rope_interleave, True
MROPE = {  # layout and sections, as the configuration lists them; without "mrope_interleaved", the class interleaves all the same
    **dict.fromkeys(("qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text", "paddleocr_vl_text"), ("blocks", (16, 24, 24))),
    **dict.fromkeys(("qwen2_5_omni_text", "qwen2_5_omni_talker"), ("blocks", (16, 24, 24))),
    **dict.fromkeys(("glm4v_text", "glm4v_moe_text", "glm_ocr_text", "glm_image_text"), ("blocks", (8, 12, 12))),
    **dict.fromkeys(("qwen3_vl_text", "qwen3_vl_moe_text", "qwen3_omni_moe_text"), ("interleaved", (24, 20, 20))),
    **dict.fromkeys(("qwen3_5_text", "qwen3_5_moe_text"), ("interleaved", (11, 11, 10))),
    "ernie4_5_vl_moe_text": ("alternating", (22, 22, 20)),  # height, width, time
}
NOPE = {  # types of layers that do not rotate
    **dict.fromkeys(("afmoe", "cohere2", "exaone4", "exaone_moe"), ("full_attention",)),
    "kimi_linear": ("full_attention",),
}
SCALED_FULL = {"gemma3_text", "gemma3n_text", "olmo3", "t5gemma2_decoder", "t5gemma2_text"}  # 4.x scales only full attention
NOPE_INTERVAL = {"llama4_text": 4, "smollm3": 4}  # every fourth layer does not rotate, unless no_rope_layers says which
PATTERN = {"cohere2": 4, "exaone4": 4, "gemma3_text": 6, "olmo3": 4}  # every n-th layer has full attention
_OTHERS = """afmoe arcee aria_text axk1 chameleon cohere2 deepseek_v2 deepseek_v3 deepseek_v32 diffllama doge dots1 esm eurobert
exaone4 exaone_moe falcon_h1 gemma gemma2 glm4_moe_lite glm4v_text glm_moe_dsa glm_ocr_text granite granitemoe granitemoehybrid
granitemoeshared gpt_neox_japanese hunyuan_v1_dense hunyuan_v1_moe internlm2 internlm3 jais2 jetmoe kimi_k2 kimi_linear llama
minicpm minicpm3 ministral mistral mistral4 moshi olmo olmo2 olmoe phi3 phi4_multimodal qwen2 qwen2_moe qwen3 qwen3_moe roformer
sarvam_mla seed_oss starcoder2 vaultgemma youtu gptj codegen"""  # model types with all other defaults
ROTARY = {*THETA, *LOCAL_THETA, *FRACTION, *ROTARY_DIM, *HEAD_DIM, *_OTHERS.split()}
UNSUPPORTED = {
    "cohere2_moe": "its first layers rotate although their type does not",
    "musicflamingo": "it rotates by time in seconds",
    "nanochat": "it rotates in the opposite direction; exchange the halves of each head's query and key channels and use rope()",
    **dict.fromkeys(("mistral_large4", "mistral_large4_text"), "it learns frequencies (LeRoPE)"),
    **dict.fromkeys(("dinov3_vit", "eomt_dinov3", "sapiens2"), "it rotates by a grid, for which axial_rope() is"),
    **dict.fromkeys(("hunyuan_vl", "hunyuan_vl_text"), "XD-RoPE cuts the doubled ladder of frequencies and is not a rotation"),
}
NOT_ATTENTION = {"linear_attention", "conv", "mamba", "mamba2", "recurrent", "mlp", "kda", "moe"}
ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
