"""ONNX Runtime on an NVIDIA GPU, through an execution provider of `onnxruntime-gpu`.

ONNX Runtime runs on the CPU, in silence, what a provider does not take: the whole graph where the
provider is missing or does not start, single nodes where it has no kernel for them. A row of a GPU
would be one of the CPU then. So an engine is refused unless every node is the provider's, and a
failed call is an error, not a second try on the CPU. Which node is whose is what ONNX Runtime
records (`session.record_ep_graph_assignment_info`, from version 1.24 on).

The engine is the ONNX graph as it was built: ONNX Runtime keeps no engine, it optimizes at each
open. Float32 products are not rounded to TF32. Not run on hardware.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

# CUDA's libraries and TensorRT read it when they start (TensorRT documentation, "TF32").
os.environ["NVIDIA_TF32_OVERRIDE"] = "0"

import onnxruntime
from numpy.typing import NDArray

from edgexception.agent.onnx_file import operators, profile_shapes
from edgexception.agent.protocol import AgentError
from edgexception.agent.runtimes import Options, Session, blaming
from edgexception.agent.runtimes.cuda import first_gpu, gpus
from edgexception.agent.runtimes.ort import check_ends, fix_batch, session_options
from edgexception.agent.tensorrt_options import images_of

TENSORRT = "TensorrtExecutionProvider"
_SHOWN = 5


@dataclass(frozen=True)
class Adapter:
    """The adapter (`runtimes.Runtime`) of one execution provider."""

    name: str
    """The runtime's, in recipes and messages."""
    provider: str

    def version(self) -> dict[str, Any]:
        """Return the version and the GPUs; not-possible-here without the provider or a GPU."""
        first_gpu()
        available = onnxruntime.get_available_providers()
        if self.provider not in available:
            raise AgentError(
                "not-possible-here",
                f"this onnxruntime {onnxruntime.__version__} has no {self.provider}, only "
                f"{', '.join(available)}; put onnxruntime-gpu in its place: `pip uninstall "
                "onnxruntime`, then `pip install onnxruntime-gpu`",
            )
        found = gpus()
        names = [gpu["name"] for gpu in found]
        return {"version": onnxruntime.__version__, "devices": names, "gpus": found}

    def build(self, model: Path, options: Options, out: Path) -> dict[str, Any]:
        """Copy the graph once ONNX Runtime has placed all of it on the GPU; return its operators.

        ONNX Runtime does not tell in which precision a provider computes a layer.
        """
        operators(model)
        session = self._session(model, options)
        shutil.copyfile(model, out)
        kinds = Counter(operator for _, operator, _ in _assigned(session))
        return {"settings": self._settings(), "layers": dict(sorted(kinds.items()))}

    def open(self, engine: Path, options: Options) -> Session:
        """Let ONNX Runtime optimize the graph and place it on the first GPU."""
        operators(engine)
        session = self._session(engine, options)
        shape, classes = check_ends(session, options)

        def call(images: NDArray[np.uint8]) -> NDArray[np.float32]:
            return cast(NDArray[np.float32], session.run(["logits"], {"images": images})[0])

        return Session(shape, classes, call, self._settings())

    def _session(self, model: Path, options: Options) -> onnxruntime.InferenceSession:
        settings = session_options(options)
        fix_batch(settings, options)
        settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        provider = (self.provider, self._profile(model, options))
        with blaming(f"{self.name} cannot open {model.name}"):
            session = onnxruntime.InferenceSession(
                str(model), settings, providers=[provider], enable_fallback=0
            )
            self._refuse_cpu(session, model.name)
        check_ends(session, options)
        return session

    def _profile(self, model: Path, options: Options) -> dict[str, str]:
        """Return what TensorRT is told of an open batch; else it builds anew for each new size.

        Options of its provider (ONNX Runtime, "TensorRT Execution Provider"): all three, or none.
        """
        shapes = profile_shapes(model, options.batches)
        if shapes is None or self.provider != TENSORRT:
            return {}
        names = ("min", "opt", "max")
        return {
            f"trt_profile_{name}_shapes": images_of(shape)
            for name, shape in zip(names, shapes, strict=True)
        }

    def _refuse_cpu(self, session: onnxruntime.InferenceSession, model: str) -> None:
        """Raise not-possible-here unless every node of a session is the provider's."""
        if session.get_providers()[0] != self.provider:
            raise AgentError(
                "not-possible-here",
                f"{self.provider} did not start, and onnxruntime took "
                f"{', '.join(session.get_providers())} in its place. The log says why: mostly CUDA "
                "or cuDNN libraries of another version than this onnxruntime was built for",
            )
        if not hasattr(session, "get_provider_graph_assignment_info"):
            raise AgentError(
                "not-possible-here",
                f"onnxruntime {onnxruntime.__version__} does not tell which nodes run on the CPU: "
                "install 1.24 or later",
            )
        strays = [
            f"{name or 'a node without name'} ({operator}, {provider})"
            for provider, operator, name in _assigned(session)
            if provider != self.provider
        ]
        if strays:
            more = f" and {len(strays) - _SHOWN} more" if len(strays) > _SHOWN else ""
            raise AgentError(
                "not-possible-here",
                f"{self.provider} does not take all of {model}: these nodes would run elsewhere, "
                f"and the times would not be the GPU's: {', '.join(strays[:_SHOWN])}{more}. Use "
                "another runtime of this GPU",
            )

    def _settings(self) -> dict[str, Any]:
        gpu = first_gpu()
        return {
            "provider": self.provider,
            "gpu": gpu["name"],
            "sm": gpu["sm"],
            "driver": gpu["driver"],
            "tf32": False,
        }


def _assigned(session: onnxruntime.InferenceSession) -> list[tuple[str, str, str]]:
    """Return provider, operator and name of every node, as it was placed."""
    return [
        (part.ep_name, node.op_type, node.name)
        for part in session.get_provider_graph_assignment_info()
        for node in part.get_nodes()
    ]
