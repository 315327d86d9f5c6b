import math
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gllm_ray.messages import SamplingParams
from gllm_ray.model import sampler
from gllm_ray.model.sampler import race_keys, race_numbers, sample


def random_logits(num_rows, vocab_size, seed=0, std=2.0):
    generator = torch.Generator().manual_seed(seed)
    return std * torch.randn(num_rows, vocab_size, generator=generator)


rules = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 1.0]),
    top_k=st.sampled_from([0, 1, 5, 300, 5000]),
    min_p=st.sampled_from([0.0, 0.05, 0.5]),
    seed=st.integers(-(2**70), 2**70),
)


@given(st.lists(rules, min_size=1, max_size=6), st.sampled_from([40, 700]), st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_a_draw_depends_on_its_own_row_alone(params, vocab_size, seed):
    logits = random_logits(len(params), vocab_size, seed)
    positions = list(range(10, 10 + len(params)))
    together = sample(logits, params, positions)
    alone = [
        sample(logits[row : row + 1], [params[row]], [positions[row]])[0]
        for row in range(len(params))
    ]
    assert list(together) == alone


any_rules = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 5e-324, 1e-45, 1e-40, 1e-6, 1e-5, 1.0, 1e39, math.inf])
    | st.floats(0, 2),
    top_p=st.sampled_from([5e-324, 1e-9, 0.5, 1.0]),
    top_k=st.sampled_from([0, 1, 255, 256, 257, 2**62]),
    min_p=st.sampled_from([0.0, 5e-324, 0.5, 1.0]),
    seed=st.integers(),
)
extremes = [0.0, 1.0, 1e30, -1e30, 3e38, -3e38, 1e-45, math.inf, -math.inf, math.nan]
sparse_rows = st.lists(st.tuples(st.integers(0, 699), st.sampled_from(extremes)), max_size=5)


@given(
    st.lists(any_rules, min_size=1, max_size=3),
    st.sampled_from([1, 40, 700]),
    st.sampled_from([*extremes, "normal"]),
    sparse_rows,
    st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(deadline=None, max_examples=300)
def test_any_logits_and_any_rules_give_a_token_of_the_vocabulary(
    params, vocab_size, background, outliers, dtype
):
    logits = random_logits(len(params), vocab_size)
    if background != "normal":
        logits.fill_(background)
    for token, value in outliers:
        logits[:, token % vocab_size] = value
    logits = logits.to(dtype)
    before = logits.clone()
    tokens = sample(logits, params, range(len(params)))
    assert all(0 <= token < vocab_size for token in tokens)
    assert torch.equal(logits.nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize("temperature", [5e-324, 1e-40, 1e-6, 1e-5])
def test_the_lowest_temperatures_take_the_most_likely(temperature):
    logits = random_logits(3, 700)
    params = [SamplingParams(temperature=temperature, seed=seed) for seed in range(3)]
    assert sample(logits, params, range(3)) == tuple(logits.argmax(dim=-1).tolist())


def test_a_token_whose_logit_is_nan_or_minus_infinity_is_not_drawn():
    logits = torch.zeros(40)
    logits[::2], logits[1::4] = math.nan, -math.inf
    assert set(draw_many(logits, 400, temperature=2.0)) == set(range(3, 40, 4))


@given(st.lists(rules, min_size=1, max_size=6), st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_the_slices_of_rows_change_no_draw(params, seed):
    logits = random_logits(len(params), 700, seed, std=0.1)
    positions = range(len(params))
    whole = sample(logits, params, positions)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler, "_MAX_WORKSPACE", 2 * 700)
        assert sample(logits, params, positions) == whole


@given(rules, st.integers(0, 99), st.floats(0.1, 8), st.booleans())
@settings(deadline=None, max_examples=100)
def test_the_shortlist_of_candidates_changes_no_draw(params, seed, std, has_ties):
    logits = random_logits(4, 700, seed, std)
    logits = logits.round() if has_ties else logits
    shortlisted = sample(logits, [params] * 4, range(4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler, "_NUM_CANDIDATES", 700)
        assert sample(logits, [params] * 4, range(4)) == shortlisted


@given(
    st.lists(st.floats(-4, 4, width=16), min_size=3, max_size=3),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(0, 99),
)
@settings(deadline=None)
def test_greedy_takes_the_first_of_the_largest_whatever_their_type_and_sign(offsets, dtype, seed):
    logits = (random_logits(3, 300, seed) + 2 * torch.tensor(offsets)[:, None]).to(dtype)
    first_largest = [row.index(max(row)) for row in logits.tolist()]
    assert sample(logits, [SamplingParams(temperature=0.0)] * 3, range(3)) == tuple(first_largest)


@given(st.integers(0, 2**64), st.integers(0, 99))
@settings(deadline=None)
def test_temperature_0_and_top_k_1_both_take_the_most_likely(seed, logits_seed):
    logits = random_logits(3, 50, logits_seed)
    best = tuple(logits.argmax(dim=-1).tolist())
    assert sample(logits, [SamplingParams(seed=seed)] * 3, range(3)) == best
    only_one = SamplingParams(temperature=5.0, top_k=1, seed=seed)
    assert sample(logits, [only_one] * 3, range(3)) == best


def draw_many(logits, num_draws, **params):
    """Draws of one row at many positions."""
    params = SamplingParams(seed=3, **params)
    rows = logits.expand(num_draws, -1)
    return sample(rows, [params] * num_draws, range(num_draws))


PROBS = torch.tensor([0.4, 0.25, 0.15, 0.1, 0.06, 0.04])


@pytest.mark.parametrize(
    ("params", "support"),
    [
        ({}, {0, 1, 2, 3, 4, 5}),
        ({"top_k": 3}, {0, 1, 2}),
        ({"top_p": 0.64}, {0, 1}),
        ({"top_p": 0.66}, {0, 1, 2}),
        ({"top_p": 0.01}, {0}),
        ({"min_p": 0.2}, {0, 1, 2, 3}),
        ({"min_p": 1.0}, {0}),
        # top_p counts against the mass that top_k left: 0.4 of 0.65 is 0.615.
        ({"top_k": 2, "top_p": 0.62}, {0, 1}),
        ({"top_k": 2, "top_p": 0.61}, {0}),
        # And against the mass that min_p left: 0.65 of 0.8 is 0.8125.
        ({"min_p": 0.3, "top_p": 0.82}, {0, 1, 2}),
        ({"min_p": 0.3, "top_p": 0.8}, {0, 1}),
        ({"min_p": 0.3, "top_k": 2, "top_p": 0.61}, {0}),
    ],
)
def test_draws_cover_exactly_the_kept_tokens(params, support):
    assert set(draw_many(PROBS.log(), 600, temperature=1.0, **params)) == support


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_draws_follow_the_softmax_of_the_scaled_logits(temperature):
    num_draws = 20_000
    draws = draw_many(PROBS.log(), num_draws, temperature=temperature)
    expected = torch.softmax(PROBS.log() / temperature, dim=-1)
    observed = torch.bincount(torch.tensor(draws), minlength=6) / num_draws
    deviation = (expected * (1 - expected) / num_draws).sqrt()
    assert ((observed - expected).abs() < 4 * deviation).all()


def test_kept_tokens_keep_their_proportions():
    num_draws = 20_000
    draws = draw_many(PROBS.log(), num_draws, temperature=1.0, top_k=2)
    share = draws.count(0) / num_draws
    assert abs(share - 0.4 / 0.65) < 4 * math.sqrt(0.25 / num_draws)


@pytest.mark.parametrize("rule", [{}, {"top_p": 0.9}, {"top_k": 50}, {"min_p": 0.05}])
def test_rounding_of_the_logits_hardly_ever_changes_a_draw(rule):
    num_draws, vocab_size = 2000, 4096
    logits = random_logits(num_draws, vocab_size)
    rounded = logits + 1e-5 * random_logits(num_draws, vocab_size, seed=1, std=1.0)
    params = [SamplingParams(temperature=1.0, seed=3, **rule)] * num_draws
    draws = zip(
        *(sample(rows, params, range(num_draws)) for rows in (logits, rounded)), strict=True
    )
    assert sum(one != other for one, other in draws) <= 1


def test_a_flat_row_wider_than_the_shortlist_reaches_its_last_token():
    draws = draw_many(torch.zeros(400), 8000, temperature=1.0)
    assert set(draws) == set(range(400))


def test_the_memory_of_a_draw_does_not_grow_with_the_rows(monkeypatch):
    vocab_size = 4096
    monkeypatch.setattr(sampler, "_MAX_WORKSPACE", 2 * vocab_size)
    peaks = []
    for num_rows in (2, 64):
        logits, params = torch.zeros(num_rows, vocab_size), [SamplingParams(temperature=2.0)]
        with torch.profiler.profile(profile_memory=True) as profile:
            sample(logits, params * num_rows, range(num_rows))
        changes = [event for event in profile.profiler.kineto_results.events() if event.nbytes()]
        held = accumulate(
            event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns())
        )
        peaks.append(max(held))
    assert peaks[1] < 1.5 * peaks[0]


def all_race_numbers(seeds, positions, num_tokens):
    keys = torch.tensor([race_keys(seed, position) for seed in seeds for position in positions])
    return race_numbers(keys.int(), torch.arange(num_tokens, dtype=torch.int32).unsqueeze(0))


def test_race_numbers_are_exponential_and_change_with_seed_position_and_token():
    numbers = all_race_numbers(range(10), range(10), 1000).double()
    assert len(set(numbers.flatten().tolist())) > 0.99 * numbers.numel()
    buckets = torch.histc((-numbers).exp(), bins=10, min=0, max=1)
    assert ((buckets - 10_000).abs() < 5 * 100).all()
    correlations = torch.corrcoef(numbers) - torch.eye(len(numbers))
    assert correlations.abs().max() < 5 / math.sqrt(1000)


def test_race_numbers_are_those_of_the_hash_of_32_bits():
    def reference(seed, position, token):
        factor, offset = race_keys(seed, position)
        state = (token * factor + offset) % 2**32
        state = (state ^ state >> 16) * 0x7FEB352D % 2**32
        state = (state ^ state >> 15) * 0x846CA68B % 2**32
        state ^= state >> 16
        return (state % 2**31 + 0.5) / 2**31

    uniforms = -torch.expm1(-all_race_numbers([0, 2**63, -1], [0, 8191], 200))
    expected = [
        [reference(seed, position, token) for token in range(200)]
        for seed in (0, 2**63, -1)
        for position in (0, 8191)
    ]
    assert torch.allclose(uniforms, torch.tensor(expected), rtol=1e-6)


def test_no_rows_give_no_tokens():
    assert sample(torch.empty(0, 50), [], []) == ()
