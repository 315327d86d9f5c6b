"""The engine: one event loop between the scheduler and the stages."""
