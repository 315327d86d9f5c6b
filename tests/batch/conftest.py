import pytest

from gllm_ray.model.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer.load("package://gllm_ray/demo/model")
