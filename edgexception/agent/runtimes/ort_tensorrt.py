"""ONNX Runtime's TensorRT execution provider: TensorRT's engines inside ONNX Runtime.

With none of its precision options (`trt_fp16_enable`, `trt_int8_enable`) set it builds strongly
typed networks (microsoft/onnxruntime pull request 18707), so the types are those of the graph; none
is set here. It builds anew at each open. TensorRT itself is not part of `onnxruntime-gpu`. Not run
on hardware.
"""

from __future__ import annotations

from edgexception.agent.runtimes.ort_gpu import TENSORRT, Adapter

_ADAPTER = Adapter("onnxruntime-tensorrt", TENSORRT)
version, build, open = _ADAPTER.version, _ADAPTER.build, _ADAPTER.open  # noqa: A001
