"""4-bit weights: their format, the references, and the kernels that dequantise them and multiply with them."""
