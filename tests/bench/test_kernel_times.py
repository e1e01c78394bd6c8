"""Sums over the times of kernels, and the blocks that INT8 makes slower."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from edgexception.bench.kernel_times import REST, Slower, Spent, slower_blocks, spent
from edgexception.device import KernelTime, Profile

DOES = ("int8", "fp32", "quantize", "reorder", "other")
KERNELS = st.builds(
    KernelTime,
    name=st.sampled_from(("block1_conv1", "block14_add_q", "FakeQuantize_7", "avg_pool", "")),
    kind=st.just("k"),
    does=st.sampled_from(DOES),
    ns=st.integers(0, 10**9),
)


def profile(*kernels: tuple[str, str, int]) -> Profile:
    times = [KernelTime(name=name, kind="k", does=does, ns=ns) for name, does, ns in kernels]
    return Profile(calls=3, kernels=times)


def test_times_are_summed_by_block_and_by_what_is_done() -> None:
    found = spent(
        profile(
            ("block1_conv1", "int8", 300_000),
            ("block1_conv1_act_q", "quantize", 100_000),
            ("block11_sepconv1_pointwise,block11_add", "int8", 500_000),
            ("FakeQuantize_19230", "quantize", 100_000),
        )
    )
    assert found.total_ms == 1.0
    assert found.shares == {"int8": 0.8, "quantize": 0.2}
    assert found.blocks == {"block1": 0.4, "block11": 0.5, REST: 0.1}
    assert found.calls == 3


def test_the_block_that_costs_most_comes_first() -> None:
    int8 = Spent(1, 0.0, {}, {"block1": 2.0, "block2": 9.0, "block3": 1.0, REST: 0.5})
    floats = Spent(1, 0.0, {}, {"block1": 1.0, "block2": 6.0, "block3": 1.5})
    assert slower_blocks(int8, floats) == (
        Slower("block2", 9.0, 6.0),
        Slower("block1", 2.0, 1.0),
        Slower(REST, 0.5, 0.0),
    )
    assert slower_blocks(floats, floats) == ()


@given(st.lists(KERNELS, min_size=1, max_size=30))
def test_nothing_is_lost_in_the_sums(kernels: list[KernelTime]) -> None:
    found = spent(Profile(calls=1, kernels=kernels))
    total = sum(kernel.ns for kernel in kernels) / 1e6
    assert abs(sum(found.blocks.values()) - total) <= 1e-9 * max(1.0, total)
    assert found.total_ms == total
    assert not found.shares or abs(sum(found.shares.values()) - 1) < 1e-9
    assert bool(found.shares) == (total > 0)
