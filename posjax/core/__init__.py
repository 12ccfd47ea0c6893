"""What an encoding is, what an attention kernel sees of it, and which pairs of tokens may meet."""
