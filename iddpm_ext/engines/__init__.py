"""What evaluates a network fast: which engine takes a model, and the engines themselves."""
