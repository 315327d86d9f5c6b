"""The log probabilities of drawn tokens are those of the logits as they are."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gllm_ray.messages import SamplingParams
from gllm_ray.model import logprobs
from gllm_ray.model.logprobs import MIN_LOGPROB, find_logprobs

VOCAB_SIZE = 33


@given(
    nums=st.lists(st.none() | st.integers(0, 40), min_size=1, max_size=9),
    temperature=st.sampled_from([0.0, 0.3, 2.0]),
    workspace=st.sampled_from([1, 3 * VOCAB_SIZE, 2**22]),
    seed=st.integers(0, 99),
)
def test_each_row_that_asks_gets_its_own_whatever_the_others_do(nums, temperature, workspace, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(nums), VOCAB_SIZE, generator=generator) * 5
    tokens = torch.randint(VOCAB_SIZE, (len(nums),), generator=generator).tolist()
    params = [SamplingParams(temperature=temperature, top_k=1, num_logprobs=num) for num in nums]
    before = logits.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logprobs, "_MAX_WORKSPACE", workspace)
        found = find_logprobs(logits, tokens, params)
    assert torch.equal(logits, before)
    if set(nums) == {None}:
        assert found == ()
        return
    expected = torch.log(torch.softmax(logits.double(), dim=-1))
    assert len(found) == len(nums)
    for row, (num, told) in enumerate(zip(nums, found, strict=True)):
        if num is None:
            assert told is None
            continue
        assert told.logprob == pytest.approx(expected[row, tokens[row]].item(), abs=1e-5)
        best = expected[row].argsort(descending=True)[:num].tolist()
        assert [token_id for token_id, _ in told.top] == best
        for token_id, logprob in told.top:
            assert logprob == pytest.approx(expected[row, token_id].item(), abs=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_cannot_spell_never_come_out(bad):
    logits = torch.zeros(2, VOCAB_SIZE)
    logits[0, 3] = bad
    asks = SamplingParams(num_logprobs=2)
    broken, whole = find_logprobs(logits, [3, 3], [asks, asks])
    assert broken.logprob == MIN_LOGPROB
    assert all(math.isfinite(logprob) for _, logprob in broken.top)
    assert whole.logprob == pytest.approx(-math.log(VOCAB_SIZE))
