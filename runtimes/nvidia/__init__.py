"""What the runtimes of TensorRT's products share: driver, engine, cache on the device."""
