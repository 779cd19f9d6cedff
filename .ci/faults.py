#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["bottle>=0.13", "gevent>=23.9", "gevent-websocket>=0.10.1"]
# ///
"""Let something go wrong between any two steps of todol's stack, and see what holds.

    python .ci/faults.py errors     raise errors and set the clock, in one process that goes on; a minute
    python .ci/faults.py kills      kill -9, and see what the next process finds; a minute

The steps are found, not listed: every call of SQLite, of the files and bells, of the shared stamps, each turn and each
wait of a loop. Before and after each of them something goes wrong, once, while every kind of change is under way; then
everything acknowledged must be there, and an ordinary change must work. Prints what was tried and what broke, as JSON.
"""
import collections
import contextlib
import errno
import functools
import itertools
import json
import logging
import os
import pathlib
import re
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
import traceback
import types

import gevent

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import todol


class Steps:
    """Watches what the stack calls, and lets one fault happen at one step."""

    def __init__(self):
        self.passed = collections.Counter()         # step -> how often
        self.fault = self.step = None               # to happen at that step, once
        steps = self

        class Connection(sqlite3.Connection):
            def __init__(self, path, *arguments, **options):
                self.file = re.search(r'(_[a-z]+)?\.sqlite3', path)[0]
                super().__init__(path, *arguments, **options)

            def named(self, statement):
                return f'{" ".join(statement.split())[:50]} of {self.file}'

            def execute(self, statement, *parameters):
                def run():
                    return list(super(Connection, self).execute(statement, *parameters))
                return steps.around(self.named(statement), run, self)

            def executemany(self, statement, rows):
                return steps.around(self.named(statement), lambda: super(Connection, self).executemany(statement, rows), self)

        todol.sqlite3.connect = functools.partial(sqlite3.connect, factory=Connection)
        for owner, names in ((os, ('read', 'write', 'stat', 'listdir', 'open', 'unlink', 'rename')),
                             (gevent, ('sleep', 'spawn')), (todol.VersionStamps, ('get', 'changing'))):
            for name in names:
                setattr(owner, name, self.watched(name, getattr(owner, name)))
        run = todol.Loop._run

        def run_watched(loop):
            turn, name = loop._turn, loop.name

            def watched_turn():
                wait = self.around(f'turn of {name}', turn)
                return wait and (lambda: self.around(f'wait of {name}', wait))
            loop._turn = watched_turn
            run(loop)
        todol.Loop._run = run_watched

    def watched(self, name, function):
        @functools.wraps(function)
        def call(*arguments, **options):
            return self.around(name, lambda: function(*arguments, **options))
        return call

    def around(self, name, call, connection=None):
        """Call it, with a step before and one after, if the stack asked for it."""
        frame, callers = sys._getframe(2), []
        while frame and len(callers) < 3:
            if frame.f_code.co_filename == todol.__file__:
                callers.append(frame.f_code.co_name)
            frame = frame.f_back
        if not callers:
            return call()
        where = f'{name} in {" < ".join(callers)}'
        self.pass_(f'before {where}', connection)
        value = call()
        self.pass_(f'after {where}', connection)
        return value

    def pass_(self, step, connection):
        self.passed[step] += 1
        if step == self.step and self.fault:
            fault, self.fault = self.fault, None
            fault(connection)


class Changes:
    """Changes of every kind, and what is known of them."""

    def __init__(self):
        self.number = 0
        self.acknowledged, self.heard, self.running = set(), set(), {}
        self.runs = collections.Counter()
        self.wrong = []
        todol.app_db.migrations += [('900 create notes', 'CREATE TABLE notes (number INTEGER PRIMARY KEY)')]

        @todol.jobs.task(queue='urgent', attempts=50, retry_seconds=0.01)
        def note(number, key):
            self.run_note(number, key)
        self.note = note

    def run_note(self, number, key):
        if number in self.running or key in self.running.values():
            self.wrong.append(f'{number} of {key} runs beside {self.running}')
        self.running[number] = key
        try:
            gevent.sleep(0.001)
            todol.cable.broadcast('notes', number)
            self.runs[number] += 1
        finally:
            self.running.pop(number, None)

    def make(self):
        """Several at once; each that returns without an error counts as acknowledged."""
        self.number += 3
        ways = [(self.write, self.number), (self.write, self.number + 1), (self.enqueue, self.number + 2), (self.use_others, 0)]
        greenlets = [gevent.spawn(self.acknowledge, *way) for way in ways]
        gevent.joinall(greenlets, timeout=5)
        if not all(greenlet.ready() for greenlet in greenlets):
            self.wrong.append('a call does not return')

    def acknowledge(self, change, number):
        with contextlib.suppress(BaseException):
            change(number)
            self.acknowledged.add(number)

    def write(self, number, key='key'):
        def change():
            todol.app_db.execute('INSERT INTO notes VALUES (?)', (number,))
            self.enqueue(number, key)
        todol.app_db.transact(change)

    def enqueue(self, number, key='key'):
        todol.jobs.enqueue(self.note, {'number': number, 'key': key}, order_key=key)

    def use_others(self, _):
        cache = todol.cache
        with contextlib.suppress(BaseException):
            cache.set('value', 1)
            cache.incr('count')
            cache.fetch('computed', 5, lambda: 2)
            cache.delete('value')
        todol.cable.broadcast('notes', 0)
        self.runs[0] += 1

    def missing(self):
        """What does not hold now."""
        written = {number for number, in todol.app_db.execute('SELECT number FROM notes')}
        facts = {'acknowledged and never run': self.acknowledged - set(self.runs),
                 'written and never run': written - set(self.runs), 'run and never heard': set(self.runs) - self.heard,
                 'left': todol.job_db.execute('SELECT id, worker, due_at, error FROM jobs'),
                 'in the outbox': todol.app_db.execute('SELECT id FROM outbox'),
                 'failing': [name for name, loop in todol.loops.items() if not loop.alive], 'wrong': self.wrong}
        return {fact: what for fact, what in facts.items() if what}

    def settle(self, seconds):
        """Wait until all holds, and give what does not."""
        deadline = time.monotonic() + seconds
        while (missing := self.missing()) and time.monotonic() < deadline:
            gevent.sleep(0.005)
        return missing

    def ordinary(self):
        """What is wrong with an ordinary change of each kind, which has a second."""
        self.number += 3
        began = time.monotonic()
        try:
            self.write(self.number, 'ordinary')
            todol.cache.set('ordinary', self.number)
            kept = todol.cache.get('ordinary') == self.number and todol.cache.incr('sum') > 0
        except Exception as error:
            return repr(error)
        while self.number not in self.heard and time.monotonic() < began + 1:
            gevent.sleep(0.002)
        return None if kept and self.number in self.heard else 'an ordinary change is not kept, or not heard'


def sqlite_fault(code, text, rolls_back=False):
    """As SQLite fails; where no SQL runs, as the system does."""
    def fault(connection):
        if connection is None:
            raise OSError(errno.ENOSPC, text)
        if rolls_back and connection.in_transaction:
            sqlite3.Connection.execute(connection, 'ROLLBACK')
        error = sqlite3.OperationalError(text)
        error.sqlite_errorcode = code
        raise error
    return fault


def raising(kind):
    def fault(connection):
        raise kind()
    return fault


CLOCK = types.SimpleNamespace(offset=0)
FAULTS = {kind.__name__: raising(kind) for kind in (MemoryError, gevent.GreenletExit, SystemExit)} | {
    'locked': sqlite_fault(5, 'database is locked'), 'full': sqlite_fault(13, 'database or disk is full', rolls_back=True),
    'I/O error': sqlite_fault(10, 'disk I/O error')} | {
    f'clock {seconds:+}': lambda connection, seconds=seconds: setattr(CLOCK, 'offset', seconds)
    for seconds in (-86400, 3600)}


def prepare_for_faults():
    """What all child processes of this section begin with."""
    logging.getLogger('todol').setLevel(logging.CRITICAL)
    todol.RESTART_SECONDS = todol.MAX_RESTART_SECONDS = todol.REST_SECONDS = 0.01
    todol.LEASE_SECONDS, todol.BUSY_SECONDS = 1, 0.3
    todol.now = lambda: time.time() + CLOCK.offset


def raise_at_every_step(data):
    """Each fault at each step, in one process that goes on; prints what was tried and what broke, as JSON."""
    prepare_for_faults()
    steps, changes, tried, broken = Steps(), Changes(), 0, []
    with todol.open_stack({'TODOL_DATA': data, 'TODOL_JOB_WORKERS': '4'}, run_jobs=True):
        todol.cable.subscribe('notes', lambda message: changes.heard.add(json.loads(message.payload)))
        for _ in range(5):
            changes.make()
            changes.settle(5)
        open_files, found = len(os.listdir('/proc/self/fd')), sorted(steps.passed)
        for step, (name, fault) in itertools.product(found, FAULTS.items()):
            if step.startswith('after') and name in ('locked', 'full', 'I/O error'):
                continue            # SQLite fails in a statement, not behind it
            steps.step, steps.fault = step, fault
            changes.make()
            hit, steps.fault, CLOCK.offset = steps.fault is None, None, 0
            wrong = [changes.settle(5) or None, changes.ordinary()]
            tried += hit
            if any(wrong):
                broken.append([step, name, str(wrong)])
                changes.wrong.clear()
                if len(broken) == 20:
                    break
        files = len(os.listdir('/proc/self/fd')) - open_files
    print(json.dumps({'steps': len(found), 'tried': tried, 'broken': broken, 'files': files}))


def forked(work):
    """Run a function in a fork of this process, and give its wait status."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            status = work() or 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitpid(pid, 0)[1]


def kill_at_every_step(directory):
    """kill -9 at each step, the first, the middle and the last time it is passed; the next process must find all."""
    prepare_for_faults()
    directory = pathlib.Path(directory)
    data, acknowledged = directory / 'data', directory / 'acknowledged'
    environ = {'TODOL_DATA': str(data), 'TODOL_JOB_WORKERS': '4'}
    todol.app_db.migrations += [('900 create notes', 'CREATE TABLE notes (number INTEGER PRIMARY KEY)'),
                                ('901 create runs', 'CREATE TABLE runs (id INTEGER PRIMARY KEY, number INTEGER)')]

    @todol.jobs.task(queue='urgent', attempts=50, retry_seconds=0.01)
    def note(number):
        todol.cable.broadcast('notes', number)
        todol.app_db.execute('INSERT INTO runs (number) VALUES (?)', (number,))

    def change(acknowledge):
        def enqueue(number):
            todol.jobs.enqueue(note, {'number': number}, order_key='key')
            acknowledge(number)

        def write(number):
            todol.app_db.transact(lambda: (todol.app_db.execute('INSERT INTO notes VALUES (?)', (number,)),
                                           todol.jobs.enqueue(note, {'number': number}, order_key='key')))
            acknowledge(number)

        def count(number):
            todol.cache.set('value', 1)
            todol.cache.incr('count')
            acknowledge(number)
        gevent.joinall([gevent.spawn(write, 1), gevent.spawn(write, 2), gevent.spawn(enqueue, 3), gevent.spawn(count, 0)])
        gevent.sleep(0.03)
        write(4)
        gevent.sleep(0.03)

    def record():
        steps = Steps()
        with todol.open_stack(environ, run_jobs=True):
            change(lambda number: None)
        (directory / 'steps').write_text(json.dumps(steps.passed))

    def killed(step, times):
        steps, left = Steps(), [times]
        file = os.open(acknowledged, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

        def fault(connection):
            left[0] -= 1
            if left[0]:
                steps.fault = fault
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        steps.step, steps.fault = step, fault
        with todol.open_stack(environ, run_jobs=True):
            change(lambda number: os.pwrite(file, b'1', number))

    def missing():
        kept = {number for number, byte in enumerate(acknowledged.read_bytes()) if byte == ord('1')}
        runs = list(dict.fromkeys(number for number, in todol.app_db.execute('SELECT number FROM runs ORDER BY id')))
        heard = {json.loads(payload) for payload, in todol.cable_db.execute('SELECT payload FROM messages')}
        written = {number for number, in todol.app_db.execute('SELECT number FROM notes')}
        return [fact for fact, holds in {
            'acknowledged and never run': kept - {0} <= set(runs), 'written and never run': written <= set(runs),
            'run and never heard': set(runs) <= heard, 'out of order': 4 not in runs or runs[-1] == 4,
            'the counter': 0 not in kept or todol.cache.get('count') == 1,
            'left': not todol.job_db.execute('SELECT 1 FROM jobs') and not todol.app_db.execute('SELECT 1 FROM outbox'),
            'files of the dead': not todol.processes.dead(),
            'failing': all(loop.alive for loop in todol.loops.values())}.items() if not holds]

    def verify():
        with todol.open_stack(environ, run_jobs=True):
            deadline = time.monotonic() + 5
            while (wrong := missing()) and time.monotonic() < deadline:
                gevent.sleep(0.005)
            wrong += [database.name for database in todol.databases.values()
                      if database.execute('PRAGMA integrity_check') != [('ok',)]]
        wrong += [name for name in os.listdir(data) if re.search(r'\.process\.[^.]*$|\.bell\.|-wal$', name)]
        (directory / 'wrong').write_text(' '.join(wrong))
        return bool(wrong)

    forked(record)
    passed, tried, broken = json.loads((directory / 'steps').read_text()), 0, []
    for step, count in sorted(passed.items()):
        for times in sorted({1, (count + 1) // 2, count}):
            shutil.rmtree(data, ignore_errors=True)
            if forked(functools.partial(killed, step, times)) == signal.SIGKILL:
                tried += 1
                if forked(verify):
                    broken.append([step, times, (directory / 'wrong').read_text()])
    print(json.dumps({'steps': len(passed), 'tried': tried, 'broken': broken}))


if __name__ == '__main__':
    with tempfile.TemporaryDirectory() as place:
        {'errors': raise_at_every_step, 'kills': kill_at_every_step}[sys.argv[1]](place)
