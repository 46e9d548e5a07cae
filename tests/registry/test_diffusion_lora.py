"""LoRAs of diffusion models: which fit a model, and that the library takes those, and would end at the others."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
import pytest
from diffusion_tensors import BYTES, CLIP, MODEL, Shapes
from hypothesis import example, given, settings, strategies as st
from tiny_bert import Stored, stored, write_safetensors
from tiny_diffusion import HEAD, MLP, write_model
from tiny_ernie import PATCH, write_ernie

from llamaserve.errors import GGUFError
from llamaserve.images.values import DiffusionParams
from llamaserve.registry import diffusion_family as families
from llamaserve.registry.diffusion_family import Family
from llamaserve.registry.diffusion_file import DiffusionHeader, Tensor, read_weights
from llamaserve.registry.diffusion_lora import check_lora

CHILD = Path(__file__).with_name("running_lora.py")
OUT, IN = HEAD, MLP * HEAD
LAYER = "diffusion_model.double_blocks.0.img_mlp.2"  # of the tiny FLUX.2 klein: (OUT, IN)
ATTENTION = "transformer.transformer_blocks.0.attn."  # of it, in another convention: three layers that are one
EMBEDDER = "diffusion_model.x_embedder.proj"  # of the tiny ERNIE Image: (HEAD, HEAD, PATCH, PATCH)
NORM = "diffusion_model.layers.0.adaLN_sa_ln"  # of it: (HEAD,)

Described = tuple[str, tuple[int, ...]]  # type and shape of a tensor
Lora = Mapping[str, Described]
Check = Callable[[Lora], int]

needs_library = pytest.mark.skipif(
    importlib.util.find_spec("stable_diffusion_cpp") is None or sys.platform == "darwin",
    reason="stable-diffusion-cpp-python is not installed, or uses Metal, which a forked process may not",
)


def pair(down: tuple[int, ...], up: tuple[int, ...], layer: str = LAYER, dtype: str = "F16", **more: Described) -> Lora:
    """Return a LoRA of one layer."""
    names = {f"{layer}.lora_down.weight": (dtype, down), f"{layer}.lora_up.weight": (dtype, up)}
    return names | {f"{layer}.{name}": described for name, described in more.items()}


def parts(layer: str = LAYER, dtype: str = "F16", **shapes: tuple[int, ...]) -> Lora:
    """Return what changes a layer, by the names in LyCORIS."""
    return {f"{layer}.{name}": (dtype, shape) for name, shape in shapes.items()}


def loha(layer: str, out: int, into: int, ranks: tuple[int, int] = (3, 2), dtype: str = "F16") -> Lora:
    shapes = {}
    for which, rank in zip("12", ranks, strict=True):
        shapes |= {f"hada_w{which}_a": (out, rank), f"hada_w{which}_b": (rank, into)}
    return parts(layer, dtype, **shapes)


def split(*sizes: tuple[int, int], names: tuple[str, ...] = ("to_q", "to_k", "to_v"), into: int = HEAD) -> Lora:
    """Return a LoRA of layers that are one in the library; each of the sizes is a rank and a number of rows."""
    lora: dict[str, Described] = {}
    for name, (rank, rows) in zip(names, sizes, strict=True):
        lora[f"{ATTENTION}{name}.lora_A.weight"] = ("F16", (rank, into))
        lora[f"{ATTENTION}{name}.lora_B.weight"] = ("F16", (rows, rank))
    return lora


def write(path: Path, lora: Lora) -> Path:
    """Write a LoRA of random numbers; ``alpha`` and ``scale`` are 4."""
    path.write_bytes(write_safetensors({name: _content(name, *described) for name, described in lora.items()}))
    return path


def _content(name: str, dtype: str, shape: tuple[int, ...]) -> Stored:
    random = np.asarray(np.random.default_rng(1).standard_normal(shape) * 0.3)
    values = np.full(shape, 4.0) if name.endswith(("alpha", "scale")) else random
    if dtype in ("F16", "BF16", "F32"):
        return stored(values, dtype)
    content = values.astype("<f8").tobytes() if dtype == "F64" else bytes([48]) * (values.size * SIZES[dtype])
    return dtype, shape, content


SIZES = BYTES | {"BOOL": 1, "I8": 1, "I16": 2, "U16": 2, "U32": 4, "U64": 8}


class Model(NamedTuple):
    """The headers of a model, and a check of LoRAs for it."""

    header: DiffusionHeader
    check: Check

    def refused(self, lora: Lora) -> str:
        with pytest.raises(GGUFError) as caught:
            self.check(lora)
        before = f"the LoRA style.safetensors can't be used with this {self.header.family.name} model: "
        assert caught.value.message.startswith(before)
        return caught.value.message.removeprefix(before)


def model_of(family: Family, shapes: Mapping[str, Tensor], folder: Path, *files: Path) -> Model:
    path, decoder = files or (folder / "none", None)
    header = DiffusionHeader(path, {"taesd": decoder} if decoder else {}, True, family, dict(shapes))
    return Model(header, lambda lora: check_lora(write(folder / "style.safetensors", lora), header).size)


def imagined(family: Family, shapes: Shapes, folder: Path, dtype: str = "F16") -> Model:
    """Return a model of which there is no file."""
    return model_of(family, {name: Tensor(shape, dtype, 0) for name, shape in shapes.items()}, folder)


@pytest.fixture(scope="module")
def klein(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("klein")
    files = write_model(folder)
    return model_of(families.KLEIN, read_weights(files[0]), folder, *files)


@pytest.fixture(scope="module")
def ernie(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("ernie")
    files = write_ernie(folder)
    return model_of(families.ERNIE, read_weights(files[0]), folder, *files)


# ---- what fits, and what the library ends at

KERNEL = (PATCH, PATCH)
FITTING: Mapping[str, Lora] = {
    "plain": pair((4, IN), (OUT, 4)),
    "rank one": pair((1, IN), (OUT, 1)),
    **{dtype: pair((4, IN), (OUT, 4), dtype=dtype) for dtype in ("BF16", "F32", "F64", "F8_E4M3", "F8_E5M2")},
    **{f"alpha {dtype}": pair((4, IN), (OUT, 4), alpha=(dtype, ())) for dtype in ("F16", "F32", "BF16", "I64")},
    "alpha in a list": pair((4, IN), (OUT, 4), alpha=("F32", (1,))),
    "scale": pair((4, IN), (OUT, 4), scale=("F32", ())),
    "kohya": pair((4, HEAD), (9 * HEAD, 4), "lora_unet_single_blocks_0_linear1"),
    "PEFT": {f"{LAYER}.lora_A.weight": ("F16", (4, IN)), f"{LAYER}.lora_B.weight": ("F16", (OUT, 4))},
    "diffusers": split((4, HEAD), (2, HEAD), (1, HEAD)),
    "diff": parts(diff=(OUT, IN)),
    "diff of parts": {f"{ATTENTION}{name}.diff": ("BF16", (HEAD, HEAD)) for name in ("to_q", "to_k", "to_v")},
    "LoHa": loha(LAYER, OUT, IN),
    "LoHa with alpha": {**loha(LAYER, OUT, IN, dtype="F32"), f"{LAYER}.alpha": ("F32", ())},
    "LoKr": parts(lokr_w1=(4, 8), lokr_w2=(OUT // 4, IN // 8)),
    "LoKr of parts": {
        f"{ATTENTION}{name}.lokr_w{which}": (
            "F32",
            (8 * int(which), HEAD // 8 // int(which)) if which == "1" else (16, 8),
        )
        for name in ("to_q", "to_k", "to_v")
        for which in "12"
    },
    "text encoder": pair((4, 32), (32, 4), "text_encoders.llm.model.layers.0.mlp.down_proj"),
    "norm of the text encoder": {"text_encoders.llm.model.norm.diff": ("F16", (32,))},
    "partly for another": {
        **pair((4, IN), (OUT, 4), dora_scale=("F16", (OUT, 1))),
        **pair((4, 768), (3072, 4), "lora_te1_text_model_encoder_layers_0_mlp_fc1"),
        "lora_te1_text_model_embeddings.position_ids": ("I64", (1, 77)),
    },
}
FITTING_CONVOLUTION: Mapping[str, Lora] = {
    "plain": pair((4, HEAD, *KERNEL), (HEAD, 4, 1, 1), EMBEDDER),
    "without a kernel behind": pair((4, HEAD, *KERNEL), (HEAD, 4), EMBEDDER),
    **{dtype: pair((4, HEAD, *KERNEL), (HEAD, 4, 1, 1), EMBEDDER, dtype) for dtype in ("BF16", "F32", "F8_E5M2")},
    "alpha": pair((4, HEAD, *KERNEL), (HEAD, 4, 1, 1), EMBEDDER, alpha=("F16", ())),
    "diff": parts(EMBEDDER, diff=(HEAD, HEAD, *KERNEL)),
    "LoHa": loha(EMBEDDER, HEAD, HEAD * PATCH * PATCH),
    "bias": parts(EMBEDDER, diff_b=(HEAD,)),
    "norm": parts(NORM, diff=(HEAD,)),
    "LoKr": parts("diffusion_model.layers.0.mlp.up_proj", lokr_w1=(2, 2), lokr_w2=(48, 64)),
}
ENDING: Mapping[str, Lora] = {
    "for a larger model": pair((4, 2 * IN), (2 * OUT, 4)),
    "more rows": pair((4, IN), (2 * OUT, 4)),
    "two ranks": pair((4, IN), (OUT, 8)),
    "rank zero": pair((0, IN), (OUT, 0)),
    "for a convolution": pair((4, IN, 3, 3), (OUT, 4, 1, 1)),
    "for a convolution without kernel": pair((4, IN, 1, 1), (OUT, 4, 1, 1)),
    "rows": pair((IN,), (OUT,)),
    "numbers": pair((), ()),
    "I64": pair((4, IN), (OUT, 4), dtype="I64"),
    "I32": pair((4, IN), (OUT, 4), dtype="I32"),
    "no alpha": pair((4, IN), (OUT, 4), alpha=("F32", (0,))),
    "diff": parts(diff=(3, 5)),
    "diff of whole numbers": parts(dtype="I32", diff=(OUT, IN)),
    "diff of one row": {
        f"{ATTENTION}{name}.diff": ("F16", (rows, HEAD)) for name, rows in (("to_q", 1), ("to_k", 127), ("to_v", 256))
    },
    "LoHa": loha(LAYER, OUT, IN - 1),
    "LoHa of two ranks": parts(hada_w1_a=(5, 3), hada_w1_b=(2, 7), hada_w2_a=(5, 3), hada_w2_b=(3, 7)),
    "LoKr": parts(lokr_w1=(5, 3), lokr_w2=(2, 7)),
    "LoKr in three": parts(lokr_w1=(4, 8), lokr_w2_a=(OUT // 4, 4), lokr_w2_b=(4, IN // 8)),
    "LoKr in three others": parts(lokr_w1_a=(4, 2), lokr_w1_b=(2, 8), lokr_w2=(OUT // 4, IN // 8)),
    "another text encoder": pair((4, 64), (32, 4), "text_encoders.llm.model.layers.0.mlp.down_proj"),
    "norm of the text encoder": {"text_encoders.llm.model.norm.diff": ("F16", (64,))},
    "two parts": split((4, HEAD), (4, HEAD), names=("to_q", "to_k")),
    "too many rows in parts": split((4, HEAD), (4, HEAD), (4, 2 * HEAD)),
    "parts of two kinds": {
        **split((4, HEAD), (4, HEAD), names=("to_q", "to_k")),
        **parts(f"{ATTENTION}to_v", diff=(HEAD, HEAD)),
    },
    "name": {**pair((4, IN), (OUT, 4)), "cond_stage_model.model.transformer.resblocks.5": ("F16", (1,))},
}
ENDING_CONVOLUTION: Mapping[str, Lora] = {
    "other channels": pair((4, HEAD // 2, *KERNEL), (HEAD, 4, 1, 1), EMBEDDER),
    "two ranks": pair((4, HEAD, *KERNEL), (HEAD, 2, 1, 1), EMBEDDER),
    "a kernel behind": pair((4, HEAD, *KERNEL), (HEAD, 4, 3, 3), EMBEDDER),
    "rank one without a kernel": pair((1, HEAD), (HEAD, 1), EMBEDDER),
    "bias": parts(EMBEDDER, diff_b=(HEAD + 1,)),
}
USELESS: Mapping[str, Lora] = {  # what the library makes nothing of, or not what was meant
    **{dtype: pair((4, IN), (OUT, 4), dtype=dtype) for dtype in ("BOOL", "I8", "I16", "U8", "U16", "U32", "U64")},
    "one half": {f"{LAYER}.lora_down.weight": ("F16", (4, IN))},
    "six dimensions": pair((1, 1, 1, 1, 4, IN), (1, 1, 1, 1, OUT, 4)),
    "five dimensions": pair((1, 1, 1, 4, IN), (1, 1, 1, OUT, 4)),
    "alpha of many": pair((4, IN), (OUT, 4), alpha=("F32", (4, 4))),
    "diff on its side": parts(diff=(IN, OUT)),
    "diff of fewer rows": parts(diff=(OUT - 1, IN)),
    "pair for a norm": pair((4, 1), (32, 4), "text_encoders.llm.model.norm"),
    "the first part": split((4, HEAD), names=("to_q",)),
    "the last part": split((4, HEAD), names=("to_v",)),
    "first and last part": split((4, HEAD), (4, HEAD), names=("to_q", "to_v")),
    "middle": pair((4, IN), (OUT, 4), **{"lora_mid.weight": ("F16", (4, 4))}),
    "twice": {
        **pair((4, IN), (OUT, 4)),
        **pair((4, IN), (OUT, 4), "lora_unet_double_blocks_0_img_mlp_2"),
    },
    "LoKr of another layer": parts("diffusion_model.img_in", lokr_w1=(2, 2), lokr_w2=(HEAD // 2, HEAD // 2)),
    "decoder": {**pair((4, IN), (OUT, 4)), "lora_vae_decoder_conv_in.diff": ("F16", (4, 4))},
    "alpha alone": parts(alpha=()),
    "a table": pair((4, 32), (151_936, 4), "text_encoders.llm.model.embed_tokens"),
    "nothing": {},
    "another model": pair((4, 3072), (3072, 4), "lora_unet_input_blocks_1_1_proj_in"),
    "small decoder": pair((4, 64), (64, 4), "tae.decoder.layers.0"),
    "LyCORIS without a prefix": pair((4, IN), (OUT, 4), "lycoris_double_blocks_0_img_mlp_2"),
}


LOADED: Final = SIZES | {"F64": 4, "F8_E4M3": 2, "F8_E5M2": 2, "I64": 4}  # bytes of a number in memory


@pytest.mark.parametrize("lora", FITTING.values(), ids=FITTING)
def test_what_fits_is_counted(klein: Model, lora: Lora) -> None:
    assert klein.check(lora) == sum(math.prod(shape) * LOADED[dtype] for dtype, shape in lora.values())


@pytest.mark.parametrize("lora", FITTING_CONVOLUTION.values(), ids=FITTING_CONVOLUTION)
def test_what_fits_a_convolution_is_counted(ernie: Model, lora: Lora) -> None:
    assert ernie.check(lora) == sum(math.prod(shape) * LOADED[dtype] for dtype, shape in lora.values())


@pytest.mark.parametrize("lora", [*ENDING.values(), *USELESS.values()], ids=[*ENDING, *USELESS])
def test_what_does_not_fit_is_refused(klein: Model, lora: Lora) -> None:
    klein.refused(lora)


@pytest.mark.parametrize("lora", ENDING_CONVOLUTION.values(), ids=ENDING_CONVOLUTION)
def test_what_does_not_fit_a_convolution_is_refused(ernie: Model, lora: Lora) -> None:
    ernie.refused(lora)


def test_what_is_wrong_is_said(klein: Model) -> None:
    name, layer = f"{LAYER}.lora_down.weight", "model.diffusion_model.double_blocks.0.img_mlp.2.weight"
    wider = f"{layer} has the shape (128, 384), which its tensors do not fit: "
    assert klein.refused(pair((4, 2 * IN), (OUT, 4))).startswith(f"{wider}'{name}' (4, 768), ")
    assert klein.refused(pair((4, IN), (OUT, 4), dtype="I32")) == (
        f"its tensor '{name}' is of the type I32 and the shape (4, 384), which can't be used as lora_down"
    )
    assert klein.refused(pair((4, IN), (OUT, 4), dtype="BOOL")) == (
        f"its tensor '{name}' is of the type BOOL, which the library can't read"
    )
    assert klein.refused(parts(lokr_w1=(1, 1), lokr_w2_a=(1, 1), lokr_w2_b=(1, 1))) == (
        f"its tensor '{LAYER}.lokr_w1' is for {layer}, which is of the type F16 and the shape (128, 384), and can't be "
        "changed by lokr_w1 and lokr_w2_a and lokr_w2_b"
    )
    assert klein.refused({"x": ("F16", (1,))}) == (
        "no tensor of it belongs to one of the model; it may be for another kind of model"
    )
    assert "is for the decoder, which can't be changed" in klein.refused(USELESS["decoder"])
    assert "are for the same" in klein.refused(USELESS["twice"])


def test_a_file_that_can_not_be_read_is_an_error(klein: Model, tmp_path: Path) -> None:
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    for name in ("junk.safetensors", "none.safetensors"):
        with pytest.raises(GGUFError, match=name):
            check_lora(tmp_path / name, klein.header)


def test_there_is_room_for_so_many_tensors(klein: Model) -> None:
    idle = {f"diffusion_model.x.{number}.alpha": ("U8", ()) for number in range(32_766)}
    assert klein.check(pair((4, IN), (OUT, 4)) | idle)
    refused = klein.refused(pair((4, IN), (OUT, 4)) | idle | {"y": ("U8", ())})
    assert refused == "it has 32769 tensors, and 32768 are the most"


@pytest.mark.parametrize("dtype", ["Q8_0", "Q4_K", "IQ4_NL"])
def test_nothing_is_added_to_quantised_matrices(tmp_path: Path, dtype: str) -> None:
    model = imagined(
        families.KLEIN, {f"model.{LAYER}.weight": (OUT, IN), f"model.{LAYER}.bias": (OUT,)}, tmp_path, dtype
    )
    for kind in ("plain", "LoKr"):
        assert model.check(FITTING[kind])
    assert model.check(parts(diff_b=(OUT,)))
    for kind in ("diff", "LoHa"):
        assert f"is of the type {dtype} and the shape (128, 384), and can't be changed by" in model.refused(
            FITTING[kind]
        )


def test_of_a_convolution_in_a_u_net_the_kernel_may_be_in_the_middle(tmp_path: Path) -> None:
    names = (f"{MODEL}input_blocks.1.0.in_layers.2", f"{MODEL}input_blocks.3.0.op", f"{MODEL}input_blocks.1.1.proj_in")
    shapes = ((64, 32, 3, 3), (64, 32, 3, 3), (64, 32, 1, 1))
    model = imagined(
        families.SD1, {f"{each}.weight": shape for each, shape in zip(names, shapes, strict=True)}, tmp_path
    )
    for name, kernel in ((names[0], (3, 3)), (names[2], (1, 1))):
        assert model.check(pair((4, 32, *kernel), (64, 4, 1, 1), name))
        middle = pair((4, 32, 1, 1), (64, 6, 1, 1), name, **{"lora_mid.weight": ("F16", (6, 4, *kernel))})
        assert model.check(middle)
        for wrong in ((4, 6, *kernel), (6, 4, 5, 5), (6, 4)):
            model.refused(middle | {f"{name}.lora_mid.weight": ("F16", wrong)})
    model.refused(pair((4, 32, 1, 1), (64, 4, 1, 1), names[0]))
    model.refused(pair((4, 32, 3, 3), (64, 4, 3, 3), names[0]))
    leaving_out = pair((4, 32, 1, 1), (64, 6, 1, 1), names[1], **{"lora_mid.weight": ("F16", (6, 4, 3, 3))})
    assert "can't be changed by lora_down and lora_mid and lora_up" in model.refused(leaving_out)


# ---- conventions of names

TEXT = "text_model.encoder.layers.0."
CONVENTIONS = [
    (families.SD1, f"{MODEL}input_blocks.1.1.transformer_blocks.0.attn1.to_q", [
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_{}.weight",
        "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q.lora_{}.weight",
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.{}.weight",
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora.{}.weight",
    ]),
    (families.SD1, f"cond_stage_model.transformer.{TEXT}mlp.fc1", [
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_{}.weight",
    ]),
    (families.SDXL, f"{MODEL}middle_block.1.transformer_blocks.3.ff.net.2", [
        "lora_unet_middle_block_1_transformer_blocks_3_ff_net_2.lora_{}.weight",
        "lora_unet_mid_block_attentions_0_transformer_blocks_3_ff_net_2.lora_{}.weight",
    ]),
    (families.SDXL, f"conditioner.embedders.0.transformer.{TEXT}self_attn.out_proj", [
        "lora_te1_text_model_encoder_layers_0_self_attn_out_proj.lora_{}.weight",
    ]),
    (families.SD3, f"{MODEL}joint_blocks.0.x_block.mlp.fc1", [
        "transformer.transformer_blocks.0.ff.net.0.proj.lora_{}.weight",
        "diffusion_model.joint_blocks.0.x_block.mlp.fc1.lora_{}.weight",
    ]),
    (families.FLUX, f"{MODEL}single_blocks.7.linear2", [
        "lora_unet_single_blocks_7_linear2.lora_{}.weight",
        "transformer.single_transformer_blocks.7.proj_out.lora_{}.weight",
        "single_transformer_blocks.7.proj_out.lora_{}.weight",
    ]),
    (families.FLUX, f"text_encoders.clip_l.transformer.{TEXT}mlp.fc2", [
        "lora_te1_text_model_encoder_layers_0_mlp_fc2.lora_{}.weight",
    ]),
    (families.QWEN, f"{MODEL}transformer_blocks.0.img_mod.1", [
        "transformer_blocks.0.img_mod.1.lora_{}.default.weight",
        "diffusion_model.transformer_blocks.0.img_mod.1.lora_{}.weight",
    ]),
    (families.Z_IMAGE, f"{MODEL}layers.3.attention.out", [
        "transformer.layers.3.attention.to_out.0.lora_{}.weight",
        "diffusion_model.layers.3.attention.to_out.0.lora_{}.weight",
    ]),
    (families.ANIMA, f"{MODEL}net.blocks.0.mlp.layer1", ["diffusion_model.blocks.0.mlp.layer1.lora_{}.weight"]),
    (families.ERNIE, f"{MODEL}layers.0.mlp.up_proj", ["diffusion_model.layers.0.mlp.up_proj.lora_{}.weight"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "layer", "name"),
    [(family, layer, name) for family, layer, names in CONVENTIONS for name in names],
)
def test_the_layer_is_found_by_the_name_in_the_lora(tmp_path: Path, family: Family, layer: str, name: str) -> None:
    model = imagined(family, {f"{layer}.weight": (OUT, IN), CLIP: (4, 768)}, tmp_path)
    letters = ("A", "B") if "lora_{}.default" in name else ("down", "up")
    down, up = (name.format(each) for each in letters)
    assert model.check({down: ("F16", (4, IN)), up: ("F16", (OUT, 4))}) == 2 * 4 * (IN + OUT)
    assert "has the shape (128, 384), which" in model.refused({down: ("F16", (4, IN)), up: ("F16", (OUT, 3))})


def test_layers_of_the_second_encoder_of_an_sdxl_may_be_one(tmp_path: Path) -> None:
    names = [f"lora_te2_text_model_encoder_layers_0_self_attn_{each}_proj" for each in "qkv"]
    lora = {name: described for each in names for name, described in pair((4, HEAD), (HEAD, 4), each).items()}
    layer = "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"
    fused = imagined(families.SDXL, {layer: (3 * HEAD, HEAD)}, tmp_path)
    assert fused.check(lora) == 3 * 2 * 4 * 2 * HEAD
    assert "what is for others is missing" in fused.refused(pair((4, HEAD), (HEAD, 4), names[1]))
    alone = [f"cond_stage_model.1.transformer.{TEXT}self_attn.{each}_proj.weight" for each in "qkv"]
    assert imagined(families.SDXL, dict.fromkeys(alone, (HEAD, HEAD)), tmp_path).check(lora) == fused.check(lora)


# ---- any shapes

SIDE = st.sampled_from((0, 1, 2, 4, 8, OUT, IN))
SHAPE = st.lists(SIDE, max_size=5).map(tuple).filter(lambda shape: math.prod(shape) <= OUT * IN)


@given(SHAPE, SHAPE, st.sampled_from(["F16", "I64", "U8", "BF16"]))
@example((4, IN), (OUT, 4), "F16")
@settings(max_examples=150, deadline=None)
def test_a_pair_fits_if_its_product_has_the_shape_of_the_layer(klein: Model, down: Any, up: Any, dtype: str) -> None:
    fits = len(down) == len(up) == 2 and down[0] == up[1] > 0 and (up[0], down[1]) == (OUT, IN)
    if fits and dtype in ("F16", "BF16"):
        assert klein.check(pair(down, up, dtype=dtype)) == 2 * (math.prod(down) + math.prod(up))
    else:
        klein.refused(pair(down, up, dtype=dtype))


NAMES = st.sampled_from(
    [LAYER, f"{ATTENTION}to_q", f"{ATTENTION}to_k", "diffusion_model.img_in", "text_encoders.llm", ""]
)
ENDS = st.sampled_from(
    [
        "lora_down.weight",
        "lora_up.weight",
        "lora_mid.weight",
        "alpha",
        "diff",
        "hada_w1_a",
        "lokr_w1",
        "lokr_w2",
        ".",
        "",
    ]
)


@given(st.dictionaries(st.tuples(NAMES, ENDS).map(".".join), st.tuples(st.sampled_from([*SIZES]), SHAPE), max_size=6))
@settings(max_examples=100, deadline=None)
def test_odd_files_are_no_error_but_one_of_ours(klein: Model, lora: Lora) -> None:
    with contextlib.suppress(GGUFError):
        assert klein.check(lora) > 0


# ---- the library


def drawn(header: DiffusionHeader, loras: Mapping[str, Lora], folder: Path) -> dict[str, str]:
    """Return sums of the pictures that stable-diffusion.cpp makes with each of these LoRAs, and without one, in
    processes of their own; or how these have ended.
    """
    params = DiffusionParams(
        path=str(header.path),
        whole=header.whole,
        parts={part: str(path) for part, path in header.parts.items()},
        encodes=False,
        small_decoder=False,
        flash_attention=True,
        threads=1,
    )
    paths = [write(folder / f"{number}.safetensors", lora) for number, lora in enumerate(loras.values())]
    lines = [msgspec.json.encode(params), b"", *(os.fsencode(path) for path in paths)]
    done = subprocess.run(
        [sys.executable, str(CHILD)],
        input=b"\n".join(lines) + b"\n",
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"GGML_NO_BACKTRACE": "1"},
        check=True,
    )
    answers = dict(line.split(maxsplit=1) for line in done.stdout.decode().splitlines())
    return {name: answers[str(number)] for number, name in enumerate(("", *loras))}


@needs_library
@pytest.mark.parametrize("which", ["klein", "ernie"])
def test_the_library_changes_its_pictures_with_what_fits(
    which: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    fitting = {"klein": FITTING, "ernie": FITTING_CONVOLUTION}[which]
    pictures = drawn(request.getfixturevalue(which).header, fitting, tmp_path)
    plain = pictures.pop("")
    assert len(plain) == 64
    assert {name for name, picture in pictures.items() if len(picture) != 64 or picture == plain} == set()


@needs_library
@pytest.mark.parametrize("which", ["klein", "ernie"])
def test_the_library_ends_at_what_does_not_fit(which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    ending = {"klein": ENDING, "ernie": ENDING_CONVOLUTION}[which]
    answers = drawn(request.getfixturevalue(which).header, ending, tmp_path)
    assert {name for name, answer in answers.items() if not answer.startswith("ended with status")} == {""}
