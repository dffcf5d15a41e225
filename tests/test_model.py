"""The student's parts against plain loops, degenerate input, names and shapes of its parameters, strangers' weight
files."""

import math, os, pickle
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import box_iou, roi_align

from common import SMALL
import u2seg.model as M
from u2seg import cascade, rpn
from u2seg.boxes import (
    box_iou,
    cell_anchors,
    clip_boxes,
    decode_boxes,
    encode_boxes,
    grid_anchors,
    match_anchors,
    match_regions,
    random_keys,
    sample,
)
from u2seg.cascade import choose
from u2seg.checkpoints import load_weights, rename_weights, save_weights
from u2seg.roialign import _OnGPU, Pooler, region_levels
from u2seg.rpn import _thin, grouped_nms, nonempty, top_proposals
from u2seg.model import build_model
from u2seg.pixels import _paste, combine, mask_to_coco, paste_masks, PastedMasks, results, StuffScores
from u2seg.weights import read_weights

TINY = dict(
    SMALL,
    n_things=3,
    n_stuff=2,
    rpn_batch=32,
    rpn_pre_train=60,
    rpn_pre_test=60,
    rpn_post_train=30,
    rpn_post_test=30,
    roi_batch=16,
    panoptic_area=20,
    min_size=96,
    max_size=160,
    score_threshold=0.01,
)


def scene(seed=0, n=3, h=96, w=128):
    g = torch.Generator().manual_seed(seed)
    r = lambda lo, hi: int(torch.randint(lo, hi, (1,), generator=g))
    masks = torch.zeros(n, h, w, dtype=torch.bool)
    for m in masks:
        y, x = r(0, h - 30), r(0, w - 30)
        m[y : y + r(10, 40), x : x + r(10, 40)] = True
    boxes = (
        torch.tensor(
            [
                [
                    m.any(0).nonzero()[0, 0],
                    m.any(1).nonzero()[0, 0],
                    m.any(0).nonzero()[-1, 0] + 1,
                    m.any(1).nonzero()[-1, 0] + 1,
                ]
                for m in masks
            ]
        )
        .float()
        .view(-1, 4)
    )
    return torch.rand(3, h, w, generator=g) * 255, dict(
        boxes=boxes,
        labels=torch.randint(0, 3, (n,), generator=g),
        masks=masks,
        sem=torch.randint(0, 3, (h, w), generator=g),
    )


def model(seed=0, **config):
    torch.manual_seed(seed)
    return build_model(dict(TINY, **config))


# ---- settings


@pytest.mark.parametrize(
    'wrong, said',
    [
        (dict(n_thing=3), "unknown model setting 'n_thing'"),
        (dict(depth=51), 'depth must be one of 18, 34'),
        (dict(nms='high'), 'nms must be float'),
        (dict(stem_pool=1), 'stem_pool must be bool'),
        (dict(decode='best'), "'detectron2', 'objectness'"),
        (dict(anchor_sizes=[32]), 'must have 5 values'),
        (dict(rpn_batch=-1), 'not be negative'),
        (dict(cascade_ious=[0.5]), 'one entry for each stage'),
    ],
)
def test_wrong_settings_are_named(wrong, said):
    with pytest.raises(ValueError, match=said):
        build_model(dict(TINY, **wrong))


def test_missing_settings_are_named():
    with pytest.raises(ValueError, match='n_things and n_stuff missing'):
        build_model({})


# ---- parameter names and shapes of the official code, spelled out


def names_r50(k, n_stuff):
    out, bn = (
        {},
        lambda name, c: (
            {f'{name}.norm.{p}': (c,) for p in ('weight', 'bias', 'running_mean', 'running_var')}
            | {f'{name}.norm.num_batches_tracked': ()}
        ),
    )

    def conv(name, c_out, c_in, s):
        out.update({f'{name}.weight': (c_out, c_in, s, s), **bn(name, c_out)})

    b = 'backbone.bottom_up.'
    conv(b + 'stem.conv1', 64, 3, 7)
    c_in = 64
    for stage, n, mid in ((2, 3, 64), (3, 4, 128), (4, 6, 256), (5, 3, 512)):
        for i in range(n):
            name = f'{b}res{stage}.{i}.'
            conv(name + 'conv1', mid, c_in, 1)
            conv(name + 'conv2', mid, mid, 3)
            conv(name + 'conv3', 4 * mid, mid, 1)
            if i == 0:
                conv(name + 'shortcut', 4 * mid, c_in, 1)
            c_in = 4 * mid
    for l, c in zip((2, 3, 4, 5), (256, 512, 1024, 2048)):
        conv(f'backbone.fpn_lateral{l}', 256, c, 1)
        conv(f'backbone.fpn_output{l}', 256, 256, 3)

    def plain(name, *shape, bias=None):
        out.update({f'{name}.weight': shape, f'{name}.bias': (bias or shape[0],)})

    r = 'proposal_generator.rpn_head.'
    plain(r + 'conv', 256, 256, 3, 3)
    plain(r + 'objectness_logits', 3, 256, 1, 1)
    plain(r + 'anchor_deltas', 12, 256, 1, 1)
    for s in range(3):
        plain(f'roi_heads.box_head.{s}.fc1', 1024, 12544)
        plain(f'roi_heads.box_head.{s}.fc2', 1024, 1024)
        plain(f'roi_heads.box_predictor.{s}.cls_score', k + 1, 1024)
        plain(f'roi_heads.box_predictor.{s}.bbox_pred', 4, 1024)
    for i in range(1, 5):
        plain(f'roi_heads.mask_head.mask_fcn{i}', 256, 256, 3, 3)
    plain('roi_heads.mask_head.deconv', 256, 256, 2, 2)
    plain('roi_heads.mask_head.predictor', k, 256, 1, 1)
    for l in ('p2.0', 'p3.0', 'p4.0', 'p4.2', 'p5.0', 'p5.2', 'p5.4'):
        out.update(
            {
                f'sem_seg_head.{l}.weight': (128, 256 if l.endswith('.0') else 128, 3, 3),
                f'sem_seg_head.{l}.norm.weight': (128,),
                f'sem_seg_head.{l}.norm.bias': (128,),
            }
        )
    plain('sem_seg_head.predictor', n_stuff + 1, 128, 1, 1)
    return out


def test_names_and_shapes_of_the_paper_model():
    with torch.device('meta'):
        m = M.PanopticRCNN(M.check_config(dict(n_things=300, n_stuff=27)))
    assert {k: tuple(v.shape) for k, v in m.state_dict().items()} == names_r50(300, 27)


def test_no_stuff_no_semantic_head():
    m = model(n_things=1, n_stuff=0)
    assert not [k for k in m.state_dict() if 'sem_seg' in k]
    image, target = scene()
    target['labels'].zero_()
    del target['sem']
    assert 'loss_sem_seg' not in m([image], [target])
    assert set(m.eval()([image])[0]) == {'boxes', 'scores', 'labels', 'masks'}


# ---- boxes, anchors, matching


def test_anchors_by_formula():
    got, want = grid_anchors(cell_anchors(32, [0.5, 1.0, 2.0]), 3, 4, 8), []
    for y, x, ratio in product(range(3), range(4), (0.5, 1.0, 2.0)):
        w = 32 / math.sqrt(ratio)
        h = w * ratio
        want.append([8 * x - w / 2, 8 * y - h / 2, 8 * x + w / 2, 8 * y + h / 2])
    assert torch.allclose(got, torch.tensor(want), atol=1e-5)


def random_boxes(n, seed=0, size=100.0):
    g = torch.Generator().manual_seed(seed)
    p = torch.rand(n, 2, generator=g) * size
    return torch.cat([p, p + 1 + torch.rand(n, 2, generator=g) * size / 2], 1)


def plain_iou(a, b):
    w, h = max(0.0, min(a[2], b[2]) - max(a[0], b[0])), max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    return w * h / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - w * h)


def test_iou():
    a, b = random_boxes(7), random_boxes(5, 1)
    assert torch.allclose(
        box_iou(a, b), torch.tensor([[plain_iou(x, y) for y in b.tolist()] for x in a.tolist()]), atol=1e-6
    )
    assert box_iou(torch.zeros(1, 4), torch.zeros(1, 4)).item() == 0


def test_box_coding_round_trip_and_formula():
    a, b, weights = random_boxes(50), random_boxes(50, 1), (10.0, 10.0, 5.0, 5.0)
    d = encode_boxes(a, b, weights)
    x, y = a[3].tolist(), b[3].tolist()
    want = [
        10 * ((y[0] + y[2]) / 2 - (x[0] + x[2]) / 2) / (x[2] - x[0]),
        10 * ((y[1] + y[3]) / 2 - (x[1] + x[3]) / 2) / (x[3] - x[1]),
        5 * math.log((y[2] - y[0]) / (x[2] - x[0])),
        5 * math.log((y[3] - y[1]) / (x[3] - x[1])),
    ]
    assert torch.allclose(d[3], torch.tensor(want), atol=1e-4)
    assert torch.allclose(decode_boxes(a, d, weights), b, atol=1e-3)
    grown = decode_boxes(torch.tensor([[0.0, 0.0, 16.0, 16.0]]), torch.tensor([[0.0, 0.0, 99.0, 99.0]]))
    assert abs(grown[0, 2] - grown[0, 0] - 1000) < 1e-2  # 16 * 62.5, no overflow


def plain_match(gt, anchors, low, high):
    table = box_iou(torch.tensor(anchors), torch.tensor(gt)).tolist()  # torchvision's
    best_of_gt = [max(row[j] for row in table) for j in range(len(gt))]
    labels = []
    for row in table:
        label = 1 if max(row) >= high else 0 if max(row) < low else -1
        if any(v == best_of_gt[j] and v > 0 for j, v in enumerate(row)):
            label = 1
        labels.append(label)
    return [max(range(len(gt)), key=lambda j: row[j]) for row in table], labels


def test_anchor_matching_with_low_quality_matches():
    gt, anchors = random_boxes(4, 2), random_boxes(60, 3)
    gt[3] = torch.tensor([500.0, 500.0, 502.0, 502.0])  # no anchor touches it: nothing must be forced
    index, label = match_anchors(gt, anchors, 0.3, 0.7)
    want_index, want = plain_match(gt.tolist(), anchors.tolist(), 0.3, 0.7)
    assert label.tolist() == want and 1 in want and -1 in want and want.count(1) < 20
    hit = [i for i, v in enumerate(want) if v == 1]
    assert [index[i].item() for i in hit] == [want_index[i] for i in hit]


def test_regions_match_within_their_own_image():
    boxes, gt = random_boxes(20), random_boxes(6, 1)
    image, gt_image = torch.arange(20) % 2, torch.tensor([0, 0, 0, 1, 1, 1])
    best, index = match_regions(boxes, image, gt, gt_image)
    for r in range(20):
        row = [plain_iou(boxes[r].tolist(), gt[j].tolist()) if image[r] == gt_image[j] else 0.0 for j in range(6)]
        assert abs(best[r] - max(row)) < 1e-6 and (max(row) == 0 or row[index[r]] == pytest.approx(max(row), abs=1e-6))


def test_sampling_takes_the_smallest_keys_and_keeps_the_share():
    positive, negative = torch.arange(100) < 40, torch.arange(100) >= 50
    keys = random_keys(100, 7, torch.device('cpu'))
    p, n = sample(positive, negative, keys, n=32, fraction=0.25)
    assert len(p) == 8 and len(n) == 24 and positive[p].all() and negative[n].all()
    assert set(p.tolist()) == set(sorted(range(40), key=lambda i: keys[i])[:8])
    p, n = sample(torch.arange(100) < 2, negative, keys, n=32, fraction=0.25)
    assert len(p) == 2 and len(n) == 30  # background fills up
    assert (keys == random_keys(100, 7, torch.device('cpu'))).all()


def test_grouped_nms_against_loops():
    boxes, scores, group = (
        random_boxes(60, 4, 60),
        torch.rand(60, generator=torch.Generator().manual_seed(0)),
        torch.arange(60) % 3,
    )
    keep = []
    for i in scores.argsort(descending=True).tolist():
        if all(group[i] != group[j] or plain_iou(boxes[i].tolist(), boxes[j].tolist()) <= 0.3 for j in keep):
            keep.append(i)
    assert grouped_nms(boxes, scores, group, 0.3).tolist() == keep and len(keep) < 60
    assert grouped_nms(boxes[:0], scores[:0], group[:0], 0.3).tolist() == []


def test_thinning_of_all_images_at_once_equals_one_after_the_other():
    g = torch.Generator().manual_seed(0)
    n_levels, sizes, post = [70, 50], [(60, 90), (50, 40)], 30
    corner = torch.rand(2, 120, 2, generator=g) * 90 - 20  # some boxes lie outside: empty when cut
    boxes = torch.cat([corner, corner + 5 + torch.rand(2, 120, 2, generator=g) * 25], 2)
    scores = (torch.rand(2, 120, generator=g) * 40).round()  # many are equal
    scores = torch.cat([s.sort(1, descending=True)[0] for s in scores.split(n_levels, 1)], 1)
    level = torch.arange(120) // 70
    thinned = _thin(boxes, scores, n_levels, sizes, 0.4, post)
    for b, s, size, got in zip(boxes, scores, sizes, thinned):
        b = clip_boxes(b, *size)
        real = nonempty(b)
        want = b[real[grouped_nms(b[real], s[real], level[real], 0.4)[:post]]]
        assert 20 < len(real) < 120 and len(want) > 9 and torch.equal(got, want)
    assert [len(b) for b in _thin(boxes[:, :70] * 0, scores[:, :70], [70], sizes, 0.4, post)] == [0, 0]


# ---- RoIAlign


@pytest.mark.parametrize('ratio', [0, 2])
@pytest.mark.parametrize('threads', [1, 3])
def test_region_align_equals_torchvision_forward_and_backward(ratio, threads):
    torch.manual_seed(0)
    features = [torch.randn(2, 70, s, s + 3, requires_grad=True) for s in (24, 12, 6)]
    boxes = random_boxes(40, 5, 90.0) - 8  # some leave the picture
    boxes[0] = torch.tensor([3.0, 3.0, 3.0, 9.0])
    boxes[1] = torch.tensor([-300.0, -300.0, -200.0, -200.0])  # empty; far outside
    image, pooler = (
        torch.arange(40) // 20,
        Pooler([2, 3, 4], size=5, sampling_ratio=ratio, canonical_size=20, canonical_level=3),
    )
    level = region_levels(boxes, pooler.levels, **pooler.canonical)
    assert len(level.unique()) == 3
    want = torch.stack(
        [
            roi_align(features[l], torch.cat([i[None].float(), b])[None], 5, 1 / 2 ** (l + 2), ratio, aligned=True)[0]
            for l, b, i in zip(level.tolist(), boxes, image)
        ]
    )
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = pooler(features, boxes, image)
        weight = torch.randn_like(want)
        a, b = torch.autograd.grad((got * weight).sum(), features), torch.autograd.grad((want * weight).sum(), features)
    finally:
        torch.set_num_threads(before)
    assert torch.allclose(got, want, atol=1e-5)
    for x, y in zip(a, b):
        assert torch.allclose(x, y, atol=1e-4)
    on_gpu = _OnGPU.apply(boxes, image, level, [1 / 4, 1 / 8, 1 / 16], 5, ratio, *features)
    assert torch.allclose(on_gpu, want, atol=1e-5)
    for x, y in zip(torch.autograd.grad((on_gpu * weight).sum(), features), b):
        assert torch.allclose(x, y, atol=1e-4)


@pytest.mark.parametrize('ratio', [0, 2])
def test_boxes_that_are_not_finite_read_nan_and_write_nowhere(ratio):
    torch.manual_seed(0)
    features = [torch.randn(1, 8, s, s, requires_grad=True) for s in (24, 12, 6)]
    good = torch.tensor([[3.0, 3.0, 30.0, 40.0], [-1e3, 0.0, 1e3, 9.0]])
    nan, inf = torch.nan, torch.inf
    bad = torch.tensor([[nan] * 4, [0, 0, nan, 9], [0, 0, inf, 9], [-inf, -inf, inf, inf], [inf] * 4])
    pooler = Pooler([2, 3, 4], size=5, sampling_ratio=ratio, canonical_size=20, canonical_level=3)
    want, got = (pooler(features, b, torch.zeros(len(b), dtype=torch.long)) for b in (good, torch.cat([bad, good])))
    assert got[:5].isnan().all() and torch.equal(got[5:], want)
    a, b = (torch.autograd.grad(x.nan_to_num().sum(), features) for x in (want, got))
    assert all(torch.equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize(
    'device', ['cpu', pytest.param('cuda', marks=pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU'))]
)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_region_align_of_half_precision_keeps_its_corners(dtype, device):
    "A corner at 500 px rounded to bfloat16 would be off by up to two pixels."
    torch.manual_seed(0)
    features = [torch.randn(2, 8, s, s).to(dtype) for s in (160, 80, 40)]
    corner = torch.rand(40, 2) * 500
    boxes, image = torch.cat([corner, corner + 5 + torch.rand(40, 2) * 130], 1), torch.arange(40) // 20
    pooler = Pooler([2, 3, 4], size=7, sampling_ratio=0, canonical_size=56, canonical_level=3)
    got = pooler([f.to(device) for f in features], boxes.to(device), image.to(device))
    assert got.dtype == dtype
    torch.testing.assert_close(
        got.cpu().float(), pooler([f.float() for f in features], boxes, image), atol=2e-2, rtol=0
    )


def test_levels_of_regions():
    sides = torch.tensor([1.0, 111, 112, 223, 224, 447, 448, 5000])
    boxes = torch.stack([torch.zeros(8), torch.zeros(8), sides, sides], 1)
    assert region_levels(boxes, [2, 3, 4, 5], canonical_size=224, canonical_level=4).tolist() == [
        0,
        0,
        1,
        1,
        2,
        2,
        3,
        3,
    ]


# ---- losses against plain formulas, and their gradients


def plain_losses(m, images, targets):
    "All losses of a batch by loops over anchors and regions, from the same features."
    x, sizes = m.batch(images)
    features, out = m.backbone(x), {}
    rpn, heads = m.proposal_generator, m.roi_heads
    anchors = torch.cat(rpn.anchors(features))
    logits, deltas = (torch.cat(v, 1) for v in zip(*(rpn.rpn_head(f) for f in features)))
    cls = loc = 0
    for b, t in enumerate(targets):
        index, label = (
            plain_match(t['boxes'].tolist(), anchors.tolist(), *m.config['rpn_iou'])
            if len(t['boxes'])
            else ([0] * len(anchors), [0] * len(anchors))
        )
        p = [i for i, v in enumerate(label) if v == 1][: m.config['rpn_batch'] // 2]
        n = [i for i, v in enumerate(label) if v == 0][: m.config['rpn_batch'] - len(p)]
        for i in p + n:
            cls = cls + F.softplus(-logits[b, i] if i in p else logits[b, i])
        for i in p:
            loc = loc + (deltas[b, i] - encode_boxes(anchors[i : i + 1], t['boxes'][index[i]][None])[0]).abs().sum()
    total = m.config['rpn_batch'] * len(images)
    out['loss_rpn_cls'], out['loss_rpn_loc'] = cls / total, loc / total
    proposals = top_proposals(
        rpn.anchors(features),
        *zip(*(rpn.rpn_head(f) for f in features)),
        sizes,
        pre=m.config['rpn_pre_train'],
        post=m.config['rpn_post_train'],
        nms_iou=m.config['rpn_nms'],
    )
    K, regions = m.config['n_things'], []  # (box, picture, class, label's index)
    for b, (p, t) in enumerate(zip(proposals, targets)):
        labelled = [(*label_one(box, t, m.config['cascade_ious'][0], K), box) for box in torch.cat([p, t['boxes']])]
        fore = [r for r in labelled if r[0] < K][: int(m.config['roi_batch'] * m.config['roi_positive'])]
        regions += [(r, b) for r in fore + [r for r in labelled if r[0] == K][: m.config['roi_batch'] - len(fore)]]
    first = regions
    for k, w in enumerate(m.config['cascade_weights']):
        boxes, image = torch.stack([r[2] for r, _ in regions]), torch.tensor([b for _, b in regions])
        s, d = heads.stage(k, features, boxes, image)
        cls = reg = 0
        moved = decode_boxes(boxes, d, w).detach()
        for i, ((c, j, box), b) in enumerate(regions):
            t = targets[b]
            far = (
                m.config['droploss']
                and len(t['boxes'])
                and max(plain_iou(moved[i].tolist(), g) for g in t['boxes'].tolist()) <= m.config['droploss']
                and 1 - s[i].softmax(0)[-1] >= m.config.get('droploss_score', 0.0)
            )
            cls = cls + (0 if far else 1) * (s[i].logsumexp(0) - s[i, c])
            if c < K:
                reg = reg + (d[i] - encode_boxes(box[None], t['boxes'][j][None], w)[0]).abs().sum()
        out[f'loss_cls_stage{k}'], out[f'loss_box_reg_stage{k}'] = cls / len(regions), reg / len(regions)
        if k < 2:
            clipped = [(clip_boxes(moved[i], *sizes[b]), b) for i, (_, b) in enumerate(regions)]
            regions = [
                ((*label_one(box, targets[b], m.config['cascade_ious'][k + 1], K), box), b)
                for box, b in clipped
                if box[2] > box[0] and box[3] > box[1]
            ]
    terms = []
    for (c, j, box), b in first:
        if c == K:
            continue
        logit = heads.mask_head(heads.mask_pooler(features, box[None], torch.tensor([b])), torch.tensor([c]))[0]
        goal = (
            roi_align(
                targets[b]['masks'][j][None, None].float(),
                torch.cat([torch.zeros(1), box])[None],
                logit.shape[-1],
                1.0,
                0,
                aligned=True,
            )[0, 0]
            >= 0.5
        )
        terms.append(torch.where(goal, F.softplus(-logit), F.softplus(logit)).mean())
    out['loss_mask'] = torch.stack(terms).mean()
    z = F.interpolate(m.sem_seg_head(features), scale_factor=4, mode='bilinear').log_softmax(1)
    picked, weights = [], []
    for b, t in enumerate(targets):
        for y, x2 in product(range(0, t['sem'].shape[0]), range(0, t['sem'].shape[1])):
            if t['sem'][y, x2] != 255:
                picked.append(-z[b, t['sem'][y, x2], y, x2])
                weights.append(t['certainty'][y, x2] if 'certainty' in t else torch.ones(()))
    picked, weights = torch.stack(picked), torch.stack(weights)
    out['loss_sem_seg'] = 0.5 * (weights * picked).sum() / weights.sum()
    return out


def label_one(box, t, iou, K):
    values = [plain_iou(box.tolist(), g) for g in t['boxes'].tolist()]
    j = max(range(len(values)), key=lambda i: values[i]) if values else 0
    return (t['labels'][j].item() if values and values[j] >= iou else K), j


@pytest.mark.parametrize(
    'droploss, extra, weighted', [(0.0, {}, True), (0.4, {}, False), (0.4, dict(droploss_score=0.75), False)]
)
def test_losses_and_gradients_against_loops(monkeypatch, droploss, extra, weighted):
    for module in rpn, cascade:
        monkeypatch.setattr(module, 'random_keys', lambda n, seed, device: torch.arange(n).float())
    config = dict(norm='GN', fpn_norm='GN', droploss=droploss, cascade_ious=[0.4, 0.45, 0.5], roi_positive=0.5)
    m = model(**config, **extra).train()
    for k, v in m.state_dict().items():
        if 'cls_score.weight' in k or 'objectness' in k:
            v.normal_(std=0.2)
    batch = [scene(0, h=64, w=64), scene(1, 1, 64, 48)]
    batch[0][1]['sem'][:9] = 255
    images, targets = map(list, zip(*batch))
    for t in targets if weighted else ():
        t['certainty'] = 2 * torch.rand(t['sem'].shape)
    got, want = m(images, targets), plain_losses(m, images, targets)
    assert set(got) == set(want)
    params = dict(m.named_parameters())
    for k in want:
        assert torch.allclose(got[k], want[k], atol=2e-5, rtol=1e-4), f'{k}: {got[k].item()}, by loops {want[k].item()}'
        a, b = (
            torch.autograd.grad(v[k], list(params.values()), allow_unused=True, retain_graph=True) for v in (got, want)
        )
        for n, x, y in zip(params, a, b):
            assert (x is None) == (y is None)
            if x is not None:
                assert (x - y).norm() <= 1e-3 * y.norm() + 1e-5, f'gradient of {k} with respect to {n}'


def test_a_third_of_the_gradient_reaches_the_pooled_features():
    m = model().train()
    f = [torch.randn(1, 16, s, s, requires_grad=True) for s in (24, 12, 6, 3)]
    boxes, image = torch.tensor([[4.0, 4.0, 60.0, 60.0]]), torch.tensor([0])
    whole = torch.autograd.grad(
        m.roi_heads.box_predictor[0](m.roi_heads.box_head[0](m.roi_heads.box_pooler(f, boxes, image)))[0].sum(), f
    )
    scaled = torch.autograd.grad(m.roi_heads.stage(0, f, boxes, image)[0].sum(), f)
    for a, b in zip(scaled, whole):
        assert torch.allclose(a, b / 3, atol=1e-6)


def test_semantic_loss_at_a_stride():
    m = model(sem_loss_stride=2).train()
    logits, sem = torch.randn(1, 3, 8, 8), torch.randint(0, 3, (1, 32, 32))
    want = 0.5 * F.cross_entropy(F.interpolate(logits, scale_factor=2, mode='bilinear'), sem[:, ::2, ::2])
    assert torch.allclose(m.sem_seg_head.loss(logits, sem)['loss_sem_seg'], want)
    assert (
        m.sem_seg_head.loss(logits, torch.full_like(sem, 255))['loss_sem_seg'] == 0
    )  # nothing labelled: nothing learned, no NaN


# ---- masks and panoptic maps


@pytest.mark.parametrize('seed', range(8))
def test_large_images_have_the_same_results(seed):
    "What is pasted and interpolated piece by piece is what is computed at once."
    rng = np.random.default_rng(seed)
    H, W, n = (int(v) for v in rng.integers((20, 20, 0), (90, 90, 7)))
    corners = torch.from_numpy(rng.uniform(-9, 60, (n, 2))).float()
    boxes = torch.cat([corners, corners + torch.from_numpy(rng.uniform(1, 60, (n, 2))).float()], 1)
    found = dict(
        boxes=boxes,
        scores=torch.from_numpy(rng.random(n)).float(),
        labels=torch.from_numpy(rng.integers(0, 3, n)),
        mask_probs=torch.from_numpy(rng.random((n, 9, 9))).float(),
    )
    logits = torch.from_numpy(rng.normal(size=(1, 5, 12, 16))).float()
    config = dict(n_things=3, fpn_first=2, stem_pool=True, panoptic_score=0.2, panoptic_overlap=0.5, panoptic_area=9)
    whole, lazy = (results([dict(found)], logits, [(48, 60)], [(H, W)], config, large=k)[0] for k in (H * W, 0))
    assert isinstance(lazy['masks'], PastedMasks) and isinstance(lazy['sem_logits'], StuffScores)
    assert len(whole['masks']) == len(lazy['masks'])
    for i, m in enumerate(whole['masks'].numpy()):
        assert np.array_equal(m, lazy['masks'][i].numpy())
        assert mask_to_coco(lazy['masks'].numpy(), i) == mask_to_coco(whole['masks'].numpy(), i)
    for k in (slice(None), slice(1, None)):
        assert torch.equal(whole['sem_logits'][k].argmax(0), lazy['sem_logits'][k].argmax(0).long())
    assert torch.equal(whole['panoptic'][0], lazy['panoptic'][0])
    assert whole['panoptic'][1] == lazy['panoptic'][1]


def test_paste_against_grid_sample():
    torch.manual_seed(0)
    probs, H, W = torch.rand(30, 9, 9), 40, 56
    boxes = random_boxes(30, 6, 50.0) - 6
    boxes[:, 2::2].clamp_(max=W + 9)
    got = paste_masks(probs, boxes, H, W)
    for p, b, m in zip(probs, boxes, got):
        y, x = (
            (torch.arange(H) + 0.5 - b[1]) / (b[3] - b[1]) * 2 - 1,
            (torch.arange(W) + 0.5 - b[0]) / (b[2] - b[0]) * 2 - 1,
        )
        soft = F.grid_sample(
            p[None, None], torch.stack(torch.meshgrid(y, x, indexing='ij')[::-1], -1)[None], align_corners=False
        )[0, 0]
        clear = (soft - 0.5).abs() > 1e-4
        assert ((soft >= 0.5) == m)[clear].all()
    assert torch.equal(_paste(probs, boxes, (slice(0, H), slice(0, W))), got)  # as a GPU does
    assert paste_masks(probs[:0], boxes[:0], H, W).shape == (0, H, W)


def plain_combine(masks, scores, labels, sem, n_things, score, overlap, area):
    H, W = sem.shape
    ids, info = [[0] * W for _ in range(H)], []
    for i in sorted(range(len(scores)), key=lambda i: -scores[i]):
        if scores[i] < score:
            break
        pixels = [(y, x) for y in range(H) for x in range(W) if masks[i][y][x]]
        if not pixels or sum(ids[y][x] > 0 for y, x in pixels) / len(pixels) > overlap:
            continue
        info.append(labels[i] + 1)
        for y, x in pixels:
            if ids[y][x] == 0:
                ids[y][x] = len(info)
    for c in sorted({v for row in sem for v in row} - {0}):
        pixels = [(y, x) for y in range(H) for x in range(W) if sem[y][x] == c and ids[y][x] == 0]
        if not pixels or len(pixels) < area:
            continue
        info.append(n_things + c)
        for y, x in pixels:
            ids[y][x] = len(info)
    return ids, info


def test_panoptic_combination_pixel_by_pixel():
    for seed in range(12):
        g = torch.Generator().manual_seed(seed)
        n = seed % 5
        masks = torch.rand(n, 7, 9, generator=g) > (0.5 if seed % 2 else 0.8)
        if n > 1:
            masks[0] = False  # an empty one
        scores, labels, sem = (
            torch.rand(n, generator=g),
            torch.randint(0, 4, (n,), generator=g),
            torch.randint(0, 4, (7, 9), generator=g),
        )
        ids, segments = combine(masks, scores, labels, sem, n_things=4, score=0.3, overlap=0.5, area=4)
        want, info = plain_combine(masks.tolist(), scores.tolist(), labels.tolist(), np.array(sem), 4, 0.3, 0.5, 4)
        assert ids.tolist() == want and [s['category_id'] for s in segments] == info
        for s in segments:
            assert s['area'] == (ids == s['id']).sum().item()


# ---- decoding


def test_two_decodings_of_near_synonymous_clusters():
    rules = dict(threshold=0.05, nms_iou=0.5, n_max=100)
    boxes = torch.tensor([[10.0, 10, 50, 50], [11.0, 10, 50, 50], [70.0, 10, 90, 40]])
    probs = torch.tensor([[0.45, 0.40, 0.05, 0.10], [0.40, 0.46, 0.04, 0.10], [0.03, 0.03, 0.04, 0.90]])
    split, whole = (choose(boxes, probs, decode=d, **rules) for d in ('detectron2', 'objectness'))
    assert sorted(split['labels'].tolist()) == [0, 1]  # one object, twice
    assert whole['labels'].tolist() == [0, 2] and torch.allclose(whole['scores'], torch.tensor([0.9, 0.1]))
    assert len(choose(boxes, torch.full((3, 4), float('nan')), decode='objectness', **rules)['scores']) == 0


# ---- degenerate input


@pytest.mark.parametrize('droploss', [0.0, 0.01])
def test_images_without_instances_train(droploss):
    m = model(droploss=droploss).train()
    (a, ta), (b, tb) = scene(0), scene(1, 0)
    for images, targets in (([a, b], [ta, tb]), ([b], [tb])):
        losses = m(images, targets)
        assert all(torch.isfinite(v) for v in losses.values())
        sum(losses.values()).backward()
    assert losses['loss_mask'] == 0 and losses['loss_rpn_loc'] == 0 and losses['loss_cls_stage0'] > 0


def test_droploss_is_switched_off_for_self_training():
    image, target = scene(0)
    target['seed'] = 0
    with_it, never = model(droploss=0.5).train(), model(droploss=0.0).train()
    before = with_it([image], [target])['loss_cls_stage0']
    with_it.roi_heads.droploss = 0.0  # as stage cutler does after the first training
    after, want = (m([image], [target])['loss_cls_stage0'] for m in (with_it, never))
    assert before < after == want


def test_one_pixel_masks_and_boxes_on_the_border():
    m = model().train()
    image, target = scene(0, 3)
    for mask, (y, x) in zip(target['masks'], ((0, 0), (95, 127), (40, 0))):
        mask[:] = False
        mask[y, x] = True
    target['boxes'] = torch.tensor([[0.0, 0, 1, 1], [127.0, 95, 128, 96], [0.0, 40, 1, 41]])
    losses = m([image], [target])
    assert all(torch.isfinite(v) for v in losses.values()) and losses['loss_rpn_loc'] > 0
    sum(losses.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in m.parameters() if p.grad is not None)


def test_empty_batch():
    for over in {}, dict(n_stuff=0):
        m = model(**over)
        image, target = scene(0)
        assert m.eval()([]) == [] and m.train()([], []).keys() == m([image], [target]).keys()
        losses = m([], [])
        sum(losses.values()).backward()
        assert all(v == 0 for v in losses.values()) and all((p.grad == 0).all() for p in m.parameters())


def test_no_proposals_and_no_detections():
    m = model(rpn_post_train=0, rpn_post_test=0)
    image, target = scene(0, 0)
    losses = m.train()([image], [target])
    assert all(torch.isfinite(v) for v in losses.values())
    sum(losses.values()).backward()
    found = m.eval()([image, image[:, :50, :70]])
    assert (
        [len(f['scores']) for f in found] == [0, 0]
        and found[1]['masks'].shape == (0, 50, 70)
        and found[1]['panoptic'][0].shape == (50, 70)
    )


def test_eight_hundred_classes():
    m = model(n_things=800, score_threshold=0.0013)
    image, target = scene(0)
    target['labels'] = torch.tensor([799, 0, 400])
    losses = m.train()([image], [target])
    assert abs(losses['loss_cls_stage0'] - math.log(801)) < 1
    found = m.eval()([image])[0]
    assert len(found['scores']) and found['labels'].max() < 800 and found['masks'].shape[1:] == image.shape[1:]


def test_results_at_another_size():
    m = model(decode='objectness', score_threshold=0.0, max_detections=5).eval()
    image, _ = scene(0)
    small, large = m([image])[0], m([image], sizes=[(192, 256)])[0]
    assert torch.allclose(large['boxes'], small['boxes'] * 2, atol=1e-3) and large['masks'].shape[1:] == (
        192,
        256,
    ) == tuple(large['panoptic'][0].shape)


def test_folded_norms_change_nothing():
    m = model(norm='SyncBN', fpn_norm='SyncBN').train()
    for _ in range(3):
        m.backbone(torch.randn(2, 3, 64, 64))
    m.eval()
    x = torch.randn(1, 3, 64, 64)
    got = m.backbone.bottom_up.res2[0].conv1(torch.ones(1, 8, 16, 16))
    c = m.backbone.bottom_up.res2[0].conv1
    assert torch.allclose(
        got, F.relu(c.norm(F.conv2d(torch.ones(1, 8, 16, 16), c.weight, None, c.stride, c.padding))), atol=1e-5
    )


def test_same_seeds_same_losses_whatever_the_global_state():
    m = model(rpn_batch=8, roi_batch=4).train()
    image, target = scene(0)
    runs = []
    for state in (1, 2):
        torch.manual_seed(state)
        runs.append({k: v.item() for k, v in m([image], [dict(target, seed=5)]).items()})
    assert runs[0] == runs[1]
    torch.manual_seed(3)
    assert {k: v.item() for k, v in m([image], [dict(target, seed=6)]).items()} != runs[0]


# ---- weight files


def test_torchvision_names():
    torchvision = pytest.importorskip('torchvision')
    m = build_model(dict(TINY, depth=50, width=64, n_blocks=[]))
    state = torchvision.models.resnet50().state_dict()
    renamed, own = rename_weights(state), m.state_dict()
    backbone = {k for k in own if 'bottom_up' in k}
    assert set(renamed) - {'fc.weight', 'fc.bias'} == backbone and all(
        renamed[k].shape == own[k].shape for k in backbone
    )
    assert renamed['backbone.bottom_up.res4.0.shortcut.norm.bias'] is state['layer3.0.downsample.1.bias']
    assert renamed['backbone.bottom_up.stem.conv1.norm.weight'] is state['bn1.weight']


def test_dinos_files(tmp_path):
    """The published backbone (raw .pth), its training checkpoint, and detectron2's conversion (.pkl) give the same
    backbone; heads of another purpose are named."""
    resnet = pytest.importorskip('torchvision').models.resnet50(weights=None)
    state = {k: v for k, v in resnet.state_dict().items() if not k.startswith('fc.')}
    torch.save(state, tmp_path / 'dino_resnet50_pretrain.pth')
    torch.save(
        dict(
            student={},
            teacher={f'backbone.{k}': v for k, v in state.items()} | {'head.mlp.0.weight': torch.zeros(2, 2)},
            epoch=3,
        ),
        tmp_path / 'full.pth',
    )
    d2 = {
        k.removeprefix('backbone.bottom_up.'): v.numpy()
        for k, v in rename_weights(state).items()
        if not k.endswith('num_batches_tracked')
    }
    assert 'stem.conv1.norm.weight' in d2 and 'res5.0.shortcut.norm.running_var' in d2
    (tmp_path / 'dino_RN50_pretrain_d2_format.pkl').write_bytes(
        pickle.dumps(dict(model=d2, __author__='MOCO', matching_heuristics=True), protocol=2)
    )
    backbones = []
    for name in ('dino_resnet50_pretrain.pth', 'full.pth', 'dino_RN50_pretrain_d2_format.pkl'):
        m = build_model(dict(TINY, depth=50, width=64, n_blocks=[], norm='SyncBN'))
        report = load_weights(m, tmp_path / name)
        backbone = {
            k: v for k, v in m.state_dict().items() if 'bottom_up' in k and not k.endswith('num_batches_tracked')
        }
        assert (
            len(backbone) == 265
            and set(backbone) <= set(report.loaded)
            and not report.mismatched
            and all('bottom_up' not in k for k in report.missing)
        )
        assert report.unexpected == (['head.mlp.0.weight'] if name == 'full.pth' else [])
        backbones.append(backbone)
    assert all(torch.equal(backbones[0][k], t[k]) for t in backbones for k in t) and torch.equal(
        backbones[0]['backbone.bottom_up.res4.2.conv3.weight'], state['layer3.2.conv3.weight']
    )


def test_a_released_checkpoint(tmp_path):
    "As U2Seg's and CutLER's files are: all of the trainer's state beside the weights; older ones hold constants, too."
    a, b = model(0), model(1)
    state = a.state_dict() | {
        'pixel_mean': torch.zeros(3, 1, 1),
        'pixel_std': torch.ones(3, 1, 1),
        'proposal_generator.anchor_generator.cell_anchors.0': torch.zeros(3, 4),
    }
    optimizer = torch.optim.SGD(a.parameters(), 0.1, momentum=0.9)
    sum(p.sum() for p in a.parameters()).backward()
    optimizer.step()
    torch.save(
        dict(
            model=state,
            optimizer=optimizer.state_dict(),
            scheduler=dict(base_lrs=[0.1], last_epoch=89999),
            iteration=89999,
        ),
        tmp_path / 'cocotrain_800_0089999.pth',
    )
    report = load_weights(b, tmp_path / 'cocotrain_800_0089999.pth')
    assert len(report.loaded) == len(a.state_dict()) and not report.missing + report.unexpected + report.mismatched
    other = model(0, n_things=9)
    report = load_weights(other, tmp_path / 'cocotrain_800_0089999.pth')
    assert len(report.mismatched) == 8 and len(report.loaded) == len(a.state_dict()) - 8


def test_every_kind_of_file(tmp_path):
    a, b = model(0), model(1)
    state = a.state_dict()
    save_weights(a, tmp_path / 'model.safetensors')
    torch.save(dict(model=state | {'pixel_mean': torch.zeros(3, 1, 1)}, iteration=5), tmp_path / 'model.pth')
    torch.save({'module.' + k: v for k, v in state.items()}, tmp_path / 'ddp.pth')
    arrays = {k: v.numpy() for k, v in state.items()}
    (tmp_path / 'model.pkl').write_bytes(pickle.dumps(dict(model=arrays, __author__='d2'), protocol=2))
    for name in ('model.safetensors', 'model.pth', 'ddp.pth', 'model.pkl'):
        for p in b.parameters():
            p.data.zero_()
        report = load_weights(b, tmp_path / name)
        assert all((b.state_dict()[k] == v).all() for k, v in state.items()), name
        assert len(report.loaded) == len(state) and not report.missing + report.unexpected + report.mismatched
    (tmp_path / 'backbone.pkl').write_bytes(
        pickle.dumps(
            dict(
                model={k.removeprefix('backbone.bottom_up.'): v for k, v in arrays.items() if 'bottom_up' in k},
                matching_heuristics=True,
            )
        )
    )
    assert set(load_weights(b, tmp_path / 'backbone.pkl').loaded) == {k for k in state if 'bottom_up' in k}
    assert M.read_config(tmp_path / 'model.yaml') == a.config


def test_what_does_not_fit_is_named_and_left_alone(tmp_path):
    a, b = model(0), model(1, n_things=5)
    state = a.state_dict()
    state['extra.weight'] = torch.zeros(2)
    del state['sem_seg_head.predictor.bias']
    torch.save(state, tmp_path / 'a.pth')
    before = b.state_dict()['roi_heads.mask_head.predictor.weight'].clone()
    report = load_weights(b, tmp_path / 'a.pth')
    assert report.missing == ['sem_seg_head.predictor.bias'] and report.unexpected == ['extra.weight']
    assert [m.split(' ')[0] for m in report.mismatched] == [
        f'roi_heads.box_predictor.{i}.cls_score.{p}' for i in range(3) for p in ('weight', 'bias')
    ] + [f'roi_heads.mask_head.predictor.{p}' for p in ('weight', 'bias')]
    assert (b.state_dict()['roi_heads.mask_head.predictor.weight'] == before).all()
    assert 'extra.weight' in str(report) and '[4, 16], here [6, 16]' in str(report)
    torch.save(dict(other=torch.zeros(1)), tmp_path / 'b.pth')
    with pytest.raises(ValueError, match='not one weight fits'):
        load_weights(b, tmp_path / 'b.pth')


def test_what_a_later_stage_learns_anew_is_withheld(tmp_path):
    a, b = model(0), model(1)
    save_weights(a, tmp_path / 'model.safetensors')
    before = {k: v.clone() for k, v in b.state_dict().items()}
    report = load_weights(b, tmp_path / 'model.safetensors', without=('.cls_score.', 'mask_head.predictor.'))
    assert (
        report.withheld == [k for k in before if '.cls_score.' in k or 'mask_head.predictor.' in k]
        and len(report.withheld) == 8
    )
    assert set(report.loaded) | set(report.withheld) == set(before) and not report.missing + report.mismatched
    for k, v in b.state_dict().items():
        assert torch.equal(v, before[k] if k in report.withheld else a.state_dict()[k])
    assert '8 to start anew' in str(report)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_malicious_pickles_do_not_run(tmp_path):
    m = model()
    for name, write in (
        ('a.pkl', lambda x: (tmp_path / 'a.pkl').write_bytes(pickle.dumps(x))),
        ('a.pth', lambda x: torch.save(x, tmp_path / 'a.pth')),
    ):
        write(dict(model=Malicious(str(tmp_path / 'owned'))))
        with pytest.raises(ValueError, match='cannot be read as weights'):
            load_weights(m, tmp_path / name)
        assert not (tmp_path / 'owned').exists()
    pickle.loads(pickle.dumps(Malicious(str(tmp_path / 'owned'))))  # the attack works on those who open the door
    assert (tmp_path / 'owned').exists()


@pytest.mark.parametrize('name', ['a.safetensors', 'a.pth', 'a.pkl'])
def test_broken_files_are_named(tmp_path, name):
    save_weights(model(), tmp_path / 'whole.safetensors')
    for data in (b'', b'nonsense' * 40, (tmp_path / 'whole.safetensors').read_bytes()[:900]):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=name):
            read_weights(tmp_path / name)
    with pytest.raises(ValueError, match='no such file'):
        read_weights(tmp_path / 'absent.pth')


def test_weights_in_half_precision_are_half_the_file_and_read_back(tmp_path):
    a, b = model(0), model(1)
    save_weights(a, tmp_path / 'whole.safetensors')
    save_weights(a, tmp_path / 'half.safetensors', dtype=torch.float16)
    assert (tmp_path / 'half.safetensors').stat().st_size < 0.6 * (tmp_path / 'whole.safetensors').stat().st_size
    assert len(load_weights(b, tmp_path / 'half.safetensors').loaded) == len(a.state_dict())
    for x, y in zip(a.state_dict().values(), b.state_dict().values()):
        assert y.dtype == x.dtype and torch.allclose(x.float(), y.float(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize('n', [0, 3])
def test_every_parameter_gets_a_gradient(n):
    """With labels and without, so no process waits for another's: DistributedDataParallel need not look for unused
    parameters."""
    m = model().train()
    image, target = scene(0, n=3)
    target = {k: v if k == 'sem' else v[:n] for k, v in target.items()}
    sum(v for k, v in m([image], [target]).items() if k.startswith('loss')).backward()
    assert not [k for k, p in m.named_parameters() if p.requires_grad and p.grad is None]
