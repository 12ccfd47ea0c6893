"""A decoder of 125 million parameters under RoPE and CoPE: 8,192 tokens a sequence, half a million a step, 10 billion in all.

    posjax train configs/pretrain_125m.py --data tfds:NAME
"""

from posjax.config import Config


def get_config() -> Config:
    return Config(
        tokenizer="bpe",
        vocab_size=32_768,
        seq_length=8192,
        batch_size=64,
        encoding="rope + cope(64)",
        encodings=("rope", "rope + cope(64)"),
        num_layers=12,
        embed_dim=768,
        num_heads=12,
        num_kv_heads=4,
        mlp_dim=2944,
        activation="swiglu",
        remat="attention",
        compute_dtype="bfloat16",
        mesh="fsdp=-1",
        steps=20_000,
        learning_rate=6e-4,
        warmup_steps=1000,
        beta2=0.95,
        eval_lengths=(1, 2),
        eval_tokens=1_048_576,
    )
