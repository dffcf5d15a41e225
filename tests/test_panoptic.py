"""The merge against an oracle that looks at one pixel at a time, and the files against those who read them."""

import json

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from PIL import Image

from u2seg.images import read_json, write_png
from u2seg.masks import by_image, encode_rle, instances_json, mask_to_box, read_ids
from u2seg.semantic import read_semantic
from u2seg.panoptic import categories, link_images, merge, stuff_map, write_labels

N = 9


def oracle(instances, semantic, *, max_cover=0.7, rule='official'):
    """The definition, pixel by pixel: who is on top, then which stuff survives. Returns {(y, x): (category, key of
    the segment) or None}."""
    H, W = semantic.shape
    masks = [coco_mask.decode(a['segmentation']) for a in instances]

    def side(a, m):
        x, y, w, h = a.get('bbox') or mask_to_box(m.astype(bool))
        return w * h

    order = sorted(range(len(masks)), key=lambda i: side(instances[i], masks[i]), reverse=True)  # stable
    top = [[None] * W for _ in range(H)]
    for i in order:
        for y in range(H):
            for x in range(W):
                if masks[i][y][x]:
                    top[y][x] = i
    out = {}
    for y in range(H):
        for x in range(W):
            if top[y][x] is not None:
                out[y, x] = (instances[top[y][x]]['category_id'], ('thing', top[y][x]))
                continue
            s = int(semantic[y, x])
            pixels = [(v, u) for v in range(H) for u in range(W) if semantic[v, u] == s]
            r = sum(top[v][u] is not None for v, u in pixels) / len(pixels)
            out[y, x] = None if s == 255 or (rule == 'official' and r > max_cover) else (N + 1 + s, ('stuff', s))
    return out


@st.composite
def scenes(draw):
    H, W = draw(st.integers(1, 7)), draw(st.integers(1, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    n_stuff, fill = draw(st.integers(1, 4)), draw(st.sampled_from([0.05, 0.5, 0.95]))
    semantic = rng.choice(np.array([*range(n_stuff), 255], np.uint8), (H, W))
    instances = []
    for _ in range(draw(st.integers(0, 5))):
        if draw(st.booleans()):
            mask = rng.random((H, W)) < fill  # scattered pixels
        else:  # a rectangle, possibly empty
            (y0, y1), (x0, x1) = sorted(rng.integers(0, H + 1, 2)), sorted(rng.integers(0, W + 1, 2))
            mask = np.zeros((H, W), bool)
            mask[y0:y1, x0:x1] = True
        a = dict(category_id=int(rng.integers(1, N + 1)), segmentation=encode_rle(mask), score=float(rng.random()))
        if draw(st.booleans()):
            a['bbox'] = mask_to_box(mask)
        instances.append(a)
    return instances, semantic


@settings(max_examples=150, deadline=None)
@given(scenes(), st.sampled_from(['official', 'paper']), st.sampled_from([0.0, 0.3, 0.5, 0.7, 1.0]))
def test_merge_equals_the_oracle_pixel_by_pixel(scene, rule, max_cover):
    instances, semantic = scene
    ids, info = merge(instances, semantic, n_clusters=N, max_cover=max_cover, rule=rule)
    want = oracle(instances, semantic, max_cover=max_cover, rule=rule)
    category = {s['id']: s['category_id'] for s in info}
    key_of = {}
    assert ids.shape == semantic.shape and ids.dtype == np.int32
    for (y, x), w in want.items():
        i = int(ids[y, x])
        if w is None:
            assert i == 0
            continue
        assert category[i] == w[0]
        assert key_of.setdefault(i, w[1]) == w[1]  # one id, one segment
    assert len(set(key_of.values())) == len(key_of)  # one segment, one id


@settings(max_examples=100, deadline=None)
@given(scenes(), st.sampled_from(['official', 'paper']), st.integers(1, 6))
def test_segments_and_map_agree(scene, rule, min_area):
    instances, semantic = scene
    ids, info = merge(instances, semantic, n_clusters=N, rule=rule, min_area=min_area)
    assert [s['id'] for s in info] == list(range(1, len(info) + 1))  # per image, from 1, no gap
    assert set(np.unique(ids)) - {0} == {s['id'] for s in info}
    for s in info:
        mask = ids == s['id']
        assert s['area'] == mask.sum() and s['bbox'] == mask_to_box(mask) and s['iscrowd'] == 0
        if s['category_id'] > N:
            assert s['area'] >= min_area
    covered = np.zeros(semantic.shape, bool)
    for a in instances:
        covered |= coco_mask.decode(a['segmentation']).astype(bool)
    thing = np.isin(ids, [s['id'] for s in info if s['category_id'] <= N])
    assert (thing == covered).all()  # every covered pixel is a thing, no other is
    stuff = [s['category_id'] for s in info if s['category_id'] > N]
    assert stuff == sorted(set(stuff))  # a stuff cluster at most once, ascending


def rle(mask):
    return encode_rle(np.asarray(mask, bool))


def test_no_instances():
    ids, info = merge([], np.array([[0, 1], [1, 255]], np.uint8), n_clusters=3)
    assert ids.tolist() == [[1, 2], [2, 0]] and [s['category_id'] for s in info] == [4, 5]


def test_one_instance_covers_all():
    a = dict(category_id=2, segmentation=rle(np.ones((3, 4))))
    for rule in ('official', 'paper'):
        ids, info = merge([a], np.zeros((3, 4), np.uint8), n_clusters=3, rule=rule)
        assert (ids == 1).all() and len(info) == 1 and info[0]['bbox'] == [0, 0, 4, 3]


def test_empty_and_buried_instances_vanish():
    big, buried = np.ones((4, 4)), np.eye(4)  # equal boxes: the later one of the two lies on top
    ids, info = merge(
        [
            dict(category_id=1, segmentation=rle(buried)),
            dict(category_id=2, segmentation=rle(big)),
            dict(category_id=3, segmentation=rle(0 * big)),
        ],
        np.zeros((4, 4), np.uint8),
        n_clusters=3,
    )
    assert [s['category_id'] for s in info] == [2] and (ids == 1).all()


def test_the_threshold_itself_is_kept():
    semantic = np.zeros((1, 10), np.uint8)

    def stuff(n):
        m = np.zeros((1, 10))
        m[0, :n] = 1
        return [s['category_id'] for s in merge([dict(category_id=1, segmentation=rle(m))], semantic, n_clusters=1)[1]]

    assert stuff(7) == [1, 2] and stuff(8) == [1]  # r = .7 is not > .7


@pytest.mark.parametrize('pixels', [10, 90, 170, 1000])
def test_the_threshold_is_the_releases_division(pixels):
    covered = pixels * 7 // 10  # 63/90 > .7 is False, 63 > .7*90 is not
    mask = np.arange(pixels) < covered
    assert [
        s['area']
        for s in merge(
            [dict(category_id=1, segmentation=rle(mask[None]))], np.zeros((1, pixels), np.uint8), n_clusters=1
        )[1]
    ] == [covered, pixels - covered]


def test_box_of_the_annotation_decides_the_order():
    full, small = np.ones((2, 2)), np.array([[1, 0], [0, 0]])
    a, b = (
        dict(category_id=1, segmentation=rle(full), bbox=[0, 0, 1, 1]),
        dict(category_id=2, segmentation=rle(small), bbox=[0, 0, 9, 9]),
    )
    assert [s['category_id'] for s in merge([a, b], np.zeros((2, 2), np.uint8), n_clusters=2)[1]] == [1]


def test_codes_in_every_form():
    mask = np.random.default_rng(0).random((37, 23)) < 0.3
    compressed = rle(mask)
    runs = np.diff(np.flatnonzero(np.diff(np.r_[2, mask.ravel('F').astype(int), 2]))).tolist()
    uncompressed = dict(size=[37, 23], counts=([0] if mask[0, 0] else []) + runs)
    semantic = np.zeros((37, 23), np.uint8)
    want = merge([dict(category_id=1, segmentation=compressed)], semantic, n_clusters=1)[0]
    assert ((want == 1) == mask).all()
    for code in (dict(compressed, counts=compressed['counts'].encode()), uncompressed):
        assert (merge([dict(category_id=1, segmentation=code)], semantic, n_clusters=1)[0] == want).all()


def test_long_runs():
    mask = np.zeros((1200, 1100), bool)
    mask[5:1100, 3:1000] = True
    ids, info = merge([dict(category_id=1, segmentation=rle(mask))], np.zeros(mask.shape, np.uint8), n_clusters=1)
    assert ((ids == 1) == mask).all() and info[0]['area'] == mask.sum()


def test_wrong_input_is_named():
    semantic = np.zeros((4, 4), np.uint8)
    a = dict(category_id=1, segmentation=rle(np.eye(4)))
    with pytest.raises(ValueError, match='1 ... 1, got 2'):
        merge([dict(a, category_id=2)], semantic, n_clusters=1)
    with pytest.raises(ValueError, match=r'\[4, 4\].*\[5, 4\]'):
        merge([a], np.zeros((5, 4), np.uint8), n_clusters=1)
    with pytest.raises(ValueError, match='uint8'):
        merge([a], semantic.astype(int), n_clusters=1)
    with pytest.raises(ValueError, match='run-length'):
        merge([dict(category_id=1)], semantic, n_clusters=1)
    with pytest.raises(ValueError, match="'official' or 'paper'"):
        merge([a], semantic, n_clusters=1, rule='both')
    broken = dict(a['segmentation'], counts=a['segmentation']['counts'][:-1])
    with pytest.raises(ValueError, match='broken'):
        merge([dict(a, segmentation=broken)], semantic, n_clusters=1)


@pytest.fixture
def label_set(tmp_path):
    "Six images, one without a stuff map, one without an instance."
    rng = np.random.default_rng(0)
    images, anns = [], []
    for i in range(1, 7):
        images.append(dict(id=i, file_name=f'p/{i}.jpg', width=30, height=20))
        if i != 4:
            write_png(
                tmp_path / 'semantic' / f'{i:012d}.png',
                np.kron(rng.integers(0, 5, (4, 5)), np.ones((5, 6))).astype(np.uint8),
            )
        for _ in range(0 if i == 2 else 3):
            m = np.zeros((20, 30), bool)
            y, x = rng.integers(0, 12, 2)
            m[y : y + 8, x : x + 11] = True
            anns.append(
                dict(
                    image_id=i, category_id=int(rng.integers(1, N + 1)), segmentation=rle(m), score=float(rng.random())
                )
            )
    coco = instances_json(images, anns, [dict(id=i, name=str(i)) for i in range(1, N + 1)])

    def write(folder='out', **kw):
        options = dict(n_stuff=5, max_cover=0.7, rule='official', keep_empty=True, score_threshold=0.0, min_area=1) | kw
        return write_labels(
            coco, tmp_path / 'semantic', tmp_path / folder, work_folder=tmp_path / 'work', **options
        ), tmp_path / folder

    write.coco, write.root = coco, tmp_path
    return write


def test_files_validate(label_set):
    counts, out = label_set()
    assert counts['n_images'] == 5 and counts['n_skipped'] == 1 and '000000000004.png' in counts['skipped'][0]['reason']
    panoptic, stuff_names = read_json(out / 'panoptic.json'), sorted(p.name for p in (out / 'stuff').iterdir())
    assert (
        sorted(p.name for p in (out / 'panoptic').iterdir())
        == stuff_names
        == [a['file_name'] for a in panoptic['annotations']]
    )
    kind = {c['id']: c['isthing'] for c in panoptic['categories']}
    assert sorted(kind) == list(range(1, N + 6)) and sum(kind.values()) == N
    for a in panoptic['annotations']:
        ids, stuff = read_ids(out / 'panoptic' / a['file_name']), read_semantic(out / 'stuff' / a['file_name'])
        assert set(np.unique(ids)) - {0} == {s['id'] for s in a['segments_info']}
        want = np.full(ids.shape, 255)
        for s in a['segments_info']:
            assert s['area'] == (ids == s['id']).sum()
            want[ids == s['id']] = 0 if kind[s['category_id']] else s['category_id'] - N
        assert (stuff == want).all()


def test_instances_keep_their_whole_masks(label_set):
    counts, out = label_set()
    coco = COCO()
    coco.dataset = read_json(out / 'instances.json')
    coco.createIndex()
    assert len(coco.anns) == 12 == counts['n_instances']
    given = [a for a in label_set.coco['annotations'] if a['image_id'] != 4]
    for a, b in zip(sorted(coco.anns.values(), key=lambda a: a['id']), given):
        assert (coco.annToMask(a) == coco_mask.decode(b['segmentation'])).all() and a['area'] == coco_mask.area(
            b['segmentation']
        )
    assert counts['n_instances'] > counts['n_things'] or any(  # overlaps are really there: the map shows less of some
        s['area'] < coco_mask.area(b['segmentation'])
        for r in read_json(out / 'panoptic.json')['annotations']
        for s in r['segments_info']
        for b in given
    )


def test_panopticapi_reads_the_set(label_set):
    evaluation = pytest.importorskip('panopticapi.evaluation', reason='panopticapi is not installed')
    _, out = label_set()
    panoptic = read_json(out / 'panoptic.json')
    cats = {c['id']: c for c in panoptic['categories']}
    pairs = [
        (a, a) for a in panoptic['annotations']
    ]  # the set against itself: ids, areas and categories are checked on the way
    stat = evaluation.pq_compute_single_core(0, pairs, str(out / 'panoptic'), str(out / 'panoptic'), cats)
    assert stat.pq_average(cats, isthing=None)[0] == dict(
        pq=1.0, sq=1.0, rq=1.0, n=len({s['category_id'] for a in panoptic['annotations'] for s in a['segments_info']})
    )


def test_detectron2_reads_the_set(label_set):
    pytest.importorskip('detectron2', reason='detectron2 is not installed')
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.data.datasets import register_coco_panoptic_separated
    from detectron2.data.datasets.coco_panoptic import load_coco_panoptic_json

    _, out = label_set()
    pictures(label_set.root)
    link_images(out, label_set.root)
    name = 'u2seg_test_separated'
    if name in DatasetCatalog.list():
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    register_coco_panoptic_separated(
        'u2seg_test',
        {},
        str(out / 'images'),
        str(out / 'panoptic'),
        str(out / 'panoptic.json'),
        str(out / 'stuff'),
        str(out / 'instances_by_id.json'),
    )
    records, given = DatasetCatalog.get(name), by_image(read_json(out / 'instances.json'))
    assert [r['image_id'] for r in records] == [1, 2, 3, 5, 6]
    for r in records:
        assert (np.asarray(Image.open(r['file_name'])) == r['image_id']).all() and read_semantic(
            r['sem_seg_file_name']
        ).shape == (r['height'], r['width']) == (20, 30)
        assert [a['segmentation'] for a in r['annotations']] == [a['segmentation'] for a in given[r['image_id']]]
    meta = dict(
        thing_dataset_id_to_contiguous_id={i: i - 1 for i in range(1, N + 1)},
        stuff_dataset_id_to_contiguous_id={i: i - 1 for i in range(N + 1, N + 6)},
    )
    maps = load_coco_panoptic_json(str(out / 'panoptic.json'), str(out / 'images'), str(out / 'panoptic'), meta)
    for r in maps:
        assert set(np.unique(read_ids(r['pan_seg_file_name']))) - {0} == {s['id'] for s in r['segments_info']}


def pictures(root):
    "An image for each image of the set, all of whose pixels are its id."
    (root / 'p').mkdir(exist_ok=True)
    for i in range(1, 7):
        Image.new('RGB', (30, 20), (i, i, i)).save(root / 'p' / f'{i}.jpg', quality=100)


def test_images_are_linked_by_id(label_set):
    _, out = label_set()
    pictures(label_set.root)
    for _ in range(2):
        assert link_images(out, label_set.root) == 5  # again: the same
    coco = COCO(str(out / 'instances_by_id.json'))
    for im in coco.imgs.values():
        assert (np.asarray(Image.open(out / 'images' / im['file_name'])) == im['id']).all()
    assert sorted(p.stem for p in (out / 'images').iterdir()) == sorted(p.stem for p in (out / 'stuff').iterdir())


def test_other_stuff_maps_start_anew(label_set):
    _, out = label_set()
    before = (out / 'panoptic.json').read_bytes()
    write_png(label_set.root / 'semantic' / '000000000001.png', np.full((20, 30), 4, np.uint8))
    label_set()
    first = read_json(out / 'panoptic.json')['annotations'][0]
    assert (out / 'panoptic.json').read_bytes() != before and [
        s['category_id'] for s in first['segments_info'] if s['category_id'] > N
    ] == [N + 5]


def test_keep_empty_is_a_switch(label_set):
    assert {i['id'] for i in read_json(label_set()[1] / 'panoptic.json')['images']} == {1, 2, 3, 5, 6}
    assert {i['id'] for i in read_json(label_set('b', keep_empty=False)[1] / 'panoptic.json')['images']} == {1, 3, 5, 6}


def test_score_threshold_reaches_both_files(label_set):
    counts, out = label_set(score_threshold=0.5)
    assert (
        all(a['score'] >= 0.5 for a in read_json(out / 'instances.json')['annotations'])
        and counts['n_things'] <= counts['n_instances'] < 12
    )


def test_two_runs_give_the_same_bytes_and_knobs_matter(label_set):
    a, b = label_set()[1], label_set('again')[1]
    for f in sorted(a.rglob('*.*')):
        assert f.read_bytes() == (b / f.relative_to(a)).read_bytes(), f
    assert (label_set('paper', rule='paper', max_cover=0.0)[1] / 'panoptic.json').read_bytes() != (
        label_set('official', max_cover=0.0)[1] / 'panoptic.json'
    ).read_bytes()


def test_outputs_deleted_by_the_pipeline_come_back_from_the_scratch(label_set):
    import shutil

    _, out = label_set()
    want = {f.relative_to(out): f.read_bytes() for f in out.rglob('*.*')}
    shutil.rmtree(out)
    label_set()
    assert want == {f.relative_to(out): f.read_bytes() for f in out.rglob('*.*')}


def test_categories_are_json_and_distinct():
    cats = json.loads(json.dumps(categories(3, 2)))
    assert [c['isthing'] for c in cats] == [1, 1, 1, 0, 0] and all(len(c['color']) == 3 for c in cats)


def test_stuff_map_of_nothing():
    assert (stuff_map(np.zeros((2, 3), int), [], n_clusters=4) == 255).all()
