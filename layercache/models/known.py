"""Descriptions of diffusers' transformer classes."""

from __future__ import annotations

from typing import Any

from layercache.models import modulation
from layercache.models.spec import ModelSpec

_TWO_LISTS = ("transformer_blocks", "single_transformer_blocks")
_IMAGE_FIRST = ("image", "text")
_IMAGE = ("image",)
_CONTROLNET = ("controlnet_block_samples", "controlnet_single_block_samples")
_ATTENTION_TWICE = (("attn1",), ("attn2",))
_JOINT = (("attn",), ("ff",), ("ff_context",))
_THREE = (*_ATTENTION_TWICE, ("ff",))
_VIDEO_AND_SOUND = (
    *(("attn1",), ("audio_attn1",), ("attn2",), ("audio_attn2",)),
    *(("audio_to_video_attn",), ("video_to_audio_attn",), ("ff",), ("audio_ff",)),
)
_WAN: dict[str, Any] = {"modulation": modulation.table, "modules": {"blocks": (*_ATTENTION_TWICE, ("ffn",))}}
_FLUX_MODULES = {"transformer_blocks": _JOINT, "single_transformer_blocks": (("attn",), ("proj_mlp", "act_mlp"))}
_FLUX: dict[str, Any] = {"block_lists": _TWO_LISTS, "modulation": modulation.zero, "modules": _FLUX_MODULES}

SPECS = (
    ModelSpec(
        "QwenImageTransformer2DModel",
        adds=("controlnet_block_samples",),
        modulation=modulation.qwen,
        modules={"transformer_blocks": (("attn",), ("img_mlp",), ("txt_mlp",))},
    ),
    ModelSpec("FluxTransformer2DModel", adds=_CONTROLNET, **_FLUX),
    ModelSpec(
        "Flux2Transformer2DModel",
        adds=(),
        block_lists=_TWO_LISTS,
        joint={"single_transformer_blocks": ("text", "image")},
        modulation=modulation.flux2,
        modules={"transformer_blocks": _JOINT, "single_transformer_blocks": (("attn",),)},
    ),
    ModelSpec(
        "ChromaTransformer2DModel",
        block_lists=_TWO_LISTS,
        adds=_CONTROLNET,
        joint={"single_transformer_blocks": ("text", "image")},
        rewritten={"single_transformer_blocks": "controlnet_single_block_samples"},
        modulation=modulation.chroma,
        modules=_FLUX_MODULES,
    ),
    ModelSpec("LongCatImageTransformer2DModel", **_FLUX),
    ModelSpec(
        "OvisImageTransformer2DModel",
        block_lists=_TWO_LISTS,
        modulation=modulation.zero,
        # its act_mlp takes one half of proj_mlp's output
        modules={"transformer_blocks": _JOINT, "single_transformer_blocks": (("attn",), ("proj_mlp",))},
    ),
    ModelSpec(
        "BriaTransformer2DModel",
        rewritten={"single_transformer_blocks": "controlnet_single_block_samples"},
        **_FLUX,
    ),
    ModelSpec(
        "AuraFlowTransformer2DModel",
        block_lists=("joint_transformer_blocks", "single_transformer_blocks"),
        joint={"single_transformer_blocks": ("text", "image")},
        modulation=modulation.zero,
        modules={"joint_transformer_blocks": _JOINT, "single_transformer_blocks": (("attn",), ("ff",))},
    ),
    ModelSpec(
        "HiDreamImageTransformer2DModel",
        block_lists=("double_stream_blocks", "single_stream_blocks"),
        streams=_IMAGE_FIRST,
        joint={"single_stream_blocks": _IMAGE_FIRST},
        timestep="timesteps",
        modulation=modulation.hidream,
        modules={
            "double_stream_blocks": (("block.attn1",), ("block.ff_i",), ("block.ff_t",)),
            "single_stream_blocks": (("block.attn1",), ("block.ff_i",)),
        },
        differentiable=False,  # its experts run without gradients
    ),
    ModelSpec(
        "SD3Transformer2DModel",
        adds=("block_controlnet_hidden_states",),
        bypass=("skip_layers",),
        modulation=modulation.zero,
        modules={"transformer_blocks": (("attn",), ("attn2",), ("ff",), ("ff_context",))},
    ),
    ModelSpec(
        "CogView3PlusTransformer2DModel",
        streams=_IMAGE_FIRST,
        timestep=None,
        modulation=modulation.cogview3,
        modules={"transformer_blocks": (("attn1",), ("ff",))},
    ),
    ModelSpec(
        "CogView4Transformer2DModel",
        adds=(),
        streams=_IMAGE_FIRST,
        modulation=modulation.cogview4,
        # its feed-forward runs twice in a block, on the picture and on the text
        modules={"transformer_blocks": (("attn1",),)},
    ),
    ModelSpec("HunyuanImageTransformer2DModel", adds=(), streams=_IMAGE_FIRST, **_FLUX),
    ModelSpec("HunyuanVideoTransformer3DModel", adds=(), streams=_IMAGE_FIRST, **_FLUX),
    ModelSpec("HunyuanVideoFramepackTransformer3DModel", streams=_IMAGE_FIRST, **_FLUX),
    ModelSpec(
        "HunyuanVideo15Transformer3DModel",
        adds=(),
        streams=_IMAGE_FIRST,
        modulation=modulation.zero,
        modules={"transformer_blocks": _JOINT},
    ),
    ModelSpec(
        "CogVideoXTransformer3DModel",
        adds=(),
        streams=_IMAGE_FIRST,
        timestep=None,
        modulation=modulation.zero,
        modules={"transformer_blocks": (("attn1",), ("ff",))},
    ),
    ModelSpec(
        "MochiTransformer3DModel",
        adds=(),
        streams=_IMAGE_FIRST,
        timestep=None,
        modules={"transformer_blocks": (("attn1",), ("ff",), ("ff_context",))},
    ),
    ModelSpec(
        "LTX2VideoTransformer3DModel",
        streams=_IMAGE_FIRST,
        arguments=("hidden_states", "audio_hidden_states"),
        leaves=_IMAGE_FIRST,
        modules={"transformer_blocks": _VIDEO_AND_SOUND},
    ),
    ModelSpec("LTXVideoTransformer3DModel", adds=(), streams=_IMAGE, modules={"transformer_blocks": _THREE}),
    ModelSpec("WanTransformer3DModel", ("blocks",), _IMAGE, adds=(), **_WAN),
    ModelSpec("WanVACETransformer3DModel", ("blocks",), _IMAGE, **_WAN),
    ModelSpec("WanAnimateTransformer3DModel", ("blocks",), _IMAGE, couples=True, **_WAN),
    ModelSpec("ChronoEditTransformer3DModel", ("blocks",), _IMAGE, **_WAN),
    ModelSpec("SkyReelsV2Transformer3DModel", ("blocks",), _IMAGE, adds=(), **_WAN),
    ModelSpec(
        "Kandinsky5Transformer3DModel",
        ("visual_transformer_blocks",),
        _IMAGE,
        arguments=("visual_embed", "text_embed"),
        modulation=modulation.kandinsky,
        modules={"visual_transformer_blocks": (("self_attention",), ("cross_attention",), ("feed_forward",))},
    ),
    ModelSpec(
        "CosmosTransformer3DModel",
        streams=_IMAGE,
        timestep=None,
        modulation=modulation.cosmos,
        modules={"transformer_blocks": _THREE},
    ),
    ModelSpec(
        "ZImageTransformer2DModel",
        ("layers",),
        _IMAGE,
        adds=("controlnet_block_samples",),
        arguments=("x", "attn_mask"),
        timestep=None,
        modules={"layers": (("attention",), ("feed_forward",))},
    ),
    ModelSpec(
        "Lumina2Transformer2DModel",
        ("layers",),
        _IMAGE,
        timestep=None,
        modules={"layers": (("attn",), ("feed_forward",))},
    ),
    ModelSpec(
        "SanaTransformer2DModel",
        streams=_IMAGE,
        modulation=modulation.table,
        modules={"transformer_blocks": _THREE},
    ),
    ModelSpec(
        "PixArtTransformer2DModel",
        streams=_IMAGE,
        timestep=None,
        modulation=modulation.table,
        modules={"transformer_blocks": _THREE},
    ),
    ModelSpec(
        "DiTTransformer2DModel",
        streams=_IMAGE,
        timestep=None,
        modulation=modulation.zero,
        modules={"transformer_blocks": (("attn1",), ("ff",))},
    ),
    ModelSpec(
        "StableAudioDiTModel",
        streams=_IMAGE,
        timestep=None,
        modulation=modulation.plain,
        modules={"transformer_blocks": _THREE},
    ),
)
