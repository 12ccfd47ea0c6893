"""Floating-point operations of a training step, and the least memory that it takes.

A run's model FLOPs utilization (MFU) is its operations per second divided by the device's peak, ``hardware.peak_flops``.
"""

import jax
import jax.numpy as jnp

from posjax.checks import check_fits
from posjax.data.corpus import vocab_size_of
from posjax.lab.config import Config
from posjax.models.config import check_memory


def attention_flops(config: Config) -> float:
    """Counts the operations of attention's two matrix products in the forward pass of one batch, over all layers.

    Each visible (query, key) pair costs 4 H operations per head.
    """
    model, length = config.transformer(vocab_size=2), config.seq_length
    pairs = 0.0
    for window in model.windows:
        visible = length if window is None else min(window + 1, length)
        pairs += visible * (visible + 1) / 2 + (length - visible) * visible if model.is_causal else length * length
    return 4.0 * config.batch_size * model.dims.num_heads * model.dims.head_dim * pairs


def model_flops(config: Config, parameters: int) -> float:
    """Counts the operations of a training step without recomputation, as MFU does (Chowdhery et al., arXiv:2204.02311, appendix B).

    A step costs three forward passes. A forward pass costs two operations per token and parameter, plus attention's products. All
    ``parameters`` count as operands of a matrix product, the embedding included, which is exact if it also computes the logits.
    """
    return 6.0 * parameters * config.batch_size * config.seq_length + 3.0 * attention_flops(config)


def check_step_fits(config: Config) -> None:
    """Checks, before any data is read, that a step does not need more memory than this run's devices have.

    The estimate is a lower bound: the batch, the input of every layer, which the backward pass needs, and the logits; and the
    weights, their two moments and their gradient.

    Raises:
      ValueError: the step cannot fit. The message names the fields that determine its size.
    """
    devices = jax.process_count() if jax.default_backend() == "cpu" else jax.device_count()
    vocab_size = 2  # at least
    if config.task in ("lm", "mlm"):
        vocab_size = vocab_size_of(config.tokenizer, config.vocab_size, config.data_dir)
    tokens = config.batch_size * config.seq_length
    names = ("task", "batch_size", "accumulate_steps", "seq_length", "num_layers", "embed_dim")
    stream = config.num_layers * config.embed_dim * jnp.dtype(config.compute_dtype).itemsize + 4 * vocab_size
    batch = jax.ShapeDtypeStruct((tokens * 20 + tokens * stream // config.accumulate_steps,), jnp.uint8)
    check_fits(f"a batch of {', '.join(f'{name}={getattr(config, name)!r}' for name in names)}", batch, 1 / devices)
    check_memory(config.transformer(vocab_size), 4 / devices)
    if config.num_examples is not None and config.task not in ("lm", "mlm"):
        examples = jax.ShapeDtypeStruct((config.num_examples * config.seq_length * 20,), jnp.uint8)
        check_fits(f"num_examples={config.num_examples} of task={config.task!r}, seq_length={config.seq_length}", examples)
