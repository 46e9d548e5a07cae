"""Texts to vectors: 256 of them in one request, by 64 clients with one each, by one client one after another.

Compared with the bare loop over the same tokens in the same steps, which the server's own packer plans for them and
which are filled before the clock starts. It always has all threads; beside other programs the server has fewer, and is
faster for it, so it is also measured with as many as the bare loop has. A round sums up several sets of texts, and all ways take turns with each set,
so that what else the machine does hits them alike. No two sets are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import msgspec
import numpy as np
import numpy.typing as npt

from benchmark import contenders, profiling, texts
from benchmark.contenders import BareLoop, BarePart, HttpServer
from benchmark.embedding_client import EmbeddingClient, Vectors
from benchmark.lab import BARE, OURS, Lab, NotPossible, loaded_bare_loop
from benchmark.models import find_model
from benchmark.processes import cpu_seconds, tree
from benchmark.results import Key, Results, Row, at_least
from llamaserve.engine.packing import Packer
from llamaserve.engine.params import UNTILED, LoadParams
from llamaserve.registry.gguf import read_header

TEXTS = 256
CLIENTS = 64
_SETS = 4  # of texts, in a round
_LONG = (100, 400)  # tokens of long texts, at least and at most
_MIXED, _MIXED_LONG = 64, 16  # texts of a request with short and long ones, and the long ones among them
_NAME = "embeddings"
_WORKER = "worker"
_FIXED = "llamaserve, threads fixed"


def steps_of(tokens: Sequence[Sequence[int]], params: LoadParams, *, gpu: bool, whole: bool) -> list[list[BarePart]]:
    """Return the steps in which the server evaluates one request with texts of these tokens, where no other request is
    there; ``whole``: a text can't be divided.
    """
    return [
        [(tokens[text][start:end], start, sequence, end == len(tokens[text])) for text, sequence, start, end in step]
        for step in _planned([len(each) for each in tokens], params, gpu=gpu, whole=whole)
    ]


def _planned(
    lengths: list[int], params: LoadParams, *, gpu: bool, whole: bool
) -> Iterator[list[tuple[int, int, int, int]]]:
    """Yield the steps for texts of these lengths: each part's text, sequence, start and end."""
    largest = min(params.batch, params.kv_cells)
    packer = Packer(
        tokens=largest if gpu else min(largest, UNTILED),
        sequences=params.parallel,
        cells=None if whole else params.kv_cells,
    )
    packer.add(1, lengths)
    free = list(range(params.parallel))
    sequences: dict[int, int] = {}
    while not packer.idle:
        parts = packer.plan()
        for part in parts:
            if part.text not in sequences:
                sequences[part.text] = free.pop()
        yield [(part.text, sequences[part.text], part.start, part.end) for part in parts]
        free += [sequences[part.text] for part in parts if part.end == lengths[part.text]]


class _Bare:
    """The bare loop, and what it needs to know to do as the server does."""

    def __init__(self, loop: BareLoop, params: LoadParams, *, whole: bool) -> None:
        self.loop = loop
        self.params = params
        self._whole = whole

    def embed(self, wanted: Sequence[str]) -> Vectors:
        """Return the vectors of some texts, tokenised and packed beforehand; they have any length."""
        tokens = self.loop.tokenize(wanted)
        lengths = [len(each) for each in tokens]
        plan = [*_planned(lengths, self.params, gpu=self.loop.gpu, whole=self._whole)]
        steps = steps_of(tokens, self.params, gpu=self.loop.gpu, whole=self._whole)
        seconds, vectors = self.loop.embed(steps)
        order = [text for step in plan for text, _, _, _ in step]
        last = dict(zip(order, vectors, strict=True))  # of a text in parts the last one
        return Vectors([last[number] for number in range(len(wanted))], sum(lengths), seconds)


@dataclass(frozen=True)
class _Sides:
    """Who is measured. A server at a URL has no ``bare`` loop beside it, and none with ``fixed`` threads."""

    server: HttpServer
    client: EmbeddingClient
    bare: _Bare | None = None
    fixed: EmbeddingClient | None = None
    workers: tuple[int, ...] = ()

    def count(self, text: str) -> int:
        """Return the tokens of a text, or rather too many."""
        return len(text) // 2 if self.bare is None else len(self.bare.loop.tokenize([text])[0])


@dataclass
class _Sum:
    """What one way of asking took in a round."""

    texts: int = 0
    tokens: int = 0
    seconds: float = 0.0
    cpu: dict[str, float] = field(default_factory=dict)  # seconds of the API process, of its children, of the client

    def note(self, results: Results, name: str, figure: str) -> None:
        results.add(_NAME, name, figure, self.texts / self.seconds)
        results.add(_NAME, name, f"{figure}_tokens", self.tokens / self.seconds)
        for who, spent in self.cpu.items():
            results.add(_NAME, name, f"{figure}_{who}", 1e6 * spent / self.texts)


def run(lab: Lab) -> None:
    """Take turns, round by round."""
    with _sides(lab) as sides:
        for number in range(lab.plan.rounds):
            _short(lab, sides, number)
            _mixed(lab, sides, number)
    if sides.bare is not None:
        _parts(lab.results, sides.bare.params)


def _parts(results: Results, params: LoadParams) -> None:
    """Note what a worker does for a text in one large request, seen by one with clocks in it."""
    requests = [texts.short_texts(f"embeddings/parts/{each}", TEXTS) for each in range(_SETS)]
    parts = profiling.embedding_parts(params, requests)
    whole = sum(parts.values())
    results.add(_NAME, _WORKER, "python", 1 - sum(parts.get(part, 0.0) for part in profiling.NATIVE) / whole)
    for part, spent in parts.items():
        results.add(_NAME, _WORKER, part, 1e6 * spent / (_SETS * TEXTS))


@contextmanager
def _sides(lab: Lab) -> Iterator[_Sides]:
    model, url = lab.plan.embedding_model, lab.plan.url
    if url is not None:
        yield _Sides(HttpServer(OURS, url, model), EmbeddingClient(url, model))
        return
    found = find_model(model)
    options = {**found.options, "source": f"file:{found.file}"}
    params = contenders.load_params(found.name, options)
    if params["pooling"] is None:
        raise NotPossible(f"{found.name} makes no embeddings")
    with ExitStack() as stack:
        loop = stack.enter_context(loaded_bare_loop(params))
        bare = _Bare(loop, msgspec.convert(params, LoadParams), whole=read_header(found.file).sees_whole_texts)
        server = stack.enter_context(contenders.llamaserve(OURS, found.name, options))
        fixed = stack.enter_context(
            contenders.llamaserve(_FIXED, found.name, {**options, "threads": params["threads"]})
        )
        clients = [EmbeddingClient(each.url, found.name) for each in (server, fixed)]
        wanted = texts.short_texts("embeddings/warm", TEXTS)
        for client in clients:
            _check(lab.results, client.embed([wanted]), bare.embed(wanted))
        assert server.pid is not None
        workers = tuple(pid for pid in tree(server.pid) if pid != server.pid)
        yield _Sides(server, clients[0], bare, clients[1], workers)


def _check(results: Results, ours: Vectors, bare: Vectors) -> None:
    """See that both have done the same work."""
    if ours.tokens != bare.tokens:
        raise NotPossible(f"the server counts {ours.tokens} tokens where the bare loop has {bare.tokens}")
    difference = np.abs(_unit(ours.vectors) - _unit(bare.vectors)).max()
    results.add(_NAME, OURS, "difference", float(difference))


def _unit(vectors: Sequence[bytes]) -> npt.NDArray[np.float64]:
    """Return vectors with a length of 1."""
    numbers = np.frombuffer(b"".join(vectors), "<f4").astype(np.float64).reshape(len(vectors), -1)
    unit: npt.NDArray[np.float64] = numbers / np.linalg.norm(numbers, axis=1, keepdims=True)
    return unit


def _short(lab: Lab, sides: _Sides, number: int) -> None:
    """All ways in turn for each set of short texts, and one client with one text at a time for the last set."""
    client, fixed, bare = sides.client, sides.fixed, sides.bare
    ways: list[tuple[str, str, Callable[[Sequence[str]], Vectors]]] = [
        (OURS, "one", lambda wanted: client.embed([wanted])),
        (OURS, "crowd", lambda wanted: client.embed([[text] for text in wanted], CLIENTS)),
    ]
    if bare is not None and fixed is not None:
        ways += [(BARE, "one", bare.embed), (_FIXED, "one", lambda wanted: fixed.embed([wanted]))]
    sums = {(name, figure): _Sum() for name, figure, _ in ways}
    for each in range(_SETS):
        wanted = texts.short_texts(f"embeddings/{number}/{each}", TEXTS)
        turn = (number + each) % len(ways)
        for name, figure, embed in (*ways[turn:], *ways[:turn]):
            _measure(sums[name, figure], sides, wanted, embed, cpu=name == OURS)
    for (name, figure), total in sums.items():
        total.note(lab.results, name, figure)
    alone = _Sum()
    _measure(alone, sides, wanted, lambda wanted: client.embed([[text] for text in wanted]), cpu=True)
    alone.note(lab.results, OURS, "alone")


def _mixed(lab: Lab, sides: _Sides, number: int) -> None:
    """Short and long texts in one request."""
    seed = f"embeddings/{number}/mixed"
    low, high = _LONG
    sizes = [low + (high - low) * each // (_MIXED_LONG - 1) for each in range(_MIXED_LONG)]
    long = [texts.manual(f"{seed}/{size}", size, sides.count) for size in sizes]
    short = iter(texts.short_texts(seed, _MIXED - _MIXED_LONG))
    every = _MIXED // _MIXED_LONG
    wanted = [long[place // every] if place % every == 0 else next(short) for place in range(_MIXED)]
    ways: list[tuple[str, Callable[[Sequence[str]], Vectors]]] = [(OURS, lambda wanted: sides.client.embed([wanted]))]
    if sides.bare is not None:
        ways.insert(number % 2, (BARE, sides.bare.embed))
    for name, embed in ways:
        total = _Sum()
        _measure(total, sides, wanted, embed, cpu=False)
        total.note(lab.results, name, "mixed")


def _measure(
    total: _Sum, sides: _Sides, wanted: Sequence[str], embed: Callable[[Sequence[str]], Vectors], *, cpu: bool
) -> None:
    groups = {"api": (sides.server.pid,), "worker": sides.workers} if cpu and sides.server.pid is not None else {}
    before = {who: sum(map(cpu_seconds, pids)) for who, pids in groups.items()}
    done = embed(wanted)
    if cpu:
        total.cpu["client"] = total.cpu.get("client", 0.0) + done.client
    for who, pids in groups.items():
        total.cpu[who] = total.cpu.get(who, 0.0) + sum(map(cpu_seconds, pids)) - before[who]
    total.texts += len(wanted)
    total.tokens += done.tokens
    total.seconds += done.seconds


def rows(results: Results) -> list[Row]:
    """Rates, what is lost on the way, and processor time."""

    def ours(figure: str) -> Key:
        return (_NAME, OURS, figure)

    one, crowd, alone = f"{TEXTS} texts in one request", f"{CLIENTS} clients, one text each", "one client, text by text"
    mixed = f"{_MIXED} texts in one request, {_MIXED_LONG} of them long"
    found = [
        results.row(ours("one"), f"{one}: {OURS}", "texts/s"),
        results.row((_NAME, BARE, "one"), f"{one}: {BARE}", "texts/s"),
        results.row(ours("one_tokens"), f"{one}: {OURS}", "tokens/s"),
        results.ratio(ours("one"), (_NAME, BARE, "one"), f"{one}: {OURS} / {BARE}", target=at_least(0.9)),
        results.ratio((_NAME, _FIXED, "one"), (_NAME, BARE, "one"), f"{one}: {_FIXED} / {BARE}", target=at_least(0.9)),
        results.row(ours("crowd"), f"{crowd}: {OURS}", "texts/s"),
        results.ratio(ours("crowd"), ours("one"), f"{crowd} / {one}", target=at_least(0.6)),
        results.row(ours("alone"), f"{alone}: {OURS}", "texts/s"),
        results.ratio(ours("alone"), ours("one"), f"{alone} / {one}"),
        results.row(ours("mixed_tokens"), f"{mixed}: {OURS}", "tokens/s"),
        results.ratio(ours("mixed"), (_NAME, BARE, "mixed"), f"{mixed}: {OURS} / {BARE}"),
    ]
    for figure, what in (("one", one), ("crowd", crowd)):
        for who, name in (("api", "the API process"), ("worker", "its children"), ("client", "the client")):
            found.append(results.row(ours(f"{figure}_{who}"), f"{what}: processor time of {name}", "µs/text"))
    found.append(results.row((_NAME, _WORKER, "python"), f"{one}: Python's share of the worker's time", "x"))
    found += _part_rows(results, one)
    found.append(results.row(ours("difference"), f"{one}: a number differs at most from the {BARE}'s by"))
    return found


def _part_rows(results: Results, what: str) -> list[Row]:
    """What the worker's time goes into, the most first."""
    parts = [
        figure for work, name, figure in results.samples if (work, name) == (_NAME, _WORKER) and figure != "python"
    ]
    found = [results.row((_NAME, _WORKER, part), f"{what}, in the worker: {part}", "µs/text") for part in parts]
    return sorted(found, key=lambda row: row.value or 0.0, reverse=True)
