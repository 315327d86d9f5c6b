"""An emulator of Google Cloud Storage on the loopback.

It is a process of its own: pyarrow keeps other Python threads waiting while it opens an object.
"""

import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

_START_TIMEOUT_S = 30


@contextmanager
def gcs_server(bucket):
    """Yields the address, where an empty bucket is."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--in-memory", "--host=127.0.0.1", f"--port={port}", f"--default-bucket={bucket}"]
    with subprocess.Popen(
        [sys.executable, "-m", "gcp_storage_emulator", "start", "--quiet", *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            _wait_for(process, f"http://127.0.0.1:{port}")
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()


def _wait_for(process, url):
    deadline_s = time.monotonic() + _START_TIMEOUT_S
    while not _answers(url):
        assert process.poll() is None, "the emulator ended"
        assert time.monotonic() < deadline_s, "the emulator does not answer"
        time.sleep(0.05)


def _answers(url):
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except urllib.error.URLError:
        return False
