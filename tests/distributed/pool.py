"""A pool of two gloo processes that lives as long as the test session.

Starting a process and importing torch costs seconds, so the workers are spawned once and then take
``(function, args)`` tasks over a pipe. Functions are found by name, or by file if the name is taken, so
any module-level function of any test module can be sent.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import multiprocessing as mp
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

WORLD_SIZE = 2
# After one rank has failed, the other may hang in a collective: wait this long (s) before giving up on it.
GRACE = 5.0


class WorkerError(RuntimeError):
    """A function failed in the pool; the message holds the traceback of each failed rank."""


def _load(module: str, qualname: str, file: str) -> Callable[..., Any]:
    try:
        found = importlib.import_module(module)
        same = Path(getattr(found, "__file__", None) or "").resolve() == Path(file).resolve()
    except ImportError:
        same = False
    if not same:  # two test files share a base name, or pytest runs with --import-mode=importlib
        spec = importlib.util.spec_from_file_location(module, file)
        assert spec is not None
        assert spec.loader is not None
        found = importlib.util.module_from_spec(spec)
        sys.modules[module] = found
        spec.loader.exec_module(found)
    return getattr(found, qualname)


def _worker(rank: int, init_method: str, pipe: Connection) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=WORLD_SIZE)
    while True:
        try:
            task = pipe.recv_bytes()
        except EOFError:  # the session is over
            break
        try:
            path, where, args = pickle.loads(task)
            sys.path.extend(p for p in path if p not in sys.path)
            torch.manual_seed(0)
            torch.set_grad_enabled(True)
            # Plain pickle copies tensors; multiprocessing's pickler would share their memory.
            reply = pickle.dumps((True, _load(*where)(*pickle.loads(args))))
        except BaseException:
            reply = pickle.dumps((False, traceback.format_exc()))
        pipe.send_bytes(reply)
    dist.destroy_process_group()


class GlooPool:
    """Runs a function on both ranks of a gloo process group and returns the two results."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="gloo_pool_")
        self._workers: list[Any] = []
        self._pipes: list[Connection] = []
        self._starts = 0

    def run(self, fn: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
        """Call ``fn(*args)`` on every rank; the ranks tell themselves apart by ``dist.get_rank()``.

        The global RNG is seeded with 0 on both ranks before the call. A failure does not end the pool:
        workers that are stuck are replaced at the next call.

        Args:
            fn: a function defined at the top level of its module.
            *args: picklable arguments, the same for both ranks.
            timeout: seconds to wait for both results.

        Returns:
            The results in rank order.

        Raises:
            ValueError: if ``fn`` cannot be found by name.
            WorkerError: if it raised on a rank, or did not return in time.
        """
        qualname = getattr(fn, "__qualname__", repr(fn))
        if not inspect.isfunction(fn) or "." in qualname or qualname == "<lambda>":
            raise ValueError(f"{qualname} must be a function at the top level of a module.")
        where = (fn.__module__, qualname, inspect.getfile(fn))
        task = pickle.dumps((list(sys.path), where, pickle.dumps(args)))
        self._ensure_alive()
        for pipe in self._pipes:
            pipe.send_bytes(task)
        results = self._collect(time.monotonic() + timeout)
        failed = [f"--- rank {r}:\n{text}" for r, (ok, text) in enumerate(results) if not ok]
        if failed:
            raise WorkerError(f"{qualname} failed in the gloo pool\n" + "\n".join(failed))
        return [value for _, value in results]

    def close(self) -> None:
        """End the workers."""
        for pipe in self._pipes:
            pipe.close()
        for worker in self._workers:
            worker.join(GRACE)
            if worker.is_alive():
                worker.kill()
                worker.join()
        self._pipes, self._workers = [], []

    def _ensure_alive(self) -> None:
        if self._workers and all(w.is_alive() for w in self._workers):
            return
        self.close()
        self._starts += 1  # a file store must be fresh for every group
        init_method = (Path(self._folder.name) / f"store_{self._starts}").as_uri()
        context = mp.get_context("spawn")
        for rank in range(WORLD_SIZE):
            here, there = context.Pipe()
            worker = context.Process(target=_worker, args=(rank, init_method, there), daemon=True)
            worker.start()
            there.close()
            self._pipes.append(here)
            self._workers.append(worker)

    def _collect(self, deadline: float) -> list[tuple[bool, Any]]:
        results: list[tuple[bool, Any] | None] = [None] * WORLD_SIZE
        while any(r is None for r in results):
            open_pipes = [p for p, r in zip(self._pipes, results, strict=True) if r is None]
            ready = wait(open_pipes, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                rank = self._pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    results[rank] = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
                except EOFError:
                    results[rank] = (False, "the process died")
                if not results[rank][0]:  # type: ignore[index]
                    deadline = min(deadline, time.monotonic() + GRACE)
        if any(r is None or r[1] == "the process died" for r in results):
            for worker in self._workers:  # stuck in a collective: this group cannot be used again
                worker.kill()
                worker.join()
        return [(False, "no result in time (stuck?)") if r is None else r for r in results]
