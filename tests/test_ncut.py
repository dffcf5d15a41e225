"""The normalized cut against LAPACK's dense solver in double precision, and where there is nothing to cut."""

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from u2seg.ncut import affinity_product, fiedler, lanczos, orient, propagate, second_eigenvector, spectral_gap
from u2seg.ncut import token_affinity, token_graph

torch.set_num_threads(1)


def dense(keys, alive=None, *, tau, eps=1e-5):
    "Eigenvalues 2 and 3 and eigenvector 2, from the definition; painted tokens have their features zeroed."
    f = keys.double() if alive is None else keys.double() * alive
    f = f / f.norm(dim=0).clamp_min(1e-12)
    a = np.where((f.T @ f).numpy() > tau, 1.0, eps)
    d = np.diag(a.sum(1))
    values, vectors = scipy.linalg.eigh(d - a, d, subset_by_index=[1, min(2, len(a) - 1)])
    return values, vectors[:, 0]


def rng(seed):
    return torch.Generator().manual_seed(seed)


def noise(seed, n=300, d=24):
    return torch.randn(d, n, generator=rng(seed)) + 0.4 * torch.randn(d, 1, generator=rng(seed + 100))


def groups(seed, n=300, d=24, k=4, sigma=0.7):
    g = rng(seed)
    return (
        torch.randn(k, d, generator=g)[torch.randint(0, k, (n,), generator=g)].T
        + sigma * torch.randn(d, n, generator=g)
        + 0.4 * torch.randn(d, 1, generator=g)
    )


def bridged(seed, n=300, d=24):
    "Two groups without a link, save through three tokens."
    x = torch.zeros(d, n)
    x[0, : n // 2] = 1
    x[1, n // 2 :] = 1
    x += 0.05 * torch.randn(d, n, generator=rng(seed))
    at = torch.randperm(n, generator=rng(seed))[:3]
    x[0, at] = x[1, at] = 1
    return x


def lonely(seed):
    x = groups(seed)
    x[:, ::9] = 3 * torch.randn(24, x[:, ::9].shape[1], generator=rng(seed))
    return x


def crowded(seed):
    return groups(seed) + 1.0 * torch.randn(24, 1, generator=rng(seed + 7))


def with_zeros(seed):
    x = groups(seed)
    x[:, 1::7] = 0
    return x


def zero_first(seed):
    x = groups(seed)
    x[:, :5] = 0
    return x


KINDS = [noise, groups, bridged, lonely, crowded, with_zeros, zero_first]


@pytest.mark.parametrize('make', KINDS)
@pytest.mark.parametrize('seed', range(4))
def test_vector_and_sign_are_those_of_lapack(make, seed):
    keys = make(seed)
    values, want = dense(keys, tau=0.2)
    if values[1] - values[0] < 1e-3:
        pytest.skip('ill posed: gap below 1e-3')
    got = second_eigenvector(keys[None], tau=0.2)[0].double().numpy()
    cosine = got @ want / np.linalg.norm(got) / np.linalg.norm(want)
    assert cosine > 1 - 1e-6, cosine  # not its absolute value: the sign counts


def test_most_kinds_are_well_posed():
    gaps = [np.diff(dense(make(s), tau=0.2)[0])[0] for make in KINDS for s in range(4)]
    assert np.mean(np.array(gaps) > 1e-3) > 0.8


@pytest.mark.parametrize('seed', range(6))
def test_painted_tokens(seed):
    keys = groups(seed)
    alive = (torch.rand(300, generator=rng(seed)) > 0.4).float()
    alive[0] = seed % 2  # token 0, where the sign's walk begins, painted or not
    values, want = dense(keys, alive, tau=0.2)
    assert values[1] - values[0] > 1e-3
    g = token_graph(token_affinity(keys[None], tau=0.2), alive[None])
    got = (g.scale * orient(g, fiedler(g)))[0].double().numpy()
    assert got @ want / np.linalg.norm(got) / np.linalg.norm(want) > 1 - 1e-6


@pytest.mark.parametrize('n', [2, 3, 4, 5, 8, 13])
def test_few_tokens(n):
    found = 0
    for seed in range(12):
        keys = torch.randn(3, n, generator=rng(seed))
        values, want = dense(keys, tau=0.1)
        got = second_eigenvector(keys[None], tau=0.1)[0].double().numpy()
        assert np.isfinite(got).all()
        if n > 2 and values[1] - values[0] < 1e-3:
            continue
        found += 1
        assert abs(got @ want) / np.linalg.norm(got) / np.linalg.norm(want) > 1 - 1e-6
    assert found >= 4


@pytest.mark.parametrize(
    'name,keys',
    [
        ('equal', torch.ones(5, 40)),
        ('unrelated', torch.eye(40)),
        ('zero', torch.zeros(5, 40)),
        ('two equal halves', torch.eye(2)[:, torch.arange(40) % 2]),
        ('opposite', torch.tensor([[1.0, -1.0]]).repeat(3, 20)),
    ],
)
def test_degenerate_graphs_give_a_vector_of_the_right_space(name, keys):
    values, _ = dense(keys, tau=0.1)
    g = token_graph(token_affinity(keys[None], tau=0.1))
    y = fiedler(g)
    assert torch.isfinite(y).all() and abs(y.norm().item() - 1) < 1e-5
    assert (propagate(g, y) - (1 - values[0]) * y).norm() < 1e-5  # an eigenvector of the second eigenvalue
    assert abs((y / g.scale).sum()) < 1e-3 * (1 / g.scale).norm()  # not the first one
    x = second_eigenvector(keys[None], tau=0.1)
    assert torch.isfinite(x).all() and x.abs().max() > 0 and (x == second_eigenvector(keys[None], tau=0.1)).all()


@pytest.mark.parametrize(
    'bad,tau,message',
    [
        (torch.full((1, 3, 5), float('nan')), 0.1, 'NaN'),
        (torch.full((1, 3, 5), float('inf')), 0.1, 'NaN or infinite'),
        (torch.ones(3, 5), 0.1, r'\[3, 5\]'),
        (torch.ones(1, 3, 1), 0.1, 'at least 2 tokens, got 1'),
        (torch.ones(1, 3, 5), 1.0, 'got 1.0'),
        (torch.ones(1, 3, 5), -0.1, 'got -0.1'),
        (torch.ones(1, 3, 5), float('nan'), 'got nan'),
    ],
)
def test_bad_input_is_named(bad, tau, message):
    for function in (token_affinity, second_eigenvector, spectral_gap):
        with pytest.raises(ValueError, match=message):
            function(bad, tau=tau)


@given(st.integers(2, 70), st.integers(1, 80), st.floats(0, 0.99), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_affinity_equals_the_definition(n, block, tau, seed):
    keys = torch.randn(2, 4, n, generator=rng(seed))
    affinity = token_affinity(keys, tau=tau, block=block)
    f = keys.double() / keys.double().norm(dim=1, keepdim=True)
    cosine = f.mT @ f
    clear = (cosine - tau).abs() > 1e-6
    assert ((affinity == 1) == (cosine > tau))[clear].all()
    assert (affinity == affinity.mT).all() and set(affinity.unique().tolist()) <= {0, 1}


@given(st.integers(2, 400), st.integers(0, 99), st.sampled_from([1e-20, 1e-3, 1.0, 1e6]))
@settings(max_examples=30, deadline=None)
def test_integer_product_is_at_least_as_good_as_float32(n, seed, scale):
    affinity = (torch.rand(1, n, n, generator=rng(seed)) > 0.4).to(torch.int8)
    u = scale * torch.randn(1, n, generator=rng(seed + 1))
    exact = affinity.double() @ u.double()[..., None]
    error = (affinity_product(affinity, u).double() - exact[..., 0]).abs().max()
    assert error <= 1e-7 * (exact.abs().max() + u.abs().max())


@given(st.integers(2, 400), st.integers(0, 99), st.sampled_from([1e-20, 1e-3, 1.0, 1e6]))
@settings(max_examples=30, deadline=None)
def test_integer_product_has_the_bits_of_its_definition(n, seed, scale):
    "Four digits to the base 128, each summed by itself in whole numbers."
    affinity = (torch.rand(n, n, generator=rng(seed)) > 0.4).to(torch.int8)
    u = scale * torch.randn(n, generator=rng(seed + 1))
    rest, total = u.double(), torch.zeros(n, dtype=torch.float64)
    for k in (6, 13, 20, 27):
        unit = 2.0 ** (u.abs().max().frexp().exponent.item() - k)
        digit = (rest / unit).round()
        assert digit.abs().max() <= 64  # a byte holds it
        rest = rest - digit * unit
        total += unit * (affinity.long() @ digit.long()).double()
    assert torch.equal(affinity_product(affinity[None], u[None])[0], total.float())


def test_product_with_zero_is_zero():
    assert (affinity_product(torch.ones(1, 5, 5, dtype=torch.int8), torch.zeros(1, 5)) == 0).all()


def test_float_affinity_of_a_gpu_give_the_same_vector():
    affinity = token_affinity(torch.stack([groups(0), groups(1)]), tau=0.2)
    solve = lambda affinity: (lambda g: orient(g, fiedler(g)))(token_graph(affinity))
    assert (solve(affinity) - solve(affinity.float())).abs().max() < 1e-4


def test_an_image_does_not_depend_on_its_batch():
    keys = torch.stack([groups(0), bridged(1), noise(2), torch.ones(24, 300)])
    together = second_eigenvector(keys, tau=0.2)
    for k, x in zip(keys, together):
        assert (second_eigenvector(k[None], tau=0.2)[0] == x).all()
    affinity = token_affinity(keys[:3], tau=0.2)  # the batched walk itself, as a GPU does it
    g = token_graph(affinity)
    x = g.scale * orient(g, fiedler(g))
    assert torch.nn.functional.cosine_similarity(x, together[:3], dim=1).min() > 1 - 1e-6


def test_length_and_dtype_of_keys_do_not_matter():
    keys = groups(3)
    x = second_eigenvector(keys[None], tau=0.2)
    lengths = 2.0 ** torch.randint(-8, 8, (300,), generator=rng(0))
    assert (second_eigenvector((keys * lengths)[None], tau=0.2) == x).all()
    half = keys.bfloat16()
    assert (second_eigenvector(half[None], tau=0.2) == second_eigenvector(half.float()[None], tau=0.2)).all()


def test_walk_goes_on_after_an_invariant_space():
    "Six equal groups have six eigenvalues: from token 0 the walk would end after a few steps."
    g = token_graph(token_affinity(torch.eye(6)[:, torch.arange(60) % 6][None], tau=0.1))
    start = torch.zeros(1, 60)
    start[:, 0] = 1
    for basis, alpha, beta in lanczos(g, start, start[:, None][:, :0], max_steps=30):
        pass
    assert (basis[0] @ basis[0].T - torch.eye(30)).abs().max() < 1e-5 and min(b.item() for b in beta) == 0


@pytest.mark.parametrize('make', KINDS[:5])
def test_spectral_gap(make):
    values, _ = dense(make(0), tau=0.2)
    assert abs(spectral_gap(make(0)[None], tau=0.2).item() - (values[1] - values[0])) < 1e-4
