"""Floating-point operations of a training step.

A run's model FLOPs utilization (MFU) is its operations per second divided by the device's peak, ``hardware.peak_flops``.
"""

from posjax.lab.config import Config


def attention_flops(config: Config) -> float:
    """Counts the operations of attention's two matrix products in the forward pass of one batch, over all layers.

    Each visible (query, key) pair costs 4 H operations per head.
    """
    length, window = config.seq_length, config.local_window_size
    visible = length if window is None else min(window + 1, length)
    pairs = visible * (visible + 1) / 2 + (length - visible) * visible if config.task != "mlm" else length * length
    heads = config.num_heads * (config.head_dim or config.embed_dim // config.num_heads)
    return 4.0 * config.num_layers * config.batch_size * heads * pairs


def model_flops(config: Config, parameters: int) -> float:
    """Counts the operations of a training step without recomputation, as MFU does (Chowdhery et al., arXiv:2204.02311, appendix B).

    A step costs three forward passes. A forward pass costs two operations per token and parameter, plus attention's products. All
    ``parameters`` count as operands of a matrix product, the embedding included, which is exact if it also computes the logits.
    """
    return 6.0 * parameters * config.batch_size * config.seq_length + 3.0 * attention_flops(config)
