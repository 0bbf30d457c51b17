"""Every format against the float64 dense formula: outputs and every gradient."""

import math
import weakref
from collections import Counter

import pytest
import torch
from reference import curves_for, dense, dense_mask
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models_lion import FEATURE_MAPS, FORMATS, LEAST_LOG, LionAttention, decay_mask

MASKS = tuple(FEATURE_MAPS)
CHUNKS = (1, 7, 64, 1000)
RUNS = [("Attention", 1), ("RNN", 1), *(("Chunk", size) for size in CHUNKS)]


def make_inputs(mask, order, n, batch=1, heads=1, dim=8):
    generator = torch.Generator().manual_seed(n)
    shape = (batch, heads, n, dim)
    q, k = (torch.rand(shape, generator=generator, dtype=torch.float64) + 0.1 for _ in range(2))
    v = torch.randn(shape, generator=generator, dtype=torch.float64)
    curves = curves_for(order, n)
    if mask == "Lit":
        return [q, k, v], None
    scans = 1 if curves is None else 2
    tokens = 1 if mask == "Decay" else n
    gate = torch.randn(scans, batch if mask == "Selective" else 1, heads, tokens,
                       generator=generator, dtype=torch.float64)  # fmt: skip
    log_decay = torch.nn.functional.logsigmoid(gate).expand(-1, -1, -1, n).contiguous()
    return [q, k, v, log_decay], curves


def outputs_and_gradients(function, tensors, curves, dtype, **options):
    leaves = [t.to(dtype).requires_grad_() for t in tensors]
    log_decay = leaves[3] if len(leaves) == 4 else None
    numerator, denominator = function(*leaves[:3], log_decay, curves, **options)
    y = numerator / (denominator + 1e-6)
    weight = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y).to(dtype)
    return [y, *torch.autograd.grad((y * weight).sum(), leaves, materialize_grads=True)]


def assert_close(actual, expected, tolerance, context):
    names = ("y", "dq", "dk", "dv", "dlog_decay")
    for name, a, b in zip(names, actual, expected, strict=False):
        scale = max(1.0, b.abs().max().item())
        error = (a.double() - b).abs().max().item() / scale
        assert error < tolerance, f"{context} {name}: error {error:.2e}"


@pytest.mark.parametrize("n", [1, 2, 63, 64, 197])
@pytest.mark.parametrize("order", ["Normal", "S"])
@pytest.mark.parametrize("mask", MASKS)
def test_formats_agree_with_the_dense_formula(mask, order, n):
    tensors, curves = make_inputs(mask, order, n)
    expected = outputs_and_gradients(dense, tensors, curves, torch.float64)
    for format, size in RUNS:
        for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
            actual = outputs_and_gradients(FORMATS[format], tensors, curves, dtype, chunk_size=size)
            assert_close(actual, expected, tolerance, f"{format} {size} {dtype}")


@pytest.mark.parametrize("order", ["Normal", "S"])
@pytest.mark.parametrize("mask", MASKS)
def test_formats_agree_for_batches_and_heads(mask, order):
    tensors, curves = make_inputs(mask, order, n=31, batch=3, heads=2)
    expected = outputs_and_gradients(dense, tensors, curves, torch.float64)
    for format, size in RUNS:
        actual = outputs_and_gradients(
            FORMATS[format], tensors, curves, torch.float64, chunk_size=size
        )
        assert_close(actual, expected, 1e-10, f"{format} {size}")


def test_dense_mask_by_hand():
    a, b, c = 0.5, 0.25, 0.125
    expected = torch.tensor([[1, b, b * c], [a, 1, c], [a * b, b, 1]], dtype=torch.float64)
    decay = torch.tensor([a, b, c], dtype=torch.float64)
    assert torch.allclose(dense_mask(decay), expected)
    assert torch.allclose(decay_mask(decay.log().view(1, 1, 1, 3))[0, 0], expected)


def test_decay_mask_is_a_power_of_the_distance():
    mask = decay_mask(torch.full((1, 1, 1, 9), math.log(0.7), dtype=torch.float64))[0, 0]
    steps = torch.arange(9)
    assert torch.allclose(mask, 0.7 ** (steps[:, None] - steps).abs().double())


def test_gradcheck_of_every_format():
    tensors, curves = make_inputs("Selective", "S", n=7, dim=3)
    leaves = [t.requires_grad_() for t in tensors]
    for format in FORMATS.values():
        assert torch.autograd.gradcheck(
            lambda *t, f=format: f(*t, curves, chunk_size=3), leaves, fast_mode=True
        )


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("saturation", [80.0, -80.0, 1000.0])
def test_saturated_gates_stay_finite(format, dtype, saturation):
    torch.manual_seed(0)
    layer = LionAttention(16, 2, mask_type="Selective", order="S", format=format, chunk_size=4)
    with torch.no_grad():
        layer.a_i.bias.fill_(saturation)
        layer.a2_i.bias.fill_(-saturation)
    x = torch.randn(2, 21, 16, requires_grad=True)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        y = layer(x, curves_for("S", 21))
    y.float().square().sum().backward()
    assert y.isfinite().all()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def saturated_layer(mask: str, logits: list[float]) -> LionAttention:
    """A head for each logit of the decay."""
    torch.manual_seed(0)
    layer = LionAttention(4 * len(logits), len(logits), mask_type=mask, num_prefix_tokens=0)
    with torch.no_grad():
        if mask == "Decay":
            layer.a_i.copy_(torch.tensor(logits))
        else:  # whose decay is 1 - sigmoid
            layer.a_i.bias.copy_(-torch.tensor(logits))
            layer.a_i.weight.zero_()
    return layer


@pytest.mark.parametrize("mask", MASKS[1:])
def test_saturated_gates_decay_and_learn_as_exact_ones(mask):
    """sigmoid(20) is 1 in float32, and sigmoid(-200) is 0."""
    logits = [-200.0, -80.0, -20.0, 0.0, 20.0, 80.0]
    layer = saturated_layer(mask, logits)
    decay = layer.log_decay(torch.ones(1, 1, layer.qkv.in_features))[0, 0, :, 0]
    decay.sum().backward()
    gradient = layer.a_i.grad if mask == "Decay" else -layer.a_i.bias.grad
    exact = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    expected = torch.nn.functional.logsigmoid(exact)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), exact)
    torch.testing.assert_close(decay.double(), expected.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask", MASKS[1:])
def test_gates_are_not_in_half_precision(mask, dtype):
    """Neither where the weights are, nor where autocast is on."""
    torch.manual_seed(0)
    layer = LionAttention(16, 2, mask_type=mask, num_prefix_tokens=0)
    x = torch.randn(2, 5, 16)
    for weights, tokens in ((layer, x), (layer.to(dtype), x.to(dtype))):
        found = []
        weights._mix = lambda qkv, masks, found=found: found.append(masks) or qkv[..., :16]
        with torch.autocast("cpu", dtype, enabled=tokens.dtype == torch.float32):
            weights(tokens)
        decay = found.pop().log_decay
        assert not found
        gate = weights.a_i
        logits = (
            gate.double()[:, None]
            if mask == "Decay"
            else -(tokens.double() @ gate.weight.double().T + gate.bias.double()).transpose(1, 2)
        )
        expected = torch.nn.functional.logsigmoid(logits).expand(decay.shape[1:])
        assert decay.dtype == torch.float32
        torch.testing.assert_close(decay[0].double(), expected, rtol=1e-5, atol=1e-6)


def test_attention_weights_are_not_in_half_precision():
    torch.manual_seed(0)
    layer, x = LionAttention(16, 2, mask_type="Selective"), torch.randn(2, 5, 16)
    expected = layer.attention_weights(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.attention_weights(x).equal(expected)


@pytest.mark.parametrize("format", ["Attention", "Chunk"])
@pytest.mark.parametrize("size", [1, 6])
def test_products_of_decays_stop_far_from_subnormal_numbers(format, size):
    """Tokens read the one before or after them through a decay of exp(-95)."""
    v, decay = torch.ones(1, 1, 6, 1), torch.full((1, 1, 1, 6), -95.0)
    for diagonal in (-1, 1):
        q, k = (
            torch.eye(6)[None, None],
            torch.ones(6, 6).triu(diagonal).tril(diagonal).T[None, None],
        )
        numerator, _ = FORMATS[format](q, k, v, decay, chunk_size=size)
        readers = numerator[numerator > 0]
        expected = torch.full((5,), math.exp(LEAST_LOG))
        torch.testing.assert_close(readers, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("format", FORMATS)
def test_bfloat16_follows_float32(mask, format):
    torch.manual_seed(0)
    layer = LionAttention(64, 2, mask_type=mask, order="S", format=format)
    x, curves = torch.randn(2, 65, 64), curves_for("S", 65)
    exact = layer(x, curves)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = layer(x, curves)
    assert (rounded - exact).norm() / exact.norm() < 1e-2


class LiveBytes(TorchDispatchMode):
    """Counts bytes that operators allocate (`total`) and hold at the same time (`peak`)."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = self.total = 0
        self.holders = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._hold(storage.data_ptr(), storage.nbytes(), tensor)
        return result

    def _hold(self, address, size, tensor):
        if not self.holders[address]:
            self.live += size
            self.total += size
            self.peak = max(self.peak, self.live)
        self.holders[address] += 1
        weakref.finalize(tensor, self._release, address, size)

    def _release(self, address, size):
        self.holders[address] -= 1
        if not self.holders[address]:
            self.live -= size


def measured(format, mask, n, batch=1, order="Normal", grad=True):
    tensors, curves = make_inputs(mask, order, n, batch=batch)
    tensors = [t.float().requires_grad_(grad) for t in tensors]
    with LiveBytes() as bytes, torch.set_grad_enabled(grad):
        numerator, denominator = FORMATS[format](*tensors, curves, chunk_size=16)
        if grad:
            (numerator / denominator).sum().backward()
    return bytes


def test_chunk_work_and_memory_are_linear_in_tokens_backward_included():
    short, long = (measured("Chunk", "Selective", n, order="S") for n in (1025, 4097))
    assert long.total < 4.5 * short.total
    forward = [measured("Chunk", "Selective", n, order="S", grad=False) for n in (1025, 4097)]
    assert forward[1].peak < 4.5 * forward[0].peak


def test_recurrence_keeps_the_states_and_one_output_per_token():
    n, dim, scans = 1025, 8, 4
    output = n * (dim + 1) * 4
    states = scans * dim * (dim + 1) * 4
    decays_and_steps = n * scans * (3 * 4 + 8) * 2
    peak = measured("RNN", "Selective", n, order="S", grad=False).peak
    assert peak < 2 * output + 8 * states + decays_and_steps


def test_attention_shares_the_mask_of_a_constant_decay_between_images():
    one_mask_per_image = 16 * 65 * 65 * 4
    selective = measured("Attention", "Selective", 65, batch=16, grad=False)
    decay = measured("Attention", "Decay", 65, batch=16, grad=False)
    assert selective.total - decay.total > 3 * one_mask_per_image
    assert decay.total < 3 * one_mask_per_image
