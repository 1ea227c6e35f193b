"""What the pages of benchmarks/ rest on: equal on every mesh, compiled pairs, speed beside peers. Nothing else needs it."""
