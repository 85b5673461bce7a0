"""What is measured: every form of every op beside the usual PyTorch for the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from layercache import ops
from layercache.errors import OpInputError

TEXT_ROWS = 512  # of the second stream, at most an eighth of the first

Run = Callable[["Inputs"], Any]


@dataclass
class Inputs:
    """Memory of one call: random tensors of the case's shape, and what its ops write to.

    Attributes:
        x: tensors [batch, rows, channels].
        text: as many of a second, shorter stream.
        gate: [batch, 1, channels].
        out: tensors to write to.
        extra: whatever else a case prepared.
    """

    x: list[Tensor]
    text: list[Tensor]
    gate: Tensor
    out: list[Tensor]
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One form of an op.

    Attributes:
        name: of the form.
        op: name in ``layercache.ops``.
        tensors: inputs of full size.
        ours, eager: the op, and the usual PyTorch (methods.md §15.2, "Unfused"); both return tensors to compare.
        passes: full-size tensors that must be moved, in S of methods.md §15.
        outputs: full-size tensors written to.
        prepare: adds to the inputs.
        text: the second stream takes part.
        gradient: runs with grad mode on.
        compiled: makes the variant for torch.compile, where that is not the compiled ``eager``.
    """

    name: str
    op: str
    tensors: int
    ours: Run
    eager: Run
    passes: float
    outputs: int = 0
    prepare: Callable[[Inputs], None] | None = None
    text: bool = False
    gradient: bool = False
    compiled: Callable[[], Run] | None = None

    def compile(self) -> Run:
        """The eager spelling under torch.compile."""
        return torch.compile(self.eager, fullgraph=True) if self.compiled is None else self.compiled()

    def inputs(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, seed: int = 0) -> Inputs:
        """Random inputs, never zeros."""
        generator = torch.Generator(device).manual_seed(seed)
        batch, rows, channels = shape

        def new(rows: int) -> Tensor:
            return torch.randn(batch, rows, channels, generator=generator, device=device).to(dtype)

        short = max(1, min(TEXT_ROWS, rows // 8))
        inputs = Inputs(
            x=[new(rows) for _ in range(self.tensors)],
            text=[new(short) for _ in range(self.tensors)] if self.text else [],
            gate=new(1),
            out=[new(rows) for _ in range(self.outputs)],
        )
        if self.prepare is not None:
            self.prepare(inputs)
        return inputs

    def bytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """Bytes that must be moved."""
        batch, rows, channels = shape
        if self.text:
            rows += max(1, min(TEXT_ROWS, rows // 8))
        return round(self.passes * batch * rows * channels * dtype.itemsize)


def _mean_change(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).abs().mean() / b.abs().mean()


def _ours_change(i: Inputs) -> Tensor:
    s = ops.pair_statistics([i.x[0]], [i.x[1]])[0]
    return s[0] / s[2]


def _eager_pair(i: Inputs) -> Tensor:
    a, b = i.x[:2]
    relative_l2 = (a - b).norm() / b.norm()
    cosine = (a * b).sum() / (a.norm() * b.norm())
    return torch.stack([_mean_change(a, b).float(), relative_l2.float(), cosine.float()])


def _ours_pair(i: Inputs) -> Tensor:
    s = ops.pair_statistics([i.x[0]], [i.x[1]])[0]
    return torch.stack([s[0] / s[2], (s[3] / s[5]).sqrt(), s[6] / (s[4] * s[5]).sqrt()])


def _ours_capture(i: Inputs) -> Tensor:
    s = ops.capture([i.x[0]], [i.x[1]], i.out[:1], None, [i.x[2]])
    assert s is not None
    return s[0, 2] / s[0, 4]


def _eager_capture(i: Inputs) -> Tensor:
    torch.sub(i.x[0], i.x[1], out=i.out[0])
    return _mean_change(i.out[0], i.x[2])


def _eager_sum(i: Inputs, coefficients: Sequence[float]) -> Tensor:
    y = i.x[0]
    for r, c in zip(i.x[1:], coefficients, strict=True):
        y = y + c * r
    return y


def _eager_update(i: Inputs) -> list[Tensor]:
    new = [i.x[0].clone()]
    for old in i.x[1:]:
        new.append((new[-1] - old) / 3.0)
    return new


def _ours_update(i: Inputs) -> list[Tensor]:
    order = len(i.x) - 1
    # the old ones are read from the inputs, so that a repetition does the same again
    rows: list[list[float | None]] = [[1.0, *([None] * order)]]
    factors = [1.0]
    for q in range(order):
        rows.append([None if c is None else c * factors[-1] for c in rows[-1]])
        rows[-1][q + 1] = -1.0
        factors.append(1 / 3.0)
    ops.linear_map([i.x], [i.out], rows, factors)
    return i.out


def _eager_eval(i: Inputs, coefficients: Sequence[float]) -> Tensor:
    total = torch.zeros_like(i.x[0])
    for f, c in zip(i.x, coefficients, strict=True):
        total = total + c * f
    return total


def _eager_velocity(i: Inputs) -> Tensor:
    v, x, x_b, v_b = i.x
    return v + 0.8 * ((x - x_b) * 1.25 - v_b)


def _eager_align(i: Inputs) -> Tensor:
    x, y, p_a, p_b, r_a, r_b = i.x
    gamma = ((y - x - p_b).abs().mean() / (p_a - p_b).abs().mean()).clip(1, 1.5)
    return x + r_b + gamma * (r_a - r_b)


def _eager_errors(i: Inputs) -> Tensor:
    target, anchor, *older = i.x
    norms = [target.abs().mean()]
    for k, r in enumerate(older):
        norms.append(((1.5 + 0.1 * k) * anchor - (0.5 + 0.1 * k) * r - target).abs().mean())
    return torch.stack(norms[1:]) / norms[0]


def _ours_errors(i: Inputs) -> Tensor:
    target, *terms = i.x
    count = len(terms) - 1
    sets = [[1.5 + 0.1 * k, *(-(0.5 + 0.1 * k) * (j == k) for j in range(count))] for k in range(count)]
    s = ops.combination_error(target, terms, sets)
    return s[:, 0] / s[:, 2]


def _eager_gram(i: Inputs) -> Tensor:
    return torch.stack([(a * b).sum(dtype=torch.float32) for k, a in enumerate(i.x) for b in i.x[k:]])


def _ours_gram(i: Inputs) -> Tensor:
    g = ops.gram(i.x)
    return torch.stack([g[k, j] for k in range(len(i.x)) for j in range(k, len(i.x))])


def _eager_lerp(i: Inputs) -> Tensor:
    return i.extra["beta"] * i.x[0] + (1 - i.extra["beta"]) * i.x[1]


def _lerp_of(fresh: Tensor, i: Inputs) -> Tensor:
    return (i.extra["beta"] * fresh + (1 - i.extra["beta"]) * i.x[1]).to(fresh.dtype)


def _backward(run: Callable[[Tensor, Inputs], Tensor]) -> Run:
    def step(i: Inputs) -> list[Tensor]:
        fresh, beta = i.x[0].detach().requires_grad_(), i.extra["beta"].detach().requires_grad_()
        out = run(fresh, Inputs(i.x, i.text, i.gate, i.out, {"beta": beta}))
        return list(torch.autograd.grad(out, [fresh, beta], i.x[2]))

    return step


def _beta(i: Inputs) -> None:
    i.extra["beta"] = torch.full((1,), 0.3, device=i.gate.device)


def _eager_modulate(i: Inputs) -> Tensor:
    z = torch.nn.functional.layer_norm(i.x[0], i.x[0].shape[-1:], eps=1e-6)
    return z * (1 + i.gate) + i.gate


def _eager_metric(i: Inputs) -> list[Tensor]:
    z = _eager_modulate(i)
    return [z, _mean_change(z, i.x[1]).float()]


def _ours_metric(i: Inputs) -> list[Tensor]:
    z, s = ops.modulate(i.x[0], i.gate, i.gate, previous=i.x[1])
    assert s is not None
    return [z, s[0, 0] / s[0, 2]]


def _eager_guidance(i: Inputs) -> Tensor:
    cond, uncond = i.x
    v = uncond + 4.0 * (cond - uncond)
    return v * (cond.norm(dim=-1, keepdim=True) / v.norm(dim=-1, keepdim=True))


def _eager_rows(i: Inputs) -> Tensor:
    a, b = i.x
    ratio = a.norm(dim=-1) / b.norm(dim=-1)
    angle = 1 - torch.nn.functional.cosine_similarity(a, b, dim=-1)
    return torch.stack([ratio.float().mean(), angle.float().mean()])


def _codes(i: Inputs) -> None:
    """fp8 codes of the second tensor, and room for those of a capture."""
    x = i.x[0]
    for name in ("codes", "written"):
        i.extra[name] = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
        i.extra[name + " scales"] = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    ops.capture_compact([i.x[1]], [torch.zeros_like(x)], [i.extra["codes"]], [i.extra["codes scales"]])


def _ours_compact(i: Inputs) -> Tensor:
    ops.capture_compact(i.x[:1], i.x[1:2], [i.extra["written"]], [i.extra["written scales"]])
    return i.extra["written scales"]


def _eager_compact(i: Inputs) -> Tensor:
    r = i.x[0].float() - i.x[1].float()
    scale = torch.exp2(torch.ceil(torch.log2(r.abs().amax(-1) / 448)))
    i.extra["written"].copy_((r / scale[..., None]).to(torch.float8_e4m3fn).view(torch.uint8))
    return scale


def _ours_codes(i: Inputs) -> Tensor:
    return ops.linear_combination([i.x[0]], [[i.extra["codes"]]], [1.0], scales=[[i.extra["codes scales"]]])[0]


def _eager_codes(i: Inputs) -> Tensor:
    decoded = i.extra["codes"].view(torch.float8_e4m3fn).to(i.x[0].dtype)
    return i.x[0] + decoded * i.extra["codes scales"][..., None].to(i.x[0].dtype)


def _ours_slope(i: Inputs) -> list[Tensor]:
    ops.capture_slope(i.x[0], i.x[1], i.x[2], i.out[0], i.out[1], 4.0)
    return i.out


def _eager_slope(i: Inputs) -> list[Tensor]:
    r = i.x[0] - i.x[1]
    return [r, (r - i.x[2]) * 4.0]


def _ours_plain_capture(i: Inputs) -> list[Tensor]:
    written = i.out[:1] + i.text[2:3]
    ops.capture(i.x[:1] + i.text[:1], i.x[1:2] + i.text[1:2], written)
    return written


def _eager_plain_capture(i: Inputs) -> list[Tensor]:
    return [i.x[0] - i.x[1], *([i.text[0] - i.text[1]] if i.text else [])]


def _ours_reuse(i: Inputs) -> list[Tensor]:
    if not i.text:
        return ops.linear_combination(i.x[:1], [i.x[1:]], [1.0, -0.03])
    return ops.linear_combination([i.x[0], i.text[0]], [i.x[1:], i.text[1:]], [1.0, -0.03])


def _eager_reuse(i: Inputs) -> list[Tensor]:
    streams = [i.x, i.text] if i.text else [i.x]
    return [x + r + -0.03 * j for x, r, j in streams]


_EIGHT = [1.0, -0.5, 0.25, -0.125, 0.5, -0.25, 0.125, -0.0625]

CASES: tuple[Case, ...] = (
    Case("capture", "capture", 2, _ours_plain_capture, _eager_plain_capture, 3, outputs=1),
    Case("capture, two streams", "capture", 3, _ours_plain_capture, _eager_plain_capture, 3, outputs=1, text=True),
    Case("capture with statistics", "capture", 3, _ours_capture, _eager_capture, 4, outputs=1),
    Case("capture with slope", "linear_map", 3, _ours_slope, _eager_slope, 5, outputs=2),
    Case("relative L1", "pair_statistics", 2, _ours_change, lambda i: _mean_change(i.x[0], i.x[1]), 2),
    Case("pair statistics", "pair_statistics", 2, _ours_pair, _eager_pair, 2),
    Case(
        "reuse",
        "linear_combination",
        2,
        lambda i: ops.linear_combination(i.x[:1], [i.x[1:]], [1.0]),
        lambda i: i.x[0] + i.x[1],
        3,
    ),
    Case("JVP reuse", "linear_combination", 3, _ours_reuse, _eager_reuse, 4),
    Case("JVP reuse, two streams", "linear_combination", 3, _ours_reuse, _eager_reuse, 4, text=True),
    Case(
        "eight terms",
        "linear_combination",
        9,
        lambda i: ops.linear_combination(i.x[:1], [i.x[1:]], _EIGHT),
        lambda i: _eager_sum(i, _EIGHT),
        10,
    ),
    Case(
        "gated reuse",
        "linear_combination",
        2,
        lambda i: ops.linear_combination(i.x[:1], [i.x[1:]], [1.0], gates=[i.gate]),
        lambda i: i.x[0] + i.gate * i.x[1],
        3,
    ),
    Case(
        "finite difference",
        "linear_map",
        2,
        lambda i: ops.finite_difference(i.x[0], i.x[1], 4.0),
        lambda i: (i.x[0] - i.x[1]) * 4.0,
        3,
    ),
    Case("Taylor update, order 1", "linear_map", 2, _ours_update, _eager_update, 4, outputs=2),
    Case("Taylor update, order 2", "linear_map", 3, _ours_update, _eager_update, 6, outputs=3),
    Case(
        "Taylor forecast, order 1",
        "linear_map",
        2,
        lambda i: ops.taylor_forecast(i.x, [1.0, 2.0]),
        lambda i: _eager_eval(i, [1.0, 2.0]),
        3,
    ),
    Case(
        "Taylor forecast, order 2",
        "linear_map",
        3,
        lambda i: ops.taylor_forecast(i.x, [1.0, 2.0, 2.0]),
        lambda i: _eager_eval(i, [1.0, 2.0, 2.0]),
        4,
    ),
    Case(
        "mean velocity",
        "linear_map",
        4,
        lambda i: ops.mean_velocity(i.x[0], i.x[1], i.x[2], i.x[3], 1.25, 0.8)[0],
        _eager_velocity,
        5,
    ),
    Case("alignment", "align", 6, lambda i: ops.align(i.x[0], i.x[1], i.x[2:4], i.x[4:]), _eager_align, 8),
    Case("errors of ten spans", "combination_error", 12, _ours_errors, _eager_errors, 12),
    Case("Gram matrix of four", "gram", 4, _ours_gram, _eager_gram, 4),
    Case(
        "router lerp",
        "router_lerp",
        2,
        lambda i: ops.router_lerp(i.x[0], i.x[1], i.extra["beta"]),
        _eager_lerp,
        3,
        prepare=_beta,
    ),
    Case(
        "router lerp with gradient",
        "router_lerp",
        3,
        _backward(lambda fresh, i: ops.router_lerp(fresh, i.x[1], i.extra["beta"])),
        _backward(_lerp_of),
        7,
        prepare=_beta,
        gradient=True,
        compiled=lambda: _backward(torch.compile(_lerp_of, fullgraph=True)),
    ),
    Case("modulate", "modulate", 1, lambda i: ops.modulate(i.x[0], i.gate, i.gate)[0], _eager_modulate, 2),
    Case("modulate with metric", "modulate", 2, _ours_metric, _eager_metric, 3),
    Case(
        "reuse and modulate",
        "modulate",
        2,
        lambda i: ops.modulate(i.x[0], i.gate, i.gate, residuals=i.x[1:], coefficients=[1.0])[0],
        lambda i: _eager_modulate(Inputs([i.x[0] + i.x[1]], [], i.gate, [])),
        3,
    ),
    Case(
        "guidance with norm",
        "combine_guidance",
        2,
        lambda i: ops.combine_guidance(i.x[0], i.x[1], 4.0, True),
        _eager_guidance,
        3,
    ),
    Case("row statistics", "row_statistics", 2, lambda i: ops.row_statistics(i.x[0], i.x[1])[0, ::2], _eager_rows, 2),
    Case("compact capture", "capture_compact", 2, _ours_compact, _eager_compact, 2.5, prepare=_codes),
    Case("compact reuse", "linear_combination", 2, _ours_codes, _eager_codes, 2.5, prepare=_codes),
)


def find_cases(names: Sequence[str] = ()) -> list[Case]:
    """Cases whose name or op is, or begins with, one of ``names``; all without names.

    Raises:
        OpInputError: a name fits no case.
    """
    if not names:
        return list(CASES)
    found = []
    for name in names:
        fits = [case for case in CASES if name in (case.op, case.name) or case.name.lower().startswith(name.lower())]
        if not fits:
            known = ", ".join(sorted({case.op for case in CASES}))
            raise OpInputError(f"there is no benchmark of {name!r}; the ops are {known}")
        found += [case for case in fits if case not in found]
    return found


def relative_error(found: Any, expected: Any) -> float:
    """The largest norm of a difference over the norm of what was expected, over all tensors."""
    pairs = zip(_tensors(found), _tensors(expected), strict=True)
    errors = [((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)).item() for a, b in pairs]
    return max(math.inf if math.isnan(e) else e for e in errors)


def _tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)
