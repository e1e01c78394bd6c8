"""What TensorRT and TensorRT-RTX share: their Python packages are one API under two names.

`trt` is the package; names are those of python/src/infer/pyCore.cpp of NVIDIA/TensorRT, v10.3.0 to
v11.0. Running an engine has not been done on hardware.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgexception.agent.onnx_file import Shapes
from edgexception.agent.protocol import AgentError
from edgexception.agent.runtimes import Options, Session, blaming, check_contract
from edgexception.agent.runtimes.cuda import Memory, first_gpu


def set_batch(
    trt: Any, builder: Any, network: Any, config: Any, options: Options, shapes: Shapes | None
) -> None:
    """Give the open batch of a network its size, or its bounds, and check the network's ends.

    An open size needs an optimization profile: kernels are chosen for the best shape and must do
    for all from the least to the greatest (NvInferRuntime.h, IOptimizationProfile).
    """
    for number in range(network.num_inputs):
        tensor = network.get_input(number)
        sizes = tuple(tensor.shape)
        if sizes and sizes[0] == -1 and shapes is None:
            tensor.shape = (options.batch, *sizes[1:])
    sides = (
        [network.get_input(number) for number in range(network.num_inputs)],
        [network.get_output(number) for number in range(network.num_outputs)],
    )
    ends = [[(end.name, _type(trt, end.dtype), tuple(end.shape)) for end in side] for side in sides]
    check_contract(ends[0], ends[1], options)
    if shapes is not None:
        profile = builder.create_optimization_profile()
        profile.set_shape("images", *shapes)
        if config.add_optimization_profile(profile) < 0:
            raise AgentError("bad-artifact", f"the profile of shapes {shapes} is refused")


def open_session(
    trt: Any,
    runtime: Any,
    engine: Path,
    options: Options,
    name: str,
    log: Any,
    profiler: Any = None,
    context_of: Callable[[Any], Any] | None = None,
) -> Session:
    """Open an engine file on the first GPU; `log.why()` is what the library said.

    A `profiler` is told the time of each layer at the end of each call. `context_of` makes the
    engine's context where the default is not meant.
    """
    gpu = first_gpu()
    with blaming(f"{name} cannot open {engine.name} on {gpu['name']}"):
        opened = runtime.deserialize_cuda_engine(engine.read_bytes())
        if opened is None:
            raise AgentError(
                "bad-artifact", f"{name} cannot open {engine.name} on {gpu['name']}: {log.why()}"
            )
        shape, classes = _check_engine(trt, opened, options)
        context = context_of(opened) if context_of else opened.create_execution_context()
        if options.batches is not None and not context.set_input_shape("images", shape):
            raise AgentError("bad-artifact", f"{name} takes no images {shape}: {log.why()}")
        if profiler is not None:
            context.profiler = profiler
        logits = np.empty((shape[0], classes), np.float32)
        memory = Memory(int(np.prod(shape)), logits.nbytes)
        context.set_tensor_address("images", memory.input)
        context.set_tensor_address("logits", memory.output)

    # The engine must outlive its context.
    def call(images: NDArray[np.uint8], _held: object = opened) -> NDArray[np.float32]:
        memory.upload(images)
        if not context.execute_async_v3(memory.stream):
            raise AgentError("measurement-invalid", f"{name} did not run: {log.why()}")
        memory.download(logits)
        return logits

    # How the host waits for the stream is the driver's choice (CU_CTX_SCHED_AUTO), and nothing is
    # captured: what `trtexec` calls spin-wait and CUDA graph.
    told = {"cuda_graph": False, "transfers": True, "wait": "CU_CTX_SCHED_AUTO"}
    return Session(shape, classes, call, {"gpu": gpu["name"], "driver": gpu["driver"], **told})


def _check_engine(trt: Any, engine: Any, options: Options) -> tuple[tuple[int, int, int, int], int]:
    ends: dict[Any, list[tuple[str, str, tuple[int, ...]]]] = {
        trt.TensorIOMode.INPUT: [],
        trt.TensorIOMode.OUTPUT: [],
    }
    for number in range(engine.num_io_tensors):
        name = engine.get_tensor_name(number)
        end = (
            name,
            _type(trt, engine.get_tensor_dtype(name)),
            tuple(engine.get_tensor_shape(name)),
        )
        ends[engine.get_tensor_mode(name)].append(end)
    if options.batches is not None:
        found = tuple(each[0] for each in engine.get_tensor_profile_shape("images", 0))
        if found != options.batches:
            raise AgentError(
                "bad-artifact",
                f"the engine takes batches of {found} (least, best, greatest), and its manifest "
                f"says {options.batches}: build it again",
            )
    return check_contract(ends[trt.TensorIOMode.INPUT], ends[trt.TensorIOMode.OUTPUT], options)


def _type(trt: Any, kind: Any) -> str:
    return {trt.uint8: "uint8", trt.float32: "float32"}.get(kind, str(kind))
