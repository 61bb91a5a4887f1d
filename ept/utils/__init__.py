"""Small helpers that know nothing of models: messages, files, the environment, plots."""
