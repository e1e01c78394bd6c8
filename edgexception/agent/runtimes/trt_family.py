"""What TensorRT and TensorRT-RTX share: their Python packages are one API under two names.

`trt` is the package. Running an engine has not been done on hardware.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgexception.agent.protocol import AgentError
from edgexception.agent.runtimes import Options, Session, blaming, check_contract
from edgexception.agent.runtimes.cuda import Memory, first_gpu


def fix_batch(trt: Any, network: Any, options: Options) -> None:
    """Give the open batch dimension of a network its size, and check the network's ends."""
    for number in range(network.num_inputs):
        tensor = network.get_input(number)
        sizes = tuple(tensor.shape)
        if sizes and sizes[0] == -1:
            tensor.shape = (options.batch, *sizes[1:])
    sides = (
        [network.get_input(number) for number in range(network.num_inputs)],
        [network.get_output(number) for number in range(network.num_outputs)],
    )
    ends = [[(end.name, _type(trt, end.dtype), tuple(end.shape)) for end in side] for side in sides]
    check_contract(ends[0], ends[1], options)


def open_session(
    trt: Any,
    runtime: Any,
    engine: Path,
    options: Options,
    name: str,
    log: Any,
    profiler: Any = None,
) -> Session:
    """Open an engine file on the first GPU; `log.why()` is what the library said.

    A `profiler` is told the time of each layer at the end of each call.
    """
    gpu = first_gpu()
    with blaming(f"{name} cannot open {engine.name} on {gpu['name']}"):
        opened = runtime.deserialize_cuda_engine(engine.read_bytes())
        if opened is None:
            raise AgentError(
                "bad-artifact", f"{name} cannot open {engine.name} on {gpu['name']}: {log.why()}"
            )
        shape, classes = _check_engine(trt, opened, options)
        context = opened.create_execution_context()
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

    return Session(shape, classes, call, {"gpu": gpu["name"], "driver": gpu["driver"]})


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
    return check_contract(ends[trt.TensorIOMode.INPUT], ends[trt.TensorIOMode.OUTPUT], options)


def _type(trt: Any, kind: Any) -> str:
    return {trt.uint8: "uint8", trt.float32: "float32"}.get(kind, str(kind))
