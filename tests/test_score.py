"Scores of models and predictions: figures and scratch of stage evaluate."

import pickle
from functools import partial

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from u2seg.baselines import ImagePrediction, pack
from u2seg.classes import COCO_PANOPTIC
from u2seg.figures import class_figure, usage_figure, votes_figure
from u2seg.shards import run_all


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
