"""A recipe rehearsed before its data and its GPUs are at hand: the time and memory of each stage, by image.

    python benchmarks/recipe.py coco --images 8 16 32      # writes benchmarks/results/recipe.md

The images are drawn, in COCO's layout and size: 640 x 480, 133 categories, crowds, COCO-Stuff's maps. The weights are
random, in the files of their publishers. The recipe is that of `configs/`, with the reductions of `REDUCED`: a few
iterations. The networks are small, too, because theirs is a GPU's time, which benchmarks/gpu.py measures (`--full`:
the recipe's own). So what is measured is the CPU's part and memory. Each stage runs by its own command; its
costs at three numbers of images give a slope, and that times COCO's 118,287 an estimate.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import timm
import torch
import torchvision
import yaml
from machine import heading

from u2seg.classes import COCO_PANOPTIC, COCO_THINGS
from u2seg.images import write_json, write_png
from u2seg.masks import encode_rle, write_ids
from u2seg.recipes import overlay, use

ROOT = Path(__file__).parents[1]
N_TRAIN, N_VAL = 118_287, 5_000
STAGES = 'features maskcut cutler cluster stego panoptic train evaluate fewshot report'.split()
FEW = dict(batch_size=2, warmup_iters=1, checkpoint_period=1000, precise_bn=2, amp=None)  # fp16: minutes an iteration
REDUCED = dict(  # what the rehearsal changes in a recipe
    cutler=dict(
        solver=dict(FEW, n_iters=2),
        self_training=dict(n_iters=2),
        detect=dict(score_threshold=0.0, n_procs=1, n_max=5),
        n_workers=0,
    ),
    cluster=dict(k=8),
    stego=dict(n_iters=2, n_procs=1),
    train=dict(solver=dict(FEW, n_iters=2, precise_bn=0), n_workers=0),
    evaluate=dict(n_fit_images=2, n_procs=1),
    fewshot=dict(percents=[50], n_iters=[2], solver=FEW, inits=['u2seg'], n_workers=0, n_val=2),
    maskcut=dict(n_procs=1),
    network=dict(max_detections=10),  # a detector of random weights finds a hundred objects an image
)
NETWORKS = dict(  # but for --full
    features=dict(backbone='vit_tiny_patch16_224'),
    network=dict(depth=18, fpn_channels=16, fc_dim=32, mask_dim=16, sem_dim=16),
)
SMALL = dict(  # and the small form, of the tests
    maskcut=dict(size=96),
    augment=dict(short_sides=[96], max_size=128),
    network=dict(min_size=96, max_size=128),
)


def draw(rng, height=480, width=640):
    "An image of stripes and ellipses, uint8 [H, W, 3]; ids of its segments, int32 [H, W]; their categories."
    y, x = np.mgrid[:height, :width]
    stuff = [c for c in COCO_PANOPTIC if not c['isthing']]
    n_stripes, n_things = rng.integers(2, 4), rng.integers(2, 12)
    ids = (y * n_stripes // height + 1).astype(np.int32)
    categories = [stuff[i]['id'] for i in rng.choice(len(stuff), n_stripes, replace=False)]
    for i in range(n_stripes + 1, n_stripes + n_things + 1):
        cy, cx = rng.uniform(0, height), rng.uniform(0, width)
        ry, rx = rng.uniform(20, height / 4), rng.uniform(20, width / 4)
        ids[((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 < 1] = i
        categories.append(COCO_THINGS[rng.integers(len(COCO_THINGS))]['id'])
    colour = rng.integers(0, 256, (len(categories) + 1, 3))
    image = colour[ids] + rng.normal(0, 20, (height, width, 1))
    return image.clip(0, 255).astype(np.uint8), ids, categories


def draw_split(folder, split, n, seed, **size):
    "Images of a split, its panoptic maps and instances, a crowd in every tenth image, and its stuff maps."
    rng = np.random.default_rng(seed)
    is_thing = {c['id']: c['isthing'] for c in COCO_PANOPTIC}
    images, panoptic, instances = [], [], []
    for i in range(1, n + 1):
        image, ids, categories = draw(rng, **size)
        height, width = ids.shape
        name = f'{i:012d}.png'
        write_png(folder / split / name, image)
        write_ids(folder / 'annotations' / f'panoptic_{split}' / name, ids)
        of_pixel = np.array([255, *categories], np.uint8)[ids] - 1
        write_png(folder / 'stuffthingmaps' / split / name, of_pixel)
        images.append(dict(id=i, file_name=name, height=height, width=width))
        segments = []
        for k, category in enumerate(categories, 1):
            mask = ids == k
            if not mask.any():
                continue
            crowd = int(i % 10 == 0 and is_thing[category] and not any(s['iscrowd'] for s in segments))
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            box = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
            one = dict(category_id=category, iscrowd=crowd, area=int(mask.sum()), bbox=[int(v) for v in box])
            segments.append(dict(one, id=k))
            if is_thing[category]:
                instances.append(dict(one, id=len(instances) + 1, image_id=i, segmentation=encode_rle(mask)))
        panoptic.append(dict(image_id=i, file_name=name, segments_info=segments))
    things = [dict(id=c['id'], name=c['name']) for c in COCO_THINGS]
    for kind, annotations, categories in (
        ('panoptic', panoptic, COCO_PANOPTIC),
        ('instances', instances, things),
    ):
        content = dict(images=images, annotations=annotations, categories=categories)
        write_json(folder / 'annotations' / f'{kind}_{split}.json', content)


def make_weights(params, root):
    "Random weights in DINO's two files: a ViT, and a ResNet without its classifier."
    torch.manual_seed(0)
    vit = timm.create_model(params['features']['backbone'], num_classes=0)
    resnet = getattr(torchvision.models, f'resnet{params["network"]["depth"]}')()
    for path, net in ((params['features']['weights'], vit), (params['cutler']['initial'], resnet)):
        state = {k: v for k, v in net.state_dict().items() if not k.startswith('fc.')}
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, root / path)


def prepare(root, recipe, n_images, full=False, small=False):
    "A folder in which the recipe can run: notebooks, params.yaml, data and weights; the reductions."
    for name in ('nbs', 'configs'):
        shutil.copytree(ROOT / name, root / name)
    use(recipe, root)
    changes = REDUCED if full else overlay(REDUCED, NETWORKS)
    changes = overlay(changes, SMALL) if small else changes
    params = overlay(yaml.safe_load((root / 'params.yaml').read_text()), changes)
    (root / 'params.yaml').write_text(yaml.safe_dump(params, sort_keys=False))
    data = root / params['data']['root']
    size = dict(height=96, width=128) if small else {}
    for seed, split in enumerate([*params['data']['train'], *params['data']['val']]):
        draw_split(data, split, n_images if split in params['data']['train'] else max(n_images // 8, 4), seed, **size)
    make_weights(params, root)
    return changes


def run(root, *words, during=lambda process: process.stdout.read()):
    "A command of `u2seg`: wall and CPU seconds, the largest process in GB, and what `during` returns, its output."
    environment = os.environ | dict(PYTHONPATH=str(ROOT), CUDA_VISIBLE_DEVICES='', U2SEG_THREADS='1')
    command = [sys.executable, '-m', 'u2seg.cli', *map(str, words)]
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        printed = during(process)
    except BaseException:
        process.kill()
        raise
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f'u2seg {" ".join(command[3:])} failed')
    cpu = used.ru_utime + used.ru_stime
    return dict(wall=time.perf_counter() - start, cpu=cpu, gb=used.ru_maxrss / 1e6, printed=printed)


def slope(n_images, values):
    "Growth by image: of a line through the measurements."
    return np.polyfit(n_images, values, 1)[0] if len(n_images) > 1 else 0.0


def report(recipe, sizes, rows, changes):
    "Markdown: what was reduced, each stage at each size, its slope and what that makes of COCO's 118,287 images."
    lines = heading(f'The recipe {recipe}, rehearsed', 1, ['torch', 'timm'], 'Each stage by its own command.')
    lines += ['Reduced: ' + '; '.join(f'{k}: {v}' for k, v in changes.items()) + '.', '']
    lines += ['Training runs a few iterations, so its slopes are those of reading, detecting and scoring alone.', '']
    lines += ['Memory and files are not extrapolated: of so few images not one batch, block or shard is full.', '']
    names = ' / '.join(map(str, sizes))
    lines += [f'| stage | CPU s at {names} images | GB | CPU s by image | core-hours at {N_TRAIN:,} |']
    lines += ['|:--|--:|--:|--:|--:|']
    for stage in dict.fromkeys(r['stage'] for r in rows):
        own = [r for r in rows if r['stage'] == stage]
        cpu = slope(sizes, [r['cpu'] for r in own])
        measured = [' / '.join(f'{r["cpu"]:.0f}' for r in own), ' / '.join(f'{r["gb"]:.2f}' for r in own)]
        whole = f'{cpu * N_TRAIN / 3600:.0f}' if cpu > 0 else ''
        lines.append(f'| {" | ".join([stage, *measured, f"{cpu:.2f}", whole])} |')
    return '\n'.join(lines) + '\n'


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('recipe', nargs='?', default='coco')
    parser.add_argument('--images', type=int, nargs='+', default=[8, 16, 32])
    parser.add_argument('--stages', nargs='+', default=STAGES)
    parser.add_argument('--full', action='store_true', help="the recipe's own networks")
    parser.add_argument('--small', action='store_true', help='tiny images')
    parser.add_argument('--out', type=Path, default=ROOT / 'benchmarks' / 'results' / 'recipe.md')
    args = parser.parse_args()
    rows = []
    for n in args.images:
        with tempfile.TemporaryDirectory() as folder:
            changes = prepare(Path(folder), args.recipe, n, args.full, args.small)
            rows += [dict(run(Path(folder), 'run', stage), stage=stage) for stage in args.stages]
        args.out.write_text(report(args.recipe, args.images[: args.images.index(n) + 1], rows, changes))


if __name__ == '__main__':
    main()
