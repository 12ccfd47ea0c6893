"""Eight positional encodings on the source code of Python's standard library, in about five minutes on two CPU cores.

    posjax compare quickstart

Trains decoders of four layers on rows of 64 bytes, and evaluates them on rows of up to 512.
"""

from posjax.lab.config import Config


def get_config() -> Config:
    return Config(
        seq_length=64,
        batch_size=8,
        num_layers=4,
        embed_dim=64,
        num_heads=4,
        tie_embeddings=False,
        steps=1100,
        learning_rate=4e-3,
        warmup_steps=50,
        beta2=0.95,
        log_every=100,
        checkpoint_every=550,
        eval_tokens=32_768,
    )
