"""Compression of whole models: streamed, spread over ranks, resumable."""
