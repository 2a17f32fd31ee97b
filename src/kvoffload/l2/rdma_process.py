"""The parent's end of a node's child process: start it, talk to it, kill it, and know when it is gone. Of asyncio; one per life."""

from __future__ import annotations

import array
import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import kvoffload
from kvoffload.errors import PeerError
from kvoffload.l2.rdma_frames import MAX_PACKET_BYTES, FromChild, Setup, ToChild, decode_from_child, encode

PROGRAM = """
import sys
home, fd, parent, *first = sys.argv[1:]
sys.path[:0] = first
if home not in sys.path: sys.path.insert(len(first), home)
from kvoffload.l2.rdma_child import main
main(int(fd), int(parent))
"""
_HOME = str(Path(kvoffload.__file__).parent.parent)
_WORDS = 2000
_PACKETS_AT_ONCE = 64
_ENDING_S = 0.5


@dataclass(frozen=True, slots=True)
class Launch:
    """What runs in the child: ``program`` in Python, which finds modules in ``paths`` first."""

    paths: tuple[str, ...] = ()
    program: str = PROGRAM


class RdmaProcess:
    """``on_message`` gets what it says, ``on_gone`` is called once, when the process has ended and nothing of it is left.

    Owns: the process, the socket to it, its last words. Raises PeerError when it cannot be started.
    """

    def __init__(
        self,
        launch: Launch,
        setup: Setup,
        fds: Sequence[int],
        on_message: Callable[[RdmaProcess, FromChild], None],
        on_gone: Callable[[RdmaProcess], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._on_message = on_message
        self._on_gone = on_gone
        self._unsent: deque[tuple[ToChild, bytes]] = deque()
        self._words = b""
        self._fate = ""
        self._is_deaf = False
        self.is_gone = False
        self._start(launch, encode(setup), fds)

    def _start(self, launch: Launch, setup: bytes, fds: Sequence[int]) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        words, theirs_words = os.pipe()
        ours.setblocking(False)
        os.set_blocking(words, False)
        command = [sys.executable, "-P", "-c", launch.program, _HOME, str(theirs.fileno()), str(os.getpid()), *launch.paths]
        pidfd = -1
        try:
            # On the loop's thread: the kernel ends the child with the thread that started it, and this one lives as long as the node.
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=theirs_words, stderr=theirs_words, pass_fds=[theirs.fileno()]
            )
            try:
                pidfd = os.pidfd_open(self._process.pid)
                ours.sendmsg([setup], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])
            except BaseException:
                self._process.kill()
                self._process.wait()
                raise
        except OSError as error:
            ours.close()
            os.close(words)
            if pidfd >= 0:
                os.close(pidfd)
            raise PeerError(f"the child process cannot be started: {error}") from error
        finally:
            theirs.close()
            os.close(theirs_words)
        self._socket, self._pidfd, self._words_fd = ours, pidfd, words
        self._loop.add_reader(ours, self._hear)
        self._loop.add_reader(pidfd, self._reap)
        self._loop.add_reader(words, self._listen)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def fate(self) -> str:
        """Why it was killed, or how it ended, with what it said last."""
        words = self._words.decode(errors="replace").strip()[-400:]
        code = self._process.returncode
        ended = self._fate or (f"it was ended by {_signal_name(-code)}" if code is not None and code < 0 else f"it exited with {code}")
        return f"{ended}; its last words: {words}" if words else ended

    def send(self, message: ToChild) -> None:
        """In order; kept while the child does not read; lost when it is about to end. Raises MisuseError for what is no message."""
        packet = encode(message)
        if self._is_deaf:
            return
        self._unsent.append((message, packet))
        if len(self._unsent) == 1:
            self._flush()

    def unsend(self, message: ToChild) -> bool:
        """Whether it could be taken back: the child will never hear of it."""
        for entry in self._unsent:
            if entry[0] is message:
                self._unsent.remove(entry)
                return True
        return False

    def kill(self, reason: str) -> None:
        """It is gone when `on_gone` says so. May be called again."""
        if not self.is_gone:
            self._fate = self._fate or f"killed: {reason}"
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def _flush(self) -> None:
        self._loop.remove_writer(self._socket)
        while self._unsent and not self.is_gone:
            try:
                self._socket.send(self._unsent[0][1], socket.MSG_NOSIGNAL)
            except (BlockingIOError, InterruptedError):
                self._loop.add_writer(self._socket, self._flush)
                return
            except OSError as error:
                self._hung_up(f"its end of the socket is closed ({error.strerror})")
                return
            self._unsent.popleft()

    def _hear(self) -> None:
        for _ in range(_PACKETS_AT_ONCE):
            try:
                packet = self._socket.recv(MAX_PACKET_BYTES + 1)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                packet = b""
            if not packet:
                self._hung_up("it closed its end of the socket")
                return
            try:
                message = decode_from_child(packet)
            except PeerError as error:
                self.break_off(f"it said what makes no sense: {error}")
                return
            self._on_message(self, message)
            if self._is_deaf:
                return

    def break_off(self, reason: str) -> None:
        """Not a word more; and it dies. May be called again."""
        if self.is_gone:
            return
        self._stop_talking()
        self.kill(reason)

    def _hung_up(self, reason: str) -> None:
        """One that ends says by itself of what; one that does not is made to."""
        self._stop_talking()
        self._loop.call_later(_ENDING_S, self.kill, reason)

    def _stop_talking(self) -> None:
        self._is_deaf = True
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        self._unsent.clear()

    def _listen(self) -> None:
        try:
            said = os.read(self._words_fd, 65_536)
        except (BlockingIOError, InterruptedError):
            return
        if not said:
            self._loop.remove_reader(self._words_fd)
        self._words = (self._words + said)[-_WORDS:]

    def _reap(self) -> None:
        """All its threads have ended, so its mappings and its queue pairs are gone."""
        if self._process.poll() is None:
            return
        if not self._is_deaf:
            self._hear()  # what it answered before it ended is true
        self._listen()
        self.is_gone = self._is_deaf = True
        for fd in (self._socket.fileno(), self._pidfd, self._words_fd):
            self._loop.remove_reader(fd)
        self._loop.remove_writer(self._socket)
        self._socket.close()
        os.close(self._pidfd)
        os.close(self._words_fd)
        self._on_gone(self)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
