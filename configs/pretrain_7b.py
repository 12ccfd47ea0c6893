"""A decoder of 7 billion parameters under RoPE and CoPE: 8,192 tokens a sequence, 4 million a step.

    posjax train configs/pretrain_7b.py --data tfds:NAME
"""

from posjax.config import Config


def get_config() -> Config:
    return Config(
        tokenizer="bpe",
        vocab_size=32_768,
        seq_length=8192,
        batch_size=512,
        encoding="rope + cope(64)",
        encodings=("rope", "rope + cope(64)"),
        num_layers=32,
        embed_dim=4096,
        num_heads=32,
        num_kv_heads=8,
        mlp_dim=14_336,
        activation="swiglu",
        remat="full",
        compute_dtype="bfloat16",
        mesh="fsdp=-1",
        steps=50_000,
        learning_rate=3e-4,
        warmup_steps=2000,
        beta2=0.95,
        eval_lengths=(1, 2),
        eval_tokens=1_048_576,
    )
