"""A decoder with 125 million parameters, RoPE and CoPE; half a million tokens per step, 10 billion in total.

    posjax train pretrain_125m --data tfds:NAME

It has not been run. Estimates for 32 chips from their compiler and data sheet (posjax plan pretrain_125m --topology v5e:4x8):

    memory per chip    parameters 0.015, optimizer 0.029, activations 4.67; total 4.72 of 16 GiB
    communication      over fsdp all-gather 430 MiB (83 % overlapped), reduce-scatter 251, all-reduce 36
    roofline           compute 117 ms (93 %), memory 46, fsdp 8 (7 %)
    time per step      0.117 s with full overlap (MFU 86 %), 0.121 s as compiled (MFU 83 %)
"""

from posjax.lab.config import Config


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
