"""The loss scale is torch.amp.GradScaler's, without its branches on the host."""

import torch

from fastgan.precision import INTERVAL, SCALE, LossScale

NO, YES = torch.zeros(()), torch.ones(())


def test_the_scale_is_gradscalers_through_overflows_and_growth():
    ours = LossScale(torch.device("cpu"), enabled=True)
    theirs = torch.amp.GradScaler("cpu")
    p = torch.nn.Parameter(torch.zeros(3))
    sgd = torch.optim.SGD([p], lr=1.0)
    overflows = {3, 4, 3000, 3001 + INTERVAL}
    assert float(ours.scale) == SCALE == theirs.get_scale()
    for i in range(2 * INTERVAL + 1200):
        loss = torch.ones(())
        assert float(loss * ours.gradient(loss)) == float(theirs.scale(loss))
        p.grad = torch.full_like(p, torch.inf if i in overflows else 1.0)
        ours.note(NO), ours.note(YES if i in overflows else NO)
        theirs.step(sgd), theirs.update(), ours.update(frozen=NO)
        assert float(ours.scale) == theirs.get_scale(), i
    assert float(ours.scale) != SCALE  # it moved, in the end
    assert int(ours.skipped) == len(overflows)


def test_one_skip_of_two_optimizers_lowers_the_scale_and_is_one_step():
    scale = LossScale(torch.device("cpu"), enabled=True)
    scale.note(YES), scale.note(YES)
    scale.update(frozen=NO)
    assert float(scale.scale) == SCALE / 2 and int(scale.skipped) == 1


def test_frozen_nothing_moves():
    scale = LossScale(torch.device("cpu"), enabled=True)
    scale.note(NO), scale.note(NO)
    scale.update(frozen=NO)
    before = {name: t.clone() for name, t in scale.tensors().items()}
    for skipped in (YES, NO):
        scale.note(skipped)
        scale.update(frozen=YES)
    assert all(torch.equal(t, before[name]) for name, t in scale.tensors().items())
    assert before["good_steps"] == 1


def test_disabled_it_does_nothing():
    scale = LossScale(torch.device("cpu"), enabled=False)
    loss = torch.ones(())
    scale.note(YES)
    scale.update(frozen=NO)
    assert scale.gradient(loss) == 1 and not scale.tensors() and not scale.skipped
