"""A DICOM radiograph as a radiologist sees it, in grey from 0 (black) to 1 (white).

    bits in the file -> stored value -> modality LUT -> VOI LUT or window -> polarity -> grey     (padding: black)

Every stage acts on one value at a time. So they are applied once, to all the values that the stored bits can hold, and
the pixels are looked up in that table. Black and white are the ends of the window or, where there is none, of what the
stored bits can hold; never the image's own minimum and maximum.

What the standard does not allow, or leaves open, is rejected by name rather than guessed. An element that is absent and
one that is empty are the same (PS3.5, 7.4.5).

Source: DICOM PS3.3, C.7.6.3 (pixels), C.7.5.1.1.2 (padding), C.11.1 (modality LUT), C.11.2 (VOI LUT), C.8.11.3
(polarity).
"""
import math
import re
import unicodedata

import numpy as np
from PIL import Image
from pydicom.pixels import get_decoder
from pydicom.uid import AllTransferSyntaxes, JPEGExtended12Bit

from radiographs.tags import (Rejected, describe, orientation, quiet,
                              read_dicom_file, rejecting, text_of, value_of)

MAX_PIXELS = 10_000 ** 2  # the largest detectors have a quarter of that; a decompression bomb has more
MAX_ASPECT = 8            # the sides of a pixel; a greater ratio is a damaged header


def read_dicom(path, used_bits=None):
    """(H, W) float32 in [0, 1] from a DICOM file, with square pixels. used_bits: how many of the stored bits the
    detector uses, for files without a window. Raises Rejected."""
    with quiet():
        ds = read_dicom_file(path)
        describe(ds)                                                 # checks that the patient can be read
        with rejecting("damaged DICOM header"):
            check_kind(ds)
            check_orientation(ds)
            height, width = shape_of_square_pixels(ds)
        stored = stored_values(ds)                                   # H W, whole numbers
        with rejecting("damaged DICOM header"):
            grey = shown(stored, ds, used_bits)                      # H W
    if (height, width) != grey.shape:
        grey = np.asarray(Image.fromarray(grey).resize((width, height), Image.Resampling.BICUBIC)).clip(0, 1)
    return grey


# ---------------------------------------------------------------------------------------------------------
# Whether it is a chest radiograph, the right way round

MODALITIES = ("CR", "DX", "DR", "RG", "")
OTHERS = set("""AR BI BMD CT DG DOC ECG EEG EPS ES GM HD IO IVOCT IVUS KO LS MG MR NM OAM OCT OP OPT OT PR PT PX REG RF
    RTDOSE RTIMAGE RTPLAN RTSTRUCT SC SEG SM SR ST TG US XA XC""".split())  # those that a reason names

CHEST = set("CHEST THORAX LUNG LUNGS LUNGE POUMON POUMONS PEITO PULMAO TORAX PECHO PULMON PULMONES".split())
# PS3.16, Annex L, and how French, German, Italian, Portuguese and Spanish hospitals say it, in the singular. The bones
# of the thorax are parts of their own: they are taken with other exposures.
OTHER_PARTS = set("""
    ABD ABDO ABDOME ABDOMEN ABDOMENPELVIS ABDOMINAL ACJOINT ANKLE ARM BACK BLADDER BRAIN BREAST BUTTOCK CALCANEUS CALF
    CAROTID CEREBELLUM CERVIX CHEEK CLAVICLE COCCYX COLON CORNEA CSPINE CTSPINE DUODENUM EAR ELBOW ESOPHAGUS EXTREMITY
    EYE EYELID EXM FACE FEET FEMUR FIBULA FINGER FOOT FOREARM GALLBLADDER HAND HEAD HEADNECK HEEL HIP HUMERUS ILEUM
    ILIUM IAC JAW JEJUNUM KIDNEY KNEE KUB LARYNX LEG LIVER LSPINE LSSPINE LUMBAR MANDIBLE MAXILLA MOUTH NECK NOSE ORBIT
    OVARY PANCREAS PAROTID PATELLA PELVIS PENIS PHARYNX PROSTATE RADIUS RECTUM RIB RIBS RIBCAGE SACRUM SCALP SCAPULA
    SCLERA SCROTUM SHOULDER SINUS SINUSES SIJOINT SKULL SPINAL SPINE SSPINE STERNUM STOMACH SUBMANDIBULAR TEETH TESTIS
    THIGH THORACICSPINE THUMB THYMUS THYROID TIBIA TLSPINE TMJ TOE TONGUE TSPINE ULNA URETER URETHRA UTERUS VAGINA
    VERTEBRA VULVA WHOLEBODY WRIST ZYGOMA
    BAUCH MAMMA TOOTH DENTAL GINOCCHIO PIEDE SPALLA GOMITO POLSO CAVIGLIA BACINO
    BASSIN CHEVILLE COUDE CRANE CUISSE EPAULE GENOU HANCHE JAMBE MAIN PIED POIGNET RACHIS
    BECKEN ELLENBOGEN FUSS HANDGELENK HUEFTE HUFTE KNIE LWS HWS BWS SCHADEL SCHAEDEL SCHULTER SPRUNGGELENK WIRBELSAULE
    BRACO CABECA COLUNA COTOVELO JOELHO MAO OMBRO PERNA PUNHO QUADRIL TORNOZELO
    BRAZO CABEZA CADERA CODO COLUMNA CRANEO CUELLO HOMBRO MANO MUNECA PIE PIERNA RODILLA TOBILLO
""".split())


def check_kind(ds):
    """Raises Rejected for what is not one grey radiograph of a chest, ready to be looked at."""
    modality = text_of(ds, "Modality")
    if modality not in MODALITIES:
        raise Rejected(f"modality {modality if modality in OTHERS else 'unknown'}, not a radiograph")
    if text_of(ds, "PresentationIntentType") == "FOR PROCESSING":
        raise Rejected("a detector's raw image for processing, not for presentation")
    if part := other_part(ds):
        raise Rejected(f"body part {part}, not a chest")
    photometric = text_of(ds, "PhotometricInterpretation")
    if not photometric:
        raise Rejected("PhotometricInterpretation is missing, so nothing says that this is grey")
    if photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise Rejected("a photometric interpretation other than MONOCHROME1 and MONOCHROME2, not grey")
    if whole(ds, "SamplesPerPixel", 1) != 1:
        raise Rejected("more than one sample a pixel, not grey")
    if whole(ds, "NumberOfFrames", 1) > 1:
        raise Rejected("more than one frame")


def other_part(ds):
    """The other part of the body that a header names, a word of OTHER_PARTS; None where it names a chest or nothing
    known. The element has Defined Terms, so any other word is legal: hospitals write their language, or "UNKNOWN"."""
    regions = value_of(ds, "AnatomicRegionSequence") or ()
    texts = [text_of(ds, "BodyPartExamined"), *(text_of(item, "CodeMeaning") for item in regions)]
    letters = unicodedata.normalize("NFKD", " ".join(texts))         # an accent is now a character of its own, and goes
    named = re.findall("[A-Z]+", "".join(letter for letter in letters if not unicodedata.combining(letter)))
    if not any(word in CHEST or word.startswith("CHEST") for word in named):  # CHESTABDOMEN is a defined term
        named += ["".join(named), *(word.removesuffix("S") for word in named)]  # "WHOLE BODY", "HANDS"
        return next((word for word in named if word in OTHER_PARTS), None)


def check_orientation(ds):
    """Raises Rejected for an image that says it is mirrored or turned: as stored, its heart would be on the right."""
    if said := orientation(ds):
        if said[1] != "F":
            raise Rejected("turned: by PatientOrientation the columns do not run to the feet")
        if said[0] == "R":
            raise Rejected("mirrored: by PatientOrientation the rows run to the patient's right")


# ---------------------------------------------------------------------------------------------------------
# Numbers of a header

def numbers(ds, keyword):
    """The finite numbers of an element; [] if it is absent or empty."""
    with rejecting(f"{keyword} is not a finite number"):
        found = np.atleast_1d(value_of(ds, keyword) if value_of(ds, keyword) is not None else []).astype(np.float64)
        if not np.isfinite(found).all():
            raise ValueError
    return found.tolist()


def number(ds, keyword, default):
    found = numbers(ds, keyword) or [default]
    if len(found) > 1:
        raise Rejected(f"{keyword} has several values where one is meant")
    return found[0]


def whole(ds, keyword, default=None):
    """A whole number of an element; without a default it must be there."""
    found = number(ds, keyword, default)
    if found is None or found != int(found):
        raise Rejected(f"{keyword} is {'missing' if found is None else 'not a whole number'}")
    return int(found)


def words(ds, keyword):
    """The 16-bit words of an element that may be US, SS or OW, as numbers from 0 to 65535."""
    value = value_of(ds, keyword)
    if value is None:
        raise Rejected(f"{keyword} is missing")
    if isinstance(value, bytes):
        little = ds.original_encoding[1] is not False
        return np.frombuffer(value[:len(value) // 2 * 2], "<u2" if little else ">u2").astype(np.int64)
    return np.atleast_1d(value).astype(np.int64) & 0xFFFF


# ---------------------------------------------------------------------------------------------------------
# From bits to stored values

def bits_of(ds):
    """Bits allocated, bits stored and high bit (C.7.6.3.1): where in its cell a value lies."""
    allocated, stored = whole(ds, "BitsAllocated"), whole(ds, "BitsStored")
    high = whole(ds, "HighBit", stored - 1)
    if allocated not in (8, 16, 32):
        raise Rejected("BitsAllocated is none of 8, 16 and 32")
    if not 1 <= stored <= 16 or stored > allocated:
        raise Rejected("BitsStored is not from 1 to 16 and to BitsAllocated")
    if not stored - 1 <= high < allocated:
        raise Rejected("HighBit leaves BitsAllocated")
    return allocated, stored, high


def is_signed(ds):
    representation = whole(ds, "PixelRepresentation", 0)
    if representation not in (0, 1):
        raise Rejected("PixelRepresentation is neither 0 nor 1")
    return representation == 1


def range_of(bits, signed):
    """The least value of so many bits, and how many values there are."""
    return -(1 << (bits - 1)) if signed else 0, 1 << bits


def stored_values(ds):
    """(H, W) whole numbers: the stored bits of each cell, those around them (old overlays) cut off, with their sign."""
    with rejecting("damaged DICOM header"):
        rows, columns = whole(ds, "Rows"), whole(ds, "Columns")
        if not 0 < rows * columns <= MAX_PIXELS:
            raise Rejected("no pixels, or more than any radiograph has")
        if not any(keyword in ds for keyword in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
            raise Rejected("no pixel data")
        if "PixelData" not in ds:
            raise Rejected("floating-point pixel data")
        allocated, bits, high = bits_of(ds)
        syntax = ds.file_meta.get("TransferSyntaxUID")
        if syntax not in AllTransferSyntaxes:
            raise Rejected("a transfer syntax that is missing or unknown")
    with rejecting(f"no decoder for {syntax.name}"):
        if syntax == JPEGExtended12Bit and bits > 8:
            raise Rejected(f"no decoder for {syntax.name} of more than 8 bits")
        decoder = get_decoder(syntax)
        if not decoder.is_available:
            raise Rejected(f"no decoder for {syntax.name}; pip install python-gdcm has one")
    with rejecting(f"pixel data that cannot be decoded: damaged, cut short, or {syntax.name} of a kind not supported"):
        ds.PhotometricInterpretation = text_of(ds, "PhotometricInterpretation")  # decoders want capitals
        ds.NumberOfFrames, ds.SamplesPerPixel, ds.HighBit, ds.PixelRepresentation = 1, 1, high, int(is_signed(ds))
        cells, _ = decoder.as_array(ds, raw=True, correct_unused_bits=False)
        if cells.shape != (rows, columns):
            raise ValueError
    values = cells.astype(np.int64 if allocated == 32 else np.int32)
    values >>= high + 1 - bits
    values &= (1 << bits) - 1
    if is_signed(ds):
        values -= (values >> (bits - 1)) << bits                     # the highest bit counts as its negative
    return values


def shape_of_square_pixels(ds):
    """(height, width) in pixels as wide as high; the coarser side is refined (C.7.6.3.1.7). Rows over columns: the
    spacing says it in mm, or the aspect ratio says it as two whole numbers."""
    height, width = whole(ds, "Rows"), whole(ds, "Columns")
    for keyword in ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing", "PixelAspectRatio"):
        sides = numbers(ds, keyword)
        if len(sides) == 2 and min(sides) > 0:
            break
    else:
        return height, width
    aspect = sides[0] / sides[1]                                     # a pixel's height over its width
    if max(aspect, 1 / aspect) > MAX_ASPECT:
        raise Rejected(f"{keyword} says that pixels are far from square")
    if not math.isclose(aspect, 1, rel_tol=1e-3):
        height, width = (round(height * aspect), width) if aspect > 1 else (height, round(width / aspect))
    if height * width > MAX_PIXELS:
        raise Rejected("no pixels, or more than any radiograph has")
    return height, width


# ---------------------------------------------------------------------------------------------------------
# From stored values to grey

def shown(stored, ds, used_bits=None):
    """(H, W) stored values as grey, float32 in [0, 1]."""
    bits = bits_of(ds)[1]
    has_window = bool(lut_items(ds, "VOILUTSequence") or numbers(ds, "WindowCenter") or numbers(ds, "WindowWidth"))
    if used_bits and not has_window:
        bits = min(bits, used_bits)
    least, count = range_of(bits, is_signed(ds))
    values, low, high = modality_lut(np.arange(least, least + count), ds)
    table = voi_lut(values, low, high, ds).clip(0, 1).astype(np.float32)  # the grey of each value from `least` on
    if is_inverse(ds):
        table = 1 - table
    padded = padding(stored, ds)
    image = stored if padded is None else stored[~padded]            # the values that count
    if image.size and not least <= image.min() <= image.max() < least + count:
        raise Rejected("values beyond the used depth that was given")
    grey = table.take(stored - least, mode="clip")                   # H W
    if image.size and bits > 8 and not has_window and not used_bits:
        if 0 < np.ptp(table.take(image - least)) < 1 / 4:
            raise Rejected("no window, and less than a quarter of the stored depth is used; --used-bits says how much")
    if padded is not None:
        grey[padded] = 0
    return grey


def modality_lut(values, ds):
    """What the stored values stand for, and the least and greatest value that may come out (C.11.1)."""
    if items := lut_items(ds, "ModalityLUTSequence"):
        if len(items) > 1:
            raise Rejected("more than one modality LUT")
        return look_up(values, items[0])
    slope, intercept = number(ds, "RescaleSlope", 1), number(ds, "RescaleIntercept", 0)
    if slope == 0:
        raise Rejected("RescaleSlope is 0")
    values = slope * values + intercept
    if not np.isfinite(values).all() or np.ptp(values) == 0:
        raise Rejected("RescaleSlope or RescaleIntercept leaves no difference between values")
    return values, values.min(), values.max()                        # the other way round where the slope falls


def voi_lut(values, low, high, ds):
    """The values of interest from 0 to 1 (C.11.2): by the first VOI LUT, else by the first window, else all of them."""
    if items := lut_items(ds, "VOILUTSequence"):
        values, low, high = look_up(values, items[0])
        if values.max() < high / 4:
            raise Rejected("a VOI LUT of less than a quarter of the depth that it says: dark throughout")
        return (values - low) / (high - low)
    centers, widths = numbers(ds, "WindowCenter"), numbers(ds, "WindowWidth")
    if not centers and not widths:
        return (values - low) / (high - low)
    if not centers or not widths:
        raise Rejected("a window without its center or its width")
    center, width = centers[0], widths[0]
    kind = text_of(ds, "VOILUTFunction") or "LINEAR"
    if kind not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        raise Rejected("VOILUTFunction is none of LINEAR, LINEAR_EXACT and SIGMOID")
    if width <= 0 or (kind == "LINEAR" and width < 1):
        raise Rejected("WindowWidth is below 1, or not above 0 for LINEAR_EXACT and SIGMOID")
    if kind == "SIGMOID":                                            # C.11.2.1.3.1
        return 1 / (1 + np.exp((-4 * (values - center) / width).clip(-100, 100)))
    if kind == "LINEAR_EXACT":                                       # C.11.2.1.3.2
        return (values - center) / width + 0.5
    if width == 1:                                                   # C.11.2.1.2: a threshold
        return (values > center - 0.5).astype(np.float64)
    return (values - (center - 0.5)) / (width - 1) + 0.5


def lut_items(ds, keyword):
    """The items of a sequence of LUTs that hold anything."""
    return [item for item in value_of(ds, keyword) or ()
            if any(value_of(item, name) is not None for name in ("LUTDescriptor", "LUTData"))]


def look_up(values, item):
    """The values through the LUT of a sequence's item, and the ends of its output: all that its bits can hold
    (C.11.1.1). Values before its first and after its last entry give those."""
    descriptor, entries = words(item, "LUTDescriptor"), words(item, "LUTData")
    if len(descriptor) != 3 or not 8 <= descriptor[2] <= 16:
        raise Rejected("a LUT descriptor other than three numbers, the last from 8 to 16")
    count, first, bits = int(descriptor[0]) or 65536, int(descriptor[1]), int(descriptor[2])
    if bits == 8 and len(entries) == (count + 1) // 2:               # two entries a word, the lower byte first
        entries = np.stack([entries & 255, entries >> 8], 1).ravel()
    if len(entries) < count:
        raise Rejected("a LUT of fewer entries than it says")
    entries = entries[:count]
    if entries.max() >= 1 << bits:
        raise Rejected("a LUT with entries above what its bits can hold")
    # The first value is a signed number where the values are signed, whatever element it stands in (C.11.1.1).
    if first > values.max() or (first >= 32768 and item["LUTDescriptor"].VR == "SS"):
        first -= 65536
    index = np.rint(values).astype(np.int64) - first
    return entries[index.clip(0, count - 1)].astype(np.float64), 0, (1 << bits) - 1


def is_inverse(ds):
    """Whether the least value is white. MONOCHROME1 and the presentation LUT shape INVERSE say the same (C.8.11.3)."""
    inverse, shape = text_of(ds, "PhotometricInterpretation") == "MONOCHROME1", text_of(ds, "PresentationLUTShape")
    if shape and shape != ("INVERSE" if inverse else "IDENTITY"):
        raise Rejected("PresentationLUTShape contradicts the photometric interpretation, or is for film")
    return inverse


def padding(stored, ds):
    """(H, W) bool: which pixels are no part of the image (C.7.5.1.1.2), those of one stored value or of a range.
    None if there is no such value."""
    if value_of(ds, "PixelPaddingValue") is None:
        return None
    keywords = ("PixelPaddingValue", "PixelPaddingRangeLimit")
    ends = [int(words(ds, keyword)[0]) for keyword in keywords if value_of(ds, keyword) is not None]
    if is_signed(ds):
        ends = [end - 65536 if end >= 32768 else end for end in ends]
    least, count = range_of(bits_of(ds)[1], is_signed(ds))
    if min(ends) < least or max(ends) >= least + count:
        raise Rejected("PixelPaddingValue or PixelPaddingRangeLimit is no value that BitsStored can hold")
    return (stored >= min(ends)) & (stored <= max(ends))
