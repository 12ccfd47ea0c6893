"""A decoder with 7.1 billion parameters, RoPE and CoPE; 4 million tokens per step, 210 billion in total.

    posjax train pretrain_7b --data tfds:NAME

It has not been run. Estimates for 512 chips from their compiler and data sheet (posjax plan pretrain_7b --topology v5p:8x8x8):

    memory per chip    parameters 0.053, optimizer 0.106, activations 4.27; total 4.43 of 95 GiB
    communication      over fsdp all-reduce 40,963 MiB (shards of 8 rows are gathered by all-reduce)
    roofline           compute 1,116 ms (89 %), memory 142, fsdp 143 (11 %)
    time per step      1.116 s with full overlap (MFU 79 %), 1.259 s as compiled (MFU 70 %)

and for sequences of 131,072 tokens (--seq_length 131072 --batch_size 32 --mesh fsdp=32,context=16), 8,192 of them per chip:

    memory per chip    total 4.76 of 95 GiB
    communication      over context 179,396 MiB by permutation, all overlapped; over both axes all-reduce 40,961
    roofline           compute 4,997 ms (86 %), memory 1,737, context 627 (11 %), both axes 143 (2 %)
    time per step      5.00 s with full overlap (MFU 52 %), 5.14 s as compiled (MFU 51 %)
"""

from posjax.lab.config import Config


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
