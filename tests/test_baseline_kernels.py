"""The baselines' Triton kernels against float64, token by token: on a GPU or interpreted."""

import pytest
import reference_baselines as reference
import timm
import torch

import state_space
from lion_kernels import scan, semiseparable

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LIMITS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}
KERNELS = {
    "selective_scan": scan.selective_scan,
    "semiseparable_product": semiseparable.semiseparable_product,
}


def make_inputs(name, n, dtype=torch.float32, batch=2, spread=1.0, **sizes):
    """Decays are from almost 1 to almost 0; further apart with `spread`."""
    make = {"selective_scan": scan_inputs, "semiseparable_product": product_inputs}[name]
    generator = torch.Generator().manual_seed(n)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    return [t.to(DEVICE) for t in make(random, batch, n, dtype, spread, **sizes)]


def scan_inputs(random, batch, n, dtype, spread, channels=70, states=3):
    x, b, c = (random(batch, n, size).to(dtype) for size in (channels, states, states))
    delta = (spread * random(batch, n, channels) - 1).exp()
    if dtype == torch.float16:
        delta = delta.clamp(max=8)  # there is no room for more
    return x, delta, -random(channels, states).exp(), b, c


def product_inputs(random, batch, n, dtype, spread, heads=2, width=16, states=32):
    x, b, c = random(batch, n, heads, width), random(batch, n, states), random(batch, n, states)
    log_decay = -(spread * random(batch, n, heads) - 1).exp()
    return x.to(dtype), log_decay, (b / states**0.5).to(dtype), c.to(dtype)


def run(function, inputs, dtype=None):
    """Output and gradients."""
    leaves = [t.to(dtype or t.dtype).requires_grad_() for t in inputs]
    y = function(*leaves)
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(y.shape, generator=generator).to(inputs[0]).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def check(name, inputs, limit, formula=reference):
    expected = run(getattr(formula, name), inputs, torch.float64)
    for a, b, given in zip(run(KERNELS[name], inputs), expected, (inputs[0], *inputs), strict=True):
        assert a.dtype == given.dtype
        error = (a.double() - b).norm() / b.norm().clamp(min=1e-9)
        assert error < limit, f"error ratio {error:.1e}"


@pytest.mark.parametrize("n", [1, 8, 19])
def test_scan(n):
    check("selective_scan", make_inputs("selective_scan", n), 1e-5)


@pytest.mark.parametrize("n", [1, 31, 32, 70])
def test_product(n):
    check("semiseparable_product", make_inputs("semiseparable_product", n), 1e-5)


@pytest.mark.parametrize("name", KERNELS)
def test_half_precision(name):
    sizes = {"heads": 1, "width": 32} if name == "semiseparable_product" else {"channels": 40}
    check(name, make_inputs(name, 67, torch.float16, batch=1, **sizes), 1e-3)


@pytest.mark.parametrize("name", KERNELS)
def test_strong_and_weak_decays(name):
    check(name, make_inputs(name, 45, batch=1, spread=5.0), 1e-5)


@pytest.mark.parametrize("name", KERNELS)
def test_strided_and_expanded_inputs(name):
    x, *others = make_inputs(name, 9)
    expected = KERNELS[name](x, *others)
    view = torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]
    assert not view.is_contiguous()
    assert torch.equal(KERNELS[name](view, *(t.mT.contiguous().mT for t in others)), expected)
    first = x[:1].expand_as(x)
    assert torch.equal(KERNELS[name](first, *others), KERNELS[name](first.clone(), *others))


def test_the_scan_keeps_states_for_gradients_only():
    inputs = make_inputs("selective_scan", 30)
    with torch.no_grad():
        y = scan.selective_scan(*inputs)
    assert torch.equal(y, run(scan.selective_scan, inputs)[0])
    chunks = [scan.scan_operator(*inputs, keep)[1].shape[1] for keep in (False, True)]
    assert chunks == [1, -(-30 // scan.CHUNK)]


def test_operator_contracts():
    inputs = [t.requires_grad_() for t in make_inputs("selective_scan", 9, batch=1, channels=5)]
    torch.library.opcheck(scan.scan_operator.dispatched, (*inputs, True))
    inputs = [t.requires_grad_() for t in make_inputs("semiseparable_product", 9, batch=1, heads=1)]
    torch.library.opcheck(semiseparable.semiseparable_product.dispatched, tuple(inputs))


def small_model(name):
    torch.manual_seed(0)
    options = {"img_size": 24, "patch_size": 8, "embed_dim": 32, "num_classes": 5, "depth": 1}
    return timm.create_model(f"{name}_tiny_patch16_224", num_heads=2, **options).to(DEVICE)


@pytest.mark.parametrize("name", ["hydra", "vim"])
def test_models_are_the_same_with_kernels(name, monkeypatch):
    model, images = small_model(name), torch.randn(1, 3, 24, 24, device=DEVICE)
    results = []
    for enabled in (False, True):
        monkeypatch.setattr(state_space, "has_kernels", lambda _, enabled=enabled: enabled)
        model.zero_grad()
        logits = model(images)
        logits.square().sum().backward()
        results.append([logits, *(p.grad.clone() for p in model.parameters())])
    for plain, fast in zip(*results, strict=True):
        assert torch.allclose(plain, fast, atol=1e-5, rtol=1e-4)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(images)
    assert torch.allclose(compiled, logits, atol=1e-5)
    compiled.sum().backward()


@pytest.mark.parametrize("name", ["hydra", "vim"])
def test_models_take_kernels_where_they_fit(name, monkeypatch):
    model, images = small_model(name), torch.randn(1, 3, 24, 24, device=DEVICE)
    monkeypatch.setattr(state_space, "has_kernels", lambda _: True)
    used = []
    for module, function in ((scan, "selective_scan"), (semiseparable, "semiseparable_product")):
        fast = getattr(module, function)
        monkeypatch.setattr(module, function, lambda *a, fast=fast: used.append(fast) or fast(*a))
    model(images)
    assert len(used) == {"hydra": 1, "vim": 2}[name]
    if name == "hydra":  # heads of width 24 have none
        torch.manual_seed(0)
        timm.create_model(
            "hydra_tiny_patch16_224", img_size=24, embed_dim=24, num_heads=1, depth=1
        ).to(DEVICE)(images)
        assert len(used) == 1


def test_kernels_are_for_gpus_and_can_be_turned_off(monkeypatch):
    class OnGPU:
        is_cuda, dtype = True, torch.bfloat16

    assert state_space.has_kernels(OnGPU)
    assert not state_space.has_kernels(torch.zeros(1))
    OnGPU.dtype = torch.float64
    assert not state_space.has_kernels(OnGPU)
    OnGPU.dtype = torch.float32
    monkeypatch.setattr(state_space.lion_kernels, "ENABLED", False)
    assert not state_space.has_kernels(OnGPU)


SIZES = {
    "selective_scan": {"channels": 200, "states": 16},
    "semiseparable_product": {"heads": 3, "width": 64, "states": 64},
}


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("spread", [1.0, 5.0])
@pytest.mark.parametrize("n", [1, 63, 64, 197, 500])
@pytest.mark.parametrize("name", KERNELS)
def test_gpu_numerics(name, n, spread, dtype):
    inputs = make_inputs(name, n, dtype, spread=spread, **SIZES[name])
    check(name, inputs, LIMITS[dtype], formula=state_space)


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("name", KERNELS)
def test_repeats_are_bitwise_equal(name):
    inputs = make_inputs(name, 197, torch.bfloat16, batch=4, **SIZES[name])
    first = run(KERNELS[name], inputs)
    for _ in range(100):
        assert all(map(torch.equal, run(KERNELS[name], inputs), first))


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("name", ["hydra", "vim"])
def test_models_train_in_mixed_precision(name):
    """As close to float32 without kernels as plain PyTorch in bfloat16 is, within a factor."""
    model = timm.create_model(f"{name}_tiny_patch16_224", depth=2).to(DEVICE)
    images = torch.randn(4, 3, 224, 224, device=DEVICE)
    results = []
    for enabled, dtype in ((False, None), (False, torch.bfloat16), (True, torch.bfloat16)):
        with pytest.MonkeyPatch.context() as patch:
            if not enabled:
                patch.setattr(state_space, "has_kernels", lambda _: False)
            model.zero_grad()
            with torch.autocast("cuda", dtype, enabled=dtype is not None):
                loss = model(images).float().square().mean()
            loss.backward()
        results.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    exact, plain, fast = results
    assert (fast - exact).norm() < 1.5 * (plain - exact).norm()
