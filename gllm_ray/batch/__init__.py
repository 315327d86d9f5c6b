"""A file of requests, run to its end: `python -m gllm_ray.batch`."""
