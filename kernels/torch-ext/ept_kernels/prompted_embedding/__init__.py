"""The prompted embedding: the look-up, the low-rank update and the prompt in one pass."""
