"""`lion_attention` against the float64 definition, by the formats and by kernels."""

import re

import pytest
import torch
import triton
from helpers import ROOT
from kernel_cases import DEVICE
from reference import curves_for, dense

import lion_kernels
from models_lion import FORMATS, lion_attention

NAMES = ("y", "dq", "dk", "dv", "dlog_decay")
CASES = ("one curve", "two curves", "padding", "padding, two curves", "documents", "no decay",
         "no decay, documents", "sums", "scale")  # fmt: skip


def make_inputs(case, n=37, batch=2, heads=2, dim=16, width=16):
    """`q, k, v` and, unless there is no decay, log decays, in float64; and the options."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch, n, heads)
    q, k = (torch.rand(*shape, dim, generator=generator).double() + 0.1 for _ in range(2))
    v, gates = (torch.randn(*shape, d, generator=generator).double() for d in (width, 2))
    log_decay = torch.nn.functional.logsigmoid(gates).movedim(3, 0)  # [2, B, N, H]
    options = {}
    if "two curves" in case:
        options["curves"] = curves_for("S", n)
    else:
        log_decay = log_decay[0]
    if "padding" in case:
        options["valid"] = torch.rand(batch, n, generator=generator) > 0.3
    if "documents" in case:
        lengths = torch.tensor([[3, 20, n - 23], [16, 1, n - 17]])
        options["documents"] = torch.stack([torch.arange(3).repeat_interleave(t) for t in lengths])
    if case == "sums":
        options["normalise"] = False
    if case == "scale":
        options |= {"scale": 0.01, "eps": 0.1}  # beside which the scale tells
    leaves = [q, k, v] if "no decay" in case else [q, k, v, log_decay]
    return [t.contiguous() for t in leaves], options


def definition(q, k, v, log_decay=None, *, curves=None, valid=None, documents=None, scale=None,
               normalise=True, eps=1e-6):  # fmt: skip
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if log_decay is not None:
        log_decay = log_decay.reshape(-1, *log_decay.shape[-3:]).transpose(2, 3)
    if valid is not None:
        k = k * valid[:, None, :, None]
        log_decay = log_decay * valid[:, None]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    numerator, denominator = dense(q * scale, k, v, log_decay, curves, documents)
    y = numerator / (denominator + eps) if normalise else numerator
    return y.transpose(1, 2)


def outputs_and_gradients(function, leaves, options, dtype=torch.float64):
    """Log decays stay float32 at least."""
    dtypes = [dtype] * 3 + [torch.promote_types(dtype, torch.float32)]
    leaves = [t.to(d, copy=True).requires_grad_() for t, d in zip(leaves, dtypes, strict=False)]
    y = function(*leaves, **options)
    weight = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y).to(y)
    return [y.detach(), *torch.autograd.grad((y * weight).sum(), leaves)]


def assert_close(actual, expected, limit):
    for name, a, b in zip(NAMES, actual, expected, strict=False):
        error = (a.double() - b).norm() / b.norm()
        assert error < limit, f"{name}: error ratio {error:.1e}"


@pytest.fixture
def kernels(monkeypatch):
    """The calls of the kernels, which run in float32 too."""
    calls, mix = [], lion_kernels.mix

    def counted(*tensors, **options):
        calls.append(options)
        return mix(*tensors, **options)

    monkeypatch.setattr(lion_kernels, "available", lambda *_: True)
    monkeypatch.setattr(lion_kernels, "mix", counted)
    return calls


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("format", FORMATS)
def test_formats_follow_the_definition(format, case):
    leaves, options = make_inputs(case, width=5)
    expected = outputs_and_gradients(definition, leaves, options)
    options |= {"format": format, "chunk_size": 8}
    actual = outputs_and_gradients(lion_attention, leaves, options)
    assert actual[0].shape == leaves[2].shape
    assert actual[0].dtype == torch.float64
    assert_close(actual, expected, 1e-10)


@pytest.mark.parametrize("case", CASES)
def test_kernels_follow_the_definition_and_the_formats(case, kernels, monkeypatch):
    leaves, options = make_inputs(case)
    expected = outputs_and_gradients(definition, leaves, options)
    leaves = [t.to(DEVICE) for t in leaves]
    options = {k: v.to(DEVICE) if torch.is_tensor(v) else v for k, v in options.items()}
    actual = outputs_and_gradients(lion_attention, leaves, options, torch.float32)
    assert len(kernels) == 1
    assert kernels[0]["features"] == "none"
    assert_close([t.cpu() for t in actual], expected, 2e-5)
    recurrent = lion_attention(*(t.float() for t in leaves), format="RNN", **options)
    assert kernels[1]["recurrent"]
    assert_close([recurrent.cpu()], expected, 2e-5)
    monkeypatch.setattr(lion_kernels, "available", lambda *_: False)
    plain = outputs_and_gradients(lion_attention, leaves, options, torch.float32)
    assert len(kernels) == 2
    assert_close(actual, [t.double() for t in plain], 2e-5)


def test_kernels_are_left_where_there_are_none(kernels):
    leaves, _ = make_inputs("one curve")
    outputs_and_gradients(lion_attention, leaves, {"format": "RNN"})  # has no gradients
    leaves, _ = make_inputs("one curve", width=5)
    lion_attention(*leaves)
    assert not kernels


def test_float32_with_gradients_takes_no_kernel(monkeypatch):
    asked = []
    monkeypatch.setattr(lion_kernels, "available", lambda *call: asked.append(call))
    q, k, v, log_decay = (t.float() for t in make_inputs("one curve")[0])
    for leaf in (q, k, v, log_decay):
        leaf.requires_grad_()
        lion_attention(q, k, v, log_decay)
        with torch.no_grad():
            lion_attention(q, k, v, log_decay)
        leaf.requires_grad_(False)
    assert asked == [(q.device, q.dtype, 16, trained) for trained in (True, False) * 4]


@pytest.mark.parametrize(
    "dtype, limit", [(torch.float32, 2e-6), (torch.float16, 3e-3), (torch.bfloat16, 2e-2)]
)
@pytest.mark.parametrize("format", FORMATS)
def test_dtypes_whatever_autocast_says(format, dtype, limit):
    leaves, options = make_inputs("two curves")
    leaves = [*(t.to(dtype).double() for t in leaves[:3]), leaves[3]]
    expected = outputs_and_gradients(definition, leaves, options)
    options |= {"format": format, "chunk_size": 8}

    def under_autocast(*tensors, **options):
        with torch.autocast("cpu", torch.bfloat16):
            return lion_attention(*tensors, **options)

    actual = outputs_and_gradients(under_autocast, leaves, options, dtype)
    assert actual[0].dtype == dtype
    assert_close(actual, expected, limit)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gradients_of_rows_without_keys(format, dtype):
    """1 / eps is beyond float16."""
    q, k, v = (torch.rand(2, 8, 1, 5).add(0.1).to(dtype).requires_grad_() for _ in range(3))
    valid = torch.ones(2, 8, dtype=torch.bool)
    valid[1] = False
    y = lion_attention(q, k, v, torch.full((2, 8, 1), -0.1), valid=valid, format=format)
    y.float().sum().backward()
    for leaf in (q, k, v):
        assert leaf.grad[0].abs().min() > 0 or leaf is q
        assert not leaf.grad[1].any()
        assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("fast", [False, True])
def test_a_decay_of_zero_cuts_the_sequence(format, fast, kernels, monkeypatch):
    """Also at padding, whose decay is 1 whatever is given."""
    monkeypatch.setattr(lion_kernels, "available", lambda *_: fast)
    (q, k, v, log_decay), _ = make_inputs("one curve")
    log_decay[:, 10] = log_decay[:, 20] = -torch.inf
    valid = torch.ones(2, 37, dtype=torch.bool)
    valid[:, 20] = False
    closed = log_decay.exp()
    closed[:, 20] = 1.0
    expected = definition(q, k, v, closed.clamp(min=1e-300).log(), valid=valid)
    tensors = (t.float().to(DEVICE) for t in (q, k, v, log_decay))
    y = lion_attention(*tensors, valid=valid.to(DEVICE), format=format, chunk_size=8)
    assert_close([y.cpu()], [expected], 2e-5)


def test_curves_have_no_meaning_without_decays(kernels):
    q, k, v = (t.float().to(DEVICE) for t in make_inputs("no decay")[0])
    y = lion_attention(q, k, v, curves=curves_for("S", 37).to(DEVICE))
    assert torch.equal(y, lion_attention(q, k, v))
    assert kernels[0]["scans"] == 1


def test_one_curve_takes_log_decays_with_and_without_its_dimension():
    (q, k, v, log_decay), _ = make_inputs("one curve")
    curve = torch.randperm(37, generator=torch.Generator().manual_seed(1))[None]
    expected = definition(q, k, v, log_decay[None], curves=curve)
    for given in (log_decay, log_decay[None]):
        assert torch.allclose(lion_attention(q, k, v, given, curves=curve), expected)


def test_compiled_whole(kernels):
    leaves, options = make_inputs("padding", n=9)
    leaves, valid = [t.float().to(DEVICE) for t in leaves], options["valid"].to(DEVICE)
    compiled = torch.compile(lion_attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*leaves, valid=valid), lion_attention(*leaves, valid=valid))
    assert len(kernels) == 2


def test_code_in_the_docs(monkeypatch, capsys):
    text = (ROOT / "docs" / "kernels.md").read_text()
    mixing, tuning_a_card = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {}
    exec(mixing, names)
    assert names["y"].shape == (2, 50, 64)
    monkeypatch.setattr(triton.testing, "do_bench", lambda step: step())
    smaller = {"128, 197, 3 * 12": "1, 37, 3", "(1, 12": "(1, 1", "heads=12": "heads=1",
               '"cuda"': repr(DEVICE), "bfloat16": "float16"}  # fmt: skip
    for here, there in smaller.items():
        assert here in tuning_a_card
        tuning_a_card = tuning_a_card.replace(here, there)
    exec(tuning_a_card, names)
    assert names["tuning"].make_plan is names["plan"]
    assert [row.split()[0] for row in capsys.readouterr().out.splitlines()] == ["128", "168", "255"]


TOKENS = torch.rand(2, 6, 3, 16)
DECAY, ORDER = -torch.rand(2, 6, 3), torch.arange(6)
META = {"device": "meta"}


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"format": "chunk"}, "Unknown format 'chunk': choose one of Attention, RNN, Chunk"),
        ({"chunk_size": 0}, "chunk_size must be at least 1, not 0"),
        ({"chunk_size": True}, "chunk_size must be at least 1, not True: give whole tokens"),
        ({"chunk_size": 2.5}, "chunk_size must be at least 1, not 2.5: give whole tokens"),
        ({"log_decay": DECAY[0, 0]}, r"log_decay .* of shape \[2, 6, 3\], not .* \[3\]"),
        ({"q": TOKENS[0]}, r"q and k must be \[B, N, H, D\].* not \[6, 3, 16\], \[2, 6, 3, 16\]"),
        ({"k": TOKENS[:, :5]}, r"q and k must be .* \[2, 5, 3, 16\]"),
        ({"v": TOKENS[:, :, :2]}, r"v \[B, N, H, E\], not .* \[2, 6, 2, 16\]"),
        ({"v": TOKENS[..., 0]}, r"v \[B, N, H, E\], not .* \[2, 6, 3\]"),
        ({"v": TOKENS[..., :0]}, "must not be empty"),
        ({name: TOKENS[:, :0] for name in "qkv"}, "must not be empty"),
        ({"k": TOKENS.half()}, "one floating-point dtype, not torch.float32, torch.float16"),
        ({name: TOKENS.long() for name in "qkv"}, "one floating-point dtype, not torch.int64"),
        ({"v": TOKENS.to(**META)}, "on one device, not cpu, cpu, meta"),
        ({"log_decay": DECAY.bfloat16()}, "log_decay .*float32 or .*float64.* not torch.bfloat16"),
        ({"log_decay": DECAY.mT}, r"of shape \[2, 6, 3\], not torch.float32 \[2, 3, 6\]"),
        ({"log_decay": DECAY.repeat(2, 1, 1, 1)}, r"without curves .* \[1, 2, 6, 3\], not"),
        ({"curves": ORDER.repeat(2, 1)}, r"log_decay must be .* \[2, 2, 6, 3\], not"),
        ({"log_decay": DECAY.to(**META)}, "log_decay.* must be on cpu as q is, not on meta"),
        ({"curves": ORDER}, r"curves must be torch.int64 of shape \[1, 6\], not torch.int64 \[6\]"),
        ({"curves": ORDER[:0, None].expand(0, 6)}, r"curves .* not torch.int64 \[0, 6\]"),
        ({"curves": ORDER[None].int()}, "curves must be torch.int64 .* not torch.int32"),
        ({"valid": torch.ones(2, 6)}, "valid must be torch.bool .* not torch.float32"),
        ({"valid": torch.ones(2, 5, dtype=torch.bool)}, r"valid .* \[2, 6\], not torch.bool"),
        ({"documents": torch.ones(2, 6)}, "documents must be torch.int32 or torch.int64"),
        ({"documents": ORDER}, r"documents .* of shape \[2, 6\], not torch.int64 \[6\]"),
        ({"documents": ORDER.repeat(2, 1), "curves": ORDER[None]}, "token order alone: give no"),
    ],
)
def test_refusals(changed, message, kernels):
    given = {"q": TOKENS, "k": TOKENS, "v": TOKENS, "log_decay": DECAY, **changed}
    with pytest.raises(ValueError, match=message) as refused:
        lion_attention(**given)
    assert "\n" not in str(refused.value)
    assert not kernels


@pytest.mark.parametrize("format", FORMATS)
def test_a_batch_of_no_sequences(format):
    q = torch.rand(0, 6, 3, 16)
    assert lion_attention(q, q, q, torch.zeros(0, 6, 3), format=format).shape == q.shape
