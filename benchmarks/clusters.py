"""What the settings of stage cluster are worth: of an object, is the cluster's name right?

    python benchmarks/clusters.py --work DIR [--runs out/cluster ...] [--out benchmarks/results/clusters.md]

Clusters are fitted on the embeddings of each run; those of results/clusters.md are the five of sweep `plus`, whose
detector has no DropLoss and no masks along the border. They get names by the vote of the true objects of the training
images that stage evaluate takes, and are scored on the true objects of the development set (see development.py): no
detector and no training in between. *All named* is the same with each cluster named on the development set itself,
which rises with the number of clusters by construction.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from development import development_set
from labellers import spread
from machine import heading, publish

from u2seg.cluster import fit_clusters
from u2seg.crops import embed_file
from u2seg.device import own_device
from u2seg.features import ViTFeatures, weights_digest
from u2seg.images import read_json
from u2seg.matching import match_clusters
from u2seg.stage import load_params
from u2seg.truth import read_truths

KINDS = 'objects', 'scenes'
SETTINGS = [
    dict(k=k, pca=pca, whiten=whiten)
    for k in (32, 48, 64, 96)
    for pca, whiten in ((48, False), (32, True), (48, True), (64, True), (96, True), (128, True))
]


def true_objects(vit, recipe, root, splits, work, **options):
    "Of each split: embeddings float32 [n, d] of all objects that are no crowd; their classes int64 [n]."
    out = []
    for s, truth in read_truths(root, splits, classes='given', **options).items():
        coco = truth.instances
        coco = dict(coco, annotations=[a for a in coco['annotations'] if not a.get('iscrowd')])
        place = Path(work) / s.replace('/', '-')
        key = dict(weights=weights_digest(vit))
        found, _ = embed_file(vit, coco, root, place / 'rows.npy', **recipe, folder=place, key=key, desc=s)
        out.append((np.load(place / 'rows.npy'), np.array([a['category_id'] for a in found])))
    return out


def named(clusters, classes, k):
    "The class that each cluster gets by vote, -1 where none is known."
    votes = np.zeros((k, classes.max() + 1), int)
    np.add.at(votes, (clusters, classes), 1)
    return match_clusters(votes)


def accuracies(clusters, named_on, scored_on):
    "Of each split: share of objects whose cluster has the name of their class; the same, named on these splits."
    k = len(clusters.centroids)
    known, classes = (np.concatenate(part) for part in zip(*named_on))
    names = named(clusters.assign(known), classes, k)
    seen = [(clusters.assign(x), y) for x, y in scored_on]
    best = named(np.concatenate([c for c, _ in seen]), np.concatenate([y for _, y in seen]), k)
    return [[(n[c] == y).mean() for n in (names, best)] for c, y in seen]


def main(a):
    "Lines of the report."
    params = load_params()
    own, take = params['cluster'], params['evaluate']
    recipe = {k: own[k] for k in ('embedding', 'crop_size', 'margin', 'shape', 'fill_background')}
    options = {k: own[k] for k in ('k', 'l2', 'pca', 'whiten', 'metric', 'n_iters', 'init', 'n_init', 'seed')}
    for run in a.runs:
        if {k: read_json(run / 'clusters.json')[k] for k in recipe} != recipe:
            raise ValueError(f'{run}: its instances were cut out in another way than params.yaml says')
    vit = ViTFeatures.from_file('out/features/embedder.safetensors').to(own_device())
    fit = dict(n_images=take['n_fit_images'], seed=take['seed'])
    named_on = true_objects(vit, recipe, params['data']['root'], params['data']['train'], a.work / 'rows/fit', **fit)
    drawn = development_set(a.work / 'development', a.n_images)
    scored_on = true_objects(vit, recipe, drawn, [f'{k}/val' for k in KINDS], a.work / 'rows/development')
    rows = [np.load(run / 'embeddings.npy') for run in a.runs]
    sizes = ' and '.join(f'{len(y)} of {kind}' for kind, (_, y) in zip(KINDS, scored_on))
    n = sum(len(y) for _, y in named_on)
    how = (
        f'Percent of {sizes} whose cluster has the right name, given by {n} objects of the training images; '
        f'{len(rows)} runs of the detector, mean ± standard deviation. Bold: the default.'
    )
    lines = heading('Clusters of objects', 1, ['numpy', 'torch', 'faiss'], how)
    lines += ['| k | pca | whiten | objects | scenes | all named, objects | all named, scenes |', '|--' * 7 + '|']
    for setting in SETTINGS:
        of = options | setting
        scores = np.array([accuracies(fit_clusters(x, recipe, **of)[0], named_on, scored_on) for x in rows])
        cells = [spread(list(scores[:, i, j])) for j in (0, 1) for i in range(len(KINDS))]
        first = [str(of['k']), str(of['pca']), 'yes' if of['whiten'] else 'no']
        if of == options:
            first = [f'**{x}**' for x in first]
        lines.append('| ' + ' | '.join(first + cells) + ' |')
        print(lines[-1], flush=True)
    return lines


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--work', required=True, type=Path)
    parser.add_argument('--runs', nargs='+', type=Path, default=[Path('out/cluster')])
    parser.add_argument('--n-images', type=int, default=200, help='of each kind, of the development set')
    parser.add_argument('--out', type=Path, default=Path('benchmarks/results/clusters.md'))
    args = parser.parse_args()
    torch.set_num_threads(1)
    publish(main(args), args.out)
