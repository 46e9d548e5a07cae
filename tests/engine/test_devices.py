"""GPUs as ggml lists them. Not tested on a machine that has one: a double stands for its library."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from llamaserve.engine import devices, llama
from llamaserve.engine.devices import Properties, gpu_devices
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
    """Stands for ggml with these devices: name, description, type, free and total memory, and id."""

    def __init__(self, listed: list[tuple[bytes | None, bytes | None, int, int, int, bytes | None]]) -> None:
        def read(device: int, properties: Any) -> None:
            into = properties._obj
            into.name, into.description, into.type, into.free, into.total, into.id = listed[device - 1]

        self.ggml_backend_dev_count = Function(lambda: len(listed))
        self.ggml_backend_dev_get = Function(lambda index: index + 1)
        self.ggml_backend_dev_type = Function(lambda device: listed[device - 1][2])
        self.ggml_backend_dev_get_props = Function(read)


_CARD = (b"CUDA0", b"NVIDIA RTX 4090", 1, 20 * _GIB, 24 * _GIB, b"0000:01:00.0")
_SAME_CARD = (b"Vulkan0", b"NVIDIA RTX 4090", 1, 20 * _GIB, 24 * _GIB, b"0000:01:00.0")
_CHIP = (b"Vulkan1", b"Radeon \xff", 2, 0, 2**40, b"0000:05:00.0")
_PROCESSOR = (b"CPU", b"AMD EPYC", 0, 1, 2, None)
_DEVICES = [_CARD, _CHIP, (b"BLAS", b"OpenBLAS", 3, 0, 0, None), _PROCESSOR, (None, None, 1, 0, 0, None)]


def test_only_gpus_are_listed() -> None:
    library = Library(_DEVICES)
    assert gpu_devices(library) == [
        Device("CUDA0", "NVIDIA RTX 4090", 20 * _GIB, 24 * _GIB, "gpu", "0000:01:00.0"),
        Device("", "", 0, 0),
    ]
    assert library.ggml_backend_dev_get.restype is ctypes.c_void_p  # an int would cut off half of a pointer


def test_an_integrated_gpu_is_used_where_there_is_no_other() -> None:
    assert gpu_devices(Library([_PROCESSOR, _CHIP])) == [
        Device("Vulkan1", "Radeon \ufffd", 0, 2**40, "integrated", "0000:05:00.0")
    ]
    assert [device.name for device in gpu_devices(Library([_CHIP, _CARD]))] == ["CUDA0"]


def test_a_card_that_two_backends_see_is_one() -> None:
    assert [device.name for device in gpu_devices(Library([_CARD, _SAME_CARD]))] == ["CUDA0"]
    unknown = [(name, b"", 1, 1, 2, ident) for name, ident in ((b"A", None), (b"B", None), (b"C", b""))]
    assert [device.name for device in gpu_devices(Library(unknown))] == ["A", "B", "C"]


@pytest.mark.parametrize("name", [b"MTL0", b"Metal"])
def test_a_gpu_of_apple_uses_the_main_memory(name: bytes) -> None:
    (device,) = gpu_devices(Library([(name, b"Apple M3", 1, 10 * _GIB, 12 * _GIB, None), _PROCESSOR]))
    assert device.kind == "integrated"


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
    assert used.device == 4 * _GIB
    assert used.host > 1 << 20


def test_the_real_library_has_the_functions(backend: None, load_params: LoadParams) -> None:
    """Whatever it finds here: its functions are there, and are called the right way."""
    library = llama.lib._lib
    count, get, kind, read = (devices._bound(library, name) for name in devices._FUNCTIONS)
    assert count() >= 1
    properties = Properties()
    processor = get(count() - 1)
    read(processor, ctypes.byref(properties))
    assert properties.name == b"CPU"
    assert properties.type == kind(processor) == 0
    assert 0 < properties.free <= properties.total
    assert properties.id is None
    assert not any(properties.abilities[8:])  # nothing is written that far
    gpus = llama.list_gpus()
    assert bool(gpus) == llama.supports_gpu_offload()
    assert all(gpu.name and 0 <= gpu.free <= gpu.total for gpu in gpus)
    before = llama.memory_in_use()
    assert isinstance(before, Footprint)
