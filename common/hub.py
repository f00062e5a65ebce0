"""A model is a folder: config.json (its dataclass) beside model.safetensors (its tensors). Nothing is unpickled.

Loading is strict: an unknown key in the config or a missing one, a missing, extra or misshapen tensor, a number that is
not finite or a truncated file is an InputError of one line, never a partly loaded model. Only keys whose default is
empty may be missing, since older weights lack them. Weights are stored in bfloat16 and run in float32.

Wherever a folder is read, a repository on the Hugging Face Hub can be named instead: ORG/NAME or ORG/NAME@REVISION (a
branch, a tag or a commit), and ORG/NAME/FOLDER for a folder of it. Its files are downloaded once, and an interrupted
download is continued. From then on they come from huggingface_hub's cache, without a network. With HF_HUB_OFFLINE=1
nothing is downloaded.
"""
import dataclasses
import hashlib
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import safetensors
import safetensors.torch
import torch

from common.cli import InputError, json_text, read_json, whole_file


def find(place, *names):
    """The local path of the first of `names` that the folder `place` holds, here or on the Hub; None if it holds
    none."""
    place = Path(place)
    for name in names:
        if (place / name).is_file():
            return place / name
    repository, revision = repository_of(place)
    if not repository:
        return None
    at = {"revision": revision}
    for name in names:
        file = "/".join([*place.parts[2:], name])
        try:
            # A path, None, or an object that says that the repository is known not to hold the file.
            cached = huggingface_hub.try_to_load_from_cache(repository, file, **at)
            if isinstance(cached, str):
                return Path(cached)
            if cached is None:
                # Without a network this fails at once; a download would try many times.
                huggingface_hub.file_exists(repository, file, **at)
                return Path(huggingface_hub.hf_hub_download(repository, file, **at))
        except huggingface_hub.errors.RemoteEntryNotFoundError:
            pass  # on to the next name
        except Exception as error:  # what its HTTP library raises differs between versions
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"{place}: no such folder here, and not available from the Hugging Face Hub: "
                             f"{reason[:200]}") from None
    return None


def repository_of(place):
    """ORG/NAME and the revision, or None, of a place on the Hub; (None, None) for a local path.

    A name on the Hub has two parts. A path whose first folder exists here is a mistyped local path, and so is one of
    more parts, unless the first two name a repository that was downloaded before: the Hub is not asked for these.
    """
    parts = Path(place).parts
    if len(parts) < 2 or Path(parts[0]).exists():
        return None, None
    repository, _, revision = "/".join(parts[:2]).partition("@")
    if len(parts) > 2 and not in_cache(repository):
        return None, None
    return repository, revision or None


def in_cache(repository):
    """Whether huggingface_hub's cache holds files of ORG/NAME."""
    return (Path(huggingface_hub.constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}").is_dir()


def not_found(place, text):
    """The InputError for a place in which `find` did not find what is needed: that there is no such folder, or `text`,
    which says what is missing."""
    if not Path(place).exists() and repository_of(place) == (None, None):
        return InputError(f"{place}: no such folder here")
    return InputError(f"{place}: {text}")


def save_model(model, folder, dtype=torch.bfloat16):
    """Writes model.config and the model's tensors into `folder`."""
    save_parts(model.state_dict(), dataclasses.asdict(model.config), folder, dtype)


def save_parts(tensors, config, folder, dtype=torch.bfloat16):
    """Writes tensors and a configuration as a model's folder. Both are on the disk before either gets its name, so that
    a kill or a full disk leaves no new weights beside an old configuration."""
    with whole_file(Path(folder) / "config.json") as temporary:
        temporary.write_text(json_text(config), encoding="utf-8")
        save_tensors(tensors, Path(folder) / "model.safetensors", dtype)


def save_tensors(tensors, path, dtype=torch.bfloat16):
    """Writes floating-point tensors as `dtype`; integers keep their type."""
    tensors = {name: tensor.detach().to(dtype if tensor.is_floating_point() else tensor.dtype).contiguous()
               for name, tensor in tensors.items()}
    with whole_file(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode                              # the permissions of new files, by the umask
        safetensors.torch.save_file(tensors, temporary)              # the file it makes is readable by its owner only
        temporary.chmod(mode)


def load_model(build, config_class, folder):
    """The model build(config) with the weights in `folder`, in float32, in eval mode."""
    config_file, weights = find(folder, "config.json"), find(folder, "model.safetensors")
    for name, file in (("config.json", config_file), ("model.safetensors", weights)):
        if not file:
            models = [str(path.parent) for path in sorted(Path(folder).glob("*/config.json"))]
            hint = f"; models in it: {', '.join(models)}" if models else ""
            raise not_found(folder, f"no {name}; a model is a folder with config.json and model.safetensors{hint}")
    values = read_json(config_file)
    known = {field.name for field in dataclasses.fields(config_class)}
    if wrong := (set(values) - known) | (known - set(values) - keys_that_may_be_missing(config_class)):
        raise InputError(f"{config_file}: keys {sorted(wrong)} are unknown or missing; the keys are {sorted(known)}")
    try:
        config = config_class(**values)
        with torch.device("meta"):                                   # shapes only: no memory until the file is checked
            expected = {name: list(tensor.shape) for name, tensor in build(config).state_dict().items()}
    except Exception as error:  # layers raise many kinds of errors, for a width of 0 or a list for a number
        raise InputError(f"{config_file}: {' '.join(str(error).split())[:300]}") from None
    try:
        with safetensors.safe_open(weights, "pt") as file:
            found = {name: file.get_slice(name).get_shape() for name in file.keys()}
    except (safetensors.SafetensorError, OSError) as error:
        raise InputError(f"{weights}: truncated or no safetensors file: {' '.join(str(error).split())[:300]}") from None
    if differing := [name for name in sorted({**expected, **found}) if expected.get(name) != found.get(name)]:
        name = differing[0]
        raise InputError(f"{weights}: not of this architecture: {name} has shape {found.get(name, 'none')}, "
                         f"{config_file.name} says {expected.get(name, 'none')}")
    return load_tensors(build(config), weights)


def keys_that_may_be_missing(config_class):
    """The fields whose default is empty: None, or nothing in a list, tuple or dict."""
    defaults = {field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
                for field in dataclasses.fields(config_class)}
    return {name for name, default in defaults.items() if default is None or default in ([], (), {})}


def load_tensors(model, file, rename=lambda tensors: tensors):
    """Fills the model from a file, strictly, in eval mode."""
    try:
        tensors = safetensors.torch.load_file(file)
        if damaged := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
            raise InputError(f"{file}: {damaged[0]} holds numbers that are not finite")
        tensors, own = rename(tensors), model.state_dict()
        for name in tensors.keys() & own.keys():                     # loading would cast integers and complex numbers
            if tensors[name].is_floating_point() != own[name].is_floating_point():
                raise InputError(f"{file}: {name} holds {tensors[name].dtype}, where {own[name].dtype} is expected")
        model.load_state_dict(tensors)
    except (safetensors.SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{file}: truncated or not of this architecture: {reason[:300]}") from None
    return model.eval().requires_grad_(False)


def fingerprint(place):
    """Sixteen hex digits that name the weights in a file, or in a model's folder with its adapters, if it has any."""
    digest, files = hashlib.sha256(), [place]
    if not Path(place).is_file():
        files = [find(place, "model.safetensors"), find(place, "lora.safetensors")]
    for file in filter(None, files):
        with open(file, "rb") as content:
            while part := content.read(2 ** 20):
                digest.update(part)
    return digest.hexdigest()[:16]
