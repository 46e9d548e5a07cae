"""Pictures: how much slower the server is than the library alone, and what chats feel of a picture that is being made.

The library has the same files, threads, options and environment, and makes the picture in one call. The server also
writes it as PNG and in base64, and sends it. Without a model for pictures it is one of random weights, as in the tests:
its pictures are noise, and take so little time that what the server adds shows best.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import msgspec

from benchmark import contenders, texts
from benchmark.answers import Request, rate
from benchmark.client import Stream, Unreachable, message_in, unpack
from benchmark.contenders import HERE, LIMIT, WORKER_ENVIRONMENT, HttpServer
from benchmark.lab import OURS, PLAIN_SETTINGS, Lab, NotPossible
from benchmark.models import find_model
from benchmark.processes import LineProcess, StartFailed, running
from benchmark.results import Key, Results, Row, at_least, at_most
from llamaserve.registry.diffusion_file import read_diffusion
from llamaserve.registry.image_file import image_params, locate_parts
from llamaserve.registry.spec import ModelSpec

BARE = "bare call"
_NAME = "pictures"
_SIZES = {"64x64 pixels": (64, 64), "256x256 pixels": (256, 256)}
_PROMPT = "a lighthouse at dawn"
_LONG = {"size": "512x512", "steps": 50}  # minutes, of which no chat sees the end
_TOKENS = 2  # times those of other workloads
_TESTS = HERE.parent.parent / "tests"


class Painter(Protocol):
    """Somebody who makes pictures."""

    name: str

    def draw(self, size: tuple[int, int], seed: int) -> tuple[float, str]:
        """Return the seconds that a picture of one step took, and the sum of its pixels."""


class PictureServer:
    """A model of a server over HTTP. Other streams of the same client are read meanwhile."""

    def __init__(self, server: HttpServer, model: str) -> None:
        self.name = server.name
        self._client = server.client
        self._model = model

    def draw(self, size: tuple[int, int], seed: int) -> tuple[float, str]:
        """See ``Painter``."""
        body = {"size": f"{size[0]}x{size[1]}", "steps": 1, "seed": seed, "response_format": "b64_json"}
        with self._asked(body) as stream:
            self._client.pump(lambda: stream.done, LIMIT)
        status, answer, _ = unpack(b"".join(data for _, data in stream.pieces))
        if status != 200:
            raise Unreachable(f"status {status}: {message_in(answer)}" if status else "no HTTP answer")
        seconds = stream.pieces[-1][0] - stream.started
        return seconds, _sum_of(base64.b64decode(json.loads(answer)["data"][0]["b64_json"]))

    @contextlib.contextmanager
    def drawing(self) -> Iterator[Stream]:
        """Have a picture made as long as the block lasts. When it begins, the first step is under way."""
        with self._asked({**_LONG, "stream": True}) as stream:
            self._client.pump(lambda: stream.flowing, LIMIT)
            yield stream

    @contextlib.contextmanager
    def _asked(self, fields: Mapping[str, Any]) -> Iterator[Stream]:
        body = {"model": self._model, "prompt": _PROMPT, "cfg_scale": 1, **fields}
        stream = self._client.begin("/images/generations", body)
        try:
            yield stream
        finally:
            self._client.stop(stream)


def _sum_of(png: bytes) -> str:
    from PIL import Image

    return hashlib.sha256(Image.open(io.BytesIO(png)).convert("RGB").tobytes()).hexdigest()


class BareCall(LineProcess):
    """A process that has nothing but the library."""

    def __init__(self, process: subprocess.Popen[bytes], errors: IO[bytes]) -> None:
        super().__init__(BARE, process, errors)
        self.name = BARE

    def draw(self, size: tuple[int, int], seed: int) -> tuple[float, str]:
        """See ``Painter``."""
        job = {"prompt": _PROMPT, "width": size[0], "height": size[1], "seed": seed, "steps": 1}
        done = self.command(do="draw", job=job)
        return done["seconds"], done["pixels"]


@dataclass(frozen=True)
class _Sides:
    server: HttpServer
    ours: PictureServer
    bare: BareCall


def run(lab: Lab) -> None:
    """Take turns, round by round, with pictures of two sizes; then chat alone and beside a picture."""
    with _sides(lab) as sides:
        for number, order in lab.rounds([sides.ours, sides.bare]):
            for seed, (what, size) in enumerate(_SIZES.items(), 1000 * number):
                sums = {}
                for painter in order:
                    seconds, sums[painter.name] = painter.draw(size, seed)
                    lab.results.add(_NAME, painter.name, what, seconds)
                lab.results.add(_NAME, OURS, f"{what}, same", float(sums[OURS] == sums[BARE]))
            _chat(lab, sides, f"pictures/{number}")


@contextlib.contextmanager
def _sides(lab: Lab) -> Iterator[_Sides]:
    """Start both, and have them make a picture."""
    name, options = _model(lab)
    spec = ModelSpec.model_validate(options)
    file = Path(options["source"].removeprefix("file:"))
    params = image_params(spec, read_diffusion(file, locate_parts(name, spec, Path("/"))))
    command = [sys.executable, str(HERE / "bare_picture.py")]
    with contextlib.ExitStack() as stack:
        chat = lab.settings(**PLAIN_SETTINGS)
        server = stack.enter_context(contenders.llamaserve(OURS, lab.model, chat, {name: options}))
        bare = BareCall(*stack.enter_context(running(command, WORKER_ENVIRONMENT)))
        bare.wait_until_started()
        bare.command(do="load", params=msgspec.to_builtins(params))
        sides = _Sides(server, PictureServer(server, name), bare)
        for painter in (sides.ours, sides.bare):
            painter.draw((64, 64), 1)
        yield sides


def _model(lab: Lab) -> tuple[str, dict[str, Any]]:
    """Return the model for pictures and its entry of models.yaml: the one asked for, or one of random weights."""
    if lab.plan.image_model is not None:
        found = find_model(lab.plan.image_model)
        return found.name, {**found.options, "source": f"file:{found.file}", "task": "image"}
    sys.path.append(str(_TESTS))
    try:
        from tiny_diffusion import write_model
    except ImportError as error:
        raise StartFailed(f"there is no model for pictures: --image-model ({error})") from error
    folder = lab.plan.cache / "tiny-diffusion"
    folder.mkdir(parents=True, exist_ok=True)
    model, decoder = write_model(folder)
    return "random", {"source": f"file:{model}", "task": "image", "parts": {"taesd": f"file:{decoder}"}}


def _chat(lab: Lab, sides: _Sides, seed: str) -> None:
    _ask(lab, sides.server, f"{seed}/alone", "chat alone")
    with sides.ours.drawing() as stream:
        _ask(lab, sides.server, f"{seed}/beside", "chat beside")
        if stream.done:
            raise NotPossible("the picture was made before the chat was over")
    deadline = time.monotonic() + LIMIT
    while sides.server.client.get("/v1/internal/health")["running"] and time.monotonic() < deadline:
        time.sleep(0.05)
    sides.ours.draw((64, 64), 1)  # which loads the model again


def _ask(lab: Lab, server: HttpServer, seed: str, figure: str) -> None:
    (prompt,) = texts.stories(seed, 1)
    answers = lab.ask(_NAME, server, [Request(_TOKENS * lab.plan.tokens, prompt, banned=lab.ends())])
    lab.results.add(_NAME, OURS, figure, rate(answers))


def rows(results: Results) -> Sequence[Row]:
    """Seconds of pictures, what is lost on the way, and what a picture takes of a chat."""
    found: list[Row] = []
    for what in _SIZES:
        ours, bare = _key(OURS, what), _key(BARE, what)
        found += [results.row(ours, f"{what}: {OURS}", "s"), results.row(bare, f"{what}: {BARE}", "s")]
        found.append(results.ratio(ours, bare, f"{what}: {OURS} / {BARE}", target=at_most(1.15)))
        title = f"{what}: the same pixels as the {BARE} (1: yes)"
        found.append(results.row(_key(OURS, f"{what}, same"), title, target=at_least(1)))
    alone, beside = _key(OURS, "chat alone"), _key(OURS, "chat beside")
    return [
        *found,
        results.row(alone, "one chat alone", "tokens/s"),
        results.row(beside, "one chat beside a picture", "tokens/s"),
        results.ratio(beside, alone, "one chat: beside a picture / alone", target=at_least(0.5)),
    ]


def _key(name: str, figure: str) -> Key:
    return _NAME, name, figure
