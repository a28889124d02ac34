"""NVIDIA's side: GPUs, engine shapes, TensorRT's interface."""
