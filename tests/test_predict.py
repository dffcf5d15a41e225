"Prediction in users' hands: forms of input, files written, resume, faults."

import hashlib
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from common import PREDICTS
from u2seg.baselines import model_predictions
from u2seg.images import read_json, write_json, write_png
from u2seg.checkpoints import save_weights
from u2seg.masks import decode_rle, read_ids
from u2seg.model import build_model
from u2seg.folder import find_images, predict_folder
from u2seg.names import by_name, Names, write_names
from u2seg.predict import Prediction, U2Seg, as_image, free_memory, run_network
from u2seg.recipes import for_images

TINY = dict(PREDICTS, n_stuff=2)


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp('model')
    torch.manual_seed(0)
    save_weights(build_model(TINY), folder / 'model.safetensors')
    return folder


def picture(seed=0, h=48, w=64):
    return np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)


def same(a, b):
    return (
        all(
            np.array_equal(getattr(a, k), getattr(b, k))
            for k in ('boxes', 'scores', 'categories', 'masks', 'semantic', 'ids')
        )
        and a.segments == b.segments
    )


def test_every_form_of_an_image_gives_the_same(weights, tmp_path):
    model, x = U2Seg.from_pretrained(weights, device='cpu'), picture()
    write_png(tmp_path / 'x.png', x)
    first = model.predict(x)
    forms = [
        tmp_path / 'x.png',
        str(tmp_path / 'x.png'),
        Image.fromarray(x),
        torch.from_numpy(x).permute(2, 0, 1),
        x.astype(np.float32) / 255,
    ]
    assert all(same(first, model.predict(f)) for f in forms)
    assert [same(first, p) for p in model.predict([x, x, x], batch_size=1)] == [True] * 3
    assert model.predict([]) == []


@pytest.mark.parametrize(
    'wrong',
    [
        np.zeros((4, 4, 5), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.full((4, 4, 3), 7.0),
        np.zeros((4, 4, 3), np.int64),
        3,
        'http://x/y.png',
        torch.zeros(2, 3, 4, 4),
    ],
)
def test_what_is_no_image_is_refused(wrong):
    with pytest.raises(ValueError):
        as_image(wrong)


def test_forms_of_one_channel_and_alpha():
    grey = picture()[..., 0]
    assert (as_image(grey) == grey[..., None]).all() and (
        as_image(torch.from_numpy(grey)[None]) == grey[..., None]
    ).all()
    assert as_image(Image.new('RGBA', (3, 2))).shape == (2, 3, 3)
    turned = Image.new('RGB', (4, 2))
    turned.getexif()[0x112] = 6
    import io

    b = io.BytesIO()
    turned.save(b, 'JPEG', exif=turned.getexif())
    b.seek(0)
    assert as_image(Image.open(b)).shape == (4, 2, 3)


def test_one_pixel_and_long_images(weights):
    model = U2Seg.from_pretrained(weights, device='cpu')
    for h, w in ((1, 1), (3, 200), (200, 2)):
        p = model.predict(picture(h=h, w=w))
        assert p.ids.shape == p.semantic.shape == (h, w) and p.masks.shape[1:] == (h, w)


def test_results_agree_among_themselves(weights):
    p = U2Seg.from_pretrained(weights, device='cpu').predict(picture())
    coco = p.to_coco(7)
    assert len(coco['annotations']) == len(p.instances) == len(p.scores) > 0 and (np.diff(p.scores) <= 0).all()
    for a, m in zip(coco['annotations'], p.masks):
        assert (decode_rle(a['segmentation']) == m).all() and a['image_id'] == 7 and 1 <= a['category_id'] <= 3
    assert {s['id'] for s in coco['segments_info']} == set(np.unique(p.ids)) - {0}
    for s in coco['segments_info']:
        assert s['area'] == (p.ids == s['id']).sum()
    things = [s for s in p.segments if s['isthing']]
    scored = {s['id']: s['score'] for s in coco['segments_info'] if 'score' in s}  # stuff has none
    assert things and scored == {s['id']: round(float(p.scores[s['instance_id']]), 6) for s in things}
    json.dumps(coco)
    assert p.overlay().shape == p.image.shape and p.overlay().dtype == np.uint8
    assert all(s['name'].startswith(('thing_', 'stuff_')) for s in p.panoptic[1])


def test_instance_only_model_has_a_panoptic_map(tmp_path):
    save_weights(build_model(dict(TINY, n_things=1, n_stuff=0, panoptic_score=0.0)), tmp_path / 'model.safetensors')
    p = U2Seg.from_pretrained(tmp_path, device='cpu').predict(picture())
    assert p.semantic is None and p.segments and all(s['category_id'] == 1 for s in p.segments)


def test_from_pretrained_and_its_refusals(weights, tmp_path):
    state = U2Seg.from_pretrained(weights / 'model.safetensors', device='cpu').model.state_dict()
    torch.save(dict(model=state), tmp_path / 'a.pth')
    with pytest.raises(ValueError, match='model.yaml: not there'):
        U2Seg.from_pretrained(tmp_path / 'a.pth')
    assert same(
        U2Seg.from_pretrained(tmp_path / 'a.pth', config=TINY, device='cpu').predict(picture()),
        U2Seg.from_pretrained(weights, device='cpu').predict(picture()),
    )
    assert U2Seg.from_pretrained(tmp_path / 'a.pth', config=weights / 'model.yaml', device='cpu')
    with pytest.raises(ValueError, match='does not fit its configuration'):
        U2Seg.from_pretrained(tmp_path / 'a.pth', config=dict(TINY, n_things=9))
    with pytest.raises(ValueError, match='no such file of weights'):
        U2Seg.from_pretrained(tmp_path)
    (tmp_path / 'model.safetensors').write_bytes((weights / 'model.safetensors').read_bytes())
    (tmp_path / 'model.yaml').write_text('- 1\n')
    with pytest.raises(ValueError, match='not a mapping of model settings'):
        U2Seg.from_pretrained(tmp_path)


def test_names(weights, tmp_path):
    "What a person said of these very weights, beside them or beside params.yaml; else what ground truth said."
    file = tmp_path / 'out' / 'train' / 'model.safetensors'
    shutil.copytree(weights, file.parent)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    called = lambda: U2Seg.from_pretrained(file.parent, device='cpu').names
    assert called() == {1: 'thing_1', 2: 'thing_2', 3: 'thing_3', 4: 'stuff_1', 5: 'stuff_2'}
    mapping = tmp_path / 'out' / 'evaluate' / 'mapping.json'
    write_json(mapping, dict(model='0' * 64, names={'2': 'cat'}))
    assert called()[2] == 'thing_2'  # of other weights
    write_json(mapping, dict(model=digest, names={'2': 'cat', '3': 'cat'}))
    assert called() == {1: 'thing_1', 2: 'cat', 3: 'stuff_1', 4: 'stuff_2'}
    write_names(tmp_path / 'names.yaml', Names(3, 2, {'2': 'dog'}, frozenset('1'), model=digest))
    assert called() == {1: 'dog', 2: 'thing_3', 3: 'stuff_1', 4: 'stuff_2'}
    write_names(file.with_name('names.yaml'), Names(3, 2, {'2': 'fox'}, model=digest))
    assert called()[2] == 'fox'
    write_names(file.with_name('names.yaml'), Names(3, 2, {'2': 'fox'}, model='0' * 64))
    with pytest.raises(ValueError, match='belong to other weights'):
        called()


def test_names_without_their_model_are_refused(weights, tmp_path):
    "A mapping by hand would outlive the weights that it was made for."
    shutil.copytree(weights, tmp_path / 'model')
    for bad in ('{"2": "cat"}', '{"model": "", "names": {"9": "cat"}}', '{"model": "", "names": {"1": 3}}', '[]', '{'):
        (tmp_path / 'model' / 'mapping.json').write_text(bad)
        with pytest.raises(ValueError, match='mapping.json'):
            U2Seg.from_pretrained(tmp_path / 'model', device='cpu')


def test_predictions_by_name(weights):
    "Clusters of one name are merged, discarded ones are gone: each layer against the clusters themselves."
    becomes = np.array([0, 1, 0, 1, 2, 2])
    naming = Names(3, 2, {'1': 'pet', '3': 'pet', '4': 'sky', '5': 'sky'}, frozenset('2'))
    model = U2Seg.from_pretrained(weights, device='cpu', naming=naming)
    assert model.names == {1: 'pet', 2: 'sky'}
    plain = U2Seg.from_pretrained(weights, device='cpu', naming=Names(3, 2)).predict(picture())
    table = [dict(id=i, category_id=c, isthing=c < 4, area=0) for i, c in enumerate([1, 2, 3, 4, 5, 4], 1)]
    ids = np.random.default_rng(0).integers(0, 7, plain.ids.shape, dtype=np.int32)
    semantic = np.random.default_rng(1).integers(0, 3, plain.ids.shape, dtype=np.uint8)
    table = [dict(s, area=int((ids == s['id']).sum())) for s in table]
    clusters = np.array([1, 2, 3, 2])
    plain = replace(plain, categories=clusters, ids=ids, segments=table, semantic=semantic)
    p = by_name(replace(plain, naming=naming, names=model.names), None)
    assert p.categories.tolist() == [1, 1] and (p.scores == plain.scores[[0, 2]]).all()
    assert (p.masks == plain.masks[[0, 2]]).all() and (p.boxes == plain.boxes[[0, 2]]).all()
    categories = np.zeros(7, int)
    for s in p.segments:
        categories[s['id']] = s['category_id']
        assert s['area'] == (p.ids == s['id']).sum() > 0
    assert (categories[p.ids] == becomes[[0, 1, 2, 3, 4, 5, 4]][ids]).all()
    assert [s['category_id'] for s in p.segments] == [1, 1, 2]
    assert (p.semantic == np.array([0, 1, 1])[semantic]).all()


def test_parts_of_a_cluster_need_the_embedding(weights):
    "Split by the mask's mean row, in or below the middle; without an embedding a part's name is an alternative."
    parts = {'1': np.float32([[0], [48]]), '1a': np.float32([[0], [1]])}
    naming = Names(3, 2, {'1b': 'low', '1aa': 'high'}, frozenset(['1ab']), parts)
    embed = lambda image, masks: np.float32([[np.nonzero(m)[0].mean()] for m in masks])
    plain = U2Seg.from_pretrained(weights, device='cpu', naming=Names(3, 2))
    split = U2Seg.from_pretrained(weights, device='cpu', naming=naming, embed=embed)
    assert U2Seg.from_pretrained(weights, device='cpu', naming=naming).names[1] == 'high or low'
    seen = set()
    for seed in range(4):
        p, q = plain.predict(picture(seed)), split.predict(picture(seed))
        rows = np.array([np.nonzero(m)[0].mean() for m in p.masks])
        name = np.where(p.categories > 1, p.categories, np.where(rows > 24, 'low', np.where(rows < 0.5, 'high', '')))
        expected = [n if n in ('low', 'high') else f'thing_{n}' for n in name if n]
        assert [i['name'] for i in q.instances] == expected
        seen |= {*expected}
    assert 'low' in seen


def test_find_images(tmp_path):
    for n in ('a.png', 'sub/a.png', 'sub/b.png'):
        write_png(tmp_path / n, picture())
    (tmp_path / 'a.bmp').write_bytes((tmp_path / 'a.png').read_bytes())
    files = find_images([tmp_path / 'sub', str(tmp_path / '*.*'), tmp_path / 'a.png'])
    assert files == [str(tmp_path / n) for n in ('sub/a.png', 'sub/b.png', 'a.bmp', 'a.png')]
    with pytest.raises(ValueError, match='no such image'):
        find_images(tmp_path / '*.tif')


def test_photographs_in_formats_that_are_not_read_are_counted(tmp_path):
    for name in ('a.HEIC', 'deep/b.heic', 'c.cr2', 'notes.txt'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    said = f'^{tmp_path}: photographs in formats that are not read are left out .1 .cr2, 2 .heic.; save them as JPEG$'
    with pytest.warns(UserWarning, match=said), pytest.raises(ValueError, match='holds no image'):
        find_images(tmp_path)
    write_png(tmp_path / 'd.png', picture())
    with pytest.warns(UserWarning, match=said):
        assert find_images(tmp_path) == [str(tmp_path / 'd.png')]
    with pytest.warns(UserWarning, match=said):
        for_images(tmp_path)
    for named, count in (('a.HEIC', '1 .heic'), ('**/*.heic', '1 .heic'), ('c*', '1 .cr2')):
        with pytest.warns(UserWarning, match=f'{re.escape(named)}: photographs in formats .* are left out .{count}.'):
            find_images(tmp_path / named)


def test_links_and_long_names(weights, tmp_path):
    for n in ('x' * 251 + '.png', 'y' * 252 + '.im'):
        write_png(tmp_path / 'disk' / 'long.png', picture())
        (tmp_path / 'disk' / 'long.png').rename(tmp_path / 'disk' / n)
    (tmp_path / 'in').mkdir()
    (tmp_path / 'in' / 'a').symlink_to('../disk')
    (tmp_path / 'in' / 'loop').symlink_to('.')
    (tmp_path / 'in' / 'gone.png').symlink_to('nothing')
    told = predict_folder(
        [tmp_path / 'in', str(tmp_path / 'in' / '**' / '*.*'), tmp_path / 'disk'],
        weights,
        tmp_path / 'out',
        device='cpu',
    )
    assert (
        told['images'] == 2 and len(list((tmp_path / 'out' / 'overlay').rglob('*.png'))) == 2
    )  # each file once, whatever leads to it
    (skipped,) = read_json(tmp_path / 'out' / 'skipped.json')
    assert skipped['file_name'].endswith('gone.png') and 'no such file' in skipped['reason']


def test_folder_files_resume_and_faults(weights, tmp_path, monkeypatch):
    for i in range(4):
        write_png(tmp_path / 'in' / f'{i}.png', picture(i))
    (tmp_path / 'in' / 'bad.jpg').write_bytes(b'\xff\xd8broken')
    out = tmp_path / 'out'
    told = predict_folder(tmp_path / 'in', weights, out, device='cpu')
    assert told['images'] == 4 and told['skipped'] == 1 and read_json(out / 'skipped.json')[0]['file_name'] == 'bad.jpg'
    panoptic, instances = read_json(out / 'panoptic.json'), read_json(out / 'instances.json')
    assert (
        len(panoptic['images']) == 4
        and len(instances['annotations']) == told['instances']
        and [c['id'] for c in panoptic['categories']] == [1, 2, 3, 4, 5]
    )
    model = U2Seg.from_pretrained(weights, device='cpu')
    for a in panoptic['annotations']:
        ids, name = (
            read_ids(out / 'panoptic' / a['file_name']),
            next(i['file_name'] for i in panoptic['images'] if i['id'] == a['image_id']),
        )
        assert {s['id'] for s in a['segments_info']} == set(np.unique(ids)) - {0}
        assert (ids == model.predict(tmp_path / 'in' / name).ids).mean() > 0.99
    assert len(list((out / 'overlay').glob('*.png'))) == 4
    files = {f: f.read_bytes() for f in out.rglob('*') if f.is_file() and '.work' not in f.parts}
    (out / 'overlay' / '2.png').unlink()
    (out / 'panoptic.json').unlink()
    calls, run = [], U2Seg._batch
    monkeypatch.setattr(U2Seg, '_batch', lambda self, images: calls.append(len(images)) or run(self, images))
    predict_folder(tmp_path / 'in', weights, out, device='cpu')
    assert calls == [1]  # only the picture whose overlay was deleted is seen again
    assert {f: f.read_bytes() for f in out.rglob('*') if f.is_file() and '.work' not in f.parts} == files


def test_a_replaced_photo_and_a_mended_one_are_predicted_anew(weights, tmp_path):
    for i in range(3):
        write_png(tmp_path / 'in' / f'{i}.png', picture(i))
    (tmp_path / 'in' / 'broken.png').write_bytes((tmp_path / 'in' / '0.png').read_bytes()[:400])
    assert predict_folder(tmp_path / 'in', weights, tmp_path / 'out', device='cpu')['skipped'] == 1
    write_png(tmp_path / 'in' / '1.png', picture(9))
    write_png(tmp_path / 'in' / 'broken.png', picture(8))
    for out in ('out', 'fresh'):
        assert predict_folder(tmp_path / 'in', weights, tmp_path / out, device='cpu')['images'] == 4
    results = lambda out: {
        f.relative_to(out): f.read_bytes() for f in out.rglob('*') if f.is_file() and '.work' not in f.parts
    }
    assert results(tmp_path / 'out') == results(tmp_path / 'fresh')


def test_results_of_others_are_not_overwritten(weights, tmp_path):
    for name in 'ab':
        write_png(tmp_path / 'in' / f'{name}.png', picture(ord(name)))
    one, out = tmp_path / 'in' / 'a.png', tmp_path / 'out'
    predict_folder(one, weights, out, device='cpu')
    first = {f: f.read_bytes() for f in out.rglob('*') if f.is_file()}
    with pytest.raises(ValueError, match='holds results of score_threshold 0.05, not 0.3'):
        predict_folder(one, weights, out, device='cpu', score=0.3)
    other = build_model(TINY)
    save_weights(other, tmp_path / 'other' / 'model.safetensors')
    shutil.copy(weights / 'model.yaml', tmp_path / 'other')
    with pytest.raises(ValueError, match='another model'):
        predict_folder(one, tmp_path / 'other', out, device='cpu')
    assert {f: f.read_bytes() for f in out.rglob('*') if f.is_file()} == first
    for below in (one, one / 'deep' / 'er'):
        with pytest.raises(ValueError, match='a.png: is a file, where the folder'):
            predict_folder(one, weights, below, device='cpu')


def lists(out):
    return {name: read_json(out / f'{name}.json') for name in ('panoptic', 'instances', 'skipped')}


def test_a_folder_grows_by_other_images(weights, tmp_path):
    for name in ('one/a.png', 'one/a.bmp', 'two/a.png'):
        write_png(tmp_path / 'x.png', picture(sum(map(ord, name))))
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / 'x.png').rename(tmp_path / name)
    out = tmp_path / 'out'
    predict_folder(tmp_path / 'one' / 'a.png', weights, out, device='cpu')
    first = (out / 'overlay' / 'a.png').read_bytes()
    for name in ('two', 'one'):
        predict_folder(tmp_path / name, weights, out, device='cpu')
    assert (out / 'overlay' / 'a.png').read_bytes() == first
    panoptic = lists(out)['panoptic']
    names = [im['file_name'] for im in panoptic['images']]
    assert names == ['one/a.png', 'two/a.png', 'one/a.bmp']
    files = [a['file_name'] for a in panoptic['annotations']]
    assert len({*files}) == 3 and files[0] == 'a.png' and files[2] == 'a.bmp.png'
    model = U2Seg.from_pretrained(weights, device='cpu')
    for file, name in zip(files, names):
        assert (read_ids(out / 'panoptic' / file) == model.predict(tmp_path / name).ids).all()
        assert (out / 'overlay' / file).is_file()


def test_a_call_within_a_call_loses_nothing(weights, tmp_path, monkeypatch):
    for name in ('one/a.png', 'one/b.png', 'two/a.png'):
        write_png(tmp_path / name, picture(sum(map(ord, name))))
    out, run = tmp_path / 'out', U2Seg._batch

    def meanwhile(self, images):
        monkeypatch.setattr(U2Seg, '_batch', run)
        predict_folder(tmp_path / 'two', weights, out, device='cpu')
        return run(self, images)

    monkeypatch.setattr(U2Seg, '_batch', meanwhile)
    predict_folder(tmp_path / 'one', weights, out, device='cpu')
    assert [im['file_name'] for im in lists(out)['panoptic']['images']] == ['one/a.png', 'one/b.png', 'two/a.png']


_CLAIMS = '''
import sys
from pathlib import Path
from u2seg.result_folder import alone, claim
for i in range(int(sys.argv[2]), 60, 2):
    with alone(Path(sys.argv[1])):
        claim(Path(sys.argv[1]), dict(weights='', settings={}, names={}), [f'/in/{i}/a.png'])
'''


def test_processes_that_start_at_once_know_all_images(tmp_path):
    command = [sys.executable, '-c', _CLAIMS, str(tmp_path / 'out')]
    both = [subprocess.Popen([*command, str(i)]) for i in (0, 1)]
    assert [p.wait() for p in both] == [0, 0]
    names = read_json(tmp_path / 'out' / '.work' / 'images.json')['images']
    assert len(names) == len({*names.values()}) == 60


def test_it_goes_on_behind_the_last_finished_image(weights, tmp_path, monkeypatch):
    for i in range(5):
        write_png(tmp_path / 'in' / f'{i}.png', picture(i))
    calls, run = [], U2Seg._batch

    def stopped(self, images):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(len(images))
        return run(self, images)

    monkeypatch.setattr(U2Seg, '_batch', stopped)
    with pytest.raises(KeyboardInterrupt):
        predict_folder(tmp_path / 'in', weights, tmp_path / 'out', device='cpu')
    assert len(list((tmp_path / 'out' / 'overlay').iterdir())) == 3
    monkeypatch.setattr(U2Seg, '_batch', lambda self, images: calls.append(len(images)) or run(self, images))
    predict_folder(tmp_path / 'in', weights, tmp_path / 'out', device='cpu')
    assert calls == [1] * 5
    monkeypatch.undo()
    predict_folder(tmp_path / 'in', weights, tmp_path / 'whole', device='cpu')
    assert lists(tmp_path / 'out') == lists(tmp_path / 'whole')


@pytest.mark.parametrize('fault', [KeyboardInterrupt, ValueError, OSError])
def test_a_call_that_finishes_no_image_leaves_nothing(weights, tmp_path, monkeypatch, fault):
    write_png(tmp_path / 'in' / 'a.png', picture())

    def fails(self, images):
        raise fault('at the first image')

    monkeypatch.setattr(U2Seg, '_batch', fails)
    with pytest.raises(fault):
        predict_folder(tmp_path / 'in', weights, tmp_path / 'out', device='cpu')
    assert not (tmp_path / 'out').exists()
    (tmp_path / 'in' / 'a.png').write_bytes(b'broken')
    with pytest.raises(ValueError, match='none of 1 could be read; the first: .*a.png: not a readable image'):
        predict_folder(tmp_path / 'in', weights, tmp_path / 'out', device='cpu')
    assert not (tmp_path / 'out').exists()


def test_memory_runs_out_half_the_batch(weights, monkeypatch):
    model, run, seen = U2Seg.from_pretrained(weights, device='cpu'), U2Seg._batch, []

    def scarce(self, images):
        if len(images) > 2:
            raise torch.OutOfMemoryError('full')
        seen.append(len(images))
        return run(self, images)

    monkeypatch.setattr(U2Seg, '_batch', scarce)
    assert len(model.predict([picture(i) for i in range(5)], batch_size=5)) == 5 and seen == [2, 2, 1]


def test_batches_and_modes(weights):
    model, x = U2Seg.from_pretrained(weights, device='cpu'), picture()
    first = model.predict(x)
    for batch in (np.stack([x, x]), torch.from_numpy(np.stack([x, x])).permute(0, 3, 1, 2)):
        assert [same(first, p) for p in model.predict(batch)] == [True, True]
    deep = Image.fromarray(
        (np.arange(64 * 48, dtype=np.uint16).reshape(48, 64) * 20)
    )  # 16-bit grey is scaled, not clipped
    assert len(np.unique(as_image(deep))) > 200


def test_how_many_fit(weights):
    model = U2Seg.from_pretrained(weights, device='cpu')
    assert [model.fitting([(100, 100)] * 8, free=f) for f in (0, 10**12)] == [1, 8]
    large = model.fitting([(3000, 4000)] * 8, free=2 * 10**9)
    assert 1 <= large < 8 and model.fitting([(300, 400)] * 8, free=2 * 10**9) == 8
    assert free_memory('cpu') > 2**26


def test_one_image_too_large_is_one_sentence(weights, monkeypatch):
    model = U2Seg.from_pretrained(weights, device='cpu')

    def full(self, images):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(U2Seg, '_batch', full)
    with pytest.raises(ValueError, match='one image of 64 x 48 pixels; make it smaller'):
        model.predict([picture(), picture()])
    for kind in (RuntimeError, NotImplementedError, torch.linalg.LinAlgError, torch.AcceleratorError):

        def bug(self, images):
            raise kind('a fault of the program')

        monkeypatch.setattr(U2Seg, '_batch', bug)
        with pytest.raises(kind, match='of the program'):
            model.predict([picture(), picture()])


@pytest.mark.parametrize('device', ['gpu', 'CPU', 'cpu:1', 'mps', 'cuda:99', 'meta', '', 7.5])
def test_a_device_that_is_not_there_is_one_sentence(weights, device):
    with pytest.raises(ValueError, match=f"^device '{device}' is not there; this machine has cpu[^\\n]*$"):
        U2Seg.from_pretrained(weights, device=device)


@pytest.mark.parametrize('n', [0, -1, 2.5, '4'])
def test_a_batch_size_that_is_none_is_refused(weights, tmp_path, n):
    write_png(tmp_path / 'a.png', picture())
    with pytest.raises(ValueError, match='batch_size must be a whole number of at least 1'):
        U2Seg.from_pretrained(weights, device='cpu').predict([picture()], batch_size=n)
    with pytest.raises(ValueError, match='batch_size must be a whole number of at least 1'):
        predict_folder(tmp_path / 'a.png', weights, tmp_path / 'out', device='cpu', batch_size=n)


def test_devices_that_are_there(weights):
    assert (
        U2Seg.from_pretrained(weights, device='cpu:0').device
        == U2Seg.from_pretrained(weights, device=torch.device('cpu')).device
        == 'cpu'
    )
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device 'cuda' is not there; this machine has cpu$"):
            U2Seg.from_pretrained(weights, device='cuda')


def test_results_among_the_images_are_not_images(weights, tmp_path):
    write_png(tmp_path / 'a.png', picture())
    for _ in range(2):
        assert predict_folder(tmp_path, weights, tmp_path / 'segmented', device='cpu')['images'] == 1
    assert predict_folder(tmp_path, weights, tmp_path / 'again', device='cpu')['images'] == 1
    assert len(find_images(tmp_path / 'segmented' / 'overlay')) == 1  # named as such they are
    with pytest.raises(ValueError, match='no image outside of .*segmented, the folder of the results; name another'):
        find_images(tmp_path / 'segmented' / 'overlay', without=tmp_path / 'segmented')


def test_maps_of_ground_truth_are_not_images(tmp_path):
    for name in ('a.png', 'test/b.png', 'annotations/panoptic_test/b.png', 'panoptic_trip/c.png'):
        write_png(tmp_path / name, picture())
    (tmp_path / 'annotations' / 'panoptic_test.json').write_text('{}')
    names = [f.removeprefix(f'{tmp_path}/') for f in find_images(tmp_path)]
    assert names == ['a.png', 'panoptic_trip/c.png', 'test/b.png']  # a folder of that name alone is one of images


def test_no_name_is_not_this_folder(tmp_path, monkeypatch):
    write_png(tmp_path / 'a.png', picture())
    monkeypatch.chdir(tmp_path)
    assert find_images('.') == [str(tmp_path / 'a.png')]
    with pytest.raises(ValueError, match="'': no such image or folder"):
        find_images('')  # as of "$UNSET" in a shell


def test_command_line(weights, tmp_path, capsys, monkeypatch):
    from u2seg.cli import main

    write_png(tmp_path / 'a.png', picture())
    (tmp_path / 'b.jpg').symlink_to('nothing')
    assert (
        main(
            [
                'predict',
                str(tmp_path),
                '--weights',
                str(weights),
                '--out',
                str(tmp_path / 'out'),
                '--device',
                'cpu',
            ]
        )
        == 0
    )
    assert '1 image, ' in (said := capsys.readouterr().out) and '1 could not be read' in said
    assert (
        main(
            [
                'predict',
                str(tmp_path / 'a.png'),
                '--weights',
                str(weights),
                '--out',
                str(tmp_path / 'out2'),
                '--device',
                'gpu',
            ]
        )
        == 1
    )
    assert (
        capsys.readouterr().err
        == "u2seg: device 'gpu' is not there; this machine has cpu"
        + ''.join(f', cuda:{i}' for i in range(torch.cuda.device_count()))
        + '\n'
    )


def test_importing_prediction_imports_nothing_slow():
    slow = {'torchvision', 'torch._dynamo', 'sympy', 'matplotlib', 'scipy.ndimage', 'timm', 'nbformat'}
    code = f'import sys, u2seg.folder, u2seg.cli, u2seg.zoo; print({slow} & set(sys.modules))'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.stdout == 'set()\n', done.stderr


def test_the_module_is_the_command():
    import subprocess, sys

    done = subprocess.run(
        [sys.executable, '-m', 'u2seg.cli', 'predict', 'no/such/file.jpg'], capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stderr == 'u2seg: no/such/file.jpg: no such image or folder\n'


def test_layers(weights):
    p = U2Seg.from_pretrained(weights, device='cpu').predict(picture())
    assert {layer: p.overlay(layer).shape for layer in ('panoptic', 'instances', 'semantic')} == dict.fromkeys(
        ('panoptic', 'instances', 'semantic'), p.image.shape
    )
    assert (p.overlay('instances', score=2.0) == p.image).all() and (
        p.overlay('instances', alpha=0.0) != p.overlay('instances')
    ).any()
    with pytest.raises(ValueError, match="got 'x'"):
        p.overlay('x')


def test_names_and_scores_are_written_on_request(weights):
    p = U2Seg.from_pretrained(weights, device='cpu').predict(picture())
    for layer in ('panoptic', 'instances'):
        plain, written = p.overlay(layer), p.overlay(layer, names=True)
        assert written.shape == plain.shape and (written != plain).any()
    assert (p.overlay('instances', score=1.1, names=True) == p.image).all()


def test_a_least_score_holds_for_all_that_is_found(weights):
    x = picture()
    free = U2Seg.from_pretrained(weights, device='cpu', score=0.0).predict(x)
    middle = float(np.median(free.scores))
    strict = U2Seg.from_pretrained(weights, device='cpu', score=middle).predict(x)
    assert 0 < len(strict.scores) < len(free.scores) and strict.scores.min() > middle
    assert all(s.get('score', 1) >= middle for s in strict.segments)
    for wrong in (-0.1, 1.5):
        with pytest.raises(ValueError, match=f'score must lie in .0, 1., got {wrong}'):
            U2Seg.from_pretrained(weights, device='cpu', score=wrong)


def test_the_controls_of_the_notebook(monkeypatch):
    "The cell that is skipped when notebooks are tested: the controls redraw the image."
    import nbformat, os
    from pathlib import Path

    root = Path(__file__).parents[1]
    monkeypatch.chdir(root / 'nbs')
    space = {}
    for c in nbformat.read('91_try.ipynb', 4).cells:
        if c.cell_type == 'code':
            exec(c.source, space)  # our own notebook
    control = {w.description: w for w in space['view'].widget.children if hasattr(w, 'description')}
    before = space['view'](**{k: control[k].value for k in ('layer', 'score', 'alpha')})
    for layer in control['layer'].options:
        control['layer'].value = layer
    control['score'].value = 1.0
    assert before.size == space['view']('instances', 1.0, 0.55).size


PEAK = """
import resource, sys
from u2seg.folder import predict_folder
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*1024
before = peak()
predict_folder(sys.argv[1] + '/photos', sys.argv[1], sys.argv[1] + '/out')
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='peak memory is read as Linux reports it')
def test_a_photo_of_48_megapixels_fits_into_2_gib(tmp_path):
    config = dict(
        n_things=9,
        n_stuff=27,
        depth=18,
        width=8,
        n_blocks=[1, 1, 1, 1],
        norm='GN',
        fpn_norm='GN',
        fpn_channels=16,
        fc_dim=16,
        mask_dim=8,
        n_mask_convs=1,
        sem_dim=16,
        decode='objectness',
        rpn_pre_test=60,
        rpn_post_test=60,
        min_size=96,
        max_size=160,
        score_threshold=0.01,
        panoptic_score=0.01,
        panoptic_area=20,
    )
    save_weights(build_model(config), tmp_path / 'model.safetensors')
    (tmp_path / 'photos').mkdir()
    small = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8))
    small.resize((8000, 6000)).save(tmp_path / 'photos' / 'photo.jpg')
    run = subprocess.run([sys.executable, '-c', PEAK, str(tmp_path)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    with Image.open(tmp_path / 'out' / 'panoptic' / 'photo.png') as ids:
        assert ids.size == (8000, 6000)
    assert int(run.stdout) < 2 * 2**30, f'{int(run.stdout) / 2**30:.2f} GiB'


def test_instances_of_a_large_image_are_made_one_at_a_time():
    "Forty masks of 12 million pixels, 480 MB together."
    import tracemalloc

    from u2seg.pixels import PastedMasks

    n, h, w = 40, 3000, 4000
    boxes = torch.tensor([[100.0, 100.0, 900.0, 700.0]]).repeat(n, 1)
    masks = PastedMasks(torch.ones(n, 28, 28), boxes, h, w).numpy()
    nothing = np.zeros((1, 1), np.uint8)
    columns = boxes.numpy(), np.ones(n, np.float32), np.ones(n, np.int64), masks
    p = Prediction(nothing, *columns, None, nothing, [], {1: 'thing_1'})
    tracemalloc.start()
    areas = {int(instance['mask'].sum()) for instance in p.instances}
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(areas) == 1 and 0.99 * 800 * 600 < areas.pop() <= 800 * 600
    assert peak < 4 * h * w
    assert len(p.instances) == n and p.instances[-1]['name'] == 'thing_1'
    assert [i['score'] for i in p.instances[:2]] == [1.0, 1.0]


def test_the_pipeline_predicts_large_images_one_by_one(tmp_path):
    "Above `LARGE` pixels masks are pasted when they are asked for, and few results are held at once."
    net = build_model(dict(TINY, max_detections=3)).eval()
    image = np.array(Image.fromarray(picture()).resize((2049, 2048)))
    write_png(tmp_path / 'x.png', image)
    n_images = []
    net.register_forward_pre_hook(lambda _, args: n_images.append(len(args[0])))
    items = [dict(id=i, file_name='x.png') for i in (1, 2)]
    found = model_predictions(net, tmp_path, items, batch_size=2)
    (want,) = run_network(net, [image], short=TINY['min_size'], max_size=TINY['max_size'])
    assert n_images == [1, 1, 1] and len(want['masks']) == 3
    for p in found.values():
        assert np.array_equal(p.semantic.unpack(), want['semantic'])
        for a, mask in zip(p.instances, want['masks'], strict=True):
            assert np.array_equal(decode_rle(a['segmentation']), mask)
