"""The build file: its schema, reading it with line numbers, the model and the devices that it names."""
