"""Training: the config of a run, loss, optimizer, the step, the loop, metrics and reports."""
