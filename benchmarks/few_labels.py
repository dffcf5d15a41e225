"""Does DropLoss help where labels are few but complete, and how much of U2Seg+'s lead is that it does without?

    python benchmarks/few_labels.py --work DIR [--seeds 5] [--inits u2seg cutler] [--minutes M] [--out FILE.md]

U2Seg+ is fine-tuned without DropLoss (`fewshot.droploss`), the other initial weights with it. Here the weights of
U2Seg and of CutLER, from stages train and cutler on the embedded data, are fine-tuned both ways, in turns, as stage
fewshot does it. A seed draws the labelled images, the class layers, the order of the images and what is pasted, the
same for both ways, so differences are taken seed by seed. What DIR holds, or stage fewshot has made itself, is not
made again; after M minutes no run begins, and the tables show the seeds that both ways have.
"""

import argparse
import itertools
import os
import time
from pathlib import Path

import numpy as np
import torch
from machine import heading, publish

from u2seg.augment import Augment
from u2seg.fewshot import few_shot, few_shot_jobs
from u2seg.images import read_json
from u2seg.matching import file_hash
from u2seg.stage import read_yaml, stage_params
from u2seg.sweep import read_sweep

ROOT = Path(__file__).resolve().parents[1]
OUT, SWEEPS = ROOT / 'out', ROOT / 'ablations/sweeps.yaml'
INITS = 'u2seg', 'cutler'
WAYS = 0.0, 0.01  # fewshot.droploss of U2Seg+, of the others
SCORES = dict(mask_AP='mask AP', PQ='PQ', PQ_things='PQ, things', PQ_stuff='PQ, stuff')
HOW = (
    'Embedded data, mean over the validation folders, {n} images of each, in percent: mean ± standard deviation over '
    'seeds of the labelled images, with one set of weights ({weights}). In brackets: with how many seeds the '
    'difference is above zero. {own} of {all} runs are those of stage fewshot.'
)


def iterations():
    "Of each percentage: those of params.yaml, and of the sweep behind README's table, which has more percentages."
    base, own = read_sweep(SWEEPS, 'seeds')['base'], stage_params(ROOT, 'fewshot')
    more = dict(zip(base['fewshot.percents'], base['fewshot.n_iters']))
    return more | dict(zip(own['percents'], own['n_iters']))


def made(job, droploss, p):
    "The run of stage fewshot, if it has made this one."
    path, names = OUT / 'fewshot/metrics.json', ('init', 'percent', 'seed', 'n_iters')
    runs = read_json(path)['runs'] if path.exists() and droploss == p['droploss'] else []
    return next((r for r in runs if all(r[k] == job[k] for k in names)), None)


def make(job, droploss, p, folder):
    config = read_yaml(OUT / 'train/model.yaml') | dict(droploss=droploss)
    options = {k: p[k] for k in ('solver', 'n_val', 'n_workers')}
    options |= dict(root=ROOT / p['data_root'], train=p['data_train'], val=p['data_val'], config=config)
    return few_shot(job, **options, augment=Augment(**p['augment']), folder=folder)


def measure(jobs, p, work, minutes):
    "(init, percent, way) -> seed -> scores in percent; how many runs are of the stage."
    found, n_own, start = {}, 0, time.time()
    for job, way in itertools.product(jobs, WAYS):
        name = f'{job["init"]}-{job["percent"]}-{job["seed"]}-{way}'
        own = made(job, way, p)
        if not own and not (work / name / 'result.json').exists() and time.time() - start > 60 * minutes:
            continue
        result, n_own = own or make(job, way, p, work / name), n_own + bool(own)
        scores = {k: 100 * result[k] for k in SCORES}
        print(name, *(f'{SCORES[k]} {v:.1f}' for k, v in scores.items()), sep='  ', flush=True)
        found.setdefault((job['init'], job['percent'], way), {})[job['seed']] = scores
    return found, n_own


def paired(found, keys, score):
    "A score of several (init, percent, way), of the seeds that all have: [keys, seeds]."
    runs = [found.get(k, {}) for k in keys]
    seeds = sorted(set.intersection(*map(set, runs)))
    return np.array([[r[s][score] for s in seeds] for r in runs])


def spread(values, sign=''):
    return f'{np.mean(values):{sign}.1f}' + (f' ± {np.std(values, ddof=1):.1f}' if len(values) > 1 else '')


def difference(d):
    return f'{spread(d, "+")} ({(d > 0).sum()} of {len(d)})'


def tables(found, percents):
    "Markdown: each score without DropLoss and with it, and what U2Seg's weights are ahead of CutLER's."
    line = lambda words: f'| {" | ".join(words)} |'
    table = lambda head, rows: ['', line(head), line(['---'] * len(head)), *map(line, rows)]
    for score, name in SCORES.items():
        rows = []
        for init, percent in itertools.product(INITS, percents):
            x = paired(found, [(init, percent, way) for way in WAYS], score)
            if x.size:
                rows.append([init, f'{percent}%', *map(spread, x), difference(x[0] - x[1])])
        yield from table([name, 'labels', 'without DropLoss', 'with it', 'difference'], rows)
    rows = []
    for percent in percents:
        x = paired(found, [(i, percent, way) for i in INITS for way in WAYS], 'mask_AP')
        if x.size:
            rows.append([f'{percent}%', *(difference(x[a] - x[b]) for a, b in ((0, 2), (1, 3), (0, 3)))])
    yield from table(['u2seg above cutler, mask AP', 'both without', 'both with it', 'u2seg alone without'], rows)


def main():
    p, of = stage_params(ROOT, 'fewshot'), iterations()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--work', type=Path, required=True, help='folder of the runs')
    parser.add_argument('--seeds', type=int, default=5)
    parser.add_argument('--percents', type=int, nargs='+', default=p['percents'], choices=list(of))
    parser.add_argument('--inits', nargs='+', default=INITS, choices=INITS)
    parser.add_argument('--minutes', type=float, default=float('inf'))
    parser.add_argument('--out', type=Path, help='default: print alone')
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get('OMP_NUM_THREADS', 1)))
    options = dict(percents=args.percents, n_iters=[of[x] for x in args.percents], inits=args.inits)
    jobs = [job for seed in range(args.seeds) for job in few_shot_jobs(OUT, seeds=[seed], **options)]
    found, own = measure(jobs, p, args.work, args.minutes)
    weights = ', '.join(f'{s} {file_hash(OUT / s / "model.safetensors")[:8]}' for s in ('train', 'cutler'))
    how = HOW.format(n=p['n_val'], weights=weights, own=own, all=sum(map(len, found.values())))
    lines = heading('DropLoss where labels are few', torch.get_num_threads(), ['torch'], how)
    publish([*lines[:-1], *tables(found, args.percents)], args.out)


if __name__ == '__main__':
    main()
