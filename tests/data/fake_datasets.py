"""Data sets in their published layouts, traps included; every image is a file of one byte."""

import csv
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from scipy.io import savemat

from diffiqa.data.datasets import CSIQ_TYPES


def touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")


LIVE_FOLDERS = {"jp2k": 23, "jpeg": 24, "wn": 17, "gblur": 17, "fastfading": 17}  # a tenth of the published ones
LIVE_PRISTINE = 20


def live(root: Path) -> int:
    names = [f"{folder}/img{i + 1}.bmp" for folder, count in LIVE_FOLDERS.items() for i in range(count)]
    for name in names:
        touch(root / name)
    (root / "jp2k/info.txt").write_text("no image")
    references = np.array([f"ref{i % 29}.bmp" for i in range(len(names))], dtype=object)
    for name in set(references):
        touch(root / "refimgs" / name)
    pristine = np.arange(len(names)) < LIVE_PRISTINE
    savemat(root / "dmos.mat", {"dmos": np.zeros(len(names)), "orgs": pristine.astype(float)})
    dmos = np.where(pristine, 0, np.linspace(10, 90, len(names)))
    savemat(root / "dmos_realigned.mat", {"dmos_new": dmos, "orgs": pristine}, do_compression=True)
    savemat(root / "refnames_all.mat", {"refnames_all": references[None]}, do_compression=True)
    return len(names) - LIVE_PRISTINE


def csiq(root: Path) -> int:
    files = {"noise": "AWGN", "blur": "BLUR", "jpeg": "JPEG"}
    rows: list[Sequence[str | float]] = [["CSIQ image quality"], [], ["", "scores"]]
    rows.append(["", "", "", "image", "dst_idx", "dst_type", "dst_lev", "dmos_std", "dmos"])
    for name in ("1600", "family", "snow_leaves"):
        touch(root / "src_imgs" / f"{name}.png")
        for kind, folder in CSIQ_TYPES.items():
            for level in range(1, 4):
                touch(root / "dst_imgs" / folder / f"{name}.{files.get(kind, folder)}.{level}.png")
                rows.append(["", "", "", name, 1, kind, level, 0.1, level / 5 + len(name) / 100])
    (root / "dst_imgs/awgn").rename(root / "dst_imgs/AWGN")  # as in some copies
    with (root / "csiq.DMOS.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return 3 * 6 * 3


def tid2013(root: Path) -> int:
    lines = []
    for content in range(1, 4):
        touch(root / "reference_images" / f"I{content:02}.BMP")
        for kind in range(1, 25):
            for level in range(1, 6):
                touch(root / "distorted_images" / f"i{content:02}_{kind:02}_{level}.bmp")
                lines.append(f"{6 - level + kind / 100:.5f} I{content:02}_{kind:02}_{level}.bmp\r\n")
    (root / "distorted_images/Thumbs.db").write_bytes(b"x")
    (root / "mos_with_names.txt").write_text("".join(lines), newline="")
    return len(lines)


def kadid10k(root: Path) -> int:
    lines = ["dist_img,ref_img,dmos,var"]
    for content in range(1, 4):
        touch(root / "images" / f"I{content:02}.png")
        for kind in range(1, 26):
            for level in range(1, 6):
                name = f"I{content:02}_{kind:02}_{level:02}.png"
                touch(root / "images" / name)
                lines.append(f"{name},I{content:02}.png,{5 - level * 0.7:.2f},0.5")
    (root / "dmos.csv").write_text("\n".join(lines) + "\n")
    return len(lines) - 1


def clive(root: Path) -> int:
    names = [f"t{i}.bmp" for i in range(1, 8)] + [f"{i}.bmp" for i in range(3, 20)] + ["a9b.JPG"]
    for name in names:
        touch(root / "Images" / ("trainingImages" if name.startswith("t") else "") / name)
    (root / "Data").mkdir()
    savemat(root / "Data/AllImages_release.mat", {"AllImages_release": np.array(names, dtype=object)[:, None]})
    savemat(root / "Data/AllMOS_release.mat", {"AllMOS_release": np.linspace(3.5, 92.4, len(names))[None]})
    return len(names) - 7


BIQ2021_COPIES = ["# made up", "ss01 (1).jpg, ss01 (2).jpg", "ss01 (9).jpg, ss02 (3).jpg, ss02 (4).jpg"]


def biq2021(root: Path) -> int:
    names = [f"ss{part:02} ({i}).jpg" for part in (1, 2, 3) for i in range(1, 11)]
    for name in names:
        touch(root / "Images" / name)
    (root / "Images/ss02 (7).jpg").rename(root / "Images/ss02 (7).JPG")  # labelled .jpg
    rows = [f"{name},{0.1 + index / 40:.4f}" for index, name in enumerate(names)]
    (root / "Train (Images and MOS).csv").write_text("\r\n".join(["Image Name,MOS,,", *(f"{r},," for r in rows[6:])]))
    (root / "Test (Images and MOS).csv").write_text("\r\n".join(["Image Name,MOS", *rows[:6]]))
    return len(names)


def koniq10k(root: Path) -> int:
    scores, parts = ['"image_name","c1","c_total","MOS","SD","MOS_zscore"'], ["image_name,c1,MOS,set"]
    for i in range(20):
        touch(root / "1024x768" / f"{i}.jpg")
        touch(root / "512x384" / f"{i}.jpg")
        scores.append(f'"{i}.jpg",0,100,{1.1 + i * 0.15},0.5,{4 + 4 * i}')
        parts.append(f"{i}.jpg,0,{4 + 4 * i},{('training', 'validation', 'test')[i % 3]}")
    (root / "koniq10k_scores_and_distributions.csv").write_text("\n".join(scores), encoding="utf-8-sig")
    (root / "koniq10k_distributions_sets.csv").write_text("\n".join(parts))
    return 20


def pipal(root: Path) -> int:
    count = 0
    for content in range(1, 5):
        touch(root / "Train_Ref" / f"A{content:04}.bmp")
        lines = []
        for kind in range(7):
            name = f"A{content:04}_{kind:02}_{content:02}.bmp"
            touch(root / f"Distortion_{content}" / name)
            lines.append(f"{name},{1000 + 50 * kind + content:.4f}")
        (root / "Train_Label").mkdir(exist_ok=True)
        (root / "Train_Label" / f"A{content:04}.txt").write_text("\n".join(lines) + "\n")
        count += len(lines)
    return count


BUILDERS: dict[str, Callable[[Path], int]] = {
    "live": live,
    "csiq": csiq,
    "tid2013": tid2013,
    "kadid10k": kadid10k,
    "clive": clive,
    "biq2021": biq2021,
    "koniq10k": koniq10k,
    "pipal": pipal,
}
