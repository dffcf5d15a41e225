"Matching of clusters to classes: optimality, votes by brute force, renaming."

import itertools

import numpy as np
import pytest

from u2seg.images import read_json
from u2seg.masks import encode_rle, mask_to_box
from u2seg.matching import (
    file_hash,
    instance_votes,
    map_instances,
    match_clusters,
    pixel_votes,
    save_mapping,
    semantic_votes,
)


@pytest.mark.parametrize('seed', range(5))
def test_one_to_one_is_the_best_of_all_assignments(seed):
    votes = np.random.default_rng(seed).integers(0, 20, (4, 3))
    best = max(sum(votes[i, j] for j, i in enumerate(p)) for p in itertools.permutations(range(4), 3))
    m = match_clusters(votes, 'hungarian')
    used = m[m >= 0]
    assert len(set(used)) == len(used) and sum(votes[i, j] for i, j in enumerate(m) if j >= 0) == best


def test_vote_is_the_majority_and_needs_evidence():
    votes = np.array([[0, 3, 3], [0, 0, 0], [5, 1, 1]])
    assert match_clusters(votes).tolist() == [1, -1, 0]
    assert match_clusters(np.zeros((3, 2)), 'hungarian').tolist() == [-1, -1, -1]


def test_both_keeps_the_assignment_and_names_the_rest():
    votes = np.random.default_rng(0).integers(1, 30, (12, 5))
    one, both, vote = (match_clusters(votes, m) for m in ('hungarian', 'hungarian+vote', 'vote'))
    assert (one >= 0).sum() == 5 and (both[one >= 0] == one[one >= 0]).all() and (both[one < 0] == vote[one < 0]).all()


@pytest.mark.parametrize('shape', [(0, 3), (3, 0), (0, 0)])
@pytest.mark.parametrize('method', ['vote', 'hungarian', 'hungarian+vote'])
def test_no_clusters_or_no_classes(shape, method):
    assert match_clusters(np.zeros(shape, int), method).tolist() == [-1] * shape[0]


@pytest.mark.parametrize(
    'votes, method, words',
    [
        (np.zeros(3), 'vote', r'\[clusters, classes\]'),
        (np.eye(2), 'best', "'best'"),
        (-np.eye(2), 'vote', 'negative'),
        (np.eye(2) * np.nan, 'vote', 'negative'),
    ],
)
def test_wrong_arguments_are_named(votes, method, words):
    with pytest.raises(ValueError, match=words):
        match_clusters(votes, method)


def _scene(seed):
    "Random detections and objects of three images as boxes and masks, 30 x 40."
    rng = np.random.default_rng(seed)

    def one(i, categories):
        y, x, h, w = rng.integers(0, 15), rng.integers(0, 20), rng.integers(3, 15), rng.integers(3, 20)
        mask = np.zeros((30, 40), bool)
        mask[y : y + h, x : x + w] = True
        mask[y, x] = False
        return dict(
            image_id=int(i),
            category_id=int(rng.integers(1, categories + 1)),
            segmentation=encode_rle(mask),
            bbox=mask_to_box(mask),
            score=float(rng.random()),
            mask=mask,
        )

    return [one(rng.integers(3), 6) for _ in range(60)], [
        dict(one(rng.integers(3), 4), iscrowd=int(rng.random() < 0.2)) for _ in range(20)
    ]


@pytest.mark.parametrize('iou_type', ['bbox', 'segm'])
def test_instance_votes_by_brute_force(iou_type):
    found, truth = _scene(1)
    expected = np.zeros((6, 3), int)
    for d, t in itertools.product(found, truth):
        if d['image_id'] != t['image_id'] or d['score'] < 0.4 or t['category_id'] == 4:
            continue
        a, b = (np.zeros((30, 40), bool) for _ in range(2))
        for m, o in ((a, d), (b, t)):
            x, y, w, h = map(int, o['bbox'])
            m[y : y + h, x : x + w] = True
        if iou_type == 'segm':
            a, b = d['mask'], t['mask']
        if (a & b).sum() / (a | b).sum() > 0.3:
            expected[d['category_id'] - 1, t['category_id'] - 1] += 1
    votes = instance_votes(
        found, truth, n_clusters=6, class_ids=[1, 2, 3], score_threshold=0.4, iou_threshold=0.3, iou_type=iou_type
    )
    assert (votes == expected).all() and votes.sum() > 5


def test_thresholds_are_as_in_the_release():
    "A score equal to the threshold votes; an IoU equal to it does not."
    d, t = (
        dict(image_id=1, category_id=1, bbox=[0, 0, 10, 10], score=0.4),
        dict(image_id=1, category_id=1, bbox=[0, 0, 10, 5]),
    )  # IoU exactly .5
    count = lambda s, i: instance_votes(
        [d], [t], n_clusters=1, class_ids=[1], score_threshold=s, iou_threshold=i, iou_type='bbox'
    ).sum()
    assert (count(0.4, 0.4), count(0.41, 0.4), count(0.4, 0.5)) == (1, 0, 0)


def test_no_detections_and_no_objects():
    rule = dict(n_clusters=2, class_ids=[1], score_threshold=0, iou_threshold=0.5, iou_type='bbox')
    d = dict(image_id=1, category_id=1, bbox=[0, 0, 1, 1], score=1)
    assert instance_votes([], [d], **rule).sum() == 0 and instance_votes([d], [], **rule).sum() == 0


def test_label_votes_by_brute_force():
    rng = np.random.default_rng(0)
    pred, truth = (
        rng.choice([0, 1, 2, 3, 255], (9, 11)).astype(np.uint8),
        rng.choice([0, 1, 2, 255], (9, 11)).astype(np.uint8),
    )
    pixels = pixel_votes(pred, truth, n_clusters=3, n_classes=2)
    votes = semantic_votes(pred, truth, n_clusters=3, n_classes=2, iou_threshold=0.15)
    for i, j in np.ndindex(3, 2):
        a, b = pred == i + 1, truth == j + 1
        assert pixels[i, j] == (a & b).sum() and votes[i, j] == ((a & b).sum() / (a | b).sum() > 0.15)
    with pytest.raises(ValueError, match='differ in size'):
        pixel_votes(pred, truth[1:], n_clusters=3, n_classes=2)


def test_renaming_the_clusters_renames_the_mapping():
    votes = np.random.default_rng(3).permutation(40).reshape(8, 5)  # no ties
    order = np.random.default_rng(4).permutation(8)
    for method in ('vote', 'hungarian', 'hungarian+vote'):
        assert (match_clusters(votes[order], method) == match_clusters(votes, method)[order]).all()


def test_equal_counts_do_not_depend_on_the_clusters_numbers():
    for seed in range(200):
        rng = np.random.default_rng(seed)
        votes = np.unique(rng.integers(0, 3, (9, 5)), axis=0)  # ties everywhere, no two rows the same
        order = rng.permutation(len(votes))
        for method in ('hungarian', 'hungarian+vote'):
            m = match_clusters(votes, method)
            assert (match_clusters(votes[order], method) == m[order]).all()
        one = match_clusters(votes, 'hungarian')
        best = (
            max(sum(votes[i, j] for j, i in enumerate(p)) for p in itertools.permutations(range(len(votes)), 5))
            if seed < 3 and len(votes) >= 5
            else None
        )
        assert best is None or sum(votes[i, j] for i, j in enumerate(one) if j >= 0) == best


def test_unmatched_clusters_lose_their_detections():
    found = [dict(category_id=c) for c in (1, 2, 3, 2)]
    assert map_instances(found, np.array([7, -1, 9])) == [dict(category_id=7), dict(category_id=9)]
    assert found[1] == dict(category_id=2)  # the input stays


def test_a_mapping_keeps_the_hash_of_its_model(tmp_path):
    (tmp_path / 'a').write_bytes(b'one')
    save_mapping(
        tmp_path / 'm.json', dict(things=np.array([3, -1])), model_hash=file_hash(tmp_path / 'a'), fitted_on='val'
    )
    one = '7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed'  # printf one | sha256sum
    assert read_json(tmp_path / 'm.json') == dict(model=one, fitted_on='val', mappings=dict(things=[3, -1]))
