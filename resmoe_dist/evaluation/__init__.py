"""Error, perplexity and bytes, measured."""
