"""From a model's predictions on photographs to a model fine-tuned on some of them: results/photo_labels.csv.

python benchmarks/photo_labels.py --images DIR --labels instances.json [--model out/train] [SEED ...]

The photographs are predicted. For each seed 20 of them are labelled, as somebody would who corrects predictions: what
covers an object with an IoU of .5 is kept, the rest drawn anew. A model is fine-tuned from the given weights, another
from random ones at equal cost, and both are scored on the photographs that are left. With so few of them all categories
are one, "object". What is in the file already is not run again.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from machine import grow
from pycocotools import mask as rle

from u2seg.coco import read_instances
from u2seg.finetune import _scores, finetune
from u2seg.folder import predict_folder
from u2seg.images import write_json
from u2seg.labels import read_labels
from u2seg.masks import by_image, instances_json
from u2seg.matching import file_hash
from u2seg.predict import U2Seg

root = Path(__file__).parents[1]
results = root / 'benchmarks/results/photo_labels.csv'
N_LABELLED, IOU, SCORE = 20, 0.5, 0.3


def corrected(truth, predicted, names):
    "COCO instances of one category for some images, and how many of them are predictions that were kept."
    found, objects = by_image(predicted), by_image(truth)
    number = {im['file_name']: im['id'] for im in predicted['images']}
    images = [im for im in truth['images'] if im['file_name'] in names]
    annotations, n_kept = [], 0
    for im in images:
        codes = [a['segmentation'] for a in found[number[im['file_name']]] if a['score'] > SCORE]
        for a in (a for a in objects[im['id']] if not a.get('iscrowd')):
            mask = a['segmentation']
            over = rle.iou(codes, [mask], [0])[:, 0] if codes else np.zeros(1)
            if over.max() >= IOU:
                mask = codes[over.argmax()]
                n_kept += 1
            annotations.append(dict(image_id=im['id'], category_id=1, segmentation=mask))
    return instances_json(images, annotations, [dict(id=1, name='object')]), n_kept


def main(a):
    truth = read_instances(a.labels)
    model = file_hash(a.model / 'model.safetensors')[:8]
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        predict_folder(a.images, a.model, scratch / 'predictions')
        predicted = read_instances(scratch / 'predictions/instances.json')
        names = [im['file_name'] for im in truth['images']]

        def run(weights, seed):
            order = np.random.default_rng(seed).permutation(names).tolist()
            start, folder = time.time(), scratch / f'{weights}-{seed}'
            labels, n_kept = corrected(truth, predicted, order[:N_LABELLED])
            test, _ = corrected(truth, dict(images=predicted['images'], annotations=[]), order[N_LABELLED:])
            write_json(folder / 'labels.json', labels)
            write_json(folder / 'test.json', test)
            options = dict(images=a.images, random=weights == 'random', seed=seed)
            finetune(folder / 'labels.json', a.model, folder / 'model', **options)
            held, images = read_labels(folder / 'test.json', a.images)
            scores = _scores(U2Seg.from_pretrained(folder / 'model').model, images, held)
            row = dict(weights=weights, seed=seed, n=N_LABELLED, objects=len(labels['annotations']), kept=n_kept)
            row |= dict(n_test=len(test['images']), objects_test=len(test['annotations']))
            return (
                row
                | {k: round(v, 4) for k, v in scores.items()}
                | dict(model=model, seconds=round(time.time() - start))
            )

        jobs = [(w, s) for s in a.seeds for w in ('u2seg', 'random')]
        grow(results, jobs, ('weights', 'seed'), run, keep=lambda r: r['model'] == model)


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('seeds', nargs='*', type=int, default=[0, 1, 2], metavar='SEED')
    p.add_argument('--images', type=Path, required=True, help='folder of photographs')
    p.add_argument('--labels', type=Path, required=True, help='their COCO instances')
    p.add_argument('--model', type=Path, default=root / 'out/train', help='folder of the model (out/train)')
    main(p.parse_args())
