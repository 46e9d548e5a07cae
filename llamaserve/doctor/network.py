"""Whether clients on this machine can reach a server: its port, the loopback addresses, and proxies in the way."""

from __future__ import annotations

import contextlib
import errno
import http.client
import ipaddress
import json
import shlex
import socket
from collections.abc import Iterator, Mapping

import psutil

from llamaserve.doctor.case import Case
from llamaserve.doctor.findings import Finding, command, note, ok, problem, warning
from llamaserve.doctor.machine import Machine
from llamaserve.registry.remedies import EDITOR

LOOPBACK = ("127.0.0.1", "::1")
_ASKING = 1.0  # seconds for what listens on the port to answer
_TRIED = 50  # ports, in the search for a free one
_PROXIES = ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY")
_EXCEPTIONS = ("no_proxy", "NO_PROXY")
_HOSTS = "/etc/hosts"


def network(case: Case) -> Iterator[Finding]:
    """Examine the port, and the ways to it."""
    host, port = case.settings.host, case.settings.port
    yield from _port(case, (host,) if host else LOOPBACK, port)
    yield from _loopback(case.machine)
    yield from _proxies(case.machine.environment)


# ---- the port ----------------------------------------------------------------------------------------------------


def _port(case: Case, hosts: tuple[str, ...], port: int) -> Iterator[Finding]:
    if port == 0:
        yield ok("port", "any free one is taken")
        return
    for host in hosts:
        try:
            _listen(host, port)
        except OSError as error:
            if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT) and host == "::1" and len(hosts) > 1:
                continue
            yield _no_port(case, host, port, error)
            return
    yield ok("port", f"{port} is free on {' and '.join(hosts)}")


def _listen(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    socket.create_server((host, port), family=family).close()


def _no_port(case: Case, host: str, port: int, error: OSError) -> Finding:
    if error.errno == errno.EACCES:
        message = f"{port} is one of the ports that only the system's own programs may use"
        return problem("port", message, _on_another(case, 8080))
    if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
        message = f"{host} is no address of this machine"
        return problem("port", message, case.command("run", "--host", "127.0.0.1", "--port", port))
    if error.errno != errno.EADDRINUSE:
        return problem("port", f"can't listen on {host}, port {port}: {error.strerror}", _on_another(case, port + 1))
    owner = _owner(port)
    if _is_llamaserve(host, port):
        return note("port", f"a llamaserve serves on {port} already{owner}", _on_another(case, port + 1))
    return problem("port", f"{port} on {host} is taken by another program{owner}", _on_another(case, port + 1))


def _on_another(case: Case, port: int) -> str:
    """Return the command that serves on the first free port from one on."""
    for each in range(port, min(port + _TRIED, 65536)):
        with contextlib.suppress(OSError):
            _listen(LOOPBACK[0], each)
            return case.command("run", "--port", each)
    return case.command("run", "--port", 0)


def _owner(port: int) -> str:
    """Say who listens on a port; nothing where this user may not know."""
    pid: int | None = None
    with contextlib.suppress(psutil.Error, OSError):
        connections = psutil.net_connections("tcp")
        listening = (each for each in connections if each.status == psutil.CONN_LISTEN)
        pid = next((each.pid for each in listening if each.laddr and each.laddr[1] == port), None)
    if pid is None:
        return " (on a Mac, AirPlay Receiver uses it)" if port == 5000 and psutil.MACOS else ""
    with contextlib.suppress(psutil.Error):
        return f": {psutil.Process(pid).name()}, process {pid}"
    return f": process {pid}"


def _is_llamaserve(host: str, port: int) -> bool:
    """Ask what listens on a port whether it is one of us, which /v1/internal/health tells."""
    address = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - compared, not bound
    connection = http.client.HTTPConnection(address, port, timeout=_ASKING)
    try:
        connection.request("GET", "/v1/internal/health")
        answer = json.loads(connection.getresponse().read(1 << 20))
    except (OSError, http.client.HTTPException, ValueError):
        return False
    finally:
        connection.close()
    return isinstance(answer, dict) and answer.get("status") == "ok" and "running" in answer and "models" in answer


# ---- the ways to it ----------------------------------------------------------------------------------------------


def _loopback(machine: Machine) -> Iterator[Finding]:
    try:
        _listen("::1", 0)
    except OSError:
        message = "there is no IPv6 loopback address; a client that takes localhost for ::1 tries 127.0.0.1 next"
        lo = "net.ipv6.conf.lo.disable_ipv6=0"
        yield note("IPv6", message, machine.as_root(command("sysctl", lo)) if not machine.is_mac else "ifconfig lo0")
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo("localhost", None)}
    except OSError:
        message = "the name localhost is not known here, so clients don't find the server by it"
        yield problem("localhost", message, machine.write_as_root("127.0.0.1 localhost", _HOSTS, add=True))
        return
    astray = sorted(each for each in found if not ipaddress.ip_address(each.partition("%")[0]).is_loopback)
    if astray:
        message = f"the name localhost leads to {', '.join(astray)}, which is not this machine's loopback address"
        yield problem("localhost", message, machine.as_root(f"{EDITOR} {_HOSTS}"))
    else:
        yield ok("localhost", f"leads to {' and '.join(sorted(found))}")


def _proxies(environment: Mapping[str, str]) -> Iterator[Finding]:
    proxies = [name for name in _PROXIES if environment.get(name)]
    listed = next((environment[name] for name in _EXCEPTIONS if environment.get(name)), "")
    excepted = {name.strip().lower() for name in listed.split(",")}
    wanted = [name for name in ("localhost", *LOOPBACK) if name not in excepted and f"[{name}]" not in excepted]
    if not proxies or "*" in excepted or not {"localhost", "127.0.0.1"} & set(wanted):
        yield ok("proxies", "none between clients on this machine and the server")
        return
    value = shlex.quote(",".join(filter(None, (listed, *wanted))))
    message = f"{' and '.join(proxies)}: clients on this machine ask the proxy for the server"
    yield warning("proxies", message, f"export NO_PROXY={value} no_proxy={value}")
