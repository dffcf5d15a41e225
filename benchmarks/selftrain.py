"""What a round of self-training gains: the universal model after it, beside the same model trained on as long with the
labels that it had, and before both.

    python benchmarks/selftrain.py --folder DIR [--iters 400] [--seed 0] [--ema .998] [--first] [--write]

Starts from `out/train`, or with --first from a first training of its own, by that seed; reads `out/panoptic` (and
`out/cutler` for --first). Trained as stage `train` says in params.yaml, with `train.self_training`, and with --ema as
decay of the averaged weights, which are the teacher's. Scored as stage `evaluate` does on --labelled, clusters named
by training images and by the images that are scored, by vote and one-to-one. Killed, it goes on. --images and
--labelled-images take so many only, to see that it works.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import torch
from machine import heading, publish

from u2seg import train
from u2seg.augment import Augment
from u2seg.baselines import deciding, predict_methods, read_network
from u2seg.batches import Batches, PseudoLabels
from u2seg.checkpoints import load_weights
from u2seg.evaluate import evaluate
from u2seg.features import weights_digest
from u2seg.images import read_json
from u2seg.masks import instances_json
from u2seg.model import build_model
from u2seg.optim import CLASS_LAYERS
from u2seg.solver import Solver
from u2seg.stage import read_yaml
from u2seg.teacher import self_train
from u2seg.truth import read_truths

SCORES = 'PQ', 'PQ_things', 'PQ_stuff', 'mask_AP50', 'PixelAcc', 'mIoU', 'agnostic_mask_AP50', 'agnostic_mask_AR100'
OPTIONS = 'match_score', 'match_iou', 'match_stuff_iou'


def measure(net, a, params, folder, by_name=False):
    "Rows of scores of a network."
    p, splits = params['evaluate'], params['data']
    truths = read_truths(a.labelled, splits['val'], n_images=a.labelled_images, classes=p['classes'])
    fitted = dict(n_images=a.labelled_images or p['n_fit_images'], seed=p['seed'], classes=p['classes'])
    fit_truths = read_truths(params['data']['root'], splits['train'], **fitted)
    run = dict(model=net, parts=None, folder=folder, key=dict(weights=weights_digest(net)), batch_size=16, n_procs=1)
    predict = lambda root, truths: predict_methods(root, {s: t.images for s, t in truths.items()}, **run)
    predictions, fit_predictions = predict(a.labelled, truths), predict(params['data']['root'], fit_truths)
    sizes = dict(n_clusters=net.config['n_things'], n_stuff=net.config['n_stuff'])
    options = sizes | {k: p[k] for k in OPTIONS}
    if by_name:
        options['decide'] = deciding(a.labelled, {s: t.images for s, t in truths.items()}, **run)
    return evaluate(predictions, truths, fit_predictions, fit_truths, **options)[0]


def lines(name, rows):
    "Rows of the table: a split and a mapping each."
    for r in rows:
        cells = ' | '.join(f'{100 * r[k]:.1f}' for k in SCORES)
        yield f'| {name} | {r["split"]} | {r["fitted_on"]}, {r["matching"]} | {cells} |'


def arguments():
    q = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    q.add_argument('--folder', required=True, help='checkpoints, labels and predictions')
    q.add_argument('--labelled', help='folder with the splits of data.val and their ground truth; none: data.root')
    q.add_argument('--iters', type=int, help='of the round; none: as in params.yaml')
    q.add_argument('--threshold', type=float, default=0.5, help='score from which the teacher is sure')
    q.add_argument('--first', action='store_true', help='train first, instead of reading out/train')
    q.add_argument('--first-iters', type=int)
    q.add_argument('--seed', type=int, default=0)
    q.add_argument('--ema', type=float, default=0.0)
    q.add_argument('--images', type=int, help='training images')
    q.add_argument('--labelled-images', type=int, help='scored images')
    q.add_argument('--write', action='store_true', help='write results/selftrain.md')
    return q.parse_args()


def first_labels(a, root):
    "The labels of stage panoptic."
    coco, n = read_json('out/panoptic/instances.json'), a.images
    if n:
        chosen = coco['images'][:: len(coco['images']) // n][:n]
        ids = {im['id'] for im in chosen}
        coco = instances_json(chosen, [x for x in coco['annotations'] if x['image_id'] in ids], coco['categories'])
    return PseudoLabels(root, coco, 'out/panoptic/stuff')


def trained(a, params, both, fit, folder):
    "The network that both go on from."
    net = read_network('out/train')
    if not a.first:
        return net
    torch.manual_seed(a.seed)
    sizes = {k: net.config[k] for k in ('n_things', 'n_stuff')}
    net = build_model({**both['network'], **sizes})
    load_weights(net, 'out/cutler/model.safetensors', without=CLASS_LAYERS)
    fit(net, a.seed, both['solver'], folder / 'first')
    return net


def main():
    a = arguments()
    params, folder = read_yaml('params.yaml'), Path(a.folder)
    p, root = params['train'], params['data']['root']
    a.labelled = a.labelled or root
    both = {k: {**params[k], **p[k]} for k in ('solver', 'augment', 'network')}  # what differs laid over what is shared
    changes = dict(ema_decay=a.ema) | (dict(n_iters=a.first_iters) if a.first_iters else {})
    both['solver'], augment = Solver(**both['solver'] | changes), Augment(**both['augment'])
    rounds = p['self_training'] | dict(score_threshold=[a.threshold]) | (dict(n_iters=a.iters) if a.iters else {})
    again = replace(both['solver'], n_iters=rounds['n_iters'])
    data = first_labels(a, root)

    def fit(net, seed, solver, folder):
        train.fit(net, Batches(data, augment, batch_size=solver.batch_size, seed=seed), solver, folder=folder)

    net = trained(a, params, both, fit, folder)
    start, table = {k: v.clone() for k, v in net.state_dict().items()}, []
    for name in ('before', 'control', 'round'):
        net.load_state_dict(start)
        t = time.process_time()
        if name == 'control':
            fit(net, a.seed + 1, again, folder / 'control')
        if name == 'round':
            options = dict(solver=both['solver'], augment=augment, seed=a.seed, **rounds)
            self_train(net, train.fit, root, data.images, folder / 'rounds', **options)
        print(f'{name}: {(time.process_time() - t) / 60:.1f} CPU minutes', flush=True)
        new = [*lines(name, measure(net, a, params, folder / f'scores_{name}'))]
        print('\n'.join(new), flush=True)
        table += new
    source = f'a first training of seed {a.seed}' if a.first else 'the published model'
    ema = f'averaged weights of decay {a.ema}' if a.ema else 'weights that are not averaged'
    n, rated = (
        rounds['n_iters'],
        f'from scores of {rounds["score_threshold"][0]} on, the best {rounds["top_fraction"]:.0%}',
    )
    how = (
        f'Seed {a.seed}, on {root if a.labelled == root else "DIR"}. *before*: {source}. '
        f'*control*: {n} iterations more with the labels of stage panoptic. '
        f'*round*: as many with the labels of the teacher, {rated} of each class; {ema}. In %.'
    )
    head = ['| | split | mapping | ' + ' | '.join(SCORES) + ' |', '|---' * (3 + len(SCORES)) + '|']
    title = heading('A round of self-training', torch.get_num_threads(), ['torch'], how)
    publish([*title, *head, *table], Path(__file__).parent / 'results' / 'selftrain.md' if a.write else None)


if __name__ == '__main__':
    main()
