"""AP and PQ beside pycocotools, faster-coco-eval and panopticapi, side by side in one run, one core.

    OMP_NUM_THREADS=1 python benchmarks/metrics.py [--images 5000] [--repeats 7] [--ap GT.json DT.json] [--photos DIR]
                                                   [--out benchmarks/results/metrics.md]

Ratios of alternating runs: median and range. Every pair of results is compared as well: a faster number that differs is
no number. Sets are drawn; --ap names COCO files of one's own, instances and detections with masks; --photos a folder
with panoptic.json and panoptic/*.png of COCO, whose maps are moved to make a prediction. Memory is the peak of a
process of its own, above what it held after its imports (VmHWM, reset before the work; Linux alone). What is not
installed is left out: faster-coco-eval (pip install faster-coco-eval),
panopticapi (github.com/cocodataset/panopticapi).
"""

import argparse, contextlib, copy, importlib.util, io, json, subprocess, sys, tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from machine import RATIO, alternate, heading, publish, ratios, spread
from u2seg.images import write_json
from u2seg.masks import read_ids, write_ids
from u2seg.metrics import instance_ap, panoptic_quality


def line(what, ours, theirs, repeats, worst):
    "A row: ratios of wall times, of CPU times, largest difference of the results."
    _, taken = alternate(dict(ours=ours, theirs=theirs), repeats)
    wall, cpu = map(spread, ratios(taken['theirs'], taken['ours']))
    return f'| {what} | {wall} | {cpu} | {worst:.0e} |'


def quietly(f, *args):
    with contextlib.redirect_stdout(io.StringIO()):
        return f(*args)


# AP


def pycocotools_ap(gt, dt, iou_type):
    def run():
        coco = COCO(str(gt))
        e = COCOeval(coco, coco.loadRes(str(dt)), iou_type)
        for step in (e.evaluate, e.accumulate, e.summarize):
            step()
        return e.stats

    return quietly(run)


def faster_ap(gt, dt, iou_type):
    from faster_coco_eval import COCO, COCOeval_faster

    def run():
        coco = COCO(str(gt))
        e = COCOeval_faster(coco, coco.loadRes(str(dt)), iou_type)
        for step in (e.evaluate, e.accumulate, e.summarize):
            step()
        return e.stats

    return quietly(run)


def synthetic_instances(folder, n_images, seed=0, n_classes=80, size=(480, 640)):
    """Seven objects an image on average, fifteen detections: moved objects, other classes, false ones.
    Masks are polygons of 12 corners, as codes."""
    rng, H, W = np.random.default_rng(seed), *size
    turn = np.linspace(0, 2 * np.pi, 12, endpoint=False)

    def code(cx, cy, r, wobble):
        p = np.stack([cx + r * wobble * np.cos(turn), cy + r * wobble * np.sin(turn)], 1).clip(0, [W - 1, H - 1])
        rle = coco_mask.merge(coco_mask.frPyObjects([p.ravel().tolist()], H, W))
        return dict(
            segmentation=dict(size=[H, W], counts=rle['counts'].decode()),
            bbox=coco_mask.toBbox(rle).tolist(),
            area=int(coco_mask.area(rle)),
        )

    def label():
        return int(rng.integers(1, n_classes + 1))

    objects, found = [], []
    for i in range(1, n_images + 1):
        for _ in range(rng.poisson(7)):
            c, cx, cy = label(), rng.uniform(0, W), rng.uniform(0, H)
            r, wobble = np.exp(rng.uniform(2, 4.8)), rng.uniform(0.7, 1.3, 12)
            objects.append(
                dict(
                    code(cx, cy, r, wobble),
                    id=len(objects) + 1,
                    image_id=i,
                    category_id=c,
                    iscrowd=int(rng.random() < 0.02),
                )
            )
            for _ in range(rng.poisson(2)):
                moved = code(cx + rng.normal() * r / 6, cy + rng.normal() * r / 6, r * rng.uniform(0.8, 1.2), wobble)
                found.append(
                    dict(
                        image_id=i,
                        category_id=c if rng.random() < 0.8 else label(),
                        score=round(float(rng.random()), 3),
                        segmentation=moved['segmentation'],
                    )
                )
    images = [dict(id=i, height=H, width=W) for i in range(1, n_images + 1)]
    categories = [dict(id=c) for c in range(1, n_classes + 1)]
    write_json(folder / 'gt.json', dict(images=images, annotations=objects, categories=categories))
    write_json(folder / 'segm.json', found)
    write_json(folder / 'bbox.json', [boxed(d) for d in found])
    return len(objects), len(found)


def boxed(detection):
    "The detection with its box instead of its mask."
    return dict(
        {k: v for k, v in detection.items() if k != 'segmentation'},
        bbox=coco_mask.toBbox(detection['segmentation']).tolist(),
    )


PEAK = """
import sys, json; sys.path.insert(0, sys.argv[1])
import metrics as m
from pathlib import Path
if sys.argv[2] != 'ours' and 'panopticapi' in sys.argv[2]: import panopticapi.evaluation
def held(key): return next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith(key))
m.WORK[sys.argv[2]](*sys.argv[3:6], 1)                       # warm: what is compiled or loaded late is there
open('/proc/self/clear_refs', 'w').write('5'); base = held('VmRSS')
m.WORK[sys.argv[2]](*sys.argv[3:])
print(max(held('VmHWM') - base, 0))
"""


def peak(work, a, b, c, n):
    "Peak memory in MB of `WORK[work](a, b, c, n)` in a process of its own, above that of its imports and of one image."
    call = [sys.executable, '-c', PEAK, Path(__file__).parent, work, a, b, c, n]
    return int(subprocess.run(list(map(str, call)), capture_output=True, text=True, check=True).stdout) / 1024


def first(gt, dt, folder, n):
    "The first `n` images of an instance set, as files."
    name = Path(folder) / f'first{n}'
    if not name.with_suffix('.gt').exists():
        g, d = json.loads(Path(gt).read_bytes()), json.loads(Path(dt).read_bytes())
        objects = [a for a in g['annotations'] if a['image_id'] <= n]
        write_json(name.with_suffix('.gt'), dict(g, images=g['images'][:n], annotations=objects))
        write_json(name.with_suffix('.dt'), [a for a in d if a['image_id'] <= n])
    return name.with_suffix('.gt'), name.with_suffix('.dt')


def many(folder, n):
    "`n` images of a panoptic set, its own over and over, and pairs for panopticapi."
    gt, pred = (json.loads((Path(folder) / f'{x}.json').read_bytes()) for x in ('gt', 'pred'))
    g, p = ([dict(x['annotations'][i % len(x['annotations'])], image_id=i) for i in range(n)] for x in (gt, pred))
    return dict(gt, annotations=g), dict(annotations=p), list(zip(g, p))


def pq_ours(folder, _, __, n):
    gt, pred, _ = many(folder, int(n))
    panoptic_quality(gt, Path(folder) / 'gt', pred, Path(folder) / 'pred')


def pq_panopticapi(folder, _, __, n):
    from panopticapi.evaluation import pq_compute_single_core

    gt, _, pairs = many(folder, int(n))
    cats = {c['id']: c for c in gt['categories']}
    quietly(pq_compute_single_core, 0, pairs, str(Path(folder) / 'gt'), str(Path(folder) / 'pred'), cats)


def ap_ours(gt, dt, folder, n):
    instance_ap(*first(gt, dt, folder, int(n)))


def ap_pycocotools(gt, dt, folder, n):
    pycocotools_ap(*first(gt, dt, folder, int(n)), 'segm')


WORK = dict(ap_ours=ap_ours, ap_pycocotools=ap_pycocotools, pq_ours=pq_ours, pq_panopticapi=pq_panopticapi)
REFERENCES = dict(pycocotools=pycocotools_ap)
if importlib.util.find_spec('faster_coco_eval'):
    REFERENCES['faster-coco-eval'] = faster_ap
HAS_PANOPTICAPI = importlib.util.find_spec('panopticapi') is not None


def bench_ap(name, gt, dt, iou_type, repeats):
    for reference, ap in REFERENCES.items():
        ours, theirs = instance_ap(gt, dt, iou_type=iou_type), ap(gt, dt, iou_type)
        worst = max(abs(a - b) for a, b in zip(ours.values(), theirs))
        yield line(
            f'AP {iou_type}, {name}; {reference}',
            lambda: instance_ap(gt, dt, iou_type=iou_type),
            lambda: ap(gt, dt, iou_type),
            repeats,
            worst,
        )


# PQ


def synthetic_panoptic(folder, n_images, seed=0, size=(480, 640)):
    "Some twenty regions an image with wavy outlines; the prediction is shifted, some classes wrong, some regions lost."
    rng, (y, x) = np.random.default_rng(seed), np.mgrid[: size[0], : size[1]].astype(np.float32)
    cats = [dict(id=c, isthing=int(c <= 80)) for c in range(1, 134)]
    gt, pred = [], []
    for sub in ('gt', 'pred'):
        (folder / sub).mkdir()
    for i in range(1, n_images + 1):
        g, p = np.zeros((2, *size), np.int32)
        ids, classes = rng.choice(1 << 24, 26, replace=False).astype(np.int32) + 1, rng.integers(1, 134, 26)
        for k in range(26):
            cy, cx, r = *rng.uniform(0, size), 300 * np.exp(-k / 12)
            wave, lobes = rng.uniform(0, 0.4), rng.integers(2, 9)
            for m, d in (g, 0), (p, rng.uniform(-0.12, 0.12) * r):
                ry, rx = y - cy - d, x - cx + d
                m[np.hypot(ry, rx) < r * (1 + wave * np.sin(lobes * np.arctan2(ry, rx)))] = ids[k]
        write_ids(folder / 'gt' / f'{i}.png', g)
        write_ids(folder / 'pred' / f'{i}.png', p)
        n, there = {int(k): int(v) for k, v in zip(*np.unique(g, return_counts=True))}, set(np.unique(p).tolist())
        labels = list(zip(ids.tolist(), classes.tolist()))
        true = [
            dict(id=k, category_id=c, iscrowd=int(c <= 80 and rng.random() < 0.05), area=n[k])
            for k, c in labels
            if k in n
        ]
        found = [
            dict(id=k, category_id=c if rng.random() < 0.8 else int(rng.integers(1, 134)))
            for k, c in labels
            if k in there
        ]
        gt.append(dict(image_id=i, file_name=f'{i}.png', segments_info=true))
        pred.append(dict(image_id=i, file_name=f'{i}.png', segments_info=found))
    return dict(categories=cats, annotations=gt), dict(annotations=pred)


def bench_pq(name, gt, gt_dir, pred, pred_dir, repeats):
    from panopticapi.evaluation import pq_compute_single_core

    cats = {c['id']: c for c in gt['categories']}
    found = {a['image_id']: a for a in pred['annotations']}

    def theirs():
        pairs = copy.deepcopy([(a, found[a['image_id']]) for a in gt['annotations']])
        return quietly(pq_compute_single_core, 0, pairs, str(gt_dir), str(pred_dir), cats)

    def ours():
        return panoptic_quality(gt, gt_dir, pred, pred_dir)

    stat, s = theirs(), ours()
    groups = ('All', None), ('Things', True), ('Stuff', False)
    worst = max(
        abs(stat.pq_average(cats, isthing=t)[0][k] - s[g][k]) for g, t in groups for k in ('pq', 'sq', 'rq', 'n')
    )
    return line(f'PQ, {name}; panopticapi', ours, theirs, repeats, worst)


def moved_truth(gt, gt_dir, folder, seed=0):
    "A prediction from real ground truth: every map moved by some pixels, one class in ten replaced."
    rng, classes, out = np.random.default_rng(seed), [c['id'] for c in gt['categories']], []
    for a in gt['annotations']:
        ids = np.roll(read_ids(gt_dir / a['file_name']), rng.integers(-8, 9, 2), (0, 1))
        write_ids(folder / a['file_name'], ids)
        info = [
            dict(id=s['id'], category_id=s['category_id'] if rng.random() < 0.9 else int(rng.choice(classes)))
            for s in a['segments_info']
        ]
        out.append(dict(image_id=a['image_id'], file_name=a['file_name'], segments_info=info))
    return dict(annotations=out)


def rows(args, tmp):
    if args.ap:
        gt, dt = map(Path, args.ap)
        write_json(tmp / 'own.json', [boxed(d) for d in json.loads(dt.read_bytes())])
        n = len(json.loads(gt.read_bytes())['images'])
        for t, found in (('segm', dt), ('bbox', tmp / 'own.json')):
            yield from bench_ap(f'{n} images of COCO', gt, found, t, args.repeats)
    n, m = synthetic_instances(tmp, args.images)
    for t in ('segm', 'bbox'):
        name = f'{args.images} drawn images, {n} objects, {m} detections'
        yield from bench_ap(name, tmp / 'gt.json', tmp / f'{t}.json', t, max(args.repeats // 2, 1))
    (tmp / 'p').mkdir()
    gt, pred = synthetic_panoptic(tmp / 'p', 40)
    for name, x in (('gt', gt), ('pred', pred)):
        write_json(tmp / 'p' / f'{name}.json', x)
    if not HAS_PANOPTICAPI:
        return
    yield bench_pq('40 drawn maps of 640 x 480', gt, tmp / 'p' / 'gt', pred, tmp / 'p' / 'pred', args.repeats)
    if args.photos:
        folder = Path(args.photos)
        gt = json.loads((folder / 'panoptic.json').read_bytes())
        (tmp / 'c').mkdir()
        pred = moved_truth(gt, folder / 'panoptic', tmp / 'c')
        yield bench_pq(f'{len(gt["annotations"])} maps of COCO', gt, folder / 'panoptic', pred, tmp / 'c', args.repeats)


def memory(n_images, tmp):
    "Peaks as images grow."
    steps = [n_images // 4, n_images // 2, n_images]
    for n in (1, *steps):
        first(tmp / 'gt.json', tmp / 'segm.json', tmp, n)
    for n in steps:
        ours, theirs = (
            peak(side, tmp / 'gt.json', tmp / 'segm.json', tmp, n) for side in ('ap_ours', 'ap_pycocotools')
        )
        yield f'| AP masks, {n} images | {ours:.0f} MB | {theirs:.0f} MB |'
    for n in (100, 400, 1600):
        ours, theirs = (
            f'{peak(side, tmp / "p", "", "", n):.1f} MB' if side == 'pq_ours' or HAS_PANOPTICAPI else ''
            for side in ('pq_ours', 'pq_panopticapi')
        )
        yield f'| PQ, {n} images of 640 x 480 | {ours} | {theirs} |'


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--images', type=int, default=5000)
    p.add_argument('--repeats', type=int, default=7)
    p.add_argument('--ap', nargs=2, metavar=('GT', 'DT'), help='COCO instances and detections with masks')
    p.add_argument('--photos', help='folder with panoptic.json and panoptic/*.png of COCO')
    p.add_argument('--out')
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        times = list(rows(args, Path(tmp)))
        peaks = list(memory(args.images, Path(tmp))) if Path('/proc/self/clear_refs').exists() else []
    references = ', '.join(f'{r} {version(r)}' for r in REFERENCES)
    how = f'Both sides read the same files, in one process, in turns. References: {references}'
    how += " and panopticapi's `pq_compute_single_core`." if HAS_PANOPTICAPI else '; panopticapi is not installed.'
    text = heading('AP and PQ beside the reference evaluators', 1, ['numpy'], how)
    text += [
        RATIO,
        '',
        '| what; reference | ratio, wall | ratio, CPU | largest difference of the results |',
        '|---|---|---|---|',
        *times,
        '',
    ]
    if peaks:
        text += [
            'Peak memory, each in a process of its own, above its imports:',
            '',
            '| what | u2seg | reference |',
            '|---|---|---|',
            *peaks,
            '',
            'AP needs what the JSON files hold, so it grows with them; PQ keeps one image at a time, so what '
            'grows is the list of segments.',
        ]
    publish(text, args.out)


if __name__ == '__main__':
    main()
