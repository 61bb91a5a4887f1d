"""The prompted embedding with the token-dependent update: look-up, bottleneck and prompt in one pass."""
