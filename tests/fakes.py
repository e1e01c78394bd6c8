"""Fakes, each with what it stands for.

The hostile agents below stand for an agent on a device nobody controls: they are real child
processes that speak the protocol wrongly, because no honest agent can be made to.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgexception.device import LocalDevice, Progress
from edgexception.errors import EdgexError

_PRELUDE = """
import json, os, pathlib, signal, sys, time
verb, asked, answered = sys.argv[1], pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3])
FACTS = {"arch": "x", "system": "x", "python": "3", "board": None, "numpy": "1", "runtimes": {},
         "cpu": {"model": None, "logical_cpus": 1, "physical_cores": 1, "quota_cpus": None,
                 "usable_cores": 1, "flags": [], "vnni": False},
         "memory": {"total_bytes": None, "available_bytes": None}}
def respond(content):
    text = content if isinstance(content, str) else json.dumps(content)
    (answered / "response.json").write_text(text)
def well(**changes):
    respond({"protocol": 1, "ok": True, "record": FACTS, "files": {}, **changes})
"""


def agent_that(behaves: str) -> LocalDevice:
    """A local device whose agent is this Python text, after a prelude with `respond` and `well`."""
    return LocalDevice(name="fake", command=(sys.executable, "-c", _PRELUDE + behaves))


class ScriptedDevice:
    """A device that answers `run` at once with prepared arrays and notes what it was asked.

    It stands for a device whose times and logits a test must know beforehand. `records` are the
    answers of the first calls, as far as a test looks at them.
    """

    name = "scripted"

    def __init__(
        self, arrays: Mapping[str, NDArray[Any]], records: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        self.arrays = arrays
        self.records = list(records)
        self.requests: list[Mapping[str, Any]] = []

    def call(
        self,
        verb: str,
        request: Mapping[str, Any],
        files: Mapping[str, Path],
        out: Path,
        progress: Any = None,
    ) -> dict[str, Any]:
        self.requests.append({"verb": verb, **request, "source": files[request["engine"]]})
        out.mkdir(parents=True)
        for name, array in self.arrays.items():
            np.save(out / name, array)
        if progress is not None:
            progress(Progress("run", 1, 1, 0.0))
        return {"log": [], **(self.records.pop(0) if self.records else {})}


class TimingDevice:
    """Builds nothing, but leaves a timing cache: what it was given, and one byte more.

    It stands for a device with TensorRT, which times kernels while it builds; `fault` is raised in
    place of an answer.
    """

    name = "local"

    def __init__(self) -> None:
        self.given: list[bytes | None] = []
        self.fault: Exception | None = None
        self.leaves_it = True

    def call(
        self,
        verb: str,
        request: Mapping[str, Any],
        files: Mapping[str, Path],
        out: Path,
        progress: Any = None,
    ) -> dict[str, Any]:
        name = request.get("timing_cache")
        self.given.append(None if name is None else files[name].read_bytes())
        if self.fault is not None:
            raise self.fault
        if self.leaves_it:
            (out / "timing.cache").write_bytes((self.given[-1] or b"") + b"x")
        (out / "engine.plan").write_bytes(b"a plan")
        return {"engine": "engine.plan"}


def import_timm() -> Any:
    """Import the real timm where torchvision's wheel of PyPI stands beside a CPU build of torch.

    That wheel is compiled against CUDA's torch: its native library does not load here, and its
    Python part then fails at import while it annotates two native operators. Only then their
    schemas are declared, without implementation; everything else of torchvision and all of timm is
    the real thing, and a call of either operator would raise.
    """
    import torch  # noqa: PLC0415 - the device side runs its tests without torch

    try:
        import torchvision  # noqa: F401, PLC0415
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        for name in ("nms", "qnms"):
            torch.library.define(
                f"torchvision::{name}", "(Tensor dets, Tensor scores, float threshold) -> Tensor"
            )
    import timm  # noqa: PLC0415

    return timm


class TroubledDevice(LocalDevice):
    """This machine's real agent, except where a test needs trouble that it does not have.

    It stands for another machine (`facts` replaces what `probe` answers) and for engines that fail
    there: a call for which `trouble` returns an error raises it, everything else is really done.
    """

    def __init__(
        self,
        facts: Mapping[str, Any] | None = None,
        trouble: Callable[[str, Mapping[str, Any]], EdgexError | None] = lambda *_: None,
    ) -> None:
        super().__init__()
        object.__setattr__(self, "facts", facts or {})
        object.__setattr__(self, "trouble", trouble)

    def call(
        self,
        verb: str,
        request: Mapping[str, Any],
        files: Mapping[str, Path],
        out: Path,
        progress: Any = None,
    ) -> dict[str, Any]:
        error = self.trouble(verb, request)  # type: ignore[attr-defined]
        if error is not None:
            raise error
        record = super().call(verb, request, files, out, progress)
        return {**record, **self.facts} if verb == "probe" else record  # type: ignore[attr-defined]


class _Context:
    """An execution context of `stand_in_for_tensorrt`."""

    profiler: Any = None

    def __init__(self, layers: str, batches: tuple[int, int, int] | None) -> None:
        self.names = [layer["Name"] for layer in json.loads(layers)["Layers"]]
        self.batches = batches

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert (name, self.batches is None) == ("images", False)
        return self.batches is not None and self.batches[0] <= shape[0] <= self.batches[2]

    def set_tensor_address(self, name: str, address: int) -> None:
        assert name in ("images", "logits")

    def execute_async_v3(self, stream: int) -> bool:
        for number, name in enumerate(self.names, start=1):
            if self.profiler is not None:
                self.profiler.report_layer_time(name, number / 1000)
        return True


class _TimingCache:
    """Times of kernels that are valid for one device: a line that names it, a line each."""

    def __init__(self, device: str, known: bytes) -> None:
        lines = known.decode("utf-8", "replace").splitlines()
        fits = bool(lines) and lines[0].startswith("times on ")
        self.lines = lines if fits else [f"times on {device}"]

    def serialize(self) -> bytes:
        return "\n".join(self.lines).encode()


class _Config:
    """A builder's configuration of TensorRT-RTX, with the timing cache that only TensorRT has.

    As TensorRT does it makes an empty cache of what it cannot read, and does not attach one of
    another device.
    """

    cache: _TimingCache

    def __init__(self, own: Any, device: str) -> None:
        vars(self).update(own=own, device=device)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["own"], name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self.own, name, value)

    def create_timing_cache(self, known: bytes) -> _TimingCache:
        return _TimingCache(self.device, known)

    def set_timing_cache(self, cache: _TimingCache, ignore_mismatch: bool) -> bool:
        vars(self)["cache"] = cache
        return ignore_mismatch or cache.lines[0] == f"times on {self.device}"


def stand_in_for_tensorrt(
    version: str, layers: str, batches: tuple[int, int, int] | None = None
) -> ModuleType:
    """A `tensorrt` package of a version, as far as it can be had here: TensorRT-RTX's.

    Both are one API under two names, so parser, network, builder and its configuration are the real
    ones of TensorRT-RTX. Three things are not: the timing cache; TensorRT-RTX is told a compute
    capability (TensorRT builds for the GPU it runs on); and, since no GPU is here, what was built
    is not opened: the engine's inspector answers the text `layers`, its runtime the number of the
    DLA core, and a call computes nothing: it tells the profiler a time of each layer, the n-th
    takes n us. An opened engine is of batch 3, or dynamic with the bounds `batches`.
    """
    import tensorrt_rtx_bindings as rtx  # noqa: PLC0415 - not every machine has it

    module = ModuleType("tensorrt")
    size = 3 if batches is None else -1
    vars(module).update({name: value for name, value in vars(rtx).items() if name[0] != "_"})

    class Builder(rtx.Builder):  # type: ignore[misc,name-defined]
        num_DLA_cores = 2  # noqa: N815 - TensorRT's name

        def create_builder_config(self) -> Any:
            config = super().create_builder_config()
            config.num_compute_capabilities = 1
            config.set_compute_capability(rtx.ComputeCapability.SM89, 0)
            module.config = _Config(config, f"TensorRT {version}")  # type: ignore[attr-defined]
            return module.config

        def build_serialized_network(self, network: Any, config: Any) -> Any:
            config.cache.lines.append(f"{network.name}: {network.num_layers} kernels")
            return super().build_serialized_network(network, config.own)

    class Runtime:
        def __init__(self, log: object) -> None:
            module.runtime = self  # type: ignore[attr-defined]

        def deserialize_cuda_engine(self, plan: Any) -> Any:
            assert len(bytes(plan)) > 1000
            inspector = SimpleNamespace(get_engine_information=lambda _: layers)
            return SimpleNamespace(
                create_engine_inspector=lambda: inspector,
                create_execution_context=lambda: _Context(layers, batches),
                num_io_tensors=2,
                get_tensor_name=("images", "logits").__getitem__,
                get_tensor_dtype={"images": rtx.uint8, "logits": rtx.float32}.get,
                get_tensor_shape={"images": (size, 40, 40, 3), "logits": (size, 5)}.get,
                get_tensor_profile_shape=lambda *_: [(n, 40, 40, 3) for n in batches or ()],
                get_tensor_mode={
                    "images": rtx.TensorIOMode.INPUT,
                    "logits": rtx.TensorIOMode.OUTPUT,
                }.get,
            )

    vars(module).update(__version__=version, Builder=Builder, Runtime=Runtime)
    return module


class ClockDevice(LocalDevice):
    """This machine as `probe` describes it, on which engines take times that a test knows.

    It stands for a quiet machine: an engine takes `floor_ns`, and one ns for every `macs_per_ns`
    multiply-accumulates of its network. No runtime is loaded.
    """

    def __init__(self, floor_ns: int, macs_per_ns: float) -> None:
        super().__init__()
        object.__setattr__(self, "floor_ns", floor_ns)
        object.__setattr__(self, "macs_per_ns", macs_per_ns)
        object.__setattr__(self, "built", [])

    def call(
        self,
        verb: str,
        request: Mapping[str, Any],
        files: Mapping[str, Path],
        out: Path,
        progress: Any = None,
    ) -> dict[str, Any]:
        import onnx  # noqa: PLC0415 - the device side runs its tests without it

        if verb == "probe":
            return super().call(verb, request, files, out, progress)
        out.mkdir(parents=True)
        if verb == "build":
            props = onnx.load(files["model.onnx"]).metadata_props
            layers = json.loads(next(p.value for p in props if p.key == "edgexception.layers"))
            macs = sum(layer["macs"] for layer in layers.values())
            (out / "engine.txt").write_text(str(self.floor_ns + round(macs / self.macs_per_ns)))  # type: ignore[attr-defined]
            self.built.append(macs)  # type: ignore[attr-defined]
            return {"engine": "engine.txt"}
        ns = int(files[request["engine"]].read_text())
        np.save(out / "times_ns.npy", np.full(request["timing"]["min_iterations"], ns))
        return {}
