"Numbers recorded from detectron2 (make_golden.py): parity is checked where it is not installed."

import numpy as np
import pytest
import torch

from make_golden import double, exact, network, path, scene, summary
from u2seg import cascade, rpn


@pytest.fixture(scope='module')
def pair():
    "What detectron2 computed, and what we do."
    patch = pytest.MonkeyPatch()
    for module in rpn, cascade:  # the first candidates, as recorded
        patch.setattr(module, 'random_keys', lambda n, seed, device: torch.arange(n).float())
    model, (image, target) = network(), scene()
    with torch.inference_mode():
        found = model.eval()([image])[0]
    losses = model.double().train()([image.double()], [dict(target, boxes=target['boxes'].double())])
    sum(losses.values()).backward()
    patch.undo()
    gradients = {k: p.grad for k, p in model.named_parameters()}
    mine = summary(found, losses, gradients)
    return dict(np.load(path)), {k: np.asarray(v) for k, v in mine.items()}


def test_the_recording_shows_enough(pair):
    golden, _ = pair
    assert path.stat().st_size < 30_000 and len(golden['scores']) >= 10 and len(set(golden['labels'].tolist())) > 1
    assert (golden['categories'] <= 6).any() and (golden['categories'] > 6).any() and golden['loss_mask'] > 0


@pytest.mark.parametrize('what, limit', [('scores', 1e-4), ('boxes', 1e-2), ('sem_logits', 1e-3)])
def test_outputs(pair, what, limit):
    golden, mine = pair
    assert mine[what].shape == golden[what].shape and np.abs(mine[what] - golden[what]).max() < limit


def test_outputs_in_double_precision(pair):
    "detectron2's boxes in single precision are 3e-4 pixels from these: rounding, which hides no difference here."
    golden, _ = pair
    with double(), torch.inference_mode():
        mine = exact(network().eval()([scene()[0].double()])[0])
    for k, v in mine.items():
        assert v.dtype == torch.double and v.shape == golden[k].shape
        assert np.abs(v.numpy() - golden[k]).max() < 1e-9, k


def test_labels_masks_and_panoptic_map(pair):
    golden, mine = pair
    assert (mine['labels'] == golden['labels']).all() and (mine['categories'] == golden['categories']).all()
    assert np.abs(mine['mask_area'] - golden['mask_area']).max() <= 2
    assert (np.unpackbits(mine['mask']) != np.unpackbits(golden['mask'])).mean() < 1e-3
    assert (mine['ids'] != golden['ids']).mean() < 1e-3


def test_losses(pair):
    golden, mine = pair
    names = {k for k in golden if k.startswith('loss_')}
    assert names == {k for k in mine if k.startswith('loss_')} and len(names) == 10
    for k in names:
        assert abs(mine[k] - golden[k]) < 1e-4, k


def test_gradients(pair):
    golden, mine = pair
    for k in (k for k in golden if k.startswith(('gradient', 'norm'))):
        scale = golden['norm' + k[k.index(' ') :]]
        assert scale > 0 and np.abs(mine[k] - golden[k]).max() < 1e-3 * scale, k
