"""Small models that are trained on something known, to see whether the instruments find it."""
