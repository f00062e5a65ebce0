"""A radiograph as a radiologist sees it: DICOM, PNG or JPEG to grey pixels of one size, and back to a file.

DICOM: modality LUT, then VOI LUT or window, then MONOCHROME1 inverted, then scaled from the stored bit depth, never
from the image's own minimum and maximum. Aspect ratio kept, antialiased resize, centred on black. Never flipped.
Source: DICOM PS3.3, C.11.1 (modality LUT) and C.11.2 (VOI LUT).
Images in memory: float32 (1, H, W) in [-1, 1], black is -1.
"""
import math
import os
from pathlib import Path

import numpy as np
import pydicom
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin, UnidentifiedImageError
from pydicom.pixels import apply_modality_lut, apply_voi, get_decoder

MAX_PIXELS = 10_000 ** 2  # the largest detectors have a quarter of that; a decompression bomb has more


class Rejected(ValueError):
    """An image that cannot be used, and why. The run goes on."""


def read_dicom(path):
    """(H, W) float64 in [0, 1] from a DICOM file: modality LUT, then VOI LUT or window, then MONOCHROME1 inverted."""
    ds = pydicom.dcmread(path)
    if str(ds.get("Modality", "")) not in ("CR", "DX", "DR", "RG", ""):
        raise Rejected(f"modality {ds.Modality}, not a radiograph")
    body = str(ds.get("BodyPartExamined", "")).upper()
    if body and not any(word in body for word in ("CHEST", "THORAX", "LUNG")):
        raise Rejected(f"body part {body}, not a chest")
    if ds.get("PhotometricInterpretation") not in ("MONOCHROME1", "MONOCHROME2"):
        raise Rejected(f"photometric interpretation {ds.get('PhotometricInterpretation')}, not grey")
    if int(ds.get("NumberOfFrames") or 1) > 1:
        raise Rejected("more than one frame")
    if ds.Rows * ds.Columns > MAX_PIXELS:
        raise Rejected(f"{ds.Columns}x{ds.Rows} pixels, more than any radiograph has")
    syntax = ds.file_meta.TransferSyntaxUID
    if syntax.is_compressed and not get_decoder(syntax).is_available:
        raise Rejected(f"no decoder for {syntax.name}; pip install python-gdcm has one")
    pixels = apply_modality_lut(ds.pixel_array, ds).astype(np.float64)
    if "VOILUTSequence" in ds:
        pixels = apply_voi(pixels.astype(np.int64), ds) / (2.0 ** ds.VOILUTSequence[0].LUTDescriptor[2] - 1)
    elif ds.get("WindowWidth") is not None:  # PS3.3 C.11.2.1.2; the first window where there are several
        center, width = (float(np.atleast_1d(ds[tag].value)[0]) for tag in ("WindowCenter", "WindowWidth"))
        kind = ds.get("VOILUTFunction", "LINEAR")
        if kind == "SIGMOID":
            pixels = 1 / (1 + np.exp(-4 * (pixels - center) / width))
        elif kind == "LINEAR_EXACT":
            pixels = (pixels - center) / width + 0.5
        else:
            pixels = (pixels - (center - 0.5)) / max(width - 1, 1e-9) + 0.5
    else:  # the whole range of the stored bits, never the image's own minimum and maximum
        least = -(2.0 ** (ds.BitsStored - 1)) if ds.PixelRepresentation else 0.0
        ends = apply_modality_lut(np.array([least, least + 2.0 ** ds.BitsStored - 1]), ds)
        pixels = (pixels - ends[0]) / (ends[1] - ends[0])
    pixels = pixels.clip(0, 1)
    return 1 - pixels if ds.PhotometricInterpretation == "MONOCHROME1" else pixels


def read_picture(path):
    """(H, W) float64 in [0, 1] from PNG, JPEG and their kind; 8 or 16 bits, palettes and opaque alpha are taken."""
    with Image.open(path) as image:
        if image.width * image.height > MAX_PIXELS:
            raise Rejected(f"{image.width}x{image.height} pixels, more than any radiograph has")
        if image.mode in ("I;16", "I;16B", "I"):
            return np.asarray(image).astype(np.float64) / 65535
        if image.mode in ("P", "PA", "LA", "RGBA", "CMYK", "YCbCr"):
            image = image.convert("RGBA")
            if np.asarray(image)[..., 3].min() < 255:
                raise Rejected("transparent pixels")
        array = np.asarray(image.convert("L" if image.mode in ("1", "L") else "RGB")).astype(np.float64) / 255
    if array.ndim == 3:
        if np.abs(array - array.mean(-1, keepdims=True)).max() > 0.1:  # JPEG's colour conversion costs a few levels
            raise Rejected("colour image")
        array = array.mean(-1)
    return array


def read_radiograph(path, size, bits=8):
    """One image file as a (size, size) array of uint8 or uint16: grey, antialiased resize, centred on black.

    Raises Rejected with the reason for whatever is not a usable radiograph.
    """
    path = Path(path)
    try:
        if path.stat().st_size == 0:
            raise Rejected("empty file")
        pixels = read_dicom(path) if is_dicom(path) else read_picture(path)
    except Rejected:
        raise
    except UnidentifiedImageError:
        raise Rejected("not an image") from None
    except Exception as error:  # decoders raise whatever they like on a damaged file; all of it is the file's fault
        text = " ".join(str(error).replace(str(path), "file").split())  # paths of a hospital can hold names
        raise Rejected(f"unreadable: {type(error).__name__} {text[:200]}") from error
    if min(pixels.shape) < 64:
        raise Rejected(f"only {pixels.shape[1]}x{pixels.shape[0]} pixels")
    if pixels.max() - pixels.min() < 2 / 255:
        raise Rejected("constant image")
    height, width = pixels.shape
    scale = size / max(height, width)
    height, width = max(1, round(height * scale)), max(1, round(width * scale))
    resized = Image.fromarray(pixels.astype(np.float32)).resize((width, height), Image.Resampling.LANCZOS)
    canvas = np.zeros((size, size), np.float32)
    top, left = (size - height) // 2, (size - width) // 2
    canvas[top:top + height, left:left + width] = resized
    white = 2 ** bits - 1
    return (canvas.clip(0, 1) * white).round().astype(np.uint8 if bits == 8 else np.uint16)


def is_dicom(path):
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"


def is_synthetic(path):
    """Whether a readable image file says of itself that it is synthetic: in a text field of a PNG as this project writes it,
    or by DICOM's Synthetic Data (0008,001C)."""
    if is_dicom(path):
        return pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["SyntheticData"]).get("SyntheticData") == "YES"
    with Image.open(path) as image:
        return image.info.get("Synthetic") == "yes"


def load_image(path):
    """A prepared grey PNG as float32 (1, H, W) in [-1, 1]."""
    with Image.open(path) as image:
        array = np.asarray(image)
    white = 65535 if array.dtype != np.uint8 else 255
    return torch.from_numpy(array.astype(np.float32) / white)[None] * 2 - 1


def to_bytes(image):
    """A (1, H, W) float image in [-1, 1] as the (H, W) uint8 array that files hold."""
    return ((image[0].float().clamp(-1, 1) + 1) * 127.5).round().byte().cpu().numpy()


def save_image(image, path, text=None):
    """Writes a (1, H, W) float image in [-1, 1] as an 8-bit grey PNG, `text` (a dict) into its text fields."""
    info = PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        info.add_text(key, value)
    Image.fromarray(to_bytes(image)).save(f"{path}.tmp", "PNG", pnginfo=info)
    os.replace(f"{path}.tmp", path)


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
    """Images (N, 1, H, W) side by side as one (1, rows * H, columns * W); empty places are black. `captions`, one text an
    image, stand below the images if these are wide enough for words."""
    if captions and images.shape[-1] >= 96:
        images = torch.cat([images, render_captions(captions, images.shape[-1])], dim=2)
    columns = columns or math.ceil(len(images) ** 0.5)
    rows = math.ceil(len(images) / columns)
    empty = -torch.ones(rows * columns - len(images), *images.shape[1:], device=images.device)
    return rearrange(torch.cat([images, empty]), "(r c) 1 h w -> 1 (r h) (c w)", c=columns)


def render_captions(captions, width):
    """Texts as white on black strips (N, 1, h, width) in [-1, 1], broken into as many lines as the longest one needs."""
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
