"""Decisions by name (33_joined): against plain loops, at the limits, and through the whole network."""

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou

from u2seg.joined import choose_by_name, join_clusters, join_stuff
from u2seg.model import build_model
from u2seg.pixels import combine

RULES = dict(threshold=0.05, nms_iou=0.5, n_max=20)
NETWORK = dict(n_things=6, n_stuff=4, depth=18, width=8, n_blocks=[1, 1, 1, 1], fpn_channels=16, fc_dim=16)
NETWORK |= dict(sem_dim=8, mask_dim=8, n_mask_convs=1, norm='GN', fpn_norm='GN', rpn_pre_test=60, rpn_post_test=40)
NETWORK |= dict(panoptic_area=20, min_size=96, max_size=96, score_threshold=0.02, panoptic_score=0.1, nms=0.7)


def regions(seed, n=30, n_clusters=7):
    g = torch.Generator().manual_seed(seed)
    corner, size = torch.rand(n, 2, generator=g) * 60, 10 + torch.rand(n, 2, generator=g) * 40
    probs = (2 * torch.randn(n, n_clusters + 1, generator=g)).softmax(1)
    return torch.cat([corner, corner + size], 1), probs


def plain_choice(boxes, probs, names):
    "Candidates of each name by falling sum; one that overlaps a better one of its name is dropped."
    found = []
    for name in sorted(set(names) - {-1}):
        members = [k for k, v in enumerate(names) if v == name]
        sums = [sum(p[k] for k in members) for p in probs.tolist()]
        kept = []
        for r in sorted(range(len(sums)), key=lambda r: -sums[r]):
            if sums[r] > RULES['threshold'] and all(box_iou(boxes[[r]], boxes[[s]]) <= RULES['nms_iou'] for s in kept):
                kept.append(r)
                found.append((sums[r], r, max(members, key=lambda k: probs[r, k])))
    return sorted(found, key=lambda f: -f[0])[: RULES['n_max']]


@pytest.mark.parametrize('seed', range(6))
def test_detections_by_name_are_those_of_a_plain_loop(seed):
    boxes, probs = regions(seed)
    names = [3, 3, 1, -1, 3, 1, 9]
    named = join_clusters(names, []).things
    found = choose_by_name(boxes, probs, named, decode='objectness', **RULES)
    want = plain_choice(boxes, probs, names)
    assert found['labels'].tolist() == [k for _, _, k in want]
    assert torch.equal(found['boxes'], boxes[[r for _, r, _ in want]])
    torch.testing.assert_close(found['scores'], torch.tensor([s for s, _, _ in want]))
    sums = lambda r: [probs[r, [k for k, v in enumerate(names) if v == n]].sum() for n in sorted({*names} - {-1})]
    objectness = [1 - probs[r, -1] if abs(s - max(sums(r))) < 1e-6 else torch.tensor(s) for s, r, _ in want]
    torch.testing.assert_close(found['objectness'], torch.stack(objectness))
    assert 'objectness' not in choose_by_name(boxes, probs, named, decode='detectron2', **RULES)


def test_a_cluster_without_a_name_is_never_chosen():
    boxes, probs = regions(0)
    probs[:, 3] += 5  # it would win everywhere
    named = join_clusters([0, 1, 2, -1, 3, 4, 5], []).things
    found = choose_by_name(boxes, probs, named, decode='objectness', **RULES)
    assert len(found['labels']) and 3 not in found['labels']
    logits = torch.randn(2, 5, 6, 6, generator=torch.Generator().manual_seed(0))
    logits[:, 2] = 50.0
    assert 2 not in join_stuff(logits, join_clusters([], [0, -1, 0, 1]).stuff).argmax(1)


def test_regions_that_are_no_numbers_are_left_out():
    boxes, probs = regions(4)
    boxes[3, 0], probs[5, 2] = torch.inf, torch.nan
    named = join_clusters([0, 0, 1, 1, 2, 2, 2], []).things
    rest = [r for r in range(len(boxes)) if r not in (3, 5)]
    got, want = (
        choose_by_name(b, p, named, decode='objectness', **RULES)
        for b, p in ((boxes, probs), (boxes[rest], probs[rest]))
    )
    assert all(torch.equal(got[k], want[k]) for k in want)


def test_half_precision_does_not_touch_the_sums():
    boxes, probs = regions(3)
    named = join_clusters([0, 0, 1, 1, 2, 2, 2], []).things
    want = choose_by_name(boxes, probs, named, decode='objectness', **RULES)
    with torch.autocast('cpu', torch.bfloat16):
        got = choose_by_name(boxes, probs, named, decode='objectness', **RULES)
    assert all(torch.equal(got[k], want[k]) for k in want)


def test_only_the_likeliest_name_of_a_region_enters_by_its_objectness():
    box, probs = torch.tensor([[0.0, 0, 30, 30]]), torch.tensor([[0.55, 0.06, 0.29, 0.10]])
    found = choose_by_name(box, probs, join_clusters([0, 1, -1], []).things, decode='objectness', **RULES)
    torch.testing.assert_close(found['objectness'], torch.tensor([0.90, 0.06]))


def test_stuff_by_name_is_the_argmax_of_summed_probabilities():
    logits = 3 * torch.randn(3, 7, 9, 11, generator=torch.Generator().manual_seed(1))
    names = [5, 2, 5, -1, 2, 8]
    got = join_stuff(logits, join_clusters([], names).stuff).argmax(1)
    p = logits.softmax(1)
    first = {n: 1 + names.index(n) for n in (5, 2, 8)}
    sums = torch.stack([p[:, 0], *(sum(p[:, 1 + k] for k, v in enumerate(names) if v == n) for n in first)])
    assert torch.equal(got, torch.tensor([0, *first.values()])[sums.argmax(0)])


@pytest.fixture(scope='module')
def net():
    torch.manual_seed(0)
    model = build_model(NETWORK | dict(decode='detectron2')).eval()
    for p in model.roi_heads.box_predictor:
        torch.nn.init.normal_(p.cls_score.weight, std=0.3)
    return model


def run(net, joined, decode):
    net.roi_heads.decoding['decode'] = decode
    image = torch.randint(0, 256, (3, 96, 96), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    with torch.inference_mode():
        return net([image], joined=joined)[0]


def test_a_name_for_each_cluster_changes_nothing(net):
    plain, named = run(net, None, 'detectron2'), run(net, join_clusters(np.arange(6), np.arange(4)), 'detectron2')
    assert len(plain['boxes'])
    for k in ('boxes', 'labels', 'masks', 'semantic'):
        assert torch.equal(plain[k], named[k]), k
    torch.testing.assert_close(plain['scores'], named['scores'])
    assert torch.equal(plain['panoptic'][0], named['panoptic'][0])


def test_all_clusters_of_one_name_leave_one_detection_a_region(net):
    plain, named = (run(net, j, 'detectron2') for j in (None, join_clusters([0] * 6, [0] * 4)))
    assert (box_iou(plain['boxes'], plain['boxes']) > 0.99).sum() > len(plain['boxes'])  # a region of several clusters
    assert ((box_iou(named['boxes'], named['boxes']) > NETWORK['nms']) == torch.eye(len(named['boxes'])).bool()).all()
    assert named['scores'][0] > plain['scores'][0] + 0.1  # the sum over six clusters


def test_an_image_by_name_has_one_segment_for_each_name_of_stuff(net):
    named = run(net, join_clusters([0, 0, 0, 1, 1, 1], [7, 7, 7, 7]), 'detectron2')
    stuff = [s for s in named['panoptic'][1] if not s['isthing']]
    assert [s['category_id'] for s in stuff] == [6 + 1]
    assert len({s['category_id'] for s in run(net, None, 'detectron2')['panoptic'][1] if not s['isthing']}) > 1


def test_objectness_admits_and_the_name_decides(net):
    found = run(net, join_clusters([0, 0, 0, 1, 1, 1], [0, 0, 0, 0]), 'objectness')
    assert 'objectness' not in found
    masks = torch.ones(3, 4, 4, dtype=torch.bool)
    options = dict(n_things=9, score=0.8, overlap=0.5, area=1)
    scores, labels = torch.tensor([0.55, 0.4, 0.95]), torch.tensor([4, 5, 6])
    ids, segments = combine(
        masks, scores, labels, torch.zeros(4, 4, dtype=torch.int64), torch.tensor([0.9, 0.95, 0.1]), **options
    )
    assert [(s['category_id'], round(s['score'], 2)) for s in segments] == [(5, 0.55)] and (ids == 1).all()
