"""Caches on servers behind TLS: certificates are checked, and what is wrong with one is said at once."""

from __future__ import annotations

import pytest
import trustme
from tls import TlsRelay

from cachepipe import StoreError, open_store

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


@pytest.fixture(scope="module")
def ca(authority, tmp_path_factory):
    """The file with the certificate of the authority."""
    path = tmp_path_factory.mktemp("ca") / "ca.pem"
    authority.cert_pem.write_to_path(path)
    return path


@pytest.fixture
def other_ca(tmp_path):
    path = tmp_path / "other.pem"
    trustme.CA().cert_pem.write_to_path(path)
    return path


@pytest.fixture(params=["valkey", "postgres"])
def server(request):
    return request.getfixturevalue(f"{request.param}_server")


@pytest.fixture
def start(server):
    """A function that puts TLS with a certificate in front of a server; returns the beginning of a URL."""
    relays = []

    def begin(certificate):
        postgres = hasattr(server, "data")
        relays.append(TlsRelay(server, certificate, postgres=postgres))
        where = f"localhost:{relays[-1].port}"
        if postgres:
            return f"postgresql://postgres@{where}/postgres?schema=tls&sslmode=verify-full&sslrootcert="
        return f"rediss://{where}/0?prefix=tls&ca="

    yield begin
    for relay in relays:
        relay.close()


def test_a_cache_is_opened_over_tls(start, authority, ca):
    store, _ = open_store(f"{start(authority.issue_cert('localhost'))}{ca}")
    assert store.totals()["keys"] == 0
    store.close()


def test_a_certificate_of_an_unknown_authority_is_refused_at_once(start, authority, other_ca):
    url = f"{start(authority.issue_cert('localhost'))}{other_ca}&patience=1000"
    with pytest.raises(StoreError, match=r"certificate verify failed.*(\?ca|sslrootcert)=PATH"):
        open_store(url)


def test_a_certificate_of_another_host_is_refused_at_once(start, authority, ca):
    url = f"{start(authority.issue_cert('elsewhere.example'))}{ca}&patience=1000"
    with pytest.raises(StoreError, match=r"(?i)host ?name.*The certificate must name"):
        open_store(url)


def test_a_missing_file_of_the_authority_is_named_at_once(start, authority, tmp_path):
    url = f"{start(authority.issue_cert('localhost'))}{tmp_path / 'missing.pem'}&patience=1000"
    with pytest.raises(StoreError, match=r"missing\.pem"):
        open_store(url)


def test_a_database_without_tls_is_named_at_once(postgres_server, ca):
    url = postgres_server.url(f"&sslmode=verify-full&sslrootcert={ca}&patience=1000")
    with pytest.raises(StoreError, match="does not offer TLS"):
        open_store(url)
