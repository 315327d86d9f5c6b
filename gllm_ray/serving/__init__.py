"""The only layer that speaks HTTP: a Serve deployment with OpenAI's routes."""
