"Recipes: differences laid over the default, comments kept, and back to the same bytes."

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from u2seg import recipes as R
from u2seg.cli import main
from u2seg.model import check_config

root = Path(__file__).parents[1]
NAMES = [n for n in R.recipes(root) if n != 'embedded']


def flat(d, at=''):
    out = {}
    for k, v in d.items():
        out |= flat(v, f'{at}{k}.') if isinstance(v, dict) and v else {f'{at}{k}': v}
    return out


@pytest.fixture
def repo(tmp_path):
    shutil.copytree(root / 'configs', tmp_path / 'configs')
    shutil.copy(root / 'params.yaml', tmp_path)
    return tmp_path


def test_the_committed_parameters_are_the_default_and_few():
    text = (root / 'params.yaml').read_text()
    assert text == R.compose('embedded', root)
    assert len(flat(yaml.safe_load(text))) <= 205
    assert sum(len(p.read_text().splitlines()) for p in (root / 'configs').rglob('*.yaml')) <= 350


@pytest.mark.parametrize('name', NAMES)
def test_a_recipe_is_the_default_and_what_differs(name, repo):
    R.use(name, repo)
    got = yaml.safe_load((repo / 'params.yaml').read_text())
    changes, names = R.differences(name, root)
    assert got == R.overlay(yaml.safe_load(R.EMBEDDED.read_text()), changes) and names[-1] == 'embedded'
    lines = [l.split('#', 1)[1].strip() for l in (repo / 'params.yaml').read_text().splitlines() if '#' in l]
    default = [l.split('#', 1)[1].strip() for l in R.EMBEDDED.read_text().split('\n\n', 1)[1].splitlines() if '#' in l]
    assert [l for l in default if l not in lines] == []  # every comment is kept
    R.use('embedded', repo)
    assert (repo / 'params.yaml').read_bytes() == (root / 'params.yaml').read_bytes()


def test_the_recipes_of_the_paper_by_hand():
    get = lambda name: flat(yaml.safe_load(R.compose(name, root)))
    coco, voc = get('coco'), get('voc')
    assert (
        coco['train.solver.n_iters'] == 90000 and coco['solver.gamma'] == 0.02 and coco['solver.weight_decay'] == 5e-5
    )
    assert (
        coco['fewshot.solver.clip_type'] is None
        and coco['train.solver.loss_weights'] == {}
        and coco['network.depth'] == 50
    )
    assert {k for k in voc if voc[k] != coco.get(k)} == {
        'data.root',
        'data.train',
        'data.val',
        'train.solver.n_iters',
        'train.solver.milestones',
        'train.solver.gamma',
        'evaluate.match_score',
        'evaluate.match_iou',
        'evaluate.classes',
        'evaluate.n_fit_images',
    }


# The constants of the official configurations, in our names. Each line: where they stand, then parameters and values.
OFFICIAL = """
CutLER maskcut/maskcut.py and README: maskcut.size 480, maskcut.feature keys, maskcut.tau 0.15, maskcut.n_masks 3,
    maskcut.min_agreement 0.5, maskcut.crf true, features.interpolation dino
CutLER cascade_mask_rcnn_R_50_FPN.yaml: cutler.solver.n_iters 160000, cutler.solver.milestones [80000], solver.gamma
    0.02, cutler.solver.lr 0.01, cutler.augment.copy_paste plain, cutler.augment.paste_rate 1.0,
    cutler.augment.paste_scale [0.3, 1.0], cutler.network.droploss 0.01, cutler.initial
    weights/dino_resnet50_pretrain.pth
CutLER README and cascade_mask_rcnn_R_50_FPN_self_train.yaml: cutler.self_training.score_threshold [0.7, 0.65],
    cutler.self_training.n_iters 80000, cutler.self_training.lr 0.005
U2Seg usl-imagenet.py: cluster.embedding cls, cluster.crop_size 480, cluster.shape center, cluster.l2 false,
    cluster.pca 0, cluster.metric euclidean, cluster.init random, cluster.n_init 1, cluster.n_iters 100, cluster.k 800
STEGO train_config.yml, the weights and shifts of ViT-B/8: stego.w_self 0.1, stego.w_knn 1.0, stego.b_self 0.12,
    stego.b_knn 0.2, stego.b_rand 1.0, stego.size 224, stego.crops five, stego.n_neighbors 7, stego.n_points 11,
    stego.n_random 5, stego.pointwise true, stego.dropout 0.1, stego.lr 0.0005, stego.lr_probe 0.005, stego.probe sgd,
    stego.feature patches
STEGO eval_segmentation.py and crf.py: stego.segment.size 320, stego.segment.flip true, stego.segment.alpha 2.0,
    stego.crf.n_iters 10, stego.crf.gauss_weight 3.0, stego.crf.gauss_sxy 1.0, stego.crf.bilateral_weight 4.0,
    stego.crf.bilateral_sxy 67.0, stego.crf.bilateral_srgb 3.0
STEGO cocostuff27_vit_base_5.ckpt: stego.n_iters 7000, stego.batch_size 32, stego.code_dim 90
U2Seg generate_pseudo_panoptic.py: panoptic.rule official, panoptic.max_cover 0.7, panoptic.keep_empty false,
    panoptic.score_threshold 0.0, panoptic.min_area 1
U2Seg u2seg_R50_800.yaml: train.initial weights/dino_resnet50_pretrain.pth, train.solver.lr 0.01, solver.weight_decay
    5.0e-05, solver.optimizer sgd, solver.schedule step, solver.milestones [], solver.warmup_iters 1000,
    solver.warmup_factor 0.001, solver.sgd_momentum 0.9, solver.batch_size 16, solver.clip_type parameter,
    solver.clip_value 1.0, solver.amp fp16, solver.precise_bn 200, solver.ema_decay 0.0, train.solver.loss_weights {},
    train.network.sem_weight 0.5, augment.flip 0.5, augment.short_sides [240, 320, 480, 640, 672, 704, 736, 768, 800,
    1024], augment.max_size 1333, augment.colour_jitter [0.0, 0.0, 0.0, 0.0], network.rpn_post_train 4000,
    network.norm SyncBN, network.fpn_norm SyncBN
detectron2 defaults.py: network.min_size 800, network.max_size 1333, network.roi_batch 512, network.decode detectron2,
    train.network.roi_batch 512, train.network.panoptic_score 0.5, train.network.panoptic_area 4096
U2Seg, the paper's Table A2, and sem_seg_evaluation.py: evaluate.match_score 0.4, evaluate.match_iou 0.6,
    evaluate.match_stuff_iou 0.15, train.solver.n_iters 90000, evaluate.classes supercategories
CutLER COCO-Semisupervised/cascade_mask_rcnn_R_50_FPN_*perc.yaml: fewshot.droploss 0.0
U2Seg_eff efficiency_*per.yaml: fewshot.percents [1, 2, 5, 10, 20, 30, 40, 50], fewshot.solver.lr 0.04,
    fewshot.n_iters [3600, 3600, 4500, 9000, 18000, 27000, 36000, 45000], fewshot.solver.milestones [0.666667,
    0.888889], fewshot.solver.gamma 0.1, fewshot.solver.weight_decay 0.0001, fewshot.solver.warmup_iters 1000,
    fewshot.solver.clip_type null, fewshot.solver.amp null, fewshot.augment.copy_paste none,
    fewshot.droploss 0.0
"""


def constants():
    "Source, parameter and value of each constant in `OFFICIAL`."
    pair = r'([a-z_0-9.]+)\s+(\[[^]]*\]|[^\s,]+)'
    for source, text in re.findall(r'^(\S.*?): (.*(?:\n +.*)*)', OFFICIAL, re.M):
        assert re.fullmatch(r'[\s,]*', re.sub(pair, '', text))  # nothing is left over
        for name, value in re.findall(pair, text):
            yield source, name, yaml.safe_load(value)


def test_the_recipe_of_coco_has_the_constants_of_the_official_code():
    coco = flat(yaml.safe_load(R.compose('coco', root)))
    listed = list(constants())
    assert {name for _, name, _ in listed} <= set(coco)
    assert {name: (coco[name], source) for source, name, value in listed if coco[name] != value} == {}


def test_the_network_of_coco_is_that_of_the_official_code():
    params = yaml.safe_load(R.compose('coco', root))
    for stage in ('cutler', 'train'):
        own = {**params['network'], **params[stage]['network'], 'n_things': 800, 'n_stuff': 27}
        assert check_config(own) | {'droploss': 0.0} == check_config(dict(n_things=800, n_stuff=27))


def test_photographs_do_not_take_what_only_the_paper_needs():
    params = flat(yaml.safe_load(R.compose('photos', root)))
    assert params['train.initial'] == 'cutler'  # few iterations: from a detector's weights
    assert params['panoptic.keep_empty'] is True  # images without an object are the user's too
    assert params['solver.precise_bn'] == 0  # 200 batches more are long on a CPU
    assert params['fewshot.augment.copy_paste'] == 'semantic' and params['stego.batch_size'] == 16


@pytest.mark.parametrize(
    'text,message',
    [
        ('train: {k: 1}\n', 'has no base'),
        ('base: coc\n', "no recipe 'coc'; the recipes are embedded"),
        ('base: mine\n', 'its own base'),
        ('base: coco\ntrain: {solver: {lrr: 1}}\n', 'unknown parameter solver.lrr'),
        ('base: coco\nx: {}\n', 'unknown parameter x'),
        ('3', 'must be a mapping'),
    ],
)
def test_a_recipe_that_cannot_be_leaves_params_alone(repo, text, message):
    (repo / 'configs' / 'mine.yaml').write_text(text)
    with pytest.raises(ValueError, match=message):
        R.use('mine', repo)
    assert (repo / 'params.yaml').read_bytes() == (root / 'params.yaml').read_bytes()


def test_the_command(repo):
    env = os.environ | {'PYTHONPATH': str(root)}
    run = lambda *a: subprocess.run(
        [sys.executable, '-c', 'from u2seg.cli import main; raise SystemExit(main())', *a],
        cwd=repo,
        env=env,
        capture_output=True,
        text=True,
    )
    said = run('use').stdout
    assert (
        all(f'\n{n}: ' in said for n in NAMES)
        and 'Expect (the paper): PQ 16.1' in said
        and 'Cost, about 335 GPU-hours' in said
    )
    (repo / 'trip').mkdir()
    for i in range(60):
        (repo / 'trip' / f'{i}.jpg').touch()
    said = run('use', 'photos', '--images', 'trip').stdout
    assert said.startswith(
        '60 images in trip: 10 clusters; 1,150 iterations of cutler, as many of train.\nAbout 0.5 hours'
    )
    assert run('use', 'coco').returncode == 0 and 'Written by `u2seg use coco`' in (repo / 'params.yaml').read_text()
    wrong = run('use', 'cocoo')
    assert wrong.returncode == 1 and wrong.stderr.startswith("u2seg: no recipe 'cocoo'")


def measured(name, part, row, column=1):
    "A number of a table of benchmarks/results: the first such row after `part`."
    text = (root / 'benchmarks' / 'results' / f'{name}.md').read_text().split(part, 1)[1]
    line = next(l for l in text.splitlines() if l.startswith(f'| {row} |'))
    return float(line.split('|')[1 + column])


def test_the_hours_for_photographs_follow_the_measured_rates():
    (gpu, gpu_once), (cpu, cpu_once) = R._GPU, R._CPU
    loader = measured('gpu', '## loader', '4 processes') / 16  # seconds an image, batches of 16
    assert gpu == pytest.approx(loader * 4 / 2, rel=0.01)  # two processes
    assert cpu == pytest.approx(measured('model', 'R50', 'training step, 2 pictures', 4) / 2, rel=0.01)
    masks = 1 / measured('gpu', '## whole', 'bfloat16, 16 at a time, images/s')
    whole = measured('gpu', '## inference', 'whole')
    stuff = measured('gpu', '## stuff', 'ms an image, with CRF')
    assert masks + whole / 1000 + stuff / 1000 < gpu_once < 1.2 * (masks + whole / 1000 + stuff / 1000)
    assert measured('model', 'R50', 'inference, 1 picture', 4) < cpu_once < 20


def test_the_head_of_coco_says_what_was_measured_on_a_gpu():
    head = ' '.join(l.strip('# ') for l in (root / 'configs' / 'coco.yaml').read_text().split('base:')[0].splitlines())
    step, memory = (measured('gpu', '## step', f'ours, float16: {k}') for k in ('ms', 'peak GiB'))
    detected, masks = measured('gpu', '## inference', 'whole'), measured('gpu', '## maskcut', 'whole, ms an image')
    vit = measured('gpu', '## vit', 'bfloat16, images/s')
    whole = measured('gpu', '## whole', 'bfloat16, 16 at a time, images/s')
    stuff = measured('gpu', '## stuff', 'ms an image, with CRF')
    loader = measured('gpu', '## loader', '16 processes')
    for shown in (
        f'the model {step / 1000:.3f} s an iteration'.replace(' 0.', ' .'),
        f'and {memory} GiB, without its loader, which takes {loader} s'.replace(' 0.', ' .'),
        f'{detected / 1000:.4f} s an image detected'.removeprefix('0'),
        f'ViT-B/8 {vit:.0f} images/s',
        f'MaskCut {1000 / masks:.0f} images/s, and {whole} from files',
        f'a stuff map with it {stuff / 1000:.4f} s'.replace(' 0.', ' .'),
    ):
        assert shown in head
    assert 0.095 < step / 1000 / (8 * 0.328) < 0.105  # of the hours of 8 V100: a tenth


def test_readme_says_what_was_measured_on_a_gpu():
    text = ' '.join((root / 'README.md').read_text().split())
    whole = measured('gpu', '## whole', 'bfloat16, 16 at a time, images/s')
    step = measured('gpu', '## step', 'ours, float16: ms')
    assert f'one H200 cuts {whole:.0f} photographs a second' in text
    assert f'trains a step in {step / 1000:.2f} s'.replace(' 0.', ' .') in text
    assert 'NVIDIA H200.' in (root / 'benchmarks' / 'results' / 'gpu.md').read_text()


def test_the_head_of_the_recipe_for_photographs_says_these_hours():
    head = ' '.join(
        l.strip('# ') for l in (root / 'configs' / 'photos.yaml').read_text().split('base:')[0].splitlines()
    )
    shown = re.search('Cost for (.+) images: (.+) hours on one GPU, or (.+) core-hours on CPUs', head)
    sizes, *hours = ([float(x.replace(',', '')) for x in re.split(', | and ', part)] for part in shown.groups())
    assert sizes == [50, 1000, 10000, 50000]
    for numbers, rates in zip(hours, (R._GPU, R._CPU)):
        expected = [R._hours(n, 50 * round(3 * n**0.5), rates) for n in sizes]
        assert numbers == pytest.approx(expected, rel=0.1)


def test_a_folder_of_photographs_gives_the_recipe_its_size(repo, tmp_path):
    for i in range(120):
        (tmp_path / 'trip' / f'{i % 7}' / f'{i}.jpg').parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'trip' / f'{i % 7}' / f'{i}.jpg').touch()
    R.use('photos', repo, images=tmp_path / 'trip')
    text = (repo / 'params.yaml').read_text()
    params = yaml.safe_load(text)
    assert params['data'] == dict(root=str(tmp_path / 'trip'), train=['.'], val=[])
    assert params['cluster']['k'] == 20  # 120 / 6 < 2 sqrt(120)
    assert params['cutler']['solver']['n_iters'] == params['train']['solver']['n_iters'] == 1650  # 150 sqrt(120)
    assert f'\n# 120 images in {tmp_path}/trip: 20 clusters; 1,650 iterations' in text
    assert '\n# About 0.7 hours on one GPU (H200), or 62 core-hours on CPUs.\n' in text
    before = text
    for name, folder, message in [
        ('coco', 'trip', 'recipe coco is made for its own data'),
        ('photos', 'none', 'no such folder of images'),
    ]:
        with pytest.raises(ValueError, match=message):
            R.use(name, repo, images=tmp_path / folder)
    assert (repo / 'params.yaml').read_text() == before


def test_a_folder_without_a_recipe_is_not_passed_over(repo, capsys, monkeypatch):
    monkeypatch.chdir(repo)
    assert main(['use', '--images', 'photos']) == 1
    assert 'goes with a recipe: u2seg use photos --images FOLDER' in capsys.readouterr().err


@pytest.mark.parametrize('name', ['segmented/overlay', 'annotations/panoptic_test'])
def test_results_and_ground_truth_among_the_photographs_are_not_learned_from(repo, tmp_path, name):
    trip = tmp_path / 'trip'
    for file in ('test/a.jpg', 'segmented/.work/lock', 'annotations/panoptic_test.json', f'{name}/a.png'):
        (trip / file).parent.mkdir(parents=True, exist_ok=True)
        (trip / file).touch()
    before = (repo / 'params.yaml').read_bytes()
    with pytest.raises(ValueError, match='holds results or ground truth, which would be learned from as images'):
        R.use('photos', repo, images=trip)
    assert (repo / 'params.yaml').read_bytes() == before
    params = yaml.safe_load(before)
    for train in (['.'], ['test']):
        params['data'] = dict(root=str(trip), train=train, val=[])
        (repo / 'params.yaml').write_text(yaml.safe_dump(params))
        if train == ['test']:
            R.check_files(repo)
            continue
        with pytest.raises(ValueError, match=f'trip/{name.split("/")[0]}.*: holds results or ground truth'):
            R.check_files(repo)


def test_check_finds_missing_weights_and_annotations(repo):
    R.use('coco', repo)
    with pytest.raises(ValueError, match='cutler.initial names weights/dino_resnet50_pretrain.pth, which is not there'):
        R.check_files(repo)
    for name in ('dino_resnet50', 'dino_vitbase8'):
        with pytest.raises(ValueError, match=f'names weights/{name}_pretrain.pth'):
            R.check_files(repo)
        (repo / 'weights').mkdir(exist_ok=True)
        (repo / 'weights' / f'{name}_pretrain.pth').touch()
    with pytest.raises(ValueError, match='data.val names val2017, but its ground truth .*panoptic_val2017.json is not'):
        R.check_files(repo)
    (repo / 'data' / 'coco' / 'annotations').mkdir(parents=True)
    (repo / 'data' / 'coco' / 'annotations' / 'panoptic_val2017.json').touch()
    R.check_files(repo)
