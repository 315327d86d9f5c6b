"""Token ids in a body, which the model must have."""

import reprlib
from collections.abc import Collection

from gllm_ray.errors import InvalidRequestError


def check_token_ids(param: str, token_ids: Collection[int], vocab_size: int) -> None:
    """Check that a model has tokens.

    Raises:
        InvalidRequestError: It lacks one, which is named.
    """
    if token_ids:
        for token_id in (min(token_ids), max(token_ids)):
            if not 0 <= token_id < vocab_size:
                raise unknown_token(param, token_id, vocab_size)


def unknown_token(param: str, token: int | str, vocab_size: int) -> InvalidRequestError:
    """The error about a token, as the client spelled it, that a model does not have."""
    return InvalidRequestError(
        f"{param} has {reprlib.repr(token)}, which is no token id of this model; use 0 to "
        f"{vocab_size - 1}",
        param=param,
    )
