"""Pretraining: views that tell the truth, losses by brute force, runs that survive a kill."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from u2seg import pretrain as P
from u2seg import views as V
from u2seg.scenes import draw_images

model = dict(img_size=48, embed_dim=24, depth=1, num_heads=2, patch_size=8, stem_channels=[6, 8, 12])
knobs = dict(
    model=model,
    n_composed=2,
    composed_size=48,
    n_patches=6,
    n_plain=4,
    image_size=32,
    patch_weight=1.0,
    image_weight=1.0,
    patch_temperature=0.2,
    image_temperature=0.2,
    lr=1e-3,
    weight_decay=0.05,
    warmup_iters=3,
    ema_decay=0.99,
    bf16=False,
    seed=0,
    save_every=20,
)


@pytest.fixture(scope='module')
def images():
    return draw_images(0, 16, 'objects', 1)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


# --- views


def test_a_cut_takes_the_pixels_of_its_box():
    x = torch.arange(64.0).reshape(1, 1, 8, 8)
    # centre right, top: the upper right quarter
    quarter = V.box(*(torch.tensor([v]) for v in (0.5, -0.5, 0.5, 0.5, 1.0)))
    torch.testing.assert_close(V.cut(x, quarter, 4), x[..., :4, 4:])
    mirrored = V.box(*(torch.tensor([v]) for v in (0.5, -0.5, 0.5, 0.5, -1.0)))
    torch.testing.assert_close(V.cut(x, mirrored, 4), x[..., :4, 4:].flip(3))


def test_boxes_lie_inside_and_have_the_asked_area():
    m = V.random_box(2000, 0.3, 0.5, generator())
    w, h, x, y = m[:, 0, 0].abs(), m[:, 1, 1], m[:, 0, 2], m[:, 1, 2]
    assert ((x.abs() + w <= 1 + 1e-6) & (y.abs() + h <= 1 + 1e-6)).all() and 0.4 < (m[:, 0, 0] < 0).float().mean() < 0.6
    assert 0.3 - 1e-5 <= (w * h).min() < 0.32
    assert 0.48 < (w * h).max() <= 0.5 + 1e-5 and 0.75 - 1e-5 <= (w / h).min() and (w / h).max() <= 4 / 3 + 1e-5


def test_the_calm_corner_is_the_one_with_the_least_colour():
    x = torch.rand(8, 3, 128, 128, generator=generator())
    where = [(i, j) for i in (0, 1) for j in (0, 1)] * 2
    for k, (i, j) in enumerate(where):
        x[k, :, i * 64 : i * 64 + 64, j * 64 : j * 64 + 64] = 0.5  # one quarter is plain
    m = V.calm_corner(x, generator(1))
    for k, (i, j) in enumerate(where):
        assert (m[k, 0, 2] > 0, m[k, 1, 2] > 0) == (bool(j), bool(i)) and 0.3 <= m[k, 1, 1] <= 0.5
        assert abs(m[k, 0, 2].abs() + m[k, 0, 0].abs() - 1) < 1e-6  # flush with the corner
        assert abs(m[k, 1, 2].abs() + m[k, 1, 1] - 1) < 1e-6
    assert (V.cut(x, m, 32) - 0.5).abs().amax((1, 2, 3)).max() < 1e-6


def test_recolour_pixel_by_pixel():
    "The formula, one pixel at a time, with the numbers drawn in the same order."
    g, x = generator(3), torch.rand(2, 3, 2, 2, generator=generator(1)) * 0.2 + 0.4  # mid grey: nothing is clipped
    draws = [torch.rand(2, generator=g) for _ in range(5)]
    m, inverse = V.YIQ.double(), V.YIQ.double().inverse()
    got = V.recolour(x, generator(3), hue=0.6, contrast=0.3, brightness=0.1, grey=0.5)
    for i in range(2):
        angle, s = (2 * draws[0][i] - 1) * 0.6, 0.0 if draws[2][i] < 0.5 else draws[1][i] + 0.5
        gain, shift, mean = 1 + 0.3 * (2 * draws[3][i] - 1), 0.1 * (2 * draws[4][i] - 1), x[i].mean((1, 2))
        for p in range(4):
            luma, a, b = (m @ ((x[i].flatten(1)[:, p] - mean) * gain + mean).double()).tolist()
            turned = torch.tensor(
                [
                    luma,
                    s * (math.cos(angle) * a - math.sin(angle) * b),
                    s * (math.sin(angle) * a + math.cos(angle) * b),
                ],
                dtype=torch.double,
            )
            torch.testing.assert_close(
                got[i].flatten(1)[:, p].double(), (inverse @ turned + shift).clamp(0, 1), atol=2e-3, rtol=0
            )


def test_hue_is_lost_and_luma_is_kept():
    x = torch.tensor([0.5, 0.3, 0.6])[None, :, None, None].expand(64, 3, 4, 4)
    y = V.recolour(x, generator(), contrast=0.0, brightness=0.0, grey=0.0)
    torch.testing.assert_close(
        torch.einsum('i,nihw->nhw', V.YIQ[0], y).mean(),
        torch.einsum('i,i->', V.YIQ[0], x[0, :, 0, 0]),
        atol=0.01,
        rtol=0,
    )
    assert (y[:, 0] > y[:, 1]).float().mean().sub(0.5).abs() < 0.2  # red above green as often as not
    flat = V.recolour(x, generator(), grey=1.0)
    assert (flat.amax(1) - flat.amin(1)).max() < 0.01


def test_blobs_are_single_round_things():
    from scipy.ndimage import label

    masks = V.blobs(200, 64, generator()).numpy()
    area = masks.mean((1, 2))
    assert all(label(m)[1] <= 3 for m in masks) and np.median([label(m)[1] for m in masks]) == 1
    assert area.min() > 0 and 0.05 < np.median(area) < 0.4 and not np.array_equal(masks[0], masks[1])


def test_composition_layers_are_where_the_images_changed(images):
    image, layer = V.compose(images, 8, generator())
    assert image.shape == (8, 3, 128, 128)
    assert layer.shape == (8, 128, 128) and set(layer.unique().tolist()) <= {0, 1, 2, 3}
    assert image.amin() >= 0 and image.amax() <= 1 and (layer == 0).flatten(1).any(1).all()
    # other images, same draws: the same layers
    again, _ = V.compose(np.flip(images, 0).copy(), 8, generator())
    assert torch.equal(_, layer) and not torch.equal(again, image)


def test_sampled_patches_lie_in_the_layer_they_are_given(images, monkeypatch):
    "Layers painted in flat colours: a patch of one colour must carry that layer's name."
    colour = torch.tensor([0.1, 0.35, 0.6, 0.85])

    def painted(images, b, g, device='cpu'):
        _, layer = compose(images, b, g)
        return colour[layer][:, None].expand(-1, 3, -1, -1).contiguous(), layer

    compose = V.compose
    monkeypatch.setattr(V, 'compose', painted)
    monkeypatch.setattr(V, 'recolour', lambda x, g, **kw: x)
    monkeypatch.setattr(V, 'normalize', lambda x: x)
    views, picked, name = V.composed_views(images, 6, generator(5), size=96, patch_size=8, n_patches=20)
    grey = F.avg_pool2d(views[:, :1], 8).flatten(1).gather(1, picked)
    near = (grey[..., None] - colour).abs().argmin(2)
    assert (near == name).float().mean() > 0.97
    counts = np.bincount(name.flatten().numpy(), minlength=4)
    assert counts[0] < 0.75 * counts.sum() and (counts[1:] > 0).all()  # the ground does not take all


# --- losses


def test_patch_contrast_by_brute_force(images):
    torch.manual_seed(0)
    learner = P.Pretrainer(model, patch_temperature=0.2, image_temperature=0.5, bf16=False).eval()
    views, picked, name = V.composed_views(images, 3, generator(1), size=48, patch_size=8, n_patches=5)
    with torch.no_grad():
        z = F.normalize(
            learner.vit.forward_features(views)[:, 1:].gather(1, picked[..., None].expand(-1, -1, 24)), dim=2
        )
    same = lambda v, i, j, u, k, l: (i == k) and name[i + 3 * v, j] == name[k + 3 * u, l]
    total, n = 0.0, 0
    for v in (0, 1):
        for i in range(3):
            for j in range(5):
                logits, positive = [], []
                for u in (0, 1):
                    for k in range(3):
                        for l in range(5):
                            if u == v and same(v, i, j, u, k, l):
                                continue  # never compared within a view
                            logits.append(z[i + 3 * v, j] @ z[k + 3 * u, l] / 0.2)
                            positive.append(u != v and same(v, i, j, u, k, l))
                p, positive = torch.stack(logits).log_softmax(0), torch.tensor(positive)
                n += 1
                if positive.any():
                    # DetCon weighs a layer, not a patch
                    total -= p[positive].mean() / sum(same(v, i, j, v, i, l) for l in range(5))
    torch.testing.assert_close(
        learner.patch_contrast(views, picked, name), torch.as_tensor(total / (n / 2)), atol=1e-4, rtol=1e-4
    )


def test_image_contrast_by_brute_force(images):
    torch.manual_seed(0)
    learner = P.Pretrainer(model, patch_temperature=0.2, image_temperature=0.5, bf16=False).eval()
    views = V.image_views(images, 4, generator(1), size=32)
    with torch.no_grad():
        z = F.normalize(learner.head(learner.vit.forward_features(views)[:, 0]), dim=1)
    losses = []
    for i in range(8):
        others = [j for j in range(8) if j != i]
        losses.append(
            torch.logsumexp(torch.stack([z[i] @ z[j] / 0.5 for j in others]), 0) - z[i] @ z[(i + 4) % 8] / 0.5
        )
    torch.testing.assert_close(learner.image_contrast(views), torch.stack(losses).mean(), atol=1e-4, rtol=1e-4)


def test_the_average_follows_numbers_and_copies_statistics():
    learner = P.Pretrainer(model, patch_temperature=0.2, image_temperature=0.2, bf16=False)
    for p in learner.vit.parameters():
        p.data.fill_(1.0)
    for p in learner.average.parameters():
        p.data.fill_(0.0)
    for b in learner.vit.buffers():
        b.fill_(5)
    learner.follow(0.9)
    assert all(torch.allclose(p, torch.tensor(0.1)) for p in learner.average.parameters())
    assert all((b == 5).all() for b in learner.average.buffers())
    assert not any(p.requires_grad for p in learner.average.parameters())


# --- runs


def test_it_learns(images, tmp_path):
    _, log = P.fit(images, tmp_path, n_iters=60, **(knobs | dict(n_composed=4, n_patches=12, n_plain=12, lr=3e-3)))
    assert log[-1]['image_loss'] < log[0]['image_loss'] - 0.1
    assert log[-1]['patch_loss'] < log[0]['patch_loss'] and [r['step'] for r in log] == [20, 40, 60]


def test_the_seed_decides(images, tmp_path):
    first, log = P.fit(images, tmp_path / 'a', n_iters=5, **knobs)
    # the global generator has no say, and is left alone
    torch.manual_seed(123)
    second, again = P.fit(images, tmp_path / 'b', n_iters=5, **knobs)
    assert torch.rand(1) == torch.rand(1, generator=generator(123)) and equal(first, second) and log == again
    third, _ = P.fit(images, tmp_path / 'c', n_iters=5, **(knobs | dict(seed=1)))
    assert not equal(first, third)


def test_stopped_and_resumed_ends_with_the_same_bytes(images, tmp_path, monkeypatch):
    whole, log = P.fit(images, tmp_path / 'whole', n_iters=50, **knobs)
    contrast, n = P.Pretrainer.patch_contrast, 0

    def fails(self, *args):
        nonlocal n
        n += 1
        if n in (30, 45):
            raise KeyboardInterrupt
        return contrast(self, *args)

    monkeypatch.setattr(P.Pretrainer, 'patch_contrast', fails)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            P.fit(images, tmp_path / 'cut', n_iters=50, **knobs)
    resumed, again = P.fit(images, tmp_path / 'cut', n_iters=50, **knobs)
    # it went on from step 20 and 20, not from 0 each time
    assert n == 30 + 9 + 15 - 4 + 5 - 1 or n < 2 * 50
    assert equal(whole, resumed) and log == again
    a, b = (torch.load(tmp_path / d / 'state.pt', weights_only=True) for d in ('whole', 'cut'))
    assert all(torch.equal(x, y) for x, y in zip(a['learner'].values(), b['learner'].values()))
    assert torch.equal(a['generator'], b['generator'])


def test_other_settings_start_anew(images, tmp_path):
    P.fit(images, tmp_path, n_iters=3, **knobs)
    changed, _ = P.fit(images, tmp_path, n_iters=3, **(knobs | dict(lr=2e-3)))
    fresh, _ = P.fit(images, tmp_path / 'fresh', n_iters=3, **(knobs | dict(lr=2e-3)))
    assert equal(changed, fresh)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_state(images, tmp_path, monkeypatch):
    P.fit(images, tmp_path, n_iters=20, **knobs)
    kept = (tmp_path / 'state.pt').read_bytes()
    state = torch.load(tmp_path / 'state.pt', weights_only=True)
    state['settings']['n_iters'] = 40
    torch.save(state, tmp_path / 'state.pt')
    kept = (tmp_path / 'state.pt').read_bytes()
    contrast, n = P.Pretrainer.image_contrast, 0

    def breaks(self, views):
        nonlocal n
        n += 1
        return contrast(self, views) * (float('nan') if n == 5 else 1)

    monkeypatch.setattr(P.Pretrainer, 'image_contrast', breaks)
    with pytest.raises(FloatingPointError, match='loss is nan at step 24'):
        P.fit(images, tmp_path, n_iters=40, **knobs)
    assert (tmp_path / 'state.pt').read_bytes() == kept


def test_rates_fall_to_zero():
    rates = [P.scheduled(s, 50, lr=2.0, warmup_iters=5, ema_decay=0.9)[0] for s in range(51)]
    assert rates[50] == pytest.approx(0, abs=1e-9)
    assert max(rates) <= 2 and rates[0] == pytest.approx(0.4) and rates[5:] == sorted(rates[5:], reverse=True)
    assert [round(P.scheduled(s, 50, lr=1.0, warmup_iters=5, ema_decay=0.9)[1], 3) for s in (0, 4, 1000)] == [
        0,
        0.5,
        0.9,
    ]


# --- images


def test_drawn_images_are_drawn_once(tmp_path, images, monkeypatch):
    first = np.array(P.drawn(tmp_path / 'p.npy', n_images=4, size=128, seed=0))
    assert np.array_equal(first, images[:4])
    monkeypatch.setattr(P, 'draw_images', lambda *a, **kw: pytest.fail('drawn again'))
    assert np.array_equal(P.drawn(tmp_path / 'p.npy', n_images=4, size=128, seed=0), first)


def test_own_images(tmp_path, images, capsys):
    from PIL import Image

    for sub in ('a', 'b'):
        (tmp_path / sub).mkdir()
    Image.fromarray(images[0]).save(tmp_path / 'a' / '1.png')
    Image.fromarray(images[1][:, 20:]).convert('L').save(tmp_path / 'b' / '2.png')
    (tmp_path / 'a' / '0.jpg').write_bytes(b'nothing')
    got = P.loaded(tmp_path / 'own.npy', tmp_path, ['a', 'b'], size=128)
    assert got.shape == (2, 128, 128, 3)
    assert np.array_equal(got[0], images[0])
    assert (got[1][..., 0] == got[1][..., 1]).all() and '0.jpg' in capsys.readouterr().out
    (tmp_path / 'c').mkdir()
    (tmp_path / 'c' / '0.jpg').write_bytes(b'nothing')
    with pytest.raises(ValueError, match='no readable image'):
        P.loaded(tmp_path / 'none.npy', tmp_path, ['c'], size=32)
