"""The file of a model that is none of llama.cpp's: what it says of itself is read by another module.

Knows nothing of processes, or of whether it is loaded.
"""

from __future__ import annotations

import asyncio
import logging
import time
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Generic, TypeVar

from llamaserve.engine.params import Adapter
from llamaserve.errors import ModelError, ModelNotCapable
from llamaserve.registry.gguf import GGUFHeader
from llamaserve.registry.model_file import FAILURE_KEPT, ModelFile
from llamaserve.registry.spec import ModelSpec, Prefixes, Task
from llamaserve.registry.tasks import WORK

logger = logging.getLogger(__name__)

H = TypeVar("H")


class OtherFile(ModelFile, Generic[H]):
    """A file with these settings, of which ``contents`` are what it says of itself. Subclasses read it."""

    task: ClassVar[Task]
    _contents: H | None = None

    @abstractmethod
    def _read_contents(self, *, check_sum: bool) -> H:
        """Read the file, which is compared with the sum that is promised if that is wanted. Raises ``ModelError``, and
        ``ModelNotCapable``.
        """

    @property
    def header(self) -> GGUFHeader:
        """None of llama.cpp's. Raises ``ModelNotCapable``."""
        raise ModelNotCapable(f"{self._name} {WORK[self.task]}; it is no model of texts")

    @property
    def known_header(self) -> GGUFHeader | None:
        """None, since it is no file of llama.cpp's."""
        return None

    async def peek(self) -> GGUFHeader | None:
        """See ``known_header``."""
        return None

    @property
    def contents(self) -> H:
        """What the file says of itself; read once it is needed. Raises ``ModelError``, and ``ModelNotCapable``."""
        if self._contents is None:
            self._contents = self._read_contents(check_sum=True)
        return self._contents

    @property
    def known_contents(self) -> H | None:
        """The same, or None when the file is missing or bad. A promised sum is not looked at."""
        if self._contents is not None or time.monotonic() < self._unreadable_until:
            return self._contents
        try:
            self._contents = self._read_contents(check_sum=False)
        except (ModelError, ModelNotCapable) as error:
            logger.info("%s: %s", self._name, error.message)
            self._unreadable_until = time.monotonic() + FAILURE_KEPT
        return self._contents

    async def read_contents(self) -> H:
        """Return what the file says of itself, read in a thread if it is not known yet. Raises as ``contents``."""
        return self._contents if self._contents is not None else await asyncio.to_thread(lambda: self.contents)

    def checked(self, adapters: Sequence[Adapter]) -> tuple[Adapter, ...]:
        """Return no adapters. Raises ``ModelNotCapable`` when there are some."""
        refuse_adapters(bool(adapters))
        return ()


def refuse_adapters(given: bool) -> None:
    """Refuse adapters if some are given. Raises ``ModelNotCapable``."""
    if given:
        raise ModelNotCapable("LoRA adapters are for models that generate text")


def refuse_text_settings(spec: ModelSpec) -> None:
    """Refuse what only models of texts can have. Raises ``ModelNotCapable``."""
    if spec.pooling != "auto" or spec.prefixes != Prefixes():
        raise ModelNotCapable("`pooling` and `prefixes` are for models that make embeddings: leave them out")
