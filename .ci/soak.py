#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["bottle>=0.13", "gevent>=23.9", "gevent-websocket>=0.10.1", "websocket-client>=1.6"]
# ///
"""Use todol as thousands of people would while everything around it breaks, and see that nothing is lost.

    python .ci/soak.py --minutes 60             three processes on one data directory, 2,000 people
    python .ci/soak.py --minutes 2 --seed 7     the same faults in the same order as another run with that seed
    python .ci/soak.py --svg curves.svg         the curves as a picture too

People add, tick, rename, remove and read todos, enqueue jobs, count in the cache, and keep tabs open over the cable.
Meanwhile processes are killed, stopped, suspended and started, clocks jump, bells are deleted, backups are made and
restored elsewhere, and, as root, the disk fills up (a small tmpfs; without root that fault is left out). Each minute,
and at the end, everybody waits while all that was acknowledged is compared with what is there: in the files, on the
pages, and in the open tabs. What a request without an answer did is not known, so its todo is not used again.

Exit status 0: nothing was missing, doubled or stale. Everything stays on 127.0.0.1 and in a directory that is removed.
"""
import sys

if sys.argv[1:2] != ['--run']:
    from gevent import monkey
    monkey.patch_all()

import argparse
import collections
import contextlib
import html
import http.client
import importlib.util
import json
import mmap
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import socket
import sqlite3
import statistics
import struct
import subprocess
import tempfile
import time
import urllib.parse

import gevent
import gevent.event
import gevent.lock

HERE = pathlib.Path(__file__).resolve()
PROGRAM = HERE.parent.parent / 'todol.py'
ANSWER_SECONDS = 20         # a request that takes longer has no answer
CATCH_UP_SECONDS = 30       # after the faults everything is in step again by then


# === The server: todol, with a clock that can be put and jobs that leave a trace ======================================

def run_program(arguments):
    """Run the program of SOAK_PROGRAM with these arguments; its clock is off by the seconds in the file SOAK_CLOCK."""
    program = os.environ['SOAK_PROGRAM']
    spec = importlib.util.spec_from_file_location('todol', program)
    todol = sys.modules['todol'] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(todol)
    with open(os.environ['SOAK_CLOCK'], 'rb') as file:
        offset = mmap.mmap(file.fileno(), 8, access=mmap.ACCESS_READ)
    todol.now = lambda: time.time() + struct.unpack('d', offset[:8])[0]
    process = f'{os.getpid()}'

    todol.app_db.migrations += [
        ('900 create traces', '''CREATE TABLE traces (
            id INTEGER PRIMARY KEY, number INTEGER, thread TEXT, process TEXT, started REAL, ended REAL)'''),
        ('901 create asked', 'CREATE TABLE asked (place INTEGER PRIMARY KEY, number INTEGER UNIQUE, thread TEXT)'),
    ]

    @todol.jobs.task(attempts=100, retry_seconds=0.2)
    def trace(number, thread):
        """Leave a row of when it ran, by the clock that all processes share."""
        (id,), = todol.app_db.execute('INSERT INTO traces (number, thread, process, started) VALUES (?, ?, ?, ?) '
                                      'RETURNING id', (number, thread, process, time.monotonic()))
        gevent.sleep(random.expovariate(1 / 0.02))
        todol.app_db.execute('UPDATE traces SET ended = ? WHERE id = ?', (time.monotonic(), id))

    @todol.app_db.transaction
    def ask(number, thread):
        if not todol.app_db.execute('SELECT 1 FROM asked WHERE number = ?', (number,)):
            todol.app_db.execute('INSERT INTO asked (number, thread) VALUES (?, ?)', (number, thread))
            todol.jobs.enqueue(trace, {'number': number, 'thread': thread}, order_key=thread)

    @todol.app.post('/soak/job')
    def job():
        form = todol.fields()
        ask(int(form['number']), form['thread'])
        return 'ok'

    @todol.app.post('/soak/count')
    def count():
        return str(todol.cache.incr('soak count'))

    @todol.app.get('/soak/state')
    def state():
        waiting = todol.job_db.execute("SELECT count(*) FROM jobs WHERE name = 'trace'")[0][0]
        return {'waiting': waiting, 'count': todol.cache.get('soak count') or 0, 'outbox':
                todol.app_db.execute('SELECT count(*) FROM outbox')[0][0],
                'failed': [repr(job) for job in todol.jobs.failed()][:3]}

    sys.exit(todol.main(arguments))


# === People: what they did, and what they must see ====================================================================

class Unanswered(Exception):
    """A request whose outcome nobody knows."""


class World:
    """What all share: the processes, the gate that stops everybody for a look, and the counts."""

    def __init__(self, options, directory):
        self.options = options
        self.random = random.Random(options.seed)
        self.directory = directory
        self.data = directory / 'data'
        self.processes = []
        self.count = collections.Counter()
        self.wrong = []                     # sentences
        self.latencies = []                 # of POST to answer, ms, since the last look
        self.samples = []                   # a dict a minute
        self.open = gevent.event.Event()    # people and faults go on
        self.open.set()
        self.busy = 0                       # people in the middle of something
        self.over = False
        self.asked = {}                     # number of a job -> thread; acknowledged
        self.counted = [0, 0]               # acknowledged and unanswered increments
        self.clock = directory / 'clock'
        self.put_clock(0)

    def put_clock(self, offset):
        self.clock.touch()
        with open(self.clock, 'r+b') as file:
            file.write(struct.pack('d', offset))

    def environ(self, data):
        """The environment of a program on a data directory."""
        environ = {name: value for name, value in os.environ.items() if not name.startswith('TODOL_')}
        return {**environ, 'TODOL_DATA': str(data), 'TODOL_ENV': 'production', 'TODOL_WRITES_PER_MINUTE': '1000000',
                'SOAK_CLOCK': str(self.clock), 'SOAK_PROGRAM': str(self.options.program)}

    def say(self, sentence):
        if len(self.wrong) < 50:
            print('WRONG:', sentence, flush=True)
        self.wrong.append(sentence)

    def any_port(self):
        return self.random.choice(self.processes).port


class Process:
    """One server process, on a port of its own."""

    def __init__(self, world, number):
        self.world, self.number, self.popen = world, number, None
        with socket.socket() as probe:
            probe.bind(('127.0.0.1', 0))
            self.port = probe.getsockname()[1]
        self.log = open(world.directory / f'server-{number}.log', 'ab')

    def start(self):
        environ = {**self.world.environ(self.world.data), 'PORT': str(self.port)}
        self.popen = subprocess.Popen([sys.executable, str(HERE), '--run', 'serve'], env=environ,
                                      cwd=self.world.directory, stdout=self.log, stderr=self.log)
        self.wait_until_up()

    def wait_until_up(self):
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self.popen.poll() is None:
            with contextlib.suppress(OSError, http.client.HTTPException):
                connection = http.client.HTTPConnection('127.0.0.1', self.port, timeout=5)
                connection.request('GET', '/up')
                if connection.getresponse().status == 200:
                    return
            gevent.sleep(0.05)
        self.world.say(f'process {self.number} is not up after 60 s (exit status {self.popen.poll()})')

    def end(self, number):
        """End it by a signal, and give its exit status."""
        self.popen.send_signal(number)
        try:
            return self.popen.wait(timeout=15)
        except subprocess.TimeoutExpired:
            self.world.say(f'process {self.number} does not end within 15 s of signal {number}')
            self.popen.kill()
            return self.popen.wait()

    def resources(self):
        """Resident MB, open files, and threads."""
        proc = pathlib.Path(f'/proc/{self.popen.pid}')
        status = (proc / 'status').read_text()
        return (int(re.search(r'VmRSS:\s+(\d+)', status)[1]) / 1024, len(os.listdir(proc / 'fd')),
                int(re.search(r'Threads:\s+(\d+)', status)[1]))


class Todo:
    """What somebody knows of a todo of theirs."""

    def __init__(self, title, id=None):
        self.title, self.id, self.completed, self.sure = title, id, False, True


class Person:
    """Somebody with a list, and perhaps an open tab."""

    def __init__(self, world, number):
        self.world, self.number = world, number
        self.cookie = None
        self.todos = {}             # title -> Todo; its title never comes again
        self.made = 0
        self.tab = None
        self.lock = gevent.lock.BoundedSemaphore()

    def ask(self, method, path, fields=None, accept='application/json', port=None):
        """The answer to a request: status and text. Raises Unanswered."""
        headers = {'Accept': accept, 'Content-Type': 'application/x-www-form-urlencoded'}
        if self.cookie:
            headers['Cookie'] = self.cookie
        body = urllib.parse.urlencode(fields) if fields is not None else None
        connection = http.client.HTTPConnection('127.0.0.1', port or self.world.any_port(), timeout=ANSWER_SECONDS)
        started = time.monotonic()
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            text = answer.read().decode()
        except (OSError, http.client.HTTPException) as error:
            self.world.count['unanswered'] += 1
            raise Unanswered(repr(error)) from None
        finally:
            connection.close()
        self.world.count[f'{method} {answer.status // 100}xx'] += 1
        if method != 'GET':
            self.world.latencies.append(1000 * (time.monotonic() - started))
        for name, value in answer.getheaders():
            if name == 'Set-Cookie':
                self.cookie = value.partition(';')[0]
        if answer.status in (502, 503, 504):
            raise Unanswered(f'{answer.status} {text[:100]}')
        if answer.status >= 500:
            self.world.say(f'{method} {path} gets {answer.status}: {text[:200]}')
            raise Unanswered(text[:100])
        return answer.status, text

    def act(self):
        """Do one thing of those that people do."""
        sure = [todo for todo in self.todos.values() if todo.sure and todo.id]
        acts = [self.add] * 6 + [self.enqueue, self.count_up, self.read]
        if sure:
            acts += [self.tick] * 4 + [self.rename, self.remove] + [self.clear] * (len(sure) > 20)
        tabs = sum(1 for person in self.world.people if person.tab)
        if self.tab:
            acts += [self.close_tab]
        elif tabs < self.world.options.tabs:
            acts += [self.open_tab] * 4
        act = self.world.random.choice(acts)
        try:
            if self.cookie is None:
                self.read()
            else:
                act(self.world.random.choice(sure)) if act in (self.tick, self.rename, self.remove) else act()
        except Unanswered:
            pass

    def add(self):
        self.made += 1
        todo = self.todos[f'p{self.number} t{self.made}'] = Todo(f'p{self.number} t{self.made}')
        todo.sure = False
        key = f'{int(time.time() * 1000)}-{self.number}-{self.made}'
        for attempt in range(8):            # a key makes that harmless
            with contextlib.suppress(Unanswered):
                status, text = self.ask('POST', '/todos', {'title': todo.title, 'key': key})
                if status == 201:
                    todo.id, todo.sure = json.loads(text)['id'], True
                return
            gevent.sleep(0.2 * 2 ** attempt)

    def change(self, todo, method, fields):
        todo.sure = False
        status, text = self.ask('POST', f'/todos/{todo.id}', {'_method': method, **fields})
        if status == 200:
            todo.sure = True
        return status == 200

    def tick(self, todo):
        if self.change(todo, 'PATCH', {'completed': int(not todo.completed)}):
            todo.completed = not todo.completed

    def rename(self, todo):
        self.made += 1
        title = f'p{self.number} t{self.made}'
        self.todos[title] = todo            # either may be what it is called, until it is known
        if self.change(todo, 'PATCH', {'title': title}):
            del self.todos[todo.title]
            todo.title = title

    def remove(self, todo):
        if self.change(todo, 'DELETE', {}):
            del self.todos[todo.title]

    def clear(self):
        # Of one whose last change was never answered nobody knows: it may stay, or go.
        ticked = [todo for todo in self.todos.values() if todo.completed and todo.sure]
        for todo in ticked:
            todo.sure = False
        status, text = self.ask('POST', '/todos/completed', {'_method': 'DELETE'})
        if status == 200:
            for todo in ticked:
                self.todos.pop(todo.title, None)

    def read(self):
        self.ask('GET', '/', accept='text/html')

    def enqueue(self):
        number = self.number * 1_000_000 + self.made
        self.made += 1
        thread = f'thread {self.world.random.randrange(40)}'
        for attempt in range(8):
            with contextlib.suppress(Unanswered):
                self.ask('POST', '/soak/job', {'number': number, 'thread': thread})
                self.world.asked[number] = thread
                return
            gevent.sleep(0.2 * 2 ** attempt)

    def count_up(self):
        self.world.counted[1] += 1
        status, number = self.ask('POST', '/soak/count', {})
        if number != '1':           # else it was the first, or a miss because the file was in trouble
            self.world.counted[1] -= 1
            self.world.counted[0] += 1

    def open_tab(self):
        self.tab = Tab(self)

    def close_tab(self):
        self.tab.close()
        self.tab = None

    def look(self):
        """Compare the list with what was acknowledged, and the tab with the list."""
        if self.cookie is None:
            return
        deadline = time.monotonic() + CATCH_UP_SECONDS
        try:
            todos = json.loads(self.ask('GET', '/')[1])['todos']
        except Unanswered as error:
            return self.world.say(f'person {self.number} gets no page: {error}')
        titles = collections.Counter(todo['title'] for todo in todos)
        for title, times in titles.items():
            if times > 1:
                self.world.say(f'{title!r} is there {times} times')
            if title not in self.todos:
                self.world.say(f'{title!r} is on the list of person {self.number}, who has removed it or never made it')
        there = {todo['title']: todo for todo in todos}
        for todo in list(self.todos.values()):
            self.world.count['todos compared'] += todo.sure
            if todo.sure and todo.title not in there:
                self.world.say(f'{todo.title!r} was acknowledged and is missing')
            elif todo.sure and there[todo.title]['completed'] != todo.completed:
                self.world.say(f'{todo.title!r} is not as it was acknowledged: completed is not {todo.completed}')
            if not todo.sure and todo.title in there and not todo.id:       # now it is known
                todo.id = there[todo.title]['id']
        if self.tab:
            want = {todo['id']: (todo['title'], todo['completed']) for todo in todos}
            while self.tab.shown() != want and time.monotonic() < deadline:
                self.tab.changed.wait(1)
                self.tab.changed.clear()
            self.world.count['tabs compared'] += 1
            if self.tab.shown() != want:
                differ = {id: (want.get(id), self.tab.shown().get(id)) for id in want.keys() | self.tab.shown().keys()
                          if want.get(id) != self.tab.shown().get(id)}
                self.world.say(f'the tab of person {self.number} is stale: {differ} (state: {self.tab.state})')


class Tab:
    """A tab as the live script keeps it: rows by id, a position for each stream, and a socket that comes back."""
    ROW = re.compile(r'<li class="([^"]*)" id="todo_([1-9]\d*)" data-version="(\d+)"[^>]*>\s*<form.*?'
                     r'<label[^>]*>(.*?)</label>', re.S)
    GONE = re.compile(r'<turbo-stream action="remove" target="todo_(\d+)"')
    SOURCE = re.compile(r'<turbo-cable-stream-source channel="([^"]*)" signed-stream-name="([^"]*)" '
                        r'data-since="([^"]*)"')

    def __init__(self, person):
        self.person, self.world = person, person.world
        self.rows, self.gone = {}, set()        # id -> (version, title, completed); ids that were removed
        self.since = None
        self.state = 'new'
        self.changed = gevent.event.Event()
        self.socket = None
        self.closed = False
        self.greenlet = gevent.spawn(self.run)

    def shown(self):
        return {id: (title, completed) for id, (_, title, completed) in self.rows.items()}

    def close(self):
        self.closed = True
        if self.socket:
            with contextlib.suppress(Exception):
                self.socket.close(timeout=1)
        self.greenlet.kill()

    def run(self):
        import websocket
        while not self.closed:
            try:
                if self.since is None:
                    self.load()
                self.listen(websocket)
            except (Unanswered, OSError, websocket.WebSocketException) as error:
                self.state = f'cut: {error!r}'[:100]
                self.world.count['cuts of tabs'] += 1
            gevent.sleep(self.world.random.uniform(0.1, 1))

    def load(self):
        """Show the page as it is now."""
        _, page = self.person.ask('GET', '/', accept='text/html')
        source = self.SOURCE.search(page)
        self.channel, self.name, self.since = source[1], html.unescape(source[2]), source[3]
        self.rows, self.gone = {}, set()
        self.show(page)

    def show(self, text):
        for kind, id, version, title in self.ROW.findall(text):
            id, version = int(id), int(version)
            if id not in self.gone and version >= self.rows.get(id, (-1,))[0]:
                self.rows[id] = version, html.unescape(title), 'completed' in kind
        for id in self.GONE.findall(text):
            self.gone.add(int(id))
            self.rows.pop(int(id), None)
        self.changed.set()

    def listen(self, websocket):
        port = self.world.any_port()
        self.socket = websocket.create_connection(
            f'ws://127.0.0.1:{port}/cable', timeout=10, cookie=self.person.cookie, origin=f'http://127.0.0.1:{port}',
            subprotocols=['actioncable-v1-ext-json', 'actioncable-unsupported'])
        identifier = json.dumps({'channel': self.channel, 'signed_stream_name': self.name, 'since': self.since})
        self.socket.send(json.dumps({'command': 'subscribe', 'identifier': identifier}))
        last = 0
        while not self.closed:
            text = self.socket.recv()
            if not text:
                raise OSError('closed')
            message = json.loads(text)
            if message.get('type') == 'reject_subscription':
                self.world.say(f'the tab of person {self.person.number} is rejected')
            self.state = message.get('type', 'message')
            if 'message' in message and 'type' not in message:
                self.world.count['messages'] += 1
                if message['offset'] <= last:
                    self.world.say(f'a message at {message["offset"]} comes after one at {last}')
                last = message['offset']
                self.since = f'{message["epoch"]}:{last}'
                if 'action="refresh"' in message['message']:
                    self.world.count['refreshes'] += 1
                    self.since = None       # if the page can't be had now, it is asked for again
                    self.load()
                self.show(message['message'])


def live(world, people):
    """One of those who are busy: picks somebody, does something, pauses."""
    while not world.over:
        world.open.wait()
        person = world.random.choice(people)
        if person.lock.acquire(blocking=False):
            world.busy += 1
            try:
                person.act()
            finally:
                world.busy -= 1
                person.lock.release()
        gevent.sleep(world.random.expovariate(1 / world.options.pause))


# === Faults: one at a time, every few seconds =========================================================================

def killed(world):
    process = world.random.choice(world.processes)
    process.end(signal.SIGKILL)
    gevent.sleep(world.random.uniform(0, 3))
    process.start()


def stopped(world):
    process = world.random.choice(world.processes)
    status = process.end(world.random.choice((signal.SIGTERM, signal.SIGINT)))
    if status:
        world.say(f'a stop ends with status {status}')
    process.start()


def all_killed(world):
    for process in world.processes:
        process.popen.kill()
    for process in world.processes:
        process.popen.wait()
    for process in world.processes:
        process.start()


def suspended(world):
    """For longer than a lease, now and then."""
    process = world.random.choice(world.processes)
    process.popen.send_signal(signal.SIGSTOP)
    gevent.sleep(world.random.choice((1, 4, 18)))
    process.popen.send_signal(signal.SIGCONT)


def clock_jumps(world):
    world.put_clock(world.random.choice((-86400, -3600, 60, 3600, 86400)))
    gevent.sleep(world.random.uniform(0, 5))
    world.put_clock(0)


def bells_deleted(world):
    for path in world.data.glob('*.bell.*'):
        path.unlink(missing_ok=True)


def backup_restored(world):
    """A backup beside the running processes holds all that was acknowledged before it began."""
    before = {todo.title for person in world.people for todo in list(person.todos.values()) if todo.sure and todo.id}
    copy, second = world.directory / 'copy.tar.gz', world.directory / 'second'
    for data, command in ((world.data, ['backup', str(copy)]), (second, ['restore', str(copy)])):
        step = subprocess.run([sys.executable, str(HERE), '--run', *command], env=world.environ(data),
                              cwd=world.directory, capture_output=True, text=True)
        if step.returncode:
            return world.say(f'{command} ends with {step.returncode}: {step.stderr[-300:]}')
    with contextlib.closing(sqlite3.connect(second / 'production.sqlite3')) as database:
        kept = {title for title, in database.execute('SELECT title FROM todos')}
        state, = database.execute('PRAGMA integrity_check').fetchone()
    now = {todo.title for person in world.people for todo in list(person.todos.values()) if todo.sure}
    missing = (before & now) - kept         # not those that were renamed or removed meanwhile
    if missing or state != 'ok':
        world.say(f'a restored backup lacks {len(missing)} of {len(before)} todos ({sorted(missing)[:3]}); {state}')
    shutil.rmtree(second)
    copy.unlink()


def disk_full(world):
    filler = world.data / 'filler'
    try:
        with open(filler, 'wb', buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(65536)):
                pass
        gevent.sleep(world.random.uniform(0.5, 4))
    finally:
        filler.unlink()


FAULTS = {killed: 5, stopped: 3, all_killed: 1, suspended: 2, clock_jumps: 3, bells_deleted: 1, backup_restored: 2,
          disk_full: 2}


def break_things(world):
    faults = [fault for fault, weight in FAULTS.items() for _ in range(weight)
              if fault is not disk_full or world.options.mounted]
    while not world.over:
        gevent.sleep(world.random.expovariate(1 / world.options.calm))
        world.open.wait()
        world.busy += 1
        fault = world.random.choice(faults)
        try:
            if world.open.is_set():
                fault(world)
                world.count[f'fault: {fault.__name__}'] += 1
        except Exception as error:
            world.say(f'{fault.__name__}: {error!r}')
        finally:
            world.busy -= 1


# === Looks: each minute, all that was acknowledged beside what is there ===============================================

def look(world):
    """Hold everybody, compare, and note a sample."""
    world.open.clear()
    while world.busy:
        gevent.sleep(0.05)
    state, deadline = {}, time.monotonic() + CATCH_UP_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(Unanswered):
            state = json.loads(world.people[0].ask('GET', '/soak/state')[1])
            if not state['waiting'] and not state['outbox']:
                break
        gevent.sleep(0.1)
    else:
        world.say(f'jobs still wait after {CATCH_UP_SECONDS} s: {state}')
    if state.get('failed'):
        world.say(f'jobs have failed: {state["failed"]}')
    acknowledged, unanswered = world.counted
    if not acknowledged <= state.get('count', 0) <= acknowledged + unanswered:
        world.say(f'the counter is at {state.get("count")}: {acknowledged} acknowledged, {unanswered} unanswered')
    look_at_jobs(world)
    looks = [gevent.spawn(person.look) for person in world.people]
    gevent.joinall(looks)
    note(world)
    world.open.set()


def look_at_jobs(world):
    """Every acknowledged job ran, in the order of its thread, and never twice at once."""
    with contextlib.closing(sqlite3.connect(world.data / 'production.sqlite3', timeout=10)) as database:
        asked = dict(database.execute('SELECT number, thread FROM asked ORDER BY place'))
        traces = database.execute('SELECT number, thread, process, started, ended FROM traces '
                                  'ORDER BY started').fetchall()
    done = {number for number, _, _, _, ended in traces if ended}
    for number in world.asked:
        if number not in asked:
            world.say(f'job {number} was acknowledged, and its transaction is missing')
        elif number not in done:
            world.say(f'job {number} was acknowledged and never ran to its end')
    alive = {str(process.popen.pid) for process in world.processes}
    running = {}
    for number, thread, process, started, ended in traces:
        _, other, until = running.get(thread, (None, None, None))
        if other is not None and until is None and other in alive and other != process:
            world.say(f'job {number} of {thread} starts while another of it runs in {other}')
        if until is not None and started < until:
            world.say(f'job {number} of {thread} starts {until - started:.3f} s before the end of the one before it')
        running[thread] = number, process, ended
    begun = dict.fromkeys(number for number, *_ in traces)
    for thread in sorted(set(asked.values())):
        wanted = [number for number, its in asked.items() if its == thread]
        if [number for number in begun if asked.get(number) == thread] != wanted:
            world.say(f'the jobs of {thread} did not begin in the order of their commits')
    world.count['jobs compared'] = len(world.asked)
    world.count['jobs run again'] = len(traces) - len({number for number, *_ in traces})


def note(world):
    wal = sum(path.stat().st_size for path in world.data.glob('*-wal')) / 2**20
    each = [process.resources() for process in world.processes]
    sample = {'minute': (time.monotonic() - world.started_at) / 60, 'MB': max(mb for mb, _, _ in each),
              'files': max(files for _, files, _ in each), 'threads': max(threads for _, _, threads in each),
              'tabs': sum(1 for person in world.people if person.tab), 'WAL MB': wal,
              'p50 ms': statistics.median(world.latencies or [0]),
              'p99 ms': sorted(world.latencies or [0])[int(len(world.latencies) * 0.99) - 1],
              'writes/s': len(world.latencies) / max(1, time.monotonic() - world.noted_at), 'wrong': len(world.wrong)}
    world.samples.append(sample)
    world.latencies.clear()
    world.noted_at = time.monotonic()
    print('  '.join(f'{name} {value:.1f}' for name, value in sample.items()), flush=True)


# === Curves ===========================================================================================================

def curve(values, width=60):
    """Numbers as a line of blocks, from 0 to their greatest."""
    blocks, top = ' ▁▂▃▄▅▆▇█', max(values) or 1
    step = max(1, -(-len(values) // width))
    return ''.join(blocks[round(8 * max(values[at:at + step]) / top)] for at in range(0, len(values), step))


def print_curves(samples):
    for name in samples[0]:
        if name != 'minute':
            values = [sample[name] for sample in samples]
            print(f'{name:>9} {min(values):8.1f} to {max(values):8.1f}  {curve(values)}')


def write_svg(samples, path):
    """The curves as a picture: one strip for each, time from left to right."""
    names = [name for name in samples[0] if name != 'minute']
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 {90 * len(names)}" font-family="sans-serif" '
             f'font-size="12">']
    end = samples[-1]['minute'] or 1
    for row, name in enumerate(names):
        top = max(sample[name] for sample in samples) or 1
        points = ' '.join(f'{100 + 600 * sample["minute"] / end:.1f},{90 * row + 75 - 60 * sample[name] / top:.1f}'
                          for sample in samples)
        parts.append(f'<text x="10" y="{90 * row + 45}">{name}</text>'
                     f'<text x="10" y="{90 * row + 62}">max {top:.1f}</text>'
                     f'<path d="M100 {90 * row + 75}h600" stroke="#ccc"/>'
                     f'<polyline points="{points}" fill="none" stroke="#c2410c" stroke-width="1.5"/>')
    path.write_text('\n'.join([*parts, '</svg>\n']))


# === The run ==========================================================================================================

def soak(options, directory):
    world = World(options, directory)
    world.people = [Person(world, number) for number in range(options.people)]
    world.processes = [Process(world, number) for number in range(options.processes)]
    world.started_at = world.noted_at = time.monotonic()
    try:
        for starting in [gevent.spawn(process.start) for process in world.processes]:
            starting.join()
        busy = [gevent.spawn(live, world, world.people) for _ in range(options.busy)]
        breaking = gevent.spawn(break_things, world)
        end = world.started_at + 60 * options.minutes
        while time.monotonic() < end:
            gevent.sleep(min(60, max(1, end - time.monotonic())))
            look(world)
        world.over = True
        gevent.joinall([*busy, breaking], timeout=60)
        for person in world.people:
            if person.tab:
                person.close_tab()
        finish(world)
    finally:
        for process in world.processes:
            if process.popen and process.popen.poll() is None:
                process.popen.send_signal(signal.SIGCONT)
                process.popen.kill()
                process.popen.wait()
    print()
    print_curves(world.samples)
    if options.svg:
        write_svg(world.samples, options.svg)
    print('\n' + '\n'.join(f'{times:>9} {name}' for name, times in sorted(world.count.items())))
    print(f'\n{len(world.wrong)} wrong' + ''.join(f'\n  {sentence}' for sentence in world.wrong[:50]))
    return 1 if world.wrong else 0


def finish(world):
    """A stop of all leaves whole files, and nothing else."""
    for process in world.processes:
        status = process.end(signal.SIGTERM)
        if status:
            world.say(f'the last stop ends with status {status}')
    left = [path.name for path in world.data.iterdir() if '.process.' in path.name or '.bell.' in path.name]
    if left:
        world.say(f'files of processes are left: {left}')
    for path in world.data.glob('*.sqlite3'):
        with contextlib.closing(sqlite3.connect(path)) as database:
            if database.execute('PRAGMA integrity_check').fetchone() != ('ok',):
                world.say(f'{path.name} is damaged')
    damaged = [path.name for path in world.data.glob('*.damaged*')]
    if damaged:
        world.say(f'set aside as damaged: {damaged}')


@contextlib.contextmanager
def workplace(options):
    """A directory with a data directory on a small file system of its own, where that can be had."""
    directory = pathlib.Path(tempfile.mkdtemp(prefix='soak-'))
    data = directory / 'data'
    data.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', f'size={options.disk}m', 'tmpfs', str(data)]
    options.mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
    if not options.mounted:
        print('no small file system could be mounted: the disk never fills up', file=sys.stderr)
    try:
        yield directory
    finally:
        if options.mounted:
            subprocess.run(['umount', '-l', str(data)], check=False)
        if options.keep:
            print(f'logs: {directory}', file=sys.stderr)
        else:
            shutil.rmtree(directory, ignore_errors=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    add = parser.add_argument
    add('--minutes', type=float, default=60)
    add('--processes', type=int, default=3)
    add('--people', type=int, default=2000)
    add('--tabs', type=int, default=200, help='how many of them have one open, at most')
    add('--busy', type=int, default=40, help='how many of them do something at a time')
    add('--pause', type=float, default=0.5, help='of these between two things, seconds, on average')
    add('--calm', type=float, default=6, help='between two faults, seconds, on average')
    add('--disk', type=int, default=256, help='size of the small file system, MB')
    add('--seed', type=int, default=1)
    add('--svg', type=pathlib.Path)
    add('--program', type=pathlib.Path, default=PROGRAM)
    add('--keep', action='store_true', help="keep the servers' logs")
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    with workplace(options) as directory:
        return soak(options, directory)


if __name__ == '__main__':
    if sys.argv[1:2] == ['--run']:
        run_program(sys.argv[2:])
    sys.exit(main())
