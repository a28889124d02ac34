"""The build: its plan, its stages, and the bundle that they make."""
