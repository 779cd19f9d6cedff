#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = []
# ///
"""Measure todol beside its peers: a Markdown table on stdout, progress on stderr.

    python .ci/bench.py                     everything but growth and grow, eight minutes
    python .ci/bench.py --quick             a look, under two minutes
    python .ci/bench.py --only page         one figure: `--help` lists them; growth and grow run only when named
    python .ci/bench.py --json FILE         every sample too

The peers are installed into .ci/bench-venv at the first run. wrk and redis-server come from Debian (`apt-get install
wrk redis-server`); without them the rows that need them are left out, and named. Each figure alternates with its peer
(A B A B ...) after a warm-up that does not count, and is the median of the rounds. The server under test has one core
for itself, the load has the other. Everything stays on 127.0.0.1 and in a directory that is removed afterwards.
"""
import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import http.client
import itertools
import json
import os
import pathlib
import platform
import random
import re
import resource
import secrets
import shutil
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
PROGRAM = HERE.parent / 'todol.py'
VENV = HERE / 'bench-venv'
PEER_PACKAGES = ['flask', 'gunicorn[gevent]', 'starlette', 'uvicorn[standard]', 'python-multipart', 'itsdangerous', 'jinja2',
                 'redis', 'hiredis', 'huey', 'diskcache', 'playwright', 'psycopg[binary]', 'procrastinate']

CORES = sorted(os.sched_getaffinity(0))
SERVER_CORE, LOAD_CORE = CORES[0], CORES[-1]


# === Measuring: rounds, medians, rows of the table ====================================================================

@dataclasses.dataclass(frozen=True)
class Effort:
    """How much is measured."""
    rounds: int             # of each side, after the warm-up
    starts: int             # of each server: they differ more than other figures
    load_seconds: int       # of wrk in a round
    loop_seconds: float     # of one kind of call in a round
    latencies: int          # single events timed in a round
    jobs: int               # no-op jobs in a round; of the slower peers a fifth
    idle_seconds: int       # of a process that should do nothing


FULL = Effort(rounds=5, starts=15, load_seconds=3, loop_seconds=0.2, latencies=200, jobs=10_000, idle_seconds=60)
QUICK = Effort(rounds=3, starts=5, load_seconds=1, loop_seconds=0.05, latencies=40, jobs=2_000, idle_seconds=5)

FIGURES = {}                # name -> function of an Effort that gives Rows


@dataclasses.dataclass
class Row:
    """A line of the table. reached: None where there is no goal, or no peer to hold it against."""
    what: str
    unit: str
    todol: float
    peer_name: str
    peer: float
    goal: str
    reached: bool
    samples: dict           # side -> all samples, each a dict of quantities


class Missing(Exception):
    """A program that this machine lacks; the figure is left out."""


def figure(function):
    """A decorator: register a figure under the name of its function."""
    FIGURES[function.__name__] = function
    return function


def alternate(sides, rounds):
    """Call the functions of a dict in turn, so that a noisy minute meets all; gives side -> samples, without the warm-up."""
    samples = {side: [] for side in sides}
    for counts in [False] + [True] * rounds:
        for side, measure in sides.items():
            sample = measure()
            if counts:
                samples[side].append(sample)
    return samples


def median(samples, side, quantity):
    """The median of a quantity, or None if that side has none."""
    values = [sample[quantity] for sample in samples.get(side, ()) if quantity in sample]
    return statistics.median(values) if values else None


def compared(what, unit, samples, quantity, peer='', ratio_at_least=None, ratio_at_most=None, at_least=None, at_most=None):
    """The Row of a quantity. Ratios are todol / peer; at_least and at_most are todol's own, in the unit."""
    ours, theirs = median(samples, 'todol', quantity), median(samples, peer, quantity)
    ratio = ours / theirs if theirs else None
    goals = [(ratio, '≥', ratio_at_least, '×'), (ratio, '≤', ratio_at_most, '×'),
             (ours, '≥', at_least, f' {unit}'), (ours, '≤', at_most, f' {unit}')]
    goals = [(value, sign, bound, suffix) for value, sign, bound, suffix in goals if bound is not None]
    met = [value is not None and (value >= bound if sign == '≥' else value <= bound) for value, sign, bound, _ in goals]
    unknown = not goals or any(value is None for value, *_ in goals)
    return Row(what, unit, ours, peer, theirs, ', '.join(f'{sign} {number(bound)}{suffix}' for _, sign, bound, suffix in goals),
               None if unknown else all(met), {side: samples[side] for side in ('todol', peer) if side in samples})


def percentiles(seconds):
    """p50 and p99 of durations, in milliseconds."""
    ordered = sorted(1000 * each for each in seconds)
    return {'p50_ms': ordered[len(ordered) // 2], 'p99_ms': ordered[min(len(ordered) - 1, round(len(ordered) * 0.99))]}


def number(value):
    """Three digits, more for large numbers."""
    if value is None:
        return '–'
    return f'{value:,.0f}' if abs(value) >= 100 else f'{value:.3g}'


# === Processes: pinned, watched through /proc, ended with the block that started them =================================

def start(command, core=None, **options):
    """A process in the environment of this one, without variables for todol or Python; core: the one that it may use."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(('TODOL_', 'PYTHON'))}
    environment.update(options.pop('environment', {}))
    ours = os.sched_getaffinity(0)
    os.sched_setaffinity(0, CORES if core is None else {core})      # it inherits that; a preexec_fn would copy this process
    try:
        return subprocess.Popen([str(word) for word in command], env=environment, **options)
    finally:
        os.sched_setaffinity(0, ours)


def end(process):
    """Ask a process to end, and make sure of it."""
    process.send_signal(signal.SIGCONT)
    process.terminate()
    try:
        process.wait(8)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe:
            pipe.close()


def family(pid):
    """A process and all below it."""
    pids = [pid]
    for each in pids:
        with contextlib.suppress(OSError):
            for task in os.listdir(f'/proc/{each}/task'):
                pids += map(int, pathlib.Path(f'/proc/{each}/task/{task}/children').read_text().split())
    return pids


def cpu_s(pid):
    """Seconds of CPU that a process and its children have used, to the nanosecond (stat has only 10 ms steps)."""
    total_ns = 0
    for each in family(pid):
        for task in pathlib.Path(f'/proc/{each}/task').glob('*/schedstat'):
            total_ns += int(task.read_text().split()[0])
    return total_ns / 1e9


def resident_mb(pid):
    """Resident memory of a process and its children; what they share counts in each, as in `ps`."""
    return sum(int(re.search(r'VmRSS:\s+(\d+)', pathlib.Path(f'/proc/{each}/status').read_text())[1])
               for each in family(pid)) / 1024


def written_bytes(pid):
    """What a process gave to write(), and what it made dirty by other means."""
    counts = dict(line.split(': ') for line in pathlib.Path(f'/proc/{pid}/io').read_text().splitlines())
    return int(counts['wchar']) + int(counts['write_bytes'])


def idle_cpu_percent(pids, seconds):
    """The CPU that each of the processes uses while nobody asks them for anything, in percent of a core."""
    before = [cpu_s(pid) for pid in pids]
    time.sleep(seconds)
    return [100 * (cpu_s(pid) - start_s) / seconds for pid, start_s in zip(pids, before)]


def need(program):
    """The path of a program. Raises Missing."""
    if not shutil.which(program):
        raise Missing(f'{program} is missing (apt-get install {program})')
    return shutil.which(program)


def free_port():
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


def pin(core):
    """Keep this process on a core."""
    os.sched_setaffinity(0, {core})


@contextlib.contextmanager
def scratch():
    """A directory with the peers' files, removed at the end."""
    with tempfile.TemporaryDirectory(prefix='todol-bench-') as directory:
        for name, text in {**PEER_FILES, 'page.html': peer_page()}.items():
            pathlib.Path(directory, name).write_text(text)
        yield directory


@contextlib.contextmanager
def redis_server(directory, core=None, durable=False):
    """Redis on a port of its own; gives (port, pid). durable: the append-only file, written out once a second."""
    port = free_port()
    process = start([need('redis-server'), '--port', port, '--bind', '127.0.0.1', '--dir', directory, '--save', '',
                     '--appendonly', 'yes' if durable else 'no', '--appendfsync', 'everysec'], core, stdout=subprocess.DEVNULL)
    try:
        eventually(lambda: answers(port, b'PING\r\n', b'+PONG'), process)
        yield port, process.pid
    finally:
        end(process)


@contextlib.contextmanager
def postgres_server(directory):
    """A new PostgreSQL server with its defaults, which may use any core; gives its URL."""
    found = sorted(pathlib.Path('/usr/lib/postgresql').glob('*/bin/postgres'), key=lambda path: int(path.parts[-3]))
    if not found:
        raise Missing('PostgreSQL is missing (apt-get install postgresql)')
    port, place = free_port(), pathlib.Path(tempfile.mkdtemp(dir=directory))
    options = {'cwd': '/', 'stdout': subprocess.DEVNULL, 'stderr': subprocess.DEVNULL}
    if os.geteuid() == 0:           # as whom it refuses to run
        options |= {'user': 'nobody', 'group': 'nogroup'}
        for path in (place, pathlib.Path(directory)):
            shutil.chown(path, 'nobody', 'nogroup')
    start([found[-1].parent / 'initdb', '-D', place / 'data', '-U', 'bench', '-A', 'trust', '-E', 'UTF8', '--locale=C'],
          **options).wait()
    process = start([found[-1], '-D', place / 'data', '-p', port, '-h', '127.0.0.1', '-k', place], **options)
    url = f'postgresql://bench@127.0.0.1:{port}/postgres'
    try:
        eventually(lambda: queried(url, 'SELECT 1'), process)
        yield url
    finally:
        process.send_signal(signal.SIGINT)      # a fast stop; SIGTERM would wait for the clients
        process.wait()


def queried(url, statement):
    """The rows of a statement; None where the server is not there."""
    import psycopg
    with contextlib.suppress(psycopg.OperationalError), psycopg.connect(url, autocommit=True) as connection:
        return connection.execute(statement).fetchall()


def answers(port, request, beginning):
    """Whether a request gets an answer that begins so."""
    try:
        with socket.create_connection(('127.0.0.1', port), timeout=5) as connection:
            connection.sendall(request)
            return connection.recv(100).startswith(beginning)
    except OSError:
        return False


def eventually(condition, process=None, seconds=30):
    """Wait until the condition is true, looking every millisecond."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline or (process and process.poll() is not None):
            raise RuntimeError(f'{condition} did not come true, process {process and process.args}')
        time.sleep(0.001)


@contextlib.contextmanager
def child(name, *arguments, core=None):
    """One of CHILDREN of this file in a process of its own, which talks in lines; ready when it says so."""
    process = start([sys.executable, __file__, '--child', name, *arguments], core, stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE, text=True, bufsize=1)
    try:
        assert process.stdout.readline() == 'ready\n', f'{name} did not start'
        yield process
    finally:
        end(process)


# === Peers: the same app as their users would write it ================================================================
# SQLite in WAL and NORMAL on one cached connection (its statement cache makes the statements prepared), a signed cookie
# for the session, compiled Jinja templates with autoescape, uvloop and httptools, gunicorn's gevent worker, keep-alive.
# They hold no counters, outbox, jobs or sockets: for a POST they make one INSERT. In files, so that they have bytecode.
# Their page is todol's own, as a template of Jinja.

PEER_FILES = {'store.py': '''
import os
import sqlite3

connection = sqlite3.connect(os.path.join(os.environ['PEER_DATA'], 'todos.sqlite3'), isolation_level=None,
                             check_same_thread=False)
for statement in ('PRAGMA journal_mode = WAL', 'PRAGMA synchronous = NORMAL',
                  'CREATE TABLE IF NOT EXISTS todos (id INTEGER PRIMARY KEY AUTOINCREMENT, user_id TEXT NOT NULL, '
                  'title TEXT NOT NULL, completed INTEGER NOT NULL DEFAULT 0)',
                  'CREATE INDEX IF NOT EXISTS todos_by_user ON todos (user_id, id)'):
    connection.execute(statement)


def list_todos(user):
    return connection.execute('SELECT id, title, completed FROM todos WHERE user_id = ? ORDER BY id', (user,)).fetchall()


def create_todo(user, title):
    connection.execute('INSERT INTO todos (user_id, title) VALUES (?, ?)', (user, title))
''', 'peer_flask.py': '''
import secrets

from flask import Flask, redirect, render_template, request, session

import store

app = Flask(__name__, template_folder='.')
app.secret_key = 'a secret of the benchmark, of no worth'


@app.get('/')
def show_list():
    user = session.get('user')
    if user is None:
        user = session['user'] = secrets.token_urlsafe(16)
    return render_template('page.html', todos=store.list_todos(user))


@app.post('/todos')
def create():
    store.create_todo(session['user'], request.form['title'].strip())
    return redirect('/', 303)
''', 'peer_starlette.py': '''
import secrets

import jinja2
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.sessions import SessionMiddleware
from starlette.responses import HTMLResponse, RedirectResponse
from starlette.routing import Route

import store

page = jinja2.Environment(loader=jinja2.FileSystemLoader('.'), autoescape=True, auto_reload=False).get_template('page.html')


async def show_list(request):
    user = request.session.get('user')
    if user is None:
        user = request.session['user'] = secrets.token_urlsafe(16)
    return HTMLResponse(page.render(todos=store.list_todos(user)))


async def create(request):
    form = await request.form()
    store.create_todo(request.session['user'], form['title'].strip())
    return RedirectResponse('/', 303)


app = Starlette(routes=[Route('/', show_list), Route('/todos', create, methods=['POST'])],
                middleware=[Middleware(SessionMiddleware, secret_key='a secret of the benchmark, of no worth')])
''', 'peer_huey.py': '''
# peer_huey.py (consume | produce KIND NUMBER) (redis PORT | sqlite FILE)
from gevent import monkey; monkey.patch_all()
import sys
import time

from huey import RedisHuey, SqliteHuey

backend, place = sys.argv[-2:]
queue = RedisHuey('bench', port=int(place), results=False) if backend == 'redis' else \\
        SqliteHuey('bench', filename=place, results=False)
done = 0


@queue.task()
def noop(total):
    global done
    done += 1
    if done == total:
        done = 0
        print(time.monotonic(), flush=True)


@queue.task()
def nap(total):
    time.sleep(0.1)
    noop.call_local(total)


@queue.task()
def mark(sent_at):
    print(time.monotonic() - sent_at, flush=True)


if sys.argv[1] == 'consume':
    # The delays are those of SqliteHuey's polling, a tenth of the defaults and less; RedisHuey blocks and is woken.
    queue.create_consumer(workers=100, worker_type='greenlet', periodic=False, initial_delay=0.01, max_delay=0.1).run()
else:
    kind, number = sys.argv[2], int(sys.argv[3])
    print(time.monotonic(), flush=True)
    for _ in range(number):
        if kind == 'mark':
            mark(time.monotonic())
            time.sleep(0.01)
        else:
            (noop if kind == 'noop' else nap)(number)
'''}

PEER_FILES['peer_procrastinate.py'] = '''
# peer_procrastinate.py (schema | consume | produce KIND NUMBER) URL
import asyncio
import sys
import time

import procrastinate

app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=sys.argv[-1]))
done = 0


@app.task()
async def noop(total):
    global done
    done += 1
    if done == total:
        done = 0
        print(time.monotonic(), flush=True)


async def main():
    async with app.open_async():
        if sys.argv[1] == 'schema':
            await app.schema_manager.apply_schema_async()
        elif sys.argv[1] == 'consume':
            await app.run_worker_async(concurrency=100, delete_jobs='successful', install_signal_handlers=False)
        else:
            number = int(sys.argv[3])
            print(time.monotonic(), flush=True)
            for _ in range(number):
                await noop.defer_async(total=number)


asyncio.run(main())
'''

TODOL_MODULE = 'python -m todol'     # has bytecode; a main script is compiled at each start
ALONE = 'one process'               # the peer of several
UNMEASURED = 'todol that measures nothing'
UNMEASURED_PROGRAM = '''
import sys, todol
def nothing(*arguments, **options): pass
todol.Metrics.count = todol.Metrics.time = todol.Metrics.slow = todol._measure = todol.Jobs._measure = nothing
todol.StallWatch.open = nothing
todol._request_id = lambda environ: 'x'
sys.exit(todol.main())
'''
STARLETTE = 'Starlette + uvicorn'
FLASK = 'Flask + gunicorn (gevent)'
REDIS_HUEY = 'huey on Redis'
SQLITE_HUEY = 'huey on SQLite'
PROCRASTINATE = 'procrastinate'
SECRET = 'of the benchmark, so that it can sign cookies'


def import_todol():
    sys.path.insert(0, str(PROGRAM.parent))
    import todol
    return todol


def peer_page():
    """The page of todol as a Jinja template with a loop over (id, title, completed): everybody sends the same HTML."""
    todol = import_todol()
    todo = todol.Todo(1234567, 'TITLE', False, 1234567)
    with tempfile.TemporaryDirectory() as directory, stack(directory, TODOL_SECRET=SECRET):
        todol.bottle.request.bind({'stack.position': '0:0'})
        html = todol.render_page('user', 'all', [todo], todol.Totals(1, 0, 1))
    row = todol.render_todo(todo)
    loop = row.replace('1234567', '{{ id }}').replace('TITLE', '{{ title }}').replace(
        'type="checkbox"', 'type="checkbox"{% if completed %} checked{% endif %}')
    assert row in html and '<strong>1</strong> item ' in html, "todol's page has changed: mend the template made of it"
    return html.replace(row, f'{{% for id, title, completed in todos %}}{loop}{{% endfor %}}').replace(
        '<strong>1</strong> item ', '<strong>{{ todos|length }}</strong> items ')


# === Web servers, and what asks them ==================================================================================

FORM = 'application/x-www-form-urlencoded'
TURBO_STREAM = 'text/vnd.turbo-stream.html'


class Server:
    """todol or a peer on a core (None: on any), with files of its own below the directory; to be used in a with
    statement."""

    def __init__(self, name, directory, core=SERVER_CORE, **settings):
        self.name = name
        self._core = core
        self.port = free_port()
        self._core = core
        self.data = tempfile.mkdtemp(dir=directory)
        self._directory = directory
        self._environment = {'PORT': str(self.port), 'TODOL_DATA': self.data, 'TODOL_WRITES_PER_MINUTE': '1000000000',
                             'TODOL_MAX_TODOS': '1000000', 'TODOL_MAX_SOCKETS': '100000', 'PEER_DATA': self.data,
                             'PYTHONPATH': str(PROGRAM.parent), **settings}

    def __enter__(self):
        command = {'todol': [PROGRAM], TODOL_MODULE: ['-m', 'todol'], UNMEASURED: ['-c', UNMEASURED_PROGRAM],
                   STARLETTE: ['-m', 'uvicorn', 'peer_starlette:app', '--host', '127.0.0.1', '--port', self.port,
                               '--loop', 'uvloop', '--http', 'httptools', '--no-access-log', '--log-level', 'warning'],
                   FLASK: ['-m', 'gunicorn', 'peer_flask:app', '-b', f'127.0.0.1:{self.port}', '-k', 'gevent', '-w', '1',
                           '--keep-alive', '75', '--log-level', 'warning']}[self.name]
        with open(pathlib.Path(self._directory, 'log'), 'w') as log:
            started = time.perf_counter()
            self._process = start([sys.executable, *command], self._core, cwd=self._directory, environment=self._environment,
                                  stderr=log, stdout=log)
        self.pid = self._process.pid
        request = b'GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n'
        eventually(lambda: answers(self.port, request, b'HTTP/1.1 200'), self._process)
        self.start_ms = 1000 * (time.perf_counter() - started)
        return self

    def __exit__(self, *error):
        end(self._process)

    def request(self, method, path, body=None, cookie='', accept='text/html'):
        """The answer to one request, and the cookie that it sets."""
        headers = {'Cookie': cookie, 'Content-Type': FORM, 'Accept': accept}
        connection = http.client.HTTPConnection('127.0.0.1', self.port)
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        assert answer.status < 400, f'{self.name} answered {answer.status} to {method} {path}'
        return text, (answer.getheader('Set-Cookie') or '').partition(';')[0]

    def visitors(self, count=16, todos=20):
        """Cookies of new visitors, each with so many todos."""
        cookies = [self.request('GET', '/')[1] for _ in range(count)]
        for cookie in cookies:
            for index in range(todos):
                self.request('POST', '/todos', f'title=Buy+milk,+bread+%26+butter+{index}', cookie)
        return cookies

    def settle(self):
        """Wait until todol has broadcast all that was changed; the peers broadcast nothing."""
        if self.name not in ('todol', TODOL_MODULE, UNMEASURED):
            return
        for file, table in (('development.sqlite3', 'outbox'), ('development_job.sqlite3', 'jobs')):
            with contextlib.closing(sqlite3.connect(os.path.join(self.data, file), timeout=5)) as database:
                eventually(lambda: not database.execute(f'SELECT EXISTS (SELECT 1 FROM {table})').fetchone()[0], self._process)


PAGE_LUA = '''
local requests, sent = {}, 0
function init() for i, cookie in ipairs(cookies) do requests[i] = wrk.format('GET', '/', {Cookie = cookie}) end end
function request() sent = sent + 1; return requests[sent % #requests + 1] end
'''
CREATE_LUA = '''
local sent, headers = 0, {}
for i, cookie in ipairs(cookies) do
  headers[i] = {Cookie = cookie, ['Content-Type'] = 'application/x-www-form-urlencoded'}
end
function request()
  sent = sent + 1
  local key = (begun_ms + sent) .. '-' .. run     -- starts with the time, as those of the page
  return wrk.format('POST', '/todos', headers[sent % #headers + 1], 'title=Buy+milk+' .. sent .. '&key=' .. key)
end
'''
DONE_LUA = '''
function done(summary, latency, requests)
  local errors = summary.errors
  io.write(string.format('{"requests": %d, "us": %d, "p50_us": %d, "errors": %d}', summary.requests, summary.duration,
           latency:percentile(50), errors.status + errors.connect + errors.read + errors.write + errors.timeout))
end
'''


def load(server, cookies, requests_lua, connections, seconds, core=LOAD_CORE):
    """Let wrk ask a server, and wait until all that follows from it is done: requests per second of that whole time, CPU
    microseconds per request, and the median latency."""
    script = pathlib.Path(server.data, 'wrk.lua')
    # A key of another run would only find the todo of that run: no change at all.
    names = ', '.join(json.dumps(cookie) for cookie in cookies)
    script.write_text(f'cookies, run, begun_ms = {{{names}}}, "{secrets.token_hex(8)}", {int(time.time() * 1000)}\n'
                      + requests_lua + DONE_LUA)
    before_s = cpu_s(server.pid)
    process = start([need('wrk'), '-t1', f'-c{connections}', f'-d{seconds}s', '-s', script, f'http://127.0.0.1:{server.port}'],
                    core, stdout=subprocess.PIPE, text=True)
    result = json.loads(process.communicate()[0].splitlines()[-1])
    ended = time.perf_counter()
    server.settle()
    assert result['requests'] and not result['errors'], f'{server.name}: {result}'
    return {'per_s': result['requests'] / (result['us'] / 1e6 + time.perf_counter() - ended), 'p50_ms': result['p50_us'] / 1000,
            'cpu_us': 1e6 * (cpu_s(server.pid) - before_s) / result['requests']}


class CableClient:
    """A subscribed WebSocket of a visitor, as bytes: what it costs to read is little."""

    def __init__(self, server, cookie, signed_stream_name):
        self._socket = socket.create_connection(('127.0.0.1', server.port), timeout=20)
        self._socket.sendall(
            f'GET /cable HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n'
            'Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n'
            f'Sec-WebSocket-Protocol: actioncable-v1-json, actioncable-unsupported\r\nCookie: {cookie}\r\n\r\n'.encode())
        identifier = json.dumps({'channel': 'Turbo::StreamsChannel', 'signed_stream_name': signed_stream_name})
        command = json.dumps({'command': 'subscribe', 'identifier': identifier}).encode()
        self._socket.sendall(b'\x81\xfe' + len(command).to_bytes(2, 'big') + bytes(4) + command)    # masked with zeros
        self._unread = b''

    def read_until(self, mark):
        """Read on until these bytes have come."""
        while mark not in self._unread:
            part = self._socket.recv(65536)
            assert part, 'the server closed the WebSocket'
            self._unread += part
        self._unread = self._unread.partition(mark)[2]

    def close(self):
        self._socket.close()


def open_sockets(server, cookie, count):
    """Subscribed WebSockets of one visitor."""
    name = re.search('signed-stream-name="([^"]+)"', server.request('GET', '/', cookie=cookie)[0])[1]
    clients = []
    for _ in range(count):
        clients.append(CableClient(server, cookie, name))
        clients[-1].read_until(b'confirm_subscription')
    return clients


# === Figures: HTTP ====================================================================================================

@figure
def startup(effort):
    """From the command to the first 200, with files from an earlier start, and memory after serving 1,000 pages."""
    with scratch() as directory:
        servers = {name: Server(name, directory) for name in ('todol', TODOL_MODULE, STARLETTE, FLASK)}

        def measure(server, pages):
            with server:
                cookie, = server.visitors(1) if pages else ['']
                for _ in range(pages):
                    server.request('GET', '/', cookie=cookie)
                return {'ms': server.start_ms, **({'mb': resident_mb(server.pid)} if pages else {})}

        samples = {name: [] for name in servers}
        for pages, rounds in ((100 if effort is QUICK else 1000, effort.rounds), (0, effort.starts - effort.rounds)):
            for name, measured in alternate({name: functools.partial(measure, server, pages)
                                             for name, server in servers.items()}, rounds).items():
                samples[name] += measured
    with_bytecode = {**samples, 'todol': samples[TODOL_MODULE]}
    return [compared('start to the first 200', 'ms', samples, 'ms', STARLETTE, ratio_at_most=0.85),
            compared('start to the first 200', 'ms', samples, 'ms', FLASK),
            compared(f'– as `{TODOL_MODULE}`', 'ms', with_bytecode, 'ms', STARLETTE, ratio_at_most=0.6),
            compared(f'– as `{TODOL_MODULE}`', 'ms', with_bytecode, 'ms', FLASK),
            compared('resident after serving', 'MB', samples, 'mb', STARLETTE, at_most=40),
            compared('resident after serving', 'MB', samples, 'mb', FLASK)]


@contextlib.contextmanager
def three_servers():
    """todol and its two peers, each with its visitors: name -> (server, cookies)."""
    with scratch() as directory, contextlib.ExitStack() as running:
        servers = [running.enter_context(Server(name, directory)) for name in ('todol', STARLETTE, FLASK)]
        yield {server.name: (server, server.visitors()) for server in servers}


@figure
def page(effort):
    """GET / with 20 todos: the most pages a second, and the time of one."""
    need('wrk')
    with three_servers() as servers:
        def measure(connections):
            return alternate({name: functools.partial(load, server, cookies, PAGE_LUA, connections, effort.load_seconds)
                              for name, (server, cookies) in servers.items()}, effort.rounds)
        for name, (server, cookies) in servers.items():
            progress(f'  {name}: {len(server.request("GET", "/", cookie=cookies[0])[0]):,} bytes of HTML')
        busy, alone = measure(16), measure(1)
    return [*(compared('GET / with 20 todos', 'pages/s', busy, 'per_s', peer, ratio_at_least=ratio)
              for peer, ratio in ((STARLETTE, 1.25), (FLASK, 2.4))),
            *(compared('– its CPU', 'µs', busy, 'cpu_us', peer) for peer in (STARLETTE, FLASK)),
            compared('– p50 at one keep-alive connection', 'ms', alone, 'p50_ms', STARLETTE, at_most=1)]


@figure
def create(effort):
    """POST /todos; todol also counts, enqueues and broadcasts in that time, its peers make a bare INSERT."""
    need('wrk')
    with three_servers() as servers:
        samples = alternate({name: functools.partial(load, server, cookies, CREATE_LUA, 16, effort.load_seconds)
                             for name, (server, cookies) in servers.items()}, effort.rounds)
    return [*(compared('POST /todos with job and broadcast', 'requests/s', samples, 'per_s', peer, ratio_at_least=ratio)
              for peer, ratio in ((STARLETTE, 0.6), (FLASK, 1.6))),
            *(compared('– its CPU', 'µs', samples, 'cpu_us', peer) for peer in (STARLETTE, FLASK))]


def stack_figure(effort):
    """What measuring costs: todol beside itself with every counter, timer and request id taken out. By the CPU, which
    differs less than the throughput. Both from bytecode, so that they differ in nothing else."""
    need('wrk')
    with scratch() as directory, Server(TODOL_MODULE, directory) as on, Server(UNMEASURED, directory) as off:
        rows, sides = [], {'todol': (on, on.visitors()), UNMEASURED: (off, off.visitors())}
        for what, lua in (('GET / with 20 todos', PAGE_LUA), ('POST /todos with job and broadcast', CREATE_LUA)):
            samples = alternate({name: functools.partial(load, server, cookies, lua, 16, effort.load_seconds)
                                 for name, (server, cookies) in sides.items()}, 3 * effort.rounds)
            samples = {side: sorted(each, key=lambda sample: sample['cpu_us'])[:effort.rounds]
                       for side, each in samples.items()}       # those that were disturbed least
            rows += [compared(f'{what}: CPU', 'µs', samples, 'cpu_us', UNMEASURED, ratio_at_most=1.03),
                     compared('– answers', '/s', samples, 'per_s', UNMEASURED)]
    return rows


FIGURES['stack'] = stack_figure     # there is a function of that name below


@figure
def live(effort):
    """From the POST of one client to the stream at another's socket."""
    with scratch() as directory, Server('todol', directory) as server:
        pin(LOAD_CORE)
        cookie, = server.visitors(1)
        client, = open_sockets(server, cookie, 1)
        connection = http.client.HTTPConnection('127.0.0.1', server.port)
        connection.connect()
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        titles = (f'milk-{index}-' for index in itertools.count())

        def measure():
            latencies = []
            for title in itertools.islice(titles, effort.latencies):
                sent = time.perf_counter()
                connection.request('POST', '/todos', f'title={title}', {'Cookie': cookie, 'Content-Type': FORM})
                client.read_until(title.encode())
                latencies.append(time.perf_counter() - sent)
                connection.getresponse().read()
                time.sleep(0.005)
            return percentiles(latencies)

        samples = alternate({'todol': measure}, effort.rounds)
        connection.close()
        client.close()
    return [compared("POST to another client's socket, p50", 'ms', samples, 'p50_ms', at_most=5),
            compared('– p99', 'ms', samples, 'p99_ms', at_most=15)]


PAINT_SCRIPT = '''() => {
    window.painted = [];        // milliseconds from each Enter to the end of the first frame with the whole row in it
    addEventListener('keydown', ({ key, timeStamp }) => {
        if (key !== 'Enter') return;
        const title = document.querySelector('.new-todo').value;
        requestAnimationFrame(function look() {
            const row = document.querySelector('#todos > :last-child');
            if (row.textContent.trim() !== title || row.offsetHeight < 40) return requestAnimationFrame(look);
            requestAnimationFrame(() => painted.push(performance.now() - timeStamp));       // the next one begins
        });
    }, true); }'''


@figure
def paint(effort):
    """From the Enter key to the row of a new todo on the screen, in a list that begins with 20."""
    chromium = need('chromium')
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise Missing('playwright is missing (pip install playwright)') from None
    with scratch() as directory, Server('todol', directory) as server, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=['--no-sandbox', '--disable-gpu'])

        def measure():
            cookie, = server.visitors(1)
            name, _, value = cookie.partition('=')
            url = f'http://127.0.0.1:{server.port}'
            with browser.new_context() as context:
                context.add_cookies([{'name': name, 'value': value, 'url': url}])
                page = context.new_page()
                page.goto(url)
                page.wait_for_selector('#connection[data-state=live]', state='attached')
                page.evaluate(PAINT_SCRIPT)
                context.new_cdp_session(page).send('Emulation.setCPUThrottlingRate', {'rate': 4})
                for index in range(effort.latencies // 10):
                    page.fill('.new-todo', f'Buy tea {index}')
                    page.keyboard.press('Enter')
                    page.wait_for_timeout(300)          # until all that follows is done
                return percentiles([ms / 1000 for ms in page.evaluate('painted')])

        samples = alternate({'todol': measure}, effort.rounds)
        browser.close()
    return [compared('adding a todo, to its paint, CPU 4x slower', 'ms', samples, 'p50_ms', at_most=50)]


# === Figures: services, in this process ===============================================================================

@contextlib.contextmanager
def stack(directory, **settings):
    """The whole stack of todol in this process, on files in the directory; gives the module."""
    todol = import_todol()
    with todol.open_stack({'TODOL_DATA': str(directory), **settings}, run_jobs=True):
        yield todol


class Huey:
    """A consumer of huey on SERVER_CORE with 100 greenlets, stopped while it is not its turn: an idle one polls."""
    script = 'peer_huey.py'

    def __init__(self, directory, backend, place):
        self._directory, self._place = directory, [backend, str(place)]

    def __enter__(self):
        self._consumer = self._run('consume', core=SERVER_CORE)
        self._consumer.send_signal(signal.SIGSTOP)
        return self

    def __exit__(self, *error):
        end(self._consumer)

    def rate(self, kind, number):
        """Jobs a second, from the first enqueue of another process to the end of the last."""
        enqueued_at, (done_at,) = self._ask(kind, number, reports=1)
        return {'per_s': number / (done_at - enqueued_at)}

    def latency(self, number):
        """From enqueueing to the start of a job, one every 10 ms."""
        return percentiles(self._ask('mark', number, reports=number)[1])

    def _ask(self, kind, number, reports):
        self._consumer.send_signal(signal.SIGCONT)
        producer = self._run('produce', kind, number, core=LOAD_CORE)
        enqueued_at = float(producer.stdout.readline())
        reported = [float(self._consumer.stdout.readline()) for _ in range(reports)]
        self._consumer.send_signal(signal.SIGSTOP)
        producer.wait()
        producer.stdout.close()
        return enqueued_at, reported

    def _run(self, *arguments, core):
        return start([sys.executable, self.script, *arguments, *self._place], core, cwd=self._directory,
                     stdout=subprocess.PIPE, text=True, stderr=subprocess.DEVNULL)


class TodolJobs:
    """The same jobs in todol's own queue: durable, in this process, done when their rows are gone."""

    def __init__(self, todol):
        import gevent
        self._todol, self._sleep = todol, gevent.sleep
        todol.jobs.tasks.clear()       # of the stack before this one
        self._done = 0
        self._latencies = []

        @todol.jobs.task()
        def noop(total):
            self._done += 1

        @todol.jobs.task()
        def nap(total):
            gevent.sleep(0.1)
            self._done += 1

        @todol.jobs.task()
        def mark(sent_at):
            self._latencies.append(time.monotonic() - sent_at)

    def rate(self, kind, number):
        self._done = 0
        enqueued_at = time.monotonic()
        for index in range(number):
            self._todol.jobs.enqueue(kind, {'total': number})
            if index % 100 == 99:
                self._sleep(0)          # as a server would between requests
        while self._done < number or self._todol.job_db.execute('SELECT EXISTS (SELECT 1 FROM jobs)')[0][0]:
            self._sleep(0.001)
        return {'per_s': number / (time.monotonic() - enqueued_at)}

    def latency(self, number):
        self._latencies.clear()
        for _ in range(number):
            self._todol.jobs.enqueue('mark', {'sent_at': time.monotonic()})
            self._sleep(0.01)
        while len(self._latencies) < number:
            self._sleep(0.001)
        return percentiles(self._latencies)


@figure
def jobs(effort):
    """Throughput of no-op jobs, the time until one starts, and 100 jobs that sleep. huey's producer is another process, as
    its users have it; todol's is its own."""
    with scratch() as directory, contextlib.ExitStack() as running:
        todol = running.enter_context(stack(directory, TODOL_JOB_WORKERS='100'))
        sides = {'todol': TodolJobs(todol)}
        if shutil.which('redis-server'):
            redis_port, _ = running.enter_context(redis_server(directory, durable=True))
            sides[REDIS_HUEY] = running.enter_context(Huey(directory, 'redis', redis_port))
        sides[SQLITE_HUEY] = running.enter_context(Huey(directory, 'sqlite', directory + '/huey.sqlite3'))
        pin(SERVER_CORE)
        number = {side: effort.jobs if side == 'todol' else effort.jobs // 5 for side in sides}
        noops = alternate({side: functools.partial(each.rate, 'noop', number[side]) for side, each in sides.items()},
                          effort.rounds)
        naps = alternate({side: functools.partial(each.rate, 'nap', 100) for side, each in sides.items()}, effort.rounds)
        starts = alternate({side: functools.partial(each.latency, effort.latencies) for side, each in sides.items()},
                           effort.rounds)
    for sample in itertools.chain(*naps.values()):
        sample['percent'] = sample['per_s'] / 10        # 100 workers can do 1,000 jobs of 100 ms in a second
    return [compared('no-op jobs, enqueued to done', 'jobs/s', noops, 'per_s', REDIS_HUEY, ratio_at_least=5),
            compared('no-op jobs, enqueued to done', 'jobs/s', noops, 'per_s', SQLITE_HUEY),
            compared('start after enqueueing, p50', 'ms', starts, 'p50_ms', REDIS_HUEY),
            compared('– p99', 'ms', starts, 'p99_ms', REDIS_HUEY, ratio_at_most=1),
            compared('– p99', 'ms', starts, 'p99_ms', SQLITE_HUEY),
            compared('100 jobs of 100 ms, of the ideal', '%', naps, 'percent', REDIS_HUEY, at_least=90)]


CACHE_KEYS = 1000
CACHE_TTL_SECONDS = 300
UNSYNCED_DISKCACHE = 'diskcache, unsynced'


@figure
def cache(effort):
    """get, set and incr of 1,000 keys beside diskcache and, on the same core (its best case), Redis."""
    import diskcache
    import gevent
    import redis
    pin(SERVER_CORE)
    with scratch() as directory, contextlib.ExitStack() as running:
        ours = running.enter_context(stack(directory)).cache
        # todol does not sync its cache either, but notices when the machine went down.
        disks = {name: running.enter_context(diskcache.Cache(f'{directory}/{name}', size_limit=ours.limit_bytes, **options))
                 for name, options in (('diskcache', {}), (UNSYNCED_DISKCACHE, {'sqlite_synchronous': 0}))}
        calls = {side: {verb: getattr(cache, verb) for verb in ('get', 'set', 'add', 'incr', 'clear')}
                 for side, cache in (('todol', ours), *disks.items())}
        if shutil.which('redis-server'):
            port, _ = running.enter_context(redis_server(directory, SERVER_CORE))
            client = redis.Redis(port=port)
            calls['redis-py'] = {'get': client.get, 'set': client.set, 'add': functools.partial(client.set, nx=True),
                                 'incr': client.incr, 'clear': client.flushall}

        def measure(side, verb, arguments):
            """Calls a second. Every hundred calls the event loop gets its turn, as between requests: todol writes behind."""
            call = calls[side][verb]
            done, started = 0, time.perf_counter()
            while time.perf_counter() < started + effort.loop_seconds:
                for each in itertools.islice(arguments, 100):
                    call(*each)
                gevent.sleep(0)
                done += 100
            return {'per_s': done / (time.perf_counter() - started)}

        def compare(verb, make_arguments):
            # Arguments for each side: who is faster must not leave the others the values that are already there.
            return alternate({side: functools.partial(measure, side, verb, make_arguments()) for side in calls}, effort.rounds)

        rows = []
        for size in (100, 1000, 10_000):
            # No two sets of a key in a row have the same value: an UPSERT of an identical row writes nothing.
            values = [random.randbytes(size) for _ in range(61)]
            sets = [(f'key {index % CACHE_KEYS}', values[index % 61], CACHE_TTL_SECONDS)
                    for index in range(CACHE_KEYS * 61)]
            for call in calls.values():
                call['clear']()
                for each in sets[:CACHE_KEYS]:
                    call['set'](*each)
            gets = compare('get', lambda: itertools.cycle([(f'key {index}',) for index in range(CACHE_KEYS)]))
            behind = compare('set', lambda: itertools.cycle(sets))
            through = compare('add', lambda: ((secrets.token_hex(8), value, CACHE_TTL_SECONDS)
                                              for value in itertools.cycle(values)))
            for name, samples, peers in (('get', gets, {'diskcache': 10, 'redis-py': None}),
                                         ('set written behind', behind, {'diskcache': None, 'redis-py': None}),
                                         ('add written through', through,
                                          {'diskcache': 2, UNSYNCED_DISKCACHE: None, 'redis-py': None})):
                rows += [compared(f'cache {name}, {size:,} B', 'calls/s', samples, 'per_s', peer, ratio_at_least=ratio)
                         for peer, ratio in peers.items()]
        counts = compare('incr', lambda: itertools.cycle([(f'counter {index}',) for index in range(CACHE_KEYS)]))
        return [*rows, compared('cache incr', 'calls/s', counts, 'per_s', 'diskcache'),
                compared('cache incr', 'calls/s', counts, 'per_s', 'redis-py')]


@figure
def broadcast(effort):
    """From one process to another, 500 bytes about fifty times a second, beside Redis pub/sub."""
    import gevent
    padding = 'x' * 450
    with scratch() as directory, contextlib.ExitStack() as running:
        todol = running.enter_context(stack(directory))
        listener = running.enter_context(child('cable-listener', directory, effort.latencies, core=LOAD_CORE))
        pin(SERVER_CORE)
        publishers = {'todol': functools.partial(todol.cable.broadcast, 'news')}
        listeners = {'todol': listener}
        if shutil.which('redis-server'):
            import redis
            port, _ = running.enter_context(redis_server(directory, SERVER_CORE))
            client = redis.Redis(port=port)
            publishers['Redis'] = lambda message: client.publish('news', json.dumps(message))
            listeners['Redis'] = running.enter_context(child('redis-listener', port, effort.latencies, core=LOAD_CORE))

        samples = {side: [] for side in publishers}
        for _ in range(1 + effort.rounds):
            for _ in range(effort.latencies):       # in turn, as a slow moment of the machine makes the p99
                for publish in publishers.values():
                    publish({'at': time.monotonic(), 'padding': padding})
                    gevent.sleep(0.01)
            for side, listener in listeners.items():
                samples[side].append(percentiles(json.loads(listener.stdout.readline())))
        samples = {side: rounds[1:] for side, rounds in samples.items()}        # the first one was to warm up
        gevent.sleep(1)
        quiet = idle_cpu_percent([each.pid for each in listeners.values()], effort.idle_seconds / 4)
        idle = {side: [{'percent': percent}] for side, percent in zip(listeners, quiet)}
    return [compared('broadcast between two processes, p50', 'ms', samples, 'p50_ms', 'Redis'),
            compared('– p99', 'ms', samples, 'p99_ms', 'Redis', ratio_at_most=1),
            compared('– idle CPU of the listener', '%', idle, 'percent', 'Redis', at_most=0.1)]


@figure
def writers(effort):
    """How long the event loop stands still while another process holds the lock; 64 greenlets that write at once."""
    import gevent
    pin(SERVER_CORE)
    insert, row = 'INSERT INTO outbox (job) VALUES (?)', ('x' * 100,)
    with scratch() as directory:
        todol = import_todol()
        ours = todol.Database('app', todol.app_db.migrations, path=directory + '/app.sqlite3')
        ours.open()
        plain = sqlite3.connect(directory + '/plain.sqlite3', timeout=5, isolation_level=None)
        for statement in ('PRAGMA journal_mode = WAL', 'PRAGMA synchronous = NORMAL',
                          'CREATE TABLE outbox (id INTEGER PRIMARY KEY AUTOINCREMENT, job TEXT NOT NULL)'):
            plain.execute(statement)

        def write_ours():
            ours.transact(ours.execute, insert, row)

        def write_plain():
            plain.execute('BEGIN IMMEDIATE')
            plain.execute(insert, row)
            plain.execute('COMMIT')

        def stall(holder, write):
            """The longest time between two turns of the event loop while one greenlet waits to write."""
            holder.stdin.write('hold\n')
            assert holder.stdout.readline() == 'held\n'
            writer = gevent.spawn(write)
            longest_s, seen = 0, time.perf_counter()
            while not writer.dead:
                gevent.sleep(0.0005)
                now = time.perf_counter()
                longest_s, seen = max(longest_s, now - seen), now
            assert holder.stdout.readline() == 'released\n'
            return {'ms': 1000 * longest_s}

        def rate(write, each=20):
            def work():
                for _ in range(each):
                    write()
                    gevent.sleep(0)
            started = time.perf_counter()
            gevent.joinall([gevent.spawn(work) for _ in range(64)], raise_error=True)
            return {'per_s': 64 * each / (time.perf_counter() - started)}

        with child('lock-holder', directory + '/app.sqlite3', core=LOAD_CORE) as holder, \
                child('lock-holder', directory + '/plain.sqlite3', core=LOAD_CORE) as plain_holder:
            stalls = alternate({'todol': lambda: stall(holder, write_ours),
                                'busy_timeout': lambda: stall(plain_holder, write_plain)}, effort.rounds)
        rates = alternate({'todol': lambda: rate(write_ours), 'a transaction each': lambda: rate(write_plain)},
                          effort.rounds * 3)
        ours.close()
        plain.close()
    return [compared('event loop stands still, lock held 300 ms', 'ms', stalls, 'ms', 'busy_timeout', at_most=5),
            compared('64 concurrent writers', 'writes/s', rates, 'per_s', 'a transaction each')]


@figure
def sockets(effort, count=1000):
    """Idle WebSockets, and one broadcast to all of them."""
    with scratch() as directory, Server('todol', directory) as server:
        pin(LOAD_CORE)
        cookie, = server.visitors(1)
        time.sleep(0.5)
        before_mb = resident_mb(server.pid)
        clients = open_sockets(server, cookie, count)
        kb_each = 1024 * (resident_mb(server.pid) - before_mb) / count
        idle_percent, = idle_cpu_percent([server.pid], max(6, effort.idle_seconds / 4))     # two heartbeats at least

        def measure():
            title = f'milk-{secrets.token_hex(4)}'
            before_s = cpu_s(server.pid)
            server.request('POST', '/todos', f'title={title}', cookie)
            for client in clients:
                client.read_until(title.encode())
            server.settle()
            return {'cpu_ms': 1000 * (cpu_s(server.pid) - before_s)}

        samples = alternate({'todol': measure}, effort.rounds + 2)      # a heartbeat falls into some
        for client in clients:
            client.close()
    once = {'todol': [{'kb_each': kb_each, 'percent': idle_percent}]}
    return [compared(f'{count:,} idle sockets, memory of each', 'kB', once, 'kb_each', at_most=40),
            compared('– CPU', '%', once, 'percent', at_most=1),
            compared(f'one POST and its broadcast to {count:,} sockets, CPU', 'ms', samples, 'cpu_ms', at_most=20)]


@figure
def idle(effort):
    """A process that has served and is left alone."""
    with scratch() as directory, Server('todol', directory) as server:
        server.visitors(1)
        time.sleep(2)
        before = written_bytes(server.pid)
        percent, = idle_cpu_percent([server.pid], effort.idle_seconds)
        once = {'todol': [{'bytes': written_bytes(server.pid) - before, 'percent': percent}]}
    return [compared(f'idle process, written in {effort.idle_seconds} s', 'B', once, 'bytes', at_most=0),
            compared('– CPU', '%', once, 'percent', at_most=0.2)]


# === Figures: many machines on PostgreSQL =============================================================================

class Node(Server):
    """todol on PostgreSQL; nodes, database and load share all cores."""

    def __init__(self, directory, url):
        super().__init__('todol', directory, core=None, DATABASE_URL=url, TODOL_ENV='production')
        self._url = url

    def settle(self):
        eventually(lambda: not queried(self._url, 'SELECT 1 FROM todol_production_job.jobs LIMIT 1'), self._process)


class Procrastinate(Huey):
    """Its worker, and its producer in another process; 100 jobs at once, done jobs deleted, as todol does."""
    script = 'peer_procrastinate.py'

    def __init__(self, directory, url):
        self._directory, self._place = directory, [url]

    def __enter__(self):
        assert self._run('schema', core=None).wait() == 0
        return super().__enter__()


@figure
def grow(effort):
    """Two processes against one, on SQLite. Two nodes on PostgreSQL: from a POST on one to a socket on the other, POSTs, and
    jobs beside procrastinate's."""
    need('wrk')
    processes = grow_processes(effort)
    with scratch() as directory, contextlib.ExitStack() as running:
        url = running.enter_context(postgres_server(directory))
        samples = grow_jobs(effort, directory, url)
        nodes = [running.enter_context(Node(directory, url)) for _ in range(2)]
        cookies = nodes[0].visitors()
        across = alternate({'todol': functools.partial(across_nodes, nodes, cookies[0], effort.latencies)}, effort.rounds)
        posts = alternate({'two nodes': functools.partial(load_both, nodes, cookies, effort.load_seconds), 'todol':
                           functools.partial(load, nodes[0], cookies, CREATE_LUA, 16, effort.load_seconds)}, effort.rounds)
    return [*processes,
            compared('PostgreSQL: POST on one node to a socket on another, p50', 'ms', across, 'p50_ms', at_most=10),
            compared('– p99', 'ms', across, 'p99_ms', at_most=20),
            compared('– no-op jobs, enqueued to done', 'jobs/s', samples, 'per_s', PROCRASTINATE, ratio_at_least=3),
            compared('– POST /todos of one node', 'requests/s', posts, 'per_s', 'two nodes')]


def grow_processes(effort):
    """Two processes against one, both cores free for them and for the load: its share of the cores is a row, too."""
    need('wrk')
    with scratch() as directory, contextlib.ExitStack() as running:
        sides = {}
        for side, processes in ('todol', '2'), (ALONE, '1'):
            server = running.enter_context(Server('todol', directory, core=None, WEB_CONCURRENCY=processes))
            sides[side] = server, server.visitors()

        def measure(requests_lua):
            def with_share(server, cookies):
                before_s, started = os.times().children_user + os.times().children_system, time.perf_counter()
                sample = load(server, cookies, requests_lua, 32, effort.load_seconds, core=None)
                used_s = os.times().children_user + os.times().children_system - before_s
                return {**sample, 'load_percent': 100 * used_s / (time.perf_counter() - started)}
            return alternate({side: functools.partial(with_share, *each) for side, each in sides.items()}, effort.rounds)
        pages, posts = measure(PAGE_LUA), measure(CREATE_LUA)
    return [compared('GET / from two processes', 'pages/s', pages, 'per_s', ALONE, ratio_at_least=1.6),
            compared('– its CPU, of all processes', 'µs', pages, 'cpu_us', ALONE),
            compared('– what the load takes of a core', '%', pages, 'load_percent', ALONE),
            compared('POST /todos to two processes', 'requests/s', posts, 'per_s', ALONE, ratio_at_least=1),
            compared('– what the load takes of a core', '%', posts, 'load_percent', ALONE)]


def grow_jobs(effort, directory, url):
    """The same jobs, on the same server, by turns."""
    with contextlib.ExitStack() as running:
        todol = running.enter_context(stack(directory, TODOL_JOB_WORKERS='100', DATABASE_URL=url))
        sides = {'todol': TodolJobs(todol), PROCRASTINATE: running.enter_context(Procrastinate(directory, url))}
        number = {'todol': effort.jobs // 4, PROCRASTINATE: effort.jobs // 20}
        return alternate({side: functools.partial(each.rate, 'noop', number[side]) for side, each in sides.items()},
                         effort.rounds)


def across_nodes(nodes, cookie, count):
    """From the POST on the second node to the stream at a socket of the first."""
    client, = open_sockets(nodes[0], cookie, 1)
    connection = http.client.HTTPConnection('127.0.0.1', nodes[1].port)
    connection.connect()
    connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    latencies = []
    for _ in range(count):
        title, sent = secrets.token_hex(8), time.perf_counter()
        connection.request('POST', '/todos', f'title={title}', {'Cookie': cookie, 'Content-Type': FORM})
        client.read_until(title.encode())
        latencies.append(time.perf_counter() - sent)
        connection.getresponse().read()
        time.sleep(0.005)
    connection.close()
    client.close()
    return percentiles(latencies)


def load_both(nodes, cookies, seconds):
    """load() of two nodes at once, each with its own half of the visitors."""
    with concurrent.futures.ThreadPoolExecutor() as threads:
        parts = threads.map(lambda each: load(nodes[each], cookies[each::2], CREATE_LUA, 8, seconds), range(2))
        return {'per_s': sum(part['per_s'] for part in parts)}


# === Growth: how the figures move as the work grows ===================================================================

@dataclasses.dataclass
class Curve:
    """A table of its own: a column for each size, a line for each quantity."""
    what: str
    sizes: list
    lines: dict             # quantity with its unit -> values

    @classmethod
    def measured(cls, what, sizes, measure):
        """measure(size) gives a dict of quantities."""
        points = []
        for size in sizes:
            progress(f'  {what}: {size:,}')
            points.append(measure(size))
        return cls(what, list(sizes), {name: [point[name] for point in points] for name in points[0]})


def growth(effort):
    """All curves."""
    top = 1 if effort is FULL else 10           # quick: without the last size
    sizes = [10**power for power in range(1, 7) if 10**power * top <= 10**6]
    return [Curve.measured('todos in the list', sizes[:3 + (top == 1)], functools.partial(app_growth, effort, 1)),
            Curve.measured('users with 20 todos each', sizes[:4 + (top == 1)], lambda users: app_growth(effort, users, 20)),
            Curve.measured('jobs waiting', sizes, job_growth),
            Curve.measured('entries in the cache file', sizes[1:], functools.partial(cache_growth, effort)),
            Curve.measured('sockets', [10, 100, 1000] + [5000] * (top == 1), socket_growth),
            Curve.measured('messages in the log', [10, 100, 1000, 10_000, 20_000], log_growth)]


def fill_users(directory, users, todos):
    """Migrated files in the directory with so many users, and the cookie of one of them."""
    todol = import_todol()
    names = [f'user{index:018d}' for index in range(users)]

    def fill():
        todol.app_db.executemany('INSERT INTO lists (user_id, active, completed, version) VALUES (?, ?, 0, ?)',
                                 ((name, todos, todos) for name in names))
        todol.app_db.executemany("INSERT INTO todos (user_id, title, version, created_at) VALUES (?, 'Buy milk ' || ?, 1, 0)",
                                 ((name, index) for index in range(todos) for name in names))

    with todol.open_stack({'TODOL_DATA': directory, 'TODOL_SECRET': SECRET}):
        todol.app_db.transact(fill)
        return f'{todol.keys.cookie}={todol.sign_session(names[users // 2])}'


def app_growth(effort, users, todos):
    """A page, a toggle and a create of one user among so many with so many todos."""
    with scratch() as directory:
        server = Server('todol', directory, TODOL_SECRET=SECRET)
        cookie = fill_users(server.data, users, todos)
        with server:
            middle = users * (todos // 2) + users // 2 + 1      # a todo of that user, in the middle of the list
            requests = {'page': (5, 'GET', '/', lambda index: None),
                        'toggle': (40, 'PATCH', f'/todos/{middle}', lambda index: f'completed={1 - index % 2}'),
                        'create': (40, 'POST', '/todos', lambda index: f'title=milk+{index}')}
            quantities = {}
            for name, (times, method, path, body) in requests.items():
                before_s, seconds = cpu_s(server.pid), []
                for index in range(times * effort.rounds):
                    started = time.perf_counter()
                    server.request(method, path, body(index), cookie, TURBO_STREAM if body(index) else 'text/html')
                    seconds.append(time.perf_counter() - started)
                server.settle()
                quantities[f'{name}, ms'] = percentiles(seconds)['p50_ms']
                cpu = f'{name}, CPU ms' + ' with its broadcast' * (name != 'page')
                quantities[cpu] = 1000 * (cpu_s(server.pid) - before_s) / len(seconds)
            return quantities


def job_growth(waiting, seconds=1.0):
    """How fast jobs are done while so many wait, and the time to enqueue one more."""
    import gevent
    with scratch() as directory, stack(directory, TODOL_JOB_WORKERS='100') as todol:
        pin(SERVER_CORE)
        work = TodolJobs(todol)
        todol.job_db.transact(todol.job_db.executemany, '''
            INSERT INTO jobs (uid, name, arguments, queue, run_at, due_at, enqueued_at)
            VALUES (?, 'noop', '{"total": 0}', 'default', 0, 0, 0)''', ((str(index),) for index in range(waiting)))
        todol.job_db.execute('PRAGMA wal_checkpoint(TRUNCATE)')
        started = time.perf_counter()
        for _ in range(50):
            todol.jobs.enqueue('noop', {'total': 0})
        enqueue_us = 1e6 * (time.perf_counter() - started) / 50
        started = time.perf_counter()
        while time.perf_counter() < started + seconds and work._done < waiting:
            gevent.sleep(0.002)
        done_per_s = work._done / (time.perf_counter() - started)
        todol.job_db.execute('DELETE FROM jobs WHERE worker IS NULL')       # closing need not wait for them
    return {'done/s': done_per_s, 'enqueue, µs': enqueue_us}


def cache_growth(effort, entries):
    """Reads of the file: the front is emptied by opening the cache anew, and each key is read once."""
    with scratch() as directory, stack(directory) as todol:
        pin(SERVER_CORE)
        todol.cache.limit_bytes = 2**40
        keys = [f'key {index}' for index in range(entries)]
        for first in range(0, entries, 10_000):
            todol.cache.set_many({key: key.encode() * 10 for key in keys[first:first + 10_000]})
            todol.cache._flush()
        random.shuffle(keys)
        reads = min(entries, 10_000)

        def measure():
            todol.cache.close()
            todol.cache.open()
            started = time.perf_counter()
            for key in keys[:reads]:
                assert todol.cache.get(key)
            return {'us': 1e6 * (time.perf_counter() - started) / reads}

        samples = alternate({'todol': measure}, effort.rounds)
        todol.cache_db.execute('PRAGMA wal_checkpoint(TRUNCATE)')       # of what was filled in
        started = time.perf_counter()
        for index in range(1000):
            todol.cache.incr(f'counter {index}')
        return {'get from the file, µs': median(samples, 'todol', 'us'), 'incr, µs': 1e3 * (time.perf_counter() - started)}


def socket_growth(count):
    """The figure above with other numbers of sockets."""
    kb_each, idle_percent, broadcast_ms = (row.todol for row in sockets(QUICK, count))
    return {'memory of each, kB': kb_each, 'idle CPU, %': idle_percent, 'POST and its broadcast, CPU ms': broadcast_ms}


def log_growth(messages):
    """A broadcast, and what a tab costs that comes back. One that missed too much gets a refusal, which is quick."""
    with scratch() as directory, stack(directory) as todol:
        pin(SERVER_CORE)
        position = None
        for index in range(messages):
            todol.cable.broadcast(f'stream {index % 100}', 'x' * 500)
            position = position or todol.cable.position()

        def mean_us(call, *arguments):
            started = time.perf_counter()
            for _ in range(200):
                with contextlib.suppress(todol.PositionLost):
                    call(*arguments)
            return 1e6 * (time.perf_counter() - started) / 200

        return {'broadcast, µs': mean_us(todol.cable.broadcast, 'stream 1', 'x' * 500),
                'replay to a tab that missed nothing, µs': mean_us(todol.cable.since, 'stream 1', todol.cable.position()),
                'replay to a tab that missed all, µs': mean_us(todol.cable.since, 'stream 2', position)}


# === Children: the other process of some figures ======================================================================

def collector(number):
    """A function that takes the time at which a message was sent; it prints so many latencies as a line of JSON."""
    latencies = []

    def arrived(sent_at):
        latencies.append(time.monotonic() - sent_at)
        if len(latencies) == int(number):
            print(json.dumps(latencies), flush=True)
            latencies.clear()
    return arrived


def listen_to_cable(directory, number):
    import gevent
    with stack(directory) as todol:
        arrived = collector(number)
        todol.cable.subscribe('news', lambda message: arrived(json.loads(message.payload)['at']))
        stopping = gevent.event.Event()
        gevent.signal_handler(signal.SIGTERM, stopping.set)
        print('ready', flush=True)
        stopping.wait()


def listen_to_redis(port, number):
    import redis
    with redis.Redis(port=int(port)).pubsub(ignore_subscribe_messages=True) as pubsub:
        arrived = collector(number)
        pubsub.subscribe('news')
        print('ready', flush=True)
        for message in pubsub.listen():
            arrived(json.loads(message['data'])['at'])


def hold_locks(path):
    """Hold the write lock of a file for 300 ms for each line of stdin."""
    database = sqlite3.connect(path, timeout=5, isolation_level=None)
    print('ready', flush=True)
    for _ in sys.stdin:
        database.execute('BEGIN IMMEDIATE')
        print('held', flush=True)
        time.sleep(0.3)
        database.execute('COMMIT')
        print('released', flush=True)


CHILDREN = {'cable-listener': listen_to_cable, 'redis-listener': listen_to_redis, 'lock-holder': hold_locks}


# === Report and command line ==========================================================================================

def markdown(rows):
    """The table of the figures; the peers of one figure side by side."""
    lines = ['| what | todol | peers | ratio | goal | reached |', '|---|---|---|---|---|---|']
    for (what, unit, todol), group in itertools.groupby(rows, lambda row: (row.what, row.unit, row.todol)):
        cells = [('' if row.peer is None else f'{number(row.peer)} ({row.peer_name})',
                  f'{row.todol / row.peer:.2f}' if row.peer else '',
                  row.goal, {None: '', True: 'yes', False: '**no**'}[row.reached]) for row in group]
        columns = [' · '.join(each or '–' for each in column) if any(column) else '' for column in zip(*cells)]
        lines.append(f'| {what} | {number(todol)} {unit} | {" | ".join(columns)} |')
    return '\n'.join(lines)


def curve_markdown(curve):
    """The table of one curve."""
    lines = [[curve.what, *(f'{size:,}' for size in curve.sizes)], ['---'] * (len(curve.sizes) + 1),
             *([name, *map(number, values)] for name, values in curve.lines.items())]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def machine():
    """What was measured, and where."""
    versions = subprocess.run([VENV / 'bin/pip', 'freeze', '--quiet'], capture_output=True, text=True).stdout.split()
    processor = re.search(r'model name\s*: (.*)', pathlib.Path('/proc/cpuinfo').read_text())
    return {'processor': processor[1] if processor else platform.machine(), 'cores': len(CORES), 'kernel': platform.release(),
            'python': platform.python_version(), 'sqlite': sqlite3.sqlite_version, 'load': os.getloadavg()[0],
            'peers': [each for each in versions if each.partition('==')[0].lower() in
                      {re.match(r'[\w-]+', name)[0] for name in [*PEER_PACKAGES, 'gevent', 'bottle', 'uvloop']}]}


def progress(text):
    print(text, file=sys.stderr, flush=True)


def install_peers():
    """Make the virtual environment, once; it is made again when the packages change."""
    pins = re.search(r'^# dependencies = (\[.*\])$', PROGRAM.read_text(), re.MULTILINE)[1]
    packages = PEER_PACKAGES + json.loads(pins)
    stamp = VENV / 'installed'
    if stamp.exists() and stamp.read_text() == '\n'.join(packages):
        return
    progress(f'installing the peers into {VENV}')
    subprocess.run([sys.executable, '-m', 'venv', '--clear', VENV], check=True)
    subprocess.run([VENV / 'bin/pip', 'install', '--quiet', '--quiet', '--disable-pip-version-check', *packages], check=True)
    stamp.write_text('\n'.join(packages))


def measure_here(name, effort):
    """Print what one figure gives as JSON; run in a process of its own, so that no figure meets the leavings of another."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    try:
        measured = growth(effort) if name == 'growth' else FIGURES[name](effort)
        print(json.dumps({'measured': [dataclasses.asdict(each) for each in measured]}))
    except Missing as missing:
        print(json.dumps({'missing': str(missing)}))


def measure_all(names, options):
    """The rows, the curves, what was left out and why, and whether a figure failed."""
    rows, curves, left_out, failed = [], [], [], False
    if not shutil.which('redis-server'):
        left_out.append('Redis: redis-server is missing (apt-get install redis-server)')
    for index, name in enumerate(names):
        progress(f'[{index + 1}/{len(names)}] {name}')
        command = [VENV / 'bin/python', __file__, '--inside', name, *['--quick'] * options.quick]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        answer = {'missing': 'it failed, see above'} if done.returncode else json.loads(done.stdout.splitlines()[-1])
        failed |= bool(done.returncode)
        if 'missing' in answer:
            left_out.append(f'{name}: {answer["missing"]}')
        elif name == 'growth':
            curves = [Curve(**each) for each in answer['measured']]
        else:
            rows += [Row(**each) for each in answer['measured']]
    return rows, curves, left_out, failed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--quick', action='store_true', help='fewer and shorter rounds')
    parser.add_argument('--only', metavar='NAME', action='append', choices=[*FIGURES, 'growth'],
                        help=f'a figure, may be given again: {", ".join(FIGURES)}, growth')
    parser.add_argument('--json', metavar='FILE', help='write the figures with all samples there')
    parser.add_argument('--inside', help=argparse.SUPPRESS)
    parser.add_argument('--child', nargs='+', help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return CHILDREN[options.child[0]](*options.child[1:])
    if options.inside:
        return measure_here(options.inside, QUICK if options.quick else FULL)
    install_peers()
    names = options.only or [name for name in FIGURES if name != 'grow']
    rows, curves, left_out, failed = measure_all(names, options)
    where = machine()
    print('\n\n'.join(([markdown(rows)] if rows else []) + [curve_markdown(curve) for curve in curves]))
    print(f'\n{where["cores"]} cores of {where["processor"]}, kernel {where["kernel"]}, Python {where["python"]}, '
          f'SQLite {where["sqlite"]}; {", ".join(where["peers"])}.')
    for each in left_out:
        print(f'Left out: {each}.')
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps({
            'machine': where, 'rows': [dataclasses.asdict(row) for row in rows],
            'curves': [dataclasses.asdict(curve) for curve in curves], 'left_out': left_out}, indent=1))
    return int(failed)


if __name__ == '__main__':
    sys.exit(main())
