"""The rehearsal of a recipe (benchmarks/recipe.py) in small: its data and weights are what the stages ask for."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / 'benchmarks'))
import recipe

from u2seg.checkpoints import load_weights
from u2seg.features import ViTFeatures
from u2seg.model import build_model
from u2seg.stage import load_params


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
