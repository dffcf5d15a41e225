"""Downloads from a hostile publisher on loopback, and archives that try to escape."""

import errno, hashlib, http.server, io, os, socket, stat, tarfile, threading, time, urllib.error, zipfile

import pytest

from u2seg import download as D

BODY = bytes(range(256)) * 400
MD5 = hashlib.md5(BODY).hexdigest()


class Publisher(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def do_GET(self):
        self.server.asked.append(self.headers.get('Range'))
        getattr(self, self.path[1:].split('.')[0])(len(self.server.asked))

    def give(self, data, status=200, length=None):
        self.send_response(status)
        self.send_header('Content-Length', str(len(data) if length is None else length))
        self.send_header('Connection', 'close')
        self.end_headers()
        self.wfile.write(data)
        self.close_connection = True

    def start(self):
        return int((self.headers.get('Range') or 'bytes=0-')[6:-1])

    def good(self, n):
        self.give(BODY[self.start() :], 206 if self.start() else 200)

    def truncates(self, n):
        self.give(BODY[self.start() :][:30_000], 206 if self.start() else 200, len(BODY) - self.start())

    def norange(self, n):
        self.give(BODY if n > 1 else BODY[:50_000], 200, len(BODY))  # ignores Range

    def stalls(self, n):
        if n > 1:
            return self.good(n)
        self.send_response(200)
        self.send_header('Content-Length', str(len(BODY)))
        self.end_headers()
        self.wfile.write(BODY[:1000])
        self.wfile.flush()
        time.sleep(1.5)
        self.close_connection = True

    def liesshort(self, n):
        self.give(BODY[:-5000], 200)  # a whole answer, but not the file

    def lieslong(self, n):
        self.give(BODY, 200, len(BODY) + 999)

    def gone(self, n):
        self.give(b'', 404)

    def busy(self, n):
        self.give(b'', 503) if n < 3 else self.good(n)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    s = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Publisher)
    s.asked = []
    s.daemon_threads = True
    threading.Thread(target=s.serve_forever, daemon=True).start()
    s.url = lambda name: f'http://127.0.0.1:{s.server_port}/{name}.bin'
    yield s
    s.shutdown()
    s.server_close()


@pytest.mark.parametrize('kind,n_asked', [('good', 1), ('truncates', 4), ('norange', 2), ('stalls', 2), ('busy', 3)])
def test_difficult_publishers_give_the_whole_file(server, tmp_path, kind, n_asked):
    path = D.fetch(server.url(kind), tmp_path / 'f', md5=MD5, timeout=0.5, pause=0)
    assert path.read_bytes() == BODY and len(server.asked) == n_asked and os.listdir(tmp_path) == ['f']


def test_a_second_call_resumes_and_a_third_asks_nothing(server, tmp_path):
    with pytest.raises(ValueError, match='failed 2 times.*f.part'):
        D.fetch(server.url('truncates'), tmp_path / 'f', md5=MD5, n_tries=2, pause=0)
    assert not (tmp_path / 'f').exists()
    D.fetch(server.url('good'), tmp_path / 'f', md5=MD5)
    assert server.asked[-1] == 'bytes=60000-'
    n = len(server.asked)
    D.fetch(server.url('good'), tmp_path / 'f', md5=MD5)
    assert len(server.asked) == n


@pytest.mark.parametrize(
    'kind,message', [('liesshort', 'expected ' + MD5), ('lieslong', 'failed 3 times'), ('gone', '404')]
)
def test_lies_end_in_one_sentence_and_no_file(server, tmp_path, kind, message):
    with pytest.raises(ValueError, match=message):
        D.fetch(server.url(kind), tmp_path / 'f', md5=MD5, n_tries=3, pause=0)
    assert not (tmp_path / 'f').exists()


def test_nobody_there(tmp_path):
    with pytest.raises(ValueError, match='failed 2 times.*call again$'):  # there is no part to go on from
        D.fetch('http://127.0.0.1:9/x', tmp_path / 'f', n_tries=2, pause=0)


def test_each_try_that_fails_is_told(server, tmp_path, capsys):
    D.fetch(server.url('busy'), tmp_path / 'f', md5=MD5, pause=0)
    told = [f'f: try {i} of 5 failed (HTTP Error 503: Service Unavailable); the next in 0 s' for i in (1, 2)]
    assert capsys.readouterr().out.splitlines() == told


@pytest.mark.parametrize(
    'reason',
    [
        socket.gaierror(socket.EAI_AGAIN, 'Temporary failure in name resolution'),
        socket.gaierror(socket.EAI_NONAME, 'Name or service not known'),
        OSError(errno.ENETUNREACH, 'Network is unreachable'),
        OSError(errno.EHOSTUNREACH, 'No route to host'),
    ],
)
def test_without_a_network_nobody_is_asked_twice(monkeypatch, tmp_path, reason, capsys):
    asked = []

    def nobody(request, timeout):
        asked.append(request)
        raise urllib.error.URLError(reason)

    monkeypatch.setattr(D.urllib.request, 'urlopen', nobody)
    sentence = f'^http://example.org/x: this machine has no connection to example.org .{reason.strerror}.; a copy .*/f$'
    with pytest.raises(ValueError, match=sentence):
        D.fetch('http://example.org/x', tmp_path / 'f')
    with pytest.raises(ValueError, match='no connection to drive.google.com'):
        D.fetch_drive('1x', tmp_path / 'f')
    assert len(asked) == 2 and capsys.readouterr().out == ''


def test_a_network_that_goes_away_on_the_way_may_come_back(server, tmp_path, monkeypatch):
    ask, lost = D.urllib.request.urlopen, [False, True, False]

    def sometimes(*args, **options):
        if lost.pop(0):
            raise urllib.error.URLError(socket.gaierror(socket.EAI_AGAIN, 'Temporary failure in name resolution'))
        return ask(*args, **options)

    monkeypatch.setattr(D.urllib.request, 'urlopen', sometimes)
    path = D.fetch(server.url('norange'), tmp_path / 'f', md5=MD5, pause=0)
    assert path.read_bytes() == BODY and lost == []


def test_a_wrong_part_is_not_kept_for_ever(server, tmp_path):
    (tmp_path / 'f.part').write_bytes(b'x' * (len(BODY) + 10))  # longer than the file: the server has nothing beyond it
    with pytest.raises(ValueError, match='expected'):
        D.fetch(server.url('liesshort'), tmp_path / 'f', md5=MD5, pause=0)
    assert D.fetch(server.url('good'), tmp_path / 'f', md5=MD5).read_bytes() == BODY


def entry(name, mode=None):
    info = zipfile.ZipInfo(name)
    if mode is not None:
        info.external_attr = mode << 16
    return info


@pytest.mark.parametrize(
    'evil,message',
    [
        (entry('../x'), 'outside'),
        (entry('a/../../x'), 'outside'),
        (entry('/etc/x'), 'outside'),
        (entry('..\\x'), 'outside'),
        (entry('C:/x'), 'outside'),
        (entry('link', stat.S_IFLNK | 0o777), 'a link or a device'),
        (entry('pipe', stat.S_IFIFO | 0o666), 'a link or a device'),
    ],
)
def test_archive_that_would_leave_its_folder_is_refused_whole(tmp_path, evil, message):
    with zipfile.ZipFile(tmp_path / 'a.zip', 'w') as z:
        z.writestr('fine.txt', 'fine')
        z.writestr(evil, '/etc')
    with pytest.raises(ValueError, match=message):
        D.unpack(tmp_path / 'a.zip', tmp_path / 'to')
    assert os.listdir(tmp_path) == ['a.zip']


def test_broken_and_oversized_archives(tmp_path):
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w', zipfile.ZIP_DEFLATED) as z:
        z.writestr('big.txt', b'0' * 1_000_000)
    (tmp_path / 'bomb.zip').write_bytes(out.getvalue())
    (tmp_path / 'cut.zip').write_bytes(out.getvalue()[:300])
    (tmp_path / 'text.zip').write_bytes(b'hello')
    damaged = bytearray(out.getvalue())
    damaged[60] ^= 255
    (tmp_path / 'damaged.zip').write_bytes(damaged)
    with pytest.raises(ValueError, match='at most 1000 are allowed'):
        D.unpack(tmp_path / 'bomb.zip', tmp_path / 'to', max_bytes=1000)
    for name in ('cut', 'text', 'damaged'):
        with pytest.raises(ValueError, match=f'{name}.zip'):
            D.unpack(tmp_path / f'{name}.zip', tmp_path / 'to')
    assert not (tmp_path / 'to' / 'big.txt').exists()


def test_existing_link_in_the_destination_is_not_followed(tmp_path):
    (tmp_path / 'outside').mkdir()
    (tmp_path / 'to').mkdir()
    (tmp_path / 'to' / 'd').symlink_to(tmp_path / 'outside')
    with zipfile.ZipFile(tmp_path / 'a.zip', 'w') as z:
        z.writestr('d/x.txt', 'x')
    with pytest.raises(ValueError, match='a file stands where'):
        D.unpack(tmp_path / 'a.zip', tmp_path / 'to')
    assert not list((tmp_path / 'outside').iterdir())


def test_a_source_by_name(server, tmp_path, monkeypatch, capsys):
    out = io.BytesIO()
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, 'w') as z:
        z.writestr('panoptic_val2017/1.png', 'png')
    with zipfile.ZipFile(out, 'w') as z:
        z.writestr('annotations/panoptic_val2017.json', '{}')
        z.writestr('annotations/panoptic_val2017.zip', inner.getvalue())
    monkeypatch.setattr(Publisher, 'set', lambda self, n: self.give(out.getvalue()), raising=False)
    monkeypatch.setitem(
        D.SOURCES,
        'tiny',
        dict(
            folder='x',
            licence='CC0',
            files=[(f'http://127.0.0.1:{server.server_port}/set.zip', hashlib.md5(out.getvalue()).hexdigest())],
        ),
    )
    D.download('tiny', tmp_path)
    assert (
        (tmp_path / 'annotations' / 'panoptic_val2017' / '1.png').read_text() == 'png'
        and not list(tmp_path.rglob('panoptic_val2017.zip'))
        and not (tmp_path / 'set.zip').exists()
    )
    assert 'CC0' in capsys.readouterr().out
    D.download('tiny', tmp_path)
    assert len(server.asked) == 1  # nothing is done twice


def tar(path, *members):
    with tarfile.open(path, 'w') as t:
        for name, kind, target in members:
            info = tarfile.TarInfo(name)
            info.type = kind
            if kind == tarfile.REGTYPE:
                info.size = 4
            else:
                info.linkname = target
            t.addfile(info, io.BytesIO(b'text') if kind == tarfile.REGTYPE else None)


@pytest.mark.parametrize(
    'name,kind,target,message',
    [
        ('../x', tarfile.REGTYPE, '', 'outside'),
        ('/tmp/x', tarfile.REGTYPE, '', 'outside'),
        ('a/../../x', tarfile.REGTYPE, '', 'outside'),
        ('d', tarfile.SYMTYPE, '/etc', 'a link or a device'),
        ('d', tarfile.LNKTYPE, 'fine.txt', 'a link or a device'),
        ('d', tarfile.FIFOTYPE, '', 'a link or a device'),
        ('d', tarfile.CHRTYPE, '', 'a link or a device'),
    ],
)
def test_tar_that_would_leave_its_folder_is_refused_whole(tmp_path, name, kind, target, message):
    tar(tmp_path / 'a.tar', ('fine.txt', tarfile.REGTYPE, ''), (name, kind, target))
    with pytest.raises(ValueError, match=message):
        D.unpack(tmp_path / 'a.tar', tmp_path / 'to')
    assert os.listdir(tmp_path) == ['a.tar']


def test_tar_is_unpacked_and_a_broken_one_refused(tmp_path):
    tar(tmp_path / 'a.tar', ('VOC/x.txt', tarfile.REGTYPE, ''))
    assert (D.unpack(tmp_path / 'a.tar', tmp_path / 'to') / 'VOC' / 'x.txt').read_text() == 'text'
    (tmp_path / 'b.tar').write_bytes((tmp_path / 'a.tar').read_bytes()[:700])
    (tmp_path / 'c.tar').write_bytes(b'no')
    for n in 'bc':
        with pytest.raises(ValueError, match=f'{n}.tar'):
            D.unpack(tmp_path / f'{n}.tar', tmp_path / 'no')


def test_a_file_and_a_folder_of_one_name(tmp_path):
    with zipfile.ZipFile(tmp_path / 'a.zip', 'w') as z:
        z.writestr('d', 'a file')
        z.writestr('d/x', 'below it')
    with pytest.raises((ValueError, OSError)):
        D.unpack(tmp_path / 'a.zip', tmp_path / 'to')
    assert not list((tmp_path / 'to').iterdir())


def test_a_digest_that_nobody_published_is_noted_and_compared(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(D.SOURCES, 'tiny', dict(folder='x', licence='CC0', files=[(server.url('good'), None)]))
    D.download('tiny', tmp_path)
    assert 'no digest is published' in capsys.readouterr().out
    sha256 = hashlib.sha256(BODY).hexdigest()
    assert (tmp_path / 'good.bin.sha256').read_text() == f'{sha256}  good.bin\n'  # as sha256sum writes it
    D.download('tiny', tmp_path)
    (tmp_path / 'good.bin').write_bytes(b'changed')
    with pytest.raises(ValueError, match='changed since it was fetched'):
        D.download('tiny', tmp_path)


def test_a_disk_too_small_is_told_before_the_first_byte(server, tmp_path, monkeypatch):
    monkeypatch.setattr(D.shutil, 'disk_usage', lambda p: type('', (), dict(free=1000)))
    with pytest.raises(ValueError, match='102400 bytes are needed, 1000 are free'):
        D.fetch(server.url('good'), tmp_path / 'f', pause=0)
    assert not (tmp_path / 'f').exists()


@pytest.mark.parametrize('name', D.HELP)
def test_sets_that_ask_for_an_account_are_explained(name, capsys):
    assert D.download(name) is None and 'account' in capsys.readouterr().out
