"""Draws steer.png and edit.png of this folder's README with the weights beside it.

    python weights/demo/pictures.py
"""
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

DEMO = Path(__file__).parent
sys.path.insert(0, str(DEMO.parent.parent))
import sample
from causal import edit, edit_command
from common import cli
from radiographs import fields, pixels

ADULT = {"dataset": "ChestX-ray14"}
ROWS = [ADULT | {"view": "PA"}, ADULT | {"view": "AP"}, ADULT | {"sex": "female"}, ADULT | {"age": 10.0},
        {"dataset": "kermany", "no_finding": "positive"}, {"dataset": "kermany", "pneumonia": "positive"}]
MAN = ADULT | {"view": "PA", "sex": "male", "age": 30.0, "no_finding": "positive"}
CHILD = {"dataset": "kermany", "view": "AP", "no_finding": "positive"}
EDITS = [("30 years, male, PA", MAN, {}), ("age 75", MAN, {"age": 75.0}), ("a woman", MAN, {"sex": "female"}),
         ("AP", MAN, {"view": "AP"}),
         ("cardiomegaly", MAN, {"cardiomegaly": "positive", "no_finding": "negative"}),
         ("pleural effusion", MAN, {"pleural_effusion": "positive", "no_finding": "negative"}),
         ("a child (kermany), AP", CHILD, {}),
         ("pneumonia", CHILD, {"pneumonia": "positive", "no_finding": "negative"})]


def steered(model, vae):
    """Six requests, a row each, of seeds 0 to 5, at 160 pixels."""
    records = [fields.resolve_request(record)[0] for record in ROWS for _ in range(6)]
    images, _ = sample.generate(model, vae, records, list(range(6)) * len(ROWS))
    return pixels.grid(F.interpolate(images, (160, 160), mode="bicubic", antialias=True).clamp(-1, 1), columns=6)


def edited(model, vae, columns=4, side=256, line=26):
    """Each picture over what the edit changed, both at 256 pixels, `columns` of these side by side."""
    man, child = (sample.generate(model, vae, [record], [seed])[0] for record, seed in ((MAN, 0), (CHILD, 2)))
    originals = [man if record is MAN else child for _, record, _ in EDITS]  # 1 1 H W each
    factual = [record for _, record, _ in EDITS]
    wanted = [edit.act(record, change, None) if change else record for _, record, change in EDITS]
    edits = edit.edit(model, vae, torch.cat(originals), factual, wanted)     # without a change: the reconstruction
    rows = -(-len(EDITS) // columns)
    whole = Image.new("RGB", (columns * side, rows * (2 * side + line)))
    for i, (text, _, change) in enumerate(EDITS):
        if change:
            pictures = [edit_command.picture(edits[i]), edit_command.difference(before, edits[i])]
        else:
            pictures, before = [edit_command.picture(originals[i][0])], edits[i]
        left, top = i % columns * side, i // columns * (2 * side + line)
        ImageDraw.Draw(whole).text((left + 6, top + 2), text, font=ImageFont.load_default(size=18))
        for row, picture in enumerate(pictures):
            whole.paste(picture.resize((side, side), Image.Resampling.BICUBIC), (left, top + line + row * side))
    return whole


@torch.no_grad()
def main():
    model, vae = sample.load_weights(DEMO)
    about = sample.text_fields(sample.provenance(DEMO, steps=sample.STEPS, solver=sample.SOLVER,
                                                 guidance=sample.GUIDANCE))
    pixels.save_image(steered(model, vae), DEMO / "steer.png", about)
    edit_command.save_png(edited(model, vae), DEMO / "edit.png", about)


if __name__ == "__main__":
    cli.run(main)
