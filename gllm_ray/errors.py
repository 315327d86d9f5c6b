"""Every exception raised on purpose.

```
GllmRayError
├── InvalidRequestError     the client must change the request
├── OverloadedError         the client may retry the same request later
├── ConfigError             the operator must change the configuration or the model files
└── PipelineError           the pipeline broke while it held accepted requests
    ├── SchedulerLostError  the process of the engine died
    ├── StageLostError      a stage process died
    ├── StageTimeoutError   a stage process hangs
    └── StagesFailedError   stages could not do what all of them were asked to
```
A message says what was given, what the limit is, and what to change.
"""


class GllmRayError(Exception):
    """Base of every error that gllm_ray raises on purpose."""


class InvalidRequestError(GllmRayError):
    """A request that can never be served as it stands.

    Attributes:
        param: The request field at fault, in the client's spelling, if there is one.
        code: A stable machine-readable reason, such as `context_length_exceeded`.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code

    def __reduce__(self) -> tuple[object, ...]:
        """Keep `param` and `code` when the error crosses a process border."""
        return (_rebuild_invalid_request, (self.message, self.param, self.code))


def _rebuild_invalid_request(
    message: str, param: str | None, code: str | None
) -> InvalidRequestError:
    return InvalidRequestError(message, param=param, code=code)


class OverloadedError(GllmRayError):
    """The service is full or not ready; the same request may succeed later.

    Attributes:
        retry_after_s: Seconds after which a retry is worth it.
    """

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message, retry_after_s)
        self.message = message
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return self.message


class ConfigError(GllmRayError):
    """A configuration or a checkpoint that cannot be served; nothing was started."""

    def prefixed(self, prefix: str) -> "ConfigError":
        """The same with a prefix before each line, such as the name of the file at fault."""
        return ConfigError("\n".join(f"{prefix}: {line}" for line in str(self).splitlines()))


class PipelineError(GllmRayError):
    """The pipeline cannot go on; every request it held ends with this error.

    Attributes:
        public_message: What a client is told. The error's own text may name hosts and paths.
    """

    public_message = "the pipeline failed while it held the request; send it again"

    def __init__(self, message: str, *, public_message: str | None = None) -> None:
        super().__init__(message)
        if public_message is not None:
            self.public_message = public_message


class SchedulerLostError(PipelineError):
    """The process died that held the engine and its scheduler; the stages may live."""


class StageLostError(PipelineError):
    """A stage process died."""

    public_message = "a stage of the pipeline was lost while it held the request; send it again"


class StageTimeoutError(PipelineError):
    """A stage process hangs: it does not answer, or has made no progress for too long."""

    public_message = "a stage of the pipeline hung while it held the request; send it again"


class StagesFailedError(PipelineError):
    """Stages could not do what all of them were asked to.

    Attributes:
        stage_ids: Those that were the first to fail.
    """

    def __init__(self, message: str, stage_ids: frozenset[int] = frozenset()) -> None:
        super().__init__(message)
        self.stage_ids = stage_ids
