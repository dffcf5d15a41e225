"""What an image gives does not depend on the images beside it: alone, together, in another order, in other
batches, the same bytes."""

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image

from common import PREDICTS
from u2seg.crops import EMBEDDINGS, embed_crops
from u2seg.kmeans import assign
from u2seg.baselines import model_predictions
from u2seg.features import ViTFeatures
from u2seg.images import write_png
from u2seg.labeller import Head, Labeller, extractor
from u2seg.semantic import patch_codes, segment
from u2seg.maskcut import label_images
from u2seg.checkpoints import save_weights
from u2seg.model import build_model
from u2seg.folder import predict_folder
from u2seg.predict import U2Seg
from u2seg.selftrain import detect

NETWORK = dict(PREDICTS, n_stuff=3, score_threshold=0.0, panoptic_score=0.0)
SIZES = [(48, 64), (64, 48), (30, 120), (48, 64), (128, 40), (64, 64), (20, 25), (96, 70), (48, 64)]


def digest(x) -> str:
    "Of nested dicts, lists, arrays and numbers."

    def parts(x):
        if isinstance(x, dict):
            return [p for k in sorted(x) for p in (str(k), *parts(x[k]))]
        if isinstance(x, (list, tuple)):
            return [str(len(x)), *(p for v in x for p in parts(v))]
        x = np.asarray(x.cpu() if isinstance(x, torch.Tensor) else x)
        return [str(x.dtype), str(x.shape), x.tobytes().hex()]

    return hashlib.sha256('|'.join(parts(x)).encode()).hexdigest()


def independent(run, items, sizes=(2, 16)):
    "`run(items, batch_size)` gives one result an item, the same in any company; and not the same for all."
    alone = [digest(run([x], 1)[0]) for x in items]
    assert len(set(alone)) > len(items) / 2
    order = np.random.default_rng(0).permutation(len(items)).tolist()
    for b in sizes:
        assert [digest(r) for r in run(items, b)] == alone, f'batches of {b}'
        assert [digest(r) for r in run([items[i] for i in order], b)] == [alone[i] for i in order], (
            f'another order, batches of {b}'
        )
        assert [digest(r) for r in run(items[:3], b)] == alone[:3], f'fewer, batches of {b}'


@pytest.fixture(scope='module')
def images():
    "Smooth blobs of colour, so that detections differ."
    rng = np.random.default_rng(1)
    return [
        np.kron(rng.integers(0, 256, (-(-h // 8), -(-w // 8), 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))[:h, :w]
        for h, w in SIZES
    ]


@pytest.fixture(scope='module')
def folder(images, tmp_path_factory):
    root = tmp_path_factory.mktemp('images')
    for i, im in enumerate(images, 1):
        write_png(root / f'{i}.png', im)
    return root


@pytest.fixture(scope='module')
def items(images):
    return [dict(id=i, file_name=f'{i}.png') for i in range(1, len(images) + 1)]


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp('model') / 'model.safetensors'
    torch.manual_seed(0)
    save_weights(build_model(NETWORK), path)
    return path


@pytest.fixture(scope='module')
def student(weights):
    return U2Seg.from_pretrained(weights, device='cpu')


def test_network(student, images):
    def run(images, batch_size):
        with torch.inference_mode():
            return student.model([torch.from_numpy(im).permute(2, 0, 1) for im in images])

    independent(run, [im for im in images if min(im.shape[:2]) > 32], [1])


def test_predict(student, images):
    run = lambda images, b: [
        dict(
            boxes=p.boxes,
            scores=p.scores,
            categories=p.categories,
            masks=p.masks,
            semantic=p.semantic,
            ids=p.ids,
            segments=[s['area'] for s in p.segments],
        )
        for p in student.predict(images, batch_size=b)
    ]
    independent(run, images)
    independent(lambda images, b: run(images, None), images, [1])


def test_detect(student, folder, items, tmp_path):
    def run(items, b):
        images, notes, _ = detect(
            student.model,
            folder,
            items,
            score_threshold=0.0,
            n_max=9,
            batch_size=b,
            short=64,
            max_size=128,
            folder=tmp_path / str(len(list(tmp_path.iterdir()))),
        )
        return [
            [
                im['width'],
                im['height'],
                *(
                    [a['score'], a['category_id'], a['segmentation']['counts']]
                    for a in notes
                    if a['image_id'] == im['id']
                ),
            ]
            for im in images
        ]

    independent(run, items)


def test_evaluation(student, folder, items):
    def keep(p):
        instances = [[d['score'], d['bbox'], d['segmentation']['counts']] for d in p.instances]
        return dict(
            instances=instances,
            segments=[s['area'] for s in p.segments],
            **{k: getattr(p, k).unpack() for k in ('semantic', 'stuff', 'ids')},
        )

    def run(items, b):
        found = model_predictions(student.model, folder, items, batch_size=b)
        return [keep(found[im['id']]) for im in items]

    independent(run, items)


def test_predict_folder(weights, folder, images, tmp_path):
    "Other images beside an image change none of its files."
    seen = {}
    for k, (names, b) in enumerate(
        [([f'{i}.png' for i in range(1, len(images) + 1)], None), (['1.png', '3.png', '5.png'], 2), (['5.png'], 1)]
    ):
        out = tmp_path / str(k)
        predict_folder([folder / n for n in names], weights, out, batch_size=b, device='cpu')
        for n in names:
            assert seen.setdefault(n, (out / 'overlay' / n).read_bytes()) == (out / 'overlay' / n).read_bytes(), n
    assert len(set(seen.values())) > len(seen) / 2


@pytest.fixture(scope='module')
def vit():
    "Wide enough that a CPU adds in another order in a batch of 16 than in one of 1."
    torch.manual_seed(0)
    return ViTFeatures(dict(img_size=64, embed_dim=192, depth=2, num_heads=3, patch_size=8, stem_channels=[24, 48, 96]))


def test_masks(vit, folder, items, tmp_path):
    def run(items, b):
        coco, _ = label_images(
            items,
            vit,
            root=folder,
            folder=tmp_path / str(len(list(tmp_path.iterdir()))),
            size=64,
            feature='patches',
            tau=0.2,
            n_masks=3,
            crf=False,
            min_agreement=0.0,
            batch_size=b,
            desc='',
        )
        return [
            [[a['score'], a['segmentation']['counts']] for a in coco['annotations'] if a['image_id'] == im['id']]
            for im in items
        ]

    independent(run, items)


@pytest.mark.parametrize('embedding', EMBEDDINGS)
def test_embeddings_and_clusters(vit, images, embedding):
    crops = [np.array(Image.fromarray(im).resize((64, 64))) for im in images * 3]
    centroids = np.random.default_rng(0).standard_normal((5, vit.dim)).astype(np.float32)

    def run(crops, b):
        covers = np.full((len(crops), 64, 64), 255, np.uint8)
        x = embed_crops(vit, np.stack(crops), covers, embedding=embedding, batch_size=b)
        return [[v, j] for v, j in zip(x, assign(x, centroids))]

    independent(run, [c ^ np.uint8(i // 9 * 40) for i, c in enumerate(crops)], [2, 16, 27])


@pytest.mark.parametrize('feature', ['block0', 'patches'])
def test_stuff(vit, images, feature):
    "Maps, and the codes they are made of."
    labeller = (
        Labeller(Head(vit.dim, 6), torch.randn(5, 6, generator=torch.Generator().manual_seed(0)))
        .eval()
        .requires_grad_(False)
    )
    knobs, extract = dict(size=64, patch_size=8, flip=True), extractor(vit, feature)

    def maps(images, b):
        return [
            m
            for i in range(0, len(images), b)
            for m in segment(labeller, extract, images[i : i + b], alpha=2.0, crf=None, **knobs)
        ]

    independent(maps, images)
    square = [np.array(Image.fromarray(im).resize((64, 64))) for im in images * 3]
    independent(
        lambda images, b: [
            c for i in range(0, len(images), b) for c in patch_codes(labeller, extract, images[i : i + b], **knobs)
        ],
        [c ^ np.uint8(i // 9 * 40) for i, c in enumerate(square)],
        [2, 16, 27],
    )
