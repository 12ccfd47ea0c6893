"""Counting: the value of a variable after sets, increments and passes. Three to five minutes per encoding on two CPU cores.

    posjax compare counting
    posjax compare counting --seq_length 512 --embed_dim 256 --num_layers 4 --num_examples 10000 --learning_rate 7e-5 \\
        --steps 15625 --workdir runs/counting_paper

The second command uses the setting of Golovneva et al., arXiv:2405.18719 (4 layers, dimension 256, post-norm, Adam at 7e-5, batch
64, 100 epochs of 10,000 programs), and needs an accelerator. seq_length is the maximum length of a program, in operations and in
tokens.
"""

from posjax.lab.config import Config


def get_config() -> Config:
    return Config(
        task="counting",
        encoding="cope(64)",
        encodings=("learned", "rope", "cope(64)"),
        seq_length=64,
        batch_size=64,
        num_layers=2,
        embed_dim=64,
        num_heads=4,
        norm="layernorm",
        norm_position="post",
        dropout_rate=0.1,
        steps=1500,
        learning_rate=1e-3,
        warmup_steps=100,
        decay="constant",
        weight_decay=0.0,
        beta2=0.999,
        eval_tokens=65_536,
    )
