"""The bare loop over texts that are packed as the server packs them: by its own packer, before the clock starts."""

from __future__ import annotations

from collections.abc import Sequence

from benchmark.contenders import BareLoop, BarePart
from benchmark.embedding_client import Vectors
from llamaserve.engine.packing import Packer
from llamaserve.engine.params import UNTILED, LoadParams

Packed = list[list[tuple[int, BarePart]]]  # of each step the parts, with the numbers of their texts


def packed(tokens: Sequence[Sequence[int]], params: LoadParams, *, gpu: bool, whole: bool) -> Packed:
    """Return the steps in which the server evaluates one request with texts of these tokens, when there is no other
    request. ``whole``: a text can't be divided.
    """
    largest = min(params.batch, params.kv_cells)
    packer = Packer(
        tokens=largest if gpu else min(largest, UNTILED),
        sequences=params.parallel,
        cells=None if whole else params.kv_cells,
    )
    packer.add(1, [len(each) for each in tokens])
    free = list(range(params.parallel))
    sequences: dict[int, int] = {}
    steps: Packed = []
    while not packer.idle:
        step = []
        for part in packer.plan():
            if part.text not in sequences:
                sequences[part.text] = free.pop()
            text = tokens[part.text]
            place = sequences[part.text], part.end == len(text)
            step.append((part.text, (text[part.start : part.end], part.start, *place)))
        free += [sequence for _, (_, _, sequence, is_last) in step if is_last]
        steps.append(step)
    return steps


class PackedLoop:
    """A bare loop with a model loaded that makes vectors, and what it must know to do as the server does."""

    def __init__(self, loop: BareLoop, params: LoadParams, *, whole: bool) -> None:
        self.pid = loop.pid
        self.params = params
        self._loop = loop
        self._whole = whole

    def count(self, text: str) -> int:
        """Return the number of a text's tokens, with those that the model wants around it."""
        return len(self._loop.tokenize([text])[0])

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Return the vectors of some texts, of any length, and the time that the steps took. Of a text in parts it is
        that of the last part.
        """
        tokens = self._loop.tokenize(texts)
        steps = packed(tokens, self.params, gpu=self._loop.gpu, whole=self._whole)
        seconds, vectors = self._loop.embed([[part for _, part in step] for step in steps])
        last = dict(zip((text for step in steps for text, _ in step), vectors, strict=True))
        return Vectors([last[number] for number in range(len(texts))], sum(map(len, tokens)), seconds)
