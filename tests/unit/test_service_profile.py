"""Profiles of a real model: what is measured, and what is made of it."""

import json
from itertools import pairwise
from random import Random

import pytest

from gllm_ray.bench.profile_grid import PipelineLimits, ProfilePoint, Span, profile_grid
from gllm_ray.bench.service_profile import calibrate, profile_service, service_layout
from gllm_ray.cli import main
from gllm_ray.scheduling.calibrated_cost_model import CalibratedCostModel
from gllm_ray.scheduling.load import StepLoad
from gllm_ray.simulation.measured import MeasuredCost
from gllm_ray.simulation.pipeline_layout import PipelineLayout
from gllm_ray.simulation.stage_profile import StageProfile, StageSample, parse_stage_profile
from tests.pipelines import make_service_config
from tests.unit.simulation.tiny import SHAPE

LIMITS = PipelineLimits(
    max_decodes=48, max_batch_tokens=200, max_model_len=128, num_blocks=1000, block_size=4
)


def grid(**limits):
    return profile_grid(
        PipelineLimits(**({name: getattr(LIMITS, name) for name in LIMITS.__slots__} | limits))
    )


def test_a_grid_keeps_every_limit_and_reaches_each():
    points = grid()
    loads = [point.load for point in points]
    assert max(load.num_decodes for load in loads) == 48
    assert max(load.num_tokens for load in loads) == 200
    assert min(load.num_tokens for load in loads) == 1
    ends = [item.end for point in points for item in point.batch(0, 4).sequences]
    assert max(ends) == 128
    assert any(load.num_decodes and load.num_prefill_tokens for load in loads)
    assert all(len(point.decodes) == len(set(point.decodes)) for point in points if point.chunks)
    assert any(len(point.chunks) == 4 and len(set(point.chunks)) == 4 for point in points)
    assert any(len(point.chunks) == 1 and point.chunks[0].start for point in points)
    assert len(set(points)) == len(points)


def test_no_point_takes_more_kv_blocks_than_there_are():
    def blocks(point):
        tables = [item.block_table for item in point.batch(0, 4).sequences]
        assert len(set(sum(tables, ()))) == sum(map(len, tables)) == point.num_blocks(4)
        return point.num_blocks(4)

    few = grid(num_blocks=100)
    assert max(map(blocks, few)) <= 100
    assert len(few) < len(grid())


def test_the_batch_of_a_point_has_its_load():
    for point in grid():
        items = point.batch(0, 4).sequences
        decodes, chunks = items[: len(point.decodes)], items[len(point.decodes) :]
        assert all(len(item.token_ids) == 1 for item in decodes)
        assert point.load == StepLoad(
            len(decodes),
            sum(item.end for item in decodes),
            sum(len(item.token_ids) for item in chunks),
            sum(len(item.token_ids) * item.end for item in chunks),
        )


def test_a_grid_goes_from_coarse_to_fine_over_the_rows():
    rows = list(dict.fromkeys(point.load.num_tokens for point in grid()))
    assert rows[:2] == [min(rows), max(rows)]
    halves = sorted(rows).index(rows[2])
    assert abs(halves - len(rows) / 2) <= 1


def padding_time_s(point):
    """A stage whose attention pads decodes to the longest context and loops over chunks."""
    load, contexts = point.load, [decode.end for decode in point.decodes]
    padded_s = 4e-7 * len(contexts) * max(contexts, default=0)
    chunks_s = 3e-4 * len(point.chunks) + 2e-8 * load.num_attention_pairs
    return 1e-3 + 2e-5 * load.num_tokens + padded_s + chunks_s


def test_a_grid_prices_what_differs_within_micro_batches_of_service():
    limits = {"max_decodes": 64, "max_batch_tokens": 512, "max_model_len": 1024}
    samples = [
        StageSample(**point.load._asdict(), stage_times_s=[padding_time_s(point)])
        for point in grid(**limits, num_blocks=4096, block_size=16)
    ]
    profile = StageProfile(
        format="gllm_ray.stage_profile.v1", provenance="a formula", layers=[16], samples=samples
    )
    cost = MeasuredCost.from_profile(PipelineLayout.split(SHAPE, 1), profile)
    rng = Random(0)
    served = [
        ProfilePoint(
            decodes=tuple(Span(rng.randrange(20, 800), 1) for _ in range(rng.choice((4, 16, 64)))),
            chunks=tuple(Span(0, rng.randrange(16, 100)) for _ in range(rng.choice((0, 1, 2, 4)))),
        )
        for _ in range(200)
    ]
    predicted_s = sum(cost.stage_time_s(0, point.load) for point in served)
    assert predicted_s == pytest.approx(sum(map(padding_time_s, served)), rel=0.1)


@pytest.fixture(scope="module")
def service(tiny_llama):
    config = make_service_config(tiny_llama, num_stages=2)
    scheduler = config.scheduler.model_copy(update={"max_decodes": 64})
    return config.model_copy(update={"scheduler": scheduler})


@pytest.fixture(scope="module")
def profile(service):
    progress = []
    profile = profile_service(
        service, max_s=20, repeats=3, on_progress=lambda done, total: progress.append((done, total))
    )
    assert progress[-1][0] == len(profile.samples) <= progress[-1][1]
    return profile


def test_a_profile_survives_its_file_and_says_what_was_measured(profile):
    assert parse_stage_profile(profile.model_dump_json()) == profile
    assert profile.layers == [2, 2]
    for word in ("layers 0-1 | 2-3", "threads a stage: 1", "torch 2", "median of up to 3"):
        assert word in profile.provenance


def test_a_hundred_times_the_rows_take_longer_on_every_stage(profile):
    times = {sample.load: sample.stage_times_s for sample in profile.samples}
    largest = max(times, key=lambda load: load.num_tokens)
    smallest = min(times, key=lambda load: load.num_tokens)
    assert largest.num_tokens >= 100 * smallest.num_tokens
    assert all(a < b for a, b in zip(times[smallest], times[largest], strict=True))


def test_the_cost_measured_from_a_profile_never_falls(service, profile):
    cost = MeasuredCost.from_profile(service_layout(service), profile)
    for stage_id in range(2):
        decodes = [cost.stage_time_s(stage_id, StepLoad(n, n * 50, 0, 0)) for n in range(1, 65)]
        chunks = [cost.stage_time_s(stage_id, StepLoad(0, 0, n, n * n)) for n in range(1, 129)]
        assert decodes[0] > 0
        assert all(a <= b for a, b in pairwise(decodes))
        assert all(a <= b for a, b in pairwise(chunks))


def test_a_calibration_of_a_profile_is_one_that_the_scheduler_reads(service, profile):
    calibration = calibrate(service_layout(service), profile).to_calibration()
    model = CalibratedCostModel.from_calibration(json.loads(json.dumps(calibration)))
    assert model.is_calibrated
    assert 0 < model.stage_time(StepLoad(num_prefill_tokens=512)) < 60
    assert profile.provenance in model.provenance


def test_time_that_is_up_leaves_the_rest_of_the_grid_out(service):
    profile = profile_service(service, max_s=0, repeats=1)
    assert len(profile.samples) == 1
    assert "; 1 of " in profile.provenance


def test_a_layer_split_that_was_chosen_is_that_of_the_layout(tiny_llama):
    config = make_service_config(tiny_llama, num_stages=2, layers=[1, 3])
    assert service_layout(config).layer_ranges == ((0, 1), (1, 4))


def serve_file(tmp_path, model, **pipeline):
    args = {
        "model": {"path": str(model), "max_model_len": 128},
        "pipeline": {"device": "cpu", "num_stages": 2},
        "kv_cache": {"kv_cache_bytes": "4MiB"},
    }
    path = tmp_path / "serve.yaml"
    application = {"import_path": "gllm_ray.serving.app:build_app", "args": args}
    path.write_text(json.dumps({"applications": [application]}), encoding="utf-8")
    return path


def test_the_command_writes_profile_and_calibration(tmp_path, tiny_llama, capsys):
    output, calibration = tmp_path / "profile.json", tmp_path / "calibration.json"
    arguments = ["--output", str(output), "--calibration", str(calibration)]
    arguments += ["--seconds", "3", "--repeats", "2"]
    assert main(["profile", str(serve_file(tmp_path, tiny_llama)), *arguments]) == 0
    profile = parse_stage_profile(output.read_text(encoding="utf-8"))
    assert profile.layers == [2, 2]
    CalibratedCostModel.from_calibration(json.loads(calibration.read_text(encoding="utf-8")))
    captured = capsys.readouterr()
    assert f"wrote {output}" in captured.out
    assert f"{len(profile.samples)} of " in captured.err


def test_the_command_says_why_a_file_cannot_be_profiled(tmp_path, capsys):
    path = serve_file(tmp_path, tmp_path / "nowhere")
    assert main(["profile", str(path), "--output", str(tmp_path / "profile.json")]) == 1
    assert "there is no directory" in capsys.readouterr().err
    assert not (tmp_path / "profile.json").exists()
