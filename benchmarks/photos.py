"""The road of README's "Your own images" from end to end, by its commands: what each takes and leaves.

    python benchmarks/photos.py --work DIR [--photos FOLDER]      # writes benchmarks/results/photos.md

The photographs are a folder of the user's, with ground truth in `annotations` beside it or without; or sixty scenes,
drawn, enlarged to the sizes of photographs, with theirs. The weights are random, in the files of their publishers, and
`REDUCED` is laid over the recipe `photos`: masks, clusters and names mean nothing. What is measured is the road.
DIR, which is not there before, keeps everything to look at.
"""

import argparse
import csv
import json
import resource
import shlex
import shutil
import signal
import urllib.request
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import yaml
from machine import heading
from PIL import Image
from pycocotools.coco import COCO
from recipe import FEW, ROOT, STAGES, make_weights, run

from u2seg.export import FORMATS
from u2seg.images import list_images, read_json, write_json
from u2seg.masks import write_ids
from u2seg.recipes import overlay
from u2seg.scenes import coco_panoptic, draw_scene, truth
from u2seg.textures import STUFF, THINGS
from u2seg.truth import annotation_file

SOLVER = dict(FEW, accumulate=1)
REDUCED = dict(  # what is laid over the recipe
    features=dict(weights='weights/dino_deitsmall8_300ep_pretrain.pth'),
    augment=dict(short_sides=[224, 320], max_size=400),
    network=dict(
        depth=18, fpn_channels=32, fc_dim=64, mask_dim=32, sem_dim=32, min_size=280, max_size=400, max_detections=10
    ),
    maskcut=dict(size=160, n_procs=1),
    cutler=dict(solver=dict(SOLVER, n_iters=4), detect=dict(score_threshold=0.0, n_max=4, n_procs=1), n_workers=0),
    cluster=dict(score_threshold=0.0, crop_size=112),
    stego=dict(n_iters=4, size=112, crf=None, n_procs=1, segment=dict(size=224)),
    train=dict(solver=dict(SOLVER, n_iters=4), n_workers=0),
    evaluate=dict(n_procs=1),
    fewshot=dict(percents=[50], n_iters=[2], solver=FEW, n_val=4, n_procs=1, n_workers=0),
)
HOW = '*CPU*: of one core; *wall* holds what else the machine did. *GB*: the largest process, or what started it (≤).'
FINETUNE = ['--n-iters', 4]
SHOWN = dict(  # of the metrics of a stage
    maskcut='n_images n_masks',
    cutler='n_images n_instances',
    cluster='n_instances k',
    stego='n_images n_classes',
    panoptic='n_images n_instances',
    train='n_images iterations',
    evaluate='n_clusters n_stuff',
)
READ = {  # format -> objects that its files hold
    'coco': lambda out: sum(len(COCO(f).anns) for f in out.glob('instances_*.json')),
    'coco-panoptic': lambda out: sum(
        len(a['segments_info']) for f in out.glob('panoptic_*.json') for a in read_json(f)['annotations']
    ),
    'yolo': lambda out: sum(len(f.read_text().splitlines()) for f in out.glob('labels/*/*.txt')),
    'label-studio': lambda out: sum(len(t['predictions'][0]['result']) for t in read_json(out / 'tasks.json')),
    'cvat': lambda out: (out / 'annotations.xml').read_text().count('<mask '),
    'voc': lambda out: sum(np.count_nonzero(np.unique(Image.open(f))) for f in out.glob('SegmentationObject/*.png')),
    'png': lambda out: sum(np.count_nonzero(np.unique(Image.open(f))) for f in out.glob('objects/*.png')),
}


def draw(folder, n):
    "Scenes of 768 to 1,920 px, every twentieth of 11 to 16 megapixels, and their panoptic ground truth beside them."
    rng = np.random.default_rng(18)
    folder.mkdir(parents=True)
    segments, sizes = [], []
    for i in range(1, n + 1):
        long = int(rng.uniform(4100, 4850) if i % 20 == 6 else rng.uniform(768, 1921))
        width, height = (long, 2 * long // 3) if i % 4 else (2 * long // 3, long)
        image, ids, own = draw_scene((18, i), 'scenes', 512)
        box = (0, 0, 512 * width // long, 512 * height // long)
        image, ids = (Image.fromarray(x).crop(box) for x in (image, ids))
        image.resize((width, height), Image.Resampling.BICUBIC).save(folder / f'{i:06d}.jpg', quality=90)
        ids = np.asarray(ids.resize((width, height), Image.Resampling.NEAREST))
        ids, own = truth(ids, [(THINGS + STUFF)[s['category_id'] - 1] for s in own])
        write_ids(folder.parent / 'annotations' / f'panoptic_{folder.name}' / f'{i:06d}.png', ids)
        segments.append(own)
        sizes.append(dict(width=width, height=height))
    coco = coco_panoptic(segments)
    coco['images'] = [im | size for im, size in zip(coco['images'], sizes)]
    write_json(folder.parent / 'annotations' / f'panoptic_{folder.name}.json', coco)


def reduce(root, photos):
    "Lay `REDUCED` over params.yaml, name the ground truth if there is one, and write random weights."
    params = overlay(yaml.safe_load((root / 'params.yaml').read_text()), REDUCED)
    params['data']['val'] = ['.'] if annotation_file(photos, '.').is_file() else []
    (root / 'params.yaml').write_text(yaml.safe_dump(params, sort_keys=False))
    make_weights(params, root)


def fill(table):
    "What a person does with a table of names: two clusters are one class, one is discarded, one of stuff has a name."
    rows = list(csv.DictReader(table.open(encoding='utf-8-sig')))
    for row, name in zip(rows, ('animal', 'animal')):
        row['name'] = name
    rows[2]['discard'] = 'x'
    rows[-1]['name'] = 'ground'
    with table.open('w', newline='') as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def visit(process):
    "What a browser does with the page of `u2seg name`: opens it, shows a cluster without a name, and names it."
    url = process.stdout.readline().strip()

    def ask(path, body=None):
        origin = url.rsplit('/', 2)[0]
        headers = {'Content-Type': 'application/json', 'Origin': origin} if body else {}
        request = urllib.request.Request(url + path, json.dumps(body).encode() if body else None, headers)
        return urllib.request.urlopen(request).read()

    ask('')
    state = json.loads(ask('api/state?since=0'))
    label = next(c['label'] for c in state['changed'] if not c['name'] and not c['gone'] and c['size'])
    shown = json.loads(ask(f'api/cluster/{label}'))
    for row in shown['typical'] + shown['doubtful']:
        ask(f'crop/{row}.jpg')
    said = json.loads(ask('api/act', dict(do='name', labels=[label], name='plant', since=0, seen=state['version'])))
    process.send_signal(signal.SIGINT)
    return f'{process.stdout.read()}{said["said"]}: {len(shown["typical"])} crops'


def correct(exported, chosen, file):
    "Labels of the chosen images, as a person would save them who has nothing to correct."
    parts = [read_json(f) for f in sorted(exported.glob('instances_*.json'))]
    images = [im for p in parts for im in p['images'] if im['file_name'] in chosen]
    ids = {im['id'] for im in images}
    own = [a for p in parts for a in p['annotations'] if a['image_id'] in ids]
    own = [dict(a, id=i) for i, a in enumerate(own, 1)]
    write_json(file, dict(images=images, annotations=own, categories=parts[0]['categories']))


def shown(root, stage):
    metrics = read_json(root / 'out' / stage / 'metrics.json')
    return ', '.join(f'{k} {metrics[k]}' for k in SHOWN.get(stage, '').split())


def walk(root, photos):
    "The commands in their order; (words, seconds, GB, result) of each."
    rows = []

    def do(*words, result=lambda lines: lines[-1], **options):
        used = run(root, *words, **options)
        lines = used['printed'].strip().splitlines()
        said = result(lines)
        rows.append(dict(used, words=words, said=said))
        print(f'{used["cpu"]:5.0f} s  u2seg {shlex.join(map(str, words))}: {said}', flush=True)
        return lines

    do('use', 'photos', '--images', photos, result=lambda lines: lines[0].replace(str(photos), 'FOLDER'))
    reduce(root, photos)
    do('check')
    for stage in STAGES:
        do('run', stage, result=lambda _: shown(root, stage))
    do('predict', photos, '--out', 'segmented')
    do('name', '--csv', 'names.csv')
    fill(root / 'names.csv')
    do('name', '--csv', 'names.csv')
    do('name', during=visit)
    do('predict', photos, '--out', 'named', '--score', 0)
    chosen = do('suggest', 'named', result=lambda lines: f'names of {len(lines)} images')
    for fmt in FORMATS:
        out = root / 'exported' / fmt
        do('export', 'named', '--format', fmt, '--out', f'exported/{fmt}', '--score', 0, result=lambda lines: lines[0])
        with redirect_stdout(StringIO()):
            rows[-1]['said'] += f'; read back: {READ[fmt](out)}'
    do('export', 'out/panoptic', '--format', 'coco', '--out', 'exported/panoptic', '--score', 0)
    correct(root / 'exported' / 'coco', chosen, root / 'corrected.json')
    labels = ['--labels', 'corrected.json', '--images', photos]
    do('finetune', *labels, '--weights', 'out/train', '--out', 'own', *FINETUNE)
    do('predict', photos, '--weights', 'own', '--out', 'better')
    return rows


def report(rows, photos):
    "Markdown: the images, what was reduced, and each command."
    sizes = []
    for im in list_images(photos, ['.']):
        try:
            sizes.append(Image.open(photos / im['file_name']).size)
        except OSError:  # which the stages have left out
            continue
    large = [w * h / 1e6 for w, h in sizes if w * h > 1e7]
    about = f'{len(sizes)} images of {min(map(max, sizes))} to {max(map(max, sizes))} px, the long side. '
    about += f'With more than 10 megapixels: {len(large)}, together {sum(large):.0f}.'
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # a process begins as a copy of this one
    lines = heading('From photographs to a labelled data set', 1, ['torch', 'timm'], HOW)
    lines += [about, '']
    lines += [f'Reduced: {"; ".join(f"{k}: {v}" for k, v in REDUCED.items())}; finetune: {FINETUNE}.', '']
    lines += ['| command | result | wall s | CPU s | GB |', '|:--|:--|--:|--:|--:|']
    for r in rows:
        words = ['FOLDER' if str(w) == str(photos) else str(w) for w in r['words']]
        gb = f'{"≤ " * (r["gb"] < 1.05 * own)}{r["gb"]:.1f}'
        lines.append(f'| `u2seg {" ".join(words)}` | {r["said"]} | {r["wall"]:.0f} | {r["cpu"]:.0f} | {gb} |')
    whole = [sum(r[k] for r in rows) for k in ('wall', 'cpu')]
    lines.append(f'| all | | {whole[0]:.0f} | {whole[1]:.0f} | {max(r["gb"] for r in rows):.1f} |')
    return '\n'.join(lines) + '\n'


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--work', type=Path, required=True, help='a new folder for everything')
    parser.add_argument('--photos', type=Path, help='a folder of images (default: sixty are drawn)')
    parser.add_argument('--images', type=int, default=60, help='how many are drawn (default: 60)')
    parser.add_argument('--out', type=Path, default=ROOT / 'benchmarks' / 'results' / 'photos.md')
    args = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what runs in the background
    root = args.work.absolute()
    for name in ('nbs', 'configs'):
        shutil.copytree(ROOT / name, root / name)
    photos = args.photos.absolute() if args.photos else root / 'photos'
    if not args.photos:
        draw(photos, args.images)
    args.out.write_text(report(walk(root, photos), photos))


if __name__ == '__main__':
    main()
