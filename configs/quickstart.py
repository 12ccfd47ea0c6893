"""Eight positional encodings on the source code of Python's standard library, in under five minutes on two CPU cores.

    posjax compare configs/quickstart.py

A decoder of three layers reads bytes, 128 at a time, and is evaluated at up to 1,024.
"""

from posjax.config import Config


def get_config() -> Config:
    return Config(
        seq_length=128,
        batch_size=16,
        num_layers=3,
        embed_dim=128,
        num_heads=4,
        steps=400,
        learning_rate=3e-3,
        warmup_steps=40,
        weight_decay=0.1,
        eval_tokens=16_384,
        checkpoint_every=200,
    )
