"""models.yaml: what is read, what is refused, and how a mistake is told."""

from __future__ import annotations

import string
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings, strategies as st

from llamaserve import errors
from llamaserve.images.values import SAMPLERS, SCHEDULERS, Size
from llamaserve.registry import sources
from llamaserve.registry.spec import (
    MAX_FILE,
    SHOWN_PROBLEMS,
    Defaults,
    ImageDefaults,
    ModelSpec,
    Parts,
    Prefixes,
    Registry,
    RunOptions,
    find_models_file,
    load_registry,
)

SHIPPED = Path(__file__).resolve().parents[2] / "models.yaml"
SUM = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

GOOD = """\
defaults:
  context: 4096
  parallel: 2
  flash_attention: on
  model: small
models:
  small:
    source: file:small.gguf
    context: 1024
  big/one:
    source: hf:owner/repo:Q4_K_M
    task: embedding
    flash_attention: off
    gpu_layers: 12
    threads: 3
    size: 1.2 GB
    licence: MIT
aliases:
  tiny: small
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(folder: Path, text: str | bytes) -> Registry:
    path = folder / "models.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return load_registry(path)


def refusal(folder: Path, text: str | bytes) -> str:
    with pytest.raises(errors.RegistryError) as caught:
        load(folder, text)
    return caught.value.message


def outcome(folder: Path, data: bytes) -> Registry | str:
    try:
        return load(folder, data)
    except errors.RegistryError as error:
        return error.message


def test_a_models_own_value_wins_over_the_defaults(folder: Path) -> None:
    registry = load(folder, GOOD)
    small, big = registry.models["small"], registry.models["big/one"]
    assert (small.context, small.parallel, small.flash_attention) == (1024, 2, "on")
    assert (big.context, big.parallel, big.flash_attention) == (4096, 2, "off")
    assert (big.gpu_layers, big.threads, big.task, big.licence) == (12, 3, "embedding", "MIT")
    assert registry.default_model == "small"
    assert registry.source(small) == sources.FileSource(folder / "small.gguf")


def test_unnamed_values_have_defaults(folder: Path) -> None:
    spec = load(folder, "models: {a: {source: 'hf:o/r'}}").models["a"]
    assert spec == ModelSpec(source="hf:o/r")
    assert (spec.context, spec.parallel, spec.kv_cells, spec.batch) == (8192, 8, None, 512)
    assert (spec.threads, spec.gpu_layers, spec.flash_attention) == ("auto", "auto", "auto")
    assert (spec.key_type, spec.value_type, spec.task) == ("f16", "f16", None)
    assert (spec.pooling, spec.prefixes) == ("auto", Prefixes(query="", document="", plain=""))


def test_empty_headings_are_allowed(folder: Path) -> None:
    registry = load(folder, "defaults:\nmodels:\n# all commented out\naliases:\n")
    assert (dict(registry.models), dict(registry.aliases), registry.default_model) == ({}, {}, None)


def test_a_registry_cannot_be_changed(folder: Path) -> None:
    registry = load(folder, GOOD)
    with pytest.raises(TypeError):
        registry.models["other"] = registry.models["small"]  # type: ignore[index]


def test_the_default_model_may_be_an_alias(folder: Path) -> None:
    text = "defaults: {model: b}\nmodels: {a: {source: 'hf:o/r'}}\naliases: {b: a}"
    assert load(folder, text).default_model == "a"


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("context", "63", "should be greater than or equal to 64, not 63"),
        ("context", "'8192'", "should be a valid integer, not '8192'"),
        ("context", "yes", "should be a valid integer, not True"),
        ("context", "auto", "should be a valid integer, not 'auto'"),
        ("parallel", "0", "should be greater than or equal to 1, not 0"),
        ("parallel", "65", "should be less than or equal to 64, not 65"),
        ("batch", "31", "should be greater than or equal to 32, not 31"),
        ("kv_cells", "4096", "4096 cells cannot hold one request of context 8192"),
        ("threads", "0", "should be auto or a number from 1 to 1024, not 0"),
        ("threads", "true", "should be auto or a number from 1 to 1024, not True"),
        ("gpu_layers", "some", "should be auto, all, none or a number of layers, not 'some'"),
        ("gpu_layers", "-1", "should be auto, all, none or a number of layers, not -1"),
        ("gpu_layers", "[]", "should be auto, all, none or a number of layers, not []"),
        ("flash_attention", "maybe", "should be 'auto', 'on' or 'off', not 'maybe'"),
        ("spill", "lots", "should be auto or a number of MiB, not 'lots'"),
        ("spill", "-1", "should be auto or a number of MiB, not -1"),
        ("key_type", "q3_k", "should be 'f32', 'f16', 'bf16', 'q8_0', 'q5_1', 'q5_0', 'q4_1', 'q4_0' or 'iq4_nl'"),
        ("sha256", "abc", "should be the 64 hexadecimal digits of a SHA-256 sum"),
        ("size", "big", "should be a number and kB, MB or GB, such as 1.2 GB, not 'big'"),
        ("licence", "2024-01-01", "this kind of value is not allowed here; put a text in quotes"),
        ("contxt", "1", "unknown field; did you mean context?"),
        ("zzz", "1", "unknown field; known: context, parallel"),
    ],
)
def test_a_wrong_field_is_told_with_file_line_and_name(folder: Path, field: str, value: str, said: str) -> None:
    text = f"models:\n  qwen3-4b:\n    source: hf:o/r\n\n    {field}: {value}\n"
    assert refusal(folder, text).startswith(f"models.yaml:5: models.qwen3-4b.{field}: {said}")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "models.yaml:1: the file is empty"),
        ("# only words\n", "models.yaml:1: the file is empty"),
        ("- a\n- b\n", "models.yaml:1: the file should be a mapping"),
        ("just words", "models.yaml:1: the file should be a mapping"),
        ("models:\n  a: [1\n", "models.yaml:3: while parsing a flow sequence"),
        ("models:\n\t a: 1\n", "models.yaml:2: while scanning for the next token found character '\\t'"),
        ("models: {}\n---\nmodels: {}\n", "models.yaml:2: expected a single document"),
        ("models:\n a: *nowhere\n", "models.yaml:2: found undefined alias 'nowhere'"),
        ("models: {}\nfoo: \x01", "models.yaml:2: the character U+0001 is not allowed"),
        ('foo: "\\UFFFFFFFF"', "models.yaml:1: this is no YAML that can be read"),
        ("[" * 5000, "models.yaml:1: this is no YAML that can be read"),
        (b"models:\n a: \xff\n", "models.yaml:2: the file is not UTF-8"),
        ("model: {}", "models.yaml:1: model: unknown field; did you mean models?"),
        ("x: {}", "models.yaml:1: x: unknown field; known: defaults, models, aliases"),
        ("models: [a]", "models.yaml:1: models: should be a mapping, not ['a']"),
        ("models:\n  a: 5", "models.yaml:2: models.a: should be a mapping, not 5"),
        ("models:\n  a:", "models.yaml:2: models.a.source: is missing"),
        ("models:\n  a: {source: 'ftp:x'}", "models.yaml:2: models.a.source: 'ftp:x' names no source; accepted are"),
        ("models:\n  on: {source: 'hf:o/r'}", "models.yaml:2: models: the key 'on' is no text; put it in quotes"),
        ("models:\n  3: {source: 'hf:o/r'}", "models.yaml:2: models: the key '3' is no text; put it in quotes"),
        ("models:\n  ? [a]\n  : 1", "models.yaml:2: models: the key a collection is no text; put it in quotes"),
        ("models:\n  ../a: {source: 'hf:o/r'}", "models.yaml:2: models.../a: a name starts with"),
        ("models:\n  'a b': {source: 'hf:o/r'}", "models.yaml:2: models.a b: a name starts with"),
        ("models:\n  a: &x {source: 'hf:o/r'}\n  b: {<<: *x}", "models.yaml:3: models.b: << is not supported"),
        ("models: !!python/object:os.system {}", "models.yaml:1: models: this kind of value is not allowed"),
        ("models:\n  a: {source: !!bool x}", "models.yaml:2: models.a.source: this kind of value is not allowed"),
        ("aliases:\n  a: b", "models.yaml:2: aliases.a: there is no model 'b'"),
        ("aliases:\n  a: [b]", "models.yaml:2: aliases.a: should be the name of a model, not ['b']"),
        (
            "models: {a: {source: 'hf:o/r'}}\naliases:\n  a: a",
            "models.yaml:3: aliases.a: a model has this name already",
        ),
        ("defaults:\n  model: b", "models.yaml:2: defaults.model: there is no model 'b'"),
        ("defaults:\n  source: hf:o/r", "models.yaml:2: defaults.source: unknown field"),
    ],
)
def test_a_wrong_file_is_told_with_its_line(folder: Path, text: str | bytes, said: str) -> None:
    assert refusal(folder, text).startswith(said)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "task: chat",
            "task: should be 'generation', 'embedding', 'rerank', 'moderation', 'transcription' or 'image', not 'chat'",
        ),
        ("pooling: max", "pooling: should be 'auto', 'mean', 'cls' or 'last', not 'max'"),
        ("pooling: none", "pooling: should be 'auto', 'mean', 'cls' or 'last', not 'none'"),
        ("pooling: [mean]", "pooling: should be 'auto', 'mean', 'cls' or 'last', not ['mean']"),
        ("prefixes: 'query: '", "prefixes: should be a valid dictionary"),
        ("prefixes:", "prefixes: should be a valid dictionary"),
        ("prefixes: [a]", "prefixes: should be a valid dictionary"),
        ("prefixes:\n      query: 5", "prefixes.query: should be a valid string, not 5"),
        ("prefixes:\n      query:", "prefixes.query: should be a valid string, not None"),
        ("prefixes:\n      qeury: a", "prefixes.qeury: unknown field; did you mean query?"),
        ("prefixes:\n      zzz: a", "prefixes.zzz: unknown field; known: query, document, plain"),
        ("prefixes:\n      plain: " + "x" * 2001, "prefixes.plain: String should have at most 2000 characters"),
        ("lora:\n      - scale: 1", "lora.0.source: is missing"),
        ("lora: [{source: 'file:a',\n      scale: lots}]", "lora.0.scale: should be a valid number"),
        ("lora: [{source: 'file:a',\n      nmae: b}]", "lora.0.nmae: unknown field; did you mean name?"),
        ("lora: [{source: 'file:a',\n      name: 'a b'}]", "lora.0.name: a name starts with a letter or digit"),
        ("parts: file:vae.safetensors", "parts: should be a valid dictionary"),
        ("parts:\n      vea: file:a", "parts.vea: unknown field; did you mean vae?"),
        ("parts:\n      zzz: file:a", "parts.zzz: unknown field; known: vae, taesd, clip_l, clip_g, t5xxl, llm,"),
        ("parts:\n      vae: vae.safetensors", "parts.vae: 'vae.safetensors' names no source; accepted are file:PATH"),
        ("parts:\n      llm: hf:o/r/../a.gguf", "parts.llm: 'hf:o/r/../a.gguf' names no source; accepted are"),
        ("parts:\n      clip_l: 5", "parts.clip_l: should be a valid string, not 5"),
        ("parts:\n      t5xxl: [file:a]", "parts.t5xxl: should be a valid string, not ['file:a']"),
        ("image: 512x512", "image: should be a valid dictionary"),
        ("image:", "image: should be a valid dictionary"),
    ],
)
def test_a_wrong_field_of_a_field_is_told_with_its_own_line(folder: Path, text: str, said: str) -> None:
    line = 5 if "\n" in text and "is missing" not in said else 4
    assert refusal(folder, f"models:\n  a:\n    source: hf:o/r\n    {text}\n").startswith(
        f"models.yaml:{line}: models.a.{said}"
    )


def test_every_mistake_of_a_field_with_fields_is_told(folder: Path) -> None:
    text = "models:\n  a:\n    source: hf:o/r\n    prefixes:\n      query: 1\n      document: 2\n      pain: x\n"
    assert [line.split(": ")[:2] for line in refusal(folder, text).splitlines()] == [
        ["models.yaml:5", "models.a.prefixes.query"],
        ["models.yaml:6", "models.a.prefixes.document"],
        ["models.yaml:7", "models.a.prefixes.pain"],
    ]


def test_a_model_says_what_it_is_for_and_what_it_wants_before_a_text(folder: Path) -> None:
    text = (
        "models:\n  a: {source: 'hf:o/r', task: rerank}\n"
        "  b: {source: 'hf:o/r', pooling: cls, prefixes: {query: 'query: ', document: ''}}\n"
    )
    one, two = load(folder, text).models.values()
    assert (one.task, one.pooling, one.prefixes) == ("rerank", "auto", Prefixes())
    assert (two.task, two.pooling, two.prefixes) == (None, "cls", Prefixes(query="query: "))


NO_SIZE = "should be width and height in pixels, such as 512x768, not "
NO_SIDE = "should have 16 to 4096 pixels on each side, not "


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("stpes", "4", "unknown field; did you mean steps?"),
        ("zzz", "4", "unknown field; known: steps, cfg_scale, guidance, sampler, scheduler, size, edits, loras"),
        ("steps", "0", "should be greater than or equal to 1, not 0"),
        ("steps", "151", "should be less than or equal to 150, not 151"),
        ("steps", "'4'", "should be a valid integer, not '4'"),
        ("steps", "4.5", "should be a valid integer, not 4.5"),
        ("cfg_scale", "-1", "should be greater than or equal to 0, not -1"),
        ("cfg_scale", "101", "should be less than or equal to 100, not 101"),
        ("cfg_scale", ".nan", "should be less than or equal to 100, not nan"),
        ("guidance", ".inf", "should be less than or equal to 100, not inf"),
        ("guidance", "much", "should be a valid number"),
        ("sampler", "Euler", "should be 'euler', 'euler_a', 'heun',"),
        ("sampler", "[euler]", "should be 'euler', 'euler_a', 'heun',"),
        ("scheduler", "normal", "should be 'discrete', 'karras',"),
        ("size", "512", NO_SIZE + "512"),
        ("size", "[512, 512]", NO_SIZE + "[512, 512]"),
        ("size", "512X512", NO_SIZE + "'512X512'"),
        ("size", "'512x512 '", NO_SIZE + "'512x512 '"),
        ("size", "512x100000", NO_SIZE + "'512x100000'"),
        ("size", "0x512", NO_SIZE + "1298"),  # what YAML takes it for
        ("size", "'0x512'", NO_SIDE + "0x512"),
        ("size", "15x512", NO_SIDE + "15x512"),
        ("size", "512x4097", NO_SIDE + "512x4097"),
        ("edits", "inpaint", "should be 'repaint' or 'reference', not 'inpaint'"),
        ("edits", "[]", "should be 'repaint' or 'reference', not []"),
        ("loras", "5", "Input is not a valid path"),
    ],
)
def test_a_wrong_setting_for_pictures_is_told_with_its_line(folder: Path, field: str, value: str, said: str) -> None:
    text = f"models:\n  a:\n    source: hf:o/r\n    image:\n      {field}: {value}\n"
    assert refusal(folder, text).startswith(f"models.yaml:5: models.a.image.{field}: {said}")


def test_every_mistake_about_pictures_is_told(folder: Path) -> None:
    text = "models:\n  a:\n    source: hf:o/r\n    parts: {vae: x}\n    image:\n      steps: 0\n      size: 1x1\n"
    text += "      step: 1\n"
    assert [line.split(": ")[:2] for line in refusal(folder, text).splitlines()] == [
        ["models.yaml:4", "models.a.parts.vae"],
        ["models.yaml:6", "models.a.image.steps"],
        ["models.yaml:7", "models.a.image.size"],
        ["models.yaml:8", "models.a.image.step"],
    ]


def test_a_model_says_of_what_it_is_put_together_and_how_its_pictures_are_made(folder: Path) -> None:
    text = """\
models:
  a:
    source: hf:o/r/a.safetensors
    lora: [{source: 'file:style.gguf'}]
    parts: {llm: 'hf:o/s/b.gguf@main', vae: 'file:c.safetensors', taesd: null}
    image: {steps: 4, cfg_scale: 1, guidance: 3.5, sampler: dpm++2m, scheduler: karras, size: 512x768, edits: repaint}
  b: {source: 'hf:o/r', task: image, image: {size: 4096x16, loras: ../loras}}
"""
    one, two = load(folder, text).models.values()
    assert one.parts.sources == {"vae": "file:c.safetensors", "llm": "hf:o/s/b.gguf@main"}
    assert one.other_sources == ("file:style.gguf", "file:c.safetensors", "hf:o/s/b.gguf@main")
    assert one.image == ImageDefaults(
        steps=4,
        cfg_scale=1.0,
        guidance=3.5,
        sampler="dpm++2m",
        scheduler="karras",
        size=Size(512, 768),
        edits="repaint",
    )
    assert (two.parts, two.parts.sources, two.other_sources) == (Parts(), {}, ())
    assert two.image == ImageDefaults(size=Size(4096, 16), loras=Path("../loras"))
    assert load(folder, "models: {a: {source: 'hf:o/r'}}").models["a"].image == ImageDefaults()


@pytest.mark.parametrize("field", ["sampler", "scheduler"])
def test_every_sampler_and_scheduler_can_be_named(folder: Path, field: str) -> None:
    for name in SAMPLERS if field == "sampler" else SCHEDULERS:
        text = f"models: {{a: {{source: 'hf:o/r/a.safetensors', image: {{{field}: {name}}}}}}}"
        assert getattr(load(folder, text).models["a"].image, field) == name


@pytest.mark.parametrize("setting", ["parts: {vae: 'file:a'}", "image: {steps: 4}"])
def test_settings_for_pictures_are_only_for_models_that_make_them(folder: Path, setting: str) -> None:
    field = setting.partition(":")[0]
    for model in (
        "'hf:o/r'",
        "'file:a.gguf'",
        "'file:a.bin'",
        "'hf:o/r', task: generation",
        "'file:a.safetensors', task: embedding",
        "'file:a.bin', task: transcription",
    ):
        text = f"models:\n  a:\n    {setting}\n    source: {model.replace(', ', chr(10) + '    ')}\n"
        assert refusal(folder, text) == f"models.yaml:3: models.a.{field}: is for models with `task: image`"
        assert load(folder, text.replace(setting, f"{field}: {{}}")).models["a"].parts == Parts()
    for model in ("'file:a.gguf', task: image", "'file:a.safetensors', task: image", "'hf:o/r/a.safetensors'"):
        assert load(folder, f"models: {{a: {{{setting}, source: {model}}}}}").models["a"].source


@pytest.mark.parametrize("task", ["embedding", "rerank", "moderation", "transcription", "image"])
def test_the_defaults_name_a_model_for_each_task_by_name_or_alias(folder: Path, task: str) -> None:
    models = "models: {a: {source: 'hf:o/r'}}\naliases: {b: a}"
    for name in ("a", "b"):
        registry = load(folder, f"defaults: {{{task}_model: {name}}}\n{models}")
        assert registry.default_models == {task: "a"}
        assert registry.default_model is None
    assert load(folder, models).default_models == {}
    assert load(folder, f"defaults: {{{task}_model: null}}\n{models}").default_models == {}
    where = f"models.yaml:1: defaults.{task}_model: "
    unknown = refusal(folder, f"defaults: {{{task}_model: aa}}\n{models}")
    assert unknown == f"{where}there is no model 'aa'; did you mean a?"
    assert refusal(folder, f"defaults: {{{task}_model: 5}}\n{models}").startswith(f"{where}should be a valid string")
    assert refusal(folder, f"defaults: {{{task}_model: [a]}}\n{models}").startswith(f"{where}should be a valid string")


def test_what_one_model_is_for_is_no_default(folder: Path) -> None:
    text = (
        "defaults:\n  task: embedding\n  pooling: mean\n  prefixes: {query: a}\n  generation_model: a\n"
        "  parts: {vae: 'file:a'}\n  image: {steps: 4}\n"
    )
    lines = refusal(folder, text).splitlines()
    assert [line.split(": ")[:3] for line in lines] == [
        [f"models.yaml:{number}", f"defaults.{field}", found]
        for number, (field, found) in enumerate(
            (
                ("task", "unknown field; known"),
                ("pooling", "unknown field; known"),
                ("prefixes", "unknown field; did you mean prefix_cache?"),
                (
                    "generation_model",
                    "unknown field; did you mean moderation_model or rerank_model or transcription_model?",
                ),
                ("parts", "unknown field; known"),
                ("image", "unknown field; did you mean image_model?"),
            ),
            2,
        )
    ]


def test_a_key_given_twice_is_refused_wherever_it_is(folder: Path) -> None:
    text = "models:\n  a:\n    source: hf:o/r\n    source: hf:o/s\n  a: {source: 'hf:o/r'}\nmodels: {}\n"
    assert refusal(folder, text).splitlines() == [
        "models.yaml:4: models.a.source: is given twice, first in line 3",
        "models.yaml:5: models.a: is given twice, first in line 2",
        "models.yaml:6: models: is given twice, first in line 1",
    ]


def test_every_mistake_is_told_at_once_in_the_order_of_the_file(folder: Path) -> None:
    text = (
        "aliases: {x: nobody}\ndefaults: {batch: 1}\nmodels:\n  a:\n    source: hf:o\n    context: 1\n  b: {sorce: 1}\n"
    )
    lines = refusal(folder, text).splitlines()
    assert [line.split(": ")[1] for line in lines] == [
        "aliases.x",
        "defaults.batch",
        "models.a.source",
        "models.a.context",
        "models.b.source",
        "models.b.sorce",
    ]
    assert [int(line.split(":")[1]) for line in lines] == [1, 2, 5, 6, 7, 7]


def test_a_mistake_in_the_defaults_is_not_told_again_for_each_model(folder: Path) -> None:
    text = "defaults: {context: 1}\nmodels: {a: {source: 'hf:o/r'}, b: {source: 'hf:o/r'}}"
    assert len(refusal(folder, text).splitlines()) == 1


def test_a_model_with_a_mistake_still_exists_for_its_alias(folder: Path) -> None:
    assert len(refusal(folder, "models: {a: {source: nowhere}}\naliases: {b: a}").splitlines()) == 1


def test_many_mistakes_are_cut_short(folder: Path) -> None:
    lines = refusal(folder, "".join(f"x{number}: 1\n" for number in range(50))).splitlines()
    assert len(lines) == SHOWN_PROBLEMS + 1
    assert lines[-1] == f"models.yaml: and {50 - SHOWN_PROBLEMS} more"


def test_the_hint_names_the_whole_path(folder: Path) -> None:
    with pytest.raises(errors.RegistryError) as caught:
        load(folder, "x: 1")
    assert caught.value.hint == f"Edit {folder / 'models.yaml'}"


@pytest.mark.parametrize("where", ["model", "defaults"])
def test_quantised_values_need_flash_attention(folder: Path, where: str) -> None:
    shared = "value_type: q8_0" if where == "defaults" else ""
    own = "" if where == "defaults" else "    value_type: q8_0\n"
    text = f"defaults: {{{shared}}}\nmodels:\n  a:\n    source: hf:o/r\n{own}    flash_attention: off\n"
    line = 3 if where == "defaults" else 5  # the line of the model, where the field stands elsewhere
    expected = f"models.yaml:{line}: models.a.value_type: q8_0 needs flash attention, and flash_attention is off"
    assert refusal(folder, text) == expected
    assert load(folder, text.replace("off", "on")).models["a"].value_type == "q8_0"
    assert load(folder, "models: {a: {source: 'hf:o/r', key_type: q8_0, flash_attention: off}}")


def test_anchors_are_allowed_and_bombs_are_not(folder: Path) -> None:
    shared = "models:\n  a: &a {source: 'hf:o/r'}\n  b: *a\n"
    assert set(load(folder, shared).models) == {"a", "b"}
    bomb = "x0: &x0 [1,1,1,1,1,1,1,1,1,1]\n"
    bomb += "".join(f"x{n}: &x{n} [{','.join([f'*x{n - 1}'] * 10)}]\n" for n in range(1, 12))
    assert "more than 20000 values" in refusal(folder, bomb)
    assert "more than 16 levels" in refusal(folder, "models: &m {a: *m}")


def test_a_file_that_is_too_large_is_not_read(folder: Path) -> None:
    assert "larger than" in refusal(folder, b"#" * (MAX_FILE + 1))
    load(folder, GOOD + "#" * (MAX_FILE - len(GOOD)))


def test_what_is_no_file_is_refused(folder: Path) -> None:
    for path, said in ((folder / "none.yaml", "there is no file"), (folder, "no regular file")):
        with pytest.raises(errors.RegistryError, match=said) as caught:
            load_registry(path)
        assert str(path) in caught.value.message
    with pytest.raises(errors.RegistryError):
        load_registry(Path("a\0b"))
    with pytest.raises(errors.RegistryError):
        load_registry(Path("~nobody-of-this-name/models.yaml"))


def test_a_huge_number_is_told_without_being_written_out(folder: Path) -> None:
    assert "context: should be less than" in refusal(
        folder, f"models: {{a: {{source: 'hf:o/r', context: 0x{'f' * 9000}}}}}"
    )


# --- Names -------------------------------------------------------------------------------------------------------


def test_a_name_and_an_alias_give_the_model(folder: Path) -> None:
    registry = load(folder, GOOD)
    assert registry.resolve("small") == registry.resolve("tiny") == ("small", registry.models["small"])


@pytest.mark.parametrize("name", ["smal", "SMALL", "nothing-like-it", "", "small ", "x" * 100_000, "\0", "\ud800"])
def test_an_unknown_name_never_gives_another_model(folder: Path, name: str) -> None:
    with pytest.raises(errors.ModelNotFound) as caught:
        load(folder, GOOD).resolve(name)
    assert len(caught.value.message) < 200
    if name.lower().startswith("smal"):
        assert "did you mean small" in caught.value.message


def test_a_reference_may_be_a_name_an_alias_or_a_source(folder: Path) -> None:
    registry = load(folder, GOOD)
    assert registry.resolve_reference("tiny")[0] == "small"
    assert registry.resolve_reference("big/one")[0] == "big/one"
    for text, name in {
        "hf:Qwen/Qwen3-4B-GGUF:Q4_K_M": "Qwen3-4B-Q4_K_M",
        "hf:Qwen/Qwen3-4B-GGUF": "Qwen3-4B",
        "hf:Qwen/Qwen3-4B-GGUF/Qwen3-4B-Q8_0.gguf": "Qwen3-4B-Q8_0",
        "hf:Qwen/Qwen3-4B-GGUF/deep/Qwen3-4B-Q8_0.gguf@main": "Qwen3-4B-Q8_0",
        "pypi:dist==1.0/inside/Some.Model.gguf": "Some.Model",
    }.items():
        found, spec = registry.resolve_reference(text)
        assert (found, spec.source, spec.context, spec.parallel) == (name, text, 4096, 2)


def test_a_reference_may_be_a_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = load(folder, GOOD)
    (folder / "sub").mkdir()
    for name in ("my model (1).GGUF", "small.gguf", "sub/plain"):
        (folder / name).write_bytes(b"GGUF")
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(folder / "sub")
    for text, name, path in (
        ("../my model (1).GGUF", "my-model-1-", "sub/../my model (1).GGUF"),
        (str(folder / "small.gguf"), "small-2", "small.gguf"),  # the name small is taken
        ("~/sub/plain", "plain", "sub/plain"),
        ("file:plain", "plain", "sub/plain"),
    ):
        found, spec = registry.resolve_reference(text)
        assert (found, registry.source(spec)) == (name, sources.FileSource(folder / path))


@pytest.mark.parametrize(
    "text", ["none.gguf", "./none", "sub/none.gguf", "~/none.gguf", "file:none", "x" * 300 + ".gguf"]
)
def test_a_path_to_nothing_names_the_absolute_path(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("HOME", str(folder))
    (folder / "nonce.gguf").touch()
    with pytest.raises(errors.ModelFileMissing) as caught:
        load(folder, GOOD).resolve_reference(text)
    assert f"there is no file {folder}/" in caught.value.message
    assert caught.value.hint is not None
    assert ("nonce.gguf" in caught.value.hint) == (text in ("none.gguf", "~/none.gguf"))


def test_a_folder_is_no_model(folder: Path) -> None:
    with pytest.raises(errors.ModelFileMissing, match="is a folder"):
        load(folder, GOOD).resolve_reference("./")


@given(st.text(max_size=40) | st.text(alphabet="hf:/.@-~ag\0", max_size=30))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_reference_gives_a_model_or_one_of_our_errors(folder: Path, text: str) -> None:
    registry = Registry({}, {}, None, folder / "models.yaml", Defaults())
    try:
        _, spec = registry.resolve_reference(text)
    except (errors.ModelNotFound, errors.ModelError):
        return
    assert registry.source(spec)


# --- Which file --------------------------------------------------------------------------------------------------


def test_the_named_file_comes_first_then_the_folders_then_the_shipped_one(folder: Path) -> None:
    assert find_models_file() == SHIPPED
    (folder / "models.yaml").write_text(GOOD)
    assert find_models_file() == folder / "models.yaml"
    (folder / "other.yaml").write_text(GOOD)
    assert find_models_file(Path("other.yaml")) == folder / "other.yaml"
    with pytest.raises(errors.RegistryError, match=f"no file {folder}/none.yaml"):
        find_models_file(Path("none.yaml"))


def test_the_shipped_file_is_good_and_says_what_a_reader_needs() -> None:
    registry = load_registry(SHIPPED)
    assert registry.default_model == "smollm2-135m"
    assert registry.resolve("starter")[1].sha256 == SUM
    for name, spec in registry.models.items():
        source = registry.source(spec)
        assert isinstance(source, sources.HubSource | sources.WheelSource), name
        assert str(source) == spec.source
        assert None not in (spec.size, spec.licence, spec.description), name
        assert spec.batch >= spec.context or spec.task != "embedding" or name.startswith("qwen"), name


def test_the_shipped_defaults_are_the_programs_defaults() -> None:
    written = yaml.safe_load(SHIPPED.read_text())["defaults"]
    assert set(written) == set(Defaults.model_fields)
    embedder = "all-minilm-l6-v2"
    assert load_registry(SHIPPED).defaults == Defaults(
        model="smollm2-135m",
        embedding_model=embedder,
        moderation_model=embedder,
        transcription_model="whisper-tiny.en",
        image_model="sd-turbo",
    )


# --- Properties --------------------------------------------------------------------------------------------------

WORDS = "models defaults aliases a b source hf:o/r on off null ~ 1e9 0x1f !!int !!bool &x *x << | ' 2001-99-99 = 1:2 -"
words = st.sampled_from([*WORDS.split(), *RunOptions.model_fields])
pieces = (
    words | st.sampled_from([": ", "\n", "\n  ", "\n    ", "{", "}", "[", "]", ", ", "? ", "#"]) | st.text(max_size=3)
)
texts = st.text() | st.lists(pieces, max_size=40).map("".join) | st.text(alphabet=string.printable)


@given(texts.map(lambda text: text.encode("utf-8", "surrogatepass")) | st.binary())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=300)
def test_any_text_gives_a_registry_or_a_registry_error(folder: Path, data: bytes) -> None:
    found = outcome(folder, data)
    if isinstance(found, Registry):
        assert set(found.aliases.values()) <= set(found.models)
    else:
        assert found.startswith("models.yaml:")


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
fields = st.sampled_from([*ModelSpec.model_fields, "other"])
specs = st.dictionaries(fields, values, max_size=6)


@given(st.fixed_dictionaries({}, optional={"defaults": specs, "models": st.dictionaries(words, specs, max_size=3)}))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_values_give_a_registry_or_a_registry_error(folder: Path, content: dict[str, object]) -> None:
    found = outcome(folder, yaml.safe_dump(content, allow_unicode=True, sort_keys=False).encode("utf-8", "replace"))
    assert isinstance(found, Registry) or found.startswith("models.yaml:")
