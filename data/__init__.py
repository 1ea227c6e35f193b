"""Batches as a function of (seed, step): sources of text, tokens, packing, order."""
