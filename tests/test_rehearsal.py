"""The rehearsals of a recipe (benchmarks/recipe.py) and of own photographs (benchmarks/photos.py) in small: data and
weights are what the stages ask for, and what is reported is right."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / 'benchmarks'))
import photos
import recipe

from u2seg.checkpoints import load_weights
from u2seg.export import FORMATS, export
from u2seg.features import ViTFeatures
from u2seg.images import write_json
from u2seg.masks import encode_rle, instances_json
from u2seg.model import build_model
from u2seg.stage import load_params
from u2seg.truth import read_truth


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp('rehearsal')
    recipe.prepare(root, 'coco', 12, small=True)
    return root


def test_the_weights_are_in_the_files_of_their_publishers(root):
    params = load_params(root)
    features = params['features']
    ViTFeatures(features['backbone'], root / features['weights'], interpolation=features['interpolation'])
    net = build_model({**params['network'], **params['cutler']['network'], 'n_things': 1, 'n_stuff': 0})
    report = load_weights(net, root / params['cutler']['initial'])
    assert not report.mismatched and {n.split('.')[0] for n in report.loaded} == {'backbone'}


def test_costs_grow_with_the_images():
    sizes, true = [16, 32, 64], 0.5
    rows = [dict(stage='maskcut', wall=1, cpu=10 + true * n, gb=1 + n / 1e6) for n in sizes]
    rows += [dict(stage='report', wall=1, cpu=6 - n / 100, gb=1) for n in sizes]
    lines = recipe.report('coco', sizes, rows, {}).splitlines()[-2:]
    assert lines[0] == '| maskcut | 18 / 26 / 42 | 1.00 / 1.00 / 1.00 | 0.50 | 16 |'
    assert lines[1] == '| report | 6 / 6 / 5 | 1.00 / 1.00 / 1.00 | -0.01 |  |'  # nothing grows


def test_the_report_counts_the_photographs_that_can_be_read(tmp_path):
    Image.new('RGB', (40, 30)).save(tmp_path / 'a.jpg')
    (tmp_path / 'empty.jpg').touch()
    row = dict(words=['use', 'photos', tmp_path], said='', wall=1, cpu=1, gb=1)
    assert '\n1 images of 40 to 40 px' in photos.report([row], tmp_path)


def test_drawn_photographs_have_their_ground_truth(tmp_path):
    photos.draw(tmp_path / 'photos', 6)
    truth = read_truth(tmp_path / 'photos', '.')
    sizes = [Image.open(f).size for f in sorted((tmp_path / 'photos').iterdir())]
    assert sizes == [(im['width'], im['height']) for im in truth.images]
    assert [w * h > 1.1e7 for w, h in sizes] == [False] * 5 + [True] and all(768 <= max(s) <= 1920 for s in sizes[:5])
    for a, (width, height) in zip(truth.panoptic['annotations'], sizes):
        ids, areas = np.unique(truth.ids(a), return_counts=True)
        assert {s['id']: s['area'] for s in a['segments_info']} == {i: n for i, n in zip(ids, areas) if i}
        assert areas.sum() == width * height


@pytest.mark.parametrize('fmt', FORMATS)
def test_counts_are_read_from_the_files_of_each_format(tmp_path, fmt):
    masks = np.zeros((2, 40, 60), bool)
    masks[0, :20], masks[1, 20:] = True, True  # no pixel is void
    images = [dict(id=i, file_name=f'{i}.png', height=40, width=60) for i in range(1, 6)]
    own = [dict(image_id=i, category_id=1, score=0.9, segmentation=encode_rle(m)) for i in (1, 3, 4) for m in masks]
    write_json(tmp_path / 'instances.json', instances_json(images, own, [dict(id=1, name='box')]))
    assert export(tmp_path / 'instances.json', tmp_path / 'out', fmt)['objects'] == 6
    assert photos.READ[fmt](tmp_path / 'out') == 6
