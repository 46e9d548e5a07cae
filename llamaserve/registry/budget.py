"""How much memory models may take: what the user has said, or a safe share of what is free when the server starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from llamaserve.engine.params import Footprint
from llamaserve.registry.hardware import available_memory, total_memory
from llamaserve.settings import parse_size
from llamaserve.worker.protocol import Device

HOST_SHARE: Final = 0.8  # of the main memory that is free; the rest is for files' caches and other programs
DEVICE_SHARE: Final = 0.9  # of the GPU memory that is free; drivers and screens want some


def memory_budget(memory: str | None, gpu_memory: str | None) -> Callable[[Sequence[Device]], Footprint]:
    """Return how to find the budget once the GPUs are known. A share is one of all that the machine has; None stands
    for the safe share of what is free. Where GPUs use the main memory, the budget for them is within that for it.
    """

    def budget(devices: Sequence[Device]) -> Footprint:
        host = parse_size(memory)(total_memory()) if memory else int(HOST_SHARE * available_memory())
        if not devices:
            return Footprint(host)
        together = max if is_unified(devices) else sum
        free, total = together(device.free for device in devices), together(device.total for device in devices)
        return Footprint(host, parse_size(gpu_memory)(total) if gpu_memory else int(DEVICE_SHARE * free))

    return budget


def is_unified(devices: Sequence[Device]) -> bool:
    """Tell whether the GPUs that are used, if any, have no memory of their own but use the main memory."""
    return any(device.kind == "integrated" for device in devices)
