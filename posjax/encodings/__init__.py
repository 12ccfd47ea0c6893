"""The positional encodings and their text form."""
