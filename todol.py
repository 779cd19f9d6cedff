#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["bottle>=0.13", "gevent>=23.9", "gevent-websocket>=0.10.1"]
# ///
"""todol: a live web app with its database, cache, job queue and cable in one file.

    pip install bottle gevent gevent-websocket && python todol.py
    open http://127.0.0.1:8080 in two windows: what one does, the other shows

    python todol.py new chat.py     an app of your own: this stack, and a small app to change
    python todol.py --help          what else it can do

A change travels so:

    browser --HTTP--> route --> app database --outbox--> job database --> worker --> broadcast
       ^                                                                                 |
       +----- WebSocket /cable <-- connections <-- cable database <----------------------+

A section uses only sections above it; `grep '^# ===' todol.py` prints them all. Everything above
"The app" is the stack, which knows nothing of the app below it.
"""
import base64
import bisect
import code
import collections
import contextlib
import contextvars
import datetime
import errno
import fcntl
import functools
import gc
import hashlib
import hmac
import inspect
import io
import itertools
import json
import keyword
import logging
import math
import mmap
import os
import random
import re
import secrets
import shutil
import signal
import socket
import sqlite3
import struct
import sys
import tarfile
import tempfile
import time
import traceback
import types
import typing
import urllib.parse
import zipfile
import zlib
import zoneinfo

try:
    import bottle
    if not hasattr(bottle.Bottle, 'patch'):     # an older one lacks what the file needs below
        raise ImportError(name=f'bottle 0.13 (there is {bottle.__version__})')
    import gevent
    import gevent.event
    import gevent.local
    import gevent.lock
    import gevent.pool
    import gevent.queue
    import gevent.socket
    from gevent.pywsgi import Input, WSGIServer, _InvalidClientInput
    from geventwebsocket.exceptions import ProtocolError, WebSocketError
    from geventwebsocket.handler import WebSocketHandler
    from geventwebsocket.websocket import Header
except ImportError as missing:
    if __name__ != '__main__':
        raise
    sys.exit(f'Error: the package {missing.name or missing} is not installed for {sys.executable}'
             f'\nTry: {sys.executable} -m pip install -U bottle gevent gevent-websocket')

APP = 'todol'       # the name of the program: of its cookie, settings, logger, files and titles

__version__ = '2.0.0'

log = logging.getLogger(APP)


# === Settings: one table of environment variables, read once, at the start ===============
# Nothing below reads os.environ. An app adds its own with app_settings().

PREFIX = re.sub(r'\W', '_', APP).upper() + '_'


class AppError(Exception):
    """A sentence for the person who can do something about it, and the answer to a request.

    status: of HTTP. target: id of the element that shows it. streams: Turbo Streams beside it.
    """
    status = 500
    target = 'notice'
    streams = ''


class SettingError(AppError):
    """A setting has a value that is not allowed."""


class Setting(typing.NamedTuple):
    """An environment variable."""
    name: str                       # without the app's prefix
    default: str                    # as it would be written in the environment
    meaning: str                    # one line, with the unit
    parse: typing.Callable          # str -> value; raises ValueError with what is allowed
    secret: bool = False            # its value is never shown
    prefixed: bool = True           # <APP>_NAME; else NAME, as everybody calls it

    @property
    def variable(self):
        return PREFIX + self.name if self.prefixed else self.name


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
    return one_of('on', 'off', '1', '0')(text) in ('on', '1')


def words(text):
    """A parser of lower-case words between commas."""
    return [word.strip().lower() for word in text.split(',') if word.strip()]


def absolute_path(text):
    """A parser of a path."""
    try:
        return os.path.abspath(text)
    except FileNotFoundError:       # the current directory is gone
        return text


def secret_text(least, hint=''):
    """A parser of secrets of so many characters or more."""
    def parse(text):
        if text and len(text) < least:
            raise ValueError(f'at least {least} characters long, not {len(text)}{hint}')
        return text
    return parse


def server_url(text):
    """A parser of the URL of a PostgreSQL server."""
    if text and not re.match('postgres(ql)?://', text):
        raise ValueError('unset, or postgresql://user:password@host:port/name')
    return text


SETTINGS = []                           # every Setting, in the order of declaration
settings = types.SimpleNamespace()      # their values: PORT is .port, <APP>_ENV is .env


def app_settings(*declared):
    """Declare settings; they have their defaults until load_settings() reads the environment."""
    SETTINGS.extend(declared)
    for setting in declared:
        setattr(settings, setting.name.lower(), setting.parse(setting.default))


def load_settings(environ):
    """Read every setting from a dict of variables into `settings`. Raises SettingError, and
    changes nothing then. An empty variable counts as unset, as `docker run -e NAME=` writes it."""
    values = {}
    for setting in SETTINGS:
        text = environ.get(setting.variable) or setting.default
        try:
            values[setting.name.lower()] = setting.parse(text)
        except ValueError as allowed:
            given = '' if setting.secret else f'is {text!r}; it '
            raise SettingError(f'{setting.variable} {given}must be {allowed} '
                               f'({setting.meaning})') from None
    known = {setting.variable for setting in SETTINGS}
    for name in sorted(environ):
        if name.startswith(PREFIX) and not name.startswith(f'{PREFIX}TEST_') and name not in known:
            log.warning('unknown setting %s is ignored; the command `settings` lists those '
                        'there are', name)
    vars(settings).update(values)


app_settings(
    Setting('PORT', '8080', 'TCP port to listen on; 0 takes a free one',
            whole_number(0, 65535), prefixed=False),
    Setting('HOST', '127.0.0.1', 'address to listen on; 0.0.0.0 for all', str, prefixed=False),
    Setting('WEB_CONCURRENCY', '1', 'processes that serve and run jobs; SIGHUP replaces them if '
            'there are several', whole_number(1, 1000), prefixed=False),
    Setting('ENV', 'development', 'development, test or production: names the files, sets '
            'what errors show', one_of('development', 'test', 'production')),
    Setting('DATA', 'db', 'directory of the database files', absolute_path),
    Setting('DATABASE_URL', '', 'postgresql://… of the server that keeps everything, for any '
            'number of machines; unset: SQLite files', server_url, secret=True, prefixed=False),
    Setting('DIRECT_DATABASE_URL', '', 'its URL past a pooler, for one connection that listens; '
            'unset: the same', server_url, secret=True, prefixed=False),
    Setting('DATABASE_POOL', '10', 'most connections of one process beside that one',
            whole_number(1, 1000), prefixed=False),
    Setting('SECRET', '', 'signs sessions and stream names; unset: made once and kept in the '
            'app database', secret_text(32, '; the command `secret` makes one'), secret=True),
    Setting('SYNC', 'NORMAL', 'synchronous of the app database: NORMAL, or FULL to survive '
            'power loss', one_of('NORMAL', 'FULL')),
    Setting('JOB_WORKERS', '20', 'jobs that run at once in a process', whole_number(1, 10_000)),
    Setting('MAX_BODY_BYTES', '262144', 'largest request body, bytes',
            whole_number(1024, 2**30)),
    Setting('MAX_MESSAGE_BYTES', '65536', 'largest WebSocket message from a client, bytes',
            whole_number(1024, 2**30)),
    Setting('MAX_SOCKETS', '100', 'most WebSockets of one user to a process',
            whole_number(1, 1_000_000)),
    Setting('WRITES_PER_MINUTE', '600', 'most changes of one session that a process takes in a '
            'minute, ten times as many of one address; above it 429', whole_number(1, 10**9)),
    Setting('IDLE_SECONDS', '0', 'a visible tab without a sign of life drops its socket after '
            'this; 0: never', whole_number(0, 10**6)),
    Setting('HOSTS', '', 'names that it answers to, between commas; others get 421; unset: any',
            words),
    Setting('TRUST_PROXY', 'off', "on: take scheme and host from the proxy's headers", switch),
    Setting('CLIENT_IP_HEADER', '', "header in which the proxy passes the client's address",
            str),
    Setting('LITESTREAM', 'off', 'on: Litestream runs beside; checkpoints are left to it, an '
            'early stop waits for it', switch),
    Setting('LOG', 'text', 'form of the log lines: text or json', one_of('text', 'json')),
    Setting('ACCESS_LOG', 'off', 'on: a line in the log for each request', switch),
    Setting('SLOW_REQUEST_MS', '1000', 'a request that takes so long has a line in the log, '
            'milliseconds; 0: none has', whole_number(0, 10**9)),
    Setting('SLOW_JOB_MS', '30000', 'a job that takes so long has one', whole_number(0, 10**9)),
    Setting('STALL_MS', '250', 'a turn of the event loop that takes so long has one',
            whole_number(0, 10**9)),
    Setting('STACK_PASSWORD', '', 'opens /stack and /metrics, with any user name; unset: nobody '
            'may see them, but from the same machine in development', secret_text(12), secret=True),
    Setting('METRICS_TOKEN', '', 'opens /metrics alone, as a bearer token', secret_text(12),
            secret=True),
    Setting('STACK_MASK', 'user,session,password,secret,token,key', 'arguments of jobs whose name '
            'contains one of these are not shown on /stack', words),
)


clock_ahead_seconds = 0.0       # of the server of DATABASE_URL, whose clock is that of all machines


def now():
    """Wall time in Unix seconds: what is stored."""
    return time.time() + clock_ahead_seconds


# JSON as RFC 8259 has it: NaN and Infinity are refused.
to_json = json.JSONEncoder(separators=(',', ':'), allow_nan=False).encode
JSON_ERRORS = (TypeError, ValueError, RecursionError)       # what it raises


def _shown(value):
    """A value that was refused, short enough for an error."""
    try:
        text = repr(value)
    except Exception:                   # a whole number of more than 4,300 digits, for one
        text = type(value).__name__
    return text if len(text) < 80 else f'{text[:80]}…'


# === Metrics: what is counted and timed, in memory =======================================
# To count costs next to nothing, so it never stops; Operate, below, keeps the counts by the minute.
# Each number is defined once, in METRICS: /metrics, the command `stats` and the panels of /stack
# follow from there. No label holds what somebody has typed.

# Upper bounds of the buckets of a histogram, seconds; the last bucket has none.
BOUNDS = (.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 300, 900)
BUCKETS = (*map(str, BOUNDS), '+Inf')
SLOW_SECONDS = 0.005        # what took less is not among the slowest
SLOWEST = 30                # are kept, for an hour
MAX_PLACES = 100            # where errors came from
MAX_TRACEBACK_CHARS = 8000
LIBRARIES = re.compile('(site|dist)-packages|/lib/python3|^src/')   # files that are not ours

METRICS = {             # name, whose end is the unit: (type, help, names of its labels)
    'http_request_duration_seconds': ('histogram', 'Time to answer', ('method', 'route', 'status')),
    'jobs': ('gauge', 'Jobs that wait, run or have failed', ('queue', 'state')),
    'jobs_paused': ('gauge', 'Whether a queue is paused: its jobs do not start', ('queue',)),
    'job_wait_seconds': ('histogram', 'Time from when a job is due to its start', ('queue',)),
    'job_duration_seconds': ('histogram', 'Time of an attempt', ('name', 'outcome')),
    'recurring_last_timestamp_seconds': ('gauge', 'When a recurring job ran last', ('name',)),
    'recurring_next_timestamp_seconds': ('gauge', 'When it runs next', ('name',)),
    'errors_total': ('counter', 'Errors that nobody expected', ('kind',)),
    'loops_failing': ('gauge', 'Loops that fail, and are tried again', ()),
    'build_info': ('gauge', 'The version of the program', ('version',)),
    'event_loop_stall_seconds': ('histogram', 'Turns of the event loop that take long', ()),
    'database_bytes': ('gauge', 'Size of the file', ('database',)),
    'database_wal_bytes': ('gauge', 'Size of the log before the file', ('database',)),
    'database_free_bytes': ('gauge', 'Free space in the file', ('database',)),
    'database_migrations': ('gauge', 'Migrations that are applied', ('database',)),
    'database_changed_rows_total': ('counter', 'Rows written', ('database',)),
    'database_lock_wait_seconds_total': ('counter', 'Time waited for locks', ('database',)),
    'database_copied_timestamp_seconds': ('gauge', 'Last copy by Litestream', ('database',)),
    'postgresql_connections': ('gauge', 'Connections of all its clients', ()),
    'postgresql_oldest_transaction_seconds': ('gauge', 'Age of the oldest transaction', ()),
    'postgresql_bell_seconds': ('gauge', 'Lag of the doorbell', ()),
    'cache_entries': ('gauge', 'Entries that are kept', ()),
    'cache_bytes': ('gauge', 'Their size', ()),
    'cache_limit_bytes': ('gauge', 'The size at which some are evicted', ()),
    'cache_hits_total': ('counter', 'Keys that were found', ()),
    'cache_misses_total': ('counter', 'Keys that were not found', ()),
    'cache_hit_ratio': ('gauge', 'Share of the keys that were found, in an hour', ()),
    'cache_evictions_total': ('counter', 'Entries evicted', ()),
    'cable_sockets': ('gauge', 'WebSockets that are open', ()),
    'cable_subscriptions': ('gauge', 'Subscriptions of these', ()),
    'cable_messages_total': ('counter', 'Messages broadcast', ()),
    'cable_log_seconds': ('gauge', 'Age of the first message in the log', ()),
    'cable_resumes_total': ('counter', 'Subscriptions that went on without a loss', ()),
    'cable_refreshes_total': ('counter', 'Subscriptions told to load the page again', ()),
    'cable_dropped_readers_total': ('counter', 'WebSockets whose client did not read', ()),
    'process_start_time_seconds': ('gauge', 'When the process started', ()),
    'process_resident_memory_bytes': ('gauge', 'Its memory', ()),
    'process_cpu_seconds_total': ('counter', 'Time of the CPU that it used', ()),
    'process_open_fds': ('gauge', 'Its open files and sockets', ()),
    'process_greenlets': ('gauge', 'Its greenlets', ()),
}

request_id = contextvars.ContextVar('request_id', default=None)    # of a request and its jobs


class Metrics:
    """What was counted and timed, the slowest of a kind, and the last errors."""

    def __init__(self):
        # 'name<tab>label…' -> number. A histogram has its bucket, or 'sum', as the last label.
        self.counts = collections.Counter({name: 0 for name, (kind, _, labels) in METRICS.items()
                                           if kind == 'counter' and not labels})
        self.slowest = {}           # what -> (seconds, Unix time, request id)
        self.errors = {}            # place -> dict, until they are written down
        self.bell = gevent.event.Event()        # set when somebody wants to see all this

    def count(self, *key, by=1):
        """Add to a counter. key: its name and labels, of which there must not be many."""
        self.counts['\t'.join(key)] += by

    def time(self, seconds, *key):
        """Add a duration to a histogram."""
        key = '\t'.join(key)
        self.counts[f'{key}\t{BUCKETS[bisect.bisect_left(BOUNDS, seconds)]}'] += 1
        self.counts[f'{key}\tsum'] += seconds

    def slow(self, what, seconds):
        """Note what took longer than SLOW_SECONDS, if it is among the slowest."""
        noted_seconds, noted_at, _ = self.slowest.get(what, (0, 0, None))
        if seconds < noted_seconds and noted_at > now() - 3600:
            return
        kept = {each: took for each, took in self.slowest.items() if took[1] > now() - 3600}
        kept[what] = seconds, now(), request_id.get()
        self.slowest = dict(sorted(kept.items(), key=lambda each: -each[1][0])[:SLOWEST])

    def failed(self, kind, name, error, private=()):
        """Note an error that nobody expected, with others from the same place. kind: request, job
        or loop. private: texts that its traceback must not show."""
        self.count('errors_total', kind)
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if not LIBRARIES.search(frame.filename)] or frames
        where = f'{own[-1].name}, line {own[-1].lineno}' if own else 'no line'
        place = f'{kind} {name}: {type(error).__name__} in {where}'
        if place in self.errors or len(self.errors) < MAX_PLACES:
            text = ''.join(traceback.format_exception(type(error), error, error.__traceback__))
            noted = self.errors.setdefault(place, {'count': 0, 'first_at': now()})
            noted.update(count=noted['count'] + 1, last_at=now(), request=request_id.get(),
                         traceback=cleaned(text, private)[-MAX_TRACEBACK_CHARS:])
        self.bell.set()


def cleaned(text, private=()):
    """A text that every database takes: a traceback may hold anything. Without private ones, as
    they are or as Python and JSON write them; short ones stay: they could be anything."""
    for value in sorted({str(each) for each in private}, key=len, reverse=True):
        for form in (value, repr(value)[1:-1], json.dumps(value)[1:-1]):
            text = text.replace(form, '…') if len(form) > 2 else text
    return text.encode('utf-8', 'backslashreplace').decode().replace('\0', '\\0')


metrics = Metrics()


# === Database: SQLite files, each used by many greenlets =================================
# SQLite never waits in C, where it would stop every greenlet: a locked file is tried again from
# Python, for a while. A transaction never switches greenlets, so one connection serves all, and
# nobody sees half a transaction.

BUSY_SECONDS = 5            # longer than any transaction here, shorter than a proxy's patience
JOURNAL_LIMIT_BYTES = 16 * 1024 * 1024
CHECKPOINT_PAGES = 4000     # 16 MB: SQLite's 1000 wait for the disk four times as often
COPIED_ROWS = 1000          # at a time, from one engine to the other
SQLITE_HEADER = b'SQLite format 3\0'
DATABASE_SUFFIXES = ('', '-wal', '-shm', '-journal')    # of the names of the files it may have
TOLERATED_TABLES = ('sqlite_', '_litestream_')          # that others keep in our files

# What SQLite says when a file can't be used now, by primary result code. Everything else that it
# raises is an error of the program, and stays as it is. Source: sqlite.org/rescode.html
STORAGE_ERRORS = {
    5: ('database is locked', f'is locked by another process for {BUSY_SECONDS} seconds'),
    6: ('database table is locked', 'is locked by another connection'),
    8: ('attempt to write a readonly database', 'can not be written: it is read-only'),
    10: ('disk I/O error', 'can not be used: the disk reports an error'),
    11: ('database disk image is malformed', 'is damaged; restore it from a backup'),
    13: ('database or disk is full', 'can not be written: the disk is full'),
    14: ('unable to open database file', 'can not be opened; check the directory and its owner'),
    26: ('file is not a database', 'is damaged, or not an SQLite database; restore it '
         'from a backup'),
}
BUSY, DAMAGED = (5, 6), (11, 26)
READS = re.compile(r'\s*(SELECT|PRAGMA|WITH(?!.*\b(INSERT|UPDATE|DELETE|REPLACE)\b))\b',
                   re.IGNORECASE | re.DOTALL)

COLUMNS = '''SELECT tables.name, columns.name FROM sqlite_master AS tables,
             pragma_table_info(tables.name) AS columns WHERE tables.type = 'table' '''

databases = {}              # name -> Database: what open_stack() opens


class StorageError(AppError):
    """A database can't be used now: locked for too long, disk full, damaged. What was asked for
    did not happen, unless it says that it may have."""
    status = 503


class BusyError(StorageError):
    """What it needs, as a lock or a server, was not to be had for all of BUSY_SECONDS."""


class DamagedError(StorageError):
    """The file is damaged, or not an SQLite database."""


class MigrationError(AppError):
    """The file is another program's, or from a newer version. It was left as it is."""


class MisuseError(RuntimeError):
    """A call from where it can't be made: inside a transaction, from another thread, or before
    open_stack()."""


class Database:
    """A file <data>/<environment>[_<name>].sqlite3, which open_stack() opens.

    name: 'app' is the one without a suffix. migrations: a list of (name, SQL statement) that only
    grows; sections and apps add to it before it is opened. disposable: a damaged one is set aside
    and made anew. copied: backups and Litestream take it along. part_of: another one, whose
    transactions write this one too where one server keeps both. path: of another file, which its
    maker opens.

    Rows are tuples, and a statement outside transact() is a transaction of its own. SQL has
    now_s() for the time. Every verb raises StorageError when the file can't be used, MisuseError
    from another thread, and lets other errors of sqlite3 through.
    """
    current = None          # the _Write that is running, of any Database; nothing switches in one
    joined = None           # part_of, while both are on one server

    def __init__(self, name, migrations=(), disposable=False, copied=True, path=None,
                 part_of=None):
        self.name = name
        self.migrations = list(migrations)
        self.disposable = disposable
        self.copied = copied
        self.part_of = part_of
        self.damage = None
        self._path = path
        self._connection = self._hub = None     # each OS thread has its own hub
        self._inode = None          # of the file that was opened last
        self._queue = collections.deque()       # writes that wait for the next transaction
        self._leading = None        # an Event while a greenlet is about to run the queue
        self._shares_commits = True
        if path is None:
            databases[name] = self

    @property
    def path(self):
        suffix = '' if self.name == 'app' else f'_{self.name}'
        return self._path or os.path.join(settings.data, f'{settings.env}{suffix}.sqlite3')

    def open(self):
        """Open or create the file, and migrate it. Raises MigrationError and StorageError, and
        leaves the file as it is then."""
        try:
            self._open()
        except BaseException as error:
            self.close()
            if not (self.disposable and isinstance(error, DamagedError)):
                raise
            self._open()

    def _open(self):
        try:
            pending = self.examine()
            make_private(self.path)
        except OSError as error:
            raise StorageError(f'{error.filename or self.path} can not be used: '
                               f'{error.strerror}') from None
        self._connect('rw')
        litestream = settings.litestream and self.copied
        for pragma in ('journal_mode = WAL', 'foreign_keys = ON',
                       f'synchronous = {settings.sync if self.name == "app" else "NORMAL"}',
                       f'journal_size_limit = {JOURNAL_LIMIT_BYTES}',
                       # What is removed from the app's must be gone; ON writes freed pages anew.
                       f'secure_delete = {"ON" if self.name == "app" else "FAST"}',
                       f'wal_autocheckpoint = {0 if litestream else CHECKPOINT_PAGES}'):
            self._run(f'PRAGMA {pragma}')
        if pending:
            self.transact(self._migrate)
        # A deferred foreign key fails at the COMMIT, which would be that of neighbours too.
        self._shares_commits = not self._run(
            "SELECT 1 FROM sqlite_master WHERE sql LIKE '%INITIALLY%DEFERRED%'")

    def open_read_only(self):
        """Open the file without the right to change it. Raises StorageError; close it then too."""
        if not os.path.exists(self.path):
            raise StorageError(f'{self.path} does not exist')
        self._connect('ro')
        self._run('SELECT count(*) FROM sqlite_master')

    def close(self):
        """Close the file; the last process that does so folds the write-ahead log into it. One that
        is damaged is renamed if it is disposable: the next start makes a new one. Not one that
        another process has made in its place."""
        self._disconnect()
        if self.damage and self.disposable and self._inode == _inode(self.path):
            log.error('%s is set aside as %s.damaged, and made anew: %s', self.path, self.path,
                      self.damage)
            for suffix in DATABASE_SUFFIXES:
                with contextlib.suppress(FileNotFoundError):
                    os.replace(self.path + suffix, f'{self.path}.damaged{suffix}')
        self.damage = None

    def execute(self, statement, parameters=()):
        """The rows of one statement, as a list of tuples.

        parameters: a tuple for ?, or a dict for :name. Inside the transaction of another database
        it may only SELECT (also after WITH), or ask a PRAGMA.
        """
        self._check()
        if Database.current and not self.in_transaction and not READS.match(statement):
            refuse_in_transaction(f'anything but a SELECT from the {self.name} database')
        return self._run(statement, parameters)

    def executemany(self, statement, rows):
        """Run one statement for each of rows; only inside a transaction, which makes it whole. On
        PostgreSQL it may run with the next statement, which raises what it raises."""
        self._check()
        if not self.in_transaction:
            raise MisuseError(f'executemany() outside a transaction of the {self.name} database '
                              'would commit row by row')
        try:
            self._connection.executemany(statement, rows)
        except sqlite3.Error as error:
            raise self._explained(error)

    def truncate_log(self):
        """Fold the write-ahead log into the file now, and empty it, unless that is Litestream's or
        another process reads: what was deleted is in neither then."""
        if not settings.litestream:
            self.execute('PRAGMA wal_checkpoint(TRUNCATE)')

    def transaction(self, function):
        """A decorator: calls of the function go through transact()."""
        @functools.wraps(function)
        def in_transaction(*arguments, **options):
            return self.transact(function, *arguments, **options)
        return in_transaction

    def transact(self, function, /, *arguments, **options):
        """Call the function in a transaction, and give what it returns, after the commit.

        If the function raises, all that it did is undone, and nothing else. Inside another
        transaction of this database it joins that one, as a part that can be undone alone; inside
        one of another database it is refused (MisuseError): enqueue a job, which is written with
        the transaction. It can't wait: an attempt raises MisuseError.

        On SQLite it is called once, and no other transaction runs from its first line to the
        commit. Greenlets that write at the same time share a commit: who comes first leads, and
        calls the others' functions too. So a function must not use the current request.

        On PostgreSQL (DATABASE_URL) others run at the same time, here and in other processes:
        * What it reads may change before it writes. `db.lock('list 7')` as its first line keeps out
          whoever locks the same name, until the commit; on SQLite nobody is there. Without it, a
          function that reads, decides and writes is wrong now and then, and nothing tells. One
          statement alone needs no lock: UPDATE … SET n = n + 1, INSERT … ON CONFLICT.
        * It may be called again from its start, after a deadlock or a lost connection. So it
          changes nothing but the database.
        * After a statement that fails nothing more is done, unless that stood in a transact() of
          its own, inside.
        * A connection that is lost in the commit, or in a write outside of a transaction, raises
          StorageError, and the change may have been made: what a client repeats has an idempotency
          key.

        SQL is written for SQLite, and translated: ?, :name, now_s(), INTEGER, REAL, BLOB, triggers
        with AFTER … FOR EACH ROW WHEN (…), CAST(value AS INTEGER) FROM json_each(:ids). What only
        PostgreSQL knows stands between /*pg and */. It does not know iif(), max() of two values,
        INSERT OR, rowid, or a GROUP BY that lacks a column; there LIKE minds case, text has no NUL,
        a truth is no number, sum() is a float, ids may have gaps, and a statement has BUSY_SECONDS
        in a transaction, ANSWER_SECONDS outside of one.
        """
        self._check()
        call = functools.partial(function, *arguments, **options)
        if self.in_transaction:
            return self._savepoint(call)
        refuse_in_transaction(f'a write to the {self.name} database')
        write = _Write(self, call)
        try:
            self._commit(write)
        finally:
            if write.done and write.error is None:
                write.call_after()
        return write.value

    @property
    def in_transaction(self):
        """Whether the caller is inside transact() of this database."""
        return Database.current is not None and Database.current.database in (self, self.joined)

    def after_commit(self, function):
        """Call the function when the running transaction is committed; once, however often it is
        asked for, and not at all if the part that asked is undone. Without one: at once."""
        if self.in_transaction:
            Database.current.after.append(function)
        else:
            function()

    def lock(self, *names):
        """Keep out who locks one of the names, from the next statement to the commit: see
        transact(). Raises MisuseError outside of a transaction."""
        if not self.in_transaction:
            raise MisuseError('a lock ends with its transaction: call it inside transact()')

    # What an engine does its own way: SQLite here, PostgreSQL in a section below

    def _commit(self, write):
        """Wait until a transaction has called the function, and is committed."""
        # Whoever leads calls it, so it takes its context along: the id of its request.
        write.call = functools.partial(contextvars.copy_context().run, write.call)
        self._queue.append(write)
        try:
            while not write.done:
                if self._leading:
                    self._leading.wait()
                else:
                    self._lead()
        finally:
            if not write.done:          # killed while it waited: nobody would hear the result
                self._queue.remove(write)
        if write.error is not None:
            raise write.error

    def _lead(self):
        """Run everybody who is in the queue one turn of the event loop later."""
        self._leading = ended = gevent.event.Event()
        try:
            gevent.sleep(0)         # others that are about to write join
            self._run('BEGIN IMMEDIATE')
            self._call_all()        # from here to the commit nothing switches
        except StorageError as error:
            while self._queue:
                self._queue.popleft().finish(error)
        finally:
            self._roll_back()
            self._leading = None
            ended.set()             # who is left over, or whose leader was killed, leads on

    def _call_all(self):
        """Call the functions of the queue in the transaction that is open, and commit it. Who is
        still in the queue after a rollback by SQLite, as on a full disk, was not called."""
        leader, called = gevent.getcurrent(), []
        failure = undone = StorageError(f'the transaction of the {self.name} database was rolled '
                                        f'back; nothing was changed')
        leader.switch_out = _refuse_to_switch
        try:
            while self._queue and self._connection.in_transaction:
                called.append(write := self._queue.popleft())
                Database.current = write
                try:
                    write.value = self._savepoint(write.call)
                except BaseException as error:      # also SystemExit is that of its owner
                    write.error = error
                if not self._shares_commits:
                    break
            if self._connection.in_transaction:
                failure = None
                self._connection.execute('COMMIT')
        except sqlite3.Error as error:
            failure = self._explained(error)
        finally:
            Database.current = None
            del leader.switch_out
            if self._roll_back():
                failure = failure or undone
            for write in called:
                write.finish(failure)

    def _roll_back(self):
        """Undo a transaction that did not come to its end, and say whether there was one."""
        is_open = self._connection is not None and self._connection.in_transaction
        if is_open:
            self._connection.execute('ROLLBACK')
        return is_open

    def _savepoint(self, call):
        """Call a function as a part of the transaction that can be undone alone."""
        after = Database.current.after
        asked = len(after)
        self._connection.execute('SAVEPOINT part')
        try:
            value = call()
            self._check()
        except BaseException:
            del after[asked:]
            if self._connection.in_transaction:
                self._connection.execute('ROLLBACK TO part')
                self._connection.execute('RELEASE part')
            raise
        self._connection.execute('RELEASE part')
        return value

    def _run(self, statement, parameters=()):
        """Run a statement; outside a transaction, again while another process holds the lock."""
        began = started = time.perf_counter()
        try:
            while True:
                try:
                    return list(self._connection.execute(statement, parameters))
                except sqlite3.Error as error:
                    if (result_code(error) not in BUSY or Database.current
                            or started - began > BUSY_SECONDS):
                        raise self._explained(error)
                gevent.sleep(random.uniform(0.0005, 0.005))
                started = time.perf_counter()
        finally:
            seconds = time.perf_counter() - started
            if started > began:
                metrics.count('database_lock_wait_seconds_total', self.name, by=started - began)
            if seconds > SLOW_SECONDS:
                text = re.sub("'[^']*'", "'…'", ' '.join(statement.split()))[:300]
                metrics.slow(f'{self.name}: {text}', seconds)

    def _explained(self, error):
        """What an error of sqlite3 means here; itself, if it is one of the program."""
        code = result_code(error)
        if code not in STORAGE_ERRORS:
            return error
        kind = BusyError if code in BUSY else DamagedError if code in DAMAGED else StorageError
        explained = kind(f'the {self.name} database {STORAGE_ERRORS[code][1]}')
        if kind is DamagedError:
            self.damage = explained
        return explained

    def _check(self):
        if self._hub is not gevent.get_hub():
            raise MisuseError(f'the {self.name} database is not open: see open_stack()'
                              if self._hub is None else
                              'called from another thread; in_thread() runs what blocks, and its '
                              'caller uses the stack')
        # A function may catch the error of a full disk, and go on, outside of any transaction.
        if not self._connection.in_transaction and self.in_transaction:
            raise StorageError(f'the transaction of the {self.name} database was rolled back')

    def changed_rows(self):
        """How many rows were written here since it was opened."""
        return self._connection.total_changes

    def facts(self):
        """What the operator may want to know: bytes, bytes of the log before the file (WAL), free
        bytes, migrations, when Litestream last copied it, and the server's own, if any."""
        def ask(function, path):
            with contextlib.suppress(OSError):
                return function(path)

        folder, name = os.path.split(self.path)
        copied = os.path.join(folder, f'.{name}-litestream', 'ltx', '0')
        (free,), = self.execute('SELECT freelist_count * page_size '
                                'FROM pragma_freelist_count, pragma_page_size')
        return {'bytes': ask(os.path.getsize, self.path), 'free_bytes': free,
                'wal_bytes': ask(os.path.getsize, self.path + '-wal'),
                'copied_timestamp_seconds': ask(os.path.getmtime, copied),
                'migrations': len(self.migrations), 'server': {}}

    def _connect(self, mode):
        address = f'file:{urllib.parse.quote(os.fsencode(self.path))}?mode={mode}'
        try:
            self._connection = sqlite3.connect(address, uri=True, timeout=0, isolation_level=None,
                                               cached_statements=256)
        except sqlite3.Error as error:
            raise self._explained(error)
        self._hub, self._inode = gevent.get_hub(), _inode(self.path)
        # Called deterministic, it is called once for each run of a statement.
        self._connection.create_function('now_s', 0, lambda: now(), deterministic=True)

    def _disconnect(self):
        self._hub = None
        if self._connection:
            connection, self._connection = self._connection, None
            connection.close()

    def examine(self):
        """Look at the file without changing it, and give the migrations that it has not seen.
        Raises MigrationError, StorageError or OSError if it is not one of ours."""
        if not os.path.exists(self.path):
            return self.migrations
        self._inode = _inode(self.path)
        with open(self.path, 'rb') as file:
            if file.read(16) not in (b'', SQLITE_HEADER):   # SQLite takes a short one for empty
                raise self._explained(sqlite3.DatabaseError(STORAGE_ERRORS[26][0]))
        try:
            self.open_read_only()
            return self._pending()
        finally:
            self._disconnect()

    def _pending(self):
        columns = self._columns()
        if not columns:
            return self.migrations
        if ('schema_migrations', 'name') not in columns:
            raise MigrationError(f'{self.path} is of another program (it has a table '
                                 f'{columns[0][0]!r}); move it away, or keep this app elsewhere')
        applied = {name for name, in self.execute('SELECT name FROM schema_migrations')}
        unknown = applied - {name for name, _ in self.migrations}
        if unknown:
            raise MigrationError(f'{self.path} is from a newer version or of another app, or '
                                 f'somebody renamed a migration: {min(unknown)!r} is unknown here. '
                                 f'Remove it if nothing in it matters')
        return [(name, statement) for name, statement in self.migrations if name not in applied]

    def _columns(self):
        return [(table, column) for table, column in self.execute(COLUMNS)
                if not table.startswith(TOLERATED_TABLES)]

    def _migrate(self):
        pending = self._pending()           # looked at again: another process may have been faster
        self.execute('CREATE TABLE IF NOT EXISTS schema_migrations '
                     '(name TEXT PRIMARY KEY, applied_at REAL NOT NULL)')
        for name, statement in pending:
            self.execute(statement)
            self.execute('INSERT INTO schema_migrations VALUES (?, now_s())', (name,))
        log.info('migrated %s: %s', self.path, ', '.join(name for name, _ in pending) or 'nothing')


class _Write:
    """A function that waits for its transaction, or runs in it, and what came of it."""
    connection = None           # of PostgreSQL

    def __init__(self, database, call):
        self.database, self.call = database, call
        self.value = self.error = None
        self.done = False
        self.after = []             # functions to call after the commit

    def finish(self, failure=None):
        """failure: of the transaction; None if it was committed."""
        self.done = True
        if self.error is None:
            self.error = failure

    def call_after(self):
        for function in dict.fromkeys(self.after):
            try:
                function()
            except Exception:
                log.exception('a call after a commit failed database=%s', self.database.name)


def result_code(error):
    """The primary result code of an error of sqlite3, or None."""
    code = getattr(error, 'sqlite_errorcode', None)
    if code is not None:
        return code & 0xFF
    if type(error) in (sqlite3.OperationalError, sqlite3.DatabaseError):
        for code, (message, _) in STORAGE_ERRORS.items():       # Python 3.10 has no codes
            if str(error).startswith(message):
                return code
    return None


def refuse_in_transaction(what):
    """Raises MisuseError inside a transaction: what can not be undone with it."""
    if Database.current is not None:
        raise MisuseError(f'{what} can not be a part of a transaction of the '
                          f'{Database.current.database.name} database: call it after the commit, '
                          f'or enqueue a job that does it')


def _refuse_to_switch():
    # gevent calls a greenlet's switch_out() before it lets another one run.
    if Database.current is not None:
        raise MisuseError('a transaction can not wait: others would run before its commit')


def in_thread(function, /, *arguments, **options):
    """Call a function that blocks (requests, smtplib, subprocess) in a thread of a pool, and wait
    for what it returns or raises, while others run. It must not use the stack."""
    refuse_in_transaction('a wait for a thread')

    def call():
        try:
            return function(*arguments, **options), None
        except BaseException as error:      # gevent would log it, beside raising it
            return None, error
    value, error = gevent.get_hub().threadpool.apply(call)
    if error is not None:
        raise error
    return value


def _inode(path):
    with contextlib.suppress(OSError):
        return os.stat(path).st_ino


def make_private(path):
    """Create a file, if there is none, that only its owner can read: who owns the directory."""
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL, 0o600))
        give_to_owner(path)


def give_to_owner(path):
    """What root makes in the directory of another user belongs to that user."""
    if os.geteuid() == 0:
        owner = os.stat(os.path.dirname(path))
        try:        # who may write there may have put a link in its place
            os.lchown(path, owner.st_uid, owner.st_gid)
        except OSError as error:            # a container without the right to
            log.warning('%s stays with root: %s', path, error.strerror)


checks = []                     # functions that the command `check` calls


def check(function):
    """A decorator: the function gives a sentence for each thing that is wrong in the databases,
    which are open for reading then."""
    checks.append(function)
    return function


app_db = Database('app')        # of the app; sections of the stack keep two small tables there


# === Processes: loops that go on, bells between processes, and who is alive ==============
# Several processes may share a data directory. What they tell each other is in the databases; a
# bell only says "look now". Alive is what the kernel says: each process holds a lock on a file of
# its own, and shares one on the directory. To delete any of these files costs latency only.

RESTART_SECONDS, MAX_RESTART_SECONDS = 0.5, 8.0     # pause of a loop after an error; doubles
POLL_SECONDS = 2.0          # with neighbours the databases are looked at so often, bell or no bell
LONELY_POLL_SECONDS = 60.0  # without any: somebody may have deleted our bell

loops = {}                  # name -> Loop, for /up


class Loop:
    """A greenlet that calls a function for ever. It does one turn, and gives another function, if
    any, that waits for the next: a loop that waits is well."""

    def __init__(self, name, turn):
        self.name = name
        self.error = None           # of the last turn; None: it went well
        self._turn = turn
        self._stopping = False
        self._greenlet = gevent.spawn(self._run)
        loops[name] = self

    def _run(self):
        pause = RESTART_SECONDS
        while not self._stopping:
            try:
                wait = self._turn()
                self.error, pause = None, RESTART_SECONDS
                if wait:
                    wait()
            except BaseException as error:      # a kill too, unless it is ours
                if self._stopping:
                    return
                self.error = error
                metrics.failed('loop', self.name, error)
                log.exception('loop failed, goes on in %s s name=%s', pause, self.name)
                with contextlib.suppress(gevent.GreenletExit):
                    gevent.sleep(pause)
                pause = min(2 * pause, MAX_RESTART_SECONDS)

    @property
    def alive(self):
        return self.error is None and not self._greenlet.dead

    def stop(self):
        self._stopping = True
        self._greenlet.kill()
        loops.pop(self.name, None)


class Processes:
    """This process among those that share its data directory."""
    tell = None                     # tells the others of changed slots of the cache, if it is set

    def __init__(self):
        self.name = None            # of this process, for ever its own: also its name as a worker
        self._files = None          # an ExitStack that closes and removes what is open
        self._bells = {}            # name of another process -> file descriptor
        self._others = set()        # names of the other processes that have a file
        self._seen_at = None        # the directory's time when that was looked up
        self._reachable = False     # our bell is in the directory
        self._events = {}           # byte -> the events that it sets

    def open(self):
        """Be there for the others. Raises StorageError while a backup is being restored."""
        name, files = f'{os.getpid()}-{secrets.token_hex(4)}', contextlib.ExitStack()
        self._directory, self._environment = settings.data, settings.env
        try:
            if not lock_directory(settings.data, fcntl.LOCK_SH, files, BUSY_SECONDS):
                files.close()
                raise StorageError(f'{settings.data} is being restored')
            self._lock_file(self._path('process', name), files)
        except OSError as error:
            log.warning('no locks in %s, a dead process is noticed by its leases alone: %s',
                        settings.data, error)
        try:
            self._open_bell(self._path('bell', name), files)
        except OSError as error:
            log.warning('no named pipes in %s, other processes are polled: %s', settings.data,
                        error)
        self.name, self._files = name, files
        self.ring()                 # the others learn that they are not alone

    def close(self):
        self._files.close()
        for fd in self._bells.values():
            os.close(fd)
        self.__init__()

    def wakes(self, event, byte):
        """Set the event whenever another process rings with the byte."""
        self._events.setdefault(byte, []).append(event)

    def ring(self, byte=b'*'):
        """Wake every other process: the events of the byte, or all at b'*'. It never fails."""
        self._look()
        for name, fd in list(self._bells.items()):
            try:
                os.write(fd, byte)
            except BlockingIOError:
                pass                # a full pipe wakes as well
            except OSError:         # nobody reads any more
                os.close(self._bells.pop(name))

    def patience(self):
        """How long a loop may sleep when nothing is due, in seconds."""
        self._look()
        return POLL_SECONDS if self._others or not self._reachable else LONELY_POLL_SECONDS

    def others(self):
        """The names of the other processes that have a file or a bell, alive or not."""
        self._look()
        return set(self._others)

    def is_alive(self, name):
        """Whether a process holds the lock on its file; None where nobody knows: it has no file,
        or there are no locks."""
        if name == self.name:
            return True
        try:
            with open(self._path('process', name), 'rb') as file:
                return not lock(file.fileno(), fcntl.LOCK_SH)
        except OSError:
            return None

    def dead(self):
        """The names of the processes that left a file and no lock; bury() them afterwards."""
        self._look()
        return {name for name in self._others if self.is_alive(name) is False}

    def bury(self, names):
        for name in names:
            for kind in ('process', 'bell'):
                remove(self._path(kind, name))

    def _path(self, kind, name):
        return os.path.join(self._directory, f'{self._environment}.{kind}.{name}')

    def _lock_file(self, path, files):
        # Made and locked under another name, so that nobody finds it unlocked.
        make_private(path + '.new')
        fd = os.open(path + '.new', os.O_RDWR)
        files.callback(os.close, fd)
        lock(fd, fcntl.LOCK_EX)
        os.rename(path + '.new', path)
        files.callback(remove, path)

    def _open_bell(self, path, files):
        os.mkfifo(path, 0o600)
        files.callback(remove, path)
        give_to_owner(path)
        fd = os.open(path, os.O_RDWR | os.O_NONBLOCK)
        files.callback(os.close, fd)
        watcher = gevent.get_hub().loop.io(fd, 1)
        files.callback(watcher.close)
        watcher.start(self._answer, fd)

    def _answer(self, fd):
        rung = os.read(fd, 4096)
        self._seen_at = None
        self.hear(b'*' if len(rung) == 4096 else rung)      # some may not have fitted

    def hear(self, rung):
        """Set the events of the bytes that another process rang with."""
        for byte, events in self._events.items():
            if byte in rung or b'*' in rung:
                for event in events:
                    event.set()

    def _look(self):
        """Look who is there, if the directory has changed since."""
        if self.name is None:
            return
        try:
            changed_at = os.stat(self._directory).st_mtime_ns
            if changed_at == self._seen_at:
                return
            files = os.listdir(self._directory)
        except OSError:
            self._reachable = False
            return
        self._seen_at = changed_at
        names = {'process': set(), 'bell': set()}
        for environment, kind, *rest in (file.split('.') for file in files if '.' in file):
            if environment == self._environment and kind in names and len(rest) == 1:
                names[kind].add(rest[0])
        self._reachable = self.name in names['bell']
        for name in set(self._bells) - names['bell']:
            os.close(self._bells.pop(name))
        for name in names['bell'] - set(self._bells) - {self.name}:
            with contextlib.suppress(OSError):      # nobody reads it: its process is dead
                self._bells[name] = os.open(self._path('bell', name), os.O_WRONLY | os.O_NONBLOCK)
        self._others = names['process'] - {self.name} | self._bells.keys()


def lock(fd, kind):
    """Take a lock that ends with the process, if it is free, and say whether it was. Raises
    OSError where the file system has none."""
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False


def lock_directory(directory, kind, files, seconds=0):
    """lock() the directory until the ExitStack ends, trying for some seconds. Shared: an app runs
    on it; exclusive: none does. Raises OSError."""
    fd = os.open(directory, os.O_RDONLY)
    files.callback(os.close, fd)
    deadline = time.monotonic() + seconds
    while not lock(fd, kind):
        if time.monotonic() >= deadline:
            return False
        gevent.sleep(0.02)
    return True


def remove(path):
    """Delete a file, if it is there."""
    with contextlib.suppress(OSError):
        os.unlink(path)


processes = Processes()


# === Cache: what is dear to compute, and counters ========================================
# In front of the file is a dict, which version stamps keep true between processes. set() and
# delete() are written behind, so a crash may lose the last FLUSH_SECONDS of them; other changes
# are in the file when they return. Trouble with the file is a miss, never an error of the app.

CACHE_LIMIT_BYTES = 128 * 1024 * 1024
FRONT_LIMIT_BYTES = 16 * 1024 * 1024        # a front with more is emptied
PENDING_LIMIT_BYTES = 16 * 1024 * 1024      # wait to be written; more is written at once
ENTRY_BYTES = 200                   # that an entry takes in memory beside its value
FLUSH_SECONDS = 0.02
SLICE_ROWS = 200                    # are looked at, or changed, in one transaction
FOREVER_SECONDS = 400 * 86400       # the time to live where none is given
REST_SECONDS = 1.0                  # a file in trouble is left alone so long
MISSED_SECONDS = 2.0                # so long a change of another process may not be heard of
MAX_NOTED_USES = 20_000
MAX_KEY_CHARS = 500

CACHE_MIGRATIONS = [
    ('001 create entries', '''
        CREATE /*pg UNLOGGED */ TABLE entries (
            id          INTEGER PRIMARY KEY,    -- in the order in which they came
            key         TEXT NOT NULL UNIQUE,
            number      INTEGER,                -- the value, if it is a whole number (a counter)
            value       BLOB,                   -- the value otherwise: bytes, or JSON in UTF-8
            is_json     INTEGER NOT NULL,       -- 1: value is JSON
            expires_at  REAL NOT NULL,
            used_at     REAL NOT NULL           -- when it was changed after it came; 0: never
        )'''),
    ('002 index entries by use', 'CREATE INDEX entries_by_use ON entries (used_at)'),
    ('003 index entries by expiry', 'CREATE INDEX entries_by_expiry ON entries (expires_at)'),
    ('004 drop index by expiry', 'DROP INDEX entries_by_expiry'),
    ('005 drop index by use', 'DROP INDEX entries_by_use'),
]
INSERT_ENTRY = '''INSERT INTO entries (key, number, value, is_json, expires_at, used_at)
                  VALUES (?, ?, ?, ?, ?, 0)'''
UPSERT_ENTRY = INSERT_ENTRY + '''
    ON CONFLICT (key) DO UPDATE SET
        number = excluded.number, value = excluded.value, is_json = excluded.is_json,
        expires_at = excluded.expires_at, used_at = now_s()'''
ADD_ENTRY = UPSERT_ENTRY + ' WHERE entries.expires_at <= now_s() RETURNING id'
# A live counter keeps its window; an expired one starts anew. A sum beyond 64 bits is none: nothing
# is changed then.
INCREMENT_ENTRY = '''
    INSERT INTO entries (key, number, value, is_json, expires_at, used_at)
    VALUES (:key, :by, NULL, 0, :expires_at, 0)
    ON CONFLICT (key) DO UPDATE SET
        number = CASE WHEN entries.expires_at <= now_s() THEN :by ELSE entries.number + :by END,
        expires_at = CASE WHEN entries.expires_at <= now_s() THEN :expires_at
                     ELSE entries.expires_at END,
        value = NULL, is_json = 0, used_at = now_s()
    WHERE entries.expires_at <= now_s() OR entries.number BETWEEN :least AND :most
    RETURNING number'''
GET_ENTRY = 'SELECT key, number, value, is_json, expires_at FROM entries WHERE key = ?'
TOUCH_ENTRY = '''UPDATE entries SET expires_at = ?, used_at = now_s()
                 WHERE key = ? AND expires_at > now_s() RETURNING id'''
PRUNE_ENTRIES = '''DELETE FROM entries WHERE id > ? AND id <= ? AND expires_at <= now_s()
                   RETURNING id'''
FIRST_ENTRIES = '''SELECT id, key, used_at > 0, coalesce(length(value), 8) FROM entries
                   ORDER BY id LIMIT ?'''
CACHE_BYTES = '''SELECT (page_count - freelist_count) * page_size
                 FROM pragma_page_count, pragma_freelist_count, pragma_page_size'''
DELETE_ENTRY = '''DELETE FROM entries WHERE id = ?
                  RETURNING key, number, value, is_json, expires_at'''

_MISSING = object()


class CacheError(AppError):
    """A key, value or time to live that the cache can't hold, or incr() of something that is not
    a whole number."""


class VersionStamps:
    """A stamp for each slot of keys, in a page of memory that all processes share; with tell(slots)
    each process has its own, and has the others outdate() what it has changed.

    A copy of an entry is true while its slot has the stamp under which it was read. Who changes
    an entry makes the stamp odd before the commit, which says "don't copy now", and gives a new
    even one after it: a process that dies between, alone, leaves no false copy behind.
    """
    SLOTS = 4096
    trust_seconds = math.inf        # how long a copy is believed, if no change is heard of

    def __init__(self, path, tell=None):
        """Raises OSError."""
        self._path, self._tell = path, tell
        if tell:
            self.trust_seconds, self._stamps = MISSED_SECONDS, [0] * self.SLOTS
            return
        make_private(path)
        with open(path, 'a+b') as file:     # appended: two that start at once overwrite nothing
            # Written out: with a hole in it, a full disk would kill the process.
            file.write(bytes(max(0, self.SLOTS * 8 - file.tell())))
            file.flush()
            self._inode = os.fstat(file.fileno()).st_ino
            self._stamps = memoryview(mmap.mmap(file.fileno(), self.SLOTS * 8)).cast('Q')

    def deleted(self):
        """Whether the file is not there any more: who starts then has a page of its own."""
        with contextlib.suppress(OSError):
            return not self._tell and os.stat(self._path).st_ino != self._inode
        return True

    def slot(self, key):
        """The same in every process, unlike hash(). The key is text."""
        return zlib.crc32(key.encode()) % self.SLOTS

    def get(self, slot):
        return self._stamps[slot]

    @contextlib.contextmanager
    def changing(self, slots):
        """Around the commit of changes, whether it succeeds or not."""
        for slot in slots:
            self._stamps[slot] |= 1
        try:
            yield
        finally:
            self.outdate(slots)
            if self._tell:
                self._tell(slots)

    def outdate(self, slots):
        """Let no copy of these be true any more."""
        for slot in slots:
            self._stamps[slot] = time.perf_counter_ns() & ~1


class Cache:
    """Values by key, each with a time to live, in a bounded file: the first to come go first,
    unless they were used since.

    A value is bytes or anything that JSON has; what get() gives is the caller's own. A key is text
    of at most MAX_KEY_CHARS characters. Inside a transaction the cache can only be read.
    """
    rest_of_measuring = 0       # times as long as it took, the size is not measured anew

    def __init__(self, database):
        self._db = database
        self.limit_bytes = CACHE_LIMIT_BYTES
        self._reset()

    def _reset(self):
        self._front = {}            # key -> _Entry
        self._front_bytes = 0       # that came since it was emptied
        self._pending = {}          # key -> _Row to be written; an expired one is to be deleted
        self._pending_bytes = 0     # that came since the last flush
        self._clearing = False      # all that is in the file is to be deleted, before that
        self._used = set()          # keys that were read since they came
        self._computing = {}        # key -> (AsyncResult, greenlet), for fetch()
        self._dirty = gevent.event.Event()
        self._flushing = gevent.lock.BoundedSemaphore(1)
        self._stamps = self._loop = None
        self._resting_until = self._measure_at = 0
        self.hits = self.misses = self.evictions = 0        # since the start

    def open(self):
        """Start serving; the database is open already, and the stamps lie beside it."""
        try:
            self._stamps = VersionStamps(self._db.path + '-stamps', processes.tell)
        except OSError as error:
            raise StorageError(f'{self._db.path}-stamps can not be written: '
                               f'{error.strerror}') from None
        processes.wakes(self._dirty, b'*')
        self._loop = Loop('cache', self._turn)

    def close(self):
        """Write what waits, and stop."""
        self._loop.stop()
        self._flush()
        self._reset()

    def get(self, key, default=None):
        """The value, or default if there is none or it has expired."""
        self._db._check()
        entry = self._front.get(key)
        if not entry or entry.expires_at <= now() or self._stamps.get(entry.slot) != entry.stamp:
            entry = self._read(key)
        if entry is None:
            self.misses += 1
            return default
        self.hits += 1
        self._used.add(key)
        return json.loads(entry.value) if entry.is_json else entry.value

    def get_many(self, keys):
        """A dict of those that are there."""
        found = ((key, self.get(key, _MISSING)) for key in keys)
        return {key: value for key, value in found if value is not _MISSING}

    def __contains__(self, key):
        return self.get(key, _MISSING) is not _MISSING

    def set(self, key, value, ttl=FOREVER_SECONDS):
        """Keep a value for ttl seconds. In the file, and seen by other processes, FLUSH_SECONDS
        later. Raises CacheError."""
        self._put(self._row(key, value, ttl))

    def set_many(self, values, ttl=FOREVER_SECONDS):
        """set() for each item of a dict. Raises CacheError, and keeps none then."""
        for row in [self._row(key, value, ttl) for key, value in values.items()]:
            self._put(row)

    def delete(self, key):
        """Forget a value, if it is there."""
        self._put(self._row(key, None, -FOREVER_SECONDS))

    def add(self, key, value, ttl=FOREVER_SECONDS):
        """Keep a value if the key has none, and say whether it was kept. Atomic between processes;
        while the file can't be written, everybody is told yes. Raises CacheError."""
        row = self._row(key, value, ttl)
        return bool(self._through(key, ADD_ENTRY, row[:5], otherwise=[True]))

    def incr(self, key, by=1, ttl=FOREVER_SECONDS):
        """Add to a whole number and give the sum. A missing or expired one starts at 0 with a new
        time to live; a live one keeps the time it has, so that a key is a fixed window. Atomic
        between processes. Raises CacheError, and leaves the value then, if it is not a whole
        number or the sum has more than 64 bits."""
        if not _fits_64_bits(by):
            raise CacheError(f'incr() adds a whole number of 64 bits, not {_shown(by)}')
        row = {'key': key, 'by': by, 'expires_at': self._expiry(key, ttl),
               'least': max(-2**63, -2**63 - by), 'most': min(2**63 - 1, 2**63 - 1 - by)}
        rows = self._through(key, INCREMENT_ENTRY, row, otherwise=[(by,)])
        if not rows:
            raise CacheError(f'the value of {key!r} is not a whole number, or {by} more would not '
                             f'fit 64 bits')
        return rows[0][0]

    def touch(self, key, ttl=FOREVER_SECONDS):
        """Give a value a new time to live, and say whether it was there. Raises CacheError."""
        row = (self._expiry(key, ttl), key)
        return bool(self._through(key, TOUCH_ENTRY, row, otherwise=[]))

    def fetch(self, key, ttl, function):
        """The value, or else what the function gives, kept for ttl seconds. One greenlet computes,
        others wait for it, and get its exception too. What was changed meanwhile is not written
        over. Raises CacheError, also if the function asks for the same key."""
        refuse_in_transaction('cache.fetch()')
        self._expiry(key, ttl)          # a wrong one is refused before the work
        while True:
            value = self.get(key, _MISSING)
            if value is not _MISSING:
                return value
            if key not in self._computing:
                return self._compute(key, ttl, function)
            result, greenlet = self._computing[key]
            if greenlet is gevent.getcurrent():
                raise CacheError(f'the function that computes {key!r} asks for it')
            row = result.get()
            if row is not None:
                return row.decoded()

    def memoize(self, ttl):
        """A decorator: results are kept by the function's name and arguments, which JSON has."""
        def around(function):
            name = f'{function.__module__}.{function.__qualname__}'
            if function.__name__ == '<lambda>':
                raise CacheError('memoize() takes a function with a name of its own, no lambda')

            @functools.wraps(function)
            def memoized(*arguments, **options):
                text = to_json([arguments, sorted(options.items())])
                key = f'{name} {hashlib.sha256(text.encode()).hexdigest()}'
                return self.fetch(key, ttl, lambda: function(*arguments, **options))
            return memoized
        return around

    def clear(self):
        """Forget everything."""
        self._db._check()
        refuse_in_transaction('cache.clear()')
        self._empty_front()
        self._pending.clear()
        self._computing.clear()
        self._clearing = True
        self._dirty.set()
        self._flush()

    def prune(self):
        """Delete what has expired, and give the number of it. Looks at every entry, some at a
        time."""
        gone, last = 0, 0
        while last is not None:
            rows = self._forgiving((), self._db.execute, 'SELECT id FROM entries WHERE id > ? '
                                   'ORDER BY id LIMIT ?', (last, SLICE_ROWS))
            first, last = last, rows[-1][0] if rows else None
            gone += len(self._forgiving((), self._db.execute, PRUNE_ENTRIES, (first, last)))
            gevent.sleep(0)
        return gone

    def stats(self):
        """Counts since the start, and what the file holds now."""
        (entries,), = self._forgiving([(None,)], self._db.execute, 'SELECT count(*) FROM entries')
        return {'hits': self.hits, 'misses': self.misses, 'evicted': self.evictions,
                'entries': entries, 'bytes': self._forgiving(None, self._size_bytes),
                'limit_bytes': self.limit_bytes, 'front_entries': len(self._front),
                'front_bytes': self._front_bytes}

    def outdate(self, slots):
        """Believe no copy of an entry in these slots any more."""
        if self._stamps:
            self._stamps.outdate(slots)

    def _slot(self, key):
        self._db._check()
        if not isinstance(key, str) or len(key) > MAX_KEY_CHARS or '\0' in key:
            raise CacheError(f'a cache key must be text of at most {MAX_KEY_CHARS} characters '
                             f'without NUL, not {_shown(key)}')
        try:
            return self._stamps.slot(key)
        except UnicodeEncodeError:
            raise CacheError(f'a cache key must be without lone surrogates, not {key!r}') from None

    def _expiry(self, key, ttl):
        self._slot(key)
        if isinstance(ttl, bool) or not isinstance(ttl, (int, float)) or not abs(ttl) < 1e12:
            raise CacheError(f'the time to live of {key!r} must be seconds, not {_shown(ttl)}')
        return now() + ttl

    def _row(self, key, value, ttl):
        """An entry to be kept. Raises CacheError."""
        expires_at = self._expiry(key, ttl)
        if _fits_64_bits(value):
            return _Row(key, value, None, 0, expires_at)
        is_json = not isinstance(value, bytes)
        try:
            row = _Row(key, None, to_json(value).encode() if is_json else value, int(is_json),
                       expires_at)
        except JSON_ERRORS as error:
            raise CacheError(f'the value of {key!r} must be bytes or what JSON has: '
                             f'{error}') from None
        if len(row.value) > self.limit_bytes // 4:
            raise CacheError(f'the value of {key!r} has {len(row.value):,} bytes, and the cache '
                             f'holds {self.limit_bytes // 4:,} of one')
        return row

    def _read(self, key):
        """The entry from what waits to be written or from the file; None if there is none."""
        slot = self._slot(key)
        stamp = self._stamps.get(slot)      # before the read: what changes after it is noticed
        waiting = self._pending.get(key)
        if self._clearing and not waiting:
            return None
        found = [waiting] if waiting else [_Row(*columns) for columns in self._forgiving(
            (), self._db.execute, GET_ENTRY, (key,), reads=True)]
        if not found or found[0].expires_at <= now():
            return None
        row, = found
        expires_at = min(row.expires_at, now() + self._stamps.trust_seconds)
        is_json = row.is_json and row.value[:1] in b'[{'
        entry = _Entry(row.value.decode() if is_json else row.decoded(), is_json, expires_at, slot,
                       stamp)
        if key not in self._pending and not stamp & 1:      # nor was it changed meanwhile
            self._front_bytes += ENTRY_BYTES + row.size
            if self._front_bytes > FRONT_LIMIT_BYTES:
                self._empty_front()
            self._front[key] = entry
        if len(self._used) > MAX_NOTED_USES:
            self._used.clear()
        return entry

    def _empty_front(self):
        self._front.clear()
        self._front_bytes = 0

    def _compute(self, key, ttl, function):
        """Compute a value for all who ask for it meanwhile, and keep it, unless the stamp of its
        slot tells of a change since."""
        result, slot = gevent.event.AsyncResult(), self._slot(key)
        computing = self._computing[key] = result, gevent.getcurrent()
        try:
            if key in self._pending:    # a deletion, whose new stamp would come meanwhile
                self._flush()
            stamp = self._stamps.get(slot)
            row = self._row(key, function(), ttl)
            if self._computing.get(key) is computing and self._stamps.get(slot) == stamp:
                self._put(row._replace(stamp=stamp))
            result.set(row)
            return row.decoded()
        except Exception as error:
            result.set_exception(error)
            raise
        finally:
            if self._computing.get(key) is computing:
                del self._computing[key]
            if not result.ready():      # killed: one of those who wait computes
                result.set(None)

    def _through(self, key, statement, row, otherwise):
        """The rows that a change of the key gives, which is in the file then."""
        refuse_in_transaction('a change of the cache')
        if key in self._pending or self._clearing:
            self._flush()
        with self._stamps.changing([self._slot(key)]):
            rows = self._forgiving(otherwise, self._db.execute, statement, row)
        self._dirty.set()                   # it may have filled the file
        return rows

    def _put(self, row):
        """Remember a change, to be written behind."""
        refuse_in_transaction('a change of the cache')
        self._computing.pop(row.key, None)  # who asks from now on does not wait for the old value
        self._front.pop(row.key, None)
        self._pending[row.key] = row
        self._pending_bytes += ENTRY_BYTES + row.size
        self._dirty.set()
        if self._pending_bytes > PENDING_LIMIT_BYTES and not self._flush():
            # The file can't be written. A value that is deleted must not come back.
            self._pending = {key: row for key, row in self._pending.items()
                             if row.expires_at <= now()}
            self._pending_bytes = 0

    def _turn(self):
        idle = not (self._dirty.is_set() or self._pending)
        self._dirty.clear()
        if self._stamps.deleted():
            self._stamps = VersionStamps(self._db.path + '-stamps')
            self._empty_front()
        if idle or self._flush():
            return self._wait
        return functools.partial(gevent.sleep, REST_SECONDS)

    def _wait(self):
        self._dirty.wait(processes.patience())
        gevent.sleep(FLUSH_SECONDS)

    def _flush(self):
        """Write what waits, then make room. Says whether it was written."""
        with self._flushing:            # one at a time: what is written twice would count as used
            if self._clearing:
                with self._stamps.changing(range(VersionStamps.SLOTS)):
                    if self._forgiving(None, self._db.execute, 'DELETE FROM entries') is None:
                        return False
                self._clearing = False
            while self._pending:
                batch = list(itertools.islice(self._pending.values(), SLICE_ROWS))
                with self._stamps.changing({self._stamps.slot(row.key) for row in batch}):
                    if not self._forgiving(False, self._db.transact, self._write, batch):
                        return False
                for row in filter(self._waits, batch):
                    del self._pending[row.key]
            self._pending_bytes = 0
            self._forgiving(None, self._make_room)
            return True

    def _waits(self, row):
        """Whether a row was neither written, nor cleared or set again since."""
        return self._pending.get(row.key) is row

    def _write(self, batch):
        """Write what waits; what can't be written is dropped alone."""
        for row in filter(self._waits, batch):
            try:
                if row.expires_at <= now():
                    self._db.execute('DELETE FROM entries WHERE key = ?', (row.key,))
                elif row.stamp is None or \
                        row.stamp | 1 == self._stamps.get(self._stamps.slot(row.key)) | 1:
                    self._db.execute(UPSERT_ENTRY, row[:5])
            except StorageError:
                raise
            except Exception as error:
                log.error('a cache entry can not be written, and is dropped key=%.100r error=%r',
                          row.key, error)
        return True

    def _make_room(self):
        """Evict from a full file until a hundredth of it is free, some entries at a time."""
        began = time.monotonic()
        if began < self._measure_at:
            return
        full = self._size_bytes() > self.limit_bytes
        self._measure_at = began + self.rest_of_measuring * (time.monotonic() - began)
        while full:
            gone = self._db.transact(self._evict)
            self.evictions += gone
            full = gone > 0
            gevent.sleep(0)

    def _evict(self):
        """Until there is room, move those of the first entries that were used since they came to
        the end, and delete the others. Gives the number of these. A quarter goes in any case, or
        much work might free little. Reads are known of this process only."""
        excess = self._size_bytes() - self.limit_bytes * 0.99
        rows = self._db.execute(FIRST_ENTRIES, (SLICE_ROWS,)) if excess > 0 else ()
        moves, gone = len(rows) * 3 // 4, 0
        for id, key, used, size in rows:
            if excess <= 0:
                break
            entries = self._db.execute(DELETE_ENTRY, (id,))
            if moves and (used or key in self._used):
                moves -= 1
                self._used.discard(key)
                for entry in entries:
                    self._db.execute(INSERT_ENTRY, entry)
            else:
                gone += 1
                excess -= ENTRY_BYTES + size
        return gone

    def _size_bytes(self):
        return self._db.execute(CACHE_BYTES)[0][0]

    def _forgiving(self, otherwise, work, *arguments, reads=False):
        """What the work on the file gives. When it fails, the file is left alone for REST_SECONDS:
        one that is locked costs a wait each time. To read it costs none, and may succeed."""
        if time.monotonic() < self._resting_until and not reads:
            return otherwise
        try:
            return work(*arguments)
        except StorageError as error:
            self._resting_until = time.monotonic() + REST_SECONDS
            log.error('cache unusable, taken as a miss: %s', error)
            return otherwise


class _Entry(typing.NamedTuple):
    """A value as the front has it."""
    value: object           # of a list or an object the JSON, from which each caller gets its own
    is_json: bool
    expires_at: float
    slot: int
    stamp: int              # of the slot before the value was read


class _Row(typing.NamedTuple):
    """An entry as the file has it; the first five are the parameters of INSERT_ENTRY."""
    key: str
    number: int | None
    value: bytes | None
    is_json: int
    expires_at: float
    stamp: int | None = None    # it gives way to what was changed since its slot had this one

    @property
    def size(self):
        return 8 if self.value is None else len(self.value)

    def decoded(self):
        if self.value is None:
            return self.number
        return json.loads(self.value) if self.is_json else self.value


def _fits_64_bits(value):
    return type(value) is int and -2**63 <= value < 2**63


cache_db = Database('cache', CACHE_MIGRATIONS, disposable=True)
cache = Cache(cache_db)


# === Jobs: work for later ================================================================
# A job runs at least once: its row goes when it is done, and a worker only leases it. Enqueued in
# a transaction of the app database it is first a row of the outbox there, because a commit over two
# files is not atomic. One greenlet, the dispatcher, moves such rows to the job database (each once,
# by its id); then it deletes what is done and takes what is due, in one transaction. It sleeps
# until a bell rings or something falls due. A lease ends with its process, as the kernel tells of
# it.

QUEUES = {'urgent': 6, 'default': 3, 'low': 1}      # name: weight; how often it is looked at first
LEASE_SECONDS = 15          # counts where nobody knows whether the worker is alive
STOP_SECONDS = 3.5          # running jobs may go on so long when the process stops
KEEP_FAILED_SECONDS = 10 * 86400
OUTBOX_ROWS = 200           # are moved in one transaction
CLAIM_ROWS = 200            # are claimed, or changed by hand, in one
SKIPPED_SECONDS = 0.1       # after which one looks again at a queue that one has taken jobs from
GATHER_SECONDS = 0.002      # between exchanges with a server: messages that many jobs share
MAX_BACKOFF_SECONDS = 3600
UNKNOWN_SECONDS = 300       # a job that is unknown here is left so long to a newer version,
UNKNOWN_PAUSE_SECONDS = 5   # which another process may have already
MAX_JOB_KEY_CHARS = 200
MAX_DELAY_SECONDS = 10 * 366 * 86400

app_db.migrations += [
    ('005 create outbox', '''
        CREATE TABLE outbox (                           -- jobs on their way to the job database
            id          INTEGER PRIMARY KEY AUTOINCREMENT,
            job         TEXT NOT NULL                   -- the row to insert there, as JSON
        )'''),
]
# The next of an order key falls due when the one before it is gone, whoever deleted that.
UNBLOCK_NEXT = '''
    BEGIN
        UPDATE jobs SET due_at = run_at WHERE due_at IS NULL AND id = (
            SELECT min(id) FROM jobs WHERE order_key = old.order_key AND failed_at IS NULL);
    END'''
JOB_MIGRATIONS = [
    ('001 create jobs', '''
        CREATE TABLE jobs (
            id          INTEGER PRIMARY KEY,            -- order of arrival
            uid         TEXT,                           -- the id of the job for everybody else
            name        TEXT NOT NULL,                  -- of its task
            arguments   TEXT NOT NULL,                  -- JSON object
            queue       TEXT NOT NULL,
            unique_key  TEXT,                           -- at most one waiting job has it
            order_key   TEXT,                           -- its jobs run in order, one at a time
            run_at      REAL NOT NULL,                  -- not before
            due_at      REAL,                           -- when to take it: run_at, a retry's time,
                                                        -- or the end of the lease; NULL: failed,
                                                        -- or behind another of its order key
            worker      TEXT,                           -- the process that runs it; NULL: nobody
            attempt     INTEGER NOT NULL DEFAULT 0,     -- how often it was taken; fences the late
            enqueued_at REAL NOT NULL,
            failed_at   REAL,                           -- when it failed for good
            error       TEXT                            -- traceback of the last failure
        )'''),
    ('002 index jobs by due time',
     'CREATE INDEX jobs_by_due ON jobs (queue, due_at) WHERE due_at IS NOT NULL'),
    ('003 index jobs by unique key', '''
        CREATE UNIQUE INDEX jobs_by_unique_key ON jobs (unique_key)
        WHERE unique_key IS NOT NULL AND failed_at IS NULL'''),
    ('004 index jobs by order key', '''
        CREATE INDEX jobs_by_order_key ON jobs (order_key, id)
        WHERE order_key IS NOT NULL AND failed_at IS NULL'''),
    ('005 index jobs by worker',
     'CREATE INDEX jobs_by_worker ON jobs (worker) WHERE worker IS NOT NULL'),
    ('006 index failed jobs',
     'CREATE INDEX jobs_by_failure ON jobs (failed_at) WHERE failed_at IS NOT NULL'),
    ('007 create recurring',
     'CREATE TABLE recurring (name TEXT PRIMARY KEY, due_at REAL NOT NULL)'),
    ('008 index jobs by uid',
     'CREATE UNIQUE INDEX jobs_by_uid ON jobs (uid) WHERE uid IS NOT NULL'),
    ('009 drop index by worker', 'DROP INDEX jobs_by_worker'),
    ('010 index jobs by lease and due time', '''
        CREATE INDEX jobs_by_lease ON jobs (worker, queue, due_at) WHERE due_at IS NOT NULL'''),
    ('011 drop index by due time', 'DROP INDEX jobs_by_due'),
    ('012 give the oldest jobs a uid',
     'UPDATE jobs SET uid = CAST(id AS TEXT) WHERE uid IS NULL'),
    ('013 unblock when a job is deleted', f'''
        CREATE TRIGGER unblock_deleted AFTER DELETE ON jobs FOR EACH ROW
        WHEN (old.order_key IS NOT NULL) {UNBLOCK_NEXT}'''),
    ('014 unblock when a job has failed', f'''
        CREATE TRIGGER unblock_failed AFTER UPDATE OF failed_at ON jobs FOR EACH ROW
        WHEN (new.failed_at IS NOT NULL AND new.order_key IS NOT NULL) {UNBLOCK_NEXT}'''),
    ('015 add request', 'ALTER TABLE jobs ADD COLUMN request TEXT'),        # that enqueued it
    ('016 add start', 'ALTER TABLE jobs ADD COLUMN started_at REAL'),       # of the last attempt
    ('017 create paused queues', 'CREATE TABLE paused_queues (queue TEXT PRIMARY KEY)'),
    ('018 add last time', 'ALTER TABLE recurring ADD COLUMN last_at REAL'),
]
INSERT_OUTBOX = 'INSERT INTO outbox (job) VALUES (?)'
EMPTY_OUTBOX = 'DELETE FROM outbox WHERE id <= ?'
# A job behind another of its order key is not due until that one is gone. One with the unique key
# of another that waits is dropped; gives the id of the one that is there.
INSERT_JOB = '''
    INSERT INTO jobs (uid, name, arguments, queue, unique_key, order_key, run_at, enqueued_at,
                      request, due_at)
    SELECT :uid, :name, :arguments, :queue, :unique_key, :order_key, :run_at, :enqueued_at,
           :request,
           CASE WHEN :order_key IS NULL OR NOT EXISTS (
                    SELECT 1 FROM jobs WHERE order_key = :order_key AND failed_at IS NULL)
                THEN :run_at END
    WHERE NOT EXISTS (SELECT 1 FROM jobs WHERE uid = :uid)
    ON CONFLICT (unique_key) WHERE unique_key IS NOT NULL AND failed_at IS NULL
        DO UPDATE SET unique_key = excluded.unique_key
    RETURNING uid'''
INSERT_FAILED = '''
    INSERT INTO jobs (uid, name, arguments, queue, run_at, enqueued_at, failed_at, error)
    VALUES (?, ?, ?, 'default', now_s(), now_s(), now_s(), ?)
    ON CONFLICT DO NOTHING'''
# A unique key is free again when its job starts: a change made while it runs is not lost. What
# still runs here, though its lease was lost, is not taken a second time.
CLAIM_JOBS = '''
    WITH due AS MATERIALIZED (
        SELECT id FROM jobs WHERE worker IS NULL AND queue = :queue AND due_at <= now_s()
            AND id NOT IN (SELECT CAST(value AS INTEGER) FROM json_each(:running))
        ORDER BY due_at, id LIMIT :limit /*pg FOR UPDATE SKIP LOCKED */)
    UPDATE jobs SET due_at = now_s() + :lease, worker = :worker, attempt = attempt + 1,
                    unique_key = NULL, started_at = now_s()
    WHERE id IN (SELECT id FROM due)
    RETURNING id, worker, attempt, run_at, name, arguments, order_key, request, queue, uid'''
# What recurs, and of each queue
FIRST_DUE = ', '.join(['SELECT (SELECT min(due_at) FROM recurring)', *(
    f'''(SELECT min(due_at) FROM jobs
         WHERE worker IS NULL AND queue = '{queue}' AND due_at IS NOT NULL
             AND NOT EXISTS (SELECT 1 FROM paused_queues WHERE queue = '{queue}'))'''
    for queue in QUEUES)])
OF_LEASE = 'WHERE id = ? AND worker = ? AND attempt = ? AND run_at = ?'
FINISH_JOB = f'DELETE FROM jobs {OF_LEASE}'
FAIL_JOB = f'''
    UPDATE jobs SET worker = NULL, error = ?, due_at = now_s() + ?,
                    failed_at = CASE WHEN ? THEN now_s() END
    {OF_LEASE} RETURNING id'''
LEAVE_JOB = f'''UPDATE jobs SET worker = NULL, due_at = now_s() + ?, attempt = attempt - 1
                {OF_LEASE}'''
RENEW_LEASES = 'UPDATE jobs SET due_at = now_s() + ? WHERE worker = ? AND due_at IS NOT NULL'
GIVE_BACK = '''UPDATE jobs SET due_at = now_s(), run_at = now_s(), worker = NULL,
                               attempt = attempt - 1
               WHERE worker = ? AND due_at IS NOT NULL
                   AND id NOT IN (SELECT CAST(value AS INTEGER) FROM json_each(?))'''
# Whether one has run out, or ends later than one can.
LEASES = '''SELECT worker, min(due_at) <= now_s() OR max(due_at) > now_s() + ? FROM jobs
            WHERE worker IS NOT NULL AND due_at IS NOT NULL AND worker <> ? GROUP BY worker'''
FREE_LEASES = '''UPDATE jobs SET due_at = now_s(), worker = NULL
                 WHERE worker = ? AND due_at IS NOT NULL RETURNING id'''
# What was to run at once, when the clock was ahead.
RUN_FROM_FUTURE = '''
    UPDATE jobs SET run_at = now_s(), enqueued_at = now_s(),
                    due_at = CASE WHEN due_at IS NOT NULL THEN now_s() END
    WHERE worker IS NULL AND failed_at IS NULL AND run_at > now_s() AND run_at <= enqueued_at'''
START_RECURRING = '''
    INSERT INTO recurring (name, due_at) VALUES (:name, :next)
    ON CONFLICT (name) DO UPDATE SET
        due_at = CASE WHEN :catch_up AND recurring.due_at < :next THEN recurring.due_at
                 ELSE :next END'''
TICK_RECURRING = '''UPDATE recurring SET due_at = ?, last_at = ?
                    WHERE name = ? AND due_at = ? RETURNING name'''
STATES = {      # of a job
    'failed': 'failed_at IS NOT NULL',
    'running': 'worker IS NOT NULL AND due_at IS NOT NULL',
    'blocked': 'worker IS NULL AND failed_at IS NULL AND due_at IS NULL',   # by its order key
    'ready': 'worker IS NULL AND due_at <= now_s()',
    'scheduled': 'worker IS NULL AND due_at > now_s()',
}
STATE = f'''CASE {' '.join(f"WHEN {test} THEN '{name}'" for name, test in STATES.items())} END'''
SELECT_JOB = f'''
    SELECT uid, name, arguments, queue, {STATE}, attempt, run_at, enqueued_at, failed_at, error,
           CASE WHEN worker IS NULL THEN due_at END, started_at, worker, request
    FROM jobs'''
DELETE_JOB = 'DELETE FROM jobs WHERE uid = ?'
CHANGE_JOBS = {         # what can be done to a job by hand: (in which states, statement)
    'retry': (('failed',), DELETE_JOB),     # and then it comes anew
    'discard': (('failed',), DELETE_JOB),
    'run': (('scheduled',), 'UPDATE jobs SET run_at = now_s(), due_at = now_s() WHERE uid = ?'),
    'cancel': (('blocked', 'ready', 'scheduled'), DELETE_JOB),
}
RETRIED = 'uid', 'name', 'arguments', 'queue', 'order_key', 'enqueued_at', 'request'


class JobError(AppError):
    """A job that can't be enqueued, run or changed: the sentence says why."""


class Task(typing.NamedTuple):
    """A function that is registered to run as a job. Called, it runs at once, as it is."""
    function: typing.Callable
    jobs: 'Jobs'
    name: str
    queue: str
    attempts: int               # then the job has failed
    retry_seconds: float        # before the second attempt; then twice that, and so on
    timeout_seconds: float      # of an attempt
    batch: bool                 # it takes a list of the arguments of many jobs
    signature: inspect.Signature | None     # what arguments are checked with; None: a batch

    def __call__(self, /, *arguments, **options):
        return self.function(*arguments, **options)

    def later(self, /, **arguments):
        """Enqueue a job with these arguments; gives its id. Raises JobError."""
        return self.jobs.enqueue(self, arguments)


class Claim(typing.NamedTuple):
    """A job that this process has leased. The first four, the parameters of OF_LEASE, say which."""
    id: int
    worker: str
    attempt: int                # 1 for the first
    run_at: float
    name: str
    arguments: str              # JSON object
    order_key: str | None
    request: str | None         # id of the request that enqueued it
    queue: str
    uid: str                    # the id of the job for everybody else


class Job(typing.NamedTuple):
    """A job as find() and failed() tell of it. Times are Unix seconds."""
    id: str
    name: str
    arguments: dict
    queue: str
    state: str                  # scheduled, ready, blocked (by its order key), running or failed
    attempts: int
    run_at: float
    enqueued_at: float
    failed_at: float | None
    error: str | None           # traceback of the last failure
    next_at: float | None       # when it is to run, again or for the first time
    started_at: float | None    # of the last attempt
    worker: str | None          # the process that runs it
    request: str | None         # id of the request that enqueued it


class Jobs:
    """Register functions with @jobs.task() and run them later: task.later(...), jobs.enqueue()."""

    def __init__(self, database, outbox):
        self._db = database
        self._outbox = outbox           # the database whose transactions may enqueue
        self.tasks = {}                 # name -> Task
        self._recurring = {}            # name -> (function of a time that gives the next, catch_up)
        self._reset()

    def _reset(self):
        self._workers = 0               # how many jobs run at once; 0: this process runs none
        self._bell = gevent.event.Event()
        self._claimed = gevent.queue.Queue()    # lists of claims that run together
        self._running = {}              # id of the first of such a list -> the list, till its end
        self._greenlets = []
        self._settled = []              # (Claim, error or None) since the last exchange
        self._looked_at = -math.inf     # at the leases
        self._back_at = -math.inf       # when the database could be used again; inf: not yet
        self._clock_offset = None       # of the wall clock to the monotonic one, when last seen
        self._loop = None

    # Registering

    def task(self, function=None, /, *, queue='default', attempts=5, retry_seconds=2.0,
             timeout_seconds=300.0, batch=False, recurs=None):
        """A decorator, bare or with options: register the function under its name; gives a Task.

        It is called with the job's arguments as keywords, possibly more than once. A failure is
        tried again after retry_seconds, twice that, and so on, with some jitter; after so many
        attempts the job has failed. batch: it is called once for all its jobs that start together,
        with a list of their arguments (dicts); if that fails, each of them runs alone. recurs: see
        every() and cron(). Raises JobError.
        """
        _check_queue(queue)
        if type(attempts) is not int or attempts < 1:
            raise JobError(f'attempts is a whole number from 1, not {_shown(attempts)}')
        _check_seconds('retry_seconds', retry_seconds)
        _check_seconds('timeout_seconds', timeout_seconds)

        def register(function):
            only_made = (inspect.iscoroutinefunction, inspect.isgeneratorfunction,
                         inspect.isasyncgenfunction)
            if not inspect.isfunction(function) or function.__name__ == '<lambda>' \
                    or any(is_one(function) for is_one in only_made):
                raise JobError(f'a task is a function with a name, no generator, and not async; '
                               f'{_shown(function)} is none')
            task = Task(function, self, function.__name__, queue, attempts, retry_seconds,
                        timeout_seconds, batch, None if batch else inspect.signature(function))
            if task.name in self.tasks:
                raise JobError(f'there are two tasks {task.name}')
            if recurs:
                _check_arguments(task, {})
                self._recurring[task.name] = recurs
            self.tasks[task.name] = task
            return task
        return register if function is None else register(function)

    def every(self, seconds, catch_up=True, **options):
        """A decorator: register a task and run it when the Unix time is a multiple of so many
        seconds, in one process of all, never two at once. catch_up: a time that passed while
        nobody ran is made up for, once. options: of task(). Raises JobError."""
        _check_seconds('every()', seconds, least=1)
        return self.task(**options, recurs=(
            lambda at: (math.floor(at / seconds) + 1) * seconds, catch_up))

    def cron(self, fields, timezone='UTC', catch_up=True, **options):
        """every() at the times of a crontab: minute, hour, day of month, month, day of week, with
        lists, ranges, steps and names ('*/15 8-18 * * mon-fri'). A time that the clocks skip runs
        right after, one that comes twice runs once. Source: crontab(5). Raises JobError."""
        return self.task(**options, recurs=(Cron(fields, timezone).after, catch_up))

    # Enqueueing

    def enqueue(self, task, arguments=None, *, delay_seconds=0.0, queue=None, unique_key=None,
                order_key=None):
        """Run a job later; gives its id. In a transaction of the app database it is part of that.

        task: a Task or its name. arguments: a dict that JSON has. unique_key: while a job with it
        waits, this one is dropped (and the id is that one's, outside a transaction). order_key:
        jobs that share it run in the order of their commits, one at a time. Keys are text of at
        most MAX_JOB_KEY_CHARS. queue: instead of the task's own. Raises JobError.
        """
        name = task.name if isinstance(task, Task) else task
        known = self.tasks.get(name) if isinstance(name, str) else None
        if known is None:
            raise JobError(f'no task is registered as {_shown(name)}; there are '
                           f'{", ".join(sorted(self.tasks)) or "none"}')
        row = {'uid': _new_id(), 'name': name,
               'arguments': _check_arguments(known, {} if arguments is None else arguments),
               'queue': known.queue if queue is None else _check_queue(queue),
               'unique_key': _check_key('unique_key', unique_key),
               'order_key': _check_key('order_key', order_key),
               'enqueued_at': now(), 'request': request_id.get()}
        row['run_at'] = row['enqueued_at'] + _check_seconds('delay_seconds', delay_seconds)
        if self._outbox.in_transaction:
            if self._db.in_transaction:     # both are on one server
                self._lock_order(order_key)
                self._db.executemany(INSERT_JOB, [row])
            else:
                self._outbox.execute(INSERT_OUTBOX, (to_json(row),))
            self._outbox.after_commit(self._wake)
            return row['uid']
        refuse_in_transaction('a job that is enqueued')
        if order_key is None:
            return self._insert(row)        # one statement, which needs no lock
        self._relay()           # what was committed before comes first
        return self._db.transact(self._insert, row)

    def _insert(self, row):
        """Insert a row, under the lock of its order key: who deletes the one before it at the same
        time, elsewhere, would not see it. Gives the id of the job."""
        if row['order_key'] is not None:
            self._lock_order(row['order_key'])
        inserted = self._db.execute(INSERT_JOB, row)
        self._db.after_commit(self._wake)
        return inserted[0][0] if inserted else row['uid']

    def _lock_order(self, *keys):
        self._db.lock(*(f'order {key}' for key in keys if key is not None))

    # Looking, and changing by hand

    def find(self, id):
        """A job by its id; None when it is done, or was never there."""
        self._relay()
        return next(iter(self.list(id=_check_id(id))), None)

    def failed(self, limit=100):
        """The failed jobs, the last first."""
        return [_job(row) for row in self._db.execute(
            f'{SELECT_JOB} WHERE failed_at IS NOT NULL ORDER BY failed_at DESC LIMIT ?', (limit,))]

    def cancel(self, id):
        """Delete a job that has not started, and say whether it was there."""
        return bool(self.change('cancel', _check_id(id)))

    def retry(self, id):
        """Run a failed job again, with all its attempts, as the last of its order key. Raises
        JobError if it has not failed."""
        if not self.change('retry', _check_id(id)):
            raise JobError(f'there is no failed job {_shown(id)}')

    def discard(self, id):
        """Delete a failed job. Raises JobError if it has not failed."""
        if not self.change('discard', _check_id(id)):
            raise JobError(f'there is no failed job {_shown(id)}')

    def change(self, verb, id=None, state=None, name=None, queue=None):
        """Do one of CHANGE_JOBS to the jobs that match and are in a state for it; gives their
        number. Some at a time: others run between. Raises JobError."""
        refuse_in_transaction('a change of a job')
        self._relay()
        where, values = _matching(id, state, name, queue)
        states, statement = CHANGE_JOBS[verb]
        fit = ' OR '.join(STATES[each] for each in states)
        statement += f" AND ({fit}) RETURNING {', '.join(RETRIED)}"
        ids = [id for id, in self._db.execute(
            f'SELECT uid FROM jobs WHERE {where} AND ({fit}) ORDER BY id', values)]
        return sum(self._db.transact(self._change, verb, statement, ids[start:start + CLAIM_ROWS])
                   for start in range(0, len(ids), CLAIM_ROWS))

    def _change(self, verb, statement, ids):
        self._lock_order(*(key for key, in self._db.execute(
            'SELECT order_key FROM jobs WHERE uid IN (SELECT value FROM json_each(?))',
            (to_json(ids),))))
        self._db.after_commit(self._wake)       # the next of their order keys may be due
        changed = [row for id in ids for row in self._db.execute(statement, (id,))]
        for row in changed if verb == 'retry' else ():
            self._insert({**dict(zip(RETRIED, row)), 'unique_key': None, 'run_at': now()})
        return len(changed)

    def list(self, limit=100, id=None, state=None, name=None, queue=None):
        """The jobs that match, the last to come first."""
        where, values = _matching(id, state, name, queue)
        return [_job(row) for row in self._db.execute(
            f'{SELECT_JOB} WHERE {where} ORDER BY id DESC LIMIT ?', (*values, limit))]

    def counts(self, id=None, state=None, name=None, queue=None):
        """{(queue, state): number of jobs that match}"""
        where, values = _matching(id, state, name, queue)
        rows = self._db.execute(f'SELECT queue, {STATE} AS state, count(*) FROM jobs WHERE {where} '
                                'GROUP BY queue, state', values)
        return {(queue, state): number for queue, state, number in rows}

    def pause(self, queue):
        """Start no more jobs of a queue, in any process, until resume(); running ones end."""
        self._db.execute('INSERT INTO paused_queues (queue) VALUES (?) ON CONFLICT DO NOTHING',
                         (_check_queue(queue),))

    def resume(self, queue):
        self._db.execute('DELETE FROM paused_queues WHERE queue = ?', (_check_queue(queue),))
        self._wake()
        processes.ring(b'j')

    def paused(self):
        """The queues that are paused."""
        return {queue for queue, in self._db.execute('SELECT queue FROM paused_queues')}

    def recurring(self):
        """[(name, when last, when next), ...] of the recurring tasks, in Unix seconds or None."""
        times = {name: (last_at, due_at) for name, last_at, due_at in self._db.execute(
                 'SELECT name, last_at, due_at FROM recurring')}
        return [(name, *times.get(name, (None, None))) for name in sorted(self._recurring)]

    def run_recurring(self, name):
        """Run a recurring task now, unless it waits already. Raises JobError."""
        if name not in self._recurring:
            raise JobError(f'no recurring task is registered as {_shown(name)}')
        self._db.execute('UPDATE recurring SET last_at = now_s() WHERE name = ?', (name,))
        return self.enqueue(name, unique_key=f'every {name}', order_key=f'every {name}')

    def prune(self):
        """Delete the jobs that failed more than KEEP_FAILED_SECONDS ago, and give the number; and
        what recurred in a version that is gone."""
        self._db.execute('DELETE FROM recurring WHERE due_at < now_s() - ?', (KEEP_FAILED_SECONDS,))
        return len(self._db.execute('DELETE FROM jobs WHERE failed_at < now_s() - ? RETURNING id',
                                    (KEEP_FAILED_SECONDS,)))

    # The dispatcher

    def open(self, workers):
        """Start running jobs, so many at once; to enqueue them, an open stack is enough."""
        self._workers = workers + 1     # the last is for the first queue: pages wait for its jobs
        processes.wakes(self._bell, b'j')
        self._greenlets = [gevent.spawn(self._work) for _ in range(self._workers)]
        self._loop = Loop('jobs', self._turn)

    def close(self, stop_seconds=STOP_SECONDS):
        """Take no more jobs, let the running ones end, give the rest back for the next process."""
        self._loop.stop()
        with gevent.Timeout(stop_seconds, False):
            while self._running:
                self._bell.clear()
                self._bell.wait()
        self._workers = 0
        gevent.killall(self._greenlets, block=False)
        gevent.joinall(self._greenlets, timeout=0.5)
        self._relay()
        self._db.transact(self._settle, self._settled)
        self._db.execute(GIVE_BACK, (processes.name, '[]'))
        processes.ring(b'j')
        self._reset()

    def _wake(self):
        """Have the dispatcher look: ours, or else every other process's."""
        if self._clock_offset is not None:      # so that a clock ahead for a moment is noticed
            self._clock_offset = max(self._clock_offset, now() - time.monotonic())
        self._bell.set()
        if not self._workers:
            processes.ring(b'j')

    def _turn(self):
        """One turn of the dispatcher."""
        self._bell.clear()
        settled = list(self._settled)
        try:
            self._relay()
            next_due = self._db.transact(self._exchange, settled)
        except StorageError:
            self._back_at = math.inf
            raise
        del self._settled[:len(settled)]
        if self._db.joined:
            gevent.sleep(GATHER_SECONDS)
        patience = processes.patience()
        if self._running:
            patience = min(patience, LEASE_SECONDS / 3)
        if next_due is not None and len(self._running) < self._workers:
            # No longer than a lease, whatever the clock does meanwhile.
            patience = min(patience, LEASE_SECONDS, max(next_due - now(), 0.001))
        return functools.partial(self._bell.wait, patience)

    def _exchange(self, settled):
        """In one transaction: settle what ended, and claim what is due. Gives the time when the
        next job falls due; None: never."""
        self._settle(settled)
        self._mind_the_clock()
        if time.monotonic() - self._looked_at > LEASE_SECONDS / 10:
            self._looked_at = time.monotonic()
            self._back_at = min(self._back_at, self._looked_at)
            self._renew_leases()
            self._free_leases()
        recurs_at, *first = self._db.execute(FIRST_DUE)[0]
        if recurs_at is not None and recurs_at <= now():
            recurs_at = self._tick_recurring()
            _, *first = self._db.execute(FIRST_DUE)[0]
        first, times, claims = dict(zip(QUEUES, first)), [recurs_at], []
        for queue in sorted(QUEUES, key=lambda name: random.expovariate(QUEUES[name])):
            if first[queue] is None or first[queue] > now():
                times.append(first[queue])
            elif self._free(queue, claims):         # else whoever ends rings the bell
                claims += self._claim(queue, claims)
                # More of them may be due, or be taken by another process just now.
                times.append(now() + (len(claims) < CLAIM_ROWS) * SKIPPED_SECONDS)
        self._db.after_commit(functools.partial(self._begin, claims))
        return min((at for at in times if at is not None), default=None)

    def _claim(self, queue, claims):
        """Take what is due in a queue, for the workers that are left beside those claims."""
        taken = []
        while free := self._free(queue, claims + taken):
            rows = self._db.execute(CLAIM_JOBS, {
                'queue': queue, 'limit': free, 'worker': processes.name, 'lease': LEASE_SECONDS,
                'running': to_json(self._running_ids())})
            taken += [Claim(*row) for row in sorted(rows)]
            if len(rows) < free or len(claims) + len(taken) >= CLAIM_ROWS:
                break
        return taken

    def _running_ids(self):
        return [claim.id for claims in self._running.values() for claim in claims]

    def _free(self, queue, claims):
        """How many workers are left for a queue; the last one is for the first queue alone. A batch
        takes one, however long it is."""
        busy = len(self._running) + len(self._together(claims))
        return max(0, self._workers - busy - (queue != next(iter(QUEUES))))

    def _together(self, claims):
        """Claims in lists of those that run together: one that was tried before runs alone, as it
        may be what ends the others."""
        lists = {}
        for claim in claims:
            task = self.tasks.get(claim.name)
            joins = task and task.batch and claim.attempt == 1
            lists.setdefault(claim.name if joins else claim.id, []).append(claim)
        return list(lists.values())

    def _settle(self, settled):
        """Delete what is done, and have what failed tried again, or kept as failed."""
        self._lock_order(*(claim.order_key for claim, _ in settled))
        self._db.executemany(FINISH_JOB, [claim[:4] for claim, error in settled if error is None])
        for claim, error in settled:
            if error is None:
                continue
            task, pause = self.tasks.get(claim.name), None
            if (task is None and processes.patience() < LONELY_POLL_SECONDS
                    and now() < claim.run_at + UNKNOWN_SECONDS):
                self._db.execute(LEAVE_JOB, (UNKNOWN_PAUSE_SECONDS, *claim[:4]))
                continue
            for_good = task is None or claim.attempt >= task.attempts
            if not for_good:
                pause = task.retry_seconds * 2 ** min(claim.attempt - 1, 20)
                pause = min(pause, MAX_BACKOFF_SECONDS) * random.uniform(0.8, 1.2)
            found = self._db.execute(FAIL_JOB, (error, pause, for_good, *claim[:4]))
            if found and for_good:
                before = request_id.set(claim.request)
                log.error('job failed for good id=%s name=%s attempts=%s', claim.uid, claim.name,
                          claim.attempt)
                request_id.reset(before)

    def _insert_outbox(self):
        """Insert what the outbox holds, and give the id of its last row; 0: it holds nothing. What
        can't be inserted becomes a failed job."""
        rows = self._outbox.execute('SELECT id, job FROM outbox ORDER BY id LIMIT ?',
                                    (OUTBOX_ROWS,))
        for id, text in rows:
            try:
                row = json.loads(text)
                # Of version 1 it has no time or request of its own, and perhaps no id.
                row = {'enqueued_at': now(), 'request': None, **row}
                row['uid'] = row['uid'] or f'outbox-{id}'
                arguments = json.loads(row['arguments'])
                if not (math.isfinite(row['run_at']) and isinstance(arguments, dict)):
                    raise JobError('it has no time, or no arguments')
                delay = row['run_at'] - row['enqueued_at']
                row['run_at'] = min(row['run_at'], now() + delay)   # the clock may have been set
                self._db.execute(INSERT_JOB, row)       # without a lock: SQLite has one writer
            except (StorageError, OSError, MemoryError):        # not the row's
                raise
            except Exception as error:
                log.error('a row of the outbox is no job: %r', error)
                self._db.execute(INSERT_FAILED, (
                    f'outbox-{id}', 'outbox', to_json({'row': str(text)}),
                    cleaned(traceback.format_exc())))
        return rows[-1][0] if rows else 0

    def adopt_outbox(self):
        """Make jobs of what the outbox holds, in a transaction of both databases."""
        while last := self._insert_outbox():
            self._outbox.execute(EMPTY_OUTBOX, (last,))

    def _relay(self):
        """Move what the outbox holds now; in a transaction it stays there. On one server a job is
        written with the transaction, and needs no outbox.

        It is read under the lock of the job database, and every process does this before it settles
        a job: so nobody who reads it can insert a job that is done already. Its ids are in the
        order of the commits, and given once.
        """
        if Database.current or self._db.joined:
            return
        while self._outbox.execute('SELECT 1 FROM outbox LIMIT 1'):
            last = self._db.transact(self._insert_outbox)
            self._outbox.transact(self._outbox.execute, EMPTY_OUTBOX, (last,))

    def _mind_the_clock(self):
        """When the clock was set, see to it that nothing recurs later than its period, and that
        nothing waits for a time that was the present."""
        offset = now() - time.monotonic()
        if self._clock_offset is None or abs(offset - self._clock_offset) > 1:
            self._db.execute(RUN_FROM_FUTURE)
            for name, (after, catch_up) in self._recurring.items():
                self._db.execute(START_RECURRING, {'name': name, 'next': after(now()),
                                                   'catch_up': catch_up})
            self._db.after_commit(functools.partial(setattr, self, '_clock_offset', offset))

    def _renew_leases(self):
        """Go on with what is leased here; give back what nobody here knows of, since the claim
        failed behind its commit."""
        known = self._running_ids() + [claim.id for claim, _ in self._settled]
        self._db.execute(RENEW_LEASES, (LEASE_SECONDS, processes.name))
        self._db.execute(GIVE_BACK, (processes.name, to_json(known)))

    def _free_leases(self):
        """Free what a dead process had leased at once; where nobody knows whether it is dead, when
        the lease has run out, or ends later than one can."""
        dead = processes.dead()
        for worker, ended in self._db.execute(LEASES, (LEASE_SECONDS, processes.name)):
            alive = processes.is_alive(worker)
            if alive is None:       # one that nobody could renew meanwhile has some time yet
                alive = not ended or time.monotonic() < self._back_at + LEASE_SECONDS
            if not alive:
                freed = self._db.execute(FREE_LEASES, (worker,))
                log.warning('freed the jobs of a dead process worker=%s jobs=%s', worker,
                            len(freed))
        self._db.after_commit(functools.partial(processes.bury, dead))

    def _tick_recurring(self):
        """Insert the recurring jobs that are due; gives the time of the next."""
        times, at = [], now()
        for name, due_at in self._db.execute('SELECT name, due_at FROM recurring'):
            if name not in self._recurring:
                continue
            if due_at <= at:
                after, _ = self._recurring[name]
                was_due_at, due_at = due_at, after(at)
                # Of several processes one finds the time that it has read.
                if self._db.execute(TICK_RECURRING, (due_at, at, name, was_due_at)):
                    self._insert({
                        'uid': _new_id(), 'name': name, 'arguments': '{}',
                        'queue': self.tasks[name].queue, 'unique_key': f'every {name}',
                        'order_key': f'every {name}', 'enqueued_at': at, 'run_at': at,
                        'request': None})
            times.append(due_at)
        return min(times, default=None)

    # Running

    def _begin(self, claims):
        """Start what was claimed, whose wait is over."""
        self._start(self._together(claims))
        for claim in claims:
            if claim.attempt == 1:
                metrics.time(max(0.0, now() - claim.run_at), 'job_wait_seconds', claim.queue)

    def _start(self, lists):
        for claims in lists:
            self._running[claims[0].id] = claims
            self._claimed.put(claims)

    def _work(self):
        while self._workers:
            with contextlib.suppress(gevent.GreenletExit):      # of the stop, or of somebody's kill
                self._run(self._claimed.get())

    def _run(self, claims):
        """Run a job, or those of a batch together; if that fails, each of them alone."""
        started = time.perf_counter()
        error = self._perform(claims)
        seconds = time.perf_counter() - started
        self._running.pop(claims[0].id, None)
        if error and len(claims) > 1:
            self._start([[claim] for claim in claims])
        else:
            self._settled += [(claim, error) for claim in claims]
            self._measure(claims, error, seconds)
        self._bell.set()

    def _measure(self, claims, error, seconds):
        name = claims[0].name if claims[0].name in self.tasks else 'unknown'
        for _ in claims:
            metrics.time(seconds, 'job_duration_seconds', name, 'failed' if error else 'done')
        if settings.slow_job_ms and seconds * 1000 >= settings.slow_job_ms:
            log.warning('slow job id=%s name=%s seconds=%.3f', claims[0].uid, name, seconds)

    def _perform(self, claims):
        """Call the task; gives the error, or None. Whatever it raises is its own."""
        name, attempt = claims[0].name, claims[0].attempt
        task = self.tasks.get(name)
        request_id.set(claims[0].request)
        try:
            if task is None:
                raise JobError(f'no task is registered as {name!r}; was it renamed?')
            if attempt > task.attempts:         # it was leased so often and never ended
                raise JobError(f'its process died {task.attempts} times while it ran')
            arguments = [json.loads(claim.arguments) for claim in claims]
            with gevent.Timeout(task.timeout_seconds):
                if task.batch:
                    task.function(arguments)
                else:
                    task.function(**arguments[0])
            return None
        except BaseException as failure:        # sys.exit() too: a job must not end the process
            if not self._workers and isinstance(failure, gevent.GreenletExit):
                raise                           # a stop, which gives it back
            error, hidden = cleaned(traceback.format_exc()), _hidden(claims)
            metrics.failed('job', name if task else 'unknown', failure, hidden)
            log.error('job failed ids=%s name=%s attempt=%s error=%s',
                      ','.join(claim.uid for claim in claims), name, attempt,
                      cleaned(error, hidden).rstrip().rpartition('\n')[2])
            return error


CRON_ITEM = re.compile('(?:[*]|([0-9]+|[a-z]+)(?:-([0-9]+|[a-z]+))?)(?:/([0-9]{1,2}))?')


class Cron:
    """The times of the five fields of a crontab in a time zone. Raises JobError."""
    FIELDS = (('minute', 0, 59, ()), ('hour', 0, 23, ()), ('day of month', 1, 31, ()),
              ('month', 1, 12, 'jan feb mar apr may jun jul aug sep oct nov dec'.split()),
              ('day of week', 0, 7, 'sun mon tue wed thu fri sat'.split()))

    def __init__(self, fields, timezone='UTC'):
        parts = fields.lower().split() if isinstance(fields, str) else ()
        if len(parts) != 5:
            raise JobError(f'cron takes five fields, minute hour day month weekday, not '
                           f'{_shown(fields)}')
        try:
            self._zone = zoneinfo.ZoneInfo(timezone)
        except (zoneinfo.ZoneInfoNotFoundError, ValueError, TypeError, OSError):
            raise JobError(f'there is no time zone {_shown(timezone)} here; names are like '
                           f'Europe/Berlin (the package tzdata has them)') from None
        minutes, hours, self._days, self._months, weekdays = (
            self._values(part, *field) for part, field in zip(parts, self.FIELDS))
        self._times = [datetime.time(hour, minute) for hour in hours for minute in minutes]
        self._weekdays = {day % 7 for day in weekdays}
        self._either = parts[2][0] != '*' and parts[4][0] != '*'    # then one of the two must fit
        if self.after(now()) is None:
            raise JobError(f'{fields!r} never comes')

    def _values(self, part, name, low, high, names):
        """The values of a field, in order: 'a', 'a-b' or '*', each with '/step', between commas."""
        def number(text):
            return int(text) if text.isdecimal() else low + names.index(text)

        values = set()
        for item in part.split(','):
            try:
                first, last, step = CRON_ITEM.fullmatch(item).groups()
                last = number(last or first) if last or first and not step else high
                first = number(first) if first else low
                if not low <= first <= last <= high:
                    raise ValueError
                values.update(range(first, last + 1, int(step or 1)))
            except (AttributeError, ValueError):        # no match, name, number, range, or step
                raise JobError(f'the {name} of a cron is * or from {low} to {high}'
                               f'{", or " if names else ""}{" ".join(names)}, with lists, ranges '
                               f'and steps, not {item!r}') from None
        return sorted(values)

    def after(self, at):
        """The first of the times after one, in Unix seconds; None if there is none in 8 years."""
        local = datetime.datetime.fromtimestamp(at, self._zone).replace(tzinfo=None)
        for day in (local.date() + datetime.timedelta(days) for days in range(8 * 366)):
            for of_day in self._times if self._fits(day) else ():
                wall = datetime.datetime.combine(day, of_day)
                if wall > local and (instant := self._instant(wall)) > at:
                    return instant
        return None

    def _fits(self, day):
        by_date, by_weekday = day.day in self._days, day.isoweekday() % 7 in self._weekdays
        return day.month in self._months and (
            by_date or by_weekday if self._either else by_date and by_weekday)

    def _instant(self, wall):
        """When a clock on the wall shows the time, the first time; one that is skipped: when it
        shows the first that is not."""
        while True:
            instant = wall.replace(tzinfo=self._zone).timestamp()
            if datetime.datetime.fromtimestamp(instant, self._zone).replace(tzinfo=None) == wall:
                return instant
            wall += datetime.timedelta(minutes=1)


def _new_id():
    """The id of a job: in the order of time, so that new ones share a page of the index."""
    return f'{time.time_ns() // 10**6:011x}{secrets.token_hex(6)}'


def _job(row):
    """A row of SELECT_JOB as a Job."""
    job = Job(*row)
    return job._replace(arguments=json.loads(job.arguments))


def _hidden(claims):
    """The arguments of jobs that nobody should see."""
    hidden = []
    with contextlib.suppress(*JSON_ERRORS):
        masked([json.loads(claim.arguments) for claim in claims], hidden)
    return hidden


def masked(value, hidden, hide=False):
    """Arguments as they may be shown: without those whose names contain a word of the settings.
    What is not shown is added to the list `hidden`."""
    if isinstance(value, dict):
        return {name: masked(each, hidden, hide or any(word in name.lower()
                                                       for word in settings.stack_mask))
                for name, each in value.items()}
    if isinstance(value, list):
        return [masked(each, hidden, hide) for each in value]
    if hide:
        hidden.append(value)
    return '…' if hide else value


def without_secrets(job):
    """A Job as it may be shown."""
    hidden = []
    arguments = masked(job.arguments, hidden)
    return job._replace(arguments=arguments, error=job.error and cleaned(job.error, hidden))


def _matching(id, state, name, queue):
    """A condition for jobs, and its parameters; None: any. Raises JobError."""
    if state is not None and state not in STATES:
        raise JobError(f'the state of a job is {", ".join(STATES)}, not {_shown(state)}')
    given = {'uid': id, 'name': name, 'queue': queue}
    given = {column: cleaned(value) for column, value in given.items() if value is not None}
    return (' AND '.join([STATES[state] if state else 'true', *(f'{each} = ?' for each in given)]),
            tuple(given.values()))


def _check_id(id):
    if not isinstance(id, str):
        raise JobError(f'the id of a job is text, not {_shown(id)}')
    return cleaned(id)


def _check_queue(queue):
    if not isinstance(queue, str) or queue not in QUEUES:
        raise JobError(f'the queue {_shown(queue)} is not one of {", ".join(QUEUES)}')
    return queue


def _check_seconds(name, seconds, least=0):
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) \
            or not least <= seconds <= MAX_DELAY_SECONDS:
        raise JobError(f'{name} takes seconds from {least} to {MAX_DELAY_SECONDS:,}, not '
                       f'{_shown(seconds)}')
    return seconds


def _check_key(name, key):
    if key is not None and not (isinstance(key, str) and 0 < len(key) <= MAX_JOB_KEY_CHARS
                                and key.isprintable()):
        raise JobError(f'{name} is printable text of 1 to {MAX_JOB_KEY_CHARS} characters, not '
                       f'{_shown(key)}')
    return key


def _check_arguments(task, arguments):
    """The arguments of a job as JSON. Raises JobError."""
    if not isinstance(arguments, dict) or not all(isinstance(name, str) for name in arguments):
        raise JobError(f'the arguments of {task.name} are a dict by name, not {_shown(arguments)}')
    try:
        if task.signature:
            task.signature.bind(**arguments)
        return to_json(arguments)
    except JSON_ERRORS as error:        # of bind(): a TypeError
        raise JobError(f'the arguments of {task.name} are not what it takes, or not what JSON has: '
                       f'{error}') from None


job_db = Database('job', JOB_MIGRATIONS, part_of=app_db)
jobs = Jobs(job_db, outbox=app_db)


@check
def stuck_jobs():
    """Jobs and rows of the outbox that nobody runs, or that have failed."""
    for id, row in app_db.execute('SELECT id, job FROM outbox'):
        try:
            name = json.loads(row)['name']
        except (ValueError, KeyError, TypeError):
            name = None
        if name not in jobs.tasks:
            yield f'row {id} of the outbox is no job of this app'
    for queue, count in job_db.execute('SELECT queue, count(*) FROM jobs '
                                       'WHERE failed_at IS NULL GROUP BY queue'):
        if queue not in QUEUES:
            yield f'{count} jobs wait in the queue {queue}, which nobody serves'
    for name, count in job_db.execute('SELECT name, count(*) FROM jobs '
                                      'WHERE failed_at IS NOT NULL GROUP BY name'):
        yield f'{count} jobs of {name} have failed'


# === Cable: messages to whoever listens ==================================================
# The log in the cable database is the only way: broadcast() appends to it, and every process
# delivers what is new in it, in its order. A position is "epoch:id"; who comes back with one gets
# what was missed, or hears that the log no longer reaches back so far.

KEEP_MESSAGES_SECONDS = 600
KEEP_MESSAGES = 20_000
TRIM_EVERY = 128                        # messages
DELIVER_ROWS = 500
REPLAY_MESSAGES = 200                   # more than that, and a fresh page is cheaper
MAX_BROADCAST_BYTES = 1024 * 1024       # more than a socket may leave unread

CABLE_MIGRATIONS = [
    ('001 create messages', '''
        CREATE /*pg UNLOGGED */ TABLE messages (
            id          INTEGER PRIMARY KEY AUTOINCREMENT,      -- the offset of a position
            stream      TEXT NOT NULL,
            payload     TEXT NOT NULL,                          -- JSON
            created_at  REAL NOT NULL
        )'''),
    ('002 index messages by stream', 'CREATE INDEX messages_by_stream ON messages (stream, id)'),
    ('003 index messages by time', 'CREATE INDEX messages_by_time ON messages (created_at)'),
    ('004 create epochs',
     'CREATE /*pg UNLOGGED */ TABLE epochs (epoch TEXT PRIMARY KEY)'),      # one row
    ('005 drop index by time', 'DROP INDEX messages_by_time'),      # ids are in the order of time
    ('006 name the epoch', "DELETE FROM epochs WHERE epoch = ''"),      # _begin() does
]
# Ids are in the order of time: the first that is young enough ends the look. The last message
# always stays, since its id is the position of who is up to date.
TRIM_MESSAGES = '''
    DELETE FROM messages
    WHERE id <= (SELECT max(id) FROM messages) - :keep
        OR id < coalesce((SELECT id FROM messages WHERE created_at >= now_s() - :seconds
                          ORDER BY id LIMIT 1), (SELECT max(id) FROM messages))'''
APPEND_MESSAGE = '''
    INSERT INTO messages (id, stream, payload, created_at)
    SELECT coalesce(max(id), 0) + 1, ?, ?, now_s() FROM messages'''
# The LIMIT of one says what no statistics say: else PostgreSQL plans for thousands of rows.
NEXT_MESSAGES = '''
    SELECT epoch, id, stream, payload, created_at
    FROM (SELECT epoch FROM epochs LIMIT 1) AS log LEFT JOIN messages ON id > ?
    ORDER BY id LIMIT ?'''


class CableError(AppError):
    """A stream or a message that can't be broadcast."""


class PositionLost(AppError):
    """The log does not reach back to a position: messages may have been missed."""


class Message(typing.NamedTuple):
    """A row of the log."""
    id: int
    stream: str
    payload: str            # JSON
    created_at: float


class Cable:
    """Streams by name; a message is anything that JSON has."""

    def __init__(self, database):
        self._db = database
        self._subscribers = {}          # stream -> set of functions
        self._last = 0                  # id of the last message delivered here
        self._bell = gevent.event.Event()
        self._loop = None
        self.reloads = False            # who can't resume loads the page as a whole
        self.epoch = None               # names the file: positions of another mean nothing here

    def open(self):
        """Start delivering what is appended from now on."""
        self.epoch, self._last = self._db.transact(self._begin)
        processes.wakes(self._bell, b'c')
        self._loop = Loop('cable', self._turn)

    def close(self):
        self._loop.stop()
        self.__init__(self._db)

    def begin_anew(self):
        """Let no position be valid any more: who has one elsewhere is told to look again."""
        self.epoch = secrets.token_hex(4)
        self._db.execute('UPDATE epochs SET epoch = ?', (self.epoch,))
        processes.ring(b'c')

    def broadcast(self, stream, message):
        """Append a message to the log, and have it delivered. Gives its id when it is in the log.

        message: what JSON has, or a function that gives it, called under a lock of the stream (on
        PostgreSQL from its first statement on): what
        it reads in other databases is newer than all that the log has of the stream, so that
        messages which tell a state stand in the order of the states. Raises CableError; inside a
        transaction MisuseError: enqueue a job there, which broadcasts.
        """
        return self.broadcast_all([(stream, message)])[0]

    def broadcast_all(self, messages):
        """broadcast() for each (stream, message) of a list, in one transaction. Gives their ids."""
        checked = [(_stream_checked(stream), message if callable(message) else _payload(message))
                   for stream, message in messages]
        ids = self._db.transact(self._append, checked)
        metrics.count('cable_messages_total', by=len(ids))
        processes.ring(b'c')            # first: the other processes have further to go
        self._bell.set()
        return ids

    def position(self):
        """Where the log stands: read it before the state that a page shows, and subscribe with
        it."""
        self._db._check()
        return f'{self.epoch}:{self._last}'

    def subscribe(self, stream, receive):
        """Call receive(message) for each new Message of a stream, in order, and receive(None) where
        the log began anew, so that some may be missing. It must not wait."""
        self._db._check()
        self._subscribers.setdefault(_stream_checked(stream), set()).add(receive)

    def unsubscribe(self, stream, receive):
        """Stop it; harmless if it never started."""
        receivers = self._subscribers.get(stream, set())
        receivers.discard(receive)
        if not receivers:
            self._subscribers.pop(stream, None)

    def since(self, stream, position):
        """The messages of a stream after a position, up to what is delivered to subscribers: who
        has subscribed before, and skips what came with an id of these, misses nothing and gets
        nothing twice. Raises PositionLost."""
        (first, end), = self._db.execute('SELECT (SELECT coalesce(min(id), 1) FROM messages), '
                                         '(SELECT coalesce(max(id), 0) FROM messages)')
        epoch, _, id = position.rpartition(':')
        if epoch != self.epoch or not re.fullmatch('[0-9]{1,18}', id):
            raise PositionLost(f'{position[:100]!r} is not a position of this log')
        if not first - 1 <= int(id) <= end:
            raise PositionLost(f'the log reaches from {first - 1} to {end}')
        return self._read(stream, int(id), 0.0)

    def since_time(self, stream, at):
        """The messages of a stream from a time on (Unix seconds). Raises PositionLost."""
        if not now() - KEEP_MESSAGES_SECONDS <= at:         # nor is it NaN
            raise PositionLost(f'the log is kept for {KEEP_MESSAGES_SECONDS} seconds')
        oldest_of_full = self._db.execute(
            'SELECT created_at FROM messages WHERE id <= (SELECT max(id) FROM messages) - ? '
            'ORDER BY id LIMIT 1', (KEEP_MESSAGES - 1,))
        if oldest_of_full and oldest_of_full[0][0] > at:
            raise PositionLost('the log was cut short after that time')
        return self._read(stream, 0, at)

    def stats(self):
        """Messages in the log, and the age of the first, in seconds."""
        (messages, first_at), = self._db.execute('SELECT count(*), min(created_at) FROM messages')
        return {'log_messages': messages, 'log_seconds': now() - first_at if messages else 0}

    def prune(self):
        """Delete what is older than KEEP_MESSAGES_SECONDS or beyond the last KEEP_MESSAGES."""
        self._db.execute(TRIM_MESSAGES, {'keep': KEEP_MESSAGES, 'seconds': KEEP_MESSAGES_SECONDS})

    def _append(self, messages):
        # The order of the states comes from the first locks, that of the ids from the last: between
        # them other streams can be rendered.
        self._db.lock(*(stream for stream, message in messages if callable(message)))
        rendered = [(stream, _payload(message()) if callable(message) else message)
                    for stream, message in messages]
        self._db.lock('the log')
        self._db.executemany(APPEND_MESSAGE, rendered)
        (end,), = self._db.execute('SELECT coalesce(max(id), 0) FROM messages')
        ids = list(range(end - len(rendered) + 1, end + 1))
        if any(id % TRIM_EVERY == 0 for id in ids):
            self.prune()
        return ids

    def _begin(self):
        """Take the lock of the log, and give its epoch and the id of its last message. One that a
        crash of a server has emptied begins anew."""
        self._db.lock('the log')
        rows = self._db.execute('SELECT epoch, (SELECT coalesce(max(id), 0) FROM messages) '
                                'FROM epochs')
        return rows[0] if rows else self._db.execute(
            'INSERT INTO epochs (epoch) VALUES (?) RETURNING epoch, 0', (secrets.token_hex(4),))[0]

    def _turn(self):
        """Hand out the next rows of the log."""
        self._bell.clear()
        rows = self._db.execute(NEXT_MESSAGES, (self._last, DELIVER_ROWS))
        if not rows or rows[0][0] != self.epoch:
            self.epoch, self._last = self._db.transact(self._begin)
            log.warning('the log of messages began anew epoch=%s', self.epoch)
            for stream in tuple(self._subscribers):
                self._hand_out(stream, None)
        elif rows[0][1] is not None:            # else there is none
            for _, *row in rows:
                message = Message(*row)
                self._last = message.id
                self._hand_out(message.stream, message)
        if len(rows) < DELIVER_ROWS:
            return functools.partial(self._bell.wait, processes.patience())

    def _hand_out(self, stream, message):
        for receive in tuple(self._subscribers.get(stream, ())):
            try:
                receive(message)
            except BaseException as error:      # one subscriber's trouble is not another's
                metrics.failed('loop', 'cable', error)
                log.exception('subscriber failed stream=%s', stream)

    def _read(self, stream, after, at):
        epoch = self.epoch
        rows = self._db.execute(
            'SELECT id, stream, payload, created_at FROM messages WHERE stream = ? '
            'AND id > ? AND created_at >= ? ORDER BY id LIMIT ?',
            (stream, after, at, REPLAY_MESSAGES + 1))
        if epoch != self.epoch:
            raise PositionLost('the log began anew meanwhile')
        # What is not delivered yet comes to who is live. Nothing switches from the read to here.
        messages = [Message(*row) for row in rows if row[0] <= self._last]
        if len(messages) > REPLAY_MESSAGES:
            raise PositionLost(f'more than {REPLAY_MESSAGES} messages were missed')
        return messages


def offset_of(position):
    """The id in a position that since() has taken."""
    return int(position.rpartition(':')[2])


def _stream_checked(stream):
    if not isinstance(stream, str) or not re.fullmatch(r'[^\0\ud800-\udfff]{1,500}', stream):
        raise CableError(f'a stream is text of 1 to 500 characters, without NUL and lone '
                         f'surrogates, not {_shown(stream)}')
    return stream


def _payload(message):
    """A message as JSON. Raises CableError."""
    try:
        payload = to_json(message)
    except JSON_ERRORS as error:
        raise CableError(f'a message must be what JSON has: {error}') from None
    if len(payload) > MAX_BROADCAST_BYTES:
        raise CableError(f'the message has {len(payload):,} bytes; at most '
                         f'{MAX_BROADCAST_BYTES:,} can be broadcast')
    return payload


cable_db = Database('cable', CABLE_MIGRATIONS, disposable=True, copied=False)
cable = Cable(cable_db)


# === PostgreSQL: the same databases on one server, for any number of machines ============
# Where DATABASE_URL is set, every Database is a schema there, and a greenlet has a connection and
# a transaction of its own. What is right is made so by tables, named locks and the server's clock;
# a bell (NOTIFY) only says "look now", and a poll stands behind it. Nothing is kept in a session of
# the server, so any pooler works.

PING_SECONDS = 2.0          # between looks at the server's clock, and at whether bells arrive
POLLS_SECONDS = 1.0, 0.25   # while they do; while they don't, as behind a pooler
CONNECTION_SECONDS = 600    # proxies end older connections
ANSWER_SECONDS = 10         # a server that says nothing for so long is cut off
NO_CONNECTION = types.SimpleNamespace(closed=True, close=lambda: None)      # one may be made
# A process that stops in a transaction must not hold its locks for ever.
BEGIN = (f'BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL statement_timeout = {BUSY_SECONDS}000; '
         f'SET LOCAL idle_in_transaction_session_timeout = {2 * BUSY_SECONDS}000')
LOCK = 'SELECT pg_advisory_xact_lock(hashtextextended(?, 0))'
PREPARATIONS = (LOCK, 'SAVEPOINT part', 'ROLLBACK TO part', 'RELEASE part')    # go with the next

# What stands for words of SQLite. A comment that begins with "pg" is for PostgreSQL alone.
ROW_ID = 'BIGINT GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY'
WORDS = {
    'INTEGER PRIMARY KEY AUTOINCREMENT': ROW_ID, 'INTEGER PRIMARY KEY': ROW_ID,
    'INTEGER': 'BIGINT', 'REAL': 'DOUBLE PRECISION', 'BLOB': 'BYTEA',
    'json_each': 'jsonb_array_elements_text', '/*pg': '', '*/': '', '?': '%s',
    # The time of a statement, which may have waited for a lock since its message came
    'now_s()': "(SELECT date_part('epoch', clock_timestamp()))",
}
SQL_PARTS = re.compile(r"""
    '[^']*' | "[^"]*" | --[^\n]* | /\*(?!pg).*?\*/ | (?<!:):[a-z]\w* | /\*pg | \*/ | [?%]
    | \b(?:INTEGER(?:\ PRIMARY\ KEY(?:\ AUTOINCREMENT)?)?|REAL|BLOB|json_each)\b | \bnow_s\(\)
    """, re.VERBOSE | re.DOTALL)
TRIGGER = re.compile(r'\s*(CREATE TRIGGER (\w+) .+?)BEGIN\b(.+)END\s*', re.DOTALL)
STATEMENTS = {      # of which each engine has its own; here all entries are counted
    COLUMNS: 'SELECT relname, attname FROM pg_class JOIN pg_attribute ON attrelid = pg_class.oid '
             "WHERE relkind = 'r' AND attnum > 0 AND relnamespace = current_schema::regnamespace",
    CACHE_BYTES: f'SELECT coalesce(sum(length(key) + coalesce(length(value), 8) + {ENTRY_BYTES}), '
                 '0) FROM entries',
}


@functools.lru_cache(2000)
def translated(statement):
    """A statement of SQLite for PostgreSQL, with psycopg's marks of parameters."""
    def part(found):
        text = found[0]
        return f'%({text[1:]})s' if text[0] == ':' else WORDS.get(text, text.replace('%', '%%'))
    return TRIGGER.sub(r'CREATE FUNCTION \2() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \3 '
                       r'RETURN NULL; END $$; \1 EXECUTE FUNCTION \2()',
                       SQL_PARTS.sub(part, STATEMENTS.get(statement, statement)))


class PostgreSQL:
    """The server of DATABASE_URL: while it is open, databases, cache and processes use it."""

    def open(self):
        """Raises SettingError, StorageError."""
        try:
            import psycopg          # only here: nobody else needs it
        except ImportError:
            raise SettingError(f'DATABASE_URL needs the package psycopg[binary]. Try: '
                               f'{sys.executable} -m pip install "psycopg[binary]"') from None
        self._class = type('Connection', (_Connection, psycopg.Connection), {'driver': psycopg})
        self._pool = gevent.queue.LifoQueue(items=[NO_CONNECTION] * settings.database_pool)
        self._away_since, self._next_try_at = math.inf, 0       # monotonic; inf: it is not away
        self._closing = False
        self.name, self.channel = f'{os.getpid()}-{secrets.token_hex(8)}', f'{APP}_{settings.env}'
        self._rung, self._ringing = set(), gevent.event.Event()
        self._listener, self.bell_seconds = NO_CONNECTION, None     # that our last bell took
        self._bound, self._schema = [], _Schema(self, app_db)
        self._set_clock()
        for database in databases.values():
            self.bind(database)
        self._bind(cache, rest_of_measuring=20)
        self._bind(processes, name=self.name, open=lambda: None, close=lambda: None,
                   ring=self._ring, tell=functools.partial(self._ring, b''), others=self._others,
                   # A connection is lost with every restart there: leases tell who is dead.
                   is_alive=lambda name: name == self.name or None,
                   dead=set, bury=lambda names: None,
                   patience=lambda: POLLS_SECONDS[self.bell_seconds is None])
        self._loops = [Loop('bells out', self._send_bells), Loop('bells in', self._hear_bells)]

    def close(self):
        global clock_ahead_seconds
        for loop in self._loops:
            loop.stop()
        with contextlib.suppress(AppError):
            if self._rung:
                self._send_bells()
        self._closing = True
        for connection in (self._listener, *self._pool.queue):
            connection.close()
        for bound, state in self._bound:
            vars(bound).clear()
            vars(bound).update(state)
        processes.__init__()
        clock_ahead_seconds = 0.0

    def bind(self, database):
        """Have a Database use a schema of the server."""
        schema = _Schema(self, database)
        self._bind(database, **{verb: getattr(schema, verb) for verb in schema.VERBS},
                   _connection=schema, _path=f'schema {schema.name}', joined=database.part_of,
                   _hub=gevent.get_hub(), _commit=self.transact, close=lambda: None,
                   truncate_log=lambda: None)

    def _bind(self, bound, **own):
        self._bound.append((bound, dict(vars(bound))))
        vars(bound).update(own)

    def transact(self, write, begin=BEGIN):
        """Call the function of a _Write in a transaction; again, for BUSY_SECONDS, after what may
        pass. begin: '' if it is one statement. Raises StorageError."""
        with gevent.Timeout(BUSY_SECONDS, BusyError('no connection to the database was free')):
            connection = self._pool.get()
        began = time.monotonic()
        try:
            while not write.done:
                try:
                    if connection.closed or time.monotonic() > connection.ends_at:
                        connection.close()
                        connection = self._connect(settings.database_url)
                    connection.transact(write, begin)
                except BusyError:
                    if time.monotonic() > min(began, self._away_since) + BUSY_SECONDS:
                        raise
                    gevent.sleep(random.uniform(0.01, 0.1))
        finally:
            self._pool.put(connection)
            if connection.closed or self._closing:      # the others may be as dead
                for each in self._pool.queue:
                    each.close()

    def _connect(self, url):
        """A new connection, made in a thread, since names and TLS block. When the server has been
        away for long, one tries now and then, and the others fail at once. Raises BusyError."""
        at = time.monotonic()
        if self._closing or at < self._next_try_at:
            raise BusyError('the database is not reachable')
        if at > self._away_since + BUSY_SECONDS:
            self._next_try_at = at + 1
        try:
            return in_thread(self._make, url)
        except self._class.driver.Error as error:
            self._away_since = min(self._away_since, at)
            raise BusyError(f'the database is not reachable: {error}') from None

    def _make(self, url):
        connection = self._class.connect(url, autocommit=True, client_encoding='utf8',
                                         connect_timeout=BUSY_SECONDS,
                                         application_name=f'{self.channel} {self.name}')
        self._away_since, self._next_try_at = math.inf, 0
        connection.ends_at = time.monotonic() + CONNECTION_SECONDS * random.uniform(0.8, 1)
        if self._closing:           # nobody waits for it any more
            connection.close()
        return connection

    def _ring(self, byte=b'*', slots=()):
        """Wake the other processes; what is rung while a bell is sent shares the next."""
        self._rung.update([byte.decode(), *map(str, slots)])
        self._ringing.set()

    def _send_bells(self):
        self._ringing.wait()
        self._ringing.clear()
        rung, self._rung = self._rung, set()
        text = ' '.join([self.name, *(rung if len(rung) < 1000 else '*')])     # of 8,000 bytes
        self._schema.execute('SELECT pg_notify(?, ?)', (self.channel, text))

    def _hear_bells(self):
        """See how the server's clock goes, and whether our own bell comes; listen for a while."""
        self.bell_seconds = None
        self._set_clock()
        if self._listener.closed:
            self._listener = self._connect(settings.direct_database_url or settings.database_url)
            self._listener.pgconn.notify_handler = self._heard
            self._listener.send(f'LISTEN {self.channel}')
            processes.hear(b'*')            # what was rung meanwhile
        self._pinged_at, pgconn = time.monotonic(), self._listener.pgconn
        self._listener.send(f"NOTIFY {self.channel}, '{self.name}'")
        with gevent.Timeout(PING_SECONDS, False):
            while True:
                gevent.socket.wait_read(pgconn.socket)
                pgconn.consume_input()
                while notification := pgconn.notifies():
                    self._heard(notification)

    def _heard(self, notification):
        sender, *rung = notification.extra.decode().split()
        if sender != self.name:
            cache.outdate(range(VersionStamps.SLOTS) if '*' in rung else
                          map(int, filter(str.isdecimal, rung)))
            processes.hear(' '.join(rung).encode())
        elif not rung:
            self.bell_seconds = time.monotonic() - self._pinged_at

    def _set_clock(self):
        global clock_ahead_seconds
        (at,), = self._schema.execute('SELECT now_s()')
        clock_ahead_seconds = at - time.time()      # a bit too few: what is to run now is due there

    def _others(self):
        """The names of the other processes of the app that have a connection."""
        rows = self._schema.execute(
            'SELECT application_name FROM pg_stat_activity WHERE datname = current_database() '
            'AND starts_with(application_name, ?)', (f'{self.channel} ',))
        return {name.split()[1] for name, in rows} - {self.name}


class _Connection:
    """A connection of psycopg, with whose class it is mixed, that waits as gevent does."""
    begin = BEGIN               # '': one statement, without a transaction around it
    later = ()                  # statements that travel with the next
    failed = None               # what the transaction can't go on after, whoever caught it
    seconds = ANSWER_SECONDS    # that an answer may take

    @functools.cached_property
    def client(self):
        # It puts parameters into the text: several statements travel as one message, nothing is
        # prepared, and a NULL needs no type. A sum is a float, as from SQLite.
        cursor = self.driver.ClientCursor(self)
        cursor.adapters.register_loader('numeric', self.driver.types.numeric.FloatLoader)
        return cursor

    def transact(self, write, begin):
        """Call the function of a _Write in a transaction. BusyError: another run may succeed."""
        self.begin, self.later = begin, [begin] if begin else []
        self.parts, self.failed, self.seconds = 0, None, ANSWER_SECONDS
        write.connection, write.after = self, []
        Database.current, gevent.getcurrent().switch_out = write, _refuse_to_switch
        try:
            write.value = write.call()
            if self.failed:
                raise self.failed
            if begin and self.later != [begin]:
                self.send('COMMIT')
                if self.client.statusmessage != 'COMMIT':       # but ROLLBACK, without an error
                    raise StorageError('a statement failed, so the transaction was rolled back')
            write.finish()
        except BaseException as error:
            failure, self.later = self.failed or error, []
            with contextlib.suppress(AppError):
                if self.pgconn.transaction_status:      # 0: nothing runs
                    self.send('ROLLBACK')
            raise failure
        finally:
            Database.current = None
            if self.pgconn.transaction_status:
                self.close()

    def send(self, *statements):
        """The rows of the last of these statements, each text, or text and parameters."""
        statements, self.later = [*self.later, *statements], []
        try:
            self.client.execute(';'.join(each if isinstance(each, str) else
                                         self.client.mogrify(*each) for each in statements))
            while self.client.nextset():
                pass
            return self.client.fetchall() if self.client.pgresult.nfields else []
        except BaseException as error:
            failure = self._explained(error, statements[-1])
            if self.closed or isinstance(failure, BusyError):
                self.failed = self.failed or failure
            raise failure from None

    def _explained(self, error, statement):
        """What an error means here. BusyError: nothing was done, and another run may succeed."""
        if not isinstance(error, (self.driver.Error, StorageError)):
            return error
        state, text = getattr(error, 'sqlstate', '') or '', ' '.join(str(error).split())
        if state.startswith(('57P', '08')):         # the server, or the line, has hung up
            self.close()
        if self.closed and (statement == 'COMMIT' or not (self.begin or READS.match(statement[0]))):
            return StorageError(f'the change may have been made, or not: {text}')
        if isinstance(error, StorageError):
            return error
        if self.closed or state in ('40001', '40P01'):      # serialization failure, deadlock
            return BusyError(f'the database did not do it: {text}')
        if isinstance(error, (self.driver.OperationalError, self.driver.InternalError)):
            return StorageError(f'the database can not be used: {text}')
        # The same kind in sqlite3: both have the classes of PEP 249.
        kind = next(kind for kind in type(error).__mro__ if hasattr(sqlite3, kind.__name__))
        return getattr(sqlite3, kind.__name__)(text)

    def wait(self, steps, interval=None, timeout=None):
        """Do the steps of psycopg's generator, each when the socket is ready."""
        ours, Database.current = Database.current, None     # others run meanwhile
        try:
            with gevent.Timeout(self.seconds, StorageError('the database does not answer')):
                wanted = next(steps)
                while True:
                    wait = gevent.socket.wait_read if wanted == 1 else gevent.socket.wait_readwrite
                    wait(self.pgconn.socket)
                    wanted = steps.send(wanted)
        except StopIteration as end:
            return end.value
        except BaseException as error:
            if not isinstance(error, self.driver.Error):
                self.close()            # in the midst of a message: nobody can use it again
            raise
        finally:
            Database.current = ours


class _Schema:
    """A schema of the server, in the place of sqlite3's connection and some verbs of a Database."""
    VERBS = ('open', 'lock', 'facts', '_migrate')
    in_transaction, total_changes = True, 0         # as sqlite3 has them

    def __init__(self, server, database):
        self._server, self._database = server, database
        self.name = server.channel + ('' if database.name == 'app' else f'_{database.name}')
        self._use = f'SET LOCAL search_path = {self.name}'

    def execute(self, statement, parameters=()):
        reads = READS.match(statement)
        if Database.current is None:        # one message, and so a transaction without a BEGIN
            write = _Write(self._database, functools.partial(self.execute, statement, parameters))
            self._server.transact(write, begin='')
            return write.value
        connection = Database.current.connection
        if statement in PREPARATIONS:
            connection.parts += {'SAVEPOINT part': 1, 'RELEASE part': -1}.get(statement, 0)
            connection.later.append((translated(statement), parameters))
            return []
        rows = connection.send(self._use, (translated(statement), parameters))
        self.total_changes += 0 if reads else max(0, connection.client.rowcount)
        return rows

    def executemany(self, statement, rows):
        connection, rows = Database.current.connection, list(rows)
        connection.later += [self._use, *((translated(statement), row) for row in rows)]
        self.total_changes += len(rows)
        if connection.parts or len(connection.later) > COPIED_ROWS:
            connection.send()

    def open(self):
        if self._database._pending():
            self._database.transact(self._migrate)

    def lock(self, *names):
        Database.lock(self._database)
        for name in sorted(set(names)):
            self.execute(LOCK, (f'{self.name} {name}',))

    def facts(self):
        (size, connections, seconds), = self.execute('''
            SELECT (SELECT coalesce(sum(pg_total_relation_size(oid)), 0) FROM pg_class
                    WHERE relkind = 'r' AND relnamespace = to_regnamespace(current_schema)),
                   count(*), coalesce(now_s() - date_part('epoch', min(xact_start)), 0)
            FROM pg_stat_activity
            WHERE backend_type = 'client backend' AND datname = current_database()''')
        return {'bytes': int(size), 'migrations': len(self._database.migrations), 'server': {
            'connections': connections, 'oldest_transaction_seconds': seconds,
            'bell_seconds': self._server.bell_seconds}}

    def _migrate(self):
        Database.current.connection.seconds = None
        self.execute('SET LOCAL statement_timeout = 0')
        self.lock('migrations')
        # IF NOT EXISTS would look at what was known before the wait for the lock.
        if not self.execute('SELECT 1 FROM pg_namespace WHERE nspname = ?', (self.name,)):
            self.execute(f'CREATE SCHEMA {self.name}')
        Database._migrate(self._database)


# === Sessions: who is asking, without a row for it =======================================
# A session is a random user id in a signed cookie. Stream names are signed as turbo-rails signs
# them; a private one starts with its user's id, since a signature never expires: whoever has a name
# copied from a page is asked who they are as well.

SESSION_SECONDS = 400 * 86400       # the longest that browsers keep a cookie
RENEW_SESSION_SECONDS = 7 * 86400   # an older cookie gets a new date
KEPT_SECRET = "SELECT value FROM secrets WHERE name = 'secret'"

app_db.migrations += [
    ('006 create secrets', 'CREATE TABLE secrets (name TEXT PRIMARY KEY, value TEXT NOT NULL)'),
]


class Keys:
    """The HMAC keys of sessions and streams, and the name of the cookie; nothing is signed before
    open()."""

    def open(self):
        """Derive them from the secret of the settings, or else from the one that is kept."""
        secret = settings.secret or _kept_secret()
        self.session, self.stream = (_hmac(secret.encode(), f'{APP} {purpose}')
                                     for purpose in ('session', 'stream'))
        # Cookies know no ports: a few digits of the key keep two apps on one host apart.
        self.cookie = f'{APP}_session_{hashlib.sha256(self.session).hexdigest()[:6]}'

    def close(self):
        vars(self).clear()


keys = Keys()


def _kept_secret():
    """The secret in the app database, made once."""
    app_db.execute("INSERT INTO secrets (name, value) VALUES ('secret', ?) ON CONFLICT DO NOTHING",
                   (new_secret(),))
    return app_db.execute(KEPT_SECRET)[0][0]


def new_secret():
    return secrets.token_urlsafe(48)


def new_user():
    return secrets.token_urlsafe(16)


def sign_session(user):
    """The cookie's value: user id, Unix time in hex, HMAC-SHA256 of both."""
    text = f'{user}.{int(now()):x}'
    return f'{text}.{_session_signature(text)}'


def verify_session(cookie):
    """The user id and the age in seconds, or None for a cookie that is not ours, was changed or is
    too old."""
    match = re.fullmatch(r'(([\w-]{22})\.([0-9a-f]{1,12}))\.([\w-]{43})', cookie, re.ASCII)
    if not match or not hmac.compare_digest(_session_signature(match[1]), match[4]):
        return None
    age = now() - int(match[3], 16)
    return (match[2], age) if age < SESSION_SECONDS else None


def find_session(cookies, secure):
    """verify_session() of the first good cookie of a Cookie header, and whether it has the name
    that it should have. secure: the request came by https, where a __Host- cookie comes first: no
    other host can have set it. The name without digits is that of version 1."""
    given = [cookie.strip().partition('=')[::2] for cookie in cookies.split(';')]
    for name in [f'__Host-{keys.cookie}'] * secure + [keys.cookie, f'{APP}_session']:
        for given_name, value in given:
            session = verify_session(value) if given_name == name else None
            if session:
                return session, name == cookie_name(secure)
    return None, False


def cookie_name(secure):
    return f'__Host-{keys.cookie}' if secure else keys.cookie


def private_stream(user, *parts):
    """The name of a stream that only its user can subscribe to. Raises CableError."""
    texts = [str(part) for part in (user, *parts)]
    if any(':' in text for text in texts):      # two streams must not have one name
        raise CableError(f'the parts of a stream are without colons, not {_shown(parts)}')
    return ':'.join(texts)


def shared_stream(*parts):
    """The name of a stream that is open to whoever holds its signed name, as in Turbo."""
    return private_stream('shared', *parts)


def sign_stream_name(name):
    """Source: turbo-rails e511fb2, Turbo.signed_stream_verifier; rails MessageVerifier(digest:
    SHA256, serializer: JSON)."""
    encoded = base64.b64encode(json.dumps(name).encode()).decode()
    return f'{encoded}--{_hmac(keys.stream, encoded).hex()}'


def verify_stream_name(signed, user):
    """The name, if it was signed here and is shared or of this user; else None."""
    if not isinstance(signed, str) or not signed.isascii():
        return None
    encoded, _, signature = signed.rpartition('--')
    if not hmac.compare_digest(_hmac(keys.stream, encoded).hex(), signature):
        return None
    name = json.loads(base64.b64decode(encoded))
    return name if name.split(':')[0] in ('shared', user) else None


def _session_signature(text):
    return base64.urlsafe_b64encode(_hmac(keys.session, text)).decode().rstrip('=')


@functools.lru_cache(1024)          # who is here asks again
def _hmac(key, text):
    return hmac.digest(key, text.encode(), 'sha256')


# === Web: bottle made strict =============================================================
# Handlers are bottle's, and may return what bottle takes. What another site asks for, too much or
# too often is refused before they are called. Any error becomes an answer of the kind that is
# wanted: a page for browsers, Turbo Streams for the script, JSON for programs.

app = bottle.Bottle()
app.uninstall(bottle.JSONPlugin)
app.install(bottle.JSONPlugin(to_json))     # of returned dicts; bottle's own would send NaN

TURBO_STREAM = 'text/vnd.turbo-stream.html'
NO_ROUTE = bottle.Route(app, 'none', '-', None)     # of a request that nobody answers
COMPRESS_BYTES = 1000               # a smaller answer fits a packet as it is
COMPRESSIBLE = re.compile(r'text/|application/(json|javascript|manifest\+json)|image/svg')
MAX_FIELDS = 20_000                 # of a form
MAX_COUNTED = 10_000                # sessions and addresses whose writes are counted apart
SECURITY_HEADERS = [                # an answer may have its own
    ('Content-Security-Policy', "default-src 'none'; script-src 'self'; style-src 'self'; "
                                "img-src 'self' data:; connect-src 'self'; manifest-src 'self'; "
                                "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"),
    ('X-Content-Type-Options', 'nosniff'),
    ('X-Frame-Options', 'DENY'),
    ('Referrer-Policy', 'same-origin'),
    ('Cross-Origin-Opener-Policy', 'same-origin'),
    ('Cross-Origin-Resource-Policy', 'same-origin'),
]


# bottle keeps the current request by thread, and here a request belongs to a greenlet.
for _owner in (bottle.LocalRequest, bottle.LocalResponse):
    for _property in vars(_owner).values():
        if isinstance(_property, property):
            _property.fget.__closure__[0].cell_contents = gevent.local.local()


class NotFound(AppError):
    """What was asked for is not there, or not this user's."""
    status = 404


class InvalidField(AppError):
    status = 422


# For handlers

def current_user():
    """The user id of the request's session. A visitor without one gets one, in a cookie."""
    environ = bottle.request.environ
    if session_of(environ) is None:
        environ['stack.session'] = new_user(), RENEW_SESSION_SECONDS
        environ['stack.is_new'] = True
    return environ['stack.session'][0]


def is_new_session():
    """Whether the request came without a session, so that nobody knows if its cookie comes back."""
    return 'stack.is_new' in bottle.request.environ


def become(user):
    """Make this browser's session that of another user; the cookie goes out with the answer. Ask
    before: what another site's link leads to must not do that by itself."""
    bottle.request.environ['stack.session'] = user, RENEW_SESSION_SECONDS


def wanted():
    """What the client wants: 'turbo', 'json' or 'html'. Source: RFC 9110, section 12.5.1."""
    accept = bottle.request.environ.get('HTTP_ACCEPT', '')
    kinds = {'turbo': weight_of(accept, TURBO_STREAM), 'json': weight_of(accept, 'application/json'),
             'html': weight_of(accept, 'text/html', 'text/*', '*/*')}
    best = max(kinds, key=kinds.get)        # the first of equals
    return best if kinds[best] else 'html'


def fields():
    """The fields of the request's body as a dict. Of a form: the last value of each, and lists for
    names that end in []; of JSON: the object. Raises bottle.HTTPError 400 or 415. (bottle's own
    request.forms, .json and .files work too; uploads are there alone.)"""
    environ = bottle.request.environ
    if 'stack.fields' in environ:
        return environ['stack.fields']
    body, parse = environ.get('stack.body'), PARSERS.get(_type_of(environ))
    if body and not parse:
        bottle.abort(415, f'Send a form or JSON ({", ".join(PARSERS)}).')
    try:
        environ['stack.fields'] = parse(body) if body else {}
    except (ValueError, RecursionError) as error:       # UnicodeError is a ValueError
        bottle.abort(400, 'the body is not what its Content-Type says '
                          f'({type(error).__name__}).')
    return environ['stack.fields']


def respond(streams='', data=None, back=None, status=200):
    """The answer to a change, as the client wants it: JSON for programs, Turbo Streams for the
    script, a redirect for the rest.

    data: what JSON has, sent with the status. streams: HTML, or a function that gives it; without
    any the script goes back too, if it is said where. back: a path; unset, '/'.
    """
    kind = wanted()
    if kind == 'json':
        return as_json({} if data is None else data, status)
    if kind == 'turbo' and (streams or back is None):
        bottle.response.content_type = f'{TURBO_STREAM}; charset=UTF-8'
        return streams() if callable(streams) else streams
    bottle.response.status = 303
    bottle.response.set_header('Location', back or '/')
    return ''


def as_json(data, status=200):
    """An answer of JSON; unlike a returned dict it can be a list. Raises ValueError or TypeError
    for what JSON does not have, like NaN."""
    text = to_json(data)
    bottle.response.status = status
    bottle.response.content_type = 'application/json'
    return text


def turbo_stream(action, target, html='', morph=False):
    """A <turbo-stream> element. target: the id of an element. html: the content, as HTML. morph:
    keep what is alike, with its focus. Source: turbo.hotwired.dev/reference/streams"""
    method = ' method="morph"' if morph else ''
    template = '' if action in ('remove', 'refresh') else f'<template>{html}</template>'
    return (f'<turbo-stream action="{action}"{method} target="{bottle.html_escape(target)}">'
            f'{template}</turbo-stream>\n')


REFRESH = '<turbo-stream action="refresh"></turbo-stream>\n'      # "load the page again"
RELOAD = '<turbo-stream action="refresh" data-reload></turbo-stream>\n'   # with styles and scripts


def came_from():
    """The path of the page of this host from which the request came; '/' if it is not told."""
    environ = bottle.request.environ
    referer = re.match('https?://([^/?#]*)(/[^?#]*)', environ.get('HTTP_REFERER', ''))
    return referer[2] if referer and referer[1].lower() == host_of(environ) else '/'


def stream_source(stream):
    """The element that subscribes a page to a stream, from where the log stood when the request
    came. Source: turbo-rails, app/helpers/turbo/streams_helper.rb"""
    position = bottle.request.environ['stack.position']
    return (f'<turbo-cable-stream-source channel="Turbo::StreamsChannel" '
            f'signed-stream-name="{sign_stream_name(stream)}" data-since="{position}" '
            f'data-idle-seconds="{settings.idle_seconds}" hidden></turbo-cable-stream-source>')


# Templates

TEMPLATES = {       # name: source, in bottle's syntax. {{value}} is escaped, {{!value}} is HTML
    'plain': '''\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1, viewport-fit=cover">
<title>{{title}}</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="{{asset('plain.css')}}">
% if get('style'):
<link rel="stylesheet" href="{{asset(style)}}">
<script type="module" src="{{asset('live.js')}}"></script>
% end
</head>
<body>
{{!base}}</body>
</html>
''',
    'error': '''\
% rebase('plain', title=status)
<main>
<h1>{{status}}</h1>
<p>{{message}}</p>
% if details:
<pre>{{details}}</pre>
% end
<p><a href="{{back}}">Back</a></p>
</main>
''',
}


class Template(bottle.SimpleTemplate):
    """A template that finds others by name: include('name', ...), rebase('name', ...)."""
    compiled = {}

    def __init__(self, name, **options):
        super().__init__(source=TEMPLATES[name], name=name, **options)
        self.filename = f'{APP} template {name!r}'      # for tracebacks
        self.cache = self.compiled                      # where include() and rebase() look


def render(name, /, **values):
    """A template of TEMPLATES with the values, as HTML."""
    if name not in Template.compiled:
        Template.compiled[name] = Template(name)
    return Template.compiled[name].render(values)


# Assets

TEXTS = r''''(?:\\.|[^'\\\n])*'|"(?:\\.|[^"\\\n])*"|`(?:\\.|[^`\\])*`'''
SCRIPT_MARKS, STYLE_MARKS = r'[][{}()=,;:?&|<>*]', r'[{};,>]|:(?= )'
_assets = {}        # name -> (content type, text or bytes, or a function that gives it)


def add_asset(name, source, content_type):
    """Serve text or bytes (or what a function gives, called once) under a URL of its own."""
    _assets[name] = content_type, source


add_asset('plain.css', '''\
/* For pages with little style of their own: values, then rules. */
:root {
  color-scheme: light dark;
  --paper: light-dark(#f9f6f1, #181612);
  --ink: light-dark(#2b2a27, #e2dfd9);
  --soft: light-dark(#63605a, #aaa69f);
  --line: light-dark(#e3ded7, #35322d);
  --accent: light-dark(#2c55b8, #9db8ff);
  --danger: light-dark(#b3261e, #ff9d94);
}
* { box-sizing: border-box; min-width: 0; margin: 0; }
body {
  max-width: 40rem; margin: auto; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 1.0625rem/1.45 system-ui, sans-serif; overflow-wrap: anywhere;
}
h1 { font-weight: 300; letter-spacing: -.02em; }
a { color: var(--accent); }
button, input, select {
  min-height: 2.75rem; padding: 0 .875rem; border: 1px solid var(--soft); border-radius: 10px;
  background: none; color: inherit; font: inherit;
}
button { color: var(--accent); cursor: pointer; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
[hidden], p:empty, [data-state=live] { display: none; }
pre { white-space: pre-wrap; }
''', 'text/css; charset=UTF-8')


def compact(source, marks):
    """A style or script without what need not travel: indentation, blank lines, comments that end a
    line, spaces around marks, and line ends where no statement ends. For what has no such thing in
    a regular expression, and no text in a text."""
    source = re.sub(fr'({TEXTS})|^\s*(//.*|/\*.*\*/)?\n|^[ \t]+|[ \t]+// .*$', r'\1', source,
                    flags=re.MULTILINE)
    return re.sub(fr'({TEXTS})|[ \t]*({marks})[ \t]*(?:(?<![])}} \t])\n[ \t]*)*', r'\1\2', source)


def asset_path(name):
    """The URL of an asset, with a digest of what it holds, so that it can be kept for ever."""
    return f'/assets/{_digest(name)}/{urllib.parse.quote(name)}'


Template.defaults = {'asset': asset_path}


@functools.cache
def _digest(name):
    return hashlib.sha256(_asset_bytes(name)).hexdigest()[:12]


@functools.cache
def _asset_bytes(name, compressed=False):
    source = _assets[name][1]
    source = source() if callable(source) else source
    body = source.encode() if isinstance(source, str) else source
    return gzipped(body, 9) if compressed else body


@app.get('/assets/<digest>/<name:path>')
def asset(digest, name):
    """An asset. A page from before a deploy gets today's, for once."""
    if name not in _assets:
        raise NotFound('There is no such file.')
    response = bottle.response
    response.content_type = _assets[name][0]
    response.set_header('Cache-Control', 'public, max-age=31536000, immutable'
                        if digest == _digest(name) else 'no-cache')
    if COMPRESSIBLE.match(response.content_type) and accepts_gzip(bottle.request.environ):
        response.set_header('Content-Encoding', 'gzip')
        return _asset_bytes(name, compressed=True)
    return _asset_bytes(name)


@app.get('/up', unmeasured=True)        # what machines ask: an idle app stays idle
def up():
    """Health: 200 if the databases answer and every loop lives, else 503 and what is wrong."""
    wrong = [f'loop {name}' for name, loop in loops.items() if not loop.alive]
    for database in databases.values():
        try:
            database.execute('SELECT count(*) FROM schema_migrations')
        except StorageError:
            wrong.append(f'{database.name} database')
    bottle.response.status = 503 if wrong else 200
    bottle.response.content_type = 'text/plain; charset=UTF-8'
    return f'failing: {", ".join(wrong)}\n' if wrong else 'ok\n'


# Before a handler, and after it

@app.hook('before_request')
def before_request():
    """Refuse what may not be asked; read the body; find the method that a form means."""
    environ = bottle.request.environ
    environ['stack.position'] = cable.position()
    if is_wrong_host(environ):
        bottle.abort(421, 'This server does not answer to that name.')
    if environ['PATH_INFO'].endswith('\n'):     # a route would take it for the path without
        bottle.abort(404)
    if environ['REQUEST_METHOD'] in ('GET', 'HEAD', 'OPTIONS'):
        return
    if not same_origin(environ):
        bottle.abort(403, 'This change was asked for by a page of another site, so it was not '
                          'made.')
    writes.count(environ)
    refuse_other_owner(environ)
    environ['stack.body'] = body = _read_body(environ)
    environ['wsgi.input'], environ['CONTENT_LENGTH'] = io.BytesIO(body), str(len(body))
    environ.pop('HTTP_TRANSFER_ENCODING', None)         # it is whole now
    if environ['REQUEST_METHOD'] == 'POST' and PARSERS.get(_type_of(environ)) is _parse_form:
        method = fields().get('_method')
        if method in ('PUT', 'PATCH', 'DELETE'):
            environ['REQUEST_METHOD'] = method


@app.install
def answer_errors(function):
    """A plugin: an AppError is an answer. Text of any kind can be sent."""
    @functools.wraps(function)
    def answered(*arguments, **options):
        try:
            body = function(*arguments, **options)
        except AppError as error:
            if error.status >= 500:
                log.error('request failed route=%s error=%s', bottle.request.route.rule, error)
                bottle.request.environ['bottle.exc_info'] = sys.exc_info()     # see _measure()
            later = {'Retry_After': '1'} if error.status == 503 else {}
            return bottle.HTTPError(error.status, str(error), error, **later)
        if isinstance(body, str):
            body = body.encode(bottle.response.charset, errors='replace')
        return body
    return answered


BOTTLES_TEXTS = ('Not found: ', 'Method not allowed', 'Unknown Error')
OUR_TEXTS = {404: 'There is nothing here.', 405: 'This path knows no such method.'}


def error_answer(error):
    """The answer to an HTTPError: an AppError, abort(), bottle's own, or what nobody expected."""
    expected = error.exception if isinstance(error.exception, AppError) else AppError
    message, details = str(error.body or ''), ''
    if error.exception and expected is AppError:
        message = 'Something went wrong here. It is in the log.'
        details = error.traceback if settings.env == 'development' else ''
    elif not message or message.startswith(BOTTLES_TEXTS):
        message = OUR_TEXTS.get(error.status_code, error.status_line)
    kind = wanted()
    if kind == 'json':
        return as_json({'error': message}, error.status)
    if kind == 'turbo':
        bottle.response.content_type = f'{TURBO_STREAM}; charset=UTF-8'
        shown = turbo_stream('update', expected.target, bottle.html_escape(message))
        return (shown + expected.streams).encode(errors='replace')
    bottle.response.content_type = 'text/html; charset=UTF-8'
    page = render('error', status=error.status_code, message=message, details=details,
                  back=came_from())
    return page.encode(errors='replace')


app.default_error_handler = error_answer


def _private_of(environ):
    """What the client sent, as texts that nobody else should see."""
    query = environ.get('QUERY_STRING', '')
    given = [environ.get('HTTP_COOKIE', ''), environ.get('HTTP_AUTHORIZATION', ''), query,
             (environ.get('stack.body') or b'').decode('utf-8', 'replace')]
    given += [value for _, value in urllib.parse.parse_qsl(query)]
    given += [part for part in environ['PATH_INFO'].split('/') if len(part) > 8]
    for value in environ.get('stack.fields', {}).values():
        given += value if isinstance(value, list) else [value]
    return given + [*(session_of(environ) or ())[:1]]


def application(environ, start_response):
    """The WSGI application: bottle's, and around it what every answer has: security headers, no
    copies unless it says so, a session with a page, compression, the id of the request."""
    began, started = time.perf_counter(), []
    id = _request_id(environ)
    request_id.set(id)
    environ['wsgi.errors'] = io.StringIO()      # what bottle writes there may hold private texts
    body = app.wsgi(environ, lambda *answer: started.append(answer))
    status, headers, exc_info = started[-1]
    given = dict(headers)           # bottle has made their names of one case
    headers = headers + [each for each in SECURITY_HEADERS if each[0] not in given]
    kind, kept = given.get('Content-Type', ''), given.get('Cache-Control', '')
    headers.append(('X-Request-Id', id))
    if not kept:
        dated = 'Etag' in given or 'Last-Modified' in given
        headers.append(('Cache-Control', 'private' if dated else 'no-store'))
    if not re.search('public|s-maxage', kept) \
            and (kind.startswith('text/html') or session_of(environ)):
        headers += _session_cookie(environ)         # none where a cache may give it to others
    if COMPRESSIBLE.match(kind):
        headers.append(('Vary', 'Accept-Encoding'))
        # An ETag is that of the bytes as they are.
        if isinstance(body, list) and sum(map(len, body)) > COMPRESS_BYTES \
                and not given.keys() & {'Content-Encoding', 'Etag'} and accepts_gzip(environ):
            body = [gzipped(b''.join(body), 3)]
            headers = [(name, value) for name, value in headers if name != 'Content-Length']
            headers += [('Content-Encoding', 'gzip'), ('Content-Length', str(len(body[0])))]
    start_response(status, headers, exc_info)
    _measure(environ, status, time.perf_counter() - began, exc_info)
    return body


_PROCESS_ID, _request_numbers = secrets.token_hex(4), itertools.count(1)


def _request_id(environ):
    """A new one; or that of a trusted proxy, if it is one."""
    if settings.trust_proxy:
        given = environ.get('HTTP_X_REQUEST_ID', '')
        if re.fullmatch(r'[\w.-]{1,64}', given, re.ASCII):
            return given
    return f'{_PROCESS_ID}-{next(_request_numbers):x}'


def _measure(environ, status, seconds, exc_info):
    route = environ.get('bottle.route', NO_ROUTE)
    method, rule = route.method, route.rule
    if 'unmeasured' not in route.config:
        metrics.time(seconds, 'http_request_duration_seconds', method, rule, f'{status[0]}xx')
        if seconds > SLOW_SECONDS:
            metrics.slow(f'{method} {rule}', seconds)
    if exc_info:            # of what nobody expected, as bottle gives it to a server
        metrics.failed('request', f'{method} {rule}', exc_info[1], _private_of(environ))
    if errors := environ['wsgi.errors'].getvalue():
        log.error('%s', cleaned(errors, _private_of(environ)))
    if settings.slow_request_ms and seconds * 1000 >= settings.slow_request_ms:
        log.warning('slow request route=%s %s status=%s seconds=%.3f', method, rule, status[:3],
                    seconds)
    if settings.access_log:
        # Of a route its rule: a path may hold what is nobody's business.
        log.info('%s %s %s %s %.1f ms', client_address(environ), environ['REQUEST_METHOD'],
                 environ['PATH_INFO'] if route is NO_ROUTE else rule, status[:3], seconds * 1000)


def session_of(environ):
    """The user id of the request's session and its age, as verify_session() gives them, or None."""
    if 'stack.session' not in environ:
        session, named = find_session(environ.get('HTTP_COOKIE', ''), is_https(environ))
        if session and not named:
            session = session[0], RENEW_SESSION_SECONDS     # it gets its name with a new date
        environ['stack.session'] = session
    return environ['stack.session']


def _session_cookie(environ):
    user, age = session_of(environ) or (new_user(), RENEW_SESSION_SECONDS)
    if age < RENEW_SESSION_SECONDS:
        return []
    secure = is_https(environ)
    return [('Set-Cookie', f'{cookie_name(secure)}={sign_session(user)}; Path=/; '
                           f'Max-Age={SESSION_SECONDS}; HttpOnly; SameSite=Lax'
                           f'{"; Secure" if secure else ""}')]


def is_https(environ):
    return _forwarded(environ, 'PROTO', environ['wsgi.url_scheme']) == 'https'


def host_of(environ):
    """The host and port that the client asked for, in lower case."""
    return _forwarded(environ, 'HOST', environ.get('HTTP_HOST', '')).lower()


def _forwarded(environ, name, otherwise):
    """What the proxy says if it is trusted; the first of several values: proxies append theirs."""
    if settings.trust_proxy:
        otherwise = environ.get(f'HTTP_X_FORWARDED_{name}', otherwise)
    return otherwise.split(',')[0].strip()


def client_address(environ):
    """The client's address; behind a proxy from the header that the settings name."""
    name = settings.client_ip_header.upper().replace('-', '_')
    forwarded = environ.get(f'HTTP_{name}', '').split(',')[-1].strip()
    return forwarded or environ.get('REMOTE_ADDR', '')


def is_wrong_host(environ):
    """Whether the Host is none of <APP>_HOSTS. Health checks ask by address."""
    if not settings.hosts or environ['PATH_INFO'] == '/up':
        return False
    return re.sub(r':\d*$', '', host_of(environ)) not in settings.hosts


def same_origin(environ):
    """Whether a request comes from a page of this host, or from no page."""
    site = environ.get('HTTP_SEC_FETCH_SITE')
    return origin_is_host(environ) if site is None else site in ('same-origin', 'none')


def refuse_other_owner(environ):
    """Raises 409 if the page was another user's (its script says whose, in X-Owner): what was done
    there must not happen here."""
    user = (session_of(environ) or [''])[0]
    if environ.get('HTTP_X_OWNER', user) != user:
        bottle.abort(409, 'This browser has another session now than the page had, so that change '
                          'was not made. Load the page again.')


def origin_is_host(environ):
    """Whether the Origin header names this host. A request without one comes from no browser."""
    origin = environ.get('HTTP_ORIGIN')
    if origin is None:
        return True
    match = re.fullmatch('(https?)://([^/]+)', origin.lower())
    if not match:
        return False
    default_port = {'http': ':80', 'https': ':443'}[match[1]]
    return match[2].removesuffix(default_port) == host_of(environ).removesuffix(default_port)


class WriteLimit:
    """Counts the writes of a minute, of each session and of each address, in this process."""

    def __init__(self):
        self._counts, self._minute = collections.Counter(), 0

    def count(self, environ):
        """Count a write; too many are answered with 429."""
        session, most = session_of(environ), settings.writes_per_minute
        if session:             # first: what is refused to it does not count for its address
            self.add('changes', session[0], most, 10 * most)
        self.add('changes', client_address(environ), 10 * most, 10 * most)

    def add(self, what, who, limit, limit_of_rest, by=1):
        """Count for somebody. Where too many are counted, the rest share a count. Raises 429."""
        minute = time.monotonic() // 60
        if minute != self._minute:
            self._counts, self._minute = collections.Counter(), minute
        if who not in self._counts and len(self._counts) >= MAX_COUNTED:
            who, limit = '', limit_of_rest
        self._counts[who] += by
        if self._counts[who] > limit:
            wait = 60 - int(time.monotonic()) % 60
            raise bottle.HTTPError(429, f'More than {limit} {what} in a minute. Wait a moment.',
                                   Retry_After=str(wait))


writes = WriteLimit()


def _read_body(environ):
    """The body of a request, whole. One that is too large is not waited for. HTTP has seen to it
    that its length is a number, or that it is in chunks."""
    limit, length = settings.max_body_bytes, int(environ.get('CONTENT_LENGTH') or 0)
    body, chunked = b'', 'HTTP_TRANSFER_ENCODING' in environ
    if length <= limit:
        try:
            body = environ['wsgi.input'].read(limit + 1 if chunked else length)
        except OSError:         # nobody knows where the next request begins
            raise bottle.HTTPError(400, 'the body ended early, or is not in the chunks it should '
                                        'be in', Connection='close') from None
    if max(length, len(body)) > limit:
        bottle.abort(413, f'The request has more than {limit:,} bytes.')
    return body


def _type_of(environ):
    return environ.get('CONTENT_TYPE', '').partition(';')[0].strip().lower()


def _parse_form(body):
    form = {}
    for name, value in urllib.parse.parse_qsl(body.decode(), keep_blank_values=True,
                                              errors='strict', max_num_fields=MAX_FIELDS):
        if name.endswith('[]'):
            form.setdefault(name, []).append(value)
        else:
            form[name] = value
    return form


def _parse_json(body):
    data = json.loads(body)
    if not isinstance(data, dict):
        bottle.abort(400, 'the JSON must be an object')
    # Python reads half a surrogate pair and NaN, and can't write them.
    json.dumps(data, ensure_ascii=False, allow_nan=False).encode()
    return data


PARSERS = {'application/x-www-form-urlencoded': _parse_form, 'application/json': _parse_json}


@functools.lru_cache(256)       # clients ask in the same few ways
def weight_of(header, *names):
    """The weight, from 0 to 1, that a header like Accept gives to the first of the lower-case names
    that it has. Source: RFC 9110, section 12.4.2."""
    weights = {}
    for item in header.lower().split(','):
        name, *parameters = (part.strip() for part in item.split(';'))
        quality = next((part[2:] for part in parameters if part.startswith('q=')), '1')
        if name:
            good = re.fullmatch(r'0(\.[0-9]{0,3})?|1(\.0{0,3})?', quality)
            weights[name] = float(quality) if good else 0.0
    return next((weights[name] for name in names if name in weights), 0.0)


def accepts_gzip(environ):
    return weight_of(environ.get('HTTP_ACCEPT_ENCODING', ''), 'gzip', '*') > 0


def gzipped(body, level):
    compressor = zlib.compressobj(level, wbits=31)      # the format of gzip
    return compressor.compress(body) + compressor.flush()


# === WebSocket: Action Cable at /cable ===================================================
# Speaks actioncable-v1-json, so that @rails/actioncable and @hotwired/turbo-rails work unchanged,
# and AnyCable's actioncable-v1-ext-json, whose clients resume without loss. gevent-websocket alone
# must not face a network (frames without bound, interleaved writes, close frames without a code):
# CableSocket takes its place, with Handler in HTTP, and keeps one rule: everything that is sent
# goes through push(), which never waits.

CABLE_PATH = '/cable'
PROTOCOLS = ('actioncable-v1-ext-json', 'actioncable-v1-json', 'actioncable-unsupported')
BEAT_SECONDS = 3            # between pings in JSON: clients take twice that for a dead line
BEATS_PER_WS_PING = 5       # every client answers a ping of RFC 6455: a dead one is noticed
SILENCE_SECONDS = 60        # a socket that says nothing for so long is dropped
CLOSE_SECONDS = 2           # how long the other side may take to close too
HOLD_SECONDS = 3            # how long a restored subscription waits for its history command
OUTBOX_BYTES = 2 * MAX_BROADCAST_BYTES      # a client that leaves more unread is dropped
MAX_SUBSCRIPTIONS = 100     # of one socket
RESUME_SECONDS = 300        # how long a session of actioncable-v1-ext-json can be resumed
WEBSOCKET_GUID = '258EAFA5-E914-47DA-95CA-C5AB0DC85B11'     # RFC 6455, section 1.3

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = OPCODES = (0x0, 0x1, 0x2, 0x8, 0x9, 0xA)
# What JSON of another shape than the protocol's raises
MALFORMED = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)

connections = {}            # user -> set of Connection


class Violation(ProtocolError):
    """What a client may not do. code: of the close frame. Source: RFC 6455, section 7.4.1."""

    def __init__(self, reason, code=1002):
        super().__init__(reason)
        self.code = code


class CableSocket:
    """A WebSocket whose reads are bounded and whose writes never wait. Source: RFC 6455."""

    def __init__(self, handler):
        self.read = handler.rfile.read
        self.closed = False             # nothing more is sent
        self.heard_at = time.monotonic()
        self._socket = handler.socket
        self._unsent = bytearray()
        self._writer = None             # the greenlet that sends it

    def receive(self):
        """The next text message; None when the socket is closed, by whom and why ever."""
        try:
            return self._read_message()
        except ProtocolError as error:
            self.close(getattr(error, 'code', 1002))        # the library's have none
            self.linger()
        except UnicodeDecodeError:
            self.close(1007)
            self.linger()
        except (OSError, WebSocketError, ValueError):   # ValueError: closed under the read
            self.closed = True
        return None

    def push(self, data):
        """Send the bytes of whole frames: at once if the kernel takes them, else from a greenlet,
        in order. A client that does not read is dropped."""
        if self.closed:
            return
        sent = 0
        if not self._unsent:
            try:
                sent = self._socket._sock.send(data)        # beneath gevent's: non-blocking
            except BlockingIOError:
                pass
            except OSError:
                return self.abort()
            if sent < len(data):
                self._writer = gevent.spawn(self._write_unsent)
        self._unsent += data[sent:]
        if len(self._unsent) > OUTBOX_BYTES:
            metrics.count('cable_dropped_readers_total')
            log.warning('socket dropped, its client does not read unsent_bytes=%s',
                        len(self._unsent))
            self.abort()

    def close(self, code=1000, reason=b''):
        """Send a close frame, as the last one."""
        self.push(frame(struct.pack('!H', code) + reason, CLOSE))
        self.closed = True

    def linger(self):
        """Read on for a moment after the close frame was sent: a reset because of unread bytes
        could overtake it."""
        if self._writer:
            self._writer.join(CLOSE_SECONDS)
        with contextlib.suppress(OSError), gevent.Timeout(CLOSE_SECONDS, False):
            self._socket._sock.shutdown(socket.SHUT_WR)
            while self._socket.recv(65536):
                pass

    def abort(self):
        """Drop the connection; whoever reads from it gets the end."""
        self.closed = True
        with contextlib.suppress(OSError):
            self._socket._sock.shutdown(socket.SHUT_RDWR)

    def _write_unsent(self):
        try:
            while self._unsent:
                del self._unsent[:self._socket.send(self._unsent)]
        except OSError:
            self.abort()

    def _read_message(self):
        message, inside = bytearray(), False
        while True:
            opcode, final, payload = self._read_frame(len(message))
            self.heard_at = time.monotonic()
            gevent.sleep(0)             # a flood of frames must not starve the others
            if opcode == PING:
                self.push(frame(payload, PONG))
            elif opcode == CLOSE:
                self._answer_close(payload)
                raise WebSocketError('closed by the other side')
            elif opcode != PONG:
                if opcode == BINARY:
                    raise Violation('only text is understood', 1003)
                if inside != (opcode == CONTINUATION):
                    raise Violation('a continuation of nothing, or a message inside another')
                message += payload
                inside = True
                if final:
                    return message.decode()

    def _read_frame(self, already):
        """The next frame: opcode, whether it is final, payload. already: bytes that the message
        has so far."""
        header = Header.decode_header(self)     # also refuses control frames that are not short
        opcode, size = header.opcode, header.length
        if header.flags or opcode not in OPCODES:
            raise Violation('reserved bit or opcode')
        if not header.mask:
            raise Violation('a client must mask its frames')
        if opcode < CLOSE and already + size > settings.max_message_bytes:
            raise Violation(f'more than {settings.max_message_bytes} bytes', 1009)      # unread
        payload = self.read(size)
        if len(payload) < size:
            raise WebSocketError('the connection ended')
        key = int.from_bytes((header.mask * (size // 4 + 1))[:size], 'big')
        return opcode, header.fin, (int.from_bytes(payload, 'big') ^ key).to_bytes(size, 'big')

    def _answer_close(self, payload):
        """Close with the code and the reason of the other side's close."""
        if not payload:
            return self.close()
        code = int.from_bytes(payload[:2], 'big') if len(payload) > 1 else 0
        if not (1000 <= code <= 1003 or 1007 <= code <= 1014 or 3000 <= code <= 4999):
            raise Violation(f'close code {code}')
        payload[2:].decode()
        self.close(code, payload[2:])


def frame(payload, opcode=TEXT):
    """The bytes of one unmasked, final frame."""
    return bytes(Header.encode_header(True, opcode, b'', len(payload), 0)) + payload


class Subscription:
    """An identifier of a connection, and the stream behind it."""

    def __init__(self, connection, identifier, stream):
        self.connection = connection
        self.stream = stream
        self._held = []             # messages that came before start(); None: it is live
        self._last_id = -1          # of the message that was sent last: nothing goes out twice
        quoted = json.dumps(identifier)
        self._head = f'{{"identifier":{quoted},"message":'.encode()

    def start(self, missed=None, last_id=-1):
        """Send what was missed, or else what was held, and be live from here on. last_id: of the
        last message that the client has."""
        if missed is not None:
            self._last_id = last_id
        held, self._held = self._held or (), None       # some came while the others were read
        for message in (*(missed or ()), *held):
            self.receive(message)

    def receive(self, message):
        """Send a message of the stream; None: that all may have changed."""
        if message is None:
            message, self._last_id = refresh_of(self.stream), -1    # its ids begin anew too
        if self._held is not None:
            self._held.append(message)
        elif message.id > self._last_id:
            self._last_id = message.id
            tail = b'}'
            if self.connection.extended:
                tail = (f',"stream_id":{json.dumps(self.stream)},"epoch":"{cable.epoch}",'
                        f'"offset":{message.id}}}').encode()
            self.connection.socket.push(frame(self._head + message.payload.encode() + tail))


def refresh_of(stream):
    """In the place of messages that are lost: the page is to be loaded again."""
    metrics.count('cable_refreshes_total')
    return Message(offset_of(cable.position()), stream,
                   json.dumps(RELOAD if cable.reloads else REFRESH), 0.0)


class Connection:
    """One client of /cable. Source of the messages: rails 2a2db1e, action_cable.rb; AnyCable's
    protocol document."""

    def __init__(self, socket, user, protocol, offered, restore=''):
        self.socket = socket
        self.user = user
        self.extended = protocol == 'actioncable-v1-ext-json'
        self.rails = 'actioncable-unsupported' in offered       # only Rails' own client offers that
        self.sid = secrets.token_urlsafe(12)
        self.subscriptions = {}     # identifier -> Subscription
        self._restore = restore     # the sid of a session to go on with

    def serve(self):
        """Greet, and do what the client commands until it is gone."""
        if self.user is None:
            self.disconnect('unauthorized', reconnect=False)
            return self.socket.linger()
        connections.setdefault(self.user, set()).add(self)
        heartbeat.wake()
        try:
            self._welcome()
            for text in iter(self.socket.receive, None):
                self._obey(text)
        except StorageError as error:
            log.warning('a client is to come back error=%s', error)
            self.disconnect('storage', reconnect=True)
            self.socket.linger()
        finally:
            connections[self.user].discard(self)
            if not connections[self.user]:
                del connections[self.user]
            for subscription in self.subscriptions.values():
                cable.unsubscribe(subscription.stream, subscription.receive)
            if self.subscriptions:
                self._save()

    def send(self, message):
        self.socket.push(frame(to_json(message).encode()))

    def answer(self, identifier, type):
        self.send({'identifier': identifier, 'type': type})

    def disconnect(self, reason, reconnect):
        """Tell why, and close, for good after CLOSE_SECONDS."""
        self.send({'type': 'disconnect', 'reason': reason, 'reconnect': reconnect})
        self.socket.close(1001 if reconnect else 1008)
        gevent.spawn_later(CLOSE_SECONDS, self.socket.abort)

    def _welcome(self):
        if not self.extended:
            return self.send({'type': 'welcome'})
        welcome = {'type': 'welcome', 'sid': self.sid}
        saved = cache.get(f'cable {self._restore[:100]!r}') if self._restore else None
        if saved and saved['user'] == self.user:
            for identifier in saved['identifiers']:
                stream, _ = self._stream_of(identifier)
                if stream:      # held: what came live before its history would be out of order
                    subscription = self._add(identifier, stream)
                    gevent.spawn_later(HOLD_SECONDS, subscription.start)
            welcome.update(restored=True, restored_ids=list(self.subscriptions))
        self.send(welcome)

    def _obey(self, text):
        """Do one command; what is malformed or unknown is ignored, as Rails does."""
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
                self._replay_history(identifier, command.get('history'))
            elif name != 'message':         # StreamsChannel has no actions
                raise ValueError('no such command')
        except MALFORMED as error:
            log.info('cable command ignored error=%r', error)

    def _subscribe(self, identifier, history):
        if identifier in self.subscriptions:
            # A Rails client repeats until it is confirmed, and a second element with the same
            # identifier waits for a confirmation of its own. AnyCable's takes one that it does not
            # expect for an error.
            if self.rails:
                self.answer(identifier, 'confirm_subscription')
            return
        stream, since = self._stream_of(identifier)
        if stream is None or len(self.subscriptions) >= MAX_SUBSCRIPTIONS:
            return self.answer(identifier, 'reject_subscription')
        subscription = self._add(identifier, stream)
        self.answer(identifier, 'confirm_subscription')
        if history and self.extended:
            self._replay_history(identifier, history)
        elif since is None:
            subscription.start()
        else:
            try:
                subscription.start(cable.since(stream, str(since)), offset_of(since))
                metrics.count('cable_resumes_total')
            except PositionLost:
                subscription.start([refresh_of(stream)])

    def _unsubscribe(self, identifier):
        subscription = self.subscriptions.pop(identifier, None)
        if subscription:
            cable.unsubscribe(subscription.stream, subscription.receive)
            self._save()

    def _replay_history(self, identifier, history):
        """Send what was missed, or say that it is lost; then the subscription is live."""
        subscription = self.subscriptions[identifier]
        stream = subscription.stream
        try:
            position = (history.get('streams') or {}).get(stream)
            if position is not None:
                position = f'{position["epoch"]}:{position["offset"]}'
                subscription.start(cable.since(stream, position), offset_of(position))
            else:
                subscription.start(cable.since_time(stream, float(history['since'])))
            self.answer(identifier, 'confirm_history')
        except (PositionLost, *MALFORMED):
            subscription.start()
            self.answer(identifier, 'reject_history')

    def _stream_of(self, identifier):
        """The stream that an identifier names, None where it may not listen; and the position in
        it to start after, None: from now on."""
        with contextlib.suppress(*MALFORMED):
            params = json.loads(identifier)
            if params['channel'] in ('Turbo::StreamsChannel', '$pubsub'):
                stream = verify_stream_name(params['signed_stream_name'], self.user)
                return stream, params.get('since')
        return None, None

    def _add(self, identifier, stream):
        subscription = self.subscriptions[identifier] = Subscription(self, identifier, stream)
        cable.subscribe(stream, subscription.receive)
        self._save()
        return subscription

    def _save(self):
        """Keep what it takes to resume this session after a cut, or a restart. The live script,
        which offers actioncable-unsupported too, resumes by position: it leaves no row."""
        if self.extended and not self.rails:
            cache.set(f'cable {self.sid!r}', {'user': self.user,
                                            'identifiers': list(self.subscriptions)},
                      ttl=RESUME_SECONDS)


class Heartbeat:
    """Pings every connection, and drops those that have gone silent. Sleeps while there is none."""

    def open(self):
        self._beats = 0
        self._anybody = gevent.event.Event()
        self._loop = Loop('heartbeat', self._turn)

    def close(self):
        self._loop.stop()

    def wake(self):
        """There is a connection."""
        self._anybody.set()

    def _turn(self):
        if not connections:
            self._anybody.clear()
        self._beats += 1
        ping = frame(f'{{"type":"ping","message":{int(time.time())}}}'.encode())
        if self._beats % BEATS_PER_WS_PING == 0:
            ping += frame(b'', PING)
        silent_since = time.monotonic() - SILENCE_SECONDS
        for connection in [each for group in connections.values() for each in group]:
            if connection.socket.heard_at < silent_since:
                connection.socket.abort()
            else:
                connection.socket.push(ping)
        return self._wait

    def _wait(self):
        self._anybody.wait()
        gevent.sleep(BEAT_SECONDS)


heartbeat = Heartbeat()


# === HTTP: gevent's server, strict about what it reads ===================================

QUIET_SECONDS = 75          # how long a connection may be silent, between requests or within one
DRAIN_SECONDS = 3.5         # requests may go on so long when the process stops
LAST_SECONDS = 1            # of these: so long the next request of a connection is answered too
SEND_BYTES = 65_536         # a client has QUIET_SECONDS for as many
MAX_CONNECTIONS = 20_000
MAX_HEADERS = 100           # of a request
MAX_HEADER_BYTES = 16_384   # of one of them
# Source: RFC 9112, section 3; RFC 9110, section 5
REQUEST_LINE = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+) ([!-~\x80-\xff]+) (HTTP/1\.[01])\r?\n")
HEADER = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([\t -~\x80-\xff]*)\r?\n")
SINGLE_HEADERS = ('host', 'content-length', 'transfer-encoding')


class BadHead(ValueError):
    """The head of a request that can't be understood, or not in one way only: 400, and the end."""


class Headers(dict):
    """The header section of a request, by lower-case name; several of a name are joined. Raises
    BadHead.

    http.client's is lenient: it skips all that follows a malformed line, joins folded lines and
    takes the first of two lengths, where a proxy may have understood something else. Source: RFC
    9110, section 5; RFC 9112, sections 5 and 6.
    """

    def __init__(self, file):
        for _ in range(MAX_HEADERS + 1):
            line = file.readline(MAX_HEADER_BYTES + 1)
            if line in (b'\r\n', b'\n'):
                break
            match = HEADER.fullmatch(line.decode('latin-1'))
            if not match:
                raise BadHead('too long, or not a name, a colon and a value' if line else
                              'the connection ended')
            name, value = match[1].lower(), match[2].strip(' \t')
            if name not in self:
                self[name] = value
            elif name in SINGLE_HEADERS:
                raise BadHead(f'{name} twice')
            else:
                self[name] += ('; ' if name == 'cookie' else ',') + value
        else:
            raise BadHead(f'more than {MAX_HEADERS} headers')
        if not re.fullmatch('[0-9]{1,18}', self.get('content-length', '0')):
            raise BadHead('content-length is not a number')
        if self.get('transfer-encoding', 'chunked').lower() != 'chunked':
            raise BadHead('transfer-encoding is not chunked')
        if 'transfer-encoding' in self and 'content-length' in self:
            raise BadHead('the length is said in two ways')

    # What gevent calls
    getheader = dict.get
    typeheader = property(lambda self: self.get('content-type'))


class Body(Input):
    """The body of a request: gevent's. As shipped, a chunk without a size is a ValueError, and
    gevent reads on after some broken ones."""
    __slots__ = ()

    def _chunked_read(self, *arguments, **options):
        try:
            return super()._chunked_read(*arguments, **options)
        except (OSError, ValueError) as error:
            self._chunked_input_error = True
            raise _InvalidClientInput(str(error)) from None     # the connection ends then


def names_of(header):
    """The names in a header that is a list."""
    return [name.strip() for name in header.split(',') if name.strip()]


class Handler(WebSocketHandler):
    """One HTTP connection: gevent's handler, with strict heads and the upgrade to /cable."""
    logger = log            # as shipped, one of the library's own

    def handle(self):
        """Serve the connection. As shipped, who does not stay to hear that a request was bad
        causes a traceback."""
        self.socket.settimeout(QUIET_SECONDS)
        with contextlib.suppress(OSError):
            super().handle()

    def read_requestline(self):
        """The first line of a request. Until it comes the server may hang up."""
        self.server.waiting.add(self)
        try:
            return '' if self.server.hung_up else super().read_requestline()
        finally:
            self.server.waiting.discard(self)

    def read_request(self, line):
        """Parse the head of a request. Raises BadHead.

        As shipped, a request may be of HTTP/0.9, have blanks of all kinds in its first line, no
        Host, or chunks in HTTP/1.0; Connection: close counts only alone.
        """
        match = REQUEST_LINE.fullmatch(line)
        if not match:
            raise BadHead('not a method, a target, and HTTP/1.1 or HTTP/1.0')
        self.command, self.path, self.request_version = match.groups()
        self.headers = headers = Headers(self.rfile)
        length = headers.get('content-length')
        self.content_length = length and int(length)
        if self.content_length and self.command == 'HEAD':
            raise BadHead('a body with HEAD')
        connection = headers.get('connection', '').lower()
        if self.request_version == 'HTTP/1.1':
            if not headers.get('host'):
                raise BadHead('no host')
            self.close_connection = 'close' in names_of(connection)
        else:
            if headers.get('transfer-encoding'):
                raise BadHead('transfer-encoding came with HTTP/1.1')
            self.close_connection = connection != 'keep-alive'
        absolute = re.match('(?i)https?://([^/?]+)', self.path)
        if absolute:                    # as to a proxy; its host counts. RFC 9112, section 3.2.2
            headers['host'] = absolute[1]
            rest = self.path[absolute.end():]
            self.path = rest if rest.startswith('/') else '/' + rest
        path = self.path.partition('?')[0].encode('latin-1')
        urllib.parse.unquote_to_bytes(path).decode()        # what is no UTF-8 is a ValueError
        return True

    def get_environ(self):
        # As shipped, who offers an upgrade gives the application the bare connection.
        environ = super().get_environ()
        body = self.wsgi_input
        self.wsgi_input = environ['wsgi.input'] = Body(body.rfile, body.content_length,
                                                       body.socket, body.chunked_input)
        return environ

    def _headers(self):
        """The headers as get_environ() puts them. One with an underscore could pass for another,
        with a hyphen."""
        for name, value in self.headers.items():
            if '_' not in name and name not in ('content-type', 'content-length'):
                yield 'HTTP_' + name.replace('-', '_').upper(), value

    def start_response(self, status, headers, exc_info=None):
        if self.server.closed:              # the last answer of this connection
            headers = [*headers, ('Connection', 'close')]
        return super().start_response(status, headers, exc_info)

    def _handle_client_error(self, error):
        # As shipped, some of these print a traceback past the log.
        log.info('bad request error=%r', error)
        return '400', b'HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Length: 0\r\n\r\n'

    def _write_with_headers(self, data):
        # As shipped, headers and body are two sends, and two packets.
        self.headers_sent = True
        self.finalize_headers()
        lines = [b'HTTP/1.1 ' + self.status, *map(b': '.join, self.response_headers), b'', b'']
        head = b'\r\n'.join(lines)
        if self.response_use_chunked:
            self._sendall(head)
            self._write(data)
        else:
            self._sendall(head + (data or b''))     # gevent-websocket writes a str

    def _sendall(self, data):
        # As shipped, the timeout is for all of an answer, so that a slow reader is cut off, and
        # anything but a reset causes tracebacks.
        try:
            for start in range(0, len(data), SEND_BYTES):
                super()._sendall(data[start:start + SEND_BYTES])
        except OSError as error:
            raise BrokenPipeError(errno.EPIPE, str(error)) from None

    def log_request(self):
        pass                # what goes wrong is logged where it does

    # The upgrade

    def upgrade_websocket(self):
        """Answer an upgrade to a WebSocket. Gives None when that is done, or none was asked for,
        else the body of a refusal."""
        environ = self.environ
        if environ.get('HTTP_UPGRADE', '').lower() != 'websocket' \
                or 'upgrade' not in names_of(environ.get('HTTP_CONNECTION', '').lower()):
            return None
        session = session_of(environ)
        user = session[0] if session else None
        offered = names_of(environ.get('HTTP_SEC_WEBSOCKET_PROTOCOL', ''))
        protocol = next((name for name in PROTOCOLS if name in offered), None)
        key = environ.get('HTTP_SEC_WEBSOCKET_KEY', '').strip()
        refusal = self._refusal(environ, user, offered, protocol, key)
        if refusal:
            status, reason, *headers = refusal
            self.start_response(status, [('Content-Type', 'text/plain'), *headers])
            return [reason.encode() + b'\n']
        accept = base64.b64encode(hashlib.sha1((key + WEBSOCKET_GUID).encode()).digest()).decode()
        headers = [('Upgrade', 'websocket'), ('Connection', 'Upgrade'),
                   ('Sec-WebSocket-Accept', accept)]
        if protocol:
            headers.append(('Sec-WebSocket-Protocol', protocol))
        query = urllib.parse.parse_qs(environ['QUERY_STRING'])
        restore = (query.get('sid') or [environ.get('HTTP_X_ANYCABLE_RESTORE_SID', '')])[0]
        self.websocket = environ['wsgi.websocket'] = CableSocket(self)
        self.cable_connection = Connection(self.websocket, user, protocol, offered, restore)
        self.close_connection = True            # no request follows a WebSocket
        self.start_response('101 Switching Protocols', headers)
        return None

    def _refusal(self, environ, user, offered, protocol, key):
        """Status, reason and headers, or None where the upgrade may be. Source: RFC 6455, 4.2."""
        if environ['PATH_INFO'] != CABLE_PATH:
            return '404 Not Found', f'the WebSocket is at {CABLE_PATH}'
        if environ['REQUEST_METHOD'] != 'GET' or self.request_version != 'HTTP/1.1':
            return '400 Bad Request', 'a WebSocket starts with GET in HTTP/1.1'
        if is_wrong_host(environ):
            return '421 Misdirected Request', 'this server does not answer to that name'
        if not origin_is_host(environ):
            return '403 Forbidden', 'a page of another site may not connect'
        if environ.get('HTTP_SEC_WEBSOCKET_VERSION') != '13':
            return ('426 Upgrade Required', 'version 13 is spoken here',
                    ('Sec-WebSocket-Version', '13'))
        if not re.fullmatch('[A-Za-z0-9+/]{21}[AQgw]==', key):
            return '400 Bad Request', 'Sec-WebSocket-Key must be 16 bytes in base64'
        if offered and protocol is None:
            return ('400 Bad Request',
                    f'the protocols spoken here are {", ".join(PROTOCOLS[:2])}')
        if self.server.closed:
            return '503 Service Unavailable', 'this process is stopping'
        if len(connections.get(user, ())) >= settings.max_sockets:
            return '429 Too Many Requests', f'{settings.max_sockets} sockets are open already'
        return None

    def run_websocket(self):
        """Serve the connection, in place of the library's way through the WSGI application."""
        self.socket.settimeout(None)
        try:
            self.cable_connection.serve()
        finally:
            self.websocket.close()
            if self.websocket._writer:
                self.websocket._writer.join(CLOSE_SECONDS)
            self.websocket.closed = True


class Server(WSGIServer):
    """The HTTP server, which can stop without cutting off a request."""

    def __init__(self, listener):
        self.waiting = set()        # handlers between two requests
        self.hung_up = False        # on these
        # With wsgi.multiprocess gevent accepts one connection a turn: others on the same listener
        # get their share.
        super().__init__(listener, application, spawn=gevent.pool.Pool(MAX_CONNECTIONS), log=None,
                         error_log=log, handler_class=Handler,
                         environ={'SERVER_NAME': settings.host, 'wsgi.multiprocess': True})

    def drain(self):
        """Accept nothing more, let requests end and sockets close, for DRAIN_SECONDS at most.

        A connection between two requests is not hung up on at once, for the next may be on its
        way: for LAST_SECONDS that is answered, with the word that it was the last.
        """
        if self.started:            # accept whom the kernel has let in already
            self.max_accept = MAX_CONNECTIONS
            self._do_read()
        self.close()
        for connection in [each for group in connections.values() for each in group]:
            connection.disconnect('server_restart', reconnect=True)
        self.pool.join(LAST_SECONDS)
        self.hung_up = True
        for handler in list(self.waiting):
            with contextlib.suppress(OSError):
                handler.socket.shutdown(socket.SHUT_RD)
        self.pool.join(DRAIN_SECONDS - LAST_SECONDS)
        self.pool.kill(timeout=0.5)


LISTENER_FD, PARENT_FD = 3, 4       # what a process may inherit
FD_NAMES = 'listener:parent'        # of both; systemd has other names for the first


def inherit(environ):
    """(listener, whether there is a parent): what the process was started with. Source:
    sd_listen_fds(3). Raises SettingError.

    systemd passes on a listener, a parent of ours (see Process) also the line to itself. The
    variables that say so are taken out of the environment: they are not for what we start.
    """
    count, pid, names = (environ.pop(f'LISTEN_{word}', '') for word in ('FDS', 'PID', 'FDNAMES'))
    has_parent = names == FD_NAMES
    if not has_parent and pid != str(os.getpid()):
        return None, False
    try:
        listener = gevent.socket.socket(fileno=LISTENER_FD)
        listens = listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        if (listener.family not in (socket.AF_INET, socket.AF_INET6) or not listens
                or count != str(1 + has_parent)):
            raise OSError(f'{count} of them, the first is {listener}')
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for fd in range(LISTENER_FD, LISTENER_FD + 1 + has_parent):
            os.set_inheritable(fd, False)
    except OSError as error:
        raise SettingError(f'LISTEN_FDS passes on what is not one listening TCP socket: '
                           f'{error}') from None
    return listener, has_parent


def listen():
    """A listening socket. Raises SettingError if the address can't be had."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = gevent.socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # What it accepts inherits this: sockets and streamed answers are many small packets.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.bind(address)
        listener.listen(1024)
        return listener
    except (OSError, UnicodeError) as error:        # UnicodeError: a HOST that can't be a name
        reason = getattr(error, 'strerror', None) or error
        in_use = getattr(error, 'errno', 0) == errno.EADDRINUSE
        hint = '. Another program is there; set another PORT' if in_use else ''
        raise SettingError(f'can not listen on HOST {settings.host} PORT {settings.port}: '
                           f'{reason}{hint}') from None


# === Live script: the generic side of the browser ========================================
# It needs no build and no network but this server. An app loads it as asset('live.js').

LIVE_SCRIPT = r'''
// Makes a page live, without a word about it but in its HTML: forms with method=post go
// out by fetch, in order; Turbo Streams, those of answers and those of each
// <turbo-cable-stream-source>, change the page; links with data-visit and a refresh
// morph it. What can't be sent waits, over a closed tab too; the page opens without the
// network as it was last seen. Optional: #notice for errors, [data-connection] for
// trouble with the line, <meta name="owner"> for whose page it is.
// Left alone: data-turbo="false", forms with files or a target and, by morph, elements
// with data-turbo-permanent. Text fields are reset when their form is sent.
// Beside the real Turbo, which then defines the elements.
const TURBO_STREAM = 'text/vnd.turbo-stream.html', SOURCE = 'turbo-cable-stream-source';
const ACCEPT = `${TURBO_STREAM}, text/html;q=0.9`;      // where a redirect leads, there is a page
const FORMS = `form[method=post i]:not([target], [enctype^=multipart i],
  [data-turbo=false], [data-turbo=false] *)`;
const LATER = [408, 409, 425, 429, 502, 503, 504];      // statuses after which to ask again
const HIDDEN_MS = 60_000, STALE_MS = 8_000, ANSWER_MS = 20_000, LOOK_MS = 20_000;
const $ = (selector, root = document) => root.querySelector(selector);
const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];
const byId = id => document.getElementById(id);
const wait = ms => new Promise(resolve => setTimeout(resolve, ms));
const limit = ms => globalThis.AbortSignal?.timeout?.(ms);
// Time that passes: the wall clock may be put back, the other one stops while a machine sleeps.
const clocks = () => [Date.now(), performance.now()];
const elapsed = then => Math.max(...clocks().map((at, which) => at - then[which]));

// What an app's own script, the next module, may replace in live.hooks
const hooks = {
  apply() {},                   // (entry): show a change that waits, from its data alone
  ours: () => false,            // (element): the script's own, morph leaves it where it is
  morphing() {},                // (from, to): before an element becomes like another
  leave: node => node.remove(), // (node): it is to go
  news() {},                    // (element): the cable has changed it
  submitting() {},              // (form, button): before it is queued; false: don't
  settled() {},                 // (entry, answer): before an answer is shown
  turned: () => visit(null),    // (): the history has moved
  keeping() {},                 // (root): a copy of the page, which is kept for offline
  address: () => location.pathname,     // under which it is kept
  owned() {},                   // (): the page has become another user's
};

// Versions: what a newer message has shown, an older one must not undo. What was
// removed by its id stays away, unless the removal has a version too: then it may come
// back with a higher one.
const versions = new Map();
const known = id => versions.get(id) ?? Number(byId(id)?.dataset.version ?? -1);
function outdated(id, version) {
  if (!id || version === undefined) return false;
  if (version < known(id)) return true;
  versions.set(id, Number(version));
  return false;
}

// Morph: make an element like another without replacing it, so that focus, typed text
// and clicks in flight survive. Blank text and comments are nobody's business. An element
// that an app has drawn for a change has the key of that as data-pending; it stays while
// the change waits, and becomes the server's one of the same data-key.
const left = node => node?.nodeType === 1 ? waits(node.dataset.pending) || hooks.ours(node)
  : node && (node.nodeType !== 3 || !node.data.trim());
const alike = (one, other) => one.nodeName === other.nodeName && one.id === other.id;
function morph(from, to) {
  if (from.nodeName !== to.nodeName) return from.replaceWith(to);
  if (from.id && from.matches('[data-turbo-permanent]')) return;
  if (outdated(to.id, to.dataset.version)) return;
  if (from.nodeName === 'DETAILS') to.open = from.open;     // what a person opened stays open
  hooks.morphing(from, to);
  for (const name of from.getAttributeNames()) to.hasAttribute(name) || from.removeAttribute(name);
  for (const { name, value } of to.attributes) {
    if (from.getAttribute(name) !== value) from.setAttribute(name, value);
  }
  if (['checkbox', 'radio'].includes(from.type)) from.checked = to.checked;
  const ids = new Set([...to.children].map(({ id }) => id));
  for (const child of [...from.children]) {
    if (child.id && !ids.has(child.id) && !left(child)) hooks.leave(child);
  }
  let next = from.firstChild;
  for (const child of [...to.childNodes].filter(node => !left(node))) {
    while (left(next)) next = next.nextSibling;
    let match = child.id ? byId(child.id) : next;
    while (!child.id && match && (left(match) || !alike(match, child))) match = match.nextSibling;
    if (match?.parentNode !== from || !alike(match, child)) {
      if (!outdated(child.id, child.dataset?.version)) from.insertBefore(child, next);
      continue;
    }
    if (match === next) next = next.nextSibling;
    else if (child.id) from.insertBefore(match, next);
    else {
      drop(next, match);
      next = match.nextSibling;
    }
    if (match.nodeType === 1) morph(match, child);
    else if (match.data !== child.data) match.data = child.data;
  }
  drop(next, null);
}
// What stands from here on before another node has no place any more; an id has one,
// further on.
function drop(node, end) {
  while (node !== end) {
    const gone = node;
    node = node.nextSibling;
    if (!left(gone) && !(end && gone.id)) hooks.leave(gone);
  }
}
function adopt(root) {
  for (const drawn of $$('[data-pending]')) {
    const its = $(`[data-key="${drawn.dataset.key}"]`, root);
    if (its && its.id !== drawn.id) byId(its.id) ? drawn.remove() : drawn.id = its.id;
  }
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
  remove: target => hooks.leave(target),
  replace(target, content, morphs) {
    if (morphs) morph(target, content.firstElementChild);
    else target.replaceWith(content);
  },
  update(target, content, morphs) {
    if (!morphs) return target.replaceChildren(content);
    const copy = target.cloneNode(false);
    copy.append(content);
    morph(target, copy);
  },
};
// The element that a stream is about: the first of its template, if data-row names no
// other.
function subject(stream) {
  const first = $('template', stream)?.content.firstElementChild;
  const { row: id = first?.id, version = first?.dataset.version } = stream.dataset;
  return { id, version };
}
class StreamElement extends HTMLElement {
  connectedCallback() {
    const get = name => this.getAttribute(name);
    const action = get('action'), target = get('target'), targets = get('targets');
    const { id, version } = subject(this), content = $('template', this)?.content;
    this.remove();
    if (action === 'refresh') return 'reload' in this.dataset ? location.reload() : visit();
    if (action === 'remove' && target && !version) versions.set(target, Infinity);
    if (outdated(id, version)) return;
    if (content) adopt(content);
    const all = targets ? $$(targets) : [byId(target)], morphs = get('method') === 'morph';
    for (const each of all.filter(Boolean)) {
      actions[action]?.(each, content?.cloneNode(true) ?? new DocumentFragment(), morphs);
    }
  }
}
function renderStreams(html, fromCable) {
  const fragment = document.createRange().createContextualFragment(html);
  const all = fromCable ? $$('turbo-stream', fragment).map(subject) : [];
  const news = all.filter(({ id, version }) => id && !(version <= known(id)));
  for (const { content } of $$('template', fragment)) adopt(content);
  document.body.append(fragment);
  for (const id of new Set(news.map(({ id }) => id))) if (byId(id)) hooks.news(byId(id));
  shown();
}

// Visits: another page, or this one again, morphed in. One that a message or an answer
// has overtaken is asked for again. Of another epoch everything is news: the databases
// are new, and count from the start. What is no page is left to the browser.
const positions = root => $$(SOURCE, root).map(({ dataset }) => (dataset.since ?? '').split(':'));
const epochOf = root => positions(root)[0]?.[0];
function overtaken(page) {
  const [[epoch, offset] = []] = positions(page);
  return positions(document).some(([ours, seen]) => ours === epoch && seen - offset > 0) ||
    $$('[data-version]', page).some(({ id, dataset: { version } }) =>
      version < known(id) && known(id) < Infinity);
}
// The styles and scripts of a page, and those that they may fetch late (data-more): one with
// others can't be morphed in.
const files = root =>
  $$('head link[rel=stylesheet]:not([data-late]), head script', root).flatMap(each =>
    ['href', 'src', 'data-more'].map(name => each.getAttribute(name)).filter(Boolean));
let visiting, epoch, reached = true;
// to: the URL of another page; null: this one, wherever that is by then; unset: where one is on
// the way to, if anywhere.
async function visit(to = visiting?.to, pause = 100, given) {
  const from = location.href, current = visiting = { to: to === from ? null : to };
  let page, url = to ?? from;
  try {
    const answer = given?.answer ?? await fetch(url, { headers: { Accept: 'text/html' },
      signal: limit(ANSWER_MS) });
    const html = given?.html ?? await answer.text();
    if (visiting !== current) return;
    reached = !LATER.includes(answer.status);
    if (answer.ok && answer.headers.get('Content-Type')?.startsWith('text/html')) {
      page = new DOMParser().parseFromString(html, 'text/html');
      if (answer.redirected) url = answer.url;
    } else if (answer.status < 500 && !LATER.includes(answer.status)) {
      return location.assign(url);
    }
  } catch { reached = false; }          // ask again
  cable.show();
  const other = page && ownerOf(page) || owner;
  if (page && other === owner) belonged = 0;
  if (other !== owner && !belong(other)) return;
  const fresh = page && epochOf(page);
  if (fresh && fresh !== epoch) renewVersions(fresh);
  const elsewhere = current.to;
  if (!page || overtaken(page) || !elsewhere && location.href !== from) {
    await wait(pause);
    return visiting === current && visit(elsewhere, Math.min(pause * 2, 15_000));
  }
  if (elsewhere && `${files(page)}` !== `${files(document)}`) return location.assign(url);
  if (elsewhere) history.pushState(null, '', url);
  visiting = null;
  adopt(page);
  morph(document.body, page.body);
  document.title = page.title;
  shown();
}
function renewVersions(fresh) {
  epoch = fresh;
  versions.clear();
  for (const each of $$('[data-version]')) each.dataset.version = -1;
}
// What the server has said is on the page: what waits is shown again on top of it.
function shown() {
  changes.forEach(entry => hooks.apply(entry));
  cable.show();
  keepSoon();
}
addEventListener('popstate', () => hooks.turned());
onClick('a[data-visit]', ({ href }) => visit(href));
function onClick(selector, act) {       // without a key that opens another tab
  addEventListener('click', event => {
    const element = event.target.closest?.(selector);
    if (!element || event.defaultPrevented || event.button) return;
    if (event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    act(element);
  });
}

// Storage that is full, blocked or gone costs what is kept there, and nothing else.
function stored(act) {
  try {
    return act(localStorage);
  } catch { return undefined; }
}

// Whose page it is. When the cookie is gone, or that of another list has come, the page becomes
// the other's, once: where no cookie comes back each page is yet another's. Nothing of the
// former stays; what waits can't be sent any more.
const ownerOf = root => $('meta[name=owner]', root)?.content ?? '';
let owner = ownerOf(document), belonged = 0;
function belong(other) {
  if (belonged) return tell('This is another list by now. Load the page again.');
  owner = $('meta[name=owner]').content = other;
  belonged = 1;
  wait(1000).then(() => visit());       // does the cookie come back now?
  forgetOthers(changes.length);
  changes.length = 0;
  epoch = null;
  hooks.owned();
  return true;
}
function forgetOthers(lost) {
  const others = stored(all => {
    const names = kept(all).filter(name => !name.startsWith(itemOf('')));
    for (const name of names) all.removeItem(name);
    all.owner = owner;
    return names.length;
  }) || lost;
  const unsent = others ? ` Not sent: ${count(others)} of the former.` : '';
  if (unsent || belonged) tell(`This is not the list that was here before.${unsent}`);
  globalThis.caches?.delete('page').catch(() => {});
}

// Changes go to the server one after another, in their order, each with a key: sent
// twice, it is done once. What waits is in localStorage, an item each, so that it outlives
// the tab, and shows in the others. An entry has a path and a body, and whatever an app
// needs to show it.
const changes = [];
const order = new Intl.Collator('en', { numeric: true }).compare;
const waits = key => key && changes.some(each => each.key === key);
const itemOf = key => `change:${owner}:${key}`;
const kept = (all, by = 'change:') =>
  Object.keys(all).filter(name => name.startsWith(by)).sort(order);
let newest = 0, delivering, waiting, wake = () => {};
function newKey() {                     // later ones are greater, though the clock goes back
  newest = Math.max(newest + 1, Date.now());
  return [newest, ...crypto.getRandomValues(new Uint32Array(2))].join('-');
}
function change(given) {
  const entry = { key: newKey(), ...given };
  entry.kept = stored(all => {
    all.setItem(itemOf(entry.key), JSON.stringify({ ...entry, kept: true }));
    return true;
  });
  take(entry);
  deliver();
  return entry;
}
function take(entry) {
  if (waits(entry.key)) return;
  newest = Math.max(newest, parseInt(entry.key));
  changes.push(entry);
  changes.sort((one, other) => order(one.key, other.key));
  hooks.apply(entry);
  cable.show();
}
function forget(key) {
  const at = changes.findIndex(each => each.key === key);
  if (at >= 0) changes.splice(at, 1);
  cable.show();
}
function takeKept() {
  stored(all => kept(all, itemOf('')).forEach(name => take(JSON.parse(all[name]))));
}
// In the other tabs. They send it themselves if the one that has it is closed. They show the
// other list too, if this browser has another one by now.
addEventListener('storage', ({ key: name, newValue }) => {
  if (name === 'owner' && owner && newValue !== owner) visit();
  if (!name?.startsWith(itemOf(''))) return;
  const entry = JSON.parse(newValue);
  if (entry && !entry.refused) {
    take(entry);
    wait(3000).then(deliver);
  } else forget(name.split(':')[2]);
  if (entry?.refused) visit();
  // Its news may have come, and been drawn over, while it still waited here.
  wait(2000).then(() => $('[data-pending]') && !changes.length && visit());
});
addEventListener('beforeunload', event => {
  if (changes.every(({ kept }) => kept)) return;
  event.preventDefault();
  event.returnValue = '';
});
async function deliver() {
  if (delivering) return;
  delivering = true;
  const { locks } = navigator;          // not on every address; without, the keys must do
  let pause = 500;
  const send = async () => {
    while (changes.length) {
      const later = await attempt();
      if (later !== undefined) return later;
      pause = 500;
    }
  };
  // What another tab has sent in its turn is known here a moment later.
  const inTurn = lock =>
    lock ? send() : locks.request('deliver', () => wait(200).then(send));
  while (changes.length) {
    const later = await (
      locks?.request('deliver', { ifAvailable: true }, inTurn).catch(send) ?? send());
    if (later === undefined) continue;
    const at = clocks();
    const woken = new Promise(resolve => {
      wake = () => later || elapsed(at) < 1000 || resolve(true);
    });
    const woke = await Promise.race([wait(1000 * later || pause), woken]);
    if (!woke) pause = Math.min(pause * 2, 15_000);
  }
  delivering = false;
}
// Send the oldest. Gives the seconds that the server wants to be left alone if it has to
// wait, else nothing.
async function attempt() {
  const [entry] = changes;
  const elsewhere = stored(all => all.owner === owner && !(itemOf(entry.key) in all));
  if (entry.kept && elsewhere) return forget(entry.key);
  const body = new URLSearchParams(entry.body), headers = { Accept: ACCEPT };
  let answer, html;
  body.set('key', entry.key);
  if (owner) headers['X-Owner'] = owner;
  try {
    answer = await fetch(entry.path, { method: 'POST', body, headers, signal: limit(ANSWER_MS) });
    html = await answer.text();
  } catch { answer = null; }
  waiting = !answer || LATER.includes(answer.status);
  reached = !waiting;
  if (waiting) {
    cable.show();
    if (answer?.status === 409) visit();
    return Number(answer?.headers.get('Retry-After') ?? 0);
  }
  stored(all => {
    if (!answer.ok) all.setItem(itemOf(entry.key), '{"refused": true}');    // the other tabs see it
    all.removeItem(itemOf(entry.key));
  });
  forget(entry.key);
  queueMicrotask(() => settle(entry, answer, html));
}
function settle(entry, answer, html) {
  const streams = answer.headers.get('Content-Type')?.startsWith(TURBO_STREAM);
  if (!answer.ok) {
    for (const drawn of $$(`[data-pending="${entry.key}"]`)) drawn.remove();
    putBack(entry);
  }
  hooks.settled(entry, answer);
  if (streams) renderStreams(html);
  else if (!answer.ok) tell(`That was not done: the server answered ${answer.status}.`);
  else if (!answer.redirected || entry.page !== location.href) visit();
  else visit(answer.url, 100, { answer, html });
}
function tell(text) {
  const notice = byId('notice');
  if (notice) notice.textContent = text;
}
const count = number => `${number} change${number === 1 ? '' : 's'}`;

// Forms. What was typed is sent and cleared; what was refused comes back, before what
// has been typed since.
const typed = form => [...form.elements].filter(field => field.matches(':read-write'));
const pathOf = (form, button) =>
  button?.getAttribute('formaction') ?? form.getAttribute('action') ?? location.pathname;
addEventListener('submit', event => {
  const form = event.target, button = event.submitter;
  if (!form.matches(FORMS)) return;
  event.preventDefault();
  event.stopImmediatePropagation();
  tell('');
  if (hooks.submitting(form, button) === false) return;
  const body = new FormData(form);
  if (button?.name) body.set(button.name, button.value);
  if (typed(form).length) form.reset();         // a form of boxes shows what was ticked
  change({ path: pathOf(form, button), form: form.id, own: pathOf(form), page: location.href,
    body: [...body] });
}, true);
function putBack({ form: id, own, body }) {
  const sent = new URLSearchParams(body);
  const form = id ? byId(id) : $$(FORMS).find(each => pathOf(each) === own);
  for (const field of form ? typed(form) : []) {
    const text = sent.get(field.name), since = field.value;
    if (text) field.value = since === field.defaultValue ? text : `${text} ${since}`;
  }
}

// The cable. Source: @rails/actioncable and AnyCable's actioncable-v1-ext-json, with
// positions
const sources = () => $$(SOURCE).filter(each => each instanceof CableStreamSource);
const cable = {
  socket: null, live: false, failures: 0, heardAt: clocks(), timer: 0,
  open(counts = true) {
    if (this.socket || !sources().length) return;
    clearTimeout(this.timer);
    this.counts = counts;
    const url = location.origin.replace('http', 'ws') + '/cable';
    const protocols = ['actioncable-v1-ext-json', 'actioncable-unsupported'];
    const socket = this.socket = new WebSocket(url, protocols);
    this.heardAt = clocks();
    socket.onmessage = ({ data }) => socket === this.socket && this.hear(JSON.parse(data));
    socket.onclose = () => socket === this.socket && this.lost();
  },
  hear({ type, identifier, message, epoch, offset, reconnect }) {
    this.heardAt = clocks();
    if (type === 'welcome') {
      this.live = reached = true;
      this.failures = 0;
      for (const source of sources()) {
        const channel = source.getAttribute('channel'), { since } = source.dataset;
        const signed_stream_name = source.getAttribute('signed-stream-name');
        const identifier = JSON.stringify({ channel, signed_stream_name, since });
        source.identifier = identifier;
        this.socket.send(JSON.stringify({ command: 'subscribe', identifier }));
      }
      wake();
    } else if (type === 'reject_subscription' || type === 'disconnect' && !reconnect) {
      wait(3000).then(() => visit());
    } else if (!type) {
      if (!document.hidden) aliveAt = this.heardAt;
      const its = sources().filter(source => source.identifier === identifier);
      if (offset) for (const source of its) source.dataset.since = `${epoch}:${offset}`;
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
    const ms = Math.min(500 * 2 ** this.failures, 8_000) * (0.5 + Math.random());
    if (this.counts) this.failures++;
    if (this.failures === 2) askedAt = [0, 0];  // is it the line, or does only the socket fail?
    if (!document.hidden) this.timer = setTimeout(() => this.open(), ms);
    this.show();
  },
  // Words for trouble alone: nothing while all is well, or rests
  show(idle) {
    const element = $('[data-connection]');
    const offline = changes.length && waiting || !this.live && !(reached && navigator.onLine);
    const unsent = changes.length ? ` ${count(changes.length)} will be sent.` : '';
    const text = offline && !idle ? `No connection.${unsent}` : '';
    if (!element) return;
    element.hidden = false;
    element.dataset.state = text ? 'offline' : idle ? 'paused' : this.live ? 'live' : 'asking';
    if (element.textContent !== text) element.textContent = text;
  },
};
// A source that comes, goes or changes makes a new socket, perhaps of another user;
// positions see to it that nothing is missed.
let renewing = false;
function renew() {
  if (!renewing) queueMicrotask(() => {
    renewing = false;
    cable.release();
    cable.open();
  });
  renewing = true;
}
class CableStreamSource extends HTMLElement {
  static observedAttributes = ['signed-stream-name'];
  attributeChangedCallback() { if (this.isConnected) renew(); }    // not in a copy of the page
  connectedCallback() { renew(); }
  disconnectedCallback() { renew(); }
}

// A hidden tab lets go of its socket, an idle one too if data-idle-seconds of a source
// says so: the machine can sleep. Both catch up when looked at. Where a proxy lets no
// socket through, the page is asked for instead, now and then and when it is looked at.
let aliveAt = clocks(), askedAt = clocks();
function alive({ type }) {
  aliveAt = clocks();
  // Not counted, so that the pauses don't grow by it; and not with every key.
  if (!document.hidden && elapsed(cable.heardAt) > 1000) cable.open(false);
  if (['visibilitychange', 'online', 'focus'].includes(type)) askedAt = [0, 0];
  wake();
}
for (const name of ['visibilitychange', 'online', 'pageshow', 'focus', 'pointermove',
  'pointerdown', 'keydown']) addEventListener(name, alive);
addEventListener('offline', () => cable.show());
setInterval(() => {
  const idleMs = 1000 * ($('[data-idle-seconds]')?.dataset.idleSeconds ?? 0);
  const mostMs = document.hidden ? HIDDEN_MS : idleMs || Infinity;
  const rests = elapsed(aliveAt) >= mostMs;
  if (cable.socket && elapsed(cable.heardAt) > STALE_MS) cable.lost();
  if (!cable.live && !rests && sources().length && elapsed(askedAt) > LOOK_MS) {
    askedAt = clocks();
    visit(undefined, 15_000);
  }
  if (!cable.socket || !rests) return;
  cable.release();
  cable.show(true);
}, 3000);

// The page as it is now is given to the service worker, which shows it where there is no
// network: a second after a change, and when it is hidden.
let keepTimer;
function keepSoon() {
  keepTimer ??= setTimeout(keepPage, 1000);
}
function keepPage() {
  keepTimer = clearTimeout(keepTimer);
  const worker = navigator.serviceWorker?.controller;
  // Not a page of nobody, nor of a list that has left
  if (!worker || !owner || stored(all => all.owner !== owner)) return;
  const copy = document.documentElement.cloneNode(true);
  for (const box of $$('[type=checkbox]', copy)) box.toggleAttribute('checked', box.checked);
  hooks.keeping(copy);
  worker.postMessage({ address: hooks.address(), html: copy.outerHTML, files: files(document) });
}
addEventListener('visibilitychange', () => document.hidden && keepPage());
navigator.serviceWorker?.addEventListener('controllerchange', keepPage);

globalThis.live = { $, $$, byId, onClick, order, visit, change, changes, newKey, tell, count,
  renderStreams, morph, hooks };
const before = stored(all => all.owner);
if (owner && before !== owner) forgetOthers();         // a page of nobody touches nothing
takeKept();
addEventListener('DOMContentLoaded', () => {        // the app's script has set hooks by then
  epoch = epochOf(document);
  customElements.get('turbo-stream') ?? customElements.define('turbo-stream', StreamElement);
  customElements.get(SOURCE) ?? customElements.define(SOURCE, CableStreamSource);
  shown();
  deliver();
  navigator.serviceWorker?.register('/sw.js').catch(() => {});
});
'''
add_asset('live.js', compact(LIVE_SCRIPT, SCRIPT_MARKS), 'text/javascript; charset=UTF-8')


SERVICE_WORKER = r'''
// Shows the page as it was last seen where there is no network, or none in time. live.js
// gives it that page, and the names of the files that it needs.
const CACHE = 'page', PATIENCE_MS = 4000;
addEventListener('install', () => skipWaiting());       // a new one takes over at once
addEventListener('activate', event => event.waitUntil(clients.claim()));
addEventListener('message', event => event.waitUntil(keep(event.data)));
addEventListener('fetch', event => {
  const { request } = event, { origin, pathname } = new URL(request.url);
  if (request.method !== 'GET' || origin !== location.origin) return;
  if (request.mode === 'navigate') event.respondWith(networkFirst(request));
  else if (pathname.startsWith('/assets/')) event.respondWith(cacheFirst(request));
});
async function networkFirst(request) {
  const kept = await caches.match(request, { ignoreSearch: true }) ?? await caches.match('/');
  const asked = fetch(request).catch(() => null);
  if (!kept) return await asked ?? Response.error();
  const late = new Promise(resolve => setTimeout(resolve, PATIENCE_MS));
  const answer = await Promise.race([asked, late]);
  return !answer || [502, 503, 504].includes(answer.status) ? kept : answer;
}
async function cacheFirst(request) {
  return await caches.match(request) ?? fetch(request);
}
async function keep({ address, html, files }) {
  const headers = { 'Content-Type': 'text/html; charset=UTF-8', 'Content-Security-Policy':
    "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'" };
  try {
    const cache = await caches.open(CACHE);
    const has = (await cache.keys()).map(({ url }) => new URL(url).pathname);
    await cache.addAll(files.filter(file => !has.includes(file)));
    await cache.put(address, new Response(`<!DOCTYPE html>${html}`, { headers }));
    const old = has.filter(file => file.startsWith('/assets/') && !files.includes(file));
    for (const file of old) await cache.delete(file);   // of before a deploy
  } catch { /* without room for it the page opens with the network alone */ }
}
'''


@app.get('/sw.js')
def service_worker():
    """The service worker. Browsers ask for it again with every visit."""
    bottle.response.content_type = 'text/javascript; charset=UTF-8'
    bottle.response.set_header('Cache-Control', 'no-cache')
    return compact(SERVICE_WORKER, SCRIPT_MARKS)


# === Operate: what the processes tell, and who may see it ================================
# Each process adds what it counted to the notes of the minute and of the quarter, in the cache's
# file, and nothing when nothing was counted. When somebody looks, a bell asks all processes to note
# how they are now.

MINUTE, QUARTER = '60', '900'       # kinds of notes, of what was counted in so many seconds
KEPT = {MINUTE: 60, QUARTER: 96, 'node': 1000, 'error': MAX_PLACES}     # of a kind, the last ones
REPLY_SECONDS = 0.15        # the other processes have to note how they are
MAX_FAILED_LOGINS = 10      # of an address in a minute
STACK_STREAM = shared_stream('stack')
LOOK_SECONDS = 2.0          # between two refreshes of open pages, until LOOKING_SECONDS after the
LOOKING_SECONDS = 600       # last look at one; from then on a minute

cache_db.migrations += [
    ('006 create notes', '''
        CREATE TABLE notes (
            kind        TEXT NOT NULL,          -- of KEPT
            key         TEXT NOT NULL,          -- the time of counts, the process of a node, the
                                                -- place of an error
            at          REAL NOT NULL,
            data        TEXT NOT NULL,          -- JSON
            PRIMARY KEY (kind, key)
        )'''),
]
SELECT_NOTES = '''SELECT key, at, data FROM notes
                  WHERE kind = ? AND at >= ? AND ? IN (key, '') ORDER BY at'''
UPSERT_NOTE = '''INSERT INTO notes (kind, key, at, data) VALUES (?, ?, ?, ?)
                 ON CONFLICT (kind, key) DO UPDATE SET at = excluded.at, data = excluded.data'''
TRIM_NOTES = '''DELETE FROM notes WHERE kind = ? AND at < (
                    SELECT at FROM notes WHERE kind = ? ORDER BY at DESC LIMIT 1 OFFSET ?)'''


class Recorder:
    """Notes what this process has counted, and reads the notes of all."""

    def open(self):
        self._started_at = self._since = now()
        self._asked_at = 0.0
        self._noted = self._counted()
        processes.wakes(metrics.bell, b's')
        self._loop = Loop('metrics', self._turn)

    def close(self):
        self._loop.stop()
        self._turn()        # what was counted last
        cache_db.transact(self._leave)

    def nodes(self):
        """How all processes are: {process: its _state()}. Others have REPLY_SECONDS to note it."""
        metrics.bell.set()
        processes.ring(b's')
        others = {name for name in processes.others() if processes.is_alive(name) is not False}
        if others:
            gevent.sleep(REPLY_SECONDS)
        return {**{name: data for name, _, data in self._notes('node', since=now() - 60)
                   if name in others}, processes.name: self._state()}

    def counts(self, kind):
        """{when it began: Counter} of all the minutes or quarters that are kept: what all processes
        have noted, and this one not yet."""
        span = int(kind)
        counts = {(now() // span - back) * span: collections.Counter()
                  for back in reversed(range(KEPT[kind]))}
        not_yet = '', self._since // span * span, self._counted() - self._noted
        for _, at, data in [*self._notes(kind), not_yet]:
            if at in counts:
                counts[at].update(data)
        return counts

    def errors(self):
        """[(place, when last, {count, first_at, request, traceback}), ...], the last first."""
        return self._notes('error')[::-1]

    def mark_seen(self, place=None):
        """Forget the errors of a place, or all: the next there is news again."""
        cache_db.execute("DELETE FROM notes WHERE kind = 'error' AND ? IN (key, '')",
                         (cleaned(place or ''),))

    def _turn(self):
        """Note what was counted, and how we are if somebody asked. While the file is in trouble it
        waits in memory."""
        errors, counted, at = metrics.errors, self._counted(), now()
        new, state = counted - self._noted, None
        # The notes themselves change what others count, and their message is counted.
        if not new.keys() & metrics.counts.keys() - {'cable_messages_total'}:
            new, counted = {}, self._noted
        if metrics.bell.is_set():
            self._asked_at, state = at, self._state() if processes.others() else None
            metrics.bell.clear()
        try:
            if new or errors or state:
                metrics.errors = {}
                cache_db.transact(self._add, new, errors, state)
            self._noted, self._since = counted, at
        except StorageError as error:
            metrics.errors = {**metrics.errors, **errors}
            log.error('what was counted can not be written: %s', error)
        if new:
            cable.broadcast(STACK_STREAM, REFRESH)
        return self._wait

    def _wait(self):
        gevent.sleep(REPLY_SECONDS / 3)        # a storm of errors is written in parts
        metrics.bell.wait(60 - now() % 60 if now() - self._asked_at > LOOKING_SECONDS else
                          LOOK_SECONDS)

    def _add(self, new, errors, state):
        cache_db.lock('notes')      # other processes add to them too
        notes = [('node', processes.name, now(), state)] if state else []
        for kind in (MINUTE, QUARTER) if new else ():
            at = self._since // int(kind) * int(kind)
            noted = [data for _, _, data in self._notes(kind, f'{at:.0f}')]
            notes.append((kind, f'{at:.0f}', at, sum(noted, new)))
        for place, error in errors.items():
            for _, _, before in self._notes('error', place):
                error = {**error, 'count': error['count'] + before['count'],
                         'first_at': before['first_at']}
            notes.append(('error', place, error['last_at'], error))
        cache_db.executemany(UPSERT_NOTE, [(*note, to_json(data)) for *note, data in notes])
        cache_db.executemany(TRIM_NOTES, [(kind, kind, kept - 1) for kind, kept in KEPT.items()])

    def _leave(self):
        cache_db.lock('notes')      # what the stopped loop wrote last comes first
        cache_db.execute("DELETE FROM notes WHERE kind = 'node' AND key = ?", (processes.name,))

    def _notes(self, kind, key='', since=0.0):
        """[(key, time, data), ...] in the order of time."""
        return [(key, at, collections.Counter(json.loads(data)))
                for key, at, data in cache_db.execute(SELECT_NOTES, (kind, since, key))]

    def _counted(self):
        """What was counted, here and by others for us."""
        counted = metrics.counts.copy()
        for name in ('hits', 'misses', 'evictions'):
            counted[f'cache_{name}_total'] = getattr(cache, name)
        for name, database in databases.items():
            counted[f'database_changed_rows_total\t{name}'] = database.changed_rows()
        return counted

    def _state(self):
        """How this process is: what is measured only when somebody looks."""
        sockets = [each for group in connections.values() for each in group]
        failing = [name for name, loop in loops.items() if not loop.alive]
        gauges = {
            f'build_info\t{__version__}': 1, 'loops_failing': len(failing),
            'cable_sockets': len(sockets),
            'cable_subscriptions': sum(len(each.subscriptions) for each in sockets),
            'process_start_time_seconds': self._started_at,
            'process_cpu_seconds_total': time.process_time(),
            'process_open_fds': len(os.listdir('/dev/fd')),
            'process_greenlets': sum(not each.dead for each in gc.get_objects()
                                     if issubclass(type(each), gevent.Greenlet))}
        with contextlib.suppress(OSError), open('/proc/self/statm', 'rb') as file:      # Linux
            gauges['process_resident_memory_bytes'] = int(file.read().split()[1]) * mmap.PAGESIZE
        return {'counted': self._counted(), 'gauges': gauges, 'failing': failing,
                'slowest': [*metrics.slowest.items()]}


class StallWatch:
    """Times each turn of the event loop. A timer of the kernel goes off in one that takes too long,
    and looks what it is at: in C, when that is over. For the main thread of a server."""

    def open(self):
        self._limit, self._began, self._where = settings.stall_ms / 1000, time.perf_counter(), ''
        if self._limit:
            signal.signal(signal.SIGALRM, self._look)
            # The first call after the wait for events, and the last before it.
            loop = gevent.get_hub().loop
            self._watchers = loop.check(ref=False, priority=2), loop.prepare(ref=False, priority=-2)
            for watcher, act in zip(self._watchers, (self._begin, self._end)):
                watcher.start(act)

    def _begin(self):
        self._began, self._where = time.perf_counter(), ''
        signal.setitimer(signal.ITIMER_REAL, self._limit)

    def _end(self):
        signal.setitimer(signal.ITIMER_REAL, 0)         # or it would wake who waits for events
        seconds = time.perf_counter() - self._began
        if seconds >= self._limit:
            metrics.time(seconds, 'event_loop_stall_seconds')
            metrics.slow(f'event loop: {self._where}', seconds)
            log.warning('the event loop stood still seconds=%.3f at=%s', seconds, self._where)

    def _look(self, number, frame):
        self._where = ' < '.join(
            f'{each.name} ({os.path.basename(each.filename)}:{each.lineno})'
            for each in reversed(traceback.extract_stack(frame)[-4:]))


stalls = StallWatch()
recorder = Recorder()
logins = WriteLimit()       # of wrong passwords


def admit(token=''):
    """Refuse who does not give the password, or this token: 401, 429, or 404 where nobody may."""
    environ, rights = bottle.request.environ, [settings.stack_password, token]
    if not settings.stack_password and _is_at_the_machine(environ):
        return
    if not any(rights):
        raise NotFound(f'Nobody may see this: {PREFIX}STACK_PASSWORD is not set.')
    limit = ('wrong passwords', client_address(environ), MAX_FAILED_LOGINS, MAX_FAILED_LOGINS)
    header = environ.get('HTTP_AUTHORIZATION', '')
    given = (bottle.request.auth or header.partition(' '))[-1].strip()      # Basic, or Bearer
    logins.add(*limit, by=bool(given))      # who was wrong too often is not heard, right or wrong
    # Of one length: the time of a comparison tells nothing.
    mine, *theirs = (hashlib.sha256(text.strip().encode()).digest() for text in (given, *rights))
    if not (given and any(hmac.compare_digest(mine, each) for each in theirs)):
        if given:
            log.warning('wrong password address=%s path=%s', limit[1], environ['PATH_INFO'])
        raise bottle.HTTPError(401, 'This page wants a password.',
                               WWW_Authenticate=f'Basic realm="{APP} stack", charset="UTF-8"')
    logins.add(*limit, by=-1)       # it was right


def _is_at_the_machine(environ):
    """Whether a developer asks from the same machine, by its name: through no proxy, and from no
    page of another site whose name leads here."""
    host = re.match(r'(localhost|127\.0\.0\.1|\[::1])(:\d*)?$', environ.get('HTTP_HOST', ''), re.I)
    proxied = any(re.match('HTTP_(X_FORWARDED|FORWARDED|X_REAL|VIA)', name) for name in environ)
    return (settings.env == 'development' and not settings.trust_proxy and host and not proxied
            and environ.get('REMOTE_ADDR') in ('127.0.0.1', '::1'))


@app.get('/metrics', unmeasured=True)       # or to look would be to change
def show_metrics():
    """For Prometheus, under the password or a bearer token of its own."""
    admit(settings.metrics_token)
    bottle.response.content_type = 'text/plain; version=0.0.4; charset=utf-8'
    return '\n'.join([*exposition(recorder.nodes()), ''])


def measured(nodes, counted=None):
    """{process: {'name<tab>label…': number or None}} of METRICS, and of others, which nobody sees;
    '' for what is of no process alone. counted: in the place of what each has counted."""
    shared = {f'jobs\t{queue}\t{state}': 0 for queue in QUEUES for state in STATES}
    shared |= {'\t'.join(('jobs', *key)): number for key, number in jobs.counts().items()}
    paused = jobs.paused()
    shared |= {f'jobs_paused\t{queue}': int(queue in paused) for queue in QUEUES}
    for name, *times in jobs.recurring():
        shared |= {f'recurring_{which}_timestamp_seconds\t{name}': at
                   for which, at in zip(('last', 'next'), times)}
    groups = [('cache_', '', cache.stats()), ('cable_', '', cable.stats())]
    for name, database in databases.items():
        facts = database.facts()
        groups += [('database_', f'\t{name}', facts), ('postgresql_', '', facts['server'])]
    for group, label, numbers in groups:
        shared |= {f'{group}{name}{label}': number for name, number in numbers.items()}
    return {'': {**shared, **(counted or {})}, **{
        process: {**(node['counted'] if counted is None else {}), **node['gauges']}
        for process, node in nodes.items()}}


def families(values):
    """measured() as {name: {((label, text), ...): {bucket: number}}}; '' if it is no histogram."""
    found = {name: collections.defaultdict(collections.Counter) for name in METRICS}
    for process, numbers in values.items():
        for key, number in numbers.items():
            name, *texts = key.split('\t')
            if name in METRICS and number is not None:
                kind, _, names = METRICS[name]
                bucket = texts.pop() if kind == 'histogram' else ''
                labels = (*zip(names, texts), *([('process', process)] if process else []))
                found[name][labels][bucket] += number
    return found


def exposition(nodes):
    """The lines of all metrics. Source: prometheus.io/docs/instrumenting/exposition_formats"""
    def sample(suffix, number, **more):
        texts = ','.join(f'{label}={json.dumps(text, ensure_ascii=False)}'
                         for label, text in (*labels, *more.items()))
        return f'{name}{suffix}{texts and f"{{{texts}}}"} {number}'

    for name, family in families(measured(nodes)).items():
        kind, meaning, _ = METRICS[name]
        name = name if name.startswith('process_') else f'{APP}_{name}'
        if family:
            yield from (f'# HELP {name} {meaning}.', f'# TYPE {name} {kind}')
        for labels, numbers in family.items():
            if kind != 'histogram':
                yield sample('', numbers[''])
                continue
            sums = [*itertools.accumulate(numbers[bucket] for bucket in BUCKETS)]
            yield from (sample('_bucket', number, le=le) for le, number in zip(BUCKETS, sums))
            yield from (sample('_sum', numbers['sum']), sample('_count', sums[-1]))


# === Stack page: the four services, live, and what can be done about them ================
# Complete without script. With it, a message on the cable has the page loaded again and morphed in.
# A panel is (caption, heads, rows); a row (cells, ACTS, value of their field, text to ask for).

LIST_JOBS = 50              # of those that match
LONG = re.compile(r'(?s)\A(.{500}).+')          # of a fact about a job
FILTERS = ('id', 'state', 'name', 'queue')      # of jobs
ALL = 'the last hour'       # a column: how often
QUANTILES = {'time p50 ≤': .5, 'time p95 ≤': .95, 'time p99 ≤': .99}    # columns, in seconds
PANELS = {      # how the names of its metrics begin, labels that a row is for: see _table()
    'Queues': (('jobs', 'job_wait'), ('queue',)),
    'Tasks': (('recurring', 'job_duration'), ('name',)),
    'Routes': ('http', ('method', 'route')),
    'Databases': ('database', ('database',)),
    'PostgreSQL': ('postgresql', ()),
    'Cache': ('cache', ()),
    'Cable': ('cable', ()),
    'Processes': (('process', 'build', 'loops'), ('process',)),
}
CHARTS = (      # title, a histogram, columns of its table
    ('Requests: all, failed', 'http_request_duration_seconds', (ALL, '5xx')),
    ('Answer time: p50, p99', 'http_request_duration_seconds', ('time p50 ≤', 'time p99 ≤')),
    ('Jobs: all, failed', 'job_duration_seconds', (ALL, 'failed')),
    ('Job wait: p50, p99', 'job_wait_seconds', ('time p50 ≤', 'time p99 ≤')),
)
ACTS = {        # (field of the form, function)
    **{act: ('id', functools.partial(jobs.change, act)) for act in CHANGE_JOBS},
    'pause': ('queue', jobs.pause), 'resume': ('queue', jobs.resume),
    'start': ('name', jobs.run_recurring), 'seen': ('place', recorder.mark_seen),
    'clear': ('', lambda _: cache.clear()),
}


def perform(act, wanted):
    """Do one of ACTS to what a dict names, or to all jobs that match; says what. Raises JobError."""
    field, function = ACTS[act]
    done = function(*map(wanted.get, FILTERS if act in CHANGE_JOBS else (field,)))
    cable.broadcast(STACK_STREAM, REFRESH)      # to the other pages that are open
    if act in CHANGE_JOBS:
        return f'{act}: {done} job{"s" * (done != 1)}'
    return f'{act}: {wanted.get(field, "all")}'


@app.get('/stack', unmeasured=True)
def show_stack():
    """The page. Parameters: FILTERS of the jobs listed; chart: hour or day; said: what was done."""
    admit()
    query = {name: value for name, value in bottle.request.query.items()
             if value and name != 'said' and (name != 'state' or value in STATES)}
    nodes, hour = recorder.nodes(), recorder.counts(MINUTE)
    matching = jobs.counts(*map(query.get, FILTERS))
    return render(
        'stack', app=APP, source=stream_source(STACK_STREAM), acts=ACTS, crc32=zlib.crc32,
        wanted=query, chart=query.get('chart', 'hour'), encoded=urllib.parse.urlencode,
        said=bottle.request.query.said if came_from() == '/stack' else '',      # no link says it
        matching=sum(matching.values()), paused=sorted(jobs.paused()),
        fit={act: fit for act, (states, _) in CHANGE_JOBS.items() if (fit := sum(
            number for (_, state), number in matching.items() if state in states))},
        choices={'state': STATES, 'name': sorted(jobs.tasks), 'queue': QUEUES},
        failing=sorted({name for node in nodes.values() for name in node['failing']}),
        charts=_charts(recorder.counts(QUARTER) if query.get('chart') == 'day' else hour),
        panels=[*_lists(query, nodes), *_panels(nodes, sum(hour.values(), collections.Counter()))])


@app.post('/stack/<act>', unmeasured=True)
def act_on_stack(act):
    """Do one of ACTS, to what the form names, or to all jobs that the page shows."""
    admit()
    if act not in ACTS:
        raise NotFound(f'There are {", ".join(ACTS)}.')
    query = dict(urllib.parse.parse_qsl(str(fields().get('query', ''))))
    form = {**query, **{name: str(value) for name, value in fields().items() if value}}
    try:
        said = perform(act, form)
    except JobError as error:
        raise InvalidField(str(error)) from None
    log.info('stack page: %s by=%s', said, client_address(bottle.request.environ))
    return respond(turbo_stream('update', 'notice', bottle.html_escape(said)) + REFRESH,
                   {'done': said}, f'/stack?{urllib.parse.urlencode({**query, "said": said})}')


def _lists(query, nodes):
    """Panels of jobs, errors, and what was slow."""
    found = []
    for job in map(without_secrets, jobs.list(LIST_JOBS, *map(query.get, FILTERS))):
        most = jobs.tasks[job.name].attempts if job.name in jobs.tasks else '?'
        facts = {**job._asdict(), 'arguments': json.dumps(job.arguments, ensure_ascii=False)}
        facts = [LONG.sub(r'\1…', f'{name}: {_at(value) if name.endswith("_at") else value}')
                 for name, value in facts.items() if value and name != 'error']
        found.append((
            (job.name, job.state, f'{job.attempts} of {most}',
             _at(job.failed_at or job.next_at or job.started_at)),
            [act for act, (states, _) in CHANGE_JOBS.items() if job.state in states],
            job.id, '\n'.join([*facts, '', job.error or ''])))
    slow = [(*took, what) for node in nodes.values() for what, took in node['slowest']]
    return [
        ('Jobs', ('task', 'state', 'attempts', 'when'), found),
        ('Errors', ('where', 'count', 'first', 'last'), [
            ((place, error['count'], _at(error['first_at']), _at(at)), ['seen'], place,
                f'request: {error["request"]}\n\n{error["traceback"]}')
            for place, at, error in recorder.errors()]),
        ('Slowest', ('what', 'took', 'at', 'request'), [
            ((what, _figure('seconds', seconds), _at(at), request or '–'), (), '', '')
            for seconds, at, request, what in sorted(slow, key=lambda each: -each[0])[:SLOWEST]]),
    ]


def _panels(nodes, hour):
    """PANELS: how it is now, and what was counted in the last hour."""
    gets = hour['cache_hits_total'] + hour['cache_misses_total']
    hour['cache_hit_ratio'] = hour['cache_hits_total'] / gets if gets else None
    found, paused = families(measured(nodes, hour)), jobs.paused()
    acts = {('Cache', ''): ['clear'],
            **{('Tasks', name): ['start'] for name, *_ in jobs.recurring()},
            **{('Queues', queue): ['resume' if queue in paused else 'pause'] for queue in QUEUES}}
    names = {**{('Databases', name): database.path for name, database in databases.items()},
             **{('Queues', queue): f'{queue} (nobody serves it)'
                for (_, queue), _ in found['jobs'] if queue not in QUEUES}}
    for caption, (begins, by) in PANELS.items():
        rows = _table(found, begins, by)
        columns = [name for name, (kind, _, labels) in METRICS.items()
                   if name.startswith(begins) and kind != 'histogram' and not {*labels} - {*by}]
        columns += sorted({column for row in rows.values() for column in row} - {*columns})
        heads = [re.sub('^[a-z]+_|[_ ](bytes|timestamp|seconds|total|≤)', '', column)
                 .replace('_', ' ').replace('time p', 'wait p' if caption == 'Queues' else 'time p')
                 for column in columns]
        if rows:
            yield caption, [' '.join(by) or 'of', *heads], [
                ([names.get((caption, key), key or caption.lower()),
                  *(_figure(column, row.get(column)) for column in columns)],
                 acts.get((caption, key), ()), key, '') for key, row in sorted(rows.items())]


def _table(found, begins, by):
    """{texts of the labels `by`: {column: number}} of families() whose names begin so. What has
    other labels has a column for each text of the last, an info one for each label; a histogram
    has ALL and QUANTILES."""
    rows, times = (collections.defaultdict(collections.Counter) for _ in range(2))
    for name, family in found.items():
        for labels, numbers in family.items() if name.startswith(begins) else ():
            key = ' '.join(text for label, text in labels if label in by)
            others = [each for each in labels if each[0] not in (*by, 'process')]
            if name.endswith('_info'):
                dict.update(rows[key], others)
                continue
            columns = [text for _, text in others[-1:]]
            if METRICS[name][0] == 'histogram':
                columns.append(ALL)
                times[key].update(numbers)
            for column in columns or [name]:
                rows[key][column] += sum(numbers.values()) - numbers['sum']
    for key, numbers in times.items():
        # The bound of a bucket is true; a place in it would be a guess, and at times too long.
        sums = [*itertools.accumulate(numbers[bucket] for bucket in BUCKETS)]
        for column, share in QUANTILES.items():
            at = bisect.bisect_left(sums, share * sums[-1])
            rows[key][column] = (*BOUNDS, BOUNDS[-1] + 1)[at]
    return rows


def _charts(counts):
    """(title, the highest value, paths of two lines, rows) of each of CHARTS."""
    found = families({str(at): counted for at, counted in counts.items()})      # as processes
    tables = {name: _table(found, name, ('process',)) for name in {name for _, name, _ in CHARTS}}
    for title, name, columns in CHARTS:
        points = [[tables[name][str(at)].get(column, None if column in QUANTILES else 0)
                   for column in columns] for at in counts]
        highest = max(filter(None, itertools.chain(*points)), default=0)
        lines = [' L'.join(f'{300 * x / len(points):.1f} {60 - 58 * y / (highest or 1):.1f}'
                           for x, y in enumerate(values) if y is not None)
                 for values in zip(*points)]
        yield title, _figure(columns[0], highest), lines, [
            ([_at(at), *map(_figure, columns, two)], (), '', '')
            for at, two in zip(counts, points) if any(two)]


def _figure(name, number):
    """A number as people read it, by the unit at the end of its name; a counter's of an hour."""
    if number is None:
        return '0' if name.endswith('_total') else 'not copied' if 'copied' in name else '–'
    if isinstance(number, str):
        return number
    if name in QUANTILES:
        return f'> {BOUNDS[-1]} s' if number > BOUNDS[-1] else f'≤ {_figure("seconds", number)}'
    if name.endswith(('timestamp_seconds', 'time_seconds')):
        return _at(number)
    if 'seconds' in name:
        return f'{number * 1000:.3g} ms' if number < 1 else f'{number:,.4g} s'
    if name.endswith('bytes'):
        return f'{number / 1000:,.0f} kB' if number < 10**7 else f'{number / 10**6:,.0f} MB'
    if name == 'jobs_paused':
        return 'yes' if number else 'no'
    if name.endswith('ratio'):
        return f'{number:.0%}'
    return f'{number / 3600:,.3g}/s' if name.endswith('_total') and number >= 3600 else \
        f'{number:,.0f}'


def _at(at):
    """A time of today, or of another day, in UTC."""
    form = '%H:%M:%S' if at and abs(now() - at) < 43200 else '%Y-%m-%d %H:%M'
    return time.strftime(form, time.gmtime(at)) if at else '–'


TEMPLATES['stack'] = '''\
% def button(act, label, about, anchor, value=''):
<button type="submit" form="act" formaction="/stack/{{act}}#{{anchor}}" name="{{acts[act][0]}}"
 value="{{value}}" aria-label="{{label}}{{about and ' ' + about}}">{{label}}</button>
% end
% def table(caption, heads, rows):
%  before = caption
<table><thead><tr>
%  for head in heads:
<th scope="col">{{head}}</th>
%  end
</tr></thead><tbody>
%  for cells, its_acts, value, text in rows:
%   id = f'row_{crc32((caption + value).encode())}'
<tr{{!f' id="{id}"' if value else ''}}>
%   for number, (head, cell) in enumerate(zip(heads, cells)):
%    if text and not number:
<td><details><summary>{{cell}}</summary><pre>{{text}}</pre></details></td>
%    else:
<td data-label="{{head}}">{{cell}}</td>
%    end
%   end
<td>
%   about = cells[0] if value in cells[0] else f'{cells[0]} {value}'
%   for act in its_acts:
%    button(act, act.capitalize(), about, before, value)
%   end
</td></tr>
%   before = id
%  end
</tbody></table>
% end
% rebase('plain', title=f"{'failing' if failing else 'well'} · {app} stack", style='stack.css')
<script type="module" src="{{asset('stack.js')}}"></script>
{{!source}}
<main>
<h1>{{app}} <span>stack</span></h1>
<p class="{{'bad' if failing else 'soft'}}">
{{f'Failing: {", ".join(failing)}' if failing else 'All loops are well'}}.
{{paused and f'Paused: {", ".join(paused)}.' or ''}} The last
% for span in ('hour', 'day'):
{{'or' if span == 'day' else ''}} <a href="/stack?{{encoded({**wanted, 'chart': span})}}" data-visit
{{!'aria-current="true"' if span == chart else ''}}>{{span}}</a>
% end
in UTC.</p>
<form id="act" method="post"><input type="hidden" name="query" value="{{encoded(wanted)}}"></form>
<div class="charts">
% for title, highest, lines, rows in charts:
<figure><figcaption>{{title}} <div class="soft">highest {{highest}}</div></figcaption>
<svg viewBox="0 0 300 62" preserveAspectRatio="none" aria-hidden="true">
<path d="M{{lines[0] or '0 60'}}h.1"/><path class="bad" d="M{{lines[1] or '0 60'}}h.1"/></svg>
<details><summary aria-label="{{title}}, as a table">as a table</summary>
% table('', ('from', *title.partition(': ')[2].split(', ')), rows)
</details></figure>
% end
</div>
% for caption, heads, rows in panels:
<section><h2 id="{{caption}}" tabindex="-1">{{caption}}</h2>
% if caption == 'Jobs':
<form class="row" method="get"><input type="hidden" name="chart" value="{{chart}}">
% for key, words in choices.items():
<label>{{key}} <select name="{{key}}"><option value="">any</option>
% for word in words:
<option{{!' selected' if word == wanted.get(key) else ''}}>{{word}}</option>
% end
</select></label>
% end
<button type="submit">Show</button></form>
% filters = ''.join(f', {key} {wanted[key]}' for key in choices if wanted.get(key))
<details class="row"><summary>All {{f'{matching:,} jobs{filters} ({len(rows)} shown)'}}</summary>
% for act, number in fit.items():
% button(act, f'{act.capitalize()} all {number:,}', f'jobs{filters}', caption)
% end
</details>
% elif caption == 'Errors' and rows:
% button('seen', 'Mark all as seen', '', caption)
% end
% table(caption, heads, rows)
</section>
% end
<div role="status">
<p id="notice" data-turbo-permanent>{{said}}</p>
<p data-connection data-turbo-permanent hidden></p>
</div>
</main>
'''
add_asset('stack.js', '''\
// To ask before what acts on all, and where the focus goes when what has it goes.
const { $, hooks } = globalThis.live;
hooks.submitting = (form, { value, ariaLabel }) => value || confirm(`${ariaLabel}?`);
hooks.leave = node => {
  const focused = document.activeElement, act = focused.getAttribute('formaction')?.split('#')[0];
  const next = focused.closest('tr')?.nextElementSibling?.querySelector(`[formaction^="${act}#"]`);
  if (node.contains(focused)) (next ?? $('h2', focused.closest('section') ?? document)).focus();
  node.remove();
};
''', 'text/javascript; charset=UTF-8')
add_asset('stack.css', '''\
body { max-width: 68rem; font-size: .9375rem; font-variant-numeric: tabular-nums; }
h2 { margin: 2.5rem 0 .5rem; font-size: 1.125rem; font-weight: 500; }
h1 span, th, .soft, tbody::before { color: var(--soft); font-weight: inherit; }
.bad { color: var(--danger); }
[aria-current] { color: inherit; font-weight: 600; text-decoration: none; }
[role=status] { position: sticky; bottom: 1rem; width: fit-content; margin-top: 1rem; }
div > p { padding: .5rem 1rem; border-radius: 10px; background: var(--ink); color: var(--paper); }
select { background: var(--paper); }
summary { cursor: pointer; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: 1rem; }
figure { padding-top: 1rem; }
svg { width: 100%; height: 4.5rem; border-bottom: 1px solid var(--line); color: var(--accent); }
path {
  fill: none; stroke: currentcolor; stroke-width: 2; vector-effect: non-scaling-stroke;
  stroke-linecap: round;        /* a minute alone is a point */
}
.row { display: flex; flex-wrap: wrap; gap: .75rem 1.25rem; align-items: center; padding: .5rem 0; }
table { width: 100%; border-collapse: collapse; }
tr { border-bottom: 1px solid var(--line); }
th, td { padding: .5rem 1rem .5rem 0; text-align: left; vertical-align: baseline; }
th, td + td, figure td { white-space: nowrap; }
td:has(summary) { width: 100%; }
tbody:not(:has(tr))::before { content: 'None.'; }
@media (width < 60rem) {
  thead { display: none; }
  tr { display: flex; flex-wrap: wrap; gap: .125rem 1rem; align-items: center; padding: .5rem 0; }
  td { padding: 0; }
  td:first-child { flex-basis: 100%; }
  td + [data-label]::before { content: attr(data-label) ' '; color: var(--soft); }
}
@media (width >= 60rem) { button, select { min-height: 2.25rem; } }
''', 'text/css; charset=UTF-8')


# === Process: open, serve, stop ==========================================================
# Start: settings, files, migrations, secret, loops, and only then the port. Stop, on SIGTERM or
# SIGINT, in less than Docker's 10 seconds: no new connections, requests end, sockets are told to
# come back, jobs are given back, files are closed, exit status 0 (on any other, Litestream skips
# its last sync).
#
# With WEB_CONCURRENCY a parent binds the port and opens no file. Its children are this program
# again, and find each other as any processes on one directory do. Who has died is replaced; at
# SIGHUP each in turn is, by what the file of the program has become; with --reload at once.

READY_SECONDS = 60          # a child that takes longer does not replace another
CHILD_STOP_SECONDS = 9      # then it is killed: longer than its longest stop, shorter than Docker's
RELOAD_SECONDS = 0.3        # between two looks at the program's file, with --reload
LITESTREAM_SECONDS = 3      # before that it has not seen new files (litestream #436)
RESTORING = '.restoring'    # suffix of the file that is there while restore() changes the others


class TextLines(logging.Formatter):
    """The id of the request, or of that which enqueued the job, at the end of a line."""

    def formatMessage(self, record):
        id = request_id.get()
        return super().formatMessage(record) + (f' request={id}' if id else '')


class JsonLines(logging.Formatter):
    """One JSON object a line."""

    def format(self, record):
        line = {'time': round(record.created, 3), 'pid': record.process,
                'level': record.levelname.lower(), 'message': record.getMessage()}
        if request_id.get():
            line['request'] = request_id.get()
        if record.exc_info:
            line['traceback'] = self.formatException(record.exc_info)
        return json.dumps(line)


def start_logging(form='text'):
    """Log to stderr, as text or json."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if form == 'json' else
                         TextLines('%(asctime)s %(process)d %(levelname)-7s %(message)s'))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False
    gevent.get_hub().print_exception = _log_failed


def _log_failed(context, kind, error, trace):
    """A greenlet, or a callback, has raised something."""
    if error is not None:
        metrics.failed('loop', 'greenlet', error)
    log.error('failed: %s', context, exc_info=(kind, error, trace))


def open_stack(environ=None, run_jobs=False):
    """Open the files of the app and the services on them, until the block ends: for a script, a
    test, or a server. Raises AppError, and leaves nothing open then.

    environ: a dict of settings; None: the environment. run_jobs: here too; else a job that is
    enqueued waits for a server, and wakes one that runs.
    """
    if processes.name:
        raise MisuseError('the stack is open already')
    load_settings(os.environ if environ is None else environ)
    return open_services(run_jobs)


@contextlib.contextmanager
def open_services(run_jobs):
    """open_stack(), with the settings as they were loaded."""
    for name, version, least in (('SQLite', sqlite3.sqlite_version, (3, 35)),
                                 ('bottle', bottle.__version__, (0, 13)),
                                 ('gevent', gevent.__version__, (23, 9))):
        if tuple(int(part) for part in re.findall(r'\d+', version)[:2]) < least:
            raise SettingError(f'{name} {version} is too old here: {least[0]}.{least[1]} or later '
                               f'is needed')
    bottle.BaseRequest.MEMFILE_MAX = settings.max_body_bytes    # bottle's bound of forms and JSON
    services = [processes, *databases.values(), keys, cache, cable, heartbeat, recorder]
    if settings.database_url:
        services.insert(0, PostgreSQL())
    else:
        make_data_directory()
    with contextlib.ExitStack() as opened:
        for service in services:
            service.open()
            opened.callback(_close_quietly, service)
            if service is processes and os.path.exists(app_db.path + RESTORING):
                # The lock of processes says that no restore runs now.
                raise StorageError(f'a restore to {settings.data} did not come to its end; run it '
                                   f'again, with --force')
        if run_jobs:
            jobs.open(settings.job_workers)
            opened.callback(_close_quietly, jobs)
        yield


@jobs.every(3600, queue='low')
def tidy_up():
    """Delete what has had its time: expired cache entries, old failures."""
    log.info('tidied up cache=%s jobs=%s', cache.prune(), jobs.prune())


def make_data_directory():
    """Raises SettingError."""
    try:
        os.makedirs(settings.data, mode=0o700, exist_ok=True)
    except OSError as error:
        raise SettingError(f'{PREFIX}DATA is {settings.data!r}, which can not be a directory: '
                           f'{error.strerror}') from None


def _close_quietly(service):
    """Close it, and go on with the others whatever happens."""
    try:
        service.close()
    except Exception:
        log.exception('could not close %s', type(service).__name__)


class Child:
    """Another process of this program, on our listener, which is its fd 3. Its fd 4 is a line to
    us: there it says that it is ready, and each side hears of the other's end."""
    running = set()

    def __init__(self, listener):
        self.ready = gevent.event.AsyncResult()     # whether it came so far
        self.ended = gevent.event.Event()
        line, theirs = gevent.socket.socketpair()
        # Copied out of the way first, or one could take the other's number.
        fds = [fcntl.fcntl(each, fcntl.F_DUPFD_CLOEXEC, 10) for each in (listener, theirs)]
        try:
            self.pid = os.posix_spawn(
                sys.executable, [sys.executable, *sys.orig_argv[1:]],
                {**os.environ, 'LISTEN_FDS': '2', 'LISTEN_FDNAMES': FD_NAMES},
                file_actions=[(os.POSIX_SPAWN_DUP2, fds[0], LISTENER_FD),
                              (os.POSIX_SPAWN_DUP2, fds[1], PARENT_FD)],
                setsigmask=[signal.SIGINT, signal.SIGHUP])      # a terminal sends them to all
        finally:
            theirs.close()
            for fd in fds:
                os.close(fd)
        self.running.add(self)
        gevent.spawn(self._listen, line)

    def _listen(self, line):
        with line:
            self.ready.set(line.recv(1) != b'')
            line.recv(1)
        os.kill(self.pid, signal.SIGKILL)       # who has hung up is dead, or must be
        os.waitpid(self.pid, 0)
        self.running.discard(self)
        self.ended.set()

    def stop(self):
        """Tell it to end, and wait until it has."""
        for number, seconds in ((signal.SIGTERM, CHILD_STOP_SECONDS), (signal.SIGKILL, None)):
            if not self.ended.is_set():
                os.kill(self.pid, number)
            self.ended.wait(seconds)


class Parent:
    """Keeps WEB_CONCURRENCY children on a listener until an event is set."""

    def __init__(self, listener, stopping):
        self._listener, self._stopping = listener, stopping
        self._hung_up = gevent.event.Event()
        self._children = [Child(listener) for _ in range(settings.web_concurrency)]
        self._status = 0
        self._changed_at = _program_changed_at()

    def run(self, reload):
        """Gives the exit status; it is 1 if one of the first children does not get ready. reload:
        replace them when the file of the program has changed."""
        gevent.signal_handler(signal.SIGHUP, self._hung_up.set)
        gevent.spawn(self._begin)
        work = [Loop('replacing', self._replace)]
        work += [Loop(f'child {index}', functools.partial(self._keep, index))
                 for index in range(len(self._children))]
        work += [Loop('watching', self._watch)] if reload else []
        self._stopping.wait()
        log.info('stopping')
        for loop in work:
            loop.stop()
        self._listener.close()
        gevent.joinall([gevent.spawn(child.stop) for child in Child.running])
        log.info('stopped')
        return self._status

    def _begin(self):
        ready = all([child.ready.get() for child in self._children])
        if self._stopping.is_set():
            return
        if ready:
            say_where(self._listener)
        else:
            self._status = 1
            self._stopping.set()

    def _keep(self, index):
        """Wait for the end of a child, and start another."""
        child = self._children[index]
        child.ended.wait()
        gevent.sleep(RESTART_SECONDS if child.ready.value else MAX_RESTART_SECONDS)
        if child is self._children[index]:      # else it was replaced
            log.error('child %s had ended, another starts', child.pid)
            self._children[index] = Child(self._listener)

    def _replace(self):
        """At SIGHUP, replace one child after the other, until a new one fails."""
        self._hung_up.wait()
        self._hung_up.clear()
        for index in range(len(self._children)):
            new = Child(self._listener)
            if not new.ready.wait(READY_SECONDS):
                log.error('child %s did not get ready, child %s stays', new.pid,
                          self._children[index].pid)
                return new.stop()
            old, self._children[index] = self._children[index], new
            log.info('child %s takes the place of %s', new.pid, old.pid)
            old.stop()

    def _watch(self):
        gevent.sleep(RELOAD_SECONDS)
        changed_at = _program_changed_at()
        if changed_at not in (self._changed_at, None):
            self._changed_at = changed_at
            self._hung_up.set()


def _program_changed_at():
    """None while an editor puts a new file in its place."""
    with contextlib.suppress(OSError):
        return [os.stat(path).st_mtime_ns for path in (__file__, sys.argv[0])]


def serve(reload=False):
    """Run until SIGTERM or SIGINT. Gives the exit status. reload: when the file of the program has
    changed, that is served, and open tabs load their page again."""
    started_at = time.monotonic()
    stopping = gevent.event.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        gevent.signal_handler(number, stopping.set)
    listener, has_parent = inherit(os.environ)
    if has_parent:
        gevent.spawn(end_with_parent)
    elif settings.web_concurrency > 1 or reload:
        return Parent(listener or listen(), stopping).run(reload)
    with open_services(run_jobs=True):
        server = Server(listener or listen())
        stalls.open()
        cable.reloads = reload
        server.start()
        if has_parent:
            os.write(PARENT_FD, b'!')           # ready
        else:
            say_where(server.socket)
        stopping.wait()
        log.info('stopping')
        server.drain()
        if reload:
            cable.begin_anew()      # now that nobody can get the page from here
        if settings.litestream:
            gevent.sleep(max(0, started_at + LITESTREAM_SECONDS - time.monotonic()))
    signal.setitimer(signal.ITIMER_REAL, 0)         # of StallWatch: it would outlive its handler
    log.info('stopped')
    return 0


def say_where(listener):
    host, port = listener.getsockname()[:2]
    log.info('%s %s is at http://%s:%s (data in %s; Ctrl-C stops it)', APP, __version__,
             f'[{host}]' if ':' in host else host, port,
             'PostgreSQL' if settings.database_url else settings.data)


def end_with_parent():
    """A child whose parent was killed is killed too: Litestream, if it started that, copies once
    more now, and would not see what is acknowledged later."""
    gevent.socket.wait_read(PARENT_FD)
    os._exit(1)


# === Backups: copies, restores, checks, for those without Litestream =====================
# A copy of a file is one read transaction, so it is consistent while the app serves. The app
# database goes first: a job moves from there to the job database, and is in one of the two copies,
# or in both, where its id makes it one.

ARCHIVES = {'.tar.gz': 'gztar', '.tgz': 'gztar', '.tar': 'tar', '.zip': 'zip'}    # as shutil says
OTHER_ARCHIVES = ('.gz', '.bz2', '.xz', '.zst', '.7z', '.rar')


class BackupError(AppError):
    """A backup that can't be made or restored; nothing was overwritten."""


def backup(target):
    """Copy the databases that are worth it to a directory or an archive; the app may run. What was
    there is replaced when the copies are whole: an archive at once, a directory file by file, so a
    kill between two of them leaves old ones beside new ones. Raises BackupError, StorageError."""
    kind = _kind_of(target, 'backup')
    for database in _copied().values():
        if not os.path.isfile(database.path):
            raise StorageError(f'there is no {database.path}; set {PREFIX}DATA and '
                               f'{PREFIX}ENV as the app has them')
    folder = os.path.abspath(target)
    with _sentences(target):
        if kind:
            folder = os.path.dirname(folder)
        elif not os.path.isdir(folder):
            os.makedirs(folder, mode=0o700)
            give_to_owner(folder)
        with tempfile.TemporaryDirectory(prefix='.backup-', dir=folder) as scratch:
            copies = os.path.join(scratch, 'copies')
            os.mkdir(copies)
            for name, database in _copied().items():
                _copy(database, database.path, os.path.join(copies, name))
            # The app goes last: with the jobs of a newer copy none of its own is missing.
            made = {name: os.path.join(copies, name) for name in reversed(_copied())}
            if kind:
                packed = shutil.make_archive(os.path.join(scratch, 'all'), kind, copies)
                os.chmod(packed, 0o600)
                sync(packed)
                made = {os.path.basename(target): packed}
            for name, path in made.items():
                os.replace(path, os.path.join(folder, name))
                give_to_owner(os.path.join(folder, name))
            sync(folder)


def restore(source, force=False):
    """Put the files of a backup in the place of today's. Raises BackupError or StorageError, and
    changes nothing, if one is damaged or of a newer version, if today's would be overwritten
    (without force), or if an app runs on them."""
    kind = _kind_of(source, 'restore')
    with _sentences(source), contextlib.ExitStack() as undo:
        scratch = undo.enter_context(tempfile.TemporaryDirectory())
        directory = _unpack(source, kind, scratch) if kind else source
        os.makedirs(settings.data, mode=0o700, exist_ok=True)
        if not lock_directory(settings.data, fcntl.LOCK_EX, undo):
            raise BackupError(f'an app runs on {settings.data}; stop it first')
        present = [each.path for each in databases.values() if os.path.exists(each.path)]
        if present and not force:
            raise BackupError(f'{present[0]} exists; give --force to put the backup in its place')
        for name, database in _copied().items():
            if not os.path.isfile(os.path.join(directory, name)):
                raise BackupError(f'the backup has no {name}; {PREFIX}ENV is {settings.env}')
            undo.callback(remove, database.path + '.new')
            _copy(database, os.path.join(directory, name), database.path + '.new')
        make_private(app_db.path + RESTORING)       # from here to the end none can start
        sync(settings.data)
        for database in databases.values():     # the cable too: open tabs then load the page again
            for suffix in (*DATABASE_SUFFIXES, '-stamps'):
                with contextlib.suppress(FileNotFoundError):
                    os.replace(database.path + suffix, f'{database.path}.before{suffix}')
        for database in _copied().values():
            os.replace(database.path + '.new', database.path)
        sync(settings.data)
        remove(app_db.path + RESTORING)
        for database in databases.values():     # kept until the new ones are in place
            for suffix in (*DATABASE_SUFFIXES, '-stamps'):
                remove(f'{database.path}.before{suffix}')


def run_checks():
    """What is wrong with the databases, as sentences. They are only read; the app may run."""
    problems = []
    with contextlib.ExitStack() as opened:
        if settings.database_url:
            server = PostgreSQL()
            server.open()
            opened.callback(server.close)
        for database in databases.values():
            try:
                if settings.database_url:
                    _refuse_pending(database)
                # A restore leaves no cable: the next start makes it.
                elif database.copied or os.path.exists(database.path):
                    opened.callback(database.close)
                    _refuse_damage(database, database.path)
                    database.open_read_only()
            except AppError as error:
                problems.append(str(error))
        for function in checks if not problems else ():
            problems += function()
    return problems


def copy_to(target):
    """Copy all that is kept to a PostgreSQL server (its URL), or from there to files
    (sqlite:DIRECTORY); the app must be stopped. Raises BackupError, StorageError, and leaves what
    is copied as it is, and the target empty then. Gives {table: number of rows}."""
    to_server = not settings.database_url
    if not re.match('postgres(ql)?://' if to_server else 'sqlite:.', target):
        raise BackupError('copy-to goes from files to postgresql://…, or, where DATABASE_URL is '
                          'set, to sqlite:DIRECTORY; else use backup, or pg_dump')
    target = os.path.abspath(target.removeprefix('sqlite:')) if not to_server else target
    with _sentences(target), contextlib.ExitStack() as undo:
        if to_server:
            settings.database_url, settings.direct_database_url = target, ''
            directory = settings.data
            if not lock_directory(directory, fcntl.LOCK_EX, undo):
                raise BackupError(f'an app runs on {directory}; stop it first')
        else:
            if os.path.lexists(target) and (not os.path.isdir(target) or os.listdir(target)):
                raise BackupError(f'{target} is there, and not empty')
            os.makedirs(os.path.dirname(target), exist_ok=True)
            scratch = tempfile.TemporaryDirectory(prefix='.copy-', dir=os.path.dirname(target))
            directory = os.path.join(undo.enter_context(scratch), 'copy')
            os.mkdir(directory, 0o700)
            give_to_owner(scratch.name)
            give_to_owner(directory)
        files = [Database(database.name, database.migrations, path=os.path.join(directory, name))
                 for name, database in _copied().items()]
        for file in files:
            undo.callback(file.close)
            if to_server:
                _refuse_damage(file, file.path)
                file.open_read_only()
            else:
                file.open()
            _refuse_pending(file)
        server = PostgreSQL()
        server.open()
        undo.callback(server.close)
        until = time.monotonic() + BUSY_SECONDS
        while others := processes.others():     # one that stopped just now is there for a moment
            if time.monotonic() > until:
                raise BackupError(f'an app runs on the database server, as {" ".join(others)}; '
                                  f'stop all of its processes first')
            gevent.sleep(0.05)
        for database in (*databases.values(), *files):
            database.joined = app_db            # one transaction for all
        copied = app_db.transact(_copy_rows, files, to_server)
        if not to_server:
            for file in files:
                file.close()
                sync(file.path)
            os.rename(directory, target)
            sync(os.path.dirname(target))
    return copied


def _copy_rows(files, to_server):
    """Copy every row, in a transaction of the server. Gives {table: number of rows}."""
    copied = {}
    for database in databases.values():
        if not to_server:
            _refuse_pending(database)
        elif database._columns():
            raise BackupError(f'there is a {database.path} already, so the target is not empty')
        else:
            database.open()
    for file in files:
        file._roll_back()                       # of a run before, which lost its connection
        file._connection.execute('BEGIN')
        server = databases[file.name]
        source, target = (file, server) if to_server else (server, file)
        tables = {}
        for table, column in file._columns():
            tables.setdefault(table, []).append(f'"{column}"')
        del tables['schema_migrations']
        for table, columns in tables.items():
            insert = (f'INSERT INTO {table} ({", ".join(columns)}) '
                      f'VALUES ({", ".join("?" * len(columns))})')
            for rows in _slices(source, table, columns):
                target.executemany(insert, [[cleaned(value) if isinstance(value, str) else value
                                             for value in row] for row in rows])
            there, here = (side.execute(f'SELECT count(*) FROM {table}')[0][0]
                           for side in (source, target))
            if there != here:
                raise BackupError(f'{table} has {there} rows, and the copy {here}')
            copied[table] = here
        _copy_last_ids(file, server, to_server)
    if to_server:
        jobs.adopt_outbox()
    for file in files:
        file._connection.execute('COMMIT')
    return copied


def _slices(database, table, columns):
    """The rows of a table, in lists."""
    select = f'SELECT {", ".join(columns)} FROM {table}'
    if database in databases.values():
        database.execute(f'DECLARE {table}_slices CURSOR FOR {select}')
        fetch = functools.partial(database.execute, f'FETCH {COPIED_ROWS} FROM {table}_slices')
    else:
        fetch = functools.partial(database._connection.execute(select).fetchmany, COPIED_ROWS)
    return iter(fetch, [])


def _copy_last_ids(file, server, to_server):
    """Where an id is never given twice, it is not after a copy either."""
    kept = file.execute("SELECT 1 FROM sqlite_master WHERE name = 'sqlite_sequence'")
    last = dict(file.execute('SELECT name, seq FROM sqlite_sequence') if kept else ())
    for name, given in server.execute('SELECT sequencename, coalesce(last_value, 0) FROM '
                                      'pg_sequences WHERE schemaname = current_schema'):
        table = name.removesuffix('_id_seq')
        if to_server:
            (most,), = file.execute(f'SELECT coalesce(max(id), 0) FROM {table}')
            server.execute('SELECT pg_catalog.setval(CAST(? AS regclass), ?)',
                           (name, max(1, most, last.get(table, 0))))
        elif kept:
            file.execute('DELETE FROM sqlite_sequence WHERE name = ?', (table,))
            file.execute('INSERT INTO sqlite_sequence (name, seq) VALUES (?, ?)', (table, given))


def _refuse_pending(database):
    """Raises BackupError unless it has seen all migrations."""
    if database._pending():
        raise BackupError(f'{database.path} is not there, or not up to date; the command `migrate` '
                          f'makes it so')


def sync(path):
    """fsync a file or a directory. Raises OSError."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _copied():
    """The databases that are worth a copy, by the names of their files."""
    return {os.path.basename(database.path): database
            for database in databases.values() if database.copied}


def _copy(database, source, target):
    """Copy a database as its readers see it, write-ahead log included, to one file; checked, and
    synced. Raises StorageError, MigrationError."""
    remove(target)
    make_private(target)
    try:
        address = f'file:{urllib.parse.quote(os.fsencode(os.path.abspath(source)))}?mode=ro'
        original = sqlite3.connect(address, uri=True, timeout=BUSY_SECONDS)
        with contextlib.closing(original), contextlib.closing(sqlite3.connect(target)) as copy:
            original.backup(copy)
            copy.execute('PRAGMA journal_mode = DELETE')    # one file, without -wal and -shm
    except (sqlite3.Error, UnicodeDecodeError) as error:    # a message quotes damaged bytes
        raise StorageError(f'{source} can not be copied: {error}') from None
    _refuse_damage(database, target)
    sync(target)


def _refuse_damage(database, path):
    """Raises StorageError or MigrationError unless the file is whole and this app can open it."""
    if not os.path.exists(path):
        raise StorageError(f'{path} is missing')
    other = Database(database.name, database.migrations, path=path)
    try:
        other.open_read_only()
        (result,), = other.execute('PRAGMA integrity_check(1)')
        if len(other._pending()) == len(other.migrations):
            result = 'it is empty'
    except (StorageError, sqlite3.Error, UnicodeDecodeError, OSError) as error:
        result = str(error)
    finally:
        other.close()
    if result != 'ok':
        raise StorageError(f'{path} is damaged: {" ".join(result.split())}')


def _kind_of(path, command):
    """The kind of archive by its name, a value of ARCHIVES; None: a directory. Raises BackupError,
    also where it is in the directory of the app, or around it."""
    if settings.database_url:
        raise BackupError(f'{command} is for files; of a server use '
                          f"pg_dump -n '{APP}_{settings.env}*', and pg_restore")
    kind = next((ARCHIVES[end] for end in ARCHIVES if path.lower().endswith(end)), None)
    if not path or not kind and path.lower().endswith(OTHER_ARCHIVES):
        raise BackupError(f'{path!r} can not be a backup: give a directory, or a name that ends in '
                          f'{", ".join(ARCHIVES)}')
    ours, theirs = os.path.realpath(settings.data), os.path.realpath(path)
    if os.path.commonpath([ours, theirs]) in (ours, theirs):
        raise BackupError(f'{path} and the files of the app, {settings.data}, are in one another; '
                          f'keep a backup elsewhere')
    return kind


@contextlib.contextmanager
def _sentences(path):
    """An error of the file system becomes a BackupError."""
    try:
        yield
    except OSError as error:
        raise BackupError(f'{error.filename or path}: {error.strerror or error}') from None


def _unpack(path, kind, directory):
    """Unpack our files, wherever in the archive they are, and nothing else: so it can't write
    elsewhere. Gives the directory. Raises BackupError."""
    open_archive = zipfile.ZipFile if kind == 'zip' else tarfile.open
    try:
        with open_archive(path) as archive:
            if kind == 'zip':
                members, read = {name: name for name in archive.namelist()}, archive.open
            else:
                members = {member.name: member for member in archive if member.isfile()}
                read = archive.extractfile
                while archive.fileobj.read(2**20):
                    pass                # to its end, where the checksum of the whole stands
            for name, member in members.items():
                if os.path.basename(name) in _copied():
                    with read(member) as file, \
                            open(os.path.join(directory, os.path.basename(name)), 'wb') as copy:
                        shutil.copyfileobj(file, copy)
    except OSError:
        raise
    except Exception as error:          # three libraries have theirs
        raise BackupError(f'{path} can not be unpacked: {" ".join(str(error).split())}') from None
    return directory


# === Command line ========================================================================
# The function of a command gives the lines to print, or the exit status.

BORDER = re.compile('^# === The app', re.MULTILINE)
LISTED_JOBS = 1000          # of them `jobs` shows
JOB_ACTS = {act: field for act, (field, _) in ACTS.items() if field in FILTERS}


class UsageError(AppError):
    """A command, or a word after it, that there is not."""

    def __init__(self, command, takes, given):
        super().__init__(f'{command} takes {takes}, not {_shown(given)}; see '
                         f'`python {APP}.py --help`')


def command_new(path):
    """Write a new app: this file down to the border, and SMALL_APP. Raises SettingError."""
    file = os.path.basename(path)
    name = file.removesuffix('.py')
    if not re.fullmatch('[a-z][a-z0-9_]*', name) or file == name or keyword.iskeyword(name):
        raise SettingError(f'{file!r} can not be the name of an app: give one like chat.py, of '
                           f'lower-case letters, digits and _')
    if name in sys.stdlib_module_names or name in sys.modules and name != '__main__':
        raise SettingError(f'{file} would hide the module {name} that Python knows; take another '
                           f'name')
    with open(__file__, encoding='utf-8') as source:
        stack = BORDER.split(source.read(), maxsplit=1)[0]
    head, docstring, code = stack.split('"""', 2)
    docstring = re.sub(rf'\A{APP}(?=:)|(?<!new )\b{APP}(?=\.py)', name, docstring)
    code = re.sub(r"^APP = '\w+' ", f"APP = '{name}' ", code, count=1, flags=re.MULTILINE)
    code = re.sub(r"(?<=Setting\('DATA', )'\w+'", f"'{name}_db'", code, count=1)
    try:
        with open(path, 'x', encoding='utf-8') as target:
            target.write('"""'.join((head, docstring, code)) + SMALL_APP)
    except OSError as error:
        raise SettingError(f'{path} can not be written: {error.strerror}') from None
    yield f'{path} is your app: everything below "The app" is yours to change.'
    yield f'Run: {os.path.basename(sys.executable)} {path}'


def command_migrate():
    with open_stack():
        for database in databases.values():
            yield f'{database.path}: {len(database.migrations)} migrations'


def command_settings():
    for setting in SETTINGS:
        given, value = os.environ.get(setting.variable), getattr(settings, setting.name.lower())
        if setting.secret:
            value = 'set' if given else 'not set'
        elif isinstance(value, bool):
            value = 'on' if value else 'off'
        elif isinstance(value, list):
            value = ','.join(value)
        yield (f'{setting.variable:24} {value!s:12} {"environment" if given else "default":12} '
               f'{setting.meaning}')


def command_backup(path):
    backup(path)
    yield f'{path}: a backup of {settings.data}'


def command_restore(path, force=False):
    restore(path, force)
    yield f'{path} is restored to {settings.data}'


def command_copy_to(target):
    for table, rows in copy_to(target).items():
        yield f'{table}: {rows}'


def command_check():
    problems = run_checks()
    print('\n'.join(problems) or 'ok')
    return 1 if problems else 0


@contextlib.contextmanager
def open_existing():
    """open_stack() on files that are there: a wrong setting makes no others. StorageError."""
    if not settings.database_url and not os.path.exists(app_db.path):
        raise StorageError(f'there is no {app_db.path}; set {PREFIX}DATA and {PREFIX}ENV '
                           'as the app has them')
    with open_stack():
        yield


def command_jobs(act='', which='', **options):
    """List jobs, or do one of JOB_ACTS. A running server hears of it at once."""
    states = [each for each in STATES if each in options]
    if len(states) > 1 or act not in ('', *JOB_ACTS):
        raise UsageError('jobs', f'at most one state, and one of {", ".join(JOB_ACTS)}',
                         act or ' and '.join(states))
    wanted = {**options, 'state': next(iter(states), None)}
    with open_existing():
        if not act:
            which = [*map(wanted.get, FILTERS)]
            paused, found = jobs.paused(), jobs.list(LISTED_JOBS, *which)
            for job in map(without_secrets, found):
                yield to_json(job._asdict()) if 'json' in options else _line_of(job, paused)
            matching = sum(jobs.counts(*which).values())
            if matching > len(found) and 'json' not in options:
                yield f'The last {len(found):,} of {matching:,} are shown.'
            return
        if which != 'all' or act not in CHANGE_JOBS:
            wanted[JOB_ACTS[act]] = which
        if 'id' in wanted:
            job, fit = jobs.find(which), CHANGE_JOBS[act][0]
            if not job or job.state not in fit:
                raise JobError(f'{act} takes a job that is {" or ".join(fit)}; {_shown(which)} is '
                               f'{job.state if job else "done, or was never there"}')
        yield perform(act, wanted)


def _line_of(job, paused):
    times = [f'{name}={_at(at)}' for name, at in job._asdict().items()
             if name in ('enqueued_at', 'started_at', 'next_at', 'failed_at') and at]
    last = (job.error or '').rstrip().rpartition('\n')[2]
    return ' '.join([job.id, job.name, job.state, job.queue + ' (paused)' * (job.queue in paused),
                     f'attempts={job.attempts}', *times, last]).rstrip()


def command_stats(json=False):
    """What /metrics tells of the running servers; a histogram as its sum and count."""
    with open_existing():
        nodes = recorder.nodes()
        del nodes[processes.name]
        lines = sorted(line for line in exposition(nodes) if not re.match('#|[^{]*_bucket{', line))
        samples = (line.rpartition(' ') for line in lines)
        yield from [to_json({name: float(number) for name, _, number in samples})] if json else lines


def command_errors():
    """What nobody expected, the last first, with the last traceback of each."""
    with open_existing():
        for place, at, error in recorder.errors():
            yield (f'{place}: {error["count"]} times, last {_at(at)} UTC, request '
                   f'{error["request"] or "unknown"}\n{error["traceback"]}')


def command_console():
    """A prompt of Python with the four services and the app's names, beside a running server."""
    def ask(prompt=''):
        gevent.sleep(2 * FLUSH_SECONDS)         # what the cache was given is written
        return input(prompt)

    with open_existing():
        console = code.InteractiveConsole({**globals(), **vars(sys.modules['__main__'])})
        console.raw_input = ask
        console.interact(f'{APP} {__version__}: app_db, cache, jobs, cable, and the rest of '
                         f'{sys.argv[0]}', '')
    return 0


def usage():
    """The lines of --help."""
    yield from (f'{APP} {__version__}', '', f'usage: python {APP}.py [command]', '')
    for name, (_, synopsis, meaning) in COMMANDS.items():
        form = f'{name} {synopsis}'
        yield f'  {form:24}' + (f'\n{"":26}' if len(form) > 24 else '') + f' {meaning}'
    yield f'\nSettings are environment variables: `python {APP}.py settings` lists them.'


COMMANDS = {        # name: (function, its arguments, what it does)
    'serve': (serve, '[--reload]', 'serve the app (the default); anew when its file changes'),
    'new': (command_new, 'NAME.py', 'write a new app: this stack, and a small app to change'),
    'migrate': (command_migrate, '', 'create the database files, or bring them up to date'),
    'check': (command_check, '', 'check the files: whole, of this version, nothing stuck'),
    'backup': (command_backup, 'PATH', 'copy the data to a directory or an archive; it may run'),
    'restore': (command_restore, 'PATH [--force]', 'put a backup in place; it must be stopped'),
    'copy-to': (command_copy_to, 'TARGET', 'copy all to postgresql://…, or to sqlite:DIRECTORY'),
    'jobs': (command_jobs, f'[ACT WHICH] [--{"|--".join(STATES)}] [--name N] [--queue Q] [--json]',
             f'list jobs, or {", ".join(CHANGE_JOBS)} an ID or "all",\n{"":27}'
             'or pause, resume a QUEUE, or start a task that recurs'),
    'stats': (command_stats, '[--json]', 'how the running servers are'),
    'errors': (command_errors, '', 'what nobody expected, with tracebacks'),
    'console': (command_console, '', 'a prompt with the services, beside a running server'),
    'settings': (command_settings, '', 'show every setting: value, where from, meaning'),
    'secret': (lambda: [new_secret()], '', f'print a new value for {PREFIX}SECRET'),
    '--help': (usage, '', 'show this'),
    '--version': (lambda: [f'{APP} {__version__}'], '', 'show the version'),
}
NEED_NO_SETTINGS = ('new', 'secret', '--help', '--version')


def _parsed(name, given):
    """The function of a command, and the words after it as values and options, as its synopsis has
    them, which is like 'PATH [OTHER] [--flag] [--name N]'. Raises UsageError."""
    if name not in COMMANDS:
        raise UsageError(APP, f'one of {", ".join(COMMANDS)}', name)
    function, synopsis, _ = COMMANDS[name]
    takes = dict(re.findall(r'(--[a-z]+)(?: ([A-Z]+))?', synopsis))
    names = re.sub(r'\[--[^]]*\]', '', synopsis)
    values, options, words = [], {}, iter(given)
    for word in words:
        if word in takes:
            options[word[2:]] = next(words, '') if takes[word] else True
        else:
            values.append(word)
    fits = len(values) == len(re.findall('[A-Z]+', names)) or '[' in names and not values
    if not fits or any(str(each or '-')[0] == '-' for each in (*values, *options.values())):
        raise UsageError(name, synopsis or 'nothing', ' '.join(given))
    return function, values, options


def main(arguments=None):
    """Run a command; gives the exit status: 0, 1 after an error, 2 for a wrong command."""
    name, *given = (sys.argv[1:] if arguments is None else arguments) or ['serve']
    sys.stdout.reconfigure(errors='backslashreplace')   # a terminal may know less than a path has
    name = {'help': '--help', '-h': '--help', '-V': '--version'}.get(name, name)
    name, given = ('--help', []) if '--help' in given else (name, given)
    if name.startswith('--') and name not in COMMANDS:
        name, given = 'serve', [name, *given]
    try:
        function, values, options = _parsed(name, given)
        start_logging(os.environ.get(f'{PREFIX}LOG', '').lower())
        if name not in NEED_NO_SETTINGS:
            load_settings(os.environ)
        result = function(*values, **options)
        status, lines = (result, []) if isinstance(result, int) else (0, list(result))
        for line in lines:
            print(line)
        sys.stdout.flush()
        return status
    except BrokenPipeError:             # who reads, as head does, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except AppError as error:
        print(f'Error: {error}', file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


# What `new` writes below the border.
SMALL_APP = r'''# === The app: a room where everybody who opens the page talks ============================

app_settings(Setting('KEEP_DAYS', '7', 'messages go after so many days', whole_number(1, 3650)))
app_db.migrations += [
    ('001 create messages', """
        CREATE TABLE messages (
            id          INTEGER PRIMARY KEY AUTOINCREMENT,
            key         TEXT NOT NULL UNIQUE,       -- of the form: sent twice, it is one message
            name        TEXT NOT NULL,
            text        TEXT NOT NULL,
            created_at  REAL NOT NULL
        )"""),
]

ROOM = shared_stream('room')


@app.get('/')
def show_room():
    rows = app_db.execute('SELECT id, name, text FROM messages ORDER BY id DESC LIMIT 100')
    return render('room', title=APP.capitalize(), source=stream_source(ROOM),
                  messages=[render_message(*row) for row in reversed(rows)],
                  said=cache.get('said', 0), name=cache.get(f'name of {current_user()}', ''),
                  key=secrets.token_urlsafe(9), owner=current_user())


@app.post('/messages')
def say():
    key, name, text = (cleaned(str(fields().get(each) or '')).strip()
                       for each in ('key', 'name', 'text'))
    if not 0 < len(text) <= 500 or len(name) > 30 or len(key) > 50:
        raise InvalidField('A message has 1 to 500 characters, a name at most 30.')
    cache.set(f'name of {current_user()}', name)
    if add_message(key or secrets.token_urlsafe(9), name or 'Somebody', text):
        cache.incr('said')
        cable.broadcast(ROOM, lambda: turbo_stream('update', 'said', str(cache.get('said'))))
    return respond()


@app_db.transaction
def add_message(key, name, text):
    """Keep a message, together with the job that tells of it; False if it is there already."""
    rows = app_db.execute('INSERT INTO messages (key, name, text, created_at) '
                          'VALUES (?, ?, ?, now_s()) ON CONFLICT DO NOTHING RETURNING id',
                          (key, name, text))
    for id, in rows:
        jobs.enqueue(tell, {'id': id}, order_key='room')
    return bool(rows)


@jobs.task(queue='urgent')
def tell(id):
    """Append a message to every open tab. Run twice, it shows once: its id is there already."""
    for row in app_db.execute('SELECT id, name, text FROM messages WHERE id = ?', (id,)):
        cable.broadcast(ROOM, turbo_stream('append', 'messages', render_message(*row)))


@jobs.cron('0 4 * * *')
def forget():
    """Delete what is too old, every night."""
    if app_db.execute('DELETE FROM messages WHERE created_at < now_s() - ? RETURNING id',
                      (settings.keep_days * 86400,)):
        cable.broadcast(ROOM, REFRESH)


def render_message(id, name, text):
    return render('message', id=id, name=name, text=text)


TEMPLATES['message'] = """\
<li id="message_{{id}}"><b>{{name}}</b> <p dir="auto">{{text}}</p></li>
"""
TEMPLATES['room'] = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{title}}</title>
<meta name="owner" content="{{owner}}">
<link rel="icon" href="data:,">
<link rel="stylesheet" href="{{asset('plain.css')}}">
<link rel="stylesheet" href="{{asset('room.css')}}">
<script type="module" src="{{asset('live.js')}}"></script>
<script type="module" src="{{asset('room.js')}}"></script>
</head>
<body>
{{!source}}
<header><h1>{{title}}</h1><p><span id="said">{{said}}</span> said so far</p></header>
<main tabindex="0" aria-label="Messages">
<ul id="messages">
{{!''.join(messages)}}</ul>
</main>
<footer><form action="/messages" method="post" id="say">
<input type="hidden" name="key" value="{{key}}">
<input type="text" name="name" value="{{name}}" maxlength="30"
 placeholder="Your name" aria-label="Your name">
<input type="text" name="text" required maxlength="500" autocomplete="off" autofocus
 placeholder="Say something" aria-label="Message">
<button type="submit">Send</button>
<p id="notice" role="alert" data-turbo-permanent></p>
<p id="line" role="status" data-connection data-turbo-permanent hidden></p>
</form></footer>
</body>
</html>
"""
add_asset('room.css', """\
body { display: grid; grid-template-rows: auto 1fr auto; height: 100dvh; padding: 0 1rem; }
header { display: flex; align-items: baseline; justify-content: space-between; padding: 1rem 0; }
header p, li b, #line, ::placeholder { color: var(--soft); opacity: 1; }
main { display: flex; flex-direction: column-reverse; overflow: auto; }   /* stays at the end */
ul { margin-bottom: auto; padding: 0; list-style: none; }
ul:not(:has(li))::before { content: 'Nobody has said anything yet.'; color: var(--soft); }
li { padding: .375rem 0; }
li p { width: fit-content; padding: .4rem .9rem; border-radius: 1rem; background: var(--line); }
form { display: grid; grid-template-columns: 9rem 1fr auto; gap: .5rem; padding: 1rem 0; }
form p { grid-column: 1 / -1; }
form * { border-radius: 1.375rem; }
button { border: 0; background: var(--accent); color: var(--paper); }
#notice { color: var(--danger); }
@media (width < 30rem) {
  form { grid-template-columns: 1fr auto; }
  [name=name] { grid-column: 1 / -1; }
}
""", 'text/css; charset=UTF-8')
add_asset('room.js', """\
// Text fields are reset when their form is sent; the name stays in its field.
addEventListener('change', ({ target }) => {
  if (target.name === 'name') target.defaultValue = target.value;
});
""", 'text/javascript; charset=UTF-8')


if __name__ == '__main__':
    sys.exit(main())
'''


# === The app: a todo list for each visitor ===============================================
# Everything below knows of todos; nothing above does. `python todol.py new NAME.py` cuts here.


# === Todos: rows and rules, no HTML ======================================================
# Every change bumps the version of the user's list, and with it, in the same transaction, enqueues
# the job that tells the user's other tabs: broadcast_todos, in Broadcasts.

app_db.migrations += [
    ('001 create todos', '''
        CREATE TABLE todos (
            id          INTEGER PRIMARY KEY AUTOINCREMENT,   -- also the order; never used twice
            user_id     TEXT NOT NULL,
            title       TEXT NOT NULL,
            completed   INTEGER NOT NULL DEFAULT 0,          -- 0 or 1
            version     INTEGER NOT NULL,                    -- of the list when it last changed
            key         TEXT,                                -- K.n: the n-th, from 0, of change K
            created_at  REAL NOT NULL
        )'''),
    ('002 index todos by user', 'CREATE INDEX todos_by_user ON todos (user_id, id)'),
    ('003 index todos by key', '''
        CREATE UNIQUE INDEX todos_by_key ON todos (user_id, key) WHERE key IS NOT NULL'''),
    ('004 create lists', '''
        CREATE TABLE lists (                                 -- counts that need no counting
            user_id     TEXT PRIMARY KEY,
            active      INTEGER NOT NULL,
            completed   INTEGER NOT NULL,
            version     INTEGER NOT NULL                     -- grows with every change
        )'''),
    ('007 index todos by key first', '''
        CREATE UNIQUE INDEX todos_by_key_first ON todos (key, user_id) WHERE key IS NOT NULL'''),
    ('008 drop index by user and key', 'DROP INDEX todos_by_key'),
    ('009 create changes', '''
        CREATE TABLE changes (                             -- what was done, to do it once
            id          INTEGER PRIMARY KEY,                 -- in the order of the changes
            user_id     TEXT NOT NULL,
            key         TEXT NOT NULL,                       -- of the client's choice
            touched     TEXT NOT NULL,                       -- JSON: the ids of the todos
            undo        TEXT,                                -- JSON: see take_back(); NULL: nothing
            made_at     REAL NOT NULL
        )'''),
    ('010 index changes by key', '''
        CREATE UNIQUE INDEX changes_by_key ON changes (key, user_id)'''),
    ('011 index changes that can be undone', '''
        CREATE INDEX changes_with_undo ON changes (user_id, id) WHERE undo IS NOT NULL'''),
    # Those were of todos; a row now has that of the change that made it, and its place in that.
    ('012 forget keys of todos', 'UPDATE todos SET key = NULL WHERE key IS NOT NULL'),
    ('013 index undo by time', '''
        CREATE INDEX changes_with_undo_by_time ON changes (made_at) WHERE undo IS NOT NULL'''),
]
app_settings(
    Setting('MAX_TITLE_CHARS', '500', 'longest title, characters', whole_number(1, 10_000)),
    Setting('MAX_TODOS', '10000', 'most todos of one user', whole_number(1, 1_000_000)),
)

BROADCAST_ROWS = 50         # a change of more rows is told as "load the page again"
KEEP_UNDO_SECONDS = 86400
KEEP_CHANGES_SECONDS = 30 * 86400       # a tab may be offline so long, and deliver each change once
FORGET_ROWS = 500           # in one transaction
CHANGE_KEY = re.compile(r'[\w.:-]{1,100}', re.ASCII)
NOT_TEXT = re.compile('[\x00-\x1f\x7f-\x9f\ud800-\udfff]')      # controls, lone surrogates
# Spaces, and marks that show nothing. (To isprintable(), the newest emoji are not printable.)
BLANK = re.compile(r'[\s\u00ad\u034f\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f'
                   r'\ufe00-\ufe0f\ufeff]*')

# A bullet or a number, and a box with a tick or without, before the title
LINE = re.compile(r'\s*(?:(?:[-*+•]|[0-9]{1,4}[.)])(?:\s+|$))?(?:\[([ xX]?)\](?:\s+|$))?(.*)')

SELECT_TODOS = 'SELECT id, title, completed, version, key FROM todos WHERE user_id = ?'
SELECT_BY_KEYS = '''
    SELECT id FROM todos WHERE user_id = ? AND key IN (SELECT value FROM json_each(?))'''
# A row that was there first keeps its key: the change may be forgotten, or lists were joined.
FREE_KEY = '''CASE WHEN EXISTS (SELECT 1 FROM todos WHERE key = :key AND user_id = :user)
                   THEN NULL ELSE :key END'''
# The version is that of the list after COUNT_CHANGE, which comes next.
INSERT_TODO = f'''
    INSERT INTO todos (user_id, title, completed, version, key, created_at)
    VALUES (:user, :title, :completed,
            coalesce((SELECT version FROM lists WHERE user_id = :user), 0) + 1, {FREE_KEY}, now_s())
    RETURNING id, key'''
DELETE_TODO = '''
    DELETE FROM todos WHERE user_id = ? AND id = ?
    RETURNING id, title, completed, key, created_at'''
CLEAR_TODOS = '''
    DELETE FROM todos WHERE user_id = :user AND completed = 1
        AND (:ids IS NULL OR id IN (SELECT CAST(value AS INTEGER) FROM json_each(:ids)))
    RETURNING id, title, completed, key, created_at'''
RESTORE_TODO = f'''
    INSERT INTO todos (id, title, completed, key, created_at, user_id, version)
    VALUES (:id, :title, :completed, {FREE_KEY}, :created_at, :user, :version)
    ON CONFLICT DO NOTHING RETURNING id, completed'''
RESTORED = ('id', 'title', 'completed', 'key', 'created_at')
MOVE_TODOS = '''
    UPDATE todos SET user_id = :to, version = :version, key = CASE WHEN EXISTS (
        SELECT 1 FROM todos AS theirs WHERE theirs.key = todos.key AND theirs.user_id = :to)
        THEN NULL ELSE key END
    WHERE user_id = :user RETURNING id'''
MOVE_UNDO = '''
    UPDATE changes SET user_id = :to WHERE user_id = :user AND undo IS NOT NULL AND NOT EXISTS (
        SELECT 1 FROM changes AS theirs WHERE theirs.key = changes.key AND theirs.user_id = :to)'''
UNMAKE_TODO = '''
    DELETE FROM todos WHERE user_id = ? AND id = ? AND title = ? RETURNING id, completed'''
RENAME_BACK = '''
    UPDATE todos SET title = ?, version = ?
    WHERE user_id = ? AND id = ? AND title = ? RETURNING id'''
INSERT_CHANGE = '''
    INSERT INTO changes (user_id, key, touched, undo, made_at) VALUES (?, ?, ?, ?, now_s())'''
NEWEST_UNDO = 'SELECT id, undo FROM changes WHERE user_id = :user AND undo IS NOT NULL'
FORGET_UNDO = '''
    UPDATE changes SET undo = NULL WHERE id IN (
        SELECT id FROM changes WHERE undo IS NOT NULL AND made_at < now_s() - ? LIMIT ?)
    RETURNING id'''
FORGET_CHANGES = '''
    DELETE FROM changes WHERE made_at < now_s() - ? AND id IN (
        SELECT id FROM changes ORDER BY id LIMIT ?) RETURNING id'''
TOGGLE_TODOS = '''
    UPDATE todos SET completed = :completed, version = :version
    WHERE user_id = :user AND completed <> :completed
        AND (:ids IS NULL OR id IN (SELECT CAST(value AS INTEGER) FROM json_each(:ids)))
    RETURNING id'''
COUNT_CHANGE = '''
    INSERT INTO lists (user_id, active, completed, version) VALUES (?, ?, ?, 1)
    ON CONFLICT (user_id) DO UPDATE SET active = lists.active + excluded.active,
        completed = lists.completed + excluded.completed, version = lists.version + 1
    RETURNING active, completed, version'''
MISCOUNTED_LISTS = '''
    SELECT todos.user_id, count(*), coalesce(lists.active + lists.completed, 0)
    FROM todos LEFT JOIN lists ON lists.user_id = todos.user_id
    GROUP BY todos.user_id, lists.active, lists.completed
    HAVING count(*) <> coalesce(lists.active + lists.completed, 0)
        OR sum(todos.completed) <> lists.completed
    ORDER BY todos.user_id'''


class TitleError(AppError):
    """A title that can't be kept."""
    status = 422


class LimitError(AppError):
    """The list is full."""
    status = 422


class Todo(typing.NamedTuple):
    """A row of the list."""
    id: int
    title: str
    completed: bool
    version: int            # of the list when this row last changed
    key: str = None         # K.n: the n-th, from 0, that the change K made


class Totals(typing.NamedTuple):
    """How many todos of each kind a list has, and its version."""
    active: int
    completed: int
    version: int


def clean_title(title):
    """The title as it is kept: trimmed, tabs and line ends as spaces; '' for a blank one. Raises
    TitleError."""
    if not isinstance(title, str):
        raise TitleError(f'a title must be text, not {type(title).__name__}')
    title = re.sub(r'\r\n|[\t\r\n]', ' ', title).strip()
    if len(title) > settings.max_title_chars:
        raise TitleError(f'That title has {len(title):,} characters; at most '
                         f'{settings.max_title_chars:,} fit.')
    stranger = NOT_TEXT.search(title)
    if stranger:
        raise TitleError(f'That title has a character that is not text: '
                         f'U+{ord(stranger[0]):04X}.')
    return '' if BLANK.fullmatch(title) else title


def todos_of(text):
    """What stands in pasted text, a line for each, as tuples of title and completed."""
    lines = [LINE.match(line) for line in re.split(r'\r\n|[\r\n]', text)]
    return [(line[2], line[1] in ('x', 'X')) for line in lines if not BLANK.fullmatch(line[2])]


def text_of(todos):
    """The todos as text, such as todos_of() takes."""
    return ''.join(f'- [{"x" if todo.completed else " "}] {todo.title}\n' for todo in todos)


def new_key():
    """A key for a change: milliseconds since 1970, and what nobody else has."""
    return f'{time.time_ns() // 10**6}-{secrets.token_hex(8)}'


# Each change takes a key of the client's choice: one whose key is known is not made again, and what
# it gives is as things are now. Raises InvalidField for a key that is none. In the place of an id
# may stand the key of the row.

def create_todo(user, title, key=None):
    """Add a todo at the end of the user's list, and give it; None if the key is known, and the todo
    is gone since. Raises TitleError and LimitError."""
    return next(iter(create_todos(user, [(title, False)], key)), None)


@app_db.transaction
def create_todos(user, todos, key=None):
    """Add todos, tuples of title and completed, at the end of the user's list, as one change, and
    give them. Raises TitleError and LimitError."""
    app_db.lock(user)
    todos = [(clean_title(title), bool(completed)) for title, completed in todos]
    if not all(title for title, _ in todos):
        raise TitleError('A todo needs a title.')
    before = touched_before(user, key)
    if before is not None:
        return [todo for todo in map(functools.partial(_look_up, user), before) if todo]
    if len(todos) > 1:
        key = key or new_key()          # it can be undone
    rows = [app_db.execute(INSERT_TODO, {'user': user, 'title': title, 'completed': int(completed),
                                         'key': f'{key}.{number}' if key else None})[0]
            for number, (title, completed) in enumerate(todos[:settings.max_todos + 1])]
    ids, done = [id for id, _ in rows], sum(completed for _, completed in todos)
    totals = _changed(user, ids, active=len(ids) - done, completed=done)
    _refuse_too_many(totals)
    _record(user, key, ids, len(ids) > 1 and (
        f'Added {_todos(len(ids))}.', 'made', [(id, title) for id, (title, _) in zip(ids, todos)]))
    return [Todo(id, title, completed, totals.version, key)
            for (id, key), (title, completed) in zip(rows, todos)]


@app_db.transaction
def update_todo(user, id, title=None, completed=None, key=None):
    """Rename a todo, or set whether it is completed, and give it; None if an empty title deleted
    it, or it is gone since. Raises NotFound, TitleError."""
    app_db.lock(user)
    new_title = None if title is None else clean_title(title)
    if touched_before(user, key) is not None:
        return _look_up(user, id)
    if new_title == '':
        return delete_todo(user, id, key)
    todo = find_todo(user, id)
    changed = todo._replace(title=todo.title if new_title is None else new_title,
                            completed=todo.completed if completed is None else completed)
    if changed != todo:
        changed = changed._replace(version=count_todos(user).version + 1)
        app_db.execute('UPDATE todos SET title = ?, completed = ?, version = ? WHERE id = ?',
                       (changed.title, int(changed.completed), changed.version, todo.id))
        moved = int(changed.completed) - int(todo.completed)
        _changed(user, [todo.id], active=-moved, completed=moved)
    _record(user, key, [todo.id], changed.title != todo.title and (
        f'Renamed {_quoted(todo.title)}.', 'renamed', [todo.id, todo.title, changed.title]))
    return changed


@app_db.transaction
def toggle_todos(user, completed, ids=None, key=None):
    """Set all todos of a user, or those of ids that are theirs, to completed or active. Gives the
    ids that changed."""
    app_db.lock(user)
    done = touched_before(user, key)
    if done is not None:
        return done
    ids = _toggle(user, completed, ids)
    if ids:
        moved = len(ids) if completed else -len(ids)
        _changed(user, ids, active=-moved, completed=moved)
    _record(user, key, ids, ids and (
        f'Marked {len(ids):,} as {"" if completed else "not "}done.', 'marked', [ids, completed]))
    return ids


@app_db.transaction
def delete_todo(user, id, key=None):
    """Delete a todo. Raises NotFound."""
    app_db.lock(user)
    if touched_before(user, key) is not None:
        return
    todo = find_todo(user, id)
    rows = app_db.execute(DELETE_TODO, (user, todo.id))
    _removed(user, rows, key, f'Removed {_quoted(todo.title)}.')


@app_db.transaction
def clear_completed(user, ids=None, key=None):
    """Delete the user's completed todos, or those of ids that are theirs and completed. Gives the
    ids of what is gone."""
    app_db.lock(user)
    done = touched_before(user, key)
    if done is not None:
        return done
    rows = app_db.execute(CLEAR_TODOS, {'user': user,
                                        'ids': None if ids is None else json.dumps(ids)})
    return _removed(user, rows, key, f'Cleared {_todos(len(rows))}.')


@app_db.transaction
def take_back(user, of=None, key=None):
    """Undo the change that has the key `of`, or else the user's newest that can be undone, and give
    the ids of the todos that are other now. Only what that change itself did is taken back; if all
    of it was changed since, it can't be undone. Raises LimitError."""
    app_db.lock(user)
    done = touched_before(user, key)
    ids = done or []
    while done is None and not ids:
        rows = app_db.execute(f'{NEWEST_UNDO} {"" if of is None else "AND key = :of"} '
                              f'ORDER BY id DESC LIMIT 1', {'user': user, 'of': of})
        if not rows:
            break
        (change, undo), = rows
        app_db.execute('UPDATE changes SET undo = NULL WHERE id = ?', (change,))
        ids = _take_back(user, *json.loads(undo))
    if done is None:
        _record(user, key, ids)
    return ids


def find_todo(user, id):
    """Raises NotFound, whether it does not exist or belongs to somebody else."""
    todo = _look_up(user, id)
    if todo is None:
        raise NotFound('There is no such todo. It may have been removed in another tab.')
    return todo


@app_db.transaction
def move_todos(user, to):
    """Move all todos of a user to the list of another, with what can be undone. Raises
    LimitError."""
    app_db.lock(user, to)
    active, completed, _ = count_todos(user)
    moved = {'user': user, 'to': to, 'version': count_todos(to).version + 1}
    ids = [id for id, in app_db.execute(MOVE_TODOS, moved)]
    app_db.execute(MOVE_UNDO, moved)
    if ids:
        _changed(user, ids, -active, -completed)
        _refuse_too_many(_changed(to, ids, active, completed))


def what_was_done(user, key):
    """The change of that key in a sentence, if it can be undone; else None."""
    rows = app_db.execute(f'{NEWEST_UNDO} AND key = :key', {'user': user, 'key': key})
    return json.loads(rows[0][1])[0] if rows else None


@jobs.every(3600, queue='low')
def forget_changes():
    """Forget what is too old to be undone, texts and all, and the keys that nobody sends again."""
    forgotten = 0
    for statement, seconds in ((FORGET_UNDO, KEEP_UNDO_SECONDS),
                               (FORGET_CHANGES, KEEP_CHANGES_SECONDS)):
        while rows := app_db.execute(statement, (seconds, FORGET_ROWS)):
            forgotten += len(rows)
    if forgotten:
        app_db.truncate_log()
    log.info('forgot changes=%s', forgotten)


def ids_of(user, names):
    """The ids of the user's todos of these names, each an id or, as text, a key; None gives None.
    What is gone is left out."""
    if names is None:
        return None
    keys = [name for name in names if isinstance(name, str)]
    rows = app_db.execute(SELECT_BY_KEYS, (user, json.dumps(keys))) if keys else []
    return [name for name in names if isinstance(name, int)] + [id for id, in rows]


def _look_up(user, id):
    """A todo by its id, or by its key if that is text; None if there is none of the user's."""
    column = 'key' if isinstance(id, str) else 'id'
    rows = app_db.execute(f'{SELECT_TODOS} AND {column} = ?', (user, id))
    return _todo(*rows[0]) if rows else None


def _todo(id, title, completed, version, key):
    return Todo(id, title, bool(completed), version, key)


def list_todos(user, showing='all'):
    """The user's todos of a filter, oldest first."""
    if showing == 'all':
        rows = app_db.execute(f'{SELECT_TODOS} ORDER BY id', (user,))
    else:
        rows = app_db.execute(f'{SELECT_TODOS} AND completed = ? ORDER BY id',
                              (user, int(showing == 'completed')))
    return [_todo(*row) for row in rows]


def count_todos(user):
    """The user's Totals."""
    rows = app_db.execute('SELECT active, completed, version FROM lists WHERE user_id = ?',
                          (user,))
    return Totals(*rows[0]) if rows else Totals(0, 0, 0)


def _changed(user, ids, active=0, completed=0):
    """Count a change, have it told, and give the new Totals."""
    totals, = app_db.execute(COUNT_CHANGE, (user, active, completed))
    jobs.enqueue('broadcast_todos', {'user': user,
                                     'ids': ids if len(ids) <= BROADCAST_ROWS else None})
    return Totals(*totals)


def _refuse_too_many(totals):
    """Raises LimitError."""
    if totals.active + totals.completed > settings.max_todos:
        raise LimitError(f'The list is full: it has {settings.max_todos:,} todos. Clear some '
                         f'first.')


def _removed(user, rows, key, said):
    """Count rows that were deleted, keep them for undo, and give their ids."""
    ids = [id for id, *_ in rows]
    done = sum(completed for _, _, completed, *_ in rows)
    if rows:
        _changed(user, ids, active=done - len(rows), completed=-done)
    _record(user, key, ids, rows and (said, 'removed', rows))
    return ids


def _toggle(user, completed, ids=None):
    """Set rows to completed or active, of ids: none but those. Gives the ids that changed, which
    nobody has counted yet."""
    return [id for id, in app_db.execute(TOGGLE_TODOS, {
        'user': user, 'completed': int(completed), 'version': count_todos(user).version + 1,
        'ids': None if ids is None else json.dumps(ids)})]


def _take_back(user, said, kind, data):
    """Undo what a change has noted: see _record(). Gives the ids of what is other now."""
    version = count_todos(user).version + 1
    if kind == 'renamed':
        id, before, after = data
        changed = app_db.execute(RENAME_BACK, (before, version, user, id, after))
        rows = [(id, 0, 0) for id, in changed]
    elif kind == 'marked':
        ids, step = data[0], 1 if data[1] else -1
        rows = [(id, step, -step) for id in _toggle(user, not data[1], ids)]
    elif kind == 'made':
        rows = [(id, done - 1, -done) for id, title in data for id, done in
                app_db.execute(UNMAKE_TODO, (user, id, title))]
    else:
        rows = [(id, 1 - done, done) for row in data for id, done in
                app_db.execute(RESTORE_TODO, {**dict(zip(RESTORED, row)), 'user': user,
                                              'version': version})]
    ids, active, completed = ([row[column] for row in rows] for column in range(3))
    if ids:
        totals = _changed(user, ids, sum(active), sum(completed))
        if kind == 'removed':
            _refuse_too_many(totals)
    return ids


def touched_before(user, key):
    """The ids of what the change of that key touched, or None if there was none. Raises
    InvalidField."""
    check_key(key)
    if not key:
        return None
    rows = app_db.execute('SELECT touched FROM changes WHERE key = ? AND user_id = ?', (key, user))
    return json.loads(rows[0][0]) if rows else None


def check_key(key):
    """Raises InvalidField if it is no key of a change, and not left out either."""
    if key not in (None, '') and not (isinstance(key, str) and CHANGE_KEY.fullmatch(key)):
        raise InvalidField('key must be up to 100 letters, digits or any of . : - _')


def _record(user, key, ids, undo=None):
    """Note a change under its key, or under a new one if it can be undone.

    undo: what was done in a sentence, and what _take_back() needs. Renamed: the id, the title
    before and after. Marked: the ids, and whether as completed. Made: ids and titles. Removed: the
    rows, as RESTORE_TODO takes them."""
    if key or undo:
        app_db.execute(INSERT_CHANGE, (user, key or new_key(), json.dumps(ids),
                                       json.dumps(undo) if undo else None))


def _quoted(title):
    return f'“{title if len(title) <= 60 else title[:59] + "…"}”'


def _todos(number):
    return f'{number:,} {"todo" if number == 1 else "todos"}'


def todos_stream(user):
    """The name of the stream that a user's tabs listen to."""
    return private_stream(user, 'todos')


@check
def miscounted_lists():
    """Lists whose row of counts says something else than their todos."""
    for user, counted, kept in app_db.execute(MISCOUNTED_LISTS):
        yield f'the list of {user} has {counted} todos, its row in lists says {kept}'


# === Devices: the same list in another browser ===========================================
# A list is opened elsewhere by a link or a code. Both name it for a while, in the cache, and are
# used up together; who has used them may do so again, since an answer can be lost.

LINK_SECONDS = 600
CODE_CHARS = 'ABCDEFGHJKMNPQRSTUVWXYZ23456789'      # without look-alikes
CODE_LENGTH = 8
# Of a session, and ten times as many of an address, in LINK_SECONDS. A code has 40 bits.
MAX_GUESSES = 10
NO_LINK = ('That link or code is not good any more: each is good once, for ten minutes. Make a new '
           'one on the other device.')
NO_CODE = ('No list has that code. Is it the same on the other device? Then it is not good any more: '
           'each is good once, for ten minutes. Make a new one there.')


class GuessError(AppError):
    """Too many codes were tried."""
    status = 429


def offer_list(user):
    """Make a link and a code for a user's list. Gives the link's token, and the code. Raises
    StorageError if the cache does not keep them."""
    token, kept = secrets.token_urlsafe(16), False
    cache.add(f'join {token}', user, LINK_SECONDS)
    while not kept:                     # never the code of another list
        code = ''.join(secrets.choice(CODE_CHARS) for _ in range(CODE_LENGTH))
        kept = cache.add(f'join code {code}', token, LINK_SECONDS)
    if cache.get(f'join {token}') != user:
        raise StorageError('A link can not be made now. Try again in a moment.')
    return token, code


def token_of_code(code, user, address):
    """The token that goes with a code, as a person types it. Raises NotFound and GuessError."""
    for who, most in ((user, MAX_GUESSES), (address, 10 * MAX_GUESSES)):
        if cache.incr(f'join guesses {who}', ttl=LINK_SECONDS) > most:
            raise GuessError('Too many codes were tried from here. Wait ten minutes.')
    code = re.sub(r'[\W_]', '', code[:50].upper())
    token = cache.get(f'join code {code}')
    if token is None:
        raise NotFound(what_is_wrong(code))
    return token


def what_is_wrong(code):
    """A sentence for who typed a code that is none."""
    stranger = next((char for char in code if char not in CODE_CHARS), None)
    if stranger:
        return f'No code has {stranger} in it. Look again: what is it on the other device?'
    if len(code) != CODE_LENGTH:
        return (f'A code has {CODE_LENGTH} letters and digits, this one has {len(code)}. Look again '
                f'on the other device.')
    return NO_CODE


def offered_list(token, user):
    """Whose list a token offers; nothing is used up. Raises NotFound, also if another has used
    it."""
    owner = cache.get(f'join {token[:50]}')
    if owner is None or owner != user and cache.get(f'joined {token}', user) != user:
        raise NotFound(NO_LINK)
    return owner


def join_list(token, user, bring):
    """Use a token up, and give whose list it offers. bring: move the todos of the user there.
    Raises NotFound and LimitError."""
    owner = offered_list(token, user)
    if owner == user:
        return owner
    cache.add(f'joined {token}', user, LINK_SECONDS)
    if cache.get(f'joined {token}') != user:        # another was faster, or nothing can be kept
        raise NotFound(NO_LINK)
    if bring:
        move_todos(user, owner)         # if they don't fit, this browser may still use the link
    return owner


# === Templates ===========================================================================
# The element names, class names and texts are those of the TodoMVC app template, so that anyone's
# tests and styles for it fit: the text of a row is its title alone, its class is always there and
# holds nothing but completed and editing, the field for a new todo has no id. What is not ASCII is
# written as a reference, for one such character makes a page ten times as long to encode.

PATHS = {'all': '/', 'active': '/active', 'completed': '/completed'}        # of the filters
DESCRIPTION = 'A todo list that is live, works offline, and forgets nothing.'
THEME_COLORS = ('#f9f6f1', '#181612')       # as --paper in the styles: light, dark

TEMPLATES.update({
    'layout': '''\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1, viewport-fit=cover">
<title>{{!title}}</title>
% if live:
<meta name="owner" content="{{owner}}">
% end
<meta name="description" content="{{description}}">
<meta name="theme-color" content="{{colors[0]}}" media="(prefers-color-scheme: light)">
<meta name="theme-color" content="{{colors[1]}}" media="(prefers-color-scheme: dark)">
<meta name="turbo-refresh-method" content="morph">
<meta name="turbo-refresh-scroll" content="preserve">
<link rel="icon" href="{{asset('icon.svg')}}" type="image/svg+xml">
<link rel="apple-touch-icon" href="/icon-180.png">
<link rel="manifest" href="{{asset('manifest.webmanifest')}}">
<link rel="stylesheet" href="{{asset('todol.css')}}" data-more="{{asset('more.css')}}">
% if live:
<script type="module" src="{{asset('live.js')}}"></script>
<script type="module" src="{{asset('todol.js')}}" data-more="{{asset('more.js')}}"></script>
% else:
<link rel="stylesheet" href="{{asset('more.css')}}">
% end
</head>
<body>
{{!base}}
</body>
</html>
''',
    'page': '''\
% if editing:
<link rel="stylesheet" href="{{asset('more.css')}}">
% end
{{!source}}
<main>
<section class="todoapp" id="todoapp">
<header class="header" id="top">
<h1>todos</h1>
<form class="new" action="/todos" method="post" id="new">
<input type="hidden" name="form_key" value="{{key}}">
<input type="hidden" name="showing" value="{{showing}}">
<input type="text" class="new-todo" name="title" value="{{text}}" \
placeholder="What needs to be done?" aria-label="What needs to be done?" \
aria-describedby="new-todo-error" autocomplete="off" enterkeyhint="done" dir="auto"\
{{!'' if editing else ' autofocus'}}>
<button type="submit" class="save">Add</button>
<p class="error" id="new-todo-error" role="alert" data-turbo-permanent>{{error}}</p>
</form>
<p class="error" id="notice" role="alert" data-turbo-permanent></p>
% if first:
<p class="error" id="keeps-nothing" role="alert" hidden>This browser keeps no cookies, so nothing \
of this list stays. Allow them for this site.</p>
% end
</header>
<section class="main" id="list" aria-label="Todos">
<form class="all" action="/todos" method="post" id="all">
<input type="hidden" name="_method" value="PATCH">
<input type="hidden" name="completed" value="0">
{{!toggle_all}}\
<label for="toggle-all">Mark all as complete</label>
<button type="submit" class="save">Save</button>
</form>
<ul class="todo-list" id="todos" \
data-showing="{{'active completed' if showing == 'all' else showing}}">
{{!rows}}\
</ul>
<ul id="shelf" data-showing="{{shelved}}" hidden>
{{!shelf}}\
</ul>
</section>
<footer class="footer" id="bottom">
{{!count}}\
{{!filters}}\
<form class="clear" action="/todos/completed" method="post" id="clear">
<input type="hidden" name="_method" value="DELETE">
<button type="submit" class="clear-completed">Clear completed</button>
</form>
</footer>
<div class="status" id="status">
<form class="undo" id="undo" action="/undo" method="post" \
data-turbo-permanent{{!'' if undo else ' hidden'}}>
<input type="hidden" name="of" value="{{undo and undo[0]}}">
<span class="undo-said">{{undo and undo[1]}}</span>
<button type="submit">Undo</button>
</form>
<p class="connection" id="connection" role="status" data-connection data-turbo-permanent \
hidden></p>
<p class="all-done">All done. Enjoy the rest of the day.</p>
<p class="hint"><span class="by-mouse">Double-click to edit a todo, ? for the keys</span>\
<span class="by-touch">Tap a title to edit it</span></p>
</div>
<template id="blank">{{!blank}}</template>
<p class="empty quiet">All clear. What would you like to get done?</p>
<p class="nothing quiet">Nothing in this view.</p>
</section>
</main>
<footer class="info">
<p class="lives">This list lives in the browsers where you open it.</p>
<p class="devices"><a href="/devices">Open on another device</a></p>
<p><a href="/todos.txt" id="copy">Copy as text</a></p>
</footer>
<p class="visually-hidden" id="announcer" role="status" data-turbo-permanent></p>
% if first:
<link rel="stylesheet" href="/kept.css">
% end
''',
    'todo': '''\
<li class="{{state}}" id="todo_{{id}}" data-version="{{version}}"\
{{!f' data-key="{key}"' if key else ''}}>
<form action="/todos/{{id}}" method="post" autocomplete="off">
<div class="view">
<input type="hidden" name="completed" value="0">
<input class="toggle" type="checkbox" name="completed" value="1" \
aria-label="{{title}}"{{' checked' if completed else ''}}>
<label dir="auto" translate="no">{{title}}</label>
<button type="submit" class="save" name="_method" value="PATCH" \
aria-label="Save {{title}}"></button>
<a class="rename" href="/todos/{{id}}/edit" aria-label="Edit {{title}}"></a>
<button type="submit" class="destroy" name="_method" value="DELETE" \
aria-label="Remove {{title}}"></button>
</div>
</form>
% if editing:
<form class="editor" action="/todos/{{id}}" method="post">
<input type="hidden" name="_method" value="PATCH">
<input type="hidden" name="showing" value="{{showing}}">
<input type="text" class="edit" name="title" value="{{text}}" aria-label="Edit {{title}}" \
aria-describedby="edit-error" autocomplete="off" enterkeyhint="done" dir="auto" autofocus>
<button type="submit" class="save" aria-label="Save"></button>
<p class="error" id="edit-error" role="alert">{{error}}</p>
</form>
% end
</li>
''',
    'filters': '''\
<ul class="filters">
% for name, path in paths.items():
<li><a href="{{path}}"\
{{!' class="selected" aria-current="page"' if name == showing else ''}}>\
{{name.capitalize()}}</a></li>
% end
</ul>
''',
    'count': '''\
<span class="todo-count" id="todo-count" data-active="{{active}}" data-completed="{{completed}}" \
data-version="{{version}}"><strong>{{active}}</strong> \
{{'item' if active == 1 else 'items'}} left</span>
''',
    'toggle_all': '''\
<input class="toggle-all" id="toggle-all" type="checkbox" name="completed" value="1" \
data-version="{{version}}"{{' checked' if completed and not active else ''}}>
''',
    # Turbo Streams. The targets say what a tab shows, so that one message is right for every
    # filter. Where the row is missing, an empty one comes first, which the last stream fills: so
    # the row is sent once.
    'put_todo': '''\
<turbo-stream action="remove" \
targets="[data-showing]:not([data-showing~={{state}}]) > #todo_{{id}}" \
data-row="todo_{{id}}" data-version="{{version}}"></turbo-stream>
<turbo-stream action="append" \
targets="[data-showing~={{state}}]:not(:has(> #todo_{{id}}))"><template>\
<li class="" id="todo_{{id}}" data-version="{{version}}"\
{{!f' data-key="{key}"' if key else ''}}></li></template></turbo-stream>
<turbo-stream action="replace" method="morph" \
targets="[data-showing~={{state}}] > #todo_{{id}}"><template>{{!row}}</template>\
</turbo-stream>
''',
    # Of the version that a list has: undo may bring a row back, with a higher one.
    'remove_todo': '''\
<turbo-stream action="remove" target="todo_{{id}}" data-row="todo_{{id}}" \
data-version="{{version}}"></turbo-stream>
''',
    'devices': '''\
% rebase('layout', title='Devices &middot; todol', live=False)
<main><section class="todoapp message devices">
<h1>Your devices</h1>
% if link:
<p>Open this link in the other browser, or type the code at <b>{{join}}</b>. Both are good once, \
for ten minutes. Whoever opens one of them sees this list, and can change it.</p>
<p class="link"><a href="{{link}}">{{link}}</a></p>
<p class="code"><output>{{code}}</output></p>
% else:
<p>There are no accounts: a list lives in the browsers where it has been opened.</p>
<form action="/devices" method="post"><button type="submit">Open on another device</button></form>
% end
<h2>A list from another device</h2>
<p><a href="/join">I have a code</a></p>
<h2>This device</h2>
<p>This browser has {{number}}. If no other device has this list open, nobody finds it again \
after one of these:</p>
<form action="/fresh" method="post"><button type="submit">Start a fresh list</button></form>
<form action="/forget" method="post"><button type="submit">Forget this device</button></form>
<p><a href="/">Back to the list</a></p>
</section></main>
''',
    'join': '''\
% rebase('layout', title='Open a list &middot; todol', live=False)
<main><section class="todoapp message join">
<h1>Open a list</h1>
<form action="/join" method="post">
% if not token:
<p>On the device that has the list, choose “Open on another device”. It shows a code.</p>
<label for="code">Code</label>
<input type="text" class="code field" id="code" name="code" value="{{code}}" autocomplete="off" \
spellcheck="false" \
autocapitalize="characters" enterkeyhint="go" maxlength="50" required autofocus \
aria-describedby="join-error">
<p class="error" id="join-error" role="alert">{{error}}</p>
<button type="submit">Open the list</button>
% else:
<input type="hidden" name="token" value="{{token}}">
<p>Somebody has offered you a list. Open it only if you know whose it is: everybody who has it \
open sees and changes the same todos.</p>
% if own:
<p>This browser has a list of its own, with {{own}}. They can move into the list that you open. Or \
leave them: then only a device that also has them open shows them again.</p>
<button type="submit" name="own" value="bring">Open it, and bring mine along</button>
<button type="submit" name="own" value="leave">Open it, and leave mine</button>
% else:
<button type="submit" name="own" value="leave">Open the list here</button>
% end
% end
</form>
<p><a href="/">Back to my list</a></p>
</section></main>
''',
    'error': '''\
% rebase('layout', title=f'{status} &middot; todol', live=False)
<main><section class="todoapp message">
<h1>{{status}}</h1>
<p>{{message}}</p>
% if details:
<pre>{{details}}</pre>
% end
<p><a href="/">Back to the list</a></p>
</section></main>
''',
})
Template.defaults.update(colors=THEME_COLORS, description=DESCRIPTION)


BLANK_TODO = Todo(0, '...', False, 0)        # of which the script makes a row before the answer


def render_page(user, showing, todos, totals, editing=None, text='', error='', undo=''):
    """The list. todos: all of them; those that the filter leaves out are on the shelf, so that the
    script can switch filters alone. editing: the id of the todo in whose place a form stands; text
    and error belong to that form, or else to the field for a new todo. undo: the key of a change,
    and what was done."""
    rows, shelf = [], []
    for todo in todos:
        shown = showing in ('all', 'completed' if todo.completed else 'active')
        (rows if shown else shelf).append(
            render_todo(todo) if todo.id != editing else render_editor(todo, showing, text, error))
    if editing:
        text = error = ''
    body = render('page', showing=showing, rows=''.join(rows), shelf=''.join(shelf),
                  shelved={'active': 'completed', 'completed': 'active'}.get(showing, ''),
                  totals=totals, key=new_key(), editing=editing,
                  text=text, error=error, undo=undo, source=stream_source(todos_stream(user)),
                  count=render_count(totals), toggle_all=render_toggle_all(totals),
                  filters=render_filters(showing), blank=render_todo(BLANK_TODO),
                  first=is_new_session())
    title = f'{totals.active} left &middot; todol' if totals.active else 'todol'
    before, between, after = layout(title)
    return f'{before}{user}{between}{body}{after}'


@functools.lru_cache(256)
def layout(title):
    """What stands before, between and after the owner's id and the body of a live page. title: as
    HTML."""
    return render('layout', title=title, owner='\0', live=True, base='\0').split('\0')


@functools.lru_cache(2048)      # a row is a function of the todo alone
def render_todo(todo):
    return render('todo', **todo._asdict(), state='completed' if todo.completed else '',
                  editing=False)


def render_editor(todo, showing, text, error=''):
    """The row with the form that renames it. showing: the filter to go back to."""
    return render('todo', **todo._asdict(), editing=True, showing=showing, text=text, error=error,
                  state='completed editing' if todo.completed else 'editing')


@functools.lru_cache(256)
def render_put(todo):
    """The streams that show a todo as it is now, wherever it belongs."""
    return render('put_todo', id=todo.id, version=todo.version, key=todo.key, row=render_todo(todo),
                  state='completed' if todo.completed else 'active')


@functools.lru_cache(256)       # the answer to a change, its broadcast and a page show the same
def render_count(totals):
    return render('count', **totals._asdict())


@functools.lru_cache(256)
def render_toggle_all(totals):
    return render('toggle_all', **totals._asdict())


@functools.cache
def render_filters(showing):
    return render('filters', showing=showing, paths=PATHS)


@functools.lru_cache(256)
def render_totals(totals):
    """The streams that bring the counter and the toggle-all box in step."""
    return (turbo_stream('replace', 'todo-count', render_count(totals), morph=True) +
            turbo_stream('replace', 'toggle-all', render_toggle_all(totals), morph=True))


# === Broadcasts: a change, told to the user's tabs =======================================
# Rendered in the job, from the state at that moment: a message may come twice or stand for several
# changes, and what a tab shows still ends up as the database has it. The acting tab gets the same
# streams as its answer.

def render_changes(user, ids):
    """Turbo Streams that bring a tab in step with the todos of these ids, or keys; ids None: with
    everything."""
    if ids is None:
        return REFRESH
    totals = count_todos(user)      # first: a removal of that version harms no row put back since
    return ''.join([render_row(user, id, totals) for id in ids]) + render_totals(totals)


def render_row(user, id, totals):
    todo = _look_up(user, id)
    return render_put(todo) if todo else render('remove_todo', id=id, version=totals.version)


@jobs.task(queue='urgent', retry_seconds=0.5, batch=True)
def broadcast_todos(changes):
    """changes: dicts of a user, and the ids of the todos that changed, or None for too many. What
    changed of one user goes out together, in messages of at most BROADCAST_ROWS todos."""
    changed, messages = {}, []
    for change in changes:
        changed.setdefault(change['user'], []).extend(change['ids'] or [None])
    for user, ids in changed.items():
        ids = list(dict.fromkeys(ids))
        parts = [None] if None in ids else [ids[at:at + BROADCAST_ROWS]
                                            for at in range(0, len(ids), BROADCAST_ROWS)]
        messages += [(todos_stream(user), functools.partial(render_changes, user, part))
                     for part in parts]
    cable.broadcast_all(messages)


# === Routes: one function for each request ===============================================
# Forms work without script, with _method for what they can't say.

# Each change takes a field key: see Todos. A row is named by its id, or by its key K.n.

KEEPS_NOTHING = '#keeps-nothing { display: block !important }'
UNDO_COOKIE = f'{APP}_undo'
NAME = r'[0-9]{1,18}|[A-Za-z0-9_.:-]{1,100}\.[0-9]{1,5}'      # of a row; ids: within 64 bits
ROW_NAME, ID = re.compile(NAME), f'<id:re:{NAME}>'


@app.get([*PATHS.values()])
def show_list():
    """The list through a filter."""
    user, showing = current_user(), bottle.request.path[1:] or 'all'
    totals = count_todos(user)
    if wanted() == 'json':
        return as_json({'showing': showing, 'active': totals.active, 'completed': totals.completed,
                        'todos': [public(todo) for todo in list_todos(user, showing)]})
    return render_page(user, showing, list_todos(user), totals, undo=offered_undo(user))


@app.get('/todos.json')
def show_json():
    """The whole list for programs; POST /todos takes it."""
    return as_json({'todos': [public(todo) for todo in list_todos(current_user())]})


@app.get('/todos.txt')
def show_text():
    """The whole list as text; POST /todos takes it too."""
    bottle.response.content_type = 'text/plain; charset=UTF-8'
    return text_of(list_todos(current_user()))


@app.post('/todos')
def create():
    """Create todos, as one change: title of one; or text, a line for each; or todos, a list."""
    user, form = current_user(), fields()
    title, key = form.get('title', ''), form.get('key')
    if form.get('form_key') and not key:        # of a page: the same form may send another title
        digest = hashlib.sha256(f'{form["form_key"]}\0{title}'.encode()).hexdigest()
        key = f'{str(form["form_key"])[:16]}.{digest[:24]}'
    given = given_todos(form)
    try:
        todos = create_todos(user, given or [(title, False)], key)
    except (TitleError, LimitError) as error:
        return invalid(error, 'new-todo-error', user, text=title)
    data = [public(todo) for todo in todos]
    ids, kept = [todo.id for todo in todos], {todo.key for todo in todos}
    if key:                             # the script may show rows that are gone since
        ids += {f'{key}.{number}' for number in range(len(given or [title]))} - kept
    return changed(user, ids, {'todos': data} if given else data[0] if data else {}, status=201)


def given_todos(form):
    """The todos of a form or JSON that has several, as tuples of title and completed, or None.
    Raises InvalidField."""
    if isinstance(form.get('text'), str):
        return todos_of(form['text'])
    todos = form.get('todos')
    if todos is None:
        return None
    if not isinstance(todos, list) or not all(isinstance(todo, dict) for todo in todos):
        raise InvalidField('todos must be a list of objects with title and completed')
    return [(todo.get('title'), flag({'completed': False, **todo}, 'completed')) for todo in todos]


@app.get(f'/todos/{ID}/edit')
def edit(id):
    """The form that renames a todo, in the place of its row."""
    user, id = current_user(), id_or_key(id)
    with shown_as_gone(user, id):
        todo = find_todo(user, id)
    if wanted() == 'html':
        return page_with(user, editing=todo.id, text=todo.title)
    return respond(lambda: turbo_stream('replace', f'todo_{todo.id}', render_editor(
        todo, filter_of_page(), todo.title)), public(todo))


@app.patch(f'/todos/{ID}')
def update(id):
    """Rename a todo (title), or set whether it is done (completed), or both."""
    user, form, id = current_user(), fields(), id_or_key(id)
    if form.get('title') is None and 'completed' not in form:
        raise InvalidField('give a title, or completed, or both')
    completed = flag(form, 'completed') if 'completed' in form else None
    try:
        with shown_as_gone(user, id):
            key = change_key() if 'title' in form else form.get('key')
            todo = update_todo(user, id, form.get('title'), completed, key)
    except TitleError as error:
        return invalid(error, 'edit-error', user, editing=id, text=form['title'])
    return changed(user, [id], public(todo) if todo else {})


@app.delete(f'/todos/{ID}')
def delete(id):
    """Delete a todo."""
    user, id = current_user(), id_or_key(id)
    with shown_as_gone(user, id):
        delete_todo(user, id, change_key())
    return changed(user, [id], {})


@app.patch('/todos')
def toggle_all():
    """Set many todos, all or those of ids[], to completed or not."""
    user, form, names = current_user(), fields(), names_of_rows()
    ids = toggle_todos(user, flag(form, 'completed'), ids_of(user, names), change_key())
    return changed(user, [*dict.fromkeys([*ids, *(names or ())])], {'ids': ids})


@app.delete('/todos/completed')
def clear():
    """Delete the completed todos, all or those of ids[]."""
    user, names = current_user(), names_of_rows()
    ids = clear_completed(user, ids_of(user, names), change_key())
    return changed(user, [*dict.fromkeys([*ids, *(names or ())])], {'ids': ids})


@app.post('/undo')
def undo():
    """Take back a change: of, its key, or else the newest that can be."""
    user, form = current_user(), fields()
    of = form.get('of') or None
    if not isinstance(of, str | None):
        raise InvalidField('of must be the key of a change')
    try:
        ids = take_back(user, of, form.get('key'))
    except LimitError as error:
        return invalid(error, 'notice', user)
    if not ids:
        raise NotFound(f'There is nothing to undo{" any more" if of else ""}.')
    return changed(user, ids, {'ids': ids})


@app.get('/devices')
def show_devices():
    """How a list gets to another device, and how it leaves this one."""
    return render_devices(current_user())


@app.post('/devices')
def offer():
    """Make a link and a code that open this list in another browser."""
    environ = bottle.request.environ
    token, code = offer_list(current_user())
    join = f'{"https" if is_https(environ) else "http"}://{host_of(environ)}/join'
    code = f'{code[:4]} {code[4:]}'
    if wanted() == 'json':
        return as_json({'link': f'{join}/{token}', 'code': code, 'join': join,
                        'seconds': LINK_SECONDS})
    return render_devices(current_user(), link=f'{join}/{token}', join=join, code=code)


@app.get('/join')
def show_join():
    """Where the code is typed."""
    current_user()
    return render('join', token='', error='', code='')


@app.get('/join/<token:re:[A-Za-z0-9_-]{22}>')
def show_link(token):
    """Ask before the list is opened: browsers and messengers look at links by themselves."""
    user = current_user()
    if offered_list(token, user) == user:
        return respond(back='/')
    return render_join(user, token)


@app.post('/join')
def join():
    """Open the list of a token, or a code; own: bring or leave the todos that are here."""
    user, form = current_user(), fields()
    token, code, own = (form.get(name, '') for name in ('token', 'code', 'own'))
    if not isinstance(token, str) or not isinstance(code, str):
        raise InvalidField('give the token of a link, or a code')
    try:
        token = token or token_of_code(code, user, client_address(bottle.request.environ))
        owner = offered_list(token, user)
    except (NotFound, GuessError) as error:
        if wanted() != 'html':
            raise
        bottle.response.status = error.status
        return render('join', token='', error=str(error), code=code)
    if owner != user and own not in ('bring', 'leave') and has_todos(user):
        if wanted() == 'html':
            return render_join(user, token)
        raise InvalidField('own must be bring or leave: this browser has todos')
    become(join_list(token, user, own == 'bring'))
    return respond(data={}, back='/')


@app.post('/fresh')
def fresh():
    """A new list for this browser."""
    fields()
    become(new_user())
    return respond(data={}, back='/')


@app.post('/forget')
def forget_device():
    """A new list, and nothing of the old one is left in this browser."""
    bottle.response.set_header('Clear-Site-Data', '"storage"')
    return fresh()


@app.get('/kept.css')
def kept():
    """Shows a sentence where the cookie that came with the page does not come back: with and
    without script, before anything is typed."""
    bottle.response.content_type = 'text/css; charset=UTF-8'
    return '' if session_of(bottle.request.environ) else KEEPS_NOTHING


def has_todos(user):
    return any(count_todos(user)[:2])


def render_devices(user, **offer):
    return render('devices', number=_todos(sum(count_todos(user)[:2])), **{'link': '', **offer})


def render_join(user, token):
    number = sum(count_todos(user)[:2])
    return render('join', token=token, own=_todos(number) if number else '')


def offered_undo(user):
    """The key of the change that this browser has made without script a moment ago, and what it
    was, if it can be undone; else ''."""
    cookie = re.search(f'{UNDO_COOKIE}=([^ ;]+)', bottle.request.environ.get('HTTP_COOKIE', ''))
    said = what_was_done(user, cookie[1]) if cookie else None
    return (cookie[1], said) if said else ''


def id_or_key(text):
    """What a path names a row by: its id, or its key as text."""
    return int(text) if text.isdigit() else text


def names_of_rows():
    """The ids, or keys, of ids[], by which a change made offline is for what was seen then; None:
    all rows. Raises InvalidField."""
    names = fields().get('ids[]', fields().get('ids'))
    if names is None:
        return None
    if not isinstance(names, list) or not all(
            isinstance(name, int | str) and ROW_NAME.fullmatch(str(name)) for name in names):
        raise InvalidField('ids must be a list of ids, or keys, of todos')
    return [id_or_key(str(name)) for name in names]


def change_key():
    """The key that the client gave to its change. Without script it gets one, in a cookie by which
    the next page offers to undo it."""
    key = fields().get('key')
    check_key(key)
    if wanted() == 'html':
        key = key or new_key()
        bottle.response.set_cookie(UNDO_COOKIE, key, path='/', max_age=60, httponly=True,
                                   samesite='lax', secure=is_https(bottle.request.environ))
    return key


def flag(form, name):
    """A field that is 0 or 1, or true or false in JSON. Raises InvalidField."""
    value = form.get(name)
    if value in ('0', '1', 0, 1):       # in Python, true is 1
        return value in ('1', 1)
    raise InvalidField(f'{name} must be 0 or 1, not {str(value)[:50]!r}')


def public(todo):
    """What programs get to see of a todo."""
    return {'id': todo.id, 'title': todo.title, 'completed': todo.completed}


def changed(user, ids, data, status=200):
    """The answer to a change of the todos of these ids."""
    return respond(lambda: render_changes(user, ids if len(ids) <= BROADCAST_ROWS else None), data,
                   PATHS[filter_of_page()], status)


@contextlib.contextmanager
def shown_as_gone(user, id):
    """The tab that asks for a todo that is not there removes it."""
    try:
        yield
    except NotFound as error:
        error.streams = render_changes(user, [id])
        raise


def filter_of_page():
    """The filter of the page that the request came from: a form that stands at another URL says it
    itself."""
    named, page = fields().get('showing'), came_from()
    if named in [*PATHS]:       # from JSON it may be anything
        return named
    return next((name for name, path in PATHS.items() if path == page), 'all')


def page_with(user, **values):
    """The page that the request came from, with something in it."""
    showing = filter_of_page()
    if values.get('editing'):
        todo = find_todo(user, values['editing'])
        values['editing'] = todo.id
        if showing == ('active' if todo.completed else 'completed'):
            showing = 'all'
    return render_page(user, showing, list_todos(user), count_todos(user), **values)


def invalid(error, target, user, **values):
    """The answer to a title that can't be kept: the message at its field, the typed text kept."""
    error.target = target
    if wanted() != 'html':
        raise error
    bottle.response.status = error.status
    return page_with(user, error=str(error), **values)


# === Styles: values, then meanings, then rules ===========================================

add_asset('todol.css', compact(r'''
:root {
  --pencil: url("data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 20 20'%3E%3Cpath d='M2 14v4h4L15 9l-4-4zM16 8l-4-4 2-2 4 4z'/%3E%3C/svg%3E");
  --plus: linear-gradient(currentColor 0 0) center / 2px 16px no-repeat,
    linear-gradient(currentColor 0 0) center / 16px 2px no-repeat;
  --title: clamp(2.25rem, 7vw, 3rem);
  --text: clamp(1.0625rem, 1rem + .3vw, 1.1875rem);
  --row: calc(1.45 * var(--text) + 1.3rem);
  --quick: 150ms ease-out;

  color-scheme: light;
  --paper: #f9f6f1;
  --field: #fffdf7;
  --ink: #282622;
  --done: #62605b;
  --line: #e0ded8;
  --edge: #82807b;
  --accent: #2559bf;
  --danger: #b32322;
  --tint: #dde2ee;
}
/* What older browsers lack */
@supports (color: light-dark(#000, #000)) {
  :root {
    color-scheme: light dark;
    --paper: light-dark(#f9f6f1, #181612);
    --field: light-dark(#fffdf7, #23211d);
    --ink: light-dark(#282622, #e0ded8);
    --done: light-dark(#62605b, #aaa7a2);
    --line: light-dark(#e0ded8, #32302c);
    --edge: light-dark(#82807b, #7c7a75);
    --accent: light-dark(#2559bf, #80b3fd);
    --danger: light-dark(#b32322, #f98f87);
    --tint: color-mix(in oklab, var(--accent) 14%, var(--paper));
  }
}

*, ::before, ::after { box-sizing: border-box; min-width: 0; margin: 0; }
[hidden], .error:empty { display: none !important; }
/* Nothing in focus hides below what stays in reach. */
html { scroll-padding-block: 5.5rem 6.5rem; }
body {
  background: var(--paper); color: var(--ink);
  font: var(--text)/1.45 system-ui, sans-serif; overflow-wrap: break-word;
}
main, .info {
  max-width: 36rem; margin: auto; padding: 0 max(.75rem, env(safe-area-inset-left));
}
main { padding-top: 7vh; container-type: inline-size; }
ul { padding: 0; list-style: none; }
input, textarea, button {
  padding: 0; border: 0; border-radius: 0; background: none; color: inherit; font: inherit;
}
button, [type="checkbox"] { cursor: pointer; }
:disabled { pointer-events: none; }
button:hover, .filters a:hover { text-decoration: underline; }
:focus-visible {
  outline: 2px solid var(--accent); outline-offset: -3px; border-radius: 10px;
}
a, button, .new::before { color: var(--accent); }
::placeholder, .all, .completed label, .rename, .destroy, .footer, .status, .info, .quiet {
  color: var(--done); opacity: 1;
}
.all, .error, .save, .footer, .status, .info {
  font-size: .875rem; font-variant-numeric: tabular-nums;
}
.error { grid-column: 1 / -1; padding: .5rem 0 0 48px; color: var(--danger); }
.visually-hidden {
  position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%);
  white-space: nowrap;
}
.new, .all, .todo-list li, .view, .editor, [type="checkbox"] { display: grid; }
.new, .all, .editor { grid-template-columns: 1fr auto; align-items: center; }

/* Entry */
h1 {
  margin: 0 0 .25rem 48px; font-size: var(--title); font-weight: 300; line-height: 1.1;
  letter-spacing: -.025em;
}
.header { margin: 0 -.5rem; padding: 0 .5rem .75rem; background: var(--paper); }
.new { position: relative; padding-top: .75rem; }
.new::before {
  content: ""; position: absolute; top: .75rem; width: 48px; height: 3.5rem;
  background: var(--plus);
}
.new-todo, .field {
  width: 100%; height: 3.5rem; padding: 0 1rem; border: 1px solid var(--edge);
  border-radius: 14px; background: var(--field);
}
.new-todo { padding-left: 47px; }
.new-todo:focus, .field:focus {
  border-radius: 14px; outline-offset: -1px; box-shadow: 0 0 0 5px var(--tint);
}
.save {
  height: 36px; margin-left: .5rem; padding: 0 .75rem; border: 1px solid var(--edge);
  border-radius: 10px;
}
.save:empty::before { content: "Save"; }
/* Where the script is late or never runs, they come; where it runs, they are never seen. */
.scripted .save { display: none; }
@media (scripting: enabled) { .save { animation: late 1ms 3s backwards; } }
@keyframes late { from { position: absolute; visibility: hidden; } }

/* Rows */
.all { grid-template-columns: 48px 1fr auto; }
.todo-list li { border-top: 1px solid var(--line); }
.todo-list form { grid-area: 1 / 1; overflow: clip; }
.view { grid-template-columns: 48px 1fr auto 40px 40px; }
.view label, .edit { padding: .65rem 0; overflow-wrap: anywhere; text-align: start; }
.completed label { text-decoration: line-through; text-decoration-thickness: 1px; }
.view .save { grid-column: 3; align-self: center; }
.rename, .destroy { grid-column: 4; height: var(--row); }
.destroy { grid-column: 5; }
.rename::before, .destroy::before {
  content: ""; display: block; height: 100%; background: currentColor;
  mask: var(--pencil) center / 16px no-repeat;
}
.destroy::before { background: var(--plus); mask: none; rotate: 45deg; }
.rename:hover, .destroy:hover { color: var(--accent); }
[type="checkbox"] {
  appearance: none; place-items: center; width: 48px; height: var(--row);
}
[type="checkbox"]::before, [type="checkbox"]::after {
  content: ""; grid-area: 1 / 1; width: 24px; height: 24px;
  border: 1.5px var(--box, solid) var(--edge); border-radius: 8px;
  background: var(--field); transition: var(--quick);
}
[type="checkbox"]::after {
  width: 8px; height: 14px; border: solid var(--accent);
  border-width: 0 2.5px 2.5px 0; border-radius: 0; background: none;
  transform: translateY(-2px) rotate(45deg); clip-path: inset(100% 100% 0 0);
}
[type="checkbox"]:hover::before { border-color: var(--accent); }
[type="checkbox"]:checked::before { border-color: var(--tint); background: var(--tint); }
[type="checkbox"]:checked::after { clip-path: inset(0); }
.toggle-all { height: 44px; }
.toggle-all::before, .toggle-all::after { scale: .75; }

/* A row on its way looks like any other for half a second. */
[data-pending] { --box: dashed; color: var(--done); animation: fresh 1ms .5s backwards; }
:has([data-state="offline"]) [data-pending] { animation: none; }
@keyframes fresh { from { --box: solid; color: var(--ink); } }

/* Small print: the counts and filters, and below them one line with what there is to say now */
.footer, .status {
  order: 1; display: var(--bar); flex-wrap: wrap; align-items: center; gap: 0 .75rem;
  padding-left: 12px; background: var(--paper);
}
.footer { border-top: 1px solid var(--line); }
strong { color: var(--ink); }
.filters { display: flex; flex-wrap: wrap; }
.filters a {
  display: block; min-width: 40px; padding: 12px .6rem; color: inherit; text-align: center;
  text-decoration: none; text-underline-offset: .5em;
}
.filters .selected {
  color: var(--ink); text-decoration: underline; text-decoration-color: var(--accent);
  text-decoration-thickness: 2px;
}
.clear { margin-left: auto; }
.clear-completed, .undo button, .info button { min-height: 44px; }
.info a { display: inline-block; padding: .75rem 0; }
.status { display: flex; min-height: 44px; line-height: 1.25; }
.undo { display: flex; align-items: center; gap: .75rem; }
.undo span { max-height: 2.5em; overflow: hidden; overflow-wrap: anywhere; }
.undo button { flex: none; font-weight: 600; }
.connection::before { content: "● " / ""; color: var(--danger); }
.info {
  display: flex; flex-wrap: wrap; align-items: center; justify-content: center;
  gap: 0 1.5rem; padding-block: 1rem 2rem; text-align: center; text-wrap: balance;
}
.lives { flex-basis: 100%; }

.quiet { padding: 2.5rem 1rem; text-align: center; text-wrap: balance; }
.todoapp {
  display: flex; flex-direction: column;
  --list: block; --bar: flex; --beside: -44px 8rem 0 0; --empty: none; --none: none; --hint: block;
  --rest: none; --below: 0; --clear: block;
}
.main { display: var(--list); }
.empty { display: var(--empty); }
.nothing { display: var(--none); }
.hint { display: var(--hint); }
.all-done { display: var(--rest); }
.todoapp:where(:not(:has(.todo-list > li))) { --none: block; }
.todoapp:where(:has([data-active="0"])) { --hint: none; --rest: block; }
.todoapp:not(:has(.todo-count:not([data-active="0"][data-completed="0"]))) {
  --list: none; --bar: none; --none: none; --empty: block; --rest: none;
  --beside: 0;
}
/* Both to be read: a line of their own */
.todoapp:has(.undo:not([hidden]) + .connection:not(:empty)) {
  --beside: 0; --below: 44px; --clear: none;
}
[data-completed="0"] ~ .clear { visibility: hidden; display: var(--clear); }
.undo:not([hidden]) ~ :not(.connection), .connection:not(:empty) ~ *, .connection:empty,
html:not(.scripted) .hint,
:has([data-active="0"][data-completed="0"]) > .info #copy { display: none; }

/* The field, the counter and the filters stay in reach, unless the text is large. */
@media (min-height: 30rem) {
  @container (min-width: 20rem) {
    .header { position: sticky; top: calc(-1.1 * var(--title) - .25rem); z-index: 1; }
    .footer, .status { position: sticky; bottom: 0; }
    .footer { bottom: var(--below); }
    .status { flex-wrap: nowrap; }
    .undo:not([hidden]) + .connection { flex: none; max-width: 55%; }
  }
}
@container (20rem <= width < 33rem) {
  .clear { flex-basis: 100%; text-align: end; }
  .status { margin: var(--beside); }
}
@container (width >= 33rem) {
  .todoapp { --bar: grid; --below: 44px; }
  .footer { grid-template: "count filters clear" 44px / 1fr auto 1fr; }
  .filters { grid-area: filters; }
  .status { justify-content: center; padding: 0; }
}

/* Where there is no mouse, a row is its title: a tap on it edits. */
.by-touch { display: none; }
@media (hover: hover) {
  .scripted .todo-list li:not(:hover, :focus-within) :is(.rename, .destroy) { opacity: 0; }
}
@media (hover: none) {
  .by-touch { display: inline; }
  .by-mouse { display: none; }
  .scripted .view { grid-template-columns: 48px 1fr auto 0 44px; }
  .scripted .todo-list li:not(.editing, :has(:focus-visible)) :is(.rename, .destroy):not(:active) {
    opacity: 0; pointer-events: none;
  }
}
@media (forced-colors: active) {
  [type="checkbox"] { appearance: auto; width: 24px; margin: 0 12px; }
  [type="checkbox"]::before, [type="checkbox"]::after { display: none; }
  .rename::before, .destroy::before { forced-color-adjust: none; }
}
@media (prefers-reduced-motion), print {
  *, ::before, ::after { animation-duration: 1ms !important; transition: none !important; }
}
@media print {
  :root { color-scheme: light; --paper: #fff; }
  .header, .footer { position: static; }
  .new, .all, .filters, .clear, .status, .info, .view > :not(input, label) { display: none; }
}
''', STYLE_MARKS), 'text/css; charset=UTF-8')

# What a list that was just opened does not need: the script fetches it with more.js. Pages that
# have a form for the editor, or say one thing, load it themselves.
add_asset('more.css', compact(r'''
/* Rows that came from elsewhere. They have their place at once, so that what is scrolled to stays. */
.todo-list li { transition: var(--quick); transition-property: opacity, translate; }
@starting-style {
  :has([data-state="live"]) .todo-list li:not(.editing, [data-pending]) {
    translate: 0 -.5rem; opacity: 0;
  }
}
[data-flash] { animation: flash 1.2s; }
@keyframes flash { 0%, 20% { background: var(--tint); } }

/* The editor lies on the row, text upon text. */
.editing {
  border-radius: 10px; background: var(--field); outline: 2px solid var(--accent);
  outline-offset: -2px;
}
.editing .view { visibility: hidden; }
.editor { grid-template-columns: 1fr auto; align-self: start; padding: 0 80px 0 48px; }
.edit { width: 100%; field-sizing: content; resize: none; }
.edit:focus { outline: 0; }
.editor .error { padding: 0 0 .5rem; }
@media (hover: none) {
  .scripted .editor { padding-right: 44px; pointer-events: none; }
  .editor > * { pointer-events: auto; }
  .editing .destroy { visibility: visible; }
}

/* Dialogs, and the pages that say or ask one thing */
dialog {
  max-width: min(26rem, 100vw - 1.5rem); margin: auto; padding: 1.25rem 1.5rem;
  border: 1px solid var(--edge); border-radius: 14px; background: var(--field);
  color: inherit;
}
::backdrop { background: #0006; }
h2 { margin-bottom: .75rem; font-size: 1.25em; font-weight: 400; }
dialog dl { display: grid; grid-template-columns: auto 1fr; gap: .25rem 1.5rem; }
dt, kbd { font: inherit; color: var(--done); }
dialog button, .message button {
  min-height: 44px; margin: .5rem .5rem 0 0; padding: 0 1rem; border: 1px solid var(--edge);
  border-radius: 10px; background: var(--field);
}
.message > * { margin: 0 0 1rem 48px; }
.message h2 { margin: 1.5rem 0 .5rem 48px; }
.message p, dialog p { margin-bottom: .5rem; }
.message .error { margin: 0; padding-left: 0; }
.message .field { margin-top: .25rem; }
.code { font-size: 1.5em; letter-spacing: .15em; }
.link { overflow-wrap: anywhere; }
''', STYLE_MARKS), 'text/css; charset=UTF-8')

# The icon, drawn once: a tick on a square of 16. An SVG for browsers; PNGs for phones, which cut it
# to a shape of their own, so there the ground reaches the edges, and the tick stays within the
# middle that Android's masks leave.
TICK = (4 + 8.6j, 6.8 + 11.4j, 12.2 + 5j)       # x + yj
TICK_WIDTH = 2.2
ICON_COLORS = ('2c55b8', 'ffffff')              # ground, tick
ICON_SIZES = (180, 192, 512)                    # of iOS, of Android
SHADES = 16                                     # from one colour to the other, for a smooth edge

add_asset('icon.svg', """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16">\
<rect width="16" height="16" rx="4.5" fill="#%s"/><path d="M%s" fill="none" stroke="#%s" \
stroke-width="%s" stroke-linecap="round" stroke-linejoin="round"/></svg>""" % (
    ICON_COLORS[0], ' '.join(f'{point.real:g} {point.imag:g}' for point in TICK), ICON_COLORS[1],
    TICK_WIDTH), 'image/svg+xml')
add_asset('manifest.webmanifest', lambda: json.dumps({
    'id': '/', 'name': APP, 'description': DESCRIPTION, 'start_url': '/', 'scope': '/',
    'display': 'standalone', 'theme_color': THEME_COLORS[0], 'background_color': THEME_COLORS[0],
    'icons': [{'src': asset_path('icon.svg'), 'type': 'image/svg+xml', 'sizes': 'any'}] + [
        {'src': f'/icon-{size}.png', 'type': 'image/png', 'sizes': f'{size}x{size}',
         'purpose': purpose} for size in ICON_SIZES[1:] for purpose in ('any', 'maskable')]}),
    'application/manifest+json')


@app.get('/icon-<size:int>.png')
def icon(size):
    """The icon as a PNG."""
    if size not in ICON_SIZES:
        raise NotFound('There is no icon of that size.')
    bottle.response.content_type = 'image/png'
    bottle.response.set_header('Cache-Control', 'public, max-age=86400')
    return in_thread(icon_png, size)        # some tenths of a second


@functools.cache
def icon_png(size):
    """The icon as the bytes of a PNG, of size x size pixels. Source: w3.org/TR/png-3"""
    pixel, lines = 16 / size, bytearray()
    for y in range(size):
        lines.append(0)                         # no filter
        lines += bytes(_shade((x + .5 + (y + .5) * 1j) * pixel, pixel) for x in range(size))
    ground, tick = map(bytes.fromhex, ICON_COLORS)
    palette = bytes(round(one + (other - one) * shade / (SHADES - 1))
                    for shade in range(SHADES) for one, other in zip(ground, tick, strict=True))
    header = struct.pack('>IIBBBBB', size, size, 8, 3, 0, 0, 0)       # 8 bits, of a palette
    chunks = ((b'IHDR', header), (b'PLTE', palette), (b'IDAT', zlib.compress(lines, 9)),
              (b'IEND', b''))
    return b'\x89PNG\r\n\x1a\n' + b''.join(
        struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
        for kind, data in chunks)


def _shade(point, pixel):
    """How much of a pixel the tick covers, as a number of SHADES."""
    away = min(_distance(point, start, end) for start, end in itertools.pairwise(TICK))
    covered = (TICK_WIDTH / 2 - away) / pixel + .5
    return round((SHADES - 1) * min(max(covered, 0), 1))


def _distance(point, start, end):
    """Between a point and a line from start to end."""
    line, way = end - start, point - start
    along = (way.real * line.real + way.imag * line.imag) / abs(line) ** 2
    return abs(way - line * min(max(along, 0), 1))


# === Script: todos on top of the live script =============================================

add_asset('todol.js', compact(r'''
// The todo list, on top of live.js: rows that don't wait for an answer, editing in
// place, undo, filters, keys, focus, order, what is said.
const { live } = globalThis;
const { $, $$, byId, order, onClick, change, changes, newKey, tell, hooks } = live;
const SHOWING = { '/active': 'active', '/completed': 'completed' };
if (location.pathname.endsWith('/edit')) history.replaceState(null, '', '/');

// A change is data: the rows that it touches as they are after it, and as they were before,
// which takes it back. A row that waits for the server has the key by which that will know
// it in the place of its id.
const todos = () => $$('#todos > li:not([data-gone]), #shelf > li');
const titleOf = row => $('label', row).textContent;
const isDone = row => row.classList.contains('completed');
const naming = row => ({ id: row.id, ref: row.dataset.key || row.id.slice(5) });
const stateOf = row => ({ ...naming(row), title: titleOf(row), completed: isDone(row) });
const find = ({ id, ref }) => id && byId(id) || byId(`todo_${ref}`) || $(`li[data-key="${ref}"]`);
function send(path, fields, rows, more) {
  for (const error of $$('.error')) error.textContent = '';
  const entry = change({ path, body: fields, rows, ...more });
  if (more?.was) later('offerUndo', entry);
}
hooks.apply = ({ key, rows }) => rows?.forEach(each => draw(each, key));
function draw({ id, ref, title, completed, gone }, key) {
  let row = find({ id, ref });
  if (gone) return row && leave(row);
  if (!row) {
    if (title === undefined || completed === undefined) return;         // gone elsewhere
    row = byId('blank').content.firstElementChild.cloneNode(true);
    row.id = id ?? `todo_${ref}`;
    row.dataset.key = ref;
    row.dataset.pending = key;
    $('form', row).setAttribute('action', `/todos/${ref}`);
    $('.rename', row).setAttribute('href', `/todos/${ref}/edit`);
    byId('todos').append(row);
  }
  if (title !== undefined && title !== titleOf(row)) {
    $('label', row).textContent = title;
    const says = { toggle: title, rename: `Edit ${title}`, destroy: `Remove ${title}` };
    for (const name in says) $(`.${name}`, row).setAttribute('aria-label', says[name]);
  }
  if (completed !== undefined) {
    $('.toggle', row).checked = completed;
    row.classList.toggle('completed', completed);
  }
}

hooks.ours = element => element.matches('.editor, dialog, [data-gone]');
hooks.morphing = (from, to) => from.matches('.editing') && to.classList.add('editing');
hooks.news = row => changes.length || row.toggleAttribute('data-flash', row.matches('#todos > li'));
addEventListener('animationend', ({ target }) => target.removeAttribute('data-flash'));
function focusBeside(row) {             // before it goes
  const beside = row.nextElementSibling ?? row.previousElementSibling;
  const same = beside && $(`[class="${document.activeElement.className}"]`, beside);
  (same ?? (beside ? $('.rename', beside) : $('.new-todo'))).focus();
}
// A removed row is gone at once; those below move into its place. Of several the first shows
// that: with a layout for each, a hundred would take seconds.
let closing = false;
hooks.leave = leave;
function leave(node) {
  if (!node.matches?.('#todos > li')) return node.remove();
  if ($('.editor', node)) return node.toggleAttribute('data-gone', true);     // the edit decides
  if (node.contains(document.activeElement)) focusBeside(node);
  const { nextElementSibling } = node, height = closing ? 0 : node.offsetHeight;
  node.remove();
  if (!height) return;
  closing = true;
  requestAnimationFrame(() => { closing = false; });
  later('closeGap', nextElementSibling, height);
}
// What can be done
function add(title) {
  const key = newKey(), row = { ref: `${key}.0`, title, completed: false };
  send('/todos', { title }, [row], { key, text: title });
  announce(`Added ${title}.`);
  land(row);
}
// A new row is seen. In the frame that shows it, so that one layout does for all.
function land(row) {
  requestAnimationFrame(() => find(row)?.scrollIntoView({ block: 'nearest' }));
}
function tick(row, completed) {
  send(`/todos/${naming(row).ref}`, { _method: 'PATCH', completed: Number(completed) },
    [{ ...naming(row), completed }]);
}
hooks.settled = (entry, answer) =>
  answer.ok && !entry.asked || later('settled', entry, answer);
hooks.submitting = (form, button) => {
  const row = form.closest('#todos > li'), field = $('.new-todo');
  if (form.matches('.editor')) later('save', form, true);
  else if (row && button?.matches('.destroy')) later('remove', row);
  else if (row) tick(row, $('.toggle', row).checked);
  else if (form.id === 'all') later('tickAll', byId('toggle-all').checked);
  else if (form.id === 'clear') later('clear');
  else if (form.id === 'undo') later('undo');
  else if (form.id === 'new') {
    const title = field.value.trim().replaceAll('\t', ' ');
    field.value = field.defaultValue = '';      // it may hold what was refused before the script
    if (title) add(title);
  } else return true;
  return false;
};
addEventListener('change', ({ target }) => {
  if (target.matches('.toggle')) tick(target.closest('li'), target.checked);
  if (target.id === 'toggle-all') later('tickAll', target.checked);
});

// The rest is fetched when there is a todo, or somebody is there who may make one. From then on
// it is called at once.
let rest, asked;
async function later(name, ...values) {
  try {         // asked once: Safari gives a module that still awaits something to who asks again
    rest ??= await (asked ??= import($('script[data-more]').dataset.more));
  } catch {
    asked = null;
    return name && tell('For that the network is needed.');
  }
  return rest[name]?.(...values);
}
for (const name of ['pointermove', 'pointerdown', 'keydown']) {
  addEventListener(name, event => later(event.key && 'press', event), { once: true });
}
onClick('.rename', link => later('edit', link.closest('li')));
onClick('#copy', link => later('copyList', link));
onClick('.devices a', () => later('showDevices'));
// A double click edits, or where there is no mouse a tap, which says where the caret is to be.
let touched = false;
addEventListener('pointerdown', ({ pointerType }) => { touched = pointerType !== 'mouse'; });
for (const name of ['click', 'dblclick']) addEventListener(name, event => {
  if (!event.target.matches('#todos .view label') || touched !== (name === 'click')) return;
  later('edit', event.target.closest('li'), undefined, touched && event);
});
addEventListener('paste', event => {
  const text = event.clipboardData?.getData('text/plain') ?? '';
  if (!event.target.matches('.new-todo') || !/\S\s*[\r\n]\s*\S/.test(text)) return;
  event.preventDefault();
  later('paste', text);
});

// Filters: the page holds every todo, those that are not shown on a shelf
function show() {
  const path = SHOWING[location.pathname] ? location.pathname : '/';
  const showing = SHOWING[path] ?? 'active completed';
  byId('todos').dataset.showing = showing;
  byId('shelf').dataset.showing = { active: 'completed', completed: 'active' }[showing] ?? '';
  for (const link of $$('.filters a')) {
    const selected = link.pathname === path;
    link.classList.toggle('selected', selected);
    if (selected) link.setAttribute('aria-current', 'page');
    else link.removeAttribute('aria-current');
  }
  arrange();
}
hooks.turned = show;
onClick('.filters a', link => {
  if (link.pathname !== location.pathname) history.pushState(null, '', link.pathname);
  show();
  announce(`${link.textContent}: ${byId('todos').children.length} shown.`);
});

// What follows from a change of the page: places, counter, title, announcements
let said = '', speaking, counted;
function announce(text) {
  if (text && !said.includes(text)) said += `${text} `;
  clearTimeout(speaking);
  speaking = setTimeout(() => {
    byId('announcer').textContent = `${said}${byId('todo-count').dataset.active} to do`;
    said = '';
  }, 100);
}
function place(row) {
  let before = row;
  while (order(before.previousElementSibling?.id ?? '', row.id) > 0) {
    before = before.previousElementSibling;
  }
  if (before !== row) before.before(row);
}
function arrange() {
  const list = byId('todos'), { showing } = list.dataset;
  for (const row of todos()) {
    const home = row.matches('.editing') || showing.includes(isDone(row) ? 'completed' : 'active')
      ? list : byId('shelf');
    if (row.parentNode === home) continue;
    if (row.contains(document.activeElement)) focusBeside(row);
    home.append(row);
    place(row);
  }
}
function recount() {
  const element = byId('todo-count'), all = todos().length, done = todos().filter(isDone).length;
  const active = all - done, now = `${active}, ${done}`;
  if (all) later();
  byId('toggle-all').checked = all && !active;
  if (now === `${element.dataset.active}, ${element.dataset.completed}` && now === counted) return;
  Object.assign(element.dataset, { active, completed: done });
  $('strong', element).textContent = active;
  $('strong', element).nextSibling.data = ` item${active === 1 ? '' : 's'} left`;
  setTimeout(() => { document.title = active ? `${active} left · todol` : 'todol'; });
  if (counted && now !== counted) announce('');
  counted = now;
  const focused = !touched && $('#list :focus, #bottom :focus');    // a keyboard would come up
  if (focused && (getComputedStyle(focused).visibility === 'hidden' ||
    !focused.getClientRects().length)) $('.new-todo').focus();
}
const watch = new MutationObserver(records => {
  for (const { target, addedNodes } of records) {
    const rows = target.matches('#todos, #shelf') ? addedNodes : [target];
    for (const row of rows) if (row.parentNode?.matches('#todos, #shelf') && row.id) place(row);
  }
  arrange();
  recount();
  watch.takeRecords();                  // of what these two did
  rest?.seen();
});
watch.observe(byId('todoapp'), { childList: true, subtree: true,
  attributeFilter: ['id', 'class', 'data-active', 'data-completed', 'data-gone'] });

// The page as it is kept has nothing of the moment.
hooks.address = () => '/';
hooks.keeping = root => {
  for (const each of $$('.editor, dialog, [data-late], [href="/kept.css"]', root)) each.remove();
  for (const each of $$('.editing', root)) each.classList.remove('editing');
  for (const each of $$('.error, [role=status]', root)) each.textContent = '';
  $('#undo', root).hidden = true;
  root.classList.remove('scripted');
};

// Boxes ticked before this ran; a page that the service worker has kept may be of another filter.
for (const box of $$('#todos .toggle')) {
  if (box.checked !== isDone(box.closest('li'))) tick(box.closest('li'), box.checked);
}
show();
recount();
live.list = { todos, titleOf, isDone, naming, stateOf, find, send, draw, leave, add, land, tick,
  announce };
document.documentElement.classList.add('scripted');     // last: what it replaces may go
''', SCRIPT_MARKS), 'text/javascript; charset=UTF-8')
add_asset('more.js', compact(r'''
// What is not needed before there is a todo: what is done to many, or undone, editing, text in
// and out, keys, other devices.
const { $, $$, byId, visit, changes, newKey, tell, hooks, list } = globalThis.live;
const { todos, titleOf, isDone, naming, stateOf, find, send, draw, leave, add, land, tick,
  announce } = list;
const style = document.createElement('link');
Object.assign(style, { rel: 'stylesheet', href: $('link[data-more]').dataset.more });
style.dataset.late = '';
await new Promise(resolve => {
  style.onload = style.onerror = resolve;
  document.head.append(style);
});

// What can be done to a todo that is there. To many: to those that are seen, whatever there is
// elsewhere by the time that the server hears of it.
const idsOf = rows => rows.map(({ ref }) => ['ids[]', ref]);
export function tickAll(completed) {
  const was = todos().map(stateOf).filter(each => each.completed !== completed);
  send('/todos', [['_method', 'PATCH'], ['completed', Number(completed)], ...idsOf(was)],
    was.map(({ id, ref }) => ({ id, ref, completed })),
    { was, said: `Marked ${was.length} as ${completed ? '' : 'not '}done.` });
}
export function remove(row) {
  const { ref, title } = stateOf(row);
  take(`/todos/${ref}`, [], [stateOf(row)], `Removed “${title}”.`);
}
export function clear() {
  const was = todos().filter(isDone).map(stateOf);
  take('/todos/completed', idsOf(was), was,
    `Cleared ${was.length} todo${was.length === 1 ? '' : 's'}.`);
}
function take(path, ids, was, said) {
  send(path, [['_method', 'DELETE'], ...ids],
    was.map(({ id, ref }) => ({ id, ref, gone: true })), { was, said });
}
// The rows below one that is gone move into its place.
export function closeGap(row, height) {
  if (matchMedia('(prefers-reduced-motion)').matches) return;
  for (; row && row.getBoundingClientRect().top < innerHeight; row = row.nextElementSibling) {
    row.animate({ translate: [`0 ${height}px`, '0'] }, { duration: 150, easing: 'ease-out' });
  }
}

// Undo: of what waits, after a reload and of another tab too, and else of what the server did
// last. A change of which nothing stands any more, here or elsewhere, can't be taken back.
let undos = [...changes], offered, undoTimer;
hooks.owned = () => { undos = []; };
const stands = ({ was, rows }) => was && rows.some(({ gone, title, completed, ...row }) => {
  const now = find(row) && stateOf(find(row));
  return gone ? !now : now && (title ?? now.title) === now.title &&
    (completed ?? now.completed) === now.completed;
});
export function offerUndo(entry) {
  undos.push(entry);
  offered = entry;
  $('#undo .undo-said').textContent = entry.said;
  byId('undo').hidden = false;
  announce(entry.said);
  clearTimeout(undoTimer);
  undoTimer = setTimeout(tireOfUndo, 8000);
}
export function seen() {                // the page after a change
  if (offered && !stands(offered)) hideUndo();
}
function tireOfUndo() {
  if (byId('undo').matches(':hover, :focus-within')) undoTimer = setTimeout(tireOfUndo, 2000);
  else hideUndo();
}
function hideUndo(row) {
  const focused = byId('undo').contains(document.activeElement);
  offered = null;
  byId('undo').hidden = true;
  // Once the list is shown again: what is not can't have the focus.
  if (focused) queueMicrotask(() =>
    (row?.closest('#todos') ? $('.toggle', row) : $('.new-todo')).focus());
}
export function undo() {
  const { key, was } = [...undos, ...changes].filter(stands).pop() ?? {};
  if (!key && byId('connection').dataset.state === 'offline') return tell('Nothing to undo.');
  undos = undos.filter(each => each.key !== key);
  send('/undo', key ? { of: key } : {}, was, { asked: !key });
  hideUndo(was && find(was[0]));
  if (key) announce('Undone.');
}

// Editing in place: Enter or leaving the field saves, Escape does not
export function edit(row, text = titleOf(row), tap = null) {
  for (const open of $$('.editor')) save(open);
  const caret = tap ? caretAt($('label', row), tap) : text.length;
  row.insertAdjacentHTML('beforeend', `<form class="editor" method="post"><textarea class="edit"
    rows="1" dir="auto" autocomplete="off" enterkeyhint="done"
    aria-describedby="edit-error"></textarea><p class="error" id="edit-error"
    role="alert"></p></form>`);
  row.classList.add('editing');
  const field = $('.edit', row);
  field.setAttribute('aria-label', `Edit ${titleOf(row)}`);
  field.defaultValue = titleOf(row);
  field.value = text;
  grow(field);
  field.focus();
  field.setSelectionRange(caret, caret);
}
function grow(field) {
  if (CSS.supports('field-sizing: content')) return;
  field.style.height = 0;
  field.style.height = `${field.scrollHeight}px`;
}
export function save(form, refocus) {
  const row = form.closest('li'), { value, defaultValue } = $('.edit', form);
  if (!row) return;                     // Enter is a key, and sends the form: before this is there
  const title = value.replace(/\s*\n\s*/g, ' ').trim();
  close(form, refocus);
  if (title !== defaultValue) rename(row, title);
}
function close(form, refocus) {
  const row = form.closest('li');
  row.classList.remove('editing');      // first: removing the field blurs it
  form.remove();
  if (refocus) $('.rename', row).focus();
  if (row.matches('[data-gone]')) leave(row);
}
addEventListener('input', ({ target }) => target.matches('.editing textarea') && grow(target));
addEventListener('blur', ({ target }) => {
  if (target.matches?.('.editing .edit') && document.hasFocus()) save(target.form);
}, true);
function caretAt(label, { clientX, clientY }) {
  const at = document.caretPositionFromPoint?.(clientX, clientY) ??
    document.caretRangeFromPoint?.(clientX, clientY);
  const inside = at && label.contains(at.offsetNode ?? at.startContainer);
  return inside ? at.offset ?? at.startOffset : label.textContent.length;
}
function rename(row, title) {
  const was = [stateOf(row)], [{ ref, title: before }] = was;
  if (!title) return remove(row);
  send(`/todos/${ref}`, { _method: 'PATCH', title }, [{ ...naming(row), title }],
    { was: [{ ...naming(row), title: before }], said: `Renamed “${before}”.`, text: title });
}
export function settled({ key, rows, was, text, asked }, answer) {
  if (answer.ok) return asked && announce('Undone.');
  undos = undos.filter(each => each.key !== key);
  if (was) rows.forEach((_, at) => draw(was[at]));
  const row = answer.status !== 404 && was && find(rows[0]), field = $('.new-todo');
  if (text && row) edit(row, text);
  else if (text) field.value = `${text} ${field.value}`.trim();         // nothing typed is lost
  visit();
}

// In and out as text, a todo a line
const LINE = /^\s*(?:(?:[-*+•]|\d{1,4}[.)])(?:\s+|$))?(?:\[([\sxX]?)\](?:\s+|$))?(.*?)\s*$/;
export function paste(text) {
  const items = text.split(/[\r\n]+/).map(line => LINE.exec(line))
    .map(([, box, title]) => ({ title: title.replaceAll('\t', ' '), completed: /x/i.test(box) }))
    .filter(({ title }) => title), { length } = items;
  if (length < 2) return items.forEach(({ title }) => add(title));
  if (length > 500 && !confirm(`Add ${length} todos?`)) return;
  const key = newKey(), rows = items.map((item, at) => ({ ...item, ref: `${key}.${at}` }));
  send('/todos', { text: asText(items) }, rows, { key, text: asText(items),
    said: `Added ${length} todos.`, was: rows.map(({ ref }) => ({ ref, gone: true })) });
  land(rows.at(-1));
}
const asText = items =>
  items.map(({ title, completed }) => `- [${completed ? 'x' : ' '}] ${title}\n`).join('');
export const copyList = link => copy(asText(todos().map(stateOf)), link);
async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {                             // on some addresses there is none
    const field = document.createElement('textarea');
    ($('dialog') ?? document.body).append(field);
    field.value = text;
    field.select();
    document.execCommand('copy');
    field.remove();
  }
  const before = button.textContent;
  button.textContent = 'Copied';
  announce('Copied.');
  setTimeout(() => { button.textContent = before; }, 2000);
}

// Keys; `?` shows them
const walk = step => {
  const rows = [$('.new-todo'), ...$$('#todos .toggle')];
  const row = document.activeElement.closest('li');
  (rows[rows.indexOf(row ? $('.toggle', row) : rows[0]) + step] ?? rows[0]).focus();
};
const pressed = {
  ArrowDown: () => walk(1),
  ArrowUp: () => walk(-1),
  n: () => $('.new-todo').focus(),
  '/': () => $('.new-todo').focus(),
  '?': () => showKeys(),
};
const pressedOnRow = {
  e: row => edit(row),
  x: row => tick(row, !isDone(row)),
  Delete: remove,
};
addEventListener('keydown', press);
export function press(event) {          // the first one comes again when all this is there
  const { target, key, isComposing, keyCode } = event, row = target.closest('#todos > li');
  if (event.defaultPrevented || isComposing || keyCode === 229) return;   // Safari: 229 at the end
  const control = event.ctrlKey || event.metaKey;
  // A field that is empty has nothing to undo itself.
  const typing = target.matches(':read-write') && !(control && target.matches('.new-todo') &&
    !target.value && !byId('undo').hidden);
  let act = !typing && (pressed[key] || row && pressedOnRow[key]);
  if (target.matches('.edit')) {
    act = { Enter: () => save(target.form, true), Escape: () => close(target.form, true) }[key];
  } else if (target.matches('.new-todo') && key === 'ArrowDown') act = pressed[key];
  if (control) act = !typing && key === 'z' && undo;
  if (!act || event.altKey || target.closest('dialog[open]')) return;
  event.preventDefault();
  act(row);
}

// Dialogs
const KEYS = { 'n or /': 'a new todo', '↑ ↓': 'from todo to todo', 'e': 'edit', 'x or Space':
  'done, or not', 'Delete': 'remove', 'Ctrl Z, ⌘ Z': 'undo', '?': 'these keys' };
export function showKeys() {
  const rows = Object.entries(KEYS).map(([key, does]) =>
    `<dt><kbd>${key}</kbd></dt><dd>${does}</dd>`);
  dialog('Keys', `<dl>${rows.join('')}</dl>`);
}
export async function showDevices() {
  const answer = await fetch('/devices', { method: 'POST', headers: { Accept: 'application/json',
    'X-Owner': $('meta[name=owner]').content } });
  if (!answer.ok) return tell((await answer.json()).error);
  const { link, code, join, seconds } = await answer.json();
  const made = dialog('Open on another device', `<p>Open this link there:</p>
    <p><input class="link field" type="text" readonly aria-label="Link"></p>
    <p><button type="button" data-copy>Copy the link</button>
    <button type="button" data-share>Share …</button></p>
    <p>Or go to <b class="join"></b> there, and type</p><p><output class="code"></output></p>
    <p>Both are good once, for ${seconds / 60} minutes. Whoever opens one of them sees this list,
    and can change it.</p><p><a href="/devices">More about devices</a></p>`);
  $('.link', made).value = link;
  $('.join', made).textContent = join;
  $('.code', made).textContent = code;
  $('[data-copy]', made).onclick = ({ target }) => copy(link, target);
  $('[data-share]', made).hidden = !navigator.share;
  $('[data-share]', made).onclick = () => navigator.share({ url: link }).catch(() => {});
}
function dialog(title, html) {
  $('dialog')?.remove();
  document.body.insertAdjacentHTML('beforeend', `<dialog aria-label="${title}"><h2>${title}</h2>
    ${html}<form method="dialog"><button>Close</button></form></dialog>`);
  const made = $('dialog');
  made.addEventListener('close', () => made.remove());
  if (made.showModal) made.showModal();
  else made.setAttribute('open', '');
  return made;
}
''', SCRIPT_MARKS), 'text/javascript; charset=UTF-8')


if __name__ == '__main__':
    sys.exit(main())
