from collections import deque
from dataclasses import replace
from itertools import pairwise
from math import ceil, inf
from operator import le

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gllm_ray.policy_config import BalancedConfig
from gllm_ray.scheduling.cost_model import LinearCostModel, with_chunk
from gllm_ray.scheduling.learnt_cost_model import LearntCostModel
from gllm_ray.scheduling.load import StepLoad
from gllm_ray.scheduling.policies import make_policy
from tests.unit.scheduling.views import view

# A stage of a 32-billion-parameter model on one of four L20, roughly.
COST = LinearCostModel(
    floor_s=4e-3,
    token_s=1.45e-4,
    context_token_s=1e-7,
    attention_pair_s=5e-9,
    tile=128,
)
# One whose floor is so high that large micro-batches pay.
HIGH_FLOOR = replace(COST, floor_s=4e-2)
IDLE = {"num_decoding": 0, "num_ready": 0, "num_context_tokens": 0, "oldest_token_s": None}


def decision(config=BalancedConfig(), **changes):  # noqa: B008
    return make_policy(config).budget(view(**({"cost": COST} | changes)))


class Pipeline:
    """Runs a policy's budgets on sequences in decode and endless prompts, as the scheduler does.

    Every decode goes on for ever, and its context does not grow.
    """

    def __init__(self, contexts, *, cost=COST, num_stages=4, config=BalancedConfig()):  # noqa: B008
        self.policy = make_policy(config)
        self.cost, self.num_stages, self.max_in_flight = cost, num_stages, num_stages
        self.crowding = 1.0
        self.contexts = contexts
        self.ready, self.in_flight = deque(contexts), deque()
        self.num_waiting_tokens = 6 * 256 * num_stages  # of a prompt, or a queue, without end
        self.batch_id = 0

    def step(self):
        """The load of the next micro-batch; those in flight that are in its way come back first."""
        while (budget := self.budget()).decodes + budget.prefill_tokens == 0:
            self.complete()
        decodes, load = [], inf if budget.decode_load is None else budget.decode_load
        while self.ready and len(decodes) < budget.decodes and load > 0:
            decodes.append(self.ready.popleft())
            load -= decodes[-1] + budget.decode_weight
        taken = len(decodes) if budget.is_shared else 0
        chunk = min(max(0, budget.prefill_tokens - taken), self.num_waiting_tokens)
        self.in_flight.append((decodes, len(decodes) + chunk))
        self.batch_id += 1
        return with_chunk(StepLoad(len(decodes), sum(decodes)), 0, chunk)

    def complete(self):
        self.ready += self.in_flight.popleft()[0]

    def budget(self):
        return self.policy.budget(
            view(
                cost=self.cost,
                batch_id=self.batch_id,
                num_stages=self.num_stages,
                num_in_flight=len(self.in_flight),
                num_tokens_in_flight=sum(rows for _, rows in self.in_flight),
                max_in_flight=self.max_in_flight,
                crowding=self.crowding,
                num_decoding=len(self.contexts),
                num_ready=len(self.ready),
                num_context_tokens=sum(self.contexts),
                num_waiting_tokens=self.num_waiting_tokens,
                num_prefills_in_flight=1,
                num_blocks=10**6,
            )
        )

    def steps(self, count):
        return [self.step() for _ in range(count)]


def unequal(count, most):
    return [50 + (7919 * i) % most for i in range(count)]


@pytest.mark.parametrize("num_stages", [1, 2, 4, 8])
@pytest.mark.parametrize("context_token_s", [0.0, 1e-7, 1e-6])
def test_consecutive_micro_batches_take_the_same_time_whatever_the_contexts(
    num_stages, context_token_s
):
    cost = replace(COST, context_token_s=context_token_s)
    pipeline = Pipeline(unequal(24 * num_stages, 3000), cost=cost, num_stages=num_stages)
    pipeline.steps(10 * num_stages)
    times = [cost.stage_time(load) for load in pipeline.steps(10 * num_stages)]
    assert max(times) < 1.1 * min(times)


def test_decodes_alone_are_balanced_by_context_where_their_number_is_not():
    cost = replace(COST, context_token_s=2e-6)
    pipeline = Pipeline([4000] * 24 + [100] * 72, cost=cost)
    pipeline.num_waiting_tokens = 0
    pipeline.steps(40)
    loads = pipeline.steps(40)
    times = [cost.stage_time(load) for load in loads]
    assert max(times) < 1.35 * min(times)  # the longest contexts are 2 of 7 in a micro-batch
    assert max(load.num_decodes for load in loads) > 2 * min(load.num_decodes for load in loads)


@pytest.mark.parametrize("cost", [COST, LearntCostModel()], ids=["calibrated", "uncalibrated"])
@pytest.mark.parametrize("num_decodes", [1, 3, 5, 97])
def test_a_round_takes_every_decode_in_even_shares(num_decodes, cost):
    pipeline = Pipeline([500] * num_decodes, cost=cost)
    pipeline.num_waiting_tokens = 0
    pipeline.steps(40)
    shares = [load.num_decodes for load in pipeline.steps(4)]
    assert sum(shares) == num_decodes
    assert max(shares) - min(shares) <= 1


def test_the_total_lands_on_a_tile_whatever_the_number_of_decodes():
    pipeline = Pipeline(unequal(130, 3000))
    pipeline.steps(40)
    totals = {load.num_tokens for load in pipeline.steps(40)}
    assert totals == {256}
    pipeline = Pipeline(unequal(130, 3000), config=BalancedConfig(token_budget=200))
    pipeline.steps(40)
    assert {load.num_tokens for load in pipeline.steps(40)} == {128}


@pytest.mark.parametrize("floor_s", [0.0, 4e-3, 1e-2, 2e-2, 4e-2])
@pytest.mark.parametrize("token_budget", [512, 2048])
def test_micro_batches_grow_with_the_backlog_until_the_floor_is_a_small_part_of_their_time(
    token_budget, floor_s
):
    cost = replace(COST, floor_s=floor_s, context_token_s=0.0, attention_pair_s=0.0)
    parts = {1: 0.6, 2.5: 0.4, 4: 0.25, 7.5: 1 / 7.5, 20: 0.05, 1000: 0.03}
    most_rows = [
        min(token_budget, max(256, ceil(floor_s / (part * cost.token_s) / 128) * 128))
        for part in parts.values()
    ]
    rows = []
    for num_rounds in parts:
        pipeline = Pipeline([100] * 40, cost=cost, config=BalancedConfig(token_budget=token_budget))
        pipeline.num_waiting_tokens = round(num_rounds * 4 * (most_rows[0] - 10))
        pipeline.steps(80)
        rows.append(max(load.num_tokens for load in pipeline.steps(40)))
    assert rows == sorted(rows)
    assert all(map(le, rows, most_rows))
    assert (*rows[:2], rows[-1]) == (*most_rows[:2], most_rows[-1])


@pytest.mark.parametrize(("crowding", "floor_ratio"), [(1.0, 0.6), (1.2, 0.2)])
def test_rows_are_more_where_each_micro_batch_costs_shared_processors(crowding, floor_ratio):
    cost = replace(COST, floor_s=3e-2, context_token_s=0.0, attention_pair_s=0.0)
    pipeline = Pipeline([100] * 40, cost=cost)
    rows = ceil(cost.floor_s / (floor_ratio * cost.token_s) / 128) * 128
    pipeline.crowding, pipeline.num_waiting_tokens = crowding, 4 * (rows - 10)
    pipeline.steps(80)
    assert max(load.num_tokens for load in pipeline.steps(40)) == rows


def test_one_more_micro_batch_is_in_flight_from_eight_rounds_of_backlog_until_four():
    pipeline = Pipeline([100] * 60)
    pipeline.max_in_flight = 5
    in_flight = {}
    for num_rounds in (7, 9, 5, 3, 7):
        pipeline.num_waiting_tokens = num_rounds * 256 * 4
        pipeline.steps(40)
        in_flight[num_rounds] = len(pipeline.in_flight)
    assert in_flight == {7: 4, 9: 5, 5: 5, 3: 4}


def test_the_decodes_are_spread_over_all_micro_batches_in_flight():
    pipeline = Pipeline([100] * 60)
    pipeline.max_in_flight, pipeline.num_waiting_tokens = 5, 10**6
    pipeline.steps(40)
    assert [load.num_decodes for load in pipeline.steps(10)] == [12] * 10


@pytest.mark.parametrize("max_in_flight", [1, 3, 4])
def test_a_limit_in_flight_holds_before_any_backlog(max_in_flight):
    pipeline = Pipeline([100] * 60)
    pipeline.max_in_flight, pipeline.num_waiting_tokens = max_in_flight, 10**6
    pipeline.steps(40)
    assert len(pipeline.in_flight) == max_in_flight


def long_outputs(*views, config=BalancedConfig()):  # noqa: B008
    policy = make_policy(config)
    return [policy.budget(view(cost=COST, **changes)).long_output for changes in views]


def test_long_outputs_go_first_once_nobody_has_come_for_eight_rounds():
    come = ({"batch_id": 10}, {"batch_id": 41}, {"batch_id": 42}, {"batch_id": 43})
    assert [number < inf for number in long_outputs(*come)] == [False, False, True, True]
    new = ({"batch_id": 10}, {"batch_id": 42, "num_arrivals": 201}, {"batch_id": 73})
    assert [number < inf for number in long_outputs(*new)] == [False, False, False]


def test_an_output_is_long_that_takes_longer_than_the_backlog():
    quiet = {"batch_id": 50, "num_waiting_tokens": 4096}
    held = [{"num_waiting_token_steps": 16_000 * rounds} for rounds in (1000, 500, 3)]
    numbers = long_outputs({"batch_id": 1}, *(quiet | steps for steps in held))
    assert numbers[1:3] == [1400, 700]  # rounds of a full KV cache, of 16,000 tokens
    assert numbers[3] == pytest.approx(1.4 * 4096 / (4 * 256))  # of four full micro-batches


def test_without_overtaking_long_outputs_do_not_go_first_either():
    config = BalancedConfig(overtaking=0)
    assert long_outputs({"batch_id": 1}, {"batch_id": 1000}, config=config) == [inf, inf]


FEW = {"num_decoding": 4, "num_context_tokens": 400}
CROWDED = {"crowding": 1.2, "num_waiting_tokens": 0}


def test_where_stages_share_processors_few_decodes_wait_for_each_other():
    together = decision(**CROWDED, **FEW, num_ready=4)
    assert (together.decodes, together.decode_load) == (4, None)
    assert decision(**CROWDED, **FEW, num_ready=3, num_in_flight=1).decodes == 0


def test_prompts_do_not_wait_for_decodes_that_wait_for_each_other():
    waiting = CROWDED | {"num_waiting_tokens": 256}
    budget = decision(**waiting, **FEW, num_ready=3, num_in_flight=1)
    assert budget.decodes == 0
    assert budget.prefill_tokens >= 64


@pytest.mark.parametrize(
    "changes",
    [
        {"crowding": 1.0},
        {"num_decoding": 400, "num_context_tokens": 400_000},
        {"num_waiting_tokens": 10**6},
        {"cost": LearntCostModel()},
    ],
    ids=["a processor each", "many", "a deep backlog", "not calibrated"],
)
def test_decodes_are_spread_where_to_go_together_would_not_pay(changes):
    budget = decision(**(CROWDED | FEW | {"num_ready": 3, "num_in_flight": 1} | changes))
    assert budget.decodes == 3
    assert budget.decode_load is not None


@pytest.mark.parametrize("tbt_target_s", [0.1, 0.15])
def test_the_stage_times_of_a_round_stay_within_the_tbt_target(tbt_target_s):
    pipeline = Pipeline([100] * 60, config=BalancedConfig(tbt_target_s=tbt_target_s))
    times = [COST.stage_time(load) for load in pipeline.steps(80)]
    assert max(times) <= tbt_target_s / 4 * 1.001
    assert max(times) > tbt_target_s / 4 - 128 * COST.token_s  # to within a tile


def test_without_a_calibrated_model_the_tbt_target_cannot_bind():
    uncalibrated = {"cost": LearntCostModel()}
    bound = decision(BalancedConfig(tbt_target_s=0.001), **uncalibrated)
    assert bound == decision(**uncalibrated)


def test_prefill_does_not_starve_where_decodes_alone_exceed_the_target():
    config = BalancedConfig(tbt_target_s=0.001, min_prefill_tokens=48)
    budget = decision(config, num_decoding=4000, num_ready=1000, num_context_tokens=10**6)
    assert (budget.prefill_tokens, budget.is_shared) == (48, False)


def test_where_few_decodes_are_ready_prefill_fills_up_to_the_same_time():
    policy = make_policy(BalancedConfig(token_budget=4096))
    loads = {"num_waiting_tokens": 2048, "num_decoding": 800, "num_context_tokens": 800 * 500}
    cost = HIGH_FLOOR
    usual = policy.budget(view(cost=cost, **loads, num_ready=200))
    few = policy.budget(view(cost=cost, **loads, num_ready=10, batch_id=1))
    chunks = [usual.prefill_tokens - 200, few.prefill_tokens - 10]
    times = [
        cost.stage_time(with_chunk(StepLoad(n, 500 * n), 0, chunk))
        for n, chunk in zip([200, 10], chunks, strict=True)
    ]
    assert chunks[1] > chunks[0]
    assert times[1] == pytest.approx(times[0], rel=0.15)


def pipelined_time(chunks):
    """Until the last chunk of a prompt has left the last of four stages; each waits for the one
    before it."""
    done = [0.0] * 4
    for i, chunk in enumerate(chunks):
        time_s = COST.stage_time(with_chunk(StepLoad(), sum(chunks[:i]), chunk))
        at = 0.0
        for stage in range(4):
            done[stage] = at = max(at, done[stage]) + time_s
    return done[-1]


@pytest.mark.parametrize("cost", [COST, LearntCostModel()], ids=["calibrated", "uncalibrated"])
@pytest.mark.parametrize("num_tokens", [600, 1024, 2048])
def test_a_lone_prompt_goes_through_an_idle_pipeline_in_few_chunks_of_about_equal_time(
    num_tokens, cost
):
    policy = make_policy(BalancedConfig())
    chunks = []
    while (left := num_tokens - sum(chunks)) > 0:
        budget = policy.budget(
            view(
                **IDLE,
                cost=cost,
                batch_id=len(chunks),
                num_waiting_tokens=left,
                prefill_start=sum(chunks),
                num_prefills_in_flight=min(len(chunks), 4),
                kv_free_ratio=1.0,
            )
        )
        chunks.append(min(left, budget.prefill_tokens))
    assert 4 <= len(chunks) <= 16
    assert pipelined_time(chunks) < 0.8 * pipelined_time([num_tokens])
    assert pipelined_time(chunks) < 0.7 * pipelined_time([32] * (num_tokens // 32))


def test_the_target_moves_by_a_bounded_factor_from_one_micro_batch_to_the_next():
    pipeline = Pipeline([100] * 40, cost=replace(HIGH_FLOOR, tile=1))
    pipeline.num_waiting_tokens = 64
    pipeline.steps(8)
    pipeline.num_waiting_tokens = 10**5
    times = [pipeline.cost.stage_time(load) for load in pipeline.steps(20)]
    assert times[-1] > 3 * times[0]
    for before, after in pairwise(times):
        assert after < before * 4 ** (1 / 4) * 1.02


def test_asking_again_for_the_same_micro_batch_gives_the_same_answer():
    policy = make_policy(BalancedConfig())
    policy.budget(view(cost=COST, num_waiting_tokens=0))
    busy = view(cost=COST, num_waiting_tokens=10**5, batch_id=1)
    assert policy.budget(busy) == policy.budget(busy)


def test_a_full_kv_cache_leaves_prompts_under_way_the_minimum_and_admits_nothing():
    load = {"num_waiting_tokens": 10**5, "num_remaining_tokens": 10**5, "kv_free_ratio": 0.0}
    budget = decision(**load, num_free_blocks=0)
    assert budget.prefill_tokens == 24 + 128 - 24  # what its tile holds anyway
    assert budget.reserved_blocks > 0


def test_prefill_is_not_throttled_while_the_cache_can_take_the_backlog():
    """Where gLLM's term is linear in the free share of the cache."""
    ample, half = (
        decision(num_waiting_tokens=6000, num_blocks=4000, kv_free_ratio=ratio)
        for ratio in (1.0, 0.5)
    )
    assert half.prefill_tokens == ample.prefill_tokens


LOADS = st.builds(
    view,
    cost=st.sampled_from([COST, replace(COST, tile=1), LearntCostModel()]),
    num_waiting_tokens=st.integers(0, 10**6),
    prefill_start=st.integers(0, 10**5),
    num_decoding=st.integers(0, 10**4),
    num_ready=st.integers(0, 10**4),
    num_context_tokens=st.integers(0, 10**7),
    num_prefills_in_flight=st.integers(0, 64),
    num_remaining_tokens=st.integers(0, 10**7),
    num_preemptions=st.integers(0, 100),
    kv_free_ratio=st.floats(0, 1),
    num_stages=st.integers(1, 16),
    batch_id=st.integers(0, 10**4),
)
CONFIGS = st.builds(
    BalancedConfig,
    token_budget=st.integers(32, 4096),
    min_prefill_tokens=st.integers(1, 32),
    tbt_target_s=st.none() | st.floats(0.001, 10),
)


@given(CONFIGS, st.lists(LOADS, min_size=1, max_size=5))
def test_budgets_stay_in_their_bounds_for_any_load_and_options(config, loads):
    policies = [make_policy(config) for _ in range(2)]
    for load in loads:
        budget = policies[0].budget(load)
        assert budget == policies[1].budget(load)
        assert config.min_prefill_tokens <= budget.prefill_tokens
        assert budget.prefill_tokens <= policies[0].max_prefill_tokens
        if budget.is_shared:
            share = min(load.num_ready, -(-load.num_decoding // load.num_stages))
            assert budget.prefill_tokens >= share + config.min_prefill_tokens
        assert budget.decodes == load.num_ready
        assert budget.decode_load >= 1
        assert budget.decode_weight >= 0
