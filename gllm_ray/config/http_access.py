"""What a deployment that answers HTTP asks of its clients and does for them."""

from typing import Annotated

from pydantic import Field

ApiKeyVariable = Annotated[
    str | None,
    Field(
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        json_schema_extra={"allowed": "a variable's name of letters, digits and _, or null"},
        description="Environment variable of the replicas that answer HTTP, with the API keys of "
        "the service, white space between them; whoever shows none gets a 401, save on /health and "
        "/ping. None: none is asked for.",
    ),
]

AllowedOrigins = Annotated[
    tuple[Annotated[str, Field(pattern=r"^(\*|https?://[^/\s*]+)$")], ...],
    Field(
        strict=False,
        json_schema_extra={"allowed": "a list of origins, such as https://chat.example.com, or *"},
        description="Whose web pages may ask from a browser (CORS); *: all. Empty: none may.",
    ),
]

StreamKeepAlive = Annotated[
    float | None,
    Field(
        gt=0,
        description="Seconds of silence after which a stream sends a comment, which clients "
        "ignore, lest something on the way take the connection for dead. Before the first token "
        "it sends the status, too: 200, and what fails then is the last event. null: never.",
    ),
]
