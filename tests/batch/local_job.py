"""A job of the demo model whose stage is in this process; as a program, to be killed."""

import hashlib
import json
import sys
from contextlib import asynccontextmanager
from pathlib import Path

from gllm_ray.assembly.engines import build_engine
from gllm_ray.batch.answers import EngineAnswers
from gllm_ray.batch.command import run_to_status
from gllm_ray.batch.job import BatchJob, JobResult
from gllm_ray.batch.records import read_jsonl
from gllm_ray.batch.requests import RequestChecks
from gllm_ray.batch.workspace import open_workspace
from gllm_ray.config import parse_service_config
from gllm_ray.engine.client import EngineClient
from gllm_ray.model.tokenizer import Tokenizer
from gllm_ray.serving.generation_requests import RequestBuilder
from gllm_ray.stages.local_pipeline import LocalPipeline

MODEL = "gllm-ray-demo"
MAX_MODEL_LEN = 256
CONFIG = parse_service_config(
    {
        "model": {
            "path": "package://gllm_ray/demo/model",
            "served_name": MODEL,
            "dtype": "float32",
            "max_model_len": MAX_MODEL_LEN,
        },
        "pipeline": {"device": "cpu"},
        "kv_cache": {"kv_cache_bytes": "16MiB"},
    }
)


def make_line(custom_id: str, **body: object) -> dict:
    """A row that is right, but for what the test makes of it."""
    chat = {"model": MODEL, "messages": [{"role": "user", "content": f"Write {custom_id}."}]}
    return {
        "custom_id": custom_id,
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {**chat, "temperature": 0, "max_tokens": 6, **body},
    }


def write_lines(path: Path, lines: list[dict]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@asynccontextmanager
async def local_answers(tokenizer: Tokenizer):
    """The real engine over the real model, without a cluster."""
    pipeline = LocalPipeline.start(CONFIG)
    engine = build_engine(
        CONFIG, pipeline, num_blocks=pipeline.num_blocks, max_model_len=MAX_MODEL_LEN
    )
    engine.start()
    client = EngineClient(engine)
    await client.start()
    yield EngineAnswers(client, model_name=MODEL, tokenizer=tokenizer, max_model_len=MAX_MODEL_LEN)
    await client.close()
    await engine.close()


def make_job(source: Path, tokenizer: Tokenizer, **options: object) -> BatchJob:
    sha256 = hashlib.sha256(source.read_bytes()).hexdigest()
    job = {
        "name": source.name,
        "source": source,
        "read_rows": lambda: read_jsonl(source),
        "output_suffix": ".jsonl",
        "identity": {"input_sha256": sha256},
        "checks": RequestChecks(model_name=MODEL, builder=RequestBuilder(tokenizer, MAX_MODEL_LEN)),
        "start_answers": lambda: local_answers(tokenizer),
        "max_in_flight": 4,
    }
    return BatchJob(**{**job, **options})


async def run_job(source: Path, output: str, tokenizer: Tokenizer, **options) -> JobResult:
    with open_workspace(output) as workspace:
        return await make_job(source, tokenizer, **options).run(workspace)


if __name__ == "__main__":
    loaded = Tokenizer.load("package://gllm_ray/demo/model")
    sys.exit(run_to_status(run_job(Path(sys.argv[1]), sys.argv[2], loaded), sys.argv[2]))
