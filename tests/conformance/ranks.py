"""Processes for transformers' distributed tests, on CPUs: the names that its mixins import from a helper of theirs."""

import os
import pickle
import socket
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_distributed(world_size: int) -> Callable[[Callable], Callable]:
    """Return a decorator that runs `function(rank, *arguments)` in a group of `world_size` processes."""

    def decorate(function: Callable) -> Callable:
        def run(*arguments: object) -> None:
            _start_rank_processes(
                _in_group, (_free_port(), world_size, pickle.dumps((function, arguments))), world_size
            )

        return run

    return decorate


def _start_rank_processes(function: Callable, args: tuple, nprocs: int) -> None:
    mp.spawn(_as_rank, (pickle.dumps((function, args)),), nprocs)


def _as_rank(rank: int, call: bytes) -> None:
    import upstream  # before unpickling: the functions live in its package

    upstream.load()
    torch.set_num_threads(1)
    function, arguments = pickle.loads(call)
    function(rank, *arguments)


def _in_group(rank: int, port: int, world_size: int, call: bytes) -> None:
    names = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world_size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in names.items()})
    dist.init_process_group(_get_distributed_backend(), rank=rank, world_size=world_size)
    try:
        function, arguments = pickle.loads(call)
        function(rank, *arguments)
    finally:
        dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _get_distributed_backend() -> str:
    return "gloo"


def _get_distributed_device_type() -> str:
    return "cpu"


def _get_rank_device(rank: int) -> torch.device:
    return torch.device("cpu")


def _set_rank_device(rank: int) -> None:
    """Nothing to choose on a CPU."""
