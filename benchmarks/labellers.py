"""SmooSeg and CAUSE against STEGO and k-means on the same features: PixelAcc and mIoU one-to-one, maps without CRF.

    python benchmarks/labellers.py --labelled DIR [--seeds 5] [--axes 64] [--cache FILE] [--out FILE.md] [--sweep]

DIR holds `objects/` and `scenes/` with a labelled split `val`: `data/embedded`, or images drawn from another seed to
tune on. Training sees the images of `params.yaml` without labels. Settings are those of `params.yaml` and, of SmooSeg
and CAUSE, what `configs/smooseg.yaml` and `configs/cause.yaml` change. Each labeller is scored with the clusters that
it learned (`sgd`) and with those of k-means on its codes. Scores are kept beside FILE.md as CSV; a run that was killed
goes on with the rows that are missing. --axes projects the features of all labellers on so many axes, which is faster.
--sweep prints what other settings of SmooSeg and CAUSE score, seed 0.
"""

import argparse, csv, statistics, tempfile, time
from pathlib import Path

import torch
import yaml

from stego import fit_args, prepare, project, summary
from u2seg.cause import fit_cause
from u2seg.correspondence import nearest_images
from u2seg.recipes import differences
from u2seg.smooseg import fit_smooseg
from u2seg.stego import fit_kmeans, fit_stego, refit_probe

SCORES = 'acc', 'miou', 'stuff_acc', 'stuff_miou', 'majority'
COMMON = 'n_classes', 'code_dim', 'dropout', 'n_iters', 'batch_size', 'lr', 'lr_probe'
ROWS = ('k-means', 'kmeans'), *((name, p) for name in ('STEGO', 'SmooSeg', 'CAUSE') for p in ('sgd', 'kmeans'))


SWEEP = dict(
    SmooSeg=[
        dict(b_rand=0.5),
        dict(b_rand=0.5, decay=0.95),
        dict(b_rand=0.5, decay=0.998),
        dict(b_rand=0.5, temperature=0.05),
        dict(b_rand=0.5, temperature=0.3),
        dict(b_self=0.1, b_rand=0.5),
        dict(b_self=0.3, b_rand=0.3),
        dict(b_self=0.3, b_rand=0.6),
        dict(b_self=0.7, b_rand=0.7),
    ],
    CAUSE=[
        dict(positive=0.3, negative=0.1),
        dict(positive=0.8, negative=0.4),
        dict(n_concepts=32),
        dict(n_concepts=256),
    ],
)


def settings(p, name):
    "Section `stego` with a recipe laid over it, own subsection included."
    changes = differences(name, Path('.'))[0]['stego']
    return p | changes | {name: p[name] | changes.get(name, {})}


def fit(name, p, features, neighbors, seed, folder, own={}):
    options = dict(seed=seed, folder=folder)
    if name == 'STEGO':
        return fit_stego(features, neighbors, **fit_args(p), **options)
    if name == 'k-means':
        return fit_kmeans(features, n_classes=p['n_classes'], code_dim=64, smooth=1, seed=seed)
    s = settings(p, name.lower())
    options |= {k: s[k] for k in COMMON} | s[name.lower()] | own
    if name == 'SmooSeg':
        return fit_smooseg(features, pointwise=s['pointwise'], **options)
    return fit_cause(features, n_points=s['n_points'], **options)


def measure(rows, path, p, features, neighbors, truth, seeds):
    "Rows (labeller, probe, seed) -> scores, written after each training."
    for seed in seeds:
        for name in dict.fromkeys(name for name, _ in ROWS):
            probes = [probe for n, probe in ROWS if n == name]
            if all((name, probe, seed) in rows for probe in probes):
                continue
            t = time.process_time()
            with tempfile.TemporaryDirectory() as folder:
                labeller = fit(name, p, features, neighbors, seed, folder)
            seconds = time.process_time() - t
            for probe in probes:
                refit = probe == 'kmeans' and name != 'k-means'
                scored = refit_probe(labeller, features, seed=seed) if refit else labeller
                rows[name, probe, seed] = dict(summary(truth.votes(scored)), seconds=seconds)
                print(
                    name, probe, seed, {k: round(float(v), 3) for k, v in rows[name, probe, seed].items()}, flush=True
                )
            write(path, rows)
    return rows


def sweep(p, features, neighbors, truth):
    for name, changes in SWEEP.items():
        for own in ({}, *changes):
            with tempfile.TemporaryDirectory() as folder:
                labeller = fit(name, p, features, neighbors, 0, folder, own)
            refit = refit_probe(labeller, features, seed=0)
            for probe, scored in dict(sgd=labeller, kmeans=refit).items():
                shown = {k: round(float(v), 3) for k, v in summary(truth.votes(scored)).items()}
                print(name, own or 'as chosen', probe, shown, flush=True)


def write(path, rows):
    with open(path, 'w') as f:
        w = csv.writer(f, lineterminator='\n')
        w.writerow(['labeller', 'probe', 'seed', *SCORES, 'seconds'])
        for key, r in rows.items():
            w.writerow([*key, *(f'{float(r[k]):.4f}' for k in SCORES), f'{r["seconds"]:.0f}'])


def read(path):
    if not Path(path).exists():
        return {}
    keys = lambda r: (r['labeller'], r['probe'], int(r['seed']))
    return {keys(r): {k: float(r[k]) for k in (*SCORES, 'seconds')} for r in csv.DictReader(open(path))}


def spread(values):
    if len(values) == 1:
        return f'{100 * values[0]:.1f}'
    return f'{100 * statistics.mean(values):.1f} ± {100 * statistics.stdev(values):.1f}'


def table(rows, probe_of_stego):
    "Percent, mean and standard deviation over the seeds; differences to STEGO seed by seed."
    seeds = sorted({seed for _, _, seed in rows})
    head = 'labeller | clusters | PixelAcc | mIoU | stuff PixelAcc | stuff mIoU | PixelAcc by vote'
    lines = [f'| {head} | PixelAcc - STEGO | mIoU - STEGO | CPU s |', '|---' * 10 + '|']
    for name, probe in ROWS:
        mine = [s for s in seeds if (name, probe, s) in rows]
        get = lambda k: [rows[name, probe, s][k] for s in mine]
        both = [s for s in mine if ('STEGO', probe_of_stego, s) in rows]
        gain = lambda k: [rows[name, probe, s][k] - rows['STEGO', probe_of_stego, s][k] for s in both]
        if mine:
            cells = [name, probe, *(spread(get(k)) for k in SCORES), *(spread(gain(k)) for k in ('acc', 'miou'))]
            lines.append('| ' + ' | '.join([*cells, f'{statistics.median(get("seconds")):.0f}']) + ' |')
    return '\n'.join(lines), len(seeds)


def main():
    q = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    q.add_argument('--labelled', required=True)
    q.add_argument('--backbone', default='out/features/backbone.safetensors')
    q.add_argument('--seeds', type=int, default=5)
    q.add_argument('--axes', type=int, default=0)
    q.add_argument('--cache')
    q.add_argument('--sweep', action='store_true')
    q.add_argument('--out', default='benchmarks/results/labellers.md')
    args = q.parse_args()
    params = yaml.safe_load(Path('params.yaml').read_text())
    p, scores = params['stego'], Path(args.out).with_suffix('.csv')
    torch.set_num_threads(1)
    features, pooled, truth, _ = prepare(args, p, params['data'])
    neighbors, note = nearest_images(pooled, p['n_neighbors']), ''
    if args.axes:
        features, kept = project(features, truth, args.axes)
        note = f' on their first {args.axes} axes ({kept:.1%} of their squares)'
    if args.sweep:
        return sweep(p, features, neighbors, truth)
    rows = measure(read(scores), scores, p, features, neighbors, truth, range(args.seeds))
    text, n_seeds = table(rows, p['probe'])
    axes = f' --axes {args.axes}' if args.axes else ''
    Path(args.out).write_text(f"""# Labellers

`python benchmarks/labellers.py --labelled {args.labelled}{axes} --seeds {n_seeds}`, one thread.
{len(truth.maps)} labelled images; {p['n_classes']} clusters matched one-to-one to 8 thing and 6 stuff classes; "stuff":
pixels of the 6 stuff classes alone, matched one-to-one anew. Trained on {len(features)} images without labels.
Features `{p['feature']}`{note}, the same for all; maps at {truth.size} px without CRF. "clusters": `sgd` as learned in
training, `kmeans` computed anew from the codes. Percent, mean ± standard deviation of {n_seeds} seeds; differences to
STEGO with `{p['probe']}`, seed by seed.

{text}
""")


if __name__ == '__main__':
    main()
