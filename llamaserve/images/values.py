"""How pictures are generated, and what is reported of it. Plain data: importing this loads no library.

Sizes are in pixels. Pixels are rows of RGB, 8 bits each, those of a mask rows of one byte.
"""

from __future__ import annotations

import math
from typing import Final, Literal, NamedTuple, get_args

import msgspec

Sampler = Literal[
    "euler",
    "euler_a",
    "heun",
    "dpm2",
    "dpm++2s_a",
    "dpm++2m",
    "dpm++2mv2",
    "ipndm",
    "ipndm_v",
    "lcm",
    "ddim_trailing",
    "tcd",
    "res_multistep",
    "res_2s",
    "er_sde",
]
Scheduler = Literal[
    "discrete",
    "karras",
    "exponential",
    "ays",
    "gits",
    "sgm_uniform",
    "simple",
    "smoothstep",
    "kl_optimal",
    "lcm",
    "bong_tangent",
]
SAMPLERS: Final[tuple[Sampler, ...]] = get_args(Sampler)  # in the order of stable-diffusion.cpp's numbers
SCHEDULERS: Final[tuple[Scheduler, ...]] = get_args(Scheduler)

Part = Literal["vae", "taesd", "clip_l", "clip_g", "t5xxl", "llm", "llm_vision"]
PARTS: Final[tuple[Part, ...]] = get_args(Part)  # that may lie in files of their own, in stable-diffusion.cpp's words

Format = Literal["png", "jpeg", "webp"]
Edits = Literal["repaint", "reference"]  # how a picture is edited: a part is made anew, or the model looks at it


class Size(NamedTuple):
    """Width and height of a picture."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"

    @property
    def pixels(self) -> int:
        """How many there are."""
        return self.width * self.height


_MOST_STEPS: Final = 1000  # to leave some out; models know no more moments


class Course(NamedTuple):
    """How many steps a picture's noise is divided into, and of how many of them, the last ones, it is made."""

    total: int
    made: int

    @classmethod
    def of(cls, steps: int, strength: float) -> Course:
        """Return one of as many steps as are wanted, or as few as a low strength leaves of the most there are, for a
        picture that begins with another.
        """
        if strength >= 1:
            return cls(steps, steps)
        needed = math.ceil(min(steps / strength, _MOST_STEPS)) if strength else _MOST_STEPS
        total = min(max(needed, steps + 1), _MOST_STEPS)
        return cls(total, max(1, min(steps, round(total * strength))))


class DiffusionParams(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """How a diffusion model is loaded: its file, which may be ``whole`` or hold the diffusion model only, and the files
    of its parts. ``encodes``: it can also turn pictures into latent ones. ``small_decoder``: pictures on the way can be
    decoded quickly, and need not be guessed from latent ones. ``threads`` are CPU threads.
    """

    path: str
    whole: bool
    parts: dict[Part, str]
    encodes: bool
    small_decoder: bool
    flash_attention: bool
    threads: int


class PictureFile(msgspec.Struct, frozen=True, array_like=True):
    """A file with nothing but the pixels of a picture, or of a mask, in which what is to be new is 255."""

    path: str
    width: int
    height: int


class LoraFile(msgspec.Struct, frozen=True, array_like=True):
    """A LoRA, how strongly it works, and how many bytes it takes."""

    path: str
    scale: float
    size: int


class ImageGeneration(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A picture to generate. It is made in the size of its canvas, which the model can do, and what is over ``width``
    and ``height`` is cut off on all sides alike.

    ``init`` is a picture of the same size to begin with, of which ``strength`` (0 to 1) says how much becomes new, and
    ``mask`` where; ``references`` are pictures for the model to look at. ``cfg_scale`` 1 means no guidance, and
    ``negative_prompt`` does nothing then; ``guidance`` is for models that have learnt it. Without ``sampler`` or
    ``scheduler``, the model's family decides. ``tiled`` has large pictures decoded piece by piece, in less memory.

    ``partial_images`` are to be reported on the way. All are written as ``format``, with a ``quality`` of 0 to 100 if
    that loses some, and ``settings`` beside the pixels, in which a picture can tell how it was made.
    """

    prompt: str
    negative_prompt: str = ""
    width: int
    height: int
    canvas_width: int
    canvas_height: int
    seed: int
    steps: int
    cfg_scale: float
    guidance: float
    sampler: Sampler | None = None
    scheduler: Scheduler | None = None
    init: PictureFile | None = None
    mask: PictureFile | None = None
    strength: float = 1.0
    references: tuple[PictureFile, ...] = ()
    loras: tuple[LoraFile, ...] = ()
    tiled: bool = False
    partial_images: int = 0
    format: Format = "png"
    quality: int = 100
    settings: str = ""

    @property
    def size(self) -> Size:
        """The size of the picture."""
        return Size(self.width, self.height)

    @property
    def canvas(self) -> Size:
        """The size in which it is made."""
        return Size(self.canvas_width, self.canvas_height)


class ImageStep(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """So many steps of a request's picture are done. None are as long as the prompt is read."""

    request: int
    step: int
    steps: int


class PartialImage(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """A request's picture as far as it is done, as a file; the first one has ``index`` 0."""

    request: int
    index: int
    data: bytes


class GeneratedImage(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """A request's picture, as a file."""

    request: int
    data: bytes
