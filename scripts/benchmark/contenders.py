"""Who is measured: llamaserve in some setting, the bare loop, llama-cpp-python's server, any other OpenAI server.

Each one answers a list of requests at once. Whoever can't be started raises ``StartFailed``.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

import msgspec
import yaml

from benchmark.answers import Answer, Request
from benchmark.client import Client, Unreachable
from benchmark.processes import LineProcess, StartFailed, last_words, running
from llamaserve.engine.params import Footprint, LoadParams
from llamaserve.registry.fetching import locate
from llamaserve.registry.gguf import GGUFHeader, read_header
from llamaserve.registry.load_plan import load_params as planned_params, plan_load
from llamaserve.registry.spec import ModelSpec, load_registry
from llamaserve.worker.child import ENVIRONMENT as WORKER_ENVIRONMENT  # the bare loop waits at barriers in the same way

HERE = Path(__file__).resolve().parent
LIMIT = 120.0  # seconds for the answers to one set of requests
_START_LIMIT = 90.0  # seconds for a server to load its model


# A text in a step, or a part of it: its tokens, the place of the first one, its sequence, whether it is the last part.
BarePart = tuple[Sequence[int], int, int, bool]


class Contender(Protocol):
    """Somebody who answers."""

    name: str

    def ask(self, requests: Sequence[Request], limit: float = LIMIT) -> list[Answer]:
        """Answer all requests at once; what is not there after ``limit`` seconds is cut off, where that is possible."""


class HttpServer:
    """A server at a URL."""

    def __init__(
        self, name: str, url: str, model: str | None, pid: int | None = None, errors: IO[bytes] | None = None
    ) -> None:
        """``pid`` and ``errors`` are its first process and what that says, where we have started it."""
        self.name = name
        self.url = url
        self.pid = pid
        self.client = Client(url, model)
        self._errors = errors

    def ask(self, requests: Sequence[Request], limit: float = LIMIT) -> list[Answer]:
        """See ``Contender``."""
        return self.client.ask(requests, limit)

    @property
    def last_words(self) -> str:
        """What it said last, if that can be known."""
        return "it can't be known" if self._errors is None else last_words(self._errors)


class BareLoop(LineProcess):
    """The loop over the C API, in a process of its own."""

    name = "bare loop"

    def __init__(self, process: subprocess.Popen[bytes], errors: IO[bytes]) -> None:
        super().__init__(self.name, process, errors)
        self.ends: tuple[int, ...] = ()
        self.sizes: dict[str, float] = {}
        self.load_seconds = 0.0
        self.gpu = False  # whether the model is on one

    def load(self, settings: Mapping[str, Any]) -> None:
        """Load a model as the server does that has these ``LoadParams``."""
        answer = self.command(do="load", settings=settings)
        self.ends, self.sizes, self.load_seconds = tuple(answer["ends"]), answer["sizes"], answer["seconds"]
        self.gpu = answer["gpu"]

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of texts."""
        tokens: list[list[int]] = self.command(do="tokenize_all", texts=texts)
        return tokens

    def embed(self, steps: Sequence[Sequence[BarePart]]) -> tuple[float, list[bytes]]:
        """Evaluate steps, and return the seconds that it took and the vector of each part, as 32-bit floats."""
        done = self.command(do="embed", steps=steps)
        data, size = base64.b64decode(done["vectors"]), 4 * done["width"]
        return done["seconds"], [data[place : place + size] for place in range(0, len(data), size)]

    def count(self, text: str) -> int:
        """Return the number of tokens of a prompt."""
        return len(self.command(do="tokenize", text=text))

    def ask(self, requests: Sequence[Request], limit: float = LIMIT) -> list[Answer]:  # noqa: ARG002 - it always ends
        """See ``Contender``. All requests must want the same number of tokens."""
        tokens, copies = requests[0].tokens, requests[0].n
        prompts = [request.prompt for request in requests]
        done = self.command(do="generate", prompts=prompts, tokens=tokens, copies=copies)
        answers = [_bare_answer(done["started"], each, tokens) for each in done["answers"]]
        return [_merged(answers)] if copies > 1 else answers

    def step_costs(self, text: str, rows: Sequence[int], repeats: int) -> dict[int, list[float]]:
        """Return the seconds of steps with so many tokens of one sequence that begins with this text."""
        costs = self.command(do="step_costs", text=text, rows=rows, repeats=repeats)
        return {int(count): times for count, times in costs.items()}


def _bare_answer(started: float, values: Mapping[str, Any], limit: int) -> Answer:
    times = list(values["times"])
    answer = Answer(started, times, [1] * len(times), {0: values["text"]}, dict(enumerate(times[:1])), len(times))
    answer.finish = "length" if len(times) == limit else "stop"
    return answer


def _merged(answers: Sequence[Answer]) -> Answer:
    """Put several answers to one prompt together, as a server's stream for ``n`` choices has them."""
    moments = sorted(moment for answer in answers for moment in answer.times)
    texts = {number: answer.text for number, answer in enumerate(answers)}
    firsts = {number: answer.times[0] for number, answer in enumerate(answers) if answer.times}
    merged = Answer(
        answers[0].started, moments, [1] * len(moments), texts, firsts, sum(each.tokens for each in answers)
    )
    merged.finish = answers[0].finish
    return merged


def known_settings() -> set[str]:
    """Return the names of what can be set for a model in models.yaml."""
    return set(ModelSpec.model_fields)


def write_models_file(folder: Path, models: Mapping[str, Mapping[str, Any]]) -> Path:
    """Write a models.yaml with some models, and return its path."""
    path = folder / "models.yaml"
    listed = {name: dict(options) for name, options in models.items()}
    path.write_text(yaml.safe_dump({"models": listed}), encoding="utf-8")
    return path


def load_params(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the server's worker is told for a model with these options, but for what depends on free memory."""
    params: dict[str, Any] = msgspec.to_builtins(_planned(name, options)[0])
    return params


def memory_need(name: str, options: Mapping[str, Any]) -> int:
    """Return the bytes of main memory that the server plans for a model with these options, on the CPU."""
    params, header = _planned(name, options)
    return plan_load(name, header, params, Footprint(1 << 62, 1 << 62), devices=0).need.host


def _planned(name: str, options: Mapping[str, Any]) -> tuple[LoadParams, GGUFHeader]:
    with tempfile.TemporaryDirectory(prefix="llamaserve-bench-") as folder:
        registry = load_registry(write_models_file(Path(folder), {name: options}))
    spec = registry.models[name]
    file = locate(registry.source(spec), spec.sha256)
    if file is None:
        raise StartFailed(f"the weights of {name} are not on this machine")
    header = read_header(file)
    return planned_params(spec, header), header


@contextlib.contextmanager
def bare_loop() -> Iterator[BareLoop]:
    """Run the bare loop's process, still without a model."""
    with running([sys.executable, str(HERE / "bare_loop.py")], WORKER_ENVIRONMENT) as (process, errors):
        loop = BareLoop(process, errors)
        loop.wait_until_started()
        yield loop


def obedient_rates(params: Mapping[str, Any], edits: Sequence[tuple[str, str]], tokens: int) -> dict[str, list[float]]:
    """Return the tokens a second of the engine, with speculation "on" and "off", where the answers to some prompts are
    what they should be.
    """
    with running([sys.executable, str(HERE / "obedient.py")], WORKER_ENVIRONMENT) as (process, errors):
        command = {"params": params, "edits": edits, "tokens": tokens}
        out, _ = process.communicate(json.dumps(command).encode() + b"\n")
        if not out:
            raise StartFailed(f"the obedient engine ended: {last_words(errors)}")
        rates: dict[str, list[float]] = json.loads(out)
        return rates


@contextlib.contextmanager
def llamaserve(
    name: str,
    model: str,
    options: Mapping[str, Any],
    others: Mapping[str, Mapping[str, Any]] | None = None,
    variables: Mapping[str, str] | None = None,
) -> Iterator[HttpServer]:
    """Run llamaserve with a model in these settings, on a free port; ``others`` are on offer, too, and loaded when they
    are asked. ``variables`` are more of its environment.
    """
    with tempfile.TemporaryDirectory(prefix="llamaserve-bench-") as folder:
        file = write_models_file(Path(folder), {model: options, **(others or {})})
        environment = {"LLAMASERVE_MODELS_FILE": str(file), "PYTHONUNBUFFERED": "1", "LLAMASERVE_LOG_LEVEL": "warning"}
        environment |= variables or {}
        command = [sys.executable, "-m", "llamaserve", "run", model, "--port", "0"]
        with running(command, environment) as (process, errors):
            assert process.stdout is not None
            for line in process.stdout:
                if (match := re.search(rb"base URL\s+(\S+)", line)) is not None:
                    yield HttpServer(name, match[1].decode(), model, process.pid, errors)
                    return
            raise StartFailed(f"llamaserve did not start: {last_words(errors)}")


@contextlib.contextmanager
def llama_cpp_server(name: str, params: Mapping[str, Any], *arguments: str) -> Iterator[HttpServer]:
    """Run llama-cpp-python's own server with the same file, context, batch and threads."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "llama_cpp.server", "--model", params["path"], "--n_ctx", str(params["kv_cells"])]
    command += ["--n_batch", str(params["batch"]), "--n_threads", str(params["threads"])]
    command += ["--n_threads_batch", str(params["threads"]), "--host", "127.0.0.1", "--port", str(port), *arguments]
    if params["gpu_layers"] in ("auto", "all"):
        command += ["--n_gpu_layers", "-1"]
    with running(command, talks=False) as (process, errors):
        server = HttpServer(name, f"http://127.0.0.1:{port}/v1", None, process.pid, errors)
        _wait_for(server, process, errors)
        yield server


def _wait_for(server: HttpServer, process: subprocess.Popen[bytes], errors: IO[bytes]) -> None:
    deadline = time.monotonic() + _START_LIMIT
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(Unreachable):
            server.client.get("/v1/models")
            return
        time.sleep(0.2)
    raise StartFailed(f"{server.name} did not start: {last_words(errors)}")


def requantised(source: Path, kind: str | None, folder: Path) -> Path:
    """Return a copy of the model in another type, which is made once; for None the file itself."""
    if kind is None:
        return source
    target = folder / f"{source.stem}-{source.stat().st_size}-as-{kind}.gguf"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(HERE / "requantise.py"), str(source), str(target), kind]
        done = subprocess.run(command, capture_output=True, check=False, env=os.environ)
        if done.returncode != 0 or not target.exists():
            words = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
            raise StartFailed(f"the {kind} file could not be made: {' '.join(words) or done.returncode}")
    return target
