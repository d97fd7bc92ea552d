"""What only a GPU can show: graphs, streams, and tensors of more than 2^31 elements."""

import pytest
import torch
from torch import nn

from fastgan_kernels import (
    Adam,
    Average,
    BatchNormAct2d,
    _launch,
    bn_act,
    gather_u8,
    guard,
    tally,
)

pytestmark = pytest.mark.gpu


class Walk:
    """Gather, two layers forward and backward, the watch, Adam with its copies, statistics: all
    operators, on static buffers. `adam`: the implementation of what follows the passes.
    """

    def __init__(self, dtype, adam="triton"):
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
        buffers = [(t, t.clone()) for t in self.nets.buffers() if t.is_floating_point()]
        average = Average([p.detach().clone() for p in params], buffers, count, 10.0, 1.0)
        self.low = [torch.zeros_like(p, dtype=torch.bfloat16) for p in params]
        self.adam = Adam(params, 1e-2, low=self.low, average=average, impl=adam)
        self.average = average
        self.impl = adam
        self.frozen = torch.zeros((), dtype=torch.int64, device=cuda)
        self.watch = {
            "flags": torch.zeros(len(params), dtype=torch.int32, device=cuda),
            "bad": torch.zeros((), dtype=torch.bool, device=cuda),
            "frozen": self.frozen,
            "lost": torch.zeros((), device=cuda),
            "found": torch.zeros((), device=cuda),
        }
        sums = torch.zeros(3, dtype=torch.float64, device=cuda)
        self.stats = (sums, sums.repeat(4, 1), torch.zeros_like(self.frozen))

    def draw(self, seed):
        random = torch.Generator().manual_seed(seed)
        self.index.copy_(torch.randint(0, 50, (16,), generator=random))
        self.flip.copy_(torch.rand(16, generator=random) < 0.5)

    def __call__(self):
        x = gather_u8(self.images, self.index, self.flip, dtype=self.dtype, impl="triton")
        y = self.second(self.conv(self.first(x, 2).float()).to(self.dtype), 2)
        self.adam.zero_grad(set_to_none=True)
        loss = y.float().square().mean()
        loss.backward()
        grads = [p.grad for p in self.nets.parameters()]
        guard(grads, loss.detach(), **self.watch, last=True, impl=self.impl)
        self.adam.step()
        mean = y.detach().float().mean()
        tally([loss.detach(), mean], self.frozen, *self.stats, impl=self.impl)

    def state(self):
        return [*self.nets.buffers(), *self.held(), *self.watch.values(), *self.stats]

    def held(self):
        """What a step with found_inf leaves alone."""
        means = [*self.average.params, *(mean for _, mean in self.average.buffers)]
        moments = [t for s in self.adam.state.values() for t in s.values()]
        return [*self.nets.parameters(), *self.low, *means, self.average.step, *moments]


def captured(walk):
    """`walk` as a graph, after a warm-up on a stream beside (which trains)."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        walk.draw(0)
        walk(), walk()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        walk()
    return graph


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("adam", ["triton", "torch"])
def test_a_graph_gives_the_bits_of_the_plain_calls(dtype, scaled, adam):
    plain, graphed = Walk(dtype, adam), Walk(dtype, adam)
    for walk in (plain, graphed):
        if scaled:
            walk.adam.grad_scale = torch.full((), 4.0, device="cuda")
            walk.adam.found_inf = torch.zeros((), device="cuda")
    graph = captured(graphed)
    plain.draw(0)
    plain(), plain()
    for seed in range(1, 6):
        for walk in (plain, graphed):
            walk.draw(seed)
            walk.adam.param_groups[0]["lr"].fill_(1e-2 / seed)
            if scaled:  # NaN in every gradient, once
                walk.adam.found_inf.fill_(float(seed == 3))
                walk.adam.grad_scale.fill_(float("nan") if seed == 3 else 4.0)
        before = [t.clone() for t in graphed.held()]
        plain()
        graph.replay()
        if scaled and seed == 3:
            assert all(torch.equal(t, was) for t, was in zip(graphed.held(), before, strict=True))
        for ours, theirs in zip(graphed.state(), plain.state(), strict=True):
            assert torch.equal(ours, theirs)
    assert float(plain.average.step) == 7 - scaled
    step = next(iter(plain.adam.state.values()))["step"]
    assert float(step) == 7 - scaled


@pytest.mark.parametrize("adam", ["triton", "torch"])
def test_a_graph_freezes_as_the_plain_calls_do(adam):
    plain, graphed = Walk(torch.bfloat16, adam), Walk(torch.bfloat16, adam)
    for walk in (plain, graphed):
        walk.adam.found_inf = walk.watch["found"]
    graph = captured(graphed)
    plain.draw(0)
    plain(), plain()
    for seed in range(1, 6):
        for walk in (plain, graphed):
            walk.draw(seed)
            if seed == 3:
                walk.nets[1].weight.data[5, 1, 2, 3] = torch.nan
        before = [t.clone() for t in graphed.held()]
        plain()
        graph.replay()
        pairs = list(zip(graphed.state(), plain.state(), strict=True))
        pairs += zip(graphed.held(), before, strict=True) if seed >= 3 else ()
        for ours, theirs in pairs:
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    assert int(plain.frozen) == 3 and float(plain.watch["found"]) == 1
    assert plain.watch["flags"][2] == 1  # of the weight itself
    sums, recent, count = plain.stats
    assert sums[2] == 4 and sums.isfinite().all() and int(count) == 5
    assert recent[0, 0].isnan() and recent[1:].isfinite().all()


def test_a_capture_that_finds_no_counters_takes_its_own(monkeypatch):
    plain, graphed = Walk(torch.float32), Walk(torch.float32)
    for walk in (plain, graphed):
        walk.draw(0)
        walk(), walk()
    monkeypatch.setattr(_launch, "_COUNTERS", {})
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        graphed()
    for _ in range(3):
        plain()
        graph.replay()
    for ours, theirs in zip(graphed.state(), plain.state(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("adam", ["triton", "torch"])
def test_nothing_waits_for_the_gpu(adam):
    walk = Walk(torch.bfloat16, adam)
    walk.adam.found_inf = walk.watch["found"]
    walk.draw(0)
    walk()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            walk()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def all_at_once(streams):
    """Hold every stream back until all of their work is queued, so that it does run together."""
    for stream in streams:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000)  # a tenth of a second


def test_streams_side_by_side_do_not_meet():
    cuda = torch.device("cuda:0")
    x = torch.randn(64, 256, 16, 16, device=cuda).contiguous(memory_format=torch.channels_last)

    def layer(count):
        norm = BatchNormAct2d(256, impl="triton").to(cuda)
        return [norm(x, 2) for _ in range(count)][-1], norm.running_var

    expected = layer(20)
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    all_at_once(streams)
    results = []
    for stream in streams:
        with torch.cuda.stream(stream):
            results.append(layer(20))
    torch.cuda.synchronize()
    for result in results:
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


def test_graphs_side_by_side_do_not_meet():
    walks = [Walk(torch.bfloat16) for _ in range(4)]
    graphs = [captured(walk) for walk in walks]
    alone = Walk(torch.bfloat16)
    graph = captured(alone)
    for _ in range(20):
        graph.replay()
    streams = [torch.cuda.Stream() for _ in graphs]
    torch.cuda.synchronize()
    all_at_once(streams)
    for _ in range(20):
        for stream, graph in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for walk in walks:
        for ours, theirs in zip(walk.state(), alone.state(), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.slow
def test_more_than_2_to_the_31_elements():
    """Each of the four launches of a layer, looked at where an offset of 32 bits goes wrong."""
    cuda = torch.device("cuda:0")
    if torch.cuda.mem_get_info()[0] < 40e9:
        pytest.skip("needs 40 GB of free GPU memory")
    shape, last = (2060, 64, 128, 128), slice(-8, None)  # 2.16e9 elements
    x, dy = (
        torch.empty(
            shape, dtype=torch.bfloat16, device=cuda, memory_format=torch.channels_last
        ).normal_()
        for _ in range(2)
    )
    x.requires_grad_()
    weight, bias = torch.ones(64, device=cuda), torch.zeros(64, device=cuda)
    weight.requires_grad_(), bias.requires_grad_()
    mean, var = torch.zeros(64, device=cuda), torch.ones(64, device=cuda)
    y = bn_act(x, weight, bias, mean, var, training=True, momentum=1.0, act="none", impl="triton")
    # 3.4e7 values a channel: their mean is within 1e-3, their variance too
    assert mean.abs().max().item() < 1e-3 and (var - 1).abs().max().item() < 1e-3
    mean, rstd = mean[:, None, None], torch.rsqrt(var + 1e-5)[:, None, None]
    x_hat = (x.detach()[last].float() - mean) * rstd
    torch.testing.assert_close(y.detach()[last].float(), x_hat, rtol=1e-2, atol=1e-3)
    y.backward(dy)
    dweight, dbias = torch.zeros(2, 64, dtype=torch.float64, device=cuda)
    for part, grad in zip(x.detach().split(103), dy.split(103), strict=True):
        dbias += grad.double().sum((0, 2, 3))
        dweight += ((part.double() - mean) * rstd * grad).sum((0, 2, 3))
    # of 3.4e7 random products, which come to about 6,000
    torch.testing.assert_close(bias.grad.double(), dbias, rtol=0, atol=10)
    torch.testing.assert_close(weight.grad.double(), dweight, rtol=0, atol=10)
    torch.testing.assert_close(x.grad[last].float(), rstd * dy[last].float(), rtol=2e-2, atol=5e-3)


@pytest.mark.slow
def test_a_set_of_more_than_2_to_the_31_bytes():
    images = torch.randint(0, 256, (180_000, 64, 64, 3), dtype=torch.uint8, device="cuda:0")
    index = torch.tensor([179_999, 0, 174_763], device="cuda:0")
    got = gather_u8(images, index, dtype=torch.float32, impl="triton")
    assert torch.equal(got, gather_u8(images, index, dtype=torch.float32, impl="ref"))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_second_gpu():
    x = torch.randn(8, 32, 4, 4, device="cuda:1")
    norm, plain = (BatchNormAct2d(32, impl=i).to("cuda:1") for i in ("triton", "torch"))
    torch.testing.assert_close(norm(x), plain(x), rtol=1e-5, atol=1e-5)
