"""The least that a server can do: one connection, and as many bytes of one buffer as each request of eight bytes asks for.

``python l2_raw_child.py MOST_BYTES`` prints its port of 127.0.0.1. Imports nothing of the project.
"""

import socket
import sys

REQUEST_BYTES = 8


def main() -> None:
    buffer = memoryview(bytes(range(256)) * (int(sys.argv[1]) // 256))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sys.stdout.write(f"{listener.getsockname()[1]}\n")
        sys.stdout.flush()
        connection, _ = listener.accept()
    with connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while len(request := connection.recv(REQUEST_BYTES, socket.MSG_WAITALL)) == REQUEST_BYTES:
            connection.sendall(buffer[: int.from_bytes(request, "little")])


if __name__ == "__main__":
    main()
