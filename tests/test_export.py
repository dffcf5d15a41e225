"Export: every format is read back; counts equal, IoU of .98 or more; kills; names; the files of the user."

import json
import os
from dataclasses import replace
from xml.etree import ElementTree as ET

import numpy as np
import pytest
import yaml
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from scipy.ndimage import gaussian_filter, label

from u2seg import cli
from u2seg import export as E
from u2seg.coco import read_instances
from u2seg.forms import link_to, read_yolo
from u2seg.gallery import _clusters_of
from u2seg.images import read_json, write_json, write_png
from u2seg.masks import encode_rle, instances_json, read_ids, write_ids
from u2seg.names import Names, as_yaml, write_names
from u2seg.predictions import instances_of, map_of, read_predictions

NAMES = ['a b', '"q" & <x>', 'קטגוריה']


def regions(height, width, seed):
    "Masks that do not overlap: bands with holes and parts, and one pixel."
    noise = gaussian_filter(np.random.default_rng(seed).standard_normal((height, width)), min(height, width) / 20)
    level = np.digitize(noise, np.quantile(noise, [0.25, 0.5, 0.75]))
    pixel = np.zeros((height, width), bool)
    pixel[tuple(np.argwhere(level == 0)[0])] = True
    return [level == 1, level == 2, label(level == 3)[0] == 1, pixel]


def write_source(folder, groups, **more):
    "COCO instances with scores; masks of each image."
    images, annotations = [], []
    for i, (size, masks) in enumerate(groups, 1):
        images.append(dict(id=i, file_name=f'{i}.png', height=size[0], width=size[1]))
        for k, mask in enumerate(masks):
            row = dict(image_id=i, category_id=1 + k % 3, score=0.9 - 0.0001 * k, segmentation=encode_rle(mask))
            annotations.append(dict(row, **more))
        (folder / 'images').mkdir(parents=True, exist_ok=True)
        write_png(folder / 'images' / f'{i}.png', np.zeros((*size, 3), np.uint8))
    categories = [dict(id=i, name=n) for i, n in enumerate(NAMES, 1)]
    write_json(folder / 'instances.json', instances_json(images, annotations, categories))
    return folder / 'instances.json'


def tiles():
    "A thousand squares of 4 x 4 pixels."
    out = []
    for k in range(1000):
        mask = np.zeros((200, 250), bool)
        y, x = divmod(k, 50)
        mask[5 * y * 2 : 5 * y * 2 + 4, 5 * x : 5 * x + 4] = True
        out.append(mask)
    return out


def large():
    mask = np.hypot(*np.mgrid[-1500:1500, -2000:2000]) < 1400
    return [mask & (np.hypot(*np.mgrid[-1400:1600, -1900:2100]) > 300)]


SOURCES = dict(
    usual=lambda: [((90, 120), regions(90, 120, 0)), ((40, 30), []), ((61, 47), regions(61, 47, 1))],
    many=lambda: [((200, 250), tiles())],
    large=lambda: [((3000, 4000), large())],
)


def runs_to_mask(lengths, height, width):
    return np.repeat(np.arange(len(lengths)) % 2 == 1, lengths).reshape(height, width)


def unpack_brush(packed):
    bits = ''.join(f'{v:08b}' for v in packed)
    at = 0

    def read(n):
        nonlocal at
        at += n
        return int(bits[at - n : at], 2)

    n, width = read(32), read(5) + 1
    sizes, values, lengths = [read(4) + 1 for _ in range(4)], [], []
    while sum(lengths) < n:
        assert read(1) == 1
        lengths.append(read(sizes[read(2)]) + 1)
        values.append(read(width))
    return np.repeat(values, lengths)


def in_split(name):
    return [(s, name.format(s)) for s in ('train', 'val')]


def read_coco(out):
    found = {}
    for _, name in in_split('instances_{}.json'):
        coco, own = COCO(str(out / name)), read_instances(out / name) if read_json(out / name)['images'] else None
        assert own is None or [a['segmentation']['counts'] for a in own['annotations']] == [
            coco.annToRLE(a)['counts'].decode() for a in coco.dataset['annotations']
        ]
        for im in coco.dataset['images']:
            rows = coco.imgToAnns[im['id']]
            found[im['file_name']] = [(a['category_id'], coco.annToRLE(a)) for a in rows]
    return found


def of_map(ids, category):
    return [(category[i], encode_rle(ids == i)) for i in np.unique(ids).tolist() if i]


def read_panoptic_files(out):
    found = {}
    for split, name in in_split('panoptic_{}.json'):
        coco = read_json(out / name)
        files = {im['id']: im['file_name'] for im in coco['images']}
        for a in coco['annotations']:
            ids = read_ids(out / f'panoptic_{split}' / a['file_name'])
            assert {s['id']: s['area'] for s in a['segments_info']} == {
                i: int((ids == i).sum()) for i in np.unique(ids).tolist() if i
            }
            found[files[a['image_id']]] = of_map(ids, {s['id']: s['category_id'] for s in a['segments_info']})
    return found


def read_yolo_files(out):
    coco = read_instances(read_yolo(out / 'data.yaml'))
    found = {os.path.basename(im['file_name']): [] for im in coco['images']}
    names = {im['id']: os.path.basename(im['file_name']) for im in coco['images']}
    for a in coco['annotations']:
        found[names[a['image_id']]].append((a['category_id'], a['segmentation']))
    return found


def read_studio(out):
    found = {}
    labels = [e.get('value') for e in ET.parse(out / 'config.xml').iter('Label')]
    assert labels == NAMES
    for task in read_json(out / 'tasks.json'):
        rows = []
        for r in task['predictions'][0]['result']:
            pixels = unpack_brush(r['value']['rle']).reshape(r['original_height'], r['original_width'], 4)
            rows.append((1 + NAMES.index(r['value']['brushlabels'][0]), encode_rle(pixels[..., 3] > 0)))
        found[os.path.basename(task['data']['image'])] = rows
    return found


def read_cvat(out):
    found, top = {}, ET.parse(out / 'annotations.xml')
    assert [e.text for e in top.iterfind('meta/task/labels/label/name')] == NAMES
    for im in top.iterfind('image'):
        rows = []
        for m in im.iterfind('mask'):
            x, y, w, h = (int(m.get(k)) for k in ('left', 'top', 'width', 'height'))
            whole = np.zeros((int(im.get('height')), int(im.get('width'))), bool)
            whole[y : y + h, x : x + w] = runs_to_mask([int(v) for v in m.get('rle').split(',')], h, w)
            rows.append((1 + NAMES.index(m.get('label')), encode_rle(whole)))
        found[im.get('name')] = rows
    return found


def read_voc(out):
    found = {}
    for name in (out / 'ImageSets/Segmentation/trainval.txt').read_text().split():
        ids, classes = (
            np.array(Image.open(out / f / f'{name}.png')) for f in ('SegmentationObject', 'SegmentationClass')
        )
        found[f'{name}.png'] = of_map(ids, {i: int(classes[ids == i][0]) for i in np.unique(ids).tolist()})
        n_things = sum(c <= len(NAMES) for c, _ in found[f'{name}.png'])
        assert len(ET.parse(out / f'Annotations/{name}.xml').findall('object')) == n_things
    return found


def read_png(out):
    found = {}
    for path in (out / 'objects').iterdir():
        ids, classes = np.array(Image.open(path)), np.array(Image.open(out / 'classes' / path.name))
        found[path.name] = of_map(ids, {i: int(classes[ids == i][0]) for i in np.unique(ids).tolist()})
    return found


READERS = {
    'coco': read_coco,
    'coco-panoptic': read_panoptic_files,
    'yolo': read_yolo_files,
    'label-studio': read_studio,
    'cvat': read_cvat,
    'voc': read_voc,
    'png': read_png,
}


@pytest.mark.parametrize('source', SOURCES)
@pytest.mark.parametrize('fmt', READERS)
def test_every_mask_comes_back(fmt, source, tmp_path):
    groups = SOURCES[source]()
    path = write_source(tmp_path, groups)
    options = dict(images=tmp_path / 'images', val=0.4, link=fmt in E.PLACES)
    if (fmt, source) == ('voc', 'many'):
        with pytest.raises(ValueError, match='1.png: 1000 segments, 3 classes; voc holds 254'):
            E.export(path, tmp_path / 'out', fmt, **options)
        return
    counts = E.export(path, tmp_path / 'out', fmt, **options)
    assert counts == dict(images=len(groups), objects=sum(len(masks) for _, masks in groups))
    found, ious = READERS[fmt](tmp_path / 'out'), []
    assert sorted(found) == [f'{i}.png' for i in range(1, len(groups) + 1)]
    for i, (_, masks) in enumerate(groups, 1):
        rows = found[f'{i}.png']
        assert len(rows) == len(masks)
        if not masks:
            continue
        codes = [
            dict(r, counts=r['counts'] if isinstance(r['counts'], bytes) else r['counts'].encode()) for _, r in rows
        ]
        iou = coco_mask.iou([encode_rle(m) for m in masks], codes, [0] * len(codes))
        assert sorted(iou.argmax(1)) == list(range(len(masks)))
        assert [rows[j][0] for j in iou.argmax(1)] == [1 + k % 3 for k in range(len(masks))]
        ious += iou.max(1).tolist()
    assert min(ious) >= 0.98 and np.median(ious) >= 0.995


def files_of(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob('*') if p.is_file() and '.work' not in p.parts}


@pytest.mark.parametrize('fmt', ['coco', 'yolo', 'cvat'])
def test_a_killed_export_goes_on_to_the_same_files(fmt, tmp_path, monkeypatch):
    path = write_source(tmp_path, SOURCES['usual']())
    options = dict(images=tmp_path / 'images')
    E.export(path, tmp_path / 'whole', fmt, **options)
    one, all_ = E.FORMATS[fmt]

    def killed(job, im):
        if im['id'] == 3:
            raise KeyboardInterrupt
        return one(job, im)

    monkeypatch.setitem(E.FORMATS, fmt, (killed, all_))
    with pytest.raises(KeyboardInterrupt):
        E.export(path, tmp_path / 'cut', fmt, **options)
    assert not list((tmp_path / 'cut').rglob('*.part'))
    monkeypatch.setitem(E.FORMATS, fmt, (one, all_))
    E.export(path, tmp_path / 'cut', fmt, **options)
    whole, cut = files_of(tmp_path / 'whole'), files_of(tmp_path / 'cut')
    assert whole.keys() == cut.keys()
    assert [k for k in whole if whole[k] != cut[k] and k.name != 'data.yaml'] == []


def test_images_stay_where_they_are(tmp_path):
    path = write_source(tmp_path, SOURCES['usual']())
    before = {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in (tmp_path / 'images').iterdir()}
    E.export(path, tmp_path / 'plain', 'yolo', images=tmp_path / 'images')
    assert not [p for p in (tmp_path / 'plain' / 'images').rglob('*') if not p.is_dir()]
    E.export(path, tmp_path / 'linked', 'yolo', images=tmp_path / 'images', link=True)
    links = [p for p in (tmp_path / 'linked' / 'images').rglob('*.png')]
    assert {p.resolve() for p in links} == {p.resolve() for p in before} and all(p.is_symlink() for p in links)
    assert {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in before} == before
    with pytest.raises(ValueError, match='cvat names the images by path'):
        E.export(path, tmp_path / 'x', 'cvat', images=tmp_path / 'images', link=True)


def test_images_that_are_about_to_be_added_move_no_path(tmp_path):
    "A call that was stopped has noted images of another folder; the list is of those before."
    file = write_source(tmp_path / 'photos', [((20, 20), [])])
    coco = dict(read_json(file), info=dict(root=str(tmp_path / 'photos' / 'images')))
    write_json(tmp_path / 'out' / 'instances.json', coco)
    note = {str(tmp_path / 'photos' / 'images' / '1.png'): '1.png', str(tmp_path / 'other.png'): 'other.png'}
    write_json(tmp_path / 'out' / '.work' / 'images.json', dict(images=note))
    (image,) = read_predictions(tmp_path / 'out' / 'instances.json').images
    assert image['path'] == str(tmp_path / 'photos' / 'images' / '1.png')


def test_images_that_are_not_there_get_no_link(tmp_path):
    path = write_source(tmp_path, SOURCES['usual']())
    with pytest.raises(ValueError, match='images are not there, such as .*elsewhere.*; --images names their folder'):
        E.export(path, tmp_path / 'none', 'yolo', images=tmp_path / 'elsewhere', link=True)
    first, *others = sorted((tmp_path / 'images').rglob('*.png'))
    first.unlink()
    with pytest.warns(UserWarning, match=f'1 of {len(others) + 1} images are not there, such as .*{first.name}'):
        E.export(path, tmp_path / 'some', 'yolo', images=tmp_path / 'images', link=True)
    links = [p for p in (tmp_path / 'some' / 'images').rglob('*') if p.is_symlink()]
    assert {p.resolve() for p in links} == {p.resolve() for p in others}


def test_a_copy_of_an_image_is_not_replaced_by_a_link(tmp_path):
    (tmp_path / 'copy.png').write_bytes(b'mine')
    link_to(str(tmp_path / 'original.png'), tmp_path / 'copy.png')
    assert not (tmp_path / 'copy.png').is_symlink() and (tmp_path / 'copy.png').read_bytes() == b'mine'


def test_a_name_that_no_format_can_hold_is_named(tmp_path):
    path = write_source(tmp_path, SOURCES['usual']())
    coco = read_json(path)
    coco['images'][0]['file_name'] = 'gr\udcfcn.png'
    write_json(path, coco)
    with pytest.raises(ValueError, match=r'gr.udcfcn.png.: its name is not UTF-8; rename it'):
        E.export(path, tmp_path / 'x', 'coco', images=tmp_path / 'images')


def test_only_what_is_above_the_score(tmp_path):
    path = write_source(tmp_path, SOURCES['usual'](), score=0.4)
    assert E.export(path, tmp_path / 'a', 'coco', images=tmp_path / 'images')['objects'] == 0
    assert E.export(path, tmp_path / 'b', 'coco', images=tmp_path / 'images', score=0.4)['objects'] == 8


@pytest.mark.parametrize('score, kept', [(0.9, {1, 2, 4}), (0.5, {1, 2, 4}), (0.4, {1, 4}), (None, {1, 2, 4})])
@pytest.mark.parametrize('fmt', ['coco-panoptic', 'voc', 'png'])
def test_the_score_chooses_among_panoptic_segments(fmt, score, kept, tmp_path):
    "Below .5 the second thing is void; stuff, which has no score, stays."
    stuff, one, two = regions(60, 80, 3)[:3]
    write_source(tmp_path, [((60, 80), [one, two])])
    (tmp_path / 'panoptic').mkdir()
    write_ids(tmp_path / 'panoptic/1.png', 1 * one + 2 * two + 3 * stuff)
    segments = [dict(id=1, category_id=1, score=0.8), dict(id=2, category_id=2, score=score), dict(id=3, category_id=4)]
    categories = [dict(id=i, name=n, isthing=int(i < 4)) for i, n in enumerate([*NAMES, 'floor'], 1)]
    annotation = dict(image_id=1, file_name='1.png', segments_info=segments)
    images = read_json(tmp_path / 'instances.json')['images']
    write_json(tmp_path / 'panoptic.json', dict(images=images, categories=categories, annotations=[annotation]))
    E.export(tmp_path, tmp_path / 'out', fmt, images=tmp_path / 'images')
    found = {c: r for c, r in READERS[fmt](tmp_path / 'out')['1.png']}
    masks = {1: one, 2: two, 4: stuff}
    assert {c: r['counts'] for c, r in found.items()} == {c: encode_rle(masks[c])['counts'] for c in kept}


def write_run(folder, named):
    "A run's pseudo-labels of one image, `out/panoptic`: clusters 1 to 3 of things, 4 and 5 of stuff."
    one, two, three, pixel = regions(60, 80, 3)
    left = np.arange(80) < np.nonzero(three)[1].mean()
    masks = {1: one, 2: two, 3: three & left, 4: pixel, 5: three & ~left}
    things = [dict(image_id=1, category_id=c, score=0.9, segmentation=encode_rle(masks[c])) for c in (1, 2, 3)]
    images = [dict(id=1, file_name='a/1.png', height=60, width=80)]
    categories = [dict(id=c, name=f'cluster {c}', isthing=int(c < 4)) for c in masks]
    out = folder / 'out'
    write_json(out / 'panoptic/instances.json', instances_json(images, things, categories[:3]))
    write_ids(out / 'panoptic/panoptic/1.png', sum(c * m for c, m in masks.items()))
    segments = [dict(id=c, category_id=c) for c in masks]
    annotation = dict(image_id=1, file_name='1.png', segments_info=segments)
    panoptic = dict(images=images, categories=categories, annotations=[annotation])
    write_json(out / 'panoptic/panoptic.json', panoptic)
    write_png(folder / 'photos/a/1.png', np.zeros((60, 80, 3), np.uint8))
    write_json(out / 'cluster/clusters.json', {})
    (folder / 'params.yaml').write_text('data: {root: photos}')
    names = Names(3, 2, named, frozenset('2'), clusters=_clusters_of(out, 3).clusters)
    write_names(folder / 'names.yaml', names)
    return out / 'panoptic', masks


def test_pseudo_labels_leave_by_name(tmp_path):
    "Clusters of one name are one class, the discarded one is void; the run's own files stay."
    source, masks = write_run(tmp_path, {'1': NAMES[0], '3': NAMES[0], '4': NAMES[2], '5': NAMES[2]})
    before = files_of(tmp_path / 'out')
    assert E.export(source, tmp_path / 'coco', 'coco', val=0) == dict(images=1, objects=2)
    coco = read_json(tmp_path / 'coco/instances_train.json')
    assert coco['categories'] == [dict(id=1, name=NAMES[0])]
    assert [a['area'] for a in coco['annotations']] == [masks[1].sum(), masks[3].sum()]
    assert E.export(source, tmp_path / 'panoptic', 'coco-panoptic', val=0) == dict(images=1, objects=3)
    found = read_panoptic_files(tmp_path / 'panoptic')['a/1.png']
    expected = [(1, masks[1]), (1, masks[3]), (2, masks[4] | masks[5])]
    assert [(c, r['counts']) for c, r in found] == [(c, encode_rle(m)['counts']) for c, m in expected]
    assert os.path.realpath(read_predictions(source).images[0]['path']) == os.path.realpath(tmp_path / 'photos/a/1.png')
    assert files_of(tmp_path / 'out') == before
    (tmp_path / 'names.yaml').write_text((tmp_path / 'names.yaml').read_text().replace(NAMES[0], 'cat'))
    with pytest.raises(ValueError, match='another naming'):
        E.export(source, tmp_path / 'coco', 'coco', val=0)
    write_json(tmp_path / 'out/cluster/instances.json', {})  # clustered anew
    with pytest.raises(ValueError, match='names.yaml: the names belong to other clusters'):
        E.export(source, tmp_path / 'x', 'coco', val=0)


def test_parts_of_a_cluster_are_told_apart_in_pseudo_labels(tmp_path):
    "Cluster 1 is split by the mask's mean row; instances and segments go to the same part."
    source, masks = write_run(tmp_path, {})
    embed = lambda image, m: np.float32([[np.nonzero(x)[0].mean()] for x in m])
    middle = np.nonzero(masks[1])[0].mean()
    for centroids, name in (([[middle], [60]], 'high'), ([[-60], [middle]], 'low')):
        names = Names(3, 2, {'1a': 'high', '1b': 'low'}, parts={'1': np.float32(centroids)})
        p = replace(read_predictions(source), names=names, embed=embed, categories=names.categories)
        category = {c['name']: c['id'] for c in names.categories}
        assert instances_of(p, p.images[0], 0.5)[0]['category_id'] == category[name]
        assert map_of(p, p.images[0], 0.5)[1][0] == category[name]


def test_a_folder_holds_one_export(tmp_path):
    path = write_source(tmp_path, SOURCES['usual']())
    E.export(path, tmp_path / 'out', 'coco', images=tmp_path / 'images')
    for options, what in ((dict(fmt='yolo'), 'format'), (dict(fmt='coco', val=0.5), 'val')):
        with pytest.raises(ValueError, match=f'another {what}'):
            E.export(path, tmp_path / 'out', images=tmp_path / 'images', **options)
    with pytest.raises(ValueError, match='is not empty'):
        E.export(path, tmp_path / 'images', 'coco')


def test_names_that_differ_in_their_folders_alone(tmp_path):
    for folder in ('a', 'b'):
        (tmp_path / folder).mkdir()
        write_png(tmp_path / folder / '1.png', np.zeros((8, 8, 3), np.uint8))
    images = [dict(id=i, file_name=n, height=8, width=8) for i, n in enumerate(['a/1.png', 'b/1.png', 'a_1.png'], 1)]
    write_png(tmp_path / 'a_1.png', np.zeros((8, 8, 3), np.uint8))
    write_json(tmp_path / 'instances.json', dict(images=images, annotations=[], categories=[dict(id=1, name='x')]))
    E.export(tmp_path / 'instances.json', tmp_path / 'out', 'yolo', val=0)
    assert len(list((tmp_path / 'out/labels/train').iterdir())) == 3


def test_the_command_says_where_images_go(tmp_path, capsys):
    path = write_source(tmp_path, SOURCES['usual']())
    command = ['export', str(path), '--format', 'yolo', '--images', str(tmp_path / 'images'), '--out']
    assert cli.main([*command, str(tmp_path / 'out')]) == 0
    said = capsys.readouterr().out
    assert '3 images, 8 objects' in said and 'out/images/SPLIT; --link makes links' in said
    assert yaml.safe_load((tmp_path / 'out/data.yaml').read_text())['names'] == dict(enumerate(NAMES))
    assert 'no object has a score' not in said
    assert cli.main([*command, str(tmp_path / 'none'), '--score', '0.95']) == 0
    assert '0 objects: ' in (said := capsys.readouterr().out) and 'no object has a score of 0.95 or more' in said
    assert cli.main(['export', str(path), '--format', 'x', '--out', str(tmp_path / 'y')]) == 1
    assert 'format must be one of coco, coco-panoptic, yolo' in capsys.readouterr().err


def test_the_command_says_when_the_names_came_later(tmp_path, capsys, monkeypatch):
    write_source(tmp_path, SOURCES['usual']())
    names = Names(3, 0, {'1': 'duck'}, model='abc')
    note = dict(images={str(tmp_path / f'images/{i}.png'): f'{i}.png' for i in (1, 2, 3)}, names=as_yaml(names))
    write_json(tmp_path / '.work' / 'images.json', note)
    monkeypatch.chdir(tmp_path)
    for i, (now, warns) in enumerate(
        [
            (None, False),
            (names, False),
            (replace(names, clusters='def'), False),
            (replace(names, names={}), True),
            (replace(names, discarded=frozenset('2')), True),
            (replace(names, names={}, model='of another'), False),
        ]
    ):
        if now:
            write_names(tmp_path / 'names.yaml', now)
        assert cli.main(['export', str(tmp_path), '--format', 'coco', '--out', f'out{i}']) == 0
        assert ('was predicted with other names than names.yaml has' in capsys.readouterr().err) == warns


def test_files_are_plain_json(tmp_path):
    path = write_source(tmp_path, SOURCES['usual']())
    E.export(path, tmp_path / 'out', 'label-studio', images=tmp_path / 'images')
    tasks = json.loads((tmp_path / 'out/tasks.json').read_text())
    assert [t['data']['image'].split('?d=')[0] for t in tasks] == ['/data/local-files/'] * 3
    assert tasks[1]['predictions'][0]['result'] == []
