"""Operations of a training step. Over what a device could do at most, ``hardware.peak_flops``, they are the MFU of a run."""

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
