#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["bottle==0.13.4", "gevent==26.9.0", "gevent-websocket==0.10.1"]
# ///
"""todol: a live todo app whose database, cache, job queue and cable are four SQLite files and this one Python file.

    pip install bottle gevent gevent-websocket && python todol.py
    open http://127.0.0.1:8080 in two windows: what one does, the other shows

A change travels so:

    browser --HTTP--> routes --> todos --> app database --outbox--> job database --> worker --> broadcast
       ^                                                                                           |
       +-------- WebSocket /cable <-- connections <-- delivery, doorbell <-- cable database <------+

Each room uses only the rooms above it (`grep '^# ===' todol.py` prints them). To make it your own app, replace
Todos, Templates, Broadcasts and Routes, and the styles and scripts at the end; the rest knows nothing of todos.
"""
import gc

if __name__ == '__main__':
    gc.disable()        # until serve(): imports leave next to nothing to collect, and the looking takes 6 ms

import base64
import collections
import contextlib
import errno
import functools
import hashlib
import hmac
import http
import importlib
import json
import mmap
import os
import random
import re
import secrets
import select
import signal
import sqlite3
import struct
import sys
import threading
import time
import types
import zlib

try:
    import fcntl
except ImportError:     # Windows
    fcntl = None


class Later(types.ModuleType):
    """Stands in for a module while others import it, or functions from it; the real one is imported when those are used."""

    def __getattr__(self, name):
        if sys.modules.get(self.__name__) is self:
            return lambda *arguments, **options: getattr(self, name)(*arguments, **options)
        return getattr(importlib.import_module(self.__name__), name)


# What the modules below import, and the first page does without: 30 ms of the start and 6 MB. todol speaks no TLS, a proxy
# in front of it does (the monkey patch below brings ssl back, for jobs that need it). gevent only tells zope.interface
# what its classes do, and tidies their help with textwrap, and nobody here asks; of http.client it makes a parser of
# headers, and Headers takes its place. Errors take traceback: import_for_errors() brings it when the port is open.
later = {**{name: None for name in ('geventwebsocket.resource', 'ssl', 'zope.schema')},
         **{name: types.ModuleType(name) for name in ('email', 'http.client', 'textwrap', 'zope.interface')},
         **{name: Later(name) for name in (
             'array', 'calendar', 'configparser', 'copy', 'email.utils', 'gevent._tblib', 'geventwebsocket.utf8validator',
             'http.cookies', 'inspect', 'ipaddress', 'mimetypes', 'pickle', 'selectors', 'tempfile', 'traceback',
             'unicodedata')}}
vars(later['http.client']).update(responses={status.value: status.phrase for status in http.HTTPStatus}, HTTPMessage=object,
                                  parse_headers=lambda *_, **__: None)
vars(later['textwrap']).update(dedent=str)
vars(later['zope.interface']).update(Interface=object, Attribute=Exception, classImplements=lambda *_: None,
                                     implementer=lambda *_: lambda described: described)
later = {name: module for name, module in later.items() if name not in sys.modules}
sys.modules.update(later)
vars(sys.modules['email']).setdefault('utils', later.get('email.utils'))        # where bottle looks for it
try:
    import logging
    import socket
    import traceback
    import urllib.parse

    import gevent
    import gevent.event
    import gevent.local
    import gevent.socket
    gevent.config.format_context = 'builtins.repr'      # as shipped, pprint, and what that imports: 5 ms

    # There is no monkey.patch_all() here: it doubles the time to the first page, and nothing below needs it. Only bottle's
    # current request must belong to a greenlet instead of a thread. Jobs that call blocking network libraries do need
    # it: put `from gevent import monkey; monkey.patch_all()` above every other import then.
    thread_local, threading.local = threading.local, gevent.local.local
    import bottle
    threading.local = thread_local

    from gevent.pywsgi import WSGIServer
    from geventwebsocket.exceptions import ProtocolError, WebSocketError
    from geventwebsocket.handler import WebSocketHandler
    from geventwebsocket.websocket import WebSocket
except ImportError as missing:
    if __name__ != '__main__':
        raise
    sys.exit(f'Error: todol needs the package {(missing.name or str(missing)).split(".")[0]!r}, which is not installed for '
             f'{sys.executable}.\nTry: {sys.executable} -m pip install bottle gevent gevent-websocket')
finally:
    for name, module in later.items():
        if sys.modules.get(name) is module:
            sys.modules.pop(name, None)     # who imports it later gets it

__version__ = '1.0.0'

log = logging.getLogger('todol')
compact_json = json.JSONEncoder(separators=(',', ':')).encode     # json.dumps() makes such an encoder at each call: 3 us


# === Settings: one table of environment variables, checked once, at the start =========================================
# Nothing below reads os.environ. An error of this file is a TodolError: a sentence, and the HTTP status that fits it.

class TodolError(Exception):
    """A sentence for the person who can do something about it. status: the HTTP status it answers with."""
    status = 500


class SettingError(TodolError):
    """A setting has a value that is not allowed."""


class StorageError(TodolError):
    """A database can't be used now: locked for too long, disk full, damaged. What was asked for did not happen."""
    status = 503


Setting = collections.namedtuple('Setting', (      # not typing.NamedTuple: importing typing takes 3 ms
    'name',             # of the environment variable
    'default',          # as it would be written in the environment
    'meaning',          # one line, with the unit
    'parse',            # str -> value; raises ValueError with what is allowed
    'secret',           # whether its value is never shown
), defaults=[False])


def whole_number(low, high):
    """A parser of whole numbers from low to high."""
    def parse(text):
        if not re.fullmatch(r'[0-9]{1,15}', text) or not low <= int(text) <= high:
            raise ValueError(f'a whole number from {low} to {high}')
        return int(text)
    return parse


def one_of(*allowed):
    """A parser that takes the allowed words, in any case."""
    def parse(text):
        for word in allowed:
            if text.lower() == word.lower():
                return word
        raise ValueError(' or '.join(allowed))
    return parse


def switch(text):
    """A parser of on and off."""
    return {'on': True, '1': True, 'off': False, '0': False}[one_of('on', 'off', '1', '0')(text)]


def some_text(text):
    if not text:
        raise ValueError('not empty')
    return text


def secret_text(text):
    if text and len(text) < 32:
        raise ValueError('at least 32 characters; `python todol.py secret` makes one')
    return text


SETTINGS = (
    Setting('PORT', '8080', 'TCP port to listen on; 0 takes a free one', whole_number(0, 65535)),
    Setting('HOST', '127.0.0.1', 'address to listen on; 0.0.0.0 for all', some_text),
    Setting('TODOL_ENV', 'development', 'development, test or production: names the files, sets what errors show',
            one_of('development', 'test', 'production')),
    Setting('TODOL_DATA', 'db', 'directory of the four database files', some_text),
    Setting('TODOL_SECRET', '', 'signs sessions and stream names; unset: made once and kept in the app database',
            secret_text, secret=True),
    Setting('TODOL_SYNC', 'NORMAL', 'synchronous of the app database: NORMAL, or FULL to survive power loss',
            one_of('NORMAL', 'FULL')),
    Setting('TODOL_JOB_WORKERS', '20', 'greenlets that run jobs', whole_number(1, 10_000)),
    Setting('TODOL_MAX_TITLE_CHARS', '500', 'longest title, characters', whole_number(1, 10_000)),
    Setting('TODOL_MAX_TODOS', '10000', 'most todos of one user', whole_number(1, 1_000_000)),
    Setting('TODOL_MAX_BODY_BYTES', '262144', 'largest request body, bytes', whole_number(1024, 2**30)),
    Setting('TODOL_MAX_MESSAGE_BYTES', '65536', 'largest WebSocket message from a client, bytes', whole_number(1024, 2**30)),
    Setting('TODOL_MAX_SOCKETS', '100', 'most WebSockets of one user', whole_number(1, 1_000_000)),
    Setting('TODOL_WRITES_PER_MINUTE', '600', 'most changes of one session in a minute; above it 429', whole_number(1, 10**9)),
    Setting('TODOL_IDLE_SECONDS', '0', 'a visible tab without a sign of life drops its socket after this; 0: never',
            whole_number(0, 10**6)),
    Setting('TODOL_TRUST_PROXY', 'off', "on: take the client's address and scheme from the proxy's headers", switch),
    Setting('TODOL_LITESTREAM', 'off', 'on: Litestream runs beside; checkpoints are left to it, an early stop waits for it', switch),
    Setting('TODOL_LOG', 'text', 'form of the log lines: text or json', one_of('text', 'json')),
)


def load_settings(environ):
    """Every setting as an attribute: PORT is .port, TODOL_MAX_TODOS is .max_todos. Raises SettingError.

    An empty variable counts as unset, as `docker run -e NAME=` and compose files write it.
    """
    settings = types.SimpleNamespace()
    for setting in SETTINGS:
        text = environ.get(setting.name) or setting.default
        try:
            value = setting.parse(text)
        except ValueError as allowed:
            shown = 'a value' if setting.secret else repr(text)
            raise SettingError(f'{setting.name} is {shown}; it must be {allowed} ({setting.meaning})') from None
        setattr(settings, setting.name.lower().removeprefix('todol_'), value)
    for name in sorted(environ):
        if name.startswith('TODOL_') and not name.startswith('TODOL_TEST_') and name not in {each.name for each in SETTINGS}:
            log.warning('unknown setting %s is ignored; `todol.py settings` lists those there are', name)
    return settings


settings = load_settings({})    # the defaults, until choose() puts others in their place


def choose(chosen):
    """Make these the settings in force."""
    global settings
    settings = chosen


# === Migrations: the schema of the four files, oldest first ===========================================================
# The lists only grow. One statement each, in the SQL that SQLite >= 3.35 and PostgreSQL share. Times are seconds since
# 1970 as floats, from now_s(). AUTOINCREMENT: an id is never used twice, so an old message can't mean a new row. It costs
# an insert 5 us, a page more to write.

MIGRATIONS = {
    'app': [
        ('001 create todos', '''
            CREATE TABLE todos (
                id          INTEGER PRIMARY KEY AUTOINCREMENT,   -- also the order of the list
                user_id     TEXT NOT NULL,
                title       TEXT NOT NULL,
                completed   INTEGER NOT NULL DEFAULT 0,          -- 0 or 1
                version     INTEGER NOT NULL,                    -- of the list when this row last changed
                key         TEXT,                                -- idempotency key of the create; NULL: none was given
                created_at  REAL NOT NULL
            )'''),
        ('002 index todos by user', 'CREATE INDEX todos_by_user ON todos (user_id, id)'),
        ('003 index todos by key', 'CREATE UNIQUE INDEX todos_by_key ON todos (user_id, key) WHERE key IS NOT NULL'),
        ('004 create lists', '''
            CREATE TABLE lists (                                 -- one row a user: counts that need no counting
                user_id     TEXT PRIMARY KEY,
                active      INTEGER NOT NULL,
                completed   INTEGER NOT NULL,
                version     INTEGER NOT NULL                     -- grows with every change
            )'''),
        ('005 create outbox', '''
            CREATE TABLE outbox (                                -- jobs on their way to the job database
                id          INTEGER PRIMARY KEY AUTOINCREMENT,
                job         TEXT NOT NULL                        -- the row to insert there, as JSON
            )'''),
        ('006 create secrets', 'CREATE TABLE secrets (name TEXT PRIMARY KEY, value TEXT NOT NULL)'),
        ('007 index todos by key first', 'CREATE UNIQUE INDEX todos_by_key_first ON todos (key, user_id) WHERE key IS NOT NULL'),
        ('008 drop index by user and key', 'DROP INDEX todos_by_key'),  # keys start with the time: new ones are in one page
    ],
    'cache': [
        ('001 create entries', '''
            CREATE TABLE entries (
                id          INTEGER PRIMARY KEY,                 -- a rowid table: big values stay out of the key's pages
                key         TEXT NOT NULL UNIQUE,
                number      INTEGER,                             -- the value, if it is a whole number (a counter)
                value       BLOB,                                -- the value otherwise: bytes, or JSON in UTF-8
                is_json     INTEGER NOT NULL,                    -- 1: value is JSON
                expires_at  REAL NOT NULL,
                used_at     REAL NOT NULL                        -- last use, a little late: reads are written by evictions
            )'''),
        ('002 index entries by use', 'CREATE INDEX entries_by_use ON entries (used_at)'),
        ('003 index entries by expiry', 'CREATE INDEX entries_by_expiry ON entries (expires_at)'),
        ('004 drop index by expiry', 'DROP INDEX entries_by_expiry'),   # a fifth of every write, for a sweep once an hour
        ('005 drop index by use', 'DROP INDEX entries_by_use'),         # another sixth, and the order of ids will do
    ],
    'job': [
        ('001 create jobs', '''
            CREATE TABLE jobs (
                id          INTEGER PRIMARY KEY,                 -- used again when the newest are gone: a lease has run_at too
                uid         TEXT,                                -- if it came by the outbox: moved twice, inserted once
                name        TEXT NOT NULL,
                arguments   TEXT NOT NULL,                       -- JSON object
                queue       TEXT NOT NULL,
                unique_key  TEXT,                                -- at most one unfinished job has it
                order_key   TEXT,                                -- its jobs run in order, one at a time
                run_at      REAL NOT NULL,                       -- not before
                due_at      REAL,                                -- when to take it: run_at, a retry's time, or the end of
                                                                 -- the lease; NULL: parked, or behind another of its key
                worker      TEXT,                                -- the process that has the lease; NULL: nobody
                attempt     INTEGER NOT NULL DEFAULT 0,          -- how often it was taken; fences late finishers, with run_at
                enqueued_at REAL NOT NULL,
                failed_at   REAL,                                -- when it was parked after its last attempt
                error       TEXT                                 -- traceback of the last failure
            )'''),
        ('002 index jobs by due time', 'CREATE INDEX jobs_by_due ON jobs (queue, due_at) WHERE due_at IS NOT NULL'),
        ('003 index jobs by unique key', '''
            CREATE UNIQUE INDEX jobs_by_unique_key ON jobs (unique_key)
            WHERE unique_key IS NOT NULL AND failed_at IS NULL'''),
        ('004 index jobs by order key', '''
            CREATE INDEX jobs_by_order_key ON jobs (order_key, id) WHERE order_key IS NOT NULL AND failed_at IS NULL'''),
        ('005 index jobs by worker', 'CREATE INDEX jobs_by_worker ON jobs (worker) WHERE worker IS NOT NULL'),
        ('006 index failed jobs', 'CREATE INDEX jobs_by_failure ON jobs (failed_at) WHERE failed_at IS NOT NULL'),
        ('007 create recurring', 'CREATE TABLE recurring (name TEXT PRIMARY KEY, due_at REAL NOT NULL)'),
        ('008 index jobs by uid', 'CREATE UNIQUE INDEX jobs_by_uid ON jobs (uid) WHERE uid IS NOT NULL'),
        ('009 drop index by worker', 'DROP INDEX jobs_by_worker'),     # an eighth of an enqueue; leases are due soon
    ],
    'cable': [
        ('001 create messages', '''
            CREATE TABLE messages (
                id          INTEGER PRIMARY KEY AUTOINCREMENT,   -- the offset of a position
                stream      TEXT NOT NULL,
                payload     TEXT NOT NULL,                       -- JSON
                created_at  REAL NOT NULL
            )'''),
        ('002 index messages by stream', 'CREATE INDEX messages_by_stream ON messages (stream, id)'),
        ('003 index messages by time', 'CREATE INDEX messages_by_time ON messages (created_at)'),
        ('004 create epochs', 'CREATE TABLE epochs (epoch TEXT PRIMARY KEY)'),   # one row: the name of this file
        ('005 drop index by time', 'DROP INDEX messages_by_time'),     # ids are in the order of time
    ],
}


# === Database: one SQLite file, used by many greenlets ================================================================
# SQLite never waits in C, where it would stop every greenlet: a locked file is tried again from Python, for a while.
# A transaction never switches greenlets, so one connection serves all, and nobody sees half a transaction.

BUSY_SECONDS = 5            # longer than any transaction of this file, shorter than a proxy's patience
CROWD_SECONDS = 0.01        # a crowd that wrote is expected back within this
APPLICATION_ID = 0x746f646f     # in the header of our files: one that has it needs no long look
JOURNAL_LIMIT_BYTES = 16 * 1024 * 1024
CHECKPOINT_PAGES = 4000     # 16 MB; with SQLite's 1000 there are four times as many waits for the disk, each half as long
BOOT_ID = '/proc/sys/kernel/random/boot_id'             # of Linux: another one after each start of the machine
PAGE_BYTES = {'job': 1024}  # of a new file, if not SQLite's own 4096: small rows that soon go write less, a fifth more jobs
DATABASE_SUFFIXES = ('', '-wal', '-shm', '-journal')    # of the names of the files that it may have
TOLERATED_TABLES = ('sqlite_', '_litestream_')      # prefixes of tables that others keep in our files


class BusyError(StorageError):
    """Somebody else held the write lock for all of BUSY_SECONDS."""


class MigrationError(TodolError):
    """The file is not one of ours, or from a newer todol. It was left as it is."""


class Database:
    """One of the four files. role: a key of MIGRATIONS.

    Statements are constants (sqlite3 keeps them compiled by their text), rows are tuples, and a statement outside
    transact() is a transaction of its own. Everything raises StorageError when the file can't be used, and lets
    sqlite3.IntegrityError through.
    """

    def __init__(self, role):
        self.role = role
        self.path = None
        self.clock = time.time              # what now_s() gives; tests put their own here
        self._connection = None
        self._mark = None                   # BootMark of a file that is written without fsync
        self._queue = []                    # writes that wait for the next transaction
        self._leading = None                # set when the greenlet that is about to run the queue has done so
        self._in_transaction = False
        self._wrote_at = self._wrote_by = 0
        self._crowded = False               # the last transaction was of several writers

    def open(self, path, synchronous='NORMAL', checkpoints=True):
        """Open or create the file at path and bring its schema up to date. checkpoints: off where Litestream makes them.

        synchronous: of SQLite. With OFF nothing waits for the disk (10 kB are added to the cache in 0.6 of the time, a POST
        takes 6 % less), and the file starts empty if the machine went down while it was open; where that can't be known, it
        is NORMAL instead. Raises MigrationError for a file that is not ours and StorageError for one that can't be used;
        neither is changed then.
        """
        self.path = path
        try:
            mark = BootMark(path)
            if synchronous == 'OFF' and fcntl and boot_id():
                self._mark = mark
                mark.set()
            elif mark.is_stale():
                raise StorageError(f'{path} was open when the machine went down, and may be torn: delete it and {path}-boot')
            elif synchronous == 'OFF':
                synchronous = 'NORMAL'
            pending = None if self._has_our_id() else self.examine(path)        # 0.3 ms
            self._connection = connection = sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False,
                                                            cached_statements=256)
            # Called deterministic, it is called once for each run of a statement, as PostgreSQL's STABLE functions are.
            connection.create_function('now_s', 0, lambda: self.clock(), deterministic=True)
            connection.execute(f'PRAGMA page_size = {PAGE_BYTES.get(self.role, 4096)}')
            pending = self._pending() if pending is None else pending
            self._patiently('PRAGMA journal_mode = WAL')
            # Debian's SQLite fills freed pages with zeros, and writes those too: a third of what a full cache does. FAST does
            # it only where the page is written anyway.
            for pragma in (f'synchronous = {synchronous}', 'foreign_keys = ON', 'secure_delete = FAST',
                           f'journal_size_limit = {JOURNAL_LIMIT_BYTES}'):
                connection.execute(f'PRAGMA {pragma}')
            connection.execute(f'PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES if checkpoints else 0}')
            if pending:
                self.transact(self._migrate)
        except sqlite3.Error as error:
            self.close()
            raise self._explained(error) from error
        except OSError as error:
            self.close()
            raise StorageError(f'{error.filename or path} can not be read: {error.strerror}') from None
        except TodolError:
            self.close()
            raise

    def close(self):
        """Close the file; the last process that does so folds the write-ahead log into it."""
        self._disconnect()
        if self._mark:
            mark, self._mark = self._mark, None
            try:
                mark.release()
            except OSError as error:
                log.error('%s can not be synced: %s', self.path, error)

    def _disconnect(self):
        if self._connection:
            connection, self._connection = self._connection, None
            connection.close()

    def execute(self, statement, parameters=()):
        """The rows of one statement, as a list of tuples."""
        try:
            return self._connection.execute(statement, parameters).fetchall()
        except sqlite3.IntegrityError:
            raise
        except sqlite3.Error as error:
            if self._in_transaction or not is_busy(error):
                raise self._explained(error) from error
        return self._patiently(statement, parameters)

    def write(self, statement, parameters=()):
        """execute() for a statement that many greenlets may want to run at once: a crowd shares its commits, as in transact();
        a lone one does without BEGIN and COMMIT, which saves a tenth of a broadcast, a fifth after a pause."""
        if not self._in_transaction and self._is_crowd():
            return self.transact(self.execute, statement, parameters)
        self._note_writer()
        return self.execute(statement, parameters)

    def executemany(self, statement, rows):
        """Run one statement for each of rows; only inside a transaction."""
        assert self._in_transaction, 'executemany() outside a transaction would commit row by row'
        try:
            self._connection.executemany(statement, rows)
        except sqlite3.IntegrityError:
            raise
        except sqlite3.Error as error:
            raise self._explained(error) from error

    def transaction(self, function):
        """A decorator: calls of the function go through transact()."""
        @functools.wraps(function)
        def in_transaction(*arguments, **options):
            return self.transact(function, *arguments, **options)
        return in_transaction

    def transact(self, function, *arguments, **options):
        """Call the function in a transaction and give what it returns, after the commit. Inside another one: join it.

        Writes of several greenlets share one commit (2 to 3 times the writes a second, and one fsync for all at FULL):
        who comes first leads, the others' functions are called by the leader. So a function here must not use the
        current request, can't wait (an attempt raises RuntimeError), and may be called a second time, after a rollback,
        when a neighbour failed: it should change nothing but the database. If it raises, nothing of it is kept.
        """
        if self._in_transaction:
            return function(*arguments, **options)
        write = _Write(functools.partial(function, *arguments, **options))
        self._queue.append(write)
        try:
            while not write.done:
                if self._leading:
                    self._leading.wait()
                else:
                    self._lead()
        except BaseException:       # killed while it waited: nobody is left to hear the result
            if write in self._queue:
                self._queue.remove(write)
            raise
        if write.error is not None:
            raise write.error
        return write.value

    @property
    def in_transaction(self):
        """Whether the caller is inside transact(); as nothing switches there, it can be nobody else."""
        return self._in_transaction

    def _lead(self):
        """Run the first transaction that the queue allows."""
        self._leading = gevent.event.Event()
        try:
            # A crowd gets one turn of the event loop to join: with 16 clients, fifteen writes share a commit. A lone writer
            # never waits.
            if self._is_crowd():
                gevent.sleep(0)
            self._note_writer()
            try:
                self._patiently('BEGIN IMMEDIATE')
            except StorageError as error:
                group, self._queue = self._queue, []
                for write in group:
                    write.finish(error=error)
                return
            # From here to the commit nothing switches.
            size = 1 if self._queue[0].alone else len(self._queue)
            group, self._queue = self._queue[:size], self._queue[size:]
            self._crowded = len(group) > 1
            self._run(group)
        finally:
            ended, self._leading = self._leading, None
            ended.set()         # who is left over, or whose leader was killed, leads on

    def _is_crowd(self):
        """Whether somebody else wrote a moment ago, or joined the last time: others may be about to."""
        return self._crowded or (self._wrote_by != id(gevent.getcurrent())
                                 and time.monotonic() - self._wrote_at < CROWD_SECONDS)

    def _note_writer(self):
        self._wrote_at, self._wrote_by = time.monotonic(), id(gevent.getcurrent())

    def _run(self, group):
        """Call the functions of a group in the transaction that is open, and commit it."""
        leader = gevent.getcurrent()
        self._in_transaction, leader.switch_out = True, _refuse_to_switch
        outcomes = []
        try:
            for write in group:
                changes = self._connection.total_changes
                try:
                    outcomes.append((write.function(), None))
                except Exception as error:
                    if self._connection.total_changes != changes or not self._connection.in_transaction:
                        raise           # it left something behind
                    outcomes.append((None, error))
            self._connection.execute('COMMIT')
        except BaseException as error:
            if self._connection.in_transaction:     # SQLite may have rolled back by itself
                self._connection.execute('ROLLBACK')
            if len(group) == 1 or len(outcomes) == len(group) or not isinstance(error, Exception):
                outcomes = [(None, self._explained(error))] * len(group)
            else:                       # only the one that failed shall fail: each on its own
                for write in group:
                    write.alone = True
                self._queue = group + self._queue
                return
        finally:
            self._in_transaction = False
            del leader.switch_out
        for write, outcome in zip(group, outcomes):
            write.finish(*outcome)

    def _patiently(self, statement, parameters=()):
        deadline = time.monotonic() + BUSY_SECONDS
        pause = 0.0005
        while True:
            try:
                return self._connection.execute(statement, parameters).fetchall()
            except sqlite3.IntegrityError:
                raise
            except sqlite3.Error as error:
                if not is_busy(error) or time.monotonic() > deadline:
                    raise self._explained(error) from error
            gevent.sleep(pause * random.uniform(0.5, 1.5))
            pause = min(pause * 1.5, 0.01)

    def _explained(self, error):
        """The same error as a sentence with the file's name, where it is one of SQLite's."""
        if not isinstance(error, sqlite3.DatabaseError) or isinstance(error, sqlite3.IntegrityError):
            return error
        text = str(error)
        if is_busy(error):
            return BusyError(f'{self.path} was locked by another process for {BUSY_SECONDS} seconds; nothing was changed')
        if 'full' in text:
            return StorageError(f'{self.path}: the disk is full; nothing was changed')
        if 'unable to open' in text or 'readonly' in text:
            return StorageError(f'{self.path} can not be opened for writing ({text}); check the directory and its owner')
        if 'malformed' in text or 'not a database' in text:
            return StorageError(f'{self.path} is damaged or not an SQLite database ({text}); restore it from a backup')
        return StorageError(f'{self.path}: {text}')

    def examine(self, path):
        """Look at a file without the right to write, and give the migrations that it has not seen. Raises MigrationError or
        StorageError if it is not one of ours."""
        self.path = path
        if not os.path.exists(self.path) or os.path.getsize(self.path) == 0:
            return MIGRATIONS[self.role]
        with open(self.path, 'rb') as file:
            if not file.read(16) == b'SQLite format 3\0':
                raise MigrationError(f'{self.path} is not an SQLite database; move it away or set TODOL_DATA')
        address = 'file:' + urllib.parse.quote(os.path.abspath(self.path)) + '?mode=ro'
        self._connection = sqlite3.connect(address, uri=True, timeout=0, isolation_level=None)
        try:
            tables = [name for name, in self._patiently("SELECT name FROM sqlite_master WHERE type = 'table'")
                      if not name.startswith(TOLERATED_TABLES)]
            if not tables:
                return MIGRATIONS[self.role]
            if ('name',) not in self._patiently("SELECT name FROM pragma_table_info('schema_migrations')"):
                raise MigrationError(f'{self.path} is an SQLite database of another program (it has a table {tables[0]!r}); '
                                     f'move it away or set TODOL_DATA')
            return self._pending()
        finally:
            self._disconnect()

    def _has_our_id(self):
        with contextlib.suppress(FileNotFoundError), open(self.path, 'rb') as file:
            return file.read(72)[68:] == APPLICATION_ID.to_bytes(4, 'big')

    def _pending(self):
        """The migrations that this file has not seen. Raises MigrationError if it has seen others."""
        applied = {name for name, in self._patiently('SELECT name FROM schema_migrations')}
        known = {name for name, _ in MIGRATIONS[self.role]}
        if applied - known:
            raise MigrationError(f'{self.path}: migration {min(applied - known)!r} is unknown here; the file is from a newer '
                                 f'todol, or another of its four files')
        return [(name, statement) for name, statement in MIGRATIONS[self.role] if name not in applied]

    def _migrate(self):
        self.execute('CREATE TABLE IF NOT EXISTS schema_migrations (name TEXT PRIMARY KEY, applied_at REAL NOT NULL)')
        pending = self._pending()           # looked at again: another process may have been faster
        for name, statement in pending:
            self.execute(statement)
            self.execute('INSERT INTO schema_migrations (name, applied_at) VALUES (?, now_s())', (name,))
        if pending:
            self.execute(f'PRAGMA application_id = {APPLICATION_ID}')
            log.info('migrated %s to %r', self.path, name)


class _Write:
    """A function that waits for its transaction, and what came of it."""
    __slots__ = ('function', 'value', 'error', 'done', 'alone')

    def __init__(self, function):
        self.function = function
        self.value = self.error = None
        self.done = False
        self.alone = False      # it, or a neighbour, failed in a group: it gets a transaction of its own

    def finish(self, value=None, error=None):
        self.value, self.error, self.done = value, error, True


class BootMark:
    """Lies beside a file that is written without fsync, and tells after a start of the machine whether that one is whole.

    It holds the boot id of the machine from before the first write until the last process that has the file open has
    closed and synced it. Each of them has a shared lock on the mark.
    """

    def __init__(self, database_path):
        self._database_path = database_path
        self._path = database_path + '-boot'
        self._directory = os.path.dirname(os.path.abspath(database_path))
        self._fd = None
        self._is_set = False

    def is_stale(self):
        """Whether the machine went down while the file was open. Raises OSError."""
        try:
            with open(self._path, 'rb') as file:
                return file.read() not in (b'', boot_id())
        except FileNotFoundError:
            return False

    def set(self):
        """Lock and write the mark. If it is stale, the file is deleted. Raises OSError and BusyError."""
        boot = boot_id()
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        if os.geteuid() == 0:       # a command that root runs for once makes it for who runs the app
            os.fchown(self._fd, os.stat(self._directory).st_uid, -1)
        deadline = time.monotonic() + BUSY_SECONDS
        while True:
            if self._lock(fcntl.LOCK_EX):       # nobody else has the file open
                if os.pread(self._fd, 100, 0) not in (b'', boot):
                    log.warning('%s was open when the machine went down; it may be torn, so it starts empty', self._database_path)
                    delete_files(self._database_path, DATABASE_SUFFIXES)
                    sync_to_disk(self._directory)
                self._write(boot)
            if self._lock(fcntl.LOCK_SH):
                held = os.pread(self._fd, 100, 0)
                if not held:                    # the last of the others closed the file meanwhile
                    self._write(boot)
                if held in (b'', boot):
                    self._is_set = True
                    return
            if time.monotonic() > deadline:
                raise BusyError(f'{self._path} was locked by another process for {BUSY_SECONDS} seconds')
            gevent.sleep(0.01)

    def release(self):
        """Unlock the mark; the last one syncs the file and empties the mark. Raises OSError, and leaves the mark then."""
        if self._fd is None:
            return
        try:
            if self._is_set and self._lock(fcntl.LOCK_EX):
                for path in (self._database_path, self._database_path + '-wal', self._directory):
                    with contextlib.suppress(FileNotFoundError):
                        sync_to_disk(path)
                os.ftruncate(self._fd, 0)
        finally:
            os.close(self._fd)
            self._fd = None

    def _write(self, boot):
        os.ftruncate(self._fd, os.pwrite(self._fd, boot, 0))
        os.fsync(self._fd)

    def _lock(self, kind):
        """Lock the mark, in the place of the lock that it has, and say whether that went."""
        try:
            fcntl.flock(self._fd, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False


def boot_id():
    """Names the time from one start of the machine to the next, in bytes; none where the system does not tell."""
    try:
        with open(BOOT_ID, 'rb') as file:
            return file.read()
    except OSError:
        return b''


def sync_to_disk(path):
    """fsync a file or a directory. Raises OSError."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def delete_files(path, suffixes):
    """Delete the files of a path with these suffixes, where there are some."""
    for suffix in suffixes:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path + suffix)


def is_busy(error):
    """Whether an error of sqlite3 means that somebody else holds the lock. (Error codes came with Python 3.11.)"""
    return isinstance(error, sqlite3.OperationalError) and ('locked' in str(error) or 'busy' in str(error))


def _refuse_to_switch():
    # gevent calls a greenlet's switch_out() before it lets another one run.
    raise RuntimeError('a transaction must not wait: this call would let other greenlets run before the commit')


app_db, cache_db, job_db, cable_db = (Database(role) for role in MIGRATIONS)


# === Processes: loops that go on, and a doorbell for neighbours =======================================================
# Several processes may share one data directory. What they tell each other is in the databases; the doorbell only says
# "look now". A loop that fails is logged and goes on; /up tells when one is failing.

RESTART_SECONDS = 1.0       # pause of a loop after an error
POLL_SECONDS = 2.0          # with neighbours, the databases are looked at this often even if no bell rings

loops = {}                  # name -> Loop, for /up


class Loop:
    """A greenlet that calls a function for ever. The function does one turn, waiting included."""

    def __init__(self, name, turn):
        self.name = name
        self.error = None           # of the last turn; None: it went well
        self._turn = turn
        self._greenlet = gevent.spawn(self._run)
        loops[name] = self

    def _run(self):
        while True:
            try:
                self._turn()
                self.error = None
            except Exception as error:
                self.error = error
                log.exception('loop failed, goes on name=%s', self.name)
                gevent.sleep(RESTART_SECONDS)

    @property
    def alive(self):
        return self.error is None and not self._greenlet.dead

    def stop(self):
        self._greenlet.kill()
        loops.pop(self.name, None)


class Doorbell:
    """A named pipe per process, beside the databases: a byte in it wakes that process within a millisecond.

    The byte says who shall look: the loop that wakes at it, or all, at b'*'. A pipe that nobody reads belongs to a dead
    process, so the pipes also tell who is alive. Where the file system has no named pipes nobody is heard, and
    POLL_SECONDS is how long a message may take.
    """

    def __init__(self):
        self.name = None            # of this process; also its name as a worker
        self.deaf = False           # no named pipes here
        self._path = self._fd = self._watcher = None
        self._pipes = {}            # name of a neighbour -> file descriptor
        self._seen_at = None        # the directory's time when it was last read
        self._events = {}           # byte -> the events that it sets

    def open(self, directory, prefix):
        self.name = f'{os.getpid()}-{secrets.token_hex(4)}'
        self._directory, self._prefix = directory, f'{prefix}.bell.'
        self._path = os.path.join(directory, self._prefix + self.name)
        try:
            # Made under another name, so that no neighbour finds it before it is read and takes it for dead.
            os.mkfifo(self._path + '.new', 0o600)
            self._fd = os.open(self._path + '.new', os.O_RDWR | os.O_NONBLOCK)
            os.rename(self._path + '.new', self._path)
        except (OSError, AttributeError) as error:
            self.deaf = True
            log.warning('no named pipes in %s, other processes are polled: %s', directory, error)
            return
        self._watcher = gevent.get_hub().loop.io(self._fd, 1)
        self._watcher.start(self._answer)
        self.ring()                 # the others learn that they are not alone

    def close(self):
        if self._watcher:
            self._watcher.stop()
            self._watcher.close()
        for fd in (self._fd, *self._pipes.values()):
            if fd is not None:
                os.close(fd)
        if self._fd is not None:
            os.unlink(self._path)
        self.__init__()

    def wakes(self, event, byte):
        """Set the event whenever a neighbour rings with the byte."""
        self._events.setdefault(byte, []).append(event)

    def ring(self, byte=b'*'):
        """Wake every other process. Costs a look at the directory's time when there is none."""
        known = dict(self._pipes)
        self._write(known, byte)        # first: the look takes a twentieth of the time until a message is there
        self._look()
        self._write({name: fd for name, fd in self._pipes.items() if name not in known}, byte)

    def neighbours(self):
        """The names of the other live processes; never empty where they can't be known."""
        if self.deaf:
            return {'unknown'}
        self._look()
        for name, fd in list(self._pipes.items()):
            poll = select.poll()
            poll.register(fd, 0)
            if poll.poll(0):            # an error: nobody reads it any more
                self._forget(name)
        return set(self._pipes)

    def patience(self):
        """How long a loop may sleep when nothing is due, in seconds; None: until the bell rings."""
        return POLL_SECONDS if self.neighbours() else None

    def _write(self, pipes, byte):
        for name, fd in pipes.items():
            try:
                os.write(fd, byte)
            except BlockingIOError:
                pass                # a full pipe wakes as well
            except OSError:
                self._forget(name)

    def _answer(self):
        rung = b'*'
        with contextlib.suppress(BlockingIOError):
            rung = os.read(self._fd, 4096)
        self._seen_at = None
        for byte, events in self._events.items():
            if byte in rung or b'*' in rung or len(rung) == 4096:     # where so many wait, some may not have fitted
                for event in events:
                    event.set()

    def _look(self):
        if self._fd is None:
            return
        now = os.stat(self._directory).st_mtime_ns
        if now == self._seen_at:
            return
        self._seen_at = now
        present = set()
        for file in os.listdir(self._directory):
            if not file.startswith(self._prefix) or file.endswith('.new'):
                continue
            name = file[len(self._prefix):]
            if name == self.name:
                continue
            present.add(name)
            if name not in self._pipes:
                path = os.path.join(self._directory, file)
                try:
                    self._pipes[name] = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
                except OSError as error:
                    if error.errno == errno.ENXIO:      # nobody reads: its process died
                        self._forget(name)
        for name in set(self._pipes) - present:
            self._forget(name)

    def _forget(self, name):
        fd = self._pipes.pop(name, None)
        if fd is not None:
            os.close(fd)
        with contextlib.suppress(OSError):
            os.unlink(os.path.join(self._directory, self._prefix + name))


doorbell = Doorbell()


# === Cache: what is dear to compute, and counters, kept in the cache database =========================================
# In front of the file is a dict, kept true between processes by a shared page of generations: a key falls into one of
# SLOTS, whoever commits a change of a key gives its slot a new number, and an entry of the dict counts only while its
# slot has the number it was read under. A hit costs no system call. set() is written behind, so a crash may lose the
# last FLUSH_SECONDS of it; incr() and add() are in the file when they return. The file is not synced: when the machine
# goes down, all is lost. Trouble with the file is a miss, never an error of the app.

CACHE_LIMIT_BYTES = 128 * 1024 * 1024
FRONT_LIMIT_BYTES = 16 * 1024 * 1024
FLUSH_SECONDS = 0.02
FOREVER_SECONDS = 400 * 86400       # the time to live where none is given
SLOTS = 4096
MAX_NOTED_USES = 1000               # wait to be written when something is evicted; more are not noted
MAX_PENDING = 10_000                # values that wait for a file that can't be written; more are dropped
REST_SECONDS = 1.0
EVICT_ROWS = 200                    # are looked at in one transaction when the file is full
PRUNE_ROWS = 500                    # are looked at in one turn of the event loop

UPSERT_ENTRY = '''
    INSERT INTO entries (key, number, value, is_json, expires_at, used_at) VALUES (?, ?, ?, ?, ?, ?)
    ON CONFLICT (key) DO UPDATE SET number = excluded.number, value = excluded.value, is_json = excluded.is_json,
                                    expires_at = excluded.expires_at, used_at = excluded.used_at'''
ADD_ENTRY = UPSERT_ENTRY + ' WHERE entries.expires_at <= excluded.used_at RETURNING id'
# A live counter keeps its window. An expired one, or a missing one, starts with a new window. excluded.used_at is now.
INCREMENT_ENTRY = '''
    INSERT INTO entries (key, number, value, is_json, expires_at, used_at) VALUES (?, ?, NULL, 0, ?, ?)
    ON CONFLICT (key) DO UPDATE SET
        number     = excluded.number + CASE WHEN entries.expires_at <= excluded.used_at THEN 0 ELSE entries.number END,
        expires_at = CASE WHEN entries.expires_at <= excluded.used_at THEN excluded.expires_at ELSE entries.expires_at END,
        value = NULL, is_json = 0, used_at = excluded.used_at
    WHERE entries.number IS NOT NULL OR entries.expires_at <= excluded.used_at
    RETURNING number'''
GET_ENTRY = 'SELECT number, value, is_json, expires_at FROM entries WHERE key = ? AND expires_at > ?'
ENTRIES_AFTER = 'SELECT max(id) FROM (SELECT id FROM entries WHERE id > ? ORDER BY id LIMIT ?) AS next'
PRUNE_ENTRIES = 'DELETE FROM entries WHERE id > ? AND id <= ? AND expires_at <= now_s() RETURNING id'
FIRST_ENTRIES = 'SELECT id, key, used_at, expires_at > now_s() FROM entries ORDER BY id LIMIT ?'
USE_ENTRY = 'UPDATE entries SET used_at = :at WHERE key = :key AND used_at < :at'
MOVE_ENTRY = 'UPDATE entries SET id = (SELECT max(id) FROM entries) + 1, used_at = now_s() WHERE id = ?'
EVICT_ENTRIES = 'DELETE FROM entries WHERE id <= ? RETURNING key'

_MISSING = object()


class CacheError(TodolError):
    """A key or value that the cache can't hold, or incr() of something that is not a whole number."""


class Cache:
    """Values by key, each with a time to live, in a bounded file: the first to come go first, unless they were used since.

    A value is bytes or anything that JSON has. What get() gives is the caller's own: changing it changes nothing here.
    """

    def __init__(self, database):
        self._db = database
        self.limit_bytes = CACHE_LIMIT_BYTES
        self.clock = time.time
        self._reset()

    def _reset(self):
        self._front = collections.OrderedDict()     # key -> _Entry, the last used at the end
        self._front_bytes = 0
        self._pending = {}                          # key -> _Entry not yet written; value _MISSING: to delete
        self._used = {}                             # key -> parameters of USE_ENTRY: when it was read from the file
        self._computing = {}                        # key -> AsyncResult, for fetch()
        self._dirty = gevent.event.Event()
        self._slots = self._map = self._loop = None
        self._resting_until = 0
        self._hits = self._misses = self._evicted = 0

    def open(self):
        """Start serving; the database is open already. The generations lie beside it."""
        path = self._db.path + '-generations'
        try:
            with open(path, 'r+b' if os.path.exists(path) else 'w+b') as file:
                if os.path.getsize(path) < SLOTS * 8:   # written out: a hole in it would kill the process on a full disk
                    file.write(bytes(SLOTS * 8))
                    file.flush()
                self._map = mmap.mmap(file.fileno(), SLOTS * 8)
        except OSError as error:
            raise StorageError(f'{path} can not be written: {error.strerror}') from None
        self._slots = memoryview(self._map).cast('Q')
        self._loop = Loop('cache', self._flush_later)

    def close(self):
        """Write what waits and stop."""
        self._loop.stop()
        self._flush()
        self._slots.release()
        self._map.close()
        self._reset()

    def get(self, key, default=None):
        """The value, or default if there is none or it has expired."""
        entry = self._front.get(key)
        now = self.clock()
        if entry is None or entry.expires_at <= now or self._slots[entry.slot] != entry.generation:
            entry = self._read(key, now)
            if entry is None:
                self._misses += 1
                return default
        else:
            self._front.move_to_end(key)
        entry.used_at = now
        self._hits += 1
        return json.loads(entry.value) if entry.is_json else entry.value    # own(), whose call is a tenth of a hit

    def get_many(self, keys):
        """A dict of those that are there."""
        found = ((key, self.get(key, _MISSING)) for key in keys)
        return {key: value for key, value in found if value is not _MISSING}

    def set(self, key, value, ttl=FOREVER_SECONDS):
        """Keep a value for ttl seconds. In the file, and seen by other processes, FLUSH_SECONDS later."""
        self._remember(key, self._entry(key, value, ttl))

    def set_many(self, values, ttl=FOREVER_SECONDS):
        """set() for each item of a dict."""
        for key, value in values.items():
            self.set(key, value, ttl)

    def delete(self, key):
        """Forget a value, if it is there."""
        self._forget(key)
        slot = slot_of(key)
        self._pending[key] = _Entry(_MISSING, 0, slot, self._slots[slot], self.clock(), False)
        self._dirty.set()

    def add(self, key, value, ttl=FOREVER_SECONDS):
        """Keep a value if the key has none, and say whether it was kept. Atomic between processes."""
        entry = self._entry(key, value, ttl)
        return self._through(key, lambda: bool(self._db.execute(ADD_ENTRY, entry.row(key))), otherwise=True)

    def incr(self, key, by=1, ttl=FOREVER_SECONDS):
        """Add to a whole number and give the sum. A missing or expired one starts at 0 with a new time to live; a live
        one keeps the time it has, so that a key is a fixed window. Atomic between processes. Raises CacheError."""
        now = self.clock()
        rows = self._through(key, lambda: self._db.execute(INCREMENT_ENTRY, (key, by, now + ttl, now)), otherwise=[(by,)])
        if not rows:
            raise CacheError(f'the value of {key!r} is not a whole number')
        return rows[0][0]

    def fetch(self, key, ttl, function):
        """The value, or else what the function gives, kept for ttl seconds. One greenlet computes, others wait for it;
        they get its exception too."""
        while True:
            value = self.get(key, _MISSING)
            if value is not _MISSING:
                return value
            if key not in self._computing:
                break
            entry = self._computing[key].get()
            if entry is not None:
                return entry.own()
        result = self._computing[key] = gevent.event.AsyncResult()
        try:
            entry = self._entry(key, function(), ttl)
            self._remember(key, entry)
            result.set(entry)
            return entry.own()
        except Exception as error:
            result.set_exception(error)
            raise
        finally:
            del self._computing[key]
            if not result.ready():      # killed: one of those who wait computes
                result.set(None)

    def clear(self):
        """Forget everything."""
        self._front.clear()
        self._front_bytes = 0
        self._pending.clear()
        self._forgiving(lambda: self._db.execute('DELETE FROM entries'))
        for slot in range(SLOTS):
            self._slots[slot] = time.perf_counter_ns()

    def prune(self):
        """Delete what has expired, and give the number of it. Looks at every entry, some at a time."""
        gone = after = 0
        while after is not None:
            (last,), = self._forgiving(lambda: self._db.execute(ENTRIES_AFTER, (after, PRUNE_ROWS)), otherwise=[(None,)])
            if last is not None:
                gone += len(self._forgiving(lambda: self._db.execute(PRUNE_ENTRIES, (after, last)), otherwise=()))
                gevent.sleep(0)
            after = last
        return gone

    def stats(self):
        """Counts since the start, and what the file holds now."""
        entries = self._forgiving(lambda: self._db.execute('SELECT count(*) FROM entries')[0][0], otherwise=None)
        return {'hits': self._hits, 'misses': self._misses, 'evicted': self._evicted, 'entries': entries,
                'bytes': self._forgiving(self._size_bytes), 'limit_bytes': self.limit_bytes,
                'front_entries': len(self._front), 'front_bytes': self._front_bytes}

    def _entry(self, key, value, ttl):
        now = self.clock()
        slot = slot_of(key)
        if not now + ttl > 0:           # it is NaN
            raise CacheError(f'the time to live of {key!r} must be a number of seconds, not {ttl!r}')
        is_json = not isinstance(value, (bytes, str, float, type(None))) and type(value) not in (int, bool)
        if is_json:
            try:
                value = compact_json(value)
            except (TypeError, ValueError) as error:
                raise CacheError(f'the value of {key!r} must be bytes or what JSON has: {error}') from None
        return _Entry(value, now + ttl, slot, self._slots[slot], now, is_json)

    def _read(self, key, now):
        """The entry from what waits to be written or from the file, put in the front; None if there is none."""
        entry = self._pending.get(key)
        if entry is not None:
            return entry if entry.value is not _MISSING and entry.expires_at > now else None
        self._forget(key)
        slot = slot_of(key)
        generation = self._slots[slot]      # before the read: a change after it makes the entry count for nothing
        rows = self._forgiving(lambda: self._db.execute(GET_ENTRY, (key, now)), otherwise=())
        if not rows:
            return None
        number, value, is_json, expires_at = rows[0]
        if number is not None:
            value = number
        elif is_json:
            value = value.decode()
            if value[0] not in '[{':        # can't be changed by who gets it: kept decoded
                value, is_json = json.loads(value), False
        entry = _Entry(value, expires_at, slot, generation, now, bool(is_json))
        self._keep_in_front(key, entry)
        if len(self._used) < MAX_NOTED_USES:
            self._used[key] = {'key': key, 'at': now}
        return entry

    def _remember(self, key, entry):
        self._pending[key] = entry
        self._keep_in_front(key, entry)
        self._dirty.set()

    def _keep_in_front(self, key, entry):
        self._forget(key)
        self._front[key] = entry
        self._front_bytes += entry.size
        while self._front_bytes > FRONT_LIMIT_BYTES:
            _, dropped = self._front.popitem(last=False)
            self._front_bytes -= dropped.size

    def _forget(self, key):
        entry = self._front.pop(key, None)
        if entry is not None:
            self._front_bytes -= entry.size

    def _through(self, key, write, otherwise):
        """A write that is in the file when it returns, after everything of that key before it. Its statements are atomic
        each, and cost a fifth less than in a transaction."""
        if key in self._pending:
            self._flush()
        slot = slot_of(key)
        result = self._forgiving(write, otherwise)
        self._forget(key)
        self._slots[slot] = time.perf_counter_ns()
        self._dirty.set()               # it may have filled the file
        return result

    def _flush_later(self):
        self._dirty.wait()
        gevent.sleep(FLUSH_SECONDS)
        self._dirty.clear()
        if not self._flush():
            gevent.sleep(REST_SECONDS)
            self._dirty.set()

    def _flush(self):
        """Write what waits, in one transaction, then tell the other processes and make room. Says whether it was written."""
        batch = dict(self._pending)
        if batch and not self._forgiving(lambda: self._db.transact(self._write_entries, batch), otherwise=False):
            if len(self._pending) > MAX_PENDING:
                self._pending.clear()
            return False
        for key, entry in batch.items():
            # The front's entry does not get this number: another process may have written after the commit.
            self._slots[entry.slot] = time.perf_counter_ns()
            if self._pending.get(key) is entry:         # not set again meanwhile
                del self._pending[key]
        self._forgiving(self._make_room)
        return True

    def _write_entries(self, batch):
        self._db.executemany(UPSERT_ENTRY, [entry.row(key) for key, entry in batch.items() if entry.value is not _MISSING])
        self._db.executemany('DELETE FROM entries WHERE key = ?',
                             [(key,) for key, entry in batch.items() if entry.value is _MISSING])
        return True

    def _make_room(self):
        """Evict from a full file until a hundredth of it is free, some entries in a transaction."""
        full = self._size_bytes() > self.limit_bytes
        while full and (size := self._size_bytes()) > self.limit_bytes * 0.99:
            if size <= self.limit_bytes:            # the rest has time
                gevent.sleep(0)
            full = gone = self._db.transact(self._evict)
            self._evicted += len(gone)
            for key, in gone:
                self._forget(key)
                self._slots[slot_of(key)] = time.perf_counter_ns()

    def _evict(self):
        """Look at the first entries: those used since they came come again, as the last, the others go. Gives their keys.

        Used since means later than the last use of one that came after it. It hits more often than to evict the least
        recently used of all (0.749 and 0.743, Zipf in a file ten times too small), and needs no index by use.
        """
        self._db.executemany(USE_ENTRY, [self._used.popitem()[1] for _ in range(min(EVICT_ROWS, len(self._used)))])
        (entries,), = self._db.execute('SELECT count(*) FROM (SELECT 1 FROM entries LIMIT ?) AS counted', (20 * EVICT_ROWS,))
        rows = self._db.execute(FIRST_ENTRIES, (entries // 20 + 2,))
        used, least = [], float('inf')
        for id, key, used_at, live in reversed(rows):
            if key in self._front:
                used_at = max(used_at, self._front[key].used_at)
            if live and used_at > least + 2 * FLUSH_SECONDS:        # so long may a set() wait while others come
                used.append((used_at, id))
            least = min(least, used_at)
        # At most three quarters stay, else much work could free little. The last tenth is there to be compared with.
        self._db.executemany(MOVE_ENTRY, [(id,) for _, id in sorted(used)[-(len(rows) * 3 // 4):]])
        return self._db.execute(EVICT_ENTRIES, rows[len(rows) * 9 // 10][:1]) if rows else ()

    def _size_bytes(self):
        (pages,), (free,), (size,) = (self._db.execute(f'PRAGMA {name}')[0]
                                      for name in ('page_count', 'freelist_count', 'page_size'))
        return (pages - free) * size

    def _forgiving(self, work, otherwise=None):
        """Work on the file; when that fails, the file is left alone for REST_SECONDS: a locked one costs a wait each time."""
        if time.monotonic() < self._resting_until:
            return otherwise
        try:
            return work()
        except StorageError as error:
            self._resting_until = time.monotonic() + REST_SECONDS
            log.error('cache unusable, taken as a miss: %s', error)
            return otherwise


class _Entry:
    """A value as the front has it."""
    __slots__ = ('value', 'expires_at', 'slot', 'generation', 'used_at', 'is_json', 'size')

    def __init__(self, value, expires_at, slot, generation, used_at, is_json):
        self.value = value              # JSON text if is_json, else the value itself, which nobody can change
        self.expires_at = expires_at
        self.slot = slot
        self.generation = generation    # of the slot when the value was true
        self.used_at = used_at
        self.is_json = is_json
        self.size = 200 + (len(value) if isinstance(value, (bytes, str)) else 32)

    def own(self):
        """The value, as a copy that whoever asked may change."""
        return json.loads(self.value) if self.is_json else self.value

    def row(self, key):
        """The parameters of UPSERT_ENTRY."""
        value = self.value
        if type(value) is int and -2**63 <= value < 2**63:
            return key, value, None, 0, self.expires_at, self.used_at
        if isinstance(value, bytes):
            return key, None, value, 0, self.expires_at, self.used_at
        text = value if self.is_json else json.dumps(value)
        return key, None, text.encode(), 1, self.expires_at, self.used_at


def slot_of(key):
    """The slot of a key: the same in every process, unlike hash(). Raises CacheError if it can't be a key."""
    try:
        return zlib.crc32(key.encode()) % SLOTS
    except (AttributeError, UnicodeEncodeError):
        raise CacheError(f'a cache key must be a string, without lone surrogates, not {key!r}') from None


cache = Cache(cache_db)


# === Jobs: work for later, kept in the job database ===================================================================
# A job runs at least once: its row goes when it is done, and a worker only leases it. A job enqueued in a transaction
# of the app database is first a row of the outbox there, because a commit over two files is not atomic; one greenlet,
# the dispatcher, moves such rows to the job database (inserted once, by their uid), takes what is due and deletes what
# is done, all in one transaction. It sleeps until a bell rings or something falls due: it does not poll. A new job that
# nothing else is due before starts at once, where it was inserted.

QUEUES = {'urgent': 6, 'default': 3, 'low': 1}      # name: weight; how often it is looked at first
LEASE_SECONDS = 15          # a dead worker's jobs wait no longer; a live one renews at a third of it
STOP_SECONDS = 5            # running jobs may go on so long when the process stops
KEEP_FAILED_SECONDS = 10 * 86400
OUTBOX_ROWS = 200           # are moved in one transaction; to broadcast so many changes takes 6 ms
CROWD_PAUSE_SECONDS = 0.001     # at least, after moving several: what comes by the outbox then shares the next transaction
MAX_BACKOFF_SECONDS = 3600
SLICE_SECONDS = 0.005       # jobs that do not wait run one after another so long, then others have a turn

INSERT_OUTBOX = 'INSERT INTO outbox (job) VALUES (?)'
# A job behind another of its order key is not due until that one is gone. Any other may start its life with a lease of
# the worker, if that is given: it runs without a turn of the dispatcher, after 0.7 ms in 99 of 100 cases instead of 5.
INSERT_JOB = '''
    INSERT INTO jobs (uid, name, arguments, queue, unique_key, order_key, run_at, enqueued_at, due_at, worker, attempt)
    SELECT :uid, :name, :arguments, :queue, :unique_key, :order_key, :run_at, now_s(),
           CASE WHEN blocked THEN NULL WHEN :worker IS NULL THEN :run_at ELSE now_s() + :lease END,
           CASE WHEN NOT blocked THEN :worker END,
           CASE WHEN blocked OR :worker IS NULL THEN 0 ELSE 1 END
    FROM (SELECT :order_key IS NOT NULL
             AND EXISTS (SELECT 1 FROM jobs WHERE order_key = :order_key AND failed_at IS NULL) AS blocked) AS state
    WHERE true
    ON CONFLICT DO NOTHING
    RETURNING id, attempt'''
CLAIM_JOBS = '''
    UPDATE jobs SET due_at = now_s() + :lease, worker = :worker, attempt = attempt + 1
    WHERE id IN (SELECT id FROM jobs WHERE queue = :queue AND due_at <= now_s() ORDER BY due_at, id LIMIT :limit)
    RETURNING id, name, arguments, attempt, order_key, run_at'''
FIRST_DUE = 'SELECT min(due_at) FROM jobs WHERE queue = ? AND due_at IS NOT NULL'    # in the words of the index
OF_LEASE = 'WHERE id = :id AND worker = :worker AND attempt = :attempt AND run_at = :run_at'
RENEW_LEASE = f'UPDATE jobs SET due_at = now_s() + :lease {OF_LEASE}'
FINISH_JOB = f'DELETE FROM jobs {OF_LEASE}'
# A lease is due within LEASE_SECONDS, so the index by due time finds those of others, however many jobs wait for later.
LEASED_BY = '''
    SELECT DISTINCT worker FROM jobs
    WHERE queue = :queue AND due_at > now_s() AND due_at <= now_s() + :lease AND worker IS NOT NULL'''
FREE_JOBS = '''
    UPDATE jobs SET due_at = now_s(), worker = NULL
    WHERE queue = :queue AND due_at > now_s() AND due_at <= now_s() + :lease AND worker = :worker'''
RETRY_JOB = f'''
    UPDATE jobs SET due_at = now_s() + :delay, worker = NULL, error = :error
    {OF_LEASE}'''
PARK_JOB = f'''
    UPDATE jobs SET due_at = NULL, worker = NULL, failed_at = now_s(), error = :error
    {OF_LEASE} RETURNING id'''
RELEASE_JOB = f'''
    UPDATE jobs SET due_at = now_s(), worker = NULL, attempt = attempt - 1
    {OF_LEASE}'''
UNBLOCK_NEXT = '''
    UPDATE jobs SET due_at = run_at
    WHERE id = (SELECT min(id) FROM jobs WHERE order_key = ? AND failed_at IS NULL) AND due_at IS NULL'''
# One that is due later than its period says was registered with a longer one.
START_RECURRING = '''
    INSERT INTO recurring (name, due_at) VALUES (?, now_s() + ?)
    ON CONFLICT (name) DO UPDATE SET due_at = excluded.due_at WHERE excluded.due_at < recurring.due_at'''
# A parked job of an order key that has others waiting goes behind the one that is being run.
UNPARK_JOB = '''
    UPDATE jobs SET failed_at = NULL, attempt = 0, run_at = now_s(),
                    due_at = CASE WHEN EXISTS (SELECT 1 FROM jobs AS other
                                               WHERE other.order_key = jobs.order_key AND other.failed_at IS NULL)
                                  THEN NULL ELSE now_s() END
    WHERE id = ? AND failed_at IS NOT NULL RETURNING id'''


class JobError(TodolError):
    """A job that can't be enqueued, or run: unknown name or queue, arguments that JSON does not have."""


# A leased job. arguments: JSON object; attempt: 1 for the first; order_key: or None.
Job = collections.namedtuple('Job', 'id name arguments attempt order_key run_at')
# What is registered under a job's name.
_Task = collections.namedtuple('_Task', 'function queue attempts retry_seconds timeout_seconds batch')


def parse_all(texts):
    """The values of several texts of JSON. Parsed in one call each costs half."""
    return json.loads(f'[{",".join(texts)}]')


class Jobs:
    """Register functions with @jobs.job() and run them later with jobs.enqueue(name, {arguments})."""

    def __init__(self, database, outbox):
        self._db = database
        self._app_db = outbox           # the database whose transactions may enqueue
        self._tasks = {}
        self._recurring = {}            # name -> seconds
        self.workers = 20
        self._reset()

    def _reset(self):
        self._worker = None
        self._bell = gevent.event.Event()
        self._relayed = []              # ids of the outbox rows that are in the job database
        self._running = set()           # jobs that are leased and have not ended
        self._busy = 0                  # workers that have one of them, or a batch
        self._started = collections.deque()     # lists of those that no greenlet has taken yet
        self._greenlets = set()
        self._called = False            # a greenlet is about to look for such a list
        self._backlog = True            # jobs that are due may be waiting for a worker: no other one may overtake them
        self._settled = []              # (Job, outcome, error): what became of jobs since the last exchange
        self._renewed_at = 0
        self._alive = None              # the names of the live processes when the leases of others were looked at
        self._loop = None

    # Registering

    def job(self, queue='default', attempts=5, retry_seconds=2.0, timeout_seconds=300.0, batch=False):
        """A decorator: register the function under its name.

        It is called with the job's arguments as keywords, possibly more than once. A failure is tried again after
        retry_seconds, twice that, and so on, with some jitter; after so many attempts the job is parked.
        batch: call it once for all its jobs that start together, with a list of their arguments (dicts) instead, by one
        worker. If that fails, each of them runs alone.
        """
        if queue not in QUEUES:
            raise JobError(f'queue {queue!r} is not one of {", ".join(QUEUES)}')

        def register(function):
            self._tasks[function.__name__] = _Task(function, queue, attempts, retry_seconds, timeout_seconds, batch)
            return function
        return register

    def every(self, seconds, **options):
        """A decorator: register the function and run it every so many seconds, in one process of all."""
        def register(function):
            self._recurring[function.__name__] = seconds
            return self.job(**options)(function)
        return register

    # Enqueueing

    def enqueue(self, name, arguments=None, *, delay_seconds=0.0, queue=None, unique_key=None, order_key=None):
        """Run a job later. In a transaction of the app database it is part of that transaction.

        arguments: a dict that JSON has. unique_key: while an unfinished job has it, this one is dropped. order_key:
        jobs that share it run in order, one at a time. queue: one of QUEUES instead of the function's own. Raises
        JobError.
        """
        task = self._tasks.get(name)
        if task is None:
            raise JobError(f'no job is registered as {name!r}; there are {", ".join(sorted(self._tasks)) or "none"}')
        queue = queue or task.queue
        if queue not in QUEUES:
            raise JobError(f'queue {queue!r} is not one of {", ".join(QUEUES)}')
        try:
            arguments = json.dumps(arguments or {})
        except (TypeError, ValueError) as error:
            raise JobError(f'the arguments of {name} must be what JSON has: {error}') from None
        row = {'uid': None, 'name': name, 'arguments': arguments, 'queue': queue,
               'unique_key': unique_key, 'order_key': order_key, 'run_at': self._db.clock() + delay_seconds}
        if self._app_db.in_transaction:
            self._app_db.execute(INSERT_OUTBOX, (json.dumps({**row, 'uid': secrets.token_hex(12)}),))
            self._bell.set()            # the dispatcher wakes after the commit: nothing switches before it
        else:
            due = delay_seconds <= 0
            lease = due and self._may_start() and not self._db.in_transaction
            job = self._insert(row, lease)
            if not job:
                self._backlog |= due and not lease
                self._wake()
            elif self._may_start():
                self._start([job])
                if len(self._running) == 1:
                    self._bell.set()        # the dispatcher may sleep for ever, and has a lease to renew now
            else:                           # the insert had to wait for the file, and others were faster
                self._settled.append((job, 'released', None))
                self._wake()

    # Running

    def open(self, worker, workers):
        """Start running jobs. worker: the name of this process, as others see it. workers: how many at once."""
        self._worker, self.workers = worker, workers
        doorbell.wakes(self._bell, b'j')
        self._db.transact(self._start_recurring)
        unserved = [queue for queue in self._queues() if queue not in QUEUES]
        if unserved:
            log.warning('jobs wait in queues that nobody serves: %s; served are %s', ', '.join(unserved), ', '.join(QUEUES))
        self._bell.set()
        self._loop = Loop('jobs', self._turn)

    def close(self, stop_seconds=STOP_SECONDS):
        """Take no more jobs, let the running ones end, give back the rest for the next process to run at once."""
        self._loop.stop()
        self._backlog = True            # what is enqueued from here on waits
        with gevent.Timeout(stop_seconds, False):
            while self._running:
                self._bell.clear()
                self._bell.wait()
        self._settled += [(job, 'released', None) for batch in self._started for job in batch]
        self._started.clear()
        with gevent.Timeout(1, False):
            gevent.killall(list(self._greenlets))
        self._empty_outbox()
        self._db.transact(self._settle, self._settled)
        self._reset()
        doorbell.ring(b'j')

    def names(self):
        """The names of the registered jobs."""
        return set(self._tasks)

    def stats(self):
        """How many jobs wait, run and are parked."""
        (ready,), (running,), (failed,) = (self._db.execute(statement)[0] for statement in (
            'SELECT count(*) FROM jobs WHERE worker IS NULL AND failed_at IS NULL',
            'SELECT count(*) FROM jobs WHERE worker IS NOT NULL', 'SELECT count(*) FROM jobs WHERE failed_at IS NOT NULL'))
        return {'waiting': ready, 'running': running, 'failed': failed}

    def failed(self, limit=100):
        """The parked jobs, the last first: tuples of id, name, arguments (JSON), attempts, failed_at, error."""
        return self._db.execute('SELECT id, name, arguments, attempt, failed_at, error FROM jobs '
                                'WHERE failed_at IS NOT NULL ORDER BY failed_at DESC LIMIT ?', (limit,))

    def retry(self, id):
        """Run a parked job again, with all its attempts. Raises JobError if it is not parked."""
        try:
            found = self._db.execute(UNPARK_JOB, (id,))
        except sqlite3.IntegrityError:
            raise JobError(f'job {id} can not run again now: another job has its unique key') from None
        if not found:
            raise JobError(f'there is no failed job {id}')
        self._wake()

    def discard(self, id):
        """Delete a parked job. Raises JobError if it is not parked."""
        if not self._db.execute('DELETE FROM jobs WHERE id = ? AND failed_at IS NOT NULL RETURNING id', (id,)):
            raise JobError(f'there is no failed job {id}')

    def prune(self):
        """Delete the jobs that were parked more than KEEP_FAILED_SECONDS ago, and give the number of them."""
        return len(self._db.execute('DELETE FROM jobs WHERE failed_at < now_s() - ? RETURNING id', (KEEP_FAILED_SECONDS,)))

    def _wake(self):
        self._bell.set()
        doorbell.ring(b'j')

    def _queues(self):
        """The names of the queues that have jobs; a few look-ups in the index, however many jobs there are."""
        found, queue = [], ''
        while queue is not None:
            (queue,), = self._db.execute('SELECT min(queue) FROM jobs WHERE queue > ? AND due_at IS NOT NULL', (queue,))
            found += [queue] if queue else []
        return found

    def _start_recurring(self):
        for name, seconds in self._recurring.items():
            self._db.execute(START_RECURRING, (name, seconds))

    def _turn(self):
        """One turn of the dispatcher: exchange with the databases, start what was claimed, sleep."""
        self._bell.clear()
        self._empty_outbox()            # if it failed the last time
        settled, self._settled = self._settled, []
        try:
            self._relayed, claimed, next_due, self._alive = self._db.transact(self._exchange, settled)
            settled = []
            for batch in claimed:
                self._start(batch)
        except BaseException:
            self._settled = settled + self._settled
            raise
        now = self._db.clock()
        self._backlog = next_due is not None and next_due <= now
        free = self._busy < self.workers
        more = len(self._relayed) == OUTBOX_ROWS or (self._backlog and free and claimed)
        crowd = len(self._relayed) > 1
        self._empty_outbox()
        if more:
            return gevent.sleep(0)
        if crowd:       # who asks comes first, for a while: a quarter more changes a second
            gevent.sleep(CROWD_PAUSE_SECONDS)
            with gevent.Timeout(4 * CROWD_PAUSE_SECONDS, False):
                gevent.idle()
        patience = POLL_SECONDS if self._alive != {self._worker} else None      # doorbell.patience() would look once more
        if next_due is not None and (free or not self._backlog):    # else the next one to end rings the bell
            due = max(next_due - now, 0.001)
            patience = due if patience is None else min(due, patience)
        if self._running:
            patience = min(patience or LEASE_SECONDS, LEASE_SECONDS / 3)
        self._bell.wait(patience)

    def _empty_outbox(self):
        """Delete what was moved from it: before the next exchange, or a job that ends in that one would be moved again."""
        if self._relayed:
            self._app_db.transact(self._app_db.executemany, 'DELETE FROM outbox WHERE id = ?', self._relayed)
            self._relayed = []

    def _insert(self, row, lease):
        """Insert a job. Gives it if it got a lease of this process, and is to be started."""
        inserted = self._db.execute(INSERT_JOB, {**row, 'worker': self._worker if lease else None, 'lease': LEASE_SECONDS})
        if inserted and inserted[0][1]:
            return Job(inserted[0][0], row['name'], row['arguments'], 1, row['order_key'], row['run_at'])

    def _may_start(self):
        """Whether a new job can start at once, without overtaking one that waits."""
        return not self._backlog and self._busy < self.workers

    def _join(self, batches, job):
        """Put a job to those that run with it. One that was tried before runs alone: it may be what ends the others."""
        task = self._tasks.get(job.name)
        joins = task and task.batch and job.attempt == 1
        batches.setdefault(job.name if joins else job.id, []).append(job)

    def _start(self, batch):
        self._running.update(batch)
        self._busy += 1
        self._started.append(batch)
        self._call()

    def _call(self):
        """See to it that a greenlet takes what is started."""
        if self._started and not self._called:
            self._called = True
            greenlet = gevent.Greenlet(self._work)
            self._greenlets.add(greenlet)
            greenlet.start()

    def _work(self):
        """Run what is started. If a job waits, another greenlet goes on with the rest. Those that do not wait share one, for
        SLICE_SECONDS: 12 us less for each of them."""
        self._called = False
        ends_at = time.monotonic() + SLICE_SECONDS
        while self._started:
            batch = self._started.popleft()
            self._call()
            self._perform(batch)
            if time.monotonic() > ends_at:
                break
        self._greenlets.discard(gevent.getcurrent())

    def _exchange(self, settled):
        """In one transaction: settle what ended, renew, give back, claim, insert what the outbox holds.

        Gives the outbox rows that were moved, the claimed jobs in lists of those that run together, the time when the next
        one falls due (None: never), and the names of the live processes. A batch takes one worker, however long it is:
        with one for each of its jobs, those that HTTP clients enqueue as fast as they can run seconds late.
        The outbox is read under the lock of the job database, and its rows go before their jobs can end: so a neighbour
        that reads it too can't insert a job that is done already.
        """
        outbox = self._app_db.execute('SELECT id, job FROM outbox ORDER BY id LIMIT ?', (OUTBOX_ROWS,))
        free = self.workers - self._busy
        self._settle(settled)
        self._renew_leases()
        alive = doorbell.neighbours() | {self._worker}      # under the lock: who takes a job has its pipe before
        if alive != self._alive and not doorbell.deaf:
            self._free_dead_workers(alive)
        now = self._db.clock()
        claimed, times = {}, []
        for name, due_at in self._db.execute('SELECT name, due_at FROM recurring'):
            if name in self._recurring:
                if due_at <= now:
                    due_at = now + self._recurring[name]
                    self._db.execute('UPDATE recurring SET due_at = ? WHERE name = ?', (due_at, name))
                    self._insert({'uid': None, 'name': name, 'arguments': '{}', 'order_key': None, 'run_at': now,
                                  'queue': self._tasks[name].queue, 'unique_key': f'every {name}'}, lease=False)
                times.append(due_at)
        for queue in sorted(QUEUES, key=lambda name: random.random() ** (1 / QUEUES[name]), reverse=True):
            (due_at,), = self._db.execute(FIRST_DUE, (queue,))
            if due_at is not None and due_at <= now and free > len(claimed):
                rows = self._db.execute(CLAIM_JOBS, {'queue': queue, 'limit': free - len(claimed), 'worker': self._worker,
                                                     'lease': LEASE_SECONDS})
                for row in sorted(rows):
                    self._join(claimed, Job(*row))
                (due_at,), = self._db.execute(FIRST_DUE, (queue,))
            times.append(due_at)
        for row in parse_all(row for _, row in outbox):
            lease = row['run_at'] <= now and (free > len(claimed) or row['name'] in claimed)
            job = self._insert(row, lease)
            if job:
                self._join(claimed, job)
            elif not lease:
                times.append(row['run_at'])
        next_due = min((at for at in times if at is not None), default=None)
        return [(id,) for id, _ in outbox], list(claimed.values()), next_due, alive

    def _settle(self, settled):
        # Most are done; deleted in one call they cost half.
        self._db.executemany(FINISH_JOB, [self._lease(job) for job, outcome, _ in settled if outcome == 'done'])
        for job, outcome, error in settled:
            task = self._tasks.get(job.name)
            if outcome == 'released':
                self._db.execute(RELEASE_JOB, self._lease(job))
            elif outcome == 'failed' and task and job.attempt < task.attempts:
                delay = min(task.retry_seconds * 2 ** (job.attempt - 1), MAX_BACKOFF_SECONDS) * random.uniform(0.8, 1.2)
                self._db.execute(RETRY_JOB, {**self._lease(job), 'delay': delay, 'error': error})
            elif outcome == 'failed' and self._db.execute(PARK_JOB, {**self._lease(job), 'error': error}):
                log.error('job parked after its last attempt id=%s name=%s attempts=%s', job.id, job.name, job.attempt)
        # Changes nothing where the first of the key is still there: that one is not blocked.
        self._db.executemany(UNBLOCK_NEXT, [(job.order_key,) for job, *_ in settled if job.order_key is not None])

    def _lease(self, job):
        """What identifies the lease of a job that this process took: the parameters of OF_LEASE."""
        return {'id': job.id, 'worker': self._worker, 'attempt': job.attempt, 'run_at': job.run_at}

    def _renew_leases(self):
        now = time.monotonic()
        if self._running and now - self._renewed_at > LEASE_SECONDS / 3.5:
            self._renewed_at = now
            self._db.executemany(RENEW_LEASE, [{**self._lease(job), 'lease': LEASE_SECONDS} for job in self._running])

    def _free_dead_workers(self, alive):
        """Give back at once what a dead process had leased; where the dead can't be known, the lease runs out."""
        for queue in self._queues():
            leases = {'queue': queue, 'lease': LEASE_SECONDS}
            for worker in {name for name, in self._db.execute(LEASED_BY, leases)} - alive:
                self._db.execute(FREE_JOBS, {**leases, 'worker': worker})
                log.warning('gave back the jobs of a dead process worker=%s queue=%s', worker, queue)

    def _perform(self, batch):
        name, attempt = batch[0].name, batch[0].attempt
        task = self._tasks.get(name)
        outcome, error = 'failed', None
        try:
            if task is None:
                raise JobError(f'no job is registered as {name!r}; was it renamed?')
            if attempt > task.attempts:         # it was leased so often and never came back
                raise JobError(f'its worker died {attempt - 1} times while it ran')
            arguments = parse_all(job.arguments for job in batch)
            with gevent.Timeout(task.timeout_seconds):
                task.function(arguments) if task.batch else task.function(**arguments[0])
            outcome = 'done'
        except gevent.GreenletExit:
            outcome = 'released'
        except BaseException as failure:        # sys.exit() too: a job must not end the process
            error = traceback.format_exc()
            ids = ','.join(str(job.id) for job in batch)
            log.error('job failed id=%s name=%s attempt=%s error=%r', ids, name, attempt, failure)
        finally:
            self._busy -= 1
            if outcome == 'failed' and len(batch) > 1:
                for job in batch:
                    self._start([job])
            else:
                for job in batch:
                    self._settled.append((job, outcome, error))
                    self._running.discard(job)          # before the bell: the dispatcher counts who is free
                self._bell.set()


jobs = Jobs(job_db, outbox=app_db)


@jobs.every(3600, queue='low')
def tidy_up():
    """Delete what has had its time: expired cache entries, old failures."""
    log.info('tidied up cache=%s jobs=%s', cache.prune(), jobs.prune())


# === Cable: messages to whoever listens, kept for a while in the cable database =======================================
# The log is the only way: broadcast() appends to it, and everybody, this process included, delivers what is new in it,
# in its order. A position is "epoch:id"; who comes back with one gets what was missed, or hears that the log no longer
# reaches back so far. Nor does it after a power loss: the file is not synced.

KEEP_MESSAGES_SECONDS = 600
KEEP_MESSAGES = 20_000
TRIM_EVERY = 128                # messages
DELIVER_ROWS = 500
REPLAY_MESSAGES = 200           # more than that, and a fresh page is cheaper

# Ids are in the order of time: the first that is young enough is found after reading what goes, and nothing else.
TRIM_MESSAGES = '''
    DELETE FROM messages
    WHERE id < coalesce((SELECT id FROM messages WHERE created_at >= now_s() - ? ORDER BY id LIMIT 1), ?)'''


class PositionLost(TodolError):
    """The log does not reach back to a position: messages may have been missed."""


# A row of the log. payload: JSON.
Message = collections.namedtuple('Message', 'id stream payload created_at')


class Cable:
    """Streams by name; a message is anything that JSON has."""

    def __init__(self, database):
        self._db = database
        self._reset()

    def _reset(self):
        self._subscribers = {}          # stream -> set of functions
        self._last = 0                  # id of the last message delivered here
        self._bell = gevent.event.Event()
        self._loop = None
        self.epoch = None               # names the file: positions of another one mean nothing here

    def open(self):
        """Start delivering what is appended from now on."""
        self._db.transact(self._name_epoch)
        (self.epoch,), = self._db.execute('SELECT epoch FROM epochs')
        self._last = self._end()
        doorbell.wakes(self._bell, b'c')
        self._loop = Loop('cable', self._turn)

    def close(self):
        self._loop.stop()
        self._reset()

    def broadcast(self, stream, message):
        """Append a message to the log and deliver it. Gives its id when it is in the log.

        message: what JSON has, or a function that gives it. The function is called under the lock of the log: what it reads
        elsewhere is newer than all that the log has, so that messages which tell a state stand in the order of the states.
        """
        return self.broadcast_all([(stream, message)])[0]

    def broadcast_all(self, messages):
        """broadcast() for each (stream, message) of a list, in one transaction. Gives their ids."""
        if len(messages) == 1 and not callable(messages[0][1]):     # its statement is a transaction of its own
            ids = [self._append(*messages[0])]
        else:
            ids = self._db.transact(lambda: [self._append(stream, message) for stream, message in messages])
        doorbell.ring(b'c')             # first: the other processes have further to go
        if ids and ids[-1] > self._last:    # else a neighbour in the transaction was faster, and delivered these too
            self._deliver()
        return ids

    def position(self):
        """Where the log stands: read it before the state that a page shows, and subscribe with it."""
        return f'{self.epoch}:{self._last}'

    def subscribe(self, stream, receive):
        """Call receive(message) for each new message of a stream, in order. It must neither wait nor broadcast."""
        self._subscribers.setdefault(stream, set()).add(receive)

    def unsubscribe(self, stream, receive):
        """Stop it; harmless if it never started."""
        receivers = self._subscribers.get(stream, set())
        receivers.discard(receive)
        if not receivers:
            self._subscribers.pop(stream, None)

    def since(self, stream, position):
        """The messages of a stream after a position, up to what is delivered to subscribers. Raises PositionLost.

        Nothing is delivered between its last look and its return, so who goes live at once misses nothing.
        """
        epoch, _, id = position.rpartition(':')
        if epoch != self.epoch or not re.fullmatch('[0-9]{1,18}', id):
            raise PositionLost(f'{position!r} is not a position of this log')
        (first, end), = self._db.execute('SELECT coalesce((SELECT min(id) FROM messages), 1), '
                                         'coalesce((SELECT max(id) FROM messages), 0)')
        if not first - 1 <= int(id) <= end:
            raise PositionLost(f'the log reaches from {first - 1} to {end}')
        return self._read(stream, int(id), 0.0)

    def since_time(self, stream, at):
        """The messages of a stream from a time on (Unix seconds). Raises PositionLost."""
        if not at >= self._db.clock() - KEEP_MESSAGES_SECONDS:      # nor is it NaN
            raise PositionLost(f'the log is kept for {KEEP_MESSAGES_SECONDS} seconds')
        (first, end), = self._db.execute('SELECT (SELECT min(id) FROM messages), (SELECT max(id) FROM messages)')
        if first is not None and end - first + 1 >= KEEP_MESSAGES:      # it is also cut by number
            (cut_at,), = self._db.execute('SELECT created_at FROM messages WHERE id = ?', (first,))
            if cut_at > at:
                raise PositionLost('the log was cut short after that time')
        return self._read(stream, 0, at)

    def prune(self):
        """Delete what is older than KEEP_MESSAGES_SECONDS or beyond the last KEEP_MESSAGES."""
        end = self._end()
        self._db.execute('DELETE FROM messages WHERE id <= ?', (end - KEEP_MESSAGES,))
        self._db.execute(TRIM_MESSAGES, (KEEP_MESSAGES_SECONDS, end))

    def _name_epoch(self):
        if not self._db.execute('SELECT epoch FROM epochs'):
            self._db.execute('INSERT INTO epochs (epoch) VALUES (?)', (secrets.token_hex(4),))

    def _append(self, stream, message):
        payload = compact_json(message() if callable(message) else message)
        (id,), = self._db.write('INSERT INTO messages (stream, payload, created_at) VALUES (?, ?, now_s()) RETURNING id',
                                (stream, payload))
        if id % TRIM_EVERY == 0:
            self.prune()
        return id

    def _end(self):
        """The id of the last message that was ever appended: trimming never takes that one."""
        return self._db.execute('SELECT coalesce(max(id), 0) FROM messages')[0][0]

    def _turn(self):
        self._bell.wait(doorbell.patience())
        self._bell.clear()
        self._deliver()

    def _deliver(self):
        """Hand out what is new in the log. Several greenlets may be here at once: each message goes out once."""
        while True:
            rows = self._db.execute('SELECT id, stream, payload, created_at FROM messages WHERE id > ? ORDER BY id LIMIT ?',
                                    (self._last, DELIVER_ROWS))
            for row in rows:
                if row[0] > self._last:
                    self._last = row[0]
                    message = Message(*row)
                    for receive in tuple(self._subscribers.get(message.stream, ())):
                        try:
                            receive(message)
                        except Exception:
                            log.exception('subscriber failed stream=%s', message.stream)
            if len(rows) < DELIVER_ROWS:
                return

    def _read(self, stream, after, at):
        while True:
            last = self._last
            rows = self._db.execute('SELECT id, stream, payload, created_at FROM messages '
                                    'WHERE stream = ? AND id > ? AND id <= ? AND created_at >= ? ORDER BY id LIMIT ?',
                                    (stream, after, last, at, REPLAY_MESSAGES + 1))
            if self._last == last:      # else the read had to wait for the file, and something was delivered meanwhile
                break
        if len(rows) > REPLAY_MESSAGES:
            raise PositionLost(f'more than {REPLAY_MESSAGES} messages were missed')
        return [Message(*row) for row in rows]


def offset_of(position):
    """The id in a position that since() has taken."""
    return int(position.rpartition(':')[2])


cable = Cable(cable_db)


# === Todos: what the app is about, kept in the app database ===========================================================
# Rows and rules, no HTML. Every change bumps the version of the user's list, and with it, in the same transaction,
# enqueues the job that tells the user's other tabs: broadcast_todos, in Broadcasts.

FILTERS = ('all', 'active', 'completed')
BROADCAST_ROWS = 50         # a change of more rows is told as "load the page again"
# Compiled at the first use: at the start they would take 0.7 ms.
NOT_TEXT = '[\x00-\x1f\x7f-\x9f\ud800-\udfff]'     # control characters, lone surrogates
# Spaces, and marks that show nothing. Not isprintable(): for an older Python, the newest emoji are not.
BLANK = r'[\s\u00ad\u034f\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff]*'

# The version is that of the list after COUNT_CHANGE, which comes next. Nothing returns if the user has a todo of that key.
INSERT_TODO = '''
    INSERT INTO todos (user_id, title, version, key, created_at)
    VALUES (:user, :title, coalesce((SELECT version FROM lists WHERE user_id = :user), 0) + 1, :key, now_s())
    ON CONFLICT (user_id, key) WHERE key IS NOT NULL DO NOTHING
    RETURNING id'''
COUNT_CHANGE = '''
    INSERT INTO lists (user_id, active, completed, version) VALUES (?, ?, ?, 1)
    ON CONFLICT (user_id) DO UPDATE SET active = lists.active + excluded.active,
        completed = lists.completed + excluded.completed, version = lists.version + 1
    RETURNING active, completed, version'''


class TitleError(TodolError):
    """A title that can't be kept."""
    status = 422


class LimitError(TodolError):
    """The list is full."""
    status = 422


class NotFound(TodolError):
    """No such todo, for this user."""
    status = 404


# completed: a bool; version: of the list when this row last changed.
Todo = collections.namedtuple('Todo', 'id title completed version')
# How many there are of each kind; version: of the list.
Totals = collections.namedtuple('Totals', 'active completed version')


def clean_title(title):
    """The title as it is kept: trimmed, tabs and line ends as spaces. Raises TitleError; '' for a blank one."""
    if not isinstance(title, str):
        raise TitleError(f'a title must be text, not {type(title).__name__}')
    title = re.sub(r'\r\n|[\t\r\n]', ' ', title).strip()
    if len(title) > settings.max_title_chars:
        raise TitleError(f'That title has {len(title):,} characters; at most {settings.max_title_chars:,} fit.')
    stranger = re.search(NOT_TEXT, title)
    if stranger:
        raise TitleError(f'That title has a character that is not text: U+{ord(stranger[0]):04X}.')
    return '' if re.fullmatch(BLANK, title) else title


def new_key():
    """An idempotency key for a todo: milliseconds since 1970, and something that nobody else has."""
    return f'{time.time_ns() // 10**6}-{secrets.token_urlsafe(9)}'


@app_db.transaction
def create_todo(user, title, key=None):
    """Add a todo at the end of the user's list, and give it. Raises TitleError, LimitError.

    key: an idempotency key of the client's choice: the same key and title again give the same todo. One that starts with
    the time, as new_key() gives it, costs a seventh less.
    """
    title = clean_title(title)
    if not title:
        raise TitleError('A todo needs a title.')
    if key:
        digest = hashlib.sha256(f'{key}\0{title}'.encode()).hexdigest()
        key = f'{key[:16]} {digest[:24]}'       # in the order of the given ones
    rows = app_db.execute(INSERT_TODO, {'user': user, 'title': title, 'key': key or None})
    if not rows:
        (id,), = app_db.execute('SELECT id FROM todos WHERE user_id = ? AND key = ?', (user, key))
        return find_todo(user, id)
    (id,), = rows
    totals = _changed(user, [id], active=1)
    if totals.active + totals.completed > settings.max_todos:
        raise LimitError(f'The list is full: it has {settings.max_todos:,} todos. Clear some first.')
    return Todo(id, title, False, totals.version)


@app_db.transaction
def update_todo(user, id, title=None, completed=None):
    """Rename a todo, or set whether it is completed, and give it; None if an empty title deleted it.

    Raises NotFound, TitleError.
    """
    todo = find_todo(user, id)
    new_title = todo.title if title is None else clean_title(title)
    if not new_title:
        return delete_todo(user, id)
    done = todo.completed if completed is None else completed
    if (new_title, done) == (todo.title, todo.completed):
        return todo
    version = count_todos(user).version + 1
    app_db.execute('UPDATE todos SET title = ?, completed = ?, version = ? WHERE id = ?', (new_title, int(done), version, id))
    moved = int(done) - int(todo.completed)
    _changed(user, [id], active=-moved, completed=moved)
    return Todo(id, new_title, done, version)


@app_db.transaction
def toggle_todos(user, completed, ids=None):
    """Set all todos of a user, or those of ids that are theirs, to completed or active. Gives the ids that changed."""
    version = count_todos(user).version + 1
    if ids is None:
        rows = app_db.execute('UPDATE todos SET completed = ?, version = ? WHERE user_id = ? AND completed <> ? RETURNING id',
                              (int(completed), version, user, int(completed)))
    else:
        rows = []
        for id in ids:
            rows += app_db.execute('UPDATE todos SET completed = ?, version = ? '
                                   'WHERE id = ? AND user_id = ? AND completed <> ? RETURNING id',
                                   (int(completed), version, id, user, int(completed)))
    if rows:
        moved = len(rows) if completed else -len(rows)
        _changed(user, [id for id, in rows], active=-moved, completed=moved)
    return [id for id, in rows]


@app_db.transaction
def delete_todo(user, id):
    """Delete a todo. Raises NotFound."""
    todo = find_todo(user, id)
    app_db.execute('DELETE FROM todos WHERE id = ?', (id,))
    _changed(user, [id], active=-int(not todo.completed), completed=-int(todo.completed))


@app_db.transaction
def clear_completed(user):
    """Delete the user's completed todos, and give their ids."""
    ids = [id for id, in app_db.execute('DELETE FROM todos WHERE user_id = ? AND completed = 1 RETURNING id', (user,))]
    if ids:
        _changed(user, ids, completed=-len(ids))
    return ids


def find_todo(user, id):
    """Raises NotFound, whether it does not exist or belongs to somebody else."""
    rows = app_db.execute('SELECT id, title, completed, version FROM todos WHERE id = ? AND user_id = ?', (id, user))
    if not rows:
        raise NotFound('There is no such todo. It may have been removed in another tab.')
    id, title, completed, version = rows[0]
    return Todo(id, title, bool(completed), version)


def list_todos(user, showing='all'):
    """The user's todos of a filter, oldest first."""
    if showing == 'all':
        rows = app_db.execute('SELECT id, title, completed, version FROM todos WHERE user_id = ? ORDER BY id', (user,))
    else:
        rows = app_db.execute('SELECT id, title, completed, version FROM todos WHERE user_id = ? AND completed = ? ORDER BY id',
                              (user, int(showing == 'completed')))
    return [Todo(id, title, bool(completed), version) for id, title, completed, version in rows]


def count_todos(user):
    """The user's Totals."""
    rows = app_db.execute('SELECT active, completed, version FROM lists WHERE user_id = ?', (user,))
    return Totals(*rows[0]) if rows else Totals(0, 0, 0)


def _changed(user, ids, active=0, completed=0):
    """Count a change, have it told, and give the new Totals."""
    totals, = app_db.execute(COUNT_CHANGE, (user, active, completed))
    jobs.enqueue('broadcast_todos', {'user': user, 'ids': ids if len(ids) <= BROADCAST_ROWS else None})
    return Totals(*totals)


# === Sessions: who is asking, without a row for it ====================================================================
# A session is a random user id in a signed cookie. Stream names are signed as turbo-rails signs them, and start with the
# id of their user: a signature never expires, so whoever has a name copied from a page is asked who they are as well.

SESSION_COOKIE = 'todol_session'
SESSION_SECONDS = 400 * 86400       # the longest that browsers keep a cookie
RENEW_SESSION_SECONDS = 7 * 86400   # an older cookie gets a new date
KEPT_SECRET = "SELECT value FROM secrets WHERE name = 'secret'"


class Keys:
    """The secrets of a purpose each, derived from one. Nothing is signed before load()."""

    def load(self):
        """Take the secret from the settings, or else make one, once, and keep it in the app database."""
        secret = settings.secret or (app_db.execute(KEPT_SECRET) or app_db.transact(self._made))[0][0]
        for purpose in ('session', 'stream'):
            setattr(self, purpose, hmac.digest(secret.encode(), f'todol {purpose}'.encode(), 'sha256'))

    @staticmethod
    def _made():
        app_db.execute("INSERT INTO secrets (name, value) VALUES ('secret', ?) ON CONFLICT DO NOTHING", (new_secret(),))
        return app_db.execute(KEPT_SECRET)


keys = Keys()


def new_secret():
    return secrets.token_urlsafe(48)


def new_user():
    return secrets.token_urlsafe(16)


def sign_session(user, now=None):
    """The cookie's value: user id, Unix time in hex, HMAC-SHA256 of both."""
    text = f'{user}.{int(time.time() if now is None else now):x}'
    return f'{text}.{_signature(keys.session, text)}'


def verify_session(cookie, now=None):
    """The user id and the age in seconds, or None for a cookie that is not ours, was changed or is too old."""
    match = re.fullmatch(r'(([\w-]{22})\.([0-9a-f]{1,12}))\.([\w-]{43})', cookie or '', re.ASCII)
    if not match or not hmac.compare_digest(_signature(keys.session, match[1]), match[4]):
        return None
    age = (time.time() if now is None else now) - int(match[3], 16)
    return (match[2], age) if age < SESSION_SECONDS else None


@functools.lru_cache(1024)      # who is here asks again: 6 us less a request
def _signature(key, text):
    return base64.urlsafe_b64encode(hmac.digest(key, text.encode(), 'sha256')).decode().rstrip('=')


def stream_name(user, *parts):
    """The stream of a user: their id first, so that verify_stream_name() can tell whose it is."""
    return ':'.join((user, *parts))


def sign_stream_name(name):
    """Source: turbo-rails e511fb2, Turbo.signed_stream_verifier; rails MessageVerifier(digest: SHA256, serializer: JSON)."""
    return _signed_with(keys.stream, name)


@functools.lru_cache(1024)      # as above: 6 us less a page
def _signed_with(key, name):
    encoded = base64.b64encode(json.dumps(name).encode())
    return f'{encoded.decode()}--{hmac.digest(key, encoded, "sha256").hex()}'


def verify_stream_name(signed, user):
    """The name, if it was signed here and belongs to the user; else None."""
    if not isinstance(signed, str) or not signed.isascii():
        return None
    encoded, _, signature = signed.rpartition('--')
    if not hmac.compare_digest(hmac.digest(keys.stream, encoded.encode(), 'sha256').hex(), signature):
        return None
    name = json.loads(base64.b64decode(encoded))
    return name if name.split(':')[0] == user else None


# === Templates: HTML by name ==========================================================================================
# Values come in, nothing is fetched. {{value}} is escaped; {{!value}} is HTML already. The element names, ids, class
# names and texts are those of the TodoMVC app template, so that anyone's tests and styles for it fit.

HTML = {
    'layout': '''\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1, viewport-fit=cover">
<title>{{title}}</title>
<meta name="theme-color" content="{{colors[0]}}" media="(prefers-color-scheme: light)">
<meta name="theme-color" content="{{colors[1]}}" media="(prefers-color-scheme: dark)">
<meta name="turbo-refresh-method" content="morph">
<meta name="turbo-refresh-scroll" content="preserve">
<link rel="icon" href="{{asset('icon.svg')}}" type="image/svg+xml">
<link rel="manifest" href="{{asset('manifest.webmanifest')}}">
<link rel="stylesheet" href="{{asset('todol.css')}}">
% if live:
<script type="module" src="{{asset('todol.js')}}"></script>
% end
</head>
<body>
{{!body}}</body>
</html>
''',
    'page': '''\
<turbo-cable-stream-source id="cable" channel="Turbo::StreamsChannel" signed-stream-name="{{signed_stream_name}}" \
data-since="{{position}}" data-idle-seconds="{{idle_seconds}}"></turbo-cable-stream-source>
<main>
<section class="todoapp" id="todoapp">
<header class="header">
<h1>todos</h1>
<form class="new" action="/todos" method="post" id="new">
<input type="hidden" name="key" value="{{key}}">
<input type="hidden" name="showing" value="{{showing}}">
<input type="text" class="new-todo" id="new-todo" name="title" value="{{text}}" placeholder="What needs to be done?" \
aria-label="What needs to be done?" aria-describedby="new-todo-error" autocomplete="off" enterkeyhint="done" dir="auto"\
{{!'' if editing else ' autofocus'}}>
<button type="submit" class="save">Add</button>
<p class="error" id="new-todo-error" role="alert">{{error}}</p>
</form>
<p class="error" id="notice" role="alert"></p>
</header>
<section class="main" aria-label="Todos">
<form class="all" action="/todos" method="post" id="all">
<input type="hidden" name="_method" value="PATCH">
<input type="hidden" name="completed" value="0">
{{!toggle_all}}\
<label for="toggle-all">Mark all as complete</label>
<button type="submit" class="save">Save</button>
</form>
<ul class="todo-list" id="todos" data-showing="{{'active completed' if showing == 'all' else showing}}">
{{!rows}}\
</ul>
</section>
<footer class="footer">
{{!count}}\
{{!filters}}\
<form class="clear" action="/todos/completed" method="post" id="clear">
<input type="hidden" name="_method" value="DELETE">
<button type="submit" class="clear-completed">Clear completed</button>
</form>
</footer>
<p class="empty">All clear. What would you like to get done?</p>
<p class="nothing">Nothing in this view.</p>
</section>
</main>
<footer class="info">
<p>Double-click to edit a todo</p>
<p class="connection" id="connection" role="status" hidden></p>
</footer>
<p class="visually-hidden" id="announcer" role="status"></p>
''',
    'todo': '''\
<li id="todo_{{id}}"{{!' class="%s"' % state if state else ''}} data-version="{{version}}">
<form action="/todos/{{id}}" method="post">
<div class="view">
<input type="hidden" name="completed" value="0">
<input class="toggle" type="checkbox" name="completed" value="1" aria-labelledby="title_{{id}}"{{' checked' if completed else ''}}>
<label id="title_{{id}}" dir="auto">{{title}}</label>
<button type="submit" class="save" name="_method" value="PATCH">Save</button>
<a class="rename" href="/todos/{{id}}/edit" aria-label="Edit {{title}}"></a>
<button type="submit" class="destroy" name="_method" value="DELETE" aria-label="Remove {{title}}"></button>
</div>
</form>
% if editing:
<form class="editor" action="/todos/{{id}}" method="post">
<input type="hidden" name="_method" value="PATCH">
<input type="hidden" name="showing" value="{{showing}}">
<input type="text" class="edit" name="title" value="{{text}}" aria-label="Edit {{title}}" aria-describedby="edit-error" autocomplete="off" \
enterkeyhint="done" dir="auto" autofocus>
<button type="submit" class="save">Save</button>
<p class="error" id="edit-error" role="alert">{{error}}</p>
</form>
% end
</li>
''',
    'filters': '''\
<ul class="filters">
% for name, path, label in (('all', '/', 'All'), ('active', '/active', 'Active'), ('completed', '/completed', 'Completed')):
<li><a href="{{path}}"{{!' class="selected" aria-current="page"' if name == showing else ''}}>{{label}}</a></li>
% end
</ul>
''',
    'count': '''\
<span class="todo-count" id="todo-count" data-active="{{active}}" data-completed="{{completed}}" \
data-version="{{version}}"><strong>{{active}}</strong> {{'item' if active == 1 else 'items'}} left</span>
''',
    'toggle_all': '''\
<input class="toggle-all" id="toggle-all" type="checkbox" name="completed" value="1" data-version="{{version}}"\
{{' checked' if completed and not active else ''}}>
''',
    # Turbo Streams. The targets say what a tab shows, so that one message is right for every filter. Where the row is
    # missing, an empty one comes first, which the last stream fills: so the row is sent once.
    'put_todo': '''\
<turbo-stream action="remove" targets="#todos:not([data-showing~={{state}}]) > #todo_{{id}}" data-row="todo_{{id}}" \
data-version="{{version}}"></turbo-stream>
<turbo-stream action="append" targets="#todos[data-showing~={{state}}]:not(:has(> #todo_{{id}}))"><template>\
<li id="todo_{{id}}" data-version="{{version}}"></li></template></turbo-stream>
<turbo-stream action="replace" method="morph" targets="#todos[data-showing~={{state}}] > #todo_{{id}}"><template>{{!row}}</template></turbo-stream>
''',
    'replace_todo': '''\
<turbo-stream action="replace" target="todo_{{id}}"><template>{{!row}}</template></turbo-stream>
''',
    'remove_todo': '''\
<turbo-stream action="remove" target="todo_{{id}}"></turbo-stream>
''',
    'totals': '''\
<turbo-stream action="replace" method="morph" target="todo-count"><template>{{!count}}</template></turbo-stream>
<turbo-stream action="replace" method="morph" target="toggle-all"><template>{{!toggle_all}}</template></turbo-stream>
''',
    'refresh': '''\
<turbo-stream action="refresh"></turbo-stream>
''',
    'error_stream': '''\
<turbo-stream action="update" target="{{target}}"><template>{{message}}</template></turbo-stream>
''',
    'error': '''\
<main><section class="todoapp message">
<h1>{{status}}</h1>
<p>{{message}}</p>
% if details:
<pre>{{details}}</pre>
% end
<p><a href="/">Back to the list</a></p>
</section></main>
''',
}
THEME_COLORS = ('#f9f6f1', '#181612')       # as --paper in the styles: light, dark


@functools.cache
def template(name):
    """The compiled template; a traceback names it and its line."""
    # As a function, not by compile(), whose first call makes a class for each kind of syntax: 0.9 ms of the start. Its
    # line 0 is the def.
    source = bottle.SimpleTemplate(source=HTML[name]).code.replace('\n', '\n ')
    namespace = {}
    exec(f'def template():\n {source}', namespace)
    return namespace['template'].__code__.replace(co_filename=f'todol.py HTML[{name!r}]', co_firstlineno=0)


def render(name, **values):
    """A template of HTML with the values. Without include() and rebase(), which are bottle's, it takes half the time."""
    pieces = []
    exec(template(name), {**values, '_printlist': pieces.extend, '_str': str, '_escape': escape})
    return ''.join(pieces)


def escape(value):
    """The value as text of HTML. A number has nothing to escape: 6 us less a POST."""
    return str(value) if type(value) is int else bottle.html_escape(str(value))


def render_layout(title, body, live=True):
    """A whole page. live: with the script."""
    before, after = _layout(title, live)
    return f'{before}{body}{after}'


@functools.lru_cache(256)       # 5 us less a page
def _layout(title, live):
    """What stands before and after the body."""
    return render('layout', title=title, body='\0', live=live, colors=THEME_COLORS, asset=asset_path).split('\0')


def render_page(user, showing, todos, totals, position, editing=None, text='', error=''):
    """The list. editing: the id of the todo in whose place a form stands; text and error belong to that form, or else
    to the field for a new todo."""
    rows = ''.join([render_todo(todo) if todo.id != editing else render_editor(todo, showing, text, error) for todo in todos])
    body = render('page', showing=showing, rows=rows, count=render_count(totals), filters=render_filters(showing),
                  toggle_all=render_toggle_all(totals), key=new_key(), editing=editing,
                  text='' if editing else text, error='' if editing else error, position=position,
                  signed_stream_name=sign_stream_name(todos_stream(user)), idle_seconds=settings.idle_seconds)
    return render_layout(f'{totals.active} left · todol' if totals.active else 'todol', body)


@functools.lru_cache(2048)      # a row is a function of the todo alone: 20 rows cost 5 us instead of 90
def render_todo(todo):
    return render('todo', **todo._asdict(), state='completed' if todo.completed else '', editing=False)


def render_editor(todo, showing, text, error=''):
    """The row with the form that renames it. showing: the filter to go back to."""
    return render('todo', **todo._asdict(), state='completed editing' if todo.completed else 'editing', editing=True,
                  showing=showing, text=text, error=error)


@functools.lru_cache(256)       # the answer and the broadcast are the same
def render_put(todo):
    """The streams that show a todo as it is now, wherever it belongs."""
    return render('put_todo', id=todo.id, version=todo.version, state='completed' if todo.completed else 'active',
                  row=render_todo(todo))


@functools.lru_cache(256)
def render_count(totals):
    return render('count', **totals._asdict())


@functools.cache
def render_filters(showing):
    return render('filters', showing=showing)


@functools.lru_cache(256)
def render_toggle_all(totals):
    return render('toggle_all', **totals._asdict())


@functools.lru_cache(256)
def render_totals(totals):
    """The streams that bring the counter and the toggle-all box in step."""
    return render('totals', count=render_count(totals), toggle_all=render_toggle_all(totals))


# === Broadcasts: a change, told to the user's tabs ====================================================================
# Rendered in the job, from the state at that moment: a message may come twice or stand for several changes, and what a
# tab shows still ends up as the database has it. The jobs of a user may pass each other, here and in other processes;
# the messages stand in order all the same. The acting tab gets the same streams as its answer.

def todos_stream(user):
    """The name of the stream that a user's tabs listen to."""
    return stream_name(user, 'todos')


def render_changes(user, ids):
    """Turbo Streams that bring a tab in step with the todos of these ids; ids None: with everything."""
    if ids is None:
        return render('refresh')
    streams = []
    for id in ids:
        try:
            streams.append(render_put(find_todo(user, id)))
        except NotFound:
            streams.append(render('remove_todo', id=id))
    return ''.join(streams) + render_totals(count_todos(user))


@jobs.job(queue='urgent', retry_seconds=0.5, batch=True)
def broadcast_todos(changes):
    """changes: dicts of a user, and the ids of the todos that changed, or None for too many.

    What changed of one user goes out together, in messages of at most BROADCAST_ROWS todos: where 16 users change theirs
    as fast as they can, a POST takes 5 % less CPU.
    """
    changed, messages = {}, []
    for change in changes:
        changed.setdefault(change['user'], []).extend(change['ids'] or [None])
    for user, ids in changed.items():
        ids = list(dict.fromkeys(ids))
        parts = [None] if None in ids else [ids[at:at + BROADCAST_ROWS] for at in range(0, len(ids), BROADCAST_ROWS)]
        messages += [(todos_stream(user), functools.partial(render_changes, user, part)) for part in parts]
    cable.broadcast_all(messages)


# === Routes: one function for each request ============================================================================
# A page for browsers, Turbo Streams for the script, JSON for programs: the Accept header tells. Forms work without
# script, with _method for what they can't say. Whatever is wrong is a TodolError and becomes an answer of the same kind.

app = bottle.Bottle()

TURBO_STREAM = 'text/vnd.turbo-stream.html'
ID = '<id:re:[0-9]{1,18}>'          # within SQLite's 64 bits
PATHS = {'all': '/', 'active': '/active', 'completed': '/completed'}
COMPRESS_BYTES = 1000               # a smaller answer fits a packet as it is
MAX_FIELDS = 20_000                 # of a form
COOKIE = re.compile(rf'(?:^|;)\s*{SESSION_COOKIE}=([^;\s]*)')
MAX_WRITE_SHARES = 10_000

# who -> (minute, writes left of a share): limit_writes() takes a twentieth of a minute's writes from the cache at a time,
# which spares nineteen of twenty transactions.
write_shares = {}
SECURITY_HEADERS = [
    ('Content-Security-Policy', "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
                                "connect-src 'self'; manifest-src 'self'; form-action 'self'; base-uri 'none'; "
                                "frame-ancestors 'none'"),
    ('X-Content-Type-Options', 'nosniff'),
    ('X-Frame-Options', 'DENY'),
    ('Referrer-Policy', 'same-origin'),
    ('Cross-Origin-Opener-Policy', 'same-origin'),
    ('Cross-Origin-Resource-Policy', 'same-origin'),
]


class BadRequest(TodolError):
    """A request that can't be understood."""
    status = 400


class BrokenBody(BadRequest):
    """A body that ends early or can't be delimited: nobody knows where the next request begins."""


class CrossSite(TodolError):
    """A change asked for by another site's page."""
    status = 403


class BodyTooLarge(TodolError):
    status = 413


class UnsupportedType(TodolError):
    status = 415


class InvalidField(TodolError):
    status = 422


class TooManyWrites(TodolError):
    status = 429


@app.get([*PATHS.values()])
def show_list():
    """The list through a filter."""
    user, showing = current_user(), bottle.request.path[1:] or 'all'
    position = cable.position()         # before the rows: what comes between is replayed, and harmless twice
    todos, totals = list_todos(user, showing), count_todos(user)
    if wanted() == 'json':
        return as_json({'showing': showing, 'active': totals.active, 'completed': totals.completed,
                        'todos': [public(todo) for todo in todos]})
    return render_page(user, showing, todos, totals, position)


@app.post('/todos')
def create():
    """Create a todo: title, and key against doing it twice."""
    user, form = current_user(), request_form()
    title, key = form.get('title', ''), form.get('key')
    if key is not None and not re.fullmatch(r'[\w.:-]{0,100}', str(key), re.ASCII):
        raise InvalidField('key must be up to 100 letters, digits or any of . : - _')
    try:
        todo = create_todo(user, title, str(key or ''))
    except (TitleError, LimitError) as error:
        return invalid(error, 'new-todo-error', user, text=title)
    return changed(user, [todo.id], public(todo), status=201)


@app.get(f'/todos/{ID}/edit')
def edit(id):
    """The form that renames a todo, in the place of its row."""
    user = current_user()
    todo = find_todo(user, int(id))
    if wanted() == 'json':
        return as_json(public(todo))
    if wanted() == 'turbo':
        bottle.response.content_type = f'{TURBO_STREAM}; charset=UTF-8'
        return render('replace_todo', id=todo.id, row=render_editor(todo, came_from(), todo.title))
    return page_with(user, editing=todo.id, text=todo.title)


@app.patch(f'/todos/{ID}')
def update(id):
    """Rename a todo (title), or set whether it is done (completed), or both."""
    user, form = current_user(), request_form()
    if form.get('title') is None and 'completed' not in form:
        raise InvalidField('give a title, or completed, or both')
    try:
        todo = update_todo(user, int(id), form.get('title'), flag(form, 'completed') if 'completed' in form else None)
    except TitleError as error:
        return invalid(error, 'edit-error', user, editing=int(id), text=form['title'])
    return changed(user, [int(id)], public(todo) if todo else {})


@app.delete(f'/todos/{ID}')
def delete(id):
    """Delete a todo."""
    user = current_user()
    delete_todo(user, int(id))
    return changed(user, [int(id)], {})


@app.patch('/todos')
def toggle_all():
    """Set many todos, those of ids[] or else all, to completed or not."""
    user, form = current_user(), request_form()
    ids = form.get('ids[]', form.get('ids'))
    if ids is not None:
        if not isinstance(ids, list) or not all(re.fullmatch('[0-9]{1,18}', str(id)) for id in ids):
            raise InvalidField('ids must be a list of todo ids')
        ids = [int(id) for id in ids]
    ids = toggle_todos(user, flag(form, 'completed'), ids)
    return changed(user, ids, {'ids': ids})


@app.delete('/todos/completed')
def clear():
    """Delete the completed todos."""
    user = current_user()
    ids = clear_completed(user)
    return changed(user, ids, {'ids': ids})


@app.get('/assets/<file>')
def asset(file):
    """A file of ASSETS under a name with its digest, to be kept for ever by whoever gets it."""
    match = re.fullmatch(r'(\w+)-(\w+)\.(\w+)', file)
    if not match or f'{match[1]}.{match[3]}' not in ASSETS:
        raise NotFound('There is no such file.')
    name = f'{match[1]}.{match[3]}'
    current = asset_path(name).endswith(file)       # else: a page from before a deploy gets today's, for once
    bottle.response.content_type = ASSETS[name][0]
    bottle.response.set_header('Cache-Control', 'public, max-age=31536000, immutable' if current else 'no-cache')
    bottle.response.set_header('Vary', 'Accept-Encoding')
    if accepts_gzip():
        bottle.response.set_header('Content-Encoding', 'gzip')
        return asset_bytes(name, compressed=True)
    return asset_bytes(name)


@app.get('/up')
def up():
    """Health: 200 if the four databases answer and every loop lives, else 503 and what is wrong."""
    wrong = [f'loop {name}' for name, loop in loops.items() if not loop.alive]
    for database in (app_db, cache_db, job_db, cable_db):
        try:
            database.execute('SELECT count(*) FROM schema_migrations')
        except StorageError:
            wrong.append(f'{database.role} database')
    bottle.response.status = 503 if wrong else 200
    bottle.response.content_type = 'text/plain; charset=UTF-8'
    return f'failing: {", ".join(wrong)}\n' if wrong else 'ok\n'


# What the functions above are written with

def request_form():
    """The fields of the request's body, read by before_request."""
    return bottle.request.environ['todol.form']


def wanted():
    """What the client wants: turbo, json or html."""
    accept = bottle.request.environ.get('HTTP_ACCEPT', '')
    return 'turbo' if TURBO_STREAM in accept else 'json' if 'application/json' in accept else 'html'


def flag(form, name):
    """A field that is 0 or 1, or true or false in JSON. Raises InvalidField."""
    value = form.get(name)
    if value in ('0', '1', 0, 1):       # in Python, true is 1
        return value in ('1', 1)
    raise InvalidField(f'{name} must be 0 or 1, not {str(value)[:50]!r}')


def public(todo):
    """What programs get to see of a todo."""
    return {'id': todo.id, 'title': todo.title, 'completed': todo.completed}


def as_json(data, status=200):
    bottle.response.status = status
    bottle.response.content_type = 'application/json'
    return json.dumps(data)


def changed(user, ids, data, status=200):
    """The answer to a change: streams, JSON, or the way back to the page it came from."""
    kind = wanted()
    if kind == 'json':
        return as_json(data, status)
    if kind == 'turbo':
        bottle.response.content_type = f'{TURBO_STREAM}; charset=UTF-8'
        return render_changes(user, ids if len(ids) <= BROADCAST_ROWS else None)
    bottle.response.status = 303
    bottle.response.set_header('Location', PATHS[came_from()])
    return ''


def came_from():
    """The filter of the page that the request came from: a form that stands at another URL says it itself."""
    environ = bottle.request.environ
    named = environ.get('todol.form', {}).get('showing')
    if named in FILTERS:
        return named
    match = re.match(r'https?://[^/?#]*([^?#]*)', environ.get('HTTP_REFERER', ''))
    return next((name for name, path in PATHS.items() if match and match[1] == path), 'all')


def page_with(user, **values):
    """The page that the request came from, with something in it."""
    position = cable.position()
    showing = came_from()
    todos = list_todos(user, showing)
    if values.get('editing') and values['editing'] not in {todo.id for todo in todos}:
        showing, todos = 'all', list_todos(user)
    return render_page(user, showing, todos, count_todos(user), position, **values)


def invalid(error, target, user, **values):
    """The answer to a title that can't be kept: the message at its field, the typed text kept."""
    if wanted() != 'html':
        raise error_answer(error, target) from None
    bottle.response.status = error.status
    return page_with(user, error=str(error), **values)


def error_answer(error, target='notice'):
    """A TodolError as an answer of the kind that is wanted. target: the element that shows it."""
    environ, kind = bottle.request.environ, wanted()
    headers = {'Cache-Control': 'no-store'}
    if isinstance(error, TooManyWrites):
        headers['Retry-After'] = str(60 - int(time.time()) % 60)
    if isinstance(error, BrokenBody):
        headers['Connection'] = 'close'
    if kind == 'json':
        headers['Content-Type'] = 'application/json'
        body = json.dumps({'error': str(error)})
    elif kind == 'turbo':
        headers['Content-Type'] = f'{TURBO_STREAM}; charset=UTF-8'
        body = render('error_stream', target=target, message=str(error))
        match = re.fullmatch('/todos/([0-9]+)', environ['PATH_INFO'])
        if isinstance(error, NotFound) and match:
            body += render('remove_todo', id=match[1])      # the tab shows what is no longer there
    else:
        body = render_error(error.status, str(error))
    return bottle.HTTPResponse(body, error.status, headers)


def render_error(status, message, details=''):
    return render_layout(f'{status} · todol', render('error', status=status, message=message, details=details), live=False)


@app.hook('before_request')
def before_request():
    """Refuse what another site asks for, too much, or too often; read the form; find the method that it means."""
    environ = bottle.request.environ
    if environ['REQUEST_METHOD'] in ('GET', 'HEAD'):
        return
    try:
        if not same_origin(environ):
            raise CrossSite('This change was asked for by a page of another site, so it was not made.')
        limit_writes(environ)
        form = environ['todol.form'] = read_form(environ)
    except TodolError as error:
        raise error_answer(error) from None
    if environ['REQUEST_METHOD'] == 'POST' and form.get('_method') in ('PATCH', 'DELETE'):
        environ['REQUEST_METHOD'] = form['_method']


@app.install
def around(function):
    """A plugin: errors become answers, pages are not kept by anybody, long answers are compressed."""
    @functools.wraps(function)
    def answered(*arguments, **options):
        response = bottle.response
        response.set_header('Cache-Control', 'no-store')
        try:
            body = function(*arguments, **options)
        except TodolError as error:
            if error.status >= 500:
                log.error('request failed path=%s error=%s', bottle.request.environ['PATH_INFO'], error)
            return error_answer(error)
        if isinstance(body, str):
            body = body.encode(errors='replace')        # the kept text of a refused title may be no Unicode
        if len(body) > COMPRESS_BYTES and 'Content-Encoding' not in response.headers and accepts_gzip():
            response.set_header('Content-Encoding', 'gzip')
            response.set_header('Vary', 'Accept-Encoding')
            body = gzipped(body, 1)
        return body
    return answered


def unexpected_answer(error):
    """bottle's own errors (no such path, wrong method) and whatever nobody expected."""
    details = ''
    message = {404: 'There is nothing here.', 405: 'This path knows no such method.'}.get(
        error.status_code, 'Something went wrong here. It is in the log.')
    if error.status_code >= 500 and settings.env == 'development':
        details = error.traceback or ''
    bottle.response.set_header('Cache-Control', 'no-store')
    kind = wanted()
    if kind == 'json':
        bottle.response.content_type = 'application/json'
        return json.dumps({'error': message})
    if kind == 'turbo':
        bottle.response.content_type = f'{TURBO_STREAM}; charset=UTF-8'
        return render('error_stream', target='notice', message=message)
    return render_error(error.status_code, message, details)


app.default_error_handler = unexpected_answer


def application(environ, start_response):
    """The WSGI application: bottle's, with the security headers on every answer."""
    def start(status, headers, exc_info=None):
        return start_response(status, headers + SECURITY_HEADERS, exc_info)
    return app.wsgi(environ, start)


def current_user():
    """The user id of the request's session. A visitor without a good one gets a new one, in a cookie."""
    environ = bottle.request.environ
    user, age = session_of(environ) or (new_user(), RENEW_SESSION_SECONDS)
    if age >= RENEW_SESSION_SECONDS:
        secure = '; Secure' if is_https(environ) else ''
        bottle.response.set_header('Set-Cookie', f'{SESSION_COOKIE}={sign_session(user)}; Path=/; Max-Age={SESSION_SECONDS}; '
                                                 f'HttpOnly; SameSite=Lax{secure}')
    return user


def session_of(environ):
    """The user id and the age of the request's session, as verify_session() gives them; None without a good one."""
    if 'todol.session' not in environ:
        match = COOKIE.search(environ.get('HTTP_COOKIE', ''))
        environ['todol.session'] = verify_session(match[1]) if match else None
    return environ['todol.session']


def is_https(environ):
    if settings.trust_proxy and 'HTTP_X_FORWARDED_PROTO' in environ:
        return environ['HTTP_X_FORWARDED_PROTO'].split(',')[0].strip() == 'https'
    return environ['wsgi.url_scheme'] == 'https'


def client_address(environ):
    if settings.trust_proxy:
        forwarded = environ.get('HTTP_FLY_CLIENT_IP') or environ.get('HTTP_X_FORWARDED_FOR', '').split(',')[-1].strip()
        if forwarded:
            return forwarded
    return environ.get('REMOTE_ADDR', '')


def same_origin(environ):
    """Whether a request comes from a page of this host."""
    site = environ.get('HTTP_SEC_FETCH_SITE')
    return origin_is_host(environ) if site is None else site in ('same-origin', 'none')


def origin_is_host(environ):
    """Whether the Origin header names this host. A request without one comes from no browser, and is let in."""
    host = environ.get('HTTP_HOST')
    if settings.trust_proxy:
        host = environ.get('HTTP_X_FORWARDED_HOST', host)
    origin = environ.get('HTTP_ORIGIN')
    return origin is None or origin in (f'http://{host}', f'https://{host}')


def limit_writes(environ):
    """Count a write for its session, or its address where there is none. Raises TooManyWrites."""
    session = session_of(environ)
    who = session[0] if session else client_address(environ)
    minute = int(time.time()) // 60
    counted_in, left = write_shares.get(who, (minute, 0))
    if counted_in != minute or not left:
        if len(write_shares) >= MAX_WRITE_SHARES:
            write_shares.clear()
        share = -(-settings.writes_per_minute // 20)
        left = min(share, settings.writes_per_minute + share - cache.incr(f'writes {who} {minute}', share, ttl=60))
    if left < 1:
        raise TooManyWrites(f'More than {settings.writes_per_minute} changes in a minute. Wait a moment.')
    write_shares[who] = minute, left - 1


def read_form(environ):
    """The body of the request as a dict: of a form the last value of each field, and lists for names that end in [];
    of JSON the object itself. Raises BodyTooLarge, UnsupportedType, BadRequest."""
    limit = settings.max_body_bytes
    length = environ.get('CONTENT_LENGTH') or '0'
    coding = environ.get('HTTP_TRANSFER_ENCODING', '').lower()
    if not length.isdecimal() or coding not in ('', 'chunked'):
        raise BrokenBody('Content-Length or Transfer-Encoding can not be understood')
    try:
        if int(length) <= limit:
            body = environ['wsgi.input'].read(limit + 1 if coding else int(length))
    except ValueError:                  # of gevent, which would read on after it
        environ['wsgi.input']._chunked_input_error = True
        raise BrokenBody('a chunk has no size') from None
    except OSError:
        raise BrokenBody('the body ended early, or is not in the chunks it should be in') from None
    if int(length) > limit or len(body) > limit:
        raise BodyTooLarge(f'The request has more than {limit:,} bytes.')
    if not body:
        return {}
    kind = environ.get('CONTENT_TYPE', '').partition(';')[0].strip().lower()
    try:
        if kind == 'application/json':
            form = json.loads(body)
            if not isinstance(form, dict):
                raise BadRequest('the JSON must be an object')
            return form
        if kind == 'application/x-www-form-urlencoded':
            form = {}
            for name, value in urllib.parse.parse_qsl(body.decode(), keep_blank_values=True, errors='strict',
                                                      max_num_fields=MAX_FIELDS):
                if name.endswith('[]'):
                    form.setdefault(name, []).append(value)
                else:
                    form[name] = value
            return form
    except (ValueError, RecursionError) as error:       # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise BadRequest(f'the body is not what its Content-Type says ({type(error).__name__})') from None
    raise UnsupportedType('Send a form (application/x-www-form-urlencoded) or JSON (application/json).')


def accepts_gzip():
    return 'gzip' in bottle.request.environ.get('HTTP_ACCEPT_ENCODING', '')


def gzipped(body, level):
    compressor = zlib.compressobj(level, wbits=31)      # the format of gzip, without its module: 0.7 ms of the start
    return compressor.compress(body) + compressor.flush()


@functools.cache
def asset_path(name):
    """The URL of an asset, with a digest of what it holds."""
    stem, _, extension = name.partition('.')
    return f'/assets/{stem}-{hashlib.sha256(asset_bytes(name)).hexdigest()[:12]}.{extension}'


@functools.cache
def asset_bytes(name, compressed=False):
    source = ASSETS[name][1]
    body = (source() if callable(source) else source).encode()
    return gzipped(body, 9) if compressed else body


def manifest():
    """The web app manifest. Source: W3C Web Application Manifest."""
    return json.dumps({'name': 'todol', 'start_url': '/', 'display': 'standalone', 'background_color': THEME_COLORS[0],
                       'theme_color': THEME_COLORS[0],
                       'icons': [{'src': asset_path('icon.svg'), 'type': 'image/svg+xml', 'sizes': 'any'}]})


# === WebSocket: Action Cable at /cable ================================================================================
# Speaks actioncable-v1-json, so that @rails/actioncable and @hotwired/turbo-rails work unchanged, and AnyCable's
# actioncable-v1-ext-json, whose clients resume without loss. gevent-websocket alone must not face a network (frames
# without bound, interleaved writes, close frames without a code); CableSocket mends it, with Handler in HTTP, and
# keeps one rule: everything that is sent goes through push(), which never waits.

CABLE_PATH = '/cable'
PROTOCOLS = ('actioncable-v1-ext-json', 'actioncable-v1-json', 'actioncable-unsupported')   # as preferred here
BEAT_SECONDS = 3            # between pings in JSON: the clients take twice that without a word for a dead line
BEATS_PER_WS_PING = 5       # a ping of RFC 6455 makes every client answer, so that a dead one is noticed
SILENCE_SECONDS = 60        # a socket that says nothing for so long is dropped
CLOSE_SECONDS = 2           # how long the other side may take to close too
OUTBOX_BYTES = 1024 * 1024  # a client that leaves more than that unread is dropped; it resumes later from the log
MAX_FRAGMENTS = 128         # of one message
MAX_SUBSCRIPTIONS = 100     # of one socket
FRAMES_PER_TURN = 100       # of one socket in one turn of the event loop, then others get theirs
RESUME_SECONDS = 300        # how long a session of actioncable-v1-ext-json can be taken up again
WEBSOCKET_GUID = '258EAFA5-E914-47DA-95CA-C5AB0DC85B11'     # RFC 6455, section 1.3

TEXT, BINARY, CLOSE, PING, PONG = 0x1, 0x2, 0x8, 0x9, 0xA

connections = {}            # user -> set of Connection


class TooLarge(ProtocolError):
    """A frame or message beyond the limit."""


class CableSocket(WebSocket):
    """A WebSocket whose reads are bounded and whose writes never wait. Source: RFC 6455."""

    def __init__(self, environ, stream, handler):
        super().__init__(environ, stream, handler)
        self._socket = handler.socket
        self._read = handler.rfile.read
        self._unsent = collections.deque()
        self._unsent_bytes = 0
        self._writer = None
        self._frames = 0
        self.heard_at = time.monotonic()
        self.close_sent = False

    def __del__(self):
        pass        # the library's would write to a socket that may have another owner by now

    def receive(self):
        """The next text message; None when the socket is closed, by either side and for whatever reason."""
        code = None
        try:
            return self.read_message()
        except TooLarge:
            code = 1009
        except ProtocolError:
            code = 1002
        except UnicodeDecodeError:
            code = 1007
        except (OSError, WebSocketError, ValueError):   # ValueError: the file was closed under the read
            pass
        if code:
            self.close(code)
            self._linger()
        self.closed = True
        return None

    def read_message(self):
        kind, parts, size = None, [], 0
        while True:
            final, opcode, payload = self.read_frame(size)
            self.heard_at = time.monotonic()
            self._frames += 1
            if self._frames % FRAMES_PER_TURN == 0:
                gevent.sleep(0)
            if opcode == PING:
                self.push(frame(payload, PONG))
            elif opcode == CLOSE:
                self.handle_close(None, payload)
                raise WebSocketError('closed by the other side')
            elif opcode != PONG:
                if (opcode == 0) == (kind is None):
                    raise ProtocolError('a continuation of nothing, or a message inside another')
                kind = kind or opcode
                parts.append(payload)
                size += len(payload)
                if len(parts) > MAX_FRAGMENTS:
                    raise TooLarge('too many fragments')
                if final:
                    if kind == BINARY:
                        self.close(1003)
                        self._linger()
                        raise WebSocketError('binary message')
                    return b''.join(parts).decode()

    def read_frame(self, already=0):
        """The next frame: final, opcode, payload. already: bytes that the message has so far."""
        first, second = self._exactly(2)
        final, opcode, length = first & 0x80, first & 0x0F, second & 0x7F
        if first & 0x70 or opcode not in (0, TEXT, BINARY, CLOSE, PING, PONG):
            raise ProtocolError('reserved bit or opcode')
        if not second & 0x80:
            raise ProtocolError('a client must mask its frames')
        if opcode >= CLOSE and (length > 125 or not final):
            raise ProtocolError('a control frame is short and whole')
        if length == 126:
            length, = struct.unpack('!H', self._exactly(2))
        elif length == 127:
            length, = struct.unpack('!Q', self._exactly(8))
        if opcode < CLOSE and already + length > settings.max_message_bytes:
            raise TooLarge(f'more than {settings.max_message_bytes} bytes')     # before any of it is read
        mask = self._exactly(4)
        payload = self._exactly(length)
        key = int.from_bytes((mask * (length // 4 + 1))[:length], 'big')
        return final, opcode, (int.from_bytes(payload, 'big') ^ key).to_bytes(length, 'big')

    def handle_close(self, header, payload):
        """Answer the other side's close with the same code."""
        if not payload:
            return self.close(1000)
        code = struct.unpack('!H', payload[:2])[0] if len(payload) > 1 else 0
        if not (1000 <= code <= 1003 or 1007 <= code <= 1014 or 3000 <= code <= 4999):
            raise ProtocolError(f'close code {code}')
        payload[2:].decode()
        self.close(code, payload[2:])

    def send(self, message, binary=None):
        """Send a text; a client that does not read is dropped, the caller never waits."""
        self.push(frame(message.encode()))

    def send_frame(self, message, opcode):
        self.push(frame(message, opcode))

    def push(self, data):
        """Send the bytes of whole frames: at once if the kernel takes them, else from a greenlet, in order."""
        if self.closed or self.close_sent:
            return
        if self._writer is None:
            try:
                sent = self._socket._sock.send(data)        # gevent's own socket beneath is non-blocking
            except BlockingIOError:
                sent = 0
            except OSError:
                return self.abort()
            if sent == len(data):
                return
            data = data[sent:]
            self._writer = gevent.spawn(self._write_unsent)
        self._unsent.append(data)
        self._unsent_bytes += len(data)
        if self._unsent_bytes > OUTBOX_BYTES:
            log.warning('socket dropped, its client does not read unsent_bytes=%s', self._unsent_bytes)
            self.abort()

    def close(self, code=1000, message=b''):
        """Send a close frame, as the last one."""
        if not self.close_sent:
            self.push(frame(struct.pack('!H', code) + message[:123], CLOSE))
            self.close_sent = True

    def abort(self):
        """Drop the connection; whoever reads from it gets the end."""
        self.closed = self.close_sent = True
        self._unsent.clear()
        with contextlib.suppress(OSError):
            self._socket._sock.shutdown(socket.SHUT_RDWR)

    def _write_unsent(self):
        try:
            while self._unsent:
                data = self._unsent.popleft()
                self._socket.sendall(data)
                self._unsent_bytes -= len(data)
            self._writer = None
        except OSError:
            self.abort()

    def _linger(self):
        """Read on for a moment after the close frame was sent: a reset because of unread bytes could overtake it."""
        if self._writer:
            self._writer.join(CLOSE_SECONDS)
        with contextlib.suppress(OSError), gevent.Timeout(CLOSE_SECONDS, False):
            self._socket._sock.shutdown(socket.SHUT_WR)
            while self._socket.recv(65536):
                pass

    def _exactly(self, size):
        data = self._read(size) if size else b''
        if len(data) < size:
            raise WebSocketError('the connection ended')
        return data


def frame(payload, opcode=TEXT):
    """The bytes of one unmasked, final frame."""
    size = len(payload)
    if size < 126:
        return bytes((0x80 | opcode, size)) + payload
    if size < 65536:
        return struct.pack('!BBH', 0x80 | opcode, 126, size) + payload
    return struct.pack('!BBQ', 0x80 | opcode, 127, size) + payload


def encode(message):
    """A protocol message as a frame."""
    return frame(compact_json(message).encode())


class Subscription:
    """An identifier of a connection, and the stream behind it."""

    def __init__(self, connection, identifier, stream):
        self.connection = connection
        self.identifier = identifier
        self.stream = stream
        self._live = False          # messages are not sent before what was missed
        self._last_id = -1          # of the message that was sent last: nothing goes out twice
        quoted = json.dumps(identifier)
        self._head = f'{{"identifier":{quoted},"message":'.encode()

    def start(self, missed=(), last_id=-1):
        """Send what was missed, and be live from here on. last_id: of the last message that the client has."""
        self._live, self._last_id = True, last_id
        for message in missed:
            self.receive(message)

    def receive(self, message):
        """Send a message of the stream."""
        if not self._live or message.id <= self._last_id:
            return
        self._last_id = message.id
        tail = b'}'
        if self.connection.extended:
            tail = (f',"stream_id":{json.dumps(self.stream)},"epoch":"{cable.epoch}","offset":{message.id}}}').encode()
        self.connection.socket.push(frame(self._head + message.payload.encode() + tail))

    def send(self, type):
        self.connection.send({'identifier': self.identifier, 'type': type})


class Connection:
    """One client of /cable. Source of the messages: rails 2a2db1e, action_cable.rb; AnyCable's protocol document."""

    def __init__(self, socket, user, protocol, offered, restore=''):
        self.socket = socket
        self.user = user
        self.extended = protocol == 'actioncable-v1-ext-json'
        self.rails = 'actioncable-unsupported' in offered       # only Rails' own client offers that
        self.sid = secrets.token_urlsafe(12)
        self.subscriptions = {}     # identifier -> Subscription
        self._restore = restore

    def serve(self):
        """Greet, and do what the client commands until it is gone."""
        if self.user is None:
            self.disconnect('unauthorized', reconnect=False)
            return self.socket._linger()
        connections.setdefault(self.user, set()).add(self)
        heartbeat.set()
        try:
            self._welcome()
            for text in iter(self.socket.receive, None):
                self._obey(text)
        finally:
            connections[self.user].discard(self)
            if not connections[self.user]:
                del connections[self.user]
            for subscription in self.subscriptions.values():
                cable.unsubscribe(subscription.stream, subscription.receive)
            if self.subscriptions:
                self._save()

    def send(self, message):
        self.socket.push(encode(message))

    def disconnect(self, reason, reconnect):
        """Tell why, and close, for good after CLOSE_SECONDS."""
        self.send({'type': 'disconnect', 'reason': reason, 'reconnect': reconnect})
        self.socket.close(1001 if reconnect else 1008)
        gevent.spawn_later(CLOSE_SECONDS, self.socket.abort)

    def _welcome(self):
        if not self.extended:
            return self.send({'type': 'welcome'})
        welcome = {'type': 'welcome', 'sid': self.sid}
        saved = cache.get(f'cable {self._restore}') if self._restore else None
        if saved and saved['user'] == self.user:
            for identifier in saved['identifiers']:
                stream, _ = self._stream_of(identifier)
                if stream:
                    self._add(identifier, stream)       # starts with its history command, so that nothing overtakes
            welcome.update(restored=True, restored_ids=list(self.subscriptions))
            self._save()
        self.send(welcome)

    def _obey(self, text):
        """Do one command; what is malformed or unknown is logged and ignored, as Rails does."""
        try:
            command = json.loads(text)
            name, identifier = command['command'], command.get('identifier')
            if name == 'pong':
                return
            if not isinstance(identifier, str):
                raise ValueError('no identifier')
            if name == 'subscribe':
                self._subscribe(identifier, command.get('history'))
            elif name == 'unsubscribe':
                self._unsubscribe(identifier)
            elif name == 'history' and self.extended:
                if identifier in self.subscriptions:
                    self._replay_history(self.subscriptions[identifier], command.get('history'))
            elif name != 'message':         # StreamsChannel has no actions
                raise ValueError('no such command')
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            log.info('cable command ignored error=%r', error)

    def _subscribe(self, identifier, history):
        if identifier in self.subscriptions:
            # A Rails client repeats until it is confirmed, and a second element with the same identifier waits for a
            # confirmation of its own. AnyCable's takes one that it does not expect for an error.
            if self.rails:
                self.subscriptions[identifier].send('confirm_subscription')
            return
        stream, since = self._stream_of(identifier)
        if stream is None or len(self.subscriptions) >= MAX_SUBSCRIPTIONS:
            return self.send({'identifier': identifier, 'type': 'reject_subscription'})
        subscription = self._add(identifier, stream)
        subscription.send('confirm_subscription')
        if history and self.extended:
            self._replay_history(subscription, history)
        elif since is None:
            subscription.start()
        else:
            try:
                subscription.start(cable.since(stream, since), offset_of(since))
            except PositionLost:
                subscription.start([Message(offset_of(cable.position()), stream, json.dumps(render('refresh')), 0.0)])
        self._save()

    def _unsubscribe(self, identifier):
        subscription = self.subscriptions.pop(identifier, None)
        if subscription:
            cable.unsubscribe(subscription.stream, subscription.receive)
            self._save()

    def _replay_history(self, subscription, history):
        """Send what was missed, or say that it is lost; then the subscription is live."""
        try:
            position = (history.get('streams') or {}).get(subscription.stream)
            if position is not None:
                position = f'{position["epoch"]}:{position["offset"]}'
                subscription.start(cable.since(subscription.stream, position), offset_of(position))
            else:
                subscription.start(cable.since_time(subscription.stream, float(history['since'])))
            subscription.send('confirm_history')
        except (PositionLost, KeyError, TypeError, ValueError, AttributeError, OverflowError):
            subscription.start()
            subscription.send('reject_history')

    def _stream_of(self, identifier):
        """The stream that an identifier names, and the position in it to start after; None where it may not listen."""
        try:
            params = json.loads(identifier)
            if params['channel'] not in ('Turbo::StreamsChannel', '$pubsub'):
                return None, None
            since = params.get('since')
            return verify_stream_name(params['signed_stream_name'], self.user), since if isinstance(since, str) else None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None, None

    def _add(self, identifier, stream):
        subscription = self.subscriptions[identifier] = Subscription(self, identifier, stream)
        cable.subscribe(stream, subscription.receive)
        return subscription

    def _save(self):
        """Keep what is needed to take this session up again after a cut, or a restart. todol's own script, which offers
        actioncable-unsupported too, resumes by position: its visitors leave no row."""
        if self.extended and not self.rails:
            cache.set(f'cable {self.sid}', {'user': self.user, 'identifiers': list(self.subscriptions)}, ttl=RESUME_SECONDS)


class Heartbeat:
    """Pings every connection, and drops those that have gone silent. Sleeps while there are none."""

    def __init__(self):
        self._anybody = gevent.event.Event()
        self._beats = 0

    def open(self):
        self._loop = Loop('heartbeat', self._turn)

    def close(self):
        self._loop.stop()

    def set(self):
        self._anybody.set()

    def _turn(self):
        self._anybody.wait()
        gevent.sleep(BEAT_SECONDS)
        if not connections:
            return self._anybody.clear()
        self._beats += 1
        ping = encode({'type': 'ping', 'message': int(time.time())})
        if self._beats % BEATS_PER_WS_PING == 0:
            ping += frame(b'', PING)
        silent_since = time.monotonic() - SILENCE_SECONDS
        for connection in [each for group in connections.values() for each in group]:
            if connection.socket.heard_at < silent_since:
                connection.socket.abort()
            else:
                connection.socket.push(ping)


heartbeat = Heartbeat()


# === HTTP: gevent's server, strict about what it reads, and with answers in one packet ================================

QUIET_SECONDS = 75          # a keep-alive connection, or one in the middle of a request, may be silent so long
DRAIN_SECONDS = 5           # requests may go on so long when the process stops
MAX_CONNECTIONS = 20_000
MAX_HEADERS = 100           # of a request
MAX_HEADER_BYTES = 16_384   # of one of them
REQUEST_LINE = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+) ([!-~\xa1-\xff]+) (HTTP/1\.[01])\r?\n")    # RFC 9112, section 3
HEADER = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([\t -~\x80-\xff]*)\r?\n")     # RFC 9110, section 5
SINGLE_HEADERS = ('host', 'content-length', 'transfer-encoding')


class BadHead(ValueError):
    """The head of a request that can't be understood, or not in one way only. The connection ends with 400."""


class Headers:
    """The header section of a request, by lower-case name; several of a name are joined. Raises BadHead.

    It has the methods that gevent calls. http.client's goes through email.parser, which costs 20 us more for the headers
    of a browser, and is lenient: it skips all that follows a malformed line, joins folded lines and takes the first of
    two lengths, where a proxy may have understood something else. Source: RFC 9110, section 5; RFC 9112, sections 5, 6.
    """

    status = ''         # that of gevent's own tells of a line that was too long

    def __init__(self, file):
        self._values = values = {}
        for _ in range(MAX_HEADERS + 1):
            line = file.readline(MAX_HEADER_BYTES + 1)
            if line == b'\r\n' or line == b'\n':
                break
            match = HEADER.fullmatch(line.decode('latin-1'))
            if not match:
                raise BadHead('too long, or not a name, a colon and a value' if line else 'the connection ended')
            name, value = match[1].lower(), match[2].strip(' \t')
            if name not in values:
                values[name] = value
            elif name in SINGLE_HEADERS:
                raise BadHead(f'{name} twice')
            else:
                values[name] += ('; ' if name == 'cookie' else ',') + value
        else:
            raise BadHead(f'more than {MAX_HEADERS} headers')
        if not re.fullmatch('[0-9]{1,18}', values.get('content-length', '0')):
            raise BadHead('content-length is not a number')
        if values.get('transfer-encoding', 'chunked').lower() != 'chunked':
            raise BadHead('transfer-encoding is not chunked')
        if 'transfer-encoding' in values and 'content-length' in values:
            raise BadHead('the length is said in two ways')

    def get(self, name, default=None):
        return self._values.get(name.lower(), default)

    getheader = get

    @property
    def typeheader(self):
        return self._values.get('content-type')

    def items(self):
        return self._values.items()

    @property
    def headers(self):
        """Lines, as gevent's own Handler wants them."""
        return [f'{name}: {value}' for name, value in self.items()]


if 'http.client' in later:      # another server in this process would have no headers
    gevent.pywsgi.headers_factory = lambda file, *_: Headers(file)


class Handler(WebSocketHandler):
    """One HTTP connection: gevent's handler, with the upgrade to /cable done strictly, and an answer in one packet."""

    logger = log        # as shipped, one of the library's own, made for the first request and looked up for each

    def handle(self):
        """Serve the connection. As shipped, who does not stay to hear that a request was bad causes a traceback."""
        with contextlib.suppress(OSError):
            super().handle()

    def upgrade_websocket(self):
        """Answer an upgrade to a WebSocket. Gives None when that is done, or none was asked for, else a refusal's body."""
        environ = self.environ
        wishes = [name.strip() for name in environ.get('HTTP_CONNECTION', '').lower().split(',')]
        if environ.get('HTTP_UPGRADE', '').lower() != 'websocket' or 'upgrade' not in wishes:
            return None
        key = environ.get('HTTP_SEC_WEBSOCKET_KEY', '').strip()
        session = session_of(environ)
        user = session[0] if session else None
        offered = [name.strip() for name in environ.get('HTTP_SEC_WEBSOCKET_PROTOCOL', '').split(',') if name.strip()]
        protocol = next((name for name in PROTOCOLS if name in offered), None)
        if environ['PATH_INFO'] != CABLE_PATH:
            return self._refuse('404 Not Found', 'the WebSocket is at /cable')
        if environ['REQUEST_METHOD'] != 'GET' or self.request_version != 'HTTP/1.1':
            return self._refuse('400 Bad Request', 'a WebSocket starts with GET in HTTP/1.1')
        if not origin_is_host(environ):
            return self._refuse('403 Forbidden', 'a page of another site may not connect')
        if environ.get('HTTP_SEC_WEBSOCKET_VERSION') != '13':
            return self._refuse('426 Upgrade Required', 'version 13 is spoken here', ('Sec-WebSocket-Version', '13'))
        if not re.fullmatch('[A-Za-z0-9+/]{21}[AQgw]==', key):
            return self._refuse('400 Bad Request', 'Sec-WebSocket-Key must be 16 bytes in base64')
        if offered and protocol is None:
            return self._refuse('400 Bad Request', f'the protocols spoken here are {", ".join(PROTOCOLS[:2])}')
        if len(connections.get(user, ())) >= settings.max_sockets:
            return self._refuse('429 Too Many Requests', f'{settings.max_sockets} sockets are open already')
        accept = base64.b64encode(hashlib.sha1((key + WEBSOCKET_GUID).encode()).digest()).decode()
        headers = [('Upgrade', 'websocket'), ('Connection', 'Upgrade'), ('Sec-WebSocket-Accept', accept)]
        if protocol:
            headers.append(('Sec-WebSocket-Protocol', protocol))
        self.websocket = environ['wsgi.websocket'] = CableSocket(environ, _NoStream, self)
        query = urllib.parse.parse_qs(environ['QUERY_STRING'])
        restore = (query.get('sid') or [environ.get('HTTP_X_ANYCABLE_RESTORE_SID', '')])[0]
        self.cable_connection = Connection(self.websocket, user, protocol, offered, restore)
        self.start_response('101 Switching Protocols', headers)

    def run_websocket(self):
        """Serve the connection, in place of the library's way through the WSGI application."""
        self.socket.settimeout(None)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            self.cable_connection.serve()
        finally:
            self.websocket.close()
            if self.websocket._writer:
                self.websocket._writer.join(CLOSE_SECONDS)
            self.websocket.closed = True

    def read_request(self, line):
        """Parse the head of a request. Raises BadHead.

        As shipped, a request may be of HTTP/0.9, have blanks of all kinds in its first line, no Host, or chunks in HTTP/1.0;
        Connection: close counts only alone; a folded or malformed header is taken for something.
        """
        match = REQUEST_LINE.fullmatch(line)
        if not match:
            raise BadHead('not a method, a target, and HTTP/1.1 or HTTP/1.0')
        self.command, self.path, self.request_version = match.groups()
        self.headers = headers = Headers(self.rfile)
        length, connection = headers.get('content-length'), headers.get('connection', '').lower()
        self.content_length = length and int(length)
        if self.content_length and self.command == 'HEAD':
            raise BadHead('a body with HEAD')
        if self.request_version == 'HTTP/1.1':
            if not headers.get('host'):
                raise BadHead('no host')
            self.close_connection = 'close' in connection.replace(',', ' ').split()
        else:
            if headers.get('transfer-encoding'):
                raise BadHead('transfer-encoding came with HTTP/1.1')
            self.close_connection = connection != 'keep-alive'
        return True

    def _connection_upgrade_requested(self):
        return False    # as shipped, the application then gets the bare connection, and what it reads is skipped once more

    def _headers(self):
        """The headers as get_environ() puts them. One with an underscore could pass for another, with a hyphen."""
        for name, value in self.headers.items():
            if '_' not in name and name not in ('content-type', 'content-length'):
                yield 'HTTP_' + name.replace('-', '_').upper(), value

    def read_requestline(self):
        """The first line of a request. Until it comes the server may hang up, and sees to it that nobody waits too long."""
        self.server.waiting[self] = time.monotonic()
        self.socket.settimeout(None)        # a timer of its own costs each request 12 us
        try:
            return '' if self.server.closed else super().read_requestline()
        finally:
            self.server.waiting.pop(self, None)
            self.socket.settimeout(QUIET_SECONDS)

    def hang_up(self):
        with contextlib.suppress(OSError):
            self.socket._sock.shutdown(socket.SHUT_RD)

    def _handle_client_error(self, error):
        # As shipped, some of these print a traceback past the log.
        log.info('bad request error=%r', error)
        return '400', b'HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Length: 0\r\n\r\n'

    def _refuse(self, status, reason, *headers):
        self.start_response(status, [('Content-Type', 'text/plain'), *headers])
        return [reason.encode() + b'\n']

    def start_response(self, status, headers, exc_info=None):
        """As shipped, but what many answers have in common is not encoded again for each: 5 us less."""
        if exc_info and self.headers_sent:
            raise exc_info[1].with_traceback(exc_info[2])
        self.status, self.code = encoded(status), int(status[:3])
        self.response_headers = [(encoded(name), encoded(value)) for name, value in headers]
        given = {name.lower(): value for name, value in headers}
        self.provided_date, self.provided_content_length = given.get('date'), given.get('content-length')
        if 'date' not in given:
            self.provided_date = http_date(int(time.time()))
            self.response_headers.append((b'Date', self.provided_date))
        if self.request_version == 'HTTP/1.0' and 'connection' not in given:
            self.response_headers.append((b'Connection', b'close' if self.close_connection else b'keep-alive'))
        self.close_connection |= given.get('connection') == 'close' or self.code == 101     # no request follows a WebSocket
        return self.write

    def _write_with_headers(self, data):
        # As shipped, headers and body are two sends: a keep-alive client then waits 40 ms for each answer (Nagle's
        # algorithm meets delayed acknowledgement).
        self.headers_sent = True
        self.finalize_headers()
        data = data or b''         # gevent-websocket writes a str
        lines = [b'HTTP/1.1 ' + self.status]
        lines += [name + b': ' + value for name, value in self.response_headers]
        head = b'\r\n'.join(lines) + b'\r\n\r\n'
        if self.response_use_chunked:
            self._sendall(head)
            self._write(data)
        else:
            self._sendall(head + data)

    def _sendall(self, data):
        # Most answers fit into the kernel's buffer at once. gevent's sendall() first asks how large that is: 6 us.
        try:
            sent = self.socket._sock.send(data)
        except OSError:
            sent = 0            # sendall() waits, or meets the error again
        self.response_length += sent
        if sent < len(data):
            super()._sendall(memoryview(data)[sent:])

    def log_request(self):
        pass        # a line for each request would cost a tenth of it; what goes wrong is logged where it does


http_date = functools.lru_cache(2)(gevent.pywsgi.format_date_time)     # made once a second: 3 us less an answer


@functools.lru_cache(1024)
def encoded(text):
    """A part of an answer's head as bytes. Raises ValueError if it would end the line: what follows would be taken for more."""
    if '\r' in text or '\n' in text:
        raise ValueError(f'carriage return or newline in {text!r}')
    return text.encode('latin-1')


class _NoStream:
    """CableSocket has its own way to the socket; the library's base class only looks at these."""
    read = write = None


class Server(WSGIServer):
    """The HTTP server, which can stop without cutting off a request."""

    def __init__(self, listener):
        self.greenlets = set()      # one a connection; gevent.pool would do the same, and cost the start 3 ms
        self.waiting = {}           # handler between two requests -> since when; who has waited longest comes first
        self._loop = Loop('connections', self._hang_up_on_the_silent)
        super().__init__(listener, application, spawn=self.spawn, log=None, error_log=LogFile(), handler_class=Handler,
                         environ={'SERVER_NAME': settings.host})

    # do_read(), spawn() and full() are called by gevent, which accepts nothing while the server is full.

    def do_read(self):
        """Accept a connection. Out of files it says so in a line: a traceback would have to open some."""
        try:
            return super().do_read()
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            log.error('can not accept a connection: %s', error.strerror)
            self.stop_accepting()
            gevent.spawn_later(RESTART_SECONDS, self._start_accepting_if_started)
            return None

    def spawn(self, *arguments):
        greenlet = gevent.spawn(*arguments)
        self.greenlets.add(greenlet)
        greenlet.rawlink(self.ended)

    def ended(self, greenlet):
        self.greenlets.discard(greenlet)
        self._start_accepting_if_started()

    def full(self):
        return len(self.greenlets) >= MAX_CONNECTIONS

    def drain(self):
        """Accept nothing more, let requests end and sockets close, for DRAIN_SECONDS at most."""
        self.close()
        self._loop.stop()
        for handler in list(self.waiting):
            handler.hang_up()
        for connection in [each for group in connections.values() for each in group]:
            connection.disconnect('server_restart', reconnect=True)
        gevent.joinall(list(self.greenlets), DRAIN_SECONDS)
        with gevent.Timeout(1, False):
            gevent.killall(list(self.greenlets))

    def _hang_up_on_the_silent(self):
        while self.waiting:
            handler, since = next(iter(self.waiting.items()))
            left_s = since + QUIET_SECONDS - time.monotonic()
            if left_s > 0:
                return gevent.sleep(left_s)
            del self.waiting[handler]
            handler.hang_up()
        gevent.sleep(QUIET_SECONDS)


# === Process: start, serve, stop ======================================================================================
# Start: settings, files, migrations, secret, loops, and only then the port. Stop, on SIGTERM or SIGINT: no new
# connections, requests end, sockets are told to come back, jobs are given back, files are closed, exit status 0 (on
# any other, Litestream skips its last sync).

KEPT_ROLES = ('app', 'cache', 'job')    # worth a copy elsewhere (litestream.yml names the same); the cable is not
LITESTREAM_SECONDS = 3                  # by then it has seen new files; one that stops sooner loses all (litestream #436)


class JsonLines(logging.Formatter):
    """One JSON object a line."""

    def format(self, record):
        line = {'time': round(record.created, 3), 'level': record.levelname.lower(), 'message': record.getMessage()}
        if record.exc_info:
            line['traceback'] = self.formatException(record.exc_info)
        return json.dumps(line)


class LogFile:
    """What gevent and bottle write their errors to: lines of the log."""

    def write(self, text):
        if text.strip():
            log.error('%s', text.strip())

    def flush(self):
        pass


def start_logging(form='text'):
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if form == 'json' else logging.Formatter('%(asctime)s %(levelname)-7s %(message)s'))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False
    gevent.get_hub().exception_stream = LogFile()


def database_path(role):
    """The file of one of the four databases, named by environment as Litestack does."""
    suffix = '' if role == 'app' else f'_{role}'
    return os.path.join(settings.data, f'{settings.env}{suffix}.sqlite3')


def open_databases(chosen):
    """Take the settings, open the four files and bring them up to date. Raises TodolError."""
    choose(chosen)
    if sqlite3.sqlite_version_info < (3, 35):
        raise StorageError(f'SQLite {sqlite3.sqlite_version} is too old: 3.35 or later is needed (RETURNING)')
    try:
        os.makedirs(settings.data, mode=0o700, exist_ok=True)
    except OSError as error:
        raise SettingError(f'TODOL_DATA is {settings.data!r}, which can not be a directory: {error.strerror}') from None
    for database in (app_db, cache_db, job_db, cable_db):
        # What Litestream copies is synced by its checkpoints, and not deleted while Litestream has it open.
        litestream = settings.litestream and database.role in KEPT_ROLES
        synchronous = {'app': settings.sync, 'job': 'NORMAL'}.get(database.role, 'NORMAL' if litestream else 'OFF')
        database.open(database_path(database.role), synchronous, checkpoints=not litestream)


def open_stack(chosen):
    """Open the databases and start the four services on them. Raises TodolError, and leaves nothing open then."""
    with contextlib.ExitStack() as undo:
        undo.callback(close_databases)
        open_databases(chosen)
        write_shares.clear()
        keys.load()
        doorbell.open(settings.data, settings.env)
        undo.callback(doorbell.close)
        cache.open()
        undo.callback(cache.close)
        cable.open()
        undo.callback(cable.close)
        heartbeat.open()
        undo.callback(heartbeat.close)
        jobs.open(doorbell.name or f'{os.getpid()}', settings.job_workers)
        undo.pop_all()


def close_stack():
    """Stop the services in the order in which they need each other, and close the files, whatever fails on the way."""
    for service in (jobs, heartbeat, cable, cache, doorbell, app_db, cache_db, job_db, cable_db):
        try:
            service.close()
        except Exception:
            log.exception('could not close %s', type(service).__name__)


def close_databases():
    for database in (app_db, cache_db, job_db, cable_db):
        database.close()


def listen():
    """The listening socket. Raises SettingError if the address can't be had."""
    try:
        # The standard library's getaddrinfo: nothing else runs yet, and gevent's would start a thread for it. Bytes: a str
        # imports the tables of international names.
        host = settings.host.encode() if settings.host.isascii() else settings.host
        family, kind, _, _, address = socket.getaddrinfo(host, settings.port, type=socket.SOCK_STREAM,
                                                         flags=socket.AI_PASSIVE)[0]
        listener = gevent.socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)      # what it accepts inherits it
        listener.bind(address)
        listener.listen(1024)
        return listener
    except (OSError, UnicodeError) as error:        # UnicodeError: a HOST that can't be a name
        reason = getattr(error, 'strerror', None) or error
        hint = '. Another program is there; set another PORT' if getattr(error, 'errno', 0) == errno.EADDRINUSE else ''
        raise SettingError(f'can not listen on HOST {settings.host} PORT {settings.port}: {reason}{hint}') from None


def import_for_errors():
    """Import what it takes to tell of an error: out of files, when there are errors, nothing can be imported any more."""
    while True:
        try:
            importlib.import_module('tokenize')
            importlib.import_module('traceback')
            return
        except OSError:
            gevent.sleep(RESTART_SECONDS)


def serve(chosen):
    """Run until SIGTERM or SIGINT. Gives the exit status."""
    gc.freeze()         # what there is now stays, so no collection needs to look at it: 7 ms each
    gc.set_threshold(10_000)    # new objects between two looks at them, not 700: 3 % less CPU a request
    gc.enable()
    started_at = time.monotonic()
    stopping = gevent.event.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        gevent.signal_handler(number, stopping.set)
    open_stack(chosen)
    try:
        server = Server(listen())
    except TodolError:
        close_stack()
        raise
    server.start()
    gevent.spawn_later(0.1, import_for_errors)      # after the first page, if somebody waits for it
    host, port = server.socket.getsockname()[:2]
    log.info('todol %s is at http://%s:%s (data in %s; Ctrl-C stops it)', __version__,
             f'[{host}]' if ':' in host else host, port, os.path.abspath(settings.data))
    stopping.wait()
    log.info('stopping')
    server.drain()
    if settings.litestream:
        gevent.sleep(max(0, started_at + LITESTREAM_SECONDS - time.monotonic()))
    close_stack()
    log.info('stopped')
    return 0


# === Backups: copies, restores, checks, for those without Litestream ==================================================
# A copy of a file is one read transaction, so it is consistent while the app serves. The app database goes first: a job
# moves from there to the job database, and is in one of the two copies, or in both, where its uid makes it one.

ARCHIVES = ('.tar.gz', '.zip')


class BackupError(TodolError):
    """A backup that can't be made or restored; nothing was overwritten."""


def backup(target):
    """Copy the files of KEPT_ROLES to a directory, or to one .tar.gz or .zip; the app may run. Raises TodolError."""
    import shutil
    import tempfile
    if target.endswith(ARCHIVES):
        suffix = next(suffix for suffix in ARCHIVES if target.endswith(suffix))
        with tempfile.TemporaryDirectory(dir=os.path.dirname(os.path.abspath(target))) as scratch:
            backup(os.path.join(scratch, 'files'))
            made = shutil.make_archive(os.path.join(scratch, 'archive'), {'.zip': 'zip'}.get(suffix, 'gztar'),
                                       os.path.join(scratch, 'files'))
            os.chmod(made, 0o600)           # it holds the secret that signs sessions
            os.replace(made, target)
        return
    for role in KEPT_ROLES:
        if not os.path.exists(database_path(role)):
            raise BackupError(f'there is no {database_path(role)}; set TODOL_DATA and TODOL_ENV as the app has them')
    os.makedirs(target, mode=0o700, exist_ok=True)
    for role in KEPT_ROLES:
        path = os.path.join(target, os.path.basename(database_path(role)))
        if BootMark(database_path(role)).is_stale():
            raise BackupError(f'{database_path(role)} was open when the machine went down; start todol once before a backup')
        with contextlib.closing(read_only(database_path(role))) as source, \
                contextlib.closing(sqlite3.connect(path + '.new')) as copy:
            source.backup(copy)
            copy.execute('PRAGMA journal_mode = DELETE')        # one file, without -wal and -shm
        refuse_damage(role, path + '.new')
        os.replace(path + '.new', path)


def restore(source, force=False):
    """Put the files of a backup in the place of today's. Raises BackupError, and changes nothing, if a file is damaged or
    of a newer todol, if today's would be overwritten (without force), or if the app runs."""
    import shutil
    import tempfile
    with tempfile.TemporaryDirectory() as scratch:
        if source.endswith(ARCHIVES):
            try:
                shutil.unpack_archive(source, scratch)
            except (OSError, shutil.ReadError, ValueError) as error:
                raise BackupError(f'{source} can not be unpacked: {error}') from None
            source = scratch
        paths = {role: os.path.join(source, os.path.basename(database_path(role))) for role in KEPT_ROLES}
        for role, path in paths.items():
            if not os.path.exists(path):
                raise BackupError(f'the backup has no {os.path.basename(path)}; TODOL_ENV is {settings.env}')
            refuse_damage(role, path)
        os.makedirs(settings.data, mode=0o700, exist_ok=True)
        doorbell.open(settings.data, settings.env)
        try:
            if doorbell.neighbours() and not doorbell.deaf:
                raise BackupError('the app runs on these files; stop it first')
            present = [database_path(role) for role in MIGRATIONS if os.path.exists(database_path(role))]
            if present and not force:
                raise BackupError(f'{present[0]} exists; give --force to put the backup in its place')
            for role, path in paths.items():
                shutil.copyfile(path, database_path(role) + '.new')
            for role in MIGRATIONS:         # the cable too: a new log, so that every open tab loads the page again
                delete_files(database_path(role), (*DATABASE_SUFFIXES, '-boot'))
            for role in paths:
                os.rename(database_path(role) + '.new', database_path(role))
        finally:
            doorbell.close()


def check():
    """What is wrong with the four files, as sentences. They are only read; the app may run."""
    problems = []
    for role in MIGRATIONS:
        path = database_path(role)
        missing = role not in KEPT_ROLES and not os.path.exists(path)      # as a restore leaves the cable
        if missing or BootMark(path).is_stale():
            continue                # the next start makes a new one
        try:
            refuse_damage(role, path)
        except TodolError as error:
            problems.append(str(error))
    if problems:
        return problems
    with contextlib.closing(read_only(database_path('app'))) as app_file, \
            contextlib.closing(read_only(database_path('job'))) as job_file:
        for user, counted, kept in app_file.execute(MISCOUNTED_LISTS):
            problems.append(f'{database_path("app")}: the list of {user} has {counted} todos, its row in lists says {kept}')
        for id, row in app_file.execute('SELECT id, job FROM outbox'):
            try:
                name = json.loads(row)['name']
            except (ValueError, KeyError, TypeError):
                name = None
            if name not in jobs.names():
                problems.append(f'{database_path("app")}: outbox row {id} is no job of this todol')
        for id, name in job_file.execute(STUCK_JOBS):
            problems.append(f'{database_path("job")}: job {id} ({name}) waits for nothing')
        for name, count in job_file.execute('SELECT name, count(*) FROM jobs WHERE failed_at IS NOT NULL GROUP BY name'):
            problems.append(f'{database_path("job")}: {count} failed jobs of {name} are parked')
    return problems


MISCOUNTED_LISTS = '''
    SELECT todos.user_id, count(*), coalesce(lists.active + lists.completed, 0)
    FROM todos LEFT JOIN lists ON lists.user_id = todos.user_id GROUP BY todos.user_id
    HAVING count(*) <> coalesce(lists.active + lists.completed, 0) OR sum(todos.completed) <> lists.completed'''
STUCK_JOBS = '''
    SELECT id, name FROM jobs WHERE due_at IS NULL AND failed_at IS NULL
    AND NOT EXISTS (SELECT 1 FROM jobs AS head WHERE head.order_key = jobs.order_key AND head.id < jobs.id
                    AND head.failed_at IS NULL)'''


def read_only(path):
    """A plain connection that can't write. Raises StorageError."""
    if not os.path.exists(path):
        raise StorageError(f'{path} does not exist')
    return sqlite3.connect(f'file:{urllib.parse.quote(os.path.abspath(path))}?mode=ro', uri=True, timeout=BUSY_SECONDS)


def refuse_damage(role, path):
    """Raises StorageError or MigrationError unless the file is whole and this todol can open it."""
    try:
        Database(role).examine(path)
        with contextlib.closing(read_only(path)) as connection:
            (result,), = connection.execute('PRAGMA integrity_check(1)')
    except (sqlite3.Error, OSError) as error:
        result = str(error)
    if result != 'ok':
        raise StorageError(f'{path} is damaged: {result}')


# === Styles: values, then meanings, then rules ========================================================================
# Served as it stands at /assets/todol-<digest>.css, read by nothing but asset_bytes().

STYLES = r'''
:root {
  color-scheme: light dark;
  --pencil: url("data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 20 20'%3E%3Cpath d='M2 14v4h4L15 9l-4-4zM16 8l-4-4 2-2 4 4z'/%3E%3C/svg%3E");
  --plus: linear-gradient(currentColor 0 0) center / 2px 16px no-repeat, linear-gradient(currentColor 0 0) center / 16px 2px no-repeat;
  --text: clamp(1.0625rem, 1rem + .3vw, 1.1875rem);
  --row: calc(1.45 * var(--text) + 1.3rem);
  --quick: 150ms ease-out;

  --paper: light-dark(oklch(97.5% .008 85), oklch(20% .008 85));
  --field: light-dark(oklch(99.5% .008 85), oklch(25% .008 85));
  --ink: light-dark(oklch(27% .008 85), oklch(90% .008 85));
  --done: light-dark(oklch(49% .008 85), oklch(73% .008 85));
  --line: light-dark(oklch(90% .008 85), oklch(31% .008 85));
  --edge: light-dark(oklch(60% .008 85), oklch(58% .008 85));
  --accent: light-dark(oklch(49% .17 262), oklch(76% .12 258));
  --danger: light-dark(oklch(50% .18 27), oklch(76% .13 25));
  --tint: color-mix(in oklab, var(--accent) 14%, #0000);
}

*, ::before, ::after { box-sizing: border-box; min-width: 0; min-height: 0; margin: 0; }
[hidden], .error:empty { display: none !important; }
body { background: var(--paper); color: var(--ink); font: var(--text)/1.45 system-ui, sans-serif; overflow-wrap: anywhere; }
main, .info { max-width: 36rem; margin: auto; padding: 0 max(.75rem, env(safe-area-inset-left)); }
main { padding-top: 7vh; }
ul { padding: 0; list-style: none; }
input, button { padding: 0; border: 0; background: none; color: inherit; font: inherit; }
button, .toggle, .toggle-all { cursor: pointer; }
:disabled { pointer-events: none; }
button:hover, .filters a:hover { text-decoration: underline; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: -3px; border-radius: 10px; }
a, .save, .clear-completed, .new::before { color: var(--accent); }
::placeholder, .all, .completed label, .rename, .destroy, .footer, .empty, .nothing, .info { color: var(--done); opacity: 1; }
.all, .error, .save, .footer, .info { font-size: .875rem; font-variant-numeric: tabular-nums; }
.error { grid-column: 1 / -1; padding: .5rem 0 0 48px; color: var(--danger); }
.visually-hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
.todoapp, .new, .all, li, .view, .editor, .toggle, .toggle-all, .footer { display: grid; }
.new, .all, .editor, .footer { grid-template-columns: 1fr auto; align-items: center; }

/* Entry */
h1 { margin: 0 0 1rem 48px; font-size: clamp(2.25rem, 7vw, 3rem); font-weight: 300; line-height: 1.1; letter-spacing: -.025em; }
.new { position: relative; margin-bottom: .75rem; }
.new::before { content: ""; position: absolute; top: 0; width: 48px; height: 3.5rem; background: var(--plus); }
.new-todo { height: 3.5rem; padding: 0 1rem 0 47px; border: 1px solid var(--edge); border-radius: 14px; background: var(--field); }
.new-todo:focus { border-radius: 14px; outline-offset: -1px; box-shadow: 0 0 0 5px var(--tint); }
.save { height: 36px; margin-left: .5rem; padding: 0 .75rem; border: 1px solid var(--edge); border-radius: 10px; }
@media (scripting: enabled) { .save { display: none; } }

/* Rows */
.all { grid-template-columns: 48px 1fr auto; }
.todo-list li { grid-template-rows: 1fr; border-top: 1px solid var(--line); transition: var(--quick); transition-property: grid-template-rows, opacity; }
.todo-list form { grid-area: 1 / 1; overflow: clip; }
.view { grid-template-columns: 48px 1fr auto 40px 40px; }
.view label, .edit { padding: .65rem 0; }
.completed label { text-decoration: line-through 1px; }
.view .save { grid-column: 3; align-self: center; }
.rename, .destroy { grid-column: 4; height: var(--row); }
.destroy { grid-column: 5; }
:is(.rename, .destroy)::before { content: ""; display: block; height: 100%; background: currentColor; mask: var(--pencil) center / 16px no-repeat; }
.destroy::before { background: var(--plus); mask: none; rotate: 45deg; }
.rename:hover, .destroy:hover { color: var(--accent); }
@media (hover: hover) and (scripting: enabled) {
  .todo-list li:not(:hover, :focus-within) :is(.rename, .destroy) { opacity: 0; }
}

.toggle, .toggle-all {
  appearance: none; place-items: center; width: 48px; height: var(--row);
  &::before, &::after { content: ""; grid-area: 1 / 1; width: 24px; height: 24px; border: 1.5px var(--box, solid) var(--edge); border-radius: 8px; background: var(--field); transition: var(--quick); }
  &::after { width: 8px; height: 14px; border: solid var(--accent); border-width: 0 2.5px 2.5px 0; border-radius: 0; background: none; transform: translateY(-2px) rotate(45deg); clip-path: inset(100% 100% 0 0); }
  &:hover::before { border-color: var(--accent); }
  &:checked::before { border-color: var(--tint); background: var(--tint); }
  &:checked::after { clip-path: inset(0); }
}
.toggle-all { height: 44px; &::before, &::after { scale: .75; } }

/* The editor lies on the row, text upon text. */
.editing { border-radius: 10px; background: var(--field); outline: 2px solid var(--accent); outline-offset: -2px; }
.editing .view { visibility: hidden; }
.editor { grid-template-columns: 1fr 72px; align-self: start; padding: 0 8px 0 48px; }
.edit:focus { outline: 0; }
.editor .error { padding: 0 0 .5rem; }

/* A row on its way looks like any other for half a second. */
.pending { --box: dashed; color: var(--done); animation: fresh 1ms .5s backwards; }
:has([data-state="offline"]) .pending { animation: none; }
[data-showing="completed"] > .pending { display: none; }
.flash { animation: flash 1.2s; }
.leaving { animation: leave var(--quick) forwards; }
@keyframes fresh { from { --box: solid; color: var(--ink); } }
@keyframes flash { 0%, 20% { background: var(--tint); } }
@keyframes leave { to { grid-template-rows: 0fr; opacity: 0; } }
/* Not the rows of the page */
@starting-style {
  :has([data-state="live"]) .todo-list li:not(.editing, .pending) { grid-template-rows: 0fr; opacity: 0; }
}

/* Small print */
.footer { order: 1; grid-template: "count filters clear" 44px / 1fr auto 1fr; padding: .5rem 0 0 12px; border-top: 1px solid var(--line); }
strong { color: var(--ink); }
.filters { grid-area: filters; display: flex; justify-content: center; }
.filters a { display: block; padding: 12px .75rem; color: inherit; text-decoration: none; text-underline-offset: .5em; }
.filters .selected { color: var(--ink); text-decoration: underline 2px var(--accent); }
.clear { grid-area: clear; justify-self: end; }
.clear-completed { height: 44px; }
.empty, .nothing { padding: 2.5rem 1rem; text-align: center; }
.info { display: flex; flex-wrap: wrap; justify-content: center; gap: 0 2rem; padding-block: 1.5rem 5rem; }
.connection::before { content: "● " / ""; }
.connection:not([data-state="live"]) { position: fixed; bottom: calc(1rem + env(safe-area-inset-bottom)); padding: .5rem 1rem; border: 1px solid var(--edge); border-radius: 2em; background: var(--field); color: var(--ink); }
[data-state="offline"]::before { color: var(--danger); }
.message p { margin: 0 0 .5rem 48px; }

.empty, :has(#todos li:not(.pending), [data-showing~="active"] li) > .nothing { display: none; }
.todoapp:not(:has(.pending, .todo-count:not([data-active="0"][data-completed="0"]))) {
  .main, .footer, .nothing { display: none; }
  .empty { display: block; }
}
[data-completed="0"] ~ .clear { visibility: hidden; }

@media (width < 34rem) {
  .footer { grid-template: "count clear" 44px "filters filters" / 1fr auto; }
  .view .save { grid-area: 2 / 2; justify-self: start; margin: 0 0 .6rem; }
}
@media (hover: none), (scripting: none) { .info p:first-child { display: none; } }
@media (forced-colors: active) {
  .toggle, .toggle-all { appearance: auto; width: 24px; margin: 0 12px; &::before, &::after { display: none; } }
  .rename::before, .destroy::before { forced-color-adjust: none; }
}
@media not (prefers-reduced-motion) { @view-transition { navigation: auto; } }
::view-transition-group(root) { animation-duration: 150ms; }
/* Not none: the script waits for the end. */
@media (prefers-reduced-motion), print { *, ::before, ::after { animation-duration: 1ms !important; transition: none !important; } }
@media print {
  :root { color-scheme: light; --paper: #fff; }
  .new, .all, .filters, .clear, .info, .view > :not(input, label) { display: none; }
}
'''

ICON = '''
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16"><rect width="16" height="16" rx="4.5" fill="#2c55b8"/><path d="m4 8.6 2.8 2.8L12.2 5" fill="none" stroke="#fff" stroke-width="2.2" stroke-linecap="round" stroke-linejoin="round"/></svg>
'''


# === Scripts: the browser's side ======================================================================================
# Served as it stands at /assets/todol-<digest>.js. It needs no build and no network but this server.

SCRIPTS = r'''
// Forms by fetch, Turbo Streams, the cable, editing in place. Beside the real Turbo, which then defines the elements.
const TURBO_STREAM = 'text/vnd.turbo-stream.html';
const HIDDEN_MS = 60_000, STALE_MS = 8_000, ANSWER_MS = 20_000;
const $ = (selector, root = document) => root.querySelector(selector);
const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];
const byId = id => document.getElementById(id);
const wait = ms => new Promise(resolve => setTimeout(resolve, ms));

// Versions: what a newer message has shown, an older one must not undo. Ids of the database are never used again, so
// what was removed by its id stays away.
const versions = new Map();
const known = id => versions.get(id) ?? Number(byId(id)?.dataset.version ?? -1);
function outdated(id, version) {
  if (!id || version === undefined) return false;
  if (version < known(id)) return true;
  versions.set(id, Number(version));
  return false;
}
// A row shows the change of it that is on its way, until the answer comes.
const held = id => !!id && changes.some(({ row, all }) => row === id || all && byId(id)?.matches('#todos li:not(:empty), #toggle-all'));

// Morph: make an element like another without replacing it, so that focus, typed text and clicks in flight survive.
const ours = node => node?.nodeType === 3 ? !node.data.trim() : node?.matches('.editor, .gone, .leaving, .pending');
function morph(from, to) {
  if (from.nodeName !== to.nodeName) return from.replaceWith(to);
  if (held(from.id) || from.matches('.error') || outdated(to.id, to.dataset.version)) return;
  const editing = from.matches('.editing');
  for (const { name } of [...from.attributes]) to.hasAttribute(name) || from.removeAttribute(name);
  for (const { name, value } of to.attributes) from.getAttribute(name) === value || from.setAttribute(name, value);
  if (editing) from.classList.add('editing');
  if (from.type === 'checkbox') from.checked = to.checked;
  const ids = new Set([...to.children].map(({ id }) => id));
  for (const child of [...from.children]) if (child.id && !ids.has(child.id) && !ours(child)) leave(child);
  let next = from.firstChild;
  for (const child of [...to.childNodes].filter(node => !ours(node))) {
    while (ours(next)) next = next.nextSibling;
    const match = child.id ? byId(child.id) : next;
    if (match?.parentNode !== from || match.nodeName !== child.nodeName || match.id !== child.id) {
      held(child.id) || outdated(child.id, child.dataset?.version) || from.insertBefore(child, next);
      continue;
    }
    if (match === next) next = next.nextSibling;
    else from.insertBefore(match, next);
    if (match.nodeType === 1) morph(match, child);
    else if (match.data !== child.data) match.data = child.data;
  }
  while (next) {
    const gone = next;
    next = next.nextSibling;
    ours(gone) || leave(gone);
  }
}

function leave(node) {
  if (!node.matches?.('#todos > li')) return node.remove();
  if ($('.editor', node)) return node.classList.add('gone');      // the edit decides what becomes of it
  if (node.contains(document.activeElement)) focusBeside(node);
  node.removeAttribute('id');
  node.classList.add('leaving');
  node.inert = true;
  Promise.allSettled(node.getAnimations({ subtree: true }).map(animation => animation.finished)).then(() => node.remove());
}

// Turbo Streams. Source: @hotwired/turbo 8, stream_actions.js
const insert = (place, inside) => (target, content) => {
  for (const { id } of content.children) {
    const twin = id && byId(id);
    if (twin?.parentNode === (inside ? target : target.parentNode)) twin.remove();
  }
  target[place](content);
};
const actions = {
  append: insert('append', true),
  prepend: insert('prepend', true),
  before: insert('before'),
  after: insert('after'),
  remove: target => leave(target),
  replace: (target, content, morphs) => morphs ? morph(target, content.firstElementChild) : target.replaceWith(content),
  update(target, content, morphs) {
    if (!morphs) return target.replaceChildren(content);
    const copy = target.cloneNode(false);
    copy.append(content);
    morph(target, copy);
  },
};
class StreamElement extends HTMLElement {
  connectedCallback() {
    const [action, target, targets] = ['action', 'target', 'targets'].map(name => this.getAttribute(name));
    const content = $('template', this)?.content, first = content?.firstElementChild;
    this.remove();
    if (action === 'refresh') return visit();
    const { row: id = first?.id, version = first?.dataset.version } = this.dataset;
    if (action === 'remove' && target) versions.set(target, Infinity);
    if (held(id) || outdated(id, version)) return;
    const all = targets ? $$(targets) : [byId(target)];
    for (const each of all) if (each) actions[action]?.(each, content?.cloneNode(true), this.getAttribute('method') === 'morph');
  }
}
function renderStreams(html, flash) {
  const fragment = document.createRange().createContextualFragment(html);
  const news = $$('[data-row]', fragment).filter(({ dataset: { row, version } }) => version > known(row));
  document.body.append(fragment);
  if (flash && !changes.length) for (const { dataset } of news) byId(dataset.row)?.classList.add('flash');
}

// Visits: another filter, or the page again, morphed in. One that is older than what is shown is asked for again.
// Of another epoch everything is news: the databases are new, and count from the start.
const epochOf = source => source.dataset.since.split(':')[0];
let visiting, epoch = epochOf($('#cable'));
async function visit(url = location.href, push) {
  const current = visiting = {};
  let page;
  try {
    const answer = await fetch(url, { headers: { Accept: 'text/html' }, signal: AbortSignal.timeout(ANSWER_MS) });
    if (answer.ok) page = new DOMParser().parseFromString(await answer.text(), 'text/html');
  } catch { /* ask again */ }
  if (visiting !== current) return;
  const fresh = page && $('#cable', page);
  if (page && epochOf(fresh) !== epoch) {
    epoch = epochOf(fresh);
    versions.clear();
    for (const each of $$('[data-version]')) each.dataset.version = -1;
  }
  if (!page || outdated('todo-count', $('#todo-count', page).dataset.version)) return wait(1000).then(() => visiting === current && visit(url, push));
  if (push) history.pushState(null, '', url);
  morph($('#todoapp'), $('#todoapp', page));
  morph($('#cable'), fresh);
}
addEventListener('popstate', () => visit());
if (location.pathname.endsWith('/edit')) history.replaceState(null, '', '/');

// Changes go to the server one after another, in their order. While it can't be reached they wait, over a reload too;
// the key of a new todo makes sending it twice harmless. Its row is there at once, pending until the real one comes; a
// page just loaded may have that, and draws none until it must wait.
const changes = JSON.parse(sessionStorage.getItem('changes') ?? '[]'), drawn = new WeakMap();
let delivering, waiting, wake = () => {};
function change(entry) {
  changes.push(entry);
  keep();
  deliver();
}
function keep() {
  sessionStorage.setItem('changes', JSON.stringify(changes));
  for (const entry of changes.filter(each => each.text && !each.before && !drawn.has(each))) {
    $('#todos').insertAdjacentHTML('beforeend', `<li class="pending"><div class="view"><input class="toggle"
      type="checkbox" disabled aria-hidden="true"><label dir="auto"></label></div></li>`);
    drawn.set(entry, $('#todos').lastElementChild);
    $('#todos > :last-child label').textContent = entry.text;
  }
  cable.show();
}
async function deliver() {
  if (delivering) return;
  delivering = true;
  for (let pause = 500; changes.length;) {
    const { path, body } = changes[0];
    let answer, html;
    try {
      answer = await fetch(path, { method: 'POST', body: new URLSearchParams(body), headers: { Accept: TURBO_STREAM },
        signal: AbortSignal.timeout(ANSWER_MS) });
      html = await answer.text();
    } catch { answer = null; }
    if (!answer || [429, 502, 503, 504].includes(answer.status)) {
      waiting = true;
      keep();
      const asked = 1000 * (answer?.headers.get('Retry-After') ?? 0);
      await Promise.race([wait(asked || pause), new Promise(resolve => { wake = () => asked || resolve(); })]);
      pause = Math.min(pause * 2, 15_000);
      continue;
    }
    waiting = false;
    pause = 500;
    const done = changes.shift();
    keep();
    queueMicrotask(() => settle(done, answer, html));
  }
  delivering = false;
}
function settle(done, answer, html) {
  const { row, text, before, all } = done;
  const field = $('#new-todo'), element = before && answer.status !== 404 && byId(row);
  if (!answer.ok && element) {
    $('label', element).textContent = before;
    edit(element, text);
  } else if (!answer.ok && text) field.value = `${text} ${field.value}`.trim();     // nothing typed is lost
  if (answer.headers.get('Content-Type')?.startsWith(TURBO_STREAM)) renderStreams(html);
  if (answer.ok && text && !before) announce(`Added ${text}. `);
  if (!answer.ok || all) visit();
  queueMicrotask(() => drawn.get(done)?.closest('.pending')?.remove());     // unless it has become the real one
}

// Forms
addEventListener('submit', event => {
  const form = event.target;
  if (!form.closest('#todoapp')) return;
  event.preventDefault();
  event.stopImmediatePropagation();
  for (const error of $$('.error')) error.textContent = '';
  if (form.matches('.editor')) return save(form, true);
  const button = event.submitter, body = new FormData(form, button);
  const entry = { path: form.getAttribute('action'), row: form.closest('li')?.id };
  if (form.id === 'new') {
    const field = $('#new-todo');
    entry.text = field.value.trim().replaceAll('\t', ' ');
    field.value = '';
    if (!entry.text) return;
    body.set('title', entry.text);
    body.set('key', `${Date.now()}-${Math.random()}`);
  }
  if (form.id === 'all') {
    entry.all = true;
    for (const box of $$('#todos .toggle:enabled')) tick(box, $('#toggle-all').checked);
  }
  if (button?.matches('.destroy')) leave(form.closest('li'));
  change({ ...entry, body: [...body] });
}, true);
addEventListener('change', ({ target }) => {
  if (target.matches('.toggle')) tick(target, target.checked);
  if (target.matches('.toggle, .toggle-all')) target.form.requestSubmit($('.save', target.form));
});
function tick(box, checked) {
  box.checked = checked;
  box.closest('li').classList.toggle('completed', checked);
}
function focusBeside(row) {
  const rows = $$('#todos > :not(.leaving, .pending)');
  const beside = rows[rows.indexOf(row) + 1] ?? rows[rows.indexOf(row) - 1];
  const same = beside && $(`[class="${document.activeElement.className}"]`, beside);
  (same ?? (beside ? $('.rename', beside) : $('#new-todo'))).focus();
}

// Editing in place: Enter or leaving the field saves, Escape does not
function edit(row, text = $('label', row).textContent) {
  for (const open of $$('.editor')) save(open);
  row.insertAdjacentHTML('beforeend', `<form class="editor"><input type="text" class="edit" dir="auto" autocomplete="off"
    enterkeyhint="done" aria-describedby="edit-error"><p class="error" id="edit-error" role="alert"></p></form>`);
  row.classList.add('editing');
  const field = $('.edit', row);
  field.setAttribute('aria-label', $('.rename', row).getAttribute('aria-label'));
  field.defaultValue = $('label', row).textContent;
  field.value = text;
  field.focus();
  field.setSelectionRange(text.length, text.length);
}
function save(form, refocus) {
  const row = form.closest('li'), label = $('label', row), before = label.textContent;
  const { value, defaultValue } = $('.edit', form), text = value.trim();
  const path = $('form', row).getAttribute('action'), id = row.id, renamed = text !== defaultValue;
  if (renamed && text) label.textContent = text;
  close(form, refocus);
  if (renamed && !text) leave(row);
  if (renamed) change({ path, row: id, body: { _method: 'PATCH', title: text }, text, before });
}
function close(form, refocus) {
  const row = form.closest('li');
  row.classList.remove('editing');        // first: removing the field blurs it
  form.remove();
  if (refocus) $('.rename', row).focus();
  if (row.matches('.gone')) leave(row);
}
addEventListener('dblclick', ({ target }) => target.matches('#todos label[id]') && edit(target.closest('li')));
addEventListener('focusout', ({ target }) => target.matches('.editing .edit') && document.hasFocus() && save(target.form));
addEventListener('keydown', ({ target, key, isComposing }) => {
  if (key === 'Escape' && !isComposing && target.matches('.edit')) close(target.form, true);
});
addEventListener('click', event => {
  if (event.ctrlKey || event.metaKey || event.shiftKey || event.button) return;
  const link = event.target.closest?.('.rename, .filters a');
  if (!link) return;
  event.preventDefault();
  if (link.matches('.rename')) edit(link.closest('li'));
  else visit(link.href, link.href !== location.href);
});

// What follows from a change of the page: order, title, announcements
const number = row => row?.id === undefined ? 0 : Number(row.id.slice(5)) || Infinity;
const counts = ({ active, completed } = $('#todo-count').dataset) => `${active}, ${completed}`;
let said = '', speaking, counted = counts();
function announce(text) {
  said += text;
  clearTimeout(speaking);
  speaking = setTimeout(() => {
    $('#announcer').textContent = said + $('#todo-count').textContent;
    said = '';
  }, 100);
}
new MutationObserver(records => {
  for (const { target, addedNodes } of records) {
    for (let row of target.id === 'todos' ? addedNodes : []) {
      // With the answer, or the cable before it: the pending row whose turn it is becomes the row that has its title.
      const pending = $('#todos > .pending');
      if (pending && row.id && row.isConnected && $('label', row).textContent === pending.textContent) {
        row.remove();
        morph(pending, row);
        row = pending;
      }
      let before = row;
      while (number(before.previousElementSibling) > number(row)) before = before.previousElementSibling;
      if (before !== row) before.before(row);
    }
  }
  if (counted === counts()) return;
  counted = counts();
  const active = Number($('#todo-count').dataset.active);
  document.title = active ? `${active} left · todol` : 'todol';
  announce('');
  if (!document.activeElement.checkVisibility({ visibilityProperty: true })) $('#new-todo').focus();
}).observe($('#todoapp'), { childList: true, subtree: true, attributeFilter: ['data-active', 'data-completed'] });
addEventListener('animationend', ({ target }) => target.classList.remove('flash'));

// The cable. Source: @rails/actioncable and AnyCable's actioncable-v1-ext-json, with positions
const cable = {
  socket: null, live: false, failures: 0, heardAt: 0, timer: 0,
  open() {
    clearTimeout(this.timer);
    if (this.socket) return;
    const url = location.origin.replace('http', 'ws') + '/cable';
    const socket = this.socket = new WebSocket(url, ['actioncable-v1-ext-json', 'actioncable-unsupported']);
    this.heardAt = Date.now();
    socket.onmessage = ({ data }) => socket === this.socket && this.hear(JSON.parse(data));
    socket.onclose = () => socket === this.socket && this.lost();
  },
  hear({ type, identifier, message, epoch, offset, reconnect }) {
    this.heardAt = Date.now();
    if (type === 'welcome') {
      this.live = true;
      this.failures = 0;
      this.sources = {};
      for (const source of $$('turbo-cable-stream-source')) {
        const identifier = JSON.stringify({ channel: source.getAttribute('channel'),
          signed_stream_name: source.getAttribute('signed-stream-name'), since: source.dataset.since });
        this.sources[identifier] = source;
        this.socket.send(JSON.stringify({ command: 'subscribe', identifier }));
      }
      wake();
    } else if (type === 'reject_subscription' || type === 'disconnect' && !reconnect) wait(3000).then(() => visit());
    else if (!type) {
      aliveAt = this.heardAt;
      if (offset) this.sources[identifier].dataset.since = `${epoch}:${offset}`;
      renderStreams(message, true);
    }
    this.show();
  },
  release() {
    const socket = this.socket;
    this.socket = null;
    this.live = false;
    clearTimeout(this.timer);
    socket?.close();
  },
  lost() {
    this.release();
    const ms = Math.min(500 * 2 ** this.failures++, 30_000) * (0.5 + Math.random());
    if (!document.hidden) this.timer = setTimeout(() => this.open(), ms);
    this.show();
  },
  show(idle) {
    const element = $('#connection'), number = changes.length;
    const state = idle ? 'paused' : waiting ? 'offline' : this.live ? 'live' : navigator.onLine ? 'reconnecting' : 'offline';
    if (state === 'reconnecting' && this.failures < 2) return;
    const text = waiting ? `offline, ${number} change${number === 1 ? '' : 's'} waiting` : state;
    element.hidden = false;
    element.dataset.state = state;
    if (element.textContent !== text) element.textContent = text;
  },
};
class CableStreamSource extends HTMLElement {
  static observedAttributes = ['signed-stream-name'];
  attributeChangedCallback(name, before) { if (before) this.connectedCallback(); }
  connectedCallback() {
    cable.release();
    cable.open();
  }
}

// A hidden tab lets go of its socket, an idle one too if so set: the machine can sleep. Both catch up when looked at.
let hiddenTimer, aliveAt = Date.now();
const idleMs = 1000 * $('#cable').dataset.idleSeconds;
function alive() {
  aliveAt = Date.now();
  if (!document.hidden) cable.open();
  wake();
}
addEventListener('visibilitychange', () => {
  clearTimeout(hiddenTimer);
  if (document.hidden) hiddenTimer = setTimeout(() => cable.release(), HIDDEN_MS);
  else alive();
});
for (const name of ['online', 'pageshow', 'focus', 'pointermove', 'pointerdown', 'keydown']) addEventListener(name, alive);
addEventListener('offline', () => cable.show());
setInterval(() => {
  if (cable.socket && Date.now() - cable.heardAt > STALE_MS) cable.lost();
  if (cable.socket && idleMs && Date.now() - aliveAt > idleMs) cable.release(), cable.show(true);
}, 3000);

customElements.get('turbo-stream') ?? customElements.define('turbo-stream', StreamElement);
customElements.get('turbo-cable-stream-source') ?? customElements.define('turbo-cable-stream-source', CableStreamSource);
deliver();
'''

ASSETS = {      # name: (type, source or a function that gives it)
    'todol.css': ('text/css; charset=UTF-8', STYLES),
    'todol.js': ('text/javascript; charset=UTF-8', SCRIPTS),
    'icon.svg': ('image/svg+xml', ICON.strip()),
    'manifest.webmanifest': ('application/manifest+json', manifest),
}


# === Command line =====================================================================================================

def command_serve():
    """serve the app (also without a command)"""
    return serve(load_settings(os.environ))


def command_migrate():
    """create the database files, or bring them up to date, and end"""
    open_databases(load_settings(os.environ))
    for database in (app_db, cache_db, job_db, cable_db):
        print(f'{database.path}: {len(MIGRATIONS[database.role])} migrations')
    close_databases()
    return 0


def command_settings():
    """show every setting: its value, where that comes from, what it means"""
    chosen = load_settings(os.environ)
    for setting in SETTINGS:
        given = os.environ.get(setting.name)
        value = getattr(chosen, setting.name.lower().removeprefix('todol_'))
        shown = ('set' if given else 'not set') if setting.secret else {True: 'on', False: 'off'}.get(value, value) \
            if isinstance(value, bool) else value
        print(f'{setting.name:24} {shown!s:12} {"environment" if given else "default":12} {setting.meaning}')
    return 0


def command_secret():
    """print a new value for TODOL_SECRET"""
    print(new_secret())
    return 0


def command_backup(path):
    """copy what matters to a directory, or to one .tar.gz or .zip, while the app runs"""
    choose(load_settings(os.environ))
    backup(path)
    print(f'{path}: a backup of {", ".join(database_path(role) for role in KEPT_ROLES)}')
    return 0


def command_restore(path, force=False):
    """put a backup in place; the app must be stopped, and --force given to overwrite"""
    choose(load_settings(os.environ))
    restore(path, force)
    print(f'{path} is restored to {settings.data}')
    return 0


def command_check():
    """check the four files: whole, of this version, nothing stuck; status 1 if not"""
    choose(load_settings(os.environ))
    problems = check()
    print('\n'.join(problems) or 'ok')
    return 1 if problems else 0


COMMANDS = {        # name: (function, its arguments)
    'serve': (command_serve, ''), 'migrate': (command_migrate, ''), 'check': (command_check, ''),
    'backup': (command_backup, 'PATH'), 'restore': (command_restore, 'PATH [--force]'),
    'settings': (command_settings, ''), 'secret': (command_secret, ''),
}


def usage():
    lines = [f'todol {__version__}: a live todo app in one file', '', 'usage: python todol.py [command]', '']
    lines += [f'  {name + " " + synopsis:24} {function.__doc__}' for name, (function, synopsis) in COMMANDS.items()]
    lines += [f'  {"--help":24} show this', f'  {"--version":24} show the version', '',
              'Settings are environment variables: `python todol.py settings` lists them.']
    return '\n'.join(lines)


def main(arguments=None):
    """Run a command; gives the exit status: 0, 1 after an error, 2 for a command that there is not."""
    arguments = sys.argv[1:] if arguments is None else arguments
    name = arguments[0] if arguments else 'serve'
    if name in ('--help', '-h', 'help'):
        print(usage())
        return 0
    if name in ('--version', '-V'):
        print(f'todol {__version__}')
        return 0
    function, synopsis = COMMANDS.get(name, (None, ''))
    flags = {flag: True for flag in arguments[1:] if f'[{flag}]' in synopsis}
    values = [value for value in arguments[1:] if value not in flags]
    if function is None or len(values) != len(re.findall(r'\b[A-Z]+\b', synopsis)):
        print(f'Error: there is no command {" ".join(arguments)!r}\n\n{usage()}', file=sys.stderr)
        return 2
    try:
        start_logging(os.environ.get('TODOL_LOG', '').lower())
        return function(*values, **{flag.removeprefix('--'): True for flag in flags})
    except TodolError as error:
        print(f'Error: {error}', file=sys.stderr)
        return 1


if __name__ == '__main__':
    sys.exit(main())
