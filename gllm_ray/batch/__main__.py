"""Run a file of requests to its end."""

import sys

from gllm_ray.batch.command import main

if __name__ == "__main__":
    sys.exit(main())
