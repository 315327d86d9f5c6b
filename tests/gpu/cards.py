"""Where the tests of this folder can run."""

import pytest
import torch

needs_gpu = pytest.mark.skipif(torch.cuda.device_count() < 1, reason="torch finds no GPU")
needs_two_gpus = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="torch finds fewer than two GPUs"
)
CARD = torch.device("cuda", 0)
