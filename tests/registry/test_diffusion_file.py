"""Files of diffusion models: what they say of themselves, what is missing, and that damage is an error of ours."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
from diffusion_tensors import (
    BYTES,
    CHECKPOINT,
    CLIP,
    DECODER,
    EDITORS,
    ENCODER,
    HEADS,
    MODEL,
    PARTS,
    STEERED,
    TRANSFORMERS,
    UNETS,
    VIDEOS,
    Known,
    Shapes,
    blocks,
    named,
    prefixed,
    unet,
    write_parts,
    write_zeros,
)
from gguf_writer import F16, F32, Q4_0, Q8_0, File, Tensor, tiny_llama
from hypothesis import HealthCheck, given, settings, strategies as st
from tiny_bert import write_safetensors
from tiny_diffusion import decoder_shapes, diffusion_shapes, text_shapes, write_model

from llamaserve.errors import GGUFError, ModelFileMissing, ModelNotCapable
from llamaserve.images.values import DiffusionParams, Part
from llamaserve.registry.diffusion_checks import misfits
from llamaserve.registry.diffusion_family import (
    ANIMA,
    CHROMA,
    ERNIE,
    FLUX,
    FLUX2,
    KLEIN,
    OVIS,
    QWEN,
    RADIANCE,
    SCHNELL,
    SD1,
    SD3,
    Z_IMAGE,
    Family,
)
from llamaserve.registry.diffusion_file import DiffusionHeader, read_diffusion
from llamaserve.registry.gguf import _TENSOR_TYPES, LONG_TENSOR_NAME

KNOWN = TRANSFORMERS | UNETS | EDITORS
BLOCKS = {name: shape for name, shape in unet(768).items() if name != CLIP}  # of a U-Net without its encoder
TABLE = CLIP.removeprefix("cond_stage_model.transformer.")
LIN = "double_stream_modulation_img.lin.weight"  # of a FLUX.2 klein
HEAD = "double_blocks.0.txt_attn.norm.key_norm.scale"
NOT_TAKEN = {9, 15, 24, 25, 26, 27, 28, 41, 42}  # types of GGUF files with which the library can't compute
CHILD = Path(__file__).with_name("running_diffusion.py")

needs_library = pytest.mark.skipif(
    importlib.util.find_spec("stable_diffusion_cpp") is None or sys.platform == "darwin",
    reason="stable-diffusion-cpp-python is not installed, or uses Metal, which a forked process may not",
)


def whole(path: Path, shapes: Shapes = CHECKPOINT, dtype: str = "F16") -> DiffusionHeader:
    return read_diffusion(write_zeros(path / "model.safetensors", shapes, dtype))


def gguf(path: Path, *tensors: Tensor, **changes: Any) -> Path:
    path.write_bytes(File({}, tensors, **changes).bytes())
    return path


def whole_gguf(path: Path, block: str = MODEL + LIN, kind: int = F16, **changes: Any) -> Path:
    rest = [Tensor(name, (8,)) for name in ("text_encoders.llm.x", "vae.decoder.x")]
    return gguf(path, Tensor(block, (256, 4), kind, **changes), Tensor(MODEL + HEAD, (128,)), *rest)


def refused(path: Path, parts: Mapping[Part, Path] | None = None) -> str:
    with pytest.raises(GGUFError) as caught:
        read_diffusion(path, parts)
    return caught.value.message


# ---- sound files


def test_a_model_in_two_files_is_described(tmp_path: Path) -> None:
    model, decoder = write_model(tmp_path)
    header = read_diffusion(model, {"taesd": decoder})
    shapes = [*(diffusion_shapes() | text_shapes() | decoder_shapes()).values()]
    count, plain = (sum(math.prod(shape) for shape in some) for some in (shapes, [s for s in shapes if len(s) == 1]))
    assert (header.family, header.whole, header.path, header.parts) == (KLEIN, True, model, {"taesd": decoder})
    assert (header.parameter_count, header.weight_bytes, header.quantisation) == (count, 2 * count + 2 * plain, "F16")
    assert (header.paths, header.file_size) == (
        (model, decoder),
        model.stat().st_size + decoder.stat().st_size,
    )
    assert (header.encodes, header.decodes_small) == (True, True)
    assert header.tensors.keys() == {*diffusion_shapes(), *text_shapes(), *prefixed(decoder_shapes(), "tae.")}
    write_model(tmp_path, encoder=False)
    assert not read_diffusion(model, {"taesd": decoder}).encodes


@pytest.mark.parametrize("known", TRANSFORMERS.values(), ids=TRANSFORMERS)
def test_a_transformer_is_known_with_its_prefix_and_without(tmp_path: Path, known: Known) -> None:
    parts = write_parts(tmp_path, known.family)
    for shapes, is_whole in ((known.shapes, False), (prefixed(known.shapes), True)):
        header = read_diffusion(write_zeros(tmp_path / "model.safetensors", shapes), parts)
        assert (header.family, header.whole) == (known.family, is_whole)
        assert header.tensors.keys() > {MODEL + name for name in known.shapes}
        assert (header.decodes_small, header.encodes) == (False, known.family.decodes)


@pytest.mark.parametrize("known", UNETS.values(), ids=UNETS)
def test_a_u_net_is_known_in_a_whole_file(tmp_path: Path, known: Known) -> None:
    header = whole(tmp_path, known.shapes | prefixed(DECODER, "first_stage_model."))
    assert (header.family, header.whole, header.parts, header.encodes) == (known.family, True, {}, False)


def test_parts_get_the_names_that_they_have_in_a_whole_file(tmp_path: Path) -> None:
    shapes = TRANSFORMERS["FLUX.1"].shapes
    parts: dict[Part, Path] = {
        "vae": write_zeros(tmp_path / "vae.safetensors", prefixed(DECODER, "vae.")),
        "taesd": write_zeros(tmp_path / "taesd.safetensors", DECODER),
        "llm_vision": write_zeros(tmp_path / "eyes.safetensors", {"patch.weight": (2, 2)}),
        **write_parts(tmp_path, FLUX, left_out="vae"),
    }
    header = read_diffusion(write_zeros(tmp_path / "model.safetensors", shapes), parts)
    assert header.tensors.keys() - {MODEL + name for name in shapes} == {
        "vae.decoder.conv_in.weight",
        "tae.decoder.conv_in.weight",
        "text_encoders.clip_l.transformer.text_model.embeddings.token_embedding.weight",
        "text_encoders.t5xxl.transformer.shared.weight",
        "text_encoders.llm.visual.patch.weight",
    }


@pytest.mark.parametrize(
    ("beginning", "other"),
    [
        ("diffusion_model.", MODEL),
        ("text_encoder.", "cond_stage_model.transformer."),
        ("text_encoder.2.", "cond_stage_model.1.transformer."),
        ("te.", "cond_stage_model.transformer."),
        ("te1.", "cond_stage_model.transformer."),
        ("te2.", "cond_stage_model.1.transformer."),
        ("te3.", "text_encoders.t5xxl.transformer."),
    ],
)
def test_names_that_begin_otherwise_get_those_of_the_library(tmp_path: Path, beginning: str, other: str) -> None:
    more = {beginning + "x": (2, 3), f"{MODEL}{beginning}y": (1,)}
    header = whole(tmp_path, CHECKPOINT | more)
    assert header.tensors.keys() == {*CHECKPOINT, other + "x", f"{MODEL}{beginning}y"}
    assert header.tensors[other + "x"].shape == (2, 3)
    vae = write_zeros(tmp_path / "vae", DECODER | more)
    assert f"vae.{beginning}x" in read_diffusion(header.path, {"vae": vae}).tensors


@pytest.mark.parametrize("beginning", ["te.", "te1.", "text_encoder."])
def test_a_u_net_is_known_by_an_encoder_of_another_name(tmp_path: Path, beginning: str) -> None:
    decoder = prefixed(DECODER, "vae.")
    assert whole(tmp_path, BLOCKS | {beginning + TABLE: (4, 768)} | decoder).family == SD1
    bare = {name.removeprefix("model."): shape for name, shape in BLOCKS.items()}
    header = whole(tmp_path, bare | {beginning + TABLE: (4, 768)} | decoder)
    assert (header.family, header.whole) == (SD1, True)


def test_encoders_of_a_u_net_take_the_place_of_those_in_its_file(tmp_path: Path) -> None:
    path = write_zeros(tmp_path / "model.safetensors", unet(768) | prefixed(DECODER, "vae."))
    clip_l = write_zeros(tmp_path / "l.safetensors", {"text_model.embeddings.token_embedding.weight": (9, 768)})
    clip_g = write_zeros(tmp_path / "g.safetensors", PARTS["clip_g"])
    header = read_diffusion(path, {"clip_l": clip_l})
    assert (header.family.name, header.tensors[CLIP].shape) == ("Stable Diffusion 1", (9, 768))
    header = read_diffusion(path, {"clip_l": clip_l, "clip_g": clip_g})
    assert header.family.name == "Stable Diffusion XL"
    assert "cond_stage_model.1.transformer.text_model.embeddings.token_embedding.weight" in header.tensors


def test_a_gguf_file_is_described_as_a_safetensors_file_is(tmp_path: Path) -> None:
    llm = gguf(tmp_path / "llm.gguf", Tensor("blk.0.attn_q.weight", (32, 5), Q8_0))
    vae = write_zeros(tmp_path / "vae.safetensors", DECODER | ENCODER, "F32")
    model = gguf(tmp_path / "model.gguf", Tensor(LIN, (64, 3), Q4_0), Tensor(HEAD, (128,), F32))
    header = read_diffusion(model, {"llm": llm, "vae": vae})
    assert (header.family, header.whole, header.quantisation, header.encodes) == (KLEIN, False, "Q4_0", True)
    assert header.tensors[MODEL + LIN] == ((3, 64), "Q4_0", 6 * 18)
    assert header.parameter_count == 3 * 64 + 128 + 32 * 5 + 8 + 8
    assert header.weight_bytes == 6 * 18 + 128 * 4 + 5 * 34 + 16 * 4
    write_zeros(vae, {"decoder.conv_in.weight": (4, 2, 3, 3)}, "F32")
    assert read_diffusion(model, {"llm": llm, "vae": vae}).weight_bytes == 6 * 18 + 128 * 4 + 5 * 34 + 72 * 2
    assert header.file_size == sum(path.stat().st_size for path in (model, llm, vae))


@pytest.mark.parametrize(
    ("dtype", "size", "table"),
    [("F32", 4, 4), ("F16", 2, 2), ("BF16", 2, 4), ("F8_E4M3", 2, 4), ("F8_E5M2", 2, 4), ("F64", 4, 4)],
)
def test_weights_are_counted_as_they_are_in_memory(tmp_path: Path, dtype: str, size: int, table: int) -> None:
    shapes = {f"{MODEL}{LIN}": (6, 4), "text_encoders.llm.shared.weight": (4, 8), "vae.decoder.x": (4, 2)}
    header = whole(tmp_path, shapes | prefixed(HEADS), dtype)
    assert (header.quantisation, header.parameter_count) == (dtype, 6 * 4 + 4 * 8 + 4 * 2 + 128)
    assert header.weight_bytes == size * (6 * 4 + 4 * 2) + table * 4 * 8 + 128 * 4
    more = {f"{MODEL}img_in.bias": (5,), "vae.decoder.conv_in.weight": (2, 2, 3, 3), f"{MODEL}x": ()}
    more |= prefixed(HEADS)
    assert whole(tmp_path, shapes | more, dtype).weight_bytes == header.weight_bytes + 5 * 4 + 36 * 2 + 4


def test_weights_that_are_not_loaded_take_no_memory(tmp_path: Path) -> None:
    weights = whole(tmp_path).weight_bytes
    idle = (
        "text_encoders.llm.lm_head.weight",
        "text_encoders.llm.output.weight",
        "model_ema.x",
        "first_stage_model.bn.x",
    )
    more = whole(tmp_path, CHECKPOINT | dict.fromkeys(idle, (3, 3)))
    assert (more.weight_bytes, more.parameter_count) == (weights, whole(tmp_path).parameter_count + 4 * 9)
    small = write_zeros(tmp_path / "taesd", {"decoder.x": (2, 2)})
    decoder = 2 * sum(math.prod(shape) for shape in DECODER.values())
    assert read_diffusion(tmp_path / "model.safetensors", {"taesd": small}).weight_bytes == weights - decoder + 8
    vae = write_zeros(tmp_path / "vae", DECODER)
    both = read_diffusion(tmp_path / "model.safetensors", {"taesd": small, "vae": vae})
    assert both.weight_bytes == weights + decoder + 8


def test_what_most_weights_of_the_diffusion_model_have_is_the_quantisation(tmp_path: Path) -> None:
    zeros = {
        f"{MODEL}{LIN}": ("F8_E4M3", (15, 15), bytes(225)),
        f"{MODEL}{HEAD}": ("F32", (128,), bytes(512)),
        "text_encoders.llm.x": ("BF16", (1000,), bytes(2000)),
        "vae.decoder.x": ("F16", (500,), bytes(1000)),
    }
    path = tmp_path / "model.safetensors"
    path.write_bytes(write_safetensors(zeros, __metadata__={"format": "pt"}))
    header = read_diffusion(path)
    assert (header.quantisation, header.parameter_count) == ("F8_E4M3", 225 + 128 + 1500)
    assert header.weight_bytes == 2 * 225 + 4 * (128 + 1500)


@pytest.mark.parametrize(
    ("parts", "encodes", "small"),
    [
        ({"vae": DECODER | ENCODER}, True, False),
        ({"vae": DECODER}, False, False),
        ({"taesd": DECODER | ENCODER}, True, True),
        ({"taesd": DECODER}, False, True),
        ({"vae": DECODER | ENCODER, "taesd": DECODER}, True, False),
        ({"vae": DECODER, "taesd": DECODER | ENCODER}, False, False),
    ],
)
def test_pictures_are_encoded_by_what_also_decodes_them(
    tmp_path: Path, parts: dict[Part, Shapes], encodes: bool, small: bool
) -> None:
    paths = {part: write_zeros(tmp_path / part, shapes) for part, shapes in parts.items()}
    shapes = {f"{MODEL}{LIN}": (4, 4)} | prefixed(HEADS)
    model = write_zeros(tmp_path / "model", shapes | prefixed(PARTS["llm"], "text_encoders.llm."))
    header = read_diffusion(model, paths)
    assert (header.encodes, header.decodes_small) == (encodes, small)


# ---- what is missing, and what is none


@pytest.mark.parametrize("known", TRANSFORMERS.values(), ids=TRANSFORMERS)
def test_what_is_missing_is_said(tmp_path: Path, known: Known) -> None:
    family, path = known.family, write_zeros(tmp_path / "model.safetensors", known.shapes)

    def lacking(parts: Mapping[Part, Path]) -> str:
        with pytest.raises(ModelNotCapable) as caught:
            read_diffusion(path, parts)
        return caught.value.message.removeprefix(f"{path} is a {family.name} model, and its ")

    for group in family.encoders:
        parts = {part: file for part, file in write_parts(tmp_path, family).items() if part not in group}
        assert lacking(parts) == f"text encoder is missing: name it under `parts`, as {' or '.join(group)}"
    if family.decodes:
        parts = write_parts(tmp_path, family, left_out="vae")
        assert lacking(parts) == "decoder is missing: name it under `parts`, as vae or taesd"
    assert lacking({}) == lacking({"llm_vision": write_zeros(tmp_path / "eyes", DECODER)})


@pytest.mark.parametrize("known", UNETS.values(), ids=UNETS)
def test_a_u_net_with_its_encoder_lacks_only_a_decoder(tmp_path: Path, known: Known) -> None:
    with pytest.raises(ModelNotCapable, match=rf"a {known.family.name} model, and its decoder is missing"):
        whole(tmp_path, known.shapes)
    assert whole(tmp_path, known.shapes | prefixed(DECODER, "vae.")).family == known.family


def test_stable_diffusion_3_needs_both_of_its_small_encoders(tmp_path: Path) -> None:
    parts, shapes = write_parts(tmp_path, SD3), TRANSFORMERS["SD3"].shapes
    path = write_zeros(tmp_path / "model.safetensors", shapes)
    assert parts.keys() == {"clip_l", "clip_g", "vae"}
    assert read_diffusion(path, parts).family == SD3
    inside = prefixed(shapes) | prefixed(PARTS["clip_g"], "text_encoders.clip_g.transformer.")
    for left_out in ("clip_l", "clip_g"):
        fewer = {part: file for part, file in parts.items() if part != left_out}
        with pytest.raises(ModelNotCapable, match=rf"its text encoder is missing: .* as {left_out}$"):
            read_diffusion(path, fewer)
    whole = write_zeros(tmp_path / "whole.safetensors", inside)
    assert read_diffusion(whole, {part: parts[part] for part in ("clip_l", "vae")}).family == SD3
    for encoders in (inside, prefixed(shapes) | {"te.x": (1,), "te2.x": (1,)}):  # which the library looks for elsewhere
        write_zeros(whole, encoders)
        with pytest.raises(ModelNotCapable, match=r"its text encoder is missing: .* as clip_l$"):
            read_diffusion(whole, {"vae": parts["vae"]})


def test_stable_diffusion_3_is_refused_with_its_large_encoder(tmp_path: Path) -> None:
    parts, shapes = write_parts(tmp_path, SD3), TRANSFORMERS["SD3"].shapes
    path = write_zeros(tmp_path / "model.safetensors", shapes)
    said = (
        "is a Stable Diffusion 3 model with the text encoder t5xxl, with which stable-diffusion.cpp ends at the first"
    )
    with pytest.raises(ModelNotCapable, match=said) as caught:
        read_diffusion(path, parts | {"t5xxl": write_zeros(tmp_path / "t5", PARTS["t5xxl"])})
    assert caught.value.hint == "leave `t5xxl` out of its `parts`: clip_l and clip_g are enough"
    for prefix in ("text_encoders.t5xxl.transformer.", "te3."):
        write_zeros(path, prefixed(shapes) | prefixed(PARTS["t5xxl"], prefix))
        with pytest.raises(ModelNotCapable, match=said) as caught:
            read_diffusion(path, parts)
        assert caught.value.hint == "fetch its file without T5: clip_l and clip_g are enough"


def test_an_encoder_of_the_parts_stands_for_no_other(tmp_path: Path) -> None:
    parts = write_parts(tmp_path, FLUX, left_out="t5xxl")
    for shapes in (TRANSFORMERS["FLUX.1"].shapes, prefixed(TRANSFORMERS["FLUX.1"].shapes)):
        path = write_zeros(tmp_path / "model.safetensors", shapes)
        with pytest.raises(ModelNotCapable, match=r"is a FLUX\.1 model, and its text encoder is missing: .* as t5xxl$"):
            read_diffusion(path, parts)
    write_zeros(path, prefixed(TRANSFORMERS["FLUX.1"].shapes) | {"text_encoders.t5xxl.transformer.x": (1,)})
    assert read_diffusion(path, parts).family == FLUX


@pytest.mark.parametrize("known", TRANSFORMERS.values(), ids=TRANSFORMERS)
def test_an_encoder_that_the_library_does_not_look_for_is_none(tmp_path: Path, known: Known) -> None:
    parts = {"vae": write_zeros(tmp_path / "vae", DECODER)}
    shapes = {**prefixed(known.shapes), "text_encoders.x": (1,), "te.x": (1,), "text_encoders.llm.visual.x": (1,)}
    path = write_zeros(tmp_path / "model", shapes)
    with pytest.raises(ModelNotCapable, match="its text encoder is missing: name it under `parts`"):
        read_diffusion(path, parts)
    for part in (part for group in known.family.encoders for part in group):
        prefix = "text_encoders.llm." if part == "llm" else f"text_encoders.{part}.transformer."
        shapes |= prefixed(PARTS[part], prefix)
    write_zeros(path, shapes)
    assert read_diffusion(path, parts).family == known.family


def test_a_small_decoder_counts_only_as_a_part(tmp_path: Path) -> None:
    shapes = {name: shape for name, shape in CHECKPOINT.items() if "first_stage" not in name}
    with pytest.raises(ModelNotCapable, match="its decoder is missing: name it under `parts`, as vae or taesd"):
        whole(tmp_path, shapes | prefixed(DECODER, "tae."))
    small = write_zeros(tmp_path / "taesd", prefixed(DECODER, "tae."))
    assert read_diffusion(tmp_path / "model.safetensors", {"taesd": small}).decodes_small


@pytest.mark.parametrize("shapes", STEERED.values(), ids=STEERED)
def test_a_model_that_other_pictures_steer_is_refused(tmp_path: Path, shapes: Shapes) -> None:
    parts = write_parts(tmp_path, FLUX)
    for tensors in (shapes, prefixed(shapes)):
        path = write_zeros(tmp_path / "model.safetensors", tensors)
        with pytest.raises(ModelNotCapable, match=r"is a FLUX\.1 Control model, which needs pictures to steer it"):
            read_diffusion(path, parts)


def test_a_u_net_without_its_encoder_says_so(tmp_path: Path) -> None:
    parts = {part: write_zeros(tmp_path / part, PARTS[part]) for part in ("clip_l", "clip_g", "vae")}
    said = "holds a U-Net without its text encoder, and stable-diffusion.cpp takes these in one file only"
    for shapes in (BLOCKS, {name.removeprefix("model."): shape for name, shape in BLOCKS.items()}):
        path = write_zeros(tmp_path / "model.safetensors", shapes)
        assert refused(path) == refused(path, parts) == f"{path} {said}"


def test_an_encoder_in_a_file_with_the_diffusion_model_only_is_not_looked_for(tmp_path: Path) -> None:
    names = {
        "double_blocks.0.x": (1,),
        "te.x": (1,),
    } | HEADS  # so it is no text encoder, but model.diffusion_model.te.x
    path = write_zeros(tmp_path / "model.safetensors", names)
    with pytest.raises(ModelNotCapable, match=r"is a FLUX\.1 schnell model, and its text encoder is missing"):
        read_diffusion(path, {"vae": write_zeros(tmp_path / "vae", DECODER)})
    assert read_diffusion(path, write_parts(tmp_path, SCHNELL)).family == SCHNELL


@pytest.mark.parametrize("shapes", VIDEOS.values(), ids=VIDEOS)
def test_models_of_moving_pictures_are_refused(tmp_path: Path, shapes: Shapes) -> None:
    parts = {part: write_zeros(tmp_path / part, PARTS[part]) for part in ("vae", "t5xxl")}
    for tensors in (shapes, prefixed(shapes)):
        path = write_zeros(tmp_path / "model.safetensors", tensors)
        with pytest.raises(ModelNotCapable, match="makes videos; only pictures are made here"):
            read_diffusion(path, parts)


@pytest.mark.parametrize(
    "shapes",
    [
        decoder_shapes(),
        {"text_model.embeddings.token_embedding.weight": (4, 768)},
        {"lora_unet_input_blocks_1_1_proj_in.lora_down.weight": (4, 8)},
        {"unet.down_blocks.0.attentions.0.proj_in.lora.down.weight": (4, 8)},
        {"model.embed_tokens.weight": (8, 8), "lm_head.weight": (8, 8)},
        {"x": ()},
    ],
    ids=["decoder", "CLIP", "LoRA", "LoRA of diffusers", "language model", "scalar"],
)
def test_what_is_no_diffusion_model_is_refused_whatever_its_parts(tmp_path: Path, shapes: Shapes) -> None:
    path = write_zeros(tmp_path / "model.safetensors", shapes)
    for parts in ({}, write_parts(tmp_path, FLUX)):
        assert refused(path, parts) == f"{path} holds no diffusion model that stable-diffusion.cpp knows"


# ---- other files, and damaged ones


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "has 0 bytes"),
        (b"GG", "has 2 bytes"),
        (b"junk" * 100, "its header should have"),
        (b"PK\x03\x04" + bytes(100), "its header should have"),
        (struct.pack("<Q", 2) + b"{}", "holds no weights"),
        (struct.pack("<Q", 1 << 62) + bytes(100), "its header should have"),
        (struct.pack("<Q", 3) + b"[[[", "its header cannot be read"),
        (struct.pack("<Q", 100_000) + b"[" * 100_000, "its header cannot be read"),
        (b"GGUF", "is truncated"),
        (b"GGUF" + bytes(100), "version 0"),
        (File({}).bytes(), "holds no weights"),
        (File({}, [Tensor("a", (4,))] * 2).bytes(), "stands in it twice"),
        (File({}, [Tensor("a", (4,), 99, bytes(16))]).bytes(), "99"),
        (File({}, [Tensor("a", (4,))], tensor_count=1 << 62).bytes(), "tensor"),
        (File({}, metadata_count=1 << 62).bytes(), "metadata"),
        (File({}, [Tensor("a", (128,), 41, bytes(18))]).bytes(), "of the type Q1_0, which stable-diffusion.cpp lacks"),
        (File({}, [Tensor("a", (64,), 42, bytes(18))]).bytes(), "of the type Q2_0, which stable-diffusion.cpp lacks"),
        (File({}, [Tensor("a", (4,), 28, bytes(32))]).bytes(), "of the type F64, which stable-diffusion.cpp lacks"),
        (tiny_llama(), "holds no diffusion model"),
    ],
)
def test_another_file_or_a_broken_one_is_refused_also_as_a_part(tmp_path: Path, data: bytes, said: str) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(data)
    assert said in (message := refused(path))
    assert str(path) in message
    if data != tiny_llama():
        assert said in refused(write_zeros(tmp_path / "good", CHECKPOINT), {"llm": path})


def test_a_name_that_stands_twice_is_refused(tmp_path: Path) -> None:
    entry = '"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}'
    path = tmp_path / "model.safetensors"
    path.write_bytes(write_safetensors({"": ("U8", (1,), b"1")}, f"{{{entry}, {entry}}}"))
    assert "its header has a name twice" in refused(path)


def test_what_is_no_file_is_refused_and_never_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    good = write_zeros(tmp_path / "good", CHECKPOINT)
    messages: list[str] = []

    def read() -> None:
        for path in (tmp_path, tmp_path / "pipe", tmp_path / "link", Path("/dev/zero")):
            messages.extend((refused(path), refused(good, {"vae": path})))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    assert len(messages) == 8
    assert all(message.endswith(" is no regular file") for message in messages)
    for name in ("a\0b", "a" * 300, "loop"):
        assert "cannot be read" in refused(tmp_path / name)
        assert "cannot be read" in refused(good, {"vae": tmp_path / name})
    for name in ("none", "good/inside"):
        for arguments in ((tmp_path / name,), (good, {"vae": tmp_path / name})):
            with pytest.raises(ModelFileMissing, match="does not exist"):
                read_diffusion(*arguments)


def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_zeros(tmp_path / "model.safetensors", CHECKPOINT)

    def deny(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", deny)
    assert refused(path) == f"{path} cannot be read: [Errno 13] Permission denied"


@pytest.mark.parametrize("number", [1, 2])
def test_a_gguf_file_in_parts_is_refused_and_one_alone_is_not(tmp_path: Path, number: int) -> None:
    path = whole_gguf(tmp_path / f"model-0000{number}-of-00002.gguf")
    assert refused(path) == f"{path} is one of 2 files, which stable-diffusion.cpp can't put together"
    assert "one of 2 files" in refused(whole_gguf(tmp_path / "good.gguf"), {"llm": path})
    assert read_diffusion(whole_gguf(tmp_path / "model-00001-of-00001.gguf")).family == KLEIN


@pytest.mark.parametrize("length", [63, 64, LONG_TENSOR_NAME])
def test_a_gguf_file_needs_no_architecture_and_may_have_long_names(tmp_path: Path, length: int) -> None:
    name = f"{MODEL}{LIN}".ljust(length, "x")
    header = read_diffusion(whole_gguf(tmp_path / "model.gguf", name))
    assert (header.family, len(name)) == (KLEIN, length)
    too_long = name.ljust(LONG_TENSOR_NAME + 1, "x")
    assert "128 bytes" in refused(whole_gguf(tmp_path / "model.gguf", too_long))


def test_a_file_that_is_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path, good = tmp_path / "model", write_zeros(tmp_path / "good", CHECKPOINT)
    for data in (good.read_bytes(), whole_gguf(path).read_bytes()):
        for end in [*range(0, len(data), 41), len(data) - 1]:
            path.write_bytes(data[:end])
            assert refused(path)
            assert refused(good, {"vae": path})


SMALL = {
    "safetensors": write_safetensors(
        {
            f"{MODEL}transformer_blocks.0.img_mod.1.weight": ("F16", (2, 2), bytes(8)),
            "text_encoders.llm.x": ("F8_E4M3", (3,), b"123"),
            "vae.x": ("F32", (), bytes(4)),
        }
    ),
    "GGUF": File(
        {"general.alignment": 32},
        [
            Tensor(f"{MODEL}transformer_blocks.0.img_mod.1.weight", (32, 2), Q4_0),
            Tensor("text_encoders.llm.x", (3,)),
            Tensor("vae.x", (1,), F16),
        ],
    ).bytes(),
}


@pytest.mark.parametrize("data", SMALL.values(), ids=SMALL)
@given(damage=st.data())
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damage_is_an_error_of_ours(tmp_path: Path, data: bytes, damage: st.DataObject) -> None:
    changed = bytearray(data)
    for _ in range(damage.draw(st.integers(0, 4))):
        changed[damage.draw(st.integers(0, len(data) - 1))] = damage.draw(st.integers(0, 255))
    path, good = tmp_path / "model", tmp_path / "good"
    path.write_bytes(changed[: damage.draw(st.just(len(data)) | st.integers(0, len(data)))])
    good.write_bytes(SMALL["safetensors"])
    for arguments in ((path,), (path, {"vae": good}), (good, {"llm_vision": path})):
        with contextlib.suppress(GGUFError, ModelNotCapable):
            header = read_diffusion(*arguments)
            assert header.weight_bytes >= 0 <= header.parameter_count
            assert header.quantisation
            assert header.encodes in (True, False)


# ---- what stable-diffusion.cpp would believe

TINY: Shapes = {**diffusion_shapes(text_width=1), **text_shapes(1, 1), **prefixed(DECODER, "vae.")}
LAYER = "text_encoders.llm.model.layers."
TOKENS = "text_encoders.llm.model.embed_tokens.weight"
GATE = f"{LAYER}0.mlp.gate_proj.weight"
QWEN_TOKENS, MISTRAL_TOKENS = 151_669, 131_072


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {f"{LAYER}99999999999.mlp.up_proj.weight": (4, 4)},
            "99999999999.mlp.up_proj.weight', and 64 layers are the m",
        ),
        ({f"{MODEL}double_blocks.9999.img_mlp.0.weight": (4, 4)}, "and 32 double_blocks are the most"),
        ({f"{MODEL}single_blocks. +0064.x": (4, 4)}, "and 64 single_blocks are the most"),
        ({"transformer.double_blocks.32.x": (4, 4)}, "and 32 double_blocks are the most"),
        ({"text_encoders.llm.blk.64.x": (4, 4)}, "and 64 blk are the most"),
        ({f"{LAYER}{'9' * 5000}.x": (4, 4)}, "and 64 layers are the most"),
        ({f"{MODEL}double_blocks.2.x": (1,)}, f"of {MODEL}double_blocks.2, but none of {MODEL}double_blocks.1"),
        ({f"{LAYER}7.x": (1,), f"{LAYER}1.x": (1,)}, f"it has tensors of {LAYER}7, but none of {LAYER}2"),
        (
            {f"{MODEL}txt_in.weight": (64, 1)},
            "its tensor 'model.diffusion_model.txt_in.weight' has the impossible shape ",
        ),
        ({f"{MODEL}txt_in.weight": ()}, "txt_in.weight' has the impossible shape of a single number"),
        ({f"{MODEL}txt_in.weight": (0, 1)}, "has the impossible shape 0x1"),
        ({f"{MODEL}txt_in.weight": (128,)}, "has the impossible shape 128"),
        ({f"{MODEL}txt_in.weight": (128, 1, 1)}, "has the impossible shape 128x1x1"),
        ({f"{MODEL}txt_in.weight": (1 << 16, 1)}, "has the impossible shape 65536x1"),
        ({f"{MODEL}x.txt_in.weight": (192, 1)}, "has the impossible shape 192x1"),
        ({f"{MODEL}{HEAD}": (64,)}, "key_norm.scale' has the impossible shape 64"),
        ({f"{MODEL}{HEAD}": ()}, "key_norm.scale' has the impossible shape of a single number"),
        ({f"{MODEL}img_in_patch.weight": (3, 3)}, "img_in_patch.weight' has the impossible shape 3x3"),
        ({TOKENS: (1000, 1)}, f"its tensor '{TOKENS}' knows 1000 tokens, and prompts are written in 151669"),
        ({TOKENS: (QWEN_TOKENS - 1, 1)}, "knows 151668 tokens, and prompts are written in 151669"),
        ({TOKENS: (QWEN_TOKENS,)}, "has the impossible shape 151669"),
        ({TOKENS: (QWEN_TOKENS, 0)}, "has the impossible shape 151669x0"),
        (
            {TOKENS: (QWEN_TOKENS, 2)},
            "its text encoder makes 2 numbers of a token, but it takes 1: it goes with another",
        ),
        ({"text_encoders.llm.token_embd.weight": (9, 1)}, "knows 9 tokens"),
        ({GATE: (0, 1)}, "gate_proj.weight' has the impossible shape 0x1"),
        (
            {"text_encoders.llm.blk.0.ffn_gate.weight": ()},
            "gate_proj.weight' has the impossible shape of a single number",
        ),
        (
            {"vae.decoder.conv_in.weight": (1 << 40, 0, 3, 3)},
            "conv_in.weight' has the impossible shape 1099511627776x0x3x3",
        ),
        ({"cond_stage_model.model.transformer.resblocks.5": (4,)}, "it has a tensor of which the name ends too early"),
        ({"vae.decoder.conv_in.weight": (8193, 1, 1, 1)}, "conv_in.weight' has the impossible shape 8193x1x1x1"),
    ],
)
def test_what_would_end_the_library_is_refused(tmp_path: Path, changes: Shapes, said: str) -> None:
    message = refused(path := write_zeros(tmp_path / "model.safetensors", TINY | changes))
    assert message.startswith(f"{path} is a FLUX.2 klein model that stable-diffusion.cpp can't load: ")
    assert said in message


def test_a_model_that_does_not_tell_how_wide_its_heads_are_is_refused() -> None:
    assert [*misfits(KLEIN, TINY)] == []
    headless = {name: shape for name, shape in TINY.items() if "key_norm" not in name}
    assert [*misfits(KLEIN, headless)] == [f"it has no {HEAD}, which tells how wide its heads are"]
    diffusers = headless | {f"{MODEL}single_transformer_blocks.0.attn.norm_k.weight": (128,)}
    assert [*misfits(KLEIN, diffusers)] == []


@pytest.mark.parametrize("dtype", ["I32", "I64"])
def test_weights_that_are_whole_numbers_are_refused(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "model.safetensors"
    zeros = {name: ("F16", shape, bytes(2 * math.prod(shape))) for name, shape in CHECKPOINT.items()}
    size = BYTES[dtype]
    path.write_bytes(write_safetensors(zeros | {"text_encoders.llm.position_ids": (dtype, (1,), bytes(size))}))
    assert read_diffusion(path).parameter_count == 1 + sum(math.prod(shape) for shape in CHECKPOINT.values())
    for name in (f"{MODEL}img_in.weight", f"{MODEL}img_in.bias", f"{MODEL}x.query_norm.scale", "vae.x.gamma"):
        path.write_bytes(write_safetensors(zeros | {name: (dtype, (1,), bytes(size))}))
        assert refused(path).endswith(f"its tensor {name!r} is of the type {dtype}, in which it can't compute")


def flux(double: int, single: int, width: int, text: int, head: int = 128) -> Shapes:
    """Return the telling tensors of a diffusion model that is built like FLUX."""
    norms = dict.fromkeys(named(*(f"double_blocks.{n}.txt_attn.norm.key_norm.scale" for n in range(double))), (head,))
    return prefixed(norms | blocks("single", single, "linear1.weight") | {"txt_in.weight": (width, text)})


def reader(layers: int, tokens: int, width: int, inner: int, *, llama_cpp: bool = False) -> Shapes:
    """Return the telling tensors of a language model."""
    layer, table, gate = ("blk", "token_embd", "ffn_gate") if llama_cpp else ("layers", "embed_tokens", "mlp.gate_proj")
    shapes = {f"{layer}.{number}.{gate}.weight": (inner, width) for number in range(layers)}
    return prefixed({f"{table}.weight": (tokens, width), **shapes}, "text_encoders.llm." + "model." * (not llama_cpp))


QWEN3_4B = reader(36, 151_936, 2560, 9728, llama_cpp=True)
ERNIE_8B: Shapes = {
    **prefixed(named(*(f"layers.{number}.x" for number in range(36)))),
    f"{MODEL}x_embedder.proj.weight": (4096, 128, 1, 1),
    f"{MODEL}text_proj.weight": (4096, 3072),
    f"{MODEL}layers.0.self_attention.norm_q.weight": (128,),
    f"{MODEL}layers.0.mlp.gate_proj.weight": (12_288, 4096),
    f"{MODEL}final_linear.weight": (128, 4096),
    **reader(26, 131_072, 3072, 9216),
    **prefixed(named(*(f"layers.{number}.x" for number in range(24))), "text_encoders.llm.vision_tower.transformer."),
}
SEEING = prefixed(named(*(f"blocks.{number}.attn.qkv.weight" for number in range(32))), "text_encoders.llm.visual.")
REAL: dict[str, tuple[Family, Shapes]] = {  # models that people use
    "FLUX.1": (FLUX, flux(19, 38, 3072, 4096)),
    "FLUX.1, pruned": (SCHNELL, flux(8, 38, 3072, 4096)),
    "Chroma": (
        CHROMA,
        flux(19, 38, 3072, 4096) | prefixed(named(*(f"distilled_guidance_layer.layers.{n}.x" for n in range(5)))),
    ),
    "Radiance": (RADIANCE, flux(19, 38, 3072, 4096) | {f"{MODEL}img_in_patch.weight": (3072, 3, 16, 16)}),
    "Radiance x0": (
        RADIANCE,
        flux(19, 38, 3072, 4096) | {f"{MODEL}img_in_patch.weight": (3072, 3, 16, 16), f"{MODEL}__32x32__": (0,)},
    ),
    "Ovis": (OVIS, flux(6, 27, 3072, 2048) | reader(28, 151_936, 2048, 6144)),
    "FLUX.2": (FLUX2, flux(8, 48, 6144, 15_360) | reader(40, 131_072, 5120, 32_768)),
    "FLUX.2, pruned encoder": (FLUX2, flux(8, 48, 6144, 15_360) | reader(30, 131_072, 5120, 32_768)),
    "klein 4B": (KLEIN, flux(5, 20, 3072, 7680) | QWEN3_4B),
    "klein 9B": (KLEIN, flux(8, 24, 4096, 12_288) | reader(36, 151_936, 4096, 12_288)),
    "Qwen Image": (
        QWEN,
        prefixed(named(*(f"transformer_blocks.{number}.x" for number in range(60))))
        | reader(28, 152_064, 3584, 18_944)
        | SEEING,
    ),
    "Z-Image": (
        Z_IMAGE,
        prefixed(named(*(f"layers.{n}.x" for n in range(30)), *(f"noise_refiner.{n}.x" for n in range(2)))) | QWEN3_4B,
    ),
    "ERNIE": (ERNIE, ERNIE_8B),
    "Anima": (
        ANIMA,
        prefixed(named(*(f"net.blocks.{n}.x" for n in range(28)), *(f"net.llm_adapter.blocks.{n}.x" for n in range(6))))
        | reader(28, 151_936, 1024, 3072),
    ),
    "SD3.5 medium": (
        SD3,
        prefixed(named(*(f"joint_blocks.{number}.x_block.attn2.ln_q.weight" for number in range(24)))),
    ),
    "SD3.5 large": (SD3, prefixed(named(*(f"joint_blocks.{number}.x" for number in range(38))))),
    "SD1": (
        SD1,
        unet(768)
        | prefixed(named("input_blocks.1.0.x", "input_blocks.4.1.transformer_blocks.0.x", "output_blocks.11.0.x"))
        | prefixed(named("text_model.encoder.layers.11.x", "vision_model.encoder.layers.23.x"), "cond_stage_model.x."),
    ),
}


@pytest.mark.parametrize("name", REAL)
def test_models_that_people_use_are_not_refused(name: str) -> None:
    family, shapes = REAL[name]
    assert [*misfits(family, shapes)] == []
    assert [*misfits(family, dict(reversed(shapes.items())))] == []


@pytest.mark.parametrize("name", [name for name in REAL if any("embed_tokens" in each for each in REAL[name][1])])
def test_a_table_of_too_few_tokens_is_refused_in_every_family(name: str) -> None:
    family, shapes = REAL[name]
    table = next(each for each in shapes if "embed_tokens" in each)
    least = MISTRAL_TOKENS if name in ("ERNIE", "FLUX.2", "FLUX.2, pruned encoder") else QWEN_TOKENS
    assert [*misfits(family, shapes | {table: (least, shapes[table][1])})] == []
    (said,) = misfits(family, shapes | {table: (least - 1, shapes[table][1])})
    assert said.endswith(f"embed_tokens.weight' knows {least - 1} tokens, and prompts are written in {least}")


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("FLUX.1", {f"{MODEL}txt_in.weight": (3072, 2048)}),
        ("Chroma", {f"{MODEL}single_blocks.38.x": (1,)}),
        ("Chroma", {f"{MODEL}double_blocks.19.x": (1,)}),
        ("Radiance", {f"{MODEL}img_in_patch.weight": (3072, 3, 32, 32)}),
        ("Radiance", {f"{MODEL}__32x32__": (0,), f"{MODEL}img_in_patch.weight": (3072, 3, 8, 8)}),
        ("FLUX.2", reader(19, 131_072, 5120, 32_768)),
        ("klein 4B", reader(36, 151_936, 4096, 12_288)),
        ("Qwen Image", reader(28, 152_064, 2048, 11_008)),
        ("Z-Image", reader(36, 151_936, 4096, 12_288)),
        ("Ovis", reader(28, 151_936, 1024, 6144)),
        ("Anima", reader(28, 151_936, 2048, 6144)),
        ("ERNIE", reader(26, 131_072, 5120, 9216)),
        ("ERNIE", {f"{MODEL}x_embedder.proj.weight": (4096, 128, 2, 2)}),
        ("ERNIE", {f"{MODEL}x_embedder.proj.weight": (4096, 128, 0, 0)}),
        ("ERNIE", {f"{MODEL}x_embedder.proj.weight": (4096, 64, 1, 1)}),
        ("ERNIE", {f"{MODEL}layers.0.self_attention.norm_q.weight": (0,)}),
        ("ERNIE", {f"{MODEL}final_linear.weight": (64, 4096)}),
        ("ERNIE", {f"{MODEL}layers.0.mlp.gate_proj.weight": (0, 4096)}),
        ("SD3.5 large", {f"{MODEL}joint_blocks.40.x": (1,)}),
    ],
)
def test_parts_of_other_models_and_odd_sizes_are_refused(name: str, changes: Shapes) -> None:
    family, shapes = REAL[name]
    if any("embed_tokens" in each for each in changes):
        shapes = {each: shape for each, shape in shapes.items() if not each.startswith("text_encoders.")}
    assert [*misfits(family, shapes | changes)]


@given(
    st.sampled_from([family for family, _ in REAL.values()]),
    st.dictionaries(
        st.sampled_from([*TINY, *ERNIE_8B, f"{MODEL}img_in_patch.weight", "text_encoders.llm.token_embd.weight"])
        | st.text("blayersk_doc.0179+ ", max_size=30).map(lambda text: MODEL + text),
        st.lists(st.integers(0, 1 << 40), max_size=6).map(tuple),
        max_size=8,
    ),
)
def test_whatever_is_odd_is_told_or_taken(family: Family, odd: Shapes) -> None:
    for shapes in (odd, TINY | odd, ERNIE_8B | odd):
        assert all(isinstance(said, str) for said in misfits(family, shapes))


# ---- with stable-diffusion.cpp itself


class Library:
    """stable-diffusion.cpp in a process of its own, which may end without harm."""

    def __init__(self) -> None:
        command = [sys.executable, str(CHILD)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __call__(self, path: Path, parts: Mapping[Part, Path] | None = None, *, is_whole: bool = True) -> str:
        """Return what it takes the model in these files for, or what it complains of."""
        params = DiffusionParams(
            path=str(path),
            whole=is_whole,
            parts={part: str(each) for part, each in (parts or {}).items()},
            encodes=False,
            small_decoder=False,
            flash_attention=True,
            threads=1,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(msgspec.json.encode(params) + b"\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().decode().strip()

    def of(self, header: DiffusionHeader) -> str:
        """The same for files that have been read."""
        return self(header.path, header.parts, is_whole=header.whole)

    def end(self) -> None:
        self._process.communicate()


@pytest.fixture(scope="module")
def library() -> Iterator[Library]:
    library = Library()
    yield library
    library.end()


@needs_library
@pytest.mark.parametrize("known", KNOWN.values(), ids=KNOWN)
def test_the_library_takes_a_model_for_one_of_the_same_family(tmp_path: Path, library: Library, known: Known) -> None:
    path, parts = tmp_path / "model.safetensors", {}
    if known in TRANSFORMERS.values():
        parts = write_parts(tmp_path, known.family)
        assert library.of(read_diffusion(write_zeros(path, prefixed(known.shapes)), parts)) == known.version
    assert (
        library.of(read_diffusion(write_zeros(path, known.shapes | prefixed(DECODER, "vae.")), parts)) == known.version
    )


@needs_library
@pytest.mark.parametrize(("version", "shapes"), VIDEOS.items(), ids=VIDEOS)
def test_the_library_makes_videos_with_what_is_refused_for_that(
    tmp_path: Path, library: Library, version: str, shapes: Shapes
) -> None:
    assert library(write_zeros(tmp_path / "model.safetensors", prefixed(shapes))) == version


@needs_library
@pytest.mark.parametrize(("version", "shapes"), STEERED.items(), ids=STEERED)
def test_the_library_knows_what_is_refused_for_being_steered(
    tmp_path: Path, library: Library, version: str, shapes: Shapes
) -> None:
    assert library(write_zeros(tmp_path / "model.safetensors", prefixed(shapes))) == version


@needs_library
@pytest.mark.parametrize("beginning", ["te.", "te1.", "text_encoder.", "diffusion_model."])
def test_the_library_renames_what_is_renamed_here(tmp_path: Path, library: Library, beginning: str) -> None:
    if beginning == "diffusion_model.":
        shapes = {name.removeprefix("model."): shape for name, shape in unet(768).items()}
    else:
        shapes = BLOCKS | {beginning + TABLE: (4, 768)}
    header = whole(tmp_path, shapes | prefixed(DECODER, "vae."))
    assert (header.family, library.of(header)) == (SD1, "SD 1.x")


@needs_library
def test_the_library_does_not_know_what_has_no_family_here(tmp_path: Path, library: Library) -> None:
    bare = {name.removeprefix(MODEL): shape for name, shape in BLOCKS.items()}
    parts = {part: write_zeros(tmp_path / part, PARTS[part]) for part in ("clip_l", "clip_g", "vae")}
    for shapes in (bare, BLOCKS, {"decoder.x": (2, 2)}, {f"{MODEL}x": (2, 2)}):
        path = write_zeros(tmp_path / "model.safetensors", shapes)
        said = "holds a U-Net without its text encoder" if shapes in (bare, BLOCKS) else "holds no diffusion model"
        assert said in refused(path, parts)
        for is_whole in (True, False):
            assert "get sd version from file failed" in library(path, parts, is_whole=is_whole)


@needs_library
@pytest.mark.parametrize("kind", sorted({*_TENSOR_TYPES} - NOT_TAKEN), ids=lambda kind: _TENSOR_TYPES[kind][0])
def test_the_library_reads_every_type_of_a_gguf_file_that_is_accepted(
    tmp_path: Path, library: Library, kind: int
) -> None:
    name, block, size = _TENSOR_TYPES[kind]
    header = read_diffusion(whole_gguf(tmp_path / "model.gguf", kind=kind, data=bytes(1024 // block * size)))
    assert (library.of(header), header.quantisation) == ("Flux.2 klein", name)


@needs_library
@pytest.mark.parametrize("dtype", BYTES)
def test_the_library_reads_every_type_of_a_safetensors_file(tmp_path: Path, library: Library, dtype: str) -> None:
    zeros = {name: ("F16", shape, bytes(2 * math.prod(shape))) for name, shape in CHECKPOINT.items()}
    path = tmp_path / "model.safetensors"
    path.write_bytes(write_safetensors(zeros | {f"{MODEL}more": (dtype, (2, 2), bytes(4 * BYTES[dtype]))}))
    assert library.of(read_diffusion(path)) == "Flux.2 klein"


@needs_library
def test_the_library_reads_long_names_and_files_without_an_architecture(tmp_path: Path, library: Library) -> None:
    name = f"{MODEL}{LIN}"
    for length in (63, 64, LONG_TENSOR_NAME):
        assert (
            library.of(read_diffusion(whole_gguf(tmp_path / "model.gguf", name.ljust(length, "x")))) == "Flux.2 klein"
        )
