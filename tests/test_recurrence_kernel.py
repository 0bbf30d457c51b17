"""The RNN format's kernel against the float64 formula: on a GPU, or in Triton's interpreter."""

from unittest.mock import Mock

import pytest
import torch
from kernel_cases import DEVICE, LIMITS, VARIANTS, call, exact, gpu, make_inputs
from reference import curves_for, dense

import lion_kernels
from lion_kernels import recurrence
from models_lion import FEATURE_MAPS, LionAttention, attention


def assert_exact(tensors, mask, dim=16, *, formula=dense, **options):
    actual = call(*tensors, mask, dim, recurrent=True, **options)
    expected = exact(*tensors, mask, dim, formula=formula, **options)[0]
    error = (actual.double() - expected).norm() / expected.norm()
    assert error < LIMITS[actual.dtype], f"error ratio {error:.1e}"


@pytest.mark.parametrize("n", [1, 63, 64, 130])
@pytest.mark.parametrize("mask, order", VARIANTS)
def test_outputs(mask, order, n):
    assert_exact(make_inputs(mask, order, n, batch=1 if n > 100 else 2), mask)


@pytest.mark.parametrize("dim", [16, 32, 64, 128])
@pytest.mark.parametrize("mask, order", [("Lit", "Normal"), ("Decay", "S"), ("Selective", "S")])
def test_half_precision(mask, order, dim):
    assert_exact(make_inputs(mask, order, 130, dim, torch.float16, batch=1), mask, dim)


@pytest.mark.parametrize("mask, order", VARIANTS[1:])
def test_saturated_gates(mask, order):
    assert_exact(make_inputs(mask, order, 61, gate=40.0), mask)


@pytest.mark.parametrize("mask, order", [("Lit", "Normal"), ("Selective", "S")])
def test_columns_in_parts(mask, order):
    assert_exact(make_inputs(mask, order, 20, dim=128, batch=1), mask, 128)


@pytest.mark.parametrize("mask, order", VARIANTS)
def test_padding_and_numerators_alone(mask, order):
    valid = torch.rand(2, 41, generator=torch.Generator().manual_seed(0)) > 0.3
    options = {"valid": valid.to(DEVICE), "features": "none", "normalise": False}
    assert_exact(make_inputs(mask, order, 41), mask, **options)


@pytest.mark.parametrize("mask", FEATURE_MAPS)
def test_documents(mask):
    lengths = torch.tensor([[3, 29, 1, 37], [32, 9, 24, 5]])  # one ends where a block does
    documents = torch.stack([torch.arange(4).repeat_interleave(row) for row in lengths])
    options = {"documents": documents.to(DEVICE), "valid": (documents != 3).to(DEVICE)}
    assert_exact(make_inputs(mask, "Normal", 70), mask, **options)


@pytest.mark.parametrize(
    "mask, order", [("Lit", "Normal"), ("Decay", "S"), ("Selective", "Normal")]
)
def test_operator_contract(mask, order):
    projected, decay, curves, _ = make_inputs(mask, order, 9, batch=1, heads=1)
    options = (1, 16, 2 if order == "S" else 1, 1, mask == "Lit", "silu", True, 1e-6)
    tensors = (projected, decay, curves, None, None)
    torch.library.opcheck(recurrence.recurrence_operator.dispatched, (*tensors, *options))


@pytest.mark.parametrize("mask, order", VARIANTS)
def test_the_layer_is_the_same_with_the_kernel(mask, order, monkeypatch):
    torch.manual_seed(0)
    layer = LionAttention(32, 2, mask_type=mask, order=order, format="RNN").to(DEVICE)
    valid = torch.arange(21, device=DEVICE).repeat(2, 1) < 19
    x, curves = torch.randn(2, 21, 32, device=DEVICE), curves_for(order, 21)
    curves = curves if curves is None else curves.to(DEVICE)
    mix = Mock(wraps=lion_kernels.mix)
    monkeypatch.setattr(lion_kernels, "mix", mix)
    results = []
    for enabled in (False, True):
        monkeypatch.setattr(lion_kernels, "available", lambda *_, enabled=enabled: enabled)
        with torch.no_grad():
            results.append(layer(x, curves, valid=valid))
    assert mix.call_count == 1
    assert torch.allclose(*results, atol=1e-5, rtol=1e-4)
    layer(x, curves).sum().backward()  # gradients are those of the plain recurrence
    assert mix.call_count == 1
    assert layer.qkv.weight.grad is not None


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("gate", [1.0, 40.0])
@pytest.mark.parametrize("n", [1, 63, 64, 197, 500, 1025, 4097])
@pytest.mark.parametrize("mask, order", VARIANTS)
def test_gpu_numerics(mask, order, n, gate, dtype):
    tensors = make_inputs(mask, order, n, 64, dtype, batch=1, gate=gate)
    assert_exact(tensors, mask, 64, formula=attention)


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("dim", [16, 32, 128])
@pytest.mark.parametrize("mask, order", VARIANTS)
def test_gpu_head_widths(mask, order, dim, dtype):
    assert_exact(make_inputs(mask, order, 197, dim, dtype), mask, dim, formula=attention)


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("mask, order", VARIANTS)
def test_repeats_are_bitwise_equal(mask, order):
    tensors = make_inputs(mask, order, 197, 64, torch.bfloat16, batch=4, heads=3)
    first = call(*tensors, mask, 64, recurrent=True)
    for _ in range(100):
        assert torch.equal(call(*tensors, mask, 64, recurrent=True), first)


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("mask, order", VARIANTS)
def test_memory_is_the_output_and_row_sums(mask, order):
    tensors = make_inputs(mask, order, 1025, 64, torch.bfloat16, batch=8, heads=4)
    asked = "requested_bytes.all.{}".format  # what is allocated for it may be larger
    before = torch.cuda.memory_stats()[asked("current")]
    torch.cuda.reset_peak_memory_stats()
    y = call(*tensors, mask, 64, recurrent=True)
    numbers = 8 * 4 * 1025
    limit = 2 * 64 * numbers + 4 * numbers + 4096
    if mask == "Lit":  # a state for every 512 tokens
        limit += 3 * 8 * 4 * 4 * (64 * 64 + 64)
    assert torch.cuda.memory_stats()[asked("peak")] - before <= limit, y.shape
