"""A decoder with 1.1 billion parameters, RoPE and CoPE; 2 million tokens per step, 105 billion in total.

    posjax train pretrain_1b --data tfds:NAME

It has not been run. Estimates for 256 chips from their compiler and data sheet (posjax plan pretrain_1b --topology v5e:16x16):

    memory per chip    parameters 0.016, optimizer 0.033, activations 2.46; total 2.51 of 16 GiB
    communication      over fsdp all-gather 3,032 MiB (96 % overlapped), all-reduce 3,294
    roofline           compute 479 ms (90 %), memory 96, fsdp 50 (10 %)
    time per step      0.479 s with full overlap (MFU 77 %), 0.514 s as compiled (MFU 72 %)

and for sequences of 131,072 tokens (--seq_length 131072 --batch_size 16 --mesh fsdp=16,context=16), 8,192 of them per chip:

    memory per chip    total 2.53 of 16 GiB
    communication      over context 119,112 MiB by permutation (95 % overlapped), over both axes all-gather 3,032,
                       all-reduce 3,292
    roofline           compute 3,587 ms (73 %), memory 1,796, context 1,249 (26 %), both axes 50 (1 %)
    time per step      3.59 s with full overlap (MFU 49 %), 3.69 s as compiled (MFU 47 %)
"""

from posjax.lab.config import Config


def get_config() -> Config:
    return Config(
        tokenizer="bpe",
        vocab_size=32_768,
        seq_length=8192,
        batch_size=256,
        encoding="rope + cope(64)",
        encodings=("rope", "rope + cope(64)"),
        num_layers=22,
        embed_dim=2048,
        num_heads=16,
        num_kv_heads=8,
        mlp_dim=5632,
        activation="swiglu",
        remat="full",
        compute_dtype="bfloat16",
        mesh="fsdp=-1",
        steps=50_000,
        learning_rate=4e-4,
        warmup_steps=2000,
        beta2=0.95,
        eval_lengths=(1, 2),
        eval_tokens=1_048_576,
    )
