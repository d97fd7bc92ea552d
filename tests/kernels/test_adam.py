"""The optimizer against torch.optim.Adam, and as PyTorch treats its own."""

import copy
import functools

import pytest
import torch
from adam_network import BETAS, gradients, network
from torch import nn

from fastgan_kernels import Adam, Average

IMPLS = ["ref", "torch", "triton"]
# A weight of up to 1 is rounded by up to 2^-25 in a step that moves it by up to lr = 2e-4; both are
# random walks, so their ratio stays. Fourfold for the roundings of the update itself.
LIMIT = 4 * 2**-25 / 2e-4


def distance(ours, theirs, start):
    """The largest L2(difference) / L2(move) of any tensor."""
    pairs = zip(ours, theirs, start, strict=True)
    errors = [(a.double() - b).norm() / (b.double() - s).norm() for a, b, s in pairs]
    return max(error.item() for error in errors)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("scale", [None, 1024.0])
def test_50_steps_of_torchs_adam(impl, scale, device):
    """As torch.optim.Adam's in float64, with gradients scaled and one step of them not finite."""
    ours = network(device)
    theirs = copy.deepcopy(ours).double()
    start = [p.detach().double() for p in ours.parameters()]
    adam = Adam(ours.parameters(), 2e-4, BETAS, impl=impl)
    plain = torch.optim.Adam(theirs.parameters(), 2e-4, BETAS)
    for step in range(50):
        grads = gradients(ours)
        bad = scale is not None and step == 7
        for p, q, g in zip(ours.parameters(), theirs.parameters(), grads, strict=True):
            p.grad = g * (scale or 1.0)
            q.grad = g.double()
        if scale is not None:
            adam.grad_scale = torch.tensor(scale, device=device)
            adam.found_inf = torch.tensor(float(bad), device=device)
        if bad:
            next(ours.parameters()).grad[0] = float("inf")
        adam.step()
        if not bad:
            plain.step()
    assert distance(ours.parameters(), theirs.parameters(), start) <= LIMIT
    state = adam.state[next(ours.parameters())]
    assert float(state["step"]) == 50 - (scale is not None)
    # CUDA's fused Adam rounds beta2 to float32 before it takes it from 1: 1.3e-5 of 0.001
    for name, limit in (("exp_avg", 1e-5), ("exp_avg_sq", 2e-5)):
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            expected = plain.state[q][name]
            assert (adam.state[p][name] - expected).norm() <= limit * expected.norm()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_copy_that_requires_a_gradient_gives_it(impl, device):
    net = network(device)
    weights = [i for i, p in enumerate(net.parameters()) if p.dim() > 1]
    copies = [
        p.detach().half().requires_grad_() if i in weights else None
        for i, p in enumerate(net.parameters())
    ]
    plain = copy.deepcopy(net)
    ours = Adam(net.parameters(), 1e-2, BETAS, low=copies, impl=impl)
    theirs = Adam(plain.parameters(), 1e-2, BETAS, impl="ref")
    with pytest.raises(ValueError, match="parameter 0 of shape .* has no gradient"):
        ours.gradients()
    for _ in range(3):
        ours.zero_grad()
        for i, (p, q, g) in enumerate(
            zip(net.parameters(), plain.parameters(), gradients(net), strict=True)
        ):
            g = g.half().float() if i in weights else g
            q.grad = g
            if i in weights:
                copies[i].grad = g.half()
            else:
                p.grad = g
        taken = ours.gradients()
        assert all(taken[i] is copies[i].grad for i in weights)
        assert all(leaf.grad is g for leaf, g in zip(ours.leaves(), taken, strict=True))
        ours.step(), theirs.step()
    for i, (p, q) in enumerate(zip(net.parameters(), plain.parameters(), strict=True)):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        assert i not in weights or torch.equal(copies[i], p.half())
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
    ours.write_low()
    assert not any(copies[i].any() for i in weights)
    ours.zero_grad(set_to_none=False)
    assert all(copies[i].grad is not None and not copies[i].grad.any() for i in weights)


def test_more_tensors_than_one_launch_takes(device, monkeypatch):
    import sys

    module = sys.modules["fastgan_kernels.adam_ema"]
    launches = []
    real = module.launch
    monkeypatch.setattr(module, "launch", lambda *a, **k: (launches.append(a[1]), real(*a, **k)))
    results = []
    for impl in ("ref", "triton"):
        torch.manual_seed(1)
        params = [nn.Parameter(torch.randn(n % 5 + 1, device=device)) for n in range(150)]
        count = torch.zeros((), dtype=torch.float64, device=device)
        buffers = [(torch.randn(3, device=device), torch.zeros(3, device=device))]
        average = Average([p.detach().clone() for p in params], buffers, count, 4.0, 1.0)
        adam = Adam(params, 1e-2, average=average, impl=impl)
        for _ in range(2):
            for p in params:
                p.grad = torch.randn_like(p)
            adam.step()
        results.append(
            [*params, *average.params, buffers[0][1], adam.state[params[0]]["step"], count]
        )
    assert len(launches) == 2 * 3  # 64 a launch
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_a_gradient_in_another_layout_is_taken_as_it_is_meant(device):
    net = network(device)
    other = copy.deepcopy(net)
    for p, q, g in zip(net.parameters(), other.parameters(), gradients(net), strict=True):
        p.grad, q.grad = g, g.contiguous()
    for n in (net, other):
        Adam(n.parameters(), impl="triton").step()
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
    assert net[2].weight.grad.stride() != other[2].weight.grad.stride()


def test_the_state_goes_into_torchs_adam_and_back(device):
    nets = [network(device) for _ in range(3)]
    for net in nets[1:]:
        net.load_state_dict(nets[0].state_dict())
    adams = [
        Adam(nets[0].parameters(), 1e-3, BETAS, impl="triton"),
        torch.optim.Adam(nets[1].parameters(), 1e-3, BETAS),
        Adam(nets[2].parameters(), 5.0, impl="triton"),  # taken from torch's below
    ]

    def step(which):
        torch.manual_seed(len(which))
        grads = gradients(nets[0])
        for i in which:
            for p, g in zip(nets[i].parameters(), grads, strict=True):
                p.grad = g.clone()
            adams[i].step()

    step([0, 1])
    adams[2].load_state_dict(copy.deepcopy(adams[1].state_dict()))
    nets[2].load_state_dict(nets[1].state_dict())
    adams[1].load_state_dict(copy.deepcopy(adams[0].state_dict()))
    step([0, 1, 2])
    for p, q, r in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(q, p, rtol=0, atol=1e-6)
        torch.testing.assert_close(r, p, rtol=0, atol=1e-6)
    first = next(nets[2].parameters())
    assert float(adams[2].state[first]["step"]) == 2
    assert len({id(s["step"]) for s in adams[2].state.values()}) == 1  # one count again


def test_gradscaler_skips_and_backs_off(device):
    net = network(device)
    adam = Adam(net.parameters(), impl="triton")
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10)
    before = [p.detach().clone() for p in net.parameters()]
    for finite in (False, True):
        scaler.scale(torch.zeros((), device=device))  # made on first use
        for p in net.parameters():
            p.grad = torch.ones_like(p) * 2.0**10
        if not finite:
            next(net.parameters()).grad[0] = float("nan")
        scaler.step(adam)
        scaler.update()
        same = [torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True)]
        assert all(same) if not finite else not any(same)
    assert scaler.get_scale() == 2.0**9
    assert not hasattr(adam, "found_inf") and float(adam.state[next(net.parameters())]["step"]) == 1


def test_a_closure_and_groups(device):
    nets = [network(device) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    results = []
    for net, make in zip(nets, (Adam, torch.optim.Adam), strict=True):
        groups = [
            {"params": list(net[0].parameters())},
            {"params": list(net[2].parameters()), "lr": 0.1},
        ]
        adam = make(groups, lr=1e-3)
        torch.manual_seed(0)
        x = torch.randn(2, 3, 12, 12, device=device)

        def closure(net=net, adam=adam, x=x):
            adam.zero_grad()
            loss = net[2](net[0](x)).square().mean()
            loss.backward()
            return loss

        results.append(adam.step(closure))
    assert torch.equal(*results)
    for p, q in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5)


def test_what_pytorch_does_to_an_optimizer(device):
    """Copied, pickled, extended, scheduled, and saved before its first step: as torch's."""
    results = []
    for make in (functools.partial(Adam, impl="triton"), torch.optim.Adam):
        torch.manual_seed(4)
        net = network(device)
        adam = make(net[:2].parameters(), lr=1e-2)
        adam.load_state_dict(make(net[:2].parameters(), lr=1e-2).state_dict())
        adam.add_param_group({"params": list(net[2:].parameters()), "lr": 1e-3})
        schedule = torch.optim.lr_scheduler.OneCycleLR(adam, [0.1, 0.2], total_steps=9)
        for step in range(4):
            if step == 2:
                net, adam_of_copy = copy.deepcopy((net, adam))
                schedule.optimizer = adam = adam_of_copy
            for p, g in zip(net.parameters(), gradients(net), strict=True):
                p.grad = g
            adam.step()
            schedule.step()
        results.append([*net.parameters()])
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5)


def test_a_state_is_loaded_into_the_tensors_in_use(device):
    """Which a captured graph goes on reading."""
    net = network(device)
    adam, other = (Adam(net.parameters(), lr, impl="triton") for lr in (0.1, 0.2))
    first = next(net.parameters())
    held = [adam.param_groups[0]["lr"], *adam.state[first].values()]
    for p, g in zip(net.parameters(), gradients(net), strict=True):
        p.grad = g
    other.step()
    adam.load_state_dict(other.state_dict())
    now = [adam.param_groups[0]["lr"], *adam.state[first].values()]
    theirs = [other.param_groups[0]["lr"], *other.state[first].values()]
    for ours, was, expected in zip(now, held, theirs, strict=True):
        assert ours is was and torch.equal(ours, expected) and ours is not expected


@pytest.mark.parametrize("impl", IMPLS)
def test_empty_tensors_are_nothing_to_do(impl, device):
    params = [nn.Parameter(torch.ones(n, device=device)) for n in (0, *[2] * 64, 0)]
    adam = Adam(params, 1e-2, impl=impl)
    for _ in range(3):
        for p in params:
            p.grad = torch.ones_like(p)
        adam.step()
    assert float(adam.state[params[0]]["step"]) == 3
    torch.testing.assert_close(params[1].detach(), torch.full((2,), 0.97, device=device))


def test_wrong_options_of_the_optimizer_are_named(device):
    net = network(device)
    params = list(net.parameters())
    for options, message in (
        ({"lr": -1.0}, "lr must be 0 or more, got -1.0"),
        ({"betas": (0.5, 1.0)}, "betas must be two numbers from 0 to below 1"),
        ({"lr": float("nan")}, "lr must be 0 or more, got nan"),
        ({"impl": "cuda"}, "impl must be one of"),
        ({"eps": -1e-8}, "eps must be 0 or more"),
    ):
        with pytest.raises(ValueError, match=f"Adam: {message}"):
            Adam(params, **options)
    with pytest.raises(ValueError, match="go with one group"):
        Adam([{"params": params[:1]}, {"params": params[1:]}], low=params)
    for absent in ({"weight_decay": 0.1}, {"amsgrad": True}, {"maximize": True}):
        with pytest.raises(ValueError, match=f"there is no {next(iter(absent))} here"):
            Adam([{"params": params, **absent}])
    with pytest.raises(ValueError, match="at least one parameter, got none"):
        Adam([{"params": []}])
    adam = Adam(params)
    with pytest.raises(ValueError, match=r"parameter 0 of shape \(16, 3, 4, 4\) has no gradient"):
        adam.step()
    with pytest.raises(ValueError, match="a group must hold lr, betas and eps"):
        adam.load_state_dict(torch.optim.SGD(params, 0.1).state_dict())
    decayed = torch.optim.Adam(params, weight_decay=0.1)
    with pytest.raises(ValueError, match="there is no weight_decay here, got 0.1"):
        adam.load_state_dict(decayed.state_dict())
