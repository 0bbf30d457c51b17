"""The documentation's examples run, its links lead somewhere, and its pictures are there."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import timm
import torch
from helpers import ROOT
from test_formats import assert_close

import curves
import lion_kernels

PAGES = sorted([ROOT / "README.md", ROOT / "mlm" / "README.md", *(ROOT / "docs").glob("*.md")])


@pytest.fixture(scope="module")
def examples() -> Iterator[dict]:
    """What the examples of docs/extending.md define."""
    page, module = (ROOT / "docs" / "extending.md").read_text(), ModuleType("examples")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curves, "ORDERS", dict(curves.ORDERS))
        patch.setitem(sys.modules, "examples", module)
        for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
            exec(block, vars(module))
        yield vars(module)


def test_an_order_of_ones_own(examples):
    spiral, transposed = curves.scan_curves("Spiral", (3, 4))
    assert spiral.tolist() == [0, 1, 2, 3, 7, 11, 10, 9, 8, 4, 5, 6]
    assert transposed.sort().values.tolist() == list(range(12))
    model = examples["model"].eval()
    assert len(model.blocks[0].attn.gate_names) == 4
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        expected = model(images)
        model.set_format("Chunk", chunk_size=50)
        assert_close([model(images)], [expected], 1e-4, "Chunk")


def test_a_mask_of_ones_own(examples, monkeypatch):
    torch.manual_seed(0)
    small = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
    model = timm.create_model("stepped_tiny_patch16_224", order="S", **small).eval()
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = model(images)
        for format in ("RNN", "Chunk"):
            model.set_format(format, chunk_size=7)
            assert_close([model(images)], [expected], 1e-4, format)
    model(images).sum().backward()
    assert all(p.grad.abs().sum() > 0 for name, p in model.named_parameters() if "log_rate" in name)
    monkeypatch.setattr(lion_kernels, "available", lambda *_: True)
    assert_close([model(images)], [expected], 1e-4, "kernels")


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_tests_that_the_docs_name_are_there():
    page = (ROOT / "docs" / "reliability.md").read_text()
    table = page.split("## How it is tested")[1].split("`scripts/soak.sh`")[0]
    rows = [line.split("|") for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 20
    for *_, tests, _end in rows:
        for word in re.findall(r"`(\w+\.?\w*)`", tests):
            if word.endswith(".py"):
                text = (ROOT / "tests" / word).read_text()
            else:
                assert re.search(rf"def test_\w*{word}", text), word
