"""The searches by blocks against torch's own."""

import pytest
import torch

from qpass.runtime.search import BLOCK, largest, largest_few


@pytest.mark.parametrize("vocabulary", [1, 5, BLOCK, BLOCK + 1, 4 * BLOCK, 5 * BLOCK - 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_largest_is_argmax_with_ties_infinities_and_nan(vocabulary, dtype):
    logits = torch.randint(-3, 4, (50, 2, vocabulary), generator=torch.Generator().manual_seed(4)).to(dtype)
    logits[10:20] = -torch.inf
    logits[20:30, :, -1] = torch.inf
    logits[30:40, :, vocabulary // 2] = torch.nan
    assert torch.equal(largest(logits), logits.argmax(-1))


@pytest.mark.parametrize("vocabulary", [3, 5 * BLOCK, 40 * BLOCK + 7, 600 * BLOCK - 1])
@pytest.mark.parametrize("k", [1, 10, BLOCK, 200])
def test_the_largest_few_are_topk(vocabulary, k):
    logits = torch.randn(6, vocabulary, generator=torch.Generator().manual_seed(5))
    logits[1] = logits[1].round()  # ties
    logits[2, 2:] = -torch.inf
    logits[3, -1] = torch.inf
    scores, index = largest_few(logits, k)
    assert torch.equal(scores, logits.topk(min(k, vocabulary)).values)
    assert torch.equal(logits.gather(1, index), scores)
