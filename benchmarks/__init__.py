"""Benchmarks: programs of the repository, not of the wheel."""
