"""Ray Serve-native, pipeline-parallel LLM inference."""

__version__ = "0.1.0"
