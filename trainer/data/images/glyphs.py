"""Images of letters, each with its name in Unicode: small real pairs of images and texts."""

import io
import unicodedata
from pathlib import Path

import pyarrow as pa

SIDE = 16
FONTS = tuple(
    f"DejaVu{family}" for family in (
        "Sans", "Sans-Bold", "Sans-Oblique", "Sans-BoldOblique", "SansMono", "SansMono-Bold", "SansMono-Oblique",
        "Serif", "Serif-Bold", "Serif-Italic",
    )
)  # fmt: skip
"""Those that matplotlib brings."""
SCRIPTS = ("DIGIT", "LATIN", "GREEK", "CYRILLIC")
"""What a name begins with: the label."""
RANGES = ((0x30, 0x3A), (0x41, 0x5B), (0x61, 0x7B), (0x391, 0x3CA), (0x410, 0x450))


def glyphs() -> pa.Table:
    """Digits and letters, Latin, Greek and Cyrillic, drawn in 10 fonts on 16 x 16 pixels as grey PNG."""
    import matplotlib  # heavy imports, which other data need not wait for
    from PIL import Image, ImageDraw, ImageFont

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    images, texts, labels = [], [], []
    for name in FONTS:
        font = ImageFont.truetype(folder / f"{name}.ttf", 13)
        for code in (code for low, high in RANGES for code in range(low, high)):
            said = unicodedata.name(chr(code), "")
            script = said.partition(" ")[0]
            if script not in SCRIPTS:
                continue
            ImageDraw.Draw(image := Image.new("L", (SIDE, SIDE))).text((SIDE / 2, 13), chr(code), 255, font, "ms")
            image.save(png := io.BytesIO(), "PNG")
            images.append({"bytes": png.getvalue(), "path": f"{name}-{code:04x}.png"})
            texts.append(said.lower().replace("letter ", ""))
            labels.append(SCRIPTS.index(script))
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.table({"image": pa.array(images, kind), "text": texts, "label": pa.array(labels, pa.int64())})
