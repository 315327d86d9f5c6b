"""Who may ask: those who know one of the service's keys."""

import os
from collections.abc import Collection
from hashlib import sha256
from hmac import compare_digest

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from gllm_ray.errors import ConfigError
from gllm_ray.serving.errors import HttpError
from gllm_ray.serving.service_api import OPEN_PATHS

_REFUSED = HttpError(
    401,
    "give an API key of this service, as in `Authorization: Bearer KEY`",
    "invalid_request_error",
    "invalid_api_key",
    headers={"WWW-Authenticate": "Bearer"},
)


def read_api_keys(variable: str | None) -> tuple[str, ...]:
    """The keys that an environment variable of this process holds, white space between them.

    Args:
        variable: None: no key is asked for.

    Raises:
        ConfigError: It holds none, or what no HTTP header may have.
    """
    if variable is None:
        return ()
    keys = tuple(os.environ.get(variable, "").split())
    if not keys:
        raise ConfigError(
            f"api_key_env={variable!r}: the replica has no such variable, or it is empty; set it "
            "on every node before Ray starts, or in runtime_env.env_vars of the application"
        )
    if not all(key.isascii() and key.isprintable() for key in keys):
        raise ConfigError(f"api_key_env={variable!r}: has characters that no HTTP header may have")
    return keys


class KeyCheck:
    """ASGI middleware that answers 401, before it reads a body, unless a request shows a key.

    Args:
        app: Serves those that do, and whoever asks for one of `OPEN_PATHS`.
        keys: All that are valid.
    """

    def __init__(self, app: ASGIApp, keys: Collection[str]) -> None:
        self._app = app
        self._digests = [_digest(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http" or self._is_open(scope) or self._shows_key(scope):
            await self._app(scope, receive, send)
            return
        refusal = Response(
            _REFUSED.body(), _REFUSED.status, _REFUSED.headers, media_type="application/json"
        )
        await refusal(scope, receive, send)

    def _is_open(self, scope: Scope) -> bool:
        path: str = scope["path"]
        return path.removeprefix(scope.get("root_path", "")) in OPEN_PATHS

    def _shows_key(self, scope: Scope) -> bool:
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        shown = _digest(key.strip())
        # Each is compared whole, so that the time tells nothing of a key.
        matches = [compare_digest(shown, digest) for digest in self._digests]
        return scheme.lower() == "bearer" and any(matches)


def _digest(key: str) -> bytes:
    return sha256(key.encode("latin-1", "replace")).digest()
