"""The positional encodings, and encodings as text."""
