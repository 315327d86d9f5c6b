"""`make demo`, which is `serve run configs/demo.yaml`, once for all tests here."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gllm_ray.chat.stream import get_json
from gllm_ray.config import resolve_package_path
from tests.process_titles import titles

REPOSITORY = Path(__file__).parents[2]
READY_TIMEOUT_S = 115


@pytest.fixture
def directory():
    """A short path, because sockets lie there."""
    with tempfile.TemporaryDirectory(
        prefix="gllm-", dir="/tmp", ignore_cleanup_errors=True
    ) as path:
        yield Path(path)


class Service:
    """The demo command as a process.

    Attributes:
        output: What it printed until it was ready.
    """

    def __init__(self):
        self._demo = subprocess.Popen(
            [sys.executable, "-m", "gllm_ray.demo", "--port", "0"],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"RAY_memory_monitor_refresh_ms": "0"},
        )
        self.output = self._read_until_ready()
        self.base_url = re.search(r"http://[\d.]+:\d+", self.output).group()
        self.model = self.info()["model"]

    def _read_until_ready(self):
        watchdog = threading.Timer(READY_TIMEOUT_S, self._demo.terminate)
        watchdog.start()
        output = ""
        for line in self._demo.stdout:
            output += line
            if "until Ctrl-C" in line:
                watchdog.cancel()
                return output
        pytest.fail(f"the demo ended before it was ready:\n{output}")

    def processes(self):
        """Everything the demo has started."""
        return psutil.Process(self._demo.pid).children(recursive=True)

    def titles(self):
        """Everything the demo has started that is alive, by process id."""
        return titles(self._demo.pid)

    def press_ctrl_c(self):
        self._demo.send_signal(signal.SIGINT)

    def wait_for_end(self):
        """The exit status, and what was printed since the demo was ready."""
        output = self._demo.stdout.read()
        return self._demo.wait(), output

    def end(self):
        if self._demo.poll() is None:
            self.press_ctrl_c()
            self.wait_for_end()

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
def service():
    service = Service()
    yield service
    service.end()


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
