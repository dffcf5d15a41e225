"Fine-tuning: labels in every form, what is refused; and which images to label."

from pathlib import Path

import numpy as np
import pytest
import torch

from u2seg import finetune as F
from u2seg.checkpoints import save_weights
from u2seg.export import export
from u2seg.images import read_json, write_json, write_png
from u2seg.masks import encode_rle, instances_json
from u2seg.model import build_model, read_config
from u2seg.suggest import suggest

CONFIG = dict(
    depth=18,
    n_things=4,
    n_stuff=0,
    width=8,
    n_blocks=[1, 1, 1, 1],
    fpn_channels=16,
    fc_dim=16,
    mask_dim=8,
    n_mask_convs=1,
    anchor_sizes=[8, 16, 24, 32, 48],
    roi_batch=8,
    rpn_batch=16,
    min_size=32,
    max_size=32,
)


@pytest.fixture
def data(tmp_path):
    "Eight labelled images, one without a label, and a model of four clusters."
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for i in range(1, 10):
        image, mask = rng.integers(0, 60, (32, 32, 3), dtype=np.uint8), np.zeros((32, 32), bool)
        y, x = rng.integers(0, 20, 2)
        mask[y : y + 12, x : x + 12] = True
        image[mask] = 230
        write_png(tmp_path / f'{i}.png', image)
        images.append(dict(id=i, file_name=f'{i}.png', height=32, width=32))
        if i < 9:
            annotations.append(dict(image_id=i, category_id=7 - i % 2, segmentation=encode_rle(mask)))
    names = [dict(id=6, name='<square>'), dict(id=7, name='ריבוע')]
    write_json(tmp_path / 'labels.json', instances_json(images, annotations, names))
    torch.manual_seed(0)
    save_weights(build_model(CONFIG), tmp_path / 'base' / 'model.safetensors')
    return tmp_path


def summary(truth):
    "Names of classes, and of each image its file's name and its segments' classes."
    images = [im['file_name'].split('/')[-1] for im in truth.images]
    classes = [[truth.names[s['category_id']] for s in a['segments_info']] for a in truth.panoptic['annotations']]
    return [*truth.names.values()], dict(zip(images, classes))


def test_labels_in_every_form_are_the_same(data):
    whole = summary(F.read_labels(data / 'labels.json')[0])
    assert whole[0] == ['<square>', 'ריבוע'] and len(whole[1]) == 8 and '9.png' not in whole[1]
    for fmt, name in (
        ('coco', 'instances_train.json'),
        ('coco-panoptic', 'panoptic_train.json'),
        ('yolo', 'data.yaml'),
    ):
        export(data / 'labels.json', data / fmt, fmt, val=0, link=fmt == 'yolo')
        truth, root = F.read_labels(data / fmt / name, data)
        assert summary(truth) == whole, fmt


def test_a_yolo_folder_of_somebody_else(data, tmp_path, monkeypatch):
    export(data / 'labels.json', tmp_path / 'yolo', 'yolo', val=0, link=True)
    monkeypatch.chdir(tmp_path / 'yolo')
    page = Path('data.yaml').read_text()
    relative = ''.join(line for line in page.splitlines(keepends=True) if not line.startswith('path:'))
    Path('data.yaml').write_text(relative)  # the labels are found from the folder itself, too
    first = sorted(p for p in Path('labels').rglob('*.txt') if p.stat().st_size)[0]
    first.write_bytes(b'\xef\xbb\xbf' + first.read_bytes() + b'\n\r\n')
    whole = summary(F.read_labels(data / 'labels.json')[0])
    assert len(summary(F.read_labels('data.yaml', data)[0])[1]) == len(whole[1]) == 8
    link = next(p for p in Path('images').rglob('*') if p.stem == first.stem)
    link.unlink()
    link.write_bytes(b'no image')
    with pytest.warns(UserWarning, match=f'data.yaml: 1 of 9 images left out; .*{link.name}: not a readable image'):
        assert len(F.read_labels('data.yaml', data)[0].images) == 7
    for text, fault in (
        (relative.replace('images/train', 'none'), 'none: no such folder or list of images'),
        ('train: 3\nnames: [a]', 'a split is a folder or a list of images, or several, got 3'),
        ('train: images/train\nnames: {1: a}', 'names are a list, or numbered from 0'),
        ('path: 3\ntrain: images/train\nnames: [a]', '3/images/train: no such folder'),
    ):
        Path('data.yaml').write_text(text)
        with pytest.raises(ValueError, match=fault):
            F.read_labels('data.yaml')
    Path('data.yaml').write_text(relative)
    first.write_text('0 30 30 20 20\n')
    write_png(link, np.zeros((30, 40, 3), np.uint8))
    with pytest.raises(ValueError, match=f'{first.name}, line 1: coordinates must be fractions'):
        F.read_labels('data.yaml')


def test_too_few_labels_and_absent_maps_are_refused(data):
    few = read_json(data / 'labels.json')
    write_json(data / 'few.json', few | dict(annotations=few['annotations'][:4]))
    with pytest.raises(ValueError, match='few.json: 4 images with labels; fine-tuning needs five or more'):
        F.read_labels(data / 'few.json')
    panoptic = dict(images=few['images'], annotations=[dict(image_id=1, file_name='a.png', segments_info=[])])
    write_json(data / 'p.json', panoptic | dict(categories=[dict(c, isthing=1) for c in few['categories']]))
    with pytest.raises(ValueError, match='no such folder with the maps of p.json'):
        F.read_labels(data / 'p.json')


def test_weights_that_are_not_whole_are_told_what_they_need(data):
    (data / 'alone').mkdir()
    (data / 'base' / 'model.safetensors').rename(data / 'alone' / 'best.safetensors')
    takes = 'takes a folder with model.safetensors and model.yaml, .*, or a name that `u2seg download`'
    for weights, message in (
        (data / 'alone' / 'best.safetensors', 'alone/best.safetensors: no model.yaml beside it, which says what'),
        (data / 'alone', 'alone/model.safetensors: no such file of weights'),
    ):
        with pytest.raises(ValueError, match=f'{message}.*; --weights {takes}'):
            F.finetune(data / 'labels.json', weights, data / 'tuned', device='cpu')


@pytest.mark.parametrize('options,droploss', [({}, 0.0), (dict(droploss=0.25), 0.25)])
def test_complete_labels_are_learned_without_the_droploss_of_the_model(data, monkeypatch, options, droploss):
    seen, fit = [], F.fit

    def noted(model, *args, **kwargs):
        seen.append(model.roi_heads.droploss)
        return fit(model, *args, **kwargs)

    monkeypatch.setattr(F, 'fit', noted)
    save_weights(build_model(CONFIG | dict(droploss=0.5)), data / 'dropped' / 'model.safetensors')
    folder = data / f'tuned-{droploss}'
    for _ in range(2):
        F.finetune(data / 'labels.json', data / 'dropped', folder, n_iters=4, device='cpu', **options)
    assert {*seen} == {droploss}
    assert read_config(folder / 'model.yaml')['droploss'] == droploss
    assert len([*(folder / '.work').rglob('round_0')]) == 1
    F.finetune(data / 'labels.json', data / 'dropped', folder, n_iters=4, device='cpu', droploss=0.1)
    assert seen[-1] == 0.1 and len([*(folder / '.work').rglob('round_0')]) == 2  # not the rounds of the other


def test_sizes_beyond_the_images_are_said_to_be_left_out(data, capsys):
    truth = F.read_labels(data / 'labels.json')[0]
    assert [len(part.images) for part in F._smallest(truth, [3, 100, 8, 5, 3])] == [3, 5]
    assert capsys.readouterr().out == 'a size of 100 is left out: there are 8 images to train on\n'


def test_what_is_labelled_is_not_suggested():
    images = [dict(id=i, file_name=f'{i}.jpg', height=9, width=9) for i in range(1, 7)]
    rows = [dict(image_id=i, category_id=1 + i // 4, score=0.8, bbox=[0, 0, 4, 4]) for i in range(1, 7)]
    coco = dict(images=images, annotations=rows, categories=[dict(id=1, name='a'), dict(id=2, name='b')])
    first = suggest(coco, 2)
    assert {int(n[0]) // 4 for n in first} == {0, 1}, 'one of each cluster'
    assert not {*suggest(coco, 4, labelled=first)} & {*first}
    assert suggest(coco, None, labelled=first) == suggest(coco, 4, labelled=first), 'all that are left'
    with pytest.raises(ValueError, match=r'1 ... 4'):
        suggest(coco, 5, labelled=first)
    with pytest.raises(
        ValueError, match='not one of the 1 labelled images, such as sub/1.jpg, is among the predictions'
    ):
        suggest(coco, 2, labelled=['sub/1.jpg'])


def test_other_images_held_out_are_another_run(data):
    halves = [F._halves(data / 'labels.json', data, fraction)[:2] for fraction in (0.2, 0.5, 0.2)]
    a, b, again = (F._digest('weights', F._files(*h)) for h in halves)
    assert a == again != b
