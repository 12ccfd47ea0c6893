"""Operations of a training step, and what a device could do at most: their quotient is the MFU of a run."""

from typing import Any

from posjax.compile import aot, aot_gpu
from posjax.lab.config import Config


def attention_flops(config: Config) -> float:
    """Of both products of attention in all layers, forward, for a batch: 4 H for every pair that may meet and head."""
    length, window = config.seq_length, config.local_window_size
    seen = length if window is None else min(window + 1, length)
    pairs = seen * (seen + 1) / 2 + (length - seen) * seen if config.task != "mlm" else length * length
    heads = config.num_heads * (config.head_dim or config.embed_dim // config.num_heads)
    return 4.0 * config.num_layers * config.batch_size * heads * pairs


def model_flops(config: Config, parameters: int) -> float:
    """Of a step without recomputation, as MFU has it (Chowdhery et al., arXiv:2204.02311, appendix B).

    Three times the forward pass: two operations a token for each parameter that is in a product, and attention's own. The embedding
    is in one where it makes the logits.
    """
    return 6.0 * parameters * config.batch_size * config.seq_length + 3.0 * attention_flops(config)


# As jax calls TPUs, of which a device is one chip, or a core of one where a chip is two devices.
_KINDS = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e", "TPU7x": "tpu7x"}


def peak_flops(device: Any) -> float | None:
    """Peak bfloat16 operations a second of a device of jax, from its data sheet; None where that is not known, as of a CPU."""
    if device.device_kind in _KINDS:
        return aot.GENERATIONS[_KINDS[device.device_kind]].flops * getattr(device, "num_cores", 1)
    return next((gpu.flops for gpu in aot_gpu.GPUS.values() if gpu.device_kind == device.device_kind), None)
