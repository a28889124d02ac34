"""The two nodes of our own CUDA kernels: as the pass writes them, the plugin registers them, the kernels read them."""

from __future__ import annotations

DOMAIN = "arriero"  # of the nodes in a graph, and the namespace that TensorRT finds the plugins in
GATE_UP, DOWN = "ExpertGateUp", "ExpertDown"
# What SwiGLU's results are multiplied with between the two, a power of two, by activations: float16 ends at 65504, and
# they may be larger where a model was trained in bfloat16.
INNER_SCALES = {"F16": 1 / 16, "BF16": 1.0}
BITS = {"int8": 8, "fp8": 8, "int4": 4}  # of a packed weight, by the kernels' forms
BLOCKS = (32, 64, 128)  # of int4 weights, a scale for each
