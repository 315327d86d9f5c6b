"""`gllm-ray chat`: a conversation with a service that runs, or one question."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError

from gllm_ray.batch.api_key import API_KEY_VARIABLE, key_headers
from gllm_ray.batch.params import parse_params
from gllm_ray.chat.stream import ChatTiming, ServiceError, get_json, reason_of, stream_chat
from gllm_ray.errors import ConfigError

_DEFAULT_URL = "http://127.0.0.1:8000"
_CLEAR = "/clear"
_OURS = ("messages", "n", "stream", "stream_options")  # of the body


def add_chat_parser(commands: Any) -> None:  # noqa: ANN401 - argparse does not name its type
    """Add the command to those of `gllm-ray`."""
    parser = commands.add_parser(
        "chat",
        help="talk to a service that runs",
        description="Talk to a service that runs: ask what MESSAGE or the standard input says, or "
        f"on a terminal go on asking. Ctrl-C stops an answer, {_CLEAR} begins anew, Ctrl-D ends.",
    )
    parser.add_argument("message", nargs="?", metavar="MESSAGE", help="the only question")
    parser.add_argument(
        "--url", default=_DEFAULT_URL, help=f"the service's address (default: {_DEFAULT_URL})"
    )
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    parser.add_argument(
        "--params", default="{}", help='more of the body, as JSON: {"max_tokens": 64, "seed": 1}'
    )
    parser.add_argument(
        "--api-key-env",
        metavar="NAME",
        help="the environment variable that has the service's API key "
        f"(default: {API_KEY_VARIABLE}, if it is set)",
    )
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    try:
        conversation = _begin(options)
    except (ConfigError, ServiceError) as error:
        print(error, file=sys.stderr)
        return 1
    if options.message is not None:
        return 0 if conversation.ask(options.message) else 1
    if not sys.stdin.isatty():
        return 0 if conversation.ask(sys.stdin.read()) else 1
    print(f"{conversation.model}; Ctrl-C stops an answer, {_CLEAR} begins anew, Ctrl-D ends")
    for question in _questions():
        if question == _CLEAR:
            conversation.clear()
        else:
            conversation.ask(question)
    return 0


def _begin(options: argparse.Namespace) -> "_Conversation":
    params, headers = parse_params(options.params, ours=_OURS), key_headers(options.api_key_env)
    if not options.url.startswith(("http://", "https://")):
        raise ConfigError(f"--url={options.url}: must be an address as http://host:port")
    # As OpenAI's client is given it, or as other commands are.
    url = options.url.rstrip("/").removesuffix("/v1")
    try:
        model = get_json(f"{url}/v1/models", headers=headers)["data"][0]["id"]
    except HTTPError as error:
        raise ServiceError(f"{url}: {reason_of(error)}") from error
    except OSError as error:
        reason = error.reason if isinstance(error, URLError) else error
        raise ServiceError(
            f"{url}: {reason}; `gllm-ray serve FILE` starts a service, --url names another"
        ) from error
    except (HTTPException, ValueError, LookupError, TypeError, AssertionError) as error:
        raise ServiceError(f"{url}: is no service's address, as {_DEFAULT_URL} may be") from error
    return _Conversation(url, headers, {"model": model, **params}, options.system)


def _questions() -> Iterator[str]:
    with suppress(ImportError):
        import readline  # noqa: F401 - gives `input` a line that can be edited, and a history
    while True:
        try:
            question = input("\n> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if question:
            yield question


@dataclass
class _Conversation:
    """A service, and what was said so far."""

    url: str
    headers: dict[str, str]
    params: dict[str, Any]
    system: str | None
    _messages: list[dict[str, str]] = field(init=False)

    def __post_init__(self) -> None:
        self.clear()

    @property
    def model(self) -> str:
        """Whom the questions go to."""
        return str(self.params["model"])

    def clear(self) -> None:
        """Forget what was said."""
        self._messages = [] if self.system is None else [{"role": "system", "content": self.system}]

    def ask(self, question: str) -> bool:
        """Print the answer as it comes; returns whether there was one, which is remembered."""
        messages = [*self._messages, {"role": "user", "content": question}]
        try:
            answer = self._print_answer(messages)
        except BrokenPipeError:  # who read the answer has left, and not the service
            raise
        except (ServiceError, OSError) as error:
            print(error, file=sys.stderr)
            return False
        self._messages = [*messages, {"role": "assistant", "content": answer}]
        return True

    def _print_answer(self, messages: list[dict[str, str]]) -> str:
        answer = ""
        body = {**self.params, "messages": messages}
        with closing(stream_chat(self.url, body, self.headers)) as pieces:
            try:
                for piece in pieces:
                    if isinstance(piece, ChatTiming):
                        _print_timing(piece)
                    else:
                        answer += piece
                        print(piece, end="", flush=True)
            except KeyboardInterrupt:
                if not sys.stdin.isatty():
                    raise
                print(" (stopped)")
            except (ServiceError, OSError):
                if answer:
                    print()
                raise
        return answer


def _print_timing(timing: ChatTiming) -> None:
    print()
    if sys.stderr.isatty():
        speed = f"TTFT {timing.ttft_s * 1e3:.0f} ms, {timing.tokens_per_s:.0f} tokens/s"
        print(f"\033[2m{speed}\033[0m", file=sys.stderr)
