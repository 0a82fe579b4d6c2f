"""Order under load: bounded queues, fair words, batches that mix nothing up, deadlines, clients that go, the end."""

import concurrent.futures
import contextlib
import gc
import http.client
import io
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image

import diffiqa
from diffiqa.engine.manifest import read_manifest
from diffiqa.errors import BackendError, UsageError
from diffiqa.runtime.scorer import Scorer
from diffiqa.serve import api, connection
from diffiqa.serve.door import read_tokens
from diffiqa.serve.limits import Limits, Refusal
from diffiqa.serve.work import Job, Service

from .serving import Answer, Gate, Running, running, until

TOKENS = (b"first-token-0123456789", b"other-token-0123456789")


def grey(level: int, height: int = 32, width: int = 32) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), level, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


@contextlib.contextmanager
def gated(
    engine: Path, tokens: tuple[bytes, ...] = (), together: int = 1, **limits: Any
) -> Iterator[tuple[Running, Gate]]:
    gate = Gate(together)
    scorer = Scorer(read_manifest(engine), gate, backend="gate")
    with running(Service({"gate": scorer}, Limits(**limits)), tokens) as site:
        yield site, gate


class Clients:
    """Clients that ask at the same time."""

    def __init__(self, site: Running) -> None:
        self._site, self._pool = site, concurrent.futures.ThreadPoolExecutor(64)

    def ask(self, level: int, query: str = "crops=1", **more: Any) -> "concurrent.futures.Future[Answer]":
        return self._pool.submit(self._site.ask, "POST", f"/score?{query}", grey(level, **more))


def mean_of(answer: Answer) -> float:
    """The level of the picture that an answer belongs to: the gate's score is 0.5 × it + 1.5 × it."""
    return float(answer.json["score"]) / 2


def test_a_full_queue_refuses_at_once_and_loses_nothing(tiny_engine: Path) -> None:
    with gated(tiny_engine, queue=4) as (site, gate):
        clients = Clients(site)
        accepted = [clients.ask(level) for level in range(4)]
        until(lambda: site.service.gauges()["queue_images"] == 4)
        for refusal in [clients.ask(9).result() for _ in range(20)]:
            assert refusal.status == 503
            assert "the queue is full: 4 images wait" in refusal.json["error"]
            assert 1 <= int(refusal.headers["retry-after"]) <= 60
        gate.open.set()
        assert sorted(mean_of(future.result()) for future in accepted) == [0, 1, 2, 3]
        assert clients.ask(7).result().status == 200


def test_one_client_cannot_take_the_whole_queue(tiny_engine: Path) -> None:
    with gated(tiny_engine, TOKENS, queue=4, per_client=2) as (site, gate):
        mine, yours = ({"Authorization": f"Bearer {token.decode()}"} for token in TOKENS)
        pool = concurrent.futures.ThreadPoolExecutor(8)
        waiting = [pool.submit(site.ask, "POST", "/score", grey(level), mine) for level in (1, 2)]
        until(lambda: site.service.gauges()["queue_images"] == 2)
        refusal = site.ask("POST", "/score", grey(3), mine)
        assert refusal.status == 429
        assert "at most 2" in refusal.json["error"]
        waiting.append(pool.submit(site.ask, "POST", "/score", grey(4), yours))
        until(lambda: site.service.gauges()["queue_images"] == 3)
        gate.open.set()
        assert [future.result().status for future in waiting] == [200] * 3


def test_on_a_gpu_images_of_one_size_share_a_batch_and_answers_stay_their_own(tiny_engine: Path) -> None:
    with gated(tiny_engine, together=4) as (site, gate):
        clients = Clients(site)
        first = clients.ask(99)
        until(lambda: gate.groups == [[99]])  # it waited for others, and there were none
        small = {level: clients.ask(level) for level in range(10, 16)}
        large = {level: clients.ask(level, width=40) for level in range(20, 23)}
        other = {level: clients.ask(level, "crops=1&seed=5") for level in range(30, 32)}
        until(lambda: site.service.gauges()["queue_images"] == 12)
        gate.open.set()
        for level, future in ({99: first} | small | large | other).items():
            assert mean_of(future.result()) == level
        assert all(len({level // 10 for level in group}) == 1 for group in gate.groups)
        assert max(map(len, gate.groups)) > 1
        assert max(map(len, gate.groups)) <= 4


def test_a_request_that_takes_too_long_is_answered_and_its_score_cancelled(tiny_engine: Path) -> None:
    with gated(tiny_engine, seconds=0.3) as (site, gate):
        answer = site.ask("POST", "/score", grey(1))
        assert answer.status == 503
        assert "no score after 0.3 s" in answer.json["error"]
        until(lambda: gate.cancelled == 1)
        until(lambda: site.service.gauges()["queue_images"] == 0)


@pytest.mark.parametrize("path", ["/score", "/page/card"])
def test_when_a_client_goes_its_images_go_too(tiny_engine: Path, path: str, caplog: pytest.LogCaptureFixture) -> None:
    with gated(tiny_engine) as (site, gate):
        body = grey(1)
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        clients = [socket.create_connection(("127.0.0.1", site.port)) for _ in range(3)]
        for client in clients:
            client.sendall(head + body)
        until(lambda: site.service.gauges()["queue_images"] == 3)
        for client in clients:
            client.close()
        until(lambda: site.service.gauges()["queue_images"] == 0)
        until(lambda: gate.cancelled >= 1)
        gate.open.set()
        assert site.ask("POST", "/score", grey(2)).status == 200
        assert len(gate.groups) <= 4
    gc.collect()  # a task that ended in an error which nobody took would say so now
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


def test_slow_bodies_and_heads_are_given_up(tiny_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_HEAD_SECONDS", 0.3)
    with gated(tiny_engine, seconds=0.3) as (site, _):
        lying = site.raw(b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nhello", timeout=20)
        assert lying.startswith(b"HTTP/1.1 408")
        assert b'"the body was not all here after 0.3 s' in lying
        until(lambda: site.service.gauges()["body_bytes"] == 0)
        with socket.create_connection(("127.0.0.1", site.port), 20) as slow:
            with contextlib.suppress(ConnectionError):
                for _ in range(40):
                    slow.sendall(b"X")  # a head that never ends
                    time.sleep(0.05)
            with contextlib.suppress(ConnectionError):
                assert slow.recv(1) == b""
        late = http.client.HTTPConnection("127.0.0.1", site.port, timeout=20)
        late.connect()
        used = late.sock
        for _ in range(3):  # a connection in use is not given up
            late.request("GET", "/v2/health/live")
            assert late.getresponse().read()
            time.sleep(0.25)
        assert late.sock is used
        late.close()


def test_bodies_in_memory_are_bounded_over_all_requests(tiny_engine: Path) -> None:
    with gated(tiny_engine, body_bytes=1000) as (site, _), contextlib.ExitStack() as stack:
        for _ in range(8):  # MOST_HELD
            slow = stack.enter_context(socket.create_connection(("127.0.0.1", site.port)))
            slow.sendall(b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n" + b"x" * 990)
        until(lambda: site.service.gauges()["body_bytes"] == 8 * 990)
        refusal = site.ask("POST", "/score", b"x" * 500)
        assert refusal.status == 503
        assert "too much is being sent at once" in refusal.json["error"]
        stack.close()
        until(lambda: site.service.gauges()["body_bytes"] == 0)


def test_told_to_end_it_answers_what_it_accepted_and_takes_no_more(tiny_engine: Path) -> None:
    with gated(tiny_engine) as (site, gate):
        clients = Clients(site)
        accepted = [clients.ask(level) for level in range(6)]
        until(lambda: site.service.gauges()["queue_images"] == 6)
        site.server.should_exit = True
        until(lambda: not site.service.ready)
        until(lambda: _refuses(site.port))
        gate.open.set()
        assert sorted(mean_of(future.result()) for future in accepted) == list(range(6))


def test_what_the_drain_does_not_reach_is_told_so(tiny_engine: Path) -> None:
    with gated(tiny_engine, drain=0.3) as (site, gate):
        accepted = [Clients(site).ask(level) for level in range(3)]
        until(lambda: site.service.gauges()["queue_images"] == 3)
        site.server.should_exit = True
        for answer in [future.result() for future in accepted]:
            assert answer.status == 503
            assert "shutting down" in answer.json["error"]
        until(lambda: gate.cancelled == 1)


def _refuses(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) != 0


def test_only_a_token_opens_the_door(tiny_engine: Path, tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_text("# for the shop\n" + "\n".join(token.decode() for token in TOKENS) + "\n")
    assert read_tokens(path) == TOKENS
    with gated(tiny_engine, read_tokens(path)) as (site, gate):
        gate.open.set()
        for wrong in ("", "Bearer", "Bearer x", "Bearer first-token-012345678", "Basic %%%", "Basic Zmlyc3Q=", "\xe9"):
            answer = site.ask("GET", "/v2", headers={"Authorization": wrong} if wrong else {})
            assert answer.status == 401
            assert "Bearer TOKEN" in answer.json["error"]
            assert "www-authenticate" in answer.headers
        assert site.ask("POST", "/score", grey(1)).status == 401
        assert site.ask("GET", "/v2/health/live").status == 200
        assert site.ask("POST", "/score", grey(1), {"Authorization": f"bearer {TOKENS[1].decode()}"}).status == 200
        assert site.ask("GET", "/v2", headers={"Authorization": "Basic OmZpcnN0LXRva2VuLTAxMjM0NTY3ODk="}).status == 200
    for text in ("", "# nothing\n", "short\n", "two words of a token\n", "tokén-of-more-than-16\n"):
        path.write_text(text)
        with pytest.raises(UsageError, match="a token on each line"):
            read_tokens(path)
    with pytest.raises(UsageError, match="cannot read the tokens"):
        read_tokens(tmp_path / "none")


def test_a_page_of_another_site_cannot_use_it(tiny_engine: Path) -> None:
    with gated(tiny_engine) as (site, _):
        assert site.ask("POST", "/score", grey(1), {"Sec-Fetch-Site": "cross-site"}).status == 403
        assert site.ask("GET", "/v2", headers={"Sec-Fetch-Site": "cross-site"}).status == 200  # a link to it
        # Without TLS and from another machine, a browser sends the origin alone.
        for origin in ("http://elsewhere.example", "null"):
            assert site.ask("POST", "/score", grey(1), {"Origin": origin}).status == 403


def test_an_error_of_ours_is_told_and_logged_and_the_service_goes_on(
    tiny_engine: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with gated(tiny_engine) as (site, gate):
        gate.open.set()
        with monkeypatch.context() as patch:
            patch.setattr(gate, "run_together", lambda *_, **__: 1 / 0)
            answer = site.ask("POST", "/score", grey(1))
        assert (answer.status, answer.json) == (500, {"error": "an error of the service itself; its log says more"})
        assert "ZeroDivisionError" in caplog.text
        assert site.ask("POST", "/score", grey(1)).status == 200


def test_a_service_that_cannot_score_or_listen_says_so(tiny_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise BackendError("allocation failed")

    scorer = Scorer(read_manifest(tiny_engine), Gate(), backend="gate")
    with monkeypatch.context() as patch:
        patch.setattr(Gate, "run_together", broken)
        patch.setattr(api, "load_tested", lambda *_, **__: contextlib.nullcontext(scorer))
        with pytest.raises(BackendError, match="engine tiny cannot score: warm-up: not enough memory"):
            diffiqa.serve(tiny_engine, port=0)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(UsageError, match=r"cannot listen at 127.0.0.1, port \d+: Address already in use; choose"):
            diffiqa.serve("no/engine", port=other.getsockname()[1])
    with pytest.raises(UsageError, match=r"cannot listen at no\.such\.host\.invalid"):
        diffiqa.serve(tiny_engine, host="no.such.host.invalid")
    with pytest.raises(UsageError, match="'a b' cannot name an engine"):
        diffiqa.serve({"a b": tiny_engine}, port=0)


def test_the_end_of_an_answer_does_not_wait_for_the_client() -> None:
    """asyncio sends small pieces at once where a socket says that it is TCP; else each answer takes 40 ms more."""
    with api._bound("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP


class Quiet(bytes):
    """A body that notes when it is written out as text: of a large one that takes a second, and four times its size."""

    written: ClassVar[list[int]] = []

    def __repr__(self) -> str:
        self.written.append(len(self))
        return ""


def test_images_that_nobody_waits_for_leave_the_queue(tiny_engine: Path) -> None:
    gate = Gate()
    scorer = Scorer(read_manifest(tiny_engine), gate, backend="gate")
    with contextlib.closing(Service({"gate": scorer}, Limits(queue=8))) as service:
        jobs = [Job("gate", Quiet(grey(level)), str(level), diffiqa.Options()) for level in range(8)]
        service.submit(jobs)
        with pytest.raises(Refusal, match="the queue is full"):
            service.submit([Job("gate", grey(9), "9", diffiqa.Options())])
        for job in jobs[:7]:
            assert job.result.cancel()
        gate.open.set()
        assert jobs[7].result.result(30)
        assert service.gauges()["queue_images"] == 0
        assert len(gate.groups) <= 3  # the last, and those that were on their way
        assert not Quiet.written


def test_sigterm_under_load_ends_the_command_well(tiny_engine: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "diffiqa.cli",
        "serve",
        "--engine",
        str(tiny_engine),
        "--port",
        "0",
        "--threads",
        "1",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        line = ""
        while not (found := re.search(r"ready at http://127\.0\.0\.1:(\d+)", line)):
            line = process.stderr.readline()
            assert line, "it ended before it was ready"
        port = int(found[1])
        log: list[str] = []
        threading.Thread(target=lambda: log.extend(process.stderr or ())).start()
        answers: list[int] = []

        def load() -> None:
            site = Running(None, None, port)  # type: ignore[arg-type]
            with contextlib.suppress(OSError):
                while True:
                    answers.append(site.ask("POST", "/score?crops=1", grey(len(answers) % 200)).status)

        clients = [threading.Thread(target=load) for _ in range(8)]
        for client in clients:
            client.start()
        until(lambda: len(answers) >= 8)
        process.send_signal(signal.SIGTERM)
        for client in clients:
            client.join(60)
        assert process.wait(60) == 0
    assert set(answers) == {200}
    entries = [json.loads(line) for line in log if line.startswith("{")]
    assert {entry["status"] for entry in entries} == {200}  # every request that it took has its answer
    assert len(entries) == len(answers)
    assert not [line for line in log if not line.startswith("{")]
