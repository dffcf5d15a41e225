"""What CutLER's self-training rounds gain: the detector after the first training, after each round, and, as control,
trained on as long with the labels it had.

    python benchmarks/rounds.py --labels out/maskcut/instances.json --folder /tmp/rounds --write

Trained as stage `cutler` says in params.yaml; scored without classes on images drawn from another seed (`--dev`
names a folder that holds such images already). Killed, it goes on.
"""

import argparse
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
import torch

from u2seg import scenes, train
from u2seg.batches import Batches, PseudoLabels
from u2seg.selftrain import detect, self_training_labels
from u2seg.augment import Augment
from u2seg.baselines import ImagePrediction
from u2seg.evaluate import score_agnostic
from u2seg.truth import read_truth
from u2seg.images import read_json, write_json
from u2seg.masks import mask_to_box, decode_rle
from u2seg.model import build_model
from u2seg.solver import Solver
from u2seg.stage import read_yaml


def scores(net, root, shares, folder) -> dict:  # share -> AP50 ..., of boxes and masks
    "Class-agnostic scores on images with ground truth."
    out, c = {}, net.config
    for share in shares:
        path = Path(folder) / f'{share.replace("/", "_")}.json'
        if not path.exists():
            truth = read_truth(root, share)
            images = [dict(id=im['id'], file_name=im['file_name']) for im in truth.images]
            _, found, _ = detect(
                net,
                root,
                images,
                score_threshold=0.02,
                n_max=100,
                batch_size=16,
                short=c['min_size'],
                max_size=c['max_size'],
                folder=Path(folder) / share.replace('/', '_'),
            )
            for a in found:
                a['bbox'] = mask_to_box(decode_rle(a['segmentation']))
            predictions = {im['id']: ImagePrediction(instances=[]) for im in images}
            for a in found:
                predictions[a['image_id']].instances.append(a)
            write_json(path, score_agnostic(predictions, truth))
        out[share] = read_json(path)
    return out


def relabel(net, root, labels, score_threshold, folder):
    "The labels of a round."
    c = net.config
    _, found, _ = detect(
        net,
        root,
        labels['images'],
        score_threshold=score_threshold,
        n_max=30,
        batch_size=16,
        short=c['min_size'],
        max_size=c['max_size'],
        folder=folder,
    )
    return self_training_labels(labels, found, score_threshold=score_threshold), len(found)


def row(name, n_iters, n_labels, by_share):
    mean = {k: np.mean([s[k] for s in by_share.values()]) for k in next(iter(by_share.values()))}
    each = ' | '.join(
        f"{100 * s['agnostic_mask_AP50']:.1f} / {100 * s['agnostic_mask_AR100']:.1f}" for s in by_share.values()
    )
    columns = ('mask_AP50', 'mask_AP', 'mask_AR100', 'box_AP50')
    all_shares = ' | '.join(f'{100 * mean[f"agnostic_{k}"]:.1f}' for k in columns)
    return f'| {name} | {n_iters} | {n_labels} | {all_shares} | {each} |'


if __name__ == '__main__':
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument('--labels', default='out/maskcut/instances.json')
    a.add_argument('--params', default='params.yaml')
    a.add_argument('--root', default='data/embedded', help='folder of the images')
    a.add_argument('--dev', help='folder with objects/val, scenes/val and their annotations; none: drawn')
    a.add_argument('--folder', required=True, help='checkpoints and shards')
    a.add_argument('--iters', type=int, help='of the first training')
    a.add_argument('--round-iters', type=int)
    a.add_argument('--thresholds', type=float, nargs='+', default=[0.7, 0.65], help='one a round')
    a.add_argument('--seed', type=int, default=0)
    a.add_argument('--write', action='store_true', help='write results/rounds.md')
    a = a.parse_args()
    params, folder, shares = read_yaml(a.params), Path(a.folder), ['objects/val', 'scenes/val']
    p = params['cutler']
    both = {k: {**params[k], **p[k]} for k in ('solver', 'augment', 'network')}  # what differs laid over what is shared
    n, m = a.iters or p['solver']['n_iters'], a.round_iters or p['self_training']['n_iters']
    solver, augment = Solver(**both['solver'] | dict(n_iters=n)), Augment(**both['augment'])
    again = replace(solver, n_iters=m, lr=p['self_training']['lr'])
    if not a.dev:
        a.dev = folder / 'dev'
        if not (a.dev / 'scenes').exists():
            scenes.draw_dataset(a.dev, seed=12345, n_train=1, n_val=200, kinds=('objects', 'scenes'), n_workers=1)
    labels = read_json(a.labels)

    def fit(coco, seed, solver, folder):
        data = PseudoLabels(a.root, coco, skip_empty=True)
        train.fit(net, Batches(data, augment, batch_size=solver.batch_size, seed=seed), solver, folder=folder)

    torch.manual_seed(a.seed)
    net = build_model({**both['network'], 'n_things': 1, 'n_stuff': 0})
    fit(labels, a.seed, solver, folder / 'round0')
    first = {k: v.clone() for k, v in net.state_dict().items()}
    lines = [row('first training', n, len(labels['annotations']), scores(net, a.dev, shares, folder / 'scores0'))]
    print(lines[-1], flush=True)
    for kind in 'round', 'round with DropLoss', 'control':
        net.load_state_dict(first)
        coco = labels
        net.roi_heads.droploss = 0.0 if kind == 'round' else net.config['droploss']
        at = kind.replace(' ', '_')
        for r, score_threshold in enumerate(a.thresholds, 1):
            if kind != 'control':
                coco, _ = relabel(net, a.root, coco, score_threshold, folder / f'labels_{at}{r}')
            fit(coco, a.seed + r, again, folder / f'{at}{r}')
            lines.append(
                row(
                    f'{kind} {r}',
                    n + r * m,
                    len(coco['annotations']),
                    scores(net, a.dev, shares, folder / f'scores_{at}{r}'),
                )
            )
            print(lines[-1], flush=True)
    text = '\n'.join(
        [
            f'# Self-training rounds, {date.today()}',
            '',
            f'`python benchmarks/rounds.py`, torch {torch.__version__}, seed {a.seed}, score thresholds '
            f'{a.thresholds}; class-agnostic, in %, mean of 200 object-centric '
            'and 200 scene-centric images drawn from another seed. '
            '*round*: labels of the detector so far, DropLoss off, '
            'as in CutLER. *control*: trained on as long with MaskCut\'s labels and DropLoss.',
            '',
            '| | iterations | labels | mask AP50 | mask AP | mask AR100 | box AP50 | objects AP50 / AR100 | scenes '
            'AP50 / AR100 |',
            '|---|---|---|---|---|---|---|---|---|',
            *lines,
        ]
    )
    print(text)
    if a.write:
        (Path(__file__).parent / 'results').mkdir(exist_ok=True)
        (Path(__file__).parent / 'results' / 'rounds.md').write_text(text + '\n')
