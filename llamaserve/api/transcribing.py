"""Running a transcription for an HTTP request: from an upload to what is heard in it, until it is answered or its
client has left.

The upload lies in a folder of its own, and what it is decoded to beside it; both are gone when the request is over.
Knows files and the stream of engine events; what a request or an answer looks like is the endpoint's business.
"""

from __future__ import annotations

import asyncio
import importlib.util
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import BinaryIO, Final

from llamaserve.api.accounting import account
from llamaserve.api.generating import WAITS_FOR_TURN, phase_of
from llamaserve.api.models import known_speech
from llamaserve.api.scratch import Scratch
from llamaserve.api.services import Services
from llamaserve.api.uploads import Upload, kept
from llamaserve.errors import InvalidRequest, ModelNotCapable, NotSupported, TimeLimitExceeded
from llamaserve.registry.admission import Place
from llamaserve.registry.served import ServedModel, Use
from llamaserve.registry.speech_file import SpeechFile
from llamaserve.registry.tasks import NOT_WHISPER
from llamaserve.registry.whisper_file import WhisperHeader
from llamaserve.speech.audio import Audio
from llamaserve.speech.languages import NAMES
from llamaserve.speech.values import SAMPLE_SIZE, Heard, Transcribed, Transcription
from llamaserve.worker.process import TranscriptionStream

_NEEDED: Final = ("av", "_pywhispercpp")  # modules of the extra


class Hearing:
    """One audio at one model. It must be closed."""

    def __init__(
        self,
        services: Services,
        model: ServedModel,
        upload: Upload,
        transcription: Transcription,
        *,
        named: bool,
        keep_alive: float | None,
    ) -> None:
        """The upload has one file, and is closed when this is. ``named`` is whether the request names the model, and
        ``keep_alive`` how many seconds it shall stay loaded after this.
        """
        self._services = services
        self._model = model
        self._upload = upload
        self._transcription = transcription
        self._named = named
        self._keep_alive = keep_alive
        self._account = account()
        self._scratch: Scratch | None = None
        self._place: Place | None = None
        self._space: Place | None = None  # on the disk
        self._use: Use | None = None
        self._stream: TranscriptionStream | None = None
        self._time_limit: float | None = None  # seconds

    @property
    def translates(self) -> bool:
        """Whether the text is to be English."""
        return self._transcription.translate

    async def open(self) -> Audio:
        """Decode the upload, load the model if need be, and begin. Raises whatever makes the request impossible."""
        try:
            return await self._open()
        except BaseException:
            self.close()
            raise

    async def _open(self) -> Audio:
        await self._check()
        await self._account.turn(self._model.name)
        self._place = self._model.admission.enter(1, self._account.owner)
        with kept():
            self._scratch = Scratch()
            folder = self._scratch.path
            with self._upload.file as upload, _created(folder / "upload") as copy:
                await asyncio.to_thread(shutil.copyfileobj, upload, copy)
        samples = folder / "samples"
        audio = await self._services.audio.decode(folder / "upload", samples)
        (folder / "upload").unlink()
        self._upload.close()
        self._space = self._services.upload_admission.enter(audio.samples * SAMPLE_SIZE, self._account.owner)
        self._use = self._model.use()
        worker = await self._use.worker()
        self._time_limit = self._answering.spec.time_limit
        self._stream = worker.transcribe(samples, self._transcription, share=self._account.owner)
        self._stream.when_over(self._over)
        return audio

    async def events(self) -> AsyncIterator[Heard | Transcribed]:
        """Yield what is heard. Raises ``TimeLimitExceeded`` once the model's time limit is over."""
        assert self._stream is not None
        events, limit = self._stream.events(), self._time_limit
        deadline = None if limit is None else asyncio.get_running_loop().time() + limit
        try:
            while True:
                async with asyncio.timeout_at(deadline):
                    event = await anext(events, None)
                if event is None:
                    return
                yield event
        except TimeoutError:
            raise TimeLimitExceeded(
                f"it took longer than the {limit:g} seconds that this model's `time_limit` leaves"
            ) from None

    def close(self) -> None:
        """End it if it is still going on, and let others have its place. Further calls do nothing."""
        if self._stream is not None:
            self._stream.close()
        self._let_go()

    def _over(self) -> None:
        """All is heard, however long the client takes to read it."""
        if self._use is not None and self._stream is not None and not self._stream.failed:
            self._use.keep(self._keep_alive)
        self._let_go()

    def _let_go(self) -> None:
        if self._use is not None:
            self._use.leave()
        for place in (self._place, self._space):
            if place is not None:
                place.leave()
        self._upload.close()
        if self._scratch is not None:
            self._scratch.close()

    @property
    def _answering(self) -> ServedModel:
        return (self._use and self._use.model) or self._model

    @property
    def phase(self) -> str:
        """What the client waits for, in a few words."""
        if self._account.waits:
            return WAITS_FOR_TURN
        if self._use is None:
            return "decoding"
        progress = self._stream.progress if self._stream is not None else None
        return phase_of(self._answering, progress, lambda at: f"heard {at.evaluated} of {at.prompt_tokens} s")

    async def _check(self) -> None:
        """Refuse what this model, or this installation, can't do."""
        if missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
            words = " and ".join(missing)
            raise NotSupported(f"speech needs two packages that are not installed ({words}): llamaserve[speech]")
        await self._model.require("transcription")
        name, named = self._model.name, "model" if self._named else None
        if not isinstance(self._model.file, SpeechFile):
            raise ModelNotCapable(f"{name}: {NOT_WHISPER}", param=named)
        header = await self._model.file.read_contents()
        language = self._transcription.language
        if self._transcription.translate and not header.translates:
            why = "was not taught to translate" if header.multilingual else "knows English only, so it can't translate"
            raise ModelNotCapable(f"{name} {why}; {await self._another()}", param=named)
        if language is None or language in list(NAMES)[: header.languages]:
            return
        if header.multilingual:
            raise InvalidRequest(f"{name} does not know {NAMES[language].capitalize()}", param="language")
        raise ModelNotCapable(
            f"{name} knows English only, and not {NAMES[language].capitalize()}; {await self._another()}",
            param="language",
        )

    async def _another(self) -> str:
        """Say which model can do what is asked for."""
        for each in self._services.pool.models:
            header = await asyncio.to_thread(known_speech, each)
            if header is not None and self._suits(header):
                return f"{each.name} can do it"
        return "`llamaserve models` lists some that know more, such as whisper-base (`llamaserve pull whisper-base`)"

    def _suits(self, header: WhisperHeader) -> bool:
        if self._transcription.translate and not header.translates:
            return False
        return self._transcription.language in (None, *list(NAMES)[: header.languages])


def _created(path: Path) -> BinaryIO:
    return path.open("wb")
