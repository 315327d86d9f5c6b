"""Puts schedulers, engines and pipelines together: the only layer that names concrete classes."""
