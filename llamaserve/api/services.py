"""What every endpoint may use, in one value that the application carries."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Annotated, Any, NamedTuple

from fastapi import Depends, Request

from llamaserve.api.accounting import Books
from llamaserve.api.image_links import ImageLinks
from llamaserve.api.presets import Presets
from llamaserve.api.uploads import UploadAdmission
from llamaserve.chat.characters import Characters
from llamaserve.chat.conversation import Conversations
from llamaserve.chat.instruction_templates import InstructionTemplates
from llamaserve.images.pictures import PictureReader
from llamaserve.keys.watched import WatchedKeys
from llamaserve.registry.downloads import Downloads
from llamaserve.registry.pool import ModelPool
from llamaserve.settings import Settings
from llamaserve.speech.audio import AudioDecoder
from llamaserve.worker.grammar_check import GrammarChecker
from llamaserve.worker.process import GenerationStream


class Running(NamedTuple):
    """A generation under way, and the name of the key that asks for it; empty without one."""

    stream: GenerationStream
    owner: str


@dataclass(frozen=True)
class Services:
    """The server's parts. ``running`` has the generations under way by the id that their client knows."""

    settings: Settings
    pool: ModelPool
    presets: Presets
    characters: Characters
    instruction_templates: InstructionTemplates
    conversations: Conversations
    grammars: GrammarChecker
    downloads: Downloads
    audio: AudioDecoder
    pictures: PictureReader
    image_links: ImageLinks
    books: Books
    keys: WatchedKeys
    upload_admission: UploadAdmission = field(default_factory=UploadAdmission)
    running: dict[str, Running] = field(default_factory=dict)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Have something done that goes on even if no request waits for it."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


async def _services(request: Request) -> Services:  # which spares a thread for each request
    services: Services = request.app.state.services
    return services


UsesServices = Annotated[Services, Depends(_services)]
