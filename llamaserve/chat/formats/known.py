"""Which of the known formats a model's chat template shows, by the markup in its source, and the formats by name."""

from __future__ import annotations

from llamaserve.chat.answer import THINKING_TAGS
from llamaserve.chat.formats import functionary_v3_2, harmony
from llamaserve.chat.formats.deepseek import DEEPSEEK, DEEPSEEK_31
from llamaserve.chat.formats.format import AnswerFormat, CallFormat
from llamaserve.chat.formats.functionary import FUNCTIONARY_31
from llamaserve.chat.formats.gemma import FUNCTION_GEMMA, GEMMA4
from llamaserve.chat.formats.glm import GLM45, GLM47
from llamaserve.chat.formats.hermes import HERMES
from llamaserve.chat.formats.kimi import KIMI_K2
from llamaserve.chat.formats.lfm2 import LFM2
from llamaserve.chat.formats.lists import COMMAND, GRANITE, HUNYUAN, NEMOTRON, PHI4_MINI
from llamaserve.chat.formats.llama3 import LLAMA3
from llamaserve.chat.formats.llama4 import LLAMA4
from llamaserve.chat.formats.minimax import MINIMAX_M2
from llamaserve.chat.formats.mistral import MISTRAL, MISTRAL_LIST
from llamaserve.chat.formats.qwen import QWEN3_CODER, SEED_OSS

# The most special ones first: a template is of the first family all of whose texts are in it.
_SIGNS: tuple[tuple[CallFormat, tuple[str, ...]], ...] = (
    (FUNCTION_GEMMA, ("<start_function_call>", "<escape>")),
    (GEMMA4, ("<|tool_call>", '<|"|>')),
    (MINIMAX_M2, ("minimax:tool_call", "<invoke name=")),
    (SEED_OSS, ("<seed:tool_call>", "<parameter=")),
    (QWEN3_CODER, ("<tool_call>", "<function=", "<parameter=")),
    (GLM47, ("<tool_call>", "</arg_key><arg_value>")),
    (GLM45, ("<tool_call>", "<arg_key>")),
    (FUNCTIONARY_31, ("<function=", "</function>")),
    (LFM2, ("<|tool_call_start|>",)),
    (LLAMA4, ("[func_name1(",)),
    (KIMI_K2, ("<|tool_calls_section_begin|>",)),
    (DEEPSEEK, ("<｜tool▁calls▁begin｜>", "```json")),  # noqa: RUF001
    (DEEPSEEK_31, ("<｜tool▁calls▁begin｜>",)),  # noqa: RUF001
    (COMMAND, ("<|START_ACTION|>",)),
    (NEMOTRON, ("<TOOLCALL>",)),
    (HUNYUAN, ("<tool_calls>",)),
    (MISTRAL, ("[TOOL_CALLS]", "[ARGS]")),
    (MISTRAL_LIST, ("[TOOL_CALLS]",)),
    (PHI4_MINI, ("<|/tool_call|>",)),
    (PHI4_MINI, ("<|/tool|>",)),
    (GRANITE, ("<|tool_call|>",)),
    (HERMES, ("<tool_call>",)),
    (LLAMA3, ("<|python_tag|>",)),
    (LLAMA3, ('{"name": function name, "parameters":',)),
)
_NAMED = {known.name: known for known, _ in _SIGNS}


def by_template(source: str) -> CallFormat | None:
    """Return the format whose markup is in a chat template, if there is one."""
    return next((known for known, signs in _SIGNS if all(sign in source for sign in signs)), None)


def answer_format(source: str) -> AnswerFormat | None:
    """Return the format in which the model of a chat template writes the whole of its answers, if there is one."""
    return next((known for known in (harmony, functionary_v3_2) if known.matches(source)), None)


def thinks(source: str) -> bool:
    """Say whether the model of a chat template thinks before it answers, by the tags in it."""
    whole = answer_format(source)
    return (whole is not None and whole.THOUGHTS is not None) or any(tags.start in source for tags in THINKING_TAGS)


def by_name(name: str) -> CallFormat | None:
    """Return the format of a name."""
    return _NAMED.get(name)


def names() -> tuple[str, ...]:
    """Return the names of all formats."""
    return tuple(_NAMED)
