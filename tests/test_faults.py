"""What may go wrong from outside, and what becomes of the work: a table, each row with the job that it happens to.

| fault                 | label job (shards) | training (checkpoints) | `u2seg` on a folder |
|-----------------------|--------------------|------------------------|---------------------|
| kill -9               | survived           | survived               | survived            |
| SIGTERM               | survived           | survived (saves first) | survived            |
| disk full             | refused, resumed   | refused, resumed       | refused, resumed    |
| read-only folder      | refused            | refused                | refused             |
| corrupted shard       | survived           |                        | survived            |
| corrupted checkpoint  |                    | refused                | refused             |
| half-written cache    | survived           | survived               | survived            |
| two runs at once      | survived           | survived               | survived            |
| clock going backwards | survived           | survived               | survived            |

*Survived*: run again (or let alone), it ends with the bytes of an undisturbed run. *Refused*: one sentence that
names the file, nothing half-written; *resumed*: the next run goes on and ends with those bytes.
"""

import errno, multiprocessing, os, resource, shutil, signal, sys, tempfile, threading, time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from tqdm import tqdm

from common import SMALL, STEPS
from u2seg.cli import main
from u2seg.images import read_image, write_json, write_png
from u2seg.checkpoints import save_weights
from u2seg.masks import encode_rle, instances_json
from u2seg.model import build_model
from u2seg.folder import predict_folder
from u2seg.shards import sharded
from u2seg.augment import Augment
from u2seg.solver import Solver
from u2seg.batches import Batches, PseudoLabels
from u2seg.train import fit

fork = multiprocessing.get_context('fork')
N = 24


class Net(nn.Module):
    "The detector's interface on one convolution."

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.cls_score = nn.Conv2d(3, 4, 1)

    def forward(self, images, targets):
        time.sleep(0.002)
        return dict(
            loss_sem_seg=sum(
                nn.functional.cross_entropy(self.cls_score(im[None] / 255), t['sem'][None].clamp(max=3))
                for im, t in zip(images, targets)
            )
        )


def label(given, out):
    def work(loaded):
        time.sleep(0.004)
        return [dict(mean=float(x.mean()), mask=encode_rle(x[..., 0] > 99)) for x in loaded]

    records, _ = sharded(
        [dict(id=i, file_name=f'{i}.png') for i in range(N)],
        lambda it: read_image(given / it['file_name']),
        work,
        out / '.work',
        key={},
        shard_size=2,
        batch_size=2,
    )
    write_json(out / 'records.json', records)


def train(given, out):
    data = PseudoLabels(given, given / 'instances.json', given / 'stuff')
    augment = Augment(
        short_sides=[16],
        max_size=40,
        flip=0.5,
        colour_jitter=(0.2, 0.2, 0.2, 0.1),
        copy_paste='none',
        paste_rate=0.0,
        paste_scale=(0.3, 0.8),
    )
    net = Net()
    fit(
        net,
        Batches(data, augment, batch_size=2, seed=3),
        Solver(
            batch_size=2,
            n_iters=12,
            lr=0.05,
            milestones=[8],
            warmup_iters=3,
            warmup_factor=0.001,
            weight_decay=0.0,
            checkpoint_period=2,
            **STEPS | dict(cls_lr_multiplier=1.0, clip_type=None),
        ),
        folder=out / '.work',
        log_every=3,
    )
    write_json(out / 'weights.json', {k: v.tolist() for k, v in net.state_dict().items()})


def command(given, out):
    if main(
        [
            'predict',
            str(given / 'pictures'),
            '--weights',
            str(given / 'model'),
            '--out',
            str(out),
            '--device',
            'cpu',
            '--batch-size',
            '2',
        ]
    ):
        raise SystemExit(3)


JOBS = dict(label=label, train=train, command=command)


@pytest.fixture(scope='module')
def given(tmp_path_factory):
    given, rng, notes = Path(tempfile.mkdtemp()), np.random.default_rng(0), []
    given.chmod(0o755)
    for i in range(N):
        pixels = rng.integers(0, 256, (16, 20, 3), dtype=np.uint8)
        write_png(given / f'{i}.png', pixels)
        write_png(given / 'stuff' / f'{i + 1:012d}.png', pixels[..., 0] % 4)
        if i < 6:
            write_png(given / 'pictures' / f'{i}.png', pixels)
    write_json(
        given / 'instances.json',
        instances_json(
            [dict(id=i + 1, file_name=f'{i}.png', height=16, width=20) for i in range(N)], notes, [dict(id=1, name='x')]
        ),
    )
    torch.manual_seed(0)
    save_weights(
        build_model(
            dict(
                SMALL,
                n_things=2,
                n_stuff=2,
                rpn_pre_test=20,
                rpn_post_test=8,
                max_detections=3,
                panoptic_area=10,
                min_size=32,
                max_size=64,
            )
        ),
        given / 'model' / 'model.safetensors',
    )
    yield given
    shutil.rmtree(given)


def tell(log, e):
    try:
        log.write(f'{type(e).__name__}: {e}\n')
    except OSError:
        pass  # the log is on the full disk, too
    return 1


def end(p):
    p.join(60)
    if p.is_alive():
        p.kill()
        p.join()
        pytest.fail('the job did not end within a minute')


def run(job, given, out, *, before=lambda: None, wait=True):
    "The job in a process of its own; its fate and what it said."

    def child():
        os.setpgid(0, 0)
        tqdm.set_lock(
            threading.RLock()
        )  # tqdm's own lock is shared with the parent, and a child that is killed would keep it for ever
        sys.stdout = sys.stderr = log = open(f'{out}.log', 'w', buffering=1)
        torch.set_num_threads(1)
        try:
            before()
            JOBS[job](given, out)
            code = 0
        except BaseException as e:
            code = e.code if isinstance(e, SystemExit) and isinstance(e.code, int) else tell(log, e)
        os._exit(code)

    p = fork.Process(target=child)
    p.start()
    if not wait:
        return p
    end(p)
    return p.exitcode, Path(f'{out}.log').read_text()


def files(out):
    return {
        str(p.relative_to(out)): p.read_bytes()
        for p in sorted(out.rglob('*'))
        if p.is_file() and '.work' not in p.parts
    }


@pytest.fixture(scope='module')
def right(given, tmp_path_factory):
    "What an undisturbed run of each job leaves."
    out = {}
    for job in JOBS:
        folder = tmp_path_factory.mktemp(job) / 'out'
        folder.mkdir()
        assert run(job, given, folder)[0] == 0, Path(f'{folder}.log').read_text()
        out[job] = files(folder)
    return out


@pytest.fixture
def out(tmp_path):
    (tmp_path / 'out').mkdir()
    return tmp_path / 'out'


every = pytest.mark.parametrize('job', JOBS)


def ends_well(job, given, out, right):
    code, said = run(job, given, out)
    assert code == 0, said
    assert files(out) == right[job] and not list(out.rglob('*.part'))


@every
@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGTERM], ids=['kill -9', 'SIGTERM'])
def test_signals(given, out, right, job, number):
    rng = np.random.default_rng(0)
    for _ in range(3):
        p = run(job, given, out, wait=False)
        time.sleep(rng.uniform(0.01, 0.12))
        os.kill(p.pid, number)
        end(p)
    for part in out.rglob('.*.part'):
        part.unlink()  # a kill in the middle of a write leaves its part, which nobody reads
    ends_well(job, given, out, right)


@every
@pytest.mark.parametrize('room', [0, 90, 400])
def test_disk_full(given, out, right, job, room):
    "No file may grow beyond `room` bytes: the kernel's refusal comes where a full disk's would."

    def full():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))

    log = Path(f'{out}.log')
    code, _ = run(job, given, out, before=full)
    assert code not in (0, None) and not list(out.rglob('*.part')) and log.stat().st_size <= max(room, 1) + 4096
    assert files(out).items() <= right[job].items()  # nothing half-written is called finished
    ends_well(job, given, out, right)


@pytest.mark.parametrize(
    'fault,number', [('no space left', errno.ENOSPC), ('quota', errno.EDQUOT), ('input/output', errno.EIO)]
)
def test_the_disk_s_word_reaches_the_user_in_one_sentence(given, out, right, capsys, monkeypatch, fault, number):
    with monkeypatch.context() as m:
        m.setattr(os, 'replace', lambda a, b: (_ for _ in ()).throw(OSError(number, os.strerror(number), str(b))))
        assert (
            main(
                [
                    'predict',
                    str(given / 'pictures'),
                    '--weights',
                    str(given / 'model'),
                    '--out',
                    str(out),
                    '--device',
                    'cpu',
                ]
            )
            == 1
        )
    said = capsys.readouterr().err.strip().split('\n')[-1]
    assert said.startswith('u2seg: ') and fault in said.lower() and str(out) in said
    ends_well('command', given, out, right)


@every
def test_read_only_folder(given, tmp_path, job):
    folder = Path(tempfile.mkdtemp())
    (folder / 'out').mkdir()
    folder.chmod(0o755)
    (folder / 'out').chmod(0o555)
    nobody = (lambda: os.setuid(65534)) if os.geteuid() == 0 else (lambda: None)
    p = fork.Process(
        target=lambda: (
            nobody(),
            os._exit(
                0 if os.access(given / 'instances.json', os.R_OK) and not os.access(folder / 'out', os.W_OK) else 9
            ),
        )
    )
    p.start()
    p.join()
    if p.exitcode:
        pytest.skip('permissions mean nothing here')
    with pytest.MonkeyPatch.context() as m:
        log = tmp_path / 'out'
        Path(f'{log}.log').touch()
        Path(f'{log}.log').chmod(0o666)
        m.setitem(JOBS, 'there', lambda given, _: JOBS[job](given, folder / 'out'))
        code, said = run('there', given, log, before=nobody)
    assert (
        code in (1, 3)
        and ('no permission to write results there' if job == 'command' else 'Permission denied') in said
        and str(folder / 'out') in said
        and not list((folder / 'out').iterdir())
    )
    (folder / 'out').chmod(0o755)
    shutil.rmtree(folder)


@pytest.mark.parametrize('job', ['label', 'command'])
@pytest.mark.parametrize(
    'damage',
    [
        lambda b: b[: len(b) // 2],
        lambda b: b'',
        lambda b: b'\0' * len(b),
        lambda b: b'[]',
        lambda b: b'[{"record": 1}]',
    ],
)
def test_corrupted_shard(given, out, right, job, damage):
    assert run(job, given, out)[0] == 0
    for shard in sorted((out / '.work').rglob('shard_*.json'))[::2]:
        shard.write_bytes(damage(shard.read_bytes()))
    for f in files(out):
        (out / f).unlink()
    ends_well(job, given, out, right)


@pytest.mark.parametrize(
    'damage',
    [lambda b: b[: len(b) // 2], lambda b: b'', lambda b: b'\0' * len(b), lambda b: b[:200] + bytes(64) + b[264:]],
)
def test_corrupted_checkpoint(given, out, right, damage):
    p = run('train', given, out, wait=False)
    while not list(out.rglob('checkpoint.pt')) and p.is_alive():
        time.sleep(0.001)
    p.kill()
    p.join()
    checkpoint = next(out.rglob('checkpoint.pt'))
    good = checkpoint.read_bytes()
    checkpoint.write_bytes(damage(good))
    code, said = run('train', given, out)
    assert (
        code == 1 and 'checkpoint.pt' in said.strip().split('\n')[-1] and 'Traceback' not in said and files(out) == {}
    )
    checkpoint.write_bytes(good)
    ends_well('train', given, out, right)


@pytest.mark.parametrize(
    'damage', [lambda b: b[: len(b) // 2], lambda b: b'', lambda b: b'\xff' * 100, lambda b: b[:8] + b'{}' + b[10:]]
)
def test_corrupted_weights(given, out, capsys, damage):
    shutil.copytree(given / 'model', out / 'model')
    file = out / 'model' / 'model.safetensors'
    file.write_bytes(damage(file.read_bytes()))
    assert (
        main(
            [
                'predict',
                str(given / 'pictures'),
                '--weights',
                str(out / 'model'),
                '--out',
                str(out / 'to'),
                '--device',
                'cpu',
            ]
        )
        == 1
    )
    err = capsys.readouterr().err
    assert 'model.safetensors' in err and err.strip().count('\n') == 0 and not (out / 'to').exists()


@every
def test_half_written_cache(given, out, right, job):
    "Leavings of a machine that lost power: parts, empty files, an empty folder of another key."
    p = run(job, given, out, wait=False)
    time.sleep(0.05)
    p.kill()
    p.join()
    folder = next((d for d in (out / '.work').rglob('*') if d.is_dir()), out / '.work')
    folder.mkdir(parents=True, exist_ok=True)
    leavings = [
        folder / '.shard_000003.json.123.part',
        folder / '.checkpoint.pt.77.part',
        out / '.work' / '0123456789abcdef',
    ]
    for f in leavings[:2]:
        f.write_bytes(b'{"half')
    leavings[2].mkdir(exist_ok=True)
    if job != 'train':
        (folder / 'shard_000001.json').write_bytes(b'[{"record": ')
    code, said = run(job, given, out)
    assert code == 0 and files(out) == right[job], said


@every
def test_two_runs_at_once(given, out, right, job):
    ps = [run(job, given, out, wait=False) for _ in range(2)]
    for p in ps:
        end(p)
    assert [p.exitcode for p in ps] == [0, 0], Path(f'{out}.log').read_text()
    assert files(out) == right[job]


@every
def test_clock_going_backwards(given, out, right, job):
    "Files from the future, and a clock that runs back an hour at each look."
    p = run(job, given, out, wait=False)
    time.sleep(0.08)
    p.kill()
    p.join()
    for part in out.rglob('.*.part'):
        part.unlink()  # a kill in the middle of a write leaves its part, which nobody reads
    for f in out.rglob('*'):
        os.utime(f, (4e9, 4e9))

    def back():
        now = [2e9]

        def look():
            now[0] -= 3600
            return now[0]

        time.time = look

    code, said = run(job, given, out, before=back)
    assert code == 0 and files(out) == right[job], said
