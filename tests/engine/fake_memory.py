"""A key-value cache that holds tokens instead of tensors: the double at the seam ``Memory``."""

from __future__ import annotations

from collections.abc import Sequence


class _Cell:
    """One evaluated token; a copied sequence has the same ones."""

    def __init__(self, token: int) -> None:
        self.token = token


class _State(bytearray):
    """A byte for each of some tokens, the first of which is at ``start`` of its sequence."""

    start = 0


class FakeMemory:
    """Remembers which tokens are evaluated in which sequence, and refuses what llama.cpp could not do.

    One that is not ``cuttable`` can only be emptied or copied as a whole, like a recurrent state. One that does not
    share copies into cells of its own, like a cache split by sequence.
    """

    def __init__(self, *, cuttable: bool = True, shares: bool = True) -> None:
        self.cuttable = cuttable
        self.shares = shares
        self.cells: dict[int, list[_Cell]] = {}
        self.evaluated = 0  # tokens, ever
        self.copied = 0  # tokens, ever
        self.saved = 0  # tokens, ever
        self.restored = 0  # tokens, ever

    @property
    def tokens(self) -> dict[int, list[int]]:
        """The tokens of each sequence that has some."""
        return {sequence: self.resident(sequence) for sequence, cells in self.cells.items() if cells}

    @property
    def used(self) -> int:
        """Number of cells in use."""
        return len({id(cell) for cells in self.cells.values() for cell in cells})

    def resident(self, sequence: int) -> list[int]:
        """Return the tokens evaluated in a sequence."""
        return [cell.token for cell in self.cells.get(sequence, [])]

    def evaluate(self, sequence: int, position: int, tokens: Sequence[int]) -> None:
        """Append tokens to a sequence; they must follow what is there."""
        resident = self.cells.setdefault(sequence, [])
        assert position == len(resident), f"sequence {sequence} has {len(resident)} tokens, not {position}"
        resident += map(_Cell, tokens)
        self.evaluated += len(tokens)

    def truncate(self, sequence: int, length: int) -> int:
        """See ``Memory``."""
        resident = self.cells.setdefault(sequence, [])
        assert 0 <= length <= len(resident)
        kept = length if self.cuttable or length == len(resident) else 0
        del resident[kept:]
        return kept

    def copy(self, source: int, target: int, length: int) -> int:
        """See ``Memory``."""
        assert source != target
        assert not self.cells.get(target), f"sequence {target} is not empty"
        assert 0 < length <= len(self.cells[source])
        if not self.cuttable and length < len(self.cells[source]):
            return 0
        copied = self.cells[source][:length]
        self.cells[target] = copied if self.shares else [_Cell(cell.token) for cell in copied]
        self.copied += length
        return length

    def save(self, sequence: int, start: int, end: int) -> bytearray:
        """See ``Memory``: one byte a token, so tokens must be small."""
        assert 0 <= start < end <= len(self.cells[sequence])
        assert self.cuttable or (start, end) == (0, len(self.cells[sequence]))
        self.saved += end - start
        state = _State(self.resident(sequence)[start:end])
        state.start = start
        return state

    def restore(self, sequence: int, state: bytearray, start: int, end: int) -> bool:
        """See ``Memory``."""
        resident = self.cells.setdefault(sequence, [])
        assert len(resident) == start
        assert self.cuttable or (start, end) == (0, len(state))
        assert isinstance(state, _State)
        tokens = state[start - state.start : end - state.start]
        assert state.start <= start < end == start + len(tokens)
        resident += map(_Cell, tokens)
        self.restored += len(tokens)
        return True

    def clear(self) -> None:
        """See ``Memory``."""
        self.cells.clear()
