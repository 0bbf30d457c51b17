"""Labelled images by data set name."""

import gzip
import json
import logging
import os
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol, cast

import numpy as np
from PIL import Image
from torch.utils import data
from torch.utils.data import ConcatDataset, Subset
from torchvision.datasets import CIFAR10, CIFAR100, FashionMNIST, Flowers102
from torchvision.datasets.folder import IMG_EXTENSIONS

from errors import UserError
from files import inside
from images import load_image

logger = logging.getLogger(__name__)

DATASETS = ("IMNET", "CIFAR10", "CIFAR100", "FLOWERS", "INAT18", "INAT19", "FMNIST", "DEMO")
ALIASES = {"CIFAR": "CIFAR100", "INAT": "INAT18"}
INAT_CATEGORIES = (
    "kingdom",
    "phylum",
    "class",
    "order",
    "supercategory",
    "family",
    "genus",
    "name",
)
DEMO_FOLDER = Path(__file__).with_name("demo")
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")

Transform = Callable[[Image.Image], Any]


class LabelledImages(Protocol):
    """A data set with samples `(image, label)` and the names of the labels."""

    @property
    def classes(self) -> Sequence[str]: ...

    def __getitem__(self, index: int) -> tuple[Any, int]: ...

    def __len__(self) -> int: ...


# Hugging Face's libraries find this module in the place of their package `datasets`, and ask
# whether a data set is an instance of these: none is, so they take it as PyTorch's.
class Dataset:
    """A table of the package `datasets`: there are none here."""


class IterableDataset:
    """A stream of the package `datasets`: there are none here."""


def build_dataset(
    name: str,
    data_path: str | os.PathLike,
    *,
    train: bool,
    transform: Transform | None = None,
    inat_category: str = "name",
) -> tuple[LabelledImages, int]:
    """The training or evaluation images of a data set, and its number of classes.

    Samples are `(image, label)`: an RGB PIL image, or what `transform` makes of it, and an int.
    The data set's `classes` are the names of the labels. CIFAR, FLOWERS and FMNIST are downloaded
    to `data_path` where they are missing, so let one process build them first.

    Args:
        name: one of `DATASETS` or `ALIASES`.
        data_path: folder of the data; DEMO ignores it.
        inat_category: level of the taxonomy that the INAT labels name, one of `INAT_CATEGORIES`.

    Raises:
        UserError: unknown name, or data missing, incomplete or inconsistent.
    """
    root = Path(data_path).expanduser()
    dataset: Any  # torchvision's do not declare what they are
    match ALIASES.get(name, name):
        case "IMNET":
            dataset = _image_folder(root, train, transform)
        case "CIFAR10":
            dataset = _downloaded(CIFAR10, root, train=train, transform=transform)
        case "CIFAR100":
            dataset = _downloaded(CIFAR100, root, train=train, transform=transform)
        case "FLOWERS":
            splits = [
                _downloaded(Flowers102, root, split=split, transform=transform, loader=load_image)
                for split in (("train", "val") if train else ("test",))
            ]
            dataset = ConcatDataset(splits)
            dataset.classes = Flowers102.classes
        case "INAT18":
            dataset = _inaturalist(root, 2018, train, transform, inat_category)
        case "INAT19":
            dataset = _inaturalist(root, 2019, train, transform, inat_category)
        case "FMNIST":
            dataset = IdxImages(_fashion_mnist_folder(root), train=train, transform=transform)
        case "DEMO":
            dataset = IdxImages(DEMO_FOLDER, train=train, transform=transform)
        case _:
            raise UserError(
                f"Unknown data set {name!r}: choose one of {', '.join((*DATASETS, *ALIASES))}."
            )
    return dataset, len(dataset.classes)


class Split(Subset):
    """The held-out images of a training set, or the others: the same ones in every run.

    Raises UserError if as many or more are held out than there are.
    """

    def __init__(self, dataset: LabelledImages, count: int, *, held_out: bool) -> None:
        if count >= len(dataset):
            raise UserError(
                f"--holdout {count} leaves none of the {len(dataset)} training images: hold out "
                "fewer."
            )
        order = np.random.default_rng(0).permutation(len(dataset))
        chosen = np.sort(order[:count] if held_out else order[count:])
        super().__init__(cast(data.Dataset, dataset), cast(Sequence[int], chosen))
        self.classes = dataset.classes


class ImageList(data.Dataset):
    """Images from a list of (path, label).

    It is kept in three objects: counting references to many would have every worker copy them.
    """

    def __init__(
        self,
        samples: Sequence[tuple[str, int]],
        classes: Sequence[str],
        transform: Transform | None = None,
    ) -> None:
        names = [os.fsencode(path) for path, _ in samples]
        self._names = b"".join(names)
        self._ends = np.cumsum([0, *map(len, names)])
        self._labels = np.array([label for _, label in samples])
        self.classes = classes
        self.transform = transform

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, label = self.sample(index)
        image = load_image(path)
        return (self.transform(image) if self.transform else image), label

    def __len__(self) -> int:
        return len(self._labels)

    def sample(self, index: int) -> tuple[str, int]:
        """The path and the label of an image."""
        name = self._names[self._ends[index] : self._ends[index + 1]]
        return os.fsdecode(name), int(self._labels[index])


class IdxImages(data.Dataset):
    """Fashion-MNIST as RGB images, from a folder with its IDX files, packed (.gz) or not.

    Raises:
        UserError: a file is missing or incomplete.
    """

    classes = FashionMNIST.classes

    def __init__(self, folder: Path, *, train: bool, transform: Transform | None = None) -> None:
        split = "train" if train else "t10k"
        self.images = read_idx(_idx_file(folder, f"{split}-images-idx3-ubyte"))
        self.labels = read_idx(_idx_file(folder, f"{split}-labels-idx1-ubyte"))
        if len(self.images) != len(self.labels):
            raise UserError(
                f"The {split} files in {folder} hold {len(self.images)} images but "
                f"{len(self.labels)} labels: download them again."
            )
        self.transform = transform

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = Image.fromarray(self.images[index]).convert("RGB")
        return (self.transform(image) if self.transform else image), int(self.labels[index])

    def __len__(self) -> int:
        return len(self.labels)


def read_idx(path: Path) -> np.ndarray:
    """The array of bytes in an IDX file (3 bytes of magic, rank, big-endian shape, data)."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            content = file.read()
        if content[:3] != b"\0\0\x08":
            raise ValueError("no IDX file of unsigned bytes")
        rank = content[3]
        shape = np.frombuffer(content, ">u4", count=rank, offset=4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)
    except (OSError, EOFError, IndexError, ValueError, zlib.error) as error:
        raise UserError(f"{path} is not a complete IDX file: download it again.") from error


def _idx_file(folder: Path, name: str) -> Path:
    unpacked = folder / name
    return unpacked if unpacked.exists() else folder / f"{name}.gz"


def _fashion_mnist_folder(root: Path) -> Path:
    names = [Path(archive).stem for archive, _ in FashionMNIST.resources]
    downloaded = root / "FashionMNIST" / "raw"
    for folder in (root, downloaded, DEBIAN_FASHION_MNIST):
        if all(_idx_file(folder, name).exists() for name in names):
            return folder
    _downloaded(FashionMNIST, root)
    return downloaded


def _downloaded(dataset_class: type, root: Path, **kwargs) -> data.Dataset:
    try:
        return dataset_class(root, download=True, **kwargs)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{dataset_class.__name__} needs {error.name}: run pip install {error.name}."
        ) from error
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{dataset_class.__name__} is not complete in {root} and could not be downloaded "
            "to it: check the network and the folder, or put the files there yourself."
        ) from error


def _image_folder(root: Path, train: bool, transform: Transform | None) -> ImageList:
    _require_folder(root)
    names = ("train",) if train else ("val", "validation", "test")
    folder = next((root / name for name in names if (root / name).is_dir()), None)
    if folder is None:
        raise UserError(
            f"The data folder {root} has no folder {' or '.join(names)}: "
            "IMNET needs train/CLASS/IMAGE and val/CLASS/IMAGE."
        )
    classes, left_out = _class_folders(folder)
    if len(classes) < (2 if train else 1):
        count = "one class folder alone" if classes else "no class folders"
        raise UserError(
            f"{folder} has {count}: put the images of each class in a folder of its own."
        )
    samples = []
    for label, name in enumerate(classes):
        paths, others = images_in(folder / name)
        if not paths:
            raise UserError(
                f"The class folder {folder / name} has no images{_listed(others)}: "
                "fill it or remove it."
            )
        samples += [(path, label) for path in paths]
        left_out += others
    if left_out := +left_out:  # without zeros
        logger.info("%s: %d files are left out%s", folder, left_out.total(), _listed(left_out))
    if not train and (root / "train").is_dir():
        _require_same_classes(root / "train", folder, classes)
    return ImageList(samples, classes, transform)


def _class_folders(folder: Path) -> tuple[list[str], Counter[str]]:
    """Names of the folders in `folder` that are not hidden; how many files are in no such one."""
    names: list[str] = []
    others: Counter[str] = Counter()
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        _refuse_unreadable(error)
    for entry in entries:
        if not entry.is_dir():
            others["outside of class folders"] += 1
        elif entry.name.startswith("."):
            others["hidden"] += sum(len(files) for *_, files in os.walk(entry.path))
        else:
            names.append(entry.name)
    return sorted(names), others


def images_in(
    folder: Path, suffixes: tuple[str, ...] = IMG_EXTENSIONS
) -> tuple[list[str], Counter]:
    """Paths of the images below `folder`, and how many other files there are of each type.

    What is hidden, or in a hidden folder, is no image: `.ipynb_checkpoints` holds copies. Links to
    folders are followed, but each folder is read once, and none that holds `folder` itself. Raises
    UserError for a folder that cannot be listed.
    """
    paths: list[str] = []
    others: Counter[str] = Counter()
    above = (*folder.absolute().parents, *folder.resolve().parents)
    read = {_identity(parent) for parent in above}
    tree = []
    for where, folders, names in os.walk(folder, followlinks=True, onerror=_refuse_unreadable):
        folders.sort()  # which of several links to a folder counts
        if _identity(where) in read:
            folders.clear()
            others["links to folders already read"] += 1
        else:
            read.add(_identity(where))
            tree.append((where, names))
    for where, names in sorted(tree):
        hidden = any(part.startswith(".") for part in Path(where).relative_to(folder).parts)
        for name in sorted(names):
            if hidden or name.startswith("."):
                others["hidden"] += 1
            elif name.lower().endswith(suffixes):
                paths.append(os.path.join(where, name))
            else:
                others[Path(name).suffix.lower() or "without a suffix"] += 1
    return paths, others


def _refuse_unreadable(error: OSError) -> NoReturn:
    """os.walk would leave out a folder that cannot be listed, and all its images."""
    raise UserError(
        f"The folder {error.filename} cannot be read ({error.strerror}): give the rights to it, or "
        "take it out of the data."
    ) from error


def _identity(folder: str | os.PathLike) -> tuple[int, int]:
    found = os.stat(folder)
    return found.st_dev, found.st_ino


def _listed(others: Counter) -> str:
    kinds = ", ".join(f"{count} {kind}" for kind, count in others.most_common())
    return f" ({kinds}; read are {', '.join(IMG_EXTENSIONS)})" if others else ""


def _require_same_classes(train_folder: Path, folder: Path, classes: list[str]) -> None:
    differing = sorted(set(_class_folders(train_folder)[0]).symmetric_difference(classes))
    if differing:
        raise UserError(
            f"{train_folder} and {folder} must have the same class folders, but only one of "
            f"them has {', '.join(differing[:5])}{', ...' if len(differing) > 5 else ''}."
        )


def _inaturalist(
    root: Path, year: int, train: bool, transform: Transform | None, level: str
) -> ImageList:
    if level not in INAT_CATEGORIES:
        raise UserError(
            f"Unknown iNaturalist category {level!r}: choose one of {', '.join(INAT_CATEGORIES)}."
        )
    _require_folder(root)
    categories = _read_json(root / "categories.json")
    listing = root / f"{'train' if train else 'val'}{year}.json"
    split = _read_json(listing)
    try:
        classes = sorted({category[level] for category in categories})
        label_of_class = {name: label for label, name in enumerate(classes)}
        label = {category["id"]: label_of_class[category[level]] for category in categories}
        path = {im["id"]: inside(root, im["file_name"], listing) for im in split["images"]}
        samples = [(path[a["image_id"]], label[a["category_id"]]) for a in split["annotations"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"The json files in {root} do not fit together (key {error}): "
            f"use those of the iNaturalist {year} competition."
        ) from error
    return ImageList(samples, classes, transform)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is missing or no json file: INAT needs the competition's json files there."
        ) from error


def _require_folder(root: Path) -> None:
    if not root.is_dir():
        fault = "is a file" if root.exists() else "does not exist"
        raise UserError(f"The data folder {root} {fault}: check --data-path.")
