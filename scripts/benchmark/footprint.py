"""How much memory the server takes over what llama.cpp itself needs for the same model, context and work.

What llama.cpp needs is what the bare loop's process gains by loading the model and doing the work: weights, key-value
cache and compute buffers as far as they are resident, and nothing of Python. What llama.cpp logs about its buffers is
kept beside it in the JSON file.
"""

from __future__ import annotations

from pathlib import Path

from benchmark import contenders, texts
from benchmark.answers import Request
from benchmark.contenders import Contender
from benchmark.lab import OURS, Lab
from benchmark.processes import Memory, command_line, memory, tree
from benchmark.results import Results, Row, at_most
from benchmark.throughput import STREAMS

_PROMPT = 600  # tokens: more than one batch, so that all buffers have been used


def run(lab: Lab) -> None:
    """Do the same work with the server and with the bare loop, one after the other, and look at both."""
    settings, params = lab.settings(), lab.load_params()
    file = Path(params["path"])
    with contenders.bare_loop() as loop:
        before = memory(loop.pid, file)
        loop.load(params)
        prompts = [texts.manual("memory", _PROMPT, loop.count), *texts.stories("memory", STREAMS - 1)]
        _work(lab, loop, prompts)
        after = memory(loop.pid, file)
        sizes = loop.sizes
    needed = Memory(after.file - before.file, after.rest - before.rest)
    with contenders.llamaserve(OURS, lab.model, settings) as server:
        _work(lab, server, prompts)
        lab.ask("memory", server, [Request(8, messages=({"role": "user", "content": "Hello!"},))])
        assert server.pid is not None
        processes = {pid: memory(pid, file) for pid in tree(server.pid)}
        names = {pid: command_line(pid) for pid in processes}
    total = sum(processes.values(), Memory(0.0, 0.0))
    figures = {"total": total.total, "needed": needed.total, "over": total.total - needed.total}
    figures |= {"api": processes[server.pid].total, "file": total.file}
    for figure, value in figures.items():
        lab.results.add("memory", OURS, figure, value)
    each = [{"command": names[pid], "file": each.file, "rest": each.rest} for pid, each in processes.items()]
    lab.results.add_detail("memory", {"processes": each, "llama.cpp": sizes})


def _work(lab: Lab, contender: Contender, prompts: list[str]) -> None:
    lab.ask("memory", contender, [Request(16, prompt) for prompt in prompts])


def rows(results: Results) -> list[Row]:
    """Everything, what llama.cpp needs of it, and the difference."""
    return [
        results.row(("memory", OURS, "total"), "memory of all processes after some work", "MiB"),
        results.row(("memory", OURS, "needed"), "memory: weights, key-value cache and compute buffers", "MiB"),
        results.row(("memory", OURS, "api"), "memory: the API process alone", "MiB"),
        results.row(("memory", OURS, "over"), "memory over what llama.cpp needs", "MiB", target=at_most(150)),
    ]
