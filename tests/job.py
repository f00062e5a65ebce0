"""Tiny trainings in processes of their own, one or several that know each other as torchrun's do. They are forked from
a process that has loaded torch already, which makes a process cheap enough to kill twenty of them."""
import json
import multiprocessing
import os
import socket
import sys
from pathlib import Path

import torch
import torch._dynamo  # AdamW does so at its first use: once here instead of in every process

import radit
import train
import vae
from autoencoder import latents
from autoencoder.load import load_vae
from common import cli
from encoders import raddino
from training import log, parallel

ROOT = Path(__file__).parent.parent
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["job"])


def radit_job(cfg, out, blocks=2, encoder=None, **layout):
    """RadiT on 48 images of noise, taught by an encoder as well if its folder is given; layout: compiled, recomputed,
    sharded = True."""
    config = radit.RadiTConfig(channels=1, grid=(16, 16), patch=4, width=64, depth=blocks, heads=2,
                               examples=[{"sex": "male"}])
    rng = torch.Generator().manual_seed(9)
    columns = [torch.randn(48, 1, 16, 16, generator=rng), torch.full((48, 1, 16, 16), -2.0),
               torch.rand(48, generator=rng) * 90,
               torch.randint(0, 2, (48, 18), generator=rng)]
    torch.manual_seed(cfg.seed)
    model = radit.RadiT(config)
    encoder = raddino.load_encoder(encoder) if encoder else None
    task = train.RadiTTask(config, [column[:8] for column in columns], None, encoder=encoder, perceptual_weight=0.1)
    chosen = {key: model.blocks for key, on in layout.items() if on}
    return train.train(task, model, torch.utils.data.TensorDataset(*columns), cfg, out, parallel.Layout(**chosen))


def vae_job(cfg, out):
    config = vae.VAEConfig(1, 2, (8, 16), 1, 4)
    images = torch.rand(48, 1, 32, 32, generator=torch.Generator().manual_seed(9)) * 2 - 1
    torch.manual_seed(cfg.seed)
    model = vae.RadVAE(config).to(memory_format=torch.channels_last)
    return train.train(train.VAETask(config, images[:8], 3e-4), model, Images(images), cfg, out)


class Images(torch.utils.data.Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i]


class Line(torch.nn.Linear):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(2, 2)
        self.config = radit.RadiTConfig()


class Seen:
    """A task that writes down which images it saw in which step, in RUN/seen.txt."""
    name, flops, about, save = "seen", 1, {}, staticmethod(lambda ema, folder: None)

    def __init__(self, out):
        self.file = out / "seen.txt"

    def loss(self, model, batch, rng):
        with open(self.file, "a") as file:
            file.write(json.dumps(batch[0].tolist()) + "\n")
        return model(batch[0][:, None] + rng.normal(2)).square().mean(), {}

    def measure(self, ema, micro):
        return {}


def seen_job(cfg, out):
    out.mkdir(exist_ok=True)
    return train.train(Seen(out), Line(), torch.utils.data.TensorDataset(torch.arange(10)), cfg, out)


def encode_job(folders, out, vae_folder):
    """The first argument stands where other jobs have their TrainConfig. Shards of two images."""
    latents.SHARD = 2
    latents.encode(folders, load_vae(vae_folder), out)


def command_job(arguments, out):
    """`python train.py ARGUMENTS --out OUT`, its size XS made tiny."""
    radit.SIZES["XS"] = (64, 2, 2)
    sys.argv = ["train.py", *map(str, arguments), "--out", str(out)]
    cli.run(train.main)


JOBS = {"encode": encode_job, "command": command_job, "radit": radit_job, "vae": vae_job, "seen": seen_job}


def in_process(rank, world, port, name, cfg, out, event=None, timeout=None, bf16=False, preview=False, workers=0,
               **layout):
    """What each process does. event: (rank, step, number): that process sends itself a signal after that many steps.
    Without `preview` none is made: it takes longer than all the steps. workers: processes that read images."""
    if world:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
                       "MASTER_PORT": str(port)}
        parallel.launched, parallel.rank, parallel.world = True, rank, world
    parallel.TIMEOUT = timeout or parallel.TIMEOUT
    parallel.loader_workers = lambda device: workers
    torch.set_num_threads(1)
    log.plot_losses = lambda history, path: None
    if not preview:
        train.RadiTTask.preview = train.VAETask.preview = lambda *arguments: None
    cli.fast_bf16 = lambda device: False                             # whatever the machine is faster in
    if bf16:
        parallel.pick_device = train.pick_device = lambda: (torch.device("cpu"), True)
    if event and event[0] == rank:
        steps, clip = [], parallel.clip
        def counted(*arguments):
            steps.append(1)
            if len(steps) == event[1]:
                os.kill(os.getpid(), event[2])
            return clip(*arguments)
        parallel.clip = counted
    JOBS[name](cfg, out, **layout)
    parallel.leave()


def start(world, name, cfg, out, **options):
    """The processes, running; world 0: one without torchrun's environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [context.Process(target=in_process, args=(rank, world, port, name, cfg, out), kwargs=options)
                 for rank in range(world or 1)]
    for process in processes:
        process.start()
    return processes


def run(*arguments, **options):
    """Their exit statuses."""
    processes = start(*arguments, **options)
    for process in processes:
        process.join(240)
        if process.exitcode is None:
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def log_of(run):
    """The lines of a run's log, without speed and memory."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in log.SPEED} for line in lines]
