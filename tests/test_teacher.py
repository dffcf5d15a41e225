"Self-training of the universal model: views against a plain loop, thresholds by hand, rounds killed and resumed."

import functools

import numpy as np
import pytest
import torch
from torch import nn

from common import PREDICTS, STEPS
from u2seg import teacher
from u2seg.augment import Augment
from u2seg.batches import Batches, PseudoLabels
from u2seg.images import read_image, read_json, write_png
from u2seg.masks import decode_rle, encode_rle, read_ids
from u2seg.model import build_model
from u2seg.predict import run_network
from u2seg.solver import Solver
from u2seg.teacher import average_views, class_thresholds, merge_views, self_train, sure, teacher_labels
from u2seg.train import fit

PLAIN = Augment(
    short_sides=[48],
    max_size=80,
    flip=0.5,
    colour_jitter=(0.1, 0.1, 0.1, 0.0),
    copy_paste='semantic',
    paste_rate=0.5,
    paste_scale=(0.5, 1.0),
)
SOLVER = Solver(
    **STEPS
    | dict(
        n_iters=3,
        batch_size=2,
        lr=0.01,
        milestones=[],
        warmup_iters=0,
        warmup_factor=0.1,
        weight_decay=0.0,
        checkpoint_period=1,
        ema_decay=0.9,
    )
)
LABELS = dict(score_threshold=0.3, top_fraction=0.7)
ROUNDS = dict(score_threshold=[0.3, 0.35], n_iters=2, top_fraction=0.7)


def network(seed=0):
    torch.manual_seed(seed)
    net = build_model(dict(PREDICTS, n_stuff=3, min_size=48, max_size=80))
    return net.eval()


@pytest.fixture
def images(tmp_path):
    rng, out = np.random.default_rng(0), []
    for i in range(1, 6):
        h, w = (40, 56) if i % 2 else (56, 40)
        write_png(tmp_path / f'{i}.png', rng.integers(0, 256, (h, w, 3), dtype=np.uint8))
        out.append(dict(id=i, file_name=f'{i}.png', width=w, height=h))
    return out


def pixels(tmp_path, images):
    return [read_image(tmp_path / im['file_name']) for im in images]


def test_views_are_averaged_as_in_a_plain_loop(tmp_path, images):
    net, scales = network(), (0.75, 1.0, 1.5)
    seen = pixels(tmp_path, images)[:2]
    for image, (probs, found) in zip(seen, average_views(net, seen, scales=scales)):
        total, boxes, view = torch.zeros_like(probs), [], 0
        for s in scales:
            for mirrored in (False, True):
                x = np.ascontiguousarray(np.flip(image, 1)) if mirrored else image
                (r,) = run_network(net, [x], short=round(48 * s), max_size=round(80 * s))
                p, masks = torch.softmax(r['sem_logits'], 0), r['masks'].numpy()
                if mirrored:
                    p, masks = torch.flip(p, [2]), np.flip(masks, 2)
                total += p
                keep = masks.any((1, 2))
                boxes += [(view, m) for m in masks[keep]]
                view += 1
        assert torch.allclose(probs, total / 6, atol=1e-5)
        assert torch.allclose(probs.sum(0), torch.ones(image.shape[:2]), atol=1e-5)
        assert len(found) == len(boxes) > 6
        for d, (view, mask) in zip(found, boxes):
            assert d['view'] == view and (decode_rle(d['segmentation']) == mask).mean() > 0.99


def test_a_mirrored_image_has_the_mirrored_labels(tmp_path, images):
    net, image = network(), pixels(tmp_path, images)[0]
    ((probs, found),) = average_views(net, [image])
    ((other, mirrored),) = average_views(net, [image[:, ::-1]])
    assert torch.equal(other, probs.flip(-1))
    one, two = merge_views(found, 6), merge_views(mirrored, 6)
    assert [(a['category_id'], a['score']) for a in one] == [(a['category_id'], a['score']) for a in two] and one
    for a, b in zip(one, two):
        assert (decode_rle(a['segmentation']) == decode_rle(b['segmentation'])[:, ::-1]).all()


def detection(category, score, view, columns):
    mask = np.zeros((4, 20), bool)
    mask[:, columns] = True
    return dict(category_id=category, score=score, view=view, segmentation=encode_rle(mask))


def test_views_are_merged_by_hand():
    found = [
        detection(1, 0.9, 0, slice(0, 10)),  # seen by all three; two mates in view 1, the better counts
        detection(1, 0.6, 1, slice(0, 9)),
        detection(1, 0.3, 1, slice(0, 8)),
        detection(1, 0.6, 2, slice(2, 10)),
        detection(2, 0.8, 2, slice(0, 10)),  # of another class, a mate all the same
        detection(1, 0.5, 0, slice(5, 15)),  # IoU of 5 / 15 with the first: another instance
        detection(1, 0.4, 1, slice(10, 20)),
    ]
    merged = [
        (a['category_id'], a['score'], decode_rle(a['segmentation'])[0].nonzero()[0].tolist())
        for a in merge_views(found, 3)
    ]
    assert merged == [
        (1, 0.766667, [*range(10)]),  # (.9 + .6 + .8) / 3: a thing, by whatever name
        (1, 0.166667, [*range(5, 15)]),
        (1, 0.133333, [*range(10, 20)]),
    ]


def test_the_class_is_that_of_most_views_and_the_mask_its_own():
    found = [detection(2, 0.9, 0, slice(0, 10)), detection(1, 0.5, 1, slice(0, 9)), detection(1, 0.6, 2, slice(0, 8))]
    (one,) = merge_views(found, 3)
    assert (one['category_id'], one['score']) == (1, 0.666667)  # .5 + .6 against .9; (.9 + .5 + .6) / 3
    assert decode_rle(one['segmentation'])[0].sum() == 8  # the best of class 1


def test_thresholds_by_hand():
    scores = {0: [90, 80, 70, 60, 20], 1: [52, 51, 51, 50], 2: [49, 10], 3: [100] * 7}
    counts = np.array([np.bincount(scores[c], minlength=101) for c in range(4)])
    of = lambda s, q: class_thresholds(counts, score_threshold=s, top_fraction=q).tolist()
    assert of(0.5, 1.0)[:2] == [60, 50] and of(0.5, 1.0)[3] == 100
    assert of(0.5, 0.75)[:2] == [70, 51]  # three of four; where two are equal, both
    assert of(0.5, 0.5)[:2] == [80, 51]
    assert of(0.5, 0.01)[:2] == [90, 52]
    assert of(0.0, 0.8)[0] == 60 and of(0.29, 1.0)[2] == 49  # .29 is 29 hundredths
    counts[2] = 0
    assert of(0.5, 0.8)[2] == 100  # a class that is never there


@pytest.mark.parametrize('seed', range(5))
def test_thresholds_keep_the_fraction_of_each_class(seed):
    rng = np.random.default_rng(seed)
    scores = [rng.integers(0, 101, rng.integers(1, 40)) for _ in range(6)]
    counts = np.array([np.bincount(s, minlength=101) for s in scores])
    for t, s in zip(class_thresholds(counts, score_threshold=0.4, top_fraction=0.6), scores):
        s = s[s >= 40]
        if len(s):
            assert (s >= t).sum() >= 0.6 * len(s) > (s > t).sum()


def test_sure_by_hand():
    stuff, level = np.array([[0, 1, 1, 2, 2]], np.uint8), np.array([[100, 59, 60, 69, 70]], np.uint8)
    assert sure(stuff, level, np.array([60, 70])).tolist() == [[255, 255, 0, 255, 1]]


def test_the_label_set_is_that_of_stage_panoptic(tmp_path, images):
    net = network()
    labels, counts = teacher_labels(net, tmp_path, images, tmp_path / 'work', **LABELS)
    panoptic, instances = (read_json(labels / f'{k}.json') for k in ('panoptic', 'instances'))
    assert [im['id'] for im in panoptic['images']] == [1, 2, 3, 4, 5] and counts['n_images'] == 5
    assert [c['id'] for c in panoptic['categories']] == [1, 2, 3, 4, 5, 6]
    assert [c['id'] for c in instances['categories']] == [1, 2, 3]
    assert all(0.3 <= a['score'] for a in instances['annotations']) and instances['annotations']
    (levels,) = tmp_path.glob('work/*/maps')
    voids = 0
    for a in panoptic['annotations']:
        ids, stuff = (
            read_ids(labels / 'panoptic' / a['file_name']),
            read_image(labels / 'stuff' / a['file_name'])[..., 0],
        )
        seen = read_image(levels / a['file_name'])
        for s in a['segments_info']:
            assert set(np.unique(stuff[ids == s['id']])) == {max(s['category_id'] - 3, 0)}
            if s['category_id'] > 3:
                assert (seen[ids == s['id'], 0] == s['category_id'] - 3).all()
        assert (stuff[ids == 0] == 255).all()
        voids += (ids == 0).sum()
    assert voids  # something is below its class's threshold
    data = PseudoLabels(tmp_path, labels / 'instances.json', labels / 'stuff')
    assert sum(len(data[i][1]['labels']) for i in range(5)) == len(instances['annotations'])


def files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}


def test_an_unreadable_image_is_left_out_and_named(tmp_path, images):
    (tmp_path / '2.png').write_bytes(b'no image')
    labels, counts = teacher_labels(network(), tmp_path, images, tmp_path / 'work', **LABELS)
    assert counts['n_images'] == 4 and [s['file_name'] for s in counts['skipped']] == ['2.png']


def test_other_weights_options_and_images_make_other_labels(tmp_path, images):
    make = lambda net=network(), these=images, **o: teacher_labels(net, tmp_path, these, tmp_path / 'w', **LABELS | o)[
        0
    ]
    folders = [make(), make(network(1)), make(these=images[:3]), make(score_threshold=0.4), make(top_fraction=0.5)]
    assert len(set(folders)) == 5 and make() == folders[0]


class Killed(Exception):
    "Stands for the end of a process."


def rounds(tmp_path, images, folder, train=fit, **options):
    "First training and rounds; the weights and the log."
    net = network()
    data = tmp_path / 'first'
    if not data.exists():
        labels, _ = teacher_labels(network(7), tmp_path, images, tmp_path / 'first_work', **LABELS)
        labels.rename(data)
    first = PseudoLabels(tmp_path, data / 'instances.json', data / 'stuff')
    log = train(net, Batches(first, PLAIN, batch_size=2, seed=5), SOLVER, folder=tmp_path / folder, n_workers=0)
    log = log + self_train(
        net, train, tmp_path, images, tmp_path / folder, solver=SOLVER, augment=PLAIN, seed=5, **ROUNDS | options
    )
    return net, log


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_rounds_killed_at_every_point_end_with_the_same_weights(tmp_path, images, monkeypatch):
    "In training, between and within the passes of the labels."
    whole, log = rounds(tmp_path, images, 'whole')
    assert [r['iteration'] for r in log] == [3, 5, 7]
    steps = dict(left=7)

    def counted(work):
        @functools.wraps(work)
        def wrapper(*args, **kwargs):
            steps['left'] -= 1
            if steps['left'] == 0:
                raise Killed
            return work(*args, **kwargs)

        return wrapper

    monkeypatch.setattr(Batches, 'part', counted(Batches.part))
    for name in ('write_png', 'average_views', 'write_labels', 'class_thresholds'):
        monkeypatch.setattr(teacher, name, counted(getattr(teacher, name)))
    for kills in range(30):
        steps['left'] = 7 + kills
        try:
            killed, rows = rounds(tmp_path, images, 'killed')
            break
        except Killed:
            continue
    assert kills >= 5 and same(whole, killed) and rows == log


def test_the_teacher_has_the_averaged_weights(tmp_path, images, monkeypatch):
    seen, ends = [], []
    keep = lambda net: {k: v.clone() for k, v in net.state_dict().items()}

    def spied(model, *args, **kwargs):
        seen.append(keep(model))
        return teacher_labels(model, *args, **kwargs)

    def train(net, *args, folder, **kwargs):
        rows = fit(net, *args, folder=folder, **kwargs)
        state = torch.load(folder / 'checkpoint.pt', map_location='cpu', weights_only=True)
        ends.append((keep(net), state['mean']))
        return rows

    monkeypatch.setattr(teacher, 'teacher_labels', spied)
    rounds(tmp_path, images, 'spied', train=train)
    assert len(seen) == 2
    for weights, (end, mean) in zip(seen, ends):
        assert all(torch.equal(weights[k], end[k]) for k in end)
        assert any(torch.equal(mean[0], v) for v in weights.values() if v.shape == mean[0].shape)


def test_without_rounds_nothing_is_done(tmp_path):
    net = nn.Linear(2, 2)
    before = [p.clone() for p in net.parameters()]
    nothing = self_train(
        net,
        None,
        tmp_path,
        [],
        tmp_path / 'w',
        solver=SOLVER,
        augment=PLAIN,
        seed=0,
        **ROUNDS | dict(score_threshold=[]),
    )
    assert nothing == [] and not (tmp_path / 'w').exists()
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters()))


def test_two_processes_make_the_labels_of_one(tmp_path, images, monkeypatch):
    from u2seg.processes import launch

    many = [dict(im, id=100 * k + im['id']) for k in range(14) for im in images]  # two shards
    one, _ = teacher_labels(network(), tmp_path, many, tmp_path / 'one', scales=(1.0,), **LABELS)
    work = functools.partial(
        teacher_labels, network(), tmp_path, many, tmp_path / 'two', scales=(1.0,), **LABELS
    )  # started as other processes
    two, _ = launch(work, 2)
    for sub in ('panoptic', 'stuff'):
        assert files(one / sub) == files(two / sub) and len(files(one / sub)) == 70
    for name in ('panoptic.json', 'instances.json'):
        assert (one / name).read_bytes() == (two / name).read_bytes()
