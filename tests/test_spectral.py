"""Spectral norm against PyTorch's parametrization and against the singular values themselves."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from fastgan.models.spectral import SpectralNorm

SHAPES = [(7, 5), (8, 3, 4, 4), (1, 16, 4, 4)]


def random(seed=1):
    return torch.Generator().manual_seed(seed)


def made(shape, dtype=torch.float64):
    weight = torch.randn(shape, dtype=dtype)
    norm = SpectralNorm(shape).to(dtype)
    norm.reset(weight, random())
    return weight.requires_grad_(), norm


@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_pytorchs_for_the_same_vectors(shape):
    weight, norm = made(shape)
    kind = nn.Linear(5, 7) if len(shape) == 2 else nn.Conv2d(shape[1], shape[0], 4)
    theirs = kind.double()
    with torch.no_grad():
        theirs.weight.copy_(weight)
    theirs = parametrizations.spectral_norm(theirs).eval()  # whose vectors stay in evaluation
    theirs.parametrizations.weight[0]._u.copy_(norm.u)
    theirs.parametrizations.weight[0]._v.copy_(norm.v)
    ours, expected = norm(weight), theirs.weight
    torch.testing.assert_close(ours, expected, rtol=1e-13, atol=1e-15)
    up = torch.randn_like(ours)
    (grad,) = torch.autograd.grad(ours, weight, up)
    (theirs_grad,) = torch.autograd.grad(expected, theirs.parametrizations.weight.original, up)
    torch.testing.assert_close(grad, theirs_grad, rtol=1e-12, atol=1e-14)


def test_an_iteration_is_the_papers():
    """Algorithm 1: v from the old u, u from the new v."""
    weight, norm = made((6, 2, 3, 3))
    matrix, u = weight.detach().reshape(6, 18), norm.u.clone()
    other = torch.randn_like(weight)  # the weight after some step
    norm.iterate(other)
    matrix = other.reshape(6, 18)
    v = matrix.T @ u / (matrix.T @ u).norm()
    torch.testing.assert_close(norm.v, v, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(norm.u, matrix @ v / (matrix @ v).norm(), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("shape", SHAPES)
def test_iterations_come_to_the_largest_singular_value(shape):
    weight, norm = made(shape)
    before = (norm.u.clone(), norm.v.clone())
    norm(weight)
    assert torch.equal(norm.u, before[0]) and torch.equal(norm.v, before[1])
    largest = torch.linalg.matrix_norm(weight.detach().flatten(1), 2)
    # u^T W v is never more than the norm; the first 15 iterations are within a few percent of it
    first = (weight.detach() / norm(weight).detach()).mean()
    assert 0.9 * largest < first <= largest * (1 + 1e-12)
    for _ in range(2000):
        norm.iterate(weight)
    torch.testing.assert_close(norm.u.norm(), torch.ones((), dtype=torch.float64))
    of_result = torch.linalg.matrix_norm(norm(weight).detach().flatten(1), 2)
    torch.testing.assert_close(of_result, torch.ones((), dtype=torch.float64), rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_divided_in_float32(dtype):
    weight, norm = made((64, 32, 4, 4), torch.float32)
    low = weight.detach().to(dtype).contiguous(memory_format=torch.channels_last)
    ours = norm(low)
    assert ours.dtype == dtype and ours.is_contiguous(memory_format=torch.channels_last)
    assert norm.u.dtype == torch.float32
    sigma = norm.u.double() @ low.double().flatten(1) @ norm.v.double()
    # one rounding to 16 bits, of a quotient that is off by sigma's in float32: 512 terms
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(ours.double(), low.double() / sigma, rtol=0.51 * eps, atol=1e-7)


def test_the_first_vectors_follow_the_random_numbers():
    weight, norm = made((8, 3, 4, 4))
    again, other = SpectralNorm(weight.shape).double(), SpectralNorm(weight.shape).double()
    again.reset(weight, random(1))
    other.reset(weight, random(2))
    assert torch.equal(again.u, norm.u) and torch.equal(again.v, norm.v)
    assert not torch.equal(other.u, norm.u)
    other.load_state_dict(norm.state_dict())
    assert set(norm.state_dict()) == {"u", "v"} and torch.equal(other(weight), norm(weight))


def test_without_first_vectors_nothing_comes_out_that_could_pass_for_a_weight():
    assert not SpectralNorm((8, 3, 4, 4))(torch.ones(8, 3, 4, 4)).isfinite().any()


def test_passes_that_compile_and_an_iteration_between_passes_that_is_seen():
    weight, norm = made((8, 3, 4, 4))
    run = torch.compile(norm, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(weight), norm(weight))
    late = norm(weight)
    norm.iterate(weight)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        late.sum().backward()
