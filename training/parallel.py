"""Several processes, one training: each of torchrun's processes takes its part of every batch, on a GPU of its own.

    DDP      every process holds the whole model; gradients are averaged
    FSDP2    weights, moments and EMA are split among the processes, in float32; a block is put together when it is needed,
             in bfloat16, and its gradients are reduced in float32

Without torchrun there is one process, no group, and every function here says so or does nothing. Everything goes through
torch.distributed: NCCL between GPUs, gloo between CPUs and for the few words that are said without waiting for a device.

Two groups. The default one, patient, is for setting up (one node may need minutes longer to read its index) and for
checkpoints, which are written beside the training. `training` is impatient: whoever waits in it for TIMEOUT gives up, so
that a process that hangs ends the job. One that dies ends it at once, by torchrun.
Sources: Li et al. 2020 (DDP), Zhao et al. 2023 (FSDP).
"""
import contextlib
import copy
import functools
import os
import signal
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils.checkpoint import checkpoint as recompute

from common.cli import pick_device

TIMEOUT = timedelta(seconds=50)
launched = "RANK" in os.environ  # by torchrun, which says who is who
rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
training = None  # the group; None without torchrun


def join():
    """Waits for torchrun's other processes."""
    global training
    if launched and training is None:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=30))
        training = dist.new_group(timeout=TIMEOUT)


def leave():
    global training
    if training:
        dist.destroy_process_group()
        training = None


def agreed(value):
    """What the first process says, in all of them."""
    values = [value]
    if training:
        dist.broadcast_object_list(values, src=0)
    return values[0]


def anyone(asked):
    """Whether any process says yes. The CPUs speak; no device is waited for."""
    vote = torch.tensor(int(asked))
    if training:
        dist.all_reduce(vote, dist.ReduceOp.MAX, group=training)
    return bool(vote)


def summed(x):
    """The sum of x over the processes."""
    x = x.clone()
    if training:
        dist.all_reduce(x, group=training)
    return x


def gathered(x):                                                     # n ...
    """x of every process, one after another: (world * n, ...)."""
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world)]
    if not training:
        return x
    dist.all_gather(parts, x.contiguous(), group=training)
    return torch.cat(parts)


def replicate(model):
    """The model to call in training: its gradients are averaged over the processes."""
    if not training:
        return model
    torch._dynamo.config.optimize_ddp = False  # it would cut compiled blocks apart, which overlap with the averaging as they are
    return DistributedDataParallel(model, process_group=training, gradient_as_bucket_view=True)


def last_only(model, last):
    """A context in which DDP keeps its gradients to itself, unless these are the last of a step. FSDP always reduces: whole
    gradients are what it has no room for."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not last else contextlib.nullcontext()


def shard(model, blocks, bf16):
    """Splits the model's tensors, in place. Blocks compute in bfloat16 if `bf16`; the rest, small, keeps float32 weights as
    it does under autocast, so that time and age reach their embeddings in full."""
    mesh = DeviceMesh.from_group(training, pick_device()[0].type)
    low = MixedPrecisionPolicy(torch.bfloat16 if bf16 else None, torch.float32, cast_forward_inputs=False)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=low)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def local(tensor):
    """This process's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor):
    """The whole of a tensor; every process has to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def put_together(model, plain):
    """Fills `plain`, an unsharded copy of the model, on the first process's CPU, tensor by tensor."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        tensor = full(tensor)
        if rank == 0:
            tensors[name] = tensor.cpu()
    if rank == 0:
        plain.load_state_dict(tensors, assign=True)


@contextlib.contextmanager
def catch_signals():
    """A list that SIGTERM and SIGUSR1 append to."""
    asked = []
    before = {number: signal.signal(number, lambda number, frame: asked.append(number)) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_signals(worker):
    """A data loader's worker leaves with its parent, not before: schedulers send their signals to every process."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def clip(parameters, largest):
    """Scales the gradients, wherever their parts lie, to a norm of at most `largest`; returns the norm before."""
    norm = full(get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True))
    clip_grads_with_norm_(parameters, largest, norm, foreach=True)
    return norm


def set_up(model, bf16, compiled, checkpointed, sharded):
    """The model to call, the EMA, and an empty copy of it to be filled when weights are saved. The blocks named change in
    place, in their `forward` only, so that no name changes and FSDP's hooks stay outside of what is compiled."""
    blocks = set(sharded)
    places = [name for name, module in model.named_modules() if module in blocks]
    plain = copy.deepcopy(model).to("meta") if sharded else None
    model.to(pick_device()[0])
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    for block in compiled:
        block.forward = torch.compile(block.forward, fullgraph=True)
    for block in checkpointed:  # nothing in a block is random, so no state of a generator has to be kept
        block.forward = functools.partial(recompute, block.forward, use_reentrant=False, preserve_rng_state=False)
    if not sharded:
        return replicate(model), ema, ema
    shard(model, sharded, bf16)
    shard(ema, [ema.get_submodule(place) for place in places], bf16=False)
    return model, ema, plain
