"""CUDA kernels of the expert dispatch, compiled ahead of time into TensorRT engines as plugins."""
