"""Developer tools, imported by no operator: operator inputs, the ahead-of-time compiler, the tuner."""
