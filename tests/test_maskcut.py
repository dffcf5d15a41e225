"MaskCut against a plain restatement of the published procedure on the dense solver, and its behaviour at the edges."

import json
from pathlib import Path

import numpy as np, pytest, scipy.linalg, torch
from hypothesis import given, settings, strategies as st
from scipy import ndimage
from torch import nn

from u2seg import maskcut as module
from u2seg.images import to_tensor, write_png
from u2seg.features import weights_digest
from u2seg.maskcut import cut_rounds, fill_holes, foreground, label_image, label_images, maskcut, maskcut_batch, refine
from u2seg.masks import decode_rle

torch.set_num_threads(1)

# --- the procedure, from its description (CutLER, section 3.2), one round after another on dense matrices


def region(x):
    side = x > x.mean()
    corners = int(side[0, 0]) + int(side[0, -1]) + int(side[-1, 0]) + int(side[-1, -1])
    if corners >= 3 or not side.flat[np.argmax(np.abs(x))]:
        x, side = -x, ~side
    labels, _ = ndimage.label(side)
    return labels == labels.flat[np.argmax(x)]


def tied(x):
    "Whether the strongest tokens, up to rounding, lie in several pieces: then rounding decides the region."
    seed = x.flat[np.argmax(np.abs(x))]
    labels, _ = ndimage.label(x > x.mean() if seed > 0 else x <= x.mean())
    return len(set(labels[np.abs(x) > np.abs(x).max() * (1 - 1e-9)])) > 1


def plain_maskcut(keys, tau, n_masks, eps=1e-5):
    "Disjoint masks of each round (empty too), the smallest gap (0 where a tie decides), rounds where the sign decides."
    _, h, w = keys.shape
    painted, before, out, gap, signs = np.zeros((h, w), bool), None, [], 1.0, 0
    for i in range(n_masks):
        f = keys.flatten(1).double() * torch.from_numpy(~painted).flatten()
        f = f / f.norm(dim=0).clamp_min(1e-12)
        a = np.where((f.T @ f).numpy() > tau, 1.0, eps)
        d = np.diag(a.sum(1))
        values, vectors = scipy.linalg.eigh(d - a, d, subset_by_index=[1, 2])
        x = vectors[:, 0].reshape(h, w)
        gap, signs = min(gap, 0.0 if tied(x) else values[1] - values[0]), signs + bool((region(x) != region(-x)).any())
        p = region(x)
        if i and ((p & before).sum() > 0.5 * (p | before).sum() or p.mean() <= 0.01):
            p = np.zeros_like(p)
        out.append(p & ~painted)
        painted, before = painted | p, p
    return np.stack(out), gap, signs


def scene(seed, h=14, w=18, d=24, sigma=0.6, framed=False):
    g = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(h) / h, torch.arange(w) / w, indexing='ij')
    label = torch.zeros(h, w, dtype=int)
    for i in range(3):
        cy, cx, r = torch.rand(3, generator=g) * torch.tensor([0.8, 0.8, 0.2]) + 0.1
        label[(y - cy) ** 2 + (x - cx) ** 2 < r * r] = i + 1
    if framed:
        label[:2], label[-2:], label[:, :2], label[:, -2:] = 4, 4, 4, 4
    keys = torch.randn(5, d, generator=g)[label] + sigma * torch.randn(h, w, d, generator=g)
    return (keys + 0.4 * torch.randn(d, generator=g)).permute(2, 0, 1).contiguous()


def same(ours, theirs):
    theirs = [m for m in theirs if m.any()]
    return len(ours) == len(theirs) and all((a & b).sum() >= 0.99 * (a | b).sum() for a, b in zip(ours.numpy(), theirs))


def test_masks_are_those_of_the_dense_procedure():
    compared = signs = 0
    for seed in range(80):
        keys = scene(seed, sigma=(0.4, 0.7, 1.0)[seed % 3], framed=seed % 2)  # a frame stands out and holds all corners
        theirs, gap, s = plain_maskcut(keys, 0.2, 3)
        if gap < 1e-3:
            continue
        compared, signs = compared + 1, signs + (s > 0)
        assert same(maskcut(keys, tau=0.2, n_masks=3), theirs), seed
    assert compared >= 50 and signs >= 5, (compared, signs)  # in some of them the sign decides


@pytest.mark.parametrize('shape', [(2, 2), (1, 9), (9, 1), (3, 31), (20, 8)])
@pytest.mark.parametrize('n_masks', [1, 2, 5])
def test_any_grid(shape, n_masks):
    for seed in range(4):
        keys = scene(seed, *shape)
        masks = maskcut(keys, tau=0.2, n_masks=n_masks)
        assert masks.dtype == torch.bool and masks.shape[1:] == shape and len(masks) <= n_masks
        theirs, gap, _ = plain_maskcut(keys, 0.2, n_masks)
        if gap > 1e-3 and shape[0] * shape[1] > 9:
            assert same(masks, theirs)


@given(st.integers(0, 10**6), st.integers(2, 9), st.integers(2, 9), st.floats(0, 0.9), st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_masks_are_disjoint_and_not_empty(seed, h, w, tau, n_masks):
    masks = maskcut(torch.randn(3, h, w, generator=torch.Generator().manual_seed(seed)), tau=tau, n_masks=n_masks)
    assert len(masks) <= n_masks and masks.shape[1:] == (h, w)
    assert masks.sum(0).max() <= 1 and masks.flatten(1).any(1).all()


@pytest.mark.parametrize('keys', [torch.ones(4, 5, 6), torch.zeros(4, 5, 6), torch.eye(30).view(30, 5, 6)])
def test_images_without_structure(keys):
    masks = maskcut(keys, tau=0.2, n_masks=3)
    assert masks.sum(0).max() <= 1 and (masks == maskcut(keys, tau=0.2, n_masks=3)).all()


def test_batch_is_each_image_alone():
    keys = torch.stack([scene(s) for s in range(5)])
    together = maskcut_batch(keys, tau=0.2, n_masks=3)
    assert all((a == maskcut(k, tau=0.2, n_masks=3)).all() for a, k in zip(together, keys))
    out, covered = [], np.zeros(1, bool)
    for _, _, accepted in cut_rounds(keys, tau=0.2, n_masks=3):  # in step, as on a GPU
        out.append(accepted & ~covered)
        covered = covered | accepted
    assert all(same(a, b) for a, b in zip(together, np.stack(out, 1)))


@pytest.mark.parametrize('bad', [dict(tau=-0.1), dict(tau=1.0), dict(n_masks=0)])
def test_impossible_options(bad):
    with pytest.raises(ValueError, match=str(*bad.values())):
        maskcut(scene(0), **(dict(tau=0.2, n_masks=3) | bad))


def test_features_that_are_not_finite():
    keys = scene(0)
    keys[3, 2, 1] = float('nan')
    with pytest.raises(ValueError, match='NaN'):
        maskcut(keys, tau=0.2, n_masks=3)


# --- the quirks


def rounds_of(monkeypatch, regions):
    "`cut_rounds` where the cuts give `regions` in turn; the accepted ones and how often a cut was solved."
    solved = []

    def cut(links, painted):
        solved.append(painted.copy())
        return np.zeros((1, 10, 10)), regions[len(solved) - 1][None]

    monkeypatch.setattr(module, '_cut', cut)
    return [a[0] for _, _, a in cut_rounds(torch.randn(1, 4, 10, 10), tau=0.2, n_masks=3)], solved


def block(rows, columns):
    m = np.zeros((10, 10), bool)
    m[:rows, :columns] = True
    return m


def test_a_rejected_region_comes_back(monkeypatch):
    "Round 2 repeats round 1 and is dropped; round 3, the same problem, is not solved again and meets the empty region."
    accepted, solved = rounds_of(monkeypatch, [block(5, 5), block(5, 6)])
    assert len(solved) == 2
    assert (accepted[0] == block(5, 5)).all() and not accepted[1].any() and (accepted[2] == block(5, 6)).all()


def test_small_regions_count_from_the_second_round_on(monkeypatch):
    accepted, _ = rounds_of(monkeypatch, [block(1, 1), block(5, 5), block(5, 5)])
    assert accepted[0].sum() == 1
    accepted, _ = rounds_of(monkeypatch, [block(5, 5), block(1, 1), block(2, 1)])
    assert not accepted[1].any()  # one hundredth exactly is too small


def test_half_overlap_is_allowed(monkeypatch):
    accepted, _ = rounds_of(monkeypatch, [block(10, 4), block(10, 8), block(1, 2)])
    assert accepted[1].sum() == 80  # IoU = .5 is not more than .5


def test_painted_tokens_are_handed_on(monkeypatch):
    _, solved = rounds_of(monkeypatch, [block(4, 4), block(10, 2) & ~block(4, 4), block(1, 1)])
    assert [int(p.sum()) for p in solved] == [0, 16, 16 + 12]


@pytest.mark.parametrize('corners,expected', [(0, 'seed'), (2, 'seed'), (3, 'other'), (4, 'other')])
def test_corner_rule(corners, expected):
    x = np.full((6, 6), -1.0)
    x[2:4, 2:4] = 5.0
    places = [(0, 0), (0, 5), (5, 0), (5, 5)][:corners]
    for p in places:
        x[p] = 4.0
    got = foreground(x)
    assert got[2, 2] == (expected == 'seed') and got[1, 1] == (expected == 'other')


def test_a_tie_goes_to_the_first_token():
    x = np.full((5, 5), -1.0)
    x[0, 2] = x[4, 2] = 3.0
    for noise in (-1e-8, 0, 1e-8):
        x[4, 2] = 3 * (1 + noise)
        assert foreground(x)[0, 2] and not foreground(x)[4, 2]


def test_a_tie_goes_to_the_piece_with_most_of_the_tied():
    x = np.full((5, 5), -1.0)
    x[0, 2] = x[4, 1] = x[4, 2] = 3.0
    for noise in (-1e-8, 0, 1e-8):
        x[0, 2] = 3 * (1 + noise)
        assert foreground(x).sum() == 2 and foreground(x)[4, 2]
    x = np.full((5, 5), -3.0)
    x[2, 2] = 3.0  # one strongest token against twenty-four as strong
    assert foreground(x).sum() == 24


def test_diagonal_neighbours_are_not_connected():
    x = np.full((5, 5), -1.0)
    x[1, 1] = 3.0
    x[2, 2] = 2.0
    assert foreground(x).sum() == 1


# --- pixels


@given(st.integers(0, 10**6), st.integers(1, 20), st.integers(1, 20), st.floats(0.1, 0.9))
@settings(max_examples=60, deadline=None)
def test_fill_holes(seed, h, w, p):
    mask = np.random.default_rng(seed).random((h, w)) < p
    assert (fill_holes(mask) == ndimage.binary_fill_holes(mask)).all()


def test_refine_without_crf_repeats_each_token():
    masks = torch.zeros(2, 3, 4, dtype=torch.bool)
    masks[0, 1, 1:3] = True
    fine, agreement = refine(np.zeros((24, 64, 3), np.uint8), masks, crf=False)
    assert fine.shape == (2, 24, 64) and fine[0].sum() == 2 * 8 * 16 and fine[0, 8:16, 16:48].all()
    assert agreement == [1.0, 0.0]  # an empty mask agrees with nothing


def test_refine_of_no_mask():
    fine, agreement = refine(np.zeros((16, 16, 3), np.uint8), torch.zeros(0, 2, 2, dtype=torch.bool), crf=True)
    assert fine.shape == (0, 16, 16) and agreement == []


def test_refine_snaps_to_the_colour_edge():
    image = np.zeros((64, 64, 3), np.uint8)
    image[20:44, 20:44] = 255
    masks = torch.zeros(1, 8, 8, dtype=torch.bool)
    masks[0, 2:6, 2:6] = True
    (fine,), (agreement,) = refine(image, masks, crf=True)
    square = image[..., 0] > 0
    assert (fine & square).sum() / (fine | square).sum() > 0.95 and 0.4 < agreement < 0.7


# --- images and data sets


class Colours(nn.Module):
    "Mean colours of 8 x 8 patches in the place of a ViT."

    patch_size = 8

    def __init__(self, gain=1.0):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain), requires_grad=False)

    def keys(self, x):
        k = nn.functional.avg_pool2d(x, 8)
        return self.gain * (k - k.mean((2, 3), keepdim=True))

    patches = keys


OPTIONS = dict(size=64, feature='keys', tau=0.2, n_masks=3, crf=True, min_agreement=0.5)


def disc_image(seed, h=50, w=70):
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:h, 0:w]
    image = np.full((h, w, 3), (40, 120, 60)) + rng.normal(0, 4, (h, w, 3))
    disc = (y - h * rng.uniform(0.35, 0.65)) ** 2 + (x - w * rng.uniform(0.35, 0.65)) ** 2 < (0.25 * h) ** 2
    image[disc] = rng.integers(0, 2, 3) * 155 + 100
    return image.clip(0, 255).astype(np.uint8)


def test_label_image_at_its_own_size():
    found = label_image(disc_image(1), Colours(), **OPTIONS)
    assert found and all(f['segmentation']['size'] == [50, 70] and 0 <= f['score'] <= 1 for f in found)
    assert decode_rle(found[0]['segmentation'])[25, 35]


@pytest.mark.parametrize(
    'image', [np.zeros((1, 1, 3), np.uint8), np.full((3, 500, 3), 255, np.uint8), disc_image(2)[:, :, :1].repeat(3, 2)]
)
def test_odd_images(image):
    for f in label_image(image, Colours(), **OPTIONS):
        assert f['segmentation']['size'] == list(image.shape[:2])


def test_disagreement_drops_a_mask():
    strict, lenient = (label_image(disc_image(1), Colours(), **OPTIONS | dict(min_agreement=a)) for a in (1.0, 0.0))
    assert len(strict) < len(lenient)


def test_score_is_the_agreement_off_the_border():
    image = disc_image(1)
    small = module.resize_image(image, (64, 64))
    keys = Colours().keys(module.normalize(to_tensor(small))[None])[0]
    _, agreement = refine(small, maskcut(keys, tau=0.2, n_masks=1), crf=True)
    (found,) = label_image(image, Colours(), **OPTIONS | dict(n_masks=1))
    mask = decode_rle(found['segmentation'])
    assert not (mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any())
    assert found['score'] == round(agreement[0], 4)


@pytest.mark.parametrize(
    'bad,message',
    [
        (dict(size=60), 'patch size 8, got 60'),
        (dict(feature='tokens'), 'tokens'),
        (dict(tau=2.0), 'got 2.0'),
        (dict(n_masks=0), 'got 0'),
        (dict(min_agreement=1.5), 'got 1.5'),
    ],
)
def test_options_are_checked_before_any_work(bad, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        label_images(
            [dict(id=1, file_name='absent.png')], None or Colours(), root=tmp_path, folder=tmp_path, **OPTIONS | bad
        )


@pytest.fixture
def folder(tmp_path):
    for i in range(7):
        write_png(tmp_path / f'{i}.png', disc_image(i))
    (tmp_path / '2.png').write_bytes(b'')
    return tmp_path, [dict(id=i + 1, file_name=f'{i}.png') for i in range(7)]


def run(folder, to='work', features=None, **kw):
    root, items = folder
    return label_images(
        items, features or Colours(), root=root, folder=root / to, shard_size=2, batch_size=2, desc='', **OPTIONS | kw
    )


def test_a_broken_file_is_named_and_the_rest_is_labelled(folder):
    coco, skipped = run(folder)
    assert [s['file_name'] for s in skipped] == ['2.png'] and skipped[0]['reason']
    assert [i['id'] for i in coco['images']] == [1, 2, 4, 5, 6, 7] and coco['images'][0]['width'] == 70
    for a in coco['annotations']:
        mask = decode_rle(a['segmentation'])
        assert a['area'] == mask.sum() and a['category_id'] == 1 and a['iscrowd'] == 0 and 0 < a['score'] <= 1
    assert [a['id'] for a in coco['annotations']] == list(range(1, len(coco['annotations']) + 1))


def test_a_replaced_image_is_labelled_anew(folder):
    first = run(folder)
    write_png(folder[0] / '4.png', disc_image(40)[::-1, :50])
    write_png(folder[0] / '2.png', disc_image(2))
    again = run(folder)
    assert again == run(folder, 'fresh')
    assert again[1] == [] and again[0]['images'][4]['width'] == 50 and first[0]['images'][3]['width'] == 70


def test_processes_change_no_byte(folder):
    alone, shared = run(folder, 'alone'), run(folder, 'shared', n_procs=2)
    assert json.dumps(alone) == json.dumps(shared) and len(list((folder[0] / 'shared').rglob('shard_*.json'))) == 4
    with pytest.raises(ValueError, match='n_procs must be 1 or more, got 0'):
        run(folder, n_procs=0)


def test_a_killed_run_goes_on_to_the_same_bytes(folder, monkeypatch):
    want = json.dumps(run(folder, 'one go'))
    calls, label = [], module._label

    def dying(*a, **kw):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return label(*a, **kw)

    monkeypatch.setattr(module, '_label', dying)
    with pytest.raises(KeyboardInterrupt):
        run(folder, 'killed')
    assert json.dumps(run(folder, 'killed')) == want
    assert len(calls) == 3 + 4 - 2  # two finished shards were not made again


def test_other_options_or_weights_start_anew(folder, monkeypatch):
    calls, label = [], module._label
    monkeypatch.setattr(module, '_label', lambda *a, **kw: calls.append(1) or label(*a, **kw))
    counts = []
    for kw in ({}, {}, dict(tau=0.3), dict(features=Colours(2.0)), {}):
        before = len(calls)
        run(folder, **kw)
        counts.append(len(calls) - before)
    assert counts == [4, 0, 4, 4, 0]


def test_digest_sees_every_weight():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).bfloat16()
    before = weights_digest(model)
    with torch.no_grad():
        model[1].bias[2] += 1
    assert weights_digest(model) != before and len(before) == 16


def test_digest_sees_how_positions_are_interpolated():
    from u2seg.features import ViTFeatures

    timm, dino = (
        ViTFeatures(dict(img_size=32, patch_size=8, embed_dim=12, depth=1, num_heads=2), interpolation=i)
        for i in ('timm', 'dino')
    )
    dino.load_state_dict(timm.state_dict())
    assert weights_digest(timm) != weights_digest(dino)


def test_the_stage_cannot_see_ground_truth():
    notebook = Path(__file__).parents[1] / 'nbs' / '24_run_maskcut.ipynb'
    code = ''.join(''.join(c['source']) for c in json.loads(notebook.read_text())['cells'] if c['cell_type'] == 'code')
    assert not any(word in code for word in ('annotations/', 'panoptic', 'data_val', '/val'))


def test_every_strange_file_is_labelled_or_named(tmp_path):
    from PIL import Image

    whole, to = Image.fromarray(disc_image(1)), tmp_path
    exif = Image.Exif()
    exif[0x0112] = 6
    whole.save(to / 'good.png')
    whole.convert('CMYK').save(to / 'cmyk.jpg')
    whole.convert('P').save(to / 'palette.png')
    whole.convert('RGBA').save(to / 'alpha.png')
    whole.save(to / 'turned.jpg', exif=exif)
    whole.resize((1, 1)).save(to / 'pixel.png')
    whole.resize((20000, 30)).save(to / 'wide.png')
    Image.fromarray(disc_image(1)[..., 0].astype(np.uint16) * 257).save(to / 'deep.png')
    Image.new('1', (20000, 20000)).save(to / 'bomb.png')
    (to / 'text.jpg').write_text('hello')
    (to / 'empty.jpg').write_bytes(b'')
    (to / 'cut.png').write_bytes((to / 'good.png').read_bytes()[:300])
    names = sorted(p.name for p in to.iterdir())
    coco, skipped = label_images(
        [dict(id=i, file_name=n) for i, n in enumerate(names, 1)],
        Colours(),
        root=to,
        folder=to / 'work',
        desc='',
        batch_size=5,
        **OPTIONS,
    )
    sizes = {im['file_name']: (im['width'], im['height']) for im in coco['images']}
    assert sorted(s['file_name'] for s in skipped) == ['bomb.png', 'cut.png', 'empty.jpg', 'text.jpg']
    assert all(s['file_name'] in s['reason'] for s in skipped)
    whole_size = {n: (70, 50) for n in ('alpha.png', 'cmyk.jpg', 'deep.png', 'good.png', 'palette.png')}
    assert sizes == whole_size | {'turned.jpg': (50, 70), 'pixel.png': (1, 1), 'wide.png': (20000, 30)}
    name_of = {im['id']: im['file_name'] for im in coco['images']}
    for a in coco['annotations']:
        assert a['segmentation']['size'] == list(sizes[name_of[a['image_id']]])[::-1]
