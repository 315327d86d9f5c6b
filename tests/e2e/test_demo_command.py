"""What `make demo` shows."""

import pytest


@pytest.mark.parametrize(
    "shown",
    ["starting Ray", "loading shard 0", "loading shard 1", "ready", "KV blocks", "TTFT", "curl"],
)
def test_the_demo_shows_its_progress_its_answer_and_its_address(service, shown):
    assert shown in service.output


def test_the_demo_answers_with_python(service):
    answer = service.output.partition("Model:")[2]
    assert "def " in answer
    assert "return " in answer
