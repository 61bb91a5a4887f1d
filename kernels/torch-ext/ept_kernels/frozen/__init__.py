"""Element-wise work of a frozen model: RMSNorm, rotary embedding, activations; with gradients only for inputs."""
