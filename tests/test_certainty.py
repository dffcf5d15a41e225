"The weights of stuff pixels: from the labeller to the file, from the file to the batch, and back to the checkpoint."

import numpy as np
import pytest
import torch

from common import STEPS, made
from u2seg.batches import PseudoLabels
from u2seg.images import read_image, write_json, write_png
from u2seg.labeller import Labeller, PcaHead
from u2seg.masks import encode_rle
from u2seg.semantic import patch_codes, pixel_probs, segment, write_semantic
from u2seg.solver import Solver
from u2seg.train import _recipe

CRF = dict(n_iters=5, gauss_weight=3.0, gauss_sxy=1.0, bilateral_weight=4.0, bilateral_sxy=10.0, bilateral_srgb=10.0)
OPTIONS = dict(size=32, patch_size=8, alpha=2.0, flip=False, crf=CRF)


def extract(x):
    return torch.nn.functional.avg_pool2d(x, 8)


@pytest.fixture
def labelled(tmp_path):
    "Images with a square each, a labeller, and stuff maps whose certainty is 50 times the label."
    rng, images, annotations = np.random.default_rng(0), [], []
    for i in range(1, 5):
        write_png(tmp_path / f'{i}.png', rng.integers(0, 256, (32, 40, 3), dtype=np.uint8))
        mask = np.zeros((32, 40), np.uint8)
        mask[4:16, 6:20] = 1
        stuff = rng.integers(1, 5, (32, 40), dtype=np.uint8)
        write_png(tmp_path / 'certainty' / f'{i:012d}.png', 50 * stuff)
        stuff[mask > 0] = 0
        write_png(tmp_path / 'stuff' / f'{i:012d}.png', stuff)
        images.append(dict(id=i, file_name=f'{i}.png', height=32, width=40))
        box = [6, 4, 14, 12]
        annotations.append(
            dict(id=i, image_id=i, category_id=1, segmentation=encode_rle(mask), bbox=box, area=168, iscrowd=0)
        )
    write_json(tmp_path / 'i.json', dict(images=images, annotations=annotations, categories=[dict(id=1, name='a')]))
    clusters = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    return tmp_path, images, Labeller(PcaHead(torch.zeros(3), torch.eye(3)), clusters).requires_grad_(False)


def data(root, **options):
    return PseudoLabels(root, root / 'i.json', root / 'stuff', **options)


def test_the_map_is_the_probability_before_the_crf(labelled):
    root, _, labeller = labelled
    image = read_image(root / '1.png')
    label, certainty = segment(labeller, extract, [image], certainty=True, **OPTIONS)[0]
    assert (label == segment(labeller, extract, [image], **OPTIONS)[0]).all()
    code = patch_codes(labeller, extract, [image], size=32, patch_size=8, flip=False)
    prob = pixel_probs(labeller, code, (32, 40), alpha=2.0)[0].numpy()
    for y, x in np.ndindex(32, 40):
        assert abs(255 * prob[label[y, x], y, x] - certainty[y, x]) <= 0.51
    assert (prob.argmax(0) != label).any()  # the CRF overruled the labeller somewhere


def test_the_maps_lie_beside_the_labels_only_where_asked_for(labelled):
    root, images, labeller = labelled
    names = {f'{i:012d}.png' for i in range(1, 5)}
    run = lambda **more: write_semantic(labeller, extract, root, images, root / 'out', work_folder=root / 'work',
                                        **OPTIONS, **more)  # fmt: skip
    plain = run()
    maps = {p.name: p.read_bytes() for p in (root / 'out').iterdir()}
    assert set(maps) == names
    assert run(certainty=True) == plain
    assert {p.name for p in (root / 'out').iterdir()} == names | {'certainty'}
    assert {p.name for p in (root / 'out' / 'certainty').iterdir()} == names
    want = segment(labeller, extract, [read_image(root / '2.png')], certainty=True, **OPTIONS)[0][1]
    assert (read_image(root / 'out' / 'certainty' / '000000000002.png')[..., 0] == want).all()
    run()
    assert {p.name: p.read_bytes() for p in (root / 'out').iterdir()} == maps


def test_weights_follow_their_pixels_through_every_view(labelled):
    root = labelled[0]
    labels = data(root, certainty_dir=root / 'certainty', power=2.0)
    plain = data(root)
    views = dict(short_sides=[32, 48], max_size=80, flip=0.5, colour_jitter=[0, 0, 0, 0], copy_paste='semantic')
    views |= dict(paste_rate=0.9, paste_scale=[0.5, 1.2])
    weighed, without = (made(d, batch_size=4, seed=1, **views) for d in (labels, plain))
    n_things = 0
    for i in range(4):
        for number, t, p in zip(weighed.numbers(i), weighed.part(i, 0, 1)[1], without.part(i, 0, 1)[1]):
            assert 'certainty' not in p and torch.equal(t['sem'], p['sem'])
            stuff = read_image(root / 'stuff' / f'{number + 1:012d}.png')[..., 0]
            mean = np.mean([label**2 for label in stuff.ravel().tolist() if label])
            assert t['certainty'].shape == t['sem'].shape
            for label in t['sem'].unique().tolist():
                w = t['certainty'][t['sem'] == label]
                assert torch.allclose(w, torch.tensor(label**2 / mean if label else 1.0, dtype=w.dtype), atol=1e-5)
            n_things += int((t['sem'] == 0).sum() > 0)
    assert n_things == 16


def test_what_is_missing_is_said_and_the_power_makes_another_run(labelled):
    root = labelled[0]
    with pytest.raises(ValueError, match='none: no folder of certainty maps'):
        data(root, certainty_dir=root / 'none')
    views = dict(short_sides=[32], max_size=32, flip=0.5, colour_jitter=[0, 0, 0, 0], copy_paste='none')
    views |= dict(paste_rate=0.0, paste_scale=[0.5, 1.2])
    solver = Solver(batch_size=2, n_iters=2, lr=0.1, milestones=[], warmup_iters=1, warmup_factor=0.1,
                    weight_decay=0.0, checkpoint_period=1, **STEPS)  # fmt: skip
    powers = [{}, *(dict(certainty_dir=root / 'certainty', power=p) for p in (1.0, 2.0))]
    net = torch.nn.Linear(1, 1)
    batches = [made(data(root, **p), batch_size=2, seed=0, **views) for p in powers]
    assert len({_recipe(net, b, solver, None) for b in batches}) == 3
