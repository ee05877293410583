"""Other people's networks and formats: Hugging Face diffusers, foreign UNets, ONNX."""
