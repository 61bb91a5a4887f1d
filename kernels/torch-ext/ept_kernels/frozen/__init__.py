"""Element-wise work of a frozen model: RMSNorm, rotary embedding, activations; gradients for inputs only."""
