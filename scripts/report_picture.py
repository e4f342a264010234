"""The picture of a report at the top of README.md: ``scripts/report_picture.py PAGE.html PICTURE.png``.

Takes the losses and one picture of an HTML page of ``pathfm report`` with a headless Chromium, in few colours.
"""

import argparse
import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

WIDTH, COLOURS = 1280, 96
_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def shoot(page: Page, title: str) -> Image.Image:
    """The losses and the picture of a title, one below the other."""
    picture = page.locator(f"#pictures h2:has-text('{title}') + .wide")
    parts = [page.locator("#section-1"), picture]
    shots = [Image.open(io.BytesIO(part.screenshot())).convert("RGB") for part in parts]
    sheet = Image.new("RGB", (WIDTH, sum(shot.height for shot in shots)), shots[0].getpixel((0, 0)))
    top = 0
    for shot in shots:
        sheet.paste(shot, ((WIDTH - shot.width) // 2, top))
        top += shot.height
    return sheet


def main() -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("page", type=Path, help="report.html")
    parser.add_argument("picture", type=Path, help="PNG to write")
    parser.add_argument("--title", default="Patch features", help="words of the picture's title (%(default)s)")
    args = parser.parse_args()
    browser = next(filter(None, map(shutil.which, _BROWSERS)), None)
    if browser is None:
        parser.error("there is no Chromium; apt-get install chromium brings one.")
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = running.new_page(viewport={"width": WIDTH, "height": 900}, color_scheme="light")
        page.goto(args.page.resolve().as_uri())
        page.locator(".chart canvas").last.wait_for()
        sheet = shoot(page, args.title)
        running.close()
    sheet.quantize(COLOURS, dither=Image.Dither.NONE).save(args.picture, optimize=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
