"""A Rad-VAE from disk or the Hub: a folder that train.py wrote, or FLUX.2's autoencoder as Black Forest Labs published
it; either with adapters beside it. FLUX.2's tensors come in two layouts:

    diffusers   config.json and diffusion_pytorch_model.safetensors, in a folder `vae`: vae.py has its names
    flux2       ae.safetensors, without a config: the names below, and the attention's projections as 1x1 convolutions

Source: src/flux2/autoencoder.py of github.com/black-forest-labs/flux2, AutoencoderKLFlux2 of diffusers.
"""
import json
from pathlib import Path

from autoencoder import lora
from common import cli, hub
from common.cli import InputError
from vae import RadVAE, VAEConfig

# What every FLUX.2 autoencoder has in common; vae.py supports nothing else.
FIXED = {"_class_name": "AutoencoderKLFlux2", "act_fn": "silu", "patch_size": [2, 2], "batch_norm_eps": 1e-4,
         "mid_block_add_attention": True, "use_quant_conv": True, "use_post_quant_conv": True}


def read_config(path):
    """The arguments of VAEConfig from diffusers' config.json; without that file those of the released model."""
    if not path:
        return {"channels": 3}
    try:
        values = json.loads(path.read_text())
        for key, value in FIXED.items():
            if values.get(key, value) != value:
                raise InputError(f"{path}: {key} is {values[key]!r}, not {value!r} as in FLUX.2")
        return {"channels": values["in_channels"], "latent_channels": values["latent_channels"],
                "widths": values["block_out_channels"], "layers": values["layers_per_block"],
                "groups": values["norm_num_groups"]}
    except (json.JSONDecodeError, AttributeError, KeyError) as error:
        raise InputError(f"{path}: not the config of an AutoencoderKLFlux2: {type(error).__name__} {error}") from None


def names(levels):
    """Parts of flux2's tensor names -> vae.py's. flux2 counts `up` from the finest level, as it does `down`; vae.py
    counts from the coarsest."""
    table = {
        "encoder.quant_conv.": "quant_conv.",
        "decoder.post_quant_conv.": "post_quant_conv.",
        ".norm_out.": ".conv_norm_out.",
        ".nin_shortcut.": ".conv_shortcut.",
        ".mid.block_1.": ".mid_block.resnets.0.",
        ".mid.block_2.": ".mid_block.resnets.1.",
        ".mid.attn_1.norm.": ".mid_block.attentions.0.group_norm.",
        ".mid.attn_1.q.": ".mid_block.attentions.0.to_q.",
        ".mid.attn_1.k.": ".mid_block.attentions.0.to_k.",
        ".mid.attn_1.v.": ".mid_block.attentions.0.to_v.",
        ".mid.attn_1.proj_out.": ".mid_block.attentions.0.to_out.0.",
    }
    for i in range(levels):
        table |= {
            f".down.{i}.block.": f".down_blocks.{i}.resnets.",
            f".down.{i}.downsample.": f".down_blocks.{i}.downsamplers.0.",
            f".up.{i}.block.": f".up_blocks.{levels - 1 - i}.resnets.",
            f".up.{i}.upsample.": f".up_blocks.{levels - 1 - i}.upsamplers.0.",
        }
    return table


def rename(tensors, levels):
    """The tensors of either layout under vae.py's names."""
    if "encoder.mid.attn_1.q.weight" not in tensors:                 # diffusers' layout
        return tensors
    renamed = {}
    for name, tensor in tensors.items():
        for theirs, ours in names(levels).items():
            name = name.replace(theirs, ours)
        if name in renamed:
            raise RuntimeError(f"two tensors for {name}")
        # Weights of the attention: c c 1 1 -> c c.
        renamed[name] = tensor.flatten(1) if ".attentions.0.to_" in name and tensor.ndim > 1 else tensor
    return renamed


FILES = ("model.safetensors", "diffusion_pytorch_model.safetensors", "ae.safetensors")


def locate_vae(place):
    """The folder of a VAE and its file of weights. `place` is a folder, a name on the Hub, or the file itself."""
    place = Path(place)
    if place.is_file():
        return place.parent, place
    for folder in ("", "vae/"):                                      # vae/ is where FLUX.2's repository keeps it
        if file := hub.find(place, *(folder + name for name in FILES)):
            return place / folder, file
    raise hub.not_found(place, f"no VAE in it: none of {', '.join(FILES)}, nor in its folder vae")


def load_vae(place):
    """The VAE with its adapters merged, if it has any, in eval mode. Its `fingerprint` names the file of weights:
    adapters do not change the encoder, so latents made with the base stay valid."""
    folder, file = locate_vae(place)
    if file.name == "model.safetensors":
        model = hub.load_model(RadVAE, VAEConfig, folder)
    else:
        config = VAEConfig(**read_config(hub.find(folder, "config.json")))
        model = hub.load_tensors(RadVAE(config), file, lambda tensors: rename(tensors, len(config.widths)))
    model.fingerprint = hub.fingerprint(file)
    if hub.find(folder, "lora.json"):
        lora.load(model, folder)
        lora.merge(model)
    return model


def copy_vae(place, out):
    """Copies the files of a VAE unchanged, so that its fingerprint stays the same."""
    folder, file = locate_vae(place)
    cli.copy_file(file, out / (file.name if file.name in FILES else "ae.safetensors"))
    for name in ("config.json", "lora.json", "lora.safetensors"):
        if extra := hub.find(folder, name):
            cli.copy_file(extra, out / name)
