"Training: killed and resumed, in one process and in two, against plain formulas."

import copy, functools, math, os, resource, signal, subprocess, sys, time, types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import common
from common import EMBEDDED, STEPS, made
from u2seg import batches, train
from u2seg.batches import Cache
from u2seg.augment import Augment
from u2seg.images import read_json, write_png
from u2seg.masks import decode_rle, encode_rle, instances_json
from u2seg.model import build_model
from u2seg.solver import Solver, lr_factor
from u2seg.batches import Batches, PseudoLabels, epoch_batches
from u2seg.optim import clip_gradients, parameter_groups, precise_bn
from u2seg.processes import launch
from u2seg.selftrain import detect, self_training_labels
from u2seg.train import fit

RECIPE = dict(
    STEPS,
    n_iters=14,
    lr=0.05,
    milestones=[8, 12],
    warmup_iters=3,
    warmup_factor=0.001,
    weight_decay=0.001,
    checkpoint_period=4,
    log_every=3,
)
VIEWS = dict(
    batch_size=4,
    seed=3,
    short_sides=[16, 20],
    max_size=40,
    flip=0.5,
    colour_jitter=(0.2, 0.2, 0.2, 0.1),
    copy_paste='plain',
    paste_rate=0.8,
    paste_scale=(0.3, 0.8),
)


run = functools.partial(common.run, fit)


class Tiny(nn.Module):
    "The detector's interface on one convolution; it draws random numbers, as the sampling of regions does."

    def __init__(self, norm='bn', chance=True):
        super().__init__()
        torch.manual_seed(1)
        self.chance = chance
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8) if norm == 'bn' else nn.GroupNorm(2, 8), nn.ReLU()
        )
        self.cls_score, self.unused = nn.Conv2d(8, 4, 1), nn.Linear(2, 2)

    def forward(self, images, targets):
        sem, count = [], []
        for im, t in zip(images, targets):
            x = self.cls_score(self.body(im[None] / 255))
            if self.chance:
                x = x + 0.1 * torch.randn_like(x)
            sem.append(nn.functional.cross_entropy(x, t['sem'][None].clamp(max=3)))
            count.append((x.mean() - len(t['labels'])).abs() * 0.01)
        return dict(loss_sem_seg=sum(sem) / len(sem), loss_count=sum(count) / len(count))


@pytest.fixture
def data(tmp_path):
    rng, images, notes = np.random.default_rng(0), [], []
    for i in range(1, 12):
        h, w = (20, 28) if i % 3 else (28, 20)
        stuff = rng.integers(1, 4, (h, w), dtype=np.uint8)
        for _ in range(i % 4):
            y, x = rng.integers(0, h - 6), rng.integers(0, w - 6)
            mask = np.zeros((h, w), bool)
            mask[y : y + 6, x : x + 6] = True
            stuff[mask] = 0
            notes.append(
                dict(image_id=i, category_id=int(rng.choice([2, 5, 9])), segmentation=encode_rle(mask), score=1.0)
            )
        write_png(tmp_path / f'{i}.png', rng.integers(0, 256, (h, w, 3), dtype=np.uint8))
        write_png(tmp_path / 'stuff' / f'{i:012d}.png', stuff)
        images.append(dict(id=i, file_name=f'{i}.png', width=w, height=h))
    coco = instances_json(images, notes, [dict(id=c, name=str(c)) for c in (2, 5, 9)])
    return PseudoLabels(tmp_path, coco, tmp_path / 'stuff')


def equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class Broken(Batches):
    "Ends the process' work when it comes to a given batch: by an error, or by a signal."

    def part(self, i, rank, world):
        if i == self.at and self.how == 'error':
            raise KeyError('power cut')
        if i == self.at:
            os.kill(os.getpid(), self.how)
        return super().part(i, rank, world)


VARIANTS = dict(
    sgd={},
    adamw=dict(
        optimizer='adamw',
        lr=1e-2,
        schedule='cosine',
        flat_fraction=0.4,
        clip_type='global',
        ema_decay=0.9,
        precise_bn=2,
    ),
    bf16=dict(amp='bf16', accumulate=2, clip_type=None),
)


@pytest.mark.parametrize('variant', VARIANTS)
def test_killed_anywhere_it_ends_with_the_same_bytes(data, tmp_path, variant):
    recipe = {**RECIPE, **VARIANTS[variant]}
    handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    whole = Tiny()
    run(whole, made(data, **VIEWS), folder=tmp_path / 'whole', **recipe)
    for at, how, exc in (
        (0, 'error', KeyError),
        (5, signal.SIGTERM, SystemExit),
        (9, 'error', KeyError),
        (10, signal.SIGINT, KeyboardInterrupt),
        (13, signal.SIGTERM, SystemExit),
    ):
        broken = made(data, Broken, **VIEWS)
        broken.at, broken.how = at, how
        folder = tmp_path / f'{at}'
        with pytest.raises(exc):
            run(Tiny(), broken, folder=folder, **recipe)
        again = Tiny()
        run(again, made(data, **VIEWS), folder=folder, **recipe)
        assert equal(whole, again), f'killed at {at}'
        assert (folder / 'log.csv').read_bytes() == (tmp_path / 'whole' / 'log.csv').read_bytes()
    third = Tiny()
    rows = run(third, made(data, **VIEWS), folder=tmp_path / '0', **recipe)  # finished: only loaded
    assert equal(whole, third) and rows[-1]['iteration'] == 14
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == handlers


def test_killed_many_times_in_one_run(data, tmp_path):
    whole = Tiny()
    run(whole, made(data, **VIEWS), folder=tmp_path / 'whole', **RECIPE)
    for at in (2, 3, 6, 7, 11):
        broken = made(data, Broken, **VIEWS)
        broken.at, broken.how = at, signal.SIGTERM
        with pytest.raises(SystemExit):
            run(Tiny(), broken, folder=tmp_path / 'cut', **RECIPE)
    last = Tiny()
    run(last, made(data, **VIEWS), folder=tmp_path / 'cut', **RECIPE)
    assert equal(whole, last)


def test_loader_processes_change_nothing(data, tmp_path):
    a, b = Tiny(), Tiny()
    run(a, made(data, **VIEWS), folder=tmp_path / 'a', **RECIPE)
    run(b, made(data, **VIEWS), folder=tmp_path / 'b', **RECIPE, n_workers=2)
    assert equal(a, b)


def test_another_recipe_starts_anew_and_keeps_the_old_checkpoint(data, tmp_path):
    run(Tiny(), made(data, **VIEWS), folder=tmp_path / 'a', **RECIPE)
    b, c = Tiny(), Tiny()
    run(b, made(data, **VIEWS), folder=tmp_path / 'a', **{**RECIPE, 'lr': 0.01})
    run(c, made(data, **VIEWS), folder=tmp_path / 'c', **{**RECIPE, 'lr': 0.01})
    assert equal(b, c) and (tmp_path / 'a' / 'checkpoint.previous.pt').exists()
    (tmp_path / 'a' / 'checkpoint.pt').write_bytes(b'torn')
    with pytest.raises(ValueError, match='checkpoint.pt: not a readable checkpoint'):
        run(Tiny(), made(data, **VIEWS), folder=tmp_path / 'a', **RECIPE)


class Sick(Tiny):
    "Turns bad in iteration `at`: its loss, or only its gradient."

    at, calls, how = 6, 0, 'loss'

    def forward(self, images, targets):
        losses = super().forward(images, targets)
        if self.calls == self.at:
            losses['loss_count'] = (
                losses['loss_count'] * float('nan')
                if self.how == 'loss'
                else losses['loss_count']
                + (self.cls_score.bias - self.cls_score.bias.detach()).sum().clamp(min=0).sqrt()
            )
        self.calls += 1
        return losses


@pytest.mark.parametrize(
    'how,names',
    [('loss', 'loss_count is nan at iteration 6'), ('gradient', 'the gradient is (nan|inf) at iteration 6')],
)
def test_what_is_not_finite_stops_with_the_last_good_checkpoint(data, tmp_path, how, names):
    sick = Sick()
    sick.how = how
    with pytest.raises(FloatingPointError, match=names):
        run(sick, made(data, **VIEWS), folder=tmp_path, **RECIPE)
    kept = torch.load(tmp_path / 'checkpoint.pt', weights_only=True)
    assert kept['next'] == 4 and all(v.isfinite().all() for v in kept['model'].values())
    with pytest.raises(FloatingPointError, match='no checkpoint yet'):
        sick = Sick()
        sick.at = 1
        run(sick, made(data, **VIEWS), folder=tmp_path / 'b', **RECIPE)


def test_clip_rules_are_their_formulas():
    torch.manual_seed(0)
    for rule in ('parameter', 'global', None):
        ps = [nn.Parameter(torch.randn(s)) for s in ((3, 4), (7,), (1,), (2, 2, 2))] + [nn.Parameter(torch.zeros(3))]
        for p, scale in zip(ps, (10.0, 0.01, 1.0, 3.0)):
            p.grad = scale * torch.randn_like(p)
        ps[3].grad.zero_()
        given = [p.grad.clone() for p in ps[:4]]
        total = math.sqrt(sum(float((g**2).sum()) for g in given))
        assert abs(float(clip_gradients(ps, clip_type=rule, clip_value=0.5)) - total) < 1e-4
        for p, g in zip(ps, given):
            norm = {'parameter': float(g.norm()), 'global': total, None: 0}[rule]
            assert torch.allclose(p.grad, g * min(1, 0.5 / (norm + 1e-6)), atol=1e-6)
        assert ps[4].grad is None
    with pytest.raises(ValueError, match="'sum'"):
        clip_gradients(ps, clip_type='sum', clip_value=1.0)


def pair(folder, dataset, recipe, kind=Batches):
    "The work of one run, to be done here or in other processes: the network is made once and handed over."
    model = Tiny('gn', chance=False)
    return model, functools.partial(run, model, made(dataset, kind, **VIEWS), folder=folder, **recipe)


def test_two_parts_give_the_losses_of_one(data, tmp_path):
    recipe = {**RECIPE, 'log_every': 1, 'n_iters': 6}
    one, parts = (
        pair(tmp_path / 'one', data, recipe)[1](),
        pair(tmp_path / 'parts', data, {**recipe, 'accumulate': 2})[1](),
    )
    assert len(parts) == len(one) == 6
    for a, b in zip(one, parts):
        assert a.keys() == b.keys() and all(abs(a[k] - b[k]) < 1e-5 for k in a), (a, b)


NETWORK = dict(
    EMBEDDED,
    stem_kernel=3,
    fpn_norm='GN',
    anchor_sizes=[8, 12, 16, 24],
    n_things=3,
    n_stuff=3,
    rpn_pre_train=60,
    rpn_post_train=30,
    rpn_batch=32,
    roi_batch=16,
    canonical_size=56,
    mask_pool=6,
    sem_dim=8,
    droploss=0.01,
)
SQUARE = {**VIEWS, 'short_sides': [40], 'max_size': 40, 'colour_jitter': (0, 0, 0, 0), 'flip': 0.0}


@pytest.fixture
def squares(data, tmp_path):
    """Images of one size, with 0 to 3 objects and stuff that is known in part: each process has other numbers of
    regions and pixels."""
    rng, notes = np.random.default_rng(2), []
    for i in range(1, 9):
        stuff = rng.integers(1, 4, (40, 40), dtype=np.uint8)
        stuff[: 4 * i] = 255
        for _ in range(i % 4):
            mask, (y, x) = np.zeros((40, 40), bool), rng.integers(0, 20, 2)
            mask[y : y + 14, x : x + 16] = True
            stuff[mask] = 0
            notes.append(
                dict(image_id=i, category_id=int(rng.integers(1, 4)), segmentation=encode_rle(mask), score=1.0)
            )
        write_png(tmp_path / f's{i}.png', rng.integers(0, 256, (40, 40, 3), dtype=np.uint8))
        write_png(tmp_path / 'squares' / f'{i:012d}.png', stuff)
    return PseudoLabels(
        tmp_path,
        instances_json(
            [dict(id=i, file_name=f's{i}.png', width=40, height=40) for i in range(1, 9)],
            notes,
            [dict(id=c, name=str(c)) for c in (1, 2, 3)],
        ),
        tmp_path / 'squares',
    )


def network(seed=1):
    torch.manual_seed(seed)
    return build_model(NETWORK)


def test_two_processes_give_the_networks_losses_of_one(squares, tmp_path):
    recipe = {**RECIPE, 'log_every': 1, 'n_iters': 3, 'lr': 1e-3}
    nets = [network(), network()]
    works = [
        functools.partial(run, net, made(squares, **SQUARE), folder=tmp_path / str(i), **recipe)
        for i, net in enumerate(nets)
    ]
    one, two = works[0](), launch(works[1], 2)
    assert not (tmp_path / '1' / 'checkpoint.previous.pt').exists()  # what the processes trained is what came back
    assert len(one) == len(two) == 3 and len(one[0]) == 13
    for k in one[0]:
        assert abs(one[0][k] - two[0][k]) < 1e-5 * max(one[0][k], 1), (k, one[0][k], two[0][k])
    for a, b in zip(one, two):
        assert all(abs(a[k] - b[k]) < 1e-3 for k in a), (a, b)  # rounding grows from step to step
    for (k, a), b in zip(nets[0].state_dict().items(), nets[1].state_dict().values()):
        assert torch.allclose(a.float(), b.float(), atol=1e-3), k  # the caller's network is the trained one
    kept = torch.load(tmp_path / '1' / 'checkpoint.pt', weights_only=True)['model']
    assert all(torch.equal(kept[k], v) for k, v in nets[1].state_dict().items())


def test_two_processes_in_bfloat16(squares, tmp_path):
    recipe = {**RECIPE, 'log_every': 1, 'n_iters': 1, 'lr': 1e-3, 'amp': 'bf16'}
    one, two = (
        launch(functools.partial(run, network(), made(squares, **SQUARE), folder=tmp_path / str(n), **recipe), n)[0]
        for n in (1, 2)
    )
    for k in ('loss_rpn_cls', 'loss_rpn_loc', 'loss_sem_seg'):
        assert abs(one[k] - two[k]) < 2e-3 * one[k], (k, one[k], two[k])  # of the others, rounding chooses the regions


def test_the_network_killed_at_ten_random_steps(squares, tmp_path):
    recipe = {**RECIPE, 'n_iters': 24, 'checkpoint_period': 2, 'lr': 1e-3, 'optimizer': 'adamw', 'ema_decay': 0.9}
    whole = network()
    run(whole, made(squares, **{**SQUARE, 'batch_size': 2}), folder=tmp_path / 'whole', **recipe)
    for at in sorted(np.random.default_rng(7).choice(24, 10, replace=False).tolist()):
        broken = made(squares, Broken, **{**SQUARE, 'batch_size': 2})
        broken.at, broken.how = at, 'error'
        with pytest.raises(KeyError):
            run(network(), broken, folder=tmp_path / 'cut', **recipe)
    last = network()
    run(last, made(squares, **{**SQUARE, 'batch_size': 2}), folder=tmp_path / 'cut', **recipe)
    assert (
        equal(whole, last)
        and (tmp_path / 'cut' / 'log.csv').read_bytes() == (tmp_path / 'whole' / 'log.csv').read_bytes()
    )


class StopsParent(Batches):
    "Sends SIGTERM to the process that started this one, at batch 3."

    def part(self, i, rank, world):
        if i == 3:
            got, handler = [], signal.getsignal(signal.SIGTERM)
            signal.signal(signal.SIGTERM, lambda *a: (got.append(1), handler(*a)))
            if rank == 0:
                os.kill(os.getppid(), signal.SIGTERM)
            for _ in range(2000):  # until the parent has passed it on
                if not got:
                    time.sleep(0.05)
        return super().part(i, rank, world)


def test_stopped_processes_resume(data, tmp_path):
    recipe = {**RECIPE, 'n_iters': 6, 'checkpoint_period': 100}
    with pytest.raises(SystemExit):
        launch(pair(tmp_path / 'two', data, recipe, StopsParent)[1], 2)
    assert (
        torch.load(tmp_path / 'two' / 'checkpoint.pt', weights_only=True)['next'] == 4
    )  # the iteration in hand was finished and kept
    one, two = (
        pair(tmp_path / d, data, recipe)[1]() for d in ('one', 'two')
    )  # going on with another number of processes
    assert len(one) == len(two) == 2 and all(abs(a[k] - b[k]) < 1e-5 for a, b in zip(one, two) for k in a)
    with pytest.raises(ValueError, match='n_procs'):
        launch(lambda: None, 0)


def test_slices_of_a_batch_are_the_batch(data):
    for copy_paste in ('none', 'plain', 'semantic'):
        b = made(data, **{**VIEWS, 'copy_paste': copy_paste})
        for i in (0, 5, 40):
            whole, halves = b[i], [made(data, **{**VIEWS, 'copy_paste': copy_paste}).part(i, r, 2) for r in range(2)]
            images, targets = halves[0][0] + halves[1][0], halves[0][1] + halves[1][1]
            assert all(torch.equal(x, y) for x, y in zip(whole[0], images))
            assert all(
                torch.equal(torch.as_tensor(x[k]), torch.as_tensor(y[k])) for x, y in zip(whole[1], targets) for k in x
            )


def test_places_of_a_batch_are_drawn_apart(data):
    one = PseudoLabels(data.root, dict(images=data.images[:1], annotations=[], categories=[]))
    images, targets, _ = made(one, **{**VIEWS, 'batch_size': 8, 'copy_paste': 'none', 'colour_jitter': (0.5, 0, 0, 0)})[
        0
    ]
    assert len({tuple(im.flatten()[:50].tolist()) for im in images}) == 8 == len({t['seed'] for t in targets})


def test_every_epoch_shows_every_image_once():
    rng = np.random.default_rng(0)
    for n, B in ((20, 4), (21, 4), (3, 8), (8, 8), (1, 2)):
        sizes = [(10, 20) if rng.random() < 0.6 else (20, 10) for _ in range(n)]
        for epoch in range(3):
            batches = epoch_batches(sizes, batch_size=B, seed=1, epoch=epoch)
            assert len(batches) == max(n // B, 1) and all(len(b) == B for b in batches)
            if n >= B:
                flat = sum(batches, [])
                assert len(set(flat)) == len(flat)
                mixed = sum(len({sizes[i] for i in b}) > 1 for b in batches)
                assert mixed <= 1
    seen = {i for e in range(8) for b in epoch_batches([(1, 1)] * 11, batch_size=4, seed=0, epoch=e) for i in b}
    assert seen == set(range(11))  # the remainder differs from epoch to epoch


def test_semantic_partners_share_a_category(data):
    b, plain = (
        made(data, **{**VIEWS, 'copy_paste': 'semantic', 'paste_rate': 1.0}),
        made(data, **{**VIEWS, 'copy_paste': 'none'}),
    )
    more = 0
    for i in range(12):
        for t, u in zip(b[i][1], plain[i][1]):
            new = t['labels'][len(u['labels']) :].tolist()
            assert len(new) <= 1 and set(new) <= set(u['labels'].tolist())
            more += len(new)
    assert more > 10


def test_targets_are_the_files(data):
    for i in range(len(data)):
        image, t = data[i]
        assert image.dtype == torch.uint8 and image.shape[1:] == t['sem'].shape == t['masks'].shape[1:]
        assert all(np.array_equal(m, decode_rle(r)) for m, r in zip(t['masks'].numpy(), data.rles[i]))
        assert t['labels'].max(initial=0) < 3 if isinstance(t['labels'], np.ndarray) else (t['labels'] < 3).all()
        assert (t['sem'][t['masks'].any(0)] == 0).all()
    assert data.category_ids == [2, 5, 9]


def test_an_unreadable_image_is_named_and_replaced(data, tmp_path):
    (tmp_path / '4.png').write_bytes(b'no image')
    fresh = PseudoLabels(
        tmp_path, dict(images=data.images, annotations=[], categories=[dict(id=1)]), tmp_path / 'stuff'
    )
    names = [n for i in range(6) for n in made(fresh, **VIEWS)[i][2]]
    assert names and all('4.png' in n for n in names)
    for i in range(1, 12):
        (tmp_path / f'{i}.png').write_bytes(b'')
    with pytest.raises(ValueError, match='no image can be read'):
        made(PseudoLabels(tmp_path, dict(images=data.images, annotations=[], categories=[])), **VIEWS)[0]


def test_labels_of_another_size_are_refused(data, tmp_path):
    write_png(tmp_path / '1.png', np.zeros((5, 5, 3), np.uint8))
    with pytest.raises(ValueError, match='1.png is 5 x 5'):
        PseudoLabels(tmp_path, dict(images=data.images[:1], annotations=[], categories=[]), tmp_path / 'stuff')[0]
    with pytest.raises(ValueError, match='no image'):
        PseudoLabels(tmp_path, dict(images=data.images, annotations=[], categories=[]), skip_empty=True)


@pytest.mark.parametrize('bad,match', [(dict(copy_paste='mixup'), 'mixup'), (dict(batch_size=0), 'at least 1')])
def test_batches_refuse(data, bad, match):
    with pytest.raises(ValueError, match=match):
        made(data, **{**VIEWS, **bad})


@pytest.mark.parametrize(
    'bad,match',
    [
        (dict(schedule='poly'), 'poly'),
        (dict(optimizer='lion'), 'lion'),
        (dict(amp='int8'), 'int8'),
        (dict(clip_type='value'), 'value'),
        (dict(accumulate=3), 'accumulate 3'),
    ],
)
def test_fit_refuses(data, tmp_path, bad, match):
    with pytest.raises(ValueError, match=match):
        run(Tiny(), made(data, **VIEWS), folder=tmp_path, **{**RECIPE, **bad})


def test_schedules_are_those_of_detectron2():
    rest = {k: v for k, v in RECIPE.items() if k not in ('log_every', 'schedule')}
    base = rest | dict(
        batch_size=4,
        n_iters=100,
        warmup_iters=10,
        warmup_factor=0.01,
        gamma=0.1,
        milestones=[50, 80],
        flat_fraction=0.25,
    )
    for i in range(101):
        warm = 1 if i >= 10 else 0.01 * (1 - i / 10) + i / 10
        assert math.isclose(lr_factor(i, Solver(**base, schedule='step')), warm * 0.1 ** ((i >= 50) + (i >= 80)))
        assert math.isclose(lr_factor(i, Solver(**base, schedule='constant')), warm)
        wave = 1 if i <= 25 else 0.5 * (1 + math.cos(math.pi * (i - 25) / 75))
        assert math.isclose(lr_factor(i, Solver(**base, schedule='cosine')), warm * wave, abs_tol=1e-12)
    assert lr_factor(0, Solver(**{**base, 'warmup_iters': 0}, schedule='constant')) == 1


def test_every_parameter_is_in_one_group():
    model = Tiny()
    model.body[0].bias.requires_grad = False
    groups = parameter_groups(model, weight_decay=0.1, cls_lr_multiplier=4.0)
    ids = [id(p) for g in groups for p in g['params']]
    assert sorted(ids) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    place = {id(p): (g['weight_decay'], g['multiplier']) for g in groups for p in g['params']}
    assert (
        place[id(model.body[1].weight)] == (0, 1)
        and place[id(model.cls_score.bias)] == (0.1, 4)
        and place[id(model.body[0].weight)] == (0.1, 1)
    )


def test_multiplier_and_loss_weights_act(data, tmp_path):
    first, steps = Tiny().state_dict(), {}
    for name, over in (
        ('plain', {}),
        ('fast', dict(cls_lr_multiplier=3.0)),
        ('heavy', dict(cls_lr_multiplier=1.0, loss_weights={'loss_sem': 2.0})),
    ):
        model = Tiny()
        (row,) = run(
            model,
            made(data, **VIEWS),
            folder=tmp_path / name,
            **{
                **RECIPE,
                'cls_lr_multiplier': 1.0,
                'n_iters': 1,
                'clip_type': None,
                'warmup_iters': 0,
                'weight_decay': 0.0,
                **over,
            },
        )
        steps[name] = {k: v - first[k] for k, v in model.state_dict().items()}, row
    plain, fast, heavy = (steps[k][0] for k in ('plain', 'fast', 'heavy'))
    assert torch.allclose(fast['cls_score.weight'], 3 * plain['cls_score.weight'], atol=1e-6) and torch.allclose(
        fast['body.0.weight'], plain['body.0.weight']
    )
    assert (
        abs(steps['heavy'][1]['loss_sem_seg'] - 2 * steps['plain'][1]['loss_sem_seg']) < 1e-5
        and steps['heavy'][1]['loss_count'] == steps['plain'][1]['loss_count']
    )
    assert (
        (heavy['cls_score.weight'] - 2 * plain['cls_score.weight']).abs().max()
        < 1e-3
        < plain['cls_score.weight'].abs().max()
    )


def test_the_average_is_the_average(data, tmp_path):
    seen = []

    class Watched(Tiny):
        def forward(self, images, targets):
            seen.append(self.body[0].weight.detach().clone())
            return super().forward(images, targets)

    model = Watched()
    first = model.body[0].weight.detach().clone()
    run(model, made(data, **VIEWS), folder=tmp_path, **{**RECIPE, 'ema_decay': 0.8})
    run(last := Tiny(), made(data, **VIEWS), folder=tmp_path / 'raw', **RECIPE)
    mean = first
    for n, w in enumerate(seen[1:] + [last.body[0].weight.detach()], 1):
        d = min(0.8, (1 + n) / (10 + n))
        mean = d * mean + (1 - d) * w
    assert torch.allclose(mean, model.body[0].weight, atol=1e-6)


def test_precise_bn_is_mean_and_variance_over_batches():
    torch.manual_seed(0)
    bn, xs = nn.Sequential(nn.BatchNorm2d(3)), torch.randn(5, 4, 3, 6, 6) * 3 + torch.arange(5.0).view(5, 1, 1, 1, 1)
    bn(torch.randn(8, 3, 6, 6) + 50)  # what was tracked before is forgotten
    feed = iter(xs)
    precise_bn(bn, lambda: bn(next(feed)), 5)
    assert torch.allclose(bn[0].running_mean, xs.mean((1, 3, 4)).mean(0), atol=1e-5)
    everything = xs.permute(2, 0, 1, 3, 4).flatten(1)
    assert torch.allclose(bn[0].running_var, everything.var(1, unbiased=False), atol=1e-4) and bn[0].momentum == 0.1
    bn.eval()
    before = bn[0].running_mean.clone()
    precise_bn(bn, lambda: bn(xs[0] + 9), 1)
    assert torch.equal(bn[0].running_mean, before)  # a frozen layer stays frozen


def test_the_variance_of_precise_bn_never_falls_below_0():
    "Means far from 0 and hardly any spread: a difference of squares loses all digits."
    torch.manual_seed(0)
    for mean, std in ((10, 5e-4), (300, 0.1)):
        bn = nn.BatchNorm2d(64)
        xs = iter(torch.randn(8, 4, 64, 4, 4) * std + mean)
        precise_bn(bn, lambda: bn(next(xs)), 8)
        assert torch.allclose(bn.running_var, torch.full((64,), std**2), rtol=0.5)


class FakeBoard:
    "Stands for TensorBoard's writer."

    seen = []

    def __init__(self, folder):
        self.folder = folder

    def add_scalar(self, name, value, step):
        FakeBoard.seen.append((self.folder, name, value, step))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        FakeBoard.seen.append('closed')


def test_tensorboard_gets_the_rows_of_the_log(data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', types.SimpleNamespace(SummaryWriter=FakeBoard))
    rows = run(Tiny(), made(data, **VIEWS), folder=tmp_path, **RECIPE)
    want = [
        (str(tmp_path / 'tensorboard'), k, v, r['iteration']) for r in rows for k, v in r.items() if k != 'iteration'
    ] + ['closed']
    assert FakeBoard.seen == want and len(rows) == 5
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', None)  # not installed: the same training
    other = run(Tiny(), made(data, **VIEWS), folder=tmp_path / 'without', **RECIPE)
    assert other == rows and len(FakeBoard.seen) == len(want)


def test_self_training_labels_by_hand():
    rng = np.random.default_rng(0)

    def note(i, score):
        m = np.zeros((12, 12), bool)
        y, x = rng.integers(0, 3, 2)
        m[y : y + 9, x : x + 9] = True
        return dict(image_id=i, category_id=1, segmentation=encode_rle(m), score=score)

    images = [dict(id=i, file_name=f'{i}.png', width=12, height=12) for i in range(1, 30)]
    old = instances_json(
        images, [note(i, 1.0) for i in range(1, 30) for _ in range(rng.integers(0, 3))], [dict(id=1, name='fg')]
    )
    new = [note(i, float(rng.random())) for i in range(1, 35) for _ in range(rng.integers(0, 3))]
    got = self_training_labels(old, new, score_threshold=0.7)
    want = []
    for i in range(1, 30):
        sure = [d for d in new if d['image_id'] == i and d['score'] >= 0.7]
        want += sure
        for a in (a for a in old['annotations'] if a['image_id'] == i):
            A = decode_rle(a['segmentation'])
            ious = [(A & decode_rle(d['segmentation'])).sum() / (A | decode_rle(d['segmentation'])).sum() for d in sure]
            if not ious or max(ious) < 0.5:
                want.append(a)
    key = lambda a: (a['image_id'], a['segmentation']['counts'], a['score'])
    assert [key(a) for a in got['annotations']] == [key(a) for a in want]
    n_sure = sum(d['score'] >= 0.7 and d['image_id'] < 30 for d in new)
    assert 0 < n_sure < len(want) < len(old['annotations']) + n_sure  # some are covered, some are not
    assert [a['id'] for a in got['annotations']] == list(range(1, len(want) + 1)) and got['images'] == images


def test_rounds_of_the_detector_have_a_rate_of_their_own(tmp_path):
    "The cells of stage cutler, on two images and a small network."
    note, names = lambda i, m: dict(image_id=i, category_id=1, segmentation=encode_rle(m)), {}
    images = [dict(id=i, file_name=f'{i}.png', width=64, height=64) for i in (1, 2)]
    mask = np.zeros((64, 64), bool)
    mask[10:50, 20:60] = True
    for im in images:
        write_png(tmp_path / im['file_name'], np.where(mask[..., None], [200, 90, 20], 60).astype(np.uint8))
    labels = instances_json(images, [note(1, mask), note(2, mask)], [dict(id=1, name='object')])
    cells = read_json(Path(__file__).parents[1] / 'nbs' / '48_run_cutler.ipynb')['cells']
    source = {c['id']: ''.join(c['source']) for c in cells}
    exec(source['parameters'], names)
    names['solver'] |= dict(n_iters=3, batch_size=2, schedule='constant', warmup_iters=0, lr=0.004, amp=None)
    names['augment'] |= dict(short_sides=[64], max_size=64)
    names['network'] |= common.PREDICTS | dict(fpn_first=3, droploss=0.25, norm='GN', fpn_norm='GN')
    names['self_training'] |= dict(score_threshold=[0.0, 0.0], n_iters=2, lr=0.001)
    names |= dict(root=str(tmp_path), data_root='.', n_workers=0)
    names['detect'] |= dict(n_procs=1)
    exec(source['check'], names)
    exec(source['imports'], names)
    names |= dict(labels=labels, data=PseudoLabels(tmp_path, labels))
    for name in ('network', 'train', 'rounds'):
        exec(source[name], names)
    assert [(r['iteration'], r['lr']) for r in names['log']] == [(3, 0.004), (5, 0.001), (7, 0.001)]
    assert names['net'].roi_heads.droploss == 0


class Finder(nn.Module):
    "Three detections an image, of scores .2, .9, .6; the second has an empty mask."

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))

    def forward(self, images, sizes):
        assert all(min(im.shape[1:]) == 10 for im in images)
        masks = [torch.zeros(3, *size, dtype=torch.bool) for size in sizes]
        for m in masks:
            m[0, :2], m[2, :, :3] = True, True
        return [
            dict(boxes=torch.zeros(3, 4), scores=torch.tensor([0.2, 0.9, 0.6]), labels=torch.tensor([0, 1, 2]), masks=m)
            for m in masks
        ]


def test_detections_become_annotations_and_resume(data, tmp_path):
    images = [dict(id=im['id'], file_name=im['file_name']) for im in data.images] + [
        dict(id=99, file_name='absent.png')
    ]
    options = dict(n_max=5, batch_size=4, short=10, max_size=30, folder=tmp_path / 'shards', category_ids=[2, 5, 9])
    sized, notes, skipped = detect(Finder(), tmp_path, images, score_threshold=0.5, **options)
    assert [im['id'] for im in sized] == list(range(1, 12)) and [s['file_name'] for s in skipped] == ['absent.png']
    assert len(notes) == 11 and all(a['category_id'] == 9 and a['score'] == 0.6 for a in notes)
    assert (sized[2]['width'], sized[2]['height']) == (20, 28)
    assert decode_rle(notes[0]['segmentation']).sum() == 20 * 3
    assert len(detect(Finder(), tmp_path, images, score_threshold=0.1, **options)[1]) == 22
    assert (
        len(detect(Finder(), tmp_path, images, score_threshold=0.1, **{**options, 'n_max': 1})[1]) == 0
    )  # the best one is empty
    done = Finder()
    done.forward = None  # all from shard files
    assert detect(done, tmp_path, images, score_threshold=0.5, **options)[1] == notes
    for name, h in ((images[0]['file_name'], 30), ('absent.png', 20)):
        write_png(tmp_path / name, np.zeros((h, 20, 3), np.uint8))  # one replaced, one that was missing
    sized, notes, skipped = detect(Finder(), tmp_path, images, score_threshold=0.5, **options)
    assert (sized[0]['width'], sized[0]['height'], len(sized), skipped) == (20, 30, 12, [])


def test_decoded_images_are_kept_up_to_a_bound(data, monkeypatch):
    whole = [data[i] for i in range(len(data))]
    assert len(data.cache) == len(data)
    small = copy.copy(data)
    small.cache = Cache()
    monkeypatch.setattr(batches, 'CACHE', 5 * 20 * 28 * 4)  # bytes of five pictures and their stuff
    for _ in range(2):
        again = [small[i] for i in range(len(small))]
    assert len(small.cache) == 5
    for (a, s), (b, t) in zip(whole, again):
        assert torch.equal(a, b) and all(torch.equal(s[k], t[k]) for k in s)


def test_a_checkpoint_that_another_process_sets_aside(tmp_path, monkeypatch):
    assert train._load(tmp_path / 'checkpoint.pt', 'a') is None
    train._save(tmp_path / 'checkpoint.pt', dict(key='a'))
    real = torch.load

    def slow(path, **kw):
        state = real(path, **kw)
        os.unlink(path)
        return state

    monkeypatch.setattr(torch, 'load', slow)
    assert train._load(tmp_path / 'checkpoint.pt', 'b') is None


def test_the_group_speaks_where_the_model_lies(monkeypatch):
    "A model on the CPU of a machine with GPUs: NCCL cannot carry its tensors, nor those of two processes on a GPU."
    import torch.distributed as dist
    from u2seg import processes

    asked = []
    monkeypatch.setenv('WORLD_SIZE', '2')
    monkeypatch.setenv('RANK', '1')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 4)
    monkeypatch.setattr(torch.cuda, 'set_device', lambda device: asked.append(device))
    monkeypatch.setattr(processes, 'rendezvous', lambda *args, **kwargs: iter([(dist.HashStore(), 1, 2)]))
    monkeypatch.setattr(processes, '_meet', lambda *args: 'name')
    monkeypatch.setattr(dist, 'init_process_group', lambda backend, **kwargs: asked.append(backend))
    monkeypatch.setattr(dist, 'get_rank', lambda: 1)
    monkeypatch.setattr(dist, 'get_world_size', lambda: 2)
    assert processes._processes(torch.device('cpu')) == (1, 2) and asked == ['gloo']
    assert processes._processes(torch.device('cuda', 3)) == (1, 2) and asked[1:] == [torch.device('cuda', 3), 'nccl']
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '5')
    assert processes._processes(torch.device('cuda', 0)) == (1, 2) and asked[3:] == [torch.device('cuda', 0), 'gloo']


@pytest.mark.parametrize(
    'change',
    [
        dict(lr=0.01),
        dict(milestones=[9]),
        dict(gamma=0.2),
        dict(warmup_iters=4),
        dict(sgd_momentum=0.8),
        dict(weight_decay=1e-4),
        dict(clip_value=2.0),
        dict(cls_lr_multiplier=1.0),
        dict(accumulate=2),
        dict(ema_decay=0.5),
        dict(precise_bn=1),
        dict(loss_weights={'loss': 2.0}),
        dict(amp='bf16'),
        dict(n_iters=15),
    ],
)
def test_every_field_of_the_solver_makes_another_recipe(data, change):
    fields = {k: v for k, v in RECIPE.items() if k != 'log_every'} | dict(batch_size=4)
    key = lambda **over: train._recipe(Tiny(), made(data, **VIEWS), Solver(**fields | over), over.get('amp'))
    assert key(**change) != key() == key(checkpoint_period=9)


ON_A_GPU_MACHINE = '''
import functools, os, sys, torch
torch.cuda.is_available = lambda: True
from u2seg.processes import launch
def work(net, folder): open(os.path.join(folder, os.environ.get('RANK', 'caller')), 'w').close()
if __name__ == '__main__': launch(functools.partial(work, torch.nn.Linear(1, 1), sys.argv[1]), 2)
'''


def test_a_network_on_the_cpu_of_a_machine_with_a_gpu_is_trained_by_processes(tmp_path):
    "launch asks where the network lies, not what the machine has."
    (tmp_path / 'script.py').write_text(ON_A_GPU_MACHINE)
    (tmp_path / 'ran').mkdir()
    subprocess.run([sys.executable, tmp_path / 'script.py', tmp_path / 'ran'], check=True)
    assert sorted(f.name for f in (tmp_path / 'ran').iterdir()) == ['0', '1', 'caller']


def test_loader_processes_may_open_all_files_that_the_system_allows(data):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        share = train._Slice(made(data, **VIEWS), 0, 1, 1)
        train._loader(share, 0, 1, 0)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 256  # without processes nothing is changed
        train._loader(share, 0, 1, 1)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == hard
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_progress_of_one_row_has_no_arrow():
    row = dict(iteration=7, loss=3.849)
    assert train.progress([row]) == 'loss 3.85 in 7 iterations'
    assert train.progress([dict(row, loss=9.0), row]) == 'loss 9.00 -> 3.85 in 7 iterations'


def test_other_maps_are_other_labels(tmp_path):
    "Equal instances and changed stuff: a checkpoint of the earlier maps is not gone on with."
    images = [dict(id=1, file_name='1.png', height=8, width=8)]
    write_png(tmp_path / '1.png', np.zeros((8, 8, 3), np.uint8))
    net, solver, keys = (
        nn.Linear(1, 1),
        Solver(**{k: v for k, v in RECIPE.items() if k != 'log_every'}, batch_size=1),
        [],
    )
    for value in (1, 2, 1):
        write_png(tmp_path / 'stuff' / f'{1:012d}.png', np.full((8, 8), value, np.uint8))
        data = PseudoLabels(tmp_path, instances_json(images, [], [dict(id=1, name='x')]), tmp_path / 'stuff')
        keys.append(train._recipe(net, made(data, **VIEWS), solver, None))
    assert keys[0] == keys[2] != keys[1]


def test_another_network_is_another_run(tmp_path):
    "Settings that change no weight: a checkpoint of the earlier ones is not gone on with."
    images = [dict(id=1, file_name='1.png', height=8, width=8)]
    data = made(PseudoLabels(tmp_path, instances_json(images, [], [dict(id=1, name='x')])), **VIEWS)
    solver = Solver(**{k: v for k, v in RECIPE.items() if k != 'log_every'}, batch_size=1)
    small = dict(depth=18, width=16, n_blocks=[1, 1, 1, 1], fpn_channels=16, fc_dim=16, mask_dim=8, n_mask_convs=1)
    keys = []
    for changes in ({}, dict(droploss=0.5), dict(rpn_batch=8), {}):
        torch.manual_seed(0)
        keys.append(train._recipe(build_model(small | dict(n_things=1, n_stuff=0) | changes), data, solver, None))
    assert keys[0] == keys[3] and len(set(keys)) == 3
