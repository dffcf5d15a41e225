"""Settings tried on a development set: images drawn from another seed than those that the tables report.

    python benchmarks/development.py NAME [KEY=VALUE ...] [--recipe plus] --work DIR [--trained out/train]

Runs stage `train` and all before it with these settings (`dvc exp run` in a clone under DIR, so what is cached is not
computed again), or takes a trained model (--trained; settings are then of train.network, and change how it decides).
Scores it on 200 images of each kind drawn from seed 20117 under DIR/development, clusters named by vote on the training
images that stage evaluate takes: what the model decides for clusters, and what it decides by name. Writes a line for
each and each split to results/development.csv, in the place of those of the same name.
"""

import argparse
import csv
from pathlib import Path

import torch
import yaml
from selftrain import measure

from u2seg import sweep
from u2seg.checkpoints import load_weights
from u2seg.device import own_device
from u2seg.evaluate import BY_NAME
from u2seg.model import build_model, read_config
from u2seg.results import select
from u2seg.scenes import draw_dataset
from u2seg.stage import load_params

COLUMNS = (
    'agnostic_mask_AP50 mask_AP50 mask_AR100 PixelAcc mIoU PQ PQ_things PQ_stuff PQ_merged PQ_merged_stuff'.split()
)
TABLE = Path(__file__).parent / 'results' / 'development.csv'


def arguments():
    q = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    q.add_argument('name')
    q.add_argument('settings', nargs='*', help='parameters of params.yaml, such as stego.n_classes=28')
    q.add_argument('--recipe', help='of configs/, below the settings')
    q.add_argument('--work', required=True, type=Path)
    q.add_argument('--trained', type=Path, help='folder of a model: nothing is run')
    q.add_argument('--n-images', type=int, default=200, help='of each kind')
    q.add_argument('--out', type=Path, default=TABLE)
    return q.parse_intermixed_args()


def development_set(folder, n):
    "Draw it, unless it is there."
    if not (folder / 'done').exists():
        draw_dataset(folder, seed=20117, n_train=0, n_val=n)
        (folder / 'done').touch()
    return folder


def run(a, settings):
    "Train in a clone; the folder of the model."
    recipe = sweep._recipe(Path('configs'), a.recipe) if a.recipe else {}
    settings = recipe | settings
    experiment = dict(name=f'development-{a.name}', set=settings, targets=['train'])
    sweep.check_experiments([experiment])
    clone = a.work / f'clone-{a.name}'
    sweep.make_clone(Path('.'), clone)
    sweep.run_experiment(experiment, Path('.'), clone)
    return clone / 'out' / 'train'


def network(a):
    "The model: of a run, or a trained one."
    settings = {k: yaml.safe_load(v) for k, v in (s.split('=', 1) for s in a.settings)}
    folder = a.trained or run(a, settings)
    config = read_config(folder / 'model.yaml')
    for k, v in settings.items() if a.trained else ():
        section, _, name = k.rpartition('.')
        if section != 'train.network' or name not in config:
            raise ValueError(f'{k}: a trained model takes settings of train.network alone')
        config[name] = v
    net = build_model(config).to(own_device())
    load_weights(net, folder / 'model.safetensors')
    return net


def write(path, name, settings, rows):
    names = {'U2Seg': name, BY_NAME: f'{name}, by name'}
    old = list(csv.DictReader(open(path))) if path.exists() else []
    kept = [r for r in old if r['name'] not in names.values()]
    at = next((i for i, r in enumerate(old) if r['name'] in names.values()), len(old))
    rows = sorted(rows, key=lambda r: r['method'] == BY_NAME)
    heads = [dict(name=names[r['method']], settings=settings, split=r['split']) for r in rows]
    new = [h | {k: f'{r[k]:.4f}' for k in COLUMNS if k in r} for h, r in zip(heads, rows)]
    with open(path, 'w', newline='') as f:
        writer = csv.DictWriter(f, ['name', 'settings', 'split', *COLUMNS], lineterminator='\n')
        writer.writeheader()
        writer.writerows(kept[:at] + new + kept[at:])


def main():
    a = arguments()
    torch.set_num_threads(1)
    a.labelled, a.labelled_images = development_set(a.work / 'development', a.n_images), None
    found = measure(network(a), a, load_params(), a.work / f'scores-{a.name}', by_name=True)
    rows = select(found, fitted_on='train', matching='vote')
    settings = ' '.join(([f'recipe {a.recipe}'] if a.recipe else []) + a.settings)
    write(a.out, a.name, settings, rows)
    for r in rows:
        print(a.name, r['method'], r['split'], *(f'{k} {100 * r[k]:.1f}' for k in COLUMNS if k in r))


if __name__ == '__main__':
    main()
