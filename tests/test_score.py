"Scores of models and predictions: figures and scratch of stage evaluate."

import itertools
import pickle
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg

from u2seg.baselines import ImagePrediction, pack
from u2seg.classes import COCO_PANOPTIC
from u2seg.figures import class_figure, usage_figure, votes_figure
from u2seg.results import COLUMNS, HEAD, headline
from u2seg.shards import run_all

REPO = Path(__file__).resolve().parent.parent


def test_a_prediction_is_pickled_as_small_as_it_is_held():
    "Evaluate's scratch once held the maps unpacked: 3.8 MB an image of COCO's size."
    ids = np.zeros((480, 640), np.uint16)
    for k in range(1, 9):
        ids[40 * k : 40 * k + 80, 50 * k : 50 * k + 90] = k
    maps = dict(semantic=pack(ids.astype(np.uint8)), stuff=pack(ids.astype(np.uint8)), ids=pack(ids))
    written = pickle.dumps(ImagePrediction(instances=[], segments=[], **maps))
    assert len(written) < sum(len(m.data) for m in maps.values()) + 1000
    assert np.array_equal(pickle.loads(written).ids.unpack(), ids)


@pytest.mark.parametrize('n_clusters', [85, 800])
@pytest.mark.parametrize('n_names', [14, 95])
def test_figures_of_many_clusters_and_classes_are_bounded_and_their_labels_apart(n_clusters, n_names):
    votes = np.random.default_rng(0).integers(0, 9, (n_clusters, n_names))
    names = [c['name'] for c in COCO_PANOPTIC][:n_names]
    pq = {method: dict.fromkeys(names, 0.5) for method in ('labels', 'CutLER+STEGO', 'U2Seg')}
    for fig in (votes_figure(votes, names), usage_figure(votes.sum(1)), class_figure(pq)):
        width, height = fig.get_size_inches() * fig.dpi
        assert width <= 1600 and height <= 2000
        FigureCanvasAgg(fig).draw()
        axis = fig.axes[0]
        for labels in (axis.get_xticklabels(), axis.get_yticklabels()):
            upright = [t.get_window_extent() for t in labels if t.get_text() and t.get_rotation() % 90 == 0]
            assert not [a for a, b in zip(upright, upright[1:]) if a.overlaps(b)]


def test_progress_of_jobs_counts_images(capsys):
    jobs = [partial(pow, 2, k) for k in range(3)]
    assert run_all(jobs, n_procs=1, n_images=[16, 16, 3]) == [1, 2, 4]
    assert '35/35' in capsys.readouterr().err


def test_runs_are_compared_by_ten_numbers_of_one_file():
    "`dvc exp show` once had 1,381 columns."
    stages = yaml.safe_load((REPO / 'dvc.yaml').read_text())['stages']
    assert [m for stage in stages.values() for m in stage.get('metrics', [])] == ['out/report/headline.json']
    scores = dict.fromkeys(COLUMNS, 0.5)
    heads = itertools.product(['a/val', 'b/val'], ['U2Seg', 'CutLER+'], ['train', 'val'], ['vote', 'hungarian'])
    rows = [dict(zip(HEAD, head), **scores) for head in heads]
    runs = [
        dict(init=i, percent=p, seed=s, mask_AP=0.1 * p)
        for i, p, s in itertools.product(['u2seg', 'random'], [5, 10], [0, 1])
    ]
    numbers = headline(rows, runs)
    assert [*numbers] == ['a/val', 'b/val', 'few_labels'] and numbers['few_labels'] == dict(mask_AP_5_percent=0.5)
    assert sum(len(group) for group in numbers.values()) == 10
    rows[0]['mask_AP50'] = 0.7  # a/val, U2Seg, named on training images, by vote
    assert headline(rows)['a/val'] == dict(mask_AP50=0.7)
