"""The study behind docs/compression.md: which cells it has, how each is measured, its rows, and the page made of them."""
