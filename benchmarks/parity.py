"""The paper's network (R50, 800 clusters) in both engines, equal random weights, twenty real photos: largest differences.  Needs detectron2 and the photos of tests/test_detectron2_parity.py.

    python benchmarks/parity.py --write
"""
import argparse, sys
from datetime import date
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]/'tests'))

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--photos', type=int, default=20); p.add_argument('--short', type=int, default=800); p.add_argument('--double', action='store_true', help='in double precision'); p.add_argument('--write', action='store_true', help='write results/parity.md')
    a = p.parse_args()
    import detectron2
    from test_detectron2_parity import compare_full_size
    with pytest.MonkeyPatch.context() as m: gaps, n_shapes = compare_full_size(m, a.photos, a.short, torch.double if a.double else torch.float)
    text = '\n'.join([f'# Parity with detectron2, {date.today()}', '', f'`python benchmarks/parity.py --photos {a.photos} --short {a.short}`: R50, 800 clusters, 27 stuff labels, equal random weights, {a.photos} photos of {n_shapes} shapes, '
                      f'short side {a.short}; {"float64" if a.double else "float32"} on CPU, torch {torch.__version__}, detectron2 {detectron2.__version__}.', '',
                      'Largest absolute differences over all photos, before thresholds (boxes as a share of the picture\'s long side; `*_pixels` the share of pixels that differ after thresholds; `n_*` the fewest in a photo).', '',
                      '| | |', '|---|---|', *(f'| {k} | {v:.2g} |' for k, v in gaps.items())])
    print(text)
    if a.write: (Path(__file__).parent/'results').mkdir(exist_ok=True); (Path(__file__).parent/'results'/'parity.md').write_text(text + '\n')
