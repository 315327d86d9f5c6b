"""The end of `make demo`; the last of these tests, since it takes the service away."""

import subprocess
import sys
import time
from pathlib import Path

import psutil

INTERRUPTED_START = """
import subprocess
from pathlib import Path

from gllm_ray.demo import serve_process


class InterruptedPopen(subprocess.Popen):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        print(self.pid, kwargs["stdout"].name, flush=True)
        raise KeyboardInterrupt


serve_process.subprocess.Popen = InterruptedPopen
with serve_process.ServeProcess(Path("none.yaml")):
    print("it ran")
"""


def test_ctrl_c_while_the_process_of_the_service_is_made_leaves_nothing():
    # In a process of its own, because it ends all that the calling process has started.
    demo = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_START], capture_output=True, text=True, timeout=60
    )
    pid, log_file = demo.stdout.split()
    assert not psutil.pid_exists(int(pid))
    assert not Path(log_file).parent.exists()


def test_ctrl_c_even_twice_ends_every_process_of_the_demo(service):
    started = service.processes()
    assert len(started) > 5  # Ray, Serve, the stages
    service.press_ctrl_c()
    time.sleep(0.5)
    service.press_ctrl_c()
    status, output = service.wait_for_end()
    assert (status, output.strip().rpartition("\n")[2]) == (
        0,
        "stopped: every process of the demo has ended",
    )
    _, alive = psutil.wait_procs(started, timeout=1)
    assert not alive
