"""What is measured: every form of every op beside the usual PyTorch for the same."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from layercache import ops
from layercache.errors import OpInputError
from layercache.tools.bench.case import Case, Inputs, Run

# --- capture -----------------------------------------------------------------------------------------------


def _ours_capture(i: Inputs) -> list[Tensor]:
    written = [*i.out[:1], *i.text[2:3]]
    ops.capture([i.x[0], *i.text[:1]], [i.x[1], *i.text[1:2]], written)
    return written


def _eager_capture(i: Inputs) -> list[Tensor]:
    return [i.x[0] - i.x[1], *([i.text[0] - i.text[1]] if i.text else [])]


def _ours_change(i: Inputs) -> list[Tensor]:
    """Stored and compared with what was stored before."""
    written, before = [*i.out[:1], *i.text[3:4]], [i.x[2], *i.text[2:3]]
    statistics = ops.capture([i.x[0], *i.text[:1]], [i.x[1], *i.text[1:2]], written, None, before)
    assert statistics is not None
    return [*written, statistics]


def _derive_change(result: list[Tensor], i: Inputs) -> list[Tensor]:
    *written, sums = result
    means = [sums[s, k] / r.numel() for s, r in enumerate(written) for k in (2, 4)]
    return [*written, *means]


def _eager_change(i: Inputs) -> list[Tensor]:
    streams = [(*i.x[:3], i.out[0]), *([(*i.text[:3], i.text[3])] if i.text else [])]
    means = []
    for output, before, previous, written in streams:
        torch.sub(output, before, out=written)
        means += _mean_change(written, previous)
    return [*(written for *_, written in streams), *means]


def _mean_change(a: Tensor, b: Tensor, dims: tuple[int, ...] = (0, 1, 2)) -> list[Tensor]:
    """What the relative change is made of: subtract, abs, mean, abs, mean."""
    return [(a - b).abs().mean(dims), b.abs().mean(dims)]


def _ours_norms(i: Inputs) -> list[Tensor]:
    statistics = ops.capture(i.x[:1], i.x[1:2], i.out, statistics=True)
    assert statistics is not None
    return [*i.out, statistics]


def _derive_norms(result: list[Tensor], i: Inputs) -> list[Tensor]:
    written, sums = result
    return [written, *(sums[0, ::2] / written.numel()), *sums[0, 1::2].sqrt()]


def _eager_norms(i: Inputs) -> list[Tensor]:
    r = i.x[0] - i.x[1]
    return [r, r.abs().mean(), i.x[1].abs().mean(), r.norm(), i.x[1].norm()]


def _ours_slope(i: Inputs) -> list[Tensor]:
    ops.capture_slope(i.x[0], i.x[1], i.x[2], i.out[0], i.out[1], 4.0)
    return i.out


def _eager_slope(i: Inputs) -> list[Tensor]:
    r = i.x[0] - i.x[1]
    return [r, (r - i.x[2]) * 4.0]


# --- statistics --------------------------------------------------------------------------------------------


def _ours_pair(i: Inputs) -> Tensor:
    return ops.pair_statistics(i.x[:1], i.x[1:2])


def _derive_pair(sums: Tensor, i: Inputs) -> list[Tensor]:
    s = sums[0]
    return [s[0] / i.x[0].numel(), s[2] / i.x[0].numel(), s[3].sqrt(), s[5].sqrt(), s[6], s[4].sqrt()]


def _eager_pair(i: Inputs) -> list[Tensor]:
    """Relative L1, relative L2, cosine, each on its own; a ratio of magnitudes would only use their parts."""
    a, b = i.x
    return [*_mean_change(a, b), (a - b).norm(), b.norm(), (a * b).sum(), a.norm()]


def _eager_errors(i: Inputs) -> Tensor:
    target, anchor, *older = i.x
    means = [target.abs().mean()]
    for k, r in enumerate(older):
        means.append(((1.5 + 0.1 * k) * anchor - (0.5 + 0.1 * k) * r - target).abs().mean())
    return torch.stack(means)


def _ours_errors(i: Inputs) -> Tensor:
    target, *terms = i.x
    count = len(terms) - 1
    sets = [[1.5 + 0.1 * k, *(-(0.5 + 0.1 * k) * (j == k) for j in range(count))] for k in range(count)]
    return ops.combination_error(target, terms, sets)


def _eager_gram(i: Inputs) -> Tensor:
    return torch.stack([(a * b).sum(dtype=torch.float32) for k, a in enumerate(i.x) for b in i.x[k:]])


def _eager_align(i: Inputs) -> Tensor:
    x, y, p_a, p_b, r_a, r_b = i.x
    gamma = ((y - x - p_b).abs().mean() / (p_a - p_b).abs().mean()).clip(1, 1.5)
    return x + r_b + gamma * (r_a - r_b)


def _eager_rows(i: Inputs) -> list[Tensor]:
    a, b = i.x
    ratio = (a.norm(dim=-1) / b.norm(dim=-1)).float()
    angle = 1 - torch.nn.functional.cosine_similarity(a, b, dim=-1)
    return [ratio.mean(), ratio.std(), angle.float().mean()]


# --- linear combinations -----------------------------------------------------------------------------------


def _ours_reuse(coefficients: list[float]) -> Run:
    def run(i: Inputs) -> list[Tensor]:
        streams = [i.x, i.text] if i.text else [i.x]
        return ops.linear_combination([s[0] for s in streams], [s[1:] for s in streams], coefficients)

    return run


def _eager_reuse(coefficients: list[float]) -> Run:
    def run(i: Inputs) -> list[Tensor]:
        return [_added(stream, coefficients) for stream in ([i.x, i.text] if i.text else [i.x])]

    return run


def _added(tensors: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    y = tensors[0]
    for r, c in zip(tensors[1:], coefficients, strict=True):
        y = y + (r if c == 1 else c * r)
    return y


def _ours_update(i: Inputs) -> list[Tensor]:
    # `taylor_update` to other memory than it reads, so that every repetition does the same
    rows: list[list[float | None]] = [[1.0, *([None] * (len(i.x) - 1))]]
    factors = [1.0]
    for q in range(len(i.x) - 1):
        rows.append([None if c is None else c * factors[-1] for c in rows[-1]])
        rows[-1][q + 1] = -1.0
        factors.append(1 / 3.0)
    ops.linear_map([i.x], [i.out], rows, factors)
    return i.out


def _eager_update(i: Inputs) -> list[Tensor]:
    new = [i.x[0].clone()]
    for old in i.x[1:]:
        new.append((new[-1] - old) / 3.0)
    return new


def _eager_forecast(tensors: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    total = torch.zeros_like(tensors[0])
    for f, c in zip(tensors, coefficients, strict=True):
        total = total + c * f
    return total


def _eager_velocity(i: Inputs) -> Tensor:
    v, x, x_b, v_b = i.x
    return v + 0.8 * ((x - x_b) * 1.25 - v_b)


def _eager_velocity_step(i: Inputs) -> list[Tensor]:
    u = _eager_velocity(i)
    return [u, i.x[1] - 0.25 * u]


# --- router ------------------------------------------------------------------------------------------------


def _beta(i: Inputs) -> None:
    i.extra["beta"] = torch.full((1,), 0.3, device=i.gate.device)


def _halved(i: Inputs) -> None:
    """Less of the cached output, so that the gradient of beta is not a difference of equal sums."""
    _beta(i)
    i.x[1].mul_(0.5)


def _eager_lerp(i: Inputs) -> Tensor:
    beta = i.extra["beta"][0]
    return beta * i.x[0] + (1 - beta) * i.x[1]


def _backward(lerp: Run) -> Run:
    def step(i: Inputs) -> list[Tensor]:
        fresh, beta = i.x[0].detach().requires_grad_(), i.extra["beta"].detach().requires_grad_()
        out = lerp(Inputs([fresh, i.x[1]], [], i.gate, [], {"beta": beta}))
        return list(torch.autograd.grad(out, [fresh, beta], i.x[2]))

    return step


# --- rows --------------------------------------------------------------------------------------------------


def _modulated(x: Tensor, i: Inputs) -> Tensor:
    z = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6)
    return z * (1 + i.gate) + i.gate


def _eager_metric(i: Inputs) -> list[Tensor]:
    z = _modulated(i.x[0], i)
    return [z, *_mean_change(z, i.x[1])]


def _derive_metric(result: tuple[Tensor, Tensor], i: Inputs) -> list[Tensor]:
    z, sums = result
    return [z, *(sums[0, 0:3:2] / z.numel())]


def _eager_guidance(i: Inputs) -> Tensor:
    cond, uncond = i.x
    v = uncond + 4.0 * (cond - uncond)
    return v * (cond.norm(dim=-1, keepdim=True) / v.norm(dim=-1, keepdim=True))


# --- compact storage ---------------------------------------------------------------------------------------


def _codes(i: Inputs) -> None:
    """fp8 codes of the second tensor, and room for those of a capture."""
    x = i.x[0]
    for name in ("codes", "written"):
        i.extra[name] = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
        i.extra[name + " scales"] = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    ops.capture_compact([i.x[1]], [torch.zeros_like(x)], [i.extra["codes"]], [i.extra["codes scales"]])


def _ours_compact(i: Inputs) -> list[Tensor]:
    ops.capture_compact(i.x[:1], i.x[1:], [i.extra["written"]], [i.extra["written scales"]])
    return [i.extra["written"], i.extra["written scales"]]


def _eager_compact(i: Inputs) -> list[Tensor]:
    r = i.x[0].float() - i.x[1].float()
    scale = torch.exp2(torch.ceil(torch.log2(r.abs().amax(-1) / 448)))
    return [(r / scale[..., None]).to(torch.float8_e4m3fn).view(torch.uint8), scale]


def _ours_codes(i: Inputs) -> list[Tensor]:
    return ops.linear_combination([i.x[0]], [[i.extra["codes"]]], [1.0], scales=[[i.extra["codes scales"]]])


def _eager_codes(i: Inputs) -> Tensor:
    decoded = i.extra["codes"].view(torch.float8_e4m3fn).to(i.x[0].dtype)
    return i.x[0] + decoded * i.extra["codes scales"][..., None].to(i.x[0].dtype)


_EIGHT = [1.0, -0.5, 0.25, -0.125, 0.5, -0.25, 0.125, -0.0625]
_JVP = [1.0, -0.25]

CASES: tuple[Case, ...] = (
    Case("capture", "capture", 2, _ours_capture, _eager_capture, 3, outputs=1),
    Case("capture, two streams", "capture", 3, _ours_capture, _eager_capture, 3, outputs=1, text=True),
    Case("capture and change", "capture", 3, _ours_change, _eager_change, 4, outputs=1, derive=_derive_change),
    Case(
        "capture and change, two streams",
        "capture",
        4,
        _ours_change,
        _eager_change,
        4,
        outputs=1,
        derive=_derive_change,
        text=True,
    ),
    Case("capture and norms", "capture", 2, _ours_norms, _eager_norms, 3, outputs=1, derive=_derive_norms),
    Case("capture and slope", "linear_map", 3, _ours_slope, _eager_slope, 5, outputs=2),
    Case("compact capture", "capture_compact", 2, _ours_compact, _eager_compact, 2, codes=1, prepare=_codes),
    Case(
        "relative change",
        "pair_statistics",
        2,
        _ours_pair,
        lambda i: _mean_change(i.x[0], i.x[1]),
        2,
        derive=lambda sums, i: _derive_pair(sums, i)[:2],
    ),
    Case("pair statistics", "pair_statistics", 2, _ours_pair, _eager_pair, 2, derive=_derive_pair),
    Case(
        "relative change per sample",
        "pair_statistics",
        2,
        lambda i: ops.pair_statistics(i.x[:1], i.x[1:], per_sample=True),
        lambda i: _mean_change(i.x[0], i.x[1], dims=(1, 2)),
        2,
        derive=lambda sums, i: [sums[:, 0] / i.x[0][0].numel(), sums[:, 2] / i.x[0][0].numel()],
    ),
    Case(
        "row statistics",
        "row_statistics",
        2,
        lambda i: ops.row_statistics(i.x[0], i.x[1]),
        _eager_rows,
        2,
        derive=lambda sums, i: list(sums[0]),
    ),
    Case(
        "errors of ten spans",
        "combination_error",
        12,
        _ours_errors,
        _eager_errors,
        12,
        derive=lambda sums, i: torch.cat([sums[:1, 2], sums[:, 0]]) / i.x[0].numel(),
    ),
    Case(
        "Gram matrix of four",
        "gram",
        4,
        lambda i: ops.gram(i.x),
        _eager_gram,
        4,
        derive=lambda g, i: torch.stack([g[k, j] for k in range(4) for j in range(k, 4)]),
    ),
    Case("reuse", "linear_combination", 2, _ours_reuse([1.0]), _eager_reuse([1.0]), 3),
    Case("reuse, two streams", "linear_combination", 2, _ours_reuse([1.0]), _eager_reuse([1.0]), 3, text=True),
    Case("JVP reuse", "linear_combination", 3, _ours_reuse(_JVP), _eager_reuse(_JVP), 4),
    Case("JVP reuse, two streams", "linear_combination", 3, _ours_reuse(_JVP), _eager_reuse(_JVP), 4, text=True),
    Case("eight terms", "linear_combination", 9, _ours_reuse(_EIGHT), _eager_reuse(_EIGHT), 10),
    Case(
        "gated reuse",
        "linear_combination",
        2,
        lambda i: ops.linear_combination(i.x[:1], [i.x[1:]], [1.0], gates=[i.gate]),
        lambda i: i.x[0] + i.gate * i.x[1],
        3,
    ),
    Case("compact reuse", "linear_combination", 2, _ours_codes, _eager_codes, 2, codes=1, prepare=_codes),
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
        lambda i: _eager_forecast(i.x, [1.0, 2.0]),
        3,
    ),
    Case(
        "Taylor forecast, order 2",
        "linear_map",
        3,
        lambda i: ops.taylor_forecast(i.x, [1.0, 2.0, 2.0]),
        lambda i: _eager_forecast(i.x, [1.0, 2.0, 2.0]),
        4,
    ),
    Case(
        "gated Taylor forecast",
        "linear_combination",
        3,
        lambda i: ops.add_forecast(i.x[0], i.x[1:], [1.0, 2.0], i.gate),
        lambda i: i.x[0] + i.gate * _eager_forecast(i.x[1:], [1.0, 2.0]),
        4,
    ),
    Case(
        "mean velocity",
        "linear_map",
        4,
        lambda i: ops.mean_velocity(i.x[0], i.x[1], i.x[2], i.x[3], inverse_step=1.25, weight=0.8)[0],
        _eager_velocity,
        5,
    ),
    Case(
        "mean velocity and step",
        "linear_map",
        4,
        lambda i: ops.mean_velocity(i.x[0], i.x[1], i.x[2], i.x[3], inverse_step=1.25, weight=0.8, sigma_step=-0.25),
        _eager_velocity_step,
        6,
    ),
    Case("alignment", "align", 6, lambda i: ops.align(i.x[0], i.x[1], i.x[2:4], i.x[4:]), _eager_align, 8),
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
        "gated router lerp",
        "router_lerp",
        3,
        lambda i: ops.router_lerp(i.x[0], i.x[1], i.extra["beta"], i.gate, i.x[2]),
        lambda i: i.x[2] + i.gate * _eager_lerp(i),
        4,
        prepare=_beta,
    ),
    Case(
        "router lerp and gradient",
        "router_lerp",
        3,
        _backward(lambda i: ops.router_lerp(i.x[0], i.x[1], i.extra["beta"])),
        _backward(_eager_lerp),
        7,
        prepare=_halved,
        gradient=True,
        compiled=lambda: _backward(torch.compile(_eager_lerp, fullgraph=True)),
    ),
    Case(
        "modulate",
        "modulate",
        1,
        lambda i: ops.modulate(i.x[0], i.gate, i.gate)[0],
        lambda i: _modulated(i.x[0], i),
        2,
    ),
    Case(
        "modulate and change",
        "modulate",
        2,
        lambda i: ops.modulate(i.x[0], i.gate, i.gate, previous=i.x[1]),
        _eager_metric,
        3,
        derive=_derive_metric,
    ),
    Case(
        "reuse and modulate",
        "modulate",
        2,
        lambda i: ops.modulate(i.x[0], i.gate, i.gate, residuals=i.x[1:], coefficients=[1.0])[0],
        lambda i: _modulated(i.x[0] + i.x[1], i),
        3,
    ),
    Case(
        "guidance and norm",
        "combine_guidance",
        2,
        lambda i: ops.combine_guidance(i.x[0], i.x[1], 4.0, True),
        _eager_guidance,
        3,
    ),
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
