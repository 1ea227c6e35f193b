"""The parts that a `ModelConfig` is made of: what each may say, and its own checks."""
