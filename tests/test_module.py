"""LION as a PyTorch module: wrapped, replaced and sharded layers, empty and moved weights."""

import copy
import pickle
from functools import partial
from itertools import product

import pytest
import timm
import torch
import torch.distributed as dist
from helpers import slow
from kernel_cases import DEVICE
from reference import curves_for
from timm.models._manipulate import reinit_non_persistent_buffers
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

import lion_kernels
from models_lion import FEATURE_MAPS, FORMATS, LionAttention

LAYERS = ("qkv", "a_i", "a2_i", "proj")


@pytest.fixture(params=[False, True], ids=["plain", "kernels"])
def kernels(request, monkeypatch):
    monkeypatch.setattr(lion_kernels, "available", lambda *_: request.param)
    return request.param


def mixer(**options):
    torch.manual_seed(0)
    return LionAttention(32, 2, **{"mask_type": "Selective", "order": "S", **options}).to(DEVICE)


def tokens(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 21, 32, generator=generator).to(DEVICE, dtype)


def mixed(layer, x):
    return layer(x, curves_for("S", x.shape[1]).to(DEVICE))


def small_model(name="lion_tiny_patch16_224", **options):
    defaults = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_classes": 5}
    return timm.create_model(name, **{**defaults, **options})


# Wrapped layers: each of these doubles what the layer returns


class LowRank(nn.Module):
    """As LoRA adds to a layer; twice the layer for these factors."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.down = nn.Linear(layer.in_features, layer.in_features, bias=False)
        self.up = nn.Linear(layer.in_features, layer.out_features)
        with torch.no_grad():
            self.down.weight.copy_(torch.eye(layer.in_features))
            self.up.weight.copy_(layer.weight)
            self.up.bias.copy_(layer.bias)
        self.to(layer.weight.device, layer.weight.dtype)

    def forward(self, x):
        return self.layer(x) + self.up(self.down(x))


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class HalfWeight(torch.Tensor):
    """A weight as quantisers keep it: half of it is stored, and products are all it can do."""

    @staticmethod
    def __new__(cls, half):
        return torch.Tensor._make_wrapper_subclass(cls, half.shape, dtype=half.dtype)

    def __init__(self, half):
        self.half_weight = half

    def __tensor_flatten__(self):
        return ["half_weight"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, context, size, stride):
        return cls(inner["half_weight"])

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.linear:
            x, weight, bias = args
            return 2 * F.linear(x, weight.half_weight, bias / 2)
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].half_weight.detach())
        raise NotImplementedError(f"{function} of a quantised weight")


class Twice(nn.Module):
    def forward(self, weight):
        return 2 * weight


def with_low_rank(layer, name):
    setattr(layer, name, LowRank(getattr(layer, name)))


def with_subclass(layer, name):
    bare = getattr(layer, name)
    doubled = Doubled(bare.in_features, bare.out_features).to(DEVICE)
    doubled.load_state_dict(bare.state_dict())
    setattr(layer, name, doubled)


def with_forward_hook(layer, name):
    getattr(layer, name).register_forward_hook(lambda module, inputs, output: 2 * output)


def with_pre_hook(layer, name):
    bare = getattr(layer, name)
    bare.bias.data *= 2
    bare.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))


def with_parametrization(layer, name):
    for tensor in ("weight", "bias"):
        parametrize.register_parametrization(getattr(layer, name), tensor, Twice())


def with_own_forward(layer, name):  # accelerate's hooks do so
    bare = getattr(layer, name)
    forward = bare.forward
    bare.forward = lambda x: 2 * forward(x)


def with_quantised_weight(layer, name):
    bare = getattr(layer, name)
    bare.weight = nn.Parameter(HalfWeight(bare.weight.detach()), requires_grad=False)
    bare.bias.data *= 2


WRAPPERS = (
    with_low_rank,
    with_subclass,
    with_forward_hook,
    with_pre_hook,
    with_parametrization,
    with_own_forward,
    with_quantised_weight,
)


def doubled_by_hand(name):
    layer = mixer()
    with torch.no_grad():
        getattr(layer, name).weight.mul_(2)
        getattr(layer, name).bias.mul_(2)
    return layer


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("wrap", WRAPPERS)
def test_wrapped_layers_are_called(wrap, name, kernels):
    layer, x = mixer(), tokens()
    plain = mixed(layer, x)
    expected = mixed(doubled_by_hand(name), x)
    wrap(layer, name)
    assert torch.allclose(mixed(layer, x), expected, atol=1e-5)
    assert not torch.allclose(expected, plain, atol=1e-3)


def test_hooks_of_all_modules_are_called(kernels):
    layer, x = mixer(), tokens()
    called = []
    handle = register_module_forward_hook(lambda module, *_: called.append(module))
    try:
        mixed(layer, x)
    finally:
        handle.remove()
    assert all(called.count(getattr(layer, name)) == 1 for name in LAYERS)


@pytest.mark.parametrize("format", FORMATS)
def test_hooks_see_all_tokens_once_and_their_gradients(format, kernels):
    layer, x = mixer(format=format, num_prefix_tokens=2), tokens()
    seen, gradients = [], []
    for name in LAYERS:
        module = getattr(layer, name)
        module.register_forward_hook(lambda m, inputs, output: seen.append((m, *inputs, output)))
        module.register_full_backward_hook(lambda m, inputs, outputs: gradients.append(m))
    mixed(layer, x).sum().backward()
    assert sorted(id(m) for m, *_ in seen) == sorted(id(getattr(layer, name)) for name in LAYERS)
    assert len(gradients) == len(LAYERS)
    for module, inputs, output in seen:
        assert inputs.shape == x.shape
        assert torch.equal(output, F.linear(inputs, module.weight, module.bias))


class LinearCalls(TorchFunctionMode):
    count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += function is F.linear
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("bias", [True, False])
def test_one_product_for_bare_layers(bias, monkeypatch):
    monkeypatch.setattr(lion_kernels, "available", lambda *_: True)
    layer, x = mixer(qkv_bias=bias), tokens()
    with LinearCalls() as bare:
        expected = mixed(layer, x)
    layer.a2_i.register_forward_hook(lambda *_: None)
    with LinearCalls() as wrapped:
        assert torch.allclose(mixed(layer, x), expected, atol=1e-6)
    assert (bare.count, wrapped.count) == (2, 4)


@pytest.mark.parametrize("bias", [True, False])
def test_rows_are_filled_up_with_what_is_there_and_without_gradients(bias):
    layer, x = mixer(qkv_bias=bias), tokens()
    projected = layer._project(x)
    layers = (layer.qkv, layer.a_i, layer.a2_i)
    expected = torch.cat([part(x) for part in layers], dim=-1)
    rest = projected.shape[2] - expected.shape[2]
    assert projected.shape[2] % 32 == 0
    assert rest == 60
    expected = torch.cat([expected, expected[..., :rest]], dim=-1)
    assert torch.allclose(projected, expected, atol=1e-6)
    of_rest = torch.zeros_like(projected)
    of_rest[..., -rest:] = 1
    parameters = [p for part in layers for p in part.parameters()]
    gradients = torch.autograd.grad(projected, parameters, of_rest)
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("wrap", [with_low_rank, slow(with_forward_hook), with_parametrization])
def test_wrapped_layers_compile_and_export_whole(wrap, kernels):
    torch.compiler.reset()
    layer, x = mixer(order="Normal"), tokens()
    wrap(layer, "a_i")
    wrap(layer, "qkv")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    gradients = [
        torch.autograd.grad(f(x).square().sum(), layer.proj.weight)[0] for f in (layer, compiled)
    ]
    assert torch.allclose(*gradients, atol=1e-4)
    if wrap is not with_parametrization:  # which the exporter renames
        exported = torch.export.export(layer, (x,))
        assert torch.allclose(exported.module()(x), layer(x), atol=1e-5)


@pytest.mark.parametrize("wrap", [with_low_rank, with_subclass, with_pre_hook])
def test_copies_of_wrapped_layers(wrap, kernels):
    layer, x = mixer(), tokens()
    wrap(layer, "a_i")
    assert torch.equal(mixed(copy.deepcopy(layer), x), mixed(layer, x))
    if wrap is not with_pre_hook:  # a function without a name
        assert torch.equal(mixed(pickle.loads(pickle.dumps(layer)), x), mixed(layer, x))


def test_parameters_of_a_functional_call(kernels):
    layer, x = mixer(), tokens()
    given = {name: (2 * p).detach().requires_grad_() for name, p in layer.named_parameters()}
    curves = curves_for("S", 21).to(DEVICE)
    output = functional_call(layer, given, (x, curves))
    gradients = torch.autograd.grad(output.square().sum(), list(given.values()))
    layer.load_state_dict(given)
    expected = mixed(layer, x)
    assert torch.allclose(output, expected, atol=1e-6)
    expected.square().sum().backward()
    for gradient, parameter in zip(gradients, layer.parameters(), strict=True):
        assert torch.allclose(gradient, parameter.grad, atol=1e-5)


@pytest.mark.parametrize("tie", ["layer", "weight"])
def test_tied_gates(tie, kernels):
    layer, x = mixer(), tokens()
    apart = copy.deepcopy(layer)
    apart.a2_i.load_state_dict(apart.a_i.state_dict())
    if tie == "layer":
        layer.a2_i = layer.a_i
    else:
        layer.a2_i.weight, layer.a2_i.bias = layer.a_i.weight, layer.a_i.bias
    outputs = [mixed(m, x) for m in (layer, apart)]
    assert torch.allclose(*outputs, atol=1e-6)
    for output in outputs:
        output.square().sum().backward()
    expected = apart.a_i.weight.grad + apart.a2_i.weight.grad
    assert torch.allclose(layer.a_i.weight.grad, expected, atol=1e-5)


@pytest.mark.parametrize("mask", ["Decay", "Selective"])
def test_decays_can_be_parametrized(mask, kernels):
    layer, x = mixer(mask_type=mask), tokens()
    expected = copy.deepcopy(layer)
    with torch.no_grad():
        for p in (expected.a_i,) if mask == "Decay" else expected.a_i.parameters():
            p.mul_(2)
    if mask == "Decay":
        parametrize.register_parametrization(layer, "a_i", Twice())
    else:
        with_parametrization(layer, "a_i")
    assert torch.allclose(mixed(layer, x), mixed(expected, x), atol=1e-6)


def quantised(model):
    return torch.ao.quantization.quantize_dynamic(model.cpu(), {nn.Linear}, dtype=torch.qint8)


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated")
@pytest.mark.parametrize("mask, order", list(product(FEATURE_MAPS, ("Normal", "S"))))
def test_dynamic_quantisation(mask, order):
    torch.manual_seed(0)
    model = small_model(mask_type=mask, order=order).eval()
    x = torch.randn(2, 3, 32, 32)
    expected, logits = model(x), quantised(model)(x)
    assert isinstance(quantised(model).blocks[0].attn.qkv, torch.ao.nn.quantized.dynamic.Linear)
    assert 0 < (logits - expected).norm() < 0.05 * expected.norm()


def test_peft(kernels):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = small_model(mask_type="Selective", order="S", embed_dim=48).to(DEVICE).eval()
    x = torch.randn(2, 3, 32, 32, device=DEVICE)
    plain = model(x)
    config = peft.LoraConfig(target_modules=["qkv", "a_i", "a2_i"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    output = adapted(x)
    output.square().sum().backward()
    for name, parameter in adapted.named_parameters():
        assert (parameter.grad is not None and parameter.grad.any()) == ("lora_" in name), name
    with torch.no_grad():
        assert not torch.allclose(output, plain, atol=1e-2)
        assert torch.allclose(adapted.merge_and_unload()(x), output, atol=1e-4)


def test_torchao():
    torchao = pytest.importorskip("torchao.quantization")
    model = small_model(mask_type="Selective", order="S", embed_dim=64, num_heads=2).eval()
    x = torch.randn(2, 3, 32, 32)
    expected = model(x)
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    assert type(model.blocks[0].attn.a_i.weight) is not nn.Parameter
    assert 0 < (model(x) - expected).norm() < 0.05 * expected.norm()


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.skipif(DEVICE != "cpu", reason="one process of gloo")
@pytest.mark.parametrize("mask", FEATURE_MAPS)
@pytest.mark.parametrize("sharded", [nn.Linear, LionAttention], ids=["layers", "mixers"])
def test_sharded(sharded, mask, one_process, kernels):
    torch.manual_seed(0)
    model = small_model(mask_type=mask, order="S", embed_dim=48, depth=1)
    whole, x = copy.deepcopy(model), torch.randn(2, 3, 32, 32)
    for module in list(model.modules()):
        if isinstance(module, sharded):
            fully_shard(module, mesh=one_process)
    fully_shard(model, mesh=one_process)
    for m in (model, whole):
        m(x).square().sum().backward()
    for (name, a), b in zip(model.named_parameters(), whole.parameters(), strict=True):
        assert torch.allclose(a.grad.full_tensor(), b.grad, atol=1e-5), name


# The precision of gates


def test_gates_of_a_bfloat16_model_are_computed_in_float32(monkeypatch):
    monkeypatch.setattr(lion_kernels, "available", lambda *_: False)
    layer, x = mixer().to(torch.bfloat16), tokens(torch.bfloat16)
    exact = copy.deepcopy(layer).double().log_decay(x.double())
    assert layer.log_decay(x).dtype == torch.float32
    assert torch.allclose(layer.log_decay(x).double(), exact, atol=1e-6)
    assert mixed(layer, x).dtype == torch.bfloat16


def test_decays_of_a_bfloat16_model_reach_the_kernels_in_float32(monkeypatch):
    dtypes = []
    monkeypatch.setattr(lion_kernels, "available", lambda *_: True)
    monkeypatch.setattr(
        lion_kernels, "mix",
        lambda qkv, decay, *_, **__: dtypes.append(decay.dtype) or qkv[..., : qkv.shape[-1] // 3],
    )  # fmt: skip
    mixed(mixer(mask_type="Decay").to(torch.bfloat16), tokens(torch.bfloat16))
    assert dtypes == [torch.float32]


@pytest.mark.parametrize("wrap", [with_low_rank, with_forward_hook, with_parametrization])
def test_wrapped_gates_compute_in_the_dtype_of_their_parameters(wrap, monkeypatch):
    monkeypatch.setattr(lion_kernels, "available", lambda *_: False)
    layer, seen = mixer(), []
    wrap(layer, "a_i")
    layer.a_i.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.autocast(DEVICE, torch.bfloat16):
        y = mixed(layer, tokens(torch.bfloat16))
    assert y.dtype == torch.bfloat16
    y = mixed(layer.to(torch.bfloat16), tokens(torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert seen == [torch.float32, torch.bfloat16]
    assert layer.log_decay(tokens(torch.bfloat16)).dtype == torch.float32


# Empty, filled and moved weights


NAMES = ("lion_tiny_patch16_224", "lion_tiny_distilled_patch16_224")
EMPTY = list(product(NAMES, FEATURE_MAPS, ("Normal", "S")))


def empty_model(name, mask, order):
    """On the meta device, and what it should compute once it has the weights of another."""
    torch.manual_seed(0)
    build = partial(small_model, name, mask_type=mask, order=order, init_values=0.1, pos_emb=True)
    filled = build().eval()
    with torch.device("meta"):
        return build().eval(), filled


@pytest.mark.parametrize("name, mask, order", EMPTY)
def test_weights_are_loaded_into_an_empty_model(name, mask, order):
    x = torch.randn(2, 3, 32, 32)
    for renew in (False, True):
        assigned, filled = empty_model(name, mask, order)
        assigned.load_state_dict(filled.state_dict(), assign=True)
        copied = empty_model(name, mask, order)[0].to_empty(device="cpu")
        copied.load_state_dict(filled.state_dict())
        for model in (assigned, copied):
            if renew:
                assert "(root)" in reinit_non_persistent_buffers(model)
                assert (model.curves is None) == (order == "Normal")
            assert torch.equal(model(x), filled(x))
            assert torch.equal(model.double()(x.double()).float(), filled(x)) or torch.allclose(
                model(x.double()).float(), filled(x), atol=1e-5
            )


@pytest.mark.parametrize("name, mask, order", EMPTY)
def test_an_empty_model_is_initialised(name, mask, order):
    models = []
    for poison in (float("nan"), 7.0):
        model = empty_model(name, mask, order)[0].to_empty(device="cpu")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(poison)
        torch.manual_seed(1)
        model.init_weights()
        models.append(model)
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b), name  # nothing is left of what was there
    assert models[0](torch.randn(1, 3, 32, 32)).isfinite().all()


def test_decays_are_drawn_from_a_normal_distribution():
    with torch.device("meta"):
        layer = LionAttention(1024, 1024, order="S")
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    for decay in (layer.a_i, layer.a2_i):
        assert decay.mean().abs() < 0.2
        assert (decay.std() - 1).abs() < 0.2
    assert not torch.equal(layer.a_i, layer.a2_i)


def test_curves_follow_the_model():
    model = small_model(order="S")
    curves = model.curves.clone()
    assert "curves" not in model.state_dict()
    for move in (nn.Module.half, nn.Module.double, partial(nn.Module.to_empty, device="cpu")):
        move(model)
        assert torch.equal(model.curves, curves)
    assert model.to("meta").curves.is_meta
