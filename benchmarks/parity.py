"""The paper's network (R50, 800 clusters) in both engines, equal random weights, real photographs: largest differences.

    python benchmarks/parity.py DIR [--photos 20] [--short 800] [--out benchmarks/results/parity.md]

Needs detectron2, and a folder DIR of photographs (*.jpg, at any depth) of one's own.
"""

import argparse, sys
from pathlib import Path

import pytest
import torch

from machine import heading, publish

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / 'tests'))

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('folder', type=Path, help='photographs, *.jpg at any depth')
    p.add_argument('--photos', type=int, default=20)
    p.add_argument('--short', type=int, default=800, help='short side in single precision')
    p.add_argument('--short-double', type=int, default=160, help='... in double precision')
    p.add_argument('--photos-double', type=int, default=20)
    p.add_argument('--out', help='write the result to this file')
    a = p.parse_args()
    import test_detectron2_parity as parity

    parity.photos = a.folder

    sides = {'float64': (a.photos_double, a.short_double, torch.double), 'float32': (a.photos, a.short, torch.float)}
    found = {}
    for name, (n, short, dtype) in sides.items():
        with pytest.MonkeyPatch.context() as m:
            found[name] = parity.compare_full_size(m, n, short, dtype)
    publish(
        heading('Parity with detectron2', torch.get_num_threads(), ['torch', 'torchvision', 'detectron2'], '')
        + [
            f'R50, 800 clusters, 27 stuff labels, equal random weights, real photos of {found["float32"][1]} shapes. '
            'Largest absolute differences over all photos, every part fed with the same input, before thresholds. '
            "Boxes are a share of the image's long side, losses above 1 a share of the loss; `*_pixels` is the share "
            'of pixels that differ after all thresholds, `n_*` the fewest in a photo. Features are of size 10: in '
            'single precision the result of either engine is some 3e-4 away from the exact one.',
            '',
            '| | '
            + ' | '.join(f'{name}, {n} photos, short side {short}' for name, (n, short, _) in sides.items())
            + ' |',
            '|---|---|---|',
            *(
                f'| {k} | ' + ' | '.join(f'{found[name][0][k]:.2g}' for name in sides) + ' |'
                for k in found['float32'][0]
            ),
        ],
        a.out,
    )
