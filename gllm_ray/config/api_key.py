"""Where a service has its API keys from."""

from typing import Annotated

from pydantic import Field

ApiKeyVariable = Annotated[
    str | None,
    Field(
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        json_schema_extra={"allowed": "a variable's name of letters, digits and _, or null"},
        description="Environment variable of the replicas that answer HTTP, with the API keys of "
        "the service, white space between them; whoever shows none gets a 401, save on /health. "
        "None: none is asked for.",
    ),
]
