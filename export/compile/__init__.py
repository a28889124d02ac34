"""Compilers: one file per backend, from a lowered graph to what the runtime loads."""
