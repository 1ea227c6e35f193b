"""The model: its config, layers, decoder and forward pass, from one device's view; kernels under ops/."""
