"""The Triton kernels against the float64 formula: on a GPU, or in Triton's interpreter."""

import subprocess
import sys
from itertools import product

import pytest
import torch
from helpers import ROOT
from reference import curves_for, dense
from torch.nn import functional as F

import kernels
from models_lion import FEATURE_MAPS, LionAttention, attention

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VARIANTS = [(m, o) for m, o in product(FEATURE_MAPS, ("Normal", "S")) if (m, o) != ("Lit", "S")]
LIMITS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}


def make_inputs(mask, order, n, dim=16, dtype=torch.float32, batch=2, heads=2, gate=1.0):
    """qkv, log decays or None, curves or None, and the output's gradient."""
    generator = torch.Generator().manual_seed(n)
    qkv, grad = (
        torch.randn(*shape, generator=generator).to(DEVICE, dtype)
        for shape in ((batch, n, 3, heads, dim), (batch, n, heads * dim))
    )
    if mask == "Lit":
        return qkv, None, None, grad
    scans = 2 if order == "S" else 1
    shape = (scans, 1, heads, 1) if mask == "Decay" else (scans, batch, heads, n)
    decay = F.logsigmoid(gate * torch.randn(*shape, generator=generator)).to(DEVICE)
    curves = curves_for(order, n)
    decay = decay.expand(*shape[:3], n).contiguous()
    return qkv, decay, curves if curves is None else curves.to(DEVICE), grad


def mix(qkv, decay, curves, grad, mask, normalise=True):
    """Output and gradients of the kernels."""
    leaves = [t.clone().requires_grad_() for t in (qkv, decay) if t is not None]
    decay = leaves[1] if len(leaves) > 1 else None
    y = kernels.mix(leaves[0], decay, curves, lit=mask == "Lit", normalise=normalise)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def exact(qkv, decay, curves, grad, mask, normalise=True, formula=dense):
    leaves = [t.double().requires_grad_() for t in (qkv, decay) if t is not None]
    q, k, v = leaves[0].permute(2, 0, 3, 1, 4)
    q, k = (FEATURE_MAPS[mask](t) for t in (q, k))
    decay = leaves[1] if len(leaves) > 1 else None
    numerator, denominator = formula(q * q.shape[3] ** -0.5, k, v, decay, curves)
    y = numerator / (denominator + 1e-6) if normalise else numerator
    y = y.transpose(1, 2).flatten(2)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.double(), materialize_grads=True)]


def assert_close(actual, expected, limit):
    for name, a, b in zip(("y", "dqkv", "ddecay"), actual, expected, strict=False):
        error = (a.double() - b).norm() / b.norm().clamp(min=1e-9)
        assert error < limit, f"{name}: error ratio {error:.1e}"


@pytest.mark.parametrize("n", [1, 63, 64, 130])
@pytest.mark.parametrize("mask, order", VARIANTS)
def test_outputs_and_gradients(mask, order, n):
    tensors = make_inputs(mask, order, n)
    assert_close(mix(*tensors, mask), exact(*tensors, mask), LIMITS[torch.float32])


@pytest.mark.parametrize("dim", [32, 64, 128])
@pytest.mark.parametrize("mask, order", [("Lit", "Normal"), ("Selective", "S")])
def test_half_precision_and_wide_heads(mask, order, dim):
    tensors = make_inputs(mask, order, 70, dim, torch.float16, batch=1)
    assert_close(mix(*tensors, mask), exact(*tensors, mask), LIMITS[torch.float16])


@pytest.mark.parametrize("mask, order", [("Lit", "Normal"), ("Selective", "S")])
def test_numerators_alone(mask, order):
    tensors = make_inputs(mask, order, 70)
    actual, expected = (f(*tensors, mask, normalise=False) for f in (mix, exact))
    assert_close(actual, expected, LIMITS[torch.float32])


@pytest.mark.parametrize("mask, order", VARIANTS[1:])
def test_saturated_gates(mask, order):
    tensors = make_inputs(mask, order, 97, gate=40.0)
    assert_close(mix(*tensors, mask), exact(*tensors, mask), LIMITS[torch.float32])


def test_strided_and_expanded_inputs():
    qkv, decay, curves, grad = make_inputs("Decay", "S", 30)
    wider = torch.cat([qkv.flatten(2), torch.full((2, 30, 8), torch.nan, device=DEVICE)], 2)
    view = wider[..., :-8].unflatten(2, qkv.shape[2:])
    once = decay[..., :1].expand_as(decay)
    expected = mix(qkv, decay, curves, grad, "Decay")[0]
    assert torch.equal(kernels.mix(view, once, curves, lit=False), expected)


def test_refuses_other_head_widths():
    with pytest.raises(ValueError, match="width 16, 32, 64 or 128, not 24"):
        kernels.mix(torch.zeros(1, 4, 3, 1, 24), lit=True)


@pytest.mark.parametrize(
    "mask, order", [("Lit", "Normal"), ("Decay", "S"), ("Selective", "Normal")]
)
def test_operator_contract(mask, order):
    from kernels.ops import mix_operator

    qkv, decay, curves, _ = make_inputs(mask, order, 9, batch=1, heads=1)
    leaves = [t if t is None else t.requires_grad_() for t in (qkv, decay)]
    torch.library.opcheck(mix_operator, (*leaves, curves, mask == "Lit", 1e-6, True))


@pytest.mark.parametrize("format", ["Attention", "Chunk"])
@pytest.mark.parametrize("mask, order", VARIANTS)
def test_the_layer_is_the_same_with_kernels(mask, order, format, monkeypatch):
    torch.manual_seed(0)
    layer = LionAttention(32, 2, mask_type=mask, order=order, format=format).to(DEVICE)
    x, curves = torch.randn(2, 21, 32, device=DEVICE), curves_for(order, 21)
    curves = curves if curves is None else curves.to(DEVICE)
    results = []
    for enabled in (False, True):
        monkeypatch.setattr(kernels, "available", lambda _, enabled=enabled: enabled)
        layer.zero_grad()
        y = layer(x, curves)
        y.square().sum().backward()
        results.append([y, *(p.grad.clone() for p in layer.parameters())])
    for plain, fast in zip(*results, strict=True):
        assert torch.allclose(plain, fast, atol=1e-5, rtol=1e-4)


def test_kernels_can_be_turned_off():
    code = "import kernels, torch; print(kernels.ENABLED)"
    off = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={"LION_KERNELS": "0"},
                         capture_output=True, text=True, check=True)  # fmt: skip
    assert off.stdout.strip() == "False"


def test_kernels_compile_for_hopper(tmp_path):
    environment = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PATH": "/usr/bin"}
    script = ROOT / "tests" / "compile_kernels.py"
    compiled = subprocess.run([sys.executable, script], cwd=ROOT, env=environment,
                              capture_output=True, text=True)  # fmt: skip
    assert compiled.returncode == 0, compiled.stdout + compiled.stderr


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("gate", [1.0, 40.0])
@pytest.mark.parametrize("n", [1, 63, 64, 197, 500, 1025, 4097])
@pytest.mark.parametrize("mask, order", VARIANTS)
def test_gpu_numerics(mask, order, n, gate, dtype):
    tensors = make_inputs(mask, order, n, 64, dtype, batch=1, gate=gate)
    expected = exact(*tensors, mask, formula=attention)
    assert_close(mix(*tensors, mask), expected, LIMITS[dtype])


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("mask, order", VARIANTS)
def test_repeats_are_bitwise_equal(mask, order):
    tensors = make_inputs(mask, order, 197, 64, torch.bfloat16, batch=4, heads=3)
    first = mix(*tensors, mask)
    for _ in range(100):
        assert all(map(torch.equal, mix(*tensors, mask), first))
