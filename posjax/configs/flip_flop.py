"""Flip-flop language modelling: remember the last written bit and ignore the rest. A minute per encoding on two CPU cores.

    posjax compare flip_flop
    posjax ablate flip_flop --seeds 5 --workdir runs/flip_flop_seeds
    posjax compare flip_flop --seq_length 512 --embed_dim 256 --num_layers 4 --steps 10000 --workdir runs/flip_flop_paper

The third command uses the setting of Golovneva et al., arXiv:2405.18719 (learning rate 3e-4, linear decay, batch 16), and needs an
accelerator. The error is the percentage of wrong bits after a read: on the training distribution, and with few (dense) and many
(sparse) tokens to ignore.
"""

from posjax.lab.config import Config


def get_config() -> Config:
    return Config(
        task="flip_flop",
        encoding="cope(64)",
        encodings=("learned", "rope", "cope(64)"),
        seq_length=64,
        batch_size=16,
        num_layers=2,
        embed_dim=64,
        num_heads=4,
        steps=1000,
        learning_rate=3e-4,
        warmup_steps=0,
        decay="linear",
        end_fraction=0.0,
        weight_decay=0.01,
        beta2=0.999,
        eval_tokens=65_536,
    )
