"The embedded scenes: determinism, truth against brute force, independence of size, count and workers."

import colorsys
from pathlib import Path
import numpy as np
import pytest
from u2seg.images import read_image, read_json
from u2seg.masks import read_ids
from u2seg.scenes import draw_dataset, draw_images, draw_scene, places, truth
from u2seg.textures import KINDS, SPLITS, STUFF, THINGS, hsv, tile
from u2seg.things import disc, palette, polygon

N_THINGS = len(THINGS)


@pytest.fixture(scope='module')
def drawn():
    return {kind: [draw_scene([5, k, i], kind) for i in range(90)] for k, kind in enumerate(KINDS)}


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data')
    draw_dataset(folder, seed=3, n_train=5, n_val=2, n_workers=2)
    return folder


def test_same_bytes_for_other_counts_and_workers(root, tmp_path):
    draw_dataset(tmp_path, seed=3, n_train=3, n_val=1, n_workers=1)
    files = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob('*') if p.suffix in ('.jpg', '.png'))
    assert len(files) == 2 * 2 * (3 + 1)
    for f in files:
        assert (tmp_path / f).read_bytes() == (root / f).read_bytes(), f
    draw_dataset(tmp_path / 'other', seed=4, n_train=1, n_val=0, kinds=('objects',))
    assert (tmp_path / 'other/objects/train/000001.jpg').read_bytes() != (
        root / 'objects/train/000001.jpg'
    ).read_bytes()


def test_again_the_same_json(root, tmp_path):
    draw_dataset(tmp_path, seed=3, n_train=5, n_val=2, kinds=('scenes',))
    for split in SPLITS:
        name = f'scenes/annotations/panoptic_{split}.json'
        assert (tmp_path / name).read_bytes() == (root / name).read_bytes()


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('split', SPLITS)
def test_json_and_png_tell_the_same(root, kind, split):
    coco, folder = (
        read_json(root / kind / f'annotations/panoptic_{split}.json'),
        root / kind / f'annotations/panoptic_{split}',
    )
    assert {im['file_name'] for im in coco['images']} == {p.name for p in (root / kind / split).iterdir()}
    assert {an['file_name'] for an in coco['annotations']} == {p.name for p in folder.iterdir()}
    assert (
        [im['id'] for im in coco['images']]
        == [an['image_id'] for an in coco['annotations']]
        == list(range(1, len(coco['images']) + 1))
    )
    assert [(c['id'], c['name'], c['isthing']) for c in coco['categories']] == [
        (i + 1, n, int(i < N_THINGS)) for i, n in enumerate(THINGS + STUFF)
    ]
    for im, an in zip(coco['images'], coco['annotations']):
        assert Path(im['file_name']).stem == Path(an['file_name']).stem
        ids, picture = read_ids(folder / an['file_name']), read_image(root / kind / split / im['file_name'])
        assert ids.shape == picture.shape[:2] == (im['height'], im['width'])
        check_segments(ids, an['segments_info'])


def check_segments(ids, segments):
    "Areas and boxes by a loop over the pixels; ids both ways; stuff once a class."
    found = {}
    for y, row in enumerate(ids.tolist()):
        for x, i in enumerate(row):
            a, x0, y0, x1, y1 = found.get(i, (0, x, y, x, y))
            found[i] = a + 1, min(x0, x), min(y0, y), max(x1, x), max(y1, y)
    found.pop(0, None)
    assert set(found) == {s['id'] for s in segments} and len(found) == len(segments)
    for s in segments:
        a, x0, y0, x1, y1 = found[s['id']]
        assert (s['area'], s['bbox']) == (a, [x0, y0, x1 - x0 + 1, y1 - y0 + 1])
        assert s['iscrowd'] == 0 and 1 <= s['category_id'] <= len(THINGS + STUFF)
        assert a >= (0.0025 if s['category_id'] <= N_THINGS else 0.004) * ids.size
    stuff = [s['category_id'] for s in segments if s['category_id'] > N_THINGS]
    assert len(stuff) == len(set(stuff))


def test_truth_of_fresh_scenes(drawn):
    for kind in KINDS:
        for image, ids, segments in drawn[kind][:12]:
            assert image.shape == (128, 128, 3) and image.dtype == np.uint8 and ids.dtype == np.int32
            check_segments(ids, segments)


def test_truth_lies_on_the_image(drawn):
    "Colour steps across the outline of a mask, and does not across the same outline turned over."

    def step(image, mask):
        inner = mask & np.roll(mask, 3, 0) & np.roll(mask, -3, 0) & np.roll(mask, 3, 1) & np.roll(mask, -3, 1)
        outer = mask | np.roll(mask, 3, 0) | np.roll(mask, -3, 0) | np.roll(mask, 3, 1) | np.roll(mask, -3, 1)
        return np.abs(image[mask & ~inner].mean(0) - image[outer & ~mask].mean(0)).mean()

    right, turned = [], []
    for image, ids, segments in drawn['objects'][:40]:
        for s in segments:
            mask = ids == s['id']
            if s['category_id'] <= N_THINGS:
                right.append(step(image, mask))
                turned.append(step(image, mask.T.copy()))
    assert np.mean(right) > 2 * np.mean(turned)


def test_stuff_lies_on_the_image(drawn):
    "Sky above the rest; water bluer than red, grass greener than blue."
    found = {'sky': [], 'water': [], 'grass': []}
    for image, ids, segments in drawn['scenes']:
        for s in segments:
            name, pixels = (THINGS + STUFF)[s['category_id'] - 1], image[ids == s['id']].mean(0)
            if name == 'sky':
                found[name].append(np.nonzero(ids == s['id'])[0].mean() < np.nonzero(ids != s['id'])[0].mean())
            if name == 'water':
                found[name].append(pixels[2] > pixels[0])
            if name == 'grass':
                found[name].append(pixels[1] > pixels[2])
    assert all(len(v) > 20 and np.mean(v) > 0.97 for v in found.values()), {k: np.mean(v) for k, v in found.items()}


@pytest.mark.parametrize('kind', KINDS)
def test_size_changes_sampling_only(kind):
    same = []
    for seed in range(5):
        small, large = draw_scene([8, seed], kind, 128), draw_scene([8, seed], kind, 256)
        assert large[0].shape == (256, 256, 3)
        assert [s['category_id'] for s in small[2]] == [s['category_id'] for s in large[2]]
        blocks = large[1].reshape(128, 2, 128, 2)
        same.append((small[1][:, None, :, None] == blocks).any((1, 3)).mean())  # outlines apart
    assert np.median(same) > 0.985 and min(same) > 0.9, same  # a redrawn palette may change a pose


def test_images_stream():
    images = draw_images(6, 5, 'objects', 1, size=64)
    assert images.shape == (5, 64, 64, 3) and images.dtype == np.uint8
    assert (images == draw_images(6, 5, 'objects', 2, size=64)).all()
    assert (images[:2] == draw_images(6, 2, 'objects', 1, size=64)).all()
    assert (images != draw_images(6, 5, 'scenes', 1, size=64)).any((1, 2, 3)).all()
    for split in range(len(SPLITS)):  # the stream is apart from train and val
        for i in range(2):
            assert (images[i] != draw_scene(np.random.SeedSequence((6, 0, split, i)), 'objects', 64)[0]).any()


def test_categories_are_balanced(drawn):
    counts = {
        kind: np.bincount([s['category_id'] for _, _, ss in drawn[kind] for s in ss], minlength=15)[1:]
        for kind in KINDS
    }
    total = sum(counts.values())
    assert (total > 0).all()  # all 14 occur
    things = total[:N_THINGS]
    chi2 = ((things - things.mean()) ** 2 / things.mean()).sum()
    assert chi2 < 24.3, (dict(zip(THINGS, things)), chi2)  # p = .001 at 7 degrees of freedom
    assert counts['objects'][N_THINGS:].min() > 3 and counts['scenes'][N_THINGS:].min() > 10


def test_kinds_differ_as_documented(drawn):
    n_stuff = {k: np.array([sum(s['category_id'] > N_THINGS for s in ss) for *_, ss in drawn[k]]) for k in KINDS}
    n_things = {k: np.array([sum(s['category_id'] <= N_THINGS for s in ss) for *_, ss in drawn[k]]) for k in KINDS}
    assert 0.75 < (n_stuff['objects'] == 1).mean() < 0.97 and n_stuff['objects'].max() == 2
    assert n_stuff['scenes'].min() >= 1 and 2.3 < n_stuff['scenes'].mean() < 3.2 and n_stuff['scenes'].max() <= 4
    assert set(n_things['objects']) == {1, 2, 3} and n_things['scenes'].max() == 5


def test_objects_keep_apart():
    for seed in range(200):
        spots = places(np.random.default_rng(seed), 'objects', 0.0)
        assert 1 <= len(spots) <= 3
        for i, (_, x, y, r) in enumerate(spots):
            assert 0.1 <= x <= 0.9 and 0.1 <= y <= 0.9 and 0.17 <= r <= 0.34
            for _, a, b, q in spots[:i]:
                assert np.hypot(x - a, y - b) > r + q


def test_truth_makes_small_segments_void():
    ids = np.full((40, 50), 1, np.int32)
    ids[:1, :4] = 2
    ids[5, :5] = 3
    ids[10:12, :3] = 4
    ids[20, :8] = 5  # of 2000 px: 4 < 5 = .25 %, 6 < 8 = .4 %
    out, segments = truth(ids, ['sky', 'ball', 'duck', 'sand', 'grass', 'car'])
    assert [(THINGS + STUFF)[s['category_id'] - 1] for s in segments] == ['sky', 'duck', 'grass']
    assert [s['id'] for s in segments] == [1, 2, 3] and segments[1]['bbox'] == [0, 5, 5, 1]
    assert (out[:1, :4] == 0).all() and (out[10:12, :3] == 0).all() and (out == 0).sum() == 10
    check_segments(out, segments)
    out, segments = truth(np.zeros((8, 8), np.int32), [])
    assert not out.any() and segments == []


def test_shapes_against_brute_force():
    v, u = np.mgrid[-1:1:41j, -1:1:41j] + 0.0123
    corners = (-0.7, -0.6), (0.5, -0.8), (0.1, 0.0), (0.8, 0.7), (-0.4, 0.5)

    def winding(px, py):
        "Inside by the sum of the angles under which the edges are seen."
        z = [complex(x - px, y - py) for x, y in corners]
        return abs(sum(np.angle(b / a) for a, b in zip(z, z[1:] + z[:1]))) > np.pi

    assert (polygon(u, v, *corners) == np.vectorize(winding)(u, v)).all()
    inside = disc(u, v, 0.1, -0.2, 0.7, 0.3, 0.5)
    t = np.linspace(0, 2 * np.pi, 100)
    for k, want in ((0.97, True), (1.03, False)):
        x, y = k * 0.7 * np.cos(t), k * 0.3 * np.sin(t)
        assert (
            disc(
                0.1 + np.cos(0.5) * x - np.sin(0.5) * y,
                -0.2 + np.sin(0.5) * x + np.cos(0.5) * y,
                0.1,
                -0.2,
                0.7,
                0.3,
                0.5,
            )
            == want
        ).all()
    assert abs(inside.sum() * (2 / 40) ** 2 - np.pi * 0.7 * 0.3) < 0.03


def test_hsv_against_the_standard_library():
    rng = np.random.default_rng(0)
    for h, s, v in rng.random((50, 3)):
        np.testing.assert_allclose(hsv(h, s, v), colorsys.hsv_to_rgb(h, s, v), atol=1e-5)


def test_tile_is_standard_and_periodic():
    n = tile(np.random.default_rng(0), 3, f0=2)
    assert abs(n.mean()) < 1e-5 and abs(n.std() - 1) < 1e-5 and n.dtype == np.float32
    seam, inner = np.abs(n[0] - n[-1]).mean(), np.abs(n[1:] - n[:-1]).mean()
    assert seam < 1.5 * inner
    streaks = tile(np.random.default_rng(0), 2, sx=4)
    assert np.abs(np.diff(streaks, axis=1)).mean() < 0.7 * np.abs(np.diff(streaks, axis=0)).mean()  # long along x


def test_palette_keeps_off_the_background():
    rng, grey = np.random.default_rng(0), np.full(3, 0.5)
    near = [np.abs(palette(rng, grey)[0] - grey).mean() < 0.22 for _ in range(300)]
    assert np.mean(near) < 0.1


def test_wrong_arguments_are_named(tmp_path):
    with pytest.raises(ValueError, match="kind must be one of .*'photos'"):
        draw_scene(0, 'photos')
    with pytest.raises(ValueError, match='size must be at least 32, got 8'):
        draw_scene(0, size=8)
    with pytest.raises(ValueError, match="'photos'"):
        draw_images(0, 1, 'photos', 1)
    with pytest.raises(ValueError, match='n_workers must be at least 1, got 0'):
        draw_images(0, 1, 'objects', 0)
    with pytest.raises(ValueError, match="photos"):
        draw_dataset(tmp_path, seed=0, n_train=1, n_val=1, kinds=('photos',))


@pytest.mark.parametrize('kind', KINDS)
def test_embedded_data_can_be_drawn_again(kind):
    folder = Path(__file__).parents[1] / 'data' / 'embedded' / kind
    if not folder.is_dir():
        pytest.skip(f'{folder} is absent: dvc pull data.dvc')
    for k, split in enumerate(SPLITS):
        coco = read_json(folder / f'annotations/panoptic_{split}.json')
        assert len(coco['images']) == len(coco['annotations']) == (1000, 200)[k]
        for i in (0, len(coco['images']) - 1):
            image, ids, segments = draw_scene(np.random.SeedSequence((0, KINDS.index(kind), k, i)), kind)
            assert (
                read_ids(folder / f'annotations/panoptic_{split}/{i + 1:06d}.png') == ids
            ).mean() > 0.999  # another CPU may round an outline otherwise
            assert np.abs(read_image(folder / f'{split}/{i + 1:06d}.jpg').astype(int) - image).mean() < 6  # JPEG
            assert [s['category_id'] for s in coco['annotations'][i]['segments_info']] == [
                s['category_id'] for s in segments
            ]
