"""What is measured: a case is one step of one model, or mixer, at one size."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from models_lion import FEATURE_MAPS, FORMATS

# Mask and order of LION's mixer; Lit has no decay and therefore no order.
VARIANTS = ("Lit", *(f"{m}-{o}" for m in FEATURE_MAPS if m != "Lit" for o in ("Normal", "S")))
SOFTMAX = "softmax"  # timm's ViT, or its attention alone
NO_MIXING = "no mixing"  # the ViT whose tokens keep their own values: a floor for every mixer
NAMES = {
    SOFTMAX: "timm ViT", NO_MIXING: "no mixing", "Lit": "LION-Lit", "Decay-Normal": "LION-D",
    "Decay-S": "LION-D♮", "Selective-Normal": "LION-S", "Selective-S": "LION-S♮",
}  # fmt: skip
BACKENDS = ("flash", "cudnn", "efficient", "math")  # of scaled_dot_product_attention
HEADS = {"tiny": 3, "small": 6, "base": 12}  # of width 64
PATCH = 16

FORWARD, BACKWARD = "mixer forward", "mixer forward+backward"
PARTS = {"mixer": (FORWARD, BACKWARD), "training": ("training",), "inference": ("inference",)}


@dataclass(frozen=True)
class Defaults:
    """What a part measures on a device: batches of base by size, and the rest that is not given.

    A size is the image's side in pixels, for the mixer the tokens. Narrower models get larger
    batches, so that they fill the device.
    """

    batches: dict[int, int]
    precision: str
    backends: tuple[str, ...] = BACKENDS[:3]
    formats: tuple[str, ...] = tuple(FORMATS)
    wider: dict[str, int] | None = None

    def batch(self, size: int, scale: str) -> int:
        return self.batches.get(size, 1) * (self.wider or {}).get(scale, 1)


MIXER_SIZES = {197: 256, 577: 96, 1025: 48, 4097: 12, 16385: 3, 24337: 2}
WIDER = {"tiny": 4, "small": 2}
DEFAULTS = {
    ("cuda", "mixer"): Defaults(MIXER_SIZES, "bfloat16", BACKENDS, ("kernels",), WIDER),
    ("cuda", "training"): Defaults(
        {224: 128, 384: 48, 512: 24, 1024: 4}, "amp", formats=("Attention",), wider=WIDER
    ),
    ("cuda", "inference"): Defaults({224: 64, 512: 64, 1024: 64, 2496: 64}, "bfloat16"),
    ("cpu", "mixer"): Defaults({197: 8, 1025: 1}, "float32", ("flash",), ("Attention", "Chunk")),
    ("cpu", "training"): Defaults({224: 8}, "float32", ("flash",), ("Attention", "Chunk")),
    ("cpu", "inference"): Defaults({512: 1, 1024: 1}, "float32", ("flash",)),
}


@dataclass
class Case:
    device: str  # cpu or cuda
    precision: str  # float32, bfloat16 (weights, too), or amp: bfloat16 by autocast
    step: str  # of PARTS
    scale: str  # of HEADS
    pixels: int  # 0 for the mixer
    tokens: int
    batch: int
    variant: str  # one of NAMES
    format: str  # of LION, or the backend of scaled_dot_product_attention
    chunk_size: int
    compiled: str = ""  # blocks, or the whole model
    seconds: float = math.nan  # the median of the runs
    runs: int = 0  # each of several iterations, if they are short
    iterations: int = 1
    bytes: int = 0  # at most held: weights, optimizer, input and what the step takes
    note: str = ""  # why there is no result

    @property
    def group(self) -> tuple:
        """Cases of a group are measured in turn and compared with each other."""
        return self.step, self.scale, self.compiled, self.tokens, self.batch


def tokens_of(pixels: int) -> int:
    """ValueError for a size that no model takes."""
    if pixels % PATCH:
        raise ValueError(f"a size must be a multiple of {PATCH} pixels, not {pixels}")
    return 1 + (pixels // PATCH) ** 2


def parse_size(text: str) -> tuple[int, int | None]:
    """`224` or, with a batch, `224x128`."""
    size, _, batch = text.partition("x")
    try:
        numbers = int(size), int(batch) if batch else None
    except ValueError as error:
        raise ValueError(f"a size is SIZE or SIZExBATCH, not {text!r}") from error
    if min(numbers[0], 1 if numbers[1] is None else numbers[1]) < 1:
        raise ValueError(f"a size and its batch must be at least 1, not {text!r}")
    return numbers


def make_cases(
    part: str,
    device: str,
    variants: Sequence[str],
    *,
    scales: Sequence[str],
    sizes: Sequence[str] | None = None,
    formats: Sequence[str] | None = None,
    backends: Sequence[str] | None = None,
    precision: str | None = None,
    compiled: Sequence[str] = ("",),
    chunk_size: int = 64,
) -> list[Case]:
    """The cases of a part, by group; None is the default. ValueError for a size it cannot take."""
    defaults = DEFAULTS[device, part]
    chosen = [parse_size(s) for s in sizes] if sizes else [(s, None) for s in defaults.batches]
    backends = backends or defaults.backends
    formats = formats or defaults.formats
    if part == "mixer" and device == "cuda":
        formats = ("kernels",)
    if part != "inference":
        formats = [f for f in formats if f != "RNN"]  # its backward holds a state for each token
    models = [(SOFTMAX, backend) for backend in backends]
    models += [(NO_MIXING, "")] if part == "training" else []
    models += product(variants, formats)
    cases = []
    for scale, how, (size, batch), step in product(scales, compiled, chosen, PARTS[part]):
        pixels, tokens = (0, size) if part == "mixer" else (size, tokens_of(size))
        batch = batch or defaults.batch(size, scale)
        for variant, format in models:
            kind = (device, precision or defaults.precision, step, scale, pixels, tokens, batch)
            cases.append(Case(*kind, variant, format, chunk_size, how))
    return cases
