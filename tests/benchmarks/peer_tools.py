"""Other tools' INT8 of the same float ONNX graph, and what it computes without a saturating kernel.

A peer's graph is an ONNX file with QuantizeLinear and DequantizeLinear, or an OpenVINO IR with
FakeQuantize. Judged as a plan, each is executed in float32 arithmetic:

- ONNX: by ONNX Runtime without any graph optimization, where QuantizeLinear and DequantizeLinear
  are operators of their own and a convolution between them computes in float32.
- OpenVINO: every FakeQuantize is first replaced by its definition (OpenVINO's operator
  specification, FakeQuantize-1: clamp, scale, round half to even, scale back) in elementary
  operators. The plugin's low-precision transformations look for FakeQuantize and find none; that no
  layer is executed in INT8 then is checked.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnxruntime
import openvino
import torch
from numpy.typing import NDArray
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process
from openvino import opset13 as ops

from edgexception.agent import manifest
from edgexception.agent.runtimes import Options, load
from edgexception.agent.runtimes.openvino import _properties
from edgexception.imageset import ImageSet

os.environ["NNCF_CI"] = "1"  # no telemetry
METHODS = (CalibrationMethod.MinMax, CalibrationMethod.Entropy, CalibrationMethod.Percentile)
BATCH = 16
COMPUTING = ("Convolution", "FullyConnected", "MatMul")
HERE = Path(__file__).parent

# ModelOpt 0.47 with what its `onnx` extra asks for, except the GPU builds: onnxruntime instead of
# onnxruntime-gpu, no cupy. 1.4 GB on disk. torch is the very build that runs here: `torch` alone
# would bring CUDA's libraries from PyPI.
MODELOPT = (
    "nvidia-modelopt==0.47.0", "onnx==1.21.0", "onnxruntime==1.24.4", "onnx-graphsurgeon==0.6.1",
    "onnxconverter-common==1.16.0", "onnxslim==0.1.98", "polygraphy==0.53.6", "onnxscript==0.7.2",
    "lief==1.0.0", "ml_dtypes==0.6.0", "cppimport==26.4.17",
)  # fmt: skip


class Peer(NamedTuple):
    """One quantized graph."""

    name: str
    graph: Path


class Reader(CalibrationDataReader):
    """Calibration images one by one, as the exported graph takes them."""

    def __init__(self, images: ImageSet) -> None:
        self.batches: Iterator[np.ndarray] = images.batches(1)

    def get_next(self) -> dict[str, np.ndarray] | None:
        """Return the next input, or None at the end."""
        batch = next(self.batches, None)
        return None if batch is None else {"images": batch}


# --- the tools ------------------------------------------------------------------------------------


def onnxruntime_peers(
    source: Path, images: ImageSet, out: Path, *, symmetric: bool, weight_bits: int = 8
) -> Iterator[Peer]:
    """Quantize with each calibration method of `quantize_static`, weights per channel.

    Symmetric as TensorRT takes it: int8 activations around 0 and float biases. Otherwise uint8
    activations, which ONNX Runtime's own kernels want, and without VNNI weights of 7 bits, as that
    tool advises. Its `entropy` keeps all activations in memory: 7.5 GB of 135 images at 150x150.
    """
    prepared = out / "prepared.onnx"
    quant_pre_process(source, prepared)
    kind = "s8s8" if symmetric else "u8s8"
    for method in METHODS:
        path = out / f"ort-{kind}-{method.name}.onnx"
        quantize_static(
            prepared,
            path,
            Reader(images),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=weight_bits == 7,
            activation_type=QuantType.QInt8 if symmetric else QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=method,
            extra_options={
                "ActivationSymmetric": symmetric,
                "WeightSymmetric": True,
                "QuantizeBias": not symmetric,
            },
        )
        yield Peer(f"ONNX Runtime {kind} {method.name}", path)


def nncf_peers(source: Path, images: ImageSet, out: Path, *, symmetric: bool) -> Iterator[Peer]:
    """Quantize with NNCF on OpenVINO: with its symmetric preset, or with the mixed one.

    The symmetric preset takes uint8 after a ReLU, which TensorRT does not take, and NNCF
    refuses to be told otherwise (`signedness_to_force` is "incompatible with HW capabilities"). So
    the symmetric network comes twice: as it is, and with these ranges written on the int8 grid.
    """
    import nncf  # noqa: PLC0415 - after NNCF_CI is set

    presets = nncf.QuantizationPreset
    network = nncf.quantize(
        openvino.Core().read_model(source),
        nncf.Dataset(list(images.batches(1))),
        preset=presets.PERFORMANCE if symmetric else presets.MIXED,
        subset_size=len(images),
    )
    name = "symmetric" if symmetric else "mixed"
    path = out / f"nncf-{name}.xml"
    openvino.save_model(network, path, compress_to_fp16=False)
    yield Peer(f"NNCF on OpenVINO, {name}", path)
    if symmetric:
        openvino.save_model(_signed(path), out / "nncf-int8.xml", compress_to_fp16=False)
        yield Peer("NNCF on OpenVINO, its ranges as int8", out / "nncf-int8.xml")


def _signed(path: Path) -> openvino.Model:
    """Read an IR and give every uint8 activation the int8 grid with the same greatest value."""
    model = openvino.Core().read_model(path)
    for node in model.get_ops():
        if node.get_type_name() != "FakeQuantize" or node.get_attributes()["levels"] != 256:
            continue
        ends = [node.input_value(index).get_node() for index in range(1, 5)]
        low, high = (end.get_data() for end in ends[:2])
        if low.size == 1 and low.item() == 0.0:
            for index in (1, 3):
                node.input(index).replace_source_output(
                    ops.constant(-high * np.float32(128 / 127)).output(0)
                )
    return model


def modelopt_peers(source: Path, images: ImageSet, out: Path, home: Path) -> Iterator[Peer]:
    """Quantize with both INT8 calibration methods of ModelOpt, in its own environment `home`.

    The environment is made when it is not there. Raises CalledProcessError where that fails.
    """
    python = home / "bin/python"
    ready = home / ".ready"
    if not ready.exists():
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, f"torch=={torch.__version__}", *MODELOPT], check=True)
        ready.touch()
    photos = out / "calibration.npy"
    images.write_npy(photos)
    for method in ("entropy", "max"):
        path = out / f"modelopt-{method}.onnx"
        script = str(HERE / "peer_modelopt.py")
        command = [str(python), "-I", script, str(source), str(photos), str(path), method]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"ModelOpt failed: {done.stderr[-2000:]}")
        yield Peer(f"ModelOpt ONNX {method}", path)


# --- what the graphs compute ----------------------------------------------------------------------


def logits_in_float(graph: Path, images: NDArray[np.uint8], threads: int) -> NDArray[np.float32]:
    """Execute a quantized graph in float32 arithmetic on uint8 images (N, H, W, 3)."""
    batches = (images[first : first + BATCH] for first in range(0, len(images), BATCH))
    if graph.suffix == ".xml":
        compiled = openvino.Core().compile_model(
            in_elementary_operators(graph), "CPU", _properties(Options(BATCH, threads))
        )
        wrong = {
            kind: how for kind, how in _executed(compiled) if kind in COMPUTING and how != "f32"
        }
        if wrong:
            raise RuntimeError(f"{graph}: executes {wrong}, not float32")
        return np.concatenate([next(iter(compiled([batch]).values())) for batch in batches])
    settings = onnxruntime.SessionOptions()
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    settings.intra_op_num_threads = threads
    settings.log_severity_level = 3
    session = onnxruntime.InferenceSession(graph, settings, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(["logits"], {"images": batch})[0] for batch in batches])


def _executed(compiled: openvino.CompiledModel) -> Iterator[tuple[str, str]]:
    """Yield kind and precision of every layer of a compiled model."""
    for node in compiled.get_runtime_model().get_ops():
        facts = node.get_rt_info()
        yield facts["layerType"].astype(str), facts["runtimePrecision"].astype(str)


def in_elementary_operators(graph: Path) -> openvino.Model:
    """Read an IR and write every FakeQuantize in it as what it is defined to compute.

    INT8 constants become float32: a dense layer would else quantize its input to match them.
    """
    model = openvino.Core().read_model(graph)
    for node in model.get_ops():
        if node.get_type_name() == "Convert":
            constant = node.input_value(0).get_node()
            if constant.get_type_name() == "Constant":
                weights = ops.constant(constant.get_data().astype(np.float32))
                node.output(0).replace(weights.output(0))
        if node.get_type_name() != "FakeQuantize":
            continue
        value, low, high, out_low, out_high = (port.get_source_output() for port in node.inputs())
        last = ops.constant(np.float32(node.get_attributes()["levels"] - 1))
        share = ops.divide(
            ops.subtract(ops.maximum(ops.minimum(value, high), low), low), ops.subtract(high, low)
        )
        number = ops.round(ops.multiply(share, last), "half_to_even")
        width = ops.subtract(out_high, out_low)
        result = ops.add(ops.multiply(ops.divide(number, last), width), out_low)
        node.output(0).replace(result.output(0))
    return model


def openvino_engine(graph: Path, threads: int, folder: Path) -> Path:
    """Compile an IR for this processor, as the agent compiles an ONNX file; return the engine."""
    core = openvino.Core()
    model = core.read_model(graph)
    shape = model.inputs[0].partial_shape
    shape[0] = 1
    model.reshape({model.inputs[0]: shape})
    folder.mkdir()
    exported = io.BytesIO()
    options = Options(1, threads)
    core.compile_model(model, "CPU", _properties(options)).export_model(exported)
    (folder / "engine.blob").write_bytes(exported.getbuffer())
    record = {
        "runtime": "openvino", "engine": "engine.blob", "versions": {}, "settings": {},
        "batch": 1, "threads": threads,
    }  # fmt: skip
    manifest.write(folder, graph, options, record, load("openvino").version())
    return folder / "engine.blob"


def quantized_convolutions(graph: Path) -> str:
    """Return how many convolutions have a quantized input and quantized weights: "74 of 74"."""
    found = Counter(_of_ir(graph) if graph.suffix == ".xml" else _of_onnx(graph))
    return f"{found[True]} of {found.total()}"


def _of_onnx(path: Path) -> Iterator[bool]:
    graph = onnx.load(path, load_external_data=False).graph
    maker = {name: node.op_type for node in graph.node for name in node.output}
    for node in graph.node:
        if node.op_type == "Conv":
            yield all(maker.get(name) == "DequantizeLinear" for name in node.input[:2])


def _of_ir(path: Path) -> Iterator[bool]:
    for node in openvino.Core().read_model(path).get_ops():
        if "Convolution" in node.get_type_name():
            yield all(_is_quantized(node.input(index)) for index in (0, 1))


def _is_quantized(port: openvino.Input) -> bool:
    """Tell whether a value comes out of a FakeQuantize, or as weights out of an INT8 constant."""
    node = port.get_source_output().get_node()
    while node.get_type_name() in ("Reshape", "Multiply", "Subtract", "Convert"):
        node = node.input(0).get_source_output().get_node()
    constant = node.get_type_name() == "Constant" and node.get_element_type().size == 1
    return constant or node.get_type_name() == "FakeQuantize"
