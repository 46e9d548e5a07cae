"""Speech to text: how much slower the server is than the library alone, and what chats feel of a transcription.

The library has the same samples, threads and environment, and listens to a recording in one call. Both are told that
it is English: the library takes that for granted, and a server would find it out first. The server gives up threads
beside other programs and the library does not, so it is also measured with a fixed number of them; and the library also
as it comes, with its own number of threads, which spin where they wait.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from benchmark import contenders, hearing, texts
from benchmark.answers import Request, rate
from benchmark.client import Stream
from benchmark.contenders import HttpServer
from benchmark.hearing import Clip, Listener, SpeechServer
from benchmark.lab import OURS, PLAIN_SETTINGS, Lab, NotPossible
from benchmark.models import find_model
from benchmark.processes import busy_process
from benchmark.results import Key, Results, Row, at_least, at_most
from llamaserve.registry.hardware import performance_cores

BARE = "bare call"
AS_IT_COMES = "pywhispercpp as it comes"
FIXED = "llamaserve, threads fixed"
_NAME = "speech"
_SHORT, _MINUTE = "11 s of speech", "a minute of speech"
_REPETITIONS = {_SHORT: 1, _MINUTE: 5}
_LONG = 25  # repetitions: five minutes, of which no answer sees the end
_STREAMS = (1, 4)
_TOKENS = 4  # times those of other workloads, for all streams together
_ROOM = 6000  # tokens of all streams that shall outlast a recording
_IDLE_LIMIT = 30.0  # seconds


@dataclass(frozen=True)
class _Sides:
    """Who is measured, and with which recordings. ``speech`` is the model of ``server`` that listens."""

    server: HttpServer
    speech: SpeechServer
    others: Sequence[Listener]
    clips: dict[str, Clip]
    long: Clip


def run(lab: Lab) -> None:
    """Take turns, round by round, on a quiet machine and beside a busy process; then let others chat meanwhile."""
    with _sides(lab) as sides:
        for number, order in lab.rounds([sides.speech, *sides.others]):
            for what, clip in sides.clips.items():
                _take_turns(lab.results, order, clip, f"{what}, quiet")
                with busy_process():
                    _take_turns(lab.results, order, clip, f"{what}, busy")
            for streams in _STREAMS:
                _chat(lab, sides, streams, f"speech/{number}/{streams}")


@contextlib.contextmanager
def _sides(lab: Lab) -> Iterator[_Sides]:
    """Start everybody, and have them hear each recording once."""
    chat = lab.settings(**PLAIN_SETTINGS)
    found = find_model(lab.plan.speech_model)
    options = {**found.options, "source": f"file:{found.file}"}
    threads = performance_cores() if options["threads"] == "auto" else options["threads"]
    samples = hearing.read_speech()
    clips = {what: hearing.repeated(samples, times) for what, times in _REPETITIONS.items()}
    with ExitStack() as stack:
        server = stack.enter_context(contenders.llamaserve(OURS, lab.model, chat, {found.name: options}))
        fixed = contenders.llamaserve(FIXED, found.name, {**options, "threads": threads})
        sides = _Sides(
            server,
            SpeechServer(server, found.name),
            [
                SpeechServer(stack.enter_context(fixed), found.name),
                stack.enter_context(hearing.bare_call(BARE, found.file, threads)),
                stack.enter_context(hearing.bare_call(AS_IT_COMES, found.file, None)),
            ],
            clips,
            hearing.repeated(samples, _LONG),
        )
        for what, clip in clips.items():
            _compare(lab.results, [sides.speech, *sides.others], clip, what)
        yield sides


def _compare(results: Results, listeners: Sequence[Listener], clip: Clip, what: str) -> None:
    """Note whether all have understood the same, which means that they have done the same work."""
    heard = {listener.name: re.findall(r"\w+", listener.hear(clip).text.lower()) for listener in listeners}
    results.add(_NAME, OURS, f"{what}, same", float(heard[OURS] == heard[BARE]))
    results.add_detail(_NAME, {"what": what, "heard": {name: " ".join(words) for name, words in heard.items()}})


def _take_turns(results: Results, order: Sequence[Listener], clip: Clip, figure: str) -> None:
    for listener in order:
        results.add(_NAME, listener.name, figure, listener.hear(clip).seconds / clip.seconds)


def _chat(lab: Lab, sides: _Sides, streams: int, seed: str) -> None:
    """Stream some answers alone and beside a transcription, and have a recording transcribed beside such streams."""
    _ask(lab, sides.server, streams, f"{seed}/alone", "chats alone")
    with sides.speech.listening(sides.long) as stream:
        _ask(lab, sides.server, streams, f"{seed}/beside", "chats beside")
        _expect_running([stream])
    _wait_until_idle(sides.server)
    requests = _requests(lab, streams, _ROOM, f"{seed}/during")
    client = sides.server.client
    with ExitStack() as stack:
        running = []
        for request in requests:
            running.append(client.start(request))
            stack.callback(client.stop, running[-1])
        client.pump(lambda: all(each.flowing for each in running), hearing.LIMIT)
        heard = sides.speech.hear(sides.clips[_MINUTE])
        _expect_running(running)
    lab.results.add(_NAME, OURS, f"{streams} minute beside", heard.seconds / sides.clips[_MINUTE].seconds)
    _wait_until_idle(sides.server)


def _requests(lab: Lab, streams: int, tokens: int, seed: str) -> list[Request]:
    """Return requests for so many tokens, all together; none of the answers ends before."""
    return [Request(tokens // streams, prompt, banned=lab.ends()) for prompt in texts.stories(seed, streams)]


def _ask(lab: Lab, server: HttpServer, streams: int, seed: str, figure: str) -> None:
    answers = lab.ask(_NAME, server, _requests(lab, streams, _TOKENS * lab.plan.tokens, seed))
    lab.results.add(_NAME, OURS, f"{streams} {figure}", rate(answers))


def _expect_running(streams: Sequence[Stream]) -> None:
    if any(stream.done or not stream.flowing for stream in streams):
        raise NotPossible("one side was done before the other")


def _wait_until_idle(server: HttpServer) -> None:
    deadline = time.monotonic() + _IDLE_LIMIT
    while time.monotonic() < deadline:
        health = server.client.get("/v1/internal/health")
        if health["running"] == health["waiting"] == 0:
            return
        time.sleep(0.05)
    raise NotPossible(f"the server still works {_IDLE_LIMIT:g} s after its clients have left")


def rows(results: Results) -> list[Row]:
    """Real-time factors and what is lost on the way; rates of chats, and what a transcription takes of them."""
    found: list[Row] = []
    for what in _REPETITIONS:
        for when in ("quiet", "busy"):
            found += _speed_rows(results, f"{what}, {when}")
        title = f"{what}: the same words as the {BARE} (1: yes)"
        found.append(results.row(_ours(f"{what}, same"), title, target=at_least(1)))
    for streams in _STREAMS:
        found += _chat_rows(results, streams, "one chat" if streams == 1 else f"{streams} chats")
    return found


def _speed_rows(results: Results, figure: str) -> list[Row]:
    names = (OURS, FIXED, BARE, AS_IT_COMES)
    found = [results.row((_NAME, name, figure), f"{figure}: real-time factor of {name}") for name in names]
    for name, other, target in ((OURS, BARE, at_most(1.15)), (FIXED, BARE, None), (OURS, AS_IT_COMES, None)):
        above, below = (_NAME, name, figure), (_NAME, other, figure)
        found.append(results.ratio(above, below, f"{figure}: {name} / {other}", target=target))
    return found


def _chat_rows(results: Results, streams: int, title: str) -> list[Row]:
    alone, beside = _ours(f"{streams} chats alone"), _ours(f"{streams} chats beside")
    heard, undisturbed = _ours(f"{streams} minute beside"), _ours(f"{_MINUTE}, quiet")
    return [
        results.row(alone, f"{title} alone", "tokens/s"),
        results.row(beside, f"{title} beside a transcription", "tokens/s"),
        results.ratio(beside, alone, f"{title}: beside a transcription / alone", target=at_least(0.5)),
        results.ratio(heard, undisturbed, f"{_MINUTE}: beside {title} / alone"),
    ]


def _ours(figure: str) -> Key:
    return _NAME, OURS, figure
