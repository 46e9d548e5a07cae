"""The values that describe what the engine shall load and generate. Plain data: importing this loads no library."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

GpuLayers = Literal["auto", "all", "none"] | int
FlashAttention = Literal["auto", "on", "off"]
KVType = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"]
SplitMode = Literal["none", "layer", "row"]
NumaStrategy = Literal["off", "distribute", "isolate", "numactl"]
Pooling = Literal["mean", "cls", "last", "rank"]

DRAFTED_ROWS = 16  # guessed tokens in a step at most, of all sequences together; each has a row of logits
UNTILED = 63  # tokens of the largest step for vectors that a CPU does not compute in tiles (see ``embedder``)
SCORED_ROWS = 64  # prompt tokens in a step at most of which the logits are wanted, too


class Footprint(msgspec.Struct, frozen=True, array_like=True):
    """Bytes of main memory and of the memory of GPUs."""

    host: int = 0
    device: int = 0

    def __add__(self, other: Footprint) -> Footprint:
        return Footprint(self.host + other.host, self.device + other.device)

    def __sub__(self, other: Footprint) -> Footprint:
        return Footprint(self.host - other.host, self.device - other.device)

    def fits(self, room: Footprint) -> bool:
        """Whether there is room for it in both."""
        return self.host <= room.host and self.device <= room.device


class Adapter(msgspec.Struct, frozen=True):
    """A LoRA adapter: what requests call it, its GGUF file, and how strongly it works where a request says nothing."""

    name: str
    path: str
    scale: float = 1.0


class LoadParams(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """How a GGUF model is loaded.

    ``context`` is the largest number of tokens (prompt and answer) of one request, ``parallel`` the number of sequences
    evaluated at once, and ``batch`` the largest number of tokens in one step. ``kv_cells`` is the number of tokens that
    the key-value cache holds for all sequences together. ``kv_unified`` says that any sequence may use any cell;
    otherwise each has its own ``kv_cells / parallel``, which must not be less than ``context``. ``adaptive_threads``
    lets the number of ``threads`` fall while other programs use the cores, ``prefix_cache`` allows to reuse what was
    evaluated for another request, ``spill`` is the bytes of main memory that this may take beside the cache (None: as
    many as the cache has, but at most a quarter of what is free, and none with a GPU), and ``speculation`` allows to
    evaluate guessed tokens beforehand.

    ``micro_batch`` is how many of a step's tokens are computed at once (None: all of them), and ``batch_threads`` the
    threads for more than one token (None: as many as for one). ``mmap`` maps the file instead of reading it (None: it
    is mapped unless somebody decides otherwise), ``mlock`` keeps it from being swapped out. ``gpu_cache`` puts the
    cache of layers on a GPU there, too; ``tensor_split`` are the shares of several GPUs and ``split_mode`` says what is
    divided among them. ``rope_freq_base`` and ``rope_freq_scale`` replace the model's own (0: they don't).
    ``full_window`` keeps the cells behind a sliding window, so that beginnings can be reused. A model with ``pooling``
    generates nothing: it makes one vector of all those that it computes for a text of at most ``context`` tokens, their
    mean or the first or last of them, or gives a score for a pair of texts (``rank``). ``adapters`` are loaded with the
    model, and ``saved_prefixes`` is a file from which prefixes of an earlier life are taken, if it is good and
    was written under the same ``prefixes_identity``.
    """

    path: str
    context: int
    parallel: int
    kv_cells: int
    kv_unified: bool
    batch: int
    threads: int
    adaptive_threads: bool
    gpu_layers: GpuLayers
    flash_attention: FlashAttention
    key_type: KVType
    value_type: KVType
    prefix_cache: bool
    spill: int | None
    speculation: bool
    micro_batch: int | None = None
    batch_threads: int | None = None
    mmap: bool | None = None
    mlock: bool = False
    numa: NumaStrategy = "off"
    gpu_cache: bool = True
    tensor_split: tuple[float, ...] = ()
    split_mode: SplitMode = "layer"
    rope_freq_base: float = 0.0
    rope_freq_scale: float = 0.0
    full_window: bool = False
    pooling: Pooling | None = None
    adapters: tuple[Adapter, ...] = ()
    saved_prefixes: str | None = None
    prefixes_identity: str = ""


# The stages of a sampler in their usual order: text-generation-webui's, with those it has no place for put first.
STAGES = (
    "no_repeat_ngram",
    "encoder_repetition_penalty",
    "penalties",
    "dry",
    "top_n_sigma",
    "temperature",
    "quadratic_sampling",
    "top_k",
    "top_p",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "tfs",
    "top_a",
    "min_p",
    "xtc",
)


# What switches a stage on, and what else says how it works.
_STAGE_FIELDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    **{name: ((name,), ()) for name in STAGES},
    "no_repeat_ngram": (("no_repeat_ngram_size",), ()),
    "penalties": (
        ("repetition_penalty", "frequency_penalty", "presence_penalty"),
        ("repetition_penalty_range",),
    ),
    "dry": (("dry_multiplier",), ("dry_base", "dry_allowed_length", "dry_range", "dry_sequence_breakers")),
    "temperature": (("temperature", "dynatemp_range"), ()),
    "quadratic_sampling": (("smoothing_factor",), ("smoothing_curve",)),
    "xtc": (("xtc_probability",), ("xtc_threshold",)),
}
_BEFORE_GREEDY = ("no_repeat_ngram", "encoder_repetition_penalty", "penalties", "dry")
_BESIDE_MIROSTAT = (*_BEFORE_GREEDY, "temperature", "quadratic_sampling")
_GREEDY_BELOW = 1e-5  # temperatures at which only the best token is left, and dividing by them could overflow


class Sampling(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the next token is chosen from the logits. Every option's default is neutral.

    First come ``logit_bias``, by token id, and the bans: of ``banned_tokens``, and of the tokens that end an answer,
    for ever (``ban_eos``) or for the first ``min_tokens``. Then the ``stages`` in their order; one that is not listed
    is off. ``penalties`` are the repetition, frequency and presence penalty, which look at the last
    ``repetition_penalty_range`` tokens, prompt included; 0 means all of them, as it does for ``dry_range``. At
    ``temperature`` 0 the most probable token is taken after the penalties, whatever else is set. With a
    ``dynatemp_range`` the temperature moves by so much to either side. ``mirostat_mode`` 1 or 2 replaces all stages
    from ``top_n_sigma`` on but the temperatures, an ``adaptive_target`` the draw.
    """

    seed: int
    stages: tuple[str, ...] = STAGES
    temperature: float = 1.0
    dynatemp_range: float = 0.0
    dynatemp_exponent: float = 1.0
    smoothing_factor: float = 0.0
    smoothing_curve: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    top_n_sigma: float = 0.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    tfs: float = 1.0
    top_a: float = 0.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    mirostat_mode: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    adaptive_target: float = 0.0
    adaptive_decay: float = 0.9
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty_range: int = 1024
    encoder_repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_range: int = 1024
    dry_sequence_breakers: tuple[str, ...] = ()
    logit_bias: dict[int, float] = {}
    banned_tokens: tuple[int, ...] = ()
    ban_eos: bool = False
    min_tokens: int = 0

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is taken."""
        return self.temperature < _GREEDY_BELOW and not self.dynatemp_range

    def effective(self) -> Sampling:
        """Return the same without what has no effect: only stages that do something, and nothing else that is not
        neutral.
        """
        kept = _BEFORE_GREEDY if self.greedy else _BESIDE_MIROSTAT if self.mirostat_mode else STAGES
        active = tuple(name for name in self.stages if name in kept and self._does_something(name))
        idle: list[str] = []
        for name, (switches, details) in _STAGE_FIELDS.items():
            if name not in active:
                idle += [*switches, *details]
        if "temperature" not in active or not self.dynatemp_range:
            idle.append("dynatemp_exponent")
        if self.greedy or not self.mirostat_mode:
            idle += ["mirostat_mode", "mirostat_tau", "mirostat_eta"]
        if self.greedy or self.mirostat_mode or not self.adaptive_target:
            idle += ["adaptive_target", "adaptive_decay"]
        changes = {name: _DEFAULTS[name] for name in idle}
        if self.greedy:
            changes["temperature"] = 0.0
        return msgspec.structs.replace(self, stages=active, **changes)

    def _does_something(self, stage: str) -> bool:
        return any(getattr(self, name) != _DEFAULTS[name] for name in _STAGE_FIELDS[stage][0])


_DEFAULTS: dict[str, Any] = dict(
    zip(reversed(Sampling.__struct_fields__), reversed(Sampling.__struct_defaults__), strict=False)
)


ConstraintKind = Literal["json_schema", "grammar", "regex", "choice", "lark"]


class Constraint(msgspec.Struct, frozen=True, omit_defaults=True):
    """What form an answer must have: JSON that fits a schema, a sentence of a GBNF grammar, a text that matches a
    regular expression as a whole, or one of several texts (a JSON list). ``param`` is the request field it is from.
    A ``lenient`` schema may have keywords that can't be enforced; they are left out.

    Or ``lark``: rules in llguidance's notation that may use, for each of the ``parts``, a rule ``part0``, ``part1`` …
    that is its form, and for each of the ``markers`` three rules: ``marker0`` is the control token of that name, or
    the text where the vocabulary has none; ``until0`` is text without any of the markers, and then this one;
    ``through0`` is text in which the other markers may be, and then this one. ``TEXT`` is text without markers.
    """

    kind: ConstraintKind
    text: str
    param: str
    markers: tuple[str, ...] = ()
    parts: tuple[Constraint, ...] = ()
    lenient: bool = False

    def anonymous(self) -> Constraint:
        """Return the same from no field: two constraints that mean the same are equal then."""
        return msgspec.structs.replace(self, param="", parts=tuple(part.anonymous() for part in self.parts))


class Thinking(msgspec.Struct, frozen=True):
    """How long an answer may think: after ``budget`` tokens ``message`` and ``end`` come, whatever the model wants.

    Thinking is what stands between ``start``, at the beginning of the answer (white space may be before it), and
    ``end``; if the prompt has ``begun`` it, ``start`` is in the prompt already. Both are texts, or names of control
    tokens.
    """

    start: str
    end: str
    budget: int
    begun: bool = False
    message: str = ""


class NextToken(msgspec.Struct, frozen=True):
    """Report how probable the ``top`` most probable next tokens are: for the model, or ``sampled``, after the bans and
    stages of the sampler.
    """

    top: int
    sampled: bool = False


class Logprobs(msgspec.Struct, frozen=True):
    """Report the log-probability of each token of the answer, and of the ``top`` most probable ones in its place; with
    ``prompt``, of the prompt's tokens too.
    """

    top: int
    prompt: bool = False


class Generation(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What to generate from each prompt: ``choices`` answers of at most ``max_tokens`` tokens (None: until the context
    ends; 0: the prompt is only evaluated), cut before the first of the ``stop`` strings or after ``time_limit``
    seconds, waiting included. Choice *i* samples with ``sampling.seed + i``.

    ``context`` is how many tokens prompt and answer may have together, if that is less than the model's; with
    ``truncate`` a longer prompt loses its beginning, otherwise it is refused. ``add_bos`` begins a text prompt with the
    begin token, if the model has one. ``special`` shows control tokens in the text, otherwise only those of the names
    in ``shown`` are. With ``next_token`` nothing is generated: what could come next is reported. ``adapters`` are the
    LoRA adapters to use, by name and with their scales; None stands for all of the model's with their own. ``share``
    names whose share of the model's time it counts for; where several wait, each gets as much.
    """

    sampling: Sampling
    constraint: Constraint | None = None
    choices: int = 1
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    time_limit: float | None = None
    stream: bool = False
    logprobs: Logprobs | None = None
    context: int | None = None
    truncate: bool = False
    add_bos: bool = True
    special: bool = False
    shown: tuple[str, ...] = ()
    thinking: Thinking | None = None
    next_token: NextToken | None = None
    adapters: tuple[tuple[str, float], ...] | None = None
    share: str = ""


class Embedding(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What to make of texts: vectors of length 1 with the first ``dimensions`` of the model's (None: all of them).

    A text that is longer than the model's context loses its end or its start with ``truncate``; otherwise it is
    refused.
    """

    dimensions: int | None = None
    truncate: Literal["none", "end", "start"] = "none"
