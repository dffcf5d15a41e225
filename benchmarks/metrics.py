"""AP and PQ beside pycocotools, faster-coco-eval and panopticapi, side by side in one run, one core.

    OMP_NUM_THREADS=1 python benchmarks/metrics.py [--images 5000] [--repeats 7] [--out benchmarks/results/metrics.md]

Medians of alternating runs. Every pair of results is compared as well: a faster number that differs is no number.
Memory is the peak of a process of its own, above what it held after its imports (VmHWM, reset before the work; Linux alone).
What is not installed is left out: faster-coco-eval (pip install faster-coco-eval), panopticapi (pip install git+https://github.com/cocodataset/panopticapi).
"""
import argparse, contextlib, copy, importlib.util, io, json, os, statistics, subprocess, sys, tempfile, time
from importlib.metadata import version
from pathlib import Path

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from machine import heading, publish
from u2seg.images import write_ids, write_json
from u2seg.metrics import instance_ap, panoptic_quality

SHARED = Path(os.environ.get('U2SEG_SHARED_DATA', Path(__file__).parents[2]/'shared'/'data'))


def alternate(ours, theirs, repeats):
    "Median seconds of each, run in turn, as (wall, CPU)."
    times = [], []
    for _ in range(repeats):
        for f, t in zip((ours, theirs), times):
            wall, cpu = time.perf_counter(), time.process_time(); f(); t.append((time.perf_counter() - wall, time.process_time() - cpu))
    return [[statistics.median(x) for x in zip(*t)] for t in times]


def line(what, ours, theirs, unit, scale, worst):
    "A row: wall times, ratio of wall times, of CPU times, largest difference of the results."
    return f'| {what} | {scale * ours[0]:.3g} {unit} | {scale * theirs[0]:.3g} {unit} | **{theirs[0] / ours[0]:.1f}** | {theirs[1] / ours[1]:.1f} | {worst:.0e} |'


def quietly(f, *args):
    with contextlib.redirect_stdout(io.StringIO()): return f(*args)


# AP

def pycocotools_ap(gt, dt, iou_type):
    def run():
        coco = COCO(str(gt)); e = COCOeval(coco, coco.loadRes(str(dt)), iou_type)
        e.evaluate(); e.accumulate(); e.summarize()
        return e.stats
    return quietly(run)


def faster_ap(gt, dt, iou_type):
    from faster_coco_eval import COCO, COCOeval_faster
    def run():
        coco = COCO(str(gt)); e = COCOeval_faster(coco, coco.loadRes(str(dt)), iou_type)
        e.evaluate(); e.accumulate(); e.summarize()
        return e.stats
    return quietly(run)


def synthetic_instances(folder, n_images, seed=0, n_classes=80, size=(480, 640)):
    "Seven objects an image on average, fifteen detections: moved objects, other classes, false ones. Masks are polygons of 12 corners, as codes."
    rng, H, W = np.random.default_rng(seed), *size
    turn = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    def code(cx, cy, r, wobble):
        p = np.stack([cx + r * wobble * np.cos(turn), cy + r * wobble * np.sin(turn)], 1).clip(0, [W - 1, H - 1])
        rle = coco_mask.merge(coco_mask.frPyObjects([p.ravel().tolist()], H, W))
        return dict(segmentation=dict(size=[H, W], counts=rle['counts'].decode()), bbox=coco_mask.toBbox(rle).tolist(), area=int(coco_mask.area(rle)))
    objects, found = [], []
    for i in range(1, n_images + 1):
        for _ in range(rng.poisson(7)):
            c, cx, cy, r, wobble = int(rng.integers(1, n_classes + 1)), rng.uniform(0, W), rng.uniform(0, H), np.exp(rng.uniform(2, 4.8)), rng.uniform(.7, 1.3, 12)
            objects.append(dict(code(cx, cy, r, wobble), id=len(objects) + 1, image_id=i, category_id=c, iscrowd=int(rng.random() < .02)))
            for _ in range(rng.poisson(2)):
                moved = code(cx + rng.normal() * r / 6, cy + rng.normal() * r / 6, r * rng.uniform(.8, 1.2), wobble)
                found.append(dict(image_id=i, category_id=c if rng.random() < .8 else int(rng.integers(1, n_classes + 1)), score=round(float(rng.random()), 3), segmentation=moved['segmentation']))
    write_json(folder/'gt.json', dict(images=[dict(id=i, height=H, width=W) for i in range(1, n_images + 1)], annotations=objects, categories=[dict(id=c) for c in range(1, n_classes + 1)]))
    write_json(folder/'segm.json', found)
    write_json(folder/'bbox.json', [dict({k: v for k, v in d.items() if k != 'segmentation'}, bbox=coco_mask.toBbox(d['segmentation']).tolist()) for d in found])
    return len(objects), len(found)


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
    return int(subprocess.run([sys.executable, '-c', PEAK, str(Path(__file__).parent), work, str(a), str(b), str(c), str(n)], capture_output=True, text=True, check=True).stdout) / 1024


def first(gt, dt, folder, n):
    "The first `n` images of an instance set, as files."
    name = Path(folder)/f'first{n}'
    if not name.with_suffix('.gt').exists():
        g, d = json.loads(Path(gt).read_bytes()), json.loads(Path(dt).read_bytes())
        write_json(name.with_suffix('.gt'), dict(g, images=g['images'][:n], annotations=[a for a in g['annotations'] if a['image_id'] <= n]))
        write_json(name.with_suffix('.dt'), [a for a in d if a['image_id'] <= n])
    return name.with_suffix('.gt'), name.with_suffix('.dt')


def many(folder, n):
    "`n` images of a panoptic set, its own over and over, and pairs for panopticapi."
    gt, pred = (json.loads((Path(folder)/f'{x}.json').read_bytes()) for x in ('gt', 'pred'))
    g, p = ([dict(x['annotations'][i % len(x['annotations'])], image_id=i) for i in range(n)] for x in (gt, pred))
    return dict(gt, annotations=g), dict(annotations=p), list(zip(g, p))


def pq_ours(folder, _, __, n):
    gt, pred, _ = many(folder, int(n))
    panoptic_quality(gt, Path(folder)/'gt', pred, Path(folder)/'pred')

def pq_panopticapi(folder, _, __, n):
    from panopticapi.evaluation import pq_compute_single_core
    gt, _, pairs = many(folder, int(n))
    quietly(pq_compute_single_core, 0, pairs, str(Path(folder)/'gt'), str(Path(folder)/'pred'), {c['id']: c for c in gt['categories']})

WORK = dict(ap_ours=lambda gt, dt, folder, n: instance_ap(*first(gt, dt, folder, int(n))), ap_pycocotools=lambda gt, dt, folder, n: pycocotools_ap(*first(gt, dt, folder, int(n)), 'segm'),
            pq_ours=pq_ours, pq_panopticapi=pq_panopticapi)


REFERENCES = dict(pycocotools=pycocotools_ap) | ({'faster-coco-eval': faster_ap} if importlib.util.find_spec('faster_coco_eval') else {})

def bench_ap(name, gt, dt, iou_type, repeats):
    for reference, ap in REFERENCES.items():
        ours, theirs = instance_ap(gt, dt, iou_type=iou_type), ap(gt, dt, iou_type)
        worst = max(abs(a - b) for a, b in zip(ours.values(), theirs))
        a, b = alternate(lambda: instance_ap(gt, dt, iou_type=iou_type), lambda: ap(gt, dt, iou_type), repeats)
        yield line(f'AP {iou_type}, {name}; {reference}', a, b, 's', 1, worst)


# PQ

def synthetic_panoptic(folder, n_images, seed=0, size=(480, 640)):
    "Some twenty regions an image with wavy outlines; the prediction is shifted, some classes are wrong, some regions lost."
    rng, (y, x) = np.random.default_rng(seed), np.mgrid[:size[0], :size[1]].astype(np.float32)
    cats = [dict(id=c, isthing=int(c <= 80)) for c in range(1, 134)]
    gt, pred = [], []
    for sub in ('gt', 'pred'): (folder/sub).mkdir()
    for i in range(1, n_images + 1):
        g, p = np.zeros((2, *size), np.int32)
        ids, classes = rng.choice(1 << 24, 26, replace=False).astype(np.int32) + 1, rng.integers(1, 134, 26)
        for k in range(26):
            cy, cx, r, wave, lobes = *rng.uniform(0, size), 300 * np.exp(-k / 12), rng.uniform(0, .4), rng.integers(2, 9)
            for m, d in (g, 0), (p, rng.uniform(-.12, .12) * r):
                ry, rx = y - cy - d, x - cx + d
                m[np.hypot(ry, rx) < r * (1 + wave * np.sin(lobes * np.arctan2(ry, rx)))] = ids[k]
        write_ids(folder/'gt'/f'{i}.png', g); write_ids(folder/'pred'/f'{i}.png', p)
        n = {int(k): int(v) for k, v in zip(*np.unique(g, return_counts=True))}
        gt.append(dict(image_id=i, file_name=f'{i}.png', segments_info=[dict(id=int(s), category_id=int(c), iscrowd=int(c <= 80 and rng.random() < .05), area=n[int(s)]) for s, c in zip(ids, classes) if int(s) in n]))
        there = set(np.unique(p).tolist())
        pred.append(dict(image_id=i, file_name=f'{i}.png', segments_info=[dict(id=int(s), category_id=int(c) if rng.random() < .8 else int(rng.integers(1, 134))) for s, c in zip(ids, classes) if int(s) in there]))
    return dict(categories=cats, annotations=gt), dict(annotations=pred)


def bench_pq(name, gt, gt_dir, pred, pred_dir, repeats):
    from panopticapi.evaluation import pq_compute_single_core
    cats = {c['id']: c for c in gt['categories']}
    found = {a['image_id']: a for a in pred['annotations']}
    def theirs(): return quietly(pq_compute_single_core, 0, copy.deepcopy([(a, found[a['image_id']]) for a in gt['annotations']]), str(gt_dir), str(pred_dir), cats)
    def ours(): return panoptic_quality(gt, gt_dir, pred, pred_dir)
    stat, s = theirs(), ours()
    worst = max(abs(stat.pq_average(cats, isthing=t)[0][k] - s[g][k]) for g, t in (('All', None), ('Things', True), ('Stuff', False)) for k in ('pq', 'sq', 'rq', 'n'))
    return line(f'PQ, {name}', *alternate(ours, theirs, repeats), 'ms an image', 1e3 / len(gt['annotations']), worst)


def moved_truth(gt, gt_dir, folder, seed=0):
    "A prediction from real ground truth: every map moved by some pixels, one class in ten replaced."
    from u2seg.images import read_ids
    rng, classes, out = np.random.default_rng(seed), [c['id'] for c in gt['categories']], []
    for a in gt['annotations']:
        ids = np.roll(read_ids(gt_dir/a['file_name']), rng.integers(-8, 9, 2), (0, 1))
        write_ids(folder/a['file_name'], ids)
        out.append(dict(image_id=a['image_id'], file_name=a['file_name'], segments_info=[dict(id=s['id'], category_id=s['category_id'] if rng.random() < .9 else int(rng.choice(classes))) for s in a['segments_info']]))
    return dict(annotations=out)


def rows(n_images, repeats, tmp):
    ap, coco26 = SHARED/'ap', SHARED/'coco26'
    if ap.exists():
        for t in ('segm', 'bbox'): yield from bench_ap('the 100 images of cocoapi', ap/'instances_val2014_100.json', ap/f'instances_val2014_fake{t}100_results.json', t, repeats)
    else: yield f'| AP, the 100 images of cocoapi | {ap} is not here | | | | |'
    n, m = synthetic_instances(tmp, n_images)
    for t in ('segm', 'bbox'): yield from bench_ap(f'{n_images} images, {n} objects, {m} detections', tmp/'gt.json', tmp/f'{t}.json', t, max(repeats // 3, 1))
    (tmp/'p').mkdir(); gt, pred = synthetic_panoptic(tmp/'p', 40)
    for name, x in (('gt', gt), ('pred', pred)): write_json(tmp/'p'/f'{name}.json', x)
    try: import panopticapi
    except ImportError: yield '| PQ | panopticapi is not installed | | | | |'; return
    yield bench_pq('40 drawn maps of 640 x 480', gt, tmp/'p'/'gt', pred, tmp/'p'/'pred', repeats)
    if coco26.exists():
        gt = json.loads((coco26/'panoptic.json').read_bytes()); (tmp/'c').mkdir()
        yield bench_pq('26 COCO photos', gt, coco26/'panoptic', moved_truth(gt, coco26/'panoptic', tmp/'c'), tmp/'c', repeats)


def memory(n_images, tmp):
    "Peaks as images grow."
    steps = [n_images // 4, n_images // 2, n_images]
    for n in (1, *steps): first(tmp/'gt.json', tmp/'segm.json', tmp, n)
    for n in steps: yield f"| AP masks, {n} images | {peak('ap_ours', tmp/'gt.json', tmp/'segm.json', tmp, n):.0f} MB | {peak('ap_pycocotools', tmp/'gt.json', tmp/'segm.json', tmp, n):.0f} MB |"
    theirs = WORK.keys() - {'pq_panopticapi'}
    try: import panopticapi; theirs = WORK.keys()
    except ImportError: pass
    for n in (100, 400, 1600): yield f"| PQ, {n} images of 640 x 480 | {peak('pq_ours', tmp/'p', '', '', n):.1f} MB | " + (f"{peak('pq_panopticapi', tmp/'p', '', '', n):.1f} MB |" if 'pq_panopticapi' in theirs else '|')


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--images', type=int, default=5000); p.add_argument('--repeats', type=int, default=7); p.add_argument('--out')
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        times, peaks = list(rows(args.images, args.repeats, Path(tmp))), list(memory(args.images, Path(tmp))) if Path('/proc/self/clear_refs').exists() else []
    text = heading('AP and PQ beside the reference evaluators', 1, ['numpy'], f'Both sides read the same files, in one process, in turns; medians. References: {", ".join(f"{r} {version(r)}" for r in REFERENCES)} and panopticapi\'s `pq_compute_single_core`.')
    text += ['| what | u2seg | reference | ratio of wall times | of CPU times | largest difference of the results |', '|---|---|---|---|---|---|', *times, '']
    if peaks: text += ['Peak memory, each in a process of its own, above its imports:', '', '| what | u2seg | reference |', '|---|---|---|', *peaks, '',
                       'AP needs what the JSON files hold, so it grows with them; PQ keeps one picture at a time, so what grows is the list of segments.']
    publish(text, args.out)


if __name__ == '__main__': main()
