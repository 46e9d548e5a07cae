"""Puts the application together: routes, middleware, error handlers, and the parts that live as long as it does."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import signal
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager

from fastapi import FastAPI

from llamaserve import __version__
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
    metrics = Metrics(pool, ledger)
    pool.events.witness(metrics.model_event)
    tracing = Tracing() if settings.tracing else None
    books = Books(metrics, ledger, tracing, log_prompts=settings.log_prompts)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await asyncio.to_thread(sweep)
        async with (
            TemplateRenderer() as renderer,
            guest_renderer() as guests,
            GrammarChecker() as grammars,
            AudioDecoder(longest=settings.max_audio) as decoder,
            PictureReader() as pictures,
            ImageLinks() as links,
            _started(tracing),
            _started(ledger),  # so that it is closed before that
        ):
            downloads = Downloads(functools.partial(_tell_of_download, pool))
            app.state.services = Services(
                settings,
                pool,
                Presets(settings.presets_dir),
                Characters(settings.characters_dir),
                InstructionTemplates(settings.instruction_templates_dir),
                Conversations(renderer, guests, grammars),
                grammars,
                downloads,
                decoder,
                pictures,
                links,
                books,
                keys,
            )
            pool.start_loading()
            beside = [
                asyncio.create_task(each)
                for each in (renderer.warm(), watch(pool), keys.watch(), metrics.watch_the_loop())
            ]
            try:
                with _reloading_on_hangup(pool):
                    yield
            finally:
                await downloads.aclose()
                for task in beside:
                    task.cancel()
                await asyncio.gather(*beside, return_exceptions=True)
                await pool.aclose()

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
    app.add_middleware(RequestGate, max_body=settings.max_body, max_upload=settings.max_upload)
    app.add_middleware(Accounting, allowances=Allowances(), books=books)
    app.add_middleware(KeyGate, keys=keys, refused=metrics.refused)
    origins = Origins(settings.cors_origins, lambda: keys.needed)
    app.add_middleware(OriginHeaders, origins=origins, expose_headers=_EXPOSED)
    app.add_middleware(HostGate, hosts=Hosts(settings.allowed_hosts), origins=origins, refused=metrics.refused)
    app.add_middleware(RequestLog)
    return app


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
