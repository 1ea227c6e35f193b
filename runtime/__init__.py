"""The process: errors, signals, streams, other processes of a run, device memory, compiled programs that are kept."""
