"""Families of models: from a config.json to an architecture.

``architecture_of`` selects the family by ``model_type``. A family's function reads the keys that transformers reads for that model
type; what posjax does not have is an error that names the key and its value.
"""

from collections.abc import Callable, Mapping
from typing import Any

from posjax.checks import near, short
from posjax.models.pretrained.architecture import Architecture
from posjax.models.pretrained.families import bert, gpt, llama
from posjax.models.pretrained.families.keys import Keys

FAMILIES: dict[str, Callable[[Keys], Architecture]] = {
    "llama": llama.llama,
    "mistral": llama.mistral,
    "qwen2": llama.qwen2,
    "qwen3": llama.qwen3,
    "smollm3": llama.smollm3,
    "olmo2": llama.olmo2,
    "gemma": llama.gemma,
    "gemma2": llama.gemma2,
    "gemma3_text": llama.gemma3,
    "gpt2": gpt.gpt2,
    "gptj": gpt.gptj,
    "gpt_neox": gpt.gpt_neox,
    "bloom": gpt.bloom,
    "bert": bert.bert,
    "roberta": bert.roberta,
    "xlm-roberta": bert.roberta,
}


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """Returns the architecture that a config.json describes.

    Args:
      config: the keys and values of config.json, as transformers 4 or 5 writes them.

    Raises:
      ValueError: the model type is unknown, a key is missing, or its value asks for what posjax does not have.
    """
    if not isinstance(config, Mapping):
        raise ValueError(f"config must be a mapping, the keys and values of a config.json, got {short(config)}")
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        hint = near(str(model_type), FAMILIES)
        raise ValueError(f"model_type must be one of {', '.join(sorted(FAMILIES))}, got {short(model_type)}{hint}")
    keys = Keys(config)
    keys.refuse(quantization_config=None, is_encoder_decoder=False)
    return FAMILIES[model_type](keys)
