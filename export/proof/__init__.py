"""Proof: the PyTorch reference and its layer walk, and bundles measured against it."""
