"The weights of masks: from the cuts to the file, from the file to the batch, and into the loss."

import numpy as np
import pytest
import torch

from common import STEPS, made
from u2seg.agreement import agreements, weighed
from u2seg.augment import crop
from u2seg.batches import PseudoLabels
from u2seg.images import write_png
from u2seg.masks import decode_rle, encode_rle, instances_json
from u2seg.model import build_model
from u2seg.solver import Solver
from u2seg.train import _recipe

NET = dict(n_things=3, n_stuff=0, depth=18, width=8, n_blocks=[1, 1, 1, 1], fpn_channels=16, fc_dim=32, mask_dim=8)
NET |= dict(roi_batch=32, rpn_post_train=50, norm='BN', fpn_norm='')
VIEWS = dict(short_sides=[32, 48], max_size=80, flip=0.5, colour_jitter=[0, 0, 0, 0], paste_rate=0.9)


def file_of(groups, weights=None):
    "A COCO file: for each image its masks, bool [32, 40]; the weight of the j-th is weights[j]."
    images, annotations = [], []
    for i, masks in enumerate(groups, 1):
        images.append(dict(id=i, file_name=f'{i}.png', height=32, width=40))
        for j, mask in enumerate(masks):
            more = dict(weight=weights[j]) if weights else {}
            annotations.append(dict(image_id=i, category_id=j + 1, score=0.5, segmentation=encode_rle(mask), **more))
    return instances_json(images, annotations, [dict(id=j, name=str(j)) for j in (1, 2, 3)])


def rectangles(seed, n=3):
    "Some disjoint masks, bool [32, 40] each."
    rng = np.random.default_rng(seed)
    masks = np.zeros((n, 32, 40), bool)
    for j in range(n):
        y, x = rng.integers(2, 16), 13 * j + rng.integers(0, 4)
        masks[j, y : y + rng.integers(6, 12), x : x + rng.integers(5, 9)] = True
    return list(masks)


@pytest.mark.parametrize('seed', range(5))
def test_agreement_is_the_mean_of_the_best_overlaps_counted_by_pixels(seed):
    own, *others = (file_of([rectangles(10 * seed + k, n), rectangles(k, 2)]) for k, n in enumerate((3, 2, 3)))
    found = agreements(own, others)
    masks = lambda coco, i: [decode_rle(a['segmentation']) > 0 for a in coco['annotations'] if a['image_id'] == i]
    for i in (1, 2):
        for value, m in zip(found[i], masks(own, i), strict=True):
            best = [max((m & o).sum() / (m | o).sum() for o in masks(other, i)) for other in others]
            assert value == pytest.approx(np.mean(best), abs=1e-12)


def test_the_file_keeps_its_annotations_and_the_default_is_the_file_itself():
    coco = file_of([rectangles(0), [], rectangles(1, 1)])
    assert weighed(coco, 'none') is coco
    for kind in ('score', 'agreement'):
        out = weighed(coco, kind, [file_of([rectangles(2), rectangles(3), []])])
        plain = [{k: v for k, v in a.items() if k != 'weight'} for a in out['annotations']]
        assert plain == coco['annotations'] and out['images'] == coco['images']
        assert out['annotations'][-1]['weight'] == (0.5 if kind == 'score' else 0)


@pytest.fixture
def data(tmp_path):
    "Data sets of four images with three labels each: with weights 1, 2 and 3, and without."
    rng = np.random.default_rng(0)
    for i in range(1, 5):
        write_png(tmp_path / f'{i}.png', rng.integers(0, 256, (32, 40, 3), dtype=np.uint8))
    groups = [rectangles(i) for i in range(4)]
    return [PseudoLabels(tmp_path, file_of(groups, w)) for w in ([1.0, 2.0, 3.0], None)]


@pytest.mark.parametrize('kind', ['plain', 'semantic'])
def test_weights_follow_their_labels_through_every_view(data, kind):
    scale = [0.5, 1.0]
    weighing, without = (made(d, batch_size=4, seed=1, copy_paste=kind, paste_scale=scale, **VIEWS) for d in data)
    pasted = 0
    for i in range(8):
        for t, p in zip(weighing.part(i, 0, 1)[1], without.part(i, 0, 1)[1]):
            assert 'weight' not in p and torch.equal(t['masks'], p['masks'])
            assert t['weight'].tolist() == ((t['labels'] + 1) / 2).tolist()  # of mean 1
            pasted += len(t['labels']) > 3
    assert pasted > 4


def test_an_instance_that_leaves_the_image_takes_its_weight_along(data):
    image, target = data[0][0]
    x0 = int(target['boxes'][:, 2].min())  # the leftmost ends here
    left = crop(image, target, (0, x0, 32, 40 - x0))[1]
    assert left['labels'].tolist() == [1, 2] and left['weight'].tolist() == [1.0, 1.5]


def losses(weight, seed=0):
    "Losses of the untrained network, with these weights of the three labels."
    torch.manual_seed(seed)
    net = build_model(NET).train()
    masks = torch.from_numpy(np.stack(rectangles(3)))
    boxes = torch.tensor([[m.any(0).nonzero().min(), m.any(1).nonzero().min(), m.any(0).nonzero().max() + 1,
                           m.any(1).nonzero().max() + 1] for m in masks]).float()  # fmt: skip
    target = dict(boxes=boxes, labels=torch.tensor([0, 1, 2]), masks=masks, seed=1)
    more = {} if weight is None else dict(weight=torch.tensor(weight))
    torch.manual_seed(seed + 1)
    image = torch.rand(3, 32, 40) * 255
    return net, net([image], [target | more])


def test_weights_of_one_change_nothing():
    plain, ones = losses(None)[1], losses([1.0, 1.0, 1.0])[1]
    assert plain.keys() == ones.keys()
    for k in plain:
        assert plain[k].item() == pytest.approx(ones[k].item(), rel=1e-5), k


def test_the_loss_is_linear_in_each_weight_and_its_parts_add_up():
    zero, *each, every = (losses(w)[1] for w in ([0.0] * 3, [1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0], [1.0] * 3))
    names = [k for k in zero if k.startswith(('loss_cls', 'loss_box', 'loss_mask'))]
    assert len(names) == 7
    for k in names:
        parts = [(e[k] - zero[k]).item() for e in each]
        assert sum(parts) == pytest.approx((every[k] - zero[k]).item(), rel=1e-4, abs=1e-6), k
        if 'stage0' in k or k == 'loss_mask':  # each label has regions there
            assert min(parts) > 0, k
        if not k.startswith('loss_cls'):
            assert zero[k].item() == 0, k  # only the class loss has a background
    for k in zero.keys() - set(names):
        assert zero[k].item() == every[k].item(), k  # proposals are learnt as before


def test_a_label_of_no_weight_teaches_no_mask():
    grads = []
    for w in ([0.0, 1.0, 1.0], [1.0, 1.0, 1.0]):
        net, found = losses(w)
        found['loss_mask'].backward()
        grads.append(net.roi_heads.mask_head.predictor.weight.grad.flatten(1).abs().sum(1))
    assert grads[0][0] == 0 < grads[1][0] and torch.equal(grads[0][1:] > 0, torch.tensor([True, True]))


def test_an_image_without_a_label_has_no_weight(data):
    net = build_model(NET).train()
    empty = dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long), weight=torch.zeros(0))
    empty['masks'] = torch.zeros(0, 32, 40, dtype=torch.bool)
    image, target = data[0][0]
    for batch in ([empty], [empty, target]):
        found = net([image.float()] * len(batch), [dict(t, seed=1) for t in batch])
        assert all(torch.isfinite(v) for v in found.values())


def test_other_weights_are_another_run(data, tmp_path):
    solver = Solver(batch_size=2, n_iters=2, lr=0.1, milestones=[], warmup_iters=1, warmup_factor=0.1,
                    weight_decay=0.0, checkpoint_period=1, **STEPS)  # fmt: skip
    groups = [rectangles(i) for i in range(4)]
    others = [*data, PseudoLabels(tmp_path, file_of(groups, [3.0, 2.0, 1.0]))]
    options = dict(batch_size=2, seed=0, copy_paste='none', paste_scale=[0.5, 1.0], **VIEWS)
    net = torch.nn.Linear(1, 1)
    assert len({_recipe(net, made(d, **options), solver, None) for d in others}) == 3
