"""The log of output lengths, and the predictor that a configuration names."""

import json
import logging
from pathlib import Path

import pytest

from gllm_ray.assembly.engines import build_length_predictor
from gllm_ray.config import SchedulerConfig
from gllm_ray.engine.length_log import LoggedPredictor
from gllm_ray.errors import ConfigError
from gllm_ray.messages import GenerationRequest, SamplingParams
from gllm_ray.predictor_config import ClassifierPredictorConfig, HintPredictorConfig
from gllm_ray.scheduling.length_classifier import features_of
from gllm_ray.scheduling.length_predictor import HintPredictor, StatisticsPredictor

REQUEST = GenerationRequest(
    request_id="secret",
    prompt_token_ids=(70_001, 70_002, 70_003),
    max_tokens=20,
    sampling=SamplingParams(temperature=0.5),
)
MANY_BYTES = 2**20
FULL_DISK = Path("/dev/full")


def test_each_request_that_ended_is_a_line_of_features_without_its_prompt(tmp_path):
    predictor = LoggedPredictor(HintPredictor(), tmp_path / "log", MANY_BYTES)
    predictor.observe(REQUEST, 7)
    predictor.observe(REQUEST, 20)
    text = (tmp_path / "log").read_text()
    assert "70" not in text.replace(json.dumps(features_of(REQUEST).token_buckets), "")
    features = {
        "num_prompt_tokens": 3,
        "max_tokens": 20,
        "is_sampled": True,
        "token_buckets": list(features_of(REQUEST).token_buckets),
    }
    assert [json.loads(line) for line in text.splitlines()] == [
        features | {"num_output_tokens": 7, "finish_reason": "stop"},
        features | {"num_output_tokens": 20, "finish_reason": "length"},
    ]


def test_a_log_goes_on_where_it_was(tmp_path):
    for _ in range(3):
        LoggedPredictor(HintPredictor(), tmp_path / "log", MANY_BYTES).observe(REQUEST, 7)
    assert (tmp_path / "log").read_text().count("\n") == 3


def test_logging_changes_no_prediction(tmp_path):
    plain = StatisticsPredictor()
    logged = LoggedPredictor(StatisticsPredictor(), tmp_path / "log", MANY_BYTES)
    for length in range(1, 40):
        plain.observe(REQUEST, length % 20 + 1)
        logged.observe(REQUEST, length % 20 + 1)
        assert logged.predict(REQUEST) == plain.predict(REQUEST)
    assert plain.predict(REQUEST) is not None


def test_a_full_log_ends_with_a_whole_line_and_one_warning_and_stays_full(tmp_path, caplog):
    path = tmp_path / "log"
    for _ in range(2):
        caplog.clear()
        predictor = LoggedPredictor(HintPredictor(), path, 500)
        for _ in range(20):
            predictor.observe(REQUEST, 7)
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert "500 bytes" in record.message
        lines = path.read_text().splitlines(keepends=True)
        assert sum(map(len, lines)) <= 500 < sum(map(len, lines)) + len(lines[0])
        assert all(line.endswith("}\n") for line in lines)


@pytest.mark.parametrize("name", ["missing/log", "."])
def test_a_log_that_cannot_be_opened_is_one_warning_and_learning_goes_on(tmp_path, caplog, name):
    predictor = LoggedPredictor(StatisticsPredictor(), tmp_path / name, MANY_BYTES)
    for _ in range(40):
        predictor.observe(REQUEST, 7)
    assert predictor.predict(REQUEST) == 7
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


@pytest.mark.skipif(not FULL_DISK.exists(), reason="the system has no such device")
def test_a_full_disk_is_one_warning_and_learning_goes_on(caplog):
    predictor = LoggedPredictor(StatisticsPredictor(), FULL_DISK, MANY_BYTES)
    for _ in range(40):
        predictor.observe(REQUEST, 7)
    assert predictor.predict(REQUEST) == 7
    (record,) = caplog.records
    assert "No space left" in record.message


def write_classifier(path):
    path.write_text(
        json.dumps(
            {
                "format": "gllm_ray.length_classifier.v1",
                "class_lengths": [9.0, 100.0],
                "bias": [99.0, 0.0],
                "scalar_weights": [[0.0] * 2] * 3,
                "token_weights": [[0.0] * 2] * 1024,
            }
        )
    )


def test_a_configuration_gives_the_predictor_it_names(tmp_path):
    path = tmp_path / "lengths.json"
    write_classifier(path)
    build = build_length_predictor
    assert isinstance(build(SchedulerConfig()), StatisticsPredictor)
    hint = HintPredictorConfig()
    assert isinstance(build(SchedulerConfig(length_predictor=hint)), HintPredictor)
    trained = ClassifierPredictorConfig(path=str(path))
    assert build(SchedulerConfig(length_predictor=trained)).predict(REQUEST) == 9


def test_a_configured_log_is_written_up_to_its_size(tmp_path):
    path = tmp_path / "log"
    config = SchedulerConfig(length_log=str(path), length_log_max_bytes=300)
    predictor = build_length_predictor(config)
    for _ in range(9):
        predictor.observe(REQUEST, 7)
    assert path.read_text().count("\n") == 2


@pytest.mark.parametrize(
    ("text", "reason"),
    [(None, "No such file"), ("{", "not JSON"), ("{}", "bias: required"), ("\xff", "can't decode")],
)
def test_a_classifier_that_cannot_be_read_names_key_path_and_reason(tmp_path, text, reason):
    path = tmp_path / "lengths.json"
    if text is not None:
        path.write_text(text, encoding="latin-1")
    config = SchedulerConfig(length_predictor=ClassifierPredictorConfig(path=str(path)))
    with pytest.raises(
        ConfigError, match=r"scheduler\.length_predictor\.path=.*lengths\.json"
    ) as e:
        build_length_predictor(config)
    assert reason in str(e.value)
