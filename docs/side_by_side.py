"""Put the same part of several pictures next to each other, with titles: how the comparison in the README was made.

    python docs/side_by_side.py OUT.png --box LEFT TOP WIDTH HEIGHT --row "TITLE=FILE" "TITLE=FILE" ...  [--box ... --row ...]

Smaller pictures are enlarged bicubically to the size of the largest of their row first.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

GAP, TITLE = 6, 26


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--box", type=int, nargs=4, action="append", required=True, metavar=("LEFT", "TOP", "WIDTH", "HEIGHT"))
    parser.add_argument("--row", nargs="+", action="append", required=True, metavar="TITLE=FILE", help="one for each --box")
    options = parser.parse_args()
    rows = [_row(entries, box) for entries, box in zip(options.row, options.box, strict=True)]
    width = max(sum(picture.width + GAP for _, picture in row) - GAP for row in rows)
    height = sum(TITLE + row[0][1].height for row in rows)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    top = 0
    for row in rows:
        left = 0
        for title, picture in row:
            draw.text((left + 2, top + 4), title, fill="black", font=ImageFont.load_default(16))
            sheet.paste(picture, (left, top + TITLE))
            left += picture.width + GAP
        top += TITLE + row[0][1].height
    sheet.save(options.output)


def _row(entries: list[str], box: list[int]) -> list[tuple[str, Image.Image]]:
    titles, files = zip(*(entry.split("=", 1) for entry in entries), strict=True)
    pictures = [Image.open(file).convert("RGB") for file in files]
    size = max(picture.size for picture in pictures)
    left, top, width, height = box
    area = (left, top, left + width, top + height)
    return [
        (title, picture.resize(size, Image.Resampling.BICUBIC).crop(area))
        for title, picture in zip(titles, pictures, strict=True)
    ]


if __name__ == "__main__":
    main()
