"Names of clusters: the file, the journal, the gallery, the server; and the page in a headless Chromium."

import base64
import http.client
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
import urllib.request
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from u2seg.gallery import Gallery, resume, stuff_regions
from u2seg.journal import Conflict, Journal, act, carry, read_csv, write_csv
from u2seg.masks import encode_rle
from u2seg.name import Naming, name_csv, serve
from u2seg.names import Names, as_yaml, read_names, write_names

HOSTILE = [
    '<img src=x onerror=document.title="run">',
    '"; alert(1); "',
    "it's </script><b>bold</b>",
    'שמיים כחולים',
    'كلب',
    '🦆',
]


def square(x, y, side=8):
    mask = np.zeros((64, 64), bool)
    mask[y : y + side, x : x + side] = True
    return encode_rle(mask)


def make_gallery(folder, n_things=4, n_stuff=2, each=6, **bound):
    "Squares in one image: those of a cluster lie together in the embedding, in two groups."
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / 'a.png')
    rng, annotations, x = np.random.default_rng(1), [], []
    for c in range(n_things + n_stuff):
        for i in range(each):
            place = rng.integers(0, 56, 2).tolist()
            annotations.append(dict(image_id=1, category_id=c + 1, segmentation=square(*place)))
            x.append([10 * c + i % 2, 0.1 * i])
    return Gallery(folder, {1: 'a.png'}, annotations, np.float32(x), Names(n_things, n_stuff, **bound), {})


def test_a_crop_of_a_photograph_works_on_its_part_alone(tmp_path):
    Image.new('RGB', (4000, 3000), 'green').save(tmp_path / 'a.png')
    mask = np.zeros((3000, 4000), bool)
    mask[100:200, 3900:4000] = True
    own = [dict(image_id=1, category_id=1, segmentation=encode_rle(mask))]
    gallery = Gallery(tmp_path, {1: 'a.png'}, own, np.zeros((1, 2), np.float32), Names(1, 0), {})
    first = gallery.crop(0)  # reads the image
    tracemalloc.start()
    assert gallery.crop(0) == first
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3000 * 4000 * 3  # less than a copy of the image
    shown = np.asarray(Image.open(io.BytesIO(first))).astype(int)
    middle, beyond = shown[72, 72], shown[72, 140]
    assert abs(middle - [0, 128, 0]).max() < 10 and beyond.max() < 10  # right of the image it is black


def serve_here(folder, n_things=4, n_stuff=2):
    "Serve until killed: for a process of its own."
    gallery = make_gallery(Path(folder), int(n_things), int(n_stuff))
    with serve(Naming(gallery, resume(folder, gallery))) as url:
        print(url, flush=True)
        threading.Event().wait()


# the journal


def random_action(names, rng):
    label = str(rng.choice(names.labels))
    name = str(rng.choice(['duck', 'car', 'sky', 'fish', *HOSTILE]))
    return [
        dict(do='name', labels=[label], name=name),
        dict(do='name', labels=[label], name=None),
        dict(do='discard', labels=[label]),
        dict(do='keep', labels=[label]),
        dict(do='split', label=label, parts=rng.normal(size=(2, 2)).round(3).tolist()),
        dict(do='undo'),
        dict(do='undo'),
    ][rng.integers(7)]


def content(names):
    return json.dumps(as_yaml(names))


def test_every_action_is_on_the_disk_before_it_counts(tmp_path):
    "After each action, what a crash would leave: the log alone gives the same names, and so does names.yaml."
    rng, journal = np.random.default_rng(0), Journal(tmp_path)
    journal.begin(Names(3, 2, model='m', clusters='c'), dict(images=[], annotations=[]))
    states = [journal.names]
    for i in range(60):
        action = random_action(journal.names, rng)
        try:
            journal.do(action)
        except ValueError:
            continue
        if action['do'] == 'undo':
            states.pop()
        else:
            states.append(journal.names)
        assert content(journal.names) == content(states[-1])
        assert content(read_names(tmp_path / 'names.yaml', 'm')) == content(journal.names)
        if i % 10 == 0:
            copy = tmp_path / f'copy{i}'
            copy.mkdir()
            (copy / 'names.log').write_bytes((tmp_path / 'names.log').read_bytes() + b'{"do": "na')  # cut off
            again = Journal(copy)
            assert content(again.names) == content(journal.names) and again.version == journal.version
            again.do(dict(do='keep', labels=['1']))  # and the log goes on
            again.close()
            Journal(copy).close()
    assert len(states) > 10
    journal.close()


def test_a_broken_line_is_never_skipped(tmp_path):
    journal = Journal(tmp_path)
    journal.begin(Names(2, 0), dict(images=[], annotations=[]))
    journal.close()
    with open(tmp_path / 'names.log', 'ab') as f:
        f.write(b'{"do":\n{"do": "discard", "labels": ["1"]}\n')
    with pytest.raises(ValueError, match='line 2 is broken'):
        Journal(tmp_path)


def test_a_full_disk_leaves_no_half_line(tmp_path, monkeypatch):
    journal = Journal(tmp_path)
    journal.begin(Names(2, 0), dict(images=[], annotations=[]))

    def full(_):
        raise OSError(28, 'No space left on device')

    with monkeypatch.context() as m:
        m.setattr(os, 'fsync', full)
        with pytest.raises(OSError):
            journal.do(dict(do='discard', labels=['1']))
    assert journal.version == 1 and not journal.names.discarded
    journal.do(dict(do='discard', labels=['2']))
    journal.close()
    again = Journal(tmp_path)
    assert again.names.discarded == {'2'} and again.version == 2


def test_an_older_view_does_not_overwrite(tmp_path):
    journal = Journal(tmp_path)
    journal.begin(Names(3, 0), dict(images=[], annotations=[]))
    journal.do(dict(do='name', labels=['1'], name='duck'), seen=1)
    journal.do(dict(do='name', labels=['2'], name='car'), seen=1)  # another cluster
    for action in (
        dict(do='name', labels=['1'], name='fish'),
        dict(do='name', labels=['3', '2'], name='fish'),
        dict(do='split', label='1', parts=[[0], [1]]),
        dict(do='undo'),
    ):
        with pytest.raises(Conflict):
            journal.do(action, seen=1)
    assert journal.names.names == {'1': 'duck', '2': 'car'}
    journal.do(dict(do='undo'), seen=3)
    assert journal.names.names == {'1': 'duck'}
    with pytest.raises(Conflict):
        journal.do(dict(do='name', labels=['2'], name='fish'), seen=3)  # undone meanwhile
    with pytest.raises(ValueError, match='another `u2seg name` has it open'):
        Journal(tmp_path)


def test_names_follow_their_instances_to_another_training(tmp_path):
    "The clusters are numbered anew, one is divided, one is new; a third training has nothing in common."
    gallery = make_gallery(tmp_path, clusters='first')
    rng = np.random.default_rng(3)
    places = rng.permutation(49)[:36]
    for a, p in zip(gallery.annotations, places):  # apart from each other
        a['segmentation'] = square(8 * (p % 7), 8 * (p // 7))
    journal = resume(tmp_path, gallery)
    for label, name in zip('1235', ['duck', 'car', 'fish', 'sky']):
        journal.do(dict(do='name', labels=[label], name=name))
    journal.do(dict(do='discard', labels=['4']))
    journal.close()
    number = {1: [3], 2: [1], 3: [4, 2], 4: [4], 5: [6], 6: [5]}
    moved = [
        dict(a, category_id=number[a['category_id']][i % len(number[a['category_id']])])
        for i, a in enumerate(gallery.annotations)
    ]
    other = replace(gallery, annotations=moved, names=Names(4, 2, clusters='second', model='m2'))
    journal = resume(tmp_path, other)
    assert journal.names.names == {'3': 'duck', '1': 'car', '2': 'fish', '6': 'sky'}
    assert journal.unsure() == {'4': {'(discarded)': 6, 'fish': 3}}  # two thirds of it
    assert read_names(tmp_path / 'names.yaml', 'm2').clusters == 'second'
    journal.do(dict(do='discard', labels=['4']))
    assert journal.unsure() == {}
    journal.close()
    journal = resume(
        tmp_path, replace(other, names=replace(other.names, model='m3'))
    )  # trained again, the same clusters
    assert journal.names.names == {'3': 'duck', '1': 'car', '2': 'fish', '6': 'sky'} and journal.names.discarded == {
        '4'
    }
    journal.close()
    apart = [dict(a, segmentation=square(0, 0, 3)) for a in moved]
    journal = resume(tmp_path, replace(other, annotations=apart, names=Names(4, 2, clusters='third')))
    assert journal.names.names == {} and not journal.unsure()


def test_a_file_edited_by_hand_is_taken_over(tmp_path):
    gallery = make_gallery(tmp_path)
    journal = resume(tmp_path, gallery)
    journal.do(dict(do='name', labels=['1'], name='duck'))
    journal.close()
    text = (tmp_path / 'names.yaml').read_text()
    (tmp_path / 'names.yaml').write_text(text.replace('1: duck', '1: goose').replace('2: null', '2: "car"'))
    journal = resume(tmp_path, gallery)
    assert journal.names.names == {'1': 'goose', '2': 'car'}
    journal.do(dict(do='undo'))
    assert journal.names.names == {'1': 'duck'}
    journal.close()
    (tmp_path / 'names.log').unlink()
    assert resume(tmp_path, gallery).names.names == {'1': 'duck'}


def test_a_file_of_an_earlier_training_is_not_taken_for_an_edit(tmp_path):
    gallery = make_gallery(tmp_path, clusters='first')
    journal = resume(tmp_path, gallery)
    journal.do(dict(do='name', labels=['1'], name='duck'))
    journal.close()
    older = (tmp_path / 'names.yaml').read_bytes()
    turned = [dict(a, category_id={1: 2, 2: 1}.get(a['category_id'], a['category_id'])) for a in gallery.annotations]
    other = replace(gallery, annotations=turned, names=Names(4, 2, clusters='second'))
    journal = resume(tmp_path, other)
    journal.close()
    carried = journal.names.names
    (tmp_path / 'names.yaml').write_bytes(older)  # git checkout names.yaml
    with pytest.raises(ValueError, match='is of other clusters than names.log; move it away'):
        resume(tmp_path, other)
    (tmp_path / 'names.yaml').unlink()
    assert resume(tmp_path, other).names.names == carried


def test_a_stop_between_log_and_file_loses_no_action(tmp_path):
    gallery = make_gallery(tmp_path)
    journal = resume(tmp_path, gallery)
    journal.do(dict(do='name', labels=['1'], name='cat'))
    before = (tmp_path / 'names.yaml').read_bytes()
    journal.do(dict(do='name', labels=['2'], name='dog'))
    journal.close()
    (tmp_path / 'names.yaml').write_bytes(before)  # as a kill leaves it
    journal = resume(tmp_path, gallery)
    assert journal.names.names == {'1': 'cat', '2': 'dog'} == read_names(tmp_path / 'names.yaml').names
    journal.close()


def test_names_of_these_clusters_win_over_the_log_of_others(tmp_path):
    gallery = make_gallery(tmp_path, clusters='first')
    resume(tmp_path, gallery).close()
    write_names(tmp_path / 'names.yaml', Names(4, 2, {'1': 'horse'}, clusters='second'))  # a colleague's
    other = replace(gallery, names=replace(gallery.names, clusters='second'))
    assert resume(tmp_path, other).names.names == {'1': 'horse'}


def test_the_same_regions_of_stuff_show_after_another_training(tmp_path):
    images = [dict(id=i, file_name=f'photo_{i}.png') for i in range(1, 301)]
    rng, chosen = np.random.default_rng(0), []
    for changed in (0, 0.3):  # of the maps
        for im in images:
            label = int(rng.random() < changed)
            Image.fromarray(np.full((4, 4), label, np.uint8)).save(tmp_path / f'{im["id"]:012d}.png')
        found, sizes = stuff_regions(tmp_path, images, n_things=5, n_most=60)
        chosen.append({a['image_id'] for a in found if a['category_id'] == 6})
        assert len(chosen[-1]) == 60 < sizes['6']
    assert len(chosen[0] & chosen[1]) > 30


def test_names_without_their_log_follow_a_new_training_of_the_same_clusters(tmp_path):
    gallery = make_gallery(tmp_path, clusters='same')
    write_names(tmp_path / 'names.yaml', Names(4, 2, {'1': 'duck'}, clusters='same', model='old'))
    resume(tmp_path, replace(gallery, names=replace(gallery.names, model='new'))).close()
    assert read_names(tmp_path / 'names.yaml', 'new').names == {'1': 'duck'}


def test_names_of_other_clusters_without_their_log_are_refused(tmp_path):
    gallery = make_gallery(tmp_path, clusters='new')
    write_names(tmp_path / 'names.yaml', Names(4, 2, {'1': 'duck'}, clusters='old'))
    with pytest.raises(ValueError, match='is of other clusters'):
        resume(tmp_path, gallery)


@pytest.mark.parametrize('delimiter', [',', ';', '\t'])
def test_a_table_says_what_the_page_says(tmp_path, delimiter):
    names = Names(7, 1, {str(i): n for i, n in enumerate(HOSTILE, 1)}, frozenset('7'))
    write_csv(tmp_path / 'names.csv', names, {}, {})
    if delimiter != ',':
        import csv

        rows = list(csv.reader((tmp_path / 'names.csv').read_text('utf-8-sig').splitlines()))
        with open(tmp_path / 'names.csv', 'w', newline='') as f:
            csv.writer(f, delimiter=delimiter).writerows(rows)
    assert read_csv(tmp_path / 'names.csv', Names(7, 1)) == names


def test_a_table_of_other_columns_takes_no_name_away(tmp_path):
    names, path = Names(7, 1, {'1': 'duck'}), tmp_path / 'names.csv'
    for text in ('cluster,Name\n1,car\n', '', '1;duck\n'):
        path.write_text(text)
        with pytest.raises(ValueError, match='names.csv: the first row names the columns; .* is not one of them'):
            read_csv(path, names)
    path.write_text('cluster,name\n1,duck\n1,duck\n,,\n2,car\n')
    assert read_csv(path, names).names == {'1': 'duck', '2': 'car'}
    path.write_text('cluster,name\n1,duck\n2,car\n1,\n')
    with pytest.raises(ValueError, match='row 4: cluster 1 is in row 2 already'):
        read_csv(path, names)


def test_the_table_and_its_sheets(tmp_path):
    gallery = make_gallery(tmp_path, 20, 1)
    journal = resume(tmp_path, gallery)
    path = tmp_path / 'names.csv'
    assert name_csv(path, gallery, journal, tmp_path / 'sheets')['clusters'] == 21
    assert [p.name for p in sorted((tmp_path / 'sheets').iterdir())] == ['clusters_001.jpg', 'clusters_002.jpg']
    path.write_text(
        path.read_text('utf-8-sig')
        .replace('\n3,thing,6,,', '\n3,thing,6,duck,')
        .replace('\n4,thing,6,,,', '\n4,thing,6,,x,')
    )
    assert name_csv(path, gallery, journal, tmp_path / 'sheets') == dict(named=1, discarded=1, clusters=21)
    names = read_names(tmp_path / 'names.yaml')
    assert names.names == {'3': 'duck'} and names.discarded == {'4'}


# the gallery


def test_typical_doubtful_neighbours(tmp_path):
    gallery = make_gallery(tmp_path)
    gallery.x[6] = [1.0, 0.2]  # of cluster 2, but it lies in cluster 1
    gallery = replace(gallery)
    of = gallery.describe(gallery.names, '2', 3)
    assert of['size'] == 6 and of['doubtful'][0] == 6 and 6 not in of['typical']
    assert of['neighbours'] == ['1', '3', '4'] and gallery.describe(gallery.names, '5')['neighbours'] == ['6']
    names = act(gallery.names, gallery.split(gallery.names, '3'))
    parts = {l: {int(i) for i in gallery.rows(names, l)} for l in ('3a', '3b')}
    assert parts['3a'] | parts['3b'] == {*range(12, 18)} and not parts['3a'] & parts['3b']
    assert {*map(len, parts.values())} == {3} and {i % 2 for i in parts['3a']} != {i % 2 for i in parts['3b']}
    with pytest.raises(ValueError, match='cannot be split'):
        one = replace(gallery, x=np.zeros_like(gallery.x))
        one.split(one.names, '1')


# the server


class Client:
    def __init__(self, url):
        self.parts = urlsplit(url)
        self.origin = f'http://{self.parts.netloc}'

    def ask(self, path, body=None, method=None, root=None, **headers):
        connection = http.client.HTTPConnection(self.parts.hostname, self.parts.port, timeout=20)
        headers = {'Host': self.parts.netloc} | {k.replace('_', '-'): v for k, v in headers.items() if v is not None}
        data = None if body is None else json.dumps(body).encode()
        if data is not None:
            headers = {'Content-Type': 'application/json', 'Origin': self.origin} | headers
        headers = {k: v for k, v in headers.items() if v}
        connection.request(
            method or ('GET' if data is None else 'POST'), (root or self.parts.path) + path, data, headers
        )
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, json.loads(content) if 'json' in answer.getheader('Content-Type', '') else content


@pytest.fixture
def served(tmp_path):
    gallery = make_gallery(tmp_path)
    journal = resume(tmp_path, gallery)
    with serve(Naming(gallery, journal)) as url:
        yield Client(url), tmp_path
    journal.close()


def test_only_the_page_s_own_origin_posts(served):
    client, folder = served
    post = dict(do='name', labels=['1'], name='duck', seen=9)
    foreign = ['http://example.org', 'null', 'https://' + client.parts.netloc, 'http://localhost:1', '']
    for origin in foreign:
        assert client.ask('api/act', post, Origin=origin)[0] == 403
    for host in ('example.org', f'example.org:{client.parts.port}', '127.0.0.1', '0.0.0.0:' + str(client.parts.port)):
        assert client.ask('api/act', post, Host=host)[0] == 403 and client.ask('', Host=host)[0] == 403
    assert client.ask('api/act', post, Content_Type='text/plain')[0] == 400  # what a form could send
    for root in ('/', '/x/', client.parts.path[:-2] + '/', '//'):
        assert client.ask('api/act', post, root=root)[0] == 404 and client.ask('api/state', root=root)[0] == 404
    assert read_names(folder / 'names.yaml').names == {}
    assert client.ask('api/act', post)[0] == 200
    assert read_names(folder / 'names.yaml').names == {'1': 'duck'}


def test_only_what_belongs_to_the_page_is_served(served):
    client, folder = served
    assert client.ask('crop/0.jpg')[1][:2] == b'\xff\xd8'
    for path in (
        'names.yaml',
        'crop/../names.yaml',
        '../a.png',
        'crop/a.png',
        'crop/99.jpg',
        'crop/-1.jpg',
        '%2e%2e/a.png',
        'api/',
    ):
        assert client.ask(path)[0] == 404, path
    assert client.ask('api/cluster/9')[0] == 400 and client.ask('api/cluster/..%2f1')[0] == 400
    with socket.create_connection((client.parts.hostname, client.parts.port)) as s:
        assert s.getpeername()[0] == '127.0.0.1'


def test_the_server_listens_on_loopback_alone(served):
    client, _ = served
    lines = Path('/proc/net/tcp').read_text().splitlines()[1:]
    listening = [
        l.split()[1] for l in lines if l.split()[3] == '0A' and l.split()[1].endswith(f':{client.parts.port:04X}')
    ]
    assert listening == [f'0100007F:{client.parts.port:04X}']


def test_odd_requests_are_answered(served):
    client, folder = served
    odd = [
        [],
        3,
        dict(),
        dict(do='undo'),
        dict(do='set', names={}),
        dict(do='split'),
        dict(do='split', label=3),
        dict(do='name', labels='1', name='x'),
    ]
    odd += [
        dict(do='name', labels=[1], name='x'),
        dict(do='name', labels=['1'], name=3),
        dict(do='name', labels=['1'], name='a\u202eb'),
    ]
    odd += [
        dict(do='name', labels=['1', '5'], name='x'),
        dict(do='name', labels=['1'], name='x', seen='2'),
        dict(do='name', labels=['1'], name='thing_2'),
    ]
    for body in odd:
        status, answer = client.ask('api/act', body)
        assert status in (400, 409) and answer['error'], body
    assert read_names(folder / 'names.yaml').names == {}


def test_two_tabs_at_once(served):
    "Eight clients name at the same time: each confirmed name is there, each other one was refused."
    client, folder = served
    confirmed, lock = {}, threading.Lock()

    def tab(i):
        for n in range(6):
            label = str(1 + (i + n) % 4)
            status, answer = Client(client.origin + client.parts.path).ask(
                'api/act', dict(do='name', labels=[label], name=f'n{i} {n}', seen=n)
            )
            assert status in (200, 409)
            if status == 200:
                with lock:
                    confirmed[answer['version']] = (label, f'n{i} {n}')

    threads = [threading.Thread(target=tab, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    last = {label: name for _, (label, name) in sorted(confirmed.items())}
    assert len(confirmed) >= 4 and read_names(folder / 'names.yaml').names == last


# the page


class Browser:
    "Headless Chromium by the WebDriver protocol, as its driver speaks it."

    def __init__(self, folder):
        with socket.socket() as s:
            s.bind(('127.0.0.1', 0))
            port = s.getsockname()[1]
        self.driver = subprocess.Popen(
            ['chromedriver', f'--port={port}'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self.base = f'http://127.0.0.1:{port}'
        args = [
            '--headless=new',
            '--no-sandbox',
            '--disable-gpu',
            '--window-size=1280,900',
            f'--user-data-dir={folder}',
        ]
        wanted = dict(alwaysMatch={'goog:chromeOptions': dict(args=args)})
        for _ in range(100):
            try:
                session = self('POST', '/session', capabilities=wanted)
                break
            except OSError:
                time.sleep(0.1)
        self.base += f'/session/{session["sessionId"]}'

    def __call__(self, method, path, **body):
        data = json.dumps(body).encode() if method == 'POST' else None
        request = urllib.request.Request(self.base + path, data, {'Content-Type': 'application/json'}, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)['value']

    def open(self, url):
        self('POST', '/url', url=url)
        self.wait(
            'document.querySelectorAll("#list button").length && document.querySelectorAll("#typical img").length'
        )

    def run(self, script):
        return self('POST', '/execute/sync', script=f'return {script}', args=[])

    def wait(self, script):
        for _ in range(200):
            if self.run(script):
                return
            time.sleep(0.05)
        raise AssertionError(
            f'never true: {script}; it says {self.run("document.getElementById(`says`).textContent")!r}'
        )

    def keys(self, text):
        "Press keys, one after the other; Enter is a line break, Escape \\x1b."
        special = {'\n': '\ue007', '\x1b': '\ue00c', '\b': '\ue003'}
        actions = [dict(type=t, value=special.get(c, c)) for c in text for t in ('keyDown', 'keyUp')]
        self('POST', '/actions', actions=[dict(type='key', id='keys', actions=actions)])

    def tab(self):
        return self('POST', '/window/new', type='tab')['handle']

    def switch(self, handle):
        self('POST', '/window', handle=handle)

    def close(self):
        self('DELETE', '')
        self.driver.terminate()
        self.driver.wait()


@pytest.fixture(scope='module')
def browser(tmp_path_factory):
    if not shutil.which('chromedriver'):
        pytest.skip('the page needs a browser: no chromedriver here (Debian: chromium-driver)')
    browser = Browser(tmp_path_factory.mktemp('profile'))
    yield browser
    browser.close()


def text(id):
    return f'document.getElementById("{id}").textContent'


def saved(browser, folder, action, expect):
    action()
    browser.wait(f'{text("says")} != ""')  # "saved: ...", at the end of the list followed by another sentence
    end = time.monotonic() + 10
    while not expect(read_names(folder / 'names.yaml')) and time.monotonic() < end:
        time.sleep(0.05)
    assert expect(read_names(folder / 'names.yaml'))
    browser.run('document.getElementById("says").textContent = ""')


def test_by_keys_alone(browser, served):
    "Name, take a neighbour's name, mark and merge, split, discard, undo; a reload shows the same."
    client, folder = served
    browser.open(client.origin + client.parts.path)
    at = lambda label: browser.wait(f'{text("title")}.startsWith("Cluster {label} ")')
    at('1')
    saved(browser, folder, lambda: browser.keys('\nduck\n'), lambda n: n.names == {'1': 'duck'})
    at('2')  # the next one without a name
    browser.wait('document.getElementById("near").labels')
    saved(browser, folder, lambda: browser.keys('1'), lambda n: n.names == {'1': 'duck', '2': 'duck'})
    browser.keys('jj')
    at('4')
    browser.keys(' k')
    at('3')
    saved(browser, folder, lambda: browser.keys('m'), lambda n: n.names['3'] == n.names['4'] == 'thing_3')
    browser.keys('jj')
    at('5')
    saved(browser, folder, lambda: browser.keys('s'), lambda n: n.labels == ['1', '2', '3', '4', '5a', '5b', '6'])
    at('5a')
    saved(browser, folder, lambda: browser.keys('x'), lambda n: n.discarded == {'5a'})
    saved(browser, folder, lambda: browser.keys('u'), lambda n: not n.discarded)
    saved(browser, folder, lambda: browser.keys('u'), lambda n: n.labels == ['1', '2', '3', '4', '5', '6'])
    at('5')
    browser.open(client.origin + client.parts.path)
    assert browser.run(text('done')) == '4 of 6 named, 0 discarded'
    assert browser.run('[...document.querySelectorAll("#names option")].map(o => o.value)') == ['duck', 'thing_3']
    assert browser.run('[...document.querySelectorAll("#typical img")].every(i => i.complete ? i.naturalWidth : true)')


def test_names_are_text(browser, served):
    "Quotes, tags, scripts of any direction: shown as they were typed, and nothing runs."
    client, folder = served
    for label, name in enumerate(HOSTILE, 1):
        assert client.ask('api/act', dict(do='name', labels=[str(label)], name=name, seen=99))[0] == 200
    browser.open(client.origin + client.parts.path)
    assert browser.run('[...document.querySelectorAll("#list b")].map(b => b.textContent)') == HOSTILE
    assert (
        browser.run('document.title') == 'u2seg name'
        and browser.run('document.querySelectorAll("#list b *").length') == 0
    )
    browser.keys('\n')
    for name in HOSTILE[:2]:
        browser.run('document.getElementById("name").value = ""')
        saved(browser, folder, lambda: browser.keys(name + '!\n'), lambda n: name + '!' in n.names.values())
        browser.wait('!busy && document.activeElement.id != "name"')  # a name that is saved leaves the field
        browser.keys('\n')
    assert browser.run('document.title') == 'u2seg name'
    assert [names for names in read_names(folder / 'names.yaml').names.values()][2:] == HOSTILE[2:]


def test_scripts_of_others_do_not_run(browser, served):
    client, _ = served
    browser.open(client.origin + client.parts.path)
    script = 'const s = document.createElement("script"); s.textContent = "window.ran = 1"; document.body.append(s);'
    browser('POST', '/execute/sync', script=script, args=[])
    assert browser.run('window.ran') is None
    foreign = 'fetch("http://127.0.0.1:9/").then(() => 1, e => String(e))'
    assert 'Failed to fetch' in browser('POST', '/execute/sync', script=f'return {foreign}', args=[])


def test_a_second_tab(browser, served):
    "It hears of the first one; what it typed against an older view is refused once, and kept."
    client, folder = served
    url = client.origin + client.parts.path
    browser.open(url)
    first = browser('GET', '/window')
    second = browser.tab()
    browser.switch(second)
    browser.open(url)
    browser.keys('\nswan')
    browser.switch(first)
    saved(browser, folder, lambda: browser.keys('\nduck\n'), lambda n: n.names == {'1': 'duck'})
    browser.switch(second)
    browser.wait('document.querySelector("#list b").textContent == "duck"')
    browser.keys('\n')
    browser.wait(f'{text("says")}.includes("somebody else")')
    assert browser.run('document.getElementById("name").value') == 'swan'
    assert read_names(folder / 'names.yaml').names == {'1': 'duck'}
    saved(browser, folder, lambda: browser.keys('\n'), lambda n: n.names == {'1': 'swan'})  # knowing it
    browser('DELETE', '/window')
    browser.switch(first)
    browser.wait('document.querySelector("#list b").textContent == "swan"')


def test_two_thousand_clusters(browser, tmp_path):
    gallery = make_gallery(tmp_path, 1980, 20, each=2)
    journal = resume(tmp_path, gallery)
    with serve(Naming(gallery, journal)) as url:
        browser.open(url)
        assert browser.run('document.querySelectorAll("#list button").length') == 2000
        loaded = 'performance.getEntriesByType("resource").filter(r => r.name.includes("crop")).length'
        assert browser.run(loaded) < 300  # what is in sight
        browser.keys('/1777\n')
        browser.wait(f'{text("title")}.startsWith("Cluster 1777 ")')
        saved(browser, tmp_path, lambda: browser.keys('\nduck\n'), lambda n: n.names == {'1777': 'duck'})
    journal.close()


def test_killed_in_the_middle(browser, tmp_path):
    "kill -9 while a tab names: what was confirmed is there after the next start, and the page says what to do."
    command = [sys.executable, '-c', f'import test_name; test_name.serve_here({str(tmp_path)!r})']
    environment = os.environ | dict(PYTHONPATH=os.pathsep.join([str(Path(__file__).parent), *sys.path]))
    start = lambda: subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    process = start()
    url = process.stdout.readline().strip()
    browser.open(url)
    client, confirmed = Client(url), {}

    def hurry():
        for i in range(10**6):
            try:
                status, answer = client.ask(
                    'api/act',
                    dict(
                        do='name', labels=[str(1 + i % 6)], name=f'name {i}' if i % 6 < 4 else f'stuff {i}', seen=i + 1
                    ),
                )
            except (OSError, http.client.HTTPException):
                return
            assert status == 200
            confirmed[answer['version']] = i

    thread = threading.Thread(target=hurry)
    thread.start()
    while len(confirmed) < 30:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    thread.join()
    process.wait()
    browser.keys('\nlost\n')
    browser.wait(f'{text("says")}.startsWith("No answer")')
    assert browser.run('document.getElementById("name").value') == 'lost'
    journal = Journal(tmp_path)
    last = max(confirmed)
    assert journal.version in (last, last + 1)  # one may be on the disk and not have been confirmed
    names = {l: int(v.split()[-1]) for l, v in journal.names.names.items()}
    newest = journal.version - 2
    assert names == {str(1 + i % 6): i for i in range(newest - 5, newest + 1)}
    journal.close()
    process = start()
    browser.open(process.stdout.readline().strip())
    assert browser.run(text('done')) == '6 of 6 named, 0 discarded'
    process.kill()
    process.wait()
