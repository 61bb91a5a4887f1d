"""4-bit weights: their format, the references, and kernels that dequantise them and multiply with them."""
