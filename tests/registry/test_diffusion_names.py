"""What stable-diffusion.cpp calls the tensors of models and LoRAs: each pair is what its own function returned."""

from __future__ import annotations

import pytest

from llamaserve.registry import diffusion_family as families
from llamaserve.registry.diffusion_family import Family
from llamaserve.registry.diffusion_names import library_name

SD1, SD2, SDXL, SD3 = families.SD1, families.SD2, families.SDXL, families.SD3
FLUX, KLEIN, QWEN = families.FLUX, families.KLEIN, families.QWEN


CASES = [
    (
        SD1,
        "lora.lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight",
        "lora.model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight.lora_down",
    ),
    (
        SD1,
        "lora.lora_unet_up_blocks_1_resnets_2_conv_shortcut.lora_up.weight",
        "lora.model.diffusion_model.output_blocks.5.0.skip_connection.weight.lora_up",
    ),
    (
        SD1,
        "lora.lora_unet_down_blocks_0_downsamplers_0_conv.alpha",
        "lora.model.diffusion_model.input_blocks.3.0.op.weight.alpha",
    ),
    (
        SD1,
        "lora.lora_te_text_model_encoder_layers_11_mlp_fc1.lora_down.weight",
        "lora.cond_stage_model.transformer.text_model.encoder.layers.11.mlp.fc1.weight.lora_down",
    ),
    (
        SD1,
        "lora.unet.mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_k_lora.down.weight",
        "lora.model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight.lora_down",
    ),
    (SD1, "lora.lycoris_mid_block_resnets_0_conv1.hada_w1_a", "lora.mid_block.resnets.0.conv1.weight.hada_w1_a"),
    (
        SD1,
        "lora.unet.up_blocks.3.attentions.0.proj_in.lora_A.default.weight",
        "lora.model.diffusion_model.output_blocks.9.1.proj_in.weight.lora_down",
    ),
    (
        SD1,
        "cond_stage_model.transformer.text_model.final_layer_norm.weight",
        "cond_stage_model.transformer.text_model.final_layer_norm.weight",
    ),
    (SD1, "unet.conv_in.weight", "model.diffusion_model.input_blocks.0.0.weight"),
    (
        SD2,
        "cond_stage_model.model.transformer.resblocks.3.attn.in_proj_weight",
        "cond_stage_model.transformer.text_model.encoder.layers.3.self_attn.in_proj.weight",
    ),
    (
        SDXL,
        "lora.lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_out_0.lora_up.weight",
        "lora.model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_out.0.weight.lora_up",
    ),
    (
        SDXL,
        "lora.lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight",
        "lora.cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight.lora_down",
    ),
    (
        SDXL,
        "lora.lora_te2_text_model_encoder_layers_31_self_attn_v_proj.lora_down.weight",
        "lora.cond_stage_model.1.transformer.text_model.encoder.layers.31.self_attn.v_proj.weight.lora_down",
    ),
    (
        SDXL,
        "lora.unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.lora.down.weight",
        "lora.model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_out.0.weight.lora_down",
    ),
    (
        SDXL,
        "lora.text_encoder_2.text_model.encoder.layers.0.mlp.fc1.lora_A.weight",
        "lora.text.encoder.2.text_model.encoder.layers.0.mlp.fc1.weight.lora_down",
    ),
    (
        SDXL,
        "conditioner.embedders.1.model.transformer.resblocks.0.mlp.c_fc.weight",
        "cond_stage_model.1.transformer.text_model.encoder.layers.0.mlp.fc1.weight",
    ),
    (
        SDXL,
        "conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1.weight",
        "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight",
    ),
    (
        SD3,
        "lora.transformer.transformer_blocks.5.attn.add_v_proj.lora_B.weight",
        "lora.model.diffusion_model.joint_blocks.5.context_block.attn.qkv.weight.2.lora_up",
    ),
    (
        SD3,
        "lora.lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_down.weight",
        "lora.text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight.lora_down",
    ),
    (
        SD3,
        "lora.lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight",
        "lora.model.diffusion_model.joint.blocks.0.x.block.attn.qkv.weight.lora_down",
    ),
    (
        FLUX,
        "lora.transformer.single_transformer_blocks.37.proj_mlp.lora_A.weight",
        "lora.model.diffusion_model.single_blocks.37.linear1.weight.3.lora_down",
    ),
    (
        FLUX,
        "lora.transformer_blocks.0.ff_context.net.0.proj.lora_B.weight",
        "lora.model.diffusion_model.double_blocks.0.txt_mlp.0.weight.lora_up",
    ),
    (
        FLUX,
        "lora.lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight",
        "lora.model.diffusion_model.double_blocks.0.img_attn.qkv.weight.lora_down",
    ),
    (
        FLUX,
        "lora.lora_unet_single_blocks_3_modulation_lin.lokr_w1",
        "lora.model.diffusion_model.single_blocks.3.modulation.lin.weight.lokr_w1",
    ),
    (
        FLUX,
        "lora.lora_te1_text_model_encoder_layers_0_mlp_fc2.alpha",
        "lora.text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc2.weight.alpha",
    ),
    (
        FLUX,
        "lora.diffusion_model.double_blocks.0.img_mlp.0.diff_b",
        "lora.model.diffusion_model.double_blocks.0.img_mlp.0.bias.diff",
    ),
    (
        FLUX,
        "text_encoders.t5xxl.transformer.enc.blk.0.ffn_up.weight",
        "text_encoders.t5xxl.transformer.encoder.block.0.layer.1.DenseReluDense.wi_1.weight",
    ),
    (
        families.RADIANCE,
        "lora.transformer.x_embedder.lora_A.weight",
        "lora.model.diffusion_model.img_in.weight.lora_down",
    ),
    (
        KLEIN,
        "lora.transformer.transformer_blocks.19.attn.to_q.lora_A.weight",
        "lora.model.diffusion_model.transformer_blocks.19.attn.to_q.weight.lora_down",
    ),
    (
        KLEIN,
        "lora.lora_te1_text_model_encoder_layers_0_mlp_fc2.alpha",
        "lora.cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc2.weight.alpha",
    ),
    (KLEIN, "text_encoders.llm.blk.3.attn_output.weight", "text_encoders.llm.model.layers.3.self_attn.o_proj.weight"),
    (
        QWEN,
        "lora.transformer_blocks.0.img_mod.1.lora_A.default.weight",
        "lora.model.diffusion_model.transformer_blocks.0.img_mod.1.weight.lora_down",
    ),
    (QWEN, "text_encoders.llm.visual.v.blk.0.ffn_up.weight", "text_encoders.llm.visual.blocks.0.mlp.up_proj.weight"),
    (
        families.Z_IMAGE,
        "lora.diffusion_model.layers.29.attention.to_k.lora_A.weight",
        "lora.model.diffusion_model.layers.29.attention.qkv.weight.1.lora_down",
    ),
    (
        families.Z_IMAGE,
        "lora.transformer.layers.30.attention.to_k.lora_A.weight",
        "lora.model.diffusion_model.layers.30.attention.to_k.weight.lora_down",
    ),
    (
        families.ANIMA,
        "lora.diffusion_model.blocks.0.mlp.layer1.lora_A.weight",
        "lora.model.diffusion_model.net.blocks.0.mlp.layer1.weight.lora_down",
    ),
    (
        families.ERNIE,
        "lora.base_model.model.layers.0.mlp.up_proj.lora_A.weight",
        "lora.base_model.model.layers.0.mlp.up_proj.weight.lora_down",
    ),
    (SD1, "lora.lora_vae_decoder_conv_in.diff", "lora.first_stage_model.decoder.conv_in.weight.diff"),
    (SD1, "lora.control_model.x.scale", "lora.control.model.x.weight.scale"),
]


@pytest.mark.parametrize(("family", "name", "other"), CASES, ids=[f"{case[0].name}: {case[1]}" for case in CASES])
def test_a_tensor_gets_the_name_that_the_library_gives_it(family: Family, name: str, other: str) -> None:
    assert library_name(name, family) == other


@pytest.mark.parametrize("prefix", ["", "lora."])
@pytest.mark.parametrize("name", ["model.transformer.resblocks.5", "model.visual.transformer.resblocks."])
def test_a_name_that_ends_the_process_is_an_error(prefix: str, name: str) -> None:
    with pytest.raises(ValueError, match="the name ends too early"):
        library_name(f"{prefix}cond_stage_model.{name}", SD2)


def test_names_of_the_library_stay_as_they_are() -> None:
    for family, name, other in CASES:
        if not name.startswith("lora."):
            assert library_name(other, family) == other, name
