"Class sets: counts, ids and groups against the official files' facts; carrying ground truth from one set to another."

import numpy as np
import pytest
from PIL import Image

from u2seg.classes import (
    COCO_PANOPTIC,
    COCO_THINGS,
    STUFF15,
    STUFF27,
    STUFF27_NAMES,
    SUPER_OFFSET,
    supercategories,
)
from u2seg.baselines import ImagePrediction, pack
from u2seg.evaluate import Mapping, score
from u2seg.truth import read_truth
from u2seg.images import write_json
from u2seg.masks import read_ids, write_ids
from u2seg.metrics import panoptic_quality
from u2seg.naming import fine_maps, semantic27


def spans(text):
    return [i for s in text.split() for i in (range(int(s.split('-')[0]), int(s.split('-')[-1]) + 1))]


def test_coco_things_have_the_official_ids():
    assert [c['id'] for c in COCO_THINGS] == spans('1-11 13-25 27 28 31-44 46-65 67 70 72-82 84-90') and len(
        COCO_THINGS
    ) == 80
    stuff = [c['id'] for c in COCO_PANOPTIC if not c['isthing']]
    assert len(stuff) == len(set(stuff)) == 53 and len({c['name'] for c in COCO_PANOPTIC}) == 133


SUPER = {
    'textile': '92 93 109 141 168 200',
    'building': '95 128 151 166 197',
    'raw-material': '100 195',
    'furniture-stuff': '107 112 130 133 156 161 188 189',
    'floor': '118 190',
    'plant': '119 184 193',
    'food-stuff': '122 196',
    'ground': '125 144 145 147 149 154 159 191 194',
    'structural': '138 185',
    'water': '148 155 178',
    'wall': '171 175-177 199',
    'window': '180 181',
    'ceiling': '186',
    'sky': '187',
    'solid': '192 198',
}
FINE = {
    'electronic': '71-76',
    'appliance': '77-82',
    'food': '51-60',
    'furniture': '61-70',
    'indoor': '83-90',
    'kitchen': '43-50',
    'accessory': '25-32',
    'animal': '15-24',
    'outdoor': '9-14',
    'person': '0',
    'sports': '33-42',
    'vehicle': '1-8',
    'ceiling': '101-102',
    'floor': '100 113-117',
    'food-stuff': '120-121 152 169',
    'furniture-stuff': '97 106-107 109 111 122 129 132 155 160 164',
    'raw-material': '99 131 138 142',
    'textile': '91-92 103-104 108 130 136 140 151 166-167',
    'wall': '170-176',
    'window': '179-180',
    'building': '94-95 127 150 157 165',
    'ground': '110 124-125 135 139 143-144 146 148 153 158',
    'plant': '93 96 118 123 128 133 141 162 168',
    'sky': '105 156',
    'solid': '126 134 149 159 161 181',
    'structural': '98 112 137 145 163',
    'water': '119 147 154 177-178',
}


def test_groups_are_those_of_the_papers():
    assert STUFF15 == list(SUPER) and STUFF27_NAMES == list(FINE)
    for name, ids in SUPER.items():
        assert [c['id'] for c in COCO_PANOPTIC if not c['isthing'] and c['supercategory'] == name] == spans(ids)
    for k, ids in enumerate(FINE.values()):
        assert np.flatnonzero(STUFF27 == k).tolist() == spans(ids)
    for c in COCO_THINGS:
        assert STUFF27_NAMES[STUFF27[c['id'] - 1]] == c['supercategory']  # fine id = COCO id - 1


@pytest.fixture
def coco(tmp_path):
    "Two images in COCO's layout: person, tree, grass, sky, void; and their fine maps."
    rng, notes = np.random.default_rng(0), []
    for i in (1, 2):
        ids = np.zeros((20, 30), np.int32)
        ids[:8] = 40 + i
        ids[8:14] = 50
        ids[14:19] = 60
        ids[5:12, 4 * i : 4 * i + 8] = 70
        segments = [
            dict(id=int(k), category_id=c, iscrowd=0, area=int((ids == k).sum()))
            for k, c in ((40 + i, 187), (50, 184), (60, 193), (70, 1))
        ]
        write_ids(tmp_path / 'annotations' / 'panoptic_val' / f'{i}.png', ids)
        (tmp_path / 'stuffthingmaps' / 'val').mkdir(parents=True, exist_ok=True)
        Image.fromarray(
            np.select([ids == 40 + i, ids == 50, ids == 60, ids == 70], [156, 168, 123, 0], 255).astype(np.uint8)
        ).save(tmp_path / 'stuffthingmaps' / 'val' / f'{i}.png')
        notes.append(dict(image_id=i, file_name=f'{i}.png', segments_info=segments))
    write_json(
        tmp_path / 'annotations' / 'panoptic_val.json',
        dict(
            images=[dict(id=i, file_name=f'{i}.jpg', height=20, width=30) for i in (1, 2)],
            annotations=notes,
            categories=COCO_PANOPTIC,
        ),
    )
    return tmp_path


def test_the_papers_classes_are_read_from_the_official_file(coco):
    official, paper = read_truth(coco, 'val'), read_truth(coco, 'val', classes='supercategories')
    assert (len(official.things), len(official.stuff)) == (80, 53) and (len(paper.things), len(paper.stuff)) == (80, 15)
    classes = [s['category_id'] for s in paper.panoptic['annotations'][0]['segments_info']]
    assert [paper.names[c] for c in classes] == ['sky', 'plant', 'plant', 'person'] and classes[1] == SUPER_OFFSET + 6
    assert panoptic_quality(paper.panoptic, paper.maps, paper.panoptic, paper.maps)['All'] == dict(
        pq=1.0, sq=1.0, rq=1.0, n=3
    )
    with pytest.raises(ValueError, match='category 999'):
        supercategories(dict(annotations=[dict(segments_info=[dict(category_id=999)])]))


def test_coco_stuff_27_by_brute_force(coco):
    maps = fine_maps(coco, 'val', read_truth(coco, 'val').images)
    rng, predictions, label = np.random.default_rng(1), {}, []
    for i in (1, 2):
        ids = np.zeros((20, 30), np.uint16)
        ids[5:12, 4 * i : 4 * i + 8] = 1
        ids[:4] = 2
        below = rng.integers(1, 4, (20, 30)).astype(np.uint8)  # 3 clusters of things, 3 of stuff
        if i == 2:
            below[14:] = 0  # no label: counts as a miss
        segments = [dict(id=1, category_id=2), dict(id=2, category_id=4)]
        predictions[i] = ImagePrediction(ids=pack(ids), segments=segments, stuff=pack(below))
        label.append(np.select([ids == 1, ids == 2, below > 0], [2, 4, 3 + below.astype(int)], -1))
    found, label = semantic27(predictions, maps, n_clusters=3, n_stuff=3), np.stack(label)
    gt = np.stack([STUFF27[np.array(Image.open(maps[i]))] for i in (1, 2)])
    seen = gt < 27
    best = {k: np.bincount(gt[seen & (label == k)]).argmax() for k in np.unique(label[seen]) if k > 0}
    pred = np.vectorize(lambda k: best.get(k, -1))(label)
    assert abs(found['vote']['PixelAcc27'] - (pred == gt)[seen].mean()) < 1e-12
    iou = [
        ((pred == c) & (gt == c)).sum() / (((pred == c) | (gt == c)) & seen).sum()
        for c in np.union1d(gt[seen], pred[seen])
        if c >= 0
    ]
    assert (
        abs(found['vote']['mIoU27'] - np.mean(iou)) < 1e-12
        and found['hungarian']['PixelAcc27'] <= found['vote']['PixelAcc27']
    )
    maps[2].unlink()
    with pytest.raises(FileNotFoundError, match='2.png'):
        fine_maps(coco, 'val', [dict(id=1, file_name='val/1.jpg'), dict(id=2, file_name='val/2.jpg')])
    assert fine_maps(coco, 'train', [dict(id=1, file_name='train/1.jpg')]) == {}


def test_merged_pq_is_the_pq_of_maps_that_were_merged_before(coco):
    "Four clusters of stuff for two classes; the ground truth has two segments of class plant."
    truth, rng = read_truth(coco, 'val', classes='supercategories'), np.random.default_rng(3)
    plant, sky = SUPER_OFFSET + 6, SUPER_OFFSET + 14
    mapping = Mapping(np.array([1]), np.array([plant, sky, plant, sky]), np.zeros(0, int))
    plain, joined, maps = {}, {}, {}

    def prediction(ids):
        segments = [dict(id=int(k), category_id=int(k), area=int((ids == k).sum())) for k in np.unique(ids[ids > 0])]
        return ImagePrediction(ids=pack(ids.astype(np.uint16)), segments=segments)

    for a in truth.panoptic['annotations']:
        i, gt = a['image_id'], read_ids(truth.maps / a['file_name'])
        (above,) = (s['id'] for s in a['segments_info'] if s['category_id'] == sky)
        plants = [s['id'] for s in a['segments_info'] if s['category_id'] == plant]
        (thing,) = (s['id'] for s in a['segments_info'] if s['category_id'] == 1)
        ids = np.where(gt == above, rng.choice([3, 5], gt.shape), rng.choice([2, 4], gt.shape)) * (gt > 0)
        ids = np.where(gt == thing, 1, np.where(rng.random(gt.shape) < 0.1, 3, ids))
        plain[i], joined[i] = prediction(ids), prediction(np.select([ids == 4, ids == 5], [2, 3], ids))
        maps[i] = np.where(gt == plants[1], plants[0], gt)
    s = score(plain, truth, mapping)
    assert s['PQ_stuff'] == 0 and s['PQ_things'] > 0.5  # no half of the stuff matches
    for a in truth.panoptic['annotations']:  # by hand: the two plants are one segment
        write_ids(truth.maps / a['file_name'], maps[a['image_id']])
        first, second = (x for x in a['segments_info'] if x['category_id'] == plant)
        first['area'] += second['area']
        a['segments_info'].remove(second)
    by_hand = score(joined, truth, mapping)
    assert s['PQ_merged'] == by_hand['PQ'] > s['PQ'] and s['PQ_merged_stuff'] == by_hand['PQ_stuff'] > 0.5


def test_things_joined_by_brute_force(coco):
    truth, rng = read_truth(coco, 'val', classes='supercategories'), np.random.default_rng(2)
    classes = [1, 2, SUPER_OFFSET + 6, SUPER_OFFSET + 14, SUPER_OFFSET + 1, -1]
    labels = {i: rng.integers(1, 7, (20, 30)).astype(np.uint8) for i in (1, 2)}
    nothing = np.zeros(0, int)
    s = score(
        {i: ImagePrediction(semantic=pack(m)) for i, m in labels.items()},
        truth,
        Mapping(nothing, nothing, np.array(classes)),
    )
    gt = np.zeros((2, 20, 30), int)
    for n, a in enumerate(truth.panoptic['annotations']):
        ids = read_ids(truth.maps / a['file_name'])
        for seg in a['segments_info']:
            gt[n][ids == seg['id']] = min(seg['category_id'], 100 if seg['category_id'] <= 90 else 999)
    pred = np.stack([np.array([0, *classes])[m] for m in labels.values()])
    join = lambda x: np.where((x > 0) & (x <= 90), 1, x)
    t, p, seen = join(gt), join(pred), gt > 0
    assert (
        abs(s['PixelAcc_joined'] - (t == p)[seen].mean()) < 1e-12 and s['PixelAcc_joined'] > s['PixelAcc']
    )  # class 2 counts as a thing
    iou = [((t == c) & (p == c)).sum() / (((t == c) | (p == c)) & seen).sum() for c in np.unique(t[seen])]
    assert abs(s['mIoU_joined'] - np.mean(iou)) < 1e-12
