"""Training the classifier of output lengths, and its command."""

import json
import random
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest

from gllm_ray.engine.length_log import LengthRecord, LoggedPredictor
from gllm_ray.errors import ConfigError
from gllm_ray.length_training import MIN_STOPS, read_length_log, train_classifier
from gllm_ray.messages import GenerationRequest
from gllm_ray.scheduling.length_classifier import features_of, parse_classifier
from gllm_ray.scheduling.length_predictor import StatisticsPredictor

ROOT = Path(__file__).parents[2]
BRIEFLY, AT_LENGTH = 4711, 815  # tokens of the prompt that say how long the answer is to be


def make_requests(num_requests, *, max_tokens=1000, seed=0):
    """Requests and their output lengths, about 20 or about 500 by a token of the prompt."""
    rng = random.Random(seed)
    for _ in range(num_requests):
        wish = rng.choice([BRIEFLY, AT_LENGTH])
        prompt = [rng.randrange(32_000) for _ in range(rng.randint(5, 80))]
        prompt[rng.randrange(len(prompt) // 2, len(prompt))] = wish
        request = GenerationRequest(
            request_id="a", prompt_token_ids=tuple(prompt), max_tokens=max_tokens
        )
        length = round(rng.lognormvariate(0, 0.3) * (20 if wish == BRIEFLY else 500))
        yield request, max(1, min(length, max_tokens))


def make_records(num_requests, **options):
    return [record(*pair) for pair in make_requests(num_requests, **options)]


def record(request, length):
    features = features_of(request)._asdict()
    return LengthRecord(
        **features | {"token_buckets": list(features["token_buckets"])},
        num_output_tokens=length,
        finish_reason="length" if length == request.max_tokens else "stop",
    )


def write_log(path, pairs):
    predictor = LoggedPredictor(StatisticsPredictor(), path, 2**30)
    for request, length in pairs:
        predictor.observe(request, length)


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "gllm_ray.cli", "train-lengths", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_what_a_token_of_the_prompt_says_is_learnt_and_beats_the_mean():
    classifier, evaluation = train_classifier(make_records(2000))
    assert evaluation.accuracy > evaluation.frequent_accuracy + 0.1
    assert evaluation.sum_error < 0.6 * evaluation.mean_sum_error
    unseen = [request for request, _ in make_requests(500, seed=1)]
    briefly, at_length = (
        fmean(classifier.predict(r) for r in unseen if wish in r.prompt_token_ids)
        for wish in (BRIEFLY, AT_LENGTH)
    )
    assert briefly < 100
    assert at_length > 400


def test_a_request_that_reaches_max_tokens_is_predicted_to_do_so_and_no_more():
    records = make_records(1500, max_tokens=100) + make_records(1500, max_tokens=1000, seed=1)
    classifier, _ = train_classifier(records)
    cut, briefly, at_length = (
        GenerationRequest(request_id="a", prompt_token_ids=(5, 6, wish), max_tokens=max_tokens)
        for wish, max_tokens in ((AT_LENGTH, 100), (BRIEFLY, 100), (AT_LENGTH, 1000))
    )
    assert 90 <= classifier.predict(cut) <= 100
    assert 15 <= classifier.predict(briefly) <= 50
    assert 400 <= classifier.predict(at_length) <= 650


def test_the_sum_of_held_out_predictions_is_unbiased():
    classifier, _ = train_classifier(make_records(2000))
    unseen = make_records(2000, seed=1)
    predicted = sum(classifier.expected_output_tokens(row.features) for row in unseen)
    assert predicted == pytest.approx(sum(row.num_output_tokens for row in unseen), rel=0.03)


def test_lengths_without_a_pattern_are_reported_as_no_better_than_the_mean():
    rng = random.Random(0)
    rows = [
        row.model_copy(update={"num_output_tokens": rng.randint(1, 600)})
        for row in make_records(1000)
    ]
    _, evaluation = train_classifier(rows)
    assert evaluation.sum_error > 0.8 * evaluation.mean_sum_error
    is_told = "keep `length_predictor: statistics`" in evaluation.table()
    assert is_told == (evaluation.sum_error >= evaluation.mean_sum_error)


def test_the_same_log_and_seed_give_the_same_classifier_and_another_seed_another():
    rows = make_records(400)
    one, again, other = (train_classifier(rows, seed=seed)[0] for seed in (3, 3, 4))
    assert one == again
    assert one != other


@pytest.mark.parametrize("num_classes", [3, 5, 8])
def test_there_are_as_many_ranges_of_length_as_asked_for(num_classes):
    classifier, _ = train_classifier(make_records(1000), num_classes=num_classes)
    *ranges, longest = classifier.class_lengths
    assert len(ranges) == num_classes
    assert ranges == sorted(ranges)
    assert longest >= ranges[-1]


def test_equal_lengths_make_one_range():
    rows = make_records(300, max_tokens=100_000)
    rows = [row.model_copy(update={"num_output_tokens": 7}) for row in rows]
    classifier, _ = train_classifier(rows)
    assert classifier.class_lengths == [7.0, 7.0]


def test_too_few_requests_that_stopped_are_refused_with_how_many_it_takes():
    stops = make_records(MIN_STOPS, max_tokens=100_000)
    train_classifier(stops)
    cut = record(GenerationRequest(request_id="a", prompt_token_ids=(1,), max_tokens=9), 9)
    with pytest.raises(ConfigError, match=f"199 of 699 .* at least {MIN_STOPS}"):
        train_classifier(stops[1:] + [cut] * 500)


def test_what_is_logged_is_read_again(tmp_path):
    pairs = list(make_requests(20))
    write_log(tmp_path / "log", pairs)
    assert read_length_log(tmp_path / "log") == [record(*pair) for pair in pairs]


def test_each_wrong_line_is_named_with_what_is_wrong(tmp_path):
    path = tmp_path / "log"
    good = make_records(1)[0].model_dump()
    wrong = [
        good | {"num_output_tokens": 0},
        good | {"finish_reason": "abort"},
        good | {"token_buckets": [1024]},
        good | {"num_output_tokens": 1001},
        good | {"prompt": [1]},
    ]
    lines = [json.dumps(row) for row in (good, *wrong)]
    path.write_text("\n".join([*lines, lines[0][:40]]))
    with pytest.raises(ConfigError) as caught:
        read_length_log(path)
    mend = "; delete the line, or mend it"
    known = "known keys: " + ", ".join(good)
    assert str(caught.value).splitlines() == [
        f"{path}:2: num_output_tokens=0: must be an integer >= 1{mend}",
        f"{path}:3: finish_reason='abort': must be stop or length{mend}",
        f"{path}:4: token_buckets[0]=1024: must be an integer >= 0 and < 1024{mend}",
        f"{path}:5: num_output_tokens=1001: must be <= max_tokens=1000{mend}",
        f"{path}:6: prompt=[1]: unknown key; {known}{mend}",
        f"{path}:7: not a line of JSON; it may have been cut short{mend}",
    ]


def test_many_wrong_lines_are_counted(tmp_path):
    (tmp_path / "log").write_bytes(b"\xff\n" * 25)
    with pytest.raises(ConfigError) as caught:
        read_length_log(tmp_path / "log")
    *named, last = str(caught.value).splitlines()
    assert len(named) == 10
    assert last == f"{tmp_path / 'log'}: 15 more lines are wrong"


def test_the_command_writes_a_classifier_and_tells_how_good_it_is(tmp_path):
    log, output = tmp_path / "lengths.jsonl", tmp_path / "lengths.json"
    write_log(log, make_requests(1000))
    result = run(log, "--output", output, "--classes", 4, "--seed", 1)
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0] == "800 requests to train on, 200 held out"
    assert lines[-1] == f"wrote {output}"
    expected, evaluation = train_classifier(read_length_log(log), num_classes=4, seed=1)
    assert "\n".join(lines[:-2]) == evaluation.table()
    written = parse_classifier(output.read_text(encoding="utf-8"))
    assert written.class_lengths == expected.class_lengths
    assert written.bias == pytest.approx(expected.bias, abs=0.01)


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "No such file"), ("", "0 of 0 requests"), ("{}", ":1: num_prompt_tokens: required")],
)
def test_the_command_fails_with_the_reason_and_writes_nothing(tmp_path, content, reason):
    log, output = tmp_path / "lengths.jsonl", tmp_path / "lengths.json"
    if content is not None:
        log.write_text(content)
    result = run(log, "--output", output)
    assert result.returncode == 1
    assert reason in result.stderr
    assert "Traceback" not in result.stderr
    assert not output.exists()
