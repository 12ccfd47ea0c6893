"""The Transformer model and its losses."""
