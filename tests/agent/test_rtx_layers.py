"""The listing of kernels: as TensorRT-RTX 1.7.1 writes it, and anything else."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from edgexception.agent.runtimes.rtx_layers import START, counts, inspection, read_kernels

# As recorded, less some of the tensors' strides.
LISTING = START + (
    "Name: block2_sepconv1_depthwise_U110_myl0_5, LayerType: correlation, Inputs: [ { Name: "
    "__mye3186block2_sepconv1_depthwise.1_7_myl0, Dimensions: [1,32,17,17], Strides: "
    "[9248,1,544,32], StrideOrder: [3,0,2,1], Datatype: Int8, Format: (NHWC) Channel major format "
    "}], Constants: [ { Name: __mye6077_dconst_myl0, Dimensions: [8,4,3,3], Strides: [36,1,12,4], "
    "StrideOrder: [3,0,2,1], Datatype: Int8, Format: (NHWC) Channel major format }, { Name: "
    "__mye6087_dconst_myl0, Dimensions: [1,8,1,1], Strides: [8,1,8,8], StrideOrder: [3,0,2,1], "
    "Datatype: Float, Format: (Arbitrary) Format with stride order = [3,0,2,1] }], Outputs: [ { "
    "Name: __myln_k_arg__bb1_9_myl0, Dimensions: [1,8,17,17], Strides: [2312,1,136,8], "
    "StrideOrder: [3,0,2,1], Datatype: Float, Format: (NHWC) Channel major format }], TacticName: "
    "__myelin_CASK_STUB, StreamId: 0, Metadata: [ONNX Layer: block2_sepconv1_depthwise][ONNX "
    "Layer: block2_sepconv1_act_dq]\n"
    "Name: __mye23619_myl0_5, LayerType: signal, Inputs: [], Constants: [], Outputs: [], "
    "TacticName: , StreamId: 0, EventId: 1, Metadata: \n"
    "Name: __myl_CastTran_myl0_0, LayerType: kgen, Inputs: [ { Name: images, Dimensions: "
    "[1,40,40,3], Strides: [4800,120,3,1], StrideOrder: [3,2,1,0], Datatype: UInt8, Format: "
    "(Linear) Row major linear format }], Constants: [], Outputs: [ { Name: x.1_2_myl0, "
    "Dimensions: [1,3,40,40], Strides: [4800,1,120,3], StrideOrder: [3,0,2,1], Datatype: Half, "
    "Format: (NHWC) Channel major format }], TacticName: __myl_CastTran_0x55, StreamId: 0, "
    "Metadata: [ONNX Layer: pixels]\n\nI/O Tensors:\n Name: images\n"
)


def test_a_recorded_listing() -> None:
    kernels = read_kernels(LISTING, 1)
    assert kernels is not None
    assert [kernel["kind"] for kernel in kernels] == ["correlation", "kgen"]
    assert kernels[0]["layers"] == ["block2_sepconv1_depthwise", "block2_sepconv1_act_dq"]
    assert kernels[0]["constant"] == [
        {"type": "Int8", "bytes": 288},
        {"type": "Float", "bytes": 32},
    ]
    assert counts(kernels) == {"correlation Int8 to Float": 1, "kgen UInt8 to Half": 1}
    found = inspection(kernels)
    assert found["read_bytes"] == 32 * 17 * 17 + 40 * 40 * 3 + 288 + 32
    assert found["written_bytes"] == 4 * 8 * 17 * 17 + 2 * 3 * 40 * 40
    assert found["constant_bytes"] == 288 + 32


def test_an_open_batch_is_counted_as_the_one_that_is_asked_for() -> None:
    """Sizes that are computed at each call have a line that is no kernel."""
    computed = (
        "Name: __mye2391_0_myl0_0, LayerType: shape_call, Inputs: [], Constants: [], Outputs: [], "
        "TacticName: , StreamId: 0, Metadata: \n"
    )
    text = LISTING.replace(START, START + computed)
    for first in ("[1,32,17,17]", "[1,8,17,17]", "[1,40,40,3]", "[1,3,40,40]"):
        text = text.replace(first, first.replace("[1,", "[-1,"))
    fixed, opened = read_kernels(LISTING, 1), read_kernels(text, 3)
    assert fixed is not None
    assert opened is not None
    for a, b in zip(fixed, opened, strict=True):
        assert b["constant"] == a["constant"]
        for name in ("read", "written"):
            assert b[name] == [{**tensor, "bytes": 3 * tensor["bytes"]} for tensor in a[name]]


@given(cut=st.integers(0, len(LISTING)), junk=st.text(max_size=20))
def test_anything_else_is_understood_wholly_or_not_at_all(cut: int, junk: str) -> None:
    whole: Any = read_kernels(LISTING, 1)
    for text in (LISTING[:cut], LISTING[:cut] + junk + LISTING[cut:], junk, START + junk):
        kernels = read_kernels(text, 1)
        assert kernels is None or 0 < len(kernels) <= len(whole) + 1
        if kernels is not None:
            assert sum(counts(kernels).values()) == len(kernels)
            assert inspection(kernels)["read_bytes"] >= 0


def test_a_type_that_is_not_known_is_not_guessed() -> None:
    assert read_kernels(LISTING.replace("Datatype: Half", "Datatype: FP4"), 1) is None
    assert read_kernels(LISTING.replace(", StreamId: 0", ""), 1) is None
    assert read_kernels(START, 1) is None
    assert read_kernels("", 1) is None
