"""Training runs: one folder a run, from a configuration to a scored adapter."""
