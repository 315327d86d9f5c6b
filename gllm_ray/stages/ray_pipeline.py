"""The pipeline as a chain of Ray actors."""

from gllm_ray.errors import GllmRayError, PipelineError, StageLostError
from gllm_ray.messages import MicroBatch, MicroBatchResult, SampledTokens, StageTime, TokenLogprobs
from gllm_ray.stages.control_plane import ControlPlane, Failed
from gllm_ray.stages.direct_loop import DirectLoop
from gllm_ray.stages.ref_chain import RefChain
from gllm_ray.stages.stage_group import StageGroup, stop_stages


class RayPipeline:
    """Runs micro-batches through the stages of a group.

    Made inside an event loop, and used there alone.

    Args:
        group: Stages that no other `RayPipeline` drives.
    """

    def __init__(self, group: StageGroup) -> None:
        self._group = group
        self._control = open_control_plane(group)
        self._failure: GllmRayError | None = None
        self._broken: frozenset[int] = frozenset()

    def submit(self, batch: MicroBatch) -> None:
        """Tell every stage. A broken pipeline drops the micro-batch; `next_result` says why."""
        if self._failure is None:
            self._control.submit(batch)

    async def next_result(self) -> MicroBatchResult:
        """Wait for the last stage's answer to the oldest micro-batch.

        Raises:
            StageLostError: A stage died; the message says which, and why.
            PipelineError: A step failed, or the pipeline is closed.
        """
        if self._failure is not None:
            raise self._failure.with_traceback(None)
        try:
            batch_id, (sampled, times) = await self._control.next_answer()
        except GllmRayError as error:
            if self._failure is None:
                await self._fail(error)
            raise self._failure from error
        return MicroBatchResult(
            batch_id=batch_id,
            **_read_sampled(*sampled)._asdict(),
            stage_times=tuple(StageTime(*time) for time in times),
        )

    async def close(self) -> None:
        """Kill the stages; what is in flight is lost."""
        if self._failure is None:
            self._failure = PipelineError("the pipeline is closed")
        await stop_stages(self._group.stages)
        await self._control.end()

    async def _fail(self, error: GllmRayError, broken: frozenset[int] = frozenset()) -> None:
        """End every step in flight, and find the stages that broke.

        Args:
            error: What went wrong; the death of a stage is preferred to its consequences.
            broken: The stages at fault, if they are known.
        """
        self._failure, self._broken = error, broken
        failures = await self._control.end()
        if broken or not failures:
            return
        losses = (failed for failed in failures if isinstance(failed.error, StageLostError))
        first: Failed = next(losses, failures[0])
        self._failure, self._broken = first.error, frozenset({first.stage_id})


def open_control_plane(group: StageGroup) -> ControlPlane:
    """Begin to drive connected stages, as they were connected for it."""
    return DirectLoop(group) if group.inboxes else RefChain(group)


def _read_sampled(
    token_ids: list[int],
    logprobs: list[TokenLogprobs | None],
    failures: list[tuple[int, str]],
    prompt_logprobs: list[bytes],
) -> SampledTokens:
    """The last stage's `SampledTokens`, of which messages leave lists alone."""
    return SampledTokens(
        tuple(token_ids),
        tuple(told and _read_logprobs(*told) for told in logprobs),
        tuple((index, reason) for index, reason in failures),
        tuple(prompt_logprobs),
    )


def _read_logprobs(logprob: float, top: list[tuple[int, float]]) -> TokenLogprobs:
    return TokenLogprobs(logprob, tuple((token_id, each) for token_id, each in top))
