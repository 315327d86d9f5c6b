"""The `gllm-ray` command."""

import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from ray._common.utils import get_ray_address_file

import gllm_ray
from gllm_ray.cli import main

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "configs" / "demo.yaml"
SIMULATION = "configs/simulation/stage-loss.yaml"
PLAN = "configs/plans/llama70b.yaml"


@pytest.fixture
def wrong_file(tmp_path: Path) -> Path:
    """The demo's configuration with one mistake."""
    path = tmp_path / "wrong.yaml"
    text = DEMO.read_text(encoding="utf-8")
    path.write_text(text.replace("num_stages: 2", "num_stages: 0"), encoding="utf-8")
    return path


def run(*arguments: str | Path, python: str | Path = sys.executable) -> subprocess.CompletedProcess:
    """The command in a process of its own."""
    path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    return subprocess.run(
        [python, "-m", "gllm_ray.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | {"PYTHONPATH": path},
    )


def test_a_right_file_is_one_line_that_says_what_it_serves(capsys):
    assert main(["validate", str(DEMO)]) == 0
    assert capsys.readouterr() == (f"OK {DEMO}: gllm-ray-demo, 2 stages x CPU, 1 replica\n", "")


def test_a_file_with_another_application_says_that_its_args_are_not_checked(capsys, tmp_path):
    path = tmp_path / "other.yaml"
    path.write_text("applications: [{import_path: 'a:b'}]", encoding="utf-8")
    assert main(["validate", str(path)]) == 0
    assert capsys.readouterr().out == f"OK {path}: a:b, whose args are not checked\n"


def test_a_file_that_serves_nothing_says_so(capsys, tmp_path):
    path = tmp_path / "empty.yaml"
    path.write_text("applications: []", encoding="utf-8")
    assert main(["validate", str(path)]) == 0
    assert capsys.readouterr().out == f"OK {path}: no application\n"


def test_every_file_is_checked_and_one_wrong_one_is_enough_to_fail(capsys, wrong_file):
    assert main(["validate", str(wrong_file), str(DEMO)]) == 1
    out, err = capsys.readouterr()
    assert out.startswith(f"OK {DEMO}: ")
    assert err == (
        f"{wrong_file}: applications[0].args.pipeline.num_stages=0: "
        "must be an integer from 1 to 256\n"
    )


@pytest.mark.parametrize("arguments", [[], ["validate"], ["serve"], ["serve", "a", "b"], ["x"]])
def test_wrong_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: gllm-ray" in capsys.readouterr().err


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"gllm-ray {gllm_ray.__version__}\n"


INTERRUPTED = """
import _thread, signal, sys, threading
from gllm_ray.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
threading.Timer(0.1, _thread.interrupt_main).start()
sys.exit(main(["bench", "scheduler"]))  # it would take many seconds
"""


def test_ctrl_c_ends_a_command_with_a_word_and_the_status_of_the_signal():
    # In a process of its own, because an interrupt within a callback of a test library is lost.
    command = [sys.executable, "-c", INTERRUPTED]
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (result.returncode, result.stderr) == (130, "interrupted\n")


@pytest.mark.parametrize(
    "arguments",
    [["keys"], ["simulate", SIMULATION, "--sweep", "9"], ["plan", PLAN, "--memory-only"]],
)
def test_output_that_nobody_reads_any_more_is_no_error(arguments):
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(
        [sys.executable, "-u", "-m", "gllm_ray.cli", *arguments],
        cwd=ROOT,
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    os.close(writer)
    assert (result.returncode, result.stderr) == (141, "")


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["profile", str(DEMO)], "--output"),
        (["train-lengths", "lengths.jsonl"], "--output"),
        (["plan", "plan.yaml"], "--output"),
        (["simulate", "simulation.yaml"], "--json"),
        (["simulate", "simulation.yaml"], "--trace"),
        (["simulate", "simulation.yaml"], "--plot-gantt"),
        (["bench", "scheduler"], "--output"),
        (["bench", "policies"], "--output"),
    ],
)
def test_a_result_that_could_not_be_written_is_told_before_the_work(
    arguments, option, tmp_path, capsys
):
    for path, reason in (
        (tmp_path / "none" / "a.json", "its directory must be there"),
        (tmp_path, "is a directory; must be a file"),
    ):
        with pytest.raises(SystemExit) as caught:
            main([*arguments, option, str(path)])
        assert caught.value.code == 2
        assert f"argument {option}: {path}: {reason}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["profile", str(DEMO), "--output", os.devnull], "--seconds"),
        (["plan", "plan.yaml"], "--processes"),
        (["bench", "policies"], "--processes"),
        (["bench", "scheduler"], "--stages"),
        (["bench", "simulator"], "--stages"),
        (["bench", "simulator"], "--running"),
        (["bench", "simulator"], "--requests"),
        (["bench", "serve", "http://localhost"], "--timeout-s"),
        (["bench", "serve", "http://localhost"], "--pid"),
    ],
)
@pytest.mark.parametrize("number", ["0", "-1", "many"])
def test_a_number_that_must_be_positive_is_refused_by_its_option(arguments, option, number, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*arguments, option, number])
    assert caught.value.code == 2
    assert f"argument {option}: {number}: must be " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["simulate", "simulation.yaml"], "--gantt-start-s"),
        (["bench", "scheduler"], "--waiting"),
        (["bench", "engine", str(DEMO)], "--num-warmups"),
        (["bench", "recovery", str(DEMO)], "--calm"),
    ],
)
@pytest.mark.parametrize("number", ["-1", "many"])
def test_a_number_that_may_be_0_but_not_less_is_refused_by_its_option(
    arguments, option, number, capsys
):
    with pytest.raises(SystemExit) as caught:
        main([*arguments, option, number])
    assert caught.value.code == 2
    assert re.search(f"argument {option}: {number}: must be .* >= 0", capsys.readouterr().err)


def test_the_help_tells_the_default_of_what_has_one_alone(capsys):
    for benchmark, default in (("scheduler", "10000"), ("policies", "0 1 2"), ("front", "64 256")):
        with pytest.raises(SystemExit):
            main(["bench", benchmark, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert f"(default: {default})" in text
        assert not re.search(r"default: (None|False|\)|\[)", text)


def test_the_id_of_no_process_is_refused(capsys):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    with pytest.raises(SystemExit):
        main(["bench", "serve", "http://localhost", "--pid", str(ended.pid)])
    assert f"--pid: {ended.pid}: must be the id of a process" in capsys.readouterr().err


def test_the_id_of_a_process_goes_with_a_service_that_runs_already(capsys):
    assert main(["bench", "serve", "serve --port {port}", "--pid", str(os.getpid())]) == 1
    assert "must be given without the id of a process" in capsys.readouterr().err


def test_a_benchmark_that_is_too_small_for_its_requests_says_so(capsys):
    assert main(["bench", "scheduler", "--running", "1", "--steps", "5"]) == 1
    assert "come to " in capsys.readouterr().err


@pytest.mark.parametrize("number", ["nan", "inf"])
def test_a_profile_ends_at_some_time(number, capsys):
    with pytest.raises(SystemExit):
        main(["profile", str(DEMO), "--output", os.devnull, "--seconds", number])
    assert f"argument --seconds: {number}: must be a number > 0" in capsys.readouterr().err


def test_validation_imports_neither_ray_nor_torch():
    code = (
        "import sys, gllm_ray.cli as cli; assert cli.main(sys.argv[1:]) == 0; "
        "heavy = {'ray', 'torch', 'transformers', 'fastapi', 'numpy'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, "validate", *sorted(ROOT.glob("configs/*.yaml"))],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert result.stdout.splitlines()[-1] == "[]"


@pytest.fixture
def python_beside_serve(tmp_path: Path) -> Path:
    """An interpreter with a `serve` beside it that prints how it was called."""
    python, serve = tmp_path / "python", tmp_path / "serve"
    python.symlink_to(sys.executable)
    serve.write_text('#!/bin/sh\necho "$@"\nexit 7\n', encoding="utf-8")
    serve.chmod(0o755)
    return python


def test_serve_becomes_the_serve_run_of_the_same_environment(python_beside_serve):
    result = run("serve", DEMO, "--address", "auto", python=python_beside_serve)
    assert result.stdout.splitlines()[1:] == [f"run {DEMO} --address auto"]
    assert result.returncode == 7


@pytest.mark.parametrize(
    ("is_serve", "is_started", "options", "is_taken"),
    [
        (True, True, [], False),
        (True, True, ["--address", "local"], True),
        (True, False, [], True),
        (False, True, [], True),
    ],
)
def test_serve_takes_no_port_but_that_of_the_serve_that_it_joins(
    python_beside_serve, tmp_path, monkeypatch, is_serve, is_started, options, is_taken
):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    if is_started:
        started = Path(get_ray_address_file(None))
        started.parent.mkdir()
        started.write_text("127.0.0.1:6379", "utf-8")

    class Health(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if is_serve and self.path == "/-/healthz" else 404)
            self.end_headers()

    with HTTPServer(("127.0.0.1", 0), Health) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.server_port
        file = tmp_path / "serve.yaml"
        file.write_text(DEMO.read_text("utf-8").replace("port: 8000", f"port: {port}"), "utf-8")
        result = run("serve", file, *options, python=python_beside_serve)
        server.shutdown()
    if not is_taken:
        assert result.returncode == 7
    else:
        assert result.returncode == 1
        address = "127.0.0.1", port
        taken = f"Address already in use (while attempting to bind on address {address})"
        assert result.stderr == (
            f"{file}: http_options.port={port}: {taken}; free it, name another, or give the "
            "--address of the cluster to join\n"
        )


def test_serve_without_ray_serve_says_so(tmp_path):
    (tmp_path / "python").symlink_to(sys.executable)
    result = run("serve", DEMO, "--address", "auto", python=tmp_path / "python")
    assert result.returncode == 1
    assert result.stderr == (
        f"{tmp_path / 'serve'}: No such file or directory; install ray[serve] beside gllm_ray\n"
    )


def test_serve_never_runs_a_wrong_file(python_beside_serve, wrong_file):
    result = run("serve", wrong_file, python=python_beside_serve)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
