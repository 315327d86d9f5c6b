"""The stages of a pipeline, in this process or as Ray actors."""
