"""Write pictures of a report: the head of the page at 1400 and 400 px, light and dark, and its figures for the README.

python benchmarks/screenshots.py FOLDER_OF_A_SCAN [--out figures]
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

from PIL import Image

from sharpscope.report.page import write
from sharpscope.saved import open_result

SIZES = {1400: 2600, 400: 2600}
HEAD = (1200, 810)  # for the README: the verdict and its table
COLOURS = 256  # fewer, and two of the series become one colour
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


def themed(page: Path, folder: Path, theme: str) -> Path:
    """Return a copy of the page with the theme chosen, and without the script, which would choose again."""
    text = page.read_text(encoding="utf-8").replace('<html lang="en">', f'<html lang="en" data-theme="{theme}">', 1)
    copy = folder / f"{theme}.html"
    copy.write_text(text[: text.rindex("<script>")] + text[text.rindex("</script>") + 9 :], encoding="utf-8")
    return copy


def framed(page: Path, width: int, height: int) -> Path:
    """Return a page that shows the page in a frame: Chromium makes no window narrower than 500 px."""
    outer = page.with_name(f"{page.stem}-{width}.html")
    frame = f'<iframe src="{page.name}" style="border:0;width:{width}px;height:{height}px" scrolling="no"></iframe>'
    outer.write_text(f'<body style="margin:0;overflow:hidden">{frame}</body>', encoding="utf-8")
    return outer


def picture(browser: str, page: Path, place: Path, width: int, height: int) -> None:
    """Write the top of a page as a PNG of few colours."""
    with tempfile.TemporaryDirectory() as profile:
        options = [f"--user-data-dir={profile}", f"--window-size={max(width, 600)},{height}", f"--screenshot={place}"]
        command = [browser, *QUIET, *options, framed(page, width, height).as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
    with Image.open(place) as found:
        found.convert("RGB").crop((0, 0, width, height)).quantize(COLOURS).save(place, optimize=True)


def main() -> None:
    """Draw the page of the scan again and take its pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scan", type=Path)
    parser.add_argument("--out", type=Path, default=Path("figures"))
    chosen = parser.parse_args()
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        raise SystemExit("error: no Chromium\n  fix: install chromium")
    chosen.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        page = write(open_result(chosen.scan), place)
        for theme in ("light", "dark"):
            copy = themed(page, Path(place), theme)
            picture(browser, copy, chosen.out / f"report-{theme}.png", *HEAD)
            for width, height in SIZES.items():
                file = chosen.out / f"report-{width}-{theme}.png"
                picture(browser, copy, file, width, height)
                print(file, f"{file.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
