"""Whether a server answers that it is well, with or without TLS. As a program: the one of this machine, at the port of
``LLAMASERVE_PORT``.
"""

from __future__ import annotations

import http.client
import os
import ssl
from collections.abc import Iterator
from typing import Final

_ASKING: Final = 5.0  # seconds for an answer


def healthy_at(host: str, port: int) -> str | None:
    """Return the beginning of the URL at which a server answers that it is well; None if there is none. Whose
    certificate it has does not matter here.
    """
    for scheme, connection in _ways(host, port):
        try:
            connection.request("GET", "/health")
            if connection.getresponse().status == http.HTTPStatus.OK:
                return url(scheme, host, port)
        except (OSError, http.client.HTTPException):
            continue
        finally:
            connection.close()
    return None


def url(scheme: str, host: str, port: int) -> str:
    """Return the beginning of the URLs of a server."""
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def _ways(host: str, port: int) -> Iterator[tuple[str, http.client.HTTPConnection]]:
    yield "http", http.client.HTTPConnection(host, port, timeout=_ASKING)
    unverified = ssl.create_default_context()
    unverified.check_hostname, unverified.verify_mode = False, ssl.CERT_NONE
    yield "https", http.client.HTTPSConnection(host, port, timeout=_ASKING, context=unverified)


if __name__ == "__main__":
    raise SystemExit(healthy_at("127.0.0.1", int(os.environ["LLAMASERVE_PORT"])) is None)
