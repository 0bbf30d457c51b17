"""The Triton kernels against the float64 formula: on a GPU, or in Triton's interpreter."""

import runpy
import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl
from helpers import ROOT, long, slow, slow_except
from kernel_cases import DEVICE, LIMITS, VARIANTS, call, exact, gpu, make_inputs
from reference import curves_for
from torch.nn import functional as F

import lion_kernels
from lion_kernels import decay as decays
from lion_kernels import ops, tuning
from models_lion import FEATURE_MAPS, LionAttention, attention


def mix(projected, decay, *others, **options):
    """Output and gradients of the kernels."""
    leaves = [t.clone().requires_grad_() for t in (projected, decay) if t is not None]
    y = call(*leaves[:2], *[None] * (decay is None), *others, **options)
    return [y.detach(), *torch.autograd.grad(y, leaves, others[1])]


def parts(tensors, width):
    """Output, gradients of queries, keys, values, gates and decays, for errors of their own."""
    y, dprojected, *ddecay = tensors
    names = ("y", "dq", "dk", "dv", "dgates", "ddecay")
    pieces = (y, *dprojected.split(width, 2)[:3], dprojected[..., 3 * width :], *ddecay)
    return {name: t for name, t in zip(names, pieces, strict=False) if t.numel()}


def assert_close(actual, expected, dtype=torch.float32, least=1e-2):
    actual, expected = (parts(t, expected[0].shape[2]) for t in (actual, expected))
    floor = least * expected["dv"].norm()  # of one token, or through closed gates, there is no more
    for name, b in expected.items():
        error = (actual[name].double() - b).norm() / b.norm().clamp(min=floor)
        limits = OF_GATES if name in ("dgates", "ddecay") else {}
        assert error < limits.get(dtype, LIMITS[dtype]), f"{name}: error ratio {error:.1e}"


# The gates' gradients are differences of sums, which float32 rounds; models train in float32 with
# the plain formats (`test_float32_is_trained_without_kernels`).
OF_GATES = {torch.float32: 5e-4}


@pytest.mark.parametrize("n", [1, 63, long(64), long(130)])
@pytest.mark.parametrize("mask, order", VARIANTS)
def test_outputs_and_gradients(mask, order, n):
    tensors = make_inputs(mask, order, n, batch=1 if n > 100 else 2, heads=1 if n == 63 else 2)
    assert_close(mix(*tensors, mask), exact(*tensors, mask))


@pytest.mark.parametrize("dim", [32, 64, 128])
@pytest.mark.parametrize("mask, order", [("Lit", "Normal"), ("Selective", "S")])
def test_half_precision_and_wide_heads(mask, order, dim):
    tensors = make_inputs(mask, order, 70, dim, torch.float16, batch=1)
    assert_close(mix(*tensors, mask, dim), exact(*tensors, mask, dim), torch.float16)


@pytest.mark.parametrize("n", [32, slow(97), long(130)])
@pytest.mark.parametrize("mask, order", VARIANTS[1:])
def test_saturated_gates(mask, order, n):
    tensors = make_inputs(mask, order, n, gate=40.0, batch=1 if n > 32 else 2)
    assert_close(mix(*tensors, mask), exact(*tensors, mask))


@triton.jit
def log_decays_kernel(LOGITS, OUT, SIZE: tl.constexpr):
    rows = tl.arange(0, SIZE)
    tl.store(OUT + rows, decays._log_decay(tl.load(LOGITS + rows)))


def test_saturated_gates_decay_as_exact_ones():
    logits = torch.linspace(-80, 80, 256, device=DEVICE)
    found = torch.empty_like(logits)
    log_decays_kernel[(1,)](logits, found, SIZE=256)
    expected = F.logsigmoid(-logits.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


ONE_CURVE_AND_TWO = [("Decay", "Normal"), ("Selective", "S")]


@pytest.fixture(params=["one chunk", "pairs", "chunks"])
def plan(request, monkeypatch):
    """Sequences of one chunk, of all pairs along several curves, and such that hand on states, with
    several tiles in each."""
    warps = {"num_warps": 4}
    tiles = {**warps, "BLOCK_N": 16}

    def make_plan(n, dim, itemsize, num_curves, no_decay):
        if no_decay:
            rows = {**warps, "BLOCK": 16}
            return tuning.Plan("linear", "linear", 32, 16, rows, rows, rows, rows)
        form = "pairs" if num_curves > 1 and request.param != "chunks" else "chunks"
        forward = form if request.param == "pairs" else "chunks"
        fwd, dq = (tiles if f == "pairs" else warps for f in (forward, form))
        chunk = 32 if request.param == "chunks" else -(-n // 16) * 16
        return tuning.Plan(forward, form, chunk, 16, fwd, dq, tiles, {**warps, "BLOCK": 16})

    monkeypatch.setattr(tuning, "make_plan", make_plan)


@pytest.mark.parametrize("plan", ["chunks"], indirect=True)
@pytest.mark.parametrize(
    "mask, order, gate",
    slow_except(
        [("Lit", "Normal", 1.0), ("Decay", "Normal", 40.0), ("Selective", "S", 1.0)],
        [(*variant, gate) for variant in VARIANTS for gate in (1.0, 40.0)],
    ),
)
def test_states_between_blocks(mask, order, gate, plan):
    tensors = make_inputs(mask, order, 81, gate=gate, batch=1)
    actual, expected = (f(*tensors, mask) for f in (mix, exact))
    assert_close(actual, expected)


@pytest.mark.parametrize("mask, order", [*ONE_CURVE_AND_TWO, ("Decay", "S")])
def test_no_rounding_errors_are_learned_through_closed_gates(mask, order, plan):
    """Nor by heads that are open altogether, whose log decay is 0."""
    projected, decay, *others = make_inputs(mask, order, 40, batch=1)
    if mask == "Decay":
        decay[:, 0], decay[:, 1] = -20.0, 200.0
        (*_, gradient) = mix(projected, decay, *others, mask)
    else:
        projected[:, ::2, 3 * others[1].shape[2] :] = 20.0
        _, dprojected = mix(projected, decay, *others, mask)
        gradient = dprojected[:, ::2, 3 * others[1].shape[2] :]
    assert (gradient == 0).all()


@pytest.mark.parametrize("plan", ["one chunk", "pairs"], indirect=True)
@pytest.mark.parametrize("mask, order", slow_except(ONE_CURVE_AND_TWO, VARIANTS[1:]))
def test_one_block_of_several_rows(mask, order, plan):
    tensors = make_inputs(mask, order, 81, batch=1)
    assert_close(mix(*tensors, mask), exact(*tensors, mask))


@pytest.mark.parametrize(
    "mask, order", slow_except([("Lit", "Normal"), *ONE_CURVE_AND_TWO], VARIANTS)
)
def test_padding(mask, order, plan):
    tensors = make_inputs(mask, order, 61, heads=1)
    valid = torch.rand(2, 61, generator=torch.Generator().manual_seed(0)) > 0.3
    actual, expected = (f(*tensors, mask, valid=valid.to(DEVICE)) for f in (mix, exact))
    assert_close(actual, expected)


@pytest.mark.parametrize("mask", [slow("Lit"), "Decay", "Selective"])
def test_documents(mask, plan):
    tensors = make_inputs(mask, "Normal", 70, heads=1)
    lengths = torch.tensor([[3, 29, 1, 37], [32, 9, 24, 5]])  # one ends where a block does
    documents = torch.stack([torch.arange(4).repeat_interleave(row) for row in lengths])
    options = {"documents": documents.to(DEVICE), "valid": (documents != 3).to(DEVICE)}
    actual, expected = (f(*tensors, mask, **options) for f in (mix, exact))
    assert_close(actual, expected)


def test_sequences_beyond_int32_are_refused():
    qkv = torch.empty(1, device=DEVICE).expand(1, 2**20, 3 * 1024)
    with pytest.raises(ValueError, match="1048576 tokens of 3072 columns are too many"):
        ops.Call((qkv, *(None,) * 4), (64, 16, 1, 0, True, "elu", True, 1e-6))


@pytest.mark.parametrize("mask, order", [("Lit", "Normal"), *ONE_CURVE_AND_TWO])
def test_rows_that_reach_no_key_in_float16(mask, order, plan):
    """Queries over row sums of almost 0 are beyond its range."""
    tensors = make_inputs(mask, order, 61, dtype=torch.float16, heads=1)
    valid = torch.ones(2, 61, dtype=torch.bool, device=DEVICE)
    valid[0, 40:] = valid[1] = False
    options = {"valid": valid}
    if order == "Normal":  # which keeps padding from the keys of its sequence
        options["documents"] = (~valid).long()
    tensors[-1][~valid] = 0
    actual, expected = (f(*tensors, mask, **options) for f in (mix, exact))
    assert_close(actual, expected, torch.float16)


@pytest.mark.parametrize("mask", FEATURE_MAPS)
def test_without_feature_map(mask, plan):
    tensors = make_inputs(mask, "Normal", 61, batch=1)
    actual, expected = (f(*tensors, mask, features="none", normalise=False) for f in (mix, exact))
    assert_close(actual, expected)


EIGHT = "Snakes+Diagonal+Hilbert"


@pytest.mark.parametrize(
    "mask, num_curves",
    slow_except(
        [("Decay", 3), ("Selective", 8)],
        [(mask, count) for mask in ("Decay", "Selective") for count in (3, 8)],
    ),
)
def test_gradients_along_many_curves(mask, num_curves, plan):
    tensors = make_inputs(mask, EIGHT, 37, batch=1, heads=1, num_curves=num_curves)
    assert len(tensors[2]) == num_curves
    assert_close(mix(*tensors, mask), exact(*tensors, mask))


def test_strided_input():
    projected, decay, curves, _ = make_inputs("Decay", "S", 30)
    wider = torch.cat([projected, torch.full((2, 30, 8), torch.nan, device=DEVICE)], 2)
    options = {"heads": 2, "dim": 16, "scans": 2}
    expected = lion_kernels.mix(projected, decay, curves, **options)
    assert torch.equal(lion_kernels.mix(wider[..., :-8], decay, curves, **options), expected)


@pytest.mark.parametrize("n", [5, 40, 700])
@pytest.mark.parametrize("mask, order", VARIANTS)
def test_a_batch_of_no_images(mask, order, n):
    projected, decay, curves, grad = make_inputs(mask, order, n)
    leaves = [t for t in (projected[:0].clone(), decay) if t is not None]
    y = call(leaves[0].requires_grad_(), decay if decay is None else decay.requires_grad_(),
             curves, grad[:0], mask)  # fmt: skip
    y.backward(grad[:0])
    assert y.shape == grad[:0].shape
    assert all(torch.equal(leaf.grad, torch.zeros_like(leaf)) for leaf in leaves)
    assert call(leaves[0], decay, curves, grad[:0], mask, recurrent=True).shape == y.shape


def test_refusals():
    with pytest.raises(ValueError, match="width 16, 32, 64 or 128, not 24"):
        lion_kernels.mix(torch.zeros(1, 4, 72), lit=True, heads=1, dim=24)
    order = torch.arange(4)
    with pytest.raises(ValueError, match="token order alone: give no curves"):
        lion_kernels.mix(
            torch.zeros(1, 4, 64), None, order[None], None, order[None], heads=1, dim=16
        )
    for columns, lit in ((49, True), (47, True), (48, False), (113, False)):
        with pytest.raises(ValueError, match=f"width 16 do not fit {columns} columns"):
            lion_kernels.mix(torch.zeros(1, 4, columns), heads=1, dim=16, lit=lit)


@pytest.mark.parametrize("order", ["Normal", slow("S")])
def test_no_gradient_of_what_fills_up_the_rows(order, plan, monkeypatch):
    def unwritten(*arguments):
        return tuple(t.fill_(torch.nan) for t in like_inputs(*arguments))

    like_inputs = ops.like_inputs
    monkeypatch.setattr(ops, "like_inputs", unwritten)
    projected, *others = make_inputs("Selective", order, 70, heads=3)
    scans = 1 if order == "Normal" else 2
    dprojected = mix(projected, *others, "Selective")[1]
    assert (dprojected[..., 3 * (3 * 16 + scans) :] == 0).all()
    assert dprojected.isfinite().all()


@pytest.mark.parametrize(
    "mask, order", [("Lit", "Normal"), ("Decay", "S"), ("Selective", "Normal")]
)
def test_operator_contract(mask, order):
    projected, decay, curves, _ = make_inputs(mask, order, 9, batch=1, heads=1)
    leaves = [t if t is None else t.requires_grad_() for t in (projected, decay)]
    options = (1, 16, 2 if order == "S" else 1, 1, mask == "Lit", "silu", True, 1e-6)
    torch.library.opcheck(ops.mix_operator.dispatched, (*leaves, curves, None, None, *options))


class Slower(LionAttention):
    def log_decay(self, x):
        return 0.5 * super().log_decay(x)


@pytest.mark.parametrize("format", ["Attention", "Chunk"])
@pytest.mark.parametrize(
    "kind, mask, order",
    [*((LionAttention, *variant) for variant in VARIANTS), (Slower, "Decay", "Normal"),
     (Slower, "Selective", "S")],
)  # fmt: skip
def test_the_layer_is_the_same_with_kernels(kind, mask, order, format, monkeypatch):
    torch.manual_seed(0)
    layer = kind(32, 2, mask_type=mask, order=order, format=format).to(DEVICE)
    valid = torch.arange(21, device=DEVICE).repeat(2, 1) < 19
    x, curves = torch.randn(2, 21, 32, device=DEVICE), curves_for(order, 21)
    curves = curves if curves is None else curves.to(DEVICE)
    results = []
    for enabled in (False, True):
        monkeypatch.setattr(lion_kernels, "available", lambda *_, enabled=enabled: enabled)
        layer.zero_grad()
        y = layer(x, curves, valid=valid)
        y.square().sum().backward()
        results.append([y, *(p.grad.clone() for p in layer.parameters())])
    for plain, fast in zip(*results, strict=True):
        assert torch.allclose(plain, fast, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mask", ["Lit", "Selective"])
def test_compiled_and_exported_whole(mask, monkeypatch):
    monkeypatch.setattr(lion_kernels, "available", lambda *_: True)
    torch.manual_seed(0)
    layer = LionAttention(32, 2, mask_type=mask).to(DEVICE)
    x = torch.randn(2, 21, 32, device=DEVICE, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    gradients = [torch.autograd.grad(f(x).square().sum(), x)[0] for f in (layer, compiled)]
    assert torch.equal(*gradients)
    exported = torch.export.export(layer, (x,))
    assert any("lion.mix" in str(node.target) for node in exported.graph.nodes)
    assert torch.equal(exported.module()(x), layer(x))


def test_float32_is_trained_without_kernels():
    gpu, dtypes = torch.device("cuda"), (torch.float32, torch.bfloat16, torch.float16)
    for trained, expected in ((False, [True] * 3), (True, [False, True, True])):
        found = [lion_kernels.available(gpu, dtype, 64, trained) for dtype in dtypes]
        assert found == expected


@pytest.mark.parametrize("plan", ["one chunk", "chunks"], indirect=True)
@pytest.mark.parametrize("order", ["Normal", slow("S")])
def test_log_decays_of_tokens(order, plan):
    """The same as LION-S's gates, which have them as logits."""
    projected, _, curves, grad = make_inputs("Selective", order, 61, batch=1)
    valid = torch.arange(61, device=DEVICE)[None] < 50
    scans, width = 1 if curves is None else 2, grad.shape[2]
    z = projected[..., 3 * width :][..., : scans * 2].unflatten(2, (scans, 2)).movedim(2, 0)
    logs = torch.nn.functional.logsigmoid(-z).contiguous().requires_grad_()
    y = call(projected[..., : 3 * width], logs, curves, grad, "Selective", valid=valid, prefix=0)
    leaf = projected.clone().requires_grad_()
    expected = call(leaf, None, curves, grad, "Selective", valid=valid, prefix=0)
    assert torch.allclose(y, expected, atol=1e-5)
    (dz,) = torch.autograd.grad(expected, leaf, grad)
    (dlogs,) = torch.autograd.grad(y, logs, grad)
    dz = dz[..., 3 * width :][..., : scans * 2].unflatten(2, (scans, 2)).movedim(2, 0)
    assert torch.allclose(-torch.sigmoid(z) * dlogs, dz, atol=1e-5, rtol=1e-4)


def test_kernels_can_be_turned_off(monkeypatch):
    monkeypatch.setenv("LION_KERNELS", "0")
    assert not runpy.run_path(lion_kernels.__file__)["ENABLED"]
    monkeypatch.delenv("LION_KERNELS")
    assert runpy.run_path(lion_kernels.__file__)["ENABLED"]


@pytest.mark.slow
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
@pytest.mark.parametrize("n", [1, 63, 64, 197, 500, 577, 1025, 4097])
@pytest.mark.parametrize("mask, order", VARIANTS)
def test_gpu_numerics(mask, order, n, gate, dtype):
    tensors = make_inputs(mask, order, n, 64, dtype, batch=1, gate=gate)
    expected = exact(*tensors, mask, 64, formula=attention)
    # Of one token, or through closed gates, errors count beside the least gradient that queries and
    # keys have otherwise.
    least = 5e-2 if n == 1 or gate > 1 else 1e-2
    assert_close(mix(*tensors, mask, 64), expected, dtype, least=least)


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("n", [63, 197, 333, 577, 701, 1025])
@pytest.mark.parametrize("num_curves", [3, 8])
@pytest.mark.parametrize("mask", ["Decay", "Selective"])
def test_gpu_gradients_along_many_curves(mask, num_curves, n, dtype):
    """Up to 320 tokens, up to 640 and beyond: one chunk, pairs, one curve after the other."""
    tensors = make_inputs(mask, EIGHT, n, 64, dtype, batch=1, num_curves=num_curves)
    expected = exact(*tensors, mask, 64, formula=attention)
    assert_close(mix(*tensors, mask, 64), expected, dtype)


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("n", [197, 500])
@pytest.mark.parametrize("mask, order", VARIANTS)
def test_repeats_are_bitwise_equal(mask, order, n):
    tensors = make_inputs(mask, order, n, 64, torch.bfloat16, batch=4, heads=3)
    first = mix(*tensors, mask, 64)
    for _ in range(100):
        assert all(map(torch.equal, mix(*tensors, mask, 64), first))


@gpu
@pytest.mark.gpu
def test_more_sequences_than_a_grid_is_high():
    tensors = make_inputs("Selective", "Normal", 3, batch=40_000)
    assert_close(mix(*tensors, "Selective"), exact(*tensors, "Selective", formula=attention))
