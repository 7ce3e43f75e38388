"""A vLLM server that a benchmark starts and stops."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import psutil

READY_WITHIN = 600  # seconds, for a server


class Server:
    """vLLM on the CPU in an environment of its own, and what it has used.

    Args:
        python: that environment's.
        name: under which the model is served.
        dev_mode: whether its weights can be set.
    """

    def __init__(
        self, python: Path, model: Path, log: Path, name: str = "teacher", dtype: str = "float32",
        dev_mode: bool = False,
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        home = python.absolute().parent
        self.url, self.log = f"http://127.0.0.1:{port}/v1", log
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        environment |= {
            "PATH": f"{home}:{environment['PATH']}", "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",
            "VLLM_SERVER_DEV_MODE": str(int(dev_mode))}
        self.version = subprocess.run([home / "vllm", "--version"], env=environment, text=True,
                                      capture_output=True).stdout.strip().splitlines()[-1]
        command = [str(home / "vllm"), "serve", str(model), "--host", "127.0.0.1", "--port",
                   str(port), "--served-model-name", name, "--max-model-len", "512",
                   "--max-num-seqs", "8", "--max-logprobs", "-1", "--enforce-eager", "--dtype",
                   dtype]
        with log.open("w") as file:
            self.process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)

    def wait(self) -> None:
        end = time.monotonic() + READY_WITHIN
        while time.monotonic() < end and self.process.poll() is None:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{self.url}/models", timeout=5).close()
                return
            time.sleep(1)
        raise SystemExit(f"vLLM does not serve: {self.log.read_text()[-2000:]}")

    def _processes(self) -> list[psutil.Process]:
        own = psutil.Process(self.process.pid)
        return [own, *own.children(recursive=True)]

    def cpu_seconds(self) -> float:
        return sum(sum(process.cpu_times()[:2]) for process in self._processes())

    def peak_rss(self) -> int:
        """Of all its processes, each at its own fullest moment (Linux)."""
        status = [Path(f"/proc/{process.pid}/status").read_text() for process in self._processes()]
        return sum(int(text.split("VmHWM:")[1].split()[0]) * 1024 for text in status)

    def stop(self) -> None:
        processes = self._processes() if self.process.poll() is None else []
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(30)
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
