"""The prompted embedding with the position-dependent update: look-up, low-rank update and prompt in one pass."""
