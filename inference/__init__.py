"""Inference: opening a run, prefill and decoding steps, sampling, generation, beams, scoring, embeddings."""
