"""The encoding of a layer, from the values of a configuration."""

import os

from posjax.checks import check, checked
from posjax.core.chain import chain
from posjax.core.encoding import PositionalEncoding, identity
from posjax.encodings.rope_config.defaults import MROPE
from posjax.encodings.rope_config.layers import layer_type_of, parameters_of, rotates
from posjax.encodings.rope_config.reading import Config, check_inside, check_outside, kind_of, read
from posjax.encodings.rope_config.values import (
    built,
    latent_scale,
    mrope_of,
    pairing_of,
    position_scale,
    rotated_channels,
    scaling_of,
    theta_of,
)
from posjax.encodings.rotary import rope


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
    config = read(config)
    model = check("model_type", config.get("model_type"), str | None) or ""
    check_outside(config, model)
    layer_type = layer_type_of(config, layer_type, layer)
    if not rotates(config, layer_type, layer):
        return position_scale(config, {}, rotates=False) or identity()
    parameters, is_local = parameters_of(config, layer_type)
    if parameters is None:
        return identity()
    kind = kind_of(parameters, model)
    check_inside(parameters, kind, model)
    theta = theta_of(config, parameters, is_local, layer)
    if theta == 0:
        return identity()
    pairing = pairing_of(config)
    rotated, head_dim = rotated_channels(config, parameters, kind)
    scaling = scaling_of(kind, config, parameters, rotated)
    if "mrope_section" in parameters or model in MROPE:
        encoding = mrope_of(config, parameters, theta, rotated, pairing, scaling)
    else:
        latent = bool(config.get("qk_rope_head_dim"))
        fraction = rotated if head_dim is None else rotated / head_dim
        encoding = built(
            rope, theta=theta, fraction=fraction, pairing=pairing, scaling=scaling, channels="last" if latent else "first"
        )
    before = [position_scale(config, parameters, rotates=True), latent_scale(config, scaling)]
    members = [member for member in before if member is not None]
    return chain(*members, encoding) if members else encoding
