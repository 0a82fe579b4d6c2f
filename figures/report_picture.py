"""The picture of a report in README: one sample with its score, restorations and maps. Writes docs/report.png.

Scores the samples with `--engine DIR`, a trained one, or takes a `--report FILE` of them. Needs chromium.
"""

import argparse
import io
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageChops

ROOT = Path(__file__).parent.parent
SHOWN = "noise-strong.png"
WIDTH, HEIGHT, SCALE = 780, 900, 1.6  # CSS pixels, and device pixels in each: 2 would leave room for 40 colours
MOST_BYTES = 200_000
COLOURS = (256, 192, 128, 96, 80, 64, 48)  # tried until the file is small enough


def card_alone(report: str) -> str:
    """Return a report with nothing but the card of the sample that is shown."""
    card = re.search(rf'<article [^>]*data-name="[^"]*{re.escape(SHOWN)}".*?</article>', report, re.DOTALL)
    if card is None:
        raise SystemExit(f"the report has no {SHOWN}")
    shown = re.sub(r"<details>.*?</details>", "", card[0], flags=re.DOTALL)
    shown = re.sub(r'<p class="folder">.*?</p>', "", shown)
    return f"{report[: report.index('<body>')]}<body><main>{shown}</main></body></html>"


def photograph(page: Path) -> Image.Image:
    """Return the page as Chromium draws it, without the empty rest of the window."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        raise SystemExit("needs chromium")
    file = page.with_suffix(".png")
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={page.parent}/home",
    ]
    light = "--blink-settings=preferredColorScheme=1"
    size = [f"--window-size={WIDTH},{HEIGHT}", f"--force-device-scale-factor={SCALE}", f"--screenshot={file}"]
    subprocess.run([browser, *options, light, *size, page.as_uri()], check=True, capture_output=True, timeout=120)
    image = Image.open(file).convert("RGB")
    ground = Image.new("RGB", image.size, image.getpixel((0, image.height - 1)))
    left, top, right, bottom = ImageChops.difference(image, ground).getbbox() or (0, 0, *image.size)
    return image.crop((left - left % 2, top, right, bottom))


def main() -> None:
    """Score, photograph, and save in as many colours as the file has room for."""
    parser = argparse.ArgumentParser(description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--engine")
    source.add_argument("--report", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = given.report or Path(folder) / "report.html"
        if not given.report:
            run = [sys.executable, "-m", "diffiqa.cli", "run", "--engine", given.engine, str(ROOT / "samples")]
            subprocess.run([*run, "--report", str(report), "--format", "table"], check=True)
        page = Path(folder) / "card.html"
        page.write_text(card_alone(report.read_text(encoding="utf-8")), encoding="utf-8")
        image = photograph(page)
    data = b""
    for colours in COLOURS:
        stream = io.BytesIO()
        image.quantize(colours, dither=Image.Dither.NONE).save(stream, "PNG", optimize=True)
        data = stream.getvalue()
        print(f"{colours} colours, {image.width}×{image.height}: {len(data)} bytes")
        if len(data) <= MOST_BYTES:
            break
    (ROOT / "docs").mkdir(exist_ok=True)
    (ROOT / "docs" / "report.png").write_bytes(data)


if __name__ == "__main__":
    main()
