"""What DropLoss forgives: of the regions that cost nothing, how many are objects that the labels missed?

    python benchmarks/forgiven.py [--images 40] [--out benchmarks/results/forgiven.md]

From the outputs of stages maskcut, cutler, panoptic and train on the embedded data. For each image the network proposes
and samples regions as in training. A region is forgiven if the box that stage 1 predicts overlaps no label by more than
.01. Ground truth, which training never sees, says what it is: an object (IoU of at least .5 with one), a part of one
(at least .1), or background. `p` is the probability of an object that the network gives the region.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from machine import publish

from u2seg.baselines import read_network
from u2seg.boxes import decode_boxes, match_regions
from u2seg.cascade import all_labels, droploss_weights, sample_regions
from u2seg.images import read_image, read_json
from u2seg.masks import by_image
from u2seg.model import widened
from u2seg.truth import read_truth

ROOT = Path(__file__).resolve().parents[1]
DATA, OUT = ROOT / 'data/embedded', ROOT / 'out'
CASES = [
    ('maskcut', 'cutler', 'objects/train'),  # labels of, network after, images of
    ('panoptic', 'cutler', 'objects/train'),
    ('panoptic', 'cutler', 'scenes/train'),
    ('panoptic', 'train', 'objects/train'),
    ('panoptic', 'train', 'scenes/train'),
]


def xyxy(annotations):
    boxes = [(x, y, x + w, y + h) for x, y, w, h in (a['bbox'] for a in annotations)]
    return torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)


@torch.no_grad()
def regions(network, image, boxes):
    "Sampled regions: is it forgiven, box that stage 1 predicts, probability of an object, is it labelled an object."
    x, shapes = network.batch([torch.from_numpy(image).permute(2, 0, 1)])
    features = network.backbone(x)
    proposals, _ = network.proposal_generator(features, shapes, None)
    heads = network.roi_heads
    targets = [dict(boxes=boxes, labels=torch.zeros(len(boxes), dtype=torch.long), seed=0)]
    gt, options = all_labels(targets), dict(iou=heads.ious[0], n_things=heads.n_things, **heads.sampling)
    found, number, labels, _ = sample_regions(proposals, targets, gt, **options)
    logits, deltas = heads.stage(0, widened(features), found, number)
    moved = decode_boxes(found, deltas, heads.weights[0])
    keep = droploss_weights(moved, number, gt, 0.01)
    return keep == 0, moved, 1 - logits.softmax(1)[:, -1], labels < heads.n_things


def overlap(boxes, objects):
    "The largest IoU of each box with an object."
    zeros = lambda b: torch.zeros(len(b), dtype=torch.long)
    return match_regions(boxes, zeros(boxes), objects, zeros(objects))[0]


def measure(labels, model, split, n_images):
    "Background regions, labels, objects, labelled objects; of forgiven regions the IoU with an object, and p."
    truth = read_truth(DATA, split, n_images=n_images)
    coco, objects = read_json(OUT / labels / 'instances.json'), by_image(truth.instances)
    labelled, ids = by_image(coco), {im['file_name']: im['id'] for im in coco['images']}
    network = read_network(OUT / model).eval()
    counts, rows = np.zeros(4, int), []
    for image in truth.images:
        boxes, real = xyxy(labelled[ids[image['file_name']]]), xyxy(objects[image['id']])
        if not len(boxes):
            continue  # without a label there is no DropLoss
        forgiven, moved, p, is_object = regions(network, read_image(DATA / image['file_name']), boxes)
        rows.append(torch.stack([overlap(moved, real), p], 1)[forgiven])
        counts += [int((~is_object).sum()), len(boxes), len(real), int((overlap(real, boxes) >= 0.5).sum())]
    return counts, torch.cat(rows).numpy().T


HEAD = [
    'labels of',
    'network after',
    'images of',
    'objects that have a label',
    'background regions forgiven',
    'objects among them',
    'parts',
    'background',
    *(f'objects among those with p ≥ {t}' for t in (0.2, 0.5)),
]


def row(labels, model, split, n_images):
    "A row of the table."
    (n_background, _, n_objects, n_labelled), (iou, p) = measure(labels, model, split, n_images)
    fraction = lambda of: f'{of.mean():.0%} of {len(of)}' if len(of) else 'none'
    is_object = iou >= 0.5
    kinds = is_object, (iou >= 0.1) & ~is_object, iou < 0.1
    cells = [dict(maskcut='MaskCut', panoptic='the detector')[labels], model, split, f'{n_labelled / n_objects:.0%}']
    cells += [f'{len(p) / n_background:.0%} ({len(p)})', *(f'{k.mean():.0%}' for k in kinds)]
    return [*cells, *(fraction(is_object[p >= t]) for t in (0.2, 0.5))]


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--images', type=int, default=40, help='a case')
    parser.add_argument('--out', type=Path, default=ROOT / 'benchmarks/results/forgiven.md')
    args = parser.parse_args()
    torch.set_num_threads(1)
    text = lambda cells: f'| {" | ".join(cells)} |'
    lines = [f'Embedded data, {args.images} training images a row, those without a label left out.', '']
    lines += [text(HEAD), text(['---'] * len(HEAD))]
    lines += [text(row(*case, args.images)) for case in CASES]
    publish(lines, args.out)
