"""The joint prompt: fusion and gated spaces, as a reference and as Triton kernels."""
