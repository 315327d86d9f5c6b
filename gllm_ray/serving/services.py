"""What the routes need of the models they serve, and which of them a request is for."""

from collections.abc import AsyncGenerator, Collection, Mapping
from typing import Annotated, Any, Protocol

from fastapi import Depends, Request

from gllm_ray.errors import InvalidRequestError
from gllm_ray.messages import GenerationRequest, TokenEvent
from gllm_ray.model.tokenizer import Tokenizer


class TokenService(Protocol):
    """What a response is made with.

    Attributes:
        tokenizer: The model's.
    """

    tokenizer: Tokenizer

    def generate(self, request: GenerationRequest) -> AsyncGenerator[list[TokenEvent], None]:
        """Run a request; closing the generator early aborts it."""


class GenerationService(TokenService, Protocol):
    """What the routes need of a model's pipelines: the one of a replica, or those of many.

    Attributes:
        model_name: As clients name the model.
        max_model_len: Tokens of prompt and output a sequence may have.
    """

    model_name: str
    max_model_len: int

    async def check_ready(self) -> None:
        """Return if requests can be served now, or soon.

        Raises:
            PipelineError: They cannot.
        """

    async def server_info(self) -> dict[str, Any]:
        """What is served, on which stages, and how busy it is; as JSON has it."""


async def _services(request: Request) -> Mapping[str, GenerationService]:
    services: Mapping[str, GenerationService] = request.app.state.services
    return services


Services = Annotated[Mapping[str, GenerationService], Depends(_services)]


def find_model(model: str | None, known: Collection[str]) -> str:
    """The name of the model that a request is for; one model alone need not be named.

    Raises:
        InvalidRequestError: It is not one of those served, or none of several is named.
    """
    names = ", ".join(map(repr, known))
    if model is None:
        if len(known) > 1:
            raise InvalidRequestError(f"model: is required; this server has {names}", param="model")
        return next(iter(known))
    if model not in known:
        raise InvalidRequestError(
            f"The model {model[:200]!r} does not exist; this server has {names}",
            param="model",
            code="model_not_found",
        )
    return model
