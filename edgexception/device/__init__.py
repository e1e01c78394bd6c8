"""Devices as the host sees them: one call per verb of the agent, over some transport.

The agent runs in a process of its own, a child here or over SSH there: torch's threads cannot
disturb it, and an engine that crashes or eats the memory takes down nothing else.
"""

from edgexception.device.contract import (
    BuildRecord,
    CpuFacts,
    Device,
    GpuFacts,
    KernelTime,
    LayerPlacement,
    MemoryFacts,
    ProbeRecord,
    Profile,
    Progress,
    RunRecord,
    RuntimeFacts,
    Timing,
)
from edgexception.device.local import LocalDevice, local_device
from edgexception.device.recorded import RecordedDevice
from edgexception.device.ssh import SshDevice, open_device

__all__ = [
    "BuildRecord",
    "CpuFacts",
    "Device",
    "GpuFacts",
    "KernelTime",
    "LayerPlacement",
    "LocalDevice",
    "MemoryFacts",
    "ProbeRecord",
    "Profile",
    "Progress",
    "RecordedDevice",
    "RunRecord",
    "RuntimeFacts",
    "SshDevice",
    "Timing",
    "local_device",
    "open_device",
]
