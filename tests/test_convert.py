"Released checkpoints and annotation files: read without running them, their known faults mended, all else refused."

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from u2seg.cli import main
from u2seg.truth import GroundTruth, painter, things_only
from u2seg.annotations import convert_instances, convert_panoptic
from u2seg.convert import checkpoint_config, convert, convert_checkpoint
from u2seg.images import read_image, read_json, write_json, write_png
from u2seg.masks import decode_rle, encode_rle, read_ids, write_ids
from u2seg.model import build_model
from u2seg.predict import U2Seg

SMALL = dict(depth=18, width=8, fpn_channels=16, fc_dim=16, mask_dim=8, n_mask_convs=2, sem_dim=32)


@pytest.mark.parametrize(
    'config',
    [
        dict(n_things=5, n_stuff=3),
        dict(n_things=1, n_stuff=0),
        dict(n_things=2, n_stuff=1, fpn_norm=''),
        dict(n_things=2, n_stuff=1, depth=34),
    ],
)
def test_the_network_is_found_from_the_shapes(config, tmp_path):
    given = build_model(SMALL | config)
    torch.save(dict(model=given.state_dict(), iteration=1), tmp_path / 'a.pth')
    convert_checkpoint(tmp_path / 'a.pth', tmp_path / 'out')
    found = U2Seg.from_pretrained(tmp_path / 'out', device='cpu').model
    assert all(
        found.config[k] == v for k, v in (SMALL | config).items() if k != 'sem_dim' or config['n_stuff']
    )  # no head, no size of it
    assert all(torch.equal(v, given.state_dict()[k]) for k, v in found.state_dict().items())


def test_the_release_s_own_size():
    "ResNet-50, 800 clusters, 27 stuff: shapes alone, no memory."
    with torch.device('meta'):
        state = build_model(dict(n_things=800, n_stuff=27)).state_dict()
    assert checkpoint_config(state) == dict(
        n_things=800,
        n_stuff=27,
        depth=50,
        width=64,
        fpn_channels=256,
        fc_dim=1024,
        mask_dim=256,
        n_mask_convs=4,
        sem_dim=128,
        fpn_norm='SyncBN',
    )


def mask_rcnn(n_things=1):
    "A plain Mask R-CNN in detectron2's names: heads without a number."
    one = dict(cascade_ious=[0.5], cascade_weights=[[10.0, 10.0, 5.0, 5.0]])
    model = build_model(SMALL | one | dict(n_things=n_things, n_stuff=0, score_threshold=0.0))
    unnumbered = lambda k: k.replace('box_head.0.', 'box_head.').replace('box_predictor.0.', 'box_predictor.')
    return model, {unnumbered(k): v for k, v in model.state_dict().items()}


def test_a_plain_mask_r_cnn_is_a_cascade_of_one_stage(tmp_path):
    given, state = mask_rcnn()
    torch.save(dict(model=state, iteration=9), tmp_path / 'mrcnn.pth')
    convert(tmp_path / 'mrcnn.pth', tmp_path / 'out')
    found = U2Seg.from_pretrained(tmp_path / 'out', device='cpu').model
    assert found.config == given.config | dict(sem_dim=128)  # no head, no size of it
    assert all(torch.equal(v, given.state_dict()[k]) for k, v in found.state_dict().items())


def test_boxes_of_each_class_are_refused(tmp_path):
    _, state = mask_rcnn(n_things=3)
    for k in ('roi_heads.box_predictor.bbox_pred.weight', 'roi_heads.box_predictor.bbox_pred.bias'):
        state[k] = torch.cat([state[k]] * 3)
    torch.save(state, tmp_path / 'a.pth')
    with pytest.raises(ValueError, match='a.pth: it has boxes of each class of their own'):
        convert(tmp_path / 'a.pth', tmp_path / 'out')


def test_detectron2_pickle_of_arrays(tmp_path):
    state = {k: v.numpy() for k, v in build_model(SMALL | dict(n_things=2, n_stuff=1)).state_dict().items()}
    with open(tmp_path / 'a.pkl', 'wb') as f:
        pickle.dump(dict(model=state, __author__='x', matching_heuristics=True), f)
    assert convert(tmp_path / 'a.pkl', tmp_path / 'out')['n_things'] == 2


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize('suffix', ['.pth', '.pkl'])
@pytest.mark.parametrize('wrap', [lambda t: t, lambda t: dict(model=t), lambda t: dict(model={}, optimizer=[t])])
def test_a_pickle_that_would_run_something_does_not(tmp_path, suffix, wrap):
    path, thing = tmp_path / f'a{suffix}', wrap(Trap(tmp_path / 'sprung'))
    if suffix == '.pth':
        torch.save(thing, path)
    else:
        path.write_bytes(pickle.dumps(thing))
    with pytest.raises(ValueError, match='cannot be read as weights'):
        convert(path, tmp_path / 'out')
    (tmp_path / 'b.pth').write_bytes(pickle.dumps(thing))  # a bare pickle under torch's suffix
    with pytest.raises(ValueError):
        convert(tmp_path / 'b.pth', tmp_path / 'out')
    assert not (tmp_path / 'sprung').exists() and not (tmp_path / 'out').exists()


def test_other_and_incomplete_checkpoints_are_refused(tmp_path):
    state = build_model(SMALL | dict(n_things=2, n_stuff=1)).state_dict()
    plain = {k: v for k, v in state.items() if 'box_predictor' not in k}
    half = {k: v for k, v in state.items() if 'mask_head.predictor' not in k}
    for given, message in (
        (plain, 'not a Mask R-CNN or Cascade'),
        (half, 'incomplete: .*mask_head.predictor'),
        ({'a': torch.zeros(1)}, 'not one weight fits'),
    ):
        torch.save(given, tmp_path / 'a.pth')
        with pytest.raises(ValueError, match=message) as e:
            convert(tmp_path / 'a.pth', tmp_path / 'out')
        assert 'a.pth' in str(e.value) and not (tmp_path / 'out').exists()
    for name in ('a.txt', 'b.pth'):
        (tmp_path / 'a.txt').write_text('')
        with pytest.raises(ValueError, match=name):
            convert(tmp_path / name, tmp_path / 'out')


def mask(h, w, seed=0):
    return np.random.default_rng(seed).random((h, w)) > 0.6


def annotation_file(path, swap=False):
    images = [
        dict(id=7, file_name='n02/b.JPEG', height=6, width=9),
        dict(id=4, file_name='n01/a.JPEG', height=5, width=8),
    ]
    notes = [
        dict(id=1, image_id=7, category_id=1, segmentation=encode_rle(mask(6, 9)), area=1, bbox=[], iscrowd=0),
        dict(id=2, image_id=4, category_id=1, segmentation=encode_rle(mask(5, 8, 1)), iscrowd=0),
    ]
    if swap:
        images = [dict(im, height=im['width'], width=im['height']) for im in images]
    write_json(path, dict(images=images, annotations=notes, categories=[dict(id=1, name='fg')]))


def test_swapped_sides_are_turned(tmp_path):
    for swap in (False, True):
        annotation_file(tmp_path / 'a.json', swap)
        assert convert_instances(tmp_path / 'a.json', tmp_path)['turned'] == 2 * swap
        got = read_json(tmp_path / 'instances.json')
        assert [(im['id'], im['height'], im['width']) for im in got['images']] == [(4, 5, 8), (7, 6, 9)]
        assert [a['area'] for a in got['annotations']] == [mask(5, 8, 1).sum(), mask(6, 9).sum()] and (
            decode_rle(got['annotations'][1]['segmentation']) == mask(6, 9)
        ).all()


def test_ids_become_those_of_the_pipeline(tmp_path):
    annotation_file(tmp_path / 'a.json')
    for n in ('train/n01/a.JPEG', 'train/n02/b.JPEG', 'train/n02/c.JPEG'):
        write_png(tmp_path / 'data' / n, np.zeros((5, 8, 3), np.uint8))
    assert (
        convert_instances(tmp_path / 'a.json', tmp_path, images=tmp_path / 'data', folders=['train'])['not_found'] == 0
    )
    assert [(im['id'], im['file_name']) for im in read_json(tmp_path / 'instances.json')['images']] == [
        (1, 'train/n01/a.JPEG'),
        (2, 'train/n02/b.JPEG'),
    ]
    (tmp_path / 'data/train/n02/b.JPEG').unlink()
    assert (
        convert_instances(tmp_path / 'a.json', tmp_path, images=tmp_path / 'data', folders=['train'])['not_found'] == 1
    )
    assert [a['image_id'] for a in read_json(tmp_path / 'instances.json')['annotations']] == [1]
    write_png(tmp_path / 'data' / 'other' / 'n01' / 'a.JPEG', np.zeros((5, 8, 3), np.uint8))
    with pytest.raises(ValueError, match='may be'):
        convert_instances(tmp_path / 'a.json', tmp_path, images=tmp_path / 'data')


def test_ids_from_zero_and_scores(tmp_path):
    notes = {
        '3': dict(segments_info=[dict(category_id=c, score=0.5, segmentation=encode_rle(mask(4, 4))) for c in (0, 2)])
    }
    write_json(
        tmp_path / 'a.json',
        dict(
            images=[dict(id=3, file_name='a.jpg')],
            annotations=notes,
            categories=[dict(id=i, name=str(i)) for i in range(3)],
        ),
    )
    convert_instances(tmp_path / 'a.json', tmp_path)
    got = read_json(tmp_path / 'instances.json')
    assert (
        [a['category_id'] for a in got['annotations']] == [1, 3]
        and got['annotations'][0]['score'] == 0.5
        and [c['id'] for c in got['categories']] == [1, 2, 3]
    )


@pytest.mark.parametrize(
    'change',
    [
        lambda c: c.pop('images'),
        lambda c: c.pop('annotations'),
        lambda c: [a.pop('segmentation') for a in c['annotations']],
        lambda c: c['annotations'][0].update(image_id=99),
        lambda c: [a.update(category_id='x') for a in c['annotations']],
        lambda c: c['images'][0].update(height=1),
        lambda c: c['images'][0].pop('file_name'),
        lambda c: [a['segmentation'].update(size=[-1, 2]) for a in c['annotations']],
        lambda c: c.update(annotations=3),
        lambda c: c.update(images=[3]),
    ],
)
def test_broken_annotation_files_are_one_sentence(tmp_path, change):
    annotation_file(tmp_path / 'a.json')
    coco = read_json(tmp_path / 'a.json')
    change(coco)
    write_json(tmp_path / 'a.json', coco)
    with pytest.raises(ValueError, match='a.json'):
        convert_instances(tmp_path / 'a.json', tmp_path / 'out')


def test_merged_labels(tmp_path):
    big = np.array([[2_000_000, 2_000_000, 0, 5], [7, 7, 7, 5]])  # ids counted over the whole file
    write_ids(tmp_path / 'maps' / 'x.png', big)
    info = [dict(id=i, category_id=c, area=0, bbox=[]) for i, c in ((2_000_000, 2), (5, 1), (7, 4), (9, 3))]
    coco = dict(
        images=[dict(id=12, file_name='x.jpg')],
        categories=[dict(id=i, name=str(i), isthing=int(i <= 3)) for i in range(1, 6)],
        annotations=[dict(image_id=12, file_name='../maps/x.png', segments_info=info)],
    )
    write_json(tmp_path / 'p.json', coco)
    assert convert_panoptic(tmp_path / 'p.json', tmp_path / 'maps', tmp_path / 'out') == dict(
        images=1, segments=3, without_pixels=1
    )
    ids = read_ids(tmp_path / 'out' / 'panoptic' / '000000000012.png')
    assert [
        (s['category_id'], s['area'], int((ids == s['id']).sum()))
        for s in read_json(tmp_path / 'out' / 'panoptic.json')['annotations'][0]['segments_info']
    ] == [(2, 2, 2), (1, 2, 2), (4, 3, 3)]
    assert read_image(tmp_path / 'out' / 'stuff' / '000000000012.png')[..., 0].tolist() == [
        [0, 0, 255, 0],
        [1, 1, 1, 0],
    ]
    assert [a['category_id'] for a in read_json(tmp_path / 'out' / 'instances.json')['annotations']] == [2, 1]
    for change in (lambda: coco['categories'].pop(0), lambda: coco.pop('annotations')):
        change()
        write_json(tmp_path / 'p.json', coco)
        with pytest.raises(ValueError, match='p.json: not a panoptic file'):
            convert_panoptic(tmp_path / 'p.json', tmp_path / 'maps', tmp_path / 'out')


def test_command_line(tmp_path, capsys):
    annotation_file(tmp_path / 'a.json', True)
    assert (
        main(['convert', str(tmp_path / 'a.json'), '--out', str(tmp_path / 'out')]) == 0
        and '2 turned' in capsys.readouterr().out
    )
    assert (
        main(['convert', str(tmp_path / 'none.json'), '--out', str(tmp_path)]) == 1
        and 'no such file' in capsys.readouterr().err
    )


def test_voc(tmp_path, capsys):
    from u2seg.truth import read_truth

    xml = '<annotation><size><width>9</width><height>8</height></size>{}</annotation>'
    box = '<bndbox><xmin>2</xmin><ymin>3</ymin><xmax>5</xmax><ymax>6</ymax></bndbox>'
    thing = '<object><name>{}</name><difficult>{}</difficult>' + box + '</object>'
    folder = tmp_path / 'VOC2007'
    (folder / 'Annotations').mkdir(parents=True)
    (folder / 'Annotations' / '000002.xml').write_text(xml.format(thing.format('dog', 0) + thing.format('cat', 1)))
    assert main(['convert', str(folder), '--out', str(tmp_path / 'nowhere')]) == 0
    written = tmp_path / 'VOC2007' / 'annotations'
    assert capsys.readouterr().out == f'{written}: 1 image, 2 boxes, 2 classes\n'
    assert written.is_dir() and not (tmp_path / 'nowhere').exists()
    truth = read_truth(tmp_path, 'VOC2007/JPEGImages')
    assert truth.instances['boxes_only'] and [
        (a['bbox'], a['iscrowd'], truth.names[a['category_id']]) for a in truth.instances['annotations']
    ] == [([1, 2, 4, 4], 0, 'dog'), ([1, 2, 4, 4], 1, 'cat')]
    assert truth.images[0]['file_name'] == 'VOC2007/JPEGImages/000002.jpg'
    entity = '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/hostname">]>'
    bomb = entity + '<annotation><size><width>&x;</width><height>1</height></size></annotation>'
    for bad in ('<a>', xml.format('<object/>'), '<annotation/>', bomb):
        (folder / 'Annotations' / '000003.xml').write_text(bad)
        with pytest.raises(ValueError, match='000003.xml: not an annotation of VOC'):
            convert(folder, tmp_path)


def test_boxes_alone_are_scored_as_boxes():
    from u2seg import evaluate

    coco = dict(
        images=[dict(id=1, file_name='a.jpg', height=20, width=30)],
        categories=[dict(id=5, name='x')],
        annotations=[dict(image_id=1, category_id=5, bbox=[3, 4, 10, 8])],
    )
    panoptic, whole = things_only(coco, 'a.json')
    assert (painter(whole)('1') > 0).sum() == 80
    found = [
        dict(
            image_id=1,
            category_id=5,
            score=1.0,
            bbox=[3.0, 4.0, 10.0, 8.0],
            segmentation=encode_rle(painter(whole)('1') > 0),
        )
    ]
    scores = evaluate._ap(GroundTruth('a', panoptic, painter(whole), whole), found, False)
    assert min(scores.values()) > 1 - 1e-9 and all(k.startswith('box_') for k in scores)


def test_cityscapes(tmp_path):
    from u2seg.truth import read_truth, truth_map

    gt, name = tmp_path / 'gtFine', 'ulm_000000_000019'
    write_ids(gt / 'cityscapes_panoptic_val' / f'{name}_gtFine_panoptic.png', np.array([[7, 7, 26001], [0, 7, 26001]]))
    segments = [
        dict(id=7, category_id=7, area=3, bbox=[0, 0, 2, 2], iscrowd=0),
        dict(id=26001, category_id=26, area=2, bbox=[2, 0, 1, 2], iscrowd=0),
    ]
    write_json(
        gt / 'cityscapes_panoptic_val.json',
        dict(
            images=[dict(id=name, file_name=f'{name}_leftImg8bit.png', height=2, width=3)],
            categories=[dict(id=26, name='car', isthing=1), dict(id=7, name='road', isthing=0)],
            annotations=[dict(image_id=name, file_name=f'{name}_gtFine_panoptic.png', segments_info=segments)],
        ),
    )
    convert(gt / 'cityscapes_panoptic_val.json', tmp_path / 'leftImg8bit')
    truth = read_truth(tmp_path, 'leftImg8bit/val')
    assert truth.images[0]['file_name'] == f'leftImg8bit/val/ulm/{name}_leftImg8bit.png' and truth_map(
        truth, 1
    ).tolist() == [[7, 7, 26], [0, 7, 26]]
