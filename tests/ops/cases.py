"""Attention problems shared by the tests of all backends, and the measure of error they are held to."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hstu_dist.ops.attention import hstu_attention
from hstu_dist.ops.bias import RelativeBias
from hstu_dist.ops.spec import Activation, AttentionSpec, Backend, JaggedLayout

DAY = 86_400


@dataclass(frozen=True, kw_only=True)
class Case:
    """One problem: lengths of the sequences and which features are on."""

    name: str
    lengths: tuple[int, ...]
    cached: tuple[int, ...] | None = None
    contextual: tuple[int, ...] | None = None
    targets: tuple[int, ...] | None = None
    heads: int = 2
    width: int = 16
    value_width: int = 16
    position_bias: bool = True
    time_bias: bool = True
    strided: bool = False
    scale: float = 1.0
    spec: AttentionSpec = AttentionSpec(normalizer=37.0)


@dataclass(frozen=True)
class Problem:
    """Tensors of a case; `run` gives the output and the gradient of every leaf."""

    case: Case
    layout: JaggedLayout
    leaves: dict[str, Tensor]
    query_times: Tensor
    key_times: Tensor
    grad_out: Tensor

    def run(self, backend: Backend, dtype: torch.dtype) -> dict[str, Tensor]:
        leaves = {n: x.to(dtype, copy=True).requires_grad_() for n, x in self.leaves.items()}
        q, k, v = leaves["q"], leaves["k"], leaves["v"]
        if self.case.strided:
            # rows of a wider tensor, as the layer's fused projection gives them
            q, k, v = (torch.cat([x.flatten(1), x.flatten(1)], 1)[:, : x[0].numel()].view_as(x) for x in (q, k, v))
        bias = None
        if self.case.position_bias:
            timed = self.case.time_bias
            bias = RelativeBias(
                position_weight=leaves["position_weight"],
                time_weight=leaves["time_weight"] if timed else None,
                query_times=self.query_times if timed else None,
                key_times=self.key_times if timed else None,
            )
        out = hstu_attention(q, k, v, self.layout, replace(self.case.spec, backend=backend), bias)
        used = {n: x for n, x in leaves.items() if bias is not None or n in "qkv"}
        if bias is not None and bias.time_weight is None:
            used.pop("time_weight")
        grads = torch.autograd.grad(out, list(used.values()), self.grad_out.to(dtype), materialize_grads=True)
        return {"out": out.detach(), **{f"d_{n}": g for n, g in zip(used, grads, strict=True)}}


def offsets_of(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0)


def problem(case: Case, seed: int = 0) -> Problem:
    """Random tensors of a case in float64; times span seconds to decades and repeat."""
    g = torch.Generator().manual_seed(seed)
    key_lengths = case.lengths
    if case.cached is not None:
        key_lengths = tuple(m + c for m, c in zip(case.lengths, case.cached, strict=True))
    layout = JaggedLayout(
        offsets_of(case.lengths),
        None if case.cached is None else offsets_of(key_lengths),
        None if case.contextual is None else torch.tensor(case.contextual, dtype=torch.int64),
        None if case.targets is None else torch.tensor(case.targets, dtype=torch.int64),
    )
    # no entry to spare: reading past the table must show
    table = max(1, layout.num_positions)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64) * case.scale

    steps = 10 ** torch.randint(0, 8, (layout.key_total,), generator=g)
    key_times = (torch.randint(0, 2, (layout.key_total,), generator=g) * steps).cumsum(0) + 10**9
    query_times = 10**9 + torch.randint(0, 4000 * DAY, (layout.total,), generator=g)
    return Problem(
        case,
        layout,
        {
            "q": normal(layout.total, case.heads, case.width),
            "k": normal(layout.key_total, case.heads, case.width),
            "v": normal(layout.key_total, case.heads, case.value_width),
            "position_weight": normal(2 * table - 1) * 0.5,
            "time_weight": normal(129) * 0.5,
        },
        query_times,
        key_times,
        normal(layout.total, case.heads, case.value_width),
    )


def assert_as_exact_as_eager(backend: Backend, dtype: torch.dtype, case: Case) -> None:
    """Output and every gradient: error against float64 at most twice that of eager in the same dtype."""
    p = problem(case)
    assert_close_to_reference(p, p.run(backend, dtype), dtype)


def assert_close_to_reference(p: Problem, fast: dict[str, Tensor], dtype: torch.dtype) -> None:
    """The same for results that were computed in any way."""
    exact = p.run(Backend.REFERENCE, torch.float64)
    eager = p.run(Backend.REFERENCE, dtype)
    assert fast.keys() == exact.keys()
    for name, truth in exact.items():
        got, want = fast[name], eager[name]
        assert got.dtype == dtype and got.shape == truth.shape, name
        if truth.numel() == 0:
            continue
        size = truth.abs().max().item()
        error = (got.double() - truth).abs().max().item()
        # eager in float64 is the truth itself, and sums of hundreds of terms lose a few digits
        rounding = 1e-12 if dtype == torch.float64 else 2 * torch.finfo(dtype).eps
        allowed = 2 * (want.double() - truth).abs().max().item() + rounding * size
        assert error <= allowed, f"{p.case.name} {name}: error {error:.2e}, allowed {allowed:.2e}, size {size:.2e}"


_SILU = AttentionSpec(normalizer=37.0)
_SCALED = AttentionSpec(normalizer=5.0, alpha=0.3)
_SOFTMAX = AttentionSpec(normalizer=1.0, alpha=0.25, activation=Activation.SOFTMAX)
_SEMI_LOCAL = AttentionSpec(normalizer=37.0, window=5, global_prefix=3)

CASES = [
    Case(name="odd-lengths", lengths=(0, 1, 2, 7, 15, 16, 17, 63, 64, 65)),
    Case(name="long", lengths=(200, 1, 143), width=25, value_width=25, spec=_SCALED),
    Case(name="one-head-50", lengths=(31, 0, 97), heads=1, width=50, value_width=50),
    Case(name="widths-differ", lengths=(5, 33, 70), width=24, value_width=40),
    Case(name="narrow", lengths=(3, 9), heads=3, width=1, value_width=3),
    Case(name="position-only", lengths=(20, 1, 66), time_bias=False),
    Case(name="no-bias", lengths=(20, 1, 66), position_bias=False, time_bias=False),
    Case(name="strided", lengths=(12, 0, 40), strided=True),
    Case(name="saturated", lengths=(57, 20), scale=4.0),
    Case(name="tiny-scores", lengths=(57, 20), scale=0.02),
    Case(name="targets", lengths=(9, 0, 64, 70), targets=(3, 0, 64, 5)),
    Case(name="contextual", lengths=(9, 0, 64, 70), contextual=(3, 0, 64, 5)),
    Case(name="window", lengths=(9, 0, 64, 130), spec=AttentionSpec(normalizer=37.0, window=7)),
    Case(name="semi-local", lengths=(9, 0, 64, 130), spec=_SEMI_LOCAL),
    Case(
        name="all-masks",
        lengths=(9, 1, 64, 130),
        contextual=(2, 0, 5, 4),
        targets=(3, 1, 20, 17),
        spec=_SEMI_LOCAL,
    ),
    Case(name="cached", lengths=(1, 4, 0, 33), cached=(20, 0, 7, 64)),
    Case(
        name="cached-targets",
        lengths=(6, 4, 0, 33),
        cached=(20, 0, 7, 64),
        targets=(4, 4, 3, 33),
        contextual=(2, 0, 1, 3),
    ),
    Case(name="many-targets", lengths=(150, 0, 141), cached=(7, 2, 0), targets=(150, 1, 140)),
    Case(name="no-tokens", lengths=(0, 0, 0)),
    Case(name="no-sequences", lengths=()),
    Case(name="softmax", lengths=(0, 1, 17, 64, 130), spec=_SOFTMAX),
    Case(name="softmax-targets", lengths=(9, 64, 70), targets=(3, 64, 5), contextual=(2, 0, 4), spec=_SOFTMAX),
    Case(name="softmax-cached", lengths=(1, 4, 33), cached=(20, 0, 64), spec=replace(_SOFTMAX, window=9)),
]
