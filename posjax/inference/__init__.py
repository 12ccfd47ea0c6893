"""Inference: generation of tokens from prompts, sampling, and decoding of tokens to text."""
