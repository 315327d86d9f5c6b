"""The event loop of virtual time: requests come, results come, and schedulers decide."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from random import Random

from gllm_ray.errors import ConfigError
from gllm_ray.messages import MicroBatch, StageTime
from gllm_ray.scheduling import Scheduler
from gllm_ray.simulation.autoscaling import Autoscaler
from gllm_ray.simulation.cost_model import PipelineCost
from gllm_ray.simulation.events import Event, EventKind, EventQueue
from gllm_ray.simulation.ideal import IdealWork
from gllm_ray.simulation.metrics import PipelineMetrics, RequestMetrics, Slo, StageInterval
from gllm_ray.simulation.replica import SimulatedReplica
from gllm_ray.simulation.report import Report, make_report
from gllm_ray.simulation.routing import Router, RoutingName
from gllm_ray.simulation.simulated_request import SimulatedRequest
from gllm_ray.simulation.virtual_pipeline import Timing, VirtualPipeline


@dataclass(frozen=True, slots=True, kw_only=True)
class StageLoss:
    """A stage dies.

    Attributes:
        time_s: When.
        replica_id: Whose stage.
        recovery_s: Seconds until the replica takes requests again.
    """

    time_s: float
    replica_id: int = 0
    recovery_s: float = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """What serves the workload.

    Attributes:
        cost: The time of each stage, the same for all replicas.
        make_scheduler: A new scheduler for each replica.
        timing: Of everything else.
        num_replicas: At the start.
        routing: Which replica a request goes to.
        autoscaler: Changes the number of replicas; None: it stays.
        losses: Stages that die.
    """

    cost: PipelineCost
    make_scheduler: Callable[[], Scheduler]
    timing: Timing = field(default_factory=Timing)
    num_replicas: int = 1
    routing: RoutingName = "power_of_two"
    autoscaler: Autoscaler | None = None
    losses: tuple[StageLoss, ...] = ()


@dataclass(frozen=True, slots=True)
class SimulationResult:
    """What a simulation gives.

    Attributes:
        report: Its numbers.
        requests: Latencies and counts of all requests.
        intervals: When stages computed, if that was to be kept.
        decisions: The micro-batches of each replica, if they were to be kept.
        num_replicas: Most replicas at once.
    """

    report: Report
    requests: RequestMetrics
    intervals: list[StageInterval]
    decisions: list[list[MicroBatch]]
    num_replicas: int


@dataclass(frozen=True, slots=True)
class _Result:
    replica: SimulatedReplica
    epoch: int
    batch: MicroBatch
    times: tuple[StageTime, ...]


@dataclass(frozen=True, slots=True)
class _Arrival:
    index: int
    request: SimulatedRequest
    replica: SimulatedReplica | None = None


_Payload = _Result | _Arrival | SimulatedReplica | StageLoss | None


class Simulation:
    """One run; the same arguments give the same result on any machine.

    Args:
        deployment: What serves.
        workload: Requests in the order of their arrival, taken one by one.
        seed: Of routing and jitter.
        slo: What a good request is.
        keep_intervals: Keep when each stage computed; memory then grows with the run.
        keep_decisions: Keep every micro-batch; memory then grows with the run.
    """

    def __init__(
        self,
        deployment: Deployment,
        workload: Iterable[SimulatedRequest],
        *,
        seed: int = 0,
        slo: Slo | None = None,
        keep_intervals: bool = False,
        keep_decisions: bool = False,
    ) -> None:
        self._deployment = deployment
        self._arrivals = enumerate(workload)
        self._seed = seed
        self._requests = RequestMetrics(slo)
        self._intervals: list[StageInterval] | None = [] if keep_intervals else None
        self._keep_decisions = keep_decisions
        self._events = EventQueue[_Payload]()
        self._router = Router(deployment.routing, Random(f"{seed} routing"))
        self._ideal = IdealWork(deployment.cost)
        self._replicas: list[SimulatedReplica] = []  # every one that ever was
        self._serving: list[SimulatedReplica] = []  # or about to
        self._held: list[_Arrival] = []  # no replica is ready
        self._num_replicas = 0
        self._end_s = 0.0

    def run(self) -> SimulationResult:
        """Let all requests come and end.

        Raises:
            ConfigError: None came that can be served.
        """
        deployment = self._deployment
        for _ in range(deployment.num_replicas):
            self._start_replica(0.0)
        for loss in deployment.losses:
            self._events.push(loss.time_s, EventKind.STAGE_LOST, loss)
        if deployment.autoscaler is not None:
            self._events.push(deployment.autoscaler.interval_s, EventKind.SCALE, None)
        self._expect_arrival()
        while self._events:
            self._handle(self._events.pop())
        return self._result()

    def _handle(self, event: Event[_Payload]) -> None:
        now_s = event.time_s
        match event.payload:
            case _Result() as result:
                if self._is_free(event, result.replica) and result.epoch == result.replica.epoch:
                    self._end_s = now_s
                    result.replica.on_result(result.batch, result.times, now_s)
            case _Arrival() as arrival:
                self._on_arrival(arrival, event)
            case StageLoss() as loss:
                self._on_loss(loss, event)
            case SimulatedReplica() as replica:
                self._on_replica_event(event, replica)
            case None:
                self._scale(now_s)

    def _on_arrival(self, arrival: _Arrival, event: Event[_Payload]) -> None:
        now_s, replica = event.time_s, arrival.replica
        if replica is None:
            self._expect_arrival()
            self._route(arrival, now_s)
        elif self._is_free(event, replica):
            replica.add(arrival.index, arrival.request, now_s)
            self._events.push(now_s, EventKind.SCHEDULE, replica)
            if (deadline_s := replica.next_deadline_s) is not None:
                self._events.push(deadline_s, EventKind.EXPIRY, replica)

    def _route(self, arrival: _Arrival, now_s: float) -> None:
        ready = [replica for replica in self._serving if replica.is_ready]
        if not ready:
            self._held.append(arrival)
            return
        replica = ready[self._router.choose(ready)]
        payload = _Arrival(arrival.index, arrival.request, replica)
        self._events.push(now_s, EventKind.ARRIVAL, payload)

    def _on_replica_event(self, event: Event[_Payload], replica: SimulatedReplica) -> None:
        if event.kind is EventKind.READY:
            replica.recover()
            held, self._held = self._held, []
            for arrival in held:
                self._route(arrival, event.time_s)
        elif self._is_free(event, replica):
            if event.kind is EventKind.EXPIRY:
                replica.expire(event.time_s)
                self._end_s = max(self._end_s, event.time_s)
            else:
                replica.fill(event.time_s)

    def _on_loss(self, loss: StageLoss, event: Event[_Payload]) -> None:
        now_s, replica = event.time_s, self._replicas[loss.replica_id]
        if not self._is_free(event, replica):
            return
        replica.lose_stage(now_s)
        self._end_s = now_s
        self._events.push(now_s + loss.recovery_s, EventKind.READY, replica)

    def _is_free(self, event: Event[_Payload], replica: SimulatedReplica) -> bool:
        """Whether the scheduler of a replica can see to an event now; else it comes again."""
        if event.time_s >= replica.busy_until_s:
            return True
        self._events.push(replica.busy_until_s, event.kind, event.payload)
        return False

    def _expect_arrival(self) -> None:
        indexed = next(self._arrivals, None)
        if indexed is not None:
            index, request = indexed
            self._events.push(request.arrival_s, EventKind.ARRIVAL, _Arrival(index, request))

    def _scale(self, now_s: float) -> None:
        autoscaler = self._deployment.autoscaler
        assert autoscaler is not None
        num_requests = sum(replica.num_requests for replica in self._serving) + len(self._held)
        wanted = autoscaler.num_replicas(num_requests, len(self._serving), now_s)
        while len(self._serving) < wanted:
            self._start_replica(now_s + autoscaler.startup_s, is_ready=False)
        # The youngest go first; what they hold runs on to its end.
        del self._serving[wanted:]
        if self._events or self._held:
            self._events.push(now_s + autoscaler.interval_s, EventKind.SCALE, None)

    def _start_replica(self, ready_s: float, *, is_ready: bool = True) -> None:
        deployment, replica_id = self._deployment, len(self._replicas)
        metrics = PipelineMetrics(deployment.cost.layout.num_stages, ready_s)
        pipeline = VirtualPipeline(
            deployment.cost,
            deployment.timing,
            metrics,
            Random(f"{self._seed} jitter {replica_id}"),
            self._intervals,
            replica_id,
            ready_s,
        )

        def expect_result(result_s: float, batch: MicroBatch, times: tuple[StageTime, ...]) -> None:
            payload = _Result(replica, replica.epoch, batch, times)
            self._events.push(result_s, EventKind.RESULT, payload)

        replica = SimulatedReplica(
            deployment.make_scheduler(),
            pipeline,
            deployment.timing,
            metrics,
            self._requests,
            self._ideal,
            expect_result,
            ready_s,
        )
        replica.decisions = [] if self._keep_decisions else None
        replica.is_ready = is_ready
        if not is_ready:
            self._events.push(ready_s, EventKind.READY, replica)
        self._replicas.append(replica)
        self._serving.append(replica)
        self._num_replicas = max(self._num_replicas, len(self._serving))

    def _result(self) -> SimulationResult:
        if not self._end_s:
            raise ConfigError(
                "no time passed: no request was served; give the workload requests that the "
                "deployment can serve"
            )
        for replica in self._replicas:
            replica.close(max(self._end_s, replica.busy_until_s))
        report = make_report(
            self._requests,
            [replica.metrics for replica in self._replicas],
            wall_s=self._end_s,
            ideal_ratio=self._ideal.time_s / (self._end_s * self._num_replicas),
        )
        decisions = [replica.decisions or [] for replica in self._replicas]
        return SimulationResult(
            report, self._requests, self._intervals or [], decisions, self._num_replicas
        )
