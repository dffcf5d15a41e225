"Few-shot: subsets, true labels as targets, resumable runs."

from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from common import SMALL, STEPS
from u2seg import batches, fewshot
from u2seg.augment import Augment
from u2seg.baselines import model_predictions
from u2seg.evaluate import Mapping, score
from u2seg.truth import read_truth
from u2seg.fewshot import LabelledImages, few_shot, nested_subsets
from u2seg.images import read_json, write_json, write_png
from u2seg.checkpoints import save_weights
from u2seg.masks import encode_rle, ids_to_rgb
from u2seg.model import build_model
from u2seg.shards import run_all

CATEGORIES = [
    dict(id=3, name='a', isthing=1),
    dict(id=7, name='b', isthing=1),
    dict(id=9, name='sky', isthing=0),
    dict(id=4, name='grass', isthing=0),
]
CONFIG = dict(
    SMALL,
    stem_pool=True,
    anchor_sizes=[8, 16, 24, 32, 48],
    rpn_batch=16,
    rpn_pre_train=40,
    rpn_pre_test=20,
    rpn_post_train=20,
    rpn_post_test=10,
    roi_batch=8,
    sampling_ratio=1,
    mask_pool=7,
    sem_dim=8,
    sem_loss_stride=2,
    panoptic_area=20,
    min_size=48,
    max_size=64,
    decode='objectness',
)
AUGMENT = Augment(
    short_sides=[48],
    max_size=64,
    flip=0.5,
    colour_jitter=(0, 0, 0, 0),
    copy_paste='semantic',
    paste_rate=0.5,
    paste_scale=(0.5, 1.0),
)
SOLVER = dict(
    STEPS,
    batch_size=2,
    lr=0.001,
    schedule='constant',
    milestones=[],
    flat_fraction=0.4,
    warmup_iters=0,
    warmup_factor=0.01,
    optimizer='adamw',
    weight_decay=0.01,
    cls_lr_multiplier=1.0,
    clip_type='global',
    clip_value=5.0,
    checkpoint_period=2,
)


@pytest.fixture
def root(tmp_path):
    rng = np.random.default_rng(0)
    for share, n in (('s/train', 9), ('t/train', 5), ('s/val', 3)):
        folder, split = share.split('/')
        notes, images = [], []
        for i in range(1, n + 1):
            ids = np.zeros((48, 60), np.int32)
            ids[4:20] = 70001
            ids[22:] = 12
            segments = [dict(id=70001, category_id=9, iscrowd=0), dict(id=12, category_id=4, iscrowd=0)]
            for j in range(i % 3):
                ids[10 + 14 * j : 22 + 14 * j, 5 + 20 * j : 20 + 20 * j] = 300 + j
                segments.append(dict(id=300 + j, category_id=[3, 7][j], iscrowd=int(i == 5 and j == 1)))
            segments = [dict(s, area=int((ids == s['id']).sum()), bbox=[0, 0, 1, 1]) for s in segments]
            write_png(tmp_path / folder / 'annotations' / f'panoptic_{split}' / f'{i}.png', ids_to_rgb(ids))
            write_png(tmp_path / share / f'{i}.png', rng.integers(0, 256, (48, 60, 3), dtype=np.uint8))
            images.append(dict(id=i, file_name=f'{i}.png', width=60, height=48))
            notes.append(dict(image_id=i, file_name=f'{i}.png', segments_info=segments))
        write_json(
            tmp_path / folder / 'annotations' / f'panoptic_{split}.json',
            dict(images=images, annotations=notes, categories=CATEGORIES),
        )
    return tmp_path


def test_subsets_are_nested_seeded_and_of_the_right_size():
    for n in (7, 100, 1000):
        s = nested_subsets(n, percents=[1, 2, 5, 10, 50, 100], seed=3)
        for small, large in zip(list(s), list(s)[1:]):
            assert set(s[small]) <= set(s[large])
        assert [len(v) for v in s.values()] == [-(-n * p // 100) for p in (1, 2, 5, 10, 50, 100)] and s[100] == list(
            range(n)
        )
    assert nested_subsets(100, percents=[10], seed=0) != nested_subsets(100, percents=[10], seed=1)
    assert (
        nested_subsets(100, percents=[10], seed=0)[10] == nested_subsets(100, percents=[10, 50], seed=0)[10]
    )  # whatever else is asked
    with pytest.raises(ValueError, match='100.5'):
        nested_subsets(10, percents=[100.5], seed=0)


def test_a_file_says_which_images_are_trained_on(root, tmp_path, monkeypatch):
    "As CutLER's files for COCO: K in the name, images without their folder."
    names = ['2.png', '7.png', '9.png']
    listed = [dict(id=int(n[0]) + 100, file_name=n) for n in names]
    write_json(tmp_path / '20perc_x.json', dict(images=listed, annotations=[], categories=CATEGORIES))
    options = dict(percents=[20], n_iters=[2], inits=['random'], seeds=[0], subsets='{percent}perc_x.json')
    fewshot.check_runs(**options, root=tmp_path)
    (run,) = fewshot.few_shot_jobs(tmp_path / 'out', **options)
    trained, real = [], fewshot.fit
    monkeypatch.setattr(fewshot, 'fit', lambda model, b, *a, **k: trained.append(b) or real(model, b, *a, **k))
    keep = dict(root=root, train=['s/train'], val=['s/val'], config=CONFIG, augment=AUGMENT, solver=SOLVER, n_val=None)
    assert few_shot(run, folder=tmp_path / 'run', **keep)['n_images'] == 3
    assert [Path(im['file_name']).name for im in trained[0].dataset.images] == names
    few_shot(run, folder=tmp_path / 'run', **keep)
    write_json(tmp_path / '20perc_x.json', dict(images=listed[:2]))
    assert few_shot(run, folder=tmp_path / 'run', **keep)['n_images'] == 2 and len(trained) == 2
    with pytest.raises(ValueError, match='2 annotated images of data.train are called'):
        few_shot(run, folder=tmp_path / 'both', **keep | dict(train=['s/train', 't/train']))
    for subsets, message in (('x.json', 'must have .percent.'), ('{percent}perc_y.json', 'there is no file')):
        with pytest.raises(ValueError, match=message):
            fewshot.check_runs(**options | dict(subsets=subsets), root=tmp_path)


def test_true_labels_become_targets(root):
    truths = [read_truth(root, s) for s in ('s/train', 't/train')]
    data = LabelledImages(root, truths)
    assert len(data) == 14 and data.things == [3, 7] and data.stuff == [4, 9]
    for i, (image, t) in enumerate(data):
        n = (i % 9 + 1) if i < 9 else i - 8
        things = n % 3
        assert t['labels'].tolist() == list(range(things))[: 1 if n == 5 else None]  # the crowd is no instance
        assert image.shape == (3, 48, 60)
        want = np.full((48, 60), 255)
        want[4:20] = 2
        want[22:] = 1
        for j in range(things):
            want[10 + 14 * j : 22 + 14 * j, 5 + 20 * j : 20 + 20 * j] = 0
        assert np.array_equal(t['sem'], want)  # crowd too: 0
        for j, m in enumerate(t['masks']):
            assert m.sum() == 12 * 15 and t['boxes'][j].tolist() == [5 + 20 * j, 10 + 14 * j, 20 + 20 * j, 22 + 14 * j]
    some = LabelledImages(root, truths, [0, 12])
    assert torch.equal(some[1][1]['sem'], data[12][1]['sem']) and some.images[1]['file_name'] == 't/train/4.png'


def test_a_perfect_network_scores_one(root):
    truth = read_truth(root, 's/val')
    data = LabelledImages(root, [truth])

    class Perfect(torch.nn.Module):
        config = dict(min_size=48, max_size=64)

        def __init__(self):
            super().__init__()
            self.w, self.i = torch.nn.Parameter(torch.zeros(1)), 0

        def forward(self, images, sizes):
            out = []
            for _ in images:
                t = data[self.i][1]
                self.i += 1
                logits = torch.nn.functional.one_hot(t['sem'].clamp(max=2), 3).permute(2, 0, 1).float()
                ids, segments = (
                    torch.where(t['sem'] == 255, 0, t['sem'] + 10).int(),
                    [dict(id=11, category_id=3), dict(id=12, category_id=4)],
                )
                for j, m in enumerate(t['masks']):
                    ids[m] = j + 1
                    segments.append(dict(id=j + 1, category_id=int(t['labels'][j]) + 1))
                out.append(
                    dict(
                        boxes=t['boxes'],
                        labels=t['labels'],
                        scores=torch.ones(len(t['labels'])),
                        masks=t['masks'],
                        sem_logits=logits,
                        panoptic=(ids, segments),
                    )
                )
            return out

    stuff = np.array(truth.stuff)
    s = score(
        model_predictions(Perfect(), root, truth.images, batch_size=8),
        truth,
        Mapping(np.array(truth.things), stuff, stuff),
    )
    assert s['box_AP'] == s['mask_AP'] == s['PQ'] == s['PixelAcc'] == s['mIoU'] == 1


def job(root, folder, **over):
    return few_shot(
        dict(dict(init='random', weights=None, percent=50, seed=0, n_iters=4), **over),
        root=root,
        train=['s/train', 't/train'],
        val=['s/val'],
        config=CONFIG,
        folder=folder,
        augment=AUGMENT,
        solver=SOLVER,
        n_val=None,
    )


def test_a_run_resumes_and_its_class_layers_are_new(root, tmp_path, monkeypatch):
    result = job(root, tmp_path / 'a')
    assert (
        result['n_images'] == 7
        and {k: v for k, v in read_json(tmp_path / 'a' / 'result.json').items() if k != 'key'} == result
    )
    monkeypatch.setattr(fewshot, 'fit', lambda *a, **k: pytest.fail('trained again'))
    assert job(root, tmp_path / 'a') == result
    monkeypatch.undo()
    (tmp_path / 'a' / 'result.json').unlink()
    assert job(root, tmp_path / 'a') == result  # from its checkpoint
    torch.manual_seed(5)
    given = build_model({**CONFIG, 'n_things': 2, 'n_stuff': 2})
    save_weights(given, tmp_path / 'model.safetensors')
    seen = {}
    real = fewshot.fit
    monkeypatch.setattr(
        fewshot,
        'fit',
        lambda model, *a, **k: (
            seen.update({n: p.clone() for n, p in model.state_dict().items()}) or real(model, *a, **k)
        ),
    )
    job(root, tmp_path / 'b', weights=str(tmp_path / 'model.safetensors'))
    own = given.state_dict()
    new = {n for n in own if not torch.equal(own[n], seen[n])}
    assert {n for n in new} == {
        n
        for n in own
        if any(c in n for c in ('cls_score.weight', 'mask_head.predictor.weight', 'sem_seg_head.predictor.weight'))
    }


def test_the_backbone_alone_and_the_iterations_of_the_job(root, tmp_path, monkeypatch):
    torch.manual_seed(5)
    given = build_model({**CONFIG, 'n_things': 2, 'n_stuff': 2})
    save_weights(given, tmp_path / 'model.safetensors')
    seen, own, real = {}, given.state_dict(), fewshot.fit

    def spy(model, batches, solver, **k):
        seen.update(weights={n: p.clone() for n, p in model.state_dict().items()}, solver=solver)
        return real(model, batches, solver, **k)

    monkeypatch.setattr(fewshot, 'fit', spy)
    job(root, tmp_path / 'a', weights=str(tmp_path / 'model.safetensors'), backbone_only=True, n_iters=10)
    kept = {n for n in own if torch.equal(own[n], seen['weights'][n]) and own[n].ndim == 4}
    assert (
        kept == {n for n in own if n.startswith('backbone.bottom_up.') and own[n].ndim == 4}
        and seen['solver'].n_iters == 10
    )


def test_a_result_of_another_setting_is_not_taken(root, tmp_path, monkeypatch):
    trained, real = [], fewshot.fit
    monkeypatch.setattr(fewshot, 'fit', lambda *a, **k: trained.append(1) or real(*a, **k))
    torch.manual_seed(5)
    model = build_model({**CONFIG, 'n_things': 2, 'n_stuff': 2})
    save_weights(model, tmp_path / 'model.safetensors')
    weights = str(tmp_path / 'model.safetensors')
    for _ in range(2):
        job(root, tmp_path / 'a', weights=weights)
    assert len(trained) == 1
    with torch.no_grad():
        next(model.parameters()).add_(1)
    save_weights(model, tmp_path / 'model.safetensors')  # the same name, other weights
    job(root, tmp_path / 'a', weights=weights)
    job(root, tmp_path / 'a', weights=weights, n_iters=5)
    assert len(trained) == 3


@pytest.mark.parametrize('droploss', [0.25, 0.0])
def test_the_stage_has_a_droploss_of_its_own(root, monkeypatch, droploss):
    write_json(root / 'out' / 'train' / 'model.yaml', dict(CONFIG, n_things=9, n_stuff=5, droploss=0.5))
    path = Path(__file__).parents[1] / 'nbs' / '81_run_fewshot.ipynb'
    cells = {c['id']: ''.join(c['source']) for c in read_json(path)['cells']}
    seen, real = [], fewshot.fit
    monkeypatch.setattr(fewshot, 'fit', lambda model, *a, **k: seen.append(model) or real(model, *a, **k))
    names = {}
    exec(cells['parameters'], names)
    names |= dict(root=str(root), data_root='.', data_train=['s/train'], data_val=['s/val'], n_val=1, n_procs=1)
    names |= dict(
        percents=[50], n_iters=[1], inits=['random'], augment=asdict(AUGMENT), solver=SOLVER, droploss=droploss
    )
    for name in ('check', 'imports', 'jobs', 'run'):
        exec(cells[name], names)
    assert [m.roi_heads.droploss for m in seen] == [droploss]
    assert seen[0].config == build_model({**CONFIG, 'n_things': 2, 'n_stuff': 2, 'droploss': droploss}).config


def test_runs_side_by_side_equal_runs_in_turn(root, tmp_path):
    jobs = lambda folder: [partial(job, root, tmp_path / folder / str(s), seed=s) for s in range(2)]
    a, b = run_all(jobs('turn'), n_procs=1), run_all(jobs('side'), n_procs=2)
    assert a == b
    with pytest.raises(ValueError, match='no such file'):
        run_all([partial(job, root / 'absent', tmp_path / 'x')], n_procs=1)


def test_the_network_goes_to_the_gpu(root, tmp_path, monkeypatch):
    class Seen(Exception):
        pass

    def spy(model, *a, **k):
        raise Seen({p.device.type for p in model.parameters()})

    monkeypatch.setattr(fewshot, 'own_device', lambda: torch.device('meta'))
    monkeypatch.setattr(fewshot, 'fit', spy)
    with pytest.raises(Seen) as e:
        job(root, tmp_path / 'a')
    assert e.value.args[0] == {'meta'}


def test_images_are_kept_up_to_a_bound(root, monkeypatch):
    monkeypatch.setattr(batches, 'CACHE', 3 * 48 * 60 * 7)  # bytes of three images and their segment ids
    data = LabelledImages(root, [read_truth(root, 's/train')])
    for _ in range(2):
        list(data)
    assert len(data.cache) == 3 and len(data) == 9


def test_nothing_is_fine_tuned_without_panoptic_annotations_of_things_and_stuff(root):
    able = lambda *val: fewshot.can_fine_tune(root, ['s/train'], list(val))
    assert able('s/val') and able('s/val', 't/train') and not able() and not able('absent/val')
    file = root / 's' / 'annotations' / 'panoptic_val.json'
    things = [dict(c, isthing=1) for c in CATEGORIES]  # such as an instance file that was converted
    write_json(file, dict(read_json(file), categories=things))
    assert not able('s/val') and able('t/train')


def test_a_split_without_objects_takes_nothing_from_the_mean():
    "Its AP is -1: there was nothing to find."
    assert fewshot._mean([0.25, -1.0, 0.75]) == 0.5 and fewshot._mean([-1.0, -1.0]) == -1.0
