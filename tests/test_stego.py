"""STEGO against loops that write out its formulas, and its training and files against interruptions and foul input."""

import os, sys, types
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image

from u2seg import correspondence, semantic, stego
from u2seg.correspondence import correspondence_loss, nearest_images, random_partners, random_points, sample, stego_loss
from u2seg.crf import STEGO
from u2seg.features import ViTFeatures, write_backbone
from u2seg.images import normalize, read_image, to_tensor
from u2seg.kmeans import spherical_kmeans
from u2seg.labeller import (
    Head,
    Labeller,
    PatchFeatures,
    PcaHead,
    extractor,
    keep_features,
    load_labeller,
    pool_features,
    probe_loss,
    save_labeller,
    training_view,
)
from u2seg.position import remove_position
from u2seg.scenes import draw_dataset
from u2seg.semantic import collect_files, pixel_probs, read_semantic, segment, segmenter, write_semantic
from u2seg.stage import load_params, run_stage
from u2seg.stego import (
    check_options,
    fit_kmeans,
    fit_stego,
    linear_probe,
    load_stego_checkpoint,
    released_labeller,
    refit_probe,
    step_batch,
)

G = lambda seed=0: torch.Generator().manual_seed(seed)
KNOBS = dict(
    w_self=0.67, w_knn=0.25, w_rand=0.63, b_self=0.08, b_knn=0.02, b_rand=0.3, n_points=4, n_random=2, pointwise=True
)
FIT = (
    dict(n_classes=3, code_dim=4, dropout=0.1, n_iters=12, batch_size=4, lr=1e-2, lr_probe=5e-2, seed=5, log_every=1)
    | KNOBS
)


def plain_loss(f, g, c, s, shift, pointwise=True):
    "Eq. 2 to 4 of STEGO with centring and zero clamp, written out: float64 lists and loops."
    f, g, c, s = (np.asarray(x.detach(), float) for x in (f, g, c, s))
    B, h, w, i_, j_ = f.shape[0], *f.shape[2:], *g.shape[2:]

    def cos(a, b):
        return float(np.dot(a, b) / (max(np.sqrt(np.dot(a, a)), 1e-10) * max(np.sqrt(np.dot(b, b)), 1e-10)))

    grid = [(y, x, v, u) for y in range(h) for x in range(w) for v in range(i_) for u in range(j_)]
    big = {(b, *p): cos(f[b, :, p[0], p[1]], g[b, :, p[2], p[3]]) for b in range(B) for p in grid}
    mean = sum(big.values()) / len(big)
    row = {
        (b, y, x): sum(big[b, y, x, v, u] for v in range(i_) for u in range(j_)) / (i_ * j_)
        for b in range(B)
        for y in range(h)
        for x in range(w)
    }
    total = 0.0
    for b in range(B):
        for y, x, v, u in grid:
            F_ = big[b, y, x, v, u] - (row[b, y, x] - mean if pointwise else 0)
            S_ = cos(c[b, :, y, x], s[b, :, v, u])
            total += -max(S_, 0) * (F_ - shift)
    return total / len(big)


@pytest.mark.parametrize('dtype,tol', [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize('pointwise', [True, False])
def test_loss_equals_the_loops(dtype, tol, pointwise):
    g = G()
    f, f2 = torch.randn(3, 5, 3, 4, generator=g, dtype=dtype), torch.randn(3, 5, 2, 3, generator=g, dtype=dtype) + 0.5
    c, c2 = torch.randn(3, 6, 3, 4, generator=g, dtype=dtype), torch.randn(3, 6, 2, 3, generator=g, dtype=dtype)
    for shift in (-0.3, 0.0, 0.66):
        got = correspondence_loss(f, f2, c, c2, shift, pointwise=pointwise)
        assert abs(got.item() - plain_loss(f, f2, c, c2, shift, pointwise)) < tol


def test_loss_of_zero_vectors_is_finite():
    z = torch.zeros(1, 3, 2, 2, requires_grad=True)
    loss = correspondence_loss(torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 2, 2), z, z, 0.1)
    loss.backward()
    assert loss.item() == 0 and torch.isfinite(z.grad).all()


def test_gradient():
    g = G(1)
    f, f2 = (torch.randn(2, 3, 2, 3, generator=g, dtype=torch.float64) for _ in range(2))
    c, c2 = (torch.randn(2, 4, 2, 3, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda a, b: correspondence_loss(f, f2, a, b, 0.2), (c, c2))
    assert torch.autograd.gradcheck(lambda a: correspondence_loss(f, f, a, a, 0.2), (c,))
    pts = random_points(2, 3, g).double()
    assert torch.autograd.gradcheck(
        lambda a: correspondence_loss(sample(f, pts), sample(f, pts), sample(a, pts), sample(a, pts), 0.2), (c,)
    )
    f.requires_grad_()
    correspondence_loss(f, f2, c, c2, 0.2).backward()
    assert f.grad is None  # the features are a target, nothing learns through them


def test_features_and_codes_lie_on_one_grid():
    x, y = torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 2, 3)
    with pytest.raises(ValueError, match='one grid'):
        correspondence_loss(x, x, y, x, 0.0)
    with pytest.raises(ValueError, match='one grid'):
        correspondence_loss(x, x, x, y, 0.0)


def test_sampling_is_bilinear_with_aligned_corners_and_border():
    x, pts = torch.randn(2, 3, 4, 5, generator=G()), random_points(2, 6, G(1)) * 1.2  # some lie outside
    got = sample(x, pts)
    for b in range(2):
        for i in range(6):
            for j in range(6):
                px, py = ((pts[b, i, j, 0].item() + 1) / 2 * 4, (pts[b, i, j, 1].item() + 1) / 2 * 3)
                px, py = min(max(px, 0), 4), min(max(py, 0), 3)
                x0, y0 = min(int(px), 3), min(int(py), 2)
                fx, fy = px - x0, py - y0
                want = (1 - fy) * ((1 - fx) * x[b, :, y0, x0] + fx * x[b, :, y0, x0 + 1]) + fy * (
                    (1 - fx) * x[b, :, y0 + 1, x0] + fx * x[b, :, y0 + 1, x0 + 1]
                )
                assert torch.allclose(got[b, :, i, j], want, atol=1e-5)


def test_partners_are_a_permutation_with_fixed_points_moved_on():
    seen_fixed = 0
    for seed in range(200):
        b = 2 + seed % 7
        p, raw = random_partners(b, G(seed)), torch.randperm(b, generator=G(seed)).tolist()
        assert p.tolist() == [(v + 1) % b if v == i else v for i, v in enumerate(raw)]
        assert all(v != i for i, v in enumerate(p.tolist()))
        seen_fixed += any(v == i for i, v in enumerate(raw))
    assert seen_fixed > 50  # the rule was needed
    with pytest.raises(ValueError, match='2 or more'):
        random_partners(1, G())


def test_step_loss_is_the_weighted_sum_of_its_pairs():
    g = G(2)
    f, fk = torch.randn(4, 5, 6, 6, generator=g), torch.randn(4, 5, 6, 6, generator=g)
    c, ck = torch.randn(4, 3, 6, 6, generator=g), torch.randn(4, 3, 6, 6, generator=g)
    got = stego_loss(f, c, fk, ck, generator=G(9), **KNOBS)
    g = G(9)
    pa, pb = random_points(4, 4, g), random_points(4, 4, g)
    own = plain_loss(sample(f, pa), sample(f, pa), sample(c, pa), sample(c, pa), KNOBS['b_self'])
    knn = plain_loss(sample(f, pa), sample(fk, pb), sample(c, pa), sample(ck, pb), KNOBS['b_knn'])
    rand = 0
    for _ in range(2):
        p = random_partners(4, g)
        rand += plain_loss(sample(f, pa), sample(f[p], pb), sample(c, pa), sample(c[p], pb), KNOBS['b_rand']) / 2
    assert (
        got['self'].item() == pytest.approx(own, abs=1e-6)
        and got['knn'].item() == pytest.approx(knn, abs=1e-6)
        and got['rand'].item() == pytest.approx(rand, abs=1e-6)
    )
    assert got['loss'].item() == pytest.approx(0.67 * own + 0.25 * knn + 0.63 * rand, abs=1e-6)


def test_step_loss_without_centring():
    g = G(2)
    f, c = torch.randn(3, 5, 6, 6, generator=g), torch.randn(3, 3, 6, 6, generator=g)
    got = stego_loss(f, c, f, c, generator=G(9), **KNOBS | dict(pointwise=False))
    g = G(9)
    pa, pb = random_points(3, 4, g), random_points(3, 4, g)
    knn = plain_loss(sample(f, pa), sample(f, pb), sample(c, pa), sample(c, pb), KNOBS['b_knn'], pointwise=False)
    assert got['knn'].item() == pytest.approx(knn, abs=1e-6)


@pytest.mark.parametrize('block', [1, 7, 4096])
def test_neighbours_equal_brute_force(block):
    x = F.normalize(torch.randn(53, 8, generator=G()), dim=1)
    got = nearest_images(x, 7, block=block)
    cos = (x.double() @ x.double().T).fill_diagonal_(-2)
    assert (got == cos.argsort(1, descending=True)[:, :7]).all()


def test_neighbours_by_products_are_those_of_faiss():
    "What a GPU computes, here on the CPU, in pieces of one row."
    x = F.normalize(torch.randn(53, 8, generator=G()), dim=1)
    got = correspondence._without_itself(correspondence._product_search(x, 8, x), 0)
    assert (torch.from_numpy(got) == nearest_images(x, 7)).all()


def test_finished_blocks_of_neighbours_are_kept(tmp_path):
    x = F.normalize(torch.randn(53, 8, generator=G()), dim=1)
    want = nearest_images(x, 7)
    kept = lambda: nearest_images(x, 7, block=10, folder=tmp_path)
    assert (kept() == want).all()
    files = sorted(tmp_path.rglob('shard_*.json'))
    assert len(files) == 6
    times = [f.stat().st_mtime_ns for f in files]
    files[2].unlink()
    assert (kept() == want).all()
    assert [i for i, f in enumerate(files) if f.stat().st_mtime_ns != times[i]] == [2]


def test_neighbours_of_duplicates_never_hold_the_image_itself():
    x = F.normalize(torch.randn(3, 4, generator=G()), dim=1).repeat_interleave(20, 0)
    got = nearest_images(x, 7)
    assert got.shape == (60, 7) and (got != torch.arange(60)[:, None]).all()
    assert (got // 20 == torch.arange(60)[:, None] // 20).all()
    with pytest.raises(ValueError, match='1 ... 59'):
        nearest_images(x, 60)


def test_head_is_the_sum_of_its_branches_and_drops_channels():
    head, x = Head(6, 4, dropout=0.5), torch.randn(3, 6, 2, 5, generator=G())
    w = {k: v.double() for k, v in head.state_dict().items()}
    flat = x.double().permute(0, 2, 3, 1)
    lin = lambda n, v: v @ w[f'{n}.weight'][:, :, 0, 0].T + w[f'{n}.bias']
    want = lin('linear', flat) + lin('out', lin('hidden', flat).clamp(min=0))
    assert torch.allclose(head(x)[1].double(), want.permute(0, 3, 1, 2), atol=1e-5)
    feat = head(torch.ones(200, 6, 2, 2), G(3))[0]
    assert (
        set(feat.unique().tolist()) == {0.0, 2.0} and (feat.amax((2, 3)) == feat.amin((2, 3))).all()
    )  # whole channels, rescaled
    assert abs((feat == 0).float().mean() - 0.5) < 0.05


def test_probe_moves_the_clusters_alone():
    code, clusters = torch.randn(2, 4, 3, 3, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    loss = probe_loss(code, clusters)
    loss.backward()
    unit = lambda v: v / v.norm()
    want = -np.mean(
        [
            max(float(unit(code.detach()[b, :, y, x]) @ unit(k)) for k in clusters.detach())
            for b in range(2)
            for y in range(3)
            for x in range(3)
        ]
    )
    assert loss.item() == pytest.approx(want, abs=1e-6) and code.grad is None and clusters.grad.abs().sum() > 0


def test_kmeans_reaches_a_fixed_point():
    x = torch.randn(400, 6, generator=G())
    k = spherical_kmeans(x, 5, seed=0, n_iters=200, n_init=2)
    u = F.normalize(x, dim=1)
    label = (u @ k.T).argmax(1)
    for c in range(5):
        assert torch.allclose(F.normalize(u[label == c].mean(0), dim=0), k[c], atol=1e-3)
    assert torch.equal(k, spherical_kmeans(x, 5, seed=0, n_iters=200, n_init=2))
    with pytest.raises(ValueError, match='5 clusters need 5'):
        spherical_kmeans(x[:4], 5, seed=0)


@pytest.fixture
def features():
    return torch.randn(10, 5, 4, 4, generator=G(7)), torch.randint(1, 10, (10, 3), generator=G(8))


def test_other_settings_start_anew_and_seeds_matter(features, tmp_path):
    a = fit_stego(*features, folder=tmp_path, **FIT)
    b = fit_stego(*features, folder=tmp_path, **FIT | dict(seed=6))
    c = fit_stego(*features, folder=tmp_path / 'c', **FIT | dict(seed=6))
    assert not torch.equal(a.clusters, b.clusters) and torch.equal(b.clusters, c.clusters)


def test_other_neighbours_start_anew(features, tmp_path, monkeypatch):
    x, near = features
    steps, step = [], stego._train_step
    monkeypatch.setattr(stego, '_train_step', lambda i, *a: (steps.append(i), step(i, *a))[1])
    knobs = FIT | dict(n_iters=4)
    for n in (near, near, near.flip(0)):
        fit_stego(x, n, folder=tmp_path, **knobs)
    assert steps == [0, 1, 2, 3] * 2


def test_training_does_not_touch_the_global_generator(features, tmp_path):
    torch.manual_seed(3)
    want = torch.rand(2)
    torch.manual_seed(3)
    fit_stego(*features, folder=tmp_path, **FIT)
    assert torch.equal(torch.rand(2), want)


def test_nan_stops_and_keeps_the_last_good_state(features, tmp_path, monkeypatch):
    feats, neighbors = features
    step = stego._train_step
    monkeypatch.setattr(
        stego, '_train_step', lambda t, *args: step(t, *args) | (dict(loss=float('nan')) if t == 8 else {})
    )
    with pytest.raises(RuntimeError, match='nan at step 8'):
        fit_stego(feats, neighbors, folder=tmp_path, checkpoint_every=4, **FIT)
    assert torch.load(tmp_path / 'checkpoint.pt', weights_only=True)['step'] == 8


def test_epochs_cover_every_view():
    for epoch in range(3):
        assert torch.cat([step_batch(epoch * 4 + t, 13, 3, seed=1) for t in range(4)]).unique().numel() == 12
    assert step_batch(0, 3, 8, seed=0).sort().values.tolist() == [0, 1, 2]


def test_training_learns_what_the_features_say(tmp_path):
    truth = torch.arange(4).repeat(4).view(1, 1, 16).expand(12, 4, 16)[:, :, :]  # stripes of four classes
    feats = torch.eye(6)[truth].permute(0, 3, 1, 2) + 0.2 * torch.randn(12, 6, 4, 16, generator=G())
    neighbors = torch.stack([(torch.arange(12) + i) % 12 for i in (1, 2, 3)], 1)
    lab = refit_probe(
        fit_stego(feats, neighbors, folder=tmp_path, **FIT | dict(n_iters=150, n_classes=4, n_points=6)), feats, seed=0
    )
    found = lab.log_prob(lab.code(feats), 1.0).argmax(1)
    assert sum(torch.bincount(truth[found == c]).max().item() for c in found.unique()) / truth.numel() > 0.95
    probe = linear_probe(lab, feats, truth, n_classes=4, seed=0, n_iters=60, lr=0.05)
    assert (probe(lab.code(feats)).argmax(1) == truth).float().mean() > 0.95
    a, b = (
        linear_probe(lab, feats, t, n_classes=4, seed=0, n_iters=3).weight
        for t in (torch.where(truth == 1, 255, truth), torch.where(truth == 1, 255, truth))
    )
    assert torch.equal(a, b)


def extract(x):
    return torch.cat([F.avg_pool2d(x, 8), F.avg_pool2d(x.square(), 8)], 1)


@pytest.fixture
def pictures(tmp_path):
    "Six images of three sizes, one of them broken."
    sizes = [(40, 64), (40, 64), (33, 50), (64, 40), (24, 24), (40, 64)]
    for i, (h, w) in enumerate(sizes):
        rng = np.random.default_rng(i)
        Image.fromarray(
            np.kron(rng.integers(0, 256, (4, 4, 3)), np.ones((h // 4 + 1, w // 4 + 1, 1)))[:h, :w].astype(np.uint8)
        ).save(tmp_path / f'{i}.png')
    (tmp_path / '4.png').write_bytes((tmp_path / '4.png').read_bytes()[:60])
    return tmp_path, [dict(id=i + 1, file_name=f'{i}.png') for i in range(6)]


def test_five_crops(pictures):
    root, files = pictures
    source = PatchFeatures(extract, root, files[:2], size=32, crops='five')
    image = read_image(root / '1.png')
    corners = [image[:20, :32], image[:20, 32:], image[20:, :32], image[20:, 32:], image[10:30, 16:48]]
    assert len(source) == 10
    for c, part in enumerate(corners):
        assert torch.equal(source.read(5 + c), normalize(to_tensor(training_view(part, 32))))
    with pytest.raises(ValueError, match="'none' or 'five'"):
        PatchFeatures(extract, root, files, size=32, crops='ten')


def test_cache_equals_live_and_broken_files_are_named(pictures):
    root, files = pictures
    source = PatchFeatures(extract, root, files, size=32, crops='five')
    again = PatchFeatures(extract, root, files, size=32, crops='five')
    pooled, skipped = pool_features(source, folder=root / 'a', key={}, batch_size=4)
    pooled2, skipped2 = pool_features(again, folder=root / 'b', key={}, batch_size=7)
    assert [s['file_name'] for s in skipped] == [s['file_name'] for s in skipped2] == ['4.png']
    assert torch.allclose(pooled, pooled2, atol=1e-5) and torch.allclose(pooled.norm(dim=1), torch.ones(25))
    cache = keep_features(source, max_gb=1)
    assert keep_features(again, max_gb=1e-9) is again
    assert cache.dtype == torch.float16 and len(cache) == len(again) == len(pooled) == 25
    i = torch.tensor([0, 19, 20, 24])  # beyond the broken file
    assert torch.allclose(cache[i].float(), again[i], atol=5e-3)
    assert torch.allclose(pooled[i], F.normalize(again[i].mean((2, 3)), dim=1), atol=1e-5)
    with pytest.raises(ValueError, match='none of 1'):
        pool_features(PatchFeatures(extract, root, files[4:5], size=32), folder=root / 'c', key={})


def test_pooled_features_are_made_once_and_again_for_another_image(pictures):
    root, files = pictures
    seen = []

    def counted(x):
        seen.append(len(x))
        return extract(x)

    def pool():
        source = PatchFeatures(counted, root, files, size=32)
        return pool_features(source, folder=root / 'work', key=dict(weights='w'), batch_size=3)[0]

    first = pool()
    assert sum(seen) == 5 and torch.equal(pool(), first) and sum(seen) == 5
    image = np.asarray(Image.open(root / '0.png'))
    Image.fromarray(255 - image).save(root / '0.png')
    os.utime(root / '0.png', (1e9, 1e9))
    assert not torch.equal(pool()[0], first[0]) and sum(seen) == 8  # the batch of that image alone


@pytest.fixture
def labeller():
    return Labeller(Head(6, 4), torch.randn(5, 4, generator=G(4))).eval().requires_grad_(False)


ARGS = dict(size=32, patch_size=8, alpha=2.0, flip=True, crf=None)


def test_maps_do_not_depend_on_company(pictures, labeller):
    root, files = pictures
    images = [read_image(root / f['file_name']) for f in files if f['id'] != 5]
    together = segment(labeller, extract, images, **ARGS)
    for image, m in zip(images, together):
        assert m.dtype == np.uint8 and m.shape == image.shape[:2]
        assert (m != segment(labeller, extract, [image], **ARGS)[0]).mean() < 0.002


def test_a_large_image_is_refined_at_half_a_megapixel(labeller, monkeypatch):
    "Of 2048 x 1024 px at half the size: each label of the small map is a square of four pixels."
    noise = np.random.default_rng(0).integers(0, 256, (8, 16, 3), dtype=np.uint8)
    image = np.array(Image.fromarray(noise).resize((2048, 1024)))
    m = segment(labeller, extract, [image], **ARGS)[0]
    code = semantic.patch_codes(labeller, extract, [image], size=32, patch_size=8, flip=True)
    small = pixel_probs(labeller, code, (512, 1024), alpha=2.0)[0].argmax(0).numpy()
    assert len(np.unique(m)) > 1 and np.array_equal(m, small.repeat(2, 0).repeat(2, 1))
    odd = image[:1000, :1999]
    assert segment(labeller, extract, [odd], **ARGS)[0].shape == (1000, 1999)
    monkeypatch.setattr(semantic, 'PIXELS', 1000)  # a CRF that takes no time
    m = segment(labeller, extract, [image[:64, :90]], certainty=True, **ARGS | dict(crf=STEGO))[0]
    assert m.shape == (2, 64, 90) and np.array_equal(m[:, 0, 0], m[:, 1, 1])


def test_flip_and_temperature(pictures, labeller):
    image = read_image(pictures[0] / '0.png')
    m, back = (
        segment(labeller, extract, [image], **ARGS)[0],
        segment(labeller, extract, [image[:, ::-1].copy()], **ARGS)[0][:, ::-1],
    )
    assert (m != back).mean() < 0.002
    code = torch.randn(1, 4, 3, 3, generator=G())
    p1, p2 = (pixel_probs(labeller, code, (3, 3), alpha=a)[0] for a in (1.0, 2.0))
    assert torch.allclose(p1.sum(0), torch.ones(3, 3)) and torch.allclose(
        p2, F.normalize(p1**2, p=1, dim=0), atol=1e-6
    )  # temperature = power
    u, k = F.normalize(code[0, :, 1, 2], dim=0), F.normalize(labeller.clusters, dim=1)
    assert torch.allclose(p2[:, 1, 2], (2 * k @ u).softmax(0), atol=1e-6)


def test_crf_follows_the_image(labeller):
    image = np.zeros((32, 32, 3), np.uint8)
    for y in range(32):
        image[y, 10 + 6 * (y // 4 % 2) :] = 255  # teeth of 4 px that patches of 8 px cannot see
    lab = Labeller(PcaHead(torch.zeros(6), torch.eye(6)[:3]), torch.tensor([[1.0, 1, 1], [-1.0, -1, -1]]))
    crf = dict(
        n_iters=10, gauss_weight=3.0, gauss_sxy=1.0, bilateral_weight=4.0, bilateral_sxy=67.0, bilateral_srgb=3.0
    )
    rough, fine = (segment(lab, extract, [image], **ARGS | dict(crf=c, alpha=1.0))[0] for c in (None, crf))
    want = (image[..., 0] == 0).astype(int)
    assert (rough == want).mean() < 0.95 and (fine == want).mean() > 0.99


def test_export_resumes_and_survives_the_pipelines_clearing(pictures, labeller, monkeypatch):
    root, files = pictures
    run = lambda: write_semantic(
        labeller, extract, root, files, root / 'semantic', work_folder=root / 'work', batch_size=2, **ARGS
    )
    records, skipped = run()
    assert [s['file_name'] for s in skipped] == ['4.png'] and [r['id'] for r in records] == [1, 2, 3, 4, 6]
    want = {p.name: p.read_bytes() for p in (root / 'semantic').iterdir()}
    assert sorted(want) == [f'{i:012d}.png' for i in (1, 2, 3, 4, 6)]
    for r in records:
        m = read_semantic(root / 'semantic' / f"{r['id']:012d}.png")
        assert (
            m.shape == read_image(root / files[r['id'] - 1]['file_name']).shape[:2]
            and m.max() < 5
            and np.bincount(m.ravel(), minlength=5).tolist() == r['counts']
        )
    import shutil

    shutil.rmtree(root / 'semantic')
    monkeypatch.setattr(semantic, 'segment', lambda *a, **k: 1 / 0)  # finished work is not done again
    run()
    assert want == {p.name: p.read_bytes() for p in (root / 'semantic').iterdir()}
    labeller.clusters += 1
    with pytest.raises(ZeroDivisionError):
        run()  # but another labeller starts anew


def test_a_replaced_image_has_its_map_anew(pictures, labeller):
    root, files = pictures
    run = lambda to: write_semantic(
        labeller, extract, root, files, root / 'semantic', work_folder=root / to, batch_size=2, **ARGS
    )
    run('work')
    for i in (0, 4):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (30, 50, 3), dtype=np.uint8)).save(
            root / files[i]['file_name']
        )
    made = [(run(to), {p.name: p.read_bytes() for p in (root / 'semantic').iterdir()}) for to in ('work', 'fresh')]
    assert (
        made[0] == made[1]
        and made[0][0][1] == []
        and read_semantic(root / 'semantic' / '000000000001.png').shape == (30, 50)
    )


def test_processes_write_the_same_maps(pictures):
    from u2seg.features import ViTFeatures

    torch.manual_seed(0)
    vit = ViTFeatures(dict(img_size=32, patch_size=8, embed_dim=12, depth=2, num_heads=2))
    lab, (root, files) = Labeller(Head(12, 4), torch.randn(5, 4, generator=G(4))).eval().requires_grad_(False), pictures
    made = []
    for n in (1, 2):  # three shards for two processes
        records, skipped = write_semantic(
            lab,
            extractor(vit, 'block0'),
            root,
            files,
            root / f'maps{n}',
            work_folder=root / f'work{n}',
            n_procs=n,
            batch_size=2,
            shard_size=2,
            **ARGS,
        )
        made.append((records, skipped, {p.name: p.read_bytes() for p in (root / f'maps{n}').iterdir()}))
    assert made[0] == made[1] and [s['file_name'] for s in skipped] == ['4.png'] and len(records) == 5
    with pytest.raises(ValueError, match='1 or more, got 0'):
        write_semantic(lab, extract, root, files, root / 'maps0', work_folder=root / 'work0', n_procs=0, **ARGS)


def test_another_backbone_is_asked_again(pictures, labeller, monkeypatch):
    root, files = pictures
    run = lambda name: write_semantic(
        labeller, extract, root, files, root / 'semantic', work_folder=root / 'work', key=dict(weights=name), **ARGS
    )
    run('one')
    monkeypatch.setattr(semantic, 'segment', lambda *a, **k: 1 / 0)
    run('one')
    with pytest.raises(ZeroDivisionError):
        run('two')


@pytest.mark.parametrize('interpolation', ['timm', 'dino'])
def test_a_blocks_tokens_go_no_further_than_the_block(interpolation):
    from u2seg.features import ViTFeatures

    torch.manual_seed(0)
    vit = ViTFeatures(dict(img_size=32, patch_size=8, embed_dim=12, depth=3, num_heads=2), interpolation=interpolation)
    torch.nn.init.normal_(vit.vit.pos_embed)
    x, ran = torch.randn(2, 3, 40, 56, generator=G(1)), []
    for b in vit.vit.blocks:
        b.register_forward_hook(lambda m, i, o: ran.append(o))
    vit.patches(x)
    want, ran[:] = [o[:, 1:].transpose(1, 2).reshape(2, 12, 5, 7) for o in ran], []
    for i in range(3):
        assert torch.equal(extractor(vit, f'block{i}')(x), want[i]) and len(ran) == i + 1
        ran.clear()


def test_blocks_of_a_rotary_vit():
    from u2seg.features import ViTFeatures

    torch.manual_seed(0)
    vit = ViTFeatures('vit_tiny_patch16_dinov3_qkvb')
    x = torch.randn(1, 3, 32, 48)
    last = extractor(vit, f'block{len(vit.vit.blocks) - 1}')(x)
    norm = vit.vit.norm(last.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    assert torch.allclose(norm, vit.patches(x), atol=1e-5)


@pytest.mark.parametrize('shape', [(16, 4000), (4000, 16), (16, 60)])
def test_a_very_wide_image_costs_a_bounded_number_of_patches(labeller, shape):
    seen = []
    m = segment(
        labeller,
        lambda x: (seen.append(x.shape[2:]), extract(x))[1],
        [np.zeros((*shape, 3), np.uint8)],
        size=32,
        patch_size=8,
        alpha=2.0,
        flip=False,
        crf=None,
    )[0]
    assert m.shape == shape and max(seen[0]) <= 4 * 32 and (max(shape) > 64 or seen[0] == (32, 120))


def test_many_collect_the_same_files_at_once(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    names = [f'{i}.png' for i in range(300)]
    for d in 'ab':
        (tmp_path / d).mkdir()
    for n in names:
        (tmp_path / 'a' / n).write_text(n)
    for _ in range(3):
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _: collect_files(tmp_path / 'a', tmp_path / 'b', names), range(8)))
        assert {p.name: p.read_text() for p in (tmp_path / 'b').iterdir()} == {n: n for n in names}


def test_collect_files_empties_its_target(tmp_path):
    for d, n in (('a', 'x'), ('b', 'old')):
        (tmp_path / d).mkdir()
        (tmp_path / d / n).write_text(d)
    collect_files(tmp_path / 'a', tmp_path / 'b', ['x'])
    assert [p.name for p in (tmp_path / 'b').iterdir()] == ['x']


def test_read_semantic_refuses(tmp_path):
    Image.new('RGB', (3, 3)).save(tmp_path / 'rgb.png')
    (tmp_path / 'text.png').write_text('no')
    for name, why in (('rgb.png', '8-bit'), ('text.png', 'not a readable'), ('none.png', 'no such')):
        with pytest.raises(ValueError, match=f'{name}.*{why}'):
            read_semantic(tmp_path / name)


def test_saved_labellers_come_back(tmp_path, labeller):
    x = torch.randn(2, 6, 5, 5, generator=G())
    for lab in (labeller, fit_kmeans(x, n_classes=3, code_dim=4, smooth=3, seed=0)):
        save_labeller(tmp_path / 'head.safetensors', lab, dict(size=128, crf=None))
        back, settings = load_labeller(tmp_path / 'head.safetensors')
        assert (
            torch.equal(back.code(x), lab.code(x))
            and torch.equal(back.clusters, lab.clusters)
            and settings == dict(size=128, crf=None)
        )
    (tmp_path / 'no.safetensors').write_bytes(b'none')
    with pytest.raises(ValueError, match='no.safetensors'):
        load_labeller(tmp_path / 'no.safetensors')


def test_kmeans_baseline_is_pca_and_smoothing():
    x = torch.randn(8, 6, 5, 5, generator=G()) * torch.tensor([5.0, 4, 3, 0.1, 0.1, 0.1]).view(1, 6, 1, 1) + 2
    lab = fit_kmeans(x, n_classes=3, code_dim=3, smooth=1, seed=0)
    basis = lab.head.basis
    assert torch.allclose(basis @ basis.T, torch.eye(3), atol=1e-5) and basis[:, 3:].abs().max() < 0.1
    smooth = PcaHead(lab.head.mean, basis, smooth=3)(x)[1]
    assert torch.allclose(smooth[:, :, 2, 2], lab.code(x)[:, :, 1:4, 1:4].mean((2, 3)), atol=1e-5)
    assert torch.allclose(smooth[:, :, 0, 0], lab.code(x)[:, :, :2, :2].mean((2, 3)), atol=1e-5)
    with pytest.raises(ValueError, match='odd'):
        PcaHead(lab.head.mean, basis, smooth=2)


def test_segmenter_rebuilds_the_stage_from_its_file(tmp_path):
    from u2seg.features import ViTFeatures

    torch.manual_seed(0)
    vit = ViTFeatures(dict(img_size=32, patch_size=8, embed_dim=12, depth=2, num_heads=2))
    image = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    lab = Labeller(Head(12, 4), torch.randn(5, 4, generator=G(4))).eval().requires_grad_(False)
    for feature in ('patches', 'keys', 'block0'):
        save_labeller(
            tmp_path / 'head.safetensors', lab, dict(feature=feature, size=32, alpha=2.0, flip=True, crf=None)
        )
        want = segment(lab, extractor(vit, feature), [image], **ARGS)[0]
        assert (segmenter(tmp_path / 'head.safetensors', vit)([image])[0] == want).all()
    weights = torch.randn(5, 12, generator=G(7))  # what place says about the features, removed in training
    corrected = lambda x: remove_position(extractor(vit, 'block0')(x), weights)
    settings = dict(feature='block0', position=weights.tolist(), size=32, alpha=2.0, flip=True, crf=None)
    save_labeller(tmp_path / 'head.safetensors', lab, settings)
    got, unlike = segmenter(tmp_path / 'head.safetensors', vit)([image])[0], want
    want = segment(lab, corrected, [image], **ARGS)[0]
    assert (got == want).all() and (got != unlike).any()
    seen = []
    vit.vit.blocks[0].register_forward_hook(lambda m, i, o: seen.append(o))
    got = extractor(vit, 'block0')(torch.zeros(1, 3, 32, 40))
    assert torch.allclose(got, seen[0][:, 1:].transpose(1, 2).unflatten(2, (4, 5)))
    with pytest.raises(ValueError, match='block0, block1, got'):
        extractor(vit, 'block2')


def test_the_baseline_trains_nothing_and_a_new_probe_keeps_the_codes(features, tmp_path):
    feats, neighbors = features
    trained = fit_stego(feats, neighbors, folder=tmp_path, **FIT)
    refit = refit_probe(trained, feats, seed=5)
    plain = fit_kmeans(feats, n_classes=3, code_dim=4, smooth=1, seed=5)
    assert torch.equal(trained.code(feats), refit.code(feats))
    assert not torch.equal(trained.clusters, refit.clusters)
    assert isinstance(plain.head, PcaHead)


GOOD = dict(
    labeller='stego',
    probe='sgd',
    feature='keys',
    size=64,
    crops='five',
    n_classes=27,
    batch_size=2,
    dropout=0.0,
    smooth=1,
    segment=dict(size=32, alpha=1.0),
    crf=None,
    counts=dict(n_points=1),
    positive=dict(max_gb=0.1),
)


@pytest.mark.parametrize(
    'bad, words',
    [
        (dict(labeller='steg'), "labeller must be one of stego, smooseg, cause, kmeans, or a .* STEGO, got 'steg'"),
        (dict(probe='em'), 'probe must be'),
        (dict(feature='block'), 'feature must be'),
        (dict(crops='ten'), 'crops must be'),
        (dict(size=31), 'size must be 32'),
        (dict(segment=dict(size=31, alpha=1.0)), 'segment.size must be 32'),
        (dict(n_classes=1), 'n_classes must lie in 2'),
        (dict(segment=dict(size=32, alpha=0.0)), 'segment.alpha must'),
        (dict(batch_size=1), 'batch_size must be 2'),
        (dict(dropout=1.0), r'dropout must lie in \[0, 1\)'),
        (dict(smooth=2), 'smooth must be odd'),
        (dict(counts=dict(n_points=0)), 'n_points must be 1'),
        (dict(positive=dict(lr=0.0)), 'lr must be positive'),
    ],
)
def test_rules_of_the_parameters(bad, words):
    check_options(**GOOD)
    with pytest.raises(ValueError, match=words):
        check_options(**GOOD | bad)


def release_names(code_dim=4):
    g = G()
    r = lambda *s: torch.randn(*s, generator=g)
    return {
        'net.model.cls_token': r(1, 1, 6),
        'net.cluster1.0.weight': r(code_dim, 6, 1, 1),
        'net.cluster1.0.bias': r(code_dim),
        'net.cluster2.0.weight': r(6, 6, 1, 1),
        'net.cluster2.0.bias': r(6),
        'net.cluster2.2.weight': r(code_dim, 6, 1, 1),
        'net.cluster2.2.bias': r(code_dim),
        'cluster_probe.clusters': r(27, code_dim),
        'train_cluster_probe.clusters': r(27, code_dim),
        'linear_probe.weight': r(27, code_dim, 1, 1),
        'linear_probe.bias': r(27),
        'decoder.weight': r(6, code_dim, 1, 1),
    }


class FakeConfig:  # pickles as omegaconf's class does: by reference, with a state of nested objects
    def __init__(self, content):
        self.content = content

    def __getstate__(self):
        return dict(_content=self.content, _metadata=dict(ref_type=__import__('typing').Any, element_type=dict))

    def __setstate__(self, state):
        raise AssertionError('code of the checkpoint ran')


def test_released_checkpoint(tmp_path, monkeypatch):
    for name in ('omegaconf', 'omegaconf.dictconfig'):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    FakeConfig.__module__, FakeConfig.__qualname__, FakeConfig.__name__ = (
        'omegaconf.dictconfig',
        'DictConfig',
        'DictConfig',
    )
    sys.modules['omegaconf.dictconfig'].DictConfig = FakeConfig
    import collections

    config = FakeConfig(collections.defaultdict(dict, dim=FakeConfig(4), names=[FakeConfig('a')]))
    names = release_names()
    torch.save(
        {
            'state_dict': collections.OrderedDict(names),
            'epoch': 3,
            'pytorch-lightning_version': '1.4',
            'callbacks': {FakeConfig: {'best': torch.tensor(1.0)}},
            'hyper_parameters': {'n_classes': 27, 'cfg': config},
            'optimizer_states': [],
        },
        tmp_path / 'stego.ckpt',
    )
    for name in ('omegaconf', 'omegaconf.dictconfig'):
        monkeypatch.delitem(sys.modules, name)  # not installed where it is read
    lab, probe = load_stego_checkpoint(tmp_path / 'stego.ckpt')
    assert lab.clusters.shape == (27, 4) and torch.equal(probe['weight'], names['linear_probe.weight'])
    x = torch.randn(1, 6, 3, 3, generator=G(1))
    conv = lambda v, n: F.conv2d(v, names[f'{n}.weight'], names[f'{n}.bias'])
    want = conv(x, 'net.cluster1.0') + conv(F.relu(conv(x, 'net.cluster2.0')), 'net.cluster2.2')
    assert torch.allclose(lab.code(x), want, atol=1e-5)


@pytest.mark.parametrize('function,args', [(os.mkdir, 1), (eval, 2), (exec, 2)])
def test_checkpoint_with_code_is_refused_and_nothing_runs(tmp_path, function, args):
    mark = tmp_path / 'ran'

    class Harm:
        def __reduce__(self):
            return function, (str(mark),) if args == 1 else (f"__import__('os').mkdir({str(mark)!r})",)

    torch.save(dict(state_dict=release_names(), hyper_parameters=Harm()), tmp_path / 'harm.ckpt')
    with pytest.raises(ValueError, match=function.__name__):
        load_stego_checkpoint(tmp_path / 'harm.ckpt')
    assert not mark.exists()


def test_checkpoint_that_is_none(tmp_path):
    names = release_names()
    del names['net.cluster2.0.weight']
    torch.save(dict(state_dict=names), tmp_path / 'half.ckpt')
    with pytest.raises(ValueError, match='net.cluster2.0.weight is missing'):
        load_stego_checkpoint(tmp_path / 'half.ckpt')
    (tmp_path / 'text.ckpt').write_text('no checkpoint')
    with pytest.raises(ValueError, match='text.ckpt: is text, not weights'):
        load_stego_checkpoint(tmp_path / 'text.ckpt')


def test_the_stage_takes_a_released_labeller_of_its_own_size_alone(tmp_path):
    path = tmp_path / 'stego.ckpt'
    torch.save(dict(state_dict=release_names()), path)
    x = torch.randn(2, 6, 3, 3, generator=G(1))
    assert torch.equal(
        released_labeller(path, dim=6, n_classes=27).code(x),
        load_stego_checkpoint(path)[0].code(x),
    )
    for wrong, words in ((dict(dim=16, n_classes=27), '6 features'), (dict(dim=6, n_classes=14), '27 classes')):
        with pytest.raises(ValueError, match=f'stego.ckpt: is of {words}, the stage has'):
            released_labeller(path, **wrong)
    check_options(**GOOD | dict(labeller='stego.ckpt'), root=tmp_path)
    with pytest.raises(ValueError, match='or a checkpoint of the official code'):
        check_options(**GOOD | dict(labeller='none.ckpt'), root=tmp_path)


def test_the_stage_runs_on_a_released_checkpoint(tmp_path, monkeypatch):
    "The notebook itself: nothing is trained, the maps are those of the released labeller."
    repo = Path(__file__).parents[1]
    (tmp_path / 'nbs').symlink_to(repo / 'nbs')
    draw_dataset(tmp_path / 'data', seed=1, n_train=6, n_val=2, kinds=('objects',))
    vit = dict(img_size=32, embed_dim=6, depth=1, num_heads=1, patch_size=8)
    write_backbone(tmp_path / 'out' / 'features' / 'backbone.safetensors', ViTFeatures(vit).vit, vit)
    torch.save(dict(state_dict=release_names(), epoch=1), tmp_path / 'stego.ckpt')
    params = load_params(repo)
    params['data'] |= dict(root='data', train=['objects/train'], val=['objects/val'])
    params['stego'] |= dict(labeller='stego.ckpt', feature='patches', n_classes=27, size=64, crf=None, n_procs=1)
    (tmp_path / 'params.yaml').write_text(yaml.safe_dump(params))
    monkeypatch.chdir(tmp_path)
    run_stage('stego', tmp_path)
    used, _ = load_labeller(tmp_path / 'out' / 'stego' / 'head.safetensors')
    x = torch.randn(1, 6, 3, 3, generator=G(1))
    assert torch.equal(used.code(x), load_stego_checkpoint(tmp_path / 'stego.ckpt')[0].code(x))
    assert len(list((tmp_path / 'out' / 'stego' / 'semantic').glob('*.png'))) == 6
    assert (tmp_path / 'out' / 'stego' / 'log.csv').read_text() == 'step,loss\n'


def test_published_settings_are_complete_sections():
    import nbformat, yaml
    from pathlib import Path
    from u2seg.recipes import compose
    from u2seg.stage import declared, run_check, stage_notebook, stage_values

    root = Path(__file__).parents[1]
    nb = nbformat.read(stage_notebook(root, 'stego'), 4)
    files = sorted((root / 'configs' / 'stego').glob('*.yaml'))
    assert [f.stem for f in files] == [
        'cityscapes_vit_base',
        'cityscapes_vit_small',
        'coco27_cause',
        'coco27_smooseg',
        'coco27_vit_base',
        'coco27_vit_small',
    ]
    code_dims = dict(cityscapes_vit_base=100, cityscapes_vit_small=70, coco27_vit_small=70, coco27_smooseg=64)
    for f in files:
        params = yaml.safe_load(compose(f'stego/{f.stem}', root))
        values = stage_values('stego', params, declared(nb))
        run_check('stego', nb, values | {'root': '.'})
        s = params['stego']
        assert (
            s['code_dim'] == code_dims.get(f.stem, 90)
            and s['n_classes'] == 27
            and s['pointwise'] == (f.stem != 'cityscapes_vit_base')  # its checkpoint was trained without
            and s['probe'] == 'sgd'
            and s['crops'] == 'five'
        )
    shifts = {
        f.stem: [
            yaml.safe_load(compose(f'stego/{f.stem}', root))['stego'][k]
            for k in ('w_self', 'w_knn', 'w_rand', 'b_self', 'b_knn', 'b_rand')
        ]
        for f in files
    }
    assert shifts['coco27_vit_small'] == [0.67, 0.25, 0.63, 0.08, 0.02, 0.66]  # as published
    assert shifts['coco27_vit_base'] == pytest.approx([0.1, 1, 0.1538476246, 0.12, 0.2, 1])
    of = lambda name: yaml.safe_load(compose(f'stego/{name}', root))['stego']
    steps = {name: (of(name)['n_iters'], of(name)['batch_size']) for name in shifts if '_vit_' in name}
    base, small = (7000, 32), (5000, 16)  # of the checkpoints; of train_config.yml
    assert steps == dict(
        coco27_vit_base=base, cityscapes_vit_base=base, coco27_vit_small=small, cityscapes_vit_small=small
    )


def test_maps_of_another_list_of_images_are_not_taken_over(tmp_path):
    "Ids name the maps, and another list gives them to other images."
    for name, value in (('black', 0), ('white', 255)):
        Image.fromarray(np.full((32, 32, 3), value, np.uint8)).save(tmp_path / f'{name}.png')
    clusters = torch.tensor([[1.0, 1, 1], [-1.0, -1, -1]])
    labels = Labeller(PcaHead(torch.zeros(3), torch.eye(3)), clusters).eval().requires_grad_(False)

    def made(*names):
        images = [dict(id=i, file_name=f'{n}.png') for i, n in enumerate(names, 1)]
        options = dict(size=32, patch_size=8, alpha=2.0, flip=False, crf=None, work_folder=tmp_path / 'work')
        write_semantic(labels, partial(F.avg_pool2d, kernel_size=8), tmp_path, images, tmp_path / 'out', **options)
        return [int(read_semantic(tmp_path / 'out' / f'{i:012d}.png')[0, 0]) for i, _ in enumerate(names, 1)]

    (black,), (white, again) = made('black'), made('white', 'black')
    assert made('black') == [black] == [again] != [white]
