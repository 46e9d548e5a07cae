from __future__ import annotations

import subprocess
import sys

_CHECK = """
import sys
from llamaserve.engine import llama
print(sorted(name for name in sys.modules if name.startswith(("llama_cpp", "jinja2", "diskcache"))))
import llama_cpp
print(llama_cpp.llama_cpp is llama.lib, llama_cpp.llama_decode is llama.lib.llama_decode, llama_cpp.Llama.__name__)
import llama_cpp.llama_cpp as again
from llama_cpp import llama_cpp as once_more
print(again is llama.lib, once_more is llama.lib)
"""
_CHECK_AFTERWARDS = """
import llama_cpp
from llamaserve.engine import llama
print(sys.modules["llama_cpp"] is llama_cpp, llama_cpp.llama_cpp is llama.lib)
"""


def _output(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_only_the_binding_is_imported_and_the_package_still_can_be() -> None:
    assert _output(_CHECK) == [
        "['llama_cpp._ctypes_extensions', 'llama_cpp.llama_cpp']",
        "True True Llama",
        "True True",
    ]


def test_a_package_that_is_there_already_stays() -> None:
    assert _output("import sys" + _CHECK_AFTERWARDS) == ["True True"]
