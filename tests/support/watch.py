"""What a run of the bundled model looks like from outside, for literal transcriptions of published rules."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import torch

import layercache
from support.tiny import generate

STEPS = 12


class Watch:
    """What plain hooks see of a run: per branch and step, as NumPy arrays in double precision."""

    def __init__(self, pipe, probe=1):
        self.pipe, self.probe = pipe, probe
        self.seen = defaultdict(lambda: defaultdict(list))
        self._calls = 0

    def note(self, name, tensor):
        self.seen["cond" if self._calls % 2 == 0 else "uncond"][name].append(tensor.double().numpy().copy())

    def __enter__(self):
        model = self.pipe.transformer
        first, last = model.transformer_blocks[0], model.transformer_blocks[self.probe - 1]

        def start(module, args, output):
            self.note("x", args[0])
            self.note("h0", output)
            self._start = output

        def temb(module, args, output):
            self.note("t", args[0])
            shift, scale, _ = first.img_mod(output).chunk(2, dim=-1)[0].chunk(3, dim=-1)
            normed = torch.nn.functional.layer_norm(self._start, self._start.shape[-1:], eps=1e-6)
            self.note("M", normed * (1 + scale[:, None]) + shift[:, None])

        def end(module, args, kwargs, output):
            self.note("v", output[0])
            self._calls += 1

        self._hooks = [
            model.time_text_embed.register_forward_hook(temb),
            model.img_in.register_forward_hook(start),
            last.register_forward_hook(lambda module, args, output: self.note("y", output[1])),
            model.norm_out.register_forward_pre_hook(lambda module, args: self.note("h", args[0])),
            model.register_forward_hook(end, with_kwargs=True),
        ]
        return self

    def __exit__(self, *exc):
        for hook in self._hooks:
            hook.remove()


def watched(pipe, method, probe=1, **call):
    with Watch(pipe, probe) as watch, layercache.enabled(pipe, method) as cache:
        result = generate(pipe, steps=STEPS, **call)
    return watch.seen, cache, result


def mean1(x):
    """Mean absolute value."""
    return np.abs(x).mean()
