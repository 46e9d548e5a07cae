"""The engine with a model that does what it is told: it computes as always, but the tokens of a given text are taken.

A tiny model seldom manages to repeat a file with a small change; this shows what drafts gain with one that does. A
process of its own: reads one JSON line from standard input and answers with one, tokens a second of every edit with and
without speculation. There is no HTTP in it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence

import msgspec

from llamaserve.engine.engine import LoadedEngine
from llamaserve.engine.events import Finished
from llamaserve.engine.llama import start_backend
from llamaserve.engine.params import Generation, LoadParams, Sampling
from llamaserve.engine.runner import Runner
from llamaserve.engine.scheduler import Chunk


class Obedient:
    """A runner that lets another one do its work, and then takes the tokens of ``text`` for one sequence's answer."""

    def __init__(self, inner: Runner) -> None:
        self._inner = inner
        self.text: list[int] = []

    def evaluate(self, chunks: Sequence[Chunk]) -> list[list[int]]:
        """See ``Runner``."""
        self._inner.evaluate(chunks)
        return [self._take(chunk) for chunk in chunks if chunk.completes]

    def interrupt(self) -> None:
        """See ``Runner``."""
        self._inner.interrupt()

    def _take(self, chunk: Chunk) -> list[int]:
        """Go on with the text as long as the draft has guessed it, as the real runner does with what it samples."""
        tokens: list[int] = []
        for guess in (*chunk.draft, None):
            tokens.append(self.text[chunk.sequence.generated + len(tokens)])
            if tokens[-1] != guess:
                break
        return tokens


class Editor:
    """An engine that writes what it is given."""

    def __init__(self, params: LoadParams) -> None:
        self._engine = LoadedEngine(params, lambda _fraction: True)
        self._engine._runner = self._runner = Obedient(self._engine._runner)

    def rate(self, prompt: str, text: str, tokens: int) -> float:
        """Return the tokens a second, from the first one on, of an answer that is the text."""
        engine, clock = self._engine, time.perf_counter
        self._runner.text = engine.tokenize(text, add_bos=False, parse_special=False)
        tokens = min(tokens, len(self._runner.text) - 32)  # a draft may go on beyond the end
        engine.submit(
            1, [engine.encode(prompt)], Generation(sampling=Sampling(seed=1, temperature=0), max_tokens=tokens)
        )
        while not any(sequence.generated for sequence in engine._scheduler.running):
            engine.step()
        begin = clock()
        while not any(isinstance(event, Finished) for event in engine.step()):
            pass
        return (tokens - 1) / (clock() - begin)


def main() -> None:
    """Answer the one command."""
    command = json.loads(sys.stdin.readline())
    start_backend()
    params = msgspec.convert(command["params"], LoadParams)
    editors = {name: Editor(msgspec.structs.replace(params, speculation=name == "on")) for name in ("on", "off")}
    rates: dict[str, list[float]] = {"on": [], "off": []}
    for number, (prompt, text) in enumerate(command["edits"]):
        for name in ("on", "off") if number % 2 else ("off", "on"):
            rates[name].append(editors[name].rate(prompt, text, command["tokens"]))
    sys.stdout.write(json.dumps(rates) + "\n")


if __name__ == "__main__":
    main()
