"""The event loop of virtual time: requests come, results come, and schedulers decide."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import inf
from random import Random

from gllm_ray.autoscaling import Autoscaler, DeploymentLoad
from gllm_ray.errors import ConfigError
from gllm_ray.messages import MicroBatch
from gllm_ray.simulation.deployment import Deployment, StageLoss
from gllm_ray.simulation.events import Event, EventKind, EventQueue
from gllm_ray.simulation.ideal import IdealWork
from gllm_ray.simulation.metrics import (
    BatchMetrics,
    PipelineMetrics,
    RequestMetrics,
    Slo,
    StageInterval,
)
from gllm_ray.simulation.replica import FlyingBatch, SimulatedReplica
from gllm_ray.simulation.report import Report, make_report
from gllm_ray.simulation.routing import Router
from gllm_ray.simulation.simulated_request import SimulatedRequest
from gllm_ray.simulation.virtual_pipeline import VirtualPipeline


@dataclass(frozen=True, slots=True)
class SimulationResult:
    """What a simulation gives.

    Attributes:
        report: Its numbers.
        requests: Latencies and counts of all requests.
        intervals: When stages computed, if that was to be kept.
        decisions: The micro-batches of each replica, if they were to be kept.
        replica_spans_s: From when to when each replica ran, by its number.
    """

    report: Report
    requests: RequestMetrics = field(compare=False)
    intervals: list[StageInterval]
    decisions: list[list[MicroBatch]]
    replica_spans_s: list[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class _Result:
    replica: SimulatedReplica
    flying: FlyingBatch


@dataclass(frozen=True, slots=True)
class _Arrival:
    index: int
    request: SimulatedRequest


_MAX_LOOKS = 10_000_000  # of the autoscaler, which take minutes where there is one replica

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
        self._batches = BatchMetrics()
        self._intervals: list[StageInterval] | None = [] if keep_intervals else None
        self._events = EventQueue[_Payload]()
        self._router = Router(deployment.routing, Random(f"{seed} routing"))
        self._ideal = IdealWork(deployment.cost)
        self._replicas: dict[int, SimulatedReplica] = {}  # that have not gone, by their number
        self._serving: list[SimulatedReplica] = []  # or about to
        self._gone = PipelineMetrics(deployment.cost.layout.num_stages)
        self._num_queried_tokens = self._num_hit_tokens = 0  # in prefix caches
        self._spans_s: dict[int, tuple[float, float]] = {}  # of those that have been closed
        self._decisions: list[list[MicroBatch]] | None = [] if keep_decisions else None
        self._num_started = 0
        self._all_ready_s = 0.0  # from when on none of them has still to start
        self._held: list[_Arrival] = []  # no replica is ready
        self._autoscaler = Autoscaler(deployment.scaling) if deployment.scaling else None
        self._num_looks = 0
        self._replica_counts: list[tuple[float, int]] = []
        self._num_requests = 0  # that have come, or come next
        self._is_next_known = True  # else all have come

    def run(self) -> SimulationResult:
        """Let all requests come and end; called once.

        Raises:
            ConfigError: No request came, all were refused as soon as the simulation began, or it
                goes on for too long.
            ValueError: Requests do not come in the order of their arrival.
        """
        deployment = self._deployment
        for _ in range(deployment.num_replicas):
            self._start_replica(0.0)
        self._replica_counts.append((0.0, deployment.num_replicas))
        for loss in deployment.losses:
            self._events.push(loss.time_s, EventKind.STAGE_LOST, loss)
        if deployment.scaling is not None:
            self._events.push(deployment.scaling.interval_s, EventKind.SCALE, None)
        self._expect_arrival(0.0)
        while self._is_next_known or sum(self._requests.num_ended.values()) < self._num_requests:
            self._handle(self._events.pop())
        return self._result()

    def _handle(self, event: Event[_Payload]) -> None:
        now_s = event.time_s
        match event.payload:
            case _Result() as result:
                self._on_result(event, result)
            case _Arrival() as arrival:
                self._expect_arrival(now_s)
                self._route(arrival, now_s)
            case StageLoss() as loss:
                self._on_loss(loss, now_s)
            case SimulatedReplica() as replica:
                self._on_replica_event(event, replica)
            case None:
                self._scale(now_s)

    def _on_result(self, event: Event[_Payload], result: _Result) -> None:
        replica = result.replica
        if result.flying.epoch == replica.epoch and self._is_free(event, replica):
            replica.on_result(result.flying, event.time_s)

    def _on_replica_event(self, event: Event[_Payload], replica: SimulatedReplica) -> None:
        now_s = event.time_s
        if event.kind is EventKind.READY:
            held, self._held = self._held, []
            for arrival in held:
                self._route(arrival, now_s)
        elif event.kind is EventKind.EXPIRY:
            replica.alarm_s = inf
            replica.expire(now_s)
            self._set_alarm(replica)
        elif self._is_free(event, replica):
            replica.is_fill_due = False
            if replica.num_requests:
                replica.fill(now_s)

    def _route(self, arrival: _Arrival, now_s: float) -> None:
        ready = self._serving
        if now_s < self._all_ready_s:
            ready = [replica for replica in ready if replica.ready_s <= now_s]
        if not ready:
            self._held.append(arrival)
            return
        replica = ready[self._router.choose(ready, arrival.request)]
        cost_tokens = self._router.start(replica, arrival.request)
        replica.add(arrival.index, arrival.request, now_s, cost_tokens)
        self._set_alarm(replica)
        self._expect_fill(replica, now_s)

    def _expect_fill(self, replica: SimulatedReplica, now_s: float) -> None:
        if not replica.is_fill_due:
            replica.is_fill_due = True
            self._events.push(now_s, EventKind.SCHEDULE, replica)

    def _set_alarm(self, replica: SimulatedReplica) -> None:
        """Have the replica asked when a request may next expire, if it is not already."""
        deadline_s = replica.next_deadline_s
        if deadline_s is not None and deadline_s < replica.alarm_s:
            replica.alarm_s = deadline_s
            self._events.push(deadline_s, EventKind.EXPIRY, replica)

    def _on_loss(self, loss: StageLoss, now_s: float) -> None:
        replica = self._replicas.get(loss.replica_id)
        if replica is not None and replica.is_running(now_s):
            replica.lose_stage(now_s, loss.recovery_s)
            self._expect_fill(replica, now_s)

    def _is_free(self, event: Event[_Payload], replica: SimulatedReplica) -> bool:
        """Whether the scheduler of a replica can see to an event now; else it comes again."""
        if event.time_s >= replica.busy_until_s:
            return True
        self._events.postpone(event, replica.busy_until_s)
        return False

    def _expect_arrival(self, now_s: float) -> None:
        indexed = next(self._arrivals, None)
        if indexed is None:
            self._is_next_known = False
            return
        index, request = indexed
        if request.arrival_s < now_s:
            raise ValueError(f"request {index} comes at {request.arrival_s} s, after {now_s} s")
        self._num_requests += 1
        self._events.push(request.arrival_s, EventKind.ARRIVAL, _Arrival(index, request))

    def _scale(self, now_s: float) -> None:
        scaling, autoscaler = self._deployment.scaling, self._autoscaler
        assert scaling is not None
        assert autoscaler is not None
        self._num_looks += 1
        if self._num_looks > _MAX_LOOKS:
            raise ConfigError(
                f"autoscaling.interval_s={scaling.interval_s:g}: has passed {_MAX_LOOKS} times by "
                f"{now_s:g} s, and requests are still to come or to end; raise it, or simulate less"
            )
        running = [replica for replica in self._serving if replica.ready_s <= now_s]
        load = DeploymentLoad(
            num_requests=sum(replica.num_requests for replica in running) + len(self._held),
            num_running=len(running),
            num_replicas=len(self._serving),
            signals=[replica.read_signals(now_s) for replica in running],
        )
        wanted = autoscaler.decide(load, now_s)
        if wanted != len(self._serving):
            self._replica_counts.append((now_s, wanted))
        while len(self._serving) < wanted:
            self._start_replica(now_s + scaling.startup_s)
        # The youngest go first; what they hold runs on to its end.
        for replica in self._serving[wanted:]:
            replica.stopped_s = now_s
            self._router.forget(replica)
        del self._serving[wanted:]
        self._let_go(now_s)
        self._events.push(now_s + scaling.interval_s, EventKind.SCALE, None)

    def _let_go(self, now_s: float) -> None:
        """Keep of the replicas that have been stopped and hold nothing what they have measured."""
        gone = [each for each in self._replicas.items() if each[1].has_gone(now_s)]
        for replica_id, replica in gone:
            self._close(replica_id, replica, now_s)
            self._gone.add(replica.metrics)
            del self._replicas[replica_id]

    def _expect_result(
        self, result_s: float, replica: SimulatedReplica, flying: FlyingBatch
    ) -> None:
        self._events.push(result_s, EventKind.RESULT, _Result(replica, flying))

    def _start_replica(self, ready_s: float) -> None:
        deployment, replica_id = self._deployment, self._num_started
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

        replica = SimulatedReplica(
            deployment.make_scheduler(),
            pipeline,
            self._requests,
            self._batches,
            self._ideal,
            self._expect_result,
            ready_s,
        )
        replica.note_end = self._router.end
        if self._decisions is not None:
            replica.decisions = []
            self._decisions.append(replica.decisions)
        self._all_ready_s = max(self._all_ready_s, ready_s)
        self._events.push(ready_s, EventKind.READY, replica)
        self._replicas[replica_id] = replica
        self._num_started += 1
        self._serving.append(replica)

    def _result(self) -> SimulationResult:
        # Who ended the last request is still there.
        replicas = self._replicas
        end_s = max((replica.last_end_s for replica in replicas.values()), default=0.0)
        if not end_s > 0:
            raise ConfigError(
                f"no time passed: of {self._num_requests} requests none was served; give the "
                "workload requests that the deployment can serve"
            )
        for replica_id, replica in replicas.items():
            self._close(replica_id, replica, end_s)
        spans_s = [self._spans_s[replica_id] for replica_id in range(self._num_started)]
        replica_s = sum(stop_s - start_s for start_s, stop_s in spans_s)
        report = make_report(
            self._requests,
            self._batches,
            [self._gone, *(replica.metrics for replica in replicas.values())],
            wall_s=end_s,
            ideal_ratio=self._ideal.time_s / replica_s,
            prefix_hit_ratio=self._num_hit_tokens / (self._num_queried_tokens or 1),
            replica_counts=self._replica_counts,
        )
        return SimulationResult(
            report,
            self._requests,
            self._intervals or [],
            self._decisions or [],
            spans_s,
        )

    def _close(self, replica_id: int, replica: SimulatedReplica, end_s: float) -> None:
        """Take what a replica has counted, and how long it ran."""
        load = replica.load()
        self._num_queried_tokens += load.num_prefix_queried_tokens
        self._num_hit_tokens += load.num_prefix_hit_tokens
        self._spans_s[replica_id] = replica.ready_s, replica.ready_s + replica.close(end_s)
