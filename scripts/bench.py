"""Measure how fast the server answers over HTTP: one stream against several at once, in alternating rounds of one run.

    python scripts/bench.py                      starts a server with the starter model
    python scripts/bench.py --url http://host:port/v1 --model name

Rates are generated tokens a second of all streams together; what counts is the ratio, since both are measured side by
side on the same machine in the same minute.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

TOPICS = (
    "a fox",
    "the sea",
    "an old clock",
    "bread",
    "a train",
    "the moon",
    "a violin",
    "rain",
    "ants",
    "a lighthouse",
)


@contextmanager
def own_server(model: str | None) -> Iterator[str]:
    """Run a server on a free port for the length of the block."""
    command = [sys.executable, "-m", "llamaserve", "run", *([model] if model else []), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if (match := re.search(r"base URL\s+(\S+)", line)) is not None:
                    yield match[1]
                    break
            else:
                raise SystemExit("the server did not start; try: make run")
        finally:
            process.terminate()


async def stream(url: str, model: str | None, prompt: str, tokens: int) -> tuple[int, float]:
    """Generate one streamed completion; return its number of tokens and the seconds to its first one.

    Speaks plain HTTP over a socket, so that the client takes as little of the two cores as it can.
    """
    parts = urlsplit(url)
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
    body |= {"stream_options": {"include_usage": True}} | ({"model": model} if model else {})
    payload = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port or 80)
    start = time.perf_counter()
    head = f"POST {parts.path}/completions HTTP/1.1\r\nHost: {parts.netloc}\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n"
    writer.write(head.encode() + payload)
    first, answer = 0.0, b""
    while chunk := await reader.read(65536):
        if not first and b'"text"' in chunk:
            first = time.perf_counter() - start
        answer = answer[-4096:] + chunk
    writer.close()
    found = re.search(rb'"completion_tokens":(\d+)', answer)
    if found is None:
        raise SystemExit(f"the server answered: {answer[:500].decode(errors='replace')}")
    return int(found[1]), first


async def rate(url: str, model: str | None, streams: int, tokens: int, round_number: int) -> float:
    """Return the tokens a second of so many streams at once. Prompts differ, so that no cache helps."""
    prompts = [f"{round_number}. A story about {TOPICS[i % len(TOPICS)]}: once upon a time" for i in range(streams)]
    start = time.perf_counter()
    results = await asyncio.gather(*(stream(url, model, prompt, tokens) for prompt in prompts))
    return sum(count for count, _ in results) / (time.perf_counter() - start)


async def measure(url: str, model: str | None, streams: int, tokens: int, rounds: int) -> dict[str, object]:
    """Alternate one stream and several, and return medians, their ratio and every single figure."""
    await rate(url, model, 1, 16, -1)  # warm up
    single, several = [], []
    for number in range(rounds):
        single.append(await rate(url, model, 1, tokens, number))
        several.append(await rate(url, model, streams, tokens, number))
    ratio = statistics.median(several) / statistics.median(single)
    return {"streams": streams, "tokens": tokens, "single": single, "several": several, "ratio": ratio}


def main() -> None:
    """Parse the command line, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="base URL of a running server, with /v1")
    parser.add_argument("--model", help="model to ask for, and to serve if no URL is given")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128, help="tokens of each answer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="file to write all figures to")
    options = parser.parse_args()
    how = (options.model, options.streams, options.tokens, options.rounds)
    if options.url:
        result = asyncio.run(measure(options.url.rstrip("/"), *how))
    else:
        with own_server(options.model) as url:
            result = asyncio.run(measure(url, *how))
    for name in ("single", "several"):
        rates = result[name]
        assert isinstance(rates, list)
        shown = ", ".join(f"{each:.0f}" for each in rates)
        sys.stdout.write(f"{name:8} {statistics.median(rates):7.1f} tokens/s   ({shown})\n")
    sys.stdout.write(f"{options.streams} streams together are {result['ratio']:.2f} times as fast as one\n")
    if options.json:
        machine = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        with open(options.json, "w", encoding="utf-8") as file:  # noqa: PTH123 - a path as the user gave it
            json.dump(machine | result, file, indent=2)


if __name__ == "__main__":
    main()
