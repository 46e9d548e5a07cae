"""How to import a package's module without the package around it. Knows no package."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from importlib.util import find_spec, module_from_spec


@contextlib.contextmanager
def without_package(name: str) -> Iterator[None]:
    """Import modules of a package without running the package's own ``__init__``: that of ``llama_cpp`` imports much
    which nothing here uses, such as a template engine, and takes 50 ms and 5 MB in every child. Afterwards others can
    import the whole package, with the same modules.
    """
    spec = find_spec(name) if name not in sys.modules else None
    if spec is None:
        yield
        return
    sys.modules[name] = module_from_spec(spec)
    try:
        yield
    finally:
        del sys.modules[name]
