"""Ahead-of-time compilation for chips that are not attached, and the memory and time of a training step on them."""
