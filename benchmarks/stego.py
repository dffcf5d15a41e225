"""STEGO against k-means on the same features, with a single cluster as the floor; PixelAcc and mIoU on a labelled
development set, one-to-one.

    python benchmarks/stego.py --labelled DIR [--sweep] [--seeds 3] [--crf-every 4] [--train DIR] [--axes 64]
                               [--cache FILE] [--out benchmarks/results/stego.md]

DIR holds `objects/` and `scenes/` in the layout of `data/embedded`, drawn from another seed
(`u2seg.scenes.draw_dataset`), so that nothing is tuned on the images that the tables report. Training sees the images
of `params.yaml`, or those of another folder of that layout (--train), without labels. With --axes both labellers see
the features projected on so many axes, which is faster; features may be kept in a file (--cache), and the CRF left
out (--crf-every 0). Settings are those of `params.yaml`, section `stego`; `--sweep` varies them one at a time.
"""

import argparse, resource, statistics, tempfile, time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import yaml

from u2seg.correspondence import nearest_images
from u2seg.features import ViTFeatures
from u2seg.images import list_images, normalize, read_image, read_json, resize_image, to_tensor
from u2seg.labeller import Head, Labeller, PatchFeatures, extractor, keep_features, pool_features
from u2seg.masks import read_ids
from u2seg.semantic import segment, write_semantic
from u2seg.matching import match_clusters, pixel_votes
from u2seg.stego import fit_kmeans, fit_stego, refit_probe

FIT = (
    'n_classes',
    'code_dim',
    'dropout',
    'n_iters',
    'batch_size',
    'lr',
    'lr_probe',
    'w_self',
    'w_knn',
    'w_rand',
    'b_self',
    'b_knn',
    'b_rand',
    'n_points',
    'n_random',
    'pointwise',
)


def scores(votes):
    "PixelAcc and mIoU of votes [clusters, classes] after one-to-one matching; clusters without a class count as wrong."
    mapping = match_clusters(votes, 'hungarian')
    hit = np.zeros(votes.shape[1])
    said = np.zeros(votes.shape[1])
    for k, c in enumerate(mapping):
        if c >= 0:
            hit[c], said[c] = votes[k, c], votes[k].sum()
    true = votes.sum(0)
    return dict(acc=hit.sum() / votes.sum(), miou=(hit / (true + said - hit))[true > 0].mean())


def read_truth(folder, share, split='val'):
    "Images and class maps (1 ... n, 0 = void) of one split."
    coco = read_json(folder / share / 'annotations' / f'panoptic_{split}.json')
    ids = {c['id']: i for i, c in enumerate(sorted(coco['categories'], key=lambda c: c['id']), 1)}
    names = {im['id']: im['file_name'] for im in coco['images']}
    for a in coco['annotations']:
        x = read_ids(folder / share / 'annotations' / f'panoptic_{split}' / a['file_name'])
        table = np.zeros(x.max() + 1, np.uint8)
        for s in a['segments_info']:
            table[s['id']] = ids[s['category_id']]
        yield read_image(folder / share / split / names[a['image_id']]), table[x]


class Truth:
    "The labelled images, their features (once), and the votes of a labeller."

    def __init__(self, folder, extract, *, size, patch_size, flip, n_classes=14, shares=('objects', 'scenes')):
        self.size, self.share, self.pictures, self.maps = size, [], [], []
        for share in shares:
            for picture, m in read_truth(Path(folder), share):
                self.share.append(share)
                self.pictures.append(picture)
                self.maps.append(m)
        self.extract, self.args, self.n_classes = extract, dict(size=size, patch_size=patch_size, flip=flip), n_classes
        x = normalize(torch.stack([to_tensor(resize_image(p, (size, size))) for p in self.pictures]))
        with torch.no_grad():
            self.feat = torch.cat([extract(b) for b in x.split(50)]).half()
            self.mirrored = torch.cat([extract(b.flip(-1)) for b in x.split(50)]).half() if flip else None

    @torch.no_grad()
    def votes(self, labeller):
        "Votes [clusters, classes] of each share, without CRF."
        out = {s: 0 for s in dict.fromkeys(self.share)}
        for i in range(0, len(self.maps), 20):
            code = labeller.code(self.feat[i : i + 20].float())
            if self.mirrored is not None:
                code = (code + labeller.code(self.mirrored[i : i + 20].float()).flip(-1)) / 2
            size = self.maps[i].shape
            pred = (
                labeller.log_prob(F.interpolate(code, size, mode='bilinear', align_corners=False), 1.0)
                .argmax(1)
                .numpy()
                + 1
            )
            for p, m, s in zip(pred, self.maps[i : i + 20], self.share[i : i + 20]):
                out[s] = out[s] + pixel_votes(p, m, n_clusters=len(labeller.clusters), n_classes=self.n_classes)
        return out

    def votes_crf(self, labeller, *, alpha, crf, every):
        "Votes of every n-th image, with CRF, or without (None)."
        out, chosen = {s: 0 for s in dict.fromkeys(self.share)}, range(0, len(self.maps), every)
        pred = [
            m
            for i in range(0, len(chosen), 20)
            for m in segment(
                labeller,
                self.extract,
                [self.pictures[j] for j in chosen[i : i + 20]],
                alpha=alpha,
                crf=crf,
                **self.args,
            )
        ]
        for p, j in zip(pred, chosen):
            out[self.share[j]] = out[self.share[j]] + pixel_votes(
                p.astype(int) + 1, self.maps[j], n_clusters=len(labeller.clusters), n_classes=self.n_classes
            )
        return out


def summary(votes, n_things=8):
    "All classes over both shares, and stuff pixels alone."
    total = sum(votes.values())
    both, stuff = scores(total), scores(total[:, n_things:])
    return dict(
        acc=both['acc'],
        miou=both['miou'],
        stuff_acc=stuff['acc'],
        stuff_miou=stuff['miou'],
        majority=total.max(1).sum() / total.sum(),
    )


def prepare(args, p, data):
    "Features of the training images, pooled features, the labelled images; seconds of CPU for the first."
    if args.cache and Path(args.cache).exists():
        return torch.load(args.cache, weights_only=False)
    vit = ViTFeatures.from_file(args.backbone)
    extract = extractor(vit, p['feature'])
    t = time.process_time()
    images = list_images(data['root'], data['train'])
    source = PatchFeatures(extract, data['root'], images, size=p['size'], crops=p['crops'])
    with tempfile.TemporaryDirectory() as folder:
        pooled = pool_features(source, folder=folder, key={})[0].clone()
    features = keep_features(source, max_gb=p['max_gb'])
    made = (
        features,
        pooled,
        Truth(args.labelled, extract, size=p['segment']['size'], patch_size=vit.patch_size, flip=p['segment']['flip']),
        time.process_time() - t,
    )
    if args.cache:
        torch.save(made, args.cache)
    return made


def project(features, truth, n_axes):
    "Both sets of features on the first axes of the training features (not centred); what is kept of their squares."
    x = features[::3].float().permute(0, 2, 3, 1).flatten(0, 2)
    axes = torch.linalg.eigh(x.T @ x)[1].flip(1)[:, :n_axes]
    on = lambda f: None if f is None else torch.einsum('bdhw,dc->bchw', f.float(), axes).half()
    truth.feat, truth.mirrored = on(truth.feat), on(truth.mirrored)
    return on(features), ((x @ axes).square().sum() / x.square().sum()).item()


def fit_args(p):
    return {k: p[k] for k in FIT}


def train(p, features, neighbors, seed):
    "STEGO with its own probe and with the clusters found anew; seconds of CPU."
    with tempfile.TemporaryDirectory() as folder:
        t = time.process_time()
        sgd = fit_stego(features, neighbors, seed=seed, folder=folder, **fit_args(p))
        dt = time.process_time() - t
    return {'STEGO, probe sgd': sgd, 'STEGO, probe kmeans': refit_probe(sgd, features, seed=seed)}, dt


def spread(rows, key):
    v = [r[key] for r in rows]
    return f'{statistics.mean(v):.3f} ({min(v):.3f} - {max(v):.3f})'


HEAD = '| labeller | PixelAcc | mIoU | stuff PixelAcc | stuff mIoU | PixelAcc by vote |\n|---|---|---|---|---|---|'


def line(name, rows):
    return (
        f'| {name} | '
        + ' | '.join(spread(rows, k) for k in ('acc', 'miou', 'stuff_acc', 'stuff_miou', 'majority'))
        + ' |'
    )


def ablation(p, features, neighbors, truth, seeds, every):
    "Rows of all labellers, printed as they come; seconds of CPU of a training."
    rows, seconds = {}, []

    def add(name, votes):
        rows.setdefault(name, []).append(summary(votes))
        print(line(name, rows[name]), flush=True)

    total = sum(truth.votes(fit_kmeans(features, n_classes=2, code_dim=8, smooth=1, seed=0)).values()).sum(
        0, keepdims=True
    )
    add('one cluster for all (floor)', {'all': total})
    for seed in seeds:
        made, dt = train(p, features, neighbors, seed)
        seconds.append(dt)
        made |= {
            f'k-means, smooth {s}': fit_kmeans(features, n_classes=p['n_classes'], code_dim=64, smooth=s, seed=seed)
            for s in (1, 3)
        }
        for name, labeller in made.items():
            add(name, truth.votes(labeller))
            if every and name in (f"STEGO, probe {p['probe']}", 'k-means, smooth 1'):
                add(
                    f'{name}, CRF (every {every}th picture)',
                    truth.votes_crf(labeller, alpha=p['segment']['alpha'], crf=p['crf'], every=every),
                )
    return '\n'.join([HEAD, *(line(*r) for r in sorted(rows.items()))]), statistics.median(seconds)


SWEEP = dict(
    pointwise=(True,),
    n_classes=(8, 10, 20, 27),
    b_rand=(0.45, 0.6, 0.8),
    b_self=(0.5, 0.85),
    b_knn=(0.4, 0.7),
    w_self=(0.2, 1.0),
    w_knn=(0.1, 0.8),
    w_rand=(0.3, 1.0),
    code_dim=(10, 64),
    dropout=(0.0, 0.3),
    n_iters=(300, 2000),
)


def sweep(p, features, neighbors, truth):
    "One knob at a time around the chosen settings, seed 0, without CRF."
    out = [HEAD.replace('labeller', 'setting')]
    for name, value in [('as chosen', None), *((k, v) for k, values in SWEEP.items() for v in values if v != p[k])]:
        made, _ = train(p | ({} if value is None else {name: value}), features, neighbors, 0)
        out.append(
            line(f'{name} {"" if value is None else value}', [summary(truth.votes(made[f"STEGO, probe {p['probe']}"]))])
        )
        print(out[-1], flush=True)
    return '\n'.join(out)


def export_cost(p, labeller, extract, patch_size, root, images, crf):
    "Milliseconds of CPU an image, one process."
    with tempfile.TemporaryDirectory() as folder:
        t = time.process_time()
        write_semantic(
            labeller,
            extract,
            root,
            images,
            Path(folder) / 'semantic',
            size=p['segment']['size'],
            patch_size=patch_size,
            alpha=p['segment']['alpha'],
            flip=p['segment']['flip'],
            crf=crf,
            work_folder=Path(folder) / 'work',
        )
        return 1000 * (time.process_time() - t) / len(images)


def knn_cost(n=20000, d=384):
    "Seconds of CPU, and megabytes beside the vectors."
    x = F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(0)), dim=1)
    before, t = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    nearest_images(x, 7)
    return time.process_time() - t, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3


def main():
    q = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    q.add_argument('--labelled', required=True)
    q.add_argument('--params', default='params.yaml')
    q.add_argument('--backbone', default='out/features/backbone.safetensors')
    q.add_argument('--seeds', type=int, default=3)
    q.add_argument('--sweep', action='store_true')
    q.add_argument('--crf-every', type=int, default=4)
    q.add_argument('--train')
    q.add_argument('--axes', type=int, default=0)
    q.add_argument('--cache')
    q.add_argument('--out')
    args = q.parse_args()
    params = yaml.safe_load(Path(args.params).read_text())
    p = params['stego']
    data = params.get('data', dict(root='data/embedded', train=['objects/train', 'scenes/train']))
    torch.set_num_threads(1)
    if args.train:
        data = dict(root=args.train, train=['objects/train', 'scenes/train'])
    features, pooled, truth, t_feat = prepare(args, p, data)
    neighbors, note = nearest_images(pooled, p['n_neighbors']), ''
    if args.axes:
        features, kept = project(features, truth, args.axes)
        note = f' on their first {args.axes} axes ({kept:.1%} of their squares)'
    if args.sweep:
        text = (
            '## Sweep\n\n`python benchmarks/stego.py --labelled DIR --sweep`: one knob at a time, seed 0, no CRF.\n\n'
            + sweep(p, features, neighbors, truth)
        )
    else:
        table, t_fit = ablation(p, features, neighbors, truth, range(args.seeds), args.crf_every)
        vit = ViTFeatures.from_file(args.backbone)
        extract = extractor(vit, p['feature'])
        images = list_images(data['root'], data['train'])
        km = Labeller(Head(vit.dim, p['code_dim']), torch.randn(p['n_classes'], p['code_dim'])).requires_grad_(
            False
        )  # what it says does not matter here
        costs = [
            export_cost(p, km, extract, vit.patch_size, data['root'], images[-32:], crf) for crf in (None, p['crf'])
        ]
        t_knn, mb = knn_cost()
        n = 118_287 * 5
        options = (
            (' --train DIR' if args.train else '')
            + (f' --axes {args.axes}' if args.axes else '')
            + f' --crf-every {args.crf_every}'
        )
        mirrored = ' with mirror image' if p['segment']['flip'] else ''
        text = f'''# STEGO

`python benchmarks/stego.py --labelled DIR{options}`, one thread.
{len(truth.maps)} labelled images of the object-centric and scene-centric sets, drawn from another seed than
`data/embedded`; {p['n_classes']} clusters matched one-to-one to 8 thing and 6 stuff classes (clusters beyond that
count as wrong); "stuff": pixels of the 6 stuff classes alone, matched one-to-one anew.
Trained on {len(features)} images; scored on maps made at {truth.size} px.
Features `{p['feature']}`{note}, the same for both. Mean (lowest - highest) of {args.seeds} seeds.

{table}

## Cost

Times are seconds of CPU (one core).

| | |
|---|---|
| features of {len(features)} training and {len(truth.maps)} labelled images, once | {t_feat:.0f} s |
| training, {p['n_iters']} steps of {p['batch_size']} | {t_fit:.0f} s |
| a map at {p['segment']['size']} px{mirrored}, without CRF | {costs[0]:.0f} ms |
| the same with CRF | {costs[1]:.0f} ms; 2,000 maps by 4 processes: {costs[1] / 2:.0f} s |
| 7 neighbours among 20,000 vectors of 384, exact | {t_knn:.1f} s, {mb:.0f} MB beside the vectors |

On paper, COCO train2017 with five crops and a ViT-S/8: {n:,} vectors of 384 are {n * 384 * 4 / 1e9:.2f} GB (twice that
while they are indexed), a block of 4,096 queries adds {4096 * 8 * 12 / 1e6:.1f} MB; the exact search is
{2 * n * n * 384 / 1e12:.0f} T operations: {t_knn * (n / 20000) ** 2 / 3600:.1f} h on one core here, about
{2 * n * n * 384 / 1e13 / 60:.1f} minutes at the 10 TFLOP/s that faiss reaches on a large GPU. Training: 5,000 steps of
2 x 16 views of 224 px are 160,000 forward passes of the ViT (about a minute at the 2,500 images/s that timm reports for
ViT-S/8 on an RTX 4090); features of all views would take {n * 784 * 384 * 2 / 1e9:.0f} GB, so they are computed as
they are asked for.
Maps: 118,287 images of 480 x 640 at 320 px, mirrored, are 2 x 1,590 tokens each; the CRF with 27 labels is what costs.
'''
    print(text)
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(text)


if __name__ == '__main__':
    main()
