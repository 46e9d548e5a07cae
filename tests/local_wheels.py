"""Wheels on this machine: tiny-model 1.0, or another distribution of this version, with any files, as pip takes it."""

from __future__ import annotations

import base64
import hashlib
import zipfile
from pathlib import Path


def build_wheel(folder: Path, files: dict[str, bytes], distribution: str = "tiny_model") -> Path:
    """Write a wheel that pip accepts."""
    info = f"{distribution}-1.0.dist-info"
    needs = f"Name: {distribution}\nVersion: 1.0\nRequires-Dist: not-there-at-all\n"
    files = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\n{needs}".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    sums = {name: base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=") for name, data in files.items()}
    record = "".join(f"{name},sha256={sums[name].decode()},{len(data)}\n" for name, data in files.items())
    path = folder / f"{distribution}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in {**files, f"{info}/RECORD": f"{record}{info}/RECORD,,\n".encode()}.items():
            archive.writestr(name, data)
    return path
