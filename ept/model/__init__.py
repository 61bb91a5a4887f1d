"""The frozen base model with its adapters."""
