"""TLS before a server that has none: certificates of an authority made for a test, and a proxy that can be cut and come back."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ipaddress
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


def authority(folder: Path, name: str) -> tuple[Path, Path]:
    """An authority's certificate, and one that it gives the loopback address, with its key."""
    now = datetime.datetime.now(datetime.UTC)

    def made(
        subject: str, key: ec.EllipticCurvePrivateKey, issuer: str, signer: ec.EllipticCurvePrivateKey, *, ca: bool
    ) -> x509.Certificate:
        builder = x509.CertificateBuilder(
            issuer_name=x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]),
            subject_name=x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]),
            public_key=key.public_key(),
            serial_number=x509.random_serial_number(),
            not_valid_before=now - datetime.timedelta(days=1),
            not_valid_after=now + datetime.timedelta(days=1),
        ).add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        if not ca:
            address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
            builder = builder.add_extension(x509.SubjectAlternativeName([address]), critical=False)
        return builder.sign(signer, hashes.SHA256())

    ours, server = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    root, pair = folder / f"{name}.pem", folder / f"{name}-server.pem"
    root.write_bytes(made(name, ours, name, ours, ca=True).public_bytes(serialization.Encoding.PEM))
    key = server.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    pair.write_bytes(made("server", server, name, ours, ca=False).public_bytes(serialization.Encoding.PEM) + key)
    return root, pair


@dataclass
class TlsProxy:
    """Ends TLS at `port` and sends what comes on to `to`."""

    pair: Path
    port: int
    to: int
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)
    _writers: set[asyncio.StreamWriter] = field(default_factory=set)
    _server: asyncio.Server | None = None

    def start(self) -> None:
        """Listen."""
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(20)

    def cut(self) -> None:
        """Listen no more, and cut every connection."""
        asyncio.run_coroutine_threadsafe(self._cut(), self._loop).result(20)

    async def _start(self) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.pair)
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, ssl=context)

    async def _cut(self) -> None:
        if self._server is not None:
            self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            behind, onward = await asyncio.open_connection("127.0.0.1", self.to)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, onward}
        await asyncio.gather(_pump(reader, onward), _pump(behind, writer))
        self._writers -= {writer, onward}


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
    writer.transport.abort()


@contextmanager
def tls_proxy(pair: Path, port: int, to: int) -> Iterator[TlsProxy]:
    """A proxy at work in a thread of its own."""
    proxy = TlsProxy(pair, port, to)
    thread = threading.Thread(target=proxy._loop.run_forever)
    thread.start()
    try:
        proxy.start()
        yield proxy
    finally:
        proxy.cut()
        proxy._loop.call_soon_threadsafe(proxy._loop.stop)
        thread.join()
        for task in asyncio.all_tasks(proxy._loop):
            task.cancel()
        proxy._loop.run_until_complete(asyncio.sleep(0))
        proxy._loop.close()
