"""Several processes, one training: each of torchrun's processes takes its part of every batch, on a GPU of its own.

    DDP      every process holds the whole model; gradients are averaged
    FSDP2    weights, AdamW's moments and EMA are split among the processes, in float32; each block is gathered when it
             is needed, in bfloat16, and its gradients are reduced in float32

Without torchrun there is one process and no group, and every function here does what that one process needs, or
nothing. All communication uses torch.distributed: NCCL between GPUs; gloo between CPUs, also for the few numbers that
must not wait for a GPU.

There are two groups. The default group is for setting up (one node may need minutes longer to read its index) and for
checkpoints, which are written in the background; it waits up to 30 minutes. In the group `training` a process that
waits for others longer than TIMEOUT gives up, so that a process that hangs ends the job; around the first step, which
compiles, and around saves the limit is LONG_TIMEOUT. If a process dies, torchrun ends the others at once.
Sources: Li et al. 2020 (DDP), Zhao et al. 2023 (FSDP).
"""
import contextlib
import copy
import functools
import gc
import os
import signal
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch._functorch.config
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils.checkpoint import checkpoint as recompute
from torch.utils.data import DataLoader

from common.cli import InputError, pick_device
from common.cli import locked as locked_folder
from training import float8

TIMEOUT, LONG_TIMEOUT = timedelta(seconds=120), timedelta(seconds=600)
warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")  # torch 2.11 knows no other name
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # what schedulers send before they take a node away
launched = "RANK" in os.environ  # by torchrun or srun, which give each process its rank
rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
training = None  # the group; None without torchrun
BUDGET = 0.25  # share of a compiled block's activations that is kept where others are computed again


def join():
    """Waits for torchrun's other processes, and makes the two groups."""
    global training
    if launched and training is None:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=30))
        training = dist.new_group(timeout=LONG_TIMEOUT)


def leave():
    global training
    if training:
        dist.destroy_process_group()
        training = None


def set_timeout(limit):
    """Sets how long a process waits for the others from now on, after all have finished their current work."""
    if training:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        anyone(False)
        _set_pg_timeout(limit, training)


@contextlib.contextmanager
def long_timeout():
    """For work that one process does while the others wait: writing weights and previews."""
    set_timeout(LONG_TIMEOUT)
    yield
    set_timeout(TIMEOUT)


def agreed(value, group=None):
    """The first process's value, in all processes. Once the training has begun, `group` must be `training`: a
    checkpoint may be using the default group at the same time, from another thread."""
    values = [value]
    if training:
        dist.broadcast_object_list(values, src=0, group=group)
    return values[0]


def on_first(make):
    """Calls make() in the first process and returns its result in all, so that files are read and checked once. An
    InputError is raised in all processes."""
    value, error = None, None
    if rank == 0:
        try:
            value = make()
        except InputError as raised:
            error = raised
    value, error = agreed((value, error))
    if error:
        raise error
    return value


@contextlib.contextmanager
def locked(folder):
    """Locks `folder` for all processes of this training: a second training in it is refused."""
    with contextlib.ExitStack() as stack:
        on_first(lambda: stack.enter_context(locked_folder(folder)))
        yield


def read(dataset, batches, device):
    """Yields the `batches`, lists of indices, of a data set: read ahead by other processes beside a GPU. close() must
    be called in the end: these processes ignore all other signals."""
    workers = loader_workers(device)
    if workers:
        gc.freeze()                                                  # so that garbage collection copies nothing
    yield from DataLoader(dataset, batch_sampler=batches, num_workers=workers, pin_memory=bool(workers),
                          worker_init_fn=ignore_signals)


def loader_workers(device):
    """How many processes read images or latents: beside a GPU its share of the machine's cores, at most 8; none on a
    CPU, whose cores compute."""
    shared_by = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, min(8, os.cpu_count() // shared_by)) if device.type == "cuda" else 0


def micro_batch(batch, accumulate):
    """How many images of a step's `batch` a process computes at a time."""
    parts = world * accumulate
    if batch % parts:
        raise InputError(f"--batch {batch} cannot be shared by {world} processes, --accumulate {accumulate}: "
                         f"it must be a multiple of {parts}")
    return batch // parts


def anyone(asked):
    """Whether `asked` is true in any process. Communicates between CPUs, so that no GPU is waited for."""
    answer = torch.tensor(int(asked))
    if training:
        dist.all_reduce(answer, dist.ReduceOp.MAX, group=training)
    return bool(answer)


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


def to_device(batch, device):
    """A batch, a tensor or a list of them, on the device."""
    if isinstance(batch, list):
        return [tensor.to(device, non_blocking=True) for tensor in batch]
    return batch.to(device, non_blocking=True)


def replicate(model):
    """The model to call in training: its gradients are averaged over the processes."""
    if not training:
        return model
    # This optimisation would split compiled blocks. It is not needed: the averaging overlaps with other blocks anyway.
    torch._dynamo.config.optimize_ddp = False
    # Buffers are the same everywhere: running statistics are computed from the whole batch in every process.
    return DistributedDataParallel(model, process_group=training, gradient_as_bucket_view=True, broadcast_buffers=False)


def last_only(model, last):
    """A context in which DDP averages gradients only for the `last` part of a step. FSDP reduces them for every part,
    since whole gradients would not fit into memory."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not last else contextlib.nullcontext()


def shard(model, blocks, bf16):
    """Splits the model's tensors, in place. Blocks compute in bfloat16 if `bf16`; the rest, small, keeps float32
    weights as it does under autocast, so that time and age reach their embeddings in full."""
    mesh = DeviceMesh.from_group(training, pick_device()[0].type)
    low = MixedPrecisionPolicy(torch.bfloat16 if bf16 else None, torch.float32, cast_forward_inputs=False)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=low)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def local(tensor):
    """This process's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor):
    """The whole of a tensor; all processes must call it."""
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
    """A list to which the signals SIGTERM and SIGUSR1 are appended when they arrive. When the block ends with
    SystemExit, they are ignored until the process has ended: schedulers repeat them, and a process killed by one would
    not leave with its own exit status."""
    asked = []
    before = {number: signal.signal(number, lambda number, frame: asked.append(number)) for number in SIGNALS}
    try:
        yield asked
    except SystemExit:
        ignore(SIGNALS)
        raise
    finally:
        if signal.getsignal(signal.SIGTERM) != signal.SIG_IGN:
            for number, handler in before.items():
                signal.signal(number, handler)


def ignore(signals):
    for number in signals:
        signal.signal(number, signal.SIG_IGN)


def ignore_signals(worker):
    """For a data loader's worker, which must end with its parent and not before: signals reach every process."""
    ignore((*SIGNALS, signal.SIGINT))


def clip(parameters, largest):
    """Scales the gradients, split or not, to a norm of at most `largest`; returns the norm before."""
    norm = full(get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True))
    clip_grads_with_norm_(parameters, largest, norm, foreach=True)
    return norm


@dataclass
class Layout:
    """How a model is trained: which of its blocks are treated in which way, none if not said."""
    compiled: Sequence = ()       # by torch.compile
    recomputed: Sequence = ()     # activations are computed again in the backward pass instead of kept
    sharded: Sequence = ()        # split by FSDP; if there are none, every process holds the whole model
    float8: Sequence = ()         # matrix products in float8, see training/float8.py


def set_up(model, averages, bf16, layout):
    """The model to call, `averages` copies of it that will be averages of its weights, and an empty copy to be filled
    when weights are saved (None without FSDP). Blocks are compiled and recomputed in place, by replacing their
    `forward`: so no tensor's name changes, and FSDP's hooks are not compiled."""
    blocks = set(layout.sharded)
    places = [name for name, module in model.named_modules() if module in blocks]
    plain = copy.deepcopy(model).to("meta") if layout.sharded else None
    model.to(pick_device()[0])
    emas = [copy.deepcopy(model).eval().requires_grad_(False) for _ in range(averages)]
    for block in layout.float8:
        float8.convert(block)
    # A compiled block is not computed again as a whole: torch chooses what is cheap to compute again, until what is
    # kept is within the budget, as a share of what it would keep by default.
    torch._functorch.config.activation_memory_budget = BUDGET if layout.recomputed else 1.0
    for block in layout.compiled:
        block.forward = torch.compile(block.forward, fullgraph=True)
    if not layout.compiled:
        for block in layout.recomputed:  # nothing in a block is random, so no state of a generator has to be kept
            block.forward = functools.partial(recompute, block.forward, use_reentrant=False, preserve_rng_state=False)
    if not layout.sharded:
        return replicate(model), emas, None
    shard(model, layout.sharded, bf16)
    for ema in emas:
        shard(ema, [ema.get_submodule(place) for place in places], bf16=False)
    return model, emas, plain


def whole(model, plain):
    """The model with whole tensors: itself, or `plain` filled from its parts, on the first process."""
    if plain is None:
        return model
    put_together(model, plain)
    return plain
