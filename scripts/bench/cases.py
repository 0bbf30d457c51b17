"""What is measured: a case is one step of one model, mixer or entry point, at one size."""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from torch.nn.attention import SDPBackend

from errors import UserError
from models_lion import FORMATS

ROOT = Path(__file__).resolve().parents[2]
NO_MIXING = "no mixing"  # the ViT whose tokens keep their own values: a floor for every mixer
# Names in timm but for the size, and options.
MODELS = {
    "ViT": ("vit", {}),
    NO_MIXING: ("vit", {}),
    **{name: (name.lower(), {}) for name in ("DeiT", "Hydra", "Vim")},
    "LION-Lit": ("lion", {"mask_type": "Lit"}),
    "LION-D": ("lion", {"mask_type": "Decay"}),
    "LION-D♮": ("lion", {"mask_type": "Decay", "order": "S"}),
    "LION-S": ("lion", {"mask_type": "Selective"}),
    "LION-S♮": ("lion", {"mask_type": "Selective", "order": "S"}),
}
LIONS = tuple(name for name in MODELS if name.startswith("LION"))
SOFTMAX = ("ViT", "DeiT")
# Of scaled_dot_product_attention.
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
            "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}  # fmt: skip
DEFAULT, EXPLICIT = "default", "explicit"  # PyTorch chooses; softmax is written out
ATTENTION = {**{name: f"SDPA {name}" for name in BACKENDS},
             DEFAULT: "SDPA", EXPLICIT: "explicit softmax"}  # fmt: skip
PATCH = 16
DROP_PATH = 0.1  # main.py's default, in its cases and in the bare steps beside them

GRAPHS = "graphs"  # a way to compile
OUT_OF_MEMORY = "out of memory"  # the note of a case, which pictures show
# Steps. A layer's are timed by the host's clock: what Python takes for the launches.
FORWARD, BACKWARD = "mixer forward", "mixer forward+backward"
LAYER_FORWARD, LAYER_BACKWARD = "layer forward", "layer forward+backward"
TRAINING, INFERENCE, TEXT = "training", "inference", "text"
MAIN, PRETRAIN = "main.py", "mlm.pretrain"
BARE = {MAIN: TRAINING, PRETRAIN: TEXT}  # the steps beside those of entry points
MIXER, LAYER, OF_TEXT = (FORWARD, BACKWARD), (LAYER_FORWARD, LAYER_BACKWARD), (TEXT, PRETRAIN)
result = partial(field, compare=False)  # of a case, which it makes no other


@dataclass
class Case:
    device: str  # cpu or cuda
    card: str  # its name
    precision: str  # float32, bfloat16 (weights, too), or amp: bfloat16 by autocast
    step: str = ""  # of those above
    scale: str = ""  # a size of models_lion; of text, nothing
    pixels: int = 0  # none for the mixer and text
    tokens: int = 0  # of an image or a window
    batch: int = 0  # images or windows of a process
    model: str = ""  # of MODELS, or the name of a configuration of mlm.pretrain
    form: str = ""  # a format of LION, or how softmax is computed: a key of ATTENTION
    chunk_size: int = 64
    compiled: str = ""  # blocks (of text, the encoder), or the whole model with CUDA graphs
    config: str = ""  # of text: the file, and key=value
    processes: int = 1
    drop_path: float = 0.0  # rate of stochastic depth
    seconds: float = result(default=math.nan)  # the median of the runs
    runs: int = result(default=0)  # each of several iterations, if they are short
    iterations: int = result(default=1)
    bytes: int = result(default=0)  # at most held: weights, optimizer, input, what the step takes
    parameters: int = result(default=0)
    data_wait: float = result(default=math.nan)  # share of an entry point's time, for data
    busy: float = result(default=math.nan)  # share in which the device computes
    note: str = result(default="")  # why there is no result

    @property
    def group(self) -> tuple:
        """Cases of a group are measured in turn and compared with each other."""
        return self.step, self.scale, self.compiled, self.tokens, self.batch, self.processes

    @property
    def label(self) -> str:
        return ", ".join(filter(None, [self.model, ATTENTION.get(self.form, self.form)]))

    @property
    def in_timm(self) -> tuple[str, dict[str, Any]]:
        """The model's name there, and its options."""
        name, options = MODELS[self.model]
        if self.model in LIONS:
            options = {**options, "format": self.form, "chunk_size": self.chunk_size}
        return f"{name}_{self.scale}_patch16_224", options

    @property
    def rate(self) -> float:
        """Images/s, or tokens/s of text and of the mixer."""
        return self.batch * self.processes * (1 if self.pixels else self.tokens) / self.seconds


def split(cases: Sequence[Case], key: Callable[[Case], Any]) -> dict[Any, list[Case]]:
    """The cases by a key, in the order in which they come."""
    return {k: [c for c in cases if key(c) == k] for k in dict.fromkeys(map(key, cases))}


class Preset(NamedTuple):
    """A table: its steps, what is measured if nothing else is asked for, and how long a case takes.

    `batches` are those of base by size: the image's side in pixels, for the mixer and text the
    tokens. Batches of other sizes have `tokens`, if that is given. Narrower models get `wider`
    batches, which fill the device. A case has `repeats` turns, of `seconds` together at most.
    """

    steps: Sequence[str]
    batches: dict[int, int]
    models: Iterable[str] = ("ViT", *LIONS)
    backends: Iterable[str] = (DEFAULT,)
    formats: Iterable[str] = ("Attention",)
    wider: dict[str, int] = {}
    tokens: int = 0
    repeats: int = 15
    seconds: float = 3


def presets(device: str) -> dict[str, Preset]:
    """The tables by name, for `cpu` or `cuda`, which has two more."""
    cuda, few = device == "cuda", ("ViT", "LION-D", "LION-S♮")
    wider, fused = {"tiny": 4, "small": 2} if cuda else {}, ("flash", "cudnn", "efficient")
    speed = {
        "mixer": Preset(MIXER, {197: 256, 577: 96, 1025: 48, 4097: 12, 16385: 3, 24337: 2},
                        backends=BACKENDS, formats=("kernels",), wider=wider),
        "host": Preset(LAYER, {224: 1}),
        "training": Preset((TRAINING,), {224: 128, 384: 48, 512: 24, 1024: 4},
                           ("ViT", NO_MIXING, *LIONS), fused, wider=wider),
        "inference": Preset((INFERENCE,), dict.fromkeys((224, 512, 1024, 2496), 64),
                            backends=fused, formats=FORMATS),
    } if cuda else {
        "training": Preset((TRAINING,), {224: 8}, ("ViT", NO_MIXING, *few[1:]), fused[:1],
                           ("Attention", "Chunk"), repeats=10, seconds=60),
        "inference": Preset((INFERENCE,), {512: 1, 1024: 1}, few, fused[:1], FORMATS,
                            repeats=10, seconds=60),
    }  # fmt: skip
    loops = {} if cuda else {"repeats": 3, "seconds": 5}
    return {
        **speed,
        "paper": Preset((TRAINING, INFERENCE), {224: 64}, [m for m in MODELS if m != NO_MIXING],
                        (EXPLICIT, *fused[: 2 if cuda else 1]), repeats=10, seconds=20),
        "resolution": Preset((INFERENCE,), dict.fromkeys((224, 512, 736, 1024, 1248, 2496), 64),
                             ("ViT", "Hydra", "Vim", "LION-D"), (DEFAULT, EXPLICIT), FORMATS,
                             repeats=5, seconds=10),
        "text": Preset((TEXT,), {n: 2**16 // n for n in (128, 4096, 16384)}, tokens=2**16,
                       backends=fused[:2] if cuda else (DEFAULT,), seconds=5),
        "main": Preset((MAIN,), {224: 128 if cuda else 8}, few, wider=wider, **loops),
        "pretrain": Preset((PRETRAIN,), {128: 256 if cuda else 8}, tokens=2**16, **loops),
    }  # fmt: skip


def parse_size(text: str) -> tuple[int, int]:
    """`224x128` or, with a batch of 0, `224`."""
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)?", text):
        raise UserError(f"a size is SIZE or SIZExBATCH, each at least 1, not {text!r}")
    size, _, batch = text.partition("x")
    return int(size), int(batch or 0)


def make_groups(
    preset: Preset, blank: Case, *, scales: Sequence[str] = ("",),
    sizes: Sequence[str] | None = None, compiled: Sequence[str] = ("",),
    processes: Sequence[int] = (1,),
) -> Iterator[Case]:  # fmt: skip
    """The groups of a preset, as cases without a model; `sizes` None are the preset's own."""
    chosen = [parse_size(size) for size in sizes or map(str, preset.batches)]
    scales = ("",) if preset.steps[0] in OF_TEXT else scales
    groups = product(scales, compiled, processes, chosen, preset.steps)
    for scale, how, count, (size, batch), step in groups:
        of_images = step not in MIXER + OF_TEXT
        pixels, tokens = (size, 1 + (size // PATCH) ** 2) if of_images else (0, size)
        if pixels and (pixels % PATCH or pixels < 2 * PATCH):
            raise UserError(f"a size must be a multiple of {PATCH} pixels, {2 * PATCH} at least, "
                             f"not {pixels}")  # fmt: skip
        default = preset.batches.get(size, max(preset.tokens // size, 1))
        yield replace(blank, step=step, scale=scale, pixels=pixels, tokens=tokens, compiled=how,
                      batch=batch or default * preset.wider.get(scale, 1), processes=count,
                      precision=blank.precision or default_precision(blank.device, step),
                      drop_path=DROP_PATH if step == MAIN else 0.0)  # fmt: skip


def default_precision(device: str, step: str) -> str:
    if device == "cpu":
        return "float32"
    return "bfloat16" if step in (*MIXER, *LAYER, INFERENCE) else "amp"


def make_cases(
    preset: Preset, blank: Case, *, models: Sequence[str] | None = None,
    formats: Sequence[str] | None = None, backends: Sequence[str] | None = None,
    configs: Sequence[str] = (), **grouping: Any,
) -> list[Case]:  # fmt: skip
    """The cases of a preset, by group; None is the default. The ViT, the base, is always there.

    `blank` has what they share: the device and, unless it is each step's default, the precision.
    `configs` are for text, `grouping` for `make_groups`. Raises UserError for what the preset
    cannot take.
    """
    groups = make_groups(preset, blank, **grouping)
    if preset.steps[0] in OF_TEXT:
        from scripts.bench.text import text_cases  # its libraries take seconds to import

        return text_cases(groups, configs, preset.backends)
    models = list(dict.fromkeys(("ViT", *(models or preset.models))))
    others = [model for model in models if model not in ("ViT", *LIONS)]
    if others and preset.steps in (MIXER, LAYER):
        raise UserError(f"mixers and layers are those of ViT and LION, not of {others[0]}")
    formats = preset.formats if preset.steps == MIXER else formats or preset.formats

    def forms(step: str, model: str) -> Iterable[str]:
        if model in LIONS:  # the backward pass of RNN holds a state for each token
            return [form for form in formats if form != "RNN" or step == INFERENCE]
        return backends or preset.backends if model in SOFTMAX else ("",)

    return [replace(group, model=model, form=form) for group in groups
            for model in models for form in forms(group.step, model)]  # fmt: skip
