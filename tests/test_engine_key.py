"""The store's key of an engine: whatever an engine depends on makes another one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from edgexception import engine_stages
from edgexception.agent.tensorrt_options import read_options
from edgexception.artifacts import Artifact, canonical_json
from edgexception.device import ProbeRecord
from edgexception.doctor import probe
from edgexception.recipe import TensorRtSpec
from edgexception.report.assemble import Place
from edgexception.workshop import Workshop

GPU = {
    "name": "Orin", "sm": 87, "memory_bytes": 1 << 35, "driver": "12.6",
    "driver_release": "540.4.0",
}  # fmt: skip
PLACE = Place("jetson-agx-orin-64gb", "tensorrt", "tensorrt", "fp16", 1, 2, TensorRtSpec())


@pytest.fixture(scope="module")
def machine() -> ProbeRecord:
    found = probe().model_dump()
    found["runtimes"]["tensorrt"] = {"version": "10.3.0", "devices": ["Orin"], "gpus": [GPU]}
    return ProbeRecord.model_validate(found)


def key(
    machine: ProbeRecord, digest: str = "a" * 64, place: Place = PLACE, device: str = "local"
) -> str:
    """What the stage gives the store for its key."""
    told: list[str] = []

    class Shop(Workshop):
        def once(self, stage: str, what: str, inputs: Any, write: object) -> Artifact:  # type: ignore[override]
            told.append(canonical_json([stage, inputs]))
            return cast(Artifact, None)

    shop = Shop(cast(Any, None), cast(Any, SimpleNamespace(name=device)), machine)
    engine_stages.build(shop, Artifact("export", "k", Path(), {}, digest), place)
    return told[0]


def changed(machine: ProbeRecord, path: str, value: object) -> ProbeRecord:
    facts: Any = machine.model_dump()
    *folders, last = path.split(".")
    inner = facts
    for name in folders:
        inner = inner[int(name) if name.isdigit() else name]
    assert inner[last] != value
    inner[last] = value
    return ProbeRecord.model_validate(facts)


def test_every_fact_makes_another_engine(machine: ProbeRecord) -> None:
    gpu = "runtimes.tensorrt.gpus.0."
    keys = [
        key(machine),
        key(machine, digest="b" * 64),  # of the ONNX file
        key(machine, device="another"),
        *(
            key(changed(machine, path, value))
            for path, value in (
                ("runtimes.tensorrt.version", "10.3.1"),
                (gpu + "name", "Orin NX"),
                (gpu + "sm", 89),
                (gpu + "memory_bytes", 1 << 34),
                (gpu + "driver", "12.9"),
                (gpu + "driver_release", "540.5.0"),
                ("arch", "z80"),
                ("system", "another"),
                ("board", "another"),
                ("cpu.flags", ["none"]),
            )
        ),
        *(
            key(machine, place=replace(PLACE, **change))
            for change in (
                {"batch": 2},
                {"threads": 1},
                {"target": "jetson-agx-thor"},
                {"precision": "int8"},
                {"batches": (1, 1, 8)},
                {"batches": (1, 1, 4)},
            )
        ),
    ]
    assert len(set(keys)) == len(keys)


def test_every_batch_of_a_dynamic_engine_has_the_same_engine(machine: ProbeRecord) -> None:
    places = [replace(PLACE, batch=batch, batches=(1, 2, 8)) for batch in (2, 1, 8)]
    assert len({key(machine, place=place) for place in places}) == 1


def test_every_option_makes_another_engine_and_is_one_that_the_agent_knows(
    machine: ProbeRecord,
) -> None:
    other: dict[str, Any] = {
        "workspace_mib": 64, "version_compatible": True, "sparse_weights": True, "dla_core": 1,
        "gpu_fallback": True, "hardware_compatibility": "ampere-plus",
    }  # fmt: skip
    assert set(other) == set(TensorRtSpec.model_fields), "a new option belongs here"
    places = [replace(PLACE, tensorrt=TensorRtSpec(**{k: v})) for k, v in other.items()]
    keys = [key(machine, place=place) for place in (PLACE, replace(PLACE, tensorrt=None), *places)]
    assert len(set(keys)) == len(keys)
    assert all(read_options(place.tensorrt_options) for place in places)
