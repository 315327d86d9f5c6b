"""`ServiceConfig`: what it takes, and the one line it gives for what it does not."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

import gllm_ray
from gllm_ray.config import (
    FrontEndConfig,
    ModelsConfig,
    SchedulerConfig,
    ServiceConfig,
    args_schema,
    deployment_name,
    parse_service_config,
    resolve_package_path,
)
from gllm_ray.errors import ConfigError
from gllm_ray.policy_config import (
    BalancedConfig,
    ChunkedPrefillConfig,
    PrefillFirstConfig,
    TemporalConfig,
    TokenThrottlingConfig,
)
from gllm_ray.predictor_config import (
    ClassifierPredictorConfig,
    HintPredictorConfig,
    StatisticsPredictorConfig,
)
from gllm_ray.strict_schema import find_mistakes, key_table

POLICIES = "balanced, token_throttling, chunked_prefill, prefill_first or temporal"
CPU_ARGS: dict[str, Any] = {
    "model": {"path": "org/model"},
    "pipeline": {"num_stages": 2, "device": "cpu"},
    "kv_cache": {"kv_cache_bytes": "1GiB"},
}


def with_value(path: str, value: object) -> dict[str, Any]:
    """`CPU_ARGS` with the value at a dotted path replaced; `stages[]` is the first of two."""
    args: dict[str, Any] = {section: dict(values) for section, values in CPU_ARGS.items()}
    *sections, key = path.split(".")
    mapping = args
    for section in sections:
        if section.endswith("[]"):
            mapping = mapping.setdefault(section.removesuffix("[]"), [{}, {}])[0]
        else:
            mapping = mapping.setdefault(section, {})
    mapping[key] = value
    return args


def keys() -> list[tuple[str, str]]:
    """Every key of `args` as `gllm-ray keys` lists them, each with the member it belongs to."""
    cells = [row.split("|")[1].strip() for row in key_table(ServiceConfig).splitlines()[2:]]
    return [(cell.split("`")[1], cell.partition("` of ")[2]) for cell in cells]


def with_key(key: tuple[str, str], value: object) -> dict[str, Any]:
    """`CPU_ARGS` with the value of a key, and the name of the member it belongs to."""
    path, member = key
    args = with_value(path, value)
    if member:
        args["scheduler"][path.split(".")[1]]["name"] = member
    return args


BYTES = "must be a positive number of bytes or text such as 512MiB"
OTHERS = "must be a resource of the cluster's own; see cpus_per_stage and gpus_per_stage"
MISTAKES = [
    ("pipeline.num_stages", 0, "=0: must be an integer from 1 to 256"),
    ("pipeline.num_stages", 257, "=257: must be an integer from 1 to 256"),
    ("pipeline.num_stages", "2", "='2': must be an integer from 1 to 256"),
    ("pipeline.num_stages", 2.0, "=2.0: must be an integer from 1 to 256"),
    ("pipeline.num_stages", True, "=true: must be an integer from 1 to 256"),
    ("pipeline.num_stages", None, "=null: must be an integer from 1 to 256"),
    ("pipeline.layers", [1, 0], "=[1, 0]: must be auto, or a list, each item an integer >= 1"),
    ("pipeline.layers", "even", "='even': must be auto, or a list, each item an integer >= 1"),
    ("pipeline.layers", [4, 4, 4], "=[4, 4, 4]: must list num_stages=2 stages, not 3"),
    ("pipeline.device", "gpu", "='gpu': must be cuda or cpu"),
    ("pipeline.gpus_per_stage", 1.5, "=1.5: must be a number > 0 and <= 1"),
    ("pipeline.gpus_per_stage", 0.5, "=0.5: must be left out when device is cpu"),
    ("pipeline.gpus_per_stage", 1.0, "=1.0: must be left out when device is cpu"),
    ("pipeline.accelerator_type", "L40S", "='L40S': must be left out when device is cpu"),
    ("pipeline.cpus_per_stage", float("inf"), "=inf: must be finite: a number > 0"),
    ("pipeline.max_in_flight", 0, "=0: must be an integer >= 1, or null"),
    ("pipeline.ring", 1, "=1: must be true or false"),
    (
        "pipeline.activation_transport",
        "nccl",
        "='nccl': must be auto, gloo or object_store when device is cpu",
    ),
    (
        "pipeline.activation_transport",
        "cuda_ipc",
        "='cuda_ipc': must be auto, gloo or object_store when device is cpu",
    ),
    ("pipeline", None, "=null: must be a mapping"),
    ("pipeline", [2], "=[2]: must be a mapping"),
    ("model.path", "", "='': must be text that is not empty"),
    ("model.path", "package://x", "='package://x': must be package://<package>/<directory>"),
    ("model.dtype", "fp8", "='fp8': must be auto, float32, bfloat16 or float16"),
    ("model.quantization", "fp8", "='fp8': must be int8, or null"),
    ("kv_cache.kv_cache_bytes", "3 gigs", f"='3 gigs': {BYTES}, or null"),
    ("kv_cache.kv_cache_bytes", "infGiB", f"='infGiB': {BYTES}, or null"),
    ("kv_cache.kv_cache_bytes", 0, f"=0: {BYTES}, or null"),
    ("kv_cache.kv_cache_bytes", None, f"=null: {BYTES} when pipeline.device is cpu"),
    ("kv_cache.memory_utilization", 0, "=0: must be a number > 0 and <= 1"),
    ("kv_cache.memory_utilization", 0.5, "=0.5: must be left out when kv_cache_bytes is given"),
    ("kv_cache.memory_utilization", 0.9, "=0.9: must be left out when kv_cache_bytes is given"),
    (
        "scheduler.policy",
        {"name": "token_throttling", "kv_threshold": 1},
        ".kv_threshold=1: must be a number >= 0 and < 1, or adaptive",
    ),
    (
        "scheduler.policy",
        {"name": "token_throttling", "kv_threshold": "low"},
        ".kv_threshold='low': must be a number >= 0 and < 1, or adaptive",
    ),
    ("scheduler.policy.name", "fcfs", f"='fcfs': must be {POLICIES}"),
    (
        "scheduler.policy",
        {"name": "token_throttling", "floor": "top"},
        ".floor='top': must be budget or waiting_term",
    ),
    (
        "scheduler.policy",
        "fcfs",
        f"='fcfs': must be {POLICIES}, or a mapping with that name",
    ),
    (
        "scheduler.policy",
        7,
        f"=7: must be {POLICIES}, or a mapping with that name",
    ),
    (
        "scheduler.length_predictor",
        "median",
        "='median': must be statistics, hint or classifier, or a mapping with that name",
    ),
    (
        "scheduler.length_predictor",
        "classifier",
        ".path: required, but not given; must be text that is not empty",
    ),
    (
        "scheduler.length_predictor",
        {"path": "x.json"},
        "={...}: must be statistics, hint or classifier, or a mapping with that name",
    ),
    ("scheduler.length_log", "", "='': must be text that is not empty, or null"),
    ("scheduler.policy.min_prefill_tokens", 4096, "=4096: must be <= token_budget=2048"),
    (
        "scheduler.policy",
        {"name": "token_throttling", "min_prefill_tokens": 4096},
        ".min_prefill_tokens=4096: must be <= max_prefill_tokens=2048",
    ),
    (
        "scheduler.policy",
        {"name": "balanced", "min_prefill_tokens": 64, "token_budget": 32},
        ".min_prefill_tokens=64: must be <= token_budget=32",
    ),
    ("pipeline.stages", [{}] * 3, "={...}: must list num_stages=2 stages, not 3"),
    (
        "pipeline.stages",
        [{}, {"accelerator_type": "L4"}],
        "[1].accelerator_type='L4': must be left out when device is cpu",
    ),
    (
        "pipeline.stages",
        [{"memory_utilization": 0.5}, {}],
        "[0].memory_utilization=0.5: must be left out when device is cpu",
    ),
    (
        "pipeline.stages",
        [{}, {"memory_utilization": 0.5, "kv_cache_bytes": 4096}],
        "[1].memory_utilization=0.5: must be left out when kv_cache_bytes is given",
    ),
    ("pipeline.resources", {"rack": 0}, ".rack=0: must be a number > 0"),
    (
        "pipeline.resources",
        {"CPU": 2},
        f".CPU=2: {OTHERS}",
    ),
    (
        "pipeline.stages",
        [{}, {"resources": {"GPU": 0.5}}],
        f"[1].resources.GPU=0.5: {OTHERS}",
    ),
    ("deployment.routing", "random", "='random': must be power_of_two or prefix_aware"),
    ("deployment.min_replicas", 2, "=2: must be <= max_replicas=1"),
    (
        "deployment.target_ongoing_requests",
        1025,
        "=1025: must be <= max_ongoing_requests=1024, or no replica is ever added",
    ),
]


@pytest.mark.parametrize(("key", "value", "rest"), MISTAKES)
def test_an_impossible_value_is_one_line_of_key_value_and_range(key, value, rest):
    with pytest.raises(ConfigError) as caught:
        parse_service_config(with_value(key, value))
    assert str(caught.value) == key + rest


@pytest.mark.parametrize("key", keys())
def test_every_key_refuses_a_wrong_type_in_one_line_that_names_it(key):
    is_mapping = key[0].endswith(".resources")
    (line,) = find_mistakes(ServiceConfig, with_key(key, 7 if is_mapping else {"x": 1}))
    given = "7" if is_mapping else "{...}"
    assert line.startswith(f"{key[0].replace('[]', '[0]')}={given}: must be ")


def test_a_missing_key_is_named_with_what_it_allows():
    assert find_mistakes(ServiceConfig, {"model": {}}, "applications[0].args") == [
        "applications[0].args.model.path: required, but not given; must be text that is not empty"
    ]


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("pipeline.num_stage", "did you mean num_stages?"),
        ("modle", "did you mean model?"),
        ("num_stages", "did you mean pipeline.num_stages?"),  # known, but elsewhere
        ("pipeline.kv_cache", "did you mean kv_cache?"),
        ("kv_cache.xyz", "known keys: block_size, memory_utilization, kv_cache_bytes"),
        ("scheduler.policy.token_budgt", "did you mean token_budget?"),
        (
            "scheduler.policy.kv_threshold",  # an option of another policy than the default
            "did you mean scheduler.policy.kv_threshold of token_throttling?",
        ),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(key, suggestion):
    assert find_mistakes(ServiceConfig, with_value(key, 7)) == [
        f"{key}=7: unknown key; {suggestion}"
    ]


def test_an_option_of_another_policy_is_an_unknown_key_that_names_its_policy():
    policy = {"name": "chunked_prefill", "floor": "budget", "token_budgt": 1, "watermark": 1}
    path = "scheduler.policy"
    assert find_mistakes(ServiceConfig, with_value(path, policy)) == [
        f"{path}.watermark=1: must be a number >= 0 and < 1",
        f"{path}.floor='budget': unknown key; did you mean {path}.floor of token_throttling?",
        f"{path}.token_budgt=1: unknown key; did you mean token_budget?",
    ]


def test_a_floor_of_the_waiting_term_is_refused_where_that_term_is_off():
    policy = {"name": "token_throttling", "floor": "waiting_term", "prefill_iterations": None}
    assert find_mistakes(ServiceConfig, with_value("scheduler.policy", policy)) == [
        "scheduler.policy.floor='waiting_term': must be budget when prefill_iterations is null"
    ]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("token_throttling", TokenThrottlingConfig()),
        ("chunked_prefill", ChunkedPrefillConfig()),
        ("prefill_first", PrefillFirstConfig()),
        ("temporal", TemporalConfig()),
        ("balanced", BalancedConfig()),
        ({}, BalancedConfig()),
        ({"overtaking": 0}, BalancedConfig(overtaking=0)),
        ({"name": "chunked_prefill"}, ChunkedPrefillConfig()),
        ({"name": "chunked_prefill", "token_budget": 64}, ChunkedPrefillConfig(token_budget=64)),
    ],
)
def test_a_policy_is_a_name_or_a_mapping_with_options(policy, expected):
    config = parse_service_config(with_value("scheduler.policy", policy))
    assert config.scheduler.policy == expected
    assert parse_service_config(config.model_dump(exclude_unset=True)) == config
    assert ServiceConfig.model_validate_json(config.model_dump_json(exclude_unset=True)) == config


@pytest.mark.parametrize(
    ("predictor", "expected"),
    [
        ("statistics", StatisticsPredictorConfig()),
        ("hint", HintPredictorConfig()),
        ({"name": "classifier", "path": "x.json"}, ClassifierPredictorConfig(path="x.json")),
    ],
)
def test_a_length_predictor_is_a_name_or_a_mapping_with_options(predictor, expected):
    config = parse_service_config(with_value("scheduler.length_predictor", predictor))
    assert config.scheduler.length_predictor == expected
    assert parse_service_config(config.model_dump(exclude_unset=True)) == config


@pytest.mark.parametrize(
    ("policy", "max_batch_tokens"),
    [
        (TokenThrottlingConfig(), 2048 + 512),
        (ChunkedPrefillConfig(token_budget=2048), 2048),
        (ChunkedPrefillConfig(token_budget=64), 512),
        (TemporalConfig(), 512),
        (TemporalConfig(prefill_tokens=1024), 1024),
    ],
)
def test_the_memory_of_a_stage_is_sized_for_the_largest_micro_batch(policy, max_batch_tokens):
    assert SchedulerConfig(policy=policy).max_batch_tokens == max_batch_tokens


def test_every_mistake_has_its_own_line():
    args = {"model": {"path": 1}, "pipeline": {"num_stages": 0, "layers": [0]}, "x": 1}
    assert [line.split("=")[0] for line in find_mistakes(ServiceConfig, args)] == [
        "model.path",
        "pipeline.num_stages",
        "pipeline.layers",
        "x",
    ]


@pytest.mark.parametrize("key", ["hf_token", "api_key", "apiKey", "client_secret", "password"])
def test_a_secret_is_never_echoed(key):
    for value in ("s3cr3t", ["s3cr3t"], {"x": "s3cr3t"}):
        (line,) = find_mistakes(ServiceConfig, with_value(f"model.{key}", value))
        assert "s3cr3t" not in line


def test_what_a_misplaced_mapping_holds_is_never_echoed():
    (line,) = find_mistakes(ServiceConfig, with_value("model.path", [{"hf_token": "s3cr3t"}]))
    assert line == "model.path=[{...}]: must be text that is not empty"


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=200) | st.dates(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=99) | st.integers() | st.booleans(), inner, max_size=4)
    ),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(
        [("model", ""), ("scheduler.policy", ""), *keys(), ("pipeline.x", "")],
    ),
    ANYTHING,
)
def test_whatever_the_value_mistakes_are_bounded_single_lines(key, value):
    for line in find_mistakes(ServiceConfig, with_key(key, value)):
        assert line.isprintable()
        assert len(line) < 500


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("1B", 1), ("512MiB", 512 * 2**20), ("1.5 GiB", 3 * 2**29), ("2TiB", 2**41), (4096, 4096)],
)
def test_bytes_are_read_in_binary_units(text, num_bytes):
    config = parse_service_config(with_value("kv_cache.kv_cache_bytes", text))
    assert config.kv_cache.kv_cache_bytes == num_bytes


def test_a_configuration_survives_a_round_trip_and_cannot_be_changed():
    config = parse_service_config(with_value("pipeline.layers", [3, 5]))
    assert config.pipeline.layers == (3, 5)
    given = config.model_dump(exclude_unset=True)
    assert parse_service_config(given) == config
    assert ServiceConfig.model_validate_json(json.dumps(given)) == config
    with pytest.raises(ValidationError, match="frozen"):
        config.pipeline.num_stages = 3


def test_a_gpu_needs_no_key_but_the_model():
    config = parse_service_config({"model": {"path": "org/model"}})
    assert (config.pipeline.device, config.pipeline.num_stages) == ("cuda", 1)
    assert config.model.name == "org/model"


@pytest.mark.parametrize("path", ["./model", "/model", "~/model", "models/existing"])
def test_a_revision_of_a_directory_is_refused(path, tmp_path, monkeypatch):
    (tmp_path / "models" / "existing").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    args = with_value("model.revision", "main")
    assert find_mistakes(ServiceConfig, args) == []
    args["model"]["path"] = path
    assert find_mistakes(ServiceConfig, args) == [
        "model.revision='main': must be left out when path is a directory"
    ]


def test_nccl_needs_a_whole_gpu_for_each_stage():
    pipeline = {"activation_transport": "nccl"}
    args = {"model": {"path": "org/model"}, "pipeline": pipeline}
    assert find_mistakes(ServiceConfig, args) == []
    pipeline["gpus_per_stage"] = 0.5
    (line,) = find_mistakes(ServiceConfig, args)
    assert line.startswith("pipeline.activation_transport='nccl': must be auto, cuda_ipc, gloo or")
    assert "gpus_per_stage=0.5" in line


def test_cuda_ipc_needs_a_gpu_that_stages_may_share():
    pipeline = {"activation_transport": "cuda_ipc", "gpus_per_stage": 0.5}
    args = {"model": {"path": "org/model"}, "pipeline": pipeline}
    assert find_mistakes(ServiceConfig, args) == []
    pipeline["gpus_per_stage"] = 1
    (line,) = find_mistakes(ServiceConfig, args)
    assert line.startswith("pipeline.activation_transport='cuda_ipc': must be auto, nccl, gloo or")
    assert "gpus_per_stage=1" in line


@pytest.mark.parametrize("option", ["enforce_eager", "compile"])
def test_what_is_for_gpus_alone_is_refused_on_cpu(option):
    args = {"model": {"path": "org/model", option: True}}
    assert find_mistakes(ServiceConfig, args) == []
    args |= {"pipeline": {"device": "cpu"}, "kv_cache": {"kv_cache_bytes": "1GiB"}}
    assert find_mistakes(ServiceConfig, args) == [
        f"model.{option}=true: must be left out when pipeline.device is cpu"
    ]


def test_quantized_weights_are_for_cpu_alone():
    args = {"model": {"path": "org/model", "quantization": "int8"}}
    assert find_mistakes(ServiceConfig, args) == [
        "model.quantization='int8': must be null when pipeline.device is cuda"
    ]
    args |= {"pipeline": {"device": "cpu"}, "kv_cache": {"kv_cache_bytes": "1GiB"}}
    assert find_mistakes(ServiceConfig, args) == []


@pytest.mark.parametrize("name", ["triton", "xformers", "flash3", "torch", "cpp", "auto"])
def test_attention_must_be_made_for_the_device(name):
    args = {"model": {"path": "org/model", "attention_backend": name}}
    refusal = f"model.attention_backend={name!r}: must be auto, "
    expected = [f"{refusal}triton, xformers, flash3 or torch when pipeline.device is cuda"]
    assert find_mistakes(ServiceConfig, args) == (expected if name == "cpp" else [])
    args |= {"pipeline": {"device": "cpu"}, "kv_cache": {"kv_cache_bytes": "1GiB"}}
    expected = [f"{refusal}cpp or torch when pipeline.device is cpu"]
    is_for_gpu = name in ("triton", "xformers", "flash3")
    assert find_mistakes(ServiceConfig, args) == (expected if is_for_gpu else [])


def test_a_package_path_is_a_directory_of_the_installed_package():
    assert resolve_package_path("package://gllm_ray/demo/model") == str(
        Path(gllm_ray.__file__).parent / "demo" / "model"
    )
    assert resolve_package_path("org/model") == "org/model"
    with pytest.raises(ConfigError, match="no_such_package"):
        resolve_package_path("package://no_such_package/model")


def test_the_documentation_lists_exactly_the_keys_of_the_schema():
    readme = Path(__file__).parents[2] / "configs" / "README.md"
    text = readme.read_text(encoding="utf-8")
    assert key_table(ServiceConfig) in text
    assert key_table(FrontEndConfig) in text


@pytest.mark.parametrize(
    ("args", "mistake"),
    [
        ({"models": []}, "models=[]: must list at least one"),
        ({"frontend": {}}, "models: required, but not given"),
        ({"models": [{"model": {}}]}, "models[0].model.path: required, but not given"),
        (
            {"models": [{"model": {"path": "org/a"}, "pipline": {}}]},
            "models[0].pipline={}: unknown key; did you mean pipeline?",
        ),
        (
            {"models": [{"model": {"path": "org/a"}}, {"model": {"path": "org_a"}}]},
            "models[1].model.served_name='org_a': its deployment 'org_a' must differ from that",
        ),
        (
            {"models": [{"model": {"path": "FrontEnd"}}]},
            "models[0].model.served_name='FrontEnd': its deployment 'FrontEnd' must differ",
        ),
        (
            {"models": [{"model": {"path": "org/a"}}], "frontend": {"max_losses": 0}},
            "frontend.max_losses=0: must be an integer >= 1",
        ),
    ],
)
def test_a_mistake_among_several_models_is_told_with_its_place(args, mistake):
    (line,) = find_mistakes(args_schema(args), args)
    assert line.startswith(mistake)


def test_the_deployments_of_models_are_named_as_they_are_served():
    args = {"models": [{"model": {"path": "org/model 1.5"}}, {"model": {"path": "b"}}]}
    config = ModelsConfig.model_validate(args)
    assert [deployment_name(model) for model in config.models] == ["org_model_1.5", "b"]
