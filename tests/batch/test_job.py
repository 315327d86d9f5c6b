"""The job on a real engine: what is refused, what fails by row, what resumes."""

import asyncio
import itertools
import json
from contextlib import asynccontextmanager

import pytest

from gllm_ray.batch.answers import EngineAnswers
from gllm_ray.batch.journal import Journal
from gllm_ray.batch.records import BatchRow
from gllm_ray.batch.requests import RequestChecks
from gllm_ray.engine.client import EngineClient
from gllm_ray.engine.engine import Engine
from gllm_ray.errors import ConfigError, InvalidRequestError, PipelineError
from gllm_ray.model.tokenizer import Tokenizer
from tests.batch.local_job import (
    MAX_MODEL_LEN,
    MODEL,
    make_line,
    read_lines,
    run_job,
    write_lines,
)
from tests.chat_templates import QWEN, copy_demo
from tests.factories import make_scheduler
from tests.fakes import ScriptedPipeline


def run(source, output, tokenizer, **options):
    return asyncio.run(run_job(source, str(output), tokenizer, **options))


def test_every_mistake_of_a_file_is_listed_and_no_row_is_run(tmp_path, tokenizer):
    lines = [
        make_line("good"),
        make_line("good"),
        {**make_line("method"), "method": "GET"},
        {**make_line("url"), "url": "/v1/embeddings"},
        make_line("model", model="gpt"),
        make_line("key", max_token=3),
        make_line("unsupported", length_penalty=2),
        make_line("long", max_tokens=MAX_MODEL_LEN),
        make_line("stream", stream=True),
        {**make_line("prompt"), "url": "/v1/completions"},
        {key: value for key, value in make_line("body").items() if key != "body"},
    ]
    source = write_lines(tmp_path / "in.jsonl", lines)
    with source.open("a") as file:
        file.write('\n{"custom_id"\n')
    with pytest.raises(ConfigError) as caught:
        run(source, tmp_path / "out.jsonl", tokenizer)
    *mistakes, summary = str(caught.value).splitlines()
    words = {
        2: "custom_id='good'",
        3: "method: must be 'POST', not 'GET'",
        4: "url: must be",
        5: "The model 'gpt' does not exist",
        6: "max_token=3: is not a known parameter",
        7: "length_penalty=2: is not supported; leave it out",
        8: "maximum context length is 256",
        9: "stream=True",
        10: "prompt: is required",
        11: "body: is required",
        13: "is not valid JSON",
    }
    assert len(mistakes) == len(words)
    for mistake, (number, word) in zip(mistakes, words.items(), strict=True):
        assert mistake.startswith(f"in.jsonl:{number}: ")
        assert word in mistake
    assert summary.startswith("11 mistakes")
    assert not (tmp_path / "out.jsonl.manifest.json").exists()
    assert not (tmp_path / "out.jsonl.part").read_bytes()


def test_a_row_that_fails_goes_to_the_file_of_errors_and_may_be_retried(tmp_path, tokenizer):
    lines = [make_line("a"), make_line("long", max_tokens=MAX_MODEL_LEN), make_line("b")]
    source = write_lines(tmp_path / "in.jsonl", lines)
    output, errors = tmp_path / "out.jsonl", tmp_path / "out.errors.jsonl"
    # Without a tokenizer, as with --url, the length of a prompt is not known before.
    checks = RequestChecks(model_name=MODEL, builder=None)
    for options in ({}, {}, {"retry_errors": True}):
        journal = tmp_path / "out.jsonl.part"
        num_records = len(read_lines(journal)) if journal.exists() else 0
        result = run(source, output, tokenizer, checks=checks, **options)
        assert (result.num_rows, result.num_failed) == (3, 1)
        assert [record["custom_id"] for record in read_lines(output)] == ["a", "b"]
        (record,) = read_lines(errors)
        assert record["custom_id"] == "long"
        assert record["response"]["status_code"] == 400
        assert record["error"]["code"] == "context_length_exceeded"
        expected = num_records + (1 if options else 0 if num_records else 3)
        assert len(read_lines(journal)) == expected


def test_a_changed_input_or_setting_refuses_to_resume(tmp_path, tokenizer):
    source = write_lines(tmp_path / "in.jsonl", [make_line("a")])
    output = tmp_path / "out.jsonl"
    run(source, output, tokenizer, identity={"input_sha256": "1", "model": {"dtype": "float32"}})
    before = output.read_bytes()
    changed = {"input_sha256": "1", "model": {"dtype": "bfloat16"}}
    with pytest.raises(ConfigError) as caught:
        run(source, output, tokenizer, identity=changed)
    assert "model changed: was {'dtype': 'float32'}, is {'dtype': 'bfloat16'}" in str(caught.value)
    write_lines(source, [make_line("a"), make_line("b")])
    with pytest.raises(ConfigError, match="input_sha256 changed"):
        run(source, output, tokenizer)
    assert output.read_bytes() == before


def test_an_output_of_something_else_is_not_overwritten(tmp_path, tokenizer):
    source = write_lines(tmp_path / "in.jsonl", [make_line("a")])
    output = tmp_path / "out.jsonl"
    output.write_text("precious")
    with pytest.raises(ConfigError, match="no manifest says"):
        run(source, output, tokenizer)
    assert output.read_text() == "precious"
    output.unlink()
    run(source, output, tokenizer)
    (tmp_path / "out.jsonl.manifest.json").unlink()
    output.unlink()
    with pytest.raises(ConfigError, match="no manifest says"):
        run(source, output, tokenizer)


def test_a_row_may_ask_for_json_and_log_probabilities(tmp_path, tokenizer):
    schema = {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 2, "maxItems": 2}
    wanted = {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}
    asked = {"max_tokens": 40, "response_format": wanted, "logprobs": True, "top_logprobs": 1}
    source = write_lines(tmp_path / "in.jsonl", [make_line(name, **asked) for name in "ab"])
    run(source, tmp_path / "out.jsonl", tokenizer)
    for answer in read_lines(tmp_path / "out.jsonl"):
        body = answer["response"]["body"]
        (choice,) = body["choices"]
        assert set(json.loads(choice["message"]["content"])) <= {"a", "b"}
        assert len(choice["logprobs"]["content"]) == body["usage"]["completion_tokens"]
    wanted["json_schema"]["schema"] = {"type": "no"}
    source = write_lines(tmp_path / "bad.jsonl", [make_line("a", **asked)])
    with pytest.raises(ConfigError, match=r"bad\.jsonl:1: .*Invalid type: no"):
        run(source, tmp_path / "bad.out.jsonl", tokenizer)


def test_a_row_may_ask_what_the_model_finds_of_its_prompt(tmp_path, tokenizer):
    text = "def add(a, b):"
    num_tokens = len(tokenizer.encode(text))
    body = {"model": MODEL, "prompt": text, "echo": True, "max_tokens": 0, "logprobs": 1}
    echo = {**make_line("echo"), "url": "/v1/completions", "body": body}
    source = write_lines(tmp_path / "in.jsonl", [echo, make_line("chat", prompt_logprobs=1)])
    run(source, tmp_path / "out.jsonl", tokenizer)
    records = read_lines(tmp_path / "out.jsonl")
    echoed, chat = (record["response"]["body"] for record in records)
    (choice,) = echoed["choices"]
    assert choice["text"] == text
    assert len(choice["logprobs"]["tokens"]) == num_tokens
    assert echoed["usage"]["completion_tokens"] == 0
    first, *others = chat["prompt_logprobs"]
    assert (first, len(others) + 1) == (None, chat["usage"]["prompt_tokens"])


def test_a_table_has_no_room_for_what_the_model_finds_of_prompts():
    checks = RequestChecks(model_name=MODEL, builder=None, is_single=True)
    body = make_line("x", prompt_logprobs=1)["body"]
    row = BatchRow(number=1, custom_id="x", url="/v1/chat/completions", body=body)
    with pytest.raises(InvalidRequestError, match="prompt_logprobs=1: must be left out"):
        checks.parse_body(row)


def test_a_row_may_rule_out_tokens_and_ask_for_token_ids(tmp_path, tokenizer):
    j, q, user, end = *(tokenizer.encode(text)[0] for text in "jq"), 3, *tokenizer.stop_token_ids
    asked = {"allowed_token_ids": [j, q, user], "bad_words": ["jj", "qq", "<|user|>" * 2]}
    asked |= {"max_tokens": 9, "skip_special_tokens": False, "return_token_ids": True}
    asked |= {"logit_bias": {str(end): 100}}
    source = write_lines(tmp_path / "in.jsonl", [make_line(name, **asked) for name in "ab"])
    run(source, tmp_path / "out.jsonl", tokenizer)
    for answer in read_lines(tmp_path / "out.jsonl"):
        body = answer["response"]["body"]
        (choice,) = body["choices"]
        output = choice["token_ids"]
        assert len(output) == 9
        assert set(output) <= {j, q, user}
        assert all(before != after for before, after in itertools.pairwise(output))
        assert choice["message"]["content"] == tokenizer.decode(output)
        assert len(body["prompt_token_ids"]) == body["usage"]["prompt_tokens"]
    source = write_lines(tmp_path / "bad.jsonl", [make_line("a", allowed_token_ids=[])])
    with pytest.raises(ConfigError, match=r"bad\.jsonl:1: .*1 or more items"):
        run(source, tmp_path / "bad.out.jsonl", tokenizer)


def test_two_jobs_never_write_one_journal(tmp_path):
    journal = Journal(tmp_path / "part")
    with pytest.raises(ConfigError, match="another job writes it"):
        Journal(tmp_path / "part")
    journal.close()
    Journal(tmp_path / "part").close()


def test_a_pipeline_that_breaks_ends_the_job_and_fails_no_row(tmp_path, tokenizer):
    source = write_lines(tmp_path / "in.jsonl", [make_line(name) for name in "abcdef"])
    script = [*tokenizer.encode("Hello"), *tokenizer.stop_token_ids]
    broken = ScriptedPipeline(script)
    broken.failure = PipelineError("stage 0 is gone")

    @asynccontextmanager
    async def start(pipeline):
        engine = Engine(make_scheduler(max_model_len=MAX_MODEL_LEN, num_blocks=256), pipeline)
        engine.start()
        client = EngineClient(engine)
        await client.start()
        yield EngineAnswers(
            client, model_name=MODEL, tokenizer=tokenizer, max_model_len=MAX_MODEL_LEN
        )
        await client.close()
        await engine.close()

    output = tmp_path / "out.jsonl"
    with pytest.raises(PipelineError):
        run(source, output, tokenizer, start_answers=lambda: start(broken))
    assert (tmp_path / "out.jsonl.part").read_bytes() == b""
    manifest = tmp_path / "out.jsonl.manifest.json"
    assert json.loads(manifest.read_text())["is_complete"] is False
    healthy = ScriptedPipeline(script)
    result = run(source, output, tokenizer, start_answers=lambda: start(healthy))
    assert (result.num_rows, result.num_failed) == (6, 0)
    assert json.loads(manifest.read_text())["is_complete"] is True


def test_a_row_with_tools_is_answered_with_calls(tmp_path):
    tokenizer = Tokenizer.load(copy_demo(tmp_path / "model", QWEN))
    tools = {"tools": [{"type": "function", "function": {"name": "now"}}], "max_tokens": 40}
    lines = [make_line(choice, tool_choice=choice, **tools) for choice in ("required", "none")]
    source = write_lines(tmp_path / "in.jsonl", lines)
    run(source, tmp_path / "out.jsonl", tokenizer)
    records = read_lines(tmp_path / "out.jsonl")
    called, other = (record["response"]["body"]["choices"][0] for record in records)
    assert called["finish_reason"] == "tool_calls"
    assert called["message"]["content"] is None
    function = called["message"]["tool_calls"][0]["function"]
    assert (function["name"], json.loads(function["arguments"])) == ("now", {})
    assert "tool_calls" not in other["message"]


def test_a_table_has_no_room_for_token_ids():
    body = make_line("x", return_token_ids=True)["body"]
    row = BatchRow(number=1, custom_id="x", url="/v1/chat/completions", body=body)
    checks = RequestChecks(model_name=MODEL, builder=None, is_single=True)
    with pytest.raises(InvalidRequestError, match="return_token_ids=True: must be left out"):
        checks.parse_body(row)
    assert RequestChecks(model_name=MODEL, builder=None).parse_body(row).return_token_ids


def test_a_table_has_no_room_for_tool_calls():
    checks = RequestChecks(model_name=MODEL, builder=None, is_single=True)
    body = make_line("x", tools=[{"type": "function", "function": {"name": "now"}}])["body"]
    for choice in ("auto", "required"):
        row = BatchRow(
            number=1, custom_id="x", url="/v1/chat/completions", body=body | {"tool_choice": choice}
        )
        with pytest.raises(InvalidRequestError, match="tools: must be left out"):
            checks.parse_body(row)
    row = BatchRow(
        number=1, custom_id="x", url="/v1/chat/completions", body=body | {"tool_choice": "none"}
    )
    assert checks.parse_body(row).tool_use is None
