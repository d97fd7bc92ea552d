"""The loss scale is torch.amp.GradScaler's, without its branches on the host."""

import torch

from fastgan.precision import INTERVAL, SCALE, LossScale


def test_the_scale_is_gradscalers_through_overflows_and_growth():
    ours = LossScale(torch.device("cpu"), enabled=True)
    theirs = torch.amp.GradScaler("cpu")
    p = torch.nn.Parameter(torch.zeros(3))
    sgd = torch.optim.SGD([p], lr=1.0)
    overflows = {3, 4, 3000, 3001 + INTERVAL}
    assert float(ours.scale) == SCALE == theirs.get_scale()
    for i in range(2 * INTERVAL + 1200):
        loss = torch.ones(())
        assert float(ours(loss)) == float(theirs.scale(loss))
        p.grad = torch.full_like(p, torch.inf if i in overflows else 1.0)
        found = ours.check([torch.ones(2, dtype=torch.float16), p.grad.clone()])
        assert bool(found) == (i in overflows)
        theirs.step(sgd), theirs.update(), ours.update()
        assert float(ours.scale) == theirs.get_scale(), i
    assert float(ours.scale) != SCALE  # it moved, in the end


def test_one_overflow_of_two_optimizers_lowers_the_scale():
    scale = LossScale(torch.device("cpu"), enabled=True)
    assert not scale.check([torch.ones(2)])
    assert scale.check([torch.tensor([1.0, torch.nan])])
    scale.update()
    assert float(scale.scale) == SCALE / 2


def test_disabled_it_does_nothing():
    scale = LossScale(torch.device("cpu"), enabled=False)
    loss = torch.ones(())
    assert scale(loss) is loss and scale.check([loss]) is None and not scale.tensors()
    scale.update()
