"""The order of what happens in virtual time."""

from itertools import permutations

from gllm_ray.messages import FinishReason
from gllm_ray.scheduling import QueueLimits
from gllm_ray.simulation.deployment import StageLoss
from gllm_ray.simulation.events import EventKind, EventQueue
from tests.unit.simulation.tiny import deployment, request, serial_scheduler, simulate


def pop_all(queue):
    return [queue.pop().payload for _ in range(len(queue))]


def test_at_one_moment_the_kind_decides_whatever_the_order_of_pushing():
    names = [kind.name for kind in sorted(EventKind)]
    assert names == ["RESULT", "STAGE_LOST", "READY", "SCALE", "ARRIVAL", "EXPIRY", "SCHEDULE"]
    for kinds in permutations(EventKind):
        queue = EventQueue()
        for kind in kinds:
            queue.push(1.0, kind, kind)
        assert pop_all(queue) == sorted(EventKind)


def test_time_goes_before_kind_and_equal_events_go_as_they_were_pushed():
    queue = EventQueue()
    queue.push(2.0, EventKind.RESULT, "late")
    for name in ("a", "b", "c"):
        queue.push(1.0, EventKind.SCHEDULE, name)
    assert pop_all(queue) == ["a", "b", "c", "late"]


def test_a_postponed_event_stays_before_those_pushed_after_it():
    queue = EventQueue()
    queue.push(1.0, EventKind.RESULT, "first")
    queue.push(2.0, EventKind.RESULT, "second")
    queue.postpone(queue.pop(), 2.0)
    assert pop_all(queue) == ["first", "second"]


def test_a_result_frees_the_pipeline_before_a_deadline_of_that_moment():
    make = serial_scheduler(1, queue=QueueLimits(timeout_s=0.75))
    report = simulate(deployment(make=make), [request(0.0), request(0.25)]).report
    assert report.num_ended[FinishReason.LENGTH] == 2


def test_a_deadline_comes_before_the_micro_batch_of_its_moment():
    make = serial_scheduler(1, queue=QueueLimits(timeout_s=0.0))
    report = simulate(deployment(make=make), [request(1.0)]).report
    assert report.num_ended[FinishReason.EXPIRED] == 1


def test_a_result_comes_before_the_loss_of_its_moment():
    losses = (StageLoss(time_s=1.0, recovery_s=2.0),)
    report = simulate(deployment(losses=losses), [request(0.0), request(0.0)]).report
    assert report.wall_s == 1.0 + 2.0 + 1.0


def test_a_replica_is_repaired_for_the_request_of_that_moment():
    losses = (StageLoss(time_s=1.0, recovery_s=2.0),)
    report = simulate(deployment(losses=losses), [request(3.0)]).report
    assert report.ttft_s.mean == 1.0


def test_requests_of_one_moment_share_a_micro_batch():
    result = simulate(deployment(), [request(1.0, prompt=4)] * 3, keep_decisions=True)
    assert [len(batch.sequences) for batch in result.decisions[0]] == [3]
