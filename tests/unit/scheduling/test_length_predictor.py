import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gllm_ray.messages import GenerationRequest
from gllm_ray.scheduling.length_predictor import HintPredictor, StatisticsPredictor


def request(num_prompt_tokens=100, max_tokens=1000, hint=None):
    return GenerationRequest(
        request_id="a",
        prompt_token_ids=(7,) * num_prompt_tokens,
        max_tokens=max_tokens,
        expected_output_tokens=hint,
    )


def shown(*observations):
    """A predictor that has seen (request, output length, how often)."""
    predictor = StatisticsPredictor()
    for seen, num_output_tokens, times in observations:
        for _ in range(times):
            predictor.observe(seen, num_output_tokens)
    return predictor


@pytest.mark.parametrize("predictor", [HintPredictor(), shown((request(), 500, 99))])
@pytest.mark.parametrize(("hint", "expected"), [(1, 1), (40, 40), (1000, 1000), (5000, 1000)])
def test_a_requests_own_hint_wins_and_is_cut_at_max_tokens(predictor, hint, expected):
    assert predictor.predict(request(hint=hint)) == expected


@pytest.mark.parametrize("hint", [None, 0, -3])
def test_a_request_without_a_hint_or_with_an_impossible_one_has_no_hint(hint):
    assert HintPredictor().predict(request(hint=hint)) is None
    assert shown((request(), 500, 99)).predict(request(hint=hint)) == 500


def test_hints_alone_learn_nothing():
    predictor = HintPredictor()
    for _ in range(100):
        predictor.observe(request(), 10)
    assert predictor.predict(request()) is None


def test_statistics_say_nothing_before_32_requests_have_ended():
    assert shown((request(), 50, 31)).predict(request()) is None
    assert shown((request(), 50, 32)).predict(request()) == 50


def test_a_bimodal_workload_is_learnt_by_prompt_length_and_by_max_tokens():
    rng = random.Random(0)
    predictor = StatisticsPredictor()
    kinds = [(20, 512, 30), (20, 4096, 900), (3000, 512, 300), (3000, 4096, 60)]
    for _ in range(4000):
        num_prompt_tokens, max_tokens, length = rng.choice(kinds)
        predictor.observe(
            request(num_prompt_tokens, max_tokens), round(length * rng.uniform(0.8, 1.2))
        )
    for num_prompt_tokens, max_tokens, length in kinds:
        predicted = predictor.predict(request(num_prompt_tokens, max_tokens))
        assert predicted == pytest.approx(length, rel=0.03)


def test_the_sum_of_predictions_is_that_of_the_lengths_however_they_spread():
    """A median, or any quantile, would be far off for lengths of a long tail."""
    rng = random.Random(0)
    predictor = StatisticsPredictor()
    lengths = [min(4000, round(rng.lognormvariate(4.5, 1))) or 1 for _ in range(1000)]
    for length in lengths[:500]:
        predictor.observe(request(max_tokens=4000), length)
    predicted = 500 * predictor.predict(request(max_tokens=4000))
    assert predicted == pytest.approx(sum(lengths[500:]), rel=0.1)


def test_an_unknown_bucket_takes_those_of_its_prompt_length_then_all():
    predictor = shown((request(100), 50, 40), (request(5000), 650, 80))
    assert predictor.predict(request(100, max_tokens=30_000)) == 50
    assert predictor.predict(request(1, max_tokens=30_000)) == round((50 + 2 * 650) / 3)


def test_where_max_tokens_differs_a_cut_output_does_not_pass_for_a_short_one():
    """At a constant chance of 1/200 to stop, the mean is 200, whatever most outputs are cut at."""
    rng = random.Random(0)
    predictor = StatisticsPredictor()
    for _ in range(5000):
        length = round(rng.expovariate(1 / 200)) or 1
        predictor.observe(request(max_tokens=64), min(length, 64))
    assert predictor.predict(request(max_tokens=64)) == pytest.approx(54, abs=2)
    assert predictor.predict(request(max_tokens=4000)) == pytest.approx(200, rel=0.15)


def test_outputs_that_were_all_cut_tell_nothing_of_a_larger_limit():
    predictor = shown((request(max_tokens=16), 16, 500))
    assert predictor.predict(request(max_tokens=16)) == 16
    assert predictor.predict(request(max_tokens=4000)) is None
    predictor = shown((request(max_tokens=16), 3, 1), (request(max_tokens=16), 16, 400_000))
    assert predictor.predict(request(max_tokens=4000)) in (None, 4000)


def test_a_workload_that_is_gone_is_forgotten():
    predictor = shown((request(), 900, 5000), (request(), 100, 3000))
    assert predictor.predict(request()) == pytest.approx(100, abs=5)


def test_the_same_observations_give_the_same_predictions():
    rng = random.Random(0)
    sizes = [(rng.randint(1, 9999), rng.randint(1, 999)) for _ in range(2000)]
    seen = [(request(*size), rng.randint(1, size[1]), 1) for size in sizes]
    one, other = shown(*seen), shown(*seen)
    asked = [request(*size) for size in sizes]
    assert [one.predict(ask) for ask in asked] == [other.predict(ask) for ask in asked]


def test_memory_is_bounded_whatever_is_observed():
    predictor = StatisticsPredictor()
    for prompt_bits in range(23):
        for limit_bits in range(64):
            predictor.observe(request(2**prompt_bits, 2**limit_bits), 1)
    assert len(predictor._similar) == 20 * 20
    assert len(predictor._same_prompt_length) == 20


SIZES = st.tuples(st.integers(1, 3000), st.integers(1, 10**6))


@settings(deadline=None)
@given(
    st.lists(st.tuples(SIZES, st.floats(0, 1), st.integers(1, 60)), max_size=12),
    SIZES,
    st.none() | st.integers(),
)
def test_a_prediction_is_between_1_and_max_tokens_or_none(observations, size, hint):
    predictor = shown(
        *(
            (request(*seen), max(1, round(share * seen[1])), times)
            for seen, share, times in observations
        )
    )
    for asked in [request(*size, hint=hint), *(request(*seen) for seen, _, _ in observations)]:
        predicted = predictor.predict(asked)
        assert predicted is None or 1 <= predicted <= asked.max_tokens
