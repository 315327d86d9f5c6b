"""The notebooks: each runs, stores no output, and defines nothing."""

import ast
import resource
from pathlib import Path
from uuid import uuid4

import nbformat
import psutil
import pytest
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient

REPOSITORY = Path(__file__).parents[2]
NOTEBOOKS = sorted(REPOSITORY.glob("notebooks/*.ipynb"))
PROCESSOR_LIMIT_S = 120  # of processor time, which does not depend on what else runs here
HANGING_S = 600
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(path):
    cells = nbformat.read(path, as_version=4).cells
    return [cell for cell in cells if cell.cell_type == "code"]


def processes_marked(mark):
    found = []
    for process in psutil.process_iter():
        try:
            is_marked = mark in process.environ().values()
        except psutil.Error:  # it has ended, or is somebody else's
            continue
        if is_marked:
            found.append(process)
    return found


@pytest.fixture
def mark(monkeypatch):
    """Is in the environment of whatever a notebook starts; what is left of that is ended."""
    mark = uuid4().hex
    monkeypatch.setenv("GLLM_RAY_NOTEBOOK", mark)
    yield mark
    for process in processes_marked(mark):
        process.kill()


def run(path):
    """Run a notebook with this interpreter and this checkout, whatever kernels are installed."""
    kernels = KernelSpecManager(kernel_dirs=[])  # so that python3 is ipykernel's own
    NotebookClient(
        nbformat.read(path, as_version=4),
        km=AsyncKernelManager(kernel_name="python3", kernel_spec_manager=kernels),
        timeout=HANGING_S,
        resources={"metadata": {"path": str(path.parent)}},
    ).execute(cleanup_kc=True)


def processor_time_s():
    """Of the children that have ended, and of theirs."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.mark.timeout(HANGING_S + 60)
@every_notebook
def test_a_notebook_runs_in_its_time_and_leaves_no_process(path, mark, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    before_s = processor_time_s()
    run(path)
    assert processor_time_s() - before_s < PROCESSOR_LIMIT_S
    _, alive = psutil.wait_procs(processes_marked(mark), timeout=10)
    assert not alive


@every_notebook
def test_a_notebook_is_stored_without_outputs(path):
    for cell in code_cells(path):
        assert cell.outputs == []
        assert cell.execution_count is None


@every_notebook
def test_a_notebook_imports_the_package_and_defines_nothing(path):
    nodes = [node for cell in code_cells(path) for node in ast.walk(ast.parse(cell.source))]
    modules = [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    assert any(module.startswith("gllm_ray.") for module in modules)
    assert not [ast.unparse(node) for node in nodes if isinstance(node, DEFINITIONS)]


def test_there_are_notebooks():
    assert {path.stem for path in NOTEBOOKS} >= {
        "quickstart",
        "bubbles_and_policies",
        "capacity_planning",
    }
