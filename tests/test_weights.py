"Checkpoints as people have them: any wrapper, any prefix, and what only has the name of a checkpoint."

import argparse
import io
import os
import pickle
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from u2seg.cli import main
from u2seg.convert import convert, summary
from u2seg.features import ViTFeatures
from u2seg.checkpoints import load_weights, save_weights
from u2seg.model import build_model, read_config
from u2seg.predict import U2Seg
from u2seg.weights import find_weights, read_checkpoint, read_weights

SMALL = dict(
    n_things=3, n_stuff=2, depth=18, width=8, fpn_channels=16, fc_dim=16, mask_dim=8, n_mask_convs=2, sem_dim=32
)
VIT = dict(img_size=32, embed_dim=16, depth=2, num_heads=2)


@pytest.fixture(scope='module')
def state():
    torch.manual_seed(0)
    return {k: v.clone() for k, v in build_model(SMALL).state_dict().items()}


@pytest.fixture(scope='module')
def vit():
    torch.manual_seed(0)
    return {k: v.clone() for k, v in ViTFeatures(VIT).vit.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in b)


def under(prefix, s):
    return {prefix + k: v for k, v in s.items()}


def zeros(s):
    return {k: v * 0 for k, v in s.items()}


WRAPPED = {
    'bare': lambda s: s,
    'ordered': OrderedDict,
    'detectron2': lambda s: dict(model=s, optimizer=dict(state={0: dict(exp_avg=torch.zeros(3))}), iteration=7),
    'DDP': lambda s: under('module.', s),
    'compile': lambda s: dict(model=under('_orig_mod.', s)),
    'DDP of compile': lambda s: under('module._orig_mod.', s),
    'compile of DDP': lambda s: under('_orig_mod.module.', s),
    'a part compiled': lambda s: {k.replace('.', '._orig_mod.', 1): v for k, v in s.items()},
    'FSDP inside': lambda s: {k.replace('.', '._fsdp_wrapped_module.', 1): v for k, v in s.items()},
    'Lightning': lambda s: dict(state_dict=under('model.', s), epoch=3, hyper_parameters=dict(lr=0.1), callbacks={}),
    'Lightning net': lambda s: dict(state_dict=under('net.', s)),
    'Lightning compiled': lambda s: dict(state_dict=under('model._orig_mod.', s) | {'loss.weight': torch.ones(2)}),
    'a name never seen': lambda s: dict(runner=dict(things=under('my_student.inner.', s))),
    'timm': lambda s: dict(state_dict=zeros(s), state_dict_ema=s, arch='x'),
    'model and ema': lambda s: dict(model=zeros(s), ema=s),
    'ema first': lambda s: dict(model_ema=dict(module=s, decay=0.99), model=zeros(s)),
    'prefixes': lambda s: dict(state_dict=under('model.', zeros(s)) | under('ema_model.', s)),
    'teacher': lambda s: dict(student=under('module.', zeros(s)), teacher=s, args=argparse.Namespace(lr=0.1)),
    'two of Unbiased Teacher': lambda s: dict(model=under('modelStudent.', zeros(s)) | under('modelTeacher.', s)),
    'AveragedModel': lambda s: dict(n_averaged=torch.tensor(3)) | under('module.', s),
    'EMA of a few': lambda s: dict(ema=dict(list(zeros(s).items())[:9]), model=s),
    'named after a schema': lambda s: dict(first=s, schema=zeros(s)),
    'parameters': lambda s: {k: nn.Parameter(v) if v.is_floating_point() else v for k, v in s.items()},
    'arrays': lambda s: {k: v.numpy() for k, v in s.items()},
    'numpy numbers beside': lambda s: dict(model=s, best=np.float64(0.3)),
    'harmless settings': lambda s: dict(
        state_dict=s, hparams=argparse.Namespace(path=Path('a')), callbacks=defaultdict(list, a=[1])
    ),
}


@pytest.mark.parametrize('how', WRAPPED)
def test_a_detector_is_found_in_any_wrapper(tmp_path, how, state):
    torch.save(WRAPPED[how](state), tmp_path / 'a.pth')
    convert(tmp_path / 'a.pth', tmp_path / 'out')
    assert same(U2Seg.from_pretrained(tmp_path / 'out', device='cpu').model.state_dict(), state)
    fresh = build_model(SMALL)
    assert len(load_weights(fresh, tmp_path / 'a.pth').loaded) == len(state) and same(fresh.state_dict(), state)


@pytest.mark.parametrize('how', [h for h in WRAPPED if 'inside' not in h])
def test_a_vit_is_found_in_any_wrapper(tmp_path, how, vit):
    torch.save(WRAPPED[how](vit), tmp_path / 'a.pth')
    assert same(ViTFeatures(VIT, tmp_path / 'a.pth').vit.state_dict(), vit)


@pytest.mark.parametrize('suffix', ['.pth', '.PTH', '.pt', '.ckpt', '.bin', '.pkl', '.Safetensors'])
def test_the_content_decides_and_not_the_name(tmp_path, suffix, state):
    save_weights(build_model(SMALL), tmp_path / 'model.safetensors')
    legacy, plain = io.BytesIO(), io.BytesIO()
    torch.save(state, legacy, _use_new_zipfile_serialization=False)
    torch.save(state, plain)
    arrays = {k: v.numpy() for k, v in state.items()}
    contents = [plain.getvalue()]
    if suffix != '.Safetensors':
        big_endian = {k: v.astype(v.dtype.newbyteorder('>')) for k, v in arrays.items()}
        contents += [
            legacy.getvalue(),
            pickle.dumps(dict(model=arrays)),
            pickle.dumps(arrays, protocol=2),
            pickle.dumps(big_endian),
        ]
    for data in contents:
        (tmp_path / f'a{suffix}').write_bytes(data)
        assert same(read_weights(tmp_path / f'a{suffix}'), state)
        assert convert(tmp_path / f'a{suffix}', tmp_path / 'out')['n_things'] == 3
    (tmp_path / f'b{suffix}').write_bytes((tmp_path / 'model.safetensors').read_bytes())
    assert read_weights(tmp_path / f'b{suffix}').keys() == state.keys()


def test_moco_s_query_encoder_is_taken(tmp_path):
    "Its momentum encoder is no teacher: who uses MoCo takes the first."
    torchvision = pytest.importorskip('torchvision')
    backbone = torchvision.models.resnet18().state_dict()
    torch.save(
        dict(
            state_dict=under('module.encoder_q.', backbone)
            | under('module.encoder_k.', zeros(backbone))
            | {'module.queue': torch.zeros(4, 9)}
        ),
        tmp_path / 'moco.pth',
    )
    model = build_model(dict(SMALL, width=64, norm='BN'))
    report = load_weights(model, tmp_path / 'moco.pth')
    assert torch.equal(
        model.state_dict()['backbone.bottom_up.res5.1.conv2.norm.weight'], backbone['layer4.1.bn2.weight']
    )
    assert (report.taken, report.others) == ('state_dict.module.encoder_q', ('state_dict.module.encoder_k',))


def test_of_two_sets_the_one_taken_is_named(tmp_path, state, capsys):
    torch.save(dict(model=zeros(state), ema_state=state), tmp_path / 'a.pth')
    report = load_weights(build_model(SMALL), tmp_path / 'a.pth')
    assert (report.taken, report.others) == ('ema_state', ('model',))
    assert str(report).startswith(f'{len(state)} weights loaded from ema_state; model left out')
    assert main(['convert', str(tmp_path / 'a.pth'), '--out', str(tmp_path / 'out')]) == 0
    assert 'taken: ema_state, left: model' in capsys.readouterr().out
    torch.save(dict(model=state), tmp_path / 'a.pth')
    assert str(load_weights(build_model(SMALL), tmp_path / 'a.pth')) == f'{len(state)} weights loaded'


@pytest.mark.parametrize(
    'spoil,message',
    [
        (lambda v: v * float('nan'), 'fc1.weight holds NaN or infinity'),
        (lambda v: v / 0, 'fc1.weight holds NaN or infinity'),
        (lambda v: v.to('meta'), 'fc1.weight has no values'),
        (lambda v: v.to_sparse(), 'weights must be dense'),
        (lambda v: v.to(torch.complex64), 'weights must be dense and of floats'),
        (lambda v: v.to(torch.float8_e4m3fn), 'weights must be dense and of floats'),
        (lambda v: torch.zeros(1).expand(10**6, 10**6), 'claims 4000000000000 bytes'),
    ],
)
def test_weights_without_sound_values_are_refused(tmp_path, state, spoil, message):
    name = 'roi_heads.box_head.0.fc1.weight'
    torch.save(dict(model=dict(state, **{name: spoil(state[name])})), tmp_path / 'a.pth')
    for call in (
        lambda: convert(tmp_path / 'a.pth', tmp_path / 'out'),
        lambda: load_weights(build_model(SMALL), tmp_path / 'a.pth'),
    ):
        with pytest.raises(ValueError, match=message) as e:
            call()
        assert 'a.pth' in str(e.value) and '\n' not in str(e.value)
    assert not (tmp_path / 'out').exists()


def test_nan_in_a_vit_or_a_file_of_safetensors_or_arrays(tmp_path, vit, state):
    torch.save(dict(vit, **{'norm.bias': vit['norm.bias'] / 0}), tmp_path / 'vit.pth')
    with pytest.raises(ValueError, match='vit.pth: norm.bias holds NaN'):
        ViTFeatures(VIT, tmp_path / 'vit.pth')
    model = build_model(SMALL)
    model.sem_seg_head.predictor.bias.data[0] = float('inf')
    save_weights(model, tmp_path / 'model.safetensors')
    (tmp_path / 'model.pkl').write_bytes(pickle.dumps({k: v.numpy() for k, v in model.state_dict().items()}))
    for name in ('model.safetensors', 'model.pkl'):
        with pytest.raises(ValueError, match='sem_seg_head.predictor.bias holds NaN or infinity'):
            load_weights(build_model(SMALL), tmp_path / name)


def zipped(**files):
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w', zipfile.ZIP_DEFLATED) as z:
        for n, data in files.items():
            z.writestr(n, data)
    return out.getvalue()


def scripted():
    out = io.BytesIO()
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), out)
    return out.getvalue()


def saved(x):
    out = io.BytesIO()
    torch.save(x, out)
    return out.getvalue()


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
@pytest.mark.parametrize('suffix', ['.pth', '.pkl', '.safetensors'])
@pytest.mark.parametrize(
    'data,message',
    [
        (lambda: b'', 'is empty'),
        (lambda: b'version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 132735\n', 'is a Git LFS pointer'),
        (lambda: b'\n<!DOCTYPE html><html><head><title>Sign in</title>', 'is a web page'),
        (lambda: b'<html>', 'is a web page'),
        (lambda: b'{"error": "not found"}', 'is text, not weights; it begins with'),
        (lambda: zipped(**{'model/weights.bin': b'1'}), 'is a zip archive of model/weights.bin'),
        (lambda: zipped(**{'a/data.pkl': b'0' * 10**7}), 'would unpack to 10000000'),
        (scripted, 'is a TorchScript program'),
        (lambda: saved(torch.zeros(9000))[:20000], 'is cut short'),
        (lambda: b'\x1f\x8b\x08' + bytes(30), 'is a gzip archive'),
        (lambda: b'\x89HDF\r\n\x1a\n' + bytes(30), 'is an HDF5 file'),
        (lambda: bytes(range(128, 256)) * 9, 'cannot be read as weights'),
        (lambda: saved([1, 2]), 'holds a list'),
        (lambda: saved(torch.zeros(2)), 'holds a Tensor'),
        (lambda: saved({}), 'holds no named weights'),
        (lambda: saved(dict(a=1)), 'holds no named weights'),
        (lambda: saved({'a.weight': torch.zeros(2)}), 'not one weight fits this model'),
        (lambda: saved(nn.Linear(2, 2)), r'a whole network .* state_dict\(\)'),
    ],
)
def test_what_is_no_checkpoint_is_said(tmp_path, data, message, suffix, capsys):
    path = tmp_path / f'a{suffix}'
    path.write_bytes(data())
    with pytest.raises(ValueError, match=message) as e:
        load_weights(build_model(SMALL), path)
    assert str(path) in str(e.value) and '\n' not in str(e.value)
    assert main(['convert', str(path), '--out', str(tmp_path / 'out')]) == 1
    assert str(path) in capsys.readouterr().err and not (tmp_path / 'out').exists()
    with pytest.raises(ValueError, match=r'a\.'):
        ViTFeatures(VIT, path)


def test_paths_that_hold_no_checkpoint(tmp_path, capsys):
    (tmp_path / 'a.npz').write_bytes(b'')
    (tmp_path / 'b.json').write_text('{}')
    for argv, message in (
        (['none.pth'], 'no such file'),
        (['.'], 'one of VOC'),
        (['a.npz'], 'a checkpoint ends in'),
        (['b.json', '--maps', str(tmp_path / 'none')], 'no such folder of maps'),
    ):
        assert main(['convert', str(tmp_path / argv[0]), *argv[1:], '--out', str(tmp_path / 'out')]) == 1
        err = capsys.readouterr().err
        assert message in err and err.count('\n') == 1 and 'Traceback' not in err
    for path, message in (
        (tmp_path, 'is a folder'),
        (tmp_path / 'none.pth', 'no such file'),
        (tmp_path / 'a.npz', 'must end in .safetensors, .pth'),
    ):
        with pytest.raises(ValueError, match=message):
            read_checkpoint(path)


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize('how', ['bare', 'Lightning', 'teacher', 'harmless settings'])
def test_malicious_twins_are_refused(tmp_path, how, state):
    "The sound file with one object more, wherever it hides and however the file is written."
    for name, twin in (
        ('model', lambda c: dict(c, evil=Trap(str(tmp_path / 'ran')))),
        ('settings', lambda c: dict(c, args=argparse.Namespace(x=Trap(str(tmp_path / 'ran'))))),
    ):
        content = twin(dict(WRAPPED[how](state)))
        torch.save(content, tmp_path / 'a.pth')
        torch.save(content, tmp_path / 'b.pth', _use_new_zipfile_serialization=False)
        (tmp_path / 'c.pkl').write_bytes(pickle.dumps(content))
        for file in ('a.pth', 'b.pth', 'c.pkl'):
            with pytest.raises(ValueError, match=f'{file}: cannot be read as weights'):
                convert(tmp_path / file, tmp_path / 'out')
    assert not (tmp_path / 'ran').exists() and not (tmp_path / 'out').exists()


def test_a_file_that_holds_itself(tmp_path, state):
    content = dict(model={k: v.numpy() for k, v in state.items()})
    content['again'] = content
    content['model']['self'] = content
    (tmp_path / 'a.pkl').write_bytes(pickle.dumps(content))
    assert find_weights(tmp_path / 'a.pkl', state.__contains__).taken == 'model'


def test_a_detector_of_cutler_keeps_every_score(tmp_path):
    for n_stuff, n_things, threshold in ((0, 1, 0.0), (0, 3, 0.05), (2, 1, 0.05)):
        torch.save(
            dict(model=build_model(dict(SMALL, n_things=n_things, n_stuff=n_stuff)).state_dict()), tmp_path / 'a.pth'
        )
        convert(tmp_path / 'a.pth', tmp_path / 'out')
        assert read_config(tmp_path / 'out' / 'model.yaml')['score_threshold'] == threshold


def test_counts_are_said_in_words(tmp_path, capsys, state):
    torch.save(state, tmp_path / 'a.pth')
    assert main(['convert', str(tmp_path / 'a.pth'), '--out', str(tmp_path / 'out')]) == 0
    assert f'{len(state)} weights, 0 weights left out, 3 thing classes, 2 stuff classes' in capsys.readouterr().out
    assert (
        summary(dict(n_things=1, n_stuff=1, boxes=1, images=2000))
        == '1 thing class, 1 stuff class, 1 box, 2,000 images'
    )
