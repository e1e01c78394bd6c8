"""Which weights are 2:4."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from edgexception.model.sparsity import is_sparse, zeros_of


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 999))
def test_two_zeros_in_every_four_and_not_one_less(rows: int, fours: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(rows, fours, 4, generator=generator).argsort(dim=2) < 2
    weight = (kept * (1 + torch.rand(kept.shape, generator=generator))).view(rows, -1, 1, 1)
    zeros = zeros_of(weight)
    assert zeros is not None
    assert torch.equal(zeros, weight == 0)
    assert is_sparse((100 * weight).to(torch.int8))
    first = int(zeros.flatten().nonzero()[0])
    weight.view(-1)[first] = 1.0
    assert not is_sparse(weight)
    assert zeros_of(weight) is None


def test_other_layers_and_dead_ones_are_none() -> None:
    half = torch.tensor([1.0, 1.0, 0.0, 0.0])
    assert is_sparse(half.view(1, 4, 1, 1))
    assert not is_sparse(half.view(1, 4)), "a dense layer"
    assert not is_sparse(half.view(1, 1, 2, 2)), "a kernel of 2x2"
    assert not is_sparse(half[:3].view(1, 3, 1, 1)), "3 channels"
    assert not is_sparse(torch.zeros(2, 4, 1, 1)), "it may still learn anything"
