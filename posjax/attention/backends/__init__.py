"""Attention backends. They see queries, keys, values, a mask and bias terms, never encodings."""
