"""Weights for `iddpm_ext.load`, which finds them here by name."""
