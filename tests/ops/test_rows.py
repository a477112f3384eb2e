"""Row kernels against plain formulas in float64, on every instruction set; dropout and draws against the noise."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hstu_dist.errors import UserError
from hstu_dist.ops import row_kernels
from hstu_dist.ops.native_abi import Isa, supported
from hstu_dist.ops.random import Drop, TokenNoise, fold
from hstu_dist.ops.row_kernels import RowKernels
from hstu_dist.ops.rows import EPSILON, Projection, drop_of, dropout, gated_output, project_silu
from hstu_dist.ops.softmax_spec import SoftmaxSpec

native = pytest.importorskip("hstu_dist.ops.native", exc_type=ImportError)
native_rows = pytest.importorskip("hstu_dist.ops.native_rows", exc_type=ImportError)
native_softmax = pytest.importorskip("hstu_dist.ops.native_softmax", exc_type=ImportError)

OPERATIONS = ("normalize", "normalize_backward", "silu", "silu_backward", "gate", "gate_backward", "drop", "integers")


def on(isa: Isa) -> RowKernels:
    """The native kernels on one instruction set."""
    bound = {name: functools.partial(getattr(native_rows, name), isa=isa) for name in OPERATIONS}
    return cast(RowKernels, SimpleNamespace(**bound))


KERNELS = {"torch": cast(RowKernels, row_kernels), **{isa.name.lower(): on(isa) for isa in supported(native.LIBRARY)}}
every_kernel = pytest.mark.parametrize("kernels", KERNELS.values(), ids=KERNELS.keys())
# one vector and a bit of every instruction set, and rows shorter than any vector
WIDTHS = (1, 2, 7, 16, 17, 50, 64, 200)


def noise_of(rows: int) -> TokenNoise:
    return TokenNoise(fold(3, 7), torch.arange(rows) * 2**33 - 5)


def close(got: Tensor, eager: Tensor, truth: Tensor) -> None:
    """Error against float64 at most twice that of eager in the same dtype."""
    assert got.dtype == eager.dtype and got.shape == truth.shape
    if truth.numel() == 0:
        return
    slack = (1e-14 if got.dtype == torch.float64 else 2 * torch.finfo(got.dtype).eps) * truth.abs().max()
    error, allowed = (got.double() - truth).abs().max(), 2 * (eager.double() - truth).abs().max() + slack
    assert error <= allowed, f"error {error:.2e}, allowed {allowed:.2e}"


def keep_of(drop: Drop | None, width: int) -> Tensor:
    if drop is None:
        return torch.ones(())
    return (drop.noise.words(width) >= drop.threshold).double() / (1 - drop.rate)


def plain_projection(x: Tensor, p: Projection) -> Tensor:
    return F.silu(F.linear(F.layer_norm(x, x.shape[1:], eps=EPSILON), p.weight, p.bias))


def plain_output(x: Tensor, attended: Tensor, u: Tensor, output: Projection, drop: Drop | None) -> Tensor:
    normal = F.layer_norm(attended, attended.shape[1:], eps=EPSILON)
    gated = u * normal * keep_of(drop, attended.shape[1]).to(x.dtype)
    return x + F.linear(gated, output.weight, output.bias)


def results(function: Callable[..., Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """Output and the gradient of each leaf for a fixed gradient of the output."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = function(*leaves)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad((out * weight.to(out.dtype)).sum(), leaves)]


def check(fast: Callable[..., Tensor], plain: Callable[..., Tensor], leaves: list[Tensor], dtype: torch.dtype) -> None:
    """Output and all gradients of `fast` in a dtype, against `plain` in float64."""
    truth = results(plain, [x.double() for x in leaves])
    eager = results(plain, [x.to(dtype) for x in leaves])
    for got, want, exact in zip(results(fast, [x.to(dtype) for x in leaves]), eager, truth, strict=True):
        close(got, want, exact)


@every_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [0, 1, 63])
@pytest.mark.parametrize("biased", [True, False])
def test_projection(kernels: RowKernels, dtype: torch.dtype, rows: int, biased: bool) -> None:
    widths = (50, 3, 16, 17)
    # offsets make the variance a small difference of large numbers
    leaves = [torch.randn(rows, 50).double() * 3 + 10, torch.randn(sum(widths), 50).double()]
    leaves += [torch.randn(sum(widths)).double()] if biased else []

    def fast(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        parts = project_silu(x, Projection(weight, bias), widths, kernels)
        assert tuple(p.shape[1] for p in parts) == widths
        return torch.cat(parts, dim=1)

    check(fast, lambda x, weight, bias=None: plain_projection(x, Projection(weight, bias)), leaves, dtype)


@every_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
# the norm of one or two elements is a constant: its gradient is rounding alone
@pytest.mark.parametrize("width", WIDTHS[2:])
@pytest.mark.parametrize("rate", [0.0, 0.2])
def test_gated_output(kernels: RowKernels, dtype: torch.dtype, width: int, rate: float) -> None:
    drop = drop_of(noise_of(33), rate)

    # rows of u are strided, as they come from the projection
    def fast(x: Tensor, attended: Tensor, wide: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return gated_output(x, attended, wide[:, 4 : 4 + width], Projection(weight, bias), drop, kernels)

    def plain(x: Tensor, attended: Tensor, wide: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return plain_output(x, attended, wide[:, 4 : 4 + width], Projection(weight, bias), drop)

    leaves = [torch.randn(33, n).double() for n in (11, width, width + 9)]
    leaves += [torch.randn(11, width).double(), torch.randn(11).double()]
    check(fast, plain, leaves, dtype)
    check(fast, plain, leaves[:-1], dtype)


@every_kernel
@pytest.mark.parametrize("width", WIDTHS)
def test_silu_at_its_extremes(kernels: RowKernels, width: int) -> None:
    x = torch.linspace(-120, 120, 31 * width, dtype=torch.float64).view(31, width)
    for dtype in (torch.float32, torch.float64):
        exact = x.to(dtype).double()
        close(kernels.silu(x.to(dtype)), F.silu(x.to(dtype)), F.silu(exact))
        grad = torch.ones(31, width, dtype=dtype)
        eager = torch.ops.aten.silu_backward(grad, x.to(dtype))
        close(kernels.silu_backward(x.to(dtype), (grad,)), eager, torch.ops.aten.silu_backward(grad.double(), exact))


@every_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("width", WIDTHS)
def test_dropout_keeps_the_elements_that_the_noise_says(kernels: RowKernels, dtype: torch.dtype, width: int) -> None:
    drop = Drop(noise_of(40), 0.3)
    x = torch.randn(40, width).to(dtype).requires_grad_()
    y = dropout(x, drop, kernels)
    assert y.dtype == dtype
    torch.testing.assert_close(y.detach(), (x.detach().double() * keep_of(drop, width)).to(dtype))
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
    torch.testing.assert_close(gradient.double(), keep_of(drop, width), rtol=1e-2, atol=0)
    assert dropout(x, None, kernels) is x


def test_nothing_is_dropped_in_evaluation_or_at_rate_zero() -> None:
    assert drop_of(None, 0.5) is None
    assert drop_of(noise_of(3), 0.0) is None


@every_kernel
@pytest.mark.parametrize("rate", [0.1, 0.2, 0.5, 0.9])
def test_the_rate_is_the_rate(kernels: RowKernels, rate: float) -> None:
    kept = dropout(torch.ones(20_000, 24), Drop(noise_of(20_000), rate), kernels) != 0
    assert abs(float(kept.double().mean()) - (1 - rate)) < 5 * (rate * (1 - rate) / kept.numel()) ** 0.5


@every_kernel
@pytest.mark.parametrize("high", [1, 2, 3706, 1 << 20, (1 << 20) + 1, 1 << 40])
@pytest.mark.parametrize("count", [0, 1, 7, 128])
def test_draws_are_those_of_the_noise(kernels: RowKernels, high: int, count: int) -> None:
    for rows in (0, 1, 33):
        drawn = kernels.integers(noise_of(rows), count, high)
        assert drawn.dtype == torch.int64
        assert torch.equal(drawn, noise_of(rows).integers(count, high))


@every_kernel
def test_results_do_not_depend_on_threads(kernels: RowKernels) -> None:
    x, u, grad = torch.randn(3, 4001, 50)
    drop = Drop(noise_of(4001), 0.2)
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            runs.append([kernels.gate(x, u, EPSILON, drop), *kernels.gate_backward(x, u, grad, EPSILON, drop)])
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_noise_has_a_number_for_every_row() -> None:
    kernels, x = on(Isa.AUTO), torch.ones(6, 8)
    every_second = TokenNoise(7, torch.arange(12)[::2])
    drop = Drop(every_second, 0.5)
    expected = kernels.drop(x, Drop(TokenNoise(7, every_second.tokens.contiguous()), 0.5))
    assert torch.equal(kernels.drop(x, drop), expected)
    assert torch.equal(kernels.integers(every_second, 3, 100), every_second.integers(3, 100))
    with pytest.raises(ValueError, match=r"noise\.tokens: got torch\.int64 of shape \(6,\), expected .* \(7,\)"):
        kernels.drop(torch.ones(7, 8), drop)


def attend(x: Tensor) -> None:
    native.forward(SimpleNamespace(q=x[:, None, :]))


@pytest.mark.parametrize(
    "call",
    [
        native_rows.silu,
        lambda x: native_softmax.loss_and_gradients(x, x, torch.arange(4), None, SoftmaxSpec(temperature=0.1)),
        attend,
    ],
    ids=["rows", "softmax", "attention"],
)
def test_tensors_elsewhere_are_refused_before_a_pointer_is_read(call: Callable[[Tensor], object]) -> None:
    with pytest.raises(UserError, match="got tensors on meta, expected the CPU"):
        call(torch.ones(4, 16, device="meta"))


def test_widths_must_add_up() -> None:
    with pytest.raises(ValueError, match=r"widths: got \(3, 4\), expected one to four that add up to 8"):
        project_silu(torch.randn(2, 5), Projection(torch.randn(8, 5), None), (3, 4), cast(RowKernels, row_kernels))
