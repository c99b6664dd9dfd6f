"""The parties' links: who is let in, what a stranger can do, and that nothing on the way goes unnoticed."""

import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from rig import LIMITS, Rig, sum_over, uploads_of

from privkd.secure.client import service_links
from privkd.secure.group import PartyGroup
from privkd.secure.local import LocalParties
from privkd.secure.peers import PartyKeys, PeerError, PeerLink, Peers

OWN = [X25519PrivateKey.generate() for _ in range(4)]
PUBLIC = tuple(key.public_key().public_bytes_raw() for key in OWN)


def keys(rank: int, session: str = "session", own: X25519PrivateKey | None = None) -> PartyKeys:
    return PartyKeys(rank, own or OWN[rank], PUBLIC, session)


def linked(first: PartyKeys, second: PartyKeys) -> tuple[PeerLink, PeerLink]:
    """Both ends of a link, without the handshake's proof."""
    one, other = socket.socketpair()
    fresh = [X25519PrivateKey.generate() for _ in range(2)]
    public = [key.public_key().public_bytes_raw() for key in fresh]
    return (
        PeerLink(one, first, second.rank, fresh[0], public[1]),
        PeerLink(other, second, first.rank, fresh[1], public[0]),
    )


@pytest.fixture
def door() -> Iterator[tuple[socket.socket, int]]:
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        yield listener, listener.getsockname()[1]


def meet(
    listener: socket.socket, port: int, ranks: int = 4
) -> tuple[list[threading.Thread], dict[int, Peers]]:
    """Threads in which ``ranks`` parties meet, and what each has once it is done."""
    met: dict[int, Peers] = {}

    def party(rank: int) -> None:
        met[rank] = Peers.meet(keys(rank), host="127.0.0.1", port=port, listener=None if rank else listener)

    threads = [threading.Thread(target=party, args=(rank,), daemon=True) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    return threads, met


def everyone(met: dict[int, Peers], threads: list[threading.Thread]) -> None:
    """All are in, and say to each other what they should, small and large."""
    for thread in threads:
        thread.join(30)
    assert sorted(met) == [0, 1, 2, 3]
    heard: dict[tuple[int, int], list[bytes]] = {}

    def talk(rank: int) -> None:
        for turn, size in enumerate((0, 1, 3 << 20)):
            heard[rank, turn] = met[rank].exchange(bytes([rank]) * size, 3)

    talkers = [threading.Thread(target=talk, args=(rank,), daemon=True) for rank in range(3)]
    for talker in talkers:
        talker.start()
    for talker in talkers:
        talker.join(30)
    for rank in range(3):
        for turn, size in enumerate((0, 1, 3 << 20)):
            assert heard[rank, turn] == [bytes([other]) * size for other in range(3)]
    streams = {(i, j): met[i].link(j).stream_key("triples") for i in range(4) for j in range(4) if i != j}
    assert all(streams[i, j] == streams[j, i] for i, j in streams)
    assert len(set(streams.values())) == 6
    for peers in met.values():
        peers.close()


def test_parties_meet_in_any_order(door: tuple[socket.socket, int]) -> None:
    listener, port = door
    everyone(*reversed(meet(listener, port)))


def _silent(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port)) as caller:
        caller.settimeout(20)
        caller.recv(1)


def _garbage(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port)) as caller:
        caller.sendall(random.randbytes(random.choice([1, 36, 37, 38, 4096])))
        caller.settimeout(0.2)
        caller.recv(64)


def _imposter(port: int) -> None:
    """It knows all that is public: session, ranks, keys; it has only a key of its own."""
    Peers.meet(keys(random.choice([1, 2, 3]), own=X25519PrivateKey.generate()), host="127.0.0.1", port=port)
    raise AssertionError("let in")


@pytest.mark.parametrize("stranger", [_silent, _garbage, _imposter])
def test_strangers_are_not_let_in_and_hold_up_nobody(
    door: tuple[socket.socket, int], stranger: Callable[[int], None]
) -> None:
    """A hundred of them, more than are heard at once, come first and go on while the parties meet."""
    listener, port = door
    threads, met = meet(listener, port, ranks=1)
    let_in: list[str] = []

    def keep_on() -> None:
        until = time.monotonic() + 3.0
        while time.monotonic() < until:
            try:
                stranger(port)
            except AssertionError as error:
                let_in.append(str(error))
            except OSError:
                time.sleep(0.05)

    for _ in range(100):
        threading.Thread(target=keep_on, daemon=True).start()
    time.sleep(0.5)
    for rank in (1, 2, 3):

        def party(rank: int = rank) -> None:
            met[rank] = Peers.meet(keys(rank), host="127.0.0.1", port=port)

        threads.append(threading.Thread(target=party, daemon=True))
        threads[-1].start()
    everyone(met, threads)
    assert not let_in


def test_a_link_needs_both_keys_the_session_and_the_ranks() -> None:
    first, second = linked(keys(0), keys(1))
    first.send(b"hello")
    assert second.receive() == b"hello"
    second.send(b"")
    assert first.receive() == b""
    stranger = X25519PrivateKey.generate()
    for one, other in (
        (keys(0), keys(1, own=stranger)),
        (keys(0, own=stranger), keys(1)),
        (keys(0), keys(1, "another session")),
        (keys(0, own=OWN[2]), keys(1)),
    ):
        first, second = linked(one, other)
        first.send(b"hello")
        second.send(b"hello")
        for end in (first, second):
            with pytest.raises(PeerError, match="is not its"):
                end.receive()


def test_a_session_s_name_that_comes_again_gives_other_streams() -> None:
    streams = [linked(keys(0), keys(1))[0].stream_key("triples") for _ in range(3)]
    assert len(set(streams)) == 3


@pytest.mark.parametrize("harm", ["flip", "replay", "leave out", "swap", "reflect", "huge", "cut"])
def test_whatever_happens_to_frames_on_the_way_ends_the_link(harm: str) -> None:
    first, second = linked(keys(0), keys(1))
    wire, end = socket.socketpair()
    sent: list[bytes] = []
    sender = first.socket
    first.socket = wire
    for message in (b"one", b"two"):
        first.send(message)
        sent.append(end.recv(1 << 16))
    flipped = bytearray(sent[0])
    flipped[-1] ^= 1
    second.send(b"own")
    carried = {
        "flip": [bytes(flipped)],
        "replay": [sent[0], sent[0]],
        "leave out": [sent[1]],
        "swap": [sent[1], sent[0]],
        "reflect": [sender.recv(1 << 16)],
        "huge": [struct.pack("<I", (1 << 32) - 1)],
        "cut": [sent[0][:-1]],
    }[harm]
    for frame in carried:
        sender.sendall(frame)
    sender.shutdown(socket.SHUT_WR)
    heard = iter(second.receive, None)
    with pytest.raises(PeerError):
        list(heard)


def test_messages_are_not_to_be_seen_on_the_way() -> None:
    first, second = linked(keys(0), keys(1))
    first.send(b"the only copy of this" * 10)
    assert b"only copy" not in second.socket.recv(1 << 16)


# ---- through services -------------------------------------------------------------------------------


def test_a_round_is_exact_while_a_stranger_plays_rank_1() -> None:
    """The stranger comes before aggregator 1, knows the session's name and its peers' public keys."""
    with LocalParties(2, limits=LIMITS) as parties:
        group = PartyGroup(service_links(parties.urls, parties.client_tls))
        rig = Rig(group, (), parties.state)
        terms = rig.open()
        members = tuple(bytes.fromhex(key) for key in terms.keys)
        stop = threading.Event()
        let_in: list[Peers] = []
        join = type(rig.service(0)).join

        def overheard(link: object, session: str, port: int | None, deadline: float) -> int:
            found = join(link, session, port, deadline)  # type: ignore[arg-type]
            if port is None:
                own = PartyKeys(1, X25519PrivateKey.generate(), members, session)
                for _ in range(4):
                    threading.Thread(target=knock, args=(own, found), daemon=True).start()
                time.sleep(1.0)
            return found

        def knock(own: PartyKeys, port: int) -> None:
            while not stop.is_set():
                let_in.append(Peers.meet(own, host="127.0.0.1", port=port))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(rig.service(0)), "join", overheard)
            for upload in uploads_of(terms).values():
                rig.put(upload)
            total = rig.close(terms)
        stop.set()
        np.testing.assert_array_equal(total.integers, sum_over(terms, terms.roster))
        assert not let_in
        assert len(rig.journal(0, "posted", terms)) == 1
        group.disconnect()
