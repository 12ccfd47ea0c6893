"""From prompts to tokens and from tokens to text."""
