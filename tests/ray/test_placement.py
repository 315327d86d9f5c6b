from pathlib import Path

from gllm_ray.bundles import bundles
from tests.pipelines import make_service_config


def test_a_stage_on_cpu_reserves_its_cpus_after_the_bundle_of_replica_and_scheduler() -> None:
    config = make_service_config(Path("m"), num_stages=2, cpus_per_stage=1.5)
    owner, *stages = bundles(config)
    assert list(owner) == ["CPU"]
    assert 0 < owner["CPU"] < 1
    assert stages == [{"CPU": 1.5}, {"CPU": 1.5}]


def test_a_stage_on_a_gpu_reserves_its_share_of_the_wanted_type() -> None:
    config = make_service_config(
        Path("m"), num_stages=3, device="cuda", gpus_per_stage=0.5, accelerator_type="L40S"
    )
    stage = {"CPU": 1.0, "GPU": 0.5, "accelerator_type:L40S": 0.001}
    assert bundles(config)[1:] == [stage] * 3
