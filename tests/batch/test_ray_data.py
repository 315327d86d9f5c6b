"""A processor on a real Ray Data pipeline."""

import time
from pathlib import Path

import pytest

pytest.importorskip("pyarrow", reason="the data extra is not installed")

import ray
from ray.exceptions import RayTaskError

from gllm_ray.batch.data import ProcessorConfig, build_processor
from gllm_ray.serve_file import load_only_service

pytestmark = pytest.mark.slow  # two pipelines take half a minute to start

DEMO = load_only_service(Path(__file__).parents[2] / "configs" / "demo.yaml")


TOOLS = [{"type": "function", "function": {"name": "now"}}]


def ask(row):
    """Two prompts do not fit the model's context, and one wants more than a text."""
    limit = 2000 if row["id"] in (3, 7) else 4
    tools = TOOLS if row["id"] == 5 else None
    return {
        "messages": [{"role": "user", "content": f"Write {row['id']}."}],
        "sampling_params": {"max_tokens": limit, "temperature": 0, "tools": tools},
    }


@pytest.mark.timeout(300)
def test_rows_come_back_with_the_columns_of_ray_data_llm(ray_cluster):
    config = ProcessorConfig(
        service=DEMO, concurrency=2, batch_size=4, should_continue_on_error=True
    )
    process = build_processor(
        config,
        preprocess=ask,
        postprocess=lambda row: {
            "id": row["id"],
            "text": row["generated_text"],
            "num_input_tokens": row["num_input_tokens"],
            "num_generated_tokens": row["num_generated_tokens"],
        },
    )
    rows = process(ray.data.range(12, override_num_blocks=3)).take_all()
    assert sorted(row["id"] for row in rows) == list(range(12))
    for row in rows:
        if row["id"] in (3, 7):
            assert "maximum context length is 1024" in row["__inference_error__"]
            assert row["generated_text"] == ""
        elif row["id"] == 5:
            assert "tools: must be left out" in row["__inference_error__"]
        else:
            assert row["__inference_error__"] == ""
            assert row["text"]
            assert row["num_input_tokens"] > 0
            assert 1 <= row["num_generated_tokens"] <= 4
    deadline = time.monotonic() + 30
    while ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"]:
        assert time.monotonic() < deadline  # every process of the pipelines has ended
        time.sleep(0.1)


@pytest.mark.timeout(300)
def test_a_row_that_fails_ends_the_dataset_unless_it_may_continue(ray_cluster):
    process = build_processor(ProcessorConfig(service=DEMO), preprocess=ask)
    with pytest.raises(RayTaskError, match="maximum context length is 1024"):
        process(ray.data.range(4)).take_all()
