from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from tiny_engine import CLASSES, SIDE, tiny_model

from edgexception.agent.onnx_file import OPEN, ends, operators, profile_shapes
from edgexception.agent.protocol import AgentError

CONTENT = tiny_model().SerializeToString()
QUICK = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def external(name: str = "weight") -> onnx.TensorProto:
    tensor = numpy_helper.from_array(np.zeros((2, 2), np.float32), name)
    onnx.external_data_helper.set_external_data(tensor, "../../etc/passwd", length=16)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    return tensor


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def refusal(path: Path) -> str | None:
    try:
        operators(path)
    except AgentError as error:
        return f"{error.kind}: {error}"
    return None


def test_counts_the_operators_with_their_domains(tmp_path: Path) -> None:
    model = tiny_model()
    model.graph.node.add(op_type="QLinearAdd", domain="com.microsoft")
    model.graph.node.add(op_type="Conv", domain="ai.onnx")
    found = operators(written(tmp_path / "m.onnx", model.SerializeToString()))
    assert found == {
        "Cast": 1,
        "Conv": 2,
        "ReduceMean": 1,
        "Transpose": 1,
        "com.microsoft:QLinearAdd": 1,
    }


def test_counts_operators_of_nested_graphs(tmp_path: Path) -> None:
    inner = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "inner", [], [])
    model = tiny_model()
    model.graph.node.append(
        helper.make_node("If", ["c"], ["z"], then_branch=inner, else_branch=inner)
    )
    found = operators(written(tmp_path / "m.onnx", model.SerializeToString()))
    assert found["Relu"] == 2
    assert found["If"] == 1


@pytest.mark.parametrize("place", ["initializer", "constant", "nested", "sparse", "function"])
def test_refuses_tensors_in_other_files_wherever_they_hang(tmp_path: Path, place: str) -> None:
    model = tiny_model()
    constant = helper.make_node("Constant", [], ["k"], value=external())
    if place == "initializer":
        model.graph.initializer.append(external())
    elif place == "constant":
        model.graph.node.append(constant)
    elif place == "nested":
        inner = helper.make_graph([constant], "inner", [], [])
        model.graph.node.append(helper.make_node("Loop", ["n"], ["z"], body=inner))
    elif place == "sparse":
        model.graph.sparse_initializer.add().values.CopyFrom(external())
    else:
        model.functions.add(name="f").node.append(constant)
    with pytest.raises(AgentError, match=r"m\.onnx keeps tensors in another file") as caught:
        operators(written(tmp_path / "m.onnx", model.SerializeToString()))
    assert caught.value.kind == "bad-artifact"


def message(number: int, content: bytes) -> bytes:
    """One field that holds a message, in protobuf's wire format."""
    size, digits = len(content), b""
    while size > 0x7F:
        digits += bytes([size & 0x7F | 0x80])
        size >>= 7
    return bytes([number << 3 | 2]) + digits + bytes([size]) + content


def test_refuses_a_bomb_of_nested_graphs(tmp_path: Path) -> None:
    """Deeper than the onnx package itself would write: graph in attribute in node in graph."""
    graph = message(1, message(4, b"Relu"))
    for _ in range(5000):
        graph = message(1, message(5, message(6, graph)))
    path = written(tmp_path / "m.onnx", message(7, graph))
    assert "deeper than" in str(refusal(path))


@QUICK
@given(st.binary(min_size=1, max_size=300))
def test_random_bytes_end_in_a_result_or_a_named_fault(tmp_path: Path, content: bytes) -> None:
    path = written(tmp_path / "m.onnx", content)
    fault = refusal(path)
    assert fault is None or fault.startswith("bad-artifact: m.onnx ")


@QUICK
@given(st.integers(1, len(CONTENT) - 1))
def test_a_truncated_model_never_gains_operators(tmp_path: Path, size: int) -> None:
    path = written(tmp_path / "m.onnx", CONTENT[:size])
    fault = refusal(path)
    if fault is None:
        # Cut between two fields of the outermost message: what remains is a whole graph.
        assert sum(operators(path).values()) == 4
    else:
        assert fault.startswith("bad-artifact: m.onnx ")


def test_ends_are_read_with_types_and_open_sizes(tmp_path: Path) -> None:
    for batch, size in (("batch", OPEN), (3, 3)):
        onnx.save(tiny_model(batch), tmp_path / "model.onnx")
        assert ends(tmp_path / "model.onnx") == (
            [("images", "uint8", (size, SIDE, SIDE, 3))],
            [("logits", "float32", (size, CLASSES))],
        )


def test_a_dynamic_batch_wants_one_open_size(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    model = tiny_model("batch")
    onnx.save(model, path)
    assert profile_shapes(path, None) is None
    assert profile_shapes(path, (1, 4, 8)) == tuple((n, SIDE, SIDE, 3) for n in (1, 4, 8))
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "height"
    for refused in (model, tiny_model(4)):
        onnx.save(refused, path)
        with pytest.raises(AgentError, match="that one size must be open"):
            profile_shapes(path, (1, 4, 8))


@QUICK
@given(st.data())
def test_ends_of_a_mangled_model_are_read_or_refused(data: st.DataObject) -> None:
    content = bytearray(CONTENT)
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        path.write_bytes(content)
        with contextlib.suppress(AgentError):
            for end in (*ends(path)[0], *ends(path)[1]):
                assert [type(part) for part in end] == [str, str, tuple]
