"""Puts the schedulers, engines and pipelines of a service together, and names their classes."""
