"""A key-value cache that holds tokens instead of tensors: the double at the seam ``Memory``."""

from __future__ import annotations

from collections.abc import Sequence


class FakeMemory:
    """Remembers which tokens are evaluated in which slot, and refuses what llama.cpp could not do.

    One that is not ``cuttable`` can only be emptied, like a recurrent state.
    """

    def __init__(self, *, cuttable: bool = True) -> None:
        self.cuttable = cuttable
        self.tokens: dict[int, list[int]] = {}
        self.evaluated = 0  # tokens, ever

    @property
    def used(self) -> int:
        """Number of cells in use."""
        return sum(map(len, self.tokens.values()))

    def resident(self, slot: int) -> list[int]:
        """Return the tokens evaluated in a slot."""
        return self.tokens.get(slot, [])

    def evaluate(self, slot: int, position: int, tokens: Sequence[int]) -> None:
        """Append tokens to a slot; they must follow what is there."""
        resident = self.tokens.setdefault(slot, [])
        assert position == len(resident), f"slot {slot} has {len(resident)} tokens, not {position}"
        resident += tokens
        self.evaluated += len(tokens)

    def truncate(self, sequence: int, length: int) -> int:
        """See ``Memory``."""
        resident = self.tokens.setdefault(sequence, [])
        assert 0 <= length <= len(resident)
        kept = length if self.cuttable or length == len(resident) else 0
        del resident[kept:]
        return kept

    def clear(self) -> None:
        """See ``Memory``."""
        self.tokens.clear()
