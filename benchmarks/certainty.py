"""Is the labeller right where it is certain? Accuracy of its maps on stuff, by fifths of the certainty.

    python benchmarks/certainty.py [--images 30] [--out FILE.md]

Needs `dvc pull data.dvc out/stego/head.safetensors features`. Ground truth of the first images of each folder of
`data.val`; a cluster counts as the class that most of its pixels have. Two certainties are compared: the largest
probability after the CRF, and what the labeller itself gave the final label before the CRF.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from machine import heading
from u2seg.crf import dense_crf
from u2seg.features import ViTFeatures
from u2seg.images import read_image
from u2seg.labeller import extractor, load_labeller
from u2seg.semantic import patch_codes, pixel_probs
from u2seg.stage import load_params
from u2seg.truth import read_truth, truth_map

FIFTHS = 5


def pixels(root, split, n_images, vit, labeller, settings):
    "Class, cluster and both certainties of every pixel of stuff, one array of four rows an image."
    truth = read_truth(root, split)
    extract, out = extractor(vit, settings['feature']), []
    for im in truth.images[:n_images]:
        image = read_image(Path(root) / im['file_name'])
        options = dict(size=settings['size'], patch_size=vit.patch_size, flip=settings['flip'])
        code = patch_codes(labeller, extract, [image], **options)
        before = pixel_probs(labeller, code, image.shape[:2], alpha=settings['alpha'])[0]
        after = dense_crf(image, before, **settings['crf'])
        label, gt = after.argmax(0), torch.from_numpy(truth_map(truth, im['id']).astype(np.int64))
        own = before.gather(0, label[None])[0]
        of_stuff = torch.isin(gt, torch.tensor(truth.stuff))
        out.append(torch.stack([gt.double(), label.double(), after.amax(0).double(), own.double()])[:, of_stuff])
    return torch.cat(out, 1).numpy()


def accuracies(gt, label, certainty):
    "Accuracy of all pixels, then of each fifth, from the least certain."
    table = np.zeros((int(label.max()) + 1, int(gt.max()) + 1))
    np.add.at(table, (label.astype(int), gt.astype(int)), 1)
    right = table.argmax(1)[label.astype(int)] == gt
    order = np.argsort(certainty, kind='stable')
    return [right.mean(), *(right[part].mean() for part in np.array_split(order, FIFTHS))]


def main():
    q = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    q.add_argument('--images', type=int, default=30)
    q.add_argument('--out', default='benchmarks/results/certainty.md')
    args = q.parse_args()
    torch.set_num_threads(1)
    data = load_params()['data']
    vit = ViTFeatures.from_file('out/features/backbone.safetensors')
    labeller, settings = load_labeller('out/stego/head.safetensors')
    head = ' | '.join(['images', 'certainty', 'all', 'least', '2', '3', '4', 'most'])
    lines = [f'| {head} |', '|---' * 8 + '|']
    for split in data['val']:
        gt, label, after, before = pixels(data['root'], split, args.images, vit, labeller, settings)
        for name, c in {'after the CRF': after, 'before': before}.items():
            cells = ' | '.join(f'{100 * a:.1f}' for a in accuracies(gt, label, c))
            lines.append(f'| {split} | {name} | {cells} |')
    how = 'Percent of the pixels of stuff whose cluster is of the right class, by fifths of the certainty.'
    Path(args.out).write_text('\n'.join([*heading('Certainty of stuff labels', 1, ['torch'], how), *lines, '']))


if __name__ == '__main__':
    main()
