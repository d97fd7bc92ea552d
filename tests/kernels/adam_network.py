"""A small network for Adam: channels-last weights, buffers, gradients of every size."""

import copy

import torch
from torch import nn

from fastgan_kernels import Average

BETAS = (0.5, 0.999)


def network(device, dtype=torch.float32):
    """Convolutions, whose weights are channels-last, and a batch norm with its buffers."""
    net = nn.Sequential(
        nn.Conv2d(3, 16, 4), nn.BatchNorm2d(16), nn.Conv2d(16, 70, 4), nn.Conv2d(70, 1, 4)
    )
    return net.to(device, dtype).to(memory_format=torch.channels_last)


def averaged(net, half_life=5.0, ramp=0.3):
    """An Average that begins as `net` is."""
    start = copy.deepcopy(net)
    buffers = [
        (a, b) for a, b in zip(net.buffers(), start.buffers(), strict=True) if a.is_floating_point()
    ]
    step = torch.zeros((), dtype=torch.float64, device=buffers[0][0].device)
    return Average(list(start.parameters()), buffers, step, half_life, ramp)


def gradients(net):
    """Of every order of magnitude, tensor by tensor."""
    return [torch.randn_like(p) * 10.0 ** torch.randint(-6, 2, ()).item() for p in net.parameters()]
