"""The names that stable-diffusion.cpp gives the tensors of models and of LoRAs, in which many conventions meet.

The same as ``convert_tensor_name`` of the library in stable-diffusion-cpp-python 0.4.7, replacement by replacement, its
oddities included: a LoRA changes the tensors of a model that have the same name then, and no other. Left out are the
names of decoders (VAE). Knows nothing of files, or of what is in a tensor.
"""

from __future__ import annotations

import re
from typing import Final

from llamaserve.registry.diffusion_family import Family
from llamaserve.registry.diffusion_layers import FLUX_1, Pairs, begun, layer_name, replaced

LORA: Final = "lora."  # how the names of a LoRA begin, once they are the library's
MODEL: Final = "model.diffusion_model."
ENCODERS: Final = ("cond_stage_model.1.", "cond_stage_model.", "conditioner.embedders.", "text_encoders.")  # in order
DECODERS: Final = ("first_stage_model.", "vae.")

_CLIP_OF_FLUX: Final = frozenset(each.name for each in FLUX_1)  # who have their first encoder under another name
_LORA_BEGINNINGS: Final = ("lora.lora.", "lora.lora_", "lora.lycoris_", "lora.lycoris.", "lora.")
_UNDERLINED: Final = ("unet_", "te_", "te1_", "te2_", "te3_", "vae_")  # where a line stands for a dot
_PARTS: Final = (  # of LoRAs, behind the name of a tensor
    *("lora_down", "lora_mid", "lora_up", "alpha", "scale", "diff", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    *("hada_t1", "hada_t2", "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"),
)
_LORA_ENDINGS: Final[Pairs] = (
    *((f"{dot}lora{sep}{part}.weight", f".weight.lora_{part}") for dot, sep in ((".", "_"), (".", "."), ("_", "."))
      for part in ("down", "mid", "up")),
    *((f".lora_{letter}{default}.weight", f".weight.lora_{part}") for letter, part in (("A", "down"), ("B", "up"))
      for default in ("", ".default")),
    *((f".{part}", f".weight.{part}") for part in _PARTS if not part.startswith("lora_")),
    (".lora_linear", ".weight.alpha"),
    (".diff_b", ".bias.diff"),
)  # fmt: skip
_KEPT: Final = (  # words in names whose lines stay lines
    *("self_attn", "out_proj", "q_proj", "k_proj", "v_proj", "to_k", "to_q", "to_v", "to_out", "text_model"),
    *("down_blocks", "mid_block", "up_block", "proj_in", "proj_out", "transformer_blocks"),
    *("single_transformer_blocks", "single_blocks", "diffusion_model", "cond_stage_model", "first_stage_model"),
    *("conv_in", "conv_out", "lora_down", "lora_mid", "lora_up", "diff_b", "hada_w1_a", "hada_w1_b", "hada_w2_a"),
    *("hada_w2_b", "hada_t1", "hada_t2", ".lokr_w1", ".lokr_w1_a", ".lokr_w1_b", ".lokr_w2", ".lokr_w2_a"),
    *(".lokr_w2_b", "time_emb_proj", "conv_shortcut", "time_embedding", "conv_norm_out", "double_blocks"),
    *("txt_attn", "img_attn", "input_blocks", "output_blocks", "middle_block", "skip_connection", "emb_layers"),
    *("in_layers", "out_layers", "add_q_proj", "add_k_proj", "add_v_proj", "add_out_proj", "ff_context"),
    *("norm_added_q", "norm_added_v", "to_add_out", "txt_mod", "img_mod", "txt_mlp", "img_mlp", "proj_mlp", "wi_0"),
    *("wi_1", "norm1_context", "x_embedder"),
)
_BEGINNINGS: Final[Pairs] = (
    ("diffusion_model.", MODEL),
    ("unet.", MODEL),
    ("transformer.", MODEL),
    ("vae.", "first_stage_model."),
    ("text_encoder.2.", "cond_stage_model.1.transformer."),
    ("text_encoder.", "cond_stage_model.transformer."),
    ("te.", "cond_stage_model.transformer."),
    ("conditioner.embedders.0.", "cond_stage_model."),
    ("conditioner.embedders.1.", "cond_stage_model.1."),
    ("te2.", "cond_stage_model.1.transformer."),
    ("te1.", "cond_stage_model.transformer."),
    ("te3.", "text_encoders.t5xxl.transformer."),
)


def library_name(name: str, family: Family) -> str:
    """Return the name that the library gives a tensor of a file for a model of this family. Those of a LoRA begin with
    ``lora.``, before it and after. Raises ``ValueError`` for a name that ends the process.
    """
    is_lora = name.startswith(LORA)
    if is_lora:
        name = _of_lora(name, family)
    if family.name in _CLIP_OF_FLUX and name.startswith("te1."):
        name = "text_encoders.clip_l.transformer." + name.removeprefix("te1.")
    else:
        name = begun(name, _BEGINNINGS)
    if name.startswith(MODEL):
        name = MODEL + layer_name(name.removeprefix(MODEL), family)
    elif prefix := next((each for each in ENCODERS if name.startswith(each)), ""):
        name = prefix + _of_encoder(name.removeprefix(prefix))
    name = name.removeprefix("control_model.")
    return LORA + name if is_lora else name


def _of_lora(name: str, family: Family) -> str:
    beginning = next(each for each in _LORA_BEGINNINGS if name.startswith(each))
    name = name.removeprefix(beginning)
    underlined = beginning == "lora.lycoris_" or name.startswith(_UNDERLINED)
    for old, new in _LORA_ENDINGS:
        if name.endswith(old):
            name = name.removesuffix(old) + new
            break
    name = name.replace(".processor", "", 1)
    if name.startswith(("transformer_blocks", "single_transformer_blocks")):
        name = f"transformer.{name}"
    return _dotted(name) if family.is_unet or underlined else name


def _dotted(name: str) -> str:
    """Return the name with dots for lines, but where these belong to a word."""
    kept = {
        found.start() + line.start()
        for word in _KEPT
        if word in name
        for found in re.finditer(re.escape(word), name)
        for line in re.finditer("_", word)
    }
    return "".join("." if letter == "_" and place not in kept else letter for place, letter in enumerate(name))


_T5: Final[Pairs] = (
    ("enc.", "encoder."),
    ("blk.", "block."),
    ("output_norm.", "final_layer_norm."),
    ("attn_q.", "layer.0.SelfAttention.q."),
    ("attn_k.", "layer.0.SelfAttention.k."),
    ("attn_v.", "layer.0.SelfAttention.v."),
    ("attn_o.", "layer.0.SelfAttention.o."),
    ("attn_norm.", "layer.0.layer_norm."),
    ("ffn_norm.", "layer.1.layer_norm."),
    ("ffn_up.", "layer.1.DenseReluDense.wi_1."),
    ("ffn_down.", "layer.1.DenseReluDense.wo."),
    ("ffn_gate.", "layer.1.DenseReluDense.wi_0."),
    ("attn_rel_b.", "layer.0.SelfAttention.relative_attention_bias."),
    ("token_embd.", "shared."),
)
_LLM: Final[Pairs] = (
    ("token_embd.", "model.embed_tokens."),
    ("blk.", "model.layers."),
    ("attn_q.", "self_attn.q_proj."),
    ("attn_k.", "self_attn.k_proj."),
    ("attn_v.", "self_attn.v_proj."),
    ("attn_q_norm.", "self_attn.q_norm."),
    ("attn_k_norm.", "self_attn.k_norm."),
    ("attn_output.", "self_attn.o_proj."),
    ("attn_norm.", "input_layernorm."),
    ("ffn_down.", "mlp.down_proj."),
    ("ffn_gate.", "mlp.gate_proj."),
    ("ffn_up.", "mlp.up_proj."),
    ("ffn_norm.", "post_attention_layernorm."),
    ("output_norm.", "model.norm."),
)
_EYES: Final[Pairs] = (  # of a language model
    ("mm.", "merger.mlp."),
    ("v.post_ln.", "merger.ln_q."),
    ("v.patch_embd.weight", "patch_embed.proj.0.weight"),
    ("patch_embed.proj.0.weight.1", "patch_embed.proj.1.weight"),
    ("v.patch_embd.weight.1", "patch_embed.proj.1.weight"),
    ("v.blk.", "blocks."),
    ("attn_q.", "attn.q_proj."),
    ("attn_k.", "attn.k_proj."),
    ("attn_v.", "attn.v_proj."),
    ("attn_out.", "attn.proj."),
    ("ffn_down.", "mlp.down_proj."),
    ("ffn_gate.", "mlp.gate_proj."),
    ("ffn_up.", "mlp.up_proj."),
    ("ln1.", "norm1."),
    ("ln2.", "norm2."),
)
_CLIP: Final[Pairs] = (
    ("transformer.text_projection.weight", "transformer.text_model.text_projection"),
    ("model.text_projection.weight", "transformer.text_model.text_projection"),
    ("vision_model.visual_projection.weight", "visual_projection.weight"),
)
_OPEN_CLIP: Final = {  # names that are replaced as a whole
    "model.ln_final.bias": "transformer.text_model.final_layer_norm.bias",
    "model.ln_final.weight": "transformer.text_model.final_layer_norm.weight",
    "model.positional_embedding": "transformer.text_model.embeddings.position_embedding.weight",
    "model.token_embedding.weight": "transformer.text_model.embeddings.token_embedding.weight",
    "model.text_projection": "transformer.text_model.text_projection",
}
_OPEN_CLIP_LAYERS: Final = {
    "attn.in_proj_bias": "self_attn.in_proj.bias",
    "attn.in_proj_weight": "self_attn.in_proj.weight",
    "attn.out_proj.bias": "self_attn.out_proj.bias",
    "attn.out_proj.weight": "self_attn.out_proj.weight",
    "ln_1.bias": "layer_norm1.bias",
    "ln_1.weight": "layer_norm1.weight",
    "ln_2.bias": "layer_norm2.bias",
    "ln_2.weight": "layer_norm2.weight",
    "mlp.c_fc.bias": "mlp.fc1.bias",
    "mlp.c_fc.weight": "mlp.fc1.weight",
    "mlp.c_proj.bias": "mlp.fc2.bias",
    "mlp.c_proj.weight": "mlp.fc2.weight",
}
_OPEN_CLIP_LAYER: Final = re.compile(r"model\.transformer\.resblocks\.([^.]*)\.(.*)", re.DOTALL)
_CUT_SHORT: Final = re.compile(r"model\.(visual\.)?transformer\.resblocks\.[^.]*")


def _of_encoder(name: str) -> str:
    if "t5xxl" in name:
        return replaced(name, _T5)
    if "llm" in name:
        return replaced(name, _EYES if "llm.visual" in name else _LLM)
    name = _OPEN_CLIP.get(name, name)
    if _CUT_SHORT.fullmatch(name):
        raise ValueError(f"the name ends too early: {name!r}")
    if (found := _OPEN_CLIP_LAYER.fullmatch(name)) and found[2] in _OPEN_CLIP_LAYERS:
        name = f"transformer.text_model.encoder.layers.{found[1]}.{_OPEN_CLIP_LAYERS[found[2]]}"
    return replaced(name, _CLIP)
