"""Weights by name: files of the published form on loopback, and their malicious twins."""

import argparse
import http.server
import os
import pickle
import re
import shlex
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from u2seg import cli, zoo
from u2seg import download as D
from u2seg.checkpoints import load_weights
from u2seg.cli import main
from u2seg.convert import checkpoint_config
from u2seg.cut import cut_folder, cut_image, load_backbone
from u2seg.features import ViTFeatures
from u2seg.images import read_json, write_json
from u2seg.model import build_model
from u2seg.predict import U2Seg

root = Path(__file__).parents[1]
SMALL = dict(depth=18, width=8, fpn_channels=16, fc_dim=16, mask_dim=8, n_mask_convs=4)
ONE_STAGE = dict(cascade_ious=[0.5], cascade_weights=[[10.0, 10.0, 5.0, 5.0]])


def network(**config):
    torch.manual_seed(0)
    return build_model(SMALL | config)


def as_detectron2_saves(model, path):
    "The keys of DetectionCheckpointer with optimizer, schedule and scaler; heads of one stage have no number."
    state = model.state_dict()
    if len(model.config['cascade_ious']) == 1:
        state = {re.sub(r'(box_head|box_predictor)\.0\.', r'\1.', k): v for k, v in state.items()}
    groups = [dict(lr=0.01, momentum=0.9, params=[0], initial_lr=0.01)]
    optimizer = dict(state={0: dict(momentum_buffer=torch.zeros(3))}, param_groups=groups)
    scaler = dict(scale=65536.0, growth_factor=2.0, backoff_factor=0.5, growth_interval=2000, _growth_tracker=7)
    schedule = dict(base_lrs=[0.01], last_epoch=89999)
    torch.save(dict(model=state, optimizer=optimizer, scheduler=schedule, grad_scaler=scaler, iteration=89999), path)


class Publisher(http.server.BaseHTTPRequestHandler):
    "Gives the files of a folder; as Google Drive, a page with a form first."

    def do_GET(self):
        self.server.asked.append(self.path)
        name = self.path.split('/')[-1].split('?')[0]
        if name == 'uc':
            return self.page()
        query = self.path.partition('?')[2]
        if name == 'download':
            name = 'big.pkl' if 'id=1x' in query and 'confirm=t' in query and 'uuid=ab' in query else 'none'
        data = (self.server.folder / name).read_bytes() if (self.server.folder / name).is_file() else b''
        start = int((self.headers.get('Range') or 'bytes=0-')[6:-1])
        self.give(data[start:], (206 if start else 200) if data else 404, 'application/octet-stream')

    def page(self):
        form = '<form id="download-form" action="{}/download" method="get">'.format(self.server.host)
        for key, value in dict(id='1x', export='download', confirm='t', uuid='ab').items():
            form += f'<input type="hidden" name="{key}" value="{value}">'
        text = self.server.text or f'<title>Google Drive - Virus scan warning</title>{form}</form>'
        self.give(f'<!DOCTYPE html><html>{text}</html>'.encode(), 200, 'text/html; charset=utf-8')

    def give(self, data, status, kind):
        self.send_response(status)
        self.send_header('Content-Type', kind)
        self.send_header('Content-Length', str(len(data) + self.server.missing))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    s = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Publisher)
    s.daemon_threads = True
    s.asked, s.folder, s.text, s.missing = [], tmp_path / 'published', '', 0
    s.host = f'http://127.0.0.1:{s.server_port}'
    s.folder.mkdir()
    monkeypatch.setenv('U2SEG_CACHE', str(tmp_path / 'cache'))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(D, 'DRIVE', s.host)
    for name, w in list(zoo.WEIGHTS.items()):
        if 'url' in w:
            monkeypatch.setitem(zoo.WEIGHTS, name, w | dict(url=f'{s.host}/{w["file"]}'))
    threading.Thread(target=s.serve_forever, daemon=True).start()
    yield s
    s.shutdown()
    s.server_close()


def cached():
    return sorted(p.name for p in D.cache_folder().iterdir())


@pytest.mark.parametrize(
    'name,config',
    [
        ('cutler', dict(n_things=1, n_stuff=0, score_threshold=0.0)),
        ('cutler-mrcnn', dict(n_things=1, n_stuff=0, score_threshold=0.0) | ONE_STAGE),
        ('cutler-semi-10', dict(n_things=80, n_stuff=0, rpn_nms=0.7)),
    ],
)
def test_a_name_is_fetched_once_converted_and_kept(server, name, config, capsys):
    given = network(**config).eval()
    file = zoo.WEIGHTS[name]['file']
    as_detectron2_saves(given, server.folder / file)
    model = U2Seg.from_pretrained(name, device='cpu')
    assert {k: model.model.config[k] for k in SMALL | config} == SMALL | config
    assert all(torch.equal(v, given.state_dict()[k]) for k, v in model.model.state_dict().items())
    assert list(model.names.values())[:2] == (['person', 'bicycle'] if 'semi' in name else ['object'])
    assert 'CC BY-NC-SA 4.0' in (said := capsys.readouterr().out) and 'no digest is published' in said
    assert cached() == sorted([name, file, f'{file}.sha256'])
    U2Seg.from_pretrained(name, device='cpu')
    assert server.asked == [f'/{file}'] and capsys.readouterr().out == ''


def test_what_a_person_put_there_is_found_and_left(server, capsys):
    file = D.cache_folder() / 'cocotrain_800_0089999.pth'
    with pytest.raises(ValueError, match='click the three dots beside cocotrain_800_0089999.pth') as e:
        U2Seg.from_pretrained('u2seg-800')
    assert str(e.value).count('\n') == 0 and str(file.parent) in str(e.value)
    file.write_bytes(b'<!DOCTYPE html><html>sign in</html>')
    with pytest.raises(ValueError, match='is a web page'):
        U2Seg.from_pretrained('u2seg-800')
    assert file.is_file()
    file.with_name(f'{file.name}.sha256').unlink()
    as_detectron2_saves(network(n_things=6, n_stuff=3, sem_dim=32), file)
    model = U2Seg.from_pretrained('u2seg-800', device='cpu')
    assert len(model.names) == 9 and server.asked == []


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def malicious(path, mark):
    torch.save(dict(model=network(n_things=1, n_stuff=0).state_dict(), optimizer=Trap(mark)), path)


def bare_pickle(path, mark):
    path.write_bytes(pickle.dumps(dict(model=Trap(mark))))


def page(path, mark):
    path.write_bytes(b'<!DOCTYPE html><html>Sign in</html>')


def cut(path, mark):
    as_detectron2_saves(network(n_things=1, n_stuff=0), path)
    path.write_bytes(path.read_bytes()[:-3000])


def nothing(path, mark):
    path.write_bytes(b'\0' * 100)


@pytest.mark.parametrize('twin', [malicious, bare_pickle, page, cut, nothing])
def test_a_twin_that_is_no_checkpoint_is_refused_and_removed(server, tmp_path, twin):
    twin(server.folder / 'cutler_cascade_final.pth', tmp_path / 'sprung')
    with pytest.raises(ValueError, match='cutler_cascade_final.pth'):
        U2Seg.from_pretrained('cutler')
    assert not (tmp_path / 'sprung').exists() and cached() == []
    as_detectron2_saves(network(n_things=1, n_stuff=0), server.folder / 'cutler_cascade_final.pth')
    assert U2Seg.from_pretrained('cutler', device='cpu')


def test_a_connection_that_breaks_leaves_a_part_to_go_on_from(server, monkeypatch):
    as_detectron2_saves(network(n_things=1, n_stuff=0), server.folder / 'cutler_cascade_final.pth')
    server.missing = 100
    monkeypatch.setattr(D.time, 'sleep', lambda s: None)
    with pytest.raises(ValueError, match='call again to go on from cutler_cascade_final.pth.part'):
        zoo.locate('cutler')
    server.missing = 0
    (D.cache_folder() / 'cutler_cascade_final.pth.part').write_bytes(b'')
    assert zoo.locate('cutler').is_dir()


def test_a_file_that_changed_since_is_refused(server):
    as_detectron2_saves(network(n_things=1, n_stuff=0), server.folder / 'cutler_cascade_final.pth')
    file = zoo.fetch_weights('cutler', D.cache_folder())
    as_detectron2_saves(network(n_things=1, n_stuff=0, fc_dim=32), file)
    with pytest.raises(ValueError, match='changed since it was fetched'):
        zoo.locate('cutler')
    assert file.is_file()


def test_a_published_digest_is_compared(server, monkeypatch):
    as_detectron2_saves(network(n_things=1, n_stuff=0), server.folder / 'cutler_cascade_final.pth')
    monkeypatch.setitem(zoo.WEIGHTS, 'cutler', zoo.WEIGHTS['cutler'] | dict(sha256='0' * 64))
    with pytest.raises(ValueError, match='is not what cutler was published as'):
        zoo.locate('cutler')
    assert 'cutler' not in cached()


def test_google_drive_gives_the_file_behind_its_page(server, tmp_path):
    given = {'stem.conv1.weight': np.random.default_rng(0).random((4, 3, 7, 7), np.float32)}
    (server.folder / 'big.pkl').write_bytes(pickle.dumps(dict(model=given, __author__='x', matching_heuristics=True)))
    file = zoo.fetch_weights('u2seg-dino-rn50', tmp_path / 'weights')
    assert file.read_bytes() == (server.folder / 'big.pkl').read_bytes()
    first, second = server.asked
    assert first.startswith('/uc?export=download&id=') and 'confirm=t' in second
    report = load_weights(network(n_things=1, n_stuff=0, width=4), file)
    assert report.loaded == ['backbone.bottom_up.stem.conv1.weight']


@pytest.mark.parametrize(
    'text',
    [
        '<title>Google Drive - Quota exceeded</title><p>Too many users have viewed this file.</p>',
        '<title>Sign in</title><form id="download-form" action="https://elsewhere.example/download"></form>',
        '',
    ],
)
def test_a_page_of_drive_without_the_file_is_one_sentence(server, tmp_path, text):
    server.text = text or ' '
    with pytest.raises(ValueError, match='Google Drive does not give the file'):
        zoo.fetch_weights('u2seg-dino-rn50', tmp_path / 'weights')
    assert len(server.asked) == 1 and not (tmp_path / 'weights').exists()


@pytest.mark.parametrize(
    'name,message',
    [
        ('u2seg_800', "nothing is called 'u2seg_800'; did you mean u2seg-800"),
        ('stego', 'stego is a labeller, which segments nothing by itself; the models are embedded, u2seg-800'),
    ],
)
def test_other_names_are_answered(name, message, server):
    with pytest.raises(ValueError, match=message):
        U2Seg.from_pretrained(name)


@pytest.mark.parametrize('n_things,n_stuff', [(800, 27), (300, 27), (1, 0), (80, 0)])
def test_the_published_sizes(n_things, n_stuff):
    "ResNet-50 at full width: shapes alone, no memory."
    for stages in {}, ONE_STAGE:
        with torch.device('meta'):
            state = build_model(dict(n_things=n_things, n_stuff=n_stuff) | stages).state_dict()
        found = checkpoint_config(state)
        full = dict(depth=50, width=64, fpn_channels=256, fc_dim=1024, mask_dim=256, n_mask_convs=4, fpn_norm='SyncBN')
        assert found.items() >= (full | stages | dict(n_things=n_things, n_stuff=n_stuff)).items()


def test_the_embedded_model_needs_no_network_and_no_dvc(server, tmp_path):
    try:
        model = U2Seg.from_pretrained('embedded', device='cpu')
    except ValueError:
        pytest.skip('the last run is not published: its weights are in out/train alone')
    digits = [int(n) for n in re.findall(r'\d+ (?=clusters|stuff)', zoo.WEIGHTS['embedded']['what'])]
    assert digits == [model.model.config['n_things'], model.model.config['n_stuff']]
    copy = zoo.locate('embedded')
    assert zoo.known_as(copy) == 'embedded' and zoo.about(copy) == zoo.about('embedded')
    assert set(read_json(copy / 'mapping.json')['names'].values()) & set(model.names.values())
    stages = yaml.safe_load((root / 'dvc.lock').read_text())['stages']
    assert D.digest(copy / 'model.safetensors') in str(stages['train'])
    assert server.asked == []


def test_readme_and_model_card_show_the_tables(tmp_path):
    shown = {name: '' for name in zoo.tables()}
    for name in ('README.md', 'MODEL_CARD.md'):
        text = (root / name).read_text()
        (tmp_path / name).write_text(text)
        zoo.write_tables(tmp_path / name)
        assert (tmp_path / name).read_text() == text, "python -c 'from u2seg.zoo import write_tables; write_tables()'"
        for table in shown:
            shown[table] += name * (f'<!-- /{table} -->' in text)
    assert shown == dict(weights='README.md', files='MODEL_CARD.md', stages='MODEL_CARD.md')


def test_every_row_of_the_table_is_whole():
    for name, w in zoo.WEIGHTS.items():
        assert all(w[k] for k in ('kind', 'what', 'licence', 'start', 'images', 'labels', 'file')), name
        assert name == 'embedded' or sum(k in w for k in ('url', 'drive', 'folder')) == 1, name
        assert name in zoo.listing()


def test_the_command_line_lists_fetches_and_says_what_was_meant(server, tmp_path, capsys):
    as_detectron2_saves(network(n_things=1, n_stuff=0), server.folder / 'cutler_cascade_final.pth')
    assert main(['download']) == 0 and 'cutler-semi-10' in (said := capsys.readouterr().out) and 'coco-splits' in said
    assert main(['download', 'cutler']) == 0 and (tmp_path / 'weights' / 'cutler_cascade_final.pth').is_file()
    assert 'CC BY-NC-SA 4.0' in capsys.readouterr().out
    (tmp_path / 'file').touch()
    assert main(['download', 'cutler-mrcnn', '--out', 'file']) == 1 and 'file: is a file' in capsys.readouterr().err
    assert main(['download', 'cutlr']) == 1 and 'did you mean cutler' in capsys.readouterr().err
    for argv, meant in ((['predit', 'a.png'], 'predict'), (['predict', 'a.png', '--divice', 'cpu'], '--device')):
        with pytest.raises(SystemExit):
            main(argv)
        assert capsys.readouterr().err.endswith(f'; did you mean {meant}? (u2seg --help)\n')


def test_what_is_no_model_is_not_called_weights_of_ones_own(server, tmp_path, capsys):
    photo(tmp_path / 'photo.png')
    assert main(['predict', 'photo.png', '--weights', 'cutlre']) == 1
    got = capsys.readouterr()
    assert got.out == '' and got.err.startswith("u2seg: nothing is called 'cutlre'; did you mean cutler")


@pytest.mark.parametrize('verb', ['run train', 'dvc', 'use photos', 'use', 'publish', 'publish train', 'sweep seeds'])
def test_a_verb_of_the_pipeline_does_nothing_elsewhere_and_says_so(verb, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(verb.split()) == 1 and 'run this in the folder of the repository' in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


def test_help_is_shown_without_a_verb_and_named_after_a_mistake(capsys):
    with pytest.raises(SystemExit) as e:
        main([])
    assert e.value.code == 0 and capsys.readouterr().out.startswith('usage: u2seg ')
    with pytest.raises(SystemExit) as e:
        main(['predict'])
    assert e.value.code == 2 and capsys.readouterr().err.endswith('images (u2seg predict --help)\n')


def photo(path, h=300, w=400):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (h, w, 3), dtype=np.uint8)).save(path)


def test_predict_says_which_model_speaks_and_warns_of_photographs(server, tmp_path, capsys):
    photo(tmp_path / 'photo.png')
    photo(tmp_path / 'small.png', 128, 128)
    as_detectron2_saves(network(n_things=1, n_stuff=0), server.folder / 'cutler_cascade_final.pth')
    assert main(['predict', 'photo.png', '--weights', 'cutler', '--device', 'cpu', '--score', '.9']) == 0
    got = capsys.readouterr()
    assert got.out.startswith('cutler: CutLER, Cascade') and 'warning' not in got.err
    if 'model.safetensors' not in str(zoo._published(root)):
        pytest.skip('no run is published')
    for name, warned in (('small.png', False), ('photo.png', True)):
        assert main(['predict', name, '--out', f'out-{name}', '--device', 'cpu']) == 0
        got = capsys.readouterr()
        first = got.out.split('\n')[0]
        assert first.startswith('embedded: ') and '2,000 drawn images' in first and '--weights u2seg-800' in first
        assert ('photo.png has 400 x 300 pixels; the embedded model has only seen' in got.err) == warned


def test_stopping_and_mistakes_are_one_sentence(server, tmp_path, capsys, monkeypatch):
    photo(tmp_path / 'photo.png')
    as_detectron2_saves(network(n_things=1, n_stuff=0), server.folder / 'cutler_cascade_final.pth')
    mistakes = {
        ('--device', 'cuda:7'): "device 'cuda:7' is not there",
        ('--device', 'gpu'): "device 'gpu' is not there",
        ('--score', '7'): 'score must lie in [0, 1], got 7.0',
        ('--weights', 'dino'): 'dino is a backbone, which segments nothing by itself',
    }
    for options, message in mistakes.items():
        assert main(['predict', 'photo.png', '--weights', 'cutler', *options]) == 1
        err = capsys.readouterr().err
        assert message in err and err.startswith('u2seg: ') and err.count('\n') == 1
        assert not (tmp_path / 'segmented').exists()

    def stopped(self, images):
        raise KeyboardInterrupt

    monkeypatch.setattr(U2Seg, '_batch', stopped)
    assert main(['predict', 'photo.png', '--weights', 'cutler', '--device', 'cpu']) == 130
    assert capsys.readouterr().err.endswith('u2seg: stopped; the same call goes on from here\n')
    assert not (tmp_path / 'segmented').exists()


def vit_file(path, wrap):
    torch.manual_seed(0)
    vit = ViTFeatures(dict(img_size=32, embed_dim=64, depth=2, num_heads=1, patch_size=8)).vit
    torch.save(wrap(vit.state_dict()), path)
    return vit


def as_dino_trains(state):
    "The full checkpoint of DINO's main_dino.py: both networks below `module`, with heads."
    below = {f'module.backbone.{k}': v for k, v in state.items()}
    head = {'module.head.mlp.0.weight': torch.zeros(8, 64), 'module.head.last_layer.weight_v': torch.zeros(9, 8)}
    student = {k: v + 1 for k, v in below.items()}
    return dict(student=student | head, teacher=below | head, epoch=100, args=argparse.Namespace(arch='vit_small'))


@pytest.mark.parametrize('wrap', [dict, as_dino_trains])
def test_maskcut_on_any_image_with_a_file_of_dino(tmp_path, wrap, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    vit = vit_file('dino.pth', wrap)
    got = load_backbone('dino.pth').vit.state_dict()
    assert all(torch.equal(v, got[k]) for k, v in vit.state_dict().items())
    photo('photo.png', 90, 120)
    options = ['--backbone', 'dino.pth', '--size', '64', '--tau', '.3', '--device', 'cpu']
    assert main(['maskcut', 'photo.png', *options]) == 0
    assert capsys.readouterr().out.startswith('1 image, ')
    coco = read_json('cut/instances.json')
    masks = cut_image('photo.png', 'dino.pth', size=64, tau=0.3, device='cpu')
    assert [a['segmentation'] for a in coco['annotations']] == [m['segmentation'] for m in masks]
    assert all(a['segmentation']['size'] == [90, 120] for a in coco['annotations'])
    assert Image.open('cut/overlay/photo.png').size == (120, 90)


def test_maskcut_stopped_while_it_writes_cuts_nothing_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    vit_file('dino.pth', dict)
    (tmp_path / 'photos').mkdir()
    for i in range(4):
        photo(f'photos/{i}.png', 90, 120)
    in_the_way = tmp_path / 'cut' / 'overlay' / '2.png'
    in_the_way.mkdir(parents=True)
    options = dict(size=64, tau=0.3, device='cpu')
    with pytest.raises(OSError):
        cut_folder('photos', 'cut', 'dino.pth', **options)
    in_the_way.rmdir()
    shards = lambda: {p: p.stat().st_mtime_ns for p in (tmp_path / 'cut' / '.work').rglob('shard_*')}
    cuts = shards()
    photo('photos/more.png', 90, 120)  # and one photo more
    assert cut_folder('photos', 'cut', 'dino.pth', **options)['images'] == 5
    assert len(cuts) == 4 and cuts.items() < shards().items() and len(shards()) == 5  # its own


@pytest.mark.parametrize(
    'backbone,message',
    [
        ('none.pth', 'none.pth: no such file'),
        ('resnet.pth', 'resnet.pth: not one weight fits this model by its name'),
        ('trap.pth', 'trap.pth: cannot be read as weights'),
        ('vit_smal_patch8_224.dino', 'neither a file of weights nor a model of timm'),
    ],
)
def test_maskcut_refuses_what_is_no_vit(tmp_path, backbone, message, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photo('photo.png', 90, 120)
    torch.save({'layer1.0.conv1.weight': torch.zeros(2, 2, 1, 1)}, 'resnet.pth')
    torch.save(dict(teacher=Trap(tmp_path / 'sprung')), 'trap.pth')
    assert main(['maskcut', 'photo.png', '--backbone', backbone]) == 1
    err = capsys.readouterr().err
    assert message in err and err.count('\n') == 1
    assert not (tmp_path / 'sprung').exists() and not (tmp_path / 'cut').exists()


@pytest.mark.parametrize(
    'words,message',
    [
        ('predict photo.png --weights cutler --score 2', 'score must lie in [0, 1], got 2.0'),
        ('predict photo.png --weights cutler --batch-size 0', 'batch_size must be a whole number of at least 1'),
        ('predict photo.png --weights cutler --device gpu', "device 'gpu' is not there"),
        ('maskcut photo.png --n-masks 0', 'n_masks must be 1 or more, got 0'),
        ('maskcut photo.png --size 0', 'size must be 1 or more, got 0'),
        ('maskcut photo.png --size 100', 'size must be a multiple of the patch size 8, got 100'),
        ('maskcut photo.png --tau 2', 'tau must lie in'),
        ('maskcut photo.png --backbone vit_small_patch14_dinov2.lvd142m', 'no threshold is known for DINOv2'),
        ('maskcut photo.png --backbone resnet50', 'must be a plain pre-norm ViT of timm'),
        ('evaluate --data none --weights cuttler', "nothing is called 'cuttler'; did you mean cutler"),
        ('evaluate --data none --weights dino', 'dino is a backbone, which segments nothing by itself'),
        ('evaluate --data none --weights cutler --device gpu', "device 'gpu' is not there"),
        ('finetune --labels none.json --weights cuttler', "nothing is called 'cuttler'; did you mean cutler"),
        ('finetune --labels none.json --weights cutler', 'none.json: no such file'),
        ('finetune --labels none.json --weights cutler --n-iters 3', 'n_iters must be 4 or more, got 3'),
        ('finetune --labels none.json --weights cutler --lr 0', 'lr must be positive, got 0.0'),
        ('finetune --labels none.json --weights cutler --seed -1', 'seed must be 0 or more, got -1'),
        ('finetune --labels none.json --weights cutler --droploss -1', 'droploss must not be negative, got -1'),
        ('finetune --labels none.json --weights cutler --sizes 4 0', 'sizes must be 1 or more, got 0'),
        ('finetune --labels none.json --weights cutler --device gpu', "device 'gpu' is not there"),
        ('finetune --labels none.json --weights cutler --out photo.png', 'photo.png: is a file'),
        ('export none --format yolo --val 1', 'val must lie in [0, 1), got 1.0'),
        ('suggest none --n 0', 'n must be 1 or more, got 0'),
        ('name --port 70000', 'port 70000 cannot be had'),
        ('convert large.json --images none', 'none: no such folder of images'),
        ('convert large.json --out photo.png', 'photo.png: is a file'),
    ],
)
def test_options_are_checked_before_anything_is_fetched_or_read(server, tmp_path, monkeypatch, capsys, words, message):
    def asks(*args, **options):
        raise AssertionError('something was fetched or read')

    photo(tmp_path / 'photo.png')
    (tmp_path / 'large.json').write_text('not read')
    monkeypatch.setattr('u2seg.cut._ask', asks)
    monkeypatch.setattr('u2seg.annotations.read_json', asks)
    assert main(words.split()) == 1
    err = capsys.readouterr().err
    assert message in err and err.count('\n') == 1 and server.asked == []


@pytest.mark.parametrize('out', ['shut', 'shut/deep/er'])
@pytest.mark.parametrize('verb', ['predict photo.png --weights', 'maskcut photo.png --backbone', 'convert'])
def test_a_folder_that_cannot_be_written_to_is_told_before_weights_are_fetched(server, monkeypatch, capsys, verb, out):
    photo(Path('photo.png'))
    Path('shut').mkdir()
    own = os.access
    monkeypatch.setattr(os, 'access', lambda p, mode: str(p) != 'shut' and own(p, mode))  # root may write anywhere
    assert main([*verb.split(), 'cutler', '--out', out]) == 1
    assert capsys.readouterr().err == 'u2seg: shut: no permission to write results there\n' and server.asked == []


def test_without_a_network_maskcut_names_a_file_that_will_do(tmp_path):
    photo(tmp_path / 'photo.png')
    env = os.environ | dict(HF_HUB_OFFLINE='1', HF_HOME=str(tmp_path / 'hub'), PYTHONPATH=str(root))
    run = subprocess.run(
        [sys.executable, '-m', 'u2seg.cli', 'maskcut', 'photo.png'],
        cwd=tmp_path,
        env=env,
        text=True,
        capture_output=True,
    )
    last = run.stderr.strip().split('\n')[-1]
    assert run.returncode == 1 and last.startswith('u2seg: vit_small_patch8_224.dino: timm cannot download it')
    assert f"u2seg download dino-vits8, --backbone weights/{zoo.WEIGHTS['dino-vits8']['file']}" in last


def test_without_a_network_maskcut_asks_once_and_says_what_for(tmp_path):
    photo(tmp_path / 'photo.png')
    asked = []
    with socket.create_server(('127.0.0.1', 0)) as listener:
        address = f'http://127.0.0.1:{listener.getsockname()[1]}'

        def hang_up():
            while True:
                try:
                    connection = listener.accept()[0]
                except OSError:
                    return
                asked.append(connection.recv(4096).split(b'\r\n')[0].decode())
                connection.close()

        threading.Thread(target=hang_up, daemon=True).start()
        env = {k: v for k, v in os.environ.items() if not k.lower().endswith('_proxy') and k != 'HF_HUB_OFFLINE'}
        env |= dict(HF_ENDPOINT=address, HF_HOME=str(tmp_path / 'hub'), PYTHONPATH=str(root))
        command = [sys.executable, '-m', 'u2seg.cli', 'maskcut', 'photo.png']
        run = subprocess.run(command, cwd=tmp_path, env=env, text=True, capture_output=True)
    file = '/timm/vit_small_patch8_224.dino/resolve/main/model.safetensors'
    assert [line for line in asked if '/timm/' in line] == [f'HEAD {file} HTTP/1.1'], asked
    assert (run.returncode, run.stdout) == (1, f'vit_small_patch8_224.dino: fetching {address}{file}\n')
    assert run.stderr.startswith('u2seg: vit_small_patch8_224.dino: timm cannot download it; a file will do: ')
    assert run.stderr.count('\n') == 1


def as_command(folder, *words):
    "Exit status, stdout and stderr of the command line in a process of its own; pytest keeps warnings to itself."
    command, env = [sys.executable, '-m', 'u2seg.cli', *words], os.environ | dict(PYTHONPATH=str(root), PYTHONUTF8='1')
    run = subprocess.run(command, cwd=folder, env=env, capture_output=True)
    return run.returncode, run.stdout, run.stderr.decode()


def test_a_warning_is_one_line_and_a_name_is_printed_as_it_is(tmp_path):
    images = [dict(id=i, file_name=name, height=9, width=9) for i, name in enumerate(('a.jpg', '\udcff.jpg'), 1)]
    boxes = [dict(id=i, image_id=i % 2 + 1, category_id=1, bbox=[1, 1, 4, w]) for i, w in enumerate((4, 4, -1), 1)]
    write_json(tmp_path / 'a.json', dict(images=images, annotations=boxes, categories=[dict(id=1, name='x')]))
    warning = 'warning: a.json: 1 of 3 annotations left out; annotation 3 of image 2: a box of [1, 1, 4, -1]\n'
    assert as_command(tmp_path, 'suggest', 'a.json', '--n', '2') == (0, b'a.jpg\n\xff.jpg\n', warning)


@pytest.mark.parametrize(
    'words',
    [
        ['predict', 'photo.png', '--weights', ''],
        ['predict', 'photo.png', '--out', ''],
        ['maskcut', 'photo.png', '--device', ''],
        ['evaluate', '', '--data', 'x'],
        ['export', 'x', '--format', 'yolo', '--images', ''],
        ['suggest', 'x', '--labelled', ''],
        ['finetune', '--labels', '', '--weights', 'x'],
    ],
)
def test_an_empty_word_of_a_shell_is_named(words, capsys):
    name = words[words.index('') - 1]
    name = 'predictions' if name == 'evaluate' else name.lstrip('-')
    assert main(words) == 1
    assert capsys.readouterr().err == f'u2seg: {name} is empty\n'


@pytest.mark.parametrize('verb', cli._EXAMPLES)
def test_each_help_ends_with_examples_that_are_right(verb, capsys):
    for example in cli._EXAMPLES[verb]:
        assert cli.parser().parse_args(shlex.split(example)[1:]).fn.__name__ == verb
    with pytest.raises(SystemExit):
        main([verb, '--help'])
    assert capsys.readouterr().out.endswith('examples:\n  ' + '\n  '.join(cli._EXAMPLES[verb]) + '\n')


@pytest.mark.parametrize('verb', ['predict', 'maskcut', 'export', 'finetune'])
def test_help_says_what_becomes_of_a_folder_that_is_there(verb, capsys):
    with pytest.raises(SystemExit):
        main([verb, '--help'])
    assert ' call goes on there' in ' '.join(capsys.readouterr().out.split())


def test_each_verb_of_a_user_has_examples():
    users = ['predict', 'maskcut', 'evaluate', 'download', 'convert', 'name', 'export', 'suggest', 'finetune']
    assert {*users} <= cli._EXAMPLES.keys()
