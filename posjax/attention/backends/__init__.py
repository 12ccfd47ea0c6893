"""Attention backends. They take queries, keys, values, a mask and bias terms, never encodings."""
