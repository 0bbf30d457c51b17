"""Models as torch.export and both of PyTorch's ONNX exporters write them."""

import pytest
import timm
import torch
from helpers import older, slow
from torch.export import Dim

import models_lion  # noqa: F401  (registers the models)
from models_lion import FORMATS

VARIANTS = [
    (mask, order, format)
    for mask, order in (
        ("Lit", "Normal"),
        ("Decay", "S"),
        ("Selective", "Normal"),
        ("Selective", "S"),
    )
    for format in FORMATS
]
SIZES = ((2, 32, 40), (3, 32, 32), (1, 40, 24), (1, 64, 48), (1, 24, 64))  # the last, whole chunks
BATCH, HEIGHT, WIDTH = Dim("batch", min=1, max=64), Dim("h", min=2, max=16), Dim("w", min=2, max=16)
ANY_SIZE = ({0: BATCH, 2: 8 * HEIGHT, 3: 8 * WIDTH},)


def small_model(mask, order, format, name="lion_tiny_patch16_224", **options):
    torch.manual_seed(0)
    model = timm.create_model(
        name, mask_type=mask, order=order, format=format, chunk_size=5, img_size=32, patch_size=8,
        embed_dim=24, depth=1, num_classes=5, **options,
    )  # fmt: skip
    with torch.no_grad():  # larger than they are drawn, so that errors show
        for parameter in model.blocks.parameters():
            parameter.mul_(5)
    return model.eval()


def images(batch=2, height=32, width=32):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def outputs_by_onnxruntime(path, sizes):
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return [torch.from_numpy(session.run(None, {name: images(*size).numpy()})[0]) for size in sizes]


def assert_outputs(model, actual, sizes):
    with torch.no_grad():
        for output, size in zip(actual, sizes, strict=True):
            torch.testing.assert_close(output, model(images(*size)), atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace")
@pytest.mark.parametrize("mask, order, format", VARIANTS)
def test_traces_hold_for_any_batch(mask, order, format):
    model = small_model(mask, order, format)
    traced = torch.jit.trace(model, images(), check_trace=False)
    assert_outputs(model, [traced(images(batch)) for batch in (1, 3)], [(1,), (3,)])
    assert "aten::mT" not in str(traced.inlined_graph)  # which the older ONNX exporter lacks


@pytest.mark.parametrize("mask, order, format", VARIANTS)
def test_any_batch_by_the_older_onnx_exporter(mask, order, format, tmp_path):
    model = small_model(mask, order, format)
    path = tmp_path / "model.onnx"
    axes = {"images": {0: "batch"}}
    torch.onnx.export(
        model, (images(),), path, dynamo=False, input_names=["images"], dynamic_axes=axes
    )
    sizes = [(batch, 32, 32) for batch in (1, 2, 3)]
    assert_outputs(model, outputs_by_onnxruntime(path, sizes), sizes)


@pytest.mark.parametrize(
    "mask, order, format",
    [("Decay", "S", "Attention"), slow("Selective", "S", "Chunk")],
)
def test_any_size_by_torch_export(mask, order, format):
    model = small_model(mask, order, format, dynamic_img_size=True)
    exported = torch.export.export(model, (images(*SIZES[0]),), dynamic_shapes=ANY_SIZE).module()
    assert_outputs(model, [exported(images(*size)) for size in SIZES], SIZES)


def test_any_size_of_a_distilled_model_with_positions():
    name = "lion_tiny_distilled_patch16_224"
    model = small_model("Decay", "S", "Attention", name, pos_emb=True, dynamic_img_size=True)
    exported = torch.export.export(model, (images(*SIZES[0]),), dynamic_shapes=ANY_SIZE).module()
    sizes = (SIZES[0], *SIZES[2:])  # timm settles whether it is that of the positions
    assert_outputs(model, [exported(images(*size)) for size in sizes], sizes)


@pytest.mark.slow
@pytest.mark.skipif(older("torch", "2.12"), reason="torch 2.11 has no gradient of it")
def test_an_exported_recurrence_takes_any_size_and_has_its_gradients():
    model = small_model("Selective", "S", "RNN", dynamic_img_size=True)
    exported = torch.export.export(model, (images(*SIZES[0]),), dynamic_shapes=ANY_SIZE).module()
    assert_outputs(model, [exported(images(*size)) for size in SIZES], SIZES)
    x = images(1, 24, 40)
    for m in (model, exported):
        m(x).square().sum().backward()
    expected = dict(model.named_parameters())
    for name, parameter in exported.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_any_size_by_the_newer_onnx_exporter(format, tmp_path):
    model = small_model("Selective", "S", format, dynamic_img_size=True)
    path = tmp_path / "model.onnx"
    torch.onnx.export(
        model, (images(*SIZES[0]),), path, dynamo=True, dynamic_shapes=ANY_SIZE, verbose=False
    )
    assert_outputs(model, outputs_by_onnxruntime(path, SIZES), SIZES)
