"""AP, PQ and semantic scores: known answers, brute force from the definitions, the reference evaluator, degenerate
cases."""

import contextlib, copy, gzip, io, itertools, json, zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from u2seg.classes import COCO_PANOPTIC, supercategories
from u2seg.baselines import ImagePrediction, merged, pack
from u2seg.evaluate import Mapping, count_votes, name_clusters, score, semantic_map
from u2seg.truth import read_truth
from u2seg.images import write_json
from u2seg.masks import decode_rle, encode_rle, ids_to_rgb, mask_to_box, read_ids, write_ids
from u2seg.metrics import (
    confusion_matrix,
    instance_ap,
    instances_from_panoptic,
    pair_counts,
    panoptic_quality,
    remap,
    semantic_from_panoptic,
    semantic_scores,
)
from u2seg.png import _inflate, count_pairs, read_map, read_runs
from u2seg.scenes import draw_dataset

NAMES = 'AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl'.split()
DATA = Path(__file__).parent / 'data'


def golden(*names):
    "JSON of tests/data, in gzip."
    return json.loads(gzip.decompress(DATA.joinpath(*names).read_bytes()))


# AP

KNOWN = dict(
    segm=[
        0.3195452758576433,
        0.5622883972521636,
        0.29892653412086784,
        0.3873740315997838,
        0.31018272403369485,
        0.3269339071005138,
        0.2682297225711534,
        0.41544868114906375,
        0.4168394992198818,
        0.4694498622754236,
        0.37675922666197265,
        0.3814715099715099,
    ],
    bbox=[
        0.5045806987249628,
        0.6969727247299577,
        0.5729816669904824,
        0.5856257209410443,
        0.5193996948036719,
        0.5013978986347466,
        0.38681277964578054,
        0.5936795762842003,
        0.595352982877607,
        0.6398109626113442,
        0.5664205978994309,
        0.5642905982905982,
    ],
)


@pytest.mark.parametrize('iou_type', ['segm', 'bbox'])
def test_cocoapi_known_answers(iou_type):
    gt = golden('ap', 'instances_val2014_100.json.gz')
    dt = golden('ap', f'instances_val2014_fake{iou_type}100_results.json.gz')
    s = instance_ap(gt, dt, iou_type=iou_type)
    assert list(s) == NAMES and np.allclose(list(s.values()), KNOWN[iou_type], rtol=0, atol=1e-9)


def _reference(gt, dt, iou_type, class_agnostic=False):
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = copy.deepcopy(gt)
        coco.createIndex()
        e = COCOeval(coco, coco.loadRes(copy.deepcopy(dt)), iou_type)
        e.params.useCats = int(not class_agnostic)
        e.evaluate()
        e.accumulate()
        e.summarize()
    return e.stats


def _same(gt, dt, iou_type, class_agnostic=False):
    assert np.allclose(
        list(instance_ap(gt, dt, iou_type=iou_type, class_agnostic=class_agnostic).values()),
        _reference(gt, dt, iou_type, class_agnostic),
        rtol=0,
        atol=1e-9,
    )


def _random_set(seed, n_images=6, n_objects=40, n_found=150, scores=6, crowd=0.15):
    """Objects and detections near them: all sizes, equal scores, crowds, a class without objects, an image without
    anything."""
    rng = np.random.default_rng(seed)
    H, W = 120, 160

    def shape(x, y, w, h):
        mask = np.zeros((H, W), bool)
        mask[int(y) : int(y + h), int(x) : int(x + w)] = True
        mask[int(y), int(x)] ^= rng.random() < 0.5
        return dict(segmentation=encode_rle(mask), bbox=mask_to_box(mask), area=float(mask.sum()))

    boxes = np.stack(
        [rng.integers(0, 60, n_objects), rng.integers(0, 40, n_objects), *rng.integers(2, 100, (2, n_objects))], 1
    )
    objects = [
        dict(
            shape(*b),
            id=i + 1,
            image_id=int(rng.integers(1, n_images)),
            category_id=int(rng.integers(1, 4)),
            iscrowd=int(rng.random() < crowd),
        )
        for i, b in enumerate(boxes)
    ]
    found = []
    for _ in range(n_found):
        i = int(rng.integers(n_objects))
        b = np.clip(boxes[i] + rng.integers(-6, 7, 4), [0, 0, 2, 2], None)
        found.append(
            dict(
                shape(*b),
                image_id=objects[i]['image_id'] if rng.random() < 0.9 else int(rng.integers(1, n_images + 1)),
                category_id=objects[i]['category_id'] if rng.random() < 0.8 else int(rng.integers(1, 5)),
                score=float(rng.integers(scores) / scores),
            )
        )
    return dict(
        images=[dict(id=i, height=H, width=W) for i in range(1, n_images + 1)],
        annotations=objects,
        categories=[dict(id=c) for c in (3, 1, 2, 4)],
    ), found


def _without(found, *keys):
    return [{k: v for k, v in d.items() if k not in keys} for d in found]


@pytest.mark.parametrize('class_agnostic', [False, True])
@pytest.mark.parametrize('iou_type', ['segm', 'bbox'])
@pytest.mark.parametrize('seed', range(4))
def test_equal_to_pycocotools(seed, iou_type, class_agnostic):
    gt, dt = _random_set(seed)
    _same(gt, dt, iou_type, class_agnostic)  # masks and boxes together: areas of boxes
    _same(gt, _without(dt, 'segmentation' if iou_type == 'bbox' else 'bbox', 'area'), iou_type, class_agnostic)


def test_more_than_a_hundred_detections_an_image():
    gt, dt = _random_set(9, n_images=2, n_objects=30, n_found=400, scores=50)
    for agnostic in (False, True):
        _same(gt, dt, 'segm', agnostic)


def test_polygons_and_plain_codes():
    gt, dt = _random_set(2)
    for a in gt['annotations'][::2]:
        x, y, w, h = a['bbox']
        a['segmentation'] = [[x, y, x + w, y, x + w, y + h, x, y + h], [x, y, x + 1, y, x + 1, y + 1]]
    a = gt['annotations'][1]
    a['segmentation'] = dict(size=[120, 160], counts=[120 * 160 - 7, 7])
    _same(gt, _without(dt, 'bbox'), 'segm')


def test_real_masks_moved():
    gt = golden('coco10', 'instances.json.gz')
    rng, sizes = np.random.default_rng(0), {im['id']: (im['height'], im['width']) for im in gt['images']}
    from u2seg.masks import decode_rle

    dt = [
        dict(
            image_id=a['image_id'],
            category_id=a['category_id'],
            score=float(rng.random()),
            segmentation=encode_rle(np.roll(decode_rle(a['segmentation']), rng.integers(-9, 10, 2), (0, 1))),
        )
        for a in gt['annotations']
        for _ in range(2)
    ]
    for agnostic in (False, True):
        _same(gt, dt, 'segm', agnostic)


def test_ap_from_its_definition():
    "One class, one threshold, boxes far apart: every step by hand."
    gt = dict(
        images=[dict(id=1), dict(id=2)],
        categories=[dict(id=1)],
        annotations=[
            dict(id=i + 1, image_id=1 + i % 2, category_id=1, bbox=[100 * i, 0, 40, 40], area=1600, iscrowd=0)
            for i in range(5)
        ],
    )
    rng = np.random.default_rng(0)
    dt = [
        dict(
            image_id=1 + i % 2,
            category_id=1,
            score=float(s),
            bbox=[100 * i + (i == 3) * 1000 + (i == 7) * 500, 0, 40, 40],
        )
        for i, s in enumerate(rng.permutation(9))
    ]
    hits, claimed, curve = [], set(), []
    for d in sorted(dt, key=lambda d: -d['score']):
        hit = next(
            (
                a['id']
                for a in gt['annotations']
                if a['bbox'] == d['bbox'] and a['image_id'] == d['image_id'] and a['id'] not in claimed
            ),
            None,
        )
        claimed.add(hit)
        hits.append(hit is not None)
        curve.append((sum(hits) / 5, sum(hits) / len(hits)))
    ap = np.mean([max([p for r, p in curve if r >= want], default=0) for want in np.linspace(0, 1, 101)])
    assert abs(instance_ap(gt, dt, iou_type='bbox')['AP50'] - ap) < 1e-9 and 0 < ap < 1


@pytest.mark.parametrize('iou_type', ['segm', 'bbox'])
def test_perfect_detections_score_one(iou_type):
    gt, _ = _random_set(5, crowd=0)
    s = instance_ap(gt, [dict(a, score=0.5) for a in gt['annotations']], iou_type=iou_type)
    assert all(abs(s[k] - 1) < 1e-9 for k in ('AP', 'AP50', 'AP75', 'AR100'))


def test_an_object_with_id_zero_counts():
    gt = dict(
        images=[dict(id=0)],
        categories=[dict(id=0)],
        annotations=[dict(id=0, image_id=0, category_id=0, bbox=[0, 0, 9, 9], area=81)],
    )
    assert instance_ap(gt, [dict(gt['annotations'][0], score=1)], iou_type='bbox')['AP'] > 1 - 1e-9


def test_nothing_found_nothing_to_find_nothing_at_all():
    gt, dt = _random_set(0)
    s = instance_ap(gt, [], iou_type='bbox')
    assert s['AP'] == s['AR100'] == 0 and set(s.values()) <= {0.0, -1.0}  # -1: no object of that size
    assert set(instance_ap(dict(gt, annotations=[]), dt, iou_type='segm').values()) == {-1.0}
    assert set(instance_ap(dict(gt, annotations=[], images=[]), [], iou_type='segm').values()) == {-1.0}
    only_crowd = dict(gt, annotations=[dict(a, iscrowd=1) for a in gt['annotations']])
    assert set(instance_ap(only_crowd, dt).values()) == {-1.0}


def test_class_agnostic_counts_every_detection():
    "Clusters that are no class of the ground truth count too."
    gt, _ = _random_set(5, crowd=0)
    assert (
        instance_ap(gt, [dict(a, score=0.5, category_id=700) for a in gt['annotations']], class_agnostic=True)['AP']
        > 1 - 1e-9
    )


def test_inputs_stay_as_they_are_and_paths_do_as_well(tmp_path):
    gt, dt = _random_set(1)
    before = copy.deepcopy((gt, dt))
    s = instance_ap(gt, dt)
    assert (gt, dt) == before
    write_json(tmp_path / 'gt.json', gt)
    write_json(tmp_path / 'dt.json', dict(images=gt['images'], annotations=dt))
    assert instance_ap(str(tmp_path / 'gt.json'), tmp_path / 'dt.json') == s


def test_faults_of_ap_are_named(tmp_path):
    gt, dt = _random_set(1)
    with pytest.raises(ValueError, match="'boxes'"):
        instance_ap(gt, dt, iou_type='boxes')
    with pytest.raises(ValueError, match='image 77 is not'):
        instance_ap(gt, [dict(dt[0], image_id=77)])
    with pytest.raises(ValueError, match='no.json: no such file'):
        instance_ap(tmp_path / 'no.json', dt)


# PQ


def test_panopticapi_known_answers():
    folder = DATA / 'pq'
    known = json.loads((folder / 'golden.json').read_bytes())
    s = panoptic_quality(folder / 'coco_gt.json', folder / 'coco_gt', folder / 'coco_pred.json', folder / 'coco_pred')
    for group in ('All', 'Things', 'Stuff'):
        assert s[group]['n'] == known[group]['n'] and all(
            abs(s[group][k] - known[group][k]) < 1e-9 for k in ('pq', 'sq', 'rq')
        )
    for c, scores in known['per_class'].items():
        assert all(abs(s['per_class'][int(c)][k] - scores[k]) < 1e-9 for k in scores)


def _brute_force_pq(gt, gt_maps, pred, pred_maps):
    "PQ pixel by pixel from its definition, with the rules for void and crowd."
    found = {a['image_id']: a for a in pred['annotations']}
    stats = {c['id']: [0, 0, 0, 0.0] for c in gt['categories']}
    for a in gt['annotations']:
        b, g, p = found[a['image_id']], gt_maps[a['file_name']], pred_maps[found[a['image_id']]['file_name']]
        void, used_p, used_g = g == 0, set(), set()
        for s, t in itertools.product(a['segments_info'], b['segments_info']):
            if s['iscrowd'] or s['category_id'] != t['category_id']:
                continue
            x, y = g == s['id'], p == t['id']
            iou = (x & y).sum() / (x | (y & ~void)).sum()
            if iou > 0.5:
                stats[s['category_id']][0] += 1
                stats[s['category_id']][3] += iou
                used_p.add(t['id'])
                used_g.add(s['id'])
        for s in a['segments_info']:
            if not s['iscrowd'] and s['id'] not in used_g:
                stats[s['category_id']][2] += 1
        for t in b['segments_info']:
            if t['id'] in used_p:
                continue
            y, crowd = (
                p == t['id'],
                [g == s['id'] for s in a['segments_info'] if s['iscrowd'] and s['category_id'] == t['category_id']][
                    -1:
                ],
            )
            if (y & np.logical_or.reduce([void, *crowd])).sum() / y.sum() <= 0.5:
                stats[t['category_id']][1] += 1
    pq = {c: iou / (tp + fp / 2 + fn / 2) for c, (tp, fp, fn, iou) in stats.items() if tp + fp + fn}
    return stats, {
        k: np.mean([v for c, v in pq.items() if w is None or c in w] or [0])
        for k, w in dict(All=None, Things={1, 2, 3}, Stuff={4, 5}).items()
    }


def _random_panoptic(seed, n_images=4, size=(40, 50), n_segments=7, crowd=0.2):
    rng = np.random.default_rng(seed)
    cats = [dict(id=c, isthing=int(c <= 3)) for c in range(1, 6)]
    gt, pred, gt_maps, pred_maps = [], [], {}, {}
    for i in range(1, n_images + 1):
        g, p = np.zeros((2, *size), np.int32)
        for k in range(1, n_segments + 1):
            y, x, h, w = rng.integers(0, 25), rng.integers(0, 30), *rng.integers(8, 30, 2)
            dy, dx = rng.integers(-3, 4, 2)
            g[y : y + h, x : x + w] = k * 70001
            p[max(y + dy, 0) : y + dy + h, max(x + dx, 0) : x + dx + w] = k
        g[rng.random(size) < 0.02] = 0
        classes = {k: int(rng.integers(1, 6)) for k in range(1, n_segments + 1)}
        gt.append(
            dict(
                image_id=i,
                file_name=f'{i}.png',
                segments_info=[
                    dict(
                        id=k * 70001,
                        category_id=c,
                        iscrowd=int(c <= 3 and rng.random() < crowd),
                        area=int((g == k * 70001).sum()),
                    )
                    for k, c in classes.items()
                    if (g == k * 70001).any()
                ],
            )
        )
        pred.append(
            dict(
                image_id=i,
                file_name=f'p{i}.png',
                segments_info=[
                    dict(id=k, category_id=c if rng.random() < 0.7 else int(rng.integers(1, 6)))
                    for k, c in classes.items()
                    if (p == k).any()
                ],
            )
        )
        gt_maps[f'{i}.png'], pred_maps[f'p{i}.png'] = g, p
    return dict(categories=cats, annotations=gt), gt_maps, dict(annotations=pred[::-1]), pred_maps


@pytest.mark.parametrize('seed', range(8))
def test_pq_by_brute_force(seed, tmp_path):
    gt, gt_maps, pred, pred_maps = _random_panoptic(seed)
    s, (stats, pq) = panoptic_quality(gt, gt_maps, pred, pred_maps), _brute_force_pq(gt, gt_maps, pred, pred_maps)
    for c, (tp, fp, fn, iou) in stats.items():
        assert [s['per_class'][c][k] for k in ('tp', 'fp', 'fn')] == [tp, fp, fn] and abs(
            s['per_class'][c]['iou'] - iou
        ) < 1e-9
    for group, value in pq.items():
        assert abs(s[group]['pq'] - value) < 1e-9
    for name, ids in (gt_maps | pred_maps).items():
        write_ids(tmp_path / name, ids)
    write_json(tmp_path / 'gt.json', gt)
    write_json(tmp_path / 'pred.json', pred)
    assert (
        panoptic_quality(tmp_path / 'gt.json', tmp_path, str(tmp_path / 'pred.json'), str(tmp_path), n_workers=3) == s
    )


def test_brute_force_sees_crowd_and_void():
    "The oracle is worth something only if the rules bite in its data."
    some = [_random_panoptic(seed) for seed in range(8)]
    plain = [
        dict(
            gt,
            annotations=[
                dict(a, segments_info=[dict(x, iscrowd=0) for x in a['segments_info']]) for a in gt['annotations']
            ],
        )
        for gt, *_ in some
    ]
    assert any(panoptic_quality(*s)['All'] != panoptic_quality(p, *s[1:])['All'] for s, p in zip(some, plain))


def test_perfect_panoptic_prediction_scores_one():
    gt, maps, _, _ = _random_panoptic(3, crowd=0)
    s = panoptic_quality(gt, maps, gt, maps)
    assert all(s[g][k] == 1 for g in ('All', 'Things', 'Stuff') for k in ('pq', 'sq', 'rq'))


def test_a_class_that_is_only_predicted_counts():
    g = np.ones((8, 8), np.int32)
    p = g.copy()
    p[:, 4:] = 2
    gt = dict(
        categories=[dict(id=1, isthing=0), dict(id=2, isthing=0)],
        annotations=[dict(image_id=1, file_name='a', segments_info=[dict(id=1, category_id=1, iscrowd=0)])],
    )
    pred = dict(
        annotations=[
            dict(image_id=1, file_name='b', segments_info=[dict(id=1, category_id=1), dict(id=2, category_id=2)])
        ]
    )
    s = panoptic_quality(gt, dict(a=g), pred, dict(b=p))
    assert s['All']['n'] == 2 and s['All']['pq'] == 0 and s['Things'] == dict(pq=0, sq=0, rq=0, n=0)


def test_the_area_of_the_json_counts_as_in_panopticapi():
    "panopticapi takes a true segment's area from the JSON, a predicted one's from the PNG."
    g = np.array([[1, 1, 1, 1, 2, 2]])
    gt = dict(
        categories=[dict(id=1, isthing=1)],
        annotations=[
            dict(
                image_id=1,
                file_name='g',
                segments_info=[dict(id=1, category_id=1, iscrowd=0, area=6), dict(id=2, category_id=1, iscrowd=0)],
            )
        ],
    )
    pred = dict(
        annotations=[
            dict(
                image_id=1,
                file_name='p',
                segments_info=[dict(id=1, category_id=1, area=999), dict(id=2, category_id=1)],
            )
        ]
    )
    s = panoptic_quality(gt, dict(g=g), pred, dict(p=g))['per_class'][1]
    assert s['tp'] == 2 and abs(s['iou'] - (4 / 6 + 1)) < 1e-12


def test_void_and_crowd_forgive_more_than_half():
    cats = [dict(id=1, isthing=1)]

    def fp(g, crowd):
        segments = [dict(id=i, category_id=1, iscrowd=int(i in crowd)) for i in np.unique(g).tolist() if i]
        pred = dict(annotations=[dict(image_id=1, file_name='p', segments_info=[dict(id=9, category_id=1)])])
        return panoptic_quality(
            dict(categories=cats, annotations=[dict(image_id=1, file_name='g', segments_info=segments)]),
            dict(g=g),
            pred,
            dict(p=np.full(g.shape, 9)),
        )['per_class'][1]['fp']

    def row(*ids):
        return np.array([ids])

    assert fp(row(0, 0, 0, 1, 2), {1, 2}) == 0  # 3 of 5 void
    assert fp(row(0, 0, 1, 2, 3, 4), {}) == 1  # 2 of 6
    assert fp(row(0, 5, 5, 1), {5}) == 0  # void and crowd together
    assert fp(row(5, 5, 1, 2), {5}) == 1  # exactly half is not more than half


def test_faults_of_pq_are_named():
    gt, gm, pred, pm = _random_panoptic(0)

    def broken(change):
        p, m = copy.deepcopy(pred), dict(pm)
        change(p, m)
        return panoptic_quality(gt, gm, p, m)

    def unknown(p, m):
        p['annotations'][0]['segments_info'][0]['category_id'] = 99

    def extra(p, m):
        m['p1.png'] = np.where(m['p1.png'] == 0, 500, m['p1.png'])

    def missing(p, m):
        p['annotations'][0]['segments_info'].append(dict(id=333, category_id=1))

    def gone(p, m):
        p['annotations'].pop()

    def size(p, m):
        m['p1.png'] = m['p1.png'][1:]

    for change, words in (
        (unknown, 'category 99'),
        (extra, 'image 1.*segment 500 is in the PNG'),
        (missing, 'segment 333 is in the JSON'),
        (gone, 'no prediction for image 1'),
        (size, 'differ in size'),
    ):
        with pytest.raises(ValueError, match=words):
            broken(change)


@pytest.mark.parametrize('method', ['vote', 'hungarian', 'hungarian+vote'])
def test_renaming_clusters_changes_no_score(method, tmp_path):
    draw_dataset(tmp_path, seed=5, n_train=1, n_val=6, kinds=('scenes',))
    truth, rng = read_truth(tmp_path, 'scenes/val'), np.random.default_rng(0)
    things, stuff = rng.permutation(12) + 1, rng.permutation(9)

    def predictions(things, stuff):
        rng, out = np.random.default_rng(1), {}
        for a in truth.panoptic['annotations']:
            mine = [
                dict(
                    t, category_id=int(things[(t['category_id'] + rng.integers(0, 3)) % 12]), score=float(rng.random())
                )
                for t in truth.instances['annotations']
                if t['image_id'] == a['image_id']
            ]
            ids = truth.ids(a)
            labels = np.array(
                [stuff[(s['category_id'] + rng.integers(0, 2)) % 9] for s in a['segments_info']] + [stuff[0]], np.uint8
            )
            semantic = labels[
                np.select([ids == s['id'] for s in a['segments_info']], range(len(labels) - 1), len(labels) - 1)
            ]
            out[a['image_id']] = merged(mine, semantic, n_clusters=12, max_cover=0.7, score_threshold=0.0)
        return out

    options = dict(n_clusters=12, n_stuff=9, match_score=0.2, match_iou=0.5, match_stuff_iou=0.15)
    scores = []
    for t, s in ((np.arange(12) + 1, np.arange(9)), (things, stuff)):
        r = predictions(t, s)
        scores.append(score(r, truth, name_clusters(count_votes(r, truth, **options), truth, matching=method)))
    assert (
        scores[0].keys() == scores[1].keys()
        and all(abs(scores[0][k] - scores[1][k]) < 1e-9 for k in scores[0])
        and 0 < scores[0]['PQ'] < 1
    )


def test_predictions_keep_their_maps_small_and_unchanged():
    rng = np.random.default_rng(0)
    blocks = lambda n, dtype: np.kron(rng.integers(0, n, (24, 32)), np.ones((20, 20))).astype(dtype)
    for labels in (blocks(28, np.uint8), blocks(900, np.uint16)):
        packed = pack(labels)
        assert (packed.unpack() == labels).all() and packed.unpack().dtype == labels.dtype
        assert len(packed.data) < labels.nbytes / 25
        packed.unpack()[:] = 0
        assert (packed.unpack() == labels).all()  # a copy was changed


def test_the_semantic_map_takes_segments_then_stuff_then_nothing():
    mapping = Mapping(things=np.array([7, -1]), stuff=np.array([20, -1]), pixels=np.array([7, 20]))
    row = lambda *labels: pack(np.array([labels], np.uint8))
    segments = [dict(id=i, category_id=i) for i in (1, 2, 3, 4)]
    p = ImagePrediction(
        ids=row(1, 2, 3, 4, 0, 0), segments=segments, stuff=row(2, 2, 2, 2, 1, 2), semantic=row(0, 1, 2, 0, 1, 2)
    )
    assert semantic_map(p, mapping).tolist() == [[7, -1, 20, -1, 20, -1]]
    assert semantic_map(ImagePrediction(semantic=p.semantic), mapping).tolist() == [[-1, 7, 20, -1, 7, 20]]


def test_supercategories_of_real_ground_truth():
    gt = golden('coco10', 'panoptic.json.gz')
    folder = DATA / 'coco10' / 'panoptic'
    assert {(c['id'], c['name'], c['supercategory'], c['isthing']) for c in gt['categories']} == {
        (c['id'], c['name'], c['supercategory'], c['isthing']) for c in COCO_PANOPTIC
    }
    joined = supercategories(gt)
    s = panoptic_quality(joined, folder, joined, folder)
    assert (
        s['All']['pq'] == 1 and len(joined['categories']) == 95 and s['Things']['n'] + s['Stuff']['n'] == s['All']['n']
    )
    instances = instances_from_panoptic(gt, folder)
    known = golden('coco10', 'instances.json.gz')
    assert len(instances['annotations']) == len(known['annotations']) and sorted(
        a['area'] for a in instances['annotations']
    ) == sorted(a['area'] for a in known['annotations'])


# semantic


def test_semantic_scores_by_brute_force():
    rng = np.random.default_rng(0)
    truth, pred = rng.choice([0, 1, 2, 3, 255], (3, 9, 9)), rng.choice([0, 1, 2, 3, 7, -1], (3, 9, 9))
    c = sum(confusion_matrix(t, p, n_truth=4, n_pred=4) for t, p in zip(truth, pred))
    s, seen = semantic_scores(c), truth != 255
    iou = [((truth == k) & (pred == k)).sum() / (((truth == k) | (pred == k)) & seen).sum() for k in range(4)]
    acc = [((truth == k) & (pred == k)).sum() / (truth == k).sum() for k in range(4)]
    share = [(truth == k).sum() / seen.sum() for k in range(4)]
    expected = ((truth == pred) & seen).sum() / seen.sum(), np.mean(iou), np.dot(share, iou), np.mean(acc)
    assert np.allclose(
        [s[k] for k in ('pixel_acc', 'mean_iou', 'fw_iou', 'mean_acc')], expected, rtol=0, atol=1e-12
    ) and np.allclose(s['per_class_iou'], iou)


def test_classes_that_do_not_occur():
    c = np.array([[4, 0, 2], [0, 0, 0], [0, 0, 0]])  # class 1 nowhere, class 2 predicted only
    s, present = semantic_scores(c), semantic_scores(c, only_present=True)
    assert (
        abs(s['mean_iou'] - (4 / 6 + 0) / 2) < 1e-12
        and abs(present['mean_iou'] - 4 / 6) < 1e-12
        and np.isnan(s['per_class_iou'][1])
    )
    assert semantic_scores(np.zeros((2, 2)))['pixel_acc'] == 0 and semantic_scores(np.zeros((2, 3)))['mean_iou'] == 0
    assert semantic_scores([[5]])['mean_iou'] == 1
    with pytest.raises(ValueError, match=r'\[3, 2\]'):
        semantic_scores(np.zeros((3, 2)))


def test_remap_has_no_chain_and_takes_any_label():
    labels = np.array([[-1, 0, 3, 8], [10**6, 5, 3, 0]])
    assert remap(labels, {3: 8, 8: 3, 0: 5, 10**6: 1}, other=255).tolist() == [[255, 5, 8, 3], [1, 255, 8, 5]]
    assert remap(labels, {}, other=7).tolist() == [[7] * 4] * 2
    assert semantic_from_panoptic(np.array([[0, 4, 9]]), [dict(id=4, category_id=2)], {2: 11}).tolist() == [
        [255, 11, 255]
    ]


# PNG as runs


def _filtered(ids, kinds):
    "The bytes of a PNG whose rows use the given filters."
    rgb = ids_to_rgb(ids).astype(int)
    H, W, _ = rgb.shape
    up, left = np.zeros_like(rgb), np.zeros_like(rgb)
    up[1:], left[:, 1:] = rgb[:-1], rgb[:, :-1]
    corner = np.zeros_like(rgb)
    corner[1:, 1:] = rgb[:-1, :-1]
    p = left + up - corner
    a, b, c = abs(p - left), abs(p - up), abs(p - corner)
    paeth = np.where((a <= b) & (a <= c), left, np.where(b <= c, up, corner))
    guess = np.stack([np.zeros_like(rgb), left, up, (left + up) // 2, paeth])
    rows = np.concatenate(
        [np.array(kinds)[:, None], ((rgb - guess[kinds, np.arange(H)]) % 256).reshape(H, -1)], 1
    ).astype(np.uint8)

    def chunk(kind, body):
        return len(body).to_bytes(4, 'big') + kind + body + zlib.crc32(kind + body).to_bytes(4, 'big')

    header = W.to_bytes(4, 'big') + H.to_bytes(4, 'big') + b'\x08\x02\0\0\0'
    packed = zlib.compress(rows.tobytes(), 6)
    return (
        b'\x89PNG\r\n\x1a\n'
        + chunk(b'IHDR', header)
        + chunk(b'IDAT', packed[:999])
        + chunk(b'IDAT', packed[999:])
        + chunk(b'IEND', b'')
    )


def _blobs(seed, H=260, W=300, n=40):
    rng, (y, x) = np.random.default_rng(seed), np.mgrid[:H, :W]
    ids = np.zeros((H, W), np.int32)
    for _ in range(n):
        cy, cx, ry, rx = rng.uniform([0, 0, 3, 3], [H, W, 60, 60])
        ids[((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 < 1] = rng.integers(1 << 24)
    return ids


@pytest.mark.parametrize('kind', [0, 1, 2, 3, 4, 'mixed'])
def test_every_filter_of_png(kind, tmp_path):
    ids = _blobs(1)
    kinds = np.random.default_rng(0).integers(0, 5, len(ids)) if kind == 'mixed' else np.full(len(ids), kind)
    (tmp_path / 'a.png').write_bytes(_filtered(ids, kinds))
    assert (read_ids(tmp_path / 'a.png') == ids).all() and (read_map(tmp_path / 'a.png') == ids).all()
    if kind not in (0,):
        assert read_runs(tmp_path / 'a.png') is not None
    write_ids(tmp_path / 'b.png', np.roll(ids, 5, 0))
    a, b = read_runs(tmp_path / 'a.png'), read_runs(tmp_path / 'b.png')
    if a is None:
        return
    assert all((x == y).all() for x, y in zip(count_pairs(a, b), pair_counts(ids, np.roll(ids, 5, 0))))


def test_maps_that_runs_do_not_serve(tmp_path):
    "Noise, grey, alpha, small: the general reader's answer."
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 1 << 24, (260, 300)).astype(np.int32)
    write_ids(tmp_path / 'noise.png', noise)
    Image.fromarray(np.full((300, 300), 7, np.uint8)).save(tmp_path / 'grey.png')
    Image.fromarray(np.full((300, 300, 4), 255, np.uint8)).save(tmp_path / 'alpha.png')
    write_ids(tmp_path / 'small.png', noise[:5, :5])
    for name in ('noise', 'grey', 'alpha', 'small'):
        assert (
            read_runs(tmp_path / f'{name}.png') is None
            and (read_map(tmp_path / f'{name}.png') == read_ids(tmp_path / f'{name}.png')).all()
        )


def test_broken_png_never_gives_other_ids(tmp_path):
    "Cut or changed anywhere, a file is read as it was or refused."
    ids, rng = _blobs(2), np.random.default_rng(0)
    good = _filtered(ids, np.full(len(ids), 2))
    for i in range(60):
        bad = bytearray(good)
        if i % 2:
            bad = bad[: rng.integers(8, len(bad))]
        else:
            bad[rng.integers(len(bad))] ^= 1 << rng.integers(8)
        (tmp_path / 'bad.png').write_bytes(bytes(bad))
        found = read_runs(tmp_path / 'bad.png')
        assert found is None or (read_map(tmp_path / 'bad.png') == ids).all()


def test_inflate_survives_garbage():
    "Any stream ends in an answer, never in a read outside of it."
    rng, place, value = np.random.default_rng(0), np.empty(5000, np.int32), np.empty(5000, np.uint8)
    data = rng.choice([0, 0, 0, 3, 200], 20000).astype(np.uint8).tobytes()
    for i in range(300):
        bad = bytearray(zlib.compress(data, i % 10))
        for _ in range(i % 7):
            bad[rng.integers(2, len(bad))] = rng.integers(256)
        m = _inflate(
            np.frombuffer(bytes(bad[: rng.integers(3, len(bad))]) + bytes(3), np.uint8), len(data), place, value
        )
        assert -1 <= m <= 5000
    place, value = np.empty(20000, np.int32), np.empty(20000, np.uint8)
    m, flat = (
        _inflate(np.frombuffer(zlib.compress(data, 6) + bytes(3), np.uint8), len(data), place, value),
        np.frombuffer(data, np.uint8),
    )
    assert (place[:m] == np.flatnonzero(flat)).all() and (value[:m] == flat[flat > 0]).all()
