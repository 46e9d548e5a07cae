"""What goes on with any loaded model: requests in steps, and with those of texts, texts turned into tokens and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from llamaserve.engine.events import EngineEvent, Occupancy, Progress
from llamaserve.engine.llama import Vocab
from llamaserve.errors import InvalidRequest

MAX_TEXT = 1024 * 1024  # characters of one text to tokenise, which takes a second or two and much stack
MAX_TOKENS = 256 * 1024  # token ids to turn into text at once
_PROBE = 16  # characters a token: of a text that is longer a part is looked at first, which mostly settles it at once
_TOKENS_CUT = 64  # by how many tokens cutting a text may at most mislead


class Work(ABC):
    """The requests to one model. All but ``interrupt`` belongs to one thread, which calls ``step`` as long as there is
    something to do.
    """

    @property
    @abstractmethod
    def idle(self) -> bool:
        """Whether ``step`` has nothing to do."""

    @property
    def steady(self) -> bool:
        """Whether the next step is one like the last, and no request waits for another's end."""
        return False

    @abstractmethod
    def step(self) -> list[EngineEvent]:
        """Evaluate one batch and report what came of it."""

    @abstractmethod
    def cancel(self, request: int) -> None:
        """Drop a request that nobody waits for; nothing more is reported of it."""

    @abstractmethod
    def interrupt(self, request: int | None) -> None:
        """Give up a long step under way that is for this request, or for any if it is None. From any thread."""

    @abstractmethod
    def occupancy(self) -> Occupancy | None:
        """Return how busy it is when that has changed since the last call, else None."""

    def stop(self, request: int | None = None) -> list[EngineEvent]:  # noqa: ARG002
        """End one request, or all of them, with what there is, if a part of an answer is worth anything."""
        return []

    def progress(self) -> list[Progress]:
        """Return where streamed requests stand that have no token yet."""
        return []

    def save_ahead(self) -> bool:
        """Use an idle moment; False when there is nothing to do in it."""
        return False


class TextWork(Work):
    """The requests to a model of texts. What needs the vocabulary only may be used from any thread."""

    def __init__(self, vocab: Vocab) -> None:
        self.vocab = vocab

    def tokenize(self, text: str, *, add_bos: bool, parse_special: bool) -> list[int]:
        """Return the tokens of any text within ``MAX_TEXT``. Thread-safe."""
        if len(text) > MAX_TEXT:
            raise InvalidRequest(f"the text has {len(text)} characters; at most {MAX_TEXT} are tokenised", param="text")
        return self.vocab.tokenize(text, add_bos=add_bos, parse_special=parse_special)

    def detokenize(self, tokens: Sequence[int], *, special: bool) -> str:
        """Return the text of at most ``MAX_TOKENS`` tokens. Thread-safe."""
        if len(tokens) > MAX_TOKENS:
            raise InvalidRequest(f"there are {len(tokens)} token ids; at most {MAX_TOKENS} are taken", param="tokens")
        return self.vocab.detokenize(tokens, special=special)

    def size_if_over(self, text: str, tokens: int) -> str | None:
        """Return in words how long a text is that certainly has more tokens, found quickly for absurd lengths; None for
        one that must be tokenised to know. Thread-safe.
        """
        if len(text) > MAX_TEXT:
            return f"{len(text)} characters, which is more than is tokenised ({MAX_TEXT})"
        if len(text) > _PROBE * tokens:
            part = self.vocab.tokenize(text[: _PROBE * tokens], add_bos=False, parse_special=True)
            if len(part) > tokens + _TOKENS_CUT:
                return f"at least {len(part)} tokens"
        return None
