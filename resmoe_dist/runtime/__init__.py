"""Compressed experts in a live model: the DeepSpeed layer, loading, generation."""
