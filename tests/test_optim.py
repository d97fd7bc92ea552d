"""Adam alone on given gradients, and the averaged generator."""

import pytest
import torch

from fastgan.models import Generator
from fastgan.optim import Ema, Trained, copy_into


def network(dtype=torch.float32):
    return Generator(32, 8, 4).to(dtype).to(memory_format=torch.channels_last)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_adam_is_torchs_over_50_steps_of_the_same_gradients(dtype, tolerance):
    ours, theirs = network(dtype), network(dtype)
    theirs.load_state_dict(ours.state_dict())
    start = [p.detach().clone() for p in ours.parameters()]
    adam = Trained(ours, 2e-4, (0.5, 0.999)).adam
    plain = torch.optim.Adam(
        theirs.parameters(), lr=2e-4, betas=(0.5, 0.999), foreach=False, fused=False
    )
    for _ in range(50):
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            p.grad = torch.randn_like(p) * 10.0 ** torch.randint(-6, 2, ()).item()
            q.grad = p.grad.clone()
        adam.step(), plain.step()
    for p, q, s in zip(ours.parameters(), theirs.parameters(), start, strict=True):
        # a few roundings of each of 50 updates, beside the whole move
        assert (p - q).norm() <= tolerance * (q - s).norm()


def test_the_learning_rate_is_a_tensor_that_a_schedule_can_write():
    net = network()
    adam = Trained(net, 2e-4, (0.5, 0.999)).adam
    adam.param_groups[0]["lr"].zero_()
    before = [p.detach().clone() for p in net.parameters()]
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    adam.step()
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))


def test_adams_state_is_there_at_once_and_in_the_weights_layout():
    net = network()
    state = Trained(net, 2e-4, (0.5, 0.999)).state()
    names = {name for name, _ in net.named_parameters()}
    assert set(state) == {f"{n}.{k}" for n in names for k in ("step", "exp_avg", "exp_avg_sq")}
    weight = net.last.weight
    assert state["last.weight.exp_avg"].stride() == weight.stride()


@pytest.mark.parametrize("half_life_img", [0.0, 64.0, 1e9])
def test_ema_follows_its_formula_for_weights_and_running_statistics(half_life_img):
    source, average = network(torch.float64), network(torch.float64)
    ema = Ema(source, average, batch=32, half_life_img=half_life_img)
    expected = {k: v.clone() for k, v in source.state_dict().items()}
    for step in range(1, 6):
        with torch.no_grad():
            for t in source.state_dict().values():
                t.add_(torch.randn_like(t) if t.is_floating_point() else 3)
        ema.average.move(list(source.parameters()))  # what Adam does
        ema.copy_counts()
        half_life = min(half_life_img, 0.05 * step * 32)
        keep = 0.5 ** (32 / half_life) if half_life else 0.0
        for name, now in source.state_dict().items():
            if now.is_floating_point():
                expected[name] = keep * expected[name] + (1 - keep) * now
            else:
                expected[name] = now.clone()
    for name, value in ema.network.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-12)
    assert "blocks.0.norm.running_mean" in expected  # the buffers were part of it
    assert not any(p.requires_grad for p in ema.network.parameters())


def test_copy_into_names_what_does_not_fit():
    net = network()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(ValueError, match=r"G: tensors that do not fit: last\.weight"):
        copy_into(net.state_dict(), {k: v for k, v in state.items() if k != "last.weight"}, "G")
    with pytest.raises(ValueError, match=r"last\.weight"):
        copy_into(net.state_dict(), state | {"last.weight": torch.zeros(1)}, "G")
    with pytest.raises(ValueError, match="extra"):
        copy_into(net.state_dict(), state | {"extra": torch.zeros(1)}, "G")


def test_a_working_copy_is_trained_by_its_own_gradients():
    """Master weights move by the copy's gradients; the copy is the master rounded; the norms are
    one.
    """
    net = network()
    trained = Trained(net, 1e-3, (0.5, 0.999), low=torch.bfloat16)
    assert trained.working.last.weight.dtype == torch.bfloat16
    assert trained.working.last.weight.stride() == net.last.weight.stride()
    assert trained.working.blocks[0].norm is net.blocks[0].norm
    assert net.blocks[0].norm.weight.dtype == torch.float32
    other = network()
    other.load_state_dict(net.state_dict())
    plain = torch.optim.Adam(other.parameters(), 1e-3, (0.5, 0.999))
    for _ in range(3):
        trained.adam.zero_grad()
        trained.working(torch.randn(4, 8).to(torch.bfloat16)).float().square().sum().backward()
        assert net.last.weight.grad is None  # nothing reaches the master weights
        for q, g in zip(other.parameters(), trained.adam.gradients(), strict=True):
            q.grad = g.to(q.dtype)
        trained.adam.step(), plain.step()
        for p, q in zip(net.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)
    for p, w in zip(net.parameters(), trained.working.parameters(), strict=True):
        assert torch.equal(p.to(w.dtype), w)


def test_loading_writes_the_working_copy_too():
    first, second = (Trained(network(), 1e-3, (0.5, 0.9), low=torch.float16) for _ in range(2))
    second.load(first.network.state_dict(), first.state(), "g")
    assert torch.equal(second.working.last.weight, first.network.last.weight.half())
    with pytest.raises(ValueError, match="Adam of g: tensors that do not fit"):
        second.load(first.network.state_dict(), {}, "g")
