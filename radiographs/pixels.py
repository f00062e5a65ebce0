"""A radiograph as a radiologist sees it: DICOM, PNG, JPEG or TIFF to grey pixels of one size, and back to a file.

    DICOM     the standard's grey stages (greyscale.py), pixels made square
    pictures  turned as EXIF says, then scaled from their depth: 8 bits, 16, or as many of 16 as are known to be used
    both      aspect ratio kept, antialiased resize, centred on black; never flipped, never stretched to the image's
              own minimum and maximum

What is no usable radiograph, and what cannot be read without a guess, is Rejected with a reason in fixed words.
Images in memory: float32 (1, H, W) in [-1, 1], black is -1.
"""
import io
import math
import multiprocessing
import sys

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import (Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin,
                 UnidentifiedImageError)

from common.cli import InputError, RunError, whole_file
from radiographs.greyscale import MAX_PIXELS, read_dicom
from radiographs.tags import (Rejected, is_dicom, open_file, quiet,
                              read_dicom_file, rejecting, text_of)

FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "JPEG2000", "PPM", "WEBP")  # of Pillow's many
TINY = 64                                   # pixels a side; below, there is nothing to see
WARNED = multiprocessing.RawValue("b", 0)   # shared with the workers of a run, which warns once


def read_radiograph(path, size, bits=8, used_bits=None):
    """One image file as a (size, size) array of uint8 or uint16: grey, antialiased resize, centred on black.

    used_bits: how many bits of a 16-bit picture, or of a DICOM file without a window, its source uses, such as 12.
    Raises Rejected with the reason for whatever is not a usable radiograph.
    """
    pixels = read_dicom(path, used_bits) if is_dicom(path) else read_picture(path, used_bits)  # H W in [0, 1]
    height, width = pixels.shape
    if min(height, width) < TINY:
        raise Rejected(f"fewer than {TINY} pixels on a side")
    if np.ptp(pixels) < 2 / 255:
        raise Rejected("constant image")
    scale = size / max(height, width)
    height, width = max(1, round(height * scale)), max(1, round(width * scale))
    resized = Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS)
    canvas = np.zeros((size, size), np.float32)
    top, left = (size - height) // 2, (size - width) // 2
    canvas[top:top + height, left:left + width] = resized
    white = 2 ** bits - 1
    return (canvas.clip(0, 1) * white).round().astype(np.uint8 if bits == 8 else np.uint16)


# ---------------------------------------------------------------------------------------------------------
# Pictures

def read_picture(path, used_bits=None):
    """(H, W) float32 in [0, 1] from PNG, JPEG, TIFF and their kind; 8 or 16 bits, palettes and opaque alpha are taken.
    Raises Rejected."""
    with open_file(path) as file, quiet():
        content = file.read()
    try:
        with quiet(), Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Rejected("more pixels than any radiograph has")
            if image.format == "PNG":
                check_png(content)
            if has_more_frames(image):
                raise Rejected("more than one picture in the file")
            return grey_of(image, used_bits)
    except Rejected:
        raise
    except UnidentifiedImageError:
        tiff = content[:4] in (b"II*\0", b"MM\0*")
        raise Rejected("a TIFF of a kind that is not supported" if tiff else "not an image") from None
    except Image.DecompressionBombError:
        raise Rejected("more pixels than any radiograph has") from None
    except Exception:  # decoders raise whatever they like on a damaged file; all of it is the file's fault
        raise Rejected("unreadable: the picture is damaged or cut short") from None


def check_png(content):
    """Raises for a PNG with a wrong checksum: Pillow does not look at those of its pixels while it reads them."""
    with Image.open(io.BytesIO(content)) as image:
        image.verify()


def has_more_frames(image):
    """Whether there is a second page, frame or picture. image.n_frames would read them all."""
    try:
        image.seek(1)
    except EOFError:
        return False
    return True


def grey_of(image, used_bits):
    """(H, W) float32 in [0, 1] of an open picture."""
    tiff = getattr(image, "tag_v2", {})                              # a TIFF's tags by number
    image = ImageOps.exif_transpose(image)                           # as EXIF says that it is to be looked at
    if image.mode == "F":
        raise Rejected("floating-point pixels: it is not said which value is white")
    if 2 in np.atleast_1d(tiff.get(339, 1)):                         # the tag SampleFormat
        raise Rejected("signed pixels: it is not said which value is black")
    if max(np.atleast_1d(tiff.get(258, 1))) > 16:                    # the tag BitsPerSample
        raise Rejected("pixels of more than 16 bits")
    if image.mode in ("I;16", "I;16B", "I;16L", "I"):
        return grey_of_16_bits(image, tiff, used_bits)
    if image.mode in ("1", "L") and "transparency" not in image.info:
        return np.asarray(image.convert("L"), np.float32) / 255
    if image.mode in ("L", "P", "PA", "LA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"):
        return grey_of_colours(np.asarray(image.convert("RGBA")))
    raise Rejected("a colour model other than grey, palette, RGB, CMYK and YCbCr")


def grey_of_16_bits(image, tiff, used_bits):
    array = np.asarray(image).astype(np.float32)
    if (array == image.info.get("transparency")).any():
        raise Rejected("transparent pixels")
    depth = int(np.max(tiff.get(258, 16)))                           # TIFF has 12 bits too
    white = 2 ** min(depth, used_bits or depth) - 1
    if array.max() > white:
        raise Rejected("values beyond the used depth that was given")
    if array.max() < white / 4 and not used_bits:
        warn_once("a picture of 16 bits uses less than a quarter of its depth and comes out dark. "
                  "If its source is known to use fewer bits, say how many, such as --used-bits 12")
    grey = array / white
    return 1 - grey if tiff.get(262) == 0 else grey                  # WhiteIsZero: Pillow inverts 8 bits, not 16


def grey_of_colours(rgba):
    """(H, W, 4) uint8 whose colours are all grey, or nearly: JPEG's conversion costs a few levels."""
    if rgba[..., 3].min() < 255:
        raise Rejected("transparent pixels")
    mean = rgba[..., :3].mean(-1, dtype=np.float32)                  # H W
    if max(np.abs(rgba[..., i] - mean).max() for i in range(3)) > 25.5:
        raise Rejected("colour image")
    return mean / 255


def warn_once(text):
    if not WARNED.value:
        WARNED.value = 1
        print(f"\nwarning: {text}", file=sys.stderr)  # on a line of its own, below a progress bar


# ---------------------------------------------------------------------------------------------------------
# The project's own pictures

def is_synthetic(path):
    """Whether an image file says of itself that it is synthetic: in a text field of a PNG as this project writes it, or
    by DICOM's Synthetic Data (0008,001C). Raises Rejected."""
    with quiet():
        if is_dicom(path):
            ds = read_dicom_file(path, stop_before_pixels=True, specific_tags=["SyntheticData"])
            with rejecting("damaged DICOM header"):
                return text_of(ds, "SyntheticData") == "YES"
        with open_file(path) as file, rejecting("not an image"), Image.open(file, formats=FORMATS) as image:
            return image.info.get("Synthetic") == "yes"


def is_selected(path):
    """Whether a PNG of this project says that a classifier chose it (python -m diagnosis check --redraw)."""
    if is_dicom(path):
        return False
    with open_file(path) as file, rejecting("not an image"), Image.open(file, formats=FORMATS) as image:
        return "Selected" in image.info


def load_image(path):
    """A prepared grey picture as float32 (1, H, W) in [-1, 1]. Raises InputError, naming the file."""
    with open(path, "rb") as file:
        try:
            with Image.open(file, formats=FORMATS) as image:
                array = np.asarray(image)
            if array.ndim != 2 or array.dtype not in (np.uint8, np.uint16):
                raise ValueError
        except Exception:  # Pillow raises many kinds on a damaged file, and none names it
            raise InputError(f"{path}: damaged, or no grey picture of 8 or 16 bits, "
                             "which python data.py prepare makes") from None
    white = 65535 if array.dtype != np.uint8 else 255
    return torch.from_numpy(array.astype(np.float32) / white)[None] * 2 - 1


def to_bytes(image):
    """A (1, H, W) float image in [-1, 1] as the (H, W) uint8 array that files hold."""
    if not image.isfinite().all():
        raise RunError("an image holds values that are no numbers; it is not written")
    return ((image[0].float().clamp(-1, 1) + 1) * 127.5).round().byte().cpu().numpy()


def save_image(image, path, text=None):
    """Writes a (1, H, W) float image in [-1, 1] as an 8-bit grey PNG, `text` (a dict) into its text fields."""
    info = PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        info.add_text(key, value)
    with whole_file(path) as temporary:
        Image.fromarray(to_bytes(image)).save(temporary, "PNG", pnginfo=info)


def content(images):
    """The box around what is not black, for images (N, 1, H, W): centre and half-size (N, 2) each, x before y, in units
    in which the whole picture runs from -1 to 1. A letterboxed radiograph fills a part of its square only."""
    seen = images[:, 0] > -0.94                                      # N H W: eight grey levels above black
    ends = []
    for line in (seen.any(1), seen.any(2)):                          # N W columns, then N H rows
        line = line | ~line.any(1, keepdim=True)                     # a black picture: all of it
        first = line.float().argmax(1)                               # N
        last = line.shape[1] - line.flip(1).float().argmax(1)        # N, one past the end
        ends.append(torch.stack([first, last]) * 2 / line.shape[1] - 1)  # 2 N
    low, high = torch.stack(ends, -1)                                # N 2 each
    return (low + high) / 2, (high - low) / 2


def jitter(images, generator):
    """Images (N, 1, H, W) as a slightly different exposure would show them: up to 12 % closer, seen through the same
    frame, darker or brighter by a gamma of up to 1.2. Never flipped or tilted, and never beyond the radiograph's own
    edge: black borders stay where they are, so that a model trained on such images does not learn moved ones."""
    zoom, x, y, gamma = torch.rand(4, len(images), generator=generator, device=images.device) * 2 - 1  # N each
    keep = 1 / (1.06 + 0.06 * zoom)[:, None]                         # N 1: the share of each side that stays in view
    centre, half = content(images)                                   # N 2 each
    move = torch.stack([x, y], 1) * (1 - keep) * half                # N 2: as far as the view stays inside
    whole = torch.eye(2, 3, device=images.device).expand(len(images), -1, -1)
    points = F.affine_grid(whole, images.shape, align_corners=False)  # N H W 2
    centre, half, move, keep = (a[:, None, None] for a in (centre, half, move, keep))
    inside = ((points - centre).abs() <= half).all(-1, keepdim=True)  # N H W 1
    points = torch.where(inside, centre + move + (points - centre) * keep, points)
    moved = F.grid_sample(images, points, mode="bicubic", padding_mode="border", align_corners=False).clamp(-1, 1)
    return ((moved + 1) / 2) ** (1.2 ** gamma).view(-1, 1, 1, 1) * 2 - 1


def grid(images, columns=None, captions=None):
    """Images (N, 1, H, W) side by side as one (1, rows * H, columns * W); empty places are black. `captions`, one text
    an image, stand below the images if these are wide enough for words."""
    if captions and images.shape[-1] >= 96:
        images = torch.cat([images, render_captions(captions, images.shape[-1]).to(images.device)], dim=2)
    columns = columns or math.ceil(len(images) ** 0.5)
    rows = math.ceil(len(images) / columns)
    empty = -torch.ones(rows * columns - len(images), *images.shape[1:], device=images.device)
    return rearrange(torch.cat([images, empty]), "(r c) 1 h w -> 1 (r h) (c w)", c=columns)


def render_captions(captions, width):
    """Texts as white on black strips (N, 1, h, width) in [-1, 1], broken into as many lines as the longest needs."""
    font = ImageFont.load_default(size=max(10, width // 20))
    broken = []
    for text in captions:
        lines = [""]
        for word in text.split():
            if font.getlength(f"{lines[-1]} {word}") < width - 4:
                lines[-1] = f"{lines[-1]} {word}".strip()
            else:
                lines.append(word)
        broken.append(lines)
    line_height = round(font.size * 1.4)
    strips = []
    for lines in broken:
        strip = Image.new("L", (width, line_height * max(map(len, broken)) + 4))
        for i, line in enumerate(lines):
            ImageDraw.Draw(strip).text((2, 2 + i * line_height), line, fill=255, font=font)
        strips.append(torch.from_numpy(np.array(strip)).float()[None] / 127.5 - 1)  # 1 h W
    return torch.stack(strips)
