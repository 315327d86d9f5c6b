"""The routes over the real engine and the demo model, in this process."""

import asyncio
from contextlib import asynccontextmanager

from gllm_ray.config import parse_service_config
from gllm_ray.stages.local_pipeline import LocalPipeline
from tests.numerics.serving import RecordingPipeline
from tests.serving.local_api import local_api, openai_over

DEMO_MODEL = "package://gllm_ray/demo/model"
MAX_MODEL_LEN = 256
BLOCK_SIZE = 4


def start_demo_pipeline(num_stages: int = 1) -> LocalPipeline:
    return LocalPipeline.start(
        parse_service_config(
            {
                "model": {"path": DEMO_MODEL, "dtype": "float32", "max_model_len": MAX_MODEL_LEN},
                "pipeline": {"device": "cpu", "num_stages": num_stages},
                "kv_cache": {"kv_cache_bytes": "16MiB", "block_size": BLOCK_SIZE},
            }
        )
    )


@asynccontextmanager
async def demo_api(tokenizer, pipeline: LocalPipeline, **scheduler_options):
    """Yield the service and an HTTP client; the pipeline serves other tests afterwards."""
    options = {
        "num_stages": len(pipeline.stages),
        "max_model_len": MAX_MODEL_LEN,
        "block_size": BLOCK_SIZE,
        "num_blocks": pipeline.num_blocks,
        **scheduler_options,
    }
    recorder = RecordingPipeline(pipeline)
    async with local_api(tokenizer, pipeline=recorder, **options) as (service, http):
        yield service, http
        await service.until_idle()  # a micro-batch that is left would answer to the next engine


def ask_demo(tokenizer, pipeline, scenario, **scheduler_options):
    """What a scenario makes of the service and OpenAI's own client."""

    async def main():
        async with demo_api(tokenizer, pipeline, **scheduler_options) as (service, http):
            return await scenario(service, openai_over(http))

    return asyncio.run(main())
