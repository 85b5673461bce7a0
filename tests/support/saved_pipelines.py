"""Tiny pipelines of diffusers with random weights as folders that `from_pretrained` loads: text encoders and all.

Their tokenizers have a token per character, so that nothing is downloaded.
"""

from __future__ import annotations

import functools
import json
import string
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from support.tiny import randomise
from support.zoo import build

CHAT = tuple(f"<|{name}|>" for name in ("im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad"))
VOCABULARY = {token: number for number, token in enumerate(("<pad>", "</s>", "<unk>", *CHAT, *string.printable))}
SMALL = ("--dtype", "float32", "--height", "32", "--width", "32")
SHORT = ("--arg", "max_sequence_length=16")


def tokenizer(length: int = 77) -> PreTrainedTokenizerFast:
    made = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", VOCABULARY["</s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=list(CHAT),
        model_max_length=length,
    )


def _made(model: Any) -> Any:
    randomise(model, 1)
    return model.eval()


_SIZES = {"num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 16, "vocab_size": len(VOCABULARY)}


def _clip(width: int, pooled: int | None = None) -> Any:
    ends = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    config = transformers.CLIPTextConfig(hidden_size=width, projection_dim=pooled or width, **_SIZES, **ends)
    return _made((transformers.CLIPTextModel if pooled is None else transformers.CLIPTextModelWithProjection)(config))


def _t5(width: int, kind: str = "T5") -> Any:
    sizes = {"d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": len(VOCABULARY)}
    config = getattr(transformers, f"{kind}Config")(d_model=width, pad_token_id=0, eos_token_id=1, **sizes)
    return _made(getattr(transformers, f"{kind}EncoderModel")(config))


def _qwen_encoder() -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    rope = {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"}
    text = sizes | {"num_hidden_layers": 1, "rope_scaling": rope, "vocab_size": len(VOCABULARY)}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    ids = {f"{name}_token_id": VOCABULARY[f"<|{name}|>"] for name in ("vision_start", "vision_end")}
    ids |= {"image_token_id": VOCABULARY["<|image_pad|>"], "video_token_id": VOCABULARY["<|video_pad|>"]}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
    return _made(transformers.Qwen2_5_VLForConditionalGeneration(config))


def _image_vae(channels: int) -> Any:
    blocks = {"block_out_channels": (4, 4), "norm_num_groups": 2, "layers_per_block": 1}
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    plain = {"use_quant_conv": False, "use_post_quant_conv": False, "scaling_factor": 1.5, "shift_factor": 0.1}
    return diffusers.AutoencoderKL(latent_channels=channels, sample_size=32, **blocks, **kinds, **plain).eval()


def _wan_vae() -> Any:
    scale = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    sizes = {"base_dim": 3, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    return diffusers.AutoencoderKLWan(temperal_downsample=[False, True, True], **sizes, **scale).eval()


def _qwen_vae() -> Any:
    scale = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    sizes = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 1, 1], "num_res_blocks": 1}
    return diffusers.AutoencoderKLQwenImage(temperal_downsample=[False, True], **sizes, **scale).eval()


def _flux() -> dict[str, Any]:
    return {
        "transformer": build("FluxTransformer2DModel")[0],
        "vae": _image_vae(1),
        "text_encoder": _clip(32),
        "tokenizer": tokenizer(),
        "text_encoder_2": _t5(32),
        "tokenizer_2": tokenizer(),
    }


def _sd3() -> dict[str, Any]:
    encoders = {"text_encoder": _clip(8, 4), "text_encoder_2": _clip(8, 4), "text_encoder_3": _t5(16)}
    tokenizers = {"tokenizer": tokenizer(), "tokenizer_2": tokenizer(), "tokenizer_3": tokenizer()}
    return {"transformer": build("SD3Transformer2DModel")[0], "vae": _image_vae(4), **encoders, **tokenizers}


def _qwen() -> dict[str, Any]:
    made = {"transformer": build("QwenImageTransformer2DModel")[0], "vae": _qwen_vae(), "tokenizer": tokenizer(1024)}
    return made | {"text_encoder": _qwen_encoder()}


def _wan(*changes: dict[str, Any], **more: Any) -> dict[str, Any]:
    names = ("transformer", "transformer_2")
    experts = {
        name: build("WanTransformer3DModel", seed, **change)[0]
        for seed, (name, change) in enumerate(zip(names, changes, strict=False))
    }
    given = {"transformer_2": None} | experts | {"vae": _wan_vae(), "tokenizer": tokenizer(512)}
    return given | {"text_encoder": _t5(16, "UMT5")} | more


def _ltx() -> dict[str, Any]:
    sizes = {"latent_channels": 4, "block_out_channels": (8, 8, 8, 8), "decoder_block_out_channels": (8, 8, 8, 8)}
    sizes |= {"layers_per_block": (1,) * 5, "decoder_layers_per_block": (1,) * 5, "patch_size": 1, "patch_size_t": 1}
    scaling = (True, True, False, False)
    vae = diffusers.AutoencoderKLLTXVideo(
        spatio_temporal_scaling=scaling, decoder_spatio_temporal_scaling=scaling, decoder_causal=False, **sizes
    ).eval()
    transformer = build("LTXVideoTransformer3DModel", patch_size=1, patch_size_t=1)[0]
    return {"transformer": transformer, "vae": vae, "text_encoder": _t5(16), "tokenizer": tokenizer(128)}


def _cogvideox() -> dict[str, Any]:
    blocks = {"down_block_types": ("CogVideoXDownBlock3D",) * 4, "up_block_types": ("CogVideoXUpBlock3D",) * 4}
    sizes = {"block_out_channels": (8,) * 4, "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 2}
    vae = diffusers.AutoencoderKLCogVideoX(temporal_compression_ratio=4, **blocks, **sizes).eval()
    transformer = build("CogVideoXTransformer3DModel", max_text_seq_length=16)[0]
    made = {"transformer": transformer, "vae": vae, "text_encoder": _t5(8), "tokenizer": tokenizer(226)}
    return made | {"scheduler": diffusers.CogVideoXDDIMScheduler()}


def _hunyuan_video() -> dict[str, Any]:
    blocks = {"down_block_types": ("HunyuanVideoDownBlock3D",) * 4, "up_block_types": ("HunyuanVideoUpBlock3D",) * 4}
    sizes = {"block_out_channels": (8,) * 4, "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 4}
    llama = transformers.LlamaConfig(hidden_size=16, pad_token_id=0, **_SIZES | {"num_hidden_layers": 2})
    encoders = {"text_encoder": _made(transformers.LlamaModel(llama)), "text_encoder_2": _clip(8)}
    tokenizers = {"tokenizer": tokenizer(512), "tokenizer_2": tokenizer()}
    vae = diffusers.AutoencoderKLHunyuanVideo(**blocks, **sizes).eval()
    return {"transformer": build("HunyuanVideoTransformer3DModel")[0], "vae": vae, **encoders, **tokenizers}


def _ltx2() -> dict[str, Any]:
    from diffusers.pipelines.ltx2 import LTX2TextConnectors
    from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder

    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "hidden_size": 16}
    sizes = {"intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": len(VOCABULARY), "pad_token_id": 0}
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    gemma = transformers.Gemma3Config(
        text_config=heads | sizes, vision_config=vision | {"image_size": 14, "patch_size": 14}, mm_tokens_per_image=1
    )
    vae = {"latent_channels": 4, "patch_size": 1, "patch_size_t": 1, "decoder_causal": False}
    vae |= {"block_out_channels": (8,), "decoder_block_out_channels": (8,), "layers_per_block": (1,)}
    vae |= {"decoder_layers_per_block": (1, 1), "spatio_temporal_scaling": (True,), "upsample_residual": (False,)}
    vae |= {"decoder_spatio_temporal_scaling": (True,), "decoder_inject_noise": (False, False)}
    vae |= {"downsample_type": ("spatial",), "upsample_factor": (1,), "timestep_conditioning": False}
    sound = {"base_channels": 4, "output_channels": 2, "ch_mult": (1,), "num_res_blocks": 1, "attn_resolutions": None}
    sound |= {"in_channels": 2, "resolution": 32, "latent_channels": 2, "mid_block_add_attention": False}
    vocoder = {"in_channels": 16, "hidden_channels": 32, "out_channels": 2, "upsample_factors": [2, 2]}
    vocoder |= {"upsample_kernel_sizes": [4, 4], "resnet_kernel_sizes": [3], "resnet_dilations": [[1, 3, 5]]}
    connectors = {"caption_channels": 16, "text_proj_in_factor": 2, "connector_rope_base_seq_len": 32}
    for name in ("video", "audio"):
        connectors |= {f"{name}_connector_num_attention_heads": 2, f"{name}_connector_attention_head_dim": 8}
        connectors |= {f"{name}_connector_num_layers": 1, f"{name}_connector_num_learnable_registers": None}
    return {
        "transformer": build("LTX2VideoTransformer3DModel")[0],
        "vae": diffusers.AutoencoderKLLTX2Video(**vae).eval(),
        "audio_vae": diffusers.AutoencoderKLLTX2Audio(**sound, mel_bins=8).eval(),
        "text_encoder": _made(transformers.Gemma3ForConditionalGeneration(gemma)),
        "tokenizer": tokenizer(1024),
        "connectors": _made(LTX2TextConnectors(rope_double_precision=False, **connectors)),
        "vocoder": LTX2Vocoder(output_sampling_rate=16000, **vocoder).eval(),
    }


def _qwen_edit_description(folder: Path) -> Path:
    """Without a text encoder, whose processor needs torchvision: any text becomes noise of its own."""
    transformer, vae = build("QwenImageTransformer2DModel")[0], _qwen_vae()
    components = {
        "transformer": {"_class_name": type(transformer).__name__, **_plain(transformer.config)},
        "vae": {"_class_name": type(vae).__name__, **_plain(vae.config)},
        "scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler"},
    }
    shapes = {"prompt_embeds": [7, 16], "prompt_embeds_mask": [7]}
    shapes |= {f"negative_{name}": shape for name, shape in shapes.items()}
    data = {"pipeline": "QwenImageEditPipeline", "components": components, "prompt": shapes}
    (folder / "qwen-edit.json").write_text(json.dumps(data))
    return folder / "qwen-edit.json"


def _plain(config: Any) -> dict[str, Any]:
    return {name: value for name, value in config.items() if not name.startswith("_")}


PIPELINES: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "flux": ("FluxPipeline", _flux),
    "sd3": ("StableDiffusion3Pipeline", _sd3),
    "qwen": ("QwenImagePipeline", _qwen),
    "wan": ("WanPipeline", lambda: _wan({})),
    "wan-i2v": ("WanImageToVideoPipeline", lambda: _wan({"in_channels": 12})),
    "wan-2.2": ("WanPipeline", lambda: _wan({}, {}, boundary_ratio=0.6)),
    "ltx": ("LTXPipeline", _ltx),
    "ltx-2": ("LTX2Pipeline", _ltx2),
    "cogvideox": ("CogVideoXPipeline", _cogvideox),
    "hunyuan-video": ("HunyuanVideoPipeline", _hunyuan_video),
}
"""Class and components of every pipeline, by a name."""

_VIDEO = (*SMALL, "--num-frames", "5", *SHORT)
PICTURE = "picture.png"
TEMPLATE = 'prompt_template={"template": "{}", "crop_start": 0}'
MODELS: dict[str, tuple[str, tuple[str, ...]]] = {
    "flux": ("flux", (*SMALL, *SHORT)),
    "flux-img2img": (
        "flux",
        (*SMALL, *SHORT, "--pipeline", "FluxImg2ImgPipeline", "--image", PICTURE, "--arg", "strength=1.0"),
    ),
    "flux-kontext": (
        "flux",
        (*SMALL, *SHORT, "--pipeline", "FluxKontextPipeline", "--image", PICTURE, "--arg", "_auto_resize=false")
        + ("--arg", "max_area=1024"),
    ),
    "flux-controlnet": ("flux", (*SMALL, *SHORT, "--controlnet", "controlnet", "--image", PICTURE)),
    "sd3": ("sd3", (*SMALL, *SHORT, "--negative-prompt", "blur", "--guidance", "3")),
    "qwen": ("qwen", (*SMALL, "--guidance", "3", "--negative-prompt", "blur")),
    "qwen-edit": ("qwen-edit", (*SMALL, "--image", PICTURE)),
    "wan": ("wan", (*_VIDEO, "--negative-prompt", "blur")),
    "wan-i2v": ("wan-i2v", (*_VIDEO, "--image", PICTURE)),
    "wan-2.2": ("wan-2.2", _VIDEO),
    "ltx": ("ltx", (*_VIDEO, "--fps", "24")),
    "ltx-2": ("ltx-2", (*_VIDEO, "--arg", "stg_scale=0", "--arg", "audio_stg_scale=0")),
    "cogvideox": ("cogvideox", _VIDEO),
    "hunyuan-video": ("hunyuan-video", (*_VIDEO, "--arg", TEMPLATE)),
}
"""What is given on the command line for every model: the saved pipeline, and the options beside ``--model``."""


@functools.cache
def saved_in(folder: Path, name: str) -> Path:
    """The folder of a pipeline, which is made when it is first asked for."""
    if name == "qwen-edit":
        return _qwen_edit_description(folder)
    cls, components = PIPELINES[name]
    torch.manual_seed(0)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = getattr(diffusers, cls)(**{"scheduler": scheduler} | components())
    pipe.save_pretrained(folder / name)
    return folder / name


@functools.cache
def beside_in(folder: Path) -> Path:
    """A folder with the other things that commands are given: a picture, a ControlNet."""
    Image.radial_gradient("L").resize((32, 32)).convert("RGB").save(folder / PICTURE)
    config = {"in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16}
    config |= {"num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 32}
    control = diffusers.FluxControlNetModel(axes_dims_rope=[4, 4, 8], **config)
    randomise(control, 2)
    control.save_pretrained(folder / "controlnet")
    return folder


def words_for(folder: Path, name: str) -> list[str]:
    """``--model`` and the options of a model, with the files they name made."""
    saved, words = MODELS[name]
    place = beside_in(folder)
    return ["--model", str(saved_in(folder, saved))] + [
        str(place / word) if word in (PICTURE, "controlnet") else word for word in words
    ]


def prepare(monkeypatch: Any) -> None:
    """Replaces what two pipelines need that a test has not: a package, and a minute."""
    wan, edit = "diffusers.pipelines.wan.pipeline_wan_i2v.ftfy", "diffusers.pipelines.qwenimage.pipeline_qwenimage_edit"
    monkeypatch.setattr(wan, SimpleNamespace(fix_text=lambda text: text), raising=False)
    # it scales every picture to a million pixels
    monkeypatch.setattr(f"{edit}.calculate_dimensions", lambda *_: (32, 32, None))
