"""Decompositions, rounding and pruning of matrices and tensors as NumPy arrays in float64, one method a file."""
