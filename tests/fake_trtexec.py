"""A stand-in for NVIDIA's `trtexec`, as a program: no machine of these tests has a GPU.

It behaves as samples/trtexec/trtexec.cpp and samples/common of NVIDIA/TensorRT do from v10.3.0 to
v11.1, as far as the agent depends on it: the banner and the lines that it logs, exit codes, the
flags that a version reads (of `agent/tensorrt_vendor.json`; any other ends it), what it does where
a flag is missing (shapes, data transfers), file names and JSON of what it exports. An "engine" is
the ONNX file behind a line of JSON, and ONNX Runtime computes the logits, so they are those of the
network; times are those of ONNX Runtime, by no GPU. `faults` of `install` makes it break.

`install_driver` compiles a stand-in for the driver's library, which tells of one Orin.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import pytest

HERE = Path(__file__).parent
VENDOR = HERE / "agent/tensorrt_vendor.json"
TAGS = {"10.3.0": "10.3.0", "10.7.0": "10.7.0", "10.16.2": "10.16", "11.4.1": "11.1"}
"""Version -> the nearest of which the flags are known."""
DEFAULTS = {"--iterations": "10", "--duration": "3", "--warmUp": "200"}

_DRIVER = """
#include <stddef.h>
#include <string.h>
int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { *version = 12060; return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGet(int *device, int number) { *device = number; return 0; }
int cuDeviceGetName(char *name, int size, int device) { strncpy(name, "Orin", size); return 0; }
int cuDeviceTotalMem_v2(size_t *size, int device) { *size = 7990000000; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 75 ? 8 : 7;
    return 0;
}
int cuDeviceGetPCIBusId(char *id, int size, int device) {
    strncpy(id, "0000:00:00.0", size);
    return 0;
}
int cuGetErrorName(int code, const char **text) { *text = "CUDA_ERROR"; return 0; }
"""


def install(folder: Path, version: str = "10.3.0", *faults: str) -> Path:
    """Put a `trtexec` of a version into a folder; every start of it is a line of `calls` there."""
    folder.mkdir(parents=True, exist_ok=True)
    told = {"version": version, "faults": faults, "calls": str(folder / "calls")}
    path = folder / "trtexec"
    path.write_text(
        f"#!/bin/sh\nexec '{sys.executable}' -I '{Path(__file__)}' '{json.dumps(told)}' \"$@\"\n"
    )
    path.chmod(0o755)
    return path


def install_driver(folder: Path) -> Path:
    """Put the driver's library into a folder, for `LD_LIBRARY_PATH`; skip without a compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler here, to make a stand-in for the NVIDIA driver")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "driver.c").write_text(_DRIVER)
    command = [compiler, "-shared", "-fPIC", "-w", "-o", "libcuda.so.1", "driver.c"]
    subprocess.run(command, cwd=folder, check=True)
    return folder


# --- what runs as `trtexec` -----------------------------------------------------------------------


def main(told: dict[str, Any], arguments: list[str]) -> NoReturn:
    """Do what the arguments say, and exit."""
    version, faults = told["version"], told["faults"]
    with open(told["calls"], "a", encoding="utf-8") as calls:
        calls.write(json.dumps(arguments) + "\n")
    major, minor, patch = (int(part) for part in version.split("."))
    # NV_TENSORRT_VERSION; the number of the build is not in the banner until 10.3 (logging.h).
    number = major * (10_000 if major >= 10 else 1000) + minor * 100 + patch
    build = " [b106]" if (major, minor) > (10, 3) else ""
    banner = f"TensorRT.trtexec [TensorRT v{number}]{build} # trtexec {' '.join(arguments)}"
    if "no banner" in faults:
        sys.exit("trtexec: error while loading shared libraries: libcudart.so.12")
    print(f"&&&& RUNNING {banner}", flush=True)
    if arguments == ["--help"]:
        print("=== Model Options ===\n  --onnx=<file>               ONNX model")
        sys.exit(0)
    run = Run(version, faults, dict(a.partition("=")[::2] for a in arguments))
    try:
        run.all()
    except SystemExit as fault:
        say("E", fault.code)
        print(f"&&&& FAILED {banner}", flush=True)
        sys.exit(1)
    if "no end" not in faults:
        print(f"&&&& PASSED {banner}", flush=True)
    sys.exit(0)


def say(severity: str, text: object) -> None:
    print(f"[11/25/2026-10:00:00] [{severity}] {text}", flush=True)


class Run:
    """One start; SystemExit with a text is how it fails."""

    def __init__(self, version: str, faults: list[str], told: dict[str, str]) -> None:
        self.version, self.faults, self.told = version, faults, told
        self.new = version.startswith("11")

    def all(self) -> None:
        for flag in self.told:
            if flag not in known_flags(TAGS[self.version]):
                raise SystemExit(f"Unknown option: {flag} {self.told[flag]}")
        say("I", "=== Device Information ===")
        say("I", "Selected Device: Orin")
        say("I", "Compute Capability: 8.7")
        say("I", f"TensorRT version: {self.version}")
        if "hang" in self.faults:
            time.sleep(600)
        if "killed" in self.faults:
            signal.raise_signal(signal.SIGKILL)
        if "memory" in self.faults:
            raise SystemExit("[TRT] Error Code 2: OutOfMemory (Requested size was 9 bytes.)")
        while "endless" in self.faults:
            say("V", "x" * 10_000)
        while "one line" in self.faults:
            sys.stdout.write("x" * 10_000)
        if "--onnx" in self.told:
            self.build()
        if "--skipInference" not in self.told:
            self.infer()

    def build(self) -> None:
        import onnx  # noqa: PLC0415 - only this program's own process needs it

        model = onnx.load(self.told["--onnx"])
        sizes = model.graph.input[0].type.tensor_type.shape.dim
        is_open = not sizes[0].dim_value
        profile = [self.told.get(f"--{name}Shapes") for name in ("min", "opt", "max")]
        if not is_open and any(profile):
            raise SystemExit("Static model does not take explicit shapes since the shape of ...")
        shape = [1 if is_open else sizes[0].dim_value, *(size.dim_value for size in sizes[1:])]
        if is_open and profile[2]:
            shape = shape_of(profile[2])
        if "broken graph" in self.faults:
            say("E", "[TRT] ITensor::getDimensions: Error Code 4: API Usage Error (conv: types)")
            raise SystemExit("Engine could not be created from network")
        if "--useDLACore" in self.told:
            say(
                "W",
                "[TRT] Layer 'images_nchw' (SHUFFLE): Unsupported on DLA. Switching this layer's "
                "device type to GPU.",
            )
        least = shape_of(profile[0]) if is_open and profile[0] else shape
        head = {"version": self.version, "least": least, "shape": shape, "open": is_open,
                "host_code": "--versionCompatible" in self.told}  # fmt: skip
        head["layers"] = layer_information(model, self.new)
        content = json.dumps(head).encode() + b"\n" + model.SerializeToString()
        say("I", "Engine built in 0.1 sec.")
        if "no engine" not in self.faults:
            Path(self.told["--saveEngine"]).write_bytes(content)
        if "--timingCacheFile" in self.told:
            cache = Path(self.told["--timingCacheFile"])
            cache.write_bytes((cache.read_bytes() if cache.exists() else b"") + b"timed;")
        self.export("--exportLayerInfo", json.dumps(head["layers"]))

    def infer(self) -> None:
        import numpy as np  # noqa: PLC0415
        import onnxruntime  # noqa: PLC0415

        line, _, content = Path(self.told["--loadEngine"]).read_bytes().partition(b"\n")
        head = json.loads(line)
        if head["version"] != self.version or head["host_code"] > (
            "--versionCompatible" in self.told
        ):
            raise SystemExit("Engine deserialization failed")
        shape = head["shape"]
        asked = shape_of(self.told["--shapes"]) if "--shapes" in self.told else None
        if head["open"] and asked is None:
            say("W", "Shape missing for input with dynamic shape: images")
            asked = [1, *shape[1:]]
        if asked is not None and not all(
            low <= size <= high for low, size, high in zip(head["least"], asked, shape, strict=True)
        ):
            raise SystemExit("Set dimensions of input images failed: out of the profile's range")
        shape = asked or shape
        pixels = np.zeros(shape, np.uint8)
        if "--loadInputs" in self.told:
            path = self.told["--loadInputs"].removeprefix("images:")
            data = Path(path).read_bytes()
            if len(data) not in (pixels.nbytes, 2 * pixels.nbytes):
                raise SystemExit(f"Unexpected file size for input file: {path}")
            pixels = np.frombuffer(data[: pixels.nbytes], np.uint8).reshape(shape)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        say(
            "I", f"Input binding for images with dimensions {'x'.join(map(str, shape))} is created."
        )
        say("I", "Starting inference")
        wanted = {name: float(self.told.get(name, value)) for name, value in DEFAULTS.items()}
        trace: list[tuple[float, float]] = []
        start = time.monotonic()
        warm_up, end = (wanted["--warmUp"] / 1000, wanted["--duration"])
        warm = 0
        while len(trace) < wanted["--iterations"] or time.monotonic() - start < warm_up + end:
            begin = time.monotonic()
            (logits,) = session.run(None, {"images": pixels})
            if begin - start < warm_up:
                warm += 1
            else:
                trace.append((1000 * (begin - start), 1000 * (time.monotonic() - begin)))
        say("I", f"Warmup completed {warm} queries over {wanted['--warmUp']:g} ms")
        say("I", f"Timing trace has {len(trace)} queries over {end:g} s")
        if "other answer" in self.faults:
            logits = logits[:, :-1]
        self.leave(pixels, logits, trace)

    def leave(self, pixels: Any, logits: Any, trace: list[tuple[float, float]]) -> None:
        """Write what was asked for, in the formats of sampleReporting.cpp."""
        moves = "--includeDataTransfers" in self.told
        moves = moves if self.new else "--noDataTransfers" not in self.told
        side = 0.0125 if moves else 0
        rows = [
            f'{{ "startEnqMs" : {at:g}, "endEnqMs" : {at:g}, "startH2dMs" : {at:g}, '
            f'"endH2dMs" : {at + side:g}, "startComputeMs" : {at + side:g}, '
            f'"endComputeMs" : {at + ms:g}, "startD2hMs" : {at + ms:g}, '
            f'"endD2hMs" : {at + ms + side:g}, "h2dMs" : {side:g}, "computeMs" : {ms:g}, '
            f'"d2hMs" : {side:g}, "latencyMs" : {ms + 2 * side:g} }}'
            for at, ms in trace
        ]
        if "few times" in self.faults:
            rows = rows[:1]
        times = "[\n  " + "\n, ".join(rows) + "\n]\n"
        self.export("--exportTimes", "{" if "garbage" in self.faults else times)
        layers = json.loads(Path(self.told["--loadEngine"]).read_bytes().partition(b"\n")[0])[
            "layers"
        ]
        names = [layer["Name"] for layer in layers["Layers"]]
        profile = [
            f', {{ "name" : "{name}", "timeMs" : {place}, "averageMs" : 0.0{place}, '
            f'"medianMs" : 0.00{place}, "percentage" : 1 }}'
            for place, name in enumerate(names, start=1)
        ]
        self.export("--exportProfile", "\n".join(['[\n  { "count" : 5 }', *profile, "]\n"]))
        self.export("--exportLayerInfo", json.dumps(layers))
        if "--dumpRawBindingsToFile" in self.told:
            for name, array, kind in (
                ("images.input", pixels, "uint8"),
                ("logits.output", logits, "fp32"),
            ):
                sizes = ".".join(map(str, array.shape))
                Path(f"{name}.{sizes}.{kind}.raw").write_bytes(array.tobytes())

    def export(self, flag: str, text: str) -> None:
        if flag in self.told:
            Path(self.told[flag]).write_text(text)


def shape_of(text: str) -> list[int]:
    return [int(size) for size in text.removeprefix("images:").split("x")]


def known_flags(tag: str) -> set[str]:
    flags: set[str] = set()
    for name, changes in json.loads(VENDOR.read_text())["trtexec"].items():
        flags = (flags | set(changes["added"].split())) - set(changes["removed"].split())
        if name == tag:
            return flags
    raise KeyError(tag)


def layer_information(model: Any, new: bool) -> dict[str, Any]:
    """Each convolution and dense layer in the type of its weights, in the inspector's words."""
    made = {output: node for node in model.graph.node for output in node.output}

    def tensor(kind: str) -> list[dict[str, str]]:
        both = {"Format": "Row major linear", "DataType": kind}
        return [both if new else {"Format/Datatype": f"Row major linear {kind} format"}]

    layers = []
    for node in model.graph.node:
        if node.op_type in ("Conv", "Gemm"):
            source = made.get(node.input[1])
            kind = (
                "Int8" if source is not None and source.op_type == "DequantizeLinear" else "Float"
            )
            layers.append({
                "Name": node.name or node.output[0], "LayerType": "CaskConvolution",
                "Inputs": tensor(kind), "Outputs": tensor(kind),
                "Weights": {"Type": kind, "Count": 1},
                "Metadata": f"[ONNX Layer: {node.name}]",
            })  # fmt: skip
    return {"Layers": layers, "Bindings": ["images", "logits"]}


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), sys.argv[2:])
