"The dense CRF against brute force: every pair of pixels, every lattice point, written down as the papers define them."

import math

import numba
import numpy as np
import pytest
import torch

from u2seg import crf
from u2seg.gpu_lattice import _PIECE, _torch_filter, _torch_splat, torch_lattice
from u2seg.lattice import _SCALE, _compile, _compiled_filter, _neighbours, _number, _radix
from u2seg.crf import MASKCUT, STEGO, binary_crf, dense_crf, refine_mask, refine_masks
from u2seg.lattice import lattice


def disc_image(h=12, w=14, seed=0):
    "A disc on a gradient, with noise."
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:h, :w]
    inside = (y - h * 0.45) ** 2 + (x - w * 0.5) ** 2 < (0.3 * h) ** 2
    image = np.stack([60 + 4 * x, 90 + 3 * y, 80 + 0 * x], -1) + 110 * inside[..., None] + rng.normal(0, 4, (h, w, 3))
    return image.clip(0, 255).astype(np.uint8), inside


def soft(c, h, w, seed=1):
    p = np.random.default_rng(seed).gamma(1.5, size=(c, h, w))
    return (p / p.sum(0)).astype(np.float32)


def pairs(image, sxy, srgb=None):
    "Kernel of all pairs of pixels, the pixel itself included."
    h, w = image.shape[:2]
    y, x = np.mgrid[:h, :w]
    f = [x.ravel() / sxy, y.ravel() / sxy]
    if srgb:
        f += list(image.reshape(-1, 3).T / srgb)
    f = np.array(f, np.float64)
    return np.exp(-0.5 * ((f[:, :, None] - f[:, None]) ** 2).sum(0))


def lattice_matrix(lat):
    "The lattice's filter as a dense matrix: splat, six blurs, slice."
    n, m = len(lat.index), lat.up.shape[1]
    splat = np.zeros((m, n))
    for i in range(n):
        for k in range(6):
            splat[lat.index[i, k], i] += float(lat.weight[i, k])
    k = splat.copy()
    for up, down in zip(lat.up.numpy(), lat.down.numpy()):
        step = np.eye(m)
        for i in range(m):
            if up[i] < m:
                step[i, up[i]] += 0.5
            if down[i] < m:
                step[i, down[i]] += 0.5
        k = step @ k
    return splat.T @ k


def mean_field(prob, matrices, n_iters):
    "Mean field over dense kernel matrices [(weight, K)], symmetric normalisation."
    c = len(prob)
    log_p = np.log(np.clip(prob.reshape(c, -1).astype(np.float64), 1e-5, 1))
    soft = lambda z: np.exp(z - z.max(0)) / np.exp(z - z.max(0)).sum(0)
    q = soft(log_p)
    for _ in range(n_iters):
        z = log_p.copy()
        for weight, k in matrices:
            n = k.sum(1) ** -0.5
            z += weight * (q * n @ k.T) * n
        q = soft(z)
    return q.reshape(prob.shape)


@pytest.mark.parametrize('preset', [MASKCUT, STEGO])
@pytest.mark.parametrize('c', [2, 5])
def test_mean_field_equals_dense_matrices(preset, c):
    image, _ = disc_image()
    prob = soft(c, 12, 14)
    lat = lattice(torch.from_numpy(image), sxy=preset['bilateral_sxy'], srgb=preset['bilateral_srgb'])
    r = 2 * math.ceil(2 * preset['gauss_sxy'])
    d = (
        np.abs(np.subtract.outer(np.arange(168) // 14, np.arange(168) // 14)),
        np.abs(np.subtract.outer(np.arange(168) % 14, np.arange(168) % 14)),
    )
    near = pairs(image, preset['gauss_sxy']) * (d[0] <= r) * (d[1] <= r)
    expect = mean_field(prob, [(preset['gauss_weight'], near), (preset['bilateral_weight'], lattice_matrix(lat))], 10)
    got = dense_crf(image, prob, **preset)
    assert got.dtype == np.float32 and got.shape == prob.shape
    np.testing.assert_allclose(got, expect, atol=2e-4)


@pytest.mark.parametrize('seed', range(4))
def test_close_to_true_gaussians(seed):
    "The lattice is an approximation; its result is that of the exact all-pairs kernels almost everywhere."
    image, inside = disc_image(seed=seed)
    rough = np.where(np.roll(inside, 2, 1), 0.7, 0.3).astype(np.float32)
    prob = np.stack([1 - rough, rough])
    exact = mean_field(prob, [(7.0, pairs(image, 3.0)), (10.0, pairs(image, 50.0, 5.0))], 10)
    got = dense_crf(image, prob, **MASKCUT)
    assert ((got[1] > 0.5) == (exact[1] > 0.5)).mean() >= 0.98
    assert np.abs(got - exact).mean() < 0.02


def decode(points, radix):
    "Coordinates [M, 6] of lattice points from their keys."
    k = points % 6
    rest, q = (points - k) // 6, np.zeros((len(points), 6), np.int64)
    for j in range(5, 0, -1):
        r = radix[j] // 6
        q[:, j] = np.round(rest / r) if j > 1 else rest
        rest = rest - q[:, j] * r
    v = 6 * q + k[:, None]
    v[:, 0] = -v[:, 1:].sum(1)
    return v


def test_lattice_from_its_definition():
    image = np.random.default_rng(0).integers(0, 256, (9, 11, 3), dtype=np.uint8)
    image[:, 5:] = image[:, 5:] // 40 + 100  # crowded and lonely pixels
    sxy, srgb = 4.0, 30.0
    radix, scale = _radix(9, 11, sxy, srgb)[0], (_SCALE / [sxy, sxy, srgb, srgb, srgb]).astype(np.float32)
    index, weight, points, table = _number(image, scale, radix)
    index, weight = index.reshape(-1, 6), weight.reshape(-1, 6)
    up, down = _neighbours(points, table, radix)
    v = decode(points, radix)
    assert len(np.unique(v, axis=0)) == len(points)
    assert (v % 6 == (points % 6)[:, None]).all() and (v.sum(1) == 0).all()  # points of the lattice A5*
    y, x = np.mgrid[:9, :11]
    f = np.stack([x.ravel(), y.ravel(), *image.reshape(-1, 3).T], 1) * scale
    e = np.array([[f[i, j:].sum() - (j * f[i, j - 1] if j else 0) for j in range(6)] for i in range(len(f))])
    assert (weight > -1e-6).all()
    np.testing.assert_allclose(weight.sum(1), 1, atol=1e-5)
    # barycentric: the corners surround the pixel
    np.testing.assert_allclose((weight[..., None] * v[index]).sum(1), e, atol=1e-3)
    assert (np.sort(points[index] % 6, 1) == np.arange(6)).all()  # one corner of each remainder
    assert (np.abs(v[index][:, :, None] - v[index][:, None]).max((1, 2, 3)) <= 5).all()  # of one simplex
    at = {tuple(p): i for i, p in enumerate(v)}
    for j in range(6):
        step = np.ones(6, int) - 6 * (np.arange(6) == j)
        assert [at.get(tuple(p + step), len(v)) for p in v] == up[j].tolist()
        assert [at.get(tuple(p - step), len(v)) for p in v] == down[j].tolist()


def test_filter_has_gaussian_width():
    "Over smooth colours the lattice's kernel resembles exp(-d^2/2)."
    image = np.full((60, 60, 3), 100, np.uint8)
    lat = lattice(torch.from_numpy(image), sxy=6.0, srgb=5.0)
    x = torch.zeros(1, 3600)
    x[0, 30 * 60 + 30] = 1
    k = _compiled_filter(lat)(x, 1, torch.zeros_like(x)).view(60, 60).double()
    d = (torch.arange(60) - 30).double()
    total = k.sum()
    assert abs(float(((k.sum(0) * d * d).sum() / total) ** 0.5) - 6) < 0.6
    assert abs(float(((k.sum(1) * d * d).sum() / total) ** 0.5) - 6) < 0.6


@pytest.mark.parametrize('preset', [MASKCUT, STEGO])
def test_torch_operations_equal_compiled_loops(preset):
    image, _ = disc_image(40, 33)
    prob = soft(4, 40, 33)
    np.testing.assert_allclose(
        dense_crf(image, prob, **preset, compiled=False), dense_crf(image, prob, **preset), atol=5e-4
    )
    np.testing.assert_allclose(
        binary_crf(image, prob, **preset, compiled=False), binary_crf(image, prob, **preset), atol=5e-4
    )


def test_images_of_one_lattice_know_nothing_of_each_other():
    "Torch operations on three images, black, white and noise, as on each alone; also the corners of the colour cube."
    noise = np.random.default_rng(0).integers(0, 256, (40, 33, 3), dtype=np.uint8)
    cube = np.zeros((40, 33, 3), np.uint8)
    for i in range(8):
        cube[5 * i : 5 * i + 5] = [255 * (i >> k & 1) for k in range(3)]
    images = torch.from_numpy(np.stack([np.zeros_like(noise), np.full_like(noise, 255), noise, cube]))
    masks = torch.from_numpy(np.random.default_rng(1).random((3, 4, 40, 33)) < 0.4)
    prob = torch.from_numpy(np.random.default_rng(2).random((2, 4, 40, 33), dtype=np.float32))
    together = binary_crf(images, prob, **MASKCUT, compiled=False)
    refined = refine_masks(images, masks, compiled=False)
    for i in range(4):
        alone = binary_crf(images[i], prob[:, i].contiguous(), **MASKCUT, compiled=False)
        torch.testing.assert_close(together[:, i], alone, atol=1e-5, rtol=0)
        loops = refine_masks(images[i], masks[:, i].contiguous())
        assert (refined[:, i] == loops).float().mean() > 0.999
    both, alone = (torch_lattice(x, sxy=5.0, srgb=4.0) for x in (images[2:], images[2]))
    n, m = len(alone.index), alone.up.shape[1]
    assert both.up.shape[1] == m + lattice(images[3], sxy=5.0, srgb=4.0).up.shape[1]
    assert torch.equal(both.index[:n], alone.index) and both.index[n:].min() == m
    with pytest.raises(ValueError, match='one image at a time'):
        binary_crf(images, prob, **MASKCUT)
    with pytest.raises(ValueError, match=r'prob must be \[c, 4, 40, 33\]'):
        binary_crf(images, prob[:, :3], **MASKCUT, compiled=False)


def test_points_of_many_pixels_are_added_in_pieces():
    "A plain image: thousands of pixels a point. All of them count, once; so does one pixel alone."
    image = torch.full((90, 80, 3), 7, dtype=torch.uint8)
    image[44, 39] = 250
    a, b = (f(image, sxy=60.0, srgb=5.0) for f in (lattice, torch_lattice))
    splat = _torch_splat(b)
    x = torch.rand(2, 90 * 80, generator=torch.Generator().manual_seed(0))
    want = torch.zeros(2, b.up.shape[1], dtype=torch.double)
    for k in range(6):
        want.index_add_(1, b.index[:, k].long(), (b.weight[:, k] * x).double())
    assert torch.bincount(b.index.flatten().long()).max() > 20 * _PIECE
    torch.testing.assert_close(splat(x).double(), want, atol=1e-3, rtol=1e-5)
    for f, lat in ((_torch_filter, b), (_compiled_filter, a)):
        out = f(lat)(x, 1, torch.zeros_like(x))
        first = out if f is _torch_filter else first
    torch.testing.assert_close(first, out, atol=1e-2, rtol=1e-4)


def test_table_growth():
    "More lattice points than the first hash table holds."
    image = np.random.default_rng(0).integers(0, 256, (120, 130, 3), dtype=np.uint8)
    a, b = (f(torch.from_numpy(image), sxy=5.0, srgb=4.0) for f in (lattice, torch_lattice))
    assert a.up.shape[1] == b.up.shape[1] > 1 << 15
    x = torch.rand(1, 120 * 130)
    torch.testing.assert_close(
        _compiled_filter(a)(x, 1, torch.zeros_like(x)),
        _torch_filter(b)(x, 1, torch.zeros_like(x)),
        atol=1e-5,
        rtol=1e-4,
    )


def test_two_labels_are_one_channel():
    image, _ = disc_image(30, 20)
    p = soft(2, 30, 20)[1:]
    two = dense_crf(image, np.concatenate([1 - p, p]), **MASKCUT)
    np.testing.assert_allclose(binary_crf(image, p, **MASKCUT)[0], two[1], atol=1e-4)


def test_masks_together_equal_masks_alone():
    image, inside = disc_image(50, 60)
    masks = np.stack([inside, ~inside, np.roll(inside, 5, 0), np.zeros_like(inside), np.ones_like(inside)])
    together = refine_masks(image, masks)
    assert together.dtype == bool and together.shape == masks.shape
    for m, t in zip(masks, together):
        assert (refine_mask(image, m) == t).all()
    assert not together[3].any() and together[4].all()
    assert (refine_masks(image, masks, n_threads=3) == together).all()


def test_a_mask_is_softened_as_maskcut_does():
    image, inside = disc_image(50, 60)
    p = np.where(inside, math.e / (1 + math.e), 1 / (1 + math.e)).astype(np.float32)
    assert (refine_mask(image, inside) == (dense_crf(image, np.stack([1 - p, p]), **MASKCUT).argmax(0) == 1)).all()
    moved = np.roll(inside, 6, 1)
    hard = dense_crf(image, np.stack([~moved, moved]).astype(np.float32), **MASKCUT).argmax(0) == 1
    iou = lambda a, b: (a & b).sum() / (a | b).sum()
    # 1 and 0 would hold the mask where it was
    assert iou(refine_mask(image, moved), inside) > 0.05 + iou(hard, inside)


@pytest.mark.parametrize('size', [(1, 1), (1, 7), (7, 1), (2, 2)])
@pytest.mark.parametrize('compiled', [True, False])
def test_tiny(size, compiled):
    image, prob = np.full((*size, 3), 7, np.uint8), soft(3, *size)
    q = dense_crf(image, prob, **STEGO, compiled=compiled)
    np.testing.assert_allclose(q.sum(0), 1, atol=1e-5)
    # K = 1: each iteration adds both weights times q
    if size == (1, 1):
        np.testing.assert_allclose(q, mean_field(prob, [(7.0, np.ones((1, 1)))], 10), atol=1e-5)


@pytest.mark.parametrize('compiled', [True, False])
def test_constant_image(compiled):
    image, prob = np.full((20, 25, 3), 200, np.uint8), soft(3, 20, 25)
    prob[0] += 0.3
    prob /= prob.sum(0)
    q = dense_crf(image, prob, **MASKCUT, compiled=compiled)
    assert np.isfinite(q).all()  # nothing to hold on to: the majority wins
    assert (q.argmax(0) == 0).mean() > 0.99


def test_one_label_no_iterations_no_kernels():
    image, _ = disc_image()
    assert (dense_crf(image, np.full((1, 12, 14), 0.3, np.float32), **MASKCUT) == 1).all()
    prob = soft(3, 12, 14)
    np.testing.assert_allclose(dense_crf(image, prob, **{**MASKCUT, 'n_iters': 0}), prob, atol=1e-4)
    np.testing.assert_allclose(
        dense_crf(image, prob, **{**MASKCUT, 'gauss_weight': 0, 'bilateral_weight': 0}), prob, atol=1e-4
    )
    assert dense_crf(image, soft(3, 12, 14)[:0], **MASKCUT).shape == (0, 12, 14)
    assert refine_masks(image, np.zeros((0, 12, 14), bool)).shape == (0, 12, 14)


def test_kinds_in_and_out():
    image, inside = disc_image()
    prob = soft(2, 12, 14)
    a = dense_crf(image, prob, **MASKCUT)
    b = dense_crf(torch.from_numpy(image), torch.from_numpy(prob).double(), **MASKCUT)
    assert isinstance(a, np.ndarray) and isinstance(b, torch.Tensor) and b.dtype == torch.float32
    assert (a == b.numpy()).all()
    assert (refine_mask(torch.from_numpy(image), torch.from_numpy(inside)).numpy() == refine_mask(image, inside)).all()
    wide = np.zeros((12, 28, 3), np.uint8)
    wide[:, ::2] = image  # strided input, gradient-carrying input
    assert (dense_crf(wide[:, ::2], prob, **MASKCUT) == a).all()
    assert (dense_crf(image, prob[:, ::-1].copy()[:, ::-1], **MASKCUT) == a).all()
    assert (dense_crf(torch.from_numpy(image), torch.from_numpy(prob).requires_grad_(), **MASKCUT).numpy() == a).all()
    assert (dense_crf(image, prob, **MASKCUT, n_threads=2) == a).all()


@pytest.mark.parametrize(
    'change, words',
    [
        (dict(image=np.zeros((12, 14, 3))), 'image must be uint8'),
        (dict(image=np.zeros((12, 14), np.uint8)), 'image must be uint8'),
        (dict(image=np.zeros((0, 14, 3), np.uint8)), 'image must be uint8'),
        (dict(prob=soft(2, 14, 12)), 'to fit the image'),
        (dict(prob=np.full((2, 12, 14), np.nan, np.float32)), 'NaN'),
        (dict(prob=np.full((2, 12, 14), -1, np.float32)), 'negative'),
        (dict(bilateral_srgb=0), 'bilateral_srgb must be positive, got 0'),
        (dict(gauss_sxy=-1), 'gauss_sxy must be positive'),
        (dict(n_iters=-1), 'n_iters must be at least 0'),
        (dict(gauss_weight=math.nan), 'gauss_weight must be at least 0'),
        (dict(n_threads=0), 'n_threads must be'),
        (dict(bilateral_sxy=1e-9, bilateral_srgb=1e-5), 'too large'),
    ],
)
def test_errors(change, words):
    given = {**dict(image=disc_image()[0], prob=soft(2, 12, 14)), **MASKCUT, **change}
    with pytest.raises(ValueError, match=words):
        dense_crf(**given)


def test_loops_compile_where_nothing_can_be_written(monkeypatch):
    def njit(f, cache=False, **kw):
        if cache:
            raise RuntimeError('cannot cache function: no locator available')
        return real(f, **kw)

    real = numba.njit
    monkeypatch.setattr(numba, 'njit', njit)
    assert _compile(lambda x: x + 1)(2) == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
def test_gpu_equals_cpu_and_itself():
    image, _ = disc_image(90, 80)
    prob = torch.from_numpy(soft(5, 90, 80))
    a, b = (dense_crf(torch.from_numpy(image), prob.cuda(), **STEGO) for _ in range(2))
    assert torch.equal(a, b)
    torch.testing.assert_close(a.cpu(), dense_crf(torch.from_numpy(image), prob, **STEGO), atol=2e-3, rtol=0)
