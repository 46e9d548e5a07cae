"""Texts to vectors: 256 of them in one request, by 64 clients with one each, by one client one after another.

Compared with the bare loop over the same tokens in the same steps. That one always has all threads; beside other
programs the server takes fewer, and is faster for it, so it is also measured with as many as the bare loop has. A round
sums up several sets of texts, and all take turns with each set, so that whatever else the machine does hits them alike.
No two sets are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace

import msgspec
import numpy as np
import numpy.typing as npt

from benchmark import contenders, profiling, texts
from benchmark.contenders import HttpServer
from benchmark.embedding_client import EmbeddingClient, Vectors
from benchmark.lab import BARE, OURS, Lab, NotPossible, loaded_bare_loop
from benchmark.models import find_model
from benchmark.packed_loop import PackedLoop
from benchmark.processes import cpu_seconds, tree
from benchmark.results import Key, Results, Row, Target, at_least
from llamaserve.engine.params import LoadParams
from llamaserve.registry.gguf import read_header

TEXTS = 256
CLIENTS = 64
_SETS = 4  # of short texts, in a round
_FEW_WORDS = 6  # at most, in a short query
_LONG = (100, 400)  # tokens of long texts, at least and at most
_MIXED, _MIXED_LONG = 64, 16  # texts of a request with short and long ones, and the long ones among them
_NAME = "embeddings"
_FIXED = "llamaserve, threads fixed"
_WORKER = "worker"

_Embed = Callable[[Sequence[str]], Vectors]


@dataclass(frozen=True)
class _Way:
    """A way to have texts embedded: who does it, what its figures are called, and the processes that take part."""

    name: str
    figure: str
    embed: _Embed
    processes: Mapping[str, Sequence[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Sides:
    """Who is measured. A server at a URL has no ``bare`` loop beside it, and none with ``fixed`` threads."""

    client: EmbeddingClient
    processes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    bare: PackedLoop | None = None
    fixed: _Way | None = None

    def count(self, text: str) -> int:
        """Return the tokens of a text, or rather too many."""
        return len(text) // 2 if self.bare is None else self.bare.count(text)

    def ways(self, kind: str, *, clients: int = 1) -> list[_Way]:
        """Return all ways to embed texts of a kind: in one request, and with ``clients`` also one by one."""
        found = [_Way(OURS, kind, lambda wanted: self.client.embed([wanted]), self.processes)]
        if clients > 1:
            found.append(self.one_by_one(f"{kind}_crowd", clients))
        if self.bare is not None:
            found.append(_Way(BARE, kind, self.bare.embed, {"children": (self.bare.pid,)}))
        if self.fixed is not None:
            found.append(replace(self.fixed, figure=kind))
        return found

    def one_by_one(self, figure: str, clients: int) -> _Way:
        """Return the way in which so many clients send one text at a time."""
        return _Way(
            OURS, figure, lambda wanted: self.client.embed([[each] for each in wanted], clients), self.processes
        )


@dataclass
class _Sum:
    """What one way took in a round."""

    texts: int = 0
    tokens: int = 0
    seconds: float = 0.0
    cpu: dict[str, float] = field(default_factory=dict)  # seconds, by who took part

    def measure(self, way: _Way, wanted: Sequence[str]) -> None:
        """Have texts embedded, and add what it took."""
        before = {who: sum(map(cpu_seconds, pids)) for who, pids in way.processes.items()}
        done = way.embed(wanted)
        spent = {who: sum(map(cpu_seconds, pids)) - before[who] for who, pids in way.processes.items()}
        for who, seconds in {**spent, "client": done.client}.items():
            self.cpu[who] = self.cpu.get(who, 0.0) + seconds
        self.texts += len(wanted)
        self.tokens += done.tokens
        self.seconds += done.seconds

    def note(self, results: Results, way: _Way) -> None:
        """Keep the round's figures."""
        results.add(_NAME, way.name, way.figure, self.texts / self.seconds)
        results.add(_NAME, way.name, f"{way.figure} tokens", self.tokens / self.seconds)
        results.add(_NAME, way.name, f"{way.figure} length", self.tokens / self.texts)
        for who, spent in self.cpu.items():
            results.add(_NAME, way.name, f"{way.figure} {who}", 1e6 * spent / self.texts)
        if way.processes:
            work = sum(spent for who, spent in self.cpu.items() if who != "client")
            results.add(_NAME, way.name, f"{way.figure} work", 1e6 * work / self.texts)


def run(lab: Lab) -> None:
    """Take turns, round by round; then look into a worker."""
    with _sides(lab) as sides:
        for number in range(lab.plan.rounds):
            seed = f"embeddings/{number}"
            short = [texts.short_texts(f"{seed}/{each}", TEXTS) for each in range(_SETS)]
            _take_turns(lab.results, number, sides.ways("short", clients=CLIENTS), short)
            _take_turns(lab.results, number, [sides.one_by_one("alone", 1)], short[-1:])
            queries = [texts.short_texts(f"{seed}/few/{each}", TEXTS, _FEW_WORDS) for each in range(_SETS)]
            _take_turns(lab.results, number, sides.ways("few", clients=CLIENTS), queries)
            _take_turns(lab.results, number, sides.ways("mixed"), [_mixed(seed, sides.count)])
    if sides.bare is not None:
        _look_into_worker(lab.results, sides.bare.params)


@contextmanager
def _sides(lab: Lab) -> Iterator[_Sides]:
    """Start everybody, and see that they do the same."""
    if lab.plan.url is not None:
        yield _Sides(EmbeddingClient(lab.plan.url, lab.plan.embedding_model))
        return
    found = find_model(lab.plan.embedding_model)
    options = {**found.options, "source": f"file:{found.file}"}
    params = contenders.load_params(found.name, options)
    if params["pooling"] in (None, "rank"):
        raise NotPossible(f"{found.name} makes no embeddings")
    with ExitStack() as stack:
        loop = stack.enter_context(loaded_bare_loop(params))
        whole = read_header(found.file).sees_whole_texts
        bare = PackedLoop(loop, msgspec.convert(params, LoadParams), whole=whole)
        server = stack.enter_context(contenders.llamaserve(OURS, found.name, options))
        fixed_options = {**options, "threads": params["threads"]}
        fixed = stack.enter_context(contenders.llamaserve(_FIXED, found.name, fixed_options))
        clients = [EmbeddingClient(each.url, found.name) for each in (server, fixed)]
        wanted = texts.short_texts("embeddings/warm", TEXTS)
        for client in clients:
            _compare(lab.results, client.embed([wanted]), bare.embed(wanted))
        way = _Way(_FIXED, "", lambda wanted: clients[1].embed([wanted]), _processes(fixed))
        yield _Sides(clients[0], _processes(server), bare, way)


def _processes(server: HttpServer) -> dict[str, list[int]]:
    assert server.pid is not None
    return {"api": [server.pid], "children": [pid for pid in tree(server.pid) if pid != server.pid]}


def _compare(results: Results, ours: Vectors, bare: Vectors) -> None:
    """See that both have done the same work."""
    if ours.tokens != bare.tokens:
        raise NotPossible(f"the server counts {ours.tokens} tokens where the bare loop has {bare.tokens}")
    difference = np.abs(unit(ours.vectors) - unit(bare.vectors)).max()
    results.add(_NAME, OURS, "difference", float(difference))


def unit(vectors: Sequence[bytes]) -> npt.NDArray[np.float64]:
    """Return vectors with a length of 1, one a row."""
    numbers = np.frombuffer(b"".join(vectors), "<f4").astype(np.float64).reshape(len(vectors), -1)
    found: npt.NDArray[np.float64] = numbers / np.linalg.norm(numbers, axis=1, keepdims=True)
    return found


def _take_turns(results: Results, number: int, ways: Sequence[_Way], sets: Sequence[Sequence[str]]) -> None:
    """Measure all ways with each set of texts, and note the sums."""
    sums = [_Sum() for _ in ways]
    for each, wanted in enumerate(sets):
        for place in range(len(ways)):
            turn = (number + each + place) % len(ways)
            sums[turn].measure(ways[turn], wanted)
    for way, total in zip(ways, sums, strict=True):
        total.note(results, way)


def _mixed(seed: str, count: Callable[[str], int]) -> list[str]:
    """Return short texts with long ones of all lengths among them."""
    low, high = _LONG
    sizes = [low + (high - low) * each // (_MIXED_LONG - 1) for each in range(_MIXED_LONG)]
    long = [texts.manual(f"{seed}/{size}", size, count) for size in sizes]
    short = texts.short_texts(f"{seed}/mixed", _MIXED - _MIXED_LONG)
    every = _MIXED // _MIXED_LONG - 1  # short ones behind each long one
    return [text for place, each in enumerate(long) for text in (each, *short[place * every : (place + 1) * every])]


def _look_into_worker(results: Results, params: LoadParams) -> None:
    """Note what a worker does for a text of one large request, seen by one with clocks in it."""
    requests = [texts.short_texts(f"embeddings/worker/{each}", TEXTS) for each in range(_SETS)]
    parts = profiling.embedding_parts(params, requests)
    native = sum(parts.get(part, 0.0) for part in profiling.NATIVE)
    results.add(_NAME, _WORKER, "python", 1 - native / sum(parts.values()))
    for part, spent in parts.items():
        results.add(_NAME, _WORKER, f"in {part}", 1e6 * spent / (_SETS * TEXTS))


def rows(results: Results) -> list[Row]:
    """Rates, what is lost on the way, and processor time."""
    found = _kind_rows(results, "short", f"{TEXTS} short texts", at_least(0.9), at_least(0.6))
    found += [
        results.row(_ours("alone"), f"{TEXTS} short texts, one by one: {OURS}", "texts/s"),
        results.ratio(_ours("alone"), _ours("short"), f"{TEXTS} short texts: one by one / in one request"),
        *_kind_rows(results, "few", f"{TEXTS} texts of {_FEW_WORDS} words at most"),
        *_kind_rows(results, "mixed", f"{_MIXED} texts, {_MIXED_LONG} of them long", crowd=False),
    ]
    for figure, how in (("short", "in one request"), ("short_crowd", f"by {CLIENTS} clients")):
        for who, name in (("api", "the API process"), ("children", "its children"), ("client", "the client")):
            what = f"{TEXTS} short texts {how}: processor time of {name}"
            found.append(results.row(_ours(f"{figure} {who}"), what, "µs/text"))
    what = f"{TEXTS} short texts in the worker"
    found.append(results.row((_NAME, _WORKER, "python"), f"{what}: Python's share", "x"))
    found += _part_rows(results, what)
    what = "the largest difference of a number from that of the bare loop"
    found.append(results.row(_ours("difference"), what, of=max))
    return found


def _ours(figure: str) -> Key:
    return (_NAME, OURS, figure)


def _kind_rows(
    results: Results,
    kind: str,
    title: str,
    to_bare: Target | None = None,
    to_one: Target | None = None,
    *,
    crowd: bool = True,
) -> list[Row]:
    """The rates for texts of one kind, against the bare loop's; and those of many clients, against one request's."""
    bare, work = (_NAME, BARE, kind), f"{kind} work"
    found = [
        results.row(_ours(f"{kind} length"), f"{title}: their mean length", "tokens"),
        results.row(_ours(kind), f"{title} in one request: {OURS}", "texts/s"),
        results.row(_ours(f"{kind} tokens"), f"{title} in one request: {OURS}", "tokens/s"),
        results.row(bare, f"{title} in one request: {BARE}", "texts/s"),
        results.ratio(_ours(kind), bare, f"{title} in one request: {OURS} / {BARE}", target=to_bare),
        results.ratio((_NAME, _FIXED, kind), bare, f"{title} in one request: {_FIXED} / {BARE}", target=to_bare),
        results.ratio((_NAME, _FIXED, work), (_NAME, BARE, work), f"{title}: {_FIXED} / {BARE}, processor time"),
    ]
    if crowd:
        many = _ours(f"{kind}_crowd")
        found += [
            results.row(many, f"{title} by {CLIENTS} clients: {OURS}", "texts/s"),
            results.ratio(many, _ours(kind), f"{title}: by {CLIENTS} clients / in one request", target=to_one),
        ]
    return found


def _part_rows(results: Results, what: str) -> list[Row]:
    """What the worker's time goes into, the most first."""
    keys = [key for key in results.samples if key[:2] == (_NAME, _WORKER) and key[2].startswith("in ")]
    found = [results.row(key, f"{what}: {key[2].removeprefix('in ')}", "µs/text") for key in keys]
    return sorted(found, key=lambda row: row.value or 0.0, reverse=True)
