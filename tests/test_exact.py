"""What a stage computes depends on nothing that the environment says of the processor."""

import builtins
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from u2seg import exact
from u2seg.metrics import _qualities
from u2seg.results import headline
from u2seg.train import _log

PROBE = '''
import hashlib
import faiss, numpy as np, torch
from torch import nn
from torch.nn import functional as F
done = {}
def note(name, *values):
    arrays = [v.detach().numpy() if isinstance(v, torch.Tensor) else v for v in values]
    whole = b''.join(np.ascontiguousarray(a).tobytes() for a in arrays)
    done[name] = hashlib.sha256(whole).hexdigest()
rng = np.random.default_rng(0)
draw = lambda *shape: torch.from_numpy((rng.integers(-2**20, 2**20, shape)/2**19).astype(np.float32))
torch.manual_seed(0)
trunk = nn.Conv2d(3, 24, 5, 2, 2), nn.BatchNorm2d(24), nn.GELU(), nn.Conv2d(24, 48, 3, 2, 1)
net = nn.Sequential(*trunk, nn.Flatten(), nn.Linear(3072, 33))
note('first weights', *net.parameters())
optimizer = torch.optim.AdamW(net.parameters(), lr=.01, fused=True)
for _ in range(3):
    optimizer.zero_grad()
    F.cross_entropy(net(draw(4, 3, 32, 32)), torch.arange(4)).backward()
    optimizer.step()
note('trained weights', *net.state_dict().values())
x, y = draw(500, 192), draw(4, 48, 13, 13)
note('attention', F.scaled_dot_product_attention(*x.view(3, 1, 500, 64)))
names = 'exp', 'log', 'erf', 'tanh', 'sqrt', 'rsqrt'
note('elementwise', *(getattr(torch, f)(x.abs() + .1) for f in names), x.softmax(1))
small = F.interpolate(y, (9, 7), mode='bicubic', antialias=True)
note('resizing', F.interpolate(y, (29, 31), mode='bilinear'), small)
note('eigenvectors', *torch.linalg.eigh((x.T @ x).double()), *np.linalg.eigh((x.T @ x).numpy().astype(float)))
n = x.numpy()
ties = np.argsort((4*n).round().ravel())
note('numpy', n @ n.T, np.exp(n), np.log(abs(n) + .1), ties, n.astype(float).std(0))
index = faiss.IndexFlatL2(192); index.add(n)
note('faiss', *index.search(n[:5], 7), *index.search(n, 3))
done
'''
OUTER = dict(
    ATEN_CPU_CAPABILITY='default',
    ONEDNN_MAX_CPU_ISA='SSE41',
    MKL_CBWR='AVX2',
    OMP_NUM_THREADS='3',
    MKL_NUM_THREADS='3',
    OPENBLAS_CORETYPE='Nehalem',
    OPENBLAS_NUM_THREADS='3',
    NPY_DISABLE_CPU_FEATURES='X86_V3 X86_V4',
    FAISS_SIMD_LEVEL='NONE',
)
able = exact.arithmetic('exact') == 'exact'
needs_avx2 = pytest.mark.skipif(not able, reason='exact arithmetic needs x86-64 Linux with AVX2')


@pytest.fixture
def probe(tmp_path):
    tagged = lambda source, *tags: new_code_cell(source, metadata=dict(tags=list(tags)))
    parameters, check = tagged("size = 1\nroot = '..'", 'parameters'), tagged('assert size', 'check')
    cells = [new_markdown_cell('# Stage probe: sums'), parameters, check, new_code_cell(PROBE)]
    (tmp_path / 'nbs').mkdir()
    nbformat.write(new_notebook(cells=cells), tmp_path / 'nbs' / '10_run_probe.ipynb')
    params = dict(data=dict(root='.', train=[], val=[]), probe=dict(size=1))
    (tmp_path / 'params.yaml').write_text(yaml.safe_dump(params))

    def run(arithmetic, **given):
        env = {k: v for k, v in os.environ.items() if k not in exact.PINS} | given | dict(U2SEG_ARITHMETIC=arithmetic)
        call = [sys.executable, '-c', 'from u2seg.stage import run_stage; run_stage("probe")']
        p = subprocess.run(call, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert p.returncode == 0, p.stderr
        done = nbformat.read(tmp_path / 'out' / 'probe' / 'run.ipynb', 4)
        return eval(done.cells[-1].outputs[-1].data['text/plain'])

    return run


@needs_avx2
def test_settings_from_outside_change_no_bytes(probe):
    right = probe('exact')
    assert probe('exact', **OUTER) == right
    differs = {name for name, digest in probe('fast', **OUTER).items() if digest != right[name]}
    assert differs >= {'trained weights', 'attention', 'elementwise', 'eigenvectors', 'numpy', 'faiss'}


def test_the_word_is_checked(monkeypatch):
    monkeypatch.setenv('U2SEG_ARITHMETIC', 'quick')
    with pytest.raises(ValueError, match="U2SEG_ARITHMETIC must be exact or fast, got 'quick'"):
        exact.arithmetic()


def test_a_stage_leaves_the_environment_as_it_was():
    from u2seg.stage import _environment

    before = dict(os.environ)
    with _environment(exact.PINS):
        assert os.environ['MKL_CBWR'] == 'COMPATIBLE'
    assert dict(os.environ) == before


@needs_avx2
def test_opencv_is_held_to_avx2_without_a_word():
    script = 'import cv2, numpy as np; cv2.blur(np.ones((64, 64), np.float32), (3, 3)); print(cv2.getCPUFeaturesLine())'
    env = os.environ | exact.PINS
    p = subprocess.run([sys.executable, '-c', script], env=env, capture_output=True, text=True, check=True)
    assert p.stderr == ''  # it warns of names that it does not know
    assert all(f.endswith('?') for f in p.stdout.split() if 'AVX512' in f)  # '?': not there, or switched off


def test_scores_and_losses_are_added_from_left_to_right(monkeypatch):
    "Since Python 3.12 `sum` compensates the error of floats: its last digits are others than before."
    real = sum

    def compensated(values, start=0):
        values = list(values)
        return math.fsum(values) if any(type(v) is float for v in values) else real(values, start)

    monkeypatch.setattr(builtins, 'sum', compensated)
    want = 0.0
    for _ in range(10):
        want += 0.1
    assert want != sum([0.1] * 10)
    run = SimpleNamespace(window={}, rows=[])
    for i in range(10):
        _log(run, i, 0.1, {f'loss{k}': 0.1 for k in range(10)}, close=i == 9)
    (row,) = run.rows
    assert row['loss0'] == want / 10
    total = 0.0
    for k in range(10):
        total += row[f'loss{k}']
    assert row['loss'] == total
    classes = {c: dict(isthing=1) for c in range(10)}
    quality = _qualities({c: dict(iou=0.1, tp=1, fp=0, fn=0) for c in classes}, classes)
    assert quality['All']['pq'] == want / 10
    rows = [dict(percent=1, init='u2seg', mask_AP=0.1)] * 10
    assert headline([], rows)['few_labels']['mask_AP_1_percent'] == want / 10
