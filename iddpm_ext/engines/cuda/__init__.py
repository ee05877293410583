"""The CUDA engine: half-precision copies of the weights, and one graph a step."""
