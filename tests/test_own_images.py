"""Own images: any folder, nested, in mixed formats, with or without labels, from MaskCut to the report, in one
process."""

import os, shutil, warnings
from pathlib import Path

import nbformat
import numpy as np
import pytest
import yaml
from PIL import Image

from u2seg.baselines import ImagePrediction
from u2seg import evaluate, scenes
from u2seg.truth import read_truth, read_truths, truth_map
from u2seg.images import read_json, write_json, write_png
from u2seg.masks import encode_rle, ids_to_rgb
from u2seg.recipes import overlay
from u2seg.report import report
from u2seg.results import nest
from u2seg.stage import declared, load_params, run_check, stage_notebook, stage_values, stages

root = Path(__file__).parents[1]
small = yaml.safe_load((root / 'tests' / 'small.yaml').read_text())
quicker = dict(
    cutler=dict(solver=dict(n_iters=2)),
    train=dict(solver=dict(n_iters=2)),
    stego=dict(n_iters=3, segment=dict(size=128)),
    cluster=dict(k=3, score_threshold=0.0),
    maskcut=dict(crf=False),
    evaluate=dict(n_fit_images=4),
)
formats = ['.jpg', '.png', '.BMP', '.webp', '.tif', '.gif']


THRESHOLDS = dict(match_score=0.4, match_iou=0.6, match_stuff_iou=0.15)
N = 9  # STEGO draws from 7 neighbours


def draw(folder, n=N, seed=5):
    "Images in nested folders and all formats, one grey, a text file and a broken image among them."
    for i in range(n):
        pixels = scenes.draw_scene(seed + i)[0]
        name = f"{['', 'a/', 'a/b c/', 'ä/'][i % 4]}{i}{formats[i % 6]}"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        im = Image.fromarray(pixels).resize((128 + 8 * i, 128 - 4 * i))
        (im.convert('L') if i == 3 else im).save(folder / name)
    (folder / 'notes.txt').write_text('no picture')
    (folder / 'a' / 'broken.jpg').write_bytes(b'\xff\xd8broken')


def run(repo, *names):
    "The cells of stages, as papermill would run them, without a kernel for each."
    from IPython.core.interactiveshell import InteractiveShell

    for name in names:
        nb = nbformat.read(stage_notebook(repo, name), 4)
        values = stage_values(name, load_params(repo), declared(nb)) | dict(root='.')
        run_check(name, nb, values)
        (repo / 'out' / name).mkdir(parents=True, exist_ok=True)
        shell = InteractiveShell()
        shell.showtraceback = lambda *a, **kw: None
        shell.user_ns.update(values)
        for c in nb.cells:
            if c.cell_type == 'code' and not {'parameters', 'check'} & set(c.metadata.get('tags', [])):
                shell.run_cell(c.source, silent=True).raise_error()


@pytest.fixture(scope='module')
def repo(tmp_path_factory):
    if not (root / 'out' / 'features' / 'backbone.safetensors').is_file():
        pytest.skip('out/features is not here: dvc pull features')
    repo = tmp_path_factory.mktemp('own')
    for name in ('nbs', 'u2seg', 'configs'):
        (repo / name).symlink_to(root / name)
    shutil.copytree(root / 'out' / 'features', repo / 'out' / 'features')
    shutil.copy(root / 'README.md', repo)
    params = yaml.safe_load((root / 'params.yaml').read_text())
    for changes in (small, quicker):
        params = overlay(params, changes)
    params['data'] = dict(root=str(repo / 'mine'), train=['photos'], val=[])
    (repo / 'params.yaml').write_text(yaml.safe_dump(params, sort_keys=False))
    draw(repo / 'mine' / 'photos')
    before = os.getcwd()
    os.chdir(repo)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield repo
    os.chdir(before)


def change(repo, **sections):
    params = yaml.safe_load((repo / 'params.yaml').read_text())
    for k, v in sections.items():
        params[k].update(v)
    (repo / 'params.yaml').write_text(yaml.safe_dump(params, sort_keys=False))


def test_a_folder_without_labels_goes_all_the_way(repo):
    run(repo, *[s for s in stages(repo) if s != 'features'])
    assert (
        read_json('out/maskcut/metrics.json')['n_skipped'] == 1
        and read_json('out/panoptic/metrics.json')['n_images'] == N
    )
    assert {
        'photos/0.jpg',
        'photos/a/1.png',
        'photos/a/b c/2.BMP',
        'photos/ä/3.webp',
        'photos/4.tif',
        'photos/a/5.gif',
    } < {im['file_name'] for im in read_json('out/cutler/instances.json')['images']}
    for figure in ('pictures', 'matching', 'classes', 'failures'):
        [file] = Path('out/evaluate').glob(f'{figure}.*')
        assert Image.open(file).size[0] > 100  # galleries
    assert read_json('out/evaluate/metrics.json')['splits'] == {} and read_json('out/fewshot/metrics.json') == dict(
        runs=[]
    )
    assert (
        'No ground truth was given' in Path('out/report/results.md').read_text()
        and Path('README.md').read_text() == (root / 'README.md').read_text()
    )
    assert all('NaN' not in p.read_text() for p in Path('out').glob('*/metrics.json'))


def declared_outs():
    "Everything that dvc.yaml says these stages leave, but the executed notebooks."
    for name, stage in yaml.safe_load((root / 'dvc.yaml').read_text())['stages'].items():
        for kind in ('outs', 'metrics', 'plots'):
            for out in stage.get(kind, []):
                path = next(iter(out)) if isinstance(out, dict) else out
                if not path.endswith('run.ipynb'):
                    yield path


def test_every_output_that_dvc_expects_is_there(repo):
    assert [p for p in declared_outs() if not (repo / p).exists()] == []


def test_the_model_of_own_images_predicts(repo):
    from u2seg.folder import predict_folder

    assert (
        predict_folder(repo / 'mine' / 'photos', repo / 'out' / 'train', repo / 'segmented', device='cpu')['images']
        == N
    )


def test_with_a_coco_file_it_is_evaluated(repo):
    folder, images, notes = repo / 'mine' / 'photos', [], []
    for i, f in enumerate(sorted(p for p in folder.rglob('*.*') if p.name not in ('notes.txt', 'broken.jpg')), 1):
        w, h = Image.open(f).size
        images.append(dict(id=i, file_name=f.relative_to(folder).as_posix(), width=w, height=h))
        x, y = w // 4, h // 4
        notes.append(
            dict(
                id=i,
                image_id=i,
                category_id=7,
                iscrowd=0,
                area=w * h / 4,
                bbox=[x, y, w / 2, h / 2],
                segmentation=[[x, y, 3 * x, y, 3 * x, 3 * y, x, 3 * y]],
            )
        )  # polygons, as tools write them
    write_json(
        repo / 'mine' / 'annotations' / 'instances_photos.json',
        dict(images=images, annotations=notes, categories=[dict(id=7, name='thing in the middle')]),
    )
    change(repo, data=dict(val=['photos']))
    run(repo, 'evaluate', 'fewshot', 'report')
    scores = read_json('out/evaluate/metrics.json')['splits']['photos']
    assert (
        0 <= scores['U2Seg']['val']['vote']['mask_AP'] <= 1
        and 'PQ' not in scores['U2Seg']['val']['vote']
        and 'agnostic_mask_AP' in scores['U2Seg']['agnostic']
    )
    assert set(read_json('out/evaluate/mapping.json')['names'].values()) <= {'thing in the middle'}
    assert '## photos' in Path('out/report/results.md').read_text()


def test_instance_files_are_read_as_they_are(tmp_path):
    mask = np.zeros((20, 30), bool)
    mask[3:9, 4:20] = True
    rle = encode_rle(mask)
    runs = dict(
        size=[20, 30], counts=[int(n) for n in np.diff(np.flatnonzero(np.diff(np.r_[2, mask.T.ravel(), 2])))]
    )  # uncompressed
    polygon = [[4, 3, 20, 3, 20, 9, 4, 9]]
    coco = dict(
        images=[dict(id=5, file_name='x.jpg', width=30, height=20)],
        categories=[dict(id=2, name='box')],
        annotations=[dict(id=9, image_id=5, category_id=2, segmentation=s) for s in (rle, polygon)],
    )
    write_json(tmp_path / 'annotations' / 'instances_val.json', coco)
    truth = read_truth(tmp_path, 'val')
    assert truth.things == [2] and truth.stuff == [] and truth.images[0]['file_name'] == 'val/x.jpg'
    assert [a['area'] for a in truth.instances['annotations']] == [96, 96] and (
        truth_map(truth, 5) == np.where(mask, 2, 0)
    ).all()


def one_box(folder):
    "A folder with one image, and its instance file where it is looked for."
    write_png(folder / 'x.png', np.zeros((20, 30, 3), np.uint8))
    coco = dict(
        images=[dict(id=5, file_name='x.png', width=30, height=20)],
        categories=[dict(id=2, name='box')],
        annotations=[dict(id=9, image_id=5, category_id=2, segmentation=[[4, 3, 20, 3, 20, 9, 4, 9]])],
    )
    write_json(folder.parent / 'annotations' / f'instances_{folder.name}.json', coco)


def test_results_of_the_whole_root_are_headed_by_its_name(tmp_path, monkeypatch):
    one_box(tmp_path / 'my photos')
    monkeypatch.chdir(tmp_path / 'my photos')
    for data in (tmp_path / 'my photos', '../my photos/'):
        truths = read_truths(data, ['.'])
        assert [*truths] == ['my photos'] == [t.split for t in truths.values()]
    nothing = {'my photos': dict(U2Seg={5: ImagePrediction(instances=[])})}
    rows, _ = evaluate.evaluate(nothing, truths, {}, {}, n_clusters=1, n_stuff=0, **THRESHOLDS)
    text = report(dict(splits=nest(rows), n_fit_images=0, classes='given'))
    assert '\n## my photos\n' in text and '\n### my photos\n' in text and '## .' not in text


@pytest.mark.parametrize('name', ['train', 'twice'])
def test_a_name_that_means_something_else_already_is_not_taken(tmp_path, name):
    one_box(tmp_path / name)
    if name == 'twice':
        one_box(tmp_path / name / name)
    assert [*read_truths(tmp_path / name, ['.'])] == ['.']


@pytest.mark.parametrize(
    'broken,message',
    [
        ([], 'needs the list'),
        (dict(images=[]), "'annotations'"),
        (dict(images=[], annotations=[], categories=[]), 'no mask'),
        (dict(images=[dict(id=1)], annotations=[], categories=[]), 'no mask'),
        (
            dict(
                images=[dict(id=1)],
                categories=[dict(id=1, name='a')],
                annotations=[dict(image_id=1, category_id=1, segmentation=[[0, 0, 1, 1, 1, 0]])],
            ),
            'not a COCO',
        ),
        (
            dict(
                images=[dict(id=1, height=2, width=2, file_name='a')],
                categories=[],
                annotations=[dict(image_id=2, segmentation=[[0, 0, 1, 1, 1, 0]])],
            ),
            'not a COCO',
        ),
    ],
)
def test_what_is_no_coco_file_is_refused_in_one_sentence(tmp_path, broken, message):
    write_json(tmp_path / 'annotations' / 'instances_val.json', broken)
    with pytest.raises(ValueError, match=message) as e:
        read_truth(tmp_path, 'val')
    assert 'instances_val.json' in str(e.value)


def test_coco_s_own_instances_are_what_ap_is_scored_on(tmp_path):
    "Two objects that overlap: the panoptic map cannot hold both whole, the instance file beside it does."
    ids = np.zeros((20, 30), np.int32)
    ids[2:12, 2:12] = 1
    ids[2:12, 8:18] = 2
    ids[14:] = 3
    segments = [
        dict(id=i, category_id=c, iscrowd=0, area=int((ids == i).sum()), bbox=[0, 0, 1, 1])
        for i, c in ((1, 5), (2, 5), (3, 8))
    ]
    categories = [dict(id=5, name='cup', isthing=1), dict(id=8, name='table', isthing=0)]
    images = [dict(id=4, file_name='x.jpg', width=30, height=20), dict(id=6, file_name='y.jpg', width=30, height=20)]
    for name in ('4.png', '6.png'):
        write_png(tmp_path / 'annotations' / 'panoptic_val' / name, ids_to_rgb(ids))
    write_json(
        tmp_path / 'annotations' / 'panoptic_val.json',
        dict(
            images=images,
            categories=categories,
            annotations=[
                dict(image_id=4, file_name='4.png', segments_info=segments),
                dict(image_id=6, file_name='6.png', segments_info=[]),
            ],
        ),
    )
    areas = lambda **kw: sorted(a['area'] for a in read_truth(tmp_path, 'val', **kw).instances['annotations'])
    assert areas() == [60, 100]  # cut out of the map
    box = lambda x: [[x, 2, x + 10, 2, x + 10, 12, x, 12]]
    coco = dict(
        images=images,
        categories=[dict(id=5, name='cup', supercategory='kitchen')],
        annotations=[
            dict(id=i, image_id=4, category_id=5, iscrowd=0, area=100, segmentation=box(x))
            for i, x in ((71, 2), (72, 8))
        ],
    )
    write_json(tmp_path / 'annotations' / 'instances_val.json', coco)
    assert areas() == [100, 100] and areas(n_images=1) == [100, 100]
    truth = read_truth(tmp_path, 'val')
    assert truth.stuff == [8] and truth_map(truth, 4)[16, 0] == 8  # the panoptic truth stays
    found = [dict(a, score=1.0) for a in truth.instances['annotations']]
    assert evaluate.score_agnostic({4: ImagePrediction(instances=found)}, truth)['agnostic_mask_AP'] == 1
    write_json(tmp_path / 'annotations' / 'instances_val.json', dict(coco, images=images[:1]))
    with pytest.raises(ValueError, match='lacks image 6'):
        areas()
    write_json(tmp_path / 'annotations' / 'instances_val.json', dict(coco, categories=[dict(id=5, name='bowl')]))
    with pytest.raises(ValueError, match='instances_val.json: its categories'):
        areas()


quickest = dict(
    maskcut=dict(crf=False),
    cutler=dict(solver=dict(n_iters=1, batch_size=2), n_workers=0, detect=dict(n_procs=1)),
    cluster=dict(k=1, pca=0),
    stego=dict(n_iters=2, n_classes=3, size=64, segment=dict(size=64), crf=None),
    train=dict(solver=dict(n_iters=1, batch_size=2), n_workers=0),
    evaluate=dict(n_procs=1, n_fit_images=0),
)


@pytest.fixture(scope='module')
def few_repo(tmp_path_factory):
    "A repository without results, of the smallest runs."
    repo = tmp_path_factory.mktemp('few')
    for name in ('nbs', 'u2seg', 'configs', 'README.md'):
        (repo / name).symlink_to(root / name)
    shutil.copytree(root / 'out' / 'features', repo / 'out' / 'features')
    params = yaml.safe_load((root / 'params.yaml').read_text())
    for changes in (small, quicker, quickest):
        params = overlay(params, changes)
    (repo / 'params.yaml').write_text(yaml.safe_dump(params, sort_keys=False))
    return repo


@pytest.fixture
def few(few_repo, monkeypatch):
    "To give the repository other images, (name, pixels or bytes) each."
    kept = (few_repo / 'params.yaml').read_bytes()

    def give(*files, **sections):
        shutil.rmtree(few_repo / 'mine', ignore_errors=True)
        (few_repo / 'mine' / 'photos').mkdir(parents=True)
        for name, content in files:
            if isinstance(content, bytes):
                (few_repo / 'mine' / 'photos' / name).write_bytes(content)
            else:
                Image.fromarray(content).save(few_repo / 'mine' / 'photos' / name)
        change(few_repo, data=dict(root=str(few_repo / 'mine'), train=['photos'], val=[]), **sections)
        return few_repo

    monkeypatch.chdir(few_repo)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield give
    (few_repo / 'params.yaml').write_bytes(kept)
    for folder in (few_repo / 'out').iterdir():
        if folder.name != 'features':
            shutil.rmtree(folder)


def scene(i):
    return scenes.draw_scene((31, i))[0]


def metrics(stage):
    return read_json(f'out/{stage}/metrics.json')


@pytest.mark.parametrize('n', [1, 2, 3, 5])
def test_a_handful_of_images_goes_all_the_way(few, n):
    repo = few(*[(f'{i}.png', scene(i)) for i in range(n)])
    run(repo, 'maskcut', 'cutler', 'cluster')
    if n == 1:
        with pytest.raises(ValueError, match="data.train has 1, .* set stego.crops to 'five'"):
            run(repo, 'stego')
        change(repo, stego=dict(crops='five'))
    run(repo, 'stego', 'panoptic', 'train', 'evaluate', 'fewshot', 'report')
    assert [metrics(s)['n_images'] for s in ('maskcut', 'cutler', 'stego', 'panoptic', 'train')] == [n] * 5


@pytest.mark.parametrize('place', [0, 3, 4])
def test_a_broken_image_is_left_out_of_every_figure(few, place):
    repo = few(*[(f'{i}.png', b'no image' if i == place else scene(i)) for i in range(5)])
    run(repo, 'maskcut', 'stego')
    assert [(metrics(s)['n_images'], metrics(s)['skipped'][0]['file_name']) for s in ('maskcut', 'stego')] == [
        (4, f'photos/{place}.png')
    ] * 2


def test_images_that_cannot_be_read_at_all_end_in_a_sentence(few):
    repo = few(*[(f'{i}.png', b'no image') for i in range(2)])
    with pytest.raises(ValueError, match='data.train: not one of the 2 images of .*/photos can be read'):
        run(repo, 'maskcut')


def test_blank_images_end_in_a_sentence_that_says_what_to_change(few):
    repo = few(
        *[(f'{i}.png', np.full((128, 128, 3), 80 * i, np.uint8)) for i in range(3)], maskcut=dict(size=192, crf=True)
    )
    run(repo, 'maskcut', 'stego')
    assert (metrics('maskcut')['n_masks'], metrics('maskcut')['mean_area'], metrics('maskcut')['mean_score']) == (
        0,
        None,
        None,
    )
    assert all('NaN' not in p.read_text() for p in Path('out').glob('*/metrics.json'))
    with pytest.raises(ValueError, match='no mask in any of 3 images.* maskcut.tau'):
        run(repo, 'cutler')
    shutil.copytree('out/maskcut', 'out/cutler', dirs_exist_ok=True)  # as if the detector had found nothing either
    with pytest.raises(ValueError, match='holds no instance.* cutler.detect.score_threshold'):
        run(repo, 'cluster')
    change(repo, cluster=dict(source='maskcut'))
    with pytest.raises(ValueError, match='holds no instance.* maskcut.tau'):
        run(repo, 'cluster')


def test_too_few_instances_or_patches_end_in_a_sentence(few):
    repo = few(*[(f'{i}.png', scene(i)) for i in range(3)], cluster=dict(source='maskcut', k=500))
    run(repo, 'maskcut')
    with pytest.raises(ValueError, match='cluster.k = 500'):
        run(repo, 'cluster')
    change(repo, cluster=dict(k=1, pca=100))
    with pytest.raises(ValueError, match='cluster.pca must be . or less'):
        run(repo, 'cluster')
    change(repo, stego=dict(size=32, n_classes=50))
    with pytest.raises(ValueError, match='stego.n_classes must be 48 or less for 3 views of 16 patches'):
        run(repo, 'stego')


def test_an_image_that_vanishes_after_the_work_is_left_out_of_the_figures(few):
    repo = few(*[(f'{i}.png', scene(i)) for i in range(3)], cluster=dict(source='maskcut'))
    images = [dict(id=i + 1, file_name=f'{i}.png', width=128, height=128) for i in range(3)]
    notes = [
        dict(
            id=i,
            image_id=i,
            category_id=7,
            iscrowd=0,
            area=4096,
            bbox=[32, 32, 64, 64],
            segmentation=[[32, 32, 96, 32, 96, 96, 32, 96]],
        )
        for i in (1, 2, 3)
    ]
    write_json(
        'mine/annotations/instances_photos.json',
        dict(images=images, annotations=notes, categories=[dict(id=7, name='middle')]),
    )
    change(repo, data=dict(val=['photos']))
    way = 'maskcut', 'cutler', 'cluster', 'stego', 'panoptic', 'train', 'evaluate'
    run(repo, *way)
    Path('mine/photos/1.png').write_bytes(b'no image')
    again = [s for s in way if s != 'stego']  # its training would start anew, without the image
    folders = [repo / 'out' / s / part for s in again for part in ('.', 'figures')]
    figures = [f for folder in folders for f in sorted(folder.glob('*.[jp][pn]g'))]
    for f in figures:
        f.unlink()
    run(repo, *again)
    assert len(figures) > 10 and not [f.name for f in figures if not f.exists()]
    assert list(metrics('evaluate')['splits']) == ['photos']
