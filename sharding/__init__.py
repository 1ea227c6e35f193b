"""The mesh, the collectives, the pipeline, layouts of the sequence."""
