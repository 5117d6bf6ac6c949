"""Images by URL and by Base64: limits, refused addresses, and misbehaving servers."""

import asyncio
import base64
import gzip
import http.server
import ipaddress
import os
import socket
import threading
import time
from urllib.parse import quote

import pytest

from da3_runtime.errors import ImageError, ImageTooLargeError, RequestError
from da3_runtime.image import fetch
from da3_runtime.image.fetch import ByteBudget, decode_base64

CONTENT = os.urandom(200_000)
LIMIT = 1_000_000
ALLOW = "RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS"


def download(url, limit, *args):
    return asyncio.run(fetch.download(url, ByteBudget(limit), *args))


class Site(http.server.BaseHTTPRequestHandler):
    """A web server with a path for each correct or faulty response."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        if self.path == "/caf%C3%A9%20here":
            self.path = "/whole"
        name = self.path.strip("/").replace("-", "_")
        try:
            getattr(self, f"get_{name}")()
        except OSError:
            self.close_connection = True

    def head(self, status=200, **headers):
        self.send_response(status)
        for field, value in headers.items():
            self.send_header(field.replace("_", "-"), str(value))
        self.end_headers()

    def get_whole(self):
        self.head(Content_Length=len(CONTENT))
        self.wfile.write(CONTENT)

    def get_zipped(self):
        data = gzip.compress(CONTENT)
        self.head(Content_Length=len(data), Content_Encoding="gzip")
        self.wfile.write(data)

    def get_chunked(self):
        self.head(Transfer_Encoding="chunked")
        for start in range(0, len(CONTENT), 7000):
            part = CONTENT[start : start + 7000]
            self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
        self.wfile.write(b"0\r\n\r\n")

    def get_moved(self):
        self.head(302, Location="/whole", Content_Length=0)

    def get_moved_away(self):
        self.head(
            302, Location=f"http://other.example:{self.server.server_port}/whole", Content_Length=0
        )

    def get_moved_with_password(self):
        self.head(302, Location=f"http://me:x@{self.headers['Host']}/whole", Content_Length=0)

    def get_headers(self):
        received = str(self.headers).encode()
        self.head(Content_Length=len(received))
        self.wfile.write(received)

    def get_moved_to_unicode(self):
        self.send_response(302)
        self.wfile.write(b"".join(self._headers_buffer) + "Location: /caf\u00e9%20here\r\n".encode())
        self._headers_buffer.clear()
        self.send_header("Content-Length", "0")
        self.end_headers()

    def get_set_cookie(self):
        self.head(302, Location="/headers", Set_Cookie="a=b; Path=/", Content_Length=0)

    def get_redirect_loop(self):
        self.head(302, Location="/redirect-loop", Content_Length=0)

    def get_missing(self):
        self.head(404, Content_Length=0)

    def get_announced_too_large(self):
        self.head(Content_Length=LIMIT + 1)

    def get_bomb(self):
        data = gzip.compress(bytes(20 * LIMIT))
        self.head(Content_Length=len(data), Content_Encoding="gzip")
        self.wfile.write(data)

    def get_cut_short(self):
        self.head(Content_Length=1000)
        self.wfile.write(b"x")
        self.close_connection = True

    def get_dripping_headers(self):
        self.wfile.write(b"HTTP/1.1 200 OK\r\n")
        for number in range(90):
            self.wfile.write(b"X-%d: x\r\n" % number)
            self.wfile.flush()
            time.sleep(0.1)

    def get_dripping(self):
        self.head(Content_Length=1000)
        for _ in range(100):
            self.wfile.write(b"x")
            time.sleep(0.1)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def site():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.parametrize("name", ["whole", "zipped", "chunked", "moved", "moved-to-unicode"])
def test_the_downloaded_bytes_are_those_of_the_server(site, monkeypatch, name):
    monkeypatch.setenv(ALLOW, "1")
    assert download(f"{site}/{name}", LIMIT, 10) == CONTENT


def test_cookies_last_for_the_redirects_and_the_agent_is_our_own(site, monkeypatch):
    monkeypatch.setenv(ALLOW, "1")
    sent = download(f"{site}/set-cookie", LIMIT, 10).decode().lower()
    assert "cookie: a=b" in sent
    assert "user-agent: da3-runtime/" in sent
    assert "cookie" not in download(f"{site}/headers", LIMIT, 10).decode().lower()


def test_a_download_that_takes_too_long_ends(site, monkeypatch):
    """Also on the site's side: the connection is closed, and no thread is left."""
    monkeypatch.setenv(ALLOW, "1")

    async def five():
        asked = [fetch.download(f"{site}/dripping-headers", ByteBudget(LIMIT), 0.3) for _ in range(5)]
        return await asyncio.gather(*asked, return_exceptions=True)

    before = set(threading.enumerate())
    outcomes = asyncio.run(five())
    assert {type(each) for each in outcomes} == {ImageError}
    ours = [t for t in set(threading.enumerate()) - before if "process_request" not in t.name]
    assert all(thread.name.startswith("lookup") for thread in ours), ours


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("missing", ImageError, "HTTP status 404"),
        ("announced-too-large", ImageTooLargeError, f"more than {LIMIT} bytes"),
        ("bomb", ImageTooLargeError, f"more than {LIMIT} bytes"),
        ("cut-short", ImageError, "could not be downloaded"),
        ("dripping", ImageError, "longer than 1 seconds"),
        ("dripping-headers", ImageError, "longer than 1 seconds"),
        ("redirect-loop", ImageError, "more than 5 redirects"),
    ],
)
def test_a_failed_download_is_one_sentence_without_addresses(site, monkeypatch, name, error, message):
    monkeypatch.setenv(ALLOW, "1")
    with pytest.raises(error, match=message) as caught:
        download(f"{site}/{name}", LIMIT, 1 if "dripping" in name else 20)
    assert type(caught.value) is error
    assert "127.0.0.1" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/a.jpg",
        "http://localhost/a.jpg",
        "http://[::1]/a.jpg",
        "http://169.254.169.254/latest/meta-data/",
        "http://10.0.0.1/a.jpg",
        "http://0x7f000001/a.jpg",
        "http://2130706433/a.jpg",
        "http://0177.0.0.1/a.jpg",
        "http://127.1/a.jpg",
        "http://0.0.0.0/a.jpg",
        "http://[::]/a.jpg",
        "http://100.64.0.1/a.jpg",
        "http://192.168.1.1/a.jpg",
        "http://224.0.0.1/a.jpg",
        "http://[fe80::1]/a.jpg",
        "http://[fd00::1]/a.jpg",
        "http://[::ffff:127.0.0.1]/a.jpg",
        "http://[::127.0.0.1]/a.jpg",
        "http://[64:ff9b::169.254.169.254]/a.jpg",
        "http://[64:ff9b:1::10.0.0.1]/a.jpg",
        "http://[2002:7f00:1::]/a.jpg",
        "http://[2002:a9fe:a9fe::1]/a.jpg",
        "http://[2001:0:a00:1::f5ff:fffe]/a.jpg",
        "http://me:secret@8.8.8.8/a.jpg",
        "http://me@8.8.8.8/a.jpg",
        "file:///etc/passwd",
        "ftp://example.com/a.jpg",
        "data:image/png;base64,aaaa",
        "nonsense",
        "http://",
        "http://a:99999/",
        "http://[::1/",
    ],
)
def test_urls_that_are_not_public_are_refused(monkeypatch, url):
    monkeypatch.delenv(ALLOW, raising=False)
    with pytest.raises(RequestError, match=r"^image_url must be a public http or https address\.$"):
        download(url, LIMIT, 1)


def test_a_redirect_to_a_private_address_is_not_followed(monkeypatch):
    import runpod.serverless.utils.rp_ssrf as ssrf

    monkeypatch.delenv(ALLOW, raising=False)
    resolver = Resolver(monkeypatch, public_example=["127.0.0.1"])
    monkeypatch.setattr(ssrf, "is_safe_address", lambda address: address == "127.0.0.1")

    class Redirect(Site):
        def do_GET(self):
            self.head(302, Location="http://169.254.169.254/", Content_Length=0)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Redirect)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.raises(RequestError):
        download(f"http://public.example:{server.server_port}/", LIMIT, 5)
    assert resolver.connected == ["127.0.0.1"]
    server.shutdown()


def test_a_host_that_does_not_exist_is_named_as_the_reason():
    with pytest.raises(ImageError, match=r"^The host of image_url cannot be found\.$") as caught:
        download("http://no-such-host.invalid/a.jpg", LIMIT, 5)
    assert type(caught.value) is ImageError


class Resolver:
    """Replaces the system's resolver: a name's addresses are returned in turn, the last one repeatedly."""

    def __init__(self, monkeypatch, **names):
        self.names = {name.replace("_", "."): list(addresses) for name, addresses in names.items()}
        self.resolved = []
        self.connected = []
        connect = socket.socket.connect

        def getaddrinfo(host, port, *args, **kwargs):
            if host in self.names:
                self.resolved.append(host)
                addresses = self.names[host]
                address = addresses.pop(0) if len(addresses) > 1 else addresses[0]
            else:
                address = str(ipaddress.ip_address(host))
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            return [(family, socket.SOCK_STREAM, 6, "", (address, port))]

        def watched(sock, address):
            self.connected.append(address[0])
            return connect(sock, address)

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
        monkeypatch.setattr(socket.socket, "connect", watched)


def test_a_name_is_resolved_once_and_the_connection_goes_to_that_address(site, monkeypatch):
    """DNS rebinding: the second address of the name is the metadata service."""
    monkeypatch.setenv(ALLOW, "1")
    resolver = Resolver(monkeypatch, rebinding_example=["127.0.0.1", "169.254.169.254"])
    port = site.rpartition(":")[2]
    assert download(f"http://rebinding.example:{port}/whole", LIMIT, 10) == CONTENT
    assert resolver.resolved == ["rebinding.example"]
    assert resolver.connected == ["127.0.0.1"]


@pytest.mark.parametrize(
    "address", ["127.0.0.1", "10.1.2.3", "169.254.169.254", "64:ff9b::7f00:1", "::1"]
)
def test_a_name_with_a_private_address_is_refused_without_a_connection(monkeypatch, address):
    monkeypatch.delenv(ALLOW, raising=False)
    resolver = Resolver(monkeypatch, inside_example=[address])
    with pytest.raises(RequestError, match="public"):
        download("http://inside.example/", LIMIT, 5)
    assert resolver.resolved == ["inside.example"]
    assert resolver.connected == []


def test_the_worker_s_proxies_and_passwords_are_not_used(site, monkeypatch, tmp_path):
    monkeypatch.setenv(ALLOW, "1")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert b"authorization" not in download(f"{site}/headers", LIMIT, 10).lower()


def test_a_redirect_to_a_url_with_a_password_is_refused(site, monkeypatch):
    monkeypatch.setenv(ALLOW, "1")
    with pytest.raises(RequestError, match="public"):
        download(f"{site}/moved-with-password", LIMIT, 10)


HOSTS = ("cdn.example", "*.photos.example")


@pytest.mark.parametrize(
    "host", ["cdn.example", "CDN.example.", "a.photos.example", "a.b.photos.example"]
)
def test_allowed_hosts_are_downloaded_from(site, monkeypatch, host):
    monkeypatch.setenv(ALLOW, "1")
    Resolver(monkeypatch, **{host.lower().rstrip(".").replace(".", "_"): ["127.0.0.1"]})
    port = site.rpartition(":")[2]
    assert download(f"http://{host}:{port}/whole", LIMIT, 10, HOSTS) == CONTENT


@pytest.mark.parametrize(
    "host", ["photos.example", "evilphotos.example", "a.cdn.example", "cdn.example.evil", "127.0.0.1"]
)
def test_other_hosts_are_refused_without_a_connection(site, monkeypatch, host):
    monkeypatch.setenv(ALLOW, "1")
    resolver = Resolver(monkeypatch, **{host.replace(".", "_"): ["127.0.0.1"]})
    with pytest.raises(RequestError, match="image_url"):
        download(f"http://{host}:{site.rpartition(':')[2]}/whole", LIMIT, 10, HOSTS)
    assert resolver.connected == []


def test_a_redirect_away_from_the_allowed_hosts_is_refused(site, monkeypatch):
    monkeypatch.setenv(ALLOW, "1")
    resolver = Resolver(monkeypatch, cdn_example=["127.0.0.1"], other_example=["127.0.0.1"])
    port = site.rpartition(":")[2]
    assert download(f"http://cdn.example:{port}/moved", LIMIT, 10, HOSTS) == CONTENT
    with pytest.raises(RequestError, match="image_url"):
        download(f"http://cdn.example:{port}/moved-away", LIMIT, 10, HOSTS)
    assert "other.example" not in resolver.resolved


@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,", "DATA:image/jpeg;charset=x;BASE64,"])
def test_base64_with_and_without_a_prefix(prefix):
    text = base64.b64encode(CONTENT).decode()
    assert decode_base64(prefix + text, ByteBudget(LIMIT)) == CONTENT


def test_white_space_in_base64_is_ignored():
    assert decode_base64(base64.encodebytes(CONTENT).decode(), ByteBudget(len(CONTENT))) == CONTENT


@pytest.mark.parametrize("before", ["", " ", "\n", "\r\n\t"])
@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,", "data:image/png; base64, "])
@pytest.mark.parametrize("size", [1, 2, 3, 998, 999])
def test_base64_of_other_spellings_is_accepted(size, prefix, before):
    content = (bytes(range(256)) * 4)[-size:]  # the encoding has "+" and "/", or "-" and "_"
    for text in (base64.b64encode(content).decode(), base64.urlsafe_b64encode(content).decode()):
        for spelled in (text, text.rstrip("=")):
            assert decode_base64(f"{before}{prefix}{spelled}\n", ByteBudget(size)) == content


def test_a_data_uri_may_be_percent_encoded():
    text = quote(base64.b64encode(bytes([251, 255, 191, 1])).decode(), safe="")
    assert "%" in text
    assert decode_base64(f"data:image/png;base64,{text}", ByteBudget(LIMIT)) == bytes([251, 255, 191, 1])


@pytest.mark.parametrize(
    "text", ["*", "abcde", "aGk=x", "data:image/png;base64", "data:,hello", "é" * 4]
)
def test_invalid_base64_is_refused(text):
    with pytest.raises(RequestError, match="image_base64"):
        decode_base64(text, ByteBudget(LIMIT))


def test_base64_over_the_size_limit_is_refused():
    text = base64.b64encode(bytes(1001)).decode()
    assert len(decode_base64(text, ByteBudget(1001))) == 1001
    with pytest.raises(ImageTooLargeError, match="more than 1000 bytes"):
        decode_base64(text, ByteBudget(1000))
