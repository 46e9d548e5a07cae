"""The GPUs that llama.cpp computes on, as its tensor library ggml lists them and llama.cpp chooses among them: a card
that two backends see once, and integrated GPUs only where there are no others.

``llama_cpp`` does not bind these functions, so they are looked up here. They are as ggml-backend.h of ggml 0.25 has
them, and builds without one of them have no GPUs for us. Knows the list and nothing of models.
Untested on a machine with a GPU so far: the tests use a double of the library.
"""

from __future__ import annotations

import ctypes
from typing import Any, Final

from llamaserve.engine.events import Device

_GPU, _INTEGRATED = 1, 2  # of ggml_backend_dev_type; 0 is the CPU, 3 an accelerator of its work
_APPLE: Final = ("MTL", "Metal")  # their GPUs use the main memory, and are of the first kind all the same
_MOST: Final = 64  # devices; a longer list can only be a mistake

_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_size_t
_FUNCTIONS: Final = {  # what each returns and takes
    "ggml_backend_dev_count": (_SIZE, ()),
    "ggml_backend_dev_get": (_POINTER, (_SIZE,)),
    "ggml_backend_dev_type": (ctypes.c_int, (_POINTER,)),
    "ggml_backend_dev_get_props": (None, (_POINTER, _POINTER)),
}


class Properties(ctypes.Structure):
    """The ``ggml_backend_dev_props`` of ggml-backend.h."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("description", ctypes.c_char_p),
        ("free", _SIZE),
        ("total", _SIZE),
        ("type", ctypes.c_int),
        ("id", ctypes.c_char_p),
        ("abilities", ctypes.c_bool * 64),  # five of them so far
    )


def gpu_devices(library: Any) -> list[Device]:
    """Return the GPUs that a library with ggml's functions uses, once its backends are loaded."""
    try:
        count, get, kind, read = (_bound(library, each) for each in _FUNCTIONS)
    except AttributeError:
        return []
    found: dict[int, list[Device]] = {_GPU: [], _INTEGRATED: []}
    known: set[str] = set()
    for index in range(min(count(), _MOST)):
        native = get(index)
        if native and (group := found.get(kind(native))) is not None:
            properties = Properties()
            read(native, ctypes.byref(properties))
            device = _device(properties, kind(native))
            if not device.id or device.id not in known:
                group.append(device)
            known.add(device.id)
    return found[_GPU] or found[_INTEGRATED]


def _device(properties: Properties, kind: int) -> Device:
    name = _text(properties.name)
    shares = kind == _INTEGRATED or name.startswith(_APPLE)
    texts = name, _text(properties.description)
    return Device(*texts, properties.free, properties.total, "integrated" if shares else "gpu", _text(properties.id))


def _bound(library: Any, name: str) -> Any:
    function = getattr(library, name)
    function.restype, function.argtypes = _FUNCTIONS[name]
    return function


def _text(value: bytes | None) -> str:
    return (value or b"").decode("utf-8", "replace")
