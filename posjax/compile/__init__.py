"""Programs compiled for chips that are not attached, and what a training step takes there."""
