"""The prompted embedding with an update that depends on the token: look-up, bottleneck and prompt in one pass."""
