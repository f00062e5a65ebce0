"""`train.py radit --dry-run`: the same checks as before a training, and a table of what would run where. Nothing is
written, and the model is built on torch's meta device, where tensors have shapes but no content.
"""
import math
import shutil

import torch

import radit
from common import cli
from radiographs import fields
from training import plan


def show(args, cfg, config, examples, decoder):
    """Prints what a training of `config` on so many `examples` and args.dry_run processes would need."""
    processes = args.dry_run
    if cfg.batch % (processes * cfg.accumulate):
        raise cli.InputError(f"--batch {cfg.batch} cannot be shared by {processes} processes, --accumulate "
                             f"{cfg.accumulate}: it must be a multiple of {processes * cfg.accumulate}")
    micro = cfg.batch // (processes * cfg.accumulate)
    device, bf16 = cli.pick_device()
    with torch.device("meta"):
        model = radit.RadiT(config)
        age, codes = (x.to("meta") for x in fields.encode_metadata([{}] * micro, config.datasets))
        shape = model(torch.empty(micro, config.channels, *config.grid), torch.empty(micro), age, codes).shape
    kept = ("compiled" if args.compile else "eager") + (", recomputed" if args.recompute else "")
    state = sum(plan.state(config, processes, args.fsdp, len(cfg.ema)).values())
    preview = plan.preview(config, micro, bf16) + (plan.decoder_bytes(config, decoder.config) if decoder else 0)
    active = max(plan.activations(config, micro, kept, bf16), preview)
    saved = plan.checkpoint_bytes(config, len(cfg.ema)) * (cfg.keep + 1)
    place = next(path for path in [args.out, *args.out.absolute().parents] if path.exists())
    free = shutil.disk_usage(place).free
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    name = torch.cuda.get_device_name(device) if memory else device.type
    layout = "FSDP" if args.fsdp else "DDP" if processes > 1 else "one process"
    rows = [("model", f"RadiT, {radit.count_parameters(config):,} parameters, {config.tokens:,} tokens an image, "
                      f"{config.prediction} prediction; a micro-batch is {tuple(shape)}"),
            ("data", f"{examples:,} training examples, "
                     f"{', '.join(config.covered.get('dataset', {})) or 'no data set named'}"),
            ("where", f"{processes} x {name}, {'bfloat16' if bf16 else 'float32'}, {layout}, {kept}"
                      f"{', float8' if args.fp8 else ''}"),
            ("batch", f"{cfg.batch:,} images: {processes} processes x {micro} at a time x {cfg.accumulate}"),
            ("steps", f"{math.ceil(cfg.images / cfg.batch):,}, learning rate {cfg.lr:.3g}, "
                      f"{3 * radit.count_flops(config) / 1e12:.3g} TFLOP an image"),
            ("memory", f"{(state + active) / 1e9:.1f} GB computed: {state / 1e9:.1f} for weights, averages and "
                       f"moments, {active / 1e9:.1f} for activations or a preview; "
                       + (f"this GPU has {memory / 1e9:.0f} GB" if memory else "no GPU here to compare with")),
            ("disk", f"{saved / 1e9:.2f} GB for {cfg.keep + 1} checkpoints, {free / 1e9:.0f} GB free at {place}")]
    print("\n".join(f"{name:10}{text}" for name, text in rows))
    if memory and state + active > 0.9 * memory:
        raise cli.RunError("more than nine tenths of the GPU's memory; python -m training plan says what fits")
    if saved > free:
        raise cli.RunError(f"--out {args.out}: {saved / 1e9:.2f} GB of checkpoints do not fit in the "
                           f"{free / 1e9:.2f} GB that are free there")
    print("all checks passed, nothing was written")

