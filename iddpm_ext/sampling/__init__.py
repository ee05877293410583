"""Sampling: the reverse chain, and the engines that run a network fast."""
