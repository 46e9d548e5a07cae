"""Puts the application together: routes, middleware, error handlers, and the parts that live as long as it does."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from llamaserve import __version__
from llamaserve.api import chat, completions, fim, infill, internal, models
from llamaserve.api.handlers import add_error_handlers
from llamaserve.api.middleware import RequestGate
from llamaserve.api.options import IGNORED_HEADER
from llamaserve.api.presets import Presets
from llamaserve.api.services import Services
from llamaserve.chat.characters import Characters
from llamaserve.chat.conversation import Conversations
from llamaserve.chat.instruction_templates import InstructionTemplates
from llamaserve.chat.template import TemplateRenderer, guest_renderer
from llamaserve.registry.pool import ModelPool
from llamaserve.settings import Settings
from llamaserve.worker.grammar_check import GrammarChecker


def create_app(settings: Settings, pool: ModelPool) -> FastAPI:
    """Return the application. It begins to load the pool's models when it starts, and ends them when it stops."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with TemplateRenderer() as renderer, guest_renderer() as guests, GrammarChecker() as grammars:
            app.state.services = Services(
                settings,
                pool,
                Presets(settings.presets_dir),
                Characters(settings.characters_dir),
                InstructionTemplates(settings.instruction_templates_dir),
                Conversations(renderer, guests, grammars),
                grammars,
            )
            pool.start_loading()
            warming = asyncio.create_task(renderer.warm())
            try:
                yield
            finally:
                warming.cancel()
                await asyncio.gather(warming, return_exceptions=True)
                await pool.aclose()

    app = FastAPI(
        title="llamaserve",
        version=__version__,
        summary="Quantised GGUF models behind an OpenAI-compatible API",
        lifespan=lifespan,
        redirect_slashes=False,
    )
    for resource in (completions, chat, fim, infill, models, internal):
        app.include_router(resource.router)
    add_error_handlers(app)
    app.add_middleware(RequestGate, max_body=settings.max_body)
    app.add_middleware(
        CORSMiddleware,
        allow_origins=settings.cors_origins,
        allow_methods=["*"],
        allow_headers=["*"],
        expose_headers=[IGNORED_HEADER, chat.TRUNCATED_HEADER, "Retry-After"],
    )
    return app
