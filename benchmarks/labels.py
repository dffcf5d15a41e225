"""What a few labels are worth on the embedded data, and which images to label: results/labels.csv.

python benchmarks/labels.py [SEED ...]     what is in the file already, of the same weights, is not run again
"""

import sys
import time
from pathlib import Path

import numpy as np
from machine import grow

from u2seg.coco import read_instances
from u2seg.finetune import _scores, finetune
from u2seg.folder import predict_folder
from u2seg.images import write_json
from u2seg.matching import file_hash
from u2seg.polygons import joined, polygons
from u2seg.predict import U2Seg
from u2seg.suggest import suggest
from u2seg.truth import read_truth

root = Path(__file__).parents[1]
data, results = root / 'data/embedded', root / 'benchmarks/results/labels.csv'
MODEL = file_hash(root / 'out/train/model.safetensors')[:8]
scratch = root / 'out/.work/labels' / MODEL
SPLIT, N_POOL, N_TEST, N_ITERS = 'scenes/train', 200, 50, 48
DROPLOSS = 0.01  # that of the model, which fine-tuning kept when this was measured; droploss.py compares it with 0


def label(names, path):
    "The ground truth of some images as an annotation tool writes it: polygons."
    truth = read_truth(data, SPLIT).instances
    images = [im for im in truth['images'] if im['file_name'] in names]
    ids = {im['id'] for im in images}
    annotations = []
    for a in truth['annotations']:
        if a['image_id'] in ids:
            rings = [joined(p).ravel().tolist() for p in polygons(a['segmentation'])]
            annotations.append(dict({k: a[k] for k in ('id', 'image_id', 'category_id', 'bbox')}, segmentation=rings))
    write_json(path, dict(images=images, annotations=annotations, categories=truth['categories']))
    return len(annotations)


def pool(seed):
    "File names of the images of a seed that could be labelled."
    names = [im['file_name'] for im in read_truth(data, SPLIT).images]
    return [names[i] for i in sorted(np.random.default_rng(seed).choice(len(names), N_POOL, replace=False).tolist())]


def predictions(names):
    "The trained model's instances on a pool; file names as of the labels."
    if not (scratch / 'predictions/instances.json').exists():
        predict_folder(data / SPLIT, root / 'out/train', scratch / 'predictions')
    coco = read_instances(scratch / 'predictions/instances.json', masks=False)
    images = [dict(im, file_name=f'{SPLIT}/{im["file_name"]}') for im in coco['images']]
    images = [im for im in images if im['file_name'] in names]
    ids = {im['id'] for im in images}
    annotations = [a for a in coco['annotations'] if a['image_id'] in ids]
    return dict(images=images, annotations=annotations, categories=coco['categories'])


def choose(how, n, seed):
    names = pool(seed)
    if how == 'suggested':
        return suggest(predictions(names), n)
    return np.random.default_rng([seed, 1]).permutation(names)[:n].tolist()


def run(how, weights, n, seed):
    "Label n images, fine-tune, score on images never seen."
    folder = scratch / f'{how}-{weights}-{n}-{seed}'
    start = time.time()
    n_objects = label(choose(how, n, seed), folder / 'labels.json')
    options = dict(images=data, random=weights == 'random', seed=seed, n_iters=N_ITERS, droploss=DROPLOSS)
    result = finetune(folder / 'labels.json', root / 'out/train', folder / 'model', **options)
    test = read_truth(data, 'scenes/val', n_images=N_TEST)
    instances = test.instances
    one = U2Seg.from_pretrained(folder / 'model')
    truth = type(test)(test.split, test.panoptic.but(categories=_things(test)), test.maps, instances)
    scores = _scores(one.model, data, truth)
    scores = {k: round(v, 4) for k, v in scores.items()}
    row = dict(how=how, weights=weights, n=n, seed=seed, objects=n_objects, **scores, model=MODEL)
    return dict(row, rounds=len(result['rounds']), seconds=round(time.time() - start))


def _things(truth):
    return [c for c in truth.panoptic['categories'] if c['isthing']]


def jobs(seeds):
    for seed in seeds:
        yield 'random', 'u2seg', 20, seed
        yield 'suggested', 'u2seg', 20, seed
        if seed < 2:
            yield 'random', 'random', 20, seed
    for n in (10, 40):
        yield 'random', 'u2seg', n, 0
        yield 'random', 'random', n, 0


def main(seeds):
    # weights of another training say nothing about these
    grow(results, jobs(seeds), ('how', 'weights', 'n', 'seed'), run, keep=lambda r: r['model'] == MODEL)


if __name__ == '__main__':
    main([int(s) for s in sys.argv[1:]] or range(10))
