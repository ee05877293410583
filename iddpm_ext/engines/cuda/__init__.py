"""The CUDA engine: half-precision copies of the weights, and one CUDA graph per step."""
