"""What a run costs before it runs: memory, FLOPs, communication and time by shapes, chips, the search, compiling ahead."""
