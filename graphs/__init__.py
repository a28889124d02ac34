"""The model as graphs: the torch reference, its trace, and what is done to it."""
