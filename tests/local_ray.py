"""A Ray, and a Serve, of a process of its own."""

from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray import serve

from gllm_ray.demo.serve_process import free_port


@contextmanager
def local_ray(num_cpus: int) -> Iterator[None]:
    """A cluster of one node, gone afterwards."""
    ray.init(
        address="local",
        num_cpus=num_cpus,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100 * 2**20,
    )
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def started_serve() -> Iterator[str]:
    """Serve on the Ray that runs, and its address."""
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()


@contextmanager
def local_serve(num_cpus: int) -> Iterator[str]:
    """Both, and the address of Serve."""
    with local_ray(num_cpus), started_serve() as base_url:
        yield base_url
