"""ONNX Runtime's CUDA execution provider: FP32 and FP16. Not run on hardware.

It has no INT8 convolution (microsoft/onnxruntime issues 12229 and 24807: no CUDA kernel for
QLinearConv), so an INT8 graph would run in float, and more slowly than the float graph.
"""

from __future__ import annotations

from edgexception.agent.runtimes.ort_gpu import Adapter

_ADAPTER = Adapter("onnxruntime-cuda", "CUDAExecutionProvider")
version, build, open = _ADAPTER.version, _ADAPTER.build, _ADAPTER.open  # noqa: A001
