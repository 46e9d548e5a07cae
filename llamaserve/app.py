"""Puts the application together: routes, middleware, error handlers, and the parts that live as long as it does."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import signal
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager
from typing import Any

from fastapi import FastAPI

from llamaserve import __version__, heap
from llamaserve.api import (
    audio,
    billing,
    chat,
    completions,
    downloads as downloads_api,
    embeddings,
    fim,
    images,
    infill,
    internal,
    lora,
    model_admin,
    model_events,
    models,
    moderations,
    observation,
    rerank,
)
from llamaserve.api.access import KeyGate
from llamaserve.api.accounting import RATE_LIMIT_HEADERS, Accounting, Books
from llamaserve.api.handlers import add_error_handlers
from llamaserve.api.hosts import HostGate, Hosts, OriginHeaders, Origins
from llamaserve.api.image_links import ImageLinks
from llamaserve.api.metrics import Metrics
from llamaserve.api.middleware import RequestGate
from llamaserve.api.openapi import DocumentedAPI
from llamaserve.api.options import IGNORED_HEADER, TRUNCATED_HEADER, WARNING_HEADER
from llamaserve.api.presets import Presets
from llamaserve.api.request_log import HEADER as REQUEST_ID_HEADER, RequestLog
from llamaserve.api.scratch import sweep
from llamaserve.api.services import Services
from llamaserve.api.tracing import Tracing
from llamaserve.chat.characters import Characters
from llamaserve.chat.conversation import Conversations
from llamaserve.chat.instruction_templates import InstructionTemplates
from llamaserve.chat.template import TemplateRenderer, guest_renderer
from llamaserve.errors import LlamaserveError
from llamaserve.images.pictures import PictureReader
from llamaserve.keys.allowance import Allowances
from llamaserve.keys.watched import WatchedKeys
from llamaserve.registry.downloads import Download, Downloads, State
from llamaserve.registry.pool import ModelPool
from llamaserve.registry.watching import watch
from llamaserve.settings import Settings
from llamaserve.speech.audio import AudioDecoder
from llamaserve.usage.ledger import Ledger
from llamaserve.worker.grammar_check import GrammarChecker

logger = logging.getLogger(__name__)

_RESOURCES = (
    *(
        completions,
        chat,
        fim,
        infill,
        embeddings,
        rerank,
        moderations,
        audio,
        images,
        models,
        internal,
        billing,
        observation,
    ),
    *(model_admin, lora, downloads_api, model_events),
)
_EXPOSED = (
    *(IGNORED_HEADER, TRUNCATED_HEADER, WARNING_HEADER, rerank.METHOD_HEADER, "Retry-After", REQUEST_ID_HEADER),
    *RATE_LIMIT_HEADERS,
)  # headers that web pages may see


def create_app(settings: Settings, pool: ModelPool, keys: WatchedKeys | None = None) -> FastAPI:
    """Return the application. It begins to load the pool's models when it starts, and ends them when it stops. Without
    ``keys`` everybody may use it.
    """
    keys = keys or WatchedKeys([], None)
    days = settings.usage_retention
    ledger = Ledger(settings.ledger_path, days) if days else None
    tracing = Tracing() if settings.tracing else None
    metrics = Metrics(pool, ledger)
    pool.events.witness(metrics.model_event)
    books = Books(metrics, ledger, tracing, log_prompts=settings.log_prompts)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await asyncio.to_thread(sweep)
        # The ledger is closed before the spans are sent that are left, which may take a while.
        async with _started(tracing), _started(ledger), _services(settings, pool, books, keys) as app.state.services:
            yield

    app = DocumentedAPI(
        title="llamaserve",
        version=__version__,
        summary="Quantised GGUF models behind an OpenAI-compatible API",
        lifespan=lifespan,
        redirect_slashes=False,
        generate_unique_id_function=lambda route: route.name,
    )
    for resource in _RESOURCES:
        app.include_router(resource.router)
    add_error_handlers(app)
    _add_middleware(app, settings, keys, books)
    return app


def _add_middleware(app: FastAPI, settings: Settings, keys: WatchedKeys, books: Books) -> None:
    """Have requests go through what is not about any one endpoint: the last added is the first to see them."""
    refused, origins = books.metrics.refused, Origins(settings.cors_origins, lambda: keys.needed)
    app.add_middleware(RequestGate, max_body=settings.max_body, max_upload=settings.max_upload, refused=refused)
    app.add_middleware(Accounting, allowances=Allowances(), books=books)
    app.add_middleware(KeyGate, keys=keys, refused=refused)
    app.add_middleware(OriginHeaders, origins=origins, expose_headers=_EXPOSED)
    app.add_middleware(HostGate, hosts=Hosts(settings.allowed_hosts), origins=origins, refused=refused)
    app.add_middleware(RequestLog)


@contextlib.asynccontextmanager
async def _services(settings: Settings, pool: ModelPool, books: Books, keys: WatchedKeys) -> AsyncIterator[Services]:
    """Provide what endpoints use, and have all that goes on beside requests go on."""
    downloads = Downloads(functools.partial(_tell_of_download, pool))
    async with (
        TemplateRenderer() as renderer,
        guest_renderer() as guests,
        GrammarChecker() as grammars,
        AudioDecoder(longest=settings.max_audio) as decoder,
        PictureReader() as pictures,
        ImageLinks() as links,
        contextlib.AsyncExitStack() as ending,
    ):
        pool.start_loading()
        ending.push_async_callback(pool.aclose)
        work = renderer.warm(), watch(pool), keys.watch(), books.metrics.watch_the_loop(), heap.keep_small()
        await ending.enter_async_context(_going_on(*work))
        ending.push_async_callback(downloads.aclose)
        with _reloading_on_hangup(pool):
            yield Services(
                settings=settings,
                pool=pool,
                presets=Presets(settings.presets_dir),
                characters=Characters(settings.characters_dir),
                instruction_templates=InstructionTemplates(settings.instruction_templates_dir),
                conversations=Conversations(renderer, guests, grammars),
                grammars=grammars,
                downloads=downloads,
                audio=decoder,
                pictures=pictures,
                image_links=links,
                books=books,
                keys=keys,
            )


@contextlib.asynccontextmanager
async def _going_on(*work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Have work done within the block for which nobody waits; so if it fails, the log says so."""
    tasks = [asyncio.create_task(each) for each in work]
    for task in tasks:
        task.add_done_callback(_tell_of_failure)
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _tell_of_failure(task: asyncio.Task[None]) -> None:
    if task.cancelled() or (error := task.exception()) is None:
        return
    if isinstance(error, LlamaserveError):
        logger.error("%s", error.message)
    else:
        logger.error("%s has ended by a bug, and is not done any more", task.get_coro(), exc_info=error)


def _started(part: Ledger | Tracing | None) -> AbstractAsyncContextManager[object]:
    return contextlib.nullcontext() if part is None else part


@contextlib.contextmanager
def _reloading_on_hangup(pool: ModelPool) -> Iterator[None]:
    """Have SIGHUP reload models.yaml; only where signals can be had, which is in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    reloads: set[asyncio.Task[None]] = set()

    def reload() -> None:
        task = loop.create_task(pool.reload())
        reloads.add(task)
        task.add_done_callback(reloads.discard)

    loop.add_signal_handler(signal.SIGHUP, reload)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGHUP)


def _tell_of_download(pool: ModelPool, download: Download) -> None:
    """Publish where a download stands; a model that is here now is offered."""
    kind = "download_progress" if download.state is State.RUNNING else f"download_{download.state.value}"
    pool.events.publish(kind, download.model, **downloads_api.describe(download))
    if download.state is State.DONE:
        pool.reload_soon()
