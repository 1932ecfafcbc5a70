"""Contenders that take turns, each in a process of its own, and their numbers as a table."""

import json
import os
import subprocess
import sys
from typing import Any

from record import HERE


class Contender:
    """A process that does its work when told to."""

    def __init__(self, spec: dict[str, Any], *, script: str) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": str(spec["threads"])}
        self.name = spec["title"]
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / script), json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def ask(self, order: dict[str, Any]) -> dict[str, Any]:
        """The answer to an order."""
        assert self.process.stdin and self.process.stdout
        print(json.dumps(order), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended without an answer; its error is above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """Let the process end."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    heads = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        cells = []
        for head in heads:
            value = row.get(head, "")
            if isinstance(value, dict):
                value = f"{value['median']:.3f} ({value['min']:.3f} to {value['max']:.3f})"
            cells.append(str(value))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
