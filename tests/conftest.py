"""What many tests share: one Ray cluster, and a tiny checkpoint."""

import os
import secrets
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings
from xdist.scheduler import LoadFileScheduling

if TYPE_CHECKING:
    from tests.pipelines import Reference

# Ray reads these when it is imported, and its daemons when they start.
os.environ |= {
    "RAY_AUTH_MODE": "disabled",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_worker_niceness": "0",  # else the tests of another worker starve actors
}
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # else the workers' threads outnumber the cores
    # Workers ignore Ctrl-C, and so would every process that a test starts and ends by it.
    signal.signal(signal.SIGINT, signal.default_int_handler)


# Triton reads it when it is imported: without a GPU, kernels run in its interpreter.
if not Path("/proc/driver/nvidia/version").exists():
    os.environ["TRITON_INTERPRET"] = "1"


# A time limit would make tests fail on busy machines. `--hypothesis-profile=search` draws other
# examples in each run.
settings.register_profile("search", deadline=None)
settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")


class _ByFile(LoadFileScheduling):
    """A worker runs whole files, and one of them all that share a service, or replicas."""

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        directory = Path(file).parent.name
        return directory if directory in ("e2e", "faults") else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> _ByFile:
    """Replaces each way of `--dist`."""
    return _ByFile(config, log)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A private cluster of this process: its own ports and directory, gone at the end."""
    import ray

    # Ray's sockets lie in it, and a socket's path may have about 100 characters.
    directory = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    ray.init(
        address="local",
        num_cpus=8,
        num_gpus=0,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=150 * 2**20,
        _temp_dir=directory,
    )
    # The monitor looks through the logs of all actors ten times a second, for nobody.
    ray._private.worker._global_node.kill_log_monitor()
    yield
    ray.shutdown()
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """The address of a private Redis, and its password."""
    from gllm_ray.demo.serve_process import free_port

    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("redis-server is missing")
    port, password = free_port(), secrets.token_hex(16)
    process = subprocess.Popen(
        [program, "--port", str(port), "--bind", "127.0.0.1", "--requirepass", password],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
    )
    yield f"redis://127.0.0.1:{port}", password
    process.kill()
    process.wait()


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random four-layer llama in float32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,  # wide, so that greedy tokens differ from each other
        dtype="float32",
    )
    directory = tmp_path_factory.mktemp("tiny_llama")
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def reference(tiny_llama: Path) -> "Reference":
    """What transformers makes of the tiny llama."""
    import torch
    from transformers import LlamaForCausalLM

    from tests.pipelines import Reference

    model = LlamaForCausalLM.from_pretrained(tiny_llama).eval()
    model.generation_config.eos_token_id = None
    prompts = [list(range(1, 10)), [17, 4], list(range(60, 20, -1))]
    outputs = []
    for prompt in prompts:
        tokens = model.generate(
            torch.tensor([prompt]), max_new_tokens=6, do_sample=False, pad_token_id=0
        )
        outputs.append(tokens[0, len(prompt) :].tolist())
    return Reference(prompts, outputs)
