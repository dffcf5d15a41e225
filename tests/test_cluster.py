"Crops, embeddings and k-means against brute force, and what must not depend on order, chunks, kills or folders."

import json

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import maximum_filter
from scipy.optimize import linear_sum_assignment
from torch import nn

from u2seg import crops as crops_module
from u2seg import kmeans as kmeans_module
from u2seg.cluster import Clusters, fit_clusters, fit_pca, label_file, project
from u2seg.crops import GREY, SHAPES, crop_instances, embed_crops, embed_file, window
from u2seg.kmeans import _initial, assign, blocks, kmeans, nearest
from u2seg.masks import decode_rle, encode_rle, instances_json


def one_to_one(labels, classes):
    "Accuracy if each class may own one cluster only (the best assignment)."
    _, j = np.unique(classes, return_inverse=True)
    counts = np.histogram2d(labels, j, bins=(np.arange(max(labels) + 2), np.arange(max(j) + 2)))[0]
    return counts[linear_sum_assignment(-counts)].sum() / len(classes)


def blobs(n=300, k=6, d=5, seed=0, spread=6.0):
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, k, n)
    return (rng.normal(size=(k, d)) * spread)[truth] + rng.normal(size=(n, d)), truth


def lloyd(x, c, n_iters, cosine=False):
    "k-means as the textbook has it, in double precision."
    unit = lambda v: v / np.linalg.norm(v, axis=1, keepdims=True)
    x, c = (unit(x), c) if cosine else (x, c)
    near = lambda c: (-(x @ c.T) if cosine else ((x[:, None] - c[None]) ** 2).sum(2)).argmin(1)
    for _ in range(n_iters):
        l = near(c)
        c = np.stack([x[l == j].mean(0) for j in range(len(c))])
        if cosine:
            c = unit(c)
    return c, near(c)


@pytest.mark.parametrize('metric', ['euclidean', 'cosine'])
@pytest.mark.parametrize('n_iters', [1, 3, 100])
def test_equals_textbook(metric, n_iters):
    x, _ = blobs(spread=1.5)
    start = x[:6] / (np.linalg.norm(x[:6], axis=1, keepdims=True) if metric == 'cosine' else 1)
    c, l = kmeans(x, 6, seed=0, init=start, n_iters=n_iters, metric=metric)
    c0, l0 = lloyd(x, start, n_iters, metric == 'cosine')
    assert c.dtype == np.float32 and l.dtype == np.int64 and c.shape == (6, 5) and l.shape == (300,)
    np.testing.assert_allclose(c, c0, atol=1e-4)
    assert (l == l0).all()


def test_chunks_change_nothing(monkeypatch):
    x, _ = blobs(spread=2.0)
    c, l = kmeans(x, 8, seed=3, init='k-means++')
    sizes = []

    def small_blocks(x, metric='euclidean'):
        for i, rows in blocks(x, metric, size=37):
            sizes.append(len(rows))
            yield i, rows

    monkeypatch.setattr(kmeans_module, 'blocks', small_blocks)
    assert (assign(x, c) == l).all()
    assert (kmeans(x, 8, seed=3, init='k-means++')[1] == l).all()
    assert set(sizes) == {37, 300 % 37}  # the small blocks were really used
    np.testing.assert_allclose(kmeans(x, 6, seed=0, init=x[:6], n_iters=4)[0], lloyd(x, x[:6], 4)[0], atol=1e-4)


@pytest.mark.parametrize('init', ['random', 'k-means++'])
@pytest.mark.parametrize('metric', ['euclidean', 'cosine'])
def test_finds_blobs_and_repeats_itself(init, metric):
    x, truth = blobs(n=600, k=6, d=16)
    c, l = kmeans(x, 6, seed=0, init=init, n_init=10, metric=metric)
    assert one_to_one(l, truth) > 0.97
    c2, l2 = kmeans(x.astype(np.float32), 6, seed=0, init=init, n_init=10, metric=metric)
    assert c.tobytes() == c2.tobytes() and (l == l2).all()
    assert c.tobytes() != kmeans(x, 6, seed=1, init=init, metric=metric)[0].tobytes()
    assert (kmeans(torch.from_numpy(x), 6, seed=0, init=init, n_init=10, metric=metric)[1] == l).all()


def test_order_of_rows_is_only_a_name():
    "From the same centroids, permuted rows give permuted labels."
    x, _ = blobs(spread=2.0)
    p = np.random.default_rng(1).permutation(len(x))
    c, l = kmeans(x, 7, seed=0, init=x[:7])
    c2, l2 = kmeans(x[p], 7, seed=0, init=x[:7])
    np.testing.assert_allclose(c, c2, atol=1e-5)
    assert (l[p] == l2).all()


def test_restarts_help():
    x, _ = blobs(n=400, k=12, d=8, spread=4.0)
    inertia = lambda r: ((x - r[0][r[1]]) ** 2).sum()
    one = [inertia(kmeans(x, 12, seed=0, n_init=n)) for n in (1, 4, 12)]
    assert one[0] >= one[1] >= one[2] and one[2] < one[0]


def test_plus_plus_starts_better():
    x, _ = blobs(n=900, k=30, d=4, spread=30.0)
    inertia = lambda init, s: (nearest(x, _initial(x, 30, init, np.random.default_rng(s), 'euclidean'))[1]).sum()
    assert np.median([inertia('k-means++', s) for s in range(7)]) < 0.5 * np.median(
        [inertia('random', s) for s in range(7)]
    )


@pytest.mark.parametrize('metric', ['euclidean', 'cosine'])
def test_no_cluster_stays_empty(metric):
    x, _ = blobs(n=200, k=4)
    start = np.repeat(x[:1], 9, 0)  # nine times the same centroid: eight are empty at once
    c, l = kmeans(x, 9, seed=0, init=start / np.linalg.norm(start, axis=1, keepdims=True), metric=metric)
    assert np.isfinite(c).all() and (np.bincount(l, minlength=9) > 0).all()


@pytest.mark.parametrize('init', ['random', 'k-means++'])
def test_fewer_different_rows_than_clusters(init):
    x = np.repeat(np.eye(3), 10, 0)
    c, l = kmeans(x, 7, seed=0, init=init)
    assert np.isfinite(c).all() and c.shape == (7, 3)
    assert all(len(set(l[i : i + 10])) == 1 for i in (0, 10, 20))  # equal rows stay together
    np.testing.assert_allclose(c[l], x, atol=1e-6)


def test_as_many_clusters_as_rows_and_one():
    x, _ = blobs(n=20)
    assert sorted(kmeans(x, 20, seed=0)[1]) == list(range(20))
    c, l = kmeans(x, 1, seed=0)
    np.testing.assert_allclose(c[0], x.mean(0), atol=1e-5)
    assert not l.any()


@pytest.mark.parametrize(
    'call, words',
    [
        (lambda x: kmeans(x, 21, seed=0), 'k must lie in 1 ... 20, the number of rows, got 21'),
        (lambda x: kmeans(x, 0, seed=0), 'got 0'),
        (
            lambda x: kmeans(np.where(np.arange(20)[:, None] == 7, np.nan, x), 3, seed=0),
            'NaN or infinite values, first in row 7',
        ),
        (lambda x: kmeans(np.where(np.arange(20)[:, None] == 0, np.inf, x), 3, seed=0), 'first in row 0'),
        (lambda x: assign(x * np.nan, x), 'NaN'),
        (lambda x: kmeans(x[:0], 1, seed=0), r'x must be \[n, d\]'),
        (lambda x: kmeans(x[0], 1, seed=0), r'x must be \[n, d\]'),
        (lambda x: kmeans(x, 3, seed=0, init='best'), "init must be one of random, k-means"),
        (lambda x: kmeans(x, 3, seed=0, metric='l1'), "metric must be one of"),
        (lambda x: kmeans(x, 3, seed=0, n_iters=0), 'n_iters'),
        (lambda x: kmeans(x, 3, seed=0, init=x[:2]), r'init must be \[3, 5\]'),
        (lambda x: assign(x, x[:, :2]), 'must have one d'),
        (lambda x: fit_pca(x, 6, whiten=False), 'pca must lie in 1 ... 5'),
        (lambda x: fit_pca(x, 0, whiten=False), 'pca must'),
        (lambda x: window([0, 0, 4, 4], margin=-1, shape='square'), 'margin'),
        (lambda x: window([0, 0, 4, 4], margin=0, shape='round'), 'shape must be one of'),
    ],
)
def test_errors(call, words):
    with pytest.raises(ValueError, match=words):
        call(blobs(n=20)[0])


def test_memory_map(tmp_path):
    x = blobs()[0].astype(np.float32)
    np.save(tmp_path / 'x.npy', x)
    assert (
        kmeans(np.load(tmp_path / 'x.npy', mmap_mode='r'), 5, seed=0, init='k-means++')[1]
        == kmeans(x, 5, seed=0, init='k-means++')[1]
    ).all()


def test_pca_from_its_definition():
    x, _ = blobs(n=400, d=7)
    mean, components = fit_pca(x, 3, whiten=False)
    _, s, v = np.linalg.svd(x - x.mean(0), full_matrices=False)
    np.testing.assert_allclose(mean, x.mean(0), atol=1e-5)
    np.testing.assert_allclose(np.abs((components * v[:3]).sum(1)), 1, atol=1e-4)
    assert (np.take_along_axis(components, np.abs(components).argmax(1)[:, None], 1) > 0).all()
    white = project(x, l2=False, mean=mean, components=fit_pca(x, 3, whiten=True)[1])
    np.testing.assert_allclose(np.cov(white.T, bias=True), np.eye(3), atol=1e-4)
    z = project(x, l2=True, mean=mean, components=components)
    np.testing.assert_allclose((z**2).sum(1), 1, atol=1e-5)
    assert project(x, l2=False) is x and project(x[:0], l2=True).shape == (0, 7)


# --- crops and embeddings


def scene(h=40, w=50):
    rng = np.random.default_rng(0)
    masks = np.zeros((3, h, w), bool)
    masks[0, 5:15, 8:28] = masks[1, 20:40, 0:6] = masks[2, 30, 45] = True  # wide; at the border; one pixel
    return rng.integers(0, 256, (h, w, 3), dtype=np.uint8), masks


def test_window():
    assert window([10, 20, 30, 10], margin=0, shape='square') == (10, 10, 40, 40)
    assert window([10, 20, 30, 10], margin=0.1, shape='square') == (7, 7, 43, 43)
    assert window([10, 20, 30, 10], margin=0.1, shape='stretch') == (7, 17, 43, 33)
    assert window([10, 20, 30, 10], margin=0, shape='center') == (20, 20, 30, 30)


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('margin', [0, 0.3, 3])
def test_crops_are_the_window(shape, margin):
    "Against a crop of an image that is padded first."
    image, masks = scene()
    crops, covers = crop_instances(image, masks, crop_size=32, margin=margin, shape=shape, fill_background=False)
    assert crops.dtype == covers.dtype == np.uint8 and crops.shape == (3, 32, 32, 3) and covers.shape == (3, 32, 32)
    far = 200
    wide, wide_masks = np.full((40 + 2 * far, 50 + 2 * far, 3), GREY), np.pad(masks, ((0, 0), (far, far), (far, far)))
    wide[far:-far, far:-far] = image
    for crop, cover, mask in zip(crops, covers, wide_masks):
        ys, xs = np.nonzero(mask)
        x0, y0, x1, y1 = window([xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1], margin=margin, shape=shape)
        small = lambda a: np.array(Image.fromarray(a[y0:y1, x0:x1]).resize((32, 32), Image.BICUBIC))
        assert (crop == small(wide)).all() and (cover == small(mask.astype(np.uint8) * 255)).all()


def test_background_is_filled():
    image, masks = scene()
    crops, covers = crop_instances(image, masks[:2], crop_size=64, margin=0.2, shape='stretch', fill_background=True)
    away = maximum_filter(covers, (1, 9, 9)) == 0
    assert away.any() and (crops[away] == GREY).all() and (crops[covers == 255] != GREY).any(-1).mean() > 0.9
    other = np.where(masks[0, ..., None], image, 7).astype(np.uint8)  # what lies outside is not seen
    assert (
        crop_instances(other, masks[:1], crop_size=64, margin=0.2, shape='stretch', fill_background=True)[0]
        == crops[:1]
    ).all()


def test_crop_errors():
    image, masks = scene()
    with pytest.raises(ValueError, match='empty'):
        crop_instances(image, masks & False, crop_size=8, margin=0, shape='square', fill_background=False)
    with pytest.raises(ValueError, match='to fit the image'):
        crop_instances(image, masks[:, :9], crop_size=8, margin=0, shape='square', fill_background=False)
    assert crop_instances(image, masks[:0], crop_size=8, margin=0, shape='square', fill_background=False)[0].shape == (
        0,
        8,
        8,
        3,
    )


class Pooled(nn.Module):
    "Stands in for a ViT: a patch's token is its mean colour and its place."

    dim, patch_size = 5, 8

    def __init__(self):
        super().__init__()
        self.one = nn.Parameter(torch.ones(1))

    def patches(self, x):
        p = torch.nn.functional.avg_pool2d(x, 8)
        y, z = torch.meshgrid(torch.arange(float(p.shape[2])), torch.arange(float(p.shape[3])), indexing='ij')
        return torch.cat([p, torch.stack([y, z]).expand(len(x), -1, -1, -1)], 1)

    def keys(self, x):
        return -self.patches(x)

    def cls(self, x):
        return self.patches(x).mean((2, 3))


def test_embeddings_average_over_the_mask():
    image, masks = scene()
    crops, covers = crop_instances(image, masks[:2], crop_size=32, margin=0.2, shape='stretch', fill_background=False)
    got = embed_crops(Pooled(), crops, covers, embedding='mask_mean', batch_size=1)
    weight = covers.reshape(2, 4, 8, 4, 8).mean((2, 4)) / 255
    place = np.arange(4)
    np.testing.assert_allclose(got[:, 3], (weight.sum(2) * place).sum(1) / weight.sum((1, 2)), atol=1e-3)
    np.testing.assert_allclose(got[:, 4], (weight.sum(1) * place).sum(1) / weight.sum((1, 2)), atol=1e-3)
    np.testing.assert_allclose(embed_crops(Pooled(), crops, covers, embedding='mask_keys'), -got, atol=1e-5)
    np.testing.assert_allclose(embed_crops(Pooled(), crops, covers, embedding='cls')[:, 3:], 1.5, atol=1e-5)
    assert np.isfinite(
        embed_crops(Pooled(), crops, covers * 0, embedding='mask_mean')
    ).all()  # a mask lost in the resize: all tokens count
    assert embed_crops(Pooled(), crops[:0], covers[:0], embedding='cls').shape == (0, 5)
    with pytest.raises(ValueError, match='embedding must be one of'):
        embed_crops(Pooled(), crops, covers, embedding='best')


how = dict(embedding='mask_mean', crop_size=32, margin=0.1, shape='square', fill_background=False)


def folder_of_pictures(folder, n=11):
    "Red, green and blue squares on grey; image 4 is broken, image 6 has no instance."
    rng, images, annotations = np.random.default_rng(0), [], []
    for i in range(1, n + 1):
        image, masks = np.full((60, 60, 3), 90, np.uint8) + rng.integers(0, 20, (60, 60, 3), dtype=np.uint8), []
        for j, c in enumerate(rng.integers(0, 3, 0 if i == 6 else 1 + i % 3)):
            m = np.zeros((60, 60), bool)
            m[4 + 18 * j : 18 + 18 * j, 10:30] = True
            image[m] = np.eye(3, dtype=np.uint8)[c] * 200 + 20
            annotations.append(dict(image_id=i, category_id=1, score=0.9, colour=int(c), segmentation=encode_rle(m)))
        Image.fromarray(image).save(folder / f'{i:03d}.png')
        images.append(dict(id=i, file_name=f'{i:03d}.png', width=60, height=60))
    (folder / '004.png').write_bytes(b'not a picture')
    return instances_json(images, annotations, [dict(id=1, name='object')])


def test_a_replaced_image_is_embedded_anew(tmp_path):
    coco, rows = folder_of_pictures(tmp_path), []
    for _ in range(2):
        kept, _ = embed_file(
            Pooled(), coco, tmp_path, tmp_path / 'x.npy', **how, folder=tmp_path / 'work', shard_size=3
        )
        rows.append(np.load(tmp_path / 'x.npy'))
        Image.fromarray(np.asarray(Image.open(tmp_path / '002.png'))[..., ::-1] // 2).save(tmp_path / '002.png')
    changed = np.abs(rows[0] - rows[1]).max(1) > 1e-3
    assert changed.any() and all(a['image_id'] == 2 for a, c in zip(kept, changed) if c)


def test_file_of_instances(tmp_path):
    coco = folder_of_pictures(tmp_path)
    kept, skipped = embed_file(
        Pooled(), coco, tmp_path, tmp_path / 'x.npy', **how, folder=tmp_path / 'work', shard_size=3
    )
    x = np.load(tmp_path / 'x.npy')
    assert [s['file_name'] for s in skipped] == ['004.png'] and 'not a readable image' in skipped[0]['reason']
    assert [a['id'] for a in kept] == [a['id'] for a in coco['annotations'] if a['image_id'] != 4] and len(x) == len(
        kept
    )
    one, _ = embed_file(Pooled(), coco, tmp_path, tmp_path / 'y.npy', **how, folder=tmp_path / 'work2')
    np.testing.assert_allclose(np.load(tmp_path / 'y.npy'), x, atol=1e-6)  # shards change nothing
    clusters, labels = fit_clusters(
        x, how, k=3, l2=False, pca=0, whiten=False, metric='euclidean', n_iters=100, init='k-means++', n_init=5, seed=0
    )
    assert one_to_one(labels, [a['colour'] for a in kept]) == 1


def test_killed_and_resumed(tmp_path, monkeypatch):
    coco, done = folder_of_pictures(tmp_path), []
    embed_file(Pooled(), coco, tmp_path, tmp_path / 'whole.npy', **how, folder=tmp_path / 'a', shard_size=2)
    real = crops_module.embed_crops

    def dies(*a, **kw):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(1)
        return real(*a, **kw)

    monkeypatch.setattr(crops_module, 'embed_crops', dies)
    with pytest.raises(KeyboardInterrupt):
        embed_file(Pooled(), coco, tmp_path, tmp_path / 'x.npy', **how, folder=tmp_path / 'b', shard_size=2)
    assert not (tmp_path / 'x.npy').exists()
    monkeypatch.setattr(crops_module, 'embed_crops', lambda *a, **kw: done.append(1) or real(*a, **kw))
    embed_file(Pooled(), coco, tmp_path, tmp_path / 'x.npy', **how, folder=tmp_path / 'b', shard_size=2)
    assert len(done) == 5 and (tmp_path / 'x.npy').read_bytes() == (tmp_path / 'whole.npy').read_bytes()
    embed_file(
        Pooled(), coco, tmp_path, tmp_path / 'z.npy', **{**how, 'margin': 1.0}, folder=tmp_path / 'b', shard_size=2
    )
    embed_file(Pooled(), coco, tmp_path, tmp_path / 'x2.npy', **how, folder=tmp_path / 'b', shard_size=2)
    assert (
        (tmp_path / 'x2.npy').read_bytes() == (tmp_path / 'whole.npy').read_bytes() != (tmp_path / 'z.npy').read_bytes()
    )  # rows of other options are not mixed in


@pytest.mark.parametrize(
    'options', [dict(pca=0), dict(pca=3), dict(pca=2, whiten=True, metric='cosine'), dict(l2=False)]
)
def test_saved_clusters_assign_the_same(tmp_path, options):
    coco = folder_of_pictures(tmp_path)
    kept, _ = embed_file(Pooled(), coco, tmp_path, tmp_path / 'x.npy', **how, folder=tmp_path / 'work')
    x = np.load(tmp_path / 'x.npy')
    clusters, labels = fit_clusters(
        x,
        how,
        **{
            **dict(k=4, l2=True, pca=0, whiten=False, metric='euclidean', n_iters=100, init='random', n_init=2, seed=0),
            **options,
        },
    )
    clusters.save(tmp_path / 'out')
    again = Clusters.from_folder(tmp_path / 'out')
    assert (again.assign(x) == labels).all() and again.recipe == clusters.recipe
    out, _ = label_file(again, Pooled(), coco, tmp_path, folder=tmp_path / 'new')
    assert [a['category_id'] - 1 for a in out['annotations']] == labels.tolist() and [
        c['id'] for c in out['categories']
    ] == [1, 2, 3, 4]
    image = np.array(Image.open(tmp_path / '001.png'))
    mine = [decode_rle(a['segmentation']) for a in kept if a['image_id'] == 1]
    assert (again.label(Pooled(), image, np.stack(mine)) == labels[: len(mine)]).all()


def test_an_unreadable_image_is_left_out_and_named(tmp_path):
    coco = folder_of_pictures(tmp_path)
    clusters, _ = fit_clusters(
        blobs()[0][:, :5],
        how,
        k=2,
        l2=False,
        pca=0,
        whiten=False,
        metric='euclidean',
        n_iters=9,
        init='random',
        n_init=1,
        seed=0,
    )
    (tmp_path / coco['images'][0]['file_name']).write_bytes(b'')
    out, skipped = label_file(clusters, Pooled(), coco, tmp_path, folder=tmp_path / 'work')
    bad = coco['images'][0]['id']
    assert (
        coco['images'][0]['file_name'] in [s['file_name'] for s in skipped]
        and bad not in {i['id'] for i in out['images']} | {a['image_id'] for a in out['annotations']}
        and out['annotations']
    )


def test_no_instances_at_all(tmp_path):
    coco = dict(folder_of_pictures(tmp_path), annotations=[])
    kept, skipped = embed_file(Pooled(), coco, tmp_path, tmp_path / 'x.npy', **how, folder=tmp_path / 'work')
    assert kept == skipped == [] and np.load(tmp_path / 'x.npy').shape == (0, 5)
    with pytest.raises(ValueError, match='must be'):
        fit_clusters(
            np.load(tmp_path / 'x.npy'),
            how,
            k=2,
            l2=False,
            pca=0,
            whiten=False,
            metric='euclidean',
            n_iters=9,
            init='random',
            n_init=1,
            seed=0,
        )


def test_broken_folder(tmp_path):
    x, _ = blobs()
    clusters, _ = fit_clusters(
        x, how, k=4, l2=True, pca=2, whiten=False, metric='euclidean', n_iters=9, init='random', n_init=1, seed=0
    )
    clusters.save(tmp_path)
    (tmp_path / 'pca.npz').unlink()
    with pytest.raises(ValueError, match='not a folder of clusters'):
        Clusters.from_folder(tmp_path)
    clusters.save(tmp_path)
    np.save(tmp_path / 'centroids.npy', clusters.centroids[:2])
    with pytest.raises(ValueError, match='4 clusters'):
        Clusters.from_folder(tmp_path)
    with pytest.raises(ValueError, match='no such file'):
        Clusters.from_folder(tmp_path / 'nowhere')
    assert json.loads((tmp_path / 'clusters.json').read_text())['k'] == 4
