"""Pictures from web servers, whose answers nobody trusts: limits of size and time, no way into private networks."""

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
from collections.abc import Iterator
from urllib.parse import quote, urljoin, urlsplit

from ..errors import ImageError, first_line

MAX_BYTES, SECONDS, REDIRECTS = 100 * 2**20, 30.0, 5
_KEPT = "/%:@!$&'()*+,;=?~"  # in a URL that is quoted already
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def fetch(url: str, *, private: bool = False) -> bytes:
    """Return what a URL holds. With `private`, its host may have a private address, and lead on to others.

    Raises ImageError. From a public address no redirect leads to a private one.
    """
    ended = threading.Event()
    at = url
    for _ in range(REDIRECTS + 1):
        try:
            with _answer(at, private, ended) as (answer, is_private):
                private = private and is_private
                if answer.status in {301, 302, 303, 307, 308} and (location := answer.headers.get("Location")):
                    at = urljoin(at, location)
                    continue
                if answer.status != 200:
                    raise ImageError(f"{url}: the server answers {answer.status} {answer.reason}")
                return _body(url, answer, ended)
        except (OSError, http.client.HTTPException, ValueError) as exc:
            why = f"no answer within {SECONDS:g} s" if ended.is_set() else first_line(exc)
            raise ImageError(f"{url}: cannot be fetched ({why})") from exc
    raise ImageError(f"{url}: more than {REDIRECTS} redirects")


def is_public(address: str) -> bool:
    """Return whether an address is one of the internet, and no way round to one that is not."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        ip = ip.ipv4_mapped or ip
    if isinstance(ip, ipaddress.IPv6Address) and (ip.sixtofour or ip.teredo or ip in _NAT64):
        return False
    return ip.is_global and not ip.is_multicast


@contextlib.contextmanager
def _answer(url: str, private: bool, ended: threading.Event) -> Iterator[tuple[http.client.HTTPResponse, bool]]:
    """Yield the server's answer, and whether its address is private."""
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ImageError(f"{url}: only http and https are followed")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    # The address that was looked at is the one connected to: a second look-up could give another.
    address = str(socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)[0][4][0])
    public = is_public(address)
    if not (public or private):
        raise ImageError(f"{url}: leads to {address}, an address of a private network")
    with contextlib.closing(http.client.HTTPConnection(parts.hostname, port)) as connection:
        connection.sock = socket.create_connection((address, port), SECONDS)
        if parts.scheme == "https":
            secure = ssl.create_default_context()
            connection.sock = secure.wrap_socket(connection.sock, server_hostname=parts.hostname)

        def end(sock: socket.socket = connection.sock) -> None:
            ended.set()
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

        timer = threading.Timer(SECONDS, end)  # a server that sends a byte now and then never meets a socket's timeout
        timer.daemon = True
        timer.start()
        try:
            path = quote(parts.path or "/", _KEPT) + (f"?{quote(parts.query, _KEPT)}" if parts.query else "")
            connection.request("GET", path, headers={"User-Agent": "diffiqa", "Accept-Encoding": "identity"})
            yield connection.getresponse(), not public
        finally:
            timer.cancel()


def _body(url: str, answer: http.client.HTTPResponse, ended: threading.Event) -> bytes:
    data = answer.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ImageError(f"{url}: more than {MAX_BYTES} bytes")
    if ended.is_set():
        raise TimeoutError
    if answer.length:  # what is still to come, and does not
        raise http.client.IncompleteRead(data, answer.length)
    return data
