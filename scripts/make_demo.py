"""Write the data set DEMO: a balanced subset of Fashion-MNIST, the same images each time.

It is read from Debian's package dataset-fashion-mnist. The first test image of each class becomes a
PNG.
"""

import argparse
import gzip
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from datasets import DEBIAN_FASHION_MNIST, DEMO_FOLDER, IdxImages, read_idx

IMAGES_PER_CLASS = {"train": 1000, "t10k": 200}


def write_idx(name: str, array: np.ndarray) -> None:
    header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes()
    packed = gzip.compress(header + array.tobytes(), compresslevel=9, mtime=0)
    (DEMO_FOLDER / name).write_bytes(packed)


def write_images() -> None:
    test = IdxImages(DEMO_FOLDER, train=False)
    folder = DEMO_FOLDER / "images"
    folder.mkdir(exist_ok=True)
    for label, name in enumerate(test.classes):
        pixels = test.images[np.argmax(test.labels == label)]
        file = name.lower().replace(" ", "-").replace("/", "-")
        Image.fromarray(pixels).save(folder / f"{file}.png", optimize=True)


def main() -> None:
    rng = np.random.default_rng(0)
    for split, count in IMAGES_PER_CLASS.items():
        names = f"{split}-images-idx3-ubyte.gz", f"{split}-labels-idx1-ubyte.gz"
        images, labels = (read_idx(DEBIAN_FASHION_MNIST / name) for name in names)
        of_class = [np.flatnonzero(labels == label) for label in range(10)]
        chosen = np.sort([rng.choice(i, count, replace=False) for i in of_class], axis=None)
        write_idx(names[0], images[chosen])
        write_idx(names[1], labels[chosen])
    write_images()


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    main()
