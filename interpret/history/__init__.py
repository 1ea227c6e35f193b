"""How models of language came to be transformers, each trained on one corpus and one budget: docs/history.md."""
