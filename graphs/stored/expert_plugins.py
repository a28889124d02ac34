"""The two nodes of our own CUDA kernels: as the pass writes them, the plugin registers them, the kernels read them."""

from __future__ import annotations

DOMAIN = "arriero"  # of the nodes in a graph, and the namespace that TensorRT finds the plugins in
GATE_UP, DOWN = "ExpertGateUp", "ExpertDown"
BLOCKS = (32, 64, 128)  # of int4 weights, a scale for each
