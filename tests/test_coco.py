"""One reader of COCO's JSON: what has one meaning is read, a single bad annotation is left out and named, the rest
is refused in a sentence."""

import copy, subprocess, sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from u2seg import evaluate
from u2seg.baselines import ImagePrediction, pack
from u2seg.truth import read_truth, sound, things_only, truth_map
from u2seg.cli import main
from u2seg.coco import read_instances
from u2seg.convert import convert_instances
from u2seg.images import read_json, write_json
from u2seg.masks import compressed, decode_rle, encode_rle, filled, write_ids
from u2seg.metrics import instance_ap, instances_from_panoptic, panoptic_quality
from u2seg.batches import PseudoLabels

SQUARE, BLOCK = np.zeros((2, 48, 64), bool)
SQUARE[5:15, 5:15] = True
BLOCK[20:40, 30:60] = True
RING = [[5, 5, 15, 5, 15, 15, 5, 15]]


def coco(**kw):
    return dict(
        dict(
            images=[dict(id=i, file_name=f'{i}.jpg', width=64, height=48) for i in (1, 2)],
            categories=[dict(id=1, name='x'), dict(id=90, name='y')],
            annotations=[
                dict(
                    id=1,
                    image_id=1,
                    category_id=1,
                    iscrowd=0,
                    area=100,
                    bbox=[5, 5, 10, 10],
                    segmentation=encode_rle(SQUARE),
                ),
                dict(
                    id=2,
                    image_id=2,
                    category_id=90,
                    iscrowd=0,
                    area=600,
                    bbox=[30, 20, 30, 20],
                    segmentation=encode_rle(BLOCK),
                ),
            ],
        ),
        **kw,
    )


def changed(f, of=coco):
    c = of()
    f(c)
    return c


def each(key, f):
    return changed(lambda c: [f(x) for x in c[key]])


def runs(mask):
    return [0] * int(mask[0, 0]) + np.diff(np.flatnonzero(np.diff(np.r_[2, mask.T.ravel(), 2]))).tolist()


def both(folder, c):
    "The objects that evaluate reads, and those that convert writes."
    write_json(folder / 'annotations' / 'instances_val.json', c)
    truth = read_truth(folder, 'val').instances['annotations']
    convert_instances(folder / 'annotations' / 'instances_val.json', folder / 'out')
    return [
        [(a['image_id'], a['category_id'], a['area'], a['iscrowd']) for a in found]
        for found in (truth, read_json(folder / 'out' / 'instances.json')['annotations'])
    ]


def mask_of(a):
    return SQUARE if a['id'] == 1 else BLOCK


FORMS = {
    'runs': each('annotations', lambda a: a.update(segmentation=dict(size=[48, 64], counts=runs(mask_of(a))))),
    'runs as floats, size as text': each(
        'annotations',
        lambda a: a.update(segmentation=dict(size=['48', '64.0'], counts=[float(n) for n in runs(mask_of(a))])),
    ),
    'polygons': each(
        'annotations', lambda a: a.update(segmentation=RING if a['id'] == 1 else [[30, 20, 60, 20, 60, 40, 30, 40]])
    ),
    'polygons as text': each(
        'annotations',
        lambda a: a.update(
            segmentation=[
                [str(v) for v in ((5, 5, 15, 5, 15, 15, 5, 15) if a['id'] == 1 else (30, 20, 60, 20, 60, 40, 30, 40))]
            ]
        ),
    ),
    'a flat ring': each(
        'annotations', lambda a: a.update(segmentation=RING[0] if a['id'] == 1 else [30, 20, 60, 20, 60, 40, 30, 40])
    ),
    'a ring of two corners beside a good one': each(
        'annotations',
        lambda a: a.update(
            segmentation=(RING if a['id'] == 1 else [[30, 20, 60, 20, 60, 40, 30, 40]]) + [[1, 1, 9, 9]]
        ),
    ),
    'ids as text': changed(
        lambda c: [
            x.update({k: str(x[k])})
            for k, rows in (('id', c['images']), ('image_id', c['annotations']), ('category_id', c['annotations']))
            for x in rows
        ]
    ),
    'ids as floats': changed(
        lambda c: [
            a.update(image_id=float(a['image_id']), category_id=float(a['category_id'])) for a in c['annotations']
        ]
    ),
    'iscrowd false': each('annotations', lambda a: a.update(iscrowd=False)),
    'iscrowd null': each('annotations', lambda a: a.update(iscrowd=None)),
    'iscrowd "0"': each('annotations', lambda a: a.update(iscrowd='0')),
    'no area, no iscrowd, no id, no box': changed(
        lambda c: [a.pop(k) for a in c['annotations'] for k in ('area', 'iscrowd', 'id', 'bbox')]
    ),
    'NaN area': each('annotations', lambda a: a.update(area=float('nan'))),
    'sides as text': each('images', lambda im: im.update(width='64', height='48.0')),
    'no sides': each('images', lambda im: [im.pop('width'), im.pop('height')]),
    'sides -1': each('images', lambda im: im.update(width=-1, height=-1)),
    'a category without a name': coco(categories=[dict(id=1), dict(id='90')]),
}


@pytest.mark.parametrize('form', FORMS)
def test_forms_of_one_meaning(tmp_path, form):
    assert both(tmp_path, FORMS[form]) == [[(1, 1, 100, 0), (2, 90, 600, 0)]] * 2


@pytest.mark.parametrize('crowd', [1, True, '1', 'true', 1.0])
def test_crowds_stay_crowds(tmp_path, crowd):
    assert (
        both(tmp_path, changed(lambda c: c['annotations'][1].update(iscrowd=crowd)))
        == [[(1, 1, 100, 0), (2, 90, 600, 1)]] * 2
    )
    labels = PseudoLabels(tmp_path, read_json(tmp_path / 'out' / 'instances.json'))
    assert [len(r) for r in labels.rles] == [1, 0]  # and are no objects to learn from


@pytest.mark.parametrize('ids', [['0000001_02999_d_0000005', '0000002'], ['000001', '000002'], [3.0, 4.0], [3, '4']])
def test_image_ids_of_any_form(tmp_path, ids):
    c = coco()
    for im, a, i in zip(c['images'], c['annotations'], ids):
        im['id'] = a['image_id'] = i
    write_json(tmp_path / 'annotations' / 'instances_val.json', c)
    truth = read_truth(tmp_path, 'val')
    assert all(type(im['id']) is int for im in truth.images) and [
        int((truth_map(truth, i) > 0).sum()) for i in ids
    ] == [100, 600]
    assert instance_ap(c, [dict(a, score=0.9) for a in c['annotations']])['AP'] > 1 - 1e-9
    assert [a['area'] for a in truth.instances['annotations']] == [100, 600] and [
        len(r) for r in PseudoLabels(tmp_path, c).rles
    ] == [1, 1]


BAD = {
    'two corners': dict(segmentation=[[26, 31, 50, 31]]),
    'an empty ring': dict(segmentation=[[]]),
    'neither mask nor box': dict(segmentation=[], bbox=[]),
    'an odd count': dict(segmentation=[[1, 1, 9, 1, 9, 9, 1]]),
    'a huge corner': dict(segmentation=[[1, 1, 2.0e8, 3.5e8, 9, 9]]),
    'a long outline': dict(segmentation=[[0, 0, 9e5, 9e5] * 50]),
    'NaN': dict(segmentation=[[1, 1, float('nan'), 1, 9, 9]]),
    'infinity': dict(segmentation=[[1, 1, float('inf'), 1, 9, 9]]),
    'words': dict(segmentation='abc'),
    'a negative box': dict(segmentation=None, bbox=[5, 5, -1, 9]),
    'short runs': dict(segmentation=dict(size=[48, 64], counts=[100, 10])),
    'long runs': dict(segmentation=dict(size=[48, 64], counts=[100, 10, 99999])),
    'negative runs': dict(segmentation=dict(size=[48, 64], counts=[100, -10, 2982])),
    'a code of another mask': dict(segmentation=dict(size=[48, 64], counts='Wfj86c==F6M3N1O111O10ZCIj<1CKP2')),
    'an empty code': dict(segmentation=dict(size=[48, 64], counts='')),
    'sides swapped': dict(segmentation=dict(size=[64, 48], counts=[0, 64 * 48])),
    'no counts': dict(segmentation=dict(size=[48, 64])),
    'iscrowd 3': dict(iscrowd=3),
    'an unknown category': dict(category_id=7),
    'category x': dict(category_id='x'),
}


@pytest.mark.parametrize('bad', BAD)
def test_one_bad_annotation_is_left_out_and_named(tmp_path, bad):
    c = coco()
    c['annotations'].insert(
        1,
        dict(
            dict(id=999, image_id=2, category_id=1, iscrowd=0, area=5, bbox=[1, 1, 5, 5], segmentation=RING), **BAD[bad]
        ),
    )
    write_json(tmp_path / 'annotations' / 'instances_val.json', c)
    with pytest.warns(
        UserWarning, match='instances_val.json: 1 of 3 annotations left out; annotation 999 of image 2: '
    ):
        truth = read_truth(tmp_path, 'val')
    assert [a['area'] for a in truth.instances['annotations']] == [100, 600]
    dt = [dict(a, score=0.9) for a in coco()['annotations']]
    with pytest.warns(UserWarning, match='annotation 999'):
        assert instance_ap(c, dt)['AP'] > 1 - 1e-9
    with pytest.raises(ValueError, match='not one of 1 annotations can be read; annotation 999 of image 2'):
        things_only(dict(c, annotations=c['annotations'][1:2]), 'a.json')
    if bad != 'an unknown category':  # a result of another class counts for nothing
        with pytest.raises(ValueError, match=r'results\[2\] of image 2: '):
            instance_ap(coco(), dt + [dict(c['annotations'][1], score=0.5)])


def test_two_images_of_one_id(tmp_path):
    c = coco()
    c['images'].append(dict(id='1', file_name='c.jpg', width=64, height=48))
    write_json(tmp_path / 'annotations' / 'instances_val.json', c)
    for read in (
        lambda: read_truth(tmp_path, 'val'),
        lambda: convert_instances(tmp_path / 'annotations' / 'instances_val.json', tmp_path),
        lambda: PseudoLabels(tmp_path, c),
        lambda: instance_ap(c, []),
    ):
        with pytest.raises(ValueError, match='two images have the id 1: 1.jpg and c.jpg'):
            read()


@pytest.mark.parametrize(
    'change,words',
    [
        (lambda a: a.pop('score'), 'image 1: score is missing'),
        (lambda a: a.update(score=float('nan')), 'image 1: score is nan'),
        (lambda a: a.update(score='high'), 'score is high'),
        (lambda a: a.update(image_id=77), 'image 77 is not one'),
        (lambda a: a.update(bbox=[1, 2, 3]), 'image 1: a box of'),
        (lambda a: (a.pop('bbox'), a.pop('segmentation')), 'image 1: neither'),
        (lambda a: a.update(category_id='x'), 'image 1: category_id x'),
        (lambda a: a.update(category_id=None), 'category_id None'),
    ],
)
def test_results_without_a_meaning_are_refused(change, words):
    dt = [dict(a, score=0.9) for a in coco()['annotations']]
    change(dt[0])
    with pytest.raises(ValueError, match=words):
        instance_ap(coco(), dt, iou_type='bbox')


def test_results_in_any_form_score_alike():
    dt = [dict(a, score=s) for a, s in zip(coco()['annotations'], ('0.9', np.float32(0.8)))]
    for a in dt:
        a |= dict(image_id=str(a['image_id']), category_id=float(a['category_id']))
    for iou_type in ('bbox', 'segm'):
        assert instance_ap(coco(), dt, iou_type=iou_type) == instance_ap(
            coco(), [dict(a, score=0.9) for a in coco()['annotations']], iou_type=iou_type
        )
    for c in (None, [1, 2], dict(coco(), images=None), {k: v for k, v in coco().items() if k != 'categories'}):
        with pytest.raises(ValueError, match='not a COCO annotation file'):
            instance_ap(c, [])
    with pytest.raises(ValueError, match='results'):
        instance_ap(coco(), None)


def test_polygons_are_those_of_pycocotools():
    "Also beyond the image, where it is the library's own cut that counts."
    rng = np.random.default_rng(0)
    for _ in range(300):
        ring = (rng.normal(0, 10 ** rng.uniform(0, 2.5), 2 * rng.integers(3, 8)) + 10).tolist()
        c = dict(coco(), annotations=[dict(id=1, image_id=1, category_id=1, segmentation=[ring])])
        assert (
            things_only(c, 'a.json')[1]['annotations'][0]['segmentation']['counts'].encode()
            == coco_mask.merge(coco_mask.frPyObjects([ring], 48, 64))['counts']
        )


def test_no_mask_library_ever_hangs_or_fills_the_memory():
    "In a process of its own, with 16 GB of addresses and two minutes of the CPU."
    code = '''import resource, sys; resource.setrlimit(resource.RLIMIT_CPU, (120, 120))
resource.setrlimit(resource.RLIMIT_AS, (16 * 10**9,) * 2)
from u2seg.metrics import instance_ap
from u2seg.masks import decode_rle
good = dict(size=[48, 64], counts=[100, 10, 38, 10, 2914])
image, category = dict(id=1, width=64, height=48), dict(id=1, name='x')
own = lambda s, **more: dict(image_id=1, category_id=1, segmentation=s, **more)
gt = lambda s: dict(images=[image], categories=[category], annotations=[own(s, id=1)])
polygons = [[[-164.1, -221.8, 2.0854e8, 3.5218e8, 225.9, 236.5]], [[1, 1, float('nan'), 1, 9, 9]]]
runs = [100, 10], [100, 10, 99999], [100, 10, 38, 10, 2913], 'Wfj86c==F6M3N1O111O10ZCIj<1CKP2'
for s in (*polygons, *(dict(size=[48, 64], counts=c) for c in runs)):
    scored = lambda: instance_ap(gt(good), [own(s, score=.9)])
    for f in (lambda: instance_ap(gt(s), []), scored, lambda: decode_rle(s)):
        try: f(); sys.exit(f'{s} was read')
        except ValueError: pass
'''
    subprocess.run([sys.executable, '-c', code], check=True, timeout=300)


def test_runs_that_fill_a_mask():
    rng = np.random.default_rng(0)
    masks = [rng.random(rng.integers(1, 40, 2)) > rng.random() for _ in range(50)]
    codes, sizes = [encode_rle(m)['counts'] for m in masks], [m.size for m in masks]
    assert (
        filled(codes, sizes).all()
        and not filled(codes, [n + 1 for n in sizes]).any()
        and not filled([c[:-1] for c in codes], sizes).any()
        and len(filled([], [])) == 0
    )
    for m in masks:
        assert (
            compressed(dict(size=list(m.shape), counts=runs(m))) == encode_rle(m)
            and (decode_rle(encode_rle(m)) == m).all()
        )
    assert not filled(['\0', 'é', 'o' * 20, ' '], [5] * 4).any()


IDS = np.zeros((48, 64), np.int32)
IDS[:20] = 1
IDS[20:40, :30] = 2


def panoptic():
    return dict(
        images=[dict(id=i, file_name=f'{i}.jpg', width=64, height=48) for i in (1, 2)],
        categories=[dict(id=1, name='t', isthing=1), dict(id=2, name='s', isthing=0)],
        annotations=[
            dict(
                image_id=i,
                file_name=f'{i}.png',
                segments_info=[
                    dict(id=1, category_id=1, iscrowd=0, area=1280),
                    dict(id=2, category_id=2, iscrowd=0, area=600),
                ],
            )
            for i in (1, 2)
        ],
    )


def first(c):
    return c['annotations'][0]


def segments(c):
    return [s for a in c['annotations'] for s in a['segments_info']]


def scored(c):
    maps = {f'{i}.png': IDS for i in (1, 2)}
    return panoptic_quality(c, maps, panoptic(), maps)


@pytest.mark.parametrize(
    'change',
    [
        lambda c: [s.update(area=0) for s in segments(c)],
        lambda c: [s.pop('area') for s in segments(c)],
        lambda c: [s.pop('iscrowd') for s in segments(c)],
        lambda c: [s.update(id=str(s['id']), category_id=str(s['category_id']), iscrowd='0') for s in segments(c)],
        lambda c: [k.update(isthing=str(k['isthing'])) for k in c['categories']],
        lambda c: [k.update(isthing=bool(k['isthing'])) for k in c['categories']],
        lambda c: [
            x.update({k: str(x[k])}) for k in ('id', 'image_id') for x in c['images'] + c['annotations'] if k in x
        ],
    ],
)
def test_panoptic_forms_of_one_meaning(change):
    s = scored(changed(change, panoptic))
    assert [s[g] for g in ('All', 'Things', 'Stuff')] == [dict(pq=1, sq=1, rq=1, n=n) for n in (2, 1, 1)]
    assert (
        len(instances_from_panoptic(changed(change, panoptic), {f'{i}.png': IDS for i in (1, 2)})['annotations']) == 2
    )


@pytest.mark.parametrize(
    'change,words',
    [
        (lambda c: c['categories'][0].pop('isthing'), 'category 1: isthing is missing'),
        (lambda c: first(c).pop('segments_info'), 'image 1: its annotation has no segments_info'),
        (lambda c: first(c).pop('file_name'), 'image 1: its annotation has no file_name'),
        (lambda c: first(c).update(image_id=9), 'image 9'),
        (lambda c: c.pop('categories'), "'categories'"),
        (lambda c: c.update(images=None), "'images'"),
        (lambda c: first(c)['segments_info'][0].update(category_id=77), 'image 1: segment 1: category 77'),
        (lambda c: c['annotations'].append(copy.deepcopy(first(c))), 'image 1 has two annotations: 1.png and 1.png'),
        (lambda c: first(c)['segments_info'][1].update(id=1), 'image 1: segment 1 is listed twice'),
        (lambda c: first(c)['segments_info'][1].update(id=2**24 + 9), 'image 1: segment 16777225: ids lie in'),
        (
            lambda c: first(c)['segments_info'].append(dict(id=33, category_id=1)),
            'image 1: ground truth: segment 33 is in the JSON, not in the PNG',
        ),
        (lambda c: first(c)['segments_info'].pop(), 'image 1: ground truth: segment 2 is in the PNG, not in the JSON'),
        (lambda c: c['categories'].append(c['categories'][0]), 'two categories have the id 1'),
        (lambda c: first(c)['segments_info'][0].update(iscrowd='x'), 'iscrowd is x'),
    ],
)
def test_faults_of_a_panoptic_truth_name_the_image(change, words):
    with pytest.raises(ValueError, match=words):
        scored(changed(change, panoptic))


def folder_of(path, c, sizes):
    write_json(path / 'annotations' / 'panoptic_val.json', c)
    for i in (1, 2):
        write_ids(path / 'annotations' / 'panoptic_val' / f'{i}.png', IDS)
    (path / 'val').mkdir(exist_ok=True)
    for i, size in sizes.items():
        Image.new('RGB', size).save(path / 'val' / f'{i}.jpg')


def predictions(truth):
    thing = dict(category_id=1, score=0.9, bbox=[0.0, 0.0, 64.0, 20.0], segmentation=encode_rle(IDS == 1))
    maps = dict(semantic=pack((IDS == 2).astype(np.uint8)), stuff=pack(np.ones(IDS.shape, np.uint8)), ids=pack(IDS))
    segments = [dict(id=1, category_id=1), dict(id=2, category_id=2)]
    return {
        im['id']: ImagePrediction(instances=[dict(thing, image_id=im['id'])], segments=segments, **maps)
        for im in truth.images
    }


def evaluated(truth):
    options = dict(n_clusters=1, n_stuff=1, match_score=0.3, match_iou=0.5, match_stuff_iou=0.5)
    return evaluate.evaluate({'val': {'U2Seg': predictions(truth)}}, {'val': truth}, {}, {}, **options)[0][0]  # by vote


def test_a_broken_or_resized_image_is_left_out_of_the_scores(tmp_path):
    folder_of(tmp_path, panoptic(), {1: (64, 48), 2: (64, 48)})
    truth = read_truth(tmp_path, 'val')
    assert sound(truth, tmp_path) is truth
    for spoil in (
        lambda f: f.write_bytes(b'\xff\xd8broken'),
        lambda f: Image.new('RGB', (32, 24)).save(f),
        lambda f: f.unlink(),
    ):
        spoil(tmp_path / 'val' / '2.jpg')
        with pytest.warns(UserWarning, match='val: 1 of 2 images left out: .*2.jpg'):
            kept = sound(truth, tmp_path)
        assert (
            [im['id'] for im in kept.images] == [1]
            and evaluated(kept)['PQ'] == 1
            and len(kept.instances['annotations']) == 1
        )
    (tmp_path / 'val' / '1.jpg').unlink()
    with pytest.raises(ValueError, match='val: 2 of 2 images left out'):
        sound(truth, tmp_path)


def test_maps_are_compared_before_any_work(tmp_path):
    folder_of(
        tmp_path,
        changed(lambda c: first(c)['segments_info'].append(dict(id=33, category_id=1)), panoptic),
        {1: (64, 48), 2: (64, 48)},
    )
    with pytest.raises(ValueError, match='image 1: ground truth: segment 33'):
        sound(read_truth(tmp_path, 'val'), tmp_path)


def test_only_stuff_is_scored_as_stuff(tmp_path):
    c = changed(lambda c: (c['categories'].pop(0), [a['segments_info'].pop(0) for a in c['annotations']]), panoptic)
    folder_of(tmp_path, c, {})
    for i in (1, 2):
        write_ids(tmp_path / 'annotations' / 'panoptic_val' / f'{i}.png', np.where(IDS == 2, 2, 0))
    s = evaluated(read_truth(tmp_path, 'val'))
    assert s['PixelAcc'] == 1 and not [k for k in s if 'AP' in k]


def test_images_of_an_instance_file_have_a_score_though_objects_hide_each_other(tmp_path):
    c = dict(
        coco(), annotations=[dict(id=i, image_id=1, category_id=1, segmentation=encode_rle(SQUARE)) for i in (1, 2)]
    )
    write_json(tmp_path / 'annotations' / 'instances_val.json', c)
    truth = read_truth(tmp_path, 'val')
    p = {
        i: ImagePrediction(ids=pack(SQUARE.astype(int) * (i == 1)), segments=[dict(id=1, category_id=1)] * (i == 1))
        for i in (1, 2)
    }
    nothing = np.array([], int)
    assert evaluate.image_pq(p, truth, evaluate.Mapping(np.array([1]), nothing, nothing)) == {1: 1, 2: 0}


def fractions(key='segmentation'):
    "Two objects whose corners are fractions of the image, as some tools write them; one of them is the whole image."
    corners = [[[0.1, 0.2, 0.7, 0.2, 0.7, 0.9001, 0.1, 0.9]], [[0, 0, 1, 0, 1, 1, 0, 1]]]
    boxes = [[0.1, 0.2, 0.6, 0.7], [0, 0, 1, 1]]
    rows = [dict(id=i, image_id=i, category_id=1, score=0.9) for i in (1, 2)]
    return [dict(a, **{key: x}) for a, x in zip(rows, corners if key == 'segmentation' else boxes)]


@pytest.mark.parametrize('key', ['segmentation', 'bbox'])
@pytest.mark.parametrize('masks', [True, False])
def test_fractions_of_the_image_are_refused(tmp_path, key, masks):
    write_json(tmp_path / 'labels.json', coco(annotations=fractions(key)))
    with pytest.raises(
        ValueError, match='labels.json: .*annotation 1 of image 1, .* in fractions of the image; pixels'
    ):
        read_instances(tmp_path / 'labels.json', masks=masks)


CORNER = [[0, 0, 1, 0, 1, 1, 0, 1]]


@pytest.mark.parametrize('polygon', [CORNER, [[0.2, 0.2, 0.9, 0.2, 0.9, 0.9]], [[40.2, 9.1, 40.6, 9.1, 40.6, 9.4]]])
def test_tiny_objects_are_read(polygon):
    rows = [dict(id=i, image_id=1, category_id=1, segmentation=s) for i, s in enumerate((polygon, RING), 1)]
    tiny, square = things_only(coco(annotations=rows), 'a.json')[1]['annotations']
    assert tiny['area'] <= 1 and square['area'] == 100


def test_an_object_in_the_first_pixel_is_read():
    one = dict(id=1, image_id=1, category_id=1, segmentation=CORNER, bbox=[0, 0, 1, 1])
    assert things_only(coco(annotations=[one]), 'a.json')[1]['annotations'][0]['area'] == 1


@pytest.mark.parametrize('verb', ['export', 'suggest', 'finetune', 'evaluate'])
def test_verbs_name_the_file_whose_corners_are_fractions(tmp_path, capsys, monkeypatch, verb):
    monkeypatch.chdir(tmp_path)
    write_json('a.json', coco(annotations=fractions()))
    write_json('whole.json', coco())
    words = dict(
        export=['a.json', '--format', 'yolo'],
        suggest=['a.json'],
        finetune=['--labels', 'a.json', '--weights', 'embedded'],
        evaluate=['a.json', '--data', 'whole.json'],
    )
    assert main([verb, *words[verb]]) == 1
    err = capsys.readouterr().err
    assert err.startswith('u2seg: a.json: ') and 'in fractions of the image' in err and err.count('\n') == 1


READERS = [['export', 'FILE', '--format', 'coco'], ['suggest', 'FILE'], ['suggest', 'whole.json', '--labelled', 'FILE']]


@pytest.mark.parametrize('words', READERS)
@pytest.mark.parametrize('name', ['p.json', 'data.yaml', 'a.png', 'nameless.json', 'scores.json'])
def test_what_is_no_file_of_instances_is_said(tmp_path, capsys, monkeypatch, words, name):
    monkeypatch.chdir(tmp_path)
    write_json('whole.json', coco())
    write_json('p.json', panoptic())
    Path('data.yaml').write_text('train: images\nnames: [a]\n')
    Image.new('RGB', (8, 8)).save('a.png')
    write_json('nameless.json', coco(images=[dict(id=i, width=64, height=48) for i in (1, 2)]))
    write_json('scores.json', coco(annotations=[dict(a, score='high') for a in coco()['annotations']]))
    said = {
        'p.json': 'a panoptic file; here instances, of masks or boxes, are read',
        'data.yaml': "is no JSON; a COCO file (.json) is read here, YOLO's data.yaml by u2seg finetune alone",
        'a.png': "is no JSON; a COCO file (.json) is read here, YOLO's data.yaml by u2seg finetune alone",
        'nameless.json': 'not a COCO annotation file (image 1 has no file_name)',
        'scores.json': 'annotation 1 of image 1: score is high, not a number',
    }
    assert main([name if w == 'FILE' else w for w in words]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f'u2seg: {name}: ') and said[name] in err and err.count('\n') == 1


def test_a_score_that_is_null_is_none(tmp_path):
    rows = [dict(a, score=s) for a, s in zip(coco()['annotations'], (None, '0.5'))]
    first, second = read_instances(coco(annotations=rows))['annotations']
    assert 'score' not in first and second['score'] == 0.5


def test_finetune_names_the_image_without_a_file_name(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, content in (('a.json', coco()), ('p.json', panoptic())):
        write_json(name, dict(content, images=[dict(id=i, width=64, height=48) for i in (1, 2)]))
        Path('p').mkdir(exist_ok=True)
        assert main(['finetune', '--labels', name, '--weights', 'embedded']) == 1
        assert f'{name}: not a COCO annotation file (image 1 has no file_name)' in capsys.readouterr().err


def test_finetune_and_convert_name_the_option_that_is_missing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('labels').mkdir()
    Path('a.txt').write_text('a')
    write_json('labels/a.json', coco())
    write_json('p.json', panoptic())
    for words, message in (
        (
            ['finetune', '--labels', 'labels/a.json', '--weights', 'embedded'],
            'labels: holds no image of a.json; see --images',
        ),
        (['finetune', '--labels', 'a.txt', '--weights', 'embedded'], 'a.txt: is no JSON; a COCO file (.json) is read'),
        (['convert', 'p.json'], 'p.json: a panoptic file; --maps names the folder of its PNGs'),
    ):
        assert main(words) == 1
        assert capsys.readouterr().err.startswith(f'u2seg: {message}')


def test_suggest_says_that_all_are_labelled(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_json('a.json', coco())
    assert main(['suggest', 'a.json', '--labelled', 'a.json']) == 1
    assert capsys.readouterr().err == 'u2seg: not one of 2 images is without labels\n'


def test_exit_status(tmp_path, capsys):
    (tmp_path / 'deep.json').write_text('[' * 100_000)
    write_json(tmp_path / 'twice.json', dict(coco(), images=coco()['images'] * 2))
    Image.new('RGB', (8, 8)).save(tmp_path / 'a.png')
    for args, words in (
        (['convert', str(tmp_path / 'deep.json')], 'deep.json: not valid JSON (nested too deeply)'),
        (['convert', str(tmp_path / 'twice.json')], 'two images have the id 1'),
        (['predict', str(tmp_path / 'a.png'), '--batch-size', '-1'], 'got -1'),
        (['predict', str(tmp_path / 'a.png'), '--batch-size', '0'], 'got 0'),
    ):
        assert main([*args, '--out', str(tmp_path / 'out')]) == 1
        err = capsys.readouterr().err
        assert words in err and err.count('\n') == 1


def test_more_objects_than_the_mask_library_measures_at_once():
    many = [dict(image_id=1, category_id=1, segmentation=RING)] * 300
    assert {a['area'] for a in things_only(coco(annotations=many), 'a.json')[1]['annotations']} == {100}
    assert instance_ap(coco(annotations=many), [])['AP'] == 0
