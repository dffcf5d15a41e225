"""What position explains in the features of the embedded backbone, and what its removal changes.

    python benchmarks/position.py [--images 60] [--out benchmarks/results/position.md]

Fitted on `--images` training images of each split, measured on as many others. MaskCut: masks on the token grid, before
the CRF, against ground truth at an IoU of .5. Labeller: k-means without training; pixels of stuff whose class is right
when clusters and classes are matched one-to-one.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from machine import publish
from scipy.optimize import linear_sum_assignment

from u2seg.features import ViTFeatures
from u2seg.images import normalize, read_image, resize_image, to_tensor
from u2seg.labeller import extractor
from u2seg.maskcut import maskcut
from u2seg.masks import by_image, decode_rle
from u2seg.position import fit_position, position_share, remove_position
from u2seg.stego import fit_kmeans
from u2seg.truth import read_truth

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / 'data/embedded'


def features(extract, images, size):
    "float [n, d, h, w]"
    load = lambda im: normalize(to_tensor(resize_image(read_image(DATA / im['file_name']), (size, size))))
    return torch.cat([extract(load(im)[None]) for im in images])


def found(masks, objects):
    "How many objects have a mask of IoU above .5; one mask each, the best first."
    iou = np.array([[(m & o).sum() / (m | o).sum() for o in objects] for m in masks]).reshape(len(masks), len(objects))
    n = 0
    while iou.size and iou.max() > 0.5:
        i, j = np.unravel_index(iou.argmax(), iou.shape)
        iou[i], iou[:, j], n = 0, 0, n + 1
    return n


def enlarged(masks, size):
    "bool [m, H, W] of masks on the token grid"
    rows, columns = ((np.arange(n) * g // n) for n, g in zip(size, masks.shape[1:]))
    return masks.numpy()[:, rows][:, :, columns]


def recall_precision(features, truth, **options):
    "Of MaskCut on all images."
    objects, counts = by_image(truth.instances), np.zeros(3)
    for x, image in zip(features, truth.images):
        real = [decode_rle(a['segmentation']).astype(bool) for a in objects[image['id']]]
        masks = enlarged(maskcut(x, **options), (image['height'], image['width']))
        counts += found(masks, real), len(real), len(masks)
    return counts[0] / counts[1], counts[0] / counts[2]


def pixel_accuracy(features, truth, fit, seed=0):
    "Of stuff, with clusters of patches matched one-to-one with classes."
    labeller = fit_kmeans(fit, n_classes=14, code_dim=20, smooth=3, seed=seed)
    votes, stuff = np.zeros((14, len(truth.stuff)), int), {c: i for i, c in enumerate(truth.stuff)}
    for x, annotation in zip(features, truth.panoptic['annotations']):
        clusters = labeller.log_prob(labeller.code(x[None]), 1.0).argmax(1)
        ids = truth.ids(annotation)
        labels = enlarged(clusters, ids.shape)[0]
        for s in annotation['segments_info']:
            if s['category_id'] in stuff:
                votes[:, stuff[s['category_id']]] += np.bincount(labels[ids == s['id']], minlength=14)
    return votes[linear_sum_assignment(-votes)].sum() / votes.sum()


def splits(n):
    "For each split its ground truth on `n` images; and `2 n` images to fit on, from both splits."
    truths = {s: read_truth(DATA, f'{s}/train', n_images=2 * n) for s in ('objects', 'scenes')}
    fit = [im for t in truths.values() for im in t.images[1::2]]
    tests = {}
    for s, t in truths.items():
        part = dict(images=t.images[::2], annotations=t.panoptic['annotations'][::2])
        tests[s] = type(t)(s, t.panoptic.but(**part), t.maps)
    return fit, tests


def main(n):
    "Lines of the report."
    vit = ViTFeatures.from_file(ROOT / 'out/features/backbone.safetensors')
    fit_images, tests = splits(n)
    lines = [f'Embedded backbone; fitted on {len(fit_images)} images, measured on {n} others of each split.', '']
    lines += [
        '| features | split | variance by place, quadratic | free vector a place | measure | as they are | removed |'
    ]
    lines += ['|---|---|---|---|---|---|---|']
    for name, size in (('patches', 192), ('block0', 128)):
        extract = extractor(vit, name)
        fit = features(extract, fit_images, size)
        weights, means = fit_position(fit.split(1)), fit.mean(0) - fit.mean((0, 2, 3))[:, None, None]
        for split, truth in tests.items():
            x = features(extract, truth.images, size)
            spread = lambda f: (f - f.mean((0, 2, 3), keepdim=True)).square().sum()
            free = 1 - (spread(x - means) / spread(x)).item()
            pairs = [(x, fit), (remove_position(x, weights), remove_position(fit, weights))]
            if name == 'patches':
                values = ['{:.3f} / {:.3f}'.format(*recall_precision(x, truth, tau=0.7, n_masks=3)) for x, _ in pairs]
                measure = 'MaskCut recall / precision'
            else:
                each = [[pixel_accuracy(x, truth, f, seed) for seed in range(3)] for x, f in pairs]
                values = [f'{np.mean(v):.3f} ± {np.std(v, ddof=1):.3f}' for v in each]
                measure = 'k-means labeller, PixelAcc of stuff, three seeds'
            share = position_share(x, weights)
            lines.append(
                f'| {name}, {size} px | {split} | {share:.2%} | {free:.2%} | {measure} | {" | ".join(values)} |'
            )
    return lines


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--images', type=int, default=60, help='of each split, to measure on')
    parser.add_argument('--out', type=Path, default=ROOT / 'benchmarks/results/position.md')
    args = parser.parse_args()
    torch.set_num_threads(1)
    publish(main(args.images), args.out)
