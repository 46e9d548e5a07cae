"""The buffer in which llama.cpp computes a step: where its intermediate results lie, and how far it reaches.

ggml gives each result the smallest gap that is large enough, and frees it after its last use (ggml-alloc.c). Here the
same is done for the results that are as large as a batch, in the order of llama.cpp's graphs. With the dimensions of
real models it finds what ggml reserves to a percent, but for a few: up to a quarter more where logits or a convolution
are the largest. Knows layers, and nothing of files.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from llamaserve.registry.layers import Layer, ModelLayers

_FLOAT, _HALF, _INDEX = 4, 2, 8  # bytes
_ENDLESS = 1 << 62


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step at its largest: ``tokens`` of ``sequences``, of which ``outputs`` give logits, over ``cells`` cells, or
    ``sliding_cells`` in layers with a window. ``flash`` is flash attention. Keys and values that are stored quantised
    are ``turned`` before, and ``wide`` ones, of 32 bits, are narrowed after. Without a cache (``cached``) they are
    those of the step itself. ``biased`` scores have something added for the distance of two tokens.
    """

    tokens: int
    sequences: int
    outputs: int
    cells: int
    sliding_cells: int
    flash: bool
    turned_keys: bool = False
    turned_values: bool = False
    wide_keys: bool = False
    wide_values: bool = False
    cached: bool = True
    biased: bool = False


def step_buffer(model: ModelLayers, layers: Iterable[Layer], step: Step, *, logits: bool = True) -> int:
    """Return the bytes that a step over some of a model's layers touches; with ``logits`` the last ones."""
    return _Computation(model, step).run(tuple(layers), logits=logits)


def input_bytes(model: ModelLayers, step: Step) -> int:
    """Return the bytes of a step's inputs: indices, and masks that say which cells a token sees."""
    mask = step.tokens * (_HALF if step.flash else _FLOAT)
    total = step.tokens * (2 * _FLOAT + 2 * _INDEX) + mask * step.cells
    return total + (mask * step.sliding_cells if any(layer.sliding for layer in model.layers) else 0)


class _Block:
    """A part of the buffer."""

    __slots__ = ("size", "start")

    def __init__(self, start: int, size: int) -> None:
        self.start = start
        self.size = size


class _Buffer:
    """A buffer without an end, and how much of it was ever in use."""

    def __init__(self) -> None:
        self._gaps = [_Block(0, _ENDLESS)]  # in order; the last one has no end
        self.reach = 0

    def take(self, size: int) -> _Block:
        """Return the smallest gap that is large enough; the end only if there is none."""
        fitting = [gap for gap in self._gaps[:-1] if gap.size >= size]
        gap = min(reversed(fitting), key=lambda each: each.size) if fitting else self._gaps[-1]
        block = _Block(gap.start, size)
        gap.start += size
        gap.size -= size
        if not gap.size:
            self._gaps.remove(gap)
        self.reach = max(self.reach, block.start + size)
        return block

    def free(self, *blocks: _Block) -> None:
        """Make parts free again, and one with the gaps beside them."""
        for block in blocks:
            self._gaps = _joined(sorted([*self._gaps, block], key=lambda gap: gap.start))


def _joined(gaps: list[_Block]) -> list[_Block]:
    joined: list[_Block] = []
    for gap in gaps:
        if joined and joined[-1].start + joined[-1].size == gap.start:
            joined[-1].size += gap.size
        else:
            joined.append(_Block(gap.start, gap.size))
    return joined


class _Computation:
    """One step, layer by layer."""

    def __init__(self, model: ModelLayers, step: Step) -> None:
        self._model = model
        self._step = step
        self._buffer = _Buffer()

    def run(self, layers: tuple[Layer, ...], *, logits: bool) -> int:
        """Return how far the results of these layers reach."""
        buffer, width = self._buffer, self._model.width
        buffer.take(2 * _FLOAT * self._step.tokens)
        value = max((layer.value for layer in layers), default=0)
        masks = {sliding: self._mask(sliding, value) for sliding in {layer.sliding for layer in layers if layer.heads}}
        last_of = {layer.sliding: number for number, layer in enumerate(layers) if layer.heads}
        current = self._rows(width)
        for number, layer in enumerate(layers):
            done = [masks[layer.sliding]] if layer.heads and last_of[layer.sliding] == number else []
            mixed = self._mix(layer, done)
            if number == len(layers) - 1 and logits:
                current, mixed = self._select(current, mixed)
            buffer.free(current)
            current = self._forward(layer, mixed)
        if logits:
            self._rows(self._model.vocabulary)
        return buffer.reach

    def _mask(self, sliding: bool, value: int) -> _Block:
        """Take what says into which cells a step writes, and the mask of those that it sees. Without flash attention
        every number of a value has a cell of its own.
        """
        step = self._step
        if step.cached:
            self._buffer.take(step.tokens * _INDEX * (2 if step.flash else 1 + value))
        cells = step.sliding_cells if sliding else step.cells
        return self._buffer.take(step.tokens * cells * (_HALF if step.flash else _FLOAT))

    def _rows(self, width: int) -> _Block:
        return self._buffer.take(self._step.tokens * width * _FLOAT)

    def _select(self, current: _Block, mixed: _Block) -> tuple[_Block, _Block]:
        """Go on with the rows that give logits."""
        self._step = replace(self._step, tokens=min(self._step.tokens, self._step.outputs))
        chosen = self._rows(self._model.width)
        self._buffer.free(mixed)
        kept = self._rows(self._model.width)
        self._buffer.free(current)
        return kept, chosen

    def _mix(self, layer: Layer, masks: list[_Block]) -> _Block:
        """Compute what a layer takes from other tokens."""
        parts = []
        if layer.state:
            parts.append(self._recurrent(layer))
        if layer.latent:
            parts.append(self._latent_attention(layer, masks))
        elif layer.heads:
            parts.append(self._attention(layer, masks) if self._step.cached else self._own_attention(layer, masks))
        if not parts:
            return self._rows(layer.width)
        self._buffer.free(*parts[1:])
        return parts[0]

    def _attention(self, layer: Layer, masks: list[_Block]) -> _Block:
        buffer, rows, step = self._buffer, self._rows, self._step
        norm = rows(layer.width)
        query = self._turned(rows(layer.query), layer.query)  # a place of its own for the rotated one
        query = self._turned(query, layer.query) if step.turned_keys else query
        value = self._turned(rows(layer.value), layer.value) if step.turned_values else rows(layer.value)
        key = rows(layer.key)
        buffer.free(norm)
        key = self._turned(key, layer.key) if step.turned_keys else key
        buffer.free(key, value)
        result = self._weigh(layer, query, masks, layer.value, layer.query)
        result = self._turned(result, layer.query) if step.turned_values else result
        out = rows(layer.width)
        buffer.free(result)
        return out

    def _own_attention(self, layer: Layer, masks: list[_Block]) -> _Block:
        """Attention of a step to itself: keys and values are there until they have been used."""
        buffer, rows, step = self._buffer, self._rows, self._step
        norm = rows(layer.width)
        query, key, value = (rows(width) for width in (layer.query, layer.key, layer.value))
        buffer.free(norm)
        query, key = self._turned(query, layer.query), self._turned(key, layer.key)  # the rotated ones
        if step.flash:
            narrowed = [buffer.take(step.tokens * width * _HALF) for width in (layer.key, layer.value)]
            buffer.free(key, value)
            result = rows(layer.query)
            buffer.free(query, *narrowed, *masks)
        else:
            scores = [rows(layer.heads * step.tokens) for _ in range(1 + 2 * step.biased)]
            buffer.free(query, key, *masks)
            turned = self._turned(value, layer.value)
            sums = rows(layer.query)
            buffer.free(turned, *scores)
            result = self._turned(sums, layer.query)
        out = rows(layer.width)
        buffer.free(result)
        return out

    def _turned(self, block: _Block, width: int) -> _Block:
        turned = self._rows(width)
        self._buffer.free(block)
        return turned

    def _weigh(self, layer: Layer, query: _Block, masks: list[_Block], value: int, result: int) -> _Block:
        """Sum the values of all cells, weighted by how well their keys fit the queries."""
        buffer, step = self._buffer, self._step
        cells = step.sliding_cells if layer.sliding else step.cells
        if step.flash:
            wide = [layer.key] * step.wide_keys + [value] * step.wide_values
            narrowed = [buffer.take(cells * width * _HALF) for width in wide]
            out = self._rows(result)
            buffer.free(query, *narrowed, *masks)
            return out
        scores = self._rows(layer.heads * cells)
        buffer.free(query, *masks)
        sums = self._rows(result)
        buffer.free(scores)
        return self._turned(sums, result)

    def _latent_attention(self, layer: Layer, masks: list[_Block]) -> _Block:
        """DeepSeek's: the cache holds the compressed keys, of which the values are a part."""
        buffer, rows = self._buffer, self._rows
        norm = rows(layer.width)
        asked = rows(layer.query // 2)
        compressed = rows(layer.key)
        absorbed = rows(layer.heads * layer.latent)
        query = rows(layer.query)
        buffer.free(norm, asked, absorbed)
        key = rows(layer.key)
        buffer.free(key, compressed)
        found = self._weigh(layer, query, masks, 0, layer.heads * layer.latent)
        wide = rows(layer.decompressed)
        buffer.free(found)
        plain = self._turned(wide, layer.decompressed)
        out = rows(layer.width)
        buffer.free(plain)
        return out

    def _recurrent(self, layer: Layer) -> _Block:
        buffer, rows, sequences = self._buffer, self._rows, self._step.sequences
        norm = rows(layer.width)
        projected = rows(layer.projected)
        buffer.free(norm)
        padded = buffer.take((self._step.tokens + 3 * sequences) * layer.mixed * _FLOAT)
        mixed = rows(layer.mixed)
        buffer.free(padded)
        scanned = buffer.take((self._step.tokens * layer.inner + sequences * layer.scan_state) * _FLOAT)
        added = rows(layer.inner)
        buffer.free(mixed)
        gate = rows(layer.inner)
        buffer.free(projected, scanned)
        result = rows(layer.inner)
        buffer.free(gate, added)
        out = rows(layer.width)
        buffer.free(result)
        return out

    def _forward(self, layer: Layer, current: _Block) -> _Block:
        """Compute a layer's feed-forward part, and add it to what the layer had."""
        buffer = self._buffer
        if not layer.forward and not layer.experts:
            return current
        norm = self._rows(layer.width)
        parts = []
        if layer.experts:
            parts.append(self._experts(layer, [] if layer.forward else [norm]))
        if layer.forward:
            parts.append(self._dense(layer, [norm]))
        buffer.free(current, *parts[1:])
        return parts[0]

    def _dense(self, layer: Layer, done: list[_Block]) -> _Block:
        buffer, rows = self._buffer, self._rows
        up = rows(2 * layer.forward if layer.packed else layer.forward)
        gates = [rows(layer.forward)] if layer.gated else []
        buffer.free(*done)
        active = up
        if layer.gated or layer.packed:
            active = rows(layer.forward)
            buffer.free(up, *gates)
        down = rows(layer.width)
        buffer.free(active)
        return down

    def _experts(self, layer: Layer, done: list[_Block]) -> _Block:
        buffer, rows, forward = self._buffer, self._rows, layer.used * layer.expert_forward
        chances = rows(layer.experts)
        order = rows(layer.experts)
        weights = rows(layer.used)
        buffer.free(chances)
        up = rows(forward)
        gates = [rows(forward)] if layer.gated else []
        buffer.free(*done)
        active = up
        if gates:
            active = rows(forward)
            buffer.free(up, *gates)
        each = rows(layer.used * layer.width)
        buffer.free(active, order, weights)
        out = rows(layer.width)
        buffer.free(each)
        return out
