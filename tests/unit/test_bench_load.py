"""Prompts that are synthesised, and requests that are sent in time."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gllm_ray.bench.engine_load import to_generation_request
from gllm_ray.bench.load_generator import send_load
from gllm_ray.bench.prompts import LoadRequest, make_requests, spell
from gllm_ray.errors import ConfigError, OverloadedError
from gllm_ray.model.checkpoint import find_directory
from gllm_ray.simulation.simulated_request import SimulatedRequest


def simulated(num_prompt_tokens=20, **fields):
    return SimulatedRequest(
        arrival_s=0.0, num_prompt_tokens=num_prompt_tokens, num_output_tokens=4, **fields
    )


def sent(num, *, gap_s=0.0):
    return [
        LoadRequest(
            request_id=str(index),
            arrival_s=index * gap_s,
            prompt=(1,),
            num_prompt_tokens=1,
            num_output_tokens=1,
        )
        for index in range(num)
    ]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=5), st.text(max_size=5))
def test_prompts_have_the_lengths_of_the_workload_and_are_the_same_every_time(lengths, seed):
    workload = [simulated(length) for length in lengths]
    requests = make_requests(workload, seed)
    assert [len(request.prompt) for request in requests] == lengths
    assert requests == make_requests(workload, seed)
    assert len({request.request_id for request in requests}) == len(lengths)


def test_prompts_of_another_seed_begin_otherwise():
    workload = [simulated(), simulated(prefix_id=0, num_prefix_tokens=16)]
    requests = [each for seed in "ab" for each in make_requests(workload, seed)]
    assert len({request.prompt[:4] for request in requests}) == 4


def test_prompts_share_their_prefix_and_nothing_else():
    workload = [simulated(prefix_id=prefix_id, num_prefix_tokens=16) for prefix_id in (0, 1, 0)]
    first, other, same = (request.prompt for request in make_requests(workload, "seed"))
    assert first[:16] == same[:16] != other[:16]
    assert first[16:] != same[16:]


def test_token_ids_are_below_the_vocabulary():
    (request,) = make_requests([simulated(500)], "seed", vocab_size=7)
    assert set(request.prompt) == set(range(7))


def test_what_a_client_says_of_an_output_reaches_an_engine():
    (asked,) = make_requests([simulated(expected_output_tokens=3)], "a")
    assert to_generation_request(asked).expected_output_tokens == 3


def test_an_output_that_is_to_end_by_itself_is_refused():
    with pytest.raises(ConfigError, match=r"workload\.max_tokens=9: must be null"):
        make_requests([simulated(max_tokens=9)], "seed")


def test_text_is_as_many_tokens_as_were_drawn():
    tokenizers = pytest.importorskip("tokenizers")
    directory = find_directory("package://gllm_ray/demo/model")
    tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    requests = make_requests([simulated(64)] * 8, "seed", tokenizer=tokenizer)
    lengths = [
        len(tokenizer.encode(request.prompt, add_special_tokens=False)) for request in requests
    ]
    assert all(abs(length - 64) <= 3 for length in lengths)
    assert len({request.prompt for request in requests}) == 8
    assert spell(tokenizer, [300]) == tokenizer.decode([300])


def test_requests_are_sent_when_they_are_due_and_the_load_lasts_until_the_last_has_ended():
    times_s = []

    async def send(request, record):
        times_s.append(asyncio.get_running_loop().time())
        await asyncio.sleep(0.05)
        record.note_message()

    load = asyncio.run(send_load(send, sent(3, gap_s=0.1)))
    for record, time_s in zip(load.records, times_s, strict=True):
        assert record.start_s + record.lag_s == pytest.approx(time_s, abs=0.01)
    starts_s = [record.start_s - load.records[0].start_s for record in load.records]
    assert starts_s == pytest.approx([0.0, 0.1, 0.2])
    assert load.wall_s >= 0.25


def test_no_more_requests_run_at_once_than_allowed_and_those_held_back_count_from_their_start():
    num_running, most = 0, 0

    async def send(request, record):
        nonlocal num_running, most
        num_running += 1
        most = max(most, num_running)
        await asyncio.sleep(0.02)
        num_running -= 1
        record.note_message()

    load = asyncio.run(send_load(send, sent(6), max_concurrency=2))
    assert most == 2
    first_s = load.records[0].start_s
    for turn, record in enumerate(load.records[::2]):
        assert record.start_s - first_s >= 0.9 * 0.02 * turn


def test_a_request_that_is_refused_does_not_end_the_others():
    async def send(request, record):
        await asyncio.sleep(0.01)
        if request.request_id == "1":
            raise OverloadedError("full")
        record.note_message()

    load = asyncio.run(send_load(send, sent(3)))
    assert [record.error for record in load.records] == ["", "full", ""]
