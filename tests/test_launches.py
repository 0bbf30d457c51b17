"""Launches that are recorded and repeated, and calls that go round the dispatcher."""

import ctypes
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import triton
from kernel_cases import DEVICE, call, gpu, make_inputs
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction

from lion_kernels import launches, tuning
from scripts.bench.cases import LAYER_BACKWARD, Case, make_cases, presets
from scripts.bench.measure import measure


@pytest.fixture(autouse=True)
def ordinary(monkeypatch):
    """Names of kernels launched in the ordinary way; interpreted ones can be repeated as well."""
    names, run = [], launches.Launches.launch
    monkeypatch.setattr(launches, "_recorded", {})
    monkeypatch.setattr(
        launches.Launches, "launch",
        lambda self, kernel, *a, **k: (names.append(kernel.__name__), run(self, kernel, *a, **k)),
    )  # fmt: skip
    if DEVICE == "cpu":
        interpret = InterpretedFunction.run

        def compiled(self, *, grid, warmup, **arguments):
            interpret(self, grid=grid, warmup=warmup, **arguments)
            return Compiled(self, interpret, arguments)

        monkeypatch.setattr(InterpretedFunction, "run", compiled)
        driver = SimpleNamespace(get_current_stream=lambda device: 0)
        monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    return names


class Compiled:
    """What Triton's launch returns on a GPU: it takes addresses in the place of tensors."""

    function = packed_metadata = None

    def __init__(self, kernel, interpret, arguments):
        self.kernel, self.interpret, self.templates = kernel, interpret, arguments

    def run(self, x, y, z, stream, *values):
        values = values[5:]  # handles, the launch's metadata, and hooks
        arguments = {
            name: tensor_at(value, self.templates[name])
            for name, value in zip(self.kernel.arg_names, values, strict=True)
        }
        self.interpret(self.kernel, grid=(x, y, z), warmup=False, **arguments)


def tensor_at(address, template):
    if not isinstance(template, torch.Tensor) or not address:
        return template
    assert address % 16 == template.data_ptr() % 16
    length = 1 + sum((n - 1) * s for n, s in zip(template.shape, template.stride(), strict=True))
    memory = (ctypes.c_byte * (length * template.element_size())).from_address(address)
    flat = torch.frombuffer(memory, dtype=torch.uint8).view(template.dtype)
    return flat.as_strided(template.shape, template.stride())


def gradients(tensors, mask, **options):
    leaves = [t.clone().requires_grad_() for t in tensors[:2] if t is not None]
    y = call(*leaves, *tensors[len(leaves) :], mask, **options)
    return [y.detach(), *torch.autograd.grad(y, leaves, tensors[3])]


def other(tensors, seed=1):
    """Tensors like these with other numbers, and curves with other steps."""
    generator = torch.Generator().manual_seed(seed)
    projected, decay, curves, grad = tensors
    random = [
        t if t is None else torch.randn(t.shape, generator=generator).to(t)
        for t in (projected, decay, grad)
    ]
    return *random[:2], curves if curves is None else curves.flip(0), random[2]


PAIRS, BLOCK = {"BLOCK_N": 16}, {"BLOCK": 16}
PLANS = {
    "one chunk": tuning.Plan("chunks", "chunks", 48, 16, dkv=PAIRS),
    "chunks": tuning.Plan("chunks", "chunks", 32, 16, dkv=PAIRS, state={"BLOCK": 32}),
    "pairs": tuning.Plan("pairs", "pairs", 48, 16, PAIRS, PAIRS, PAIRS),
    "linear": tuning.Plan("linear", "linear", 32, 16, BLOCK, BLOCK, BLOCK, BLOCK),
}


@pytest.mark.parametrize(
    "plan, mask, order",
    [
        ("one chunk", "Decay", "Normal"), ("chunks", "Selective", "S"), ("pairs", "Decay", "S"),
        ("pairs", "Selective", "S"), ("linear", "Lit", "Normal"),
    ],
)  # fmt: skip
def test_repeated_launches_compute_what_ordinary_ones_do(plan, mask, order, ordinary, monkeypatch):
    monkeypatch.setattr(tuning, "make_plan", lambda *_: PLANS[plan])
    first = make_inputs(mask, order, 37, batch=1)
    valid = torch.arange(37, device=DEVICE)[None] < 35
    second = other(first)
    gradients(first, mask, valid=valid)
    assert len(ordinary) >= 5
    ordinary.clear()
    repeated = gradients(second, mask, valid=valid)
    assert not ordinary
    launches._recorded.clear()
    expected = gradients(second, mask, valid=valid)
    assert ordinary
    assert all(map(torch.equal, repeated, expected))


@pytest.mark.parametrize("mask", ["Lit", "Selective"])
def test_the_recurrence_is_repeated(mask, ordinary):
    first = make_inputs(mask, "Normal", 20, batch=1)
    second = other(first)
    call(*first, mask, recurrent=True)
    ordinary.clear()
    repeated = call(*second, mask, recurrent=True)
    assert not ordinary
    launches._recorded.clear()
    assert torch.equal(repeated, call(*second, mask, recurrent=True))


def test_another_layout_is_recorded_anew(ordinary):
    tensors = make_inputs("Decay", "Normal", 20, batch=1)
    documents = torch.arange(20, device=DEVICE)[None] // 7
    y = call(*tensors, "Decay", documents=documents)
    for options in (
        {"documents": documents.int()},  # another dtype
        {"documents": documents, "valid": documents < 2},  # another tensor
        {"documents": documents, "eps": 1e-3},  # another option
    ):
        ordinary.clear()
        z = call(*tensors, "Decay", **options)
        assert ordinary
        assert torch.equal(y, z) == (options.keys() == {"documents"})
    ordinary.clear()
    call(*make_inputs("Decay", "Normal", 21, batch=1), "Decay")
    assert ordinary


def test_tensors_off_alignment_or_overlapping_are_not_repeated(ordinary):
    projected, *others = make_inputs("Selective", "Normal", 20, batch=1)
    expected = call(projected, *others, "Selective")
    shifted = torch.empty(projected.numel() + 1, device=DEVICE)[1:].view_as(projected)
    shifted.copy_(projected)
    for _ in range(2):
        ordinary.clear()
        assert torch.equal(call(shifted, *others, "Selective"), expected)
        assert ordinary
    memory = -torch.rand(20 * 96, device=DEVICE)
    for _ in range(2):
        ordinary.clear()
        logs = memory[:40].view(1, 1, 20, 2)
        call(memory.view(1, 20, 96), logs, None, others[-1], "Selective")
        assert ordinary


def test_recorded_are_bounded(ordinary, monkeypatch):
    monkeypatch.setattr(launches, "MOST_RECORDINGS", 3)
    for n in range(3, 9):
        call(*make_inputs("Lit", "Normal", n, batch=1), "Lit")
        assert len(launches._recorded) <= 3


class Seen(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names = [*getattr(self, "names", []), str(function)]
        return function(*args, **kwargs or {})


def test_modes_see_the_operator():
    tensors = make_inputs("Decay", "Normal", 9, batch=1)
    with Seen() as mode:
        seen = gradients(tensors, "Decay")
    assert {"lion.mix.default", "lion.mix_backward.default"} <= set(mode.names)
    assert all(map(torch.equal, seen, gradients(tensors, "Decay")))


def test_second_derivatives_are_refused():
    projected, decay, curves, grad = make_inputs("Decay", "Normal", 9, batch=1)
    leaf = projected.requires_grad_()
    y = call(leaf, decay, curves, grad, "Decay")
    (first,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@gpu
@pytest.mark.gpu
def test_gpu_host_time_is_close_to_that_of_softmax_attention():
    host = presets("cuda")["host"]._replace(steps=(LAYER_BACKWARD,))
    cases = make_cases(host, Case("cuda", "a card", ""), scales=["base"], sizes=["112"])
    softmax, *lions = measure(cases, repeats=15, budget=3)
    times = {case.model: case.seconds for case in lions}
    assert max(times.values()) < 2 * softmax.seconds, (softmax.seconds, times)


def test_launches_are_on_the_device_of_the_tensors(monkeypatch):
    entered = []

    @contextmanager
    def device(wanted):
        entered.append(wanted)
        yield
        entered.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", device)
    found = launches._on_the_tensors_device(lambda tensor, option: (list(entered), option))
    for name, inside in (("cpu", []), ("cuda:0", []), ("cuda:1", [torch.device("cuda:1")])):
        assert found(SimpleNamespace(device=torch.device(name)), 7) == (inside, 7)
    assert not entered


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("mask", ["Lit", "Decay", "Selective"])
def test_another_gpu_than_the_current_one(mask):
    results = []
    for device in ("cuda:0", "cuda:1"):
        projected, decay, curves, grad = (
            t if t is None else t.to(device)
            for t in make_inputs(mask, "S", 50, dtype=torch.bfloat16)
        )
        projected.requires_grad_()
        y = call(projected, decay, curves, grad, mask)
        y.backward(grad)
        results.append((y.cpu(), projected.grad.cpu()))
    assert all(a.equal(b) for a, b in zip(*results, strict=True))
