"""The whole file: YAML, Ray Serve's keys, and our `args` in it."""

import ast
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from gllm_ray import serve_schema
from gllm_ray.errors import ConfigError
from gllm_ray.serve_file import DEPLOYMENT_NAME, IMPORT_PATH, load_serve_file, services_of
from gllm_ray.serve_schema import ServeFile
from gllm_ray.strict_schema import find_mistakes

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
DEMO = (ROOT / "configs" / "demo.yaml").read_text(encoding="utf-8")
TWO_MODELS = (ROOT / "configs" / "two_models.yaml").read_text(encoding="utf-8")

# Every mapping of Serve's schema that has keys of its own, once.
FULL: dict[str, Any] = {
    "proxy_location": "HeadOnly",
    "http_options": {"host": "::", "port": 80},
    "grpc_options": {"port": 9000, "grpc_servicer_functions": ["a.b:c"]},
    "controller_options": {"runtime_env": {"env_vars": {"A": "1"}}},
    "logging_config": {"encoding": "JSON", "log_level": "DEBUG"},
    "tracing_config": {"enabled": True, "sampling_ratio": 0.5},
    "target_capacity": 50,
    "applications": [
        {
            "name": "other",
            "route_prefix": "/other",
            "import_path": "other.module:app",
            "runtime_env": {"env_vars": {"A": "1"}, "working_dir": "s3://bucket/code.zip"},
            "autoscaling_policy": {"policy_function": "ray.serve.autoscaling_policy:x"},
            "deployments": [
                {
                    "name": "A",
                    "num_replicas": "auto",
                    "max_queued_requests": -1,
                    "backpressure_config": {"status_code": 429, "retry_after_s": 1.5},
                    "autoscaling_config": {
                        "min_replicas": 0,
                        "initial_replicas": 1,
                        "max_replicas": 3,
                        "policy": {"policy_kwargs": {}},
                    },
                    "ray_actor_options": {"num_cpus": 1, "runtime_env": {"pip": ["x"]}},
                    "placement_group_bundles": [{"CPU": 1}],
                    "request_router_config": {"max_backoff_s": 1},
                    "deployment_actors": [{"name": "tree", "actor_class": "a:B"}],
                },
                {"name": "B", "num_replicas": 4, "gang_scheduling_config": {"gang_size": 2}},
            ],
        }
    ],
}


def mistakes_in(text: str | bytes, path: Path) -> list[str]:
    """The mistakes of a file with this content; each line without the file's path."""
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as caught:
        load_serve_file(path)
    lines = str(caught.value).splitlines()
    assert all(line.startswith(str(path)) for line in lines)
    return [line.removeprefix(str(path)).removeprefix(": ") for line in lines]


def changed(path: str, value: object) -> dict[str, Any]:
    """`FULL` with the value at a dotted path replaced; a number in the path is an index."""
    data = copy.deepcopy(FULL)
    *steps, key = [int(step) if step.isdigit() else step for step in path.split(".")]
    place: Any = data
    for step in steps:
        place = place[step]
    place[key] = value
    return data


def mappings(schema_data: Any, path: str = "") -> Iterator[str]:
    """The path of every mapping whose keys Serve's schema names."""
    free = {"env_vars", "policy_kwargs", "placement_group_bundles"}
    if isinstance(schema_data, dict):
        yield path
        for key, value in schema_data.items():
            if key not in free:
                yield from mappings(value, f"{path}.{key}".removeprefix("."))
    elif isinstance(schema_data, list):
        for i, value in enumerate(schema_data):
            yield from mappings(value, f"{path}.{i}")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_files_are_right_and_serve_takes_them(path):
    ray_schema = pytest.importorskip("ray.serve.schema")
    assert all(services_of(item) for item in load_serve_file(path).applications)
    ray_schema.ServeDeploySchema.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))


def test_serve_takes_what_this_schema_takes():
    ray_schema = pytest.importorskip("ray.serve.schema")
    assert find_mistakes(ServeFile, FULL) == []
    ray_schema.ServeDeploySchema.model_validate(
        changed("applications.0.autoscaling_policy", None)  # Serve would import the function
    )


RAY_MODELS = {
    "ServeFile": ("schema", "ServeDeploySchema"),
    "HttpOptions": ("schema", "HTTPOptionsSchema"),
    "GrpcOptions": ("schema", "gRPCOptionsSchema"),
    "ControllerOptions": ("config", "ControllerOptions"),
    "LoggingOptions": ("schema", "LoggingConfig"),
    "TracingOptions": ("schema", "TracingConfig"),
    "Application": ("schema", "ServeApplicationSchema"),
    "Deployment": ("schema", "DeploymentSchema"),
    "RayActorOptions": ("schema", "RayActorOptionsSchema"),
    "AutoscalingOptions": ("config", "AutoscalingConfig"),
    "AutoscalingPolicy": ("config", "AutoscalingPolicy"),
    "RequestRouterOptions": ("config", "RequestRouterConfig"),
    "BackpressureOptions": ("config", "BackpressureConfig"),
    "GangOptions": ("config", "GangSchedulingConfig"),
    "DeploymentActor": ("config", "DeploymentActorConfig"),
}


@pytest.mark.parametrize("name", RAY_MODELS)
def test_the_keys_are_those_of_the_installed_ray_serve(name):
    module, ray_name = RAY_MODELS[name]
    ray_model = getattr(pytest.importorskip(f"ray.serve.{module}"), ray_name)
    ours, theirs = getattr(serve_schema, name).model_fields, ray_model.model_fields
    # Serve keeps them for a format it no longer takes, and refuses them in this one.
    gone = {"host", "port"} if name == "Application" else set()
    assert set(ours) == set(theirs) - gone
    assert {key for key in ours if ours[key].is_required()} == {
        key for key in theirs if theirs[key].is_required()
    }


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("HttpOptions", ["host", "port"]),
        ("Application", ["name", "route_prefix"]),
        ("AutoscalingOptions", ["min_replicas", "max_replicas", "initial_replicas"]),
    ],
)
def test_a_default_that_is_relied_on_is_that_of_the_installed_ray_serve(name, keys):
    module, ray_name = RAY_MODELS[name]
    theirs = getattr(pytest.importorskip(f"ray.serve.{module}"), ray_name).model_fields
    ours = getattr(serve_schema, name).model_fields
    assert {key: ours[key].default for key in keys} == {key: theirs[key].default for key in keys}


def test_the_keys_of_a_runtime_env_are_those_of_the_installed_ray():
    runtime_env = pytest.importorskip("ray.runtime_env").RuntimeEnv
    internal = {"inject_current_ray", "ray_commit", "ray_release"}
    known = {key.removeprefix("_") for key in runtime_env.known_fields} - internal
    assert set(serve_schema.RuntimeEnv.model_fields) == known


@pytest.mark.parametrize("path", list(mappings(FULL)))
def test_an_unknown_key_is_refused_wherever_it_stands(path):
    (line,) = find_mistakes(ServeFile, changed(f"{path}.xyzzy".removeprefix("."), 1))
    assert ".xyzzy=1: unknown key; known keys: " in f".{line}"


IMPORT_PATH_WORDS = "an import path such as package.module:name"
URI_WORDS = "a URI such as s3://bucket/code.zip or local:///path"
ROUTE_WORDS = "a path such as / or /llm, with no / at its end and no braces"
AUTOSCALING = "applications.0.deployments.0.autoscaling_config"
MISTAKES = [
    ("http_options.port", 0, "=0: must be an integer from 1 to 65535"),
    ("http_options.port", "80", "='80': must be an integer from 1 to 65535"),
    ("http_options.root_path", None, "=null: must be text"),
    ("http_options.ssl_keyfile", "k", "='k': must go with ssl_certfile"),
    ("http_options.ssl_keyfile_password", 1234, "=<hidden>: must be text, or null"),
    ("controller_options.runtime_env.env_vars.A", 1, "=<hidden>: must be text"),
    ("proxy_location", "All", "='All': must be EveryNode, HeadOnly or Disabled"),
    ("target_capacity", 101, "=101: must be a number from 0 to 100, or null"),
    ("applications", None, "=null: must be a list, each item a mapping"),
    ("applications.0.import_path", "app", f"='app': must be {IMPORT_PATH_WORDS}"),
    ("applications.0.runtime_env.working_dir", "./src", f"='./src': must be {URI_WORDS}, or null"),
    ("applications.0.route_prefix", "/x/", f"='/x/': must be {ROUTE_WORDS}, or null"),
    ("applications.0.port", 80, "=80: unknown key; did you mean http_options.port?"),
    (
        "applications.0.external_scaler_enabled",
        True,
        "=true: must be false when deployments[0] autoscales",
    ),
    (
        "applications.0.deployments.0.num_replicas",
        0,
        "=0: must be an integer >= 1, or auto, or null",
    ),
    (
        "applications.0.deployments.0.num_replicas",
        2,
        "=2: must be auto or left out beside autoscaling_config",
    ),
    (
        "applications.0.deployments.0.max_queued_requests",
        0,
        "=0: must be -1, or an integer >= 1",
    ),
    (f"{AUTOSCALING}.min_replicas", 4, "=4: must be <= max_replicas=3"),
    (
        f"{AUTOSCALING}.initial_replicas",
        4,
        "=4: must be from min_replicas=0 to max_replicas=3",
    ),
    (f"{AUTOSCALING}.max_replica", 4, "=4: unknown key; did you mean max_replicas?"),
]


@pytest.mark.parametrize(("path", "value", "rest"), MISTAKES)
def test_a_mistake_around_args_is_one_line(path, value, rest):
    key = path.replace(".0", "[0]")
    assert find_mistakes(ServeFile, changed(path, value)) == [key + rest]


@pytest.mark.parametrize(("key", "value"), [("name", "other"), ("route_prefix", "/other")])
def test_applications_must_differ(key, value):
    data = copy.deepcopy(FULL)
    data["applications"].append({"name": "new", "import_path": "a:b", key: value})
    assert find_mistakes(ServeFile, data) == [
        f"applications[1].{key}='{value}': must differ from applications[0].{key}"
    ]


APP = "applications[0]"
SEE = f"see {APP}.args.pipeline"
STAGES = "an integer from 1 to 256"
OVERRIDE = "    deployments: [{name: %s}]\n    args:"


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("port: 8000", "prt: 8000", "http_options.prt=8000: unknown key; did you mean port?"),
        ("num_stages: 2", "num_stages: 0", f"{APP}.args.pipeline.num_stages=0: must be {STAGES}"),
        ("pipeline:", "piline:", f"{APP}.args.piline={{...}}: unknown key; did you mean pipeline?"),
        (
            "    args:",
            "    args: null\n    runtime_env:\n     config:",
            f"{APP}.args=null: must be a mapping",
        ),
        (IMPORT_PATH, "gllm_ray:x", f"{APP}.import_path='gllm_ray:x': must be {IMPORT_PATH}"),
        (
            "    args:",
            OVERRIDE % "LLMserver",
            f"{APP}.deployments[0].name='LLMserver': must be LLMServer",
        ),
        (
            "    args:",
            OVERRIDE % "LLMServer, placement_group_strategy: PACK",
            f"{APP}.deployments[0].placement_group_strategy: must be left out; {SEE}",
        ),
    ],
)
def test_a_mistake_in_one_of_our_applications_is_one_line(old, new, line, tmp_path):
    assert old in DEMO
    assert mistakes_in(DEMO.replace(old, new, 1), tmp_path / "c.yaml") == [line]


def test_the_names_a_file_must_give_are_those_of_the_code():
    # Parsed, not imported: that would load Ray and torch.
    module, function = IMPORT_PATH.split(":")
    sources = [ROOT / f"{module.replace('.', '/')}.py", ROOT / "gllm_ray" / "serving" / "server.py"]
    nodes = [node for path in sources for node in ast.parse(path.read_text("utf-8")).body]
    assert function in {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    assert DEPLOYMENT_NAME in {node.name for node in nodes if isinstance(node, ast.ClassDef)}


def test_mistakes_in_and_around_args_are_told_together(tmp_path):
    text = DEMO.replace("port:", "prt:").replace("device: cpu", "device: tpu")
    lines = mistakes_in(text, tmp_path / "c.yaml")
    assert [line.split("=")[0] for line in lines] == [
        "http_options.prt",
        "applications[0].args.pipeline.device",
    ]


def test_an_override_of_our_deployment_is_taken(tmp_path):
    path = tmp_path / "c.yaml"
    override = OVERRIDE % "LLMServer, max_ongoing_requests: 9"
    path.write_text(DEMO.replace("    args:", override, 1), encoding="utf-8")
    (application,) = load_serve_file(path).applications
    assert application.deployments[0].max_ongoing_requests == 9


def test_an_override_beside_models_names_the_front_end_or_one_of_them(tmp_path):
    path = tmp_path / "c.yaml"
    models = TWO_MODELS.replace("    args:", OVERRIDE % "FrontEnd}, {name: demo-bfloat16", 1)
    path.write_text(models, encoding="utf-8")
    assert list(services_of(load_serve_file(path).applications[0])) == ["demo", "demo-bfloat16"]
    (line,) = mistakes_in(models.replace("name: FrontEnd", "name: LLMServer"), path)
    assert line == (
        "applications[0].deployments[0].name='LLMServer': must be FrontEnd or demo or demo-bfloat16"
    )


def test_the_args_of_another_application_are_left_alone(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("applications: [{import_path: 'a.b:c', args: {x: 1}}]", encoding="utf-8")
    (application,) = load_serve_file(path).applications
    assert services_of(application) == {}


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "null: must be a mapping"),
        ("a: [1\n", ":2: while parsing a flow sequence: expected ',' or ']', but got "),
        ("a:\n\tb: 1\n", ":2: while scanning for the next token: found character '\\t' "),
        ("a: 1\nb:\n  c: 1\n  c: 2\n", ":4: key 'c' is given twice, first in line 3"),
        ("{a: 1, a: 2}", ":1: key 'a' is given twice, first in line 1"),
        ("a: 1\nb: *c\n", ":2: found undefined alias 'c'"),
        ("a: 1\n--- \nb: 2\n", ":2: expected a single document in the stream: but found "),
        ("a: 1\nb: !env HOME\n", ":2: could not determine a constructor for the tag '!env'"),
        ("a: 1\nb: 2026-02-30\n", ":2: '2026-02-30' is no timestamp"),
        (b"a: \xff", "must be UTF-8: unacceptable character #x00ff: invalid start byte"),
        ("[" * 10_000, "nested too deeply"),
    ],
)
def test_text_that_is_not_yaml_is_one_line_with_its_place(text, line, tmp_path):
    (found,) = mistakes_in(text, tmp_path / "c.yaml")
    assert found.startswith(line)


def test_a_merged_mapping_may_override_a_key(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(DEMO.replace("  port: 8000", "  <<: {port: 1}\n  port: 8001"), encoding="utf-8")
    assert load_serve_file(path).http_options.port == 8001


def test_a_file_that_cannot_be_read_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="No such file or directory"):
        load_serve_file(tmp_path / "missing.yaml")
    with pytest.raises(ConfigError, match="Is a directory"):
        load_serve_file(tmp_path)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_damaged_file_gives_lines_that_start_with_its_name_or_is_taken(data, tmp_path_factory):
    start = data.draw(st.integers(0, len(DEMO)))
    end = data.draw(st.integers(start, min(len(DEMO), start + 30)))
    new = data.draw(st.text("[]{}:,-&*!|>'\"#%?<~ \n\t0aé!!int", max_size=8))
    path = tmp_path_factory.getbasetemp() / "damaged.yaml"
    path.write_text(DEMO[:start] + new + DEMO[end:], encoding="utf-8")
    try:
        load_serve_file(path)
    except ConfigError as error:
        for line in str(error).split("\n"):
            assert line.startswith(str(path))
            assert line.isprintable()
