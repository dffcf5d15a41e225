"Scores of models and predictions, of files of any origin; figures and scratch of stage evaluate."

import contextlib
import gzip
import io
import itertools
import json
import pickle
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from u2seg.baselines import ImagePrediction, pack
from u2seg.classes import COCO_PANOPTIC
from u2seg.figures import class_figure, usage_figure, votes_figure
from u2seg.folder import predict_folder
from u2seg.results import COLUMNS, HEAD, headline
from u2seg.scenes import draw_dataset
from u2seg.score import evaluate_files, find_truths
from u2seg.shards import run_all
from u2seg import truth
from u2seg.truth import truth_map

REPO = Path(__file__).resolve().parent.parent
DATA = REPO / 'tests' / 'data'


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


def evaluated(data, tmp_path, **options):
    "The scores of the one split, and those of its classes."
    evaluate_files(data, out=tmp_path / 'evaluated', **options)
    (split,) = json.loads((tmp_path / 'evaluated' / 'scores.json').read_text()).values()
    return split['scores'], split['classes']


def test_two_panoptic_files_score_as_panopticapi_scores_them(tmp_path):
    golden = json.loads((DATA / 'pq' / 'golden.json').read_text())
    scores, classes = evaluated(DATA / 'pq' / 'coco_gt.json', tmp_path, predictions=DATA / 'pq' / 'coco_pred.json')
    for group, end in (('All', ''), ('Things', '_things'), ('Stuff', '_stuff')):
        for k in ('pq', 'sq', 'rq'):
            assert scores['given'][f'{k.upper()}{end}'] == pytest.approx(golden[group][k], abs=1e-9)
    seen = [s['PQ'] for s in classes['given'].values() if 'PQ' in s]
    assert np.mean(seen) == pytest.approx(golden['All']['pq'], abs=1e-9)


@pytest.mark.parametrize('iou_type,kind', [('segm', 'mask'), ('bbox', 'box')])
def test_results_score_as_pycocotools_scores_them_class_by_class(iou_type, kind, tmp_path):
    for name in ('instances_val2014_100', f'instances_val2014_fake{iou_type}100_results'):
        text = gzip.decompress((DATA / 'ap' / f'{name}.json.gz').read_bytes())
        (tmp_path / f'{name}.json').write_bytes(text)
    truth, results = tmp_path / 'instances_val2014_100.json', tmp_path / f'{name}.json'
    scores, classes = evaluated(truth, tmp_path, predictions=results)
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = COCOeval(gt := COCO(truth), gt.loadRes(str(results)), iou_type)
        theirs.params.imgIds = gt.getImgIds()
        theirs.evaluate()
        theirs.accumulate()
        theirs.summarize()
    for k, i in (('AP', 0), ('AP50', 1), ('AP75', 2), ('AR100', 8)):
        assert scores['given'][f'{kind}_{k}'] == pytest.approx(theirs.stats[i], abs=1e-9)
    precision = theirs.eval['precision'][..., 0, 2]  # threshold, recall, class
    for c, of_class in zip(theirs.params.catIds, np.moveaxis(precision, -1, 0)):
        name = gt.cats[c]['name']
        if (of_class > -1).any():
            assert classes['given'][name][f'{kind}_AP'] == pytest.approx(of_class[of_class > -1].mean(), abs=1e-9)
        else:
            assert f'{kind}_AP' not in classes['given'].get(name, {})


@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    root = tmp_path_factory.mktemp('drawn')
    draw_dataset(root, seed=3, n_train=4, n_val=4, kinds=('scenes',))
    return root


def test_a_model_and_the_folder_that_it_writes_have_the_same_scores(drawn, tmp_path):
    model = REPO / 'out' / 'train'
    if not (model / 'model.safetensors').is_file():
        pytest.skip('out/train is not here: dvc pull out/train/model.safetensors out/train/model.yaml')
    predict_folder(drawn / 'scenes' / 'val', model, tmp_path / 'segmented', device='cpu')
    ours, _ = evaluated(drawn / 'scenes' / 'val', tmp_path, weights=model, device='cpu')
    theirs, _ = evaluated(drawn / 'scenes', tmp_path, predictions=tmp_path / 'segmented', clusters=True)
    assert set(ours) == set(theirs) == {'vote', 'hungarian'}
    evaluate_files(drawn / 'scenes' / 'val', weights=model, device='cpu', out=tmp_path / 'segmented')
    assert (tmp_path / 'segmented' / '.work' / 'images.json').is_file()  # what predict needs to go on
    masks = [k for k in ours['vote'] if k.startswith('agnostic_mask')]
    assert len(masks) == 4 and ours['vote']['agnostic_mask_AR100'] > 0
    for k in masks:  # boxes of a folder are those of the masks, so boxes and votes differ a little
        assert theirs['vote'][k] == pytest.approx(ours['vote'][k], abs=1e-6)


def test_semantic_maps_alone_are_scored(drawn, tmp_path):
    ((_, truth),) = find_truths(drawn / 'scenes' / 'val')
    (tmp_path / 'mine' / 'semantic').mkdir(parents=True)
    wrong = truth.images[0]['id']
    for a, im in zip(truth.panoptic['annotations'], truth.images):
        labels = truth_map(truth, a['image_id']).astype(np.uint8)
        if im['id'] == wrong:
            labels[:] = 0
        Image.fromarray(labels).save(tmp_path / 'mine' / 'semantic' / f"{Path(im['file_name']).stem}.png")
    scores, _ = evaluated(drawn / 'scenes', tmp_path, predictions=tmp_path / 'mine')
    assert set(scores) == {'given'} and scores['given']['PixelAcc'] == pytest.approx(0.75, abs=0.02)
    assert 'PQ' not in scores['given'] and 'mask_AP' not in scores['given']


def test_what_cannot_be_scored_is_said_in_a_sentence(drawn, tmp_path):
    panoptic = drawn / 'scenes' / 'annotations' / 'panoptic_val.json'
    few = json.loads(panoptic.read_text())
    few['annotations'] = few['annotations'][1:]
    (tmp_path / 'few.json').write_text(json.dumps(few))
    (tmp_path / 'few').symlink_to(panoptic.with_suffix(''))
    (tmp_path / 'words.json').write_text('{"a": 1}')
    for options, message in [
        (dict(predictions=tmp_path / 'few.json'), 'has no prediction for image 1 '),
        (
            dict(predictions=tmp_path / 'words.json'),
            "words.json: not a file of predictions .it needs the list 'annotations'",
        ),
        (dict(predictions=tmp_path), 'holds no predictions'),
        (dict(), 'name what is to be scored'),
        (dict(predictions=panoptic, weights='x'), 'name what is to be scored'),
    ]:
        with pytest.raises(ValueError, match=message):
            evaluate_files(panoptic, out=tmp_path / 'evaluated', **options)
    for options, message in [(dict(n_images=0), 'n_images must be 1'), (dict(batch_size=0), 'batch_size must be')]:
        with pytest.raises(ValueError, match=message):
            evaluate_files(panoptic, weights='x', out=tmp_path / 'evaluated', **options)
    with pytest.raises(ValueError, match='no ground truth; it is looked for in'):
        evaluate_files(tmp_path, predictions=panoptic)


def test_classes_that_only_coco_has_are_asked_for_elsewhere(drawn, tmp_path):
    panoptic = drawn / 'scenes' / 'annotations' / 'panoptic_val.json'
    of_coco = dict(categories=[dict(id=1, name='person')], annotations=[dict(BOX, id=1, area=9)])
    images = [dict(id=1, file_name='1.jpg', height=60, width=60)]
    (tmp_path / 'things.json').write_text(json.dumps(of_coco | dict(images=images)))
    own = [c['name'] for c in json.loads(panoptic.read_text())['categories']]
    for data, classes in [(panoptic, own[:4]), (drawn / 'scenes', own[:4]), (tmp_path / 'things.json', ['person'])]:
        here = f'^{data}: --classes supercategories joins COCO.s 53 .*, and here are {", ".join(classes)} ...;'
        with pytest.raises(ValueError, match=here):
            evaluate_files(data, predictions=panoptic, classes='supercategories', out=tmp_path / 'evaluated')


BOX = dict(image_id=1, category_id=1, score=0.5, bbox=[1, 1, 50, 50])
ONE = dict(images=[], categories=[dict(id=1, name='x')])


@pytest.mark.parametrize(
    'content,message',
    [
        ([1, 2], r'annotations\[0\] is .1., not an object'),
        (None, 'it needs the list'),
        (dict(annotations=None), 'it needs the list'),
        ([dict(a=1)], r'annotations\[0\]: score is missing'),
        ([dict(BOX, score='high')], r'annotations\[0\]: score is high'),
        (dict(ONE, annotations=[BOX], categories=[1]), r'categories\[0\] is .1., not an object'),
        (dict(ONE, annotations=[BOX], categories=[dict(name='x')]), r'categories\[0\] has the id None'),
        (dict(ONE, annotations=[BOX], images=3), 'it needs the list .images.'),
        (dict(ONE, annotations=[BOX], images=[3]), r'images\[0\] is .3., not an object'),
        ([dict(BOX, bbox=[0.1, 0.1, 0.5, 0.5])], 'in fractions of the image'),
    ],
)
@pytest.mark.parametrize('name', ['p.json', 'folder/instances.json', 'folder/panoptic.json'])
def test_a_file_that_holds_no_predictions_is_named(drawn, tmp_path, content, message, name):
    (tmp_path / 'folder').mkdir()
    (tmp_path / name).write_text(json.dumps(content))
    predictions = tmp_path / name.split('/')[0]
    with pytest.raises(ValueError, match=f'{name}: not a file of predictions .*{message}'):
        evaluate_files(drawn / 'scenes', predictions=predictions, out=tmp_path / 'evaluated')


def test_no_detection_is_scored_as_none(drawn, tmp_path):
    (tmp_path / 'p.json').write_text('[]')
    scores, _ = evaluated(drawn / 'scenes', tmp_path, predictions=tmp_path / 'p.json')
    assert scores['given']['mask_AP'] == 0


OTHERS = [dict(image_id=99), dict(category_id=99), dict(category_id=[1]), dict(image_id=None)]


@pytest.mark.parametrize('change', OTHERS)
def test_detections_of_nothing_that_is_scored_are_warned_of(drawn, tmp_path, change):
    (tmp_path / 'p.json').write_text(json.dumps([dict(BOX, **change)]))
    with pytest.warns(UserWarning, match='none of 1 detections has an image and a class to score'):
        evaluated(drawn / 'scenes', tmp_path, predictions=tmp_path / 'p.json')


def test_predictions_of_other_images_are_warned_of(drawn, tmp_path):
    of_others = dict(ONE, images=[dict(id=1, file_name='holiday.jpg')], annotations=[BOX])
    (tmp_path / 'p.json').write_text(json.dumps(of_others))
    with pytest.warns(
        UserWarning, match='no image of the predictions, such as holiday.jpg, is one of the ground truth'
    ):
        evaluated(drawn / 'scenes', tmp_path, predictions=tmp_path / 'p.json')


@pytest.mark.parametrize('annotations', [3, None, [3], []])
def test_a_file_without_ground_truth_is_refused(tmp_path, annotations):
    (tmp_path / 'a.json').write_text(json.dumps(dict(images=[], annotations=annotations, categories=[])))
    (tmp_path / 'p.json').write_text('[]')
    with pytest.raises(ValueError, match='a.json: '):
        evaluate_files(tmp_path / 'a.json', predictions=tmp_path / 'p.json', out=tmp_path / 'evaluated')


def test_a_map_of_other_segments_than_its_list_is_refused(drawn, tmp_path):
    file = drawn / 'scenes' / 'annotations' / 'panoptic_val.json'
    content = json.loads(file.read_text())
    content['annotations'][0]['segments_info'].pop()
    (tmp_path / 'p.json').write_text(json.dumps(content))
    (tmp_path / 'p').symlink_to(file.with_suffix(''))
    with pytest.raises(ValueError, match='image 1: .*p: segment .* is in the PNG, not in the JSON'):
        evaluate_files(file, predictions=tmp_path / 'p.json', out=tmp_path / 'evaluated')


def test_no_split_has_the_name_of_what_mappings_are_fitted_on(tmp_path):
    names = [truth._called(tmp_path / 'scenes', split) for split in ('train', './train', 'val', 'a/train', '.')]
    assert names == ['scenes/train', 'scenes/train', 'val', 'a/train', 'scenes']
