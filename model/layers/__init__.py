"""One file a layer: its weights, forward pass and cache."""
