"""Measures layered_store side by side with its peers and with the limits: python -m benchmarks."""
