"""DropLoss in fine-tuning, where labels are complete and where half of the objects are left out: results/droploss.csv.

python benchmarks/droploss.py [SEED ...]     rows that are in the file already are not run again

The embedded model, 60 images of scenes/train, 48 to train on and 12 held out, 120 iterations; scores on 100 images of
scenes/val. The two arms of a seed have the same images and labels.
"""

import sys
from pathlib import Path

import numpy as np
from machine import grow

from u2seg.finetune import _scores, finetune
from u2seg.images import write_json
from u2seg.polygons import joined, polygons
from u2seg.predict import U2Seg
from u2seg.truth import GroundTruth, read_truth
from u2seg.zoo import locate

root = Path(__file__).parents[1]
data, results = root / 'data/embedded', root / 'benchmarks/results/droploss.csv'
scratch = root / 'out/.work/droploss'
SPLIT, N_IMAGES, N_TEST, N_ITERS = 'scenes/train', 60, 100, 120
KEPT = dict(all=1.0, half=0.5)  # fraction of the objects that are labelled


def label(kept, seed, path):
    "Polygons of the objects of some images, each kept by chance; how many there are."
    truth = read_truth(data, SPLIT)
    names = [im['file_name'] for im in truth.images]
    chosen = {*np.random.default_rng([seed, 1]).permutation(names)[:N_IMAGES].tolist()}
    images = [im for im in truth.instances['images'] if im['file_name'] in chosen]
    ids, rng, annotations = {im['id'] for im in images}, np.random.default_rng([seed, 7]), []
    for a in truth.instances['annotations']:
        if a['image_id'] not in ids or rng.random() > kept:
            continue
        rings = [joined(p).ravel().tolist() for p in polygons(a['segmentation'])]
        annotations.append(dict({k: a[k] for k in ('id', 'image_id', 'category_id', 'bbox')}, segmentation=rings))
    write_json(path, dict(images=images, annotations=annotations, categories=truth.instances['categories']))
    return len(annotations)


def run(labels, droploss, seed):
    "Fine-tune, and score on images never seen."
    folder = scratch / f'{labels}-{droploss}-{seed}'
    n_objects = label(KEPT[labels], seed, folder / 'labels.json')
    options = dict(images=data, seed=seed, n_iters=N_ITERS, droploss=droploss)
    result = finetune(folder / 'labels.json', locate('embedded'), folder / 'model', **options)
    test = read_truth(data, 'scenes/val', n_images=N_TEST)
    things = test.panoptic.but(categories=[c for c in test.panoptic['categories'] if c['isthing']])
    truth = GroundTruth(test.split, things, test.maps, test.instances)
    scores = _scores(U2Seg.from_pretrained(folder / 'model').model, data, truth)
    row = dict(labels=labels, droploss=droploss, seed=seed, objects=n_objects, rounds=len(result['rounds']))
    return row | {k: round(v, 4) for k, v in scores.items()}


def main(seeds):
    jobs = [(labels, droploss, seed) for seed in seeds for labels in KEPT for droploss in (0.01, 0.0)]
    grow(results, jobs, ('labels', 'droploss', 'seed'), run)


if __name__ == '__main__':
    main([int(s) for s in sys.argv[1:]] or range(3))
