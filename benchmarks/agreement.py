"""What a mask weighs: is it right where its score is high, or where cuts at other thresholds agree? And does a detector
gain from weights?

    python benchmarks/agreement.py [--images 200] [--out benchmarks/results/agreement.md]
    python benchmarks/agreement.py --train --work DIR [--seeds 0 1] [--out benchmarks/results/weights.md]

MaskCut with the parameters of `params.yaml` on the first training images of each folder, and again at other thresholds.
A mask is an object if its IoU with one is above .5. With --train: detectors trained as stage cutler does on the masks
of out/maskcut, weighed in each way, and scored without classes on a development set (see development.py). Needs
`dvc pull data.dvc features`, and out/maskcut for --train. Killed, the training goes on.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from development import development_set
from machine import heading, publish
from rounds import scores

from u2seg import train
from u2seg.agreement import WEIGHTS, agreements, other_thresholds, weighed
from u2seg.augment import Augment
from u2seg.batches import Batches, PseudoLabels
from u2seg.features import ViTFeatures
from u2seg.images import read_json
from u2seg.maskcut import label_images
from u2seg.masks import by_image, mask_iou
from u2seg.model import build_model
from u2seg.solver import Solver
from u2seg.stage import load_params, stage_params
from u2seg.truth import read_truth

MORE = [0.5, 0.6, 0.8, 0.9]
FIFTHS = 5


def best_iou(coco, truth):
    "For each annotation, in order, its largest IoU with an object."
    objects = by_image(truth.instances)
    return np.concatenate([mask_iou(own, objects[i]).max(1, initial=0) for i, own in by_image(coco).items()])


def fifths(value, right):
    "Share of right masks: all, then each fifth from the least value."
    order = np.argsort(value, kind='stable')
    return [right.mean(), *(right[part].mean() for part in np.array_split(order, FIFTHS))]


def cuts(items, root, thresholds, work=None):
    "Threshold -> the masks of these images."
    params = load_params()['maskcut']
    options = {k: params[k] for k in ('size', 'feature', 'n_masks', 'crf', 'min_agreement')}
    vit, out = ViTFeatures.from_file('out/features/backbone.safetensors'), {}
    for t in thresholds:
        with tempfile.TemporaryDirectory() as folder:
            where = work / f'tau_{t:.3f}' if work else folder
            out[t] = label_images(items, vit, root=root, folder=where, tau=t, desc=f'tau {t:.3f}', **options)[0]
    return out


def table(split, n_images):
    "Rows of one folder."
    params = load_params()
    tau, root = params['maskcut']['tau'], params['data']['root']
    truth = read_truth(root, split, n_images=n_images)
    items = [dict(id=im['id'], file_name=im['file_name']) for im in truth.images]
    choices = other_thresholds(tau), MORE
    found = cuts(items, root, {tau, *choices[0], *choices[1]})
    right = best_iou(found[tau], truth) > 0.5
    values = {'score': np.array([a['score'] for a in found[tau]['annotations']])}
    for taus in choices:
        rated = agreements(found[tau], [found[t] for t in taus])
        name = 'agreement with ' + ', '.join(f'{t:g}' for t in taus)
        values[name] = np.array([v for each in rated.values() for v in each])
    for name, value in values.items():
        spread = f'{value.std() / value.mean():.2f}'
        yield f'| {split} | {name} | {spread} | ' + ' | '.join(f'{100 * a:.1f}' for a in fifths(value, right)) + ' |'


def rated(a):
    "The table of fifths."
    head = ' | '.join(['images', 'of the masks', 'std / mean', 'all', 'least', '2', '3', '4', 'most'])
    lines = [f'| {head} |', '|---' * 9 + '|']
    for split in load_params()['data']['train']:
        lines += table(split, a.images)
    how = f'Percent of the masks that are an object, of {a.images} images a folder, by fifths of each number.'
    return [*heading('Score and agreement of masks', 1, ['torch'], how), *lines]


def trained(kind, coco, seed, p, root, work):
    "The detector of one run."
    torch.manual_seed(seed)
    net = build_model({**p['network'], 'n_things': 1, 'n_stuff': 0})
    batches = Batches(PseudoLabels(root, coco, skip_empty=True), Augment(**p['augment']), batch_size=8, seed=seed)
    train.fit(net, batches, Solver(**p['solver']), folder=work / f'{kind}{seed}')
    return net


def compared(a):
    "The table of trainings."
    params, p = load_params(), stage_params('.', 'cutler')
    root, tau = params['data']['root'], params['maskcut']['tau']
    labels, dev = read_json('out/maskcut/instances.json'), development_set(a.work / 'development', 200)
    items = [{k: im[k] for k in ('id', 'file_name')} for im in labels['images']]
    others = list(cuts(items, root, other_thresholds(tau), a.work).values())
    names = [f'agnostic_{k}' for k in ('mask_AP50', 'mask_AP', 'mask_AR100')]
    head = ' | '.join(['weight', 'images', *(n.removeprefix('agnostic_') for n in names)])
    lines = [f'| {head} |', '|---' * 5 + '|']
    for kind in WEIGHTS:
        coco, found = weighed(labels, kind, others), []
        for seed in a.seeds:
            net = trained(kind, coco, seed, p, root, a.work)
            found.append(scores(net, dev, params['data']['val'], a.work / f'scores_{kind}{seed}'))
            print(kind, seed, found[-1], flush=True)
        for split in params['data']['val']:
            cells = [[100 * f[split][n] for f in found] for n in names]
            lines.append(f'| {kind} | {split} | ' + ' | '.join(', '.join(f'{v:.1f}' for v in c) for c in cells) + ' |')
    how = f'Detectors after stage cutler, without classes, in %, on images drawn from another seed; seeds {a.seeds}.'
    return [*heading('Weights of masks', 1, ['torch'], how), *lines]


def main():
    q = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    q.add_argument('--images', type=int, default=200)
    q.add_argument('--train', action='store_true')
    q.add_argument('--work', type=Path, help='of --train: checkpoints, shards, the development set')
    q.add_argument('--seeds', type=int, nargs='+', default=[0, 1])
    q.add_argument('--out')
    a = q.parse_args()
    torch.set_num_threads(1)
    publish(compared(a) if a.train else rated(a), a.out)


if __name__ == '__main__':
    main()
