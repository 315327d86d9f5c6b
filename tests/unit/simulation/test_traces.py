"""Traces are read row by row, and a bad row is named by its line."""

import json
from itertools import islice
from pathlib import Path

import pytest

from gllm_ray.errors import ConfigError
from gllm_ray.simulation.simulated_request import SimulatedRequest
from gllm_ray.simulation.traces import read_trace

TRACES = Path(__file__).parents[4] / "shared" / "data" / "traces"
VIDUR = "arrived_at,num_prefill_tokens,num_decode_tokens\n"
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


@pytest.fixture
def write(tmp_path):
    def write_file(name, text):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write_file


def request(arrival_s, num_prompt_tokens, num_output_tokens, **others):
    return SimulatedRequest(
        arrival_s=arrival_s,
        num_prompt_tokens=num_prompt_tokens,
        num_output_tokens=num_output_tokens,
        **others,
    )


def test_vidurs_columns_are_read_whatever_their_order_and_company(write):
    path = write(
        "a.csv",
        "num_decode_tokens,pd_ratio,arrived_at,num_prefill_tokens\n44,8.5,0.0,374\n\n109,3.6,4.5,396\n",
    )
    assert list(read_trace(path)) == [request(0.0, 374, 44), request(4.5, 396, 109)]


def test_azures_dates_become_seconds_since_the_first(write):
    path = write(
        "a.csv",
        AZURE + "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n",
    )
    first, second = read_trace(path)
    assert first == request(0.0, 374, 44)
    assert second.arrival_s == pytest.approx(4.314579, abs=1e-6)


def test_azures_dates_may_have_a_time_zone_and_a_byte_order_mark(write):
    path = write(
        "a.csv", "\ufeff" + AZURE + "2024-05-10 00:00:00+00:00,3,4\n2024-05-10 00:01:00+00:00,5,6\n"
    )
    assert list(read_trace(path)) == [request(0.0, 3, 4), request(60.0, 5, 6)]


def test_seconds_since_1970_are_counted_from_the_first_request_and_others_are_as_they_are(write):
    rows = "{0},374,44\n{1},300,20\n"
    epoch = write("a.csv", VIDUR + rows.format(1_700_000_000, 1_700_000_002.5))
    assert list(read_trace(epoch)) == [request(0.0, 374, 44), request(2.5, 300, 20)]
    late = write("b.csv", VIDUR + rows.format(90_000, 90_002.5))
    assert [each.arrival_s for each in read_trace(late)] == [90_000, 90_002.5]


def test_jsonl_holds_every_attribute_of_a_request(write):
    requests = [
        request(0.5, 30, 4, prefix_id=7, num_prefix_tokens=20, tenant="a", priority=-1),
        request(1, 3, 4, max_tokens=9, expected_output_tokens=5),
    ]
    rows = [{key: getattr(each, key) for key in each.__slots__} for each in requests]
    path = write("a.jsonl", "\n".join(map(json.dumps, rows)) + "\n")
    assert list(read_trace(path)) == requests


def test_a_trace_without_arrivals_is_good_for_its_lengths(write):
    path = write("a.csv", "num_prefill_tokens,num_decode_tokens\n3,4\n")
    assert list(read_trace(path, has_arrivals=False)) == [request(0.0, 3, 4)]
    with pytest.raises(ConfigError, match=r"a\.csv:2: arrival_s: required"):
        list(read_trace(path))


def test_arrivals_that_are_not_wanted_need_not_ascend(write):
    path = write("a.csv", VIDUR + "5,1,2\n4,3,4\n")
    assert [each.arrival_s for each in read_trace(path, has_arrivals=False)] == [0, 0]


JSON = '{"arrival_s": 0, "num_prompt_tokens": 3, "num_output_tokens": 4'
MALFORMED = [
    (
        "a.csv",
        VIDUR + "0,1,2\n0,x,2\n",
        r":3: num_prompt_tokens='x': must be an integer from 1 to 16777216",
    ),
    ("a.csv", VIDUR + "0,1,2\n0,1.5,2\n", r":3: num_prompt_tokens='1.5': must be an integer"),
    ("a.csv", VIDUR + "0,0,2\n", r":2: num_prompt_tokens=0: must be an integer from 1 to 16777216"),
    ("a.csv", VIDUR + "0,1,\n", r":2: num_output_tokens='': must be an integer >= 1"),
    ("a.csv", VIDUR + "0,1\n", r":2: has 2 cells, not 3"),
    ("a.csv", VIDUR + "0,1,2,3\n", r":2: has 4 cells, not 3"),
    ("a.csv", VIDUR + "-1,1,2\n", r":2: arrival_s=-1\.0: must be a number >= 0"),
    ("a.csv", VIDUR + "nan,1,2\n", r":2: arrival_s=nan: must be"),
    ("a.csv", VIDUR + "2,1,2\n1,1,2\n", r":3: arrival_s=1\.0: must be >= 2\.0, the one before"),
    ("a.csv", AZURE + "yesterday,1,2\n", r":2: arrival_s='yesterday': must be a number"),
    ("a.csv", AZURE + "2023-11-16,1,2\n2023-11-16T00Z,1,2\n", r":3: arrival_s='2023"),
    ("a.csv", "a,b\n1,2\n", r":1: columns \['a', 'b'\]: must include arrived_at, .* or TIMESTAMP"),
    ("a.csv", "", r":1: columns \[\]: must include"),
    ("a.jsonl", JSON + "}\n{\n", r":2: must be JSON: "),
    ("a.jsonl", "3\n", r":1: must be a JSON object"),
    ("a.jsonl", JSON + ', "user": "x"}\n', r":1: user='x': unknown key"),
    ("a.jsonl", '{"num_prompt_tokens": 3, "num_output_tokens": 4}', r":1: arrival_s: required"),
    ("a.jsonl", JSON + ', "num_prefix_tokens": 2}\n', r":1: num_prefix_tokens=2: must be > 0 when"),
    ("a.jsonl", JSON + ', "prefix_id": 2}\n', r":1: num_prefix_tokens=0: must be > 0 when"),
    (
        "a.jsonl",
        JSON + ', "prefix_id": 2, "num_prefix_tokens": 4}\n',
        r":1: num_prefix_tokens=4: must be <= num_prompt_tokens=3",
    ),
]


@pytest.mark.parametrize(("name", "text", "message"), MALFORMED)
def test_a_malformed_row_is_named_by_its_line(write, name, text, message):
    path = write(name, text)
    with pytest.raises(ConfigError, match=message) as error:
        list(read_trace(path))
    assert str(error.value).startswith(str(path))


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.csv: must be a readable text file"):
        list(read_trace(tmp_path / "none.csv"))
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"binary\.csv: must be a readable text file"):
        list(read_trace(tmp_path / "binary.csv"))


def test_rows_before_a_malformed_one_come_first(write):
    path = write("a.csv", VIDUR + "0,1,2\n" * 3 + "broken\n")
    assert len(list(islice(read_trace(path), 3))) == 3


@pytest.mark.skipif(not TRACES.is_dir(), reason="../shared/data/traces is not there")
def test_the_azure_trace_is_read_whole():
    requests = list(read_trace(TRACES / "azure_conv.csv"))
    assert len(requests) == 19_366
    assert requests[-1].arrival_s == pytest.approx(3501.721937)
    assert sum(each.num_prompt_tokens for each in requests) / 19_366 == pytest.approx(1154.7, 1e-4)
