"""Kernels and other operations behind one call each, with a reference that is always right."""
