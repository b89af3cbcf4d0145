"""Hand-written backward passes: gradients, precision, and what they keep for the backward."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kinodit.models.mlp import MLP, Activation, gelu_tanh, hidden_width
from kinodit.models.modulation import (
    AdaNorm,
    Modulation,
    gated_add,
    modulated_norm,
    per_token,
    segment_sum,
)
from kinodit.models.norm import HeadNorm, RMSNorm, as_complex
from kinodit.models.rope import RopeConfig, rotary_table, rotate

N, WIDTH, EPS = 7, 10, 1e-6


def rows(num_levels: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_levels)
    values = torch.randn(3, num_levels, WIDTH, generator=generator, dtype=torch.float64)
    level = torch.arange(N) * num_levels // N
    return values.requires_grad_(), level


def tokens(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N, WIDTH, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("num_levels", [1, 3, N])
def test_modulated_norm_and_gate_are_their_formulas(num_levels: int) -> None:
    (shift, scale, gate), level = rows(num_levels)
    x, branch = tokens(0), tokens(1)
    normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + EPS).sqrt()
    torch.testing.assert_close(
        modulated_norm(x, shift, scale, level, EPS), normed * (1 + scale[level]) + shift[level]
    )
    torch.testing.assert_close(gated_add(x, gate, branch, level), x + gate[level] * branch)


@pytest.mark.parametrize("num_levels", [1, 3, N])
def test_gradients_of_modulation(num_levels: int) -> None:
    (shift, scale, gate), level = (
        [part.detach().requires_grad_() for part in rows(num_levels)[0]],
        rows(num_levels)[1],
    )
    x, branch = tokens(0), tokens(1)
    assert torch.autograd.gradcheck(
        lambda x, shift, scale: modulated_norm(x, shift, scale, level, EPS), (x, shift, scale)
    )
    assert torch.autograd.gradcheck(
        lambda x, gate, branch: gated_add(x, gate, branch, level), (x, gate, branch)
    )
    assert torch.autograd.gradcheck(lambda rows: per_token(rows, level), (scale,))


def test_a_level_without_tokens_gets_no_gradient() -> None:
    level = torch.tensor([0, 0, 2, 2, 2, 2, 2])
    _, scale, _ = rows(3)[0]
    (grad,) = torch.autograd.grad(per_token(scale, level).sum(), scale)
    assert grad.tolist() == [[2.0] * WIDTH, [0.0] * WIDTH, [5.0] * WIDTH]


def test_sums_over_levels_are_accumulated_in_float32() -> None:
    x = torch.full((4096, 1), 1.0, dtype=torch.bfloat16)
    level = torch.zeros(4096, dtype=torch.int64)
    # 256 + 1 is 256 in bf16: a sum kept in bf16 would stop there.
    assert segment_sum(x, level, 1).item() == 4096


@pytest.mark.parametrize("has_rotary", [False, True])
def test_head_norm_is_its_formula_and_so_are_its_gradients(has_rotary: bool) -> None:
    heads, dim = 2, 12
    norm = HeadNorm(dim, EPS).double()
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(dim, generator=generator, dtype=torch.float64)
    norm.weight.data.copy_(weight)
    x = torch.randn(N, heads, dim, generator=generator, dtype=torch.float64).requires_grad_()
    rotary = None
    expected = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight
    if has_rotary:
        position = torch.randint(0, 9, (N, 3), generator=generator)
        level, t = torch.zeros(N, dtype=torch.int64), torch.zeros(1)
        rotary = rotary_table(RopeConfig(), dim, position, level, t, torch.float64)
        expected = rotate(expected, rotary)
    torch.testing.assert_close(norm(x, rotary), expected)
    assert torch.autograd.gradcheck(lambda x: norm(x, rotary), (x,))
    cotangent = torch.randn_like(expected)
    (found,) = torch.autograd.grad((norm(x, rotary) * cotangent).sum(), norm.weight)
    plain = weight.clone().requires_grad_()
    again = F.rms_norm(x, (dim,), plain, EPS)
    again = again if rotary is None else rotate(again, rotary)
    torch.testing.assert_close(found, torch.autograd.grad((again * cotangent).sum(), plain)[0])


def test_gradients_may_start_in_the_middle_of_a_pair() -> None:
    x = torch.randn(2, 3, 4)
    shifted = torch.cat([torch.zeros(1), x.flatten()])[1:].view(2, 3, 4)
    assert shifted.storage_offset() % 2 == 1
    assert torch.equal(as_complex(shifted), as_complex(x))


def test_qk_norm_bounds_the_logits_at_any_scale() -> None:
    norm = HeadNorm(16, EPS)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
    bound = norm.weight.max() ** 2 * math.sqrt(16)
    for scale in (1e-2, 1.0, 1e6):
        q, k = (norm(scale * torch.randn(9, 3, 16)) for _ in range(2))
        logits = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(16)
        assert logits.abs().max() <= bound * 1.001


def test_the_compiled_gelu_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    x = torch.linspace(-30, 30, 4001, dtype=torch.float64).requires_grad_()
    expected = F.gelu(x, approximate="tanh")
    torch.testing.assert_close(gelu_tanh(x), expected, atol=1e-14, rtol=1e-12)
    (found,) = torch.autograd.grad(gelu_tanh(x).sum(), x)
    torch.testing.assert_close(found, torch.autograd.grad(expected.sum(), x)[0])
    narrow = x.detach().bfloat16()
    torch.testing.assert_close(gelu_tanh(narrow), F.gelu(narrow, approximate="tanh"))


@pytest.mark.parametrize("activation", ["gelu_tanh", "silu", "swiglu"])
def test_mlps_are_their_formulas(activation: Activation) -> None:
    mlp = MLP(8, 16, activation, bias=True).double()
    x = torch.randn(5, 8, dtype=torch.float64)
    hidden = mlp.up(x)
    if mlp.gate is not None:
        hidden = F.silu(mlp.gate(x)) * hidden
    elif activation == "silu":
        hidden = F.silu(hidden)
    else:
        hidden = F.gelu(hidden, approximate="tanh")
    torch.testing.assert_close(mlp(x), mlp.down(hidden))
    assert hidden_width(96, 4.0, activation) == (256 if activation == "swiglu" else 384)


def test_scale_and_gate_modulation_is_next_dits() -> None:
    modulation = Modulation(4, WIDTH, 2, has_shift=False).double()
    norm = AdaNorm(WIDTH, EPS, "rms").double()
    condition = torch.randn(3, 4, dtype=torch.float64)
    first, second = modulation(condition)
    scale_1, gate_1, scale_2, gate_2 = modulation.linear(condition).chunk(4, dim=-1)
    assert first.shift is None and second.shift is None
    torch.testing.assert_close(first.scale, scale_1)
    torch.testing.assert_close(second.scale, scale_2)
    torch.testing.assert_close(first.gate, gate_1.tanh())
    torch.testing.assert_close(second.gate, gate_2.tanh())
    level = torch.tensor([0, 0, 1, 1, 1, 2, 2])
    x = tokens(0)
    normed = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()
    torch.testing.assert_close(norm(x, first, level), normed * (1 + scale_1[level]))


def test_low_rank_modulation_adds_the_shared_rows() -> None:
    modulation = Modulation(4, WIDTH, 1, rank=2).double()
    condition = torch.randn(3, 4, dtype=torch.float64)
    shared = torch.randn(3, 6 * WIDTH, dtype=torch.float64)
    (found,) = modulation(condition, shared)
    assert modulation.down is not None
    weight = modulation.linear.weight @ modulation.down.weight
    expected = condition @ weight.T + modulation.linear.bias + shared[:, : 3 * WIDTH]
    torch.testing.assert_close(torch.cat([found.shift, found.scale, found.gate], -1), expected)


def saved_bytes(function: Callable[..., Tensor], *inputs: Tensor, given: Tensor) -> int:
    """Bytes that autograd keeps besides `inputs` and `given`, each storage once."""
    kept = {}
    known = {x.untyped_storage().data_ptr() for x in (*inputs, given)}

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in known:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        function(*inputs)
    return sum(kept.values())


def test_per_token_rows_are_not_kept() -> None:
    count, width, levels = 1000, 32, 5
    level = torch.arange(count) * levels // count
    x, branch = torch.randn(2, count, width).unbind(0)
    x, branch = x.clone().requires_grad_(), branch.clone().requires_grad_()
    table = [torch.randn(levels, width, requires_grad=True) for _ in range(3)]

    def step(x: Tensor, branch: Tensor, *table: Tensor) -> Tensor:
        shift, scale, gate = table
        normed = modulated_norm(x, shift, scale, level, EPS)
        return gated_add(x, gate, branch, level) + normed

    # The normed tokens, in the place of x; autograd would add the looked-up scale and gate.
    a_token_tensor = count * width * 4
    assert saved_bytes(step, x, branch, *table, given=level) < 1.2 * a_token_tensor


def test_rms_norm_in_low_precision_takes_statistics_in_float32() -> None:
    x = torch.randn(4, 64) * 300
    norm = RMSNorm(64, EPS)
    torch.testing.assert_close(norm(x).square().mean(-1), torch.ones(4))
    half = norm.half()(x.half())
    assert bool(half.isfinite().all())
    torch.testing.assert_close(half.float().square().mean(-1), torch.ones(4), atol=1e-2, rtol=0)
    heads = HeadNorm(64, EPS).half()(x.half()[:, None])
    torch.testing.assert_close(heads[:, 0], half, atol=2e-3, rtol=2e-3)
