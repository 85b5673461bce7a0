"""A TeaCache-style cache for any diffusers transformer with joint blocks, on layercache's primitives.

    python examples/teacache_in_40_lines.py

It watches the image stream in front of the blocks. While its relative changes add up to less than a threshold, the
blocks are passed by and their last residual is added instead.
"""

from __future__ import annotations

import torch

from layercache import backend
from layercache.demo.pipeline import load_demo_pipeline


class TeaStyleCache:
    def __init__(self, transformer, threshold: float = 0.1):
        self.blocks, self.threshold = transformer.transformer_blocks, threshold
        self.branches: dict[int, dict] = {}
        self.calls = self.skipped = 0
        transformer.transformer_blocks = torch.nn.ModuleList([self.Whole(self)])

    class Whole(torch.nn.Module):
        def __init__(self, cache):
            super().__init__()
            self.__dict__["cache"] = cache  # the blocks belong to the cache, not to this module

        def forward(self, hidden_states, encoder_hidden_states, **rest):
            cache, image, text = self.cache, hidden_states, encoder_hidden_states
            branch = cache.branches.setdefault(cache.calls % 2, {"sum": 0.0})  # guidance calls twice a step
            cache.calls += 1
            if "input" in branch:
                branch["sum"] += float(backend.change(branch["input"], image))
            branch["input"] = image.clone()
            if "residual" in branch and branch["sum"] < cache.threshold:
                cache.skipped += 1
                return text, backend.apply_residual(image, branch["residual"])
            for block in cache.blocks:
                text, image = block(hidden_states=image, encoder_hidden_states=text, **rest)
            (branch["residual"],) = backend.capture([image], [hidden_states])
            branch["sum"] = 0.0
            return text, image


def main() -> None:
    pipe = load_demo_pipeline("cpu")
    call = {"num_inference_steps": 30, "guidance_scale": 4.0, "output_type": "np", "return_dict": False}
    full = pipe(["cat"], generator=torch.Generator().manual_seed(0), **call)[0]
    cache = TeaStyleCache(pipe.transformer)
    cached = pipe(["cat"], generator=torch.Generator().manual_seed(0), **call)[0]
    error = float(((full - cached) ** 2).mean())
    print(f"{cache.skipped} of {cache.calls} forwards skipped, PSNR {-10 * torch.tensor(error).log10():.1f} dB")


if __name__ == "__main__":
    main()
