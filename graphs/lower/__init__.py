"""Lowering to a backend, one file each."""
