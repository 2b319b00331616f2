"""What a model's own activations say about which of its weights matter."""
