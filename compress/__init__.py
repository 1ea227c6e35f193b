"""Compression of trained models: methods that store a weight in fewer bits, and the study that measures them."""
