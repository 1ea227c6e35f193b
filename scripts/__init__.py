"""One script a job: `python scripts/train.py` in a clone, `weft train` where the package is installed."""
