"""The chat templates of published models, rewritten for tests: ``chat/templates`` has a file for each.

They write the same prompts as the published ones do, but for the long texts that those tell the models, and ask for
what those ask. ``PUBLISHED`` says what a template is used with and how its prompts begin and end.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamaserve.chat.renderer import render
from llamaserve.chat.template import RenderJob

FOLDER = Path(__file__).parent / "chat" / "templates"
BOS = "<bos>"
CHATML = "<|im_start|>assistant\n"
_LLAMA = "<|start_header_id|>assistant<|end_header_id|>\n\n"


@dataclass(frozen=True)
class Published:
    """A template. ``asks``: how a prompt ends that asks for an answer. ``begins``: how every prompt begins.

    ``switched``: how it ends with ``enable_thinking``, and without it.
    """

    name: str
    eos: str
    asks: str
    begins: str = BOS
    switched: tuple[str, str] | None = None

    @property
    def source(self) -> str:
        """The template."""
        return (FOLDER / f"{self.name}.jinja").read_text(encoding="utf-8")

    def job(self, messages: list[dict[str, Any]], **variables: Any) -> RenderJob:
        """Return the job of rendering messages, and what to answer them begins with."""
        return RenderJob(self.source, messages, BOS, self.eos, variables=variables)

    def render(self, messages: list[dict[str, Any]], **variables: Any) -> str:
        """Return the prompt."""
        return render(self.job(messages, **variables))


_EMPTY = "<think>\n\n</think>\n\n"

PUBLISHED = [
    Published("command-r7b", "<|END_OF_TURN_TOKEN|>", "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"),
    Published("deepseek-r1", "<｜end▁of▁sentence｜>", "<｜Assistant｜><think>\n"),  # noqa: RUF001
    Published("deepseek-v3", "<｜end▁of▁sentence｜>", "<｜Assistant｜>"),  # noqa: RUF001
    Published(
        "deepseek-v3.1",
        "<｜end▁of▁sentence｜>",  # noqa: RUF001
        "<｜Assistant｜></think>",  # noqa: RUF001
        switched=("<｜Assistant｜><think>", "<｜Assistant｜></think>"),  # noqa: RUF001
    ),
    Published("functionary3.1", "<|eot_id|>", _LLAMA),
    Published("functionary3.2", "<|eot_id|>", _LLAMA + ">>>"),
    Published("functiongemma", "<end_of_turn>", "<start_of_turn>model\n"),
    Published("gemma3", "<end_of_turn>", "<start_of_turn>model\n"),
    Published(
        "gemma4",
        "<turn|>",
        "<|turn>model\n<|channel>thought\n<channel|>",
        switched=("<|turn>model\n", "<|turn>model\n<|channel>thought\n<channel|>"),
    ),
    Published(
        "glm4.5",
        "<|endoftext|>",
        "<|assistant|>",
        begins="[gMASK]<sop>",
        switched=("<|assistant|>", "/nothink<|assistant|>\n<think></think>"),
    ),
    Published("gpt-oss", "<|return|>", "<|start|>assistant", begins="<|start|>system<|message|>You are ChatGPT"),
    Published("granite4", "<|end_of_text|>", "<|start_of_role|>assistant<|end_of_role|>", "<|start_of_role|>system"),
    Published("hermes3", "<|im_end|>", CHATML),
    Published("kimi-k2", "<|im_end|>", "<|im_assistant|>assistant<|im_middle|>", begins="<|im_system|>"),
    Published("lfm2", "<|im_end|>", CHATML),
    Published("lfm2.5", "<|im_end|>", CHATML),
    Published("llama3.1", "<|eot_id|>", _LLAMA),
    Published("llama3.2", "<|eot_id|>", _LLAMA),
    Published("llama4", "<|eot|>", "<|header_start|>assistant<|header_end|>\n\n"),
    Published("magistral", "</s>", "[/INST]", BOS + "[SYSTEM_PROMPT]"),
    Published("minimax-m2", "[e~[", "]~b]ai\n<think>\n", begins="]~!b[]~b]system\n"),
    Published("ministral3", "</s>", "[/INST]", BOS + "[SYSTEM_PROMPT]"),
    Published("mistral-7b-v0.3", "</s>", "[/INST]"),
    Published("mistral-nemo", "</s>", "[/INST]"),
    Published("mistral-small-3.1", "</s>", "[/INST]", BOS + "[SYSTEM_PROMPT]"),
    Published("mistral-small-3.2", "</s>", "[/INST]", BOS + "[SYSTEM_PROMPT]"),
    Published("phi4-mini", "<|endoftext|>", "<|assistant|>", begins="<|"),
    Published("phi4-mini-tools", "<|endoftext|>", "<|assistant|>", begins="<|"),
    Published("qwen2.5", "<|im_end|>", CHATML, begins="<|im_start|>system\n"),
    Published("qwen3", "<|im_end|>", CHATML, begins="<|im_start|>", switched=(CHATML, CHATML + _EMPTY)),
    Published("qwen3-coder", "<|im_end|>", CHATML, begins="<|im_start|>"),
    Published("qwen3-instruct-2507", "<|im_end|>", CHATML, begins="<|im_start|>"),
    Published(
        "qwen3.5",
        "<|im_end|>",
        CHATML + "<think>\n",
        begins="<|im_start|>",
        switched=(CHATML + "<think>\n", CHATML + _EMPTY),
    ),
    Published("smollm2", "<|im_end|>", CHATML, begins="<|im_start|>system\n"),
    Published(
        "smollm3",
        "<|im_end|>",
        CHATML,
        begins="<|im_start|>system\n",
        switched=(CHATML, CHATML + "<think>\n\n</think>\n"),
    ),
]
