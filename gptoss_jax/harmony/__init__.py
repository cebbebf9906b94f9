"""Text and ids: the tokenizer and the harmony format. Knows no model and no jax."""
