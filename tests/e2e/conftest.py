"""`serve run configs/demo.yaml` as a user runs it, once for all tests here, and gone after them."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from gllm_ray.config import resolve_package_path
from gllm_ray.demo.chat import get_json
from gllm_ray.demo.serve_process import ServeProcess, free_port

REPOSITORY = Path(__file__).parents[2]
READY_TIMEOUT_S = 180


@dataclass(frozen=True)
class Service:
    base_url: str
    model: str

    def info(self):
        return get_json(f"{self.base_url}/server_info")

    def wait_until_busy(self, timeout_s=10):
        deadline = time.monotonic() + timeout_s
        while not self.info()["load"]["num_requests"]:
            assert time.monotonic() < deadline, "no request arrived"
            time.sleep(0.02)

    def wait_until_idle(self, timeout_s=10):
        deadline = time.monotonic() + timeout_s
        while (load := self.info()["load"])["num_requests"]:
            assert time.monotonic() < deadline, f"requests are still open: {load}"
            time.sleep(0.05)
        return load


@pytest.fixture(scope="package")
def service(tmp_path_factory):
    config = yaml.safe_load((REPOSITORY / "configs/demo.yaml").read_text())
    port = config["http_options"]["port"] = free_port()
    config_file = tmp_path_factory.mktemp("serve") / "demo.yaml"
    config_file.write_text(yaml.safe_dump(config))
    os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")
    with ServeProcess(config_file) as process:
        yield wait_until_ready(process, f"http://127.0.0.1:{port}")


def wait_until_ready(process, base_url):
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        process.raise_if_ended()
        try:
            info = get_json(f"{base_url}/server_info")
        except OSError:
            time.sleep(0.3)
        else:
            return Service(base_url, info["model"])
    pytest.fail(f"the service is not ready:\n{process.log_tail()}")


class Truth:
    """The demo model in plain transformers: what the service must answer at temperature 0."""

    def __init__(self):
        torch.set_num_threads(1)  # the service computes on the same cores
        path = resolve_package_path("package://gllm_ray/demo/model")
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

    def chat_ids(self, content):
        messages = [{"role": "user", "content": content}]
        return self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )

    def generate(self, prompt_ids, max_tokens):
        with torch.inference_mode():
            output = self.model.generate(
                torch.tensor([prompt_ids]), max_new_tokens=max_tokens, do_sample=False
            )
        return output[0, len(prompt_ids) :].tolist()

    def chat(self, content, max_tokens):
        return self.decode(self.generate(self.chat_ids(content), max_tokens))

    def complete(self, prompt, max_tokens):
        return self.decode(self.generate(self.tokenizer(prompt)["input_ids"], max_tokens))

    def decode(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=True)


@pytest.fixture(scope="package")
def truth():
    return Truth()
