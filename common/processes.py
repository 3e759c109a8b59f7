"""Several processes under torchrun: which one this is, how they meet, share gradients and part.

It knows neither flags nor runs nor files.
"""
import datetime
import os

import torch
import torch.distributed as dist


def rank():
    """This process's number among torchrun's; 0 without torchrun."""
    return int(os.environ.get("RANK", 0))


def world():
    """How many processes torchrun started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


def join(device):
    """Meet the other processes of torchrun, each on its torch.device; without torchrun nothing."""
    if world() == 1:
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    # rank 0 may have much to fetch before the others go on
    dist.init_process_group(backend, timeout=datetime.timedelta(hours=12))


def leave():
    """Part from the other processes when training is over; what follows is rank 0's alone."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def barrier():
    """Wait until all processes have come here; without torchrun nothing."""
    if dist.is_initialized():
        dist.barrier()


def summed(counts):
    """The processes' tensors of whole numbers, added up; without torchrun the tensor itself."""
    if world() > 1:
        dist.all_reduce(counts)
    return counts


def average_gradients(net):
    """Turn each process's gradients of the module into their mean, by one all-reduce.

    It follows backward, so that any kind of backward will do. Parameters without a gradient are
    left out: the same ones in every process.
    """
    if world() == 1:
        return
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    flat = torch.cat([g.reshape(-1) for g in gradients])
    dist.all_reduce(flat)
    means = (flat / world()).split([g.numel() for g in gradients])
    for g, mean in zip(gradients, means):
        g.copy_(mean.view_as(g))
