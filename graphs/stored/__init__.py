"""Weights as backends store them: layouts, and the files that hold them."""
