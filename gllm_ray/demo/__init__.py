"""The embedded model: how it was made, and the demonstration that serves it."""
