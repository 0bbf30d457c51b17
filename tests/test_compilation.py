"""Models compiled in place: by blocks, or whole for CUDA graphs."""

import copy
import math
import subprocess
import sys

import pytest
import timm
import torch
from helpers import ROOT, TINY
from kernel_cases import gpu
from timm.layers import DropPath
from torch import nn
from torch._dynamo.testing import CompileCounter

from compilation import CUDA_GRAPHS, StochasticDepth, begin_step, compile_in_place
from engine import Position, train_one_epoch
from losses import DistillationLoss
from optimization import MovingAverage
from processes import World
from utils import seed_everything

DEPTH = 10  # more blocks than torch.compile keeps entries for by default


class Block(nn.Module):
    """Like those with stochastic depth, no two blocks have the same number."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.number = number

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear(x) * (self.number / 100)


class Model(nn.Module):
    def __init__(self, depth: int = DEPTH, dropout: float = 0.0) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*map(Block, range(1, depth + 1)))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.dropout(self.blocks(x)))


@pytest.fixture(autouse=True)
def fresh():
    """Other tests' entries and settings of the compiler do not count."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8, optimize_ddp=True):
        yield
    torch._dynamo.reset()


def test_every_block_is_compiled_in_training_and_evaluation():
    torch.manual_seed(0)
    model, counter = Model(), CompileCounter()
    expected, names = copy.deepcopy(model), list(model.state_dict())
    compile_in_place(model, counter)
    assert list(model.state_dict()) == names
    x = torch.randn(6, 4)
    for _ in range(2):
        assert torch.allclose(model(x), expected(x))
    assert counter.frame_count == DEPTH
    with torch.inference_mode():
        for count in (6, 5, 3):
            assert torch.allclose(model.eval()(x[:count]), expected.eval()(x[:count]))
    compiled = counter.frame_count
    assert compiled >= 2 * DEPTH, "none runs as it was before"
    with torch.inference_mode():
        model(x[:4])
    assert counter.frame_count == compiled


def vit(rate: float) -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=24, num_heads=1, drop_path_rate=rate
    )


def test_blocks_of_other_rates_of_stochastic_depth_compile_once():
    model, counter = vit(0.3), CompileCounter()
    expected, names = copy.deepcopy(model).eval(), list(model.state_dict())
    compile_in_place(model.train(), counter)
    assert list(model.state_dict()) == names
    x = torch.randn(6, 3, 32, 32)
    model(x)
    assert counter.frame_count == 1
    torch.testing.assert_close(model.eval()(x), expected(x))


@pytest.mark.parametrize("rate", [0.0, 0.25, 1.0])
def test_stochastic_depth_is_that_of_timm(rate):
    x = torch.ones(4000, 2, 3)
    depth = StochasticDepth(rate, x.device)
    assert depth.eval()(x) is x
    for dropped in (depth.train()(x), DropPath(rate).train()(x)):
        kept = dropped[:, 0, 0] != 0
        assert kept.float().mean().item() == pytest.approx(1 - rate, abs=0.03)
        assert dropped.equal((kept / max(1 - rate, 0.1)).view(-1, 1, 1).expand_as(x))


class Part(nn.Linear):
    """Knows how it was compiled."""

    compiled = None

    def compile(self, **options) -> None:
        self.compiled = options


class Parts(Part):
    def __init__(self, blocks: object) -> None:
        super().__init__(1, 1)
        self.blocks = blocks


@pytest.mark.parametrize("kind", [lambda *blocks: nn.ModuleList(blocks), nn.Sequential])
def test_blocks_are_compiled_and_not_the_model(kind):
    model = Parts(kind(Part(1, 1), Part(1, 1)))
    compile_in_place(model, "inductor", "max-autotune-no-cudagraphs")
    options = {"backend": "inductor", "mode": "max-autotune-no-cudagraphs"}
    assert model.compiled is None
    assert [block.compiled for block in model.blocks] == [options] * 2
    assert not torch._dynamo.config.optimize_ddp, "buckets do not cut blocks"


@pytest.mark.parametrize("mode", CUDA_GRAPHS)
def test_cuda_graphs_are_of_the_whole_model(mode):
    model = Parts(nn.ModuleList([Part(1, 1)]))
    compile_in_place(model, "inductor", mode)
    assert model.compiled == {"backend": "inductor", "mode": mode}
    assert model.blocks[0].compiled is None
    assert torch._dynamo.config.optimize_ddp


@pytest.mark.parametrize("blocks", [None, 3])
def test_a_model_without_blocks_is_compiled_whole(blocks):
    model = Parts(blocks)
    compile_in_place(model)
    assert model.compiled == {"backend": "inductor", "mode": None}


# CUDA graphs


@gpu
def test_seeds_count_between_replays():
    model = Model(depth=2, dropout=0.5).cuda()
    compile_in_place(model, mode="reduce-overhead")
    x, outputs = torch.randn(64, 4, device="cuda"), []
    for seed in (1, 1, 1, 1, 2, 3, 2, 1):
        seed_everything(seed)
        torch.compiler.cudagraph_mark_step_begin()
        outputs.append(model(x).detach().clone())
        outputs[-1].requires_grad_().sum().backward()
    assert all(outputs[i].equal(outputs[7]) for i in (2, 3))
    assert outputs[4].equal(outputs[6])
    assert not outputs[4].equal(outputs[5])
    assert not outputs[4].equal(outputs[7])


@gpu
@pytest.mark.parametrize("accumulate", [1, 2])
def test_cuda_graphs_train_as_others_do(accumulate):
    """With a moving average and with evaluations in between."""
    world, steps = World(0, 1, torch.device("cuda")), 12
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(steps * accumulate, 8, 4, generator=generator)
    labels = torch.randint(3, (steps * accumulate, 8), generator=generator)
    torch.manual_seed(0)
    models = [Model(depth=2).cuda() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    averages = [MovingAverage(model, decay=0.9) for model in models]
    compile_in_place(models[1], mode="reduce-overhead")
    scores = []
    for model, average in zip(models, averages, strict=True):
        for epoch in range(3):
            train_one_epoch(
                model, DistillationLoss(nn.CrossEntropyLoss()),
                list(zip(samples, labels, strict=True)),
                torch.optim.AdamW(model.parameters(), lr=0.01, fused=True), Position(epoch),
                world=world, steps=steps, images_per_step=8, set_lr=lambda epoch, step: None,
                batch_transform=lambda samples, targets: (samples, targets),
                scaler=torch.amp.GradScaler("cuda", enabled=False), accumulate=accumulate,
                clip_grad=1.0, after_step=lambda m=model, a=average: a.update(m),
            )  # fmt: skip
            with torch.inference_mode():
                torch.compiler.cudagraph_mark_step_begin()
                scores.append(model.eval()(samples[0].cuda()).sum().item())
    for one, other in zip(models, averages, strict=True):
        assert all(math.isfinite(p.sum().item()) for p in (*one.parameters(), *other.parameters()))
    for pair in (models, [average.module for average in averages]):
        for one, other in zip(*(model.parameters() for model in pair), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    assert scores[:3] == pytest.approx(scores[3:], rel=1e-2, abs=1e-2)


def test_steps_of_graphs_begin_where_there_may_be_graphs(monkeypatch):
    begun = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: begun.append(1))
    monkeypatch.delitem(sys.modules, "torch._inductor.cudagraph_trees", raising=False)
    begin_step()
    assert not begun
    monkeypatch.setitem(sys.modules, "torch._inductor.cudagraph_trees", object())
    begin_step()
    assert begun


@pytest.mark.slow
def test_training_that_is_not_compiled_imports_no_compiler(data_path):
    script = (
        "import sys, main; main.main(main.get_args_parser().parse_args(sys.argv[1:])); "
        "print('torch._inductor.cudagraph_trees' in sys.modules)"
    )
    command = [sys.executable, "-c", script, *TINY, "--data-path", str(data_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False", done.stderr
