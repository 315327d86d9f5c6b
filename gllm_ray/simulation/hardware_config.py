"""The options of the simulated hardware: devices, links, hosts, or a measured profile."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Self

from pydantic import ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler, model_validator
from pydantic_core import CoreSchema, core_schema

from gllm_ray.simulation.devices import known_devices
from gllm_ray.simulation.hosts import known_hosts
from gllm_ray.simulation.links import Link, find_link, known_links
from gllm_ray.strict_schema import StrictModel


class _NameOf:
    """Of a text: it names an entry that comes with the package."""

    def __init__(self, known: Callable[[], Mapping[str, Any]]) -> None:
        self._known = known

    def __get_pydantic_core_schema__(
        self,
        source: type[str],
        handler: GetCoreSchemaHandler,
    ) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return handler(schema) | {"allowed": f"one of {', '.join(self._known())}"}

    def _check(self, name: str) -> str:
        if name not in self._known():
            raise ValueError("not known")
        return name


def _describe_link(schema: dict[str, Any]) -> None:
    schema["allowed"] = (
        f"a mapping of latency_s and bandwidth_bytes_s, or one of {', '.join(known_links())}"
    )


class LinkConfig(StrictModel):
    """A link that comes with the package, or one's own."""

    model_config = ConfigDict(json_schema_extra=_describe_link)

    name: Annotated[str, _NameOf(known_links)] | None = Field(
        default=None, description="A link that comes with the package; text is short for it."
    )
    latency_s: float | None = Field(
        default=None, ge=0, description="Of a link without a name: a transfer of no bytes."
    )
    bandwidth_bytes_s: float | None = Field(
        default=None, gt=0, description="Of a link without a name: bytes a second on top."
    )

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, value: object) -> object:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check(self) -> Self:
        for key in ("latency_s", "bandwidth_bytes_s"):
            value = getattr(self, key)
            if self.name is None and value is None:
                raise ValueError(f"{key}=null: must be given for a link without a name")
            if self.name is not None and value is not None:
                raise ValueError(f"{key}={value:g}: must be left out when name is given")
        return self

    def link(self) -> Link:
        """The link."""
        if self.name is not None:
            return find_link(self.name)
        assert self.latency_s is not None
        assert self.bandwidth_bytes_s is not None
        return Link(
            name="own",
            is_calibrated=False,
            provenance="the configuration",
            latency_s=self.latency_s,
            bandwidth_bytes_s=self.bandwidth_bytes_s,
        )


class NodesConfig(StrictModel):
    """How the stages of a replica lie on nodes."""

    num_stages: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(strict=False)] = Field(
        min_length=2, description="Stages on each node, in order."
    )
    link: LinkConfig = Field(description="From a node to the next.")


class HardwareConfig(StrictModel):
    """What the stages run on."""

    device: Annotated[str, _NameOf(known_devices)] | None = Field(
        default=None,
        description="The accelerator; required unless `profile` is a .json, whose memory it is.",
    )
    host: Annotated[str, _NameOf(known_hosts)] = Field(
        default="graphs", description="The process of each stage."
    )
    stage_link: LinkConfig | None = Field(
        default=None,
        description="From a stage to the next on its node; null: transfers take no time.",
    )
    nodes: NodesConfig | None = Field(
        default=None, description="Where the stages lie; null: all on one node."
    )
    tensor_parallel_link: LinkConfig | None = Field(
        default=None,
        description="Between the devices of a stage; required where there are several.",
    )
    profile: str | None = Field(
        default=None,
        min_length=1,
        description="A file of measured times: a .json of stages, or a .csv of whole-model "
        "prefills, which stages share by their layers; null: a roofline.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.nodes is not None and self.stage_link is None:
            raise ValueError("stage_link=null: must be given when nodes is")
        if self.profile is None:
            if self.device is None:
                raise ValueError("device=null: must be given when profile is not")
            return self
        if not self.profile.endswith((".json", ".csv")):
            raise ValueError(f"profile={self.profile!r}: must end in .json or .csv")
        if self.profile.endswith(".csv") and self.device is None:
            raise ValueError("device=null: must be given when profile is a .csv")
        if "host" in self.model_fields_set:
            raise ValueError(f"host={self.host!r}: must be left out when profile is given")
        if self.tensor_parallel_link is not None:
            raise ValueError("tensor_parallel_link={...}: must be left out when profile is given")
        return self
