"""The bundled demonstration model: a small class-conditional Qwen-Image transformer in pixel space.

The transformer is the real ``diffusers`` class, only narrower: 16 double-stream blocks of width
112 on 32x32 RGB pictures cut into patches of 4x4 pixels. "Text" is one learned sequence of tokens
per photograph, plus one for the null class that classifier-free guidance needs.
"""

from __future__ import annotations

import torch
from diffusers import ConfigMixin, ModelMixin, QwenImageTransformer2DModel
from diffusers.configuration_utils import register_to_config
from torch import nn

IMAGE_SIZE = 32
PATCH_SIZE = 4
CHANNELS = 3
TEXT_TOKENS = 4
TEXT_DIM = 64

CLASS_NAMES = (
    "astronaut",
    "cat",
    "coffee",
    "rocket",
    "galaxies",
    "retina",
    "temple",
    "flower",
    "photographer",
    "bricks",
    "grass",
    "gravel",
)
NULL_CLASS = len(CLASS_NAMES)

TRANSFORMER_CONFIG = {
    "patch_size": PATCH_SIZE,
    "in_channels": CHANNELS * PATCH_SIZE**2,
    "out_channels": CHANNELS,
    "num_layers": 16,
    "attention_head_dim": 28,
    "num_attention_heads": 4,
    "joint_attention_dim": TEXT_DIM,
    "axes_dims_rope": (4, 12, 12),
}


class ClassEncoder(ModelMixin, ConfigMixin):
    """Turns class numbers into the token sequence the transformer reads as its prompt.

    ``class_ids [B] int64 -> [B, tokens, dim]``; class ``num_classes`` is the null class.
    """

    @register_to_config
    def __init__(self, num_classes: int = NULL_CLASS, tokens: int = TEXT_TOKENS, dim: int = TEXT_DIM):
        super().__init__()
        self.embedding = nn.Embedding(num_classes + 1, tokens * dim)

    def forward(self, class_ids: torch.Tensor) -> torch.Tensor:
        return self.embedding(class_ids).unflatten(-1, (self.config.tokens, self.config.dim))


def pack_patches(pictures: torch.Tensor, patch_size: int = PATCH_SIZE) -> torch.Tensor:
    """``[B, C, H, W] -> [B, (H/p)*(W/p), C*p*p]``: the token layout the transformer reads and writes."""
    b, c, h, w = pictures.shape
    p = patch_size
    grid = pictures.reshape(b, c, h // p, p, w // p, p)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(b, (h // p) * (w // p), c * p * p)


def unpack_patches(tokens: torch.Tensor, height: int, width: int, patch_size: int = PATCH_SIZE) -> torch.Tensor:
    """The inverse of :func:`pack_patches` for a picture of ``height x width`` pixels."""
    b, p = tokens.shape[0], patch_size
    grid = tokens.reshape(b, height // p, width // p, -1, p, p)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(b, -1, height, width)


def new_models(
    num_layers: int | None = None, num_heads: int | None = None
) -> tuple[QwenImageTransformer2DModel, ClassEncoder]:
    """Freshly initialised transformer and class encoder, ready to be trained.

    The shipped model's depth and width unless others are given; a head is 28 wide.

    Modulation and output layers start at zero, so that every block starts as the identity.
    """
    config = dict(TRANSFORMER_CONFIG)
    if num_layers is not None:
        config["num_layers"] = num_layers
    if num_heads is not None:
        config["num_attention_heads"] = num_heads
    transformer = QwenImageTransformer2DModel(**config)
    zeroed = [transformer.norm_out.linear, transformer.proj_out]
    for block in transformer.transformer_blocks:
        zeroed += [block.img_mod[1], block.txt_mod[1]]
    for layer in zeroed:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return transformer, ClassEncoder()
