"Augmentation against per-pixel oracles, and its invariants on random scenes."

import copy

import numpy as np
import pytest
import torch

from u2seg.augment import (
    _any,
    copy_paste,
    crop,
    hflip,
    jitter,
    masks_to_boxes,
    paste,
    resize,
    semantic_copy_paste,
    short_side,
    view,
    visible,
)


def scene(rng, h=20, w=26, m=3, n_labels=2, sem=True):
    "A random image with m overlapping rectangles."
    image = torch.from_numpy(rng.integers(0, 256, (3, h, w), dtype=np.uint8))
    masks = torch.zeros(m, h, w, dtype=torch.bool)
    for k in range(m):
        y, x = rng.integers(0, h - 4), rng.integers(0, w - 4)
        masks[k, y : y + rng.integers(1, 9), x : x + rng.integers(1, 9)] = True
    target = dict(boxes=masks_to_boxes(masks), labels=torch.from_numpy(rng.integers(0, n_labels, m)), masks=masks)
    if sem:
        target['sem'] = torch.from_numpy(rng.integers(1, 4, (h, w)))
        target['sem'][masks.any(0)] = 0
    return image, target


def slow_box(mask):
    on = [(y, x) for y in range(mask.shape[0]) for x in range(mask.shape[1]) if mask[y, x]]
    if not on:
        return [0, 0, 0, 0]
    return [min(x for _, x in on), min(y for y, _ in on), max(x for _, x in on) + 1, max(y for y, _ in on) + 1]


def slow_paste(image, target, pixels, alpha, labels, max_cover):
    "The formula of the paper, pixel by pixel."
    H, W = image.shape[1:]
    keep = []
    for p in range(len(alpha)):
        own = [(y, x) for y in range(H) for x in range(W) if alpha[p, y, x] >= 0.5]
        hides = any(sum(bool(m[y, x]) for y, x in own) >= max_cover * int(m.sum()) for m in target['masks'])
        if own and not hides:
            keep.append(p)
    out, masks, sem = image.clone(), target['masks'].clone(), target['sem'].clone()
    for y in range(H):
        for x in range(W):
            if not keep:
                continue
            a = max(float(alpha[p, y, x]) for p in keep)
            for c in range(3):
                out[c, y, x] = round(float(image[c, y, x]) * (1 - a) + float(pixels[c, y, x]) * a)
            if any(alpha[p, y, x] >= 0.5 for p in keep):
                masks[:, y, x] = False
                sem[y, x] = 0
    all_masks = [*masks, *(alpha[p] >= 0.5 for p in keep)]
    all_labels = [*target['labels'].tolist(), *(int(labels[p]) for p in keep)]
    left = [(m, l) for m, l in zip(all_masks, all_labels) if m.any()]
    return out, [m for m, _ in left], [l for _, l in left], sem


@pytest.mark.parametrize('seed', range(12))
def test_paste_is_the_formula_pixel_by_pixel(seed):
    rng = np.random.default_rng(seed)
    image, target = scene(rng)
    pixels, alpha = torch.from_numpy(rng.integers(0, 256, image.shape, dtype=np.uint8)), torch.zeros(2, 20, 26)
    for p in range(2):
        y, x = rng.integers(0, 12), rng.integers(0, 18)
        alpha[p, y : y + 7, x : x + 7] = torch.from_numpy(
            rng.integers(0, 5, alpha[p, y : y + 7, x : x + 7].shape) / 4.0
        ).float()
    labels = torch.tensor([4, 5])
    got, t = paste(image, target, pixels, alpha, labels, max_cover=0.5)
    want, masks, l, sem = slow_paste(image, target, pixels, alpha, labels, 0.5)
    assert (got.int() - want.int()).abs().max() <= 1  # rounding of a half
    assert t['labels'].tolist() == l and torch.equal(t['sem'], sem)
    assert len(masks) == len(t['masks']) and all(torch.equal(a, b) for a, b in zip(t['masks'], masks))
    assert t['boxes'].tolist() == [slow_box(m) for m in masks]


def test_boxes_of_every_small_mask():
    masks = torch.tensor([[[(n >> (3 * y + x)) & 1 for x in range(3)] for y in range(3)] for n in range(512)]).bool()
    assert masks_to_boxes(masks).tolist() == [slow_box(m) for m in masks]
    assert masks_to_boxes(torch.zeros(0, 3, 3, dtype=torch.bool)).shape == (0, 4)


@pytest.mark.parametrize('kind', [copy_paste, semantic_copy_paste])
@pytest.mark.parametrize('seed', range(25))
def test_pasting_keeps_every_promise(kind, seed):
    rng = np.random.default_rng(seed)
    image, target = scene(rng, m=int(rng.integers(0, 5)))
    source_image, source = scene(rng, h=int(rng.integers(6, 40)), w=int(rng.integers(6, 40)), m=int(rng.integers(0, 5)))
    before = copy.deepcopy((image, target, source_image, source))
    out, t = kind(
        image, target, source_image, source, paste_scale=(0.3, 1.0), max_cover=0.5, rng=np.random.default_rng(seed)
    )
    out2, t2 = kind(
        image, target, source_image, source, paste_scale=(0.3, 1.0), max_cover=0.5, rng=np.random.default_rng(seed)
    )
    assert torch.equal(out, out2) and all(torch.equal(t[k], t2[k]) for k in t)
    for a, b in zip(before, (image, target, source_image, source)):  # arguments are left alone
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else all(torch.equal(a[k], b[k]) for k in a)
    m = len(target['labels'])
    assert len(t['labels']) >= m and torch.equal(
        t['labels'][:m], target['labels']
    )  # none is hidden by half, so none is lost
    cover = t['masks'][m:].any(0)
    assert torch.equal(t['masks'][:m], target['masks'] & ~cover)  # disjoint from what lies on top
    assert t['boxes'].tolist() == [slow_box(x) for x in t['masks']]
    assert torch.equal(t['sem'], target['sem'].masked_fill(cover, 0))
    assert t['masks'].flatten(1).any(1).all()
    hidden = (target['masks'] & cover).flatten(1).sum(1)
    if len(t['labels']) - m == 1:
        assert (hidden < 0.5 * target['masks'].flatten(1).sum(1)).all()
    new = t['labels'][m:].tolist()
    if kind is semantic_copy_paste:
        assert len(new) <= 1 and set(new) <= set(target['labels'].tolist()) & set(source['labels'].tolist())
    else:
        assert len(new) <= max(len(source['labels']) - 1, 1) and set(new) <= set(source['labels'].tolist())
    if not len(new):
        assert torch.equal(out, image)


def test_an_object_is_really_pasted_and_where_its_pixels_are():
    image, none = (
        torch.zeros(3, 30, 30, dtype=torch.uint8),
        dict(
            masks=torch.zeros(0, 30, 30, dtype=torch.bool),
            labels=torch.zeros(0, dtype=torch.long),
            boxes=torch.zeros(0, 4),
        ),
    )
    bright = torch.zeros(3, 30, 30, dtype=torch.uint8)
    bright[:, 5:15, 8:20] = 255
    white = torch.full_like(bright, 255)
    source = dict(masks=bright[:1] > 0, labels=torch.tensor([1]), boxes=torch.zeros(1, 4))
    for seed in range(10):  # also where the picture has no instance of its own
        out, t = copy_paste(
            image, none, white, source, paste_scale=(0.4, 0.9), max_cover=0.5, rng=np.random.default_rng(seed)
        )
        assert (
            t['labels'].tolist() == [1]
            and (out[0][t['masks'][0]] > 127).all()
            and (out[0][~t['masks'][0]] <= 128).all()
        )
        assert t['boxes'].tolist() == [slow_box(t['masks'][0])]


def test_plain_paste_draws_one_to_all_but_one():
    rng = np.random.default_rng(0)
    image, _ = scene(rng, 60, 60, m=0)
    empty = scene(rng, 60, 60, m=0)[1]
    masks = torch.zeros(4, 60, 60, dtype=torch.bool)
    for k in range(4):
        masks[k, 15 * k : 15 * k + 10, 10:30] = True
    source = dict(masks=masks, labels=torch.arange(4), boxes=masks_to_boxes(masks))
    counts = {
        len(copy_paste(image, empty, image, source, paste_scale=(0.5, 1.0), max_cover=0.5, rng=rng)[1]['labels'])
        for _ in range(60)
    }
    assert counts == {1, 2, 3}


def test_semantic_paste_of_an_object_larger_than_the_image():
    rng = np.random.default_rng(0)
    image, target = scene(rng, 8, 40, m=0)
    target = {**target, 'masks': torch.zeros(1, 8, 40, dtype=torch.bool), 'labels': torch.tensor([0])}
    target['masks'][0, 0, 0] = True
    source = dict(masks=torch.ones(1, 50, 10, dtype=torch.bool), labels=torch.tensor([0]), boxes=torch.zeros(1, 4))
    shapes = [
        semantic_copy_paste(
            image,
            target,
            torch.zeros(3, 50, 10, dtype=torch.uint8),
            source,
            paste_scale=(9.0, 9.0),
            max_cover=2.0,
            rng=rng,
        )[1]['boxes'][-1]
        for _ in range(5)
    ]
    assert all(b[3] - b[1] == 8 and b[2] - b[0] <= 3 for b in shapes)  # clipped to the picture, aspect kept


def test_geometry_without_an_instance_and_with_one_pixel():
    rng = np.random.default_rng(3)
    for m in (0, 1):
        image, target = scene(rng, m=m)
        if m:
            target['masks'][:] = False
            target['masks'][0, 19, 25] = True
        for f in (
            lambda: hflip(image, target),
            lambda: resize(image, target, (40, 52)),
            lambda: crop(image, target, (0, 0, 5, 5)),
            lambda: resize(image, target, (3, 2)),
        ):
            out, t = f()
            assert t['masks'].shape[1:] == out.shape[1:] == t['sem'].shape and t['boxes'].shape == (len(t['labels']), 4)
    out, t = hflip(image, target)
    assert t['boxes'].tolist() == [[0, 19, 1, 20]]


def test_resize_takes_the_nearest_label():
    rng = np.random.default_rng(1)
    image, target = scene(rng)
    for h, w in ((13, 31), (40, 52), (20, 26), (1, 1)):
        _, t = resize(image, target, (h, w))
        ys, xs = [int((y + 0.5) * 20 / h) for y in range(h)], [int((x + 0.5) * 26 / w) for x in range(w)]
        assert torch.equal(t['sem'], target['sem'][ys][:, xs])
        want = target['masks'][:, ys][:, :, xs]
        assert torch.equal(t['masks'], want[want.flatten(1).any(1)])
    with pytest.raises(ValueError, match='at least 1 x 1'):
        resize(image, target, (0, 5))


@pytest.mark.parametrize(
    'size,short,longest,want',
    [
        ((480, 640), 240, 1333, (240, 320)),
        ((427, 640), 1024, 1333, (889, 1333)),
        ((1, 500), 800, 1333, (3, 1333)),
        ((128, 128), 128, 128, (128, 128)),
    ],
)
def test_short_side(size, short, longest, want):
    assert short_side(size, short, longest) == want


def test_jitter_is_each_formula():
    rng = np.random.default_rng(0)
    image, _ = scene(rng)
    x, grey = (
        image.double(),
        (torch.tensor([0.299, 0.587, 0.114], dtype=torch.double)[:, None, None] * image.double()).sum(0),
    )

    def factors(n, s, seed):
        return [1 + s * np.random.default_rng(seed).uniform(-1, 1, 3)[k] for k in range(3)][n]

    for seed in range(5):
        got = [
            jitter(image, **{name: 0.4}, rng=np.random.default_rng(seed)).double()
            for name in ('brightness', 'contrast', 'saturation')
        ]
        b, c, s = (factors(n, 0.4, seed) for n in range(3))
        want = [b * x, c * x + (1 - c) * grey.mean(), s * x + (1 - s) * grey]
        for g, w in zip(got, want):
            assert (g - w.clamp(0, 255)).abs().max() <= 0.51
    turned = jitter(image // 2 + 60, hue=0.5, rng=rng).double()
    assert (
        turned.mean(0) - (image // 2 + 60).double().mean(0)
    ).abs().max() < 1.0  # a turn about grey keeps the mean of the channels


def test_view_needs_no_instance_and_repeats_itself():
    rng = np.random.default_rng(0)
    image, target = scene(rng, m=0)
    options = dict(
        short_sides=[16, 24], max_size=64, flip=0.5, crop_size=(0.4, 1.0), colour_jitter=(0.2, 0.2, 0.2, 0.1)
    )
    a, b = (view(image, target, **options, rng=np.random.default_rng(4)) for _ in range(2))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1]['sem'], b[1]['sem'])
    sizes = {tuple(view(image, target, **options, rng=rng)[0].shape) for _ in range(20)}
    assert len(sizes) > 5


def test_visible_deletes_only_what_is_empty():
    rng = np.random.default_rng(0)
    _, target = scene(rng, m=4)
    target['masks'][2] = False
    t = visible(target)
    assert torch.equal(t['labels'], target['labels'][[0, 1, 3]]) and torch.equal(t['masks'], target['masks'][[0, 1, 3]])


@pytest.mark.parametrize('shape', [(3, 17, 23), (0, 5, 7), (1, 1, 1)])
def test_byte_wise_any_is_any(shape):
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.95
    for y in (x, x.mT, x.flip(1)):
        for dim in range(3):
            if y.shape[dim]:
                assert torch.equal(_any(y, dim), y.any(dim))
