"""Images side by side as one PNG, with a name under each where there are names."""

import io
from collections.abc import Sequence

from torch import Tensor

SMALLEST = 72  # pixels that a captioned image takes at least: narrower ones are enlarged
FONT = 11
CAPTION = 18


def grid_png(
    images: Tensor,
    *,
    names: Sequence[str] = (),
    columns: int = 4,
    gap: int = 4,
    paper: bool = True,
) -> bytes:
    """Images uint8 (N, 3, H, W) row by row as PNG, the gaps transparent.

    With `names`, one for each image, they stand below on white, cut where they are too long; images
    narrower than 72 pixels are then enlarged by a whole factor. Without `paper` they stand on
    nothing, in a grey that reads on light and on dark pages.
    """
    from PIL import Image, ImageDraw, ImageFont

    factor = -(-SMALLEST // images.shape[-1]) if names else 1
    below = CAPTION if names else 0
    width, height = factor * images.shape[-1], factor * images.shape[-2]
    rows = -(-len(images) // columns)
    size = (columns * (width + gap) - gap, rows * (height + below + gap) - gap)
    white = names and paper
    canvas = Image.new("RGBA", size, (255, 255, 255, 255) if white else (0, 0, 0, 0))
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(FONT)
    for i, image in enumerate(images.permute(0, 2, 3, 1).cpu().contiguous().numpy()):
        left, top = (i % columns) * (width + gap), (i // columns) * (height + below + gap)
        picture = Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST)
        canvas.paste(picture, (left, top))
        if names:
            text = names[i]
            while len(text) > 1 and draw.textlength(text, font=font) > width:
                text = text.removesuffix("…")[:-1] + "…"
            draw.text(
                (left + width // 2, top + height + below // 2),
                text,
                (40, 40, 40) if paper else (128, 133, 143),
                font,
                anchor="mm",
            )
    stream = io.BytesIO()
    canvas.save(stream, format="PNG", optimize=True)
    return stream.getvalue()
