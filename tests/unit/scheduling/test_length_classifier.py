import json
import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gllm_ray.errors import ConfigError
from gllm_ray.messages import GenerationRequest, SamplingParams
from gllm_ray.scheduling.length_classifier import LengthFeatures, features_of, parse_classifier


def request(prompt=(5, 6, 7), max_tokens=1000, hint=None, temperature=0.0):
    return GenerationRequest(
        request_id="a",
        prompt_token_ids=tuple(prompt),
        max_tokens=max_tokens,
        sampling=SamplingParams(temperature=temperature),
        expected_output_tokens=hint,
    )


def content(**changes):
    """What a file holds: classes of 10, 200 and 5000 tokens, each as likely."""
    values = {
        "format": "gllm_ray.length_classifier.v1",
        "class_lengths": [10.0, 200.0, 5000.0],
        "bias": [0.0, 0.0, 0.0],
        "scalar_weights": [[0.0] * 3 for _ in range(3)],
        "token_weights": [[0.0] * 3 for _ in range(1024)],
    }
    return values | changes


def classifier(**changes):
    return parse_classifier(json.dumps(content(**changes)))


def test_the_hashes_of_the_last_64_tokens_are_the_same_on_every_machine():
    features = features_of(request([9, 1, 2, 151_000, 1] + [0] * 60, 512, temperature=0.7))
    assert features == LengthFeatures(65, 512, True, (0, 135, 241, 632))
    assert features.scalars == (math.log2(65), 9.0, 1.0)


def test_features_tell_neither_the_tokens_before_the_last_64_nor_any_order():
    assert features_of(request([1, 2, *range(64)])) == features_of(
        request([3, 4, *range(63, -1, -1)])
    )


def test_tokens_spread_evenly_over_the_buckets():
    counts = [0] * 1024
    for token in range(128_000):
        (bucket,) = features_of(request([token])).token_buckets
        counts[bucket] += 1
    assert all(120 <= count <= 130 for count in counts)


def test_the_prediction_is_the_expectation_over_the_classes():
    assert classifier().predict(request(max_tokens=1000)) == round((10 + 200 + 1000) / 3)
    assert classifier().predict(request(max_tokens=50)) == round((10 + 50 + 50) / 3)
    assert classifier().predict(request(max_tokens=9000)) == round((10 + 200 + 5000) / 3)
    likely = classifier(bias=[math.log(6), math.log(3), 0.0])
    assert likely.predict(request(max_tokens=1000)) == round(0.6 * 10 + 0.3 * 200 + 0.1 * 1000)


@pytest.mark.parametrize(
    ("index", "change"),
    [(0, {"prompt": [5] * 300}), (1, {"max_tokens": 2000}), (2, {"temperature": 0.5})],
)
def test_each_scalar_has_its_weight(index, change):
    rows = [[0.0] * 3 for _ in range(3)]
    rows[index] = [0.0, 1.0, 0.0]
    weighed = classifier(scalar_weights=rows, bias=[5.0, 0.0, -99.0])
    assert weighed.predict(request(**change)) > weighed.predict(request())


def test_a_token_moves_the_prediction_once_however_often_it_stands_in_the_prompt():
    rows = [[0.0] * 3 for _ in range(1024)]
    (bucket,) = features_of(request([77])).token_buckets
    rows[bucket] = [0.0, 3.0, 0.0]
    weighed = classifier(token_weights=rows)
    assert weighed.predict(request([5, 77])) == weighed.predict(request([77, 5, 77]))
    assert weighed.predict(request([5, 77])) != weighed.predict(request([5, 6]))


def test_a_requests_own_hint_wins_and_observations_change_nothing():
    trained = classifier()
    before = trained.predict(request())
    trained.observe(request(), 1)
    assert trained.predict(request()) == before
    assert trained.predict(request(hint=44)) == 44


WEIGHT = st.floats(-1e6, 1e6)


@settings(deadline=None)
@given(
    st.lists(st.floats(1, 1e300), min_size=3, max_size=3),
    st.lists(WEIGHT, min_size=3, max_size=3),
    st.lists(WEIGHT, min_size=3, max_size=3),
    st.lists(st.integers(0, 200_000), min_size=1, max_size=99),
    st.integers(1, 2**40),
)
def test_a_prediction_is_between_1_and_max_tokens(lengths, bias, weights, prompt, max_tokens):
    extreme = classifier(class_lengths=lengths, bias=bias, scalar_weights=[weights] * 3)
    assert 1 <= extreme.predict(request(prompt, max_tokens, temperature=1.0)) <= max_tokens


def test_a_prediction_takes_less_than_200_microseconds():
    trained = classifier(
        class_lengths=[10.0] * 6,
        bias=[0.0] * 6,
        scalar_weights=[[0.1] * 6] * 3,
        token_weights=[[0.1] * 6] * 1024,
    )
    long = request(range(3, 30_000, 7))
    times_s = []
    for _ in range(200):
        start_s = time.perf_counter()
        trained.predict(long)
        times_s.append(time.perf_counter() - start_s)
    assert min(times_s) < 200e-6


def test_a_file_read_and_written_is_the_same():
    trained = classifier(bias=[0.1, -2.5, 1e-9])
    assert parse_classifier(trained.model_dump_json()) == trained


@pytest.mark.parametrize(
    ("changes", "mistake"),
    [
        (
            {"format": "gllm_ray.length_classifier.v2"},
            "format='gllm_ray.length_classifier.v2': must be gllm_ray.length_classifier.v1",
        ),
        ({"class_lengths": []}, "class_lengths=[]: must be a list, each item a number >= 1"),
        ({"class_lengths": [0.0, 9.0]}, "class_lengths[0]=0.0: must be a number >= 1"),
        ({"bias": [0.0]}, "bias: must be 1 x 3 numbers, as class_lengths has 3"),
        (
            {"bias": [0.0, math.nan, 0.0]},
            "bias[1]=nan: must be finite: a number from -1000000.0 to 1000000.0",
        ),
        ({"scalar_weights": [[0.0] * 3] * 2}, "scalar_weights: must be 3 x 3 numbers"),
        ({"token_weights": [[0.0] * 4] * 1024}, "token_weights: must be 1024 x 3 numbers"),
        ({"weights": 1}, "weights=1: unknown key; did you mean"),
    ],
)
def test_a_malformed_file_is_refused_in_one_line_that_says_what_is_wrong(changes, mistake):
    with pytest.raises(ConfigError) as caught:
        classifier(**changes)
    assert str(caught.value).startswith(mistake)
    assert "\n" not in str(caught.value)


def test_text_that_is_no_json_is_refused():
    with pytest.raises(ConfigError, match="not JSON"):
        parse_classifier("class_lengths: [1]")


def test_a_missing_part_is_named():
    values = content()
    del values["bias"]
    with pytest.raises(ConfigError, match="bias: required, but not given"):
        parse_classifier(json.dumps(values))
