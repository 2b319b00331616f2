"""Reading source models, and the compressed format."""
