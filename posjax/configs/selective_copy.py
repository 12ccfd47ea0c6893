"""Selective copying: copy the tokens without the blanks. Three to four minutes per encoding on two CPU cores.

    posjax compare selective_copy
    posjax compare selective_copy --seq_length 512 --steps 100000 --workdir runs/selective_copy_paper

The second command uses the setting of Golovneva et al., arXiv:2405.18719 (256 tokens and 256 blanks, dimension 64, 2 layers, 2
heads), and needs an accelerator. seq_length is tokens plus blanks; the test sets have half (dense) and twice (sparse) as many
blanks.
"""

from posjax.lab.config import Config


def get_config() -> Config:
    return Config(
        task="selective_copy",
        encoding="cope(64)",
        encodings=("learned", "rope", "cope(64)"),
        seq_length=32,
        batch_size=64,
        num_layers=2,
        embed_dim=64,
        num_heads=2,
        steps=2000,
        learning_rate=1e-3,
        warmup_steps=100,
        decay="linear",
        end_fraction=0.0,
        weight_decay=0.01,
        eval_tokens=65_536,
    )
