"""The same training inside detectron2: network, data, trainer, checkpoints. Skipped, but for one test, where
detectron2 is not installed."""

import copy, json, logging, subprocess, sys
from pathlib import Path

import numpy as np
import pytest
import torch

from common import EMBEDDED, STEPS, made, run
from u2seg.images import write_png
from u2seg.checkpoints import load_weights, save_weights
from u2seg import cascade, rpn
from u2seg.masks import encode_rle, instances_json
from u2seg.model import build_model
from u2seg.augment import Augment
from u2seg.solver import Solver, check_solver
from u2seg.batches import Batches, PseudoLabels

try:
    import detectron2
except ImportError:
    detectron2 = None
needs = pytest.mark.skipif(
    detectron2 is None, reason='detectron2 is not installed: engine detectron2 is not checked here'
)
if detectron2:
    import u2seg.engine as E
    import detectron2.modeling.proposal_generator.rpn as d2_rpn, detectron2.modeling.roi_heads.roi_heads as d2_roi_heads
    from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.utils.events import EventStorage

    logging.getLogger('fvcore').setLevel(logging.WARNING)

STUDENT = dict(
    EMBEDDED,
    width=16,
    stem_kernel=5,
    fpn_norm='SyncBN',
    fpn_channels=32,
    anchor_sizes=[16, 32, 56, 84],
    n_things=4,
    n_stuff=3,
    rpn_pre_train=200,
    rpn_post_train=60,
    rpn_pre_test=200,
    rpn_post_test=60,
    roi_batch=32,
    canonical_size=112,
    fc_dim=32,
    mask_pool=12,
    mask_dim=24,
    sem_dim=24,
    sem_loss_stride=2,
    droploss=0.01,
    decode='objectness',
    score_threshold=0.2,
    panoptic_area=16,
    panoptic_score=0.2,
    min_size=64,
    max_size=64,
)
NETWORKS = dict(
    student=STUDENT,
    cutler=dict(STUDENT, n_things=1, n_stuff=0, droploss=0.4),
    stock=dict(
        STUDENT,
        width=16,
        n_blocks=[],
        stem_kernel=7,
        stem_pool=True,
        fpn_first=2,
        anchor_sizes=[8, 16, 32, 64, 128],
        norm='GN',
        fpn_norm='',
        decode='detectron2',
        sem_loss_stride=1,
        canonical_size=224,
        score_threshold=0.05,
        droploss=0.0,
    ),
    deep=dict(STUDENT, depth=50, n_blocks=[1, 1, 1, 1], norm='FrozenBN', fpn_norm='BN', droploss=0.2),
)
RECIPE = dict(
    STEPS,
    n_iters=6,
    lr=0.01,
    milestones=[4],
    warmup_iters=2,
    warmup_factor=0.1,
    weight_decay=0.01,
    checkpoint_period=2,
    log_every=2,
)


def test_absent_it_says_so_in_one_sentence():
    code = "import sys; sys.modules['detectron2'] = None\nimport u2seg.train\n"
    code += 'try: import u2seg.engine\nexcept ImportError as e: print(e)'
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout
    assert (
        out.startswith(
            "engine 'detectron2' needs detectron2, which PyPI does not carry; https://detectron2.readthedocs.io"
        )
        and out.count('\n') == 1
    )


def test_the_check_before_training_says_it_as_well(monkeypatch):
    monkeypatch.setitem(sys.modules, 'detectron2', None)
    for name in 'u2seg.engine', 'u2seg.detectron':
        monkeypatch.delitem(sys.modules, name, raising=False)
    solver = Solver(batch_size=2, **{k: v for k, v in RECIPE.items() if k != 'log_every'})
    with pytest.raises(ValueError, match="engine 'detectron2' needs detectron2"):
        check_solver(solver, n_procs=1, engine='detectron2')


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    tmp, rng, images, notes = tmp_path_factory.mktemp('data'), np.random.default_rng(0), [], []
    for i in range(1, 9):
        h, w = (64, 80) if i % 2 else (80, 64)
        stuff = rng.integers(1, 4, (h, w), dtype=np.uint8)
        stuff[:4] = 255
        for _ in range(i % 4):
            mask, (y, x) = np.zeros((h, w), bool), rng.integers(0, 40, 2)
            mask[y : y + 24, x : x + 20] = True
            stuff[mask] = 0
            notes.append(
                dict(image_id=i, category_id=int(rng.choice([2, 5, 9, 11])), segmentation=encode_rle(mask), score=1.0)
            )
        write_png(tmp / f'{i}.png', rng.integers(0, 256, (h, w, 3), dtype=np.uint8))
        write_png(tmp / f'{i:012d}.png', stuff)
        images.append(dict(id=i, file_name=f'{i}.png', width=w, height=h))
    return PseudoLabels(tmp, instances_json(images, notes, [dict(id=c, name=str(c)) for c in (2, 5, 9, 11)]), tmp)


def batches(data, **over):
    return made(
        data,
        **{
            **dict(
                batch_size=2,
                seed=3,
                short_sides=[56, 64],
                max_size=96,
                flip=0.5,
                colour_jitter=(0.1, 0.1, 0.1, 0.05),
                copy_paste='semantic',
                paste_rate=0.8,
                paste_scale=(0.5, 1.0),
            ),
            **over,
        },
    )


def lively(config, seed=0):
    torch.manual_seed(seed)
    net = build_model(config)
    for k, v in net.state_dict().items():
        if 'cls_score.weight' in k:
            v.normal_(std=0.2)
        elif 'objectness' in k and k.endswith('weight') or 'sem_seg_head.predictor.weight' in k:
            v.normal_(std=0.05)
        elif 'bbox_pred.weight' in k or 'anchor_deltas.weight' in k:
            v.normal_(std=0.02)
        elif 'mask_head.predictor.weight' in k:
            v.normal_(std=0.1)
        elif k.endswith('running_var'):
            v.uniform_(0.5, 1.5)
    return net


def first_ones(monkeypatch):
    "Both engines sample the first candidates in order."

    def subsample(labels, n, share, background):
        p, q = ((labels != -1) & (labels != background)).nonzero()[:, 0], (labels == background).nonzero()[:, 0]
        k = min(len(p), int(n * share))
        return p[:k], q[: n - k]

    monkeypatch.setattr(d2_rpn, 'subsample_labels', subsample)
    monkeypatch.setattr(d2_roi_heads, 'subsample_labels', subsample)
    for module in rpn, cascade:
        monkeypatch.setattr(module, 'random_keys', lambda n, seed, device: torch.arange(n).float())


@needs
@pytest.mark.parametrize('network', NETWORKS)
def test_every_network_sees_the_same(network):
    mine = lively(NETWORKS[network]).eval()
    theirs, n = E.build(mine).eval(), 0
    for seed in range(3):
        x = torch.randint(0, 256, (3, 64, 80), generator=torch.Generator().manual_seed(seed)).float()
        with torch.inference_mode():
            a, b = mine([x])[0], theirs([dict(image=x, height=64, width=80)])[0]
        i = b['instances']
        assert (
            len(a['scores']) == len(i)
            and (a['labels'] == i.pred_classes).all()
            and (a['scores'] - i.scores).abs().max() < 1e-4
            and (a['boxes'] - i.pred_boxes.tensor).abs().max() < 1e-2
        )
        assert (a['masks'] != i.pred_masks).double().mean() < 1e-4
        if mine.config['n_stuff']:
            assert (a['sem_logits'] - b['sem_seg']).abs().max() < 1e-4 and (
                a['panoptic'][0] != b['panoptic_seg'][0]
            ).double().mean() < 1e-3
        n += len(i)
    assert n > 3


@needs
@pytest.mark.parametrize('network', NETWORKS)
def test_every_network_learns_the_same(network, data, monkeypatch):
    first_ones(monkeypatch)
    mine = lively(NETWORKS[network]).train()
    theirs = E.build(mine).train()
    images, targets, _ = batches(data, batch_size=4).part(0, 0, 1)
    if mine.config['n_things'] == 1:
        targets = [{**t, 'labels': torch.zeros_like(t['labels'])} for t in targets]
    a = mine([im.float() for im in images], targets)
    with EventStorage():
        b = theirs([E.as_detectron2(im, t) for im, t in zip(images, targets)])
    assert (
        set(a)
        == set(b)
        == {
            'loss_rpn_cls',
            'loss_rpn_loc',
            'loss_mask',
            *(f'loss_{k}_stage{i}' for k in ('cls', 'box_reg') for i in range(3)),
            *(['loss_sem_seg'] if mine.config['n_stuff'] else []),
        }
    )
    for k in a:
        assert abs(a[k] - b[k]) < 1e-4, f'{k}: {a[k]}, {b[k]}'
    sum(a.values()).backward()
    sum(b.values()).backward()
    g = dict(theirs.named_parameters())
    for k, p in mine.named_parameters():
        if p.grad is not None:
            assert (p.grad - g[k].grad).norm() <= 0.05 * g[k].grad.norm() + 1e-5, (
                k
            )  # BatchNorm over few pixels, single precision


@needs
def test_droploss_drops(data, monkeypatch):
    first_ones(monkeypatch)
    images, targets, _ = batches(data, batch_size=4).part(0, 0, 1)
    seen = {}
    for threshold in (0.0, 0.01, 0.6):
        theirs = E.build(lively(dict(STUDENT, droploss=threshold))).train()
        with EventStorage(), torch.no_grad():
            seen[threshold] = float(
                theirs([E.as_detectron2(im, t) for im, t in zip(images, targets)])['loss_cls_stage0']
            )
    assert seen[0.0] > seen[0.01] > seen[0.6] > 0


@needs
def test_catalog_holds_the_labels(data):
    E.register('u2seg_test', data)
    read = E.CatalogLabels('u2seg_test')
    assert len(read) == len(data) and read.sizes == data.sizes
    for i in range(len(data)):
        (a, s), (b, t) = data[i], read[i]
        assert torch.equal(a, b) and s.keys() == t.keys() and all(torch.equal(s[k], t[k]) for k in s)
    other = PseudoLabels(data.root, dict(images=data.images[:1], annotations=[], categories=[]))
    E.register('u2seg_test', other)  # a second time: replaced
    assert len(E.CatalogLabels('u2seg_test')) == 1 and len(E.CatalogLabels('u2seg_test')[0][1]['masks']) == 0


@needs
def test_detectron2s_own_mapper_reads_the_records(data):
    E.register('u2seg_test', data)
    mapper = DatasetMapper(
        is_train=True, augmentations=[], image_format='RGB', use_instance_mask=True, instance_mask_format='bitmask'
    )
    for record, (image, target) in zip(DatasetCatalog.get('u2seg_test'), data):
        out = mapper(copy.deepcopy(record))
        assert torch.equal(torch.as_tensor(out['image']), image) and torch.equal(out['sem_seg'], target['sem'])
        if len(target['labels']):
            assert (
                torch.equal(out['instances'].gt_classes, target['labels'])
                and torch.equal(out['instances'].gt_masks.tensor, target['masks'])
                and torch.equal(out['instances'].gt_boxes.tensor, target['boxes'])
            )
    assert MetadataCatalog.get('u2seg_test').thing_dataset_id_to_contiguous_id == {2: 0, 5: 1, 9: 2, 11: 3}


@needs
def test_polygons_of_others_are_read(tmp_path):
    write_png(tmp_path / 'a.png', np.zeros((20, 30, 3), np.uint8))
    DatasetCatalog.register(
        'u2seg_polygon',
        lambda: [
            dict(
                file_name=str(tmp_path / 'a.png'),
                image_id=1,
                height=20,
                width=30,
                annotations=[dict(bbox=[5, 5, 10, 8], category_id=0, segmentation=[[5, 5, 15, 5, 15, 13, 5, 13]])],
            )
        ],
    )
    try:
        assert E.CatalogLabels('u2seg_polygon')[0][1]['masks'].sum() in range(72, 90)
    finally:
        DatasetCatalog.remove('u2seg_polygon')


@needs
def test_the_trainer_gets_our_batches(data):
    b = batches(data)
    for i, items in enumerate(E.Loader(b, start=2, end=5)):
        images, targets, _ = b.part(2 + i, 0, 1)
        for d, im, t in zip(items, images, targets):
            assert (
                torch.equal(d['image'], im)
                and torch.equal(d['sem_seg'], t['sem'])
                and torch.equal(d['instances'].gt_masks.tensor, t['masks'])
                and torch.equal(d['instances'].gt_boxes.tensor, t['boxes'])
            )
    assert i == 2
    halves = [[d['image'] for d in next(iter(E.Loader(b, start=0, end=1, rank=r, world=2)))] for r in range(2)]
    assert [torch.equal(x, y) for x, y in zip(halves[0] + halves[1], b.part(0, 0, 1)[0])] == [True, True]


def equal(a, b):
    return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


@needs
@pytest.mark.parametrize(
    'over',
    [{}, dict(optimizer='adamw', lr=1e-3, schedule='cosine', clip_type='global', precise_bn=2)],
    ids=['sgd', 'adamw'],
)
def test_killed_it_resumes_to_the_same_bytes(data, tmp_path, over):
    class Cut(Batches):
        def part(self, i, rank, world):
            if i == 3:
                raise KeyError('power cut')
            return super().part(i, rank, world)

    recipe, options = (
        {**RECIPE, **over},
        dict(
            batch_size=2,
            seed=3,
            short_sides=[64],
            max_size=96,
            flip=0.5,
            colour_jitter=(0, 0, 0, 0),
            copy_paste='plain',
            paste_rate=0.5,
            paste_scale=(0.5, 1.0),
        ),
    )
    whole, cut = lively(STUDENT), lively(STUDENT)
    rows = run(E.fit, whole, made(data, **options), folder=tmp_path / 'whole', **recipe)
    assert [r['iteration'] for r in rows] == [2, 4, 6] and not equal(whole, lively(STUDENT)) and rows[-1]['loss'] < 20
    logging.getLogger('detectron2').setLevel(logging.CRITICAL)
    with pytest.raises(KeyError):
        run(E.fit, cut, made(data, Cut, **options), folder=tmp_path / 'cut', **recipe)
    assert equal(cut, lively(STUDENT))  # nothing half-trained comes back
    assert run(E.fit, cut, made(data, **options), folder=tmp_path / 'cut', **recipe) == rows and equal(cut, whole)
    assert (tmp_path / 'cut' / 'log.csv').read_bytes() == (tmp_path / 'whole' / 'log.csv').read_bytes()
    again = lively(STUDENT)
    assert run(E.fit, again, made(data, **options), folder=tmp_path / 'cut', **recipe) == rows and equal(
        again, whole
    )  # finished: only loaded
    other = lively(STUDENT)
    run(E.fit, other, made(data, **options), folder=tmp_path / 'cut', **{**recipe, 'lr': 1e-4})
    assert not equal(other, whole)  # another recipe is another run


@needs
def test_checkpoints_go_both_ways(data, tmp_path):
    net = lively(STUDENT)
    run(E.fit, net, batches(data), folder=tmp_path, **{**RECIPE, 'n_iters': 3})
    (kept,) = tmp_path.glob('detectron2-*/model_final.pth')
    fresh = build_model(STUDENT)
    report = load_weights(fresh, kept)
    assert equal(fresh, net) and not report.missing + report.unexpected + report.mismatched
    metrics = [json.loads(l) for l in (kept.parent / 'metrics.json').read_text().splitlines()]
    assert metrics[-1]['iteration'] == 2 and 'loss_cls_stage0' in metrics[-1]
    torch.save(dict(model=lively(STUDENT, 5).state_dict()), tmp_path / 'ours.pth')
    theirs = E.build(net)
    DetectionCheckpointer(theirs).load(str(tmp_path / 'ours.pth'))
    assert all(torch.equal(v, lively(STUDENT, 5).state_dict()[k]) for k, v in theirs.state_dict().items())
    save_weights(net, tmp_path / 'model.safetensors')
    assert equal(E.build(net), net)


@needs
@pytest.mark.parametrize(
    'bad, said',
    [
        (dict(ema_decay=0.9), 'ema_decay'),
        (dict(accumulate=2), 'accumulate'),
        (dict(loss_weights={'loss_cls': 2.0}), 'loss_weights'),
        (dict(amp='fp16'), 'GPUs alone'),
        (dict(optimizer='lion'), "'lion'"),
    ],
)
def test_what_it_cannot_do_is_refused(data, tmp_path, bad, said):
    with pytest.raises(ValueError, match=said):
        run(E.fit, lively(STUDENT), batches(data), folder=tmp_path, **{**RECIPE, **bad})
    assert not list(tmp_path.iterdir())


@needs
def test_nan_stops_with_the_checkpoint_kept(data, tmp_path):
    class Sick(Batches):
        def part(self, i, rank, world):
            images, targets, bad = super().part(i, rank, world)
            return ([im.float() * float('nan') for im in images] if i == 3 else images), targets, bad

    logging.getLogger('detectron2').setLevel(logging.CRITICAL)
    net = lively(dict(STUDENT, norm='GN', fpn_norm='GN'))
    with pytest.raises(FloatingPointError):
        run(
            E.fit,
            net,
            made(
                data,
                Sick,
                **dict(
                    batch_size=2,
                    seed=3,
                    short_sides=[64],
                    max_size=96,
                    flip=0.5,
                    colour_jitter=(0, 0, 0, 0),
                    copy_paste='none',
                    paste_rate=0.0,
                    paste_scale=(0.5, 1.0),
                ),
            ),
            folder=tmp_path,
            **RECIPE,
        )
    (kept,) = tmp_path.glob('detectron2-*/model_0000001.pth')
    assert all(v.isfinite().all() for v in torch.load(kept, weights_only=True)['model'].values())


@needs
def test_adamw_and_sgd_step_as_the_torch_engine_does(data, tmp_path, monkeypatch):
    "With equal sampling, one step of either engine gives equal weights."
    from u2seg import train

    first_ones(monkeypatch)
    config = dict(STUDENT, norm='GN', fpn_norm='GN')
    for over in (dict(optimizer='sgd'), dict(optimizer='adamw', lr=1e-4), dict(clip_type='global', schedule='cosine')):
        recipe = {**RECIPE, 'n_iters': 3, 'warmup_iters': 1, **over}
        a, b = lively(config), lively(config)
        x = run(train.fit, a, batches(data), folder=tmp_path / 'a', **recipe)
        y = run(E.fit, b, batches(data), folder=tmp_path / 'b', **recipe)
        assert all(abs(p['loss'] - q['loss']) < 1e-3 and abs(p['lr'] - q['lr']) < 1e-9 for p, q in zip(x, y)), over
        moved = torch.cat([(v - lively(config).state_dict()[k]).flatten() for k, v in a.state_dict().items()])
        apart = torch.cat([(v - b.state_dict()[k]).flatten() for k, v in a.state_dict().items()])
        assert apart.norm() < 0.05 * moved.norm(), over
