"""The fields of a chat request, and what they become for ``chat/``. docs/chat.md has all of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, Field, WithJsonSchema

from llamaserve.api.chat_schemas import FUNCTION_CALL, FUNCTIONS, MESSAGES, TOOL_CHOICE, TOOLS
from llamaserve.api.fields import Text
from llamaserve.api.options import GenerationOptions
from llamaserve.api.services import Services
from llamaserve.chat.instruction_templates import InstructionTemplate, Overrides
from llamaserve.chat.messages import normalise
from llamaserve.chat.modes import Mode, ModelTemplate, Style
from llamaserve.chat.preparation import ChatWish, ThinkingWish
from llamaserve.chat.shortening import Truncation
from llamaserve.chat.tools import Toolbox, toolbox
from llamaserve.chat.values import written
from llamaserve.engine.params import Logprobs
from llamaserve.errors import InvalidRequest

_OF_DIALOGUES = ("character", "name1", "name2", "context", "user_bio", "chat_template_str")
_OF_INSTRUCTIONS = ("instruction_template", "turn_template", "name1_instruct", "name2_instruct", "context_instruct")
_TAKEN = frozenset(("messages", "tools", "bos_token", "eos_token", "add_generation_prompt", "raise_exception"))
_OFF = ("none", "off", "disabled")  # efforts that are none


class ChatRequest(GenerationOptions):
    """A request for the next message."""

    messages: Annotated[list[dict[str, Any]], WithJsonSchema(MESSAGES)] = Field(
        description="The conversation, in the roles system, developer, user, assistant, tool and function.",
        examples=[[{"role": "user", "content": "Why is the sky blue?"}]],
    )
    logprobs: bool = Field(default=False, description="Report the log-probabilities of the answer's tokens.")
    top_logprobs: int = Field(0, ge=0, le=20, description="And of so many of the most probable ones in their places.")

    tools: Annotated[list[Any] | None, WithJsonSchema(TOOLS)] = Field(
        None, description="Functions that the model may call."
    )
    tool_choice: Annotated[Any, WithJsonSchema(TOOL_CHOICE)] = Field(
        None, description="auto, none, required, or which function."
    )
    parallel_tool_calls: bool | None = Field(None, description="Whether an answer may have several calls.")
    functions: Annotated[list[Any] | None, WithJsonSchema(FUNCTIONS)] = Field(None, description="Older name of tools.")
    function_call: Annotated[Any, WithJsonSchema(FUNCTION_CALL)] = Field(None, description="Older name of tool_choice.")

    enable_thinking: bool | None = Field(
        None, validation_alias=AliasChoices("enable_thinking", "think"), description="Whether the model thinks first."
    )
    reasoning_effort: Text | None = Field(None, max_length=64, description="How much; none switches thinking off.")
    preserve_thinking: bool | None = Field(None, description="Whether a template shows earlier thoughts.")
    reasoning_budget: int | None = Field(
        None,
        ge=-1,
        le=2**31 - 1,
        validation_alias=AliasChoices(
            *("reasoning_budget", "max_thinking_tokens", "reasoning_budget_tokens", "thinking_budget_tokens"),
            "thinking_budget",
        ),
        description="Tokens of thinking at most; -1: any, 0: none.",
    )
    reasoning_budget_message: Text = Field(
        "", max_length=4096, description="What the model finds at the end of thoughts that are cut there."
    )
    reasoning_format: Literal["auto", "deepseek", "both", "none"] = Field(
        "auto", description="Where thoughts go: reasoning_content, reasoning too, or left in the content."
    )
    include_reasoning: bool = Field(default=True, description="Whether the answer has the thoughts at all.")

    mode: Mode = Field(Mode.INSTRUCT, description="instruct, chat or chat-instruct.")
    character: Text | None = Field(None, max_length=512, description="A character's name.")
    name1: Text = Field("", validation_alias=AliasChoices("name1", "user_name"), description="The user's name.")
    name2: Text = Field("", validation_alias=AliasChoices("name2", "bot_name"), description="The model's name.")
    context: Text = Field("", description="What the character is like.")
    greeting: Text = Field("", description="Without effect: a greeting that was shown is among the messages.")
    user_bio: Text = Field("", description="What the user is like.")
    chat_instruct_command: Text = Field("", description="What chat-instruct asks for.")
    chat_template_str: Text = Field("", description="Jinja source that writes the dialogue of the chat modes.")
    instruction_template: Text | None = Field(None, max_length=512, description="An instruction template's name.")
    instruction_template_str: Text = Field(
        "",
        validation_alias=AliasChoices("instruction_template_str", "chat_template"),
        description="Jinja source in place of the model's chat template.",
    )
    chat_template_kwargs: dict[str, Any] = Field({}, description="Variables for the template.")
    turn_template: Text = Field("", description="A turn of an instruction template in the older form.")
    name1_instruct: Text = Field("", description="What stands for the user in it.")
    name2_instruct: Text = Field("", description="What stands for the model in it.")
    context_instruct: Text = Field("", description="What stands before its turns.")
    system_message: Text = Field("", description="The system text of conversations without one.")

    continue_: bool = Field(default=False, description="Go on with the last message, and return it with the rest.")
    continue_final_message: bool = Field(default=False, description="Go on with the last message; return the rest.")
    add_generation_prompt: bool = Field(default=True, description="Whether the prompt opens the model's turn.")
    echo: bool = Field(default=False, description="Return what continue_final_message goes on with, too.")
    truncation: Truncation | None = Field(
        None, description="auto: leave out the oldest turns of a conversation that is too long."
    )

    @property
    def continues(self) -> bool:
        """Whether the answer goes on with the last message."""
        return self.continue_ or self.continue_final_message

    @property
    def shortens(self) -> bool:
        """Whether a conversation that is too long loses its oldest turns."""
        return self.truncation == "auto" or (self.truncation is None and self.truncation_length > 0)

    @property
    def own_template(self) -> str | None:
        """The field with a template that the request brings, under the name that it has there."""
        dialogue = self.chat_template_str and self.mode is not Mode.INSTRUCT
        name = "chat_template_str" if dialogue else "instruction_template_str"
        return self.called(name) if getattr(self, name) else None

    def wanted_logprobs(self) -> Logprobs | None:
        """Return which log-probabilities are asked for."""
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
        return Logprobs(self.top_logprobs) if self.logprobs else None

    def thought_fields(self, usual: str) -> tuple[str, ...]:
        """Return the names under which the thoughts of an answer are sent, if they are; ``usual`` is the server's."""
        if not self.include_reasoning:
            return ()
        if "both" in (usual, self.reasoning_format):
            return "reasoning_content", "reasoning"
        return (usual if self.reasoning_format == "auto" else "reasoning_content",)

    def toolbox(self) -> Toolbox | None:
        """Return the tools that the model may call."""
        return toolbox(
            tools=self.tools,
            tool_choice=self.tool_choice,
            parallel_tool_calls=self.parallel_tool_calls,
            functions=self.functions,
            function_call=self.function_call,
        )

    def wish(self, services: Services, model: ModelTemplate) -> ChatWish:
        """Return what the request wants. Raises ``InvalidRequest`` for what can't be."""
        if (
            self.continue_final_message
            and "add_generation_prompt" in self.model_fields_set
            and self.add_generation_prompt
        ):
            raise InvalidRequest(
                "continue_final_message and add_generation_prompt can't both be true", param="add_generation_prompt"
            )
        self._check_variables()
        return ChatWish(
            messages=normalise(self.messages),
            model=model,
            style=self._style(services),
            toolbox=self.toolbox(),
            body=self.constraint(),
            thinking=ThinkingWish(
                wanted=self._thinking(),
                budget=None if self.reasoning_budget == -1 else self.reasoning_budget,
                message=self.reasoning_budget_message,
                read=self.reasoning_format != "none",
            ),
            variables=self._variables(),
            echo=self.continue_ or self.echo,
            streamed=self.stream,
        )

    def _style(self, services: Services) -> Style:
        return Style(
            mode=self.mode,
            character=services.characters.get(self.character),
            name1=self.name1,
            name2=self.name2,
            context=self.context,
            greeting=self.greeting,
            user_bio=self.user_bio,
            instruction=self._instruction(services),
            chat_template=self.chat_template_str,
            chat_instruct_command=self.chat_instruct_command,
            continue_=self.continues,
            generation_prompt=self.add_generation_prompt,
        )

    def _instruction(self, services: Services) -> InstructionTemplate:
        if self.instruction_template_str:
            return InstructionTemplate(self.instruction_template_str, self.system_message)
        overrides = Overrides(
            turn_template=self.turn_template,
            name1_instruct=self.name1_instruct,
            name2_instruct=self.name2_instruct,
            context_instruct=self.context_instruct,
            system_message=self.system_message,
        )
        return services.instruction_templates.get(self.instruction_template, overrides)

    def _check_variables(self) -> None:
        """Refuse variables that templates get from elsewhere, or that can't be passed on."""
        place = "chat_template_kwargs"
        written(self.chat_template_kwargs, place)
        if taken := sorted(_TAKEN & self.chat_template_kwargs.keys()):
            raise InvalidRequest(f"{place} can't have {taken[0]!r}: templates get that from the request", param=place)

    def _thinking(self) -> bool | None:
        """Return whether the model shall think, if the request says so in one way or another."""
        if self.reasoning_effort in _OFF:
            return False
        kwargs = self.chat_template_kwargs
        said = (self.enable_thinking, *(kwargs.get(name) for name in ("enable_thinking", "thinking")))
        return next((value for value in said if isinstance(value, bool)), None)

    def _variables(self) -> dict[str, Any]:
        """Return the template's variables: thinking is on unless it is switched off."""
        thinking = self._thinking() is not False and self.reasoning_budget != 0
        variables: dict[str, Any] = {"enable_thinking": thinking, "thinking": thinking}
        if self.reasoning_effort is not None and self.reasoning_effort not in _OFF:
            variables["reasoning_effort"] = self.reasoning_effort
        if self.preserve_thinking is not None:
            variables["preserve_thinking"] = self.preserve_thinking
        return variables | self.chat_template_kwargs

    def _idle(self) -> Iterator[str]:
        yield from super()._idle()
        tools = self.toolbox()
        idle = {
            "echo": not self.continues,
            "greeting": True,
            "parallel_tool_calls": tools is None,
            "reasoning_budget_message": self.reasoning_budget in (None, -1, 0),
        }
        if self.mode is Mode.INSTRUCT:
            idle |= dict.fromkeys(_OF_DIALOGUES, True)
        if self.mode is not Mode.CHAT_INSTRUCT:
            idle["chat_instruct_command"] = True
        if self.mode is Mode.CHAT:
            idle |= dict.fromkeys((*_OF_INSTRUCTIONS, "instruction_template_str", "system_message"), True)
        elif self.instruction_template_str:
            idle |= dict.fromkeys(_OF_INSTRUCTIONS, True)
        yield from (name for name in self.changes(type(self)) if idle.get(name))
        body = self.constraint()
        if tools is not None and tools.forced and body is not None:
            yield body.param
