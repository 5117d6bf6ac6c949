"""Images by address and by Base64: limits, refusals, and servers that misbehave."""

import base64
import gzip
import http.server
import os
import threading
import time

import pytest

from runtime.errors import ImageError, ImageTooLargeError, RequestError
from runtime.fetch import decode_base64, download

CONTENT = os.urandom(200_000)
LIMIT = 1_000_000
ALLOW = "RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS"


class Site(http.server.BaseHTTPRequestHandler):
    """Answers well and badly."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
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

    def get_round_and_round(self):
        self.head(302, Location="/round-and-round", Content_Length=0)

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


@pytest.mark.parametrize("name", ["whole", "zipped", "chunked", "moved"])
def test_what_a_server_sends_is_what_arrives(site, monkeypatch, name):
    monkeypatch.setenv(ALLOW, "1")
    assert download(f"{site}/{name}", LIMIT, 10) == CONTENT


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("missing", ImageError, "HTTP status 404"),
        ("announced-too-large", ImageTooLargeError, f"more than {LIMIT} bytes"),
        ("bomb", ImageTooLargeError, f"more than {LIMIT} bytes"),
        ("cut-short", ImageError, "could not be downloaded"),
        ("dripping", ImageError, "longer than 1 seconds"),
        ("dripping-headers", ImageError, "longer than 1 seconds"),
        ("round-and-round", RequestError, "public http or https address"),
    ],
)
def test_a_download_that_fails_is_one_sentence(site, monkeypatch, name, error, said):
    monkeypatch.setenv(ALLOW, "1")
    with pytest.raises(error, match=said) as caught:
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
        "http://[::ffff:127.0.0.1]/a.jpg",
        "file:///etc/passwd",
        "ftp://example.com/a.jpg",
        "data:image/png;base64,aaaa",
        "nonsense",
        "http://",
        "http://a:99999/",
        "http://[::1/",
        "http://no-such-host.invalid/a.jpg",
    ],
)
def test_only_public_addresses_are_asked(monkeypatch, url):
    monkeypatch.delenv(ALLOW, raising=False)
    with pytest.raises(RequestError, match=r"^image_url must be a public http or https address\.$"):
        download(url, LIMIT, 1)


def test_a_redirect_to_a_private_address_is_not_followed(monkeypatch):
    import runpod.serverless.utils.rp_ssrf as ssrf

    seen = []

    def resolve(host, port):
        seen.append(host)
        if host != "public.example":
            raise ssrf.SSRFError("not public")
        return ["127.0.0.1"]

    class Redirect(Site):
        def do_GET(self):
            self.head(302, Location="http://169.254.169.254/", Content_Length=0)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Redirect)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(ssrf, "resolve_and_validate", resolve)
    with pytest.raises(RequestError):
        download(f"http://public.example:{server.server_port}/", LIMIT, 5)
    assert seen == ["public.example", "169.254.169.254"]
    server.shutdown()


@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,", "DATA:image/jpeg;charset=x;BASE64,"])
def test_base64_with_and_without_a_prefix(prefix):
    text = base64.b64encode(CONTENT).decode()
    assert decode_base64(prefix + text, LIMIT) == CONTENT


def test_white_space_in_base64_does_not_matter():
    assert decode_base64(base64.encodebytes(CONTENT).decode(), len(CONTENT)) == CONTENT


@pytest.mark.parametrize("text", ["*", "abc", "aGk=x", "data:image/png;base64", "data:,hello", "é" * 4])
def test_what_is_not_base64_says_so(text):
    with pytest.raises(RequestError, match="image_base64"):
        decode_base64(text, LIMIT)


def test_base64_over_the_limit_is_refused_before_it_is_decoded():
    text = base64.b64encode(bytes(1001)).decode()
    assert len(decode_base64(text, 1001)) == 1001
    with pytest.raises(ImageTooLargeError, match="more than 1000 bytes"):
        decode_base64(text, 1000)
