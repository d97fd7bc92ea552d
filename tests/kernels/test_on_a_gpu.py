"""What only a GPU can show: graphs, streams, and tensors of more than 2^31 elements."""

import pytest
import torch
from torch import nn

from fastgan_kernels import Adam, Average, BatchNormAct2d, _launch, bn_act, gather_u8

pytestmark = pytest.mark.gpu


class Walk:
    """Gather, two layers forward and backward, Adam with its copies: all operators, on static
    buffers.
    """

    def __init__(self, dtype):
        torch.manual_seed(0)
        cuda = torch.device("cuda:0")
        self.images = torch.randint(0, 256, (50, 32, 32, 3), dtype=torch.uint8, device=cuda)
        self.index = torch.zeros(16, dtype=torch.int64, device=cuda)
        self.flip = torch.zeros(16, dtype=torch.bool, device=cuda)
        self.dtype = dtype
        self.first = BatchNormAct2d(3, act="none", impl="triton").to(cuda)
        self.second = BatchNormAct2d(64, act="leaky_relu", impl="triton").to(cuda)
        self.conv = nn.Conv2d(3, 64, 4, 2, 1, bias=False).to(
            cuda, memory_format=torch.channels_last
        )
        self.nets = nn.ModuleList([self.first, self.conv, self.second])
        params = list(self.nets.parameters())
        count = torch.zeros((), dtype=torch.float64, device=cuda)
        average = Average([p.detach().clone() for p in params], [], count, 10.0, 1.0)
        self.low = [torch.zeros_like(p, dtype=torch.bfloat16) for p in params]
        self.adam = Adam(params, 1e-2, low=self.low, average=average, impl="triton")
        self.average = average

    def draw(self, seed):
        random = torch.Generator().manual_seed(seed)
        self.index.copy_(torch.randint(0, 50, (16,), generator=random))
        self.flip.copy_(torch.rand(16, generator=random) < 0.5)

    def __call__(self):
        x = gather_u8(self.images, self.index, self.flip, dtype=self.dtype, impl="triton")
        y = self.second(self.conv(self.first(x, 2).float()).to(self.dtype), 2)
        self.adam.zero_grad(set_to_none=True)
        y.float().square().mean().backward()
        self.adam.step()

    def state(self):
        everything = [*self.nets.state_dict().values(), *self.low, *self.average.params]
        return [*everything, self.average.step, *(s["step"] for s in self.adam.state.values())]


@pytest.fixture(autouse=True)
def pinned_algorithms(monkeypatch):
    """cuDNN's choices the same in and out of a graph."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("counters_first", [True, False])
def test_a_graph_gives_the_bits_of_the_plain_calls(dtype, counters_first, monkeypatch):
    plain, graphed = Walk(dtype), Walk(dtype)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for walk in (plain, graphed):  # both: the warm-up trains
            walk.draw(0)
            walk(), walk()
    torch.cuda.current_stream().wait_stream(side)
    if not counters_first:  # a capture that finds none takes memory of the graph
        monkeypatch.setattr(_launch, "_COUNTERS", {})
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        graphed()
    for seed in range(1, 6):
        for walk in (plain, graphed):
            walk.draw(seed)
        plain()
        graph.replay()
        for ours, theirs in zip(graphed.state(), plain.state(), strict=True):
            assert torch.equal(ours, theirs)
    assert float(plain.average.step) == 7


def test_nothing_waits_for_the_gpu():
    walk = Walk(torch.bfloat16)
    walk.draw(0)
    walk()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            walk()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_streams_side_by_side_do_not_meet():
    cuda = torch.device("cuda:0")
    x = torch.randn(64, 256, 16, 16, device=cuda).contiguous(memory_format=torch.channels_last)

    def layer(count):
        norm = BatchNormAct2d(256, impl="triton").to(cuda)
        return [norm(x, 2) for _ in range(count)][-1], norm.running_var

    expected = layer(20)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    results = []
    for stream in streams:
        with torch.cuda.stream(stream):
            results.append(layer(20))
    torch.cuda.synchronize()
    for result in results:
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


@pytest.mark.slow
def test_more_than_2_to_the_31_elements():
    cuda = torch.device("cuda:0")
    if torch.cuda.mem_get_info()[0] < 40e9:
        pytest.skip("needs 40 GB of free GPU memory")
    shape = (2060, 64, 128, 128)  # 2.16e9 elements
    x = torch.empty(shape, dtype=torch.bfloat16, device=cuda, memory_format=torch.channels_last)
    x.normal_().requires_grad_()
    weight, bias = torch.ones(64, device=cuda), torch.zeros(64, device=cuda)
    mean, var = torch.zeros(64, device=cuda), torch.ones(64, device=cuda)
    y = bn_act(x, weight, bias, mean, var, training=True, momentum=1.0, act="none", impl="triton")
    last = slice(-8, None)
    of_last = x.detach()[last].float()
    assert float(mean.abs().max()) < 1e-3 and float((var - 1).abs().max()) < 1e-3
    expected = (of_last - mean[:, None, None]) * torch.rsqrt(var + 1e-5)[:, None, None]
    torch.testing.assert_close(y.detach()[last].float(), expected, rtol=1e-2, atol=1e-3)
    y.backward(torch.ones_like(y))  # a constant: nothing of it passes the mean
    assert float(x.grad[last].float().abs().max()) < 1e-3


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_second_gpu():
    x = torch.randn(8, 32, 4, 4, device="cuda:1")
    norm, plain = (BatchNormAct2d(32, impl=i).to("cuda:1") for i in ("triton", "torch"))
    torch.testing.assert_close(norm(x), plain(x), rtol=1e-5, atol=1e-5)
