from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gllm_ray.policy_config import TemporalConfig
from gllm_ray.scheduling.load import StepLoad
from gllm_ray.scheduling.policies.temporal import TemporalPolicy
from tests.factories import make_request, make_scheduler, result_of
from tests.unit.scheduling.profiles import (
    L20_LLAMA_13B,
    L20_LLAMA_13B_WITH_CONTEXT,
    L20_QWEN_32B,
    L20_QWEN_32B_WITH_CONTEXT,
    ProfileCost,
)
from tests.unit.scheduling.views import TokenCost, view_of

AT_ONCE = TemporalConfig(min_finished_ratio=0.0)
COSTS = st.sampled_from([TokenCost(), L20_LLAMA_13B, L20_QWEN_32B, L20_LLAMA_13B_WITH_CONTEXT])
LENGTHS = st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 3000)), max_size=40)


def is_prefill(budget):
    return budget.prefill_tokens > 0 and budget.decodes == 0


def is_decode(budget):
    return budget.prefill_tokens == 0 and budget.decodes > 0


def take(budget, contexts):
    """The decodes a budget lets run, of ready ones with these contexts, the next one first."""
    taken, load = [], 0.0
    for context in contexts:
        is_loaded = budget.decode_load is not None and load >= budget.decode_load
        if is_loaded or len(taken) == budget.decodes:
            break
        taken.append(context)
        load += context + budget.decode_weight
    return taken


class DecodePhase:
    """Drives a policy through a decode phase as a scheduler does, decodes taken in turn."""

    def __init__(self, contexts, cost, num_stages=4):
        self.cost, self.num_stages = cost, num_stages
        self.ready, self.in_flight, self.batch_id = deque(contexts), deque(), 0
        self.policy = TemporalPolicy(TemporalConfig())

    def dispatch(self):
        """The contexts of the next micro-batch."""
        flying = [context for batch in self.in_flight for context in batch]
        load = view_of(
            [(context, 5000) for context in [*self.ready, *flying]],
            num_ready=len(self.ready),
            num_blocks=10**7,
            num_stages=self.num_stages,
            cost=self.cost,
            batch_id=self.batch_id,
        )
        batch = take(self.policy.budget(load), self.ready)
        for _ in batch:
            self.ready.popleft()
        if batch:
            self.in_flight.append(batch)
            self.batch_id += 1
        return batch

    def commit(self):
        self.ready.extend(context + 1 for context in self.in_flight.popleft())


# ---- prefill phase


def test_it_begins_with_prefill_alone_and_leaves_the_watermark_free():
    budget = TemporalPolicy(TemporalConfig()).budget(view_of(waiting=[(100, 50)], num_blocks=1001))
    assert (budget.prefill_tokens, budget.decodes, budget.reserved_blocks) == (512, 0, 21)


def test_a_prefill_phase_leaves_ready_decodes_alone_while_a_prompt_waits():
    policy = TemporalPolicy(TemporalConfig())
    for batch_id in range(20):
        live = [(100, 50)] * (4 * batch_id)
        assert is_prefill(policy.budget(view_of(live, [(100, 50)], batch_id=batch_id)))


@pytest.mark.parametrize(
    ("live", "waiting", "why"),
    [
        ([(100, 50)], [], "no prompt waits"),
        ([(160, 2720)] * 5, [(16, 16)], "the live need 900 of 1000 blocks at their peak"),
        ([(8000, 1)], [(7681, 1)], "500 of 1000 blocks are free, the prompt needs 481 and 20 stay"),
    ],
)
def test_a_prefill_phase_ends_where(live, waiting, why):
    assert is_decode(TemporalPolicy(TemporalConfig()).budget(view_of(live, waiting))), why


@pytest.mark.parametrize(
    ("live", "waiting"),
    [
        ([(160, 2704)] * 5, [(16, 16)]),  # 179 blocks each at the peak
        ([(8000, 1)], [(7680, 1)]),  # 480 and the 20 of the watermark are free
    ],
)
def test_a_prefill_phase_goes_on_up_to_its_limits(live, waiting):
    assert is_prefill(TemporalPolicy(TemporalConfig()).budget(view_of(live, waiting)))


def test_a_prompt_partly_prefilled_is_finished_although_no_other_may_begin():
    full = view_of([(160, 2720)] * 5, [(16, 16)], num_prefilling=1)
    budget = TemporalPolicy(TemporalConfig()).budget(full)
    assert is_prefill(budget)
    assert budget.reserved_blocks == full.num_blocks


def test_a_prompt_that_comes_before_the_first_decode_is_prefilled_at_once():
    policy = TemporalPolicy(TemporalConfig())
    in_flight = {"num_decoding": 0, "num_ready": 0, "num_context_tokens": 0}
    in_flight["num_prefills_in_flight"] = 1
    live = [(100, 50)]
    assert policy.budget(view_of(live, batch_id=1, **in_flight)).prefill_tokens == 0
    assert is_prefill(policy.budget(view_of(live, [(100, 50)], batch_id=1, **in_flight)))


def test_with_nothing_live_a_prompt_is_admitted_whatever_its_peak():
    policy = TemporalPolicy(TemporalConfig())
    assert is_prefill(policy.budget(view_of(waiting=[(15_900, 99)])))


@pytest.mark.parametrize("num_live", [1, 31, 32, 100, 1000])
def test_a_prefill_phase_of_equal_sequences_ends_at_the_limit(num_live):
    """Whether or not the forecast is made anew for each micro-batch."""
    policy = TemporalPolicy(TemporalConfig())
    num_blocks = 20 * num_live  # 10 blocks each now, 18 at the peak: the limit, exactly
    for count in range(1, num_live):
        load = view_of([(160, 128)] * count, [(16, 1)], num_blocks=num_blocks, batch_id=count)
        assert is_prefill(policy.budget(load))
    last = view_of([(160, 128)] * num_live, [(16, 1)], num_blocks=num_blocks, batch_id=num_live)
    assert is_decode(policy.budget(last))


# ---- decode phase


@pytest.mark.parametrize("cost", [TokenCost(), L20_LLAMA_13B, L20_LLAMA_13B_WITH_CONTEXT])
def test_10_decodes_on_4_stages_run_as_3_3_2_2(cost):
    phase = DecodePhase([100] * 10, cost)
    assert [len(phase.dispatch()) for _ in range(4)] == [3, 3, 2, 2]


@given(
    num_live=st.integers(1, 500),
    num_stages=st.integers(1, 16),
    context=st.integers(1, 5000),
    cost=st.sampled_from([TokenCost(), L20_LLAMA_13B, L20_LLAMA_13B_WITH_CONTEXT]),
)
def test_equal_decodes_that_are_ready_are_shared_out_evenly(num_live, num_stages, context, cost):
    phase = DecodePhase([context] * num_live, cost, num_stages)
    sizes = [len(phase.dispatch()) for _ in range(min(num_live, num_stages))]
    assert sum(sizes) == num_live
    assert max(sizes) - min(sizes) <= 1


@given(st.lists(st.integers(1, 10_000), min_size=1, max_size=7))
def test_fewer_than_2_decodes_a_stage_are_shared_by_number(contexts):
    phase = DecodePhase(contexts, L20_LLAMA_13B_WITH_CONTEXT)
    sizes = [len(phase.dispatch()) for _ in range(min(4, len(contexts)))]
    assert sum(sizes) == len(contexts)
    assert set(sizes) <= {1, 2}


UNEQUAL = [20 + (37 * index) ** 2 % 900 for index in range(300)]


@pytest.mark.parametrize("contexts", [UNEQUAL, sorted(UNEQUAL), sorted(UNEQUAL, reverse=True)])
@pytest.mark.parametrize("cost", [L20_LLAMA_13B_WITH_CONTEXT, L20_QWEN_32B_WITH_CONTEXT])
def test_decodes_of_unequal_context_fill_micro_batches_of_equal_time(cost, contexts):
    """Within a tenth; with as many decodes in each, sorted contexts would differ by half."""
    phase, times = DecodePhase(contexts, cost), []
    for batch_id in range(80):
        batch = phase.dispatch()
        times.append(cost.stage_time(StepLoad(len(batch), sum(batch))))
        if batch_id >= 3:
            phase.commit()
    settled = times[8:]
    assert max(settled) <= 1.1 * min(settled)


def test_no_decode_waits_for_more_than_two_rounds():
    phase = DecodePhase([10_000 * index for index in range(40)], L20_LLAMA_13B_WITH_CONTEXT)
    last_seen = dict.fromkeys(range(40), 0)
    for batch_id in range(100):
        for context in phase.dispatch():
            assert batch_id - last_seen[context // 10_000] <= 8
            last_seen[context // 10_000] = batch_id
        if batch_id >= 3:
            phase.commit()
    assert min(last_seen.values()) > 90


def test_decodes_whose_prefill_is_in_flight_count_towards_the_share():
    live = [(100, 50)] * 40
    policy = TemporalPolicy(TemporalConfig())
    first = view_of(live, num_decoding=10, num_ready=10, num_context_tokens=1000)
    first.num_prefills_in_flight = 30
    assert policy.budget(first).decodes == 10


def decode_phase(num_live, config=AT_ONCE, **changes):
    """A policy in a decode phase that began with `num_live`, its first batch being batch 0."""
    policy = TemporalPolicy(config)
    assert is_decode(policy.budget(view_of([(180, 50)] * num_live, **changes)))
    return policy


FEW = {"cost": L20_LLAMA_13B, "num_blocks": 10_000}
PROMPT = [(180, 50)]


def test_a_decode_phase_is_asked_to_end_once_in_as_many_micro_batches_as_stages():
    policy = decode_phase(40, **FEW)
    few = [(180, 50)] * 8
    decisions = [policy.budget(view_of(few, PROMPT, batch_id=i, **FEW)) for i in (1, 2, 3, 4)]
    assert [is_prefill(decision) for decision in decisions] == [False, False, False, True]


def test_a_call_that_led_to_no_micro_batch_brings_the_end_no_nearer():
    policy = decode_phase(40, **FEW)
    few = view_of([(180, 50)] * 8, PROMPT, batch_id=3, **FEW)
    assert all(is_decode(policy.budget(few)) for _ in range(10))


@pytest.mark.parametrize(
    ("num_left", "num_preempted", "is_over"),
    [(37, 0, False), (36, 0, True), (30, 7, False), (30, 6, True)],
)
def test_a_decode_phase_lasts_until_a_tenth_of_its_sequences_have_ended(
    num_left, num_preempted, is_over
):
    """Of 40; one that was preempted has not ended."""
    policy = decode_phase(40, TemporalConfig(), num_preemptions=3, **FEW)
    left = view_of([(180, 50)] * num_left, PROMPT, batch_id=4, **FEW)
    left.num_preemptions = 3 + num_preempted
    assert is_prefill(policy.budget(left)) == is_over


@pytest.mark.parametrize(
    ("live", "waiting", "why"),
    [
        ([(180, 50)] * 8, [], "no prompt waits"),
        ([(180, 50)] * 1024, PROMPT, "256 decodes a stage saturate it"),
        ([(180, 20_000)] * 8, PROMPT, "the live need all blocks at their peak"),
        ([(180, 50)] * 8, [(160_000, 1)], "the prompt does not fit"),
    ],
)
def test_a_decode_phase_goes_on_where(live, waiting, why):
    load = {"cost": L20_LLAMA_13B, "num_blocks": 10_000 if len(live) == 8 else 100_000}
    policy = decode_phase(2000, **(load | {"num_blocks": 100_000}))
    assert is_decode(policy.budget(view_of(live, waiting, batch_id=4, **load))), why


def test_a_decode_phase_ends_at_once_where_none_lives():
    policy = decode_phase(40, TemporalConfig(), **FEW)
    assert is_prefill(policy.budget(view_of([], PROMPT, batch_id=1, **FEW)))


def test_a_phase_does_not_end_as_soon_as_it_began():
    """One limit for both ends: right after a change, the same load asks for no other."""
    policy = decode_phase(40, **FEW)
    few = view_of([(180, 50)] * 8, PROMPT, batch_id=4, **FEW)
    assert [is_prefill(policy.budget(few)) for _ in range(3)] == [True] * 3


def test_a_longer_context_of_the_decodes_makes_the_idle_time_shorter():
    """The decode time of the two intensities includes reading the KV cache."""
    policy = TemporalPolicy(AT_ONCE)
    load = view_of(cost=L20_LLAMA_13B_WITH_CONTEXT)
    short, long = (policy._temporal_intensity(load, [180], 341, n) for n in (3_000, 60_000))
    assert 0.7 < short < long < 1


# ---- intensities


def spatial_intensities(cost, saturating_decodes, num_stages):
    policy = TemporalPolicy(TemporalConfig(saturating_decodes=saturating_decodes))
    load = view_of(cost=cost, num_stages=num_stages)
    sizes = range(1, 300 * num_stages, num_stages // 2 + 1)
    return [policy._spatial_intensity(load, size) for size in sizes]


@pytest.mark.parametrize("cost", [TokenCost(), L20_LLAMA_13B, L20_QWEN_32B])
def test_the_spatial_intensity_rises_with_the_decodes_up_to_1(cost):
    """The rate itself falls wherever a tile of rows begins."""
    values = spatial_intensities(cost, 256, 4)
    assert values == sorted(values)
    assert 0 < values[0] < 0.02
    assert values[-1] == 1


@given(
    steps=st.lists(st.tuples(st.integers(1, 64), st.floats(0, 10)), min_size=1, max_size=12),
    floor=st.floats(0.001, 100),
    saturating_decodes=st.integers(1, 300),
    num_stages=st.integers(1, 8),
)
def test_the_spatial_intensity_is_monotone_for_any_stepped_cost(
    steps, floor, saturating_decodes, num_stages
):
    times, size, time = {1: floor}, 1, floor
    for width, rise in steps:
        size, time = size + width, time + rise
        times |= {size: time, size + 1: time * 1.3}
        size += 1
    values = spatial_intensities(ProfileCost(times, num_stages), saturating_decodes, num_stages)
    assert values == sorted(values)
    assert values[0] > 0
    assert values[-1] <= 1


@given(
    cost=COSTS,
    prompts=st.lists(st.integers(1, 40_000), min_size=1, max_size=20),
    num_live=st.integers(1, 5000),
    num_context_tokens=st.integers(0, 10**7),
    num_stages=st.integers(1, 16),
    prefill_tokens=st.integers(1, 4096),
)
def test_the_temporal_intensity_lies_between_1_in_s_and_1(
    cost, prompts, num_live, num_context_tokens, num_stages, prefill_tokens
):
    policy = TemporalPolicy(TemporalConfig(prefill_tokens=prefill_tokens))
    load = view_of(cost=cost, num_stages=num_stages)
    intensity = policy._temporal_intensity(load, prompts, num_live, num_context_tokens)
    assert 1 / num_stages - 1e-9 <= intensity <= 1


def test_before_calibration_small_micro_batches_count_as_of_equal_time():
    policy = TemporalPolicy(AT_ONCE)
    load = view_of(num_stages=4)
    assert policy._spatial_intensity(load, 4 * 64) == 0.25
    assert policy._temporal_intensity(load, [128], 40, 4000) == 1
    assert policy._temporal_intensity(load, [512], 40, 4000) == 1 - 3 * 256 / (4 * 512)


# ---- every load


@st.composite
def streams(draw):
    """Loads as calls of `schedule` might find them, in order; nothing is in flight in any."""
    batch_id, loads = 0, []
    num_blocks = draw(st.integers(200, 20_000))
    for live, waiting in draw(st.lists(st.tuples(LENGTHS, LENGTHS), min_size=1, max_size=8)):
        batch_id += draw(st.integers(0, 6))
        while sum(-(-length // 16) for length, _ in live) > num_blocks:
            live = live[1:]
        fitting = [item for item in waiting if sum(item) <= 16 * num_blocks]
        loads.append({"live": live, "waiting": fitting, "batch_id": batch_id})
        loads[-1] |= {"num_blocks": num_blocks}
    return loads


@given(streams(), st.integers(1, 8), COSTS, st.floats(0, 1))
def test_with_nothing_in_flight_any_work_alive_leads_to_a_micro_batch(
    stream, num_stages, cost, min_finished_ratio
):
    policy = TemporalPolicy(TemporalConfig(min_finished_ratio=min_finished_ratio))
    for load in stream:
        budget = policy.budget(view_of(**load, num_stages=num_stages, cost=cost))
        is_head_admitted = load["waiting"] and (
            not load["live"]
            or -(-load["waiting"][0][0] // 16) + budget.reserved_blocks
            <= view_of(**load).num_free_blocks
        )
        if is_prefill(budget):
            assert is_head_admitted or not load["live"]
        elif load["live"]:
            assert take(budget, [length for length, _ in load["live"]])
        else:
            assert not load["waiting"]


@given(streams(), st.integers(1, 8), COSTS)
def test_the_same_loads_give_the_same_budgets(stream, num_stages, cost):
    policies = [TemporalPolicy(TemporalConfig()) for _ in range(2)]
    for load in stream:
        budgets = [
            policy.budget(view_of(**load, num_stages=num_stages, cost=cost)) for policy in policies
        ]
        assert budgets[0] == budgets[1]
        assert budgets[0].prefill_tokens <= policies[0].max_prefill_tokens


def test_a_large_prompt_that_is_next_by_age_does_not_leave_the_pipeline_idle():
    scheduler = make_scheduler(
        num_stages=4, num_blocks=100, block_size=16, max_model_len=1600, policy=TemporalConfig()
    )
    scheduler.add(make_request("large", num_prompt_tokens=1400, max_tokens=4, priority=1))
    for index in range(40):
        scheduler.add(make_request(str(index), num_prompt_tokens=40, max_tokens=30))
    in_flight, depths = deque(), []
    while not scheduler.is_idle:
        while (batch := scheduler.schedule()) is not None:
            in_flight.append(batch)
        depths.append(len(in_flight))
        scheduler.commit(result_of(in_flight.popleft()))
    assert sum(depths) / len(depths) > 2.5
