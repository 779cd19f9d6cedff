#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["bottle>=0.13", "gevent>=23.9", "gevent-websocket>=0.10.1", "psycopg[binary]>=3.1.14"]
# ///
"""Run nodes of todol on one PostgreSQL server while everything around them breaks, and count what is lost.

    python .ci/nodes.py                     every scene, about ten minutes
    python .ci/nodes.py --short             the scenes that the tests run, about a minute
    python .ci/nodes.py --only kills        one of them: `--help` lists them

Six writers and four sockets, which resume where they were, use two nodes; the clock of one is 30 seconds ahead, and
it has two connections for its 20 jobs at once. A writer repeats what it asks for, with the same key, until that is
acknowledged. Between each node and the server is a line of this program, which can be cut, go silent, be slow, or lose
a commit on its way. After each scene everything that was acknowledged before is looked for: in the tables, in the
traces that the jobs left on the disk, and in what the sockets heard.

Prints a line for each scene, and at the end JSON. Exit status 0: nothing was missing, doubled, out of order, or twice
at once. PostgreSQL and PgBouncer are Debian's (`apt-get install postgresql pgbouncer`). All stays on 127.0.0.1 and in a
directory that is removed.
"""
import sys

if sys.argv[1:2] != ['--run']:
    from gevent import monkey
    monkey.patch_all()

import argparse
import base64
import collections
import contextlib
import functools
import http.client
import importlib.util
import json
import operator
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import tempfile
import time
import urllib.parse

import gevent
import gevent.event
import gevent.server

HERE = pathlib.Path(__file__).resolve()
PROGRAM = HERE.parent.parent / 'todol.py'
SCHEMA = 'todol_production'
PATIENCE_SECONDS = 60       # a machine under test is busy: only then is a wait called endless
AHEAD_SECONDS = 30          # of the clock of every second node
CACHE_BYTES = 1_000_000


# === The nodes: todol, with some routes and jobs that leave traces ====================================================

def run_program(arguments):
    """Run the program of NODES_PROGRAM with these arguments."""
    ahead = float(os.environ.get('NODES_AHEAD', '0'))
    real_time, real_ns = time.time, time.time_ns
    time.time, time.time_ns = lambda: real_time() + ahead, lambda: real_ns() + int(ahead * 1e9)
    spec = importlib.util.spec_from_file_location('todol', os.environ['NODES_PROGRAM'])
    todol = sys.modules['todol'] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(todol)
    todol.cache.limit_bytes = CACHE_BYTES
    stream = todol.shared_stream('nodes')
    trace = os.open(f'traces-{os.getpid()}', os.O_WRONLY | os.O_CREAT | os.O_APPEND)    # of what no server can lose

    def note(*words):
        os.write(trace, (json.dumps([*words, time.monotonic()]) + '\n').encode())

    todol.app_db.migrations += [('900 create asked', '''
        CREATE TABLE asked (place INTEGER PRIMARY KEY AUTOINCREMENT, number INTEGER UNIQUE, thread TEXT)''')]

    @todol.jobs.task(attempts=1000, retry_seconds=0.2)
    def leave_trace(number, thread, seconds):
        note('begin', number, thread)
        try:
            gevent.sleep(seconds)
            todol.cable.broadcast(stream, {'job': number})
            note('done', number, thread)
        except BaseException:
            note('failed', number, thread)
            raise

    if os.environ.get('NODES_VERSION') != 'old':
        @todol.jobs.task
        def novel(number):
            note('novel', number)

    @todol.jobs.task(attempts=3, retry_seconds=0.1)
    def raise_odd(for_good):
        note('odd', for_good)
        if for_good or not todol.cache.incr('odd') > 1:
            raise ValueError('NUL \0, half a pair \ud800')

    @todol.jobs.task
    def stubborn():
        """Wait for the server again and again, whatever happens."""
        note('stubborn')
        while not os.path.exists('enough'):
            with contextlib.suppress(Exception):
                todol.app_db.execute('SELECT count(pg_sleep(1))')

    for index in range(4):
        def tick():
            note('tick')
        tick.__name__ = f'tick{index}'
        todol.jobs.every(1, catch_up=False)(tick)

    @todol.app.post('/nodes/job')
    @functools.wraps(leave_trace.function)
    def ask():
        number, thread, seconds = todol.fields()['number'], todol.fields()['thread'], todol.fields()['seconds']

        def once():
            todol.app_db.lock(f'asked {number}')
            if not todol.app_db.execute('SELECT 1 FROM asked WHERE number = ?', (int(number),)):
                # The job first: its order key is locked then, and places are in the order of the commits.
                todol.jobs.enqueue(leave_trace, {'number': int(number), 'thread': thread, 'seconds': float(seconds)},
                                   order_key=thread)
                todol.app_db.execute('INSERT INTO asked (number, thread) VALUES (?, ?)', (int(number), thread))
                todol.app_db.execute('SELECT count(pg_sleep(0.02))')        # so that every kill is in the midst of some
        todol.app_db.transact(once)
        return 'ok'

    @todol.app.post('/nodes/enqueue')
    def enqueue():
        """A job by its name, whoever knows it."""
        todol.jobs.enqueue(todol.fields()['name'], json.loads(todol.fields()['arguments']))
        return 'ok'

    @todol.app.post('/nodes/say')
    def say():
        number = int(todol.fields()['number'])
        todol.cable.broadcast(stream, lambda: {'said': number, 'state': state()})
        return 'ok'

    def state():
        """A number that only grows; it takes as long as a template might."""
        todol.app_db.execute('SELECT count(pg_sleep(random() / 50))')
        return todol.app_db.execute('SELECT coalesce(max(place), 0) FROM asked')[0][0]

    @todol.app.post('/nodes/unclean')
    def unclean():
        """A function that goes on after a statement of its transaction has failed."""
        def change():
            todol.app_db.execute("INSERT INTO asked (number, thread) VALUES (-1, 'unclean')")
            with contextlib.suppress(Exception):
                todol.app_db.execute('SELECT 1 / 0')
        todol.app_db.transact(change)
        return 'ok'

    @todol.app.post('/nodes/add')
    def add():
        return str(sum(todol.cache.add(f'first {index}', 1) for index in range(20)))

    @todol.app.post('/nodes/fill')
    def fill():
        start = int(todol.fields()['number'])
        todol.cache.set_many({f'entry {start + index}': 'x' * 1000 for index in range(100)})
        return 'ok'

    @todol.app.get('/nodes/stream')
    def where():
        name = re.search('signed-stream-name="([^"]+)" data-since="([^"]+)"', todol.stream_source(stream))
        todol.current_user()
        return {'name': name[1], 'since': name[2]}

    sys.exit(todol.main(arguments))


# === What the nodes stand on: the server, a pooler, and lines to them =================================================

def unprivileged():
    """Options of Popen: root may not run these programs."""
    return {'user': 'nobody', 'group': 'nogroup'} if os.geteuid() == 0 else {}


def free_port():
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


def eventually(condition, seconds=PATIENCE_SECONDS):
    """Wait until condition() is true, and say whether that came."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        gevent.sleep(0.02)
    return True


class Postgres:
    """A server of its own, with a new cluster."""

    def __init__(self, directory):
        self.directory, self.port = directory / 'postgres', free_port()
        self.directory.mkdir()
        if os.geteuid() == 0:
            shutil.chown(self.directory, 'nobody', 'nogroup')
        self._bin = max(pathlib.Path('/usr/lib/postgresql').glob('*/bin'), key=lambda path: int(path.parent.name))
        self._popen = None
        subprocess.run([self._bin / 'initdb', '-D', self.directory / 'data', '-U', 'todol', '-A', 'trust',
                        '-E', 'UTF8', '--locale=C', '--no-sync'],
                       check=True, cwd='/', stdout=subprocess.DEVNULL, **unprivileged())

    def start(self):
        # fsync is for what a power loss would take; the server's own crashes are survived without.
        with open(self.directory / 'log', 'ab') as log:
            self._popen = subprocess.Popen(
                [self._bin / 'postgres', '-D', self.directory / 'data', '-p', str(self.port), '-h', '127.0.0.1',
                 '-k', self.directory, '-c', 'fsync=off', '-c', 'max_connections=120'],
                cwd='/', stdout=log, stderr=log, **unprivileged())
        assert eventually(self._answers), (self.directory / 'log').read_text()[-2000:]

    def _answers(self):
        with contextlib.suppress(Exception):
            return self.query('SELECT 1') == [(1,)]

    def stop(self, number=signal.SIGQUIT):
        """SIGINT: fast; SIGQUIT: immediate, as a crash."""
        if self._popen:
            self._popen.send_signal(number)
            self._popen.wait()

    def query(self, statement, database='postgres'):
        """The rows of a statement, past all lines."""
        import psycopg
        with psycopg.connect(self.url(self.port, database), autocommit=True, connect_timeout=10) as connection:
            cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else []

    @staticmethod
    def url(port, database='postgres'):
        return f'postgresql://todol@127.0.0.1:{port}/{database}'


@contextlib.contextmanager
def pgbouncer(server, mode):
    """The port of a PgBouncer before the server."""
    port, place = free_port(), server.directory
    (place / 'bouncer.ini').write_text(
        f'[databases]\n* = user=todol host=127.0.0.1 port={server.port}\n[pgbouncer]\nlisten_addr=127.0.0.1\n'
        f'listen_port={port}\nunix_socket_dir=\nauth_type=any\npool_mode={mode}\nmax_client_conn=200\n'
        'default_pool_size=80\n')
    program = shutil.which('pgbouncer', path=os.environ['PATH'] + ':/usr/sbin')
    with open(place / 'bouncer.log', 'ab') as log:
        popen = subprocess.Popen([program, place / 'bouncer.ini'], cwd='/', stdout=log, stderr=log, **unprivileged())
    try:
        assert eventually(lambda: connects(port)), (place / 'bouncer.log').read_text()
        yield port
    finally:
        popen.kill()
        popen.wait()


def connects(port):
    with contextlib.suppress(OSError):
        socket.create_connection(('127.0.0.1', port), 5).close()
        return True


class Line:
    """TCP from a node to the server, with what can happen to it."""

    def __init__(self, target):
        self.target = target            # port
        self.is_cut = False             # who connects is hung up on
        self.is_silent = False          # what is sent gets nowhere, on connections old and new
        self.slow_seconds = 0           # before what the server sends gets through
        self.lose_commits = []          # for the next: whether they get to the server; nothing is heard of them
        self._pairs = {}                # (client, server) -> whether it listens
        self._server = gevent.server.StreamServer(('127.0.0.1', 0), self._carry)
        self._server.start()
        self.port = self._server.server_port

    def cut(self, only_listener=False):
        """Hang up on all of now."""
        for pair, listens in list(self._pairs.items()):
            if listens or not only_listener:
                hang_up(pair)

    def silence(self, only_listener=False):
        """From now on nothing passes on the connections of now, and nobody is told."""
        for pair, listens in list(self._pairs.items()):
            if listens or not only_listener:
                self._pairs[pair] = None

    def close(self):
        self.cut()
        self._server.stop()

    def _carry(self, client, address):
        if self.is_cut:
            return
        try:
            server = socket.create_connection(('127.0.0.1', self.target), 5)
        except OSError:
            return
        server.settimeout(None)
        pair = client, server
        self._pairs[pair] = False
        there, back = gevent.spawn(self._pump, pair, client, server), gevent.spawn(self._pump, pair, server, client)
        gevent.joinall([there, back], count=1)
        hang_up(pair)
        gevent.joinall([there, back])
        del self._pairs[pair]

    def _pump(self, pair, source, sink):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if source is pair[0]:
                    if b'LISTEN ' in data:
                        self._pairs[pair] = True
                    if b'COMMIT' in data and self.lose_commits:
                        if self.lose_commits.pop():
                            sink.sendall(data)
                            gevent.sleep(0.2)
                        return
                elif self.slow_seconds:
                    gevent.sleep(self.slow_seconds)
                while self.is_silent or self._pairs[pair] is None:
                    gevent.sleep(0.05)
                    sink.getpeername()          # raises when it was hung up
                sink.sendall(data)


def hang_up(pair):
    for end in pair:
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
        end.close()


class Node:
    """A process of todol."""

    def __init__(self, world, name, target=None, **environment):
        self.world, self.name, self.port, self.popen = world, name, free_port(), None
        self.line = Line(target or world.server.port)
        self.environment = {'DATABASE_URL': Postgres.url(self.line.port, world.database), **environment}
        world.started.append(self)

    def start(self, wait=True):
        inherited = {name: value for name, value in os.environ.items()
                     if not re.match('TODOL_|DATABASE_|DIRECT_', name)}
        with open(self.world.directory / f'log-{self.name}', 'ab') as log:
            self.popen = subprocess.Popen(
                [sys.executable, str(HERE), '--run', 'serve'], cwd=self.world.directory, stdout=log, stderr=log, env={
                    **inherited, 'TODOL_ENV': 'production', 'TODOL_WRITES_PER_MINUTE': '1000000',
                    'PORT': str(self.port), 'NODES_PROGRAM': str(self.world.options.program), **self.environment})
        if wait:
            self.wait_until_up()
        return self

    def wait_until_up(self):
        def is_up():
            with contextlib.suppress(OSError, http.client.HTTPException):
                return self.popen.poll() is not None or ask(self.port, 'GET', '/up')[0] == 200
        if not eventually(is_up) or self.popen.poll() is not None:
            self.world.say(f'node {self.name} does not get up (exit status {self.popen.poll()})')

    def kill(self):
        self.popen.kill()
        self.popen.wait()
        self.world.killed_at[self.popen.pid] = time.monotonic()

    def stop(self):
        """The exit status after SIGTERM."""
        self.popen.terminate()
        try:
            status = self.popen.wait(timeout=30)
        except subprocess.TimeoutExpired:
            status = 'none after 30 s'
            self.kill()
        self.world.killed_at[self.popen.pid] = time.monotonic()
        if status != 0:
            self.world.say(f'the stop of node {self.name} ends with status {status}')


def ask(port, method, path, fields=None, cookie='', timeout=60, **headers):
    """(status, text, cookie that was set) of a request. Raises OSError, HTTPException."""
    connection = http.client.HTTPConnection('127.0.0.1', port, timeout=timeout)
    try:
        body = urllib.parse.urlencode(fields) if isinstance(fields, dict) else fields
        connection.request(method, path, body, {'Accept': 'application/json', 'Cookie': cookie, 'Content-Type':
                                                'application/x-www-form-urlencoded', **headers})
        answer = connection.getresponse()
        return answer.status, answer.read().decode(), (answer.getheader('Set-Cookie') or '').partition(';')[0]
    finally:
        connection.close()


# === Who uses them ====================================================================================================

class World:
    """What all share, and all that is known."""

    def __init__(self, options, directory, server):
        self.options, self.directory, self.server = options, directory, server
        self.database = 'postgres'
        self.started = []                       # every Node
        self.nodes = []                         # that the writers use
        self.wrong = []                         # sentences
        self.count = collections.Counter()
        self.over = False
        self.titles, self.jobs, self.said = {}, {}, {}      # acknowledged: -> when
        self.jobs_of_traces = []
        self.killed_at = {}                     # pid -> when
        self.emptied_at = []                    # when a crash of the server may have emptied the log of messages
        self.numbers = iter(range(1, 10**9))
        self.waits = [0.0]                      # seconds from the first try to the acknowledgement
        self.late_from = 0                      # only of what is said after it:
        self.late = []                          # seconds from saying on one node to hearing from another

    def query(self, statement):
        return self.server.query(statement, self.database)

    def say(self, sentence):
        if len(self.wrong) < 30:
            print('WRONG:', sentence, file=sys.stderr, flush=True)
        self.wrong.append(sentence)

    def until_acknowledged(self, path, fields, cookie='', at=None):
        """POST to any node until one of them has done it, and give when that was asked last, and where."""
        began = time.monotonic()
        while time.monotonic() < began + 2 * PATIENCE_SECONDS:
            node = at or random.choice(self.nodes)
            asked = time.monotonic()
            try:
                status, text, _ = ask(node.port, 'POST', path, fields, cookie)
            except (OSError, http.client.HTTPException):
                status = 'none'
            self.count[f'answers {status}'] += 1
            if status in (200, 201):
                self.waits.append(time.monotonic() - began)
                return asked, node
            if status not in (503, 'none'):
                return self.say(f'POST {path} {fields} gets {status}: {text[:300]}')
            gevent.sleep(random.uniform(0.02, 0.2))
        self.say(f'POST {path} {fields} is never acknowledged: {status}')


def write(world, cookie):
    """A writer: todos, jobs in order, messages, until all is over. Two share a list."""
    kind = 0
    while not world.over:
        number, kind = next(world.numbers), kind + 1
        if kind % 10 == 0:
            world.until_acknowledged('/todos', {'_method': 'PATCH', 'completed': random.randrange(2)}, cookie)
        elif kind % 3 == 0:
            if world.until_acknowledged('/todos', {'title': f't{number}', 'key': f'{number}'}, cookie):
                world.titles[f't{number}'] = time.monotonic()
        elif kind % 3 == 1:
            fields = {'number': number, 'thread': f'thread {random.randrange(8)}',
                      'seconds': 0.5 if kind % 60 == 1 else 0.01}
            if world.until_acknowledged('/nodes/job', fields):
                world.jobs[number] = time.monotonic()
        elif asked := world.until_acknowledged('/nodes/say', {'number': number}):
            world.said[number] = *asked, time.monotonic()
        gevent.sleep(random.expovariate(1 / world.options.pause))


class Tab:
    """A socket that resumes where it was, on any node."""

    def __init__(self, world, number):
        self.world, self.number = world, number
        self.heard = {}                     # (epoch, offset) -> what was told
        self.numbers = {}                   # said -> when it was heard
        self.state = 0
        self.refreshed_at = []
        self.name = self.since = self.node = self.cookie = None
        self.greenlet = gevent.spawn(self.run)

    def run(self):
        while True:
            self.node = random.choice(self.world.nodes)
            with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
                if self.since is None:
                    self.load()
                self.listen()
            self.world.count['cuts of tabs'] += 1
            gevent.sleep(random.uniform(0.05, 0.3))

    def load(self):
        at = time.monotonic()               # what was said before is on the page
        status, text, cookie = ask(self.node.port, 'GET', '/nodes/stream', cookie=self.cookie or '')
        if status == 200:
            self.cookie = cookie or self.cookie
            self.name, self.since = json.loads(text)['name'], json.loads(text)['since']
            self.refreshed_at.append(at)

    def listen(self):
        place = '127.0.0.1', self.node.port
        with socket.create_connection(place, 10) as connection, connection.makefile('rb') as file:
            connection.settimeout(20)       # pings come every 3 s
            connection.sendall(
                f'GET /cable HTTP/1.1\r\nHost: 127.0.0.1:{self.node.port}\r\nUpgrade: websocket\r\n'
                'Connection: Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n'
                'Sec-WebSocket-Protocol: actioncable-v1-ext-json, actioncable-unsupported\r\n'
                f'Cookie: {self.cookie}\r\n\r\n'.encode())
            while file.readline().strip():
                pass
            identifier = json.dumps({'channel': 'Turbo::StreamsChannel', 'signed_stream_name': self.name,
                                     'since': self.since})
            command = json.dumps({'command': 'subscribe', 'identifier': identifier}).encode()
            connection.sendall(b'\x81\xfe' + len(command).to_bytes(2, 'big') + bytes(4) + command)   # masked with zeros
            while self.receive(file):
                pass

    def receive(self, file):
        """Take the next frame; false where it is no text."""
        head = file.read(2)
        if len(head) < 2 or head[0] & 15 != 1:
            return False
        size = int.from_bytes(file.read({126: 2, 127: 8}[head[1]]), 'big') if head[1] > 125 else head[1]
        message = json.loads(file.read(size))
        if message.get('type') == 'reject_subscription':
            self.world.say(f'tab {self.number} is rejected')
        if 'message' not in message or 'type' in message:
            return True
        if isinstance(message['message'], str):     # the stream that says: load the page again
            self.world.count['refreshes'] += 1
            self.since = None               # the page that is loaded now says where it stands
            return False
        place, last = (message['epoch'], message['offset']), self.since.rpartition(':')
        if place in self.heard:
            self.world.count['messages doubled'] += 1
            self.world.say(f'tab {self.number} hears {place} twice')
        elif last[0] == place[0] and place[1] <= int(last[2]):
            self.world.count['messages out of order'] += 1
            self.world.say(f'tab {self.number} hears {place} after {self.since}')
        self.since = f'{place[0]}:{place[1]}'
        self.heard[place] = message['message']
        if number := message['message'].get('said'):
            self.numbers[number] = time.monotonic()
            if message['message']['state'] < self.state:
                self.world.count['states out of order'] += 1
                self.world.say(f'tab {self.number} hears the state {message["message"]["state"]} after {self.state}')
            self.state = message['message']['state']
        return True


# === Looks: all that was acknowledged before, beside what is there ====================================================

def look(world, final=False):
    """Compare; while writers go on, what they have done until now."""
    titles, asked, said = list(world.titles), list(world.jobs), list(world.said)
    look_at_todos(world, titles)
    look_at_jobs(world, asked)
    look_at_messages(world, said)
    if final:
        left = world.query(f'SELECT uid, name, worker, error FROM {SCHEMA}_job.jobs '
                                  "WHERE name NOT LIKE 'tick%'")
        if left:
            world.say(f'{len(left)} jobs are left: {left[:3]}')
    world.count.update({'todos': len(titles), 'jobs': len(asked), 'messages': len(said)})


def look_at_todos(world, titles):
    there = collections.Counter(title for title, in world.query(f'SELECT title FROM {SCHEMA}.todos'))
    for title in titles:
        if title not in there:
            world.count['acknowledged and missing'] += 1
            world.say(f'the todo {title} was acknowledged and is missing')
    for title, times in there.items():
        if times > 1:
            world.count['doubled'] += 1
            world.say(f'the todo {title} is there {times} times')
    for row in world.query(f'''
            SELECT lists.user_id, lists.active, lists.completed, count(*) FILTER (WHERE todos.completed = 0), count(*)
            FROM {SCHEMA}.lists JOIN {SCHEMA}.todos USING (user_id) GROUP BY 1, 2, 3
            HAVING lists.active <> count(*) FILTER (WHERE todos.completed = 0)
                OR lists.active + lists.completed <> count(*)'''):
        world.count['counts wrong'] += 1
        world.say(f'a list is miscounted: {row}')


def traces(world):
    """(what, …, when, pid) of all nodes, in the order of time."""
    found = []
    for path in world.directory.glob('traces-*'):
        for line in path.read_text().splitlines():
            found.append((*json.loads(line), int(path.name.partition('-')[2])))
    return sorted(found, key=lambda trace: trace[-2])


def look_at_jobs(world, asked):
    def unfinished():
        done = {trace[1] for trace in traces(world) if trace[0] == 'done'}
        return [number for number in asked if number not in done]
    left = unfinished()
    while left and eventually(lambda left=left: len(unfinished()) < len(left)):       # as long as they get fewer
        left = unfinished()
    if left:
        world.count['jobs lost'] += len(left)
        world.say(f'{len(left)} acknowledged jobs do not get done: {left[:5]}')
    rows = world.query(f'SELECT number, thread FROM {SCHEMA}.asked ORDER BY place')
    there, committed = dict(rows), collections.defaultdict(list)
    for number in asked:
        if number not in there:
            world.count['acknowledged and missing'] += 1
            world.say(f'the job {number} was acknowledged, and its transaction is missing')
    for number, thread in rows:
        committed[thread].append(number)
    begun, running = collections.defaultdict(dict), {}
    for what, *rest, at, pid in traces(world):
        if what not in ('begin', 'done', 'failed'):
            continue
        number, thread = rest
        if what != 'begin':
            if running.get(thread, (0, 0))[1] == pid:
                del running[thread]
            continue
        begun[thread][number] = True
        other, its_pid = running.get(thread, (None, pid))
        if other is not None and at < world.killed_at.get(its_pid, float('inf')):
            world.count['twice at once'] += 1
            world.say(f'the job {number} begins in {pid} while {other} of {thread} runs in {its_pid}')
        running[thread] = number, pid
    for thread, numbers in committed.items():
        order = [number for number in begun[thread] if number in there]
        if order != [number for number in numbers if number in begun[thread]]:
            world.count['jobs out of order'] += 1
            world.say(f'the jobs of {thread} did not begin in the order of their commits')


def look_at_messages(world, said):
    """Each tab has heard all, but for what a refresh stands for."""
    def missing(tab):
        # Heard, or said before a page was loaded that had it.
        return [number for number in said if number not in tab.numbers and not any(
            at > world.said[number][2] for at in tab.refreshed_at)]
    eventually(lambda: not any(map(missing, world.tabs)))
    for tab in world.tabs:
        if missing(tab):
            world.count['messages missing'] += len(missing(tab))
            world.say(f'tab {tab.number} has not heard {missing(tab)[:5]}')
    log = world.query(f'''SELECT epoch, id, payload FROM {SCHEMA}_cable.epochs, {SCHEMA}_cable.messages
                                 WHERE stream = '{world.stream}' ORDER BY id''')
    for tab in world.tabs:
        ours = [id for epoch, id in tab.heard if log and epoch == log[0][0]]
        kept = {id: json.loads(payload) for _, id, payload in log if ours and min(ours) <= id <= max(ours)}
        gaps = [id for id in kept if id not in ours] if not tab.refreshed_at[1:] else []
        changed = [id for id in kept if id in ours and tab.heard[log[0][0], id] != kept[id]]
        if gaps or changed:
            world.count['messages missing'] += len(gaps)
            world.say(f'tab {tab.number} lacks {gaps[:5]} of the log, and has heard others as {changed[:5]}')
    for number in said:
        began, node, _ = world.said[number]
        if began < world.late_from:
            continue
        world.late += [tab.numbers[number] - began for tab in world.tabs
                       if tab.node is not node and number in tab.numbers]


# === Scenes: what happens to them =====================================================================================

SCENES = {}         # name -> function of the world; in the order in which they are here


def scene(function):
    SCENES[function.__name__] = function
    return function


@scene
def calm(world):
    gevent.sleep(3)


@scene
def kills(world):
    """kill -9 of one after the other, in the midst of jobs and transactions."""
    for node in world.nodes:
        node.kill()
        gevent.sleep(0.5)
        node.start()


@scene
def fast_restart(world):
    world.server.stop(signal.SIGINT)
    world.server.start()
    gevent.sleep(1)


@scene
def immediate_restart(world):
    world.server.stop(signal.SIGQUIT)
    world.server.start()
    gevent.sleep(1)


@scene
def lost_commits(world):
    """Lines break while a COMMIT is on its way, there or back."""
    for node in world.nodes:
        node.line.lose_commits = [True, False] * 4
        eventually(functools.partial(operator.not_, node.line.lose_commits))


@scene
def cuts(world):
    for _ in range(3):
        for node in world.nodes:
            node.line.cut()
            gevent.sleep(random.uniform(0.1, 0.4))
    for node in world.nodes:
        node.line.is_cut = True
        node.line.cut()
        gevent.sleep(2)
        node.line.is_cut = False


@scene
def half_open(world):
    """The connections of one node carry nothing any more, and of the other the one that listens."""
    a, b = world.nodes[:2]
    b.line.silence(only_listener=True)
    a.line.silence()
    gevent.sleep(6)


@scene
def slow(world):
    for node in world.nodes:
        node.line.slow_seconds = 0.2
    gevent.sleep(5)
    for node in world.nodes:
        node.line.slow_seconds = 0


@scene
def away_8_seconds(world, seconds=8):
    world.server.stop(signal.SIGINT)
    gevent.sleep(seconds)
    world.server.start()


@scene
def versions(world):
    """A node of an older version, which does not know a job, runs beside."""
    old = Node(world, 'old', NODES_VERSION='old').start()
    numbers = [next(world.numbers) for _ in range(20)]
    for number in numbers:
        world.until_acknowledged('/nodes/enqueue', {'name': 'novel', 'arguments': json.dumps({'number': number})})
    if not eventually(lambda: set(numbers) <= {trace[1] for trace in traces(world) if trace[0] == 'novel'}, 60):
        world.say('jobs that an old node does not know were not done by the others')
    old.stop()
    old.line.close()
    failed = world.query(f'SELECT name, error FROM {SCHEMA}_job.jobs WHERE failed_at IS NOT NULL')
    if failed:
        world.say(f'jobs have failed: {failed[:2]}')


@scene
def odd_text(world):
    """NUL and lone surrogates in errors and titles; a transaction that goes on behind a failed statement."""
    port = world.nodes[0].port
    for for_good in (False, True):
        arguments = json.dumps({'for_good': for_good})
        world.until_acknowledged('/nodes/enqueue', {'name': 'raise_odd', 'arguments': arguments})
    for title in ('a\0b', 'a\ud800b'):
        status = ask(port, 'POST', '/todos', json.dumps({'title': title}), **{'Content-Type': 'application/json'})[0]
        if status not in (400, 422):
            world.say(f'the title {title!r} gets {status}')
    status, text, _ = ask(port, 'POST', '/nodes/unclean', {})
    there = world.query(f'SELECT 1 FROM {SCHEMA}.asked WHERE number = -1')
    if (status == 200) != bool(there):
        world.say(f'a transaction with a failed statement gets {status} {text[:100]}, and its row is {there}')

    def failed():
        return world.query(f"SELECT attempt, error FROM {SCHEMA}_job.jobs WHERE name = 'raise_odd'")
    if not eventually(lambda: [attempt for attempt, error in failed() if error] == [3], 30):
        world.say(f'of two jobs with odd errors one is done and one has failed; not so: {failed()}')
    world.query(f"DELETE FROM {SCHEMA}_job.jobs WHERE name = 'raise_odd'")


@scene
def eviction(world):
    """Two nodes fill the cache far beyond its bound."""
    def fill(node, path):
        status, text, _ = ask(node.port, 'POST', f'/nodes/{path}', {'number': 100 * next(world.numbers)})
        if status != 200:
            world.say(f'filling the cache gets {status} {text[:200]}')
        return text
    adding = [gevent.spawn(fill, node, 'add') for _ in range(3) for node in world.nodes]
    gevent.joinall(adding)
    added = [each.value for each in adding]
    if sum(map(int, added)) != 20:
        world.say(f'of 20 keys so many were added first: {added}')
    gevent.joinall([gevent.spawn(fill, node, 'fill') for _ in range(15) for node in world.nodes])
    gevent.sleep(1)             # written behind
    for node in world.nodes:    # a full one makes room when it is written
        fill(node, 'fill')
    size = 'SELECT coalesce(sum(length(key) + coalesce(length(value), 8) + 100), 0) FROM '

    def fits():
        return world.query(f'{size} {SCHEMA}_cache.entries')[0][0] <= 1.2 * CACHE_BYTES
    if not eventually(fits, 20):
        world.say(f'the cache of {CACHE_BYTES} has {world.query(f"{size} {SCHEMA}_cache.entries")}')


@scene
def stops(world):
    """SIGTERM while a job waits for the server, and goes on whatever happens."""
    world.until_acknowledged('/nodes/enqueue', {'name': 'stubborn', 'arguments': '{}'})
    pids = []
    eventually(lambda: pids.extend(trace[-1] for trace in traces(world) if trace[0] == 'stubborn') or pids)
    for node in world.nodes:
        if node.popen.pid == pids[0]:
            node.stop()
            (world.directory / 'enough').touch()
            node.start()


@scene
def poolers(world):
    """The same through PgBouncer, in two modes, with a way past it for the bells and without."""
    before = world.nodes
    for mode in ('session', 'transaction'):
        with pgbouncer(world.server, mode) as port:
            for direct in ({}, {'DIRECT_DATABASE_URL': Postgres.url(world.server.port, world.database)}):
                nodes = [Node(world, f'{mode}-{index}', port, **direct) for index in range(2)]
                for node in nodes:
                    node.start()
                world.nodes = nodes
                for node in before:
                    node.stop()
                gevent.sleep(2)
                world.late[:], world.late_from = [], time.monotonic()
                gevent.sleep(6)
                look(world)
                print(f'  {mode}{" and direct" * bool(direct)}: {late(world)}', file=sys.stderr, flush=True)
                before = nodes
            world.nodes = world.first
            for node in world.nodes:
                node.start()
            for node in before:
                node.stop()
                node.line.close()
            before = world.nodes


@scene
def away_60_seconds(world, seconds=60):
    """Longer than a lease, while jobs run that take longer too: the first node that is back may not take the other's."""
    numbers = [next(world.numbers) for _ in range(4)]
    for number in numbers:
        fields = {'number': number, 'thread': f'long {number}', 'seconds': seconds + 30}
        world.until_acknowledged('/nodes/job', fields)
        world.jobs[number] = time.monotonic()
    eventually(lambda: set(numbers) <= {trace[1] for trace in traces(world) if trace[0] == 'begin'})
    for node in world.nodes[:1]:
        node.line.is_cut = True
        node.line.cut()
    away_8_seconds(world, seconds)
    gevent.sleep(4)
    world.nodes[0].line.is_cut = False
    gevent.sleep(20)


SHORT = ['calm', 'kills', 'fast_restart', 'immediate_restart', 'lost_commits', 'cuts', 'half_open', 'slow',
         'away_8_seconds', 'versions', 'odd_text', 'eviction', 'stops']


def late(world):
    if not world.late:
        return 'nothing heard'
    return (f'said on one node to heard from the other: p50 {1000 * statistics.median(world.late):.0f} ms, '
            f'p99 {1000 * sorted(world.late)[int(len(world.late) * 0.99) - 1]:.0f} ms of {len(world.late)}')


# === The run ==========================================================================================================

def start_nodes(world):
    """Four at once on an empty database; two of them stay."""
    nodes = [Node(world, 'a'), Node(world, 'b', NODES_AHEAD=str(AHEAD_SECONDS), DATABASE_POOL='2'),
             Node(world, 'c'), Node(world, 'd')]
    for node in nodes:
        node.start(wait=False)
    for node in nodes:
        node.wait_until_up()
    if world.wrong:
        raise SystemExit(1)
    world.nodes = world.first = nodes[:2]
    for node in nodes[2:]:
        node.stop()
        node.line.close()


def run(options, directory):
    server = Postgres(directory)
    world = World(options, directory, server)
    results = {}
    try:
        server.start()
        start_nodes(world)
        began = time.monotonic()
        signed = json.loads(ask(world.nodes[0].port, 'GET', '/nodes/stream')[1])['name']
        world.stream = json.loads(base64.b64decode(signed.partition('--')[0]))
        cookies = [ask(world.nodes[0].port, 'GET', '/', Accept='text/html')[2] for _ in range(3)] * 2
        writers = [gevent.spawn(write, world, cookie) for cookie in cookies]
        world.tabs = [Tab(world, number) for number in range(4)]
        for name in options.only or (SHORT if options.short else SCENES):
            results[name] = play(world, name)
        world.over = True
        gevent.joinall(writers, timeout=PATIENCE_SECONDS)
        eventually(lambda: not server.query(f"SELECT 1 FROM {SCHEMA}_job.jobs WHERE name NOT LIKE 'tick%'"), 60)
        look(world, final=True)
        look_at_ticks(world, time.monotonic() - began, len(results))
        for node in world.nodes:
            node.stop()
        look_at_logs(world)
    finally:
        for node in world.started:
            if node.popen and node.popen.poll() is None:
                node.kill()
        server.stop()
    print(json.dumps({'scenes': results, 'counts': world.count, 'wrong': world.wrong[:30]}))
    return 1 if world.wrong else 0


def look_at_logs(world):
    """What a node could not explain is there with a traceback."""
    for path in world.directory.glob('log-*'):
        for line in re.findall('ERROR   failed: (.*)', path.read_text())[:3]:
            world.say(f'the log of {path.name} has a traceback of {line}')


def play(world, name):
    """One scene, and a look at what was acknowledged until its end."""
    before, wrong, began = world.count.copy(), len(world.wrong), time.monotonic()
    world.waits[:] = [0.0]
    SCENES[name](world)
    ended = time.monotonic()
    look(world)
    spent = {'seconds': round(ended - began, 1), 'settled after': round(time.monotonic() - ended, 1),
             'longest wait s': round(max(world.waits), 2), 'wrong': len(world.wrong) - wrong,
             **{what: times for what, times in (world.count - before).items()
                if what not in ('todos', 'jobs', 'messages')}}
    print(f'{name}: {spent}', file=sys.stderr, flush=True)
    return spent


def look_at_ticks(world, seconds, scenes):
    """Each of the four recurring jobs ran at most once a second."""
    ticks = sum(trace[0] == 'tick' for trace in traces(world))
    world.count['ticks'] = ticks
    if ticks > 4 * (seconds + 2) + 8 * (len(world.killed_at) + scenes):      # some are run again
        world.say(f'{ticks} ticks in {seconds:.0f} seconds of four jobs that recur every second')


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    add = parser.add_argument
    add('--short', action='store_true')
    add('--only', action='append', choices=SCENES)
    add('--pause', type=float, default=0.1, help='of a writer between two things, seconds, on average')
    add('--program', type=pathlib.Path, default=PROGRAM)
    add('--keep', action='store_true', help="keep the nodes' logs and traces")
    options = parser.parse_args()
    directory = pathlib.Path(tempfile.mkdtemp(prefix='nodes-'))
    directory.chmod(0o755)
    try:
        return run(options, directory)
    finally:
        if options.keep:
            print(directory, file=sys.stderr)
        else:
            shutil.rmtree(directory, ignore_errors=True)


if __name__ == '__main__':
    if sys.argv[1:2] == ['--run']:
        run_program(sys.argv[2:])
    sys.exit(main())
