"""Other caches on the bundled model: their results and decisions, and the operators that a cached step takes."""

from __future__ import annotations

from support.operators import Operators, touching
from support.tiny import generate

STEPS = 14


TOLERANCE = 1e-4


def peer(pipe, config, block):
    """Result and decisions of a diffusers hook: whether ``block`` ran, per call of the transformer."""
    ran = []
    module = pipe.transformer.transformer_blocks[block].attn
    hooks = [
        pipe.transformer.register_forward_pre_hook(lambda *_: ran.append(False)),
        module.register_forward_pre_hook(lambda *_: ran.__setitem__(-1, True)),
    ]
    pipe.transformer.enable_cache(config)
    try:
        result = generate(pipe, steps=STEPS)
    finally:
        pipe.transformer.disable_cache()
        for hook in hooks:
            hook.remove()
    return result, {"cond": tuple(ran[0::2]), "uncond": tuple(ran[1::2])}


def full_size_counts(pipe, module=None) -> tuple[list[int], list[int]]:
    """Operators as large as the image stream, and how many of them are ours, from one call of ``module`` to the next.

    ``module`` is the transformer unless given.
    """
    config, begins = pipe.transformer.config, []
    size = 64 * config.num_attention_heads * config.attention_head_dim
    with Operators() as operators:
        hook = (module or pipe.transformer).register_forward_pre_hook(
            lambda *_: begins.append(len(operators.seen)), prepend=True
        )
        try:
            generate(pipe, prompts=["cat"], steps=STEPS)
        finally:
            hook.remove()
    ends = [*begins[1:], len(operators.seen)]
    calls = [touching(operators.seen[a:b], size) for a, b in zip(begins, ends, strict=True)]
    return [len(call) for call in calls], [sum(bool(o.ours) for o in call) for call in calls]
