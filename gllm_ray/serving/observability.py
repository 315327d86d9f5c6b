"""Where the log of a replica goes."""

import logging


def log_with_serve() -> None:
    """Write this package's log where Serve writes the replica's."""
    own = logging.getLogger("gllm_ray")
    own.handlers = logging.getLogger("ray.serve").handlers
    own.setLevel(logging.INFO)
    own.propagate = False
