"""The fewest milliseconds that one step can take on a card, from its two ceilings.

Counted is the work that a step needs, in 16 bits: D forward on real, fake and fake again, its
weight gradients and the input gradients between its layers on real and fake, its input gradients
down to the image on the fake, G forward and both its gradients.
Bytes: operands of each convolution once, batch norms with two passes forward and two backward (16
bytes an element), the first LeakyReLU, tanh, and Adam with its copies. What stays in a cache makes
a step faster than its bytes allow, so the floor is one of DRAM.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastgan.config import split_size
from fastgan.models.dcgan import channels

BN_BYTES = 16  # an element of a batch norm's input, forward and backward
ADAM_BYTES = 28  # a parameter: p, m, v read and written, g read, the copy written (16 bits)


@dataclass(frozen=True)
class Layer:
    """A convolution between a small and a large map, whichever way it goes."""

    cin: int
    cout: int
    small: int  # edge
    large: int
    kernel: int

    @property
    def macs(self) -> int:
        return self.small**2 * self.cin * self.cout * self.kernel**2

    @property
    def weights(self) -> int:
        return self.cin * self.cout * self.kernel**2

    def inputs(self, down: bool) -> int:
        return self.cin * (self.large if down else self.small) ** 2

    def outputs(self, down: bool) -> int:
        return self.cout * (self.small if down else self.large) ** 2


def layers(size: int, latent: int, width: int) -> tuple[list[Layer], list[Layer]]:
    """D's and G's, in the order of their forward passes."""
    base, _ = split_size(size)
    inner = channels(size, width)
    d, edge = [], size
    for cin, cout in zip([3, *inner[::-1]], inner[::-1], strict=False):
        d.append(Layer(cin, cout, edge // 2, edge, 4))
        edge //= 2
    d.append(Layer(inner[0], 1, 1, base, base))
    g = [Layer(latent, inner[0], 1, base, base)]
    for cin, cout in zip(inner, [*inner[1:], 3], strict=True):
        g.append(Layer(cin, cout, edge, 2 * edge, 4))
        edge *= 2
    return d, g


def flops(size: int = 64, latent: int = 100, width: int = 64) -> int:
    """Floating-point operations an image that a step needs."""
    d, g = layers(size, latent, width)
    in_d, in_g = sum(x.macs for x in d), sum(x.macs for x in g)
    forward = 3 * in_d + in_g
    backward = 2 * in_d + 2 * (in_d - d[0].macs) + in_d + in_g + (in_g - g[0].macs)
    return 2 * (forward + backward)


def step_bytes(batch: int, size: int = 64, latent: int = 100, width: int = 64) -> int:
    """Bytes that a step of `batch` images moves; see the top of this file."""
    d, g = layers(size, latent, width)
    in_d = [x.inputs(True) + x.outputs(True) for x in d]
    in_g = [x.inputs(False) + x.outputs(False) for x in g]
    # forward, weight gradients, input gradients
    convs = 3 * sum(in_d) + 2 * sum(in_d) + 2 * sum(in_d[1:]) + sum(in_d)
    convs += 2 * sum(in_g) + sum(in_g[1:])
    norms = BN_BYTES * (
        3 * sum(x.outputs(True) for x in d[1:-1]) + sum(x.outputs(False) for x in g[:-1])
    )
    first, tanh = 2 * d[0].outputs(True) * (2 * 3 + 3 * 3), 2 * g[-1].outputs(False) * (2 + 3)
    count_d, count_g = parameters(d, d[1:-1]), parameters(g, g[:-1])
    # 6 passes of D's and 2 of G's weights, gradients of both in D's update and of G's
    weights = 2 * (6 * count_d + 2 * count_g) + 2 * (2 * count_d + count_g)
    return batch * (2 * convs + norms + first + tanh) + weights + ADAM_BYTES * (count_d + count_g)


def parameters(convs: list[Layer], normed: list[Layer]) -> int:
    return sum(x.weights for x in convs) + 2 * sum(x.cout for x in normed)


def floor_ms(
    batch: int, tflops: float, gbps: float, size: int = 64, latent: int = 100, width: int = 64
) -> float:
    """The larger of the two floors."""
    by_flops = batch * flops(size, latent, width) / tflops / 1e9
    return max(by_flops, step_bytes(batch, size, latent, width) / gbps / 1e6)
