"""What is commonly said of how models behave, tried on a model: `python -m weft.interpret.claims RUN`. See docs/claims.md."""
