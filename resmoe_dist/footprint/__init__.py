"""The memory and disk that a model needs on a grid, from its config alone: no weights are read."""
