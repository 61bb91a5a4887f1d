"""4-bit weights: the weight, the references, and the kernels that dequantise them and multiply with them."""
