"""Interrupted training of all; SmooSeg and CAUSE: seeds, losses and bank against loops, and the stage."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from test_stego import FIT as STEGO

from u2seg import cause, smooseg, stego
from u2seg.cause import cause_loss, modularity, pick_patches, update_bank
from u2seg.features import ViTFeatures, write_backbone
from u2seg.labeller import load_labeller
from u2seg.scenes import draw_dataset
from u2seg.smooseg import smoothness
from u2seg.stage import load_params, run_stage

G = lambda seed=0: torch.Generator().manual_seed(seed)
FIT = dict(n_classes=3, code_dim=4, dropout=0.1, n_iters=12, batch_size=4, lr=1e-2, lr_probe=5e-2, seed=5, log_every=1)
FITS = dict(
    smooseg=(
        smooseg,
        smooseg.fit_smooseg,
        FIT | dict(pointwise=True, b_self=0.1, b_rand=0.4, temperature=0.1, decay=0.9),
    ),
    cause=(
        cause,
        cause.fit_cause,
        FIT | dict(n_points=3, n_concepts=6, positive=0.5, negative=0.2, decay=0.9),
    ),
)


def fit_stego(feats, **options):
    return stego.fit_stego(feats, torch.randint(1, 10, (10, 3), generator=G(8)), **options)


@pytest.fixture(params=FITS)
def fitting(request):
    return FITS[request.param]


@pytest.fixture
def feats():
    return torch.randn(10, 5, 4, 4, generator=G(7))


def same(a, b):
    return all(torch.equal(v, w) for v, w in zip(a.state_dict().values(), b.state_dict().values()))


@pytest.mark.parametrize('module, fit, options', [*FITS.values(), (stego, fit_stego, STEGO)], ids=[*FITS, 'stego'])
def test_training_resumes_as_if_it_had_not_stopped(module, fit, options, feats, tmp_path, monkeypatch):
    whole = fit(feats, folder=tmp_path / 'a', checkpoint_every=100, **options)
    step = module._train_step

    def killed(t, *args):
        if t == 7:
            raise KeyboardInterrupt
        return step(t, *args)

    monkeypatch.setattr(module, '_train_step', killed)
    with pytest.raises(KeyboardInterrupt):
        fit(feats, folder=tmp_path / 'b', checkpoint_every=3, **options)
    seen = []
    monkeypatch.setattr(module, '_train_step', lambda t, *args: (seen.append(t), step(t, *args))[1])
    resumed = fit(feats, folder=tmp_path / 'b', checkpoint_every=3, **options)
    assert seen == list(range(6, 12)) and same(whole, resumed)
    assert (tmp_path / 'a' / 'log.csv').read_bytes() == (tmp_path / 'b' / 'log.csv').read_bytes()
    rows = list(csv.DictReader(open(tmp_path / 'a' / 'log.csv')))
    assert [int(r['step']) for r in rows] == list(range(12))
    assert list(rows[0]) == ['step', *getattr(module, 'LOSSES', ('loss', 'probe'))]


def test_seeds_and_settings_matter_and_the_global_generator_does_not(fitting, feats, tmp_path):
    _, fit, options = fitting
    torch.manual_seed(3)
    after = torch.rand(2)
    torch.manual_seed(3)
    a = fit(feats, folder=tmp_path, **options)
    assert torch.equal(torch.rand(2), after)
    assert same(a, fit(feats, folder=tmp_path / 'b', **options))
    assert not same(a, fit(feats, folder=tmp_path, **options | dict(seed=6)))
    assert not same(a, fit(feats, folder=tmp_path, **options | dict(decay=0.5)))


def cos(a, b):
    return float(np.dot(a, b) / np.sqrt(np.dot(a, a) * np.dot(b, b)))


@pytest.mark.parametrize('pointwise', [True, False])
def test_smoothness_is_the_energy_of_the_paper(pointwise):
    fa, fb = torch.randn(2, 3, 5, 2, 3, generator=G(1))
    pa, pb = torch.rand(2, 3, 4, 2, 3, generator=G(2))
    rows = [np.asarray(x.flatten(2).mT, float) for x in (fa, fb, pa, pb)]
    w = [[[cos(f, g) for g in fs] for f in ff] for ff, fs in zip(*rows[:2])]
    overall = np.mean(w)
    terms = []
    for b in range(3):
        for i in range(6):
            centre = np.mean(w[b][i]) - overall if pointwise else 0
            terms += [(w[b][i][j] - centre - 0.3) * (1 - cos(rows[2][b][i], rows[3][b][j])) for j in range(6)]
    assert smoothness(fa, fb, pa, pb, 0.3, pointwise=pointwise).item() == pytest.approx(np.mean(terms), abs=1e-6)


def test_modularity_of_whole_groups_is_newmans():
    "Patches of two orthogonal directions, and these as concepts: delta is tanh(10) within a group, 0 between."
    x = torch.eye(4)[torch.tensor([0, 0, 0, 1, 1])]
    a = np.array([[i != j and (i < 3) == (j < 3) for j in range(5)] for i in range(5)], float)
    d, e = a.sum(1), a.sum()
    q = sum(a[i, j] - d[i] * d[j] / e for i in range(5) for j in range(5) if (i < 3) == (j < 3)) / e
    assert modularity(x[None], torch.eye(4)[:2]).item() == pytest.approx(q * np.tanh(10), abs=1e-6)


def test_the_bank_keeps_the_last_of_each_concept():
    "Beside a dictionary of lists."
    bank, concepts, lists = torch.zeros(0, 1), torch.zeros(0, dtype=torch.long), {}
    for t in range(9):
        of = torch.randint(5, (7,), generator=G(t))
        new = torch.arange(7.0)[:, None] + 7 * t
        bank, concepts = update_bank(bank, concepts, new, of, n_max=4)
        for k, v in zip(of.tolist(), new[:, 0].tolist()):
            lists[k] = [*lists.get(k, []), v][-4:]
        assert {k: bank[concepts == k, 0].tolist() for k in lists} == lists


def test_contrast_counts_the_pairs_of_the_paper():
    y, k = torch.randn(2, 3, 5, 2, 2, generator=G(1))
    bank, of = F.normalize(torch.randn(6, 5, generator=G(2)), dim=1), torch.randint(4, (6,), generator=G(3))
    book = F.normalize(torch.randn(4, 3, generator=G(4)), dim=1)
    which = torch.randint(4, (3, 2, 2), generator=G(5))
    likeness = (book @ book.T).tolist()
    flat = lambda x: np.asarray(x.movedim(1, -1).reshape(-1, 5), float)
    labels = which.flatten().tolist()

    def term(anchor, mine, keys, their, skip=None):
        near, far = [], []
        for j, (key, other) in enumerate(zip(keys, their)):
            if j == skip:
                continue
            if likeness[mine][other] > 0.4:
                near.append(np.exp(cos(anchor, key) / 0.07))
            elif likeness[mine][other] < 0.1:
                far.append(np.exp(cos(anchor, key) / 0.07))
        return [-np.log(e / (sum(near) + sum(far))) for e in near]

    expected = []
    for view in range(3):
        ids = range(4 * view, 4 * view + 4)
        batch = sum((term(flat(y)[i], labels[i], flat(k), labels, skip=i) for i in ids), [])
        banked = sum((term(flat(y)[i], labels[i], bank.numpy(), of.tolist()) for i in ids), [])
        expected += [sum(x) / max(len(x), 1) for x in (batch, banked)]
    loss = cause_loss(y, k, which, bank, of, book @ book.T, positive=0.4, negative=0.1)
    assert loss.item() == pytest.approx(np.mean(expected), abs=1e-4)


@pytest.mark.parametrize('h, w, n', [(3, 5, 2), (7, 7, 7), (2, 9, 4), (5, 5, 3)])
def test_a_patch_of_each_cell(h, w, n):
    x = torch.arange(h * w).view(1, 1, h, w).expand(40, 2, h, w)
    picked = pick_patches(x, n, G(1))
    n = min(n, h, w)
    assert picked.shape == (40, 2, n, n) and torch.equal(picked[:, 0], picked[:, 1])
    row, column = picked[:, 0] // w, picked[:, 0] % w
    assert (row.diff(dim=1) >= 0).all() and (column.diff(dim=2) >= 0).all()
    assert len(picked.unique()) == h * w


@pytest.mark.parametrize('name, probe', [('smooseg', 'sgd'), ('cause', 'kmeans')])
def test_the_stage_runs_with_each_labeller(name, probe, tmp_path, monkeypatch):
    repo = Path(__file__).parents[1]
    (tmp_path / 'nbs').symlink_to(repo / 'nbs')
    draw_dataset(tmp_path / 'data', seed=1, n_train=6, n_val=1, kinds=('scenes',))
    vit = dict(img_size=32, embed_dim=6, depth=1, num_heads=1, patch_size=8)
    write_backbone(tmp_path / 'out' / 'features' / 'backbone.safetensors', ViTFeatures(vit).vit, vit)
    params = load_params(repo)
    params['data'] |= dict(root='data', train=['scenes/train'], val=['scenes/val'])
    small = dict(n_classes=3, code_dim=4, n_iters=4, batch_size=4, size=64, crf=None, n_procs=1)
    params['stego'] |= dict(labeller=name, probe=probe, feature='patches', **small)
    (tmp_path / 'params.yaml').write_text(yaml.safe_dump(params))
    monkeypatch.chdir(tmp_path)
    run_stage('stego', tmp_path)
    out = tmp_path / 'out' / 'stego'
    model, _ = load_labeller(out / 'head.safetensors')
    assert model.clusters.shape == (3, 4) and len(list((out / 'semantic').glob('*.png'))) == 6
    first = (out / 'log.csv').read_text().splitlines()[0]
    assert first == dict(smooseg='step,loss,self,rand,data', cause='step,loss,probe')[name]
