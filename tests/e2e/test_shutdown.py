"""The end of `make demo`; the last of these tests, since it takes the service away."""

import time

import psutil


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
