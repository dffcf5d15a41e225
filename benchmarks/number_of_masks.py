"""How many masks should an image give? Rules for the end of MaskCut's rounds, against ground truth.

    python benchmarks/number_of_masks.py [--images 80] [--out benchmarks/results/number_of_masks.md]

Masks on the token grid, before the CRF, of `--images` training images of each split. Then the masks of the published
run (objects, three rounds, after the CRF), which out/maskcut must hold. An object is found if a mask has an IoU above
.5 with it, one mask each.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from machine import publish

from u2seg.borders import border_fraction, without_background
from u2seg.features import ViTFeatures
from u2seg.images import read_json
from u2seg.maskcut import cut_rounds
from u2seg.masks import by_image, decode_rle
from u2seg.ncut import fiedler, propagate, token_affinity, token_graph
from u2seg.truth import read_truth

from position import DATA, ROOT, enlarged, features, found

TAU = 0.7


def rounds(x):
    "Of the rounds on one image: (mask, second eigenvalue)."
    affinity, painted, out = token_affinity(x[None].flatten(2), tau=TAU), np.zeros(x.shape[1:], bool), []
    for _, _, accepted in cut_rounds(x[None], tau=TAU, n_masks=8):
        graph = token_graph(affinity, torch.from_numpy(~painted).flatten()[None].float())
        y = fiedler(graph)
        out.append((accepted[0] & ~painted, 1 - (y * propagate(graph, y)).sum().item()))
        painted = painted | accepted[0]
    return out


RULES = [(f'at most {n}', n, 2, 1) for n in (1, 2, 3, 4, 8)]
RULES += [(f'until the eigenvalue exceeds {t}', 8, t, 1) for t in (0.5, 0.6, 0.7)]
RULES += [
    (f'at most {n}, no mask on more than {b} of the border', n, 2, b) for n in (3, 8) for b in (0.5, 0.4, 0.25, 0.1)
]


def chosen(rounds, n, eigenvalue, border):
    "The masks of one rule."
    masks = []
    for mask, value in rounds[:n]:
        if value > eigenvalue:
            break
        if mask.any() and border_fraction(mask) <= border:
            masks.append(mask)
    return torch.from_numpy(np.stack(masks)) if masks else torch.zeros(0, *rounds[0][0].shape, dtype=torch.bool)


def summary(masks, objects):
    "Masks an image, recall, precision, as text."
    n = sum(found(m, o) for m, o in zip(masks, objects))
    n_masks, n_objects = (sum(map(len, x)) for x in (masks, objects))
    return f'{n_masks / len(masks):.2f} | {n / n_objects:.3f} | {n / n_masks:.3f}'


def objects_of(truth):
    "For each image its objects, bool [H, W]."
    annotations = by_image(truth.instances)
    return [[decode_rle(a['segmentation']).astype(bool) for a in annotations[im['id']]] for im in truth.images]


def table(n_images):
    "Lines of the first table."
    vit = ViTFeatures.from_file(ROOT / 'out/features/backbone.safetensors')
    columns = {}
    for split in ('objects/train', 'scenes/train'):
        truth = read_truth(DATA, split, n_images=n_images)
        objects, each = objects_of(truth), [rounds(x) for x in features(vit.patches, truth.images, 192)]
        size = truth.images[0]['height'], truth.images[0]['width']
        columns[split] = [summary([enlarged(chosen(r, *rule), size) for r in each], objects) for _, *rule in RULES]
    head = ' | '.join(f'{s}: masks an image | recall | precision' for s in columns)
    lines = [f'| rounds | {head} |', '|---' * 7 + '|']
    return lines + [f'| {name} | {" | ".join(row)} |' for (name, *_), row in zip(RULES, zip(*columns.values()))]


def published():
    "Lines of the second table."
    coco, truth = read_json(ROOT / 'out/maskcut/instances.json'), read_truth(DATA, 'objects/train')
    objects, ids = objects_of(truth), {im['file_name']: im['id'] for im in coco['images']}
    lines = ['| objects/train, after the CRF | masks an image | recall | precision |', '|---|---|---|---|']
    for border in (1, 0.5, 0.4, 0.25, 0.1):
        of = by_image(without_background(coco, max_border=border))
        masks = [[decode_rle(a['segmentation']).astype(bool) for a in of[ids[im['file_name']]]] for im in truth.images]
        lines.append(f'| no mask on more than {border} of the border | {summary(masks, objects)} |')
    return lines


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--images', type=int, default=80, help='of each split')
    parser.add_argument('--out', type=Path, default=ROOT / 'benchmarks/results/number_of_masks.md')
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines = [f'Embedded data, {args.images} images of each split, tau {TAU}, before the CRF.', '', *table(args.images)]
    lines += ['', 'The masks of the published run, all 1000 images.', '', *published()]
    publish(lines, args.out)
