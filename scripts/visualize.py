"""Draw what a trained LION does with an image, one PNG for each of

- `attention`: the effective attention of a query, masked and normalised, by layer and head;
- `decays`: the decay of each head in each layer, for LION-S the mean over the image's patches;
- `gates`: LION-S's decays over the image, by layer and head;
- `curves`: the orders in which the patches are visited;
- `overview`: something of each.

    python scripts/visualize.py --checkpoint demo/lion_s.pth demo/images/sandal.png --output OUT

What a model does not have (LION-Lit has no decays, LION-D no gates) is left out, with a message.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from timm.data import create_transform

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from errors import UserError
from images import load_image
from journal import require_writable
from models_lion import LionVisionTransformer
from pretrained import Pretrained
from processes import World
from scripts import trained_model
from scripts.pictures import attention, curves, decays, gates, overview
from scripts.traces import Choice, Trace, trace

PICTURES: dict[str, Callable[[Trace, Choice], Figure]] = {
    "attention": attention,
    "decays": decays,
    "gates": gates,
    "curves": curves,
    "overview": overview,
}


def missing(name: str, found: Trace) -> str:
    """Why there is no such picture of a model; "" if there is one."""
    if name in ("decays", "gates") and found.decays is None:
        return "LION-Lit has no decays"
    if name == "gates" and not found.selective:
        return "LION-D's decays do not depend on the image"
    return ""


def choose(options: argparse.Namespace, found: Trace) -> Choice:
    """The layers, heads and query to draw, counted from 1 as they are written.

    Raises:
        UserError: the model has none of these.
    """
    depth, heads = found.weights.shape[:2]
    rows, columns = found.grid
    chosen = Choice(
        layers=options.layers or sorted({1, (depth + 1) // 2, depth}),
        heads=options.heads or list(range(1, min(heads, 6) + 1)),
        query=tuple(options.query or ((rows + 1) // 2, (columns + 1) // 2)),
    )
    for name, numbers, most in (
        ("--layers", chosen.layers, depth),
        ("--heads", chosen.heads, heads),
        ("--query ROW", chosen.query[:1], rows),
        ("--query COLUMN", chosen.query[1:], columns),
    ):
        if wrong := [number for number in numbers if not 1 <= number <= most]:
            raise UserError(f"{name} counts from 1 to {most} in this model, so not {wrong[0]}.")
    return chosen


def load_lion(options: argparse.Namespace) -> Pretrained:
    """Raises UserError for a model that is no LION."""
    trained = trained_model.load(options)
    if not isinstance(trained.model, LionVisionTransformer):
        architecture = trained.model.pretrained_cfg["architecture"]
        raise UserError(f"{options.checkpoint} is a {architecture}: name one of a LION model.")
    return trained


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("image", type=Path, metavar="IMAGE", help="of any size and format")
    trained_model.add_arguments(parser)
    add("--pictures", nargs="+", choices=PICTURES, default=list(PICTURES), help="default: all")
    add("--layers", nargs="+", type=int, help="from 1 (default: first, middle, last)")
    add("--heads", nargs="+", type=int, help="from 1 (default: the first six)")
    add("--query", nargs=2, type=int, metavar=("ROW", "COLUMN"),
        help="of the patch that attends, from 1 (default: in the middle)")  # fmt: skip
    add("--output", type=Path, default=Path("pictures"), help="folder (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        require_writable(options.output, World(), "--output")
        trained = load_lion(options)
        transform = create_transform(**trained.images.for_timm())
        pixels = transform(load_image(options.image))
        options.trace = trace(trained, pixels)
        options.choice = choose(options, options.trace)
        options.output.mkdir(parents=True, exist_ok=True)
    except (UserError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    return options


@torch.inference_mode()
def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    for name in options.pictures:
        if reason := missing(name, options.trace):
            print(f"no {name}.png: {reason}")
            continue
        path = options.output / f"{name}.png"
        PICTURES[name](options.trace, options.choice).savefig(path)
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
