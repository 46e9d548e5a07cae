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
    for the safe share of what is free.
    """

    def budget(devices: Sequence[Device]) -> Footprint:
        host = parse_size(memory)(total_memory()) if memory else int(HOST_SHARE * available_memory())
        free, total = sum(device.free for device in devices), sum(device.total for device in devices)
        device = parse_size(gpu_memory)(total) if gpu_memory else int(DEVICE_SHARE * free)
        return Footprint(host, device if devices else 0)

    return budget
