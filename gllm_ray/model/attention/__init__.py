"""Paged attention behind transformers' attention interface."""
