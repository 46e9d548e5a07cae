"""GPUs as ggml lists them. Not tested on a machine that has one: a double stands for its library."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from llamaserve.engine import llama
from llamaserve.engine.devices import gpu_devices
from llamaserve.engine.events import Device
from llamaserve.engine.params import Footprint, LoadParams

_GIB = 1 << 30


class Function:
    """Stands for a C function: what it returns and takes can be set, as the binding must."""

    restype: Any = None
    argtypes: Any = None

    def __init__(self, call: Any) -> None:
        self._call = call

    def __call__(self, *arguments: Any) -> Any:
        assert len(arguments) == len(self.argtypes)
        return self._call(*arguments)


class Library:
    """Stands for ggml with these devices: name, description, type, free and total memory."""

    def __init__(self, devices: list[tuple[bytes | None, bytes | None, int, int, int]]) -> None:
        def memory(device: int, free: Any, total: Any) -> None:
            free._obj.value, total._obj.value = devices[device - 1][3:]

        self.ggml_backend_dev_count = Function(lambda: len(devices))
        self.ggml_backend_dev_get = Function(lambda index: index + 1)
        self.ggml_backend_dev_name = Function(lambda device: devices[device - 1][0])
        self.ggml_backend_dev_description = Function(lambda device: devices[device - 1][1])
        self.ggml_backend_dev_type = Function(lambda device: devices[device - 1][2])
        self.ggml_backend_dev_memory = Function(memory)


_DEVICES = [
    (b"CUDA0", b"NVIDIA RTX 4090", 1, 20 * _GIB, 24 * _GIB),
    (b"Vulkan1", b"Radeon \xff", 2, 0, 2**40),
    (b"BLAS", b"OpenBLAS", 3, 0, 0),
    (b"CPU", b"AMD EPYC", 0, 1, 2),
    (None, None, 1, 0, 0),
]


def test_only_gpus_are_listed() -> None:
    library = Library(_DEVICES)
    assert gpu_devices(library) == [
        Device("CUDA0", "NVIDIA RTX 4090", 20 * _GIB, 24 * _GIB),
        Device("Vulkan1", "Radeon \ufffd", 0, 2**40),
        Device("", "", 0, 0),
    ]
    assert library.ggml_backend_dev_get.restype is ctypes.c_void_p  # an int would cut off half of a pointer


@pytest.mark.parametrize("missing", [name for name in vars(Library([])) if name.startswith("ggml")])
def test_a_build_without_one_of_the_functions_has_no_gpus(missing: str) -> None:
    library = Library(_DEVICES)
    delattr(library, missing)
    assert gpu_devices(library) == []


def test_no_device_at_all() -> None:
    assert gpu_devices(Library([])) == []
    missing = Library(_DEVICES)
    missing.ggml_backend_dev_get = Function(lambda index: None)
    assert gpu_devices(missing) == []


def test_what_is_used_of_gpus_is_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama, "list_gpus", lambda: gpu_devices(Library(_DEVICES)))
    used = llama.memory_in_use()
    assert used.device == 4 * _GIB + 2**40
    assert used.host > 1 << 20


def test_the_real_library_has_the_functions(backend: None, load_params: LoadParams) -> None:
    """Whatever it finds here: its functions are there, and are called the right way."""
    assert llama.lib._lib.ggml_backend_dev_count() >= 1  # the CPU
    gpus = llama.list_gpus()
    assert bool(gpus) == llama.supports_gpu_offload()
    assert all(gpu.name and 0 <= gpu.free <= gpu.total for gpu in gpus)
    before = llama.memory_in_use()
    assert isinstance(before, Footprint)
