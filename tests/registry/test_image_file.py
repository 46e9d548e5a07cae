"""Image models' files: what they say of themselves, how they are loaded, and what is refused before that."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from diffusion_tensors import (
    CHECKPOINT,
    CLIP,
    DECODER,
    EDITORS,
    ENCODER,
    MODEL as PREFIX,
    SECOND,
    TRANSFORMERS,
    Shapes,
    prefixed,
    unet,
    write_parts,
    write_zeros,
)
from gguf_writer import tiny_llama
from hypothesis import HealthCheck, given, settings, strategies as st
from tiny_diffusion import write_model

from llamaserve.engine.params import Adapter, Footprint
from llamaserve.errors import (
    ChecksumMismatch,
    GGUFError,
    InsufficientMemory,
    InvalidRequest,
    ModelFileMissing,
    ModelNotCapable,
)
from llamaserve.images.values import DiffusionParams, Size
from llamaserve.registry import image_file, other_file
from llamaserve.registry.diffusion_family import KLEIN
from llamaserve.registry.diffusion_file import DiffusionHeader, read_diffusion
from llamaserve.registry.diffusion_memory import PictureWork
from llamaserve.registry.image_file import ImageFile, ImageSettings, footprint, image_params, locate_parts, plan_images
from llamaserve.registry.load_plan import PROCESS, LoadPlan
from llamaserve.registry.memory import claimed
from llamaserve.registry.spec import ModelSpec, Prefixes
from llamaserve.worker.protocol import Device

MODEL, DECODER_FILE = "tiny-flux2.safetensors", "tiny-taef2.safetensors"
ROOMY = Footprint(1 << 40, 1 << 40)
CARD = Device("CUDA0", "a card", 1 << 34, 1 << 34)
SHARED = Device("MTL0", "a part of the processor", 1 << 34, 1 << 34, "integrated")
ADAPTER = Adapter("style", "/style.gguf")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write_model(folder)
    return folder


@pytest.fixture(scope="module")
def header(folder: Path) -> DiffusionHeader:
    return read_diffusion(folder / MODEL, {"taesd": folder / DECODER_FILE})


def spec(**fields: Any) -> ModelSpec:
    return ModelSpec(**{"source": f"file:{MODEL}", "parts": {"taesd": f"file:{DECODER_FILE}"}} | fields)


def planned(header: DiffusionHeader, budget: Footprint = ROOMY, *devices: Device, **fields: Any) -> LoadPlan:
    return plan_images("brush", spec(**fields), header, budget, devices)


def copied(folder: Path, to: Path) -> None:
    for name in (MODEL, DECODER_FILE):
        (to / name).write_bytes((folder / name).read_bytes())


# ---- what it says of itself


def test_files_are_read_once_they_are_needed(folder: Path) -> None:
    file = ImageFile("brush", spec(), folder)
    assert file.is_here
    assert asyncio.run(file.read_contents()) is file.contents is file.known_contents
    assert file.contents.paths == (folder / MODEL, folder / DECODER_FILE)
    assert file.load_params() == image_params(spec(), file.contents)


def test_it_has_no_header_of_llama_cpp(folder: Path) -> None:
    file = ImageFile("brush", spec(), folder)
    assert file.known_header is None
    assert asyncio.run(file.peek()) is None
    with pytest.raises(ModelNotCapable, match=r"^brush makes pictures .*; it is no model of texts$"):
        _ = file.header
    with pytest.raises(ModelNotCapable, match="no model of texts"):
        asyncio.run(file.read())


@pytest.mark.parametrize("missing", [MODEL, DECODER_FILE])
def test_it_is_here_only_with_all_its_parts(folder: Path, tmp_path: Path, missing: str) -> None:
    copied(folder, tmp_path)
    file = ImageFile("brush", spec(), tmp_path)
    assert file.is_here
    (tmp_path / missing).unlink()
    assert not file.is_here
    told = "the weights of brush are" if missing == MODEL else f"the part taesd of brush is not .*: file:{DECODER_FILE}"
    for use in (lambda: file.contents, file.load_params, lambda: file.plan((), ROOMY, ())):
        with pytest.raises(ModelFileMissing, match=told) as refused:
            use()
        assert refused.value.hint == "llamaserve pull brush"
    assert file.known_contents is None
    copied(folder, tmp_path)
    assert file.contents.family == KLEIN


def test_all_parts_are_looked_for_beside_the_list(tmp_path: Path) -> None:
    parts = {part: f"file:sub/{part}.safetensors" for part in ("vae", "clip_l", "t5xxl")}
    listed = spec(parts=parts)
    (tmp_path / "sub").mkdir()
    write_parts(tmp_path / "sub", TRANSFORMERS["FLUX.1"].family)
    assert locate_parts("brush", listed, tmp_path) == {part: tmp_path / text[5:] for part, text in parts.items()}
    assert locate_parts("brush", spec(parts={}), tmp_path) == {}
    with pytest.raises(ModelFileMissing, match="the part vae of brush is not on this machine"):
        locate_parts("brush", listed, tmp_path / "sub")


def test_files_that_cannot_be_read_are_not_tried_again_at_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = ImageFile("brush", spec(), tmp_path)
    assert file.known_contents is None
    copied(folder, tmp_path)
    assert file.known_contents is None
    now = other_file.time.monotonic()
    monkeypatch.setattr(other_file.time, "monotonic", lambda: now + other_file.FAILURE_KEPT)
    assert file.known_contents is not None


@pytest.mark.parametrize("damaged", [MODEL, DECODER_FILE])
@pytest.mark.parametrize("data", [b"", b"PK\x03\x04" + bytes(100), b"GGUF", tiny_llama()[:-1]])
def test_no_damaged_file_is_loaded(folder: Path, tmp_path: Path, damaged: str, data: bytes) -> None:
    copied(folder, tmp_path)
    (tmp_path / damaged).write_bytes(data)
    file = ImageFile("brush", spec(), tmp_path)
    for use in (lambda: file.contents, file.load_params, lambda: file.plan((), ROOMY, ())):
        with pytest.raises(GGUFError, match=damaged):
            use()
    assert file.known_contents is None


def test_what_is_missing_is_no_reason_not_to_list_it(tmp_path: Path) -> None:
    write_zeros(tmp_path / MODEL, TRANSFORMERS["klein"].shapes)
    file = ImageFile("brush", spec(parts={}), tmp_path)
    assert file.is_here
    assert file.known_contents is None
    with pytest.raises(ModelNotCapable, match=r"is a FLUX\.2 klein model, and its text encoder is missing"):
        file.plan((), ROOMY, ())


def test_files_that_become_others_are_read_anew_before_they_are_loaded(folder: Path, tmp_path: Path) -> None:
    copied(folder, tmp_path)
    file = ImageFile("brush", spec(), tmp_path)
    assert file.contents.encodes
    write_model(tmp_path, width=256, encoder=False)
    plan = file.plan((), ROOMY, ())
    assert not file.contents.encodes
    assert (
        plan.estimate.weights.host
        == file.contents.weight_bytes
        > read_diffusion(folder / MODEL, {"taesd": folder / DECODER_FILE}).weight_bytes
    )
    (tmp_path / DECODER_FILE).write_bytes(b"")
    with pytest.raises(GGUFError, match="has 0 bytes"):
        file.plan((), ROOMY, ())


def test_a_promised_sum_is_kept(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLAMASERVE_CACHE", str(tmp_path))
    right = hashlib.sha256((folder / MODEL).read_bytes()).hexdigest()
    assert ImageFile("brush", spec(sha256=right), folder).plan((), ROOMY, ())
    wrong = ImageFile("brush", spec(sha256="f" * 64), folder)
    with pytest.raises(ChecksumMismatch):
        wrong.plan((), ROOMY, ())
    assert wrong.known_contents is not None  # to list it, that is not looked at


# ---- how it is loaded


def test_the_settings_say_how_it_is_loaded(header: DiffusionHeader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_file, "performance_cores", lambda: 6)
    own = DiffusionParams(
        path=str(header.path),
        whole=True,
        parts={"taesd": str(header.parts["taesd"])},
        encodes=True,
        small_decoder=True,
        flash_attention=True,
        threads=6,
    )
    assert planned(header).params == planned(header, task="image").params == own
    assert image_params(spec(threads=3), header).threads == 3


@pytest.mark.parametrize(("part", "small"), [("vae", False), ("taesd", True)])
def test_pictures_on_the_way_are_decoded_quickly_where_there_is_a_small_decoder(
    tmp_path: Path, part: str, small: bool
) -> None:
    path = write_zeros(tmp_path / "model", TRANSFORMERS["klein"].shapes)
    parts = write_parts(tmp_path, KLEIN)
    assert not image_params(spec(), read_diffusion(path, parts)).small_decoder
    parts |= {"taesd": write_zeros(tmp_path / "taesd", DECODER)}
    params = image_params(spec(), read_diffusion(path, parts))
    assert (params.small_decoder, params.encodes, params.whole) == (True, True, False)
    del parts["vae"]
    params = image_params(spec(), read_diffusion(path, parts))
    assert (params.small_decoder, params.encodes) == (True, False)


def test_what_a_plan_needs_is_what_it_takes_and_its_process(header: DiffusionHeader) -> None:
    plan, taken = planned(header), footprint(spec(), header, ())
    assert plan.need == taken + PROCESS
    assert (plan.fixed, plan.spill) == (PROCESS, 0)
    assert plan.estimate.total == plan.estimate.certain + plan.estimate.compute == taken
    assert plan.estimate.weights == Footprint(header.weight_bytes)
    assert planned(header, plan.need) == plan
    with pytest.raises(InsufficientMemory) as refused:
        planned(header, plan.need - Footprint(1))
    needed = f"{plan.need.host / 1e6:.0f} MB"
    assert refused.value.message == f"brush needs {needed} of memory, and models may use {needed}"
    assert refused.value.hint == "choose a smaller model, or give models more with --memory"


def test_larger_pictures_take_more_memory(header: DiffusionHeader) -> None:
    small, usual = (planned(header, image={"size": size}).need for size in ("256x256", "1024x1024"))
    assert small.host < usual.host == planned(header).need.host
    assert usual == footprint(spec(), header, (), PictureWork(Size(1024, 1024))) + PROCESS


def test_a_gpu_must_have_room_for_it_like_the_main_memory(header: DiffusionHeader) -> None:
    alone, beside = planned(header), planned(header, ROOMY, CARD)
    assert beside.need == Footprint(alone.need.host, alone.need.host - PROCESS.host)  # of which it will use one
    assert beside.estimate.weights == Footprint(0, header.weight_bytes)
    assert planned(header, beside.need, CARD).need == beside.need
    with pytest.raises(InsufficientMemory):
        planned(header, beside.need - Footprint(0, 1), CARD)


def test_a_gpu_that_uses_the_main_memory_takes_no_more_of_it(header: DiffusionHeader) -> None:
    taken = footprint(spec(), header, (SHARED,))
    assert taken == Footprint(0, planned(header).need.host - PROCESS.host)
    assert planned(header, ROOMY, SHARED).need == claimed(taken, unified=True) + PROCESS


TOLD = {  # tensors whose shapes tell how much memory a picture takes, and those by which its family is told
    **CHECKPOINT,
    **unet(768),
    **SECOND,
    **prefixed(DECODER | ENCODER, "first_stage_model."),
    **dict.fromkeys((f"{PREFIX}{name}.weight" for name in ("txt_in", "cap_embedder.1", "img_in")), (4, 8)),
    f"{PREFIX}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (4, 8),
    f"{PREFIX}joint_blocks.0.x": (2, 2),
    f"{PREFIX}double_blocks.0.img_attn.qkv.weight": (4, 2),
    **{
        f"text_encoders.llm.{name}.weight": (4, 8)
        for layer in ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj", "blk.0.attn_q")
        for name in (layer, "model.layers.0.mlp.gate_proj", "blk.0.attn_k", "blk.0.ffn_gate")
    },
}
SMALL, WIDE = st.sampled_from((0, 1, 3, 4, 8, 9)), st.sampled_from((0, 64, 128, 196, 768, 1024))
ODD = st.lists(SMALL, max_size=4).map(tuple) | st.tuples(SMALL, WIDE) | st.tuples(WIDE, SMALL) | st.tuples(WIDE)


@given(st.dictionaries(st.sampled_from([*TOLD]), st.none() | ODD), st.booleans(), st.sampled_from([0, 768, 1024]))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_odd_shapes_are_no_error_but_one_of_ours(
    tmp_path: Path, odd: dict[str, tuple[int, ...] | None], transformer: bool, width: int
) -> None:
    left_out = ("input_blocks", "middle_block", "output_blocks") if transformer else ("double_", "joint_")
    shapes: Shapes = {
        name: shape
        for name, shape in (TOLD | {CLIP: (4, width)} | odd).items()
        if shape is not None and not any(part in name for part in left_out)
    }
    path = write_zeros(tmp_path / "model.safetensors", shapes)
    try:
        read = read_diffusion(path)
        plan = plan_images("brush", ModelSpec(source=f"file:{path}"), read, ROOMY, ())
    except (GGUFError, ModelNotCapable, InsufficientMemory):
        return
    assert plan.need.host >= read.weight_bytes
    for size in (Size(64, 64), Size(512, 2048)):
        work = PictureWork(size, references=(size,), repaints=True)
        assert footprint(ModelSpec(source=f"file:{path}"), read, (), work).host >= read.weight_bytes


@pytest.mark.parametrize("shape", [(), (0,), (4,), (0, 0), (0, 4, 3, 3), (4, 0), (2, 2, 2)])
def test_a_tensor_of_an_odd_shape_is_planned(tmp_path: Path, shape: tuple[int, ...]) -> None:
    names = ("first_stage_model.decoder.conv_in.weight", "first_stage_model.encoder.conv_in.weight")
    odd = (f"text_encoders.llm.model.layers.0.self_attn.{letter}_proj.weight" for letter in "qk")
    shapes = CHECKPOINT | dict.fromkeys((*names, *odd), shape)
    read = read_diffusion(write_zeros(tmp_path / "klein", shapes))
    assert plan_images("brush", ModelSpec(source="file:a.safetensors"), read, ROOMY, ()).need.host > 0
    keys = f"{PREFIX}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    shapes = unet(768) | dict.fromkeys((*names, keys, f"{PREFIX}input_blocks.0.0.weight"), shape)
    read = read_diffusion(write_zeros(tmp_path / "sd1", shapes))
    assert plan_images("brush", ModelSpec(source="file:a.safetensors"), read, ROOMY, ()).need.host > 0


# ---- how its pictures are made


@pytest.mark.parametrize("known", [*TRANSFORMERS.values(), *EDITORS.values()], ids=[*TRANSFORMERS, *EDITORS])
def test_pictures_are_made_as_the_family_recommends_unless_the_settings_say_it(tmp_path: Path, known: Any) -> None:
    if known in TRANSFORMERS.values():
        header = read_diffusion(write_zeros(tmp_path / "model", known.shapes), write_parts(tmp_path, known.family))
    else:
        header = read_diffusion(write_zeros(tmp_path / "model", known.shapes | prefixed(DECODER, "vae.")))
    family = header.family
    usual = ImageSettings(
        family.size, family.steps, family.cfg_scale, family.guidance, family.sampler, None, family.edits
    )
    assert ImageSettings.of(spec(), header) == usual
    own = {"size": "640x384", "steps": 7, "cfg_scale": 0, "guidance": 0, "sampler": "lcm", "scheduler": "karras"}
    settings = ImageSettings.of(spec(image=own | {"edits": "repaint"}), header)
    assert settings == ImageSettings(Size(640, 384), 7, 0.0, 0.0, "lcm", "karras", "repaint")


@pytest.mark.parametrize("known", TRANSFORMERS.values(), ids=TRANSFORMERS)
def test_only_a_model_that_can_look_at_pictures_may_be_told_to(tmp_path: Path, known: Any) -> None:
    header = read_diffusion(write_zeros(tmp_path / "model", known.shapes), write_parts(tmp_path, known.family))
    assert image_params(spec(image={"edits": "repaint"}), header)
    if header.family.looks:
        assert image_params(spec(image={"edits": "reference"}), header) == image_params(spec(), header)
        return
    with pytest.raises(ModelNotCapable) as refused:
        image_params(spec(image={"edits": "reference"}), header)
    assert refused.value.message == f"{header.family.name} models can't look at pictures: `edits` must be repaint"


# ---- what it can't do


@pytest.mark.parametrize("task", ["generation", "embedding", "rerank", "moderation", "transcription"])
def test_a_task_of_another_model_is_refused(header: DiffusionHeader, task: str) -> None:
    with pytest.raises(ModelNotCapable) as refused:
        planned(header, task=task, parts={})
    assert refused.value.message == (
        f"brush can't be loaded: its file is one of a diffusion model, which does nothing but make pictures: {task}"
    )


@pytest.mark.parametrize("idle", [{"pooling": "mean"}, {"prefixes": Prefixes(query="q")}], ids=["pooling", "prefixes"])
def test_settings_for_embeddings_are_refused(header: DiffusionHeader, idle: dict[str, Any]) -> None:
    said = r"^brush can't be loaded: `pooling` and `prefixes` are for models that make embeddings"
    with pytest.raises(ModelNotCapable, match=said):
        planned(header, **idle)


def test_a_model_that_cannot_look_at_pictures_is_named(tmp_path: Path) -> None:
    known = TRANSFORMERS["Z-Image"]
    header = read_diffusion(write_zeros(tmp_path / "model", known.shapes), write_parts(tmp_path, known.family))
    with pytest.raises(ModelNotCapable) as refused:
        planned(header, image={"edits": "reference"})
    said = "Z-Image models can't look at pictures: `edits` must be repaint"
    assert refused.value.message == f"brush can't be loaded: {said}"


def test_adapters_are_refused_wherever_they_come_from(header: DiffusionHeader) -> None:
    with pytest.raises(ModelNotCapable, match="LoRA adapters are for models that generate text"):
        planned(header, lora=[{"source": "file:style.gguf"}])
    file = ImageFile("brush", spec(), header.path.parent)
    assert file.checked(()) == ()
    for use in (lambda: file.checked([ADAPTER]), lambda: file.plan([ADAPTER], ROOMY, ())):
        with pytest.raises(ModelNotCapable, match="LoRA adapters are for models that generate text"):
            use()


# ---- LoRAs that prompts name

Find = Callable[[str], Path]


@pytest.fixture
def find(folder: Path, tmp_path: Path) -> Find:
    """Look for a LoRA in a folder with some, beside a file that is none of them."""
    loras = tmp_path / "list/loras"
    (loras / "sub").mkdir(parents=True)
    for name in ("ink", "a b-c_d.e", "sub/deep", "../outside", ".hidden"):
        write_zeros(loras / f"{name}.safetensors", {"lora_unet_x.lora_down.weight": (2, 2)})
    (loras / "other.gguf").write_bytes(tiny_llama())
    os.mkfifo(loras / "pipe.safetensors")
    (loras / "folder.safetensors").mkdir()
    (loras / "dangling.safetensors").symlink_to(loras / "none")
    return ImageFile("brush", spec(image={"loras": "loras"}), tmp_path / "list").lora


def test_a_lora_is_found_by_its_name_with_its_ending_and_without(find: Find) -> None:
    for name in ("ink", "a b-c_d.e"):
        assert find(name) == find(f"{name}.safetensors")
        assert find(name).name == f"{name}.safetensors"


@pytest.mark.parametrize(
    "name",
    [
        *("none", "", ".", "..", "/", "ink/", "./ink", "sub/deep", "../outside", "../loras/ink", ".hidden", "-ink"),
        *("ink\n", "ink\0", "\0", "ink\\", "ink.gguf", "other", "other.gguf", "INK", "ínk", "\ud800", "%2e%2e/outside"),
        *("pipe", "folder", "dangling", "sub", "x" * 200, "x" * 201, "x" * 100_000, ".safetensors", "ink:0.5", "~"),
    ],
)
def test_no_other_name_is_one_of_a_lora(find: Find, name: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        find(name)
    assert refused.value.message == f"brush has no LoRA called {name[:100]!r}"
    assert refused.value.param == "prompt"


def test_an_absolute_path_names_no_lora(find: Find) -> None:
    path = find("ink")
    for name in (str(path), str(path.with_suffix("")), f"{path.parent}/../loras/ink"):
        with pytest.raises(InvalidRequest, match="brush has no LoRA called"):
            find(name)


@given(st.text(max_size=20) | st.text("/.\\~ab-", max_size=12))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_found_lies_in_the_folder(find: Find, name: str) -> None:
    try:
        path = find(name)
    except InvalidRequest:
        return
    assert path.resolve().parent == find("ink").parent.resolve()


def test_without_a_folder_there_are_no_loras(folder: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"^brush has no LoRA called 'ink': models\.yaml names no folder"):
        ImageFile("brush", spec(), folder).lora("ink")


def test_a_folder_of_loras_may_lie_anywhere(find: Find, tmp_path: Path) -> None:
    elsewhere = ImageFile("brush", spec(image={"loras": str(tmp_path / "list/loras")}), tmp_path)
    assert elsewhere.lora("ink") == find("ink")
    with pytest.raises(InvalidRequest, match=r"brush has no LoRA called 'ink'$"):
        ImageFile("brush", spec(image={"loras": "none"}), tmp_path).lora("ink")


def test_a_folder_of_loras_may_lie_at_home(find: Find, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    file = ImageFile("brush", spec(image={"loras": "~/list/loras"}), tmp_path / "elsewhere")
    assert file.lora("ink") == find("ink")
    with pytest.raises(InvalidRequest, match=r"brush has no LoRA called 'none'$"):
        file.lora("none")


def test_a_folder_that_may_not_be_looked_into_has_no_loras(find: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(path: Path, **_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_file", deny)
    monkeypatch.setattr(Path, "stat", deny)
    with pytest.raises(InvalidRequest, match=r"brush has no LoRA called 'ink'$"):
        find("ink")
