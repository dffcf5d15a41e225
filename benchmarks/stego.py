"""STEGO against k-means on the same features, with a single cluster as the floor; PixelAcc and mIoU on a labelled development set, one-to-one.

    python benchmarks/stego.py --labelled DIR [--sweep] [--out benchmarks/results/stego.md]

DIR holds `objects/` and `scenes/` in the layout of `data/`, drawn from another seed (`u2seg.scenes.draw_dataset`), so that nothing is tuned on the images that
the tables report. Training sees the images of `params.yaml`, without labels. Settings are those of `params.yaml`, section `stego`; `--sweep` varies them one at a time.
"""
import argparse, json, resource, statistics, tempfile, time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import yaml

from u2seg.features import ViTFeatures
from u2seg.images import list_images, normalize, read_ids, read_image, read_json, resize_image, to_tensor
from u2seg.matching import match_clusters, pixel_votes
from u2seg.stego import PatchFeatures, fit_kmeans, fit_stego, gather_features, linear_probe, nearest_images, refit_probe, segment, write_semantic

FIT = ('n_classes', 'code_dim', 'dropout', 'n_steps', 'batch_size', 'lr', 'lr_probe', 'w_self', 'w_knn', 'w_rand', 'b_self', 'b_knn', 'b_rand', 'n_points', 'n_random')


def scores(votes):
    "PixelAcc and mIoU of votes [clusters, classes] after one-to-one matching; clusters without a class count as wrong."
    mapping = match_clusters(votes, 'hungarian')
    hit = np.zeros(votes.shape[1]); said = np.zeros(votes.shape[1])
    for k, c in enumerate(mapping):
        if c >= 0: hit[c], said[c] = votes[k, c], votes[k].sum()
    true = votes.sum(0)
    return dict(acc=hit.sum() / votes.sum(), miou=(hit / (true + said - hit))[true > 0].mean())


def read_truth(folder, share, split='val'):
    "Pictures and class maps (1 ... n, 0 = void) of one share."
    coco = read_json(folder/share/'annotations'/f'panoptic_{split}.json')
    ids = {c['id']: i for i, c in enumerate(sorted(coco['categories'], key=lambda c: c['id']), 1)}
    names = {im['id']: im['file_name'] for im in coco['images']}
    for a in coco['annotations']:
        x = read_ids(folder/share/'annotations'/f'panoptic_{split}'/a['file_name'])
        table = np.zeros(x.max() + 1, np.uint8)
        for s in a['segments_info']: table[s['id']] = ids[s['category_id']]
        yield read_image(folder/share/split/names[a['image_id']]), table[x]


class Truth:
    "The labelled pictures, their features (once), and the votes of a labeller."
    def __init__(self, folder, extract, *, size, patch_size, flip, n_classes=14, shares=('objects', 'scenes')):
        self.share, self.pictures, self.maps = [], [], []
        for share in shares:
            for picture, m in read_truth(Path(folder), share): self.share.append(share); self.pictures.append(picture); self.maps.append(m)
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
            code = labeller.code(self.feat[i:i + 20].float())
            if self.mirrored is not None: code = (code + labeller.code(self.mirrored[i:i + 20].float()).flip(-1)) / 2
            size = self.maps[i].shape
            pred = labeller.log_prob(F.interpolate(code, size, mode='bilinear', align_corners=False), 1.).argmax(1).numpy() + 1
            for p, m, s in zip(pred, self.maps[i:i + 20], self.share[i:i + 20]): out[s] = out[s] + pixel_votes(p, m, n_clusters=len(labeller.clusters), n_classes=self.n_classes)
        return out

    def votes_crf(self, labeller, *, alpha, crf):
        out = {s: 0 for s in dict.fromkeys(self.share)}
        for i in range(0, len(self.maps), 20):
            pred = segment(labeller, self.extract, self.pictures[i:i + 20], alpha=alpha, crf=crf, **self.args)
            for p, m, s in zip(pred, self.maps[i:i + 20], self.share[i:i + 20]): out[s] = out[s] + pixel_votes(p.astype(int) + 1, m, n_clusters=len(labeller.clusters), n_classes=self.n_classes)
        return out


def summary(votes, n_things=8):
    "All classes over both shares, and stuff pixels alone."
    total = sum(votes.values())
    both, stuff = scores(total), scores(total[:, n_things:])
    return dict(acc=both['acc'], miou=both['miou'], stuff_acc=stuff['acc'], stuff_miou=stuff['miou'], majority=total.max(1).sum() / total.sum())
