"""`python -m infra.nodes_ready COUNT SECONDS --address A --head IP`: wait until a new Ray cluster has all its nodes.

What batch scripts call between starting Ray's nodes and the job: a cluster that is incomplete fails here, by name and
in time, and not in the middle of a rendezvous.
"""

from __future__ import annotations

import argparse
import socket
import sys
import time

_POLL_SECONDS = 0.5


def alive_nodes(address: str, head: str) -> list[str]:
    """Addresses of the nodes that are alive; empty while no cluster answers."""
    import ray

    from infra.cluster import ask_head

    try:
        if not ray.is_initialized():
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), timeout=_POLL_SECONDS).close()  # Ray would wait for it 40 s
            ask_head(address)
            ray.init(address=address, _node_ip_address=head, log_to_driver=False, logging_level="error")
        return sorted(node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"])
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError):
        return []


def main(arguments: list[str] | None = None) -> int:
    """0 when all nodes are there, 1 when they are not in time."""
    parser = argparse.ArgumentParser(prog="infra.nodes_ready")
    parser.add_argument("count", type=int)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--address", required=True)
    parser.add_argument("--head", required=True)
    options = parser.parse_args(arguments)
    deadline = time.monotonic() + options.seconds
    found: list[str] = []
    while time.monotonic() < deadline:
        found = alive_nodes(options.address, options.head)
        if len(found) >= options.count:
            print(f"hvqd: {len(found)} nodes are there: {', '.join(found)}", flush=True)  # noqa: T201
            return 0
        time.sleep(_POLL_SECONDS)
    print(  # noqa: T201
        f"error: only {len(found)} of {options.count} nodes joined the Ray cluster at {options.address} within "
        f"{options.seconds:.0f} s: {', '.join(found) or 'none'}\n"
        "hint: see whether the nodes reach the head's port; start_seconds of the target gives them longer",
        file=sys.stderr,
        flush=True,
    )
    return 1


if __name__ == "__main__":
    sys.exit(main())
