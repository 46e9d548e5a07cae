"""The GPUs that llama.cpp can compute on, as its tensor library ggml lists them.

``llama_cpp`` does not bind these functions, so they are looked up here. They are as ggml-backend.h of ggml 0.25 has
them, and older and newer builds without one of them have no GPUs for us. Knows the list and nothing of models.
Untested on a machine with a GPU so far: the tests use a double of the library.
"""

from __future__ import annotations

import ctypes
from typing import Any, Final

from llamaserve.engine.events import Device

_GPU, _INTEGRATED = 1, 2  # of ggml_backend_dev_type; 0 is the CPU, 3 an accelerator of its work
_MOST: Final = 64  # devices; a longer list can only be a mistake

_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_size_t
_FUNCTIONS: Final = {  # what each returns and takes
    "ggml_backend_dev_count": (_SIZE, ()),
    "ggml_backend_dev_get": (_POINTER, (_SIZE,)),
    "ggml_backend_dev_name": (ctypes.c_char_p, (_POINTER,)),
    "ggml_backend_dev_description": (ctypes.c_char_p, (_POINTER,)),
    "ggml_backend_dev_type": (ctypes.c_int, (_POINTER,)),
    "ggml_backend_dev_memory": (None, (_POINTER, ctypes.POINTER(_SIZE), ctypes.POINTER(_SIZE))),
}


def gpu_devices(library: Any) -> list[Device]:
    """Return the GPUs that a library with ggml's functions can use, once its backends are loaded."""
    try:
        count, get, name, description, kind, memory = (_bound(library, each) for each in _FUNCTIONS)
    except AttributeError:
        return []
    devices: list[Device] = []
    for index in range(min(count(), _MOST)):
        device = get(index)
        if device and kind(device) in (_GPU, _INTEGRATED):
            free, total = _SIZE(), _SIZE()
            memory(device, ctypes.byref(free), ctypes.byref(total))
            devices.append(Device(_text(name(device)), _text(description(device)), free.value, total.value))
    return devices


def _bound(library: Any, name: str) -> Any:
    function = getattr(library, name)
    function.restype, function.argtypes = _FUNCTIONS[name]
    return function


def _text(value: bytes | None) -> str:
    return (value or b"").decode("utf-8", "replace")
