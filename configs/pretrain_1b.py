"""A decoder of 1.1 billion parameters under RoPE and CoPE, the shape of a run on a TPU pod: 2 million tokens a step.

    posjax train configs/pretrain_1b.py --data tfds:NAME

It has not been run. What it takes on chips that are not attached, with heads and MLP of a sequence over 4 of them and the state cut
over all, the compiler tells:

    job = {"config": "configs/pretrain_1b.py", "mesh": "fsdp=64,tensor=4"}
    posjax.aot.compile_ahead("posjax.runs:abstract_step", job, "v5e:16x16")
"""

from posjax.config import Config


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
