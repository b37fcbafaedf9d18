"""The processes of one training: all of them come, and none goes unnoticed."""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import NoReturn

import jax
from jax._src import clusters, distributed

from imagen_jax.barrier import not_come, numbered
from imagen_jax.errors import PeerLost, UserError

# Who finds that a process is gone waits so long for the others to find it too.
_AGREE_SECONDS = 10
# Open for as long as a process lives: process 0 has one of each other, these have its.
_lines: dict[int, socket.socket] = {}
_telling = threading.Lock()


def join(start_seconds: int, lost_seconds: int) -> None:
    """Makes one training of the processes that TPU VMs, GKE or Slurm have started.

    Comes before anything else of JAX.

    Args:
      start_seconds: how long to wait for processes that have not come.
      lost_seconds: after so long without a sign of life a process is lost, and JAX
        ends the others with a message that names it.

    Raises:
      UserError: when this process is alone.
      PeerLost: when others do not come in time.
    """
    address, count, index, _ = clusters.ClusterEnv.auto_detect_unset_distributed_params(
        None, None, None, None, None, start_seconds
    )
    if address is None or count is None or index is None:
        raise UserError(
            "--distributed: JAX does not see other processes here: it knows those of "
            "TPU VMs, GKE and Slurm (see launch/README.md). On one host leave "
            "--distributed out"
        )
    missing, lines = roll_call(address, count, index, start_seconds)
    if missing:
        raise PeerLost(
            f"--distributed: {numbered(missing)} of {count} did not come within "
            f"--start_timeout_seconds={start_seconds}; see the logs there. Process 0 "
            f"is at {address}"
        )
    jax.distributed.initialize(
        initialization_timeout=start_seconds, heartbeat_timeout_seconds=lost_seconds
    )
    watch(lines, count)


def watch(lines: dict[int, socket.socket], count: int) -> None:
    """Ends this process, status 4, as soon as one of the others has ended unawares.

    Args:
      lines: as `roll_call` gives them.
      count: of all processes.
    """
    _lines.update(lines)
    for other in lines:
        threading.Thread(target=_listen, args=(other, count), daemon=True).start()


def _listen(other: int, count: int) -> None:
    # A system closes what a killed process had open. Sums over all may fail later, and
    # in gloo they end other processes without saying why.
    with contextlib.suppress(OSError):
        said = _lines[other].recv(16).decode()
        if said.startswith("bye"):
            return
        other = int(said.split()[0]) if said else other
    _tell([other], count, "its connection was closed")


def roll_call(
    address: str, count: int, index: int, seconds: float
) -> tuple[list[int], dict[int, socket.socket]]:
    """Which of `count` processes are not there after `seconds`; all learn the same.

    JAX would wait as long and then abort without saying whom it waited for. Also open
    connections: process 0's to all others, the others' to process 0.

    Args:
      address: "host:port" of process 0, on which nobody listens yet.
      count: of all processes.
      index: of this one.
      seconds: how long to wait.
    """
    host, _, port = address.rpartition(":")
    if index:
        return _answer(host.strip("[]"), int(port), index, seconds)
    until = time.monotonic() + seconds
    here: dict[int, socket.socket] = {}
    with socket.create_server(("", int(port))) as server:
        while len(here) < count - 1 and (left := until - time.monotonic()) > 0:
            server.settimeout(left)
            with contextlib.suppress(OSError, ValueError):
                peer = server.accept()[0]
                peer.settimeout(5)
                here[int(peer.makefile().readline(16))] = peer
                peer.settimeout(None)
        missing = sorted(set(range(1, count)) - set(here))
        for peer in here.values():
            with contextlib.suppress(OSError):
                peer.sendall(json.dumps(missing).encode() + b"\n")
    return missing, here


def _answer(host: str, port: int, index: int, seconds: float):
    """The missing, from process 0; itself, when it does not come."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        try:
            call = socket.create_connection((host, port), timeout=left)
            call.sendall(f"{index}\n".encode())
            # Process 0 may just have come, and waits as long from then on.
            call.settimeout(seconds + 10)
            missing = json.loads(call.makefile().readline())
            call.settimeout(None)
            return missing, {0: call}
        except (OSError, ValueError):
            time.sleep(min(0.2, max(0, left)))
    return [0], {}


@contextlib.contextmanager
def losses_named() -> Iterator[None]:
    """Ends this process, status 4, when what is run fails because another is gone."""
    try:
        yield
    except PeerLost as lost:
        # The others find it at the same barrier.
        _say(b"bye\n")
        _leave(str(lost))
    except jax.errors.JaxRuntimeError as error:
        lost = _lost() if jax.process_count() > 1 else []
        if not lost:
            raise
        _tell(lost, jax.process_count(), str(error).splitlines()[0])
    finally:
        _say(b"bye\n")


def _say(word: bytes) -> None:
    for line in _lines.values():
        with contextlib.suppress(OSError):
            line.sendall(word)


def _tell(lost: list[int], count: int, how: str) -> NoReturn:
    """Ends this process, saying once, to all, which are gone."""
    with _telling:
        _say(f"{lost[0]}\n".encode())
        _leave(
            f"{numbered(lost)} of {count} is gone; see its log. The same command "
            f"resumes from the last checkpoint when all are back. Noticed by: {how}"
        )


def _leave(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr, flush=True)
    # A normal end would wait for the lost process, and then abort.
    os._exit(4)


def _lost() -> list[int]:
    """The processes that do not come to a barrier."""
    try:
        distributed.global_state.client.wait_at_barrier(
            "who_is_left", _AGREE_SECONDS * 1000
        )
    except jax.errors.JaxRuntimeError as error:
        return not_come(error)
    return []
